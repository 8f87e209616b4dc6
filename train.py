"""Stage 2: images + embedding store -> checkpoint. A ViT and its projector learn to meet the stored facets of their captions.

    python train.py                                        # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m
    torchrun --nproc_per_node 8 train.py ...               # the same batch, the same result, on a whole node

The LLM is not loaded here: a step reads a batch of pictures and, for each, a few of its 11 stored embeddings as positives.
What a step sees (pictures, crops, patches, positives) is a pure function of the seed and the step. So N ranks equal one
rank with the whole batch, a batch encoded in chunks equals one that fits, and after a crash the same command goes on as if
nothing had been.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flame
from data import command, files
from data.command import number
from data.pictures import Batches, find_pictures, open_picture
from data.show import plots

# Every setting: its value in each preset, what values it may have, what it is. Each can be given as a flag: --image-size 96.
# cc3m is the paper's recipe for CC3M with ViT-B/16 (appendix and released training script). yfcc15m: the released scripts
# give CC3M's values only, so they are taken over and only the epochs are fewer (our choice). demo is ours, chosen on the
# demo's validation split. ViT-L/14 is --patch-size 14 --width 1024 --layers 24 --heads 16.
PRESETS = ("demo", "cc3m", "yfcc15m")
whole, real = functools.partial(number, int), functools.partial(number, float)
BY_SET = "raw=whiten:0.3,short=whiten,long=whiten"
SETTINGS = {
    # name              demo      cc3m     yfcc15m   values              what
    "image_size":      (64,       224,     224,      whole(1, 4096),     "side of the picture, pixels"),
    "patch_size":      (8,        16,      16,       whole(1, 4096),     "side of a patch, pixels"),
    "width":           (192,      768,     768,      whole(1, 1 << 14),  "of the ViT"),
    "layers":          (4,        12,      12,       whole(1, 1024),     "blocks of the ViT"),
    "heads":           (3,        12,      12,       whole(1, 1024),     "attention heads of the ViT"),
    "init":            ("clip", "published", "published", ("clip", "published"),
                        "the ViT's first weights: CLIP's, or PyTorch's own as in the released code"),
    "projector_hidden": (0,       4096,    4096,     whole(0, 1 << 17),  "projector's hidden width; at least the LLM's"),
    "pool_first":      (True,     False,   False,    bool,               "average the patches before projecting, not after"),
    "loss":            ("infonce", "sigmoid", "sigmoid", ("sigmoid", "infonce"), "both with several positives"),
    "text_projection": (BY_SET,   "none",  "none",   str,
                        "none, center, whiten, linear; or raw=center,long=whiten:0.1 (:ridge)"),
    "shrinkage":       (False,    False,   False,    bool,               "whitening for stores of few rows (OAS)"),
    "positives":       (6,        6,       6,        whole(1, 11),       "embeddings an image meets in a step"),
    "columns":         ("",       "",      "",       str,                "only these store columns: raw.0,long.0 ..."),
    "batch":           (256,      3072,    3072,     whole(1, 1 << 24),  "images a step, over all ranks (published: 8 x 384)"),
    "accumulate":      (0,        0,       0,        whole(0, 1 << 24),
                        "chunks a rank encodes its images in; the gradient is the batch's; 0: as memory allows"),
    "epochs":          (78.0,     32.0,    25.0,     real(0, 1e6),       "passes over the images"),
    "steps":           (0,        0,       0,        whole(0, 10**9),    "steps in all; 0: as the epochs say"),
    "lr":              (1e-3,     5e-4,    5e-4,     real(0, 100),       "peak learning rate, AdamW"),
    "beta2":           (0.95,     0.95,    0.95,     real(0, 0.999999),  "AdamW's second beta; the first is 0.9"),
    "weight_decay":    (0.5,      0.5,     0.5,      real(0, 100),       "on matrices and the position table only"),
    "warmup":          (40,       2000,    2000,     whole(0, 10**9),    "steps of warm-up, at most a tenth of all"),
    "clip_grad":       (0.0,      0.0,     0.0,      real(0, 1e9),       "largest norm of the gradient; 0: not clipped"),
    "ema":             (0.0,      0.0,     0.0,      real(0, 0.999999),  "decay of a running average, saved instead; 0: none"),
    "init_scale":      (14.0,     10.0,    10.0,     real(1, 100),       "initial logit scale (not its log)"),
    "crop_scale":      (0.5,      0.9,     0.9,      real(0, 1, True),   "smallest share of the picture in a random crop"),
    "patch_dropout":   (0.5,      0.0,     0.0,      real(0, 1),         "share of a picture's patches a step leaves out"),
    "gradient_checkpointing": (False, False, False,  bool,               "less memory for a third more work"),
    "compile":         (False,    False,   False,    bool,               "torch.compile the ViT"),
    "holdout":         (0,        0,       0,        whole(0, 10**9),    "images held out for the curve of Recall@1"),
    "eval_every":      (100,      1000,    1000,     whole(0, 10**9),    "steps between that curve's points; 0: none"),
    "checkpoint_every": (200,     1000,    1000,     whole(0, 10**9),    "steps between two checkpoints; 0: only at the end"),
    "shuffle":         (50_000,   50_000,  50_000,   whole(0, 10**9),    "tars: size of the shuffle buffer, pictures"),
    "cache":           (1.0,      0.0,     0.0,      real(0, 1e6),       "GiB of decoded pictures a loader process keeps"),
    "workers":         (1,        8,       8,        whole(0, 1024),     "processes a rank loads images with"),
    "seed":            (0,        0,       0,        whole(0, 2**63 - 1), "of weights, order, crops and positives"),
}
# An interrupted run may go on with others of these: they change no gradient (accumulate: but for its last bits).
FREE = ("accumulate", "gradient_checkpointing", "eval_every", "checkpoint_every", "cache", "workers")
RIDGE = 0.01      # whitening: a fraction of the largest deviation, added to all, so that noise is not blown up
RANK = 1024       # whitening: directions treated one by one, the rest alike; eleven full maps at D = 5120 would be 1.15 GB
MAX_ROWS = 100_000  # rows that a text projection is fitted to; more would add nothing but hours
MAX_LOGIT_SCALE = math.log(100)
PEAK = {"H100": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, dense, SXM (Nvidia's data sheets)
CHECKPOINT = ("training.pt", "training-previous.pt", "model.safetensors", "config.json")
ANEW = "choose another --name, or start anew with --overwrite"
STOP = []  # not empty once SIGTERM has come: save and leave


class Run(NamedTuple):
    """What all steps of a run share."""
    s: dict                  # the settings, those that the data fix filled in
    out: Path                # the checkpoint's folder
    store: flame.Store
    columns: list            # of the store, indices: those that are trained on
    pictures: tuple          # to train on: rows of the store [n], files, places [n, 3] (data/pictures.py)
    held_out: tuple          # for the curve of Recall@1: the same
    model: flame.Flame
    average: flame.Flame     # what is saved: the running average of the weights, or the model itself
    encode: torch.nn.Module  # the model itself, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world: int               # number of ranks


# ---------------------------------------------------------------------------------------------------------------------
# Texts: the closed-form text projection

def fit_text_projection(store, spec, ridge=RIDGE, rank=RANK, max_rows=MAX_ROWS, shrinkage=False, device="cpu"):
    """The closed-form text projection, computed from the store in one pass; -> flame.TextProjection.

    An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9. A fixed
    linear map that evens this out lets the image tower learn several times faster at no cost.

    Per column: u = x / |x|, mean mu of u; "center" maps u to u - mu, "whiten" to W (u - mu), see `whitening`. In float64 on
    `device`, a D x D matrix at a time: 210 MB at D = 5120. max_rows = 0 fits nothing and gives the right shapes.
    """
    kinds = parse_projection(spec, ridge)
    used = {kind for kind, _ in kinds.values()}
    D = store.meta["D"]
    rank = min(rank, D) if "whiten" in used else 0
    projection = flame.TextProjection(D, rank, "linear" in used)
    rows = np.arange(len(store))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False))
    for at, name in enumerate(store.meta["columns"] if max_rows else []):
        kind, ridge = kinds[name.split(".")[0]]
        if kind in ("none", "linear"):
            continue
        c = flame.COLUMNS.index(name)
        mean, covariance = moments(store, rows, at, device)
        projection.mean[c] = mean
        if kind == "whiten":
            rest, basis, gain = whitening(covariance, ridge, rank, len(rows) if shrinkage else None)
            projection.rest[c] = rest
            projection.basis[c] = basis
            projection.gain[c] = gain
    return projection


def moments(store, rows, column, device):
    """-> mean [D] and covariance [D, D] of a store column's unit vectors, float64."""
    D = store.meta["D"]
    total = torch.zeros(D, dtype=torch.float64, device=device)
    products = torch.zeros(D, D, dtype=torch.float64, device=device)
    for start in range(0, len(rows), 4096):
        u = store.read(rows[start:start + 4096], [column])[:, 0].to(device, torch.float64)
        total += u.sum(0)
        products.addmm_(u.T, u)
    mean = total / len(rows)
    return mean, products / len(rows) - torch.outer(mean, mean)


