"""Readers of benchmarks: each returns images, texts, and which texts belong to which image.

There are two kinds of layout. Benchmarks that only their authors distribute have a short reader of their own:
urban1k, sharegpt4v, dci, docci, xm3600 and folders of images. All others are read in CLIP_benchmark's format
(webdataset tars with class names and templates beside them). data/README.md lists the sources and layouts.
Nothing is decoded here: an image is an ImageLocation, and evaluate.py finds out whether it can be read. An
empty caption is returned as "", and evaluate.py counts it as skipped.
"""
import csv
import glob
import json
import os
import re
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import duckdb

from data.captions import read_table, write_table
from data.images import ImageLocation, find_images, images_in, locations_of
from data.sources import DUCKDB
from data.tars import IMAGE_SUFFIXES, tar_samples
from flame import InputError, read_json, reading

FIX = "see data/README.md for the source and the layout"
IMAGENET = Path(__file__).parent / "classes/imagenet"  # class names and templates


def read(name, root, split="test", max_captions=None):
    """Read a benchmark from a folder, with the first max_captions captions of each image, or all.

    Returns, for
        captions: images list[ImageLocation], {language: (texts, image_of_text list[int])}; one language is ""
        classes:  images, labels list[int], class names, templates with {} for the name
        demo:     see demo()

    Raises InputError if the folder does not have the documented layout, or not that split.
    """
    if name == "demo":
        with reading(root / f"{split}.tsv", "run data/demo.py again"):
            return demo(root, split)
    if any((root / split).glob("*.tar")):
        data = webdataset(root, split)
    elif name == "flickr8k" and (root / f"{split}.tsv").exists():
        data = flickr8k(root, split)
    elif split != "test" or name not in READERS or not root.is_dir():
        raise InputError(f"{root}: no such folder, or it has no {split} split; {FIX}")
    else:
        data = READERS[name](root)
    data = data if isinstance(data, tuple) else group_captions(data, max_captions)
    if not data[0]:
        raise InputError(f"{root}: no images; {FIX}")
    return data


def read_lines(path):
    """Return the lines of a text file, stripped, without empty ones."""
    with reading(path, FIX):
        return list(filter(None, map(str.strip, path.read_text("utf-8-sig").split("\n"))))


def group_captions(rows, max_captions=None):
    """Turn (language, image, caption) rows into images, {language: (texts, image_of_text)}.

    Rows with the same image are its captions; the first max_captions are kept for each language.
    """
    numbers = {}
    data = {}
    counts = Counter()
    for language, location, text in rows:
        texts, image_of_text = data.setdefault(language, ([], []))
        number = numbers.setdefault(location, len(numbers))
        counts[language, number] += 1
        if not max_captions or counts[language, number] <= max_captions:
            texts.append(text.strip())
            image_of_text.append(number)
    return list(numbers), data


# ------------------------------------------------------------------------------------------------------------
# Layouts of single benchmarks. A reader yields (language, image, caption), or returns classes as read() does.

def urban1k(root):
    """Urban-1k: image/<name>.jpg, caption/<name>.txt with the caption in its first line (Long-CLIP).

    A caption without an image counts as one whose image cannot be read.
    """
    root = next((path.parent for path in sorted(root.rglob("image"))), root)  # the archive has its own folder
    images = {path.stem: path for path in root.glob("image/*")}
    for path in sorted(root.glob("caption/*.txt")):
        yield "", ImageLocation(str(images.get(path.stem, path))), [*read_lines(path), ""][0]


def query_json(path, query):
    """Yield the (image path, caption) rows of a DuckDB query on a JSON file. Newlines become spaces."""
    with reading(path, FIX), duckdb.connect(config=DUCKDB) as database:
        for image, text in database.execute(query, {"path": glob.escape(os.path.abspath(path))}).fetchall():
            yield "", ImageLocation(str(path.parent / image)), text.replace("\n", " ")


def sharegpt4v(root):
    """The second turn of the first 1,000 ShareGPT4V conversations, as in Long-CLIP. The file is 1.5 GB."""
    return query_json(root / "share-captioner_coco_lcs_sam_1246k_1107.json", """
        SELECT image, conversations[2].value FROM read_json($path, format='array', columns={
            image: 'VARCHAR', conversations: 'STRUCT(value VARCHAR)[]'}) LIMIT 1000""")


def docci(root):
    """DOCCI's test split (5,000 pairs): docci_descriptions.jsonlines and images/."""
    return query_json(root / "docci_descriptions.jsonlines", """
        SELECT 'images/' || image_file, description FROM read_json($path, format='newline_delimited',
            columns={split: 'VARCHAR', image_file: 'VARCHAR', description: 'VARCHAR'})
        WHERE split = 'test'""")


def dci(root):
    """Densely Captioned Images, all splits: the short and the extra caption, joined sentence by sentence."""
    root = root / "densely_captioned_images"
    for name in chain(*read_json(root / "splits.json", FIX).values()):
        with reading(root / "annotations" / name, FIX) as path:
            entry = json.loads(path.read_text("utf-8"))
            text = f"{entry['short_caption']}\n{entry['extra_caption']}".strip()
            sentences = filter(None, re.split(r"\s*(?:\n|</s>|\.)\s*", text))
            yield "", ImageLocation(str(root / "photos" / entry["image"])), ". ".join(sentences)


