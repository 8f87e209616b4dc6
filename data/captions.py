"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the code reads.

A source is a file, several files (a range or a glob) or a folder; data/README.md lists the formats. Python
reads TSV, CSV, tars and text files row by row. DuckDB reads JSON and Parquet, joins, sorts and writes, out of
core. Without keys, the key is the row number in nine digits, as img2dataset names its samples. A bad row is
skipped, counted and reported. A corrupt JSON list or Parquet file is refused as a whole.
"""
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import duckdb

from data.common import atomic_save, progress_bar
from flame import InputError, PROMPTS, describe_error, reading

# Names that data sets use for each of our fields. Per row, the first with a value is used. SV: ShareGPT4V's.
FIELD_ALIASES = {
    "key": ["key", "__key__", "id"],
    "image": ["image", "filepath", "file_name", "filename"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption"],
    "short": ["short", "shortSV_captions"],
    "long": ["long", "longSV_captions", "conversations"],
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What a folder is searched for. Only files of the first pattern that matches are read.
FOLDER_PATTERNS = ("*.tar", "metadata.jsonl", "metadata.csv", "**/*.txt", "**/*.parquet")
SOURCE_FIX = "give a TSV, CSV, JSON, JSONL or Parquet file, or tars"
NOT_CAPTIONS = {"image_id", "license", ""}.union(*(FIELD_ALIASES[name] for name in ("key", "image", "url")))
MAX_TEXT_BYTES = 1 << 24  # read of a .txt or .json file; more than any LLM's context
JOIN_SAMPLE = 200         # (own, joined) captions to compare: do both files' keys refer to the same images?
DUCKDB = {"memory_limit": "4GB", "threads": min(8, os.cpu_count() or 1)}  # above it, spills to disk

# Whitespace except U+0020. Captions become one line with single spaces; names lose tabs and line breaks.
WHITESPACE = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# caption_in, captions_in, name_in: the caption, captions or name in a JSON value (a text, a list of texts or
# a conversation). `loaded` has the rows of the source (field = '') and of each join (field = its prompt set).
SCHEMA = rf"""
CREATE MACRO caption_in(x) AS nullif(trim(regexp_replace(
    CASE WHEN json_type(x) = 'VARCHAR' THEN x->>'$' WHEN (x->>'from') = 'gpt' THEN x->>'value' END,
    ' *[{WHITESPACE}][ {WHITESPACE}]*|  +', ' ', 'g')), '');
CREATE MACRO captions_in(x) AS nullif(list_filter(
    [caption_in(t) FOR t IN list_prepend(x, json_extract(x, '$[*]'))], lambda t: t IS NOT NULL), []);
CREATE MACRO name_in(x) AS
    nullif(regexp_replace(coalesce(x->>'$.path', x->>'$'), '[\x00\t\r\n]', ' ', 'g'), '');
CREATE TABLE loaded (field VARCHAR, key VARCHAR, image VARCHAR, url VARCHAR, raw VARCHAR[], short VARCHAR[],
    long VARCHAR[]);
CREATE VIEW source AS SELECT rowid AS row, coalesce(key, format('{{:09d}}', rowid)) AS key, image, url,
    raw[1] AS raw, short[1] AS short, long[1] AS long FROM loaded WHERE field = '';
CREATE VIEW recaption AS SELECT rowid AS id, field, coalesce(key, url) AS join_key,
    coalesce(raw, short, long)[1] AS text FROM loaded WHERE field <> ''"""
# Rows are numbered by now, so DuckDB need not keep them in order; 15 million in order would exceed memory.
JOIN = """SET preserve_insertion_order = false;
CREATE TABLE pair AS SELECT row, field, min(id) AS id
FROM (SELECT row, unnest([key, url]) AS join_key FROM source) JOIN recaption USING (join_key)
WHERE text IS NOT NULL GROUP BY row, field;
CREATE MACRO joined(name) AS TABLE
    SELECT row, text FROM pair JOIN recaption USING (id) WHERE pair.field = name;
CREATE TABLE completed AS SELECT row, key, image, coalesce(r.text, raw) AS raw,
    coalesce(s.text, short) AS short, coalesce(l.text, long) AS long
    FROM source LEFT JOIN joined('raw') r USING (row)
    LEFT JOIN joined('short') s USING (row) LEFT JOIN joined('long') l USING (row);
