"""data/captions.py promises:

* the same rows in Parquet, CSV, TSV, JSON and JSONL, packed or not, give the same captions.tsv byte for byte;
* a field is one line with single spaces, whatever was in it; a caption that is no text is none;
* nothing that a file holds is lost without a word: bad rows are skipped, counted and named, never fatal;
* a key that is the row's number is img2dataset's; of rows with one key the first counts;
* joined captions go to their rows by key or URL, and are refused where they are of other pictures;
* a tar, however hostile, is used as far as it goes; pipes, terabytes and endless ranges end in one line.

data/pictures.py promises, of where pictures lie (what a training step sees of them is test_step.py's):

* one rule finds them, for training and for scoring: by the captions' paths, else by key in folders and tars;
* tars are indexed once and never unpacked; what is not there or cannot be read is named by its place.
"""
import gzip
import json
import os
import re
import signal
import tarfile
from contextlib import contextmanager

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image, UnidentifiedImageError

import flame
from data import benchmarks, captions, pictures, tars
from data.captions import read_table, write_table
from data.pictures import Place, find_pictures, open_picture, places_of
from data.sources import fingerprint, source_name
from data.tars import tar_files


@contextmanager
def within(seconds):
    """Fails instead of hanging."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs: not done within {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def table(tmp_path, capsys):
    """table(source, {set: [sources]}) -> (rows of captions.tsv, what was said on the screen, on stderr)"""
    def make(source, joins={}):
        capsys.readouterr()
        (tmp_path / "made").mkdir(exist_ok=True)
        try:
            pairs = [(name, file) for name, files in joins.items() for file in files]
            write_table(tmp_path / "made/captions.tsv", source, pairs)
        finally:
            assert {name for name in os.listdir(tmp_path / "made")} <= {"captions.tsv"}
        said = capsys.readouterr()
        return list(read_table(tmp_path / "made/captions.tsv")), said.out, said.err
    return make


def raws(rows):
    return {row.key: row.raw for row in rows}


# --- the forms

ROWS = [
    ("a", "pics/a  b.jpg", "A  cat.\n", "Short\u3000one", "Long\ttabbed \"quoted\", with commas; all of it"),
    ("7", "", "'tis\r\n a dog", "", ""),
    ("c", "c.jpg", "  ", "x", ""),
    ("d", "d.jpg", "\U0001f98a na\u0308ive \u732b", "", "y" * 5000),
]
TABLE = """key\timage\traw\tshort\tlong
a\tpics/a  b.jpg\tA cat.\tShort one\tLong tabbed "quoted", with commas; all of it
7\t\t'tis a dog\t'tis a dog\t'tis a dog
c\tc.jpg\tx\tx\tx
d\td.jpg\t\U0001f98a na\u0308ive \u732b\t{0}\t{0}
""".format("y" * 5000)


def write_rows(path, rows, kind):
    """Rows of key, image, raw, short and long by DuckDB, and TSV and JSON lists by hand."""
    names = ("key", "image", "raw", "short", "long")
    if kind in ("tsv", "tsv.gz"):  # a table that cannot hold tabs or line breaks
        rows = [names, *([re.sub("[\t\r\n]", " ", field) for field in row] for row in rows)]
        text = "".join("\t".join(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind == "json":
        path.write_text(json.dumps([dict(zip(names, row)) for row in rows]))
    else:
        form = {"csv": "FORMAT csv, HEADER", "csv.gz": "FORMAT csv, HEADER, COMPRESSION gzip",
                "jsonl": "FORMAT json", "json.gz": "FORMAT json, ARRAY true, COMPRESSION gzip",
                "parquet": "FORMAT parquet"}[kind]
        with duckdb.connect() as database:
            database.execute("CREATE TABLE t (key VARCHAR, image VARCHAR, raw VARCHAR, short VARCHAR, "
                             "long VARCHAR)")
            database.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows)
            database.execute(f"COPY t TO '{path}' ({form})")
    return path


KINDS = ("csv", "csv.gz", "tsv", "tsv.gz", "json", "json.gz", "jsonl", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_bytes(tmp_path, table, kind):
    rows, out, err = table(write_rows(tmp_path / f"x.{kind}", ROWS, kind))
    assert (tmp_path / "made/captions.tsv").read_bytes() == TABLE.encode()
    assert len(rows) == 4 and rows[0].image == "pics/a  b.jpg" and not err
    assert "4 rows, 3 raw, 2 short, 2 long captions; where one is missing the row's best is asked" in out


BLANK = "[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
TEXTS = st.one_of(st.text(max_size=12), st.text(" \t\r\n\"',;{}[]\\\x00\x85\u2028ab", max_size=12))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS), min_size=1, max_size=5))
def test_any_text_is_one_line_in_every_form(tmp_path, table, texts):
    rows = [[f"k{n}", *(text.replace("\x00", "") for text in four)] for n, four in enumerate(texts)]
    clean = [[key, re.sub("[\t\r\n]", " ", image), *(re.sub(BLANK, " ", text).strip(" ") for text in three)]
             for key, image, *three in rows]
    best = [long or short or raw for *_, raw, short, long in clean]
    wanted = [(key, image, *(text or last for text in three))
              for (key, image, *three), last in zip(clean, best) if last]
    for kind in ("csv", "tsv", "json", "jsonl", "parquet"):
        source = write_rows(tmp_path / f"x.{kind}", rows, kind)
        if wanted:
            assert [tuple(row) for row in table(source)[0]] == wanted, kind
        else:
            with pytest.raises(flame.InputError, match=r"in its columns \[.*'raw', 'short', 'long'\]; "):
                table(source)


LAYOUTS = {  # a file's name: (what is in it, its rows' key, image, long caption)
    "cc3m.tsv": ("a bus station\thttp://x/1.jpg\n", [("000000000", "", "a bus station")]),
    "cc12m.tsv": ("http://x/1.jpg\ta bus station\n", [("000000000", "", "a bus station")]),
    "openclip.csv": ("filepath\ttitle\n1.jpg\tA, b.\n", [("000000000", "1.jpg", "A, b.")]),
    "metadata.csv": ("file_name,text\na.jpg,a fox\n", [("000000000", "a.jpg", "a fox")]),
    "excel.csv": ('image;raw\na.jpg;"a fox; asleep"\n', [("000000000", "a.jpg", "a fox; asleep")]),
    "blip.jsonl": ('{"image": "a.jpg", "blip_caption": "a fox"}', [("000000000", "a.jpg", "a fox")]),
    "lists.jsonl": ('{"image": "a.jpg", "caption": ["a fox", "asleep"]}', [("000000000", "a.jpg", "a fox")]),
    "datasets.jsonl": ('{"image": {"bytes": null, "path": "a.jpg"}, "text": "a fox"}',
                       [("000000000", "a.jpg", "a fox")]),
    "yfcc15m_clean_open_data.json": (  # DeCLIP's: an object a line, whatever the name says
        '{"filename": "2b/a.jpg", "caption": "a fox", "url": "http://x/1.jpg"}\n'
        '{"filename": "2b/b.jpg", "caption": "a bee", "url": "http://x/2.jpg"}\n',
        [("000000000", "2b/a.jpg", "a fox"), ("000000001", "2b/b.jpg", "a bee")]),
    "brackets.tsv": ("key\traw\n[Photo]\t[Photo] of a cat\n", [("[Photo]", "", "[Photo] of a cat")]),
    "llava.json": (
        '[{"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "What is it?"}, '
        '{"from": "gpt", "value": "A fox."}, {"from": "gpt", "value": "No."}]}, {"id": "8", '
        '"conversations": 5}]', [("7", "a.jpg", "A fox.")]),
    "coco.json": (json.dumps({
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (7, 8)],
        "annotations": [
            {"id": 100 + n, "image_id": image, "caption": text} for n, (image, text) in
            enumerate([(7, "a bus"), (8, "a dog"), (7, "a red bus"), (9, "lost"), (8, 5)])]}, indent=1),
        [("100", "7.jpg", "a bus"), ("101", "8.jpg", "a dog"), ("102", "7.jpg", "a red bus"),
         ("103", "", "lost")]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_people_have_is_read(tmp_path, table, name):
    text, wanted = LAYOUTS[name]
    (tmp_path / name).write_text(text)
    assert [(row.key, row.image, row.long) for row in table(tmp_path / name)[0]] == wanted


def test_of_a_list_of_captions_the_others_are_counted(tmp_path, table):
    texts = [["a", "b", "c"], ["d"], ["e", "f", None], None, []]
    rows = [{"key": f"{n}", "raw": several, "long": f"l {n}"} for n, several in enumerate(texts)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, out, _ = table(tmp_path / "x.jsonl")
    assert raws(made) == {"0": "a", "1": "d", "2": "e", "3": "l 3", "4": "l 4"}
    assert "of lists the first counts, 3 are left out\n" in out
    (tmp_path / "y.tsv").write_text("key\tlong\n" + "".join(f"{n}\tx\n" for n in range(5)))
    assert "left out" not in table(tmp_path / "y.tsv")[1]
    assert "of lists the first counts, 3 are" in table(tmp_path / "y.tsv", {"raw": [tmp_path / "x.jsonl"]})[1]


def test_parquet_as_datasets_writes_it(tmp_path, table):
    """A picture as bytes and path, several captions a row, ids that are numbers, a folder of shards."""
    (tmp_path / "set/data").mkdir(parents=True)
    with duckdb.connect() as database:
        for n in range(2):
            database.execute(f"COPY (SELECT {n} AS key, {{'bytes': 'x'::BLOB, 'path': '{n}.jpg'}} AS image, "
                             f"['first {n}', 'second'] AS caption, 1.5 AS long) "
                             f"TO '{tmp_path}/set/data/train-{n}.parquet'")
    rows, out, err = table(tmp_path / "set")
    assert [tuple(row) for row in rows] == [(f"{n}", f"{n}.jpg", *3 * [f"first {n}"]) for n in range(2)]
    assert "2 raw, 0 short, 0 long captions" in out and "2 are left out" in out and not err


# --- nothing is lost without a word

ODD = {  # a file's name: (its bytes, the captions by key, the numbers of the rows that are skipped)
    "quotes.tsv": (b'key\traw\na\t"x\nb\ty "z"\n', {"a": '"x', "b": 'y "z"'}, []),
    "columns.tsv": (b"key\traw\tlong\na\tx\ty\tz\nb\tx\nc\tx\ty\n\n", {"c": "x"}, [1, 2]),
    "columns.csv": (b"key,raw\na,x,y\nb\nc,x\n", {"c": "x"}, [1, 2]),
    "end.csv": (b'key,raw\na,"x, y\nz"\nb,"unfinished\nc,d\n', {"a": "x, y z"}, [2]),
    "quoted.csv": (b'key,raw\na,"x ""y"""\nb,"z" w\nc,v\n', {"a": 'x "y"', "c": "v"}, [2]),
    "bom.tsv": (b"\xef\xbb\xbfkey\traw\r\na\tx\r\nb\ty\n", {"a": "x", "b": "y"}, []),
    "bom.jsonl": (b'\xef\xbb\xbf{"key": "a", "raw": "x"}\r\n', {"a": "x"}, []),
    "return.tsv": (b"key\traw\na\tx\ry\nb\tz\n", {"b": "z"}, [1]),
    "bytes.tsv": (b"key\traw\na\tx\nb\t\xff\nc\tz\n", {"a": "x", "c": "z"}, [2]),
    "bytes.jsonl": (b'{"key": "a", "raw": "\xff"}\n{"key": "b", "raw": "x"}\n{"raw": "\\ud83e"}\n',
                    {"b": "x"}, [1, 3]),
    "broken.jsonl": (b'{"key": "a", "raw"\n{"key": "b", "raw": "x"}\nnope\n7\n[]\n{"key": "c"', {"b": "x"},
                     [1, 3, 4, 5, 6]),
    "values.json": (json.dumps([*({"key": f"{n}", "raw": f"cat {n}", "long": value} for n, value in enumerate(
        [float("nan"), None, [None], {"x": 1}, True, 7, []])), {"raw": [5]}, 7, None]).encode(),
        {f"{n}": f"cat {n}" for n in range(7)}, [8, 9, 10]),
    "blank.tsv": (b"key\traw\na\t \nb\t\xe3\x80\x80\nc\tx\n", {"c": "x"}, [1, 2]),
    "large.tsv": (b"key\traw\na\t" + b"x" * 3_000_000 + b"\nb\ty\n", {"b": "y"}, [1]),
}


