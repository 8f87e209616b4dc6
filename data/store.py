"""Writing an embedding store: its lock, its journal, its arrays, its finished mark; flame.Store reads it.

A store is written a window of rows at a time. windows-<rank>.txt says which windows are on the disk,
journal.json what the store is made of. meta.json comes last and makes the store finished. Whenever the writer
is killed or the disk is full, the same command goes on from the windows there and ends with the same bytes.
"""
import fcntl
import json
import os
import sys
from array import array
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data import files
from data.captions import check_join, joined_caption, read_captions, read_join, report_skipped, skip
from flame import InputError

SAMPLE = 256  # rows, evenly spaced, that an int8 store's statistics are fitted on
FILES = ("meta.json", "journal.json",  # in this order they go
         "embeddings.npy", "keys.txt", "images.txt", "statistics.npy", "scales.npy")
CURE = "choose another --out, or --overwrite"

# What fixes a store's bytes, in its journal and its meta.json. "store" is its dtype, "dtype" the LLM's.
SETTINGS = {
    "llm": {"name": str, "fingerprint": str, "layer": int, "positions": str},
    "captions": {"path": str, "sha256": str},
    "prompts": list, "columns": list, "shard": list, "budget": int, "window": int,
    "dtype": str, "device": str, "store": str,
}
JOURNAL = {"settings": SETTINGS, "N": int, "total": int, "repeats": list}


