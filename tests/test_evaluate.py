"""evaluate.py: metrics against slow twins and CLIP_benchmark; cache, ablation, report and search through the
command line. test_benchmarks.py has the readers, the small trees and the models that this file borrows.

    pytest tests/test_evaluate.py
"""
# ruff: noqa: F811  (the fixtures of test_benchmarks.py are imported, and named again by who wants them)
import base64
import io
import json
import os
import shutil
import sqlite3
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
from PIL import Image, ImageColor
from sklearn.metrics import balanced_accuracy_score

import evaluate
import flame
from data import benchmarks, cache
from data.show import fonts, plots, report, runs, words
from test_benchmarks import (
    CLASS_FILES,
    COLOURS,
    NAMES,
    RECALL_AT,
    ROOT,
    TREES,
    ColourModel,
    ColourWords,
    class_file,
    colours,  # noqa: F401
    picture,
    put,
    real,  # noqa: F401
    slow_rank,
    tree_coco,
    tree_demo,
    tree_docci,
    tree_imagefolder,
    tree_urban1k,
    tree_xm3600,
)


def towers(model, encoder):
    return evaluate.Towers(model, lambda: encoder, "cosine", "cpu", {}, "image tower", "text tower")


# ---------------------------------------------------------------- metrics

@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), texts=st.integers(1, 40), images=st.integers(1, 25), dim=st.integers(1, 4)
)
def test_retrieval_equals_slow_twin_with_ties(seed, texts, images, dim):
    rng = np.random.default_rng(seed)
    text, image = (
        rng.integers(-2, 3, (n, dim)) for n in (texts, images)
    )  # small integers: exact products, many ties
    owner = rng.integers(0, images, texts)
    got = evaluate.retrieval(text, image, owner)
    scores = (text @ image.T).tolist()
    forth = [slow_rank(scores[t], [owner[t] == i for i in range(images)]) for t in range(texts)]
    back = [
        slow_rank([scores[t][i] for t in range(texts)], [owner[t] == i for t in range(texts)])
        for i in sorted(set(owner))
    ]
    assert got == {
        "text_to_image": {f"R@{k}": pytest.approx(100 * np.mean([r < k for r in forth])) for k in RECALL_AT},
        "image_to_text": {f"R@{k}": pytest.approx(100 * np.mean([r < k for r in back])) for k in RECALL_AT},
    }


def test_retrieval_equals_clip_benchmark():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((60, 16)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(60), 5))
    text = (image[owner] + 2.5 * rng.standard_normal((300, 16))).astype(
        np.float32
    )  # neither hopeless nor perfect
    got = evaluate.retrieval(text, image, owner)
    scores, pairs = torch.from_numpy(text @ image.T), torch.from_numpy(owner[:, None] == np.arange(60))
    for k in RECALL_AT:
        forth, back = recall_at_k(scores, pairs, k), recall_at_k(scores.T, pairs.T, k)
        assert got["text_to_image"][f"R@{k}"] == pytest.approx(
            100 * (forth > 0).float().mean().item(), abs=1e-4
        )  # percent: 1e-6 of a share
        assert got["image_to_text"][f"R@{k}"] == pytest.approx(
            100 * (back > 0).float().mean().item(), abs=1e-4
        )  # percent: 1e-6 of a share
    assert 10 < got["text_to_image"]["R@1"] < 90


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 40), classes=st.integers(1, 12))
def test_classification_equals_slow_twin_with_ties(seed, images, classes):
    rng = np.random.default_rng(seed)
    image, names, labels = (
        rng.integers(-2, 3, (images, 3)),
        rng.integers(-2, 3, (classes, 3)),
        rng.integers(0, classes, images),
    )
    scores = image @ names.T
    ranks = np.array([slow_rank(scores[i], [labels[i] == c for c in range(classes)]) for i in range(images)])
    assert evaluate.classification(image, names, labels) == {
        "top1": pytest.approx(100 * np.mean(ranks < 1)),
        "top5": pytest.approx(100 * np.mean(ranks < 5)),
        "mean_per_class": pytest.approx(
            100 * np.mean([np.mean(ranks[labels == c] < 1) for c in set(labels)])
        ),
    }


def test_classification_equals_clip_benchmark():
    rng = np.random.default_rng(2)
    image, classes, labels = (
        rng.standard_normal((200, 8)),
        rng.standard_normal((20, 8)),
        rng.integers(0, 20, 200),
    )
    image = (image + classes[labels]).astype(np.float32)
    got = evaluate.classification(image, classes, labels)
    top1, top5 = accuracy(
        torch.from_numpy(image @ classes.astype(np.float32).T), torch.from_numpy(labels), topk=(1, 5)
    )
    assert (got["top1"], got["top5"]) == (pytest.approx(100 * top1), pytest.approx(100 * top5))
    assert 10 < got["top1"] < 90


@pytest.mark.parametrize("images, per_image", [(2, 1), (37, 1), (101, 3), (500, 5)])
def test_a_constant_model_scores_at_most_chance(images, per_image):
    # A value that is not exact in binary: ties must hold although every product is rounded.
    vector = np.full(576, 576 ** -0.5, np.float32)
    text, image = np.tile(vector, (images * per_image, 1)), np.tile(vector, (images, 1))
    owner = np.repeat(np.arange(images), per_image)
    got = evaluate.retrieval(text, image, owner)
    for k in RECALL_AT:
        assert got["text_to_image"][f"R@{k}"] <= 100 * min(1, k / images)
        assert got["image_to_text"][f"R@{k}"] <= 100 * min(1, k / images)
    got = evaluate.classification(text, image, owner)
    assert (
        got["top1"] <= 100 / images
        and got["top5"] <= 100 * min(1, 5 / images)
        and got["mean_per_class"] <= 100 / images
    )


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
    for call in (
        lambda: evaluate.retrieval(bad, good, owner),
        lambda: evaluate.retrieval(good, bad, owner),
        lambda: evaluate.classification(bad, good, owner),
        lambda: evaluate.classification(good, np.full((3, 3), np.inf), owner),
    ):
        with pytest.raises(flame.InputError, match="row [01]: NaN or infinite"):
            call()
    for owner in (np.array([0, 1]), np.array([0, 1, 3]), np.array([-1, 0, 1])):
        with pytest.raises(ValueError, match="image_of_text"):
            evaluate.retrieval(good, good, owner)
        with pytest.raises(ValueError, match="labels"):
            evaluate.classification(good, good, owner)


def intervals(hits, groups=None):
    """Of the means of hits [N, F]; groups int [N]: what is resampled, the hits themselves without any."""
    _, groups = np.unique(np.arange(len(hits)) if groups is None else groups, return_inverse=True)
    samples = evaluate.sampled(hits, groups, groups.max() + 1)
    return list(evaluate.figures(range(hits.shape[1]), samples)["ci95"].values())


def test_interval_is_that_of_the_binomial():
    hits = np.arange(400) % 4 == 0

    def interval(hits, groups=None):
        return intervals(hits[:, None], groups)[0]

    low, high = interval(hits)
    # Resampling n hits with replacement and counting them is a binomial draw: here 100 +- 1.96 * sqrt(75), of
    # 400.
    assert (low, high) == (
        pytest.approx(25 - 1.96 * 75**0.5 / 4, abs=0.5),
        pytest.approx(25 + 1.96 * 75**0.5 / 4, abs=0.5),
    )
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
    got = evaluate.bootstrap(hits, groups, 30)
    assert got == pytest.approx(np.array(means))
    assert intervals(hits, groups)[1] == pytest.approx(
        np.percentile(np.array(means)[:, 1], [2.5, 97.5])
    )


