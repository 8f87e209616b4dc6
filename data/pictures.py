"""The pictures of a store's rows: where they lie (files that the captions name, files or tars named by key), and
training's batches of them."""
import functools
import hashlib
import io
import json
import math
import os
import stat
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flame
from data.captions import DAMAGED, read_captions, report_skipped, sample_name, skip, tar_files
from data.files import write

KINDS = ("jpg", "jpeg", "png", "webp")
LARGEST = 1 << 30  # bytes of a picture's file
LOOKED_AT = 1000   # pictures that stand for all of them where it is asked whether they are there
DRAWS = 22         # numbers that fix a crop: two for its place, two for each of ten tries to fit it in


# ---------------------------------------------------------------------------------------------------------------------
# Where they lie

def find_pictures(store, folder=None, index=None):
    """-> (rows int64 [n] of the store that have a picture, files, places int64 [n, 3]), in the order of the disk.

    A place is (which of files, first byte, bytes; -1: to the end). folder: where the captions' paths start, or where
    files or tars (*.tar, as img2dataset and webdataset write them; never unpacked) lie by key; default: beside the
    captions. index: file (.npz) that keeps what was found in the tars.
    Raises InputError where fewer than two rows have a picture, or none of those that the captions name is there.
    """
    captions = Path(store.meta["captions"]["path"])
    named = any(store.images)
    root = Path(folder) if folder else captions.parent if named else folder_by_key(store, captions)
    tars = sorted(map(str, root.glob("*.tar"))) if folder or not named else []
    if tars:
        rows, places = index_tars(store, tars, index)
        files = tars
    else:
        if named:
            found = {row: os.path.join(root, image) for row, image in enumerate(store.images) if image}
            looked, missing = missing_pictures(found.values())
            if looked == len(missing):
                raise flame.InputError(f"{missing[0]}: no such picture, nor any other of {looked} that were looked for; "
                                       f"{captions} names it {store.images[min(found)]}; give --images DIR where that starts")
        else:
            found, _ = first_of_each_row(folder_pictures(root), store)
        rows = np.array(sorted(found), np.int64)
        files = [found[row] for row in sorted(found)]
        places = np.stack([np.arange(len(rows)), np.zeros_like(rows), np.full_like(rows, -1)], axis=1)
    if len(rows) < 2:
        raise flame.InputError(f"{root}: {len(rows)} of the {len(store)} keys in {store.path} have a picture there "
                               f"(first looked for: {store.keys[0]}.jpg, .jpeg, .png or .webp, in folders and tars); training needs two")
    return rows, files, places


def folder_by_key(store, captions):
    """Where pictures lie that the captions do not name."""
    folders = [captions.with_name(captions.name.split(".")[0]), captions.with_name("images")]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise flame.InputError(f"{store.path}: its captions name no pictures, and there is no folder {folders[0]} or {folders[1]}; "
                           "give --images DIR with files or tars named by key")


