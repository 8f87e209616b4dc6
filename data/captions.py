"""Captions: every source becomes one table, captions.tsv, which is all that the rest of the code reads.

A source is a file, several files (a range or a glob) or a folder; data/README.md lists the formats. Python
reads TSV, CSV, tars and text files row by row. DuckDB reads JSON and Parquet, joins, sorts and writes, out of
core. Without keys, the key is the row number in nine digits, as img2dataset names its samples. A bad row is
skipped, counted and reported. A corrupt JSON list or Parquet file is refused as a whole.
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
from collections import Counter, defaultdict
from itertools import chain, groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import duckdb
import torch

from data.common import progress_bar
from flame import InputError, PROMPTS, describe_error, reading

# Names that data sets use for each of our fields. Per row, the first with a value is used. SV: ShareGPT4V's.
FIELD_ALIASES = {
    "key": ["key", "__key__", "id"],
    "uid": ["uid"],
    "image": ["image", "filepath", "file_name", "filename", "image_name"],
    "url": ["url", "Image Path", "downloadurl"],
    "raw": ["raw", "title", "caption", "txt", "text", "blip_caption", "raw_caption", "captions", "sentences",
            "comment"],
    "short": ["short", "minicpm", "shortSV_captions"],
    "long": ["long", "minicpm", "longSV_captions", "conversations"],
    "split": ["split"],
    "place": ["__place__"],  # the tar and the folder in it where tar_rows found a sample
}
# Rows of another split than the one that is read are left out. Other values of a column "split" don't count.
SPLITS = {"train": ["train", "restval"], "val": ["val", "valid", "validation", "dev"], "test": ["test"]}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What a folder is searched for, then .txt beside images, then Parquet. Only the first that matches is read.
FOLDER_PATTERNS = ("*.tar", "metadata.jsonl", "metadata.csv", "captions.txt", "*/*.tar")
UNPACKED = "parquet-images"  # in a store; --overwrite deletes it, so it is not called "images" as users' own
SOURCE_FIX = "give a TSV, CSV, JSON, JSONL or Parquet file, or tars"
MAX_TEXT_BYTES = 1 << 24  # read of a .txt or .json file; more than any LLM's context
TOKEN_LINE = re.compile(r"(\S+\.\w+)#(?:\w+#)?\d+[\t ](.*)")  # as in Flickr8k.token.txt: a.jpg#0<TAB>caption
JOIN_SAMPLE = 200         # (own, joined) captions to compare: do both files' keys refer to the same images?
READERS = min(16, len(os.sched_getaffinity(0)))  # processes that read tars
DUCKDB = {"memory_limit": "4GB",  # above it, spills to disk
          "threads": min(8, os.cpu_count() or 1),
          "autoinstall_known_extensions": False, "autoload_known_extensions": False}

# Whitespace except U+0020. Captions become one line with single spaces; names lose tabs and line breaks.
WHITESPACE = r"\x00-\x1f\x7f-\xa0" + "\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# caption_in, captions_in, name_in: the caption, captions or name in a JSON value (a text, a list of texts or
# a conversation). `loaded` has the rows of the source (field = '') and of each join (field = its prompt set).
SCHEMA = rf"""
CREATE MACRO caption_in(x) AS nullif(trim(regexp_replace(
    CASE WHEN json_type(x) = 'VARCHAR' THEN x->>'$' WHEN (x->>'from') = 'gpt' THEN x->>'value'
        WHEN json_type(json_extract(x, '$.raw')) = 'VARCHAR' THEN x->>'raw' END, -- Karpathy's sentences
    ' *[{WHITESPACE}][ {WHITESPACE}]*|  +', ' ', 'g')), '');
CREATE MACRO captions_in(x) AS nullif(list_filter(
    [caption_in(t) FOR t IN list_prepend(x, json_extract(x, '$[*]'))], lambda t: t IS NOT NULL)
    [:if(json_exists(x, '$[0].from'), 1, 1000000)], []); -- of a conversation, the first answer
