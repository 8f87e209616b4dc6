"""Tests of evaluate.py and data/encoders.py: scores equal slow references and clip_benchmark, intervals a
bootstrap written as a loop (test_refusals.py tests bad settings).
"""
# ruff: noqa: F811  (tests have an argument with the name of the imported fixture)
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import accuracy
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score

import evaluate
import flame
from data import common, compat, encoders
from data.images import open_image
from embed import scan_table
from test_benchmarks import (
    FINISHED, NAMES, TREES, ColorEncoder, ColorModel, error_line, score, tree_demo, tree_urban1k,  # noqa: F401
    tree_xm3600, write_image, write_text)

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


# ---------------------------------------------------------------- metrics

def reference_rank(scores, correct):
    """Return the rank of the best correct item by Python's sort, wrong items first among equal scores."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], correct[i]))
    return next((rank for rank, i in enumerate(order) if correct[i]), len(scores))


def reference_retrieval(scores, owner):
    """Return what evaluate.retrieval() should return for scores [texts][images]; owner: each text's image."""
    images = len(scores[0])
    ranks = {"text_to_image": [reference_rank(row, [owner[t] == i for i in range(images)])
                               for t, row in enumerate(scores)],
             "image_to_text": [reference_rank([row[i] for row in scores], [own == i for own in owner])
                               for i in sorted(set(owner))]}
    return {direction: {f"R@{k}": pytest.approx(100 * np.mean([r < k for r in rank])) for k in RECALL_AT}
            for direction, rank in ranks.items()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), texts=st.integers(1, 40), images=st.integers(1, 25),
       dim=st.integers(1, 4))
def test_retrieval_equals_reference_with_ties(seed, texts, images, dim):
    rng = np.random.default_rng(seed)
    text, image = (rng.integers(-2, 3, (n, dim)) for n in (texts, images))  # exact, with many ties
    owner = rng.integers(0, images, texts).tolist()
    assert evaluate.retrieval(text, image, owner) == reference_retrieval((text @ image.T).tolist(), owner)


def accuracies(image, classes, labels, names=None):
    """Return what score_classes returns, in percent. Without names, all class names differ."""
    hits = evaluate.classification_hits(image, classes, labels, list(names or range(len(classes))))
    return {name: 100 * shares.mean() for name, shares in hits.items()}


def test_retrieval_equals_clip_benchmark():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((60, 16)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(60), 5))
    text = (image[owner] + 2.5 * rng.standard_normal((300, 16))).astype(np.float32)
    got = evaluate.retrieval(text, image, owner)
    scores, pairs = torch.from_numpy(text @ image.T), torch.from_numpy(owner[:, None] == np.arange(60))
    for k in RECALL_AT:
        for direction, theirs in (("text_to_image", recall_at_k(scores, pairs, k)),
                                  ("image_to_text", recall_at_k(scores.T, pairs.T, k))):
            recall = 100 * (theirs > 0).float().mean().item()
            assert got[direction][f"R@{k}"] == pytest.approx(recall, abs=1e-4)
    assert 10 < got["text_to_image"]["R@1"] < 90    # not trivial


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 40), classes=st.integers(1, 12))
def test_classification_equals_reference_with_ties(seed, images, classes):
    rng = np.random.default_rng(seed)
    image, names = rng.integers(-2, 3, (images, 3)), rng.integers(-2, 3, (classes, 3))
    labels = rng.integers(0, classes, images)
    scores = image @ names.T
    ranks = np.array([reference_rank(row, labels[i] == np.arange(classes)) for i, row in enumerate(scores)])
    per_class = np.mean([np.mean(ranks[labels == c] < 1) for c in set(labels)])
    shares = {"top1": np.mean(ranks < 1), "top5": np.mean(ranks < 5), "mean_per_class": per_class}
    assert accuracies(image, names, labels) == pytest.approx(
        {name: 100 * share for name, share in shares.items()})