def whitening(covariance, ridge, rank, shrink_n=None):
    """W = V diag(1 / (s + ridge s_1)) V^T of the deviations s (s_1 the largest) and directions V of a covariance [D, D].

    -> rest, basis [D, rank], gain [rank] of flame.TextProjection: beyond `rank` directions all are scaled alike.
    shrink_n: of so many rows. Where they are not many times D the small s come out too small; OAS (Chen et al. 2010) mixes
    in as much of the identity as is best for Gaussian data.
    """
    D = len(covariance)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances = variances.clamp_min(0)
    if shrink_n:
        trace, squares = variances.sum(), (variances ** 2).sum()
        share = (squares + trace ** 2) / ((shrink_n + 1) * (squares - trace ** 2 / D))
        variances = torch.lerp(variances, trace.expand(D) / D, share.clamp(max=1))
    s = variances.sqrt().flip(0)
    wanted = 1 / (s + ridge * s[0])
    wanted = wanted / wanted[-1]  # only directions matter, the result is normalised; keeps numbers near 1
    rest = wanted[rank].float() if rank < D else torch.zeros(())
    return rest, vectors.flip(1)[:, :rank], wanted[:rank] - rest.double()


def parse_projection(spec, ridge=RIDGE):
    """"whiten", or one a prompt set with a ridge of its own, "raw=whiten:0.1,long=whiten" -> {set: (kind, ridge)}."""
    kinds = dict.fromkeys(flame.PROMPTS, ("none", ridge))
    try:
        for part in spec.split(",") if "=" in spec else [f"{name}={spec}" for name in flame.PROMPTS]:
            name, _, kind = part.partition("=")
            kind, _, own = kind.partition(":")
            if name not in kinds or kind not in ("none", "center", "whiten", "linear"):
                raise ValueError
            kinds[name] = kind, real(0, 100, above=True)(own) if own else ridge
    except (ValueError, argparse.ArgumentTypeError):
        raise flame.InputError(f"--text-projection: {spec!r}; give none, center, whiten or linear, or one a prompt set "
                               "with a ridge above 0: raw=whiten:0.1,short=whiten,long=whiten") from None
    used = {kind for kind, _ in kinds.values()}
    if "linear" in used and len(used) > 1:
        raise flame.InputError(f"--text-projection: {spec!r}; linear is one matrix shared by all columns and does not mix")
    return kinds


