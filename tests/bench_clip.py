"""The paper's claim in small: FLAME against CLIP on the demo's 2,500 pairs. Same ViT and projector, same pictures, crops, steps and batch.

    python tests/bench_clip.py                          # 3 seeds x 5 runs of 300 steps, about an hour on 2 CPU cores; python data/demo.py first
    python tests/bench_clip.py --seeds 1 --runs flame clip
    python tests/bench_clip.py --table                  # the table of what is finished

    flame            train.py --preset demo: all 11 stored embeddings of a frozen LLM, 6 a step
    clip             open_clip's text transformer (77 tokens, width 192, 4 blocks, 3 heads), trained from scratch along with the ViT, on one of the
                     picture's raw, short and long captions a step, drawn anew; InfoNCE; learning rate chosen on the validation split
    K=1, K=3, K=7    FLAME on the first K facets of the long set alone, all of them (up to 6) a step

Every run is a process of its own and leaves results/bench_clip/<run>-<steps>-<seed>.json, so that the script goes on where it was stopped.
Scores are of the demo's test split: long and short captions, text to image, by the facets of the long set (the first K); seen and unseen objects by
evaluate.py's English template and 14 languages' bare names by the raw prompt (CLIP: the same words through its own tower). Runs on K facets have
not seen the raw prompt, so only captions are scored. Intervals: 95%, bootstrap over seeds and over captions or objects.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import flame  # noqa: E402
import train  # noqa: E402
from data import benchmarks  # noqa: E402
from data.captions import read_captions  # noqa: E402
from data.pictures import Batches, find_pictures  # noqa: E402

RUNS = ("flame", "clip", "K=1", "K=3", "K=7")
# Learning rate: best of 2e-3, 1e-3, 5e-4, 2.5e-4 after 60 steps on the validation split; decay and beta2 are CLIP's published ones;
# the rest is the demo's preset.
CLIP = {"lr": 5e-4, "weight_decay": 0.2, "beta2": 0.98}
PARTS = {"long R@1": ("long", 1), "long R@10": ("long", 10), "short R@1": ("short", 1), "short R@10": ("short", 10),
         "seen top-1": ("seen", 1), "unseen top-1": ("unseen", 1), "14 languages": ("languages", 1)}


# ---------------------------------------------------------------- what is asked

def questions(root, split):
    """-> scenes (paths), captions {"long", "short"}, pictures of objects [(path, name, "seen" | "unseen")], names {(language, name): words}."""
    scenes, captions, objects, names, _ = benchmarks.demo(root / "data" / "demo", split)
    shown = {name: kind for _, name, kind in objects}
    words = {(language, name): table[name] for language, table in names.items() for name, kind in shown.items() if kind == "seen" and table.get(name)}
    words |= {(kind, name): evaluate.DEMO_TEMPLATE.replace("{}", names["en"][name]) for name, kind in shown.items()}
    return scenes, {column: captions[column] for column in ("long", "short")}, objects, words


def score(args, preprocess, encode_image, encode_texts, only_captions):
    """encode_texts(texts, prompts) -> [N, D] -> {part: {"ranks": of each query, "groups": what is resampled together}}."""
    scenes, captions, objects, words = questions(args.root, args.split)

    @torch.inference_mode()
    def embed(paths):
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        return torch.cat([encode_image(part) for part in pixels.split(64)]).float().numpy()

    image, places, found = embed(scenes), np.arange(len(scenes)), {}
    for column, texts in captions.items():
        ranks = evaluate.first_hit_ranks(encode_texts(texts, "long"), image, places, places)
        found[column] = {"ranks": ranks.tolist(), "groups": places.tolist()}
    if only_captions:
        return found
    image, vectors = embed([path for path, _, _ in objects]), dict(zip(words, encode_texts(list(words.values()), "raw")))
    for language in sorted({language for language, _ in words}):
        names = sorted(name for of, name in words if of == language)
        choices = sorted({words[language, name] for name in names})  # objects that share a name in a language share a class
        matrix = np.stack([next(vectors[language, name] for name in names if words[language, name] == choice) for choice in choices])
        rows = [n for n, (_, name, kind) in enumerate(objects) if name in names and (kind == language or language not in ("seen", "unseen"))]
        labels = np.array([choices.index(words[language, objects[n][1]]) for n in rows])
        part = found.setdefault(language if language in ("seen", "unseen") else "languages", {"ranks": [], "groups": []})
        part["ranks"] += evaluate.first_hit_ranks(image[rows], matrix, labels, np.arange(len(choices))).tolist()
        part["groups"] += [objects[n][1] for n in rows]
    return found


# ---------------------------------------------------------------- FLAME

def facets_of(args, texts, prompts):
    """[N, K, D] unit facets, from the LLM once and then from a file."""
    path = args.out / f"facets-{args.split}.pt"
    known = torch.load(path, weights_only=True) if path.exists() else {}
    missing = list(dict.fromkeys(text for text in texts if f"{prompts} {text}" not in known))
    if missing:
        meta = flame.open_store(args.store).meta["llm"]
        encoder = flame.TextEncoder(args.root / "data/demo/llm", "cpu", flame.default_dtype("cpu"), meta["layer"], meta["positions"])
        with tqdm(total=len(missing), desc=f"texts ({prompts})", unit=" texts") as bar:
            for rows, states in encoder.encode_batches(missing, prompts):
                known |= {f"{prompts} {missing[row]}": state for row, state in zip(rows, F.normalize(states, dim=-1).half())}
                bar.update(len(rows))
        torch.save(known, args.out / "facets.tmp")
        os.replace(args.out / "facets.tmp", path)
    return torch.stack([known[f"{prompts} {text}"] for text in texts]).float()


def run_flame(args, run, seed):
    K = int(run[2:]) if run.startswith("K=") else 0
    name = f"{run.replace('=', '')}-{args.steps}-{seed}"
    command = [sys.executable, ROOT / "train.py", "--embeddings", args.store, "--preset", "demo", "--steps", args.steps, "--seed", seed, "--name", name]
    command += ["--columns", ",".join(f"long.{k}" for k in range(K))] if K else []
    started = time.time()
    subprocess.run(list(map(str, command)), cwd=args.out, check=True)
    seconds = time.time() - started
    model = flame.load(args.out / "out" / name)

    @torch.inference_mode()
    def encode_texts(texts, prompts):
        facets = model.encode_text(facets_of(args, texts, prompts), prompts)
        return (facets[:, :K] if K else facets).mean(1).numpy()

    return seconds, score(args, model.preprocess, model.encode_image, encode_texts, bool(K))


# ---------------------------------------------------------------- CLIP

def run_clip(args, run, seed):
    """The same batches of pictures; texts through a tower of their own, trained from scratch."""
    from open_clip import SimpleTokenizer
    from open_clip.transformer import TextTransformer
    s = {name: values[0] for name, values in train.SETTINGS.items()} | CLIP | {"seed": seed, "steps": args.steps, "positives": 1}
    s |= {name: value for name, value in (("lr", args.lr), ("weight_decay", args.weight_decay)) if value}
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    store, tokenizer, half = flame.open_store(args.store), SimpleTokenizer(), flame.default_dtype("cpu") == torch.bfloat16
    captions = {row.key: [row.captions[column] for column in ("raw", "short", "long")] for row in read_captions(Path(store.meta["captions"]["path"]))}
    tokens = torch.stack([tokenizer(captions[key]) for key in store.keys])  # [N, 3, 77]
    torch.manual_seed(seed)
    D = store.meta["D"]
    config = {k: s[k] for k in ("image_size", "patch_size", "width", "layers", "heads", "pool_first")} | {"projector_hidden": D, "text_dim": D, "text_rank": 0,
                                                                                                         "init_logit_scale": float(np.log(s["init_scale"]))}
    model = flame.Flame(config)
    model.tower = TextTransformer(context_length=77, vocab_size=tokenizer.vocab_size, width=192, heads=3, layers=4, output_dim=D)
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": s["weight_decay"]},
                                   {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=s["lr"], betas=(0.9, s["beta2"]), eps=1e-8, fused=True)
    pictures = find_pictures(store)
    batches = Batches(store, range(len(store.meta["columns"])), pictures, s, s["steps"])
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=s["workers"])

    def encode_texts(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return F.normalize(model.tower(tokens).float(), dim=-1)

    started = time.time()
    for step, ((pixels, _, _, _, kept), _) in enumerate(tqdm(loader, desc="CLIP", unit=" steps")):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, s)
        chosen = np.random.default_rng([seed, 4, step]).integers(3, size=len(pixels))  # raw, short or long
        text = encode_texts(tokens[pictures[0][batches.pictures(step)], chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            image = model.encode_image(flame.to_pixels(pixels), kept)
        loss = train.infonce_loss(image, text[:, None], model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, train.MAX_LOGIT_SCALE)
    seconds = time.time() - started
    model.eval()
    with torch.inference_mode():
        return seconds, score(args, model.preprocess, model.encode_image, lambda texts, prompts: torch.cat([encode_texts(part) for part in tokenizer(texts).split(64)]).numpy(), False)


# ---------------------------------------------------------------- the table

def mean_and_interval(parts, k):
    """parts of several seeds -> "mean [low, high]", percent: seeds are resampled, and what belongs to one caption or object together."""
    hits, groups = np.array([np.array(part["ranks"]) < k for part in parts]), np.unique(parts[0]["groups"], return_inverse=True)[1]
    total = np.stack([np.bincount(groups, weights=row) for row in hits])  # [seeds, groups]
    count, rng = np.bincount(groups), np.random.default_rng(0)
    means = []
    for _ in range(2000):
        seeds, drawn = rng.integers(len(hits), size=len(hits)), rng.integers(len(count), size=len(count))
        means.append(total[seeds][:, drawn].sum() / count[drawn].sum() / len(hits))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{100 * hits.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(args):
    print(f"{args.steps} steps, {args.split} split, percent\n\n| | seeds | {' | '.join(PARTS)} | training, s |\n|{'---|' * (len(PARTS) + 3)}")
    for run in RUNS:
        found = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{run}-{args.split}-{args.steps}-*.json"))]
        if found:
            cells = [mean_and_interval([one["parts"][part] for one in found], k) if part in found[0]["parts"] else "" for part, k in PARTS.values()]
            print(f"| {run} | {len(found)} | {' | '.join(cells)} | {np.mean([one['seconds'] for one in found]):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="where data/demo.py made data/demo and data/embeddings/demo (the repository)")
    parser.add_argument("--out", type=Path, default=Path("results/bench_clip"), help="results/bench_clip")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--lr", type=float, help="of CLIP, to choose it on --split val")
    parser.add_argument("--weight-decay", type=float, help="of CLIP, likewise")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.root, args.out = args.root.resolve(), args.out.resolve()
    args.store = args.root / "data/embeddings/demo"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        run, seed = args.one[0], int(args.one[1])
        seconds, parts = (run_clip if run == "clip" else run_flame)(args, run, seed)
        path = args.out / f"{run}-{args.split}-{args.steps}-{seed}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"seconds": seconds, "parts": parts}))
        return os.replace(path.with_suffix(".tmp"), path)
    for seed in range(args.seeds) if not args.table else ():
        for run in args.runs:
            if not (args.out / f"{run}-{args.split}-{args.steps}-{seed}.json").exists():
                print(f"\n{run}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", run, str(seed)], check=True)
    table(args)


if __name__ == "__main__":
    main()