@contextmanager
def lock(out, overwrite):
    """Makes the store's folder and keeps other runs out; however this process ends, the lock is released.

    Raises InputError where another run holds it, where the folder cannot be made, or its files are not ours.
    """
    path = out / "lock"
    with files.folder(out):
        left_behind = path.exists()  # by a run that was killed, and what it wrote is ours
        with files.open_own(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    raise OSError  # the run that held it has just removed it, and another made its own
            except OSError:
                why = "another run is writing this store; wait for it, or choose another --out"
                raise InputError(f"{out}: {why}") from None
            try:
                found = [name for name in FILES if os.path.lexists(out / name)]
                ours = left_behind or overwrite or not found or found[0] in ("meta.json", "journal.json")
                if not ours:
                    raise InputError(f"{out / found[0]}: no run of embed.py left this here; {CURE}")
                yield
            finally:
                for temporary in [path, *out.glob("*join-*.sqlite")]:
                    temporary.unlink(missing_ok=True)


def finished(out, settings):
    """Is the store in this folder whole? Raises InputError where it was made with other settings."""
    path = out / "meta.json"
    if not path.exists():
        return False
    check_same(path, flame.read_json(path, SETTINGS, CURE), settings)
    return True


def released(settings):
    """Is it the released code's text path? Then captions keep their line breaks."""
    return settings["llm"]["positions"] == "sequential"


def join_file(out, name):
    """Where the captions of a joined file lie for all ranks while the store is written."""
    return out / f"join-{name}.sqlite"


def begin(out, settings, D, overwrite=False):
    """Makes the store, or checks what is there; -> its journal, and "finished", the windows on the disk.

    D: the vectors' width. Raises InputError where another run's store is there, or a damaged one, or where
    the disk is full: then either nothing was made, or the same command goes on.
    """
    path = out / "journal.json"
    skipped = {}
    joined = {}
    for name, file in settings["captions"]["joins"].items():
        joined[name] = read_join(name, file, skipped, join_file(out, name), released(settings))
        check_join(settings["captions"]["path"], name, file, joined[name])
    if overwrite or not path.exists():
        make(out, settings, D, joined, skipped)
    journal = flame.read_json(path, JOURNAL, CURE)
    check_same(path, journal["settings"], settings)
    N = journal["N"]
    whole = all(type(row) is int for row in journal["repeats"])
    if N < 1 or N != rows_of_shard(settings, journal["total"]) or not whole:
        raise InputError(f"{path}: its numbers of rows do not agree; {CURE}")
    for name, (dtype, shape) in arrays(settings, N, D).items():
        flame.read_array(out / f"{name}.npy", dtype, shape, CURE)
    for name in ("keys.txt", "images.txt"):
        flame.read_lines(out / name, N, CURE)
    done = finished_windows(out, windows_of(settings, journal["total"]))
    write_lines(out / "windows-0.txt", sorted(done))  # whole lines again
    for log in out.glob("windows-*.txt"):
        if log.name != "windows-0.txt":
            log.unlink()
    return journal | {"finished": done}


def write_lines(path, lines):
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def make(out, settings, D, joined, skipped):
    """A new store, with room for all its rows. What was there goes once the captions could be read."""
    with files.whole(out / "keys.txt") as keys, files.whole(out / "images.txt") as images:
        journal = list_rows(keys, images, settings, joined, skipped)
        discard(out)
    try:
        allocate(out, settings, journal["N"], D)
        files.write_text(out / "journal.json", json.dumps({"settings": settings} | journal))
    except BaseException:
        discard(out)
        raise


def discard(out):
    with files.disk_errors(out, "remove it by hand, or choose another --out"):
        for path in [*(out / name for name in FILES), *out.glob("windows-*.txt")]:  # the finished mark first
            path.unlink(missing_ok=True)


def list_rows(keys_path, images_path, settings, joined, skipped):
    """Writes key and picture of this shard's rows, a line each.

    -> {"N": its rows, "total": those of all shards, "repeats": numbers of rows whose key occurs before}.
    """
    captions = settings["captions"]["path"]
    window = settings["window"]
    shard, shards = settings["shard"]
    total = 0
    repeats = []
    seen = set()
    texts = array("q")  # 8 bytes a row: 120 MB of 15 million rows, twice that while they are counted
    pictures = array("q")
    used = dict.fromkeys(joined, 0)
    source = read_captions(captions, skipped, joined, released(settings))
    with (open(keys_path, "w", encoding="utf-8", newline="\n") as keys,
          open(images_path, "w", encoding="utf-8", newline="\n") as images,
          tqdm(source, desc="reading captions", unit=" rows", leave=False) as rows):
        for row in rows:
            known = hash(row.key)  # 64 bits instead of the key: 15 million of them stay small
            if known in seen:
                repeats.append(row.number)
                skip(skipped, "key occurs before", f"row {row.number}")
                continue
            seen.add(known)
            if total // window % shards == shard:
                keys.write(f"{row.key}\n")
                images.write(f"{row.image}\n")
            total += 1
            texts.append(hash(tuple(row.captions.values())))
            if row.image:
                pictures.append(hash(row.image))
            for name in used:
                used[name] += bool(joined_caption(joined[name], row.key, row.url))
    report_skipped(captions, skipped)
    report_identical(captions, total, texts, pictures)
    for name, file in settings["captions"]["joins"].items():
        if not used[name]:
            raise InputError(f"{file}: none of its keys or URLs is in {captions}; give --captions the files "
                             "that it goes with")
        if (strangers := len(joined[name]) - used[name]) > 0:
            print(f"{file}: {strangers} keys are not in {captions}", file=sys.stderr)
    N = rows_of_shard(settings, total)
    if not N:
        raise InputError(f"--shard: {total} captions are too few for so many shards with windows of {window} "
                         "rows; use fewer shards")
    return {"N": N, "total": total, "repeats": repeats}


def report_identical(captions, total, texts, pictures):
    """Says on stderr how many rows repeat an earlier one's captions or picture, by hashes of these."""
    for hashes, what in ((texts, "have the very captions of an earlier row"),
                         (pictures, "name the picture of an earlier row; each trains by its own caption")):
        if again := len(hashes) - len(np.unique(hashes)):
            print(f"{captions}: {again} of {total} rows {what}", file=sys.stderr)


def check_same(path, old, settings):
    """Raises InputError where a store's settings, read from `path`, are not these."""
    for what, new in settings.items():
        was = old[what]
        if what == "captions":
            was, new = was["sha256"], new["sha256"]  # the same file elsewhere is the same file
        if what == "llm":
            was = was | {"name": new["name"], "path": new.get("path")}  # the fingerprint tells
        if was != new:
            raise InputError(f"{path}: this store was made with {what} {was}, now it is {new}; {CURE}")


def windows_of(settings, total):
    """The numbers of this shard's windows, of those that `total` rows make."""
    shard, shards = settings["shard"]
    return range(shard, -(-total // settings["window"]), shards)


def rows_of_shard(settings, total):
    """How many of `total` rows this shard has: whole windows, but for the last one of all."""
    window = settings["window"]
    shard, shards = settings["shard"]
    cycles, rest = divmod(total, window * shards)
    return cycles * window + min(max(rest - shard * window, 0), window)


def arrays(settings, N, D):
    """{name: (dtype, shape)} of the arrays that are written window by window."""
    M = len(settings["columns"])
    if settings["store"] == "int8":
        return {"embeddings": (np.int8, (N, M, D)), "scales": (np.float32, (N, M))}
    return {"embeddings": (np.float16, (N, M, D))}


def allocate(out, settings, N, D):
    """Makes the arrays' files at full size: a disk that is too small is found now, not after hours."""
    for name, (dtype, shape) in arrays(settings, N, D).items():
        path = out / f"{name}.npy"
        size = np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64) / 1e9
        with files.disk_errors(path, f"{size:.1f} GB are needed there, or choose another --out"):
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            with files.open_own(path, "r+b") as file:
                if hasattr(os, "posix_fallocate"):  # not everywhere
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_window(out, settings, rank, w, block, statistics):
    """Writes window w [n, M, D] and logs it once it is on the disk.

    block: float16, or for int8 float32, and the statistics.
    """
    data = {"embeddings": block} if statistics is None else quantised(block, statistics)
    write_rows(out, data, w // settings["shard"][1] * settings["window"])
    files.append(out / f"windows-{rank}.txt", f"{w}\n")


def write_rows(out, data, first):
    """Writes {array's name: rows} from row `first` on, and returns when they are on the disk."""
    for name, rows in data.items():
        path = out / f"{name}.npy"
        offset = np.load(path, mmap_mode="r").offset
        with files.disk_errors(path), files.open_own(path, "r+b") as file:
            file.seek(offset + first * rows[0].nbytes)
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())


def finished_windows(out, windows):
    """Numbers of the windows that are on the disk; a line that a crash cut short does not count.

    Raises InputError where a line is none of `windows`.
    """
    numbers = {str(w): w for w in windows}
    done = set()
    for path in sorted(out.glob("windows-*.txt")):
        with files.open_own(path, "rb") as log:
            lines = log.read().decode("utf-8", "replace").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            if line not in numbers:
                raise InputError(f"{path}: line {number}: {line[:50]!r} is no window of this store; "
                                 "delete the file to embed its windows anew")
            done.add(numbers[line])
    return done


def finish(out, settings, journal, D):
    """Writes meta.json, which makes the store finished, once all windows are there."""
    windows = windows_of(settings, journal["total"])
    missing = len(windows) - len(finished_windows(out, windows))
    if missing:
        raise InputError(f"{out}: {missing} windows are missing; run the same command again")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    meta = settings | {"N": journal["N"], "D": D, "M": len(settings["columns"]), "versions": versions}
    files.write_text(out / "meta.json", json.dumps(meta, indent=1))
    for path in [out / "journal.json", *out.glob("windows-*.txt")]:
        path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# int8: a vector's standard scores as integers, and a scale. Plain int8 loses all but the largest dimensions.

def fit_statistics(out, settings, encoder, rows, total):
    """Mean and deviation of each column and dimension, [2, M, D], over SAMPLE rows, evenly spaced."""
    wanted = set(np.linspace(0, total - 1, min(total, SAMPLE)).astype(int).tolist())
    some = [row.captions for i, row in enumerate(rows) if i in wanted]
    states = [encoder.encode([captions[name] for captions in some], name) for name in settings["prompts"]]
    units = normalize(torch.cat(states, dim=1), dim=-1)
    deviation = units.std(0, correction=0).clamp_min(1e-6)
    statistics = torch.stack([units.mean(0), deviation]).numpy()
    files.write(out / "statistics.npy", lambda temporary: np.save(temporary, statistics))


def read_statistics(out, settings, D):
    return flame.read_array(out / "statistics.npy", np.float32, (2, len(settings["columns"]), D), CURE)


def quantised(block, statistics):
    """float32 [n, M, D] -> int8 integers and, a scale per vector, what makes them standard scores again."""
    scores = (block - statistics[0]) / statistics[1]
    scales = np.maximum(np.abs(scores).max(-1) / 127, 1e-12)
    integers = np.rint(scores / scales[..., None]).astype(np.int8)
    return {"embeddings": integers, "scales": scales.astype(np.float32)}


# -----------------------------------------------------------------------------
# Shards

def merge(paths, out=None, overwrite=False):
    """The stores of all shards -> one, as if made in one run. out: default the shards' common name.

    Raises InputError where a shard is missing, where their settings differ, or where the disk is full.
    """
    parts = all_shards([flame.open_store(path) for path in paths])
    first = parts[0]
    meta = first.meta | {"shard": [0, 1], "N": sum(map(len, parts))}
    path = first.path.resolve()
    out = out or path.with_name(path.name.split("-0-of-")[0])
    if out.resolve() in [part.path.resolve() for part in parts]:
        raise InputError(f"{out}: one of the stores to merge; choose another --out")
    with lock(out, overwrite):
        if (out / "meta.json").exists() and not overwrite:
            raise InputError(f"{out}: finished already; {CURE}")
        discard(out)
        try:
            allocate(out, meta, meta["N"], meta["D"])
            copy_windows(parts, out, meta)
            files.write_text(out / "meta.json", json.dumps(meta, indent=1))
        except BaseException:
            discard(out)
            raise
    print(f"{out}: {meta['N']} x {len(meta['columns'])} embeddings of {len(parts)} shards")


def all_shards(parts):
    """The stores in the order of their shards, checked: each once, all made alike."""
    alike = {what: parts[0].meta.get(what) for what in SETTINGS if what != "shard"}
    by_shard = {}
    for part in parts:
        path = part.path / "meta.json"
        check_same(path, flame.read_json(path, SETTINGS, CURE), alike)
        by_shard[str(part.meta["shard"])] = part
    ordered = [by_shard.get(str([shard, len(parts)])) for shard in range(len(parts))]
    for shard, part in enumerate(ordered):
        if part is None:
            raise InputError(f"--merge: none of these {len(parts)} stores is shard {shard} of {len(parts)}; "
                             "give every shard once")
        total = sum(map(len, parts))
        if part.meta["window"] < 1 or len(part) != rows_of_shard(part.meta, total):
            raise InputError(f"{part.path}: {len(part)} rows are not its share of {total}; {CURE}")
    return ordered


def copy_windows(parts, out, meta):
    """All rows; window w is shard w % shards' next one."""
    window = meta["window"]
    statistics = parts[0].statistics
    keys = []
    images = []
    if statistics is not None:
        files.write(out / "statistics.npy", lambda temporary: np.save(temporary, statistics))
    for w in tqdm(range(-(-meta["N"] // window)), desc="merging", unit=" windows"):
        turn, shard = divmod(w, len(parts))
        part = parts[shard]
        rows = slice(turn * window, (turn + 1) * window)
        keys += part.keys[rows]
        images += part.images[rows]
        data = {"embeddings": part.vectors[rows]}
        if statistics is not None:
            data["scales"] = part.scales[rows]
            if not np.array_equal(part.statistics, statistics):  # machines that round differently fitted them
                every = range(len(part))[rows]
                data = quantised(part.read(every, part.columns).numpy(), statistics)
        write_rows(out, data, w * window)
    write_lines(out / "keys.txt", keys)
    write_lines(out / "images.txt", images)