# ---------------------------------------------------------------------------------------------------------------------
# Losses: images [B, D] and their texts [B, P, D], all unit vectors; every text of another image is a negative. First the
# definitions. Training takes the same block by block (BlockwiseLoss), so that the B x BP logits never exist at once.

def sigmoid_loss(image, text, scale, bias):
    """-sum log sigmoid(+-(scale <image, text> + bias)) / number of texts (paper, section 3.4; SigLIP with P positives)."""
    B, P, D = text.shape
    logits = scale * image @ text.reshape(B * P, D).T + bias  # [B, B P]
    sign = torch.full((B, B), -1.0, device=image.device).fill_diagonal_(1.0).repeat_interleave(P, dim=1)
    return -F.logsigmoid(sign * logits).sum() / (B * P)


def infonce_loss(image, text, scale, bias=None):
    """Half: mean over images of (mean over its positives of -log softmax over all texts).
    Half: mean over texts of -log softmax over all images."""
    B, P, D = text.shape
    logits = (scale * image @ text.reshape(B * P, D).T).view(B, B, P)
    own = logits.diagonal(dim1=0, dim2=1).T  # [B, P]
    of_image = logits.flatten(1).logsumexp(1)[:, None] - own
    of_text = logits.logsumexp(0) - own
    return 0.5 * (of_image.mean() + of_text.mean())


# Both are  sum over all pairs of f(logit) - sum over own pairs of logit, / (B P): the sigmoid since -log sigmoid(x) =
# softplus(x) - x and -log sigmoid(-x) = softplus(x). So a loss is a function of a block of logits [b, n]: -> its sum of f,
# and f' [b, n], both / (B P). rows [b, 1] and columns [n]: log-sum-exp of an image's logits over all texts, of a text's over
# all images. The block may be overwritten.

def sigmoid_block(logits, rows, columns, B, P):
    share = 1 / (B * P)
    value = share * F.softplus(logits).sum()
    return value, logits.sigmoid_().mul_(share)


def infonce_block(logits, rows, columns, B, P):
    value = 0.5 / (B * P) * (logits.shape[1] / B * rows.sum() + len(logits) / B * columns.sum())
    of_image = (logits - (rows + math.log(2 * B))).exp_()  # softmax / 2B
    of_text = logits.sub_(columns + math.log(2 * B * P)).exp_()
    return value, of_image.add_(of_text)


LOSSES = {"sigmoid": sigmoid_block, "infonce": infonce_block}
SOFTMAX = ("infonce",)  # losses that want rows and columns; in them a bias cancels