def test_classes_with_the_same_name_are_scored_as_by_clip_benchmark():
    """Classes with the same name have the same embedding. The first one is predicted, as with argmax."""
    rng = np.random.default_rng(9)
    classes = rng.standard_normal((40, 16)).astype(np.float32)
    names = [f"class {c}" for c in range(40)]
    labels = np.repeat(np.arange(40), 25)
    for shared in ((), ((3, 30), (8, 9), (8, 21))):     # none; a pair and a triple
        for first, second in shared:
            classes[second], names[second] = classes[first], names[first]
        image = (classes[labels] + 1.5 * rng.standard_normal((1000, 16))).astype(np.float32)
        got = accuracies(image, classes, labels, names)
        logits = torch.from_numpy(image @ classes.T)
        predicted = logits.argmax(1).numpy()
        assert got["top1"] == pytest.approx(100 * np.mean(predicted == labels)) and 20 < got["top1"] < 90
        assert got["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
        # topk returns ties in any order, so its top 5 may differ if the fifth and the sixth are equal
        _, top5 = accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
        assert got["top5"] == pytest.approx(100 * top5, abs=0.5 if shared else 1e-6)
    # Without the names, equal embeddings are ordinary ties, which count against the model.
    assert accuracies(image, classes, labels)["top1"] < got["top1"] - 1


@pytest.mark.parametrize("images, per_image", [(2, 1), (37, 1), (101, 3), (500, 5)])
def test_constant_model_scores_at_most_chance(images, per_image):
    # The value is not exact in binary, so all products are rounded. They must still be ties.
    vector = np.full(576, 576 ** -0.5, np.float32)
    text, image = np.tile(vector, (images * per_image, 1)), np.tile(vector, (images, 1))
    owner = np.repeat(np.arange(images), per_image)
    got = evaluate.retrieval(text, image, owner)
    for k in RECALL_AT:
        assert got["text_to_image"][f"R@{k}"] <= 100 * min(1, k / images)
        assert got["image_to_text"][f"R@{k}"] <= 100 * min(1, k / images)
    for names in (None, [c // 2 for c in range(images)]):
        got = accuracies(text, image, owner, names)
        assert got["top1"] <= 100 / images and got["mean_per_class"] <= 100 / images
        assert got["top5"] <= 100 * min(1, 5 / images)


def test_chunks_give_the_same_recall_without_the_full_matrix(monkeypatch):
    rng = np.random.default_rng(3)
    text, image = (rng.integers(-9, 10, (n, 8)).astype(np.float32) for n in (3000, 2000))
    owner = rng.integers(0, 2000, 3000)
    whole = evaluate.retrieval(text, image, owner)
    monkeypatch.setattr(evaluate, "MAX_SIMILARITIES", 50_000)
    tracemalloc.start()
    assert evaluate.retrieval(text, image, owner) == whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 2000       # bytes, less than a full matrix of booleans


def test_nan_and_infinite_embeddings_are_refused():
    good = np.eye(3, dtype=np.float32)
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 2] = value
        for metric in (evaluate.retrieval, accuracies):
            for embeddings in ((bad, good), (good, bad)):
                with pytest.raises(flame.InputError, match="embeddings are NaN or infinite"):
                    metric(*embeddings, np.arange(3))


# ---------------------------------------------------------------- intervals

def interval(hits, groups=None):
    """Return (mean, low, high) of hits [N]. groups: what is resampled; by default each hit is a group."""
    groups = np.unique(np.arange(len(hits)) if groups is None else groups, return_inverse=True)[1]
    samples = evaluate.bootstrap(np.asarray(hits)[:, None], groups, groups.max() + 1)
    return samples[0, 0], *evaluate.interval(samples)[0]


def test_bootstrap_equals_a_loop():
    rng = np.random.default_rng(5)
    groups, hits = rng.integers(0, 30, 200), rng.random((200, 3)) < 0.3
    draws, means = np.random.default_rng(evaluate.SEED), []
    for _ in range(evaluate.RESAMPLES):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(30, size=30)])
        means.append(100 * hits[rows].mean(0))
    got = evaluate.bootstrap(hits, groups, 30)
    assert got[0] == pytest.approx(100 * hits.mean(0)) and got[1:] == pytest.approx(np.array(means))
    assert np.array(evaluate.interval(got)) == pytest.approx(np.percentile(means, [2.5, 97.5], axis=0).T)
    # The same groups get the same resamples.
    assert got + evaluate.bootstrap(~hits, groups, 30) == pytest.approx(np.full((1001, 3), 100))