CREATE MACRO name_in(x) AS nullif(regexp_replace(coalesce(x->>'$.path',
    nullif(regexp_extract(x->>'$', '^\{{''bytes'': .*''path'': ''(.*)''\}}$', 1), ''), -- pandas' to_csv
    x->>'$'), '[\x00\t\r\n]', ' ', 'g'), '');
CREATE TABLE loaded (field VARCHAR, key VARCHAR, uid VARCHAR, image VARCHAR, url VARCHAR, raw VARCHAR[],
    short VARCHAR[], long VARCHAR[], split VARCHAR, place VARCHAR, inside BOOLEAN); -- image is inside Parquet
CREATE VIEW source AS SELECT rowid AS row,
    coalesce(key, format(if((SELECT count(key) = 0 FROM loaded WHERE field = ''), '{{:09d}}',
        'no key {{}}'), rowid)) AS key, -- among other keys, a number could be the key of another row or image
    uid, url, if(inside, format('{{:09d}}.jpg', rowid), image) AS image, raw, short, long, place
    FROM loaded WHERE field = '';
CREATE VIEW recaption AS SELECT rowid AS id, field, key, uid, url, coalesce(raw, short, long)[1] AS text
    FROM loaded WHERE field <> '';
CREATE TABLE pair (row BIGINT, field VARCHAR, id BIGINT);
CREATE MACRO joined(name) AS TABLE
    SELECT row, text FROM pair JOIN recaption USING (id) WHERE pair.field = name"""
# If more than 1% of the keys are repeated, each is preceded by its place: the tar's name and a folder in it.
QUALIFY_KEYS = """UPDATE loaded SET key = place || key
WHERE place IS NOT NULL AND (SELECT count(*) > 1.01 * count(DISTINCT key) FROM loaded)"""
SOURCE_FACTS = """SELECT count(key) = 0 OR count(place) > 0 AS comparable, bool_or(inside)
FROM loaded"""
JOIN_MATCHES = """SELECT count(*) FROM recaption
WHERE field = $1 AND {0} IN (SELECT {0} FROM source)"""
JOIN = """INSERT INTO pair SELECT row, field, min(id) FROM source JOIN recaption USING ({})
WHERE field = $1 AND text IS NOT NULL GROUP BY row, field"""
# The n-th row of an image has the n-th caption of each list.
COMPLETE = """CREATE TABLE completed AS SELECT row, n, key, image, place, coalesce(r.text, raw[n]) AS raw,
    coalesce(s.text, short[n]) AS short, coalesce(l.text, long[n]) AS long,
    coalesce(r.text, raw[n], s.text, short[n], l.text, long[n]) IS NULL AS no_caption,
    image IS NULL AND (SELECT bool_or(inside) FROM loaded) IS TRUE AS no_image
    FROM (SELECT *, unnest(range(1, 1 + coalesce(greatest(len(raw), len(short), len(long)), 1))) AS n
        FROM source) LEFT JOIN joined('raw') r USING (row)
    LEFT JOIN joined('short') s USING (row) LEFT JOIN joined('long') l USING (row)"""
# A key names an image. So rows with the same key are its captions, unless they have different images, or come
# from tars, where one key may name several images.
REPEATED_KEYS = """CREATE TABLE repeated AS
WITH usable AS (FROM completed WHERE NOT (no_caption OR no_image)),
    firsts AS (SELECT key, min(row) AS first FROM usable GROUP BY key HAVING count(*) > 1)
SELECT DISTINCT usable.row FROM usable JOIN firsts USING (key) JOIN source ON source.row = first
WHERE usable.row > first AND (usable.image IS DISTINCT FROM source.image OR usable.place IS NOT NULL);
CREATE VIEW written AS FROM completed ANTI JOIN repeated USING (row) WHERE NOT (no_caption OR no_image)"""
JOIN_COUNTS = """SELECT count(text), (SELECT count(*) FROM pair WHERE field = $1), count(*) - count(text)
FROM recaption WHERE field = $1"""
JOIN_EXAMPLES = """SELECT source.key, coalesce(raw[1], short[1], long[1], ''), text
FROM (SELECT row, id FROM pair WHERE field = $1 ORDER BY hash(row) LIMIT $2) JOIN source USING (row)
JOIN recaption USING (id) ORDER BY row"""
SKIPPED_ROWS = """SELECT CASE WHEN no_caption THEN 'no caption, or a broken row'
    WHEN no_image THEN 'no image' ELSE 'repeated key' END AS reason,
    count(*), list_transform(min(row + 1, 5), lambda n: 'row ' || n)
