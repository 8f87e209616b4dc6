"""Every benchmark -> pictures, texts, and which belongs to which.

One short function a benchmark, for the data set exactly as its authors distribute it; README.md beside this file says
where each comes from and how it must lie. Nothing is decoded here: a picture is a path, or uint8 [H, W] or [H, W, 3] where
the authors pack all pictures into one file, and evaluate.py finds out whether it can be read. A caption that is empty is
returned as "", so that evaluate.py can count what it leaves out.

Readers take the root folder and the split, "test" or, for those in HAS_VAL, "val" and, for classification, "train":
captions         (pictures, texts: list[str], image_of_text: list[int])
many languages   (pictures, {language: (texts, image_of_text)})
compositionality (pictures, texts, {part: rows}); a row is (what it is resampled with, comparisons), a comparison two pairs
                 (picture, text); the row is right if the first pair of each of its comparisons scores higher than the second
classes          (pictures, classes: list[str], one a picture, {class: name}); with_names() makes labels and templates of it
All raise flame.InputError when the folder does not have the layout of README.md. The table of them is in evaluate.py.
"""

import gzip
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

import flame

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CURE = "data/README.md says where to get it and how it must lie"


# ---------------------------------------------------------------- reading files

def need(path):
    """The path itself if it exists; flame.InputError naming it otherwise."""
    if not path.exists():
        raise flame.InputError(f"{path}: not found; {CURE}")
    return path


def need_file(path):
    """The path itself if it is a regular file: a pipe would be waited for without end."""
    if not need(path).is_file():
        raise flame.InputError(f"{path}: not a regular file; {CURE}")
    return path


