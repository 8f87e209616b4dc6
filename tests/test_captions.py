"""Tests of data/captions.py (sources, joins, tars) and of finding images in data/images.py.

test_forms.py tests that captions meet their images, test_step.py what a training step makes of the images.
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
import pandas
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image, UnidentifiedImageError

import flame
from data import captions, images as data_images, sources, tars
from data.captions import read_table, write_table
from data.images import ImageLocation, find_images, locations_of, open_image
from data.sources import hash_sources, source_name, split_column
from data.tars import tar_members


@contextmanager
def within(seconds):
    """Fail the test instead of hanging."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not finished within {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def table(tmp_path, capsys):
    """table(source, {prompt set: [joined sources]}) -> (rows of captions.tsv, stdout, stderr)"""
    def make(source, joins={}, chosen={}):
        capsys.readouterr()
        (tmp_path / "made").mkdir(exist_ok=True)
        try:
            parts = [(name, *split_column(file)) for name, files in joins.items() for file in files]
            write_table(tmp_path / "made/captions.tsv", source, parts, chosen)
        finally:
            assert {name for name in os.listdir(tmp_path / "made")} <= {"captions.tsv"}
        out, err = capsys.readouterr()
        return list(read_table(tmp_path / "made/captions.tsv")), out, err
    return make


def raw_by_key(rows):
    return {row.key: row.raw for row in rows}


# --- file formats

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
    """Write rows of key, image, raw, short, long: TSV and JSON lists by hand, other formats by DuckDB."""
    names = ("key", "image", "raw", "short", "long")
    if kind in ("tsv", "tsv.gz"):  # cannot contain tabs or line breaks
        rows = [names, *([re.sub("[\t\r\n]", " ", field) for field in row] for row in rows)]
        text = "".join("\t".join(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind == "json":
        path.write_text(json.dumps([dict(zip(names, row)) for row in rows]))
    else:
        options = {"csv": "FORMAT csv, HEADER", "csv.gz": "FORMAT csv, HEADER, COMPRESSION gzip",
                   "jsonl": "FORMAT json", "json.gz": "FORMAT json, ARRAY true, COMPRESSION gzip",
                   "parquet": "FORMAT parquet"}[kind]
        with duckdb.connect() as database:
            database.execute("CREATE TABLE t (key VARCHAR, image VARCHAR, raw VARCHAR, short VARCHAR, "
                             "long VARCHAR)")
            database.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows)
            database.execute(f"COPY t TO '{path}' ({options})")
    return path


FORMATS = ("csv", "csv.gz", "tsv", "tsv.gz", "json", "json.gz", "jsonl", "parquet")


@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_give_the_same_bytes(tmp_path, table, kind):
    rows, out, err = table(write_rows(tmp_path / f"x.{kind}", ROWS, kind))
    assert (tmp_path / "made/captions.tsv").read_bytes() == TABLE.encode()
    assert len(rows) == 4 and rows[0].image == "pics/a  b.jpg" and not err
    assert "4 rows with 3 raw, 2 short, 2 long captions; a row without one uses its best other caption" in out


BLANK = "[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
TEXTS = st.one_of(st.text(max_size=12), st.text(" \t\r\n\"',;{}[]\\\x00\x85\u2028ab", max_size=12))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS), min_size=1, max_size=5))
def test_any_text_becomes_one_line_in_all_formats(tmp_path, table, texts):
    rows = [[f"k{n}", *(text.replace("\x00", "") for text in four)] for n, four in enumerate(texts)]
    clean = [[key, re.sub("[\t\r\n]", " ", image), *(re.sub(BLANK, " ", text).strip(" ") for text in three)]
             for key, image, *three in rows]
    best = [long or short or raw for *_, raw, short, long in clean]
    expected = [(key, image, *(text or fallback for text in three))
                for (key, image, *three), fallback in zip(clean, best) if fallback]
    nested = pandas.DataFrame(rows, columns=["key", "image", *flame.PROMPTS])
    for field in flame.PROMPTS:  # not a text or a list of texts, so DuckDB does not read it alone
        nested[field] = [[{"raw": text}] for text in nested[field]]
    nested.to_parquet(tmp_path / "nested.parquet")
    files = [write_rows(tmp_path / f"x.{kind}", rows, kind) for kind in FORMATS]
    for source in (*files, tmp_path / "nested.parquet"):
        if expected:
            assert [tuple(row) for row in table(source)[0]] == expected, source
        else:
            with pytest.raises(flame.InputError, match=r"no captions found\. A row is broken if"):
                table(source)


