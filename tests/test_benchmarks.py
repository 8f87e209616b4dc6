"""data/benchmarks.py: every reader on a small tree of the documented layout, through main() with a model
whose answers are known, and through main() with real (tiny, random) towers against one picture and one text
at a time.

    pytest tests/test_benchmarks.py
"""
import argparse
import functools
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

import evaluate
import flame
from data import benchmarks
from data.show import report

ROOT = Path(__file__).parent.parent
RECALL_AT = (1, 5, 10)
CLASSIFICATION = [
    bench for bench, row in evaluate.BENCHMARKS.items() if row.score is evaluate.score_classification
]
COMPOSITION = ["sugarcrepe", "winoground"]


def slow_rank(scores, right):
    """Place of the best right answer when equal scores are sorted wrong ones first, by python's own sort."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return next((place for place, i in enumerate(order) if right[i]), len(scores))


# ---------------------------------------------------------------- small trees of the documented layouts

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
}
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
    entries = [
        {
            "image": f"sam/images/{name}.jpg",
            "conversations": [
                {"from": "human", "value": "red?"},
                {"from": "gpt", "value": f"A {name}\nwall."},
            ],
        }
        for name in NAMES
    ]
    put(root / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))
    for name in NAMES:
        picture(root / "sam" / "images" / f"{name}.jpg", name)


def tree_dci(root):
    root = root / "densely_captioned_images"
    put(
        root / "splits.json",
        json.dumps({"train": ["0.json", "1.json", "2.json"], "test": ["3.json"], "valid": ["4.json"]}),
    )
    for i, name in enumerate(NAMES):
        entry = {
            "image": f"sa_{i}.jpg",
            "short_caption": f"A {name} door.",
            "extra_caption": "It is shut.</s>Nobody\nis there. ",
        }
        put(root / "annotations" / f"{i}.json", json.dumps(entry))
        picture(root / "photos" / f"sa_{i}.jpg", name)


def tree_docci(root):
    rows = [
        {
            "split": "test" if name != "white" else "train",
            "image_file": f"{name}.jpg",
            "description": f"A {name}\nwall.",
        }
        for name in NAMES
    ]
    put(root / "docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))
    for name in NAMES:
        picture(root / "images" / f"{name}.jpg", name)


def tree_karpathy(root, file, folder):
    images = [
        {
            "filepath": "val2014",
            "filename": f"{name}.jpg",
            "split": "val" if name == "white" else "test",
            "sentences": [{"raw": f"a {name} wall {n}"} for n in range(6)],
        }
        for name in NAMES
    ]
    images += [
        {"filepath": "val2014", "filename": "pink.jpg", "split": "val", "sentences": [{"raw": "a red wall"}]}
    ]
    put(root / file, json.dumps({"images": images, "dataset": "x"}))
    for name in NAMES:
        picture(root / folder / f"{name}.jpg", name)


def tree_coco(root):
    tree_karpathy(root, "dataset_coco.json", "val2014")


def tree_flickr30k(root):
    tree_karpathy(root, "dataset_flickr30k.json", "flickr30k-images")


FOREIGN = {"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "white": "blanc"}


def tree_xm3600(root):
    rows = [
        {
            "image/key": name,
            "image/locale": "fr",
            "en": {"caption": [f"a {name} wall", "red"]},
            "fr": {"caption": [f"un mur {FOREIGN[name]}"]},
        }
        for name in NAMES
    ]
    put(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name in NAMES:
        picture(root / "images" / f"{name}.jpg", name)


def tree_imagefolder(root):
    for name in NAMES:
        for i in range(3):
            picture(root / name / f"{i}.png", name)


def tree_demo(root):
    header = "key\timage\traw\tshort\tlong\treworded\n"
    for split in ("test", "val"):
        rows = [
            f"{n}\timages/{split}/{n}.png\t{n}\ta {n} thing\tA {n} thing, in some detail.\tThe {n} one.\n"
            for n in NAMES
        ]
        put(root / f"{split}.tsv", header + "".join(rows))
        for n in NAMES:
            picture(root / "images" / split / f"{n}.png", n)
    rows = []
    for n in reversed(NAMES):  # unseen ones first: places among all objects differ from places among the seen
        for i in range(4):
            rows.append(
                f"images/objects/{n}{i}.png\t{n}\t{'unseen' if n in ('yellow', 'white') else 'seen'}\n"
            )
            picture(root / "images" / "objects" / f"{n}{i}.png", n)
    put(root / "objects.tsv", "image\tobject\tsplit\n" + "".join(rows))
    put(root / "names.tsv", "object\ten\tfr\n" + "".join(f"{n}\t{n}\t{FOREIGN[n]}\n" for n in NAMES))
    synonyms = "".join(f"{n}\tvery {n}\t{n} hue\n" for n in NAMES)
    put(root / "synonyms.tsv", f"object\tfirst\tsecond\n{synonyms}")


def tree_sugarcrepe(root):
    for part in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        entries = {
            str(2 * i): {
                "filename": f"{name}.jpg",
                "caption": f"a {name} wall",
                "negative_caption": f"a {NAMES[i - 1]} wall",
            }
            for i, name in enumerate(NAMES)
        }
        put(root / f"{part}.json", json.dumps(entries))
    for name in NAMES:
        picture(root / "val2017" / f"{name}.jpg", name)


def tree_winoground(root):
    rows = [
        {
            "id": i,
            "caption_0": f"a {a} wall",
            "caption_1": f"the {b} wall",
            "image_0": f"ex_{i}_img_0",
            "image_1": f"ex_{i}_img_1",
        }
        for i, (a, b) in enumerate(zip(NAMES, NAMES[1:]))
    ]
    put(root / "examples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for i, pair in enumerate(zip(NAMES, NAMES[1:])):
        for j in (0, 1):
            picture(root / "images" / f"ex_{i}_img_{j}.png", pair[j])


# Classification: a class a colour, three pictures each to test and two to train, wherever the data set has
# its splits.
SPLITS = {"test": range(3), "train": range(3, 5)}


def tree_imagenet(root):
    for split, numbers in SPLITS.items():
        for i, name in enumerate(NAMES):
            for n in numbers:
                picture(root / {"test": "val"}.get(split, split) / f"n0{i}" / f"ILSVRC_{n}.JPEG", name)


def tree_food101(root):
    for split, numbers in SPLITS.items():
        put(
            root / "food-101" / "meta" / f"{split}.txt",
            "".join(f"{name}/{n}\n" for name in NAMES for n in numbers),
        )
        for name in NAMES:
            for n in numbers:
                picture(root / "food-101" / "images" / name / f"{n}.jpg", name)


def tree_cifar(folder, split_files, names_file, extra):
    put(folder / names_file, "".join(f"{name}\n" for name in NAMES) + "\n")
    for split, files in split_files.items():
        records = b"".join(bytes([*extra, i]) + b"".join(bytes([value]) * 1024 for value in COLOURS[name])
                           for i, name in enumerate(NAMES) for _ in SPLITS[split])
        for file in files:
            (folder / file).write_bytes(records)


def tree_cifar10(root):
    tree_cifar(
        root / "cifar-10-batches-bin",
        {"test": ["test_batch.bin"], "train": [f"data_batch_{i}.bin" for i in range(1, 6)]},
        "batches.meta.txt",
        [],
    )


def tree_cifar100(root):
    tree_cifar(
        root / "cifar-100-binary",
        {"test": ["test.bin"], "train": ["train.bin"]},
        "fine_label_names.txt",
        [19],
    )


def tree_sun397(root):
    where = {name: f"{name[0]}/{name}" + ("/indoor" if name == "white" else "") for name in NAMES}
    for split, numbers in SPLITS.items():
        put(
            root / f"{split.title()}ing_01.txt",
            "".join(f"/{where[name]}/sun_{n}.jpg\n" for name in NAMES for n in numbers),
        )
        for name in NAMES:
            for n in numbers:
                picture(root / "SUN397" / where[name] / f"sun_{n}.jpg", name)


def tree_cars(root):
    (root / "devkit").mkdir(parents=True)
    savemat(
        root / "devkit" / "cars_meta.mat",
        {"class_names": np.array([f"{name} car" for name in NAMES], object)},
    )
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(i + 1, f"{name}{n}.jpg") for i, name in enumerate(NAMES) for n in SPLITS[split]]
        savemat(root / file, {"annotations": np.array(rows, [("class", object), ("fname", object)])})
        for i, file in rows:
            picture(root / f"cars_{split}" / file, NAMES[i - 1])


def tree_aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    for split, numbers in SPLITS.items():
        rows = [(f"{i}{n}", name) for i, name in enumerate(NAMES) for n in numbers]
        put(
            data / f"images_variant_{'trainval' if split == 'train' else split}.txt",
            "".join(f"{number} {name} 700\n" for number, name in rows),
        )
        for number, name in rows:
            picture(data / "images" / f"{number}.jpg", name)


def tree_dtd(root):
    for file, numbers in (("test1.txt", [0, 1, 2]), ("train1.txt", [3]), ("val1.txt", [4])):
        put(
            root / "dtd" / "labels" / file,
            "".join(f"{name}/{name}_{n}.jpg\n" for name in NAMES for n in numbers),
        )
        for name in NAMES:
            for n in numbers:
                picture(root / "dtd" / "images" / name / f"{name}_{n}.jpg", name)


def tree_pets(root):
    for split, numbers in SPLITS.items():
        put(
            root / "annotations" / f"{'trainval' if split == 'train' else split}.txt",
            "#Image CLASS-ID SPECIES BREED ID\n"
            + "".join(f"{name}_cat_{n} {i + 1} 1 1\n" for i, name in enumerate(NAMES) for n in numbers),
        )
        for name in NAMES:
            for n in numbers:
                picture(root / "images" / f"{name}_cat_{n}.jpg", name)


def tree_caltech101(root):
    for name in NAMES:
        for n in range(33):     # 30 train, 3 test
            picture(root / "101_ObjectCategories" / name / f"image_{n:04}.jpg", name)


def tree_flowers102(root):
    root.mkdir(parents=True, exist_ok=True)
    labels = [i + 1 for i in range(len(NAMES)) for _ in range(5)]
    numbers = {
        split: [5 * i + n + 1 for i in range(len(NAMES)) for n in part]
        for split, part in (("tstid", [0, 1, 2]), ("trnid", [3]), ("valid", [4]))
    }
    savemat(root / "imagelabels.mat", {"labels": np.array(labels, np.uint8)})
    savemat(root / "setid.mat", {split: np.array(ids, np.uint16) for split, ids in numbers.items()})
    for number, label in enumerate(labels, 1):
        picture(root / "jpg" / f"image_{number:05}.jpg", NAMES[label - 1])


def tree_fashionmnist(root):
    root.mkdir(parents=True, exist_ok=True)
    for split, part in (("t10k", SPLITS["test"]), ("train", SPLITS["train"])):
        labels = [label for label in (0, 1) for _ in part]      # 0 white, 1 black: there are no other greys
        pixels = b"".join(bytes([255 * (label == 0)]) * 784 for label in labels)
        for name, magic, shape, body in (
            ("images-idx3", 2051, (len(labels), 28, 28), pixels),
            ("labels-idx1", 2049, (len(labels),), bytes(labels)),
        ):
            (root / f"{split}-{name}-ubyte.gz").write_bytes(
                gzip.compress(np.array([magic, *shape], ">i4").tobytes() + body)
            )


TREES = {
    name.removeprefix("tree_"): make
    for name, make in list(globals().items())
    if name.startswith("tree_") and name not in ("tree_karpathy", "tree_cifar")
}
# Where the layout gives numbers or ids, or the names that come with the repository are those of the whole
# data set.
CLASS_FILES = {
    "imagenet": [f"n0{i}" for i in range(5)],
    "caltech101": NAMES,
    "flowers102": range(1, 6),
    "pets": [f"{name}_cat" for name in NAMES],
    "fashionmnist": range(10),
    "cifar10": [],
    "cifar100": [],
}


def class_file(bench, folder):
    """--classes FILE for benches in CLASS_FILES"""
    if bench not in CLASS_FILES:
        return []
    names = ["white", "black"] + ["yellow"] * 8 if bench == "fashionmnist" else NAMES
    put(
        folder / f"{bench}.classes",
        "# a comment\na photo of a {}\n"
        + "".join(f"{c}\t{name}\n" for c, name in zip(CLASS_FILES[bench], names)),
    )
    return ["--classes", str(folder / f"{bench}.classes")]


def test_every_benchmark_has_a_tree_and_its_layout_is_documented():
    known = evaluate.BENCHMARKS.keys()
    assert known == TREES.keys()
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert all(f"**{bench}**" in readme or f"### {bench}" in readme for bench in known)


# ---------------------------------------------------------------- readers

def read(bench, root, split="test", **more):
    """What evaluate.py reads of a tree, with flags as it parses them."""
    flags = {"data_root": root, "classes": None, "language": None, "captions": None,
             "how": evaluate.BENCHMARKS[bench]}
    return evaluate.read(argparse.Namespace(bench=bench, **flags | more), split)


def test_readers_give_what_the_files_say(tmp_path):
    for bench in ("urban1k", "sharegpt4v", "dci", "docci", "coco"):
        TREES[bench](tmp_path / bench)
    images, texts, owner = benchmarks.urban1k(tmp_path / "urban1k")
    assert [path.name for path in images] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"] and owner == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert texts[0] == "A red street."
    assert benchmarks.sharegpt4v(tmp_path / "sharegpt4v")[1][1] == "A green wall."
    images, texts, _ = benchmarks.dci(tmp_path / "dci")
    assert (
        texts[2] == "A blue door. It is shut. Nobody. is there"
        and images[2].name == "sa_2.jpg"
        and len(texts) == 5
    )
    images, texts, _ = benchmarks.docci(tmp_path / "docci")
    assert texts == [f"A {name} wall." for name in NAMES[:4]]
    images, texts, owner = benchmarks.coco(tmp_path / "coco", most=5)
    assert [path.stem for path in images] == NAMES[:4] and owner == [i for i in range(4) for _ in range(5)]
    assert texts[5:7] == ["a green wall 0", "a green wall 1"]
    images, texts, owner = benchmarks.coco(tmp_path / "coco", "val")
    assert [path.name for path in images] == ["white.jpg", "pink.jpg"] and owner == [0, 0, 0, 0, 0, 0, 1]


def test_sharegpt4v_takes_a_thousand_of_a_longer_file(tmp_path):
    entry = {"image": "a.jpg", "conversations": [{"value": "?"}, {"value": "x"}]}
    put(
        tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps([entry] * 1003)[:-60]
    )  # cut off after the 1,000th
    assert len(benchmarks.sharegpt4v(tmp_path)[1]) == 1000


def test_composition_rows_say_what_must_win(tmp_path):
    tree_sugarcrepe(tmp_path / "s")
    pictures, texts, parts = benchmarks.sugarcrepe(tmp_path / "s")
    assert len(parts) == 7 and len(pictures) == 5 and len(texts) == 70
    picture, [((a, right), (b, wrong))] = parts["swap_obj"][1]
    assert picture == a == b and (pictures[a].name, texts[right], texts[wrong]) == (
        "green.jpg",
        "a green wall",
        "a red wall",
    )
    tree_winoground(tmp_path / "w")
    pictures, texts, parts = benchmarks.winoground(tmp_path / "w")
    spelled = {
        part: [
            (pictures[p].stem[-1] + texts[t][:3], pictures[q].stem[-1] + texts[u][:3])
            for (p, t), (q, u) in rows[0][1]
        ]
        for part, rows in parts.items()
    }
    assert spelled["text"] == [("0a r", "0the"), ("1the", "1a r")] and spelled["image"] == [
        ("0a r", "1a r"),
        ("1the", "0the"),
    ]
    assert spelled["group"] == spelled["text"] + spelled["image"]


@pytest.mark.parametrize("bench", CLASSIFICATION)
def test_classes_are_those_of_the_files(tmp_path, bench):
    """Each picture's colour is what its class says, in both splits, and the splits share nothing."""
    TREES[bench](tmp_path)
    words, seen = ["white", "black"] if bench == "fashionmnist" else NAMES, {}
    for split in ("test",) if bench == "imagefolder" else ("test", "train"):
        files = [Path(path) for path in class_file(bench, tmp_path.parent)[1:]]
        pictures, labels, names, templates = benchmarks.with_names(
            *getattr(benchmarks, bench)(tmp_path, split), files
        )
        assert len(pictures) == len(labels) and len(labels) == {
            "caltech101": 5 * (3 if split == "test" else 30),
            "fashionmnist": 2 * len(SPLITS[split]),
            "cifar10": 15 if split == "test" else 50,
        }.get(bench, 5 * len(SPLITS[split]))
        for item, label in zip(pictures, labels):
            with report.open_picture(item) as image:
                mean = np.array(image.convert("RGB")).mean((0, 1))
            nearest = min(
                [*words, "black"], key=lambda word: np.abs(mean - COLOURS.get(word, (0, 0, 0))).sum()
            )
            assert nearest in names[label]
        seen[split] = {item if isinstance(item, Path) else None for item in pictures} - {None}
    assert not seen["test"] & seen.get("train", set())


