"""The extension against the rule of the segment forest, written densely in numpy and evaluated in float64.

    pytest tests/test_ext.py

Every instruction set that this machine has is tested, not only the one it would use.
"""
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flame_ext

BEST = flame_ext.simd()


def usable(name):
    try:
        return flame_ext.simd(name) == name
    except ValueError:
        return False
    finally:
        flame_ext.simd(BEST)


SIMD = [name for name in ("plain", "avx2", "avx512", "avx512_bf16", "avx512_amx") if usable(name)]
DTYPES = [torch.float32, torch.bfloat16]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    flame_ext.simd(BEST)


# ---- Oracles ----------------------------------------------------------------------------------------------

def dense(lengths, parents):
    """The rule -> visible [T, T], segment [T], depth [T]."""
    S = len(lengths)
    ancestor = np.eye(S, dtype=bool)
    below = {-1: 0}
    depths = [np.zeros(0, int)]
    for s in range(S):
        ancestor[s] |= ancestor[parents[s]] if parents[s] >= 0 else False
        below[s] = below[parents[s]] + lengths[s]  # depth at which s's children begin
        depths.append(below[parents[s]] + np.arange(lengths[s]))
    segment = np.repeat(np.arange(S), lengths)
    depth = np.concatenate(depths)
    return ancestor[segment][:, segment] & (depth[None, :] <= depth[:, None]), segment, depth


