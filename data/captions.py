"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the house reads.

A source is a file (TSV, CSV, JSON or JSONL, .gz too; Parquet; a tar), several by a range or a glob
("cc3m/{0000..0575}.tar", "x-*.parquet"), or a folder of tars, of Parquet, of pictures with a .txt each, or
with metadata.jsonl or .csv (data/README.md). Python reads TSV, CSV, tars and texts row by row; DuckDB reads
JSON and Parquet, joins, sorts and writes, out of core. Without keys, the row's number in the file is the key,
nine digits, as img2dataset names its samples. A bad row is skipped, counted and named, never fatal.
"""
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import tempfile
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import duckdb

from data.tars import report_skipped, skip, tar_files
from flame import InputError, PROMPTS, explained, reading

NUMBER = "number of the row"  # a column of TSV and CSV, nine digits
# Tables without a header, told by which of their two columns is a link: CC3M and CC12M as published.
HEADLESS = {(False, True): ["raw", "url"], (True, False): ["url", "raw"]}
# Our fields and the picture's URL by others' names; the first that is present counts. Of the recaptions by
# three models that DreamLIP gives, ShareGPT4V's.
NAMES = {
    "key": ["key", "__key__", "id", NUMBER],
    "image": ["image", "filepath", "file_name", "filename"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption"],
    "short": ["short", "shortSV_captions"],
    "long": ["long", "longSV_captions", "conversations"],
}
NO_CAPTION = {*NAMES["key"], *NAMES["image"], *NAMES["url"], "image_id", "license", ""}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FOLDERS = ("*.tar", "metadata.jsonl", "metadata.csv", "**/*.txt", "**/*.parquet")
CURES = {"*/metadata.*": "give {}",
         "**/*.arrow": "make Parquet of it, in Python: datasets.load_from_disk(DIR).to_parquet(FILE)"}
WANTED = "give a TSV, CSV, JSON, JSONL or Parquet file, or tars"
LARGEST_TEXT = 1 << 20  # bytes of a .txt or .json in a tar: no caption is as long
ALIKE = 200             # pairs of a caption and a joined one that tell whether keys mean the same pictures
DUCKDB = {"memory_limit": "4GB", "threads": min(8, os.cpu_count() or 1)}  # what does not fit goes to the disk

# White space but the space; a caption is one line with single spaces, a name has no tab or line break.
ODD = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SCHEMA = rf"""
CREATE MACRO text_of(x) AS CASE WHEN typeof(x) = 'VARCHAR' THEN CAST(x AS VARCHAR)
    WHEN json_type(to_json(x)) = 'VARCHAR' THEN to_json(x)->>'$'
    WHEN json_type(to_json(x), '$[0]') = 'VARCHAR' THEN to_json(x)->>'$[0]' END;
CREATE MACRO one_line(x) AS nullif(CASE WHEN regexp_matches(x, '[{ODD}]|  |^ | $')
    THEN trim(regexp_replace(x, '[ {ODD}]+', ' ', 'g')) ELSE x END, '');
CREATE MACRO answer_of(x) AS
    list_filter(TRY_CAST(to_json(x) AS JSON[]), lambda t: t->>'from' = 'gpt')[1]->>'value';
CREATE MACRO caption_of(x) AS one_line(coalesce(text_of(x), answer_of(x)));
CREATE MACRO left_of(x) AS CASE WHEN json_type(to_json(x), '$[0]') = 'VARCHAR' THEN len(list_filter(
    json_extract(to_json(x), '$[*]'), lambda t: json_type(t) = 'VARCHAR')) - 1 ELSE 0 END;
CREATE MACRO name_of(x) AS nullif(regexp_replace(CASE WHEN typeof(x) <> 'JSON' THEN CAST(x AS VARCHAR)
    ELSE coalesce(to_json(x)->>'$.path', to_json(x)->>'$') END, '[\x00\t\r\n]', ' ', 'g'), '');
CREATE TABLE source (key VARCHAR, image VARCHAR, url VARCHAR, raw VARCHAR, short VARCHAR, long VARCHAR,
    others BIGINT);
CREATE VIEW keyed AS SELECT rowid AS row, * REPLACE (coalesce(key, format('{{:09d}}', rowid)) AS key)
    FROM source;
