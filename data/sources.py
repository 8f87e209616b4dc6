"""The files of a source -> rows. Each format has a function that yields its entries as dicts {column: value}:

    mine.tsv .csv (.gz)     image<TAB>raw; fields of a CSV may be quoted, and separated by , ; | or tabs
    captions.txt            the same, or lines as in Flickr8k.token.txt: a.jpg#0<TAB>A red kite.
    mine.json .jsonl        a list of objects, or one per line: {"image": "a.jpg", "raw": "A red kite."}
    captions_train.json     COCO's: {"images": [{"id": 1, "file_name": "a.jpg"}],
                                     "annotations": [{"id": 7, "image_id": 1, "caption": "A red kite."}]}
    dataset_flickr8k.json   Karpathy's: {"images": [{"filename": "a.jpg", "split": "train",
                                                     "sentences": [{"raw": "A red kite."}]}]}
    mine.parquet            columns as above; images may be inside
    0.tar                   webdataset: a.jpg  a.txt (raw)  a.long.txt  a.json
    album/                  a.txt beside a.jpg, or metadata.jsonl or metadata.csv

A value is a caption, a list of captions, or a conversation (its first answer). FIELDS has the columns' names.
"""
import codecs
import csv
import glob
import gzip
import hashlib
import json
import os
import re
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import duckdb

from data.common import atomic_save, progress_bar
from data.tars import IMAGE_SUFFIXES, in_processes, tar_names, tar_samples, write_tar
from flame import InputError, PROMPTS, reading

# Names that data sets use for each of our fields. Per row, the first with a value is used. SV: ShareGPT4V's.
FIELDS = {
    "key": ["key", "__key__", "id"],
    "uid": ["uid"],
    "image": ["image", "filepath", "file_name", "filename", "image_name"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption", "captions", "sentences",
            "comment"],
    "short": ["short", "minicpm", "shortSV_captions"],
    "long": ["long", "minicpm", "longSV_captions", "conversations"],
    "split": ["split"],
    "place": ["__place__"],    # the tar and the folder in it where tar_entries found a sample
    "inside": ["__inside__"],  # whether the image itself is in the row
}
# What a folder is searched for, then .txt beside images, then Parquet. Only the first that matches is read.
FOLDER_PATTERNS = ("*.tar", "metadata.jsonl", "metadata.csv", "captions.txt", "*/*.tar")
UNPACKED = "parquet-images"  # in a store; --overwrite deletes it, so it is not called "images" as users' own
SOURCE_FIX = "give a TSV, CSV, JSON, JSONL or Parquet file, or tars"
MAX_TEXT_BYTES = 1 << 24  # read of a .txt or .json file; more than any LLM's context
TOKEN_LINE = re.compile(r"(\S+\.\w+)#(?:\w+#)?\d+[\t ](.*)")
# Whitespace except U+0020. Captions become one line with single spaces; names lose tabs and line breaks.
WHITESPACE = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACES = re.compile(f"[ {WHITESPACE}]*[{WHITESPACE}][ {WHITESPACE}]*|  +")
BREAKS = re.compile("[\0\t\r\n]")
PANDAS_IMAGE = re.compile(r"\{'bytes': .*'path': '(.*)'\}", re.DOTALL)  # an image struct in pandas' to_csv
# Images in Parquet are structs of bytes and path (Hugging Face), or bytes (img2dataset, column jpg).
IMAGE_STRUCT = re.compile(r"STRUCT\((\S+ \S+, )*.?bytes.? BLOB(, \S+ \S+)*\)")
DUCKDB = {"memory_limit": "4GB",  # above it, spills to disk
          "threads": min(8, os.cpu_count() or 1),
          "autoinstall_known_extensions": False, "autoload_known_extensions": False}


class Source(NamedTuple):
    """What an entries function reads. skipped: {reason: places}, to which it adds what it leaves out."""
    name: str
    files: list
    fields: dict  # {field: names of columns}
    skipped: dict


