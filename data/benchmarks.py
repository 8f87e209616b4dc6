"""Every benchmark -> pictures, texts, and which belongs to which.

One short function a benchmark, for the data set exactly as its authors distribute it; README.md beside this
file says where each comes from and how it must lie. Nothing is decoded here: a picture is a path, or uint8
[H, W] or [H, W, 3] where the authors pack all pictures into one file, and evaluate.py finds out whether it
can be read. A caption that is empty is returned as "", so that evaluate.py can count what it leaves out.

Readers take the root folder and the split, "test" or, for those in HAS_VAL, "val" and, for classification,
"train":
captions         (pictures, texts: list[str], image_of_text: list[int])
many languages   (pictures, {language: (texts, image_of_text)})
compositionality (pictures, texts, {part: rows}); a row is (what it is resampled with, comparisons), a
comparison two pairs
                 (picture, text); the row is right if the first pair of each of its comparisons scores higher
                 than the second
classes          (pictures, classes: list[str], one a picture, {class: name}); with_names() makes labels and
templates of it All raise flame.InputError when the folder does not have the layout of README.md. The table of
them is in evaluate.py.
"""
import gzip
import itertools
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

from data.captions import json_entries
from flame import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CURE = "data/README.md says where to get it and how it must lie"
AGAIN = f"fetch the file again, {CURE}"
OWN = "or name your own list with --classes"
HAS_VAL = {"demo", "coco", "flickr30k"}         # the others come with nothing but a test split
CLASSES = Path(__file__).parent / "classes"     # the names and templates that come with this repository


# ------------------------------------------------------------------------------------------------------------
# Reading files

def need(path):
    """The path itself if it exists; flame.InputError naming it otherwise."""
    if not path.exists():
        raise InputError(f"{path}: not found; {CURE}")
    return path


def need_file(path):
    """The path itself if it is a regular file: a pipe would be waited for without end."""
    if not need(path).is_file():
        raise InputError(f"{path}: not a regular file; {CURE}")
    return path


