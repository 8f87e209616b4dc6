"""flame.py against references: transformers, open_clip, torchvision, mistral-common, and slow twins."""
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, settings, strategies as st

import flame
from data import cache, released

CAPTIONS = [
    "A red kite flies above a calm sea at sunset, with a small boat to its left.", "A cat.", "",
    'He said "(hello)" to the dog?', '"Quoted"', "5 × 3 = 15?", "一只红色的风筝在海上飞。",
    "Une très longue promenade " * 12, "a\u0301 🦊\tand  two  spaces", "A cat."]


def centered_error(ours, reference):
    """Largest error relative to the largest value, the mean over texts (dim 0) subtracted.

    One dimension carries 0.8 of an LLM state's norm and is nearly the same for all texts: it hides all else.
    """
    mean = reference.mean(0)
    return ((ours - reference).abs().max() / (reference - mean).abs().max()).item()


def centered_cosine(ours, reference):
    """[N, K], the cosines of [N, K, D] after the reference's mean over texts is subtracted from both."""
    mean = reference.mean(0)
    return torch.cosine_similarity(ours - mean, reference - mean, dim=-1)


@functools.lru_cache
def their_tokenizer(llm_dir):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_file=str(llm_dir / "tokenizer.json"))


@functools.lru_cache
def separate_passes(llm_dir, prompts, layer):
    """The oracle, float32 [N, K, D]: K whole strings a caption, each run alone by transformers, causally."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32).eval()
    tokenizer = their_tokenizer(llm_dir)
    template, facets = flame.PROMPTS[prompts]
    out = []
    for caption in CAPTIONS:
        prefix = template.replace("{}", flame.clean(caption))
        states = []
        for facet in facets:
            ids = torch.tensor([tokenizer(prefix + " " + facet).input_ids])
            with torch.no_grad():
                hidden = model(ids, output_hidden_states=True).hidden_states
            states.append(hidden[layer][0, -1])
        out.append(torch.stack(states))
    return torch.stack(out)


@pytest.fixture(params=["extension", "pytorch"])
def path(request, monkeypatch):
    """Runs a test on the native path and on its PyTorch twin."""
    if request.param == "pytorch":
        monkeypatch.setattr(flame, "flame_ext", None)
    else:
        assert flame.flame_ext, "flame_ext is not built"
    return request.param


# --- prompts and tokens

our_tokenizer = functools.lru_cache(flame.load_tokenizer)


@pytest.mark.parametrize("caption, cleaned", [
    ("A cat", "A cat."), ("A cat.", "A cat."), ("A cat?", "A cat."), (' say "hi" ', "say 'hi'"),
    ("it's 'so'", "it's 'so'"), ("", "."), ("Really?!", "Really?!.")])
def test_clean(caption, cleaned):
    assert flame.clean(caption) == cleaned


def test_prompt_sets_are_the_papers():
    assert [len(flame.PROMPTS[name].facets) for name in ("raw", "short", "long")] == [1, 3, 7]
    assert len(flame.COLUMNS) == 11
    questions = flame.PROMPTS["long"].facets
    assert questions[:3] == flame.PROMPTS["short"].facets
    assert questions[3] == 'the category of the minor object in this image means in just one word:"'


@settings(max_examples=100, deadline=None)
@given(caption=st.text(max_size=40), prompts=st.sampled_from(["raw", "short", "long"]))
def test_pieces_have_the_ids_of_the_whole_string(llm, caption, prompts):
    tokenizer, reference = our_tokenizer(llm), their_tokenizer(llm)
    (prefix,), (facets,) = flame.tokenize(tokenizer, [caption], prompts)
    for facet, text in zip(facets, flame.PROMPTS[prompts].facets, strict=True):
        whole = flame.PROMPTS[prompts].prefix.replace("{}", flame.clean(caption)) + " " + text
        assert prefix + facet == reference(whole).input_ids == tokenizer.encode(whole)


def test_unstable_piece_boundaries_are_noticed():
    """A tokenizer of two-letter tokens: where a facet's tokens begin depends on the caption's length."""
    def encode(text):
        return [ord(a) * 5000 + ord(b) for a, b in zip(text[::2], text[1::2] + " ")]

    tokenizer = flame.Tokenizer(encode, lambda texts: [encode(t) for t in texts], None)
    for caption in ("A cat.", "A cats."):
        (prefix,), (facets,) = flame.tokenize(tokenizer, [caption], "long")
        for facet, text in zip(facets, flame.PROMPTS["long"].facets, strict=True):
            assert prefix + facet == encode(flame.PROMPTS["long"].prefix.replace("{}", caption) + " " + text)


def test_sentencepiece_tokenizer(tmp_path):
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    file = sorted((Path(mistral_common.__file__).parent / "data").glob("tokenizer.model.v1*"))[0]
    shutil.copy(file, tmp_path / "tokenizer.model")
    ours, reference = flame.load_tokenizer(tmp_path), SentencePieceTokenizer(file)
    for caption in CAPTIONS:
        prompts = flame.PROMPTS["long"]
        text = prompts.prefix.replace("{}", flame.clean(caption)) + " " + prompts.facets[0]
        assert ours.encode(text) == reference.encode(text, bos=True, eos=False)
        (prefix,), (facets,) = flame.tokenize(ours, [caption], "long")
        assert prefix + facets[0] == ours.encode(text)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert flame.load_tokenizer(tmp_path).encode("A cat") == reference.encode("A cat", bos=False, eos=False)


# --- the forest

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(sequences)
def test_forest_is_the_trie(rows):
    forest = flame.build_forest(rows)
    prefixes = {tuple(row[:n + 1]) for row in rows for n in range(len(row))}
    assert len(forest.tokens) == forest.lengths.sum() == len(prefixes)  # nothing is held twice
    mask = flame.visible(forest)
    for row, answer in zip(rows, forest.answers.tolist(), strict=True):
        seen = np.flatnonzero(mask[answer])
        order = forest.positions[seen].argsort()
        assert forest.tokens[seen][order].tolist() == row  # an answer sees its own string and nothing else
        assert forest.positions[seen][order].tolist() == list(range(len(row)))


@settings(max_examples=100, deadline=None)
@given(sequences, st.data())
def test_forest_with_positions(rows, data):
    where = [data.draw(st.lists(st.integers(0, 2), min_size=len(row), max_size=len(row))) for row in rows]
    forest = flame.build_forest(rows, where)
    prefixes = {tuple(zip(row, p))[:n + 1] for row, p in zip(rows, where) for n in range(len(row))}
    assert len(forest.tokens) == len(prefixes)
    mask = flame.visible(forest)[forest.answers.numpy()]
    for row, p, seen in zip(rows, where, mask, strict=True):
        assert forest.tokens[seen].tolist() == row and forest.positions[seen].tolist() == p


def test_forest_of_captions_shares_what_it_can(llm):
    prefixes, facets = flame.tokenize(flame.load_tokenizer(llm), ["A cat.", "A dog.", "A cat."], "long")
    forest = flame.caption_forest(prefixes, facets)
    assert forest.parents.tolist().count(-1) == 1            # the template's opening is one root
    assert forest.answers[:7].equal(forest.answers[14:])     # equal captions are one branch
    assert len(forest.tokens) < 0.5 * sum(len(p) + len(f) for p, fs in zip(prefixes, facets) for f in fs)


# --- the decoder

@pytest.mark.parametrize("prompts", ["raw", "short", "long"])
def test_one_pass_equals_separate_passes_smollm2(llm, path, prompts):
    ours = flame.TextEncoder(llm, dtype=torch.float32).encode(CAPTIONS, prompts)
    reference = separate_passes(llm, prompts, layer=29)
    assert centered_error(ours, reference) <= 1e-4


RANDOM_MODELS = [
    dict(), dict(family="Mistral", head_dim=32, sliding_window=None), dict(num_key_value_heads=1),
    dict(num_key_value_heads=4, tie_word_embeddings=True), dict(max_shard_size="2MB"),
    dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)]


@pytest.mark.parametrize("config", RANDOM_MODELS, ids=str)
def test_one_pass_equals_separate_passes_random_models(make_random_llm, path, config):
    folder = make_random_llm(**config)
    for layer in (None, 1, 4):
        encoder = flame.TextEncoder(folder, dtype=torch.float32, layer=layer, budget=500)
        ours = encoder.encode(CAPTIONS, "long")
        reference = separate_passes(folder, "long", layer or 3)
        if layer == 4:  # transformers puts the final norm on the last hidden state
            weight = flame.weights_reader(folder)[0]("model.norm.weight")
            ours = ours * torch.rsqrt(ours.square().mean(-1, keepdim=True) + 1e-6) * weight
        assert centered_error(ours, reference) <= 1e-4


def test_bfloat16_keeps_the_centered_states(llm, path):
    places = ("in the snow", "on a beach at night")
    things = [f"{size} {thing}" for size in ("tiny", "huge") for thing in ("fox", "lamp", "boat", "cake")]
    many = [f"A {thing} {place}." for thing in things for place in places]
    exact, rounded = (
        flame.TextEncoder(llm, dtype=dtype).encode(many, "long") for dtype in (torch.float32, torch.bfloat16))
    assert centered_cosine(rounded, exact).mean() >= 0.999


def test_embedding_does_not_depend_on_its_company(llm, path):
    encoder = flame.TextEncoder(llm, dtype=torch.float32)
    together = encoder.encode(CAPTIONS, "short")
    alone = torch.cat([encoder.encode([c], "short") for c in CAPTIONS])
    assert centered_error(together, alone) <= 1e-5
    encoder.budget = 1
    assert centered_error(encoder.encode(CAPTIONS, "short"), alone) <= 1e-6


def test_sharing_changes_nothing(tiny_llm, path):
    """The trie, the same without a shared root, flat facets, and nothing shared at all: one result."""
    decoder = flame.load_decoder(tiny_llm, dtype=torch.float32)
    prefixes, facets = flame.tokenize(flame.load_tokenizer(tiny_llm), CAPTIONS[:5], "long")

    def forest(strings):
        """[(tokens, parent, is it a facet's end?)], one segment each."""
        lengths = np.array([len(tokens) for tokens, _, _ in strings], np.int32)
        parents = np.array([parent for _, parent, _ in strings], np.int32)
        ends = np.cumsum(lengths) - 1
        positions = torch.from_numpy(flame.token_depths(lengths, parents))
        packed = torch.tensor([token for tokens, _, _ in strings for token in tokens])
        answers = torch.tensor([end for end, (_, _, answer) in zip(ends, strings) if answer])
        return flame.Forest(packed, positions, lengths, parents, answers)

    nothing_shared = forest([(p + f, -1, True) for p, fs in zip(prefixes, facets) for f in fs])
    parts = []
    for n, (prefix, questions) in enumerate(zip(prefixes, facets)):
        parts += [(prefix, -1, False)] + [(question, 8 * n, True) for question in questions]
    flat = forest(parts)
    trie = flame.caption_forest(prefixes, facets)
    assert len(trie.tokens) < len(flat.tokens) < len(nothing_shared.tokens)
    expected = flame.decode(decoder, nothing_shared)
    for shared in (flat, trie):
        assert centered_error(flame.decode(decoder, shared).view(5, 7, -1), expected.view(5, 7, -1)) <= 1e-5


def test_packed_rows_are_few_and_about_equally_long(tiny_llm):
    encoder, random = flame.TextEncoder(tiny_llm, dtype=torch.float32, budget=900), np.random.default_rng()
    for many in (1, 2, 60):
        captions = ["a cat and " * n for n in random.integers(0, 60, many)]
        prefixes, suffixes = flame.tokenize(encoder.tokenizer, captions, "long")
        sizes = [len(p) + sum(map(len, fs)) for p, fs in zip(prefixes, suffixes)]
        packs = [rows for rows, _ in encoder.pack(captions, "long")]
        assert sorted(sum(packs, [])) == list(range(many)) and len(packs) <= -(-sum(sizes) // 900)
        filled = [sum(sizes[i] for i in rows) for rows in packs]
        assert max(filled) <= 900 + max(sizes) and max(filled) - min(filled) <= 2 * max(sizes)
    assert list(encoder.pack([], "long")) == []


GROWTH = """
from pathlib import Path
import flame, torch

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024  # MiB

weight = torch.randn(96, 48).bfloat16()
for rows in range(64, 1264):
    torch.nn.functional.linear(torch.randn(rows, 48).bfloat16(), weight)
    if rows == 264:
        before = memory()
print(memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory on Linux")
def test_packed_rows_of_any_length_do_not_fill_the_memory():
    """oneDNN keeps a kernel for every number of rows, 40 or 600 KiB as the CPU has it; flame bounds them."""
    folder = Path(flame.__file__).parent

    def growth(**bounds):
        environment = os.environ | bounds
        return float(subprocess.check_output([sys.executable, "-c", GROWTH], cwd=folder, env=environment))

    unbounded = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "9999")
    assert growth() < growth(**unbounded) / 8


def test_causal_facets_see_those_before_them(llm, path):
    """As one causal pass of transformers over caption and all questions: what FDA is measured against."""
    from transformers import AutoModelForCausalLM
    encoder = flame.TextEncoder(llm, dtype=torch.float32, positions="causal")
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    prefixes, facets = flame.tokenize(encoder.tokenizer, CAPTIONS, "long")
    reference = []
    for prefix, own in zip(prefixes, facets):
        ids = torch.tensor([prefix + sum(own, [])])
        ends = len(prefix) - 1 + np.cumsum([len(facet) for facet in own])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        reference.append(hidden[encoder.layer][0, torch.from_numpy(ends)])
    reference = torch.stack(reference)
    assert centered_error(encoder.encode(CAPTIONS), reference) < 1e-4
    decoupled = flame.TextEncoder(llm, dtype=torch.float32).encode(CAPTIONS)
    assert centered_error(decoupled[:, :1], reference[:, :1]) < 1e-4  # the first question sees no other
    assert centered_cosine(decoupled, reference)[:, 1:].max() < 0.999


def test_encode_calls_the_extension_in_every_kept_block(tiny_llm, monkeypatch):
    """4 blocks, 3 kept; each attends whole."""
    calls, original = [], flame.flame_ext.attention

    def attention(q, *rest):
        calls.append(len(q))
        return original(q, *rest)
    monkeypatch.setattr(flame.flame_ext, "attention", attention)
    flame.TextEncoder(tiny_llm).encode(["A cat.", "A dog."], "long")
    assert len(calls) == 3 and len(set(calls)) == 1


def test_memory_of_a_long_row_is_linear(tiny_llm):
    """16,384 packed tokens: encoding takes less than one byte for every pair of them, 256 MiB."""
    script = f"""if True:
        import re, torch, flame
        encoder = flame.TextEncoder({str(tiny_llm)!r}, dtype=torch.float32, budget=40000)
        words = "a very long description of nearly nothing, word after word. "
        captions = [f"Number {{n}}: " + words * n for n in (280, *range(1, 45))]
        encoder.encode(captions[1:3])
        def peak():  # ru_maxrss would begin at the parent's
            return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
        sizes, before = [], peak()
        decode = flame.decode
        flame.decode = lambda decoder, forest: sizes.append(len(forest.tokens)) or decode(decoder, forest)
        encoder.encode(captions)
        print(*sizes, peak() - before)"""
    here = Path(flame.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    tokens, peak = map(int, done.stdout.split())
    assert tokens > 16384 and peak < 16384 ** 2


def edit_json(file, **changes):
    entries = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(entries | changes, indent=3))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def without(name):
    return lambda folder: (folder / name).unlink()


def holding(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.fixture
def copy(tiny_llm, tmp_path):
    return shutil.copytree(tiny_llm, tmp_path / "llm")


@pytest.mark.parametrize("change, word", [
    (without("config.json"), "config.json"), (holding("config.json", "{"), "not JSON"),
    (without("model.safetensors"), "safetensors"),
    (holding("model.safetensors", "x" * 99), "model.safetensors"),
    (config(hidden_size=64, head_dim=12), "shape"), (config(model_type="gpt2"), "gpt2"),
    (config(num_hidden_layers=9), "layers.4"),
    (config(rope_scaling={"rope_type": "yarn"}, rope_parameters=None), "RoPE"),
    (without("tokenizer.json"), "tokenizer"), (holding("tokenizer.json", "{}"), "tokenizer.json")])
def test_broken_llm_folders_are_refused_by_name(copy, change, word):
    change(copy)
    with pytest.raises(flame.InputError, match=word) as error:
        flame.TextEncoder(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


# --- an LLM's name: what is read of it, no more and no less

def test_fingerprint_tells_models_apart(make_random_llm, tiny_llm, copy):
    assert flame.llm_fingerprint(tiny_llm) == flame.llm_fingerprint(copy)
    assert flame.llm_fingerprint(tiny_llm) != flame.llm_fingerprint(make_random_llm(seed=1))


def split_weights(folder):
    """model.safetensors as two shards with an index."""
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    for part in (0, 1):
        save_file(dict(list(weights.items())[part::2]), folder / f"part-{part}.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(weights)}
    edit_json(folder / "model.safetensors.index.json", weight_map=names)


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint_ignores_what_is_not_read(copy, whole):
    if not whole:
        split_weights(copy)
    before = flame.llm_fingerprint(copy)
    edit_json(copy / "config.json", transformers_version="9.9", torch_dtype="float16", bos_token_id=7)
    (copy / "consolidated.safetensors").write_bytes(b"another format of the same weights")
    (copy / "tokenizer.model").write_bytes(b"where there is a tokenizer.json, nobody reads this")
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": false}')  # goes with tokenizer.model only
    assert flame.llm_fingerprint(copy) == before
    flame.TextEncoder(copy)


@pytest.mark.parametrize("change", [
    dict(rms_norm_eps=1e-3), dict(max_position_embeddings=300), dict(num_key_value_heads=4),
    dict(model_type="mistral"),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 77.0})], ids=str)
def test_fingerprint_notices_what_config_decides(copy, change):
    before = flame.llm_fingerprint(copy)
    edit_json(copy / "config.json", **change)
    assert flame.llm_fingerprint(copy) != before


def test_fingerprint_notices_the_tokenizer_and_its_settings(copy):
    import mistral_common
    found = {flame.llm_fingerprint(copy)}
    edit_json(copy / "tokenizer.json", normalizer={"type": "Lowercase"})
    found.add(flame.llm_fingerprint(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(flame.InputError, match="no tokenizer.json"):
        flame.llm_fingerprint(copy)
    published = sorted((Path(mistral_common.__file__).parent / "data").glob("tokenizer.model.v1*"))[0]
    shutil.copy(published, copy / "tokenizer.model")
    found.add(flame.llm_fingerprint(copy))
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    found.add(flame.llm_fingerprint(copy))
    assert len(found) == 4


# --- the image side

CONFIG = dict(
    image_size=32, patch_size=8, width=48, layers=3, heads=4, projector_hidden=40, text_dim=24,
    pool_first=False, text_rank=0)


def test_vit_equals_open_clip():
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    reference = VisionTransformer(
        image_size=32, patch_size=8, width=48, layers=3, heads=4, mlp_ratio=4, output_dim=16,
        output_tokens=True).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.3)
    reference.ln_post = torch.nn.Identity()
    ours = flame.VisionTransformer(32, 8, 48, 3, 4)
    missing = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys == ["proj"]
    pixels = torch.randn(2, 3, 32, 32)
    _, tokens = reference(pixels)  # patch tokens before ln_post
    with torch.no_grad():
        assert centered_error(ours(pixels)[:, 1:].flatten(0, 1), tokens.flatten(0, 1)) <= 1e-4


@pytest.mark.parametrize("pool_first", [False, True])
def test_projection_and_pooling(pool_first):
    """Every patch token is projected and then averaged, or, pool_first, averaged and then projected."""
    torch.manual_seed(0)
    model = flame.Flame(CONFIG | {"pool_first": pool_first})
    pixels = torch.randn(2, 3, 32, 32)
    tokens = model.visual(pixels)[:, 1:]
    expected = torch.stack([model.mm(t) for t in tokens.unbind(1)]).mean(0)
    if pool_first:
        expected = model.mm(tokens.mean(1))
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model.encode_image(pixels), expected)


def some_picture(height, width):
    from PIL import Image
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(50, 80), (81, 50), (32, 32), (20, 31), (33, 97)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocess_equals_torchvision(size, mode):
    from torchvision import transforms as T
    image = some_picture(*size).convert(mode)
    reference = T.Compose([
        T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
        T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])
    torch.testing.assert_close(flame.Flame(CONFIG).preprocess(image), reference(image.convert("RGB")))


def test_similarity_is_the_mean_cosine_over_facets():
    image, facets = torch.randn(4, 24), torch.randn(3, 7, 24)
    ours = flame.similarity(image, facets)
    for n in range(3):
        for m in range(4):
            cosines = [torch.cosine_similarity(facets[n, k], image[m], dim=0) for k in range(7)]
            torch.testing.assert_close(ours[n, m], torch.stack(cosines).mean())


def test_text_projection_is_its_formula():
    torch.manual_seed(0)
    projection = flame.TextProjection(24, rank=5)
    for buffer in projection.buffers():
        torch.nn.init.normal_(buffer)
    facets, columns = torch.randn(3, 7, 24), [4, 5, 6, 7, 8, 9, 10]
    ours = projection(facets, columns)
    for n in range(3):
        for k, c in enumerate(columns):
            A = projection.rest[c] * torch.eye(24)
            A = A + projection.basis[c] @ torch.diag(projection.gain[c]) @ projection.basis[c].T
            expected = A @ (facets[n, k] / facets[n, k].norm() - projection.mean[c])
            torch.testing.assert_close(ours[n, k], expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_encode_text_uses_the_columns_of_its_prompt_set():
    model = flame.Flame(CONFIG)
    torch.nn.init.normal_(model.text.mean)
    facets = torch.randn(2, 3, 24)
    torch.testing.assert_close(model.encode_text(facets, "short"), model.text(facets, [1, 2, 3]))
    with pytest.raises(ValueError, match="long"):
        model.encode_text(facets, "long")


# --- the cache's keys change by themselves with the code that makes what is kept

@pytest.mark.parametrize("module", [flame, released, cache], ids=lambda module: module.__name__)
def test_cache_keys_change_with_the_code(tmp_path, monkeypatch, module):
    """A caption's and a picture's, with any byte of the files that say how a tower works."""
    model, prompts = flame.Flame(CONFIG), flame.PROMPTS["raw"]

    def keys():
        cache.code.cache_clear()
        return cache.text_key("llm", prompts, "A cat."), cache.image_tower_name(model, torch.float32)
    text, image = keys()
    assert keys() == (text, image)
    for file in (flame.__file__, released.__file__, cache.__file__):
        (tmp_path / Path(file).name).write_bytes(Path(file).read_bytes())
    own = tmp_path / Path(module.__file__).name
    monkeypatch.setattr(flame, "__file__", str(tmp_path / "flame.py"))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))  # released.py lies beside it
    assert keys() == (text, image)
    own.write_bytes(own.read_bytes() + b"#")
    assert keys()[0] != text and keys()[1] != image
    cache.code.cache_clear()


# --- what people pass

def test_encode_takes_a_string_as_one_caption(tiny_llm):
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    alone = encoder.encode(["a dog"], "raw")
    assert encoder.encode("a dog", "raw").equal(alone)
    assert encoder.encode(("a dog",), "raw").equal(alone) and len(encoder.encode([], "raw")) == 0
    ((rows, states),) = encoder.encode_batches("a dog", "raw")
    assert rows == [0] and states.equal(alone)


def test_encode_says_which_captions_and_prompts_it_wants(tiny_llm):
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    every = (
        encoder.encode,
        lambda *args: list(encoder.encode_batches(*args)),
        lambda *args: list(encoder.pack(*args)))
    for encode in every:
        for captions, word in (
                (3, "int"), (None, "NoneType"), ({"a dog"}, "set"), ([["a dog"]], "list"),
                (["a dog", b"bytes"], "captions\\[1\\] .* bytes")):
            with pytest.raises(ValueError, match=f"str.*{word}"):
                encode(captions, "raw")
    every += (
        lambda *args: flame.tokenize(encoder.tokenizer, *args),
        lambda _, prompts: flame.Flame(CONFIG).encode_text(torch.randn(1, 1, 24), prompts))
    for encode in every:
        for prompts in ("middle", None, ["raw"]):
            with pytest.raises(ValueError, match="raw, short, long"):
                encode(["a dog"], prompts)


@pytest.fixture
def picture(tmp_path):
    picture = some_picture(40, 50)
    picture.save(tmp_path / "fox.png")
    return picture, tmp_path / "fox.png"


def test_encode_image_takes_tensors_pictures_paths_and_lists_of_them(picture):
    model, (image, file) = flame.Flame(CONFIG).eval(), picture
    pixels = model.preprocess(image)
    assert model.preprocess(file).equal(pixels) and model.preprocess(str(file)).equal(pixels)
    expected = model.encode_image(pixels[None])
    for one in (pixels, image, file, str(file), pixels[None].double()):
        assert model.encode_image(one).equal(expected)
    several = model.encode_image([pixels, image, file, str(file)])
    torch.testing.assert_close(several, expected.expand(4, -1))
    assert model.encode_image((image, file)).shape == (2, 24)


WRONG_SHAPES = [(2, 3, 64, 64), (2, 1, 32, 32), (32, 32), (32, 32, 3), (2, 3, 33, 33)]


@pytest.mark.parametrize("wrong, word", [
    *((torch.zeros(shape), str(list(shape))[1:-1]) for shape in WRONG_SHAPES),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8"), ([torch.zeros(3, 32, 31)], "3, 32, 31"),
    ([], "empty"), ([3], "int"), (None, "NoneType"), (np.zeros((32, 32, 3)), "ndarray"),
    (Image.new("RGB", (0, 0)), "0 x 0")], ids=str)
def test_encode_image_says_what_it_wants(wrong, word):
    for model in (flame.Flame(CONFIG), flame.Flame(CONFIG).eval()):
        with pytest.raises(ValueError, match=f"{word}") as error:
            model.encode_image(wrong)
        assert "picture" in str(error.value) or "[B, 3, 32, 32]" in str(error.value)


def test_a_picture_that_would_fill_the_memory_is_an_os_error(tmp_path, monkeypatch):
    some_picture(40, 50).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="bomb.png"):
        flame.Flame(CONFIG).preprocess(tmp_path / "bomb.png")


def test_encode_text_and_similarity_say_what_they_want():
    model = flame.Flame(CONFIG)
    shapes = (2, 7, 23), (7, 24), (2, 3, 24)
    for wrong in (*map(torch.zeros, shapes), np.zeros((2, 7, 24)), None):
        with pytest.raises(ValueError, match=r"\[N, 7, 24\].*'long'"):
            model.encode_text(wrong, "long")
    one, two = torch.zeros(1, 24), torch.zeros(2, 7, 24)
    for image, facets in ((one[0], two), (one, two[0]), (one, two[..., 1:])):
        with pytest.raises(ValueError, match=r"\[M, D\].*\[N, K, D\]"):
            flame.similarity(image, facets)


def test_gradients_are_kept_in_training_only(picture):
    model, facets = flame.Flame(CONFIG | {"text_mapped": ["long.2"]}), torch.randn(2, 7, 24)
    pixels = torch.randn(2, 3, 32, 32)

    def encoded():
        return model.encode_image(pixels), model.encode_text(facets)
    assert model(pixels).requires_grad and all(x.requires_grad for x in encoded())
    with torch.no_grad():
        assert not any(x.requires_grad for x in (model(pixels), *encoded()))
    model.eval()
    assert not any(x.requires_grad for x in encoded())
    assert model.encode_image(picture[0]).numpy().shape == (1, 24)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    from safetensors.torch import save_file
    with pytest.raises(flame.InputError, match="config.json"):
        flame.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG, "llm": {}}))
    with pytest.raises(flame.InputError, match="model.safetensors"):
        flame.load(tmp_path)
    model = flame.Flame(CONFIG)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, tensor in flame.load(tmp_path).state_dict().items():
        assert tensor.equal(model.state_dict()[name])
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG | {"width": 24}, "llm": {}}))
    with pytest.raises(flame.InputError, match="do not make a model"):
        flame.load(tmp_path)
