"""Stage 2: images + embedding store -> checkpoint. A ViT and its projector learn to meet the stored facets of their captions.

    python train.py                                        # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m

The LLM is not loaded here: a step reads a batch of pictures and, for each, a few of its 11 stored embeddings as positives.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flame

# Every setting, its value in each preset, and what it is. Any of them can be given as a flag: --image-size 96.
# cc3m is the paper's recipe for CC3M with ViT-B/16 (appendix and released training script). yfcc15m: the paper trains it
# alike; the released scripts give CC3M's values only, so the rest is taken over and only the epochs are fewer (our choice).
# demo is ours, chosen on the demo's validation split.
PRESETS = ("demo", "cc3m", "yfcc15m")
SETTINGS = {
    # name              demo      cc3m      yfcc15m    what
    "image_size":      (64,       224,      224,       "side of the picture, pixels"),
    "patch_size":      (8,        16,       16,        "side of a patch, pixels"),
    "width":           (192,      768,      768,       "of the ViT"),
    "layers":          (4,        12,       12,        "blocks of the ViT"),
    "heads":           (3,        12,       12,        "attention heads of the ViT"),
    "projector_hidden": (0,       4096,     4096,      "projector's hidden width; at least the LLM's width is taken"),
    "pool_first":      (True,     False,    False,     "average the patches before projecting, not after"),
    "loss":            ("infonce", "sigmoid", "sigmoid", "sigmoid or infonce, both with several positives"),
    "text_projection": ("raw=whiten:0.3,short=whiten,long=whiten", "none",   "none",    "none, center, whiten, linear; or raw=center,long=whiten:0.1 (:ridge)"),
    "ridge":           (0.01,     0.01,     0.01,      "whitening's ridge, a fraction of the largest deviation"),
    "text_rank":       (1024,     1024,     1024,      "directions that whitening treats one by one"),
    "positives":       (6,        6,        6,         "embeddings of its captions an image meets in a step"),
    "columns":         ("",       "",       "",        "train on these store columns only: raw.0,long.0,long.1 ..."),
    "batch":           (256,      3072,     3072,      "images a step (published: 8 GPUs x 384)"),
    "epochs":          (78.0,     32.0,     25.0,      "passes over the images"),
    "steps":           (0,        0,        0,         "steps in all; 0: as the epochs say"),
    "lr":              (1e-3,     5e-4,     5e-4,      "peak learning rate, AdamW"),
    "beta2":           (0.95,     0.95,     0.95,      "AdamW's second beta; the first is 0.9"),
    "weight_decay":    (0.5,      0.5,      0.5,       "on matrices and the position table only"),
    "warmup":          (40,       2000,     2000,      "steps of linear warm-up, at most a tenth of all; then cosine to 0"),
    "init_scale":      (14.0,     10.0,     10.0,      "initial logit scale (not its log)"),
    "init_bias":       (-10.0,    -10.0,    -10.0,     "initial logit bias, sigmoid loss only"),
    "crop_scale":      (0.5,      0.9,      0.9,       "smallest share of the picture's area that a random crop keeps"),
    "patch_dropout":   (0.5,      0.0,      0.0,       "share of a picture's patches that a step leaves out"),
    "workers":         (0,        8,        8,         "processes that load images"),
    "seed":            (0,        0,        0,         "of weights, order, crops and positives"),
}
MAX_LOGIT_SCALE = math.log(100)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: the closed-form text projection

def fit_text_projection(store, spec, ridge, rank, max_rows=100_000):
    """The closed-form text projection, computed from the store in one pass; -> flame.TextProjection.

    An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9. A fixed
    linear map that evens this out lets the image tower learn several times faster at no cost.

    Per column: u = x / |x|, mean mu of u, singular values s and vectors V of the centered matrix / sqrt(N);
    "whiten" maps u to V diag(1 / (s + ridge s_1)) V^T (u - mu); beyond `rank` directions all are scaled alike.
    More rows than max_rows add nothing to a D x D covariance but hours: then a sample drawn from a fixed seed is read.
    """
    kinds = parse_projection(spec, ridge)
    D = store.meta["D"]
    linear = any(kind == "linear" for kind, _ in kinds.values())
    rank = min(rank, D) if any(kind == "whiten" for kind, _ in kinds.values()) else 0
    projection = flame.TextProjection(D, rank, linear)
    rows = np.arange(len(store))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False))
    for at, name in enumerate(store.meta["columns"]):
        (kind, ridge), c = kinds[name.split(".")[0]], flame.COLUMNS.index(name)
        if kind in ("none", "linear"):
            continue
        total, products = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
        for start in range(0, len(rows), 4096):
            u = store.read(rows[start:start + 4096], [at])[:, 0].double()
            total += u.sum(0)
            products += u.T @ u
        mean = total / len(rows)
        projection.mean[c] = mean
        if kind == "whiten":
            variances, vectors = torch.linalg.eigh(products / len(rows) - torch.outer(mean, mean))  # ascending
            s = variances.clamp_min(0).sqrt().flip(0)
            wanted = 1 / (s + ridge * s[0])
            wanted = wanted / wanted[-1]  # only directions matter, the result is normalised; keeps numbers near 1
            projection.rest[c] = wanted[rank] if rank < D else 0.0
            projection.basis[c] = vectors.flip(1)[:, :rank]
            projection.gain[c] = wanted[:rank] - projection.rest[c].double()
    return projection


def parse_projection(spec, ridge):
    """"whiten", or one a prompt set with a ridge of its own, "raw=whiten:0.1,long=whiten" -> {set: (kind, ridge)}."""
    parts = dict.fromkeys(flame.PROMPTS, spec) if "=" not in spec else dict.fromkeys(flame.PROMPTS, "none") | dict(
        part.partition("=")[::2] for part in spec.split(","))
    out = {}
    for name, part in parts.items():
        kind, _, own = part.partition(":")
        try:
            out[name] = kind, float(own or ridge)
        except ValueError:
            kind = "wrong"
        if name not in flame.PROMPTS or kind not in ("none", "center", "whiten", "linear"):
            raise flame.InputError(f"--text-projection: {spec!r}; give none, center, whiten or linear, or one a prompt set: raw=whiten:0.1,short=whiten,long=whiten")
    if len(kinds := {kind for kind, _ in out.values()}) > 1 and "linear" in kinds:
        raise flame.InputError(f"--text-projection: {spec!r}; linear is one matrix shared by all columns and does not mix with others")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Losses: images [B, D] and their texts [B, P, D], all unit vectors; every text of another image is a negative

def sigmoid_loss(image, text, scale, bias):
    """-sum log sigmoid(+-(scale <image, text> + bias)) / number of texts (paper, section 3.4; SigLIP with P positives)."""
    B, P, D = text.shape
    logits = scale * image @ text.reshape(B * P, D).T + bias  # [B, B P]
    sign = torch.full((B, B), -1.0, device=image.device).fill_diagonal_(1.0).repeat_interleave(P, dim=1)
    return -F.logsigmoid(sign * logits).sum() / (B * P)


def infonce_loss(image, text, scale, bias=None):
    """Half: mean over images of (mean over its positives of -log softmax over all texts); half: mean over texts of
    -log softmax over all images."""
    B, P, D = text.shape
    logits = (scale * image @ text.reshape(B * P, D).T).view(B, B, P)
    own = logits.diagonal(dim1=0, dim2=1).T  # [B, P]
    return 0.5 * ((logits.flatten(1).logsumexp(1)[:, None] - own).mean() + (logits.logsumexp(0) - own).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Images

def find_images(store, folder):
    """-> (row indices that have a picture, {row: path}). Paths come from the store, or by key from a folder."""
    captions = Path(store.meta["captions"]["path"])
    if any(store.images):
        root = Path(folder) if folder else captions.parent
        paths = {row: root / image for row, image in enumerate(store.images) if image}
    else:
        places = [Path(folder)] if folder else [captions.with_name(captions.name.split(".")[0]), captions.with_name("images")]
        root = next((p for p in places if p.is_dir()), None)
        if root is None:
            raise flame.InputError(f"{store.path}: its captions name no pictures, and there is no folder {' or '.join(map(str, places))}; give --images DIR with files named by key")
        by_key = {}
        for at, _, files in os.walk(root):
            for file in files:
                if file.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                    by_key[os.path.splitext(file)[0]] = os.path.join(at, file)
        paths = {row: by_key[key] for row, key in enumerate(store.keys) if key in by_key}
    if len(paths) < 2:
        raise flame.InputError(f"{root}: {len(paths)} of the {len(store)} keys in {store.path} have a picture there (first key: {store.keys[0]}); training needs two")
    return np.array(list(paths)), paths


class Batches(torch.utils.data.Dataset):
    """Item t is the whole batch of step t, a pure function of the seed and t: pixels, texts, and what could not be read."""

    def __init__(self, store, columns, rows, paths, settings, steps):
        self.store, self.columns, self.rows, self.paths, self.steps = store, np.array(columns), rows, paths, steps
        self.named = np.array([flame.COLUMNS.index(store.meta["columns"][c]) for c in columns])  # as the text projection counts them
        self.size, self.batch, self.positives = settings["image_size"], settings["batch"], settings["positives"]
        self.crop_scale, self.seed = settings["crop_scale"], settings["seed"]

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        epoch, at = divmod(step, len(self.rows) // self.batch)  # the few images over are left out, others each epoch
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.rows)
        rows = order[at * self.batch:(at + 1) * self.batch]
        rng = np.random.default_rng([self.seed, 2, step])
        pixels, kept, bad = [], [], []
        boxes, picks = rng.random((len(rows), 4)), rng.random((len(rows), len(self.columns))).argsort(1)[:, :self.positives]
        for i, row in enumerate(rows):
            try:
                pixels.append(flame.to_pixels(self.crop(read_image(self.paths[row]), boxes[i])))
                kept.append(i)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # what Pillow raises
                bad.append((int(row), type(e).__name__))
        if not kept:
            return None, None, None, bad
        picks = picks[kept]
        return torch.stack(pixels), self.store.read(rows[kept], self.columns[picks]), torch.from_numpy(self.named[picks]), bad

    def crop(self, image, draw):
        """Random resized crop, ratio 3/4 to 4/3, bicubic: resized straight from the box."""
        w, h = image.size
        area = w * h * (self.crop_scale + (1 - self.crop_scale) * draw[0])
        ratio = math.exp(math.log(4 / 3) * (2 * draw[1] - 1))
        cw, ch = min(w, math.sqrt(area * ratio)), min(h, math.sqrt(area / ratio))
        left, top = draw[2] * (w - cw), draw[3] * (h - ch)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + cw, top + ch))


def read_image(path):
    with Image.open(path) as image:
        return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# The run

def train(args, s):
    store = flame.open_store(args.embeddings)
    device = torch.device(args.device)
    columns = chosen_columns(store, s["columns"])
    rows, paths = find_images(store, args.images)
    s["batch"] = min(s["batch"], len(rows))
    s["positives"] = min(s["positives"], len(columns))
    s["projector_hidden"] = max(s["projector_hidden"], store.meta["D"])
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (len(rows) // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["workers"] = min(s["workers"], os.cpu_count() or 1)
    out = Path("out") / (args.name or store.path.resolve().name)
    try:  # found out now, not after the last step
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "w")
    except OSError as e:
        raise flame.InputError(f"{out}: {e.strerror}; training writes its checkpoint there") from None
    print(f"{len(rows)} images x {len(columns)} embeddings -> {out}\n" + "  ".join(f"{k}={v}" for k, v in s.items()))

    torch.manual_seed(s["seed"])
    projection = fit_text_projection(store, s["text_projection"], s["ridge"], s["text_rank"])
    config = {k: s[k] for k in ("image_size", "patch_size", "width", "layers", "heads", "projector_hidden", "pool_first")} | {
        "text_dim": store.meta["D"], "text_rank": projection.basis.shape[-1], "text_linear": projection.weight is not None,
        "init_logit_scale": math.log(s["init_scale"]), "init_logit_bias": s["init_bias"]}
    model = flame.Flame(config)
    model.text = projection
    model.visual.patch_dropout = s["patch_dropout"]
    model.to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # vectors, norms, biases, scale
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": s["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
                                  lr=s["lr"], betas=(0.9, s["beta2"]), eps=1e-8, fused=True)
    loss_of = {"sigmoid": sigmoid_loss, "infonce": infonce_loss}[s["loss"]]
    half = flame.default_dtype(device) == torch.bfloat16
    batches = torch.utils.data.DataLoader(Batches(store, columns, rows, paths, s, s["steps"]), batch_size=None,
                                          num_workers=s["workers"], prefetch_factor=2 if s["workers"] else None, pin_memory=device.type == "cuda")
    bad, waited, seen, started = {}, 0.0, 0, time.time()
    clock = time.time()
    with log, tqdm(total=s["steps"], desc="training", unit=" steps", smoothing=0.05) as bar:
        for step, (pixels, facets, of_columns, failed) in enumerate(batches):
            waited += time.time() - clock
            bad.update(failed)
            if pixels is None:
                raise flame.InputError(f"{paths[failed[0][0]]}: no picture of this batch could be read; give the right --images DIR")
            lr = learning_rate(step, s)
            for group in optimizer.param_groups:
                group["lr"] = lr
            pixels = pixels.to(device, non_blocking=True)
            text = model.text(facets.to(device, non_blocking=True), of_columns)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                image = model.encode_image(pixels)
            loss = loss_of(image, text, model.logit_scale.exp(), model.logit_bias)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            if not math.isfinite(loss.item()):
                raise flame.InputError(f"{out}: the loss is {loss.item()} at step {step}; lower --lr, and check the store with a fresh embed.py run")
            seen += len(pixels)
            rate = seen / (time.time() - started)
            entry = {"step": step, "loss": round(loss.item(), 5), "scale": round(model.logit_scale.exp().item(), 3),
                     "bias": round(model.logit_bias.item(), 3), "lr": lr, "images_per_s": round(rate, 1), "waited_s": round(waited, 2)}
            log.write(json.dumps(entry) + "\n")
            bar.set_postfix_str(f"loss {entry['loss']:.3f}, scale {entry['scale']:.1f}, {rate:.0f} images/s", refresh=False)
            bar.update()
            clock = time.time()
    if bad:
        shown = ", ".join(f"{store.keys[row]} ({why})" for row, why in list(bad.items())[:5])
        print(f"skipped {len(bad)} unreadable picture{'s' * (len(bad) > 1)}: {shown}{', ...' * (len(bad) > 5)}", file=sys.stderr)
    save(out, model, config, s, store)
    print(f"{out}: {s['steps']} steps, {seen / (time.time() - started):.0f} images/s, {waited / (time.time() - started):.1%} of the time waited for data")


def chosen_columns(store, names):
    """Indices of the store's columns to train on."""
    have = store.meta["columns"]
    names = [n.strip() for n in names.split(",")] if names else have
    if wrong := [n for n in names if n not in have]:
        raise flame.InputError(f"--columns: {wrong[0]!r} is not in {store.path}; it has {','.join(have)}")
    return [have.index(n) for n in names]


