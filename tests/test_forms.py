"""Tests that captions meet their images, in every form that data/README.md names. Each image has one color,
which its caption names. pandas, datasets and webdataset write the sets; img2dataset's layouts are copied.
"""
import gzip
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import webdataset
from datasets.table import embed_table_storage
from PIL import Image

import embed
import flame
import flickr8k
import train
from data import benchmarks
from data.benchmarks import read_tsv
from data.captions import read_table
from data.images import group_by_image, locations_of, open_image
from data.sources import unpack_parquet

N = 60
COLORS = np.random.default_rng(0).integers(0, 256, (N, 3)).tolist()
TEXTS = [f"A square, red {r} green {g} blue {b}." for r, g, b in COLORS]
NAMES = [f"p{n:04d}" for n in range(N)]


def png(n):
    Image.new("RGB", (8, 8), tuple(COLORS[n])).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(png(n))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def img2dataset_tar(path, rows, keys=None):
    """Write samples as img2dataset does: key.jpg, key.json, key.txt."""
    members = []
    for n, key in zip(rows, keys or [f"{n:09d}" for n in rows]):
        record = {"caption": TEXTS[n], "url": f"http://x/{n}.jpg", "key": key, "status": "success"}
        members += [(f"{key}.jpg", png(n)), (f"{key}.json", json.dumps(record).encode()),
                    (f"{key}.txt", TEXTS[n].encode())]
    write_tar(path, members)


@pytest.fixture
def run(tmp_path, monkeypatch, byte_llm, capsys):
    """run(source, flags) -> (rows, rows with an image, stdout) if all pairs are right, or embed.py's error"""
    monkeypatch.chdir(tmp_path)

    def run(source, *flags):
        shutil.rmtree("store", ignore_errors=True)
        capsys.readouterr()
        code = embed.main(["--captions", str(source), "--llm", str(byte_llm), "--device", "cpu", *flags,
                           "--out", "store", "--shard-size", "99"])
        printed = capsys.readouterr()
        if code:
            assert code == 2 and not list(Path("store").glob("*.npy"))
            return printed.err.splitlines()[-1]
        store = flame.open_store("store")
        texts = [row.long for row in read_table("store/captions.tsv")]
        indexed = [path.stat().st_ino for path in Path("store").glob("images.npz")]
        for _ in range(2):  # by embed.py's index, then by train.py's own search
            rows, files, spans = train.locate_images(store, None, tmp_path)
            for row, location in zip(rows, locations_of(files, spans)):
                color = [int(number) for number in re.findall(r"\d+", texts[row])[:3]]
                assert list(open_image(location).convert("RGB").getpixel((0, 0))) == color, texts[row]
            if indexed:
                assert indexed.pop() == os.stat("store/images.npz").st_ino  # was used, not written again
                os.unlink("store/images.npz")
        return len(store), len(rows), printed.out
    return run


# --- pandas: a table with the images' paths

@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json", "jsonl"])
def test_pandas(run, kind):
    write_images(Path("photos"))
    frame = pandas.DataFrame({"image": [f"photos/{name}.png" for name in NAMES], "description": TEXTS})
    {"csv": lambda file: frame.to_csv(file, index=False),
     "tsv": lambda file: frame.to_csv(file, index=False, sep="\t"),
     "parquet": frame.to_parquet, "json": lambda file: frame.to_json(file, orient="records"),
     "jsonl": lambda file: frame.to_json(file, orient="records", lines=True)}[kind](f"mine.{kind}")
    rows, found, out = run(f"mine.{kind}", "--field", "long=description")
    assert (rows, found) == (N, N) and f"images: {N} of {N} found (./photos/p0000.png)" in out
    os.rename("photos", "moved")
    error = run(f"mine.{kind}", "--field", "long=description")
    assert ": no images found. Looked for" in error and "photos/p0000.png" in error


# --- Hugging Face datasets

KINDS = {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}


def hub_dataset(missing=()):
    write_images(Path("photos"))
    paths = [None if n in missing else os.path.abspath(f"photos/{name}.png") for n, name in enumerate(NAMES)]
    columns = {"id": [f"{name}.png" for name in NAMES], "text": TEXTS, "image": paths}
    return datasets.Dataset.from_dict(columns, datasets.Features(KINDS))


