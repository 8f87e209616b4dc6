"""How fast is the text tower, and where does the time go? One run, tables on screen; nothing is asserted.

    python tests/bench_embed.py                   # about 15 minutes on 2 CPU cores; wants the demo's LLM and, for the cosines, its store
    python tests/bench_embed.py --words 100 --dtypes bfloat16
    python tests/bench_embed.py --nemo            # random weights of Mistral-Nemo's widths, 12 blocks; for a GPU

    (a) separate     K whole strings a caption, one causal pass each, transformers, padded batches of 8
    (b) dense mask   one pass a caption, flat facets, dense facet-decoupled mask, transformers, padded batches of 16 (the released way)
    (c) pytorch      flame.TextEncoder without the extension
    (d) flame_ext    flame.TextEncoder as it is by default

Captions vary in length, as captions do: half to one and a half times the words asked for. transformers gets them in file order,
as the released code does, and pads to the longest of a batch; it runs the same 29 of 30 blocks, no final norm, no output layer.
Every line runs in a process of its own, for its peak memory, and measures the ceiling there: a product of [2048, width] and
[width, 1.5 * inner] matrices. "of ceiling" counts the matrix products of the tokens the method runs, padding left out; "whitened"
is the mean cosine to float32 separate passes, after the demo's whitening (one dimension carries 0.8 of a state's norm: raw
cosines hide every error).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flame  # noqa: E402
import train  # noqa: E402
from data.captions import read_captions  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"separate": "(a) K separate passes, transformers", "dense": "(b) one pass, dense mask, transformers",
           "pytorch": "(c) ours without the extension", "extension": "(d) ours"}
ABLATIONS = {"everything": "everything", "no pruning": "whole last block", "no root": "a tree a caption, no shared root", "no trie": "flat facets, no shared words",
             "no packing": "one caption a row", "no extension": "pure PyTorch"}


def make_captions(n, words):
    """n captions of words/2 to 3 words/2 words, evenly spread, in random order; strung together from the demo's test captions."""
    flat = [word for row in read_captions(ROOT / "data/demo/test.tsv") for word in row.captions["long"].split()]
    lengths = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, n) * words).round().astype(int)
    ends = np.cumsum(lengths)
    return [" ".join(flat[end - length:end]) for end, length in zip(ends, lengths)]


def ceiling(device, dtype, config):
    """FLOP/s of a large matrix product, the best of several."""
    a = torch.randn(2048, config["hidden_size"], device=device).to(dtype)
    b = torch.randn(int(1.5 * config["intermediate_size"]), config["hidden_size"], device=device).to(dtype)
    best = 0
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(a, b)
        synchronize(device)
        best = max(best, 4 * 2 * a.shape[0] * a.shape[1] * b.shape[0] / (time.perf_counter() - started))
    return best


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(work, device, seconds):
    """Runs work() until `seconds` are over, three times at least; -> (seconds of the fastest, what it returned)."""
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
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, attn_implementation="sdpa").model.eval().to(device)
    model.layers = model.layers[:layer]
    model.norm = torch.nn.Identity()
    return model


