"""Tests of train.py, data/images.py and data/projection.py: from images and a store to weights."""
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torchvision.transforms import RandomResizedCrop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # needed when this file runs as a script
import bench_clip
import embed
import evaluate
import flame
import train
from data import common, images as data_images, projection
from data.images import CROP_DRAWS, Batches, crop_box, find_images, group_by_image, random_crop
from data.show import plots

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40),
          "black": (10, 10, 10), "white": (245, 245, 245)}
SMALL = "--preset demo --image-size 16 --patch-size 8 --width 32 --layers 1 --heads 2 --batch 12 --workers 0"
SMALL = SMALL.split()
ALL_COLUMNS = list(range(len(flame.FACET_COLUMNS)))
TOWER = dict(image_size=16, patch_size=8, width=32, layers=2, heads=2, projector_hidden=40, pool_first=False)
CASES = list(itertools.product(train.LOSSES, ("none+linear", "agree+linear"), (12, 4), (0, 1)))
CASES = [case for n, case in enumerate(CASES) if n.bit_count() % 2]  # half, with all triples of settings


# --- data: 24 images, each of one color, and a store whose vectors differ by color

def colors_of(n):
    return {f"p{i:03d}": list(COLORS)[i % len(COLORS)] for i in range(n)}


def make_store(folder, colors, D=24, llm="tiny"):
    """Write a store whose vectors have a large mean, as an LLM's states have."""
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=(11, D)) for name in COLORS}
    mean = 6 * rng.normal(size=(11, D))
    x = np.stack([mean + vectors[color] for color in colors.values()])
    return write_store(folder, list(colors), x + 0.1 * rng.normal(size=x.shape), llm)


def write_store(folder, keys, x, llm="tiny"):
    """Write a finished store of vectors x [N, 11, D], in shards of 16 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    x = normalized(x).astype(np.float16)
    for n in range(0, len(x), 16):
        np.save(folder / f"{n // 16:06d}.npy", x[n:n + 16])
    rows = [f"{key}\t{key}.png\tA thing.\tA thing.\tA thing.\n" for key in keys]
    (folder / "captions.tsv").write_text("key\timage\traw\tshort\tlong\n" + "".join(rows))
    llm = {"name": llm, "path": llm, "fingerprint": llm, "layer": 3, "mask": "decoupled"}
    captions = {"path": str(folder.parent / "captions.tsv"), "sha256": ""}
    meta = {"llm": llm | {"prompts": flame.prompts_to_json()}, "captions": captions, "N": len(keys),
            "D": x.shape[-1], "columns": flame.FACET_COLUMNS, "shard_size": 16}
    meta |= embed.scan_table(folder / "captions.tsv", 16)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def edit_table(store, *edits):
    table, meta = store / "captions.tsv", store / "meta.json"
    for old, new in edits:
        table.write_text(table.read_text().replace(old, new))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | embed.scan_table(table, 16)))


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder with 24 images of 32 x 24 pixels, each of one color with some noise, and a store."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(1)
    for key, color in colors_of(24).items():
        pixels = np.array(COLORS[color]) + rng.integers(-10, 10, (24, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{key}.png")
    make_store(folder / "store", colors_of(24))
    return folder


@pytest.fixture
def copied(dataset, tmp_path):
    """Return (a copy of the store that a test may change, {key: color})."""
    shutil.copytree(dataset, tmp_path / "data")
    meta = tmp_path / "data" / "store" / "meta.json"
    meta.write_text(meta.read_text().replace(str(dataset), str(tmp_path / "data")))
    return meta.parent, colors_of(24)


@pytest.fixture
def store(dataset):
    return flame.open_store(dataset / "store")


@pytest.fixture
def fit(tmp_path, monkeypatch, capfd):
    """Return fit(store, flags), which runs train.py in this process, in tmp_path, with a small model."""
    def fit(store, flags=""):
        monkeypatch.chdir(tmp_path)
        try:
            code = train.main(["--embeddings", str(store), *SMALL, *flags.split()])
        except SystemExit as error:
            code = error.code
        return subprocess.CompletedProcess(flags, code, *capfd.readouterr())
    return fit


def log_entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def assert_error(done, *parts):
    """Assert exit code 2, and one line on stderr after any progress bars, which contains these parts."""
    *bars, line = done.stderr.replace("\r", "\n").strip().splitlines()
    assert done.returncode == 2 and line.startswith("train.py: "), done.stderr
    assert all(str(part) in line for part in parts), line
    assert all(bar.startswith("training:") for bar in bars if bar), done.stderr


def settings_for(**changes):
    demo = {name: row[0] for name, row in train.SETTINGS.items()}
    return demo | dict(image_size=16, batch=8, positives=3) | changes


def batches_of(store, columns=ALL_COLUMNS, rank=(), **changes):
    return Batches(store, columns, images_of(store), settings_for(**changes), *rank)


def images_of(store):
    return group_by_image(*find_images(store.keys, store.images, store.meta["captions"]["path"]))


# --- losses

def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def gradients(loss, *tensors):
    """Return [the loss, its gradients], with zeros for unused tensors."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = loss(*tensors)
    grads = torch.autograd.grad(value, tensors, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads))]


def test_losses_equal_their_definitions_and_open_clip_with_one_positive():
    image, text, scale, bias = unit(5, 8), unit(5, 3, 8), torch.tensor(7.0), torch.tensor(-3.0)
    triples = list(itertools.product(range(5), range(5), range(3)))
    logit = {(i, j, p): (scale * image[i] @ text[j, p]).item() for i, j, p in triples}  # image i, text p of j
    total = sum(math.log(1 + math.exp(-(1 if i == j else -1) * (logit[i, j, p] - 3))) for i, j, p in triples)
    assert train.sigmoid_loss(image, text, scale, bias).item() == pytest.approx(total / 15, rel=1e-6)
    total = 0.0
    for i, p in itertools.product(range(5), range(3)):
        sum_of_texts = sum(math.exp(logit[i, j, q]) for j in range(5) for q in range(3))
        sum_of_images = sum(math.exp(logit[j, i, p]) for j in range(5))
        total += (math.log(sum_of_texts) + math.log(sum_of_images)) / 2 - logit[i, i, p]
    assert train.infonce_loss(image, text, scale).item() == pytest.approx(total / 15, rel=1e-6)
    tensors = unit(7, 8), unit(7, 1, 8), *torch.tensor([9.0, -4.0], dtype=torch.float64)
    clip, siglip = open_clip.loss.ClipLoss(), open_clip.loss.SigLipLoss()
    theirs = gradients(lambda image, text, scale, _: clip(image, text[:, 0], scale), *tensors)
    torch.testing.assert_close(gradients(train.infonce_loss, *tensors), theirs)
    theirs = gradients(lambda image, text, scale, bias: siglip(image, text[:, 0], scale, bias), *tensors)
    torch.testing.assert_close(gradients(train.sigmoid_loss, *tensors), theirs)


