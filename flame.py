"""FLAME: a frozen decoder LLM as the text tower of language-image pre-training.

Cao, Wei, Ma: "FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training", CVPR 2025.
This file is the whole method and reads in the order data flows:

    caption -> prompts -> segment forest -> frozen decoder -> facet embeddings     (text; never trained)
    picture -> vision transformer -> projector                                     (image; trained to meet the facets)
    similarity of the two = mean over facets of the cosine

The stages embed.py, train.py and evaluate.py import this file; README.md shows how to use it from Python.
"""
import base64
import ctypes
import functools
import hashlib
import json
import os
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import flame_ext  # the C++/CUDA extension in ext/; every line that uses it has a PyTorch twin beside it
except ImportError:
    flame_ext = None


class InputError(Exception):
    """Bad input from outside. Its text is one line: the file, the line in it, what is wrong, and the cure."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompts: one caption is asked K questions, each to be answered "in just one word" (paper, section 3.2)

class PromptSet(NamedTuple):
    prefix: str              # holds "{}" where the caption goes
    facets: tuple[str, ...]  # K questions; the state at a question's last token, the answer's opening quote, is a facet


_FACETS = tuple(f'{subject} means in just one word:"' for subject in (
    "this image description",                                                        # the whole
    "the category of the main object in this image",                                 # entity level
    "the prominent characteristic or pattern of the main object in this image",
    "the category of the minor object in this image",
    "the prominent characteristic or pattern of the minor object in this image",
    "the primary action or event taking place in this image",                        # interaction level
    "the overall atmosphere or emotion of this image"))                              # scene level

PROMPTS = {
    "raw": PromptSet('Image description : "{}" . After thinking step by step ,', _FACETS[:1]),
    "short": PromptSet('Image description : "{}" . After thinking step by step ,', _FACETS[:3]),
    "long": PromptSet('Detailed Image description : "{}" . After thinking step by step ,', _FACETS),
}
# The columns of a store and of the text projection, always in this order: raw 1, short 3, long 7.
COLUMNS = [f"{name}.{k}" for name, prompt in PROMPTS.items() for k in range(len(prompt.facets))]


def prompt_set(name):
    """-> its PromptSet. Raises ValueError where there is none of that name."""
    if not isinstance(name, str) or name not in PROMPTS:
        raise ValueError(f"prompts {name!r}: there is no such set; choose among {', '.join(PROMPTS)}")
    return PROMPTS[name]


def clean(caption):
    """Caption as the template wants it: it ends like a sentence and holds no quote that would close the template's own."""
    caption = caption.strip()
    if not caption.endswith((".", "?", '"', "'")):
        caption += "."
    caption = caption.replace('"', "'")
    return caption[:-1] + "." if caption.endswith("?") else caption


# ---------------------------------------------------------------------------------------------------------------------
# 2. The segment forest: the trie of the strings' token sequences. It *is* facet-decoupled attention.

class Forest(NamedTuple):
    """A packed row of T tokens cut into S segments; a segment hangs from the end of its parent, which lies before it.

    The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors, and
    depth(k) <= depth(q), where a token's depth is counted from its root.
    """
    tokens: torch.Tensor     # [T] int64
    positions: torch.Tensor  # [T] int64, what RoPE sees; visibility never looks at it
    lengths: np.ndarray      # [S] int32
    parents: np.ndarray      # [S] int32, -1 for a root
    answers: torch.Tensor    # [N] int64, packed index of each sequence's last token


def build_forest(sequences, positions=None):
    """Trie of N token sequences (non-empty lists of ints below 2**32) -> Forest.

    positions: N lists of ints as long as the sequences; None numbers each sequence 0, 1, 2 ...
    Tokens are shared between sequences where all that comes before, and the positions, agree.
    """
    if positions is not None:  # one number for both, so that the trie below has a single kind of key to compare
        sequences = [[p << 32 | t for p, t in zip(ps, ts, strict=True)] for ps, ts in zip(positions, sequences, strict=True)]
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    rows = [sequences[i] for i in order]
    shared = [0] + [_shared_prefix(a, b) for a, b in zip(rows, rows[1:])]  # with the row above
    packed, lengths, parents, answers = [], [], [], np.zeros(len(rows), np.int64)
    todo = [(0, len(rows), 0, -1)] if rows else []  # rows [lo, hi) agree on their first `depth` tokens, held by `parent`
    while todo:
        lo, hi, depth, parent = todo.pop()
        common = min(shared[lo + 1:hi], default=len(rows[lo]))
        if common > depth:
            packed += rows[lo][depth:common]
            lengths.append(common - depth)
            parents.append(parent)
            parent = len(lengths) - 1
        while lo < hi and len(rows[lo]) == common:  # sequences that end here come first, being the shortest
            answers[order[lo]] = len(packed) - 1
            lo += 1
        forks = [lo] + [i for i in range(lo + 1, hi) if shared[i] == common] + [hi]
        todo += [(a, b, common, parent) for a, b in zip(forks, forks[1:]) if a < b][::-1]  # first branch next: preorder
    keys = torch.tensor(packed, dtype=torch.int64)
    lengths, parents = np.array(lengths, np.int32), np.array(parents, np.int32)
    where = torch.from_numpy(token_depths(lengths, parents)) if positions is None else keys >> 32
    return Forest(keys & 0xFFFFFFFF, where, lengths, parents, torch.from_numpy(answers))


def _shared_prefix(a, b):
    """Length of the common prefix of two lists, by bisection: comparing slices runs at C speed."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def token_depths(lengths, parents):
    """[S], [S] -> int64 [T], each token's depth in its tree."""
    below = np.zeros(len(lengths) + 1, np.int64)  # depth at which a segment's children begin; below[-1] = 0 for roots
    for s, (length, parent) in enumerate(zip(lengths.tolist(), parents.tolist())):
        below[s] = below[parent] + length
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(below[:-1] - ends, lengths)


def rounded(forest, multiple):
    """The forest with a root of idle tokens behind it, so that T is a multiple; what was there sees none of them."""
    idle = -len(forest.tokens) % multiple
    if not idle:
        return forest
    return Forest(F.pad(forest.tokens, (0, idle)), F.pad(forest.positions, (0, idle)), np.append(forest.lengths, np.int32(idle)),
                  np.append(forest.parents, np.int32(-1)), forest.answers)


def visible(forest, queries, keys):
    """The rule, as a boolean mask [len(queries), len(keys)] over packed token indices (int64 arrays)."""
    segment = np.repeat(np.arange(len(forest.lengths)), forest.lengths)
    depth = token_depths(forest.lengths, forest.parents)
    own = np.unique(segment[queries])  # rows of the ancestor table that are needed
    table = np.zeros((len(own), len(forest.lengths)), bool)
    for row, s in enumerate(own):
        while s >= 0:
            table[row, s] = True
            s = forest.parents[s]
    return table[np.searchsorted(own, segment[queries])][:, segment[keys]] & (depth[keys] <= depth[queries][:, None])


