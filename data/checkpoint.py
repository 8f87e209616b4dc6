"""A run's folder, out/<name>: its checkpoint, its log, and going on from them.

    training.pt                         weights, AdamW's moments and the step
    model.safetensors, config.json      what flame.load reads; config.json comes last and vouches for these
    log.jsonl, skipped.txt              a line for each step, a line for each picture that cannot be read

Whenever a run is killed or the disk is full, each file is whole or not there at all, and the same command
goes on.
"""
import functools
import hashlib
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

import flame
from data import files
from flame import InputError

ANEW = "choose another --name, or start anew with --overwrite"


def identity(store):
    """A store's content in a word: everything that fixes its bytes, and not where it or its captions lie."""
    with flame.reading(store.path / "meta.json", "make it anew with embed.py"):
        meta = store.meta | {"captions": store.meta["captions"]["sha256"], "versions": None}
        return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save(out, step, s, store, images, model, optimizer):
    """s: the settings. images: root of the pictures, or None. Raises InputError where a weight is no number.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{out}: weights are NaN or infinite after step {step - 1}; lower --lr; the "
                         "last checkpoint is kept")
    training = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    record = {"model": model.config, "llm": store.meta["llm"], "training": s, "step": step,
              "store": {"path": str(store.path), "identity": identity(store)},
              "images": images and os.path.abspath(images)}
    files.write(out / "training.pt", functools.partial(torch.save, training))
    files.write(out / "model.safetensors", functools.partial(save_file, model.state_dict()))
    files.write_json(out / "config.json", record)


def earlier_run(out, store, fixed):
    """-> config.json of the run in this folder, None where there was none.

    fixed: the settings that must be as they were. Raises InputError where it was another run.
    """
    path = out / "config.json"
    if not path.exists():
        return None
    record = flame.read_json(path, cure=ANEW)
    with flame.reading(path, ANEW):
        record["step"] = int(record["step"])
        trained_on = record["store"]["identity"]
        before = [record["training"][name] for name in fixed]
    if trained_on != identity(store):
        raise InputError(f"{out}: holds a checkpoint of another store than {store.path}; {ANEW}")
    for (name, value), earlier in zip(fixed.items(), before):
        if earlier != value:
            raise InputError(f"{out}: was trained with {name} {earlier}, now it is {value}; {ANEW}")
    return record


def restore(out, model, optimizer):
    """Loads training.pt; -> the step to go on from."""
    with flame.reading(out / "training.pt", ANEW) as path:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`; a damaged one only the curve misses."""
    lines = []
    for line in lines_of(out / "log.jsonl"):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if entry["step"] < start and math.isfinite(entry["loss"]):
                lines.append(line)
    return lines


def lines_of(path):
    return path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []


def begin(out, start, lines):
    """After the first step: log.jsonl holds `lines`; what a run from `start` on does not need is gone."""
    with files.disk_errors(out):
        for name in ("config.json", "training.pt", "model.safetensors", "skipped.txt") if not start else ():
            (out / name).unlink(missing_ok=True)
    files.write_text(out / "log.jsonl", "".join(lines))


def note_skipped(out, failed):
    """[(key, why)] -> a line each in skipped.txt, once, whichever rank and epoch met it."""
    path = out / "skipped.txt"
    if failed:
        known = {line.split("\t")[0] for line in lines_of(path)}
        files.append(path, "".join(f"{key}\t{why}\n" for key, why in failed if key not in known))


def tell_skipped(out):
    skipped = lines_of(out / "skipped.txt")
    if skipped:
        pictures = "pictures" if len(skipped) > 1 else "picture"
        print(f"skipped {len(skipped)} unreadable {pictures}, listed in {out}/skipped.txt: "
              f"{', '.join(skipped[0].split(chr(9))).strip()} ...", file=sys.stderr)


def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. flame.InputError if there is none."""
    cure = "mend it, remove its folder, or name another checkpoint with --checkpoint"
    finished = []
    for path in folder.glob("*/config.json"):
        record = flame.read_json(path, cure=cure)
        with flame.reading(path, cure):
            if record["step"] == record["training"]["steps"]:  # else a run still training
                finished.append((path.stat().st_mtime, path.parent))
    if not finished:
        raise InputError(f"{folder}: no finished checkpoint; run train.py, or name one with --checkpoint")
    return max(finished)[1]
