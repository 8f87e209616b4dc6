"""Every benchmark -> pictures, texts, and which belongs to which.

There are two kinds of layout. What only its authors distribute has a reader of ten lines here: urban1k,
sharegpt4v, dci, docci, xm3600, and folders of pictures. Everything else lies as CLIP_benchmark publishes it,
tars with names and templates beside them (webdataset). README.md beside this file says where to get each and
how it must lie. Nothing is decoded here: a picture is a Place, and evaluate.py finds out whether it can be
read. A caption that is empty is returned as "", for evaluate.py to count what it leaves out.
"""
import csv
import glob
import json
import re
import tempfile
from itertools import chain
from pathlib import Path

import duckdb

from data.captions import read_table, write_table
from data.pictures import Place, find_pictures, pictures_in, places_of
from data.sources import PICTURES
from data.tars import tar_samples
from flame import InputError, read_json, reading

CURE = "data/README.md says where to get it and how it must lie"
IMAGENET = Path(__file__).parent / "classes/imagenet"   # names and templates, which its val/ does not bring


def read(name, root, split="test", most=None):
    """What lies in a folder, of each picture the first `most` captions, or all ->

    captions   pictures [Place], {language: (texts, image_of_text [int])}, one "" where there are no more
    classes    pictures, labels [int], names of the classes, templates with {} for a name
    demo       see demo()

    Raises InputError where the folder does not have the layout of README.md, or no such split.
    """
    if name == "demo":
        with reading(root / f"{split}.tsv", "run data/demo.py again"):
            return demo(root, split)
    if any((root / split).glob("*.tar")):
        data = webdataset(root, split)
    elif split != "test" or name not in READERS or not root.is_dir():
        raise InputError(f"{root}: no such folder, or split {split} is not in it; {CURE}")
    else:
        data = READERS[name](root)
    data = data if isinstance(data, tuple) else paired(data, most)
    if not data[0]:
        raise InputError(f"{root}: no pictures; {CURE}")
    return data


def lines_of(path):
    with reading(path, CURE):   # those that are not empty, without white space around
        return list(filter(None, map(str.strip, path.read_text("utf-8-sig").split("\n"))))


def paired(rows, most=None):
    """(language, picture, caption) of each -> pictures, {language: (texts, image_of_text)}

    Rows of one picture are its several captions.
    """
    numbers = {}
    data = {}
    for language, place, text in rows:
        texts, owners = data.setdefault(language, ([], []))
        number = numbers.setdefault(place, len(numbers))
        if not most or owners[-most:].count(number) < most:
            texts.append(text.strip())
            owners.append(number)
    return list(numbers), data


# ------------------------------------------------------------------------------------------------------------
# What only its authors distribute: (language, picture, caption) after another, or as read() gives classes

def urban1k(root):
    """image/<name>.jpg and caption/<name>.txt, whose first line is the caption (Long-CLIP, 1,000 pairs).

    A caption without a picture is counted as that of a picture that cannot be read.
    """
    root = next((path.parent for path in sorted(root.rglob("image"))), root)    # in the archive's own folders
    pictures = {path.stem: path for path in root.glob("image/*")}
    for path in sorted(root.glob("caption/*.txt")):
        yield "", Place(str(pictures.get(path.stem, path))), [*lines_of(path), ""][0]


def rows_of_json(path, query):
    """A query gives (picture's path from there, caption) of a JSON file; newlines become spaces."""
    with reading(path, CURE):
        for image, text in duckdb.execute(query, {"path": glob.escape(str(path))}).fetchall():
            yield "", Place(str(path.parent / image)), text.replace("\n", " ")


def sharegpt4v(root):
    """The first 1,000 of the ShareGPT4V captions, 1.5 GB: the second turn (Long-CLIP's choice)."""
    return rows_of_json(root / "share-captioner_coco_lcs_sam_1246k_1107.json", """
        SELECT image, conversations[2].value FROM read_json($path, format='array', columns={
            image: 'VARCHAR', conversations: 'STRUCT(value VARCHAR)[]'}) LIMIT 1000""")


def docci(root):
    """DOCCI, split "test" (5,000 pairs): docci_descriptions.jsonlines and images/"""
    return rows_of_json(root / "docci_descriptions.jsonlines", """
        SELECT 'images/' || image_file, description FROM read_json($path, format='newline_delimited',
            columns={split: 'VARCHAR', image_file: 'VARCHAR', description: 'VARCHAR'})
        WHERE split = 'test'""")


def dci(root):
    """Densely Captioned Images, all splits: short caption, newline, extra caption, re-joined by sentences."""
    root = root / "densely_captioned_images"
    for name in chain(*read_json(root / "splits.json", CURE).values()):
        with reading(root / "annotations" / name, CURE) as path:
            entry = json.loads(path.read_text("utf-8"))
            text = f"{entry['short_caption']}\n{entry['extra_caption']}".strip()
            sentences = filter(None, re.split(r"\s*(?:\n|</s>|\.)\s*", text))
            yield "", Place(str(root / "photos" / entry["image"])), ". ".join(sentences)


