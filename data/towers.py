"""What encodes pictures and texts for evaluate.py, and keeps their vectors.

A checkpoint's image tower with the LLM that it was trained with, or an open_clip model in the place of both.
Under <out>/cache lies a file for each list of pictures and tower, and for each 2,048 texts and LLM, named by
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
import torch.nn.functional as F

import flame
from data import files, released
from data.checkpoint import newest_checkpoint
from data.command import bar
from data.pictures import open_picture
from data.store import llm_fingerprint
from flame import InputError, PROMPTS

BATCH = 64      # pictures encoded at once: enough to keep a GPU busy, little to hold
PART = 2048     # texts whose states are kept in one file: of Nemo's long set 0.15 GB


class Towers(NamedTuple):
    """What encodes pictures and texts, and where their vectors are kept."""
    model: flame.Flame      # or what answers like it
    encoder: Callable       # () -> flame.TextEncoder, made when it is first called for
    device: str
    cache: Path | None      # a folder; None: nothing is kept, no progress shown
    image_tower: object     # what the vectors of each depend on, for the cache
    text_tower: object


# ------------------------------------------------------------------------------------------------------------
# What is kept

def cached(towers, about, make):
    """What make() gave for the same `about` before, an array; made where it is not there, or damaged.

    The file's name is a hash of that and of the code.
    """
    if not towers.cache:
        return make()
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for code in (__file__, flame.__file__, released.__file__, (flame.flame_ext or flame).__file__):
        digest.update(Path(code).read_bytes())
    path = towers.cache / f"{digest.hexdigest()[:32]}.npy"
    with suppress(Exception):   # numpy raises nearly anything on a damaged file
        return np.load(path, mmap_mode="r")
    array = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_array(path, array)
    return array


def digests(weights):
    """{name: tensor} -> [SHA-256]"""
    return [hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest() for tensor in weights.values()]


def stamp(place):
    """What a picture's vector is kept under: one that was mended or exchanged is another."""
    with suppress(OSError):
        about = os.stat(place.path)
        return [*place, about.st_size, about.st_mtime_ns]


# ------------------------------------------------------------------------------------------------------------
# Vectors

@torch.inference_mode()
def encode_images(towers, places):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `places` that could be read).

    Where bfloat16 is fast, the tower runs in it. Raises InputError where none can be read.
    """
    about = [towers.image_tower, [stamp(place) for place in places]]
    vectors = cached(towers, about, lambda: image_vectors(towers, places))
    bad = np.flatnonzero(~vectors.any(1))
    if len(bad):    # once more: a disk may have failed for a moment
        vectors = np.array(vectors)
        vectors[bad] = image_vectors(towers, [places[i] for i in bad])
    whole = vectors.any(1)
    bad = np.flatnonzero(~whole)
    examples = ", ".join(places[i].path for i in bad[:3])
    report = f"{len(bad)} of {len(places)} pictures cannot be read ({examples} ...)"
    if not whole.any():
        raise InputError(f"{report}; data/README.md says where they must lie")
    if len(bad):
        print(f"{report}; they are left out", file=sys.stderr)
    return vectors[whole], np.flatnonzero(whole).tolist()


def image_vectors(towers, places):
    """-> float32 [M, D]: zero, no unit vector, where a picture cannot be read"""
    device = torch.device(towers.device)
    fast = flame.default_dtype(device) == torch.bfloat16
    vectors = np.zeros((len(places), towers.model.config["text_dim"]), np.float32)

    def pixels_of(place):
        with suppress(Exception), open_picture(place) as image:     # decoders raise nearly anything
            return towers.model.preprocess(image)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        coming = pool.map(pixels_of, places[:BATCH])    # begins at once: a batch ahead of the tower
        for start in bar(range(0, len(places), BATCH), "images", unit=" batches", disable=not towers.cache):
            good = {i: pixels for i, pixels in enumerate(coming, start) if pixels is not None}
            coming = pool.map(pixels_of, places[start + BATCH:start + 2 * BATCH])
            if good:
                pixels = torch.stack(list(good.values())).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                    vectors[list(good)] = towers.model.encode_image(pixels).float().cpu().numpy()
    return vectors


def trained_facets(model, prompts):
    """Which facets of a prompt set the checkpoint was trained on, counted from 0. Raises InputError if none.
    """
    columns = model.config["columns"]
    trained = [k for k in range(len(PROMPTS[prompts].facets)) if f"{prompts}.{k}" in columns]
    if not trained:
        raise InputError(f"the checkpoint was trained on {' '.join(columns)} alone, not on the {prompts} "
                         f"prompts; ask by others: --prompts {columns[0].split('.')[0]}")
    return trained


def encode_texts(towers, texts, prompts):
    """-> float32 [N, D], the mean over the trained facets of a prompt set, or of several: "raw short"."""
    return np.concatenate([encode_facets(towers, texts, name) for name in prompts.split()], axis=1).mean(1)


@torch.inference_mode()
def encode_facets(towers, texts, prompts):
    """-> float32 [N, K, D], the facets that were trained.

    Equal texts are encoded once. The cache has the LLM's states, which outlive the checkpoint.
    """
    trained = trained_facets(towers.model, prompts)
    unique = list(dict.fromkeys(texts))
    vectors = {}
    for start in range(0, len(unique), PART):
        part = unique[start:start + PART]
        about = [towers.text_tower, PROMPTS[prompts], part]
        states = cached(towers, about, lambda: text_states(towers, part, prompts))
        facets = towers.model.encode_text(torch.from_numpy(states.astype(np.float32)), prompts)
        vectors |= zip(part, facets.float().cpu().numpy()[:, trained])
    return np.array([vectors[text] for text in texts])


def text_states(towers, texts, prompts):
    """-> float16 [N, K, D], states of the LLM, a text's longest of length 1"""
    states = np.empty((len(texts), len(PROMPTS[prompts].facets), towers.model.config["text_dim"]), np.float16)
    with bar(total=len(texts), desc=f"texts ({prompts})", unit=" texts", disable=not towers.cache) as done:
        for rows, batch in towers.encoder().encode_batches(texts, prompts):
            states[rows] = (batch / batch.norm(dim=-1).amax(1)[:, None, None]).half().numpy()
            done.update(len(rows))
    return states


