"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the house reads.

    TSV, CSV              a header among `key image raw short long`, open_clip's `filepath title`, DreamLIP's
                          columns; or the official Conceptual Captions, caption<TAB>url without a header
    JSON, JSONL, Parquet  the same fields; COCO's captions, LLaVA's and ShareGPT4V's conversations
    tars                  webdataset's and img2dataset's, never unpacked
    a folder              of tars, of Parquet, of pictures with a .txt each, or with metadata.jsonl or .csv

A source is a file (gzip, zstd too), several by a range or a glob ("cc3m/{0000..0575}.tar", "x-*.parquet"),
or a folder. DuckDB reads, joins and sorts out of core. Tars and folders are read by generators, and TSV by a
loop, since where there is no key the row's number in the file is it, nine digits, as img2dataset names its
samples. A bad row is skipped, counted and named, never fatal; of rows with one key the first counts.
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
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

import duckdb

from flame import InputError, PROMPTS, explained, reading

# Our fields and the picture's URL by others' names; the first that is there counts. Of the recaptions by
# three models that DreamLIP gives, ShareGPT4V's.
NAMES = {
    "key": ["key", "__key__"],
    "image": ["image", "filepath", "file_name", "filename"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption"],
    "short": ["short", "shortSV_captions"],
    "long": ["long", "longSV_captions"],
}
NO_CAPTION = {*NAMES["key"], *NAMES["image"], *NAMES["url"], "id", "image_id", "license", ""}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FOLDERS = ("*.tar", "metadata.jsonl", "metadata.csv", "metadata.parquet", "**/*.txt", "**/*.parquet")
WANTED = "give a TSV, CSV, JSON, JSONL or Parquet file, tars, or a folder of pictures with a .txt each"
DAMAGED = "tar that is none, or damaged from there on"
LARGEST_TEXT = 1 << 20    # bytes of a .txt or .json in a tar: no caption is as long
LARGEST_HEADER = 1 << 14  # bytes of a header in a tar: a name and some numbers
ALIKE = 200               # pairs of a caption and a joined one that tell whether keys mean the same pictures
DUCKDB = {"memory_limit": "4GB", "threads": min(8, os.cpu_count())}  # what does not fit goes to the disk

# White space but the space itself; a caption is one line with single spaces, a name has no tab or line break.
ODD = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CAPTION = (f"nullif(CASE WHEN regexp_matches({{0}}, '[{ODD}]|  |^ | $') "
           f"THEN trim(regexp_replace({{0}}, '[ {ODD}]+', ' ', 'g')) ELSE {{0}} END, '')")
NAME = r"nullif(regexp_replace({0}, '[\x00\t\r\n]', ' ', 'g'), '')"


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
    URL where these have no key. Where a row has no caption for a set, its best one is taken (long, else
    short, else raw). Raises InputError where a file is missing or of no known form, where no row has a
    caption, where a join's captions are of other pictures, or where the disk is full.
    """
    path = Path(path)
    skipped = {}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".captions-") as scratch:
        try:
            with duckdb.connect(f"{scratch}/duckdb", config=DUCKDB) as database:
                columns = load(database, scratch, "source", captions, tuple(NAMES), skipped)
                for name, sources in joins.items():
                    for source in sources:
                        load(database, scratch, f"joined_{name}", source, ("key", "url", name), skipped)
                    join(database, captions, name, ", ".join(map(str, sources)))
                total = copy(database, captions, joins, f"{scratch}/captions.tsv", skipped)
        except duckdb.Error as error:
            raise InputError(f"{path}: {explained(error)}; free space there and try again") from None
        report_skipped(captions, skipped)
        if not total:
            raise InputError(f"{captions}: no row with a caption; its columns are {', '.join(columns)}, "
                             f"wanted are some of {', '.join(NAMES)}")
        os.replace(f"{scratch}/captions.tsv", path)


def copy(database, captions, joins, path, skipped):
    """Writes the rows that have a caption, the first of each key, in the source's order. -> how many"""
    texts = "".join(f", coalesce(j_{name}.text, {name}) AS {name}" if name in joins else f", {name}"
                    for name in PROMPTS)
    joined = "".join(f" LEFT JOIN (SELECT row, text FROM pair_{name} JOIN joined_{name} j ON j.rowid = place)"
                     f" j_{name} USING (row)" for name in joins)
    database.execute(f"CREATE TABLE sorted AS SELECT row, key, image{texts} FROM {KEYED}{joined} "
                     "ORDER BY row")
    best = "coalesce(long, short, raw)"
    database.execute(f"CREATE TABLE kept AS SELECT min(row) AS row FROM sorted WHERE {best} IS NOT NULL "
                     "GROUP BY key")
    for reason, missing in {"no caption": "NULL", "key occurs before": "NOT NULL"}.items():
        count, rows = database.execute("SELECT count(*), min(row, 5) FROM sorted ANTI JOIN kept USING (row) "
                                       f"WHERE {best} IS {missing}").fetchone()
        if count:
            skipped[reason] = [count, [f"row {row + 1}" for row in rows]]
    database.execute("DELETE FROM sorted WHERE row NOT IN (SELECT row FROM kept)")
    counts = ", ".join(f"count({name})" for name in PROMPTS)
    total, *own = database.execute(f"SELECT count(*), {counts} FROM sorted").fetchone()
    print(f"{captions}: {total} rows")
    for name, count in zip(PROMPTS, own):
        if count < total:
            print(f"no {name} caption in {total - count} of {total} rows: their best one is asked")
    columns = ", ".join(f"coalesce({name}, {best}) AS {name}" for name in PROMPTS)
    database.execute(f"COPY (SELECT key, coalesce(image, '') AS image, {columns} FROM sorted) "
                     f"TO {quoted(path)} (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')")
    return total


# ------------------------------------------------------------------------------------------------------------
# Captions of one prompt set in files of their own

KEYED = "(SELECT rowid AS row, * REPLACE (coalesce(key, format('{:09d}', rowid)) AS key) FROM source)"


def join(database, captions, name, files):
    """Makes pair_<set> (row, place): where in joined_<set> a row's caption is, the first of its key.

    Five pairs are shown. Raises InputError where there is none, or where they are of different pictures.
    """
    joined = f"(SELECT rowid AS place, * FROM joined_{name} WHERE text IS NOT NULL)"
    by_key = f"SELECT row, place FROM {KEYED} k JOIN {joined} j ON k.key = j.key"
    by_url = f"SELECT row, place FROM {KEYED} k JOIN {joined} j ON k.url = j.url WHERE j.key IS NULL"
    database.execute(f"CREATE TABLE pair_{name} AS SELECT row, min(place) AS place "
                     f"FROM ({by_key} UNION ALL {by_url}) GROUP BY row")
    total, used = database.execute(f"SELECT (SELECT count(*) FROM {joined}), count(DISTINCT place) "
                                   f"FROM pair_{name}").fetchone()
    if not used:
        raise InputError(f"{files}: of its {total} rows with a {name} caption none has a key or URL that is "
                         f"in {captions}; give --captions the files that it goes with")
    print(f"{files}: {total} {name} captions, {total - used} of them of no row in {captions}")
    pairs = database.execute(
        f"SELECT k.key, coalesce(k.raw, k.short, k.long), j.text FROM (SELECT * FROM pair_{name} ORDER BY row"
        f" LIMIT {ALIKE}) JOIN {KEYED} k USING (row) JOIN {joined} j USING (place) ORDER BY row").fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {(raw or '')[:60]!r} | {text[:60]!r}")
    # A recaption shares words of four letters and more with its picture's own caption, more than with another
    # picture's. Where they share none at all, since the languages differ, nothing can be said.
    words = [[set(re.findall(r"\w{4,}", text.lower())) for text in pair[1:]] for pair in pairs if pair[1]]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(words, words[1:] + words[:1]))
    if len(words) == ALIKE and chance > ALIKE / 10 and shared < 1.2 * chance:
        raise InputError(
            f"{files}: its {name} captions share no more words with the captions of the same keys in "
            f"{captions} than with others: keys mean other pictures there. Recaptions go with the tars they "
            "were made from, those of FLAME for CC3M with pixparse/cc3m-wds; give --captions these")


