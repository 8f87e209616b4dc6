"""Decoder families and kinds of tokenizers against transformers and mistral-common, on small random weights.

Then what is not supported, and what is broken, in an LLM's folder: each refused in one line.
"""
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import flame
from test_flame import CAPTIONS, centered_error, path, separate_passes  # noqa: F401 (path is a fixture)

ROOT = Path(__file__).resolve().parent.parent


# --- decoders: hidden states equal transformers' <= 1e-4, centered over texts

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64, rope_theta=500000.0)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
UNSCALED = dict(rope_type="default", rope_theta=1e6)
SHARDED = dict(max_shard_size="2MB")
DECODERS = {
    "Llama 2 (no GQA)": dict(num_key_value_heads=4),
    "Llama 3.1 (scaled RoPE)": dict(rope_parameters=LLAMA3),
    "Llama, linear RoPE, tied": dict(rope_parameters=LINEAR, tie_word_embeddings=True),
    "Mistral-7B v0.1 (window)": dict(family="Mistral", sliding_window=600),
    "Mistral-Nemo (head_dim, sharded)": dict(
        family="Mistral", head_dim=20, num_key_value_heads=1, sliding_window=None,
        rope_parameters=UNSCALED, **SHARDED),
    "Qwen2 (bias, head_dim)": dict(family="Qwen2", num_key_value_heads=2),
    "Qwen2.5 (tied, sharded)": dict(
        family="Qwen2", num_key_value_heads=1, tie_word_embeddings=True, **SHARDED),
    "Qwen3 (norms of q and k, head_dim)": dict(family="Qwen3", head_dim=20),
    "Qwen3 (tied, sharded)": dict(
        family="Qwen3", head_dim=8, num_key_value_heads=1, tie_word_embeddings=True, **SHARDED),
}


@pytest.fixture(scope="module")
def make(make_random_llm):
    @functools.lru_cache
    def make(name):
        folder = make_random_llm(**DECODERS[name])
        if DECODERS[name].get("family", "").startswith("Qwen"):
            from safetensors.torch import load_file, save_file
            # In a new model these are 0 and 1, and leaving them out changes nothing.
            random = ("bias", "q_norm.weight", "k_norm.weight")
            for file in folder.glob("*.safetensors"):
                weights = load_file(file)
                drawn = {n: torch.randn_like(t) for n, t in weights.items() if n.endswith(random)}
                save_file(weights | drawn, file, {"format": "pt"})
        return folder
    return make


@pytest.mark.parametrize("name", DECODERS)
def test_hidden_states_equal_transformers(make, path, name):  # noqa: F811
    folder = make(name)
    assert ("max_shard_size" in DECODERS[name]) == ((folder / "model.safetensors.index.json").exists())
    ours = flame.TextEncoder(folder, dtype=torch.float32, budget=500).encode(CAPTIONS, "long")
    assert centered_error(ours, separate_passes(folder, "long", 3)) <= 1e-4


@pytest.mark.parametrize("name, change", [
    ("Llama 3.1 (scaled RoPE)", LLAMA3 | {"rope_type": "default"}),
    ("Llama, linear RoPE, tied", LINEAR | {"rope_type": "default"})])
def test_rope_scaling_matters(make, tmp_path, name, change):
    """The comparison above would notice: without the scaling the states are others."""
    folder = shutil.copytree(make(name), tmp_path / "llm")
    edit_config(folder, rope_parameters=change)
    ours = flame.TextEncoder(folder, dtype=torch.float32).encode(CAPTIONS, "long")
    assert centered_error(ours, separate_passes(make(name), "long", 3)) > 1e-2


