"""The segment forest and its rule. What is promised:

* a caption is cleaned as the template wants it, and a facet's string is tokenized as one, whatever it holds;
* the forest is the trie of the strings' tokens: all of them, each shared beginning once;
* `visible` is the rule, so that a facet's last token sees its own string and nothing else;
* K strings run one by one and the same strings in one forest give the same states, whatever is shared;
* attention in stretches and the extension's attention are attention under the mask of all pairs;
* RoPE positions are what "restart" and "causal" say, and the released code's;
* packed rows are few, about as long as each other, and change no embedding; their memory is linear.
"""
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import flame
from conftest import CAPTIONS, centered_error, memory_grown
from data import released


# --- strings

@pytest.mark.parametrize("caption, cleaned", [
    ("A cat", "A cat."), ("A cat.", "A cat."), ("A cat?", "A cat."), (' say "hi" ', "say 'hi'"),
    ("it's 'so'", "it's 'so'"), ("", "."), ("Really?!", "Really?!.")])
def test_a_caption_is_cleaned(caption, cleaned):
    assert flame.clean(caption) == cleaned


def strings_of(caption, prompts):
    template, facets = flame.PROMPTS[prompts]
    return [template.replace("{}", flame.clean(caption)) + " " + facet for facet in facets]


def assert_tokenized_as_one(tokenizer, captions, prompts, encode):
    prefixes, suffixes = flame.tokenize(tokenizer, captions, prompts)
    for caption, prefix, facets in zip(captions, prefixes, suffixes, strict=True):
        ids = [prefix + facet for facet in facets]
        assert ids == [encode(string) for string in strings_of(caption, prompts)]
        assert all(facets)


@functools.lru_cache
def real_tokenizers(llm):
    from transformers import PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(llm / "tokenizer.json"))
    return flame.load_tokenizer(llm), lambda text: theirs(text).input_ids


@settings(max_examples=30, deadline=None)
@given(captions=st.lists(st.text(max_size=40), max_size=3), prompts=st.sampled_from(list(flame.PROMPTS)))
def test_strings_are_tokenized_as_one(llm, captions, prompts):
    tokenizer, encode = real_tokenizers(llm)
    assert_tokenized_as_one(tokenizer, [*captions, *CAPTIONS], prompts, encode)


def test_strings_are_tokenized_as_one_where_no_boundary_is_stable():
    """Tokens of two letters: where a facet's begin depends on the length of its caption."""
    def encode(text):
        return [ord(a) * 5000 + ord(b) for a, b in zip(text[::2], text[1::2] + " ")]

    tokenizer = flame.Tokenizer(encode, lambda texts: [encode(text) for text in texts], None)
    assert_tokenized_as_one(tokenizer, ["A cat.", "A cats."], "long", encode)


# --- the trie and the rule

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_the_forest_is_the_trie(rows):
    """A token's position is its place in the string."""
    forest = flame.build_forest(rows)
    prefixes = {tuple(row[:n + 1]) for row in rows for n in range(len(row))}
    assert len(forest.tokens) == forest.lengths.sum() == len(prefixes)  # nothing is held twice
    assert (forest.lengths > 0).all() and (forest.parents < np.arange(len(forest.parents))).all()
    seen = flame.visible(forest.lengths, forest.parents)[forest.answers.numpy()]
    for row, mask in zip(rows, seen, strict=True):  # an answer sees its own string and nothing else
        assert forest.tokens[mask].tolist() == row
        assert forest.positions[mask].tolist() == list(range(len(row)))


def test_captions_share_what_they_can(llm):
    prefixes, facets = flame.tokenize(flame.load_tokenizer(llm), ["A cat.", "A dog.", "A cat."], "long")
    forest = flame.caption_forest(prefixes, facets)
    assert forest.parents.tolist().count(-1) == 1         # the template's opening is one root
    assert forest.answers[:7].equal(forest.answers[14:])  # equal captions are one branch
    assert len(forest.tokens) < 0.5 * sum(len(p) + len(f) for p, fs in zip(prefixes, facets) for f in fs)


