"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the house reads.

    TSV, CSV (gzip, zstd)  a header among `key image raw short long`, open_clip's `filepath title`, DreamLIP's
                           columns; or the official Conceptual Captions, caption<TAB>url without a header
    JSON, JSONL, Parquet   the same fields; COCO's captions, LLaVA's and ShareGPT4V's conversations
    tars                   webdataset's and img2dataset's, never unpacked
    a folder               of tars, of Parquet, of pictures with a .txt each, or with a metadata.jsonl or .csv

A source is a file, several by a range or a glob ("cc3m/{0000..0575}.tar", "x-*.parquet"), or a folder. DuckDB
reads tables and joins them out of core; for tars, folders, and tables without keys two generators and a loop of
Python write it a table. Where there is no key, the row's number in the file is it, nine digits, as img2dataset
names its samples. A bad row is skipped, counted and named, never fatal; of rows with one key the first counts.
"""
import csv
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
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import duckdb

import flame
from flame import InputError, PROMPTS

# Our fields and the picture's URL by others' names; the first that is there counts. Of the recaptions by three
# models that DreamLIP gives, ShareGPT4V's.
NAMES = {
    "key": ("key", "__key__"),
    "image": ("image", "filepath", "file_name", "filename"),
    "url": ("url", "Image Path", "downloadurl"),
    "raw": ("raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption"),
    "short": ("short", "shortSV_captions"),
    "long": ("long", "longSV_captions"),
}
NO_CAPTION = {*NAMES["key"], *NAMES["image"], *NAMES["url"], "id", "image_id", "license"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FOLDERS = ("*.tar", "metadata.jsonl", "metadata.csv", "metadata.parquet", "**/*.txt", "**/*.parquet")
WANTED = "give a TSV, CSV, JSON, JSONL or Parquet file, tars, or a folder of pictures with a .txt each"
DAMAGED = "tar that is none, or damaged from there on"
LARGEST_TEXT = 1 << 20    # bytes of a .txt or .json in a tar: no caption is as long
LARGEST_HEADER = 1 << 14  # bytes of a header in a tar: a name and some numbers
ALIKE = 200               # pairs of a caption and a joined one that tell whether keys mean the same pictures
MEMORY = "4GB"            # DuckDB's; what does not fit goes to the disk

# White space but the space itself; a caption is one line with single spaces, a name has no tab or line break.
ODD = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CAPTION = (f"CASE WHEN regexp_matches({{0}}, '[{ODD}]|  |^ | $') "
           f"THEN trim(regexp_replace({{0}}, '[ {ODD}]+', ' ', 'g')) ELSE {{0}} END AS {{0}}")
NAME = r"regexp_replace({0}, '[\x00\t\r\n]', ' ', 'g') AS {0}"
NOTHING = "''"
TSV = "delim='\t', quote='', escape=''"
CSV = "delim='{}', quote='\"', escape='\"'"


class Row(NamedTuple):
    key: str
    image: str  # the picture's path as the source gives it, or ""
    raw: str    # of each prompt set, the caption that its questions are asked of
    short: str
    long: str


def read_table(path):
    """Yields Row after Row of a captions.tsv that write_table wrote."""
    with open(path, encoding="utf-8", newline="\n") as file:
        next(file)
        for line in file:
            yield Row(*line[:-1].split("\t"))


def write_table(path, captions, joins):
    """Makes captions.tsv of a source; says on the screen what was taken, on stderr what was skipped.

    joins: {prompt set: [sources]}, captions of that set from files of their own, by key, or by the picture's
    URL where these have no key. Where a row has no caption for a set, its best one is taken (long, else short,
    else raw). Raises InputError where a file is missing or of no known form, where no row has a caption, where
    a join's captions are of other pictures, or where the disk is full.
    """
    path = Path(path)
    skipped = {}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".captions-") as scratch:
        with duckdb.connect(f"{scratch}/duckdb") as database:
            database.execute(f"SET memory_limit = '{MEMORY}'")
            columns = load(database, scratch, "source", captions, tuple(NAMES), skipped)
            database.execute("CREATE VIEW keyed AS SELECT rowid AS row, * REPLACE "
                             "(coalesce(key, format('{:09d}', rowid)) AS key) FROM source")
            try:
                for name, sources in joins.items():
                    join(database, scratch, captions, name, sources, skipped)
                count = choose_rows(database, captions, joins, skipped)
                copy_table(database, f"{scratch}/captions.tsv", joins)
            except duckdb.Error as error:
                why = flame.explained(error)
                raise InputError(f"{path}: {why}; free space there and run the same command again") from None
        report_skipped(captions, skipped)
        if not count:
            raise InputError(f"{captions}: no row with a caption; its columns are {' '.join(columns)}, wanted "
                             f"are some of {' '.join(NAMES)}")
        os.replace(f"{scratch}/captions.tsv", path)


def choose_rows(database, captions, joins, skipped):
    """Makes the table `kept` of the rows that have a caption, the first of each key. -> how many they are"""
    pairs = "".join(f" LEFT JOIN pair_{name} USING (row)" for name in joins)
    there = {name: f"({name} IS NOT NULL{f' OR pair_{name}.at IS NOT NULL' * (name in joins)})"
             for name in PROMPTS}
    database.execute(f"CREATE TABLE captioned AS SELECT row, key FROM keyed{pairs} "
                     f"WHERE {' OR '.join(there.values())}")
    database.execute("CREATE TABLE kept AS SELECT min(row) AS row FROM captioned GROUP BY key")
    for reason, query in {"no caption": "keyed ANTI JOIN captioned USING (row)",
                          "key occurs before": "captioned ANTI JOIN kept USING (row)"}.items():
        count, rows = database.execute(f"SELECT count(*), min(row, 5) FROM {query}").fetchone()
        if count:
            skipped[reason] = [count, [f"row {row + 1}" for row in rows]]
    counts = ", ".join(f"count(*) FILTER ({condition})" for condition in there.values())
    total, *own = database.execute(f"SELECT count(*), {counts} FROM kept JOIN keyed USING (row){pairs}"
                                   ).fetchone()
    print(f"{captions}: {total} rows")
    for name, count in zip(PROMPTS, own):
        if count < total:
            print(f"{name} asks another caption, the best there is, in {total - count} of {total} rows")
    return total


def copy_table(database, path, joins):
    """Writes the table's rows in the source's order."""
    texts = {name: f"coalesce(text_{name}.text, {name})" if name in joins else name for name in PROMPTS}
    best = f"coalesce({texts['long']}, {texts['short']}, {texts['raw']})"
    columns = ", ".join(f"coalesce({text}, {best}) AS {name}" for name, text in texts.items())
    joined = "".join(f" LEFT JOIN (SELECT row, text FROM pair_{name} JOIN joined_{name} j ON j.rowid = at) "
                     f"text_{name} USING (row)" for name in joins)
    database.execute(f"COPY (SELECT key, coalesce(image, '') AS image, {columns} "
                     f"FROM kept JOIN keyed USING (row){joined} ORDER BY row) "
                     f"TO '{quoted(path)}' (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')")


# ------------------------------------------------------------------------------------------------------------
# Captions of one prompt set in files of their own

def join(database, scratch, captions, name, sources, skipped):
    """Makes pair_<set> (row, at): which row of joined_<set> has the caption of a row, the first of its key."""
    for source in sources:
        load(database, scratch, f"joined_{name}", source, ("key", "url", name), skipped)
    joined = f"(SELECT rowid AS at, * FROM joined_{name} WHERE text IS NOT NULL)"
    by_key = f"SELECT row, at FROM keyed k JOIN {joined} j ON k.key = j.key"
    by_url = f"SELECT row, at FROM keyed k JOIN {joined} j ON k.url = j.url WHERE j.key IS NULL"
    database.execute(f"CREATE TABLE pair_{name} AS SELECT row, min(at) AS at FROM ({by_key} UNION ALL {by_url}) "
                     "GROUP BY row")
    total, used = database.execute(f"SELECT (SELECT count(*) FROM {joined}), count(DISTINCT at) "
                                   f"FROM pair_{name}").fetchone()
    files = ", ".join(map(str, sources))
    if not used:
        raise InputError(f"{files}: none of its {total} rows with a {name} caption has a key or URL that is in "
                         f"{captions}; give --captions the files that it goes with")
    print(f"{files}: {total} captions, {total - used} of them of no row in {captions}")
    rows = database.execute(
        f"SELECT key, coalesce(raw, short, long, ''), text FROM (SELECT * FROM pair_{name} ORDER BY row LIMIT "
        f"{ALIKE}) p JOIN keyed USING (row) JOIN joined_{name} j ON j.rowid = at ORDER BY row".replace(
            "SELECT key", "SELECT keyed.key")).fetchall()
    for key, raw, text in rows[:5]:
        print(f"  {key}: {raw[:80]!r} {name}: {text[:80]!r}")
    check_join(captions, name, files, [(raw, text) for _, raw, text in rows if raw])


def check_join(captions, name, files, pairs):
    """Raises InputError where the joined captions are of other pictures, as keys of other tars make them.

    A recaption shares words of four letters and more with its picture's own caption, more than with another
    picture's. If no more than by chance, keys do not mean the same. Where they share none at all, since the
    languages differ, nothing can be said.
    """
    words = [[set(re.findall(r"\w{4,}", text.lower())) for text in pair] for pair in pairs]
    others = [text for _, text in words[1:] + words[:1]]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), text in zip(words, others))
    if len(pairs) == ALIKE and chance > ALIKE / 10 and shared < 1.2 * chance:
        raise InputError(
            f"{files}: its {name} captions share no more words with the captions of the same keys in {captions} "
            "than with others: keys mean other pictures there. Recaptions go with the tars they were made from, "
            "those of FLAME for CC3M with pixparse/cc3m-wds; give --captions these")


# ------------------------------------------------------------------------------------------------------------
# Files

def source_files(path):
    """The regular files that a source names, sorted: one, a range, a glob, or what a folder has."""
    path = Path(path)
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        files = next(filter(None, (sorted(path.glob(pattern)) for pattern in FOLDERS)), [])
        if not files:
            inner = next(filter(None, (sorted(path.glob(f"*/{pattern}")) for pattern in FOLDERS[:4])), None)
            raise InputError(f"{path}: a folder without captions; "
                             + (f"give {inner[0].parent}, where {inner[0].name} is" if inner else WANTED))
        return [file for file in files if file.is_file() or file.suffix != ".txt"]
    if span:
        numbers = range(int(span[2]), int(span[3]) + 1)
        paths = (Path(f"{span[1]}{n:0{len(span[2])}d}{span[4]}") for n in numbers)
    else:
        paths = [path] if path.exists() else [Path(file) for file in sorted(glob.glob(str(path)))] or [path]
    files = []
    for file in paths:  # the first that is missing ends it, however long the range is
        with flame.reading(file, WANTED):
            files.append(file)
    if not files:
        raise InputError(f"{path}: its range runs backwards; give {{{span[3]}..{span[2]}}}")
    return files


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . in cc3m/ -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def fingerprint(sources):
    """SHA-256 of what captions come from, in hexadecimal."""
    digest = hashlib.sha256()
    for source in sources:
        for file in source_files(source):
            if os.path.isdir(source):
                digest.update(os.fsencode(file.relative_to(source)))  # it is key and image
            with open(file, "rb") as opened:
                if file.suffix != ".tar":
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
                    continue
                size = opened.seek(0, 2)  # of gigabytes of pictures name, size and 16 samples stand for them
                digest.update(f"{file.name} {size}".encode())
                for k in range(16):
                    opened.seek(size * k // 16)
                    digest.update(opened.read(4096))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# A source becomes a table of DuckDB: a SELECT a form

def load(database, scratch, table, source, fields, skipped):
    """Appends a source's rows to a table of DuckDB, in their order. -> the names of the source's columns

    fields: NAMES; for a join key, URL and the prompt set. Its caption is the column named as the set; without
    one, the first text that is neither key nor picture, such as "minicpm" in the recaptioned releases.
    """
    joined = len(fields) < len(NAMES)
    with flame.reading(source_files(source)[0], WANTED):
        failure = None
        for read in forms(database, scratch, source, skipped, joined):
            try:
                relation, columns = read()
                insert(database, table, relation, columns, fields, joined)
                break
            except duckdb.Error as error:  # such as lines that end in two ways: the next form may read them
                failure = failure or error
        else:
            raise failure
    count_rejects(database, skipped)
    for name in set(PROMPTS) & set(fields):
        taken = next((column for column in NAMES[name] if column in columns), None)
        if taken and taken != name:
            print(f"{name} captions: {taken} of {source}")
    return list(columns)


def forms(database, scratch, source, skipped, joined):
    """The ways to read a source, by its form: functions that return (what to select from, its columns).

    Columns are {name: (SQL, its type)}.
    """
    files = source_files(source)
    suffix = Path(files[0].name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    ours = ("key", "image", "url", *PROMPTS)
    if suffix == ".tar":
        return [lambda: spool(scratch, ours, tar_rows(files, skipped), skipped)]
    if suffix == ".txt" and os.path.isdir(source):
        return [lambda: spool(scratch, ours, text_rows(Path(source), files, skipped), skipped)]
    if suffix == ".parquet":
        return [lambda: parquet(database, files)]
    line = first_line(database, files[0]) if suffix not in (".json", ".jsonl") else "{"
    if line.startswith(("{", "[")) and suffix not in (".csv", ".tsv"):
        return [lambda: json_objects(database, files, "auto", 1 << 24),
                lambda: json_objects(database, files, "newline_delimited", 1 << 24),
                lambda: json_objects(database, files, "unstructured", 1 << 30)]  # COCO's, one object of 100 MB
    quotes = suffix == ".csv"
    delimiter = "\t" if not quotes or "\t" in line else ";" if ";" in line and "," not in line else ","
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    names = next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])
    links = ["://" in name for name in names]
    headed = not (len(names) == 2 and any(links))
    if not headed:
        names = ["url", "raw"] if links[0] else ["raw", "url"]
    keyed = joined or any(name in NAMES["key"] for name in names)

    def with_duckdb():
        return delimited(files, CSV.format(delimiter) if quotes else TSV, names, headed)

    def with_numbers():
        rows = numbered_rows(files, delimiter, quoting, headed, len(names), skipped)
        return spool(scratch, ["" if keyed else "key", *names], rows, skipped)
    return [with_duckdb, with_numbers] if keyed else [with_numbers]


def first_line(database, path):
    """Of a text, whatever it is packed with; "" where there is none."""
    query = f"SELECT * FROM read_csv({listed([path])}, columns={{'line': 'VARCHAR'}}, delim='\x01', quote='', " \
            "escape='', comment='', header=false, auto_detect=false, strict_mode=false, ignore_errors=true) LIMIT 1"
    row = database.execute(query).fetchone()
    return row and row[0] or ""


def insert(database, table, relation, columns, fields, joined):
    """Selects our fields among a relation's columns into a table."""
    if "conversations" in columns:  # LLaVA's and ShareGPT4V's: the first answer is a long caption, "id" the key
        answer = (f"list_filter(TRY_CAST(to_json({columns['conversations'][0]}) AS JSON[]), "
                  "lambda turn: turn->>'from' = 'gpt')[1]->>'value'")
        columns = {"long": (answer, "VARCHAR"), "key": columns.get("id", ("NULL", "VARCHAR"))} | columns
    found = {field: [columns[name] for name in NAMES[field] if name in columns] for field in fields}
    if joined and not found[fields[-1]]:
        found[fields[-1]] = [column for name, column in columns.items() if name not in NO_CAPTION]
    inner = []
    outer = []
    for field, candidates in found.items():
        sql = [*map(text_of if field in PROMPTS else name_of, candidates), "CAST(NULL AS VARCHAR)"]
        inner.append(f"coalesce({', '.join(f'nullif({one}, {NOTHING})' for one in sql)}) AS {field}")
        outer.append((CAPTION if field in PROMPTS else NAME).format(field))
    names = [*fields[:-1], "text"] if joined else fields
    database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(f'{name} VARCHAR' for name in names)})")
    database.execute(f"INSERT INTO {table} SELECT {', '.join(outer)} FROM "
                     f"(SELECT {', '.join(inner)} FROM {relation})")