# ------------------------------------------------------------------------------------------------------------
# Entries -> rows

def load(database, spool, name, skipped, chosen, field=""):
    """Append the rows of a source to the table `loaded`, in order, and print the columns that are used.

    chosen: {field: column} for any field of FIELDS. field: the prompt set that a join fills, or "".
    """
    files = source_files(name)
    fields = FIELDS | {each: [column] for each, column in chosen.items()}
    if field:
        fields = {each: fields[each] for each in ("key", "uid", "url", field)}
    source = Source(str(name), files, fields, skipped)
    with reading(files[0], SOURCE_FIX):
        kind = Path(files[0].name.removesuffix(".gz")).suffix.lower()
        if kind == ".txt" and Path(name).is_dir() and files[0].name != "captions.txt":
            kind = "text"
        columns = {}
        if kind == ".parquet":
            relation = parquet_relation(database, source, columns, spool)
        else:
            relation = spooled_relation(ENTRIES.get(kind, table_entries)(source), source, columns, spool)
        used = used_columns(fields, columns)
        names = f"(columns: {', '.join([*columns][:20])})"
        for each in [field] if field else chosen:
            if not used[each]:
                raise InputError(f"{name}: no column {' or '.join(fields[each])} {names}. Name one: --field "
                                 f"{each}=COLUMN, or --join {each}=FILE:COLUMN")
        if columns and not any(map(used.get, PROMPTS)):
            raise InputError(f"{name}: no column for captions {names}. Name the one that has them: --field "
                             "raw=COLUMN. If the first line is a row, put names above it, such as "
                             "image<TAB>raw. Columns are separated by commas in a .csv, by tabs in a .tsv")
        named = "; ".join(f"{each}: {', '.join(found)}" for each, found in used.items()
                          if found and each != "inside")
        print(f"{f'--join {field}: ' if field else ''}{name}, columns {named}")
        database.execute(f"INSERT INTO loaded BY NAME SELECT '{field}' AS field, * FROM {relation}")


def spooled_relation(entries, source, columns, spool):
    """Write rows to a file of JSON lines. Return its SQL relation. Names are added to the dict `columns`."""
    used = used_columns(source.fields, columns)
    with open(spool, "wb") as file:
        for entry in entries:
            if not entry.keys() <= columns.keys():
                columns |= dict.fromkeys(entry)
                used = used_columns(source.fields, columns)
            try:
                row = row_of(entry, used, source.fields)
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            except UnicodeEncodeError:  # was not UTF-8
                file.write(b"{}\n")
    types = {each: f"{each}: 'VARCHAR{'[]' * (each in PROMPTS)}'" for each in source.fields}
    return (f"read_json({quote(spool)}, format='newline_delimited', maximum_object_size=1000000000, "
            f"columns={{{', '.join(types.values())}}})")


def used_columns(fields, columns):
    """Return {field: its columns}: those with one of its names, or else numbered ones, such as caption_0."""
    used = {}
    for field, names in fields.items():
        used[field] = [name for name in names if name in columns]
        if not used[field] and field in PROMPTS:
            used[field] = [column for name in names for column in columns
                           if re.fullmatch(re.escape(name) + r"_?\d+", column)]
    return used


def row_of(entry, used, fields):
    """Return {field: value} of an entry; the value of raw, short and long is a list of captions."""
    row = {}
    for field, columns in used.items():
        values = [entry[column] for column in columns if entry.get(column) is not None]
        if field in PROMPTS and columns and columns[0] not in fields[field]:  # numbered
            values = [values]
        read = captions_in if field in PROMPTS else name_in
        value = next(filter(None, map(read, values)), None)
        if value:
            row[field] = value
    return row


def captions_in(value):
    """Return the captions in a text, in a list of texts or of Karpathy's sentences, or in a conversation."""
    if isinstance(value, str):
        text = SPACES.sub(" ", value).strip(" ")
        return [text] if text else []
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            value = [turn.get("value") for turn in value if turn.get("from") == "gpt"][:1]
        return list(chain.from_iterable(map(captions_in, value)))
    return captions_in(value.get("raw")) if isinstance(value, dict) else []