def test_compare_gives_the_paired_difference_of_the_same_queries(score, tmp_path, monkeypatch, capsys):
    """Five texts. One run is wrong about red, the other about none, so they differ in one text."""
    def write_captions(count):
        rows = []
        for n in range(count):
            write_image(tmp_path / f"photos/{n}.png", NAMES[n % 5])
            rows.append(f"photos/{n}.png\ta {NAMES[n % 5]} wall, number {n}\n")
        write_text(tmp_path / "mine.tsv", "image\tlong\n" + "".join(rows))

    def run(out):
        flags = "--captions", "mine.tsv", "--images", tmp_path, "--out", out
        return score("mine", *flags)[0]

    write_captions(5)
    assert run("a") == 0
    monkeypatch.setattr(ColorEncoder, "mistakes", {"red": "green"})
    shutil.rmtree(tmp_path / "a/cache")     # has the texts without the mistake
    shutil.copytree(tmp_path / "photos", tmp_path / "it's/photos")
    shutil.copy(tmp_path / "mine.tsv", tmp_path / "it's")
    assert score("mine", "--captions", "it's/mine.tsv", "--out", "b")[0] == 0      # folders may differ
    capsys.readouterr()
    assert score("", "--compare", "a/mine.json", "b/mine.json")[0] == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("text_to_image"))
    numbers = line.replace("[", "").replace("]", "").replace(",", "").split()[1:]
    paired = interval(np.arange(5) < 1)     # one text of five differs
    assert [float(x) for x in numbers] == pytest.approx([100, 100, 100, *interval(np.arange(5) > 0), *paired],
                                                        abs=0.05)
    with np.load("b/mine.npz") as saved:    # the hits of each query within the first 1, 5, 10
        assert saved["hits of text_to_image"].tolist() == [[n > 0, True, True] for n in range(5)]
    write_captions(4)
    assert run("b") == 0
    capsys.readouterr()
    assert score("", "--compare", "a/mine.json", "b/mine.json")[0] == 2
    assert "a/mine.json and b/mine.json: their queries differ" in error_line(capsys)
    write_text(tmp_path / "b/mine.npz", "corrupt")
    assert score("", "--compare", "a/mine.json", "b/mine.json")[0] == 2 and "mine.npz" in error_line(capsys)
    TREES["imagefolder"](tmp_path / "walls")
    for out in ("a", "b"):      # the second run cannot read one of the images
        assert score("imagefolder", "--data-root", "walls", "--out", out)[0] == 0
        write_text(tmp_path / "walls/red/1.png", "corrupt")
    capsys.readouterr()
    assert score("", "--compare", "a/imagefolder.json", "b/imagefolder.json")[0] == 2
    assert "their queries differ" in error_line(capsys)


# ---------------------------------------------------------------- cache

@pytest.fixture
def encoded(monkeypatch):
    """encoded() -> the numbers of (texts, images) that were encoded since the last call"""
    counts = [0, 0]

    def with_count(i, method):
        def counted(self, batch, *more):
            counts[i] += len(batch)
            return method(self, batch, *more)
        return counted

    def since_last_call():
        numbers = tuple(counts)
        counts[:] = 0, 0
        return numbers
    monkeypatch.setattr(ColorEncoder, "encode_batches", with_count(0, ColorEncoder.encode_batches))
    monkeypatch.setattr(ColorModel, "encode_image", with_count(1, ColorModel.encode_image))
    return since_last_call


def test_cache_depends_on_model_llm_prompts_texts_and_images(score, encoded, tmp_path, monkeypatch):
    root = tmp_path / "data/urban1k"
    tree_urban1k(root)

    def new(*more):
        assert score("urban1k", *more)[0] == 0
        return encoded()

    assert new() == (5, 5) and new() == (0, 0)
    assert new("--prompts", "raw") == (5, 0)
    write_text(root / "caption/1.txt", "A blue car.")
    write_image(root / "image/2.jpg", "white")
    assert new() == (5, 5)
    monkeypatch.setattr(ColorModel, "state_dict", lambda self: {"visual.x": torch.ones(1)})
    assert new() == (0, 5)
    monkeypatch.setattr(flame, "llm_fingerprint", lambda folder: "g")
    llm = ColorModel.config["llm"] | {"fingerprint": "g"}
    monkeypatch.setattr(ColorModel, "config", ColorModel.config | {"llm": llm})
    assert new() == (5, 5)      # another LLM, and so another checkpoint
    monkeypatch.setitem(flame.PROMPTS, "long", flame.PROMPTS["long"]._replace(prefix="A {}"))
    assert new() == (5, 0) and new() == (0, 0)


