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
from data.captions import fingerprint, read_captions, read_join, skip

WINDOW = {"cpu": 256, "cuda": 2048}  # rows between two flushes: seconds to a minute of work; part of what fixes the bytes
SAMPLE = 256                         # rows, evenly spaced, that an int8 store's statistics are fitted on
FILES = ("meta.json", "journal.json", "embeddings.npy", "keys.txt", "images.txt", "statistics.npy", "scales.npy")  # of a store
H100_FLOPS, MFU = 989e12, 0.4        # dense bfloat16 peak of an H100 SXM, and the share of it that --plan assumes


def embed(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    prompts = chosen_prompts(args.prompts)
    columns = [c for c in flame.COLUMNS if c.split(".")[0] in prompts]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" and world > 1 else torch.device(args.device)
    shard, shards = parse_shard(args.shard)
    out = Path(args.out or Path("data/embeddings") / (store_name(args.captions) + (f"-{shard}-of-{shards}" if shards > 1 else "")))
    joins = parse_joins(args.join)
    if rank == 0:
        next(read_captions(args.captions))  # complains of a file without captions before anything is made
    config = flame.llm_config(args.llm)
    settings = {
        "llm": {"name": Path(args.llm).resolve().name, "fingerprint": flame.llm_fingerprint(args.llm), "layer": args.layer or config["num_hidden_layers"] - 1,
                "positions": args.positions},
        "captions": {"path": os.path.abspath(args.captions), "joins": {name: os.path.abspath(file) for name, file in joins.items()},
                     "sha256": fingerprint([args.captions, *joins.values()]) if rank == 0 else None},
        "prompts": prompts, "columns": columns, "dtype": args.dtype, "device": device.type,
        "budget": args.budget or flame.BUDGET[device.type], "window": args.window or WINDOW[device.type], "store": args.store, "shard": [shard, shards],
    }
    skipped = {}
    joined = {name: read_join(name, file, skipped) for name, file in joins.items()}
    if world > 1:  # for the ranks to wait for one another, however long one takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    with lock(out, args.overwrite) if rank == 0 else nullcontext():
        job = [prepare(out, settings, joined, skipped, config["hidden_size"]) if rank == 0 else None]
        if world > 1:
            torch.distributed.broadcast_object_list(job, src=0)
        if job[0]:
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
            for path in [*(out / name for name in FILES), *out.glob("windows-*.txt")]:  # the finished mark first
                path.unlink(missing_ok=True)
    except BlockingIOError:
        raise flame.InputError(f"{out}: another run is writing this store; wait for it, or choose another --out") from None
    except OSError as e:
        raise flame.InputError(f"{out}: {e.strerror}; choose another --out") from None
    with file:
        yield
        (out / "lock").unlink(missing_ok=True)


def prepare(out, settings, joined, skipped, D):
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
    for path in [out / "journal.json", *out.glob("windows-*.txt")]:
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
        elif torch.equal(part.statistics, parts[0].statistics):
            data = {"embeddings": part.vectors[rows], "scales": part.scales[rows]}
        else:  # machines that round differently fitted them
            data = quantised(part.read(np.arange(len(part))[rows], range(len(meta["columns"]))).numpy(), parts[0].statistics.numpy())
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


def report_skipped(path, skipped):
    for reason, (count, places) in skipped.items():
        print(f"{path}: skipped {count} row{'s' * (count > 1)}: {reason} ({'line ' * isinstance(places[0], int)}{', '.join(map(str, places))}{', ...' * (count > len(places))})", file=sys.stderr)


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


# ---------------------------------------------------------------------------------------------------------------------
# --plan: what a run would take

def plan(args):
    """Prints tokens, FLOPs, time and bytes of a run, from a sample of its captions and the LLM's config."""
    config, prompts = flame.llm_config(args.llm), chosen_prompts(args.prompts)
    layer = args.layer or config["num_hidden_layers"] - 1
    joined = {name: read_join(name, file, {}) for name, file in parse_joins(args.join).items()}
    skipped, sample, total, random = {}, [], 0, np.random.default_rng(0)
    for row in tqdm(read_captions(args.captions, skipped, joined), desc="reading captions", unit=" rows", leave=False):
        total += 1  # a reservoir: however many rows come, each is as likely to be in the sample
        if len(sample) < SAMPLE:
            sample.append(row.captions)
        elif (place := int(random.integers(total))) < SAMPLE:
            sample[place] = row.captions
    report_skipped(args.captions, skipped)
    N, tokenizer = args.plan or total, flame.load_tokenizer(args.llm)
    found = {}
    for name in prompts:
        prefixes, suffixes = flame.tokenize(tokenizer, [texts[name] for texts in sample], name, args.positions)
        forests = [flame.caption_forest(prefixes[i:i + 16], suffixes[i:i + 16], args.positions) for i in range(0, len(sample), 16)]
        apart = sum(len(p) + len(f) for p, fs in zip(prefixes, suffixes) for f in fs)
        found[name] = np.array([apart, sum(len(f.tokens) for f in forests), sum(flops(config, layer, f) for f in forests)]) / len(sample)
    found["together"] = sum(found.values())
    speeds = {"1 H100": H100_FLOPS * MFU, "8 H100": 8 * H100_FLOPS * MFU}
    if any(Path(args.llm).glob("*.safetensors")):
        encoder, forests = flame.TextEncoder(args.llm, args.device, getattr(torch, args.dtype), layer, args.positions, args.budget), []
        packs = [pack for name in prompts for pack in encoder.pack([texts[name] for texts in sample], name)]
        started = None
        for rows, forest in [packs[0], *packs]:  # the first to warm up
            encoder.run(forest, len(rows))
            started, forests = started or time.time(), forests + [forest] if started else []
            if time.time() - started > 5:
                break
        speeds = {"here": sum(flops(config, layer, f) for f in forests) / (time.time() - started)} | speeds
    M, D = sum(len(flame.PROMPTS[name].facets) for name in prompts), config["hidden_size"]
    print(f"{args.captions}: {total} captions" + (f", planned as {N}" if N != total else "") + f"; tokens from a sample of {len(sample)}; {layer} blocks of width {D}")
    if "here" in speeds:
        print(f"here: {speeds['here'] / 1e9:.0f} GFLOP/s measured, {args.dtype} on {args.device}", end="; ")
    print(f"H100: {H100_FLOPS / 1e12:.0f} TFLOP/s x {MFU:.0%} assumed, not measured")
    print(f"{'':10}{'tokens a caption':>18}{'shared':>9}{'PFLOP':>11}" + "".join(f"{name:>11}" for name in speeds))
    for name, (apart, shared, work) in found.items():
        print(f"{name:10}{apart:18.0f}{shared:9.0f}{work * N / 1e15:11.4g}" + "".join(f"{work * N / speed / 3600:9.2f} h" for speed in speeds.values()))
    print(f"store: [{N}, {M}, {D}], float16 {N * M * D * 2 / 1e9:.1f} GB, int8 {N * M * (D + 4) / 1e9:.1f} GB")


def flops(config, layer, forest):
    """Of one packed row; a multiply-add counts twice. The last block runs whole for the answers only."""
    D, inner, heads, kv_heads, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    seen, answers = flame.token_depths(forest.lengths, forest.parents) + 1, np.unique(forest.answers)
    keys_values, rest = 2 * D * 2 * kv_heads * head_dim, 2 * D * 2 * heads * head_dim + 2 * D * 3 * inner  # a token and block
    attention = 4 * heads * head_dim * ((layer - 1) * seen.sum() + seen[answers].sum())
    return layer * len(seen) * keys_values + ((layer - 1) * len(seen) + len(answers)) * rest + attention


# ---------------------------------------------------------------------------------------------------------------------
# --inspect: what is in a store

def inspect(args):
    """Prints what a store holds, whether it is whole, how distinct its facets are, and the words they are nearest to."""
    store = flame.open_store(args.inspect)
    meta, N = store.meta, len(store)
    M, D = len(meta["columns"]), meta["D"]
    print(f"{store.path}: {N} captions x {M} embeddings ({', '.join(meta['prompts'])}) of width {D}, {meta['store']}, {store.vectors.nbytes / 1e9:.2f} GB, "
          f"{len(store.keys) - store.images.count('')} with a picture's path\n{meta['llm']['name']} ({meta['llm']['fingerprint']}), layer {meta['llm']['layer']}, {meta['dtype']}, captions {meta['captions']['path']}")
    faults = {"never written": [], "NaN or infinite": [], "not of unit length": []}
    for start in tqdm(range(0, N, 1024), desc="checking", unit=" blocks", leave=False):
        block = np.array(store.vectors[start:start + 1024], np.float32) if store.scales is None else store.scales[start:start + 1024, :, None]
        norm = np.linalg.norm(block, axis=-1)
        faults["never written"] += (start + np.flatnonzero((norm == 0).any(1))).tolist()
        faults["NaN or infinite"] += (start + np.flatnonzero(~np.isfinite(norm).all(1))).tolist()
        if store.scales is None:
            faults["not of unit length"] += (start + np.flatnonzero(((np.abs(norm - 1) > 0.01) & (norm > 0)).any(1))).tolist()
    for what, rows in faults.items():
        print(f"rows {what}: {len(rows)}" + (f", the first: {store.keys[rows[0]]}" if rows else ""))
    some = np.unique(np.linspace(0, N - 1, min(N, 2000)).astype(int))
    states = store.read(some, range(M))
    centered = normalize(states - states.mean(0), dim=-1)
    for name in meta["prompts"]:
        at = [c for c, column in enumerate(meta["columns"]) if column.startswith(name + ".")]
        print(f"\nmean cosine of the {name} facets of one caption, corpus mean subtracted ({len(some)} captions)")
        for line in torch.einsum("nad,nbd->ab", centered[:, at], centered[:, at]) / len(some):
            print("  " + " ".join(f"{x:6.2f}" for x in line.tolist()))
    if flame.llm_fingerprint(args.llm) != meta["llm"]["fingerprint"]:
        raise flame.InputError(f"{args.llm}: another LLM than the store's ({meta['llm']['name']}); give that one with --llm to see the one-word answers")
    norm, unembedding = flame.load_unembedding(args.llm)
    logits = lambda x: (x * D ** 0.5 * norm) @ unembedding.T  # RMSNorm of a unit vector, then the LLM's own next-token scores
    typical, tokenizer = logits(states.mean(0)), flame.load_tokenizer(args.llm)
    print("\nthe words that set each facet apart: the LLM's unembedding of its state, less that of the corpus mean")
    texts = captions_of_keys(meta, [store.keys[row] for row in some[:3]])
    for n, row in enumerate(some[:3]):
        print(f"{store.keys[row]}: {texts.get(store.keys[row], '')[:150]}")
        for c, column in enumerate(meta["columns"]):
            best = (logits(states[n, c]) - typical[c]).topk(4).indices.tolist()
            print(f"  {column:8} " + ", ".join(repr(tokenizer.decode([t]).strip()) for t in best))


def captions_of_keys(meta, keys):
    """{key: best caption}, as far as the captions file is still where it was."""
    found = {}
    try:
        for row in read_captions(meta["captions"]["path"]):
            if row.key in keys:
                found[row.key] = row.captions["long"]
            if len(found) == len(keys):
                break
    except flame.InputError:
        pass
    return found


# ---------------------------------------------------------------------------------------------------------------------
# --draw: one caption's forest and mask as a picture

PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")


def draw(args):
    """Writes a PNG: every token of the caption's forest, segments in colours, and which keys each query sees."""
    from PIL import Image, ImageDraw, ImageFont
    tokenizer = flame.load_tokenizer(args.llm)
    prompts = chosen_prompts(args.prompts or "long")[-1]
    prefixes, suffixes = flame.tokenize(tokenizer, [args.draw], prompts, args.positions)
    forest = flame.caption_forest(prefixes, suffixes, args.positions)
    T, S = len(forest.tokens), len(forest.lengths)
    everything = np.arange(T)
    mask = flame.visible(forest, everything, everything)
    segment = np.repeat(np.arange(S), forest.lengths)
    words = [tokenizer.decode([t]).replace("\n", "\\n") or "?" for t in forest.tokens.tolist()]
    colors = [PALETTE[s % len(PALETTE)] for s in range(S)]

    cell = max(4, min(18, 2000 // T))
    side = T * cell
    font, text_font = ImageFont.load_default(max(7, cell - 2)), ImageFont.load_default(max(11, side // 84))
    left = max(int(font.getlength(w)) for w in words) + 16
    top = left + 60
    image = Image.new("RGB", (left + side + 20, top + side + 20), "white")
    pen = ImageDraw.Draw(image)
    separate = sum(len(prefixes[0]) + len(f) for f in suffixes[0])
    pen.text((16, 12), f"{prompts} prompts, {len(suffixes[0])} facets of one caption in one pass: {T} tokens instead of {separate}", fill="black", font=ImageFont.load_default(max(14, side // 72)))
    for i, word in enumerate(words):
        color = colors[segment[i]]
        pen.text((left - 8, top + (i + 0.5) * cell), word, fill=color, font=font, anchor="rm")
        label = Image.new("RGBA", (left, cell + 4))
        ImageDraw.Draw(label).text((4, cell / 2 + 1), word, fill=color, font=font, anchor="lm")
        label = label.rotate(90, expand=True)
        image.paste(label, (left + i * cell - 1, top - label.height - 4), label)
    for i, j in zip(*np.nonzero(mask)):
        x, y = left + j * cell, top + i * cell
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colors[segment[j]])
    for i in set(forest.answers.tolist()):  # the facet states are read in these rows
        pen.rectangle((left - 2, top + i * cell - 1, left + (i + 1) * cell, top + (i + 1) * cell - 1), outline="black", width=2)
    # The upper right triangle is always empty: the list of segments goes there.
    depth, line = [0] * S, max(14, side // 56)
    x, y = left + side * 0.45, top + line
    pen.text((x, y), "row: query, column: key it sees; framed: the answers' rows", fill="black", font=text_font)
    starts = np.cumsum(forest.lengths) - forest.lengths
    for s in range(S):
        depth[s] = 0 if forest.parents[s] < 0 else depth[forest.parents[s]] + 1
        text = tokenizer.decode(forest.tokens[starts[s]:starts[s] + forest.lengths[s]].tolist()).strip().split(" ")
        text = " ".join(text if len(text) < 11 else text[:4] + ["..."] + text[-4:])
        pen.text((x + line * depth[s], y + line * (s + 1.5)), text, fill=colors[s], font=text_font)
    path = Path(args.out or "forest.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(f"{path}: {T} tokens, {S} segments")


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
        if args.draw is not None:
            return draw(args)
        if args.inspect:
            return inspect(args)
        if args.merge:
            return merge(args)
        if not args.captions:
            raise flame.InputError("--captions FILE is missing; see --help")
        args.dtype = args.dtype or str(flame.default_dtype(args.device)).removeprefix("torch.")
        args.prompts = args.prompts or ",".join(flame.PROMPTS)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"LLM: {args.llm}")
        plan(args) if args.plan is not None else embed(args)
    except flame.InputError as e:
        print(f"embed.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("embed.py: interrupted; the same command goes on from the last flush", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