def test_class_files_that_come_along_are_whole():
    sizes = {
        "imagenet": (1000, 80),
        "imagenet.ar": (1000, 55),
        "imagenet.cn": (1000, 80),
        "imagenet.it": (1000, 49),
        "imagenet.jp": (1000, 37),
        "caltech101": (102, 34),
        "flowers102": (102, 1),
        "pets": (37, 1),
        "fashionmnist": (10, 3),
        "food101": (0, 1),
        "cifar10": (0, 18),
        "cifar100": (0, 18),
        "sun397": (0, 2),
        "cars": (0, 8),
        "aircraft": (0, 2),
        "dtd": (0, 8),
    }
    assert {path.stem for path in benchmarks.CLASSES.iterdir()} == sizes.keys()
    english = benchmarks.read_classes(benchmarks.CLASSES / "imagenet.txt")[0]
    for name, size in sizes.items():
        names, templates = benchmarks.read_classes(benchmarks.CLASSES / f"{name}.txt")
        assert (len(names), len(templates)) == size
        assert not name.startswith("imagenet.") or names.keys() == english.keys()


def test_names_and_templates_of_a_file(tmp_path):
    put(tmp_path / "a.txt", "# old\na {}\n\nb\thot dog\na\tcat\n")
    put(tmp_path / "b.txt", "my {}\nyour {}\n")
    got = benchmarks.with_names(
        [1, 2, 3], ["b", "a", "b"], {"a": "A", "b": "B"}, [tmp_path / "a.txt", tmp_path / "b.txt"]
    )
    assert got == ([1, 2, 3], [1, 0, 1], ["cat", "hot dog"], ["my {}", "your {}"])
    assert benchmarks.with_names([1, 2], ["x_y", "a"], {}, []) == (
        [1, 2],
        [1, 0],
        ["a", "x y"],
        ["a photo of a {}."],
    )
    for line, message in (
        ("c\tcow\n", "line 6: the data set has no class 'c'"),
        ("cow\n", "line 6: 'cow' is neither"),
    ):
        put(tmp_path / "c.txt", (tmp_path / "a.txt").read_text() + line)
        with pytest.raises(flame.InputError, match=message):
            benchmarks.with_names([1], ["a"], {"a": "A", "b": "B"}, [tmp_path / "c.txt"])
    put(tmp_path / "c.txt", "a\tcat\n")
    with pytest.raises(flame.InputError, match="no line for the class 'b'"):
        benchmarks.with_names([1], ["a"], {"a": "A", "b": "B"}, [tmp_path / "c.txt"])