def name_in(value):
    """Return a key, path or URL on one line, or "". An image struct has its path."""
    if isinstance(value, dict):
        value = value.get("path") or ""
    match = PANDAS_IMAGE.fullmatch(text := str(value))
    return BREAKS.sub(" ", match[1] if match else text)


def quote(text):
    """Return a text as an SQL string."""
    return "'" + str(text).replace("'", "''") + "'"


def in_quotes(column):
    return '"' + column.replace('"', '""') + '"'


# ------------------------------------------------------------------------------------------------------------
# The formats

def table_entries(source):
    """TSV (without quoting), CSV, or token lines. As in img2dataset, empty lines are not rows. A broken row
    yields {} for each of its lines, as it may have swallowed other rows.
    """
    csv.field_size_limit(MAX_TEXT_BYTES)  # beyond it, csv would read on inside the field
    for path in source.files:
        with open_text(path) as file:
            header = file.readline()
            if TOKEN_LINE.match(header):
                for line in chain([header], file):
                    match = TOKEN_LINE.match(line)
                    yield dict(zip(("image", "raw"), match.groups())) if match else {}
                continue
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if ".csv" in path.name.lower() or "\t" not in header and ".tsv" not in path.name.lower():
                form = {"delimiter": max("\t,;|", key=header.count), "strict": True}
            names = list(map(str.strip, next(csv.reader([header], **form))))
            if len(set(names)) < len(names):
                raise InputError(f"{path}: two columns have the same name ({', '.join(names)}); rename one")
            lines = file
            if len(names) == 2 and "://" in header:  # no header, as CC3M and CC12M are distributed
                names = ["url" if "://" in name else "raw" for name in names]
                lines = chain([header], file)
            reader = csv.reader(lines, **form)
            first, row = 0, []
            while row is not None:
                if len(row) == len(names) and not has_swallowed_rows(row, form):
                    yield dict(zip(names, row))
                elif row:
                    yield from [{}] * (reader.line_num - first)
                first = reader.line_num
                try:
                    row = next(reader, None)
                except csv.Error:
                    row = ["broken"] * (len(names) + 1)  # not the length of a row


@contextmanager
def open_text(path):
    """Open a text file, gzipped or not. Raises InputError if it is a zip."""
    with reading(path, SOURCE_FIX), open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        raise InputError(f"{path}: a zip or an Excel file. Unzip it and give the file or folder inside, or "
                         "save the table as CSV UTF-8")
    opener = gzip.open if start == b"\x1f\x8b" else open
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with (reading(path, SOURCE_FIX),
          opener(path, "rt", encoding=encoding, errors="surrogateescape", newline="\n") as file):
        yield file


def has_swallowed_rows(row, form):
    """Return whether all lines inside a quoted field, without the first and the last, would be rows: then a
    quote was opened in one row and closed in another.
    """
    inside = [line for field in row if "\n" in field for line in field.split("\n")[1:-1]]
    return bool(inside) and all(line.count(form["delimiter"]) == len(row) - 1 for line in inside)


def json_entries(source):
    """A list of objects, an object per line (a broken line yields {}), COCO's object or Karpathy's."""
    with duckdb.connect(config=DUCKDB) as database:
        for file in source.files:
            form = "newline_delimited"
            if ".jsonl" not in file.name.lower():
                check_json_list(file)
                form = "auto"
            objects = database.execute(  # COCO's object has 145 MB
                "SELECT json FROM read_json_objects($file, format=$form, ignore_errors=true, "
                "maximum_object_size=201326592)", {"file": glob.escape(os.path.abspath(file)), "form": form})
            while batch := objects.fetchmany(10_000):
                for text, in batch:
                    try:
                        entry = json.loads(text or "{}")
                    except (ValueError, RecursionError):
                        entry = {}
                    yield from entries_of_data_set(entry) if isinstance(entry, dict) else [{}]


