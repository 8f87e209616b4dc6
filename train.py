"""Stage 2: images + embedding store -> checkpoint. Trains a ViT and its projector to match facet embeddings.

    python train.py                              # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m
    python train.py --val data/embeddings/val    # also measure recall on held-out captions, keep the best
    torchrun --nproc_per_node 8 train.py ...     # the same batch and the same result on a whole node

The LLM is not loaded. A step reads a batch of images and, for each image, a few of its 11 stored embeddings
as positives. Everything random in a step (images, crops, patches, positives) is a pure function of the seed
and the step. So, up to rounding, N ranks equal one rank with the whole batch, and micro-batches equal one
large batch. After a crash the same command resumes.
"""
import argparse
import atexit
import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute

import flame
from data import common
from data.common import all_gather, barrier, init_distributed, print0, rank, world_size
from data.encoders import Encoders, compute_images, trained_facets
from data.images import Batches, find_images, group_by_image, locations_of
from data.projection import PROJECTIONS, captions_differ, fit_text_projection, text_config
from data.show import plots
from data.sources import UNPACKED
from flame import FACET_COLUMNS, InputError, content_hash, read_json, reading

# ------------------------------------------------------------------------------------------------------------
# Losses. image [b, D] are this rank's images x_i, text [B, P, D] the texts u_t of all ranks, P per image. The
# texts of image i are text[first + i]; all other texts of the global batch are its negatives. All are unit
# vectors, s is the logit scale, c the bias. Each rank sums over its own images and multiplies by the world
# size; DDP's mean over ranks is then the loss of the whole batch. all_gather stacks the tensors of all ranks,
# [...] -> [world size, ...], with gradients.

def sigmoid_loss(image, text, scale, bias, first=0):
    """Multi-positive sigmoid loss (paper, section 3.4); with P = 1 it is SigLIP's.

        L = -1 / (B P) sum_i sum_t log sigmoid(y_it (s <x_i, u_t> + c))

    y_it is 1 if text t describes image i, otherwise -1. With the logit z, a negative costs softplus(z) and a
    positive softplus(-z) = softplus(z) - z. So we sum softplus(z) over all pairs and subtract z of the
    positives.
    """
    def sum_over(texts):
        return F.softplus(scale * image @ texts.T + bias).sum()

    positives = scale * positive_similarities(image, text, first) + bias
    total = sum(map_text_blocks(sum_over, image, text)) - positives.sum()
    return total * world_size() / text[..., 0].numel()


def infonce_loss(image, text, scale, bias=0.0, first=0):
    """Multi-positive InfoNCE; with P = 1 it is CLIP's loss.

        L = -1 / (2 B P) sum_i sum_{t of i} [log softmax_t(s <x_i, u_t>) + log softmax_i(s <x_i, u_t>)]

    One softmax is over all texts, the other over all images.
    """
    def logsumexps(texts):
        logits = scale * image @ texts.T
        return logits.logsumexp(1), logits.logsumexp(0)

    over_texts, over_images = zip(*map_text_blocks(logsumexps, image, text))
    over_texts = torch.stack(over_texts).logsumexp(0)              # [b], over all texts
    over_images = all_gather(torch.cat(over_images)).logsumexp(0)  # [B P], over the images of all ranks
    over_images = over_images.view(text.shape[:2])[first:first + len(image)]
    total = (over_texts[:, None] + over_images) / 2 - scale * positive_similarities(image, text, first)
    # The bias cancels in a softmax; 0 * bias gives it the gradient that DDP expects of every parameter.
    return total.sum() * world_size() / text[..., 0].numel() + 0 * bias


LOSSES = {"sigmoid": sigmoid_loss, "infonce": infonce_loss}
MAX_LOGITS = 3072 * 3072 * 6  # computed at once; as many as the paper's batch has, 226 MB in float32


def positive_similarities(image, text, first):
    """Return [b, P], the cosines of each image with its own texts."""
    return torch.einsum("bd,bpd->bp", image, text[first:first + len(image)])