def test_demo_halves_objects_between_val_and_test(tmp_path):
    tree_demo(tmp_path)
    halves = {
        split: [path.name for path, _, _ in benchmarks.demo(tmp_path, split)[2]] for split in ("val", "test")
    }
    assert halves["val"][:4] == ["white0.png", "white2.png", "yellow0.png", "yellow2.png"]
    assert halves["test"][:4] == ["white1.png", "white3.png", "yellow1.png", "yellow3.png"]


def test_imagefolder_reads_its_own_files(tmp_path):
    tree_imagefolder(tmp_path)
    put(tmp_path / "templates.txt", "my {}\n")
    put(tmp_path / "classes.txt", "".join(f"{name}\tlight {name}\n" for name in reversed(NAMES)))
    pictures, labels, names, templates = read("imagefolder", tmp_path)
    assert (
        names == [f"light {name}" for name in sorted(NAMES)]
        and templates == ["my {}"]
        and labels[:4] == [0, 0, 0, 1]
    )
    assert pictures[3].parent.name == "green"
    for part in ("train", "test"):
        tree_imagefolder(tmp_path / "halves" / part)
    assert all(
        path.parent.parent.name == "train" for path in read("imagefolder", tmp_path / "halves", "train")[0]
    )
    with pytest.raises(flame.InputError, match="no folders train and test"):
        read("imagefolder", tmp_path, "train")


