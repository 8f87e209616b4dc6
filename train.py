"""Stage 2: images + embedding store -> checkpoint. A ViT and its projector learn to meet captions' facets.

    python train.py                              # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m
    python train.py ... --epochs 64              # a finished run is trained longer
    torchrun --nproc_per_node 8 train.py ...     # the same batch, the same result, on a whole node

The LLM is not loaded here: a step reads a batch of pictures and, for each, a few of its 11 stored embeddings
as positives. What a step sees (pictures, crops, patches, positives) is a pure function of the seed and the
step. So N ranks equal one rank with the whole batch, a batch encoded in chunks equals one that fits, and
after a crash the same command goes on as if nothing had been.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flame
from data import checkpoint, command, files
from data.memory import chunks_that_fit, expected, flops_per_image, memory_errors, share_of_peak
from data.pictures import Batches, find_pictures, open_picture, reason
from data.projection import fit_text_projection, parse_projection
from data.released import image_tower
from data.show import plots
from data.show.plan import print_training

# Every setting: its value for the demo and for CC3M, the values it may have, what it is. Each is also a flag.
# cc3m is the paper's recipe for CC3M with ViT-B/16 (appendix and released training script). yfcc15m is the
# same for fewer epochs (our choice), as the released scripts give no other values. demo is ours, chosen on
# the demo's validation split. ViT-L/14 is --patch-size 14 --width 1024 --layers 24 --heads 16.
PRESETS = ("demo", "cc3m", "yfcc15m")
YFCC15M = {"epochs": 25.0}
FEW = 20_000  # images; below them the demo's preset is the default
AGREE = "raw=agree:0.1,short=agree:0.01+linear,long=agree:0.01+linear"
LOSS_NAMES = ("sigmoid", "infonce", "infonce-slots")
whole = functools.partial(command.number, int)
real = functools.partial(command.number, float)
SETTINGS = {
    "image_size":       (64,        224,         whole(1, 4096),       "side of the picture, pixels"),
    "patch_size":       (8,         16,          whole(1, 4096),       "side of a patch, pixels"),
    "width":            (192,       768,         whole(1, 16_384),     "of the ViT"),
    "layers":           (4,         12,          whole(1, 1024),       "blocks of the ViT"),
    "heads":            (3,         12,          whole(1, 1024),       "attention heads of the ViT"),
    "init":             ("clip",    "published", ("clip", "published"), "weights as CLIP's or as published"),
    "image_tower":      ("",        "",          str,                  "open_clip's weights to start from"),
    "lock_image":       (0,         0,           whole(0, 10**9),      "steps that leave the ViT as it is"),
    "projector_hidden": (0,         4096,        whole(0, 131_072),    "its width; at least the LLM's"),
    "pool_first":       (True,      False,       bool,                 "average patches, then project"),
    "loss":             ("infonce", "sigmoid",   LOSS_NAMES,           "all with several positives"),
    "text_projection":  (AGREE,     "none",      str,                  "none|center|whiten|agree, +linear"),
    "positives":        (6,         6,           whole(1, 11),         "embeddings an image meets in a step"),
    "columns":          ("",        "",          str,                  "only these: raw.0,long.0,long.1 ..."),
    "batch":            (256,       3072,        whole(1, 10**7),      "of all ranks (published: 8 x 384)"),
    "accumulate":       (0,         0,           whole(0, 10**7),      "chunks of a batch; 0: by memory"),
    "epochs":           (78.0,      32.0,        real(0, 1e6, True),   "passes over the images"),
    "steps":            (0,         0,           whole(0, 10**9),      "in all; 0: as the epochs say"),
    "lr":               (1e-3,      5e-4,        real(0, 100),         "peak learning rate, AdamW"),
    "weight_decay":     (0.5,       0.5,         real(0, 100),         "on matrices and positions only"),
    "warmup":           (40,        2000,        whole(0, 10**9),      "steps, at most a tenth of all"),
    "clip_grad":        (0.0,       0.0,         real(0, 1e9),         "largest gradient norm; 0: any"),
    "ema":              (0.0,       0.0,         real(0, 0.999999),    "decay of a saved average; 0: none"),
    "init_scale":       (14.0,      10.0,        real(1, 100),         "first logit scale (not its log)"),
    "crop_scale":       (0.5,       0.9,         real(0, 1, True),     "smallest share in a random crop"),
    "patch_dropout":    (0.5,       0.0,         real(0, 0.999),       "share of patches a step leaves out"),
    "gradient_checkpointing": (False, False,     bool,                 "less memory for a third more work"),
    "compile":          (False,     False,       bool,                 "torch.compile the ViT"),
    "holdout":          (0,         0,           whole(0, 10**9),      "images for the curve of Recall@1"),
    "eval_every":       (100,       1000,        whole(0, 10**9),      "steps between its points; 0: none"),
    "checkpoint_every": (200,       1000,        whole(0, 10**9),      "steps; 0: only at the end"),
    "cache":            (1.0,       0.0,         real(0, 1e6),         "GiB of pictures a loader keeps"),
    "workers":          (1,         8,           whole(0, 1024),       "loader processes of a rank"),
    "seed":             (0,         0,           whole(0, 2**63 - 1),  "of weights, order, crops, positives"),
}
# An interrupted run may go on with others of these: they change a gradient in its last bits, or not at all.
FREE = ("accumulate", "gradient_checkpointing", "eval_every", "checkpoint_every", "workers")
MAX_LOGIT_SCALE = math.log(100)
STOP = []  # not empty once SIGTERM has come: save and leave


class Run(NamedTuple):
    """What all steps of a run share."""
    s: dict                  # the settings, with what the data fix filled in
    out: Path                # the checkpoint's folder
    images: str              # root of the pictures, None: where the captions lie
    batches: Batches         # of the store's rows that are trained on, a step's each (data/pictures.py)
    held_out: tuple          # for the curve of Recall@1: rows of the store [n], files, places [n, 3]
    device: torch.device
    model: flame.Flame
    average: flame.Flame     # what is saved: the running average of the weights, or the model itself
    encode: torch.nn.Module  # the model itself, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer


# ---------------------------------------------------------------------------------------------------------
# Losses: images [B, D] and their texts [B, P, D], all unit vectors; every text of another image is a
# negative. First the definitions. Training takes the same block by block (BlockwiseLoss), so that the B x BP
# logits never exist at once.

def sigmoid_loss(image, text, scale, bias):
    """-sum log sigmoid(+-(scale <image, text> + bias)) / number of texts (paper, section 3.4)."""
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


def slots_loss(image, text, scale, bias=None):
    """InfoNCE as in the released code: an image's p-th positive is sought among the p-th ones of all images,
    not among all texts."""
    logits = scale * torch.einsum("id,jpd->ijp", image, text)  # [B, B, P]
    own = logits.diagonal(dim1=0, dim2=1).T  # [B, P]
    of_image = logits.logsumexp(1) - own
    of_text = logits.logsumexp(0) - own
    return 0.5 * (of_image.mean() + of_text.mean())


# With one positive an image the sigmoid is SigLIP's loss, the other two are CLIP's.
#
# All are (sum over all pairs of f(logit) - sum over own pairs of logit) / (B P): the sigmoid since -log
# sigmoid(x) = softplus(x) - x and -log sigmoid(-x) = softplus(x). So a loss is a function of a block of
# logits [b, n], which it may overwrite: -> the sum of f and its derivatives f' [b, n], both / (B P). Softmax
# losses get the log-sum-exps of an image's logits over all texts, rows [b, 1], or over each slot's, rows
# [b, P], and of a text's over all images, columns [n].

def sigmoid_block(logits, B, P):
    value = F.softplus(logits).sum() / (B * P)
    return value, logits.sigmoid_().mul_(1 / (B * P))


def infonce_block(logits, B, P, rows, columns):
    b, n = logits.shape
    slots = rows.shape[1]
    value = (n * rows.mean(1).sum() + b * columns.sum()) / (2 * B * B * P)
    # softmax over an image's texts / (2 B slots), softmax over a text's images / (2 B P)
    of_image = (logits.view(b, n // slots, slots) - (rows[:, None] + math.log(2 * B * slots))).exp_()
    of_text = logits.sub_(columns + math.log(2 * B * P)).exp_()
    return value, of_image.view(b, n).add_(of_text)


LOSSES = {"sigmoid": sigmoid_block, "infonce": infonce_block, "infonce-slots": infonce_block}
SOFTMAX = ("infonce", "infonce-slots")  # in these a bias cancels


class BlockwiseLoss(torch.autograd.Function):
    """A loss and its gradients, computed along with it in a sweep over blocks of texts.

    image [b, D]: this rank's. text [B, P, D]: all ranks'; from index `first` on they are this rank's images'
    own. A rank's part is multiplied by their number, since DistributedDataParallel averages gradients: the
    mean over ranks is the whole batch's loss, and its gradient.
    """

    @staticmethod
    def forward(ctx, image, text, scale, bias, kind, first=0, elements=None):
        b, (B, P, D) = len(image), text.shape
        flat = text.reshape(B * P, D)
        own = text[first:first + b]
        scaled = image * scale
        share = 1 / (B * P)
        elements = elements or (1 << 24 if image.is_cuda else 1 << 20)  # of a block; on CPU it stays in cache
        size = P * max(64 // P, elements // max(1, b * P), 1)  # whole images' texts
        blocks = [slice(at, at + size) for at in range(0, B * P, size)]
        loss = -share * torch.einsum("bd,bpd->", scaled, own)
        to_image = -share * own.sum(1)  # sums over texts of d loss / d logit times the text: [b, D]
        to_text = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        to_bias = image.new_zeros(())
        if kind in SOFTMAX:
            rows, columns = log_sums(scaled, flat, blocks, P if kind == "infonce-slots" else 1)
        else:
            loss = loss - share * b * P * bias
            to_bias -= share * b * P
        for at in blocks:
            logits = scaled @ flat[at].T
            if kind in SOFTMAX:
                value, slope = LOSSES[kind](logits, B, P, rows, columns[at])
            else:
                value, slope = LOSSES[kind](logits.add_(bias), B, P)
                to_bias += slope.sum()
            loss = loss + value
            to_image.addmm_(slope, flat[at])
            if to_text is not None:
                to_text[at] = slope.T @ scaled
        if to_text is not None:
            to_text = to_text.view(B, P, D)
            to_text[first:first + b] -= share * scaled[:, None]
        ctx.save_for_backward(to_image * scale, to_text, (image * to_image).sum(), to_bias)
        return loss * ranks()

    @staticmethod
    def backward(ctx, grad):
        grad = grad * ranks()
        return *(None if g is None else grad * g for g in ctx.saved_tensors), None, None, None


def log_sums(scaled, flat, blocks, slots):
    """log-sum-exps of the logits scaled [b, D] x flat [N, D]: each image's over all texts, or over each
    slot's [b, slots], each text's over the images of all ranks [N]."""
    rows = scaled.new_full((len(scaled), slots), -math.inf)
    columns = scaled.new_empty(len(flat))
    for at in blocks:
        logits = scaled @ flat[at].T
        rows = torch.logaddexp(rows, logits.unflatten(1, (-1, slots)).logsumexp(1))
        columns[at] = logits.logsumexp(0)
    if ranks() > 1:
        highest = columns.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        columns = (columns - highest).exp_()
        dist.all_reduce(columns)
        columns = columns.log_() + highest
    return rows, columns


# ---------------------------------------------------------------------------------------------------------
# The run

def train(args, s):
    """Looks at everything, then builds, then takes the steps; touches no earlier run before the first."""
    device = start_ranks(args.device)
    store = flame.open_store(args.embeddings)
    columns = chosen_columns(store, s["columns"])
    tower = None
    if s["image_tower"]:
        sizes, tower = image_tower(s["image_tower"])
        for name, size in sizes.items():
            if getattr(args, name) not in (None, size):
                flag = name.replace("_", "-")
                raise flame.InputError(f"--{flag}: {s['image_tower']} has {size}; leave the flag out")
        s |= sizes
    if args.plan:
        settle(s, len(store), len(columns), store.meta["D"])
        with torch.device("meta"):  # shapes alone
            text = fit_text_projection(store, s["text_projection"], max_rows=0, columns=columns)
            print_training(model_of(s, columns, text), s, args.plan)
        return
    out = Path("out") / (args.name or store.path.resolve().name)
    with checkpoint.folder(out) if rank() == 0 else contextlib.nullcontext():
        pictures, held_out = split_pictures(store, args.images, out, s)
        settle(s, len(pictures[0]), len(columns), store.meta["D"])
        fixed = {name: value for name, value in s.items() if name not in FREE}
        earlier = None if args.overwrite else checkpoint.earlier_run(out, store, fixed)
        if earlier and earlier["step"] == s["steps"] and (out / "model.safetensors").exists():
            say(f"{out}: finished already, nothing to do; --overwrite trains anew")
            return
        with memory_errors(s, device, ranks()):
            model, average, optimizer = build(store, columns, s, device, earlier, tower)
            start = checkpoint.restore(out, s, model, average, optimizer) if earlier else 0
            encode = distribute(model, s["compile"])
            going_on = f", going on from step {start}" * (start > 0)
            if earlier and earlier["training"]["steps"] < s["steps"]:
                going_on += ", longer than before, at the learning rate of the longer cosine"
            several = f", {ranks()} ranks" * (ranks() > 1)
            say(f"{s['images']} images x {len(columns)} embeddings -> {out}{several}{going_on}")
            say("  ".join(f"{name}={value}" for name, value in s.items()))
            say(expected(model, s, device, ranks()))
            batches = Batches(store, columns, pictures, s, s["steps"], rank(), ranks())
            run = Run(s, out, args.images, batches, held_out, device, model, average, encode, optimizer)
            take_steps(run, start, open_board(out) if args.tensorboard and rank() == 0 else None)


def start_ranks(name):
    """-> this rank's device; where torchrun has started several, they meet."""
    if ranks() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = command.usable_device(name)
    if ranks() > 1:  # rank 0 alone indexes tars and fits the text projection, for minutes
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return device