# ------------------------------------------------------------------------------------------------------------
# Files

def source_files(path):
    """The files that a source names, sorted: one, a range, a glob, or what a folder has."""
    path = Path(path)
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if path.is_dir():
        paths = next(filter(None, (sorted(path.glob(pattern)) for pattern in FOLDERS)), [])
    elif span:
        numbers = range(int(span[2]), int(span[3]) + 1)
        paths = (Path(f"{span[1]}{n:0{len(span[2])}d}{span[4]}") for n in numbers)
    else:
        paths = [path] if path.exists() else [Path(file) for file in sorted(glob.glob(str(path)))] or [path]
    files = []
    for file in paths:  # the first that is missing ends it, however long the range is
        with reading(file, WANTED):
            files.append(file)
    if not files:
        raise InputError(f"{path}: holds no captions; {WANTED}")
    return files


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . in cc3m/ -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def fingerprint(sources):
    """SHA-256 of what captions come from, in hexadecimal; of a tar, gigabytes of pictures, name and size."""
    digest = hashlib.sha256()
    for source in sources:
        for file in source_files(source):
            name = file.relative_to(source) if os.path.isdir(source) else file.name
            digest.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
            if file.suffix != ".tar":
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# A source becomes a table of DuckDB: a SELECT a form

def load(database, scratch, table, source, fields, skipped):
    """Appends a source's rows to a table of DuckDB, in their order. -> the names of the source's columns

    fields: NAMES; for a join key, URL and the prompt set. Its caption is the column named as the set; without
    one, the first text that is neither key nor picture, such as "minicpm" in the recaptioned releases.
    """
    files = source_files(source)
    kind = Path(files[0].name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    ours = ("key", "image", "url", *PROMPTS)
    joined = len(fields) < len(ours)
    with reading(files[0], WANTED):
        if kind == ".tar":
            relation, columns = spool(scratch, ours, tar_rows(files, skipped), skipped)
        elif kind == ".txt" and os.path.isdir(source):
            relation, columns = spool(scratch, ours, text_rows(Path(source), files, skipped), skipped)
        elif kind == ".parquet":
            relation, columns = parquet(database, files)
        elif kind in (".json", ".jsonl"):
            relation, columns = json_objects(database, files)
        elif kind == ".csv" or files[0].suffix == ".zst":
            relation, columns = csv_table(database, files, '"' if kind == ".csv" else "")
        else:
            names, rows = tsv_rows(files, joined, skipped)
            relation, columns = spool(scratch, names, rows, skipped)
        insert(database, table, relation, columns, fields, joined)
        if "read_csv" in relation:
            for reason, line in database.execute("SELECT DISTINCT lower(CAST(error_type AS VARCHAR)), line "
                                                 "FROM reject_errors ORDER BY line").fetchall():
                skip(skipped, reason, f"line {line}")
            database.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    for name in set(PROMPTS) & set(fields):
        taken = next((column for column in NAMES[name] if column in columns), name)
        if taken != name:
            print(f"{name} captions: {taken} of {source}")
    return list(columns)


def insert(database, table, relation, columns, fields, joined):
    """Selects our fields among a relation's columns, {name: (SQL, its type or JSON path)}, into a table."""
    names = dict(NAMES)
    if "conversations" in columns:  # LLaVA's, ShareGPT4V's: the first answer is a long caption, "id" the key
        sql, kind = columns["conversations"]
        turns = f"{sql}->{quoted(kind)}" if kind[0] == "$" else f"to_json({sql})"
        answer = f"list_filter(TRY_CAST({turns} AS JSON[]), lambda t: t->>'from' = 'gpt')[1]->>'value'"
        columns = {"long": (answer, "VARCHAR")} | columns
        names["key"] = [*names["key"], "id"]
    if joined and not any(name in columns for name in names[fields[-1]]):
        names[fields[-1]] = [name for name in columns if name not in NO_CAPTION]
    inner = []
    outer = []
    for field in fields:
        found = [columns[name] for name in names[field] if name in columns]
        found = [*map(text_of if field in PROMPTS else name_of, found), "CAST(NULL AS VARCHAR)"]
        inner.append(f"coalesce({', '.join(found)}) AS {field}")
        outer.append((CAPTION if field in PROMPTS else NAME).format(field))
    own = [*fields[:-1], "text"] if joined else fields
    database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(f'{name} VARCHAR' for name in own)})")
    database.execute(f"INSERT INTO {table} SELECT {', '.join(outer)} FROM "
                     f"(SELECT {', '.join(inner)} FROM {relation})")


