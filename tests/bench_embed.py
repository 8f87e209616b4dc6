"""Speed of the text tower, against transformers. Prints tables.

    python tests/bench_embed.py                   # about 15 minutes on 2 CPU cores
    python tests/bench_embed.py --nemo            # random weights with Mistral-Nemo's sizes, for a GPU

It needs the demo's LLM. transformers runs the same layers. "of product" is the speed of the LLM's matrix
products relative to that of a large one; padding does not count.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flame  # noqa: E402

METHODS = {
    "separate": "(a) K separate passes, transformers", "dense": "(b) one pass, dense mask, transformers",
    "pytorch": "(c) TextEncoder, no extension", "extension": "(d) TextEncoder"}


def make_captions(n, words):
    """Return n captions of words/2 to 3 words/2 words in random order, from the demo's long test captions."""
    with open(ROOT / "data/demo/test.tsv", encoding="utf-8") as table:
        flat = [word for line in list(table)[1:] for word in line.rstrip("\n").split("\t")[4].split()]
    lengths = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, n) * words).round().astype(int)
    ends = np.cumsum(lengths)
    return [" ".join(flat[end - length:end]) for end, length in zip(ends, lengths)]


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def matmul_flops(device, dtype, config):
    """Return the FLOP/s of a large matrix product."""
    a = torch.randn(2048, config["hidden_size"], device=device).to(dtype)
    b = torch.randn(int(1.5 * config["intermediate_size"]), config["hidden_size"], device=device).to(dtype)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    return flops / best_time(lambda: torch.nn.functional.linear(a, b), device, 0.5)