def rank():
    """torchrun says which of how many processes this is."""
    return int(os.environ.get("RANK", 0))


def ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all():
    if ranks() > 1:
        dist.barrier()


def say(text):
    if rank() == 0:
        print(text)


def chosen_columns(store, names):
    """Those of flame.COLUMNS to train on, by number."""
    have = store.meta["columns"]
    names = [name.strip() for name in names.split(",")] if names else have
    for name in names:
        if name not in have or names.count(name) > 1:
            raise flame.InputError(f"--columns: {name!r} twice, or not in {store.path}: {','.join(have)}")
    return [flame.COLUMNS.index(name) for name in names]


def split_pictures(store, folder, out, s):
    """-> the pictures to train on, those held out for the curve; each (rows [n], files, places [n, 3])."""
    if rank() > 0:
        wait_for_all()  # rank 0 writes the index of the tars, the others read it
    rows, paths, places = find_pictures(store, folder, out / "tars.npz")
    if rank() == 0:
        wait_for_all()
    if 2 * s["holdout"] > len(rows):
        raise flame.InputError(f"--holdout {s['holdout']}: hold out at most half of the {len(rows)} images")
    order = np.random.default_rng([s["seed"], 3]).permutation(len(rows))
    held, trained = np.sort(order[:s["holdout"]]), np.sort(order[s["holdout"]:])
    return (rows[trained], paths, places[trained]), (rows[held], paths, places[held])