def text_of(column):
    """SQL of a caption: a text, or the first of a list of texts; numbers, NaN and objects are none."""
    sql, kind = column
    if kind[0] == "$":
        paths = [quoted(kind), quoted(f"{kind}[0]")]
        cases = " ".join(f"WHEN json_type({sql}, {path}) = 'VARCHAR' THEN {sql}->>{path}" for path in paths)
        sql = f"CASE {cases} END"
    elif kind != "VARCHAR":
        sql = f"{sql}[1]" if kind == "VARCHAR[]" else "NULL"
    return f"nullif({sql}, '')"


def name_of(column):
    """SQL of a key, path or URL, numbers too; of a picture as Hugging Face's datasets keep it its path."""
    sql, kind = column
    if kind[0] == "$":
        return f"{sql}->>{quoted(f'{kind}.path')}, {sql}->>{quoted(kind)}"
    if "BLOB" in kind:
        return f"{sql}.path" if "path VARCHAR" in kind else "NULL"
    return f"nullif(CAST({sql} AS VARCHAR), '')"


def quoted(text, mark="'"):
    return mark + str(text).replace(mark, 2 * mark) + mark


def listed(files):
    """SQL of a list of paths, which are no patterns."""
    return "[" + ", ".join(quoted(glob.escape(str(file))) for file in files) + "]"


