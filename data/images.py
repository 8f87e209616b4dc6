"""Finds the images of a table's rows (data/README.md), and makes the batches of a training run."""
import functools
import hashlib
import io
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image

from data.captions import read_table
from data.common import atomic_save, report_skipped
from data.sources import files_below, source_files
from data.tars import IMAGE_SUFFIXES, in_processes, is_image, split_member_name, tar_members, tar_names
from flame import FACET_COLUMNS, InputError, describe_error, reading, to_rgb

MAX_IMAGE_BYTES = 1 << 30  # a larger file is truncated, and then no decoder accepts it
CACHE_BYTES = 1 << 28      # decoded images that a loader process keeps; the demo's need 70 MB
SAMPLE = 1000              # rows whose paths or captions are checked
SHUFFLE_BUFFER = 50_000    # images: mixes several tars, while each is still read nearly in order
CROP_DRAWS = 22            # random numbers per crop: two for its position, two for each of ten attempts
EpsImagePlugin.gs_binary = False  # never run Ghostscript on a PostScript file, whatever its suffix


# ------------------------------------------------------------------------------------------------------------
# Finding images

class ImageLocation(NamedTuple):
    """Where the bytes of an image are: a file, or a part of a tar."""
    path: str
    offset: int = 0
    size: int = MAX_IMAGE_BYTES  # at most


def open_image(location):
    """Return a PIL image with its header read, not yet decoded. May raise any exception on corrupt bytes."""
    if not os.path.isfile(location.path):  # opening a pipe would block
        raise OSError(0, "not a regular file", location.path)
    return Image.open(io.BytesIO(read_bytes(location)))


def read_bytes(location):
    with open(location.path, "rb", buffering=0) as file:
        file.seek(location.offset)
        return file.read(min(location.size, MAX_IMAGE_BYTES))


def images_in(folder):
    """Return an ImageLocation for each file with an image suffix in a folder and its subfolders."""
    return [ImageLocation(path) for path in files_below(folder, IMAGE_SUFFIXES)]


def find_images(keys, images, captions, folder=None, index="", table=None):
    """Find the images of a table's rows.

    The paths in `images`, relative to `folder` or, without it, to the captions or a folder beside them, are
    used if a sample shows that some exist. Otherwise one place is searched: `folder`, or else the captions if
    they are tars or a folder, or else the folder with the name of the captions file. Its tars, which are
    never unpacked, or without tars its image files, are matched by path, or if that finds nothing by key.
    Images are returned in the order of the table.

    Args:
        keys, images: of the table made from the source `captions`.
        index: .npz file that caches the result of a search.
        table: captions.tsv, if its raw captions should equal those in the tars or beside the images. If the
            search is by key, a sample is compared.

    Returns:
        rows int64 [n], files list[str], spans int64 [n, 3] (index into files, offset, size at most). A path
        that does not exist counts as an unreadable image in training.

    Raises InputError if no row has an image, if many images have the same key, or if the check fails.
    """
    captions = Path(captions)
    root = Path(folder or (captions if captions.is_dir() else captions.parent))
    number = {image: n for n, image in enumerate(dict.fromkeys(filter(None, images)))}
    paths = folder_of_paths([*number][::1 + len(number) // SAMPLE], root, search=not folder)
    files = [os.path.join(paths or root, image) for image in number]
    if paths:
        if folder and os.path.isabs([*number][0]):
            print(f"the images have whole paths ({files[0]} ...), so --images {folder} is not used")
        rows = [row for row, image in enumerate(images) if image]
        return np.array(rows), files, np.array([(number[images[row]], 0, MAX_IMAGE_BYTES) for row in rows])
    example = (files or keys)[0]
    root, tars = place_to_search(captions, folder, root)
    files = list(map(str, tars)) or files_below(root, IMAGE_SUFFIXES)
    stats = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, tars)]
    absolute = list(map(os.path.abspath, files))
    searched = json.dumps([keys, images, absolute, stats]).encode()

    def stamp(rows, spans):
        return hashlib.sha256(searched + rows.tobytes() + spans.tobytes()).hexdigest()

    if os.path.exists(index):
        with reading(index, "delete it"), np.load(index) as saved:
            if str(saved["stamp"]) == stamp(saved["rows"], saved["spans"]):
                return saved["rows"], files, saved["spans"]
    paths = ["".join(split_member_name(image)) for image in images]
    spans, _ = search(paths, files, bool(tars)) if any(paths) else ((), None)
    # Search by key only if no row's path says otherwise: each is empty, or the key with a suffix.
    paths_agree = all(split_member_name(image)[:2] in (("", ""), ("", split_member_name(key)[1]))
                      for key, image in zip(keys, images))
    if not len(spans) and paths_agree:
        spans, texts = search(keys, files, bool(tars))
        if table:
            check_captions(captions, table, texts)
    if not len(spans):
        names = "" if any(images) else (" Without paths, images are found by keys. Row numbers match "
                                        "img2dataset's names only with 10,000 samples per shard.")
        beside = "" if folder else f", beside {captions.name} and in the folders there"
        raise InputError(f"{captions}: no images found. Looked for {example} in {root}{beside}. {root} has: "
                         f"{', '.join(files[:3]) or 'no images'}.{names} Name the folder of the images or "
                         "tars, --images DIR, or embed without them, --no-images")
    rows, spans = spans[:, 0].copy(), spans[:, 1:]
    if index:
        with suppress(InputError):  # the store may be read-only
            atomic_save(index, functools.partial(np.savez, rows=rows, spans=spans, stamp=stamp(rows, spans)))
    return rows, files, spans