LAYOUTS = {  # file name: (content, expected [(key, image, long caption)])
    "cc3m.tsv": ("a bus station\thttp://x/1.jpg\n", [("000000000", "", "a bus station")]),
    "cc12m.tsv": ("http://x/1.jpg\ta bus station\n", [("000000000", "", "a bus station")]),
    "openclip.csv": ("filepath\ttitle\n1.jpg\tA, b.\n", [("000000000", "1.jpg", "A, b.")]),
    "excel.csv": ('image;raw\na.jpg;"a fox; asleep"\n', [("000000000", "a.jpg", "a fox; asleep")]),
    "blip.jsonl": ('{"image": "a.jpg", "blip_caption": "a fox"}', [("000000000", "a.jpg", "a fox")]),
    "lists.jsonl": ('{"image": "a.jpg", "caption": ["a fox", "asleep"]}',
                    [("000000000", "a.jpg", "a fox"), ("000000000", "a.jpg", "asleep")]),
    "yfcc15m_clean_open_data.json": (  # DeCLIP's: one object per line, although the suffix is .json
        '{"filename": "2b/a.jpg", "caption": "a fox", "url": "http://x/1.jpg"}\n'
        '{"filename": "2b/b.jpg", "caption": "a bee", "url": "http://x/2.jpg"}\n',
        [("000000000", "2b/a.jpg", "a fox"), ("000000001", "2b/b.jpg", "a bee")]),
    "brackets.tsv": ("key\traw\n[Photo]\t[Photo] of a cat\n", [("[Photo]", "", "[Photo] of a cat")]),
    "llava.json": (
        '[{"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "What is it?"}, '
        '{"from": "gpt", "value": "A fox."}, {"from": "gpt", "value": "No."}]}, {"id": "8", '
        '"conversations": 5}]', [("7", "a.jpg", "A fox.")]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_common_layouts(tmp_path, table, name):
    text, expected = LAYOUTS[name]
    (tmp_path / name).write_text(text)
    assert [(row.key, row.image, row.long) for row in table(tmp_path / name)[0]] == expected


def test_each_caption_of_a_list_is_a_row(tmp_path, table):
    texts = [["a", "b", "c"], ["d"], ["e", "f", None], None, [], [5, 6], "g"]
    rows = [{"key": f"{n}", "image": f"{n}.jpg", "raw": captions} for n, captions in enumerate(texts)]
    rows[1]["long"] = ["h", "i"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, out, err = table(tmp_path / "x.jsonl")
    assert [(row.key, row.raw, row.long) for row in made] == [
        ("0", "a", "a"), ("0", "b", "b"), ("0", "c", "c"), ("1", "d", "h"), ("1", "i", "i"), ("2", "e", "e"),
        ("2", "f", "f"), ("6", "g", "g")]
    assert "up to 3 rows per image, from its lists" in out
    assert "skipped 3: no caption, or a broken row (row 4, row 5, row 6)" in err


# --- skipped rows

BROKEN_FILES = {  # file name: (content, expected raw captions by key, numbers of the skipped rows)
    "quotes.tsv": (b'key\traw\na\t"x\nb\ty "z"\n', {"a": '"x', "b": 'y "z"'}, []),
    "columns.tsv": (b"key\traw\tlong\na\tx\ty\tz\nb\tx\nc\tx\ty\n\n", {"c": "x"}, [1, 2]),
    "columns.csv": (b"key,raw\na,x,y\nb\nc,x\n", {"c": "x"}, [1, 2]),
    "end.csv": (b'key,raw\na,"x, y\nz"\nb,"unfinished\nc,d\n', {"a": "x, y z"}, [2, 3]),
    "quoted.csv": (b'key,raw\na,"x ""y"""\nb,"z" w\nc,v\n', {"a": 'x "y"', "c": "v"}, [2]),
    "bom.tsv": (b"\xef\xbb\xbfkey\traw\r\na\tx\r\nb\ty\n", {"a": "x", "b": "y"}, []),
    "bom.jsonl": (b'\xef\xbb\xbf{"key": "a", "raw": "x"}\r\n', {"a": "x"}, []),
    "return.tsv": (b"key\traw\na\tx\ry\nb\tz\n", {"b": "z"}, [1]),
    "bytes.tsv": (b"key\traw\na\tx\nb\t\xff\nc\tz\n", {"a": "x", "c": "z"}, [2]),
    "bytes.jsonl": (b'{"raw": "\xff"}\n{"key": "b", "raw": "x"}\n{"raw": "\\ud83e"}\n', {"b": "x"}, [1, 3]),
    "broken.jsonl": (b'{"key": "a", "raw"\n{"key": "b", "raw": "x"}\nnope\n7\n[]\n{"key": "c"', {"b": "x"},
                     [1, 3, 4, 5, 6]),
    "values.json": (json.dumps([*({"key": f"{n}", "raw": f"cat {n}", "long": value} for n, value in enumerate(
        [float("nan"), None, [None], {"x": 1}, True, 7, []])), {"raw": [5]}, 7, None]).encode(),
        {f"{n}": f"cat {n}" for n in range(7)}, [8, 9, 10]),
    "blank.tsv": (b"key\traw\na\t \nb\t\xe3\x80\x80\nc\tx\n", {"c": "x"}, [1, 2]),
    "large.tsv": (b"key\traw\na\t" + b"x" * 3_000_000 + b"\nb\ty\n", {"a": "x" * 3_000_000, "b": "y"}, []),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_bad_rows_are_skipped_and_reported(tmp_path, table, name):
    data, expected, skipped = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(data)
    rows, _, err = table(tmp_path / name)
    assert raw_by_key(rows) == expected and all(row.long == row.raw or name == "columns.tsv" for row in rows)
    numbers = ", ".join(f"row {n}" for n in skipped)
    line = f"{tmp_path / name}: skipped {len(skipped)}: no caption, or a broken row ({numbers})\n"
    assert err == line * bool(skipped)


def test_rows_with_the_same_key_must_have_the_same_image(tmp_path, table):
    others = "".join(f"{n}\t{n}.jpg\tx\n" for n in range(200))
    rows = "key\timage\traw\na\ta.jpg\t\na\ta.jpg\tfirst\nb\tb.jpg\tx\na\ta.jpg\tsecond\na\tc.jpg\tthird\n"
    (tmp_path / "twice.tsv").write_text(rows + others)
    made, _, err = table(tmp_path / "twice.tsv")
    assert [(row.key, row.raw) for row in made[:3]] == [("a", "first"), ("b", "x"), ("a", "second")]
    assert "1: repeated key (row 5)" in err
    (tmp_path / "twice.tsv").write_text(rows)
    with pytest.raises(flame.InputError, match="1 rows have the key of an earlier row"):
        table(tmp_path / "twice.tsv")


def test_truncated_gzip_is_refused(tmp_path, table):
    for kind, text in {"tsv": "key\traw\nk\tR\n", "csv": "key,raw\nk,R\n", "jsonl": '{"raw": "R"}\n'}.items():
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(text.encode() * 999)[:-20])
        with pytest.raises(flame.InputError, match=f"a.{kind}.gz: "):
            table(tmp_path / f"a.{kind}.gz")


def test_row_numbers_match_img2dataset(tmp_path, table):
    """img2dataset (we ran it) numbers all rows except empty lines, also those that it cannot download."""
    lines = ["a cat\thttp://x/0", "", "\thttp://x/1", '"b" dog\thttp://x/2', "  \thttp://x/3",
             "d\thttp://x/4"]
    (tmp_path / "cc.tsv").write_text("\n".join(lines))
    rows, out, err = table(tmp_path / "cc.tsv")
    assert raw_by_key(rows) == {"000000000": "a cat", "000000002": '"b" dog', "000000004": "d"}
    assert "2: no caption" in err and "3 rows with 3 raw, 0 short, 0 long captions; a row without" in out
    (tmp_path / "cc.tsv").write_text("caption\turl\n" + "\n".join(lines))  # img2dataset needs this header
    assert table(tmp_path / "cc.tsv")[0] == rows
    (tmp_path / "bad.tsv").write_bytes(b"a\thttp://x/0\nno url\n\xff\thttp://x/2\nd\thttp://x/3\n")
    rows, _, err = table(tmp_path / "bad.tsv")
    assert [*raw_by_key(rows)] == ["000000000", "000000003"]
    assert "2: no caption, or a broken row (row 2, row 3)" in err


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.binary(max_size=80),
    st.text("\t\n[]{}\":,a\u00e4keyrawlong", max_size=80).map(str.encode),
    st.dictionaries(st.sampled_from(["key", "raw", "long", "image"]), st.text(), max_size=4).map(
        lambda row: json.dumps([row]).encode()),
    st.binary(max_size=40).map(lambda line: b"key\traw\n" + line),
))
@example(b"key,raw\ra,A cat.\r")  # line ends of old Macs
@example(b"PAR1")
def test_any_file_is_read_or_refused_in_one_line(tmp_path, table, data):
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

def write_recaptions(path, rows):
    path.write_text(json.dumps([{"__key__": key, "long": text} for key, text in rows]))
    return path


def test_join_by_key(tmp_path, table):
    rows = [{"__key__": f"{n}", "raw": f"raw {n}", "short": f"old {n}"} for n in range(5)]
    (tmp_path / "raw.json").write_text(json.dumps(rows))
    def files(repeated, *others):
        return [write_recaptions(tmp_path / f"long{n}.json", pairs) for n, pairs in enumerate((
            [("3", "Long  3."), ("0", "Long  0."), ("9", "Long  9."), *others],
            [("2", "Long\n2."), ("4", " "), ("8", "x"), *repeated]))]

    (tmp_path / "s1.tsv").write_text("short\tnote\tkey\n" + "".join(f"Short {n}.\tx\t{n}\n" for n in "0123"))
    joins = {"long": files([("3", "Long 3.")]), "short": [tmp_path / "s*.tsv"]}
    rows, out, err = table(tmp_path / "raw.json", joins)
    assert [row[2:] for row in rows] == [
        ("raw 0", "Short 0.", "Long 0."), ("raw 1", "Short 1.", "Short 1."),
        ("raw 2", "Short 2.", "Long 2."), ("raw 3", "Short 3.", "Long 3."), ("raw 4", "old 4", "old 4")]
    assert "--join long: 3 rows match one of 6 captions by key; empty or broken captions: 1\n" in out
    assert "  0: 'raw 0' | 'Long 0.'\n" in out and "5 short, 3 long captions" in out
    files([("3", "later")], ("0", "second"))
    with pytest.raises(flame.InputError, match="--join long: 2 texts have the key of another one, and would"):
        table(tmp_path / "raw.json", joins)
    lists = [{"__key__": f"{n}", "minicpm": [f"Long {n}.", f"Also {n}."]} for n in range(5)]
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    rows, _, _ = table(tmp_path / "raw.json", {"long": [tmp_path / "lists.json"]})
    assert [(row.key, row.long) for row in rows] == [
        (f"{n}", f"{text} {n}.") for n in range(5) for text in ("Long", "Also")]


def test_join_uses_the_named_column(tmp_path, table):
    (tmp_path / "raw.tsv").write_text("raw\nA cat.\nA dog.\n")
    long = tmp_path / "long.json"
    rows = [{"__key__": "000000000", "note": "Long."},
            {"__key__": "000000001", "note": None}]  # no joined caption
    long.write_text(json.dumps(rows))
    made, out, _ = table(tmp_path / "raw.tsv", {"long": [f"{long}:note"]})
    assert [row.long for row in made] == ["Long.", "A dog."] and "key: __key__; long: note\n" in out
    for column, message in {"": "no column long or .* .columns: __key__, note.*--join long=FILE:COLUMN",
                            ":x": "no column x "}.items():
        with pytest.raises(flame.InputError, match=message):
            table(tmp_path / "raw.tsv", {"long": [f"{long}{column}"]})
    long.write_text(json.dumps({f"{n:09d}": "Long." for n in range(3000)}))
    with within(20), pytest.raises(flame.InputError, match="no column long"):
        table(tmp_path / "raw.tsv", {"long": [long]})
    with pytest.raises(flame.InputError, match=r"no column for captions \(columns: .{,400}\)\. Name"):
        table(long)


def test_field_that_first_appears_in_a_late_row_is_read(tmp_path, table):
    (tmp_path / "x.jsonl").write_text('{"raw": "x"}\n' * 100_001 + '{"long": "A cat."}\n')
    assert table(tmp_path / "x.jsonl")[0][-1].long == "A cat."


def test_ctrl_c_during_a_query_is_a_keyboard_interrupt(tmp_path, table, monkeypatch):
    def join(*_):
        raise RuntimeError("Query interrupted")  # DuckDB's error after Ctrl-C
    monkeypatch.setattr(captions, "join", join)
    (tmp_path / "x.tsv").write_text("key\traw\nk\tx\n")
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path / "x.tsv", {"raw": [tmp_path / "x.tsv"]})


