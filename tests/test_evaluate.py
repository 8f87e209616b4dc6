"""evaluate.py: metrics against slow twins and CLIP_benchmark; cache, ablation, report and search through the command line.
test_benchmarks.py has the readers, the small trees and the models that this file borrows.

    pytest tests/test_evaluate.py
"""
import json
import os
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

import evaluate
import flame
from data import cache
from test_benchmarks import (COLOURS, K, NAMES, ROOT, ColourModel, ColourWords, colours, picture, put, real, slow_rank, tree_coco, tree_demo, tree_docci,  # noqa: F401
                             tree_imagefolder, tree_urban1k, tree_xm3600)


# ---------------------------------------------------------------- metrics

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), texts=st.integers(1, 40), images=st.integers(1, 25), dim=st.integers(1, 4))
def test_retrieval_equals_slow_twin_with_ties(seed, texts, images, dim):
    rng = np.random.default_rng(seed)
    text, image = (rng.integers(-2, 3, (n, dim)) for n in (texts, images))     # small integers: exact products, many ties
    owner = rng.integers(0, images, texts)
    got = evaluate.retrieval(text, image, owner)
    scores = (text @ image.T).tolist()
    forth = [slow_rank(scores[t], [owner[t] == i for i in range(images)]) for t in range(texts)]
    back = [slow_rank([scores[t][i] for t in range(texts)], [owner[t] == i for t in range(texts)]) for i in sorted(set(owner))]
    assert got == {"text_to_image": {f"R@{k}": pytest.approx(100 * np.mean([r < k for r in forth])) for k in K},
                   "image_to_text": {f"R@{k}": pytest.approx(100 * np.mean([r < k for r in back])) for k in K}}


def test_retrieval_equals_clip_benchmark():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((60, 16)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(60), 5))
    text = (image[owner] + 2.5 * rng.standard_normal((300, 16))).astype(np.float32)     # neither hopeless nor perfect
    got = evaluate.retrieval(text, image, owner)
    scores, pairs = torch.from_numpy(text @ image.T), torch.from_numpy(owner[:, None] == np.arange(60))
    for k in K:
        forth, back = recall_at_k(scores, pairs, k), recall_at_k(scores.T, pairs.T, k)
        assert got["text_to_image"][f"R@{k}"] == pytest.approx(100 * (forth > 0).float().mean().item(), abs=1e-4)   # percent: 1e-6 of a share
        assert got["image_to_text"][f"R@{k}"] == pytest.approx(100 * (back > 0).float().mean().item(), abs=1e-4)   # percent: 1e-6 of a share
    assert 10 < got["text_to_image"]["R@1"] < 90


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 40), classes=st.integers(1, 12))
def test_classification_equals_slow_twin_with_ties(seed, images, classes):
    rng = np.random.default_rng(seed)
    image, names, labels = rng.integers(-2, 3, (images, 3)), rng.integers(-2, 3, (classes, 3)), rng.integers(0, classes, images)
    scores = image @ names.T
    ranks = np.array([slow_rank(scores[i], [labels[i] == c for c in range(classes)]) for i in range(images)])
    assert evaluate.classification(image, names, labels) == {
        "top1": pytest.approx(100 * np.mean(ranks < 1)), "top5": pytest.approx(100 * np.mean(ranks < 5)),
        "mean_per_class": pytest.approx(100 * np.mean([np.mean(ranks[labels == c] < 1) for c in set(labels)]))}


def test_classification_equals_clip_benchmark():
    rng = np.random.default_rng(2)
    image, classes, labels = rng.standard_normal((200, 8)), rng.standard_normal((20, 8)), rng.integers(0, 20, 200)
    image = (image + classes[labels]).astype(np.float32)
    got = evaluate.classification(image, classes, labels)
    top1, top5 = accuracy(torch.from_numpy(image @ classes.astype(np.float32).T), torch.from_numpy(labels), topk=(1, 5))
    assert (got["top1"], got["top5"]) == (pytest.approx(100 * top1), pytest.approx(100 * top5))
    assert 10 < got["top1"] < 90


@pytest.mark.parametrize("images, per_image", [(2, 1), (37, 1), (101, 3), (500, 5)])
def test_a_constant_model_scores_at_most_chance(images, per_image):
    # A value that is not exact in binary: ties must hold although every product is rounded.
    vector = np.full(576, 576 ** -0.5, np.float32)
    text, image = np.tile(vector, (images * per_image, 1)), np.tile(vector, (images, 1))
    owner = np.repeat(np.arange(images), per_image)
    got = evaluate.retrieval(text, image, owner)
    for k in K:
        assert got["text_to_image"][f"R@{k}"] <= 100 * min(1, k / images)
        assert got["image_to_text"][f"R@{k}"] <= 100 * min(1, k / images)
    got = evaluate.classification(text, image, owner)
    assert got["top1"] <= 100 / images and got["top5"] <= 100 * min(1, 5 / images) and got["mean_per_class"] <= 100 / images


