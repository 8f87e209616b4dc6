"""data/benchmarks.py, on small trees of each layout as its authors document it. What is promised:

* a reader gives the pictures, texts and labels that the files say, and main() scores a model that knows the
  colours 100 on each; its figures are those of one picture and one text at a time with real towers
* CLIP_benchmark's tars are read as its own reader reads them; of captions the first five count, or all
* imagefolder's names and templates come from files beside, else from the folders
* pictures and captions that are missing, damaged or empty shift nothing and are counted
* a folder of another layout is one line that names what is wrong
* a group scores each member as alone, and all on average
"""
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import flame
from data import benchmarks, intervals, towers
from data.pictures import Place, open_picture

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
           "white": (255, 255, 255)}
NAMES = list(COLOURS)
FINISHED = {"step": 3, "training": {"steps": 3}}     # of a checkpoint, its config.json
FOREIGN = dict(zip(NAMES, ("rouge", "vert", "bleu", "jaune", "blanc")))


# ---------------------------------------------------------------- small trees of the documented layouts

def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), COLOURS[colour]).save(path)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def tree_urban1k(root):
    for i, name in enumerate(NAMES, 1):
        picture(root / f"image/{i}.jpg", name)
        put(root / f"caption/{i}.txt", f"A {name} street.\nnot this line\n")


def tree_sharegpt4v(root):
    entries = []
    for name in NAMES:
        turns = [{"from": "human", "value": "red?"}, {"from": "gpt", "value": f"A {name}\nwall."}]
        entries.append({"id": name, "image": f"sam/images/{name}.jpg", "conversations": turns})
        picture(root / f"sam/images/{name}.jpg", name)
    put(root / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))


def tree_dci(root):
    root = root / "densely_captioned_images"
    splits = {"train": ["0.json", "1.json", "2.json"], "test": ["3.json"], "valid": ["4.json"]}
    put(root / "splits.json", json.dumps(splits))
    for i, name in enumerate(NAMES):
        entry = {"image": f"sa_{i}.jpg", "short_caption": f"A {name} door.",
                 "extra_caption": "It is shut.</s>Nobody\nis there. "}
        put(root / f"annotations/{i}.json", json.dumps(entry))
        picture(root / f"photos/sa_{i}.jpg", name)