DREAMLIP = ["Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions",
            "longSV_captions", "shortLLA_captions", "longLLA_captions"]


def test_join_by_image_url(tmp_path, table):
    """DreamLIP's CSV joined to tars whose keys have another order. Some rows of both have no match."""
    csv_rows = [DREAMLIP, *([f"http://x/{n}.jpg", *(f'"{name}, \n""{n}"""' for name in DREAMLIP[1:])]
                            for n in range(9))]
    file = tmp_path / "dreamlip.csv"
    file.write_text("".join(",".join(row) + "\n" for row in csv_rows))
    records = [json.dumps({"caption": "?", "url": f"http://x/{9 - n}.jpg"}).encode() for n in range(6)]
    tar(tmp_path / "0.tar", *(part for n, record in enumerate(records) for part in (
        member(f"{n}.json", record), member(f"{n}.txt", b"raw"))))
    rows, out, err = table(tmp_path / "0.tar", {"short": [file], "long": [file]})
    expected = [(f"{9 - n}", "raw", f'shortSV_captions, "{n}"', f'longSV_captions, "{n}"')
                for n in range(8, 3, -1)]
    assert [(row.key, *row[2:]) for row in rows] == [("0", "raw", "raw", "raw"), *expected]
    assert "--join long: 5 rows match one of 9 captions by url; empty or broken captions: 0" in out
    rows, _, _ = table(file)
    assert rows[8][:3:2] == ("000000008", 'raw_caption, "8"') and rows[8].long == 'longSV_captions, "8"'
    file.write_text(file.read_text().replace("//x/", "//y/"))
    with pytest.raises(flame.InputError, match="--join short: none of its captions has a URL"):
        table(tmp_path / "0.tar", {"short": [file]})


