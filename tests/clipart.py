"""Make a corpus of drawings and photos with captions that people wrote, from three Debian packages.

    apt-get download openclipart-png openclipart-svg tuxpaint-stamps-default
    for package in *.deb; do dpkg-deb -x $package packages; done
    python tests/clipart.py packages data/clipart    # prints how many rows each rule removes

Clip art has a title, keywords and sometimes a description, in the metadata of its SVG file. A stamp of Tux
Paint has a sentence in English, and its translations by volunteers. These files are made in data/clipart:

    {train,val,test}.tsv    key, image, raw, short, long. Clip art: the title; title and keywords; title,
                            description, keywords and folders. train.tsv also has stamps: one sentence.
                            Rows are in random order.
    {val,test}-en.tsv       the stamps of a split, in English; -fr.tsv ... in 29 languages of Crossmodal-3600
    images/                 96 px, on white

Clip art is in the public domain (openclipart.org); the stamps are GPL-2 (Bill Kendrick and others).
"""
import html
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import Parser, progress_bar, run_stage  # noqa: E402
from flame import InputError  # noqa: E402

SIDE = 96
MAX_REPEATS = 20         # a title that more files have is the name of a collection
MAX_CORRELATION = 0.9    # between thumbnails of images in different splits
VAL = 0.1                # fraction of the titles in the validation split
TEST = 0.2, 0.5          # in the test split: of clip art, of stamps
LANGUAGES = set("en ar cs da de el es fa fi fr he hi hr hu id it ja ko nb nl pl pt ro ru sv th tr uk vi "
                "zh_CN".split())
JUNK_TITLE = re.compile(r"clip ?art|\bicons?\b|iconset|theme|collection|submission|untitled|\.svg|_|^\W*\d",
                        re.IGNORECASE)
JUNK_KEYWORD = re.compile(r"|.*\bhash\b.*|unsorted|clip ?art|externally linked|icon|lemon theme icon")
ELEMENT = r"<(?:\w+:)?{0}\b[^>]*>(.*?)</(?:\w+:)?{0}>"


def texts_of(name, xml):
    """Return the text of each XML element with this name."""
    contents = re.findall(ELEMENT.format(name), xml, re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split()) for text in contents]


def clipart(root):
    """Yield (path of the PNG, raw, short, long, {}) for each SVG file; it has no translations."""
    for svg in sorted((root / "svg").rglob("*.svg")):
        text = svg.read_text("utf-8", "replace")
        metadata, subject = ("".join(re.findall(ELEMENT.format(name), text, re.DOTALL)[:1])
                             for name in ("metadata", "subject"))
        title, description = ("".join(texts_of(name, metadata)[:1]) for name in ("title", "description"))
        words = dict.fromkeys(word.replace("_", " ").lower().strip() for word in texts_of("li", subject))
        keywords = ", ".join(word for word in words if not JUNK_KEYWORD.fullmatch(word))
        path = svg.relative_to(root / "svg")
        folders = ", ".join(part.replace("_", " ") for part in path.parts[:-1] if part != "unsorted")
        parts = [title, "" if "HASH(" in description else description, keywords, folders]
        long = ". ".join(part.rstrip(".") for part in parts if part)
        yield (root / "png" / path).with_suffix(".png"), title, f"{title}: {keywords}".rstrip(": "), long, {}


def stamps(root):
    """Yield (path of the PNG, raw, short, long, {language: sentence}) for each stamp."""
    for path in sorted(root.rglob("*.txt")):
        english, *lines = path.read_text("utf-8", "replace").strip().splitlines() or [""]
        translations = dict(line.split(".utf8=", 1) for line in lines if ".utf8=" in line)
        sentences = {language: text for language, text in translations.items() if text != english}
        yield path.with_suffix(".png"), *3 * [english], {"en": english} | sentences