@pytest.mark.parametrize("name", ODD)
def test_bad_rows_are_skipped_counted_and_named(tmp_path, table, name):
    data, wanted, lost = ODD[name]
    (tmp_path / name).write_bytes(data)
    rows, _, err = table(tmp_path / name)
    assert raws(rows) == wanted and all(row.long == row.raw or name == "columns.tsv" for row in rows)
    places = ", ".join(f"row {n}" for n in lost)
    line = f"{tmp_path / name}: skipped {len(lost)}: no caption, or a broken row ({places})\n"
    assert err == line * bool(lost)


def test_of_rows_with_one_key_the_first_counts(tmp_path, table):
    (tmp_path / "twice.tsv").write_text("key\traw\na\t\na\tfirst\nb\tx\na\tsecond\na\tthird\n")
    rows, _, err = table(tmp_path / "twice.tsv")
    assert raws(rows) == {"a": "first", "b": "x"} and "2: key occurs before (row 4, row 5)" in err


def test_packed_data_that_is_cut_off_is_refused(tmp_path, table):
    for kind, text in {"tsv": "key\traw\nk\tR\n", "csv": "key,raw\nk,R\n", "jsonl": '{"raw": "R"}\n'}.items():
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(text.encode() * 999)[:-20])
        with pytest.raises(flame.InputError, match=f"a.{kind}.gz: "):
            table(tmp_path / f"a.{kind}.gz")


