"""Tests of the kernels in ext/, against slow reference implementations: the CPU kernels with each instruction
set of this CPU, the CUDA kernels on an emulator (emulator/) and on a GPU if there is one. The emulator also
finds races, bad addresses and bank conflicts, but not rounding in tensor cores.
"""
import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flame_ext
from emulator.translate import translate

TESTS = Path(__file__).resolve().parent
CUDA_SOURCE = TESTS.parent / "ext/cuda.cu"
BEST_SIMD = flame_ext.simd()
DTYPES = [torch.float32, torch.bfloat16]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def supported(name):
    try:
        return flame_ext.simd(name) == name
    except ValueError:
        return False
    finally:
        flame_ext.simd(BEST_SIMD)


@pytest.fixture(params=[name for name in ("avx2", "avx512_bf16", "avx512_amx") if supported(name)])
def simd(request):
    yield flame_ext.simd(request.param)
    flame_ext.simd(BEST_SIMD)


# ---- Reference implementations ----------------------------------------------------------------------------

def dense_rule(lengths, parents):
    """Return visible bool [T, T], segment [T], depth [T]."""
    ancestor = np.eye(len(lengths), dtype=bool)  # including the segment itself
    ends = {-1: 0}  # depth at which a segment's children begin
    depths = [np.zeros(0, int)]
    for s, (length, parent) in enumerate(zip(lengths, parents)):
        if parent >= 0:
            ancestor[s] |= ancestor[parent]
        depths.append(ends[parent] + np.arange(length))
        ends[s] = ends[parent] + length
    segment, depth = np.repeat(np.arange(len(lengths)), lengths), np.concatenate(depths)
    return ancestor[segment][:, segment] & (depth[None, :] <= depth[:, None]), segment, depth


