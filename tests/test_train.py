"""train.py against slow, obvious twins; and the whole way from pictures to a checkpoint on the command line."""
import io
import json
import math
import os
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
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where this file is run by itself: see the ranks' test
import flame
import train
from data.pictures import DRAWS, Batches, crop_box, find_pictures, open_picture, random_crop

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40), "black": (10, 10, 10), "white": (245, 245, 245)}


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
    logit = lambda i, j, p: scale * (image[i] @ text[j, p]).item()
    of_image = np.mean([np.mean([-math.log(math.exp(logit(i, i, p)) / sum(math.exp(logit(i, j, q)) for j in range(5) for q in range(3))) for p in range(3)]) for i in range(5)])
    of_text = np.mean([-math.log(math.exp(logit(j, j, p)) / sum(math.exp(logit(i, j, p)) for i in range(5))) for j in range(5) for p in range(3)])
    assert train.infonce_loss(image, text, scale).item() == pytest.approx((of_image + of_text) / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [train.sigmoid_loss, train.infonce_loss])
def test_losses_fall_where_pairs_agree(loss):
    text = unit(6, 2, 32)
    matched, shuffled = text.mean(1), text.mean(1).roll(1, 0)
    assert loss(F.normalize(matched, dim=-1), text, torch.tensor(10.0), torch.tensor(-5.0)) < loss(F.normalize(shuffled, dim=-1), text, torch.tensor(10.0), torch.tensor(-5.0))


@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
@pytest.mark.parametrize("elements", [1, 1 << 10, 1 << 20])  # of 64, 102 and all 180 texts
def test_blockwise_loss_is_the_dense_one(kind, elements):
    torch.manual_seed(elements)
    leaves = lambda: [x.clone().requires_grad_() for x in tensors]
    tensors = [unit(30, 16), unit(30, 6, 16), torch.tensor(11.0, dtype=torch.float64), torch.tensor(-4.0, dtype=torch.float64)]
    dense, ours = leaves(), leaves()
    expected = {"sigmoid": train.sigmoid_loss, "infonce": train.infonce_loss}[kind](*dense)
    loss = train.BlockwiseLoss.apply(*ours, kind, 0, elements * (10 if elements > 1 else 1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * expected).backward()
    (3 * loss).backward()
    for a, b in zip(ours, dense):
        torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad, rtol=1e-9, atol=1e-13)


# --- a store and pictures to train on

def make_store(folder, pictures, D=24, columns=flame.COLUMNS, seed=0, images=True, llm="tiny"):
    """A store whose vectors tell the colours apart, far off centre as an LLM's states are; pictures: {key: colour}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    meaning = {name: rng.normal(size=(len(columns), D)) for name in COLORS}
    common = 6 * rng.normal(size=(len(columns), D))
    x = np.stack([common + meaning[color] + 0.1 * rng.normal(size=(len(columns), D)) for color in pictures.values()])
    np.save(folder / "embeddings.npy", (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16))
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in pictures))
    (folder / "images.txt").write_text("".join(f"{key}.png\n" if images else "\n" for key in pictures))
    (folder / "meta.json").write_text(json.dumps({"llm": {"name": llm, "fingerprint": "f", "layer": 3, "positions": "restart"}, "N": len(pictures), "D": D, "columns": list(columns),
                                                  "captions": {"path": str(folder.parent / "captions.tsv"), "sha256": ""}}))
    return folder


def make_pictures(folder, n=24, seed=1):
    rng, out = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        name = list(COLORS)[i % len(COLORS)]
        noise = rng.integers(-10, 10, (24, 32, 3))
        Image.fromarray((np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"p{i:03d}.png")
        out[f"p{i:03d}"] = name
    return out


SMALL = ["--preset", "demo", "--image-size", "16", "--patch-size", "8", "--width", "32", "--layers", "1", "--heads", "2", "--batch", "12", "--workers", "0"]


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
    torch.testing.assert_close(projection(u[:, None].float(), [5])[:, 0].double(), expected, atol=2e-4, rtol=0)


def test_shrinkage_is_that_of_sklearn(small):
    from sklearn.covariance import OAS
    store = flame.open_store(small[0])
    projection = train.fit_text_projection(store, "whiten", ridge=0.01, rank=1024, shrinkage=True)
    u = store.read(range(len(store)), [3])[:, 0].double()
    variances, vectors = np.linalg.eigh(OAS().fit(u.numpy()).covariance_)
    s = np.sqrt(variances)
    expected = F.normalize((u - u.mean(0)) @ torch.from_numpy(vectors / (s + 0.01 * s[-1]) @ vectors.T), dim=-1)
    torch.testing.assert_close(projection(u[:, None].float(), [3])[:, 0].double(), expected, atol=2e-4, rtol=0)
    plain = train.fit_text_projection(store, "whiten", ridge=0.01, rank=1024)
    assert (plain(u[:, None].float(), [3])[:, 0].double() - expected).abs().max() > 0.01


def test_kinds_per_prompt_set():
    assert train.parse_projection("raw=center,long=whiten:0.1", 0.01) == {"raw": ("center", 0.01), "short": ("none", 0.01), "long": ("whiten", 0.1)}
    for bad in ("sharpen", "row=center", "raw=linear,long=whiten", "raw=whiten:much"):
        with pytest.raises(flame.InputError, match=bad):
            train.parse_projection(bad, 0.01)


# --- batches

def settings_for(**changes):
    return {name: values[0] for name, values in train.SETTINGS.items()} | dict(image_size=16, batch=8, positives=3) | changes


def texts_of(batch, store):
    """The rows that a batch's facets are those of."""
    everything = store.read(range(len(store)), range(11)).half()
    return [next(n for n in range(len(store)) if all(everything[n, c].equal(x) for c, x in zip(columns.tolist(), facets))) for facets, columns in zip(batch[1], batch[2])]


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch(small):
    store = flame.open_store(small[0])
    make = lambda *rank, **changes: Batches(store, list(range(11)), find_pictures(store), settings_for(**changes), 6, *rank)
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
        assert kept.shape == (8, 2) and all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in kept.tolist())  # half of 4 patches
        rows = texts_of(batch, store)
        for row, picture in zip(rows, pixels.float().mean((2, 3))):  # and text belongs to picture
            assert (picture - torch.tensor(COLORS[small[1][store.keys[row]]])).abs().max() < 15
        seen += rows
    assert sorted(seen) == list(range(24))