def test_blocks_give_the_same_numbers_and_no_full_matrix(monkeypatch):
    rng = np.random.default_rng(3)
    text, image = (rng.integers(-9, 10, (n, 8)).astype(np.float32) for n in (3000, 2000))
    owner = rng.integers(0, 2000, 3000)
    whole = evaluate.retrieval(text, image, owner)
    monkeypatch.setattr(evaluate, "BLOCK", 50_000)
    tracemalloc.start()
    assert evaluate.retrieval(text, image, owner) == whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 2000       # bytes: less than even a full matrix of booleans


def test_bad_embeddings_are_refused():
    good, owner = np.eye(3, dtype=np.float32), np.arange(3)
    bad = good.copy()
    bad[1, 2] = np.nan
    for call in (lambda: evaluate.retrieval(bad, good, owner), lambda: evaluate.retrieval(good, bad, owner),
                 lambda: evaluate.classification(bad, good, owner), lambda: evaluate.classification(good, np.full((3, 3), np.inf), owner)):
        with pytest.raises(flame.InputError, match="row [01]: NaN or infinite"):
            call()
    for owner in (np.array([0, 1]), np.array([0, 1, 3]), np.array([-1, 0, 1])):
        with pytest.raises(ValueError, match="image_of_text"):
            evaluate.retrieval(good, good, owner)
        with pytest.raises(ValueError, match="labels"):
            evaluate.classification(good, good, owner)


def test_interval_is_that_of_the_binomial():
    hits = np.arange(400) % 4 == 0
    interval = lambda hits, groups=None: evaluate.intervals(hits[:, None], groups)[0]
    low, high = interval(hits)
    # Resampling n hits with replacement and counting them is a binomial draw: here 100 +- 1.96 * sqrt(75), of 400.
    assert (low, high) == (pytest.approx(25 - 1.96 * 75 ** 0.5 / 4, abs=0.5), pytest.approx(25 + 1.96 * 75 ** 0.5 / 4, abs=0.5))
    assert interval(hits) == [low, high]
    # Saying everything five times over adds no evidence, if copies stay together.
    assert interval(np.repeat(hits, 5), np.repeat(np.arange(400) + 7, 5)) == pytest.approx([low, high])
    assert interval(np.ones(9)) == [100, 100]


def test_bootstrap_equals_its_loop():
    rng = np.random.default_rng(5)
    groups, hits = rng.integers(0, 30, 200), rng.random((200, 2)) < 0.3
    draws, means = np.random.default_rng(evaluate.SEED), []
    for _ in range(evaluate.RESAMPLES):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(30, size=30)])
        means.append(100 * hits[rows].mean(0))
    got = evaluate.bootstrap(*evaluate.by_group(hits, groups, 30))
    assert got == pytest.approx(np.array(means))
    assert evaluate.intervals(hits, groups)[1] == pytest.approx(np.percentile(np.array(means)[:, 1], [2.5, 97.5]))


def test_intervals_lie_beside_the_figures():
    rng = np.random.default_rng(4)
    image = rng.standard_normal((50, 8))
    got = evaluate.retrieval(image + rng.standard_normal((50, 8)), image, np.arange(50), ci95=True)
    for direction in ("text_to_image", "image_to_text"):
        for k in K:
            low, high = got["ci95"][direction][f"R@{k}"]
            assert low <= got[direction][f"R@{k}"] <= high and (high - low > 2 or low == high)
    # Four classes of 25 pictures that are right or wrong together: no more than four independent answers.
    labels = np.repeat(np.arange(4), 25)
    guesses = np.eye(4)[[0, 1, 3, 2]][labels]
    got = evaluate.classification(guesses, np.eye(4), labels, ci95=True)
    assert got["top1"] == got["mean_per_class"] == 50
    assert got["ci95"]["top1"] == pytest.approx([40, 60], abs=2) and got["ci95"]["mean_per_class"] == [0, 100]


def test_classes_average_unit_vectors_over_templates():
    long, short = np.array([100.0, 0, 0]), np.array([0, 1.0, 0])
    vectors = {"a cat": long, "my cat": short, "a dog": short, "my dog": short}
    got = evaluate.encode_classes(["cat", "dog"], ["a {}", "my {}"], lambda texts, prompts: np.array([vectors[t] for t in texts]))
    assert got == pytest.approx(np.array([[0.5 ** 0.5, 0.5 ** 0.5, 0], [0, 1, 0]]))