def settle(s, images, columns, D):
    """Fills in the settings that depend on the data."""
    s["images"] = images  # so that a run does not go on with others
    if ranks() > images:
        raise flame.InputError(f"torchrun: {ranks()} ranks, but only {images} images; start fewer")
    if s["batch"] > images:
        s["batch"] = images // ranks() * ranks()
    if s["batch"] % ranks():
        raise flame.InputError(f"--batch: {s['batch']} do not divide among {ranks()} ranks; give a multiple")
    s["positives"] = min(s["positives"], columns)
    s["projector_hidden"] = max(s["projector_hidden"], D)
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (images // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["workers"] = min(s["workers"], (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def model_of(s, columns, text):
    """-> flame.Flame with these settings and this text projection."""
    names = ("image_size", "patch_size", "width", "layers", "heads", "init", "projector_hidden", "pool_first")
    config = {name: s[name] for name in names}
    config["init_logit_scale"] = math.log(s["init_scale"])
    config["text_dim"], config["text_rank"] = text.basis.shape[1:]
    config["text_mapped"] = [flame.COLUMNS[c] for c in text.mapped]
    config["text_map_rank"] = text.down.shape[-1] if hasattr(text, "down") else 0
    config["columns"] = [flame.COLUMNS[c] for c in columns]
    model = flame.Flame(config)
    model.text = text
    return model


def build(store, columns, s, device, earlier, tower=None):
    """-> model, its running average (or the model itself), optimizer, as at the start of a run.

    earlier: the run to go on from, whose text projection is taken; other ranks get rank 0's. tower: tensors
    that the image tower starts from.
    """
    torch.manual_seed(s["seed"])
    few = len(store) < 4 * store.meta["D"]  # rows a dimension: their covariance is far from the corpus's
    fit = {"max_rows": 0} if earlier or rank() > 0 else {}
    text = fit_text_projection(store, s["text_projection"], shrinkage=few, device=device,
                               columns=columns, **fit)
    model = model_of(s, columns, text)
    if tower:
        load_tower(model.visual, tower, s["image_tower"])
    model.visual.gradient_checkpointing = s["gradient_checkpointing"]
    model.to(device)
    if not s["accumulate"]:
        s["accumulate"] = chunks_that_fit(model, s, device, ranks())
        if earlier:  # and to the last bit
            s["accumulate"] = max(1, earlier["training"]["accumulate"])
    decayed = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": s["weight_decay"]}
    spared = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}  # biases ...
    optimizer = torch.optim.AdamW([decayed, spared], lr=s["lr"], betas=(0.9, 0.95), fused=True)
    return model, copy.deepcopy(model) if s["ema"] else model, optimizer


