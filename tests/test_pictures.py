"""data/pictures.py promises, of where pictures lie (what a training step sees of them is test_step.py's):

* one rule finds them, for training and for scoring: by the captions' paths, else by key in folders and tars;
* tars are indexed once and never unpacked; of a damaged or hostile one what comes before the damage is used;
* what is not there, cannot be read, or is no picture's file is counted and named, and nothing waits for it.
"""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import flame
from data import pictures
from data.pictures import Batches, Place, find_pictures, open_picture, places_of, reason
from test_captions import hostile, member, tar, within


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (value, value, value)).save(path)
    return path.read_bytes()


def found(beside, keys, images=None, **where):
    """{key: the picture's red / 10} of a table of captions that was made of beside/captions.tsv"""
    captions = where.pop("captions", beside / "captions.tsv")
    rows, files, places = find_pictures(keys, images or [""] * len(keys), captions, **where)
    assert rows.dtype == places.dtype == np.int64 and places.shape == (len(rows), 3)
    return {keys[row]: round(open_picture(place).getpixel((0, 0))[0] / 10)
            for row, place in zip(rows, places_of(files, places))}


# --- by path and by key

def test_a_key_ends_at_its_names_first_dot_in_folders_and_tars(tmp_path):
    names = {"a.jpg": 10, "b.large.jpg": 20, "c.depth.jpg": 30, "c.jpg": 40, ".d.jpg": 50, "e.jpg": 60}
    data = {name: picture(tmp_path / "images/sub.folder" / name, value) for name, value in names.items()}
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", *(member(f"x.y/{name}", data[name]) for name in names))
    for folder in (None, tmp_path / "images", tmp_path / "tars"):
        assert found(tmp_path, ["a", "b", "c", "nowhere"], folder=folder) == {"a": 1, "b": 2, "c": 4}


def test_captioned_tars_are_the_pictures_too(tmp_path):
    """One, a range, a glob, a folder: what embed.py took, train.py and evaluate.py find without --images."""
    (tmp_path / "cc").mkdir()
    for n in range(3):
        data = picture(tmp_path / "x.png", 10 * n)
        tar(tmp_path / f"cc/{n}.tar", member(f"k{n}.png", data), member(f"k{n}.txt", b"caption"))
    keys = ["k0", "k1", "k2"]
    for captions in ("cc/{0..2}.tar", "cc/*.tar", "cc"):
        assert found(tmp_path, keys, captions=tmp_path / captions) == {"k0": 0, "k1": 1, "k2": 2}
    assert found(tmp_path, keys, captions=tmp_path / "cc/1.tar") == {"k1": 1}


def test_a_tar_beside_the_pictures_that_captions_name_does_not_hide_them(tmp_path):
    for name in ("a", "b"):
        data = picture(tmp_path / f"photos/{name}.png", 20)
    tar(tmp_path / "photos/train2017.tar", member("b.png", data), member("other.png", data))
    rows, files, _ = find_pictures(["a", "b"], ["a.png", "b.png"], tmp_path / "c.tsv", tmp_path / "photos")
    assert rows.tolist() == [0, 1] and not any(file.endswith(".tar") for file in files)


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_pictures_that_are_not_there_are_named_with_path_captions_and_cure(tmp_path, folder):
    root = tmp_path / (folder or "")
    keys, images = ["a", "b", "c"], ["", "x/b.png", "x/c.png"]
    with pytest.raises(flame.InputError) as error:
        found(tmp_path, keys, images, folder=folder and root)
    for part in (f"{root}/x/b.png: no such picture", "any other of 2", "tsv names it x/b.png", "--images"):
        assert part in str(error.value)
    picture(root / "x/b.png", 20)
    picture(root / "x/c.png", 30)
    assert found(tmp_path, keys, images, folder=folder and root) == {"b": 2, "c": 3}
    (tmp_path / "images").mkdir()
    with pytest.raises(flame.InputError, match="images: none of the 3 keys .* such as a.jpg; give --images"):
        found(tmp_path, keys)
    os.rmdir(tmp_path / "images")
    with pytest.raises(flame.InputError, match="names no pictures, and there is no folder .*--images DIR"):
        found(tmp_path, keys)


def test_a_sample_of_very_many_pictures_is_looked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(os.path, "isfile", asked.append)
    looked, missing = pictures.missing_pictures([f"{n}.jpg" for n in range(123_456)])
    assert looked == len(missing) == len(asked) <= pictures.LOOKED_AT
    assert asked[0] == "0.jpg" and asked[-1] > "123"


# --- tars