FROM completed WHERE no_caption OR no_image OR row IN (FROM repeated) GROUP BY reason ORDER BY reason"""
TABLE_COUNTS = "SELECT count(*), count(raw), count(short), count(long), max(n) FROM written"
WRITE_TABLE = """COPY (SELECT key, image, coalesce(raw, long, short) AS raw,
    coalesce(short, long, raw) AS short, coalesce(long, short, raw) AS long
    FROM written ORDER BY row, n)
TO $path (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')"""
# Images in Parquet are structs of bytes and path (Hugging Face), or bytes (img2dataset, column jpg).
IMAGE_STRUCT = r"regexp_full_match(column_type, 'STRUCT\((\S+ \S+, )*.?bytes.? BLOB(, \S+ \S+)*\)')"
COLUMNS = """(SELECT *, '"' || replace(column_name, '"', '""') || '"' AS quoted FROM (DESCRIBE FROM {}))"""
PARQUET_COLUMNS = f"""SELECT column_name, format('to_json({{{{}}}}{{{{}}}})', quoted,
    if({IMAGE_STRUCT}, '.path', ''))
FROM {COLUMNS} WHERE NOT contains(column_type, 'BLOB') OR {IMAGE_STRUCT} AND contains(column_type, 'path')"""
IMAGE_COLUMNS = f"""SELECT quoted || if(column_type = 'BLOB', '', '.bytes') FROM {COLUMNS}
WHERE {IMAGE_STRUCT} OR column_type = 'BLOB' AND column_name IN ('jpg', 'jpeg', 'png', 'webp', 'image')"""
JSON_COLUMNS = r"""SELECT name, '(json->''$."' || name || '"'')' FROM (
    SELECT name, row_number() OVER () AS n FROM (SELECT unnest(json_keys(json)) AS name FROM {}))
WHERE NOT regexp_matches(name, '[''"\\]') GROUP BY name ORDER BY min(n)"""
# A list of objects, one object per line (a broken line is a row of NULL), or COCO's single object of 145 MB.
JSON = "read_json_objects($files, format='{}', ignore_errors=true, maximum_object_size=201326592)"
DUCKDB_FORMATS = {  # suffix: (relation of $files, query for its columns and the JSON value of each)
    ".parquet": ("read_parquet($files, union_by_name=true)", PARQUET_COLUMNS),
    ".json": (JSON.format("auto"), JSON_COLUMNS),
    ".jsonl": (JSON.format("newline_delimited"), JSON_COLUMNS),
}
COCO = """(SELECT text, image->'file_name' AS path
    FROM (SELECT *, row_number() OVER () AS n FROM (SELECT unnest(json->'$.annotations[*]') AS text FROM {0}))
    LEFT JOIN (SELECT unnest(json->'$.images[*]') AS image FROM {0}) ON image->>'id' = text->>'image_id'
    ORDER BY n)"""
# Karpathy's splits: an object with a list of images, each with its captions.
KARPATHY = "(SELECT unnest(json->'$.images[*]') AS json FROM {})"
KARPATHY_IMAGE = "to_json(concat_ws('/', json->>'filepath', json->>'filename'))"


class Row(NamedTuple):
    key: str
    image: str  # the image's path as the source gives it (its name in our tars if it was in Parquet), or ""
    raw: str    # the caption for each prompt set
    short: str
    long: str


class Written(NamedTuple):
    """What write_table found out about a source."""
    comparable: bool  # keys are row numbers or from tars, so the .txt beside an image is its raw caption
    inside: bool      # images are inside Parquet (see unpack_parquet)


def read_table(path, start=len("\t".join(Row._fields)) + 1, max_rows=None):
    """Yield the rows of a captions.tsv, from byte `start` on."""
    with reading(path, "make it again with embed.py"), open(path, "rb") as file:
        file.seek(start)
        for line in islice(file, max_rows):
            yield Row(*line.decode()[:-1].split("\t"))


def write_table(path, captions, joins=(), chosen={}, split="train"):
    """Write captions.tsv from a source; print the counts, and report skipped rows on stderr. Return Written.

    joins: [(prompt set, source, column or "")], captions from other files, joined by image URL, uid or key. A
    row without a caption for a set uses its best one (long before short before raw). If a field is a list of
    captions, each makes a row. chosen: {field: column}, where FIELD_ALIASES are not right. split: rows that a
    column `split` assigns to another one of SPLITS are left out.

    Raises InputError if a file is missing or has an unknown format, if no row has a caption, if many rows
    have the same key, if a join's captions belong to other images, or if the disk is full.
    """
    skipped = {}
    try:
        with (tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=f"{Path(path).stem}.") as scratch,
              duckdb.connect(f"{scratch}/duckdb", config=DUCKDB) as database):
            database.execute(SCHEMA)
            columns = load(database, scratch, captions, skipped, chosen)
            others = sum((names for name, names in SPLITS.items() if name != split), [])
            left_out, = database.execute("DELETE FROM loaded WHERE lower(split) IN $1", [others]).fetchone()
            if left_out:
                print(f"{captions}: {left_out} images or rows of other splits than {split} are left out")
            database.execute(QUALIFY_KEYS)
            comparable, inside = database.execute(SOURCE_FACTS).fetchone()
            for name, source, column in joins:
                load(database, scratch, source, skipped, {name: column} if column else {}, name)
            # Rows are numbered by now. To keep 15 million in order, DuckDB would need more memory.
            database.execute("SET preserve_insertion_order = false")
            for name in {name: None for name, *_ in joins}:
                join(database, captions, name)
            database.execute(COMPLETE)
            database.execute(REPEATED_KEYS)
            total, raw, short, long, most = database.execute(TABLE_COUNTS).fetchone()
            files = [(reason, len(places), places) for reason, places in skipped.items()]
            for reason, count, places in files + database.execute(SKIPPED_ROWS).fetchall():
                report_skipped(captions, reason, count, places)
                if reason == "repeated key" and count > (total + count) / 100:
                    raise InputError(f"{captions}: {count} rows have the key of an earlier row, and would be "
                                     "lost. Make the keys unique, or remove them: then row numbers are the "
                                     "keys")
            if not total:
                raise InputError(f"{captions}: no captions found (columns: {[*columns][:20]}). Rename a "
                                 "column to raw, short or long, or name it: --field raw=COLUMN. If there are "
                                 "no columns, it is compressed, not UTF-8, JSON with a byte order mark, or "
                                 "no line has as many fields as the first one")
            lists = f"; up to {most} rows per image, from its lists of captions" if most > 1 else ""
            print(f"{captions}: {total} rows with {raw} raw, {short} short, {long} long captions; a row "
                  f"without one uses its best other caption{lists}")
            database.execute(WRITE_TABLE, {"path": str(path)})
            comparable &= 2 * raw > total and "raw" not in [*chosen, *(name for name, *_ in joins)]
            return Written(comparable, bool(inside))
    except (duckdb.Error, RuntimeError) as error:
        raise InputError(f"{path}: {describe_error(error)}; if the disk is full, free space there") from None