@pytest.mark.parametrize("shift", [0, 1, 17, 150])
def test_join_with_captions_of_other_images_is_refused(tmp_path, table, shift):
    random = np.random.default_rng(0)
    names = [f"{word}{n}" for word in ("red", "fox", "under", "tree", "boat", "house", "bird", "green")
             for n in range(5)]
    things = [" ".join(random.choice(names, 4)) for _ in range(300)]
    (tmp_path / "raw.tsv").write_text("raw\n" + "".join(f"a photo of {thing}\n" for thing in things))
    long = write_recaptions(tmp_path / "long.json", [
        (f"{n:09d}", f"The photo shows {things[(n + shift) % 300]}.") for n in range(300)])
    if shift == 0:
        assert len(table(tmp_path / "raw.tsv", {"long": [long]})[0]) == 300
    else:
        with pytest.raises(flame.InputError, match="--join long: its keys belong to other .*cc3m-wds"):
            table(tmp_path / "raw.tsv", {"long": [long]})


# --- sources

def test_ranges_globs_and_folders(tmp_path, table):
    for n in range(3):
        (tmp_path / f"x-{n}.tsv").write_text(f"raw\n{n}\n\n{n}{n}\n")
    everything = ["0", "00", "1", "11", "2", "22"]
    for source in ("x-{0..2}.tsv", "x-*.tsv"):  # row numbers continue across files
        rows, _, _ = table(tmp_path / source)
        assert list(raw_by_key(rows).items()) == [(f"{n:09d}", text) for n, text in enumerate(everything)]
    for source, message in {"x-{1..3}.tsv": "x-3.tsv: no such file", "x-{2..0}.tsv": "no captions found",
                            "x-{3..99999999}.tsv": "x-3.tsv: no such file", "y*.tsv": "no such file",
                            "none.tsv": "no such file", ".": "no captions found"}.items():
        with within(5), pytest.raises(flame.InputError, match=re.escape(message)):
            table(tmp_path / source)
    (tmp_path / "cut.json").write_text('[{"raw": "x"},\n')
    with pytest.raises(flame.InputError, match="cut.json: the list does not end with"):
        table(tmp_path / "cut.json")
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(flame.InputError, match="no captions found. A row is broken if"):
        table(tmp_path / "empty.tsv")
    (tmp_path / "made").mkdir(exist_ok=True)
    (tmp_path / "photos").mkdir()
    with pytest.raises(flame.InputError, match="made: no captions found.*of a.jpg into a.txt.*to_pa"):
        table(tmp_path / "made")
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\na.jpg,a fox\n")
    assert table(tmp_path / "photos")[0][0][:3] == ("000000000", "a.jpg", "a fox")
    before = hash_sources([("", tmp_path / "photos", "")])
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\na.jpg,a cat\n")
    changed = [hash_sources([(name, tmp_path / "photos", column)])
               for name, column in (("", ""), ("long", ""), ("", "raw=x"))]
    for text in ("a fox", "a cat"):  # tars of equal size
        with tarfile.open(tmp_path / "photos.tar", "w") as tar:
            (tmp_path / "a.txt").write_text(text)
            tar.add(tmp_path / "a.txt", "a.txt")
        changed.append(hash_sources([("", tmp_path / "photos.tar", "")]))
    assert len({before, *changed}) == 6
    names = {"cc3m.tsv.gz": "cc3m", "cc3m/": "cc3m", "a/cc3m-{0000..0575}.tar": "cc3m", "x-*.parquet": "x"}
    assert {source: source_name(source) for source in names} == names