def test_corrupt_cache_file_is_computed_again(score, encoded, tmp_path):
    tree_urban1k(tmp_path / "data/urban1k")
    first = score("urban1k")[1]
    encoded()
    for damage in (lambda path: path.write_bytes(b"not an array, and longer than its header" * 9),
                   lambda path: path.write_bytes(path.read_bytes()[:-1]),
                   lambda path: np.save(path, np.load(path)[:-1]),
                   lambda path: np.save(path, np.load(path) * np.nan)):
        for path in (tmp_path / "results/cache").iterdir():
            damage(path)
        assert score("urban1k") == (0, first) and encoded() == (5, 5)


# ---------------------------------------------------------------- scorers, with the model that knows colors

def test_all_parts_of_the_demo(score, tmp_path, monkeypatch, capsys):
    tree_demo(tmp_path / "data/demo")
    monkeypatch.setattr(ColorEncoder, "mistakes", {"vert": "blue", "yellow": "white"})
    code, result = score("demo")
    parts = result["parts"]
    assert code == 0 and result["columns"] == flame.FACET_COLUMNS
    assert list(parts) == "long short raw reworded seen unseen multilingual synonyms".split()
    assert result["text_to_image"] == parts["long"]["text_to_image"] and result["n_images"] == 5
    assert [parts[p]["prompts"] for p in parts] == ["long", "short", "raw", "raw short long"] + ["raw"] * 4
    for part in ("long", "short", "raw", "reworded"):
        assert parts[part]["text_to_image"]["R@1"] == 80            # yellow finds the white image
    assert (parts["seen"]["n_images"], parts["seen"]["n_classes"], parts["seen"]["top1"]) == (6, 3, 100)
    # The name "yellow" is embedded as white, so both names have the same embedding. Ties are wrong.
    assert [parts["unseen"][name] for name in ("n_images", "n_classes", "chance", "top1")] == [4, 2, 50, 0]
    french = parts["multilingual"]      # without English
    assert french["top1"] == pytest.approx(100 / 3)     # vert means blue: green is wrong, blue is a tie
    assert french["ci95"]["top1"] == [0, 100]       # over 3 objects; over their 6 images it would be narrower
    assert [parts["synonyms"][name] for name in ("n_images", "n_classes", "top1", "top5")] == [6, 3, 100, 100]
    out = capsys.readouterr().out
    assert "unseen: images 4, chance 50.0, classes 2\n" in out
    monkeypatch.setattr(evaluate, "GALLERY", 1)     # each unseen object is a gallery
    monkeypatch.setattr(evaluate, "DEMO_TEMPLATE", "a white {}")    # all names are white: ties
    result = score("demo", "--split", "val")[1]
    assert result["split"] == "val" and result["parts"]["unseen"]["chance"] == 100
    assert [result["parts"][part]["top1"] for part in ("seen", "synonyms", "multilingual")] == [0, 0, 0]


def test_only_trained_facets_are_used(score, tmp_path, monkeypatch, capsys):
    tree_urban1k(tmp_path / "data/urban1k")
    tree_xm3600(tmp_path / "data/xm3600")
    columns = ["long.0", "long.3"]

    def encode_text(self, facets, prompts):
        facets[:, [k for k in range(facets.shape[1]) if f"{prompts}.{k}" not in columns]] = torch.nan
        return torch.nn.functional.normalize(facets, dim=-1)
    monkeypatch.setattr(ColorModel, "encode_text", encode_text)
    monkeypatch.setattr(ColorModel, "config", ColorModel.config | {"columns": columns})
    code, result = score("urban1k")
    assert code == 0 and result["columns"] == ["long.0", "long.3"] and result["text_to_image"]["R@1"] == 100
    capsys.readouterr()
    assert score("xm3600") == (2, None)
    assert "not on the raw prompts; give --prompts long" in error_line(capsys)
    assert score("xm3600", "--prompts", "long")[1]["text_to_image"]["R@1"] == 100