def test_columns_of_a_smaller_store_get_their_own_projection(tmp_path):
    pictures = make_pictures(tmp_path / "data")
    store = flame.open_store(make_store(tmp_path / "data/store", pictures, columns=[c for c in flame.COLUMNS if c.startswith("long")]))
    batch, _ = Batches(store, train.chosen_columns(store, "long.2,long.6"), find_pictures(store), settings_for(positives=2), 1)[0]
    assert set(batch[2].flatten().tolist()) == {6, 10}  # flame.COLUMNS.index("long.2"), ...
    with pytest.raises(flame.InputError, match="raw.0"):
        train.chosen_columns(store, "raw.0")


def test_random_crop_keeps_its_bounds():
    ramp = Image.fromarray(np.stack([np.tile(np.arange(200, dtype=np.uint8), (100, 1))] * 3, axis=-1))
    for draw in np.random.default_rng(0).random((50, 4)):
        columns = random_crop(ramp, 64, 0.9, draw).float().mean((0, 1)).tolist()
        assert columns[0] < columns[-1] and (columns[-1] - columns[0]) * 64 / 63 >= 0.5 * 200 * 0.9  # never flipped, never a small crop


def test_random_crop_is_pillows_crop_and_resize():
    rng = np.random.default_rng(1)
    for side, smallest in ((96, 0.9), (40, 0.3), (7, 0.2)):  # from fine to coarse pictures
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((90, 81), Image.Resampling.BICUBIC)
        for draw in rng.random((5, DRAWS)):
            ours = random_crop(image, 64, smallest, draw).permute(1, 2, 0).numpy().astype(int)
            left, top, w, h = crop_box(90, 81, smallest, draw)
            expected = np.array(image.crop((left, top, left + w, top + h)).resize((64, 64), Image.Resampling.BICUBIC), int)
            assert np.abs(ours - expected).max() <= 8 and np.abs(ours - expected).mean() < 0.5  # each rounds twice


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decoded_at_reduced_scale_shows_the_same(mode):
    y, x = np.mgrid[:333, :501]
    waves = np.stack([127 + 100 * np.sin(x / 17 + y / 29), 127 + 100 * np.cos(y / 23), 127 + 100 * np.sin(x / 31)], axis=-1).astype(np.uint8)
    Image.fromarray(waves).convert(mode).save(file := io.BytesIO(), "JPEG", quality=95)
    reduced = set()
    for draw in np.random.default_rng(0).random((12, 4)):
        whole, opened = Image.open(file), Image.open(file)
        whole.load()  # decoded already: draft has nothing left to do
        expected, ours = (random_crop(image, 64, 0.3, draw).float() for image in (whole, opened))
        reduced.add(whole.width / opened.width)
        assert (ours - expected).abs().mean() < 8  # a box of whole pixels: up to one in 64 of a difference, waves of 107 pixels' length
    assert max(reduced) > 3  # it was put to use


# --- tars