def test_xm3600_in_the_languages_asked_for(tmp_path):
    tree_xm3600(tmp_path)
    assert list(read("xm3600", tmp_path)[1]) == ["en", "fr"]
    every = evaluate.BENCHMARKS["xm3600"]._replace(most=None)
    languages = read("xm3600", tmp_path, language="en", how=every)[1]
    assert (
        list(languages) == ["en"]
        and languages["en"][0][:2] == ["a red wall", "red"]
        and languages["en"][1] == [i for i in range(5) for _ in "ab"]
    )
    with pytest.raises(flame.InputError, match="--language de: .*has only en, fr"):
        read("xm3600", tmp_path, language="en,de")


BROKEN = [
    (
        "urban1k",
        lambda r: (r / "caption").rename(r / "captions"),
        "urban1k.caption: not found; data/README.md",
    ),
    ("coco", lambda r: put(r / "dataset_coco.json", '{\n"images": ['), "dataset_coco.json: line 2: not JSON"),
    (
        "coco",
        lambda r: put(r / "dataset_coco.json", '{"images": [{"split": "test"}]}'),
        "entry 0: no 'sentences'",
    ),
    (
        "coco",
        lambda r: put(r / "dataset_coco.json", '{"images": [{"split": "test", "sentences": [{"raw": 3}]}]}'),
        "entry 0: 'raw' is not a str",
    ),
    ("coco", lambda r: put(r / "dataset_coco.json", "[]"), "dataset_coco.json: no 'images'"),
    (
        "coco",
        lambda r: put(r / "coco_test_karpathy.json", '{"images": [], "annotations": [{"image_id": []}]}'),
        "coco_test_karpathy.json: entry 0: 'image_id' is not a int",
    ),
    (
        "flickr30k",
        lambda r: put(r / "flickr30k_test_karpathy.txt", "image,caption\n1.jpg,a dog\n\na cat\n"),
        "flickr30k_test_karpathy.txt: line 4: not <picture>.jpg,<caption>",
    ),
    (
        "docci",
        lambda r: put(r / "docci_descriptions.jsonlines", "{}\n{"),
        "docci_descriptions.jsonlines: line 1: no 'split'",
    ),
    (
        "docci",
        lambda r: put(r / "docci_descriptions.jsonlines", "[]\n"),
        "docci_descriptions.jsonlines: line 1: not a JSON object",
    ),
    ("dci", lambda r: put(r / "densely_captioned_images" / "splits.json", '["a"]'), "splits.json: no 'a'"),
    (
        "sharegpt4v",
        lambda r: put(r / "share-captioner_coco_lcs_sam_1246k_1107.json", '[{"image": 1}]'),
        "entry 0: 'image' is not a str",
    ),
    (
        "xm3600",
        lambda r: put(r / "captions.jsonl", '{"image/key": "a", "en": {}}'),
        "captions.jsonl: line 1: no 'caption'",
    ),
    (
        "sugarcrepe",
        lambda r: put(r / "add_obj.json", '{"0": {"filename": "a"}}'),
        "add_obj.json: entry 0: no 'caption'",
    ),
    ("winoground", lambda r: put(r / "examples.jsonl", '{"image_0": "a"}'), "line 1: no 'caption_0'"),
    (
        "food101",
        lambda r: put(r / "food-101" / "meta" / "test.txt", "red/1\nred\n"),
        "test.txt: line 2: not class/picture",
    ),
    (
        "cifar10",
        lambda r: (r / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"x" * 3074),
        "test_batch.bin: 3074 bytes are no whole number",
    ),
    (
        "cars",
        lambda r: (r / "devkit" / "cars_meta.mat").write_bytes(b"x"),
        "cars_meta.mat: not a MATLAB file",
    ),
    (
        "cars",
        lambda r: (r / "devkit" / "cars_meta.mat").unlink(),
        "^[^ ]*cars_meta.mat: not found; data/README.md",
    ),
    ("cars", lambda r: savemat(r / "devkit" / "cars_meta.mat", {"x": 1}), "cars_meta.mat: no 'class_names'"),
    (
        "cars",
        lambda r: savemat(r / "cars_test_annos_withlabels.mat", {"annotations": [1, 2]}),
        "annotations without fname and class",
    ),
    (
        "flowers102",
        lambda r: savemat(r / "setid.mat", {"tstid": [1, 99]}),
        "setid.mat: picture 99 has no label",
    ),
    (
        "flowers102",
        lambda r: savemat(r / "setid.mat", {"tstid": [1, 0]}),
        "setid.mat: picture 0 has no label",
    ),
    (
        "flowers102",
        lambda r: savemat(r / "setid.mat", {"tstid": "abc"}),
        "setid.mat: 'tstid' is no list of int",
    ),
    (
        "cifar10",
        lambda r: put(r / "cifar-10-batches-bin" / "batches.meta.txt", "red\n"),
        "a picture's class is '1', none of the data set's 1",
    ),
    ("coco", lambda r: put(r / "dataset_coco.json", "[" * 100_000), "dataset_coco.json: line 1: not JSON"),
    (
        "docci",
        lambda r: put(r / "docci_descriptions.jsonlines", '{"a": ' + "1" * 5000 + "}\n"),
        "line 1: not JSON",
    ),
    (
        "fashionmnist",
        lambda r: (r / "t10k-images-idx3-ubyte.gz").write_bytes(b"x"),
        "t10k-images-idx3-ubyte.gz: not an IDX file",
    ),
    (
        "fashionmnist",
        lambda r: (r / "t10k-labels-idx1-ubyte.gz").write_bytes(
            (r / "train-labels-idx1-ubyte.gz").read_bytes()
        ),
        "6 pictures and 4 labels",
    ),
    (
        "imagenet",
        lambda r: (r / "val").rename(r / "validation"),
        "val: not found; data/README.md says where to get it",
    ),
    (
        "caltech101",
        lambda r: [
            folder.rename(r / folder.name) for folder in list((r / "101_ObjectCategories").iterdir())[1:]
        ],
        "1 class folder",
    ),
    ("demo", lambda r: put(r / "objects.tsv", "image\tobject\n"), "objects.tsv: line 1: no column 'split'"),
    ("demo", lambda r: put(r / "names.tsv", "object\ten\nred\tred\n"), "names.tsv: no row for 'blue'"),
    (
        "demo",
        lambda r: (r / "test.tsv").write_bytes(b"key\timage\traw\tshort\tlong\n\xff\n"),
        "test.tsv: line 2: not UTF-8",
    ),
    (
        "demo",
        lambda r: put(r / "synonyms.tsv", "object\tfirst\nred\truby\n"),
        "synonyms.tsv: no row for 'blue'",
    ),
]


