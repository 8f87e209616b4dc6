"""evaluate.py and data/benchmarks.py: metrics against slow twins and CLIP_benchmark, readers and the command line on small
trees of the documented layouts.

    pytest tests/test_evaluate.py
"""
import json
import os
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

import evaluate
import flame
from data import benchmarks

ROOT = Path(__file__).parent.parent
K = (1, 5, 10)


# ---------------------------------------------------------------- metrics

def slow_rank(scores, right):
    """Place of the best right answer when equal scores are sorted wrong ones first; python's own sort is the oracle."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return next((place for place, i in enumerate(order) if right[i]), len(scores))


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
        assert got["text_to_image"][f"R@{k}"] == pytest.approx(100 * (forth > 0).float().mean().item(), abs=1e-5)
        assert got["image_to_text"][f"R@{k}"] == pytest.approx(100 * (back > 0).float().mean().item(), abs=1e-5)
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
    low, high = evaluate.interval(hits)
    # Resampling n hits with replacement and counting them is a binomial draw: here 100 +- 1.96 * sqrt(75), of 400.
    assert (low, high) == (pytest.approx(25 - 1.96 * 75 ** 0.5 / 4, abs=0.5), pytest.approx(25 + 1.96 * 75 ** 0.5 / 4, abs=0.5))
    assert evaluate.interval(hits) == [low, high]
    # Saying everything five times over adds no evidence, if copies stay together.
    assert evaluate.interval(np.repeat(hits, 5), np.repeat(np.arange(400) + 7, 5)) == pytest.approx([low, high])
    assert evaluate.interval(np.ones(9)) == [100, 100]


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


# ---------------------------------------------------------------- small trees of the documented layouts

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255, 255, 255)}
NAMES = list(COLOURS)


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), COLOURS[colour]).save(path)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def tree_urban1k(root):
    for i, name in enumerate(NAMES):
        picture(root / "image" / f"{i + 1}.jpg", name)
        put(root / "caption" / f"{i + 1}.txt", f"A {name} street.\nnot this line\n")


def tree_sharegpt4v(root):
    entries = [{"image": f"sam/images/{name}.jpg", "conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": f"A {name}\nwall."}]}
               for name in NAMES]
    put(root / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))
    for name in NAMES:
        picture(root / "sam" / "images" / f"{name}.jpg", name)


def tree_dci(root):
    root = root / "densely_captioned_images"
    put(root / "splits.json", json.dumps({"train": ["0.json", "1.json", "2.json"], "test": ["3.json"], "valid": ["4.json"]}))
    for i, name in enumerate(NAMES):
        entry = {"image": f"sa_{i}.jpg", "short_caption": f"A {name} door.", "extra_caption": "It is shut.</s>Nobody\nis there. "}
        put(root / "annotations" / f"{i}.json", json.dumps(entry))
        picture(root / "photos" / f"sa_{i}.jpg", name)


def tree_docci(root):
    rows = [{"split": "test" if name != "white" else "train", "image_file": f"{name}.jpg", "description": f"A {name}\nwall."} for name in NAMES]
    put(root / "docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))
    for name in NAMES:
        picture(root / "images" / f"{name}.jpg", name)


def tree_karpathy(root, file, folder):
    images = [{"filepath": "val2014", "filename": f"{name}.jpg", "split": "val" if name == "white" else "test",
               "sentences": [{"raw": f"a {name} wall {n}"} for n in range(6)]} for name in NAMES]
    images += [{"filepath": "val2014", "filename": "pink.jpg", "split": "val", "sentences": [{"raw": "a red wall"}]}]
    put(root / file, json.dumps({"images": images, "dataset": "x"}))
    for name in NAMES:
        picture(root / folder / f"{name}.jpg", name)


def tree_coco(root):
    tree_karpathy(root, "dataset_coco.json", "val2014")


def tree_flickr30k(root):
    tree_karpathy(root, "dataset_flickr30k.json", "flickr30k-images")


FOREIGN = {"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "white": "blanc"}


def tree_xm3600(root):
    rows = [{"image/key": name, "image/locale": "fr", "en": {"caption": [f"a {name} wall", "red"]}, "fr": {"caption": [f"un mur {FOREIGN[name]}"]}} for name in NAMES]
    put(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name in NAMES:
        picture(root / "images" / f"{name}.jpg", name)


def tree_imagefolder(root):
    for name in NAMES:
        for i in range(3):
            picture(root / name / f"{i}.png", name)


def tree_demo(root):
    header = "key\timage\traw\tshort\tlong\n"
    for split in ("test", "val"):
        put(root / f"{split}.tsv", header + "".join(f"{n}\timages/{split}/{n}.png\t{n}\ta {n} thing\tA {n} thing, in some detail.\n" for n in NAMES))
        for n in NAMES:
            picture(root / "images" / split / f"{n}.png", n)
    rows = []
    for n in reversed(NAMES):       # unseen ones first: places among all objects differ from places among the seen
        for i in range(4):
            rows.append(f"images/objects/{n}{i}.png\t{n}\t{'unseen' if n in ('yellow', 'white') else 'seen'}\n")
            picture(root / "images" / "objects" / f"{n}{i}.png", n)
    put(root / "objects.tsv", "image\tobject\tsplit\n" + "".join(rows))
    put(root / "names.tsv", "object\ten\tfr\n" + "".join(f"{n}\t{n}\t{FOREIGN[n]}\n" for n in NAMES))


TREES = {"urban1k": tree_urban1k, "sharegpt4v": tree_sharegpt4v, "dci": tree_dci, "docci": tree_docci, "coco": tree_coco,
         "flickr30k": tree_flickr30k, "xm3600": tree_xm3600, "imagefolder": tree_imagefolder, "demo": tree_demo}


def test_every_benchmark_has_a_tree_and_its_layout_is_documented():
    known = {"demo", *benchmarks.RETRIEVAL, *benchmarks.MULTILINGUAL, *benchmarks.CLASSIFICATION}
    assert known == TREES.keys()
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert all(f"**{bench}**" in readme or f"### {bench}" in readme for bench in known)


def test_readers_give_what_the_files_say(tmp_path):
    for bench in ("urban1k", "sharegpt4v", "dci", "docci", "coco"):
        TREES[bench](tmp_path / bench)
    images, texts, owner = benchmarks.urban1k(tmp_path / "urban1k")
    assert [path.name for path in images] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"] and owner == [0, 1, 2, 3, 4]
    assert texts[0] == "A red street."
    assert benchmarks.sharegpt4v(tmp_path / "sharegpt4v")[1][1] == "A green wall."
    images, texts, _ = benchmarks.dci(tmp_path / "dci")
    assert texts[2] == "A blue door. It is shut. Nobody. is there" and images[2].name == "sa_2.jpg" and len(texts) == 5
    images, texts, _ = benchmarks.docci(tmp_path / "docci")
    assert texts == [f"A {name} wall." for name in NAMES[:4]]
    images, texts, owner = benchmarks.coco(tmp_path / "coco")
    assert [path.stem for path in images] == NAMES[:4] and owner == [i for i in range(4) for _ in range(5)]
    assert texts[5:7] == ["a green wall 0", "a green wall 1"]
    images, texts, owner = benchmarks.coco(tmp_path / "coco", "val")
    assert [path.name for path in images] == ["white.jpg", "pink.jpg"] and owner == [0, 0, 0, 0, 0, 1]


def test_sharegpt4v_takes_a_thousand_of_a_longer_file(tmp_path):
    entry = {"image": "a.jpg", "conversations": [{"value": "?"}, {"value": "x"}]}
    put(tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps([entry] * 1003)[:-60])    # cut off after the 1,000th
    assert len(benchmarks.sharegpt4v(tmp_path)[1]) == 1000


def test_demo_halves_objects_between_val_and_test(tmp_path):
    tree_demo(tmp_path)
    halves = {split: [path.name for path, _, _ in benchmarks.demo(tmp_path, split)[2]] for split in ("val", "test")}
    assert halves["val"][:4] == ["white0.png", "white2.png", "yellow0.png", "yellow2.png"]
    assert halves["test"][:4] == ["white1.png", "white3.png", "yellow1.png", "yellow3.png"]


def test_imagefolder_reads_names_and_templates(tmp_path):
    for folder in ("n01", "n02"):
        picture(tmp_path / folder / "x.jpg", "red")
    put(tmp_path / "classes.txt", "n02\thot dog\nn01\tcat\n")
    put(tmp_path / "templates.txt", "a {}\n\nmy {}\n")
    images, labels, names, templates = benchmarks.imagefolder(tmp_path)
    assert names == ["cat", "hot dog"] and templates == ["a {}", "my {}"] and labels == [0, 1] and images[1].parent.name == "n02"
    put(tmp_path / "templates.txt", "a cat\n")
    with pytest.raises(flame.InputError, match="templates.txt: every line needs a {}"):
        benchmarks.imagefolder(tmp_path)
    put(tmp_path / "classes.txt", "n03\tcat\n")
    with pytest.raises(flame.InputError, match="classes.txt: line 1"):
        benchmarks.imagefolder(tmp_path)
    put(tmp_path / "classes.txt", "n01\tcat\n")
    with pytest.raises(flame.InputError, match="no line for the folder 'n02'"):
        benchmarks.imagefolder(tmp_path)


@pytest.mark.parametrize("break_it, message", [
    (lambda r: (r / "urban1k" / "caption").rename(r / "captions"), "urban1k.caption: not found; data/README.md"),
    (lambda r: put(r / "coco" / "dataset_coco.json", '{\n"images": ['), "dataset_coco.json: line 2: not JSON"),
    (lambda r: put(r / "coco" / "dataset_coco.json", '{"images": [{"split": "test"}]}'), "entry 0: no 'sentences'"),
    (lambda r: put(r / "docci" / "docci_descriptions.jsonlines", "{}\n{"), "docci_descriptions.jsonlines: line 1: no 'split'"),
    (lambda r: put(r / "demo" / "objects.tsv", "image\tobject\n"), "objects.tsv: line 1: no column 'split'"),
    (lambda r: put(r / "demo" / "names.tsv", "object\ten\nred\tred\n"), "names.tsv: no row for 'blue'"),
    (lambda r: (r / "demo" / "test.tsv").write_bytes(b"key\timage\traw\tshort\tlong\n\xff\n"), "test.tsv: line 2: not UTF-8"),
])
def test_wrong_files_get_one_clear_line(tmp_path, break_it, message):
    for bench in ("urban1k", "coco", "docci", "demo"):
        TREES[bench](tmp_path / bench)
    break_it(tmp_path)
    with pytest.raises(flame.InputError, match=message):
        for bench in ("urban1k", "coco", "docci", "demo"):
            getattr(benchmarks, bench)(tmp_path / bench, "test")


# ---------------------------------------------------------------- through main(), with a model whose answers are known

class ColourModel:
    """Embeds a picture as its mean colour."""
    config = {"llm": {"name": "colours", "fingerprint": "f", "layer": 1, "positions": "restart"}}

    def to(self, device):
        return self

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()

    def encode_image(self, pixels):
        return torch.nn.functional.normalize(pixels.mean((2, 3)) - 100, dim=-1)

    def encode_text(self, facets, prompts):
        return torch.nn.functional.normalize(facets, dim=-1)


class ColourWords:
    """Embeds a text as the colour of the colour word in it. `lies` renames colours: an error whose effect is known."""
    lies = {}

    def __init__(self, llm_dir, device, dtype, layer=None, positions="restart"):
        assert (layer, positions) == (1, "restart")     # the checkpoint's own

    def encode_batches(self, texts, prompts):
        assert len(set(texts)) == len(texts) and all(texts)
        words = {FOREIGN[name]: name for name in NAMES} | {name: name for name in NAMES} | self.lies
        for row, text in reversed(list(enumerate(texts))):      # any order, as the real one's
            colour = next(words[word] for word in text.lower().replace(",", " ").replace(".", " ").split() if word in words)
            state = torch.tensor(COLOURS[colour]) - 100.0
            yield [row], (state * torch.arange(1, len(flame.PROMPTS[prompts].facets) + 1)[:, None])[None]   # any length


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """Runs main() on a tree under data/<bench>, in an empty folder with a finished checkpoint; -> (exit code, result)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "load", lambda folder: ColourModel())
    monkeypatch.setattr(flame, "llm_fingerprint", lambda folder: "f")
    monkeypatch.setattr(flame, "TextEncoder", ColourWords)
    monkeypatch.setattr(ColourWords, "lies", {})
    put(tmp_path / "out" / "run" / "config.json", "{}")
    put(tmp_path / "out" / "run" / "model.safetensors", "")

    def run(bench, *more):
        code = evaluate.main(["--bench", bench, "--device", "cpu", "--batch-size", "2", *more])
        path = tmp_path / "results" / f"{bench}.json"
        return code, json.loads(path.read_text()) if path.exists() else None
    return run