def test_the_number_of_a_row_is_img2datasets(tmp_path, table):
    """Seen by running img2dataset: an empty line has no number, every other row has, fetched or not."""
    lines = ["a cat\thttp://x/0", "", "\thttp://x/1", '"b" dog\thttp://x/2', "  \thttp://x/3",
             "d\thttp://x/4"]
    (tmp_path / "cc.tsv").write_text("\n".join(lines))
    rows, out, err = table(tmp_path / "cc.tsv")
    assert raws(rows) == {"000000000": "a cat", "000000002": '"b" dog', "000000004": "d"}
    assert "2: no caption" in err and "3 rows, 3 raw, 0 short, 0 long captions; where one is missing" in out
    (tmp_path / "cc.tsv").write_text("caption\turl\n" + "\n".join(lines))  # the header that it wants
    assert table(tmp_path / "cc.tsv")[0] == rows
    (tmp_path / "bad.tsv").write_bytes(b"a\thttp://x/0\nno url\n\xff\thttp://x/2\nd\thttp://x/3\n")
    rows, _, err = table(tmp_path / "bad.tsv")
    assert [*raws(rows)] == ["000000000", "000000003"]
    assert "2: no caption, or a broken row (row 2, row 3)" in err


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.binary(max_size=80),
    st.text("\t\n[]{}\":,a\u00e4keyrawlong", max_size=80).map(str.encode),
    st.dictionaries(st.sampled_from(["key", "raw", "long", "image"]), st.text(), max_size=4).map(
        lambda row: json.dumps([row]).encode()),
    st.binary(max_size=40).map(lambda line: b"key\traw\n" + line),
))
@example(b"key,raw\ra,A cat.\r")  # lines that end as they did on old Macs
@example(b"PAR1")
def test_no_file_makes_a_traceback(tmp_path, table, data):
    for name, content in {"x": data, "x.csv": data, "x.json": data, "x.tsv.gz": gzip.compress(data),
                          "y.gz": data, "x.tar": data, "x.parquet": data,
                          "y.tar": b"a.txt".ljust(124, b"\0") + data}.items():
        (tmp_path / name).write_bytes(content)
        try:
            rows, _, _ = table(tmp_path / name)
            assert rows and all(row.raw and row.short and row.long and row.key for row in rows)
        except flame.InputError as error:
            assert str(tmp_path / name) in str(error) and "\n" not in str(error)