def random_forest(random, segments=40, longest=90):
    """(lengths, parents), depth first."""
    n = random.integers(1, segments + 1)
    lengths = random.integers(1, random.choice([2, 5, longest]) + 1, n)
    parents = []
    path = [-1]  # above the next segment
    for s in range(n):
        path = path[:random.integers(1, len(path) + 1)]
        parents.append(path[-1])
        path.append(s)
    return lengths, np.array(parents)


def rule(lengths, parents):
    """[T, T], the rule token by token."""
    places = [(s, k) for s, n in enumerate(lengths) for k in range(n)]  # segment, place in it

    def lineage(s):
        return [] if s < 0 else [s, *lineage(parents[s])]

    def depth(s, k):
        return k + sum(lengths[a] for a in lineage(s)[1:])

    depths = [depth(*place) for place in places]
    return [[k in lineage(q) and depths[j] <= depths[i] for j, (k, _) in enumerate(places)]
            for i, (q, _) in enumerate(places)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2 ** 32 - 1))
def test_visible_is_the_rule(seed):
    random = np.random.default_rng(seed)
    forest = random_forest(random, segments=12, longest=9)
    expected = np.array(rule(*forest))
    assert (flame.visible(*forest) == expected).all()


# --- attention

def attention(q, k, v, mask):
    """The definition in float64: [T, H, d], [T, Hkv, d], [T, Hkv, d], [T, T] -> [T, H, d]."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kernels", [flame.TWINS, flame.NATIVE], ids=["stretches", "extension"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_attention_is_that_under_the_mask_of_all_pairs(kernels, dtype, tolerance, seed):
    """Odd numbers of segments, tokens, heads; parents far back; rows of one to about thirty stretches."""
    random = np.random.default_rng(seed)
    lengths, parents = random_forest(random)
    share, kv_heads, dim = random.integers(1, 5), random.integers(1, 4), random.choice([2, 20, 64, 96])
    torch.manual_seed(seed)
    heads = share * kv_heads + 2 * kv_heads
    qkv = torch.randn(lengths.sum(), heads, dim).to(dtype)
    q, k, v = qkv.split((share * kv_heads, kv_heads, kv_heads), dim=1)  # views, as decode has them
    forest = flame.Forest(None, None, lengths.astype(np.int32), parents.astype(np.int32), None)
    expected = attention(q, k, v, torch.from_numpy(flame.visible(lengths, parents)))
    ours = kernels.attention(forest, torch.device("cpu"), int(share))(q, k, v)
    assert ours.shape == q.shape and ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


# --- one forest, or each string by itself

def forest_of(strings):
    """[(tokens, parent, is it a facet's end?)], one segment each."""
    lengths = np.array([len(tokens) for tokens, _, _ in strings], np.int32)
    parents = np.array([parent for _, parent, _ in strings], np.int32)
    answers = np.cumsum(lengths)[[answer for _, _, answer in strings]] - 1
    tokens = torch.tensor([token for tokens, _, _ in strings for token in tokens])
    depths = torch.from_numpy(flame.token_depths(lengths, parents))
    return flame.Forest(tokens, depths, lengths, parents, torch.from_numpy(answers))


@pytest.mark.parametrize("kernels", [flame.TWINS, flame.NATIVE], ids=["twins", "extension"])
def test_separate_passes_equal_one_forest(tiny_llm, kernels):
    """Each string alone; all in a row, nothing shared; flat facets; the trie: one result."""
    decoder = flame.load_decoder(tiny_llm, dtype=torch.float32)._replace(kernels=kernels)
    prefixes, facets = flame.tokenize(flame.load_tokenizer(tiny_llm), CAPTIONS[:5], "long")
    alone = [(p + f, -1, True) for p, fs in zip(prefixes, facets) for f in fs]
    expected = torch.cat([flame.decode(decoder, forest_of([string])) for string in alone]).view(5, 7, -1)
    flat = []
    for n, (prefix, questions) in enumerate(zip(prefixes, facets)):
        flat += [(prefix, -1, False)] + [(question, 8 * n, True) for question in questions]
    forests = [flame.caption_forest(prefixes, facets), forest_of(flat), forest_of(alone)]
    sizes = [len(forest.tokens) for forest in forests]
    assert sizes[0] < sizes[1] < sizes[2]
    for forest in forests:
        assert centered_error(flame.decode(decoder, forest).view(5, 7, -1), expected) <= 1e-5


# --- positions

PREFIX, FACETS = [1, 2, 3], [[4, 5], [4, 6, 7], [8]]


@pytest.mark.parametrize("make, strings, numbers", [
    (flame.caption_forest, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 8]],
     [range(5), range(6), range(4)]),
    (released.caption_forest, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 8]],
     [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [0, 1, 2, 8]]),
    (functools.partial(flame.caption_forest, positions="causal"),
     [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 4, 6, 7], [1, 2, 3, 4, 5, 4, 6, 7, 8]],
     [range(5), range(8), range(9)])])