def join(database, captions, field):
    """Join the captions of a prompt set to the source's rows. Print how many rows have one, and five examples
    beside the rows' own captions.

    Rows are joined by the first of URL, uid and key that has at least 90% as many matches as the best of
    them. Raises InputError if no row matches, or if the joined captions belong to other images.
    """
    matches = {by: database.execute(JOIN_MATCHES.format(by), [field]).fetchone()[0]
               for by in ("url", "uid", "key")}
    by = next(by for by, count in matches.items() if count >= 0.9 * max(matches.values()))
    database.execute(JOIN.format(by), [field])
    total, rows, empty = database.execute(JOIN_COUNTS, [field]).fetchone()
    print(f"--join {field}: {rows} rows match one of {total} captions by {by}; empty or broken captions: "
          f"{empty}")
    if not rows:
        raise InputError(f"--join {field}: none of its captions has a URL, uid or key of {captions}")
    pairs = database.execute(JOIN_EXAMPLES, [field, JOIN_SAMPLE]).fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {raw[:60]!r} | {text[:60]!r}")
    # A recaption shares more words (except frequent ones) with its own image's caption than with the next
    # image's. The check has no effect if the languages differ.
    words = [[set(re.findall(r"\w+", text.lower())) for text in pair] for _, *pair in pairs]
    counts = Counter(chain(*(raw for raw, _ in words)))
    frequent = {word for word, count in counts.items() if count > len(pairs) / 5}
    words = [(raw - frequent, text) for raw, text in words]
    shared = sum(len(raw & text) for raw, text in words)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(words, words[1:] + words[:1]))
    if len(pairs) >= 20 and chance > len(pairs) / 10 and shared < 1.2 * chance:
        raise InputError(
            f"--join {field}: its keys belong to other images than those of {captions}: the matches share no "
            "more words than random pairs. Use the tars that the recaptions were made from (for FLAME's CC3M "
            "recaptions: pixparse/cc3m-wds)")