# --- joins

def joined_file(path, rows):
    path.write_text(json.dumps([{"__key__": key, "minicpm": text} for key, text in rows]))
    return path


def test_joined_captions_go_to_their_rows(tmp_path, table):
    rows = [{"__key__": f"{n}", "raw": f"raw {n}", "short": f"old {n}"} for n in range(5)]
    (tmp_path / "raw.json").write_text(json.dumps(rows))
    first = joined_file(tmp_path / "long1.json", [
        *((f"{n}", f"Long  {n}.") for n in (3, 0, 9)), ("0", "second")])
    more = joined_file(tmp_path / "long2.json", [("2", "Long\n2."), ("3", "later"), ("4", " "), ("8", "x")])
    lines = [f"Short {n}.\tx\t{n}\n" for n in range(4)]
    (tmp_path / "short.tsv").write_text("short\tnote\tkey\n" + "".join(lines))
    joins = {"long": [first, more], "short": [tmp_path / "short*.tsv"]}
    rows, out, err = table(tmp_path / "raw.json", joins)
    assert [row[2:] for row in rows] == [
        ("raw 0", "Short 0.", "Long 0."), ("raw 1", "Short 1.", "Short 1."),
        ("raw 2", "Short 2.", "Long 2."), ("raw 3", "Short 3.", "Long 3."), ("raw 4", "old 4", "old 4")]
    assert "--join long: 3 rows have one of 7 captions; 1 others are empty or broken\n" in out
    assert "  0: 'raw 0' | 'Long 0.'\n" in out and "5 short, 3 long captions" in out