def tree_docci(root):
    rows = []
    for name in NAMES:
        split = "train" if name == "white" else "test"
        rows.append({"split": split, "image_file": f"{name}.jpg", "description": f"A {name}\nwall."})
        picture(root / f"images/{name}.jpg", name)
    put(root / "docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))


def tree_xm3600(root):
    rows = []
    for name in NAMES:
        rows.append({"image/key": name, "image/locale": "fr", "en": {"caption": [f"a {name} wall", "red"]},
                     "fr": {"caption": [f"un mur {FOREIGN[name]}"]}})
        picture(root / f"images/{name}.jpg", name)
    put(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def tree_imagefolder(root):
    for name in NAMES:
        for i in range(3):
            picture(root / f"{name}/{i}.png", name)
    (root / ".cache").mkdir()   # of whoever looked there: no class


def tree_imagenet(root):
    for i, name in enumerate(NAMES):
        for n in range(3):
            picture(root / f"val/n0{i}/ILSVRC_{n}.JPEG", name)


def tree_of_tars(root, retrieval, split="test", lines=2):
    """Two tars, as clip_benchmark's webdataset builder writes a benchmark."""
    put(root / split / "nshards.txt", "2")
    for shard in range(2):
        with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
            for n, name in list(enumerate(NAMES))[shard::2]:
                image = io.BytesIO()
                Image.new("RGB", (12, 9), COLOURS[name]).save(image, "webp", lossless=True)
                text = "\n".join(f"A {name} wall {i}." for i in range(lines)) if retrieval else str(n)
                for suffix, data in (("webp", image.getvalue()), ("txt" if retrieval else "cls",
                                                                  text.encode())):
                    member = tarfile.TarInfo(f"s{n:07}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if retrieval:
        put(root / "dataset_type.txt", "retrieval\n")
    else:
        put(root / "classnames.txt", "\n".join(NAMES) + "\n")
        put(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\n{c}\n")


def tree_coco(root):
    tree_of_tars(root, retrieval=True, lines=7)


def tree_food101(root):
    tree_of_tars(root, retrieval=False)


def tree_demo(root):
    for split in ("test", "val"):
        rows = [f"{n}\timages/{split}/{n}.png\t{n}\ta {n} thing\tA {n} thing, in detail.\tThe {n} one.\n"
                for n in NAMES]
        put(root / f"{split}.tsv", "key\timage\traw\tshort\tlong\treworded\n" + "".join(rows))
        for n in NAMES:
            picture(root / f"images/{split}/{n}.png", n)
    rows = []
    for n in reversed(NAMES):  # unseen ones first: places among all objects differ from places among the seen
        for i in range(4):
            split = "unseen" if n in ("yellow", "white") else "seen"
            rows.append(f"images/objects/{n}{i}.png\t{n}\t{split}\n")
            picture(root / f"images/objects/{n}{i}.png", n)
    put(root / "objects.tsv", "image\tobject\tsplit\n" + "".join(rows))
    put(root / "names.tsv", "object\ten\tfr\n" + "".join(f"{n}\t{n}\t{FOREIGN[n]}\n" for n in NAMES))
    synonyms = "".join(f"{n}\tvery {n}\t{n} hue\n" for n in NAMES)
    put(root / "synonyms.tsv", f"object\tfirst\tsecond\n{synonyms}")


TREES = {name.removeprefix("tree_"): tree for name, tree in globals().items()
         if name.startswith("tree_") and name != "tree_of_tars"}
PLAIN = [bench for bench in TREES if bench != "demo"]


# ---------------------------------------------------------------- a model whose answers are known

class ColourModel:
    """Embeds a picture as its mean colour."""

    config = {"llm": {"name": "colours", "fingerprint": "f", "layer": 1, "positions": "restart"},
              "text_dim": 3, "columns": flame.COLUMNS}

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


class ColourWords:
    """Embeds a text as the colour of the word for one in it. `lies` renames colours: a known error."""
    lies, dim = {}, 3

    def __init__(self, llm_dir, device, dtype, layer=None, positions="restart"):
        assert (layer, positions) == (1, "restart")     # the checkpoint's own

    def encode_batches(self, texts, prompts):
        assert len(set(texts)) == len(texts) and all(texts)
        words = dict(zip(FOREIGN.values(), NAMES)) | dict(zip(NAMES, NAMES)) | self.lies
        for row, text in reversed(list(enumerate(texts))):  # any order, as the real one's
            tokens = text.lower().replace(",", " ").replace(".", " ").split()
            colour = next(words[token] for token in tokens if token in words)
            state = torch.tensor(COLOURS.get(colour, (0, 0, 0))) - 100.0
            lengths = torch.arange(1, len(flame.PROMPTS[prompts].facets) + 1)[:, None]
            yield [row], (state * lengths)[None]


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """Runs main() on data/<bench>, in an empty folder with a finished checkpoint; -> (exit code, result)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLAME_LLM", raising=False)
    monkeypatch.setattr(flame, "load", lambda folder: ColourModel())
    monkeypatch.setattr(flame, "hub_folder", lambda name: name)
    monkeypatch.setattr("data.towers.llm_fingerprint", lambda folder: "f")
    monkeypatch.setattr(flame, "llm_config", lambda folder: {"hidden_size": 3})
    monkeypatch.setattr(flame, "TextEncoder", ColourWords)
    monkeypatch.setattr(ColourWords, "lies", {})
    monkeypatch.setattr(benchmarks, "IMAGENET", tmp_path / "names")
    monkeypatch.setattr(towers, "BATCH", 2)
    put(tmp_path / "names/classnames.txt", "\n".join(NAMES))
    put(tmp_path / "names/zeroshot_classification_templates.txt", "a {c} photo.\n")
    put(tmp_path / "out/run/config.json", json.dumps(FINISHED))
    put(tmp_path / "out/run/model.safetensors", "")

    def run(bench, *more):
        flags = ["--bench", bench] if bench in evaluate.BENCHMARKS else []
        code = evaluate.main([*flags, "--device", "cpu", *map(str, more)])
        path = tmp_path / f"results/{bench}.json"
        return code, json.loads(path.read_text()) if path.exists() else None
    return run


def refusal(capsys):
    """The one line on stderr."""
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: ")
    return line


# ---------------------------------------------------------------- what is read

def test_readers_give_what_the_files_say(tmp_path):
    for bench in PLAIN:
        TREES[bench](tmp_path / bench)
    read = {bench: benchmarks.read(bench, tmp_path / bench) for bench in PLAIN if bench != "imagenet"}
    owner = list(range(5))
    folder = str(tmp_path)
    assert read["urban1k"] == ([Place(f"{folder}/urban1k/image/{i}.jpg") for i in range(1, 6)],
                               {"": ([f"A {name} street." for name in NAMES], owner)})
    assert read["sharegpt4v"] == ([Place(f"{folder}/sharegpt4v/sam/images/{name}.jpg") for name in NAMES],
                                  {"": ([f"A {name} wall." for name in NAMES], owner)})
    texts, _ = read["dci"][1][""]
    assert texts == [f"A {name} door. It is shut. Nobody. is there" for name in NAMES]
    assert read["docci"] == ([Place(f"{folder}/docci/images/{name}.jpg") for name in NAMES[:4]],
                             {"": ([f"A {name} wall." for name in NAMES[:4]], owner[:4])})
    assert read["xm3600"][1]["fr"] == ([f"un mur {FOREIGN[name]}" for name in NAMES], owner)
    assert read["xm3600"][1]["en"][1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert benchmarks.read("xm3600", tmp_path / "xm3600", most=1)[1]["en"][1] == owner
    assert read["coco"][1][""][0][:8] == [f"A red wall {i}." for i in range(7)] + ["A blue wall 0."]
    assert len(benchmarks.read("coco", tmp_path / "coco", most=5)[1][""][0]) == 25
    assert read["food101"][1:] == ([0, 2, 4, 1, 3], NAMES, ["a photo of a {}.", "{}"])
    assert read["imagefolder"][1:3] == ([i for i in range(5) for _ in range(3)], sorted(NAMES))
    tree_demo(tmp_path)
    halves = [{place.path[-5] for place, *_ in benchmarks.read("demo", tmp_path, split)[2]}
              for split in ("val", "test")]
    assert halves == [{"0", "2"}, {"1", "3"}]   # an object's pictures; one is chosen on, the other scored


def test_sharegpt4v_takes_a_thousand_of_a_longer_file(tmp_path):
    entry = {"image": "a.jpg", "conversations": [{"value": "?"}, {"value": "x"}, {"value": "no"}]}
    path = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    put(path, json.dumps([{**entry, "image": f"{n}.jpg"} for n in range(3000)]))
    pictures, data = benchmarks.read("sharegpt4v", tmp_path)
    assert [place.path for place in pictures] == [f"{tmp_path}/{n}.jpg" for n in range(1000)]
    assert data[""] == (["x"] * 1000, list(range(1000)))


@pytest.mark.parametrize("bench", ["flickr30k", "cifar10"])
def test_tars_are_read_as_clip_benchmark_reads_them(bench, tmp_path):
    from clip_benchmark.datasets.builder import build_wds_dataset
    tree_of_tars(tmp_path, bench == "flickr30k")
    theirs = build_wds_dataset(bench, lambda image: np.array(image.convert("RGB")), "test", str(tmp_path))
    if bench == "flickr30k":
        pictures, data = benchmarks.read(bench, tmp_path)
        texts = [[text for text, i in zip(*data[""]) if i == n] for n in range(len(pictures))]
    else:
        pictures, texts, names, templates = benchmarks.read(bench, tmp_path)
        assert names == theirs.classes
        assert templates == [line.replace("{c}", "{}") for line in theirs.templates]
    ours = [np.array(open_picture(place).convert("RGB")) for place in pictures]
    for (image, text), our_image, our_text in zip(theirs, ours, texts, strict=True):
        assert np.array_equal(image, our_image) and text == our_text


def test_names_and_templates_lie_beside_the_folders(tmp_path):
    tree_imagefolder(tmp_path)
    assert benchmarks.read("imagefolder", tmp_path)[3] == ["a photo of a {}."]
    put(tmp_path / "classnames.txt", "azure\nlime\nruby\nsnow\nlemon\n")
    put(tmp_path / "zeroshot_classification_templates.txt", "my {c}\n\n{}, new\n")
    assert benchmarks.read("imagefolder", tmp_path)[2:] == (
        ["azure", "lime", "ruby", "snow", "lemon"], ["my {}", "{}, new"])
    put(tmp_path / "classnames.txt", "\ufeffazure\nlime\n")
    with pytest.raises(flame.InputError, match="5 class folders, 2 names"):
        benchmarks.read("imagefolder", tmp_path)


def test_imagenets_own_names_are_whole():
    names, templates = benchmarks.names_and_templates(benchmarks.IMAGENET)
    assert len(names) == 1000 and names[0] == "tench" and names[-1] == "toilet paper"
    assert sorted(name for name in set(names) if names.count(name) > 1) == ["missile", "sunglasses"]
    assert len(templates) == 80 and all("{}" in template for template in templates)


# ---------------------------------------------------------------- through main()

@pytest.mark.parametrize("bench", PLAIN)
def test_a_perfect_model_scores_100(bench, colours, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    code, result = colours(bench)
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


def test_bad_pictures_and_captions_shift_nothing(colours, tmp_path, capsys):
    root = tmp_path / "data/urban1k"
    tree_urban1k(root)
    whole = (root / "image/1.jpg").read_bytes()
    (root / "image/1.jpg").write_bytes(whole[:len(whole) // 2])     # truncated
    (root / "image/2.jpg").unlink()
    os.mkfifo(root / "image/2.jpg")         # to open it is to wait without end
    put(root / "caption/4.txt", "\n")       # empty: its picture stays a distractor
    (root / "caption/5.txt").unlink()       # missing: its picture is none of the benchmark's
    put(root / "caption/9.txt", "A green ghost.")                   # no picture
    put(root / "caption/6.txt", "A yellow street.")
    picture(root / "image/6.jpg", "yellow")
    for _ in range(2):      # the second time from the cache
        code, result = colours("urban1k")
        assert code == 0 and (result["n_images"], result["skipped_images"]) == (3, 3)
        assert (result["n_texts"], result["skipped_texts"]) == (2, 4)
        assert result["text_to_image"]["R@1"] == 50         # the yellow one has a distractor of its colour
        assert "3 of 6 pictures cannot be read (data/urban1k/image/1.jpg, " in capsys.readouterr().err


def write(name, text):
    return lambda root: put(root / name, text)


def add(name):
    def to_the_last_tar(root):
        with tarfile.open(root / "test/1.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return to_the_last_tar


def pipe(name):
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


def hole(name):     # a header of zeros, which tarfile takes for the end
    return lambda root: (root / name).write_bytes(bytes(512) + (root / name).read_bytes()[512:])


@pytest.mark.parametrize("bench, break_it, message", [
    ("sharegpt4v", write("share-captioner_coco_lcs_sam_1246k_1107.json", '[{"image": 1'), "1107.json: "),
    ("dci", write("densely_captioned_images/splits.json", "{"), "splits.json: "),
    ("dci", write("densely_captioned_images/annotations/3.json", "{}"), "3.json: no 'short_caption'"),
    ("docci", write("docci_descriptions.jsonlines", '{"split": "test"}'), "jsonlines: "),
    ("docci", pipe("docci_descriptions.jsonlines"), "jsonlines: "),
    ("xm3600", write("captions.jsonl", ""), "data/xm3600: no pictures"),
    ("urban1k", lambda root: (root / "caption/1.txt").write_bytes(b"\xff"), "1.txt: "),
    ("imagefolder", lambda root: [(root / name).rename(root.parent / name) for name in NAMES[1:]],
     "1 class folders"),
    ("food101", write("classnames.txt", "a\nb\n"), "1.tar: IndexError"),
    ("food101", lambda root: (root / "test").rename(root / "train"), "split test is not in it"),
    ("docci", lambda root: root.rename(root.parent / "elsewhere"), "data/docci: no such folder"),
    ("coco", pipe("test/0.tar"), "0.tar: "),
    ("coco", write("test/0.tar", "no tar"), "0.tar: "),
    ("coco", hole("test/0.tar"), "0.tar: tar that is none, or damaged"),
    ("coco", add("s9.webp"), "1.tar: no '.txt'"),
    ("coco", add("s9.txt"), "1.tar: "),
    ("demo", write("test.tsv", "key\timage\n1\t2\t3\n"), "test.tsv: no ")])
def test_another_layout_is_one_line(bench, break_it, message, colours, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    break_it(tmp_path / "data" / bench)
    assert colours(bench) == (2, None)
    assert message in refusal(capsys) and not (tmp_path / "results").exists()


# ---------------------------------------------------------------- groups

def test_a_group_scores_each_as_alone_and_averages(colours, tmp_path, monkeypatch, capsys):
    for bench in ("coco", "flickr30k"):
        tree_coco(tmp_path / "elsewhere" / bench)
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})
    (tmp_path / "elsewhere/flickr30k/test/1.tar").unlink()     # red, blue and white stay
    code, group = colours("short", "--data-root", "elsewhere")
    assert code == 0
    printed = capsys.readouterr().out
    for bench in ("coco", "flickr30k"):
        assert colours(bench, "--data-root", f"elsewhere/{bench}")[1] == group["benchmarks"][bench]
    each = [group["benchmarks"][bench]["text_to_image"]["R@1"] for bench in ("coco", "flickr30k")]
    assert each == [80, pytest.approx(200 / 3)]
    assert group["text_to_image"]["R@1"] == pytest.approx(np.mean(each))
    low, high = group["ci95"]["text_to_image"]["R@1"]
    assert 30 <= low < 73 < high <= 100
    rows = printed.split("short: 2 benchmarks\n")[1].splitlines()
    assert [row.split()[0] for row in rows[:4]] == ["text_to_image", "image_to_text", "coco", "flickr30k"]
    assert colours("", "--compare", "results/short.json", "results/short.json")[0] == 0
    printed = capsys.readouterr().out
    for figure in ("text_to_image", "benchmarks/coco/text_to_image"):
        assert re.search(rf"^{figure} .* 0\.0 \[  0\.0,   0\.0\]", printed, re.M), printed
    code, group = colours("short", "--data-root", "elsewhere", "--all-captions")
    assert group["benchmarks"]["coco"]["n_texts"] == 35


def test_the_groups_interval_is_that_of_independent_draws():
    """Each benchmark drawn from the same seed, or from one of its own: their hits have nothing in common."""
    rng = np.random.default_rng(0)
    hits = [rng.random((n, 1)) < share for n, share in ((900, 0.5), (900, 0.7), (400, 0.9), (2500, 0.2))]
    group = [intervals.scored({"top1": (member, np.arange(len(member)), len(member))}) for member in hits]
    rows = intervals.averaged(group)["top1"].draws
    assert rows[0, 0] == pytest.approx(np.mean([100 * member.mean() for member in hits]))
    drawn = [np.mean([100 * rng.choice(member, len(member)).mean() for member in hits]) for _ in range(4000)]
    assert intervals.ends(rows)[0] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.2)