class BlockwiseLoss(torch.autograd.Function):
    """A loss and its gradients, computed along with it in a sweep over blocks of texts.

    image [b, D]: this rank's. text [B, P, D]: all ranks'; from index `first` on they are this rank's images' own. The mean of
    the results over ranks is the whole batch's loss, the mean of the gradients its gradient.
    """

    @staticmethod
    def forward(ctx, image, text, scale, bias, kind, first=0, elements=None):
        b, (B, P, D) = len(image), text.shape
        flat = text.reshape(B * P, D)
        own = text[first:first + b]
        scaled = image * scale
        share = 1 / (B * P)
        # texts a block: on CPU it stays in cache
        size = max(64, (elements or (1 << 24 if image.is_cuda else 1 << 20)) // max(1, b))
        blocks = [slice(at, at + size) for at in range(0, B * P, size)]
        rows, columns = log_sums(scaled, flat, blocks) if kind in SOFTMAX else (None, None)
        loss = -share * torch.einsum("bd,bpd->", scaled, own)
        to_image = -share * own.sum(1)  # sums over texts of d loss / d logit times the text: [b, D]
        to_text = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        to_bias = image.new_zeros(())
        if kind not in SOFTMAX:
            loss = loss - share * b * P * bias
            to_bias = to_bias - share * b * P
        for at in blocks:
            logits = scaled @ flat[at].T
            if kind not in SOFTMAX:
                logits.add_(bias)
            value, slope = LOSSES[kind](logits, rows, None if columns is None else columns[at], B, P)
            loss = loss + value
            if kind not in SOFTMAX:
                to_bias += slope.sum()
            to_image.addmm_(slope, flat[at])
            if to_text is not None:
                to_text[at] = slope.T @ scaled
        if to_text is not None:
            to_text = to_text.view(B, P, D)
            to_text[first:first + b] -= share * scaled[:, None]
        world = dist.get_world_size() if dist.is_initialized() else 1
        ctx.world = world
        ctx.save_for_backward(to_image * scale, to_text, (image * to_image).sum(), to_bias)
        return world * loss

    @staticmethod
    def backward(ctx, grad):
        grad = ctx.world * grad
        return *(None if g is None else grad * g for g in ctx.saved_tensors), None, None, None


def log_sums(scaled, flat, blocks):
    """log-sum-exp of the logits scaled [b, D] x flat [N, D]: of each image's over all texts [b, 1], of each text's over the
    images of all ranks [N]."""
    rows = scaled.new_full((len(scaled), 1), -math.inf)
    columns = scaled.new_empty(len(flat))
    for at in blocks:
        logits = scaled @ flat[at].T
        rows = torch.logaddexp(rows, logits.logsumexp(1, keepdim=True))
        columns[at] = logits.logsumexp(0)
    if dist.is_initialized():
        highest = columns.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        columns = (columns - highest).exp_()
        dist.all_reduce(columns)
        columns = columns.log_() + highest
    return rows, columns


# ---------------------------------------------------------------------------------------------------------------------
# The run

def train(args, s):
    """Everything is looked at before anything is built, and nothing of an earlier run is touched before the first step."""
    rank, world, device = start_ranks(args.device)
    store = flame.open_store(args.embeddings)
    columns = chosen_columns(store, s["columns"])
    out = Path("out") / (args.name or store.path.resolve().name)
    with run_folder(out) if rank == 0 else contextlib.nullcontext():
        pictures, held_out = split_pictures(store, args.images, out, s, rank, world)
        settle(s, store, columns, len(pictures[0]), world)
        earlier = None if args.overwrite else earlier_run(out, s, store)
        if earlier and earlier["step"] == s["steps"] and (out / "model.safetensors").exists():
            if rank == 0:
                print(f"{out}: finished already, nothing to do; --overwrite trains anew")
        else:
            with memory_errors(s, world, device):
                run, start = build(store, columns, pictures, held_out, out, s, earlier, rank, world, device)
                if rank == 0:
                    going_on = f", going on from step {start}" * bool(earlier)
                    ranks = f", {world} ranks" * (world > 1)
                    print(f"{s['images']} images x {len(columns)} embeddings -> {out}{ranks}{going_on}")
                    print("  ".join(f"{name}={value}" for name, value in s.items()))
                    if not importlib.util.find_spec("matplotlib"):
                        print("curve.png is not drawn: pip install matplotlib", file=sys.stderr)
                take_steps(run, start, args.tensorboard)
    if world > 1:
        dist.destroy_process_group()


def start_ranks(name):
    """-> (rank, number of ranks, device of this rank), from torchrun's environment variables."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = command.usable_device(f"cuda:{local}" if name == "cuda" and world > 1 else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:  # rank 0 alone indexes tars and fits the text projection, for minutes
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world, device


def chosen_columns(store, names):
    """Indices of the store's columns to train on."""
    have = store.meta["columns"]
    names = [name.strip() for name in names.split(",")] if names else have
    if wrong := [name for name in names if name not in have or names.count(name) > 1]:
        raise flame.InputError(f"--columns: {wrong[0]!r} is not in {store.path}, or twice; it has {','.join(have)}")
    return [have.index(name) for name in names]


@contextlib.contextmanager
def run_folder(out):
    """Makes the folder (found out now that it cannot be, not after the last step); a run that ends without a single step
    takes away again what it made."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        with files.disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        yield
    finally:
        if made and not any((out / name).exists() for name in ("log.jsonl", "nan-batch.txt")):
            shutil.rmtree(made[-1], ignore_errors=True)


def split_pictures(store, folder, out, s, rank, world):
    """-> the pictures to train on and those held out for the curve, each (rows of the store [n], files, places [n, 3])."""
    if rank > 0:
        dist.barrier()  # rank 0 writes the index of the tars, the others read it
    rows, paths, places = find_pictures(store, folder, out / "tars.npz")
    if rank == 0 and world > 1:
        dist.barrier()
    if 2 * s["holdout"] > len(rows):
        raise flame.InputError(f"--holdout {s['holdout']}: there are {len(rows)} images; hold out half of them at most")
    held = np.zeros(len(rows), bool)
    held[np.random.default_rng([s["seed"], 3]).permutation(len(rows))[:s["holdout"]]] = True
    return (rows[~held], paths, places[~held]), (rows[held], paths, places[held])


def settle(s, store, columns, n, world):
    """Fills in the settings that depend on the data: n images to train on, and how many ranks there are."""
    s["images"] = n  # so that a run does not go on with others
    if world > n:
        raise flame.InputError(f"torchrun: {world} ranks, but only {n} images to train on; start fewer")
    s["batch"] = s["batch"] if s["batch"] <= n else n // world * world
    if s["batch"] % world:
        raise flame.InputError(f"--batch: {s['batch']} images do not divide evenly among {world} ranks; give a multiple")
    s["positives"] = min(s["positives"], len(columns))
    s["projector_hidden"] = max(s["projector_hidden"], store.meta["D"])
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (n // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["workers"] = min(s["workers"], (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def build(store, columns, pictures, held_out, out, s, earlier, rank, world, device):
    """-> (Run, the step it begins with): model and optimizer as they are at first, or as the earlier run left them."""
    torch.manual_seed(s["seed"])
    max_rows = 0 if rank or earlier else MAX_ROWS
    projection = fit_text_projection(store, s["text_projection"], max_rows=max_rows, shrinkage=s["shrinkage"], device=device)
    sizes = ("image_size", "patch_size", "width", "layers", "heads", "init", "projector_hidden", "pool_first")
    model = flame.Flame({name: s[name] for name in sizes} | {
        "text_dim": store.meta["D"], "text_rank": projection.basis.shape[-1], "text_linear": projection.weight is not None,
        "init_logit_scale": math.log(s["init_scale"]), "columns": [store.meta["columns"][c] for c in columns]})
    model.text = projection
    model.visual.gradient_checkpointing = s["gradient_checkpointing"]
    model.to(device)
    if not s["accumulate"]:
        s["accumulate"] = earlier["training"]["accumulate"] if earlier else chunks_that_fit(model, s, world, device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # vectors, norms, biases, scale
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": s["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
                                  lr=s["lr"], betas=(0.9, s["beta2"]), eps=1e-8, fused=True)
    average = copy.deepcopy(model) if s["ema"] else model
    start = restore(out, model, average, optimizer, s["steps"]) if earlier else 0
    if s["compile"]:
        model.visual.compile()
    encode = model
    if world > 1:  # all ranks begin with rank 0's weights and text projection; the projection never changes
        encode = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        encode.broadcast_buffers = False
    return Run(s, out, store, columns, pictures, held_out, model, average, encode, optimizer, device, rank, world), start


def take_steps(run, start, tensorboard=False):
    """The loop: a batch, a step, a line in the log, now and then a checkpoint."""
    s, out = run.s, run.out
    lines = earlier_log(out, start)
    board = open_board(out) if tensorboard and run.rank == 0 else None
    batches = Batches(run.store, run.columns, run.pictures, s, s["steps"], run.rank, run.world)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"], worker_init_fn=outlive_sigterm,
        prefetch_factor=2 if s["workers"] else None, pin_memory=run.device.type == "cuda")
    done, waited = start, 0.0
    begun = clock = time.time()
    bar = tqdm(total=s["steps"], initial=start, desc="training", unit=" steps", smoothing=0.05, disable=run.rank > 0)
    with bar:
        for step, (batch, failed) in enumerate(loader, start):
            waited += time.time() - clock
            loss, stop = take_step(run, step, batch, failed, batches)
            if step == start:
                begin_folder(run, start, lines)
            note_skipped(out, failed)
            done = step + 1
            if run.rank == 0:
                spent = time.time() - begun
                log_step(run, step, loss, (done - start) * s["batch"] / spent, waited / spent, bar, board)
                if stop or done == s["steps"] or every(s["checkpoint_every"], done):
                    save(run, done)
            if stop:
                break
            clock = time.time()
    if run.rank == 0:
        if start == s["steps"]:  # the earlier run ended between the parts of its last checkpoint
            save(run, start)
        tell_skipped(out)
        print(f"{out}: {done} steps, {bar.postfix or 'nothing to do'}" + "; stopped, the same command goes on from here" * (done < s["steps"]))


def take_step(run, step, batch, failed, batches):
    """One step of AdamW, on every rank alike; -> (mean loss over ranks, whether any rank was told to stop)."""
    s = run.s
    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_backward(run.model, run.encode, batch, s, run.device)
    if loss is None:
        raise no_picture(run, step, *failed[0])
    status = torch.stack([loss, torch.tensor(float(len(STOP)), device=run.device)])
    if run.world > 1:
        dist.all_reduce(status)
    loss, stop = (status / run.world).tolist()
    if not math.isfinite(loss):  # before it can reach the weights
        keys = [run.store.keys[row] for row in run.pictures[0][batches.pictures(step)]]
        files.write_text(run.out / "nan-batch.txt", "".join(f"{key}\n" for key in keys))
        raise flame.InputError(
            f"{run.out}: the loss is {loss} at step {step}, batch {', '.join(keys[:3])}, ... (all {len(keys)} keys: "
            f"{run.out}/nan-batch.txt); the last checkpoint is kept; lower --lr, and check the store with a fresh embed.py run")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, s)
    if s["clip_grad"]:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), s["clip_grad"])
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if s["ema"]:
            share = 1 - min(s["ema"], (1 + step) / (10 + step))  # short at first: the first weights are forgotten
            for slow, fast in zip(run.average.parameters(), run.model.parameters()):
                slow.lerp_(fast, share)
    return loss, stop > 0


def forward_backward(model, encode, batch, s, device):
    """Adds one step's gradients to the parameters'; -> this rank's loss, or None where no rank could read a picture.

    encode: the model itself, or DistributedDataParallel around it, which averages the gradients of all ranks.
    """
    pixels, facets, columns, readable, kept = batch
    everyone = gather(readable.to(device, torch.uint8)).bool()
    if not everyone.any():
        return None
    # Texts are constants: they travel as they are, in half precision, and each rank applies the text projection itself.
    facets = gather(facets.to(device, non_blocking=True))
    columns = gather(columns.to(device, non_blocking=True))
    text = model.text(facets[everyone], columns[everyone])  # [B, P, D], B: the readable ones of all ranks
    rank = dist.get_rank() if dist.is_initialized() else 0
    first = everyone[:rank * len(pixels)].sum().item()
    readable = readable.to(device)
    parts = np.array_split(np.arange(len(pixels)), min(s["accumulate"], len(pixels)))
    chunks = [slice(part[0], part[-1] + 1) for part in parts]

    def encoded(chunk):
        patches = None if kept is None else kept[chunk].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=flame.default_dtype(device) == torch.bfloat16):
            return encode(flame.to_pixels(pixels[chunk].to(device, non_blocking=True)), patches)

    def loss_of(image):
        return BlockwiseLoss.apply(image[readable], text, model.logit_scale.exp(), model.logit_bias, s["loss"], first)

    if len(chunks) == 1:
        loss = loss_of(encoded(chunks[0]))
        loss.backward()
        return loss.detach()
    # The batch does not fit, its features do: encode it without a graph, take the loss's gradient with respect to the features,
    # then encode each chunk again and hand it its share. Nothing in a step is random, so the gradient is the whole batch's.
    with torch.no_grad():
        image = torch.cat([encoded(chunk) for chunk in chunks])
    loss = loss_of(image.requires_grad_())
    to_image, = torch.autograd.grad(loss, image, retain_graph=True)
    for chunk in chunks[:-1]:
        with contextlib.nullcontext() if encode is model else encode.no_sync():
            encoded(chunk).backward(to_image[chunk])
    # the loss's own parameters come along with the last
    torch.autograd.backward([encoded(chunks[-1]), loss], [to_image[chunks[-1]], None])
    return loss.detach()


def gather(x):
    """[b, ...] of this rank -> [ranks * b, ...], all ranks' in their order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def learning_rate(step, s):
    """Linear warm-up, then a cosine to 0."""
    if step < s["warmup"]:
        return s["lr"] * (step + 1) / s["warmup"]
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * (step - s["warmup"]) / max(1, s["steps"] - s["warmup"])))


