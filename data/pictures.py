"""The pictures of a table's rows: where they lie (data/README.md), and training's batches of them."""
import functools
import glob
import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image

from data.files import write
from data.sources import PICTURES, source_files
from data.tars import report_skipped, sample_name, tar_files
from flame import COLUMNS, InputError, reading, rgb

LARGEST = 1 << 30  # bytes of a picture's file; what is larger is cut, and no decoder takes it
KEPT = 1 << 28     # bytes of decoded pictures that a loader's process keeps: of the demo all, 70 MB
LOOKED_AT = 1000   # pictures that stand for all of them where it is asked whether they are there
SHUFFLE = 50_000   # pictures are put off at most: several tars are mixed, each is still read nearly in order
DRAWS = 22         # numbers that fix a crop: two for its place, two for each of ten tries to fit it in
EpsImagePlugin.gs_binary = False  # a stranger's PostScript, whatever its name, would run, and may never end


# ------------------------------------------------------------------------------------------------------------
# Where they lie

class Place(NamedTuple):
    """Where a picture's bytes are: a file, or a part of a tar."""
    path: str
    offset: int = 0
    size: int = LARGEST  # at most


def open_picture(place):
    """PIL image, its header read, not yet decoded. Raises nearly anything on a stranger's bytes."""
    if not os.path.isfile(place.path):  # a pipe is waited for
        raise OSError(0, "not a regular file", place.path)
    with open(place.path, "rb", buffering=0) as file:
        file.seek(place.offset)
        return Image.open(io.BytesIO(file.read(min(place.size, LARGEST))))


def pictures_in(folder):
    """The files in a folder and its folders that are named like pictures, [Place]"""
    paths = sorted(glob.iglob(f"{glob.escape(str(folder))}/**", recursive=True))
    return [Place(path) for path in paths if path.lower().endswith(PICTURES)]