# ---------------------------------------------------------------- through main(), with a model whose answers are known

def test_all_parts_of_the_demo(colours, tmp_path, monkeypatch, capsys):
    tree_demo(tmp_path / "data" / "demo")
    monkeypatch.setattr(ColourWords, "lies", {"vert": "blue", "yellow": "white"})
    code, result = colours("demo")
    parts = result["parts"]
    assert code == 0 and list(parts) == ["long", "short", "raw", "seen", "unseen", "multilingual"]
    assert result["text_to_image"] == parts["long"]["text_to_image"] and result["n_images"] == 5
    assert [parts[p]["prompts"] for p in parts] == ["long", "long", "raw", "raw", "raw", "raw"]
    for part in ("long", "short", "raw"):
        assert parts[part]["text_to_image"]["R@1"] == 80            # yellow finds the white picture
    assert (parts["seen"]["n_images"], parts["seen"]["n_classes"], parts["seen"]["top1"]) == (6, 3, 100)
    # yellow's name says white: a yellow picture finds both names equally far, a white one finds them equal, a tie, wrong
    assert (parts["unseen"]["n_images"], parts["unseen"]["n_classes"], parts["unseen"]["chance"], parts["unseen"]["top1"]) == (4, 2, 50, 0)
    languages = parts["multilingual"]["languages"]
    assert languages["en"]["top1"] == 100 and languages["en"]["n_classes"] == 3
    assert languages["fr"]["top1"] == pytest.approx(100 / 3)        # vert says blue: green is wrong, blue a tie
    assert parts["multilingual"]["top1"] == pytest.approx((100 + 100 / 3) / 2)
    low, high = parts["multilingual"]["ci95"]["top1"]
    assert 50 <= low < 66.7 < high <= 100
    out = capsys.readouterr().out
    assert "unseen: 4 pictures, 2 names, chance 50.0" in out and "fr" in out
    assert colours("demo", "--split", "val")[1]["split"] == "val"


def test_names_shared_in_a_language_are_one_class(colours, tmp_path):
    tree_demo(tmp_path / "data" / "demo")
    put(tmp_path / "data" / "demo" / "names.tsv", "object\ten\tfr\nred\tred\tvert\ngreen\tgreen\tvert\nblue\tblue\t\nyellow\tyellow\tx\nwhite\twhite\tx\n")
    code, _ = colours("demo")
    assert code == 2                                                # one name left in French is no choice
    put(tmp_path / "data" / "demo" / "names.tsv", "object\ten\tfr\nred\tred\tvert\ngreen\tgreen\tvert\nblue\tblue\tbleu\nyellow\tyellow\tx\nwhite\twhite\tx\n")
    french = colours("demo")[1]["parts"]["multilingual"]["languages"]["fr"]
    assert french["n_classes"] == 2 and french["n_images"] == 6


def test_a_bad_picture_of_a_class_shifts_no_label(colours, tmp_path):
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    (tmp_path / "data" / "imagefolder" / "blue" / "0.png").write_text("not a picture")
    _, result = colours("imagefolder")
    assert (result["n_images"], result["skipped_images"], result["top1"]) == (14, 1, 100)


def test_bad_rows_of_a_tsv_are_counted(colours, tmp_path, capsys):
    root = tmp_path / "data" / "demo"
    tree_demo(root)
    with open(root / "test.tsv", "a") as file:
        file.write("red\timages/test/red.png\n")
    (root / "images" / "objects" / "red1.png").unlink()
    _, result = colours("demo")
    assert result["n_texts"] == 5 and result["parts"]["seen"]["n_images"] == 5 and result["parts"]["seen"]["top1"] == 100
    assert "test.tsv: line 7: not 5 fields; 1 such row(s) left out" in capsys.readouterr().err