def test_a_joins_captions_are_of_one_column(tmp_path, table):
    """The first that has texts, and of no other where it has none; a caption a column is no join."""
    (tmp_path / "raw.tsv").write_text("raw\nA cat.\nA dog.\n")
    both = [{"__key__": "000000000", "note": None, "minicpm": "Long.", "source": "cc3m"},
            {"__key__": "000000001", "note": None, "minicpm": None, "source": "cc3m"}]
    (tmp_path / "long.json").write_text(json.dumps(both))
    assert [row.long for row in table(tmp_path / "raw.tsv", {"long": [tmp_path / "long.json"]})[0]] == [
        "Long.", "A dog."]
    (tmp_path / "long.json").write_text(json.dumps({f"{n:09d}": "Long." for n in range(3000)}))
    with within(20), pytest.raises(flame.InputError, match="--join long: its keys mean other pictures: 0 "):
        table(tmp_path / "raw.tsv", {"long": [tmp_path / "long.json"]})
    with pytest.raises(flame.InputError, match="no caption in its columns .{,400}; wanted"):
        table(tmp_path / "long.json")


def test_a_field_that_comes_late_is_read(tmp_path, table):
    (tmp_path / "x.jsonl").write_text('{"raw": "x"}\n' * 100_001 + '{"long": "A cat."}\n')
    assert table(tmp_path / "x.jsonl")[0][-1].long == "A cat."


def test_ctrl_c_within_a_query_is_ctrl_c(tmp_path, table, monkeypatch):
    def check_join(*_):
        raise RuntimeError("Query interrupted")  # as DuckDB says it
    monkeypatch.setattr(captions, "check_join", check_join)
    (tmp_path / "x.tsv").write_text("key\traw\nk\tx\n")
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path / "x.tsv", {"long": [tmp_path / "x.tsv"]})


DREAMLIP = ["Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions",
            "longSV_captions", "shortLLA_captions", "longLLA_captions"]


def test_dreamlip_meets_tars_by_the_pictures_url(tmp_path, table):
    """The keys of the tars are in another order than its rows; some of either are not in the other."""
    table_of = [DREAMLIP, *([f"http://x/{n}.jpg", *(f'"{name}, \n""{n}"""' for name in DREAMLIP[1:])]
                            for n in range(9))]
    file = tmp_path / "dreamlip.csv"
    file.write_text("".join(",".join(row) + "\n" for row in table_of))
    (tmp_path / "cc3m").mkdir()
    for shard in range(2):
        members = []
        for n in range(3):
            about = {"caption": "?", "url": f"http://x/{9 - 3 * shard - n}.jpg", "status": "success"}
            members += [member(f"{shard}{n}.json", json.dumps(about).encode()),
                        member(f"{shard}{n}.txt", b"raw")]
        tar(tmp_path / f"cc3m/{shard}.tar", *members)
    rows, out, err = table(f"{tmp_path}/cc3m/{{0..1}}.tar", {"short": [file], "long": [file]})
    wanted = [("00", "raw", "raw", "raw")]
    wanted += [(key, "raw", f'shortSV_captions, "{n}"', f'longSV_captions, "{n}"')
               for key, n in (("01", 8), ("02", 7), ("10", 6), ("11", 5), ("12", 4))]
    assert [(row.key, *row[2:]) for row in rows] == wanted
    assert "--join long: 5 rows have one of 9 captions; 0 others" in out
    rows, _, _ = table(file)
    assert rows[8][:3:2] == ("000000008", 'raw_caption, "8"') and rows[8].long == 'longSV_captions, "8"'
    file.write_text(file.read_text().replace("//x/", "//y/"))
    with pytest.raises(flame.InputError, match="--join short: its keys mean other pictures: 0 rows of "):
        table(tmp_path / "cc3m", {"short": [file]})


@pytest.mark.parametrize("shift", [0, 1, 17, 150])
def test_recaptions_of_other_pictures_are_refused(tmp_path, table, shift):
    random = np.random.default_rng(0)
    names = [f"{word}{n}" for word in ("red", "fox", "under", "tree", "boat", "house", "bird", "green")
             for n in range(5)]
    things = [" ".join(random.choice(names, 4)) for _ in range(300)]
    (tmp_path / "raw.tsv").write_text("raw\n" + "".join(f"a photo of {thing}\n" for thing in things))
    long = joined_file(tmp_path / "long.json", [(f"{n:09d}", f"The photo shows {things[(n + shift) % 300]}.")
                                                for n in range(300)])
    if shift == 0:
        assert len(table(tmp_path / "raw.tsv", {"long": [long]})[0]) == 300
    else:
        with pytest.raises(flame.InputError, match="--join long: its keys mean other .*cc3m-wds"):
            table(tmp_path / "raw.tsv", {"long": [long]})