@pytest.mark.parametrize("bench", [b for b in TREES if b != "demo"])
def test_a_perfect_model_scores_100(bench, colours, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    code, result = colours(bench)
    assert code == 0 and result["bench"] == bench and result["checkpoint"] == os.path.join("out", "run")
    images, texts = {"docci": (4, 4), "coco": (4, 20), "flickr30k": (4, 20), "xm3600": (5, 10)}.get(bench, (5, 5))
    if bench == "imagefolder":
        assert result["n_images"] == 15 and result["n_classes"] == 5 and result["chance"] == 20
        assert result["top1"] == result["top5"] == result["mean_per_class"] == 100
    elif bench in ("coco", "flickr30k"):
        assert (result["n_images"], result["n_texts"]) == (images, texts) and result["text_to_image"]["R@1"] == 100
        assert result["image_to_text"]["R@1"] == 100
    else:
        assert (result["n_images"], result["n_texts"]) == (images, texts)
        assert result["text_to_image"] == result["image_to_text"] == {"R@1": 100, "R@5": 100, "R@10": 100}
    with Image.open(tmp_path / "results" / f"{bench}.png") as sheet:
        assert sheet.getpixel((16 + 420 + 2, 16 + 2)) == (0, 168, 80)       # the first query's first picture: right, green
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [f"{bench}.json", f"{bench}.png"]
    assert "100.0 [100.0, 100.0]" in capsys.readouterr().out


def test_known_errors_give_known_numbers(colours, tmp_path, monkeypatch):
    tree_coco(tmp_path / "data" / "coco")
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})      # the five red captions now say green
    _, result = colours("coco")
    assert result["text_to_image"]["R@1"] == 75                     # 15 of 20
    # The red picture's captions lie elsewhere; for the green one five foreign texts tie with its own five and come first.
    assert result["image_to_text"]["R@1"] == 50 and result["image_to_text"]["R@5"] == 50
    low, high = result["ci95"]["text_to_image"]["R@1"]
    assert low <= 25 and high == 100                                # four pictures are little evidence
    with Image.open(tmp_path / "results" / "coco.png") as sheet:
        assert {(0, 168, 80), (216, 48, 64)} <= {colour for _, colour in sheet.getcolors(1 << 20)}   # green and red frames


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


