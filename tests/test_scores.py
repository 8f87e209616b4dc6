"""evaluate.py, data/intervals.py and data/towers.py. What is promised:

* Recall@K and accuracy are what a slow sort says, ties against the model, and what clip_benchmark says; a
  constant model scores at most chance; the whole matrix is never in memory
* the interval is that of a bootstrap over groups written as a loop; --compare gives the paired difference and
  refuses results of other queries
* what a state or vector depends on is in its file's name: the next checkpoint runs the LLM no more; a damaged
  file is made anew
* a score is flame.similarity of one picture and one text at a time; only trained facets are asked
* the demo's parts, one's own captions, facets, open_clip models, the authors' pooling
* a closed pipe is no error (bad settings: test_refusals.py)

test_benchmarks.py has the small trees and the model that knows colours.
"""
# ruff: noqa: F811  (the fixture of test_benchmarks.py is imported, and named again by who wants it)
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
from data import files, intervals, released, towers
from data.checkpoint import identity
from data.pictures import open_picture
from data.store import llm_fingerprint
from test_benchmarks import (
    FINISHED, NAMES, TREES, ColourModel, ColourWords, colours, picture, put, refusal,  # noqa: F401
    tree_demo, tree_urban1k, tree_xm3600)

RECALL_AT = (1, 5, 10)
WAYS = ("text_to_image", "image_to_text")


# ---------------------------------------------------------------- metrics

