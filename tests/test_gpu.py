"""tests/gpu.py, which nobody here can run in earnest. What is promised of it:

* every step runs on a stand-in for a GPU, tiny; what only hardware can do says so, and no time is claimed;
* a step that fails, dies or hangs is a line, what it started ends with it, and the others run;
* FlexAttention's mask is the rule; what differs from the twin is seen; the verdict is that of its docstring;
* the demo on the GPU is compared with that on the CPU.
"""
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  once: on the shim each step's process would take two seconds for it
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import _disable_current_modes as without_shim

import bench_store
import flame
import gpu
import test_walk_on_a_gpu as walk

LLM = gpu.NEMO | dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8)
VIT = dict(image_size=32, patch_size=8, width=16, layers=1, heads=1, projector_hidden=16)
TINY = dict(NEMO=LLM, SMOLLM2=LLM, VITS=dict.fromkeys(gpu.VITS, VIT), IMAGES=4, SIDE=8, CAPTIONS=2, ROUNDS=1,
            SECONDS=0, STORE="--rows 16 --dims 16 --batches 1")


@contextmanager
def stand_in():
    """For a GPU: the shim, with the extension's stand-in. Times are NaN, as none is of a GPU."""
    patch = pytest.MonkeyPatch()
    shim = walk.Gpus()
    shim.properties.name = "no GPU but a stand-in"
    shim.properties.total_memory = 0
    walk.patch_driver(patch, shim)
    walk.patch_tensors(patch, shim)

    class Event(torch.cuda.Event):
        def __init__(self, enable_timing):
            assert enable_timing

        def elapsed_time(self, end):
            return math.nan

    def output_of(*command, run=gpu.output_of, **environment):
        if "pytest" not in command:
            return run(*command, **environment)
        assert all(file.exists() for file in command if isinstance(file, Path))
        raise gpu.WantsHardware("the tests that want a GPU")

    def wants(what):
        def refuse(*args):
            raise gpu.WantsHardware(what)
        return refuse

    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(gpu, "output_of", output_of)
    patch.setattr(torch.nn.Module, "compile", wants("torch.compile"))
    photos = gpu.bench_train.photos
    patch.setattr(gpu.bench_train, "photos", lambda n, *form: photos(2, *form))
    patch.setattr(gpu, "make_demo_llm", wants("the demo, twice, takes minutes"))
    patch.setattr(gpu, "attention_by_flex", on_cpu(gpu.attention_by_flex, flame.flame_ext))
    for name, value in TINY.items():
        patch.setattr(gpu, name, value)
    patch.setattr(flame, "flame_ext", walk.kernels())
    with shim:
        yield


def on_cpu(prepare, extension):
    """FlexAttention, uncompiled, for tensors of the shim, which it would not know."""
    def attention(forest, device, share):
        stand_in, flame.flame_ext = flame.flame_ext, extension
        with without_shim():
            attend = prepare(forest, torch.device("cpu"), share)
        flame.flame_ext = stand_in

        def moved(*qkv):
            rows = [x.cpu() for x in qkv]
            with without_shim():
                out = attend(*rows)
            return out.to(device)
        return moved
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    return attention


