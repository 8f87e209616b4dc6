"""Make the training, dev and test files of Flickr8k from your own download, in any form in which it comes.

    python tests/flickr8k.py FOLDER data/flickr8k
    python embed.py --captions data/flickr8k/train.tsv    # then train.py
    python evaluate.py --bench flickr8k                   # --split val is dev

FOLDER has, unpacked or in zips or tars, in any subfolders, the photos and one of these:

    Flickr8k.token.txt      the original distribution (github.com/jbrownlee/Datasets, releases:
                            Flickr8k_text.zip, Flickr8k_Dataset.zip), with Flickr_8k.*Images.txt
    dataset_flickr8k.json   Karpathy's (cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)
    captions.txt            Kaggle's (adityajn105/flickr8k). It has no split; add Flickr_8k.*Images.txt
    *.parquet               with the photos inside, and a column split or files named by their split

and, for Chinese, flickr8kzhc.caption.txt (github.com/li-xirong/flickr8kcn). It makes in data/flickr8k:

    {train,val,test}.tsv    image, raw: five rows for each of 6,000, 1,000 and 1,000 photos, in random order
    {val,test}-zh.tsv       five Chinese captions by native speakers for each of the same photos
    images/                 128 x 128 px; photos of this size are copied

The photos are for non-commercial research and belong to their owners. Sources: Hodosh, Young, Hockenmaier,
JAIR 47, 2013; Li, Lan, Dong, Liu, ICMR 2016.
"""
import argparse
import contextlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.captions import SPLITS, read_table, write_table  # noqa: E402
from data.common import (  # noqa: E402
    Parser, atomic_save, output_folder, progress_bar, report_skipped, run_stage, write_text)
from data.sources import unpack_parquet  # noqa: E402
from flame import InputError, reading  # noqa: E402

SIZE = 128, 128
CAPTIONS = ("Flickr8k.token.txt", "dataset_flickr8k.json", "captions.txt")
CHINESE = "flickr8kzhc.caption.txt"
NAME_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
              "test": "Flickr_8k.testImages.txt"}
FIX = "see python tests/flickr8k.py --help for the files"


def files_in(folder):
    """Return {name: function that returns the bytes} of the files of a folder and of its zips and tars."""
    files = {}
    for path in sorted(filter(Path.is_file, Path(folder).rglob("*"))):
        with reading(path, "download it again"):
            if path.suffix == ".zip":
                archive = zipfile.ZipFile(path)
                files |= {os.path.basename(name): partial(archive.read, name) for name in archive.namelist()}
            elif path.suffix == ".tar":
                tar = tarfile.open(path)
                files |= {os.path.basename(member.name): lambda tar=tar, member=member:
                          tar.extractfile(member).read() for member in tar if member.isfile()}
            else:
                files[path.name] = path.read_bytes
    return {name: read for name, read in files.items() if not name.startswith(".")}


def captions_of_images(source, split, scratch):
    """Return {name of the image: its captions} of a split of a file, or of all if it has no splits."""
    with contextlib.redirect_stdout(io.StringIO()):
        write_table(scratch / "captions.tsv", str(source), split=split)
    captions = defaultdict(list)
    for row in read_table(scratch / "captions.tsv"):
        captions[os.path.basename(row.image)].append(row.raw)
    return captions


def parquet_of_split(files, split, scratch):
    """Put the Parquet files of a split into a folder, and the images inside them into files, as SPLIT-NAME.
    Return the folder.
    """
    parquet = [name for name in files if name.endswith(".parquet")]
    named = [name for name in parquet if name.startswith(tuple(SPLITS[split]))]
    if not parquet:
        raise InputError(f"none of {', '.join(CAPTIONS)} and *.parquet; {FIX}")
    folder = scratch / split
    folder.mkdir()
    for name in named or parquet:
        (folder / name).write_bytes(files[name]())
    unpack_parquet(str(folder), scratch / "images")
    files |= {f"{split}-{name}": read for name, read in files_in(scratch / "images").items()}
    shutil.rmtree(scratch / "images")
    return folder


def read_splits(files, scratch):
    """Return {split: {name of the image: its captions}}, and the Chinese captions as {name: captions}."""
    for name in (*CAPTIONS, CHINESE):
        if name in files:
            (scratch / name).write_bytes(files[name]())
    source = next(filter(Path.exists, (scratch / name for name in CAPTIONS)), None)
    splits = {}
    for split, names in NAME_LISTS.items():
        captions = captions_of_images(source or parquet_of_split(files, split, scratch), split, scratch)
        if not source:
            captions = {f"{split}-{name}": texts for name, texts in captions.items()}
        wanted = set(files[names]().decode().split()) if names in files else captions
        splits[split] = {name: captions[name] for name in sorted(captions) if name in wanted}
    if [*splits["train"].values()] == [*splits["test"].values()]:
        raise InputError(f"the captions have no split; add {', '.join(NAME_LISTS.values())}; {FIX}")
    chinese = scratch / CHINESE
    return splits, captions_of_images(chinese, "test", scratch) if chinese.exists() else {}


def resized(data):
    """Return the bytes of an image file at 128 x 128 px."""
    with Image.open(io.BytesIO(data)) as image:
        if image.size == SIZE:
            image.load()  # raises if the file is damaged
            return data
        jpeg = io.BytesIO()
        image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=95)
        return jpeg.getvalue()


def make_corpus(folder, out):
    files = files_in(folder)
    skipped = defaultdict(list)
    with output_folder(out / "images"), tempfile.TemporaryDirectory() as scratch:
        splits, chinese = read_splits(files, Path(scratch))
        for split, captions in splits.items():
            names = np.random.default_rng(0).permutation([*captions]).tolist()
            for name in progress_bar(names, split, unit=" images"):
                if name not in files:
                    skipped["no photo"].append(name)
                elif not (out / "images" / name).exists():
                    try:
                        data = resized(files[name]())
                    except Exception:  # decoders can raise any exception on corrupt bytes
                        skipped["broken photo"].append(name)
                        continue
                    atomic_save(out / "images" / name, lambda path: Path(path).write_bytes(data))
            missing = set(chain(*skipped.values()))
            for texts, file in (captions, f"{split}.tsv"), (chinese, f"{split}-zh.tsv"):
                rows = [(f"images/{name}", text) for name in names if name not in missing
                        for text in texts.get(name, ())]
                if rows and file != "train-zh.tsv":
                    lines = ["\t".join(row) + "\n" for row in [("image", "raw"), *rows]]
                    write_text(out / file, "".join(lines))
                    print(f"-> {out / file}: {len(rows)} captions")
    for reason, names in skipped.items():
        report_skipped(folder, reason, len(names), names)


def main(argv=None):
    def body():
        parser = Parser(description=__doc__)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("folder", help="your download")
        parser.add_argument("out", help="folder of the corpus, such as data/flickr8k")
        args = parser.parse_args(argv)
        make_corpus(args.folder, Path(args.out))

    return run_stage("tests/flickr8k.py", body, "run the same command again")


if __name__ == "__main__":
    sys.exit(main())
