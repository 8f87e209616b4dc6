"""A source of captions, a file, several by a range or a glob, or a folder (data/README.md): its files, its
name and hash, and what others call its fields.
"""
import glob
import hashlib
import os
import re
from pathlib import Path

from flame import InputError, reading

# Our fields and the picture's URL by others' names; the first that is present counts. SV: ShareGPT4V's.
NAMES = {
    "key": ["key", "__key__", "id"],
    "image": ["image", "filepath", "file_name", "filename"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption"],
    "short": ["short", "shortSV_captions"],
    "long": ["long", "longSV_captions", "conversations"],
}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOLDERS = ("*.tar", "metadata.jsonl", "metadata.csv", "**/*.txt", "**/*.parquet")
WANTED = "give a TSV, CSV, JSON, JSONL or Parquet file, or tars"


def source_files(path):
    """The files that a source names, sorted: one, a range, a glob, or what a folder has."""
    path = Path(path)
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        here = glob.escape(str(path))
        kinds = (sorted(glob.iglob(f"{here}/{pattern}", recursive=True)) for pattern in FOLDERS)  # links too
        paths = next(filter(None, kinds), [])
    elif span:
        before, first, last, after = span.groups()
        paths = (f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last) + 1))
    else:
        paths = [path] if path.exists() else sorted(glob.glob(str(path))) or [path]
    files = []
    for each in paths:  # the first that is missing ends it, however long the range is
        with reading(each, WANTED) as file:
            files.append(file)
    if not files:
        raise InputError(f"{path}: holds no captions; {WANTED}, or the folder that metadata.csv lies in; of "
                         "what datasets saved make Parquet, datasets.load_from_disk(DIR).to_parquet(FILE)")
    return files


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . in cc3m/ -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def fingerprint(sources):
    """SHA-256 of what captions come from, [(prompt set of a join or "", source)], in hexadecimal; of a tar,
    gigabytes of pictures, name and size."""
    digest = hashlib.sha256()
    for field, source in sources:
        digest.update(field.encode())
        for file in source_files(source):
            if file.suffix == ".txt" and not picture_beside(file):
                continue  # no caption; train.py may write one there
            name = os.path.relpath(file, Path(source).parent)
            digest.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
            if file.suffix != ".tar":
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def picture_beside(file):
    """The picture of a caption's file, None where there is none."""
    names = (file.with_suffix(end) for suffix in PICTURES for end in (suffix, suffix.upper()))
    return next(filter(Path.is_file, names), None)