def test_text_tower_of_bench_clip_equals_open_clip(monkeypatch):
    """bench_clip.py has its own attention, and removes padding."""
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    ours = bench_clip.ClipTexts(24)
    torch.manual_seed(0)
    theirs = open_clip.transformer.TextTransformer(77, ours.tokenizer.vocab_size, 192, 3, 4, output_dim=24)
    tokens = ours.tokenizer(["A red kite.", "fox", "", "One more of many words, " * 30])
    with torch.no_grad():
        expected = F.normalize(theirs(tokens), dim=-1)
        torch.testing.assert_close(ours.encode(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", train.LOSSES)
@pytest.mark.parametrize("logits", [1, 3000])  # blocks of 1 and 100 texts, out of 180
def test_loss_in_blocks_equals_dense_loss(monkeypatch, kind, logits):
    tensors = unit(30, 16), unit(30, 6, 16), *torch.tensor([11.0, -4.0], dtype=torch.float64)
    dense = gradients(train.LOSSES[kind], *tensors)
    monkeypatch.setattr(train, "MAX_LOGITS", logits)
    torch.testing.assert_close(gradients(train.LOSSES[kind], *tensors), dense, rtol=1e-9, atol=1e-13)


# --- ranks and micro-batches: a step in float32 equals the same step on two ranks and in micro-batches

def one_step(store, kind, projected, micro_batch, step, rank=0, world=1, device="cpu"):
    """Return {parameter: gradient} and the loss of a step on 12 of 24 images; some cannot be read."""
    batches = batches_of(store, rank=(rank, world), batch=12)
    s = settings_for(loss=kind, text_projection=projected, micro_batch=micro_batch, **TOWER)
    model, _ = train.build(store, ALL_COLUMNS, s, torch.device(device), images_of(store))
    encode = train.distribute(model)
    loss = train.forward_backward(model, encode, batches[step][0], s, torch.device(device))
    return {name: p.grad.cpu() for name, p in model.named_parameters()} | {"loss": loss.cpu()}


def run_rank(folder):
    """Run all cases on one of two ranks, with small blocks of logits. Called when this file is run."""
    common.default_dtype = lambda device: torch.float32
    rank = train.rank()
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    train.MAX_LOGITS = (40, 300)[rank]
    store = flame.open_store(folder / "data" / "store")
    torch.save([one_step(store, *case, rank, 2) for case in CASES], folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_and_micro_batches_equal_one_batch(copied, tmp_path, monkeypatch):
    """In step 0, rank 0 cannot read two images and rank 1 one; in step 1, rank 1 cannot read any."""
    store = flame.open_store(copied[0])
    batches = batches_of(store, batch=12)
    for n in (*batches.indices(0)[[1, 2, 8]], *batches.indices(1)[6:]):
        (tmp_path / "data" / f"{store.keys[n]}.png").write_text("not an image")
    env = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, tmp_path]
    processes = [subprocess.Popen(command, env=env | {"RANK": rank}) for rank in "01"]
    assert [p.wait(timeout=600) for p in processes] == [0, 0]
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    for case, first, second in zip(CASES, *results):
        kind, projected, micro_batch, step = case
        expected = one_step(store, kind, projected, 12, step)
        if micro_batch < 12:
            torch.testing.assert_close(one_step(store, *case), expected, rtol=1e-5, atol=1e-6)
        loss = (first.pop("loss") + second.pop("loss")) / 2
        torch.testing.assert_close(loss, expected.pop("loss"), rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            assert first[name].equal(second[name])
            assert (first[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), (case, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_on_gpu_equals_cpu(store, monkeypatch, case):
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    ours = one_step(store, *case, device="cuda")
    torch.testing.assert_close(ours, one_step(store, *case), rtol=1e-3, atol=1e-5)


def test_batch_not_divisible_by_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    train.resolve_settings(settings_for(batch=10), 24, 11, 24)
    for batch, images in ((12, 24), (10, 4)):
        with pytest.raises(flame.InputError, match="--batch"):
            train.resolve_settings(settings_for(batch=batch), images, 11, 24)


# --- crops

def ks_statistic(a, b):
    both = np.concatenate([a, b])
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), both, "right") / len(x) for x in (a, b))
    return np.abs(cdf_a - cdf_b).max()


@pytest.mark.parametrize("width, height, smallest", [
    (500, 500, 0.9), (640, 480, 0.5), (480, 640, 0.08), (900, 300, 0.9), (200, 1000, 0.08)])
def test_crops_are_distributed_as_torchvision(width, height, smallest):
    n = 3000
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    draws = np.random.default_rng(1).random((n, CROP_DRAWS))
    left, top, w, h = np.transpose([crop_box(width, height, smallest, draw) for draw in draws])
    theirs = [RandomResizedCrop.get_params(image, (smallest, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    their_top, their_left, their_h, their_w = np.transpose(theirs)
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    bound = 2.23 * (2 / n) ** 0.5  # p < 1e-4 for samples of one distribution
    assert ks_statistic(w * h, their_w * their_h) < bound
    assert ks_statistic(w / h, their_w / their_h) < bound
    assert ks_statistic(left, their_left) < bound and ks_statistic(top, their_top) < bound


@pytest.mark.parametrize("side, smallest", [(96, 0.9), (40, 0.3), (7, 0.2)])  # from fine to coarse images
def test_random_crop_equals_pillow_crop_and_resize(side, smallest):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    image = coarse.resize((90, 81), Image.Resampling.BICUBIC)
    for draw in rng.random((5, CROP_DRAWS)):
        ours = random_crop(image, 64, smallest, draw).permute(1, 2, 0).numpy().astype(int)
        left, top, w, h = crop_box(90, 81, smallest, draw)
        box = image.crop((left, top, left + w, top + h))
        difference = np.abs(ours - np.array(box.resize((64, 64), Image.Resampling.BICUBIC), int))
        assert difference.max() <= 8 and difference.mean() < 0.5  # both round twice


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decoded_at_reduced_scale_gives_similar_crop(mode):
    y, x = np.mgrid[:333, :501]
    waves = np.stack([np.sin(x / 17 + y / 29), np.cos(y / 23), np.sin(x / 31)], axis=-1)
    waves = (127 + 100 * waves).astype(np.uint8)
    Image.fromarray(waves).convert(mode).save(file := io.BytesIO(), "JPEG", quality=95)
    reduced = set()
    for draw in np.random.default_rng(0).random((12, 4)):
        decoded, opened = Image.open(file), Image.open(file)
        decoded.load()  # draft() then has no effect
        expected, ours = (random_crop(image, 64, 0.3, draw).float() for image in (decoded, opened))
        reduced.add(decoded.width / opened.width)
        # the box has whole pixels, so crops may differ by 1 pixel of 64; the waves are 107 pixels long
        assert (ours - expected).abs().mean() < 8
    assert max(reduced) > 3  # some were reduced to a quarter


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_cached_images_give_the_same_batches(copied, monkeypatch, suffix):
    """Images of 32 x 24 pixels are cached for size 24, but not for 8, which draft() may decode reduced."""
    store = flame.open_store(copied[0])
    images = images_of(store)
    for file in images.files:
        Image.open(file).save(file.replace(".png", suffix))
    images = images._replace(files=[file.replace(".png", suffix) for file in images.files])
    for size, count in ((24, 24), (8, 0)):
        batches, pixels = [], []
        for cache_bytes in (1 << 28, 0):
            monkeypatch.setattr(data_images, "CACHE_BYTES", cache_bytes)
            s = settings_for(image_size=size, patch_size=8, crop_scale=0.3)
            batches.append(Batches(store, ALL_COLUMNS, images, s))
            pixels.append(torch.stack([batches[-1][step][0][0] for step in range(6)]))
        assert pixels[0].equal(pixels[1]) and [len(one.decoded) for one in batches] == [count, 0]


# --- batches

def test_batches_depend_on_seed_and_step_and_cover_an_epoch(copied):
    store = flame.open_store(copied[0])
    first, other = batches_of(store), batches_of(store, seed=1)
    again = pickle.loads(pickle.dumps(first))  # as a spawned loader process receives it
    halves = [batches_of(store, rank=(rank, 2)) for rank in range(2)]
    for step in (5, 0):
        for a, b, *parts in zip(first[step][0], again[step][0], *(half[step][0] for half in halves)):
            assert a.equal(b) and a.equal(torch.cat(parts))  # two ranks get the halves of one rank's batch
    assert not first[0][0][0].equal(other[0][0][0])
    vectors = store.read_float16(range(24), ALL_COLUMNS)
    seen = []
    for step in range(3):  # 24 images, batch 8: one epoch
        (pixels, facets, columns, readable, kept), failed = first[step]
        assert pixels.shape == (8, 3, 16, 16) and facets.shape == (8, 3, 24) and readable.all() and not failed
        assert all(len(set(row)) == 3 for row in columns.tolist())  # without replacement
        assert kept.shape == (8, 2)  # half of 4 patches
        assert all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in kept.tolist())
        for image, texts, which in zip(pixels.float().mean((2, 3)), facets, columns):
            row, = (n for n in range(24) if vectors[n, which].equal(texts))  # text and image match
            assert (image - torch.tensor(COLORS[copied[1][store.keys[row]]])).abs().max() < 15
            seen.append(row)
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("positives, raw_always, raw, others", [
    (6, False, 6 / 11, 6 / 11), (6, True, 1, 5 / 10), (1, True, 1 / 11, 1 / 11)])
def test_positives_are_drawn_uniformly_and_raw_always_if_set(copied, positives, raw_always, raw, others):
    batches = batches_of(flame.open_store(copied[0]), batch=24, positives=positives, raw_always=raw_always)
    columns = torch.cat([batches[step][0][2] for step in range(50)])  # [1200, P]
    shares = columns.flatten().bincount() / len(columns)
    assert (shares - torch.tensor([raw] + [others] * 10)).abs().max() < 0.06


def test_captions_of_an_image_are_its_positives_and_never_its_negatives(tmp_path):
    """24 images have 1 to 5 rows each, in random order. Vectors name their row and column."""
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.repeat(np.arange(24), rng.integers(1, 6, 24)))
    names = [f"p{image:03d}" for image in image_of]
    assert len(set(names)) < len(names)
    x = rng.normal(size=(len(names), 11, 24))
    store = flame.open_store(write_store(tmp_path / "store", names, x))
    for name in {*names}:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    stored = store.read_float16(range(len(names)), range(11)).numpy()
    images = images_of(store)
    for i, (first, end) in enumerate(zip(images.starts, images.starts[1:])):  # the slow, obvious grouping
        name = os.path.basename(images.files[images.spans[i, 0]]).removesuffix(".png")
        assert images.rows[first:end].tolist() == [n for n, each in enumerate(names) if each == name]
    assert [*dict.fromkeys(names)] == [names[images.rows[first]] for first in images.starts[:-1]]
    s = settings_for(batch=8, positives=4)
    batches = Batches(store, ALL_COLUMNS, images, s)
    seen = set()
    for epoch in range(12):
        shown = []
        for step in range(3 * epoch, 3 * epoch + 3):
            (_, facets, columns, readable, _), _ = batches[step]
            assert readable.all()
            drawn = [[{n for n in range(len(names)) if (stored[n, column] == facet.numpy()).all()}
                      for facet, column in zip(*of_image)] for of_image in zip(facets, columns)]
            rows = [{*chain.from_iterable(of_image)} for of_image in drawn]
            owners = [{image_of[row] for row in of_image} for of_image in rows]
            assert all(len(owner) == 1 for owner in owners)
            assert len({*chain.from_iterable(owners)}) == 8  # no image twice, so no other text is its own
            shown += chain.from_iterable(owners)
            seen |= {*chain.from_iterable(rows)}
        assert sorted(shown) == list(range(24))  # an epoch has each image once
    assert seen == set(range(len(names)))  # all captions count


def test_tars_are_read_nearly_in_order(store, monkeypatch):
    """Each epoch has its own order of tars; an image moves by at most SHUFFLE_BUFFER."""
    monkeypatch.setattr(data_images, "SHUFFLE_BUFFER", 8)
    tar = np.repeat(range(3), (50, 40, 30))
    spans = np.stack([tar, np.arange(120), np.arange(120)], axis=1)
    batches = Batches(store, [0], group_by_image(np.arange(120), ["a", "b", "c"], spans), settings_for())
    for epoch in range(3):
        order = batches.order(epoch)
        assert sorted(order) == list(range(120))
        tars = tar[order]
        assert (tars[1:] != tars[:-1]).sum() <= 2 * 8 * 2  # only where two tars meet
        unshuffled = np.argsort([list(dict.fromkeys(tars)).index(t) for t in tar], kind="stable")
        moved = np.arange(120) - np.argsort(unshuffled)[order]
        assert np.abs(moved).max() <= 8 and len(set(moved)) > 4
    assert not np.array_equal(batches.order(0), batches.order(1))


# --- the text projection

def one_row_each(store):
    n = np.arange(len(store))
    return group_by_image(n, [], np.stack([n, 0 * n, 0 * n], axis=1))


def projected(store, spec, column):
    """Return a column's vectors before and after its fitted projection, float64 numpy [N, D] each."""
    config = projection.text_config(spec, store.meta["D"], flame.FACET_COLUMNS)
    mapped = [flame.FACET_COLUMNS.index(name) for name in config["text_mapped"]]
    text = flame.TextProjection(store.meta["D"], config["text_rank"], mapped)
    projection.fit_text_projection(text, store, spec, ALL_COLUMNS, one_row_each(store))
    u = store.read(range(len(store)), [column])
    return u[:, 0].double().numpy(), text(u, [column])[:, 0].detach().double().numpy()


@pytest.fixture(scope="session")
def long_store(tmp_path_factory):
    """Return a store with four rows per dimension, for which the covariance is not shrunk."""
    return flame.open_store(make_store(tmp_path_factory.mktemp("long") / "store", colors_of(96)))


@pytest.mark.parametrize("rank", [24, 4])
def test_whitening_equals_its_formula(long_store, monkeypatch, rank):
    """Directions beyond `rank` have the same factor."""
    monkeypatch.setattr(projection, "RANK", rank)
    for column in (0, 2, 10):
        u, ours = projected(long_store, "whiten", column)
        _, s, Vt = np.linalg.svd((u - u.mean(0)) / len(u) ** 0.5, full_matrices=False)
        gains = 1 / (s + 0.01 * s[0])
        gains[rank:] = gains[min(rank, 23)]
        np.testing.assert_allclose(ours, normalized((u - u.mean(0)) @ Vt.T * gains @ Vt), atol=2e-4)


def test_covariance_of_few_rows_is_shrunk_as_in_sklearn(store):
    from sklearn.covariance import OAS
    u, ours = projected(store, "whiten", 3)
    variances, vectors = np.linalg.eigh(OAS().fit(u).covariance_)
    s = np.sqrt(variances)
    expected = normalized((u - u.mean(0)) @ (vectors / (s + 0.01 * s[-1])) @ vectors.T)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("column", [0, 2, 10])
def test_agreement_is_regression_on_other_prompt_sets(long_store, column):
    own = flame.FACET_COLUMNS[column].split(".")[0]
    views = {name: projected(long_store, "whiten", c)[1] for c, name in enumerate(flame.FACET_COLUMNS)}
    others = [np.mean([view for name, view in views.items() if name.startswith(f"{other}.")], axis=0)
              for other in {"raw", "short", "long"} - {own}]
    u, ours = projected(long_store, "agree+linear", column)
    x, y = u - u.mean(0), np.mean(others, axis=0)
    covariance = x.T @ x / len(u)
    largest = np.linalg.eigvalsh(covariance)[-1]
    regression = np.linalg.inv(covariance + 0.01 * largest * np.eye(24)) @ (x.T @ y / len(u))
    values, vectors = np.linalg.eigh((regression + regression.T) / 2)
    expected = normalized(x @ vectors * np.maximum(values, 0) @ vectors.T)
    np.testing.assert_allclose(ours, expected, atol=5e-4)


def test_trained_map_is_applied_after_closed_form():
    """Texts are normalize(u + u M), with u of the closed form. M starts at zero; raw has no M."""
    config = projection.text_config("whiten+linear", 24, flame.FACET_COLUMNS)
    assert (config["text_rank"], config["text_mapped"]) == (24, flame.FACET_COLUMNS[1:])
    torch.manual_seed(0)
    mapped, plain = flame.TextProjection(24, 24, ALL_COLUMNS[1:]), flame.TextProjection(24, 24)
    for name, buffer in plain.named_buffers():
        torch.nn.init.normal_(buffer)
        mapped.get_buffer(name).copy_(buffer)
    facets = torch.randn(5, 11, 24)
    torch.testing.assert_close(mapped(facets, ALL_COLUMNS), plain(facets, ALL_COLUMNS))
    (mapped(facets, ALL_COLUMNS) * torch.randn(5, 11, 24)).sum().backward()
    assert mapped.map.grad.flatten(1).norm(dim=1).gt(0).all()
    torch.nn.init.normal_(mapped.map, std=0.3)
    u = plain(facets, ALL_COLUMNS)
    others = F.normalize(u[:, 1:] + torch.einsum("nkd,kde->nke", u[:, 1:], mapped.map), dim=-1)
    torch.testing.assert_close(mapped(facets, ALL_COLUMNS), torch.cat([u[:, :1], others], 1))


# --- whole runs

def test_training_learns_colors_and_its_files_can_be_uploaded(fit, copied, tmp_path):
    store, colors = copied
    done = fit(store.relative_to(tmp_path), "--steps 60 --name colors --lr 3e-3")
    assert done.returncode == 0 and "24 images" in done.stdout, done.stderr
    out = tmp_path / "out/colors"
    log = log_entries(out)
    assert [e["step"] for e in log] == list(range(60)) and log[-1]["loss"] < 0.9 * log[0]["loss"]
    model = flame.load(out)
    assert model.config["llm"]["fingerprint"] == "tiny" and not model.training
    files = [store.parent / f"{key}.png" for key in colors]
    image = model.encode_image(torch.stack([model.preprocess(Image.open(file)) for file in files]))
    text = model.encode_text(flame.open_store(store).read(range(24), range(4, 11)), "long")
    best = flame.similarity(image, text).argmax(1)
    names = list(colors.values())
    assert np.mean([names[n] == names[m] for n, m in enumerate(best.tolist())]) > 0.9
    assert json.loads((out / "local.json").read_text()) == {"llm": "tiny", "store": str(store)}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    files = {"model.safetensors", "config.json", "log.jsonl", "training.pt", "curve.png", "README.md",
             "local.json"}
    assert {path.name for path in out.iterdir()} == files
    curve = np.array(Image.open(out / "curve.png").convert("RGB")).reshape(-1, 3)
    assert ImageColor.getrgb(plots.BLUE) in set(map(tuple, curve.tolist()))
    hub = tmp_path / "hub"  # the files that data/README.md uploads; then load them in an empty environment
    shutil.copytree(out, hub, ignore=shutil.ignore_patterns("training.pt", "local.json"))
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in hub.iterdir())
    code = "import flame; print(flame.load('owner/mine').config['llm']['name'])"
    patch = f"import huggingface_hub as h; h.snapshot_download = lambda *a, **k: {str(hub)!r}\n"
    root = Path(train.__file__).parent
    done = subprocess.run([sys.executable, "-c", patch + code], cwd="/", capture_output=True, text=True,
                          env={"PYTHONPATH": str(root)}, timeout=120)
    assert done.stdout == "tiny\n", done.stderr


def test_validation_finds_best_checkpoint_and_changes_nothing(fit, copied, tmp_path, monkeypatch):
    """A run that is stopped and resumed has the same best checkpoint, and evaluate.py gives its recall."""
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    flags = "--steps 40 --lr 3e-2 --checkpoint-every 7"
    assert fit(copied[0], f"{flags} --name plain").returncode == 0
    flags += f" --val {copied[0]} --val-every 3"
    done = fit(copied[0], f"{flags} --name whole")
    out = tmp_path / "out"
    assert weights(out / "whole") == weights(out / "plain")
    vals = {entry["step"]: entry["val"] for entry in log_entries(out / "whole") if "val" in entry}
    assert [*vals] == [*range(2, 40, 3), 39]
    top = max(vals, key=lambda step: sum(vals[step].values()))
    config = json.loads((out / "whole/best/config.json").read_text())
    assert config["step"] == top + 1 and f"out/whole/best: step {top + 1}, validation R@1 " in done.stdout
    store, model = flame.open_store(copied[0]), flame.load(out / "whole/best")
    images = images_of(store)
    image = model.encode_image(torch.stack([model.preprocess(Image.open(file)) for file in images.files]))
    text = model.encode_text(store.read(images.rows, range(4, 11)), "long").mean(1)
    expected = evaluate.retrieval(text.numpy(), image.numpy(), range(24))
    for direction, recall in vals[top].items():
        assert recall == pytest.approx(expected[direction]["R@1"])
    assert f"{vals[top]['text_to_image']:.1f}% (text to image)" in (out / "whole/best/README.md").read_text()
    with monkeypatch.context() as patch:  # stop after the first validation
        patch.setattr(train, "describe", lambda entry: train.stop_requested.append(True) or "")
        assert fit(copied[0], f"{flags} --name part").returncode == 143
    train.stop_requested.clear()
    assert fit(copied[0], f"{flags} --name part").returncode == 0
    for name in ("model.safetensors", "config.json"):
        assert (out / "part/best" / name).read_bytes() == (out / "whole/best" / name).read_bytes()
    other = make_store(tmp_path / "data" / "other", copied[1], llm="another")
    assert_error(fit(copied[0], f"--val {other} --name other"), "data/other: made with another LLM")
    meta = other / "meta.json"
    meta.write_text(meta.read_text().replace("another", "tiny").replace('"layer": 3', '"layer": 2'))
    assert_error(fit(copied[0], f"--val {other} --name other"), "data/other: made with another LLM")


@pytest.mark.parametrize("loss, bias", [("infonce", 0.0), ("sigmoid", -math.log(63))])
def test_loss_curve_shows_chance(tmp_path, monkeypatch, loss, bias):
    """Chance is the loss if all vectors are equal, for sigmoid with the best bias."""
    figures = []
    monkeypatch.setattr(plots.common, "atomic_save", lambda path, save: figures.append(save.__self__))
    entries = [{"step": 0, "loss": 9.0, "lr": 0.1},
               {"step": 1, "loss": 2.5, "lr": 0.2, "val": {"text_to_image": 30, "image_to_text": 50}}]
    settings = {"loss": loss, "batch": 64, "positives": 3, "images": 5000}
    plots.draw_curve(tmp_path, settings, entries)
    axes, below, *right = figures[0].axes
    chance = train.LOSSES[loss](torch.ones(64, 1), torch.ones(64, 3, 1), 0, bias).item()
    drawn = axes.lines[1].get_ydata()
    assert drawn == pytest.approx([chance] * 2, abs=0.01)
    label, = axes.get_legend().texts
    assert label.get_text() == f"loss if all pairs had the same score: {drawn[0]:.2f}"
    assert axes.get_title() == f"{tmp_path.name}: 5,000 images" and axes.get_ylabel().endswith(" loss: 2.5")
    assert below.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert [axes.lines[0].get_xydata().tolist() for axes in right] == [[[1, 40]]]


@pytest.mark.parametrize("flags", [
    "--loss sigmoid --text-projection whiten+linear --micro-batch 5",
    "--text-projection none --no-pool-first", "--columns long.3,raw.0 --patch-dropout 0 --init pytorch"])
def test_training_with_other_losses_projections_and_columns(fit, copied, tmp_path, flags):
    done = fit(copied[0], f"--steps 30 {flags}")
    assert done.returncode == 0, done.stderr
    log = log_entries(tmp_path / "out/store")
    assert log[-1]["loss"] < log[0]["loss"]
    columns = ["raw.0", "long.3"] if "--columns" in flags else flame.FACET_COLUMNS
    assert flame.load(tmp_path / "out/store").config["columns"] == columns


def test_learning_rate_schedule_and_weight_decay_of_matrices_only(store):
    rates = [train.learning_rate(step, dict(lr=2.0, warmup=4, steps=24)) for step in (0, 1, 2, 3, 14, 24)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.0, 0.0], abs=1e-9)
    s = settings_for(width=32, layers=1, heads=2, projector_hidden=24)
    model, optimizer = train.build(store, ALL_COLUMNS, s, torch.device("cpu"), False)
    shapes = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]]
              for group in optimizer.param_groups}
    decayed, others = shapes[0.5], shapes[0]
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert (5, 32) in decayed  # the position embeddings
    assert all(len(shape) >= 2 for shape in decayed) and all(len(shape) < 2 for shape in others)
    assert others.count(()) == 2  # scale and bias