def test_bad_input_exits_2_with_one_line(colours, tmp_path, monkeypatch, capsys):
    def fails(bench, message, *more):
        capsys.readouterr()
        assert colours(bench, *more)[0] == 2
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and not any("Traceback" in line for line in error)

    fails("urban1k", f"{Path('data/urban1k/image')}: not found; data/README.md says where to get it")
    tree_urban1k(tmp_path / "data" / "urban1k")
    fails("urban1k", "--split val: urban1k has only a test split", "--split", "val")
    fails("urban1k", "--probe: urban1k has no classes", "--probe")
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    fails("imagefolder", "imagefolder: no folders train and test, which a linear probe needs", "--probe")
    fails("imagefolder", "--language it: no file", "--language", "it")
    put(tmp_path / "names.txt", "red\tcat\n")
    fails("imagefolder", "names.txt: no line for the class 'blue'", "--classes", str(tmp_path / "names.txt"))
    fails("imagefolder", "nowhere.txt: not found", "--classes", "nowhere.txt")
    fails("urban1k", "--device nonsense", "--device", "nonsense")
    with monkeypatch.context() as patch:
        patch.setattr(flame, "llm_fingerprint", lambda folder: "another")
        fails("urban1k", "the checkpoint was trained with another LLM (colours) than")
    with monkeypatch.context() as patch:
        patch.setattr(ColourModel, "encode_image", lambda self, pixels: torch.full((len(pixels), 3), float("nan")))
        fails("urban1k", "image embeddings: row 0: NaN or infinite")
    for path in (tmp_path / "data" / "urban1k" / "image").iterdir():
        path.write_text("")
    fails("urban1k", "0 of 5 pictures can be read, at least 2 are needed")
    (tmp_path / "out" / "run" / "model.safetensors").unlink()
    fails("urban1k", "out: no finished checkpoint; run train.py")


def test_the_newest_finished_checkpoint_is_taken(tmp_path):
    for age, name in enumerate(("training", "new", "old", "unfinished")):
        put(tmp_path / name / "config.json", '{"step": 3, "training": {"steps": 9}}' if name == "training" else "{}")
        if name != "unfinished":
            put(tmp_path / name / "model.safetensors", "x" * age)
            os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    assert evaluate.newest_checkpoint(tmp_path).name == "new"


# ---------------------------------------------------------------- the real model, through the command line

# ---------------------------------------------------------------- what is kept between runs

def test_a_second_run_asks_neither_tower(colours, tmp_path, monkeypatch):
    tree_urban1k(tmp_path / "data" / "urban1k")
    first = colours("urban1k")[1]
    asked = []
    monkeypatch.setattr(ColourWords, "encode_batches", lambda self, texts, prompts: asked.append(list(texts)) or iter(()))
    monkeypatch.setattr(ColourModel, "encode_image", lambda self, pixels: asked.append(len(pixels)) or 1 / 0)
    assert colours("urban1k")[1] == first and not asked
    monkeypatch.undo()


def test_the_cache_knows_what_a_state_depends_on(colours, tmp_path, monkeypatch):
    """A change of LLM, prompts, text, picture or weights is encoded anew; everything else comes from the cache."""
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    texts, images = [], []
    encode_batches, encode_image = ColourWords.encode_batches, ColourModel.encode_image
    monkeypatch.setattr(ColourWords, "encode_batches", lambda self, some, prompts: texts.extend(some) or encode_batches(self, some, prompts))
    monkeypatch.setattr(ColourModel, "encode_image", lambda self, pixels: images.append(len(pixels)) or encode_image(self, pixels))

    def new(*more):
        texts.clear(), images.clear()
        assert colours("urban1k", *more)[0] == 0
        return len(texts), sum(images)

    assert new() == (5, 5) and new() == (0, 0)
    assert new("--prompts", "raw") == (5, 0)
    put(root / "caption" / "1.txt", "A blue car.")
    picture(root / "image" / "2.jpg", "white")
    assert new() == (1, 1)
    monkeypatch.setattr(ColourModel, "state_dict", lambda self: {"visual.x": torch.ones(1)})
    assert new() == (0, 5)
    monkeypatch.setattr(flame, "llm_fingerprint", lambda folder: "g")
    monkeypatch.setattr(ColourModel, "config", ColourModel.config | {"llm": {**ColourModel.config["llm"], "fingerprint": "g"}})
    assert new() == (5, 0)
    monkeypatch.setitem(flame.PROMPTS, "long", flame.PROMPTS["long"]._replace(prefix="A {}"))
    assert new() == (5, 0)
    assert new() == (0, 0)


