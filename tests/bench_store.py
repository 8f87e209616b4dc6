"""Speed of reading a training batch's texts, 6 of 11 embeddings of random rows: store against .pth files.

The released FLAME code keeps one file per row, a float16 [11, D] tensor, and loads it whole. "cold": the
files are dropped from the page cache before every batch. Training uses Store.read_float16.
"""
import argparse
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
from data import common  # noqa: E402
from embed import scan_table, shard_file  # noqa: E402

COLUMNS, PICKED, BATCH, SHARD_SIZE = 11, 6, 256, 256
LABELS = {"pth": ".pth file per row, float32", "float32": "Store.read", "float16": "Store.read_float16"}
FOLDERS = {"pth": "pth", "float32": "store", "float16": "store"}


def make_files(folder, rows, D):
    """Write the same random vectors as a store and as a folder of .pth files."""
    vectors = np.random.default_rng(0).standard_normal((rows, COLUMNS, D), np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float16)
    for name in ("store", "pth"):
        (folder / name).mkdir()
    table = "".join(f"{i}\t\tA\tA\tA\n" for i in range(rows))
    (folder / "store/captions.tsv").write_text(f"key\timage\traw\tshort\tlong\n{table}")
    meta = scan_table(folder / "store/captions.tsv", SHARD_SIZE)
    meta |= {"D": D, "shard_size": SHARD_SIZE, "captions": {"path": ""},
             "llm": {"prompts": flame.prompts_to_json()}}
    common.write_json(folder / "store/meta.json", meta)
    for i, first in enumerate(range(0, rows, SHARD_SIZE)):
        common.write_array(shard_file(folder / "store", i), vectors[first:first + SHARD_SIZE])
    for i, row in enumerate(torch.from_numpy(vectors)):
        torch.save(row.clone(), folder / "pth" / f"{i}.pth")
    os.sync()


def drop_from_cache(folder):
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000, help="rows of the store (default: 4000)")
    parser.add_argument("--dims", default="576,5120", help="embedding dimensions D (default: 576,5120)")
    parser.add_argument("--batches", type=int, default=20, help="timed batches of 256 rows (default: 20)")
    args = parser.parse_args()
    flame.keep_freed_memory()  # as train.py does; it applies to all readers
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads; {args.rows} rows x {COLUMNS}, "
          f"batches of {BATCH} rows, {PICKED} embeddings per row")
    print(f"{'D':>6} {'cache':6} {'':26} {'rows/s':>10} {'x .pth':>8}")
    for D in map(int, args.dims.split(",")):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            folder = Path(folder)
            make_files(folder, args.rows, D)

            def read_pth(rows, columns):
                picked = [torch.load(folder / "pth" / f"{row}.pth", map_location="cpu")[chosen]
                          for row, chosen in zip(rows, torch.from_numpy(columns))]
                return torch.stack(picked).float()

            store = flame.open_store(folder / "store")
            readers = {"pth": read_pth, "float32": store.read, "float16": store.read_float16}
            for cache in ("warm", "cold"):
                rng = np.random.default_rng(1)
                seconds = dict.fromkeys(readers, 0.0)
                batches = args.batches if cache == "warm" else max(2, args.batches // 4)
                for _ in range(batches):
                    rows = rng.integers(0, args.rows, BATCH)
                    columns = rng.random((BATCH, COLUMNS)).argsort(1)[:, :PICKED]
                    for name, read in readers.items():
                        read(rows, columns) if cache == "warm" else drop_from_cache(folder / FOLDERS[name])
                        start = time.perf_counter()
                        out = read(rows, columns)
                        seconds[name] += time.perf_counter() - start
                        assert out.shape == (BATCH, PICKED, D)
                for name, label in LABELS.items():
                    rate = BATCH * batches / seconds[name]
                    print(f"{D:6} {cache:6} {label:26} {rate:10.0f} {seconds['pth'] / seconds[name]:8.1f}",
                          flush=True)


if __name__ == "__main__":
    main()