def _branches(forest, rows):
    """Cut attention where trees fork first: [(index into rows, index of keys, mask)]: a few small dense problems.

    A branch is a root, or a child of a root with all that hangs from it; it needs its own keys and the root's.
    """
    branch = np.zeros(len(forest.lengths), np.int64)
    root = np.full(len(forest.lengths), -1)
    for s, parent in enumerate(forest.parents.tolist()):
        if parent < 0 or forest.parents[parent] < 0:
            branch[s], root[s] = s, parent
        else:
            branch[s], root[s] = branch[parent], root[parent]
    segment = np.repeat(np.arange(len(forest.lengths)), forest.lengths)
    out = []
    for b in np.unique(branch[segment[rows]]):
        queries = np.flatnonzero(branch[segment[rows]] == b)
        keys = np.flatnonzero((branch[segment] == b) | (segment == root[b]))
        out.append([torch.from_numpy(x) for x in (queries, keys, visible(forest, rows[queries], keys))])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 3. The frozen decoder (Llama, Mistral, Qwen2), hand-written: RMSNorm, RoPE, grouped-query attention, SwiGLU

FAMILIES = ("llama", "mistral", "qwen2")  # model_type; Llama 1-3.x and SmolLM2; Mistral-7B and Nemo; Qwen2 and 2.5


class Decoder(NamedTuple):
    config: dict
    embedding: torch.Tensor  # [vocabulary, D]
    blocks: list[dict]       # the kept blocks only
    inv_freq: torch.Tensor   # [head_dim / 2] float32, RoPE's angular frequencies


