"""What the stages promise whoever feeds them nonsense: exit code 2, one line that names it, and no change.

    pytest tests/test_hostile.py

A table of hostile inputs. Each case is a command that would work in a small folder, typed after something
there was spoiled, or with a setting that makes no sense. The stages run in this process, each case for a few
seconds at most and in bounded memory. Where the promise is another, a table of its own says so: one bad
picture among good ones is skipped and counted, and on a full disk the last whole state stays.
"""
import contextlib
import faulthandler
import gzip
import importlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import embed

SECONDS = 10      # after which a case counts as hung
MEMORY = 4 << 30  # bytes of address space that a case may add: what asks for more fails, not the machine

SMALL = ("--preset demo --image-size 16 --patch-size 8 --width 24 --layers 1 --heads 3 --projector-hidden 32 "
         "--batch 4 --steps 2 --checkpoint-every 1 --holdout 0 --workers 0 --device cpu")
EMBED = "embed.py --captions captions.tsv --llm llm --window 4 --device cpu --dtype float32"
INSPECT = "embed.py --inspect store --llm llm --device cpu"
TRAIN = f"train.py --images . {SMALL}"
EVALUATE = "evaluate.py --checkpoint out/done --llm llm --out found --device cpu"

NEW_STORE = f"{EMBED} --out new"
GO_ON_EMBEDDING = f"{EMBED} --out begun"
NEW_RUN = f"{TRAIN} --embeddings store --name new"
GO_ON_TRAINING = f"{TRAIN} --embeddings store --name half"
SEARCH = f"{EVALUATE} --search kite --images images"
SCORE = f"{EVALUATE} --bench urban1k --data-root urban"


# --- The folder, and what is typed there

class Hung(BaseException):
    """Not an Exception: code that catches all of those does not catch it."""


@contextlib.contextmanager
def limits(file_size=resource.RLIM_INFINITY):
    """Few seconds, little memory. file_size: bytes after which a file cannot grow, as on a full disk."""
    def hung(*_):
        raise Hung(f"no end after {SECONDS} s")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = {resource.RLIMIT_AS: used + MEMORY, resource.RLIMIT_FSIZE: file_size}
    before = {what: resource.getrlimit(what) for what in wanted}
    alarm = signal.signal(signal.SIGALRM, hung)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
        # Where no signal gets through, all tests end.
        faulthandler.dump_traceback_later(5 * SECONDS, exit=True, file=sys.__stderr__)
        for what, most in wanted.items():
            resource.setrlimit(what, (most, before[what][1]))
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        for what, most in before.items():
            resource.setrlimit(what, most)


def run(command, **limit):
    """Types a command; -> exit code. Stages may return it or leave by sys.exit."""
    script, *arguments = shlex.split(command)
    stage = importlib.import_module(script.removesuffix(".py"))
    argv, sys.argv = sys.argv, [script, *arguments]
    try:
        with limits(**limit):
            return stage.main() or 0
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv


def interrupted(command, out, monkeypatch):
    """Types embed.py's command and presses Ctrl-C when the first window of the store `out` is on the disk."""
    start, log = embed.start, Path(out, "windows-0.txt")

    def start_or_stop(*arguments):
        if log.exists() and log.read_text():
            raise KeyboardInterrupt
        return start(*arguments)
    with monkeypatch.context() as patched:
        patched.setattr(embed, "start", start_or_stop)
        assert run(command) == 130


@pytest.fixture(scope="session")
def made(byte_llm, tmp_path_factory):
    """A folder with all that the stages read, made by them: LLM, captions, pictures, stores, checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(byte_llm, folder / "llm")
    random = np.random.default_rng(0)
    for place in ("images", "urban/image", "urban/caption"):
        (folder / place).mkdir(parents=True)
    rows = ["key\timage\traw\tshort\tlong"]
    for n in range(12):
        picture = Image.fromarray(random.integers(0, 256, (16, 20, 3), np.uint8))
        picture.save(folder / f"images/{n:02}.png")
        rows.append(f"k{n:02}\timages/{n:02}.png\tkite {n}\tA kite, {n}.\tA red kite above {n} beaches.")
        if n < 4:
            picture.save(folder / f"urban/image/{n}.png")
            (folder / f"urban/caption/{n}.txt").write_text(f"A red kite above {n} beaches.\n")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        assert run(f"{EMBED} --out store") == run(f"{EMBED} --out store8 --store int8") == 0
        interrupted(f"{EMBED} --out begun", "begun", patch)
        interrupted(f"{EMBED} --out begun8 --store int8", "begun8", patch)
        assert run(f"{TRAIN} --embeddings store --name done") == 0
        shutil.copytree("out/done", "out/half")  # the run as it was after one of its two steps
        os.replace("out/half/training-previous.pt", "out/half/training.pt")
        change("out/half/config.json", step=1)()
        return folder, contents()


@pytest.fixture
def folder(made, monkeypatch):
    """It, to work in; afterwards what was changed is put back."""
    folder, whole = made
    monkeypatch.chdir(folder)
    for name in ("FLAME_LLM", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    left = contents()
    for path in sorted(left, reverse=True):  # a folder after what is in it
        if left[path] != whole.get(path):
            clear(path)
    for path in sorted(whole):
        if left.get(path) == whole[path]:
            continue
        if whole[path] == "folder":
            path.mkdir()
        else:
            path.write_bytes(whole[path])


def contents():
    """{path: bytes, or what else it is} of all that lies here."""
    found = {}
    for path in Path(".").rglob("*"):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = path.read_bytes()
        else:
            found[path] = "folder" if path.is_dir() else "no regular file"
    return found


def lines_of(text):
    """What a terminal shows of stderr, line by line, less the progress bars."""
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in shown if line and not re.search(r"\[\d\d:\d\d", line)]


def refuses(command, named, capsys, spoil=None):
    """The promise."""
    if spoil:
        spoil()
    before = contents()
    capsys.readouterr()
    code = run(command)
    said = lines_of(capsys.readouterr().err)
    assert code == 2 and len(said) == 1, said
    assert said[0].startswith(command.split()[0] + ": ") and named in said[0], said
    changed = {str(path) for path, _ in before.items() ^ contents().items()}
    assert not changed


def cases(table):
    """Parameters of a test; a case is called by its first two."""
    return [pytest.param(*case, id=f"{case[0]} {case[1][:60]}") for case in table]


# --- Ways to spoil a file: each gives a function that does it

def put(path, content):
    """Other bytes or text in its place."""
    def spoil():
        clear(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoil


def clear(path):
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def gone(path):
    return lambda: clear(path)


def fifo(path):
    """A pipe that nobody writes into: who opens it waits for ever."""
    def spoil():
        clear(path)
        os.mkfifo(path)
    return spoil


def directory(path):
    def spoil():
        clear(path)
        os.mkdir(path)
    return spoil


def link(path, target):
    def spoil():
        clear(path)
        os.symlink(target, path)
    return spoil


def cut(path, share=0.5):
    def spoil():
        os.truncate(path, int(os.path.getsize(path) * share))
    return spoil


def both(*spoils):
    def spoil():
        for one in spoils:
            one()
    return spoil


MISSING = object()


def change(path, **entries):
    """Other values in a JSON file. model__width is the entry width of model; MISSING takes an entry out."""
    def spoil():
        whole = json.loads(Path(path).read_text())
        for name, value in entries.items():
            *outer, last = name.split("__")
            entry = whole
            for key in outer:
                entry = entry[key]
            entry[last] = value
            if value is MISSING:
                del entry[last]
        Path(path).write_text(json.dumps(whole))
    return spoil


def array(path, make):
    """make(the array that is there) in its place."""
    def spoil():
        value = make(np.load(path))
        with open(path, "wb") as file:
            np.save(file, value, allow_pickle=True)
    return spoil


class Runs:
    """Unpickled, it makes a file: the proof that a stranger's code ran."""
    def __reduce__(self):
        return os.mkdir, ("a-strangers-code-ran",)


