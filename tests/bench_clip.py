"""The paper's claim in small: FLAME against CLIP on the demo's pairs, with the same ViT, projector, pictures,
crops and batches. `python data/demo.py` comes first, and with --llm gemma3; they make the corpus and stores.

    python tests/bench_clip.py                            # 3 seeds x 7 runs of 300 steps: hours on 2 cores
    python tests/bench_clip.py --seeds 1 --runs smollm2 clip clip-seconds
    python tests/bench_clip.py --pairs 625                # of 2,500, the first
    python tests/bench_clip.py --lr 1e-3 --runs clip; ... --table --split val    # to choose a learning rate
    python tests/bench_clip.py --table                    # what is finished, on the test split

    smollm2, gemma3  train.py --preset demo: facets of a frozen LLM
    last, mean       the same map and loss with a pretrained text tower that is asked no question: SmolLM2's
                     state at the last token of each plain caption, or the mean of its tokens' states
    published        the paper's text side with SmolLM2: facets as they are, sigmoid loss from scale 10
    clip             open_clip's text transformer (77 tokens, width 192, 4 blocks, 3 heads), trained from
                     scratch along with the ViT on one of a picture's captions a step (--shares); InfoNCE.
                     Its attention is computed as our ViT's, by the same formula and faster on a CPU
    clip-seconds     the same for as many steps as fit into the seconds that `smollm2` took

Each run is a process of its own. It leaves a JSON in <out> with what evaluate.py says of the demo, so the
script goes on where it was stopped. Seconds are CPU seconds, so that other work on the machine counts little:
of the whole train.py command for FLAME, of the loop alone for CLIP; embedding the captions is not in them.
"""
import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import flame  # noqa: E402
import train  # noqa: E402
from data import benchmarks, files  # noqa: E402
from data.captions import read_table  # noqa: E402
from data.pictures import Batches, find_pictures  # noqa: E402
from data.store import window_file  # noqa: E402
from data.towers import Towers  # noqa: E402

KINDS = ("raw", "short", "long")
# Peak learning rates, chosen on the validation split (tests/RESULTS.md).
LR = {"smollm2": 1e-3, "gemma3": 2e-3, "last": 1e-3, "mean": 2e-3, "published": 4e-3, "clip": 2e-3,
      "clip-seconds": 5e-4}
RUNS = list(LR)
FLAGS = {
    "published": ["--text-projection", "none", "--loss", "sigmoid", "--init-scale", "10", "--no-raw-always"],
    "last": ["--columns", "raw.0,short.0,long.0", "--positives", "3"],
    "mean": ["--columns", "raw.0,short.0,long.0", "--positives", "3"],
}
CLIP = {"weight_decay": 0.2, "beta2": 0.98}  # CLIP's published ones; the rest is the demo's preset
ROWS = {  # of the table: the part of evaluate.py's result, and its key
    "long captions R@1": ("long", "R@1"),
    "long captions R@10": ("long", "R@10"),
    "short captions R@1": ("short", "R@1"),
    "short captions R@10": ("short", "R@10"),
    "captions in new words R@1": ("reworded", "R@1"),
    "captions in new words R@10": ("reworded", "R@10"),
    "seen objects top-1": ("seen", "top1"),
    "unseen objects top-1": ("unseen", "top1"),
    "objects by synonym top-1": ("synonyms", "top1"),
    "objects by synonym top-5": ("synonyms", "top5"),
    "objects in 13 languages top-1": ("multilingual", "top1"),
}


# One run

def cpu_seconds():
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def result_file(args, run, seed, lr=None):
    lr = lr or args.lr or LR[run]
    return args.out / f"{run}-{args.pairs}-{args.steps}-{lr:g}-{seed}.json"


def stage(args, script, *flags):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], cwd=args.out, check=True)


def llm_of(args, run):
    return args.root / "data/demo" / ("gemma3" if run == "gemma3" else "llm")