@pytest.mark.parametrize("name", ["a.tsv", "a.json", "a.csv", "a.parquet", "a.tar", "a-{0..0}.tar"])
def test_pipe_is_refused(tmp_path, table, name):
    pipe = tmp_path / name.replace("{0..0}", "0")
    os.mkfifo(pipe)
    (tmp_path / "raw.tsv").write_text("raw\na\n")
    with within(5):
        for arguments in ((tmp_path / name,), (tmp_path / "raw.tsv", {"long": [tmp_path / name]})):
            with pytest.raises(flame.InputError, match=f"{pipe}: not a regular file"):
                table(*arguments)


# --- tars. The hostile ones have a header written by hand between two valid samples.

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
    """Return a PAX header with the given values, and the file that it describes."""
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line) + 3))
        lines += str(length).encode() + line
    return member("pax", lines, tarfile.XHDTYPE) + member(name, b"evil")


SPARSE = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0}
HOSTILE = {  # case: a member of a tar after which nothing can be read
    "negative base-256 size": member("evil.txt", size=-512),
    "huge base-256 size": member("evil.txt", size=1 << 70),
    "negative PAX size": pax("evil.txt", size=-512),
    "PAX size is not a number": pax("evil.txt", size="many"),
    "PAX size of 5000 digits": pax("evil.txt", size="9" * 5000),
    "PAX header of terabytes": member("pax", kind=tarfile.XHDTYPE, size=1 << 42),
    "PAX header that takes minutes to parse": member("pax", b"7" * 2_000_000, tarfile.XHDTYPE),
    "name of terabytes": member("name", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 42),
    "3000 PAX headers": member("pax", b"9 a=bcde\n", tarfile.XHDTYPE) * 3000,
    "invalid sparse map": pax("evil.txt", **{"GNU.sparse.map": "0,1,x", "GNU.sparse.name": "x.txt"}),
    "negative sparse size": pax("evil.txt", **SPARSE, **{"GNU.sparse.realsize": -1}, size=-1024),
    "sparse file": pax("evil.txt", **{"GNU.sparse.map": "0,4", "GNU.sparse.size": 4}),
    "noise": b"\xff" * 512,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tar_is_used_up_to_the_corruption(tmp_path, table, case):
    tar(tmp_path / "a-0.tar", member("good.txt", b"before"), HOSTILE[case], member("late.txt", b"after"))
    tar(tmp_path / "a-1.tar", member("next.txt", b"another"))
    with within(10):
        rows, _, err = table(tmp_path / "a-{0..1}.tar")
    assert raw_by_key(rows) == {"good": "before", "next": "another"}
    assert f"1: {tars.CORRUPT_TAR} (a-0.tar: " in err


def test_truncated_tar_yields_its_complete_members(tmp_path):
    whole = b"".join(member(f"{n}.txt", b"x" * 300 * n) for n in range(1, 4)) + bytes(1024)
    for cut in range(0, len(whole) + 1, 100):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        skipped = {}
        keys = [key for _, key, _, _, _ in tar_members(tmp_path / "a.tar", skipped)]
        assert keys == [key for key, end in (("1", 812), ("2", 2136), ("3", 3972)) if end <= cut]
        assert (tars.CORRUPT_TAR in skipped) == (cut < len(whole) - 512)


def test_zeros_in_the_middle_of_a_tar_are_reported(tmp_path, table):
    """tarfile takes a header of zeros for the end of a tar. Data after it shows that it's not the end."""
    for n, hole in enumerate((512, 1024, 40_000)):
        tar(tmp_path / f"{n}.tar", member(f"{n}.txt", b"A"), bytes(hole), member("b.txt", b"B"))
    tar(tmp_path / "3.tar", member("3.txt", b"A"), bytes(hole))  # a long end is valid, a very long one not
    tar(tmp_path / "4.tar", member("4.txt", b"A"), bytes(1_100_000))
    rows, _, err = table(tmp_path / "{0..4}.tar")
    assert raw_by_key(rows) == dict.fromkeys("01234", "A") and f"skipped 4: {tars.CORRUPT_TAR}" in err


def test_webdataset_samples(tmp_path, table):
    entries = {column: f"{column}." for column in DREAMLIP[1:]} | {"url": "http://x/1.jpg", "key": "no"}
    large = b"x" * (sources.MAX_TEXT_BYTES + 1)
    files = {"x/a.large.jpg": b"?", "x/a.json": json.dumps(entries).encode(), "x/a.txt": b"the\n.txt",
             "x/._a.txt": b"no key", "b.txt": b"\xff", "c.json": b'{"caption": "C"}', "d.json": b"[1]",
             "e.txt": large, "f\ng.txt": b"F", "h.json": b'{"caption": "' + large + b'"}'}
    tar(tmp_path / "cc-000.tar", *(member(name, data) for name, data in files.items()))
    rows, _, err = table(tmp_path)
    assert [(row.key, *row[2:]) for row in rows] == [
        ("a", "the .txt", "shortSV_captions.", "longSV_captions."), ("c", "C", "C", "C"),
        ("e", *3 * [large[:-1].decode()]), ("f g", "F", "F", "F")]
    assert "3: not UTF-8, or not a JSON object" in err and "3: no caption" in err


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (value, value, value)).save(path)
    return path.read_bytes()


