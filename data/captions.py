"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the house reads.

A source is a file, several by a range or a glob, or a folder (data/README.md). Python reads TSV, CSV, tars
and texts row by row; DuckDB reads JSON and Parquet, joins, sorts and writes, out of core. Without keys, the
row's number in the file is the key, nine digits, as img2dataset names its samples. A bad row is skipped,
counted and named, never fatal; of a damaged JSON list or Parquet nothing is taken.
"""
import csv
import glob
import gzip
import json
import os
import re
import tempfile
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import duckdb

from data.sources import NAMES, WANTED, picture_beside, source_files
from data.tars import report_skipped, skip, tar_samples
from flame import InputError, PROMPTS, explained, reading

NO_CAPTION = {*NAMES["key"], *NAMES["image"], *NAMES["url"], "image_id", "license", ""}
LARGEST_TEXT = 1 << 24  # of a .txt or .json so much is read: more than an LLM's context has room for
ALIKE = 200             # pairs of a caption and a joined one that tell whether keys mean the same pictures
DUCKDB = {"memory_limit": "4GB", "threads": min(8, os.cpu_count() or 1)}  # what does not fit goes to the disk

# White space but the space; a caption is one line with single spaces, a name has no tab or line break.
ODD = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Of a value in JSON: the captions in it, a text, a list of texts or a conversation; or the name.
# A row of `loaded` is one of the source, or of a join, which has a field, the prompt set of its captions.
SCHEMA = rf"""
CREATE MACRO text_of(x) AS nullif(trim(regexp_replace(
    CASE WHEN json_type(x) = 'VARCHAR' THEN x->>'$' WHEN (x->>'from') = 'gpt' THEN x->>'value' END,
    ' *[{ODD}][ {ODD}]*|  +', ' ', 'g')), '');
CREATE MACRO texts_of(x) AS nullif(list_filter(
    [text_of(t) FOR t IN list_prepend(x, json_extract(x, '$[*]'))], lambda t: t IS NOT NULL), []);
CREATE MACRO name_of(x) AS
    nullif(regexp_replace(coalesce(x->>'$.path', x->>'$'), '[\x00\t\r\n]', ' ', 'g'), '');
CREATE TABLE loaded (field VARCHAR, key VARCHAR, image VARCHAR, url VARCHAR, raw VARCHAR[], short VARCHAR[],
    long VARCHAR[]);
CREATE VIEW source AS SELECT rowid AS row, coalesce(key, format('{{:09d}}', rowid)) AS key, image, url,
    raw[1] AS raw, short[1] AS short, long[1] AS long FROM loaded WHERE field = '';
CREATE VIEW answer AS SELECT rowid AS place, field, coalesce(key, url) AS link,
    coalesce(raw, short, long)[1] AS text FROM loaded WHERE field <> ''"""
# Rows have numbers by now. Kept in order, 15 million would not go to the disk in time.
JOIN = """SET preserve_insertion_order = false;
CREATE TABLE pair AS SELECT row, field, min(place) AS place
FROM (SELECT row, unnest([key, url]) AS link FROM source) JOIN answer USING (link)
WHERE text IS NOT NULL GROUP BY row, field;
CREATE MACRO joined(name) AS TABLE
    SELECT row, text FROM pair JOIN answer USING (place) WHERE pair.field = name;
CREATE TABLE filled AS SELECT row, key, image, coalesce(r.text, raw) AS raw, coalesce(s.text, short) AS short,
    coalesce(l.text, long) AS long FROM source LEFT JOIN joined('raw') r USING (row)
    LEFT JOIN joined('short') s USING (row) LEFT JOIN joined('long') l USING (row);
CREATE TABLE first AS
    SELECT min(row) AS row FROM filled WHERE coalesce(raw, short, long) IS NOT NULL GROUP BY key"""
USED = """SELECT count(text), (SELECT count(*) FROM pair WHERE field = $1), count(*) - count(text)
FROM answer WHERE field = $1"""
FIRST = """SELECT source.key, coalesce(raw, short, long, ''), text
FROM (SELECT row, place FROM pair WHERE field = $1 ORDER BY row LIMIT $2) JOIN source USING (row)
JOIN answer USING (place) ORDER BY row"""
LOST = """SELECT CASE WHEN coalesce(raw, short, long) IS NULL THEN 'no caption, or a broken row'
    ELSE 'key occurs before' END AS reason, count(*), list_transform(min(row + 1, 5), lambda n: 'row ' || n)