def run_flame(args, run, seed):
    """-> (seconds of training, steps, evaluate.py's result)"""
    name = result_file(args, run, seed).stem
    store = store_of(args, run)
    started = cpu_seconds()
    stage(args, "train.py", "--embeddings", store.path, "--preset", "demo", "--steps", args.steps,
          "--seed", seed, "--lr", args.lr or LR[run], "--name", name, *FLAGS.get(run, []))
    seconds = cpu_seconds() - started
    model = flame.load(args.out / "out" / name)

    def encoder():
        if run in ("last", "mean"):
            return PlainTexts(llm_of(args, run), run)
        return flame.TextEncoder(llm_of(args, run), dtype=flame.default_dtype("cpu"))
    return seconds, args.steps, scored(args, model, encoder, "smollm2" if run == "published" else run)


def scored(args, model, encoder, name):
    """-> {split: what evaluate.py says of the demo's parts}. name: of the text tower, whose texts' states are
    kept under it.
    """
    cache = args.out / "cache" if name else None
    towers = Towers(model, functools.cache(encoder), "cpu", cache, os.urandom(8).hex(), name)
    parts = {}
    for split in ("val", "test"):
        data = benchmarks.read("demo", args.root / "data/demo", split)
        scores, _ = evaluate.score_demo(towers, *KINDS, *data)
        parts[split] = evaluate.with_intervals(scores, {})["parts"]
    return parts


# Stores: the demo's, its first pairs, and one of plain captions

def store_of(args, run):
    """-> flame.Store of the pairs that are trained on"""
    folder = args.root / "data/embeddings" / ("demo-gemma3" if run == "gemma3" else "demo")
    if run in ("last", "mean"):
        make = functools.partial(plain_vectors, args, run)
        folder = derived(args.out / f"stores/{run}", folder, make)
    store = flame.open_store(folder)
    if args.pairs < len(store):
        path = args.out / f"stores/{folder.name}-{args.pairs}"
        store = flame.open_store(derived(path, folder, taken, args.pairs))
    return store


def taken(store, rows):
    return store.take(rows, range(len(flame.COLUMNS))).numpy()