# --- sources

def test_ranges_globs_and_folders(tmp_path, table):
    for n in range(3):
        (tmp_path / f"x-{n}.tsv").write_text(f"raw\n{n}\n\n{n}{n}\n")
    everything = ["0", "00", "1", "11", "2", "22"]
    for source in ("x-{0..2}.tsv", "x-*.tsv"):  # rows' numbers go on
        rows, _, _ = table(tmp_path / source)
        assert list(raws(rows).items()) == [(f"{n:09d}", text) for n, text in enumerate(everything)]
    for source, what in {"x-{1..3}.tsv": "x-3.tsv: no such file", "x-{2..0}.tsv": "holds no captions",
                         "x-{3..99999999}.tsv": "x-3.tsv: no such file", "y*.tsv": "no such file",
                         "none.tsv": "no such file", ".": "holds no captions"}.items():
        with within(5), pytest.raises(flame.InputError, match=re.escape(what)):
            table(tmp_path / source)
    (tmp_path / "photos/train").mkdir(parents=True)
    (tmp_path / "photos/train/metadata.csv").write_text("file_name,text\na.jpg,a fox\n")
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(flame.InputError, match=r"no caption in its columns \[\]; wanted are some of key, "):
        table(tmp_path / "empty.tsv")
    with pytest.raises(flame.InputError, match="photos: holds no captions; .*metadata.csv lies .*to_parquet"):
        table(tmp_path / "photos")
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\na.jpg,a fox\n")
    assert table(tmp_path / "photos")[0][0][:3] == ("000000000", "a.jpg", "a fox")
    before = fingerprint([("", tmp_path / "photos")])
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\na.jpg,a cat\n")
    after = fingerprint([("", tmp_path / "photos")])
    assert len({before, after, fingerprint([("long", tmp_path / "photos")])}) == 3
    names = {"cc3m.tsv.gz": "cc3m", "cc3m/": "cc3m", "a/cc3m-{0000..0575}.tar": "cc3m", "x-*.parquet": "x"}
    assert {source: source_name(source) for source in names} == names


def test_a_folder_of_pictures_with_a_text_each(tmp_path, table):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a").symlink_to(tmp_path / "elsewhere")
    for name in ("a/x.jpg", "a/x.txt", "b/y.PNG", "b/y.txt", "b/z.txt", "b/bad.jpg", "b/bad.txt"):
        (tmp_path / "photos" / name).parent.resolve().mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"\xff" if "bad" in name else f"caption of {name}".encode())
    rows, _, err = table(tmp_path / "photos")
    assert [row[:3] for row in rows] == [("a/x", "a/x.jpg", "caption of a/x.txt"),
                                         ("b/y", "b/y.PNG", "caption of b/y.txt")]
    assert "2: text without a picture beside it, or no UTF-8" in err and "b/z.txt" in err


@pytest.mark.parametrize("name", ["a.tsv", "a.json", "a.csv", "a.parquet", "a.tar", "a-{0..0}.tar"])
def test_a_pipe_is_refused_in_one_line(tmp_path, table, name):
    pipe = tmp_path / name.replace("{0..0}", "0")
    os.mkfifo(pipe)
    (tmp_path / "raw.tsv").write_text("raw\na\n")
    with within(5):
        for arguments in ((tmp_path / name,), (tmp_path / "raw.tsv", {"long": [tmp_path / name]})):
            with pytest.raises(flame.InputError, match=f"{pipe}: not a regular file"):
                table(*arguments)


# --- tars: hostile ones are made of a header written by hand between two honest samples

def member(name, data=b"", kind=tarfile.REGTYPE, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.type = kind
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(changes.get("format", tarfile.GNU_FORMAT)) + data + bytes(-len(data) % 512)


def tar(path, *members):
    path.write_bytes(b"".join(members) + bytes(1024))


def pax(name, **records):
    """An extended header whose values are as given, then the file that it is about."""
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line) + 3))
        lines += str(length).encode() + line
    return member("pax", lines, tarfile.XHDTYPE) + member(name, b"evil")


