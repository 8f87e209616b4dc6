"""How fast is the text tower, and where does the time go? One run, tables on screen; nothing is asserted.

    python tests/bench_embed.py                   # about 15 minutes on 2 CPU cores
    python tests/bench_embed.py --words 100 --dtypes bfloat16
    python tests/bench_embed.py --nemo            # random weights of Mistral-Nemo's widths; for a GPU
    python tests/bench_embed.py --count           # what an H100 should reach on Mistral-Nemo, on paper

    (a) separate     K whole strings a caption, one causal pass each, transformers, padded batches of 8
    (b) dense mask   one pass a caption, flat facets, dense facet-decoupled mask, transformers, padded batches
                     of 16 (the released way)
    (c) pytorch      flame.TextEncoder without the extension
    (d) flame_ext    flame.TextEncoder as it is by default

It wants the demo's LLM and, for the cosines, its store. Captions vary in length, as captions do: half to one
and a half times the words asked for. transformers gets them in file order, as the released code does, and
pads to the longest of a batch; it runs the same 29 of 30 blocks, no final norm, no output layer. Every line
runs in a process of its own, for its peak memory, and measures the ceiling there: a product of [2048, width]
and [width, 1.5 * inner] matrices. "of ceiling" counts the matrix products of the tokens the method runs,
padding left out; "whitened" is the mean cosine to float32 separate passes, after the demo's whitening (one
dimension carries 0.8 of a state's norm: raw cosines hide every error).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flame  # noqa: E402
import train  # noqa: E402
from data.captions import read_captions  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "separate": "(a) K separate passes, transformers",
    "dense": "(b) one pass, dense mask, transformers",
    "pytorch": "(c) ours without the extension",
    "extension": "(d) ours",
}
ABLATIONS = {
    "everything": "everything",
    "no pruning": "whole last block",
    "no root": "a tree a caption, no shared root",
    "no trie": "flat facets, no shared words",
    "no packing": "one caption a row",
    "no extension": "pure PyTorch",
}


def make_captions(n, words):
    """n captions of words/2 to 3 words/2 words, evenly spread, in random order.

    They are strung together from the demo's test captions.
    """
    flat = []
    for row in read_captions(ROOT / "data/demo/test.tsv"):
        flat += row.captions["long"].split()
    lengths = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, n) * words).round().astype(int)
    ends = np.cumsum(lengths)
    return [" ".join(flat[end - length:end]) for end, length in zip(ends, lengths)]


def ceiling(device, dtype, config):
    """FLOP/s of a large matrix product, the best of several."""
    a = torch.randn(2048, config["hidden_size"], device=device).to(dtype)
    b = torch.randn(int(1.5 * config["intermediate_size"]), config["hidden_size"], device=device).to(dtype)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    best = 0
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(a, b)
        synchronize(device)
        best = max(best, 4 * flops / (time.perf_counter() - started))
    return best


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(work, device, seconds):
    """Runs work() until `seconds` are over, thrice at least; -> (seconds of the fastest, its result)."""
    times = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        result = work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times), result


# ---------------------------------------------------------------- the peers

def transformers_model(llm, layer, device, dtype):
    from transformers import AutoModelForCausalLM
    whole = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, attn_implementation="sdpa")
    model = whole.model.eval().to(device)
    model.layers = model.layers[:layer]
    model.norm = torch.nn.Identity()
    return model


@torch.inference_mode()
def separate_passes(model, prefixes, suffixes, device):
    strings = []
    for prefix, facets in zip(prefixes, suffixes):
        strings += [torch.tensor(prefix + facet) for facet in facets]
    out = []
    for start in range(0, len(strings), 8):
        batch = strings[start:start + 8]
        sizes = torch.tensor([len(tokens) for tokens in batch])
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)  # on the right
        mask = torch.arange(ids.shape[1]) < sizes[:, None]
        hidden = model(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        out.append(hidden[torch.arange(len(batch)), sizes - 1].float().cpu())
    return torch.cat(out).unflatten(0, (len(prefixes), -1))


@torch.inference_mode()
def dense_mask(model, prefixes, suffixes, device):
    out = [None] * len(prefixes)
    for start in range(0, len(prefixes), 16):
        batch = range(len(prefixes))[start:start + 16]
        rows = [flat_forest(prefixes[i], suffixes[i]) for i in batch]
        longest = max(len(row.tokens) for row in rows)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        where = torch.zeros_like(ids)
        mask = torch.zeros(len(batch), 1, longest, longest, dtype=torch.bool)
        mask[:, :, :, 0] = True  # padding sees something, or its softmax is NaN
        for n, row in enumerate(rows):
            T = len(row.tokens)
            ids[n, :T] = row.tokens
            where[n, :T] = row.positions
            mask[n, 0, :T, :T] = torch.from_numpy(flame.visible(row))
        inputs = {"attention_mask": mask.to(device), "position_ids": where.to(device)}
        hidden = model(ids.to(device), **inputs, use_cache=False).last_hidden_state
        for n, i in enumerate(batch):
            out[i] = hidden[n, rows[n].answers.to(device)].float().cpu()
    return torch.stack(out)


# ---------------------------------------------------------------- forests with an idea left out

def forest_of(tokens, lengths, parents, answers):
    """flame.Forest with positions by depth. tokens, answers: lists of tensors, to be joined."""
    lengths = np.array(lengths, np.int32)
    parents = np.array(parents, np.int32)
    depths = torch.from_numpy(flame.token_depths(lengths, parents))
    return flame.Forest(torch.cat(tokens), depths, lengths, parents, torch.cat(answers))


def flat_forest(prefix, facets):
    """One caption, every facet a segment of its own."""
    lengths = [len(prefix), *map(len, facets)]
    parents = [-1] + [0] * len(facets)
    tokens = [torch.tensor(part) for part in (prefix, *facets)]
    return forest_of(tokens, lengths, parents, [torch.from_numpy(np.cumsum(lengths)[1:] - 1)])


def joined(forests):
    """Several forests in one row, nothing shared between them."""
    lengths = []
    parents = []
    answers = []
    first = 0
    for f in forests:
        parents += np.where(f.parents < 0, -1, f.parents + len(lengths)).tolist()
        lengths += f.lengths.tolist()
        answers.append(f.answers + first)
        first += len(f.tokens)
    forest = forest_of([f.tokens for f in forests], lengths, parents, answers)
    return forest._replace(positions=torch.cat([f.positions for f in forests]))


def shared_root_flat_facets(prefixes, suffixes, positions):
    """The captions' common opening is one root; each caption hangs from it, each facet from its caption."""
    opening = min(flame.shared_prefix(prefixes[0], prefix) for prefix in prefixes)
    lengths = [opening]
    parents = [-1]
    tokens = [torch.tensor(prefixes[0][:opening])]
    answers = []
    at = opening
    for prefix, facets in zip(prefixes, suffixes):
        f = flat_forest(prefix, facets)
        parents += [0] + [len(lengths)] * (len(f.lengths) - 1)
        lengths += [f.lengths[0] - opening, *f.lengths[1:]]
        tokens.append(f.tokens[opening:])
        answers.append(f.answers - opening + at)
        at += len(f.tokens) - opening
    return forest_of(tokens, lengths, parents, answers)


