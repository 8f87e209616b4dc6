"""captions.tsv: the table that the rest of the code reads, made of the rows of any source (data/sources.py).

DuckDB joins, sorts and writes the rows out of core. Rows with the same image are its captions. Without keys,
the key is the row number in nine digits, as img2dataset names its samples. A bad row is skipped, counted and
reported. A corrupt JSON list or Parquet file is refused as a whole.
"""
import re
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import duckdb

from data.common import report_skipped
from data.sources import DUCKDB, load
from flame import InputError, describe_error, reading

# Rows of another split than the one that is read are left out. Other values of a column "split" don't count.
SPLITS = {"train": ["train", "restval"], "val": ["val", "valid", "validation", "dev"], "test": ["test"]}
JOIN_SAMPLE = 200  # (own, joined) captions to compare: do both files' keys refer to the same images?


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
    captions, each makes a row. chosen: {field: column}, where sources.FIELDS are not right. split: rows that
    a column `split` assigns to another one of SPLITS are left out.

    Raises InputError if a file is missing or has an unknown format, if no row has a caption, if many rows
    have the same key, if a join's captions belong to other images, or if the disk is full.
    """
    skipped = {}
    try:
        with (tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=f"{Path(path).stem}.") as scratch,
              duckdb.connect(f"{scratch}/duckdb", config=DUCKDB) as database):
            spool = f"{scratch}/rows.jsonl"
            create_tables(database)
            load(database, spool, captions, skipped, chosen)
            leave_out_splits(database, captions, split)
            comparable, inside = qualify_keys(database)
            for name, source, column in joins:
                load(database, spool, source, skipped, {name: column} if column else {}, name)
            # Rows are numbered by now. To keep 15 million in order, DuckDB would need more memory.
            database.execute("SET preserve_insertion_order = false")
            for name in {name: None for name, *_ in joins}:
                join(database, captions, name)
            complete(database)
            total, raw = report(database, captions, skipped)
            write_rows(database, path)
            comparable &= 2 * raw > total and "raw" not in [*chosen, *(name for name, *_ in joins)]
            return Written(comparable, bool(inside))
    except (duckdb.Error, RuntimeError) as error:
        raise InputError(f"{path}: {describe_error(error)}; if the disk is full, free space there") from None


def create_tables(database):
    """`loaded` has the rows of the source (field = '') and of each join (field = its prompt set). `source`
    and `recaption` are its two parts.
    """
    database.execute("""
        CREATE TABLE loaded (field VARCHAR, key VARCHAR, uid VARCHAR, image VARCHAR, url VARCHAR,
            raw VARCHAR[], short VARCHAR[], long VARCHAR[], split VARCHAR, place VARCHAR, inside BOOLEAN);
        CREATE VIEW source AS SELECT rowid AS row,
            -- among other keys, a number could be the key of another row or image
            coalesce(key, format(if((SELECT count(key) = 0 FROM loaded WHERE field = ''), '{:09d}',
                'no key {}'), rowid)) AS key,
            uid, url, if(inside, format('{:09d}.jpg', rowid), image) AS image, raw, short, long, place
            FROM loaded WHERE field = '';
        CREATE VIEW recaption AS SELECT rowid AS id, field, key, uid, url, coalesce(raw, short, long) AS texts
            FROM loaded WHERE field <> '';
        CREATE TABLE pair (row BIGINT, field VARCHAR, id BIGINT);
        CREATE MACRO joined(name) AS TABLE
            SELECT row, texts FROM pair JOIN recaption USING (id) WHERE pair.field = name""")


def leave_out_splits(database, captions, split):
    others = sum((names for name, names in SPLITS.items() if name != split), [])
    count, = database.execute("DELETE FROM loaded WHERE lower(split) IN $1", [others]).fetchone()
    if count:
        print(f"{captions}: {count} images or rows of other splits than {split} are left out")


def qualify_keys(database):
    """Put the place (the tar's name and a folder in it) before each key, if more than 1% are repeated. Return
    whether keys are row numbers or from tars, and whether images are inside the source.
    """
    database.execute("""UPDATE loaded SET key = place || key
        WHERE place IS NOT NULL AND (SELECT count(*) > 1.01 * count(DISTINCT key) FROM loaded)""")
    return database.execute(
        "SELECT count(key) = 0 OR count(place) > 0, bool_or(inside) FROM loaded").fetchone()


def complete(database):
    """Make the table `completed`: the n-th row of an image has the n-th caption of each of its lists."""
    database.execute("""
        CREATE TABLE completed AS
        WITH merged AS (SELECT row, key, image, place, coalesce(r.texts, raw) AS raw,
            coalesce(s.texts, short) AS short, coalesce(l.texts, long) AS long
            FROM source LEFT JOIN joined('raw') r USING (row) LEFT JOIN joined('short') s USING (row)
            LEFT JOIN joined('long') l USING (row))
        SELECT row, n, key, image, place, raw[n] AS raw, short[n] AS short, long[n] AS long,
            coalesce(raw[n], short[n], long[n]) IS NULL AS no_caption,
            image IS NULL AND (SELECT bool_or(inside) FROM loaded) IS TRUE AS no_image
        FROM (SELECT *, unnest(range(1, 1 + coalesce(greatest(len(raw), len(short), len(long)), 1))) AS n
            FROM merged)""")
    # A key names an image. So rows with the same key are its captions, unless they have different images, or
    # come from tars, where one key may name several images.
    database.execute("""
        CREATE TABLE repeated AS
        WITH usable AS (FROM completed WHERE NOT (no_caption OR no_image)),
            firsts AS (SELECT key, min(row) AS first FROM usable GROUP BY key HAVING count(*) > 1)
        SELECT DISTINCT u.row FROM usable u JOIN firsts USING (key) JOIN source ON source.row = first
        WHERE u.row > first AND (u.image IS DISTINCT FROM source.image OR u.place IS NOT NULL)""")
    database.execute("""CREATE VIEW written AS
        FROM completed ANTI JOIN repeated USING (row) WHERE NOT (no_caption OR no_image)""")


def report(database, captions, skipped):
    """Print how many rows and captions there are, and what was skipped. Return (rows, rows with a raw one).

    Raises InputError if there are none, or if more than 1% of the rows have the key of another image.
    """
    total, raw, short, long, most = database.execute(
        "SELECT count(*), count(raw), count(short), count(long), max(n) FROM written").fetchone()
    rows = database.execute("""
        SELECT CASE WHEN no_caption THEN 'no caption, or a broken row' WHEN no_image THEN 'no image'
            ELSE 'repeated key' END AS reason,
            count(*), list_transform(min(row + 1, 5), lambda n: 'row ' || n)
        FROM completed WHERE no_caption OR no_image OR row IN (FROM repeated)
        GROUP BY reason ORDER BY reason""").fetchall()
    for reason, count, places in [(each, len(places), places) for each, places in skipped.items()] + rows:
        report_skipped(captions, reason, count, places)
        if reason == "repeated key" and count > (total + count) / 100:
            raise InputError(f"{captions}: {count} rows have the key of an earlier row, and would be lost. "
                             "Make the keys unique, or remove them: then row numbers are the keys")
    if not total:
        raise InputError(f"{captions}: no captions found. A row is broken if it is not UTF-8, or has more or "
                         "fewer fields than the first line: in a CSV, put quotes around captions with commas")
    lists = f"; up to {most} rows per image, from its lists of captions" if most > 1 else ""
    print(f"{captions}: {total} rows with {raw} raw, {short} short, {long} long captions; a row "
          f"without one uses its best other caption{lists}")
    return total, raw


def write_rows(database, path):
    database.execute("""
        COPY (SELECT key, image, coalesce(raw, long, short) AS raw, coalesce(short, long, raw) AS short,
            coalesce(long, short, raw) AS long FROM written ORDER BY row, n)
        TO $path (HEADER, DELIMITER '\t', QUOTE '', ESCAPE '', NULL '')""", {"path": str(path)})


def join(database, captions, field):
    """Join the captions of a prompt set to the source's rows. Print how many rows have one, and five examples
    beside the rows' own captions.

    Rows are joined by the first of URL, uid and key that has at least 90% as many matches as the best of
    them. Raises InputError if no row matches, if more than 1% of the matches have several texts in different
    rows, or if the joined captions belong to other images.
    """
    matches = {by: database.execute(f"""
        SELECT count(*), count(DISTINCT ({by}, hash(texts))) - count(DISTINCT {by})
        FROM recaption WHERE field = $1 AND {by} IN (SELECT {by} FROM source)""", [field]).fetchone()
               for by in ("url", "uid", "key")}
    most = max(count for count, _ in matches.values())
    by, repeated = next((by, repeated) for by, (count, repeated) in matches.items() if count >= 0.9 * most)
    database.execute(f"""
        INSERT INTO pair SELECT row, field, min(id) FROM source JOIN recaption USING ({by})
        WHERE field = $1 AND texts IS NOT NULL GROUP BY row, field""", [field])
    total, rows, empty = database.execute("""
        SELECT count(texts), (SELECT count(*) FROM pair WHERE field = $1), count(*) - count(texts)
        FROM recaption WHERE field = $1""", [field]).fetchone()
    print(f"--join {field}: {rows} rows match one of {total} captions by {by}; empty or broken captions: "
          f"{empty}")
    if not rows:
        raise InputError(f"--join {field}: none of its captions has a URL, uid or key of {captions}")
    if repeated:
        report_skipped(f"--join {field}", f"another text for the same {by}", repeated, [])
    if repeated > rows / 100:
        raise InputError(f"--join {field}: {repeated} texts have the {by} of another one, and would be lost. "
                         "Put the texts of an image into a list, or join each kind of text by itself")
    pairs = database.execute("""
        SELECT source.key, coalesce(raw, short, long, [''])[1], texts[1]
        FROM (SELECT row, id FROM pair WHERE field = $1 ORDER BY hash(row) LIMIT $2) JOIN source USING (row)
        JOIN recaption USING (id) ORDER BY row""", [field, JOIN_SAMPLE]).fetchall()
    for key, raw, text in pairs[:5]:
        print(f"  {key}: {raw[:60]!r} | {text[:60]!r}")
    check_join(captions, field, [pair for _, *pair in pairs])


def check_join(captions, field, pairs):
    """Raise InputError if joined captions belong to other images.

    A recaption shares more words (except frequent ones) with its own image's caption than with the next
    image's. The check has no effect if the languages differ. pairs: (own caption, joined caption)
    """
    words = [[set(re.findall(r"\w+", text.lower())) for text in pair] for pair in pairs]
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