def entries_of_data_set(entry):
    """Yield the captions of COCO's object or the images of Karpathy's; an entry of another file as it is."""
    images = entry.get("images")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        yield entry
    elif "annotations" in entry:
        names = {image.get("id"): image.get("file_name") for image in images}
        for text in entry["annotations"]:
            image = names.get(text.get("image_id"))
            yield {"key": text.get("id"), "image": image, "raw": text.get("caption")}
    else:
        for image in images:
            path = [image[name] for name in ("filepath", "filename") if name in image]
            yield image | {"image": "/".join(path)}


def check_json_list(path):
    """Raise InputError if a JSON list is cut off. After a comma, DuckDB does not notice it."""
    with reading(path, "get the whole file"), open(path, "rb") as file:
        if file.read(1 << 10).lstrip()[:1] == b"[":
            file.seek(-min(1 << 10, os.path.getsize(path)), os.SEEK_END)
            if not file.read().rstrip().endswith(b"]"):
                raise ValueError("the list does not end with ]")


def tar_entries(source):
    """webdataset samples. .txt is the raw caption, .long.txt the long one; .json has captions, url or uid."""
    known = set(chain(*(source.fields[name] for name in ("uid", "url", *PROMPTS) if name in source.fields)))
    files = source.files
    places = tar_names(files)

    def read(n, skipped):
        entries = []
        with open(files[n], "rb") as file:
            for folder, key, parts in tar_samples(files[n], skipped):
                entry = {"key": key, "__place__": places[n] + folder}
                for suffix in sorted(parts, key=lambda suffix: suffix.endswith(".txt")):  # .json, then .txt
                    offset, size = parts[suffix]
                    name, _, kind = suffix[1:].rpartition(".")
                    if kind not in ("json", "txt"):
                        continue
                    file.seek(offset)
                    try:
                        text = file.read(min(size, MAX_TEXT_BYTES)).decode("utf-8-sig")
                        values = {name or "raw": text} if kind == "txt" else json.loads(text)
                        entry |= {name: values[name] for name in values.keys() & known}
                    except (ValueError, AttributeError, RecursionError):
                        skipped.setdefault("not UTF-8, or not a JSON object", []).append(
                            f"{files[n]}:{folder}{key}{suffix}")
                entries.append(entry)
        return entries

    entries = in_processes(read, len(files), source.skipped, "reading tars")
    return split_lines(source.name, chain.from_iterable(entries))


def text_entries(source):
    """A folder with a.txt beside a.jpg. `image` is the path in the folder, `key` the same without suffix."""
    images = defaultdict(list)
    for path in map(Path, files_below(source.name, IMAGE_SUFFIXES)):
        images[path.with_suffix("")].append(path.relative_to(source.name))

    def read():
        for file in source.files:
            try:
                image, = images[file.with_suffix("")]
                with open(file, encoding="utf-8-sig") as opened:
                    text = opened.read(MAX_TEXT_BYTES)
                yield {"key": str(image.with_suffix("")), "image": str(image), "raw": text}
            except ValueError:  # UnicodeDecodeError included
                reason = "text with several images beside it, or not UTF-8"
                source.skipped.setdefault(reason, []).append(str(file))

    return split_lines(source.name, read())


def split_lines(source, entries):
    """Make each line of a .txt a caption if most of the first 1,000 files have several lines, as in
    CLIP_benchmark's. Otherwise a file is one caption: web alt texts may contain line breaks. Print which it
    was.
    """
    def lines(entry):
        return list(filter(None, map(str.strip, str(entry.get("raw", "")).split("\n"))))

    first = list(islice(entries, 1000))
    each = 2 * sum(len(lines(entry)) > 1 for entry in first) > len(first)
    count = total = 0
    for entry in chain(first, entries):
        total += 1
        if len(lines(entry)) > 1:
            count += 1
            entry = entry | {"raw": lines(entry)} if each else entry
        yield entry
    if count:
        print(f"{source}: {count} of {total} .txt files have several lines; "
              + ("each line is a caption" if each else "each file is one caption"))