def reference_attention(q, k, v, visible, scale):
    """Return the float64 result [T, H, d], and sum(p |v|), which bounds the error from rounding p."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    p = scores.masked_fill(~torch.from_numpy(visible), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v), torch.einsum("hqk,khd->qhd", p, v.abs())


def assert_attention(out, q, k, v, visible, scale):
    expected, magnitude = reference_attention(q, k, v, visible, scale)
    if out.dtype == torch.float32:
        bound = 1e-5 * expected.abs().amax() if len(expected) else 0
    else:  # p and the result are rounded to 8 bits, by at most 2^-8 each; 10% more for the approximate 2^x
        bound = 1.1 * 2 ** -7 * magnitude
    assert ((out.double() - expected).abs() <= bound).all()


@st.composite
def forests(draw):
    """Draw lengths, parents in depth-first order: empty segments, single tokens, about a block of keys."""
    lengths, parents = [], []
    path = [-1]  # possible parents of the next segment
    for s in range(draw(st.integers(1, 12))):
        path = path[:draw(st.integers(1, len(path)))]
        lengths.append(draw(st.one_of(st.integers(0, 9), st.integers(60, 100))))
        parents.append(path[-1])
        path.append(s)
    return lengths, parents


def random_qkv(T, heads, kv_heads, dim, dtype, seed, gap=0):
    """Return q [T, H, d], k, v [T, Hkv, d], views of a fused buffer with `gap` unused elements per token."""
    row = (heads + 2 * kv_heads) * dim
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(T, row + gap, generator=generator).to(dtype)[:, :row].unflatten(1, (-1, dim))
    qkv[:, :heads] *= 2
    return qkv.split((heads, kv_heads, kv_heads), dim=1)


# ---- Layout, mask, attention on the CPU -------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(forests())
def test_layout_and_mask_follow_the_visibility_rule(forest):
    layout = flame_ext.layout(forest[0], np.array(forest[1], np.int64))
    visible, segment, depth = dense_rule(*forest)
    first, last, depths = layout.plan[:3 * len(segment)].reshape(-1, 3).T
    assert (first == segment).all() and (depths == depth).all()
    descends = (first[None, :] <= first[:, None]) & (first[:, None] <= last[None, :])
    assert (descends & (depth[None, :] <= depth[:, None]) == visible).all()
    mask = torch.zeros(visible.shape, dtype=torch.bool)
    flame_ext.mask(layout, mask)
    assert (mask.numpy() == visible).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_softmax_over_visible_keys(simd, dtype):
    @settings(max_examples=30, deadline=None)
    @given(
        forest=forests(),
        heads=st.sampled_from([(1, 1), (1, 4), (2, 1), (3, 3), (1, 7), (2, 2)]),
        dim=st.sampled_from([64, 128, 8, 24, 40, 256, 5, 33]),
        seed=st.integers(0, 2 ** 32),
        gap=st.sampled_from([0, 1, 8]),
        tile=st.sampled_from([64, 1, 5, 200]),
    )
    def check(forest, heads, dim, seed, gap, tile):
        visible, segment, _ = dense_rule(*forest)
        kv_heads, group_size = heads
        q, k, v = random_qkv(len(segment), kv_heads * group_size, kv_heads, dim, dtype, seed, gap)
        buffer = torch.full((len(segment), 2, kv_heads * group_size, dim), torch.nan, dtype=dtype)
        flame_ext.attention(q, k, v, buffer[:, 0], flame_ext.layout(*forest, tile), dim ** -0.5)
        assert_attention(buffer[:, 0], q, k, v, visible, dim ** -0.5)
        assert buffer[:, 1].isnan().all()
    check()


def test_online_softmax_with_very_different_scores(simd):
    """The running maximum grows by hundreds. It must not overflow, and earlier keys must vanish."""
    q, k, v = random_qkv(400, 2, 1, 64, torch.float32, 0)
    k = k * torch.linspace(0, 100, 400)[:, None, None]
    out = torch.empty(q.shape)
    flame_ext.attention(q, k, v, out, flame_ext.layout([150, 250], [-1, 0]), 1.0)
    expected, _ = reference_attention(q, k, v, np.tri(400, dtype=bool), 1.0)
    # float32 represents a score of 1e4 with an error of 1e-3.
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_threads(dtype):
    lengths, parents = [7], [-1]
    for caption in range(1, 25, 4):
        lengths += [80, 9, 5, 12]
        parents += [0, caption, caption, caption + 2]
    layout = flame_ext.layout(lengths, parents)
    q, k, v = random_qkv(sum(lengths), 6, 2, 64, dtype, 0)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.empty(q.shape, dtype=dtype))
        flame_ext.attention(q, k, v, results[-1], layout, 0.125)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_attention_does_not_depend_on_the_rest_of_the_batch():
    """One of two captions that share a root gives the same without the other one."""
    q, k, v = random_qkv(203, 4, 2, 64, torch.float32, 0)
    layout = flame_ext.layout([6, 30, 50, 100, 9, 8], [-1, 0, 1, 0, 3, 3])
    both = torch.empty(q.shape)
    flame_ext.attention(q, k, v, both, layout, 0.125)
    kept = torch.from_numpy(np.isin(np.repeat(range(6), [6, 30, 50, 100, 9, 8]), [0, 3, 4, 5]))
    single = torch.empty(123, 4, 64)
    layout = flame_ext.layout([6, 100, 9, 8], [-1, 0, 1, 1])
    flame_ext.attention(q[kept], k[kept], v[kept], single, layout, 0.125)
    assert (both[kept] - single).abs().max() < 1e-6 * single.abs().max()


def test_attention_memory_is_linear():
    """16,384 tokens, a caption of 4,000 and many of 200. T x T bytes would be 256 MiB."""
    def mib(line):
        return int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    lengths, parents = [4084], [-1]
    for caption in range(1, 124, 2):
        lengths += [150, 50]
        parents += [-1, caption]
    layout = flame_ext.layout(lengths, parents)
    q, k, v = random_qkv(sum(lengths), 1, 1, 16, torch.float32, 0)
    out = torch.zeros(q.shape)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = mib("VmRSS")
    flame_ext.attention(q, k, v, out, layout, 0.25)
    assert mib("VmHWM") - before < 32


# ---- RoPE, RMSNorm, SwiGLU --------------------------------------------------------------------------------

def assert_close(result, expected, magnitude=None):
    """Allow half a unit of bfloat16's last place, and 2^-12 before rounding, relative to the magnitude."""
    tolerance = 1e-5 if result.dtype == torch.float32 else 2 ** -8 + 2 ** -12
    magnitude = expected.abs() if magnitude is None else magnitude
    assert ((result.double() - expected).abs() <= tolerance * magnitude + 1e-5).all()