def test_a_broken_cache_is_no_obstacle(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    put(tmp_path / "results" / "cache.sqlite", "not a database, and longer than the header of one" * 9)
    code, result = colours("urban1k")
    assert code == 0 and result["text_to_image"]["R@1"] == 100
    assert "nothing is kept for the next run" in capsys.readouterr().err


def test_states_survive_packing():
    states = torch.randn(3, 7, 576) * torch.tensor([1e-3, 1, 1e4])[:, None, None]
    states[..., 0] *= 20        # as an LLM's one dimension that outweighs the rest
    got = cache.unpack_states([cache.pack_states(state) for state in states], 7)
    assert torch.nn.functional.cosine_similarity(got[..., 1:], states[..., 1:], dim=-1).min() > 0.999999
    assert got.norm(dim=-1) == pytest.approx(states.norm(dim=-1), rel=1e-3)


# ---------------------------------------------------------------- options

def test_prompts_and_languages_are_taken(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    tree_xm3600(tmp_path / "data" / "xm3600")
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    assert colours("urban1k", "--prompts", "short")[1]["prompts"] == "short" and "texts (short)" in capsys.readouterr().err
    assert colours("imagefolder", "--prompts", "long")[1]["prompts"] == "long" and "texts (long)" in capsys.readouterr().err
    result = colours("xm3600", "--language", "fr")[1]
    assert list(result["languages"]) == ["fr"] and result["n_texts"] == 5
    assert colours("xm3600", "--all-captions")[1]["languages"]["en"]["n_texts"] == 10


def test_the_mean_over_languages_has_an_interval(colours, tmp_path, monkeypatch):
    tree_xm3600(tmp_path / "data" / "xm3600")
    monkeypatch.setattr(ColourWords, "lies", {"vert": "yellow", "bleu": "white"})
    result = colours("xm3600")[1]
    en, fr = (result["languages"][language]["text_to_image"]["R@1"] for language in ("en", "fr"))
    assert (en, fr, result["text_to_image"]["R@1"]) == (100, 60, 80)
    # English never fails, so that the average's interval is that of French, halved, on the same resamples of the pictures.
    low, high = result["languages"]["fr"]["ci95"]["text_to_image"]["R@1"]
    assert result["ci95"]["text_to_image"]["R@1"] == pytest.approx([50 + low / 2, 50 + high / 2]) and low < 60 < high


def test_released_pooling_is_the_normalised_mean_of_states(real, tmp_path):
    llm = real / "data" / "demo" / "llm"
    encoder, model = flame.TextEncoder(llm, "cpu", torch.float32, layer=2), flame.load(real / "out" / "tiny")
    texts = ["a", "Some longer text about nothing."]
    got = evaluate.encode_texts(model, lambda: encoder, texts, "long", "cpu", {}, pool="released")
    states = torch.cat([encoder.encode([text], "long") for text in texts])
    assert got == pytest.approx(torch.nn.functional.normalize(states.mean(1), dim=-1).numpy(), abs=1e-3)
    assert np.abs(got - evaluate.pooled(torch.nn.functional.normalize(states, dim=-1).numpy())).max() > 5e-3


# ---------------------------------------------------------------- what each facet is worth

def test_ablation_equals_one_subset_at_a_time():
    rng = np.random.default_rng(6)
    facets, image, owner = rng.standard_normal((30, 4, 8)), rng.standard_normal((12, 8)), rng.integers(0, 12, 30)
    facets += 1.5 * image[owner][:, None] * np.array([1, 0.5, 0, 2])[:, None]
    for pool in ("cosine", "released"):
        rows = evaluate.ablation(facets.astype(np.float32), image, owner, pool)
        assert [(row["kind"], row["facets"]) for row in rows] == [
            ("in order", [1]), ("in order", [1, 2]), ("in order", [1, 2, 3]), ("in order", [1, 2, 3, 4]),
            ("all but one", [2, 3, 4]), ("all but one", [1, 3, 4]), ("all but one", [1, 2, 4]), ("all but one", [1, 2, 3]),
            ("alone", [1]), ("alone", [2]), ("alone", [3]), ("alone", [4])]
        for row in rows:
            text = sum(facets[:, f - 1] for f in row["facets"]) / len(row["facets"])
            text = text / np.linalg.norm(text, axis=1, keepdims=True) if pool == "released" else text
            assert row["text_to_image"] == evaluate.retrieval(text, image, owner)["text_to_image"]
            assert row["image_to_text"] == evaluate.retrieval(text, image, owner)["image_to_text"]
    assert len({row["text_to_image"]["R@1"] for row in rows}) > 4
    assert [row["facets"] for row in evaluate.ablation(facets, image, owner, "cosine", "2", "3")] == [[1, 2], [1, 2, 3], [2, 3], [1, 3], [1, 2], [1], [2], [3]]


def test_facets_through_the_command_line(colours, tmp_path, monkeypatch, capsys):
    """The stub's facets all see the picture; here facet 1 says the same of every text: alone it is at chance."""
    tree_coco(tmp_path / "data" / "coco")
    encode_text = ColourModel.encode_text
    blind = lambda self, facets, prompts: torch.cat([torch.ones_like(facets[:, :1]) * 9, encode_text(self, facets[:, 1:], prompts)], dim=1)
    monkeypatch.setattr(ColourModel, "encode_text", blind)
    code, result = colours("coco", "--facets", "1..K")
    rows = {(row["kind"], tuple(row["facets"])): row["text_to_image"]["R@1"] for row in result["facets"]}
    assert code == 0 and len(rows) == 7 + 7 + 7
    assert rows["alone", (1,)] == rows["in order", (1,)] == 25 and rows["alone", (5,)] == rows["all but one", (2, 3, 4, 5, 6, 7)] == 100
    assert result["text_to_image"]["R@1"] == rows["in order", (1, 2, 3, 4, 5, 6, 7)]
    out = capsys.readouterr().out
    assert "inference only" in out and "main object" in out
    with Image.open(tmp_path / "results" / "coco-facets.png") as plot:
        assert {(47, 111, 176), (217, 130, 43)} <= {colour for _, colour in plot.getcolors(1 << 20)}
    assert [row["facets"] for row in colours("coco", "--facets", "2..9", "--prompts", "short")[1]["facets"][:2]] == [[1, 2], [1, 2, 3]]
    for flag, bench in (("3..2", "coco"), ("0..3", "coco"), ("x", "coco"), ("1..K", "imagefolder")):
        with pytest.raises(SystemExit):
            colours(bench, "--facets", flag)
        assert "--facets: 1..K or a range like 2..5" in capsys.readouterr().err


# ---------------------------------------------------------------- the page

def data_of(html):
    """The page's data, found as a browser finds it: up to the end of the first script element."""
    script = html[html.index("<script>"):html.index("</script>")]
    line = next(line for line in script.splitlines() if line.startswith("const DATA = "))
    return json.loads(line.removeprefix("const DATA = ").removesuffix(";"))


def test_the_page_holds_what_the_json_holds(colours, tmp_path, monkeypatch):
    tree_coco(tmp_path / "data" / "coco")
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})
    _, result = colours("coco", "--report", "--facets")
    html = (tmp_path / "results" / "coco.html").read_text(encoding="utf-8")
    data = data_of(html)
    assert data["result"] == result and len(data["result"]["facets"]) == 21
    right, wrong = ([row for row in data["queries"] if (row["rank"] == 0) == good] for good in (True, False))
    assert len(right) == 6 and len(wrong) == 5 and all("red" in row["text"] for row in wrong)
    for row in data["queries"]:
        assert [tile["score"] for tile in row["found"]] == sorted((tile["score"] for tile in row["found"]), reverse=True)
        for tile in row["found"]:
            assert len(tile["facets"]) == 7 and np.mean(tile["facets"]) == pytest.approx(tile["score"], abs=1e-5)
            assert data["pictures"][str(tile["picture"])].startswith("data:image/jpeg;base64,")
    assert wrong[0]["found"][0]["right"] is False and right[0]["found"][0]["right"] is True
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "") and html.count("<script") == 1      # self-contained