@pytest.mark.parametrize(
    "bench, break_it, message", BROKEN, ids=[f"{bench}-{n}" for n, (bench, _, _) in enumerate(BROKEN)]
)
def test_wrong_files_get_one_clear_line(tmp_path, bench, break_it, message):
    TREES[bench](tmp_path / bench)
    read(
        bench,
        tmp_path / bench,
        classes=Path(path) if (path := (class_file(bench, tmp_path) or [None])[-1]) else None,
    )
    break_it(tmp_path / bench)
    with pytest.raises(flame.InputError, match=message) as error:
        read(bench, tmp_path / bench)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- through main(), with a model whose answers
# are known

class ColourModel:
    """Embeds a picture as its mean colour."""

    config = {
        "llm": {"name": "colours", "fingerprint": "f", "layer": 1, "positions": "restart"},
        "text_dim": 3,
        "width": 3,
        "columns": flame.COLUMNS,
    }

    def to(self, device):
        return self

    def state_dict(self):
        return {}

    def visual(self, pixels):
        """Patch tokens: the class token, then one patch, the mean colour: a probe can tell them apart."""
        mean = pixels.mean((2, 3))[:, None] - 100
        return torch.cat([torch.zeros_like(mean), mean], dim=1)

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
        words = (
            {"black": "black"}
            | {FOREIGN[name]: name for name in NAMES}
            | {name: name for name in NAMES}
            | self.lies
        )
        for row, text in reversed(list(enumerate(texts))):  # any order, as the real one's
            colour = next(
                words[word]
                for word in text.lower().replace(",", " ").replace(".", " ").split()
                if word in words
            )
            state = torch.tensor(COLOURS.get(colour, (0, 0, 0))) - 100.0
            yield (
                [row],
                (state * torch.arange(1, len(flame.PROMPTS[prompts].facets) + 1)[:, None])[None],
            )  # any length


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """Runs main() on data/<bench>, in an empty folder with a finished checkpoint; -> (exit code, result)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "load", lambda folder: ColourModel())
    monkeypatch.setattr(flame, "llm_fingerprint", lambda folder: "f")
    monkeypatch.setattr(flame, "TextEncoder", ColourWords)
    monkeypatch.setattr(ColourWords, "lies", {})
    monkeypatch.setattr(evaluate, "BATCH", 2)
    put(tmp_path / "out" / "run" / "config.json", "{}")
    put(tmp_path / "out" / "run" / "model.safetensors", "")

    def run(bench, *more):
        code = evaluate.main(["--bench", bench, "--device", "cpu", *more])
        path = tmp_path / "results" / f"{bench}.json"
        return code, json.loads(path.read_text()) if path.exists() else None
    return run


@pytest.mark.parametrize("bench", [b for b in TREES if b != "demo"])
def test_a_perfect_model_scores_100(bench, colours, tmp_path, capsys):
    TREES[bench](tmp_path / "data" / bench)
    code, result = colours(bench, *class_file(bench, tmp_path))
    assert code == 0 and result["bench"] == bench and result["checkpoint"] == os.path.join("out", "run")
    if bench in CLASSIFICATION:
        assert (result["n_images"], result["n_classes"]) == {"fashionmnist": (6, 10)}.get(
            bench, (15, 5)
        ) and result["chance"] == 100 / result["n_classes"]
        assert (
            result["top1"] == result["top5"] == result["mean_per_class"] == 100 and result["confusions"] == []
        )
    elif bench in COMPOSITION:
        assert {
            part: (row["n_rows"], row["accuracy"]) for part, row in result["parts"].items()
        } == dict.fromkeys(
            benchmarks.winoground(tmp_path / "data" / bench)[2]
            if bench == "winoground"
            else benchmarks.sugarcrepe(tmp_path / "data" / bench)[2],
            (4 if bench == "winoground" else 5, 100),
        )
        assert result.get("accuracy") == (None if bench == "winoground" else 100)
    else:
        images, texts = {"docci": (4, 4), "coco": (4, 20), "flickr30k": (4, 20), "xm3600": (5, 10)}.get(
            bench, (5, 5)
        )
        assert (result["n_images"], result["n_texts"]) == (images, texts)
        assert result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
        assert bench == "xm3600" or result["both_ways"]["R@1"] == 100
    if bench not in COMPOSITION:
        with Image.open(tmp_path / "results" / f"{bench}.png") as sheet:
            assert sheet.getpixel((16 + 420 + 2, 16 + 2)) == (
                0,
                168,
                80,
            )  # the first query's first picture: right, green
    always = {"cache.sqlite", f"{bench}.json", f"{bench}.npz"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == always | (
        {f"{bench}.png"} - {f"{b}.png" for b in COMPOSITION}
    )
    assert "100.0 [100.0, 100.0]" in capsys.readouterr().out


def test_archives_as_they_unpack(colours, tmp_path):
    """Folders of an archive's own may lie between; pictures of cars twice as deep, as Kaggle has them."""
    data = tmp_path / "data"
    tree_urban1k(data / "urban1k" / "Urban1k" / "Urban1k")
    tree_caltech101(data / "caltech101" / "caltech-101")
    tree_cars(data / "cars")
    (data / "cars" / "cars_test").rename(data / "cars" / "inner")
    (data / "cars" / "cars_test").mkdir()
    (data / "cars" / "inner").rename(data / "cars" / "cars_test" / "cars_test")
    assert colours("urban1k")[1]["text_to_image"]["R@1"] == 100
    for bench in ("caltech101", "cars"):
        code, result = colours(bench, *class_file(bench, tmp_path))
        assert code == 0 and (result["n_images"], result["top1"], result["skipped_images"]) == (15, 100, 0)


