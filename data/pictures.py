"""The pictures of a store's rows: where they lie (files that the captions name, files or tars named by key), and training's batches of them."""
import functools
import hashlib
import io
import json
import math
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flame

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def find_pictures(store, folder=None, index=None):
    """-> (rows int64 [n] of the store that have a picture, files, places int64 [n, 3]), in the order of the disk.

    A place is (which of files, first byte, bytes; -1: to the end). folder: where the captions' paths start, or where files or tars
    (*.tar, as img2dataset and webdataset write them; never unpacked) lie by key; default: beside the captions. index: file (.npz)
    that keeps what was found in the tars. Raises InputError where fewer than two rows have a picture.
    """
    captions = Path(store.meta["captions"]["path"])
    named = any(store.images)
    roots = [Path(folder)] if folder else [captions.parent] if named else [captions.with_name(captions.name.split(".")[0]), captions.with_name("images")]
    root = next((p for p in roots if p.is_dir()), roots[0] if named else None)
    if root is None:
        raise flame.InputError(f"{store.path}: its captions name no pictures, and there is no folder {' or '.join(map(str, roots))}; give --images DIR with files or tars named by key")
    if (folder or not named) and (files := sorted(map(str, root.glob("*.tar")))):
        rows, places = index_tars(store, files, index)
    else:
        by_key = {key: str(root / image) for key, image in zip(store.keys, store.images) if image}
        for at, _, names in os.walk(root) if not named else ():
            by_key |= {os.path.splitext(name)[0]: os.path.join(at, name) for name in names if name.lower().endswith(SUFFIXES)}
        rows = np.array([row for row, key in enumerate(store.keys) if key in by_key], np.int64)
        files = [by_key[store.keys[row]] for row in rows]
        places = np.stack([np.arange(len(rows)), np.zeros_like(rows), np.full_like(rows, -1)], axis=1)
    if len(rows) < 2:
        raise flame.InputError(f"{root}: {len(rows)} of the {len(store)} keys in {store.path} have a picture there (first key: {store.keys[0]}); training needs two")
    return rows, files, places


def index_tars(store, tars, index):
    """-> rows [n], places [n, 3]. Of a tar that is cut short, what comes before the cut; of two pictures of one key, the first."""
    stamp = json.dumps([hashlib.sha256("\n".join(store.keys).encode()).hexdigest(), *((tar, os.stat(tar).st_size, os.stat(tar).st_mtime_ns) for tar in tars)])
    try:
        with np.load(index) as saved:
            if str(saved["stamp"]) == stamp:
                return saved["rows"], saved["places"]
    except Exception:  # missing, or damaged in one of many ways: made anew
        pass
    row_of, found, strangers, broken = {key: row for row, key in enumerate(store.keys)}, [], 0, []
    for t, path in enumerate(tqdm(tars, desc="indexing tars", unit=" tars")):
        size, end = os.path.getsize(path), None
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # or tarfile remembers them all
                    key, suffix = os.path.splitext(os.path.basename(member.name))
                    if suffix.lower() in SUFFIXES and member.offset_data + member.size <= size:
                        if (row := row_of.pop(key, None)) is None:
                            strangers += 1
                        else:
                            found.append((row, t, member.offset_data, member.size))
                tar.fileobj.seek(tar.offset)
                end = tar.fileobj.read(512)
        except (tarfile.TarError, OSError):
            pass
        if end != bytes(512):  # a whole tar ends in empty blocks
            broken.append(os.path.basename(path))
    folder = os.path.dirname(tars[0])
    if broken:
        print(f"{folder}: {len(broken)} of {len(tars)} tars cut short or damaged, used as far as they go: {', '.join(broken[:5])}{', ...' * (len(broken) > 5)}", file=sys.stderr)
    if strangers:
        print(f"{folder}: {strangers} pictures left out whose key is not in {store.path}, or came before", file=sys.stderr)
    found = np.array(found, np.int64).reshape(-1, 4)
    if index is not None:
        with open(f"{index}.tmp", "wb") as file:
            np.savez(file, stamp=stamp, rows=found[:, 0], places=found[:, 1:])
        os.replace(f"{index}.tmp", index)
    return found[:, 0], found[:, 1:]


def open_picture(files, place):
    """PIL image, its header read, not yet decoded."""
    file, offset, size = place.tolist()
    with open(files[file], "rb", buffering=0) as f:
        f.seek(offset)
        return Image.open(io.BytesIO(f.read(size)))


