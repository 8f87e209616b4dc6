"""train.py against slow, obvious twins; and all the way from pictures to a checkpoint on the command line."""
import contextlib
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where this file is run by itself
import data.pictures
import flame
import train
from data import memory, released
from data.pictures import DRAWS, Batches, crop_box, find_pictures, open_picture, random_crop
from data.show import plots

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40),
          "black": (10, 10, 10), "white": (245, 245, 245)}


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_sigmoid_loss_is_its_double_sum():
    image, text, scale, bias = unit(5, 8), unit(5, 3, 8), torch.tensor(7.0), torch.tensor(-3.0)
    total = 0.0
    for i in range(5):
        for j in range(5):
            for p in range(3):
                sign = 1 if i == j else -1
                total -= math.log(1 / (1 + math.exp(-sign * (scale * image[i] @ text[j, p] + bias))))
    assert train.sigmoid_loss(image, text, scale, bias).item() == pytest.approx(total / 15, rel=1e-6)


def test_infonce_loss_is_its_definition():
    image, text, scale = unit(5, 8), unit(5, 3, 8), 9.0
    e = np.exp(scale * np.einsum("id,jpd->ijp", image, text))  # of image i and text p of image j
    own = np.array([e[i, i] for i in range(5)])
    of_image = np.mean([-math.log(own[i, p] / e[i].sum()) for i in range(5) for p in range(3)])
    of_text = np.mean([-math.log(own[j, p] / e[:, j, p].sum()) for j in range(5) for p in range(3)])
    assert train.infonce_loss(image, text, scale).item() == pytest.approx((of_image + of_text) / 2, rel=1e-6)


def test_slots_loss_is_the_released_softmax_over_each_slot():
    """The mean over slots of cross entropy among that slot's texts, as CLIP's loss of a slot alone has it."""
    image, text, scale = unit(5, 8), unit(5, 3, 8), 9.0
    right = torch.arange(5)
    logits = [scale * image @ text[:, p].T for p in range(3)]
    of_image = torch.stack([F.cross_entropy(slot, right) for slot in logits]).mean()
    of_text = torch.stack([F.cross_entropy(slot.T, right) for slot in logits]).mean()
    torch.testing.assert_close(train.slots_loss(image, text, scale), (of_image + of_text) / 2)


def test_with_one_positive_the_losses_are_clips_and_siglips():
    image, text, scale, bias = unit(5, 8), unit(5, 1, 8), torch.tensor(7.0), torch.tensor(-3.0)
    logits = scale * image @ text[:, 0].T
    right = torch.arange(5)
    clip = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(train.infonce_loss(image, text, scale), clip)
    torch.testing.assert_close(train.slots_loss(image, text, scale), clip)
    siglip = -F.logsigmoid((2 * torch.eye(5) - 1) * (logits + bias)).sum() / 5
    torch.testing.assert_close(train.sigmoid_loss(image, text, scale, bias), siglip)


DEFINITIONS = {
    "sigmoid": train.sigmoid_loss,
    "infonce": train.infonce_loss,
    "infonce-slots": train.slots_loss,
}


@pytest.mark.parametrize("loss", DEFINITIONS.values())
def test_losses_fall_where_pairs_agree(loss):
    text = unit(6, 2, 32)
    matched, shuffled = text.mean(1), text.mean(1).roll(1, 0)
    right, wrong = (loss(F.normalize(image, dim=-1), text, torch.tensor(10.0), torch.tensor(-5.0))
                    for image in (matched, shuffled))
    assert right < wrong


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("elements", [1, 3000, 1 << 20])  # blocks of 60, 96 and all 180 texts
def test_blockwise_loss_is_the_dense_one(kind, elements):
    torch.manual_seed(elements)
    tensors = [unit(30, 16), unit(30, 6, 16), *torch.tensor([11.0, -4.0], dtype=torch.float64)]
    dense, ours = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    expected = DEFINITIONS[kind](*dense)
    loss = train.BlockwiseLoss.apply(*ours, kind, 0, elements)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * expected).backward()
    (3 * loss).backward()
    for a, b in zip(ours, dense):
        gradient = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, gradient, rtol=1e-9, atol=1e-13)


# --- a store and pictures to train on

def make_store(folder, pictures, D=24, columns=flame.COLUMNS, seed=0, images=True, llm="tiny"):
    """Vectors that tell colours apart, far off centre as an LLM's states are; pictures: {key: colour}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    meaning = {name: rng.normal(size=(len(columns), D)) for name in COLORS}
    common = 6 * rng.normal(size=(len(columns), D))
    noise = 0.1 * rng.normal(size=(len(pictures), len(columns), D))
    x = np.stack([common + meaning[color] for color in pictures.values()]) + noise
    np.save(folder / "embeddings.npy", (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16))
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in pictures))
    (folder / "images.txt").write_text("".join(f"{key}.png\n" if images else "\n" for key in pictures))
    llm = {"name": llm, "fingerprint": "f", "layer": 3, "positions": "restart"}
    captions = {"path": str(folder.parent / "captions.tsv"), "sha256": ""}
    meta = {"llm": llm, "N": len(pictures), "D": D, "columns": list(columns), "captions": captions}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def make_pictures(folder, n=24, seed=1):
    rng, out = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        name = list(COLORS)[i % len(COLORS)]
        noise = rng.integers(-10, 10, (24, 32, 3))
        pixels = (np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"p{i:03d}.png")
        out[f"p{i:03d}"] = name
    return out


SMALL = "--preset demo --image-size 16 --patch-size 8 --width 32 --layers 1 --heads 2 --batch 12 --workers 0"
SMALL = SMALL.split()


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """As conftest's, but in this process: to start Python and torch takes two seconds each time."""
    def run(script, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script, *map(str, args)])
        try:
            code = train.main() or 0
        except SystemExit as e:
            code = e.code
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())
    return run


def fit(run, store, flags=""):
    """train.py with a small model on that store."""
    return run("train.py", "--embeddings", store, *SMALL, *flags.split())


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(entry["step"], entry["loss"], entry["lr"]) for entry in entries(folder)]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["training"]