# ---------------------------------------------------------------- --captions

def test_own_captions(score, tmp_path, monkeypatch, capsys):
    """Several captions per image, rows without an image, training captions; the title of the sheet."""
    titles = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda examples, title, path: titles.append(title))
    rows = []
    for name in NAMES:
        write_image(tmp_path / f"mine/{name}.png", name)
        rows += [f"{name}.png\ta {name} wall\n", f"{name}.png\tall {name}\n"]
    write_text(tmp_path / "ours.tsv", "image\traw\n" + "".join(rows) + "\tred\ngone.png\ta red one\n")
    trained = "1\t\ta red wall\tx\ty\n2\t\tx\tall red\ty\n"
    write_text(tmp_path / "store/captions.tsv", f"key\timage\traw\tshort\tlong\n{trained}")
    captions = {"path": "", "sha256": ""}
    write_text(tmp_path / "store/meta.json", json.dumps({
        **scan_table(tmp_path / "store/captions.tsv", 2), "D": 1, "shard_size": 2, "captions": captions,
        "llm": {"prompts": flame.prompts_to_json()}}))
    common.write_array(tmp_path / "store/000000.npy", np.ones((2, 11, 1), np.float16))
    content_hash = flame.content_hash(flame.open_store(tmp_path / "store"))
    store = {"name": "store", "content_hash": content_hash}
    write_text(tmp_path / "out/run/config.json", json.dumps(FINISHED | {"store": store}))
    write_text(tmp_path / "out/run/local.json", json.dumps({"store": str(tmp_path / "store")}))
    code, result = score("ours", "--captions", "ours.tsv", "--images", "mine")
    out, err = capsys.readouterr()
    assert code == 0 and result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
    assert (result["n_images"], result["n_texts"], result["skipped_images"]) == (5, 10, 2)
    assert "2 of 7 images cannot be read (no image for 000000010, mine/gone.png ...)" in err
    assert titles == [f"{out.splitlines()[-4]}; out/run"] and titles[0].startswith(
        "ours: images 5, skipped images 2, chance 20.0, texts 10, skipped texts 2, texts in training 2")
    assert result["texts_in_training"] == 2
    store["content_hash"] = "before"
    write_text(tmp_path / "out/run/config.json", json.dumps(FINISHED | {"store": store}))
    assert score("ours", "--captions", "ours.tsv", "--images", "mine")[1]["texts_in_training"] is None


# ---------------------------------------------------------------- real encoders