SPARSE = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0}
HOSTILE = {  # what: a file in a tar after which nothing can be read
    "negative in base 256": member("evil.txt", size=-512),
    "huge in base 256": member("evil.txt", size=1 << 70),
    "negative in PAX": pax("evil.txt", size=-512),
    "no number in PAX": pax("evil.txt", size="many"),
    "too many digits in PAX": pax("evil.txt", size="9" * 5000),
    "a PAX header of terabytes": member("pax", kind=tarfile.XHDTYPE, size=1 << 42),
    "a PAX header that takes its parser minutes": member("pax", b"7" * 2_000_000, tarfile.XHDTYPE),
    "a long name of terabytes": member("name", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 42),
    "PAX headers without end": member("pax", b"9 a=bcde\n", tarfile.XHDTYPE) * 3000,
    "a sparse map that is none": pax("evil.txt", **{"GNU.sparse.map": "0,1,x", "GNU.sparse.name": "x.txt"}),
    "a sparse file of negative size": pax("evil.txt", **SPARSE, **{"GNU.sparse.realsize": -1}, size=-1024),
    "a sparse file": pax("evil.txt", **{"GNU.sparse.map": "0,4", "GNU.sparse.size": 4}),
    "noise": b"\xff" * 512,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_of_a_hostile_tar_what_comes_before_is_used(tmp_path, table, what):
    tar(tmp_path / "a-0.tar", member("good.txt", b"before"), HOSTILE[what], member("late.txt", b"after"))
    tar(tmp_path / "a-1.tar", member("next.txt", b"another"))
    with within(10):
        rows, _, err = table(tmp_path / "a-{0..1}.tar")
    assert raws(rows) == {"good": "before", "next": "another"} and f"1: {tars.DAMAGED} (a-0.tar: " in err


def test_a_tar_cut_anywhere_gives_what_is_complete(tmp_path):
    whole = b"".join(member(f"{n}.txt", b"x" * 300 * n) for n in range(1, 4)) + bytes(1024)
    for cut in range(0, len(whole) + 1, 100):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        skipped = {}
        found = [key for _, key, _, _, _ in tar_files(tmp_path / "a.tar", skipped)]
        assert found == [key for key, end in (("1", 812), ("2", 2136), ("3", 3972)) if end <= cut]
        assert (tars.DAMAGED in skipped) == (cut < len(whole) - 512)


def test_a_hole_of_zeros_is_no_end(tmp_path, table):
    """tarfile takes a header of zeros for the end of a tar; something behind it says that it is none."""
    for n, hole in enumerate((512, 1024, 40_000)):
        tar(tmp_path / f"{n}.tar", member(f"{n}.txt", b"A"), bytes(hole), member("b.txt", b"B"))
    tar(tmp_path / "3.tar", member("3.txt", b"A"), bytes(hole))  # a long end is one
    rows, _, err = table(tmp_path / "{0..3}.tar")
    assert raws(rows) == dict.fromkeys("0123", "A") and f"skipped 3: {tars.DAMAGED}" in err


def test_samples_of_webdataset_and_img2dataset(tmp_path, table):
    about = {column: f"{column}." for column in DREAMLIP[1:]} | {"url": "http://x/1.jpg", "key": "no"}
    large = b"x" * (captions.LARGEST_TEXT + 1)
    files = {"x/a.large.jpg": b"?", "x/a.json": json.dumps(about).encode(), "x/a.txt": b"as .txt\nhas it",
             "x/._a.txt": b"no sample's", "b.txt": b"\xff", "c.json": b'{"caption": "C"}', "d.json": b"[1]",
             "e.txt": large, "f\ng.txt": b"F", "h.json": b'{"caption": "' + large + b'"}'}
    tar(tmp_path / "cc-000.tar", *(member(name, data) for name, data in files.items()))
    rows, _, err = table(tmp_path)
    assert [(row.key, *row[2:]) for row in rows] == [
        ("a", "as .txt has it", "shortSV_captions.", "longSV_captions."), ("c", "C", "C", "C"),
        ("e", *3 * [large[:-1].decode()]), ("f g", "F", "F", "F")]
    assert "3: no UTF-8 text, or no JSON object" in err and "3: no caption" in err
    samples = pytest.importorskip("webdataset").WebDataset(str(tmp_path / "cc-000.tar"), shardshuffle=False)
    theirs = next(iter(samples.decode()))
    assert (theirs["__key__"], theirs["json"]["longSV_captions"]) == ("x/a", rows[0].long)
    assert tars.sample_name("a.b/c.d.JPG") == ("a.b/", "c", ".d.jpg")


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (value, value, value)).save(path)
    return path.read_bytes()