CREATE TABLE first_of_key AS
    SELECT min(row) AS row FROM completed WHERE coalesce(raw, short, long) IS NOT NULL GROUP BY key"""
JOIN_COUNTS = """SELECT count(text), (SELECT count(*) FROM pair WHERE field = $1), count(*) - count(text)
FROM recaption WHERE field = $1"""
JOIN_EXAMPLES = """SELECT source.key, coalesce(raw, short, long, ''), text
FROM (SELECT row, id FROM pair WHERE field = $1 ORDER BY row LIMIT $2) JOIN source USING (row)
JOIN recaption USING (id) ORDER BY row"""
SKIPPED_ROWS = """SELECT CASE WHEN coalesce(raw, short, long) IS NULL THEN 'no caption, or a broken row'
    ELSE 'repeated key' END AS reason, count(*), list_transform(min(row + 1, 5), lambda n: 'row ' || n)
FROM completed ANTI JOIN first_of_key USING (row) GROUP BY reason ORDER BY reason"""
TABLE_COUNTS = """SELECT count(*), count(raw), count(short), count(long),
    (SELECT sum(len(list_concat(raw[2:], short[2:], long[2:]))) FROM loaded)
FROM completed SEMI JOIN first_of_key USING (row)"""
WRITE_TABLE = """COPY (SELECT key, image, coalesce(raw, long, short) AS raw,
    coalesce(short, long, raw) AS short, coalesce(long, short, raw) AS long
    FROM completed SEMI JOIN first_of_key USING (row) ORDER BY row)
TO $path (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')"""
PARQUET_COLUMNS = """SELECT column_name, format('to_json("{{}}"{{}})', column_name,
    if(column_type LIKE '%BLOB%', '.path', ''))
FROM (DESCRIBE FROM {}) WHERE column_type <> 'BLOB' AND NOT contains(column_name, '"')"""
JSON_COLUMNS = r"""SELECT name, '(json->''$."' || name || '"'')' FROM (
    SELECT name, row_number() OVER () AS n FROM (SELECT unnest(json_keys(json)) AS name FROM {}))
WHERE NOT regexp_matches(name, '[''"\\]') GROUP BY name ORDER BY min(n)"""
# A list of objects, one object per line (a broken line is a row of NULL), or COCO's single object of 100 MB.
JSON = "read_json_objects($files, format='{}', ignore_errors=true, maximum_object_size=134217728)"
DUCKDB_FORMATS = {  # suffix: (relation of $files, query for its columns and the JSON value of each)
    ".parquet": ("read_parquet($files, union_by_name=true)", PARQUET_COLUMNS),
    ".json": (JSON.format("auto"), JSON_COLUMNS),
    ".jsonl": (JSON.format("newline_delimited"), JSON_COLUMNS),
}
COCO = """(SELECT text, image->'file_name' AS path
    FROM (SELECT *, row_number() OVER () AS n FROM (SELECT unnest(json->'$.annotations[*]') AS text FROM {0}))
    LEFT JOIN (SELECT unnest(json->'$.images[*]') AS image FROM {0}) ON image->>'id' = text->>'image_id'
    ORDER BY n)"""


class Row(NamedTuple):
    key: str
    image: str  # the image's path as the source gives it, or ""
    raw: str    # the caption for each prompt set
    short: str
    long: str


def read_table(path, start=len("\t".join(Row._fields)) + 1, max_rows=None):
    """Yield the rows of a captions.tsv, from byte `start` on."""
    with reading(path, "make it again with embed.py"), open(path, "rb") as file:
        file.seek(start)
        for line in islice(file, max_rows):
            yield Row(*line.decode()[:-1].split("\t"))


def write_table(path, captions, joins):
    """Write captions.tsv from a source; print the counts, and report skipped rows on stderr.

    joins: [(prompt set, source or source:column)], captions from other files, joined by key, or by image URL
    if they have no key. A row without a caption for a set uses its best one (long before short before raw).
    Raises InputError if a file is missing or has an unknown format, if no row has a caption, if a join's
    captions belong to other images, or if the disk is full.
    """
    skipped = {}
    try:
        with (tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=f"{Path(path).stem}.") as scratch,
              duckdb.connect(f"{scratch}/duckdb", config=DUCKDB) as database):
            database.execute(SCHEMA)
            columns = load(database, scratch, captions, skipped)
            for name, source in joins:
                load(database, scratch, source, skipped, name)
            database.execute(JOIN)
            for name in dict(joins):
                check_join(database, captions, name)
            skipped |= {reason: entry for reason, *entry in database.execute(SKIPPED_ROWS).fetchall()}
            report_skipped(captions, skipped)
            total, raw, short, long, others = database.execute(TABLE_COUNTS).fetchone()
            if not total:
                raise InputError(f"{captions}: no captions found (columns: {[*columns][:20]}). Rename a "
                                 "column to raw, short or long")
            unused = f"; {others} further captions in lists are not used" if others else ""
            print(f"{captions}: {total} rows with {raw} raw, {short} short, {long} long captions; a row "
                  f"without one uses its best other caption{unused}")
            database.execute(WRITE_TABLE, {"path": str(path)})
    except (duckdb.Error, RuntimeError) as error:
        raise InputError(f"{path}: {describe_error(error)}; if the disk is full, free space there") from None


