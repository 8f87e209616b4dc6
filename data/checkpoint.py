"""A run's folder, out/<name>, and going on from it.

    training.pt                         weights, AdamW's moments and the step
    model.safetensors, config.json      what flame.load reads; config.json comes last and vouches for these
    log.jsonl, skipped.txt              a line for each step, a line for each picture that cannot be read:
                                        data/progress.py

Whenever a run is killed or the disk is full, each file is whole or not there at all, and the same command
goes on.
"""
import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from data import files, progress
from flame import InputError, read_json, reading

ANEW = "choose another --name, or start anew with --overwrite"


def identity(store):
    """A store's content in a word: everything that fixes its bytes, and not where it or its captions lie."""
    with reading(store.path / "meta.json", "make it anew with embed.py"):
        meta = store.meta | {"captions": store.meta["captions"]["sha256"]}
        meta["llm"] = {key: value for key, value in meta["llm"].items() if key not in ("name", "path")}
        return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save(run, step):
    """run: train.Run. Raises InputError where a weight is no number."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise InputError(f"{run.out}: weights are NaN or infinite after step {step - 1}; lower --lr; the "
                         "last checkpoint is kept")
    weights, store = run.model.state_dict(), run.batches.store
    training = {"step": step, "model": weights, "optimizer": run.optimizer.state_dict()}
    record = {"model": run.model.config, "llm": store.meta["llm"], "training": run.s, "step": step,
              "store": {"path": os.path.abspath(store.path), "identity": identity(store)},
              "images": run.images and os.path.abspath(run.images)}
    files.write(run.out / "training.pt", functools.partial(torch.save, training))
    files.write(run.out / "model.safetensors", functools.partial(save_file, weights))
    files.write_json(run.out / "config.json", record)


def earlier_run(out, store, fixed):
    """-> config.json of the run in this folder, None where there was none.

    fixed: the settings that must be as they were. Raises InputError where it was another run.
    """
    path = out / "config.json"
    if not path.exists():
        for name in ("training.pt", "model.safetensors"):
            if (out / name).exists() and not (out / "log.jsonl").exists():
                raise InputError(f"{out / name}: no run of train.py left this here; {ANEW}")
        return None
    with reading(path, ANEW):
        record = read_json(path, ANEW)
        if record["store"]["identity"] != identity(store):
            raise InputError(f"{out}: holds a checkpoint of another store than {store.path}; {ANEW}")
        for name, value in fixed.items():
            before = record["training"][name]
            if before != value:
                raise InputError(f"{out}: was trained with {name} {before}, now it is {value}; {ANEW}")
        return record | {"step": int(record["step"])}


def restore(out, model, optimizer):
    """Loads training.pt; -> the step to go on from."""
    with reading(out / "training.pt", ANEW) as path:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])


def begin(out, start):
    """After the first step: log.jsonl holds the steps before `start`; what a run from there does not need is
    gone."""
    lines = progress.earlier_log(out, start)
    with files.disk_errors(out):
        for name in ("config.json", "training.pt", "model.safetensors", "skipped.txt") if not start else ():
            (out / name).unlink(missing_ok=True)
    files.write_text(out / "log.jsonl", "".join(lines))


def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. InputError if there is none."""
    cure = "mend it, remove its folder, or name another checkpoint with --checkpoint"
    for path in sorted(folder.glob("*/**/config.json"), key=os.path.getmtime, reverse=True):
        with reading(path, cure):
            record = read_json(path, cure)
            if record["step"] == record["training"]["steps"]:  # else a run still training
                return path.parent
    raise InputError(f"{folder}: no finished checkpoint; run train.py, or name one with --checkpoint")
