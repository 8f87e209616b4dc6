"""Time to the first embedding and peak memory, ours against transformers: Mistral-7B's shape cut to 8 blocks.

    python tests/bench_load.py [--blocks 8] [--rounds 3] [--folder DIR]

The weights are random bfloat16. Each run is a process of its own; imports are not counted, peak memory is
over the imports' own. The two take turns, every file lies in the page cache. Both run all the blocks that the
folder has, once, over one caption with the raw prompt.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mistral_common
import torch

from bench_embed import make_llm, nemo_config

ROOT = Path(__file__).resolve().parent.parent
CAPTION = "A red kite flies above a calm sea at sunset, with a small boat to its left."
MISTRAL_7B = dict(hidden_size=4096, vocab_size=32000, rope_theta=10000.0, sliding_window=4096,
                  max_position_embeddings=32768, tie_word_embeddings=False, dtype="bfloat16")

PEAK = """
import re
def peak():  # ru_maxrss would begin at the parent's
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20
"""

OURS = PEAK + """if True:
    import sys, time
    import torch, flame
    before, start = peak(), time.perf_counter()
    encoder = flame.TextEncoder(sys.argv[1], layer=int(sys.argv[2]))
    loaded = time.perf_counter()
    state = encoder.encode([sys.argv[3]], "raw")[0, 0]"""

THEIRS = PEAK + """if True:
    import sys, time
    import torch, flame, transformers
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from transformers.models.mistral.modeling_mistral import MistralModel
    before, start = peak(), time.perf_counter()
    tokenizer = SentencePieceTokenizer(sys.argv[1] + "/tokenizer.model")
    model = MistralModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    last = []
    def keep(module, inputs, output):
        last.append(output[0] if isinstance(output, tuple) else output)
    model.layers[-1].register_forward_hook(keep)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the table gives medians")
    parser.add_argument("--folder", help="for the temporary weights (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = make_llm(Path(folder), nemo_config(args.blocks - 1) | MISTRAL_7B)
        tokenizer = next((Path(mistral_common.__file__).parent / "data").glob("tokenizer.model.v1*"))
        shutil.copy(tokenizer, Path(folder) / "tokenizer.model")
        print(f"Mistral-7B's shape, {args.blocks} blocks, {size / 2**30:.2f} GiB of bfloat16 weights, "
              f"{args.rounds} rounds, {torch.get_num_threads()} thread(s)")
        runs = {"ours": (OURS, []), "transformers": (THEIRS, [])}
        for _ in range(args.rounds):
            for name, (script, results) in runs.items():
                options = [folder, str(args.blocks), CAPTION, f"{folder}/{name}.pt"]
                command = [sys.executable, "-c", script + REPORT, *options]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