def random_crop(image, size, smallest, draw):
    """Random resized crop -> uint8 tensor [3, size, size], RGB: a box of at least the share `smallest` of the area, ratio 3/4 to 4/3, bicubic.

    draw: four numbers from [0, 1) that fix the box. A JPEG that is only opened is decoded at 1/2, 1/4 or 1/8 of its size where the
    box stays as large as the result. The resizing is torch's, as exact as Pillow's and three times as fast.
    """
    w, h = image.size
    area = w * h * (smallest + (1 - smallest) * draw[0])
    ratio = math.exp(math.log(4 / 3) * (2 * draw[1] - 1))
    cw, ch = min(w, math.sqrt(area * ratio)), min(h, math.sqrt(area / ratio))
    left, top = draw[2] * (w - cw), draw[3] * (h - ch)
    reduced = image.draft(None, (math.ceil(w * size / cw), math.ceil(h * size / ch)))  # at least that large; None: not a JPEG
    x = reduced[1][2] / w if reduced else 1.0
    pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))  # [h, w, 3]
    box = pixels[round(top * x):max(1, math.ceil((top + ch) * x)), round(left * x):max(1, math.ceil((left + cw) * x))]
    return F.interpolate(box.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)[0]


class Batches(torch.utils.data.Dataset):
    """Item t is this rank's slice of the batch of step t, a pure function of the seed and t.

    -> (pixels uint8 [b, 3, S, S], facets float16 [b, P, D], columns int64 [b, P] as the text projection counts them,
    readable bool [b], patches to keep int64 [b, n] or None), [(key, why it could not be read)]. An unreadable picture's pixels are 0.
    """

    def __init__(self, store, columns, pictures, settings, steps, rank=0, world=1):
        self.store, self.columns, (self.rows, self.files, self.places), self.steps = store, np.array(columns), pictures, steps
        self.named = np.array([flame.COLUMNS.index(store.meta["columns"][c]) for c in columns])
        self.size, self.batch, self.positives = settings["image_size"], settings["batch"], settings["positives"]
        self.crop_scale, self.seed, self.shuffle = settings["crop_scale"], settings["seed"], settings["shuffle"]
        self.patches = (self.size // settings["patch_size"]) ** 2
        self.kept = max(1, round(self.patches * (1 - settings["patch_dropout"])))
        self.mine = slice(rank * self.batch // world, (rank + 1) * self.batch // world)
        self.cache, self.room = {}, settings["cache"] * 2 ** 30

    def __len__(self):
        return self.steps

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        """Files in random order (pictures, or tars), then a shuffle buffer: each picture is put off by up to so many places."""
        rng = np.random.default_rng([self.seed, 1, epoch])
        line = np.argsort(rng.permutation(len(self.files))[self.places[:, 0]], kind="stable")
        return line[np.argsort(np.arange(len(line)) + self.shuffle * rng.random(len(line)), kind="stable")]

    def pictures(self, step):
        """The whole batch of a step: indices into rows."""
        epoch, at = divmod(step, len(self.rows) // self.batch)  # the few images over are left out, others each epoch
        return self.order(epoch)[at * self.batch:(at + 1) * self.batch]

    def __getitem__(self, step):
        rng = np.random.default_rng([self.seed, 2, step])  # drawn for the whole batch, whatever the slice
        boxes = rng.random((self.batch, 4))[self.mine]
        picks = rng.random((self.batch, len(self.columns))).argsort(1)[self.mine, :self.positives]
        kept = rng.random((self.batch, self.patches)).argsort(1)[self.mine, :self.kept] if self.kept < self.patches else None
        chosen = self.pictures(step)[self.mine]
        pixels, readable, bad = torch.zeros(len(chosen), 3, self.size, self.size, dtype=torch.uint8), torch.ones(len(chosen), dtype=torch.bool), []
        for i, n in enumerate(chosen.tolist()):
            try:
                pixels[i] = random_crop(self.image(n), self.size, self.crop_scale, boxes[i])
            except Exception as e:  # decoders raise nearly anything on a stranger's bytes
                readable[i] = False
                bad.append((self.store.keys[self.rows[n]], type(e).__name__))
        facets = self.store.read(self.rows[chosen], self.columns[picks]).half()
        return (pixels, facets, torch.from_numpy(self.named[picks]), readable, None if kept is None else torch.from_numpy(kept)), bad

    def image(self, n):
        """PIL image; where there is a cache, decoded, else only opened."""
        if (image := self.cache.get(n)) is None:
            image = open_picture(self.files, self.places[n])
            if self.room > 0:
                image = self.cache[n] = image.convert("RGB")
                self.room -= 4 * image.width * image.height  # bytes, as Pillow keeps it
        return image
