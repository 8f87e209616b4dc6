"""Compares both towers with other implementations, on random weights and on the real SmolLM2: transformers,
sentencepiece, mistral-common, open_clip and torchvision, FLAME's released code.
"""
import functools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flame
from conftest import CAPTIONS, centered_cosine, centered_error, memory_grown
from data import compat


# --- hidden states

@functools.lru_cache
def transformers_tokenizer(llm_dir):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_file=str(llm_dir / "tokenizer.json"))


@functools.lru_cache(1)
def transformers_model(llm_dir, **settings):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32, **settings).eval()


@functools.lru_cache
def transformers_states(llm_dir, prompts, layer, captions=tuple(CAPTIONS)):
    """Return float32 [N, K, D] by transformers: one causal pass for each of the K strings of a caption."""
    model = transformers_model(llm_dir)
    template, facets = flame.PROMPTS[prompts]
    out = []
    for caption in captions:
        prefix = template.replace("{}", flame.clean_caption(caption))
        for facet in facets:
            ids = torch.tensor([transformers_tokenizer(llm_dir)(f"{prefix} {facet}").input_ids])
            with torch.no_grad():
                out.append(model(ids, output_hidden_states=True).hidden_states[layer][0, -1])
    return torch.stack(out).unflatten(0, (len(captions), -1))


