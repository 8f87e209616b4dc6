"""The towers against what others wrote, on fresh random weights and on the real SmolLM2. What is promised:

* states equal transformers', each string run by itself: Llama 1 to 3, Mistral, Nemo, Qwen2, Qwen3, Gemma 3;
* in bfloat16 the states keep their directions, measured after subtracting their mean;
* ids equal those of the published tokenizers: sentencepiece, byte-level BPE, Nemo's;
* a caption longer than the context, or the sliding window, is cut; the prompt never is;
* packed rows of any length do not fill the memory;
* what is not supported, quantised or missing in an LLM's folder is refused in one line;
* an LLM's fingerprint changes with all files that are read of it, and with no other;
* positions="sequential" gives the states of FLAME's released code, and the authors' checkpoint loads;
* the image tower equals open_clip's, its preprocessing torchvision's; heads are as many as open_clip says;
* similarity, projector and text projection are their formulas; a checkpoint loads as it was saved.
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
from data import released
from data.store import llm_fingerprint


# --- states

@functools.lru_cache
def their_tokenizer(llm_dir):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_file=str(llm_dir / "tokenizer.json"))


@functools.lru_cache(1)
def their_model(llm_dir, **settings):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32, **settings).eval()


@functools.lru_cache
def separate_passes(llm_dir, prompts, layer, captions=tuple(CAPTIONS)):
    """The oracle, float32 [N, K, D]: K whole strings a caption, each run alone by transformers, causally."""
    model = their_model(llm_dir)
    template, facets = flame.PROMPTS[prompts]
    out = []
    for caption in captions:
        prefix = template.replace("{}", flame.clean(caption))
        for facet in facets:
            ids = torch.tensor([their_tokenizer(llm_dir)(f"{prefix} {facet}").input_ids])
            with torch.no_grad():
                out.append(model(ids, output_hidden_states=True).hidden_states[layer][0, -1])
    return torch.stack(out).unflatten(0, (len(captions), -1))


@pytest.fixture(params=["extension", "twin"])
def path(request, monkeypatch):
    """Runs a test by the extension's kernels and by their PyTorch twins."""
    if request.param == "twin":
        monkeypatch.setattr(flame, "flame_ext", None)
    else:
        assert flame.flame_ext, "flame_ext is not built"
    return request.param


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64, rope_theta=500000.0)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
UNSCALED = dict(rope_type="default", rope_theta=1e6)
SHARDED = dict(max_shard_size="2MB")
LLAMA, QWEN2, QWEN3 = "Llama 2 (no GQA)", "Qwen2 (bias)", "Qwen3 (norms of q and k)"
GEMMA = "Gemma 3 (two ropes)"
DECODERS = {
    LLAMA: dict(num_key_value_heads=4),
    "Llama 3.1 (scaled RoPE)": dict(
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, rope_parameters=LLAMA3),
    "Llama, linear RoPE, tied": dict(rope_parameters=LINEAR, tie_word_embeddings=True),
    "Mistral-7B v0.1 (window)": dict(family="Mistral", sliding_window=600),
    "Mistral-Nemo (head_dim, sharded)": dict(
        family="Mistral", head_dim=20, num_key_value_heads=1, sliding_window=None,
        rope_parameters=UNSCALED, **SHARDED),
    QWEN2: dict(family="Qwen2", num_key_value_heads=2),
    "Qwen2.5 (tied, sharded)": dict(
        family="Qwen2", num_key_value_heads=1, tie_word_embeddings=True, **SHARDED),
    QWEN3: dict(family="Qwen3", head_dim=20),
    GEMMA: dict(
        family="Gemma3", head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=25, sliding_window=600,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def make(make_random_llm):
    @functools.lru_cache
    def make(name):
        folder = make_random_llm(**DECODERS[name])
        for file in folder.glob("*.safetensors"):  # new biases are 0, new norms 1 or 0
            drawn = {name: torch.randn_like(x) for name, x in load_file(file).items()
                     if name.endswith(("bias", "norm.weight"))}
            save_file(load_file(file) | drawn, file, {"format": "pt"})
        return folder
    return make


@pytest.fixture
def folder(make, tmp_path):
    """folder(name) -> a copy of that LLM's folder, to change."""
    return lambda name=LLAMA: shutil.copytree(make(name), tmp_path / "llm")


@pytest.mark.parametrize("name, layer", [(LLAMA, 1), *((name, None) for name in DECODERS)])
def test_states_equal_transformers(make, path, name, layer):
    assert ("max_shard_size" in DECODERS[name]) == (make(name) / "model.safetensors.index.json").exists()
    encoder = flame.TextEncoder(make(name), dtype=torch.float32, layer=layer, budget=500)
    assert centered_error(encoder.encode(CAPTIONS), separate_passes(make(name), "long", layer or 3)) <= 1e-4


@functools.lru_cache
def loaded(llm_dir, dtype):
    return flame.TextEncoder(llm_dir, dtype=dtype)


def encoder_by(path, llm_dir, dtype):
    """The real LLM is read once, whichever kernels run it."""
    encoder = loaded(llm_dir, dtype)
    kernels = flame.TWINS if path == "twin" else flame.NATIVE
    encoder.decoder = encoder.decoder._replace(kernels=kernels)
    return encoder


@pytest.mark.parametrize("prompts", ["raw", "long"])
def test_states_of_smollm2_equal_transformers(llm, path, prompts):
    captions = tuple(CAPTIONS[:4])
    ours = encoder_by(path, llm, torch.float32).encode(captions, prompts)
    assert centered_error(ours, separate_passes(llm, prompts, 29, captions)) <= 1e-4


@functools.lru_cache
def exact_states(llm_dir, captions):
    return loaded(llm_dir, torch.float32).encode(captions, "long")


def test_bfloat16_keeps_the_centered_states(llm, path):
    captions = tuple(f"A {size} {thing} {place}." for size in ("tiny", "huge") for thing in ("fox", "cake")
                     for place in ("in the snow", "on a beach at night"))
    rounded = encoder_by(path, llm, torch.bfloat16).encode(captions, "long")
    assert centered_cosine(rounded, exact_states(llm, captions)).mean() >= 0.999


def edit_json(file, **changes):
    """None leaves an entry out."""
    entries = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


LLAMA_3_2 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("rope", [
    dict(rope_theta=5e5), dict(rope_scaling={"type": "linear", "factor": 4.0}),
    dict(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA_3_2.items() if k != "rope_theta"}),
    dict(rope_parameters=UNSCALED), dict(rope_parameters=LINEAR), dict(rope_parameters=LLAMA_3_2)], ids=str)
def test_rope_in_every_spelling(folder, rope):
    """transformers 5: all in rope_parameters; 4: rope_theta, and rope_scaling with "type" or "rope_type"."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    llm_dir = folder()
    edit_json(llm_dir / "config.json", head_dim=128, **{"rope_parameters": None} | rope)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(llm_dir)).inv_freq
    torch.testing.assert_close(flame.llm_config(llm_dir)["inv_freq"][0].float(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", [
    dict(rope_parameters=None, rope_local_base_freq=500, rope_theta=2e6, layer_types=None,
         sliding_window_pattern=2),
    dict(rope_parameters=None, rope_scaling=dict(rope_type="linear", factor=4.0)),
    dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=UNSCALED))], ids=str)
def test_gemmas_two_ropes_in_every_spelling(folder, rope):
    llm_dir = folder(GEMMA)
    edit_json(llm_dir / "config.json", **rope)
    ours = flame.TextEncoder(llm_dir, dtype=torch.float32).encode(CAPTIONS[:3], "short")
    assert centered_error(ours, separate_passes(llm_dir, "short", 3, tuple(CAPTIONS[:3]))) <= 1e-4


# --- the context

@pytest.mark.parametrize("config, context", [
    (dict(model_type="mistral", sliding_window=4096), 4096),   # Mistral-7B v0.1
    (dict(model_type="mistral", sliding_window=0), 32768),     # v0.2, v0.3 (null there)
    (dict(model_type="mistral"), 4096),                        # transformers' default
    (dict(model_type="qwen2", sliding_window=300, use_sliding_window=False), 32768),
    (dict(model_type="qwen2", sliding_window=300, use_sliding_window=True), 300),
    (dict(model_type="llama", sliding_window=300), 32768),
    (dict(model_type="gemma3_text", sliding_window=512, hidden_act=None, rope_parameters=None), 512),
], ids=str)
def test_the_context_is_the_shorter_of_positions_and_window(folder, config, context):
    llm_dir = folder()
    edit_json(llm_dir / "config.json", max_position_embeddings=32768, **config)
    assert flame.llm_config(llm_dir)["context"] == context


def test_a_caption_longer_than_the_window_is_cut_to_where_that_changes_nothing(make_random_llm):
    """The prompt is whole, a beginning of the caption is left, and transformers with its window agrees."""
    llm_dir = make_random_llm(family="Mistral", sliding_window=200)
    encoder, model = flame.TextEncoder(llm_dir, dtype=torch.float32), their_model(llm_dir)
    captions = ["A fox.", "A fox asks (it is late): where is the lamp of the house at the sea? " * 20]
    (_, forest), = encoder.pack(captions, "long")
    assert encoder.truncated == 1
    seen = flame.visible(forest.lengths, forest.parents)[forest.answers.numpy()]
    strings = [forest.tokens[mask].tolist() for mask in seen]
    opening, closing = flame.PROMPTS["long"].prefix.split("{}")
    states = []
    for n, (ids, facet) in enumerate(zip(strings, flame.PROMPTS["long"].facets * 2, strict=True)):
        text = encoder.tokenizer.decode(ids)
        assert len(ids) <= 200 and text.startswith(opening) and text.endswith(f"{closing} {facet}")
        kept = text.removeprefix(opening).removesuffix(f"{closing} {facet}")
        assert kept == "A fox." if n < 7 else captions[1].startswith(kept[:-1]) and len(kept) > 80
        with torch.no_grad():
            states.append(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, -1])
    reference = torch.stack(states).unflatten(0, (2, 7))
    assert centered_error(encoder.encode(captions, "long"), reference) <= 1e-4


def test_of_megabytes_of_text_only_what_may_fit_is_tokenized(make_random_llm, monkeypatch):
    encoder = flame.TextEncoder(make_random_llm(family="Mistral", sliding_window=200), dtype=torch.float32)
    long = "A fox asks: where is the lamp of the house at the sea? " * 100_000
    expected = encoder.encode([long[:3200]], "long")
    asked = []

    def tokenize(tokenizer, captions, prompts):
        asked.append(sum(map(len, captions)))
        return flame.tokenize(tokenizer, captions, prompts)
    encoder.tokenize = tokenize
    assert encoder.encode([long], "long").equal(expected) and encoder.truncated == 2
    assert max(asked) <= 16 * 200 and len(asked) < 20


def test_an_llm_that_cannot_hold_the_prompt_or_the_tokens_is_refused(make_random_llm):
    with pytest.raises(flame.InputError, match="context of 30 tokens cannot hold the long prompts"):
        flame.TextEncoder(make_random_llm(max_position_embeddings=30)).encode(["A fox."], "long")
    with pytest.raises(flame.InputError, match="knows more tokens than its weights"):
        flame.TextEncoder(make_random_llm(vocab_size=1000)).encode(["A fox."], "long")


# --- memory

def test_packed_rows_of_any_length_do_not_fill_the_memory():
    """oneDNN keeps a kernel for every number of rows, 40 or 600 KiB as the CPU has it; flame bounds them."""
    def grown(**bounds):
        loop = "for rows in range({}): torch.nn.functional.linear(torch.randn(rows, 48).bfloat16(), weight)"
        prepare = "weight = torch.randn(96, 48).bfloat16()\n" + loop.format("64, 264")
        return next(memory_grown(prepare, loop.format("264, 1264"), **bounds))

    unbounded = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "9999")
    assert grown() < grown(**unbounded) / 8


# --- an LLM's folder: what is not supported, quantised, missing

def config(**changes):
    return lambda llm_dir: edit_json(llm_dir / "config.json", **changes)


def holding(name, text):
    def write(llm_dir):
        (llm_dir / name).unlink(missing_ok=True)
        if text is not None:
            (llm_dir / name).write_text(text)
    return write


def tensors(change):
    """change(name, tensor) -> another tensor; None: it is left out."""
    def write(llm_dir):
        changed = {name: change(name, x) for name, x in load_file(llm_dir / "model.safetensors").items()}
        changed = {name: x for name, x in changed.items() if x is not None}
        save_file(changed, llm_dir / "model.safetensors", {"format": "pt"})
    return write


def quantised(dtype):
    return tensors(lambda name, x: x.to(dtype) if "_proj" in name else x)


BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize("name, change, words", [
    (LLAMA, config(model_type="gemma2"), "config.json: .*gemma2.*llama, mistral, qwen2, qwen3, gemma3_text"),
    (GEMMA, config(use_bidirectional_attention=True), "config.json: .*attention both ways"),
    (GEMMA, config(layer_types=["full_attention"]), "config.json: IndexError"),
    (LLAMA, config(model_type="qwen3"), "no tensor model.layers.0.self_attn.q_norm.weight"),
    (QWEN2, config(model_type="llama"), "tensor .*bias is of no llama block"),
    (QWEN3, config(model_type="llama"), "layers.0.self_attn.k_norm.weight is of no llama block"),
    (LLAMA, config(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn.*default, linear, llama3"),
    (LLAMA, config(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=4.0)), "dynamic"),
    (LLAMA, config(rope_parameters=dict(rope_type="linear")), "config.json: no 'factor'"),
    (LLAMA, config(hidden_act="gelu"), "config.json: hidden_act 'gelu'"),
    (LLAMA, config(hidden_size=64, head_dim=12), "config.json: shape .* is invalid for"),
    (LLAMA, quantised(torch.int8), "model.safetensors: .*_proj.weight is torch.int8"),
    (LLAMA, quantised(torch.float8_e4m3fn), "model.safetensors: .*_proj.weight is torch.float8_e4m3fn"),
    (QWEN2, tensors(lambda name, x: None if name == BIAS else x), f"no tensor {BIAS}"),
    (LLAMA, holding("model.safetensors", None), "no tensor model.embed_tokens.weight in its safetensors"),
    (LLAMA, lambda llm_dir: shutil.copy(llm_dir / "model.safetensors", llm_dir / "model-1.safetensors"),
     "model.safetensors: tensor .* is also in model-1.safetensors"),
    (LLAMA, holding("tokenizer.json", None), "tokenizer.model: no such file.* and a tokenizer"),
])
def test_what_is_not_supported_is_refused_in_one_line(folder, name, change, words):
    llm_dir = folder(name)
    change(llm_dir)
    with pytest.raises(flame.InputError, match=words) as error:
        flame.TextEncoder(llm_dir)
    assert str(llm_dir) in str(error.value) and "\n" not in str(error.value)


def test_an_llm_by_its_hugging_face_id(byte_llm, tmp_path, monkeypatch):
    """From the hub's cache; the hub itself is out of reach."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--somebody--Bytes-1.0"
    snapshot = shutil.copytree(byte_llm, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert flame.TextEncoder("somebody/Bytes-1.0").llm_dir == snapshot
    Path("somebody/Bytes-1.0").mkdir(parents=True)  # a folder of that name goes first
    assert flame.hub_folder("somebody/Bytes-1.0") == Path("somebody/Bytes-1.0")
    assert flame.hub_folder("no such folder") == Path("no such folder")
    with pytest.raises(flame.InputError, match="nobody/Nothing: no such folder, .* Hugging Face id") as error:
        flame.hub_folder("nobody/Nothing")
    assert "\n" not in str(error.value)


# --- an LLM's fingerprint

def package_file(pattern):
    import mistral_common
    return min((Path(mistral_common.__file__).parent / "data").glob(pattern))


def sentencepiece(llm_dir):
    (llm_dir / "tokenizer.json").unlink()
    shutil.copy(package_file("tokenizer.model.v1"), llm_dir / "tokenizer.model")


def test_a_fingerprint_changes_with_all_that_is_read(folder, make_random_llm):
    llm_dir = folder()
    other = make_random_llm(seed=1, **DECODERS[LLAMA])
    known = [llm_fingerprint(llm_dir), llm_fingerprint(other)]
    for change in (
            config(rms_norm_eps=1e-3), config(max_position_embeddings=300), config(num_key_value_heads=2),
            config(rope_parameters=UNSCALED), config(model_type="mistral"),
            tensors(lambda name, x: x + (name == BIAS.replace("bias", "weight"))),  # one of all
            lambda llm_dir: edit_json(llm_dir / "tokenizer.json", normalizer={"type": "Lowercase"}),
            sentencepiece, holding("tokenizer_config.json", '{"add_bos_token": false}')):
        change(llm_dir)
        known.append(llm_fingerprint(llm_dir))
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("name", [LLAMA, "Qwen2.5 (tied, sharded)"])
def test_a_fingerprint_ignores_files_that_are_not_read(make, folder, name):
    llm_dir = folder(name)
    (llm_dir / "tokenizer.model").write_bytes(b"where there is a tokenizer.json, nobody reads this")
    (llm_dir / "tokenizer_config.json").write_text('{"add_bos_token": false}')  # goes with tokenizer.model
    assert llm_fingerprint(llm_dir) == llm_fingerprint(make(name))
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
def tekken(tmp_path_factory):
    """Nemo's tokenizer as tokenizer.json: as transformers converts tekken.json, with BOS put in front."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral.tokenizer import MistralConverter
    folder = tmp_path_factory.mktemp("tekken")
    converted = MistralConverter(str(package_file("tekken_240718.json"))).converted()
    converted.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    converted.save(str(folder / "tokenizer.json"))
    return folder


def assert_same(llm_dir, encode, decode):
    ours = flame.load_tokenizer(llm_dir)
    template, facets = flame.PROMPTS["long"]
    for text in TEXTS + [template.replace("{}", flame.clean(text)) + " " + facets[1] for text in TEXTS]:
        ids = encode(text)
        assert ours.encode(text) == ours.encode_batch(["x", text])[1] == ids, text
        assert ours.decode(ids) == decode(ids)


def test_smollm2s_tokenizer_equals_transformers(llm):
    reference = their_tokenizer(llm)
    assert_same(llm, lambda text: reference(text).input_ids, reference.decode)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_*.model.v3"])
def test_sentencepiece_equals_mistral_common(tmp_path, version, bos):
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    shutil.copy(package_file(version), tmp_path / "tokenizer.model")
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=bos)
    reference = SentencePieceTokenizer(package_file(version))
    assert_same(tmp_path, lambda text: reference.encode(text, bos=bos, eos=False), reference.decode)


def test_nemos_tokenizer_equals_mistral_common(tekken):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    reference = Tekkenizer.from_file(package_file("tekken_240718.json"))
    assert_same(tekken, lambda text: reference.encode(text, bos=True, eos=False), reference.decode)
    before, after = (reference.encode(text, bos=True, eos=False) for text in ("step , ", " this"))
    assert flame.load_tokenizer(tekken).encode("step , <s> this") == before + after  # a literal <s> is BOS


# --- FLAME's released code: its text path, written anew from the paper's and its code's description

QUESTIONS = [f'{words} means in just one word:"' for words in (
    "this image description",
    "the category of the main object in this image",
    "the prominent characteristic or pattern of the main object in this image",
    "the category of the minor object in this image",
    "the prominent characteristic or pattern of the minor object in this image",
    "the primary action or event taking place in this image",
    "the overall atmosphere or emotion of this image")]
BEGINNING = 'Image description : "CAPTION" . After thinking step by step , '
RELEASED = {"raw": BEGINNING + QUESTIONS[0], "short": BEGINNING + "<s> " + " ".join(QUESTIONS[:3]),
            "long": "Detailed " + BEGINNING + "<s> " + " ".join(QUESTIONS)}
THEIR_CAPTIONS = CAPTIONS[:7] + [
    "A cat", "Is it a dog?", ' say "hi", he said', "trailing space ", "one\ntwo , three",
    "it's a fox, \"a red one\"", "<s> a caption with </s> special tokens",
    "Une très longue promenade " * 400]  # the last is cut at 1,024 tokens


def released_ids(tokenizer, caption, prompts):
    read = tokenizer(caption, max_length=1024, truncation=True).input_ids
    text = tokenizer.decode(read, skip_special_tokens=True)
    if len(text) > 0 and text[-1] not in '.?"\'':
        text = text + "."
    text = text.replace('"', "'")
    if len(text) > 0 and text[-1] == "?":
        text = text[:-1] + "."
    return tokenizer(RELEASED[prompts].replace("CAPTION", text), max_length=1536, truncation=True).input_ids


def released_states(llm_dir, prompts):
    """float32 [N, K, D] of block all-but-the-last: all questions in one row, facets told by last tokens.

    The mask is drawn as a square, one caption at a time.
    """
    tokenizer, model = their_tokenizer(llm_dir), their_model(llm_dir, attn_implementation="eager")
    comma = tokenizer(RELEASED["raw"]).input_ids[-10]
    out = []
    for caption in THEIR_CAPTIONS[:-1]:  # a long one takes long
        ids = torch.tensor(released_ids(tokenizer, caption, prompts))
        ends = (ids == ids[-1]).nonzero().flatten()[-len(flame.PROMPTS[prompts].facets):].tolist()
        starts = [(ids == comma).nonzero()[-1].item()] + ends[:-1]
        mask = torch.ones(len(ids), len(ids)).tril()
        for start, end in zip(starts[1:], ends[1:]):
            mask[start + 1:end + 1, starts[0] + 1:start + 1] = 0  # blind to the facets before it
        blind = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            states = model(ids[None], attention_mask=blind, output_hidden_states=True).hidden_states
        out.append(states[model.config.num_hidden_layers - 1][0, ends])
    return torch.stack(out)


@pytest.fixture(scope="module")
def nemo(make_random_llm, tekken):
    """A small random Mistral with Nemo's tokenizer."""
    folder = make_random_llm(
        family="Mistral", head_dim=20, sliding_window=None, vocab_size=131072, hidden_size=32)
    shutil.copy(tekken / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("prompts", flame.PROMPTS)
def test_the_text_path_equals_the_released_one(nemo, prompts):
    """positions="sequential" gives the released states; what we do by default does not."""
    theirs = released_states(nemo, prompts)
    for dtype, cosine in ((torch.float32, 0.9999), (torch.float16, 0.999)):
        encoder = released.text_encoder(nemo, dtype=dtype, positions="sequential")
        ours = encoder.encode(THEIR_CAPTIONS[:-1], prompts)
        assert centered_cosine(ours, theirs).min() >= cosine
    if prompts != "raw":
        plain = flame.TextEncoder(nemo, dtype=torch.float32).encode(THEIR_CAPTIONS[:-1], prompts)
        assert centered_cosine(plain, theirs).mean() < 0.99


@pytest.mark.parametrize("model", ["llm", "nemo"])
def test_tokens_of_the_released_path(request, model):
    """The very ids of the released strings; in "short" and "long" a space and <s> lead the first question."""
    llm_dir = request.getfixturevalue(model)
    reference = their_tokenizer(llm_dir)
    for prompts in flame.PROMPTS:
        tokens = released.tokenize(flame.load_tokenizer(llm_dir), THEIR_CAPTIONS, prompts)
        for caption, prefix, facets in zip(THEIR_CAPTIONS, *tokens, strict=True):
            assert prefix + sum(facets, []) == released_ids(reference, caption, prompts)
            assert all(reference.decode(facet).endswith('word:"') for facet in facets)
            assert reference.decode(prefix).endswith(" ,")
            if model == "nemo" and prompts != "raw":
                assert facets[0][:2] == [1032, 1] and 1 not in sum(facets[1:], []) and prefix[0] == 1


def test_the_released_path_never_cuts_a_question(llm):
    """A caption that grows in the round trip, as " become ', gives way to the questions at 1,536 tokens."""
    encoder = released.text_encoder(llm, layer=1, positions="sequential")
    caption = ' ","' * 1500  # a token each; with single quotes two
    prefixes, facets = released.tokenize(encoder.tokenizer, [caption], "long")
    assert len(prefixes[0]) + sum(map(len, facets[0])) > 1536
    (_, forest), = encoder.pack([caption], "long")
    assert encoder.truncated == 1 and 1500 < forest.positions.max() < 1536
    assert forest.tokens[forest.answers].tolist() == [facet[-1] for facet in facets[0]]


# --- the authors' checkpoint

def respell(file):
    """numpy 2 writes numpy._core.multiarray.scalar, numpy 1 wrote numpy.core.multiarray.scalar."""
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in contents.items():
            assert not name.endswith("data.pkl") or b"numpy._core.multiarray" in content
            new.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_authors_checkpoint_equals_open_clip_and_its_projector(released_checkpoint, prefix):
    file, visual, mm = released_checkpoint(prefix)
    if not prefix:
        respell(file)
    model = released.load(file)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(mm(visual(pixels)[1]).mean(1), dim=-1)
    assert centered_error(model.encode_image(pixels), expected) <= 1e-4 and not model.training
    assert (model.logit_scale.item(), model.logit_bias.item()) == (3.0, -9.0)
    known = {"image_size": 32, "patch_size": 8, "layers": 3, "heads": 2, "text_dim": 48}
    assert model.config | known == model.config
    assert model.config["columns"] == flame.COLUMNS  # the file does not say, so all that the prompts ask
    source = model.config["llm"]
    assert (source["positions"], source["layer"]) == ("sequential", None)  # all blocks but the last
    facets = torch.randn(2, 7, 48)
    unit = torch.nn.functional.normalize(facets.mean(1), dim=-1)
    torch.testing.assert_close(model.encode_text(facets, "long").mean(1), unit)
    sizes, tower = released.image_tower(file)
    assert sizes == {name: model.config[name] for name in sizes} and len(sizes) == 5
    assert all(tower[name].equal(x) for name, x in model.visual.state_dict().items())


class Executed:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("more, words", [
    ({"module.visual.new": torch.zeros(1)}, "visual.new"),
    ({"module.visual.projector": torch.zeros(1)}, "visual.projector"),
    ({"module.mm.5.weight": torch.zeros(1)}, "mm.5.weight"),
    ({"module.mm.2.weight": torch.zeros(48, 41)}, "mm.2.weight"),
    ({"module.visual.conv1.weight": None}, "no 'visual.conv1.weight'"),
    ({"module.visual.ln_pre.weight": None}, "visual.ln_pre.weight"),
    ({"module.text.mean": torch.zeros(1)}, "weights that train.py wrote"),
    ({"x": Executed()}, ": Unsupported .*print")])
def test_a_checkpoint_that_does_not_match_is_refused_by_name(released_checkpoint, capsys, more, words):
    """One line that names the tensor; nothing in the file is executed."""
    file, _, _ = released_checkpoint(**more)
    with pytest.raises(flame.InputError, match=words) as error:
        released.load(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
    file.write_text("A cat.")
    with pytest.raises(flame.InputError, match="give the authors' .pt file"):
        released.load(file)


def test_the_llms_tensors_are_not_read(released_checkpoint):
    """Their pages stay on disk: the file says 200 MB of LLM, loading takes less than 50."""
    llm = {f"module.text.model.{n}": torch.zeros(50 << 19, dtype=torch.float16) for n in range(4)}
    file, _, _ = released_checkpoint(**llm)
    grown, _ = memory_grown("", f"released.load({str(file)!r})")
    assert file.stat().st_size > 200e6 and grown < 50e6


def test_heads_are_as_many_as_in_open_clip():
    """Tensors do not tell; a wrong number would give other states without a word."""
    import open_clip
    looked_at = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)["vision_cfg"]
        if "timm_model_name" in config or not isinstance(config["layers"], int):
            continue
        width, patch = config["width"], config["patch_size"]
        weights = {"visual.conv1.weight": torch.empty(width, 3, patch, patch, device="meta"),
                   "visual.positional_embedding": torch.empty((config["image_size"] // patch) ** 2 + 1, 1),
                   "visual.transformer.resblocks.0": torch.empty(1)}
        assert released.sizes_of(weights)["heads"] == width // config.get("head_width", 64), name
        looked_at += 1
    assert looked_at > 30


# --- the image side

CONFIG = dict(image_size=32, patch_size=8, width=48, layers=3, heads=4, projector_hidden=40, text_dim=24,
              pool_first=False, text_rank=0)


def test_a_checkpoints_tower_goes_to_open_clip_by_the_lines_of_the_readme(tmp_path, monkeypatch):
    folder = tmp_path / "out/demo"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = flame.Flame(CONFIG | {"quick_gelu": True})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": model.config}))
    text = (Path(flame.__file__).parent / "data/README.md").read_text("utf-8")
    lines = text.partition("image tower in open_clip\n\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs, ours = names["features"](pixels), model.eval().visual(pixels)[:, 1:]
    assert centered_error(theirs.flatten(0, 1), ours.flatten(0, 1)) <= 1e-5


def test_the_image_tower_equals_open_clips():
    """Under the same names, but for ln_post and proj, which FLAME never uses."""
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    theirs = VisionTransformer(image_size=32, patch_size=8, width=48, layers=3, heads=4, mlp_ratio=4,
                               output_dim=16, output_tokens=True).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.ln_post = torch.nn.Identity()
    ours = flame.VisionTransformer(32, 8, 48, 3, 4)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys == ["proj"]
    pixels = torch.randn(2, 3, 32, 32)
    kept = torch.tensor([[0, 5, 7], [3, 15, 1]])
    with torch.no_grad():
        tokens = ours(pixels)[:, 1:]
        assert centered_error(tokens.flatten(0, 1), theirs(pixels)[1].flatten(0, 1)) <= 1e-4
        every = torch.arange(16).expand(2, -1)
        torch.testing.assert_close(ours(pixels, every)[:, 1:], tokens)
        left_out = pixels.clone()
        left_out[:, :, 16:24, 16:24] = 7  # patch 10, which neither keeps
        torch.testing.assert_close(ours(left_out, kept), ours(pixels, kept))


@pytest.mark.parametrize("size", [(50, 80), (81, 50), (32, 32), (20, 31), (33, 97)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing_equals_torchvisions(size, mode):
    from torchvision import transforms as T
    pixels = np.random.default_rng().integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    reference = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])
    torch.testing.assert_close(flame.Flame(CONFIG).preprocess(image), reference(image.convert("RGB")))


def test_a_picture_that_scaled_up_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="1 x 101 pixels"):
        flame.Flame(CONFIG).preprocess(Image.new("RGB", (1, 101)))


@pytest.mark.parametrize("pool_first", [False, True])
def test_projector_and_pooling(pool_first):
    """Every patch token is projected and then averaged, or, pool_first, averaged and then projected."""
    model = flame.Flame(CONFIG | {"pool_first": pool_first})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = model.visual(pixels)[:, 1:]
    expected = torch.stack([model.mm(token) for token in tokens.unbind(1)]).mean(0)
    if pool_first:
        expected = model.mm(tokens.mean(1))
    torch.testing.assert_close(model.encode_image(pixels), expected / expected.norm(dim=-1, keepdim=True))
    assert model(pixels).requires_grad and not model.encode_image(pixels).requires_grad


def test_similarity_is_the_mean_cosine_over_facets():
    image, facets = torch.randn(4, 24), torch.randn(3, 7, 24)
    for n, row in enumerate(flame.similarity(image, facets)):
        for m, score in enumerate(row):
            cosines = [torch.cosine_similarity(facets[n, k], image[m], dim=0) for k in range(7)]
            torch.testing.assert_close(score, torch.stack(cosines).mean())


@pytest.mark.parametrize("prompts, first", [("raw", 0), ("short", 1), ("long", 4)])
def test_the_text_projection_is_that_of_the_columns_of_a_prompt_set(prompts, first):
    """normalise(A (u - mean)), A = rest I + basis diag(gain) basis^T, u the unit state."""
    model = flame.Flame(CONFIG | dict(text_rank=5))
    text = model.text
    for x in text.buffers():
        torch.nn.init.normal_(x)
    facets = torch.randn(3, len(flame.PROMPTS[prompts].facets), 24)
    for k, ours in enumerate(model.encode_text(facets, prompts).unbind(1)):
        c = first + k
        A = text.rest[c] * torch.eye(24) + text.basis[c] @ torch.diag(text.gain[c]) @ text.basis[c].T
        expected = (facets[:, k] / facets[:, k].norm(dim=-1, keepdim=True) - text.mean[c]) @ A.T
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_loads_as_it_was_saved_or_is_refused(tmp_path):
    def save(model, questions=flame.questions()):
        entries = {"model": model, "llm": {"layer": 3, "questions": questions}}
        (tmp_path / "config.json").write_text(json.dumps(entries))

    def refused(words):
        with pytest.raises(flame.InputError, match=words) as error:
            flame.load(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    model = flame.Flame(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    refused("config.json: no such file")
    save(CONFIG)
    refused("model.safetensors: no such file")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = flame.load(tmp_path)
    assert all(x.equal(loaded.state_dict()[name]) for name, x in model.state_dict().items())
    assert loaded.config["llm"]["layer"] == 3 and not loaded.training
    save(CONFIG | {"width": 24})
    refused("size mismatch")
    save({name: value for name, value in CONFIG.items() if name != "heads"})
    refused("no 'heads'")
    save(CONFIG, flame.questions() | {"raw": {"prefix": "{}", "facets": ["what?"]}})
    refused("config.json: made with other questions")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    refused("model.safetensors: ")