def slow_rank(scores, right):
    """Place of the best right answer when equal scores are sorted wrong ones first, by python's own sort."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return next((place for place, i in enumerate(order) if right[i]), len(scores))


def slow_retrieval(scores, owner):
    """scores [texts][images] -> as evaluate.retrieval()"""
    images = len(scores[0])
    ways = {"text_to_image": [slow_rank(row, [owner[t] == i for i in range(images)])
                              for t, row in enumerate(scores)],
            "image_to_text": [slow_rank([row[i] for row in scores], [own == i for own in owner])
                              for i in sorted(set(owner))]}
    return {way: {f"R@{k}": pytest.approx(100 * np.mean([rank < k for rank in ranks])) for k in RECALL_AT}
            for way, ranks in ways.items()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), texts=st.integers(1, 40), images=st.integers(1, 25),
       dim=st.integers(1, 4))
def test_retrieval_equals_slow_twin_with_ties(seed, texts, images, dim):
    rng = np.random.default_rng(seed)
    text, image = (rng.integers(-2, 3, (n, dim)) for n in (texts, images))  # exact products, many ties
    owner = rng.integers(0, images, texts).tolist()
    assert evaluate.retrieval(text, image, owner) == slow_retrieval((text @ image.T).tolist(), owner)


def accuracies(image, classes, labels, names=None):
    """As score_classes has them, percent; without names they differ."""
    hits = evaluate.hits_of_classes(image, classes, labels, list(names or range(len(classes))))
    return {name: 100 * shares.mean() for name, shares in hits.items()}


def test_retrieval_equals_clip_benchmark():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((60, 16)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(60), 5))
    text = (image[owner] + 2.5 * rng.standard_normal((300, 16))).astype(np.float32)
    got = evaluate.retrieval(text, image, owner)
    scores, pairs = torch.from_numpy(text @ image.T), torch.from_numpy(owner[:, None] == np.arange(60))
    for k in RECALL_AT:
        for way, theirs in (("text_to_image", recall_at_k(scores, pairs, k)),
                            ("image_to_text", recall_at_k(scores.T, pairs.T, k))):
            assert got[way][f"R@{k}"] == pytest.approx(100 * (theirs > 0).float().mean().item(), abs=1e-4)
    assert 10 < got["text_to_image"]["R@1"] < 90    # neither hopeless nor perfect


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 40), classes=st.integers(1, 12))
def test_classification_equals_slow_twin_with_ties(seed, images, classes):
    rng = np.random.default_rng(seed)
    image, names = rng.integers(-2, 3, (images, 3)), rng.integers(-2, 3, (classes, 3))
    labels = rng.integers(0, classes, images)
    scores = image @ names.T
    ranks = np.array([slow_rank(scores[i], [labels[i] == c for c in range(classes)]) for i in range(images)])
    per_class = np.mean([np.mean(ranks[labels == c] < 1) for c in set(labels)])
    shares = {"top1": np.mean(ranks < 1), "top5": np.mean(ranks < 5), "mean_per_class": per_class}
    assert accuracies(image, names, labels) == pytest.approx(
        {name: 100 * share for name, share in shares.items()})


def test_classes_of_one_name_score_as_clip_benchmark_has_it():
    """Of classes that share a name, and so a vector, the first one listed is guessed, as argmax has it."""
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
        guess = logits.argmax(1).numpy()
        assert got["top1"] == pytest.approx(100 * np.mean(guess == labels)) and 20 < got["top1"] < 90
        assert got["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(labels, guess))
        # topk orders ties as it likes: its top 5 may differ by a tie between the fifth and the sixth
        _, top5 = accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
        assert got["top5"] == pytest.approx(100 * top5, abs=0.5 if shared else 1e-6)
    # Without the names, equal vectors are ties like any others, and count against the model.
    assert accuracies(image, classes, labels)["top1"] < got["top1"] - 1


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
    for names in (None, [c // 2 for c in range(images)]):
        got = accuracies(text, image, owner, names)
        assert got["top1"] <= 100 / images and got["mean_per_class"] <= 100 / images
        assert got["top5"] <= 100 * min(1, 5 / images)


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
    good = np.eye(3, dtype=np.float32)
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 2] = value
        for score in (evaluate.retrieval, accuracies):
            for vectors in ((bad, good), (good, bad)):
                with pytest.raises(flame.InputError, match="vectors are NaN or infinite"):
                    score(*vectors, np.arange(3))


# ---------------------------------------------------------------- intervals

def interval(hits, groups=None):
    """(mean, low, high) of hits [N]; groups: what is resampled, the hits themselves without any."""
    groups = np.unique(np.arange(len(hits)) if groups is None else groups, return_inverse=True)[1]
    rows = intervals.samples(np.asarray(hits)[:, None], groups, groups.max() + 1)
    return rows[0, 0], *intervals.ends(rows)[0]


def test_bootstrap_equals_its_loop():
    rng = np.random.default_rng(5)
    groups, hits = rng.integers(0, 30, 200), rng.random((200, 3)) < 0.3
    draws, means = np.random.default_rng(intervals.SEED), []
    for _ in range(intervals.RESAMPLES):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(30, size=30)])
        means.append(100 * hits[rows].mean(0))
    got = intervals.samples(hits, groups, 30)
    assert got[0] == pytest.approx(100 * hits.mean(0)) and got[1:] == pytest.approx(np.array(means))
    assert np.array(intervals.ends(got)) == pytest.approx(np.percentile(means, [2.5, 97.5], axis=0).T)
    # On the same groups the draws are the same.
    assert got + intervals.samples(~hits, groups, 30) == pytest.approx(np.full((1001, 3), 100))


def test_two_results_are_compared_on_the_same_queries_alone(colours, tmp_path, monkeypatch, capsys):
    """Five texts; one run errs on red, the other on none: the difference is that of the text that differs."""
    def corpus(count):
        rows = []
        for n in range(count):
            picture(tmp_path / f"photos/{n}.png", NAMES[n % 5])
            rows.append(f"photos/{n}.png\ta {NAMES[n % 5]} wall, number {n}\n")
        put(tmp_path / "mine.tsv", "image\tlong\n" + "".join(rows))

    def score(out):
        flags = "--captions", "mine.tsv", "--images", tmp_path, "--facets", "--out", out
        return colours("mine", *flags)[0]

    corpus(5)
    assert score("a") == 0
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})
    shutil.rmtree(tmp_path / "a/cache")     # the lie is the LLM's
    shutil.copytree(tmp_path / "photos", tmp_path / "it's/photos")
    shutil.copy(tmp_path / "mine.tsv", tmp_path / "it's")
    assert colours("mine", "--captions", "it's/mine.tsv", "--out", "b")[0] == 0    # folders may differ
    capsys.readouterr()
    assert colours("", "--compare", "a/mine.json", "b/mine.json")[0] == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("text_to_image"))
    figures = line.replace("[", "").replace("]", "").replace(",", "").split()[1:]
    paired = interval(np.arange(5) < 1)     # one text of five differs
    assert [float(x) for x in figures] == pytest.approx([100, 100, 100, *interval(np.arange(5) > 0), *paired],
                                                        abs=0.05)
    with np.load("b/mine.npz") as kept:     # every query's hits, within the first 1, 5, 10 of five
        assert kept["hits of text_to_image"].tolist() == [[n > 0, True, True] for n in range(5)]
    corpus(4)
    assert score("b") == 0
    capsys.readouterr()
    assert colours("", "--compare", "a/mine.json", "b/mine.json")[0] == 2
    assert "a/mine.json and b/mine.json: of other queries" in refusal(capsys)
    put(tmp_path / "b/mine.npz", "none")
    assert colours("", "--compare", "a/mine.json", "b/mine.json")[0] == 2 and "mine.npz" in refusal(capsys)
    TREES["imagefolder"](tmp_path / "walls")
    for out in ("a", "b"):      # in the first a picture more can be read
        assert colours("imagefolder", "--data-root", "walls", "--out", out)[0] == 0
        put(tmp_path / "walls/red/1.png", "none")
    capsys.readouterr()
    assert colours("", "--compare", "a/imagefolder.json", "b/imagefolder.json")[0] == 2
    assert "of other queries" in refusal(capsys)


# ---------------------------------------------------------------- caches

@pytest.fixture
def asked(monkeypatch):
    """Counts what the towers are asked: asked() -> (texts, pictures) since the last call."""
    counts = [0, 0]

    def counting(which, method):
        def count(self, batch, *more):
            counts[which] += len(batch)
            return method(self, batch, *more)
        return count

    def since():
        numbers = tuple(counts)
        counts[:] = 0, 0
        return numbers
    monkeypatch.setattr(ColourWords, "encode_batches", counting(0, ColourWords.encode_batches))
    monkeypatch.setattr(ColourModel, "encode_image", counting(1, ColourModel.encode_image))
    return since


def test_the_cache_knows_what_a_state_depends_on(colours, asked, tmp_path, monkeypatch):
    root = tmp_path / "data/urban1k"
    tree_urban1k(root)

    def new(*more):
        assert colours("urban1k", *more)[0] == 0
        return asked()

    assert new() == (5, 5) and new() == (0, 0)
    assert new("--prompts", "raw") == (5, 0)
    put(root / "caption/1.txt", "A blue car.")
    picture(root / "image/2.jpg", "white")
    assert new() == (5, 5)
    monkeypatch.setattr(ColourModel, "state_dict", lambda self: {"visual.x": torch.ones(1)})
    assert new() == (0, 5)
    monkeypatch.setattr(towers, "llm_fingerprint", lambda folder: "g")
    llm = ColourModel.config["llm"] | {"fingerprint": "g"}
    monkeypatch.setattr(ColourModel, "config", ColourModel.config | {"llm": llm})
    assert new() == (5, 5)      # of another LLM, another checkpoint
    monkeypatch.setitem(flame.PROMPTS, "long", flame.PROMPTS["long"]._replace(prefix="A {}"))
    assert new() == (5, 0) and new() == (0, 0)


def test_a_damaged_file_of_the_cache_is_made_anew(colours, asked, tmp_path):
    tree_urban1k(tmp_path / "data/urban1k")
    first = colours("urban1k")[1]
    asked()
    for damage in (b"no array, and longer than the header of one" * 9, None):
        for path in (tmp_path / "results/cache").iterdir():
            path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
        assert colours("urban1k") == (0, first) and asked() == (5, 5)


# ---------------------------------------------------------------- scorers, with a model that knows colours

def test_all_parts_of_the_demo(colours, tmp_path, monkeypatch, capsys):
    tree_demo(tmp_path / "data/demo")
    monkeypatch.setattr(ColourWords, "lies", {"vert": "blue", "yellow": "white"})
    code, result = colours("demo")
    parts = result["parts"]
    assert code == 0 and result["columns"] == flame.COLUMNS
    assert list(parts) == "long short raw reworded seen unseen multilingual synonyms".split()
    assert result["text_to_image"] == parts["long"]["text_to_image"] and result["n_images"] == 5
    assert [parts[p]["prompts"] for p in parts] == ["long", "short", "raw", "raw short long"] + ["raw"] * 4
    for part in ("long", "short", "raw", "reworded"):
        assert parts[part]["text_to_image"]["R@1"] == 80            # yellow finds the white picture
    assert (parts["seen"]["n_images"], parts["seen"]["n_classes"], parts["seen"]["top1"]) == (6, 3, 100)
    # yellow's name says white: a yellow picture finds both names equally far, a white one finds them equal, a
    # tie, wrong
    assert [parts["unseen"][name] for name in ("n_images", "n_classes", "chance", "top1")] == [4, 2, 50, 0]
    french = parts["multilingual"]      # English, which was trained, is not among the languages
    assert french["top1"] == pytest.approx(100 / 3)     # vert says blue: green is wrong, blue a tie
    assert french["ci95"]["top1"] == [0, 100]       # over 3 objects; over their 6 pictures it is less
    assert [parts["synonyms"][name] for name in ("n_images", "n_classes", "top1", "top5")] == [6, 3, 100, 100]
    out = capsys.readouterr().out
    assert "unseen: 4 pictures, 2 names, chance 50.0" in out
    monkeypatch.setattr(evaluate, "GALLERY", 1)     # unseen objects, in as many galleries as there are
    monkeypatch.setattr(evaluate, "DEMO_TEMPLATE", "a white {}")    # all names are white: a tie, wrong
    result = colours("demo", "--split", "val")[1]
    assert result["split"] == "val" and result["parts"]["unseen"]["chance"] == 100
    assert [result["parts"][part]["top1"] for part in ("seen", "synonyms", "multilingual")] == [0, 0, 0]


def test_ablation_equals_one_subset_at_a_time():
    rng = np.random.default_rng(6)
    owner = rng.integers(0, 12, 30)
    image = rng.standard_normal((12, 8))
    facets = rng.standard_normal((30, 3, 8)) + 1.5 * image[owner][:, None] * np.array([1, 0, 2])[:, None]
    scores = evaluate.ablation(facets.astype(np.float32), image, owner, "long", [0, 1, 3])
    rows = intervals.with_intervals(scores, {})
    assert list(rows) == [f"long facets {some}" for some in "1 1,2 1,2,4 1,4 2,4 2 4".split()]
    for name, row in rows.items():
        text = facets[:, [[1, 2, 4].index(int(f)) for f in name.split()[-1].split(",")]].mean(1)
        assert {way: row[way] for way in WAYS} == evaluate.retrieval(text, image, owner)
    assert len({row["text_to_image"]["R@1"] for row in rows.values()}) > 4


def test_only_the_facets_that_were_trained_are_asked(colours, tmp_path, monkeypatch, capsys):
    tree_urban1k(tmp_path / "data/urban1k")
    tree_xm3600(tmp_path / "data/xm3600")
    columns = ["long.0", "long.3"]

    def encode_text(self, facets, prompts):
        facets[:, [k for k in range(facets.shape[1]) if f"{prompts}.{k}" not in columns]] = torch.nan
        return torch.nn.functional.normalize(facets, dim=-1)
    monkeypatch.setattr(ColourModel, "encode_text", encode_text)
    monkeypatch.setattr(ColourModel, "config", ColourModel.config | {"columns": columns})
    code, result = colours("urban1k", "--facets")
    assert code == 0 and result["columns"] == ["long.0", "long.3"] and result["text_to_image"]["R@1"] == 100
    assert list(result["facets"]) == ["long facets 1", "long facets 1,4", "long facets 4"]
    assert "long facets 1,4 " in capsys.readouterr().out
    assert colours("xm3600") == (2, None)
    assert "not on the raw prompts; ask by others: --prompts long" in refusal(capsys)
    assert colours("xm3600", "--prompts", "long")[1]["text_to_image"]["R@1"] == 100


# ---------------------------------------------------------------- one's own captions

def test_ones_own_captions_in_other_forms(colours, tmp_path, monkeypatch, capsys):
    """Several of one picture; rows without one; what training had. The sheet says what the screen says."""
    titles = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda shown, title, path: titles.append(title))
    rows = []
    for name in NAMES:
        picture(tmp_path / f"mine/{name}.png", name)
        rows += [f"{name}.png\ta {name} wall\n", f"{name}.png\tall {name}\n"]
    put(tmp_path / "ours.tsv", "image\traw\n" + "".join(rows) + "\tred\ngone.png\ta red one\n")
    trained = "1\t\ta red wall\tx\ty\n2\t\tx\tall red\ty\n"
    put(tmp_path / "store/captions.tsv", f"key\timage\traw\tshort\tlong\n{trained}")
    captions = {"path": "", "sha256": ""}
    put(tmp_path / "store/meta.json", json.dumps({
        "N": 2, "D": 1, "window": 2, "captions": captions, "llm": {"questions": flame.questions()}}))
    files.write_array(tmp_path / "store/000000.npy", np.ones((2, 11, 1), np.float16))
    store = {"path": str(tmp_path / "store"), "identity": identity(flame.open_store(tmp_path / "store"))}
    put(tmp_path / "out/run/config.json", json.dumps(FINISHED | {"store": store}))
    code, result = colours("ours", "--captions", "ours.tsv", "--images", "mine")
    out, error = capsys.readouterr()
    assert code == 0 and result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
    assert (result["n_images"], result["n_texts"], result["skipped_images"]) == (5, 10, 2)
    assert "2 of 7 pictures cannot be read (no picture of 000000010, mine/gone.png ...)" in error
    assert titles == [f"{out.splitlines()[-4]}; out/run"] and titles[0].startswith(
        "ours: 10 texts, 5 pictures, 2 texts left out, 2 pictures left out, 2 texts that training had")
    assert result["trained_texts"] == 2
    put(tmp_path / "out/run/config.json", json.dumps(FINISHED | {"store": store | {"identity": "before"}}))
    assert colours("ours", "--captions", "ours.tsv", "--images", "mine")[1]["trained_texts"] is None


# ---------------------------------------------------------------- real towers

@pytest.fixture(scope="module")
def real(byte_llm, tmp_path_factory):
    """A random checkpoint of the tiny LLM whose tokens are bytes, in the folder of the demo's tree."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "text_dim": 32,
              "projector_hidden": 24, "pool_first": True, "text_rank": 0, "columns": flame.COLUMNS}
    llm = {"name": "tiny", "path": str(byte_llm), "fingerprint": llm_fingerprint(byte_llm), "layer": 2,
           "positions": "restart", "questions": flame.questions()}
    model = flame.Flame(config | {"llm": llm})
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.text.mean.copy_(0.1 * torch.randn_like(model.text.mean))  # a projection: each column has its own
    (folder / "out/tiny").mkdir(parents=True)
    save_file(model.state_dict(), folder / "out/tiny/model.safetensors")
    put(folder / "out/tiny/config.json", json.dumps({"model": config, "llm": llm}))
    return folder