def load_tower(visual, tensors, path):
    try:
        visual.load_state_dict(tensors)
    except RuntimeError as e:
        raise flame.InputError(f"{path}: not CLIP's image tower ({files.said(e)}); give a ViT's") from None


def distribute(model, compiled):
    """-> the model, or DistributedDataParallel around it (rank 0's weights, all ranks' mean gradient)."""
    if compiled:
        model.visual.compile()
    if ranks() == 1:
        return model
    encode = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    encode.broadcast_buffers = False  # the text projection's, which never change
    return encode


def take_steps(run, start, board=None):
    """The loop: a batch, a step, a line in the log, now and then a checkpoint."""
    s, out = run.s, run.out
    lines = checkpoint.earlier_log(out, start)
    loader = torch.utils.data.DataLoader(
        run.batches, batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"],
        worker_init_fn=outlive_sigterm, pin_memory=run.device.type == "cuda")
    if start == s["steps"] and rank() == 0:  # killed between training.pt and the rest of its last checkpoint
        save(run, start)
    waited, stop = 0.0, False
    begun = clock = time.time()
    with tqdm(total=s["steps"], initial=start, desc="training", unit=" steps", smoothing=0.05,
              disable=rank() > 0) as bar:
        for step, (batch, failed) in enumerate(loader, start):
            waited += time.time() - clock
            loss, stop = take_step(run, step, batch, failed)
            if step == start:
                if rank() == 0:
                    checkpoint.begin(out, start, lines)
                wait_for_all()
            checkpoint.note_skipped(out, failed)
            if rank() == 0:
                spent = time.time() - begun
                rate = (step + 1 - start) * s["batch"] / spent
                log_step(run, step, loss, rate, waited / spent, bar, board)
                if stop or due(s, "checkpoint_every", step):
                    save(run, step + 1)
            if stop:
                break
            clock = time.time()
    if rank() == 0:
        checkpoint.tell_skipped(out)
        stopped = "; stopped, the same command goes on from here (without --overwrite)" * stop
        print(f"{out}: {bar.n} steps, {bar.postfix or 'nothing left to do'}{stopped}")


