"""Tests of the segment forest: it is the trie of the token sequences, its mask follows the visibility rule,
and the hidden states are those of separate passes, however much is shared.
"""
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import flame
from conftest import CAPTIONS, centered_error, memory_grown
from data import compat


# --- strings

@pytest.mark.parametrize("caption, cleaned", [
    ("A cat", "A cat."), ("A cat.", "A cat."), ("A cat?", "A cat."), (' say "hi" ', "say 'hi'"),
    ("it's 'so'", "it's 'so'"), ("", "."), ("Really?!", "Really?!.")])
def test_clean_caption(caption, cleaned):
    assert flame.clean_caption(caption) == cleaned


def facet_strings(caption, prompts):
    template, facets = flame.PROMPTS[prompts]
    return [template.replace("{}", flame.clean_caption(caption)) + " " + facet for facet in facets]


def assert_whole_strings_tokenized(tokenizer, captions, prompts, encode):
    prefixes, suffixes = flame.tokenize(tokenizer, captions, prompts)
    for caption, prefix, facets in zip(captions, prefixes, suffixes, strict=True):
        ids = [prefix + facet for facet in facets]
        assert ids == [encode(string) for string in facet_strings(caption, prompts)]
        assert all(facets)


@functools.lru_cache
def smollm2_tokenizers(llm):
    from transformers import PreTrainedTokenizerFast
    reference = PreTrainedTokenizerFast(tokenizer_file=str(llm / "tokenizer.json"))
    return flame.load_tokenizer(llm), lambda text: reference(text).input_ids


@settings(max_examples=30, deadline=None)
@given(captions=st.lists(st.text(max_size=40), max_size=3), prompts=st.sampled_from(list(flame.PROMPTS)))
def test_strings_are_tokenized_as_a_whole(llm, captions, prompts):
    tokenizer, encode = smollm2_tokenizers(llm)
    assert_whole_strings_tokenized(tokenizer, [*captions, *CAPTIONS], prompts, encode)


def test_strings_are_tokenized_as_a_whole_if_tokens_cross_the_boundary():
    """Each token is two letters, so whether one crosses the boundary depends on the caption's length."""
    def encode(text):
        return [ord(a) * 5000 + ord(b) for a, b in zip(text[::2], text[1::2] + " ")]

    tokenizer = flame.Tokenizer(encode, lambda texts: [encode(text) for text in texts], None)
    assert_whole_strings_tokenized(tokenizer, ["A cat.", "A cats."], "long", encode)