def text_of(column):
    """SQL of a caption: a text, or the first of a list of texts; numbers, NaN and objects are none."""
    sql, kind = column
    texts = {"VARCHAR": sql, "VARCHAR[]": f"{sql}[1]",
             "JSON": f"CASE WHEN json_type({sql}) = 'VARCHAR' THEN {sql}->>'$' "
                     f"WHEN json_type({sql}, '$[0]') = 'VARCHAR' THEN {sql}->>'$[0]' END"}
    return texts.get(kind, "NULL")


def name_of(column):
    """SQL of a key, path or URL, numbers too; of a picture as Hugging Face's datasets keep it its path."""
    sql, kind = column
    if kind == "JSON":
        return f"coalesce({sql}->>'$.path', {sql}->>'$')"
    if "path VARCHAR" in kind:
        return f"{sql}.path"
    return "NULL" if "BLOB" in kind else f"CAST({sql} AS VARCHAR)"


def listed(files):
    """SQL of a list of paths, which are no patterns."""
    return "[" + ", ".join(f"'{quoted(glob.escape(str(file)))}'" for file in files) + "]"


def quoted(text):
    return str(text).replace("'", "''")


def parquet(database, files):
    relation = f"read_parquet({listed(files)}, union_by_name=true)"
    kinds = database.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    return relation, {name: ('"' + name.replace('"', '""') + '"', kind) for name, kind, *_ in kinds}