def map_text_blocks(function, image, text):
    """Return [function(texts [n, D])] for blocks of texts with at most MAX_LOGITS logits each.

    If there are several blocks, their logits are recomputed in the backward pass. Only one block's
    logits exist at a time.
    """
    texts = text.flatten(0, 1)
    blocks = texts.split(max(1, MAX_LOGITS // max(1, len(image))))
    if len(blocks) == 1:
        return [function(texts)]
    return [recompute(function, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]


# ------------------------------------------------------------------------------------------------------------
# Settings: value for the demo, value for CC3M, allowed values, description. Each is also a flag. "cc3m" is
# the paper's recipe for CC3M with ViT-B/16 (appendix and released training script); none is published for
# YFCC15M. "demo" is ours, chosen on the demo's validation split. For ViT-L/14 give --patch-size 14
# --width 1024 --layers 24 --heads 16. Text projections (data/projection.py): whiten evens out the variance;
# agree keeps what an image's captions have in common; +linear trains a second map.

SMALL_DATASET = 20_000  # images; below it the default preset is demo, because a large ViT would overfit
N_COLUMNS = len(FACET_COLUMNS)
integer = functools.partial(common.number, int)  # (low, high)
real = functools.partial(common.number, float)   # (low, high, exclude low)
SETTINGS = {
    "image_size":       (64,        224,       integer(1, 4096),      "image side, pixels"),
    "patch_size":       (8,         16,        integer(1, 4096),      "patch side, pixels"),
    "width":            (192,       768,       integer(1, 16_384),    "ViT width"),
    "layers":           (4,         12,        integer(1, 1024),      "ViT layers"),
    "heads":            (3,         12,        integer(1, 1024),      "ViT attention heads"),
    "init":             ("clip",    "pytorch", ("clip", "pytorch"),   "ViT initialization (paper: pytorch)"),
    "projector_hidden": (0,         4096,      integer(0, 131_072),   "hidden width; raised to the LLM's D"),
    "pool_first":       (True,      False,     bool,                  "average the patches, then project"),
    "loss":             ("infonce", "sigmoid", tuple(LOSSES),         "multi-positive loss"),
    "text_projection":  ("agree+linear", "none", PROJECTIONS,         "map of the stored embeddings"),
    "positives":        (6,         6,         integer(1, N_COLUMNS),  "embeddings per image and step"),
    "raw_always":       (True,      False,     bool,                  "raw caption is always a positive"),
    "columns":          ("",        "",        str,                   "facet columns, such as raw.0,long.0"),
    "batch":            (256,       3072,      integer(1, 10**7),     "global batch size (paper: 8 x 384)"),
    "micro_batch":      (384,       384,       integer(1, 10**7),     "images encoded at once per rank"),
    "epochs":           (78.0,      32.0,      real(0, 1e6, True),    "passes over the images"),
    "steps":            (0,         0,         integer(0, 10**9),     "total steps; 0: from the epochs"),
    "lr":               (1e-3,      5e-4,      real(0, 100),          "peak learning rate of AdamW"),
    "weight_decay":     (0.5,       0.5,       real(0, 100),          "of matrices and position embeddings"),
    "warmup":           (40,        2000,      integer(0, 10**9),     "steps, at most a tenth of all"),
    "init_scale":       (14.0,      10.0,      real(1, 100),          "initial logit scale, not its log"),
    "crop_scale":       (0.5,       0.9,       real(0, 1, True),      "minimum area fraction of a crop"),
    "patch_dropout":    (0.5,       0.0,       real(0, 0.999),        "fraction of patches dropped per step"),
    "checkpoint_every": (200,       1000,      integer(0, 10**9),     "steps; 0: only at the end"),
    "val_every":        (0,         0,         integer(0, 10**9),     "steps; 0: an epoch, at least 100"),
    "workers":          (1,         8,         integer(0, 1024),      "loader processes per rank"),
    "seed":             (0,         0,         integer(0, 2**63 - 1), "of weights, order, crops, positives"),
}
# These may differ when a run is resumed: they change a gradient in its last bits or not at all. The steps of
# a run may also be increased (see find_earlier_run).
CHANGEABLE_ON_RESUME = ("micro_batch", "checkpoint_every", "val_every", "workers")
MAX_VAL_IMAGES = 5000  # a larger validation store is sampled
MAX_LOGIT_SCALE = math.log(100)  # model.logit_scale is a logarithm, as in CLIP
stop_requested = []  # not empty after SIGTERM: save and exit


# ------------------------------------------------------------------------------------------------------------
# Preparing a run

class Run(NamedTuple):
    """What all steps of a run share."""
    s: dict                  # settings, resolved
    out: Path                # the checkpoint folder
    batches: Batches         # of the rows that are trained on
    device: torch.device
    model: flame.Flame
    encode: torch.nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    validation: tuple        # image locations, their long facets [N, 7, D]; or ()


def train(args, s):
    """Check everything, build the model, train. An earlier run's files are untouched until the first step.

    Returns whether SIGTERM stopped it before its last step.
    """
    device = args.device
    store = flame.open_store(args.embeddings)
    columns = parse_columns(s["columns"])
    out = Path("out") / (args.name or store.path.resolve().name)
    with common.locked_folder(out) if rank() == 0 else contextlib.nullcontext():
        images = group_by_image(*locate_images(store, args.images, out))
        resolve_settings(s, len(images.spans), len(columns), store.meta["D"])
        s["images_crc32"] = zlib.crc32(images.rows)  # the same when a run is resumed
        if s["text_projection"].startswith("agree") and not captions_differ(store, columns, images):
            print0("text projection: whiten instead of agree, because each image has only one caption")
            s["text_projection"] = s["text_projection"].replace("agree", "whiten")
        saved_step = None if args.overwrite else find_earlier_run(out, store, s)
        if saved_step == s["steps"]:
            flame.load(out)  # raises InputError if it is damaged
            print0(f"{out}: already finished; give more --steps to continue, or --overwrite to train again")
            return False
        model, optimizer = build(store, columns, s, device, images if saved_step is None else None)
        start = 0 if saved_step is None else load_checkpoint(out, model, optimizer, s["steps"])
        encode = distribute(model)
        validation = open_validation(args.val, store, out) if args.val else ()
        captions = f", {len(images.rows)} captions" if len(images.rows) > s["images"] else ""
        print0(f"{s['images']} images{captions} x {len(columns)} embeddings -> {out}, {world_size()} ranks, "
               f"from step {start}\nsettings that differ from --preset {args.preset}:")
        preset = preset_settings(args.preset)
        print0("\n".join(f"  {name:18}{value}" for name, value in s.items() if value != preset.get(name)))
        batches = Batches(store, columns, images, s, rank(), world_size())
        run = Run(s, out, batches, device, model, encode, optimizer, validation)
        return training_loop(run, start)


def parse_columns(names):
    """Return the indices of the facet columns to train on."""
    names = names.split(",") if names else FACET_COLUMNS
    if not {*names} <= {*FACET_COLUMNS}:
        raise InputError(f"--columns {','.join(names)}: choose from {','.join(FACET_COLUMNS)}")
    return [c for c, name in enumerate(FACET_COLUMNS) if name in names]


def locate_images(store, folder, out):
    """Return the images of the store's rows: rows [n], files, spans [n, 3] (see images.find_images)."""
    if rank() > 0:
        barrier(out / ".lock")  # rank 0 writes the index of the tars, the others read it
    captions = store.meta["captions"]["path"]
    unpacked = store.path / UNPACKED  # images that embed.py found inside Parquet
    folder = folder or (unpacked if unpacked.is_dir() else store.meta["captions"].get("images"))
    table = store.path / "captions.tsv" if store.meta["captions"].get("comparable") else None
    images = find_images(store.keys, store.images, captions, folder, store.path / "images.npz", table=table)
    if rank() == 0:
        barrier(out / ".lock")
    return images


def open_validation(path, store, out):
    """Return the image locations of a validation store, and their long facets float32 [N, 7, D].

    Raises InputError if the store was made with another LLM than the training store.
    """
    val = flame.open_store(path)
    if any(val.meta["llm"][name] != store.meta["llm"][name] for name in ("fingerprint", "layer", "mask")):
        raise InputError(f"{path}: made with another LLM, layer or mask than {store.path}; embed both alike")
    rows, files, spans = locate_images(val, None, out)
    step = math.ceil(len(rows) / MAX_VAL_IMAGES)
    long = [c for c, name in enumerate(FACET_COLUMNS) if name.startswith("long.")]
    return locations_of(files, spans[::step]), val.read(rows[::step], long)


def resolve_settings(s, n_images, n_columns, D):
    """Fill in the settings that depend on the data."""
    s["images"] = n_images
    if s["batch"] > n_images:
        s["batch"] = n_images // world_size() * world_size()
    if s["batch"] % world_size() or not s["batch"]:
        raise InputError(f"--batch {s['batch']}: give a multiple of the {world_size()} ranks, at most "
                         f"{n_images} images")
    s["micro_batch"] = min(s["micro_batch"], s["batch"] // world_size())
    s["positives"] = min(s["positives"], n_columns)
    s["projector_hidden"] = max(s["projector_hidden"], D)
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (n_images // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["val_every"] = s["val_every"] or max(100, n_images // s["batch"])
    s["workers"] = min(s["workers"], os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def build(store, columns, s, device, images):
    """Return the model and the optimizer as at the start of a run.

    Args:
        images: Images, to fit the text projection to their captions, or None for a resumed run, which has it
            in its checkpoint. Other ranks get rank 0's.
    """
    torch.manual_seed(s["seed"])
    sizes = "image_size patch_size width layers heads projector_hidden pool_first"
    config = {name: s[name] for name in sizes.split()}
    config |= text_config(s["text_projection"], store.meta["D"], [FACET_COLUMNS[c] for c in columns])
    model = flame.Flame(config, s["init"])
    torch.nn.init.constant_(model.logit_scale, math.log(s["init_scale"]))
    if images and rank() == 0:
        fit_text_projection(model.text_projection, store, s["text_projection"], columns, images, device)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # biases, norms and vectors are not decayed
    groups = [{"params": matrices, "weight_decay": s["weight_decay"]},
              {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, 0.95), fused=True)


def autocast(device):
    fast = common.default_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def distribute(model):
    """Return the model, or DistributedDataParallel around it (rank 0's weights, mean gradient)."""
    if world_size() == 1:
        return model
    encode = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    encode.broadcast_buffers = False  # DDP() has sent the text projection's; they never change
    return encode


# ------------------------------------------------------------------------------------------------------------
# Training

def training_loop(run, start):
    """Take the steps from `start` on; log each, save checkpoints. Return whether SIGTERM stopped it early."""
    s, out = run.s, run.out
    loader = torch.utils.data.DataLoader(
        run.batches, batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"],
        worker_init_fn=ignore_sigterm, pin_memory=run.device.type == "cuda")
    loaded = enumerate(loader, start + 1)  # starts the loader processes
    # If a loader dies, torch's handler raises in whatever line is running; without it, next() reports it.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    entries, waited, done = read_log(out, start), 0.0, start
    begin = clock = time.time()
    with common.progress_bar(total=s["steps"], initial=start, desc="training", unit=" steps", smoothing=0.05,
                             disable=rank() > 0) as bar:
        for done, (batch, failed) in loaded:
            waited += time.time() - clock
            loss, norm, stop = train_step(run, done - 1, batch)
            if done == start + 1:  # until here, an earlier run's files are untouched
                if loss is None and not start:
                    raise InputError(f"{out}: no image of the first batch could be read (key "
                                     f"{': '.join(failed[0])}); give --images DIR")
                if rank() == 0:
                    begin_log(out, start, entries)
                barrier()
                listed = read_skipped(out)
            log_skipped(out, failed, listed)
            bar.update()
            if rank() == 0 and loss is not None:
                elapsed = time.time() - begin
                entry = {"step": done - 1, "loss": loss, "lr": learning_rate(done - 1, s),
                         "gradient_norm": norm, "images_per_s": (done - start) * s["batch"] / elapsed,
                         "waited": waited / elapsed}
                if run.validation and (done == s["steps"] or done % s["val_every"] == 0):
                    keep_best(run, entry, entries)
                log_step(run, entry, bar)
                entries.append(entry)
            if stop or done == s["steps"]:
                break
            if rank() == 0 and done % (s["checkpoint_every"] or s["steps"]) == 0:
                save_checkpoint(run, done, entries)
            clock = time.time()
    stopped = done < s["steps"]
    if rank() == 0:
        save_checkpoint(run, done, entries)
        print_summary(out, entries)
        advice = "; stopped by SIGTERM, run the same command to resume (without --overwrite)"
        print(f"{out}: {done} steps, {bar.postfix or 'no steps left'}{advice * stopped}")
    return stopped


def print_summary(out, entries):
    """Print the number of skipped images on stderr, and the best and last validation recall."""
    skipped = read_skipped(out)
    if skipped:
        print(f"skipped {len(skipped)} unreadable images, listed in {out}/skipped.txt", file=sys.stderr)
    measured = [entry for entry in entries if "val" in entry]
    if measured:
        best = max(measured, key=recall)
        print(f"{out}/best: step {best['step'] + 1}, validation R@1 {describe(best)}; the last step has "
              f"{describe(measured[-1])}")


def train_step(run, step, batch):
    """Take one step of AdamW. Return (mean loss over ranks, gradient norm, whether SIGTERM reached any rank).

    If no rank can read an image of the batch, the weights don't change and the loss is None.
    """
    s = run.s
    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_backward(run.model, run.encode, batch, s, run.device)
    stop = all_gather(torch.tensor(len(stop_requested), device=run.device)).any().item()
    if loss is None:
        return None, None, stop
    loss = all_gather(loss).mean().item()
    if not math.isfinite(loss):  # stop before it reaches the weights
        raise InputError(f"{run.out}: the loss is {loss} at step {step}; the last checkpoint is kept. Lower "
                         "--lr, and check the store with embed.py --inspect")
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, s)
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return loss, norm, stop


def forward_backward(model, encode, batch, s, device):
    """Accumulate one step's gradients. Return this rank's loss, or None if no rank could read an image.

    encode: the model, or DistributedDataParallel around it, which averages the gradients of all ranks. batch:
    pixels uint8 [b, 3, H, W], facets float16 [b, P, D], columns int64 [b, P], readable bool [b], kept int64
    [b, n] or None (see images.Batches).
    """
    pixels, facets, columns, readable, kept = batch
    facets, columns, readable = (x.to(device, non_blocking=True) for x in (facets, columns, readable))
    readable_everywhere = all_gather(readable.byte()).flatten().bool()  # gloo has no bool
    if not readable_everywhere.any():
        return None
    # Gather the stored texts in float16; each rank then applies the text projection.
    facets, columns = (all_gather(x).flatten(0, 1)[readable_everywhere] for x in (facets, columns))
    text = model.text_projection(facets, columns)  # [B, P, D]
    first = readable_everywhere[:rank() * len(pixels)].sum().item()  # readable images of earlier ranks
    micro_batches = [slice(i, i + s["micro_batch"]) for i in range(0, len(pixels), s["micro_batch"])]

    def encode_part(part):
        patches = None if kept is None else kept[part].to(device, non_blocking=True)
        with autocast(device):
            return encode(flame.normalize_pixels(pixels[part].to(device, non_blocking=True)), patches)

    def loss_of(image):
        return LOSSES[s["loss"]](image[readable], text, model.logit_scale.exp(), model.logit_bias, first)

    if len(micro_batches) == 1:
        loss = loss_of(encode_part(micro_batches[0]))
        loss.backward()
        return loss.detach()
    # GradCache (Gao et al. 2021), for a batch whose features fit into memory but whose activations don't:
    # encode it without a graph, take the loss's gradient with respect to the features, then encode each
    # micro-batch again and backpropagate its part. The model has no dropout and the kept patches are fixed,
    # so the second pass computes the same features and the gradient is exact.
    with torch.no_grad():
        image = torch.cat([encode_part(part) for part in micro_batches])
    loss = loss_of(image.requires_grad_())
    feature_grad, = torch.autograd.grad(loss, image, retain_graph=True)
    *others, last = micro_batches
    for part in others:
        with contextlib.nullcontext() if encode is model else encode.no_sync():
            encode_part(part).backward(feature_grad[part])
    # With the last one, also backpropagate the loss to the logit scale, bias and text projection.
    torch.autograd.backward([encode_part(last), loss], [feature_grad[last], None])
    return loss.detach()


@torch.inference_mode()
def validate(run):
    """Return the validation store's Recall@1 with long captions, in percent: {direction: R@1}. Equals
    evaluate.py's.
    """
    locations, facets = run.validation
    number = {location: n for n, location in enumerate(dict.fromkeys(locations))}
    image_of = np.array([number[location] for location in locations])  # an image may have several captions
    model = run.model.eval()
    image = compute_images(Encoders(model, None, run.device, None, None, None), [*number])
    text = [model.encode_text(part.to(run.device), "long")[:, trained_facets(model, "long")].mean(1).cpu()
            for part in facets.split(256)]
    model.train()
    scores = torch.cat(text).numpy() @ image.T
    return {"text_to_image": 100 * np.mean(scores.argmax(1) == image_of),
            "image_to_text": 100 * np.mean(image_of[scores.argmax(0)] == np.arange(len(image)))}


def keep_best(run, entry, entries):
    """Validate, add the recall to a log entry, and save the model in best/ if it exceeds that of all
    earlier entries.
    """
    entry["val"] = validate(run)
    if recall(entry) > max(map(recall, entries), default=0.0):
        save_model(run, run.out / "best", entry["step"] + 1, describe(entry))


def recall(entry):
    """Return the mean R@1 of a log entry, or 0 without validation."""
    return sum(entry.get("val", {}).values()) / 2


def describe(entry):
    """Return a log entry's validation recall as text."""
    text = "{text_to_image:.1f}% (text to image), {image_to_text:.1f}% (image to text)"
    return text.format(**entry["val"]) if "val" in entry else "not measured"


def learning_rate(step, s):
    """Linear warm-up, then a cosine that falls to 0."""
    warmup = min(1, (step + 1) / max(1, s["warmup"]))
    progress = max(0, step - s["warmup"]) / max(1, s["steps"] - s["warmup"])
    return s["lr"] * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def ignore_sigterm(worker):
    """Let loader processes ignore SIGTERM. Clusters send it to the whole process group, and the rank needs
    its loaders until it has saved.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_loaders():
    """Kill loader processes. Python would end them with SIGTERM, which they ignore, and wait forever."""
    for loader in multiprocessing.active_children():
        loader.kill()


# ------------------------------------------------------------------------------------------------------------
# The checkpoint folder, out/<name>:
#
#     training.pt                       weights, AdamW's moments, the step
#     model.safetensors, config.json    what flame.load reads; config.json is written last
#     README.md, local.json             model card; paths on this machine, for evaluate.py
#     log.jsonl, skipped.txt            a line per step; a line per image that could not be read
#     best/                             rows 2 and 3 again, for the step with the best validation recall
#
# Files are written atomically, except for the log and skipped.txt, which grow. The same command resumes.

RESUME_FIX = "choose another --name, or start over with --overwrite"


def save_checkpoint(run, step, entries):
    """Save the state after `step` steps, and draw the log entries. Raises InputError if a weight is NaN or
    infinite.
    """
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise InputError(f"{run.out}: weights are NaN or infinite after {step} steps; lower --lr; the "
                         "last checkpoint is kept")
    training = {"step": step, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    common.atomic_save(run.out / "training.pt", functools.partial(torch.save, training))
    save_model(run, run.out, step, describe(entries[-1] if entries else {}))
    plots.draw_curve(run.out, run.s, entries)


def save_model(run, folder, step, validation):
    """Write the files that can be shared (config.json is the last), and local.json."""
    store = run.batches.store
    llm = dict(store.meta["llm"])
    paths = {"llm": llm.pop("path"), "store": os.path.abspath(store.path)}
    record = {"model": run.model.config, "llm": llm, "training": run.s, "step": step,
              "validation": validation,
              "store": {"name": store.path.resolve().name, "content_hash": content_hash(store)}}
    settings = "\n".join(f"| {name} | {value} |" for name, value in run.s.items())
    card = Path(plots.__file__).with_name("card.md").read_text()
    folder.mkdir(exist_ok=True)
    common.atomic_save(folder / "model.safetensors", functools.partial(save_file, run.model.state_dict()))
    common.write_json(folder / "local.json", paths)
    common.write_text(folder / "README.md", card.format(name=run.out.name, settings=settings, **record))
    common.write_json(folder / "config.json", record)


def find_earlier_run(out, store, s):
    """Return the step in the config.json of the run in this folder, or None if there is none.

    A run may be continued with more steps; warm-up and cosine are then those of the new total. Raises
    InputError if it was another run, with another store or other settings.
    """
    path = out / "config.json"
    if not path.exists():
        for name in ("training.pt", "model.safetensors"):
            if (out / name).exists() and not any("waited" in entry for entry in read_log(out, math.inf)):
                raise InputError(f"{out / name}: not written by train.py; {RESUME_FIX}")
        return None
    with reading(path, RESUME_FIX):
        record = read_json(path, RESUME_FIX)
        if record["store"]["content_hash"] != content_hash(store):
            raise InputError(f"{out}: was trained on another store than {store.path}; {RESUME_FIX}")
        longer = s["steps"] > record["training"]["steps"]
        if longer:
            print0(f"{out}: training longer; the learning rate follows the cosine of {s['steps']} steps now")
        for name, value in s.items():
            old = record["training"][name]
            if old != value and name not in CHANGEABLE_ON_RESUME + ("steps", "epochs", "warmup") * longer:
                raise InputError(f"{out}: was trained with {name} {old}, now it is {value}; {RESUME_FIX}")
        return int(record["step"])


def load_checkpoint(out, model, optimizer, steps):
    """Load training.pt of a run of `steps` steps. Return the step to resume from."""
    with reading(out / "training.pt", RESUME_FIX) as path:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        # The fused AdamW does not check the shapes of its moments.
        shapes = all(state[name].shape == p.shape for p, state in optimizer.state.items()
                     for name in ("exp_avg", "exp_avg_sq"))
        if not shapes or not 0 < saved["step"] <= steps:
            raise ValueError(f"step {saved['step']} of {steps}, or moments of another model")
        return int(saved["step"])


def begin_log(out, start, entries):
    """Write the entries of the steps before `start` to log.jsonl; delete an earlier run's files if start is
    0.
    """
    if not start:
        shutil.rmtree(out / "best", ignore_errors=True)
        for name in ("config.json", "training.pt", "model.safetensors", "skipped.txt"):
            (out / name).unlink(missing_ok=True)
    common.write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def read_log(out, start):
    """Return the entries of log.jsonl before step `start`. A damaged line only leaves a gap in the curve."""
    entries = []
    for line in read_lines(out / "log.jsonl"):
        with suppress(Exception):
            entry = json.loads(line)
            if 0 <= entry["step"] < start and entry["loss"] < 1e9:  # not NaN
                entries.append(entry)
    return entries


def log_step(run, entry, bar):
    """Append a line to log.jsonl and update the progress bar.

    entry: step, loss, lr, gradient_norm, images_per_s, waited (the fraction of time spent waiting for data),
    and val after a validation.
    """
    entry |= {"scale": run.model.logit_scale.exp().item(), "bias": run.model.logit_bias.item()}
    bar.set_postfix_str("loss {loss:.3f}, scale {scale:.1f}, {images_per_s:.0f} images/s, {waited:.1%} of "
                        "the time waiting for data".format(**entry), refresh=False)
    common.append_text(run.out / "log.jsonl", json.dumps(entry) + "\n")


def read_lines(path):
    return path.read_text("utf-8", "surrogateescape").splitlines() if path.is_file() else []


def read_skipped(out):
    """Return the set of keys in skipped.txt."""
    return {line.split("\t")[0] for line in read_lines(out / "skipped.txt")}


def log_skipped(out, failed, listed):
    """Append [(key, reason)] to skipped.txt, except the keys in `listed`, which are added to it."""
    for key, reason in failed:
        if key not in listed:
            listed.add(key)
            common.append_text(out / "skipped.txt", f"{key}\t{reason}\n")


# ------------------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    """Return (arguments, settings), most of them checked before anything is written."""
    usage = "train.py [--embeddings DIR] [--images DIR] [--preset NAME] [--name NAME] [--SETTING VALUE ...]"
    parser = common.Parser(description="Stage 2: images + embedding store -> checkpoint", usage=usage)
    add = parser.add_argument
    add("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    add("--images", metavar="DIR", help="root of images or tars (default: see data/README.md)")
    add("--val", metavar="STORE", help="store of held-out captions; out/NAME/best has the best R@1 on it")
    add("--preset", choices=("demo", "cc3m"), help=f"default: demo below {SMALL_DATASET:,} images, else cc3m")
    add("--name", help="write the checkpoint to out/NAME (default: the store's name)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--overwrite", action="store_true", help="delete the run in out/NAME and start over")
    add = parser.add_argument_group("settings (demo / cc3m)").add_argument
    for name, (demo, cc3m, values, description) in SETTINGS.items():
        options = {"type": values, "metavar": "X"}
        if values is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(values, tuple):
            options = {"choices": values}
        add("--" + name.replace("_", "-"), help=f"{description} ({demo} / {cc3m})", **options)
    args = parser.parse_args(argv)
    args.device = init_distributed(args.device)
    args.embeddings = args.embeddings or newest_store(args.val)
    store = flame.open_store(args.embeddings)
    n_images = len({image or key for key, image in zip(store.keys, store.images)})
    args.preset = args.preset or ("demo" if n_images < SMALL_DATASET else "cc3m")
    s = preset_settings(args.preset)
    s |= {name: value for name, value in vars(args).items() if name in s and value is not None}
    for part, size in (("heads", "width"), ("patch_size", "image_size")):
        if s[size] % s[part]:
            raise InputError(f"--{part} {s[part]} must divide --{size} {s[size]}".replace("_", "-"))
    return args, s


def preset_settings(preset):
    return {name: row[0 if preset == "demo" else 1] for name, row in SETTINGS.items()}


def newest_store(val):
    """Return the finished store under data/embeddings that was begun last, except `val`. Raises InputError if
    there is none.
    """
    def is_finished(folder):
        return folder.resolve() != Path(val or "").resolve() and flame.open_store(folder)

    return common.newest_folder("data/embeddings", "meta.json", is_finished, "make a store with embed.py")


def main(argv=None):
    def body():
        args, s = parse_arguments(argv)
        print0(f"store: {args.embeddings}, preset: {args.preset}")
        flame.keep_freed_memory()
        return 128 + signal.SIGTERM if train(args, s) else 0  # for schedulers

    return common.run_stage("train.py", body, "run the same command to resume (without --overwrite)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: stop_requested.append(True))
    sys.exit(main())