@pytest.fixture(scope="module")
def real(byte_llm, tmp_path_factory):
    """Return a folder with a random checkpoint out/tiny for the LLM byte_llm."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "text_dim": 32,
              "projector_hidden": 24, "pool_first": True, "text_rank": 0, "columns": flame.FACET_COLUMNS}
    llm = {"name": "tiny", "path": str(byte_llm), "fingerprint": flame.llm_fingerprint(byte_llm), "layer": 2,
           "mask": "decoupled", "prompts": flame.prompts_to_json()}
    model = flame.Flame(config | {"llm": llm})
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mean = model.text_projection.mean   # a different one for each column
    mean.copy_(0.1 * torch.randn_like(mean))
    (folder / "out/tiny").mkdir(parents=True)
    save_file(model.state_dict(), folder / "out/tiny/model.safetensors")
    write_text(folder / "out/tiny/config.json", json.dumps({"model": config, "llm": llm}))
    return folder


def test_weights_by_train_py_are_refused_as_a_released_checkpoint(real, byte_llm, tmp_path, capsys):
    """Ignoring their text projection would change the scores."""
    tree_urban1k(tmp_path / "urban1k")
    flags = "--data-root", tmp_path / "urban1k", "--llm", byte_llm, "--out", tmp_path, "--device", "cpu"
    weights = real / "out/tiny/model.safetensors"
    assert evaluate.main(["--bench", "urban1k", "--checkpoint", str(weights), *map(str, flags)]) == 2
    assert "give a released .pt checkpoint, or a folder that train.py wrote" in error_line(capsys)


@pytest.mark.parametrize("bench", ["urban1k", "xm3600", "food101", "imagefolder"])
def test_main_equals_one_image_and_one_text_at_a_time(bench, real, byte_llm, tmp_path, monkeypatch):
    """Recall and accuracy equal flame.similarity of one pair at a time, sorted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    TREES[bench](tmp_path / bench)
    flags = ["--llm", byte_llm, "--checkpoint", real / "out/tiny", "--device", "cpu"]
    assert evaluate.main(["--bench", bench, "--data-root", bench, *map(str, flags)]) == 0
    result = json.loads((tmp_path / f"results/{bench}.json").read_text())
    model = flame.load(real / "out/tiny")
    encoder = flame.TextEncoder(byte_llm, "cpu", torch.float32, layer=2)
    locations, *data = evaluate.benchmarks.read(bench, Path(bench), max_captions=1)
    with torch.inference_mode():
        images = [model.encode_image(model.preprocess(open_image(each))[None]) for each in locations]

        def facets(text):
            return model.encode_text(encoder.encode([text], result["prompts"]), result["prompts"])

        if "top1" not in result:
            for language, (texts, owner) in data[0].items():
                scores = [[flame.similarity(image, facets(text)).item() for image in images]
                          for text in texts]
                got = result["languages"][language] if language else result
                assert {name: got[name] for name in DIRECTIONS} == reference_retrieval(scores, owner)
            return
        labels, names, templates = data

        def unit(vector):
            return torch.nn.functional.normalize(vector, dim=-1)

        texts = [[unit(facets(template.replace("{}", name)).mean(1)) for template in templates]
                 for name in names]
        classes = [unit(torch.stack(vectors).mean(0)) for vectors in texts]
        ranks = np.array([reference_rank([(image @ c.T).item() for c in classes], np.arange(5) == label)
                          for image, label in zip(images, labels)])
    assert result["top1"] == pytest.approx(100 * np.mean(ranks < 1))
    assert result["mean_per_class"] == pytest.approx(
        100 * np.mean([np.mean(ranks[np.array(labels) == c] < 1) for c in range(5)]))


@pytest.mark.parametrize("prompts", ["long", "raw"])
def test_dot_product_with_encode_texts_is_the_mean_cosine_over_facets(real, byte_llm, tmp_path, prompts):
    model = flame.load(real / "out/tiny")
    encoder = flame.TextEncoder(byte_llm, "cpu", torch.float32, layer=2, max_tokens=400)   # several rows
    ours = encoders.Encoders(model, lambda: encoder, "cpu", tmp_path, "image key", "text key")
    texts = ["a", "A much longer text about nothing, that goes on for a while.", "b b", "a"]
    image = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    got = evaluate.encode_texts(ours, texts, prompts)
    assert encoders.encode_facets(ours, texts, prompts).mean(1) == pytest.approx(got, abs=1e-6)
    both = evaluate.encode_texts(ours, texts, f"{prompts} short")   # the mean over all facets of both sets
    facets = [encoders.encode_facets(ours, texts, name) for name in (prompts, "short")]
    assert both == pytest.approx(np.concatenate(facets, axis=1).mean(1), abs=1e-6)
    with torch.inference_mode():
        states = torch.cat([encoder.encode([text], prompts) for text in texts])
        expected = flame.similarity(image, model.encode_text(states, prompts))
    # packed with others and as float16, a text differs by rounding
    assert image.numpy() @ got.T == pytest.approx(expected.numpy(), abs=1e-3)
    released = evaluate.encode_texts(ours._replace(model=compat.ReleasedFlame(model.config)), texts, prompts)
    assert released == pytest.approx(torch.nn.functional.normalize(states.mean(1), dim=-1).numpy(), abs=1e-3)