def every(n, done):
    """Whether something due every n steps (0: never) is due after `done` steps."""
    return n > 0 and done % n == 0


def outlive_sigterm(worker):
    """Clusters and torchrun send SIGTERM to a whole process group: the rank saves and leaves, and its loaders leave with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def no_picture(run, step, key, why):
    """The error of a batch without a readable picture: where the first was looked for, and where the captions said it is."""
    rows, paths, places = run.pictures
    row = run.store.keys.index(key)
    path = paths[places[np.flatnonzero(rows == row)[0], 0]]
    named = f", {run.store.meta['captions']['path']} names it {run.store.images[row]}" * bool(run.store.images[row])
    return flame.InputError(f"{path}: no picture of step {step}'s batch could be read, first of all this one ({key}, {why}"
                            f"{named}); give the right --images DIR")


# ---------------------------------------------------------------------------------------------------------------------
# Memory: how much a step takes, and what to do where it is too much

def bytes_per_image(config, device, patch_dropout=0.0, gradient_checkpointing=False):
    """What the forward pass of one picture keeps for the backward pass."""
    width, cuda = config["width"], device.type == "cuda"
    size = torch.finfo(flame.default_dtype(device)).bits // 8  # of what matrix products take and give
    tokens = 1 + kept_patches(config, patch_dropout)
    # A block, a token: the two norms' inputs (float32 on CUDA) and outputs; q, k, v; what attention mixes, and on CUDA its copy,
    # on CPU the attention matrix, which a fused kernel does not keep; the MLP's two inner states of 4 widths.
    block = tokens * width * (8 + 15 * size) if cuda else tokens * size * (16 * width + config["heads"] * tokens)
    blocks = block + 4 * config["layers"] * tokens * width if gradient_checkpointing else config["layers"] * block
    projector = size * (width + 2 * config["projector_hidden"]) + (4 if cuda else size) * config["text_dim"]
    return blocks + (1 if config["pool_first"] else tokens - 1) * projector


def kept_patches(config, patch_dropout):
    return max(1, round((config["image_size"] // config["patch_size"]) ** 2 * (1 - patch_dropout)))


def chunks_that_fit(model, s, world, device):
    """In how many chunks a rank has to encode its images so that a step fits the device's memory.

    By the memory that there is, not what is free just now: the same command takes the same steps, to the last bit.
    """
    if device.type == "cuda":
        room = 0.8 * torch.cuda.get_device_properties(device).total_memory
    else:
        room = 0.5 * main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room -= 22 * sum(p.numel() for p in model.parameters())  # weights, gradients, AdamW's moments, the average, a copy in half
    room -= 16 * s["batch"] * s["positives"] * model.config["text_dim"]  # the texts of all ranks on their way
    images = s["batch"] // world
    kept = images * bytes_per_image(model.config, device, s["patch_dropout"], s["gradient_checkpointing"])
    return min(images, math.ceil(1.4 * kept / max(room, 1)))  # 1.4: what comes and goes in between


def main_memory():
    """Bytes: the machine's, or the control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@contextlib.contextmanager