# ------------------------------------------------------------------------------------------------------------
# Loading a source into DuckDB

def load(database, scratch, source, skipped, chosen, field=""):
    """Append the rows of a source to the table `loaded`, in order. Return its columns as a dict.

    chosen: {field: column} for any field of FIELD_ALIASES. field: the prompt set that a join fills, or "".
    """
    files = source_files(source)
    kind = Path(files[0].name.removesuffix(".gz")).suffix.lower()
    fields = FIELD_ALIASES | {name: [column] for name, column in chosen.items()}
    with reading(files[0], SOURCE_FIX):
        if kind not in DUCKDB_FORMATS:
            reader = {".tar": tar_rows, ".txt": text_rows}.get(kind, csv_rows)
            if kind == ".txt" and (not Path(source).is_dir() or files[0].name == "captions.txt"):
                reader = csv_rows
            kind = ".jsonl"
            rows = reader(source, files, skipped, fields)
            files = [f"{scratch}/rows.jsonl"]
            with open(files[0], "w") as spool:  # invalid UTF-8 becomes a broken row
                spool.writelines(json.dumps(row) + "\n" for row in rows)
        relation, column_query = DUCKDB_FORMATS[kind]
        for file in files if kind == ".json" else ():
            check_json_list(file)
        paths = {"files": [glob.escape(os.path.abspath(file)) for file in files]}
        columns = dict(database.execute(column_query.format(relation), paths).fetchall())
        if columns.keys() >= {"images", "annotations"}:  # COCO; each annotation is a row
            if len(files) > 1:  # ids are unique within one file only
                raise InputError(f"{source}: give one COCO file at a time")
            relation = COCO.format(relation)
            columns = {"key": "text->'id'", "image": "path", "raw": "text->'caption'"}
        elif "images" in columns and kind == ".json":
            relation = KARPATHY.format(relation)
            columns = dict(database.execute(JSON_COLUMNS.format(relation), paths).fetchall())
            columns["image"] = KARPATHY_IMAGE
        for name in [field] if field else chosen:
            if columns.keys().isdisjoint(fields[name]):
                raise InputError(f"{source}: no column {' or '.join(fields[name])} (columns: "
                                 f"{', '.join([*columns][:20])}). Name one: --field {name}=COLUMN, or "
                                 f"--join {name}=FILE:COLUMN")
        values = [f"'{field}' AS field"]
        if field:
            fields = {name: fields[name] for name in ("key", "uid", "url", field)}
        elif kind == ".parquet":
            images = database.execute(IMAGE_COLUMNS.format(relation), paths).fetchall()
            if len(images) > 1:
                names = ", ".join(image for image, in images)
                raise InputError(f"{source}: several columns have images ({names}). Remove those that the "
                                 "captions don't describe")
            values += [f"{image} IS NOT NULL AS inside" for image, in images]
        used = []
        for name, aliases in fields.items():
            macro = "captions_in" if name in PROMPTS else "name_in"
            present = [alias for alias in aliases if alias in columns]
            found = [f"{macro}({columns[alias]})" for alias in present]
            if not present and name in PROMPTS:  # caption_0, caption_1 ...
                present = [column for alias in aliases for column in columns
                           if re.fullmatch(re.escape(alias) + r"_?\d+", column)]
                found = [f"list_concat({', '.join(f'captions_in({columns[column]})' for column in present)})"]
            if present:
                values.append(f"coalesce({', '.join(found)}) AS {name}")
                used.append(f"{name}: {', '.join(present)}")
        print(f"{f'--join {field}: ' if field else ''}{source}, columns {'; '.join(used)}")
        database.execute(f"INSERT INTO loaded BY NAME SELECT {', '.join(values)} FROM {relation}", paths)
        return columns