def check_join(database, captions, field):
    """Print how many rows have a joined caption, and five of them beside the rows' own captions.

    Raises InputError if no row has one, or if the joined captions belong to other images.
    """
    total, rows, empty = database.execute(JOIN_COUNTS, [field]).fetchone()
    print(f"--join {field}: {rows} rows match one of {total} captions; empty or broken captions: {empty}")
    pairs = database.execute(JOIN_EXAMPLES, [field, JOIN_SAMPLE]).fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {raw[:60]!r} | {text[:60]!r}")
    fix = f"choose another column: --join {field}=FILE:COLUMN"
    if pairs and sum(raw == text for _, raw, text in pairs) >= 0.95 * len(pairs):
        raise InputError(f"--join {field}: its captions equal the rows' own captions; {fix}")
    ids = [text for *_, text in pairs if re.fullmatch(r"[\w-]{16,}", text, re.ASCII)]
    if len(ids) > len(pairs) / 2:
        raise InputError(f"--join {field}: its values are hashes or ids, not captions; {fix}")
    # A recaption shares more words (of four letters and more) with its own image's caption than with the next
    # image's. The check has no effect if the languages differ.
    words = [[set(re.findall(r"\w{4,}", text.lower())) for text in pair] for _, *pair in pairs]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(words, words[1:] + words[:1]))
    if not pairs or len(pairs) == JOIN_SAMPLE and chance > JOIN_SAMPLE / 10 and shared < 1.2 * chance:
        raise InputError(
            f"--join {field}: its keys belong to other images: {rows} rows of {captions} have a match, and "
            "matches share no more words than random pairs. Use the tars that the recaptions were made from "
            "(for FLAME's CC3M recaptions: pixparse/cc3m-wds)")


# ------------------------------------------------------------------------------------------------------------
# Loading a source into DuckDB

def load(database, scratch, source, skipped, field=""):
    """Append the rows of a source to the table `loaded`, in order. Return its columns as a dict.

    field: the prompt set that a join fills, or "".
    """
    source, column = split_column(source) if field else (source, "")
    files = source_files(source)
    kind = Path(files[0].name.removesuffix(".gz")).suffix.lower()
    with reading(files[0], SOURCE_FIX):
        if kind not in DUCKDB_FORMATS:
            rows = {".tar": tar_rows, ".txt": text_rows}.get(kind, csv_rows)(source, files, skipped)
            kind = ".jsonl"
            files = [f"{scratch}/rows.jsonl"]
            with open(files[0], "w") as spool:  # invalid UTF-8 becomes a broken row
                spool.writelines(json.dumps(row) + "\n" for row in rows)
        relation, column_query = DUCKDB_FORMATS[kind]
        paths = {"files": [glob.escape(str(file)) for file in files]}
        columns = dict(database.execute(column_query.format(relation), paths).fetchall())
        if columns.keys() >= {"images", "annotations"}:  # COCO; each annotation is a row
            relation = COCO.format(relation)
            columns = {"key": "text->'id'", "image": "path", "raw": "text->'caption'"}
        fields = FIELD_ALIASES
        if field:
            fields = {name: FIELD_ALIASES[name] for name in ("key", "url", field)}
            if column:
                fields[field] = [column]
            elif columns.keys().isdisjoint(FIELD_ALIASES[field]):
                others = [name for name, value in columns.items()
                          if name not in NOT_CAPTIONS and not value.endswith('".path)')][:20]
                counts = ", ".join(f"count(captions_in({columns[name]}))" for name in others)
                texts, = database.execute(f"SELECT [{counts}] FROM (FROM {relation} LIMIT 1000)",
                                          paths).fetchone()
                fields[field] = [name for name, count in zip(others, texts) if count]
                if len(fields[field]) > 1:
                    raise InputError(f"{source}: several columns have text ({', '.join(fields[field])}). "
                                     f"Choose one: --join {field}={source}:COLUMN")
            used = [name for name in fields[field] if name in columns]
            if column and not used:
                raise InputError(f"{source}: no column {column} (columns: {', '.join(columns)})")
            print(f"--join {field}: {source}, column {', '.join(used)}")
        values = [f"'{field}' AS field"]
        for name, aliases in fields.items():
            macro = "captions_in" if name in PROMPTS else "name_in"
            present = [f"{macro}({columns[alias]})" for alias in aliases if alias in columns]
            if present:
                values.append(f"coalesce({', '.join(present)}) AS {name}")
        database.execute(f"INSERT INTO loaded BY NAME SELECT {', '.join(values)} FROM {relation}", paths)
        return columns


