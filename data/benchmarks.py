"""Every benchmark -> pictures, texts, and which belongs to which.

There are two kinds of layout. What only its authors distribute has a reader of ten lines here: urban1k,
sharegpt4v, dci, docci, xm3600, and folders of pictures. Everything else lies as CLIP_benchmark publishes it,
tars with names and templates beside them (webdataset). README.md beside this file says where to get each and
how it must lie. Nothing is decoded here: a picture is a Place, and evaluate.py finds out whether it can be
read. A caption that is empty is returned as "", for evaluate.py to count what it leaves out.
"""
import json
import os
import re
import sys
import tarfile
import tempfile
from itertools import chain
from pathlib import Path

import duckdb

from data.captions import read_table, write_table
from data.pictures import Place, find_pictures
from flame import InputError, reading

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # of pictures
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
        return demo(root, split)
    kind = "txt" if name in CAPTIONS else "cls"
    if any((root / split).glob("*.tar")):
        return webdataset(root, split, kind, most)
    if split != "test" or name not in READERS or not root.is_dir():
        raise InputError(f"{root / split if root.is_dir() else root}: not found, nor any tars; {CURE}")
    return paired(*READERS[name](root), most) if name in CAPTIONS else READERS[name](root)


def lines_of(path):
    with reading(path, CURE):   # those that are not empty, without white space around
        return list(filter(None, map(str.strip, path.read_text("utf-8-sig").split("\n"))))


def json_of(path):
    with reading(path, CURE):
        return json.loads(path.read_text("utf-8"))


def pictures_in(folder):
    """The files in a folder and its folders that are named like pictures, [Place]"""
    return [Place(str(path)) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]


def paired(pictures, languages, most=None):
    """Pictures, {language: [captions of each picture]} -> pictures [Place], {language: (texts, owner)}"""
    data = {}
    for language, captions in languages.items():
        pairs = [(text.strip(), i) for i, own in enumerate(captions) for text in own[:most]]
        data[language] = [text for text, _ in pairs], [i for _, i in pairs]
    return [path if isinstance(path, Place) else Place(str(path)) for path in pictures], data


# ------------------------------------------------------------------------------------------------------------
# What only its authors distribute

def urban1k(root):
    """image/<name>.jpg and caption/<name>.txt, whose first line is the caption (Long-CLIP, 1,000 pairs).

    Either may miss the other: a picture without a caption stays in the gallery, both are counted.
    """
    root = next((path.parent for path in sorted(root.rglob("image"))), root)    # in the archive's own folders
    pictures = {path.stem: path for path in root.glob("image/*")}
    captions = {path.stem: lines_of(path)[:1] or [""] for path in root.glob("caption/*.txt")}
    names = sorted(pictures.keys() | captions.keys())
    paths = [pictures.get(name, root / f"image/{name}.jpg") for name in names]
    return paths, {"": [captions.get(name, [""]) for name in names]}


def sharegpt4v(root):
    """The first 1,000 of the ShareGPT4V captions: second turn, newlines to spaces (Long-CLIP's choice)."""
    with reading(root / "share-captioner_coco_lcs_sam_1246k_1107.json", CURE) as path:
        columns = {"image": "VARCHAR", "conversations": "STRUCT(value VARCHAR)[]"}
        table = duckdb.read_json(str(path), columns=columns, format="array")    # 1.5 GB: stops after these
        rows = table.limit(1000).project("image, conversations[2].value").fetchall()
        return [root / image for image, _ in rows], {"": [[text.replace("\n", " ")] for _, text in rows]}


def dci(root):
    """Densely Captioned Images, all splits: short caption, newline, extra caption, re-joined by sentences."""
    root = root / "densely_captioned_images"
    pictures = []
    captions = []
    for name in chain(*json_of(root / "splits.json").values()):
        entry = json_of(root / "annotations" / name)
        with reading(root / "annotations" / name, CURE):
            sentences = re.split(r"\n|</s>|\.", f"{entry['short_caption']}\n{entry['extra_caption']}")
            captions.append([". ".join(filter(None, map(str.strip, sentences)))])
            pictures.append(root / "photos" / entry["image"])
    return pictures, {"": captions}


def docci(root):
    """DOCCI, split "test" (5,000 pairs): docci_descriptions.jsonlines and images/; newlines to spaces."""
    with reading(root / "docci_descriptions.jsonlines", CURE) as path:
        rows = [row for row in map(json.loads, lines_of(path)) if row["split"] == "test"]
        pictures = [root / "images" / row["image_file"] for row in rows]
        return pictures, {"": [[row["description"].replace("\n", " ")] for row in rows]}


def xm3600(root):
    """Crossmodal-3600: captions.jsonl, images/<key>.jpg; the strings in a line are no languages."""
    with reading(root / "captions.jsonl", CURE) as path:
        rows = list(map(json.loads, lines_of(path)))
        languages = [name for name, value in rows[0].items() if isinstance(value, dict)]
        captions = {name: [row[name]["caption"] or [""] for row in rows] for name in languages}
        return [root / f"images/{row['image/key']}.jpg" for row in rows], captions