def missing_pictures(paths):
    """Looks for an evenly spaced sample of the paths -> (how many were looked for, those that are no regular files)."""
    paths = list(paths)
    sample = paths[::1 + len(paths) // LOOKED_AT]
    return len(sample), [path for path in sample if not os.path.isfile(path)]


def warn_of_missing_pictures(captions):
    """Says on stderr, before hours are spent on the captions, how many of the pictures that the first ones name are missing."""
    root = Path(captions).parent
    first = islice(read_captions(captions), LOOKED_AT)
    looked, missing = missing_pictures(root / row.image for row in first if row.image)
    if missing:
        print(f"{captions}: {len(missing)} of the first {looked} pictures that it names are not there (first: {missing[0]}); "
              "training leaves them out, unless train.py --images DIR says where they are", file=sys.stderr)


def folder_pictures(root):
    """Yields (key, suffix, path) of the pictures in a folder and its subfolders."""
    for folder, folders, names in os.walk(root):
        folders.sort()  # the walk goes on in this order
        for name in sorted(names):
            _, key, suffix = sample_name(name)
            if suffix.rpartition(".")[2] in KINDS:
                yield key, suffix, os.path.join(folder, name)


def tar_pictures(tars, skipped):
    """Yields (key, suffix, place) of the pictures in tars."""
    for number, path in enumerate(tqdm(tars, desc="indexing tars", unit=" tars")):
        for folder, key, suffix, offset, size in tar_files(path, skipped):
            if suffix.rpartition(".")[2] not in KINDS:
                continue
            if size > LARGEST:
                skip(skipped, f"picture of over {LARGEST / (1 << 30):.2g} GiB", f"{path}:{folder}{key}.{suffix}")
            else:
                yield key, suffix, (number, offset, size)


def first_of_each_row(pictures, store):
    """-> {row: place} of the store's rows, and how many pictures are none's. "a.jpg" goes before "a.mask.jpg", then the first counts."""
    row_of = {key: row for row, key in enumerate(store.keys)}
    plain, other = {}, {}
    seen = 0
    for key, suffix, place in pictures:
        seen += 1
        if key in row_of:
            found = other if "." in suffix else plain
            found.setdefault(row_of[key], place)
    found = other | plain
    return found, seen - len(found)


def index_tars(store, tars, index):
    """-> rows [n], places [n, 3]. Of a tar that is cut short or damaged, what comes before that."""
    keys = hashlib.sha256("\n".join(store.keys).encode()).hexdigest()
    stamp = json.dumps([keys, *((tar, os.stat(tar).st_size, os.stat(tar).st_mtime_ns) for tar in tars)])
    try:
        with np.load(index) as saved:
            if str(saved["stamp"]) == stamp:
                return saved["rows"], saved["places"]
    except Exception:  # missing, or damaged in one of many ways: made anew
        pass
    skipped = {}
    found, strangers = first_of_each_row(tar_pictures(tars, skipped), store)
    folder = os.path.dirname(tars[0])
    if DAMAGED in skipped:
        count, places = skipped.pop(DAMAGED)
        print(f"{folder}: {count} of {len(tars)} tars cut short or damaged, used as far as they go: "
              f"{'; '.join(places)}{'; ...' * (count > len(places))}", file=sys.stderr)
    report_skipped(folder, skipped)
    if strangers:
        print(f"{folder}: {strangers} pictures left out whose key is not in {store.path}, or came before", file=sys.stderr)
    rows = np.array(list(found), np.int64)
    places = np.array(list(found.values()), np.int64).reshape(-1, 3)
    order = np.lexsort((places[:, 1], places[:, 0]))
    if index is not None:
        write(index, functools.partial(np.savez, stamp=stamp, rows=rows[order], places=places[order]))
    return rows[order], places[order]


# ---------------------------------------------------------------------------------------------------------------------
# What a training step sees

def open_picture(files, place):
    """PIL image, its header read, not yet decoded. Raises OSError, or nearly anything else on a stranger's bytes."""
    file, offset, size = place.tolist()
    about = os.stat(files[file])
    if not stat.S_ISREG(about.st_mode):  # to open a pipe is to wait without end
        raise OSError(0, "not a regular file", files[file])
    size = about.st_size if size < 0 else size
    if size > LARGEST:
        raise OSError(0, "too large for a picture", files[file])
    with open(files[file], "rb", buffering=0) as f:
        f.seek(offset)
        return Image.open(io.BytesIO(f.read(size)))


def crop_box(width, height, smallest, draw):
    """The box of a random resized crop, distributed as torchvision's -> (left, top, width, height) in whole pixels.

    Its area is a share from `smallest` to 1 of the picture's, its ratio 3/4 to 4/3. A box that does not fit in is drawn
    again; where none of the tries fits, the box is the largest in the middle that has such a ratio.
    draw: numbers from [0, 1), two for the place and two for each try.
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

    A JPEG that is only opened is decoded at 1/2, 1/4 or 1/8 of its size where the box stays as large as the result.
    The resizing is torch's, as exact as Pillow's and three times as fast.
    """
    width, height = image.size
    left, top, w, h = crop_box(width, height, smallest, draw)
    reduced = image.draft(None, (math.ceil(width * size / w), math.ceil(height * size / h)))  # None: not a JPEG
    x = reduced[1][2] / width if reduced else 1.0
    pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))  # [h, w, 3]
    rows = slice(round(top * x), max(1, math.ceil((top + h) * x)))
    columns = slice(round(left * x), max(1, math.ceil((left + w) * x)))
    box = pixels[rows, columns].permute(2, 0, 1)
    return F.interpolate(box[None], (size, size), mode="bicubic", antialias=True)[0]