def dense_attention(q, k, v, visible, scale):
    """float64 softmax attention -> out [Q, H, d] and sum of p |v|, which bounds what rounding p can do."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    out, size = np.empty_like(q), np.empty_like(q)
    for h in range(q.shape[1]):
        s = np.where(visible, q[:, h] @ k[:, h // share].T * scale, -np.inf)
        p = np.exp(s - s.max(1, keepdims=True, initial=-1e300))
        p /= p.sum(1, keepdims=True)
        out[:, h], size[:, h] = p @ v[:, h // share], p @ abs(v[:, h // share])
    return out, size


def assert_attention(out, q, k, v, visible, scale):
    want, size = dense_attention(q, k, v, visible, scale)
    error = abs(out.double().numpy() - want)
    if out.dtype == torch.float32:
        assert error.max(initial=0) <= 1e-5 * abs(want).max(initial=0)
    else:  # p and the result are each rounded to 8 bits, by at most 2^-8; a tenth more for the cheap 2^x
        assert (error <= 1.1 * 2 ** -7 * size).all()


# ---- Random forests ---------------------------------------------------------------------------------------

@st.composite
def forests(draw):
    """lengths, parents: empty, one-token, and block-sized segments.

    Children lie anywhere after their parent, not depth first.
    """
    n = draw(st.integers(1, 12))
    lengths = [draw(st.one_of(st.integers(0, 9), st.integers(60, 100))) for _ in range(n)]
    return lengths, [draw(st.integers(-1, s - 1)) for s in range(n)]


def random_qkv(T, heads, kv_heads, dim, dtype, seed, gap=0):
    """q [T, H, d], k, v [T, Hkv, d]: views of one fused buffer, its tokens `gap` elements further apart."""
    row = (heads + 2 * kv_heads) * dim
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(T, row + gap, generator=generator).to(dtype)[:, :row].unflatten(1, (-1, dim))
    qkv[:, :heads] *= 2
    return qkv.split((heads, kv_heads, kv_heads), dim=1)


@settings(max_examples=60, deadline=None)
@given(forests())
def test_layout(forest):
    lengths, parents = forest
    layout = flame_ext.layout(lengths, np.array(parents, np.int64))
    visible, segment, depth = dense(lengths, parents)
    assert layout.lengths.tolist() == lengths and layout.parents.tolist() == parents
    assert layout.start.tolist() == np.cumsum([0, *lengths]).tolist()
    assert (layout.segment == segment).all() and (layout.depth == depth).all()
    number = layout.first  # a segment's number in preorder, which is what the rule compares
    below = (number[None, :] <= number[:, None]) & (number[:, None] <= layout.last[None, :])
    assert (below & (layout.depth[None, :] <= layout.depth[:, None]) == visible).all()
    with pytest.raises(ValueError):
        layout.depth[:] = 0


@pytest.mark.parametrize("simd", SIMD)
def test_mask(simd):
    flame_ext.simd(simd)

    @settings(max_examples=20, deadline=None)
    @given(forests())
    def check(forest):
        visible, segment, _ = dense(*forest)
        T = len(segment)
        layout = flame_ext.layout(*forest)
        rows_apart = torch.full((T, T + 3), 7, dtype=torch.uint8)[:, :T]
        for out in (np.zeros((T, T), np.uint8), torch.zeros(T, T, dtype=torch.bool), rows_apart):
            flame_ext.mask(layout, out)
            assert (np.asarray(out) == visible).all()
    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("simd", SIMD)
def test_attention(simd, dtype):
    flame_ext.simd(simd)

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
        visible, segment, _ = dense(*forest)
        T = len(segment)
        kv_heads, share = heads
        row = kv_heads * share * dim
        q, k, v = random_qkv(T, kv_heads * share, kv_heads, dim, dtype, seed, gap)
        rows_apart = torch.full((T, row + kv_heads * share), torch.nan, dtype=dtype)
        out = rows_apart[:, :row].unflatten(1, (-1, dim))
        flame_ext.attention(q, k, v, out, flame_ext.layout(*forest, tile), dim ** -0.5)
        assert_attention(out, q, k, v, visible, dim ** -0.5)
    check()


@pytest.mark.parametrize("simd", SIMD)
def test_scores_far_apart(simd):
    """A running maximum that jumps by hundreds neither overflows nor leaves anything of what it replaces."""
    flame_ext.simd(simd)
    q, k, v = random_qkv(400, 2, 1, 64, torch.float32, 0)
    k = k * torch.linspace(0, 100, 400)[:, None, None]
    out = torch.empty(q.shape)
    flame_ext.attention(q, k, v, out, flame_ext.layout([150, 250], [-1, 0]), 1.0)
    want, _ = dense_attention(q, k, v, np.tri(400, dtype=bool), 1.0)
    # A score of 1e4 has only 1e-3 left in float32.
    assert abs(out.numpy() - want).max() < 0.02 * abs(want).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(dtype):
    lengths = [7]
    parents = [-1]
    for caption in range(1, 25, 4):
        lengths += [80, 9, 5, 12]
        parents += [0, caption, caption, caption + 2]
    layout = flame_ext.layout(lengths, parents)
    q, k, v = random_qkv(len(layout.depth), 6, 2, 64, dtype, 0)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.empty(q.shape, dtype=dtype))
        flame_ext.attention(q, k, v, results[-1], layout, 0.125)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_results_do_not_depend_on_the_rest_of_the_batch():
    # Two captions on one root, their facets interleaved.
    lengths = [6, 100, 30, 9, 50, 8]
    parents = [-1, 0, 0, 1, 2, 1]
    q, k, v = random_qkv(sum(lengths), 4, 2, 64, torch.float32, 0)
    out = torch.empty(q.shape)
    layout = flame_ext.layout(lengths, parents)
    flame_ext.attention(q, k, v, out, layout, 0.125)
    own = torch.from_numpy(np.isin(layout.segment, [0, 1, 3, 5]))
    alone = torch.empty(int(own.sum()), 4, 64)
    flame_ext.attention(q[own], k[own], v[own], alone, flame_ext.layout([6, 100, 9, 8], [-1, 0, 1, 1]), 0.125)
    assert (out[own] - alone).abs().max() < 1e-6


def test_memory_is_linear_and_torch_is_not_needed():
    """16,384 tokens, numpy alone: a caption of 4,000 tokens and many of 200; S x S bytes would be 256 MiB."""
    script = """
import sys
import numpy as np, flame_ext
lengths, parents = [4000], [-1]
for caption in range(1, 160, 3):
    lengths += [100, 50, 50]
    parents += [-1, caption, caption]
lengths[-1] += 16384 - sum(lengths)
rng = np.random.default_rng(0)
qkv = rng.standard_normal((16384, 3, 16), dtype=np.float32)
q, k, v = qkv[:, :1], qkv[:, 1:2], qkv[:, 2:]
out = np.zeros(q.shape, np.float32)
def peak():  # ru_maxrss begins at the parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
before = peak()
flame_ext.attention(q, k, v, out, flame_ext.layout(lengths, parents), 0.25)
print(peak() - before)
assert "torch" not in sys.modules
for i in (0, 1, 3999):
    p = np.exp(q[i, 0] @ k[:i + 1, 0].T * 0.25)
    assert abs(p @ v[:i + 1, 0] / p.sum() - out[i, 0]).max() < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16384 ** 2 / 8