CREATE TABLE joined (field VARCHAR, key VARCHAR, url VARCHAR, text VARCHAR, others BIGINT);
CREATE VIEW answer AS SELECT rowid AS place, * FROM joined WHERE text IS NOT NULL;
CREATE TABLE pair (field VARCHAR, row BIGINT, place BIGINT)"""
PAIR = """INSERT INTO pair SELECT $1, row, min(place) FROM (
    SELECT row, place FROM keyed JOIN answer a ON keyed.key = a.key WHERE field = $1 UNION ALL
    SELECT row, place FROM keyed JOIN answer a ON keyed.url = a.url WHERE field = $1 AND a.key IS NULL
) GROUP BY row"""
USED = """SELECT count(*), (SELECT count(DISTINCT place) FROM pair WHERE field = $1)
FROM answer WHERE field = $1"""
FIRST = """SELECT k.key, coalesce(raw, short, long, ''), text
FROM (SELECT * FROM pair WHERE field = $1 ORDER BY row LIMIT $2) JOIN keyed k USING (row)
JOIN answer USING (place) ORDER BY row"""
FILL = """CREATE TABLE filled AS SELECT *, coalesce(long, short, raw) AS best FROM (
    SELECT row, key, coalesce(image, '') AS image, coalesce(r.text, raw) AS raw,
        coalesce(s.text, short) AS short, coalesce(l.text, long) AS long FROM keyed
    LEFT JOIN (SELECT row, text FROM pair JOIN answer USING (place) WHERE pair.field = 'raw') r USING (row)
    LEFT JOIN (SELECT row, text FROM pair JOIN answer USING (place) WHERE pair.field = 'short') s USING (row)
    LEFT JOIN (SELECT row, text FROM pair JOIN answer USING (place) WHERE pair.field = 'long') l USING (row));
CREATE TABLE first AS SELECT min(row) AS row FROM filled WHERE best IS NOT NULL GROUP BY key;
CREATE VIEW kept AS SELECT * FROM filled SEMI JOIN first USING (row)"""
LOST = """SELECT CASE WHEN best IS NULL THEN 'no caption' ELSE 'key occurs before' END AS reason,
    count(*), list_transform(min(row + 1, 5), lambda n: format('row {}', n))
FROM filled ANTI JOIN first USING (row) GROUP BY reason ORDER BY reason DESC"""
LEFT = """SELECT sum(others), count(*) FROM
    (SELECT others FROM source UNION ALL SELECT others FROM joined) WHERE others > 0"""
COPY = """COPY (SELECT key, image, coalesce(raw, best) AS raw, coalesce(short, best) AS short,
    coalesce(long, best) AS long FROM kept ORDER BY row)
TO $path (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')"""
COLUMNS = """SELECT column_name, format('"{{}}"', replace(column_name, '"', '""'))
    || CASE WHEN column_type LIKE '%BLOB%' THEN '.path' ELSE '' END
FROM (DESCRIBE SELECT * FROM {}) WHERE column_type <> 'BLOB'"""
KEYS = r"""SELECT name, format('(json->{{0}}$."{{1}}"{{0}})', chr(39), name) FROM (
    SELECT unnest(json_keys(json)) AS name FROM (SELECT json FROM {} LIMIT 100000) WHERE json IS NOT NULL)
WHERE NOT regexp_matches(name, '[''"\\]')"""
# A list of objects, an object a line (a broken one is a row of NULL), or COCO's one object of 100 MB.
JSON = "read_json_objects($files, format='{}', ignore_errors=true, maximum_object_size=134217728)"
FORMS = {  # what DuckDB reads: relation of $files, query of its columns
    ".parquet": ("read_parquet($files, union_by_name=true)", COLUMNS),
    ".json": (JSON.format("auto"), KEYS),
    ".jsonl": (JSON.format("newline_delimited"), KEYS),
}
COCO_COLUMNS = {"key": "text->'id'", "image": "path", "raw": "text->'caption'"}
COCO = """(SELECT text, picture->'file_name' AS path
    FROM (SELECT unnest(texts) AS text, unnest(range(len(texts))) AS n
        FROM (SELECT json->'$.annotations[*]' AS texts FROM {0}))
    LEFT JOIN (SELECT unnest(json->'$.images[*]') AS picture FROM {0}) ON picture->>'id' = text->>'image_id'
    ORDER BY n)"""


class Row(NamedTuple):
    key: str
    image: str  # the picture's path as the source gives it, or ""
    raw: str    # of each prompt set, the caption that its questions are asked of
    short: str
    long: str


def read_table(path, start=len("\t".join(Row._fields)) + 1, most=None):
    """Yields Row after Row of a captions.tsv that write_table wrote, from that at byte start on."""
    with reading(path, "make it anew with embed.py"), open(path, "rb") as file:
        file.seek(start)
        for line in islice(file, most):
            yield Row(*line.decode()[:-1].split("\t"))


def write_table(path, captions, joins):
    """Makes captions.tsv of a source; says on the screen what was taken, on stderr what was skipped.

    joins: [(prompt set, source)], captions of that set from files of their own, by key, or by the picture's
    URL where these have no key. Where a row has no caption for a set, its best one is taken (long, else
    short, else raw). Raises InputError where a file is missing or of no known form, where no row has a
    caption, where a join's captions are of other pictures, or where the disk is full.
    """
    skipped = {}
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".captions-") as scratch:
        try:
            with duckdb.connect(f"{scratch}/duckdb", config=DUCKDB) as database:
                database.execute(SCHEMA)
                columns = load(database, scratch, captions, skipped)
                for name, source in joins:
                    load(database, scratch, source, skipped, name)
                # Rows have numbers by now. Kept in order, 15 million would not go to the disk in time.
                database.execute("SET preserve_insertion_order = false")
                for name in dict(joins):
                    files = ", ".join(str(source) for other, source in joins if other == name)
                    join(database, captions, name, files)
                total = copy(database, captions, f"{scratch}/captions.tsv", skipped)
        except duckdb.Error as error:
            raise InputError(f"{path}: {explained(error)}; free space there and try again") from None
        finally:
            report_skipped(captions, skipped)
        if not total:
            raise InputError(f"{captions}: no caption in its columns {', '.join(columns)}; wanted are some "
                             f"of {', '.join(NAMES)}")
        os.replace(f"{scratch}/captions.tsv", path)


