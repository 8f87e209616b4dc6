"""Time to the first embedding and peak memory: Mistral-7B's shape cut to 8 blocks, random bfloat16 weights, ours against transformers.

    python tests/bench_load.py [--blocks 8] [--rounds 3] [--folder DIR]

Each run is a process of its own; imports are not counted, peak memory is over the imports' own. The two take turns, every
file lies in the page cache. Both run all the blocks that the folder has, once, over one caption with the raw prompt.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CAPTION = "A red kite flies above a calm sea at sunset, with a small boat to its left."
MISTRAL_7B = dict(model_type="mistral", architectures=["MistralForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                  num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, max_position_embeddings=32768, dtype="bfloat16")

OURS = """if True:
    import re, sys, time
    import torch, flame
    peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20  # ru_maxrss would begin at the parent's
    before, start = peak(), time.perf_counter()
    encoder = flame.TextEncoder(sys.argv[1], layer=int(sys.argv[2]))
    loaded = time.perf_counter()
    state = encoder.encode([sys.argv[3]], "raw")[0, 0]"""

THEIRS = """if True:
    import re, sys, time
    import torch, flame, transformers, mistral_common.tokens.tokenizers.sentencepiece as sentencepiece
    from transformers.models.mistral.modeling_mistral import MistralModel
    peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20  # ru_maxrss would begin at the parent's
    before, start = peak(), time.perf_counter()
    tokenizer = sentencepiece.SentencePieceTokenizer(sys.argv[1] + "/tokenizer.model")
    model = MistralModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    last = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output))
    loaded = time.perf_counter()
    text = flame.PROMPTS["raw"].prefix.replace("{}", sys.argv[3]) + " " + flame.PROMPTS["raw"].facets[0]
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(text, bos=True, eos=False)]))
    state = last[0].view(-1, model.config.hidden_size)[-1].float()"""

REPORT = """
    end = time.perf_counter()
    torch.save(state, sys.argv[4])
    import json
    print(json.dumps({"load": loaded - start, "first": end - start, "peak": peak() - before}))"""


def make_folder(folder, blocks):
    """Random weights, a shard a block; returns their bytes."""
    import mistral_common
    from safetensors.torch import save_file
    torch.manual_seed(0)
    D, inner, kv = MISTRAL_7B["hidden_size"], MISTRAL_7B["intermediate_size"], MISTRAL_7B["num_key_value_heads"] * MISTRAL_7B["head_dim"]
    noise = lambda *shape: torch.randn(shape, dtype=torch.bfloat16) * 0.02
    shards = [{"model.embed_tokens.weight": noise(MISTRAL_7B["vocab_size"], D), "model.norm.weight": torch.ones(D, dtype=torch.bfloat16)}]
    where = dict.fromkeys(shards[0], "model-0.safetensors")
    save_file(shards.pop(), folder / "model-0.safetensors", {"format": "pt"})
    for i in range(blocks):
        p, name = f"model.layers.{i}.", f"model-{i + 1}.safetensors"
        shard = {p + f"self_attn.{x}_proj.weight": noise(n, D) for x, n in (("q", D), ("k", kv), ("v", kv), ("o", D))}
        shard |= {p + f"mlp.{x}_proj.weight": noise(*shape) for x, shape in (("gate", (inner, D)), ("up", (inner, D)), ("down", (D, inner)))}
        shard |= {p + f"{x}_layernorm.weight": torch.ones(D, dtype=torch.bfloat16) for x in ("input", "post_attention")}
        save_file(shard, folder / name, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B | {"num_hidden_layers": blocks}))
    (folder / "tokenizer.model").write_bytes(next((Path(mistral_common.__file__).parent / "data").glob("tokenizer.model.v1*")).read_bytes())
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the table gives medians")
    parser.add_argument("--folder", help="where the temporary weights lie (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = make_folder(Path(folder), args.blocks)
        print(f"Mistral-7B's shape, {args.blocks} blocks, {size / 2**30:.2f} GiB of bfloat16 weights, {args.rounds} rounds, {torch.get_num_threads()} thread(s)")
        runs = {"ours": (OURS, []), "transformers": (THEIRS, [])}
        for _ in range(args.rounds):
            for name, (script, results) in runs.items():
                done = subprocess.run([sys.executable, "-c", script + REPORT, folder, str(args.blocks), CAPTION, f"{folder}/{name}.pt"], cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        a, b = (torch.load(f"{folder}/{name}.pt", weights_only=True) for name in runs)
        print(f"{'':14}{'loaded, s':>12}{'first embedding, s':>22}{'peak memory, GiB':>20}")
        for name, (_, results) in runs.items():
            load, first, peak = (statistics.median(r[k] for r in results) for k in ("load", "first", "peak"))
            print(f"{name:14}{load:>12.2f}{first:>22.2f}{peak:>20.2f}")
        print(f"cosine of the two embeddings {torch.cosine_similarity(a, b, dim=0).item():.5f}")


if __name__ == "__main__":
    main()