def learning_rate(step, s):
    if step < s["warmup"]:
        return s["lr"] * (step + 1) / s["warmup"]
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * (step - s["warmup"]) / max(1, s["steps"] - s["warmup"])))


def save(out, model, config, s, store):
    """model.safetensors and config.json, each whole or not at all."""
    from safetensors.torch import save_file
    record = {"model": config, "llm": store.meta["llm"], "training": s, "store": {"path": str(store.path), "N": len(store), "columns": store.meta["columns"]}}
    save_file(model.state_dict(), out / "model.safetensors.tmp")
    (out / "config.json.tmp").write_text(json.dumps(record, indent=1))
    for name in ("model.safetensors", "config.json"):
        os.replace(out / (name + ".tmp"), out / name)


def newest_store():
    found = sorted(Path("data/embeddings").glob("*/meta.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise flame.InputError("data/embeddings: no finished store; make one with embed.py, or give --embeddings DIR")
    return found[-1].parent


def main():
    parser = argparse.ArgumentParser(description="Stage 2: images + embedding store -> checkpoint", formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=150), usage="train.py [--embeddings DIR] [--images DIR] [--preset demo|cc3m|yfcc15m] [--name NAME] [--SETTING VALUE ...]")
    parser.add_argument("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    parser.add_argument("--images", metavar="DIR", help="root of the pictures (default: where the captions file lies); needed where the captions named none")
    parser.add_argument("--preset", choices=PRESETS, help="default: demo for the demo's store, else cc3m")
    parser.add_argument("--name", help="checkpoint goes to out/NAME (default: the store's name)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group = parser.add_argument_group("settings (demo / cc3m / yfcc15m)")
    for name, (*values, what) in SETTINGS.items():
        kind = (lambda text: text.lower() in ("1", "true", "yes")) if isinstance(values[0], bool) else type(values[0])
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=f"{what} ({' / '.join(map(str, values))})")
    args = parser.parse_args()
    try:
        args.embeddings = args.embeddings or newest_store()
        args.preset = args.preset or ("demo" if Path(args.embeddings).resolve().name.startswith("demo") else "cc3m")
        print(f"store: {args.embeddings}, preset: {args.preset}")
        settings = {name: SETTINGS[name][PRESETS.index(args.preset)] if (given := getattr(args, name)) is None else given for name in SETTINGS}
        if settings["loss"] not in ("sigmoid", "infonce"):
            raise flame.InputError(f"--loss: {settings['loss']!r} is neither sigmoid nor infonce")
        train(args, settings)
    except flame.InputError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