@pytest.mark.parametrize("kind", ["parquet", "bytes", "csv", "json"])
def test_datasets(run, kind):
    """In Parquet, an image is a struct of bytes and path; to_parquet() writes the path. Ids contain dots."""
    inside = kind == "bytes"
    made = hub_dataset(missing=[3] if inside else [])
    if inside:
        embedded = made.with_format("arrow").map(embed_table_storage, batched=True)
        embedded.with_format(None).to_parquet("hub.parquet")
        kind = "parquet"
    else:
        getattr(made, f"to_{kind}")(f"hub.{kind}")
    rows, found, out = run(f"hub.{kind}")
    assert (rows, found) == ((N - 1, N - 1) if inside else (N, N)), out
    assert Path("store/parquet-images").exists() == inside
    if inside:
        written = os.stat("store/parquet-images/00000.tar").st_mtime_ns
        assert unpack_parquet("hub.parquet", Path("store/parquet-images"))
        assert os.stat("store/parquet-images/00000.tar").st_mtime_ns == written  # not again


def test_several_parquet_files(run):
    """One has no images, one an image without a caption, and the name of one is a glob for another."""
    columns = [{"key": f"k{n}", "text": TEXTS[n], "image": {"bytes": png(n), "path": None}} for n in range(N)]
    Path("set").mkdir()
    pandas.DataFrame({"key": ["x"], "text": ["no image"]}).to_parquet("set/0.parquet")
    pandas.DataFrame([{**columns[1], "key": "k0", "text": None}, *columns]).to_parquet("set/1.parquet")
    assert run("set")[:2] == (N, N)
    pandas.DataFrame(columns).to_parquet("a[1].parquet")
    pandas.DataFrame(columns[::-1]).to_parquet("a1.parquet")
    assert run("a[1].parquet")[:2] == (N, N)


def test_sql_in_a_column_name_is_not_executed(run):
    """This name would put a local file into the tar of images."""
    Path("secret").write_text("password")
    name = 'key"::BLOB || (SELECT content FROM read_blob(\'secret\')) || "pic'
    images = [{"bytes": png(n), "path": None} for n in range(N)]
    pandas.DataFrame({name: images, "pic": [b""] * N, "text": TEXTS}).to_parquet("evil.parquet")
    assert run("evil.parquet")[:2] == (N, N)
    assert b"password" not in Path("store/parquet-images/00000.tar").read_bytes()


def test_imagefolder(run):
    write_images(Path("album"))
    rows = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in zip(NAMES, TEXTS)]
    Path("album/metadata.jsonl").write_text("\n".join(rows))
    assert run("album")[:2] == (N, N)


def test_coco(run):
    write_images(Path("coco/train2017"))
    images = [{"id": 1000 - n, "file_name": f"{name}.png"} for n, name in enumerate(NAMES)]
    texts = [{"id": n, "image_id": 1000 - n, "caption": text} for n, text in enumerate(TEXTS)]
    texts += [{"id": N, "image_id": 1, "caption": "No image."}, {"id": N + 1, "image_id": 1000, "caption": 5}]
    Path("coco/captions.json").write_text(json.dumps({"images": images, "annotations": texts[::-1]}))
    assert run("coco/captions.json", "--images", "coco/train2017")[:2] == (N + 1, N)


# --- several captions of each image, in the forms of Flickr8k, Flickr30k and COCO

PHOTOS = [f"p{n:04d}.png" for n in range(N)]
FIVE = [[f"{text[:-1]}, view {c}." for c in range(5)] for text in TEXTS]
PAIRS_OF_FIVE = [(photo, text) for photo, texts in zip(PHOTOS, FIVE) for text in texts]


def karpathy(folder=None, file="dataset.json"):
    splits = ["train", "restval", "test", "val"]
    images = [{"filename": photo, "imgid": n, "split": splits[n % 4],
               "sentences": [{"raw": text} for text in FIVE[n]]} | ({"filepath": folder} if folder else {})
              for n, photo in enumerate(PHOTOS)]
    Path(file).write_text(json.dumps({"images": images, "dataset": "flickr8k"}))