def check_rope(kernels, dtype, T, heads, dim, gap=0):
    """Pairs (i, i + d/2) rotate like complex numbers. The last head and the gap don't change."""
    qkv = torch.randn(T, heads * dim + gap).to(dtype)
    before = qkv.clone()
    angle = torch.rand(T, dim // 2) * 6
    kernels.rope(qkv[:, :heads * dim].unflatten(1, (heads, dim)), angle.cos(), angle.sin(), heads - 1)
    rest = (heads - 1) * dim
    pairs = before[:, :rest].double().view(T, heads - 1, 2, dim // 2)
    factor = torch.polar(torch.ones(T, 1, dim // 2).double(), angle[:, None].double())
    rotated = torch.complex(pairs[:, :, 0], pairs[:, :, 1]) * factor
    expected = torch.stack([rotated.real, rotated.imag], 2)
    assert_close(qkv[:, :rest].view(expected.shape), expected, rotated.abs()[:, :, None])
    assert torch.equal(qkv[:, rest:], before[:, rest:])


def check_rmsnorm(kernels, dtype, T, width):
    x, weight, delta = torch.randn(T, width), torch.rand(width), torch.randn(T, width).to(dtype)
    for update in (None, delta):
        stream, out = x.clone(), torch.empty(T, width, dtype=dtype)
        kernels.rmsnorm(stream, weight, out, 1e-5, update)
        y = x if update is None else x + delta.float()
        assert torch.equal(stream, y)
        assert_close(out, torch.nn.functional.rms_norm(y.double(), (width,), weight.double(), 1e-5))


def check_swiglu(kernels, dtype, T, width):
    gate_up, out = (torch.randn(T, 2 * width) * 20).to(dtype), torch.empty(T, width, dtype=dtype)
    gate_up[0, 0] = -200  # e^200 overflows float32
    kernels.swiglu(gate_up, out)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rmsnorm_swiglu_equal_their_formulas(simd, dtype):
    torch.manual_seed(0)
    for sizes in [(70, 5, 64), (3, 2, 6), (9, 3, 32, 8), (9, 3, 32, 3), (1, 4, 128), (0, 2, 8)]:
        check_rope(flame_ext, dtype, *sizes)
    for sizes in [(70, 576), (1, 7), (3, 2056), (5, 1001)]:
        check_rmsnorm(flame_ext, dtype, *sizes)
        check_swiglu(flame_ext, dtype, *sizes)


def test_swiglu_keeps_nan(simd):
    for dtype in DTYPES:
        x = torch.full((1, 2 * 37), torch.nan, dtype=dtype)
        out = torch.zeros(1, 37, dtype=dtype)
        flame_ext.swiglu(x, out)
        assert out.isnan().all()


# ---- Invalid arguments ------------------------------------------------------------------------------------

LAYOUT = flame_ext.layout([2, 3], [-1, 0])
ZEROS = torch.zeros(5, 4, 8)


def attention(q=ZEROS, k=ZEROS[:, :2], v=None, out=None):
    flame_ext.attention(q, k, k if v is None else v, torch.zeros_like(q) if out is None else out, LAYOUT, 1.0)


@pytest.mark.parametrize("call, error, message", [
    (lambda: flame_ext.layout([1, 2], [-1]), ValueError, "as many lengths as parents"),
    (lambda: flame_ext.layout([1, -2], [-1, 0]), ValueError, "segment 1"),
    (lambda: flame_ext.layout([1, 2], [-1, 1]), ValueError, "segment 1"),
    (lambda: flame_ext.layout([1], [-2]), ValueError, "segment 0"),
    (lambda: flame_ext.layout([1, 1, 1], [-1, -1, 0]), ValueError, "segment 2"),
    (lambda: flame_ext.layout([2 ** 31 - 1, 1], [-1, -1]), ValueError, "segment 1"),
    (lambda: flame_ext.layout([1.5], [-1]), TypeError, "incompatible"),
    (lambda: flame_ext.layout([1], [-1], 0), ValueError, "at least 1 query"),
    (lambda: flame_ext.mask(LAYOUT, torch.zeros(5, 4, dtype=torch.bool)), ValueError, "out is torch.bool"),
    (lambda: flame_ext.mask(LAYOUT, torch.zeros(5, 5)), ValueError, "out is torch.float32"),
    (lambda: flame_ext.mask(LAYOUT, torch.zeros(5, 5, dtype=torch.bool).T), ValueError, "contiguous"),
    (lambda: attention(ZEROS[:4]), ValueError, r"q is torch.float32 \[4, 4, 8\].*\[5, -1, -1\]"),
    (lambda: attention(ZEROS[:, 0]), ValueError, "q is"),
    (lambda: attention(ZEROS[:, :3]), ValueError, "must divide q's"),
    (lambda: attention(k=ZEROS[:, :0]), ValueError, "must divide q's"),
    (lambda: attention(k=ZEROS[:, :2, :4].clone()), ValueError, "k is"),
    (lambda: attention(v=ZEROS[:, :1]), ValueError, "v is"),
    (lambda: attention(out=torch.zeros(5, 4, 9)), ValueError, "out is"),
    (lambda: attention(ZEROS.half()), ValueError, "q is torch.float16"),
    (lambda: attention(k=ZEROS[:, :2].bfloat16()), ValueError, "k is torch.bfloat16.*expected torch.float32"),
    (lambda: attention(torch.zeros(5, 8, 4).transpose(1, 2)), ValueError, "q is"),
    (lambda: attention(ZEROS.to("meta"), out=ZEROS), ValueError, "q is .* on meta"),
    (lambda: attention(*[torch.zeros(5, 2, 520)] * 2), ValueError, "at most 512"),
    (lambda: flame_ext.rope(ZEROS, torch.zeros(5, 3), torch.zeros(5, 3), 1), ValueError, "qkv is"),
    (lambda: flame_ext.rope(ZEROS, torch.zeros(5, 4), torch.zeros(5, 4), 5), ValueError, "fewer heads"),
    (lambda: flame_ext.rope(ZEROS, torch.zeros(5, 4).double(), ZEROS, 1), ValueError, "cos is torch.float64"),
    (lambda: flame_ext.rmsnorm(ZEROS[0], torch.zeros(7), ZEROS[0], 0.1), ValueError, "weight is"),
    (lambda: flame_ext.rmsnorm(ZEROS[0], torch.zeros(8), ZEROS[0], 0.1, ZEROS), ValueError, "delta is"),
    (lambda: flame_ext.swiglu(torch.zeros(5, 7), torch.zeros(5, 3)), ValueError, "gate_up is"),
    (lambda: flame_ext.simd("sse9"), ValueError, "sse9"),
])
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- CUDA: on the emulator, and on a GPU if there is one --------------------------------------------------

FORESTS = {  # lengths, parents
    "one token": ([1], [-1]),
    "empty": ([0, 0], [-1, 0]),
    "whole blocks": ([64, 64], [-1, 0]),
    "captions": ([8, 70, 5, 3, 9, 4, 90, 5, 3, 9, 4, 59], [-1, 0, 1, 2, 2, 1, 0, 6, 7, 7, 6, -1]),
    "roots": ([3] * 45, [-1] * 45),
    "chain": ([2, 1, 0] * 20, list(range(-1, 59))),
    "hidden first keys": ([150, 2, 3, 66, 1], [-1] * 5),
    "back to the root": ([20, 65, 30, 12, 9, 7, 40], [-1, 0, 1, 1, 0, 4, -1]),
}


def emulated(folder, source, seed=0):
    """Compile CUDA source for the emulator. Return its kernels; errors raise AssertionError."""
    (folder / "cuda.cpp").write_text(translate(source))
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", f'-DCUDA_CPP="{folder}/cuda.cpp"',
               f"-I{TESTS}/emulator", f"-I{TESTS.parent}/ext", "-c", "-o"]
    objects = [folder / "kernels.o", folder / "forest.o"]
    subprocess.run([*command, objects[0], "-fsanitize=thread", TESTS / "emulator/kernels.cpp"], check=True)
    subprocess.run([*command, objects[1], TESTS.parent / "ext/forest.cpp"], check=True)
    subprocess.run(["g++", "-shared", "-o", folder / "kernels.so", *objects], check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.has_cuda_error.restype = ctypes.c_bool

    def call(name, *args):
        types = {int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}
        function = library[name]
        function.restype = ctypes.c_char_p
        error = function(*(types[type(x)](x) if type(x) in types else
                           ctypes.c_void_p(x.data_ptr()) for x in args), seed)
        assert not error, error.decode()

    def attention(q, k, v, out, forest, tile, scale):
        lengths, parents, strides = map(torch.tensor, (*forest, [x.stride(0) for x in (q, k, v, out)]))
        call("attention", len(lengths), lengths, parents, tile, q, k, v, out, strides,
             q.shape[1], k.shape[1], q.shape[2], scale)

    def rope(qkv, cos, sin, heads):
        T, all_heads, dim = qkv.shape
        call("rope", qkv, T, qkv.stride(0), all_heads * dim, heads, dim, cos, sin)

    def rmsnorm(x, weight, out, eps, update):
        call("rmsnorm", x, weight, out, eps, update, *x.shape)

    def swiglu(gate_up, out):
        call("swiglu", gate_up, out, *out.shape)
    return SimpleNamespace(attention=attention, rope=rope, rmsnorm=rmsnorm, swiglu=swiglu,
                           has_cuda_error=library.has_cuda_error)


def on_gpu():
    """Return flame_ext's CUDA kernels, for tensors on the CPU."""
    def run(function, *args):
        on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
        function(*on_device, stream=torch.cuda.current_stream().cuda_stream)
        for host, device in zip(args, on_device):
            if isinstance(host, torch.Tensor):
                host.copy_(device)

    def attention(q, k, v, out, forest, tile, scale):
        layout = flame_ext.layout(*forest, tile)
        run(flame_ext.attention, q, k, v, out, layout, scale, torch.tensor(layout.plan))
    names = ("rope", "rmsnorm", "swiglu")
    wrapped = {name: lambda *args, f=getattr(flame_ext, name): run(f, *args) for name in names}
    return SimpleNamespace(attention=attention, **wrapped)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("kernels"), CUDA_SOURCE.read_text())


@pytest.fixture(scope="module", params=["emulator", pytest.param("GPU", marks=GPU)])
def cuda(request, emulator):
    return on_gpu() if request.param == "GPU" else emulator


def check_attention(kernels, name, dim, heads, kv_heads):
    visible, segment, _ = dense_rule(*FORESTS[name])
    q, k, v = random_qkv(len(segment), heads, kv_heads, dim, torch.bfloat16, 0, gap=8)
    out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16)
    kernels.attention(q, k, v, out, FORESTS[name], max(1, 64 * kv_heads // heads), dim ** -0.5)
    assert_attention(out, q, k, v, visible, dim ** -0.5)


@pytest.mark.parametrize("dim, heads, kv_heads", [(64, 9, 3), (128, 4, 1)])
@pytest.mark.parametrize("name", FORESTS)
def test_cuda_attention_equals_softmax_over_visible_keys(cuda, name, dim, heads, kv_heads):
    check_attention(cuda, name, dim, heads, kv_heads)


def test_cuda_rope_rmsnorm_swiglu_equal_their_formulas(cuda):
    torch.manual_seed(0)
    for sizes in [(70, 5, 64), (9, 3, 32, 8), (1, 4, 128), (0, 2, 16)]:
        check_rope(cuda, torch.bfloat16, *sizes)
    for sizes in [(70, 576), (1, 8), (3, 2056)]:
        check_rmsnorm(cuda, torch.bfloat16, *sizes)
        check_swiglu(cuda, torch.bfloat16, *sizes)


@pytest.mark.parametrize("call, message", [
    (lambda cuda: check_attention(cuda, "one token", 64, 65, 1), "tile at most 64"),
    (lambda cuda: check_attention(cuda, "one token", 40, 1, 1), "head_dim is 64 or 128"),
    (lambda cuda: check_rope(cuda, torch.bfloat16, 9, 3, 32, 3), "contiguous|misaligned|past the end"),
    (lambda cuda: check_rmsnorm(cuda, torch.bfloat16, 5, 1001), "contiguous|misaligned|past the end"),
])
def test_invalid_cuda_arguments_raise(cuda, call, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        call(cuda)


def test_cuda_error_is_raised_only_once(emulator):
    """A row too long for shared memory raises. Nothing is written, and the next call does not raise."""
    x, weight, out = torch.ones(1, 60_000), torch.ones(60_000), torch.zeros(1, 60_000).bfloat16()
    with pytest.raises(AssertionError, match="CUDA: invalid argument"):
        emulator.rmsnorm(x, weight, out, 1e-5, out)
    assert x.eq(1).all() and out.eq(0).all() and not emulator.has_cuda_error()


@pytest.mark.parametrize("code, mistake, message", [
    ("__syncthreads();  // the first keys", "// the first keys", "race|never written"),
    ("__syncthreads();  // the next keys", "// the next keys", "race|never written"),
    ("__syncthreads();  // this block has", "// this block has", "race|in flight"),
    ("__syncthreads();  // Q has", "// Q has", "race|in flight"),
    ("blocks) wait_for_copies<1>()", "blocks) wait_for_copies<2>()", "in flight"),
    ("wait_for_copies<0>()", "wait_for_copies<1>()", "in flight"),
    ("block % 3", "block % 2", "race"),
    ("(chunk ^ (row & 7))", "chunk", "bank conflicts"),
    ("if (row >= rows) return;", "", "race|outside"),
])
def test_emulator_finds_mistakes_in_attention(tmp_path, code, mistake, message):
    source = CUDA_SOURCE.read_text()
    assert code in source
    with pytest.raises(AssertionError, match=message):
        check_attention(emulated(tmp_path, source.replace(code, mistake)), "captions", 64, 2, 1)


def test_cuda_kernels_compile_without_register_spills(tmp_path):
    folders = os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"], "/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if not nvcc:
        pytest.skip("no nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    codes = [code for code in (80, 90, 120) if f"sm_{code}" in known] or [80]
    targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "0", "-Xptxas", "-v", "-fatbin"]
    command = [nvcc, *flags, *targets]
    done = subprocess.run([*command, "-o", tmp_path / "cuda", CUDA_SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spilled == [("0", "0")] * 5 * len(codes)