@torch.inference_mode()
def separate_passes(model, prefixes, suffixes, device):
    strings = [(len(p + f), n, p + f) for n, (p, f) in enumerate((p, f) for p, fs in zip(prefixes, suffixes) for f in fs)]
    out = [None] * len(strings)
    for start in range(0, len(strings), 8):
        batch = strings[start:start + 8]
        longest = max(size for size, *_ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, (size, _, tokens) in enumerate(batch):
            ids[row, :size] = torch.tensor(tokens)
        mask = torch.arange(longest) < torch.tensor([size for size, *_ in batch])[:, None]  # padded on the right
        hidden = model(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        for row, (size, n, _) in enumerate(batch):
            out[n] = hidden[row, size - 1].float().cpu()
    return torch.stack(out).view(len(prefixes), -1, out[0].shape[-1])


@torch.inference_mode()
def dense_mask(model, prefixes, suffixes, device):
    out = [None] * len(prefixes)
    for start in range(0, len(prefixes), 16):
        batch = range(len(prefixes))[start:start + 16]
        rows = [flat_forest(prefixes[i], suffixes[i]) for i in batch]
        longest = max(len(row.tokens) for row in rows)
        ids, where = torch.zeros(2, len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), 1, longest, longest, dtype=torch.bool)
        mask[:, :, :, 0] = True  # padding sees something, or its softmax is NaN
        for n, row in enumerate(rows):
            T = len(row.tokens)
            ids[n, :T], where[n, :T] = row.tokens, row.positions
            mask[n, 0, :T, :T] = torch.from_numpy(flame.visible(row))
        hidden = model(ids.to(device), attention_mask=mask.to(device), position_ids=where.to(device), use_cache=False).last_hidden_state
        for n, i in enumerate(batch):
            out[i] = hidden[n, rows[n].answers.to(device)].float().cpu()
    return torch.stack(out)


# ---------------------------------------------------------------- forests with an idea left out

def flat_forest(prefix, facets):
    """One caption, every facet a segment of its own."""
    lengths, parents = np.array([len(prefix), *map(len, facets)], np.int32), np.array([-1] + [0] * len(facets), np.int32)
    tokens = torch.tensor(prefix + [t for f in facets for t in f])
    return flame.Forest(tokens, torch.from_numpy(flame.token_depths(lengths, parents)), lengths, parents, torch.from_numpy(np.cumsum(lengths)[1:] - 1))


def joined(forests):
    """Several forests in one row, nothing shared between them."""
    first, seen, parents, answers = 0, 0, [], []
    for f in forests:
        parents.append(np.where(f.parents < 0, -1, f.parents + seen))
        answers.append(f.answers + first)
        first, seen = first + len(f.tokens), seen + len(f.lengths)
    return flame.Forest(torch.cat([f.tokens for f in forests]), torch.cat([f.positions for f in forests]),
                        np.concatenate([f.lengths for f in forests]), np.concatenate(parents).astype(np.int32), torch.cat(answers))


def ablate(what, encoder):
    original, decode = flame.caption_forest, flame.decode
    if what == "no extension":
        flame.flame_ext = None
    if what == "no packing":
        encoder.budget = 1
    if what == "no root":
        flame.caption_forest = lambda prefixes, suffixes, positions: joined([original([p], [s]) for p, s in zip(prefixes, suffixes)])
    if what == "no trie":
        def shared_root_flat_facets(prefixes, suffixes, positions):
            base = original(prefixes, [[[n]] for n in range(len(prefixes))])  # one marker token a caption keeps them apart
            forests = [flat_forest(p, s) for p, s in zip(prefixes, suffixes)]
            opening = min(flame.shared_prefix(prefixes[0], p) for p in prefixes)
            lengths, parents, tokens, answers, at = [opening], [-1], [torch.tensor(prefixes[0][:opening])], [], opening
            assert base.lengths[0] == opening or len(prefixes) == 1
            for f in forests:
                parents += [0] + [len(lengths)] * (len(f.lengths) - 1)
                lengths += [f.lengths[0] - opening, *f.lengths[1:]]
                tokens.append(f.tokens[opening:])
                answers.append(f.answers - opening + at)
                at += len(f.tokens) - opening
            lengths, parents = np.array(lengths, np.int32), np.array(parents, np.int32)
            return flame.Forest(torch.cat(tokens), torch.from_numpy(flame.token_depths(lengths, parents)), lengths, parents, torch.cat(answers))
        flame.caption_forest = shared_root_flat_facets
    if what == "no pruning":
        def decode_all(decoder, forest):
            return decode(decoder, forest._replace(answers=torch.arange(len(forest.tokens))))[forest.answers.to(decoder.embedding.device)]
        flame.decode = decode_all


# ---------------------------------------------------------------- one line of a table, in a process of its own

def measure(args):
    dtype, device = getattr(torch, args.dtypes), args.device
    method = args.one if args.one in METHODS else "extension"
    tokenizer, config = flame.load_tokenizer(args.llm), flame.llm_config(args.llm)
    captions = make_captions(args.captions, args.words)
    prefixes, suffixes = flame.tokenize(tokenizer, captions, "long")
    layer = config["num_hidden_layers"] - 1
    profile = {}
    peak_flops = ceiling(device, dtype, config)
    if method in ("separate", "dense"):
        model = transformers_model(args.llm, layer, device, dtype)
        run = separate_passes if method == "separate" else dense_mask
        work = lambda some=len(captions): run(model, prefixes[:some], suffixes[:some], device)
        tokens = sum(sum(len(p) + len(f) for f in fs) if method == "separate" else len(p) + sum(map(len, fs)) for p, fs in zip(prefixes, suffixes))
    else:
        encoder = flame.TextEncoder(args.llm, device, dtype)
        if method == "pytorch":
            flame.flame_ext = None
        if args.one in ABLATIONS:
            ablate(args.one, encoder)
        work = lambda some=len(captions): encoder.encode(captions[:some], "long")
        counted = []
        inner = flame.decode
        flame.decode = lambda decoder, forest: counted.append(len(forest.tokens)) or inner(decoder, forest)
        work()
        tokens, flame.decode = sum(counted), inner
    work(min(4, len(captions)))
    seconds, states = timed(work, device, args.seconds)
    if args.one == "extension" and torch.device(device).type == "cpu":
        profile = profiled(work)
    D, inner_width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    whole, keys_values = 2 * D * ((2 * heads + 2 * kv_heads) * head_dim + 3 * inner_width), 2 * D * 2 * kv_heads * head_dim  # FLOPs a token and block
    pruned = method in ("pytorch", "extension") and args.one != "no pruning"  # the last block: keys and values only
    per_token = (layer - 1) * whole + (keys_values if pruned else whole)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.device(device).type == "cuda" else int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20
    torch.save(states, args.states)
    print(json.dumps({"captions_per_s": len(captions) / seconds, "tokens_per_s": tokens / seconds, "tokens": tokens / len(captions),
                      "ceiling": peak_flops, "of_ceiling": per_token * tokens / seconds / peak_flops, "peak_gib": peak, "profile": profile}))


def profiled(work):
    """Shares of the time of one run: matrix products, attention, element-wise operations, the rest."""
    spent = dict.fromkeys(("matrix products", "attention", "element-wise", "layout and trie", "tokenizing"), 0.0)

    def clocked(kind, function):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            return result
        return wrapper

    over, saved = flame.attention_over, {name: getattr(flame, name) for name in ("attention_over", "add_and_norm", "rope", "swiglu", "caption_forest", "tokenize")}
    linear = torch.nn.functional.linear
    torch.nn.functional.linear = clocked("matrix products", linear)
    flame.attention_over = lambda *args: clocked("attention", clocked("layout and trie", over)(*args))
    for kind, names in {"element-wise": ("add_and_norm", "rope", "swiglu"), "layout and trie": ("caption_forest",), "tokenizing": ("tokenize",)}.items():
        for name in names:
            setattr(flame, name, clocked(kind, getattr(flame, name)))
    started = time.perf_counter()
    work()
    total = time.perf_counter() - started
    torch.nn.functional.linear = linear
    for name, function in saved.items():
        setattr(flame, name, function)
    return {kind: seconds / total for kind, seconds in spent.items()} | {"the rest": 1 - sum(spent.values()) / total}


# ---------------------------------------------------------------- the tables

def one(args, method, dtype, words, captions, states):
    command = [sys.executable, __file__, "--one", method, "--dtypes", dtype, "--words", words, "--captions", captions, "--states", states,
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


def make_nemo(folder, blocks=12, D=5120, inner=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=131072):
    """A folder of random weights with Mistral-Nemo-Instruct-2407's widths and the demo's tokenizer."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    random = lambda *shape: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
    weights = {"model.embed_tokens.weight": random(vocabulary, D), "model.norm.weight": torch.ones(D, dtype=torch.bfloat16)}
    for i in range(blocks + 1):
        p = f"model.layers.{i}."
        weights |= {p + "input_layernorm.weight": torch.ones(D, dtype=torch.bfloat16), p + "post_attention_layernorm.weight": torch.ones(D, dtype=torch.bfloat16),
                    p + "self_attn.q_proj.weight": random(heads * head_dim, D), p + "self_attn.k_proj.weight": random(kv_heads * head_dim, D),
                    p + "self_attn.v_proj.weight": random(kv_heads * head_dim, D), p + "self_attn.o_proj.weight": random(D, heads * head_dim),
                    p + "mlp.gate_proj.weight": random(inner, D), p + "mlp.up_proj.weight": random(inner, D), p + "mlp.down_proj.weight": random(D, inner)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": D, "intermediate_size": inner,
        "num_hidden_layers": blocks + 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 131072, "hidden_act": "silu"}))
    (folder / "tokenizer.json").write_bytes((ROOT / "data/demo/llm/tokenizer.json").read_bytes())


def main():
    parser = argparse.ArgumentParser(description="Benchmarks the text tower against transformers; see the top of this file.")
    parser.add_argument("--llm", default=str(ROOT / "data/demo/llm"), metavar="DIR", help="default: the demo's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--words", default="12,100,400", help="lengths of captions (default 12,100,400)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="default bfloat16,float32")
    parser.add_argument("--seconds", type=float, default=8, help="at least this long a measurement (default 8)")
    parser.add_argument("--nemo", action="store_true", help="random weights of Mistral-Nemo's widths instead of --llm")
    parser.add_argument("--captions", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--states", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.words = int(args.words)
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.nemo:
            args.llm = folder
            make_nemo(Path(folder))
        print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}, long prompts (7 facets), LLM {'Mistral-Nemo widths, 12 blocks, random' if args.nemo else args.llm}")
        states = Path(folder) / "states.pt"
        for words in map(int, args.words.split(",")):
            captions = max(8, 2400 // max(words, 60))
            reference = None
            if not args.nemo:
                one(args, "separate", "float32", words, captions, states)
                reference = torch.load(states, weights_only=True)
            for dtype in args.dtypes.split(","):
                print(f"\n{dtype}, captions of {words} words\n{'':38} captions/s   x (a)   x (b)   tokens a caption   tokens/s   of ceiling   peak GiB   whitened")
                lines = {}
                for method, label in METHODS.items():
                    r = lines[method] = one(args, method, dtype, words, captions, states)
                    cosine = float("nan") if reference is None else whitened_cosine(torch.load(states, weights_only=True), reference)
                    a, b = (r["captions_per_s"] / lines[m]["captions_per_s"] if m in lines else float("nan") for m in ("separate", "dense"))
                    print(f"{label:38} {r['captions_per_s']:10.2f} {a:7.2f} {b:7.2f} {r['tokens']:18.0f} {r['tokens_per_s']:10.0f} {r['of_ceiling']:11.0%} {r['peak_gib']:10.2f} {cosine:10.4f}", flush=True)
                print(f"ceiling {r['ceiling'] / 1e9:.0f} GFLOP/s; time of (d): " + ", ".join(f"{k} {v:.1%}" for k, v in r["profile"].items()))
                if words == 100 and dtype == args.dtypes.split(",")[0]:
                    base = None
                    print("each idea left out:")
                    for what, label in ABLATIONS.items():
                        r = one(args, what, dtype, words, captions, states)
                        base = base or r["captions_per_s"]
                        print(f"    {label:34} {r['captions_per_s']:10.2f} captions/s   {r['captions_per_s'] / base:6.2f} x   {r['tokens']:6.0f} tokens a caption", flush=True)


if __name__ == "__main__":
    main()