def coco():
    """Two files, in which the same image ids belong to other images."""
    for part, rows in enumerate((range(N // 2), range(N // 2, N))):
        images = [{"id": 1000 - n, "file_name": PHOTOS[row]} for n, row in enumerate(rows)]
        texts = [{"id": 5 * row + c, "image_id": 1000 - n, "caption": FIVE[row][c]}
                 for c in range(5) for n, row in enumerate(rows)]
        Path(f"captions{part}.json").write_text(json.dumps({"images": images, "annotations": texts}))


def lines(file, form, header=""):
    Path(file).write_text(header + "".join(
        form.format(photo, n % 5, text) + "\n" for n, (photo, text) in enumerate(PAIRS_OF_FIVE)))


def kaggle():
    pandas.DataFrame(PAIRS_OF_FIVE, columns=["image", "caption"]).to_csv("captions.txt", index=False)


FIVE_FORMS = {  # name: (function that writes the set, its captions file)
    "kaggle": (kaggle, "captions.txt"),
    "kaggle's folder": (kaggle, "."),
    "flickr30k": (lambda: lines("results.csv", "{}| {}| {}", "image_name| comment_number| comment\n"),
                  "results.csv"),
    "token": (lambda: lines("Flickr8k.token.txt", "{}#{}\t{}"), "Flickr8k.token.txt"),
    "Chinese token": (lambda: lines("zhc.txt", "{}#zhc#{} {}"), "zhc.txt"),
    "parquet list": (lambda: pandas.DataFrame({"image": PHOTOS, "caption": FIVE}).to_parquet("x.parquet"),
                     "x.parquet"),
    "parquet columns": (lambda: pandas.DataFrame({"image": PHOTOS} | {
        f"caption_{c}": [each[c] for each in FIVE] for c in range(5)}).to_parquet("x.parquet"), "x.parquet"),
    "coco": (coco, "captions*.json"),
    "tar": (lambda: write_tar(Path("0.tar"), chain(*(
        [(PHOTOS[n], png(n)), (f"p{n:04d}.txt", "\n".join(FIVE[n]).encode())] for n in range(N)))), "0.tar"),
    "lines": (lambda: [Path(f"Images/p{n:04d}.txt").write_text("\n".join(FIVE[n])) for n in range(N)],
              "Images"),
}


@pytest.mark.parametrize("form", FIVE_FORMS)
def test_all_captions_of_an_image_are_found(run, form):
    write, source = FIVE_FORMS[form]
    write_images(Path("Images"))
    write()
    result = run(source)
    assert len(result) == 3, result
    rows, found, out = result
    assert (rows, found) == (5 * N, 5 * N), out
    assert captions_of_images() == {n: set(texts) for n, texts in enumerate(FIVE)}
    if form in ("tar", "lines"):
        assert f"{N} of {N} .txt files have several lines; each line is a caption" in out


def captions_of_images():
    """Return {number of the color: captions}, from the groups that training uses."""
    store = flame.open_store("store")
    texts = [row.raw for row in read_table("store/captions.tsv")]
    images = group_by_image(*train.locate_images(store, None, Path.cwd()))
    found = {}
    for n, location in enumerate(locations_of(images.files, images.spans)):
        color = list(open_image(location).convert("RGB").getpixel((0, 0)))
        rows = images.rows[images.starts[n]:images.starts[n + 1]]
        found[COLORS.index(color)] = {texts[row] for row in rows}
    return found


@pytest.mark.parametrize("folder", [None, "val2014"])
def test_karpathy_splits_keep_test_out_of_training(run, folder):
    write_images(Path(folder or "Images"))
    karpathy(folder)
    for flags, kept in (((), (0, 1)), (("--split", "val"), (3,))):
        rows, _, out = run("dataset.json", *flags)
        assert rows == 5 * len(kept) * N // 4 and f"{N - rows // 5} images or rows of other splits" in out
        assert captions_of_images() == {n: {*FIVE[n]} for n in range(N) if n % 4 in kept}


def test_few_texts_with_several_lines_stay_one_caption(run):
    """Web alt texts may contain line breaks."""
    write_images(Path("album"))
    for n, text in enumerate(TEXTS):
        Path(f"album/{NAMES[n]}.txt").write_text(text.replace(", ", ",\n") if n < 10 else text)
    rows, _, out = run("album")
    assert rows == N and f"10 of {N} .txt files have several lines; each file is one caption" in out


def test_images_in_two_folders_are_refused(run):
    for folder in ("Images", "resized"):
        write_images(Path(folder))
    kaggle()
    assert "p0000.png is in several folders (Images, resized)" in run("captions.txt")
    assert run("captions.txt", "--images", "resized")[:2] == (5 * N, 5 * N)


# --- tests/flickr8k.py makes the same corpus of each download

SPLIT_OF = ["train", "train", "test", "val"]  # of photo n: SPLIT_OF[n % 4]


def name_lists():
    for split, name in flickr8k.NAME_LISTS.items():
        Path(name).write_text("\n".join(photo for n, photo in enumerate(PHOTOS) if SPLIT_OF[n % 4] == split))


def zips():
    lines("Flickr8k.token.txt", "{}#{}\t{}")
    name_lists()
    with zipfile.ZipFile("text.zip", "w") as texts, zipfile.ZipFile("photos.zip", "w") as photos:
        for path in [*Path(".").glob("*.txt")]:
            texts.write(path, f"Flickr8k_text/{path}")
            path.unlink()
        for n, photo in enumerate(PHOTOS):
            photos.writestr(f"Images/{photo}", png(n))
            photos.writestr(f"__MACOSX/._{photo}", b"")
    shutil.rmtree("Images")


def parquet_of_splits():
    for split in ("train", "validation", "test"):
        rows = [{"image": {"bytes": png(n), "path": None}, "caption": FIVE[n]}
                for n in range(N) if split.startswith(SPLIT_OF[n % 4])]
        pandas.DataFrame(rows).to_parquet(f"{split}-00000-of-00001.parquet")
    shutil.rmtree("Images")


DOWNLOADS = {"zips": zips, "karpathy": lambda: karpathy(file="dataset_flickr8k.json"),
             "kaggle": lambda: (kaggle(), name_lists()), "parquet": parquet_of_splits}


@pytest.mark.parametrize("form", DOWNLOADS)
def test_flickr8k_from_each_download(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    write_images(Path("Images"))
    DOWNLOADS[form]()
    lines("flickr8kzhc.caption.txt", "{}#zhc#{} zh {}")
    assert flickr8k.main([".", "out"]) == 0
    for split in ("train", "val", "test"):
        wanted = {n: FIVE[n] for n in range(N) if SPLIT_OF[n % 4] == split}
        for zh in ("", "-zh") if split != "train" and form != "parquet" else ("",):
            found = {}
            for row in read_tsv(Path(f"out/{split}{zh}.tsv")):
                image = Image.open(Path("out", row["image"]))
                assert image.size == (128, 128)
                color = np.array(image.convert("RGB").getpixel((0, 0)))
                n = np.abs(COLORS - color).sum(1).argmin()  # JPEG is not exact
                found.setdefault(n, []).append(row["raw"].removeprefix("zh "))
            assert found == wanted and list(found) != sorted(found)
    locations, languages = benchmarks.read("flickr8k", Path("out"), "val")
    assert len(locations) == N // 4 and set(languages) == ({"en", "zh"} if form != "parquet" else {"en"})


def test_flickr8k_without_photos_or_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(Path("Images"))
    kaggle()
    assert flickr8k.main([".", "out"]) == 2
    assert "have no split; add Flickr_8k.trainImages.txt" in capsys.readouterr().err
    assert not Path("out").exists()
    name_lists()
    Path("Images/p0000.png").unlink()
    Path("Images/p0004.png").write_bytes(b"no image")
    assert flickr8k.main([".", "out"]) == 0
    error = capsys.readouterr().err
    assert "skipped 1: no photo (p0000.png)" in error and "skipped 1: broken photo (p0004.png)" in error
    assert len(read_tsv(Path("out/train.tsv"))) == 5 * (N // 2 - 2)


# --- the first minute: what a newcomer gets wrong

LINES = "".join(f"{photo},{text}\n" for photo, text in zip(PHOTOS, (text.replace(",", "") for text in TEXTS)))
ROWS = "image,caption\n" + LINES


def zipped():
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("captions.txt", ROWS)


MISTAKES = {  # name: (function that writes files, the captions, what embed.py answers)
    "zip": (zipped, "archive.zip", "archive.zip: a zip or an Excel file. Unzip it"),
    "other names": (lambda: Path("x.csv").write_text("photo,words\n" + LINES), "x.csv",
                    "no column for captions (columns: photo, words). Name the one that has them: --field"),
    "no header": (lambda: Path("x.csv").write_text(LINES), "x.csv",
                  "If the first line is a row, put names above it"),
    "commas in a TSV": (lambda: Path("x.tsv").write_text(ROWS), "x.tsv", "(columns: image,caption)"),
    "folder of images": (lambda: None, "Images",
                         "Images: no captions found (files: p0000.png, p0001.png, p0002.png ...)"),
    "no such file": (lambda: None, "x.csv", "x.csv: no such file; give a TSV, CSV,"),
    "not UTF-8": (lambda: Path("x.csv").write_bytes(ROWS.replace("red", "r\xf6t").encode("latin-1")), "x.csv",
                  "no captions found. A row is broken if it is not UTF-8"),
    "commas in captions": (lambda: Path("x.csv").write_text(ROWS.replace(" red", ", red")), "x.csv",
                           "in a CSV, put quotes around captions with commas"),
    "a quote that is not closed": (lambda: Path("x.csv").write_text(ROWS.replace(",A", ',"A')), "x.csv",
                                   "no captions found. A row is broken"),
    "images elsewhere": (lambda: Path("x.csv").write_text(ROWS.replace(".png", ".jpg")), "x.csv",
                         "Looked for ./p0000.jpg in x, beside x.csv and in the folders there. x has: "
                         "no images. Name the folder of the images or tars, --images DIR"),
    "empty folder of images": (lambda: Path("x.csv").write_text(ROWS), ("x.csv", "--images", "empty"),
                               "Looked for empty/p0000.png in empty. empty has: no images. Name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_first_minute(run, mistake):
    write, source, answer = MISTAKES[mistake]
    write_images(Path("Images"))
    write()
    result = run(*([source] if isinstance(source, str) else source))
    assert isinstance(result, str) and answer in result


def test_tables_that_are_nearly_right_are_read(run):
    write_images(Path("Images"))
    files = {"utf16.csv": ROWS.replace(",", "\t").encode("utf-16"),
             "zipped.csv": gzip.compress(ROWS.encode()), "mark.csv": ROWS.encode("utf-8-sig"),
             "semicolon.csv": ROWS.replace(",", ";").encode()}
    for file, data in files.items():
        Path(file).write_bytes(data)
        result = run(file)
        assert result[:2] == (N, N), result
    header, *lines = ROWS.splitlines(keepends=True)
    lines[3] = lines[3].replace("\n", '"\n')
    Path("quote.csv").write_text("".join([header, 'x.png,"A kite\n', *lines]))  # swallows four rows
    result = run("quote.csv")
    assert result[:2] == (N - 4, N - 4), result


def test_images_by_names_with_dots_and_by_whole_paths(run, capsys):
    write_images(Path("dots"), [f"v1.{n}" for n in range(N)])
    frame = pandas.DataFrame({"key": [f"v1.{n}" for n in range(N)], "raw": TEXTS})
    frame.to_csv("dots.csv", index=False)
    result = run("dots.csv")
    assert result[:2] == (N, N), result
    frame["image"] = [os.path.abspath(f"dots/v1.{n}.png") for n in range(N)]
    frame.to_csv("whole.csv", index=False)
    Path("other").mkdir()
    rows, found, out = run("whole.csv", "--images", "other")
    assert (rows, found) == (N, N) and "so --images other is not used" in out


def test_hard_links_in_tars_are_images(run):
    img2dataset_tar(Path("a/00000.tar"), range(N))
    with tarfile.open("a/00000.tar", "a") as tar:
        member = tarfile.TarInfo("000000099.png")
        member.type, member.linkname = tarfile.LNKTYPE, "000000000.jpg"
        tar.addfile(member)
        text = tarfile.TarInfo("000000099.txt")
        text.size = len(TEXTS[0])
        tar.addfile(text, io.BytesIO(TEXTS[0].encode()))
    assert run("a/00000.tar")[:2] == (N + 1, N + 1)


# --- tars

def test_damaged_index_of_images_is_made_again(run, tmp_path):
    img2dataset_tar(Path("a/00000.tar"), range(N))
    run("a/00000.tar")
    store = flame.open_store("store")
    saved = dict(np.load("store/images.npz"))
    for change in ({"spans": saved["spans"][:, :2]}, {"rows": saved["rows"][::-1]},
                   {"rows": saved["rows"].astype(str)}, {"spans": saved["spans"] + 1}):
        np.savez("store/images.npz", **saved | change)
        train.locate_images(store, None, tmp_path)
        assert all(np.array_equal(x, saved[name]) for name, x in np.load("store/images.npz").items())


def write_shards(sample, restart=False):
    with webdataset.ShardWriter("wds/%05d.tar", maxcount=20, verbose=0) as writer:
        for n in range(N):
            writer.write({"__key__": f"{n % 20 if restart else n:06d}"} | sample(n))


@pytest.mark.parametrize("name, sample", [
    ("txt", lambda n: {"png": png(n), "txt": TEXTS[n]}),
    ("json", lambda n: {"png": png(n), "json": {"long": TEXTS[n]}}),
    ("parts", lambda n: {"image.png": png(n), "mask.png": png(0), "caption.txt": TEXTS[n]}),
    ("restart", lambda n: {"png": png(n), "txt": TEXTS[n]})])
def test_webdataset(run, name, sample):
    Path("wds").mkdir()
    write_shards(sample, name == "restart")
    assert run("wds/{00000..00002}.tar")[:2] == (N, N) and flame.open_store("store").keys[21] == (
        "00001/000001" if name == "restart" else "000021")


def test_jobs_of_img2dataset_with_the_same_keys(run):
    keys = [f"{n:09d}" for n in range(N // 2)]
    for job, rows in {"a": range(N // 2), "b": range(N // 2, N)}.items():
        img2dataset_tar(Path(f"jobs/{job}/00000.tar"), rows, keys)
    assert run("jobs")[:2] == (N, N)
    assert run("jobs/*/00000.tar")[:2] == (N, N)
    pandas.DataFrame({"key": keys, "text": TEXTS[:N // 2]}).to_csv("mine.csv", index=False)
    assert "keys belong to several images" in run("mine.csv", "--images", "jobs")
    assert run("mine.csv", "--images", "jobs/a")[:2] == (N // 2, N // 2)


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_row_numbers_of_img2dataset(run, form):
    """Two captions begin with a quote. If img2dataset parsed quotes, they swallowed the rows between them."""
    def write(rows, keys):
        if form == "webdataset":
            return img2dataset_tar(Path("cc3m/00000.tar"), rows, keys)
        for n, key in zip(rows, keys):
            path = Path(f"cc3m/00000/{key}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(n))
            path.with_suffix(".txt").write_text(TEXTS[n])

    lines = [f"{text}\thttp://x/{n}.jpg\n" for n, text in enumerate(TEXTS)]
    Path("cc3m.tsv").write_text("".join(lines))
    rows = [n for n in range(N) if n % 7]  # others could not be downloaded
    write(rows, [f"{n:09d}" for n in rows])
    assert run("cc3m.tsv")[:2] == (N, len(rows))
    rows = [n for n in range(N) if not 20 <= n < 30]
    shutil.rmtree("cc3m")
    write(rows, [f"{n:09d}" for n in range(len(rows))])
    assert "30 of 50 captions are not those beside the images" in run("cc3m.tsv")


def test_parquet_of_img2dataset(run):
    rows = [{"caption": TEXTS[n], "url": f"http://x/{n}.jpg", "key": f"{n + 5:09d}",
             "jpg": png(n) if n % 7 else None, "status": "success" if n % 7 else "failed_to_download"}
            for n in range(N)]
    Path("out").mkdir()
    pandas.DataFrame(rows[:30]).to_parquet("out/00000.parquet")
    pandas.DataFrame(rows[30:]).to_parquet("out/00001.parquet")
    assert run("out")[:2] == (N - 9, N - 9)


# --- what went wrong once

def test_images_of_the_user_survive_overwrite(run, byte_llm):
    write_images(Path("mine/images"))
    frame = pandas.DataFrame({"image": [f"images/{name}.png" for name in NAMES], "text": TEXTS})
    frame.to_csv("mine/c.csv", index=False)
    command = ["--captions", "mine/c.csv", "--out", "mine", "--llm", str(byte_llm), "--device", "cpu"]
    assert embed.main(command) == embed.main([*command, "--overwrite"]) == 0
    assert len(os.listdir("mine/images")) == N


def test_index_of_an_earlier_table_is_not_used(run, byte_llm):
    """The keys of both are row numbers, so only the captions show that the images are others."""
    img2dataset_tar(Path("cc3m/0.tar"), range(N))
    command = ["--captions", "cc3m.tsv", "--out", "new", "--llm", str(byte_llm), "--overwrite"]
    for texts, code in ((TEXTS, 0), (TEXTS[::-1], 2)):
        Path("cc3m.tsv").write_text("raw\n" + "\n".join(texts))
        assert embed.main([*command, "--device", "cpu"]) == code


def test_ambiguous_sources_are_refused(run):
    images = [{"bytes": png(n), "path": None} for n in range(N)]
    pandas.DataFrame({"before": images, "after": images, "text": TEXTS}).to_parquet("two.parquet")
    assert 'several columns have images ("before".bytes, "after".bytes)' in run("two.parquet")
    write_images(Path("other"), [f"{n:09d}" for n in range(N)])
    pandas.DataFrame({"image": [f"x/{n:09d}.png" for n in range(N)][::-1], "text": TEXTS}).to_csv("mine.csv")
    assert "no images found" in run("mine.csv", "--images", "other")  # not by row number


def test_rows_that_share_an_image_in_tars_named_by_a_pattern(run):
    img2dataset_tar(Path("cc/0.tar"), range(N))
    assert run("cc/0*")[:2] == (N, N)
    pandas.DataFrame({"image": [f"{n:09d}.jpg" for n in range(N)] * 2, "text": TEXTS * 2}).to_csv("mine.csv")
    assert run("mine.csv", "--images", "cc")[:2] == (2 * N, 2 * N)


def test_tar_in_no_order(run):
    """As `tar cf 0.tar .` may write it. Its .key.txt is not the key of the row."""
    texts = [(f"./{n:03d}.txt", TEXTS[n].encode("utf-8-sig")) for n in range(N)]
    images = [(f"./{n:03d}.png", png(n)) for n in reversed(range(N))]
    first = [("x.png", png(0)), ("x.key.txt", b"003"), ("x.txt", TEXTS[0].encode())]
    write_tar(Path("set/0.tar"), [*first, *texts, *images])
    assert run("set")[:2] == (N + 1, N + 1)


def test_folders_with_links_and_other_texts(run):
    write_images(Path("elsewhere"))
    Path("album").mkdir()
    os.symlink("../elsewhere", "album/a")
    for name, text in zip(NAMES, TEXTS):
        Path(f"album/a/{name}.txt").write_text(text)
    os.rename("album/a/p0007.png", "album/a/p0007.PNG")
    Path("album/a/p0008.txt").write_bytes(b"\xff")
    Path("album/a/x.txt").write_text("no image")
    for name in "bc":
        os.symlink("..", f"album/a/{name}")
    assert run("./album")[:2] == (N - 1, N - 1) and flame.open_store("store").images[0] == "a/p0000.png"
    assert "album/a/*.txt: no captions found" in run("album/a/*.txt")
    Path("hub").mkdir()
    Path("hub/LICENSE.txt").write_text("MIT")
    hub_dataset().to_parquet("hub/0.parquet")
    assert run("hub")[:2] == (N, N)


def test_several_images_with_the_same_key_are_not_used(run):
    write_images(Path("img"))
    for n, name in enumerate(NAMES):
        Path(f"img/{name}.jpg").write_bytes(png(N - 1 - n))
        Path(f"img/{name}.txt").write_text(TEXTS[n])
    assert "img: no captions found" in run("img")
    pandas.DataFrame({"key": NAMES, "text": TEXTS}).to_csv("mine.csv", index=False)
    assert "keys belong to several images" in run("mine.csv", "--images", "img")
    write_tar(Path("0.tar"), [(path.name, path.read_bytes()) for path in sorted(Path("img").iterdir())])
    assert "keys belong to several images" in run("0.tar")
    write_images(Path("val"), NAMES[::-1])
    table = {"key": NAMES, "image": [f"train/{name}.png" for name in NAMES], "text": TEXTS}
    pandas.DataFrame(table).to_csv("mine.csv", index=False)
    assert "no images found" in run("mine.csv", "--images", "val")  # of another folder than the row says


def test_links_to_nowhere(run):
    Path("img").mkdir()
    for name in NAMES:
        os.symlink("/nowhere", f"img/{name}.jpg")
    pandas.DataFrame({"key": NAMES, "text": TEXTS}).to_csv("mine.csv", index=False)
    assert "img/p0000.jpg: no such file, or not an image" in run("mine.csv", "--images", "img")


def test_row_without_a_key_among_others_has_no_image_by_key(run):
    img2dataset_tar(Path("t/0.tar"), range(N))
    table = {"key": [f"{n:09d}" if n % 9 else None for n in range(30, N)], "text": TEXTS[30:]}
    pandas.DataFrame(table).to_csv("mine.csv", index=False)
    assert run("mine.csv", "--images", "t")[:2] == (30, 27)


def test_images_that_change_after_embedding(run, byte_llm, tmp_path):
    img2dataset_tar(Path("t/0.tar"), range(N))
    assert run("t")[:2] == (N, N)
    img2dataset_tar(Path("t/0.tar"), range(N)[::-1], [f"{n:09d}" for n in range(N)])
    with pytest.raises(flame.InputError, match="60 of 60 captions are not those beside the images"):
        train.locate_images(flame.open_store("store"), None, tmp_path)
    command = ["--captions", "t", "--llm", str(byte_llm), "--device", "cpu", "--out", "store", "--shard-size"]
    assert embed.main([*command, "99", "--images", "elsewhere"]) == 2  # would be ignored
    for order in (1, -1):
        for file in Path("store").glob("*.*"):  # leaves the folder
            file.unlink()
        images = [{"bytes": png(n), "path": None} for n in range(N)][::order]
        pandas.DataFrame({"image": images, "text": TEXTS[::order]}).to_parquet("hub.parquet")
        assert embed.main([*command, "99", "--captions", "hub.parquet"]) == 0
        _, files, spans = train.locate_images(flame.open_store("store"), None, tmp_path)
        assert list(open_image(locations_of(files, spans)[0]).getpixel((0, 0))) == COLORS[::order][0]


# --- recaptions

@pytest.mark.parametrize("by", ["url", "uid", "key"])
def test_recaptions_are_joined_by_url_uid_or_key(run, by):
    """The other fields match rows of other images."""
    img2dataset_tar(Path("tars/00000.tar"), range(N))
    if by == "uid":
        records = [json.dumps({"caption": "x", "uid": f"u{n}"}).encode() for n in range(N)]
        pairs = [((f"{n:09d}.jpg", png(n)), (f"{n:09d}.json", records[n])) for n in range(N)]
        write_tar(Path("tars/00000.tar"), chain(*pairs))
    right = {"url": "http://x/{}.jpg", "uid": "u{}", "key": "{:09d}"}[by]
    table = {by: [right.format(n) for n in range(N)], "long": [f"{text} Long." for text in TEXTS]}
    if by != "key":
        table["key"] = [f"{n:09d}" for n in reversed(range(N))]
    pandas.DataFrame(table).to_parquet("long.parquet")
    rows, found, out = run("tars/00000.tar", "--join", "long=long.parquet")
    assert (rows, found) == (N, N) and f"{N} rows match one of {N} captions by {by}" in out