def best_time(work, device, seconds):
    """Run work() for `seconds`, at least three times. Return the seconds of the fastest run."""
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------- transformers

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
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)  # pads on the right
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
        positions = torch.zeros_like(ids)
        mask = torch.zeros(len(batch), 1, longest, longest, dtype=torch.bool)
        mask[:, :, :, 0] = True  # padding must see a key, otherwise its softmax is NaN
        for n, row in enumerate(rows):
            T = len(row.tokens)
            ids[n, :T] = row.tokens
            positions[n, :T] = row.positions
            mask[n, 0, :T, :T] = torch.from_numpy(flame.attention_mask(row.lengths, row.parents))
        inputs = {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
        hidden = model(ids.to(device), **inputs, use_cache=False).last_hidden_state
        for n, i in enumerate(batch):
            out[i] = hidden[n, rows[n].last_tokens.to(device)].float().cpu()
    return torch.stack(out)


def flat_forest(prefix, facets):
    """Return the Forest of one caption with a segment for each facet."""
    lengths = np.array([len(prefix), *map(len, facets)], np.int32)
    parents = np.array([-1] + [0] * len(facets), np.int32)
    depths = torch.from_numpy(flame.token_depths(lengths, parents))
    last_tokens = torch.from_numpy(np.cumsum(lengths)[1:] - 1)
    return flame.Forest(torch.tensor(prefix + sum(facets, [])), depths, lengths, parents, last_tokens)


# ---------------------------------------------------------------- one line of a table, in its own process

def transformers_work(args, method, prefixes, suffixes, layer):
    """Return (work(number of captions), number of tokens that it runs without padding)."""
    model = transformers_model(args.llm, layer, args.device, getattr(torch, args.dtypes))
    run = separate_passes if method == "separate" else dense_mask
    tokens = 0
    for prefix, facets in zip(prefixes, suffixes):
        tokens += len(prefix) * (len(facets) if method == "separate" else 1) + sum(map(len, facets))

    def work(n):
        return run(model, prefixes[:n], suffixes[:n], args.device)
    return work, tokens


def flops_per_token(config, n_layers, pruned):
    """Return the FLOPs of the matrix products per token. pruned: the last layer has keys and values only."""
    D = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys_values = 2 * config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * D * (2 * queries + keys_values + 3 * config["intermediate_size"])
    return (n_layers - 1) * layer + (2 * D * keys_values if pruned else layer)


def peak_gib(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(args):
    method = args.one
    config = json.loads(Path(args.llm, "config.json").read_text()) | flame.llm_config(args.llm)
    layer = config["num_hidden_layers"] - 1
    captions = make_captions(args.captions, args.words)
    prefixes, suffixes = flame.tokenize(flame.load_tokenizer(args.llm), captions, "long")
    peak_flops = matmul_flops(args.device, getattr(torch, args.dtypes), config)
    if method in ("separate", "dense"):
        work, tokens = transformers_work(args, method, prefixes, suffixes, layer)
    else:
        encoder = flame.TextEncoder(args.llm, args.device, getattr(torch, args.dtypes))
        if args.one == "pytorch":
            encoder.decoder = encoder.decoder._replace(kernels=flame.TORCH_KERNELS)
        tokens = sum(len(forest.tokens) for _, forest in encoder.pack(captions, "long"))

        def work(n):
            return encoder.encode(captions[:n], "long")
    work(min(4, len(captions)))
    seconds = best_time(lambda: work(len(captions)), args.device, args.seconds)
    flops = flops_per_token(config, layer, method in ("pytorch", "extension")) * tokens
    print(json.dumps(dict(
        captions_per_s=len(captions) / seconds, tokens_per_s=tokens / seconds, tokens=tokens / len(captions),
        peak_flops=peak_flops, of_product=flops / seconds / peak_flops, peak_gib=peak_gib(args.device))))


# ---------------------------------------------------------------- tables

def measure_one(args, method, dtype, words, captions):
    """Return the result of measure() in a new process."""
    command = [sys.executable, __file__, "--one", method, "--dtypes", dtype, "--words", words, "--captions",
               captions, "--llm", args.llm, "--device", args.device, "--seconds", args.seconds]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{method} {dtype} {words}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def nemo_config(layers):
    """Return the config.json of Mistral-Nemo-Instruct-2407 with layers + 1 layers."""
    return dict(
        model_type="mistral", architectures=["MistralForCausalLM"], hidden_size=5120, intermediate_size=14336,
        num_hidden_layers=layers + 1, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=131072, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, hidden_act="silu",
        max_position_embeddings=131072, tie_word_embeddings=True)


def make_llm(folder, config):
    """Write random bfloat16 weights, a file per layer, and config.json. Return the bytes of the weights."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    D, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {"self_attn.q_proj": (queries, D), "self_attn.k_proj": (keys, D), "self_attn.v_proj": (keys, D),
             "self_attn.o_proj": (D, queries), "mlp.gate_proj": (inner, D), "mlp.up_proj": (inner, D),
             "mlp.down_proj": (D, inner), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    files = [{"model.embed_tokens": (config["vocab_size"], D), "model.norm": (D,)}]
    files += [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
              for i in range(config["num_hidden_layers"])]
    file_of = {}
    for n, shapes in enumerate(files):
        weights = {f"{name}.weight": 0.02 * torch.randn(shape, dtype=torch.bfloat16) if len(shape) == 2
                   else torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(weights, folder / f"model-{n}.safetensors", {"format": "pt"})
        file_of |= dict.fromkeys(weights, f"model-{n}.safetensors")
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compare_methods(args, dtype, words, captions):
    """Print a table with a line per method."""
    print(f"\n{dtype}, captions of {words} words\n{'':38} captions/s   x (a)   x (b)     tokens/caption   "
          "tokens/s  of product   peak GiB")
    results = {}
    for method, label in METHODS.items():
        r = measure_one(args, method, dtype, words, captions)
        results[method] = r
        a, b = (r["captions_per_s"] / results[base]["captions_per_s"] if base in results else float("nan")
                for base in ("separate", "dense"))
        print(f"{label:38} {r['captions_per_s']:10.2f} {a:7.2f} {b:7.2f} {r['tokens']:18.0f} "
              f"{r['tokens_per_s']:10.0f} {r['of_product']:11.0%} {r['peak_gib']:10.2f}", flush=True)
    print(f"large matrix product: {r['peak_flops'] / 1e9:.0f} GFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--llm", default=str(ROOT / "data/demo/llm"), metavar="DIR", help="LLM (default: the demo's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available")
    add("--words", default="12,100,400", help="lengths of captions (default: 12,100,400)")
    add("--dtypes", default="bfloat16,float32", help="default: bfloat16,float32")
    add("--seconds", type=float, default=8, help="minimum duration of a measurement (default: 8)")
    add("--nemo", action="store_true", help="use random weights with Mistral-Nemo's sizes")
    add("--captions", type=int, default=0, help=argparse.SUPPRESS)
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.words = int(args.words)
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.nemo:
            args.llm = folder
            make_llm(Path(folder), nemo_config(12))
            shutil.copy(ROOT / "data/demo/llm/tokenizer.json", folder)
        llm = "with Mistral-Nemo's sizes, 12 layers, random" if args.nemo else args.llm
        print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {args.device}, "
              f"torch {torch.__version__}, long prompts (7 facets), LLM {llm}")
        for words in map(int, args.words.split(",")):
            captions = max(8, 2400 // max(words, 60))
            for dtype in args.dtypes.split(","):
                compare_methods(args, dtype, words, captions)


if __name__ == "__main__":
    main()
