"""What `--join` takes at YFCC15M's size: seconds and memory of rank 0, which reads the file, and of others.

    python tests/bench_join.py [--rows 15000000] [--ranks 8] [--folder DIR]

The file is a JSON list of {"__key__", "minicpm"}, captions of about 600 bytes, its keys in another order than
the captions'. Each rank is a process; memory is the peak, over the imports' own. All look up keys at the same
time.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.captions import open_join, read_join  # noqa: E402

LOOKUPS = 200_000
STEP = 7_368_787  # a prime: n * STEP % rows goes through all keys, far from their order
WORDS = "a red kite above the calm sea at sunset with one small boat to its left, two people on sand".split()


def peak():
    """MB; ru_maxrss would begin at the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def write(path, rows):
    with open(path, "w") as file:
        for n in range(rows):
            key = n * STEP % rows
            text = " ".join(WORDS[(key + i * i) % len(WORDS)] for i in range(140))
            row = {"__key__": f"{key:09d}", "minicpm": f"{key}: {text}."}
            file.write(("[" if n == 0 else ", ") + json.dumps(row))
        file.write("]")


def rank(number, folder, rows):
    before = peak()
    start = time.perf_counter()
    index = folder / "join-long.sqlite"
    joined = open_join(index) if number else read_join("long", folder / "long.json", {}, index)
    opened = time.perf_counter()
    if number:
        for key in range(LOOKUPS):
            assert joined.get(f"{key:09d}").startswith(f"{key}: ")
    else:
        assert len(joined) == rows
    print(json.dumps({"open": opened - start, "rest": time.perf_counter() - opened, "peak": peak() - before}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=15_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--folder")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return rank(args.rank, Path(args.folder), args.rows)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder) / "long.json", args.rows)
        print(f"{args.rows} rows, {os.path.getsize(Path(folder) / 'long.json') / 1e9:.1f} GB")
        command = [sys.executable, __file__, "--rows", str(args.rows), "--folder", folder, "--rank"]
        first = json.loads(subprocess.check_output([*command, "0"]))
        size = os.path.getsize(Path(folder) / "join-long.sqlite") / 1e9
        print(f"rank 0: {first['open']:.0f} s to read, {first['rest']:.0f} s to count, "
              f"peak {first['peak']:.0f} MB; {size:.1f} GB on disk", flush=True)
        others = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE) for n in range(1, args.ranks)]
        for number, process in enumerate(others, 1):
            found = json.loads(process.communicate()[0])
            print(f"rank {number}: {LOOKUPS / found['rest']:.0f} captions/s, peak {found['peak']:.0f} MB")


if __name__ == "__main__":
    main()