def json_objects(database, files, form, largest):
    """largest: bytes of an object. A broken line is a row of NULL."""
    relation = (f"read_json_objects({listed(files)}, format='{form}', maximum_object_size={largest}, "
                "ignore_errors=true)")
    sample = f"SELECT json_keys(json) FROM (SELECT json FROM {relation} LIMIT 1000) WHERE json IS NOT NULL"
    names = dict.fromkeys(chain.from_iterable(keys for keys, in database.execute(sample).fetchall()))
    if not names:
        raise duckdb.InvalidInputException("no JSON object is in it")
    if {"images", "annotations"} <= names.keys():  # COCO's: each caption is a row
        relation = (f"(WITH file AS (SELECT json FROM {relation}), pictures AS (SELECT unnest(json->'$.images[*]') "
                    "AS picture FROM file), captions AS (SELECT unnest(said) AS said, unnest(range(len(said))) AS n "
                    "FROM (SELECT json->'$.annotations[*]' AS said FROM file)) "
                    "SELECT said->>'id' AS key, said->'caption' AS raw, picture->>'file_name' AS image "
                    "FROM captions LEFT JOIN pictures ON picture->>'id' = said->>'image_id' ORDER BY n)")
        return relation, {"key": ("key", "VARCHAR"), "image": ("image", "VARCHAR"), "raw": ("raw", "JSON")}
    return relation, {name: (f"(json->'$.\"{quoted(name)}\"')", "JSON") for name in names
                      if not re.search(r'["\\]', name)}


