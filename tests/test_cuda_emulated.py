"""Every CUDA kernel, thread by thread on the CPU (tests/emulator), against the rule: results, races, bounds.

    pytest tests/test_cuda_emulated.py

What it cannot show: rounding inside the tensor cores, the precision of special functions, time.
"""
import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from emulator.translate import translate
from test_ext import (DTYPES, ROPE, ROWS, assert_attention, check_rmsnorm, check_rope, check_swiglu, dense,
                      random_qkv)

TESTS = Path(__file__).resolve().parent
SOURCE = (TESTS.parent / "ext/cuda.cu").read_text()

# lengths, parents
FORESTS = {
    "one token": ([1], [-1]),
    "nothing": ([0, 0], [-1, 0]),
    "a block's edge": ([64, 64], [-1, 0]),
    "captions": ([8, 70, 5, 3, 9, 4, 90, 5, 3, 9, 4, 59], [-1, 0, 1, 2, 2, 1, 0, 6, 7, 7, 6, -1]),
    "roots": ([3] * 45, [-1] * 45),
    "a chain": ([2, 1, 0] * 20, list(range(-1, 59))),
    "nothing seen at first": ([150, 2, 3, 66, 1], [-1] * 5),
    "not depth first": ([20, 65, 9, 30, 7, 12, 40], [-1, 0, 0, 1, 2, 1, -1]),
}


def build(folder, source):
    """-> the kernels as a library, every load and store looked at, without the sanitizer's own library."""
    (folder / "cuda.cpp").write_text(translate(source))
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", f'-DCUDA_CPP="{folder}/cuda.cpp"',
               f"-I{TESTS}/emulator", f"-I{TESTS.parent}/ext", "-c", "-o"]
    objects = [folder / "kernels.o", folder / "forest.o"]
    subprocess.run([*command, objects[0], "-fsanitize=thread", TESTS / "emulator/kernels.cpp"], check=True)
    subprocess.run([*command, objects[1], TESTS.parent / "ext/forest.cpp"], check=True)
    subprocess.run(["g++", "-shared", "-o", folder / "kernels.so", *objects], check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    for function in (library.attention, library.mask, library.rope, library.rmsnorm, library.swiglu):
        function.restype = ctypes.c_char_p
    library.error_left.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("kernels"), SOURCE)


def pointer(array):
    if array is None:
        return None
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


def emulated(function):
    """-> call(*arguments), which raises AssertionError where it finds anything; sizes as int64."""
    def call(*args):
        kinds = {int: ctypes.c_int64, float: ctypes.c_float, bool: ctypes.c_bool}
        wrong = function(*(kinds[type(x)](x) if type(x) in kinds else pointer(x) for x in args))
        assert not wrong, wrong.decode()
    return call


def attend(kernels, forest, tile, heads, kv_heads, dim, dtype, gap, seed):
    """Runs a kernel on random numbers; AssertionError says what was found, or that the result is wrong."""
    visible, segment, _ = dense(*forest)
    q, k, v = random_qkv(len(segment), heads, kv_heads, dim, dtype, seed, gap)
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    strides = np.array([x.stride(0) for x in (q, k, v, out)])
    lengths, parents = (np.array(x, np.int64) for x in forest)
    emulated(kernels.attention)(len(lengths), lengths, parents, tile, q, k, v, out, strides,
                                heads, kv_heads, dim, dim ** -0.5, dtype == torch.bfloat16, seed)
    assert_attention(out, q, k, v, visible, dim ** -0.5)


def elementwise(kernels, seed):
    """-> rope, rmsnorm and swiglu, called as flame_ext's are."""
    def rope(qkv, cos, sin, heads):
        T, all_heads, dim = qkv.shape
        emulated(kernels.rope)(qkv, T, qkv.stride(0), all_heads * dim, heads, dim, cos, sin,
                               qkv.dtype == torch.bfloat16, seed)

    def rmsnorm(x, weight, out, eps, update):
        emulated(kernels.rmsnorm)(x, weight, out, eps, update, *x.shape, out.dtype == torch.bfloat16, seed)

    def swiglu(gate_up, out):
        emulated(kernels.swiglu)(gate_up, out, *out.shape, out.dtype == torch.bfloat16, seed)
    return rope, rmsnorm, swiglu


