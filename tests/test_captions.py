"""data/captions.py: hostile tars, what is no regular file, JSON lists, captions joined from another file."""
import csv
import gzip
import io
import json
import os
import signal
import sys
import tarfile
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

import embed
import evaluate
import flame
import train
from data import captions
from data.captions import open_join, read_captions, read_join, tar_files
from data.leaks import count_leaks


@contextmanager
def within(seconds):
    """Fails instead of hanging."""
    def stop(*_):
        pytest.fail(f"hangs: not done within {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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


def old_sparse(name, offset, size, real):
    """GNU's old sparse header: one entry of a map, then the size that the file claims to have."""
    header = bytearray(member(name, kind=tarfile.GNUTYPE_SPARSE)[:512])
    header[386:398] = b"%011o\0" % offset
    header[398:410] = b"%011o\0" % size
    header[483:495] = b"%011o\0" % real
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    return bytes(header)


def hostile(name):
    """-> {what: a file in a tar after which nothing can be read}, {what: a file that alone is left out}."""
    sparse = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0}
    digits = member("pax", b"7" * 2_000_000, tarfile.XHDTYPE)
    damaged = {
        "negative in base 256": member(name, size=-512),
        "far back in base 256": member(name, size=-1536),
        "minus one in base 256": member(name, size=-1),
        "huge in base 256": member(name, size=1 << 70),
        "20 GB": member(name, size=20 << 30),
        "negative in PAX": pax(name, size=-512),
        "far back in PAX": pax(name, size=-4096),
        "huge in PAX": pax(name, size=10 ** 30),
        "no number in PAX": pax(name, size="many"),
        "too many digits in PAX": pax(name, size="9" * 5000),
        "a PAX header of terabytes": member("pax", kind=tarfile.XHDTYPE, size=1 << 42),
        "a negative PAX header": member("pax", kind=tarfile.XHDTYPE, size=-512),
        "a PAX header that takes its parser minutes": digits + member(name, b"evil"),
        "a long name of terabytes": member("name", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 42),
        "PAX headers without end": member("pax", b"9 a=bcde\n", tarfile.XHDTYPE) * 3000,
        "a sparse map that is none": pax(name, **{"GNU.sparse.map": "0,1,x", "GNU.sparse.name": "evil.txt"}),
        "a sparse file of no size": pax(name, **sparse, **{"GNU.sparse.realsize": "x"}),
        "a sparse file of negative size": pax(name, **sparse, **{"GNU.sparse.realsize": -1}, size=-1024),
        "noise": b"\xff" * 512,
    }
    alone = {
        "an old sparse file of 8 GB": old_sparse(name, 0, 0, (1 << 33) - 1),
        "a sparse file in PAX": pax(name, **{"GNU.sparse.map": "0,4", "GNU.sparse.size": 20 << 30}),
    }
    return damaged, alone


HOSTILE, ALONE = hostile("evil.txt")


@pytest.mark.parametrize("what", HOSTILE | ALONE)
def test_of_a_hostile_tar_what_comes_before_is_used(tmp_path, what, capsys):
    bad = (HOSTILE | ALONE)[what]
    tar(tmp_path / "a-0.tar", member("good.txt", b"before"), bad, member("late.txt", b"after"))
    tar(tmp_path / "a-1.tar", member("next.txt", b"another"))
    skipped = {}
    with within(10):
        rows = list(read_captions(tmp_path / "a-{0..1}.tar", skipped))
    keys = [row.key for row in rows]
    assert keys[0] == "good" and keys[-1] == "next" and rows[0].captions["raw"] == "before"
    if what in ALONE:
        assert keys == ["good", "late", "next"] and skipped["sparse file in a tar"][0] == 1
    else:
        assert "late" not in keys and skipped[captions.DAMAGED][0] == 1
        assert "a-0.tar" in skipped[captions.DAMAGED][1][0]
    captions.report_skipped("a", skipped)
    assert "a-0.tar" in capsys.readouterr().err


