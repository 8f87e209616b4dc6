"""Tests of data/benchmarks.py, on small folders in the layout that each benchmark's authors document."""
import io
import json
import os
import re
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import flame
from data import benchmarks, encoders
from data.images import ImageLocation, open_image

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
          "white": (255, 255, 255)}
NAMES = list(COLORS)
FINISHED = {"step": 3, "training": {"steps": 3}}     # in a finished checkpoint's config.json
FOREIGN = dict(zip(NAMES, ("rouge", "vert", "bleu", "jaune", "blanc")))


# ---------------------------------------------------------------- folders in the documented layouts

def write_image(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), COLORS[color]).save(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def tree_urban1k(root):
    for i, name in enumerate(NAMES, 1):
        write_image(root / f"image/{i}.jpg", name)
        write_text(root / f"caption/{i}.txt", f"A {name} street.\nnot a caption\n")


def tree_sharegpt4v(root):
    entries = []
    for name in NAMES:
        turns = [{"from": "human", "value": "red?"}, {"from": "gpt", "value": f"A {name}\nwall."}]
        entries.append({"id": name, "image": f"sam/images/{name}.jpg", "conversations": turns})
        write_image(root / f"sam/images/{name}.jpg", name)
    write_text(root / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))


def tree_dci(root):
    root = root / "densely_captioned_images"
    splits = {"train": ["0.json", "1.json", "2.json"], "test": ["3.json"], "valid": ["4.json"]}
    write_text(root / "splits.json", json.dumps(splits))
    for i, name in enumerate(NAMES):
        entry = {"image": f"sa_{i}.jpg", "short_caption": f"A {name} door.",
                 "extra_caption": "It is shut.</s>Nobody\nis there. "}
        write_text(root / f"annotations/{i}.json", json.dumps(entry))
        write_image(root / f"photos/sa_{i}.jpg", name)