def one_line(done, *names):
    """The promise for bad input, strictly: nothing but one line on stderr."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: ")
    assert all(str(name) in done.stderr for name in names), done.stderr


@pytest.fixture
def small(tmp_path):
    pictures = make_pictures(tmp_path / "data")
    return make_store(tmp_path / "data" / "store", pictures), pictures


# --- the text projection

@pytest.mark.parametrize("kind", ["none", "center", "whiten"])
def test_text_projection_is_designs_formula(small, kind):
    store = flame.open_store(small[0])
    projection = train.fit_text_projection(store, kind, ridge=0.01, rank=1024)
    for column in (0, 2, 10):
        u = np.load(small[0] / "embeddings.npy")[:, column].astype(np.float64)
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        expected = u
        if kind != "none":
            expected = u - u.mean(0)
        if kind == "whiten":
            _, s, Vt = np.linalg.svd(expected / np.sqrt(len(u)), full_matrices=True)
            s = np.concatenate([s, np.zeros(24 - len(s))])
            expected = expected @ (Vt.T @ np.diag(1 / (s + 0.01 * s[0])) @ Vt)
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
        ours = projection(torch.from_numpy(u)[:, None].float(), [column])[:, 0]
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)


def test_low_rank_whitening_scales_the_rest_alike(small):
    store = flame.open_store(small[0])
    projection = train.fit_text_projection(store, "whiten", ridge=0.01, rank=4)
    u = store.read(range(len(store)), [5])[:, 0].double()
    centered = u - u.mean(0)
    _, s, Vt = torch.linalg.svd(centered / len(u) ** 0.5, full_matrices=True)
    gains = 1 / (s + 0.01 * s[0])
    gains[4:] = gains[4]
    expected = F.normalize(centered @ Vt.T * gains @ Vt, dim=-1)
    ours = projection(u[:, None].float(), [5])[:, 0].double()
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_shrinkage_is_that_of_sklearn(small):
    from sklearn.covariance import OAS
    store = flame.open_store(small[0])
    projection = train.fit_text_projection(store, "whiten", ridge=0.01, rank=1024, shrinkage=True)
    u = store.read(range(len(store)), [3])[:, 0].double()
    variances, vectors = np.linalg.eigh(OAS().fit(u.numpy()).covariance_)
    s = np.sqrt(variances)
    whitening = torch.from_numpy(vectors / (s + 0.01 * s[-1]) @ vectors.T)
    expected = F.normalize((u - u.mean(0)) @ whitening, dim=-1)
    ours = projection(u[:, None].float(), [3])[:, 0].double()
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    plain = train.fit_text_projection(store, "whiten", ridge=0.01, rank=1024)
    assert (plain(u[:, None].float(), [3])[:, 0].double() - expected).abs().max() > 0.01


def agreement_by_definition(store, column, ridge):
    """A of data.projection.agreement, in numpy, a row at a time."""
    name = flame.COLUMNS[column].split(".")[0]
    white = train.fit_text_projection(store, "whiten", ridge=0.01, rank=1024)
    u = store.read(range(len(store)), [column])[:, 0].double().numpy()
    covariance = np.cov(u.T, bias=True)
    product = np.zeros_like(covariance)
    for row in range(len(store)):
        said = []
        for other in {"raw", "short", "long"} - {name}:
            columns = [c for c in store.columns if flame.COLUMNS[c].startswith(other + ".")]
            said.append(white(store.read([row], columns), columns)[0].double().numpy().mean(0))
        product += np.outer(u[row] - u.mean(0), np.mean(said, axis=0)) / len(store)
    largest = np.linalg.eigvalsh(covariance)[-1]
    regression = np.linalg.inv(covariance + ridge * largest * np.eye(len(covariance))) @ product
    values, vectors = np.linalg.eigh((regression + regression.T) / 2)
    return u - u.mean(0), vectors * np.maximum(values, 0) @ vectors.T


@pytest.mark.parametrize("column", [0, 2, 10])
def test_agreement_is_regression_on_the_other_sets(small, column):
    store = flame.open_store(small[0])
    projection = train.fit_text_projection(store, "raw=agree:0.1,short=agree:0.1,long=agree:0.1")
    centered, A = agreement_by_definition(store, column, 0.1)
    expected = centered @ A
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    ours = projection(store.read(range(len(store)), [column]), [column])[:, 0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)


def test_agreement_keeps_what_captions_share_and_drops_their_wording(tmp_path):
    """Vectors of a content that all sets see and a wording, ten times as large, that each has of its own."""
    random = np.random.default_rng()
    path = make_store(tmp_path / "store", make_pictures(tmp_path, n=96))
    vectors = np.zeros((96, 11, 24))
    vectors[..., :4] = random.standard_normal((96, 1, 4))
    vectors[..., 4:] = 10 * random.standard_normal((96, 11, 20))
    vectors[..., 4] += 60  # as LLMs have it: a large mean
    np.save(path / "embeddings.npy", (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype("f2"))
    store = flame.open_store(path)

    def share(kind):
        projection = train.fit_text_projection(store, kind)
        return projection(store.read(range(96), [0]), [0])[:, 0, :4].square().sum(-1).mean()

    assert share("raw=agree:0.1") > 2 * share("raw=whiten") > 10 * share("raw=center")


def test_where_there_is_one_prompt_set_agreement_is_whitening(small, tmp_path):
    path = make_store(tmp_path / "raw", small[1], columns=["raw.0"])
    store = flame.open_store(path)
    ours = train.fit_text_projection(store, "raw=agree:0.1").state_dict()
    for name, expected in train.fit_text_projection(store, "raw=whiten:0.1").state_dict().items():
        assert torch.equal(ours[name], expected)


def test_a_store_of_few_rows_is_shrunk(small, tmp_path, monkeypatch):
    """Fewer than four rows a dimension; a longer one is taken as it is."""
    asked = []
    original = train.fit_text_projection

    def spy(*store_and_spec, shrinkage, **how):
        asked.append(shrinkage)
        return original(*store_and_spec, shrinkage=shrinkage, **how)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit_text_projection", spy)
    long = make_store(tmp_path / "data" / "long", make_pictures(tmp_path / "data", n=96))
    for store in (small[0], long):  # 24 and 96 rows of width 24
        assert train.main(["--embeddings", str(store), *SMALL, "--steps", "1"]) == 0
    assert asked == [True, False]


def test_kinds_per_prompt_set():
    expected = {"raw": ("center", 0.01, None), "short": ("none", 0.01, 0), "long": ("whiten", 0.1, 0)}
    spec = "raw=center,short=none+linear,long=whiten:0.1+linear"
    assert train.parse_projection(spec, 0.01) == expected
    assert train.parse_projection("whiten+linear:9", 0.01) == dict.fromkeys(expected, ("whiten", 0.01, 9))
    for bad in ("sharpen", "row=center", "raw=linear", "raw=whiten:much", "whiten+", "whiten+linear:-1",
                "raw=whiten+linear:8,long=whiten+linear:9"):
        with pytest.raises(flame.InputError, match=re.escape(bad)):
            train.parse_projection(bad, 0.01)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_trained_map_follows_the_closed_form(small, rank):
    """Text = normalise(u + u M), u the closed form's; M is zero at first, is learnt, is its column's own."""
    store = flame.open_store(small[0])
    plain = train.fit_text_projection(store, "whiten", ridge=0.01)
    spec = f"raw=whiten,short=whiten,long=whiten+linear:{rank}"
    mapped = train.fit_text_projection(store, spec, ridge=0.01)
    assert mapped.mapped == [flame.COLUMNS.index(f"long.{k}") for k in range(7)]
    facets = torch.randn(5, 11, store.meta["D"])
    every = list(range(11))
    torch.testing.assert_close(mapped(facets, every), plain(facets, every))
    (mapped(facets, every) * torch.randn(5, 11, store.meta["D"])).sum().backward()
    assert mapped.up.grad.flatten(1).norm(dim=1).gt(0).all()
    torch.nn.init.normal_(mapped.up, std=0.3)
    u = plain(facets, every)
    M = mapped.down @ mapped.up if rank else mapped.up
    long = u[:, 4:] + torch.einsum("nkd,kde->nke", u[:, 4:], M)
    expected = torch.cat([u[:, :4], F.normalize(long, dim=-1)], 1)
    torch.testing.assert_close(mapped(facets, every), expected)


# --- batches

def settings_for(**changes):
    demo = {name: row[0] for name, row in train.SETTINGS.items()}
    return demo | dict(image_size=16, batch=8, positives=3) | changes


def texts_of(batch, store):
    """The rows that a batch's facets are those of."""
    everything = store.read(range(len(store)), range(11)).half()
    rows = []
    for facets, columns in zip(batch[1], batch[2]):
        rows += [n for n in range(len(store)) if everything[n, columns].equal(facets)]
    assert len(rows) == len(batch[1])
    return rows


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch(small):
    store = flame.open_store(small[0])

    def make(*rank, **changes):
        return Batches(store, list(range(11)), find_pictures(store), settings_for(**changes), 6, *rank)

    first, again, other, halves = make(), make(cache=0.0), make(seed=1), [make(rank, 2) for rank in range(2)]
    for step in (5, 0):
        batch, bad = first[step]
        for a, b, *parts in zip(batch, again[step][0], *(half[step][0] for half in halves)):
            assert a.equal(b) and a.equal(torch.cat(parts))  # two ranks see the halves of one rank's batch
    assert not first[0][0][0].equal(other[0][0][0])
    seen = []
    for step in range(3):  # 24 images, batch 8: one epoch
        batch, bad = first[step]
        pixels, facets, columns, readable, kept = batch
        assert pixels.shape == (8, 3, 16, 16) and facets.shape == (8, 3, 24) and readable.all() and not bad
        assert all(len(set(row)) == 3 for row in columns.tolist())  # positives are drawn without replacement
        assert kept.shape == (8, 2)  # half of 4 patches
        assert all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in kept.tolist())
        rows = texts_of(batch, store)
        for row, picture in zip(rows, pixels.float().mean((2, 3))):  # and text belongs to picture
            assert (picture - torch.tensor(COLORS[small[1][store.keys[row]]])).abs().max() < 15
        seen += rows
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("room", [0.001, 1.0])
def test_what_a_step_sees_does_not_depend_on_what_was_read_before(tmp_path, room):
    """Large JPEGs, which are read at half their size where there is no cache, and one that is soon full."""
    pictures = dict.fromkeys([f"k{i}" for i in range(6)], "red")
    store = flame.open_store(make_store(tmp_path / "data/store", pictures))
    rng = np.random.default_rng(0)
    for key in pictures:
        noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
        noise.save(tmp_path / f"data/{key}.png", "JPEG")
    settings = settings_for(batch=2, cache=room)
    from_start, resumed = (Batches(store, [0, 1, 2], find_pictures(store), settings, 6) for _ in range(2))
    seen = [from_start[step][0][0] for step in range(6)]
    assert all(resumed[step][0][0].equal(seen[step]) for step in (4, 5))