def take_step(run, step, batch, failed):
    """One step of AdamW, on every rank alike; -> (mean loss over ranks, whether any was told to stop)."""
    s, batches = run.s, run.batches
    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_backward(run.model, run.encode, batch, s, run.device)
    if loss is None:
        key, why = failed[0]
        file = batches.files[batches.places[batches.pictures(step)[0], 0]]
        raise flame.InputError(f"{run.out}: no picture of step {step}'s batch could be read "
                               f"(first: {file}, key {key}, {why}); give the right --images DIR")
    status = torch.stack([loss, torch.tensor(float(len(STOP)), device=run.device)])
    if ranks() > 1:
        dist.all_reduce(status)
    loss, stop = (status / ranks()).tolist()
    if not math.isfinite(loss):  # before it can reach the weights
        keys = [batches.store.keys[row] for row in batches.rows[batches.pictures(step)]]
        files.write_text(run.out / "nan-batch.txt", "\n".join(keys))
        raise flame.InputError(
            f"{run.out}: the loss is {loss} at step {step}, batch {keys[0]} ... (all in nan-batch.txt there)"
            "; the last checkpoint is kept; lower --lr, and check the store with a fresh embed.py run")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, s)
    if step < s["lock_image"]:
        for p in run.model.visual.parameters():
            p.grad = None  # AdamW leaves it alone
    if s["clip_grad"]:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), s["clip_grad"])
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if s["ema"]:
            share = 1 - min(s["ema"], (1 + step) / (10 + step))  # more at first: first weights are forgotten
            for slow, fast in zip(run.average.parameters(), run.model.parameters()):
                slow.lerp_(fast, share)
    return loss, stop > 0


