"""What encodes pictures and texts for evaluate.py, and what they said before.

A checkpoint's image tower with the LLM that it was trained with, or an open_clip model in the place of both.
Under <out>/cache lies a file for each list of pictures and tower, and for each 4,096 texts and LLM, named by
a hash: the next checkpoint runs the LLM no more. A pass that is interrupted loses the file it was at.
"""
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import flame
from data import files, peer, released
from data.checkpoint import newest_checkpoint
from data.pictures import open_picture
from flame import InputError

BATCH = 64      # pictures encoded at once: enough to keep a GPU busy, little to hold
PART = 4096     # texts whose states are kept in one file: of Nemo's long set 0.3 GB


class Towers(NamedTuple):
    """What encodes pictures and texts, and where what they said is kept."""
    model: flame.Flame
    encoder: Callable       # () -> flame.TextEncoder, made when it is first called for
    pool: str               # of facets, see pooled(); the authors' checkpoint says "released"
    device: str
    cache: Path | None      # a folder; None: keep nothing, show no progress
    image_tower: str        # digests of both, for the cache
    text_tower: str


def digest_of(about, tensors={}):
    """Names what is kept by content: settings, weights {name: tensor}, the code that makes it."""
    paths = [flame.__file__, released.__file__, __file__]
    paths += [flame.flame_ext.__file__] if flame.flame_ext else []
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths))
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def cached(towers, about, shape, dtype, make):
    """What make() gave for the same `about` before, an array; made where it is not there, or damaged.

    Without a cache it is made and not kept.
    """
    if not towers.cache:
        return make()
    path = towers.cache / f"{digest_of(about)}.npy"
    with suppress(Exception):   # numpy raises nearly anything on a damaged file
        array = np.load(path, mmap_mode="r")
        if (array.shape, array.dtype) == (shape, dtype):
            return array
    array = make()
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda temporary: np.save(temporary, array))
    return array


def stamp(place):
    """What a picture's vector is kept under: one that was mended or exchanged is another."""
    about = os.stat(place.path) if os.path.isfile(place.path) else None
    return [os.path.abspath(place.path), *place[1:], about and [about.st_size, about.st_mtime_ns]]