def ablate(what, encoder):
    caption_forest = flame.caption_forest
    decode = flame.decode

    def a_tree_a_caption(prefixes, suffixes, positions):
        captions = zip(prefixes, suffixes)
        return joined([caption_forest([prefix], [facets], positions) for prefix, facets in captions])

    def decode_all(decoder, forest):
        states = decode(decoder, forest._replace(answers=torch.arange(len(forest.tokens))))
        return states[forest.answers.to(states.device)]

    if what == "no extension":
        flame.flame_ext = None
    if what == "no packing":
        encoder.budget = 1
    if what == "no root":
        flame.caption_forest = a_tree_a_caption
    if what == "no trie":
        flame.caption_forest = shared_root_flat_facets
    if what == "no pruning":
        flame.decode = decode_all


# ---------------------------------------------------------------- one line of a table, in its own process

def peer(args, method, prefixes, suffixes, layer):
    """-> work(number of captions), and the tokens that it runs."""
    model = transformers_model(args.llm, layer, args.device, getattr(torch, args.dtypes))
    run = separate_passes if method == "separate" else dense_mask
    tokens = 0
    for prefix, facets in zip(prefixes, suffixes):
        tokens += len(prefix) * (len(facets) if method == "separate" else 1) + sum(map(len, facets))

    def work(some):
        return run(model, prefixes[:some], suffixes[:some], args.device)
    return work, tokens