# Parquet. DuckDB copies texts and lists of texts without Python; other values pass through parquet_entries.

def parquet_columns(database, files):
    """Return (SQL relation, {column: type}, SQL of the images inside) of Parquet files."""
    names = ", ".join(quote(glob.escape(os.path.abspath(file))) for file in files)
    relation = f"read_parquet([{names}], union_by_name=true)"
    types = {name: kind for name, kind, *_ in database.execute(f"DESCRIBE FROM {relation}").fetchall()}
    images = [f"{in_quotes(name)}.bytes" for name, kind in types.items() if IMAGE_STRUCT.fullmatch(kind)]
    images += [in_quotes(name) for name, kind in types.items()
               if kind == "BLOB" and name in ("jpg", "jpeg", "png", "webp", "image")]
    return relation, types, images


def parquet_relation(database, source, columns, spool):
    """Return the SQL relation of the rows. Names are added to the dict `columns`."""
    relation, types, images = parquet_columns(database, source.files)
    if len(images) > 1 and "inside" in source.fields:
        raise InputError(f"{source.name}: several columns have images ({', '.join(images)}). Remove those "
                         "that the captions don't describe")
    values = {name: in_quotes(name) for name, kind in types.items() if "BLOB" not in kind}
    values |= {name: f"{in_quotes(name)}.path" for name, kind in types.items()
               if IMAGE_STRUCT.fullmatch(kind) and "path" in kind}
    columns |= dict.fromkeys(values)
    used = used_columns(source.fields, columns)
    if images and "inside" in source.fields:
        values["__inside__"] = f"{images[0]} IS NOT NULL"
    if {types[name] for field in PROMPTS for name in used.get(field, ())} <= {"VARCHAR", "VARCHAR[]"}:
        used = used_columns(source.fields, values)
        rows = [f"{parquet_value(field, used[field], values, types, source.fields)} AS {field}"
                for field in used if used[field]]
        return f"(SELECT {', '.join(rows)} FROM {relation})"
    rows = ", ".join(f"{value} AS {in_quotes(name)}" for name, value in values.items())
    return spooled_relation(parquet_entries(f"SELECT {rows} FROM {relation}"), source, columns, spool)


def parquet_value(field, used, values, types, fields):
    """Return the SQL of a field's value, equal to row_of()."""
    if field == "inside":
        return values[used[0]]
    if field not in PROMPTS:
        texts = [f"nullif(regexp_replace({values[name]}::VARCHAR, '[\\x00\\t\\r\\n]', ' ', 'g'), '')"
                 for name in used]
        return f"coalesce({', '.join(texts)})"
    lists = [values[name] if types[name] == "VARCHAR[]" else f"[{values[name]}]" for name in used]
    if used[0] not in fields[field]:  # numbered
        lists = [f"list_concat({', '.join(lists)})"]
    cleaned = [f"""nullif(list_filter([nullif(trim(regexp_replace(t, {quote(SPACES.pattern)}, ' ', 'g')), '')
        FOR t IN {each}], lambda t: t IS NOT NULL), [])""" for each in lists]
    return f"coalesce({', '.join(cleaned)})"


def parquet_entries(query):
    with duckdb.connect(config=DUCKDB) as database:
        rows = database.execute(query)
        names = [name for name, *_ in rows.description]
        while batch := rows.fetchmany(10_000):
            yield from (dict(zip(names, row)) for row in batch)