def parquet(database, files):
    relation = f"read_parquet({listed(files)}, union_by_name=true)"
    kinds = database.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    return relation, {name: (quoted(name, '"'), kind) for name, kind, *_ in kinds}


def json_objects(database, files):
    """A list of objects, an object a line (a broken one is a row of NULL), or COCO's one object of 100 MB."""
    failure = None
    for form, largest in (("auto", 1 << 24), ("newline_delimited", 1 << 24), ("unstructured", 1 << 30)):
        relation = (f"read_json_objects({listed(files)}, format='{form}', ignore_errors=true, "
                    f"maximum_object_size={largest})")
        try:
            sample = database.execute(f"SELECT json_keys(json) FROM (SELECT json FROM {relation} LIMIT 1000) "
                                      "WHERE json IS NOT NULL").fetchall()
        except duckdb.Error as error:
            failure = failure or error
            continue
        names = dict.fromkeys(chain.from_iterable(keys for keys, in sample))
        if {"images", "annotations"} <= names.keys():  # each caption is a row
            said = f"SELECT json->'$.annotations[*]' AS said FROM {relation}"
            relation = ("(SELECT said, picture "
                        f"FROM (SELECT unnest(said) AS said, unnest(range(len(said))) AS n FROM ({said})) "
                        f"LEFT JOIN (SELECT unnest(json->'$.images[*]') AS picture FROM {relation}) "
                        "ON picture->>'id' = said->>'image_id' ORDER BY n)")
            return relation, {"key": ("said", "$.id"), "image": ("picture", "$.file_name"),
                              "raw": ("said", "$.caption")}
        if names:
            return relation, {name: ("json", f'$."{name}"') for name in names
                              if not re.search(r'["\\]', name)}
    raise failure or ValueError("no JSON object is in it")


def csv_table(database, files, quote):
    """By commas, or by tabs or semicolons where the header has these."""
    line, = database.execute(
        f"SELECT * FROM read_csv({listed(files[:1])}, columns={{'line': 'VARCHAR'}}, delim='\x01', quote='', "
        "header=false, auto_detect=false, strict_mode=false, ignore_errors=true) LIMIT 1").fetchone() or [""]
    delimiter = "\t" if "\t" in line else ";" if ";" in line and "," not in line else ","
    names = next(csv.reader([line], delimiter=delimiter), [])
    return delimited(files, names, f"delim='{delimiter}', quote='{quote}', escape='{quote}', header=true")


