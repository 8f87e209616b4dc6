"""How much of what is scored was seen before: in training, or twice among what is scored.

Pictures are the same where the bytes of their files are, texts where their words are: a picture saved at
another size, or a caption in other words, is not found.
"""
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

import flame
from data.benchmarks import InTar
from data.captions import fingerprint, joined_rows, read_captions, source_files
from data.checkpoint import identity
from data.pictures import find_pictures, read_picture
from flame import InputError


def count_leaks(pictures, texts, checkpoint):
    """-> {"leaked_images", "leaked_texts", "identical_images", "identical_texts"}; says on stderr what is
    not 0.

    pictures: paths, or InTar. Of training nothing is counted where the checkpoint is not a run of train.py,
    or where its pictures and captions are not where they were.
    """
    places = [(p.tar, p.offset, p.size) if isinstance(p, InTar) else (p,) for p in pictures]
    digests = [digest for place in places if (digest := digest_of(*place))]
    counts = {}
    told = []

    def count(what, number, of, said):
        counts[what] = number
        if number:
            told.append(f"{number} of {len(of)} {said}")

    config = Path(checkpoint, "config.json")
    for what, own, of, said, trained in (
            ("leaked_images", digests, pictures, "pictures were trained on", trained_pictures),
            ("leaked_texts", texts, texts, "texts were trained on", trained_texts)):
        try:
            if config.exists():
                found = trained(config, set(own))
                count(what, sum(one in found for one in own), of, said)
        except InputError as error:
            print(f"how many {said} is not known: {error}", file=sys.stderr)
    again = len(digests) - len(set(digests))
    count("identical_images", again, pictures, "pictures are the same as an earlier one")
    count("identical_texts", len(texts) - len(set(texts)), texts, "texts are the same as an earlier one")
    if told:
        print("; ".join(told), file=sys.stderr)
    return counts


def digest_of(path, offset=0, size=-1):
    """(bytes, their SHA-256) of a file, or of `size` bytes in it from `offset` on; None where it has none, or
    more than a picture's."""
    with suppress(OSError):
        data = read_picture(path, offset, size)
        return len(data), hashlib.sha256(data).digest()


def trained_on(config):
    """config.json of a run -> (root of its pictures or None, its store). Raises InputError where the store is
    not there, or another one by now.
    """
    known = {"store": {"path": str, "identity": (str, type(None))}, "images": (str, type(None))}
    record = flame.read_json(config, known)
    store = flame.open_store(record["store"]["path"])
    if record["store"].get("identity") not in (None, identity(store)):
        raise InputError(f"{store.path}: not the store any more that {config.parent} was trained on")
    return record.get("images"), store


def trained_pictures(config, wanted):
    """Those of the wanted digests that a picture of training has; none is read whose size is not wanted."""
    images, store = trained_on(config)
    _, files, places = find_pictures(store, images, config.with_name("tars.npz"))
    sizes = places[:, 2]
    if (sizes < 0).any():  # files, not parts of tars
        sizes = np.array([os.path.getsize(path) if os.path.isfile(path) else -1 for path in files])
    alike = places[np.isin(sizes, [size for size, _ in wanted])].tolist()
    alike = tqdm(alike, "comparing with training", unit=" pictures", leave=False)
    return wanted & {digest_of(files[file], offset, size) for file, offset, size in alike}


def trained_texts(config, wanted):
    """Those of the wanted texts that training's captions have, joined files' too."""
    _, store = trained_on(config)
    known = {"captions": {"joins": (dict, type(None))}}
    captions = flame.read_json(store.path / "meta.json", known)["captions"]
    joins = captions.get("joins") or {}
    source = captions["path"]
    if source_files(source)[0].suffix == ".tar":
        raise InputError(f"{source}: its captions lie in tars, where to read them all takes too long")
    if fingerprint([source, *joins.values()]) != captions["sha256"]:
        raise InputError(f"{source}: not the captions any more that {store.path} was made of")
    found = set()
    for row in tqdm(read_captions(source), "comparing with training", unit=" rows", leave=False):
        found |= wanted.intersection(row.captions.values())
    for name, file in joins.items():
        found |= wanted.intersection(text for _, text in joined_rows(name, file, {}))
    return found
