"""Encodes images and texts for evaluation, with a cache.

The model is a checkpoint with the LLM that it was trained with, or an open_clip model. <out>/cache has one
file per model and list of images, and one per LLM and chunk of 2,048 texts, named by a hash. So evaluating
the next checkpoint does not run the LLM again. An interruption loses only the file that was being computed.
"""
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import flame
from data import common, compat
from data.common import progress_bar
from data.images import open_image
from flame import InputError, PROMPTS

IMAGE_BATCH = 64       # images encoded at once: enough for a GPU, little memory
TEXTS_PER_FILE = 2048  # texts per cache file: 0.15 GB for Nemo's long set


class Encoders(NamedTuple):
    """What encodes images and texts, and the cache of their embeddings."""
    model: flame.Flame      # or compat.OpenClip
    text_encoder: Callable  # () -> flame.TextEncoder, loaded at the first call
    device: str
    cache: Path | None      # a folder; None: no cache and no progress bars
    image_key: object       # what image embeddings depend on, for the cache
    text_key: object        # the same for texts


# ------------------------------------------------------------------------------------------------------------
# The cache

def cached(encoders, key, shape, compute):
    """Return the array that compute() returned for the same key; compute it if it is missing or corrupt.

    The file name is a hash of the key and of the code. The shape is [M, D] for images and [N, K, D] for
    texts, which are never zero.
    """
    if not encoders.cache:
        return compute()
    digest = hashlib.sha256(json.dumps(key, default=str).encode())
    for code in (__file__, flame.__file__, compat.__file__, (flame.flame_ext or flame).__file__):
        digest.update(Path(code).read_bytes())
    path = encoders.cache / f"{digest.hexdigest()[:32]}.npy"
    with suppress(Exception):  # numpy can raise any exception on a corrupt file
        array = np.load(path, mmap_mode="r")
        if array.shape == shape and np.isfinite(array).all() and (len(shape) == 2 or array.any(-1).all()):
            return array
    array = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_array(path, array)
    return array


def hash_weights(model):
    """Return the SHA-256 of each tensor."""
    return [hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
            for tensor in model.state_dict().values()]


