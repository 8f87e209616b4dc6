"""Recall@1, 5, 10 both ways: evaluate.retrieval against CLIP_benchmark's code.

    python tests/bench_metrics.py

5,000 images and 25,000 texts, D = 512. Each runs in a process of its own, alone, on one thread. Memory is the
process's peak (VmHWM) above what it held when the embeddings lay ready and the libraries had run once.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
K = (1, 5, 10)


def example(images, per_image, dim):
    """Unit vectors, texts around their image -> text [N, D], image [M, D], image_of_text [N]"""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((images, dim), dtype=np.float32)
    owner = np.repeat(np.arange(images), per_image)
    text = rng.standard_normal((len(owner), dim), dtype=np.float32)
    text *= 7
    text += image[owner]
    for vectors in (text, image):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return text, image, owner


def ours(text, image, owner):
    import evaluate
    got = evaluate.retrieval(text, image, owner)
    return [got[direction][f"R@{k}"] for direction in ("text_to_image", "image_to_text") for k in K]


def clip_benchmark(text, image, owner):
    """What clip_benchmark.metrics.zeroshot_retrieval.evaluate does once it has the embeddings.

    64 is its default batch.
    """
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    positive_pairs = torch.zeros_like(scores, dtype=bool)
    positive_pairs[torch.arange(len(scores)), torch.from_numpy(owner)] = True
    return [100 * (batchify(recall_at_k, s, pairs, 64, "cpu", k=k) > 0).float().mean().item()
            for s, pairs in ((scores, positive_pairs), (scores.T, positive_pairs.T)) for k in K]


def peak():
    """MiB; on Linux."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name, folder):
    import torch
    torch.set_num_threads(1)
    run = globals()[name]
    run(*example(20, 2, 64))
    # Made elsewhere: making it takes memory, too.
    data = [np.load(Path(folder) / f"{part}.npy") for part in ("text", "image", "owner")]
    before, start = peak(), time.perf_counter()
    recalls = run(*data)
    print(json.dumps({"seconds": time.perf_counter() - start, "mib": peak() - before, "recalls": recalls}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(*args.only)
        sys.exit()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for part, values in zip(("text", "image", "owner"), example(5000, 5, 512)):
            np.save(Path(folder) / f"{part}.npy", values)
        for name in ("ours", "clip_benchmark"):
            command = [sys.executable, __file__, "--only", name, folder]
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results[name] = result
            recalls = [f"{recall:.3f}" for recall in result["recalls"]]
            print(f"{name:15} {result['seconds']:8.2f} s   {result['mib']:8.1f} MiB   "
                  f"text to image {' '.join(recalls[:3])}   image to text {' '.join(recalls[3:])}",
                  flush=True)
    a, b = results["ours"], results["clip_benchmark"]
    difference = max(abs(x - y) for x, y in zip(a["recalls"], b["recalls"])) / 100
    print(f"{b['seconds'] / a['seconds']:.1f} x faster, {b['mib'] / max(a['mib'], 1):.1f} x less memory; "
          f"largest difference of a share {difference:.1e}")