# Readers for what DuckDB does not read. They yield a dict {name: value} per row.

def csv_rows(source, files, skipped):
    """TSV (without quoting) and CSV. As in img2dataset, empty lines are not rows. A broken row yields {}."""
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            header = file.readline()
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if ".csv" in path.name.lower():
                form = {"delimiter": max("\t,;", key=header.count), "strict": True}
            names = next(csv.reader([header], **form))
            lines = file
            if len(names) == 2 and "://" in header:  # no header, as CC3M and CC12M are distributed
                names = ["url" if "://" in name else "raw" for name in names]
                lines = chain([header], file)
            reader = csv.reader(lines, **form)
            row = []
            while row is not None:
                try:
                    row = next(reader, None)
                    if row:
                        yield dict(zip(names, row)) if len(row) == len(names) else {}
                except csv.Error:
                    yield {}


def tar_rows(source, files, skipped):
    """webdataset samples. The .txt is the raw caption; the .json may have captions under any known name."""
    known = {name for field in ("url", *PROMPTS) for name in FIELD_ALIASES[field]}
    for path in files:
        with open(path, "rb") as file:
            for folder, key, parts in tar_samples(path, skipped):
                row = {"key": key}
                for suffix in sorted(parts.keys() & {".json", ".txt"}):
                    offset, size = parts[suffix]
                    file.seek(offset)
                    try:
                        text = file.read(min(size, MAX_TEXT_BYTES)).decode("utf-8-sig")
                        entries = {"raw": text} if suffix == ".txt" else json.loads(text)
                        row |= {name: entries[name] for name in known & entries.keys()}
                    except (ValueError, AttributeError, RecursionError):
                        place = f"{path}:{folder}{key}{suffix}"
                        count_skipped(skipped, "not UTF-8, or not a JSON object", place)
                yield row


def text_rows(folder, files, skipped):
    """A folder with a.txt beside a.jpg. The image's path is the key and the image."""
    for file in files:
        try:
            image = image_beside(file).relative_to(folder)
            with open(file, encoding="utf-8-sig") as opened:
                text = opened.read(MAX_TEXT_BYTES)
            yield {"key": str(image.with_suffix("")), "image": str(image), "raw": text}
        except (AttributeError, UnicodeDecodeError):
            count_skipped(skipped, "text without an image beside it, or not UTF-8", str(file))


# ------------------------------------------------------------------------------------------------------------
# The files, name and hash of a source

def source_files(path):
    """Return the files of a source, sorted: one file, a range, a glob, or those of a folder."""
    path = Path(path)
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        here = glob.escape(str(path))
        kinds = (sorted(glob.iglob(f"{here}/{pattern}", recursive=True)) for pattern in FOLDER_PATTERNS)
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
        raise InputError(f"{path}: no captions found; {SOURCE_FIX}, or a folder with metadata.csv. "
                         "Convert `save_to_disk` output with datasets.load_from_disk(DIR).to_parquet(FILE)")
    return files


def split_column(source):
    """FILE:COLUMN -> (FILE, COLUMN); without a column -> (FILE, "")"""
    file, _, column = str(source).rpartition(":")
    return (file, column) if file and not Path(source).exists() else (source, "")


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . (if the current folder is cc3m) -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def hash_sources(sources):
    """Return a SHA-256 over [(prompt set of a join or "", source)]. Tars are hashed by name and size."""
    digest = hashlib.sha256()
    for field, source in sources:
        source, column = split_column(source) if field else (source, "")
        digest.update((field + column).encode())
        for file in source_files(source):
            if file.suffix == ".txt" and not image_beside(file):
                continue  # not a caption; train.py may write its own .txt files into this folder
            name = os.path.relpath(file, Path(source).parent)
            digest.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
            if file.suffix != ".tar":
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def image_beside(file):
    """Return the image next to a caption file, or None."""
    names = (file.with_suffix(end) for suffix in IMAGE_SUFFIXES for end in (suffix, suffix.upper()))
    return next(filter(Path.is_file, names), None)


