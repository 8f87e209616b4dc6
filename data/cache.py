"""What the text tower and a checkpoint's image tower said, kept on disk: a second run takes seconds.

evaluate.py keeps it in <out>/cache.sqlite, which can be deleted at any time. A cache has the two methods of
a dict that evaluate.py uses, get(key) and update(pairs of key and bytes), so that a dict can stand in.
"""
import functools
import hashlib
import json
import os
import sqlite3
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flame
from flame import InputError


class Cache:
    """One sqlite file, made when there is something to keep. Raises flame.InputError where the disk is full.

    Where the file can be none, a note says so, and what is kept is gone with this process.
    """

    def __init__(self, path):
        self.path = path
        self.db = None
        if os.path.lexists(path):
            self.open()

    def open(self):
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path):     # a pipe would be waited for
                raise sqlite3.Error("not a regular file")
            self.connect(self.path)
        except sqlite3.Error as error:
            print(f"{self.path}: {error}; nothing is kept for the next run, remove it or make room",
                  file=sys.stderr)
            self.connect(":memory:")

    def connect(self, path):
        self.db = sqlite3.connect(path, timeout=60)
        self.db.execute("PRAGMA synchronous = OFF")     # survives a kill, not a power cut
        columns = "(key TEXT PRIMARY KEY, value BLOB)"
        self.db.execute(f"CREATE TABLE IF NOT EXISTS cache {columns} WITHOUT ROWID")

    @contextmanager
    def errors(self):
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: {error}; make room, or delete it: it is only a cache") from None

    def get(self, key):
        if self.db is None:
            return None
        with self.errors():
            row = self.db.execute("SELECT value FROM cache WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def update(self, pairs):
        if self.db is None:
            self.open()
        with self.errors(), self.db:
            self.db.executemany("INSERT OR REPLACE INTO cache VALUES (?, ?)", pairs)


def find(cached, key, size):
    """The bytes under a key; None where there are none, or not `size` of them, as in a damaged file."""
    blob = cached.get(key) if key else None
    return blob if isinstance(blob, bytes) and len(blob) == size else None


@functools.cache
def code():
    """Digest of the code that makes what is kept, kernels included: with another the cache starts anew."""
    files = [flame.__file__, Path(__file__).with_name("released.py"), __file__]
    files += [flame.flame_ext.__file__] if flame.flame_ext else []
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def image_tower_name(model, dtype):
    """Names what pictures go through, by content: settings, weights, and the type of the matrix products."""
    settings = {key: value for key, value in model.config.items() if key != "llm"}
    towers = [code(), str(dtype), settings]
    digest = hashlib.sha256(json.dumps(towers, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("visual.", "mm.")):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def picture_key(tower, picture):
    """By the picture's path, size and time; an array by content. None where missing."""
    if isinstance(picture, np.ndarray):
        content = repr(picture.shape).encode() + picture.tobytes()
        return f"{tower}\t{hashlib.sha256(content).hexdigest()}"
    file = getattr(picture, "tar", picture)     # that holds it
    inside = "" if file is picture else f"\t{picture.offset}"
    try:
        stat = os.stat(file)
        path = file.resolve()
    except (OSError, ValueError):   # not there, or no name that a file can have
        return None
    key = f"{tower}\t{stat.st_size}\t{stat.st_mtime_ns}\t{path.as_posix()}{inside}"
    return key.encode("utf-8", "backslashreplace").decode()


def text_key(tower, prompts, text):
    """tower: names the LLM and how it is run; prompts: the flame.PromptSet, by content."""
    return f"text\t{hashlib.sha256(repr((code(), tower, tuple(prompts), text)).encode()).hexdigest()}"


def pack_states(states):
    """Facet states float32 [K, D] -> bytes: unit vectors as float16, as in a store, and norms as float32."""
    norms = states.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (states / norms).half().numpy().tobytes() + norms.numpy().tobytes()


def states_size(facets, dim):
    """How many bytes pack_states gives."""
    return facets * (2 * dim + 4)


def unpack_states(blobs, facets):
    """n times what pack_states gives -> float32 [n, K, D]"""
    raw = np.frombuffer(b"".join(blobs), np.uint8).reshape(len(blobs), -1)
    units = np.ascontiguousarray(raw[:, :-4 * facets]).view(np.float16).reshape(len(blobs), facets, -1)
    norms = np.ascontiguousarray(raw[:, -4 * facets:]).view(np.float32)
    return torch.from_numpy(units.astype(np.float32) * norms[..., None])


def recall(cached, keys, size, make, **bar):
    """The `size` bytes under each key; None where they are neither there nor can be made.

    make(indices of what is not there) yields (some of these, their bytes), which are kept at once: a run that
    is interrupted loses no more than it was at. bar: how tqdm names the progress.
    """
    blobs = [find(cached, key, size) for key in keys]
    missing = [i for i, blob in enumerate(blobs) if blob is None]
    with tqdm(total=len(missing), mininterval=1, disable=not missing, **bar) as progress:
        for some, made in make(missing) if missing else ():
            cached.update((keys[i], blob) for i, blob in zip(some, made))
            for i, blob in zip(some, made):
                blobs[i] = blob
            progress.update(len(some))
    return blobs