def test_bad_pictures_and_captions_shift_nothing(colours, tmp_path, capsys):
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    whole = (root / "image" / "1.jpg").read_bytes()
    (root / "image" / "1.jpg").write_bytes(whole[:len(whole) // 2])     # truncated
    (root / "image" / "3.jpg").write_text("not a picture")
    (root / "caption" / "4.txt").write_text("\n")                       # empty: its picture stays a distractor
    put(root / "caption" / "9.txt", "A green ghost.")                   # no picture
    code, result = colours("urban1k")
    assert code == 0 and (result["n_images"], result["n_texts"], result["skipped_images"], result["skipped_texts"]) == (3, 2, 3, 4)
    assert result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
    error = capsys.readouterr().err
    assert "3 of 6 pictures cannot be read and are left out; the first: " in error and "1.jpg" in error
    assert "1 of 6 texts are missing or empty" in error


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
    for age, name in enumerate(("new", "old", "unfinished")):
        put(tmp_path / name / "config.json", "{}")
        if name != "unfinished":
            put(tmp_path / name / "model.safetensors", "x" * age)
            os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    assert evaluate.newest_checkpoint(tmp_path).name == "new"


# ---------------------------------------------------------------- the real model, through the command line

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a tiny random LLM (data/demo/llm), a tiny random checkpoint (out/tiny) and the demo's tree."""
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    llm, D, inner, vocabulary = folder / "data" / "demo" / "llm", 32, 48, 300
    llm.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([p.prefix + f for p in flame.PROMPTS.values() for f in p.facets], vocab_size=vocabulary)
    tokenizer.save(str(llm / "tokenizer.json"))
    put(llm / "config.json", json.dumps({
        "model_type": "llama", "hidden_size": D, "intermediate_size": inner, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "rope_theta": 1e4}))
    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, D)}
    for i in range(3):
        for name, shape in {"self_attn.q_proj": (32, D), "self_attn.k_proj": (16, D), "self_attn.v_proj": (16, D), "self_attn.o_proj": (D, 32),
                            "mlp.gate_proj": (inner, D), "mlp.up_proj": (inner, D), "mlp.down_proj": (D, inner)}.items():
            weights[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) * shape[1] ** -0.5
        weights |= {f"model.layers.{i}.{name}.weight": torch.ones(D) for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(weights, llm / "model.safetensors")

    config = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "text_dim": D, "projector_hidden": 24,
              "pool_first": True, "text_rank": 0, "text_linear": False}
    source = {"name": "tiny", "fingerprint": flame.llm_fingerprint(llm), "layer": 2, "positions": "restart"}
    (folder / "out" / "tiny").mkdir(parents=True)
    save_file(flame.Flame(config | {"llm": source}).state_dict(), folder / "out" / "tiny" / "model.safetensors")
    put(folder / "out" / "tiny" / "config.json", json.dumps({"model": config, "llm": source}))
    tree_demo(folder / "data" / "demo")
    return folder


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
    got = evaluate.encode_texts(model, encoder, texts, prompts, "cpu") @ image.numpy().T
    for row, text in zip(got, texts):
        with torch.inference_mode():
            expected = flame.similarity(image, model.encode_text(encoder.encode([text], prompts), prompts))[0]
        assert row == pytest.approx(expected.numpy(), abs=1e-4)     # texts alone and in company differ by rounding


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


def test_help_fits_one_screen(real):
    lines = command(real, "--help").stdout.splitlines()
    assert 5 < len(lines) <= 24 and max(map(len, lines)) <= 80