def test_the_average_of_independent_figures_has_their_common_interval():
    """averaged() has intervals only; drawn again from the hits themselves, the mean scatters as it says."""
    rng = np.random.default_rng(0)
    hits = [rng.random((n, 1)) < share for n, share in ((900, 0.5), (400, 0.9), (2500, 0.2))]
    rows = [evaluate.figures(["top1"], evaluate.sampled(own, np.arange(len(own)), len(own))) for own in hits]
    nested = [{"text_to_image": {"top1": row["top1"]}} for row in rows]
    ends = [{"text_to_image": row["ci95"]} for row in rows]
    mean, ci95 = evaluate.averaged(nested, ends)
    assert mean["text_to_image"]["top1"] == pytest.approx(np.mean([100 * own.mean() for own in hits]))
    drawn = [np.mean([100 * rng.choice(own, len(own)).mean() for own in hits]) for _ in range(2000)]
    assert ci95["text_to_image"]["top1"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.15)
    mean, (low, high) = evaluate.averaged([100, 100, 0], [[100, 100], [99, 100], [0, 3]])
    assert low == pytest.approx(mean - 1 / 3) and high == pytest.approx(mean + 1)   # never beyond 0 and 100


def test_intervals_lie_beside_the_figures():
    rng = np.random.default_rng(4)
    image = rng.standard_normal((50, 8))
    got = evaluate.retrieval(image + rng.standard_normal((50, 8)), image, np.arange(50), ci95=True)
    for direction in ("text_to_image", "image_to_text"):
        for k in RECALL_AT:
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
    got = evaluate.encode_classes(
        ["cat", "dog"], ["a {}", "my {}"], lambda texts, prompts: np.array([vectors[t] for t in texts])
    )
    assert got == pytest.approx(np.array([[0.5 ** 0.5, 0.5 ** 0.5, 0], [0, 1, 0]]))


# ---------------------------------------------------------------- through main(), with a model whose answers
# are known

def test_all_parts_of_the_demo(colours, tmp_path, monkeypatch, capsys):
    tree_demo(tmp_path / "data" / "demo")
    monkeypatch.setattr(ColourWords, "lies", {"vert": "blue", "yellow": "white"})
    code, result = colours("demo")
    parts = result["parts"]
    assert code == 0
    assert list(parts) == "long short raw reworded seen unseen multilingual synonyms".split()
    assert result["text_to_image"] == parts["long"]["text_to_image"] and result["n_images"] == 5
    assert [parts[p]["prompts"] for p in parts] == "long short raw short raw raw raw raw".split()
    for part in ("long", "short", "raw", "reworded"):
        assert parts[part]["text_to_image"]["R@1"] == 80            # yellow finds the white picture
    assert (parts["seen"]["n_images"], parts["seen"]["n_classes"], parts["seen"]["top1"]) == (6, 3, 100)
    # yellow's name says white: a yellow picture finds both names equally far, a white one finds them equal, a
    # tie, wrong
    assert (
        parts["unseen"]["n_images"],
        parts["unseen"]["n_classes"],
        parts["unseen"]["chance"],
        parts["unseen"]["top1"],
    ) == (4, 2, 50, 0)
    languages = parts["multilingual"]["languages"]
    assert languages["en"]["top1"] == 100 and languages["en"]["n_classes"] == 3
    assert languages["fr"]["top1"] == pytest.approx(100 / 3)  # vert says blue: green is wrong, blue a tie
    assert languages["fr"]["ci95"]["top1"] == [0, 100]      # over 3 objects; over their 6 pictures it is less
    assert parts["multilingual"]["top1"] == pytest.approx((100 + 100 / 3) / 2)
    low, high = parts["multilingual"]["ci95"]["top1"]
    assert 50 <= low < 66.7 < high <= 100
    synonyms = parts["synonyms"]
    assert synonyms["n_images"] == 6 and synonyms["n_classes"] == 3
    assert synonyms["top1"] == synonyms["top5"] == 100
    out = capsys.readouterr().out
    assert "unseen: 4 pictures, 2 names, chance 50.0" in out and "fr" in out
    assert colours("demo", "--split", "val")[1]["split"] == "val"


def test_unseen_objects_are_asked_for_in_galleries(monkeypatch):
    """Few names to choose from, of each kind some: things listed together go to different galleries."""
    monkeypatch.setattr(evaluate, "GALLERY", 2)
    names = {thing: thing.upper() for thing in "abcde"}
    got = evaluate.galleries_of(list("aabbccddee"), names)
    assert got == {0: {"a": "A", "c": "C", "e": "E"}, 1: {"b": "B", "d": "D"}}
    assert evaluate.galleries_of(list("aab"), names) == {0: {"a": "A", "b": "B"}}
    # Scored as a loop would: a picture is right if no other name of its gallery is as near.
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(4) for name in names.values()}

    def encode_texts(towers, texts, prompts):
        return np.array([vectors[text] for text in texts])

    monkeypatch.setattr(evaluate, "encode_texts", encode_texts)
    things = list("aaabbbcccdddeee")
    image = np.array([vectors[names[thing]] for thing in things]) + 2 * rng.standard_normal((15, 4))
    means = []
    for own in got.values():
        right = [max(own, key=lambda other: vector @ vectors[names[other]]) == thing
                 for thing, vector in zip(things, image) if thing in own]
        means.append(100 * np.mean(right))
    scored = evaluate.score_galleries(None, "raw", image, things, got)
    assert scored["top1"] == pytest.approx(np.mean(means)) and 0 < scored["top1"] < 100
    assert scored["chance"] == pytest.approx((100 / 3 + 50) / 2)


def test_names_shared_in_a_language_are_one_class(colours, tmp_path):
    tree_demo(tmp_path / "data" / "demo")
    table = "object\ten\tfr\nred\tred\tvert\ngreen\tgreen\tvert\nyellow\tyellow\tx\nwhite\twhite\tx\n"
    put(tmp_path / "data" / "demo" / "names.tsv", table + "blue\tblue\t\n")
    code, _ = colours("demo")
    assert code == 2  # one name left in French is no choice
    put(tmp_path / "data" / "demo" / "names.tsv", table + "blue\tblue\tbleu\n")
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
    assert (
        result["n_texts"] == 5
        and result["parts"]["seen"]["n_images"] == 5
        and result["parts"]["seen"]["top1"] == 100
    )
    assert "test.tsv: line 7: not 6 fields; 1 such row(s) left out" in capsys.readouterr().err


def test_bad_input_exits_2_with_one_line(colours, tmp_path, monkeypatch, capsys):
    def fails(bench, message, *more):
        capsys.readouterr()
        assert colours(bench, *more)[0] == 2
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and not any("Traceback" in line for line in error)

    fails("urban1k", f"{Path('data/urban1k/image')}: not found; data/README.md says where to get it")
    tree_urban1k(tmp_path / "data" / "urban1k")
    fails("urban1k", "--split val: urban1k has no such split", "--split", "val")
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
        patch.setattr(
            ColourModel, "encode_image", lambda self, pixels: torch.full((len(pixels), 3), float("nan"))
        )
        fails("urban1k", "image embeddings: row 0: NaN or infinite")
    for path in (tmp_path / "data" / "urban1k" / "image").iterdir():
        path.write_text("")
    fails("urban1k", "0 of 5 pictures can be read, at least 2 are needed")
    (tmp_path / "out" / "run" / "model.safetensors").unlink()
    fails("urban1k", "out: no finished checkpoint; run train.py")


def test_the_newest_finished_checkpoint_is_taken(tmp_path):
    for age, name in enumerate(("training", "new", "old", "unfinished")):
        put(
            tmp_path / name / "config.json",
            '{"step": 3, "training": {"steps": 9}}' if name == "training" else "{}",
        )
        if name != "unfinished":
            put(tmp_path / name / "model.safetensors", "x" * age)
            os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    assert evaluate.newest_checkpoint(tmp_path).name == "new"


# ---------------------------------------------------------------- what is kept between runs

def test_a_second_run_asks_neither_tower(colours, tmp_path, monkeypatch):
    tree_urban1k(tmp_path / "data" / "urban1k")
    first = colours("urban1k")[1]
    asked = []
    monkeypatch.setattr(
        ColourWords, "encode_batches", lambda self, texts, prompts: asked.append(list(texts)) or iter(())
    )
    monkeypatch.setattr(ColourModel, "encode_image", lambda self, pixels: asked.append(len(pixels)) or 1 / 0)
    assert colours("urban1k")[1] == first and not asked
    monkeypatch.undo()