def find_values(root, keys, images=None, source="captions.tsv", **where):
    """Find the images of a table made from root/source; return {key: red value of the image / 10}."""
    rows, files, spans = find_images(keys, images or [""] * len(keys), root / source, **where)
    assert rows.dtype == spans.dtype == np.int64 and spans.shape == (len(rows), 3)
    return {keys[row]: round(open_image(location).getpixel((0, 0))[0] / 10)
            for row, location in zip(rows, locations_of(files, spans))}


# --- finding images

def test_key_ends_at_the_first_dot_of_the_file_name(tmp_path):
    names = {"a.jpg": 10, "b.large.jpg": 20, "c.depth.jpg": 30, "c.jpg": 40, ".d.jpg": 50, "e.jpg": 60}
    folder = tmp_path / "captions/sub.folder"
    data = {name: write_image(folder / name, value) for name, value in names.items()}
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", *(member(f"x.y/{name}", data[name]) for name in names))
    for folder in (None, tmp_path / "captions", tmp_path / "tars"):
        assert find_values(tmp_path, ["a", "b", "c", "nowhere"], folder=folder) == {"a": 1, "c": 4}


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_missing_images_are_reported_with_path_and_fix(tmp_path, folder):
    root = tmp_path / (folder or "")
    keys, images = ["a", "b", "c"], ["", "x/b.png", "x/c.png"]
    with pytest.raises(flame.InputError) as error:
        find_values(tmp_path, keys, images, folder=folder and root)
    assert re.search(f": no images found. Looked for {root}/x/b.png .*--images DIR", str(error.value))
    write_image(root / "x/b.png", 20)
    write_image(root / "x/c.png", 30)
    assert find_values(tmp_path, keys, images, folder=folder and root) == {"b": 2, "c": 3}
    with pytest.raises(flame.InputError, match="captions.*: no images found. Looked for a .*: no images"):
        find_values(tmp_path, keys)