FROM filled ANTI JOIN first USING (row) GROUP BY reason ORDER BY reason DESC"""
KEPT = """SELECT count(*), count(raw), count(short), count(long),
    (SELECT sum(len(list_concat(raw[2:], short[2:], long[2:]))) FROM loaded)
FROM filled SEMI JOIN first USING (row)"""
COPY = """COPY (SELECT key, image, coalesce(raw, long, short) AS raw, coalesce(short, long, raw) AS short,
    coalesce(long, short, raw) AS long FROM filled SEMI JOIN first USING (row) ORDER BY row)
TO $path (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')"""
COLUMNS = """SELECT column_name, format('to_json("{{}}"{{}})', column_name,
    if(column_type LIKE '%BLOB%', '.path', ''))
FROM (DESCRIBE FROM {}) WHERE column_type <> 'BLOB' AND NOT contains(column_name, '"')"""
KEYS = r"""SELECT name, '(json->''$."' || name || '"'')' FROM (
    SELECT name, row_number() OVER () AS n FROM (SELECT unnest(json_keys(json)) AS name FROM {}))
WHERE NOT regexp_matches(name, '[''"\\]') GROUP BY name ORDER BY min(n)"""
# A list of objects, an object a line (a broken one is a row of NULL), or COCO's one object of 100 MB.
JSON = "read_json_objects($files, format='{}', ignore_errors=true, maximum_object_size=134217728)"
FORMS = {  # what DuckDB reads: relation of $files, query of its columns as JSON
    ".parquet": ("read_parquet($files, union_by_name=true)", COLUMNS),
    ".json": (JSON.format("auto"), KEYS),
    ".jsonl": (JSON.format("newline_delimited"), KEYS),
}
COCO = """(SELECT text, image->'file_name' AS path
    FROM (SELECT *, row_number() OVER () AS n FROM (SELECT unnest(json->'$.annotations[*]') AS text FROM {0}))
    LEFT JOIN (SELECT unnest(json->'$.images[*]') AS image FROM {0}) ON image->>'id' = text->>'image_id'
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
            skipped |= {reason: entry for reason, *entry in database.execute(LOST).fetchall()}
            report_skipped(captions, skipped)
            total, raw, short, long, others = database.execute(KEPT).fetchone()
            if not total:
                raise InputError(f"{captions}: no caption in its columns {[*columns][:20]}; wanted are some "
                                 f"of {', '.join(NAMES)}")
            left_out = f"; of lists the first counts, {others} are left out" if others else ""
            print(f"{captions}: {total} rows, {raw} raw, {short} short, {long} long captions; where one is "
                  f"missing the row's best is asked{left_out}")
            database.execute(COPY, {"path": str(path)})
    except (duckdb.Error, RuntimeError) as error:
        raise InputError(f"{path}: {explained(error)}; free space there and try again") from None


def check_join(database, captions, field):
    """Shows five of a set's joined captions beside those of their rows, and says how many rows have one.

    Raises InputError where no row has one, or where they are of different pictures.
    """
    total, rows, empty = database.execute(USED, [field]).fetchone()
    print(f"--join {field}: {rows} rows have one of {total} captions; {empty} others are empty or broken")
    pairs = database.execute(FIRST, [field, ALIKE]).fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {raw[:60]!r} | {text[:60]!r}")
    # A recaption shares words of four letters and more with its picture's own caption, more than with another
    # picture's. Where they share none at all, since the languages differ, nothing can be said.
    words = [[set(re.findall(r"\w{4,}", text.lower())) for text in pair] for _, *pair in pairs]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(words, words[1:] + words[:1]))
    if not pairs or len(pairs) == ALIKE and chance > ALIKE / 10 and shared < 1.2 * chance:
        raise InputError(
            f"--join {field}: its keys mean other pictures: {rows} rows of {captions} have one of them, and "
            "share no more words with it than with others. Recaptions go with the tars they were made from, "
            "those of FLAME for CC3M with pixparse/cc3m-wds; give --captions these")


# ------------------------------------------------------------------------------------------------------------
# A source becomes rows of a table of DuckDB

def load(database, scratch, source, skipped, field=""):
    """Appends a source's rows to the table `loaded`, in their order. -> its columns, a dict

    field: the prompt set of a join. Its caption is the column named as the set; without one, the first, of
    neither keys nor pictures, that has texts in the first 1,000 rows: "minicpm" in the recaptioned releases.
    """
    files = source_files(source)
    kind = Path(files[0].name.removesuffix(".gz")).suffix.lower()
    with reading(files[0], WANTED):
        if kind not in FORMS:
            rows = {".tar": tar_rows, ".txt": text_rows}.get(kind, csv_rows)(source, files, skipped)
            kind = ".jsonl"
            files = [f"{scratch}/rows.jsonl"]
            with open(files[0], "w") as spool:  # what is no UTF-8 becomes a broken row
                spool.writelines(json.dumps(row) + "\n" for row in rows)
        relation, names = FORMS[kind]
        paths = {"files": [glob.escape(str(file)) for file in files]}
        columns = dict(database.execute(names.format(relation), paths).fetchall())
        if columns.keys() >= {"images", "annotations"}:  # COCO's; each caption is a row
            relation = COCO.format(relation)
            columns = {"key": "text->'id'", "image": "path", "raw": "text->'caption'"}
        fields = NAMES
        if field:
            fields = {name: NAMES[name] for name in ("key", "url", field)}
            if columns.keys().isdisjoint(NAMES[field]):
                others = [name for name, value in columns.items()
                          if name not in NO_CAPTION and not value.endswith('".path)')][:20]
                counts = ", ".join(f"count(texts_of({columns[name]}))" for name in others)
                texts, = database.execute(f"SELECT [{counts}] FROM (FROM {relation} LIMIT 1000)",
                                          paths).fetchone()
                fields[field] = [name for name, count in zip(others, texts) if count][:1]
        values = [f"'{field}' AS field"]
        for name, aliases in fields.items():
            macro = "texts_of" if name in PROMPTS else "name_of"
            present = [f"{macro}({columns[alias]})" for alias in aliases if alias in columns]
            if present:
                values.append(f"coalesce({', '.join(present)}) AS {name}")
        database.execute(f"INSERT INTO loaded BY NAME SELECT {', '.join(values)} FROM {relation}", paths)
        return columns


# What DuckDB does not read: {name: value} of a row after another.

def csv_rows(source, files, skipped):
    """TSV has no quotes. An empty line is no row, a broken one is an empty row: so img2dataset counts."""
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            header = file.readline()
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if ".csv" in path.name.lower():
                form = {"delimiter": max("\t,;", key=header.count), "strict": True}
            names = next(csv.reader([header], **form))
            lines = file
            if len(names) == 2 and "://" in header:  # no header, as CC3M and CC12M are published
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
    """Samples: .json has captions by any known name, .txt is the raw one."""
    known = {name for field in ("url", *PROMPTS) for name in NAMES[field]}
    for path in files:
        with open(path, "rb") as file:
            for folder, key, parts in tar_samples(path, skipped):
                row = {"key": key}
                for suffix in sorted(parts.keys() & {".json", ".txt"}):
                    offset, size = parts[suffix]
                    file.seek(offset)
                    try:
                        text = file.read(min(size, LARGEST_TEXT)).decode("utf-8-sig")
                        entries = {"raw": text} if suffix == ".txt" else json.loads(text)
                        row |= {name: entries[name] for name in known & entries.keys()}
                    except (ValueError, AttributeError, RecursionError):
                        skip(skipped, "no UTF-8 text, or no JSON object", f"{path}:{folder}{key}{suffix}")
                yield row


def text_rows(folder, files, skipped):
    """Each a.txt that has a picture beside it; the picture's path is key and image."""
    for file in files:
        try:
            image = picture_beside(file).relative_to(folder)
            with open(file, encoding="utf-8-sig") as opened:
                text = opened.read(LARGEST_TEXT)
            yield {"key": str(image.with_suffix("")), "image": str(image), "raw": text}
        except (AttributeError, UnicodeDecodeError):
            skip(skipped, "text without a picture beside it, or no UTF-8", str(file))
