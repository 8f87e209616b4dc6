"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    torchrun --nproc_per_node 8 embed.py --captions "cc3m/{0000..0575}.tar" --join long=long.json --join short=short.json
    python embed.py --captions cc3m.tsv --plan          # what it would take, before any hours are spent
    python embed.py --inspect data/embeddings/cc3m      # is it whole? are the facets distinct? which word is each nearest to?
    python embed.py --draw "A red kite above a beach."  # -> a picture of that caption's segment forest and mask

The LLM never changes, so its facet embeddings are computed once and training never runs it. The captions are cut into fixed
windows of rows; what a window's embeddings are depends on nothing but its captions and the recorded settings. So windows
can be split over processes (torchrun) and machines (--shard), and after a crash, or kill -9, the same command goes on with
the windows that are missing and ends with the same bytes.
"""
import argparse
import fcntl
import json
import os
import queue
import re
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data.show import look
from data.captions import fingerprint, open_join, read_captions, read_join, report_skipped, skip
from data.pictures import warn_of_missing_pictures

WINDOW = {"cpu": 256, "cuda": 2048}  # rows between two flushes: seconds to a minute of work; part of what fixes the bytes
SAMPLE = 256                         # rows, evenly spaced, that an int8 store's statistics are fitted on
FILES = ("meta.json", "journal.json", "embeddings.npy", "keys.txt", "images.txt", "statistics.npy", "scales.npy")  # of a store


def embed(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    prompts = args.prompts
    columns = [c for c in flame.COLUMNS if c.split(".")[0] in prompts]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" and world > 1 else torch.device(args.device)
    shard, shards = parse_shard(args.shard)
    out = Path(args.out or Path("data/embeddings") / (store_name(args.captions) + (f"-{shard}-of-{shards}" if shards > 1 else "")))
    if rank == 0:
        next(read_captions(args.captions))  # complains of a file without captions before anything is made
    config = flame.llm_config(args.llm)
    settings = {
        "llm": {"name": Path(args.llm).resolve().name, "fingerprint": flame.llm_fingerprint(args.llm), "layer": args.layer or config["num_hidden_layers"] - 1,
                "positions": args.positions},
        "captions": {"path": os.path.abspath(args.captions), "joins": {name: os.path.abspath(file) for name, file in args.join.items()},
                     "sha256": fingerprint([args.captions, *args.join.values()]) if rank == 0 else None},
        "prompts": prompts, "columns": columns, "dtype": args.dtype, "device": device.type,
        "budget": args.budget or flame.BUDGET[device.type], "window": args.window or WINDOW[device.type], "store": args.store, "shard": [shard, shards],
    }
    skipped = {}
    if rank == 0:
        warn_of_missing_pictures(args.captions)
    if world > 1:  # for the ranks to wait for one another, however long one takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    with lock(out, args.overwrite) if rank == 0 else nullcontext():
        job = [prepare(out, settings, skipped, config["hidden_size"]) if rank == 0 else None]
        if world > 1:
            torch.distributed.broadcast_object_list(job, src=0)
        if job[0]:
            joined = {name: open_join(join_file(out, name)) for name in args.join}
            embed_windows(args, settings, out, joined, device, rank, world, **job[0])


def embed_windows(args, settings, out, joined, device, rank, world, N, total, repeats, finished):
    """One rank's share of the windows that are not finished yet: N rows of this store, `total` in the captions file."""
    started = time.time()
    encoder = flame.TextEncoder(args.llm, device, getattr(torch, args.dtype), settings["llm"]["layer"], args.positions, settings["budget"])
    prompts, columns, (shard, shards) = settings["prompts"], settings["columns"], settings["shard"]
    D, window = encoder.dim, settings["window"]
    statistics, busy = None, 0.0  # busy: seconds of the LLM at work
    if args.store == "int8":
        if rank == 0 and not (out / "statistics.npy").exists():
            clock = time.time()
            fit_statistics(out / "statistics.npy", encoder, rows_of(args.captions, joined, repeats), prompts, total)
            busy = time.time() - clock
        if world > 1:
            torch.distributed.barrier()
        statistics = np.load(out / "statistics.npy")
    mine = [w for w in range(shard, -(-total // window), shards) if w not in finished][rank::world]
    if rank == 0:
        size = (out / "embeddings.npy").stat().st_size / 1e6
        print(f"{N} captions, prompts {','.join(prompts)} -> {out} ([{N}, {len(columns)}, {D}] {args.store}, {size:.0f} MB), layer {encoder.layer}, "
              f"{args.dtype} on {world if world > 1 else ''}{device.type}" + ("" if flame.flame_ext else ", without flame_ext: slower"))
    todo = sum(min(window, total - w * window) for w in mine)
    if device.type == "cpu":
        settle_memory(encoder)
    bar = tqdm(total=todo * len(columns), desc="embedding", unit=" embeddings", smoothing=0.05, disable=rank > 0)
    block, work = None, packed(rows_of(args.captions, joined, repeats), window, set(mine), prompts, encoder)
    with open(out / f"windows-{rank}.txt", "a") as log:
        for w, size, name, (rows, picks), forest in work if device.type == "cpu" else ahead(work):
            block = np.empty((size, len(columns), D), np.float32) if block is None else block
            if forest is not None:  # the next packed row of window w
                clock = time.time()
                facets = encoder.run(forest, int(picks.max()) + 1)
                busy += time.time() - clock
                at = columns.index(f"{name}.0")
                block[rows, at:at + facets.shape[1]] = normalize(facets, dim=-1).numpy()[picks]
                bar.update(len(rows) * facets.shape[1])
            else:  # there is no more of it
                write_rows(out, {"embeddings": block.astype(np.float16)} if statistics is None else quantised(block, statistics), w // shards * window)
                log.write(f"{w}\n")
                log.flush()
                block = None
    bar.close()
    seconds = time.time() - started
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        finish(out, settings | {"N": N, "D": D, "M": len(columns)}, set(range(shard, -(-total // window), shards)))
        print(f"{out}: {N} x {len(columns)} embeddings; {todo * world / seconds:.2f} captions/s, {seconds:.0f} s, model busy {busy / seconds:.1%} of the time"
              + (f"; {encoder.truncated} captions were cut to the model's context" if encoder.truncated else ""))


def settle_memory(encoder):
    """Runs two blocks, one as all and one as the last is run, over rows of every usual length. What oneDNN keeps for each is then
    there from the start: a memory limit that is too low shows now, not after hours. At the usual budget it costs less than two packed rows."""
    few = encoder.decoder._replace(blocks=encoder.decoder.blocks[:2])
    for tokens in range(encoder.budget, encoder.budget // 2, -flame.SIZES):
        idle = torch.zeros(tokens, dtype=torch.int64)
        flame.decode(few, flame.Forest(idle, idle, np.array([tokens], np.int32), np.array([-1], np.int32), torch.arange(min(tokens, flame.SIZES))))


def rows_of(captions, joined, repeats):
    """The captions file's rows, less those whose key occurs before (their numbers, as `prepare` found them)."""
    repeats = set(repeats)
    return (row for row in read_captions(captions, joins=joined) if row.number not in repeats)


def packed(captions, size, wanted, prompts, encoder):
    """The work of the wanted windows, in order: (window, its number of rows, prompt set, (rows, picks), Forest) for every packed
    row, where row rows[i] of the window takes caption picks[i] of it (equal captions are encoded once); a None after the last."""
    def windows():
        rows, number = [], 0
        for row in captions:
            rows.append(row.captions)
            if len(rows) == size:
                yield number, rows
                rows, number = [], number + 1
        if rows:
            yield number, rows

    for w, rows in windows():
        if w not in wanted:
            continue
        for name in prompts:
            rows_of = {}
            for row, texts in enumerate(rows):
                rows_of.setdefault(texts[name], []).append(row)
            texts = list(rows_of)
            for some, forest in encoder.pack(texts, name):
                yield w, len(rows), name, np.array([(row, n) for n, i in enumerate(some) for row in rows_of[texts[i]]]).T, forest
        yield w, len(rows), None, (None, None), None


def ahead(items, depth=8):
    """The same items, made by a thread of its own, so that tokenizing and packing never keep a GPU waiting."""
    line, failed, end = queue.Queue(depth), [], object()

    def make():
        try:
            for item in items:
                line.put(item)
        except BaseException as e:  # raised again where it can be seen
            failed.append(e)
        line.put(end)

    threading.Thread(target=make, daemon=True).start()
    while (item := line.get()) is not end:
        yield item
    if failed:
        raise failed[0]


# ---------------------------------------------------------------------------------------------------------------------
# The store on disk

@contextmanager
def lock(out, overwrite):
    """Makes the store's folder and keeps other runs out of it; the system releases the lock however this process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if overwrite:
            for path in [*(out / name for name in FILES), *out.glob("windows-*.txt"), *out.glob("join-*")]:  # the finished mark first
                path.unlink(missing_ok=True)
    except BlockingIOError:
        raise flame.InputError(f"{out}: another run is writing this store; wait for it, or choose another --out") from None
    except OSError as e:
        raise flame.InputError(f"{out}: {e.strerror}; choose another --out") from None
    with file:
        yield
        (out / "lock").unlink(missing_ok=True)


def join_file(out, name):
    """Where the captions of a joined file lie while the store is made, for all ranks."""
    return out / f"join-{name}.sqlite"


def prepare(out, settings, skipped, D):
    """Begins the store, or checks that the one there is this run's; -> what `embed_windows` needs, None if it is finished.

    Raises InputError where it was made with other settings.
    """
    captions, (shard, shards), window = settings["captions"]["path"], settings["shard"], settings["window"]
    for path in (out / "meta.json", out / "journal.json"):
        if path.exists():
            check_same(path, json.loads(path.read_text()), settings)
    if (out / "meta.json").exists():
        print(f"{out}: finished already, nothing to do")
        return None
    joined = {name: read_join(name, file, skipped, join_file(out, name)) for name, file in settings["captions"]["joins"].items()}
    if not (out / "journal.json").exists():
        N, total, seen, repeats = 0, 0, set(), []
        used = dict.fromkeys(joined, 0)
        with open(out / "keys.txt.tmp", "w", encoding="utf-8", newline="\n") as keys, open(out / "images.txt.tmp", "w", encoding="utf-8", newline="\n") as images:
            for row in tqdm(read_captions(captions, skipped, joined), desc="reading captions", unit=" rows", leave=False):
                if (known := hash(row.key)) in seen:  # 64 bits a key instead of the key: 15 million of them stay small
                    repeats.append(row.number)
                    skip(skipped, "key occurs before", f"row {row.number}")
                    continue
                seen.add(known)
                if total // window % shards == shard:
                    keys.write(row.key + "\n")
                    images.write(row.image + "\n")
                    N += 1
                total += 1
                for name in used:
                    used[name] += row.key in joined[name]
        report_skipped(captions, skipped)
        for name, count in used.items():
            if count < len(joined[name]):
                print(f"{settings['captions']['joins'][name]}: {len(joined[name]) - count} keys are not in {captions}", file=sys.stderr)
        if not N:
            raise flame.InputError(f"--shard: {total} captions make {-(-total // window)} windows of {window} rows; use no more shards than that")
        for name in ("keys.txt", "images.txt"):
            os.replace(out / (name + ".tmp"), out / name)
        allocate(out, settings, N, D)
        write_text(out / "journal.json", json.dumps({"settings": settings, "N": N, "total": total, "repeats": repeats}))
    journal, finished = json.loads((out / "journal.json").read_text()), finished_windows(out)
    write_text(out / "windows-0.txt", "".join(f"{w}\n" for w in sorted(finished)))  # one list of whole lines again
    for path in set(out.glob("windows-*.txt")) - {out / "windows-0.txt"}:
        path.unlink()
    return {name: journal[name] for name in ("N", "total", "repeats")} | {"finished": finished}


def check_same(path, old, settings):
    old = old.get("settings", old)
    for what, new in settings.items():
        was = old.get(what)
        if what == "captions":
            was, new = was["sha256"], new["sha256"]  # the same file elsewhere is the same file
        if what == "llm":
            was = was | {"name": new["name"]}
        if was != new:
            raise flame.InputError(f"{path}: this store was made with {what} {was}, now it is {new}; choose another --out, or --overwrite")


def allocate(out, settings, N, D):
    """Makes embeddings.npy (and scales.npy) at full size: a disk that is too small is found now, not after hours."""
    M, small = len(settings["columns"]), settings["store"] == "int8"
    for name, dtype, shape in [("embeddings", np.int8 if small else np.float16, (N, M, D))] + small * [("scales", np.float32, (N, M))]:
        path = out / f"{name}.npy"
        try:
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            with open(path, "r+b") as file:
                getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, path.stat().st_size)  # not everywhere
        except OSError as e:
            path.unlink(missing_ok=True)
            raise flame.InputError(f"{path}: {e.strerror}; {np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64) / 1e9:.1f} GB are needed there, or choose another --out") from None


def write_rows(out, data, first):
    """Writes {file: rows} from row `first` on, and returns when they are on the disk."""
    for name, rows in data.items():
        path = out / f"{name}.npy"
        try:
            offset = np.load(path, mmap_mode="r").offset
            with open(path, "r+b") as file:
                file.seek(offset + first * rows[0].nbytes)
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as e:
            raise flame.InputError(f"{path}: {e}; free space, then the same command goes on from the last flush") from None


def finished_windows(out):
    """Numbers of the windows that are on the disk; a line that a crash cut short does not count."""
    return {int(line) for path in out.glob("windows-*.txt") for line in path.read_text().split("\n")[:-1]}


def finish(out, meta, windows):
    if missing := windows - finished_windows(out):
        raise flame.InputError(f"{out}: {len(missing)} windows are missing; run the same command again")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    write_text(out / "meta.json", json.dumps(meta | {"versions": versions}, indent=1))  # this makes the store finished
    for path in [out / "journal.json", *out.glob("windows-*.txt"), *out.glob("join-*")]:
        path.unlink(missing_ok=True)


def fit_statistics(path, encoder, captions, prompts, total):
    """Mean and deviation of each column and dimension, [2, M, D], over SAMPLE rows evenly spaced in the captions' `total`."""
    wanted = set(np.linspace(0, total - 1, min(total, SAMPLE)).astype(int).tolist())
    rows = [row.captions for i, row in enumerate(captions) if i in wanted]
    sample = torch.cat([normalize(encoder.encode([texts[name] for texts in rows], name), dim=-1) for name in prompts], dim=1)
    with open(f"{path}.tmp", "wb") as file:
        np.save(file, torch.stack([sample.mean(0), sample.std(0, correction=0).clamp_min(1e-6)]).numpy())
    os.replace(f"{path}.tmp", path)


def quantised(block, statistics):
    """float32 [n, M, D] -> int8 integers and, a scale per vector, what makes them standard scores (flame.Store reads them)."""
    scores = (block - statistics[0]) / statistics[1]
    scales = np.maximum(np.abs(scores).max(-1) / 127, 1e-12)
    return {"embeddings": np.rint(scores / scales[..., None]).astype(np.int8), "scales": scales.astype(np.float32)}


def merge(args):
    """The stores of all shards -> one, as if it had been made in one run."""
    parts = sorted(map(flame.open_store, args.merge), key=lambda part: part.meta["shard"])
    meta, shards, window, out = parts[0].meta, len(parts), parts[0].meta["window"], Path(args.out or str(args.merge[0]).split("-0-of-")[0])
    for n, part in enumerate(parts):
        if part.meta["shard"] != [n, shards]:
            raise flame.InputError(f"--merge: {part.path} is shard {part.meta['shard'][0]} of {part.meta['shard'][1]}, but {shards} stores were given; give every shard once")
        check_same(part.path / "meta.json", part.meta | {"shard": None}, {k: meta[k] for k in ("llm", "captions", "prompts", "columns", "dtype", "device", "budget", "window", "store")})
    if (out / "meta.json").exists() and not args.overwrite:
        raise flame.InputError(f"{out}: finished already; choose another --out, or --overwrite")
    N = sum(len(part) for part in parts)
    meta = meta | {"shard": [0, 1], "N": N}
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    allocate(out, meta, N, meta["D"])
    if meta["store"] == "int8":
        (out / "statistics.npy").write_bytes((parts[0].path / "statistics.npy").read_bytes())
    keys, images = [], []
    for w in tqdm(range(-(-N // window)), desc="merging", unit=" windows"):
        part, rows = parts[w % shards], slice(w // shards * window, (w // shards + 1) * window)
        keys += part.keys[rows]
        images += part.images[rows]
        if meta["store"] != "int8":
            data = {"embeddings": part.vectors[rows]}
        elif np.array_equal(part.statistics, parts[0].statistics):
            data = {"embeddings": part.vectors[rows], "scales": part.scales[rows]}
        else:  # machines that round differently fitted them
            data = quantised(part.read(np.arange(len(part))[rows], range(len(meta["columns"]))).numpy(), parts[0].statistics)
        write_rows(out, data, w * window)
    write_text(out / "keys.txt", "".join(key + "\n" for key in keys))
    write_text(out / "images.txt", "".join(image + "\n" for image in images))
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    print(f"{out}: {N} x {len(meta['columns'])} embeddings of {shards} shards")


def write_text(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as e:
        raise flame.InputError(f"{path}: {e.strerror}; free space or choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# What the command line says

def chosen_prompts(text):
    names = text.split(",")
    if wrong := [n for n in names if n not in flame.PROMPTS]:
        raise flame.InputError(f"--prompts: {wrong[0]!r} is none of {', '.join(flame.PROMPTS)}")
    return [n for n in flame.PROMPTS if n in names]  # in the store's order


def parse_shard(text):
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise flame.InputError(f"--shard: {text!r} is not i/n with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def parse_joins(texts):
    joins = dict(text.partition("=")[::2] for text in texts)
    if wrong := [text for text in texts if text.partition("=")[0] not in flame.PROMPTS or "=" not in text]:
        raise flame.InputError(f"--join: {wrong[0]!r} is not SET=FILE with a set among {', '.join(flame.PROMPTS)}")
    return joins


def store_name(captions):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar -> cc3m"""
    return re.split(r"[.{]", Path(captions).resolve().name)[0].rstrip("-_") or "captions"


def main():
    parser = argparse.ArgumentParser(description="Stage 1: captions + frozen LLM -> embedding store", formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=24, width=150))
    parser.add_argument("--captions", metavar="FILE", help="TSV/CSV with a header among `key image raw short long`, Conceptual Captions TSV, JSON, JSONL (also .gz), webdataset tars (folder or x-{000..123}.tar)")
    parser.add_argument("--join", metavar="SET=FILE", nargs="+", default=[], help="captions of a prompt set from files of their own, by key: long=long.json short=short.json")
    parser.add_argument("--llm", metavar="DIR", default=os.environ.get("FLAME_LLM", "data/demo/llm"), help="Hugging Face checkpoint folder (default $FLAME_LLM, else data/demo/llm)")
    parser.add_argument("--out", metavar="DIR", help="the store (default data/embeddings/<captions' name>); with --draw the PNG")
    parser.add_argument("--prompts", help="prompt sets to embed (default raw,short,long; --draw: long)")
    parser.add_argument("--layer", type=int, metavar="N", help="blocks to keep (default: all but the last)")
    parser.add_argument("--positions", choices=("restart", "sequential"), default="restart", help="restart: a facet is fixed by its own string (default); sequential: as the released code has it")
    parser.add_argument("--compat", dest="positions", action="store_const", const="sequential", help="the released code's text path, the same as --positions sequential")
    parser.add_argument("--store", choices=("float16", "int8"), default="float16", help="how embeddings are stored (default float16; int8 is half the bytes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the matrix products (default bfloat16 where it is fast)")
    parser.add_argument("--budget", type=int, metavar="TOKENS", help="tokens in one packed row (default 2048 on CPU, 16384 on GPU)")
    parser.add_argument("--window", type=int, metavar="ROWS", help="rows between two flushes, at most lost by a crash (default 256 on CPU, 2048 on GPU)")
    parser.add_argument("--overwrite", action="store_true", help="throw away what is at --out and start anew")
    parser.add_argument("--shard", metavar="i/n", default="0/1", help="embed the i-th of n parts only, i from 0, e.g. $SLURM_ARRAY_TASK_ID/16; then --merge")
    parser.add_argument("--merge", metavar="DIR", nargs="+", help="make one store of those of all shards")
    parser.add_argument("--plan", metavar="N", type=int, nargs="?", const=0, help="print tokens, FLOPs, hours and bytes instead (as if there were N such captions)")
    parser.add_argument("--inspect", metavar="STORE", help="print what is in a store and check it instead")
    parser.add_argument("--draw", metavar="CAPTION", help="write a picture of this caption's segment forest instead")
    args = parser.parse_args()
    try:
        args.prompts = chosen_prompts(args.prompts or ("long" if args.draw is not None else ",".join(flame.PROMPTS)))
        args.join = parse_joins(args.join)
        if args.draw is not None:
            return look.draw(args)
        if args.inspect:
            return look.inspect(args)
        if args.merge:
            return merge(args)
        if not args.captions:
            raise flame.InputError("--captions FILE is missing; see --help")
        args.dtype = args.dtype or str(flame.default_dtype(args.device)).removeprefix("torch.")
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"LLM: {args.llm}")
        look.plan(args) if args.plan is not None else embed(args)
    except flame.InputError as e:
        print(f"embed.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("embed.py: interrupted; the same command goes on from the last flush", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