def own(args, method, captions):
    """-> work(number of captions), and the tokens that it runs."""
    encoder = flame.TextEncoder(args.llm, args.device, getattr(torch, args.dtypes))
    if method == "pytorch":
        flame.flame_ext = None
    if args.one in ABLATIONS:
        ablate(args.one, encoder)
    counted = []
    decode = flame.decode

    def count(decoder, forest):
        counted.append(len(forest.tokens))
        return decode(decoder, forest)

    def work(some):
        return encoder.encode(captions[:some], "long")

    flame.decode = count
    work(len(captions))
    flame.decode = decode
    return work, sum(counted)


def flops_per_token(config, layer, pruned):
    """Of the matrix products; pruned: of the last block, keys and values only."""
    D = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys_values = 2 * config["num_key_value_heads"] * config["head_dim"]
    block = 2 * D * (2 * queries + keys_values + 3 * config["intermediate_size"])
    return (layer - 1) * block + (2 * D * keys_values if pruned else block)


def peak_gib(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(args):
    method = args.one if args.one in METHODS else "extension"
    config = flame.llm_config(args.llm)
    layer = config["num_hidden_layers"] - 1
    captions = make_captions(args.captions, args.words)
    prefixes, suffixes = flame.tokenize(flame.load_tokenizer(args.llm), captions, "long")
    peak_flops = ceiling(args.device, getattr(torch, args.dtypes), config)
    if method in ("separate", "dense"):
        work, tokens = peer(args, method, prefixes, suffixes, layer)
    else:
        work, tokens = own(args, method, captions)
    work(min(4, len(captions)))
    seconds, states = timed(lambda: work(len(captions)), args.device, args.seconds)
    profile = {}
    if args.one == "extension" and torch.device(args.device).type == "cpu":
        profile = profiled(lambda: work(len(captions)))
    pruned = method in ("pytorch", "extension") and args.one != "no pruning"
    flops = flops_per_token(config, layer, pruned) * tokens
    torch.save(states, args.states)
    print(json.dumps({
        "captions_per_s": len(captions) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens / len(captions),
        "ceiling": peak_flops,
        "of_ceiling": flops / seconds / peak_flops,
        "peak_gib": peak_gib(args.device),
        "profile": profile,
    }))


# What is clocked: functions of flame by kind; attention_over's own time is layout's, that of what it returns
# is attention's.
CLOCKED = {
    "element-wise": ("add_and_norm", "rope", "swiglu"),
    "layout and trie": ("caption_forest",),
    "tokenizing": ("tokenize",),
}


def profiled(work):
    """Shares of the time of one run: matrix products, attention, element-wise operations, the rest."""
    kinds = "matrix products", "attention", "element-wise", "layout and trie", "tokenizing"
    spent = dict.fromkeys(kinds, 0.0)

    def clocked(kind, function):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            return result
        return wrapper

    def attention_over(*args):
        return clocked("attention", clocked("layout and trie", over)(*args))

    over = flame.attention_over
    linear = torch.nn.functional.linear
    saved = {"attention_over": over}
    flame.attention_over = attention_over
    torch.nn.functional.linear = clocked("matrix products", linear)
    for kind, names in CLOCKED.items():
        for name in names:
            saved[name] = getattr(flame, name)
            setattr(flame, name, clocked(kind, saved[name]))
    started = time.perf_counter()
    work()
    total = time.perf_counter() - started
    torch.nn.functional.linear = linear
    for name, function in saved.items():
        setattr(flame, name, function)
    shares = {kind: seconds / total for kind, seconds in spent.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


# ---------------------------------------------------------------- on paper

PEAK = 989e12           # FLOP/s of an H100 SXM in bfloat16, dense, by its data sheet
PRODUCTS = 650e12       # what cuBLAS reaches there in products of these sizes
ATTENTION = 150e12      # our kernel: its warps read K and V from shared memory, which allows 460e12
BYTES = 0.85 * 3.35e12  # bytes/s of memory: 85% of the data sheet's


class Counting(TorchDispatchMode):
    """Counts matrix products and their FLOPs, all other kernels and the bytes that those read and write."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten.linear.default:
            self.counts.update(products=1, flops=2 * args[0].numel() * len(args[1]))
        elif "empty" not in function.name() and not is_view(function, args[0], result):
            read = args[1:] if function is torch.ops.aten.copy_.default else args
            self.pass_over(*tree_leaves((read, result)))
        return result

    def pass_over(self, *tensors):
        sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)]
        self.counts.update(passes=1, bytes=sum(sizes))


def is_view(function, x, result):
    """aten.to is one where the dtype stays."""
    return function.is_view and tree_leaves(result)[0].dtype == x.dtype


class Fused:
    """Counts what flame_ext's element-wise kernels read and write."""

    def __init__(self, counting):
        self.counting = counting

    def rmsnorm(self, x, weight, out, eps, update, stream):
        self.counting.pass_over(x, weight, out, *([] if update is None else [x, update]))

    def rope(self, qkv, cos, sin, heads, stream):
        self.counting.pass_over(qkv[:, :heads], qkv[:, :heads], cos, sin)

    def swiglu(self, gate_up, out, stream):
        self.counting.pass_over(gate_up, out)


def counted(forest, blocks, fused):
    """What flame.decode does on tensors without data, attention left out; -> Counter."""
    config = nemo_config(blocks)
    D, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def weight(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    block = {"attention_norm": weight(D, dtype=torch.float32), "mlp_norm": weight(D, dtype=torch.float32),
             "wqkv": weight(queries + 2 * keys, D), "bqkv": None, "qk_norm": None, "wo": weight(D, queries),
             "w_gate_up": weight(2 * inner, D), "w_down": weight(D, inner)}
    decoder = flame.Decoder(config, weight(1, D), [dict(block) for _ in range(blocks)],
                            weight(dim // 2, dtype=torch.float32))
    counting = Counting()
    with mock.patch.multiple(flame, attention_over=lambda *_: lambda q, k, v: torch.empty_like(q),
                             move=lambda x, device: x.to(device), native=lambda *_: fused,
                             flame_ext=Fused(counting)), counting:
        flame.decode(decoder, forest)
    return counting.counts


def attention_flops(layout, T, config):
    """What the CUDA kernel multiplies in one block: whole tiles of 64 rows by whole blocks of 64 keys."""
    rest = layout.plan[4 * T:]
    tiles = int(np.argmax(rest == T))  # where the last tile ends
    run = rest[tiles + 1:2 * tiles + 2]
    start, stop, before = rest[3 * tiles + 2:].reshape(3, run[-1])
    last = run[1:] - 1
    keys = before[last] + stop[last] - start[last]
    return int(np.ceil(keys / 64).sum()) * 64 * 64 * 4 * config["head_dim"] * config["num_key_value_heads"]


def packed_row(llm, budget=16384):
    """-> (forest of as many captions of 100 words as fit, how many, ms of tokenizing them, ms of the rest)"""
    captions = make_captions(256, 100)
    tokenizer = flame.load_tokenizer(llm)
    started = time.perf_counter()
    prefixes, suffixes = flame.tokenize(tokenizer, captions, "long")
    tokenizing = (time.perf_counter() - started) / len(captions)
    n = int(np.searchsorted(np.cumsum(list(map(flame.token_count, prefixes, suffixes))), budget))
    while len(flame.caption_forest(prefixes[:n + 1], suffixes[:n + 1]).tokens) <= budget:
        n += 1
    started = time.perf_counter()
    forest = flame.caption_forest(prefixes[:n], suffixes[:n])
    return forest, n, 1e3 * n * tokenizing, 1e3 * (time.perf_counter() - started)


def count(llm, blocks=39):
    """Prints what a packed row takes on an H100, with and without fused passes, and its host meanwhile."""
    config = nemo_config(blocks)
    forest, n, tokenizing, joining = packed_row(llm)
    T = len(forest.tokens)
    started = time.perf_counter()
    layout = flame.flame_ext.layout(forest.lengths, forest.parents, 64 // 4)  # 4 query heads a key head
    laying_out = 1e3 * (time.perf_counter() - started)
    executed = attention_flops(layout, T, config)
    seen = int((flame.token_depths(forest.lengths, forest.parents) + 1).sum())
    useful = 4 * config["num_attention_heads"] * config["head_dim"] * seen

    print(f"Mistral-Nemo, a packed row of {T} tokens ({n} captions, 7 facets); an H100 on paper: products "
          f"{PRODUCTS / 1e12:.0f} TFLOP/s, attention {ATTENTION / 1e12:.0f}, memory {BYTES / 1e12:.2f} TB/s\n"
          f"{'':32}{'TFLOP':>9}{'GB':>9}{'launches':>10}{'ms':>9}{'of peak':>9}")
    plain, fused = (counted(forest, 3, f) - counted(forest, 2, f) for f in (False, True))
    milliseconds(plain, fused, "one block", 1, useful, executed)
    plain, fused = (counted(forest, blocks, f) for f in (False, True))
    row = milliseconds(plain, fused, f"{blocks} blocks, the last one pruned", blocks, useful, executed)

    units = torch.zeros(n, 7, config["hidden_size"], dtype=torch.float16)
    window = torch.zeros(2048, 11, config["hidden_size"], dtype=torch.float16)
    rows = np.random.default_rng(0).permutation(2048)[:n].tolist()
    started = time.perf_counter()
    for i, own in zip(rows, units):
        window[[i], 4:11] = own
    storing = 1e3 * (time.perf_counter() - started)
    print(f"the host meanwhile, ms on one core of this machine: tokenizing {tokenizing:.0f} and joining "
          f"{joining:.0f} by a thread, layout {laying_out:.0f}, into the window {storing:.0f}; the GPU has "
          f"{row:.0f} ms of the next row to do")


def milliseconds(plain, fused, title, blocks, useful, executed):
    """Prints the lines of so many blocks; -> ms with fused passes."""
    def line(label, launches, ms, flops=0, size=0, reached=""):
        tera = f"{flops / 1e12:.3f}" if flops else ""
        giga = f"{size / 1e9:.2f}" if size else ""
        print(f"  {label:30}{tera:>9}{giga:>9}{launches:10}{ms:9.2f}{reached:>9}")

    print(title)
    products = 1e3 * fused["flops"] / PRODUCTS
    attention = 1e3 * blocks * executed / ATTENTION
    line("matrix products", fused["products"], products, fused["flops"])
    line(f"attention, {executed / useful:.1f} x executed", blocks, attention, blocks * useful)
    for label, c in (("PyTorch's", plain), ("fused", fused)):
        line(f"{label} passes", c["passes"], 1e3 * c["bytes"] / BYTES, size=c["bytes"])
    for label, c in (("PyTorch's", plain), ("fused", fused)):
        ms = products + attention + 1e3 * c["bytes"] / BYTES
        reached = (c["flops"] + blocks * useful) / (ms / 1e3) / PEAK
        line(f"together, {label}", c["products"] + c["passes"] + blocks, ms, reached=f"{reached:.1%}")
    return ms


# ---------------------------------------------------------------- the tables

def one(args, method, dtype, words, captions, states):
    command = [sys.executable, __file__, "--one", method, "--dtypes", dtype, "--words", words,
               "--captions", captions, "--states", states,
               "--llm", args.llm, "--device", args.device, "--seconds", args.seconds]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{method} {dtype} {words}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def whitened_cosine(states, reference):
    store = ROOT / "data/embeddings/demo"
    if not (store / "meta.json").exists():
        return float("nan")
    opened = flame.open_store(store)
    if opened.meta["D"] != states.shape[-1]:
        return float("nan")
    projection = train.fit_text_projection(opened, "whiten", 0.01, 1024)
    long = list(range(4, 11))
    return (projection(states, long) * projection(reference[:len(states)], long)).sum(-1).mean().item()


def nemo_config(blocks):
    """Mistral-Nemo-Instruct-2407's widths."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": blocks + 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
    }


def make_nemo(folder, blocks=12):
    """A folder of random weights of Mistral-Nemo's widths and the demo's tokenizer."""
    from safetensors.torch import save_file
    config = nemo_config(blocks)
    D = config["hidden_size"]
    inner = config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    torch.manual_seed(0)

    def random(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    def ones():
        return torch.ones(D, dtype=torch.bfloat16)

    embedding = random(config["vocab_size"], D)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones()}
    for i in range(blocks + 1):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": ones(),
            p + "post_attention_layernorm.weight": ones(),
            p + "self_attn.q_proj.weight": random(queries, D),
            p + "self_attn.k_proj.weight": random(keys, D),
            p + "self_attn.v_proj.weight": random(keys, D),
            p + "self_attn.o_proj.weight": random(D, queries),
            p + "mlp.gate_proj.weight": random(inner, D),
            p + "mlp.up_proj.weight": random(inner, D),
            p + "mlp.down_proj.weight": random(D, inner),
        }
    weights["lm_head.weight"] = embedding.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((ROOT / "data/demo/llm/tokenizer.json").read_bytes())


def compare_methods(args, dtype, words, captions, reference, states):
    """Prints a table, a line a method. reference: states of float32 separate passes, or None."""
    print(f"\n{dtype}, captions of {words} words\n{'':38} captions/s   x (a)   x (b)   tokens a caption   "
          "tokens/s   of ceiling   peak GiB   whitened")
    lines = {}
    for method, label in METHODS.items():
        r = one(args, method, dtype, words, captions, states)
        lines[method] = r
        cosine = float("nan")
        if reference is not None:
            cosine = whitened_cosine(torch.load(states, weights_only=True), reference)
        ratios = [float("nan")] * 2
        for n, base in enumerate(("separate", "dense")):
            if base in lines:
                ratios[n] = r["captions_per_s"] / lines[base]["captions_per_s"]
        print(f"{label:38} {r['captions_per_s']:10.2f} {ratios[0]:7.2f} {ratios[1]:7.2f} {r['tokens']:18.0f} "
              f"{r['tokens_per_s']:10.0f} {r['of_ceiling']:11.0%} {r['peak_gib']:10.2f} {cosine:10.4f}",
              flush=True)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in r["profile"].items())
    print(f"ceiling {r['ceiling'] / 1e9:.0f} GFLOP/s; time of (d): {shares}")


def compare_ablations(args, dtype, words, captions, states):
    base = None
    print("each idea left out:")
    for what, label in ABLATIONS.items():
        r = one(args, what, dtype, words, captions, states)
        rate = r["captions_per_s"]
        base = base or rate
        print(f"    {label:34} {rate:10.2f} captions/s   {rate / base:6.2f} x   "
              f"{r['tokens']:6.0f} tokens a caption", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = str(ROOT / "data/demo/llm")
    parser.add_argument("--llm", default=demo, metavar="DIR", help="default: the demo's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--words", default="12,100,400", help="lengths of captions (default 12,100,400)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="default bfloat16,float32")
    parser.add_argument("--seconds", type=float, default=8, help="least length of a measurement (default 8)")
    parser.add_argument("--nemo", action="store_true", help="random weights of Mistral-Nemo's widths")
    parser.add_argument("--captions", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--states", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help="an H100's time on Mistral-Nemo, on paper")
    args = parser.parse_args()
    if args.count:
        return count(args.llm)
    if args.one:
        args.words = int(args.words)
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.nemo:
            args.llm = folder
            make_nemo(Path(folder))
        llm = "Mistral-Nemo widths, 12 blocks, random" if args.nemo else args.llm
        print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {args.device}, "
              f"torch {torch.__version__}, long prompts (7 facets), LLM {llm}")
        states = Path(folder) / "states.pt"
        dtypes = args.dtypes.split(",")
        for words in map(int, args.words.split(",")):
            captions = max(8, 2400 // max(words, 60))
            reference = None
            if not args.nemo:
                one(args, "separate", "float32", words, captions, states)
                reference = torch.load(states, weights_only=True)
            for dtype in dtypes:
                compare_methods(args, dtype, words, captions, reference, states)
                if words == 100 and dtype == dtypes[0]:
                    compare_ablations(args, dtype, words, captions, states)


if __name__ == "__main__":
    main()