# ---- Element-wise parts -----------------------------------------------------------------------------------

def assert_close(got, want, size=None):
    """Up to half a last place of bfloat16, and what rough steps add before rounding. size: of the terms."""
    tolerance = 1e-5 if got.dtype == torch.float32 else 2 ** -8 + 2 ** -12
    size = want.abs() if size is None else size
    assert ((got.double() - want).abs() <= tolerance * size + 1e-5).all()


def check_rope(rope, dtype, T, heads, dim, gap=0):
    """The pair (i, i + d/2) is turned like a complex number; the last head and what lies between stay."""
    qkv, before = (torch.randn(T, heads * dim + gap).to(dtype) for _ in range(2))
    before.copy_(qkv)
    angle = torch.rand(T, dim // 2) * 6
    rope(qkv[:, :heads * dim].unflatten(1, (heads, dim)), angle.cos(), angle.sin(), heads - 1)
    rest = (heads - 1) * dim
    pairs = before[:, :rest].double().view(T, heads - 1, 2, dim // 2)
    turn = torch.polar(torch.ones(T, 1, dim // 2).double(), angle[:, None].double())
    turned = torch.complex(pairs[:, :, 0], pairs[:, :, 1]) * turn
    want = torch.stack([turned.real, turned.imag], 2)
    assert_close(qkv[:, :rest].view(want.shape), want, turned.abs()[:, :, None])
    assert torch.equal(qkv[:, rest:], before[:, rest:])


def check_rmsnorm(rmsnorm, dtype, T, width):
    x, weight, delta = torch.randn(T, width), torch.rand(width), torch.randn(T, width).to(dtype)
    for update in (None, delta):
        stream, out = x.clone(), torch.empty(T, width, dtype=dtype)
        rmsnorm(stream, weight, out, 1e-5, update)
        y = x if update is None else x + delta.float()
        assert torch.equal(stream, y)
        assert_close(out, torch.nn.functional.rms_norm(y.double(), (width,), weight.double(), 1e-5))


def check_swiglu(swiglu, dtype, T, width):
    gate_up, out = (torch.randn(T, 2 * width) * 20).to(dtype), torch.empty(T, width, dtype=dtype)
    gate_up[0, 0] = -200  # e^200 is no float32
    swiglu(gate_up, out)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


# T, heads, dim and the gap between rows; T, width
ROPE = [(70, 5, 64), (3, 2, 6), (9, 3, 32, 8), (9, 3, 32, 3), (1, 4, 128), (0, 2, 8)]
ROWS = [(70, 576), (1, 7), (3, 2056), (5, 1001)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("simd", SIMD)
def test_rope_rmsnorm_swiglu(simd, dtype):
    flame_ext.simd(simd)
    torch.manual_seed(0)
    for sizes in ROPE:
        check_rope(flame_ext.rope, dtype, *sizes)
    for sizes in ROWS:
        check_rmsnorm(flame_ext.rmsnorm, dtype, *sizes)
        check_swiglu(flame_ext.swiglu, dtype, *sizes)


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("simd", SIMD)
def test_unit_vectors(simd, kind):
    flame_ext.simd(simd)
    random = np.random.default_rng()
    for N, M, D in ((40, 11, 576), (3, 2, 37), (2, 1, 1)):
        index = random.integers(0, N * M, 99)
        out = torch.empty(len(index), D)
        if kind == "float16":
            sizes = 10.0 ** random.integers(-8, 4, (N, M, 1))  # subnormals too
            vectors = (random.standard_normal((N, M, D)) * sizes).astype(np.float16)
            flame_ext.unit_vectors(vectors, index, out)
            want = vectors.astype(np.float64)
        else:
            vectors = random.integers(-128, 128, (N, M, D)).astype(np.int8)
            scales = random.random((N, M), np.float32)
            statistics = random.standard_normal((2, M, D)).astype(np.float32)
            flame_ext.unit_vectors(vectors, index, out, scales, statistics)
            want = statistics[0] + statistics[1].astype(np.float64) * scales[..., None] * vectors
        want /= np.maximum(np.linalg.norm(want, axis=-1, keepdims=True), 1e-12)  # a zero vector stays one
        assert np.abs(out.numpy() - want.reshape(N * M, D)[index]).max() < 1e-6


@pytest.mark.parametrize("simd", SIMD)
def test_unit_vectors_hide_no_broken_value(simd):
    flame_ext.simd(simd)
    for broken in (np.nan, np.inf, -np.inf):
        for D in (40, 5):
            vectors, out = np.ones((1, 1, D), np.float16), torch.zeros(1, D)
            vectors[0, 0, 3] = broken
            flame_ext.unit_vectors(vectors, [0], out)
            assert out.isnan()[0, 3]


# ---- Bad input --------------------------------------------------------------------------------------------

LAYOUT = flame_ext.layout([2, 3], [-1, 0])
BF16 = torch.bfloat16


def layout_of(*args):
    return lambda: flame_ext.layout(*args)


def mask_in(out):
    return lambda: flame_ext.mask(LAYOUT, out)


def attention(q=(5, 4, 8), k=(5, 2, 8), v=None, out=None, scale=1.0, dtype=torch.float32):
    """A call that all is right with but what is given; q, k: shapes or tensors."""
    q, k = (torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x for x in (q, k))
    v = torch.zeros_like(k) if v is None else v
    out = torch.zeros_like(q) if out is None else out
    return lambda: flame_ext.attention(q, k, v, out, LAYOUT, scale)


def rope(qkv=(5, 2, 8), cos=torch.zeros(5, 4), heads=1):
    return lambda: flame_ext.rope(torch.zeros(qkv), cos, torch.zeros(5, 4), heads)


def rmsnorm(x=torch.zeros(5, 8), weight=torch.zeros(8), delta=None):
    return lambda: flame_ext.rmsnorm(x, weight, torch.zeros(5, 8), 1e-5, delta)


def swiglu(gate_up, out):
    return lambda: flame_ext.swiglu(torch.zeros(gate_up), torch.zeros(out))


def stored(vectors=np.zeros((2, 3, 8), np.float16), index=(0, 5), out=torch.zeros(2, 8), **int8):
    return lambda: flame_ext.unit_vectors(vectors, list(index), out, **int8)


INT8 = {
    "vectors": np.zeros((2, 3, 8), np.int8),
    "scales": np.zeros((2, 3), np.float32),
    "statistics": np.zeros((2, 3, 8), np.float32),
}


@pytest.mark.parametrize("call, error, words", [
    (layout_of([1, 2], [-1]), ValueError, "lengths has 2 segments, parents has 1"),
    (layout_of([1, -2], [-1, 0]), ValueError, r"lengths\[1\] = -2"),
    (layout_of([1, 2], [1, -1]), ValueError, r"parents\[0\] = 1.*earlier"),
    (layout_of([1, 2], [-1, 1]), ValueError, r"parents\[1\] = 1.*cycle"),
    (layout_of([1], [-2]), ValueError, r"parents\[0\] = -2"),
    (layout_of([2 ** 31 - 1, 1], [-1, -1]), ValueError, "2\\^31"),
    (layout_of([2 ** 31], [-1]), ValueError, r"lengths\[0\].*2\^31"),
    (layout_of([1.5], [-1]), TypeError, "lengths is float64"),
    (layout_of([1], np.array([2 ** 64 - 1], np.uint64)), TypeError, "parents is uint64"),
    (layout_of([1], [-1], 0), ValueError, "tile is 0"),
    (layout_of([[1]], [-1]), ValueError, "lengths has 2 dimensions"),
    (mask_in(torch.zeros(5, 4, dtype=torch.bool)), ValueError, r"out has shape \[5, 4\]"),
    (mask_in(torch.zeros(5, 5)), TypeError, "out is float32"),
    (mask_in(torch.zeros(5, 5, dtype=torch.bool).T), ValueError, "out is not contiguous"),
    (mask_in(torch.zeros(1, 5, dtype=torch.bool).expand(5, 5)), ValueError, "out has rows that overlap"),
    (mask_in([[True]]), TypeError, "out must be a torch tensor"),
    (attention(q=(4, 4, 8)), ValueError, r"q has shape \[4, 4, 8\]"),
    (attention(q=torch.zeros(5, 4 * 8)), ValueError, r"q has shape \[5, 32\]"),
    (attention(q=(5, 3, 8)), ValueError, "q has 3 heads.*2"),
    (attention(k=(5, 0, 8)), ValueError, "q has 4 heads.*0"),
    (attention(k=(5, 2, 16)), ValueError, r"k has shape"),
    (attention(v=torch.zeros(5, 1, 8)), ValueError, "v has shape"),
    (attention(out=torch.zeros(5, 4, 9)), ValueError, "out has shape"),
    (attention(dtype=torch.float16), TypeError, "q is float16"),
    (attention(k=torch.zeros(5, 2, 8, dtype=BF16)), TypeError, "k is bfloat16, expected float32"),
    (attention(out=torch.zeros(5, 4, 8, dtype=BF16)), TypeError, "out is bfloat16"),
    (attention(q=torch.zeros(5, 8, 4).transpose(1, 2)), ValueError, "q is not contiguous"),
    (attention(out=torch.zeros(1, 4, 8).expand(5, 4, 8)), ValueError, "out has rows that overlap"),
    (attention(q=torch.zeros(5, 4, 8, requires_grad=True)), ValueError, "q requires a gradient"),
    (attention(q=torch.zeros(5, 4, 8, device="meta"), out=torch.zeros(5, 4, 8)), ValueError, "q is on meta"),
    (attention(q=(5, 2, 520), k=(5, 2, 520)), ValueError, "head_dim 520"),
    (attention(scale=0.0), ValueError, "scale"),
    (attention(scale=1e-60), ValueError, "scale must be a finite float32"),  # 0 as a float32
    (attention(scale=1e60), ValueError, "scale"),
    (attention(scale=float("nan")), ValueError, "scale"),
    (rope(qkv=(5, 2, 7)), ValueError, "odd head_dim"),
    (rope(cos=torch.zeros(5, 3)), ValueError, "cos has shape"),
    (rope(heads=3), ValueError, "qkv has 2 heads, but heads is 3"),
    (rope(cos=torch.zeros(5, 4).double()), TypeError, "cos is float64"),
    (rmsnorm(weight=torch.zeros(7)), ValueError, "weight has shape"),
    (rmsnorm(x=torch.zeros(5, 8).bfloat16()), TypeError, "x is bfloat16"),
    (rmsnorm(delta=torch.zeros(5, 16)[:, ::2]), ValueError, "delta is not contiguous"),
    (swiglu((5, 7), (5, 3)), ValueError, "odd width"),
    (swiglu((5, 8), (5, 3)), ValueError, "out has shape"),
    (stored(np.zeros((2, 3, 8))), TypeError, "vectors is float64, expected float16"),
    (stored(np.zeros((2, 3), np.float16)), ValueError, r"vectors has shape \[2, 3\]"),
    (stored(np.zeros((2, 8, 3), np.float16).transpose(0, 2, 1)), ValueError, "vectors is not contiguous"),
    (stored(np.zeros((2, 3, 8), "i1,f2")["f1"]), ValueError, "vectors has elements that lie between"),
    (stored(index=[0, 6]), ValueError, "index has 6, but there are 6 vectors"),
    (stored(index=[-1, 0]), ValueError, "index has -1"),
    (stored(index=[0.0, 1.0]), TypeError, "index is float64"),
    (stored(index=[0]), ValueError, r"out has shape \[2, 8\]"),
    (stored(out=torch.zeros(2, 8).bfloat16()), TypeError, "out is bfloat16"),
    (stored(**INT8 | {"vectors": np.zeros((2, 3, 8), np.float16)}), TypeError,
     "vectors is float16, expected int8"),
    (stored(**INT8 | {"scales": np.zeros((2, 2), np.float32)}), ValueError,
     r"scales has shape \[2, 2\], expected \[2, 3\]"),
    (stored(**INT8 | {"statistics": np.zeros((2, 3, 8))}), TypeError, "statistics is float64"),
    (stored(**INT8 | {"statistics": None}), (TypeError, ValueError), "statistics"),
    (lambda: flame_ext.simd("sse9"), ValueError, "sse9.*plain"),
])
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_nothing_to_do():
    empty = flame_ext.layout([], [])
    flame_ext.mask(empty, torch.zeros(0, 0, dtype=torch.bool))
    flame_ext.attention(*(torch.zeros(0, 2, 8) for _ in range(4)), empty, 1.0)
    flame_ext.swiglu(torch.zeros(0, 8), torch.zeros(0, 4))
    stored(index=[], out=torch.zeros(0, 8))()


def test_failures_keep_no_memory_and_no_reference():
    """Where memory ends MemoryError, each time at the same size; where threads end, one works alone."""
    script = """
import re, resource, sys
import numpy as np, flame_ext
def size():
    return 1024 * int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
def limit(more):
    resource.setrlimit(resource.RLIMIT_AS, (size() + more, -1))
def fails(error, call, *args):
    try:
        call(*args)
    except error:
        return
    raise AssertionError(args)
limit(200 << 20)
sizes = []
for _ in range(8):
    fails(MemoryError, flame_ext.layout, [2 ** 24], [-1])
    sizes.append(size())
assert max(sizes[2:]) == sizes[1], sizes
x = np.ones((500, 1, 8), np.float32)
out = np.zeros_like(x)
layout = flame_ext.layout([500], [-1])
whole = flame_ext.layout([500], [-1], 2 ** 62)  # a tile of all queries
references = [sys.getrefcount(y) for y in (x, out, layout)]
for _ in range(8):
    fails(ValueError, flame_ext.attention, x, x, x, out, layout, 1e-60)
    fails(TypeError, flame_ext.attention, x, x, x, out, layout, "1")
assert references == [sys.getrefcount(y) for y in (x, out, layout)]
limit(4 << 20)  # less than a thread's stack
for some in (layout, whole):
    out[:] = 0
    flame_ext.attention(x, x, x, out, some, 1.0)
    assert abs(out - 1).max() < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- CUDA -------------------------------------------------------------------------------------------------

@GPU
@pytest.mark.parametrize("dtype, dim", [(BF16, 64), (BF16, 128), (BF16, 40), (torch.float32, 64)])
def test_cuda_attention_equals_the_rule(dtype, dim):
    @settings(max_examples=30, deadline=None)
    @given(
        forest=forests(),
        heads=st.sampled_from([(1, 1), (2, 4), (3, 3), (1, 7), (1, 32)]),
        seed=st.integers(0, 2 ** 32),
        too_large=st.booleans(),
    )
    def check(forest, heads, seed, too_large):
        visible, segment, _ = dense(*forest)
        kv_heads, share = heads
        layout = flame_ext.layout(*forest, 64 if too_large else 64 // share)
        q, k, v = random_qkv(len(segment), kv_heads * share, kv_heads, dim, dtype, seed, gap=8)
        out = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            plan = torch.tensor(layout.plan, device="cuda")
            inputs = [x.cuda() for x in (q, k, v)]
            flame_ext.attention(*inputs, out, layout, dim ** -0.5, plan, side.cuda_stream)
        side.synchronize()
        assert_attention(out.cpu(), q, k, v, visible, dim ** -0.5)
    check()


@GPU
def test_cuda_mask_and_refusals():
    @settings(max_examples=20, deadline=None)
    @given(forests())
    def check(forest):
        visible, segment, _ = dense(*forest)
        T = len(segment)
        for extra in (0, 3):
            layout = flame_ext.layout(*forest)
            out = torch.full((T, T + extra), 7, dtype=torch.uint8, device="cuda")
            plan = torch.tensor(layout.plan, device="cuda")
            flame_ext.mask(layout, out[:, :T], plan, torch.cuda.current_stream().cuda_stream)
            assert (out.cpu().numpy()[:, :T] == visible).all()
            assert (out[:, T:] == 7).all()
    check()
    out = torch.zeros(5, 5, dtype=torch.bool, device="cuda")
    with pytest.raises(ValueError, match="k is on cuda:0, expected on the CPU"):
        attention(k=torch.zeros(5, 2, 8, device="cuda"), v=torch.zeros(5, 2, 8))()
    with pytest.raises(ValueError, match="plan is None"):
        flame_ext.mask(LAYOUT, out)
    with pytest.raises(ValueError, match="plan is on the CPU, expected on cuda:0"):
        flame_ext.mask(LAYOUT, out, torch.tensor(LAYOUT.plan))
    with pytest.raises(ValueError, match="out is on the CPU, expected on cuda:0"):
        flame_ext.swiglu(torch.zeros(5, 8, device="cuda"), torch.zeros(5, 4))


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_rope_rmsnorm_swiglu(dtype):
    def on_gpu(function):
        def call(*args):
            there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
            function(*there, stream=torch.cuda.current_stream().cuda_stream)
            for here, moved in zip(args, there):
                if isinstance(here, torch.Tensor):
                    here.copy_(moved)
        return call

    for sizes in ROPE:
        check_rope(on_gpu(flame_ext.rope), dtype, *sizes)
    for sizes in ROWS:
        check_rmsnorm(on_gpu(flame_ext.rmsnorm), dtype, *sizes)
        check_swiglu(on_gpu(flame_ext.swiglu), dtype, *sizes)