def load_decoder(llm_dir, layer=None, device="cpu", dtype=torch.bfloat16):
    """Reads the first `layer` blocks (default: all but the last) of a Hugging Face checkpoint folder.

    Tensors are read one at a time, straight to device and dtype, so that the host never holds a whole shard; norms stay float32.
    Raises InputError where the folder lacks a file, is of another family, or a shape does not match its config.
    """
    llm_dir = Path(llm_dir)
    config = llm_config(llm_dir)
    n_layers, D, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = n_layers - 1 if layer is None else layer
    if not 1 <= layer <= n_layers:
        raise InputError(f"{llm_dir}: layer {layer} asked for, but the model has {n_layers} blocks; choose 1 to {n_layers}")
    read, names = _weights_reader(llm_dir)

    def weight(name, *shape, to=dtype):
        if name not in names:
            raise InputError(f"{llm_dir}: no tensor {name} in its safetensors; the folder is not a whole {config['model_type']} checkpoint")
        tensor = read(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{llm_dir}: tensor {name} has shape {list(tensor.shape)} where config.json implies {list(shape)}; weights and config belong to different models")
        return tensor.to(device, to)

    def block(i):
        p = f"model.layers.{i}."
        qkv = [(p + f"self_attn.{x}_proj", n * head_dim) for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
        biases = [name + ".bias" for name, _ in qkv] if config["model_type"] == "qwen2" else []
        if extra := sorted(n for n in names if n.startswith(p) and n.endswith(".bias") and n not in biases):
            raise InputError(f"{llm_dir}: tensor {extra[0]}: a bias here is not supported; use a checkpoint without (qwen2 alone has it, on q, k and v)")
        return {
            "attention_norm": weight(p + "input_layernorm.weight", D, to=torch.float32),
            "wqkv": torch.cat([weight(name + ".weight", n, D) for name, n in qkv]),
            "bqkv": torch.cat([weight(name + ".bias", n) for name, n in qkv]) if biases else None,
            "wo": weight(p + "self_attn.o_proj.weight", D, heads * head_dim),
            "mlp_norm": weight(p + "post_attention_layernorm.weight", D, to=torch.float32),
            "w_gate_up": torch.cat([weight(p + f"mlp.{x}_proj.weight", inner, D) for x in ("gate", "up")]),
            "w_down": weight(p + "mlp.down_proj.weight", D, inner),
        }

    embedding = weight("model.embed_tokens.weight", config["vocab_size"], D)
    return Decoder(config, embedding, [block(i) for i in range(layer)], config["inv_freq"].float().to(device))


LLM_CURE = "--llm wants a Hugging Face checkpoint folder with config.json, *.safetensors and a tokenizer; download it anew"
UNQUANTISED = "download the bfloat16 or float16 checkpoint, the one without FP8, GPTQ, AWQ or bnb in its name"


def llm_config(llm_dir):
    """What decides an LLM's states in its config.json, and no more: checked, with what may be left to defaults filled in.

    Two entries are ours: "inv_freq" and "context", how many tokens a string may have: the positions that the model knows,
    or its sliding window where that is shorter, since up to there a window changes nothing.
    """
    path = Path(llm_dir) / "config.json"
    family = read_json(path, {"model_type": str}, LLM_CURE)["model_type"]
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    maybe = type(None)
    sizes = {
        "num_hidden_layers": int, "hidden_size": int, "intermediate_size": int, "vocab_size": int,
        "num_attention_heads": int, "num_key_value_heads": (int, maybe), "head_dim": (int, maybe)}
    context = {"max_position_embeddings": (int, maybe), "sliding_window": (int, maybe)}
    others = {
        "rms_norm_eps": float, "hidden_act": (str, maybe), "use_sliding_window": (bool, maybe),
        "rope_theta": (float, maybe), "rope_parameters": (dict, maybe), "rope_scaling": (dict, maybe)}
    entries = read_json(path, sizes | context | others, LLM_CURE)
    for key in sizes | context:
        check_range(path, entries, key, 1, 1 << 24, LLM_CURE)
    check_range(path, entries, "rms_norm_eps", 0, 1, LLM_CURE)
    for key in ("quantization_config", "compression_config"):
        if method := entries.get(key):
            method = method.get("quant_method", key) if isinstance(method, dict) else method
            raise InputError(f"{path}: {key!r} says that the weights are quantised ({method}); {UNQUANTISED}")
    if entries.get("hidden_act") not in (None, "silu"):
        raise InputError(f"{path}: hidden_act {entries['hidden_act']!r} is not supported; supported: silu")

    config = {key: entries.get(key) for key in ("model_type", "rms_norm_eps", *sizes)}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = kv_heads = config["num_key_value_heads"] or heads
    config["head_dim"] = config["head_dim"] or max(1, config["hidden_size"] // heads)
    if heads % kv_heads:
        raise InputError(f"{path}: 'num_attention_heads' is {heads}, no multiple of 'num_key_value_heads', {kv_heads}; {LLM_CURE}")
    if config["head_dim"] % 2:
        raise InputError(f"{path}: 'head_dim' is {config['head_dim']}, but RoPE turns pairs; {LLM_CURE}")
    config["inv_freq"] = _rope_frequencies(path, entries, config["head_dim"])
    windowed = entries.get("use_sliding_window", family == "mistral")
    window = entries.get("sliding_window", 4096) if windowed else None
    config["context"] = min(entries.get("max_position_embeddings") or 1 << 20, window or 1 << 20)
    return config


def _rope_frequencies(path, entries, head_dim):
    """-> float64 [head_dim / 2]. Scaling slows them down, so that far positions look like the nearer ones seen in training."""
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}  # transformers 5 and 4 name it differently
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{path}: 'rope_type' {kind!r}: RoPE scaling that is not supported; supported: default, linear, llama3")
    theta = entries.get("rope_theta")
    rope = {"rope_theta": 10000.0 if theta is None else theta} | rope
    wanted = {"default": ["rope_theta"], "linear": ["rope_theta", "factor"], "llama3": [
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}[kind]
    check_keys(path, rope, dict.fromkeys(wanted, float), LLM_CURE)
    for key in wanted:
        check_range(path, rope, key, 1e-6, 1e12, LLM_CURE)
    freq = float(rope["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "llama3":  # what turns often within the first training's context is kept, what turns seldom slowed, in between a blend
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        check_range(path, rope, "high_freq_factor", low + 1e-6, 1e12, LLM_CURE)
        kept = ((freq * rope["original_max_position_embeddings"] / (2 * np.pi) - low) / (high - low)).clamp(0, 1)
        return freq * (kept + (1 - kept) / rope["factor"])
    return freq / rope["factor"] if kind == "linear" else freq


def weight_files(llm_dir):
    """The safetensors files that are read: those of the index, else model.safetensors, else all there are."""
    llm_dir = Path(llm_dir)
    index, whole = llm_dir / "model.safetensors.index.json", llm_dir / "model.safetensors"
    if index.exists():
        cure = "download it anew"
        names = list(read_json(index, {"weight_map": dict}, cure)["weight_map"].values())
        for name in names:
            if not isinstance(name, str) or not name:
                raise InputError(f"{index}: 'weight_map' holds {json.dumps(name)[:50]}, not a file's name; {cure}")
            if Path(name).name != name or name == "..":
                raise InputError(f"{index}: 'weight_map' holds {name[:200]!r}, in another folder; {cure}")
        if not names:
            raise InputError(f"{index}: 'weight_map' is empty; {cure}")
        return sorted({llm_dir / name for name in names})
    files = [whole] if whole.exists() else sorted(llm_dir.glob("*.safetensors"))
    if not files:
        raise InputError(f"{llm_dir}: no *.safetensors; download the model's weights into this folder")
    return files


def _weights_reader(llm_dir):
    """(read(name) -> tensor, names) over the files of weight_files. Raises InputError where one is broken or quantised."""
    from safetensors import SafetensorError, safe_open
    where = {}
    for file in weight_files(llm_dir):
        if file.exists() and not file.is_file():  # a pipe would be waited for without end
            raise InputError(f"{file}: not a regular file; download it anew")
        try:
            with safe_open(file, framework="pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: cannot be read ({e}); download it anew") from None
        for name, kind in kinds.items():
            if name.startswith(("model.", "lm_head.")) and kind not in ("F32", "F16", "BF16", "F64"):
                raise InputError(f"{file}: tensor {name} is {kind}, of a quantised checkpoint; {UNQUANTISED}")
        where.update(dict.fromkeys(kinds, file))

    def read(name):  # a mapping of its own for every tensor: what was copied elsewhere leaves memory at once
        with safe_open(where[name], framework="pt") as opened:
            return opened.get_tensor(name)
    return read, where.keys()


def load_unembedding(llm_dir):
    """-> (the final norm's weight [D], unembedding [vocabulary, D]) float32: what turns a state into next-token scores."""
    llm_config(llm_dir)  # refuses what is quantised
    read, names = _weights_reader(llm_dir)
    wanted = "model.norm.weight", "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    if missing := set(wanted) - set(names):
        raise InputError(f"{llm_dir}: no tensor {missing.pop()} in its safetensors; download it anew")
    return tuple(read(name).float() for name in wanted)


def read_json(path, wanted=None, cure="download or write it anew"):
    """The object in a JSON file that others may have written.

    wanted: {key: type, tuple of types, or for an object in it such a dict again}. A key may be missing where None's type
    is among its types; an int is a float too, a bool is neither.
    Raises InputError, which names file, key and cure, where anything is not as wanted.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for without end
        raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {cure}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); {cure}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e}); {cure}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: holds a {type(entries).__name__}, not an object; {cure}")
    check_keys(path, entries, wanted or {}, cure)
    return entries


def check_keys(path, entries, wanted, cure, inside=""):
    """Raises InputError where entries, from the file, are not as wanted (see read_json)."""
    for key, types in wanted.items():
        nested = types if isinstance(types, dict) else None
        types = dict if nested else types
        types = types if isinstance(types, tuple) else (types,)
        value = entries.get(key)
        if key not in entries and type(None) not in types:
            raise InputError(f"{path}: no {inside + key!r}; {cure}")
        if not isinstance(value, types + (int,) * (float in types)) or isinstance(value, bool) and bool not in types:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise InputError(f"{path}: {inside + key!r} is {json.dumps(value)[:50]}, not a {names}; {cure}")
        if nested:
            check_keys(path, value, nested, cure, f"{inside}{key}.")


def check_range(path, entries, key, low, high, cure):
    """Raises InputError where a number among the entries is not from low to high; a missing one and null are not looked at."""
    value = entries.get(key)
    if value is not None and not low <= value <= high:  # NaN is not either
        raise InputError(f"{path}: {key!r} is {json.dumps(value)[:50]}, not from {low} to {high}; {cure}")


def read_array(path, dtype, shape, cure="download or write it anew"):
    """Maps a .npy file that others may have written: exactly this dtype and shape, rows first. Nothing is unpickled.

    Raises InputError, which names file and cure, where anything is not as wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {cure}")
    try:
        array = np.load(path, mmap_mode="r")  # allow_pickle is off
    except Exception as e:  # numpy raises nearly anything on a broken file
        raise InputError(f"{path}: not a .npy file of numbers ({' '.join(str(e).split())[:100]}); {cure}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of arrays, not one .npy array; {cure}")
    if array.dtype != np.dtype(dtype) or array.shape != tuple(shape) or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", columns first"
        raise InputError(f"{path}: {array.dtype} {list(array.shape)}{order}, where {np.dtype(dtype)} {list(shape)} is wanted; {cure}")
    return array


NATIVE = torch.float32, torch.bfloat16  # what the extension's kernels know; others, float16 among them, take the PyTorch path
SIZES = 64  # what matrix products' rows are a multiple of: for every new number of them, oneDNN compiles and keeps new kernels


@torch.inference_mode()
def decode(decoder, forest):
    """Runs the kept blocks over the packed row; -> float32 [N, D], the residual stream at the N answers (no final norm).

    The residual stream and the norms are float32 whatever the matrix products use: one dimension carries 0.8 of a
    state's norm, and rounding it to bfloat16 once a block drowns the rest.
    """
    forest = rounded(forest, SIZES)
    heads, kv_heads, head_dim, eps = (decoder.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    device, dtype = decoder.embedding.device, decoder.embedding.dtype
    angle = torch.outer(forest.positions.float().to(device), decoder.inv_freq)  # [T, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    ends, end_of = torch.unique(forest.answers, return_inverse=True)  # equal captions share their answers
    attend, ends = attention_over(forest, device, dtype), F.pad(ends, (0, -len(ends) % SIZES)).to(device)

    x = decoder.embedding[forest.tokens.to(device)].float()  # [T, D], the residual stream
    update = None                                            # what the last sublayer adds to it
    for i, block in enumerate(decoder.blocks):
        h = add_and_norm(x, update, block["attention_norm"], eps, dtype)
        if i < len(decoder.blocks) - 1:
            qkv = F.linear(h, block["wqkv"], block["bqkv"]).view(len(x), heads + 2 * kv_heads, head_dim)
            rope(qkv, cos, sin, heads + kv_heads)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views
            mixed = attend(q, k, v)
        else:  # nobody reads the last block's output but at the answers: keys and values for all, the rest for them
            sizes = heads * head_dim, 2 * kv_heads * head_dim
            (wq, wkv), (bq, bkv) = (w.split(sizes) if w is not None else (None, None) for w in (block["wqkv"], block["bqkv"]))
            kv = F.linear(h, wkv, bkv).view(len(x), 2 * kv_heads, head_dim)
            rope(kv, cos, sin, kv_heads)
            k, v = kv.split(kv_heads, dim=1)
            q = F.linear(h[ends], wq, bq).view(len(ends), heads, head_dim)
            rope(q, cos[ends], sin[ends], heads)
            mixed, x = attend(q, k, v, ends), x[ends]
        h = add_and_norm(x, F.linear(mixed.flatten(1), block["wo"]), block["mlp_norm"], eps, dtype)
        update = F.linear(swiglu(F.linear(h, block["w_gate_up"])), block["w_down"])
    return (x + update)[end_of.to(device)]


def attention_over(forest, device, dtype):
    """-> attend(q [Q, H, d], k [T, Hkv, d], v [T, Hkv, d], rows=None) -> [Q, H, d]: attention by the rule, no S x S buffer.

    rows: int64 [Q], the queries' places in the packed row; None: all T.
    With the extension every ancestor's keys and values are read in place. Without it: dense attention per branch.
    """
    if flame_ext and dtype in NATIVE and (device.type == "cpu" or device.type == "cuda" and flame_ext.cuda):
        layout = flame_ext.layout(forest.lengths, forest.parents)

        def attend(q, k, v, rows=None):
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            flame_ext.attention(q, k, v, out, layout, q.shape[-1] ** -0.5, rows, stream)
            return out
        return attend

    every_row = _branches(forest, np.arange(len(forest.tokens)))

    def attend(q, k, v, rows=None):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # a key head serves its group
        for branch in every_row if rows is None else _branches(forest, rows.cpu().numpy()):
            queries, keys, mask = (x.to(device) for x in branch)
            parts = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))  # [1, H, tokens, d]
            out[queries] = F.scaled_dot_product_attention(*parts, attn_mask=mask)[0].transpose(0, 1)
        return out
    return attend


def add_and_norm(x, update, weight, eps, dtype):
    """x float32 [T, D] += update, in place; -> RMSNorm(x) * weight [T, D] in dtype."""
    if flame_ext and dtype in NATIVE and x.device.type == "cpu":
        out = torch.empty(x.shape, dtype=dtype)
        flame_ext.rmsnorm(x, weight, out, eps, update)
        return out
    if update is not None:
        x += update
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def rope(qkv, cos, sin, heads):
    """Rotates the first `heads` heads of [T, heads + others, d] in place; the pairs are (i, i + d/2)."""
    if flame_ext and qkv.dtype in NATIVE and qkv.device.type == "cpu":
        return flame_ext.rope(qkv, cos, sin, heads)
    a, b = qkv[:, :heads].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    qkv[:, :heads] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)


def swiglu(gate_up):
    """[T, 2F] -> [T, F], silu(gate) * up."""
    if flame_ext and gate_up.dtype in NATIVE and gate_up.device.type == "cpu":
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        flame_ext.swiglu(gate_up, out)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---------------------------------------------------------------------------------------------------------------------
# 4. The text tower: tokenizer + forest + decoder

class Tokenizer(NamedTuple):
    encode: object        # str -> list[int], special tokens as the model's own tokenizer adds them by default
    encode_batch: object  # list[str] -> list[list[int]]
    decode: object        # list[int] -> str


def tokenizer_file(llm_dir):
    """A checkpoint folder's tokenizer.json, else tokenizer.model (sentencepiece), else tekken.json (tiktoken)."""
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
        path = Path(llm_dir) / name
        if path.exists():
            if not path.is_file():  # a pipe would be waited for without end
                raise InputError(f"{path}: not a regular file; download it anew")
            return path
    raise InputError(f"{llm_dir}: no tokenizer.json, tokenizer.model or tekken.json; download the model's tokenizer into this folder")


def adds_bos(path):
    """Does the tokenizer.model want BOS in front? tokenizer_config.json beside it says so; else LlamaTokenizer's default."""
    settings = path.with_name("tokenizer_config.json")
    if not settings.exists():
        return True
    return bool(read_json(settings, {"add_bos_token": (bool, type(None))}).get("add_bos_token", True))


def load_tokenizer(llm_dir):
    path = tokenizer_file(llm_dir)
    try:
        if path.name == "tokenizer.json":
            from tokenizers import Tokenizer as Published
            published = Published.from_file(str(path))
            published.no_padding(), published.no_truncation()  # a file may carry both settings
            tokenizer = Tokenizer(lambda text: published.encode(text).ids, lambda texts: [e.ids for e in published.encode_batch(texts)], published.decode)
        elif path.name == "tokenizer.model":
            from sentencepiece import SentencePieceProcessor
            pieces = SentencePieceProcessor(model_file=str(path))
            tokenizer = _with_bos(pieces.encode, pieces.decode, pieces.bos_id(), adds_bos(path))
        else:
            tokenizer = _tekken(path)
        if not tokenizer.encode("A cat."):
            raise ValueError("it makes no token of a text")
    except InputError:
        raise
    except ImportError as e:
        raise InputError(f"{path}: reading it needs {e.name}; pip install {e.name}") from None
    except Exception as e:  # the libraries raise bare exceptions of their own on a broken file
        raise InputError(f"{path}: not a tokenizer ({' '.join(str(e).split())}); download it anew") from None
    return tokenizer


def _tekken(path):
    from tiktoken import Encoding
    tekken = read_json(path, {"config": dict, "vocab": list})
    config, vocabulary = tekken["config"], tekken["vocab"]
    wanted = {"default_num_special_tokens": int, "default_vocab_size": int, "pattern": str}
    check_keys(path, config, wanted, "download it anew")
    special = config["default_num_special_tokens"]  # these ids come first; <s> is 1
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in vocabulary[:config["default_vocab_size"] - special]}
    pieces = Encoding(path.name, pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        return [i + special for i in pieces.encode(text)]

    def decode(ids):
        return pieces.decode([i - special for i in ids if i >= special])

    return _with_bos(encode, decode, 1, True)


def _with_bos(encode, decode, bos, add_bos):
    """A Tokenizer that puts BOS in front and, as every published tokenizer.json does, takes a literal <s> in a text for it."""
    def whole(text):
        first, *rest = (encode(part) for part in text.split("<s>"))
        return [bos] * add_bos + sum(([bos] + part for part in rest), first)
    return Tokenizer(whole, lambda texts: [whole(text) for text in texts], decode)


def tokenize(tokenizer, captions, prompts, positions="restart"):
    """-> ([N] prefix ids, [N][K] facet ids).

    "restart": prefix + facet are the ids of the whole string `prefix(c) + " " + facet`. "sequential", the released text
    path: prefix + all facets are the ids of one string with the questions one after the other.
    """
    prefix, facets = prompt_set(prompts)
    texts = [clean(c) for c in captions] if positions == "restart" else _released_captions(tokenizer, captions)
    texts = [prefix.replace("{}", text) for text in texts]
    if suffixes := _facet_ids(tokenizer, prompts, positions):
        return tokenizer.encode_batch(texts), [suffixes] * len(texts)
    wholes = [_tokenize_whole(tokenizer, text, facets, positions) for text in texts]
    return [w[0] for w in wholes], [w[1] for w in wholes]


def _released_captions(tokenizer, captions):
    """Captions as the released code puts them into the template: cut to 1,024 tokens, BOS included, decoded, cleaned unstripped."""
    texts = [tokenizer.decode(ids[:1024]) for ids in tokenizer.encode_batch(captions)]
    texts = [t if not t or t.endswith((".", "?", '"', "'")) else t + "." for t in texts]
    return [(t[:-1] + "." if t.endswith("?") else t).replace('"', "'") for t in texts]


@functools.lru_cache
def _facet_ids(tokenizer, prompts, positions):
    """Facets' ids where they may be tokenized once for all captions, which the tokenizer itself is asked; else None."""
    prefix, facets = PROMPTS[prompts]
    probes = ("A cat.", "", " ", "'(", '"', "1 2", "\u732b", "\u0301", "\U0001f98a", "a\n\n", "x" * 99)
    answers = [_tokenize_whole(tokenizer, prefix.replace("{}", probe), facets, positions) for probe in probes]
    alone = [tokenizer.encode(prefix.replace("{}", probe)) for probe in probes]
    return answers[0][1] if all(a == (p, answers[0][1]) for a, p in zip(answers, alone)) else None


def _tokenize_whole(tokenizer, text, facets, positions):
    """K whole strings, tokenized -> (what they share with the prefix alone, the K remainders)."""
    if positions == "sequential":  # the k-th string holds all questions up to the k-th; the last one is what is encoded
        lone_bos = ["<s> " + facets[0]] if len(facets) > 1 else facets[:1]  # the released templates say so
        ids = tokenizer.encode_batch(list(accumulate([text, *lone_bos, *facets[1:]], "{} {}".format)))
        cuts = [_shared_prefix(ids[-1], beginning) for beginning in ids]
        return ids[-1][:cuts[0]], [ids[-1][a:b] for a, b in zip(cuts, cuts[1:])]
    prefix, *strings = tokenizer.encode_batch([text] + [f"{text} {facet}" for facet in facets])
    cut = min(_shared_prefix(prefix, s) for s in strings)
    return prefix[:cut], [s[cut:] for s in strings]


def caption_forest(prefixes, suffixes, positions="restart"):
    """[N] prefix ids, [N][K] facet ids -> the Forest of all N * K strings, answers caption by caption, facet by facet."""
    sequences = [p + f for p, fs in zip(prefixes, suffixes) for f in fs]
    if positions == "restart":
        return build_forest(sequences)
    where = []  # as if the K facets stood one after the other
    for p, fs in zip(prefixes, suffixes):
        starts = np.cumsum([len(p)] + [len(f) for f in fs]).tolist()
        where += [[*range(len(p)), *range(start, start + len(f))] for start, f in zip(starts, fs)]
    return build_forest(sequences, where)


def default_dtype(device):
    """bfloat16 where matrix products in it are fast, else float32."""
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.bfloat16


def keep_freed_memory():
    """Lets glibc keep what is freed (where there is a glibc). Every block of a tower frees and takes the same large buffers
    again; given back to the system in between, their pages are zeroed anew each time, a sixth of the time on CPU."""
    if mallopt := os.name == "posix" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 1 << 30), mallopt(-1, (1 << 31) - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def listed(captions):
    """A list or tuple of str as it is; a str alone is one caption. Raises ValueError for anything else."""
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, (list, tuple)):
        raise ValueError(f"captions must be a list of str, or one str, not {type(captions).__name__}")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions must be a list of str, but captions[{i}] is {type(caption).__name__}")
    return captions


BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens in one packed row: on CPU its activations stay in cache


class TextEncoder:
    """The frozen text tower.

    llm_dir    Hugging Face checkpoint folder (config.json, safetensors, tokenizer.json, tokenizer.model or tekken.json)
    layer      how many blocks to keep; the paper takes the output of all but the last
    positions  "restart": every facet's RoPE positions go on from the caption, so that an embedding is fixed by its string;
               "sequential": compatibility with the released code, as if it encoded every caption alone: consecutive over all K
               facets, the caption decoded from its first 1,024 tokens, in "short" and "long" a literal <s> before the first facet
    budget     tokens in one packed row, up to a caption more (default: BUDGET)
    """

    def __init__(self, llm_dir, device="cpu", dtype=torch.bfloat16, layer=None, positions="restart", budget=None):
        if positions not in ("restart", "sequential"):
            raise ValueError(f"positions must be 'restart' or 'sequential', not {positions!r}")
        if torch.device(device).type == "cpu":
            keep_freed_memory()
        self.llm_dir, self.tokenizer = llm_dir, load_tokenizer(llm_dir)
        self.decoder = load_decoder(llm_dir, layer, torch.device(device), dtype)
        self.layer, self.positions = len(self.decoder.blocks), positions
        self.dim = self.decoder.config["hidden_size"]
        self.budget = budget or BUDGET[torch.device(device).type]
        self.context = min(self.decoder.config["context"], 1536 if positions == "sequential" else 1 << 20)  # 1,536: the released limit
        self.truncated = 0  # captions cut so far because the model's context is shorter

    def encode(self, captions, prompts="long"):
        """list[str], or one str -> float32 [N, K, D] on the CPU: the state at each facet's last token, not normalised.

        Raises ValueError for anything else, and for prompts that are none of PROMPTS.
        """
        captions = listed(captions)
        out = torch.empty(len(captions), len(prompt_set(prompts).facets), self.dim)
        for rows, facets in self.encode_batches(captions, prompts):
            out[rows] = facets
        return out

    def encode_batches(self, captions, prompts="long"):
        """Yields (rows, facets float32 [n, K, D]) a packed row at a time; together the rows are all captions, once each."""
        for rows, forest in self.pack(captions, prompts):
            yield rows, self.run(forest, len(rows))

    def pack(self, captions, prompts="long"):
        """Yields (rows, Forest of their strings), each a packed row; may run ahead of `run` in a thread of its own.

        Captions are sorted by length, since the bar's ETA and the memory are steadier that way; no caption is padded. As few
        packed rows as the budget allows, about equally long: what is left over would be short, which is slow, and of any length.
        """
        captions = listed(captions)
        prefixes, suffixes = tokenize(self.tokenizer, captions, prompts, self.positions)
        for i, (prefix, facets) in enumerate(zip(prefixes, suffixes)):
            if len(prefix) + sum(map(len, facets)) > self.context:
                (prefixes[i],), (suffixes[i],) = self._fitting(captions[i], prompts)
        sizes = [len(prefix) + sum(map(len, facets)) for prefix, facets in zip(prefixes, suffixes)]  # upper bounds: facets share their openings
        total, batch, tokens, made = sum(sizes), [], 0, 0
        rows = -(-total // self.budget)
        for i in sorted(range(len(captions)), key=sizes.__getitem__):
            batch.append(i)
            tokens += sizes[i]
            if tokens * rows // total > made:
                yield batch, caption_forest([prefixes[j] for j in batch], [suffixes[j] for j in batch], self.positions)
                batch, made = [], tokens * rows // total

    def run(self, forest, n):
        """The n captions' facet states, float32 [n, K, D] on the CPU, of a Forest that `pack` made."""
        if (token := forest.tokens.max().item()) >= len(self.decoder.embedding):
            raise InputError(f"{self.llm_dir}: its tokenizer says {token}, its weights have {len(self.decoder.embedding)} tokens; they belong to different models")
        return decode(self.decoder, forest).cpu().view(n, -1, self.dim)

    def _fitting(self, caption, prompts):
        """tokenize() of the longest beginning of a caption that fits into the context: the prompt itself is never cut."""
        low, high, best = 0, len(caption), tokenize(self.tokenizer, [""], prompts, self.positions)
        while low < high:
            middle = (low + high + 1) // 2
            (prefix,), (facets,) = found = tokenize(self.tokenizer, [caption[:middle]], prompts, self.positions)
            if len(prefix) + sum(map(len, facets)) <= self.context:
                low, best = middle, found
            else:
                high = middle - 1
        (prefix,), (facets,) = best
        if len(prefix) + sum(map(len, facets)) > self.context:
            raise InputError(f"{self.llm_dir}: its context of {self.context} tokens cannot hold the {prompts} prompts; choose another LLM or fewer prompts")
        self.truncated += 1
        return best


def llm_fingerprint(llm_dir):
    """Names an LLM by what is read of it: "2-" and 16 hexadecimal digits of a SHA-256.

    Over what llm_config takes of config.json, the tokenizer's file, and each safetensors file's name, size, header and
    16 samples: milliseconds for a 24-GB model, and still a fine-tune and its base are told apart.
    Raises InputError where the folder cannot be read or is not supported.
    """
    config, tokenizer = llm_config(llm_dir), tokenizer_file(llm_dir)
    _weights_reader(llm_dir)  # complains of what is broken or quantised
    config["inv_freq"] = config["inv_freq"].float().tolist()
    bos = tokenizer.name == "tokenizer.model" and adds_bos(tokenizer)
    digest = hashlib.sha256(repr((sorted(config.items()), tokenizer.name, bos)).encode())
    digest.update(tokenizer.read_bytes())
    _sample_files(digest, weight_files(llm_dir))
    return "2-" + digest.hexdigest()[:16]


def same_llm(recorded, llm_dir):
    """Is llm_dir the LLM that a store or checkpoint recorded the fingerprint of? True where it recorded None, like the authors'.

    16 digits without "2-" are version 1: over config.json's bytes and all safetensors files there, without the tokenizer.
    """
    if recorded is None or recorded == llm_fingerprint(llm_dir):
        return True
    if len(recorded) != 16:
        return False
    every = sorted(Path(llm_dir).glob("*.safetensors"))
    for files in (every, weight_files(llm_dir)):  # what is never read may have come or gone
        digest = hashlib.sha256()
        _sample_files(digest, [Path(llm_dir) / "config.json", *files])
        if recorded == digest.hexdigest()[:16]:
            return True
    return False


def _sample_files(digest, files):
    """Adds each file's name, size, and 17 pieces evenly spaced from its start on."""
    for path in files:
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                digest.update(f"{path.name} {size}\n".encode())
                for k in range(17):
                    f.seek(size * k // 17)
                    digest.update(f.read(65536))
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror}); {LLM_CURE}") from None


# ---------------------------------------------------------------------------------------------------------------------
# 5. The embedding store, written by embed.py, read by train.py

STORE_META = {
    "N": int, "D": int, "columns": list, "store": (str, type(None)),
    "llm": {"name": str, "fingerprint": str, "layer": int, "positions": str}, "captions": {"path": str, "sha256": str},
}


class Store:
    """A finished store folder: embeddings.npy [N, M, D] of unit vectors, keys.txt, images.txt, meta.json.

    float16; or int8 with statistics.npy [2, M, D] (each column's mean and deviation per dimension) and scales.npy [N, M]:
    a vector is mean + deviation * scale * its 8-bit integers.
    Raises InputError where the folder is none, is unfinished, or does not hold together.
    """

    def __init__(self, path):
        self.path = Path(path)
        meta = self.path / "meta.json"
        if not meta.exists():
            unfinished = (self.path / "journal.json").exists()
            state = "is not finished; run the same" if unfinished else "is not an embedding store; make one with"
            raise InputError(f"{self.path}: {state} embed.py{' command again' * unfinished}")
        cure = "run embed.py --overwrite"
        self.meta = read_json(meta, STORE_META, cure)
        N, D, columns = self.meta["N"], self.meta["D"], self.meta["columns"]
        if N < 1 or D < 1 or not columns or columns != [c for c in COLUMNS if c in columns]:
            raise InputError(f"{meta}: N, D and columns must be above 0, and columns among {' '.join(COLUMNS)}; {cure}")
        kind = self.meta.get("store", "float16")
        if kind not in ("float16", "int8"):
            raise InputError(f"{meta}: 'store' is {kind!r}, neither float16 nor int8; {cure}")
        self.vectors = read_array(self.path / "embeddings.npy", kind, (N, len(columns), D), cure)
        self.scales = self.statistics = None
        if kind == "int8":
            self.scales = read_array(self.path / "scales.npy", np.float32, (N, len(columns)), cure)
            self.statistics = np.array(read_array(self.path / "statistics.npy", np.float32, (2, len(columns), D), cure))
        self.keys, self.images = (self._lines(self.path / name, cure) for name in ("keys.txt", "images.txt"))

    def _lines(self, path, cure):
        """A text file's lines, one a row of the store."""
        if not path.is_file():
            raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {cure}")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({e}); {cure}") from None
        if len(lines) != self.meta["N"]:
            raise InputError(f"{path}: {len(lines)} lines, where meta.json says {self.meta['N']}; {cure}")
        return lines

    def __len__(self):
        return len(self.keys)

    def __reduce__(self):  # pickled as its path: a loader's process maps the vectors instead of getting a copy of them
        return Store, (self.path,)

    def read(self, rows, columns):
        """int [n] rows, int [n, m] or [m] columns -> float32 tensor [n, m, D] of unit vectors. Raises ValueError where there is no such."""
        N, M, D = self.vectors.shape
        index = np.ravel_multi_index((np.asarray(rows)[:, None], np.atleast_2d(columns)), (N, M))
        if flame_ext:  # one pass over memory that knows nothing of what lies between
            out = torch.empty(*index.shape, D)
            flame_ext.unit_vectors(self.vectors, index.ravel(), out.view(-1, D), self.scales, self.statistics)
            return out
        out = torch.from_numpy(self.vectors.reshape(N * M, D)[index]).float()
        if self.scales is not None:
            mean, deviation = torch.from_numpy(self.statistics[:, index % M])
            out = mean + deviation * out * torch.from_numpy(self.scales.reshape(N * M, 1)[index])
        return out.div_(torch.linalg.vector_norm(out, dim=-1, keepdim=True).clamp_min_(1e-12))


open_store = Store  # open_store(path) -> store with .read(rows, columns), .keys, .images, .meta


# ---------------------------------------------------------------------------------------------------------------------
# 6. The image tower: a CLIP-style vision transformer under open_clip's weight names, and the projector

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):  # [B, tokens, width]
        B, S, width = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu":  # the fused kernel's backward pass is several times slower there at a ViT's short rows
            mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, S, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT up to the last block's raw output: FLAME uses neither ln_post nor proj.

    Published config (ViT-B/16): image 224, patch 16, width 768, 12 blocks, 12 heads; LayerNorm eps 1e-5, exact GELU.
    init: the blocks' initial weights, "clip" as OpenAI's CLIP has them, "published" as the released FLAME code.
    """

    def __init__(self, image_size, patch_size, width, layers, heads, init="clip"):
        super().__init__()
        self.gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        for block in self.transformer.resblocks:
            if init == "clip":  # residual branches shrink with depth
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            else:  # what nn.Linear and nn.MultiheadAttention begin with
                nn.init.xavier_uniform_(block.attn.in_proj_weight)
                nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, pixels, kept=None):
        """[B, 3, H, W] normalised pixels -> [B, 1 + patches, width]; token 0 is the class token.

        kept: int64 [B, n], the patches to look at; the others are left out (FLIP, Li et al. 2023: less to compute, harder to overfit).
        """
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, patches, width]
        position = self.positional_embedding.to(x.dtype)
        x = x + position[1:]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.class_embedding.to(x.dtype) + position[0]).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
            else:
                x = block(x)
        return x


class TextProjection(nn.Module):
    """A linear map of each store column: unit facet state u -> normalise(A (u - mean)).

    A = rest * I + basis diag(gain) basis^T, kept in this low-rank form since eleven full 5120 x 5120 maps are 1.15 GB.
    "none", "center" and "whiten" are closed-form (train.py computes them from the store) and frozen;
    "linear" is one trained matrix shared by all columns. The published recipe has none of this.
    """

    def __init__(self, dim, rank=0, linear=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(COLUMNS), dim))
        self.register_buffer("basis", torch.zeros(len(COLUMNS), dim, rank))
        self.register_buffer("gain", torch.zeros(len(COLUMNS), rank))
        self.register_buffer("rest", torch.ones(len(COLUMNS)))
        self.weight = nn.Parameter(torch.eye(dim)) if linear else None

    def forward(self, facets, columns):
        """[N, K, D], int [K] or [N, K] store columns -> [N, K, D] unit vectors."""
        columns = torch.as_tensor(columns, device=self.mean.device).expand(facets.shape[:2])
        x = F.normalize(facets.float(), dim=-1) - self.mean[columns]
        if self.basis.shape[-1]:
            out = torch.empty_like(x)
            for c in columns.unique().tolist():  # one product per column, not one small matrix per vector
                at = columns == c
                out[at] = self.rest[c] * x[at] + (x[at] @ self.basis[c] * self.gain[c]) @ self.basis[c].T
            x = out
        if self.weight is not None:
            x = F.linear(x, self.weight)
        return F.normalize(x, dim=-1)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image):
    """PIL image or uint8 tensor [..., 3, H, W] -> float32 [..., 3, H, W] where it lies, normalised by CLIP's mean and deviation."""
    image = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)
    mean, std = (torch.tensor(x, device=image.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return image.contiguous().float().div_(255).sub_(mean).div_(std)


class Flame(nn.Module):
    """The trained half: image tower (visual.*), projector (mm.*), text projection (text.*), scale and bias.

    config: image_size, patch_size, width, layers, heads; text_dim (D), projector_hidden, pool_first;
    text_rank, text_linear (shape of the text projection); columns (names of the store columns it is trained on);
    llm (which LLM the texts came from); init and init_logit_scale in training only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [config[name] for name in ("image_size", "patch_size", "width", "layers", "heads")]
        self.visual = VisionTransformer(*sizes, config.get("init", "clip"))
        hidden, D = config["projector_hidden"], config["text_dim"]
        self.mm = nn.Sequential(nn.Linear(config["width"], hidden), nn.GELU(), nn.Linear(hidden, D), nn.LayerNorm(D))
        self.text = TextProjection(D, config["text_rank"], config["text_linear"])
        self.logit_scale = nn.Parameter(torch.tensor(float(config.get("init_logit_scale", np.log(10)))))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # used by the sigmoid loss alone

    def forward(self, pixels, kept=None):  # what DistributedDataParallel calls
        return self.encode_image(pixels, kept)

    def encode_image(self, pixels, kept=None):
        """[B, 3, H, W] -> [B, D], L2-normalised: project every patch token, then average (the class token is dropped).

        pixels: what `preprocess` gives, one or a batch; or a PIL image, a path, or a list of any of these.
        pool_first averages before projecting: near the same accuracy on small towers at about half the time.
        kept: int64 [B, n], the only patches to look at, in training. In eval mode the output carries no gradient.
        Raises ValueError for anything else.
        """
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            patches = self.visual(self._batch(pixels), kept)[:, 1:]
            x = self.mm(patches.mean(1)) if self.config["pool_first"] else self.mm(patches).mean(1)
            return F.normalize(x.float(), dim=-1)

    def _batch(self, images):
        """Whatever encode_image takes -> [B, 3, size, size] in the weights' type, where they are."""
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("pictures: the list is empty")
            return torch.cat([self._batch(image) for image in images])
        pixels = images if isinstance(images, torch.Tensor) else self.preprocess(images)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        size = self.config["image_size"]
        if not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be floats [B, 3, {size}, {size}], as preprocess makes them, not {pixels.dtype} {list(pixels.shape)}")
        return pixels.to(self.visual.conv1.weight)

    def encode_text(self, facets, prompts="long"):
        """[N, K, D] facet states of a prompt set -> [N, K, D], its text projection applied, L2-normalised.

        In eval mode the output carries no gradient. Raises ValueError where the shape or the prompt set is another.
        """
        wanted = len(prompt_set(prompts).facets), self.config["text_dim"]
        found = list(facets.shape) if isinstance(facets, torch.Tensor) else type(facets).__name__
        if not isinstance(facets, torch.Tensor) or facets.ndim != 3 or facets.shape[1:] != wanted:
            raise ValueError(f"facets must be a tensor [N, {wanted[0]}, {wanted[1]}] for prompts {prompts!r}, not {found}")
        columns = [i for i, name in enumerate(COLUMNS) if name.split(".")[0] == prompts]
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.text(facets.to(self.text.mean.device), columns)

    def preprocess(self, image):
        """PIL image, or the path of a picture -> [3, size, size]: RGB, shortest side to size (bicubic), centre crop, normalise.

        Raises OSError where the path cannot be read as a picture, ValueError for anything else than these two.
        """
        from PIL import Image
        if isinstance(image, (str, Path)):
            with Image.open(image) as opened:
                return self.preprocess(opened)
        if not isinstance(image, Image.Image):
            raise ValueError(f"a picture must be a PIL image or a path, not {type(image).__name__}")
        image, size = image.convert("RGB"), self.config["image_size"]
        w, h = image.size
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        left, top = round((w - size) / 2), round((h - size) / 2)
        return to_pixels(image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))


def similarity(image, facets):
    """[M, D], [N, K, D] -> [N, M], mean over facets of the cosine. Raises ValueError for other shapes."""
    if image.ndim != 2 or facets.ndim != 3 or image.shape[1] != facets.shape[2]:
        raise ValueError(f"similarity wants images [M, D] and facets [N, K, D], not {list(image.shape)} and {list(facets.shape)}")
    return F.normalize(facets, dim=-1).mean(1) @ F.normalize(image, dim=-1).T


def load(checkpoint):
    """Checkpoint folder written by train.py, or the authors' .pt file -> Flame in eval mode.

    In its config: "columns", names of the store columns it was trained on (all of COLUMNS in the authors'); "llm", the text
    tower's name, fingerprint, layer and positions (the first three None in the authors': their file does not say); "pool" is
    "released" in the authors': an image's cosine with the mean raw state, not the mean of the cosines.
    Raises InputError where the checkpoint is missing or does not fit.
    """
    from safetensors import SafetensorError
    path = Path(checkpoint)
    try:
        config, weights = _read_released(path) if path.is_file() else _read_checkpoint(path)
        model = Flame({"columns": COLUMNS} | config)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError) as e:
        what = "its tensors" if path.is_file() else "model.safetensors and config.json"
        why = " ".join(str(e).split())[:300]
        raise InputError(f"{path}: {what} do not make a model ({why}); train or download it anew") from None
    return model.eval()


