"""Stage 2: images + embedding store -> checkpoint. A ViT and its projector learn to meet captions' facets.

    python train.py                              # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m
    torchrun --nproc_per_node 8 train.py ...     # the same batch, the same result, on a whole node

The LLM is not loaded here: a step reads a batch of pictures and, for each, a few of its 11 stored embeddings
as positives. What a step sees (pictures, crops, patches, positives) is a pure function of the seed and the
step. So N ranks equal one rank with the whole batch, a batch encoded in chunks equals one that fits, and
after a crash the same command goes on as if nothing had been.
"""
import argparse
import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import flame
from data import checkpoint, command, files, progress
from data.pictures import Batches, find_pictures, patches_kept
from data.projection import captions_differ, fit_text_projection, parse_projection, text_config
from data.ranks import gather, rank, ranks, say, start_ranks, wait_for_all
from data.released import image_tower
from data.show import plots
from flame import COLUMNS, InputError

# ---------------------------------------------------------------------------------------------------------
# Losses of this rank's images [b, D] and all ranks' texts [B, P, D], all unit vectors. Texts from index
# `first` on are the images' own, each image has P; every other one is a negative. The mean over ranks is the
# whole batch's loss, and of gradients too: what a rank adds up is its images' share, times the ranks.

def sigmoid_loss(image, text, scale, bias, first=0):
    """-sum log sigmoid(+-(scale <image, text> + bias)) / number of texts (paper, section 3.4).

    -log sigmoid(-x) = softplus(x), and -log sigmoid(x) = softplus(x) - x. SigLIP's loss where P is 1.
    """
    def of_block(texts):
        return F.softplus(scale * image @ texts.T + bias).sum()

    positives = scale * own_cosines(image, text, first) + bias
    total = sum(in_blocks(of_block, image, text)) - positives.sum()
    return total * ranks() / text[..., 0].numel()


def infonce_loss(image, text, scale, bias=0.0, first=0):
    """Half: mean over images of (mean over its positives of -log softmax over all texts).
    Half: mean over texts of -log softmax over all images. CLIP's loss where P is 1.
    """
    def of_block(texts):
        logits = scale * image @ texts.T
        return logits.logsumexp(1), logits.logsumexp(0)

    of_images, of_texts = zip(*in_blocks(of_block, image, text))
    of_images = torch.stack(of_images).logsumexp(0)                  # [b], over all texts
    of_texts = gather(torch.cat(of_texts)).logsumexp(0)              # [B P], over all ranks' images
    of_texts = of_texts.view(text.shape[:2])[first:first + len(image)]
    total = (of_images[:, None] + of_texts) / 2 - scale * own_cosines(image, text, first)
    # A bias would cancel. It gets a gradient, zero, as DistributedDataParallel wants one for everything.
    return total.sum() * ranks() / text[..., 0].numel() + 0 * bias


LOSSES = {"sigmoid": sigmoid_loss, "infonce": infonce_loss}
LOGITS = 3072 * 3072 * 6  # at once: the published batch's, 226 MB in float32


def own_cosines(image, text, first):
    """-> [b, P], an image's with its own texts."""
    return torch.einsum("bd,bpd->bp", image, text[first:first + len(image)])