def imagefolder(root, about=None):
    """<class>/<picture>. Names and templates lie beside the folders, or in `about`, as webdataset() has them;
    without classnames.txt the folders have the names."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    names, templates = names_and_templates(about or root)
    names = names or [folder.name.replace("_", " ") for folder in folders]
    if len(names) != len(folders) or len(names) < 2:
        raise InputError(f"{root}: {len(folders)} class folders, {len(names)} names; as many are needed, and "
                         f"2 at least; {CURE}")
    pictures = [pictures_in(folder) for folder in folders]
    labels = [label for label, own in enumerate(pictures) for _ in own]
    return list(chain(*pictures)), labels, names, templates


def imagenet(root):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/<picture>"""
    return imagefolder(root / "val", IMAGENET)


def names_and_templates(folder):
    """classnames.txt, a name a line, and zeroshot_classification_templates.txt; without, [] and CLIP's own"""
    names = folder / "classnames.txt"
    templates = folder / "zeroshot_classification_templates.txt"
    templates = lines_of(templates) if templates.exists() else ["a photo of a {c}."]
    return lines_of(names) if names.exists() else [], [line.replace("{c}", "{}") for line in templates]


READERS = {reader.__name__: reader for reader in
           (urban1k, sharegpt4v, dci, docci, xm3600, imagefolder, imagenet)}
CAPTIONS = ("xm3600", "urban1k", "sharegpt4v", "dci", "docci", "coco", "flickr30k")


# ------------------------------------------------------------------------------------------------------------
# As CLIP_benchmark publishes all others

def webdataset(root, split, kind, most=None):
    """<split>/0.tar, 1.tar ...; a sample is a picture and .txt, a caption a line, or .cls, a class's number.

    classnames.txt and zeroshot_classification_templates.txt lie beside. A sample that lacks one of the two is
    left out and counted. Raises InputError where all do.
    """
    samples = {}
    for tar in sorted((root / split).glob("*.tar"), key=lambda path: (len(path.stem), path.stem)):
        with reading(tar, CURE), tarfile.open(tar) as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                key, _, suffix = os.path.basename(member.name).partition(".")
                sample = samples.setdefault((tar, key), {})
                if suffix == kind:
                    sample["says"] = archive.extractfile(member).read().decode()
                elif f".{suffix}" in SUFFIXES:
                    sample["picture"] = Place(str(tar), member.offset_data, member.size)
    complete = [sample for sample in samples.values() if len(sample) == 2]
    if len(complete) < len(samples):
        print(f"{root / split}: {len(samples) - len(complete)} of {len(samples)} samples lack a picture or "
              f".{kind} and are left out", file=sys.stderr)
    if not complete:
        raise InputError(f"{root / split}: no sample of its tars has a picture and .{kind}; {CURE}")
    pictures = [sample["picture"] for sample in complete]
    if kind == "txt":
        return paired(pictures, {"": [sample["says"].splitlines() for sample in complete]}, most)
    names, templates = names_and_templates(root)
    with reading(root / "classnames.txt", CURE):    # has fewer names than a number says, or is not there
        return pictures, [range(len(names))[int(sample["says"])] for sample in complete], names, templates


# ------------------------------------------------------------------------------------------------------------
# One's own, and the demo

def own(captions, folder, prompts):
    """Captions in any form that embed.py reads, those that the prompt set is asked of -> as read().

    Rows of one picture are its several captions; rows without one are left out. folder: where pictures lie.
    """
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary, "captions.tsv")
        write_table(table, captions, {})
        rows = list(read_table(table))
    keys, images, *_ = zip(*rows)
    found, files, places = find_pictures(list(keys), list(images), captions, folder)
    if len(found) < len(rows):
        print(f"{captions}: {len(rows) - len(found)} of {len(rows)} rows have no picture and are left out",
              file=sys.stderr)
    captions_of = {}
    for n, (file, offset, size) in sorted(zip(found.tolist(), places.tolist())):
        place = Place(str(files[file]), offset, size)
        captions_of.setdefault(place, []).append(getattr(rows[n], prompts))
    return paired(captions_of, {"": captions_of.values()})


def demo(root, split="test"):
    """The corpus that data/demo.py makes -> scenes, captions, objects, names, synonyms.

    scenes    [Place], the pictures of <split>.tsv
    captions  {"long" | "short" | "raw" | "reworded": list[str]}, one text a scene
    objects   [(Place, object, "seen" | "unseen")]: single-object pictures. Of each object's pictures, in the
              order of objects.tsv, the first, third ... belong to val and the rest to test.
    names     {language: {object: name}}
    synonyms  {"first" | "second": {object: name}}, of the seen ones
    """
    kinds = ("long", "short", "raw", "reworded")
    rows = rows_of(root / f"{split}.tsv")
    scenes = [Place(str(root / row["image"])) for row in rows]
    captions = {kind: [row[kind].strip() for row in rows] for kind in kinds}
    objects = []
    val = {}    # whether an object's last picture belonged to val
    for row in rows_of(root / "objects.tsv"):
        thing = row["object"]
        val[thing] = not val.get(thing, False)
        if val[thing] == (split == "val"):
            objects.append((Place(str(root / row["image"])), thing, row["split"]))
    return scenes, captions, objects, names_in(root / "names.tsv"), names_in(root / "synonyms.tsv")


def rows_of(path):      # [{column: field}]
    with reading(path, "run data/demo.py again"):
        header, *lines = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        return [dict(zip(header, fields, strict=True)) for fields in lines]


def names_in(path):     # {column: {object: name}}
    rows = rows_of(path)
    columns = [column for column in rows[0] if column != "object"]
    return {column: {row["object"]: row[column].strip() for row in rows} for column in columns}