def test_the_weights_of_a_checkpoint_of_ours_are_no_file_of_the_authors(real, byte_llm, tmp_path, capsys):
    """Read as one they gave other scores."""
    tree_urban1k(tmp_path / "urban1k")
    flags = "--data-root", tmp_path / "urban1k", "--llm", byte_llm, "--out", tmp_path, "--device", "cpu"
    weights = real / "out/tiny/model.safetensors"
    assert evaluate.main(["--bench", "urban1k", "--checkpoint", str(weights), *map(str, flags)]) == 2
    assert "weights that train.py wrote; give the authors' .pt file, or a folder" in refusal(capsys)


@pytest.mark.parametrize("bench", ["urban1k", "xm3600", "food101", "imagefolder"])
def test_main_equals_one_picture_and_one_text_at_a_time(bench, real, byte_llm, tmp_path, monkeypatch):
    """Recall and accuracy of the command against flame.similarity, a pair at a time, and a sort."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    TREES[bench](tmp_path / bench)
    known = ["--llm", byte_llm, "--checkpoint", real / "out/tiny", "--device", "cpu"]
    assert evaluate.main(["--bench", bench, "--data-root", bench, *map(str, known)]) == 0
    result = json.loads((tmp_path / f"results/{bench}.json").read_text())
    model = flame.load(real / "out/tiny")
    encoder = flame.TextEncoder(byte_llm, "cpu", torch.float32, layer=2)
    pictures, *data = evaluate.benchmarks.read(bench, Path(bench), most=1)
    with torch.inference_mode():
        images = [model.encode_image(model.preprocess(open_picture(place))[None]) for place in pictures]

        def facets(text):
            return model.encode_text(encoder.encode([text], result["prompts"]), result["prompts"])

        if "top1" not in result:
            for language, (texts, owner) in data[0].items():
                scores = [[flame.similarity(image, facets(text)).item() for image in images]
                          for text in texts]
                got = result["languages"][language] if language else result
                assert {way: got[way] for way in WAYS} == slow_retrieval(scores, owner)
            return
        labels, names, templates = data

        def unit(vector):
            return torch.nn.functional.normalize(vector, dim=-1)

        filled = [[unit(facets(template.replace("{}", name)).mean(1)) for template in templates]
                  for name in names]
        classes = [unit(torch.stack(vectors).mean(0)) for vectors in filled]
        ranks = np.array([slow_rank([(image @ c.T).item() for c in classes], np.arange(5) == label)
                          for image, label in zip(images, labels)])
    assert result["top1"] == pytest.approx(100 * np.mean(ranks < 1))
    assert result["mean_per_class"] == pytest.approx(
        100 * np.mean([np.mean(ranks[np.array(labels) == c] < 1) for c in range(5)]))


@pytest.mark.parametrize("prompts", ["long", "raw"])
def test_a_text_dotted_with_an_image_is_the_mean_cosine(real, byte_llm, tmp_path, prompts):
    model = flame.load(real / "out/tiny")
    encoder = flame.TextEncoder(byte_llm, "cpu", torch.float32, layer=2, budget=400)  # several packed rows
    ours = towers.Towers(model, lambda: encoder, "cpu", tmp_path, "image tower", "text tower")
    texts = ["a", "A much longer text about nothing, that goes on for a while.", "b b", "a"]
    image = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    got = evaluate.encode_texts(ours, texts, prompts)
    assert evaluate.encode_facets(ours, texts, prompts).mean(1) == pytest.approx(got, abs=1e-6)
    both = evaluate.encode_texts(ours, texts, f"{prompts} short")   # by two sets: all of their facets
    of_each = [evaluate.encode_facets(ours, texts, name) for name in (prompts, "short")]
    assert both == pytest.approx(np.concatenate(of_each, axis=1).mean(1), abs=1e-6)
    with torch.inference_mode():
        states = torch.cat([encoder.encode([text], prompts) for text in texts])
        expected = flame.similarity(image, model.encode_text(states, prompts))
    # in company and as float16, a text differs by rounding
    assert got @ image.numpy().T == pytest.approx(expected.numpy(), abs=1e-3)
    theirs = evaluate.encode_texts(ours._replace(model=released.Released(model.config)), texts, prompts)
    assert theirs == pytest.approx(torch.nn.functional.normalize(states.mean(1), dim=-1).numpy(), abs=1e-3)


def test_the_authors_checkpoint_is_scored_their_way(byte_llm, tmp_path, monkeypatch):
    """Their text path and pooling, without being asked, against one picture and one text at a time."""
    config = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "heads": 1, "text_dim": 32,
              "projector_hidden": 24, "pool_first": False, "text_rank": 0, "columns": flame.COLUMNS}
    torch.manual_seed(0)
    weights = flame.Flame(config | {"llm": {}}).state_dict()
    theirs = {f"module.{name}": torch.randn_like(tensor) / 5 for name, tensor in weights.items()
              if not name.startswith("text.")}
    torch.save({"state_dict": theirs}, tmp_path / "epoch_32.pt")
    tree_urban1k(tmp_path / "data")
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    known = ["--data-root", tmp_path / "data", "--checkpoint", tmp_path / "epoch_32.pt", "--llm", byte_llm]
    assert evaluate.main(["--bench", "urban1k", "--out", str(tmp_path / "out"), *map(str, known)]) == 0
    result = json.loads((tmp_path / "out/urban1k.json").read_text())
    model = released.load(tmp_path / "epoch_32.pt")
    encoder = released.text_encoder(byte_llm, dtype=torch.float32, positions="sequential")
    with torch.inference_mode():
        pixels = [model.preprocess(Image.open(tmp_path / f"data/image/{i}.jpg")) for i in range(1, 6)]
        image = torch.cat([model.encode_image(one[None]) for one in pixels])
        text = torch.cat([encoder.encode([f"A {name} street."], "long").mean(1) for name in NAMES])
    scores = torch.nn.functional.normalize(text, dim=-1) @ image.T
    expected = slow_retrieval(scores.tolist(), range(5))
    assert {way: result[way] for way in WAYS} == expected


@pytest.mark.parametrize("fingerprint, hidden_size", [("x", 32), (None, 64)])   # the authors' names none
def test_another_llm_is_refused(fingerprint, hidden_size, real, byte_llm, tmp_path, capsys):
    tree_urban1k(tmp_path / "data")
    for folder, source in (("run", real / "out/tiny"), ("llm", byte_llm)):
        shutil.copytree(source, tmp_path / folder)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["llm"]["fingerprint"] = fingerprint
    put(tmp_path / "run/config.json", json.dumps(config))
    config = json.loads((tmp_path / "llm/config.json").read_text())
    put(tmp_path / "llm/config.json", json.dumps(config | {"hidden_size": hidden_size}))
    folders = zip(("--data-root", "--out", "--checkpoint", "--llm"), ("data", "out", "run", "llm"))
    flags = [word for flag, folder in folders for word in (flag, str(tmp_path / folder))]
    assert evaluate.main(["--bench", "urban1k", *flags]) == 2
    assert "with another LLM (tiny)" in refusal(capsys)


def test_an_open_clip_model_is_scored_alike(small_clip, tmp_path, monkeypatch, capsys):
    """Against open_clip's own encode_image and encode_text, one at a time."""
    import open_clip
    name, _, weights = small_clip.partition(":")
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
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
        assert result["text_to_image"] == slow_retrieval((unit(text) @ unit(image).T).tolist(),
                                                         range(5))["text_to_image"]
    capsys.readouterr()
    assert evaluate.main([*map(str, flags[:-1]), "no-such-model"]) == 2
    assert "--open-clip no-such-model" in capsys.readouterr().err


# ---------------------------------------------------------------- the command line

def test_a_pipe_that_is_closed_is_no_error():
    """As `evaluate.py ... | head` closes it."""
    code = "import sys; from data.command import run; sys.exit(run('', lambda: print('\\ud83e' * 10**6), ''))"
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(evaluate.__file__).parent}
    with subprocess.Popen([sys.executable, "-c", code], **pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