def check_json_list(path):
    """Raise InputError if a JSON list is cut off. After a comma, DuckDB does not notice it."""
    with reading(path, "get the whole file"), open(path, "rb") as file:
        if file.read(1 << 10).lstrip()[:1] == b"[":
            file.seek(-min(1 << 10, os.path.getsize(path)), os.SEEK_END)
            if not file.read().rstrip().endswith(b"]"):
                raise ValueError("the list does not end with ]")


# Readers for what DuckDB does not read. They yield rows, dicts {name: value}.

def csv_rows(source, files, skipped, fields):
    """Lines as in Flickr8k.token.txt; TSV (without quoting); CSV, also as .txt. As in img2dataset, empty
    lines are not rows. A broken row yields {} for each of its lines, as it may have swallowed other rows.
    """
    csv.field_size_limit(MAX_TEXT_BYTES)  # beyond it, csv would read on inside the field
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        with (reading(path, SOURCE_FIX),
              opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file):
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
                if len(row) == len(names):
                    yield dict(zip(names, row))
                elif row:
                    yield from repeat({}, reader.line_num - first)
                first = reader.line_num
                try:
                    row = next(reader, None)
                except csv.Error:
                    row = ["broken"] * (len(names) + 1)  # not the length of a row


def tar_rows(source, files, skipped, fields):
    """webdataset samples. .txt is the raw caption, .long.txt the long one; .json has captions, url or uid."""
    known = set(chain(*(fields[name] for name in ("uid", "url", *PROMPTS))))
    places = tar_names(files)

    def read(n, skipped):
        rows = []
        with open(files[n], "rb") as file:
            for folder, key, parts in tar_samples(files[n], skipped):
                row = {"key": key, "__place__": places[n] + folder}
                for suffix in sorted(parts, key=lambda suffix: suffix.endswith(".txt")):  # .json, then .txt
                    offset, size = parts[suffix]
                    name, _, kind = suffix[1:].rpartition(".")
                    if kind not in ("json", "txt"):
                        continue
                    file.seek(offset)
                    try:
                        text = file.read(min(size, MAX_TEXT_BYTES)).decode("utf-8-sig")
                        entries = {name or "raw": text} if kind == "txt" else json.loads(text)
                        row |= {name: entries[name] for name in entries.keys() & known}
                    except (ValueError, AttributeError, RecursionError):
                        skipped.setdefault("not UTF-8, or not a JSON object", []).append(
                            f"{files[n]}:{folder}{key}{suffix}")
                rows.append(row)
        return rows

    return split_lines(source, chain.from_iterable(in_processes(read, len(files), skipped, "reading tars")))


def text_rows(folder, files, skipped, fields):
    """Yield rows of a folder with a.txt beside a.jpg. `image` is the path in the folder, `key` the same
    without its suffix.
    """
    images = defaultdict(list)
    for path in map(Path, files_below(folder, IMAGE_SUFFIXES)):
        images[path.with_suffix("")].append(path.relative_to(folder))

    def read():
        for file in files:
            try:
                image, = images[file.with_suffix("")]
                with open(file, encoding="utf-8-sig") as opened:
                    text = opened.read(MAX_TEXT_BYTES)
                yield {"key": str(image.with_suffix("")), "image": str(image), "raw": text}
            except ValueError:  # UnicodeDecodeError included
                skipped.setdefault("text with several images beside it, or not UTF-8", []).append(str(file))

    return split_lines(folder, read())