def test_released_checkpoint_is_scored_as_by_the_released_code(byte_llm, tmp_path, monkeypatch):
    """Its text path and pooling are used by default; compared with one image and one text at a time."""
    config = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "heads": 1, "text_dim": 32,
              "projector_hidden": 24, "pool_first": False, "text_rank": 0, "columns": flame.FACET_COLUMNS}
    torch.manual_seed(0)
    weights = flame.Flame(config | {"llm": {}}).state_dict()
    weights = {f"module.{name}": torch.randn_like(tensor) / 5 for name, tensor in weights.items()
               if not name.startswith("text_projection.")}
    torch.save({"state_dict": weights}, tmp_path / "epoch_32.pt")
    tree_urban1k(tmp_path / "data")
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    flags = ["--data-root", tmp_path / "data", "--checkpoint", tmp_path / "epoch_32.pt", "--llm", byte_llm]
    assert evaluate.main(["--bench", "urban1k", "--out", str(tmp_path / "out"), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "out/urban1k.json").read_text())
    model = compat.load_released(tmp_path / "epoch_32.pt")
    encoder = compat.text_encoder(byte_llm, dtype=torch.float32, mask="released")
    with torch.inference_mode():
        pixels = [model.preprocess(Image.open(tmp_path / f"data/image/{i}.jpg")) for i in range(1, 6)]
        image = torch.cat([model.encode_image(one[None]) for one in pixels])
        text = torch.cat([encoder.encode([f"A {name} street."], "long").mean(1) for name in NAMES])
    scores = torch.nn.functional.normalize(text, dim=-1) @ image.T
    expected = reference_retrieval(scores.tolist(), range(5))
    assert {name: result[name] for name in DIRECTIONS} == expected


@pytest.mark.parametrize("fingerprint, hidden_size", [("x", 32), (None, 64)])   # None: a released checkpoint
def test_another_llm_is_refused(fingerprint, hidden_size, real, byte_llm, tmp_path, capsys):
    tree_urban1k(tmp_path / "data")
    for folder, source in (("run", real / "out/tiny"), ("llm", byte_llm)):
        shutil.copytree(source, tmp_path / folder)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["llm"]["fingerprint"] = fingerprint
    write_text(tmp_path / "run/config.json", json.dumps(config))
    config = json.loads((tmp_path / "llm/config.json").read_text())
    write_text(tmp_path / "llm/config.json", json.dumps(config | {"hidden_size": hidden_size}))
    folders = zip(("--data-root", "--out", "--checkpoint", "--llm"), ("data", "out", "run", "llm"))
    flags = [word for flag, folder in folders for word in (flag, str(tmp_path / folder))]
    assert evaluate.main(["--bench", "urban1k", *flags]) == 2
    assert "with another LLM (tiny)" in error_line(capsys)


def test_open_clip_model_is_scored_as_by_open_clip(small_clip, tmp_path, monkeypatch, capsys):
    """Compared with open_clip's encode_image and encode_text, one image and one text at a time."""
    import open_clip
    name, _, weights = small_clip.partition(":")
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    tree_urban1k(tmp_path / "data")
    flags = ["--bench", "urban1k", "--data-root", tmp_path / "data", "--out", tmp_path / "out"]
    flags += ["--device", "cpu", "--open-clip", small_clip]
    assert evaluate.main([*map(str, flags)]) == 0
    result = json.loads((tmp_path / "out/urban1k-tests-small-small.json").read_text())
    model.eval()
    tokens = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        image = torch.cat([model.encode_image(preprocess(Image.open(tmp_path / f"data/image/{i}.jpg"))[None])
                           for i in range(1, 6)])
        text = torch.cat([model.encode_text(tokens([f"A {name} street."])) for name in NAMES])
        unit = torch.nn.functional.normalize
        assert result["text_to_image"] == reference_retrieval((unit(text) @ unit(image).T).tolist(),
                                                              range(5))["text_to_image"]
    capsys.readouterr()
    assert evaluate.main([*map(str, flags[:-1]), "no-such-model"]) == 2
    assert "--open-clip no-such-model" in capsys.readouterr().err
    with pytest.raises(flame.InputError, match="weights .* could not be loaded.*MODEL:WEIGHTS"):
        compat.OpenClip("ViT-B-32")


# ---------------------------------------------------------------- the command line

def test_closed_stdout_is_not_an_error():
    """The reader of a pipe may close it, as in `evaluate.py ... | head`."""
    code = ("import sys; from data.common import run_stage; "
            "sys.exit(run_stage('', lambda: print('\\ud83e' * 10**6), ''))")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(evaluate.__file__).parent}
    with subprocess.Popen([sys.executable, "-c", code], **pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