def unpack_parquet(captions, folder):
    """Write images that are inside Parquet to tars, one per Parquet file. Return whether there are any.

    Members are named by row number, as write_table sets the column image. Existing tars are kept.
    """
    files = [file for file in source_files(captions) if file.suffix.lower() == ".parquet"]
    first = 0  # row number of a file's first row
    with duckdb.connect(config=DUCKDB) as database:
        for n, file in enumerate(progress_bar(files, "images", unit=" files", disable=not files)):
            with reading(file, SOURCE_FIX):
                tar = folder / f"{n:05d}.tar"
                relation, _, images = parquet_columns(database, [file])
                for image in images[:1]:
                    rows = database.execute(f"""SELECT format('{{:09d}}.jpg', {first} + file_row_number),
                        {image} FROM {relation[:-1]}, file_row_number=true) WHERE {image} IS NOT NULL""")
                    member = None if tar.exists() else rows.fetchone()
                    if member:
                        folder.mkdir(exist_ok=True)
                        members = chain([member], iter(rows.fetchone, None))
                        atomic_save(tar, partial(write_tar, members))
                first += database.execute(f"SELECT count(*) FROM {relation}").fetchone()[0]
    return folder.is_dir()


ENTRIES = {".tar": tar_entries, ".json": json_entries, ".jsonl": json_entries, "text": text_entries}


# ------------------------------------------------------------------------------------------------------------
# The files, name and hash of a source

def source_files(path):
    """Return the files of a source, sorted: one file, a range, a glob, or those of a folder."""
    path = Path(path)
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        here = glob.escape(str(path))
        images = {os.path.splitext(image)[0] for image in files_below(path, IMAGE_SUFFIXES)}
        texts = [text for text in files_below(path, ".txt") if os.path.splitext(text)[0] in images]
        kinds = [*(sorted(glob.iglob(f"{here}/{pattern}")) for pattern in FOLDER_PATTERNS), texts,
                 files_below(path, ".parquet")]
        kinds = [[path for path in kind if Path(path).parent.name != UNPACKED] for kind in kinds]
        paths = next(filter(None, kinds), [])
    elif span:
        before, first, last, after = span.groups()
        paths = (f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last) + 1))
    else:
        paths = [path] if path.exists() else sorted(glob.glob(str(path))) or [path]
    files = []
    for each in paths:  # stops at the first missing file, however long the range is
        with reading(each, SOURCE_FIX) as file:
            files.append(file)
    if not files:
        found = ", ".join(sorted(os.listdir(path))[:3]) if path.is_dir() else "none"
        raise InputError(f"{path}: no captions found (files: {found} ...); {SOURCE_FIX}, or put the "
                         "caption of a.jpg into a.txt beside it. Convert `save_to_disk` output with "
                         "datasets.load_from_disk(DIR).to_parquet(FILE)")
    return files


def files_below(folder, suffixes):
    """Return the sorted paths of the files with one of the suffixes in a folder and its subfolders. Hidden
    files and folders are left out. Follows links, but visits no folder twice.
    """
    def stop(error):
        if os.path.isdir(folder):
            raise error

    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [os.path.join(here, name) for name in names
                  if name.lower().endswith(suffixes) and name[0] != "."]
    return sorted(found)


def split_column(source):
    """FILE:COLUMN -> (FILE, COLUMN); without a column -> (FILE, "")"""
    file, _, column = str(source).rpartition(":")
    return (file, column) if file and not Path(source).exists() else (source, "")


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . (if the current folder is cc3m) -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def hash_sources(sources):
    """Return a SHA-256 over [(prompt set of a join or "", source, chosen columns)]. Of a tar, only the name,
    the size, and 64 KiB at both ends are read.
    """
    digest = hashlib.sha256()
    for field, source, chosen in sources:
        digest.update((field + chosen).encode())
        for file in source_files(source):
            name = os.path.relpath(file, Path(source).parent)
            size = file.stat().st_size
            digest.update(os.fsencode(f"{name} {size}\n"))
            with open(file, "rb") as opened:
                if file.suffix == ".tar":
                    digest.update(opened.read(1 << 16))
                    opened.seek(max(0, size - (1 << 16)))
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