def delimited(files, names, options):
    columns = ", ".join(f"'c{n}': 'VARCHAR'" for n in range(len(names)))
    relation = (f"read_csv({listed(files)}, columns={{{columns}}}, {options}, comment='', auto_detect=false, "
                "ignore_errors=true, store_rejects=true)")
    return relation, {name: (f"c{n}", "VARCHAR") for n, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------------
# What DuckDB does not read: generators of (place, fields), which become a table for it

def spool(scratch, names, rows, skipped):
    path = Path(scratch, "rows.tsv")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for place, fields in rows:
            line = "\t".join(fields)
            if "\n" in line or "\r" in line or line.count("\t") >= len(fields):
                line = "\t".join(re.sub("[\t\r\n]", " ", field) for field in fields)
            try:
                file.write(line + "\n")
            except UnicodeEncodeError:
                skip(skipped, "invalid encoding", place)
    return delimited([path], names, "delim='\t', quote='', escape='', header=false")


def tsv_rows(files, joined, skipped):
    """-> names, rows. Where none is the key, the row's number is; empty lines have none, bad rows do."""
    def opened(path):
        opener = gzip.open if path.suffix == ".gz" else open
        return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")

    with opened(files[0]) as file:
        names = file.readline().rstrip("\r\n").split("\t")
    links = ["://" in name for name in names]
    headed = not (len(names) == 2 and any(links))  # else caption<TAB>url (CC3M) or url<TAB>caption (CC12M)
    if not headed:
        names = ["url", "raw"] if links[0] else ["raw", "url"]
    width = len(names)

    def rows():
        number = 0
        for path in files:
            with opened(path) as file:
                for line, text in enumerate(file, 1):
                    fields = text.rstrip("\r\n").split("\t")
                    if fields == [""] or headed and line == 1:
                        continue
                    place = f"{path.name} line {line}"
                    if len(fields) < width or any(fields[width:]):
                        skip(skipped, "missing columns" if len(fields) < width else "too many columns", place)
                    else:
                        yield place, [f"{number:09d}", *fields[:width]]
                    number += 1
    keyed = joined or not set(names).isdisjoint(NAMES["key"])
    return ["" if keyed else "key", *names], rows()


def tar_rows(files, skipped):
    """Yields (place, our fields) of samples: .txt the raw caption, .json any by any known name."""
    for path in files:
        with open(path, "rb") as file:
            for (folder, key), members in groupby(tar_files(path, skipped), itemgetter(0, 1)):
                place = f"{path}:{folder}{key}"
                places = {suffix: where for _, _, suffix, *where in members}
                fields = {}
                for suffix in ("json", "txt"):  # the last one's caption counts
                    offset, size = places.get(suffix, (0, 0))
                    file.seek(offset)
                    try:
                        if size > LARGEST_TEXT:
                            raise ValueError
                        text = file.read(size).decode("utf-8-sig")
                        entries = json.loads(text or "{}") if suffix == "json" else {"raw": text}
                        fields |= {field: entries[name] for field in ("url", *PROMPTS)
                                   for name in reversed(NAMES[field]) if isinstance(entries.get(name), str)
                                   and entries[name]}
                    except (ValueError, AttributeError, RecursionError):
                        skip(skipped, "no UTF-8 text, no JSON object, or too large", f"{place}.{suffix}")
                yield place, [key, "", *(fields.get(field, "") for field in ("url", *PROMPTS))]


def text_rows(folder, files, skipped):
    """Yields (place, our fields) of each a.txt that has a picture beside it; its path is key and image."""
    for here, texts in groupby(files, attrgetter("parent")):
        beside = sorted(path for path in here.iterdir() if path.suffix.lower() in PICTURES)
        pictures = {path.stem: path.relative_to(folder) for path in reversed(beside)}  # the first of a stem
        for file in texts:
            with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
                text = opened.read(LARGEST_TEXT)
            if picture := pictures.get(file.stem):
                yield str(file), [str(picture.with_suffix("")), str(picture), "", text, "", ""]
            else:
                skip(skipped, "text without a picture beside it", str(file))


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
            # A tar ends in empty blocks; a header of zeros looks like its end, unless something lies behind.
            file.seek(tar.offset)
            blocks = iter(lambda: file.read(LARGEST_HEADER), b"")
            if size < tar.offset + 512 or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset}")
    except Exception as error:  # tarfile raises nearly anything on a stranger's bytes, MemoryError too
        skip(skipped, DAMAGED, f"{os.path.basename(path)}: {explained(error)}")


# ------------------------------------------------------------------------------------------------------------
# What is skipped

def skip(skipped, reason, place):
    """Counts what is left out: skipped[reason] = [how many, the first five places]."""
    entry = skipped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 5:
        entry[1].append(" ".join(place.split()))  # a name may hold line breaks


def report_skipped(source, skipped):
    """Says on stderr what was skipped, a line a reason."""
    for reason, (count, places) in skipped.items():
        where = ", ".join(places) + ", ..." * (count > len(places))
        print(f"{source}: skipped {count}: {reason} ({where})", file=sys.stderr)
