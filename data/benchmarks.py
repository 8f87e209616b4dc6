"""Every benchmark -> pictures, texts, and which belongs to which.

One short function a benchmark, for the data set exactly as its authors distribute it; README.md beside this
file says where each comes from and how it must lie. Nothing is decoded here: a picture is a path, or uint8
[H, W] or [H, W, 3] where the authors pack all pictures into one file, and evaluate.py finds out whether it
can be read. A caption that is empty is returned as "", so that evaluate.py can count what it leaves out.

Readers take the root folder and the split: "test", for classification "train", and what evaluate.py says.
Those of captions also take how many of a picture's captions count, its first ones; None for all. They
return, for

captions          pictures, texts: list[str], image_of_text: list[int]
many languages    pictures, {language: (texts, image_of_text)}
compositionality  pictures, texts, {part: rows}. A row is (what it is resampled with, comparisons), a
                  comparison two pairs (picture, text); the row is right if the first pair of each of its
                  comparisons scores higher than the second
classes           pictures, classes: list[str], one a picture, {class: name}, or {} where classes are names;
                  with_names() makes labels and templates of it

webdataset() reads any benchmark of captions or classes that lies as CLIP_benchmark writes it. All raise
InputError when the folder does not have the layout of README.md. evaluate.py has the table of them.
"""
import functools
import gzip
import itertools
import json
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from data.captions import (
    LARGEST_TEXT, PICTURES, json_entries, read_captions, report_skipped, skip, tar_samples)
from data.files import said
from data.pictures import find_pictures
from flame import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CURE = "data/README.md says where to get it and how it must lie"
AGAIN = f"fetch the file again, {CURE}"
OWN = "or name your own list with --classes"
CLASSES = Path(__file__).parent / "classes"     # the names and templates that come with this repository


# ------------------------------------------------------------------------------------------------------------
# Reading files

def need(path):
    """The path itself, if a file or a folder is there: a pipe would be waited for without end."""
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'not found'}; {CURE}")
    return path


def damaged(where, why):
    """InputError of what is not as its authors distribute it."""
    return InputError(f"{where}: {why}; {AGAIN}")