def test_the_dry_run():
    """In a process of its own: what the stand-in changes stays there."""
    command = [sys.executable, gpu.__file__, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
    printed, table = done.stdout.split("\n## A dry run: no GPU has run any of this\n")
    rows = [line[2:-2].split(" | ") for line in table.splitlines()[5:]]
    assert [": ".join(row) for row in rows] == printed.splitlines()
    lines = {}
    for what, line in rows:
        lines.setdefault(what, []).append(line)
    expected = [step.__doc__ for step in gpu.STEPS]
    assert list(lines) == expected
    wanting = [(what, line.split(": ")[-1]) for what, line in rows if "wants hardware" in line]
    assert [expected.index(what) for what, _ in wanting] == [1, 3, 7, 10], wanting
    timed = re.findall(r"(\S+) (?:ms|TFLOP/s|images/s, \d)", " ".join(line for _, line in rows))
    assert len(timed) == 23 and {*timed} == {"nan"}
    assert [line for line in lines[gpu.attention.__doc__] if "no verdict" in line]


def test_every_step_has_its_limit_and_its_help(monkeypatch, capsys):
    assert sum(gpu.STEPS.values()) < 13 * 60
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--help"])
    with pytest.raises(SystemExit):
        gpu.main()
    shown = capsys.readouterr().out
    assert all(f"{step.__name__} " in shown and step.__doc__ in shown for step in gpu.STEPS)


# --- steps that go wrong

def raises():
    yield "one line"
    raise ValueError("so\nit is")


def dies():
    yield "one line"
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    child = subprocess.Popen(["sleep", "60"])
    yield str(child.pid)
    time.sleep(60)


@pytest.fixture
def forked(monkeypatch):
    """The steps' processes have no GPU here."""
    monkeypatch.setattr(gpu, "GPU", torch.device("cpu"))


def test_a_step_that_raises_or_dies_is_a_line(forked):
    assert list(gpu.lines_of(raises, 60)) == ["one line", "FAILED: so it is"]
    assert list(gpu.lines_of(dies, 60)) == ["one line", "FAILED: its process ended with exit code -9"]


def test_a_step_that_hangs_is_ended_with_all_that_it_started(forked):
    started = time.monotonic()
    child, line = gpu.lines_of(hangs, 1)
    assert line == "FAILED: not done after 1 s" and time.monotonic() - started < 30
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", child], capture_output=True, text=True).stdout
        if state[:1] in ("", "Z"):
            return
        time.sleep(0.1)
    raise AssertionError(state)


def test_a_step_that_fails_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(gpu, "lines_of", lambda *_: ["FAILED: so it is"])
    monkeypatch.setattr(gpu.tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", gpu.tempfile.gettempdir())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "block"])
    assert gpu.main() == 1


# --- what is computed

def test_the_mask_of_flex_attention_is_the_rule(monkeypatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    forest = gpu.packed_row(3)
    T = len(forest.tokens)
    assert 600 < T < 800 and len(forest.lengths) > 30
    q, k, v = (torch.randn(T, heads, 16) for heads in (4, 2, 2))
    out = gpu.attention_by_flex(forest, q.device, 2)(q, k, v)
    torch.testing.assert_close(out, flame.attention_in_stretches(forest, q.device, 2)(q, k, v))


def test_the_verdict():
    """5% of a block's time, no less; nothing is said without a time."""
    for ours, flexible, block, words in [
            (0.3, 1.3, 20, "5.0% longer, at least 5%: cuda.cu's attention stays"),
            (0.3, 1.2, 20, "4.5% longer, less than 5%: cuda.cu's attention goes"),
            (1.3, 0.3, 20, "-5.0% longer, less than 5%: cuda.cu's attention goes"),
            (0.3, math.nan, 20, "no verdict"), (math.nan, 1, 20, "no verdict"),
            (0.3, 1, math.nan, "no verdict")]:
        assert words in gpu.verdict(ours, flexible, block)


def test_the_demos_are_compared(tmp_path):
    for n, name in enumerate(("GPU", "CPU")):
        folder = tmp_path / name
        (folder / "data/embeddings").mkdir(parents=True)
        bench_store.make(folder / "data/embeddings", 20, 16)
        (folder / "data/embeddings/store").rename(folder / "data/embeddings/demo-quick")
        (folder / "results/quick").mkdir(parents=True)
        figures = {f"parts/{part}": np.full((1001, 1), 50.0 + 2 * n)
                   for part in ("long/text_to_image", "seen/top1", "seen/top5", "seen/languages/de/top1")}
        np.savez(folder / "results/quick/demo.npz", queries="same", **figures)
    assert list(gpu.compare_demos(tmp_path / "GPU", tmp_path / "CPU")) == [
        "facets' cosine, their mean subtracted: 1.0000, at worst 1.0000",
        "long/text_to_image 50.0 [ 50.0, 50.0] 52.0 [ 52.0, 52.0] -2.0 [ -2.0, -2.0]",
        "seen/top1 50.0 [ 50.0, 50.0] 52.0 [ 52.0, 52.0] -2.0 [ -2.0, -2.0]"]
