"""Tests of the code paths that only run on a GPU, on two simulated ones (cuda_shim.py). This file must be run
last: other libraries remember the simulated GPUs that they have seen.
"""
# ruff: noqa: F811  (the fixture imported from test_refusals.py is also a parameter)
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

import flame
from conftest import CAPTIONS, centered_error
from cuda_shim import Gpus, patch_driver, patch_tensors
from data import common
from test_refusals import world  # noqa: F401  a folder with images, captions, a store, a checkpoint

# The shim replaces the driver. On a machine with a GPU, tests/gpu.py runs the other tests on it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is available")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(flame, "flame_ext", None)  # its kernels need real GPU addresses
    with Gpus() as shim:
        patch_driver(monkeypatch, shim)
        patch_tensors(monkeypatch, shim)
        yield shim


# --- the text tower, and the extension's kernels

def fake_extension(fault=None):
    """Return a flame_ext that checks its arguments and computes with PyTorch's kernels. fault: a kernel with
    wrong results, "NAME raises" or "built without CUDA".
    """
    def layout(lengths, parents, tile):
        return SimpleNamespace(plan=np.arange(3, dtype=np.int32), lengths=lengths, parents=parents)

    def check(name, stream, *tensors):
        assert all(x.is_cuda for x in tensors if x is not None) and stream == 7
        assert torch.cuda.current_device() == tensors[0].get_device()
        if fault == f"{name} raises":
            raise RuntimeError("no kernel image is available for execution on the device\nmore lines")
        used.add(name)
        return fault == name

    def attention(q, k, v, out, layout, scale, plan, stream):
        wrong = check("attention", stream, q, k, v, out, plan)
        forest = flame.Forest(None, None, layout.lengths, layout.parents, None)
        out.copy_(flame.chunked_attention(forest, q.device, q.shape[1] // k.shape[1])(q, k, v))
        if wrong:
            out[64:128].zero_()  # one tile

    def rope(qkv, cos, sin, heads, stream):
        wrong = check("rope", stream, qkv, cos, sin)
        flame.rope(qkv, cos, sin, heads - wrong)  # does not rotate the last head

    def rmsnorm(x, weight, out, eps, update, stream):
        wrong = check("rmsnorm", stream, x, weight, out, update)
        out.copy_(flame.add_and_norm(x, None if wrong else update, weight, eps, out.dtype))

    def swiglu(gate_up, out, stream):
        wrong = check("swiglu", stream, gate_up, out)
        out.copy_(flame.swiglu(gate_up))
        if wrong:
            out[-1].fill_(torch.nan)

    used = set()
    return SimpleNamespace(cuda=fault != "built without CUDA", layout=layout, attention=attention, rope=rope,
                           rmsnorm=rmsnorm, swiglu=swiglu, used=used)


@pytest.mark.parametrize("family, device, use_ext", [
    ("Llama", "cuda", False), ("Llama", "cuda:1", True), ("Qwen3", "cuda", True)])
def test_states_equal_the_cpus(gpu, make_random_llm, monkeypatch, family, device, use_ext):
    """Without a warning, and with several query chunks per packed row."""
    llm = make_random_llm(family, **{"head_dim": 12} if family == "Qwen3" else {})
    expected = flame.TextEncoder(llm, dtype=torch.float32).encode(CAPTIONS)
    extension = fake_extension()
    monkeypatch.setattr(flame, "flame_ext", extension if use_ext else None)
    monkeypatch.setitem(flame.QUERY_CHUNK, "cuda", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = flame.TextEncoder(llm, device, torch.float32)
    assert encoder.kernels == ("flame_ext" if use_ext else "PyTorch")
    assert centered_error(encoder.encode(CAPTIONS), expected) <= 1e-5
    assert extension.used == ({"attention", "rope", "rmsnorm", "swiglu"} if use_ext else set())


@functools.cache
def forest_and_states(llm, dtype):
    """Return a forest and its states on the CPU, from the real LLM's first layers and PyTorch's kernels."""
    forest = flame.caption_forest(*flame.tokenize(flame.load_tokenizer(llm), CAPTIONS[:3], "long"))
    decoder = flame.load_decoder(llm, 2, "cpu", dtype)._replace(kernels=flame.TORCH_KERNELS)
    return forest, flame.hidden_states(decoder, forest)


DIFFERS = "its states differ from PyTorch's by "
WRONG = ("attention", DIFFERS), ("rope", DIFFERS), ("rmsnorm", DIFFERS), ("swiglu", DIFFERS + "nan%")


@pytest.mark.parametrize("fault, properties, reason, dtype", [
    *((fault, {}, reason, dtype) for fault, reason in WRONG for dtype in (torch.float32, torch.bfloat16)),
    ("rmsnorm raises", {}, "no kernel image is available", torch.bfloat16),
    (None, {"major": 7, "minor": 5}, "compute capability below 8.0", torch.bfloat16),
    ("built without CUDA", {}, "it was built without CUDA", torch.bfloat16)], ids=str)
def test_faulty_kernels_give_one_warning(gpu, llm, monkeypatch, fault, properties, reason, dtype):
    """Then PyTorch's kernels are used, and the real LLM's first layers give the same states as on the CPU."""
    vars(gpu.properties).update(properties)
    forest, expected = forest_and_states(llm, dtype)
    monkeypatch.setattr(flame, "flame_ext", fake_extension(fault))
    monkeypatch.setitem(flame.QUERY_CHUNK, "cuda", flame.QUERY_CHUNK["cpu"])  # for the same rounding
    with pytest.warns(UserWarning) as caught:
        decoder = flame.load_decoder(llm, 2, "cuda:1", dtype)
    assert len(caught) == 1 and decoder.kernels is flame.TORCH_KERNELS
    message = str(caught[0].message)
    assert message.startswith(f"cuda:1: using PyTorch instead of flame_ext: {reason}") and "\n" not in message
    torch.testing.assert_close(flame.hidden_states(decoder, forest).cpu(), expected)


def test_default_dtype(gpu):
    assert common.default_dtype("cuda") == torch.bfloat16
    gpu.properties.major, gpu.properties.minor = 7, 5
    assert common.default_dtype("cuda:1") == torch.float16


# --- the stages' main()

SMALL = ("--embeddings store --preset demo --image-size 16 --patch-size 8 --width 32 --layers 1 --heads 2 "
         "--batch 12 --workers 0 --steps 6").split()


def run_stage(name, *flags, code=0):
    """Run a stage in this process."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, flags)]):
        try:
            returned = importlib.import_module(name).main()
        except SystemExit as error:
            returned = error.code
    assert (returned or 0) == code


@pytest.fixture
def folder(world, byte_llm, monkeypatch):  # float32, equal packed rows and query chunks on both devices
    monkeypatch.chdir(world[0])
    monkeypatch.setenv("FLAME_LLM", str(byte_llm))
    monkeypatch.setattr(common, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(flame, "MAX_TOKENS", {"cpu": 2048, "cuda": 2048})
    monkeypatch.setitem(flame.QUERY_CHUNK, "cuda", flame.QUERY_CHUNK["cpu"])


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_store_equals_the_cpus(folder, gpu, tmp_path, monkeypatch, device):
    """The bytes would differ if embed.py did not wait for a copy."""
    monkeypatch.setattr(importlib.import_module("embed"), "SHARD_SIZE", {"cpu": 5, "cuda": 5})
    shards = {}
    for name in ("cpu", device):
        out = tmp_path / name.replace(":", "-")
        run_stage("embed", "--captions", "captions.tsv", "--out", out, "--device", name, "--dtype", "float32")
        shards[name] = {path.name: path.read_bytes() for path in out.glob("*.npy")}
    assert shards["cpu"] == shards[device] and len(shards[device]) == 3


@pytest.mark.parametrize("device, flags", [
    ("cuda", "--loss sigmoid --text-projection none+linear"),
    ("cuda:1", "--loss infonce --micro-batch 5 --text-projection agree+linear")])
def test_losses_equal_the_cpus(folder, gpu, device, flags):
    logs = []
    for name in ("cpu", device):
        run_stage("train", "--name", f"on-{name}", "--device", name, "--overwrite", *SMALL, *flags.split())
        entries = map(json.loads, Path("out", f"on-{name}", "log.jsonl").read_text().splitlines())
        logs.append([entry["loss"] for entry in entries])
    np.testing.assert_allclose(*logs, rtol=1e-4)


def test_bfloat16_losses_are_close_to_float32(folder, gpu, monkeypatch):
    """With autocast, and batches pinned in the loader's thread."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(common, "default_dtype", lambda device: dtype)
        run_stage("train", "--name", str(dtype), "--device", "cuda", *SMALL, "--workers", "1")
        entries = Path("out", str(dtype), "log.jsonl").read_text().splitlines()
        losses.append([json.loads(entry)["loss"] for entry in entries])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("flags", ["--checkpoint out/done", "--open-clip {}"])
def test_scores_equal_the_cpus(folder, small_clip, gpu, tmp_path, flags):
    results = []
    for device, out in (("cpu", tmp_path / "cpu"), ("cuda:1", tmp_path / "gpu")):
        flags = flags.format(small_clip)
        run_stage("evaluate", "--captions", "captions.tsv", "--device", device, "--out", out, *flags.split())
        results += [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert results[0] == results[1] and len(results) == 2


@pytest.mark.parametrize("name, flags", [
    ("embed", ["--captions", "captions.tsv", "--out", "full"]), ("train", ["--name", "full", *SMALL]),
    ("evaluate", ["--captions", "captions.tsv", "--checkpoint", "out/done", "--out", "full"])])
def test_out_of_memory_is_one_line(folder, gpu, capsys, name, flags):
    gpu.room = 1000
    run_stage(name, *flags, "--device", "cuda", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    # evaluate.py runs out in flame.load: the shim takes meta tensors for tensors on the GPU.
    assert ("CUDA out of memory" if name == "evaluate" else "out of GPU memory") in line
    assert name != "train" or "--micro-batch" in line