def test_strangers_texts_cannot_leave_the_data(colours, tmp_path):
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    evil = "A red </script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> & \u2028 street."
    put(root / "caption" / "1.txt", evil)
    colours("urban1k", "--report")
    html = (tmp_path / "results" / "urban1k.html").read_text(encoding="utf-8")
    assert evil.replace("\u2028", " ") in {row["text"].replace("\u2028", " ") for row in data_of(html)["queries"]}
    assert html.count("</script>") == html.count("<script") == 1 and "onerror" in html and "<img" not in html
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html


def test_confusions_are_the_most_frequent_wrong_guesses(colours, tmp_path):
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    for i in range(3, 7):
        picture(tmp_path / "data" / "imagefolder" / "red" / f"{i}.png", "blue")     # in the wrong folder
    picture(tmp_path / "data" / "imagefolder" / "green" / "9.png", "white")
    _, result = colours("imagefolder", "--report")
    assert result["confusions"] == [{"true": "red", "guess": "blue", "count": 4, "of": 7}, {"true": "green", "guess": "white", "count": 1, "of": 4}]
    assert data_of((tmp_path / "results" / "imagefolder.html").read_text())["result"]["confusions"] == result["confusions"]


# ---------------------------------------------------------------- search

def test_search_ranks_a_folder_and_keeps_an_index(colours, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my pictures"
    for name in NAMES:
        picture(folder / "deep" / f"{name}.jpg", name)
    put(folder / "broken.png", "not a picture")
    sizes, encode_image = [], ColourModel.encode_image
    monkeypatch.setattr(ColourModel, "encode_image", lambda self, pixels: sizes.append(len(pixels)) or encode_image(self, pixels))

    def search(text, *more):
        sizes.clear()
        capsys.readouterr()
        assert evaluate.main(["--search", text, "--images", str(folder), "--device", "cpu", *more]) == 0
        best = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        return Path(best[0]).stem, len(best), sum(sizes)

    assert search("a blue thing") == ("blue", 5, 5)
    assert search("bleu, s'il vous plait") == ("blue", 5, 0)
    with Image.open(tmp_path / "results" / "search.png") as sheet:
        assert sheet.getpixel((16 + 420 + 60, 16 + 60))[2] > 200 > sheet.getpixel((16 + 420 + 60, 16 + 60))[0]
    picture(folder / "new.jpg", "blue")
    picture(folder / "deep" / "red.jpg", "white")
    (folder / "deep" / "green.jpg").unlink()
    assert search("a red thing")[1:] == (5, 2)
    assert search("a red thing")[1:] == (5, 0)
    with np.load(folder / ".flame-index.npz") as index:
        assert len(index["keys"]) == len(index["vectors"]) == 5 and not any("green" in str(key) for key in index["keys"])
    (folder / ".flame-index.npz").write_bytes(b"PK")
    assert search("a blue thing")[2] == 5
    monkeypatch.setattr(ColourModel, "state_dict", lambda self: {"visual.x": torch.ones(1)})
    assert search("a blue thing")[2] == 5       # another checkpoint


def test_search_without_a_writable_folder_or_pictures(colours, tmp_path, monkeypatch, capsys):
    picture(tmp_path / "one" / "red.jpg", "red")
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith(".npz"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)      # root may write anywhere, hence no chmod
    assert evaluate.main(["--search", "red", "--images", str(tmp_path / "one"), "--device", "cpu"]) == 0
    assert "Permission denied; no index is kept" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["red.jpg"]
    (tmp_path / "none").mkdir()
    for name, message in (("none", "0 of 0 pictures can be read"), ("nowhere", "nowhere: not found")):
        assert evaluate.main(["--search", "red", "--images", str(tmp_path / name), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        evaluate.main(["--search", "red"])


# ---------------------------------------------------------------- the real model, through the command line

def command(folder, *more):
    env = {key: value for key, value in os.environ.items() if key != "FLAME_LLM"}
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *more], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("prompts", ["long", "raw"])
def test_a_text_dotted_with_an_image_is_the_mean_cosine(real, prompts):
    model = flame.load(real / "out" / "tiny")
    torch.manual_seed(1)
    model.text.mean.copy_(torch.randn_like(model.text.mean) * 0.1)      # a text projection that differs between columns
    encoder = flame.TextEncoder(real / "data" / "demo" / "llm", "cpu", torch.float32, budget=400)   # several packed rows
    image = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    texts = ["a", "A much longer text about nothing, that goes on for a while.", "b b", "a"]
    got = evaluate.encode_texts(model, lambda: encoder, texts, prompts, "cpu", {}) @ image.numpy().T
    for row, text in zip(got, texts):
        with torch.inference_mode():
            expected = flame.similarity(image, model.encode_text(encoder.encode([text], prompts), prompts))[0]
        assert row == pytest.approx(expected.numpy(), abs=1e-4)     # texts alone and in company differ by rounding


def test_an_llm_of_another_width_is_refused(real, tmp_path, tiny_llm):
    """By its width, where the checkpoint, as the authors', does not name its LLM."""
    shutil.copytree(real / "out" / "tiny", tmp_path / "silent")
    config = json.loads((tmp_path / "silent" / "config.json").read_text())
    config["llm"]["fingerprint"] = None
    put(tmp_path / "silent" / "config.json", json.dumps(config))
    done = command(real, "--bench", "demo", "--llm", tiny_llm, "--checkpoint", tmp_path / "silent", "--out", tmp_path)
    assert done.returncode == 2 and "48 dimensions" in done.stderr and "Traceback" not in done.stderr


def test_command_line_equals_one_by_one(real):
    """The JSON of the real command against flame.similarity of one picture and one caption at a time."""
    done = command(real, "--bench", "demo", "--device", "cpu", "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {Path('out/tiny')}" in done.stdout and f"LLM {Path('data/demo/llm')}" in done.stdout
    result = json.loads((real / "results" / "demo.json").read_text())

    model = flame.load(real / "out" / "tiny")
    encoder = flame.TextEncoder(real / "data" / "demo" / "llm", "cpu", flame.default_dtype("cpu"), layer=2)

    def score(path, text, prompts):
        with torch.inference_mode(), Image.open(path) as image:
            return flame.similarity(model.encode_image(model.preprocess(image)[None]), model.encode_text(encoder.encode([text], prompts), prompts)).item()

    scores = [[score(real / "data" / "demo" / "images" / "test" / f"{i}.png", f"A {t} thing, in some detail.", "long") for i in NAMES] for t in NAMES]
    gaps = np.diff(np.sort(np.array(scores), axis=1), axis=1).min(), np.diff(np.sort(np.array(scores), axis=0), axis=0).min()
    assert min(gaps) > 1e-5, "too close for rounding not to matter: choose another seed"
    ranks = [slow_rank(scores[t], [t == i for i in range(5)]) for t in range(5)]
    assert result["parts"]["long"]["text_to_image"]["R@1"] == 100 * np.mean([r < 1 for r in ranks])
    back = [slow_rank([row[i] for row in scores], [t == i for t in range(5)]) for i in range(5)]
    assert result["parts"]["long"]["image_to_text"]["R@1"] == 100 * np.mean([r < 1 for r in back])

    names = ("blue", "green", "red")
    hits = []
    for n in names:
        row = [score(real / "data" / "demo" / "images" / "objects" / f"{n}1.png", f"{name} clip art", "raw") for name in names]
        hits.append(np.argmax(row) == names.index(n))
    assert result["parts"]["seen"]["top1"] == pytest.approx(100 * np.mean(hits))    # an object's pictures are alike here


def test_another_llm_is_refused_through_the_command_line(real, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in (real / "data" / "demo" / "llm").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    put(other / "config.json", (other / "config.json").read_text() + "\n")
    done = command(real, "--bench", "demo", "--llm", str(other), "--out", str(tmp_path / "results"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "results").exists()
    assert len(done.stderr.splitlines()) == 1 and "trained with another LLM (tiny)" in done.stderr


@pytest.mark.parametrize("size, pool_first, linear", [(32, True, False), (32, False, True), (24, False, False)])
def test_patch_states_undo_the_text_projection(size, pool_first, linear):
    torch.manual_seed(0)
    model = flame.Flame({"image_size": size, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "text_dim": 12, "projector_hidden": 20,
                         "pool_first": pool_first, "text_rank": 0 if linear else 5, "text_linear": linear}).eval()
    text, c = model.text, flame.COLUMNS.index("long.0")
    if linear:
        text.weight.data = torch.randn(12, 12)
    else:
        text.basis[c], text.gain[c], text.rest[c] = torch.linalg.qr(torch.randn(12, 5))[0], torch.rand(5) * 9, 0.5
    matrix = text.weight.data if linear else 0.5 * torch.eye(12) + text.basis[c] @ text.gain[c].diag() @ text.basis[c].T
    pixels, side = torch.randn(3, size, size), size // 8
    got = evaluate.patch_states(model, pixels)
    with torch.inference_mode():
        tokens = model.visual(pixels[None])[0, 1:].reshape(side, side, 16)
        for y in range(len(got)):
            for x in range(len(got)):
                cell = (tokens[2 * y:2 * y + 2, 2 * x:2 * x + 2] if side % 2 == 0 else tokens[y:y + 1, x:x + 1]).reshape(-1, 16)
                z = model.mm(cell.mean(0)) if pool_first else model.mm(cell).mean(0)
                torch.testing.assert_close(matrix @ got[y, x], z, rtol=1e-3, atol=1e-4)
    assert len(got) == (side // 2 if side % 2 == 0 else side)


def test_words_of_a_picture(real, tmp_path):
    image = real / "data" / "demo" / "images" / "test" / f"{NAMES[0]}.png"
    done = command(real, "--words", image, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "words.png") as drawn:
        assert drawn.size == (720, 720)
    model, tokenizer = flame.load(real / "out" / "tiny"), flame.load_tokenizer(real / "data" / "demo" / "llm")
    norm, unembedding = flame.load_unembedding(real / "data" / "demo" / "llm")
    names = {i: tokenizer.decode([i]) for i in range(len(unembedding))}
    names = {i: name.strip() for i, name in names.items() if name.startswith(" ") and name[1:].isalpha() and len(name) > 3}
    with Image.open(image) as picture:
        states = evaluate.patch_states(model, model.preprocess(picture))
    expected = [max(names, key=lambda i: (state * norm @ unembedding[i]).item()) for state in states.flatten(0, 1)]
    assert done.stdout.split("\n", 1)[1].split("->")[0].split() == [names[i] for i in expected]
    put(tmp_path / "no.png", "text")
    assert (done := command(real, "--words", tmp_path / "no.png", "--out", tmp_path)).returncode == 2 and "no.png" in done.stderr and "Traceback" not in done.stderr


def test_help_fits_one_screen(real):
    lines = command(real, "--help").stdout.splitlines()
    assert 5 < len(lines) <= 32 and max(map(len, lines)) <= 80