def _read_checkpoint(path):
    """A folder that train.py wrote -> (config, weights). What both say of the model's sizes must agree."""
    from safetensors.torch import load_file
    cure = "make a checkpoint with train.py"
    saved = read_json(path / "config.json", {"model": dict, "llm": dict, "store": (dict, type(None))}, cure)
    trained_on = (saved.get("store") or {}).get("columns", COLUMNS)
    config = {"columns": trained_on} | saved["model"]
    check_keys(path / "config.json", config, {"heads": int, "pool_first": bool, "columns": list}, cure)
    text = {"name": (str, type(None)), "fingerprint": (str, type(None)), "layer": (int, type(None)), "positions": (str, type(None))}
    check_keys(path / "config.json", saved["llm"], text, cure)
    if not (path / "model.safetensors").is_file():
        raise OSError("there is no file model.safetensors")
    weights = load_file(path / "model.safetensors")
    sizes = _sizes(weights) | {"text_rank": weights["text.basis"].shape[-1], "text_linear": "text.weight" in weights}
    if wrong := [name for name, size in sizes.items() if config.get(name) != size]:
        raise ValueError(f"{wrong[0]} is {config.get(wrong[0])} in config.json, {sizes[wrong[0]]} in the weights")
    if config["heads"] < 1 or config["width"] % config["heads"]:
        raise ValueError(f"{config['heads']} heads do not divide width {config['width']}")
    if saved["llm"].get("positions") not in (None, "restart", "sequential"):
        raise ValueError(f"positions {saved['llm']['positions']}")
    if not config["columns"] or not all(name in COLUMNS for name in config["columns"]):
        raise ValueError(f"columns {config['columns']}")
    return config | {"llm": dict.fromkeys(text) | {"positions": "restart"} | saved["llm"]}, weights