# What may stand where JSON or any file was wanted.
IN_ITS_PLACE = {
    "a list": lambda path: put(path, "[]\n"),
    "null": lambda path: put(path, "null\n"),
    "empty": lambda path: put(path, ""),
    "cut": lambda path: put(path, '{"a": 1, "b'),
    "bytes": lambda path: put(path, b"\xff\xfe\0\x80\n"),
    "deep": lambda path: put(path, "[" * 100_000),
    "fifo": fifo,
    "folder": directory,
}


# --- Settings

TRAIN_SETTINGS = """
image-size              0 -8 20 7.5 nan 1000000000 big
patch-size              0 -8 7 32 nan
width                   0 -24 25 1e3 999999999999
layers                  0 -1 1.5 1000000000
heads                   0 5 -1
projector-hidden        -1 nan 999999999999999
pool-first              maybe
gradient-checkpointing  y
compile                 on
loss                    softmax
text-projection         whitening whiten:nan whiten:-1 foo=whiten raw=whiten:x linear,none
init                    zeros
positives               0 -1 x
columns                 long.9 ,
batch                   0 -4 x
accumulate              -1 1.5
epochs                  inf nan -1 0
steps                   -1 1.5 nan
lr                      nan -1 inf -inf 1e400 fast
weight-decay            -1 nan inf
warmup                  -1 nan
clip-grad               -1 nan inf
ema                     -1 1 1.5 nan
init-scale              0 -1 nan inf
crop-scale              0 -1 1.5 nan
patch-dropout           nan -0.1 1 1.5
holdout                 -1 5000
eval-every              -1 x
checkpoint-every        -1
cache                   -1 nan
workers                 -1 x
seed                    -1 99999999999999999999
preset                  huge
device                  foo mps cuda:99
embeddings              nowhere images captions.tsv
images                  nowhere captions.tsv
"""
EMBED_SETTINGS = """
captions   nowhere.tsv images x-{5..2}.tar /dev/zero
join       long foo=captions.tsv long=
llm        nowhere captions.tsv images
prompts    foo raw,foo ,
layer      0 -1 99 x
positions  backwards
store      int4
dtype      int8
device     foo mps cuda:99
budget     0 -1 1e12 1000000000000 nan x
window     0 -1 1.5 x
shard      x 3/2 -1/2 0/0 1/1 5/99 1/0
plan       -1 x
inspect    nowhere images captions.tsv
merge      nowhere images
out        captions.tsv captions.tsv/x
"""
EVALUATE_SETTINGS = """
checkpoint  nowhere images captions.tsv llm/model.safetensors
llm         nowhere images captions.tsv
data-root   nowhere images captions.tsv
out         captions.tsv captions.tsv/x
split       val train all
prompts     medium
language    xx
classes     nowhere
probe       yes
facets      5..2 0..3 x 1..99
device      foo mps cuda:99
"""


def settings(table):
    for line in table.strip().splitlines():
        flag, *values = line.split()
        yield from ((flag, value) for value in values)


@pytest.mark.parametrize("flag, value", cases(settings(TRAIN_SETTINGS)))
def test_settings_of_training(folder, capsys, flag, value):
    refuses(f"{NEW_RUN} --{flag}={value}", value if flag in ("embeddings", "images") else f"--{flag}", capsys)


@pytest.mark.parametrize("flag, value", cases(settings(EMBED_SETTINGS)))
def test_settings_of_embedding(folder, capsys, flag, value):
    named = value if flag in ("captions", "llm", "inspect", "merge", "out") else f"--{flag}"
    refuses(f"{NEW_STORE} --{flag}={value}", named, capsys)


@pytest.mark.parametrize("flag, value", cases(settings(EVALUATE_SETTINGS)))
def test_settings_of_evaluation(folder, capsys, flag, value):
    named = value if flag in ("checkpoint", "llm", "data-root", "out") else f"--{flag}"
    refuses(f"{SCORE} --{flag}={value}", named, capsys)