def delimited(files, options, names, headed):
    columns = ", ".join(f"'c{n}': 'VARCHAR'" for n in range(len(names)))
    relation = (f"read_csv({listed(files)}, columns={{{columns}}}, header={headed}, {options}, comment='', "
                "auto_detect=false, ignore_errors=true, store_rejects=true)")
    found = {}
    for n, name in enumerate(names):  # of two columns with one name the first
        found.setdefault(name, (f"c{n}", "VARCHAR"))
    return relation, found


def count_rejects(database, skipped):
    """What DuckDB's tables of rejects say of the rows that it left out."""
    if database.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'").fetchone()[0]:
        for reason, line in database.execute("SELECT DISTINCT lower(CAST(error_type AS VARCHAR)), line "
                                             "FROM reject_errors ORDER BY line").fetchall():
            skip(skipped, reason, f"line {line}")
        database.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")


# ------------------------------------------------------------------------------------------------------------
# What DuckDB does not read: generators of (place, fields), which become a table for it

def spool(scratch, names, rows, skipped):
    path = Path(scratch, "rows.tsv")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for place, fields in rows:
            try:
                file.write("\t".join(re.sub("[\t\r\n]", " ", field) for field in fields) + "\n")
            except UnicodeEncodeError:
                skip(skipped, "invalid encoding", place)
    return delimited([path], TSV, names, False)