def forward_backward(model, encode, batch, s, device):
    """Adds one step's gradients to the parameters'; -> this rank's loss, None where no rank read a picture.

    encode: the model itself, or DistributedDataParallel around it, which averages the gradients of all ranks.
    """
    pixels, facets, columns, readable, kept = batch
    everyone = gather(readable.to(device, torch.uint8)).bool()
    if not everyone.any():
        return None
    # Texts are constants: they travel as they are, in half precision, and each rank applies the text
    # projection itself.
    facets = gather(facets.to(device, non_blocking=True))
    columns = gather(columns.to(device, non_blocking=True))
    text = model.text(facets[everyone], columns[everyone])  # [B, P, D], B: the readable ones of all ranks
    first = everyone[:rank() * len(pixels)].sum().item()
    readable = readable.to(device)
    half = flame.default_dtype(device) == torch.bfloat16
    n = min(s["accumulate"], len(pixels))
    chunks = list(zip(pixels.tensor_split(n), [None] * n if kept is None else kept.tensor_split(n)))

    def encoded(chunk):
        pixels, kept = (x if x is None else x.to(device, non_blocking=True) for x in chunk)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return encode(flame.to_pixels(pixels), kept)

    def loss_of(image):
        scale = model.logit_scale.exp()
        return BlockwiseLoss.apply(image[readable], text, scale, model.logit_bias, s["loss"], first)

    if n == 1:
        loss = loss_of(encoded(chunks[0]))
        loss.backward()
        return loss.detach()
    # The batch does not fit, its features do: encode it without a graph, take the loss's gradient with
    # respect to the features, then encode each chunk again and hand it its share. Nothing in a step is
    # random, so the gradient is the whole batch's.
    with torch.no_grad():
        image = torch.cat([encoded(chunk) for chunk in chunks])
    loss = loss_of(image.requires_grad_())
    shares = torch.autograd.grad(loss, image, retain_graph=True)[0].tensor_split(n)
    for chunk, share in zip(chunks[:-1], shares):
        with contextlib.nullcontext() if encode is model else encode.no_sync():
            encoded(chunk).backward(share)
    # The loss's own parameters come along with the last.
    torch.autograd.backward([encoded(chunks[-1]), loss], [shares[-1], None])
    return loss.detach()


