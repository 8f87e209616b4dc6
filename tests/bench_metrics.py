"""Speed and memory of Recall@1, 5, 10 in both directions: evaluate.retrieval against CLIP_benchmark.

    python tests/bench_metrics.py

5,000 images and 25,000 texts, D = 512. Each implementation runs on one thread, in its own process. Memory is
the peak of that process (VmHWM) above its size after the embeddings are loaded and the libraries warmed up.
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


def make_data(images, per_image, dim):
    """Return random unit vectors, texts near their image: text [N, D], image [M, D], image_of_text [N]."""
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
    result = evaluate.retrieval(text, image, owner)
    return [result[direction][f"R@{k}"] for direction in ("text_to_image", "image_to_text") for k in K]


def clip_benchmark(text, image, owner):
    """Do what clip_benchmark.metrics.zeroshot_retrieval.evaluate does after encoding, in its batches."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    positive_pairs = torch.zeros_like(scores, dtype=bool)
    positive_pairs[torch.arange(len(scores)), torch.from_numpy(owner)] = True
    return [100 * (batchify(recall_at_k, s, pairs, 64, "cpu", k=k) > 0).float().mean().item()
            for s, pairs in ((scores, positive_pairs), (scores.T, positive_pairs.T)) for k in K]


def peak_mib():
    """Return the peak memory of this process (Linux only)."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name, folder):
    import torch
    torch.set_num_threads(1)
    run = globals()[name]
    run(*make_data(20, 2, 64))  # warm up
    # The parent made the data, because making it takes memory, too.
    data = [np.load(Path(folder) / f"{part}.npy") for part in ("text", "image", "owner")]
    before, start = peak_mib(), time.perf_counter()
    recalls = run(*data)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib": peak_mib() - before, "recalls": recalls}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(*args.only)
        sys.exit()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for part, values in zip(("text", "image", "owner"), make_data(5000, 5, 512)):
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
          f"largest difference {difference:.1e} (as a fraction)")