def test_tars_are_indexed_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    data = [write_image(tmp_path / "x.png", 10 * n) for n in range(3)]
    tar(folder / "0.tar", member("a.png", data[0]), member("b.png", data[1]))
    where = {"folder": folder, "index": tmp_path / "tars.npz"}
    assert find_values(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    with monkeypatch.context() as patched:
        patched.setattr(data_images, "tar_members", None)  # calling it would fail
        assert find_values(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    assert find_values(tmp_path, ["a", "c"], **where) == {"a": 0}           # other keys: a new index
    with pytest.raises(flame.InputError, match="names only with 10,000 samples per shard"):
        find_values(tmp_path, ["x"], folder=folder)
    tar(folder / "1.tar", member("c.png", data[2]))
    os.mkfifo(folder / "2.tar")
    (folder / "3.tar").mkdir()
    with within(10):
        assert find_values(tmp_path, ["a", "c"], **where) == {"a": 0, "c": 2}   # another tar: a new index
    assert f"skipped 2: {tars.CORRUPT_TAR} (2.tar: ReadError not a regular" in capsys.readouterr().err
    where["index"].write_bytes(b"damaged")
    with pytest.raises(flame.InputError, match="tars.npz: .*; delete it"):
        find_values(tmp_path, ["a", "c"], **where)


def test_unreadable_images_raise_an_exception(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    large = write_image(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("not an image")
    monkeypatch.setattr(data_images, "MAX_IMAGE_BYTES", len(large) // 2)
    for name, exception in {"pipe.png": OSError, "large.png": OSError, "gone.png": OSError,
                            "text.png": UnidentifiedImageError}.items():
        with within(5), pytest.raises(exception):
            open_image(ImageLocation(str(tmp_path / name))).load()
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", member("a.png", large))
    _, files, spans = find_images(["a"], [""], tmp_path / "c.tsv", tmp_path / "tars")
    with pytest.raises(OSError):
        open_image(*locations_of(files, spans)).load()