def image_stamp(location):
    """Return what identifies an image in the cache; it changes if the file is replaced."""
    with suppress(OSError):
        status = os.stat(location.path)
        return [*location, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


# ------------------------------------------------------------------------------------------------------------
# Encoding

@torch.inference_mode()
def encode_images(encoders, locations):
    """Return (unit embeddings float32 [M', D], indices of the M' images that could be read).

    Uses bfloat16 if it is fast. Raises InputError if no image can be read.
    """
    key = [encoders.image_key, [image_stamp(location) for location in locations]]
    shape = len(locations), encoders.model.config["text_dim"]
    embeddings = cached(encoders, key, shape, lambda: compute_images(encoders, locations))
    bad = ~embeddings.any(1)
    if bad.any():  # try once more, in case the disk failed temporarily
        embeddings = np.array(embeddings)
        embeddings[bad] = compute_images(encoders, [*compress(locations, bad)])
    readable = embeddings.any(1)
    unreadable = [location.path for location in compress(locations, ~readable)]
    report = f"{len(unreadable)} of {len(locations)} images cannot be read ({', '.join(unreadable[:3])} ...)"
    if not readable.any():
        raise InputError(f"{report}; see data/README.md for the layout")
    if unreadable:
        print(f"{report}; skipped", file=sys.stderr)
    return embeddings[readable], np.flatnonzero(readable).tolist()


def compute_images(encoders, locations):
    """Return embeddings float32 [M, D], zero for images that cannot be read."""
    device = torch.device(encoders.device)
    fast = common.default_dtype(device) == torch.bfloat16
    embeddings = np.zeros((len(locations), encoders.model.config["text_dim"]), np.float32)

    def load_pixels(location):
        with suppress(Exception), open_image(location) as image:  # decoders can raise any exception
            return encoders.model.preprocess(image)

    with ThreadPoolExecutor(8) as pool:
        upcoming = pool.map(load_pixels, locations[:IMAGE_BATCH])  # starts now, a batch ahead of the model
        starts = range(0, len(locations), IMAGE_BATCH)
        for start in progress_bar(starts, "encoding images", unit=" batches", disable=not encoders.cache):
            good = {i: pixels for i, pixels in enumerate(upcoming, start) if pixels is not None}
            upcoming = pool.map(load_pixels, locations[start + IMAGE_BATCH:start + 2 * IMAGE_BATCH])
            if good:
                pixels = torch.stack(list(good.values())).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                    embeddings[list(good)] = encoders.model.encode_image(pixels).float().cpu().numpy()
    return embeddings


def trained_facets(model, prompts):
    """Return which facets (from 0) of a prompt set the model was trained on. Raises InputError if none."""
    columns = model.config["columns"]
    trained = [k for k in range(len(PROMPTS[prompts].facets)) if f"{prompts}.{k}" in columns]
    if not trained:
        raise InputError(f"the checkpoint was trained on {' '.join(columns)} only, not on the {prompts} "
                         f"prompts; give --prompts {columns[0].split('.')[0]}")
    return trained


def encode_texts(encoders, texts, prompts):
    """Return float32 [N, D], the mean over the trained facets of one or more prompt sets ("raw short")."""
    return np.concatenate([encode_facets(encoders, texts, name) for name in prompts.split()], axis=1).mean(1)


@torch.inference_mode()
def encode_facets(encoders, texts, prompts):
    """Return the trained facets float32 [N, K, D]. Equal texts are encoded once.

    The cache has the LLM's hidden states, before the checkpoint's text projection.
    """
    trained = trained_facets(encoders.model, prompts)
    unique = list(dict.fromkeys(texts))
    embeddings = {}
    for start in range(0, len(unique), TEXTS_PER_FILE):
        part = unique[start:start + TEXTS_PER_FILE]
        key = [encoders.text_key, PROMPTS[prompts], part]
        shape = len(part), len(PROMPTS[prompts].facets), encoders.model.config["text_dim"]
        states = cached(encoders, key, shape, lambda: compute_texts(encoders, part, prompts))
        facets = encoders.model.encode_text(torch.from_numpy(states.astype(np.float32)), prompts)
        embeddings |= zip(part, facets.float().cpu().numpy()[:, trained])
    return np.array([embeddings[text] for text in texts])


def compute_texts(encoders, texts, prompts):
    """Return hidden states float16 [N, K, D], divided by the largest norm among a text's facets."""
    K, D = len(PROMPTS[prompts].facets), encoders.model.config["text_dim"]
    states = np.empty((len(texts), K, D), np.float16)
    with progress_bar(total=len(texts), desc=f"encoding texts ({prompts} prompts)", unit=" texts",
                      disable=not encoders.cache) as bar:
        for rows, batch in encoders.text_encoder().encode_batches(texts, prompts):
            states[rows] = (batch / batch.norm(dim=-1).amax(1)[:, None, None]).half().numpy()
            bar.update(len(rows))
    return states


# ------------------------------------------------------------------------------------------------------------
# Opening a model

def open_encoders(args):
    """Return (Encoders, name of the checkpoint). Raises InputError if it was trained with another LLM."""
    dtype = common.default_dtype(args.device)
    cache = args.out / "cache"
    if args.open_clip:  # needs no LLM
        model = compat.OpenClip(args.open_clip).eval().to(args.device)
        key = [args.open_clip, dtype, hash_weights(model)]
        return Encoders(model, lambda: model, args.device, cache, key, key), args.open_clip

    checkpoint = args.checkpoint or newest_checkpoint()
    load = compat.load_released if checkpoint.is_file() else flame.load
    model = load(checkpoint).to(args.device)
    recorded = model.config["llm"]
    path = local_paths(checkpoint).get("llm", "")
    default = path if os.path.isdir(path) else Path(__file__).parent / "demo/llm"
    llm = flame.resolve_folder(args.llm or os.environ.get("FLAME_LLM") or default)
    fingerprint = flame.llm_fingerprint(llm)
    mismatch = recorded.get("fingerprint") not in (None, fingerprint)  # released checkpoints have none
    if mismatch or flame.llm_config(llm)["hidden_size"] != model.config["text_dim"]:
        raise InputError(f"{checkpoint}: trained with another LLM ({recorded.get('name')}) than {llm}; give "
                         "that one with --llm")

    settings = recorded.get("layer"), recorded.get("mask") or "decoupled"
    # loaded only if a text is not in the cache
    text_encoder = functools.cache(lambda: compat.text_encoder(llm, args.device, dtype, *settings))
    image_key = [model.config, dtype, hash_weights(model)]
    text_key = [fingerprint, settings, dtype]
    print(f"checkpoint {checkpoint}   LLM {llm}   device {args.device}", flush=True)
    return Encoders(model, text_encoder, args.device, cache, image_key, text_key), checkpoint


def local_paths(checkpoint):
    """Return the paths that train.py recorded, {"llm", "store"}, or {} for a downloaded checkpoint."""
    with suppress(InputError):
        return flame.read_json(Path(checkpoint, "local.json"))
    return {}


def newest_checkpoint():
    """Return the finished checkpoint under out/ that was written last. Raises InputError if there is none."""
    def is_finished(folder):
        record = flame.read_json(folder / "config.json")
        return record["step"] == record["training"]["steps"]  # false if it is still training

    return common.newest_folder("out", "config.json", is_finished, "run train.py, or give --checkpoint")