# --- the trie and the visibility rule

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_build_forest_returns_the_trie(sequences):
    forest = flame.build_forest(sequences)
    prefixes = {tuple(sequence[:n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert len(forest.tokens) == forest.lengths.sum() == len(prefixes)  # no duplicates
    assert (forest.lengths > 0).all() and (forest.parents < np.arange(len(forest.parents))).all()
    seen = flame.attention_mask(forest.lengths, forest.parents)[forest.last_tokens.numpy()]
    for sequence, mask in zip(sequences, seen, strict=True):  # a last token sees its own sequence only
        assert forest.tokens[mask].tolist() == sequence
        assert forest.positions[mask].tolist() == list(range(len(sequence)))


def test_captions_share_common_prefixes(llm):
    prefixes, facets = flame.tokenize(flame.load_tokenizer(llm), ["A cat.", "A dog.", "A cat."], "long")
    forest = flame.caption_forest(prefixes, facets)
    assert forest.parents.tolist().count(-1) == 1  # the beginning of the template is the only root
    assert forest.last_tokens[:7].equal(forest.last_tokens[14:])  # equal captions share one branch
    assert len(forest.tokens) < 0.5 * sum(len(p) + len(f) for p, fs in zip(prefixes, facets) for f in fs)


def random_forest(random, segments=40, longest=90):
    """Return (lengths, parents) of segments in depth-first order."""
    n = random.integers(1, segments + 1)
    lengths = random.integers(1, random.choice([2, 5, longest]) + 1, n)
    parents = []
    path = [-1]  # segments from the root to the last one
    for s in range(n):
        path = path[:random.integers(1, len(path) + 1)]
        parents.append(path[-1])
        path.append(s)
    return lengths, np.array(parents)


def visibility_rule(lengths, parents):
    """Return the rule [T queries, T keys], evaluated pair by pair."""
    tokens = [(s, k) for s, n in enumerate(lengths) for k in range(n)]  # (segment, index in it)

    def ancestors(s):
        return [] if s < 0 else [s, *ancestors(parents[s])]

    def depth(s, k):
        return k + sum(lengths[a] for a in ancestors(s)[1:])

    depths = [depth(*token) for token in tokens]
    return [[k in ancestors(q) and depths[j] <= depths[i] for j, (k, _) in enumerate(tokens)]
            for i, (q, _) in enumerate(tokens)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2 ** 32 - 1))
def test_attention_mask_is_the_visibility_rule(seed):
    random = np.random.default_rng(seed)
    forest = random_forest(random, segments=12, longest=9)
    expected = np.array(visibility_rule(*forest))
    assert (flame.attention_mask(*forest) == expected).all()


# --- attention

def attention(q, k, v, mask):
    """Return attention by its formula in float64: q [T, H, d]; k, v [T, Hkv, d]; mask [T, T] -> [T, H, d]."""
    n = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(n, dim=1), v.double().repeat_interleave(n, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kernels", [flame.TORCH_KERNELS, flame.EXT_KERNELS], ids=["chunked", "flame_ext"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_attention_equals_attention_with_full_mask(kernels, dtype, tolerance, seed):
    """Vary the numbers of segments, tokens and heads; rows have 1 to about 30 query chunks."""
    random = np.random.default_rng(seed)
    lengths, parents = random_forest(random)
    group_size, kv_heads, dim = random.integers(1, 5), random.integers(1, 4), random.choice([2, 20, 64, 96])
    torch.manual_seed(seed)
    heads = group_size * kv_heads
    qkv = torch.randn(lengths.sum(), heads + 2 * kv_heads, dim).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views, as in hidden_states()
    forest = flame.Forest(None, None, lengths.astype(np.int32), parents.astype(np.int32), None)
    expected = attention(q, k, v, torch.from_numpy(flame.attention_mask(lengths, parents)))
    ours = kernels.attention(forest, torch.device("cpu"), int(group_size))(q, k, v)
    assert ours.shape == q.shape and ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


# --- one forest or separate passes

def make_forest(segments):
    """Return the Forest of segments (tokens, parent, whether a sequence ends there)."""
    lengths = np.array([len(tokens) for tokens, _, _ in segments], np.int32)
    parents = np.array([parent for _, parent, _ in segments], np.int32)
    last_tokens = np.cumsum(lengths)[[ends for _, _, ends in segments]] - 1
    tokens = torch.tensor([token for tokens, _, _ in segments for token in tokens])
    depths = torch.from_numpy(flame.token_depths(lengths, parents))
    return flame.Forest(tokens, depths, lengths, parents, torch.from_numpy(last_tokens))


@pytest.mark.parametrize("kernels", [flame.TORCH_KERNELS, flame.EXT_KERNELS], ids=["pytorch", "flame_ext"])
def test_forest_equals_separate_passes(tiny_llm, kernels):
    """Share nothing, each caption's prefix only, or all common prefixes: the hidden states are the same."""
    decoder = flame.load_decoder(tiny_llm, dtype=torch.float32)._replace(kernels=kernels)
    prefixes, facets = flame.tokenize(flame.load_tokenizer(tiny_llm), CAPTIONS[:5], "long")
    separate = [(p + f, -1, True) for p, fs in zip(prefixes, facets) for f in fs]
    expected = [flame.hidden_states(decoder, make_forest([segment])) for segment in separate]
    expected = torch.cat(expected).view(5, 7, -1)
    flat = []
    for n, (prefix, suffixes) in enumerate(zip(prefixes, facets)):
        flat += [(prefix, -1, False)] + [(suffix, 8 * n, True) for suffix in suffixes]
    forests = [flame.caption_forest(prefixes, facets), make_forest(flat), make_forest(separate)]
    sizes = [len(forest.tokens) for forest in forests]
    assert sizes[0] < sizes[1] < sizes[2]
    for forest in forests:
        assert centered_error(flame.hidden_states(decoder, forest).view(5, 7, -1), expected) <= 1e-5


# --- positions

PREFIX, FACETS = [1, 2, 3], [[4, 5], [4, 6, 7], [8]]


@pytest.mark.parametrize("caption_forest, visible_tokens, positions", [
    (flame.caption_forest, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 8]],
     [range(5), range(6), range(4)]),
    (compat.caption_forest, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 8]],
     [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [0, 1, 2, 8]]),
    (functools.partial(flame.caption_forest, mask="causal"),
     [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 4, 6, 7], [1, 2, 3, 4, 5, 4, 6, 7, 8]],
     [range(5), range(8), range(9)])], ids=["decoupled", "released", "causal"])