def test_the_cache_knows_what_a_state_depends_on(colours, tmp_path, monkeypatch):
    """A change of LLM, prompts, text, picture or weights is encoded anew; all else comes from the cache."""
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    texts, images = [], []
    encode_batches, encode_image = ColourWords.encode_batches, ColourModel.encode_image
    monkeypatch.setattr(
        ColourWords,
        "encode_batches",
        lambda self, some, prompts: texts.extend(some) or encode_batches(self, some, prompts),
    )
    monkeypatch.setattr(
        ColourModel,
        "encode_image",
        lambda self, pixels: images.append(len(pixels)) or encode_image(self, pixels),
    )

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
    monkeypatch.setattr(
        ColourModel, "config", ColourModel.config | {"llm": {**ColourModel.config["llm"], "fingerprint": "g"}}
    )
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
    assert (
        colours("urban1k", "--prompts", "short")[1]["prompts"] == "short"
        and "texts (short)" in capsys.readouterr().err
    )
    assert (
        colours("imagefolder", "--prompts", "long")[1]["prompts"] == "long"
        and "texts (long)" in capsys.readouterr().err
    )
    result = colours("xm3600", "--language", "fr")[1]
    assert list(result["languages"]) == ["fr"] and result["n_texts"] == 5
    assert colours("xm3600", "--all-captions")[1]["languages"]["en"]["n_texts"] == 10


def test_the_mean_over_languages_has_an_interval(colours, tmp_path, monkeypatch):
    tree_xm3600(tmp_path / "data" / "xm3600")
    monkeypatch.setattr(ColourWords, "lies", {"vert": "yellow", "bleu": "white"})
    result = colours("xm3600")[1]
    en, fr = (result["languages"][language]["text_to_image"]["R@1"] for language in ("en", "fr"))
    assert (en, fr, result["text_to_image"]["R@1"]) == (100, 60, 80)
    # English never fails, so that the average's interval is that of French, halved, on the same resamples of
    # the pictures.
    low, high = result["languages"]["fr"]["ci95"]["text_to_image"]["R@1"]
    assert (
        result["ci95"]["text_to_image"]["R@1"] == pytest.approx([50 + low / 2, 50 + high / 2])
        and low < 60 < high
    )


def test_released_pooling_is_the_normalised_mean_of_states(real, tmp_path):
    llm = real / "data" / "demo" / "llm"
    encoder, model = flame.TextEncoder(llm, "cpu", torch.float32, layer=2), flame.load(real / "out" / "tiny")
    texts = ["a", "Some longer text about nothing."]
    got = evaluate.encode_texts(towers(model, encoder)._replace(pool="released"), texts, "long")
    states = torch.cat([encoder.encode([text], "long") for text in texts])
    assert got == pytest.approx(torch.nn.functional.normalize(states.mean(1), dim=-1).numpy(), abs=1e-3)
    assert np.abs(got - evaluate.pooled(torch.nn.functional.normalize(states, dim=-1).numpy())).max() > 5e-3


# ---------------------------------------------------------------- what each facet is worth

def test_ablation_equals_one_subset_at_a_time():
    rng = np.random.default_rng(6)
    facets, image, owner = (
        rng.standard_normal((30, 4, 8)),
        rng.standard_normal((12, 8)),
        rng.integers(0, 12, 30),
    )
    facets += 1.5 * image[owner][:, None] * np.array([1, 0.5, 0, 2])[:, None]
    for pool in ("cosine", "released"):
        rows = evaluate.ablation(facets.astype(np.float32), image, owner, pool)
        assert [(row["kind"], row["facets"]) for row in rows] == [
            ("in order", [1]),
            ("in order", [1, 2]),
            ("in order", [1, 2, 3]),
            ("in order", [1, 2, 3, 4]),
            ("all but one", [2, 3, 4]),
            ("all but one", [1, 3, 4]),
            ("all but one", [1, 2, 4]),
            ("all but one", [1, 2, 3]),
            ("alone", [1]),
            ("alone", [2]),
            ("alone", [3]),
            ("alone", [4]),
        ]
        for row in rows:
            text = sum(facets[:, f - 1] for f in row["facets"]) / len(row["facets"])
            text = text / np.linalg.norm(text, axis=1, keepdims=True) if pool == "released" else text
            assert row["text_to_image"] == evaluate.retrieval(text, image, owner)["text_to_image"]
            assert row["image_to_text"] == evaluate.retrieval(text, image, owner)["image_to_text"]
    assert len({row["text_to_image"]["R@1"] for row in rows}) > 4
    assert [row["facets"] for row in evaluate.ablation(facets, image, owner, "cosine", 2, 3)] == [
        [1, 2],
        [1, 2, 3],
        [2, 3],
        [1, 3],
        [1, 2],
        [1],
        [2],
        [3],
    ]


def test_facets_through_the_command_line(colours, tmp_path, monkeypatch, capsys):
    """The stub's facets all see the picture; here facet 1 says the same of every text: it is at chance."""
    tree_coco(tmp_path / "data" / "coco")
    encode_text = ColourModel.encode_text

    def blind(self, facets, prompts):
        nothing = torch.full_like(facets[:, :1], 9)
        return torch.cat([nothing, encode_text(self, facets[:, 1:], prompts)], dim=1)

    monkeypatch.setattr(ColourModel, "encode_text", blind)
    code, result = colours("coco", "--facets", "1..K")
    rows = {(row["kind"], tuple(row["facets"])): row["text_to_image"]["R@1"] for row in result["facets"]}
    assert code == 0 and len(rows) == 7 + 7 + 7
    assert (
        rows["alone", (1,)] == rows["in order", (1,)] == 25
        and rows["alone", (5,)] == rows["all but one", (2, 3, 4, 5, 6, 7)] == 100
    )
    assert result["text_to_image"]["R@1"] == rows["in order", (1, 2, 3, 4, 5, 6, 7)]
    out = capsys.readouterr().out
    assert "inference only" in out and "main object" in out
    with Image.open(tmp_path / "results" / "coco-facets.png") as plot:
        assert {ImageColor.getrgb(plots.BLUE), ImageColor.getrgb(plots.ORANGE)} <= {
            colour for _, colour in plot.convert("RGB").getcolors(1 << 20)
        }
    assert [
        row["facets"] for row in colours("coco", "--facets", "2..9", "--prompts", "short")[1]["facets"][:2]
    ] == [[1, 2], [1, 2, 3]]
    for flag, bench in (("3..2", "coco"), ("0..3", "coco"), ("x", "coco"), ("1..K", "imagefolder")):
        assert colours(bench, "--facets", flag)[0] == 2
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
        assert [tile["score"] for tile in row["found"]] == sorted(
            (tile["score"] for tile in row["found"]), reverse=True
        )
        for tile in row["found"]:
            assert len(tile["facets"]) == 7 and np.mean(tile["facets"]) == pytest.approx(
                tile["score"], abs=1e-5
            )
            assert data["pictures"][str(tile["picture"])].startswith("data:image/jpeg;base64,")
    assert wrong[0]["found"][0]["right"] is False and right[0]["found"][0]["right"] is True
    assert (
        "http" not in html.replace("http://www.w3.org/2000/svg", "") and html.count("<script") == 1
    )  # self-contained


def test_strangers_texts_cannot_leave_the_data(colours, tmp_path):
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    evil = "A red </script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> & \u2028 street."
    put(root / "caption" / "1.txt", evil)
    colours("urban1k", "--report")
    html = (tmp_path / "results" / "urban1k.html").read_text(encoding="utf-8")
    assert evil.replace("\u2028", " ") in {
        row["text"].replace("\u2028", " ") for row in data_of(html)["queries"]
    }
    assert html.count("</script>") == html.count("<script") == 1 and "onerror" in html and "<img" not in html
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html


