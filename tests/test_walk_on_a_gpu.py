"""The lines that only a GPU runs, on a stand-in for two of them (cuda_shim.py). What is promised:

* the stand-in refuses what CUDA refuses: a wrong device, a missing wait;
* the text tower gives on a GPU what it gives on the CPU, by the twins and by the extension's kernels;
* kernels run on a GPU only where they gave what the twins give: a kernel that lies or raises, a GPU that is
  too old, an extension without CUDA are each one warning that says why, and the twins run;
* bfloat16 is the choice on GPUs that have it;
* every stage makes on a GPU what it makes on the CPU: the same store, losses, figures;
* a full GPU is one line.

Its name makes it the last file: what other libraries learn of this machine on the stand-in, they remember.
"""
# ruff: noqa: F811  (the fixture of test_refusals.py is imported, and named again by who wants it)
import functools
import importlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flame
from conftest import CAPTIONS, centered_error
from cuda_shim import Gpus, patch_driver, patch_tensors
from test_refusals import world  # noqa: F401  a folder with pictures, captions, a store, a checkpoint

# The shim takes the driver's place, which must not be there. With a GPU, the other tests run on it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU to run on")


@pytest.fixture
def gpu(monkeypatch):
    shim = Gpus()
    patch_driver(monkeypatch, shim)
    patch_tensors(monkeypatch, shim)
    monkeypatch.setattr(flame, "flame_ext", None)  # its kernels want addresses on a GPU
    with shim:
        yield shim


def test_the_shim_refuses_what_cuda_refuses(gpu):
    x = torch.arange(4.0, device="cuda")
    y = torch.ones(4, device="cuda:1")
    here = torch.ones(4)
    number = torch.tensor(2.0)
    assert x.is_cuda and torch.zeros_like(y).device == y.device == torch.device("cuda:1")
    assert (x * number).tolist() == [0, 2, 4, 6] and x[torch.tensor([3, 1])].tolist() == [3, 1]
    x[here > 0] = here[0]
    assert x.copy_(y).sum().item() == 4 and here.copy_(x).sum() == 4 and not x.cpu().is_cuda
    for refused in (lambda: x + here, lambda: here.add_(x), lambda: number.add_(x[0]), lambda: x @ here,
                    lambda: here[x.long()], lambda: torch.stack([x[0], number]), lambda: x + y,
                    lambda: torch.where(x > 0, x, here), lambda: F.linear(x, here[None]),
                    lambda: x.gather(0, here.long())):
        with pytest.raises(RuntimeError, match="same device"):
            refused()
    for refused in (x.numpy, x.pin_memory, lambda: np.asarray(x)):
        with pytest.raises((RuntimeError, TypeError)):
            refused()
    event = torch.cuda.Event()
    late = torch.empty(4).copy_(x, non_blocking=True)
    event.record()
    assert late.isnan().all()
    event.synchronize()
    assert late.eq(1).all()


# --- the text tower, and the extension's kernels