def test_memory_that_a_tar_asks_for_is_not_given(tmp_path):
    tar(tmp_path / "a.tar", member("good.txt", b"before"), member("pax", kind=tarfile.XHDTYPE, size=1 << 30))
    tracemalloc.start()
    try:
        assert len(list(read_captions(tmp_path / "a.tar"))) == 1
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_a_tar_cut_anywhere_gives_what_is_whole(tmp_path):
    whole = b"".join(member(f"{n}.txt", b"x" * 300 * n) for n in range(1, 4)) + bytes(1024)
    for cut in range(0, len(whole) + 1, 100):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        skipped = {}
        found = [key for _, key, _, _, _ in tar_files(tmp_path / "a.tar", skipped)]
        assert found == [key for key, end in (("1", 812), ("2", 2136), ("3", 3972)) if end <= cut]
        assert (captions.DAMAGED in skipped) == (cut < len(whole) - 512)


def test_texts_larger_than_any_caption_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "LARGEST_TEXT", 100)
    entries = b'{"caption": "' + b"x" * 99 + b'"}'
    members = {"a.txt": 101 * b"x", "b.txt": 100 * b"x", "c.json": entries}
    tar(tmp_path / "a.tar", *(member(name, data) for name, data in members.items()))
    skipped = {}
    assert [row.key for row in read_captions(tmp_path / "a.tar", skipped)] == ["b"]
    assert [count for reason, (count, _) in skipped.items() if "text too large" in reason] == [2]


def test_a_name_in_a_tar_ends_at_its_first_dot(tmp_path):
    assert captions.sample_name("a.b/c.d.JPG") == ("a.b/", "c", "d.jpg")
    files = {"x/a.large.jpg": b"?", "x/a.txt": b"A", "x/._a.txt": b"no sample's", "x/b.txt": b"B"}
    tar(tmp_path / "a.tar", *(member(name, data) for name, data in files.items()))
    rows = list(read_captions(tmp_path / "a.tar"))
    assert [(row.key, row.captions["raw"]) for row in rows] == [("a", "A"), ("b", "B")]


def test_a_line_break_in_a_tars_name_stays_off_the_screen(tmp_path):
    tar(tmp_path / "a.tar", member("a\nb.txt", b"A"))
    with pytest.raises(flame.InputError) as error:
        next(read_captions(tmp_path / "a.tar"))
    assert "\n" not in str(error.value) and "a b" in str(error.value)


# --- what is no regular file

@pytest.mark.parametrize("name", ["a.tsv", "a.json", "a.tar", "a-{0..0}.tar"])
def test_a_pipe_is_refused_in_one_line(tmp_path, name, monkeypatch, capsys):
    pipe = tmp_path / name.replace("{0..0}", "0")
    os.mkfifo(pipe)
    arguments = ["--captions", tmp_path / name, "--llm", "none", "--out", tmp_path / "store"]
    monkeypatch.setattr("sys.argv", ["embed.py", *map(str, arguments)])
    with within(5):
        try:
            code = embed.main()
        except SystemExit as stop:
            code = stop.code
        with pytest.raises(flame.InputError, match=f"{pipe}: not a regular file"):
            read_join("long", tmp_path / name, {})
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1 and f"{pipe}: not a regular file" in message
    assert os.listdir(tmp_path) == [pipe.name]


# --- JSON lists