def test_a_rank_that_reads_no_picture_has_log_sums():
    """torchrun, where all pictures of a rank's share are damaged."""
    flat = unit(12, 8).float()
    for slots in (1, 3):
        rows, columns = train.log_sums(torch.zeros(0, 8), flat, [slice(0, 6), slice(6, 12)], slots)
        assert rows.shape == (0, slots) and (columns == -math.inf).all()


def test_columns_of_a_smaller_store_get_their_own_projection(tmp_path):
    pictures = make_pictures(tmp_path / "data")
    long = [c for c in flame.COLUMNS if c.startswith("long")]
    store = flame.open_store(make_store(tmp_path / "data/store", pictures, columns=long))
    columns = train.chosen_columns(store, "long.2,long.6")
    batch, _ = Batches(store, columns, find_pictures(store), settings_for(positives=2), 1)[0]
    assert set(batch[2].flatten().tolist()) == {6, 10}  # flame.COLUMNS.index("long.2"), ...
    with pytest.raises(flame.InputError, match="raw.0"):
        train.chosen_columns(store, "raw.0")


def test_random_crop_keeps_its_bounds():
    ramp = Image.fromarray(np.stack([np.tile(np.arange(200, dtype=np.uint8), (100, 1))] * 3, axis=-1))
    for draw in np.random.default_rng(0).random((50, 4)):
        columns = random_crop(ramp, 64, 0.9, draw).float().mean((0, 1)).tolist()
        assert columns[0] < columns[-1]  # never flipped
        assert (columns[-1] - columns[0]) * 64 / 63 >= 0.5 * 200 * 0.9  # never a small crop


def test_random_crop_is_pillows_crop_and_resize():
    rng = np.random.default_rng(1)
    for side, smallest in ((96, 0.9), (40, 0.3), (7, 0.2)):  # from fine to coarse pictures
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image = coarse.resize((90, 81), Image.Resampling.BICUBIC)
        for draw in rng.random((5, DRAWS)):
            ours = random_crop(image, 64, smallest, draw).permute(1, 2, 0).numpy().astype(int)
            left, top, w, h = crop_box(90, 81, smallest, draw)
            box = image.crop((left, top, left + w, top + h))
            difference = np.abs(ours - np.array(box.resize((64, 64), Image.Resampling.BICUBIC), int))
            assert difference.max() <= 8 and difference.mean() < 0.5  # each rounds twice


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decoded_at_reduced_scale_shows_the_same(mode):
    y, x = np.mgrid[:333, :501]
    waves = np.stack([np.sin(x / 17 + y / 29), np.cos(y / 23), np.sin(x / 31)], axis=-1)
    waves = (127 + 100 * waves).astype(np.uint8)
    Image.fromarray(waves).convert(mode).save(file := io.BytesIO(), "JPEG", quality=95)
    reduced = set()
    for draw in np.random.default_rng(0).random((12, 4)):
        whole, opened = Image.open(file), Image.open(file)
        whole.load()  # decoded already: draft has nothing left to do
        expected, ours = (random_crop(image, 64, 0.3, draw).float() for image in (whole, opened))
        reduced.add(whole.width / opened.width)
        # a box of whole pixels: up to one in 64 of a difference, waves of 107 pixels' length
        assert (ours - expected).abs().mean() < 8
    assert max(reduced) > 3  # it was put to use


# --- tars