def xm3600(root):
    """Crossmodal-3600: captions.jsonl, images/<key>.jpg; the strings in a line are no languages."""
    with reading(root / "captions.jsonl", CURE) as path:
        for row in map(json.loads, lines_of(path)):
            place = Place(str(root / f"images/{row['image/key']}.jpg"))
            for language, value in row.items():
                if isinstance(value, dict):
                    yield from ((language, place, text) for text in value["caption"])


def imagefolder(root, about=None):
    """<class>/<picture>. Names and templates lie in `about`, or beside the folders, as webdataset() has them;
    without classnames.txt the folders have the names."""
    folders = sorted(path for path in root.iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    names = [folder.name.replace("_", " ") for folder in folders]
    templates = ["a photo of a {}."]
    about = about or root
    if (about / "classnames.txt").exists():
        names, templates = names_and_templates(about)
    if not len(names) == len(folders) > 1:
        raise InputError(f"{root}: {len(folders)} class folders, {len(names)} names; as many are needed, and "
                         f"2 at least; {CURE}")
    pictures = [pictures_in(folder) for folder in folders]
    labels = [label for label, places in enumerate(pictures) for _ in places]
    return list(chain(*pictures)), labels, names, templates


def imagenet(root):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/<picture>"""
    return imagefolder(root / "val", IMAGENET)


def names_and_templates(folder):
    """classnames.txt, a name a line, and zeroshot_classification_templates.txt"""
    templates = lines_of(folder / "zeroshot_classification_templates.txt")
    return lines_of(folder / "classnames.txt"), [template.replace("{c}", "{}") for template in templates]


READERS = {reader.__name__: reader for reader in
           (urban1k, sharegpt4v, dci, docci, xm3600, imagefolder, imagenet)}


# ------------------------------------------------------------------------------------------------------------
# As CLIP_benchmark publishes all others

def webdataset(root, split):
    """<split>/0.tar, 1.tar ...; a sample is a picture and .txt, a caption a line, or .cls, a class's number.

    classnames.txt and zeroshot_classification_templates.txt lie beside. -> rows for paired(), or as read()
    """
    classes = (root / "classnames.txt").exists()
    samples = []
    skipped = {}
    for tar in sorted((root / split).glob("*.tar")):
        with reading(tar, CURE), open(tar, "rb") as file:
            for _, _, parts in tar_samples(tar, skipped):
                offset, size = parts[".cls" if classes else ".txt"]
                file.seek(offset)
                text = file.read(size).decode()
                picture, = (Place(str(tar), *parts[suffix]) for suffix in parts if suffix in PICTURES)
                samples.append((picture, text))
            if skipped:
                raise ValueError(*skipped)
    if not classes:
        return [("", picture, caption) for picture, text in samples for caption in text.splitlines() or [""]]
    names, templates = names_and_templates(root)
    with reading(tar, CURE):  # a class may lack its name
        labels = [range(len(names))[int(text)] for _, text in samples]
    return [picture for picture, _ in samples], labels, names, templates


# ------------------------------------------------------------------------------------------------------------
# One's own, and the demo

def read_captions(captions, folder, prompts):
    """Captions in any form that embed.py reads, those that the prompt set is asked of -> as read().

    Rows of one picture are its several captions; a row without one counts as that of a picture that cannot
    be read. folder: where pictures lie.
    """
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary, "captions.tsv")
        write_table(table, captions, [])
        rows = list(read_table(table))
    keys, images, *_ = zip(*rows)
    numbers, files, places = find_pictures(keys, images, captions, folder)
    place_of = dict(zip(numbers.tolist(), places_of(files, places)))
    return paired(("", place_of.get(n, Place(f"no picture of {row.key}")), getattr(row, prompts))
                  for n, row in enumerate(rows))


def demo(root, split="test"):
    """The corpus that data/demo.py makes -> scenes, captions, objects, names, synonyms.

    scenes    [Place], the pictures of <split>.tsv
    captions  {"long" | "short" | "raw" | "reworded": list[str]}, one text a scene
    objects   [(Place, object, "seen" | "unseen")]: single-object pictures. Of objects.tsv, which has an even
              number of each object's, the first, third ... belong to val and the rest to test.
    names     {language: {object: name}}
    synonyms  {"first" | "second": {object: name}}, of the seen ones: val's are the first, test's the second
    """
    rows = rows_of(root / f"{split}.tsv")
    scenes = [Place(str(root / row["image"])) for row in rows]
    captions = {kind: [row[kind] for row in rows] for kind in ("long", "short", "raw", "reworded")}
    objects = [(Place(str(root / row["image"])), row["object"], row["split"])
               for row in rows_of(root / "objects.tsv")[split != "val"::2]]
    order = "first" if split == "val" else "second"
    synonyms = {order: names_in(root / "synonyms.tsv")[order]}
    return scenes, captions, objects, names_in(root / "names.tsv"), synonyms


def rows_of(path):      # [{column: field}]
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def names_in(path):     # {column: {object: name}}
    rows = rows_of(path)
    return {column: {row["object"]: row[column] for row in rows} for column in rows[0] if column != "object"}