def kernels(lie=None):
    """In flame_ext's place: its kernels' arguments are looked at, their twins compute; one may lie."""
    def layout(lengths, parents, tile):
        return SimpleNamespace(plan=np.arange(3, dtype=np.int32), lengths=lengths, parents=parents)

    def look(name, stream, *tensors):
        assert all(x.is_cuda for x in tensors if x is not None) and stream == 7
        assert torch.cuda.current_device() == tensors[0].get_device()
        if lie == f"{name} raises":
            raise RuntimeError("no kernel image is available for execution on the device\nand so on")
        used.add(name)
        return lie == name

    def attention(q, k, v, out, layout, scale, plan, stream):
        wrong = look("attention", stream, q, k, v, out, plan)
        forest = flame.Forest(None, None, layout.lengths, layout.parents, None)
        out.copy_(flame.attention_in_stretches(forest, q.device, q.shape[1] // k.shape[1])(q, k, v))
        if wrong:
            out[64:128].zero_()  # a tile is lost

    def rope(qkv, cos, sin, heads, stream):
        wrong = look("rope", stream, qkv, cos, sin)
        flame.rope(qkv, cos, sin, heads - wrong)  # the last head is not turned

    def rmsnorm(x, weight, out, eps, update, stream):
        wrong = look("rmsnorm", stream, x, weight, out, update)
        out.copy_(flame.add_and_norm(x, None if wrong else update, weight, eps, out.dtype))

    def swiglu(gate_up, out, stream):
        wrong = look("swiglu", stream, gate_up, out)
        out.copy_(flame.swiglu(gate_up))
        if wrong:
            out[-1].fill_(torch.nan)

    used = set()
    return SimpleNamespace(cuda=lie != "built without CUDA", layout=layout, attention=attention, rope=rope,
                           rmsnorm=rmsnorm, swiglu=swiglu, used=used)


@pytest.mark.parametrize("family, device, native", [
    ("Llama", "cuda", False), ("Llama", "cuda:1", True), ("Qwen3", "cuda", True)])
def test_states_on_a_gpu_are_those_on_the_cpu(gpu, make_random_llm, monkeypatch, family, device, native):
    """Without a warning; in packed rows of more than one stretch."""
    llm = make_random_llm(family, **{"head_dim": 12} if family == "Qwen3" else {})
    expected = flame.TextEncoder(llm, dtype=torch.float32).encode(CAPTIONS)
    extension = kernels()
    monkeypatch.setattr(flame, "flame_ext", extension if native else None)
    monkeypatch.setitem(flame.STRETCH, "cuda", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = flame.TextEncoder(llm, device, torch.float32)
    assert encoder.kernels == ("flame_ext" if native else "PyTorch")
    assert centered_error(encoder.encode(CAPTIONS), expected) <= 1e-5
    assert extension.used == ({"attention", "rope", "rmsnorm", "swiglu"} if native else set())


@functools.cache
def captions_and_states(llm, dtype):
    """A forest, and what the real LLM's first blocks give on the CPU, by the twins."""
    forest = flame.caption_forest(*flame.tokenize(flame.load_tokenizer(llm), CAPTIONS[:3], "long"))
    decoder = flame.load_decoder(llm, 2, "cpu", dtype)._replace(kernels=flame.TWINS)
    return forest, flame.decode(decoder, forest)


DIFFERS = "its states differ from the twins' by "
LIES = ("attention", DIFFERS), ("rope", DIFFERS), ("rmsnorm", DIFFERS), ("swiglu", DIFFERS + "nan%")


@pytest.mark.parametrize("lie, changes, why, dtype", [
    *((lie, {}, why, dtype) for lie, why in LIES for dtype in (torch.float32, torch.bfloat16)),
    ("rmsnorm raises", {}, "no kernel image is available", torch.bfloat16),
    (None, {"major": 7, "minor": 5}, "compute capability below 8.0", torch.bfloat16),
    ("built without CUDA", {}, "it was built without CUDA", torch.bfloat16)], ids=str)
def test_kernels_that_cannot_be_trusted_are_one_warning(gpu, llm, monkeypatch, lie, changes, why, dtype):
    """On the real LLM's first blocks: the twins run, and give what they give on the CPU."""
    vars(gpu.properties).update(changes)
    forest, expected = captions_and_states(llm, dtype)
    monkeypatch.setattr(flame, "flame_ext", kernels(lie))
    monkeypatch.setitem(flame.STRETCH, "cuda", flame.STRETCH["cpu"])  # so that both round alike
    with pytest.warns(UserWarning) as caught:
        decoder = flame.load_decoder(llm, 2, "cuda:1", dtype)
    assert len(caught) == 1 and decoder.kernels is flame.TWINS
    told = str(caught[0].message)
    assert told.startswith(f"cuda:1: PyTorch runs in place of flame_ext: {why}") and "\n" not in told
    torch.testing.assert_close(flame.decode(decoder, forest).cpu(), expected)


def test_the_dtype_by_default(gpu):
    assert flame.default_dtype("cuda") == torch.bfloat16
    gpu.properties.major, gpu.properties.minor = 7, 5
    assert flame.default_dtype("cuda:1") == torch.float16


# --- the stages, each by its main([...])

SMALL = ("--embeddings store --preset demo --image-size 16 --patch-size 8 --width 32 --layers 1 --heads 2 "
         "--batch 12 --workers 0 --steps 6").split()


def stage(name, *flags, code=0):
    """Runs a stage in this process."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, flags)]):
        try:
            returned = importlib.import_module(name).main()
        except SystemExit as error:
            returned = error.code
    assert (returned or 0) == code


@pytest.fixture
def here(world, byte_llm, monkeypatch):
    """That folder. Both devices compute alike: in float32, in equal packed rows and stretches."""
    monkeypatch.chdir(world[0])
    monkeypatch.setenv("FLAME_LLM", str(byte_llm))
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(flame, "BUDGET", {"cpu": 2048, "cuda": 2048})
    monkeypatch.setitem(flame.STRETCH, "cuda", flame.STRETCH["cpu"])


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_store_made_on_the_gpu(here, gpu, tmp_path, monkeypatch, device):
    """The same bytes as on the CPU; of a copy that nobody waits for they would not be."""
    monkeypatch.setattr(importlib.import_module("embed"), "WINDOW", {"cpu": 5, "cuda": 5})
    made = {}
    for where in ("cpu", device):
        out = tmp_path / where.replace(":", "-")
        stage("embed", "--captions", "captions.tsv", "--out", out, "--device", where, "--dtype", "float32")
        made[where] = {path.name: path.read_bytes() for path in out.glob("*.npy")}
    assert made["cpu"] == made[device] and len(made[device]) == 3


@pytest.mark.parametrize("device, flags", [
    ("cuda", "--loss sigmoid --text-projection none+linear"),
    ("cuda:1", "--loss infonce --chunk 5 --text-projection agree+linear")])
def test_training_on_the_gpu(here, gpu, device, flags):
    """The same losses as on the CPU."""
    logs = []
    for where in ("cpu", device):
        stage("train", "--name", f"on-{where}", "--device", where, "--overwrite", *SMALL, *flags.split())
        entries = map(json.loads, Path("out", f"on-{where}", "log.jsonl").read_text().splitlines())
        logs.append([entry["loss"] for entry in entries])
    np.testing.assert_allclose(*logs, rtol=1e-4)


def test_training_in_bfloat16_on_the_gpu(here, gpu, monkeypatch):
    """autocast, batches pinned by the loader's thread; near what float32 says."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(flame, "default_dtype", lambda device: dtype)
        stage("train", "--name", str(dtype), "--device", "cuda", *SMALL, "--workers", "1")
        entries = Path("out", str(dtype), "log.jsonl").read_text().splitlines()
        losses.append([json.loads(entry)["loss"] for entry in entries])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("flags", ["--checkpoint out/done --facets", "--open-clip {}"])
def test_the_same_figures_on_the_gpu(here, small_clip, gpu, tmp_path, flags):
    results = []
    for device, out in (("cpu", tmp_path / "cpu"), ("cuda:1", tmp_path / "gpu")):
        flags = flags.format(small_clip)
        stage("evaluate", "--captions", "captions.tsv", "--device", device, "--out", out, *flags.split())
        results += [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert results[0] == results[1] and len(results) == 2


@pytest.mark.parametrize("name, flags", [
    ("embed", ["--captions", "captions.tsv", "--out", "full"]), ("train", ["--name", "full", *SMALL]),
    ("evaluate", ["--captions", "captions.tsv", "--checkpoint", "out/done", "--out", "full"])])
def test_a_full_gpu_is_one_line(here, gpu, capsys, name, flags):
    gpu.room = 1000
    stage(name, *flags, "--device", "cuda", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in line and (name != "train" or "--chunk" in line)
