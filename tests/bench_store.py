"""Reading a training batch's texts, 6 of 11 embeddings of random rows: from a store, from a .pth file a row.

    python tests/bench_store.py                # D = 576 and 5120, 4,000 rows, batches of 256
    python tests/bench_store.py --rows 20000

The peer is how the released FLAME code keeps them: a float16 [11, D] tensor a file, loaded whole. Cold: the
files' pages are dropped from the system's cache before every batch. Warm: they were read just before. Rows
are drawn anew for every batch; the ways take turns. Store.take is what training reads.
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
from data import files  # noqa: E402
from data.store import window_file  # noqa: E402

M, PICKED, BATCH, WINDOW = 11, 6, 256, 256
LABELS = {"pth": ".pth file a row, float32", "read": "Store.read, float32", "take": "Store.take, float16"}
FOLDERS = {"pth": "pth", "read": "store", "take": "store"}


def make(folder, rows, D):
    """The same random vectors as a store and as a folder of .pth files."""
    vectors = np.random.default_rng(0).standard_normal((rows, M, D), np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float16)
    for name in ("store", "pth"):
        (folder / name).mkdir()
    table = "".join(f"{i}\t\tA\tA\tA\n" for i in range(rows))
    (folder / "store/captions.tsv").write_text(f"key\timage\traw\tshort\tlong\n{table}")
    meta = {"N": rows, "D": D, "window": WINDOW, "captions": {"path": ""},
            "llm": {"questions": flame.questions()}}
    files.write_json(folder / "store/meta.json", meta)
    for w in range(-(-rows // WINDOW)):
        files.write_array(window_file(folder / "store", w), vectors[w * WINDOW:(w + 1) * WINDOW])
    for i in range(rows):
        torch.save(torch.from_numpy(vectors[i]).clone(), folder / "pth" / f"{i}.pth")
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
          f"batches of {BATCH} rows, {PICKED} embeddings a row")
    print(f"{'D':>6} {'cache':6} {'':24} {'rows/s':>10} {'x .pth':>8}")
    for D in map(int, args.dims.split(",")):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            folder = Path(folder)
            make(folder, args.rows, D)

            def from_files(rows, columns):
                picked = [torch.load(folder / "pth" / f"{row}.pth", map_location="cpu")[chosen]
                          for row, chosen in zip(rows, torch.from_numpy(columns))]
                return torch.stack(picked).float()

            store = flame.open_store(folder / "store")
            ways = {"pth": from_files, "read": store.read, "take": store.take}
            for cache in ("warm", "cold"):
                random = np.random.default_rng(1)
                seconds = dict.fromkeys(ways, 0.0)
                batches = args.batches if cache == "warm" else max(2, args.batches // 4)
                for _ in range(batches):
                    rows = random.integers(0, args.rows, BATCH)
                    columns = random.random((BATCH, M)).argsort(1)[:, :PICKED]
                    for name, read in ways.items():
                        read(rows, columns) if cache == "warm" else drop(folder / FOLDERS[name])
                        started = time.perf_counter()
                        out = read(rows, columns)
                        seconds[name] += time.perf_counter() - started
                        assert out.shape == (BATCH, PICKED, D)
                for name, label in LABELS.items():
                    rate = BATCH * batches / seconds[name]
                    print(f"{D:6} {cache:6} {label:24} {rate:10.0f} {seconds['pth'] / seconds[name]:8.1f}",
                          flush=True)


if __name__ == "__main__":
    main()
