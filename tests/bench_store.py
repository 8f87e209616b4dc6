"""Reading a training batch's texts, 6 of 11 embeddings of random rows: from a store, from a .pth file a row.

    python tests/bench_store.py                # D = 576 and 5120, 4,000 rows, batches of 256
    python tests/bench_store.py --rows 20000

The peer is how the released FLAME code keeps them: a float16 [11, D] tensor a file, loaded whole. Cold: the
files' pages are dropped from the system's cache before every batch. Warm: they were read just before. Rows
are drawn anew for every batch.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flame  # noqa: E402
from data import store  # noqa: E402

M, PICKED, BATCH = 11, 6, 256


def make(folder, rows, D):
    """The same random vectors as a float16 store, an int8 store and a folder of .pth files."""
    vectors = np.random.default_rng(0).standard_normal((rows, M, D), np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    statistics = np.stack([vectors.mean(0), vectors.std(0)])
    for name in ("float16", "int8"):
        out = folder / name
        out.mkdir()
        llm = {"name": "none", "fingerprint": "", "layer": 0, "positions": "restart"}
        meta = {"N": rows, "D": D, "columns": flame.COLUMNS, "store": name,
                "llm": llm, "captions": {"path": "", "sha256": ""}}
        store.allocate(out, meta, rows, D)
        int8 = store.quantised(vectors, statistics)
        store.write_rows(out, int8 if name == "int8" else {"embeddings": vectors.astype(np.float16)}, 0)
        np.save(out / "statistics.npy", statistics)
        for file in ("keys.txt", "images.txt"):
            (out / file).write_text("".join(f"{i}\n" for i in range(rows)))
        (out / "meta.json").write_text(json.dumps(meta))
    (folder / "pth").mkdir()
    for i in range(rows):
        torch.save(torch.from_numpy(vectors[i]).half(), folder / "pth" / f"{i}.pth")
    os.sync()


def drop(folder):
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000, help="in the store (default 4000)")
    parser.add_argument("--dims", default="576,5120", help="widths D (default 576,5120)")
    parser.add_argument("--batches", type=int, default=20, help="timed batches of 256 rows (default 20)")
    args = parser.parse_args()
    flame.keep_freed_memory()  # as train.py does, for all ways alike
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads; {args.rows} rows x {M}, "
          f"batches of {BATCH} rows, {PICKED} embeddings a row -> float32 unit vectors")
    print(f"{'D':>6} {'cache':6} {'':26} {'rows/s':>10} {'x .pth':>8}")
    for D in map(int, args.dims.split(",")):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            folder = Path(folder)
            make(folder, args.rows, D)

            def from_files(rows, columns):
                picked = []
                for row, own in zip(rows, torch.from_numpy(columns)):
                    picked.append(torch.load(folder / "pth" / f"{row}.pth", map_location="cpu")[own])
                return torch.stack(picked).float()

            ways = {"pth": (".pth file per sample", from_files)}
            for name in ("float16", "int8"):
                ways[name] = (f"store, {name}", flame.open_store(folder / name).read)
            for cache in ("warm", "cold"):
                base = None
                for name, (label, read) in ways.items():
                    random = np.random.default_rng(1)
                    seconds = 0.0
                    for _ in range(args.batches if cache == "warm" else max(2, args.batches // 4)):
                        rows = random.integers(0, args.rows, BATCH)
                        columns = random.random((BATCH, M)).argsort(1)[:, :PICKED]
                        read(rows, columns) if cache == "warm" else drop(folder / name)
                        started = time.perf_counter()
                        out = read(rows, columns)
                        seconds += time.perf_counter() - started
                        assert out.shape == (BATCH, PICKED, D)
                    rate = BATCH * (args.batches if cache == "warm" else max(2, args.batches // 4)) / seconds
                    base = base or rate
                    print(f"{D:6} {cache:6} {label:26} {rate:10.0f} {rate / base:8.1f}", flush=True)


if __name__ == "__main__":
    main()