def memory_errors(s, world, device):
    """Out of memory becomes one line that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        images, chunks = s["batch"] // world, max(1, s["accumulate"])
        if chunks < images:
            cure = f"give --accumulate {min(2 * chunks, images)}: the same gradient in smaller chunks"
        elif not s["gradient_checkpointing"]:
            cure = "give --gradient-checkpointing: the same gradient for a third more work"
        else:
            cure = f"give a --batch below {s['batch']}, or a smaller model"
        raise flame.InputError(f"out of memory on {device} at --batch {s['batch']} --accumulate {chunks}; {cure}") from None


def flops_per_image(config, patch_dropout=0.0):
    """Of one forward pass: the matrix products of ViT and projector, 2 per multiplication. The backward pass takes twice as many."""
    width = config["width"]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    kept = kept_patches(config, patch_dropout)
    stem = 2 * patches * 3 * config["patch_size"] ** 2 * width
    blocks = config["layers"] * (1 + kept) * (24 * width ** 2 + 4 * (1 + kept) * width)
    projected = 1 if config["pool_first"] else kept
    return stem + blocks + projected * 2 * config["projector_hidden"] * (width + config["text_dim"])


# ---------------------------------------------------------------------------------------------------------------------
# What is told: the bar, log.jsonl, the curve, skipped.txt

def log_step(run, step, loss, rate, waited, bar, board):
    """A line in log.jsonl and on the bar; where it is due, Recall@1 of the held-out pictures and the curve."""
    s, last = run.s, step + 1 == run.s["steps"]
    scale, bias = run.model.logit_scale.exp().item(), run.model.logit_bias.item()
    entry = {"step": step, "loss": round(loss, 5), "scale": round(scale, 3), "bias": round(bias, 3),
             "lr": learning_rate(step, s), "images_per_s": round(rate, 1), "waited": round(waited, 4)}
    seen = len(run.held_out[0]) and s["eval_every"] and (last or every(s["eval_every"], step + 1))
    if seen:
        recall, failed = held_out_recall(run.average, run.store, run.columns, *run.held_out, run.device)
        note_skipped(run.out, failed)
        if recall is not None:
            entry["held_out_R@1"] = round(recall, 2)
        said = "none can be read" if recall is None else f"Recall@1 {recall:.1f}%"
        bar.write(f"step {step}, {len(run.held_out[0])} held-out pictures: {said}")
    files.append(run.out / "log.jsonl", json.dumps(entry) + "\n")
    if (seen or last) and importlib.util.find_spec("matplotlib"):
        plots.draw_curve(run.out)
    if board:
        for name, value in entry.items():
            board.add_scalar(name, value, step)
    bias = f", bias {bias:.1f}" * (s["loss"] not in SOFTMAX)
    bar.set_postfix_str(f"loss {loss:.3f}, scale {scale:.1f}{bias}, {rate:.0f} images/s, {waited:.1%} waiting for data{mfu(run, rate)}", False)
    bar.update()


def mfu(run, rate):
    """The share of a known GPU's peak that the model's matrix products take; "" on others."""
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
    peak = sum(flops for gpu, flops in PEAK.items() if gpu in name)
    share = rate * 3 * flops_per_image(run.model.config, run.s["patch_dropout"]) / (peak * run.world) if peak else 0
    return f", MFU {share:.1%}" * bool(peak)


@torch.no_grad()
def held_out_recall(model, store, columns, rows, paths, places, device):
    """-> Text-to-image Recall@1 among the held-out pictures, percent, or None where none can be read; [(key, why it cannot)].

    By the long facets where they are trained on. Ties count as misses.
    """
    names = store.meta["columns"]
    columns = [c for c in columns if names[c].startswith("long")] or columns
    images, read, failed = [], [], []
    for row, place in zip(rows.tolist(), places):
        try:
            images.append(model.preprocess(open_picture(paths, place)))
            read.append(row)
        except Exception as e:  # decoders raise nearly anything on a stranger's bytes
            failed.append((store.keys[row], type(e).__name__))
    if not read:
        return None, failed
    image = torch.cat([model.encode_image(torch.stack(images[at:at + 64]).to(device)) for at in range(0, len(images), 64)])
    text = model.text(store.read(read, columns).to(device), [flame.COLUMNS.index(names[c]) for c in columns])
    score = flame.similarity(image, text)
    right = (score >= score.diagonal()[:, None]).sum(1) == 1
    return 100 * right.float().mean().item(), failed


def note_skipped(out, failed):
    """skipped.txt: a line for each picture that could not be read, once, whichever rank and epoch met it."""
    if not failed:
        return
    path = out / "skipped.txt"
    known = {line.split("\t")[0] for line in path.read_text().splitlines()} if path.is_file() else ()
    files.append(path, "".join(f"{key}\t{why}\n" for key, why in failed if key not in known))


def tell_skipped(out):
    if not (out / "skipped.txt").is_file():
        return
    skipped = (out / "skipped.txt").read_text().splitlines()
    some = ", ".join(line.replace("\t", " (") + ")" for line in skipped[:5]) + ", ..." * (len(skipped) > 5)
    print(f"skipped {len(skipped)} unreadable picture{'s' * (len(skipped) > 1)}, listed in {out}/skipped.txt: {some}", file=sys.stderr)


def open_board(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise flame.InputError("--tensorboard: that package is not installed; pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))


# ---------------------------------------------------------------------------------------------------------------------
# Files: the checkpoint, and going on from one

def identity(store):
    """A store's content in a word: everything that fixes its bytes, and not where it or its captions lie."""
    meta = {key: value for key, value in store.meta.items() if key != "versions"}
    meta["captions"] = store.meta["captions"]["sha256"]
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def save(run, step):
    """training.pt (what was there becomes training-previous.pt), model.safetensors, and config.json last: it says that the
    others are there. Each is whole or not there at all, whenever the run is killed or the disk is full."""
    from safetensors.torch import save_file
    out, s, store = run.out, run.s, run.store
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise flame.InputError(f"{out}: weights are NaN or infinite after step {step - 1}; the last checkpoint is kept; lower --lr")
    training = {"step": step, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
                "average": run.average.state_dict() if s["ema"] else None}
    record = {"model": run.model.config, "llm": store.meta["llm"], "training": s, "step": step, "store": {
        "path": str(store.path), "identity": identity(store), "N": len(store), "columns": store.meta["columns"]}}

    def write_training(temporary):
        torch.save(training, temporary)
        if (out / "training.pt").exists():
            os.replace(out / "training.pt", out / "training-previous.pt")

    files.write(out / "training.pt", write_training)
    files.write(out / "model.safetensors", functools.partial(save_file, run.average.state_dict()))
    files.write_text(out / "config.json", json.dumps(record, indent=1))