def numbered_rows(files, delimiter, quoting, headed, width, skipped):
    """Yields (place, [number in the file, *fields]) of a table. A bad row has a number, an empty line none."""
    number = 0
    for path in files:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = (line.rstrip("\r\n").replace("\r", " ") + "\n" for line in file)
            rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            fields = next(rows, None) if headed else None
            while True:
                try:
                    fields = next(rows)
                    why = "too many columns" if any(fields[width:]) else "missing columns"
                    wrong = why if len(fields) < width or any(fields[width:]) else None
                except StopIteration:
                    break
                except csv.Error as error:
                    wrong = f"not CSV ({error})"
                place = f"line {rows.line_num}"
                if wrong and fields:
                    skip(skipped, wrong, place)
                elif fields:
                    yield place, [f"{number:09d}", *fields[:width]]
                number += bool(fields)


def tar_rows(files, skipped):
    """Yields (place, our fields) of samples. .txt is the raw caption, .json may have all by any known name."""
    for path in files:
        for folder, key, file, places in tar_samples(path, skipped):
            place = f"{path}:{folder}{key}"
            if folder.startswith("/") or ".." in folder.split("/"):
                skip(skipped, "path climbs out of the tar", place)
                continue
            fields = {}
            for suffix in ("json", "txt"):  # the last one's caption counts
                offset, size = places.get(suffix, (0, 0))
                file.seek(offset)
                try:
                    if size > LARGEST_TEXT:
                        raise ValueError
                    text = file.read(size).decode("utf-8-sig")
                    entries = json.loads(text) if suffix == "json" and text else {"raw": text} if text else {}
                    fields |= {field: entries[name] for field in ("url", *PROMPTS) for name in NAMES[field][::-1]
                               if isinstance(entries.get(name), str)}
                except (ValueError, AttributeError, RecursionError):
                    skip(skipped, "no UTF-8 text, no JSON object, or too large", f"{place}.{suffix}")
            yield place, [key, "", *(fields.get(field, "") for field in ("url", *PROMPTS))]