def read_text(path):
    """A whole UTF-8 file. flame.InputError names the line of the first byte that is not UTF-8."""
    raw = need_file(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None


def read_lines(path):
    """The lines of a text file that are not empty, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def parsed(path, text, line=1):
    """The JSON in a text that begins at a line of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise InputError(f"{path}: line {line}: not JSON ({error}); {AGAIN}") from None


def read_jsonl(path):
    """One object a line; yields (what to call it in a message, object)."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            entry = parsed(path, text, line)
            if not isinstance(entry, dict):
                raise InputError(f"{path}: line {line}: not a JSON object; {AGAIN}")
            yield f"{path}: line {line}", entry


def field(where, record, *keys, kind=str):
    """record[key][key]… ; raises InputError, beginning with `where`, unless it is there and of that kind."""
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            raise InputError(f"{where}: no {key!r}; {AGAIN}") from None
    if not isinstance(record, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(one.__name__ for one in kinds)
        raise InputError(f"{where}: {keys[-1]!r} is not a {names}; {AGAIN}")
    return record


def line_of(where, record, key):
    """A text that goes over several lines, as one."""
    return field(where, record, key).replace("\n", " ").strip()


def read_tsv(path, columns):
    """A TSV with a header that names at least `columns` -> list of dicts, one a row.

    Rows with too few or too many fields are left out and counted on stderr: a benchmark is not lost to one
    bad row.
    """
    lines = [line.rstrip("\r") for line in read_text(path).split("\n")]
    header = lines[0].split("\t")
    for column in columns:
        if column not in header:
            wanted = " ".join(columns)
            raise InputError(f"{path}: line 1: no column {column!r}; the header must name {wanted}")
    rows = []
    bad = []
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) == len(header):
            rows.append(dict(zip(header, fields)))
        elif line.strip():
            bad.append(number)
    if bad:
        count = f"{len(bad)} such row(s) left out"
        print(f"{path}: line {bad[0]}: not {len(header)} fields; {count}", file=sys.stderr)
    if not rows:
        raise InputError(f"{path}: no rows; {CURE}")
    return rows


def read_mat(path, variable, dtype=None):
    """A variable of a MATLAB file -> array [n]. Two data sets alone need it, so scipy is optional."""
    need_file(path)
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path}: a MATLAB file; to read it, pip install scipy") from None
    try:
        variables = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises nearly anything on a broken file
        why = " ".join(str(error).split())
        raise InputError(f"{path}: not a MATLAB file ({why}); {AGAIN}") from None
    values = np.atleast_1d(field(path, variables, variable, kind=object))
    try:
        return values.astype(dtype) if dtype else values
    except (ValueError, TypeError):
        raise InputError(f"{path}: {variable!r} is no list of {dtype.__name__}; {AGAIN}") from None


def need_folder(path):
    """The path itself if it is a folder."""
    if not need(path).is_dir():
        raise InputError(f"{path}: not a folder; {CURE}")
    return path


def pictures_in(folder, deep=False):
    """The files in a folder that are named like pictures; deep: in its folders too."""
    found = need_folder(folder).rglob("*") if deep else need_folder(folder).iterdir()
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


# ------------------------------------------------------------------------------------------------------------
# Long captions

def urban1k(root, split="test"):
    """image/<name>.jpg and caption/<name>.txt, whose first line is the caption (Long-CLIP, 1,000 pairs)."""
    pictures = {path.stem: path for path in pictures_in(root / "image")}
    captions = {path.stem: path for path in need(root / "caption").glob("*.txt")}
    pairs = []
    # Either half may miss its partner. Both kinds are passed on, so that evaluate.py counts them like other
    # bad items.
    for name in sorted(pictures.keys() | captions.keys()):
        text = read_text(captions[name]).split("\n")[0].strip() if name in captions else ""
        pairs.append((pictures.get(name, root / "image" / f"{name}.jpg"), text))
    return one_each(pairs)


def one_each(pairs):
    """[(picture, text)] -> pictures, texts, image_of_text"""
    return [picture for picture, _ in pairs], [text for _, text in pairs], list(range(len(pairs)))


def sharegpt4v(root, split="test"):
    """The first 1,000 of the ShareGPT4V captions: second turn, newlines to spaces (Long-CLIP's choice)."""
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    pairs = []
    with open(need_file(path), "rb") as file:   # 1.5 GB for 1.2 million entries: only these are decoded
        for number, entry in enumerate(itertools.islice(json_entries(file, path, AGAIN), 1000)):
            where = f"{path}: entry {number}"
            picture = root / field(where, entry, "image")
            answer = field(where, entry, "conversations", 1, kind=dict)
            pairs.append((picture, line_of(where, answer, "value")))
    return one_each(pairs)


def dci(root, split="test"):
    """Densely Captioned Images, all splits: short caption, newline, extra caption, re-joined by sentences."""
    root = root / "densely_captioned_images"
    splits = parsed(root / "splits.json", read_text(root / "splits.json"))
    pairs = []
    for split in splits if isinstance(splits, (dict, list)) else ["train"]:
        for name in field(root / "splits.json", splits, split, kind=list):
            path = root / "annotations" / str(name)
            entry = parsed(path, read_text(path))
            caption = f"{field(path, entry, 'short_caption')}\n{field(path, entry, 'extra_caption')}"
            sentences = [sentence.strip() for sentence in re.split(r"\n|</s>|\.", caption)]
            text = ". ".join(sentence for sentence in sentences if sentence)
            pairs.append((root / "photos" / field(path, entry, "image"), text))
    return one_each(pairs)


def docci(root, split="test"):
    """DOCCI, split "test" (5,000 pairs): docci_descriptions.jsonlines and images/; newlines to spaces."""
    pairs = []
    for where, entry in read_jsonl(root / "docci_descriptions.jsonlines"):
        if field(where, entry, "split") == "test":
            picture = root / "images" / field(where, entry, "image_file")
            pairs.append((picture, line_of(where, entry, "description")))
    return one_each(pairs)


# ------------------------------------------------------------------------------------------------------------
# Short captions

def karpathy(path, split, folder):
    """A split of a file by Karpathy and Fei-Fei; the first five captions of each picture."""
    images = []
    texts = []
    image_of_text = []
    for number, entry in enumerate(field(path, parsed(path, read_text(path)), "images", kind=list)):
        where = f"{path}: entry {number}"
        if field(where, entry, "split") == split:
            for sentence in field(where, entry, "sentences", kind=list)[:5]:
                texts.append(field(where, sentence, "raw").strip())
                image_of_text.append(len(images))
            images.append(folder / field(where, entry, "filename"))
    return images, texts, image_of_text


def coco(root, split="test"):
    """COCO 2014, Karpathy's split: dataset_coco.json and val2014/ (5,000 pictures, 25,000 captions)."""
    return karpathy(root / "dataset_coco.json", split, root / "val2014")


def flickr30k(root, split="test"):
    """Flickr30k, Karpathy's split: dataset_flickr30k.json, flickr30k-images/ (1,000 pictures)."""
    return karpathy(root / "dataset_flickr30k.json", split, root / "flickr30k-images")


# ------------------------------------------------------------------------------------------------------------
# Many languages

def xm3600(root, split="test", all_captions=False):
    """Crossmodal-3600: captions.jsonl, images/<key>.jpg; a language's first caption a picture, or all."""
    images = []
    languages = {}
    for where, entry in read_jsonl(root / "captions.jsonl"):
        for language, part in entry.items():
            if isinstance(part, dict):      # the other keys, image/key and image/locale, are plain strings
                captions = field(where, part, "caption", kind=list) or [""]
                texts, image_of_text = languages.setdefault(language, ([], []))
                for caption in captions if all_captions else captions[:1]:
                    texts.append(str(caption).strip())
                    image_of_text.append(len(images))
        images.append(root / "images" / f"{field(where, entry, 'image/key')}.jpg")
    return images, languages


def in_languages(pictures, languages, wanted, root):
    """What xm3600 returns, in the wanted languages only, "en,de" or None for all."""
    wanted = wanted.split(",") if wanted else list(languages)
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
        entries = field(path, [parsed(path, read_text(path))], 0, kind=(dict, list))
        parts[part] = []
        for number, entry in entries.items() if isinstance(entries, dict) else enumerate(entries):
            where = f"{path}: entry {number}"
            picture = place.setdefault(root / "val2017" / field(where, entry, "filename"), len(place))
            right = picture, len(texts)
            wrong = picture, len(texts) + 1
            texts += [field(where, entry, "caption").strip(), field(where, entry, "negative_caption").strip()]
            parts[part].append((picture, [(right, wrong)]))
    return list(place), texts, parts


def winoground(root, split="test"):
    """Winoground: examples.jsonl and images/; two pictures and two captions of the same words an example.

    text: each picture prefers its own text; image: each text prefers its own picture; group: both.
    """
    images = []
    texts = []
    parts = {"text": [], "image": [], "group": []}
    for where, entry in read_jsonl(root / "examples.jsonl"):
        a = len(images)     # picture and text number a belong together, and number b
        b = a + 1
        for i in (0, 1):
            images.append(root / "images" / f"{field(where, entry, f'image_{i}')}.png")
            texts.append(field(where, entry, f"caption_{i}").strip())
        text = [((a, a), (a, b)), ((b, b), (b, a))]
        image = [((a, a), (b, a)), ((b, b), (a, b))]
        parts["text"].append((a, text))
        parts["image"].append((a, image))
        parts["group"].append((a, text + image))
    return images, texts, parts


# ------------------------------------------------------------------------------------------------------------
# Classes

def listed(paths, folder, suffix=""):
    """Text files of lines `class/name` -> pictures, classes; a class may be several folders deep."""
    pictures = []
    classes = []
    for path in paths:
        for number, line in enumerate(read_lines(path), 1):
            line = line.strip("/")
            if "/" not in line:
                raise InputError(f"{path}: line {number}: not class/picture; {AGAIN}")
            pictures.append(folder / f"{line}{suffix}")
            classes.append(line.rpartition("/")[0])
    return pictures, classes, {}


def folders(root):
    """<class>/<picture> -> pictures, classes"""
    found = sorted(path for path in need(root).iterdir() if path.is_dir())
    if len(found) < 2:
        raise InputError(f"{root}: {len(found)} class folder(s), at least 2 are needed; {CURE}")
    pictures = [picture for folder in found for picture in pictures_in(folder)]
    names = {folder.name: folder.name.replace("_", " ") for folder in found}
    return pictures, [picture.parent.name for picture in pictures], names


def imagefolder(root, split="test"):
    """<class>/<picture>, or train/<class>/<picture> and test/<class>/<picture>, for any classes."""
    halves = (root / "train").is_dir() and (root / "test").is_dir()
    if split == "train" and not halves:
        raise InputError(f"{root}: no folders train and test, which a linear probe needs; {CURE}")
    return folders(root / split if halves else root)


def imagenet(root, split="test"):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/ is scored as the test split; train/<WordNet id>/."""
    return folders(root / ("train" if split == "train" else "val"))


def food101(root, split="test"):
    root = root / "food-101"
    return listed([root / "meta" / f"{split}.txt"], root / "images", ".jpg")


def cifar(paths, names, label_bytes):
    """CIFAR's binary version: records of labels and 3 x 32 x 32 bytes. (The Python one is pickled.)"""
    pictures = []
    classes = []
    for path in paths:
        raw = np.frombuffer(need_file(path).read_bytes(), np.uint8)
        if len(raw) % (label_bytes + 3072) or not len(raw):
            raise InputError(f"{path}: {len(raw)} bytes are no whole number of records; {AGAIN}")
        records = raw.reshape(-1, label_bytes + 3072)
        pictures += list(records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        classes += [str(label) for label in records[:, label_bytes - 1]]    # CIFAR-100: the fine one
    names = enumerate(read_lines(names))
    return pictures, classes, {str(label): name.replace("_", " ") for label, name in names}


def cifar10(root, split="test"):
    root = root / "cifar-10-batches-bin"
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    return cifar([root / file for file in files], root / "batches.meta.txt", 1)


def cifar100(root, split="test"):
    root = root / "cifar-100-binary"
    return cifar([root / f"{split}.bin"], root / "fine_label_names.txt", 2)


def sun397(root, split="test"):
    """SUN397/ and, of the authors' ten partitions, the first: 50 pictures a class to train on, 50 to test."""
    pictures, classes, _ = listed([root / f"{split.title()}ing_01.txt"], root / "SUN397")
    names = {c: re.sub("[/_]", " ", c.partition("/")[2]) for c in classes}      # a/apse/indoor: apse indoor
    return pictures, classes, names


def cars(root, split="test"):
    """Stanford Cars: cars_train/, cars_test/ and devkit/; the test labels are a file of their own."""
    names = read_mat(root / "devkit" / "cars_meta.mat", "class_names", str)
    file = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    path = root / "devkit" / file
    if not path.exists():
        path = root / file
    pictures = []
    classes = []
    try:
        for row in read_mat(path, "annotations"):
            pictures.append(root / f"cars_{split}" / str(row["fname"]))
            classes.append(str(int(row["class"])))
    except (ValueError, IndexError, TypeError):
        raise InputError(f"{path}: annotations without fname and class; {AGAIN}") from None
    return pictures, classes, {str(number): name for number, name in enumerate(names.tolist(), 1)}


def aircraft(root, split="test"):
    """FGVC-Aircraft, its 100 variants; a line is `<picture> <variant>`."""
    root = root / "fgvc-aircraft-2013b" / "data"
    part = "trainval" if split == "train" else split
    lines = [line.split(" ", 1) for line in read_lines(root / f"images_variant_{part}.txt")]
    return [root / "images" / f"{line[0]}.jpg" for line in lines], [line[-1] for line in lines], {}


def dtd(root, split="test"):
    """Describable Textures, the first of the authors' ten splits."""
    root = root / "dtd"
    parts = ["test"] if split == "test" else ["train", "val"]
    return listed([root / "labels" / f"{part}1.txt" for part in parts], root / "images")


def pets(root, split="test"):
    """Oxford-IIIT Pets; a line is `<breed>_<number> ...`."""
    lines = read_lines(root / "annotations" / ("trainval.txt" if split == "train" else f"{split}.txt"))
    names = [line.split()[0] for line in lines if line[0] != "#"]
    pictures = [root / "images" / f"{name}.jpg" for name in names]
    return pictures, [name.rpartition("_")[0] for name in names], {}


def caltech101(root, split="test"):
    """Caltech-101 has no split of its own: 30 pictures of each class train, drawn here, the rest test."""
    pictures, classes, names = folders(root / "101_ObjectCategories")
    rng = np.random.default_rng(0)
    chosen = []
    for name in names:
        own = rng.permutation(np.flatnonzero(np.array(classes) == name))
        cut = min(30, len(own) - 1)
        chosen += own[:cut].tolist() if split == "train" else own[cut:].tolist()
    chosen.sort()
    return [pictures[i] for i in chosen], [classes[i] for i in chosen], names


def flowers102(root, split="test"):
    """Oxford Flowers-102: jpg/, imagelabels.mat, setid.mat; training and validation pictures train."""
    labels = read_mat(root / "imagelabels.mat", "labels", int)
    parts = ["tstid"] if split == "test" else ["trnid", "valid"]
    numbers = [number for part in parts for number in read_mat(root / "setid.mat", part, int)]
    for number in numbers:
        if not 1 <= number <= len(labels):
            path = root / "setid.mat"
            raise InputError(f"{path}: picture {number} has no label in imagelabels.mat; {AGAIN}")
    pictures = [root / "jpg" / f"image_{number:05}.jpg" for number in numbers]
    classes = [str(labels[number - 1]) for number in numbers]
    return pictures, classes, {}


def fashionmnist(root, split="test"):
    """Fashion-MNIST, in MNIST's format: a big-endian header, then bytes."""
    part = "t10k" if split == "test" else split
    pictures = read_idx(root / f"{part}-images-idx3-ubyte.gz", 2051, 3)
    labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz", 2049, 1)
    if len(pictures) != len(labels):
        counts = f"{len(pictures)} pictures and {len(labels)} labels"
        raise InputError(f"{root}: {counts}; fetch both again, {CURE}")
    return list(pictures), [str(label) for label in labels], {str(i): str(i) for i in range(10)}


def read_idx(path, magic, dimensions):
    need_file(path)
    try:
        raw = gzip.decompress(path.read_bytes())
        first, *shape = np.frombuffer(raw, ">i4", 1 + dimensions)
        if first != magic:
            raise ValueError(f"it begins with {first} instead of {magic}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not an IDX file ({error}); {AGAIN}") from None


def read_classes(path):
    """A file of names and templates -> ({class: (line number, name)}, templates).

    A line with {} is a template, `class<TAB>name` names a class, lines that begin with # are comments.
    """
    names = {}
    templates = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.startswith("#") or not line.strip():
            continue
        given, _, name = line.partition("\t")
        if "{}" in line:
            templates.append(line.strip())
        elif name.strip():
            names[given.strip()] = number, name.strip()
        else:
            raise InputError(f"{path}: line {number}: {line!r} is neither a template with {{}} nor a class, "
                             "a tab and its name; correct it")
    return names, templates


def class_files(bench, root, language=None):
    """The files of read_classes for a benchmark that there are, those of imagefolder's own folder last."""
    path = CLASSES / (f"{bench}.txt" if language in (None, "en") else f"{bench}.{language}.txt")
    if language and not path.exists():
        raise InputError(f"--language {language}: no file {path}; write one, or name your own with --classes")
    own = [root / "classes.txt", root / "templates.txt"] if bench == "imagefolder" else []
    return [file for file in [path, *own] if file.exists()]


def with_names(pictures, classes, names, files):
    """What a reader of classes returns, and files of read_classes -> (pictures, labels: list[int], names,
    templates).

    Names and templates are the last file's that gives any; names the data set's own where none does. A file
    that names classes must name exactly those of the data set.
    """
    names = names or {c: c.replace("_", " ") for c in sorted(set(classes))}
    templates = ["a photo of a {}."]
    path = None
    for file in files:
        found, own_templates = read_classes(file)
        templates = own_templates or templates
        if found:
            path = file
            given = found
    if path:
        for c, (line, _) in given.items():
            if c not in names:
                raise InputError(f"{path}: line {line}: the data set has no class {c!r}; correct it, {OWN}")
        for c in names:
            if c not in given:
                raise InputError(f"{path}: no line for the class {c!r} of the data set; add it, {OWN}")
        names = {c: given[c][1] for c in names}
    label = {c: i for i, c in enumerate(names)}
    for c in classes:
        if c not in label:
            raise InputError(f"a picture's class is {c!r}, none of the data set's {len(names)}; {AGAIN}")
    return pictures, [label[c] for c in classes], list(names.values()), templates


# ------------------------------------------------------------------------------------------------------------
# The demo

def demo(root, split="test"):
    """The corpus that data/demo.py makes -> scenes, captions, objects, names, synonyms.

    scenes    list[Path], the pictures of <split>.tsv
    captions  {"long" | "short" | "raw" | "reworded": list[str]}, one text a scene
    objects   list of (Path, object, "seen" | "unseen"): single-object pictures. Of each object's pictures,
              in the order of objects.tsv, every second one belongs to val, beginning with the first, and the rest to test.
    names     {language: {object: name}}
    synonyms  {"first" | "second": {object: name}}
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
    things = {thing for _, thing, _ in objects}
    names = read_names(root / "names.tsv", "en", things)
    synonyms = read_names(root / "synonyms.tsv", "first", things)
    return scenes, captions, objects, names, synonyms


def read_names(path, column, things):
    """A TSV of names of the demo's objects -> {column: {object: name}}; it must name the things in one column at least."""
    names = {}
    for row in read_tsv(path, ["object", column]):
        thing = row.pop("object")
        for language, name in row.items():
            names.setdefault(language, {})[thing] = name.strip()
    unnamed = sorted(things - names[column].keys())
    if unnamed:
        raise InputError(f"{path}: no row for {unnamed[0]!r} of objects.tsv; run data/demo.py again")
    return names