@pytest.mark.parametrize("limit, preset", [(25, "demo"), (24, "cc3m")])
def test_default_preset_depends_on_number_of_images(dataset, monkeypatch, limit, preset):
    monkeypatch.setattr(train, "SMALL_DATASET", limit)
    args, s = train.parse_arguments(["--embeddings", str(dataset / "store")])
    assert args.preset == preset and s["width"] == {"demo": 192, "cc3m": 768}[preset]


# --- initial weights

def test_new_model_has_default_weights_of_pytorch():
    torch.manual_seed(0)
    model = flame.Flame(TOWER | projection.text_config("none", 24, []))
    expected = torch.nn.MultiheadAttention(32, 2).in_proj_weight  # Xavier uniform
    for block in model.visual.transformer.resblocks:
        weight = block.attn.in_proj_weight
        assert weight.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.01)
        assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    assert all(p.isfinite().all() for p in model.parameters())


# --- interrupting and resuming

def interrupt(command, folder, name, lines, kill):
    """Run a command until its log has this many lines, then kill(pid). Return (the process, pids left)."""
    process = subprocess.Popen([*map(str, command)], cwd=folder, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = folder / "out" / name / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    kill(process.pid)
    out, err = process.communicate(timeout=600)
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout
    return subprocess.CompletedProcess(command, process.returncode, out, err), left


def test_run_resumes_to_same_bytes_after_sigterm_and_sigkill(fit, copied, tmp_path):
    """A cluster sends SIGTERM to loader processes too; these must live until the rank has saved."""
    flags = "--steps 120 --checkpoint-every 20 --micro-batch 7"
    assert fit(copied[0], f"{flags} --name whole").returncode == 0
    command = [sys.executable, train.__file__, "--embeddings", copied[0], *SMALL, *flags.split(),
               *"--name part --workers 1".split()]  # a loader process gives the same batches
    folder = tmp_path / "out" / "part"

    def interrupt_at(lines, number):
        done, left = interrupt(command, tmp_path, "part", lines, lambda pid: os.killpg(pid, number))
        return done, left, torch.load(folder / "training.pt", weights_only=True)["step"]
    done, left, stopped = interrupt_at(30, signal.SIGTERM)
    assert done.returncode == 143 and "run the same command to resume" in done.stdout, done.stderr
    assert stopped == len(log_entries(folder)) < 120 and "Traceback" not in done.stderr and not left
    done, _, saved = interrupt_at(max(50, stopped + 1), signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL and stopped <= saved < 120
    assert saved % 20 == 0 or saved == stopped
    done = fit(copied[0], f"{flags} --name part")
    assert done.returncode == 0 and f"from step {saved}" in done.stdout, done.stderr
    whole = tmp_path / "out/whole"
    ours, theirs = ([(e["step"], e["loss"], e["lr"]) for e in log_entries(out)] for out in (folder, whole))
    assert ours == theirs and weights(folder) == weights(whole)


def test_torchrun_equals_one_process_and_resumes_under_slurm(fit, copied, tmp_path):
    """Run the script of data/README.md after SIGTERM, with fake srun and scontrol and two local nodes."""
    flags = "--steps 40 --workers 1 --name"
    assert fit(copied[0], f"{flags} one").returncode == 0
    ranks = [train.__file__, "--embeddings", copied[0], *SMALL, *flags.split(), "two"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done, _ = interrupt([*launcher, *ranks], tmp_path, "two", 5, lambda pid: os.killpg(pid, signal.SIGTERM))
    assert "run the same command to resume" in done.stdout, done.stderr
    text = (Path(train.__file__).parent / "data/README.md").read_text("utf-8")
    script = text.partition("as `flame.sbatch`:\n\n```bash\n")[2].partition("```")[0]
    for name, lines in {"flame.sbatch": script, "scontrol": "echo localhost",
                        "srun": 'SLURM_NODEID=0 "$@" &\nSLURM_NODEID=1 "$@" || exit 1\nwait $!'}.items():
        (tmp_path / name).write_text(lines)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7",
             "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": str(port)}
    done = subprocess.run(["bash", "flame.sbatch", *ranks], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | slurm)
    assert done.returncode == 0 and "-> out/two, 2 ranks" in done.stdout, done.stderr
    assert "Warning" not in done.stderr and done.stdout.count("24 images x") == 1, done.stderr
    one, two = (log_entries(tmp_path / "out" / name) for name in ("one", "two"))
    assert [e["step"] for e in two] == list(range(40))
    assert [e["loss"] for e in two[:20]] == pytest.approx([e["loss"] for e in one[:20]], rel=0.01)  # bfloat16
    a, b = (dict(flame.load(tmp_path / "out" / n).text_projection.named_buffers()) for n in ("one", "two"))
    assert all(a[name].equal(b[name]) for name in a)  # the closed form, fitted by rank 0


def test_missing_shared_disk_is_reported_on_each_rank(copied, byte_llm, tmp_path):
    """Two folders simulate the disks of two nodes."""
    captions = ["--captions", copied[0] / "captions.tsv", "--no-images"]
    for stage, flags in {"embed.py": [*captions, "--llm", byte_llm],
                         "train.py": ["--embeddings", copied[0], *SMALL]}.items():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        nodes = []
        for rank in "01":
            (tmp_path / rank).mkdir(exist_ok=True)
            command = [sys.executable, Path(train.__file__).with_name(stage), *flags]
            nodes.append(subprocess.Popen(command, cwd=tmp_path / rank, stderr=subprocess.PIPE, text=True,
                                          env=os.environ | group | {"RANK": rank}))
        for node in nodes:
            assert "not visible to every rank" in node.communicate()[1].splitlines()[-1]
            assert node.returncode == 2


def test_finished_run_can_be_trained_longer_but_not_overwritten_by_a_different_one(fit, copied, tmp_path):
    store, colors = copied
    assert fit(store, "--steps 4 --name longer").returncode == 0
    done = fit(store, "--steps 12 --name longer")
    assert done.returncode == 0 and "the cosine of 12 steps" in done.stdout and "from step 4" in done.stdout
    entries = log_entries(tmp_path / "out/longer")
    assert [entry["step"] for entry in entries] == list(range(12))
    assert entries[4]["lr"] > entries[3]["lr"] and all(entry["gradient_norm"] > 0 for entry in entries)
    flags = "--steps 2 --name store"
    assert fit(store, flags).returncode == 0
    folder = tmp_path / "out/store"
    trained = weights(folder)
    assert "already finished" in fit(store, f"{flags} --workers 1 --micro-batch 3").stdout
    assert_error(fit(store, f"{flags} --lr 0.5"), "out/store", "lr 0.001, now it is 0.5", "--overwrite")
    assert_error(fit(store, f"{flags} --steps 1"), "out/store", "steps 2, now it is 1", "--overwrite")
    other = make_store(tmp_path / "data" / "other", colors, llm="another")
    assert_error(fit(other, flags), "out/store", "another store")
    assert weights(folder) == trained
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"step": 1}))
    assert "no steps left" in fit(store, flags).stdout  # as if killed while writing the last checkpoint
    assert json.loads((folder / "config.json").read_text()) == config and weights(folder) == trained
    (folder / "model.safetensors").write_bytes(b"corrupt")
    assert_error(fit(store, flags), "out/store/model.safetensors", "train or download it again")
    assert fit(store, f"{flags} --lr 0.5 --overwrite").returncode == 0
    assert weights(folder) != trained and len(log_entries(folder)) == 2
    for name in ("training.pt", "model.safetensors"):  # not written by train.py
        theirs = tmp_path / "out" / name.split(".")[0]
        theirs.mkdir()
        (theirs / name).write_bytes(b"theirs")
        (theirs / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        assert_error(fit(store, f"{flags} --name {theirs.name}"), name, "not written by train.py")
        assert (theirs / name).read_bytes() == b"theirs"
    for n, other in enumerate(("without-last", "without-first")):  # 23 images each, found by key
        for key in [*colors][n:n + 23]:
            (tmp_path / other / "deeper").mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"data/{key}.png", tmp_path / other / "deeper")
        done = fit(store, f"--steps 1 --name 23 --images {other}")
    assert_error(done, "was trained with images_crc32")