# ------------------------------------------------------------------------------------------------------------
# Which towers

class OpenClip(torch.nn.Module):
    """Any open_clip model as what evaluate.py asks of a flame.Flame and of a flame.TextEncoder.

    spec: MODEL or MODEL:WEIGHTS, WEIGHTS one of open_clip's names or a file; without, random weights. Raises
    InputError where open_clip is not installed or does not know them.
    """

    def __init__(self, spec):
        super().__init__()
        name, _, weights = spec.partition(":")
        try:
            import open_clip
            self.clip, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=weights or None)
            self.tokenizer = open_clip.get_tokenizer(name)
            D = open_clip.get_model_config(name)["embed_dim"]
        except Exception as error:  # no such package, model or weights, no network, a broken file
            raise InputError(f"--open-clip {spec}: {flame.explained(error)}; give a model that open_clip's "
                             "list_pretrained() has, or MODEL:FILE") from None
        self.config = {"text_dim": D, "columns": [f"{prompts}.0" for prompts in PROMPTS]}

    def encode_image(self, pixels):
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def encode_batches(self, texts, prompts):
        """Yields (rows, [n, 1, D]): the text's one vector in the place of each facet."""
        for rows in torch.arange(len(texts)).split(64):
            tokens = self.tokenizer([texts[row] for row in rows]).to(self.clip.logit_scale.device)
            yield rows.tolist(), self.clip.encode_text(tokens).float().cpu()[:, None]

    def encode_text(self, facets, prompts):
        return F.normalize(facets, dim=-1)


def open_towers(args):
    """-> (Towers, the checkpoint's name). Raises InputError where it was trained with another LLM."""
    dtype = flame.default_dtype(args.device)
    cache = args.out / "cache"
    if args.open_clip:      # which needs no LLM
        model = OpenClip(args.open_clip).eval().to(args.device)
        tower = [args.open_clip, dtype, digests(model.state_dict())]
        return Towers(model, lambda: model, args.device, cache, tower, tower), args.open_clip

    checkpoint = args.checkpoint or newest_checkpoint()
    load = released.load if checkpoint.is_file() else flame.load    # the authors' is one file
    model = load(checkpoint).to(args.device)
    source = model.config["llm"]
    trained_with = source.get("path") or ""
    default = trained_with if os.path.isdir(trained_with) else Path(__file__).parent / "demo/llm"
    llm = flame.hub_folder(args.llm or os.environ.get("FLAME_LLM") or default)
    fingerprint = llm_fingerprint(llm)
    same = source.get("fingerprint") in (None, fingerprint)     # the authors' says nothing
    if not same or flame.llm_config(llm)["hidden_size"] != model.config["text_dim"]:
        raise InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source.get('name')}) "
                         f"than {llm}; name that one with --llm")

    made = source.get("layer"), source.get("positions") or "restart"
    # made only if a text is not cached
    encoder = functools.cache(lambda: released.text_encoder(llm, args.device, dtype, *made))
    image_tower = [model.config, dtype, digests(model.state_dict())]
    text_tower = [fingerprint, made, dtype]
    print(f"checkpoint {checkpoint}   LLM {llm}   device {args.device}", flush=True)
    return Towers(model, encoder, args.device, cache, image_tower, text_tower), checkpoint