def folder_of_paths(images, root, search):
    """Return the folder that some image paths are relative to, or None: root or, with search=True, one of its
    subfolders, such as Images or train2017. Raises InputError if several have the images.
    """
    def has(folder, paths):
        return any(os.path.isfile(os.path.join(folder, path)) for path in paths)

    if has(root, images) or not (search and images):
        return root if has(root, images) else None
    found = [folder for folder in sorted(root.glob("[!.]*/")) if has(folder, images[:10])]
    if len(found) > 1:
        raise InputError(f"{images[0]} is in several folders ({', '.join(map(str, found[:3]))}); "
                         "give --images DIR")
    return found[0] if found else None


def place_to_search(captions, folder, root):
    """Return (folder, tars): where find_images looks for images. root: the folder of the images' paths."""
    pattern = not captions.is_file() and not {*"*?[{"}.isdisjoint(captions.name)
    if not folder and (pattern or captions.is_dir() or captions.suffix.lower() == ".tar"):
        files = source_files(captions)
        if files[0].suffix.lower() == ".tar":
            return root, files
    elif not folder:
        root = root / captions.name.split(".")[0]
    return root, sorted(root.glob("*.tar")) or sorted(root.glob("*/*.tar"))


def search(names, files, tars):
    """Find images by name: the path in a tar or on disk, or the key, which the tar's name may precede.

    files: tars, or images if `tars` is False.
    Returns spans int64 [n, 4] (row, index into files, offset, size) and {name: location of the .txt beside
    the image} for a sample of names. A corrupt tar is used up to the corruption. A name that several images
    have is not used. Raises InputError if there are more than 1% such names among those found.
    """
    sampled = {name: row % (1 + len(names) // SAMPLE) == 0 for row, name in enumerate(names) if name}
    places = tar_names(files) if tars else [""] * len(files)
    stems = [None if tars else Path(file).stem for file in files]  # a file's name may have dots: v1.0.jpg
    skipped = {}

    def members_of(n, skipped):
        if not tars:
            return [(*split_member_name(files[n]), 0, MAX_IMAGE_BYTES)]
        members = tar_members(files[n], skipped)
        return [member for member in members if member[2] == ".txt" or is_image(member[2])]

    members = in_processes(members_of, len(files), skipped, "finding images") if tars else (
        members_of(n, skipped) for n in range(len(files)))
    found, repeated, texts = {}, {}, {}
    for n, each in enumerate(members):
        for folder, key, suffix, offset, size in each:
            candidates = [folder + key + suffix, stems[n]]
            if suffix == ".txt" or is_image(suffix):
                candidates += [places[n] + folder + key, key]
            name = next(filter(sampled.__contains__, candidates), None)
            if name is None:
                continue
            if suffix == ".txt":
                if sampled[name]:
                    texts[name] = ImageLocation(files[n], offset, size)
            elif name in found:
                repeated[name] = files[n]
            else:
                found[name] = n, offset, size
    for reason in skipped:
        report_skipped("images", reason, len(skipped[reason]), skipped[reason])
    for name in [] if tars else list(found)[::1 + len(found) // SAMPLE]:
        text = os.path.splitext(files[found[name][0]])[0] + ".txt"
        if os.path.isfile(text):
            texts[name] = ImageLocation(text)
    if len(repeated) > len(found) / 100:
        name, file = next(iter(repeated.items()))
        raise InputError(f"{file}: {len(repeated)} keys belong to several images (the first: {name}); embed "
                         "the tars themselves, or give one folder with --images")
    # Several rows may have the same image.
    spans = [(row, *found[name]) for row, name in enumerate(names) if name in found and name not in repeated]
    return np.array(spans, np.int64).reshape(-1, 4), texts


def check_captions(captions, table, texts):
    """Raise InputError if the captions beside the images are not those of the rows with the same keys.

    img2dataset numbers the rows that it reads. If it parses quotes in a TSV, it may read other rows than we
    do. Tars may have changed since they were embedded. texts: from search().
    """
    differ = []
    for entry in read_table(table):
        if entry.key in texts:
            text = read_bytes(texts[entry.key]).decode("utf-8-sig", errors="replace")
            raw = entry.raw.split()
            if raw != text.split() and raw not in map(str.split, text.split("\n")):  # each line is a caption
                differ.append(entry.key)
    if len(differ) > max(1, len(texts) / 100):
        raise InputError(f"{captions}: {len(differ)} of {len(texts)} captions are not those beside the "
                         f"images with the same keys (the first: {differ[0]}). Embed the tars or the folder "
                         "of the images; they have the captions, too. If they have changed, embed them again")


def report_images(total, images):
    """Print how many of a table's rows have an image, estimated from SAMPLE of those found. Raises InputError
    if none of up to ten can be opened.

    images: what find_images returns.
    """
    rows, files, spans = images
    locations = locations_of(files, spans[::1 + len(spans) // SAMPLE])
    existing = [location for location in locations if os.path.isfile(location.path)]
    print(f"images: {len(rows) * len(existing) // len(locations)} of {total} found ({locations[0].path})")
    for location in existing[::1 + len(existing) // 10]:
        with suppress(Exception):  # decoders can raise any exception on corrupt bytes
            open_image(location)
            return
    raise InputError(f"{locations[0].path}: no such file, or not an image, and no other one "
                     "could be opened; give --images DIR or --no-images")


class Images(NamedTuple):
    """The images of a table, in the order of their first rows. The rows of an image are its captions."""
    rows: np.ndarray    # int64 [n], sorted by image
    starts: np.ndarray  # int64 [m + 1]: rows[starts[i]:starts[i + 1]] are those of image i
    files: list         # of str, images or tars
    spans: np.ndarray   # int64 [m, 3]: index into files, offset, size at most


def group_by_image(rows, files, spans):
    """Return the Images of what find_images returns: rows with the same file and offset are one image."""
    order = np.lexsort((spans[:, 1], spans[:, 0]))  # stable, so the first row of an image comes first
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (np.diff(spans[order, :2], axis=0) != 0).any(1)
    first = order[is_first]
    image_of = np.empty_like(order)
    image_of[order] = first.argsort().argsort()[is_first.cumsum() - 1]
    starts = np.concatenate([[0], np.bincount(image_of).cumsum()])
    return Images(rows[image_of.argsort(kind="stable")], starts, files, spans[np.sort(first)])


def locations_of(files, spans):
    """Return the ImageLocations of spans int64 [n, 3]."""
    return [ImageLocation(files[file], offset, size) for file, offset, size in spans.tolist()]


# ------------------------------------------------------------------------------------------------------------
# What a training step sees

def crop_box(width, height, min_scale, draws):
    """Return a random resized crop (left, top, width, height) in whole pixels, distributed as torchvision's.

    Its area is a fraction from min_scale to 1 of the image, its aspect ratio 3/4 to 4/3. If none of ten
    attempts fits into the image, return the largest such box at the center. draws: CROP_DRAWS numbers in
    [0, 1).
    """
    for area_draw, ratio_draw in draws[2:].reshape(-1, 2).tolist():
        area = width * height * (min_scale + (1 - min_scale) * area_draw)
        ratio = (4 / 3) ** (2 * ratio_draw - 1)  # log-uniform
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1)), w, h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def random_crop(image, size, min_scale, draws):
    """Return a random resized crop (see crop_box), bicubic, as uint8 [3, size, size] RGB.

    An undecoded JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop stays at least as large as the
    result. torch resizes as exactly as Pillow and three times as fast.
    """
    width, height = image.size
    left, top, w, h = crop_box(width, height, min_scale, draws)
    min_size = (math.ceil(width * size / w), math.ceil(height * size / h))
    reduced = image.draft(None, min_size)  # None if it is not a JPEG
    x = reduced[1][2] / width if reduced else 1.0
    box = round(left * x), round(top * x), math.ceil((left + w) * x), math.ceil((top + h) * x)
    pixels = torch.from_numpy(np.array(to_rgb(image.crop(box)))).permute(2, 0, 1)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


class Batches:
    """Item t is this rank's part of the batch of step t, a pure function of the seed and t.

    An epoch has each image once, so a batch has no image twice. Each positive is drawn from all captions of
    its image, and negatives are the texts of the batch's other images. So no caption of an image is ever a
    negative for it.

    An item is a pair: the batch, and a list of (key, reason) of images that could not be read. A batch has
        pixels    uint8 [b, 3, S, S], 0 for unreadable images
        facets    float16 [b, P, D], the positives
        columns   int64 [b, P], their facet columns
        readable  bool [b]
        kept      int64 [b, n], the patches to encode, or None for all
    """

    def __init__(self, store, columns, images, settings, rank=0, world_size=1):
        self.store = store
        self.columns = np.array(columns)
        self.images = images
        self.settings = settings
        self.batch = settings["batch"]
        self.own = slice(rank * self.batch // world_size, (rank + 1) * self.batch // world_size)
        self.decoded = {}

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        """Return the order of images in an epoch: files (images or tars) in random order, then a shuffle
        buffer.
        """
        rng = np.random.default_rng([self.settings["seed"], 1, epoch])
        file_order = rng.permutation(len(self.images.files))
        order = np.argsort(file_order[self.images.spans[:, 0]], kind="stable")
        delayed = np.arange(len(order)) + SHUFFLE_BUFFER * rng.random(len(order))
        return order[np.argsort(delayed, kind="stable")]

    def indices(self, step):
        """Return the images of a step's whole batch, int64 [batch]."""
        epoch, n = divmod(step, len(self.images.spans) // self.batch)  # drops the last incomplete batch
        return self.order(epoch)[n * self.batch:(n + 1) * self.batch]

    def captions(self, step, n):
        """Return random captions of each image of a step's whole batch, as rows of the store [batch, n]."""
        draws = np.random.default_rng([self.settings["seed"], 3, step]).random((self.batch, n))
        first, end = (self.images.starts[self.indices(step) + i][:, None] for i in (0, 1))
        return self.images.rows[first + (draws * (end - first)).astype(int)]

    def __getitem__(self, step):
        s = self.settings
        size = s["image_size"]
        rng = np.random.default_rng([s["seed"], 2, step])  # draws for the whole batch, of which we use a part
        draws = rng.random((self.batch, CROP_DRAWS))[self.own]
        # In evaluation, class names use the column raw.0. If columns were drawn at random, it would be
        # trained on only about half of the images.
        raw = []
        if s["raw_always"] and s["positives"] > 1:  # with one positive, no other column would be trained
            raw = np.flatnonzero(self.columns == FACET_COLUMNS.index("raw.0"))
        columns = self.columns[self.sample(rng, len(self.columns), s["positives"], raw)]
        patches = (size // s["patch_size"]) ** 2
        kept = torch.from_numpy(self.sample(rng, patches, patches_kept(s))) if s["patch_dropout"] else None
        batch = self.indices(step)[self.own]
        pixels = torch.zeros(len(batch), 3, size, size, dtype=torch.uint8)
        readable = torch.zeros(len(batch), dtype=torch.bool)
        failed = []
        rows = self.captions(step, s["positives"])[self.own]
        for i, location in enumerate(locations_of(self.images.files, self.images.spans[batch])):
            try:
                pixels[i] = random_crop(self.open(location), size, s["crop_scale"], draws[i])
                readable[i] = True
            except Exception as error:  # decoders can raise any exception on corrupt bytes
                key = self.store.keys[rows[i, 0]]
                failed.append((key, f"{type(error).__name__} {describe_error(error)}: {location.path}"))
        facets = self.store.read_float16(rows, columns)
        return (pixels, facets, torch.from_numpy(columns), readable, kept), failed

    def open(self, location):
        """Return a PIL image. Keep a decoded one if it is small. Its pixels are the same, because random_crop
        never reduces an image of less than twice the result's size.
        """
        image = self.decoded.get(location) or open_image(location)
        size = 2 * self.settings["image_size"]
        if max(image.size) < size and len(self.decoded) < CACHE_BYTES // (3 * size ** 2):
            image.load()
            self.decoded[location] = image
        return image

    def sample(self, rng, n, k, always=()):
        """Return k of n indices for each image of this rank, without replacement, including `always`."""
        draws = rng.random((self.batch, n))
        draws[:, always] = -1
        return draws.argsort(1)[self.own, :k]


def patches_kept(settings):
    """Return how many patches of an image a step encodes."""
    patches = (settings["image_size"] // settings["patch_size"]) ** 2
    return max(1, round(patches * (1 - settings["patch_dropout"])))