def test_tars_are_indexed_once(tmp_path, monkeypatch):
    folder = tmp_path / "tars"
    folder.mkdir()
    data = [picture(tmp_path / "x.png", 10 * n) for n in range(3)]
    tar(folder / "0.tar", member("a.png", data[0]), member("b.png", data[1]))
    where = {"folder": folder, "index": tmp_path / "tars.npz"}
    assert found(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "tar_files", None)  # would be called
        assert found(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    for damage in (b"", b"PK", (tmp_path / "tars.npz").read_bytes()[:-60], b"\x80"):
        (tmp_path / "tars.npz").write_bytes(damage)
        assert found(tmp_path, ["b", "a"], **where) == {"a": 0, "b": 1}
    assert found(tmp_path, ["a", "c"], **where) == {"a": 0}           # other keys, another index
    tar(folder / "1.tar", member("c.png", data[2]))
    assert found(tmp_path, ["a", "c"], **where) == {"a": 0, "c": 2}   # another tar


def test_damaged_and_hostile_tars_are_used_as_far_as_they_go(tmp_path, capsys):
    damaged, alone = hostile("evil.png")
    folder = tmp_path / "tars"
    folder.mkdir()
    data = picture(tmp_path / "a.png", 20)
    holes = {"a header of zeros": bytes(512)}
    for n, bad in enumerate([*(damaged | holes).values(), *alone.values()]):
        tar(folder / f"{n:02d}.tar", member(f"a{n}.png", data), bad, member(f"b{n}.png", data))
    count = len(damaged) + 1
    before = [f"a{n}" for n in range(count + len(alone))]
    behind = [f"b{n}" for n in range(count + len(alone))]
    with within(20):
        assert {*found(tmp_path, before + behind, folder=folder)} == {*before, *behind[count:]}
    message = capsys.readouterr().err
    assert f"{count} of {len(before)} tars are used as far as they go" in message and "00.tar: " in message


def test_pipes_and_folders_among_the_tars_are_counted(tmp_path, capsys):
    folder = tmp_path / "tars"
    data = picture(tmp_path / "a.png", 20)
    folder.mkdir()
    tar(folder / "1.tar", member("a.png", data), member("b.png", data))
    os.mkfifo(folder / "0.tar")
    (folder / "2.tar").mkdir()
    with within(10):
        assert found(tmp_path, ["a", "b"], folder=folder) == {"a": 2, "b": 2}
    message = capsys.readouterr().err
    assert "2 of 3 tars are used as far as they go" in message and "0.tar: ReadError not a regular" in message


# --- what is no picture's file

def test_what_cannot_be_read_is_named_by_its_place(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    large = picture(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(pictures, "LARGEST", len(large) - 1)
    wanted = {"pipe.png": "OSError", "large.png": "OSError", "gone.png": "FileNotFoundError",
              "text.png": "UnidentifiedImageError"}
    for name, why in wanted.items():
        place = Place(str(tmp_path / name))
        with within(5), pytest.raises(OSError) as error:
            open_picture(place)
        assert reason(place, error.value) == f"{why}: {tmp_path / name}"
    assert reason(Place("0.tar", 512, 3), ValueError()) == "ValueError: 0.tar, byte 512"
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/0.tar", member("a.png", large), member("b.png", b"x"))
    rows, files, places = find_pictures(["a", "b"], ["", ""], tmp_path / "c.tsv", tmp_path / "tars")
    assert rows.tolist() == [1]


# --- loaders that start by spawn or forkserver, the default from Python 3.14 on

def test_a_loader_by_forkserver_gives_the_same_batches(tmp_path):
    keys = [f"k{n}" for n in range(12)]
    store = tmp_path / "store"
    store.mkdir()
    rows = "".join(f"{key}\t{key}.png\tA\tA\tA\n" for key in keys)
    (store / "captions.tsv").write_text(f"key\timage\traw\tshort\tlong\n{rows}")
    meta = {"N": 12, "D": 8, "window": 5, "llm": {"questions": flame.questions()}}
    (store / "meta.json").write_text(json.dumps(meta))
    vectors = np.random.default_rng(0).normal(size=(12, 11, 8)).astype(np.float16)
    for w in range(3):
        np.save(store / f"{w:06d}.npy", vectors[5 * w:5 * w + 5])
    for n, key in enumerate(keys):
        picture(tmp_path / f"{key}.png", 20 * n)
    store = flame.open_store(store)
    settings = {"image_size": 16, "patch_size": 8, "batch": 4, "positives": 2, "crop_scale": 0.9, "seed": 0,
                "patch_dropout": 0.0}
    where = find_pictures(store.keys, store.images, tmp_path / "c.tsv")
    batches = Batches(store, range(11), where, settings, 3)
    loader = torch.utils.data.DataLoader(batches, None, num_workers=1, multiprocessing_context="forkserver")
    for step, (batch, failed) in enumerate(loader):
        expected, _ = batches[step]
        assert not failed and all(a.equal(b) for a, b in zip(batch[:4], expected[:4]))
    assert step == 2