def earlier_run(out, s, store):
    """-> config.json of the run in this folder, or None where there was none. InputError where it was another run."""
    path = out / "config.json"
    if not path.exists():
        return None
    old = flame.read_json(path, {"model": dict, "training": dict, "store": dict, "step": int}, ANEW)
    flame.check_keys(path, old["training"], {"accumulate": int}, ANEW)
    width, D = old["model"].get("text_dim"), store.meta["D"]
    if width != D:
        raise flame.InputError(f"{out}: holds a checkpoint for vectors of width {width}, those of {store.path} have {D}; {ANEW}")
    if old["store"].get("identity") != identity(store):
        raise flame.InputError(f"{out}: holds a checkpoint trained on another store than {store.path}; {ANEW}")
    was = old["training"]
    if differs := [name for name, value in s.items() if name not in FREE and was.get(name) != value]:
        name = differs[0]
        raise flame.InputError(f"{out}: holds a checkpoint trained with {name} {was.get(name)}, now it is {s[name]}; {ANEW}")
    return old


def restore(out, model, average, optimizer, steps):
    """Loads training.pt, or where that is damaged training-previous.pt; -> the step to go on from."""
    reasons = []
    for name in ("training.pt", "training-previous.pt"):
        try:
            if not (out / name).is_file():
                raise ValueError("no such file")
            saved = torch.load(out / name, map_location="cpu", weights_only=True)
            step = dict(saved)["step"]
            if not isinstance(step, int) or not 1 <= step <= steps:
                raise ValueError(f"step {step}")
            model.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"] or saved["model"])
            restore_moments(optimizer, saved["optimizer"]["state"])
        except Exception as e:  # a damaged file can raise nearly anything
            reasons.append(f"{out / name}: cannot be gone on from ({type(e).__name__}: {' '.join(str(e).split())[:100]})")
            continue
        if reasons:
            print(f"{reasons[0]}; {name} serves", file=sys.stderr)
        return step
    raise flame.InputError(f"{'; '.join(reasons)}; {ANEW}")