def make_tars(folder, pictures, sizes=(9, 8, 7)):
    """The pictures' files in tars as img2dataset writes them: <key>.png, <key>.txt, <key>.json."""
    folder.mkdir()
    rest = list(pictures)
    for n, size in enumerate(sizes):
        with tarfile.open(folder / f"{n:05d}.tar", "w") as tar:
            for key in rest[:size]:
                for suffix, data in (("png", (folder.parent / f"{key}.png").read_bytes()), ("txt", b"a caption"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        rest = rest[size:]
    return folder


def test_tars_hold_the_same_pictures_and_are_read_nearly_in_order(tmp_path):
    pictures = make_pictures(tmp_path / "data", n=120)
    store = flame.open_store(make_store(tmp_path / "data/store", pictures))
    rows, tars, places = found = find_pictures(store, make_tars(tmp_path / "data" / "tars", pictures, (50, 40, 30)), tmp_path / "index.npz")
    assert [len(np.flatnonzero(places[:, 0] == n)) for n in range(3)] == [50, 40, 30]
    for row, place in zip(rows, places):
        assert np.array_equal(open_picture(tars, place), Image.open(tmp_path / "data" / store.images[row]))
    batches = Batches(store, [0], found, settings_for(shuffle=8), 1)
    for epoch in range(3):
        order = batches.order(epoch)
        assert sorted(order) == list(range(120))
        of = places[order, 0]
        assert (of[1:] != of[:-1]).sum() <= 2 * 8 * 2  # tar after tar, but where two meet in the buffer
        line = np.argsort([list(dict.fromkeys(of)).index(t) for t in places[:, 0]], kind="stable")
        moved = np.arange(120) - np.argsort(line)[order]
        assert np.abs(moved).max() <= 8 and len(set(moved)) > 4  # no picture is put off further than the buffer is large
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
    (folder / "00001.tar").write_bytes(whole[:first[2][12, 1:].sum() - 1])  # the end of the fourth of its eight pictures is gone
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
    done = run("train.py", "--embeddings", store, *SMALL, "--steps", "2", "--workers", "2")
    assert done.returncode == 0 and "24 images" in done.stdout, done.stderr


# --- the model's options

def test_left_out_patches_and_gradient_checkpointing(small):
    torch.manual_seed(0)
    vit, pixels = flame.VisionTransformer(32, 8, 24, 2, 2), torch.randn(3, 3, 32, 32)
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    x = vit.conv1(pixels).flatten(2).transpose(1, 2) + vit.positional_embedding[1:]
    x = torch.stack([torch.stack([vit.class_embedding + vit.positional_embedding[0], *(x[n, k] for k in kept[n])]) for n in range(3)])
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

def one_step(store, kind, projection, accumulate, rank=0, world=1, device="cpu"):
    """-> {parameter: its gradient}, and the loss, of a step on 12 of 24 pictures, of which some cannot be read."""
    s = settings_for(batch=12, loss=kind, accumulate=accumulate)
    torch.manual_seed(3)
    config = dict(image_size=16, patch_size=8, width=32, layers=2, heads=2, projector_hidden=40, pool_first=False, text_dim=24, text_linear=projection == "linear")
    text = train.fit_text_projection(store, projection, 0.01, 1024)
    model = flame.Flame(config | {"text_rank": text.basis.shape[-1]})
    model.text = text
    model.to(device)
    batch, _ = Batches(store, list(range(11)), find_pictures(store), s, 1, rank, world)[0]
    encode = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    loss = train.forward_backward(model, encode, batch, s, torch.device(device))
    return {name: p.grad.cpu() for name, p in model.named_parameters()} | {"loss": loss.cpu()}


CASES = [(kind, projection, accumulate) for kind in ("sigmoid", "infonce") for projection in ("linear", "whiten") for accumulate in (1, 3)]


def one_of_two_ranks(folder):
    """What this file does where it is run by itself."""
    flame.default_dtype = lambda device: torch.float32
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save([one_step(flame.open_store(folder / "data" / "store"), *case, rank, 2) for case in CASES], folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_and_chunks_equal_one_big_batch(small, tmp_path, monkeypatch):
    store = flame.open_store(small[0])
    first = [store.keys[n] for n in Batches(store, [0], find_pictures(store), settings_for(batch=12), 1).pictures(0)]
    for key in (first[1], first[2], first[8]):  # two of one rank, one of the other
        (tmp_path / "data" / f"{key}.png").write_text("not a picture")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, __file__, tmp_path], env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
                 for rank in range(2)]
    assert [p.wait(timeout=200) for p in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    for case, ours, theirs in zip(CASES, *ranks):
        expected = one_step(store, case[0], case[1], 1)
        torch.testing.assert_close(one_step(store, *case), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((ours.pop("loss") + theirs.pop("loss")) / 2, expected.pop("loss"), rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            assert ours[name].equal(theirs[name])
            assert (ours[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), (case, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_takes_the_same_step(small, monkeypatch, case):
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    store = flame.open_store(small[0])
    torch.testing.assert_close(one_step(store, *case, device="cuda"), one_step(store, *case), rtol=1e-3, atol=1e-5)


def test_torchrun_learns_the_same(run, small, tmp_path):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "8", "--holdout", "2", "--eval-every", "4"]
    assert run("train.py", *arguments, "--name", "one").returncode == 0
    done = torchrun(tmp_path, 2, *arguments, "--name", "two")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert [e["step"] for e in two] == list(range(8)) and done.stdout.count("22 images") == 1
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=0.01)  # bfloat16
    a, b = (flame.load(tmp_path / "out" / name).text.state_dict() for name in ("one", "two"))
    assert all(a[name].equal(b[name]) for name in a)  # fitted by one rank, the same in all


def torchrun_command(n, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), train.__file__, *map(str, arguments)]


def torchrun(folder, n, *arguments):
    return subprocess.run(torchrun_command(n, *arguments), cwd=folder, capture_output=True, text=True, timeout=300)


def test_more_ranks_than_images(tmp_path):
    store = make_store(tmp_path / "data" / "store", make_pictures(tmp_path / "data", n=2))
    done = torchrun(tmp_path, 3, "--embeddings", store, *SMALL)
    assert done.returncode != 0 and "train.py: torchrun: 3 ranks, but only 2 images" in done.stderr


def test_learning_rate_warms_up_and_falls_to_zero():
    s = dict(lr=2.0, warmup=4, steps=24)
    rates = [train.learning_rate(step, s) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[14] == pytest.approx(1.0) and rates[24] == pytest.approx(0.0, abs=1e-9)


# --- the command line

def test_learns_colours_and_leaves_a_whole_checkpoint(run, small, tmp_path):
    store, pictures = small
    done = run("train.py", "--embeddings", store, *SMALL, "--steps", "150", "--name", "colors", "--text-projection", "center")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out/colors/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == list(range(150)) and log[-1]["loss"] < 0.9 * log[0]["loss"]
    model = flame.load(tmp_path / "out/colors")
    assert model.config["llm"]["fingerprint"] == "f" and not model.training
    pixels = torch.stack([model.preprocess(Image.open(store.parent / f"{key}.png")) for key in pictures])
    with torch.no_grad():
        text = model.encode_text(flame.open_store(store).read(range(len(pictures)), range(4, 11)), "long")
        best = flame.similarity(model.encode_image(pixels), text).argmax(1)
    colors = list(pictures.values())
    assert np.mean([colors[n] == colors[m] for n, m in enumerate(best.tolist())]) > 0.9
    assert {p.name for p in (tmp_path / "out/colors").iterdir()} == {"model.safetensors", "config.json", "log.jsonl", "training.pt", "curve.png"}


@pytest.mark.parametrize("extra", [("--loss", "sigmoid"), ("--text-projection", "linear"), ("--text-projection", "center"), ("--text-projection", "none", "--no-pool-first"), ("--columns", "raw.0,long.3"),
                                   ("--accumulate", "5", "--gradient-checkpointing", "--clip-grad", "0.5", "--ema", "0.5")], ids=str)
def test_every_option_trains(run, small, tmp_path, extra):
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "30", *extra)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out/store/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    flame.load(tmp_path / "out/store")


def test_same_seed_same_weights(run, small, tmp_path):
    for name in ("a", "b"):
        assert run("train.py", "--embeddings", small[0], *SMALL, "--steps", "3", "--name", name).returncode == 0
    assert (tmp_path / "out/a/model.safetensors").read_bytes() == (tmp_path / "out/b/model.safetensors").read_bytes()


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
    assert len(decayed) + len(spared) == len(names) and groups[0]["weight_decay"] == 0.5 and groups[1]["weight_decay"] == 0
    assert (5, 32) in decayed and all(len(shape) >= 2 for shape in decayed)  # the position table is decayed
    assert spared.count(()) == 2 and all(len(shape) < 2 for shape in spared)


def test_pictures_are_found_by_key_in_a_folder(run, tmp_path):
    pictures = make_pictures(tmp_path / "data" / "captions" / "00000")
    store = make_store(tmp_path / "data" / "store", pictures | {"gone": "red"}, images=False)
    done = run("train.py", "--embeddings", store, *SMALL, "--steps", "2")
    assert done.returncode == 0 and "24 images" in done.stdout, done.stderr


def test_unreadable_pictures_are_skipped_and_reported(run, small, tmp_path):
    whole = (tmp_path / "data/p003.png").read_bytes()
    (tmp_path / "data/p003.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "data/p004.png").write_text("not a picture")
    (tmp_path / "data/p005.png").unlink()
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "6")
    assert done.returncode == 0 and "skipped 3 unreadable pictures" in done.stderr and "p004 (UnidentifiedImageError)" in done.stderr, done.stderr
    assert {line.split("\t")[0] for line in (tmp_path / "out/store/skipped.txt").read_text().splitlines()} == {"p003", "p004", "p005"}


# --- interrupted, and gone on with

def losses(folder):
    return [(e["step"], e["loss"], e["lr"]) for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


def interrupt(folder, name, lines, how, arguments):
    """Starts a run, waits until its log has so many lines, sends the signal; -> the process."""
    process = subprocess.Popen([sys.executable, train.__file__, *map(str, arguments), "--name", name], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "out" / name / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    process.send_signal(how)
    return process, *process.communicate(timeout=100)


def test_a_run_that_was_killed_or_stopped_goes_on_as_if_nothing_had_been(run, small, tmp_path):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "300", "--checkpoint-every", "40", "--ema", "0.9", "--clip-grad", "1"]
    assert run("train.py", *arguments, "--name", "whole").returncode == 0
    whole = losses(tmp_path / "out/whole")
    for name, how, lines in (("killed", signal.SIGKILL, 110), ("stopped", signal.SIGTERM, 50)):
        process, out, err = interrupt(tmp_path, name, lines, how, [*arguments, "--workers", "1"])  # nor does a loader process change anything
        folder = tmp_path / "out" / name
        saved = torch.load(folder / "training.pt", weights_only=True)["step"]
        assert saved < 300
        if how == signal.SIGTERM:
            assert process.returncode == 0 and "the same command goes on" in out, err
            assert saved == len(losses(folder))
        else:
            assert process.returncode == -signal.SIGKILL and saved % 40 == 0 and torch.load(folder / "training-previous.pt", weights_only=True)["step"] == saved - 40
            (folder / "training.pt").write_bytes(b"cut short")  # then the one before serves
        done = run("train.py", *arguments, "--name", name)
        assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
        assert losses(folder) == whole
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "out/whole/model.safetensors").read_bytes()


def interrupted_group(process, log, lines):
    """Waits for so many lines in the log, then tells the whole process group to end, as a cluster does; -> what it printed."""
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    return process.communicate(timeout=100)


def test_sigterm_to_the_whole_group_saves_and_leaves(run, small, tmp_path):
    """Loader processes too: they must not die before the rank has saved."""
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "60", "--workers", "1", "--name"]
    assert run("train.py", *arguments, "whole").returncode == 0
    command = [sys.executable, train.__file__, *map(str, arguments), "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    out, err = interrupted_group(process, tmp_path / "out/stopped/log.jsonl", 10)
    assert process.returncode == 0 and "the same command goes on" in out and "Traceback" not in err, err
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout == b""  # no loader is left behind
    done = run("train.py", *arguments, "stopped")
    assert "going on from step" in done.stdout and losses(tmp_path / "out/stopped") == losses(tmp_path / "out/whole"), done.stderr
    assert (tmp_path / "out/stopped/model.safetensors").read_bytes() == (tmp_path / "out/whole/model.safetensors").read_bytes()


def test_sigterm_to_torchruns_group_saves_and_leaves(small, tmp_path):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "40", "--workers", "1", "--name"]
    assert torchrun(tmp_path, 2, *arguments, "whole").returncode == 0
    process = subprocess.Popen(torchrun_command(2, *arguments, "stopped"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    out, err = interrupted_group(process, tmp_path / "out/stopped/log.jsonl", 10)
    assert "the same command goes on" in out, err
    done = torchrun(tmp_path, 2, *arguments, "stopped")
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
    assert losses(tmp_path / "out/stopped") == losses(tmp_path / "out/whole")
    assert (tmp_path / "out/stopped/model.safetensors").read_bytes() == (tmp_path / "out/whole/model.safetensors").read_bytes()


def test_running_average_is_saved_in_the_weights_place(run, small, tmp_path):
    assert run("train.py", "--embeddings", small[0], *SMALL, "--steps", "2", "--checkpoint-every", "1", "--ema", "0.6", "--name", "a").returncode == 0
    before, after = (torch.load(tmp_path / "out/a" / name, weights_only=True) for name in ("training-previous.pt", "training.pt"))
    for name, p in flame.load(tmp_path / "out/a").named_parameters():
        torch.testing.assert_close(p.data, before["average"][name] + (1 - 2 / 11) * (after["model"][name] - before["average"][name]))
        assert p.equal(after["average"][name])


def test_a_finished_or_another_run_is_not_overwritten(run, refused, small, tmp_path):
    store, pictures = small
    arguments = ["--embeddings", store, *SMALL, "--steps", "2"]
    assert run("train.py", *arguments).returncode == 0
    weights = (tmp_path / "out/store/model.safetensors").read_bytes()
    again = run("train.py", *arguments, "--workers", "1")
    assert again.returncode == 0 and "finished already" in again.stdout
    refused(run("train.py", *arguments, "--lr", "0.5"), "out/store", "lr 0.001, now it is 0.5", "--overwrite")
    wider = make_store(tmp_path / "data" / "wider", pictures, D=32)
    refused(run("train.py", *arguments, "--embeddings", wider, "--name", "store"), "out/store", "width 24", "32")
    other = make_store(tmp_path / "data" / "other", pictures, llm="another")
    refused(run("train.py", *arguments, "--embeddings", other, "--name", "store"), "out/store", "another store")
    assert (tmp_path / "out/store/model.safetensors").read_bytes() == weights
    assert run("train.py", *arguments, "--lr", "0.5", "--overwrite").returncode == 0
    assert (tmp_path / "out/store/model.safetensors").read_bytes() != weights and len(losses(tmp_path / "out/store")) == 2
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
    done = run("train.py", "--embeddings", small[0], *SMALL, "--batch", "4", "--steps", "9", "--text-projection", "none", "--checkpoint-every", "1")
    refused(done, f"at step {at}", store.keys[batches.pictures(at)[0]], "nan-batch.txt")
    assert at > 0 and "p007" in (tmp_path / "out/store/nan-batch.txt").read_text().split()
    saved = torch.load(tmp_path / "out/store/training.pt", weights_only=True)
    assert saved["step"] == at and all(x.isfinite().all() for x in saved["model"].values())


# --- the curve

def test_held_out_recall_is_that_of_evaluate(small):
    import evaluate
    store = flame.open_store(small[0])
    torch.manual_seed(0)
    model = flame.Flame(dict(image_size=16, patch_size=8, width=32, layers=1, heads=2, projector_hidden=40, pool_first=True, text_dim=24, text_rank=0, text_linear=False))
    rows, files, places = find_pictures(store)
    ours, failed = train.held_out_recall(model, store, list(range(11)), rows, files, places, "cpu")
    with torch.no_grad():
        image = model.encode_image(torch.stack([model.preprocess(Image.open(file)) for file in files])).numpy()
    text = store.read(rows, range(4, 11)).mean(1).numpy()
    assert ours == pytest.approx(evaluate.retrieval(text, image, np.arange(24))["text_to_image"]["R@1"])


def test_held_out_pictures_are_not_trained_on(run, small, tmp_path):
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "5", "--holdout", "2", "--eval-every", "2")
    assert done.returncode == 0 and "22 images" in done.stdout, done.stderr
    seen = [e["step"] for e in map(json.loads, (tmp_path / "out/store/log.jsonl").read_text().splitlines()) if "held_out_R@1" in e]
    assert seen == [1, 3, 4]
    curve = np.array(Image.open(tmp_path / "out/store/curve.png").convert("RGB")).reshape(-1, 3)
    assert {(37, 99, 235), (220, 38, 38)} <= set(map(tuple, curve.tolist()))  # both lines are there


def test_tensorboard_is_optional(run, refused, small, tmp_path):
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "2", "--tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return refused(done, "--tensorboard", "pip install tensorboard")
    assert done.returncode == 0 and any((tmp_path / "out/store/tensorboard").iterdir()), done.stderr


def test_bad_input_on_the_command_line(run, refused, small, tmp_path):
    store, pictures = small
    refused(run("train.py"), "data/embeddings", "embed.py")
    refused(run("train.py", "--embeddings", tmp_path / "none"), tmp_path / "none", "not an embedding store")
    refused(run("train.py", "--embeddings", store, "--images", tmp_path / "none", *SMALL), tmp_path / "none/p000.png", "captions.tsv", "--images")
    refused(run("train.py", "--embeddings", store, *SMALL, "--text-projection", "sharpen"), "sharpen")
    refused(run("train.py", "--embeddings", store, *SMALL, "--loss", "hinge"), "hinge")
    (tmp_path / "file").write_text("")
    refused(run("train.py", "--embeddings", store, *SMALL, "--name", tmp_path / "file" / "x"), "file")
    keyed = make_store(tmp_path / "other" / "store", pictures, images=False)
    refused(run("train.py", "--embeddings", keyed, *SMALL), "captions", "--images")
    make_pictures(tmp_path / "other" / "pictures", n=1)
    refused(run("train.py", "--embeddings", keyed, *SMALL, "--images", tmp_path / "other" / "pictures"), "1 of the 24 keys")
    refused(run("train.py", "--embeddings", store, *SMALL, "--device", "cuda:99"), "cuda:99")
    (store / "meta.json").rename(store / "journal.json")
    refused(run("train.py", "--embeddings", store), "not finished")


# --- settings: all looked at together, before anything is read or made

REFUSED = [
    "--lr nan", "--lr -1", "--lr inf", "--lr much", "--beta2 2", "--beta2 -0.1", "--weight-decay nan", "--heads 0", "--heads 5", "--heads -1",
    "--width 0", "--width -24", "--width 1.5", "--layers 0", "--layers 100000000", "--patch-size 0", "--patch-size -8", "--patch-size 64",
    "--image-size 0", "--image-size 65", "--projector-hidden -1", "--positives 0", "--positives 12", "--batch 0", "--batch -3", "--accumulate -1",
    "--epochs inf", "--epochs nan", "--epochs -1", "--steps -1", "--steps 1e3", "--warmup -1", "--clip-grad nan", "--ema 1", "--init-scale 0",
    "--init-scale nan", "--crop-scale 0", "--crop-scale 1.1", "--patch-dropout nan", "--patch-dropout -0.5", "--holdout -1", "--eval-every -1",
    "--checkpoint-every -1", "--shuffle -1", "--cache nan", "--workers -1", "--seed -1", "--seed 1.0", "--loss hinge", "--init random",
    "--text-projection sharpen", "--text-projection whiten:nan", "--text-projection raw=whiten:0", "--pool-first=y", "--compile=on", "--preset cc12m",
    "--device foo", "--device mps", "--device cuda:99", "--no-such-flag 1"]


def tree(folder):
    """All that lies in a folder: paths, and contents of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_wrong_setting_is_one_line_and_leaves_nothing_behind(run, small, tmp_path, flags):
    before = tree(tmp_path)
    done = run("train.py", "--embeddings", small[0], *SMALL, *flags.split())
    assert done.returncode == 2, done.stderr
    name = flags.split()[0].split("=")[0]
    assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1 and name in done.stderr, done.stderr
    assert tree(tmp_path) == before


def test_what_the_data_refuse_leaves_nothing_behind_either(run, refused, small, tmp_path, monkeypatch):
    before = tree(tmp_path)
    for flags, *names in (("--holdout 13", "--holdout 13", "24 images"), ("--columns raw.0,raw.0", "raw.0"), ("--columns raw.1", "raw.1")):
        done = run("train.py", "--embeddings", small[0], *SMALL, *flags.split())
        refused(done, *names)
        assert done.stderr.count("\n") == 1 and tree(tmp_path) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused(run("train.py", "--embeddings", small[0], *SMALL, "--device", "cuda"), "--device cuda:1")  # and does not wait for the other rank
    assert tree(tmp_path) == before


def test_flags_that_are_on_or_off(run, small, tmp_path):
    assert run("train.py", "--embeddings", small[0], *SMALL, "--steps", "1", "--no-pool-first", "--shrinkage").returncode == 0
    was = json.loads((tmp_path / "out/store/config.json").read_text())["training"]
    assert (was["pool_first"], was["shrinkage"], was["compile"]) == (False, True, False)


# --- the published recipe

def test_published_initial_weights_are_those_of_torch():
    """The released code makes nn.MultiheadAttention and nn.Linear and leaves them as they are; CLIP's shrink with depth."""
    torch.manual_seed(0)
    width = 768
    theirs = torch.nn.MultiheadAttention(width, 12).state_dict() | {f"mlp.{k}": v for k, v in torch.nn.Linear(width, 4 * width).state_dict().items()}
    ours = flame.VisionTransformer(32, 16, width, 2, 12, "published").transformer.resblocks[1]
    pairs = [(ours.attn.in_proj_weight, theirs["in_proj_weight"]), (ours.attn.in_proj_bias, theirs["in_proj_bias"]), (ours.attn.out_proj.weight, theirs["out_proj.weight"]),
             (ours.attn.out_proj.bias, theirs["out_proj.bias"]), (ours.mlp.c_fc.weight, theirs["mlp.weight"]), (ours.mlp.c_fc.bias, theirs["mlp.bias"])]
    for a, b in pairs:
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05) and a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.05)
    block = flame.VisionTransformer(32, 16, width, 2, 12, "clip").transformer.resblocks[1]
    assert block.attn.out_proj.weight.std().item() == pytest.approx(width ** -0.5 / 2, rel=0.05)
    published = {name: dict(zip(train.PRESETS, row)) for name, row in train.SETTINGS.items()}
    assert {published["init"][name] for name in ("cc3m", "yfcc15m")} == {"published"} and published["init"]["demo"] == "clip"
    assert published["holdout"]["cc3m"] == published["holdout"]["yfcc15m"] == 0  # 948 steps an epoch: all images


def test_the_checkpoint_says_which_columns_it_was_trained_on(run, small, tmp_path):
    assert run("train.py", "--embeddings", small[0], *SMALL, "--steps", "1", "--columns", "long.3, raw.0").returncode == 0
    assert flame.load(tmp_path / "out/store").config["columns"] == ["long.3", "raw.0"]
    assert run("train.py", "--embeddings", small[0], *SMALL, "--steps", "1", "--name", "all").returncode == 0
    assert flame.load(tmp_path / "out/all").config["columns"] == flame.COLUMNS
    record = json.loads((tmp_path / "out/all/config.json").read_text())
    del record["model"]["columns"]
    record["store"]["columns"] = flame.COLUMNS[:4]
    (tmp_path / "out/all/config.json").write_text(json.dumps(record))
    assert flame.load(tmp_path / "out/all").config["columns"] == flame.COLUMNS[:4]  # all of the store's, where it does not say


# --- memory

@pytest.mark.parametrize("options", [{}, {"pool_first": True, "patch_dropout": 0.5}, {"half": False}, {"width": 32, "heads": 4, "layers": 6}], ids=str)
def test_memory_of_a_picture_is_what_autograd_keeps(monkeypatch, options):
    options = dict(options)
    half, dropout = options.pop("half", True), options.pop("patch_dropout", 0.0)
    config = dict(image_size=32, patch_size=4, width=96, layers=3, heads=3, projector_hidden=300, pool_first=False, text_dim=160, text_rank=0, text_linear=False) | options
    model, kept = flame.Flame(config), {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters and x.numel() > 8 * 100:
            kept[x.untyped_storage().data_ptr(), x.dtype] = x
        return x

    patches = torch.stack([torch.randperm(64)[:32] for _ in range(8)]) if dropout else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.encode_image(torch.randn(8, 3, 32, 32), patches)
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}  # their copies in bfloat16 are no picture's
    counted = sum(x.untyped_storage().nbytes() for x in kept.values() if x.shape not in weights) / 8
    cpu = torch.device("cpu")
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.bfloat16 if half else torch.float32)
    assert train.bytes_per_image(config, cpu, dropout) == pytest.approx(counted, rel=0.1)
    assert train.bytes_per_image(config, cpu, dropout, gradient_checkpointing=True) < 0.8 * counted