COMMANDS = [
    # what is typed, what the line names
    ("embed.py", "--captions"),
    ("embed.py --captions", "--captions"),
    ("embed.py --caption captions.tsv", "--caption"),
    (f"{NEW_STORE} --captions 'x-{{0..2}}.tar'", "x-0.tar"),
    (f"{NEW_STORE} --join long=nowhere.json", "nowhere.json"),
    (f"{NEW_STORE} --join long=images", "images"),
    (f"{NEW_STORE} --draw 'A kite.' --out images", "images"),
    (f"{NEW_STORE} --draw 'A kite.' --out captions.tsv", "captions.tsv"),
    (f"{NEW_STORE} --draw 'A kite.' --out captions.tsv/a.png", "captions.tsv"),
    (f"{NEW_STORE} --merge store --out store --overwrite", "store"),
    (f"{NEW_STORE} --merge store store8", "store8"),
    (f"{NEW_STORE} --captions 'a\nb.tsv'", "a"),
    (f"{NEW_STORE} --captions {'x' * 300}.tsv", "xxx.tsv"),
    (f"{NEW_STORE} --llm 'caf\udce9'", "caf"),
    (f"{EMBED} --out {'x' * 300}", "xxx"),
    ("train.py --learning-rate 1", "--learning-rate"),
    ("train.py --lr", "--lr"),
    ("train.py", "data/embeddings"),
    (f"{NEW_RUN} --steps -1 --epochs 0", "--"),
    (f"{NEW_RUN} --name {'x' * 300}", "xxx"),
    (f"{NEW_RUN} --name done/model.safetensors", "model.safetensors"),
    ("evaluate.py", "--bench"),
    ("evaluate.py --bench nothing", "--bench"),
    (f"{EVALUATE} --bench urban1k --search kite --images images", "--bench"),
    (f"{EVALUATE} --search kite", "--images"),
    (f"{EVALUATE} --search kite --images nowhere", "nowhere"),
    (f"{EVALUATE} --search kite --images llm", "llm"),
    (f"{EVALUATE} --search kite --images captions.tsv", "captions.tsv"),
    (f"{EVALUATE} --search '' --images images", "--search"),
    (f"{EVALUATE} --words nowhere.png", "nowhere.png"),
    (f"{EVALUATE} --words captions.tsv", "captions.tsv"),
    (f"{EVALUATE} --words images", "images"),
    (f"{EVALUATE} --bench imagefolder --data-root images", "images"),
    (f"{EVALUATE} --bench imagefolder --data-root urban --probe", "urban"),
    (f"{EVALUATE} --bench imagefolder --data-root urban --classes captions.tsv", "captions.tsv"),
    (f"{EVALUATE} --bench imagefolder --data-root urban --facets", "--facets"),
    ("evaluate.py --bench urban1k --data-root urban --llm llm --checkpoint out", "out"),
]


@pytest.mark.parametrize("command, named", COMMANDS, ids=range(len(COMMANDS)))
def test_commands(folder, capsys, command, named):
    refuses(command, named, capsys)


# --- Files

JSON_FILES = [
    # a file, a command that reads it
    ("llm/config.json", NEW_STORE),
    ("llm/model.safetensors.index.json", NEW_STORE),
    ("llm/tokenizer.json", NEW_STORE),
    ("llm/config.json", SCORE),
    ("store/meta.json", NEW_RUN),
    ("store/meta.json", INSPECT),
    ("begun/journal.json", GO_ON_EMBEDDING),
    ("out/done/config.json", SCORE),
    ("out/half/config.json", GO_ON_TRAINING),
]


@pytest.mark.parametrize("what", IN_ITS_PLACE)
@pytest.mark.parametrize("path, command", cases(JSON_FILES))
def test_what_is_not_the_json_that_is_wanted(folder, capsys, path, command, what):
    refuses(command, path, capsys, IN_ITS_PLACE[what](path))


ENTRIES = {
    # a file and a command that reads it: an entry and what it may not be
    ("llm/config.json", NEW_STORE): """
        model_type               missing ["llama"] "gpt2"
        hidden_size              missing "32" 0 -32 33 1000000000000
        num_hidden_layers        missing "2" 0 1000000000
        num_attention_heads      missing [4] 0
        num_key_value_heads      3 -2
        head_dim                 "8" 7 -8
        intermediate_size        null 0
        vocab_size               "256" 0
        rms_norm_eps             missing "x" -1 NaN
        hidden_act               "gelu"
        rope_theta               "x" -1
        rope_scaling             ["linear"] {"type":"linear"} {"type":"linear","factor":0}
        rope_scaling             {"type":"yarn","factor":2} {"rope_type":"llama3","factor":"8"}
        max_position_embeddings  "x" -1 40
        quantization_config      {"quant_method":"fp8"} {"load_in_8bit":true}
    """,
    ("store/meta.json", NEW_RUN): """
        N                        missing "12" -1 13 12.5 true
        D                        missing "32" 0
        columns                  missing "raw.0" [] [1,1,1,1,1,1,1,1,1,1,1]
        columns                  ["a","b","c","d","e","f","g","h","i","j","k"]
        columns                  ["raw.0","raw.0"]
        llm                      missing null []
        captions                 missing null {} {"path":3,"sha256":"x"}
        store                    "int4" "int8" []
    """,
    ("store/meta.json", INSPECT): """
        prompts                  missing 3
        llm                      {}
        dtype                    missing
    """,
    ("store/meta.json", f"{EMBED} --merge store --out new"): """
        shard                    missing 3 [0] [0,"1"]
        window                   missing 0
    """,
    ("begun/journal.json", GO_ON_EMBEDDING): """
        settings                 missing null
        settings__captions       null
        settings__llm            "x"
        settings__window         5
        N                        missing "12" -1 9
        total                    missing []
        repeats                  missing 3 ["x"]
    """,
    ("out/done/config.json", SCORE): """
        model                    missing null [] {}
        model__width             missing "24" 0 48 1000000000000
        model__heads             0 5 -3
        model__layers            "1" -1 2 1000000000
        model__image_size        0 24
        model__patch_size        [8] 0
        model__projector_hidden  null 0
        model__text_dim          0 -32
        model__text_rank         "x" -1
        model__text_mapped       "yes" ["long.9"] 3
        model__pool_first        "no"
        model__init_logit_scale  "x"
        llm                      missing null "random"
        llm__layer               "1" 0
        llm__positions           "backwards" 3
        llm__fingerprint         3
    """,
    ("out/half/config.json", GO_ON_TRAINING): """
        model                    missing null
        model__text_dim          missing 33
        training                 missing null {}
        training__lr             "x"
        store                    missing null {}
        step                     "1"
    """,
}