def tree_of_tars(root, retrieval, split="test", shards=2, lines=2):
    """As clip_benchmark's webdataset builder writes a benchmark."""
    folder = root / split
    folder.mkdir(parents=True)
    put(folder / "nshards.txt", str(shards))
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n, name in list(enumerate(NAMES))[shard::shards]:
                image = io.BytesIO()
                Image.new("RGB", (12, 9), COLOURS[name]).save(image, "webp", lossless=True)
                text = "\n".join(f"A {name} wall {i}." for i in range(lines)) if retrieval else str(n)
                parts = {"webp": image.getvalue(), "txt" if retrieval else "cls": text.encode()}
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"s{n:07}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if retrieval:
        put(root / "dataset_type.txt", "Retrieval\n")
    else:
        put(root / "classnames.txt", "".join(f"{name}\n" for name in NAMES))
        put(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\n{c}\n")


@pytest.mark.parametrize("bench", ["flickr30k", "cifar10", "imagenet"])
def test_clip_benchmarks_layout_is_read_as_clip_benchmark_reads_it(colours, tmp_path, bench):
    from clip_benchmark.datasets.builder import build_wds_dataset
    retrieval = bench == "flickr30k"
    root = tmp_path / "data" / bench
    tree_of_tars(root, retrieval)
    theirs = build_wds_dataset(bench, lambda image: np.array(image.convert("RGB")), "test", str(root))
    pictures, said, third = benchmarks.webdataset(root, "test")
    ours = [np.array(report.open_picture(picture).convert("RGB")) for picture in pictures]
    if retrieval:
        texts = [[text for text, i in zip(said, third) if i == n] for n in range(len(pictures))]
    else:
        texts = [int(c) for c in said]
        assert list(third.values()) == theirs.classes
    for (image, text), our_image, our_text in zip(theirs, ours, texts, strict=True):
        assert np.array_equal(image, our_image) and text == our_text
    code, result = colours(bench)
    assert code == 0 and (result["n_images"], result["skipped_images"]) == (5, 0)
    assert result["text_to_image"]["R@1"] == 100 if retrieval else result["top1"] == 100
    assert colours(bench)[1] == result  # from the cache


def clip_benchmarks_coco(root):
    """coco_test_karpathy.json: COCO's own form, captions apart from pictures and in another order."""
    images = [{"id": 9 - i, "file_name": f"{name}.jpg", "height": 9} for i, name in enumerate(NAMES)]
    annotations = [{"id": 10 * n + i, "image_id": image["id"], "caption": f"a {name} wall, {n} "}
                   for n in range(7) for i, (image, name) in enumerate(zip(images, NAMES))]
    put(root / "coco_test_karpathy.json", json.dumps({"images": images, "annotations": annotations}))
    for name in NAMES:
        picture(root / "val2014" / f"{name}.jpg", name)


def clip_benchmarks_flickr30k(root):
    """flickr30k_test_karpathy.txt, pictures beside it."""
    lines = [f'{name}.jpg,A {name} "wall", number {n} .' for n in range(7) for name in NAMES]
    put(root / "flickr30k_test_karpathy.txt", "image,caption\n" + "\n".join(lines) + "\n\n")
    for name in NAMES:
        picture(root / f"{name}.jpg", name)


@pytest.mark.parametrize("bench, tree, theirs", [
    ("coco", clip_benchmarks_coco, "mscoco_captions"), ("flickr30k", clip_benchmarks_flickr30k, "flickr30k")])
def test_clip_benchmarks_own_lists_of_captions(colours, tmp_path, bench, tree, theirs):
    """All captions as clip_benchmark reads them; the first five are scored, or all, as the JSON says."""
    from clip_benchmark.datasets.builder import build_dataset
    root = tmp_path / "data" / bench
    tree(root)
    pixels = lambda image: np.array(image.convert("RGB")).tobytes()     # noqa: E731
    dataset = build_dataset(theirs, str(root), pixels, download=False, task="zeroshot_retrieval")
    theirs = {image: [caption.strip() for caption in captions] for image, captions in dataset}
    pictures, texts, owner = getattr(benchmarks, bench)(root)
    ours = {pixels(Image.open(path)): [text for text, i in zip(texts, owner) if i == n]
            for n, path in enumerate(pictures)}
    assert ours == theirs and len(ours) == 5 and len(texts) == 35
    for flags, said, n in (([], "first 5", 25), (["--all-captions"], "all", 35)):
        code, result = colours(bench, *flags)
        assert code == 0 and result["text_to_image"]["R@1"] == 100
        assert (result["captions_per_image"], result["n_texts"], result["n_images"]) == (said, n, 5)


def test_how_many_captions_count_in_karpathys_file_in_tars_and_in_languages(colours, tmp_path):
    tree_coco(tmp_path / "data" / "coco")
    tree_xm3600(tmp_path / "data" / "xm3600")
    tree_of_tars(tmp_path / "data" / "flickr30k", retrieval=True, lines=7)
    found = {"coco": (20, 24), "flickr30k": (25, 35), "xm3600": (10, 15)}
    first = {"coco": "first 5", "flickr30k": "first 5", "xm3600": "first 1"}
    for bench, (few, every) in found.items():
        result = colours(bench)[1]
        assert (result["n_texts"], result["captions_per_image"]) == (few, first[bench])
        result = colours(bench, "--all-captions")[1]
        assert (result["n_texts"], result["captions_per_image"]) == (every, "all")


def test_all_of_sun397_as_clip_benchmark_scores_it(colours, tmp_path):
    """--split all: whatever lies in SUN397/, in a partition or not; classes and names as clip_benchmark's."""
    from clip_benchmark.datasets.builder import build_dataset
    root = tmp_path / "data" / "sun397"
    tree_sun397(root)
    picture(root / "SUN397" / "w" / "white" / "indoor" / "sun_9.jpg", "white")      # in no partition
    put(root / "SUN397" / "ClassName.txt", "/r/red\n/g/green\n/b/blue\n/y/yellow\n/w/white/indoor\n")
    pixels = lambda image: np.array(image.convert("RGB")).tobytes()     # noqa: E731
    theirs = build_dataset("sun397", root=str(root), transform=pixels, split="test", download=False)
    pictures, labels, names, _ = read("sun397", root, "all")
    ours = [(pixels(Image.open(path)), names[label]) for path, label in zip(pictures, labels)]
    assert sorted(ours) == sorted((image, theirs.classes[label]) for image, label in theirs)
    code, result = colours("sun397", "--split", "all")
    assert code == 0 and (result["split"], result["n_images"], result["top1"]) == ("all", 26, 100)
    (root / "Testing_01.txt").unlink()
    assert colours("sun397", "--split", "all")[0] == 0 and colours("sun397")[0] == 2


def test_a_sample_of_clip_benchmarks_layout_without_its_text_is_left_out(colours, tmp_path, capsys):
    tree_of_tars(tmp_path / "data" / "coco", retrieval=True)
    with tarfile.open(tmp_path / "data" / "coco" / "test" / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("s0000009.webp"), io.BytesIO())
    code, result = colours("coco")
    assert code == 0 and (result["n_images"], result["text_to_image"]["R@1"]) == (5, 100)
    assert "skipped 1 row: sample without a picture or without .txt" in capsys.readouterr().err


def test_classes_that_are_numbers_have_no_names_of_ours(tmp_path):
    put(tmp_path / "zeroshot_classification_templates.txt", "{c}\n")
    with pytest.raises(flame.InputError, match="--language cn: .*--classes"):
        benchmarks.class_files("imagenet", tmp_path, "cn")


def test_clip_benchmarks_layout_of_another_kind_or_damaged_is_one_line(colours, tmp_path, capsys):
    tree_of_tars(tmp_path / "data" / "coco", retrieval=False)
    tree_of_tars(tmp_path / "data" / "dtd", retrieval=True)
    tree_of_tars(tmp_path / "data" / "pets", retrieval=False)
    put(tmp_path / "data" / "pets" / "dataset_type.txt", "retrieval")
    for bench, wrong in (("coco", "dataset_type.txt"), ("dtd", "dataset_type.txt"), ("pets", "and .txt")):
        assert colours(bench) == (2, None)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and wrong in told[0]


def test_hard_negatives_that_win_or_tie_count_as_wrong(colours, tmp_path, monkeypatch):
    root = tmp_path / "data" / "sugarcrepe"
    tree_sugarcrepe(root)
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})
    # "red" now says green: the red picture prefers its negative (white); the green one's negative (red) ties
    # with its caption.
    result = colours("sugarcrepe")[1]
    assert (
        result["accuracy"] == result["parts"]["add_att"]["accuracy"] == 60
        and result["parts"]["add_att"]["n_rows"] == 5
    )
    low, high = result["ci95"]["accuracy"]
    assert low < 60 < high
    (root / "val2017" / "blue.jpg").write_text("not a picture")
    result = colours("sugarcrepe")[1]
    assert result["parts"]["add_att"]["accuracy"] == 50 and result["parts"]["add_att"]["skipped_rows"] == 1


