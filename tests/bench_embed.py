"""How fast is the text tower, and where does the time go? One run, tables on screen; nothing is asserted.

    python tests/bench_embed.py                   # about 15 minutes on 2 CPU cores
    python tests/bench_embed.py --words 100 --dtypes bfloat16
    python tests/bench_embed.py --nemo            # random weights of Mistral-Nemo's widths; for a GPU
    python tests/bench_embed.py --count           # what an H100 should reach on Mistral-Nemo, on paper

    (a) separate     K whole strings a caption, one causal pass each, transformers, padded batches of 8
    (b) dense mask   one pass a caption, flat facets, dense facet-decoupled mask, transformers, padded batches
                     of 16 (the released way)
    (c) pytorch      flame.TextEncoder without the extension, attention in stretches
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
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flame  # noqa: E402

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
    "no extension": "PyTorch, attention in stretches",
    "no stretches": "PyTorch, a mask of all pairs",
}


def make_captions(n, words):
    """n captions of words/2 to 3 words/2 words, evenly spread, in random order.

    They are strung together from the long ones of the demo's test split.
    """
    with open(ROOT / "data/demo/test.tsv", encoding="utf-8") as table:
        flat = [word for line in list(table)[1:] for word in line.rstrip("\n").split("\t")[4].split()]
    lengths = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, n) * words).round().astype(int)
    ends = np.cumsum(lengths)
    return [" ".join(flat[end - length:end]) for end, length in zip(ends, lengths)]


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def ceiling(device, dtype, config):
    """FLOP/s of a large matrix product, the best of several."""
    a = torch.randn(2048, config["hidden_size"], device=device).to(dtype)
    b = torch.randn(int(1.5 * config["intermediate_size"]), config["hidden_size"], device=device).to(dtype)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    return flops / timed(lambda: torch.nn.functional.linear(a, b), device, 0.5)[0]


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
            mask[n, 0, :T, :T] = torch.from_numpy(flame.visible(row.lengths, row.parents))
        inputs = {"attention_mask": mask.to(device), "position_ids": where.to(device)}
        hidden = model(ids.to(device), **inputs, use_cache=False).last_hidden_state
        for n, i in enumerate(batch):
            out[i] = hidden[n, rows[n].answers.to(device)].float().cpu()
    return torch.stack(out)


def flat_forest(prefix, facets):
    """One caption, every facet a segment of its own."""
    lengths = np.array([len(prefix), *map(len, facets)], np.int32)
    parents = np.array([-1] + [0] * len(facets), np.int32)
    depths = torch.from_numpy(flame.token_depths(lengths, parents))
    answers = torch.from_numpy(np.cumsum(lengths)[1:] - 1)
    return flame.Forest(torch.tensor(prefix + sum(facets, [])), depths, lengths, parents, answers)


# ---------------------------------------------------------------- an idea left out

def unshared(prefixes, suffixes, captions, facets):
    """The forest where captions, or one's facets, share no beginning: their first tokens bear a number."""
    sequences = []
    for n, (prefix, questions) in enumerate(zip(prefixes, suffixes)):
        for k, facet in enumerate(questions):
            sequences.append([(token, 0) for token in prefix + facet])
            sequences[-1][0] = prefix[0], n * captions
            sequences[-1][len(prefix)] = facet[0], k * facets
    forest = flame.build_forest(sequences)
    return forest._replace(tokens=forest.tokens[:, 0])


def ablate(what, encoder):
    decode = flame.decode

    def decode_all(decoder, forest):
        states = decode(decoder, forest._replace(answers=torch.arange(len(forest.tokens))))
        return states[forest.answers.to(states.device)]

    if what in ("pytorch", "no extension", "no stretches"):
        encoder.decoder = encoder.decoder._replace(kernels=flame.TWINS)
    if what == "no stretches":
        flame.STRETCH[encoder.decoder.embedding.device.type] = 1 << 30  # one, as long as the row
    if what == "no packing":
        encoder.budget = 1
    if what == "no root":
        encoder.caption_forest = partial(unshared, captions=1, facets=0)
    if what == "no trie":
        encoder.caption_forest = partial(unshared, captions=0, facets=1)
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
    config = json.loads(Path(args.llm, "config.json").read_text()) | flame.llm_config(args.llm)
    layer = config["num_hidden_layers"] - 1
    captions = make_captions(args.captions, args.words)
    prefixes, suffixes = flame.tokenize(flame.load_tokenizer(args.llm), captions, "long")
    peak_flops = ceiling(args.device, getattr(torch, args.dtypes), config)
    if method in ("separate", "dense"):
        work, tokens = peer(args, method, prefixes, suffixes, layer)
    else:
        encoder = flame.TextEncoder(args.llm, args.device, getattr(torch, args.dtypes))
        ablate(args.one, encoder)
        tokens = sum(len(forest.tokens) for _, forest in encoder.pack(captions, "long"))

        def work(some):
            return encoder.encode(captions[:some], "long")
    work(min(4, len(captions)))
    seconds, states = timed(lambda: work(len(captions)), args.device, args.seconds)
    profile = {}
    if args.one == "extension" and torch.device(args.device).type == "cpu":
        profile = profiled(encoder, captions)
    pruned = method in ("pytorch", "extension") and args.one != "no pruning"
    flops = flops_per_token(config, layer, pruned) * tokens
    torch.save(states, args.states)
    print(json.dumps(dict(
        captions_per_s=len(captions) / seconds, tokens_per_s=tokens / seconds, tokens=tokens / len(captions),
        ceiling=peak_flops, of_ceiling=flops / seconds / peak_flops, peak_gib=peak_gib(args.device),
        profile=profile)))