def restore_moments(optimizer, state):
    """AdamW's moments, {index of a parameter: {step, exp_avg, exp_avg_sq}}. What the settings say stays."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        float(state[i]["step"])
        if not state[i]["exp_avg"].shape == state[i]["exp_avg_sq"].shape == p.shape:
            raise ValueError(f"moments of parameter {i}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`."""
    path, lines, last = out / "log.jsonl", [], -1
    found = path.read_text(errors="replace").splitlines(keepends=True) if start and path.is_file() else []
    for number, line in enumerate(found, 1):
        if last + 1 == start:  # what follows may be cut short
            break
        try:
            entry = json.loads(line)
            step = entry["step"]
            right = isinstance(step, int) and step > last and isinstance(entry["loss"], float)
        except (ValueError, TypeError, LookupError):
            right = False
        if not right:
            raise flame.InputError(f"{path}:{number}: not the entry of a step; delete the file, which only the curve needs")
        if step >= start:
            break
        lines.append(line)
        last = step
    return lines


def begin_folder(run, start, lines):
    """After the first step: log.jsonl cut back to `lines`, and what this run does not go on from thrown away."""
    if run.rank == 0:
        out = run.out
        stale = [*out.glob(".training.*.pt"), *out.glob(".model.*.safetensors")]  # of a writer that was killed
        if not start:
            stale += [out / name for name in (*CHECKPOINT, "skipped.txt")]
        with files.disk_errors(out):
            for path in stale:
                path.unlink(missing_ok=True)
        files.write_text(out / "log.jsonl", "".join(lines))
    if run.world > 1:
        dist.barrier()  # before another rank notes what it skips


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def read_arguments(argv):
    """-> (arguments, settings), all of them checked before anything is read or made."""
    parser = command.Parser(
        description="Stage 2: images + embedding store -> checkpoint",
        usage="train.py [--embeddings DIR] [--images DIR] [--preset demo|cc3m|yfcc15m] [--name NAME] [--SETTING VALUE ...]")
    parser.add_argument("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    parser.add_argument("--images", metavar="DIR", help="root of the pictures or of tars (default: where the captions file lies); "
                                                        "needed where the captions named none")
    parser.add_argument("--preset", choices=PRESETS, help="default: demo for the demo's store, else cc3m")
    parser.add_argument("--name", help="checkpoint goes to out/NAME (default: the store's name)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="throw away what is at out/NAME and start anew")
    parser.add_argument("--tensorboard", action="store_true", help="also log to out/NAME/tensorboard")
    group = parser.add_argument_group("settings (demo / cc3m / yfcc15m)")
    for name, (*values, kind, what) in SETTINGS.items():
        how = {"metavar": "X", "type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        group.add_argument("--" + name.replace("_", "-"), help=f"{what} ({' / '.join(map(str, values))})", **how)
    args = parser.parse_args(argv)
    stores = sorted(Path("data/embeddings").glob("*/meta.json"), key=os.path.getmtime)
    if not args.embeddings and not stores:
        raise flame.InputError("data/embeddings: no finished store; make one with embed.py, or give --embeddings DIR")
    args.embeddings = args.embeddings or stores[-1].parent
    args.preset = args.preset or ("demo" if Path(args.embeddings).resolve().name.startswith("demo") else "cc3m")
    s = {}
    for name, row in SETTINGS.items():
        given = getattr(args, name)
        s[name] = row[PRESETS.index(args.preset)] if given is None else given
    for one, other in (("heads", "width"), ("patch_size", "image_size")):
        if s[other] % s[one]:
            raise flame.InputError(f"--{one.replace('_', '-')} {s[one]} does not divide --{other.replace('_', '-')} {s[other]}")
    parse_projection(s["text_projection"])
    return args, s


def main(argv=None):
    def body():
        args, s = read_arguments(argv)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"store: {args.embeddings}, preset: {args.preset}")
        flame.keep_freed_memory()
        train(args, s)
    return command.run("train.py", body, "the same command goes on from the last checkpoint")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))
    sys.exit(main())