def found(beside, keys, images=None, source="captions.tsv", **where):
    """{key: the picture's red / 10} of a table of captions that was made of the source"""
    rows, files, places = find_pictures(keys, images or [""] * len(keys), beside / source, **where)
    assert rows.dtype == places.dtype == np.int64 and places.shape == (len(rows), 3)
    return {keys[row]: round(open_picture(place).getpixel((0, 0))[0] / 10)
            for row, place in zip(rows, places_of(files, places))}


# --- where pictures lie

def test_a_key_ends_at_its_names_first_dot_in_folders_and_tars(tmp_path):
    names = {"a.jpg": 10, "b.large.jpg": 20, "c.depth.jpg": 30, "c.jpg": 40, ".d.jpg": 50, "e.jpg": 60}
    data = {name: picture(tmp_path / "captions/sub.folder" / name, value) for name, value in names.items()}
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", *(member(f"x.y/{name}", data[name]) for name in names))
    for folder in (None, tmp_path / "captions", tmp_path / "tars"):
        assert found(tmp_path, ["a", "b", "c", "nowhere"], folder=folder) == {"a": 1, "c": 4}


def test_captioned_tars_are_the_pictures_too(tmp_path):
    """One, a range, a glob, a folder: what embed.py took, train.py and evaluate.py find without --images."""
    (tmp_path / "cc").mkdir()
    for n in range(3):
        data = picture(tmp_path / "x.png", 10 * n)
        tar(tmp_path / f"cc/{n}.tar", member(f"k{n}.png", data), member(f"k{n}.txt", b"caption"))
    keys = ["k0", "k1", "k2"]
    for source in ("cc/{0..2}.tar", "cc/*.tar", "cc"):
        assert found(tmp_path, keys, source=source) == {"k0": 0, "k1": 1, "k2": 2}
        assert len(benchmarks.read_captions(tmp_path / source, None, "raw")[0]) == 3
    assert found(tmp_path, keys, source="cc/1.tar") == {"k1": 1}


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_pictures_that_are_not_there_are_named_with_path_captions_and_cure(tmp_path, folder):
    root = tmp_path / (folder or "")
    keys, images = ["a", "b", "c"], ["", "x/b.png", "x/c.png"]
    with pytest.raises(flame.InputError) as error:
        found(tmp_path, keys, images, folder=folder and root)
    assert re.search(f"no row of .* such as {root}/x/b.png; give --images", str(error.value))
    picture(root / "x/b.png", 20)
    picture(root / "x/c.png", 30)
    assert found(tmp_path, keys, images, folder=folder and root) == {"b": 2, "c": 3}
    with pytest.raises(flame.InputError, match="captions: no row of .* such as a; give --images"):
        found(tmp_path, keys)


def test_tars_are_indexed_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    data = [picture(tmp_path / "x.png", 10 * n) for n in range(3)]
    tar(folder / "0.tar", member("a.png", data[0]), member("b.png", data[1]))
    where = {"folder": folder, "index": tmp_path / "tars.npz"}
    assert found(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "tar_files", None)  # would be called
        assert found(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    assert found(tmp_path, ["a", "c"], **where) == {"a": 0}           # other keys, another index
    with pytest.raises(flame.InputError, match="only at 10,000 a shard are keys row numbers"):
        found(tmp_path, ["x"], folder=folder)
    tar(folder / "1.tar", member("c.png", data[2]))
    os.mkfifo(folder / "2.tar")
    (folder / "3.tar").mkdir()
    with within(10):
        assert found(tmp_path, ["a", "c"], **where) == {"a": 0, "c": 2}   # another tar
    assert f"skipped 2: {tars.DAMAGED} (2.tar: ReadError not a regular" in capsys.readouterr().err
    where["index"].write_bytes(b"damaged")
    with pytest.raises(flame.InputError, match="tars.npz: .*; delete it"):
        found(tmp_path, ["a", "c"], **where)


def test_what_cannot_be_read_is_named_by_its_place(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    large = picture(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(pictures, "LARGEST", len(large) // 2)
    for name, why in {"pipe.png": OSError, "large.png": OSError, "gone.png": OSError,
                      "text.png": UnidentifiedImageError}.items():
        with within(5), pytest.raises(why):
            open_picture(Place(str(tmp_path / name))).load()
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", member("a.png", large))
    _, *where = find_pictures(["a"], [""], tmp_path / "c.tsv", tmp_path / "tars")
    with pytest.raises(OSError):
        open_picture(*places_of(*where)).load()