def plain_words(text):
    """Return a text in lower case without digits and punctuation: "tree" for "Tree 2" and "tree_03"."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text.lower()).split())


def open_on_white(path):
    """Return the image on a white square of SIDE pixels, or None if it is empty or cannot be read."""
    try:
        image = Image.open(path).convert("RGBA")
    except Exception:  # decoders can raise any exception; one image has 231 million pixels
        return None
    image.thumbnail((SIDE, SIDE))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2), image)
    return square if np.ptp(np.asarray(square)) > 16 else None


def usable_rows(rows, removed):
    """Return the rows that no rule removes, and their images. Counts the others in `removed`."""
    repeats = Counter(plain_words(row[1]) for row in rows)
    good = []
    for row in progress_bar(rows, "images"):
        path, title, _, long, sentences = row
        if not sentences and repeats[plain_words(title)] > MAX_REPEATS:
            removed[f"title of more than {MAX_REPEATS} files"] += 1
        elif not sentences and (JUNK_TITLE.search(title) or len(plain_words(title)) < 3):
            removed["title is a file name, a number or a collection"] += 1
        elif len(set(plain_words(long).split())) < 2:
            removed["fewer than two words"] += 1
        elif not (image := open_on_white(path)):
            removed["no image, or an empty one"] += 1
        else:
            good.append((row, image))
    return zip(*good)


def assign_splits(rows, images, removed):
    """Return the split of each row, "" if it is removed. Equal titles are in the same split."""
    titles = np.array([plain_words(row[1]) for row in rows])
    is_stamp = dict(zip(titles, map(bool, [sentences for *_, sentences in rows])))
    rng = np.random.default_rng(0)
    split_of = {name: "val" if (draw := rng.random()) < VAL else
                "test" if draw < VAL + TEST[is_stamp[name]] else "train" for name in sorted(is_stamp)}
    splits = np.array([split_of[name] for name in titles])
    x = np.array([np.asarray(image.convert("L").resize((16, 16)), float).ravel() for image in images])
    x -= x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for split, others in {"val": ["train"], "test": ["train", "val"]}.items():
        own = np.flatnonzero(splits == split)
        leaks = own[(x[own] @ x[np.isin(splits, others)].T).max(1) > MAX_CORRELATION]
        splits[leaks] = ""
        removed[f"{split} image too similar to one of {' or '.join(others)}"] = len(leaks)
    seen = set()
    for n in np.flatnonzero(splits):
        # A retrieval test needs one image per title; in training, several are welcome.
        marks = {(splits[n], images[n].tobytes())} | ({titles[n]} if splits[n] != "train" else set())
        if marks & seen:
            removed["image or, in val and test, title of an earlier row of the split"] += 1
            splits[n] = ""
        seen |= marks
    return splits


def make_corpus(packages, out):
    """Write the corpus to the folder `out`. Raises InputError if the packages are not there."""
    share = Path(packages, "usr/share")
    rows = [*clipart(share / "openclipart"), *stamps(share / "tuxpaint/stamps")]
    if not rows:
        raise InputError(f"{share}: no clip art or stamps; unpack the packages there with dpkg-deb -x")
    removed = Counter()
    rows, images = usable_rows(rows, removed)
    splits = assign_splits(rows, images, removed)
    (Path(out) / "images").mkdir(parents=True, exist_ok=True)
    tables = defaultdict(lambda: [("key", "image", "raw", "short", "long")])
    for n in np.random.default_rng(0).permutation(np.flatnonzero(splits)):
        _, *captions, sentences = rows[n]
        key, name = f"{n:05d}", f"images/{n:05d}.png"
        images[n].save(Path(out, name))
        if splits[n] == "train" or not sentences:
            tables[splits[n]].append((key, name, *captions))
        else:
            for language in sorted(LANGUAGES & sentences.keys()):
                tables[f"{splits[n]}-{language}"].append((key, name, *3 * [sentences[language]]))
    for name, table in sorted(tables.items()):
        lines = ["\t".join(" ".join(field.split()) for field in row) + "\n" for row in table]
        Path(out, f"{name}.tsv").write_text("".join(lines), "utf-8")
        print(f"{name}.tsv: {len(table) - 1} rows")
    for rule, count in removed.items():
        print(f"removed {count}: {rule}")


def main(argv=None):
    def body():
        parser = Parser(description=__doc__.split("\n")[0])
        parser.add_argument("packages", help="folder of the unpacked packages")
        parser.add_argument("out", help="folder of the corpus, such as data/clipart")
        args = parser.parse_args(argv)
        make_corpus(args.packages, args.out)

    return run_stage("tests/clipart.py", body, "run the same command again")


if __name__ == "__main__":
    sys.exit(main())