class Batches(torch.utils.data.Dataset):
    """Item t is this rank's slice of the batch of step t, a pure function of the seed and t.

    -> (pixels uint8 [b, 3, S, S], facets float16 [b, P, D], columns int64 [b, P] as the text projection counts them,
    readable bool [b], patches to keep int64 [b, n] or None), [(key, why it could not be read)].
    An unreadable picture's pixels are 0.
    """

    def __init__(self, store, columns, pictures, settings, steps, rank=0, world=1):
        self.store = store
        self.columns = np.array(columns)
        self.rows, self.files, self.places = pictures
        self.steps = steps
        self.named = np.array([flame.COLUMNS.index(store.meta["columns"][c]) for c in columns])
        self.size = settings["image_size"]
        self.batch = settings["batch"]
        self.positives = settings["positives"]
        self.crop_scale = settings["crop_scale"]
        self.seed = settings["seed"]
        self.shuffle = settings["shuffle"]
        self.patches = (self.size // settings["patch_size"]) ** 2
        self.kept = max(1, round(self.patches * (1 - settings["patch_dropout"])))
        self.mine = slice(rank * self.batch // world, (rank + 1) * self.batch // world)
        self.cache = {}
        self.room = settings["cache"] * 2 ** 30

    def __len__(self):
        return self.steps

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        """Files in random order (pictures, or tars), then a shuffle buffer: each picture is put off by up to so many places."""
        rng = np.random.default_rng([self.seed, 1, epoch])
        turn = rng.permutation(len(self.files))
        line = np.argsort(turn[self.places[:, 0]], kind="stable")
        put_off = np.arange(len(line)) + self.shuffle * rng.random(len(line))
        return line[np.argsort(put_off, kind="stable")]

    def pictures(self, step):
        """The whole batch of a step: indices into rows."""
        epoch, at = divmod(step, len(self.rows) // self.batch)  # the few images over are left out, others each epoch
        return self.order(epoch)[at * self.batch:(at + 1) * self.batch]

    def __getitem__(self, step):
        rng = np.random.default_rng([self.seed, 2, step])  # drawn for the whole batch, whatever the slice
        draws = rng.random((self.batch, DRAWS))[self.mine]
        picks = rng.random((self.batch, len(self.columns))).argsort(1)[self.mine, :self.positives]
        kept = None
        if self.kept < self.patches:
            kept = torch.from_numpy(rng.random((self.batch, self.patches)).argsort(1)[self.mine, :self.kept])
        chosen = self.pictures(step)[self.mine]
        pixels = torch.zeros(len(chosen), 3, self.size, self.size, dtype=torch.uint8)
        readable = torch.ones(len(chosen), dtype=torch.bool)
        bad = []
        for i, n in enumerate(chosen.tolist()):
            try:
                pixels[i] = random_crop(self.image(n), self.size, self.crop_scale, draws[i])
            except Exception as error:  # decoders raise nearly anything on a stranger's bytes
                readable[i] = False
                bad.append((self.store.keys[self.rows[n]], reason(error)))
        facets = self.store.read(self.rows[chosen], self.columns[picks]).half()
        return (pixels, facets, torch.from_numpy(self.named[picks]), readable, kept), bad

    def image(self, n):
        """PIL image; where there is a cache, decoded, else only opened."""
        image = self.cache.get(n)
        if image is None:
            image = open_picture(self.files, self.places[n])
            if self.room > 0:
                image = self.cache[n] = image.convert("RGB")
                self.room -= 4 * image.width * image.height  # bytes, as Pillow keeps it
        return image


def reason(error):
    """Why a picture could not be read: the error's name, and the path where that is what is wrong."""
    name = type(error).__name__
    path = getattr(error, "filename", None)
    return f"{name}: {path}" if path else name