def split_lines(source, rows):
    """Make each line of a .txt a caption if most of the first 1,000 files have several lines, as in
    CLIP_benchmark's. Otherwise a file is one caption: web alt texts may contain line breaks. Print which it
    was.
    """
    def lines(row):
        return list(filter(None, map(str.strip, (row.get("raw") or "").split("\n"))))

    first = list(islice(rows, 1000))
    each = 2 * sum(len(lines(row)) > 1 for row in first) > len(first)
    count = total = 0
    for row in chain(first, rows):
        total += 1
        if len(lines(row)) > 1:
            count += 1
            row = row | {"raw": lines(row)} if each else row
        yield row
    if count:
        print(f"{source}: {count} of {total} .txt files have several lines; "
              + ("each line is a caption" if each else "each file is one caption"))


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
        raise InputError(f"{path}: no captions found; {SOURCE_FIX}, or a folder with metadata.csv. "
                         "Convert `save_to_disk` output with datasets.load_from_disk(DIR).to_parquet(FILE)")
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


# ------------------------------------------------------------------------------------------------------------
# Tars

CORRUPT_TAR = "not a tar file, or corrupt from this point"
MAX_HEADER_BYTES = 1 << 14  # a tar header has a name and a few numbers
MAX_PADDING = 1 << 20       # zeros at the end of a tar


def split_member_name(path):
    """Return (folder, key, suffix): "a/", "b", ".c.jpg" for "a/b.c.JPG". A key ends at its first dot."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
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

    Stops where a tar is truncated or corrupt, and adds that place to skipped[CORRUPT_TAR].
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
            # tarfile stops at any block of zeros. It is the end only if everything after it is zero too, and
            # not more than padding: a tar of reserved size that was not written to its end has many zeros.
            file.seek(tar.offset)
            blocks = iter(lambda: file.read(MAX_HEADER_BYTES), b"")
            if not 512 <= size - tar.offset <= MAX_PADDING or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError(f"neither a file nor the end of the tar at byte {tar.offset}")
    except Exception as error:  # tarfile can raise any exception on corrupt bytes, MemoryError included
        skipped.setdefault(CORRUPT_TAR, []).append(f"{os.path.basename(path)}: {describe_error(error)}")


def tar_samples(path, skipped):
    """Yield (folder, key, {suffix: (offset, size)}) for each run of files with the same key (webdataset)."""
    for (folder, key), files in groupby(tar_members(path, skipped), itemgetter(0, 1)):
        yield folder, key, {suffix: span for _, _, suffix, *span in files}


def is_image(suffix):
    """Return whether a tar member with this suffix is a sample's image: .jpg, .image.jpg, not .mask.png."""
    return suffix.removeprefix(".image") in IMAGE_SUFFIXES


def tar_names(files):
    """Return "a/00000/" for a/00000.tar if not all files are in folder a, otherwise "00000/"."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(file, root).removesuffix(".tar") + "/" for file in files]


def in_processes(function, n, skipped, description):
    """Yield function(i, skipped) for i in range(n), in order, with a progress bar, computed by processes that
    torch ends if this one is killed. skipped: {reason: places}, to which each call adds what it skips.
    """
    def call(i):
        places = {}
        return function(i, places), places

    loader = torch.utils.data.DataLoader(
        range(n), batch_size=None, collate_fn=call, num_workers=READERS if n > 3 else 0,
        multiprocessing_context="fork" if n > 3 else None)
    for result, places in progress_bar(loader, description, unit=" files", disable=n < 100):
        for reason in places:
            skipped.setdefault(reason, []).extend(places[reason])
        yield result


def report_skipped(source, reason, count, places):
    """Print a line on stderr, with the first five places. A name may contain line breaks."""
    first = " ".join(", ".join(places[:5]).split())
    print(f"{source}: skipped {count}: {reason} ({first})", file=sys.stderr)