def copy(database, captions, path, skipped):
    """Writes the rows that have a caption, the first of each key, in the source's order. -> how many"""
    database.execute(FILL)
    skipped |= {reason: entry for reason, *entry in database.execute(LOST).fetchall()}
    database.execute(COPY, {"path": path})
    total, *counts = database.execute("SELECT count(*), count(raw), count(short), count(long) "
                                      "FROM kept").fetchone()
    print(f"{captions}: {total} rows")
    others, lists = database.execute(LEFT).fetchone()
    if lists:
        print(f"lists of captions in {lists} rows: the first counts, {others} others are left out")
    for name, count in zip(PROMPTS, counts):
        if count < total:
            print(f"no {name} caption in {total - count} of {total} rows: their best one is asked")
    return total


def join(database, captions, field, files):
    """Pairs a set's joined captions with rows of the source, of each row the first. Five pairs are shown.

    Raises InputError where there is none, or where they are of different pictures.
    """
    database.execute(PAIR, [field])
    total, used = database.execute(USED, [field]).fetchone()
    if not used:
        raise InputError(f"{files}: of its {total} rows with a {field} caption none has a key or URL that is "
                         f"in {captions}; give --captions the files that it goes with")
    print(f"{files}: {total} {field} captions, {total - used} of them of no row in {captions}")
    pairs = database.execute(FIRST, [field, ALIKE]).fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {raw[:60]!r} | {text[:60]!r}")
    # A recaption shares words of four letters and more with its picture's own caption, more than with another
    # picture's. Where they share none at all, since the languages differ, nothing can be said.
    words = [[set(re.findall(r"\w{4,}", text.lower())) for text in pair] for _, *pair in pairs if pair[0]]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(words, words[1:] + words[:1]))
    if len(words) == ALIKE and chance > ALIKE / 10 and shared < 1.2 * chance:
        raise InputError(
            f"{files}: its {field} captions share no more words with the captions of the same keys in "
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
        paths = [path] if path.exists() else map(Path, sorted(glob.glob(str(path))) or [path])
    files = []
    for file in paths:  # the first that is missing ends it, however long the range is
        with reading(file, WANTED):
            files.append(file)
    if not files:
        cures = [CURES[pattern].format(file.parent) for pattern in CURES for file in path.glob(pattern)]
        raise InputError(f"{path}: holds no captions; {[*cures, WANTED][0]}")
    return files


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . in cc3m/ -> cc3m"""
    return re.split(r"[.{*]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def fingerprint(sources):
    """SHA-256 of what captions come from, in hexadecimal; of a tar, gigabytes of pictures, name and size."""
    digest = hashlib.sha256()
    for source in sources:
        for file in source_files(source):
            if file.suffix == ".txt" and not pictures_beside(file):
                continue  # no caption; train.py may write one there
            name = os.path.relpath(file, Path(source).parent)
            digest.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
            if file.suffix != ".tar":
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# A source becomes rows of a table of DuckDB

def load(database, scratch, source, skipped, field=None):
    """Appends a source's rows to the table `source`, in their order.

    field: the prompt set of a join, to the table `joined`. Its caption is the column named as the set;
    without one, the first text that is neither key nor picture, as "minicpm" in the recaptioned releases.
    -> the names of its columns
    """
    files = source_files(source)
    kind = Path(files[0].name.removesuffix(".gz")).suffix.lower()
    with reading(files[0], WANTED):
        if kind not in FORMS:
            readers = {".tar": tar_rows, ".txt": partial(text_rows, Path(source))}
            rows = readers.get(kind, csv_rows)(files, skipped)
            files = [spool(f"{scratch}/rows.jsonl", rows, skipped)]
        relation, names = FORMS.get(kind, FORMS[".jsonl"])
        paths = {"files": [glob.escape(str(file)) for file in files]}
        columns = dict(database.execute(names.format(relation), paths).fetchall())
        if columns.keys() >= {"images", "annotations"}:  # COCO's; each caption is a row
            relation, columns = COCO.format(relation), COCO_COLUMNS
        table = "source SELECT "
        fields = NAMES
        if field:
            table = f"joined SELECT '{field}', "
            columns.pop(NUMBER, None)  # another file's
            names = NAMES[field]
            if columns.keys().isdisjoint(names):
                names = [name for name in columns if name not in NO_CAPTION]
            fields = {"key": NAMES["key"], "url": NAMES["url"], field: names}
        values = []
        others = ["0"]
        for name, names in fields.items():
            present = [columns[name] for name in names if name in columns]
            macro = "name_of({})"
            if name in PROMPTS:
                macro = "caption_of({})"
                others += map("left_of({})".format, present)
            values.append(f"coalesce({', '.join([*map(macro.format, present), 'NULL'])})")
        selected = f"{', '.join(values)}, {' + '.join(others)}"
        database.execute(f"INSERT INTO {table} {selected} FROM {relation}", paths)
        return columns


# ------------------------------------------------------------------------------------------------------------
# What DuckDB does not read: generators of (place, {name: value})

def spool(path, rows, skipped):
    """Writes rows as JSONL. -> path"""
    with open(path, "wb") as file:
        for place, row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            except UnicodeEncodeError:
                skip(skipped, "no UTF-8", place)
    return path


def csv_rows(files, skipped):
    """TSV has no quotes. Empty lines have no number, bad rows do, as img2dataset counts."""
    number = 0
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            header = file.readline()
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if ".csv" in path.name.lower():
                form = {"delimiter": max("\t,;", key=header.count), "strict": True}
            names = next(csv.reader([header], **form))
            headless = HEADLESS.get(tuple("://" in name for name in names))
            reader = csv.reader(chain([header] * bool(headless), file), **form)
            row = []
            while row is not None:
                place = f"{path.name} line {reader.line_num + 1 + (not headless)}"
                try:
                    row = next(reader, None)
                    if not row:
                        continue
                    if len(row) != len(names):
                        raise csv.Error("not as many columns as the header has")
                    yield place, {NUMBER: f"{number:09d}"} | dict(zip(headless or names, row))
                except csv.Error as error:
                    skip(skipped, str(error), place)
                number += 1


def tar_rows(files, skipped):
    """Samples: .json has captions by any known name, .txt is the raw one."""
    known = {name for field in ("url", *PROMPTS) for name in NAMES[field]}
    for path in files:
        with open(path, "rb") as file:
            for (folder, key), members in groupby(tar_files(path, skipped), itemgetter(0, 1)):
                row = {"key": key}
                place = f"{path}:{folder}{key}"
                for _, _, suffix, offset, size in members:
                    if suffix not in ("json", "txt"):
                        continue
                    file.seek(offset)
                    try:
                        if size > LARGEST_TEXT:
                            raise ValueError
                        text = file.read(size).decode("utf-8-sig")
                        entries = {"raw": text} if suffix == "txt" else json.loads(text)
                        row |= {name: entries[name] for name in known & entries.keys()}
                    except (ValueError, AttributeError, RecursionError):
                        skip(skipped, "no UTF-8 text, no JSON object, or too large", f"{place}.{suffix}")
                yield place, row


def pictures_beside(file):
    return [file.with_suffix(suffix) for suffix in PICTURES if file.with_suffix(suffix).is_file()]


def text_rows(folder, files, skipped):
    """Each a.txt that has a picture beside it; the picture's path is key and image."""
    for file in files:
        pictures = pictures_beside(file)
        if not pictures:
            skip(skipped, "text without a picture beside it", str(file))
            continue
        image = pictures[0].relative_to(folder)
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
            yield str(file), {"key": str(image.with_suffix("")), "image": str(image),
                              "raw": opened.read(LARGEST_TEXT)}