def text_rows(folder, files, skipped):
    """Yields (place, our fields) of each a.txt that has a picture beside it; its path is key and image."""
    for here, texts in groupby(sorted(files), lambda file: file.parent):
        beside = sorted(path for path in here.iterdir() if path.suffix.lower() in PICTURES)
        pictures = {path.stem: path.relative_to(folder) for path in reversed(beside)}  # the first of a stem
        for file in texts:
            picture = pictures.get(file.stem)
            with open(file, "rb") as opened:
                text = opened.read(LARGEST_TEXT).decode("utf-8-sig", "surrogateescape")
            if picture is None:
                skip(skipped, "text without a picture beside it", str(file))
            else:
                yield str(file), [str(picture.with_suffix("")), str(picture), "", text, "", ""]


# ------------------------------------------------------------------------------------------------------------
# Tars

def sample_name(path):
    """-> folder, key, suffix: "a/", "b", "c.jpg" of "a/b.c.JPG". A key ends at its first dot (webdataset)."""
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash, key, suffix.lower()


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it, by headers. One that claims gigabytes is refused, not made room for."""

    def read(self, size):
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_files(path, skipped):
    """Yields (folder, key, suffix, first byte, bytes) of a tar's regular files, in its order; unpacks none.

    Where the tar is cut short or damaged it ends, and counts as skipped[DAMAGED]. Sparse files are left out.
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        end = -1
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # or tarfile remembers them all
                if tar.offset <= end:  # a negative size; what comes before would come again without end
                    raise tarfile.ReadError(f"{member.name} ends before it begins")
                end = tar.offset
                folder, key, suffix = sample_name(member.name)
                if not member.isfile() or not key or not suffix:
                    continue
                if member.issparse():
                    skip(skipped, "sparse file in a tar", f"{path}:{member.name}")
                elif 0 <= member.size <= size - member.offset_data:
                    yield folder, key, suffix, member.offset_data, member.size
                else:
                    raise tarfile.ReadError(f"{member.name} is cut off")
            file.seek(tar.offset)
            ending = file.read(512)  # a whole tar ends in empty blocks; a header of zeros looks like its end
            while ending and not ending.strip(b"\0"):
                ending = file.read(LARGEST_HEADER)
            if ending or size < tar.offset + 512:
                raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset}")
    except Exception as error:  # tarfile raises nearly anything on a stranger's bytes, MemoryError too
        skip(skipped, DAMAGED, f"{os.path.basename(path)}: {flame.explained(error)}")


def tar_samples(path, skipped):
    """Yields (folder, key, the opened tar, {suffix: (first byte, bytes)}) of its samples: files that share a
    name up to its first dot. Raises OSError where it is no regular file.
    """
    with open(path, "rb") as file:
        for (folder, key), members in groupby(tar_files(path, skipped), itemgetter(0, 1)):
            yield folder, key, file, {suffix: place for _, _, suffix, *place in members}


# ------------------------------------------------------------------------------------------------------------
# What is skipped

def skip(skipped, reason, place):
    """Counts what is left out: skipped[reason] = [how many, the first five places]."""
    entry = skipped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 5:
        entry[1].append(" ".join(place.split()))  # a name may hold line breaks


def report_skipped(path, skipped):
    """Says on stderr what was skipped, a line a reason."""
    for reason, (count, places) in skipped.items():
        where = ", ".join(places) + ", ..." * (count > len(places))
        print(f"{path}: skipped {count} row{'s' * (count > 1)}: {reason} ({where})", file=sys.stderr)