def test_winoground_wants_all_comparisons(colours, tmp_path, monkeypatch):
    tree_winoground(tmp_path / "data" / "winoground")
    monkeypatch.setattr(
        ColourWords, "lies", {"white": "yellow"}
    )  # of the last pair, yellow and white, both texts now say yellow
    parts = colours("winoground")[1]["parts"]
    assert {part: row["accuracy"] for part, row in parts.items()} == {"text": 75, "image": 75, "group": 75}
    assert parts["group"]["chance"] == pytest.approx(100 / 6)


def test_known_errors_give_known_numbers(colours, tmp_path, monkeypatch):
    tree_coco(tmp_path / "data" / "coco")
    monkeypatch.setattr(ColourWords, "lies", {"red": "green"})      # the five red captions now say green
    _, result = colours("coco")
    assert result["text_to_image"]["R@1"] == 75  # 15 of 20
    # The red picture's captions lie elsewhere; for the green one five foreign texts tie with its own five and
    # come first.
    assert result["image_to_text"]["R@1"] == 50 and result["image_to_text"]["R@5"] == 50
    low, high = result["ci95"]["text_to_image"]["R@1"]
    assert low <= 25 and high == 100                                # four pictures are little evidence
    with Image.open(tmp_path / "results" / "coco.png") as sheet:
        assert {(0, 168, 80), (216, 48, 64)} <= {
            colour for _, colour in sheet.getcolors(1 << 20)
        }  # green and red frames