def make_tars(folder, pictures, sizes=(9, 8, 7)):
    """The pictures' files in tars as img2dataset writes them: <key>.png, <key>.txt, <key>.json."""
    folder.mkdir()
    rest = list(pictures)
    for n, size in enumerate(sizes):
        with tarfile.open(folder / f"{n:05d}.tar", "w") as tar:
            for key in rest[:size]:
                picture = (folder.parent / f"{key}.png").read_bytes()
                for suffix, data in (("png", picture), ("txt", b"a caption"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        rest = rest[size:]
    return folder


def test_tars_hold_the_same_pictures_and_are_read_nearly_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data.pictures, "SHUFFLE", 8)
    pictures = make_pictures(tmp_path / "data", n=120)
    store = flame.open_store(make_store(tmp_path / "data/store", pictures))
    folder = make_tars(tmp_path / "data" / "tars", pictures, (50, 40, 30))
    rows, tars, places = found = find_pictures(store, folder, tmp_path / "index.npz")
    assert [len(np.flatnonzero(places[:, 0] == n)) for n in range(3)] == [50, 40, 30]
    for row, place in zip(rows, places):
        assert np.array_equal(open_picture(tars, place), Image.open(tmp_path / "data" / store.images[row]))
    batches = Batches(store, [0], found, settings_for(), 1)
    for epoch in range(3):
        order = batches.order(epoch)
        assert sorted(order) == list(range(120))
        of = places[order, 0]
        assert (of[1:] != of[:-1]).sum() <= 2 * 8 * 2  # tar after tar, but where two meet in the buffer
        line = np.argsort([list(dict.fromkeys(of)).index(t) for t in places[:, 0]], kind="stable")
        moved = np.arange(120) - np.argsort(line)[order]
        assert np.abs(moved).max() <= 8 and len(set(moved)) > 4  # none is put off further than that
    assert not np.array_equal(batches.order(0), batches.order(1))


def test_index_of_tars_is_kept_until_something_changes(tmp_path, monkeypatch, capsys):
    pictures = make_pictures(tmp_path / "data")
    store = flame.open_store(make_store(tmp_path / "data/store", pictures))
    folder = make_tars(tmp_path / "data" / "tars", pictures)
    first = find_pictures(store, folder, tmp_path / "index.npz")
    with monkeypatch.context() as m:
        m.setattr(tarfile, "open", lambda *_: pytest.fail("the index was not used"))
        assert np.array_equal(find_pictures(store, folder, tmp_path / "index.npz")[2], first[2])
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00003.tar").write_bytes(whole)  # the same keys again: the first of each counts
    assert np.array_equal(find_pictures(store, folder, tmp_path / "index.npz")[2], first[2])
    assert "8 pictures left out" in capsys.readouterr().err
    (folder / "00003.tar").unlink()
    end = first[2][12, 1:].sum()
    (folder / "00001.tar").write_bytes(whole[:end - 1])  # the fourth of its eight pictures is cut short
    (folder / "00002.tar").write_bytes(b"no tar at all" * 100)
    capsys.readouterr()
    rows, _, places = find_pictures(store, folder, tmp_path / "index.npz")
    assert rows.tolist() == list(range(9 + 3)) and np.array_equal(places, first[2][:12])
    assert "2 of 3 tars cut short or damaged" in capsys.readouterr().err
    (tmp_path / "index.npz").write_bytes(b"damaged")
    assert np.array_equal(find_pictures(store, folder, tmp_path / "index.npz")[0], rows)


def test_trains_from_tars(run, tmp_path):
    pictures = make_pictures(tmp_path / "data")
    store = make_store(tmp_path / "data" / "store", pictures, images=False)
    make_tars(tmp_path / "data" / "captions", pictures)
    done = fit(run, store, "--steps 2 --workers 2")
    assert done.returncode == 0 and "24 images" in done.stdout, done.stderr


# --- the model's options

def test_left_out_patches_and_gradient_checkpointing(small):
    torch.manual_seed(0)
    vit, pixels = flame.VisionTransformer(32, 8, 24, 2, 2), torch.randn(3, 3, 32, 32)
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    x = vit.conv1(pixels).flatten(2).transpose(1, 2) + vit.positional_embedding[1:]
    first = vit.class_embedding + vit.positional_embedding[0]
    x = torch.stack([torch.stack([first, *(x[n, k] for k in kept[n])]) for n in range(3)])
    for block in vit.transformer.resblocks:
        x = block(vit.ln_pre(x) if block is vit.transformer.resblocks[0] else x)
    gradients = []
    for vit.gradient_checkpointing in (False, True):
        vit.zero_grad()
        tokens = vit(pixels, kept)
        torch.testing.assert_close(tokens, x)
        tokens.pow(2).sum().backward()
        gradients.append([p.grad for p in vit.parameters()])
    for a, b in zip(*gradients):
        assert a.equal(b)


# --- ranks and chunks: a small step, in float32 and whole, against the same in two processes and in chunks

TOWER = dict(image_size=16, patch_size=8, width=32, layers=1, heads=2, projector_hidden=40, pool_first=False,
             text_dim=24, text_rank=0)


def one_step(store, kind, projection, accumulate, rank=0, world=1, device="cpu"):
    """-> {parameter: its gradient}, and the loss, of a step on 12 of 24 pictures; some cannot be read."""
    s = settings_for(batch=12, loss=kind, accumulate=accumulate)
    torch.manual_seed(3)
    text = train.fit_text_projection(store, projection, 0.01, 1024)
    model = flame.Flame(TOWER | dict(layers=2))
    model.text = text
    model.to(device)
    batch, _ = Batches(store, list(range(11)), find_pictures(store), s, 1, rank, world)[0]
    encode = train.distribute(model, compiled=False)
    loss = train.forward_backward(model, encode, batch, s, torch.device(device))
    return {name: p.grad.cpu() for name, p in model.named_parameters()} | {"loss": loss.cpu()}


CASES = list(itertools.product(train.LOSSES, ("none+linear:8", "whiten+linear", "whiten"), (1, 3)))


def one_of_two_ranks(folder):
    """What this file does where it is run by itself."""
    flame.default_dtype = lambda device: torch.float32
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    store = flame.open_store(folder / "data" / "store")
    torch.save([one_step(store, *case, rank, 2) for case in CASES], folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_and_chunks_equal_one_big_batch(small, tmp_path, monkeypatch):
    store = flame.open_store(small[0])
    batches = Batches(store, [0], find_pictures(store), settings_for(batch=12), 1)
    first = [store.keys[n] for n in batches.pictures(0)]
    for key in (first[1], first[2], first[8]):  # two of one rank, one of the other
        (tmp_path / "data" / f"{key}.png").write_text("not a picture")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, __file__, tmp_path]
    processes = [subprocess.Popen(command, env=env | {"RANK": rank}) for rank in "01"]
    assert [p.wait(timeout=200) for p in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    for case, ours, theirs in zip(CASES, *ranks):
        expected = one_step(store, case[0], case[1], 1)
        torch.testing.assert_close(one_step(store, *case), expected, rtol=1e-5, atol=1e-6)
        loss = (ours.pop("loss") + theirs.pop("loss")) / 2
        torch.testing.assert_close(loss, expected.pop("loss"), rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            assert ours[name].equal(theirs[name])
            assert (ours[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), (case, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_takes_the_same_step(small, monkeypatch, case):
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    store = flame.open_store(small[0])
    ours = one_step(store, *case, device="cuda")
    torch.testing.assert_close(ours, one_step(store, *case), rtol=1e-3, atol=1e-5)


def test_torchrun_learns_the_same(run, small, tmp_path):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "8", "--holdout", "2", "--eval-every", "4"]
    assert run("train.py", *arguments, "--name", "one").returncode == 0
    done = torchrun(tmp_path, 2, *arguments, "--name", "two")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    one, two = (entries(tmp_path / "out" / name) for name in ("one", "two"))
    assert [e["step"] for e in two] == list(range(8)) and done.stdout.count("22 images") == 1
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=0.01)  # bfloat16
    a, b = (dict(flame.load(tmp_path / "out" / name).text.named_buffers()) for name in ("one", "two"))
    assert all(a[name].equal(b[name]) for name in a)  # the closed form: fitted by one rank, the same in all


def torchrun_command(n, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    return [*launcher, train.__file__, *map(str, arguments)]


def torchrun(folder, n, *arguments):
    command = torchrun_command(n, *arguments)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_more_ranks_than_images(tmp_path):
    store = make_store(tmp_path / "data" / "store", make_pictures(tmp_path / "data", n=2))
    done = torchrun(tmp_path, 3, "--embeddings", store, *SMALL)
    assert done.returncode != 0 and "train.py: torchrun: 3 ranks, but only 2 images" in done.stderr


def test_learning_rate_warms_up_and_falls_to_zero():
    s = dict(lr=2.0, warmup=4, steps=24)
    rates = [train.learning_rate(step, s) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[14] == pytest.approx(1.0) and rates[24] == pytest.approx(0.0, abs=1e-9)


# --- the command line

def test_learns_colours_and_leaves_a_whole_checkpoint(run, small, tmp_path):
    store, pictures = small
    done = fit(run, store, "--steps 150 --name colors --text-projection center")
    assert done.returncode == 0, done.stderr
    log = entries(tmp_path / "out/colors")
    assert [e["step"] for e in log] == list(range(150)) and log[-1]["loss"] < 0.9 * log[0]["loss"]
    model = flame.load(tmp_path / "out/colors")
    assert model.config["llm"]["fingerprint"] == "f" and not model.training
    pixels = torch.stack([model.preprocess(Image.open(store.parent / f"{key}.png")) for key in pictures])
    with torch.no_grad():
        text = model.encode_text(flame.open_store(store).read(range(len(pictures)), range(4, 11)), "long")
        best = flame.similarity(model.encode_image(pixels), text).argmax(1)
    colors = list(pictures.values())
    assert np.mean([colors[n] == colors[m] for n, m in enumerate(best.tolist())]) > 0.9
    made = {"model.safetensors", "config.json", "log.jsonl", "training.pt", "curve.png"}
    assert {path.name for path in (tmp_path / "out/colors").iterdir()} == made


@pytest.mark.parametrize("extra", [
    "--loss sigmoid", "--text-projection whiten+linear:8", "--text-projection center",
    "--text-projection none --no-pool-first", "--columns raw.0,long.3",
    "--accumulate 5 --gradient-checkpointing --clip-grad 0.5 --ema 0.5"])
def test_every_option_trains(run, small, tmp_path, extra):
    done = fit(run, small[0], f"--steps 30 {extra}")
    assert done.returncode == 0, done.stderr
    log = entries(tmp_path / "out/store")
    assert log[-1]["loss"] < log[0]["loss"]
    flame.load(tmp_path / "out/store")


def test_same_seed_same_weights(run, small, tmp_path):
    for name in ("a", "b"):
        assert fit(run, small[0], f"--steps 3 --name {name}").returncode == 0
    assert weights(tmp_path / "out/a") == weights(tmp_path / "out/b")


def test_weight_decay_spares_vectors_and_scale(small, tmp_path, monkeypatch):
    groups = []
    original = torch.optim.AdamW

    def spy(parameters, **kwargs):
        groups.extend(parameters)
        return original(parameters, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", spy)
    monkeypatch.setattr("sys.argv", ["train.py", "--embeddings", str(small[0]), *SMALL, "--steps", "1"])
    train.main()
    names = dict((id(p), n) for n, p in flame.load(tmp_path / "out/store").named_parameters())
    decayed, spared = ([tuple(p.shape) for p in g["params"]] for g in groups)
    assert len(decayed) + len(spared) == len(names)
    assert [group["weight_decay"] for group in groups] == [0.5, 0]
    assert (5, 32) in decayed and all(len(shape) >= 2 for shape in decayed)  # the position table is decayed
    assert spared.count(()) == 2 and all(len(shape) < 2 for shape in spared)


def test_pictures_are_found_by_key_in_a_folder(run, tmp_path):
    pictures = make_pictures(tmp_path / "data" / "captions" / "00000")
    store = make_store(tmp_path / "data" / "store", pictures | {"gone": "red"}, images=False)
    done = fit(run, store, "--steps 2")
    assert done.returncode == 0 and "24 images" in done.stdout, done.stderr


def test_unreadable_pictures_are_skipped_and_reported(run, small, tmp_path):
    whole = (tmp_path / "data/p003.png").read_bytes()
    (tmp_path / "data/p003.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "data/p004.png").write_text("not a picture")
    (tmp_path / "data/p005.png").unlink()
    done = fit(run, small[0], "--steps 6")
    assert done.returncode == 0 and "skipped 3 unreadable pictures" in done.stderr, done.stderr
    assert "p004 (UnidentifiedImageError)" in done.stderr
    skipped = (tmp_path / "out/store/skipped.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in skipped} == {"p003", "p004", "p005"}


# --- interrupted, and gone on with

def interrupted(command, folder, name, lines, end):
    """Starts a run in its own process group, ends it once its log has so many lines; -> what it said, and
    which processes are left."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    log = folder / "out" / name / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    end(process.pid)
    out, err = process.communicate(timeout=100)
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout
    return subprocess.CompletedProcess(command, process.returncode, out, err), left


def test_a_run_that_was_killed_or_stopped_goes_on_as_if_nothing_had_been(run, small, tmp_path):
    flags = "--steps 200 --checkpoint-every 40 --ema 0.9 --clip-grad 1"
    assert fit(run, small[0], f"{flags} --name whole").returncode == 0
    for name, how, lines in (("killed", signal.SIGKILL, 90), ("stopped", signal.SIGTERM, 50)):
        # nor does a loader process change anything
        command = [sys.executable, train.__file__, "--embeddings", small[0], *SMALL, *flags.split()]
        command += ["--workers", "1", "--name", name]
        done, _ = interrupted(command, tmp_path, name, lines, lambda pid: os.kill(pid, how))
        folder = tmp_path / "out" / name
        saved = torch.load(folder / "training.pt", weights_only=True)["step"]
        assert saved < 200
        if how == signal.SIGTERM:
            assert done.returncode == 0 and "the same command goes on" in done.stdout, done.stderr
            assert saved == len(losses(folder))
        else:
            assert done.returncode == -signal.SIGKILL and saved % 40 == 0
            assert torch.load(folder / "training-previous.pt", weights_only=True)["step"] == saved - 40
            (folder / "training.pt").write_bytes(b"cut short")  # then the one before serves
        done = fit(run, small[0], f"{flags} --name {name}")
        assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
        assert losses(folder) == losses(tmp_path / "out/whole")
        assert weights(folder) == weights(tmp_path / "out/whole")


def test_sigterm_to_the_whole_group_saves_and_leaves(run, small, tmp_path):
    """As a cluster sends it, to loader processes too: they must not die before the rank has saved."""
    flags = "--steps 60 --workers 1 --name"
    assert fit(run, small[0], f"{flags} whole").returncode == 0
    command = [sys.executable, train.__file__, "--embeddings", small[0], *SMALL, *flags.split(), "stopped"]
    done, left = interrupted(command, tmp_path, "stopped", 10, lambda pid: os.killpg(pid, signal.SIGTERM))
    assert done.returncode == 0 and "the same command goes on" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and not left  # no loader
    done = fit(run, small[0], f"{flags} stopped")
    assert "going on from step" in done.stdout, done.stderr
    assert losses(tmp_path / "out/stopped") == losses(tmp_path / "out/whole")
    assert weights(tmp_path / "out/stopped") == weights(tmp_path / "out/whole")


def test_sigterm_to_torchruns_group_saves_and_leaves(small, tmp_path):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "40", "--workers", "1", "--name"]
    assert torchrun(tmp_path, 2, *arguments, "whole").returncode == 0
    command = torchrun_command(2, *arguments, "stopped")
    done, _ = interrupted(command, tmp_path, "stopped", 10, lambda pid: os.killpg(pid, signal.SIGTERM))
    assert "the same command goes on" in done.stdout, done.stderr
    done = torchrun(tmp_path, 2, *arguments, "stopped")
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
    assert losses(tmp_path / "out/stopped") == losses(tmp_path / "out/whole")
    assert weights(tmp_path / "out/stopped") == weights(tmp_path / "out/whole")


def test_running_average_is_saved_in_the_weights_place(run, small, tmp_path):
    assert fit(run, small[0], "--steps 2 --checkpoint-every 1 --ema 0.6 --name a").returncode == 0
    before = torch.load(tmp_path / "out/a/training-previous.pt")
    after = torch.load(tmp_path / "out/a/training.pt")
    for name, p in flame.load(tmp_path / "out/a").named_parameters():
        step = (1 - 2 / 11) * (after["model"][name] - before["average"][name])
        torch.testing.assert_close(p.data, before["average"][name] + step)
        assert p.equal(after["average"][name])


def test_a_finished_run_is_trained_longer(run, refused, small, tmp_path):
    """More steps go on from the last one, on the longer cosine; fewer, or other settings too, are refused."""
    arguments = ["--embeddings", small[0], *SMALL]
    assert run("train.py", *arguments, "--steps", "3").returncode == 0
    first = losses(tmp_path / "out/store")
    done = run("train.py", *arguments, "--steps", "6")
    assert done.returncode == 0 and "going on from step 3, longer than before" in done.stdout, done.stderr
    longer = losses(tmp_path / "out/store")
    assert len(longer) == 6 and longer[:3] == first
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out/store/log.jsonl").read_text().splitlines()]
    assert rates[3] == pytest.approx(1e-3 * 0.5)  # half of six steps
    assert json.loads((tmp_path / "out/store/config.json").read_text())["training"]["steps"] == 6
    refused(run("train.py", *arguments, "--steps", "3"), "out/store", "steps 6, now it is 3", "--overwrite")
    other = run("train.py", *arguments, "--steps", "9", "--lr", "0.5")
    refused(other, "out/store", "lr 0.001, now it is 0.5")


def test_a_finished_or_another_run_is_not_overwritten(run, refused, small, tmp_path):
    store, pictures = small
    arguments = ["--embeddings", store, *SMALL, "--steps", "2"]
    assert run("train.py", *arguments).returncode == 0
    trained = weights(tmp_path / "out/store")
    again = run("train.py", *arguments, "--workers", "1")
    assert again.returncode == 0 and "finished already" in again.stdout
    refused(run("train.py", *arguments, "--lr", "0.5"), "out/store", "lr 0.001, now it is 0.5", "--overwrite")
    wider = make_store(tmp_path / "data" / "wider", pictures, D=32)
    done = run("train.py", *arguments, "--embeddings", wider, "--name", "store")
    refused(done, "out/store", "width 24", "32")
    other = make_store(tmp_path / "data" / "other", pictures, llm="another")
    done = run("train.py", *arguments, "--embeddings", other, "--name", "store")
    refused(done, "out/store", "another store")
    assert weights(tmp_path / "out/store") == trained
    assert run("train.py", *arguments, "--lr", "0.5", "--overwrite").returncode == 0
    assert weights(tmp_path / "out/store") != trained and len(losses(tmp_path / "out/store")) == 2
    for name in ("training.pt", "training-previous.pt"):
        (tmp_path / "out/store" / name).unlink(missing_ok=True)
    config = json.loads((tmp_path / "out/store/config.json").read_text())
    (tmp_path / "out/store/config.json").write_text(json.dumps(config | {"step": 1}))
    refused(run("train.py", *arguments, "--lr", "0.5"), "training.pt", "--overwrite")


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(run, refused, small, tmp_path):
    vectors = np.load(small[0] / "embeddings.npy")
    vectors[7] = np.nan
    np.save(small[0] / "embeddings.npy", vectors)
    store = flame.open_store(small[0])
    batches = Batches(store, [0], find_pictures(store), settings_for(batch=4), 6)
    at = next(step for step in range(6) if 7 in batches.pictures(step))
    done = fit(run, small[0], "--batch 4 --steps 9 --text-projection none --checkpoint-every 1")
    refused(done, f"at step {at}", store.keys[batches.pictures(at)[0]], "nan-batch.txt")
    assert at > 0 and "p007" in (tmp_path / "out/store/nan-batch.txt").read_text().split()
    saved = torch.load(tmp_path / "out/store/training.pt", weights_only=True)
    assert saved["step"] == at and all(x.isfinite().all() for x in saved["model"].values())


# --- the curve

def test_held_out_recall_is_that_of_evaluate(small):
    import evaluate
    store = flame.open_store(small[0])
    torch.manual_seed(0)
    model = flame.Flame(TOWER)
    rows, files, places = find_pictures(store)
    ours, failed = train.held_out_recall(model, store, list(range(11)), rows, files, places, "cpu")
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(Image.open(file)) for file in files])
        image = model.encode_image(pixels).numpy()
    text = store.read(rows, range(4, 11)).mean(1).numpy()
    assert ours == pytest.approx(evaluate.retrieval(text, image, np.arange(24))["text_to_image"]["R@1"])


def test_held_out_pictures_are_not_trained_on(run, small, tmp_path):
    done = fit(run, small[0], "--steps 5 --holdout 2 --eval-every 2")
    assert done.returncode == 0 and "22 images" in done.stdout, done.stderr
    seen = [e["step"] for e in entries(tmp_path / "out/store") if "held_out_R@1" in e]
    assert seen == [1, 3, 4]
    curve = np.array(Image.open(tmp_path / "out/store/curve.png").convert("RGB")).reshape(-1, 3)
    colors = set(map(tuple, curve.tolist()))
    assert {ImageColor.getrgb(plots.BLUE), ImageColor.getrgb(plots.RED)} <= colors  # both lines are there


def test_tensorboard_is_optional(run, refused, small, tmp_path):
    done = fit(run, small[0], "--steps 2 --tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return refused(done, "--tensorboard", "pip install tensorboard")
    assert done.returncode == 0 and any((tmp_path / "out/store/tensorboard").iterdir()), done.stderr


def test_bad_input_on_the_command_line(run, refused, small, tmp_path):
    store, pictures = small
    refused(run("train.py"), "data/embeddings", "embed.py")
    refused(run("train.py", "--embeddings", tmp_path / "none"), tmp_path / "none", "not an embedding store")
    done = fit(run, store, f"--images {tmp_path}/none")
    refused(done, tmp_path / "none/p000.png", "captions.tsv", "--images")
    refused(fit(run, store, "--text-projection sharpen"), "sharpen")
    refused(fit(run, store, "--loss hinge"), "hinge")
    (tmp_path / "file").write_text("")
    refused(run("train.py", "--embeddings", store, *SMALL, "--name", tmp_path / "file" / "x"), "file")
    keyed = make_store(tmp_path / "other" / "store", pictures, images=False)
    refused(run("train.py", "--embeddings", keyed, *SMALL), "captions", "--images")
    make_pictures(tmp_path / "other" / "pictures", n=1)
    refused(fit(run, keyed, f"--images {tmp_path}/other/pictures"), "1 of the 24 keys")
    refused(fit(run, store, "--device cuda:99"), "cuda:99")
    (store / "meta.json").rename(store / "journal.json")
    refused(run("train.py", "--embeddings", store), "not finished")


# --- settings: all looked at together, before anything is read or made

REFUSED = {
    "--lr": "nan -1 inf much", "--weight-decay": "nan", "--warmup": "-1",
    "--clip-grad": "nan", "--epochs": "inf nan -1", "--steps": "-1 1e3", "--ema": "1",
    "--init-scale": "0 nan", "--seed": "-1 1.0",
    "--heads": "0 5 -1", "--width": "0 -24 1.5", "--layers": "0 100000000", "--patch-size": "0 -8 64",
    "--image-size": "0 65", "--projector-hidden": "-1", "--positives": "0 12", "--batch": "0 -3",
    "--accumulate": "-1", "--crop-scale": "0 1.1", "--patch-dropout": "nan -0.5", "--holdout": "-1",
    "--eval-every": "-1", "--checkpoint-every": "-1", "--cache": "nan", "--workers": "-1",
    "--loss": "hinge", "--init": "random", "--text-projection": "sharpen whiten:nan raw=whiten:0",
    "--pool-first": "y", "--compile": "on", "--preset": "cc12m", "--device": "foo mps cuda:99",
    "--no-such": "1"}


def tree(folder):
    """All that lies in a folder: paths, and contents of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("wrong", [f"{flag}={value}" for flag in REFUSED for value in REFUSED[flag].split()])
def test_a_wrong_setting_is_one_line_and_leaves_nothing_behind(run, small, tmp_path, wrong):
    before = tree(tmp_path)
    one_line(fit(run, small[0], wrong), wrong.split("=")[0])
    assert tree(tmp_path) == before


def test_what_the_data_refuse_leaves_nothing_behind_either(run, small, tmp_path, monkeypatch):
    before = tree(tmp_path)
    one_line(fit(run, small[0], "--holdout 13"), "--holdout 13", "24 images")
    one_line(fit(run, small[0], "--columns raw.0,raw.0"), "raw.0")
    one_line(fit(run, small[0], "--columns raw.1"), "raw.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    one_line(fit(run, small[0], "--device cuda"), "--device cuda:1")  # and does not wait for the other rank
    assert tree(tmp_path) == before


def test_flags_that_are_on_or_off(run, small, tmp_path):
    flags = "--steps 1 --no-pool-first --gradient-checkpointing"
    assert fit(run, small[0], flags).returncode == 0
    was = settings_of(tmp_path / "out/store")
    assert (was["pool_first"], was["gradient_checkpointing"], was["compile"]) == (False, True, False)


# --- the published recipe

def test_published_initial_weights_are_those_of_torch():
    """The released code leaves nn.MultiheadAttention and nn.Linear as they are; CLIP's shrink with depth."""
    torch.manual_seed(0)
    width = 768
    ours = flame.VisionTransformer(32, 16, width, 2, 12, "published").transformer.resblocks[1]
    theirs = torch.nn.MultiheadAttention(width, 12), torch.nn.Linear(width, 4 * width)
    for mine, reference in zip((ours.attn, ours.mlp.c_fc), theirs):
        for name, b in reference.named_parameters():
            a = mine.get_parameter(name)
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)
            assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.05)
    block = flame.VisionTransformer(32, 16, width, 2, 12, "clip").transformer.resblocks[1]
    assert block.attn.out_proj.weight.std().item() == pytest.approx(width ** -0.5 / 2, rel=0.05)
    assert train.SETTINGS["init"][:2] == ("clip", "published")  # demo, cc3m
    assert train.SETTINGS["holdout"][1] == 0  # 948 steps an epoch: all images
    assert set(train.YFCC15M) == {"epochs"}


def test_the_checkpoint_says_which_columns_it_was_trained_on(run, small, tmp_path):
    assert fit(run, small[0], "--steps 1 --columns long.3,raw.0").returncode == 0
    assert flame.load(tmp_path / "out/store").config["columns"] == ["long.3", "raw.0"]
    assert fit(run, small[0], "--steps 1 --name all").returncode == 0
    assert flame.load(tmp_path / "out/all").config["columns"] == flame.COLUMNS
    path = tmp_path / "out/all/config.json"
    record = json.loads(path.read_text())
    assert record["store"]["columns"] == record["model"].pop("columns")
    record["store"]["columns"] = flame.COLUMNS[:4]
    path.write_text(json.dumps(record))
    assert flame.load(path.parent).config["columns"] == flame.COLUMNS[:4]  # else all of the store


# --- memory

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [{}, dict(pool_first=True), dict(width=32, heads=4, layers=6)], ids=str)
def test_memory_of_a_picture_is_what_autograd_keeps(monkeypatch, dtype, other):
    larger = dict(image_size=32, patch_size=4, width=96, layers=3, heads=3, projector_hidden=300)
    config = TOWER | larger | other
    model, kept = flame.Flame(config), {}
    parameters = {p.data_ptr() for p in model.parameters()}
    copies = [p.shape for p in model.parameters()] + [p.shape[::-1] for p in model.parameters()]

    def keep(x):
        if x.data_ptr() not in parameters and x.shape not in copies:  # weights in bfloat16 are no picture's
            kept[x.untyped_storage().data_ptr()] = x
        return x

    dropout = 0.5 * config["pool_first"]
    patches = torch.stack([torch.randperm(64)[:32] for _ in range(8)]) if dropout else None
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        model.encode_image(torch.randn(8, 3, 32, 32), patches)
    counted = sum(x.untyped_storage().nbytes() for x in kept.values()) / 8
    monkeypatch.setattr(flame, "default_dtype", lambda device: dtype)
    assert counted <= memory.bytes_per_image(config, "cpu", dropout) <= 1.25 * counted
    assert memory.bytes_per_image(config, "cpu", dropout, gradient_checkpointing=True) < 0.8 * counted


def test_chunks_are_chosen_by_the_memory_and_change_no_gradient(run, small, tmp_path, monkeypatch):
    assert fit(run, small[0], "--steps 4 --name whole").returncode == 0
    monkeypatch.setattr(memory, "main_memory", lambda: 1 << 19)
    assert fit(run, small[0], "--steps 4 --name chunks").returncode == 0
    assert settings_of(tmp_path / "out/whole")["accumulate"] == 1
    assert 1 < settings_of(tmp_path / "out/chunks")["accumulate"] <= 12
    a, b = ([loss for _, loss, _ in losses(tmp_path / "out" / name)] for name in ("whole", "chunks"))
    assert a == pytest.approx(b, rel=1e-3)


def test_plan_says_what_it_takes_and_makes_nothing(run, small, tmp_path):
    done = fit(run, small[0], "--plan 4 --text-projection whiten+linear --steps 5")
    assert done.returncode == 0 and not (tmp_path / "out").exists(), done.stderr
    assert fit(run, small[0], "--text-projection whiten+linear --steps 1").returncode == 0
    model = flame.load(tmp_path / "out/store")
    parts = {"image tower": model.visual, "projector": model.mm, "maps of texts": model.text}
    for name, part in parts.items():
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        assert f"{name}: {millions:.1f} M parameters" in done.stdout
    assert "all 5:" in done.stdout and "4 x H100" in done.stdout and "--accumulate 1 on 80 GB" in done.stdout
    one_line(fit(run, small[0], "--plan 5"), "--plan 5", "batch of 12")


def test_what_is_computed_again_counts():
    """train.py --plan: encoding in chunks, and checkpointing, repeat the forward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    text, facets = unit(12, 3, 24).float(), torch.zeros(12, 3, dtype=torch.long)
    counted = {}
    for chunks, checkpointing in itertools.product((1, 3), (False, True)):
        s = settings_for(batch=12, accumulate=chunks, gradient_checkpointing=checkpointing, loss="sigmoid")
        names = ("image_size", "patch_size", "width", "layers", "heads", "pool_first")
        config = {name: s[name] for name in names} | {"projector_hidden": 24, "text_dim": 24, "text_rank": 0}
        model = flame.Flame(config)
        model.visual.gradient_checkpointing = checkpointing
        batch = torch.zeros(12, 3, s["image_size"], s["image_size"], dtype=torch.uint8), text, facets, \
            torch.ones(12, dtype=torch.bool), None
        with FlopCounterMode(display=False) as counter:
            train.forward_backward(model, model, batch, s, torch.device("cpu"))
        counted[memory.passes(s, chunks)] = counter.get_total_flops()
    assert sorted(counted) == [3, 4, 5]
    for passes, flops in counted.items():
        assert flops / counted[3] == pytest.approx(passes / 3, rel=0.1)


@pytest.fixture(scope="module")
def open_clips_tower():
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    sizes = {"image_size": 24, "patch_size": 8, "width": 128, "layers": 2, "heads": 2}
    return VisionTransformer(**sizes, mlp_ratio=4, output_dim=16)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_training_starts_from_open_clips_image_tower(run, small, tmp_path, open_clips_tower, suffix):
    """With its sizes, whatever the preset's; --lock-image leaves it as it is in the first steps."""
    theirs = {f"visual.{name}": tensor for name, tensor in open_clips_tower.state_dict().items()}
    file = tmp_path / f"tower.{suffix}"
    others = {"text_projection": torch.zeros(3)}
    if suffix == "pt":
        torch.save({"state_dict": theirs | others}, file)
    else:
        save_file(theirs | others, file)
    def start(flags):
        flags = f"--preset demo --batch 12 --workers 0 --steps 2 --image-tower {file} {flags}"
        return run("train.py", "--embeddings", small[0], *flags.split())
    one_line(start("--layers 6"), "--layers: ", "has 2")
    train.STOP.append(True)  # after the first step, and the same command goes on, though AdamW has no moments
    assert start("--lock-image 2 --name locked").returncode == 0
    train.STOP.clear()
    assert start("--lock-image 2 --name locked").returncode == 0
    assert [entry["step"] for entry in entries(tmp_path / "out/locked")] == [0, 1]
    assert start("--lock-image 1 --name free").returncode == 0
    locked, free = (flame.load(tmp_path / "out" / name) for name in ("locked", "free"))
    assert locked.config["width"] == 128 and locked.config["heads"] == 2 and locked.config["image_size"] == 24
    for name, tensor in locked.visual.state_dict().items():
        assert tensor.equal(theirs[f"visual.{name}"]), name
    assert not free.visual.conv1.weight.equal(locked.visual.conv1.weight)


def test_the_largest_towers_have_wider_heads(tmp_path):
    """open_clip's ViT-H-14, here with one block."""
    from open_clip.transformer import VisionTransformer
    theirs = VisionTransformer(28, 14, 1280, 1, 16, mlp_ratio=4, output_dim=16, output_tokens=True).eval()
    save_file({f"visual.{n}": t for n, t in theirs.state_dict().items()}, tmp_path / "h.safetensors")
    sizes, tensors = released.image_tower(tmp_path / "h.safetensors")
    assert sizes["heads"] == 16
    theirs.ln_post = torch.nn.Identity()
    ours = flame.VisionTransformer(*sizes.values()).eval()
    ours.load_state_dict(tensors)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels)[:, 1:], theirs(pixels)[1], rtol=1e-4, atol=1e-4)


def test_a_random_tower_is_not_locked(run, small):
    one_line(fit(run, small[0], "--lock-image 1 --steps 2"), "--lock-image", "--image-tower")


@pytest.mark.parametrize("what", ["empty", "other", "missing"])
def test_what_is_no_image_tower_is_refused(run, small, tmp_path, what):
    file = tmp_path / "tower.safetensors"
    if what != "missing":
        save_file({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)} if what == "other" else {}, file)
    one_line(fit(run, small[0], f"--image-tower {file} --steps 1"), "tower.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images, preset", [(1, "demo"), (train.FEW - 1, "demo"), (train.FEW, "cc3m")])
def test_the_preset_fits_the_number_of_images(tmp_path, images, preset):
    (tmp_path / "meta.json").write_text(json.dumps({"N": images}))
    args, s = train.read_arguments(["--embeddings", str(tmp_path)])
    assert args.preset == preset and s["width"] == {"demo": 192, "cc3m": 768}[preset]
    assert train.read_arguments(["--embeddings", str(tmp_path), "--preset", "yfcc15m"])[1]["epochs"] == 25


def test_the_presets_step_fits_one_gpu(monkeypatch):
    """Batch 3,072 of ViT-B/16 in one chunk is some hundreds of GB."""
    gpu = type("H100", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.bfloat16)
    s = {name: row[1] for name, row in train.SETTINGS.items()}
    model = torch.nn.Linear(10_000, 11_500, device="meta")  # as many parameters
    model.config = s | {"projector_hidden": 5120, "text_dim": 5120}
    assert 3072 * memory.bytes_per_image(model.config, torch.device("cuda")) > 200e9
    assert 4 <= memory.chunks_that_fit(model, s, torch.device("cuda")) <= 8
    assert memory.chunks_that_fit(model, s, torch.device("cuda"), ranks=8) == 1


def test_out_of_memory_says_what_to_change(run, refused, small, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 252.00 GiB.\nand so on")

    monkeypatch.setattr(flame.Flame, "forward", full)
    for flags, cure in (("", "--accumulate 2"), ("--accumulate 8", "--accumulate 12"),
                        ("--accumulate 12", "--gradient-checkpointing"),
                        ("--accumulate 12 --gradient-checkpointing", "--batch below 12")):
        refused(fit(run, small[0], flags), "out of memory", f"give {cure}" if "batch" not in cure else cure)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(flame.Flame, "forward", lambda *_: torch.empty(1 << 60))  # what the CPU says
    refused(fit(run, small[0]), "out of memory on cpu, --batch 12 --accumulate 1", "--accumulate 2")


# --- what is said and drawn

def test_the_screen_tells_what_is_used(run, small, tmp_path):
    done = fit(run, small[0], "--steps 4 --holdout 3 --eval-every 2")
    assert done.stdout.count("3 held-out pictures: Recall@1 ") == 2 and "bias" not in done.stderr
    done = fit(run, small[0], "--steps 2 --loss sigmoid --name sigmoid")
    assert "bias -10.0" in done.stderr and "Recall" not in done.stdout


def test_held_out_pictures_that_cannot_be_read(run, small, tmp_path):
    """Skipped like others; where none can be read the curve has no such point and training goes on."""
    held = np.random.default_rng([0, 3]).permutation(24)[:3]
    for name, bad in (("some", held[:1]), ("none", held)):
        for key in bad:
            (tmp_path / "data" / f"p{key:03d}.png").write_text("not a picture")
        done = fit(run, small[0], f"--steps 4 --holdout 3 --eval-every 2 --name {name}")
        assert done.returncode == 0 and f"skipped {len(bad)} unreadable" in done.stderr, done.stderr
        seen = ["held_out_R@1" in entry for entry in entries(tmp_path / "out" / name)]
        assert seen == ([False, True] * 2 if name == "some" else [False] * 4)
    assert "3 held-out pictures: none can be read" in done.stdout


def test_a_picture_is_skipped_once_however_often_it_is_met(run, small, tmp_path):
    (tmp_path / "data/p003.png").write_text("not a picture")
    done = fit(run, small[0], "--steps 12")  # six epochs
    assert (tmp_path / "out/store/skipped.txt").read_text() == "p003\tUnidentifiedImageError\n"
    assert "skipped 1 unreadable picture" in done.stderr


def test_without_pictures_the_paths_are_told_and_nothing_is_left(run, refused, small, tmp_path):
    (tmp_path / "none").mkdir()
    done = fit(run, small[0], f"--images {tmp_path}/none")
    refused(done, tmp_path / "none/p000.png", f"{tmp_path}/data/captions.tsv names it p000.png", "--images")
    assert not (tmp_path / "out").exists()
    for key in small[1]:
        (tmp_path / "data" / f"{key}.png").write_text("not a picture")
    refused(fit(run, small[0]), "no picture of step 0's batch", "UnidentifiedImageError", "--images")
    assert not (tmp_path / "out").exists()


def test_the_curve_has_ticks_and_is_not_missed(run, small, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.files, "write", lambda path, save: figures.append(save.__self__))
    log = [{"step": n, "loss": 5 - n / 20} for n in range(60)]
    for entry in log[9::10]:
        entry["held_out_R@1"] = entry["step"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    plots.draw_curve(tmp_path)
    figures[0].canvas.draw()
    loss, recall = figures[0].axes
    for axis in (loss.xaxis, loss.yaxis, recall.yaxis):
        assert len([tick for tick in axis.get_ticklabels() if tick.get_text()]) >= 4
    assert {tick.get_text() for tick in loss.xaxis.get_ticklabels()} >= {"0", "20", "40"}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    plots.tell_missing.cache_clear()
    done = fit(run, small[0], "--steps 4 --holdout 2 --eval-every 1")
    assert done.returncode == 0 and done.stderr.count("pip install matplotlib") == 1, done.stderr
    assert not (tmp_path / "out/store/curve.png").exists()


# --- what others wrote

def one_more_step(run, store):
    """-> the flags of a run of four steps, of which one more is done, as if SIGTERM had come."""
    flags = "--steps 4 --checkpoint-every 2"
    train.STOP.append(True)
    try:
        assert fit(run, store, flags).returncode == 0
    finally:
        train.STOP.clear()
    return flags


def changed(record, what):
    """"a.b=7": record with record["a"]["b"] = 7 (JSON, or "tensor"); "a.b": without it."""
    path, _, value = what.partition("=")
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = record
    for key in keys:
        inner = inner[key]
    if value:
        inner[last] = torch.zeros(3) if value == "tensor" else json.loads(value)
    else:
        del inner[last]
    return record


CONFIGS = """model model=[] training training="x" store store=3 step step="2" step=1.5 model.text_dim
    model.text_dim="24" store.identity store.identity=[1] training.lr training.lr="0.001" training.accumulate
    training.accumulate="all" """.split()
JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("what", [*CONFIGS, *JSON], ids=lambda what: str(what)[:40])
def test_another_config_is_one_line(run, small, tmp_path, what):
    flags = one_more_step(run, small[0])
    path = tmp_path / "out/store/config.json"
    if isinstance(what, str):
        what = json.dumps(changed(json.loads(path.read_text()), what)).encode()
    path.write_bytes(what)
    before = tree(tmp_path)
    one_line(fit(run, small[0], flags), "out/store", "--overwrite")
    assert tree(tmp_path) == before


TRAININGS = """step step="2" step=0 step=-1 step=5 step=100000000000000000000 model model={} model.logit_bias
    model.logit_bias=tensor model.logit_bias="x" optimizer optimizer=[] optimizer.state={} average=3
    optimizer.state.0.exp_avg=tensor optimizer.state.0.exp_avg optimizer.state.0.step="x" """.split()


@pytest.mark.parametrize("what", [*TRAININGS, b"", b"not a checkpoint", [1], torch.zeros(3)], ids=str)
def test_another_training_state_is_one_line(run, small, tmp_path, what):
    flags = one_more_step(run, small[0])
    path = tmp_path / "out/store/training.pt"
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(changed(torch.load(path), what) if isinstance(what, str) else what, path)
    before = tree(tmp_path)
    one_line(fit(run, small[0], flags), "training.pt", "--overwrite")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("line", [
    "", "{", "[]", "null", '{"step": 1}', '{"loss": 3.0}', '{"step": 0, "loss": "x"}',
    '{"step": 0, "loss": null}', '{"step": "0", "loss": 1.0}'])
def test_a_damaged_line_of_the_log_is_left_out(run, small, tmp_path, line):
    flags = one_more_step(run, small[0])
    path = tmp_path / "out/store/log.jsonl"
    path.write_text(f'{line}\n{path.read_text()}{{"st')  # and a last line that was cut short
    assert fit(run, small[0], flags).returncode == 0 and len(losses(path.parent)) == 4
    assert [entry["step"] for entry in entries(path.parent)] == [0, 1, 2, 3]


def test_a_log_that_was_thrown_away_is_not_missed(run, small, tmp_path):
    one_more_step(run, small[0])
    folder = tmp_path / "out/store"
    (folder / "log.jsonl").unlink()
    flags = one_more_step(run, small[0])
    assert [entry["step"] for entry in entries(folder)] == [1]
    assert torch.load(folder / "training-previous.pt")["step"] == 1  # nor has a checkpoint been thrown away
    assert fit(run, small[0], flags).returncode == 0
    assert [entry["step"] for entry in entries(folder)] == [1, 2, 3]


LOADED = """model model=3 llm llm=[] llm.layer="3" llm.fingerprint=7 llm.positions="backwards" store=[]
    model.heads model.heads="2" model.heads=0 model.heads=5 model.width=48 model.width="32" model.layers=9999
    model.layers=2 model.image_size=24 model.pool_first="no" model.text_dim model.text_rank=3
    model.text_mapped=true model.text_mapped=["short.0"] model.columns="long.0" model.columns=["long.9"]
    model.columns=[] model.columns=[{}] """.split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    store = make_store(folder / "data" / "store", make_pictures(folder / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--embeddings", str(store), *SMALL, "--steps", "1"]) == 0
    return folder / "out" / "store"


@pytest.mark.parametrize("what", LOADED)
def test_load_refuses_what_is_no_config(checkpoint, tmp_path, what):
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    record = changed(json.loads((checkpoint / "config.json").read_text()), what)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(flame.InputError, match=str(tmp_path)) as error:
        flame.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["empty", "cut", "noise", "pipe", "missing", "others"])
def test_load_refuses_what_is_no_model(checkpoint, tmp_path, how):
    path, whole = tmp_path / "model.safetensors", (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    if how == "pipe":
        os.mkfifo(path)
    elif how == "others":
        save_file({"visual.conv1.weight": torch.zeros(3)}, path)
    elif how != "missing":
        path.write_bytes({"empty": b"", "cut": whole[:-100], "noise": bytes(range(256)) * 99}[how])
    with pytest.raises(flame.InputError, match="model.safetensors") as error:
        flame.load(tmp_path)
    assert "\n" not in str(error.value)


def test_links_are_not_followed(run, small, tmp_path):
    """What a link in the folder points to is someone else's."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out/store").mkdir(parents=True)
    for name in ("log.jsonl", "skipped.txt", "config.json.tmp", "nan-batch.txt", "training.pt", "curve.png"):
        (tmp_path / "out/store" / name).symlink_to(tmp_path / "precious")
    (tmp_path / "data/p003.png").write_text("not a picture")
    done = fit(run, small[0], "--steps 3")
    assert done.returncode == 0 and (tmp_path / "precious").read_text() == "precious", done.stderr
    assert not (tmp_path / "out/store/log.jsonl").is_symlink() and len(losses(tmp_path / "out/store")) == 3


# --- a full disk

@pytest.fixture
def small_disk(tmp_path):
    """full(room) -> a context in which so many bytes are left on the disk of out/small.

    A file system of its own; where none may be mounted, no file can grow larger than that.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def full(room):
        for path in disk.iterdir():
            path.unlink()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if mounted:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "filler").write_bytes(bytes(free - room))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            (disk / "filler").unlink(missing_ok=True)

    yield full
    if mounted:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_where_it_was(run, small, tmp_path, small_disk):
    """Filled so that it ends in turn in each of the files that a run writes."""
    flags = "--steps 3 --checkpoint-every 1 --name"
    whole, disk = tmp_path / "out/whole", tmp_path / "disk"
    assert fit(run, small[0], f"{flags} whole").returncode == 0
    (tmp_path / "out/small").symlink_to(disk)
    training = (whole / "training.pt").stat().st_size
    named = set()
    for room in (1, *range(training // 2, 3 * training + len(weights(whole)), 150_000)):
        with small_disk(room):
            done = fit(run, small[0], f"{flags} small")
        if done.returncode:
            said = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert said.startswith("train.py: out/small/"), said
            named.add(Path(said.split(":")[1]).name)
            done = fit(run, small[0], f"{flags} small")
        assert done.returncode == 0, done.stderr
        assert losses(disk) == losses(whole) and weights(disk) == weights(whole)
    assert {"log.jsonl", "training.pt"} <= named


if __name__ == "__main__":
    one_of_two_ranks(Path(sys.argv[1]))