@torch.inference_mode()
def encode_images(towers, places, least=2):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `places` that could be read).

    Where bfloat16 is fast, the tower runs in it. Raises InputError where fewer than `least` can be read.
    """
    model = towers.model
    device = torch.device(towers.device)
    fast = flame.default_dtype(device) == torch.bfloat16
    shape = len(places), model.config["text_dim"]

    def pixels_of(place):
        with suppress(Exception), open_picture(place) as image:     # decoders raise nearly anything
            return model.preprocess(image)

    def make():
        vectors = np.zeros(shape, np.float32)   # zero, no unit vector, where a picture cannot be read
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            coming = pool.map(pixels_of, places[:BATCH])    # begins at once: a batch ahead of the tower
            starts = range(0, len(places), BATCH)
            for start in tqdm(starts, "images", unit=" batches", mininterval=1, disable=not towers.cache):
                loaded = dict(enumerate(coming, start))
                coming = pool.map(pixels_of, places[start + BATCH:start + 2 * BATCH])
                good = {i: pixels for i, pixels in loaded.items() if pixels is not None}
                if good:
                    pixels = torch.stack(list(good.values())).to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                        vectors[list(good)] = model.encode_image(pixels).float().cpu().numpy()
        return vectors

    about = [towers.image_tower, [stamp(place) for place in places]]
    vectors = cached(towers, about, shape, np.float32, make)
    bad = np.flatnonzero(~vectors.any(1))
    said = f"{len(bad)} of {len(places)} pictures cannot be read"
    said += f", the first is {places[bad[0]].path}" if len(bad) else ""
    if len(places) - len(bad) < least:
        raise InputError(f"{said}; at least {least} are needed; data/README.md says where they must lie")
    if len(bad):
        print(f"{said}; they are left out", file=sys.stderr)
    kept = np.delete(np.arange(len(places)), bad)
    return vectors[kept], kept.tolist()


def trained_facets(model, prompts):
    """Which facets of a prompt set the checkpoint was trained on, counted from 0. Raises InputError if none.
    """
    columns = model.config["columns"]
    trained = [k for k in range(len(flame.PROMPTS[prompts].facets)) if f"{prompts}.{k}" in columns]
    if not trained:
        raise InputError(f"the checkpoint was trained on {' '.join(columns)} alone, not on the {prompts} "
                         f"prompts; ask by others: --prompts {columns[0].split('.')[0]}")
    return trained


def pooled(facets, pool="cosine"):
    """[N, K, D] -> [N, D], the text vector that an image's is multiplied with.

    "cosine": the mean of unit facet vectors. "released": as the released code, the mean of facet states as
    they are, normalised.
    """
    mean = facets.mean(1)
    return mean if pool == "cosine" else mean / np.linalg.norm(mean, axis=-1, keepdims=True)


@torch.inference_mode()
def encode_texts(towers, texts, prompts, by_facet=False):
    """-> float32 [N, D], pooled over the facets that were trained; by_facet=True: [N, K, D], not pooled.

    Equal texts are encoded once. The cache has the LLM's states, which outlive the checkpoint, as float16
    unit vectors like a store; where they are pooled as they are, a text's longest has length 1.
    """
    trained = trained_facets(towers.model, prompts)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = list(row_of)
    shape = len(flame.PROMPTS[prompts].facets), towers.model.config["text_dim"]

    def make(some):
        states = np.empty((len(some), *shape), np.float16)
        with tqdm(total=len(some), desc=f"texts ({prompts})", unit=" texts", mininterval=1,
                  disable=not towers.cache) as bar:
            for rows, batch in towers.encoder().encode_batches(some, prompts):
                norms = batch.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                norms = norms if towers.pool == "cosine" else norms.amax(1, keepdim=True)
                states[rows] = (batch / norms).half().numpy()
                bar.update(len(rows))
        return states

    vectors = []
    for start in range(0, len(unique), PART):
        some = unique[start:start + PART]
        about = [towers.text_tower, flame.PROMPTS[prompts], towers.pool, some]
        states = cached(towers, about, (len(some), *shape), np.float16, functools.partial(make, some))
        for block in np.array_split(states, 1 + len(states) // 256):    # float32 of all would be gigabytes
            facets = torch.from_numpy(block.astype(np.float32))
            if towers.pool == "cosine":
                facets = towers.model.encode_text(facets.to(towers.device), prompts)
            asked = facets.float().cpu().numpy()[:, trained]
            vectors.append(asked if by_facet else pooled(asked, towers.pool))
    return np.concatenate(vectors)[[row_of[text] for text in texts]]


def open_towers(args):
    """-> (Towers, the checkpoint's name, its LLM's folder). Raises InputError where checkpoint, LLM and
    settings do not belong together."""
    dtype = flame.default_dtype(args.device)
    cache = args.out / "cache"
    if args.open_clip:      # which needs no LLM
        model = peer.OpenClip(args.open_clip).eval().to(args.device)
        name = digest_of([args.open_clip, dtype], model.state_dict())
        return Towers(model, lambda: model, "cosine", args.device, cache, name, name), args.open_clip, None

    checkpoint = args.checkpoint or newest_checkpoint()
    load = released.load if checkpoint.is_file() else flame.load    # the authors' is one file
    model = load(checkpoint).to(args.device)
    source = model.config["llm"]
    trained_with = source.get("path") or ""
    default = trained_with if os.path.isdir(trained_with) else "data/demo/llm"
    llm = flame.llm_folder(args.llm or os.environ.get("FLAME_LLM") or default)
    fingerprint = flame.llm_fingerprint(llm)
    if source.get("fingerprint") not in (None, fingerprint):    # the authors' says nothing
        raise InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source['name']}) than "
                         f"{llm}; name that one with --llm")

    @functools.cache
    def encoder():      # the one place where the text tower is made, and only if a text is not cached
        tower = released.text_encoder(llm, args.device, dtype, source["layer"], source["positions"])
        if tower.dim != model.config["text_dim"]:
            raise InputError(f"{llm}: its states have {tower.dim} dimensions, {checkpoint} was trained for "
                             f"{model.config['text_dim']}; name the right LLM with --llm")
        return tower

    about = {name: value for name, value in model.config.items() if name != "llm"}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("text.")}
    towers = Towers(model, encoder, model.config.get("pool", "cosine"), args.device, cache,
                    image_tower=digest_of([about, dtype], tensors),
                    text_tower=digest_of([fingerprint, source["layer"], source["positions"], dtype]))
    return towers, checkpoint, llm