LLAMA_3_2 = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {
    "factor": 32.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 4, old", "transformers 5"])
@pytest.mark.parametrize("scaling", [None, dict(rope_type="linear", factor=4.0), LLAMA_3_2], ids=str)
def test_rope_in_either_spelling(make, tmp_path, scaling, spelling):
    """transformers 5: all in rope_parameters; 4: rope_theta, and rope_scaling with "type" or "rope_type"."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    folder = shutil.copytree(make("Llama 2 (no GQA)"), tmp_path / "llm")
    if spelling == "transformers 5":
        rope = dict(rope_parameters=(scaling or {"rope_type": "default"}) | {"rope_theta": 5e5})
    else:
        old = spelling.endswith("old") and scaling and scaling["rope_type"] == "linear"
        named = {"type": "linear", "factor": 4.0} if old else scaling
        rope = dict(rope_parameters=None, rope_theta=500000.0, rope_scaling=named)
    edit_config(folder, head_dim=128, **rope)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    torch.testing.assert_close(flame.llm_config(folder)["inv_freq"].float(), theirs, rtol=1e-6, atol=0)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("family, config, context", [
    ("mistral", dict(sliding_window=4096, max_position_embeddings=32768), 4096),  # Mistral-7B v0.1
    ("mistral", dict(sliding_window=None, max_position_embeddings=32768), 32768),  # v0.2, v0.3
    ("mistral", dict(max_position_embeddings=32768), 4096),  # transformers' default
    ("qwen2", dict(sliding_window=300, use_sliding_window=False, max_position_embeddings=32768), 32768),
    ("qwen2", dict(sliding_window=300, use_sliding_window=True, max_position_embeddings=32768), 300),
    ("llama", dict(max_position_embeddings=2048), 2048)])
def test_context_is_the_shorter_of_positions_and_window(tmp_path, family, config, context):
    name, text = config_with(model_type=family, **config)
    (tmp_path / name).write_text(text)
    assert flame.llm_config(tmp_path)["context"] == context


def test_caption_longer_than_the_sliding_window_is_cut_to_where_it_changes_nothing(make_random_llm):
    """The prompt is whole, a beginning of the caption is left, and transformers with its window agrees."""
    from transformers import AutoModelForCausalLM
    folder = make_random_llm(family="Mistral", sliding_window=200)
    encoder, tokenizer = flame.TextEncoder(folder, dtype=torch.float32), flame.load_tokenizer(folder)
    asks = "A fox asks (it is late): where is the old green lamp of the house at the sea? "
    captions = ["A fox.", asks * 20]
    (_, forest), = encoder.pack(captions, "long")
    assert encoder.truncated == 1
    masks = flame.visible(forest)[forest.answers.numpy()]
    strings = [forest.tokens[torch.from_numpy(seen)].tolist() for seen in masks]
    opening, closing = flame.PROMPTS["long"].prefix.split("{}")
    for n, (ids, facet) in enumerate(zip(strings, flame.PROMPTS["long"].facets * 2, strict=True)):
        text = tokenizer.decode(ids)
        assert len(ids) <= 200 and text.startswith(opening) and text.endswith(f"{closing} {facet}")
        kept = text.removeprefix(opening).removesuffix(f"{closing} {facet}")
        assert kept == "A fox." if n < 7 else captions[1].startswith(kept[:-1]) and len(kept) > 80
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in strings]
        reference = torch.stack([states[3][0, -1] for states in hidden]).view(2, 7, -1)
    assert centered_error(encoder.encode(captions, "long"), reference) <= 1e-4


def test_context_too_short_for_the_prompt_and_foreign_tokenizer_are_refused(make_random_llm):
    with pytest.raises(flame.InputError, match="context of 30 tokens cannot hold the long prompts"):
        flame.TextEncoder(make_random_llm(max_position_embeddings=30)).encode(["A fox."], "long")
    with pytest.raises(flame.InputError, match="weights have 1000"):
        flame.TextEncoder(make_random_llm(vocab_size=1000)).encode(["A fox."], "long")


def test_loading_needs_no_more_memory_than_the_result_and_a_shard(make_random_llm):
    """float16 on disk, bfloat16 kept, so all is copied: the files' pages must not stay beside the copies."""
    folder = make_random_llm(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9,
        max_shard_size="40MB", dtype=torch.float16)
    shards = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(shards) > 5
    script = f"""if True:
        import re, torch, flame, safetensors
        def peak():  # ru_maxrss would begin at the parent's
            return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
        (torch.ones(9).half().bfloat16(), torch.cat([torch.ones(9)] * 2))
        before = peak()
        decoder = flame.load_decoder({str(folder)!r})
        kept = [decoder.embedding, *(t for block in decoder.blocks for t in block.values() if t is not None)]
        print(peak() - before, sum(t.nbytes for t in kept))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    grown, kept = map(int, done.stdout.split())
    assert kept > 5 * max(shards) and grown <= kept + max(shards)


def drop_tensor(folder, ending):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(ending)}, folder / "model.safetensors")


LLAMA, QWEN2, QWEN3 = "Llama 2 (no GQA)", "Qwen2 (bias, head_dim)", "Qwen3 (norms of q and k, head_dim)"
LLAMA3_NO_LOW = {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}


def changed(**config):
    return lambda folder: edit_config(folder, **config)


@pytest.mark.parametrize("name, change, word", [
    (LLAMA, changed(model_type="gemma2"), "gemma2.*llama, mistral, qwen2"),
    (LLAMA, changed(model_type="qwen3_moe"), "qwen3_moe.*llama, mistral, qwen2, qwen3"),
    (LLAMA, changed(model_type="qwen3"), "no tensor .*layers.0.self_attn.q_norm.weight"),
    (QWEN2, changed(model_type="qwen3"), "bias"),
    (QWEN2, changed(model_type="llama"), "bias"),
    (QWEN3, changed(model_type="llama"), "layers.0.self_attn.k_norm.weight"),
    (LLAMA, changed(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn.*default, linear, llama3"),
    (LLAMA, changed(rope_parameters=dict(rope_type=["linear"])), "linear.*default, linear, llama3"),
    (LLAMA, changed(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=4.0)), "dynamic"),
    (LLAMA, changed(rope_parameters=LLAMA3 | {"low_freq_factor": None}), "low_freq_factor"),
    (LLAMA, changed(rope_parameters=LLAMA3_NO_LOW), "low_freq_factor"),
    (QWEN2, lambda f: drop_tensor(f, "layers.1.self_attn.k_proj.bias"), "layers.1.self_attn.k_proj.bias"),
    ("Qwen2.5 (tied, sharded)", lambda f: sorted(f.glob("model-*.safetensors"))[1].unlink(), "model-00002"),
])
def test_what_is_not_supported_is_refused_by_name(make, tmp_path, name, change, word):
    folder = shutil.copytree(make(name), tmp_path / "llm")
    change(folder)
    with pytest.raises(flame.InputError, match=word) as error:
        flame.TextEncoder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def change_tensors(folder, change):
    """change(name, tensor) -> {name: tensor} in its place, over model.safetensors."""
    from safetensors.torch import load_file, save_file
    changed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        changed |= change(name, tensor)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def quantised(dtype, ending="weight"):
    """Of all blocks' projections, as checkpoints in FP8, int8, 4 bits (uint8), GPTQ (int32) hold them."""
    def change(name, tensor):
        if "_proj" not in name:
            return {name: tensor}
        return {name.removesuffix("weight") + ending: tensor.to(dtype)}
    return lambda folder: change_tensors(folder, change)


@pytest.mark.parametrize("change, word", [
    (changed(quantization_config={"quant_method": "fp8"}), "config.json: .*fp8"),
    (changed(quantization_config=True), "config.json: .*quantization_config"),
    (changed(compression_config={"format": "int-quantized"}), "config.json: .*compression_config"),
    (quantised(torch.int8), "model.safetensors: .*_proj.weight is I8"),
    (quantised(torch.uint8), "model.safetensors: .*_proj.weight is U8"),
    (quantised(torch.float8_e4m3fn), "model.safetensors: .*_proj.weight is F8_E4M3"),
    (quantised(torch.int32, "qweight"), "model.safetensors: .*_proj.qweight is I32"),
])
def test_quantised_llms_are_refused_before_anything_is_loaded(make, tmp_path, monkeypatch, change, word):
    folder = shutil.copytree(make("Llama 2 (no GQA)"), tmp_path / "llm")
    change(folder)
    monkeypatch.setattr(torch.Tensor, "to", None)  # no weight gets as far as its device
    for reader in (flame.load_decoder, flame.load_unembedding, flame.llm_fingerprint):
        with pytest.raises(flame.InputError, match=word + ".*; download .*bfloat16") as error:
            reader(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


# --- what others wrote into an LLM's folder: one line that names file, key and cure

def config_with(**changes):
    return "config.json", json.dumps(dict(
        model_type="llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=48, num_hidden_layers=4,
        intermediate_size=96, vocab_size=49152, rms_norm_eps=1e-6) | changes)


def config_without(key):
    name, text = config_with()
    return name, json.dumps({k: v for k, v in json.loads(text).items() if k != key})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, folder): an LLM's folder lies in Hugging Face's cache; the hub itself is out of reach."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def lay(name, folder):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "0123abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
        return repository / "snapshots" / "0123abc"
    return lay


def test_an_llm_by_its_hugging_face_id(hub, byte_llm, tmp_path, monkeypatch):
    snapshot = hub("somebody/Bytes-1.0", byte_llm)
    assert flame.llm_folder("somebody/Bytes-1.0") == snapshot
    states = flame.TextEncoder("somebody/Bytes-1.0", dtype=torch.float32).encode("a cat", "raw")
    assert states.equal(flame.TextEncoder(byte_llm, dtype=torch.float32).encode("a cat", "raw"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "Bytes-1.0").mkdir(parents=True)  # a folder of that name goes first
    assert flame.llm_folder("somebody/Bytes-1.0") == Path("somebody/Bytes-1.0")
    assert flame.llm_folder("no such folder") == Path("no such folder")
    with pytest.raises(flame.InputError, match="nobody/Nothing: no such folder, .* Hugging Face id") as error:
        flame.llm_folder("nobody/Nothing")
    assert "\n" not in str(error.value)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
MAY_BE_MISSING = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
INDEX, TEKKEN, WEIGHTS = "model.safetensors.index.json", "tekken.json", "model.safetensors"
OTHER_FOLDER = "'weight_map'.*{}.*another folder"
A_TEKKEN = {"default_num_special_tokens": 1, "default_vocab_size": 2, "pattern": "."}
NO_VOCABULARY = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}


def broken_files():
    """Yields (what is wrong, file, what stands in it, what the message says besides the file)."""
    for file in ("config.json", INDEX, "tokenizer.json", TEKKEN, "tokenizer_config.json"):
        for text in ("", "[]", "null", "3", '{"a', '"text"', "\xff"):
            yield f"{file} is {text!r}", file, text, "."
    for key in SIZES + ("model_type", "rms_norm_eps"):
        yield f"no {key}", *config_without(key), repr(key)
    numbers = dict.fromkeys(SIZES + MAY_BE_MISSING, ("64", 0, -4, 4.5, [4], 10 ** 12, True)) | {
        "rms_norm_eps": ("small", -1.0, math.nan, math.inf, None),
        "rope_theta": ("big", 0, -1.0, math.nan, 10 ** 400, []),
        "hidden_act": (3,), "use_sliding_window": (3,)}
    for key, values in numbers.items():
        for value in values:
            yield f"{key} is {str(value)[:20]}", *config_with(**{key: value}), repr(key)
    no_high = {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}
    for word, value in (
            ("rope_scaling", []), ("rope_scaling", "linear"), ("rope_type", {"rope_type": 3}),
            ("factor", {"type": "linear"}), ("factor", {"type": "linear", "factor": 0}),
            ("factor", {"type": "linear", "factor": "4"}),
            ("high_freq_factor", no_high), ("high_freq_factor", LLAMA3 | {"high_freq_factor": 1.0}),
            ("original_max_position_embeddings", LLAMA3 | {"original_max_position_embeddings": None})):
        yield f"rope_scaling is {value}", *config_with(rope_scaling=value), repr(word)
    divides = "'num_attention_heads' is 4.*'num_key_value_heads'"
    yield "heads not divisible by kv heads", *config_with(num_key_value_heads=3), divides
    yield "odd head_dim", *config_with(head_dim=11), "'head_dim' is 11"
    for value, word in (
            ([], "'weight_map'"), (None, "'weight_map'"), ({}, "'weight_map'"),
            ({"a": 3}, "'weight_map'.*3"), ({"a": ""}, "'weight_map'"),
            ({"a": "../model.safetensors"}, OTHER_FOLDER.format("../model.safetensors")),
            ({"a": "/etc/passwd"}, OTHER_FOLDER.format("/etc/passwd")),
            ({"a": ".."}, OTHER_FOLDER.format(".."))):
        yield f"weight_map is {value}", INDEX, json.dumps({"weight_map": value}), word
    yield "weight_map missing", INDEX, "{}", "'weight_map'"
    yield "weights empty", WEIGHTS, "", "download it anew"
    yield "weights cut off", WEIGHTS, "\x88\0\0\0\0\0\0\0{", "download it anew"
    yield "weights without a tensor", WEIGHTS, "\2\0\0\0\0\0\0\0{}", "no tensor"
    yield "add_bos_token a text", "tokenizer_config.json", '{"add_bos_token": "yes"}', "'add_bos_token'"
    yield "a vocabulary of nothing", "tokenizer.json", json.dumps(NO_VOCABULARY), "no token"
    for tekken, word in (
            ({"config": {}}, "'vocab'"), ({"config": [], "vocab": []}, "'config'"),
            ({"config": A_TEKKEN | {"pattern": 3}, "vocab": []}, "'pattern'"),
            ({"config": {k: v for k, v in A_TEKKEN.items() if k != "pattern"}, "vocab": []}, "'pattern'"),
            ({"config": A_TEKKEN | {"default_vocab_size": "2"}, "vocab": []}, "'default_vocab_size'"),
            ({"config": A_TEKKEN, "vocab": [3]}, "not a tokenizer")):
        yield f"tekken is {tekken}", TEKKEN, json.dumps(tekken), word


BROKEN = {what: rest for what, *rest in broken_files()}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_of_an_llm_are_one_line_with_file_key_and_cure(make, tmp_path, name):
    file, text, word = BROKEN[name]
    folder = shutil.copytree(make("Llama 2 (no GQA)"), tmp_path / "llm", copy_function=os.symlink)
    if file in (TEKKEN, "tokenizer_config.json"):
        (folder / "tokenizer.json").unlink()
    if file == "tokenizer_config.json":  # goes with a tokenizer.model
        (folder / "tokenizer.model").symlink_to(package_file("tokenizer.model.v1"))
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(flame.InputError, match=word) as error:
        flame.load_tokenizer(folder) if "tok" in file or file == TEKKEN else flame.load_decoder(folder)
    named = folder if word == "no tensor" else folder / file
    assert str(named) in str(error.value) and "; " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", INDEX])
def test_pipe_in_place_of_a_file_is_refused_not_waited_for(make, tmp_path, name):
    folder = shutil.copytree(make("Llama 2 (no GQA)"), tmp_path / "llm", copy_function=os.symlink)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for reader in (flame.TextEncoder, flame.llm_fingerprint):
        with pytest.raises(flame.InputError, match=re.escape(str(folder / name)) + ".*not a regular file"):
            reader(folder)


# --- tokenizers: the same ids as mistral-common and transformers

TEXTS = CAPTIONS[:7] + [
    "Ένας κόκκινος χαρταετός πάνω από τη θάλασσα.", "Красный воздушный змей над морем.",
    "Կարմիր օդապարիկ ծովի վերևում։", "עפיפון אדום מעל הים.", "طائرة ورقية حمراء فوق البحر.",
    "समुद्र के ऊपर लाल पतंग।", "সমুদ্রের উপর লাল ঘুড়ি।", "ਸਮੁੰਦਰ ਉੱਤੇ ਲਾਲ ਪਤੰਗ।", "દરિયા ઉપર લાલ પતંગ.",
    "ସମୁଦ୍ର ଉପରେ ନାଲି ଗୁଡ଼ି।", "கடலுக்கு மேல் சிவப்பு பட்டம்.", "సముద్రంపై ఎర్రటి గాలిపటం.",
    "ಸಮುದ್ರದ ಮೇಲೆ ಕೆಂಪು ಗಾಳಿಪಟ.", "കടലിനു മുകളിൽ ചുവന്ന പട്ടം.", "මුහුදට ඉහළින් රතු සරුංගලයක්.",
    "ว่าวสีแดงเหนือทะเล", "ວ່າວສີແດງເໜືອທະເລ", "རྒྱ་མཚོའི་སྟེང་དུ་ཤོག་བྱ་དམར་པོ།", "ပင်လယ်ပေါ်က စွန်နီ။",
    "წითელი ფრანი ზღვის თავზე.", "바다 위의 빨간 연.", "ቀይ ካይት ከባሕር በላይ።", "ខ្លែងក្រហមលើសមុទ្រ។", "ᎩᎦᎨ ᎠᎹ ᎡᏉᎯ",
    "ᠤᠯᠠᠭᠠᠨ ᠴᠠᠰᠤ", "海の上の赤い凧。カイト！", "Diều đỏ bay trên biển.", "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 🦊🦊",
    "two  three   four    " + " " * 40 + "many" + " " * 300, " leading", "trailing \n",
    "tab\tnew\nline\r\n\n\nend", "\x00\x01\x7f\x85\u00a0\u200b\ufeff\u2028",
    "\ufffd\ufffd e\u0301\u0327 \U000e0041\U0010fffd", "ﬁ ① ½ Å Å ㎏", "http://a.b/c?d=e&f=%20#g",
    "{'a': [1, 2.50, -3e10]}", "x" * 500, "12345678901234567890", '""""\'\'\'\'', "İiıI ßẞ"]


def test_texts_are_of_many_scripts():
    scripts = {unicodedata.name(c, "").split()[0] for c in "".join(TEXTS) if c.isalpha()}
    assert len(scripts - {"FULLWIDTH", "MASCULINE", "FEMININE"}) >= 20, scripts


def package_file(pattern):
    import mistral_common
    return sorted((Path(mistral_common.__file__).parent / "data").glob(pattern))[0]


def prompts_of(text):  # what FLAME tokenizes
    prompts = flame.PROMPTS["long"]
    return prompts.prefix.replace("{}", flame.clean(text)) + " " + prompts.facets[1]


def assert_same(ours, encode, decode=None):
    for text in TEXTS + [prompts_of(t) for t in TEXTS]:
        ids = encode(text)
        assert ours.encode(text) == ours.encode_batch(["x", text])[1] == ids, text
        if decode:
            assert ours.decode(ids) == decode(ids)


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_*.model.v3"])
def test_tokenizer_model_equals_mistral_common(tmp_path, version):
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    file = package_file(version)
    shutil.copy(file, tmp_path / "tokenizer.model")
    reference = SentencePieceTokenizer(file)
    ours = flame.load_tokenizer(tmp_path)
    assert_same(ours, lambda text: reference.encode(text, bos=True, eos=False), reference.decode)


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


def test_tekken_equals_mistral_common(tekken, tmp_path):
    """Published twice, tekken.json and tokenizer.json: both give the same ids, for a literal <s> too."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    shutil.copy(package_file("tekken_240718.json"), tmp_path / "tekken.json")
    reference = Tekkenizer.from_file(tmp_path / "tekken.json")

    def encode(text):
        return reference.encode(text, bos=True, eos=False)

    with_bos = encode("step , ") + [1] + encode(" this")[1:]
    for ours in (flame.load_tokenizer(tmp_path), flame.load_tokenizer(tekken)):
        assert_same(ours, encode, reference.decode)
        assert ours.encode("step , <s> this") == with_bos


def test_tekken_without_tiktoken_says_what_to_install(tmp_path, monkeypatch):
    shutil.copy(package_file("tekken_240718.json"), tmp_path / "tekken.json")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(flame.InputError, match="pip install tiktoken"):
        flame.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("tekken.json", "{}"), ("tekken.json", "no"), ("tokenizer.model", "no"), ("tokenizer.json", "no")])
def test_broken_tokenizer_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(flame.InputError, match=re.escape(str(tmp_path / name))) as error:
        flame.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def sentencepiece_as_llama(file):
    """transformers' LlamaTokenizer (Llama 2, Mistral-7B) with the vocabulary of a tokenizer.model.

    What has the best score merges first.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}

    def is_special(i):
        return pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i)

    score = {piece: pieces.get_score(i) for piece, i in vocabulary.items() if not is_special(i)}
    pairs = []
    for piece in score:
        for k in range(1, len(piece)):
            if piece[:k] in score and piece[k:] in score:
                pairs.append((-score[piece], -k, piece))
    merges = [(piece[:-k], piece[-k:]) for _, k, piece in sorted(pairs)]
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def byte_level(bos):
    """A byte-level BPE as Llama 3 (bos) and Qwen2 (none) have it, trained on the texts here."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not bos:
        vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *sorted(alphabet)])}
        return Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[bos], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


TOKENIZER_JSON = {  # -> (the one to save, does it add BOS?)
    "SmolLM2": (lambda llm: llm, False),
    "Llama 3": (lambda llm: byte_level("<|begin_of_text|>"), True),
    "Qwen2": (lambda llm: byte_level(None), False),
    "Llama 2, Mistral-7B": (lambda llm: sentencepiece_as_llama(package_file("tokenizer.model.v1")), True),
}


@pytest.mark.parametrize("name", TOKENIZER_JSON)
def test_tokenizer_json_equals_transformers(llm, tmp_path, name):
    from transformers import AutoTokenizer
    make, bos = TOKENIZER_JSON[name]
    if (published := make(llm)) != llm:
        published.save_pretrained(tmp_path)
        llm = tmp_path
    reference = AutoTokenizer.from_pretrained(llm)
    ours = flame.load_tokenizer(llm)

    def encode(text):
        return reference(text).input_ids

    def decode(ids):
        return reference.decode(ids, skip_special_tokens=True)

    assert_same(ours, encode, decode)
    assert (ours.encode("A cat")[0] == reference.bos_token_id) == bos
    if name.startswith("Llama 2"):  # the same prompts from its other file; only texts like " a" differ
        shutil.copy(package_file("tokenizer.model.v1"), tmp_path / "tokenizer.model")
        (tmp_path / "tokenizer.json").unlink()
        ours = flame.load_tokenizer(tmp_path)
        assert all(ours.encode(text) == reference(text).input_ids for text in map(prompts_of, TEXTS))
