"""What the stages promise whoever feeds them nonsense. It promises that

* any file, damaged in any way, under any command that reads it, ends in success or in exit code 2 with one
  line that names the script, in seconds and bounded memory; where it is refused nothing on the disk changes;
* nothing that a stranger's file holds is ever executed, and no pipe is waited for;
* one bad picture among good ones is skipped, counted and told, never fatal (rows: test_captions.py);
* a setting that makes no sense is refused in one line that names it, before anything is read or made;
* on a full disk what was written before stays, and the same command goes on once there is room.

A world is made once, by the stages: an LLM, captions, pictures, a store, a checkpoint, a benchmark. A case is
a command that would work there, typed after something was spoiled; the stages run in this process.
"""
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import common
from flame import InputError

SECONDS = 60      # after which a case counts as hung, on a busy machine too
MEMORY = 4 << 30  # bytes of address space that a case may add: what asks for more fails, not the machine
DRAWS = int(os.environ.get("FLAME_DAMAGE_DRAWS", 100))

SMALL = ("--preset demo --image-size 16 --patch-size 8 --width 24 --layers 1 --heads 3 --projector-hidden 32 "
         "--batch 4 --steps 2 --checkpoint-every 1 --workers 0 --device cpu")
EMBED = "embed.py --captions captions.tsv --llm llm --shard-size 4 --device cpu --dtype float32 --out new"
GO_ON_EMBEDDING = EMBED.replace("--out new", "--out begun")
TRAIN = f"train.py --images . {SMALL} --embeddings store --name new"
GO_ON_TRAINING = TRAIN.replace("--name new", "--name half")
EVALUATE = "evaluate.py --checkpoint out/done --llm llm --out scores --device cpu"
SCORE = f"{EVALUATE} --bench urban1k --data-root urban"
SEARCH = f"{EVALUATE} --search kite --images images"
INSPECT = "embed.py --inspect store --llm llm --device cpu"


# ------------------------------------------------------------------------------------------------------------
# The world, and what is typed there

class Hung(BaseException):
    """Not an Exception: code that catches all of those does not catch it."""


