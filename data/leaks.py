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
from data.pictures import find_pictures
from flame import InputError

SAID = {"leaked_images": "pictures were trained on", "leaked_texts": "texts were trained on",
        "identical_images": "pictures are the same as an earlier one",
        "identical_texts": "texts are the same as an earlier one"}


def count_leaks(pictures, texts, checkpoint):
    """-> {what, as in SAID: how many}; says on stderr what is not 0.

    pictures: paths, or InTar. Of training nothing is counted where the checkpoint is not a run of train.py,
    or where its pictures and captions are not where they were.
    """
    places = [(p.tar, p.offset, p.size) if isinstance(p, InTar) else (p,) for p in pictures]
    digests = [digest for place in places if (digest := digest_of(*place))]
    counts = {"identical_images": len(digests) - len(set(digests)),
              "identical_texts": len(texts) - len(set(texts))}
    config = Path(checkpoint, "config.json")
    for what, own, trained in (("leaked_images", digests, trained_pictures),
                               ("leaked_texts", texts, trained_texts)):
        try:
            if config.exists():
                found = trained(config, set(own))
                counts[what] = sum(one in found for one in own)
        except InputError as error:
            print(f"how many {SAID[what]} is not known: {error}", file=sys.stderr)
    of = {"pictures": len(pictures), "texts": len(texts)}
    found = {said: counts.get(what) for what, said in SAID.items()}
    told = [f"{count} of {of[said.split()[0]]} {said}" for said, count in found.items() if count]
    if told:
        print("; ".join(told), file=sys.stderr)
    return counts


def digest_of(path, offset=0, size=-1):
    """(bytes, their SHA-256) of a file, or of `size` bytes in it from `offset` on; None where it has none."""
    with suppress(OSError):
        if os.path.isfile(path):  # a pipe would be waited for without end
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            return len(data), hashlib.sha256(data).digest()
    return None


def trained_pictures(config, wanted):
    """Those of the wanted digests that a picture of training has; none is read whose size is not wanted."""
    record = flame.read_json(config, {"store": {"path": str}, "images": (str, type(None))})
    store = flame.open_store(record["store"]["path"])
    _, files, places = find_pictures(store, record.get("images"), config.with_name("tars.npz"))
    sizes = places[:, 2]
    if (sizes < 0).any():  # files, not parts of tars
        sizes = np.array([os.path.getsize(path) if os.path.isfile(path) else -1 for path in files])
    alike = places[np.isin(sizes, [size for size, _ in wanted])].tolist()
    alike = tqdm(alike, "comparing with training", unit=" pictures", leave=False)
    return wanted & {digest_of(files[file], offset, size) for file, offset, size in alike}


def trained_texts(config, wanted):
    """Those of the wanted texts that training's captions have, joined files' too."""
    record = flame.read_json(config, {"store": {"path": str}})
    path = Path(record["store"]["path"], "meta.json")
    wanted_keys = {"path": str, "sha256": str, "joins": (dict, type(None))}
    captions = flame.read_json(path, {"captions": wanted_keys})["captions"]
    joins = captions.get("joins") or {}
    source = captions["path"]
    if source_files(source)[0].suffix == ".tar":
        raise InputError(f"{source}: its captions lie in tars, where to read them all takes too long")
    if fingerprint([source, *joins.values()]) != captions["sha256"]:
        raise InputError(f"{source}: not the captions any more that {path.parent} was made of")
    found = set()
    for row in tqdm(read_captions(source), "comparing with training", unit=" rows", leave=False):
        found |= wanted.intersection(row.captions.values())
    for name, file in joins.items():
        found |= wanted.intersection(text for _, text in joined_rows(name, file, {}))
    return found
