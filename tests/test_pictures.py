"""data/pictures.py: crops as torchvision draws them, what a loader's process gets, where pictures lie."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import flame
from data import pictures
from data.pictures import DRAWS, Batches, crop_box, find_pictures, open_picture, random_crop
from test_captions import hostile, member, tar, within

SETTINGS = {"image_size": 16, "patch_size": 8, "batch": 4, "positives": 2, "crop_scale": 0.9, "seed": 0,
            "patch_dropout": 0.0, "cache": 0.0}


def make_store(folder, keys, images=None):
    """A store of random vectors whose captions.tsv lies beside it."""
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(len(keys), 11, 8))
    np.save(folder / "embeddings.npy", vectors.astype(np.float16))
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    (folder / "images.txt").write_text("".join(f"{image}\n" for image in images or [""] * len(keys)))
    meta = {
        "llm": {"name": "tiny", "fingerprint": "f", "layer": 3, "positions": "restart"},
        "captions": {"path": str(folder.parent / "captions.tsv"), "joins": {}, "sha256": ""},
        "columns": list(flame.COLUMNS), "prompts": list(flame.PROMPTS), "store": "float16",
        "N": len(keys), "M": 11, "D": 8,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return flame.open_store(folder)


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (value, value, value)).save(path)
    return path.read_bytes()


# --- crops

def farthest_apart(a, b):
    """Kolmogorov and Smirnov's statistic: the greatest distance of two samples' distribution functions."""
    both = np.concatenate([a, b])
    of_a = np.searchsorted(np.sort(a), both, "right") / len(a)
    of_b = np.searchsorted(np.sort(b), both, "right") / len(b)
    return np.abs(of_a - of_b).max()


@pytest.mark.parametrize("width, height", [(500, 500), (640, 480), (480, 640), (900, 300), (200, 1000)])
@pytest.mark.parametrize("smallest", [0.9, 0.5, 0.08])
def test_crops_are_distributed_as_torchvisions(width, height, smallest):
    n = 3000
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    draws = np.random.default_rng(1).random((n, DRAWS))
    left, top, w, h = np.transpose([crop_box(width, height, smallest, draw) for draw in draws])
    theirs = [RandomResizedCrop.get_params(image, (smallest, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    their_top, their_left, their_h, their_w = np.transpose(theirs)
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    bound = 2.23 * (2 / n) ** 0.5  # one in 10,000 pairs of samples of the same distribution is farther apart
    assert farthest_apart(w * h, their_w * their_h) < bound
    assert farthest_apart(w / h, their_w / their_h) < bound
    assert farthest_apart(left, their_left) < bound and farthest_apart(top, their_top) < bound


def test_a_crop_is_a_function_of_its_draws_and_shows_its_box():
    y, x = np.mgrid[:300, :400]
    image = Image.fromarray(np.stack([x * 255 // 399, y * 255 // 299, 0 * x], axis=-1).astype(np.uint8))
    for draw in np.random.default_rng(2).random((20, DRAWS)):
        left, top, w, h = crop_box(400, 300, 0.5, draw)
        crop = random_crop(image, 64, 0.5, draw)
        assert crop.equal(random_crop(image, 64, 0.5, draw))
        columns, rows = crop[0].float().mean(0), crop[1].float().mean(1)
        assert abs(columns[0] - left * 255 / 399) < 4 and abs(columns[-1] - (left + w) * 255 / 399) < 4
        assert abs(rows[0] - top * 255 / 299) < 4 and abs(rows[-1] - (top + h) * 255 / 299) < 4


# --- loaders that start by spawn or forkserver, the default from Python 3.14 on

@pytest.fixture
def batches(tmp_path):
    keys = [f"k{n}" for n in range(12)]
    for n, key in enumerate(keys):
        picture(tmp_path / f"{key}.png", 20 * n)
    store = make_store(tmp_path / "store", keys, [f"{key}.png" for key in keys])
    return Batches(store, range(11), find_pictures(store), SETTINGS, 3)


def test_a_store_is_pickled_as_its_path(tmp_path):
    store = make_store(tmp_path / "store", [f"k{n}" for n in range(2000)])
    assert store.vectors.nbytes > 300_000 and len(pickle.dumps(store)) < 500
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again.vectors, np.memmap) and again.keys == store.keys
    assert again.read([3], [1]).equal(store.read([3], [1]))


def test_a_loader_by_forkserver_gives_the_same_batches(batches):
    loader = torch.utils.data.DataLoader(batches, None, num_workers=1, multiprocessing_context="forkserver")
    for step, (batch, bad) in enumerate(loader):
        expected, _ = batches[step]
        assert not bad and all(a.equal(b) for a, b in zip(batch[:4], expected[:4]))
    assert step == 2


# --- where pictures lie

def test_a_key_ends_at_its_names_first_dot_in_folders_and_tars(tmp_path):
    keys = ["a", "b", "c"]
    names = {"a.jpg": 10, "b.large.jpg": 20, "c.depth.jpg": 30, "c.jpg": 40, ".d.jpg": 50, "e.jpg": 60}
    store = make_store(tmp_path / "store", keys)
    data = {name: picture(tmp_path / "images" / "sub.folder" / name, value) for name, value in names.items()}
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "0.tar", *(member(f"x.y/{name}", data[name]) for name in names))
    for folder in (None, tmp_path / "tars"):
        rows, files, places = find_pictures(store, folder)
        assert rows.tolist() == [0, 1, 2]
        assert [open_picture(files, place).getpixel((0, 0))[0] // 10 for place in places] == [1, 2, 4]


def test_a_tar_beside_the_pictures_that_captions_name_does_not_hide_them(tmp_path):
    store = make_store(tmp_path / "store", ["a", "b"], ["a.jpg", "b.jpg"])
    for name in ("a", "b"):
        data = picture(tmp_path / "photos" / f"{name}.jpg")
    tar(tmp_path / "photos" / "train2017.tar", member("b.jpg", data), member("other.jpg", data))
    rows, files, _ = find_pictures(store, tmp_path / "photos")
    assert rows.tolist() == [0, 1] and not any(str(file).endswith(".tar") for file in files)


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_pictures_that_are_not_there_are_named_with_path_captions_and_cure(tmp_path, folder):
    store = make_store(tmp_path / "store", ["a", "b", "c"], ["", "x/b.jpg", "x/c.jpg"])
    root = tmp_path / (folder or "")
    with pytest.raises(flame.InputError) as error:
        find_pictures(store, folder and root)
    where = f"{tmp_path}/captions.tsv names it x/b.jpg"
    for part in (f"{root}/x/b.jpg: no such picture", "any other of 2", where, "--images"):
        assert part in str(error.value)
    picture(root / "x/b.jpg")
    picture(root / "x/c.jpg")
    assert find_pictures(store, folder and root)[0].tolist() == [1, 2]
    store = make_store(tmp_path / "other", ["a", "b.c"])
    picture(tmp_path / "images" / "a.jpg")
    with pytest.raises(flame.InputError, match=f"{tmp_path}/images: 1 of the 2 keys"):
        find_pictures(store)


def test_stage_1_says_at_once_which_pictures_are_not_there(tmp_path, tiny_llm, monkeypatch, capsys):
    import embed
    monkeypatch.chdir(tmp_path)
    rows = [f"{n}\tx/{n}.png\tA {n}\n" for n in range(3)]
    (tmp_path / "a.tsv").write_text("key\timage\traw\n" + "".join(rows))
    arguments = ["--captions", "a.tsv", "--llm", str(tiny_llm), "--prompts", "raw", "--overwrite"]
    monkeypatch.setattr("sys.argv", ["embed.py", *arguments])
    for there, words in (([1], ["2 of the first 3", "x/0.png", "--images"]), ([0, 1, 2], [])):
        for n in there:
            picture(tmp_path / "x" / f"{n}.png")
        assert not embed.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if "not there" in line]
        assert len(lines) == bool(words) and all(word in lines[0] for word in words)


def test_a_sample_of_very_many_pictures_is_looked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(os.path, "isfile", asked.append)
    looked, missing = pictures.missing_pictures([f"{n}.jpg" for n in range(123_456)])
    assert looked == len(missing) == len(asked) <= pictures.LOOKED_AT
    assert asked[0] == "0.jpg" and asked[-1] > "123"


# --- what is no picture's file

def test_a_pipe_among_the_pictures_is_skipped_and_named(batches, tmp_path):
    (tmp_path / "k3.png").unlink()
    os.mkfifo(tmp_path / "k3.png")
    (tmp_path / "k4.png").unlink()
    with within(10):
        bad = dict(pair for step in range(3) for pair in batches[step][1])
    assert bad == {"k3": f"OSError: {tmp_path}/k3.png", "k4": f"FileNotFoundError: {tmp_path}/k4.png"}


def test_pipes_and_folders_among_the_tars_are_counted(tmp_path, capsys):
    store = make_store(tmp_path / "store", ["a", "b"])
    folder = tmp_path / "tars"
    data = picture(tmp_path / "a.png")
    folder.mkdir()
    tar(folder / "1.tar", member("a.png", data), member("b.png", data))
    os.mkfifo(folder / "0.tar")
    (folder / "2.tar").mkdir()
    with within(10):
        assert find_pictures(store, folder)[0].tolist() == [0, 1]
    message = capsys.readouterr().err
    assert "2 of 3 tars cut short or damaged" in message and "0.tar: not a regular file" in message


def test_damaged_and_hostile_tars_are_used_as_far_as_they_go(tmp_path, capsys):
    damaged, alone = hostile("evil.png")
    folder = tmp_path / "tars"
    folder.mkdir()
    data = picture(tmp_path / "a.png")
    for n, bad in enumerate([*damaged.values(), *alone.values()]):
        tar(folder / f"{n:02d}.tar", member(f"a{n}.png", data), bad, member(f"b{n}.png", data))
    before = [f"a{n}" for n in range(len(damaged | alone))]
    behind = [f"b{n}" for n in range(len(damaged | alone))]
    store = make_store(tmp_path / "store", before + behind)
    with within(20):
        rows, files, places = find_pictures(store, folder, tmp_path / "tars.npz")
    found = {store.keys[row] for row in rows}
    assert found == {*before, *behind[len(damaged):]}
    assert all(open_picture(files, place).size == (20, 20) for place in places)
    assert np.array_equal(find_pictures(store, folder, tmp_path / "tars.npz")[2], places)
    message = capsys.readouterr().err
    assert f"{len(damaged)} of {len(before)} tars cut short or damaged" in message and "00.tar: " in message


def test_pictures_larger_than_any_are_left_out(batches, tmp_path, monkeypatch, capsys):
    large = max(range(12), key=lambda n: os.path.getsize(tmp_path / f"k{n}.png"))
    with open(tmp_path / f"k{large}.png", "ab") as file:
        file.truncate(5000)
    monkeypatch.setattr(pictures, "LARGEST", 4999)
    bad = [pair for step in range(3) for pair in batches[step][1]]
    assert [key for key, _ in bad] == [f"k{large}"]
    (tmp_path / "tars").mkdir()
    files = [f"k{n}.png" for n in range(12)]
    tar(tmp_path / "tars" / "0.tar", *(member(name, (tmp_path / name).read_bytes()) for name in files))
    rows, _, _ = find_pictures(batches.store, tmp_path / "tars")
    assert rows.tolist() == [n for n in range(12) if n != large]
    assert "file too large for a picture" in capsys.readouterr().err