def read_text(path):
    """A whole UTF-8 file. InputError names the line of the first byte that is not UTF-8."""
    raw = need(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None


def parsed(path, text, line=1, kinds=(dict, list)):
    """The JSON object or list in a text that begins at a line of a file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise damaged(path, f"line {line}: not JSON ({error})") from None
    if not isinstance(value, kinds):
        raise damaged(path, f"line {line}: not a JSON object")
    return value


def read_json(path, shape):
    """A whole JSON file. shape: see check()."""
    value = parsed(path, read_text(path))
    check(path, value, shape)
    return value


def read_jsonl(path, shape):
    """One object of that shape a line; yields (what to call it in a message, object)."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            where = f"{path}: line {line}"
            entry = parsed(path, text, line, dict)
            check(where, entry, shape)
            yield where, entry


def check(where, value, shape, name="entry"):
    """Raises InputError, which begins with `where`, unless a JSON value has the shape that a reader wants.

    shape: a type, {field: shape}, other fields being ignored, or [the shape of every entry].
    """
    if isinstance(shape, dict):
        for field, wanted in shape.items():
            if not isinstance(value, dict) or field not in value:
                raise damaged(where, f"no {field!r}")
            check(where, value[field], wanted, repr(field))
    elif isinstance(shape, list):
        check(where, value, list, name)
        for number, entry in enumerate(value):
            check(f"{where}: entry {number}", entry, shape[0])
    elif not isinstance(value, shape):
        raise damaged(where, f"{name} is not a {shape.__name__}")


def read_tsv(path, columns):
    """A TSV with a header that names at least `columns` -> list of dicts, one a row.

    Rows with too few or too many fields are left out and counted on stderr: a benchmark is not lost to one
    bad row.
    """
    header, *lines = [line.rstrip("\r").split("\t") for line in read_text(path).split("\n")]
    for column in columns:
        if column not in header:
            wanted = " ".join(columns)
            raise InputError(f"{path}: line 1: no column {column!r}; the header must name {wanted}")
    rows = [dict(zip(header, fields)) for fields in lines if len(fields) == len(header)]
    bad = [n for n, fields in enumerate(lines, 2) if len(fields) != len(header) and any(fields)]
    if bad:
        count = f"{len(bad)} such row(s) left out"
        print(f"{path}: line {bad[0]}: not {len(header)} fields; {count}", file=sys.stderr)
    return rows


def read_mat(path, variable):
    """A variable of a MATLAB file -> array [n]. Two data sets alone need it, so scipy is optional."""
    need(path)
    try:
        from scipy.io import loadmat
        variables = loadmat(path, squeeze_me=True)
    except ImportError:
        raise InputError(f"{path}: a MATLAB file; to read it, pip install scipy") from None
    except Exception as error:  # scipy raises nearly anything on a broken file
        raise damaged(path, f"not a MATLAB file ({said(error)})") from None
    check(path, variables, {variable: object})
    return np.atleast_1d(variables[variable])


def read_numbers(path, variable):
    """A variable of a MATLAB file -> list of int"""
    try:
        return read_mat(path, variable).astype(int).tolist()
    except (ValueError, TypeError):
        raise damaged(path, f"{variable!r} is no list of int") from None


def pictures_in(folder, deep=False):
    """The files in a folder that are named like pictures; deep: in its folders too."""
    found = need(folder).rglob("*") if deep else need(folder).iterdir()
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def unpacked(root, name):
    """The folder that holds `name`: root itself, or one that its archive's own folders put between."""
    between = [path.parent for pattern in (name, f"*/{name}", f"*/*/{name}") for path in root.glob(pattern)]
    return between[0] if between else root


# ------------------------------------------------------------------------------------------------------------
# Captions

def captioned(entries):
    """Makes a reader that yields (picture, its texts) return pictures, texts, image_of_text."""
    @functools.wraps(entries)
    def read(root, split="test", most=None):
        pictures = []
        texts = []
        image_of_text = []
        for picture, own in entries(root, split):
            texts += [text.strip() for text in own[:most]]
            image_of_text += [len(pictures)] * len(own[:most])
            pictures.append(picture)
        return pictures, texts, image_of_text
    return read


@captioned
def urban1k(root, split):
    """image/<name>.jpg and caption/<name>.txt, whose first line is the caption (Long-CLIP, 1,000 pairs).

    Either half may miss its partner; both kinds are passed on, for evaluate.py to count like other bad items.
    """
    root = unpacked(root, "image")
    pictures = {path.stem: path for path in pictures_in(root / "image")}
    captions = {path.stem: read_text(path) for path in need(root / "caption").glob("*.txt")}
    for name in sorted(pictures.keys() | captions.keys()):
        picture = pictures.get(name, root / f"image/{name}.jpg")
        yield picture, [captions.get(name, "").split("\n")[0]]


@captioned
def sharegpt4v(root, split):
    """The first 1,000 of the ShareGPT4V captions: second turn, newlines to spaces (Long-CLIP's choice)."""
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    with open(need(path), "rb") as file:   # 1.5 GB for 1.2 million entries: only these are decoded
        for number, entry in enumerate(itertools.islice(json_entries(file, path, AGAIN), 1000)):
            where = f"{path}: entry {number}"
            check(where, entry, {"image": str, "conversations": list})
            answers = entry["conversations"][1:2]
            check(where, answers, [{"value": str}])
            yield root / entry["image"], [answer["value"].replace("\n", " ") for answer in answers]


@captioned
def dci(root, split):
    """Densely Captioned Images, all splits: short caption, newline, extra caption, re-joined by sentences."""
    root = root / "densely_captioned_images"
    splits = read_json(root / "splits.json", {})
    check(root / "splits.json", splits, {str(name): [str] for name in splits})
    for name in itertools.chain(*splits.values()):
        wanted = {"image": str, "short_caption": str, "extra_caption": str}
        entry = read_json(root / "annotations" / name, wanted)
        caption = f"{entry['short_caption']}\n{entry['extra_caption']}"
        sentences = [sentence.strip() for sentence in re.split(r"\n|</s>|\.", caption)]
        yield root / "photos" / entry["image"], [". ".join(filter(None, sentences))]


@captioned
def docci(root, split):
    """DOCCI, split "test" (5,000 pairs): docci_descriptions.jsonlines and images/; newlines to spaces."""
    wanted = {"split": str, "image_file": str, "description": str}
    for _, entry in read_jsonl(root / "docci_descriptions.jsonlines", wanted):
        if entry["split"] == "test":
            yield root / "images" / entry["image_file"], [entry["description"].replace("\n", " ")]


def karpathy(path, split, folder):
    """A split of a file by Karpathy and Fei-Fei."""
    image = {"split": str, "sentences": [{"raw": str}], "filename": str}
    for entry in read_json(path, {"images": [image]})["images"]:
        if entry["split"] == split:
            yield folder / entry["filename"], [sentence["raw"] for sentence in entry["sentences"]]


def coco_captions(path, folder):
    """A file of COCO's own form: pictures in one list, captions in another that names them by id."""
    image = {"id": int, "file_name": str}
    caption = {"image_id": int, "caption": str}
    entries = read_json(path, {"images": [image], "annotations": [caption]})
    captions = {}
    for entry in entries["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for entry in entries["images"]:
        yield folder / entry["file_name"], captions.get(entry["id"], [])


def flickr_captions(path, folder):
    """A header, then a caption a line, `<picture>.jpg,<caption>`; the caption may hold commas and quotes."""
    captions = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name, ending, caption = line.strip().partition(".jpg,")
        if ending:
            captions.setdefault(name, []).append(caption)
        elif number > 1 and name:
            raise damaged(path, f"line {number}: not <picture>.jpg,<caption>")
    for name, own in captions.items():
        yield folder / f"{name}.jpg", own


@captioned
def coco(root, split):
    """COCO 2014, Karpathy's split, in his file or CLIP_benchmark's; val2014/ (5,000 pictures)."""
    path = root / f"coco_{split}_karpathy.json"
    if path.exists():
        return coco_captions(path, root / "val2014")
    return karpathy(root / "dataset_coco.json", split, root / "val2014")


@captioned
def flickr30k(root, split):
    """Flickr30k, Karpathy's split, in his file or CLIP_benchmark's; flickr30k-images/ (1,000 pictures)."""
    folder = root / "flickr30k-images"
    path = root / f"flickr30k_{split}_karpathy.txt"
    if path.exists():
        return flickr_captions(path, folder if folder.is_dir() else root)   # where CLIP_benchmark has them
    return karpathy(root / "dataset_flickr30k.json", split, folder)


# ------------------------------------------------------------------------------------------------------------
# Many languages

def xm3600(root, split="test", most=None):
    """Crossmodal-3600: captions.jsonl, images/<key>.jpg; `most` captions a picture of each language."""
    pictures = []
    languages = {}
    for where, entry in read_jsonl(root / "captions.jsonl", {"image/key": str}):
        for language, part in entry.items():
            if isinstance(part, dict):      # the other keys, image/key and image/locale, are plain strings
                check(where, part, {"caption": list})
                captions = part["caption"] or [""]
                texts, image_of_text = languages.setdefault(language, ([], []))
                for caption in captions[:most]:
                    texts.append(str(caption).strip())
                    image_of_text.append(len(pictures))
        pictures.append(root / f"images/{entry['image/key']}.jpg")
    return pictures, languages


def in_languages(pictures, languages, wanted, root):
    """What xm3600 returns, in the wanted languages only, "en,de" or None for all."""
    wanted = wanted.split(",") if wanted else languages
    for language in wanted:
        if language not in languages:
            path = root / "captions.jsonl"
            raise InputError(f"--language {language}: {path} has only {', '.join(languages)}")
    return pictures, {language: languages[language] for language in wanted}


# ------------------------------------------------------------------------------------------------------------
# Compositionality

def sugarcrepe(root, split="test"):
    """SugarCrepe: seven files of captions over COCO's val2017/; a caption must beat its hard negative."""
    place = {}      # of each picture: several captions share one
    texts = []
    parts = {}
    for part in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        path = root / f"{part}.json"
        entries = read_json(path, {})
        entries = list(entries.values()) if isinstance(entries, dict) else entries
        check(path, entries, [{"filename": str, "caption": str, "negative_caption": str}])
        parts[part] = []
        for entry in entries:
            picture = place.setdefault(root / "val2017" / entry["filename"], len(place))
            n = len(texts)
            texts += [entry["caption"].strip(), entry["negative_caption"].strip()]
            parts[part].append((picture, [((picture, n), (picture, n + 1))]))
    return list(place), texts, parts


def winoground(root, split="test"):
    """Winoground: examples.jsonl and images/; two pictures and two captions of the same words an example.

    text: each picture prefers its own text; image: each text prefers its own picture; group: both.
    """
    names = ("image_0", "caption_0", "image_1", "caption_1")
    pictures = []
    texts = []
    parts = {"text": [], "image": [], "group": []}
    for _, entry in read_jsonl(root / "examples.jsonl", dict.fromkeys(names, str)):
        a = len(pictures)     # picture and text number a belong together, and number b
        b = a + 1
        pictures += [root / f"images/{entry[name]}.png" for name in ("image_0", "image_1")]
        texts += [entry["caption_0"].strip(), entry["caption_1"].strip()]
        text = [((a, a), (a, b)), ((b, b), (b, a))]
        image = [((a, a), (b, a)), ((b, b), (a, b))]
        for part, comparisons in (("text", text), ("image", image), ("group", text + image)):
            parts[part].append((a, comparisons))
    return pictures, texts, parts


# ------------------------------------------------------------------------------------------------------------
# Classes

# A line of a list: the picture's name, a class in it or behind it. A class may be several folders deep.
CLASS_PICTURE = r"/*(?P<picture>(?P<class>[^/].*)/[^/]+)"
PICTURE_CLASS = r"(?P<picture>\S+) (?P<class>.+)"
CLASS_NUMBER = r"(?P<picture>(?P<class>\S+)_\S+).*"


def listed(paths, line_pattern, place):
    """Text files of a picture a line -> pictures, classes. place: a picture's path, with {} for its name.

    Empty lines and those that begin with # say nothing.
    """
    pictures = []
    classes = []
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            found = re.fullmatch(line_pattern, line)
            if not found:
                raise damaged(path, f"line {number}: not class/picture")
            pictures.append(place.parent / place.name.replace("{}", found["picture"]))
            classes.append(found["class"])
    return pictures, classes, {}


def folders(root):
    """<class>/<picture> -> pictures, classes"""
    found = sorted(path for path in need(root).iterdir() if path.is_dir())
    if len(found) < 2:
        raise InputError(f"{root}: {len(found)} class folder(s), at least 2 are needed; {CURE}")
    pictures = [picture for folder in found for picture in pictures_in(folder)]
    names = {folder.name: folder.name.replace("_", " ") for folder in found}
    return pictures, [picture.parent.name for picture in pictures], names


def imagefolder(root, split):
    """<class>/<picture>, or train/<class>/<picture> and test/<class>/<picture>, for any classes."""
    halves = (root / "train").is_dir() and (root / "test").is_dir()
    if split == "train" and not halves:
        raise InputError(f"{root}: no folders train and test, which a linear probe needs; {CURE}")
    return folders(root / split if halves else root)


def imagenet(root, split):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/ is scored as the test split; train/<WordNet id>/."""
    return folders(root / ("train" if split == "train" else "val"))


def food101(root, split):
    root = root / "food-101"
    return listed([root / f"meta/{split}.txt"], CLASS_PICTURE, root / "images/{}.jpg")


def cifar(paths, names, label_bytes):
    """CIFAR's binary version: records of labels and 3 x 32 x 32 bytes. (The Python one is pickled.)"""
    size = label_bytes + 3072
    records = np.empty((0, size), np.uint8)
    for path in paths:
        raw = np.frombuffer(need(path).read_bytes(), np.uint8)
        if len(raw) % size or not len(raw):
            raise damaged(path, f"{len(raw)} bytes are no whole number of records")
        records = np.concatenate([records, raw.reshape(-1, size)])
    pictures = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = records[:, label_bytes - 1].astype(str).tolist()     # CIFAR-100: the fine one
    return list(pictures), classes, numbered(read_text(names).split(), 0)


def numbered(names, first):
    """The names of classes that are numbers, from `first` on"""
    return {str(number): name.replace("_", " ") for number, name in enumerate(names, first)}


def cifar10(root, split):
    root = root / "cifar-10-batches-bin"
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    return cifar([root / file for file in files], root / "batches.meta.txt", 1)


def cifar100(root, split):
    root = root / "cifar-100-binary"
    return cifar([root / f"{split}.bin"], root / "fine_label_names.txt", 2)


def sun397(root, split):
    """SUN397/ and, of the authors' ten partitions, the first: 50 pictures a class to train on, 50 to test.

    Split "all" is every picture, whatever the partitions say.
    """
    if split == "all":
        folder = need(root / "SUN397")
        pictures = sorted(folder.glob("*/*/**/sun_*.jpg"))
        classes = [path.parent.relative_to(folder).as_posix() for path in pictures]
    else:
        paths = [root / f"{split.title()}ing_01.txt"]
        pictures, classes, _ = listed(paths, CLASS_PICTURE, root / "SUN397/{}")
    names = {c: re.sub("[/_]", " ", c.partition("/")[2]) for c in classes}      # a/apse/indoor: apse indoor
    return pictures, classes, names


def cars(root, split):
    """Stanford Cars: cars_train/, cars_test/ and devkit/; the test labels are a file of their own."""
    names = read_mat(root / "devkit/cars_meta.mat", "class_names").astype(str)
    file = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    path = root / "devkit" / file
    if not path.exists():
        path = root / file
    rows = read_mat(path, "annotations")
    folder = root / f"cars_{split}"
    if (folder / folder.name).is_dir():  # as Kaggle packs them
        folder = folder / folder.name
    try:
        pictures = [folder / str(name) for name in rows["fname"]]
        classes = [str(int(number)) for number in rows["class"]]
    except (ValueError, IndexError, TypeError):
        raise damaged(path, "annotations without fname and class") from None
    return pictures, classes, numbered(names.tolist(), 1)


def aircraft(root, split):
    """FGVC-Aircraft, its 100 variants; a line is `<picture> <variant>`."""
    root = root / "fgvc-aircraft-2013b" / "data"
    part = "trainval" if split == "train" else split
    return listed([root / f"images_variant_{part}.txt"], PICTURE_CLASS, root / "images/{}.jpg")


def dtd(root, split):
    """Describable Textures, the first of the authors' ten splits."""
    root = root / "dtd"
    parts = ["test"] if split == "test" else ["train", "val"]
    return listed([root / f"labels/{part}1.txt" for part in parts], CLASS_PICTURE, root / "images/{}")


def pets(root, split):
    """Oxford-IIIT Pets; a line is `<breed>_<number> ...`."""
    part = "trainval" if split == "train" else split
    return listed([root / f"annotations/{part}.txt"], CLASS_NUMBER, root / "images/{}.jpg")


def caltech101(root, split):
    """Caltech-101 has no split of its own: 30 pictures of each class train, drawn here, the rest test."""
    pictures, classes, names = folders(unpacked(root, "101_ObjectCategories") / "101_ObjectCategories")
    rng = np.random.default_rng(0)
    chosen = []
    for name in names:
        own = rng.permutation(np.flatnonzero(np.array(classes) == name)).tolist()
        cut = min(30, len(own) - 1)
        chosen += own[:cut] if split == "train" else own[cut:]
    chosen.sort()
    return [pictures[i] for i in chosen], [classes[i] for i in chosen], names


def flowers102(root, split):
    """Oxford Flowers-102: jpg/, imagelabels.mat, setid.mat; training and validation pictures train."""
    labels = read_numbers(root / "imagelabels.mat", "labels")
    path = root / "setid.mat"
    parts = ["tstid"] if split == "test" else ["trnid", "valid"]
    numbers = [number for part in parts for number in read_numbers(path, part)]
    for number in numbers:
        if not 1 <= number <= len(labels):
            raise damaged(path, f"picture {number} has no label in imagelabels.mat")
    pictures = [root / f"jpg/image_{number:05}.jpg" for number in numbers]
    return pictures, [str(labels[number - 1]) for number in numbers], {}


def fashionmnist(root, split):
    """Fashion-MNIST, in MNIST's format: a big-endian header, then bytes."""
    part = "t10k" if split == "test" else split
    pictures = read_idx(root / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(pictures) != len(labels):
        counts = f"{len(pictures)} pictures and {len(labels)} labels"
        raise InputError(f"{root}: {counts}; fetch both again, {CURE}")
    return list(pictures), labels.astype(str).tolist(), numbered("0123456789", 0)


def read_idx(path, dimensions):
    """Its header: 2048, which means bytes, plus the number of dimensions, then each of them."""
    try:
        raw = gzip.decompress(need(path).read_bytes())
        magic, *shape = np.frombuffer(raw, ">i4", 1 + dimensions)
        if magic != 2048 + dimensions:
            raise ValueError(f"it begins with {magic} instead of {2048 + dimensions}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(path, f"not an IDX file ({error})") from None


def read_classes(path):
    """A file of names and templates -> ({class: (line number, name)}, templates).

    A line with {} is a template, or with {c}, as CLIP_benchmark has it; `class<TAB>name` names a class, lines
    that begin with # are comments.
    """
    names = {}
    templates = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip().replace("{c}", "{}")
        given, tab, name = line.partition("\t")
        if not line or line.startswith("#"):
            continue
        if "{}" in line:
            templates.append(line)
        elif tab:
            names[given.strip()] = number, name.strip()
        else:
            raise InputError(f"{path}: line {number}: {line!r} is neither a template with {{}} nor a class, "
                             "a tab and its name; correct it")
    return names, templates


def class_files(bench, root, language=None):
    """The files of read_classes for a benchmark that there are, those of imagefolder's own folder last.

    CLIP_benchmark's layout brings its own templates, and names whose classes are numbers: these alone count.
    """
    templates = root / "zeroshot_classification_templates.txt"
    if templates.exists() and language:
        raise InputError(f"--language {language}: {root} numbers its classes, as CLIP_benchmark does; "
                         "name a file of yours with --classes")
    if templates.exists():
        return [templates]
    path = CLASSES / (f"{bench}.txt" if language in (None, "en") else f"{bench}.{language}.txt")
    if language and not path.exists():
        raise InputError(f"--language {language}: no file {path}; write one, or name your own with --classes")
    own = [root / "classes.txt", root / "templates.txt"] if bench == "imagefolder" else []
    return [file for file in [path, *own] if file.exists()]


def with_names(pictures, classes, names, files):
    """What a reader of classes returns, and files of read_classes -> pictures, labels: list[int], names,
    templates.

    Names and templates are the last file's that gives any; names the data set's own where none does. A file
    that names classes must name exactly those of the data set.
    """
    names = names or {c: c.replace("_", " ") for c in sorted(set(classes))}
    templates = ["a photo of a {}."]
    given = {}
    for file in files:
        found, own_templates = read_classes(file)
        templates = own_templates or templates
        if found:
            path = file
            given = found
    for c, (line, _) in given.items():
        if c not in names:
            raise InputError(f"{path}: line {line}: the data set has no class {c!r}; correct it, {OWN}")
    for c in names if given else ():
        if c not in given:
            raise InputError(f"{path}: no line for the class {c!r} of the data set; add it, {OWN}")
        names[c] = given[c][1]
    label = {c: i for i, c in enumerate(names)}
    for c in classes:
        if c not in label:
            raise InputError(f"a picture's class is {c!r}, none of the data set's {len(names)}; {AGAIN}")
    return pictures, [label[c] for c in classes], list(names.values()), templates


# ------------------------------------------------------------------------------------------------------------
# Any benchmark as CLIP_benchmark lays it out

class InTar(NamedTuple):
    """A picture in a tar, which is read in place."""
    tar: Path
    name: str
    offset: int     # its first byte
    size: int       # in bytes


def webdataset(root, split, most=None):
    """<split>/0.tar, 1.tar ... of CLIP_benchmark: as a reader of captions or of classes returns it.

    A sample is a picture and .txt, a caption a line, where dataset_type.txt says "retrieval"; else .cls, a
    number. classnames.txt has a name a line. A sample that lacks one of the two is left out and counted.
    Raises InputError where all do.
    """
    says = root / "dataset_type.txt"
    retrieval = says.exists() and "retrieval" in read_text(says).lower()
    kind = "txt" if retrieval else "cls"
    pictures = []
    said = []
    skipped = {}
    for tar in sorted((root / split).glob("*.tar"), key=lambda path: (len(path.stem), path.stem)):
        for folder, key, file, places in tar_samples(tar, skipped):
            suffix = next((suffix for suffix in places if f".{suffix}" in PICTURES), None)
            if suffix is None or kind not in places:
                skip(skipped, f"sample without a picture or without .{kind}", f"{tar}:{folder}{key}")
                continue
            pictures.append(InTar(tar, f"{key}.{suffix}", *places[suffix]))
            offset, size = places[kind]
            file.seek(offset)
            said.append(file.read(min(size, LARGEST_TEXT)).decode("utf-8", "replace"))
    if not pictures:
        raise damaged(root / split, f"no sample of its tars has a picture and .{kind}")
    report_skipped(root / split, skipped)
    if retrieval:
        captions = [text.splitlines()[:most] for text in said]
        image_of_text = [i for i, own in enumerate(captions) for _ in own]
        return pictures, [caption.strip() for own in captions for caption in own], image_of_text
    names = read_text(root / "classnames.txt").splitlines()
    return pictures, [text.strip() for text in said], {str(c): name.strip() for c, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------------
# One's own

def own(captions, folder, prompts):
    """Captions in any form that embed.py reads -> pictures, texts, image_of_text.

    A text is the caption that the prompt set is asked of. Rows of one picture are its several captions; rows
    without one are left out. folder: where the captions' paths start, or where pictures are named by key, as
    files or in tars: they are found as those of a store are.
    """
    skipped = {}
    rows = list(read_captions(captions, skipped))
    report_skipped(captions, skipped)
    listed = SimpleNamespace(path=captions, meta={"captions": {"path": captions}},
                             keys=[row.key for row in rows], images=[row.image for row in rows])
    found, files, places = find_pictures(listed, folder)
    of_row = {}
    for n, (file, offset, size) in zip(found.tolist(), places.tolist()):
        path = Path(files[file])
        of_row[n] = path if size < 0 else InTar(path, rows[n].key, offset, size)
    of_key = {rows[n].key: picture for n, picture in of_row.items()}    # several rows may share a key
    pairs = [(of_row.get(n) or of_key.get(row.key), row.captions[prompts]) for n, row in enumerate(rows)]
    pairs = [pair for pair in pairs if pair[0]]
    if len(pairs) < len(rows):
        print(f"{captions}: {len(rows) - len(pairs)} of {len(rows)} rows have no picture and are left out",
              file=sys.stderr)
    number_of = {}
    for picture, _ in pairs:
        number_of.setdefault(picture, len(number_of))
    return list(number_of), [text for _, text in pairs], [number_of[picture] for picture, _ in pairs]


# ------------------------------------------------------------------------------------------------------------
# The demo

def demo(root, split="test"):
    """The corpus that data/demo.py makes -> scenes, captions, objects, names, synonyms.

    scenes    list[Path], the pictures of <split>.tsv
    captions  {"long" | "short" | "raw" | "reworded": list[str]}, one text a scene
    objects   list of (Path, object, "seen" | "unseen"): single-object pictures. Of each object's pictures,
              in the order of objects.tsv, the first, third ... belong to val and the rest to test.
    names     {language: {object: name}}
    synonyms  {"first" | "second": {object: name}}, of the seen ones
    """
    columns = ["long", "short", "raw", "reworded"]
    rows = read_tsv(root / f"{split}.tsv", ["key", "image", *columns])
    scenes = [root / row["image"] for row in rows]
    captions = {column: [row[column].strip() for row in rows] for column in columns}
    objects = []
    val = {}    # whether an object's last picture belonged to val
    for row in read_tsv(root / "objects.tsv", ["image", "object", "split"]):
        thing = row["object"]
        val[thing] = not val.get(thing, False)
        if val[thing] == (split == "val"):
            objects.append((root / row["image"], thing, row["split"]))
    names = read_names(root / "names.tsv", "en", {thing for _, thing, _ in objects})
    seen = {thing for _, thing, its in objects if its == "seen"}
    synonyms = read_names(root / "synonyms.tsv", "first", seen)
    return scenes, captions, objects, names, synonyms


def read_names(path, column, things):
    """A TSV of names of the demo's objects -> {column: {object: name}}, the wanted column for all things."""
    names = {}
    for row in read_tsv(path, ["object", column]):
        thing = row.pop("object")
        for language, name in row.items():
            names.setdefault(language, {})[thing] = name.strip()
    unnamed = sorted(things - names[column].keys())
    if unnamed:
        raise InputError(f"{path}: no row for {unnamed[0]!r} of objects.tsv; run data/demo.py again")
    return names