def test_tokens_and_positions_that_a_facet_sees(caption_forest, visible_tokens, positions):
    forest = caption_forest([PREFIX], [FACETS])
    seen = flame.attention_mask(forest.lengths, forest.parents)[forest.last_tokens.numpy()]
    assert [forest.tokens[mask].tolist() for mask in seen] == visible_tokens
    assert [forest.positions[mask].tolist() for mask in seen] == [list(row) for row in positions]


# --- packed rows

def test_packed_rows_are_few_and_about_equally_long(byte_llm):
    encoder = flame.TextEncoder(byte_llm, dtype=torch.float32, max_tokens=4000)
    for N in (1, 2, 60):
        captions = ["a cat and " * n for n in np.random.default_rng().integers(0, 60, N)]
        prefixes, suffixes = flame.tokenize(encoder.tokenizer, captions, "long")
        sizes = [len(p) + sum(map(len, fs)) for p, fs in zip(prefixes, suffixes)]
        batches = [rows for rows, _ in encoder.pack(captions, "long")]
        assert sorted(sum(batches, [])) == list(range(N)) and len(batches) <= -(-sum(sizes) // 4000)
        lengths = [sum(sizes[i] for i in rows) for rows in batches]
        assert max(lengths) <= 4000 + max(sizes) and max(lengths) - min(lengths) <= 2 * max(sizes)


def test_embedding_does_not_depend_on_other_captions(tiny_llm):
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    ours = encoder.encode(CAPTIONS, "short")
    expected = torch.cat([encoder.encode([caption], "short") for caption in CAPTIONS])
    assert ours.shape == (len(CAPTIONS), 3, 48) and ours.dtype == torch.float32
    assert centered_error(ours, expected) <= 1e-5
    encoder.max_tokens = 300
    assert centered_error(encoder.encode(CAPTIONS, "short"), expected) <= 1e-5
    assert encoder.encode([], "short").shape == (0, 3, 48)
    with pytest.raises(ValueError, match="list of str"):
        encoder.encode("a caption", "short")


def test_memory_of_long_row_is_linear(byte_llm):
    """For 16,384 packed tokens, both kernels need less than a byte per pair of tokens, 256 MiB."""
    grown, tokens = memory_grown(f"""
encoder = flame.TextEncoder({str(byte_llm)!r}, dtype=torch.float32, max_tokens=40000)
text = "a very long description of almost nothing, word after word. "
captions = [f"Number {{n}}: " + text * n for n in range(18)]
encoder.encode(captions[:2])
((_, forest),) = encoder.pack(captions)
""", """
for kernels in (flame.TORCH_KERNELS, flame.EXT_KERNELS):
    flame.hidden_states(encoder.decoder._replace(kernels=kernels), forest)
""", "len(forest.tokens)")
    assert tokens > 16384 and grown < 16384 ** 2