def profiled(encoder, captions):
    """Shares of the time of one run: matrix products, attention, element-wise operations, the rest."""
    spent = Counter()

    def clocked(kind, function):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            return result
        return wrapper

    def attention(*args):
        return clocked("attention", layout(*args))

    steps = encoder.decoder.kernels
    layout = clocked("layout and trie", steps.attention)
    names = ("add_and_norm", "rope", "swiglu")
    clocks = {name: clocked("element-wise", getattr(steps, name)) for name in names}
    encoder.decoder = encoder.decoder._replace(kernels=steps._replace(attention=attention, **clocks))
    encoder.tokenize = clocked("tokenizing", encoder.tokenize)
    linear = clocked("matrix products", torch.nn.functional.linear)
    encoder.caption_forest = clocked("layout and trie", encoder.caption_forest)
    with mock.patch.object(torch.nn.functional, "linear", linear):
        started = time.perf_counter()
        encoder.encode(captions, "long")
        total = time.perf_counter() - started
    shares = {kind: seconds / total for kind, seconds in spent.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


# ---------------------------------------------------------------- on paper

PEAK = 989e12           # FLOP/s of an H100 SXM in bfloat16, dense, by its data sheet
PRODUCTS = 650e12       # what cuBLAS reaches there in products of these sizes
ATTENTION = 150e12      # our kernel: its warps read K and V from shared memory, which allows 380e12
BYTES = 0.85 * 3.35e12  # bytes/s of memory: 85% of the data sheet's


def attention_flops(layout, T, config):
    """What the CUDA kernel multiplies in one block: whole tiles of 64 rows by whole blocks of 64 keys."""
    rest = layout.plan[3 * T:]
    tiles = int(np.argmax(rest[::3] == T)) + 1  # with the mark behind the last
    run = rest[1:3 * tiles:3]
    start, stop, before = rest[3 * tiles:].reshape(-1, 3).T
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
    n = bisect_right(range(1, len(captions) + 1), budget, key=lambda n: len(
        flame.caption_forest(prefixes[:n], suffixes[:n]).tokens))
    started = time.perf_counter()
    forest = flame.caption_forest(prefixes[:n], suffixes[:n])
    return forest, n, 1e3 * n * tokenizing, 1e3 * (time.perf_counter() - started)


def count(llm, blocks=39):
    """Prints what a packed row takes on an H100, and its host meanwhile."""
    config = nemo_config(blocks)
    forest, n, tokenizing, joining = packed_row(llm)
    T = len(forest.tokens)
    queries = config["num_attention_heads"]
    keys = config["num_key_value_heads"]
    started = time.perf_counter()
    layout = flame.flame_ext.layout(forest.lengths, forest.parents, 64 * keys // queries)
    laying_out = 1e3 * (time.perf_counter() - started)
    executed = blocks * attention_flops(layout, T, config)
    seen = int((flame.token_depths(forest.lengths, forest.parents) + 1).sum())
    useful = blocks * 4 * queries * config["head_dim"] * seen
    products = flops_per_token(config, blocks, pruned=True) * T
    # A token's bytes: two norms read and write x and read an update, RoPE turns queries and keys, SwiGLU.
    row = 2 * (4 + 4 + 2 + 2) * config["hidden_size"] + 3 * 2 * config["intermediate_size"]
    passes = blocks * T * (row + 2 * 2 * (queries + keys) * config["head_dim"])
    parts = {"matrix products": (products, products / PRODUCTS),
             f"attention, {executed / useful:.1f} x executed": (useful, executed / ATTENTION),
             f"element-wise, {passes / 1e9:.1f} GB": (0, passes / BYTES)}
    seconds = sum(spent for _, spent in parts.values())
    print(f"Mistral-Nemo, {blocks} blocks, a packed row of {T} tokens ({n} captions, 7 facets); an H100 on "
          f"paper: products {PRODUCTS / 1e12:.0f} TFLOP/s, attention {ATTENTION / 1e12:.0f}, memory "
          f"{BYTES / 1e12:.2f} TB/s")
    for label, (flops, spent) in (parts | {"together": (products + useful, seconds)}).items():
        print(f" {label:32}{flops / 1e12:9.2f} TFLOP{1e3 * spent:9.1f} ms{flops / spent / PEAK:7.1%} of peak")
    print(f"the host meanwhile, ms on one core of this machine: tokenizing {tokenizing:.0f} and joining "
          f"{joining:.0f} by a thread, layout {laying_out:.0f}; the GPU has {1e3 * seconds:.0f} ms to do")


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
    """Mean cosine after the demo's whitening: of a column V diag(1 / (s + 0.01 s1)), s singular values."""
    folder = ROOT / "data/embeddings/demo"
    store = flame.open_store(folder) if (folder / "meta.json").exists() else None
    if store is None or store.meta["D"] != states.shape[-1]:
        return float("nan")
    cosines = []
    for k in range(7):
        unit = store.read(np.arange(store.meta["N"]), [4 + k])[:, 0]
        pair = torch.nn.functional.normalize(torch.stack([states[:, k], reference[:len(states), k]]), dim=-1)
        _, s, V = torch.linalg.svd((unit - unit.mean(0)) / len(unit) ** 0.5, full_matrices=False)
        cosines.append(torch.cosine_similarity(*((pair - unit.mean(0)) @ V.T / (s + 0.01 * s[0])), dim=-1))
    return torch.cat(cosines).mean().item()


def nemo_config(blocks):
    """Mistral-Nemo-Instruct-2407's widths."""
    return dict(
        model_type="mistral", architectures=["MistralForCausalLM"], hidden_size=5120, intermediate_size=14336,
        num_hidden_layers=blocks + 1, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=131072, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, hidden_act="silu",
        max_position_embeddings=131072, tie_word_embeddings=True)


def make_llm(folder, config):
    """Writes random bfloat16 weights, a shard a block, and config.json; -> bytes of the weights."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    D, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = {"self_attn.q_proj": (queries, D), "self_attn.k_proj": (keys, D), "self_attn.v_proj": (keys, D),
             "self_attn.o_proj": (D, queries), "mlp.gate_proj": (inner, D), "mlp.up_proj": (inner, D),
             "mlp.down_proj": (D, inner), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shards = [{"model.embed_tokens": (config["vocab_size"], D), "model.norm": (D,)}]
    shards += [{f"model.layers.{i}.{name}": shape for name, shape in block.items()}
               for i in range(config["num_hidden_layers"])]
    places = {}
    for n, shapes in enumerate(shards):
        weights = {f"{name}.weight": 0.02 * torch.randn(shape, dtype=torch.bfloat16) if len(shape) == 2
                   else torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(weights, folder / f"model-{n}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(weights, f"model-{n}.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
        a, b = (r["captions_per_s"] / lines[base]["captions_per_s"] if base in lines else float("nan")
                for base in ("separate", "dense"))
        print(f"{label:38} {r['captions_per_s']:10.2f} {a:7.2f} {b:7.2f} {r['tokens']:18.0f} "
              f"{r['tokens_per_s']:10.0f} {r['of_ceiling']:11.0%} {r['peak_gib']:10.2f} {cosine:10.4f}",
              flush=True)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in r["profile"].items())
    print(f"ceiling {r['ceiling'] / 1e9:.0f} GFLOP/s; time of (d): {shares}")


def compare_ablations(args, dtype, words, captions, states):
    print("each idea left out:")
    rates = []
    for what, label in ABLATIONS.items():
        r = one(args, what, dtype, words, captions, states)
        rates.append(r["captions_per_s"])
        print(f"    {label:34} {rates[-1]:10.2f} captions/s   {rates[-1] / rates[0]:6.2f} x   "
              f"{r['tokens']:6.0f} tokens a caption", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--llm", default=str(ROOT / "data/demo/llm"), metavar="DIR", help="default: the demo's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--words", default="12,100,400", help="lengths of captions (default 12,100,400)")
    add("--dtypes", default="bfloat16,float32", help="default bfloat16,float32")
    add("--seconds", type=float, default=8, help="least length of a measurement (default 8)")
    add("--nemo", action="store_true", help="random weights of Mistral-Nemo's widths")
    add("--count", action="store_true", help="an H100's time on Mistral-Nemo, on paper")
    add("--captions", type=int, default=0, help=argparse.SUPPRESS)
    add("--one", help=argparse.SUPPRESS)
    add("--states", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        return count(args.llm)
    if args.one:
        args.words = int(args.words)
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.nemo:
            args.llm = folder
            make_llm(Path(folder), nemo_config(12))
            shutil.copy(ROOT / "data/demo/llm/tokenizer.json", folder)
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
