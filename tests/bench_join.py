"""What a join takes at YFCC15M's size: seconds, peak memory, and the disk while captions.tsv is made.

    python tests/bench_join.py [--rows 15000000] [--folder DIR]

The captions are a TSV; the recaptions a JSON list of {"__key__", "minicpm"} of about 600 bytes, their keys in
another order. Both are written by DuckDB first; some 60 GB of disk at 15 million rows.
"""
import argparse
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.captions import write_table  # noqa: E402

STEP = 7_368_787  # a prime: n * STEP % rows goes through all keys, far from their order
WORDS = "a red kite above the calm sea at sunset with one small boat to its left, two people on sand".split()


def write(folder, rows):
    parts = [" ".join(WORDS[(k + j * j) % len(WORDS)] for j in range(14)) for k in range(30)]
    long = " || ' ' || ".join(f"{parts[3 * k:3 * k + 3]}[1 + key // {7 ** (k % 8)} % 3]" for k in range(10))
    # What a picture shows, so that a recaption shares a word with its caption: "boat" and a number.
    with duckdb.connect() as database:
        database.execute(
            "COPY (SELECT format('{:09d}', n) AS key, 'a photo of boat' || n AS raw "
            f"FROM range({rows}) t(n)) TO '{folder}/raw.tsv' (HEADER, DELIMITER '\t', QUOTE '')")
        database.execute(
            f"COPY (SELECT format('{{:09d}}', key) AS __key__, 'boat' || key || ' and ' || {long} AS minicpm "
            f"FROM (SELECT n * {STEP} % {rows} AS key FROM range({rows}) t(n))) "
            f"TO '{folder}/long.json' (FORMAT json, ARRAY true)")


def watch(folder, largest):
    while True:
        with os.popen(f"du -sb {folder} 2> /dev/null") as du:
            largest[0] = max(largest[0], int((du.read().split() or [0])[0]))
        time.sleep(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=15_000_000)
    parser.add_argument("--folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(folder, args.rows)
        sizes = [os.path.getsize(f"{folder}/{name}") / 1e9 for name in ("raw.tsv", "long.json")]
        print(f"{args.rows} rows: {sizes[0]:.1f} GB of captions, {sizes[1]:.1f} GB of recaptions", flush=True)
        (Path(folder) / "store").mkdir()
        largest = [0]
        threading.Thread(target=watch, args=(f"{folder}/store", largest), daemon=True).start()
        start = time.perf_counter()
        table = f"{folder}/store/captions.tsv"
        write_table(table, f"{folder}/raw.tsv", [("long", f"{folder}/long.json")])
        seconds = time.perf_counter() - start
        memory = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
        print(f"{seconds:.0f} s, peak memory {memory:.1f} GB, peak disk {largest[0] / 1e9:.1f} GB; "
              f"captions.tsv {os.path.getsize(table) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