def in_blocks(function, image, text):
    """-> [function(texts)] of blocks of texts [n, D]. Where there are several, each computes its logits again
    on the way back, so that only one block's exist at once.
    """
    texts = text.flatten(0, 1)
    blocks = texts.split(max(1, LOGITS // max(1, len(image))))
    if len(blocks) == 1:
        return [function(texts)]
    return [recomputed(function, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]


# ---------------------------------------------------------------------------------------------------------
# Every setting: its value for the demo and for CC3M, the values it may have, what it is. Each is also a flag.
# cc3m is the paper's recipe for CC3M with ViT-B/16 (appendix and released training script), for YFCC15M too,
# of which no other values are published. demo is ours, chosen on the demo's validation split. ViT-L/14 is
# --patch-size 14 --width 1024 --layers 24 --heads 16.

FEW = 20_000  # rows; below them the demo's preset is the default: a large tower learns so few by heart
count = functools.partial(command.number, int)
real = functools.partial(command.number, float)
SETTINGS = {
    "image_size":       (64,        224,         count(1, 4096),       "side of the picture, pixels"),
    "patch_size":       (8,         16,          count(1, 4096),       "side of a patch, pixels"),
    "width":            (192,       768,         count(1, 16_384),     "of the ViT"),
    "layers":           (4,         12,          count(1, 1024),       "blocks of the ViT"),
    "heads":            (3,         12,          count(1, 1024),       "attention heads of the ViT"),
    "quick_gelu":       (False,     False,       bool,                 "the ViT's, as OpenAI's weights want"),
    "init":             ("clip",    "published", ("clip", "published"), "weights as CLIP's or as published"),
    "image_tower":      ("",        "",          str,                  "open_clip's weights to start from"),
    "lock_image":       (0,         0,           count(0, 10**9),      "steps that leave the ViT as it is"),
    "projector_hidden": (0,         4096,        count(0, 131_072),    "its width; at least the LLM's"),
    "pool_first":       (True,      False,       bool,                 "average patches, then project"),
    "loss":             ("infonce", "sigmoid",   tuple(LOSSES),        "both with several positives"),
    "text_projection":  ("agree+linear", "none", str,                  "none|whiten|agree[+linear]"),
    "positives":        (6,         6,           count(1, 11),         "embeddings an image meets in a step"),
    "raw_always":       (True,      False,       bool,                 "the raw caption's is one of them"),
    "columns":          ("",        "",          str,                  "only these: raw.0,long.0,long.1 ..."),
    "batch":            (256,       3072,        count(1, 10**7),      "of all ranks (published: 8 x 384)"),
    "chunk":            (384,       384,         count(1, 10**7),      "images a rank encodes at once"),
    "epochs":           (78.0,      32.0,        real(0, 1e6, True),   "passes over the images"),
    "steps":            (0,         0,           count(0, 10**9),      "in all; 0: as the epochs say"),
    "lr":               (1e-3,      5e-4,        real(0, 100),         "peak learning rate, AdamW"),
    "weight_decay":     (0.5,       0.5,         real(0, 100),         "on matrices and positions only"),
    "warmup":           (40,        2000,        count(0, 10**9),      "steps, at most a tenth of all"),
    "init_scale":       (14.0,      10.0,        real(1, 100),         "first logit scale (not its log)"),
    "crop_scale":       (0.5,       0.9,         real(0, 1, True),     "smallest share in a random crop"),
    "patch_dropout":    (0.5,       0.0,         real(0, 0.999),       "share of patches a step leaves out"),
    "compile":          (False,     False,       bool,                 "torch.compile the ViT"),
    "checkpoint_every": (200,       1000,        count(0, 10**9),      "steps; 0: only at the end"),
    "workers":          (1,         8,           count(0, 1024),       "loader processes of a rank"),
    "seed":             (0,         0,           count(0, 2**63 - 1),  "of weights, order, crops, positives"),
}
# An interrupted run may go on with others of these: they change a gradient in its last bits, or not at all.
FREE = ("chunk", "checkpoint_every", "workers")
MAX_LOGIT_SCALE = math.log(100)
STOP = []  # not empty once SIGTERM has come: save and leave


# ---------------------------------------------------------------------------------------------------------
# The run

class Run(NamedTuple):
    """What all steps of a run share."""
    s: dict                  # the settings, with what the data fix filled in
    out: Path                # the checkpoint's folder
    images: str              # root of the pictures, None: where the captions lie
    batches: Batches         # of the store's rows that are trained on, a step's each (data/pictures.py)
    device: torch.device
    model: flame.Flame
    encode: torch.nn.Module  # the model itself, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer


def train(args, s):
    """Looks at everything, then builds, then takes the steps; touches no earlier run before the first.

    -> whether it was told to stop before the last
    """
    device = args.device
    store = flame.open_store(args.embeddings)
    checkpoint.identity(store)  # one that does not say what it is ends here, not at the first save
    columns = chosen_columns(s["columns"])
    tower = None
    if s["image_tower"]:
        sizes, tower = image_tower(s["image_tower"])
        s |= sizes
        say(f"image tower: {s['image_tower']}, with " + ("QuickGELU" if s["quick_gelu"] else
            "the exact GELU; weights of OpenAI's own want --quick-gelu"))
    out = Path("out") / (args.name or store.path.resolve().name)
    with files.alone(out) if rank() == 0 else contextlib.nullcontext():
        pictures = pictures_of(store, args.images, out)
        settle(s, len(pictures[0]), len(columns), store.meta["D"])
        s["rows_crc32"] = zlib.crc32(pictures[0])  # a run does not go on with other pictures
        if s["text_projection"].startswith("agree") and not captions_differ(store, columns):
            say("text projection: whiten, as a picture has one caption, which would agree with itself")
            s["text_projection"] = s["text_projection"].replace("agree", "whiten")
        fixed = {name: value for name, value in s.items() if name not in FREE}
        earlier = None if args.overwrite else checkpoint.earlier_run(out, store, fixed)
        if earlier and earlier["step"] == s["steps"]:
            flame.load(out)  # it is whole
            say(f"{out}: finished already, nothing to do; --overwrite trains anew")
            return False
        model, optimizer = build(store, columns, s, device, not earlier, tower, pictures[0])
        start = checkpoint.restore(out, model, optimizer) if earlier else 0
        fit_chunk(model, s, device)
        encode = distribute(model, s["compile"])
        say(f"{s['images']} images x {len(columns)} embeddings -> {out}, {ranks()} ranks, from step {start}")
        say("  ".join(f"{name}={value}" for name, value in s.items()))
        batches = Batches(store, columns, pictures, s, rank(), ranks())
        run = Run(s, out, args.images, batches, device, model, encode, optimizer)
        return take_steps(run, start)


def chosen_columns(names):
    """Those of COLUMNS to train on, by number."""
    names = names.split(",") if names else COLUMNS
    for name in names:
        if name not in COLUMNS:
            raise InputError(f"--columns: {name!r} is not among {','.join(COLUMNS)}")
    return [c for c, name in enumerate(COLUMNS) if name in names]


def pictures_of(store, folder, out):
    """-> the pictures to train on: rows of the store [n], files, places [n, 3] (data/pictures.py)"""
    if rank() > 0:
        wait_for_all(out / ".lock")  # rank 0 writes the index of the tars, the others read it
    captions = store.meta["captions"]["path"]
    unpacked = store.path / "pictures"  # what embed.py found inside of Parquet
    folder = folder or (unpacked if unpacked.is_dir() else None)
    pictures = find_pictures(store.keys, store.images, captions, folder, out / "tars.npz")
    if rank() == 0:
        wait_for_all(out / ".lock")
    return pictures


def settle(s, images, columns, D):
    """Fills in the settings that depend on the data."""
    s["images"] = images
    if s["batch"] > images:
        s["batch"] = images // ranks() * ranks()
    if s["batch"] % ranks() or not s["batch"]:
        raise InputError(f"--batch {s['batch']}: give a multiple of {ranks()} ranks, at most {images}, "
                         "the images")
    s["positives"] = min(s["positives"], columns)
    s["projector_hidden"] = max(s["projector_hidden"], D)
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (images // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["workers"] = min(s["workers"], (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def build(store, columns, s, device, fit, tower=None, rows=None):
    """-> model and optimizer, as at the start of a run.

    fit: whether to fit the text projection; a run that goes on has it in its checkpoint, and other ranks get
    rank 0's. tower: tensors that the image tower starts from. rows: of the store that are trained on, all or
    int [n].
    """
    torch.manual_seed(s["seed"])
    sizes = "image_size patch_size width layers heads quick_gelu projector_hidden pool_first"
    config = {name: s[name] for name in sizes.split()}
    config |= text_config(s["text_projection"], store.meta["D"], [COLUMNS[c] for c in columns])
    model = flame.Flame(config)
    initialise(model.visual, s)
    torch.nn.init.constant_(model.logit_scale, math.log(s["init_scale"]))
    if fit and rank() == 0:
        fit_text_projection(model.text, store, s["text_projection"], columns, device, rows)
    if tower:
        with flame.reading(s["image_tower"], "give a CLIP's, a ViT"):
            model.visual.load_state_dict(tower)
    model.to(device)
    groups = {}
    for name, p in model.named_parameters():
        start = s["lock_image"] if name.startswith("visual.") else 0
        decay = s["weight_decay"] if p.ndim >= 2 else 0.0  # biases, norms and vectors are spared
        group = groups.setdefault((start, decay), {"params": [], "start": start, "weight_decay": decay})
        group["params"].append(p)
    return model, torch.optim.AdamW(list(groups.values()), lr=s["lr"], betas=(0.9, 0.95), fused=True)


def initialise(visual, s):
    """The blocks' first weights: CLIP's, whose residual branches shrink with depth, or as the released code
    leaves them, nn.Linear's and nn.MultiheadAttention's.
    """
    for block in visual.transformer.resblocks:
        attention, mlp, depth = block.attn, block.mlp, 2 * s["layers"]
        if s["init"] == "published":
            torch.nn.init.xavier_uniform_(attention.in_proj_weight)
            torch.nn.init.zeros_(attention.out_proj.bias)
            continue
        for weight, of_width in ((attention.in_proj_weight, 1), (mlp.c_fc.weight, 2),
                                 (attention.out_proj.weight, depth), (mlp.c_proj.weight, depth)):
            torch.nn.init.normal_(weight, std=(of_width * s["width"]) ** -0.5)


def fit_chunk(model, s, device):
    """Halves s["chunk"], the images that a rank encodes at once, until a GPU has the memory for a forward and
    backward pass of a fourth more; that leaves room for AdamW's moments and the texts. The gradient is the
    whole batch's, whatever the chunk.

    On a CPU nothing is tried: a system that is short of memory swaps or kills, it does not say so.
    """
    s["chunk"] = min(s["chunk"], s["batch"] // ranks())
    while device.type == "cuda":
        try:
            size = s["chunk"] + s["chunk"] // 4
            pixels = torch.rand(size, 3, s["image_size"], s["image_size"], device=device)
            kept = torch.arange(patches_kept(s), device=device).expand(size, -1)
            with half_precision(device):
                model(pixels, kept).sum().backward()
            break
        except torch.OutOfMemoryError:
            if s["chunk"] == 1:
                raise
            s["chunk"] //= 2
        finally:
            model.zero_grad(set_to_none=True)
    # Ranks of unequal chunks would not gather equally often.
    s["chunk"] = gather(torch.tensor(s["chunk"], device=device)).min().item()


def half_precision(device):
    fast = flame.default_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def distribute(model, compiled):
    """-> the model, or DistributedDataParallel around it (rank 0's weights, all ranks' mean gradient)."""
    if compiled:
        model.visual.compile()
    if ranks() == 1:
        return model
    encode = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    encode.broadcast_buffers = False  # the text projection's, which never change
    return encode


def take_steps(run, start):
    """The loop: a batch, a step, a line in the log, now and then a checkpoint."""
    s, out = run.s, run.out
    loader = torch.utils.data.DataLoader(
        run.batches, batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"],
        worker_init_fn=outlive_sigterm, pin_memory=run.device.type == "cuda")
    if start == s["steps"] and rank() == 0:  # killed between training.pt and the rest of its last checkpoint
        checkpoint.save(run, start)
    loaded = enumerate(loader, start)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in whatever line is running
    waited, stop, taken, failures = 0.0, False, 0, []
    begun = clock = time.time()
    with command.bar(total=s["steps"], initial=start, desc="training", unit=" steps", smoothing=0.05,
                     disable=rank() > 0) as bar:
        for step, (batch, failed) in loaded:
            waited += time.time() - clock
            loss, stop = take_step(run, step, batch)
            taken += loss is not None
            failures += failed
            due = stop or step + 1 == s["steps"] or (step + 1) % (s["checkpoint_every"] or s["steps"]) == 0
            first_learnt = taken == 1 and loss is not None
            if step == start > 0 or first_learnt:  # what was there is not touched before
                if rank() == 0:
                    checkpoint.begin(out, start)
                wait_for_all()
                listed = progress.listed_pictures(out)
            if taken or start:
                progress.note_skipped(out, failures, listed)
                failures.clear()
            elif due:
                raise InputError(f"{out}: no picture of {step + 1} steps could be read (first: key "
                                 f"{': '.join(failures[0])}); give the right --images DIR")
            bar.update()
            if rank() == 0 and loss is not None:
                spent = time.time() - begun
                rate = (step + 1 - start) * s["batch"] / spent
                entry = {"step": step, "loss": loss, "lr": learning_rate(step, s), "images_per_s": rate,
                         "waited": waited / spent}
                progress.log_step(run, entry, bar)
            if rank() == 0 and due:
                checkpoint.save(run, step + 1)
                plots.draw_curve(out)
            stop = stop and step + 1 < s["steps"]
            if stop:
                break
            clock = time.time()
    if rank() == 0:
        progress.tell_skipped(out)
        stopped = "; stopped, the same command goes on from here (without --overwrite)" * stop
        print(f"{out}: {bar.n} steps, {bar.postfix or 'nothing left to do'}{stopped}")
    return stop


def take_step(run, step, batch):
    """One step of AdamW, on every rank alike; -> (mean loss over ranks, whether any rank is to stop).

    Where no rank can read a picture of the batch nothing is learnt, and the loss is None.
    """
    s = run.s
    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_backward(run.model, run.encode, batch, s, run.device)
    signals = torch.tensor(float(len(STOP)), device=run.device)
    if loss is None:
        return None, gather(signals).any().item()
    loss, stop = gather(torch.stack([loss, signals])).mean(0).tolist()
    if not math.isfinite(loss):  # before it can reach the weights
        raise InputError(f"{run.out}: the loss is {loss} at step {step}; the last checkpoint is kept; "
                         "lower --lr, and check the store by embed.py --inspect")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, s, group["start"])
        for p in group["params"] if step < group["start"] else ():
            p.grad = None  # locked: AdamW leaves it alone
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return loss, stop > 0


def forward_backward(model, encode, batch, s, device):
    """Adds one step's gradients to the parameters'; -> this rank's loss, None where no rank read a picture.

    encode: the model itself, or DistributedDataParallel around it, which averages the gradients of all ranks.
    """
    pixels, facets, columns, readable, kept = batch
    everyone = gather(readable.to(device, torch.uint8)).flatten().bool()
    if not everyone.any():
        return None
    # Texts are constants: they travel as they are, in half precision, and each rank applies the text
    # projection itself.
    facets = gather(facets.to(device, non_blocking=True)).flatten(0, 1)
    columns = gather(columns.to(device, non_blocking=True)).flatten(0, 1)
    text = model.text(facets[everyone], columns[everyone])  # [B, P, D], B: the readable ones of all ranks
    first = everyone[:rank() * len(pixels)].sum().item()
    readable = readable.to(device)
    chunks = [slice(at, at + s["chunk"]) for at in range(0, len(pixels), s["chunk"])]

    def encoded(chunk):
        some = None if kept is None else kept[chunk].to(device, non_blocking=True)
        with half_precision(device):
            return encode(flame.to_pixels(pixels[chunk].to(device, non_blocking=True)), some)

    def loss_of(image):
        return LOSSES[s["loss"]](image[readable], text, model.logit_scale.exp(), model.logit_bias, first)

    if len(chunks) == 1:
        loss = loss_of(encoded(chunks[0]))
        loss.backward()
        return loss.detach()
    # The batch does not fit, its features do: encode it without a graph, take the loss's gradient with
    # respect to the features, then encode each chunk again and hand it its share. Nothing in a step is
    # random, so the gradient is the whole batch's.
    with torch.no_grad():
        image = torch.cat([encoded(chunk) for chunk in chunks])
    loss = loss_of(image.requires_grad_())
    share, = torch.autograd.grad(loss, image, retain_graph=True)
    *chunks, last = chunks
    for chunk in chunks:
        with contextlib.nullcontext() if encode is model else encode.no_sync():
            encoded(chunk).backward(share[chunk])
    torch.autograd.backward([encoded(last), loss], [share[last], None])  # and the loss's own parameters
    return loss.detach()


def learning_rate(step, s, start=0):
    """Linear warm-up from step `start` on, and a cosine to 0."""
    warm = min(1, (step - start + 1) / max(1, s["warmup"]))
    share = max(0, step - s["warmup"]) / max(1, s["steps"] - s["warmup"])
    return s["lr"] * warm * 0.5 * (1 + math.cos(math.pi * share))


def outlive_sigterm(worker):
    """Clusters tell a whole process group to end: a rank saves and leaves, and its loaders with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """A rank that fails leaves loaders to Python, which ends them by SIGTERM and would wait for ever."""
    for loader in multiprocessing.active_children():
        loader.kill()


# ---------------------------------------------------------------------------------------------------------
# The command line

def read_arguments(argv):
    """-> (arguments, settings), all of them checked before anything is read or made."""
    usage = "train.py [--embeddings DIR] [--images DIR] [--preset NAME] [--name NAME] [--SETTING VALUE ...]"
    parser = command.Parser(description="Stage 2: images + embedding store -> checkpoint", usage=usage)
    add = parser.add_argument
    add("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    add("--images", metavar="DIR", help="root of pictures or tars (default: where the captions file lies)")
    add("--preset", choices=("demo", "cc3m"), help=f"default: demo below {FEW:,} rows, else cc3m")
    add("--name", help="checkpoint goes to out/NAME (default: the store's name)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--overwrite", action="store_true", help="throw away what is at out/NAME and start anew")
    add = parser.add_argument_group("settings (demo / cc3m)").add_argument
    for name, (demo, cc3m, values, what) in SETTINGS.items():
        how = {"type": values, "metavar": "X"}
        if values is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(values, tuple):
            how = {"choices": values}
        add("--" + name.replace("_", "-"), help=f"{what} ({demo} / {cc3m})", **how)
    args = parser.parse_args(argv)
    args.device = start_ranks(args.device)
    args.embeddings = args.embeddings or newest_store()
    args.preset = args.preset or ("demo" if len(flame.open_store(args.embeddings)) < FEW else "cc3m")
    s = {name: row[args.preset != "demo"] for name, row in SETTINGS.items()}
    s |= {name: value for name, value in vars(args).items() if name in s and value is not None}
    for part, size in (("heads", "width"), ("patch_size", "image_size")):
        if s[size] % s[part]:
            raise InputError(f"--{part} {s[part]} must divide --{size} {s[size]}".replace("_", "-"))
    parse_projection(s["text_projection"])
    return args, s


def newest_store():
    for meta in sorted(Path("data/embeddings").glob("*/meta.json"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(InputError):  # it is being made
            return flame.open_store(meta.parent).path
    raise InputError("data/embeddings: no finished store; make one with embed.py")


def main(argv=None):
    stopped = False

    def body():
        nonlocal stopped
        args, s = read_arguments(argv)
        say(f"store: {args.embeddings}, preset: {args.preset}")
        flame.keep_freed_memory()
        stopped = train(args, s)

    code = command.run("train.py", body, "the same command goes on (without --overwrite)")
    return 128 + signal.SIGTERM if stopped else code  # so that who started it knows


def stop_soon(*signal_and_frame):
    STOP.append(True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_soon)
    sys.exit(main())