@contextlib.contextmanager
def limits(file_size=resource.RLIM_INFINITY):
    """Few seconds, little memory. file_size: bytes after which a file cannot grow, as on a full disk."""
    def hung(*_):
        raise Hung(f"no end after {SECONDS} s")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {what: resource.getrlimit(what) for what in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    alarm = signal.signal(signal.SIGALRM, hung)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[resource.RLIMIT_AS][1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[resource.RLIMIT_FSIZE][1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        for what, most in before.items():
            resource.setrlimit(what, most)


def typed(command, **limit):
    """-> (exit code, the lines on stderr less progress bars)."""
    script, *arguments = shlex.split(command)
    stage = importlib.import_module(script.removesuffix(".py"))
    errors = io.StringIO()
    errors.reconfigure = lambda **_: None  # as a terminal's stream has
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors), limits(**limit):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            code = stage.main() or 0
        except SystemExit as end:
            code = end.code or 0
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in errors.getvalue().split("\n")]
    return code, [line for line in shown if line and not re.search(r"\[\d\d:\d\d", line)]


@pytest.fixture(scope="module")
def world(byte_llm, tmp_path_factory):
    """A folder with all that the stages read, made by them -> (folder, what it holds)."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(byte_llm, folder / "llm")
    draw = np.random.default_rng(0)
    for place in ("images", "urban/image", "urban/caption"):
        (folder / place).mkdir(parents=True)
    rows = ["key\timage\traw\tshort\tlong"]
    for n in range(12):
        picture = Image.fromarray(draw.integers(0, 256, (16, 20, 3), np.uint8))
        picture.save(folder / f"images/{n:02}.png")
        rows.append(f"k{n:02}\timages/{n:02}.png\tkite {n}\tA kite, {n}.\tA red kite above {n} beaches.")
        if n < 4:
            picture.save(folder / f"urban/image/{n}.png")
            (folder / f"urban/caption/{n}.txt").write_text(f"A red kite above {n} beaches.\n")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        for name in ("FLAME_LLM", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        assert typed(EMBED.replace("--out new", "--out store"))[0] == 0
        shutil.copytree("store", "begun")
        os.remove("begun/000001.npy")
        assert typed(TRAIN.replace("--name new", "--name done"))[0] == 0
        train = importlib.import_module("train")
        patch.setattr(train, "stop_requested", [True])  # as SIGTERM leaves it: saves after the first step
        typed(GO_ON_TRAINING)
        patch.undo()
        assert json.loads(Path("out/half/config.json").read_text())["step"] == 1
        return folder, contents()


@pytest.fixture
def folder(world, monkeypatch):
    """It, to work in; afterwards what was changed is put back."""
    folder, state = world
    monkeypatch.chdir(folder)
    for name in ("FLAME_LLM", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    restore(state)


def restore(state):
    changed = contents()
    for path in sorted(changed, reverse=True):  # a folder after what is in it
        if path not in state or changed[path] != state[path]:
            clear(path)
    for path in sorted(state):
        if changed.get(path) == state[path]:
            continue
        if state[path] is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(state[path])


def contents():
    """{path: bytes, or None for what is no file}; less the cache, of what was encoded before a refusal."""
    cache = Path("scores/cache")
    return {path: path.read_bytes() if path.is_file() else None for path in Path(".").rglob("*")
            if path not in (cache, cache.parent) and path.parent != cache}


def clear(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuses(command, named=""):
    before = contents()
    code, lines = typed(command)
    assert code == 2 and len(lines) == 1, (code, lines)
    assert lines[0].startswith(command.split()[0] + ": ") and named in lines[0], lines
    assert contents() == before


# ------------------------------------------------------------------------------------------------------------
# Any file, any damage, any command

class Stranger:
    """Unpickled, it makes a folder: the proof that a stranger's code ran."""
    def __reduce__(self):
        return os.mkdir, ("a-strangers-code-ran",)


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def array_of(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def other_entry(content, draw):
    """One entry of a JSON file, however deep, becomes something else or goes."""
    entries = json.loads(content)
    place = entries
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    value = draw.choice([None, [], {}, "", "x", -1, 0, 1.5, 10 ** 12, True, "del"])
    if value == "del" and isinstance(place, dict):
        del place[key]
    else:
        place[key] = value
    return json.dumps(entries).encode()


def damaged(content, draw, suffix):
    """Other bytes in place of these."""
    at = draw.randrange(len(content) + 1)
    hole = draw.randrange(1, 2048)
    other = [
        b"", b"[]\n", b"null\n", b'{"a": 1, "b', b"\xff\xfe\0\x80\n", b"[" * 100_000,
        content[:at],
        content[:at] + bytes(hole) + content[at + hole:],
        content[:at] + draw.randbytes(8) + content[at + 8:],
        content + draw.randbytes(50),
        content.replace(b"0", b"9"),
        pickled({"model": Stranger()}),
    ]
    if suffix == ".npy":
        array = np.load(io.BytesIO(content))
        others = array[:1], array.astype(np.float64), np.full_like(array, np.nan), array.T
        other += [*map(array_of, others), array_of(np.array([Stranger()], object))]
    if suffix == ".json" and draw.random() < 0.7:
        return other_entry(content, draw)
    return draw.choice(other)


READERS = {  # a file, and the commands that read it
    "llm/config.json": (EMBED, SCORE, INSPECT),
    "llm/model.safetensors": (EMBED, SCORE, INSPECT),
    "llm/tokenizer.json": (EMBED, SCORE, INSPECT),
    "captions.tsv": (EMBED, f"{EVALUATE} --captions captions.tsv"),
    "store/meta.json": (TRAIN, GO_ON_TRAINING, INSPECT),
    "store/000001.npy": (TRAIN, INSPECT),
    "store/captions.tsv": (TRAIN, INSPECT),
    "begun/meta.json": (GO_ON_EMBEDDING,),
    "begun/captions.tsv": (GO_ON_EMBEDDING,),
    "begun/000000.npy": (GO_ON_EMBEDDING,),
    "out/half/config.json": (GO_ON_TRAINING, SEARCH.replace("done", "half")),
    "out/half/training.pt": (GO_ON_TRAINING,),
    "out/half/log.jsonl": (GO_ON_TRAINING,),
    "out/done/config.json": (SCORE, SEARCH),
    "out/done/model.safetensors": (SCORE, SEARCH),
    "urban/caption/1.txt": (SCORE,),
    "urban/image/1.png": (SCORE,),
    "images/03.png": (TRAIN, SEARCH),
}


@pytest.mark.parametrize("number", range(DRAWS))
def test_any_file_damaged_in_any_way(folder, number):
    draw = random.Random(number)
    path = Path(list(READERS)[number % len(READERS)])
    command = draw.choice(READERS[str(path)])
    content = path.read_bytes()
    kind = draw.choice(["bytes"] * 8 + ["pipe", "folder", "gone"])
    clear(path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(damaged(content, draw, path.suffix))
    before = contents()
    code, lines = typed(command)
    assert code in (0, 2), lines
    assert not any("Traceback" in line for line in lines), lines
    assert not Path("a-strangers-code-ran").exists()
    if code == 2:
        assert lines[-1].startswith(command.split()[0] + ": "), lines
        after = contents()
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        if "weights are NaN or infinite after step" in lines[-1]:  # AdamW's moments were: a step was taken
            changed.discard(Path("out/half/log.jsonl"))
        assert not changed and {*after} == {*before}


HALF = {"training.pt": (b"", b"not a checkpoint", pickled({"step": 1}),
                        pickled({"step": 1, "model": {}, "optimizer": {}})),
        "config.json": (b"{", b'{"step": 1}', b"[1]")}


@pytest.mark.parametrize("name, number", [(name, n) for name in HALF for n in range(len(HALF[name]))])
def test_a_damaged_checkpoint_and_its_cure(folder, name, number):
    Path("out/half", name).write_bytes(HALF[name][number])
    refuses(GO_ON_TRAINING, f"out/half/{name}")
    assert typed(f"{GO_ON_TRAINING} --overwrite")[0] == 0


def test_a_store_that_does_not_say_of_which_captions_it_is(folder):
    meta = json.loads(Path("store/meta.json").read_text())
    del meta["captions"]["sha256"]
    Path("store/meta.json").write_text(json.dumps(meta))
    refuses(TRAIN, "store/meta.json: no 'sha256'")


# ------------------------------------------------------------------------------------------------------------
# Settings

SETTINGS = {
    TRAIN: "image-size=0 image-size=17 patch-size=7 patch-size=64 width=nan width=0 heads=0 heads=5 "
           "layers=9999 loss=softmax text-projection=whitening text-projection=agree:0.1 "
           "text-projection=raw=agree text-projection=whiten+linear:8 init=zeros pool-first=y positives=0 "
           "positives=12 columns=long.9 batch=-4 batch=0 micro_batch=0 epochs=inf epochs=-1 steps=1e3 "
           "lr=1e400 "
           "lr=nan lr=-1 lr=much init-scale=0 crop-scale=1.1 patch-dropout=1 patch-dropout=nan workers=-1 "
           "seed=-1 seed=1.0 preset=huge device=cuda:99 device=foo embeddings=nowhere embeddings=images "
           "images=nowhere image-tower=captions.tsv image-tower=nowhere image-tower=llm/model.safetensors "
           "no-such=1",
    EMBED: "captions=nowhere.tsv captions=images/x-{5..2}.tar captions=/dev/zero join=foo=captions.tsv "
           "join=long= join=long=nowhere.json llm=nowhere layer=99 dtype=int8 device=mps device=meta "
           "device=cuda:99 window=0 shard=3/2 shard=x inspect=nowhere out=captions.tsv",
    SCORE: "checkpoint=nowhere llm=images data-root=nowhere out=captions.tsv split=train prompts=medium "
           "device=foo",
}
CASES = [(command, setting) for command, settings in SETTINGS.items() for setting in settings.split()]


@pytest.mark.parametrize("command, setting", CASES, ids=[f"{c.split()[0]} {s}" for c, s in CASES])
def test_a_setting_that_makes_no_sense(folder, command, setting):
    flag, value = setting.split("=", 1)
    path = value.rpartition("=")[2]
    named = path if re.match("nowhere|images|llm/|captions.tsv|/dev", path) else flag
    refuses(f"{command} --{flag}={value}", named)


FACETS = "--facets needs a retrieval benchmark"


@pytest.mark.parametrize("command, named", [
    *((command, "") for command in ("embed.py", "train.py", "evaluate.py", "embed.py --caption captions.tsv",
                                    "train.py --lr", f"{EMBED} --llm 'caf\udce9'", f"{SCORE} --search kite")),
    (f"{EMBED} --llm no", "$FLAME_LLM"), (f"{EMBED} --llm no", "data/demo.py --make-only"),
    ("evaluate.py --bench imagenet --facets", FACETS), ("evaluate.py --search red", "need --images DIR"),
    ("evaluate.py --bench coco --facets --checkpoint captions.tsv", FACETS),
    ("evaluate.py --bench coco --facets --open-clip ViT-B-32", FACETS),
    ("evaluate.py --compare a.json b.json", "a.npz: no")])
def test_a_command_that_is_none(folder, command, named):
    refuses(command, named)


# ------------------------------------------------------------------------------------------------------------
# One bad among many, and a full disk

def test_a_bad_picture_is_skipped_and_counted(folder):
    """In a gallery; among those to train on: test_step.py, of a benchmark: test_benchmarks.py."""
    Path("images/03.png").write_bytes(Path("images/03.png").read_bytes()[:60])
    code, lines = typed(SEARCH)
    assert code == 0 and any("1 of 12" in line for line in lines), lines


def test_an_array_is_written_whole_or_not_at_all(tmp_path):
    """numpy.save would not notice that its last bytes find no room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    array = np.random.default_rng(0).random((9, 7)).astype(np.float16)[:, ::2]
    common.write_array(tmp_path / "array.npy", array)
    assert np.array_equal(np.load(tmp_path / "array.npy"), array)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(InputError, match="large.npy"):
            common.write_array(tmp_path / "large.npy", np.zeros(230, np.float32))  # 1,048 bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["array.npy"]
    common.write_text(tmp_path / "names.txt", "f\udcfcr\n")  # a file's name may be no UTF-8
    common.append_text(tmp_path / "names.txt", "f\udcfcr\n")
    assert (tmp_path / "names.txt").read_bytes() == b"f\xfcr\n" * 2


SIZES = [(command, size) for command in (EMBED, TRAIN, SCORE) for size in (0, 1_000)]


@pytest.mark.parametrize("command, size", [*SIZES, (EMBED, 300), (EMBED, 2_500)])
def test_a_full_disk(folder, command, size):
    """Files may have so many bytes: DuckDB's, the table, meta.json, a window or weights do not fit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, as on a full disk
    before = contents()
    code, lines = typed(command, file_size=size)
    assert code == 2 and len(lines) == 1, (code, lines)
    changed = {path for path, content in contents().items() if path in before and before[path] != content}
    assert not changed
    assert typed(command)[0] == 0
    if command == EMBED:
        for path in Path("store").iterdir():
            assert Path("new", path.name).read_bytes() == path.read_bytes()