def test_entries_come_one_by_one_from_a_list_that_goes_on_without_end():
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            text = (b'{"a": "b"}, ' * (len(buffer) // 12 + 1))[:len(buffer) // 12 * 12]
            buffer[:len(text)] = text
            return len(text)

    class Opened(Endless):
        begun = False

        def readinto(self, buffer):
            if not self.begun:
                self.begun = True
                buffer[:1] = b"["
                return 1
            return super().readinto(buffer)

    entries = captions.json_entries(io.BufferedReader(Opened()), "a.json")
    assert [next(entries) for _ in range(300_000)][-1] == {"a": "b"}


def test_what_is_no_list_names_file_entry_and_cure():
    for text, entry in {"[1, 2, x]": 3, '{"a": 1}': 1, "": 1, "[1] 2": 2}.items():
        message = f"^a.json: not a JSON list .entry {entry}: .*; fetch it anew"
        with pytest.raises(flame.InputError, match=message):
            list(captions.json_entries(io.BytesIO(text.encode()), "a.json", "fetch it anew"))


# --- captions joined from a file of their own

def joined_file(path, rows):
    path.write_text(json.dumps([{"__key__": key, "minicpm": text} for key, text in rows]))
    return path


@pytest.mark.parametrize("index", [None, "join.sqlite"])
def test_a_joined_file_is_a_mapping_on_disk(tmp_path, index):
    skipped = {}
    rows = [("a", "A  1"), ("b", "B"), ("a", "A\n2"), ("c", ""), ("", "D"), ("e\ud800", "E"), ("ü\0", "Ü")]
    file = joined_file(tmp_path / "long.json", rows)
    joined = read_join("long", file, skipped, index and tmp_path / index)
    for one in [joined, open_join(tmp_path / index)] if index else [joined]:
        assert len(one) == 4
        assert [one.get(key) for key in ("a", "b", "c", "", "ü\0", 7)] == ["A 2", "B", None, "D", "Ü", None]
        assert "a" in one and "c" not in one
    assert skipped == {"joined row without key or caption": [2, [4, 6]]}


@pytest.mark.parametrize("key", ["key", "Image Path"])
def test_memory_does_not_grow_with_a_joined_file(tmp_path, key):
    with gzip.open(tmp_path / "long.jsonl.gz", "wt", compresslevel=1) as file:
        for n in range(20_000):
            file.write(json.dumps({key: f"{n:09d}", "long": f"{n} " + "x" * 1000}) + "\n")
    tracemalloc.start()
    try:
        joined = read_join("long", tmp_path / "long.jsonl.gz", {})
        assert joined.get("000019999").startswith("19999 x") and len(joined) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 5 << 20  # of 20 MB
    finally:
        tracemalloc.stop()


def test_a_joined_file_without_captions_leaves_nothing_behind(tmp_path):
    file = joined_file(tmp_path / "long.json", [("a", "")])
    with pytest.raises(flame.InputError, match="long.json: no row with a key and a caption"):
        read_join("long", file, {}, tmp_path / "join.sqlite")
    (tmp_path / "long.json").write_text('[{"key": "a", "long": "A"}, nope]')
    with pytest.raises(flame.InputError, match="long.json: not a JSON list"):
        read_join("long", file, {}, tmp_path / "join.sqlite")
    assert os.listdir(tmp_path) == ["long.json"]
    with pytest.raises(flame.InputError, match="nowhere: .*free space"):
        file = joined_file(tmp_path / "long.json", [("a", "A")])
        read_join("long", file, {}, tmp_path / "nowhere/join.sqlite")


def test_nothing_of_a_join_stays_beside_the_store(tmp_path, tiny_llm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.tsv").write_text("key\traw\na\tA\nb\tB\n")
    joined_file(tmp_path / "long.json", [("a", "A long one.")])
    arguments = ["--captions", "raw.tsv", "--join", "long=long.json", "--llm", str(tiny_llm), "--out", "s"]
    monkeypatch.setattr("sys.argv", ["embed.py", *arguments])
    assert not embed.main()
    assert sorted(os.listdir("s")) == ["embeddings.npy", "images.txt", "keys.txt", "meta.json"]


# --- recaptions of other pictures

def recaptioned(tmp_path, shift, words=("red", "fox", "under", "tree", "boat", "house", "bird", "green")):
    """300 captions and their recaptions, whose keys are off by `shift`."""
    random = np.random.default_rng(0)
    names = [f"{word}{n}" for word in words for n in range(5)]
    things = [" ".join(random.choice(names, 4)) for _ in range(300)]
    raw = [{"key": str(n), "raw": f"a photo of {thing}"} for n, thing in enumerate(things)]
    long = [{"key": str(n), "long": f"The photo shows {things[(n + shift) % 300]}."} for n in range(300)]
    for name, rows in {"raw": raw, "long": long}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    joined = read_join("long", tmp_path / "long.jsonl", {})
    return tmp_path / "raw.jsonl", "long", tmp_path / "long.jsonl", joined


@pytest.mark.parametrize("shift", [1, 17, 150])
def test_recaptions_of_other_pictures_are_refused(tmp_path, shift):
    captions.check_join(*recaptioned(tmp_path, 0))
    with pytest.raises(flame.InputError, match="long.jsonl: .* keys mean other pictures .*cc3m-wds"):
        captions.check_join(*recaptioned(tmp_path, shift))


def test_a_join_is_looked_at_before_anything_is_made(tmp_path, tiny_llm, monkeypatch, capsys):
    recaptioned(tmp_path, 7)
    monkeypatch.chdir(tmp_path)
    command = f"embed.py --captions raw.jsonl --join long=long.jsonl --llm {tiny_llm} --device cpu"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        embed.main()
    assert stop.value.code == 2 and "keys mean other pictures" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


# --- layouts that people have

def rows_of(path):
    return [(row.key, row.image, row.captions["long"]) for row in read_captions(path)]


LAYOUTS = {  # name of a file: (what is in it, the rows (key, image, caption) that it gives)
    "cc3m.tsv": ("a bus station\thttp://x/1.jpg\n", [("000000000", "", "a bus station")]),
    "cc12m.tsv": ("http://x/1.jpg\ta bus station\n", [("000000000", "", "a bus station")]),
    "metadata.csv": ("file_name,text\na.jpg,a fox\n", [("000000000", "a.jpg", "a fox")]),
    "excel.csv": ('image;raw\na.jpg;"a fox; asleep"\n', [("000000000", "a.jpg", "a fox; asleep")]),
    "blip.jsonl": ('{"image": "a.jpg", "blip_caption": "a fox"}', [("000000000", "a.jpg", "a fox")]),
    "lists.jsonl": ('{"image": "a.jpg", "caption": ["a fox", "asleep"]}', [("000000000", "a.jpg", "a fox")]),
    "yfcc15m_clean_open_data.json": (  # DeCLIP's: an object a line, whatever the name says
        '{"filename": "2b/a.jpg", "caption": "a fox", "url": "http://x/1.jpg"}\n'
        '{"filename": "2b/b.jpg", "caption": "a bee", "url": "http://x/2.jpg"}\n',
        [("000000000", "2b/a.jpg", "a fox"), ("000000001", "2b/b.jpg", "a bee")]),
    "two.csv": ("title,caption\none,two\n", [("000000000", "", "one")]),
    "llava.json": (
        '[{"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "What is it?"}, '
        '{"from": "gpt", "value": "A fox in deep snow."}, {"from": "gpt", "value": "Yes."}]}, '
        '{"id": "8", "image": "b.jpg", "conversations": ["x", {"from": "human"}]}]',
        [("7", "a.jpg", "A fox in deep snow.")]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(tmp_path, name):
    text, expected = LAYOUTS[name]
    (tmp_path / name).write_text(text)
    assert rows_of(tmp_path / name) == expected


def test_a_folder_of_pictures_with_a_text_each(tmp_path):
    """As img2dataset's `files` output too: what is not a text with a picture is counted or passed over."""
    folder = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "a.jpg", "more/0001.webp", "alone.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, text in {"b": "a bee\n", "a": "an ant", "more/0001": "a moth", "none": "no picture"}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "more/0001.json").write_text("{}")
    (folder / "alone.txt").write_bytes(b"\xff")
    os.mkfifo(folder / "pipe.txt")
    assert len(captions.fingerprint([folder])) == 64
    skipped = {}
    rows = list(read_captions(folder, skipped))
    assert [(row.key, row.image, row.captions["raw"]) for row in rows] == [
        ("a", "a.jpg", "an ant"), ("b", "b.JPG", "a bee"), ("more/0001", "more/0001.webp", "a moth")]
    assert {why: count for why, (count, _) in skipped.items()} == {
        "text without a picture beside it": 1, "not UTF-8 text": 1}


def test_a_folder_with_its_captions_in_one_file(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "an ant"}\n')
    assert rows_of(tmp_path) == [("000000000", "a.jpg", "an ant")]


def test_a_folder_is_embedded_trained_on_and_scored_by_its_name(tmp_path, tiny_llm, monkeypatch):
    """The paths in it start at the folder itself, whoever reads them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for n in range(8):
        Image.new("RGB", (32, 32), (n * 30, 0, 0)).save(tmp_path / "photos" / f"{n}.png")
        (tmp_path / "photos" / f"{n}.txt").write_text(f"a picture of {n} things")
    llm = str(tiny_llm)
    monkeypatch.setattr(sys, "argv", ["embed.py", "--captions", "photos", "--llm", llm, "--device", "cpu"])
    embed.main()
    small = "--preset demo --width 12 --layers 1 --heads 3 --batch 4 --steps 2 --workers 0 --device cpu"
    assert train.main(small.split()) == 0
    monkeypatch.delenv("FLAME_LLM", raising=False)
    assert evaluate.main(["--captions", "photos", "--device", "cpu"]) == 0  # and finds the LLM again
    result = json.loads((tmp_path / "results" / "photos.json").read_text())
    assert (result["n_images"], result["n_texts"], result["skipped_images"]) == (8, 8, 0)


DREAMLIP = ("Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions",
            "longSV_captions", "shortLLA_captions", "longLLA_captions")


def dreamlip(path, numbers):
    """Its CSV: a row is about http://x/<number>.jpg, and each caption says its column and number."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(DREAMLIP)
        for n in numbers:
            rows.writerow([f"http://x/{n}.jpg", *(f"{column}, \n\"{n}\"" for column in DREAMLIP[1:])])
    return path


def test_dreamlips_columns_are_those_of_one_model(tmp_path):
    path = dreamlip(tmp_path / "cc3m_3long_3short_1raw_captions_url.csv", range(2))
    first, second = read_captions(path)
    columns = {"raw": "raw_caption", "short": "shortSV_captions", "long": "longSV_captions"}
    assert first.captions == {name: f'{column}, "0"' for name, column in columns.items()}
    assert (second.key, second.image, second.url) == ("000000001", "", "http://x/1.jpg")
    assert {name: captions.column_taken(path, name) for name in flame.PROMPTS} == columns
    lines = path.read_text().replace("longLLA_captions", "long", 1)  # another's, where the header says so
    path.write_text(lines)
    assert next(read_captions(path)).captions["long"] == 'longLLA_captions, "0"'
    assert captions.column_taken(path, "long") is None


def test_dreamlip_meets_tars_by_the_pictures_url(tmp_path, tiny_llm, monkeypatch, capsys):
    """The keys of the tars are in another order than its rows; one picture of either is not in the other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cc3m").mkdir()
    for shard in range(2):
        names = {f"{shard}{n}": 9 - 3 * shard - n for n in range(3)}  # 9, 8, ... 4
        about = {key: json.dumps({"caption": "?", "url": f"http://x/{n}.jpg", "status": "success"}).encode()
                 for key, n in names.items()}
        members = [(f"{key}.json", text) for key, text in about.items()]
        members += [(f"{key}.txt", f"photo {n}".encode()) for key, n in names.items()]
        tar(tmp_path / f"cc3m/{shard}.tar", *(member(name, text) for name, text in sorted(members)))
    file = dreamlip(tmp_path / "dreamlip.csv", range(9))
    joins = {name: read_join(name, file, {}) for name in ("short", "long")}
    rows = {row.url[9]: row.captions for row in read_captions("cc3m", joins=joins)}
    assert set(rows) == set("987654") and rows["9"] == dict.fromkeys(flame.PROMPTS, "photo 9")
    for n in "45678":
        assert rows[n] == {"raw": f"photo {n}", "short": f'shortSV_captions, "{n}"',
                           "long": f'longSV_captions, "{n}"'}
    command = ["embed.py", "--captions", "cc3m/{0..1}.tar", "--join", "long=dreamlip.csv", "--out", "s"]
    monkeypatch.setattr(sys, "argv", [*command, "--llm", str(tiny_llm), "--device", "cpu"])
    assert not embed.main()
    said = capsys.readouterr()
    assert "long captions: longSV_captions of dreamlip.csv\n" in said.out and "raw_caption" not in said.out
    assert "skipped 1 row: key without a long caption in the joined file" in said.err
    assert "dreamlip.csv: 4 keys are not in " in said.err
    dreamlip(file, range(20, 29))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "cpu", "--out", "other"])
    with pytest.raises(SystemExit):
        embed.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "dreamlip.csv: none of its keys or URLs is in " in error and not (tmp_path / "other").exists()


def test_a_tar_whose_json_has_recaptions_does_not_take_raw_for_them(tmp_path):
    """As img2dataset writes them where it fetches by DreamLIP's file; YFCC's tars name the URL otherwise."""
    about = {column: f"{column}." for column in DREAMLIP[1:]} | {"downloadurl": "http://x/1.jpg"}
    tar(tmp_path / "0.tar", member("a.json", json.dumps(about).encode()), member("a.txt", b"as .txt has it"))
    row = next(read_captions(tmp_path / "0.tar"))
    assert (row.key, row.url) == ("a", "http://x/1.jpg")
    assert row.captions == {"raw": "as .txt has it", "short": "shortSV_captions.", "long": "longSV_captions."}
    samples = pytest.importorskip("webdataset").WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    theirs, = samples.decode()
    assert (theirs["__key__"], theirs["txt"]) == (row.key, row.captions["raw"])
    assert theirs["json"]["longSV_captions"] == row.captions["long"]


@pytest.mark.parametrize("name", ["raw", "short", "long"])
def test_a_joined_answer_is_the_caption_and_its_id_is_not(tmp_path, name):
    """LLaVA's and ShareGPT4V's entries, and others that say more than key and caption."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat on a mat."}]
    entries = [{"id": "k1", "image": "a.jpg", "conversations": turns},
               {"key": "k2", "license": "cc-by", "id": "7", "minicpm": "A dog."}]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    joined = read_join(name, tmp_path / "a.json", {})
    assert joined.get("k1") == "A cat on a mat." and joined.get("k2") == "A dog."


def test_a_joined_row_without_its_own_caption_takes_no_other_sets(tmp_path):
    dreamlip(tmp_path / "a.csv", range(3))
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace('longSV_captions, \n""1""', " "))
    skipped = {}
    joined = read_join("long", tmp_path / "a.csv", skipped)
    assert len(joined) == 2 and joined.get("http://x/1.jpg") is None
    assert skipped["joined row without key or caption"][0] == 1


def coco(indent=None):
    """captions_val2017.json: two captions each of two pictures, and one of a picture that is not named."""
    images = [{"license": 3, "file_name": f"{n:012d}.jpg", "height": 9, "width": 9, "id": n} for n in (7, 8)]
    said = [(7, "a bus"), (8, "a dog"), (7, "a red bus"), (9, "lost"), (8, "a wet dog")]
    said = [{"image_id": n, "id": 100 + at, "caption": text} for at, (n, text) in enumerate(said)]
    return json.dumps({"info": {}, "licenses": [], "images": images, "annotations": said}, indent=indent)


@pytest.mark.parametrize("indent", [None, 1])
def test_cocos_captions_are_a_row_each(tmp_path, indent):
    (tmp_path / "captions_val2017.json").write_text(coco(indent))
    bus, dog = "000000000007.jpg", "000000000008.jpg"
    assert rows_of(tmp_path / "captions_val2017.json") == [
        ("100", bus, "a bus"), ("101", dog, "a dog"), ("102", bus, "a red bus"), ("103", "", "lost"),
        ("104", dog, "a wet dog")]
    theirs = pytest.importorskip("pycocotools.coco").COCO(tmp_path / "captions_val2017.json")
    for key, image, text in rows_of(tmp_path / "captions_val2017.json"):
        annotation = theirs.anns[int(key)]
        assert annotation["caption"] == text
        assert theirs.imgs.get(annotation["image_id"], {"file_name": ""})["file_name"] == image


@pytest.mark.parametrize("images, said", [
    (7, [{"id": 1, "image_id": [2], "caption": "a"}]), ([7, {"id": {}}], [None, "x", {"caption": "a"}]),
    ([], [{"id": 1}, {"id": 2, "image_id": 3, "caption": "a"}])])
def test_a_damaged_coco_file_gives_what_it_can(tmp_path, images, said):
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": said}))
    assert [text for _, _, text in rows_of(tmp_path / "a.json")] == ["a"]


def test_rows_that_repeat_captions_or_pictures_are_counted_once_at_the_end(tmp_path, tiny_llm, monkeypatch,
                                                                            capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.json").write_text(coco())
    rows = ["a.jpg\tA", "b.jpg\tA", "c.jpg\tB", "c.jpg\tA", "\tC", "\tD"]
    (tmp_path / "some.tsv").write_text("image\traw\n" + "\n".join(rows))
    for name in ("captions.json", "some.tsv"):
        command = f"embed.py --captions {name} --llm {tiny_llm} --device cpu --prompts raw"
        monkeypatch.setattr(sys, "argv", command.split())
        assert not embed.main()
    told = capsys.readouterr().err
    assert told.count("captions.json: 2 of 5 rows name the picture of an earlier row") == 1
    assert "captions.json: 2 of 5 rows have the very" not in told
    assert "some.tsv: 2 of 6 rows have the very captions of an earlier row" in told
    assert "some.tsv: 1 of 6 rows name the picture of an earlier row" in told


# --- what is scored and was seen before

@pytest.fixture
def trained(tmp_path, tiny_llm, monkeypatch):
    """A run on eight pictures in photos/, 0.png to 7.png, called "a picture of <n> things"; runs commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLAME_LLM", raising=False)
    (tmp_path / "photos").mkdir()
    for n in range(8):
        Image.new("RGB", (32, 32), (n * 30, 0, 0)).save(tmp_path / "photos" / f"{n}.png")
    rows = "".join(f"{n}\ta picture of {n} things\n" for n in range(8))
    (tmp_path / "train.tsv").write_text(f"key\traw\n{rows}")

    def train_on(images, *more):
        command = f"embed.py --captions train.tsv --llm {tiny_llm} --device cpu --prompts raw --out s"
        monkeypatch.setattr(sys, "argv", [*command.split(), *more])
        assert not embed.main()
        small = f"--embeddings s --images {images} --name t --preset demo --width 12 --layers 1 --heads 3"
        assert train.main(f"{small} --batch 4 --steps 1 --workers 0 --device cpu".split()) == 0

    def score(rows):
        (tmp_path / "mine.tsv").write_text("image\traw\n" + "".join(f"{row}\n" for row in rows))
        assert evaluate.main("--captions mine.tsv --prompts raw --device cpu".split()) == 0
        return json.loads((tmp_path / "results/mine.json").read_text())

    return tmp_path, train_on, score


MINE = ["copy.png\tnew words", "photos/4.png\ta picture of 4 things", "other.png\tnew words",
        "again.png\ta picture of 5 things", "gone.png\tnever seen"]


def leaks(result):
    kinds = ("leaked_images", "leaked_texts", "identical_images", "identical_texts")
    return [result.get(kind) for kind in kinds]


@pytest.mark.parametrize("images", ["photos", "tars"])
def test_what_was_trained_on_or_is_scored_twice_is_counted_and_said(trained, images, capsys):
    """copy.png and again.png are photos/3.png; other.png is 7.png but for a byte, gone.png no file."""
    folder, train_on, score = trained
    data = {f"{n}.png": (folder / "photos" / f"{n}.png").read_bytes() for n in range(8)}
    (folder / "tars").mkdir()
    tar(folder / "tars/0.tar", *(member(name, content) for name, content in data.items()))
    train_on(images)
    for name in ("copy.png", "again.png"):
        (folder / name).write_bytes(data["3.png"])
    (folder / "other.png").write_bytes(data["7.png"][:-1] + b"?")
    capsys.readouterr()
    assert leaks(score(MINE)) == [3, 2, 1, 1]
    told = ("3 of 5 pictures were trained on; 2 of 5 texts were trained on; "
            "1 of 5 pictures are the same as an earlier one; 1 of 5 texts are the same as an earlier one")
    assert told in capsys.readouterr().err.splitlines()
    assert leaks(score(["other.png\tnew", "photos/../other.png\tanother"])) == [0, 0, 1, 0]


def test_ones_own_pictures_may_lie_in_tars(trained, capsys):
    """By key, by a.jpg before a.mask.jpg, in captions' own tars too; all score and leak as the files do."""
    folder, train_on, score = trained
    train_on("photos")
    files = score([f"photos/{n}.png\ta picture of {n} things" for n in range(8)])
    members = []
    for n in range(8):
        picture = (folder / "photos" / f"{n}.png").read_bytes()
        members += [member(f"{n}.depth.png", b"no picture"), member(f"{n}.png", picture),
                    member(f"{n}.txt", f"a picture of {n} things".encode())]
    (folder / "tars").mkdir()
    tar(folder / "tars/0.tar", *members[:12])
    tar(folder / "tars/1.tar", *members[12:])
    (folder / "tars/2.tar").write_bytes(b"no tar")
    alike = ("n_images", "n_texts", "skipped_images", "text_to_image", "image_to_text", "leaked_images")
    for captions_of in ("tars", "train.tsv"):
        capsys.readouterr()
        command = f"--captions {captions_of} --images tars --prompts raw --device cpu --report"
        assert evaluate.main(command.split()) == 0
        result = json.loads((folder / "results" / f"{captions_of.split('.')[0]}.json").read_text())
        assert [result[name] for name in alike] == [files[name] for name in alike]
        assert result["leaked_images"] == 8 and "2.tar" in capsys.readouterr().err


def test_joined_captions_were_trained_on_too(trained):
    folder, train_on, score = trained
    joined_file(folder / "raw.json", [(str(n), f"joined {n}") for n in range(8)])
    train_on("photos", "--join", "raw=raw.json")
    result = score(["photos/1.png\tjoined 1", "photos/2.png\ta picture of 2 things", "photos/3.png\tnew"])
    assert leaks(result)[:2] == [3, 2]


def test_what_cannot_be_compared_is_said_and_not_counted_as_none(trained, capsys):
    folder, train_on, score = trained
    train_on("photos")
    with open(folder / "train.tsv", "a") as file:
        file.write("9\tanother\n")
    mine = ["photos/4.png\ta picture of 4 things", "photos/5.png\tnew"]
    assert leaks(score(mine)) == [2, None, 0, 0]
    meta = (folder / "s/meta.json").read_text()
    (folder / "s/meta.json").write_text(meta.replace('"sha256": "', '"sha256": "another'))
    assert leaks(score(mine)) == [None, None, 0, 0]     # another store, where the run's own was
    assert capsys.readouterr().err.count("not the store any more that out/t was trained on") == 2
    (folder / "s/meta.json").write_text(meta)
    score(mine)
    os.rename("s", "moved")
    assert leaks(score(mine)) == [None, None, 0, 0]
    told = capsys.readouterr().err
    assert "how many texts were trained on is not known: " in told and "not the captions any more" in told
    assert "how many pictures were trained on is not known: s" in told


@pytest.mark.parametrize("config", [
    "[]", "{", '{"store": 7}', '{"store": {"path": "gone"}}', '{"store": {"path": "s"}, "images": 7}'])
@pytest.mark.parametrize("meta", ["[]", '{"captions": {"path": "pipe", "sha256": "", "joins": []}}',
                                  '{"captions": {"path": "pipe", "sha256": ""}}'])
def test_a_damaged_record_of_training_is_named_and_not_counted(tmp_path, monkeypatch, capsys, config, meta):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/meta.json").write_text(meta)
    (tmp_path / "config.json").write_text(config)
    with open("large.png", "wb") as file:
        file.truncate(1 << 40)
    with within(5):
        pictures = [tmp_path / name for name in ("pipe", "large.png", "a.png")]
        counts = count_leaks(pictures, ["a", "a"], tmp_path)
    assert counts == {"identical_images": 0, "identical_texts": 1}
    assert capsys.readouterr().err.count(" is not known: ") == 2


@pytest.mark.parametrize("name, text, cure", [
    ("x.parquet", "PAR1", "JSONL"),
    ("y.csv", "picture;note\n1;2\n", "no column"),
    ("z/readme.md", "", "a folder"),
])
def test_what_is_not_read_says_what_is(tmp_path, name, text, cure):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(flame.InputError, match=cure):
        rows_of(path.parent if name.startswith("z/") else path)
