"""A run's folder, out/<name>: its checkpoint, its log, and going on from them.

    training.pt, training-previous.pt   weights, AdamW's moments and the step
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
from pathlib import Path

import torch
from safetensors.torch import save_file

import flame
from data import files
from flame import InputError

ANEW = "choose another --name, or start anew with --overwrite"
LENGTH = ("steps", "epochs", "warmup")  # of a run: one that is trained longer has others


def folder(out):
    """Makes it now, not after the last step. A run that ends without a step leaves none behind."""
    return files.folder(out, "log.jsonl", "nan-batch.txt")


def identity(store):
    """A store's content in a word: everything that fixes its bytes, and not where it or its captions lie."""
    meta = {key: value for key, value in store.meta.items() if key != "versions"}
    meta["captions"] = meta["captions"]["sha256"]
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save(out, step, s, store, images, model, average, optimizer):
    """s: the settings. images: root of the pictures, or None. average: whose weights are to be used, the
    running average or the model itself.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{out}: weights are NaN or infinite after step {step - 1}; lower --lr; the "
                         "last checkpoint is kept")
    training = {"step": step, "model": model.state_dict(), "average": average.state_dict(),
                "optimizer": optimizer.state_dict()}
    of_store = {"path": str(store.path), "identity": identity(store), "N": len(store),
                "columns": store.meta["columns"]}
    record = {"model": model.config, "llm": store.meta["llm"], "training": s, "step": step, "store": of_store,
              "images": images and os.path.abspath(images)}

    def write_training(temporary):
        torch.save(training, temporary)
        if (out / "training.pt").exists():
            os.replace(out / "training.pt", out / "training-previous.pt")

    files.write(out / "training.pt", write_training)
    files.write(out / "model.safetensors", functools.partial(save_file, average.state_dict()))
    files.write_text(out / "config.json", json.dumps(record, indent=1))


def earlier_run(out, store, fixed):
    """-> config.json of the run in this folder, None where there was none.

    fixed: the settings that must be as they were; only the number of steps may grow. Raises InputError where
    it was another run.
    """
    path = out / "config.json"
    if not path.exists():
        return None
    wanted = {"model": dict, "training": {"accumulate": int, "steps": int}, "store": dict, "step": int}
    old = flame.read_json(path, wanted, ANEW)
    width = old["model"].get("text_dim")
    if width != store.meta["D"]:
        raise InputError(f"{out}: holds a checkpoint for vectors of width {width}, {store.path} has "
                         f"{store.meta['D']}; {ANEW}")
    if old["store"].get("identity") != identity(store):
        raise InputError(f"{out}: holds a checkpoint of another store than {store.path}; {ANEW}")
    longer = old["training"]["steps"] < fixed["steps"]
    for name, value in fixed.items():
        was = old["training"].get(name)
        if was != value and not (longer and name in LENGTH):
            raise InputError(f"{out}: was trained with {name} {was}, now it is {value}; {ANEW}")
    return old


def restore(out, s, model, average, optimizer):
    """Loads training.pt, or where that is damaged training-previous.pt; -> the step to go on from."""
    reasons = []
    for name in ("training.pt", "training-previous.pt"):
        path = out / name
        try:
            step = load_training(path, s, model, average, optimizer)
            if not 1 <= step <= s["steps"]:
                raise ValueError(f"step {step} of {s['steps']}")
        except Exception as e:  # a damaged file can raise nearly anything
            reasons.append(f"{path}: cannot be gone on from ({type(e).__name__}: {files.said(e)})")
            continue
        if reasons:
            print(f"{reasons[0]}; {name} serves", file=sys.stderr)
        return step
    raise InputError(f"{'; '.join(reasons)}; {ANEW}")


def load_training(path, s, model, average, optimizer):
    if not path.is_file():  # a pipe would be waited for without end
        raise FileNotFoundError("no such file")
    saved = dict(torch.load(path, map_location="cpu", weights_only=True))
    model.load_state_dict(saved["model"])
    average.load_state_dict(saved["average"])
    groups = optimizer.state_dict()["param_groups"]  # what the settings say stays
    optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    locked = saved["step"] <= s["lock_image"]
    for name, p in model.named_parameters():
        if locked and name.startswith("visual."):  # AdamW has not seen it yet
            continue
        state = optimizer.state[p]
        if state["step"].ndim or state["exp_avg"].shape != p.shape or state["exp_avg_sq"].shape != p.shape:
            raise ValueError("AdamW's moments are another model's")
    return saved["step"]


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`; a damaged one only the curve misses."""
    path = out / "log.jsonl"
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file; remove it, only the curve needs it")
    lines = []
    for line in lines_of(path) if start else ():
        try:
            entry = json.loads(line)
            if entry["step"] < start and math.isfinite(entry["loss"]):
                lines.append(f"{line}\n")
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
    return lines


def lines_of(path):
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def begin(out, start, lines):
    """After the first step: log.jsonl holds `lines`; what a run from `start` on does not need is gone."""
    stale = ("training.pt", "training-previous.pt", "model.safetensors", "config.json", "skipped.txt")
    with files.disk_errors(out):
        for name in stale if not start else ():
            (out / name).unlink(missing_ok=True)
    files.write_text(out / "log.jsonl", "".join(lines))


def note_skipped(out, failed):
    """[(key, why)] -> a line each in skipped.txt, once, whichever rank and epoch met it."""
    path = out / "skipped.txt"
    if failed:
        known = {line.split("\t")[0] for line in lines_of(path)}
        files.append(path, "".join(f"{key}\t{why}\n" for key, why in failed if key not in known))


def tell_skipped(out):
    path = out / "skipped.txt"
    skipped = [line.replace("\t", " (") + ")" for line in lines_of(path)]
    if skipped:
        some = ", ".join(skipped[:5]) + ", ..." * (len(skipped) > 5)
        pictures = "pictures" if len(skipped) > 1 else "picture"
        print(f"skipped {len(skipped)} unreadable {pictures}, listed in {path}: {some}", file=sys.stderr)


def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. flame.InputError if there is none."""
    nothing = type(None)
    cure = "mend it, remove its folder, or name another checkpoint with --checkpoint"
    finished = []
    for path in folder.glob("*/config.json"):
        weights = path.with_name("model.safetensors")
        if not weights.exists():
            continue
        config = flame.read_json(path, {"step": (int, nothing), "training": (dict, nothing)}, cure)
        steps = (config.get("training") or {}).get("steps")
        if config.get("step") in (None, steps):  # else a run still training
            finished.append((weights.stat().st_mtime, path.parent))
    if not finished:
        raise flame.InputError(f"{folder}: no finished checkpoint; "
                               "run train.py, or name one with --checkpoint")
    return max(finished)[1]