def read_text(path):
    """A whole UTF-8 file. flame.InputError names the line of the first byte that is not UTF-8."""
    raw = need_file(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise flame.InputError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise flame.InputError(f"{path}: line {error.lineno}: not JSON ({error.msg}); fetch the file again, {CURE}") from None


def read_jsonl(path):
    """One object a line; yields (line number, object)."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise flame.InputError(f"{path}: line {number}: not JSON ({error.msg}); "
                                       f"fetch the file again, {CURE}") from None
            if not isinstance(entry, dict):
                raise flame.InputError(f"{path}: line {number}: not a JSON object; fetch the file again, {CURE}")
            yield number, entry


def field(where, record, *keys, kind=str):
    """record[key][key]… ; flame.InputError, beginning with `where`, when it is not there or not of that kind."""
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            raise flame.InputError(f"{where}: no {key!r}; fetch the file again, {CURE}") from None
    if not isinstance(record, kind):
        raise flame.InputError(f"{where}: {keys[-1]!r} is not a {kind.__name__}; fetch the file again, {CURE}")
    return record


def read_tsv(path, columns):
    """A TSV with a header that names at least `columns` -> list of dicts, one a row.

    Rows with too few or too many fields are left out and counted on stderr: a benchmark is not lost to one bad row.
    """
    lines = read_text(path).split("\n")
    header = lines[0].rstrip("\r").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        raise flame.InputError(f"{path}: line 1: no column {missing[0]!r}; the header must name {' '.join(columns)}")
    rows, bad = [], []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            fields = line.rstrip("\r").split("\t")
            if len(fields) == len(header):
                rows.append(dict(zip(header, fields)))
            else:
                bad.append(number)
    if bad:
        print(f"{path}: line {bad[0]}: not {len(header)} fields; {len(bad)} such row(s) left out", file=sys.stderr)
    if not rows:
        raise flame.InputError(f"{path}: no rows; {CURE}")
    return rows


def read_lines(path):
    """The lines of a text file that are not empty, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_mat(path):
    """A MATLAB file -> {variable: array}. Only Stanford Cars and Flowers-102 need it, hence scipy is no requirement."""
    need_file(path)
    try:
        from scipy.io import loadmat
    except ImportError:
        raise flame.InputError(f"{path}: a MATLAB file; to read it, pip install scipy") from None
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises nearly anything on a broken file
        raise flame.InputError(f"{path}: not a MATLAB file ({' '.join(str(error).split())}); fetch it again, {CURE}") from None


def pictures_in(folder):
    return sorted(path for path in need(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


# ---------------------------------------------------------------- long captions

def urban1k(root, split="test"):
    """image/<name>.jpg and caption/<name>.txt, the first line of which is the caption (Long-CLIP, 1,000 pairs)."""
    pictures = {path.stem: path for path in pictures_in(root / "image")}
    captions = {path.stem: path for path in need(root / "caption").glob("*.txt")}
    # Either half may miss its partner. Both kinds are passed on, so that evaluate.py counts them like other bad items.
    names = sorted(pictures.keys() | captions.keys())
    images = [pictures.get(name, root / "image" / f"{name}.jpg") for name in names]
    texts = [read_text(captions[name]).split("\n")[0].strip() if name in captions else "" for name in names]
    return images, texts, list(range(len(names)))


def sharegpt4v(root, split="test"):
    """The first 1,000 entries of the ShareGPT4V captions: second turn, newlines to spaces (Long-CLIP's choice)."""
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    # The file is 1.5 GB for 1.2 million entries and the first thousand take about 2 MB of it: decode only those.
    with open(need_file(path), encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 25)
    decoder, entries, position = json.JSONDecoder(), [], text.find("[") + 1
    while len(entries) < 1000:
        position = re.compile(r"[\s,]*").match(text, position).end()
        if text[position:position + 1] == "]":
            break
        try:
            entry, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            line = text.count("\n", 0, position) + 1
            raise flame.InputError(f"{path}: line {line}: not a JSON list of entries; fetch the file again, {CURE}") from None
        entries.append(entry)
    images, texts = [], []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        images.append(root / field(where, entry, "image"))
        texts.append(field(where, entry, "conversations", 1, "value").replace("\n", " ").strip())
    return images, texts, list(range(len(texts)))


def dci(root, split="test"):
    """Densely Captioned Images, all splits: short caption, newline, extra caption, re-joined sentence by sentence."""
    root = root / "densely_captioned_images"
    images, texts = [], []
    splits = read_json(root / "splits.json")
    for split in splits:
        for name in field(root / "splits.json", splits, split, kind=list):
            path = root / "annotations" / str(name)
            entry = read_json(path)
            images.append(root / "photos" / field(path, entry, "image"))
            caption = f"{field(path, entry, 'short_caption')}\n{field(path, entry, 'extra_caption')}"
            pieces = [piece.strip() for piece in re.split(r"\n|</s>|\.", caption)]
            texts.append(". ".join(piece for piece in pieces if piece))
    return images, texts, list(range(len(texts)))


def docci(root, split="test"):
    """DOCCI, split "test" (5,000 pairs): docci_descriptions.jsonlines and images/; newlines to spaces."""
    path = root / "docci_descriptions.jsonlines"
    images, texts = [], []
    for number, entry in read_jsonl(path):
        where = f"{path}: line {number}"
        if field(where, entry, "split") == "test":
            images.append(root / "images" / field(where, entry, "image_file"))
            texts.append(field(where, entry, "description").replace("\n", " ").strip())
    return images, texts, list(range(len(texts)))


# ---------------------------------------------------------------- short captions

def karpathy(path, split, picture):
    """A split of a file by Karpathy and Fei-Fei; the first five captions of each picture."""
    images, texts, image_of_text = [], [], []
    for number, entry in enumerate(field(path, read_json(path), "images", kind=list)):
        where = f"{path}: entry {number}"
        if field(where, entry, "split") == split:
            for sentence in field(where, entry, "sentences", kind=list)[:5]:
                texts.append(field(where, sentence, "raw").strip())
                image_of_text.append(len(images))
            images.append(picture(entry))
    return images, texts, image_of_text


def coco(root, split="test"):
    """COCO 2014, Karpathy's split: dataset_coco.json and val2014/ (5,000 pictures, 25,000 captions)."""
    path = root / "dataset_coco.json"
    return karpathy(path, split, lambda entry: root / field(path, entry, "filepath") / field(path, entry, "filename"))


def flickr30k(root, split="test"):
    """Flickr30k, Karpathy's split: dataset_flickr30k.json and flickr30k-images/ (1,000 pictures, 5,000 captions)."""
    path = root / "dataset_flickr30k.json"
    return karpathy(path, split, lambda entry: root / "flickr30k-images" / field(path, entry, "filename"))


# ---------------------------------------------------------------- many languages

def xm3600(root, split="test", all_captions=False):
    """Crossmodal-3600: captions.jsonl and images/<key>.jpg; the first caption of each language, as CLIP_benchmark does."""
    path = root / "captions.jsonl"
    images, languages = [], {}
    for number, entry in read_jsonl(path):
        where = f"{path}: line {number}"
        for language in entry:
            if isinstance(entry[language], dict):    # the other keys, image/key and image/locale, are plain strings
                texts, image_of_text = languages.setdefault(language, ([], []))
                captions = [str(caption).strip() for caption in field(where, entry, language, "caption", kind=list)] or [""]
                captions = captions if all_captions else captions[:1]
                texts += captions
                image_of_text += [len(images)] * len(captions)
        images.append(root / "images" / f"{field(where, entry, 'image/key')}.jpg")
    return images, languages


def in_languages(pictures, languages, wanted, root):
    """What xm3600 returns, in the wanted languages only, "en,de" or None for all."""
    wanted = wanted.split(",") if wanted else list(languages)
    for language in wanted:
        if language not in languages:
            raise flame.InputError(f"--language {language}: {root / 'captions.jsonl'} has only {', '.join(languages)}")
    return pictures, {language: languages[language] for language in wanted}


# ---------------------------------------------------------------- compositionality

def sugarcrepe(root, split="test"):
    """SugarCrepe: seven files of captions and hard negatives over COCO's val2017/; a caption must beat its negative."""
    images, texts, parts = {}, [], {}
    for part in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        path = root / f"{part}.json"
        entries, parts[part] = read_json(path), []
        for number, entry in enumerate(entries) if isinstance(entries, list) else field(path, [entries], 0, kind=dict).items():
            where = f"{path}: entry {number}"
            picture, right = images.setdefault(root / "val2017" / field(where, entry, "filename"), len(images)), len(texts)
            parts[part].append((picture, [((picture, right), (picture, right + 1))]))
            texts += [field(where, entry, "caption").strip(), field(where, entry, "negative_caption").strip()]
    return list(images), texts, parts


def winoground(root, split="test"):
    """Winoground: examples.jsonl and images/; two pictures and two captions of the same words an example.

    text: each picture prefers its own text; image: each text prefers its own picture; group: both.
    """
    images, texts, parts = [], [], {"text": [], "image": [], "group": []}
    for number, entry in read_jsonl(root / "examples.jsonl"):
        where, a, b = f"{root / 'examples.jsonl'}: line {number}", len(images), len(images) + 1
        for i in (0, 1):
            images.append(root / "images" / f"{field(where, entry, f'image_{i}')}.png")
            texts.append(field(where, entry, f"caption_{i}").strip())
        text, image = [((a, a), (a, b)), ((b, b), (b, a))], [((a, a), (b, a)), ((b, b), (a, b))]     # picture and text number a belong together
        for part, comparisons in (("text", text), ("image", image), ("group", text + image)):
            parts[part].append((a, comparisons))
    return images, texts, parts


# ---------------------------------------------------------------- classes

CLASSES = Path(__file__).parent / "classes"     # the names and templates that come with this repository


def listed(path, folder, suffix=""):
    """A text file of lines `class/name` -> pictures, classes; a class may be several folders deep."""
    lines = [line.strip("/") for line in read_lines(path)]
    bad = next((number for number, line in enumerate(lines, 1) if "/" not in line), None)
    if bad:
        raise flame.InputError(f"{path}: line {bad}: not class/picture; fetch the file again, {CURE}")
    return [folder / f"{line}{suffix}" for line in lines], [line.rpartition("/")[0] for line in lines], {}


def folders(root):
    """<class>/<picture> -> pictures, classes"""
    found = sorted(path for path in need(root).iterdir() if path.is_dir())
    if len(found) < 2:
        raise flame.InputError(f"{root}: {len(found)} class folder(s), at least 2 are needed; {CURE}")
    inside = [pictures_in(folder) for folder in found]
    classes = [folder.name for folder, pictures in zip(found, inside) for _ in pictures]
    return sum(inside, []), classes, {folder.name: folder.name.replace("_", " ") for folder in found}


def imagefolder(root, split="test"):
    """<class>/<picture> for any classes, or train/<class>/<picture> and test/<class>/<picture>; for a class's name its folder's."""
    halves = (root / "train").is_dir() and (root / "test").is_dir()
    if split == "train" and not halves:
        raise flame.InputError(f"{root}: no folders train and test, which a linear probe needs; {CURE}")
    return folders(root / split if halves else root)


def imagenet(root, split="test"):
    """ImageNet (ILSVRC 2012): val/<WordNet id>/ is scored as the test split; train/<WordNet id>/."""
    return folders(root / ("train" if split == "train" else "val"))


def food101(root, split="test"):
    root = root / "food-101"
    return listed(root / "meta" / f"{split}.txt", root / "images", ".jpg")


def cifar(paths, names, label_bytes):
    """CIFAR's binary version (the Python one is pickled, and pickles can run code): records of labels and 3 x 32 x 32 bytes."""
    pictures, classes, names = [], [], dict(enumerate(read_lines(names)))
    for path in paths:
        raw = np.frombuffer(need_file(path).read_bytes(), np.uint8)
        if len(raw) % (label_bytes + 3072) or not len(raw):
            raise flame.InputError(f"{path}: {len(raw)} bytes are no whole number of records; fetch it again, {CURE}")
        records = raw.reshape(-1, label_bytes + 3072)
        pictures += list(records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        classes += [str(label) for label in records[:, label_bytes - 1]]    # CIFAR-100: the coarse label comes before the fine
    return pictures, classes, {str(label): name.replace("_", " ") for label, name in names.items()}


def cifar10(root, split="test"):
    root = root / "cifar-10-batches-bin"
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    return cifar([root / file for file in files], root / "batches.meta.txt", 1)


def cifar100(root, split="test"):
    root = root / "cifar-100-binary"
    return cifar([root / f"{split}.bin"], root / "fine_label_names.txt", 2)


def sun397(root, split="test"):
    """SUN397/ and, of the authors' ten partitions, the first: 50 pictures a class to train on and 50 to test."""
    pictures, classes, _ = listed(root / f"{split.title()}ing_01.txt", root / "SUN397")
    return pictures, classes, {c: c.partition("/")[2].replace("/", " ").replace("_", " ") for c in classes}    # a/apse/indoor


def cars(root, split="test"):
    """Stanford Cars: cars_train/, cars_test/ and devkit/; the test labels are a file of their own."""
    files = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    path = root / "devkit" / files[split]
    path = path if path.exists() else root / files[split]
    names = np.atleast_1d(field(root / "devkit" / "cars_meta.mat", read_mat(root / "devkit" / "cars_meta.mat"), "class_names", kind=object))
    rows = np.atleast_1d(field(path, read_mat(path), "annotations", kind=object))
    try:
        pictures, classes = [root / f"cars_{split}" / str(row["fname"]) for row in rows], [str(int(row["class"])) for row in rows]
    except (ValueError, IndexError, TypeError):
        raise flame.InputError(f"{path}: annotations without fname and class; fetch the file again, {CURE}") from None
    return pictures, classes, {str(number): str(name) for number, name in enumerate(names, 1)}


def aircraft(root, split="test"):
    """FGVC-Aircraft, its 100 variants; a line is `<picture> <variant>`."""
    root = root / "fgvc-aircraft-2013b" / "data"
    lines = [line.partition(" ") for line in read_lines(root / f"images_variant_{'trainval' if split == 'train' else split}.txt")]
    return [root / "images" / f"{name}.jpg" for name, _, _ in lines], [variant for _, _, variant in lines], {}


def dtd(root, split="test"):
    """Describable Textures, the first of the authors' ten splits."""
    root = root / "dtd"
    parts = [listed(root / "labels" / f"{part}1.txt", root / "images") for part in (("test",) if split == "test" else ("train", "val"))]
    return sum((part[0] for part in parts), []), sum((part[1] for part in parts), []), {}


def pets(root, split="test"):
    """Oxford-IIIT Pets; a line is `<breed>_<number> ...`."""
    names = [line.split()[0] for line in read_lines(root / "annotations" / f"{'trainval' if split == 'train' else split}.txt") if line[0] != "#"]
    return [root / "images" / f"{name}.jpg" for name in names], [name.rpartition("_")[0] for name in names], {}


def caltech101(root, split="test"):
    """Caltech-101 has no split of its own: as in CLIP's, 30 pictures of each of 102 classes train (drawn here), the rest test."""
    pictures, classes, names = folders(root / "101_ObjectCategories")
    rng, chosen, classes = np.random.default_rng(0), [], np.array(classes)
    for name in names:
        own = rng.permutation(np.flatnonzero(classes == name))
        cut = min(30, len(own) - 1)
        chosen += own[:cut].tolist() if split == "train" else own[cut:].tolist()
    return [pictures[i] for i in sorted(chosen)], [str(classes[i]) for i in sorted(chosen)], names


def flowers102(root, split="test"):
    """Oxford Flowers-102: jpg/, imagelabels.mat and setid.mat; training and validation pictures together train, as in CLIP's."""
    labels = np.atleast_1d(field(root / "imagelabels.mat", read_mat(root / "imagelabels.mat"), "labels", kind=object))
    sets = read_mat(root / "setid.mat")
    ids = [number for part in (("tstid",) if split == "test" else ("trnid", "valid"))
           for number in np.atleast_1d(field(root / "setid.mat", sets, part, kind=object))]
    if max(ids) > len(labels):
        raise flame.InputError(f"{root / 'setid.mat'}: picture {max(ids)} has no label in imagelabels.mat; fetch both again, {CURE}")
    return [root / "jpg" / f"image_{i:05}.jpg" for i in ids], [str(labels[i - 1]) for i in ids], {str(label): str(label) for label in np.unique(labels)}


def fashionmnist(root, split="test"):
    """Fashion-MNIST, in MNIST's format: a big-endian header, then bytes."""
    def read(name, magic, dimensions):
        path = root / f"{'t10k' if split == 'test' else split}-{name}-ubyte.gz"
        try:
            raw = gzip.decompress(need_file(path).read_bytes())
            shape = np.frombuffer(raw, ">i4", 1 + dimensions)
            if shape[0] != magic:
                raise ValueError(f"it begins with {shape[0]} instead of {magic}")
            return np.frombuffer(raw, np.uint8, offset=4 * len(shape)).reshape(shape[1:])
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise flame.InputError(f"{path}: not an IDX file ({error}); fetch it again, {CURE}") from None

    pictures, labels = read("images-idx3", 2051, 3), read("labels-idx1", 2049, 1)
    if len(pictures) != len(labels):
        raise flame.InputError(f"{root}: {len(pictures)} pictures and {len(labels)} labels; fetch both again, {CURE}")
    return list(pictures), [str(label) for label in labels], {str(i): str(i) for i in range(10)}


def read_classes(path):
    """A file of names and templates -> ({class: (line number, name)}, templates).

    A line with {} is a template, `class<TAB>name` names a class, lines that begin with # are comments.
    """
    names, templates = {}, []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name = line.partition("\t")[2].strip()
        if line.startswith("#") or not line.strip():
            continue
        if "{}" in line:
            templates.append(line.strip())
        elif name:
            names[line.partition("\t")[0].strip()] = number, name
        else:
            raise flame.InputError(f"{path}: line {number}: {line!r} is neither a template with {{}} nor a class, a tab and its name; correct it")
    return names, templates


def class_files(bench, root, language=None):
    """The files of read_classes for a benchmark that there are, those of imagefolder's own folder last."""
    path = CLASSES / (f"{bench}.txt" if language in (None, "en") else f"{bench}.{language}.txt")
    if language and not path.exists():
        raise flame.InputError(f"--language {language}: no file {path}; write one, or name your own with --classes")
    own = [root / "classes.txt", root / "templates.txt"] if bench == "imagefolder" else []
    return [file for file in [path, *own] if file.exists()]


def with_names(pictures, classes, names, files):
    """What a CLASSIFICATION reader returns, and files of read_classes -> (pictures, labels: list[int], names, templates).

    Names and templates are the last file's that gives any; names the data set's own where none does. A file that names
    classes must name exactly those of the data set.
    """
    names, templates, path = names or {c: c.replace("_", " ") for c in sorted(set(classes))}, ["a photo of a {}."], None
    for file in files:
        given, own_templates = read_classes(file)
        templates = own_templates or templates
        if given:
            path, listed_names = file, given
    if path:
        if unknown := [c for c in listed_names if c not in names]:
            raise flame.InputError(f"{path}: line {listed_names[unknown[0]][0]}: the data set has no class {unknown[0]!r}; correct the line, "
                                   "or name your own list with --classes")
        if unnamed := [c for c in names if c not in listed_names]:
            raise flame.InputError(f"{path}: no line for the class {unnamed[0]!r} of the data set; add it, or name your own list with --classes")
        names = {c: listed_names[c][1] for c in names}
    label = {c: i for i, c in enumerate(names)}
    return pictures, [label[c] for c in classes], list(names.values()), templates


# ---------------------------------------------------------------- the demo

def demo(root, split="test"):
    """The corpus that data/demo.py makes -> scenes, captions, objects, names.

    scenes    list[Path], the pictures of <split>.tsv
    captions  {"long" | "short" | "raw": list[str]}, one text a scene
    objects   list of (Path, object, "seen" | "unseen"): single-object pictures. Of each object's pictures, in the order
              of objects.tsv, every second one belongs to val, beginning with the first, and the rest to test.
    names     {language: {object: name}}
    """
    rows = read_tsv(root / f"{split}.tsv", ["key", "image", "raw", "short", "long"])
    scenes = [root / row["image"] for row in rows]
    captions = {column: [row[column].strip() for row in rows] for column in ("long", "short", "raw")}
    objects, seen_so_far = [], {}
    for row in read_tsv(root / "objects.tsv", ["image", "object", "split"]):
        index = seen_so_far[row["object"]] = seen_so_far.get(row["object"], -1) + 1
        if (index % 2 == 0) == (split == "val"):
            objects.append((root / row["image"], row["object"], row["split"]))
    rows = read_tsv(root / "names.tsv", ["object", "en"])
    names = {language: {row["object"]: row[language].strip() for row in rows} for language in rows[0] if language != "object"}
    unnamed = sorted({name for _, name, _ in objects} - names["en"].keys())
    if unnamed:
        raise flame.InputError(f"{root / 'names.tsv'}: no row for {unnamed[0]!r} of objects.tsv; run data/demo.py again")
    return scenes, captions, objects, names


HAS_VAL = {"demo", "coco", "flickr30k"}     # the others come with nothing but a test split
