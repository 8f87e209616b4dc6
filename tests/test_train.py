"""train.py against slow, obvious twins; and the whole way from pictures to a checkpoint on the command line."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flame
import train

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
    from PIL import Image
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


def test_kinds_per_prompt_set():
    assert train.parse_projection("raw=center,long=whiten:0.1", 0.01) == {"raw": ("center", 0.01), "short": ("none", 0.01), "long": ("whiten", 0.1)}
    for bad in ("sharpen", "row=center", "raw=linear,long=whiten", "raw=whiten:much"):
        with pytest.raises(flame.InputError, match=bad):
            train.parse_projection(bad, 0.01)


# --- batches

def settings_for(**changes):
    return {name: values[0] for name, values in train.SETTINGS.items()} | dict(image_size=16, batch=8, positives=3) | changes


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch(small):
    store = flame.open_store(small[0])
    rows, paths = train.find_images(store, None)
    make = lambda **changes: train.Batches(store, list(range(11)), rows, paths, settings_for(**changes), steps=6)
    first, again, other = make(), make(), make(seed=1)
    for step in (0, 5):
        for a, b in zip(first[step][:3], again[step][:3]):
            assert a.equal(b)
    assert not first[0][0].equal(other[0][0])
    everything = store.read(range(24), range(11))
    seen = []
    for step in range(3):  # 24 images, batch 8: one epoch
        pixels, facets, columns, bad = first[step]
        assert pixels.shape == (8, 3, 16, 16) and facets.shape == (8, 3, 24) and not bad
        for i in range(8):
            assert len(set(columns[i].tolist())) == 3  # without replacement
            row = [n for n in range(24) if all(everything[n, c].equal(facets[i, p]) for p, c in enumerate(columns[i].tolist()))]
            seen += row
    assert sorted(seen) == list(range(24))


def test_columns_of_a_smaller_store_get_their_own_projection(tmp_path):
    pictures = make_pictures(tmp_path / "data")
    store = flame.open_store(make_store(tmp_path / "data/store", pictures, columns=[c for c in flame.COLUMNS if c.startswith("long")]))
    batch = train.Batches(store, train.chosen_columns(store, "long.2,long.6"), *train.find_images(store, None), settings_for(positives=2), 1)[0]
    assert set(batch[2].flatten().tolist()) == {6, 10}  # flame.COLUMNS.index("long.2"), ...
    with pytest.raises(flame.InputError, match="raw.0"):
        train.chosen_columns(store, "raw.0")


def test_random_crop_keeps_its_bounds(small):
    from PIL import Image
    batches = train.Batches(flame.open_store(small[0]), [0], np.arange(2), {}, settings_for(image_size=64, crop_scale=0.9), 1)
    ramp = Image.fromarray(np.stack([np.tile(np.arange(200, dtype=np.uint8), (100, 1))] * 3, axis=-1))
    for draw in np.random.default_rng(0).random((50, 4)):
        columns = np.array(batches.crop(ramp, draw)).mean((0, 2))
        assert columns[0] < columns[-1] and (columns[-1] - columns[0]) * 64 / 63 >= 0.5 * 200 * 0.9  # never flipped, never a small crop


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
    from PIL import Image
    pixels = torch.stack([model.preprocess(Image.open(store.parent / f"{key}.png")) for key in pictures])
    with torch.no_grad():
        text = model.encode_text(flame.open_store(store).read(range(len(pictures)), range(4, 11)), "long")
        best = flame.similarity(model.encode_image(pixels), text).argmax(1)
    colors = list(pictures.values())
    assert np.mean([colors[n] == colors[m] for n, m in enumerate(best.tolist())]) > 0.9
    assert {p.name for p in (tmp_path / "out/colors").iterdir()} == {"model.safetensors", "config.json", "log.jsonl"}


@pytest.mark.parametrize("extra", [("--loss", "sigmoid"), ("--text-projection", "linear"), ("--text-projection", "center"), ("--text-projection", "none", "--pool-first", "no"), ("--columns", "raw.0,long.3")], ids=str)
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


def test_one_bad_picture_is_skipped_and_reported(run, small, tmp_path):
    whole = (tmp_path / "data/p003.png").read_bytes()
    (tmp_path / "data/p003.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "data/p004.png").write_text("not a picture")
    (tmp_path / "data/p005.png").unlink()
    done = run("train.py", "--embeddings", small[0], *SMALL, "--steps", "6")
    assert done.returncode == 0 and "skipped 3 unreadable pictures" in done.stderr and "p004" in done.stderr, done.stderr


def test_bad_input_on_the_command_line(run, refused, small, tmp_path):
    store, pictures = small
    refused(run("train.py"), "data/embeddings", "embed.py")
    refused(run("train.py", "--embeddings", tmp_path / "none"), tmp_path / "none", "not an embedding store")
    refused(run("train.py", "--embeddings", store, "--images", tmp_path / "none", *SMALL), "no picture of this batch", "--images")
    refused(run("train.py", "--embeddings", store, *SMALL, "--text-projection", "sharpen"), "sharpen")
    refused(run("train.py", "--embeddings", store, *SMALL, "--loss", "hinge"), "hinge")
    (tmp_path / "file").write_text("")
    refused(run("train.py", "--embeddings", store, *SMALL, "--name", tmp_path / "file" / "x"), "file")
    keyed = make_store(tmp_path / "other" / "store", pictures, images=False)
    refused(run("train.py", "--embeddings", keyed, *SMALL), "captions", "--images")
    make_pictures(tmp_path / "other" / "pictures", n=1)
    refused(run("train.py", "--embeddings", keyed, *SMALL, "--images", tmp_path / "other" / "pictures"), "1 of the 24 keys")
    (store / "meta.json").rename(store / "journal.json")
    refused(run("train.py", "--embeddings", store), "not finished")