def gather(x):
    """[b, ...] of this rank -> [ranks * b, ...], all ranks' in their order."""
    if ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def learning_rate(step, s):
    """Linear warm-up, then a cosine to 0."""
    if step < s["warmup"]:
        return s["lr"] * (step + 1) / s["warmup"]
    share = (step - s["warmup"]) / max(1, s["steps"] - s["warmup"])
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * share))


def due(s, every, step):
    """Whether what comes every so many steps, and after the last, is due after this one."""
    if step + 1 == s["steps"]:
        return True
    return s[every] > 0 and (step + 1) % s[every] == 0


def save(run, step):
    store = run.batches.store
    checkpoint.save(run.out, step, run.s, store, run.images, run.model, run.average, run.optimizer)


def outlive_sigterm(worker):
    """Clusters tell a whole process group to end: a rank saves and leaves, and its loaders with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------
# What is told

def log_step(run, step, loss, rate, waited, bar, board):
    """A line in log.jsonl and on the bar; where it is due, Recall@1 of the held-out pictures and the curve.

    rate: images a second. waited: the share of the time that went into waiting for data.
    """
    s = run.s
    scale = run.model.logit_scale.exp().item()
    bias = run.model.logit_bias.item()
    entry = {"step": step, "loss": round(loss, 5), "scale": round(scale, 3), "bias": round(bias, 3),
             "lr": learning_rate(step, s), "images_per_s": round(rate, 1), "waited": round(waited, 4)}
    if s["holdout"] and s["eval_every"] and due(s, "eval_every", step):
        store, columns = run.batches.store, run.batches.columns
        recall, failed = held_out_recall(run.average, store, columns, *run.held_out, run.device)
        checkpoint.note_skipped(run.out, failed)
        found = "none can be read"
        if recall is not None:
            entry["held_out_R@1"] = round(recall, 2)
            found = f"Recall@1 {recall:.1f}%"
        bar.write(f"step {step}, {s['holdout']} held-out pictures: {found}")
    files.append(run.out / "log.jsonl", json.dumps(entry) + "\n")
    if "held_out_R@1" in entry or step + 1 == s["steps"]:
        plots.draw_curve(run.out)
    if board:
        for name, value in entry.items():
            board.add_scalar(name, value, step)
    told = f"loss {loss:.3f}, scale {scale:.1f}"
    if s["loss"] not in SOFTMAX:
        told += f", bias {bias:.1f}"
    told += f", {rate:.0f} images/s, {waited:.1%} of the time waited for data"
    flops = 3 * flops_per_image(run.model.config, s["patch_dropout"]) * rate / ranks()
    told += share_of_peak(run.device, flops)
    bar.set_postfix_str(told, refresh=False)
    bar.update()


@torch.no_grad()
def held_out_recall(model, store, columns, rows, paths, places, device):
    """-> text-to-image Recall@1, percent, None where no held-out picture can be read; [(key, why)].

    By the long facets where they are trained on. Ties count as misses.
    """
    columns = [c for c in columns if flame.COLUMNS[c].startswith("long")] or columns
    images = []
    read = []
    failed = []
    for row, place in zip(rows.tolist(), places):
        try:
            images.append(model.preprocess(open_picture(paths, place)))
            read.append(row)
        except Exception as e:  # decoders raise nearly anything on a stranger's bytes
            failed.append((store.keys[row], reason(e)))
    if not read:
        return None, failed
    parts = torch.stack(images).split(64)
    image = torch.cat([model.encode_image(part.to(device)) for part in parts])
    text = model.text(store.read(read, columns).to(device), columns)
    score = flame.similarity(image, text)
    right = (score >= score.diagonal()[:, None]).sum(1) == 1
    return 100 * right.float().mean().item(), failed


def open_board(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise flame.InputError("--tensorboard: not installed; pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))


# ---------------------------------------------------------------------------------------------------------
# The command line

def read_arguments(argv):
    """-> (arguments, settings), all of them checked before anything is read or made."""
    usage = "train.py [--embeddings DIR] [--images DIR] [--preset NAME] [--name NAME] [--SETTING VALUE ...]"
    parser = command.Parser(description="Stage 2: images + embedding store -> checkpoint", usage=usage)
    add = parser.add_argument
    add("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    add("--images", metavar="DIR", help="root of pictures or tars (default: where the captions file lies)")
    add("--preset", choices=PRESETS, help=f"default: demo below {FEW:,} images, else cc3m")
    add("--name", help="checkpoint goes to out/NAME (default: the store's name)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--plan", metavar="GPUS", type=whole(1, 4096), nargs="?", const=1,
        help="only say what it takes on so many GPUs: memory, hours, data")
    add("--overwrite", action="store_true", help="throw away what is at out/NAME and start anew")
    add("--tensorboard", action="store_true", help="also log to out/NAME/tensorboard")
    add = parser.add_argument_group("settings (demo / cc3m)").add_argument
    for name, (demo, cc3m, values, what) in SETTINGS.items():
        if values is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(values, tuple):
            how = {"choices": values}
        else:
            how = {"type": values, "metavar": "X"}

        add("--" + name.replace("_", "-"), help=f"{what} ({demo} / {cc3m})", **how)
    args = parser.parse_args(argv)
    args.embeddings = args.embeddings or newest_store()
    args.preset = args.preset or fitting_preset(Path(args.embeddings))
    s = {name: row[args.preset != "demo"] for name, row in SETTINGS.items()}
    s |= YFCC15M if args.preset == "yfcc15m" else {}
    s |= {name: getattr(args, name) for name in s if getattr(args, name) is not None}
    if s["width"] % s["heads"]:
        raise flame.InputError(f"--heads {s['heads']} must divide --width {s['width']}")
    if s["lock_image"] and not s["image_tower"]:
        raise flame.InputError("--lock-image: a ViT of random weights would stay so; give --image-tower too")
    if s["image_size"] % s["patch_size"]:
        raise flame.InputError(f"--patch-size {s['patch_size']} must divide --image-size {s['image_size']}")
    parse_projection(s["text_projection"])
    return args, s


def newest_store():
    stores = sorted(Path("data/embeddings").glob("*/meta.json"), key=os.path.getmtime)
    if not stores:
        raise flame.InputError("data/embeddings: no finished store; make one with embed.py")
    return stores[-1].parent


def fitting_preset(embeddings):
    """Few images are learnt by heart by a large tower, which no laptop holds either: they get the demo's."""
    meta = embeddings / "meta.json"
    few = meta.exists() and flame.read_json(meta, {"N": int})["N"] < FEW
    return "demo" if few else "cc3m"


def main(argv=None):
    def body():
        args, s = read_arguments(argv)
        say(f"store: {args.embeddings}, preset: {args.preset}")
        flame.keep_freed_memory()
        train(args, s)
        if ranks() > 1:
            dist.destroy_process_group()
    return command.run("train.py", body, "the same command goes on (without --overwrite)")


def stop_soon(*signal_and_frame):
    STOP.append(True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_soon)
    sys.exit(main())