def derived(path, folder, vectors_of, pairs=None):
    """A store of the first pairs of another's, with other vectors: vectors_of(store, rows) [n, 11, D]."""
    store = flame.open_store(folder)
    pairs = pairs or len(store)
    if not (path / "meta.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        lines = (folder / "captions.tsv").read_text("utf-8").split("\n")
        files.write_text(path / "captions.tsv", "\n".join(lines[:pairs + 1]) + "\n")
        for w, first in enumerate(tqdm(range(0, pairs, store.window), desc=path.name)):
            rows = np.arange(first, min(pairs, first + store.window))
            files.write_array(window_file(path, w), vectors_of(store, rows))
        files.write_json(path / "meta.json", store.meta | {"N": pairs})
    return path


def plain_vectors(args, run, store, rows):
    """A caption's one state in the place of each of its questions'."""
    captions = list(read_table(store.path / "captions.tsv"))[rows[0]:rows[-1] + 1]
    texts = PlainTexts(llm_of(args, run), run)
    block = np.zeros((len(rows), len(flame.COLUMNS), store.D), np.float16)
    for kind in KINDS:
        for places, states in texts.encode_batches([getattr(row, kind) for row in captions], kind):
            block[places, flame.COLUMNS.index(f"{kind}.0")] = F.normalize(states[:, 0], dim=-1).half().numpy()
    return block


class PlainTexts:
    """The frozen LLM without questions: its state at the last token of a caption, or the mean over tokens."""

    def __init__(self, llm, kind):
        self.encoder = flame.TextEncoder(llm, dtype=flame.default_dtype("cpu"))
        self.kind = kind

    def encode_batches(self, texts, prompts):
        facets = len(flame.PROMPTS[prompts].facets)
        ids = self.encoder.tokenizer.encode_batch([flame.clean(text) for text in texts])
        for rows in np.array_split(np.argsort([len(row) for row in ids]), -(-len(texts) // 32)):
            starts = [range(1, len(ids[i]) + 1) if self.kind == "mean" else [len(ids[i])] for i in rows]
            forest = flame.build_forest([ids[i][:n] for i, some in zip(rows, starts) for n in some])
            states = flame.decode(self.encoder.decoder, forest).split([len(some) for some in starts])
            vectors = torch.stack([of_text.mean(0) for of_text in states])
            yield rows.tolist(), vectors[:, None].expand(-1, facets, -1)


# CLIP

class CausalAttention(flame.Attention):
    """A block's attention in open_clip's text transformer: what torch.nn.MultiheadAttention gives there."""

    def forward(self, x, k, v, need_weights, attn_mask):
        B, S, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, S, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + attn_mask.to(q.dtype)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, width)), None


class ClipTexts:
    """CLIP's text tower, of random weights, in the text encoder's place: one vector for all questions."""

    def __init__(self, D):
        from open_clip import SimpleTokenizer
        from open_clip.transformer import TextTransformer
        self.tokenizer = SimpleTokenizer()
        vocabulary = self.tokenizer.vocab_size
        self.tower = TextTransformer(77, vocabulary, width=192, heads=3, layers=4, output_dim=D)
        for block in self.tower.transformer.resblocks:
            attention = CausalAttention(192, 3)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention
        self.causal = self.tower.attn_mask  # [77, 77]

    def encode(self, tokens):
        """int64 [n, 77] -> float32 [n, D] unit vectors, in the order given.

        Texts of about one length go through together, cut to the longest: attention is causal and the text
        is read at its end, so what follows it never counts.
        """
        lengths = tokens.argmax(1) + 1  # the end of text is the largest id
        order = lengths.argsort()
        fast = flame.default_dtype("cpu") == torch.bfloat16
        parts = []
        for rows in order.split(64):
            longest = lengths[rows].max()
            self.tower.attn_mask = self.causal[:longest, :longest]
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                parts.append(self.tower(tokens[rows, :longest]).float())
        return F.normalize(torch.cat(parts)[order.argsort()], dim=-1)

    def encode_batches(self, texts, prompts):
        facets = len(flame.PROMPTS[prompts].facets)
        yield range(len(texts)), self.encode(self.tokenizer(texts))[:, None].expand(-1, facets, -1)


def clip_steps(args, run, seed):
    """As many steps as asked for, or as fit into the seconds of `smollm2`."""
    if run == "clip":
        return args.steps
    ours, theirs = (json.loads(result_file(args, other, seed, LR[other]).read_text())
                    for other in ("smollm2", "clip"))
    return int(ours["seconds"] / theirs["seconds"] * theirs["steps"])


def run_clip(args, run, seed):
    """The same batches of pictures; texts through a tower of their own. -> as run_flame()"""
    s = {name: values[0] for name, values in train.SETTINGS.items()} | CLIP
    s |= {"seed": seed, "steps": clip_steps(args, run, seed), "positives": 1, "lr": args.lr or LR[run]}
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    store = store_of(args, run)
    s["batch"] = min(s["batch"], len(store))

    torch.manual_seed(seed)
    D = store.meta["D"]
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "pool_first")
    config = {name: s[name] for name in sizes}
    config |= {"projector_hidden": D, "text_dim": D, "text_rank": 0, "columns": flame.COLUMNS}
    model = flame.Flame(config)
    train.initialise(model.visual, s)
    torch.nn.init.constant_(model.logit_scale, float(np.log(s["init_scale"])))
    encoder = ClipTexts(D)
    rows = read_table(store.path / "captions.tsv")
    tokens = torch.stack([encoder.tokenizer([getattr(row, kind) for kind in KINDS]) for row in rows])
    parameters = [*model.parameters(), *encoder.tower.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s["weight_decay"]},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, s["beta2"]), fused=True)
    pictures = find_pictures(store.keys, store.images, store.meta["captions"]["path"])
    batches = Batches(store, range(len(flame.COLUMNS)), pictures, s)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(s["steps"]),
                                         num_workers=s["workers"])
    fast = flame.default_dtype("cpu") == torch.bfloat16

    started = cpu_seconds()
    for step, ((pixels, _, _, _, kept), _) in enumerate(tqdm(loader, desc=run, unit=" steps")):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, s)
        shares = np.array(args.shares) / sum(args.shares)
        chosen = np.random.default_rng([seed, 4, step]).choice(3, len(pixels), p=shares)
        text = encoder.encode(tokens[pictures[0][batches.pictures(step)], chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            image = model(flame.to_pixels(pixels), kept)
        loss = train.infonce_loss(image, text[:, None], model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, train.MAX_LOGIT_SCALE)
    del loader  # its processes have ended
    seconds = cpu_seconds() - started

    evaluate.DEMO_TEMPLATE = "{}"   # by a bare name it finds more, on the validation split
    return seconds, s["steps"], scored(args, model.eval(), lambda: encoder, "")


def run_one(args, run, seed):
    seconds, steps, result = (run_clip if run.startswith("clip") else run_flame)(args, run, seed)
    saved = {"seconds": seconds, "steps": steps, "threads": torch.get_num_threads(), **result}
    files.write_text(result_file(args, run, seed), json.dumps(saved))


# What was found

def scores(args, result, row):
    """-> (percent, [low, high]) of a row of the table."""
    part, key = ROWS[row]
    part = result[args.split][part]
    if key.startswith("R@"):
        return part["text_to_image"][key], part["ci95"]["text_to_image"][key]
    return part[key], part["ci95"][key]


def cell(args, found, row):
    """Mean over seeds, the mean of their intervals over captions or pictures, the seeds' deviation."""
    values = [scores(args, result, row)[0] for result in found]
    low, high = np.mean([scores(args, result, row)[1] for result in found], axis=0)
    deviation = f" ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]{deviation}"


def finished(args, run):
    paths = sorted(args.out.glob(result_file(args, run, "*").name))
    return [json.loads(path.read_text()) for path in paths]


def table(args):
    found = {run: results for run in RUNS if (results := finished(args, run))}
    print(f"{args.split} split, percent: mean over seeds [95% interval over captions or pictures] "
          "±deviation of seeds\n")
    print("| | " + " | ".join(found) + " |")
    print("|---|" + "---|" * len(found))
    for row in ROWS:
        print(f"| {row} | " + " | ".join(cell(args, results, row) for results in found.values()) + " |")
    for what in ("steps", "seconds"):
        means = [f"{np.mean([result[what] for result in results]):.0f}" for results in found.values()]
        print(f"| {what} | " + " | ".join(means) + " |")
    print("| seeds | " + " | ".join(str(len(results)) for results in found.values()) + " |")


def figure(args):
    """What is found against the pairs that were trained on, at the same number of steps -> pairs.png"""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    rows = {"long captions R@1": "long captions R@1", "captions in new words R@10": "new words R@10",
            "objects by synonym top-1": "by a synonym", "objects in 13 languages top-1": "13 languages"}
    fig, axes = pyplot.subplots(1, len(rows), figsize=(11, 3), layout="constrained")
    runs = {"gemma3": ("FLAME, Gemma 3", "tab:orange"), "smollm2": ("FLAME, SmolLM2", "tab:red"),
            "clip": ("CLIP, from scratch", "tab:blue")}
    for ax, (row, title) in zip(axes, rows.items()):
        for run, (label, colour) in runs.items():
            points = []
            for pairs in (250, 625, 1250, 2500):
                args.pairs = pairs
                values = [scores(args, result, row)[0] for result in finished(args, run)]
                if values:
                    points.append((pairs, np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0))
            if points:
                sizes, means, deviations = zip(*points)
                ax.errorbar(sizes, means, deviations, fmt="o-", color=colour, label=label, capsize=3)
        ax.set(title=title, xlabel="pairs", xscale="log", ylim=(0, None), xticks=sizes, xticklabels=sizes)
        ax.minorticks_off()
    axes[0].set_ylabel("test split, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(args.out / "pairs.png", dpi=120)
    print(f"-> {args.out / 'pairs.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT,
                        help="where data/demo.py made its files (the repository)")
    parser.add_argument("--out", type=Path, default=Path("results/bench_clip"), help="results/bench_clip")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=2500, help="train on the first of the demo's 2,500")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the one that was chosen)")
    parser.add_argument("--shares", type=float, nargs=3, default=(1, 3, 7), metavar=("RAW", "SHORT", "LONG"),
                        help="of captions that CLIP is shown (1 3 7, as published); with an --out of its own")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the figure")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.root = args.root.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args, args.one[0], int(args.one[1]))
    for seed in range(args.seeds) if not args.table else ():
        for run in args.runs:
            if not result_file(args, run, seed).exists():
                print(f"\n{run}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", run, str(seed)], check=True)
    table(args)
    figure(args)


if __name__ == "__main__":
    main()