def xm3600(root):
    """Crossmodal-3600: captions.jsonl, images/<key>.jpg. In a line, each dict is a language."""
    with reading(root / "captions.jsonl", FIX) as path:
        for row in map(json.loads, read_lines(path)):
            location = ImageLocation(str(root / f"images/{row['image/key']}.jpg"))
            for language, value in row.items():
                if isinstance(value, dict):
                    yield from ((language, location, text) for text in value["caption"])


def flickr8k(root, split):
    """Flickr8k as tests/flickr8k.py writes it: test.tsv, val.tsv, and test-zh.tsv ... in other languages."""
    for path in [root / f"{split}.tsv", *sorted(root.glob(f"{split}-*.tsv"))]:
        language = path.stem.removeprefix(split).removeprefix("-") or "en"
        with reading(path, FIX):
            for row in read_tsv(path):
                yield language, ImageLocation(str(root / row["image"])), row["raw"]


def imagefolder(root, metadata=None):
    """<class>/<image>. Class names and templates are in the folder `metadata`, by default root, in the files
    that webdataset() reads. Without classnames.txt, the folder names are the class names.
    """
    folders = sorted(filter(Path.is_dir, root.glob("[!.]*")))
    names = [folder.name.replace("_", " ") for folder in folders]
    templates = ["a photo of a {}."]
    metadata = metadata or root
    if (metadata / "classnames.txt").exists():
        names, templates = names_and_templates(metadata)
    if not len(names) == len(folders) > 1:
        raise InputError(f"{root}: {len(folders)} class folders and {len(names)} class names; need at least "
                         f"2 classes and one name per folder; {FIX}")
    images = [images_in(folder) for folder in folders]
    labels = [label for label, locations in enumerate(images) for _ in locations]
    return list(chain(*images)), labels, names, templates


def imagenet(root):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/<image>."""
    return imagefolder(root / "val", IMAGENET)


def names_and_templates(folder):
    """Read classnames.txt and zeroshot_classification_templates.txt, one entry a line."""
    templates = read_lines(folder / "zeroshot_classification_templates.txt")
    return read_lines(folder / "classnames.txt"), [template.replace("{c}", "{}") for template in templates]


READERS = {reader.__name__: reader for reader in
           (urban1k, sharegpt4v, dci, docci, xm3600, imagefolder, imagenet)}


# ------------------------------------------------------------------------------------------------------------
# CLIP_benchmark's layout

def webdataset(root, split):
    """<split>/0.tar, 1.tar ...: samples of an image and a .txt (a caption per line) or .cls (a class index).

    classnames.txt and zeroshot_classification_templates.txt are in root. Returns rows for group_captions() or
    classes as read() does.
    """
    classes = (root / "classnames.txt").exists()
    images = []
    texts = []
    skipped = {}
    for tar in sorted((root / split).glob("*.tar")):
        with reading(tar, FIX), open(tar, "rb") as file:
            for _, _, parts in tar_samples(tar, skipped):
                offset, size = parts[".cls" if classes else ".txt"]
                file.seek(offset)
                texts.append(file.read(size).decode())
                span, = (parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES)
                images.append(ImageLocation(str(tar), *span))
            if skipped:
                raise ValueError(*skipped)
    if not classes:
        return [("", image, caption)
                for image, text in zip(images, texts) for caption in text.splitlines() or [""]]
    names, templates = names_and_templates(root)
    with reading(tar, FIX):  # an index may be negative or exceed the number of names
        labels = [range(len(names)).index(int(text)) for text in texts]
    return images, labels, names, templates


# ------------------------------------------------------------------------------------------------------------
# Your own captions, and the demo

def read_captions(captions, folder, split, prompts):
    """Read captions in any format that embed.py reads, with the captions of one prompt set, as read() does.

    Rows with the same image are its captions. A row without an image counts as an unreadable image. folder:
    root of the images.
    """
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary, "captions.tsv")
        made = write_table(table, captions, split=split)
        rows = list(read_table(table))
        keys, images, *_ = zip(*rows)
        numbers, files, spans = find_images(keys, images, captions, folder, "",
                                            table if made.comparable else None)
    location_of = dict(zip(numbers.tolist(), locations_of(files, spans)))
    return group_captions(
        ("", location_of.get(n, ImageLocation(f"no image for {row.key}")), getattr(row, prompts))
        for n, row in enumerate(rows))


def demo(root, split="test"):
    """Read the corpus that data/demo.py makes. Returns scenes, captions, objects, names, synonyms:

    scenes    list[ImageLocation], the images of <split>.tsv
    captions  {"long" | "short" | "raw" | "reworded": list[str]}, one text per scene
    objects   [(ImageLocation, object, "seen" | "unseen")], single-object images. Of each object's
              images, 00, 02 ... are for validation, 01, 03 ... for test.
    names     {language: {object: name}}
    synonyms  {"first" | "second": {object: name}} of seen objects, first for validation, second for test
    """
    rows = read_tsv(root / f"{split}.tsv")
    scenes = [ImageLocation(str(root / row["image"])) for row in rows]
    captions = {kind: [row[kind] for row in rows] for kind in ("long", "short", "raw", "reworded")}
    objects = [(ImageLocation(str(root / row["image"])), row["object"], row["split"])
               for row in read_tsv(root / "objects.tsv")[split != "val"::2]]
    order = "first" if split == "val" else "second"
    synonyms = {order: read_names(root / "synonyms.tsv")[order]}
    return scenes, captions, objects, read_names(root / "names.tsv"), synonyms


def read_tsv(path):
    """Return [{column: field}]."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_names(path):
    """Return {column: {object: name}}."""
    rows = read_tsv(path)
    return {column: {row["object"]: row[column] for row in rows} for column in rows[0] if column != "object"}