def test_what_a_facet_sees_and_at_which_positions(make, strings, numbers):
    forest = make([PREFIX], [FACETS])
    seen = flame.visible(forest.lengths, forest.parents)[forest.answers.numpy()]
    assert [forest.tokens[mask].tolist() for mask in seen] == strings
    assert [forest.positions[mask].tolist() for mask in seen] == [list(row) for row in numbers]


# --- packed rows

def test_packed_rows_are_few_and_about_equally_long(byte_llm):
    encoder, random = flame.TextEncoder(byte_llm, dtype=torch.float32, budget=4000), np.random.default_rng()
    for many in (1, 2, 60):
        captions = ["a cat and " * n for n in random.integers(0, 60, many)]
        prefixes, suffixes = flame.tokenize(encoder.tokenizer, captions, "long")
        sizes = [len(p) + sum(map(len, fs)) for p, fs in zip(prefixes, suffixes)]
        packs = [rows for rows, _ in encoder.pack(captions, "long")]
        assert sorted(sum(packs, [])) == list(range(many)) and len(packs) <= -(-sum(sizes) // 4000)
        filled = [sum(sizes[i] for i in rows) for rows in packs]
        assert max(filled) <= 4000 + max(sizes) and max(filled) - min(filled) <= 2 * max(sizes)


def test_an_embedding_does_not_depend_on_its_company(tiny_llm):
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    together = encoder.encode(CAPTIONS, "short")
    alone = torch.cat([encoder.encode([caption], "short") for caption in CAPTIONS])
    assert together.shape == (len(CAPTIONS), 3, 48) and together.dtype == torch.float32
    assert centered_error(together, alone) <= 1e-5
    encoder.budget = 300
    assert centered_error(encoder.encode(CAPTIONS, "short"), alone) <= 1e-5
    assert encoder.encode([], "short").shape == (0, 3, 48)
    with pytest.raises(ValueError, match="list of str"):
        encoder.encode("a caption", "short")


def test_memory_of_a_long_row_is_linear(byte_llm):
    """16,384 packed tokens: the twins and the extension take less than a byte for every pair, 256 MiB."""
    grown, tokens = memory_grown(f"""
encoder = flame.TextEncoder({str(byte_llm)!r}, dtype=torch.float32, budget=40000)
words = "a very long description of nearly nothing, word after word. "
captions = [f"Number {{n}}: " + words * n for n in range(18)]
encoder.encode(captions[:2])
((_, forest),) = encoder.pack(captions)
""", """
for kernels in (flame.TWINS, flame.NATIVE):
    flame.decode(encoder.decoder._replace(kernels=kernels), forest)
""", "len(forest.tokens)")
    assert tokens > 16384 and grown < 16384 ** 2