def test_chunks_are_chosen_by_the_memory_and_change_no_gradient(run, small, tmp_path, monkeypatch):
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "4", "--name"]
    assert run("train.py", *arguments, "whole").returncode == 0
    monkeypatch.setattr(train, "main_memory", lambda: 1 << 19)
    assert run("train.py", *arguments, "chunks").returncode == 0
    monkeypatch.undo()
    chosen = [json.loads((tmp_path / "out" / name / "config.json").read_text())["training"]["accumulate"] for name in ("whole", "chunks")]
    assert chosen[0] == 1 and 1 < chosen[1] <= 12
    a, b = (losses(tmp_path / "out" / name) for name in ("whole", "chunks"))
    assert [loss for _, loss, _ in a] == pytest.approx([loss for _, loss, _ in b], rel=1e-3)


def test_the_presets_step_fits_one_gpu(monkeypatch):
    """Batch 3,072 of ViT-B/16 in one chunk is some hundreds of GB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("H100", (), {"total_memory": 80e9}))
    s = {name: row[1] for name, row in train.SETTINGS.items()}
    config = {name: s[name] for name in ("image_size", "patch_size", "width", "layers", "heads", "pool_first")} | {"projector_hidden": 5120, "text_dim": 5120}
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.bfloat16)
    assert 3072 * train.bytes_per_image(config, torch.device("cuda")) > 200e9
    model = torch.nn.Linear(10_000, 11_500, device="meta")  # as many parameters
    model.config = config
    assert 4 <= train.chunks_that_fit(model, s, 1, torch.device("cuda")) <= 8
    assert train.chunks_that_fit(model, s, 8, torch.device("cuda")) == 1


def test_out_of_memory_says_what_to_change(run, refused, small, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 252.00 GiB.\nand so on")
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "4"]
    monkeypatch.setattr(flame.Flame, "encode_image", full)
    for flags, cure in (([], "--accumulate 2"), (["--accumulate", "8"], "--accumulate 12"), (["--accumulate", "12"], "--gradient-checkpointing"),
                        (["--accumulate", "12", "--gradient-checkpointing"], "--batch below 12")):
        refused(run("train.py", *arguments, *flags), "out of memory", cure)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(flame.Flame, "encode_image", lambda *_: torch.empty(1 << 60))  # what the CPU says
    refused(run("train.py", *arguments), "out of memory on cpu at --batch 12 --accumulate 1", "--accumulate 2")


# --- what is said and drawn

def test_the_screen_tells_what_is_used(run, small, tmp_path):
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "4", "--holdout", "3", "--eval-every", "2")
    assert done.stdout.count("3 held-out pictures: Recall@1 ") == 2 and "bias" not in done.stderr
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "2", "--loss", "sigmoid", "--name", "sigmoid")
    assert "bias -10.0" in done.stderr and "Recall" not in done.stdout


def test_held_out_pictures_that_cannot_be_read(run, small, tmp_path):
    """They are skipped like others; where none can be read, the curve has no such point, and training goes on."""
    held = np.random.default_rng([0, 3]).permutation(24)[:3]
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "4", "--holdout", "3", "--eval-every", "2"]
    for n, name in enumerate(("some", "none")):
        for key in held[:1] if n == 0 else held:
            (tmp_path / "data" / f"p{key:03d}.png").write_text("not a picture")
        done = run("train.py", *arguments, "--name", name)
        assert done.returncode == 0 and f"skipped {(1, 3)[n]} unreadable" in done.stderr, done.stderr
        entries = [json.loads(line) for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()]
        assert ["held_out_R@1" in entry for entry in entries] == ([False] * 4 if n else [False, True] * 2)
    assert "3 held-out pictures: none can be read" in done.stdout


def test_a_picture_is_skipped_once_however_often_it_is_met(run, small, tmp_path):
    (tmp_path / "data/p003.png").write_text("not a picture")
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "12")  # six epochs
    assert (tmp_path / "out/store/skipped.txt").read_text() == "p003\tUnidentifiedImageError\n" and "skipped 1 unreadable picture," in done.stderr


def test_without_pictures_the_paths_are_told_and_nothing_is_left(run, refused, small, tmp_path):
    (tmp_path / "none").mkdir()
    done = run("train.py", "--embeddings", small[0], *SMALL, "--images", tmp_path / "none")
    store = flame.open_store(small[0])
    first = Batches(store, [0], find_pictures(store), settings_for(batch=12), 1).pictures(0)[0]
    refused(done, tmp_path / "none" / f"{store.keys[first]}.png", "FileNotFoundError", f"{store.meta['captions']['path']} names it {store.images[first]}", "--images")
    assert not (tmp_path / "out").exists()


def test_the_curve_has_ticks_and_is_not_missed(run, small, tmp_path, monkeypatch):
    from data.show import plots
    figures = []
    monkeypatch.setattr(plots.files, "write", lambda path, save: figures.append(save.__self__))
    entries = [{"step": n, "loss": 5 - n / 20} | ({"held_out_R@1": n} if n % 10 == 9 else {}) for n in range(60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    plots.draw_curve(tmp_path)
    figures[0].canvas.draw()
    loss, recall = figures[0].axes
    for axis in (loss.xaxis, loss.yaxis, recall.yaxis):
        assert len([tick for tick in axis.get_ticklabels() if tick.get_text()]) >= 4
    assert {tick.get_text() for tick in loss.xaxis.get_ticklabels()} >= {"0", "20", "40"}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "4", "--holdout", "2", "--eval-every", "1")
    assert done.returncode == 0 and done.stderr.count("matplotlib") == 1 and not (tmp_path / "out/store/curve.png").exists(), done.stderr


# --- what others wrote

def resumable(run, store, folder):
    """-> the arguments of a run of four steps, of which one more is done."""
    arguments = ["--embeddings", store, *SMALL, "--steps", "4", "--checkpoint-every", "2"]
    train.STOP.append(True)
    try:
        assert run("train.py", *arguments).returncode == 0
    finally:
        train.STOP.clear()
    return arguments


def changed(record, *path):
    """record with what lies at a path of keys replaced by, or where that is None without, the last of path."""
    *keys, last, value = path
    inner = record
    for key in keys:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return record


CONFIGS = [("model", None), ("model", []), ("training", None), ("training", "x"), ("store", None), ("store", 3), ("step", None), ("step", "2"), ("step", 1.5),
           ("model", "text_dim", None), ("model", "text_dim", "24"), ("store", "identity", None), ("store", "identity", [1]), ("training", "lr", None),
           ("training", "lr", "0.001"), ("training", "accumulate", None), ("training", "accumulate", "all")]


@pytest.mark.parametrize("what", [*CONFIGS, b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=lambda what: str(what)[:40])
def test_another_config_is_one_line(run, small, tmp_path, what):
    arguments = resumable(run, small[0], tmp_path)
    path = tmp_path / "out/store/config.json"
    path.write_bytes(what if isinstance(what, bytes) else json.dumps(changed(json.loads(path.read_text()), *what)).encode())
    before = tree(tmp_path)
    done = run("train.py", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "out/store" in done.stderr and "--overwrite" in done.stderr, done.stderr
    assert tree(tmp_path) == before


TRAININGS = [("step", None), ("step", "2"), ("step", 0), ("step", -1), ("step", 5), ("step", 10**30), ("model", None), ("model", {}), ("model", "logit_bias", None),
             ("model", "logit_bias", torch.zeros(3)), ("model", "logit_bias", "x"), ("optimizer", None), ("optimizer", []), ("optimizer", "state", {}),
             ("optimizer", "state", 0, "exp_avg", torch.zeros(2)), ("optimizer", "state", 0, "exp_avg", None), ("optimizer", "state", 0, "step", "x"),
             ("average", 3)]


@pytest.mark.parametrize("what", [*TRAININGS, b"", b"not a checkpoint", [1], torch.zeros(3)], ids=lambda what: str(what)[:40])
def test_another_training_state_is_one_line(run, small, tmp_path, what):
    arguments = resumable(run, small[0], tmp_path)
    path = tmp_path / "out/store/training.pt"
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(changed(torch.load(path), *what) if isinstance(what, tuple) else what, path)
    before = tree(tmp_path)
    done = run("train.py", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "training.pt" in done.stderr and "--overwrite" in done.stderr, done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"step": 1}', '{"loss": 3.0}', '{"step": 0, "loss": "x"}', '{"step": 0, "loss": null}', '{"step": "0", "loss": 1}'])
def test_another_log_is_one_line(run, small, tmp_path, line):
    arguments = resumable(run, small[0], tmp_path)
    path = tmp_path / "out/store/log.jsonl"
    path.write_text(line + "\n" + path.read_text())
    before = tree(tmp_path)
    done = run("train.py", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "log.jsonl:1:" in done.stderr, done.stderr
    assert tree(tmp_path) == before
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]) + '{"st')  # a last line that was cut short is no matter
    assert run("train.py", *arguments).returncode == 0 and len(losses(path.parent)) == 4


def test_a_log_that_was_thrown_away_is_not_missed(run, small, tmp_path):
    arguments = resumable(run, small[0], tmp_path)
    folder = tmp_path / "out/store"
    (folder / "log.jsonl").unlink()
    resumable(run, small[0], tmp_path)
    assert [step for step, *_ in losses(folder)] == [1] and torch.load(folder / "training-previous.pt")["step"] == 1
    assert run("train.py", *arguments).returncode == 0 and [step for step, *_ in losses(folder)] == [1, 2, 3]


LOADED = [("model", None), ("model", 3), ("llm", None), ("llm", []), ("llm", "layer", "3"), ("llm", "fingerprint", 7), ("llm", "positions", "backwards"),
          ("store", []), ("model", "heads", None), ("model", "heads", "2"), ("model", "heads", 0), ("model", "heads", 5), ("model", "width", 48), ("model", "width", "32"),
          ("model", "layers", 10**12), ("model", "layers", 2), ("model", "image_size", 24), ("model", "pool_first", "no"), ("model", "text_dim", None),
          ("model", "text_rank", 3), ("model", "text_linear", True), ("model", "columns", "long.0"), ("model", "columns", ["long.9"]), ("model", "columns", []),
          ("model", "columns", [{}])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    store = make_store(folder / "data" / "store", make_pictures(folder / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--embeddings", str(store), *SMALL, "--steps", "1"]) == 0
    return folder / "out" / "store"


@pytest.mark.parametrize("what", LOADED, ids=str)
def test_load_refuses_what_is_no_config(checkpoint, tmp_path, what):
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    record = changed(json.loads((checkpoint / "config.json").read_text()), *what)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(flame.InputError, match=str(tmp_path)) as error:
        flame.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["empty", "cut", "noise", "pipe", "missing", "others"])
def test_load_refuses_what_is_no_model(checkpoint, tmp_path, how):
    from safetensors.torch import save_file
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
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "3")
    assert done.returncode == 0 and (tmp_path / "precious").read_text() == "precious", done.stderr
    assert not (tmp_path / "out/store/log.jsonl").is_symlink() and len(losses(tmp_path / "out/store")) == 3


# --- a full disk

def disk_of(folder, kilobytes):
    """Mounts a file system of that size where that is permitted; -> whether."""
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True).returncode == 0


def test_a_full_disk_is_one_line_and_the_run_goes_on_where_it_was(run, small, tmp_path):
    """Filled so that it ends in turn in each of the files that a run writes. Where no file system may be mounted, files may grow
    no larger than so much."""
    arguments = ["--embeddings", small[0], *SMALL, "--steps", "3", "--checkpoint-every", "1", "--name"]
    assert run("train.py", *arguments, "whole").returncode == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out/whole").iterdir()}
    mounted = disk_of(tmp_path / "disk", 4096)
    (tmp_path / "out" / "small").symlink_to(tmp_path / "disk")
    refusals = set()
    try:
        for room in [1, *range(sizes["training.pt"] // 2, 3 * sizes["training.pt"] + sizes["model.safetensors"], 150_000)]:
            for path in (tmp_path / "disk").iterdir():
                path.unlink()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if mounted:
                free = os.statvfs(tmp_path / "disk").f_bavail * os.statvfs(tmp_path / "disk").f_frsize
                (tmp_path / "disk" / "filler").write_bytes(bytes(max(0, free - room)))
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                done = run("train.py", *arguments, "small")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            (tmp_path / "disk" / "filler").unlink(missing_ok=True)
            said = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
            if done.returncode:
                assert done.returncode == 2 and "Traceback" not in done.stderr and said.startswith("train.py: out/small"), done.stderr
                refusals.add(said.split(":")[1].split("/")[-1])
                done = run("train.py", *arguments, "small")
            assert done.returncode == 0, done.stderr
            assert losses(tmp_path / "disk") == losses(tmp_path / "out/whole")
            assert (tmp_path / "disk/model.safetensors").read_bytes() == (tmp_path / "out/whole/model.safetensors").read_bytes()
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert {"log.jsonl", "training.pt"} <= refusals


if __name__ == "__main__":
    one_of_two_ranks(Path(sys.argv[1]))