def test_bad_pictures_and_captions_shift_nothing(colours, tmp_path, capsys):
    root = tmp_path / "data" / "urban1k"
    tree_urban1k(root)
    whole = (root / "image" / "1.jpg").read_bytes()
    (root / "image" / "1.jpg").write_bytes(whole[:len(whole) // 2])     # truncated
    (root / "image" / "3.jpg").write_text("not a picture")
    (root / "caption" / "4.txt").write_text("\n")  # empty: its picture stays a distractor
    put(root / "caption" / "9.txt", "A green ghost.")                   # no picture
    code, result = colours("urban1k")
    assert code == 0 and (
        result["n_images"],
        result["n_texts"],
        result["skipped_images"],
        result["skipped_texts"],
    ) == (3, 2, 3, 4)
    assert result["text_to_image"]["R@1"] == result["image_to_text"]["R@1"] == 100
    error = capsys.readouterr().err
    assert "3 of 6 pictures cannot be read and are left out; the first: " in error and "1.jpg" in error
    assert "1 of 6 texts are missing or empty" in error


def test_a_bad_picture_of_a_class_shifts_no_label(colours, tmp_path):
    tree_imagefolder(tmp_path / "data" / "imagefolder")
    (tmp_path / "data" / "imagefolder" / "blue" / "0.png").write_text("not a picture")
    _, result = colours("imagefolder")
    assert (result["n_images"], result["skipped_images"], result["top1"]) == (14, 1, 100)


@pytest.mark.parametrize("bench", [b for b in CLASSIFICATION])
def test_a_linear_probe_tells_colours_apart(bench, colours, tmp_path):
    root = tmp_path / "data" / bench
    for part in ("train", "test") if bench == "imagefolder" else [""]:
        TREES[bench](root / part)
    code, _ = colours(bench, "--probe", "--report", *class_file(bench, tmp_path))
    result = json.loads((tmp_path / "results" / f"{bench}-probe.json").read_text())
    assert (
        code == 0 and result["top1"] == 100 and result["n_images"] == (6 if bench == "fashionmnist" else 15)
    )
    assert result["n_train"] == {"caltech101": 150, "fashionmnist": 4, "imagefolder": 15, "cifar10": 50}.get(
        bench, 10
    )
    assert (tmp_path / "results" / f"{bench}-probe.html").exists()


# ---------------------------------------------------------------- through main(), with real towers

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a tiny random LLM (data/demo/llm) and checkpoint (out/tiny), and the demo's tree."""
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    llm, D, inner, vocabulary = folder / "data" / "demo" / "llm", 32, 48, 300
    llm.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [p.prefix + f for p in flame.PROMPTS.values() for f in p.facets], vocab_size=vocabulary
    )
    tokenizer.save(str(llm / "tokenizer.json"))
    put(
        llm / "config.json",
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": D,
                "intermediate_size": inner,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "vocab_size": vocabulary,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e4,
            }
        ),
    )
    weights = {
        "model.embed_tokens.weight": torch.randn(vocabulary, D),
        "model.norm.weight": torch.linspace(0.5, 1.5, D),
    }
    for i in range(3):
        for name, shape in {
            "self_attn.q_proj": (32, D),
            "self_attn.k_proj": (16, D),
            "self_attn.v_proj": (16, D),
            "self_attn.o_proj": (D, 32),
            "mlp.gate_proj": (inner, D),
            "mlp.up_proj": (inner, D),
            "mlp.down_proj": (D, inner),
        }.items():
            weights[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) * shape[1] ** -0.5
        weights |= {
            f"model.layers.{i}.{name}.weight": torch.ones(D)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    save_file(weights, llm / "model.safetensors")

    config = {
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "text_dim": D,
        "projector_hidden": 24,
        "pool_first": True,
        "text_rank": 0,
    }
    source = {"name": "tiny", "fingerprint": flame.llm_fingerprint(llm), "layer": 2, "positions": "restart"}
    (folder / "out" / "tiny").mkdir(parents=True)
    save_file(
        flame.Flame(config | {"llm": source}).state_dict(), folder / "out" / "tiny" / "model.safetensors"
    )
    put(folder / "out" / "tiny" / "config.json", json.dumps({"model": config, "llm": source}))
    tree_demo(folder / "data" / "demo")
    return folder


@pytest.mark.parametrize("bench", [b for b in TREES if b != "demo"])
def test_main_equals_one_picture_and_one_text_at_a_time(bench, real, tmp_path, monkeypatch):
    """Recall and accuracy of the command against flame.similarity, a pair at a time, and a sort."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    TREES[bench](tmp_path / bench)
    classes = class_file(bench, tmp_path)
    if bench in CLASSIFICATION and not classes:
        put(tmp_path / "two.txt", "a photo of a {}\nthe {}, small.\n")
        classes = ["--classes", str(tmp_path / "two.txt")]
    prompts = "raw" if bench == "xm3600" or bench in CLASSIFICATION else "long"
    llm, checkpoint = real / "data" / "demo" / "llm", real / "out" / "tiny"
    assert (
        evaluate.main(
            [
                "--bench",
                bench,
                "--data-root",
                bench,
                "--llm",
                str(llm),
                "--checkpoint",
                str(checkpoint),
                "--device",
                "cpu",
                *classes,
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "results" / f"{bench}.json").read_text())
    data = read(bench, Path(bench), classes=Path(classes[1]) if classes else None)
    model, encoder = flame.load(checkpoint), flame.TextEncoder(llm, "cpu", torch.float32, layer=2)
    facets = functools.cache(lambda text: model.encode_text(encoder.encode([text], prompts), prompts))

    def picture_vector(item):
        with torch.inference_mode(), report.open_picture(item) as image:
            return model.encode_image(model.preprocess(image)[None])

    images = [picture_vector(item) for item in data[0]]

    def scored(texts):  # [text][picture]
        return [[flame.similarity(image, facets(text)).item() for image in images] for text in texts]

    if bench in CLASSIFICATION:
        unit = torch.nn.functional.normalize

        def filled(name):
            return [facets(template.replace("{}", name)).mean(1) for template in data[3]]

        classes = [
            unit(torch.stack([unit(vector, dim=-1) for vector in filled(name)]).mean(0), dim=-1)
            for name in data[2]
        ]
        ranks = [
            slow_rank([(image @ c.T).item() for c in classes], [c == label for c in range(len(classes))])
            for image, label in zip(images, data[1])
        ]
        assert result["top1"] == pytest.approx(100 * np.mean(np.array(ranks) < 1)) and result[
            "top5"
        ] == pytest.approx(100 * np.mean(np.array(ranks) < 5))
    elif bench in COMPOSITION:
        score = scored(data[1])
        for part, rows in data[2].items():
            right = [all(score[t][p] > score[u][q] for (p, t), (q, u) in races) for _, races in rows]
            assert result["parts"][part]["accuracy"] == pytest.approx(100 * np.mean(right))
    else:
        for language, (texts, owner) in (data[1].items() if bench == "xm3600" else [(None, data[1:])]):
            score, got = scored(texts), result["languages"][language] if language else result
            forth = [
                slow_rank(score[t], [owner[t] == i for i in range(len(images))]) for t in range(len(texts))
            ]
            back = [
                slow_rank([row[i] for row in score], [owner[t] == i for t in range(len(texts))])
                for i in range(len(images))
            ]
            for k in RECALL_AT:
                assert got["text_to_image"][f"R@{k}"] == pytest.approx(100 * np.mean(np.array(forth) < k))
                assert got["image_to_text"][f"R@{k}"] == pytest.approx(100 * np.mean(np.array(back) < k))