def test_concurrent_run_in_same_folder_is_refused(fit, copied, tmp_path, monkeypatch):
    with common.locked_folder(tmp_path / "out/store"):
        assert_error(fit(copied[0]), "out/store: another process is writing to this folder")
        with monkeypatch.context() as patch:  # the last holder deletes the lock file before we get the lock
            patch.setattr(common.fcntl, "flock", lambda lock, how: os.unlink(lock.name))
            late = common.locked_folder(tmp_path / "out/late")
            pytest.raises(flame.InputError, late.__enter__).match("another process")
    assert fit(copied[0], "--steps 2").returncode == 0  # the lock was released
    with common.atomic_write(tmp_path / "one.json") as temporary:  # two processes write the same file
        temporary.write_text("first")
        monkeypatch.setattr(os, "getpid", os.getppid)
        common.write_text(tmp_path / "one.json", "second")
    assert (tmp_path / "one.json").read_text() == "first"


@pytest.mark.parametrize("environment", [
    "SLURM_NTASKS=8", "WORLD_SIZE=2", "RANK=x WORLD_SIZE=2", "RANK=-1", "RANK=1", "WORLD_SIZE=x",
    "SLURM_NTASKS=x", "RANK=0 WORLD_SIZE=2",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x"])
def test_processes_without_group_are_refused(fit, copied, tmp_path, monkeypatch, capfd, environment):
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    assert_error(fit(copied[0], "--steps 2"), "these processes are not a group", "torchrun")
    assert embed.main(["--captions", "c.tsv"]) == 2 and "torchrun" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_projection_of_single_captions_and_of_rows_without_images(fit, copied, tmp_path):
    """Agreement falls back to whitening, for which only the prompt sets of trained columns count."""
    done = fit(copied[0], "--steps 1 --text-projection agree+linear")
    assert "text projection: whiten" in done.stdout
    config = json.loads((tmp_path / "out/store/config.json").read_text())
    assert config["training"]["text_projection"] == "whiten+linear"
    edit_table(copied[0], ("A thing.\tA thing.\tA", "A thing.\tIt.\tA long"))
    flags = "--steps 1 --text-projection agree --name"
    assert "whiten" not in fit(copied[0], f"{flags} agree").stdout
    assert "whiten instead of agree" in fit(copied[0], f"{flags} one --columns long.0,long.1").stdout
    edit_table(copied[0], ("p022.png", ""), ("p023.png", ""))
    assert fit(copied[0], "--steps 1 --text-projection whiten --name rows").returncode == 0
    units = flame.open_store(copied[0]).read(range(22), ALL_COLUMNS)
    torch.testing.assert_close(flame.load(tmp_path / "out/rows").text_projection.mean, units.mean(0))


def test_agreement_is_with_the_other_captions_of_an_image(long_store):
    """Compare with a loop over captions. Images of one row agree with the row's other prompt sets."""
    counts = [1, 3, 2, 1]
    columns = [0, 4, 5, 6]
    units = long_store.read(range(7), columns)
    text = flame.TextProjection(24, 0)
    means = projection.means_of_others(text, units, columns, torch.tensor(counts))
    views = {"raw": text(units, columns)[:, 0], "long": text(units, columns)[:, 1:].mean(1)}
    owner = np.repeat(range(4), counts)
    for row, name in itertools.product(range(7), views):
        others = [views[each][n] for n in range(7) for each in views if owner[n] == owner[row] and (
            n != row if counts[owner[row]] > 1 else each != name)]
        torch.testing.assert_close(means[name][row], torch.stack(others).mean(0))


def test_agreement_depends_on_trained_columns_only(long_store, tmp_path):
    maps = []
    columns = [1, 2, 5]
    others = [c for c in ALL_COLUMNS if c not in columns]
    x = long_store.read(range(96), ALL_COLUMNS).numpy()
    for name in ("original", "changed"):
        text = flame.TextProjection(24, 24)
        store = flame.open_store(write_store(tmp_path / name, long_store.keys, x))
        projection.fit_text_projection(text, store, "agree", columns, one_row_each(store))
        maps.append(text.state_dict())
        x[:, others] = np.random.default_rng(0).normal(size=(96, 8, 24))
    assert all(maps[0][name].equal(maps[1][name]) for name in maps[0])
    assert maps[0]["mean"][columns].any(1).all() and not maps[0]["mean"][[0, 3]].any()


# --- unreadable images, killed loaders, NaN

def test_unreadable_images_are_skipped_and_counted_once(fit, copied, tmp_path, monkeypatch):
    """A batch without readable images does not update the weights; the run continues to its last step."""
    bad = ["p003", "p004", "p005", "p006", "p007", "p008", "p009"]
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")  # instead of Ghostscript
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for key, damage in zip(bad, ("cut", "script", "pipe", "missing", "uint16", "int32", "float32")):
        path = tmp_path / "data" / f"{key}.png"
        start = path.read_bytes()[:300]
        path.unlink()
        if damage in ("cut", "script"):
            path.write_bytes(start if damage == "cut" else b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n{} loop")
        elif damage == "pipe":
            os.mkfifo(path)
        elif damage != "missing":  # PIL would clip these to white
            wide = Image.fromarray(np.arange(768, dtype=damage).reshape(24, 32) * 80)
            wide.save(path, "PNG" if damage == "uint16" else "TIFF")
    for name, batch, steps in (("store", 12, 6), ("single", 1, 48)):  # three epochs, two
        done = fit(copied[0], f"--batch {batch} --steps {steps} --checkpoint-every 4 --name {name}")
        assert done.returncode == 0 and "skipped 7 unreadable images" in done.stderr, done.stderr
        out = tmp_path / "out" / name
        skipped = dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())
        assert sorted(skipped) == bad and not (tmp_path / "executed").exists()
        for key in bad[-3:]:
            assert "ValueError" in skipped[key]
            with Image.open(tmp_path / "data" / f"{key}.png") as wide, pytest.raises(ValueError):
                flame.load(out).preprocess(wide)  # in evaluation
        assert len(log_entries(out)) == (steps if batch > 1 else 2 * 17)
        adamw = torch.load(out / "training.pt", weights_only=True)["optimizer"]["state"]
        assert adamw[0]["step"] == len(log_entries(out))
        assert json.loads((out / "config.json").read_text())["step"] == steps
    with monkeypatch.context() as patch:  # stop after the first unreadable image, and resume
        patch.setattr(train, "log_skipped", lambda out, failed, listed: train.stop_requested.extend(failed))
        assert fit(copied[0], "--batch 1 --steps 48 --name part").returncode == 143
    train.stop_requested.clear()
    assert fit(copied[0], "--batch 1 --steps 48 --name part").returncode == 0
    assert weights(tmp_path / "out/part") == weights(tmp_path / "out/single")
    for key in copied[1]:
        (tmp_path / "data" / f"{key}.png").unlink(missing_ok=True)
    (tmp_path / "data" / "p000.png").write_text("not an image")
    done = fit(copied[0], "--steps 3 --name bad")
    assert_error(done, "no image of the first batch could be read", "--images")
    assert not (tmp_path / "out/bad").exists()


@pytest.mark.parametrize("damage, message", [("cut", "000000.npy"), ("killed", "lower --workers")])
def test_error_in_loader_ends_run_with_one_line(copied, tmp_path, damage, message):
    """Loaders ignore SIGTERM, with which Python would end them and then wait."""
    def kill_loaders(pid):
        for loader in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(loader), signal.SIGKILL)
    if damage == "cut":
        shard = copied[0] / "000000.npy"
        shard.write_bytes(shard.read_bytes()[:-9])
    flags = "--workers 1 --steps 1000000 --text-projection none".split()
    command = [sys.executable, train.__file__, "--embeddings", copied[0], *SMALL, *flags]
    kill = kill_loaders if damage == "killed" else lambda pid: None
    assert_error(interrupt(command, tmp_path, "store", 1, kill)[0], message)


def test_nan_loss_stops_run_and_keeps_last_checkpoint(fit, copied, tmp_path):
    store = flame.open_store(copied[0])
    x = store.read(range(24), ALL_COLUMNS).numpy()
    x[7] = np.nan
    write_store(copied[0], store.keys, x)
    batches = batches_of(flame.open_store(copied[0]), batch=4)
    at = next(step for step in range(6) if 7 in batches.indices(step))
    done = fit(copied[0], "--batch 4 --steps 9 --text-projection none --checkpoint-every 1")
    assert_error(done, f"the loss is nan at step {at}; the last checkpoint is kept")
    saved = torch.load(tmp_path / "out/store/training.pt", weights_only=True)
    assert saved["step"] == at > 0 and all(x.isfinite().all() for x in saved["model"].values())


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