@pytest.fixture(params=["flame_ext", "pytorch"])
def kernels(request, monkeypatch):
    """Run a test with flame_ext's kernels and with the PyTorch reference implementation."""
    if request.param == "pytorch":
        monkeypatch.setattr(flame, "flame_ext", None)
    else:
        assert flame.flame_ext, "flame_ext is not built"
    return flame.EXT_KERNELS if request.param == "flame_ext" else flame.TORCH_KERNELS


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=500000.0)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
UNSCALED = dict(rope_type="default", rope_theta=1e6)
SHARDED = dict(max_shard_size="2MB")
LLAMA, QWEN2, QWEN3 = "Llama 2 (no GQA)", "Qwen2 (bias)", "Qwen3 (QK norm)"
GEMMA = "Gemma 3 (two RoPEs)"
DECODERS = {
    LLAMA: dict(num_key_value_heads=4),
    "Llama 3.1": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, rope_parameters=LLAMA3),
    "Llama, linear RoPE, tied": dict(rope_parameters=LINEAR, tie_word_embeddings=True),
    "Mistral-7B v0.1 (sliding window)": dict(family="Mistral", sliding_window=600),
    "Mistral-Nemo": dict(family="Mistral", head_dim=20, num_key_value_heads=1, sliding_window=None,
                         rope_parameters=UNSCALED, **SHARDED),
    QWEN2: dict(family="Qwen2", num_key_value_heads=2),
    "Qwen2.5": dict(family="Qwen2", num_key_value_heads=1, tie_word_embeddings=True, **SHARDED),
    QWEN3: dict(family="Qwen3", head_dim=20),
    GEMMA: dict(
        family="Gemma3", head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=25, sliding_window=600,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def make_llm(make_random_llm):
    """Return make_llm(name) -> folder of one of DECODERS with random weights."""
    @functools.lru_cache
    def make(name):
        folder = make_random_llm(**DECODERS[name])
        for file in folder.glob("*.safetensors"):  # transformers initializes biases to 0, norms to 1 or 0
            random = {name: torch.randn_like(x) for name, x in load_file(file).items()
                      if name.endswith(("bias", "norm.weight"))}
            save_file(load_file(file) | random, file, {"format": "pt"})
        return folder
    return make


@pytest.fixture
def copy_llm(make_llm, tmp_path):
    """Return copy_llm(name) -> copy of that LLM's folder, which a test may edit."""
    return lambda name=LLAMA: shutil.copytree(make_llm(name), tmp_path / "llm")


@pytest.mark.parametrize("name, layer", [(LLAMA, 1), *((name, None) for name in DECODERS)])
def test_hidden_states_equal_transformers(make_llm, kernels, name, layer):
    llm_dir = make_llm(name)
    assert ("max_shard_size" in DECODERS[name]) == (llm_dir / "model.safetensors.index.json").exists()
    encoder = flame.TextEncoder(llm_dir, dtype=torch.float32, layer=layer, max_tokens=500)
    assert encoder.kernels == kernels.name
    assert centered_error(encoder.encode(CAPTIONS), transformers_states(llm_dir, "long", layer or 3)) <= 1e-4


@pytest.mark.parametrize("prompts", ["raw", "long"])
def test_smollm2_hidden_states_equal_transformers(llm, kernels, prompts):
    captions = tuple(CAPTIONS[:4])
    encoder = flame.TextEncoder(llm, dtype=torch.float32)
    assert encoder.kernels == kernels.name
    expected = transformers_states(llm, prompts, 29, captions)
    assert centered_error(encoder.encode(captions, prompts), expected) <= 1e-4


def test_bfloat16_preserves_centered_hidden_states(llm, kernels):
    captions = [f"A {size} {thing} {place}." for size in ("tiny", "huge") for thing in ("fox", "cake")
                for place in ("in the snow", "on a beach at night")]
    encoders = [flame.TextEncoder(llm, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert encoders[0].kernels == kernels.name
    rounded, expected = (encoder.encode(captions, "long") for encoder in encoders)
    assert centered_cosine(rounded, expected).mean() >= 0.999


def edit_json(file, **changes):
    """Change entries of a JSON file, or create it. None removes an entry."""
    entries = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


LLAMA_3_2 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("rope", [
    dict(rope_theta=5e5), dict(rope_scaling={"type": "linear", "factor": 4.0}),
    dict(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA_3_2.items() if k != "rope_theta"}),
    dict(rope_parameters=UNSCALED), dict(rope_parameters=LINEAR), dict(rope_parameters=LLAMA_3_2)], ids=str)
def test_rope_settings_in_all_config_formats(copy_llm, rope):
    """transformers 5 has rope_parameters; 4 has rope_theta, and rope_scaling with "type" or "rope_type"."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    llm_dir = copy_llm()
    edit_json(llm_dir / "config.json", head_dim=128, **{"rope_parameters": None} | rope)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(llm_dir)).inv_freq
    torch.testing.assert_close(flame.llm_config(llm_dir)["inv_freq"][0].float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", [
    dict(rope_parameters=None, rope_local_base_freq=500, rope_theta=2e6, layer_types=None,
         sliding_window_pattern=2),
    dict(rope_parameters=None, rope_scaling=dict(rope_type="linear", factor=4.0)),
    dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=UNSCALED))], ids=str)
def test_gemma_rope_settings_in_all_config_formats(copy_llm, rope):
    llm_dir = copy_llm(GEMMA)
    edit_json(llm_dir / "config.json", **rope)
    ours = flame.TextEncoder(llm_dir, dtype=torch.float32).encode(CAPTIONS[:3], "short")
    assert centered_error(ours, transformers_states(llm_dir, "short", 3, tuple(CAPTIONS[:3]))) <= 1e-4


# --- context length, memory

@pytest.mark.parametrize("changes, context_length", [
    (dict(model_type="mistral", sliding_window=4096), 4096),   # Mistral-7B v0.1
    (dict(model_type="mistral", sliding_window=0), 32768),     # v0.2 and v0.3 (which have null)
    (dict(model_type="mistral"), 4096),                        # transformers' default
    (dict(model_type="qwen2", sliding_window=300, use_sliding_window=False), 32768),
    (dict(model_type="qwen2", sliding_window=300, use_sliding_window=True), 300),
    (dict(model_type="llama", sliding_window=300), 32768),
    (dict(model_type="gemma3_text", sliding_window=512, hidden_act=None, rope_parameters=None), 512),
], ids=str)
def test_context_length_is_minimum_of_positions_and_sliding_window(copy_llm, changes, context_length):
    llm_dir = copy_llm()
    edit_json(llm_dir / "config.json", max_position_embeddings=32768, **changes)
    assert flame.llm_config(llm_dir)["context_length"] == context_length


def test_long_caption_is_truncated_to_sliding_window(make_random_llm):
    """The prompts stay whole, and transformers, which applies the window, gives the same hidden states."""
    llm_dir = make_random_llm(family="Mistral", sliding_window=200)
    encoder, model = flame.TextEncoder(llm_dir, dtype=torch.float32), transformers_model(llm_dir)
    captions = ["A fox.", "A fox asks (it is late): where is the lamp of the house at the sea? " * 20]
    (_, forest), = encoder.pack(captions, "long")
    assert encoder.truncated == 1
    seen = flame.attention_mask(forest.lengths, forest.parents)[forest.last_tokens.numpy()]
    strings = [forest.tokens[mask].tolist() for mask in seen]
    before, after = flame.PROMPTS["long"].prefix.split("{}")
    states = []
    for n, (ids, facet) in enumerate(zip(strings, flame.PROMPTS["long"].facets * 2, strict=True)):
        text = encoder.tokenizer.decode(ids)
        assert len(ids) <= 200 and text.startswith(before) and text.endswith(f"{after} {facet}")
        kept = text.removeprefix(before).removesuffix(f"{after} {facet}")
        assert kept == "A fox." if n < 7 else captions[1].startswith(kept[:-1]) and len(kept) > 80
        with torch.no_grad():
            states.append(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, -1])
    reference = torch.stack(states).unflatten(0, (2, 7))
    assert centered_error(encoder.encode(captions, "long"), reference) <= 1e-4


def test_very_long_caption_is_shortened_before_tokenization(make_random_llm):
    encoder = flame.TextEncoder(make_random_llm(family="Mistral", sliding_window=200), dtype=torch.float32)
    long = "A fox asks: where is the lamp of the house at the sea? " * 100_000
    expected = encoder.encode([long[:3200]], "long")
    tokenized = []  # number of characters in each call

    def tokenize(tokenizer, captions, prompts):
        tokenized.append(sum(map(len, captions)))
        return flame.tokenize(tokenizer, captions, prompts)
    encoder.tokenize = tokenize
    assert encoder.encode([long], "long").equal(expected) and encoder.truncated == 2
    assert max(tokenized) <= 16 * 200 and len(tokenized) < 20


def test_too_short_context_or_too_small_embedding_table_raises_error(make_random_llm):
    with pytest.raises(flame.InputError, match="context of 30 tokens is too short for the long prompts"):
        flame.TextEncoder(make_random_llm(max_position_embeddings=30)).encode(["A fox."], "long")
    with pytest.raises(flame.InputError, match="tokenizer has more tokens than the embedding table"):
        flame.TextEncoder(make_random_llm(vocab_size=1000)).encode(["A fox."], "long")


def test_kernel_cache_of_onednn_is_bounded():
    """oneDNN caches a kernel of 40 or 600 KiB (depending on the CPU) for each number of rows."""
    def memory(**environment):
        loop = "for rows in range({}): torch.nn.functional.linear(torch.randn(rows, 48).bfloat16(), weight)"
        setup = "weight = torch.randn(96, 48).bfloat16()\n" + loop.format("64, 264")
        return next(memory_grown(setup, loop.format("264, 1264"), **environment))

    unbounded = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "9999")
    assert memory() < memory(**unbounded) / 8


# --- errors in LLM folders

def edit_config(**changes):
    return lambda llm_dir: edit_json(llm_dir / "config.json", **changes)


def set_file(name, text):
    def write(llm_dir):
        (llm_dir / name).unlink(missing_ok=True)
        if text is not None:
            (llm_dir / name).write_text(text)
    return write


def edit_tensors(change):
    """change(name, tensor) returns the new tensor, or None to remove it."""
    def write(llm_dir):
        changed = {name: change(name, x) for name, x in load_file(llm_dir / "model.safetensors").items()}
        changed = {name: x for name, x in changed.items() if x is not None}
        save_file(changed, llm_dir / "model.safetensors", {"format": "pt"})
    return write


BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize("name, change, message", [
    (LLAMA, edit_config(model_type="gemma2"),
     "config.json: .*gemma2.*llama, mistral, qwen2, qwen3, gemma3_text"),
    (GEMMA, edit_config(use_bidirectional_attention=True), "config.json: bidirectional attention"),
    (GEMMA, edit_config(layer_types=["full_attention"]), "config.json: IndexError"),
    (LLAMA, edit_config(model_type="qwen3"), "no tensor model.layers.0.self_attn.q_norm.weight"),
    (QWEN2, edit_config(model_type="llama"), "tensor .*bias is unknown in a llama layer"),
    (QWEN3, edit_config(model_type="llama"), "layers.0.self_attn.k_norm.weight is unknown in a llama layer"),
    (LLAMA, edit_config(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn.*default, linear, llama3"),
    (LLAMA, edit_config(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=4.0)), "dynamic"),
    (LLAMA, edit_config(rope_parameters=dict(rope_type="linear")), "config.json: no 'factor'"),
    (LLAMA, edit_config(hidden_act="gelu"), "config.json: hidden_act 'gelu'"),
    (LLAMA, edit_config(hidden_size=64, head_dim=12), "config.json: shape .* is invalid for"),
    (LLAMA, edit_tensors(lambda name, x: x.to(torch.int8) if "_proj" in name else x),
     "model.safetensors: .*_proj.weight is torch.int8"),
    (QWEN2, edit_tensors(lambda name, x: None if name == BIAS else x), f"no tensor {BIAS}"),
    (LLAMA, set_file("model.safetensors", None), "no tensor model.embed_tokens.weight in its safetensors"),
    (LLAMA, lambda llm_dir: shutil.copy(llm_dir / "model.safetensors", llm_dir / "model-1.safetensors"),
     "model.safetensors: tensor .* is also in model-1.safetensors"),
    (LLAMA, set_file("tokenizer.json", None), "tokenizer.model: no such file.* and a tokenizer"),
])
def test_unusable_llm_folder_raises_one_line_error(copy_llm, name, change, message):
    llm_dir = copy_llm(name)
    change(llm_dir)
    with pytest.raises(flame.InputError, match=message) as error:
        flame.TextEncoder(llm_dir)
    assert str(llm_dir) in str(error.value) and "\n" not in str(error.value)


def test_llm_by_hub_id(byte_llm, tmp_path, monkeypatch):
    """Offline, a Hub id resolves to its folder in the cache."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--somebody--Bytes-1.0"
    snapshot = shutil.copytree(byte_llm, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert flame.TextEncoder("somebody/Bytes-1.0").llm_dir == snapshot
    Path("somebody/Bytes-1.0").mkdir(parents=True)  # a local folder has priority
    assert flame.resolve_folder("somebody/Bytes-1.0") == Path("somebody/Bytes-1.0")
    for local in ("no such folder", "somebody/nosuch"):  # a misspelt path is not sent to the Hub
        assert flame.resolve_folder(local) == Path(local)
    with pytest.raises(flame.InputError, match="nobody/Nothing: no such folder, .* Hub id") as error:
        flame.resolve_folder("nobody/Nothing")
    assert "\n" not in str(error.value)


# --- fingerprint of an LLM

def mistral_common_file(pattern):
    import mistral_common
    return min((Path(mistral_common.__file__).parent / "data").glob(pattern))


def use_sentencepiece(llm_dir):
    (llm_dir / "tokenizer.json").unlink()
    shutil.copy(mistral_common_file("tokenizer.model.v1"), llm_dir / "tokenizer.model")


def test_fingerprint_depends_on_every_file_that_is_read(copy_llm, make_random_llm):
    llm_dir = copy_llm()
    other = make_random_llm(seed=1, **DECODERS[LLAMA])
    fingerprints = [flame.llm_fingerprint(llm_dir), flame.llm_fingerprint(other)]
    for change in (
            edit_config(rms_norm_eps=1e-3), edit_config(max_position_embeddings=300),
            edit_config(num_key_value_heads=2), edit_config(rope_parameters=UNSCALED),
            edit_config(model_type="mistral"),
            edit_tensors(lambda name, x: x + (name == BIAS.replace("bias", "weight"))),  # one tensor
            edit_tensors(lambda name, x: torch.cat([x[:-1], x[-1:] + (x.dim() > 1)])),  # ends of matrices
            lambda llm_dir: edit_json(llm_dir / "tokenizer.json", normalizer={"type": "Lowercase"}),
            use_sentencepiece, set_file("tokenizer_config.json", '{"add_bos_token": false}')):
        change(llm_dir)
        fingerprints.append(flame.llm_fingerprint(llm_dir))
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("name", [LLAMA, "Qwen2.5"])
def test_fingerprint_ignores_files_that_are_not_read(make_llm, copy_llm, name):
    llm_dir = copy_llm(name)
    (llm_dir / "tokenizer.model").write_bytes(b"not read if there is a tokenizer.json")
    (llm_dir / "tokenizer_config.json").write_text('{"add_bos_token": false}')  # only for tokenizer.model
    assert flame.llm_fingerprint(llm_dir) == flame.llm_fingerprint(make_llm(name))
    flame.TextEncoder(llm_dir)


# --- tokenizers

TEXTS = CAPTIONS[:7] + [
    "Ένας κόκκινος χαρταετός πάνω από τη θάλασσα.", "Красный воздушный змей над морем.",
    "Կարմիր օդապարիկ ծովի վերևում։", "עפיפון אדום מעל הים.", "طائرة ورقية حمراء فوق البحر.",
    "समुद्र के ऊपर लाल पतंग।", "சிவப்பு பட்டம்.", "ว่าวสีแดงเหนือทะเล",
    "རྒྱ་མཚོའི་སྟེང་དུ།", "ပင်လယ်ပေါ်က စွန်နီ။",
    "바다 위의 빨간 연.", "ቀይ ካይት ከባሕር በላይ።", "ᎩᎦᎨ ᎠᎹ ᎡᏉᎯ", "海の上の凧。カイト！", "Diều đỏ bay trên biển.",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 🦊🦊", "two  three   " + " " * 40 + "many" + " " * 300, " leading",
    "trailing \n", "tab\tnew\nline\r\n\n\nend", "\x00\x01\x7f\x85\u00a0\u200b\ufeff\u2028",
    "\ufffd\ufffd e\u0301\u0327 \U000e0041\U0010fffd", "ﬁ ① ½ Å Å ㎏", "http://a.b/c?d=e&f=%20#g",
    "{'a': [1, 2.50, -3e10]}", "x" * 500, "12345678901234567890", '""""\'\'\'\'', "İiıI ßẞ"]


@pytest.fixture(scope="module")
def nemo_llm(make_random_llm):
    """Small random Mistral with Nemo's tokenizer.json: tekken.json as transformers converts it, and BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral.tokenizer import MistralConverter
    folder = make_random_llm(
        family="Mistral", head_dim=20, sliding_window=None, vocab_size=131072, hidden_size=32)
    converted = MistralConverter(str(mistral_common_file("tekken_240718.json"))).converted()
    converted.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    converted.save(str(folder / "tokenizer.json"))
    return folder


def assert_same_tokens(llm_dir, encode, decode):
    ours = flame.load_tokenizer(llm_dir)
    template, facets = flame.PROMPTS["long"]
    for text in TEXTS + [template.replace("{}", flame.clean_caption(x)) + " " + facets[1] for x in TEXTS]:
        ids = encode(text)
        assert ours.encode(text) == ours.encode_batch(["x", text])[1] == ids, text
        assert ours.decode(ids) == decode(ids)


def test_smollm2_tokenizer_equals_transformers(llm):
    reference = transformers_tokenizer(llm)
    assert_same_tokens(llm, lambda text: reference(text).input_ids, reference.decode)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_*.model.v3"])
def test_sentencepiece_tokenizer_equals_mistral_common(tmp_path, version, bos):
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    shutil.copy(mistral_common_file(version), tmp_path / "tokenizer.model")
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=bos)
    reference = SentencePieceTokenizer(mistral_common_file(version))
    assert_same_tokens(tmp_path, lambda text: reference.encode(text, bos=bos, eos=False), reference.decode)


def test_nemo_tokenizer_equals_mistral_common(nemo_llm):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    reference = Tekkenizer.from_file(mistral_common_file("tekken_240718.json"))
    encode = functools.partial(reference.encode, bos=True, eos=False)
    assert_same_tokens(nemo_llm, encode, reference.decode)
    expected = encode("step , ") + encode(" this")  # a literal <s> is BOS
    assert flame.load_tokenizer(nemo_llm).encode("step , <s> this") == expected


# --- the released code's text path, reimplemented from the description of the paper and the code

THINGS = ("the category of the {} object in this image",
          "the prominent characteristic or pattern of the {} object in this image")
RELEASED_FACETS = [f'{words} means in just one word:"' for words in (
    "this image description", *(thing.format(kind) for kind in ("main", "minor") for thing in THINGS),
    "the primary action or event taking place in this image",
    "the overall atmosphere or emotion of this image")]
RELEASED_PREFIX = 'Image description : "CAPTION" . After thinking step by step , '
RELEASED_PROMPTS = {"raw": RELEASED_PREFIX + RELEASED_FACETS[0],
                    "short": RELEASED_PREFIX + "<s> " + " ".join(RELEASED_FACETS[:3]),
                    "long": "Detailed " + RELEASED_PREFIX + "<s> " + " ".join(RELEASED_FACETS)}
RELEASED_CAPTIONS = CAPTIONS[:7] + [
    "A cat", "Is it a dog?", ' say "hi", he said', "trailing space ", "one\ntwo , three",
    "it's a fox, \"a red one\"", "<s> a caption with </s> special tokens",
    "Une très longue promenade " * 400]  # the last one is truncated at 1,024 tokens


def released_ids(tokenizer, caption, prompts):
    ids = tokenizer(caption, max_length=1024, truncation=True).input_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if len(text) > 0 and text[-1] not in '.?"\'':
        text = text + "."
    text = text.replace('"', "'")
    if len(text) > 0 and text[-1] == "?":
        text = text[:-1] + "."
    text = RELEASED_PROMPTS[prompts].replace("CAPTION", text)
    return tokenizer(text, max_length=1536, truncation=True).input_ids


def released_states(llm_dir, prompts):
    """Return float32 [N, K, D] before the last layer, from one string and mask [T, T] per caption."""
    tokenizer = transformers_tokenizer(llm_dir)
    model = transformers_model(llm_dir, attn_implementation="eager")
    comma = tokenizer(RELEASED_PROMPTS["raw"]).input_ids[-10]
    out = []
    for caption in RELEASED_CAPTIONS[:-1]:  # the last one would be slow
        ids = torch.tensor(released_ids(tokenizer, caption, prompts))
        ends = (ids == ids[-1]).nonzero().flatten()[-len(flame.PROMPTS[prompts].facets):].tolist()
        starts = [(ids == comma).nonzero()[-1].item()] + ends[:-1]
        mask = torch.ones(len(ids), len(ids)).tril()
        for start, end in zip(starts[1:], ends[1:]):
            mask[start + 1:end + 1, starts[0] + 1:start + 1] = 0  # hide the earlier facets
        bias = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            states = model(ids[None], attention_mask=bias, output_hidden_states=True).hidden_states
        out.append(states[model.config.num_hidden_layers - 1][0, ends])
    return torch.stack(out)


@pytest.mark.parametrize("prompts", flame.PROMPTS)
def test_compat_hidden_states_equal_released_code(nemo_llm, prompts):
    """mask="released" gives the hidden states of the released code; the default mask doesn't."""
    expected = released_states(nemo_llm, prompts)
    for dtype, cosine in ((torch.float32, 0.9999), (torch.float16, 0.999)):
        encoder = compat.text_encoder(nemo_llm, dtype=dtype, mask="released")
        ours = encoder.encode(RELEASED_CAPTIONS[:-1], prompts)
        assert centered_cosine(ours, expected).min() >= cosine
    if prompts != "raw":
        default = flame.TextEncoder(nemo_llm, dtype=torch.float32).encode(RELEASED_CAPTIONS[:-1], prompts)
        assert centered_cosine(default, expected).mean() < 0.99


@pytest.mark.parametrize("model", ["llm", "nemo_llm"])
def test_compat_tokens_equal_released_code(request, model):
    """In "short" and "long", the first facet prompt starts with a space and <s>."""
    llm_dir = request.getfixturevalue(model)
    reference = transformers_tokenizer(llm_dir)
    for prompts in flame.PROMPTS:
        tokens = compat.tokenize(flame.load_tokenizer(llm_dir), RELEASED_CAPTIONS, prompts)
        for caption, prefix, facets in zip(RELEASED_CAPTIONS, *tokens, strict=True):
            assert prefix + sum(facets, []) == released_ids(reference, caption, prompts)
            assert all(reference.decode(facet).endswith('word:"') for facet in facets)
            assert reference.decode(prefix).endswith(" ,")
            if model == "nemo_llm" and prompts != "raw":
                assert facets[0][:2] == [1032, 1] and 1 not in sum(facets[1:], []) and prefix[0] == 1


def test_compat_truncation_keeps_facet_prompts_whole(llm):
    """If replacing " by ' makes a caption longer, it is truncated again, to 1,536 tokens with the prompts."""
    encoder = compat.text_encoder(llm, layer=1, mask="released")
    caption = ' ","' * 1500  # one token each, or two with single quotes
    prefixes, facets = compat.tokenize(encoder.tokenizer, [caption], "long")
    assert len(prefixes[0]) + sum(map(len, facets[0])) > 1536
    (_, forest), = encoder.pack([caption], "long")
    assert encoder.truncated == 1 and 1500 < forest.positions.max() < 1536
    assert forest.tokens[forest.last_tokens].tolist() == [facet[-1] for facet in facets[0]]


# --- the released checkpoint

def rename_as_numpy1(file):
    """Rename numpy 2's numpy._core.multiarray.scalar in a checkpoint to numpy 1's numpy.core..."""
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in contents.items():
            assert not name.endswith("data.pkl") or b"numpy._core.multiarray" in content
            new.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_checkpoint_equals_open_clip_and_projector(released_checkpoint, prefix):
    file, visual, mm = released_checkpoint(prefix)
    if not prefix:
        rename_as_numpy1(file)
    model = compat.load_released(file)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(mm(visual(pixels)[1]).mean(1), dim=-1)
    assert centered_error(model.encode_image(pixels), expected) <= 1e-4 and not model.training
    assert (model.logit_scale.item(), model.logit_bias.item()) == (3.0, -9.0)
    sizes = {"image_size": 32, "patch_size": 8, "layers": 3, "heads": 2, "text_dim": 48}
    assert model.config | sizes == model.config
    assert model.config["columns"] == flame.FACET_COLUMNS  # the file does not record them
    assert [model.config["llm"][x] for x in ("mask", "layer")] == ["released", None]  # all but the last
    facets = torch.randn(2, 7, 48)
    unit = torch.nn.functional.normalize(facets.mean(1), dim=-1)
    torch.testing.assert_close(model.encode_text(facets, "long").mean(1), unit)


class Executed:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("tensors, message", [
    ({"module.visual.new": torch.zeros(1)}, "visual.new"),
    ({"module.visual.projector": torch.zeros(1)}, "visual.projector"),
    ({"module.mm.5.weight": torch.zeros(1)}, "mm.5.weight"),
    ({"module.mm.2.weight": torch.zeros(48, 41)}, "mm.2.weight"),
    ({"module.visual.conv1.weight": None}, "no 'visual.conv1.weight'"),
    ({"module.visual.ln_pre.weight": None}, "visual.ln_pre.weight"),
    ({"module.text_projection.mean": torch.zeros(1)}, "text_projection.mean"),
    ({"x": Executed()}, ": Unsupported .*print")])
def test_invalid_released_checkpoint_raises_error(released_checkpoint, capsys, tensors, message):
    """The error is one line that names the tensor. Nothing in the file is executed."""
    file, _, _ = released_checkpoint(**tensors)
    with pytest.raises(flame.InputError, match=message) as error:
        compat.load_released(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
    file.write_text("A cat.")
    with pytest.raises(flame.InputError, match="give a released .pt checkpoint"):
        compat.load_released(file)


def test_llm_tensors_of_released_checkpoint_are_not_read(released_checkpoint):
    """The file has 200 MB of LLM weights, but loading it takes less than 50 MB of memory."""
    llm = {f"module.text.model.{n}": torch.zeros(50 << 19, dtype=torch.float16) for n in range(4)}
    file, _, _ = released_checkpoint(**llm)
    grown, _ = memory_grown("", f"compat.load_released({str(file)!r})")
    assert file.stat().st_size > 200e6 and grown < 50e6


# --- image tower, projector, text projection

CONFIG = dict(image_size=32, patch_size=8, width=48, layers=3, heads=4, projector_hidden=40, text_dim=24,
              pool_first=False, text_rank=0)


def test_readme_code_loads_image_tower_into_open_clip_and_timm(tmp_path, monkeypatch):
    folder = tmp_path / "out/demo"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = flame.Flame(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": model.config}))
    text = (Path(flame.__file__).parent / "data/README.md").read_text("utf-8")
    code = text.partition("image tower in open_clip or timm\n\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.eval().visual(pixels)[:, 1:].flatten(0, 1)
        in_timm = names["in_timm"].eval().forward_features(pixels)[:, 1:]
        for reference in names["features"](pixels), in_timm:
            assert centered_error(reference.flatten(0, 1), ours) <= 1e-5


def test_image_tower_equals_open_clip():
    """Parameter names are equal too, except for ln_post and proj, which FLAME does not use."""
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    reference = VisionTransformer(image_size=32, patch_size=8, width=48, layers=3, heads=4, mlp_ratio=4,
                                  output_dim=16, output_tokens=True).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.3)
    reference.ln_post = torch.nn.Identity()
    ours = flame.VisionTransformer(32, 8, 48, 3, 4)
    keys = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not keys.missing_keys and keys.unexpected_keys == ["proj"]
    pixels = torch.randn(2, 3, 32, 32)
    kept = torch.tensor([[0, 5, 7], [3, 15, 1]])
    with torch.no_grad():
        tokens = ours(pixels)[:, 1:]
        assert centered_error(tokens.flatten(0, 1), reference(pixels)[1].flatten(0, 1)) <= 1e-4
        all_patches = torch.arange(16).expand(2, -1)
        torch.testing.assert_close(ours(pixels, all_patches)[:, 1:], tokens)
        changed = pixels.clone()
        changed[:, :, 16:24, 16:24] = 7  # patch 10, which both images drop
        torch.testing.assert_close(ours(changed, kept), ours(pixels, kept))


@pytest.mark.parametrize("size", [(50, 80), (81, 50), (32, 32), (20, 31), (33, 97)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing_equals_torchvision(size, mode):
    from torchvision import transforms as T
    pixels = np.random.default_rng().integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    reference = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])
    torch.testing.assert_close(flame.Flame(CONFIG).preprocess(image), reference(image.convert("RGB")))


def test_preprocessing_rejects_extremely_thin_image():
    with pytest.raises(ValueError, match="1 x 101 pixels"):
        flame.Flame(CONFIG).preprocess(Image.new("RGB", (1, 101)))


@pytest.mark.parametrize("pool_first", [False, True])
def test_projector_and_pooling(pool_first):
    """Patch tokens are projected (with exact GELU), then averaged. pool_first averages before projecting."""
    model = flame.Flame(CONFIG | {"pool_first": pool_first})
    assert isinstance(model.mm[1], torch.nn.GELU) and model.mm[1].approximate == "none"
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = model.visual(pixels)[:, 1:]
    expected = torch.stack([model.mm(token) for token in tokens.unbind(1)]).mean(0)
    if pool_first:
        expected = model.mm(tokens.mean(1))
    torch.testing.assert_close(model.encode_image(pixels), expected / expected.norm(dim=-1, keepdim=True))
    assert model(pixels).requires_grad and not model.encode_image(pixels).requires_grad


def test_similarity_is_mean_cosine_over_facets():
    image, facets = torch.randn(4, 24), torch.randn(3, 7, 24)
    for m, row in enumerate(flame.similarity(image, facets)):
        for n, score in enumerate(row):
            cosines = [torch.cosine_similarity(facets[n, k], image[m], dim=0) for k in range(7)]
            torch.testing.assert_close(score, torch.stack(cosines).mean())


@pytest.mark.parametrize("prompts, first", [("raw", 0), ("short", 1), ("long", 4)])
def test_text_projection_follows_its_formula(prompts, first):
    """normalize((u - mean) A), where A = rest I + basis diag(gain) basis^T and u is the unit hidden state."""
    model = flame.Flame(CONFIG | dict(text_rank=5))
    text = model.text_projection
    for x in text.buffers():
        torch.nn.init.normal_(x)
    facets = torch.randn(3, len(flame.PROMPTS[prompts].facets), 24)
    for k, ours in enumerate(model.encode_text(facets, prompts).unbind(1)):
        c = first + k  # index in FACET_COLUMNS
        A = text.rest[c] * torch.eye(24) + text.basis[c] @ torch.diag(text.gain[c]) @ text.basis[c].T
        expected = (facets[:, k] / facets[:, k].norm(dim=-1, keepdim=True) - text.mean[c]) @ A.T
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_checkpoint_loads_as_saved_or_raises_error(tmp_path):
    def write_config(model, prompts=flame.prompts_to_json()):
        entries = {"model": model, "llm": {"layer": 3, "prompts": prompts}}
        (tmp_path / "config.json").write_text(json.dumps(entries))

    def assert_load_error(message):
        with pytest.raises(flame.InputError, match=message) as error:
            flame.load(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    model = flame.Flame(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    assert_load_error("config.json: no such file")
    write_config(CONFIG)
    assert_load_error("model.safetensors: no such file")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = flame.load(tmp_path)
    assert all(x.equal(loaded.state_dict()[name]) for name, x in model.state_dict().items())
    assert loaded.config["llm"]["layer"] == 3 and not loaded.training
    write_config(CONFIG | {"width": 24})
    assert_load_error("size mismatch")
    write_config({name: value for name, value in CONFIG.items() if name != "heads"})
    assert_load_error("no 'heads'")
    write_config(CONFIG, flame.prompts_to_json() | {"raw": {"prefix": "{}", "facets": ["what?"]}})
    assert_load_error("config.json: made with .*prompts.* flame.PROMPTS")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    assert_load_error("model.safetensors: ")