def find_pictures(keys, images, captions, folder=None, index=""):
    """-> (rows int64 [n] that name a picture, or have one by key, files [str], places int64 [n, 3]), in the
    disk's order. A file that is not there is an unreadable picture of a training step.

    A place is (which of files, first byte, bytes at most). keys, images: of the table made of `captions`.
    Pictures are the files that images names, from the folder on, else from where the captions lie. Where none
    is there, they lie by key, as files or in tars that are never unpacked: in the folder; without one, in the
    tars that were captioned, else in the folder named as the captions. index: file (.npz) that keeps what was
    found by key. Raises InputError where no row has a picture.
    """
    captions = Path(captions)
    root = Path(folder or (captions if captions.is_dir() else captions.parent))
    rows = [row for row, image in enumerate(images) if image]
    files = [os.path.join(root, images[row]) for row in rows]
    if any(map(os.path.isfile, files[::1 + len(files) // LOOKED_AT])):
        return np.array(rows), files, np.array([(n, 0, LARGEST) for n in range(len(files))])
    wanted = (files or keys)[0]
    if not folder and not captions.is_dir():
        root = captions.with_name(captions.name.split(".")[0])
    tars = source_files(captions) if captions.suffix == ".tar" and not folder else sorted(root.glob("*.tar"))
    files = list(map(str, tars)) or [place.path for place in pictures_in(root)]
    changed = [os.stat(tar).st_mtime_ns for tar in tars]
    stamp = hashlib.sha256(json.dumps([keys, files, changed]).encode()).hexdigest()
    if os.path.exists(index):
        with reading(index, "delete it") as path, np.load(path) as saved:
            if str(saved["stamp"]) == stamp:
                return saved["rows"], files, saved["places"]
    place_of = places_by_key(keys, files)
    if not place_of:
        raise InputError(f"{root}: no row of {captions} has a picture there, such as {wanted}; give --images "
                         "DIR, or embed the tars themselves; only at 10,000 a shard are keys row numbers")
    rows, places = np.array([*place_of]), np.array([*place_of.values()])
    if index:
        write(index, functools.partial(np.savez, stamp=stamp, rows=rows, places=places))
    return rows, files, places


def places_by_key(keys, files):
    """-> {row: place}, of each key's first picture. Of a damaged tar, what comes before the damage."""
    row_of = {key: row for row, key in enumerate(keys)}
    place_of = {}
    skipped = {}
    for n, file in enumerate(files):
        held = tar_files(file, skipped) if file.endswith(".tar") else [(*sample_name(file), 0, LARGEST)]
        for _, key, suffix, offset, size in held:
            if key in row_of and suffix in PICTURES:
                place_of.setdefault(row_of[key], (n, offset, size))
    report_skipped("pictures", skipped)
    return place_of


# ------------------------------------------------------------------------------------------------------------
# What a training step sees

def crop_box(width, height, smallest, draw):
    """A random resized crop, distributed as torchvision's -> (left, top, width, height) in whole pixels.

    Its area is a share from `smallest` to 1 of the picture's, its ratio 3/4 to 4/3. What does not fit is
    drawn again; where no try fits, the box is the largest in the middle that has such a ratio.
    draw: DRAWS numbers from [0, 1).
    """
    for share, slant in draw[2:].reshape(-1, 2).tolist():
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = (4 / 3) ** (2 * slant - 1)  # as often wide as high
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[0] * (width - w + 1)), int(draw[1] * (height - h + 1)), w, h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def random_crop(image, size, smallest, draw):
    """Random resized crop (see `crop_box`), bicubic -> uint8 tensor [3, size, size], RGB.

    A JPEG that is only opened is decoded at 1/2, 1/4 or 1/8 of its size where the box stays as large as the
    result. The resizing is torch's, as exact as Pillow's and three times as fast.
    """
    width, height = image.size
    left, top, w, h = crop_box(width, height, smallest, draw)
    least = (math.ceil(width * size / w), math.ceil(height * size / h))
    reduced = image.draft(None, least)  # None: not a JPEG
    x = reduced[1][2] / width if reduced else 1.0
    box = round(left * x), round(top * x), math.ceil((left + w) * x), math.ceil((top + h) * x)
    pixels = torch.from_numpy(np.array(rgb(image.crop(box)))).permute(2, 0, 1)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


class Batches:
    """Item t is this rank's slice of the batch of step t, a pure function of the seed and t.

    -> (pixels uint8 [b, 3, S, S], facets float16 [b, P, D], their columns int64 [b, P], readable bool [b],
    patches to keep int64 [b, n] or None), [(key, why it could not be read)].
    An unreadable picture's pixels are 0.
    """

    def __init__(self, store, columns, pictures, settings, rank=0, world=1):
        self.store = store
        self.columns = np.array(columns)
        self.rows, self.files, self.places = pictures
        self.settings = settings
        self.batch = settings["batch"]
        self.mine = slice(rank * self.batch // world, (rank + 1) * self.batch // world)
        self.decoded = {}

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        """Files (pictures, tars) in random order; then each picture comes up to SHUFFLE places later: tars
        are mixed, and each is still read nearly in order.
        """
        rng = np.random.default_rng([self.settings["seed"], 1, epoch])
        turn = rng.permutation(len(self.files))
        line = np.argsort(turn[self.places[:, 0]], kind="stable")
        put_off = np.arange(len(line)) + SHUFFLE * rng.random(len(line))
        return line[np.argsort(put_off, kind="stable")]

    def pictures(self, step):
        """The whole batch of a step: indices into rows."""
        epoch, at = divmod(step, len(self.rows) // self.batch)  # the few over are left out, others each epoch
        return self.order(epoch)[at * self.batch:(at + 1) * self.batch]

    def __getitem__(self, step):
        s = self.settings
        size = s["image_size"]
        rng = np.random.default_rng([s["seed"], 2, step])  # drawn for the whole batch, whatever the slice
        draws = rng.random((self.batch, DRAWS))[self.mine]
        # Names are asked by the raw caption's one column, which else half of the steps leave out.
        raw = []
        if s["raw_always"] and s["positives"] > 1:  # of one, it would be the only one ever
            raw = np.flatnonzero(self.columns == COLUMNS.index("raw.0"))
        columns = self.columns[self.some(rng, len(self.columns), s["positives"], raw)]
        patches = (size // s["patch_size"]) ** 2
        kept = torch.from_numpy(self.some(rng, patches, patches_kept(s))) if s["patch_dropout"] else None
        chosen = self.pictures(step)[self.mine]
        pixels = torch.zeros(len(chosen), 3, size, size, dtype=torch.uint8)
        readable = torch.zeros(len(chosen), dtype=torch.bool)
        failed = []
        for i, place in enumerate(places_of(self.files, self.places[chosen])):
            try:
                pixels[i] = random_crop(self.open(place), size, s["crop_scale"], draws[i])
                readable[i] = True
            except Exception as error:  # decoders raise nearly anything on a stranger's bytes
                key = self.store.keys[self.rows[chosen[i]]]
                failed.append((key, f"{type(error).__name__}: {place.path}"))
        facets = self.store.take(self.rows[chosen], columns)
        return (pixels, facets, torch.from_numpy(columns), readable, kept), failed

    def open(self, place):
        """PIL image. Where memory has room for all, as for the demo's, each is decoded once: a tenth of a
        step's time on two cores. A step sees the same: `random_crop` decodes none so small by draft.
        """
        if place in self.decoded:
            return self.decoded[place]
        image = open_picture(place)
        small = min(image.size) < 2 * self.settings["image_size"]
        if small and 3 * math.prod(image.size) * len(self.rows) <= KEPT:
            image.load()
            self.decoded[place] = image
        return image

    def some(self, rng, n, k, always=()):
        """k of n for each picture of this rank, without replacement, these among them."""
        draws = rng.random((self.batch, n))
        draws[:, always] = -1
        return draws.argsort(1)[self.mine, :k]


def places_of(files, places):
    """int64 [n, 3] -> [Place]"""
    return [Place(files[file], offset, size) for file, offset, size in places.tolist()]


def patches_kept(settings):
    """How many patches of a picture a step looks at."""
    patches = (settings["image_size"] // settings["patch_size"]) ** 2
    return max(1, round(patches * (1 - settings["patch_dropout"])))