def _sizes(weights):
    """What an image tower's and a projector's tensors tell of their config. Raises LookupError or ValueError where they are none."""
    width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    patches = len(weights["visual.positional_embedding"]) - 1
    return {"image_size": patch_size * round(patches ** 0.5), "patch_size": patch_size, "width": width,
            "layers": len({name.split(".")[3] for name in weights if name.startswith("visual.transformer.resblocks.")}),
            "projector_hidden": len(weights["mm.0.weight"]), "text_dim": len(weights["mm.2.weight"])}


def _read_released(path):
    """The authors' .pt -> (config, weights). Nothing in it is executed, and of the LLM's tensors, if it holds them, no byte is read."""
    scalar = np.float64(0).__reduce__()[0]  # an optimizer's state may hold numpy scalars
    allowed = [np.dtype, *(type(np.dtype(t)) for t in "efdil?"), *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(allowed):
            file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights = {name.removeprefix("module."): tensor for name, tensor in file.get("state_dict", file).items()}
        sizes = _sizes(weights)
        config = sizes | {
            "heads": sizes["width"] // 64, "pool_first": False, "text_rank": 0, "text_linear": False,
            "llm": {"name": None, "fingerprint": None, "layer": None, "positions": "sequential"}, "pool": "released"}
    except Exception as e:  # torch.load raises nearly anything on a broken file
        why = " ".join(str(e).split("WeightsUnpickler error: ")[-1].split())[:200]  # before that, torch advises to trust the file
        raise InputError(f"{path}: not a FLAME checkpoint ({type(e).__name__}: {why}); give the authors' .pt file or a folder that train.py wrote") from None
    unused = "text.", "visual.ln_post.", "visual.proj="  # the frozen LLM, and what the released model has and never calls
    return config, {name: t for name, t in weights.items() if not f"{name}=".startswith(unused)} | TextProjection(config["text_dim"]).state_dict(prefix="text.")