def test_confusions_are_the_most_frequent_wrong_guesses(colours, tmp_path):
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    for i in range(3, 7):
        picture(tmp_path / "data" / "imagefolder" / "red" / f"{i}.png", "blue")     # in the wrong folder
    picture(tmp_path / "data" / "imagefolder" / "green" / "9.png", "white")
    _, result = colours("imagefolder", "--report")
    assert result["confusions"] == [
        {"true": "red", "guess": "blue", "count": 4, "of": 7},
        {"true": "green", "guess": "white", "count": 1, "of": 4},
    ]
    assert (
        data_of((tmp_path / "results" / "imagefolder.html").read_text())["result"]["confusions"]
        == result["confusions"]
    )


# ---------------------------------------------------------------- search

def test_a_group_scores_each_as_alone_and_averages(colours, tmp_path, monkeypatch, capsys):
    """results/short.json: each benchmark as scored alone, and the mean; the second time from the cache."""
    for bench in ("coco", "flickr30k"):
        TREES[bench](tmp_path / "elsewhere" / bench)
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})
    os.remove(tmp_path / "elsewhere" / "coco" / "val2014" / "red.jpg")      # only flickr30k errs now
    root = str(tmp_path / "elsewhere")
    code, group = colours("short", "--data-root", root)
    assert code == 0
    told = capsys.readouterr().out
    for bench in ("coco", "flickr30k"):
        alone = json.loads((tmp_path / "results" / f"{bench}.json").read_text())
        assert group["benchmarks"][bench] == alone
        assert colours(bench, "--data-root", f"{root}/{bench}")[1] == alone
    both = [group["benchmarks"][bench]["text_to_image"]["R@1"] for bench in ("coco", "flickr30k")]
    assert both == [100, 75] and group["text_to_image"]["R@1"] == 87.5
    low, high = group["ci95"]["text_to_image"]["R@1"]
    assert 50 <= low < 87.5 < high <= 100
    table = told.split("short: 2 benchmarks\n")[1].splitlines()
    assert [line.split()[0] for line in table[:3]] == ["coco", "flickr30k", "average"]
    assert "text to image R@1  87.5 [" in table[2] and table[-1].endswith("short.json")
    monkeypatch.setattr(ColourModel, "encode_image", None)
    monkeypatch.setattr(ColourWords, "encode_batches", None)
    assert colours("short", "--data-root", root) == (0, group)