def tree_docci(root):
    rows = []
    for name in NAMES:
        split = "train" if name == "white" else "test"
        rows.append({"split": split, "image_file": f"{name}.jpg", "description": f"A {name}\nwall."})
        write_image(root / f"images/{name}.jpg", name)
    write_text(root / "docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))


def tree_xm3600(root):
    rows = []
    for name in NAMES:
        rows.append({"image/key": name, "image/locale": "fr", "en": {"caption": [f"a {name} wall", "red"]},
                     "fr": {"caption": [f"un mur {FOREIGN[name]}"]}})
        write_image(root / f"images/{name}.jpg", name)
    write_text(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def tree_imagefolder(root):
    for name in NAMES:
        for i in range(3):
            write_image(root / f"{name}/{i}.png", name)
    (root / ".cache").mkdir()   # not a class


def tree_imagenet(root):
    for i, name in enumerate(NAMES):
        for n in range(3):
            write_image(root / f"val/n0{i}/ILSVRC_{n}.JPEG", name)


def write_tars(root, captions):
    """Write two tars in the layout of clip_benchmark's webdataset builder; no captions: classes."""
    write_text(root / "test/nshards.txt", "2")
    for shard in range(2):
        with tarfile.open(root / f"test/{shard}.tar", "w") as tar:
            for n, name in list(enumerate(NAMES))[shard::2]:
                image = io.BytesIO()
                Image.new("RGB", (12, 9), COLORS[name]).save(image, "webp", lossless=True)
                text = "\n".join(f"A {name} wall {i}." for i in range(captions)) if captions else str(n)
                text_suffix = "txt" if captions else "cls"
                for suffix, data in {"webp": image.getvalue(), text_suffix: text.encode()}.items():
                    member = tarfile.TarInfo(f"s{n:07}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if captions:
        write_text(root / "dataset_type.txt", "retrieval\n")
    else:
        write_text(root / "classnames.txt", "\n".join(NAMES) + "\n")
        write_text(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\n{c}\n")


def tree_demo(root):
    for split in ("test", "val"):
        rows = [f"{n}\timages/{split}/{n}.png\t{n}\ta {n} thing\tA {n} thing, in detail.\tThe {n} one.\n"
                for n in NAMES]
        write_text(root / f"{split}.tsv", "key\timage\traw\tshort\tlong\treworded\n" + "".join(rows))
        for n in NAMES:
            write_image(root / f"images/{split}/{n}.png", n)
    rows = []
    for n in reversed(NAMES):  # unseen first, so that indices among all objects and among the seen differ
        for i in range(4):
            split = "unseen" if n in ("yellow", "white") else "seen"
            rows.append(f"images/objects/{n}{i}.png\t{n}\t{split}\n")
            write_image(root / f"images/objects/{n}{i}.png", n)
    write_text(root / "objects.tsv", "image\tobject\tsplit\n" + "".join(rows))
    write_text(root / "names.tsv", "object\ten\tfr\n" + "".join(f"{n}\t{n}\t{FOREIGN[n]}\n" for n in NAMES))
    synonyms = "".join(f"{n}\tvery {n}\t{n} hue\n" for n in NAMES)
    write_text(root / "synonyms.tsv", f"object\tfirst\tsecond\n{synonyms}")


TREES = {name.removeprefix("tree_"): tree for name, tree in globals().items() if name.startswith("tree_")}
TREES |= {"coco": partial(write_tars, captions=7), "food101": partial(write_tars, captions=0)}
PLAIN = [bench for bench in TREES if bench != "demo"]


# ---------------------------------------------------------------- a model with known results

class ColorModel:
    """Embeds an image as its mean color."""

    config = {"llm": {"name": "colors", "fingerprint": "f", "layer": 1, "mask": "decoupled"},
              "text_dim": 3, "columns": flame.FACET_COLUMNS}

    def to(self, device):
        return self

    def state_dict(self):
        return {}

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()

    def encode_image(self, pixels):
        return torch.nn.functional.normalize(pixels.mean((2, 3)) - 100, dim=-1)

    def encode_text(self, facets, prompts):
        return torch.nn.functional.normalize(facets, dim=-1)


class ColorEncoder:
    """Embeds a text as the first color that it names. `mistakes` renames colors, to test known errors."""
    mistakes, dim = {}, 3

    def __init__(self, llm_dir, device, dtype, layer=None, mask="decoupled"):
        assert (layer, mask) == (1, "decoupled")     # as the checkpoint records

    def encode_batches(self, texts, prompts):
        assert len(set(texts)) == len(texts) and all(texts)
        words = dict(zip(FOREIGN.values(), NAMES)) | dict(zip(NAMES, NAMES)) | self.mistakes
        for row, text in reversed(list(enumerate(texts))):  # in any order, as flame.TextEncoder
            tokens = text.lower().replace(",", " ").replace(".", " ").split()
            color = next(words[token] for token in tokens if token in words)
            state = torch.tensor(COLORS.get(color, (0, 0, 0))) - 100.0
            lengths = torch.arange(1, len(flame.PROMPTS[prompts].facets) + 1)[:, None]
            yield [row], (state * lengths)[None]


@pytest.fixture
def score(tmp_path, monkeypatch):
    """score(bench, *flags) -> (exit code, result) of main() on data/<bench>, for a finished ColorModel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLAME_LLM", raising=False)
    monkeypatch.setattr(flame, "load", lambda folder: ColorModel())
    monkeypatch.setattr(flame, "resolve_folder", lambda name: name)
    monkeypatch.setattr("flame.llm_fingerprint", lambda folder: "f")
    monkeypatch.setattr(flame, "llm_config", lambda folder: {"hidden_size": 3})
    monkeypatch.setattr(flame, "TextEncoder", ColorEncoder)
    monkeypatch.setattr(ColorEncoder, "mistakes", {})
    monkeypatch.setattr(benchmarks, "IMAGENET", tmp_path / "names")
    monkeypatch.setattr(encoders, "IMAGE_BATCH", 2)
    write_text(tmp_path / "names/classnames.txt", "\n".join(NAMES))
    write_text(tmp_path / "names/zeroshot_classification_templates.txt", "a {c} photo.\n")
    write_text(tmp_path / "out/run/config.json", json.dumps(FINISHED))
    write_text(tmp_path / "out/run/model.safetensors", "")

    def run(bench, *more):
        flags = ["--bench", bench] if bench in evaluate.BENCHMARKS else []
        code = evaluate.main([*flags, "--device", "cpu", *map(str, more)])
        path = tmp_path / f"results/{bench}.json"
        return code, json.loads(path.read_text()) if path.exists() else None
    return run


def error_line(capsys):
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: ")
    return line


# ---------------------------------------------------------------- readers

def test_readers_return_the_content_of_the_files(tmp_path):
    for bench in PLAIN:
        TREES[bench](tmp_path / bench)
    read = {bench: benchmarks.read(bench, tmp_path / bench) for bench in PLAIN if bench != "imagenet"}
    image_of_text = list(range(5))

    def locations(folder, names):
        return [ImageLocation(f"{tmp_path}/{folder}/{name}.jpg") for name in names]
    assert read["urban1k"] == (locations("urban1k/image", range(1, 6)),
                               {"": ([f"A {name} street." for name in NAMES], image_of_text)})
    assert read["sharegpt4v"] == (locations("sharegpt4v/sam/images", NAMES),
                                  {"": ([f"A {name} wall." for name in NAMES], image_of_text)})
    assert read["dci"][1][""][0] == [f"A {name} door. It is shut. Nobody. is there" for name in NAMES]
    assert read["docci"] == (locations("docci/images", NAMES[:4]),
                             {"": ([f"A {name} wall." for name in NAMES[:4]], image_of_text[:4])})
    assert read["xm3600"][1]["fr"] == ([f"un mur {FOREIGN[name]}" for name in NAMES], image_of_text)
    assert read["xm3600"][1]["en"][1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert benchmarks.read("xm3600", tmp_path / "xm3600", max_captions=1)[1]["en"][1] == image_of_text
    assert read["coco"][1][""][0][:8] == [f"A red wall {i}." for i in range(7)] + ["A blue wall 0."]
    assert len(benchmarks.read("coco", tmp_path / "coco", max_captions=5)[1][""][0]) == 25
    assert read["food101"][1:] == ([0, 2, 4, 1, 3], NAMES, ["a photo of a {}.", "{}"])
    assert read["imagefolder"][1:3] == ([i for i in range(5) for _ in range(3)], sorted(NAMES))
    tree_demo(tmp_path)
    halves = [{location.path[-5] for location, *_ in benchmarks.read("demo", tmp_path, split)[2]}
              for split in ("val", "test")]
    assert halves == [{"0", "2"}, {"1", "3"}]   # of each object: images for val, for test
    rows = [("", "p1", "a"), ("", "p2", "b"), ("", "p1", "c")]     # rows of an image need not be adjacent
    assert benchmarks.group_captions(rows, 1) == (["p1", "p2"], {"": (["a", "b"], [0, 1])})
    assert benchmarks.group_captions(rows) == (["p1", "p2"], {"": (["a", "b", "c"], [0, 1, 0])})
    entry = {"image": "a.jpg", "conversations": [{"value": "?"}, {"value": "x"}, {"value": "no"}]}
    many = json.dumps([{**entry, "image": f"{n}.jpg"} for n in range(3000)])
    write_text(tmp_path / "many/share-captioner_coco_lcs_sam_1246k_1107.json", many)
    assert benchmarks.read("sharegpt4v", tmp_path / "many") == (  # the first thousand entries
        locations("many", range(1000)), {"": (["x"] * 1000, list(range(1000)))})


@pytest.mark.parametrize("bench", ["flickr30k", "cifar10"])
def test_tars_are_read_as_by_clip_benchmark(bench, tmp_path):
    from clip_benchmark.datasets.builder import build_wds_dataset
    write_tars(tmp_path, 2 if bench == "flickr30k" else 0)
    theirs = build_wds_dataset(bench, lambda image: np.array(image.convert("RGB")), "test", str(tmp_path))
    if bench == "flickr30k":
        images, data = benchmarks.read(bench, tmp_path)
        texts = [[text for text, i in zip(*data[""]) if i == n] for n in range(len(images))]
    else:
        images, texts, names, templates = benchmarks.read(bench, tmp_path)
        expected = [line.replace("{c}", "{}") for line in theirs.templates]
        assert (names, templates) == (theirs.classes, expected)
    ours = [np.array(open_image(location).convert("RGB")) for location in images]
    for (image, text), our_image, our_text in zip(theirs, ours, texts, strict=True):
        assert np.array_equal(image, our_image) and text == our_text


def test_names_and_templates_of_imagefolder_and_of_imagenet(tmp_path):
    tree_imagefolder(tmp_path)
    assert benchmarks.read("imagefolder", tmp_path)[3] == ["a photo of a {}."]
    write_text(tmp_path / "classnames.txt", "azure\nlime\nruby\nsnow\nlemon\n")
    write_text(tmp_path / "zeroshot_classification_templates.txt", "my {c}\n\n{}, new\n")
    assert benchmarks.read("imagefolder", tmp_path)[2:] == (
        ["azure", "lime", "ruby", "snow", "lemon"], ["my {}", "{}, new"])
    write_text(tmp_path / "classnames.txt", "\ufeffazure\nlime\n")
    with pytest.raises(flame.InputError, match="5 class folders and 2 class names"):
        benchmarks.read("imagefolder", tmp_path)
    names, templates = benchmarks.names_and_templates(benchmarks.IMAGENET)
    assert len(names) == 1000 and names[0] == "tench" and names[-1] == "toilet paper"
    assert sorted(name for name in set(names) if names.count(name) > 1) == ["missile", "sunglasses"]
    assert len(templates) == 80 and all("{}" in template for template in templates)


# ---------------------------------------------------------------- through main()

@pytest.mark.parametrize("bench", PLAIN)
def test_perfect_model_scores_100(bench, score, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    code, result = score(bench)
    assert code == 0 and result["bench"] == bench and result["checkpoint"] == os.path.join("out", "run")
    files = {"cache", f"{bench}.json", f"{bench}.npz"}
    if "top1" in result:
        assert (result["n_images"], result["n_classes"]) == (5 if bench == "food101" else 15, 5)
        assert result["top1"] == result["top5"] == result["mean_per_class"] == 100 and result["chance"] == 20
    else:
        images, texts = {"docci": (4, 4), "coco": (5, 25), "xm3600": (5, 10)}.get(bench, (5, 5))
        assert (result["n_images"], result["n_texts"]) == (images, texts)
        assert result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
        files.add(f"{bench}.png")
    assert {path.name for path in (tmp_path / "results").iterdir()} == files
    out = capsys.readouterr().out
    assert "100.0 [100.0, 100.0]" in out and f"LLM {os.path.dirname(benchmarks.__file__)}/demo/llm" in out


def test_bad_images_and_captions_are_counted_and_shift_no_pair(score, tmp_path, capsys):
    root = tmp_path / "data/urban1k"
    tree_urban1k(root)
    os.truncate(root / "image/1.jpg", os.path.getsize(root / "image/1.jpg") // 2)
    (root / "image/2.jpg").unlink()
    os.mkfifo(root / "image/2.jpg")             # opening it would block forever
    write_text(root / "caption/4.txt", "\n")    # empty: its image stays in the gallery
    (root / "caption/5.txt").unlink()           # missing: its image is not used
    write_text(root / "caption/9.txt", "A green ghost.")    # no image
    write_text(root / "caption/6.txt", "A yellow street.")
    write_image(root / "image/6.jpg", "yellow")
    for _ in range(2):      # the second run uses the cache
        code, result = score("urban1k")
        assert code == 0 and (result["n_images"], result["skipped_images"]) == (3, 3)
        assert (result["n_texts"], result["skipped_texts"]) == (2, 4)
        assert result["text_to_image"]["R@1"] == 50         # there are two yellow images
        assert "3 of 6 images cannot be read (data/urban1k/image/1.jpg, " in capsys.readouterr().err


def replace(name, text):
    return lambda root: write_text(root / name, text)


def add(name):
    def add_to_last_tar(root):
        with tarfile.open(root / "test/1.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return add_to_last_tar


def pipe(name):
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


def zero_header(name):     # tarfile takes it for the end of the tar
    return lambda root: (root / name).write_bytes(bytes(512) + (root / name).read_bytes()[512:])


@pytest.mark.parametrize("bench, break_it, message", [
    ("sharegpt4v", replace("share-captioner_coco_lcs_sam_1246k_1107.json", '[{"image": 1'), "1107.json: "),
    ("dci", replace("densely_captioned_images/splits.json", "{"), "splits.json: "),
    ("dci", replace("densely_captioned_images/annotations/3.json", "{}"), "3.json: no 'short_caption'"),
    ("docci", replace("docci_descriptions.jsonlines", '{"split": "test"}'), "jsonlines: "),
    ("docci", pipe("docci_descriptions.jsonlines"), "jsonlines: "),
    ("xm3600", replace("captions.jsonl", ""), "data/xm3600: no images"),
    ("urban1k", lambda root: (root / "caption/1.txt").write_bytes(b"\xff"), "1.txt: "),
    ("imagefolder", lambda root: [(root / name).rename(root.parent / name) for name in NAMES[1:]],
     "1 class folders and 1 class names"),
    ("food101", replace("classnames.txt", "a\nb\n"), "1.tar: 2 is not in range"),
    ("food101", lambda root: (root / "test").rename(root / "train"), "folder, or it has no test split"),
    ("docci", lambda root: root.rename(root.parent / "elsewhere"), "data/docci: no such folder"),
    ("coco", pipe("test/0.tar"), "0.tar: "),
    ("coco", replace("test/0.tar", "not a tar"), "0.tar: "),
    ("coco", zero_header("test/0.tar"), "0.tar: not a tar file, or corrupt from"),
    ("coco", add("s9.webp"), "1.tar: no '.txt'"),
    ("coco", add("s9.txt"), "1.tar: "),
    ("demo", replace("test.tsv", "key\timage\n1\t2\t3\n"), "test.tsv: no ")])
def test_other_layout_is_refused_in_one_line(bench, break_it, message, score, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    break_it(tmp_path / "data" / bench)
    assert score(bench) == (2, None) and message in error_line(capsys) and not (tmp_path / "results").exists()


# ---------------------------------------------------------------- groups

def test_group_has_the_results_of_its_members_and_their_average(score, tmp_path, monkeypatch, capsys):
    for bench in ("coco", "flickr30k"):
        TREES["coco"](tmp_path / "elsewhere" / bench)
    monkeypatch.setattr(ColorEncoder, "mistakes", {"red": "green"})
    (tmp_path / "elsewhere/flickr30k/test/1.tar").unlink()     # leaves red, blue and white
    code, group = score("short", "--data-root", "elsewhere")
    printed = capsys.readouterr().out
    assert code == 0 and [*group["benchmarks"]] == ["coco", "flickr30k"]
    for bench in ("coco", "flickr30k"):
        assert score(bench, "--data-root", f"elsewhere/{bench}")[1] == group["benchmarks"][bench]
    each = [member["text_to_image"]["R@1"] for member in group["benchmarks"].values()]
    assert each == [80, pytest.approx(200 / 3)]
    assert group["text_to_image"]["R@1"] == pytest.approx(np.mean(each))
    low, high = group["ci95"]["text_to_image"]["R@1"]
    assert 30 <= low < 73 < high <= 100
    rows = [row.split()[0] for row in printed.split("short: mean\n")[1].splitlines()]
    assert [rows[n] for n in (0, 1, 2, 4)] == ["text_to_image", "image_to_text", *(
        f"benchmarks/{member}/text_to_image" for member in ("coco", "flickr30k"))]
    assert score("", "--compare", "results/short.json", "results/short.json")[0] == 0
    printed = capsys.readouterr().out
    for metric in ("text_to_image", "benchmarks/coco/text_to_image"):
        assert re.search(rf"^{metric} .* 0\.0 \[  0\.0,   0\.0\]", printed, re.M), printed
    group = score("short", "--data-root", "elsewhere", "--all-captions")[1]["benchmarks"]
    assert group["coco"]["n_texts"] == 35


def test_group_interval_equals_that_of_independent_resamples():
    """The members use the same seed, but share no image, so their resamples are independent."""
    rng = np.random.default_rng(0)
    hits = [rng.random((n, 1)) < share for n, share in ((900, 0.5), (900, 0.7), (400, 0.9), (2500, 0.2))]
    group = [evaluate.make_metrics({"top1": (hit, np.arange(len(hit)), len(hit))}) for hit in hits]
    samples = evaluate.average_metrics(group)["top1"].samples
    assert samples[0, 0] == pytest.approx(np.mean([100 * member.mean() for member in hits]))
    drawn = [np.mean([100 * rng.choice(member, len(member)).mean() for member in hits]) for _ in range(4000)]
    assert evaluate.interval(samples)[0] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.2)