# ------------------------------------------------------------------------------------------------------------
# Tars

CORRUPT_TAR = "not a tar file, or corrupt from this point"
MAX_HEADER_BYTES = 1 << 14  # a tar header has a name and a few numbers


def split_member_name(path):
    """Return (folder, key, suffix): "a/", "b", ".c.jpg" for "a/b.c.JPG". A key ends at its first dot."""
    folder, slash, name = path.rpartition("/")
    key, dot, suffix = name.partition(".")
    return folder + slash, key, dot + suffix.lower()


class _HeaderReader(io.BufferedReader):
    """Refuses to read huge headers, which tarfile would parse for minutes."""

    def read(self, size):
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(path, skipped):
    """Yield (folder, key, suffix, offset, size) of a tar's regular files, in order, without unpacking.

    Stops where a tar is truncated or corrupt, and counts that as skipped[CORRUPT_TAR].
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        with _HeaderReader(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # tarfile would keep them all
                # A negative size would make tarfile read the same members forever.
                if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is sparse or truncated")
                folder, key, suffix = split_member_name(member.name)
                if member.isfile() and key and suffix:
                    yield folder, key, suffix, member.offset_data, member.size
            # tarfile stops at any block of zeros. It is the end only if everything after it is zero too.
            file.seek(tar.offset)
            blocks = iter(lambda: file.read(MAX_HEADER_BYTES), b"")
            if size < tar.offset + 512 or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError(f"neither a file nor the end of the tar at byte {tar.offset}")
    except Exception as error:  # tarfile can raise any exception on corrupt bytes, MemoryError included
        count_skipped(skipped, CORRUPT_TAR, f"{os.path.basename(path)}: {describe_error(error)}")


def tar_samples(path, skipped):
    """Yield (folder, key, {suffix: (offset, size)}) for each run of files with the same key (webdataset)."""
    for (folder, key), files in groupby(tar_members(path, skipped), itemgetter(0, 1)):
        yield folder, key, {suffix: span for _, _, suffix, *span in files}


def count_skipped(skipped, reason, place):
    """Add one to skipped[reason] = (count, first five places)."""
    count, places = skipped.get(reason, (0, []))
    skipped[reason] = count + 1, [*places, " ".join(place.split())][:5]  # a name may contain line breaks


def report_skipped(source, skipped):
    """Print a line per reason on stderr."""
    for reason, (count, places) in skipped.items():
        print(f"{source}: skipped {count}: {reason} ({', '.join(places)})", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Images inside Parquet files

def unpack_parquet(captions, folder):
    """Write images stored in Parquet (struct<bytes, path>, as on the Hub) as tars, one per Parquet file.

    Members are named by key. Existing tars are kept. Rows without an image, or with a dot or slash in the
    key, are skipped and counted.
    """
    files = [file for file in source_files(captions) if file.suffix == ".parquet"]
    skipped = {}
    first = 0  # row number of a file's first row
    for n, file in enumerate(progress_bar(files, "images", unit=" files", disable=not files)):
        with reading(file, SOURCE_FIX):
            table = duckdb.read_parquet(str(file), file_row_number=True)
            image_type = re.compile(r"STRUCT\(.*bytes BLOB.*\)")  # a list of images has another type
            types = dict(zip(table.columns, map(str, table.types)))
            names = [name for name, kind in types.items() if image_type.fullmatch(kind)]
            if not names:
                return
            keys = [f'"{name}"::VARCHAR' for name in FIELD_ALIASES["key"] if name in table.columns]
            keys.append(f"format('{{:09d}}', {first} + file_row_number)")
            rows = table.project(f"""coalesce({', '.join(keys)}), "{names[0]}".bytes""")
            first += len(table)
            tar = folder / f"{n:05d}.tar"
            if not tar.exists():
                folder.mkdir(exist_ok=True)
                atomic_save(tar, functools.partial(write_tar, rows, skipped))
    report_skipped(captions, skipped)


def write_tar(rows, skipped, path):
    """rows: a DuckDB relation of (key, image bytes)."""
    with tarfile.open(path, "w") as tar:
        for key, content in rows.fetchall():
            if content is None or split_member_name(key) != ("", key, ""):
                count_skipped(skipped, "no image, or a key with a dot or slash", key)
                continue
            member = tarfile.TarInfo(f"{key}.jpg")  # decoders look at the bytes, not at the suffix
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