def entries():
    """Parameters of a test."""
    for (path, command), table in ENTRIES.items():
        for line in table.strip().splitlines():
            name, *values = line.split()
            for value in values:
                wrong = MISSING if value == "missing" else json.loads(value)
                yield pytest.param(path, command, {name: wrong}, id=f"{path} {name} {value} {command[:8]}")


@pytest.mark.parametrize("path, command, wrong", list(entries()))
def test_entries_of_json(folder, capsys, path, command, wrong):
    named = str(Path(path).parent)  # what disagrees may be another file there
    if "shard" in wrong or "llm__layer" in wrong:
        named = "shard" if "shard" in wrong else "layer"
    refuses(command, named, capsys, change(path, **wrong))


ARRAYS = {
    "float32": lambda x: x.astype(np.float32),
    "int32": lambda x: x.astype(np.int32),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "columns first": np.asfortranarray,
    "flat": lambda x: x.ravel(),
    "a row less": lambda x: x[1:],
    "no rows": lambda x: x[:0],
    "a number": lambda x: np.float16(1),
    "objects": lambda x: np.array([Runs()], dtype=object),
    "words": lambda x: np.array(["x"]),
    "complex": lambda x: x.astype(np.complex64),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("path", ["store/embeddings.npy", "store8/embeddings.npy", "store8/scales.npy",
                                  "store8/statistics.npy"])
def test_arrays(folder, capsys, path, kind):
    if kind == "big-endian" and "store8/emb" in path or kind == "float32" and "emb" not in path:
        kind = "int32"  # bytes have no order, and the others are float32
    refuses(f"{NEW_RUN} --embeddings {path.split('/')[0]}", path, capsys, array(path, ARRAYS[kind]))


def npz(path):
    def spoil():
        value = np.load(path)
        with open(path, "wb") as file:
            np.savez(file, value)
    return spoil


INDEX, WEIGHTS = "llm/model.safetensors.index.json", "llm/model.safetensors"
TRAINED, SAVED, LOG = "out/done/model.safetensors", "out/half/training.pt", "out/half/log.jsonl"
NO_FILES = {
    "empty": lambda path: put(path, ""),
    "junk": lambda path: put(path, "x" * 500),
    "cut": lambda path: cut(path, 0.01),
    "gone": gone,
    "fifo": fifo,
    "folder": directory,
}
BINARY_FILES = [
    # a file, a command that reads it
    ("store/embeddings.npy", NEW_RUN),
    ("store/keys.txt", NEW_RUN),
    ("store/images.txt", NEW_RUN),
    ("store/embeddings.npy", INSPECT),
    ("store8/embeddings.npy", f"{NEW_RUN} --embeddings store8"),
    ("store8/scales.npy", f"{NEW_RUN} --embeddings store8"),
    ("store8/statistics.npy", f"{NEW_RUN} --embeddings store8"),
    ("begun/embeddings.npy", GO_ON_EMBEDDING),
    ("begun/keys.txt", GO_ON_EMBEDDING),
    ("begun/images.txt", GO_ON_EMBEDDING),
    ("begun8/scales.npy", f"{EMBED} --store int8 --out begun8"),
    (TRAINED, SCORE),
    (SAVED, GO_ON_TRAINING),
    (WEIGHTS, NEW_STORE),
    (WEIGHTS, SCORE),
]


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("path, command", cases(BINARY_FILES))
def test_what_is_no_such_file(folder, capsys, path, command, what):
    clear("out/half/training-previous.pt")  # else training may go on from there
    named = "llm" if (path, what) == (WEIGHTS, "gone") else Path(path).name
    refuses(command, named, capsys, NO_FILES[what](path))


def weights(path, **others):
    """Other tensors, by name with __ for a dot, in a safetensors file; MISSING takes one out."""
    def spoil():
        whole = load_file(path)
        for name, tensor in others.items():
            if tensor is MISSING:
                del whole[name.replace("__", ".")]
            else:
                whole[name.replace("__", ".")] = tensor
        save_file(whole, path)
    return spoil


def all_weights(path, dtype):
    def spoil():
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return spoil


def saved(**others):
    """Other entries in training.pt, and no older one."""
    def spoil():
        torch.save(torch.load(SAVED, weights_only=True) | others, SAVED)
        clear("out/half/training-previous.pt")
    return spoil


def saved_whole(value):
    def spoil():
        torch.save(value, SAVED)
        clear("out/half/training-previous.pt")
    return spoil


def optimizer_state(shape):
    """The optimizer's state of the first parameter in another shape."""
    def spoil():
        whole = torch.load(SAVED, weights_only=True)
        for name in ("exp_avg", "exp_avg_sq"):
            whole["optimizer"]["state"][0][name] = torch.zeros(shape)
        saved_whole(whole)()
    return spoil


def other_tokenizer(name, content):
    return both(gone("llm/tokenizer.json"), put(f"llm/{name}", content))


ZERO = torch.zeros(3)
FILES = {
    # a command that reads a file: (what is wrong, what the line names, how it is spoiled)
    NEW_RUN: [
        ("npz", "embeddings.npy", npz("store/embeddings.npy")),
        ("few lines", "keys.txt", put("store/keys.txt", "k00\n")),
        ("not UTF-8", "keys.txt", put("store/keys.txt", b"\xff\n" * 12)),
        ("few lines", "images.txt", put("store/images.txt", "x\n")),
        ("many lines", "images.txt", put("store/images.txt", "x\n" * 13)),
    ],
    f"{NEW_RUN} --embeddings store8": [("npz", "scales.npy", npz("store8/scales.npy"))],
    f"{NEW_RUN} --embeddings begun": [("unfinished", "begun", None)],
    GO_ON_EMBEDDING: [
        ("another LLM", "begun", change("llm/config.json", rms_norm_eps=1e-6)),
        ("a word", "windows-0.txt", put("begun/windows-0.txt", "x\n")),
        ("a fraction", "windows-0.txt", put("begun/windows-0.txt", "1.5\n")),
        ("below 0", "windows-0.txt", put("begun/windows-0.txt", "-1\n")),
        ("beyond the end", "windows-0.txt", put("begun/windows-0.txt", "0\n99\n")),
        ("a list", "windows-0.txt", put("begun/windows-0.txt", "[0]\n")),
        ("not UTF-8", "windows-0.txt", put("begun/windows-0.txt", b"\xff\n")),
        ("fifo", "windows-0.txt", fifo("begun/windows-0.txt")),
        ("folder", "windows-0.txt", directory("begun/windows-0.txt")),
        ("float32", "embeddings.npy", array("begun/embeddings.npy", ARRAYS["float32"])),
        ("objects", "embeddings.npy", array("begun/embeddings.npy", ARRAYS["objects"])),
        ("link", "lock", link("begun/lock", "../captions.tsv")),
    ],
    f"{EMBED} --store int8 --out begun8": [  # where there are none they are fitted anew
        ("junk", "statistics.npy", put("begun8/statistics.npy", "x" * 500)),
        ("float64", "statistics.npy", array("begun8/statistics.npy", np.float64)),
        ("fifo", "statistics.npy", fifo("begun8/statistics.npy")),
    ],
    NEW_STORE: [
        ("link", "lock", both(directory("new"), link("new/lock", "../captions.tsv"))),
        ("link to nothing", "lock", both(directory("new"), link("new/lock", "../made-by-a-link"))),
        ("fifo", "lock", both(directory("new"), fifo("new/lock"))),
        ("folder", "lock", both(directory("new"), directory("new/lock"))),
        ("huge header", WEIGHTS, put(WEIGHTS, b"\xff" * 7 + b"\x0f{}")),
        ("pickled weights only", "llm", both(gone(WEIGHTS), put("llm/pytorch_model.bin", "x"))),
        ("a tensor less", "llm", weights(WEIGHTS, model__layers__0__mlp__up_proj__weight=MISSING)),
        ("another shape", "llm", weights(WEIGHTS, model__embed_tokens__weight=torch.zeros(9, 32))),
        ("int8 weights", "llm", all_weights(WEIGHTS, torch.int8)),
        ("float8 weights", "llm", all_weights(WEIGHTS, torch.float8_e4m3fn)),
        ("no map", INDEX, put(INDEX, "{}")),
        ("map a list", INDEX, put(INDEX, '{"weight_map": []}')),
        ("map of numbers", INDEX, put(INDEX, '{"weight_map": {"a": 1}}')),
        ("map of nothing", "llm", put(INDEX, '{"weight_map": {}}')),
        ("map to nowhere", "x.safetensors", put(INDEX, '{"weight_map": {"a": "x.safetensors"}}')),
        ("map outside", "llm", put(INDEX, '{"weight_map": {"a": "../captions.tsv"}}')),
        ("no tokenizer", "tokenizer", gone("llm/tokenizer.json")),
        ("tokenizer of another model", "llm", both(
            change("llm/config.json", vocab_size=64),
            weights(WEIGHTS, model__embed_tokens__weight=torch.zeros(64, 32)))),
        ("junk", "tokenizer.model", other_tokenizer("tokenizer.model", "x" * 99)),
        ("fifo", "tokenizer.model", both(gone("llm/tokenizer.json"), fifo("llm/tokenizer.model"))),
        ("a list", "tekken.json", other_tokenizer("tekken.json", "[]")),
        ("no entries", "tekken.json", other_tokenizer("tekken.json", "{}")),
        ("no vocabulary", "tekken.json", other_tokenizer("tekken.json", '{"config": {}, "vocab": 3}')),
    ],
    SCORE: [
        ("huge header", "out/done", put(TRAINED, b"\xff" * 7 + b"\x0f{}")),
        ("a tensor less", "out/done", weights(TRAINED, mm__0__weight=MISSING)),
        ("a tensor more", "out/done", weights(TRAINED, x=ZERO)),
        ("another shape", "out/done", weights(TRAINED, mm__0__bias=ZERO)),
        ("NaN", "out/done", weights(TRAINED, mm__0__bias=torch.full((32,), float("nan")))),
        ("integers", "out/done", all_weights(TRAINED, torch.int8)),
        ("no tokenizer", "tokenizer", gone("llm/tokenizer.json")),
    ],
    SCORE.replace("--checkpoint out/done ", ""): [
        ("no object", "out", both(put("out/done/config.json", "[]"), put("out/half/config.json", "null"))),
    ],
    f"{SCORE} --checkpoint a.pt": [
        ("empty", "a.pt", put("a.pt", "")),
        ("junk", "a.pt", put("a.pt", "x" * 500)),
        ("fifo", "a.pt", fifo("a.pt")),
        ("code", "a.pt", lambda: torch.save({"state_dict": Runs()}, "a.pt")),
        ("a list", "a.pt", lambda: torch.save([1], "a.pt")),
        ("no weights", "a.pt", lambda: torch.save({"state_dict": {}}, "a.pt")),
        ("a number for a weight", "a.pt", lambda: torch.save({"visual.conv1.weight": 3}, "a.pt")),
    ],
    GO_ON_TRAINING: [
        ("code", SAVED, saved(model=Runs())),
        ("a list", SAVED, saved_whole([1])),
        ("a tensor", SAVED, saved_whole(ZERO)),
        ("no entries", SAVED, saved_whole({})),
        ("step below 0", SAVED, saved(step=-1)),
        ("step beyond", SAVED, saved(step=99)),
        ("step a word", SAVED, saved(step="1")),
        ("no weights", SAVED, saved(model={})),
        ("weights a list", SAVED, saved(model=[1])),
        ("weight of another shape", SAVED, saved(model={"mm.0.bias": ZERO})),
        ("no optimizer", SAVED, saved(optimizer={})),
        ("optimizer of another shape", SAVED, optimizer_state(3)),
        ("fifo", LOG, fifo(LOG)),
        ("folder", LOG, directory(LOG)),
    ],
    f"{EVALUATE} --words images/00.png": [
        ("no unembedding", "llm",
         weights(WEIGHTS, lm_head__weight=MISSING, model__embed_tokens__weight=MISSING)),
        ("an integer unembedding", "llm", all_weights(WEIGHTS, torch.int8)),
    ],
}


@pytest.mark.parametrize("command, named, spoil", [
    pytest.param(command, *rest, id=f"{rest[0]} {what} {command[:8]}")
    for command, table in FILES.items() for what, *rest in table])
def test_files(folder, capsys, command, named, spoil):
    refuses(command, named, capsys, spoil)


# --- Captions

def header(name, size=b"", kind=b"0", rest=b""):
    """A tar member's header with whatever in its size field, and a right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[386:386 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**headers):
    """A member whose extended header says these things of it; __ stands for a dot."""
    member = tarfile.TarInfo("01.txt")
    member.pax_headers = {name.replace("__", "."): value for name, value in headers.items()}
    return member.tobuf(tarfile.PAX_FORMAT)


def tar(**members):
    """A whole tar without its end: k00__txt=b"..." is a member k00.txt."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
        end = opened.offset
    return file.getvalue()[:end]


def tar_of_pictures():
    """Eight of the twelve pictures by key, without the tar's end."""
    return tar(**{f"k{n:02}__png": Path(f"images/{n:02}.png").read_bytes() for n in range(8)})


TWENTY_GB = b"%011o" % (20 << 30)
END = bytes(1024)
BAD_MEMBERS = {
    "a size below 0": header("01.txt", b"\xff" * 12),
    "a size of 2 ** 88": header("01.txt", b"\x80" + b"\xff" * 11),
    "a size that is no number": header("01.txt", b"notanumber"),
    "a size beyond the end": header("01.txt", b"%011o" % (1 << 30)),
    "a wrong checksum": b"01.txt".ljust(512, b"x"),
    "PAX: a size below 0": pax(size="-1"),
    "PAX: a size that is no number": pax(size="many"),
    "PAX: a size of 30 digits": pax(size="9" * 30),
    "sparse: a bad map": header("01.txt", b"%011o" % 512, b"S", b"zz" * 48) + bytes(512),
    "sparse: 20 GB": header("01.txt", b"%011o" % 0, b"S", (b"%011o\0" % 0) * 8 + b"\0" + TWENTY_GB),
    "sparse: a map without end": header("01.txt", b"%011o" % 512, b"S", b"\0" * 96 + b"\1"),
    "PAX sparse: a bad map": pax(GNU__sparse__map="a,b", GNU__sparse__size="9"),
    "PAX sparse: 20 GB": pax(GNU__sparse__map="0,0", GNU__sparse__size=str(20 << 30)),
    "PAX sparse: a map that ends":
        pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9") + b"99\n",
}
ROW = b'{"key": "k", "raw": "A kite."}'
CAPTIONS = {
    "empty.tsv": b"",
    "blank.tsv": b"\n \n\n",
    "header.tsv": b"key\traw\n",
    "column.tsv": b"hello\nworld\n",
    "zeros.tsv": bytes(1000),
    "bytes.tsv": bytes(range(256)) * 9,
    "utf16.tsv": "key\traw\na\tb\n".encode("utf-16"),
    "other.tsv": b"key\tnote\na\tb\n",
    "short-rows.tsv": b"key\traw\na\nb\n",
    "null.json": b"null",
    "number.json": b"3",
    "empty.json": b"[]",
    "cut.json": b'[{"raw": "x"}, {"ra',
    "open.json": b"[",
    "numbers.json": b"[1, 2]",
    "twice.json": b"[" + ROW + b"] []",
    "deep.json": b"[" * 99_999,
    "empty.jsonl": b"{}\n",
    "cut.jsonl": ROW[:-2],
    "empty.csv": b"",
    "quote.csv": b'key,"raw\n',
    "other.csv": b"a,b\n1,2\n",
    "cut.tsv.gz": gzip.compress(b"key\traw\n" + os.urandom(9999))[:5000],
    "junk.tsv.gz": b"\x1f\x8b" + b"x" * 99,
    "wrong.tsv.gz": gzip.compress(b"key\traw\na\tb\n")[:-8] + b"12345678",
    "empty.tar": b"",
    "junk.tar": b"x" * 2000,
    "end.tar": END,
    "no-captions.tar": tar(a__png=b"x") + END,
    "not-text.tar": tar(a__txt=b"\xff") + END,
    "not-json.tar": tar(a__json=b"[]") + END,
    "outside.tar": tar(**{"../a__txt": b"x"}) + END,
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_that_are_none(folder, capsys, name):
    refuses(f"{NEW_STORE} --captions {name}", name, capsys, put(name, CAPTIONS[name]))


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_tars_without_a_good_sample(folder, capsys, name):
    refuses(f"{NEW_STORE} --captions bad.tar", "bad.tar", capsys, put("bad.tar", BAD_MEMBERS[name] + END))


@pytest.mark.parametrize("flags", [
    "--captions pipe", "--captions pipe.tar", "--join long=pipe", "--captions pipe --plan"])
def test_captions_from_a_pipe(folder, capsys, flags):
    refuses(f"{NEW_STORE} {flags}", "pipe", capsys, both(fifo("pipe"), fifo("pipe.tar")))


# --- Pictures

def every_picture(spoil):
    return both(*(spoil(f"images/{n:02}.png") for n in range(12)))


def dangling(path):
    return link(path, "nowhere")


def bomb(path):
    """A PNG of 60,000 x 60,000 pixels in a few bytes: its header says so."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return put(path, b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + bytes(99))


def sized(width, height):
    """A BMP that says to be of such a size; if it is below 1 the pixels are those of 4 x 4."""
    def spoil_with(path):
        def spoil():
            clear(path)
            Image.new("L", (width or 4, height)).save(path, "bmp")
            data = bytearray(Path(path).read_bytes())
            data[18:22] = struct.pack("<I", width)
            Path(path).write_bytes(data)
        return spoil
    return spoil_with


BAD_PICTURES = {
    "empty": lambda path: put(path, ""),
    "junk": lambda path: put(path, "x" * 500),
    "cut": cut,
    "gone": gone,
    "fifo": fifo,
    "folder": directory,
    "dangling link": dangling,
    "a link to itself": lambda path: link(path, Path(path).name),
    "bomb": bomb,
    "no width": sized(0, 4),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_no_good_picture_to_train_on(folder, capsys, what):
    refuses(NEW_RUN, "images/", capsys, every_picture(BAD_PICTURES[what]))


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_no_good_picture_to_score(folder, capsys, what):
    refuses(SCORE, "urban", capsys, both(*(BAD_PICTURES[what](f"urban/image/{n}.png") for n in range(4))))


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_picture_that_has_no_words(folder, capsys, what):
    refuses(f"{EVALUATE} --words images/00.png", "00.png", capsys, BAD_PICTURES[what]("images/00.png"))


# --- Benchmarks

SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
DEEP = "[" * 99_999
SENTENCES = '"split": "test", "sentences": '
BENCHMARKS = {
    # a benchmark and one of its files: what may stand there
    ("coco", "dataset_coco.json"): [
        "[]", "null", "", DEEP, b"\xff", '{"images": {}}', '{"images": [3]}', '{"images": []}',
        '{"images": [{%s[3]}]}' % SENTENCES, '{"images": [{%s[{"raw": "x"}], "filepath": 3}]}' % SENTENCES],
    ("flickr30k", "dataset_flickr30k.json"): ['{"images": 3}'],
    ("coco", "coco_test_karpathy.json"): [
        "[]", DEEP, b"\xff", '{"images": [{"id": {}}]}', '{"images": [], "annotations": []}',
        '{"images": [], "annotations": [{"image_id": []}]}',
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}'],
    ("flickr30k", "flickr30k_test_karpathy.txt"): ["", "image,caption\n", b"\xff", "image,caption\nx,y\n"],
    ("docci", "docci_descriptions.jsonlines"): ["", DEEP, '{"split": 3}'],
    ("sharegpt4v", SHAREGPT4V): [
        "", "[]", "[3]", DEEP, "{}", '[{"image": "x", "conversations": [1, {"value": 2}]}]'],
    ("dci", "densely_captioned_images/splits.json"): ["3", "{}", '{"a": ["x.json"]}', '{"a": [null]}'],
    ("xm3600", "captions.jsonl"): [
        "", '{"image/key": "a"}', '{"image/key": 3, "en": {"caption": ["x"]}}',
        '{"image/key": "a", "en": {"caption": "x"}}'],
    ("sugarcrepe", "add_att.json"): ["3", "[3]", '{"0": []}'],
    ("winoground", "examples.jsonl"): ["", "3\n", '{"image_0": 3}'],
    ("food101", "food-101/meta/test.txt"): ["", "/\n", b"\xff/\xff\n", "nothing/1\n"],
    ("cifar10", "cifar-10-batches-bin/test_batch.bin"): ["", bytes(3000)],
    ("cifar100", "cifar-100-binary/test.bin"): [bytes(3000)],
    ("sun397", "Testing_01.txt"): ["x\n"],
    ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt"): ["", "1\n"],
    ("dtd", "dtd/labels/test1.txt"): ["x\n"],
    ("pets", "annotations/test.txt"): [""],
    ("cars", "devkit/cars_meta.mat"): ["x"],
    ("flowers102", "imagelabels.mat"): [""],
    ("fashionmnist", "t10k-images-idx3-ubyte.gz"): [
        "", gzip.compress(b"x"), gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12)],
    ("demo", "test.tsv"): ["", "key\timage\traw\tshort\tlong\n", b"\xff\n"],
    ("imagefolder", "classes.txt"): ["x\n", "y\tz\n", b"\xff\n"],
}


@pytest.mark.parametrize("bench, path, content", [
    pytest.param(*case, content, id=f"{case[0]} {content[:50]!r}")
    for case, table in BENCHMARKS.items() for content in table])
def test_benchmarks(folder, capsys, bench, path, content):
    if bench == "imagefolder":
        shutil.copytree("urban", "tree")
    refuses(f"{EVALUATE} --bench {bench} --data-root tree", "tree", capsys, put(f"tree/{path}", content))


@pytest.mark.parametrize("bench, path", BENCHMARKS)
def test_benchmarks_from_a_pipe(folder, capsys, bench, path):
    def spoil():
        if bench == "imagefolder":
            shutil.copytree("urban", "tree")
        Path("tree", path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(f"tree/{path}")
    refuses(f"{EVALUATE} --bench {bench} --data-root tree", "tree", capsys, spoil)


@pytest.mark.parametrize("what", ["fifo", "bytes", "folder"])
def test_captions_of_a_benchmark(folder, capsys, what):
    refuses(SCORE, "urban/caption/1.txt", capsys, IN_ITS_PLACE[what]("urban/caption/1.txt"))


# --- Where the run goes on: what is bad is skipped, counted and reported

def goes_on(command, said, capsys):
    capsys.readouterr()
    code = run(command)
    shown = capsys.readouterr()
    assert code == 0, lines_of(shown.err)
    assert re.search(said, shown.out + "\n".join(lines_of(shown.err))), lines_of(shown.err)
    return shown


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_among_good_ones_in_training(folder, capsys, what):
    BAD_PICTURES[what]("images/03.png")()
    goes_on(f"{NEW_RUN} --batch 12", "skipped 1 unreadable picture.*k03", capsys)
    assert Path("out/new/skipped.txt").read_text().count("k03") == 1


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_among_good_ones_in_a_benchmark(folder, capsys, what):
    BAD_PICTURES[what]("urban/image/1.png")()
    goes_on(f"{SCORE} --report", "1 ", capsys)
    assert json.loads(Path("found/urban1k.json").read_text())["n_images"] == 3


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_among_good_ones_in_a_search(folder, capsys, what):
    BAD_PICTURES[what]("images/03.png")()
    goes_on(SEARCH, "the best of 11 pictures", capsys)


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_bad_member_among_good_ones_in_captions(folder, capsys, name):
    put("bad.tar", tar(k00__txt=b"A kite.") + BAD_MEMBERS[name] + END)()
    goes_on(f"{NEW_STORE} --captions bad.tar", "bad.tar", capsys)
    assert Path("new/keys.txt").read_text().startswith("k00\n")


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_bad_member_among_good_ones_in_pictures(folder, capsys, name):
    bad = BAD_MEMBERS[name].replace(b"01.txt", b"k9.png")
    put("tars/0.tar", tar_of_pictures() + bad + END)()
    goes_on(f"{NEW_RUN} --images tars", "0.tar|8 images", capsys)


@pytest.mark.parametrize("content", [b"k\t\n", b"k\n", b"k\t\xff\n", b"\n", b"k00\tagain\n", b"k\ta\rb\tc\n"])
def test_a_bad_row_among_good_ones(folder, capsys, content):
    put("some.tsv", b"key\traw\nk00\tA kite.\n" + content + b"k01\tA dog.\n")()
    goes_on(f"{NEW_STORE} --captions some.tsv", "", capsys)
    keys = Path("new/keys.txt").read_text().splitlines()
    assert keys[0] == "k00" and keys[-1] == "k01" and len(keys) <= 3


CACHES = [
    # what a run may find and can do without, a command
    ("found/cache.sqlite", SCORE),
    ("out/new/tars.npz", f"{NEW_RUN} --images tars"),
    ("out/half/skipped.txt", GO_ON_TRAINING),
    ("out/half/log.jsonl", GO_ON_TRAINING),
]


@pytest.mark.parametrize("what", ["empty", "bytes", "a list"])
@pytest.mark.parametrize("path, command", cases(CACHES))
def test_what_can_be_done_without(folder, capsys, path, command, what):
    put("tars/0.tar", tar_of_pictures() + END)()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    IN_ITS_PLACE[what](path)()
    goes_on(command, "", capsys)


@pytest.mark.parametrize("path, command", cases(CACHES[:3]))
def test_caches_that_are_pipes(folder, capsys, path, command):
    put("tars/0.tar", tar_of_pictures() + END)()
    Path(path).parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    goes_on(command, "", capsys)


def test_thin_pictures(folder, capsys):
    """At the shortest side's new size such a picture would fill the memory."""
    sized(1, 60_000)("images/03.png")()
    goes_on(SEARCH, "the best of 11 pictures", capsys)
    goes_on(NEW_RUN, "", capsys)


def test_a_column_of_equal_vectors_is_trained_on(folder, capsys):
    vectors = np.load("store/embeddings.npy")
    vectors[:, 0] = vectors[0, 0]
    np.save("store/embeddings.npy", vectors)
    goes_on(NEW_RUN, "2 steps", capsys)


@pytest.mark.parametrize("name", ["two\nlines", "caf\udce9", "-x", "a b"])
def test_names_that_are_no_plain_text(folder, capsys, name):
    os.rename("captions.tsv", name)
    goes_on(f"{EMBED} '--captions={name}' '--out=of {name}'", "12 x 11", capsys)


def test_a_drawing_gets_an_ending(folder, capsys):
    goes_on(f"{NEW_STORE} --draw 'A kite.' --out f7", "f7.png", capsys)


# --- A disk that is full, at every size that a file may have come to

SIZES = 0, 1, 20, 100, 130, 300, 600, 1_000, 3_000, 8_000, 12_000, 30_000, 60_000, 100_000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("command, new, whole", [
    (NEW_STORE, "new", "store"),
    (f"{NEW_STORE} --store int8", "new", "store8"),
    (NEW_RUN, "out/new", "out/done")], ids=["embed", "embed int8", "train"])
def test_a_full_disk(folder, capsys, command, new, whole, size):
    """One line; and the same command, once there is room, ends as if nothing had been."""
    new, whole = Path(new), Path(whole)
    code = run(command, file_size=size)
    said = lines_of(capsys.readouterr().err)
    if code:
        assert code == 2 and len(said) == 1 and str(new) in said[0], said
        assert run(command) == 0
    for name in ("embeddings.npy", "scales.npy", "statistics.npy", "keys.txt", "model.safetensors"):
        if (whole / name).exists():
            assert (new / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path for path in new.iterdir() if path.name.startswith(".") or "tmp" in path.name]


@pytest.mark.parametrize("size", [0, 100, 1_000, 5_000, 20_000])
def test_a_full_disk_in_a_later_checkpoint(folder, capsys, size):
    """What was there stays whole, and the run goes on from it."""
    code = run(GO_ON_TRAINING, file_size=size)
    said = lines_of(capsys.readouterr().err)
    assert code == 2 and len(said) == 1 and "out/half" in said[0], said
    assert run(GO_ON_TRAINING) == 0
    assert Path("out/half/model.safetensors").read_bytes() == Path("out/done/model.safetensors").read_bytes()


@pytest.mark.parametrize("size", [0, 100, 1_000, 5_000])
@pytest.mark.parametrize("command", [SCORE, SEARCH, f"{EVALUATE} --words images/00.png"])
def test_a_full_disk_in_evaluation(folder, capsys, command, size):
    code = run(command, file_size=size)
    said = lines_of(capsys.readouterr().err)
    if code:
        assert code == 2 and said[-1].startswith("evaluate.py: found/"), said
        assert all("nothing is kept" in line or "no index is kept" in line for line in said[:-1]), said