@pytest.mark.parametrize("dim, heads, kv_heads", [(64, 9, 3), (128, 4, 1)])
@pytest.mark.parametrize("name", FORESTS)
def test_attention_on_tensor_cores(kernels, name, dim, heads, kv_heads):
    attend(kernels, FORESTS[name], 64 * kv_heads // heads, heads, kv_heads, dim, torch.bfloat16, 8, seed=0)


@pytest.mark.parametrize("dim, dtype, tile", [
    (40, torch.bfloat16, 32), (64, torch.float32, 32), (64, torch.bfloat16, 64)])
def test_plain_attention_takes_the_rest(kernels, dim, dtype, tile):
    attend(kernels, ([9, 20, 3, 5, 0, 4], [-1, 0, 1, 1, 0, 4]), tile, 4, 2, dim, dtype, 3, seed=0)


@pytest.mark.parametrize("name", FORESTS)
def test_mask(kernels, name):
    visible, segment, _ = dense(*FORESTS[name])
    out = np.full((len(segment), len(segment) + 3), 7, np.uint8)
    lengths, parents = (np.array(x, np.int64) for x in FORESTS[name])
    emulated(kernels.mask)(len(lengths), lengths, parents, out, out.shape[1], 0)
    assert (out[:, :-3] == visible).all() and (out[:, -3:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rmsnorm_swiglu(kernels, dtype):
    """Rows that allow 16 bytes at once, and odd ones; one row; rows that lie apart."""
    torch.manual_seed(0)
    for seed, sizes in enumerate(ROPE):
        check_rope(elementwise(kernels, seed)[0], dtype, *sizes)
    for seed, sizes in enumerate(ROWS):
        _, rmsnorm, swiglu = elementwise(kernels, seed)
        check_rmsnorm(rmsnorm, dtype, *sizes)
        check_swiglu(swiglu, dtype, *sizes)


def test_an_error_of_cuda_is_told_once(kernels):
    """A row that is too long for shared memory: nothing is written, and no later call hears of it."""
    x, weight = torch.ones(1, 60_000), torch.ones(60_000)
    out = torch.zeros(x.shape)
    with pytest.raises(AssertionError, match="CUDA: rmsnorm failed: invalid argument"):
        elementwise(kernels, 0)[1](x, weight, out, 1e-5, x)
    assert x.eq(1).all() and out.eq(0).all() and not kernels.error_left()


@pytest.mark.parametrize("right, wrong, found", [
    ("__syncthreads();  // the next keys", "// the next keys", "race|never written"),
    ("__syncthreads();  // this block has", "// this block has", "race|in flight"),
    ("__syncthreads();  // Q has", "// Q has", "race|in flight"),
    ("more) wait_for_copies<1>()", "more) wait_for_copies<2>()", "in flight"),
    ("wait_for_copies<0>()", "wait_for_copies<1>()", "in flight"),
    ("block % 3", "block % 2", "race"),
    ("(chunk ^ (row & 7))", "chunk", "bank conflicts"),
    ("if (row >= rows) return;", "", "race|outside"),
])
def test_mistakes_in_attention_are_noticed(tmp_path, right, wrong, found):
    assert right in SOURCE
    mistaken = build(tmp_path, SOURCE.replace(right, wrong))
    with pytest.raises(AssertionError, match=found):
        attend(mistaken, FORESTS["captions"], 32, 2, 1, 64, torch.bfloat16, 8, seed=0)


def test_mistakes_in_elementwise_kernels_are_noticed(tmp_path):
    source = SOURCE
    for right, wrong in [
        ("put<N>(at + half, y)", "put<N>(at + N, y)"),  # rope's threads meet
        ("__syncthreads();  // the warps' sums", "// the warps' sums"),
        ("i < g.width; i += THREADS * N", "i < g.width; i += THREADS"),  # swiglu's meet
    ]:
        assert right in source
        source = source.replace(right, wrong)
    rope, rmsnorm, swiglu = elementwise(build(tmp_path, source), 0)
    with pytest.raises(AssertionError, match="race"):
        check_rope(rope, torch.bfloat16, 2, 2, 64)
    with pytest.raises(AssertionError, match="race|never written"):
        check_rmsnorm(rmsnorm, torch.bfloat16, 2, 576)
    with pytest.raises(AssertionError, match="race"):
        check_swiglu(swiglu, torch.bfloat16, 2, 2048)
