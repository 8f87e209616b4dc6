"""Every benchmark -> pictures, texts, and which belongs to which.

One short function a benchmark, for the data set exactly as its authors distribute it; README.md beside this file says
where each comes from and how it must lie. Nothing is decoded here: a picture is a path, and evaluate.py finds out
whether it can be read. A caption that is empty is returned as "", so that evaluate.py can count what it leaves out.

Retrieval readers return     (images: list[Path], texts: list[str], image_of_text: list[int]);
classification readers       (images: list[Path], labels: list[int], names: list[str], templates: list[str]);
multilingual readers         (images: list[Path], {language: (texts, image_of_text)}).
Every reader takes the root folder and the split, "test" or, for those in HAS_VAL, "val".
All raise flame.InputError when the folder does not have the layout of README.md.
"""

import json
import re
import sys
from pathlib import Path

import flame

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CURE = "data/README.md says where to get it and how it must lie"


# ---------------------------------------------------------------- reading files

def need(path):
    """The path itself if it exists; flame.InputError naming it otherwise."""
    if not path.exists():
        raise flame.InputError(f"{path}: not found; {CURE}")
    return path


def read_text(path):
    """A whole UTF-8 file. flame.InputError names the line of the first byte that is not UTF-8."""
    raw = need(path).read_bytes()
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
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise flame.InputError(f"{path}: line {number}: not JSON ({error.msg}); "
                                       f"fetch the file again, {CURE}") from None


def field(where, record, *keys):
    """record[key][key]… ; flame.InputError, beginning with `where`, when it is not there."""
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            raise flame.InputError(f"{where}: no {key!r}; fetch the file again, {CURE}") from None
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
    with open(need(path), encoding="utf-8", errors="replace") as file:
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
    for names in read_json(root / "splits.json").values():
        for name in names:
            path = root / "annotations" / name
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
    """A split of a file by Karpathy and Fei-Fei; the first five captions of each picture, as everyone reports."""
    images, texts, image_of_text = [], [], []
    for number, entry in enumerate(field(path, read_json(path), "images")):
        where = f"{path}: entry {number}"
        if field(where, entry, "split") == split:
            for sentence in field(where, entry, "sentences")[:5]:
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

def xm3600(root, split="test"):
    """Crossmodal-3600: captions.jsonl and images/<key>.jpg; the first caption of each language, as CLIP_benchmark does."""
    path = root / "captions.jsonl"
    images, languages = [], {}
    for number, entry in read_jsonl(path):
        for language, record in entry.items():
            if isinstance(record, dict):    # the other keys, image/key and image/locale, are plain strings
                texts, image_of_text = languages.setdefault(language, ([], []))
                texts.append((record.get("caption") or [""])[0].strip())
                image_of_text.append(len(images))
        images.append(root / "images" / f"{field(f'{path}: line {number}', entry, 'image/key')}.jpg")
    return images, languages


# ---------------------------------------------------------------- classes

def imagefolder(root, split="test"):
    """<class>/<picture> for any classes. Two optional text files, both easy to edit:
    classes.txt     one `folder<TAB>name` a line (a folder's own name, `_` read as a space, where there is none);
    templates.txt   one template a line, `{}` standing for the name ("a photo of a {}." where there is none).
    """
    folders = sorted(path for path in need(root).iterdir() if path.is_dir())
    if len(folders) < 2:
        raise flame.InputError(f"{root}: {len(folders)} class folder(s), at least 2 are needed; {CURE}")
    names = {folder.name: folder.name.replace("_", " ") for folder in folders}
    if (root / "classes.txt").exists():
        listed = {}
        for number, line in enumerate(read_text(root / "classes.txt").splitlines(), 1):
            if line.strip():
                folder, tab, name = line.partition("\t")
                if not tab or not name.strip() or folder not in names:
                    raise flame.InputError(f"{root / 'classes.txt'}: line {number}: {line!r} is not an existing class "
                                           "folder, a tab and a name; correct the line or rename the folder")
                listed[folder] = name.strip()
        unnamed = sorted(names.keys() - listed.keys())
        if unnamed:
            raise flame.InputError(f"{root / 'classes.txt'}: no line for the folder {unnamed[0]!r}; add it")
        names = listed
    templates = ["a photo of a {}."]
    if (root / "templates.txt").exists():
        templates = [line.strip() for line in read_text(root / "templates.txt").splitlines() if line.strip()]
        bad = [template for template in templates if "{}" not in template]
        if bad or not templates:
            raise flame.InputError(f"{root / 'templates.txt'}: every line needs a {{}} for the class name; correct it")
    images, labels = [], []
    for label, folder in enumerate(folders):
        pictures = pictures_in(folder)
        images += pictures
        labels += [label] * len(pictures)
    return images, labels, [names[folder.name] for folder in folders], templates


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


RETRIEVAL = {"urban1k": urban1k, "sharegpt4v": sharegpt4v, "dci": dci, "docci": docci, "coco": coco, "flickr30k": flickr30k}
MULTILINGUAL = {"xm3600": xm3600}
CLASSIFICATION = {"imagefolder": imagefolder}
HAS_VAL = {"demo", "coco", "flickr30k"}     # the others come with nothing but a test split
