"""Tests that embed.py, train.py and evaluate.py survive bad input. Any corrupt file, with any command that
reads it, ends within seconds in success or in exit code 2 and one line. A refused command changes no file.
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
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import common
from flame import InputError

SECONDS = 60      # time limit of a case, long enough for a busy machine
MEMORY = 4 << 30  # bytes of address space that a case may add; larger allocations fail
DRAWS = int(os.environ.get("FLAME_DAMAGE_DRAWS", 100))

SMALL = ("--preset demo --image-size 16 --patch-size 8 --width 24 --layers 1 --heads 3 --projector-hidden 32 "
         "--batch 4 --steps 2 --checkpoint-every 1 --workers 0 --device cpu")
EMBED = "embed.py --captions captions.tsv --llm llm --shard-size 4 --device cpu --dtype float32 --out new"
RESUME_EMBEDDING = EMBED.replace("--out new", "--out begun")
TRAIN = f"train.py --images . {SMALL} --embeddings store --name new"
RESUME_TRAINING = TRAIN.replace("--name new", "--name half")
EVALUATE = "evaluate.py --checkpoint out/done --llm llm --out scores --device cpu"
SCORE = f"{EVALUATE} --bench urban1k --data-root urban"
SEARCH = f"{EVALUATE} --search kite --images images"
COMPARE = "evaluate.py --compare first.json second.json"
INSPECT = "embed.py --inspect store --llm llm --device cpu"


# ------------------------------------------------------------------------------------------------------------
# The working folder, and how commands run in it

class TimeLimitExceeded(BaseException):
    """A BaseException, so that `except Exception` in the code under test does not catch it."""


@contextlib.contextmanager
def limits(file_size=resource.RLIM_INFINITY):
    """Limit time, memory and file size (in bytes; a write beyond it fails, as on a full disk)."""
    def time_out(*_):
        raise TimeLimitExceeded(f"no end after {SECONDS} s")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    alarm = signal.signal(signal.SIGALRM, time_out)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[resource.RLIMIT_AS][1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[resource.RLIMIT_FSIZE][1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)


def run_command(command, **limit):
    """Run a stage in this process. Return (exit code, lines of stderr without progress bars)."""
    script, *arguments = shlex.split(command)
    stage = importlib.import_module(script.removesuffix(".py"))
    errors = io.StringIO()
    errors.reconfigure = lambda **_: None  # a method of sys.stderr that StringIO lacks
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors), limits(**limit):
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            code = stage.main() or 0
        except SystemExit as end:
            code = end.code or 0
    printed = [line.rsplit("\r", 1)[-1].rstrip() for line in errors.getvalue().split("\n")]
    return code, [line for line in printed if line and not re.search(r"\[\d\d:\d\d", line)]


@pytest.fixture(scope="module")
def world(byte_llm, tmp_path_factory):
    """Make a folder with everything that the stages read. Return (folder, its contents)."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(byte_llm, folder / "llm")
    rng = np.random.default_rng(0)
    for path in ("images", "urban/image", "urban/caption"):
        (folder / path).mkdir(parents=True)
    rows = ["key\timage\traw\tshort\tlong"]
    for n in range(12):
        image = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
        image.save(folder / f"images/{n:02}.png")
        rows.append(f"k{n:02}\timages/{n:02}.png\tkite {n}\tA kite, {n}.\tA red kite above {n} beaches.")
        if n < 4:
            image.save(folder / f"urban/image/{n}.png")
            (folder / f"urban/caption/{n}.txt").write_text(f"A red kite above {n} beaches.\n")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        for name in ("FLAME_LLM", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        assert run_command(EMBED.replace("--out new", "--out store"))[0] == 0
        shutil.copytree("store", "begun")
        os.remove("begun/000001.npy")
        assert run_command(TRAIN.replace("--name new", "--name done"))[0] == 0
        train = importlib.import_module("train")
        patch.setattr(train, "stop_requested", [True])  # as after SIGTERM: save after the first step
        run_command(RESUME_TRAINING)
        patch.undo()
        assert json.loads(Path("out/half/config.json").read_text())["step"] == 1
        assert run_command(SCORE)[0] == 0
        for name in ("first.npz", "second.npz"):
            shutil.copy("scores/urban1k.npz", name)
        return folder, contents()


@pytest.fixture
def folder(world, monkeypatch):
    """Change to the folder of `world`. Undo all changes after the test."""
    folder, state = world
    monkeypatch.chdir(folder)
    for name in ("FLAME_LLM", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    restore(state)


def restore(state):
    changed = contents()
    for path in sorted(changed, reverse=True):  # the contents of a folder before the folder
        if path not in state or changed[path] != state[path]:
            remove(path)
    for path in sorted(state):
        if changed.get(path) == state[path]:
            continue
        if state[path] is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(state[path])


def contents():
    """Return {path: bytes, or None if not a file}, without the cache, which a refused run may have filled."""
    cache = Path("scores/cache")
    return {path: path.read_bytes() if path.is_file() else None for path in Path(".").rglob("*")
            if path not in (cache, cache.parent) and path.parent != cache}


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def assert_refused(command, expected=""):
    before = contents()
    code, lines = run_command(command)
    assert code == 2 and len(lines) == 1, (code, lines)
    assert lines[0].startswith(command.split()[0] + ": ") and expected in lines[0], lines
    assert contents() == before


# ------------------------------------------------------------------------------------------------------------
# Corrupt files

class MaliciousPickle:
    """Make a folder when unpickled, as evidence that code in the file was executed."""
    def __reduce__(self):
        return os.mkdir, ("a-strangers-code-ran",)


def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def npy_bytes(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def change_json_entry(content, rng):
    """Replace or delete one entry of a JSON file, at any depth."""
    entries = json.loads(content)
    parent = entries
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or rng.random() < 0.3:
            break
        parent = parent[key]
    value = rng.choice([None, [], {}, "", "x", -1, 0, 1.5, 10 ** 12, True, "del"])
    if value == "del" and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = value
    return json.dumps(entries).encode()


def corrupt(content, rng, suffix):
    """Return a corrupt version of a file's content."""
    start = rng.randrange(len(content) + 1)
    length = rng.randrange(1, 2048)
    variants = [
        b"", b"[]\n", b"null\n", b'{"a": 1, "b', b"\xff\xfe\0\x80\n", b"[" * 100_000,
        content[:start],
        content[:start] + bytes(length) + content[start + length:],
        content[:start] + rng.randbytes(8) + content[start + 8:],
        content + rng.randbytes(50),
        content.replace(b"0", b"9"),
        torch_bytes({"model": MaliciousPickle()}),
    ]
    if suffix == ".npy":
        array = np.load(io.BytesIO(content))
        arrays = array[:1], array.astype(np.float64), np.full_like(array, np.nan), array.T
        variants += [*map(npy_bytes, arrays), npy_bytes(np.array([MaliciousPickle()], object))]
    if suffix == ".npz":
        arrays = dict(np.load(io.BytesIO(content)))
        name = rng.choice(list(arrays))
        value = rng.choice([[], "x", [["x"]], 1j, [1, 2], arrays[name].T, np.repeat(arrays[name], 2)])
        np.savez(file := io.BytesIO(), **arrays | {name: value})
        variants += 12 * [file.getvalue()]
    if suffix == ".json" and rng.random() < 0.7:
        return change_json_entry(content, rng)
    return rng.choice(variants)


READERS = {  # file: the commands that read it
    "llm/config.json": (EMBED, SCORE, INSPECT),
    "llm/model.safetensors": (EMBED, SCORE, INSPECT),
    "llm/tokenizer.json": (EMBED, SCORE, INSPECT),
    "captions.tsv": (EMBED, f"{EVALUATE} --captions captions.tsv"),
    "store/meta.json": (TRAIN, RESUME_TRAINING, INSPECT),
    "store/000001.npy": (TRAIN, INSPECT),
    "store/captions.tsv": (TRAIN, INSPECT),
    "begun/meta.json": (RESUME_EMBEDDING,),
    "begun/captions.tsv": (RESUME_EMBEDDING,),
    "begun/000000.npy": (RESUME_EMBEDDING,),
    "out/half/config.json": (RESUME_TRAINING, SEARCH.replace("done", "half")),
    "out/half/training.pt": (RESUME_TRAINING,),
    "out/half/log.jsonl": (RESUME_TRAINING,),
    "out/done/config.json": (SCORE, SEARCH),
    "out/done/model.safetensors": (SCORE, SEARCH),
    "urban/caption/1.txt": (SCORE,),
    "urban/image/1.png": (SCORE,),
    "images/03.png": (TRAIN, SEARCH),
    "second.npz": (COMPARE,),
}


@pytest.mark.parametrize("number", range(DRAWS))
def test_corrupt_file_is_read_or_refused_without_changes(folder, number):
    rng = random.Random(number)
    path = Path(list(READERS)[number % len(READERS)])
    command = rng.choice(READERS[str(path)])
    content = path.read_bytes()
    kind = rng.choice(["bytes"] * 8 + ["pipe", "folder", "gone"])
    remove(path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(corrupt(content, rng, path.suffix))
    before = contents()
    code, lines = run_command(command)
    assert code in (0, 2), lines
    assert not any("Traceback" in line for line in lines), lines
    assert not Path("a-strangers-code-ran").exists()
    if code == 2:
        assert lines[-1].startswith(command.split()[0] + ": "), lines
        after = contents()
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        if "weights are NaN or infinite after" in lines[-1]:  # NaN in AdamW's moments: one step ran
            changed.discard(Path("out/half/log.jsonl"))
        assert not changed and {*after} == {*before}


BROKEN = {"training.pt": (b"", b"not a checkpoint", torch_bytes({"step": 1}),
                          torch_bytes({"step": 1, "model": {}, "optimizer": {}})),
          "config.json": (b"{", b'{"step": 1}', b"[1]")}


@pytest.mark.parametrize("name, number", [(name, n) for name in BROKEN for n in range(len(BROKEN[name]))])
def test_corrupt_checkpoint_is_refused_until_overwrite(folder, name, number):
    Path("out/half", name).write_bytes(BROKEN[name][number])
    assert_refused(RESUME_TRAINING, f"out/half/{name}")
    assert run_command(f"{RESUME_TRAINING} --overwrite")[0] == 0


def test_training_state_of_another_run_is_refused(folder):
    saved = torch.load("out/half/training.pt", weights_only=True)
    moments = saved["optimizer"]["state"][0]
    for change in (lambda: saved.update(step=10**9), lambda: saved.update(step=-5),
                   lambda: (saved.update(step=1), moments.update(exp_avg=moments["exp_avg"][:1]))):
        change()
        torch.save(saved, "out/half/training.pt")
        assert_refused(RESUME_TRAINING, "out/half/training.pt")


def test_checkpoint_of_many_layers_is_refused(folder):
    config = json.loads(Path("out/done/config.json").read_text())
    config["model"]["layers"] = 10**7
    Path("out/done/config.json").write_text(json.dumps(config))
    assert_refused(SCORE, "10000000 layers")


def test_closed_stdout_is_no_error(folder):
    script = Path(__file__).parent.parent / "embed.py"
    command = f"exec {sys.executable} {script} --captions nowhere.tsv --llm llm >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("embed.py: nowhere.tsv: no such file")


def test_store_without_caption_hash_is_refused(folder):
    meta = json.loads(Path("store/meta.json").read_text())
    del meta["captions"]["sha256"]
    Path("store/meta.json").write_text(json.dumps(meta))
    assert_refused(TRAIN, "store/meta.json: no 'sha256'")


# ------------------------------------------------------------------------------------------------------------
# Settings

SETTINGS = {
    TRAIN: "image-size=0 image-size=17 patch-size=7 patch-size=64 width=nan width=0 heads=0 heads=5 "
           "layers=9999 loss=softmax text-projection=whitening text-projection=agree:0.1 "
           "text-projection=raw=agree text-projection=whiten+linear:8 init=zeros pool-first=y positives=0 "
           "positives=12 columns=long.9 batch=-4 batch=0 micro-batch=0 epochs=inf epochs=-1 steps=1e3 "
           "lr=1e400 lr=nan lr=-1 lr=much init-scale=0 crop-scale=1.1 patch-dropout=1 patch-dropout=nan "
           "workers=-1 seed=-1 seed=1.0 preset=huge device=cuda:99 device=foo embeddings=nowhere "
           "embeddings=images images=nowhere no-such=1",
    EMBED: "captions=nowhere.tsv captions=images/x-{5..2}.tar captions=/dev/zero join=foo=captions.tsv "
           "join=long= join=long=nowhere.json llm=nowhere layer=99 dtype=int8 device=mps device=meta "
           "device=cuda:99 shard-size=0 part=3/2 part=x inspect=nowhere out=captions.tsv",
    SCORE: "checkpoint=nowhere llm=images data-root=nowhere out=captions.tsv split=train prompts=medium "
           "device=foo",
}
CASES = [(command, setting) for command, settings in SETTINGS.items() for setting in settings.split()]


@pytest.mark.parametrize("command, setting", CASES, ids=[f"{c.split()[0]} {s}" for c, s in CASES])
def test_invalid_setting_is_refused_by_name(folder, command, setting):
    flag, value = setting.split("=", 1)
    path = value.rpartition("=")[2]
    expected = path if re.match("nowhere|images|llm/|captions.tsv|/dev", path) else flag
    assert_refused(f"{command} --{flag}={value}", expected)


@pytest.mark.parametrize("command, expected", [
    *((command, "") for command in ("embed.py", "train.py", "evaluate.py", "embed.py --caption captions.tsv",
                                    "train.py --lr", f"{EMBED} --llm 'caf\udce9'", f"{SCORE} --search kite")),
    (f"{EMBED} --llm no", "$FLAME_LLM"), (f"{EMBED} --llm no", "data/demo.py --make-only"),
    ("evaluate.py --search red", "needs --images DIR"),
    ("evaluate.py --compare a.json b.json", "a.npz: no")])
def test_invalid_command_is_refused(folder, command, expected):
    assert_refused(command, expected)


# ------------------------------------------------------------------------------------------------------------
# Corrupt images, and a full disk

def test_corrupt_image_is_skipped_and_counted(folder):
    """Test --search. test_step.py tests training images, test_benchmarks.py those of benchmarks."""
    Path("images/03.png").write_bytes(Path("images/03.png").read_bytes()[:60])
    code, lines = run_command(SEARCH)
    assert code == 0 and any("1 of 12" in line for line in lines), lines


def test_array_is_written_completely_or_not_at_all(tmp_path):
    """numpy.save does not notice if the last bytes do not fit on the disk."""
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
    common.write_text(tmp_path / "names.txt", "f\udcfcr\n")  # file names may be invalid UTF-8
    common.append_text(tmp_path / "names.txt", "f\udcfcr\n")
    assert (tmp_path / "names.txt").read_bytes() == b"f\xfcr\n" * 2


SIZES = [(command, size) for command in (EMBED, TRAIN, SCORE) for size in (0, 1_000)]


@pytest.mark.parametrize("command, size", [*SIZES, (EMBED, 300), (EMBED, 2_500)])
def test_full_disk_changes_no_file_and_rerun_succeeds(folder, command, size):
    """At these sizes, a DuckDB file, the table, meta.json, a shard or the weights do not fit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write raises an error, as on a full disk
    before = contents()
    code, lines = run_command(command, file_size=size)
    assert code == 2 and len(lines) == 1, (code, lines)
    changed = {path for path, content in contents().items() if path in before and before[path] != content}
    assert not changed
    assert run_command(command)[0] == 0
    if command == EMBED:
        for path in Path("store").iterdir():
            assert Path("new", path.name).read_bytes() == path.read_bytes()
