"""Tests of tests/gpu.py on a machine without a GPU."""
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
import torch._dynamo  # noqa: F401  once here: it takes two seconds, in each step's process
from torch.nn.attention import flex_attention as flex

import flame
import gpu
import test_walk_on_a_gpu as walk
from test_step import colors_of, make_store

LLM = gpu.NEMO | dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8)
VIT = dict(image_size=32, patch_size=8, width=16, layers=1, heads=1, projector_hidden=16)
TINY = dict(NEMO=LLM, SMOLLM2=LLM, VITS=dict.fromkeys(gpu.VITS, VIT), IMAGES=4, SIDE=8, CAPTIONS=2, REPEATS=1,
            SECONDS=0)


@contextmanager
def simulated_gpu():
    """The simulated GPU of cuda_shim.py with a fake extension. Times are NaN."""
    patch = pytest.MonkeyPatch()
    shim = walk.Gpus()
    shim.properties.name = "simulated GPU"
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
        raise gpu.NeedsHardware("the tests that need a GPU")

    def needs_hardware(reason):
        def refuse(*args):
            raise gpu.NeedsHardware(reason)
        return refuse

    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(gpu, "output_of", output_of)
    make_photos = gpu.bench_train.make_photos
    patch.setattr(gpu.bench_train, "make_photos", lambda n, *format: make_photos(2, *format))
    patch.setattr(gpu, "make_demo_llm", needs_hardware("two runs of the demo take minutes"))
    patch.setattr(gpu, "flex_attention", flame.chunked_attention)  # it does not support the shim's tensors
    for name, value in TINY.items():
        patch.setattr(gpu, name, value)
    patch.setattr(flame, "flame_ext", walk.fake_extension())
    with shim:
        yield


def test_dry_run_runs_every_step():
    """It patches torch, so it runs in a process of its own."""
    command = [sys.executable, gpu.__file__, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
    printed, table = done.stdout.split("\n## A dry run: no GPU has run any of this\n")
    rows = [line[2:-2].split(" | ") for line in table.splitlines()[5:]]
    assert [": ".join(row) for row in rows] == printed.splitlines()
    lines = {}
    for step, line in rows:
        lines.setdefault(step, []).append(line)
    expected = [step.__doc__ for step in gpu.STEPS]
    assert list(lines) == expected
    unsupported = [(step, line.split(": ")[-1]) for step, line in rows if "needs hardware" in line]
    assert [expected.index(step) for step, _ in unsupported] == [1, 3, 9], unsupported
    times = re.findall(r"(\S+) (?:ms|TFLOP/s|images/s, \d)", " ".join(line for _, line in rows))
    assert len(times) == 23 and {*times} == {"nan"}
    assert lines[gpu.attention.__doc__][-1].startswith("nan% of a Nemo layer's time saved")


# --- steps that fail

def raises():
    yield "one line"
    raise ValueError("bad\nvalue")


def crashes():
    yield "one line"
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    child = subprocess.Popen(["sleep", "60"])
    yield str(child.pid)
    time.sleep(60)


@pytest.fixture
def cpu_steps(monkeypatch):
    """Let the steps run on the CPU."""
    monkeypatch.setattr(gpu, "GPU", torch.device("cpu"))


def test_step_that_raises_or_crashes_becomes_a_line(cpu_steps):
    assert list(gpu.run_step(raises, 60)) == ["one line", "FAILED: bad value"]
    assert list(gpu.run_step(crashes, 60)) == ["one line", "FAILED: its process ended with exit code -9"]


def test_step_that_hangs_is_killed_with_its_children(cpu_steps):
    start = time.monotonic()
    child, line = gpu.run_step(hangs, 1)
    assert line == "FAILED: not finished after 1 s" and time.monotonic() - start < 30
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", child], capture_output=True, text=True).stdout
        if state[:1] in ("", "Z"):
            return
        time.sleep(0.1)
    raise AssertionError(state)


def test_failed_step_sets_the_exit_code(monkeypatch):
    monkeypatch.setattr(gpu, "run_step", lambda *_: ["FAILED: bad value"])
    monkeypatch.setattr(gpu.tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", gpu.tempfile.gettempdir())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "layer"])
    assert gpu.main() == 1


# --- what the steps compute

def test_flex_attention_mask_is_the_visibility_rule(monkeypatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    forest = gpu.packed_row(3)
    T = len(forest.tokens)
    assert 600 < T < 800 and len(forest.lengths) > 30
    q, k, v = (torch.randn(T, heads, 16) for heads in (4, 2, 2))
    out = gpu.flex_attention(forest, q.device, 2)(q, k, v)
    torch.testing.assert_close(out, flame.chunked_attention(forest, q.device, 2)(q, k, v))


def test_compare_demos_reports_stores_and_scores(tmp_path):
    for n, name in enumerate(("GPU", "CPU")):
        folder = tmp_path / name
        (folder / "data/embeddings").mkdir(parents=True)
        make_store(folder / "data/embeddings/demo-quick", colors_of(20))
        (folder / "results/quick").mkdir(parents=True)
        scores = {f"parts/{part}": np.full((1001, 1), 50.0 + 2 * n)
                  for part in ("long/text_to_image", "seen/top1", "seen/top5", "seen/languages/de/top1")}
        np.savez(folder / "results/quick/demo.npz", queries="same", **scores)
    assert list(gpu.compare_demos(tmp_path / "GPU", tmp_path / "CPU")) == [
        "cosine of centered facets: mean 1.0000, minimum 1.0000",
        "long/text_to_image 50.0 [ 50.0, 50.0] 52.0 [ 52.0, 52.0] -2.0 [ -2.0, -2.0]",
        "seen/top1 50.0 [ 50.0, 50.0] 52.0 [ 52.0, 52.0] -2.0 [ -2.0, -2.0]"]