def test_a_group_lacking_a_member_scores_nothing_and_names_all_that_lack(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    tree_docci(tmp_path / "data" / "docci")
    assert colours("long") == (2, None)
    told = capsys.readouterr().err.splitlines()
    lacking = [os.path.join("data", bench) for bench in ("sharegpt4v", "dci")]
    assert len(told) == 1 and f"not found: {', '.join(lacking)}; data/README.md" in told[0]
    for bench in ("sharegpt4v", "dci"):
        TREES[bench](tmp_path / "data" / bench)
    put(tmp_path / "data" / "docci" / "docci_descriptions.jsonlines", "[")
    assert colours("long") == (2, None) and "docci_descriptions.jsonlines: line 1" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_ten_of_the_papers_average(colours, tmp_path, monkeypatch, capsys):
    """Zero-shot with all of SUN397, which has that split alone among them, and by a linear probe."""
    monkeypatch.setattr(benchmarks, "CLASSES", tmp_path)    # the trees have classes of their own
    for bench in evaluate.GROUPS["classification10"].members:
        TREES[bench](tmp_path / "data" / bench)
        if bench in CLASS_FILES:
            Path(class_file(bench, tmp_path)[1]).rename(tmp_path / f"{bench}.txt")
    code, group = colours("classification10", "--split", "all")
    assert code == 0 and group["top1"] == 100 and group["ci95"]["mean_per_class"] == [100, 100]
    counts = {bench: (own["split"], own["n_images"]) for bench, own in group["benchmarks"].items()}
    assert counts.pop("sun397") == ("all", 25) and set(counts.values()) == {("test", 15)} and len(counts) == 9
    told = capsys.readouterr().out.splitlines()
    assert told[-2].startswith("    published       top1 40.3 (CC3M") and told[-3].startswith("    average")
    assert colours("classification10", "--probe")[0] == 0
    told = capsys.readouterr().out
    assert "-probe.json" in told.splitlines()[-1] and "published" not in told
    group, probe = [json.loads((tmp_path / "results" / f"classification10{kind}.json").read_text())
                    for kind in ("", "-probe")]
    assert probe["n_train"] == sum(own["n_train"] for own in probe["benchmarks"].values())
    assert runs.title(group) == "classification10 (all)" and runs.title(probe) == "classification10 (probe)"


def test_published_figures_stand_below_ones_own(colours, tmp_path, capsys):
    """Not below a file of one's own that has a benchmark's name."""
    tree_urban1k(tmp_path / "data" / "urban1k")
    assert colours("urban1k")[0] == 0
    lines = capsys.readouterr().out.splitlines()
    figures = "R@1 text to image 66.6 (CC3M), 87.9 (YFCC15M), image to text 65.3, 84.0"
    assert lines[-2] == f"    published       {figures}; Cao, Wei, Ma, CVPR 2025"
    rows = [f"{name}.jpg\ta {name} wall\n" for name in NAMES]
    put(tmp_path / "urban1k.tsv", "image\traw\n" + "".join(rows))
    own = ["--captions", "urban1k.tsv", "--images", "data/urban1k/image", "--prompts", "raw"]
    for i, name in enumerate(NAMES):
        (tmp_path / "data" / "urban1k" / "image" / f"{i + 1}.jpg").rename(
            tmp_path / "data" / "urban1k" / "image" / f"{name}.jpg")
    assert evaluate.main([*own, "--device", "cpu"]) == 0
    assert "published" not in capsys.readouterr().out


def test_search_ranks_a_folder_and_encodes_a_picture_once(colours, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my pictures"
    for name in NAMES:
        picture(folder / "deep" / f"{name}.jpg", name)
    put(folder / "broken.png", "not a picture")
    sizes, encode_image = [], ColourModel.encode_image
    monkeypatch.setattr(
        ColourModel,
        "encode_image",
        lambda self, pixels: sizes.append(len(pixels)) or encode_image(self, pixels),
    )

    def search(text, *more):
        sizes.clear()
        capsys.readouterr()
        assert evaluate.main(["--search", text, "--images", str(folder), "--device", "cpu", *more]) == 0
        best = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert not list(folder.glob(".*"))  # nothing of ours lies among the pictures
        return Path(best[0]).stem, len(best), sum(sizes)

    assert search("a blue thing, " + 99 * "as described ") == ("blue", 5, 5)  # too long for a file's name
    assert search("bleu, s'il vous plait") == ("blue", 5, 0)
    with Image.open(tmp_path / "results" / "search.png") as sheet:
        assert sheet.getpixel((16 + 420 + 60, 16 + 60))[2] > 200 > sheet.getpixel((16 + 420 + 60, 16 + 60))[0]
    picture(folder / "new.jpg", "blue")
    picture(folder / "deep" / "red.jpg", "white")
    (folder / "deep" / "green.jpg").unlink()
    assert search("a red thing")[1:] == (5, 2)
    assert search("a red thing")[1:] == (5, 0)
    (tmp_path / "results" / "cache.sqlite").unlink()
    assert search("a blue thing")[2] == 5
    monkeypatch.setattr(ColourModel, "state_dict", lambda self: {"visual.x": torch.ones(1)})
    assert search("a blue thing")[2] == 5       # another checkpoint


def test_search_by_several_texts_by_a_picture_and_by_what_is_typed(colours, tmp_path, monkeypatch, capsys):
    for name in NAMES:
        picture(tmp_path / "all" / f"{name}.jpg", name)
    picture(tmp_path / "mine.png", "white")
    command = ["--images", str(tmp_path / "all"), "--device", "cpu", "--top", "1", "--search"]

    def found(*queries):
        assert evaluate.main([*command, *queries]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [Path(line.split()[-1]).stem for line in lines if line.startswith("  ")]

    assert found("a red one", "a blue one", str(tmp_path / "mine.png")) == ["red", "blue", "white"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("green\nred\n"))
    assert found() == ["green", "red"]
    with Image.open(tmp_path / "results" / "search.png") as sheet:
        assert sheet.height > 2 * 128
    asked = []
    encode_texts = evaluate.encode_texts

    def noted(towers, texts, prompts):
        asked.append(prompts)
        return encode_texts(towers, texts, prompts)

    monkeypatch.setattr(evaluate, "encode_texts", noted)
    found("red", " ".join(["red"] * 16))
    found("red", "--prompts", "short")
    assert asked == ["raw", "long", "short"]
    # What is typed is checked when it comes; a picture asks nothing.
    monkeypatch.setattr(ColourModel, "config", ColourModel.config | {"columns": ["raw.0"]})
    assert found(str(tmp_path / "mine.png")) == ["white"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("red\n" + "red " * 16))
    assert evaluate.main(command) == 2
    assert "not on the long prompts; ask by others: --prompts raw" in capsys.readouterr().err


def test_search_without_pictures(colours, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    for name, message in (("none", "no pictures, .bmp"), ("nowhere", "nowhere: no such folder")):
        assert evaluate.main(["--search", "red", "--images", str(tmp_path / name), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert evaluate.main(["--search", "red"]) == 2 and "--images DIR" in capsys.readouterr().err


# ---------------------------------------------------------------- classes that share a name

def test_classes_of_one_name_score_as_clip_benchmark_has_it():
    """Of classes that share a name, and so a vector, the first one listed is guessed, as argmax has it."""
    rng = np.random.default_rng(9)
    classes = rng.standard_normal((40, 16)).astype(np.float32)
    names = [f"class {c}" for c in range(40)]
    for first, second in ((3, 30), (8, 9), (8, 21)):    # a pair and a triple
        classes[second], names[second] = classes[first], names[first]
    labels = np.repeat(np.arange(40), 25)
    image = (classes[labels] + 1.5 * rng.standard_normal((1000, 16))).astype(np.float32)
    got = evaluate.classification(image, classes, labels, names=names)
    logits = torch.from_numpy(image @ classes.T)
    guess = logits.argmax(1).numpy()
    assert got["top1"] == pytest.approx(100 * np.mean(guess == labels)) and 20 < got["top1"] < 90
    assert got["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(labels, guess))
    # CLIP_benchmark's top 5 comes from topk, which orders ties as it likes; the five places are the same, but
    # for a tie between the fifth and the sixth, and so is the mean of its top 1 over a pair.
    top1, top5 = accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
    assert got["top5"] == pytest.approx(100 * top5, abs=0.5) and got["top1"] == pytest.approx(
        100 * top1, abs=3
    )
    # Without the names, equal vectors are ties like any others, and count against the model.
    assert evaluate.classification(image, classes, labels)["top1"] < got["top1"] - 1


@pytest.mark.parametrize("names", [[0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 2, 2, 2], list(range(8))])
def test_a_constant_model_gains_nothing_by_shared_names(names):
    vector = np.full(576, 576 ** -0.5, np.float32)
    image, classes, labels = np.tile(vector, (80, 1)), np.tile(vector, (8, 1)), np.repeat(np.arange(8), 10)
    got = evaluate.classification(image, classes, labels, names=[str(name) for name in names])
    assert got["top1"] <= 100 / 8 and got["top5"] <= 100 * 5 / 8 and got["mean_per_class"] <= 100 / 8


def test_the_json_says_how_many_classes_share_a_name(colours, tmp_path, capsys):
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    assert colours("imagefolder")[1]["n_sharing_a_name"] == 0
    put(tmp_path / "names.txt", "red\tred\ngreen\tred\nblue\tblue\nyellow\tyellow\nwhite\twhite\n")
    result = colours("imagefolder", "--classes", str(tmp_path / "names.txt"))[1]
    assert result["n_sharing_a_name"] == 2 and "2 of the names are shared" in capsys.readouterr().out
    assert (
        result["top1"] == 60
    )  # the class green comes first: its pictures are not red, and the red ones are taken for it


# ---------------------------------------------------------------- what the checkpoint was trained on

def trained_on(monkeypatch, *columns):
    """The colour model, trained on some columns only: what it says of the others is noise."""
    monkeypatch.setattr(ColourModel, "config", ColourModel.config | {"columns": list(columns)})

    def encode_text(self, facets, prompts):
        units = torch.nn.functional.normalize(facets, dim=-1)
        for k in range(units.shape[1]):
            if f"{prompts}.{k}" not in columns:
                units[:, k] = torch.tensor([9.0, -9, 9])
        return units
    monkeypatch.setattr(ColourModel, "encode_text", encode_text)


def test_only_the_facets_that_were_trained_are_asked(colours, tmp_path, monkeypatch, capsys):
    tree_coco(tmp_path / "data" / "coco")
    assert colours("coco")[1]["columns"] == [f"long.{k}" for k in range(7)]
    assert "of 7 facets" not in capsys.readouterr().out
    trained_on(monkeypatch, "long.0", "long.3")
    code, result = colours("coco", "--facets", "--report")
    assert code == 0 and result["columns"] == ["long.0", "long.3"] and result["text_to_image"]["R@1"] == 100
    assert "trained on 2 of 7 facets of the long prompts" in capsys.readouterr().out
    assert [row["facets"] for row in result["facets"]] == [[1], [1, 4], [4], [1], [1], [4]]
    page = data_of((tmp_path / "results" / "coco.html").read_text(encoding="utf-8"))
    assert [len(tile["facets"]) for tile in page["queries"][0]["found"]] == [2] * 4
    assert page["queries"][0]["facets"] == ["the whole", "minor object"]


def test_all_columns_of_the_demo_are_named(colours, tmp_path):
    tree_demo(tmp_path / "data" / "demo")
    assert colours("demo")[1]["columns"] == flame.COLUMNS


def test_prompts_without_a_trained_facet_are_refused(colours, tmp_path, monkeypatch, capsys):
    for bench in ("demo", "xm3600", "imagefolder", "urban1k"):
        TREES[bench](tmp_path / "data" / bench)
    trained_on(monkeypatch, "long.0", "long.3")
    for bench in ("demo", "xm3600", "imagefolder"):
        assert colours(bench) == (2, None)
        error = capsys.readouterr().err.splitlines()
        assert (
            len(error) == 1
            and f"{bench} asks by the raw prompts" in error[0]
            and "--prompts long" in error[0]
        )
    assert colours("demo", "--prompts", "long")[1]["parts"]["seen"]["top1"] == 100
    capsys.readouterr()
    assert (
        evaluate.main(["--search", "red", "--images", str(tmp_path / "data" / "urban1k"), "--device", "cpu"])
        == 2
    )
    assert "--search asks by the raw prompts" in capsys.readouterr().err
    trained_on(monkeypatch, "raw.0")
    assert colours("urban1k") == (2, None) and "--prompts raw" in capsys.readouterr().err


# ---------------------------------------------------------------- one's own captions

def own(tmp_path, *flags):
    """evaluate.py --captions FILE ... -> (exit code, the result that lies under FILE's name)"""
    code = evaluate.main(["--device", "cpu", "--captions", *map(str, flags)])
    path = tmp_path / "results" / f"{Path(flags[0]).name.split('.')[0]}.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_the_demos_captions_as_ones_own_score_as_the_demo_does(colours, tmp_path):
    tree_demo(tmp_path / "data" / "demo")
    _, demo = colours("demo")
    for flags, part in (((), "long"), (("--prompts", "short"), "short")):
        code, result = own(tmp_path, "data/demo/test.tsv", *flags)
        assert code == 0 and result["bench"] == "test"
        scores = ("n_images", "n_texts", "prompts", "text_to_image", "image_to_text", "ci95")
        assert all(result[name] == demo["parts"][part][name] for name in scores)
    assert (tmp_path / "results" / "test.png").exists()


def test_several_captions_of_one_picture_and_rows_without_one(colours, tmp_path, capsys):
    for n, name in enumerate(NAMES):
        picture(tmp_path / "photos" / f"{n}.png", name)
    rows = [f"{n}.png\t{text}" for n, name in enumerate(NAMES) for text in (f"a {name} wall", f"all {name}")]
    put(tmp_path / "mine.tsv", "\n".join(["image\traw", *rows, "\tred", "gone.png\ta red one", ""]))
    code, result = own(tmp_path, "mine.tsv", "--images", "photos", "--report")
    told = capsys.readouterr().err
    assert code == 0 and result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
    assert (result["n_images"], result["n_texts"], result["skipped_images"]) == (5, 10, 1)
    assert "1 of 12 rows have no picture" in told and "gone.png" in told


def test_pictures_that_are_named_by_key(colours, tmp_path, capsys):
    for name in NAMES:
        picture(tmp_path / "mine" / f"{name}.png", name)
    put(tmp_path / "mine.csv", "key,long\n" + "".join(f"{name},A {name} wall.\n" for name in NAMES))
    assert own(tmp_path, "mine.csv")[1]["text_to_image"]["R@1"] == 100
    capsys.readouterr()
    (tmp_path / "results" / "mine.json").unlink()
    put(tmp_path / "one.csv", "key,long\nred,A red wall.\n")
    for wrong in (("mine.csv", "--images", "results"), ("none.csv",), ("mine.csv", "--split", "val"),
                  ("one.csv", "--images", "mine")):
        assert own(tmp_path, *wrong) == (2, None)
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_are_named_as_stores_are(colours, tmp_path, monkeypatch):
    """A folder that one stands in, too, as embed.py has it."""
    for name in NAMES:
        picture(tmp_path / "my photos" / f"{name}.png", name)
        put(tmp_path / "my photos" / f"{name}.txt", f"A {name} wall.")
    checkpoint = ["--checkpoint", str(tmp_path / "out/run"), "--device", "cpu"]
    monkeypatch.chdir(tmp_path / "my photos")
    assert evaluate.main(["--captions", ".", "--out", str(tmp_path / "results"), *checkpoint]) == 0
    result = json.loads((tmp_path / "results" / "my photos.json").read_text())
    assert result["bench"] == "my photos" and result["text_to_image"]["R@1"] == 100
    named = evaluate.settings(["--captions", "cc3m/x-{0000..0007}.tar", "--device", "cpu"])
    assert named.bench == "x"
    own, bench = (evaluate.settings([*one, "--device", "cpu"]) for one in
                  (["--captions", "coco.tsv"], ["--bench", "coco"]))
    assert evaluate.result_path(own) != evaluate.result_path(bench)


# ---------------------------------------------------------------- bad settings, Ctrl-C

@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--bench", "nowhere"], "--bench"),
        ([], "give --bench NAME"),
        (["--bench", "coco", "--device", "mps"], "--device mps"),
        (["--bench", "coco", "--device", "cuda:99"], "--device cuda:99"),
        (["--bench", "coco", "--facets", "7..1"], "--facets"),
        (["--words", "x.png", "--bench", "coco"], "give --bench NAME"),
        (["--bench", "coco", "--nonsense"], "--nonsense"),
        (["--bench", "coco", "--split", "all"], "--split all: coco has no such split"),
        (["--bench", "sun397", "--split", "val"], "--split val: sun397 has no such split"),
        (["--bench", "long", "--split", "val"], "--split val: long has no such split"),
        (["--captions", "coco.tsv", "--split", "val"], "--split val: coco has no such split"),
        (["--bench", "sun397", "--split", "all", "--probe"], "--probe: it would train on pictures"),
        (["--bench", "urban1k", "--all-captions"], "--all-captions: urban1k leaves no caption out"),
        (["--captions", "coco.tsv", "--all-captions"], "--all-captions: coco leaves no caption out"),
        (["--bench", "long", "--probe"], "--probe: long has no classes"),
        (["--captions", "coco.tsv", "--data-root", "x"], "--data-root: where a benchmark lies"),
        (["--search", "red", "--images", ".", "--report"], "--report: --search writes no page"),
        (["--search", "", "--images", "."], "--search: a text is empty"),
        (["--bench", "coco", "--top", "3"], "--top: how many pictures --search shows"),
        (["--report", "same", "--out", "elsewhere"], "leave --out out"),
        (["--report", "--facets"], "leave --facets out"),
        (["--words", "x.png", "--prompts", "raw"], "--prompts: no text is asked"),
        (["--bench", "coco", "--open-clip", "ViT-B-32", "--llm", "llm"], "--open-clip has no"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_read(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(wrong) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("evaluate.py: ") and message in error[0]
    assert not list(tmp_path.iterdir())


def test_errors_name_the_script_and_an_interrupt_ends_in_one_line(colours, monkeypatch, capsys):
    assert colours("coco")[0] == 2
    assert capsys.readouterr().err.startswith("evaluate.py: data")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "read", interrupted)
    assert colours("coco")[0] == 130
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("evaluate.py: interrupted")


@pytest.mark.parametrize(
    "text", ["[]", "null", "", '{"step": "x"}', '{"training": []}', "{", '{"step": true}']
)
def test_a_damaged_checkpoint_config_is_named(tmp_path, text):
    put(tmp_path / "run" / "config.json", text)
    put(tmp_path / "run" / "model.safetensors", "")
    with pytest.raises(flame.InputError, match=r"config.json: .*--checkpoint"):
        evaluate.newest_checkpoint(tmp_path)


@pytest.mark.parametrize("columns", ["long.0", {}, [], [3], ["long.9"]])
def test_columns_that_are_none_are_refused(real, tmp_path, capsys, columns):
    shutil.copytree(real / "out" / "tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["model"]["columns"] = columns
    put(tmp_path / "tiny" / "config.json", json.dumps(config))
    root, llm = real / "data" / "demo", real / "data" / "demo" / "llm"
    known = ["--data-root", str(root), "--llm", str(llm), "--out", str(tmp_path / "results")]
    assert evaluate.main(["--bench", "demo", "--checkpoint", str(tmp_path / "tiny"), *known]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "columns" in error and "config.json" in error


# ---------------------------------------------------------------- what is no picture, no file, no cache

def test_a_pipe_in_a_tars_place_is_not_waited_for(colours, tmp_path, capsys):
    (tmp_path / "data/coco/test").mkdir(parents=True)
    os.mkfifo(tmp_path / "data/coco/test/0.tar")
    assert colours("coco") == (2, None)
    assert "0.tar: not a regular file" in capsys.readouterr().err


def test_a_pipe_among_the_pictures_is_left_out(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    folder = tmp_path / "data" / "urban1k" / "image"
    (folder / "1.jpg").unlink()
    os.mkfifo(folder / "1.jpg")
    code, result = colours("urban1k")
    assert (
        code == 0 and result["skipped_images"] == 1 and "1.jpg: not a regular file" in capsys.readouterr().err
    )
    assert evaluate.main(["--search", "blue", "--images", str(folder), "--device", "cpu"]) == 0
    assert "1 of 5 pictures cannot be read" in capsys.readouterr().err


def test_names_that_no_file_can_have_are_left_out(colours, tmp_path, capsys):
    tree_docci(tmp_path / "data" / "docci")
    path = tmp_path / "data" / "docci" / "docci_descriptions.jsonlines"
    for name in ("a\0b.jpg", "x" * 5000):
        entry = {"split": "test", "image_file": name, "description": "A red wall."}
        path.write_text(path.read_text() + json.dumps(entry) + "\n")
    code, result = colours("docci")
    assert code == 0 and (result["n_images"], result["skipped_images"]) == (4, 2)
    assert "2 of 6 pictures cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("bench, file", [("sugarcrepe", "add_obj.json"), ("winoground", "examples.jsonl")])
def test_a_benchmark_without_rows_is_one_line(colours, tmp_path, capsys, bench, file):
    TREES[bench](tmp_path / "data" / bench)
    put(tmp_path / "data" / bench / file, "{}" if file.endswith("json") else "")
    assert colours(bench) == (2, None)
    assert len(capsys.readouterr().err.splitlines()[-1:]) == 1


def test_a_pipe_in_place_of_a_file_is_refused(colours, tmp_path, capsys):
    tree_coco(tmp_path / "data" / "coco")
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    (tmp_path / "data" / "coco" / "dataset_coco.json").unlink()
    os.mkfifo(tmp_path / "data" / "coco" / "dataset_coco.json")
    os.mkfifo(tmp_path / "pipe")
    for more in (["coco"], ["imagefolder", "--classes", str(tmp_path / "pipe")]):
        assert colours(*more)[0] == 2
        assert "not a regular file" in capsys.readouterr().err
    assert evaluate.main(["--words", str(tmp_path / "pipe"), "--device", "cpu"]) == 2
    assert "pipe: not a regular file" in capsys.readouterr().err


def test_thin_and_vanished_pictures_end_nothing(colours, tmp_path, monkeypatch):
    """A picture of 1 x 3,000 has no width left when it is made small; another is gone when it is drawn."""
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    Image.new("RGB", (1, 3000), COLOURS["red"]).save(root / "image" / "1.jpg")
    encode_texts = ColourWords.encode_batches

    def and_remove(self, texts, prompts):
        (root / "image" / "2.jpg").unlink()
        return encode_texts(self, texts, prompts)
    monkeypatch.setattr(ColourWords, "encode_batches", and_remove)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    code, result = colours("urban1k", "--report")
    assert code == 0 and result["text_to_image"]["R@1"] == 100
    page = data_of((tmp_path / "results" / "urban1k.html").read_text(encoding="utf-8"))
    assert len(page["pictures"]) == 5
    for url in page["pictures"].values():
        small = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        assert min(small.size) >= 1 and max(small.size) <= 160


def test_a_cache_that_holds_something_else_is_no_obstacle(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    first = colours("urban1k")[1]
    with sqlite3.connect(tmp_path / "results" / "cache.sqlite") as database:
        database.execute("UPDATE cache SET value = x'00'")
    assert colours("urban1k")[1] == first
    with sqlite3.connect(tmp_path / "results" / "cache.sqlite") as database:
        database.execute("UPDATE cache SET value = 'text'")
    assert colours("urban1k")[1] == first


def test_a_full_cache_disk_is_one_line(colours, tmp_path, monkeypatch, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    colours("urban1k")
    with sqlite3.connect(tmp_path / "results" / "cache.sqlite") as database:
        database.execute("DELETE FROM cache")
        refusal = "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        database.execute(f"CREATE TRIGGER full BEFORE INSERT ON cache {refusal}")
    capsys.readouterr()
    assert colours("urban1k")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("evaluate.py: ") and "cache.sqlite: database or disk is full" in error


def test_bars_count_what_is_asked_and_are_left_out_where_nothing_is(colours, tmp_path, capsys):
    tree_urban1k(tmp_path / "data" / "urban1k")
    colours("urban1k")
    error = capsys.readouterr().err
    assert "5/5 [" in error and "images/s]" in error and "texts/s]" in error
    colours("urban1k")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- what is drawn

def test_the_sheet_shows_the_right_picture_where_it_is_not_among_the_best(tmp_path):
    for name in NAMES:
        for i in range(2):
            picture(tmp_path / f"{name}{i}.png", name)
    pictures = sorted(tmp_path.iterdir())
    text = np.linspace(1, 0.1, 10)[None]
    shown = report.Shown(["some text"], text, pictures, np.eye(10), np.array([7]), np.arange(10), "long")
    rows = [report.found_for(shown, 0, rank=7)]
    sheet = np.array(report.draw_sheet(rows, pictures))
    green, red = ((sheet == colour).all(-1).any(0).nonzero()[0] for colour in ((0, 168, 80), (216, 48, 64)))
    assert len(red) and len(green) and green.min() > red.max()      # behind the five wrong ones
    right = np.array(Image.open(pictures[7]).convert("RGB"))[0, 0]
    assert tuple(sheet[16 + 64, int(green.mean())]) == tuple(right)


def test_a_damaged_font_that_opens_and_does_not_draw_is_passed_over():
    class Damaged:
        def getmask(self, text):
            raise OSError("nested DEFS")
    assert not fonts.has(Damaged(), "a")


@pytest.mark.parametrize("text, script", [
    ("Ein grüner Käfer läuft über die Straße — schön!", "LATIN"),
    ("一只红色的鸟", "CJK"),
    ("طائر أحمر", "ARABIC"),
    ("a bird 🐦 and a 🚗", "symbols and emoji")])
def test_texts_of_any_script_are_drawn_or_named(text, script, monkeypatch, capsys):
    """No box is drawn in silence: each character has a font, or one line says which script has none."""
    pictures = [np.zeros((8, 8), np.uint8)] * 2
    shown = report.Shown([text] * 2, np.eye(2), pictures, np.eye(2), np.arange(2), np.arange(2), "long")
    rows = [report.found_for(shown, query, rank=0) for query in (0, 1)]
    for files in (fonts.font_files(), []):      # the fonts of this machine; none at all
        monkeypatch.setattr(fonts, "font_files", lambda: files)
        fonts.font_for.cache_clear()
        fonts.missing_scripts.clear()
        report.draw_sheet(rows, pictures)
        error = capsys.readouterr().err
        boxes = [char for part, font in fonts.runs(text, 14) for char in part if not fonts.has(font, char)]
        assert bool(boxes) == bool(error) and len(error.splitlines()) == len(fonts.missing_scripts)
        assert not error or script in error and "install a font" in error
        assert error or files
    fonts.font_for.cache_clear()


def test_long_texts_are_broken_where_they_have_no_spaces():
    """At about 388 pixels; the column of the sheet has 420."""
    for text in ("字" * 400, "word " * 300, "x" * 5000, "a" * 50 + " b"):
        lines = fonts.wrapped(text, 14, 388)
        assert len(lines) <= 14 and max(fonts.width(line.removesuffix(" …"), 14) for line in lines) <= 420
        assert len(lines) < 14 or lines[-1].endswith("…")


def test_the_facet_plot_shows_every_subset(tmp_path, monkeypatch):
    rng = np.random.default_rng(6)
    facets, image = (
        rng.standard_normal((30, 4, 8)).astype(np.float32),
        rng.standard_normal((30, 8)).astype(np.float32),
    )
    monkeypatch.setitem(
        sys.modules, "matplotlib.pyplot", None
    )  # its state is global: importing it would fail
    figure = plots.draw_facets(
        evaluate.ablation(facets, image, np.arange(30), "cosine", numbers=[1, 2, 4, 6])
    )
    several, single = figure.axes
    assert [label.get_text() for label in several.get_xticklabels()] == ["1", "2", "3", "4"]
    assert [label.get_text().replace("\n", " ") for label in single.get_xticklabels()] == [
        "the whole",
        "main object",
        "minor object",
        "action",
    ]
    assert len(single.patches) == 8 and len(several.lines) >= 2
    figure.savefig(tmp_path / "facets.png")


def test_without_matplotlib_the_numbers_stay_and_one_line_says_so(colours, tmp_path, monkeypatch, capsys):
    tree_coco(tmp_path / "data" / "coco")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots.tell_missing.cache_clear()
    code, result = colours("coco", "--facets")
    assert (
        code == 0 and len(result["facets"]) == 21 and not (tmp_path / "results" / "coco-facets.png").exists()
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    assert len(lines) == 1 and "pip install matplotlib" in lines[0]


# ---------------------------------------------------------------- the real model, through the command line

def command(folder, *more):
    env = {key: value for key, value in os.environ.items() if key != "FLAME_LLM"}
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *more],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("prompts", ["long", "raw"])
def test_a_text_dotted_with_an_image_is_the_mean_cosine(real, prompts):
    model = flame.load(real / "out" / "tiny")
    torch.manual_seed(1)
    model.text.mean.copy_(
        torch.randn_like(model.text.mean) * 0.1
    )  # a text projection that differs between columns
    encoder = flame.TextEncoder(
        real / "data" / "demo" / "llm", "cpu", torch.float32, budget=400
    )  # several packed rows
    image = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    texts = ["a", "A much longer text about nothing, that goes on for a while.", "b b", "a"]
    got = evaluate.encode_texts(towers(model, encoder), texts, prompts) @ image.numpy().T
    for row, text in zip(got, texts):
        with torch.inference_mode():
            expected = flame.similarity(image, model.encode_text(encoder.encode([text], prompts), prompts))[0]
        assert row == pytest.approx(
            expected.numpy(), abs=1e-4
        )  # texts alone and in company differ by rounding


def test_an_llm_of_another_width_is_refused(real, tmp_path, tiny_llm):
    """By its width, where the checkpoint, as the authors', does not name its LLM."""
    shutil.copytree(real / "out" / "tiny", tmp_path / "silent")
    config = json.loads((tmp_path / "silent" / "config.json").read_text())
    config["llm"]["fingerprint"] = None
    put(tmp_path / "silent" / "config.json", json.dumps(config))
    done = command(
        real, "--bench", "demo", "--llm", tiny_llm, "--checkpoint", tmp_path / "silent", "--out", tmp_path
    )
    assert done.returncode == 2 and "48 dimensions" in done.stderr and "Traceback" not in done.stderr


def test_command_line_equals_one_by_one(real):
    """The JSON of the real command against flame.similarity of one picture and one caption at a time."""
    done = command(real, "--bench", "demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {Path('out/tiny')}" in done.stdout and f"LLM {Path('data/demo/llm')}" in done.stdout
    result = json.loads((real / "results" / "demo.json").read_text())

    model = flame.load(real / "out" / "tiny")
    encoder = flame.TextEncoder(real / "data" / "demo" / "llm", "cpu", flame.default_dtype("cpu"), layer=2)

    def score(path, text, prompts):
        with torch.inference_mode(), Image.open(path) as image:
            return flame.similarity(
                model.encode_image(model.preprocess(image)[None]),
                model.encode_text(encoder.encode([text], prompts), prompts),
            ).item()

    scores = [
        [
            score(
                real / "data" / "demo" / "images" / "test" / f"{i}.png",
                f"A {t} thing, in some detail.",
                "long",
            )
            for i in NAMES
        ]
        for t in NAMES
    ]
    gaps = (
        np.diff(np.sort(np.array(scores), axis=1), axis=1).min(),
        np.diff(np.sort(np.array(scores), axis=0), axis=0).min(),
    )
    assert min(gaps) > 1e-5, "too close for rounding not to matter: choose another seed"
    ranks = [slow_rank(scores[t], [t == i for i in range(5)]) for t in range(5)]
    assert result["parts"]["long"]["text_to_image"]["R@1"] == 100 * np.mean([r < 1 for r in ranks])
    back = [slow_rank([row[i] for row in scores], [t == i for t in range(5)]) for i in range(5)]
    assert result["parts"]["long"]["image_to_text"]["R@1"] == 100 * np.mean([r < 1 for r in back])

    names = ("blue", "green", "red")
    hits = []
    for n in names:
        row = [
            score(real / "data" / "demo" / "images" / "objects" / f"{n}1.png", f"{name} clip art", "raw")
            for name in names
        ]
        hits.append(np.argmax(row) == names.index(n))
    assert result["parts"]["seen"]["top1"] == pytest.approx(
        100 * np.mean(hits)
    )  # an object's pictures are alike here


def test_another_llm_is_refused_through_the_command_line(real, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in (real / "data" / "demo" / "llm").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    put(other / "config.json", json.dumps(config | {"rms_norm_eps": 2e-5}))
    done = command(real, "--bench", "demo", "--llm", str(other), "--out", str(tmp_path / "results"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "results").exists()
    assert len(done.stderr.splitlines()) == 1 and "trained with another LLM (tiny)" in done.stderr


@pytest.mark.parametrize(
    "size, pool_first, linear", [(32, True, False), (32, False, True), (24, False, False)]
)
def test_patch_states_undo_the_text_projection(size, pool_first, linear):
    torch.manual_seed(0)
    model = flame.Flame(
        {
            "image_size": size,
            "patch_size": 8,
            "width": 16,
            "layers": 1,
            "heads": 2,
            "text_dim": 12,
            "projector_hidden": 20,
            "pool_first": pool_first,
            "text_rank": 0 if linear else 5,
            "text_mapped": ["long.0"] if linear else [],
            "columns": flame.COLUMNS,
        }
    ).eval()
    text, c = model.text, flame.COLUMNS.index("long.0")
    if linear:
        text.up.data = torch.randn(1, 12, 12)
    else:
        text.basis[c], text.gain[c], text.rest[c] = (
            torch.linalg.qr(torch.randn(12, 5))[0],
            torch.rand(5) * 9,
            0.5,
        )
    matrix = (
        (torch.eye(12) + text.up.data[0]).T
        if linear
        else 0.5 * torch.eye(12) + text.basis[c] @ text.gain[c].diag() @ text.basis[c].T
    )
    pixels, side = torch.randn(3, size, size), size // 8
    got = words.patch_states(model, pixels)
    with torch.inference_mode():
        tokens = model.visual(pixels[None])[0, 1:].reshape(side, side, 16)
        for y in range(len(got)):
            for x in range(len(got)):
                cell = (
                    tokens[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    if side % 2 == 0
                    else tokens[y : y + 1, x : x + 1]
                ).reshape(-1, 16)
                z = model.mm(cell.mean(0)) if pool_first else model.mm(cell).mean(0)
                torch.testing.assert_close(matrix @ got[y, x], z, rtol=1e-3, atol=1e-4)
    assert len(got) == (side // 2 if side % 2 == 0 else side)


def test_patch_states_of_a_projection_that_erases(real):
    """What agreement left out cannot be brought back: the rest is weighed by it once more."""
    model = flame.load(real / "out" / "tiny")
    c = flame.COLUMNS.index("long.0")
    D = model.config["text_dim"]
    model.text = flame.TextProjection(D, rank=D)
    model.text.rest[c] = 1  # nothing done
    pixels = torch.randn(3, model.config["image_size"], model.config["image_size"])
    plain = words.patch_states(model, pixels)
    text = model.text
    text.rest[c] = 0
    text.basis[c] = torch.linalg.qr(torch.randn(D, D))[0]
    text.gain[c, :3] = torch.tensor([1, 0.5, 0.1])
    A = text.basis[c] @ text.gain[c].diag() @ text.basis[c].T
    torch.testing.assert_close(words.patch_states(model, pixels), plain @ A)


def test_words_of_a_picture(real, tmp_path):
    image = real / "data" / "demo" / "images" / "test" / f"{NAMES[0]}.png"
    done = command(real, "--words", image, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "words.png") as drawn:
        assert drawn.size == (720, 720)
    model, tokenizer = flame.load(real / "out" / "tiny"), flame.load_tokenizer(real / "data" / "demo" / "llm")
    norm, unembedding = flame.load_unembedding(real / "data" / "demo" / "llm")
    names = {i: tokenizer.decode([i]) for i in range(len(unembedding))}
    names = {
        i: name.strip()
        for i, name in names.items()
        if name.startswith(" ") and name[1:].isalpha() and len(name) > 3
    }
    with Image.open(image) as picture:
        states = words.patch_states(model, model.preprocess(picture))
    expected = [
        max(names, key=lambda i: (state * norm @ unembedding[i]).item()) for state in states.flatten(0, 1)
    ]
    assert done.stdout.split("\n", 1)[1].split("->")[0].split() == [names[i] for i in expected]
    put(tmp_path / "no.png", "text")
    assert (
        (done := command(real, "--words", tmp_path / "no.png", "--out", tmp_path)).returncode == 2
        and "no.png" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_help_fits_one_screen(real):
    lines = command(real, "--help").stdout.splitlines()
    assert 5 < len(lines) <= 32 and max(map(len, lines)) <= 80
