"""Stage 2: images + embedding store -> checkpoint. A ViT and its projector learn to meet the stored facets of their captions.

    python train.py                                        # newest store under data/embeddings -> out/<its name>
    python train.py --embeddings data/embeddings/cc3m --images cc3m-images --preset cc3m
    torchrun --nproc_per_node 8 train.py ...               # the same batch, the same result, on a whole node

The LLM is not loaded here: a step reads a batch of pictures and, for each, a few of its 11 stored embeddings as positives.
What a step sees (pictures, crops, patches, positives) is a pure function of the seed and the step. So N ranks equal one rank with
the whole batch, a batch encoded in chunks equals one that fits, and after a crash the same command goes on as if nothing had been.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flame
from data.show import report
from data.pictures import Batches, find_pictures, open_picture

# Every setting, its value in each preset, and what it is. Any of them can be given as a flag: --image-size 96.
# cc3m is the paper's recipe for CC3M with ViT-B/16 (appendix and released training script). yfcc15m: the paper trains it
# alike; the released scripts give CC3M's values only, so the rest is taken over and only the epochs are fewer (our choice).
# demo is ours, chosen on the demo's validation split. ViT-L/14 is --patch-size 14 --width 1024 --layers 24 --heads 16.
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
    "shrinkage":       (False,    False,    False,     "whitening: shrink the covariance first (OAS), for stores of few rows"),
    "positives":       (6,        6,        6,         "embeddings of its captions an image meets in a step"),
    "columns":         ("",       "",       "",        "train on these store columns only: raw.0,long.0,long.1 ..."),
    "batch":           (256,      3072,     3072,      "images a step, over all ranks (published: 8 GPUs x 384)"),
    "accumulate":      (1,        1,        1,         "chunks a rank encodes its images in, to save memory; the gradient is the whole batch's"),
    "epochs":          (78.0,     32.0,     25.0,      "passes over the images"),
    "steps":           (0,        0,        0,         "steps in all; 0: as the epochs say"),
    "lr":              (1e-3,     5e-4,     5e-4,      "peak learning rate, AdamW"),
    "beta2":           (0.95,     0.95,     0.95,      "AdamW's second beta; the first is 0.9"),
    "weight_decay":    (0.5,      0.5,      0.5,       "on matrices and the position table only"),
    "warmup":          (40,       2000,     2000,      "steps of linear warm-up, at most a tenth of all; then cosine to 0"),
    "clip_grad":       (0.0,      0.0,      0.0,       "largest norm of the gradient; 0: not clipped, as published"),
    "ema":             (0.0,      0.0,      0.0,       "decay of a running average of the weights, saved in their place; 0: none"),
    "init_scale":      (14.0,     10.0,     10.0,      "initial logit scale (not its log)"),
    "init_bias":       (-10.0,    -10.0,    -10.0,     "initial logit bias, sigmoid loss only"),
    "crop_scale":      (0.5,      0.9,      0.9,       "smallest share of the picture's area that a random crop keeps"),
    "patch_dropout":   (0.5,      0.0,      0.0,       "share of a picture's patches that a step leaves out"),
    "gradient_checkpointing": (False, False, False,    "recompute blocks in the backward pass: less memory, a third more work"),
    "compile":         (False,    False,    False,     "torch.compile the ViT"),
    "holdout":         (0,        1000,     1000,      "images held out of training for the curve of Recall@1"),
    "eval_every":      (100,      1000,     1000,      "steps between two points of that curve; 0: none"),
    "checkpoint_every": (200,     1000,     1000,      "steps between two checkpoints; 0: only at the end"),
    "shuffle":         (50_000,   50_000,   50_000,    "tars: size of the shuffle buffer, pictures"),
    "cache":           (1.0,      0.0,      0.0,       "decoded pictures a loader process keeps in memory, GiB"),
    "workers":         (1,        8,        8,         "processes a rank loads images with"),
    "seed":            (0,        0,        0,         "of weights, order, crops and positives"),
}
FREE = ("eval_every", "checkpoint_every", "cache", "workers")  # an interrupted run may go on with others: they change no weight
MAX_LOGIT_SCALE = math.log(100)
PEAK = {"H100": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, dense, SXM (Nvidia's data sheets)
STOP = []  # not empty once SIGTERM has come: save and leave


# ---------------------------------------------------------------------------------------------------------------------
# Texts: the closed-form text projection

def fit_text_projection(store, spec, ridge, rank, max_rows=100_000, shrinkage=False, device="cpu"):
    """The closed-form text projection, computed from the store in one pass; -> flame.TextProjection.

    An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9. A fixed
    linear map that evens this out lets the image tower learn several times faster at no cost.

    Per column: u = x / |x|, mean mu of u, singular values s and vectors V of the centered matrix / sqrt(N);
    "whiten" maps u to V diag(1 / (s + ridge s_1)) V^T (u - mu); beyond `rank` directions all are scaled alike.
    shrinkage: where N is not many times D the small s come out too small; OAS (Chen et al. 2010) mixes in as much of the identity
    as is best for Gaussian data. Float64 on `device`, a D x D matrix at a time: 210 MB at D = 5120. More than max_rows rows
    (then drawn from a fixed seed) would add nothing but hours; max_rows = 0 fits nothing and gives the right shapes.
    """
    kinds = parse_projection(spec, ridge)
    D = store.meta["D"]
    linear = any(kind == "linear" for kind, _ in kinds.values())
    rank = min(rank, D) if any(kind == "whiten" for kind, _ in kinds.values()) else 0
    projection = flame.TextProjection(D, rank, linear)
    rows = np.arange(len(store))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False))
    for at, name in enumerate(store.meta["columns"] if max_rows else []):
        (kind, ridge), c = kinds[name.split(".")[0]], flame.COLUMNS.index(name)
        if kind in ("none", "linear"):
            continue
        total, products = (torch.zeros(size, dtype=torch.float64, device=device) for size in (D, (D, D)))
        for start in range(0, len(rows), 4096):
            u = store.read(rows[start:start + 4096], [at])[:, 0].to(device, torch.float64)
            total += u.sum(0)
            products.addmm_(u.T, u)
        mean = total / len(rows)
        projection.mean[c] = mean
        if kind == "whiten":
            variances, vectors = torch.linalg.eigh(products / len(rows) - torch.outer(mean, mean))  # ascending
            variances = variances.clamp_min(0)
            if shrinkage:
                trace, squares = variances.sum(), (variances ** 2).sum()
                share = (squares + trace ** 2) / ((len(rows) + 1) * (squares - trace ** 2 / D))
                variances = torch.lerp(variances, trace.expand(D) / D, share.clamp(max=1))
            s = variances.sqrt().flip(0)
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
# Losses: images [B, D] and their texts [B, P, D], all unit vectors; every text of another image is a negative. The first two
# are the definitions, the third what training takes: the same, but the B x BP logits never exist at once.

def sigmoid_loss(image, text, scale, bias):
    """-sum log sigmoid(+-(scale <image, text> + bias)) / number of texts (paper, section 3.4; SigLIP with P positives)."""
    B, P, D = text.shape
    logits = scale * image @ text.reshape(B * P, D).T + bias  # [B, B P]
    sign = torch.full((B, B), -1.0, device=image.device).fill_diagonal_(1.0).repeat_interleave(P, dim=1)
    return -F.logsigmoid(sign * logits).sum() / (B * P)


def infonce_loss(image, text, scale, bias=None):
    """Half: mean over images of (mean over its positives of -log softmax over all texts); half: mean over texts of -log softmax over images."""
    B, P, D = text.shape
    logits = (scale * image @ text.reshape(B * P, D).T).view(B, B, P)
    own = logits.diagonal(dim1=0, dim2=1).T  # [B, P]
    return 0.5 * ((logits.flatten(1).logsumexp(1)[:, None] - own).mean() + (logits.logsumexp(0) - own).mean())


class BlockwiseLoss(torch.autograd.Function):
    """Either loss, and its gradients computed along with it, in a sweep over blocks of texts.

    image [b, D]: this rank's. text [B, P, D]: all ranks'; from index `first` on they are this rank's images' own. The mean of
    the results over ranks is the whole batch's loss, the mean of the gradients its gradient.

    Both losses are  (sum over all pairs of f(logit) - sum over own pairs of logit) / (B P):  the sigmoid since -log sigmoid(x) =
    softplus(x) - x and -log sigmoid(-x) = softplus(x). So of a block only w = f' is wanted. InfoNCE's f' are two softmaxes, whose
    sums take a sweep of their own and, over ranks, an all_reduce of one number a text.
    """

    @staticmethod
    def forward(ctx, image, text, scale, bias, kind, first=0, elements=None):
        b, (B, P, D), world = len(image), text.shape, dist.get_world_size() if dist.is_initialized() else 1
        flat, own, scaled, share = text.reshape(B * P, D), text[first:first + b], image * scale, world / (B * P)
        size = max(64, (elements or (1 << 24 if image.is_cuda else 1 << 20)) // max(1, b))  # texts a block: on CPU it stays in cache
        blocks = [slice(at, at + size) for at in range(0, B * P, size)]
        loss = -share * torch.einsum("bd,bpd->", scaled, own)
        to_image = -share * own.sum(1)  # sums over texts of d loss / d logit times the text: [b, D]
        to_text = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        to_bias = image.new_zeros(())
        if kind == "infonce":
            rows, columns = image.new_full((b, 1), -math.inf), image.new_empty(B * P)
            for at in blocks:
                logits = scaled @ flat[at].T
                rows = torch.logaddexp(rows, logits.logsumexp(1, keepdim=True))
                columns[at] = logits.logsumexp(0)
            if world > 1:
                dist.all_reduce(highest := columns.clone(), dist.ReduceOp.MAX)
                dist.all_reduce(columns := (columns - highest).exp_())
                columns = columns.log_() + highest
            loss = loss + 0.5 * (world / B * rows.sum() + columns.mean())
            rows, columns = rows + math.log(2 * B / world), columns + math.log(2 / share)  # so that exp(logits - rows) is softmax / 2B
        else:
            loss, to_bias = loss - share * b * P * bias, to_bias - share * b * P
        for at in blocks:
            logits = scaled @ flat[at].T
            if kind == "infonce":
                w = (logits - rows).exp_().add_(logits.sub_(columns[at]).exp_())
            else:
                loss = loss + share * F.softplus(logits.add_(bias)).sum()
                w = logits.sigmoid_().mul_(share)
                to_bias += w.sum()
            to_image.addmm_(w, flat[at])
            if to_text is not None:
                to_text[at] = w.T @ scaled
        if to_text is not None:
            to_text = to_text.view(B, P, D)
            to_text[first:first + b] -= share * scaled[:, None]
        ctx.save_for_backward(to_image * scale, to_text, (image * to_image).sum(), to_bias)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(None if g is None else grad * g for g in ctx.saved_tensors), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The run

def train(args, s):
    rank, world, device = start_ranks(args.device)
    store = flame.open_store(args.embeddings)
    columns = chosen_columns(store, s["columns"])
    out = Path("out") / (args.name or store.path.resolve().name)
    if rank == 0:
        try:  # found out now, not after the last step
            out.mkdir(parents=True, exist_ok=True)
            open(out / "log.jsonl", "a").close()
            for name in ("config.json", "training.pt", "training-previous.pt", "model.safetensors") if args.overwrite else ():
                (out / name).unlink(missing_ok=True)
        except OSError as e:
            raise flame.InputError(f"{out}: {e.strerror}; training writes its checkpoint there") from None
        pictures = find_pictures(store, args.images, out / "tars.npz")
    if world > 1:
        dist.barrier()  # the index of the tars is made once
    rows, files, places = pictures if rank == 0 else find_pictures(store, args.images, out / "tars.npz")
    held = np.zeros(len(rows), bool)  # out of training, for the curve; a tenth at most
    held[np.random.default_rng([s["seed"], 3]).permutation(len(rows))[:min(s["holdout"], len(rows) // 10)]] = True
    s["images"] = n = int((~held).sum())  # so that a run does not go on with others
    if world > n:
        raise flame.InputError(f"torchrun: {world} ranks, but only {n} images to train on; start fewer")
    s["batch"] = s["batch"] if s["batch"] <= n else n // world * world
    if s["batch"] < 1 or s["batch"] % world:
        raise flame.InputError(f"--batch: {s['batch']} images do not divide evenly among {world} ranks; give a multiple")
    s["positives"] = min(s["positives"], len(columns))
    s["projector_hidden"] = max(s["projector_hidden"], store.meta["D"])
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * (n // s["batch"])))
    s["warmup"] = min(s["warmup"], s["steps"] // 10)
    s["workers"] = min(s["workers"], (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    saved = earlier_run(out, s, store)
    if saved == "finished":
        return print(f"{out}: finished already, nothing to do; --overwrite trains anew") if rank == 0 else None
    start = saved["step"] if saved else 0
    if rank == 0:
        print(f"{n} images x {len(columns)} embeddings -> {out}" + f", {world} ranks" * (world > 1) + f", going on from step {start}" * bool(saved)
              + "\n" + "  ".join(f"{k}={v}" for k, v in s.items()))
    if args.tensorboard and rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise flame.InputError("--tensorboard: that package is not installed; pip install tensorboard") from None
        board = SummaryWriter(str(out / "tensorboard"))

    torch.manual_seed(s["seed"])
    projection = fit_text_projection(store, s["text_projection"], s["ridge"], s["text_rank"], 0 if saved or rank else 100_000, s["shrinkage"], device)
    config = {k: s[k] for k in ("image_size", "patch_size", "width", "layers", "heads", "projector_hidden", "pool_first")} | {
        "text_dim": store.meta["D"], "text_rank": projection.basis.shape[-1], "text_linear": projection.weight is not None,
        "init_logit_scale": math.log(s["init_scale"]), "init_logit_bias": s["init_bias"]}
    model = flame.Flame(config)
    model.text = projection
    model.visual.gradient_checkpointing = s["gradient_checkpointing"]
    model.to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # vectors, norms, biases, scale
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": s["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
                                  lr=s["lr"], betas=(0.9, s["beta2"]), eps=1e-8, fused=True)
    average = copy.deepcopy(model) if s["ema"] else model
    if saved:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"] or saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    if s["compile"]:
        model.visual.compile()
    encode = model
    if world > 1:
        for x in model.text.buffers():  # as rank 0 has fitted them
            dist.broadcast(x, 0)
        encode = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    batches = Batches(store, columns, (rows[~held], files, places[~held]), s, s["steps"], rank, world)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, s["steps"]), num_workers=s["workers"],
                                         prefetch_factor=2 if s["workers"] else None, pin_memory=device.type == "cuda")
    peak = next((flops for name, flops in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)), 0)
    with open_log(out, start) if rank == 0 else contextlib.nullcontext() as log, tqdm(
            total=s["steps"], initial=start, desc="training", unit=" steps", smoothing=0.05, disable=rank > 0) as bar:
        waited, started = 0.0, time.time()
        clock = started
        for step, (batch, failed) in enumerate(loader, start):
            waited += time.time() - clock
            if failed:
                with open(out / "skipped.txt", "a") as file:
                    file.writelines(f"{key}\t{why}\n" for key, why in failed)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            optimizer.zero_grad(set_to_none=True)
            loss = forward_backward(model, encode, batch, s, device)
            if loss is None:
                raise flame.InputError(f"{out}: no picture of step {step}'s batch could be read (first: {', '.join(failed[0])}); give the right --images DIR")
            status = torch.stack([loss, torch.tensor(float(len(STOP)), device=device)])
            if world > 1:
                dist.all_reduce(status)
            loss, stop = (status / world).tolist()
            if not math.isfinite(loss):  # before it can reach the weights
                keys = [store.keys[row] for row in batches.rows[batches.pictures(step)]]
                (out / "nan-batch.txt").write_text("".join(key + "\n" for key in keys))
                raise flame.InputError(f"{out}: the loss is {loss} at step {step}, batch {', '.join(keys[:3])}, ... (all {len(keys)} keys: {out}/nan-batch.txt); the last checkpoint "
                                       "is kept; lower --lr, and check the store with a fresh embed.py run")
            if s["clip_grad"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip_grad"])
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
                for slow, fast in zip(average.parameters(), model.parameters()) if s["ema"] else ():
                    slow.lerp_(fast, 1 - min(s["ema"], (1 + step) / (10 + step)))  # short at first: the first weights are forgotten
            done, spent = step + 1, time.time() - started
            last = done == s["steps"]
            if rank == 0:
                rate = (done - start) * s["batch"] / spent
                entry = {"step": step, "loss": round(loss, 5), "scale": round(model.logit_scale.exp().item(), 3), "bias": round(model.logit_bias.item(), 3),
                         "lr": learning_rate(step, s), "images_per_s": round(rate, 1), "waited": round(waited / spent, 4)}
                if seen := held.any() and s["eval_every"] and (last or done % s["eval_every"] == 0):
                    entry["held_out_R@1"] = round(held_out_recall(average, store, columns, rows[held], files, places[held], device), 2)
                log.write(json.dumps(entry) + "\n")
                if seen or last:
                    report.draw_curve(out)
                for name, value in entry.items() if args.tensorboard else ():
                    board.add_scalar(name, value, step)
                mfu = f", MFU {rate * 3 * flops_per_image(config, s['patch_dropout']) / (peak * world):.1%}" if peak else ""
                bar.set_postfix_str(f"loss {loss:.3f}, scale {entry['scale']:.1f}, bias {entry['bias']:.1f}, {rate:.0f} images/s, waited {waited / spent:.1%}{mfu}", refresh=False)
                bar.update()
                if stop or last or s["checkpoint_every"] and done % s["checkpoint_every"] == 0:
                    save(out, model, average, optimizer, done, config, s, store)
            if stop:
                break
            clock = time.time()
    if rank == 0:
        if (out / "skipped.txt").exists():
            skipped = list(dict.fromkeys((out / "skipped.txt").read_text().splitlines()))  # once each, whichever rank and epoch
            print(f"skipped {len(skipped)} unreadable picture{'s' * (len(skipped) > 1)}, listed in {out}/skipped.txt: "
                  + ", ".join(line.replace("\t", " (") + ")" for line in skipped[:5]) + ", ..." * (len(skipped) > 5), file=sys.stderr)
        print(f"{out}: {done} steps, {rate:.0f} images/s, {waited / spent:.1%} of the time waited for data" + "; stopped, the same command goes on from here" * (done < s["steps"]))
    if world > 1:
        dist.destroy_process_group()


def forward_backward(model, encode, batch, s, device):
    """Adds one step's gradients to the parameters'; -> this rank's loss, or None where no rank could read a picture.

    encode: the model itself, or DistributedDataParallel around it, which averages the gradients of all ranks.
    """
    pixels, facets, columns, readable, kept = batch
    facets, columns, everyone = (gather(x.to(device, non_blocking=True)) for x in (facets, columns, readable.to(torch.uint8)))
    everyone = everyone.bool()
    if not everyone.any():
        return None
    # Texts are constants: they travel as they are, in half precision, and each rank applies the text projection itself.
    text = model.text(facets[everyone], columns[everyone])  # [B, P, D], B: the readable ones of all ranks
    rank = dist.get_rank() if dist.is_initialized() else 0
    first, readable = everyone[:rank * len(pixels)].sum().item(), readable.to(device)
    chunks = [slice(at[0], at[-1] + 1) for at in np.array_split(np.arange(len(pixels)), min(s["accumulate"], len(pixels)))]

    def encoded(chunk):
        with torch.autocast(device.type, torch.bfloat16, enabled=flame.default_dtype(device) == torch.bfloat16):
            return encode(flame.to_pixels(pixels[chunk].to(device, non_blocking=True)), None if kept is None else kept[chunk].to(device, non_blocking=True))

    def loss_of(image):
        return BlockwiseLoss.apply(image[readable], text, model.logit_scale.exp(), model.logit_bias, s["loss"], first)

    if len(chunks) == 1:
        loss = loss_of(encoded(chunks[0]))
        loss.backward()
        return loss.detach()
    # The batch does not fit, its features do: encode it without a graph, take the loss's gradient with respect to the features,
    # then encode each chunk again and hand it its share. Nothing in a step is random, so the gradient is the whole batch's, exactly.
    with torch.no_grad():
        image = torch.cat([encoded(chunk) for chunk in chunks])
    loss = loss_of(image.requires_grad_())
    to_image, = torch.autograd.grad(loss, image, retain_graph=True)
    for chunk in chunks[:-1]:
        with contextlib.nullcontext() if encode is model else encode.no_sync():
            encoded(chunk).backward(to_image[chunk])
    torch.autograd.backward([encoded(chunks[-1]), loss], [to_image[chunks[-1]], None])  # the loss's own parameters come along
    return loss.detach()


def gather(x):
    """[b, ...] of this rank -> [ranks * b, ...], all ranks' in their order."""
    if not dist.is_initialized():
        return x
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def start_ranks(device):
    """-> (rank, number of ranks, device of this rank), from torchrun's environment variables."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(f"cuda:{local}" if device == "cuda" and world > 1 else device)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise flame.InputError(f"--device {device}: {str(e).splitlines()[0]}; give cpu or cuda, and no more ranks than GPUs") from None
    if world > 1:  # rank 0 alone indexes tars and fits the text projection, for minutes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    return rank, world, device


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


@torch.no_grad()
def held_out_recall(model, store, columns, rows, files, places, device):
    """Text-to-image Recall@1 among the held-out pictures, percent, by the long facets where they are trained on. Ties count as misses."""
    names = store.meta["columns"]
    columns = [c for c in columns if names[c].startswith("long")] or columns
    images, read = [], []
    for row, place in zip(rows.tolist(), places):
        with contextlib.suppress(Exception):  # an unreadable picture is left out, as in training
            images.append(model.preprocess(open_picture(files, place)))
            read.append(row)
    image = torch.cat([model.encode_image(torch.stack(images[at:at + 64]).to(device)) for at in range(0, len(images), 64)])
    score = flame.similarity(image, model.text(store.read(read, columns).to(device), [flame.COLUMNS.index(names[c]) for c in columns]))
    return 100 * ((score >= score.diagonal()[:, None]).sum(1) == 1).float().mean().item()


def flops_per_image(config, patch_dropout=0.0):
    """Of one forward pass: the matrix products of ViT and projector, 2 per multiplication. The backward pass takes twice as many."""
    patches, width = (config["image_size"] // config["patch_size"]) ** 2, config["width"]
    tokens = 1 + (kept := max(1, round(patches * (1 - patch_dropout))))
    return (2 * patches * 3 * config["patch_size"] ** 2 * width + config["layers"] * tokens * (24 * width ** 2 + 4 * tokens * width)
            + (1 if config["pool_first"] else kept) * 2 * config["projector_hidden"] * (width + config["text_dim"]))


# ---------------------------------------------------------------------------------------------------------------------
# Files: checkpoint and log

def identity(store):
    """A store's content in a word: everything that fixes its bytes, and not where it or its captions lie."""
    meta = {k: v for k, v in store.meta.items() if k != "versions"} | {"captions": store.meta["captions"]["sha256"]}
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def earlier_run(out, s, store):
    """-> what the interrupted run in this folder saved, "finished", or None where there was none. InputError where it was another run."""
    anew = "choose another --name, or start anew with --overwrite"
    try:
        old = json.loads((out / "config.json").read_text())
        width, was, had, step = old["model"]["text_dim"], old["training"], old["store"].get("identity"), old.get("step")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as e:
        raise flame.InputError(f"{out / 'config.json'}: cannot be read ({e!r}); {anew}") from None
    if width != store.meta["D"]:
        raise flame.InputError(f"{out}: holds a checkpoint for vectors of width {width}, those of {store.path} have {store.meta['D']}; {anew}")
    if had != identity(store):
        raise flame.InputError(f"{out}: holds a checkpoint trained on another store than {store.path}, or by an older train.py; {anew}")
    if differs := [k for k, v in s.items() if k not in FREE and was.get(k) != v]:
        raise flame.InputError(f"{out}: holds a checkpoint trained with {differs[0]} {was.get(differs[0])}, now it is {s[differs[0]]}; {anew}")
    if step == s["steps"] and (out / "model.safetensors").exists():
        return "finished"
    for name in ("training.pt", "training-previous.pt"):
        try:
            return torch.load(out / name, map_location="cpu", weights_only=True)
        except Exception as e:  # a damaged file can raise nearly anything
            print(f"{out / name}: cannot be read ({type(e).__name__})", file=sys.stderr)
    raise flame.InputError(f"{out}: neither training.pt nor training-previous.pt can be read, so the run there cannot go on; {anew}")


def save(out, model, average, optimizer, step, config, s, store):
    """training.pt (what was there becomes training-previous.pt), model.safetensors and config.json, each whole or not at all."""
    from safetensors.torch import save_file
    if not all(p.isfinite().all() for p in model.parameters()):
        raise flame.InputError(f"{out}: weights are NaN or infinite after step {step - 1}; the last checkpoint is kept; lower --lr")
    record = {"model": config, "llm": store.meta["llm"], "training": s, "step": step,
              "store": {"path": str(store.path), "identity": identity(store), "N": len(store), "columns": store.meta["columns"]}}
    try:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict() if s["ema"] else None}, out / "training.pt.tmp")
        save_file(average.state_dict(), out / "model.safetensors.tmp")
        (out / "config.json.tmp").write_text(json.dumps(record, indent=1))
        for name in ("model.safetensors", "config.json", "training.pt"):
            if name == "training.pt" and (out / name).exists():
                os.replace(out / name, out / "training-previous.pt")
            os.replace(out / (name + ".tmp"), out / name)
    except (OSError, RuntimeError) as e:
        raise flame.InputError(f"{out}: {' '.join(str(e).split())[:150]}; free space, the same command goes on from the last checkpoint") from None


def open_log(out, steps):
    """log.jsonl, cut back to its first `steps` lines, to be appended to a line at a time."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)[:steps]
    (out / "log.jsonl.tmp").write_text("".join(lines))
    os.replace(out / "log.jsonl.tmp", out / "log.jsonl")
    if not steps:
        (out / "skipped.txt").unlink(missing_ok=True)
    return open(out / "log.jsonl", "a", buffering=1)


def main():
    parser = argparse.ArgumentParser(description="Stage 2: images + embedding store -> checkpoint", formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=150), usage="train.py [--embeddings DIR] [--images DIR] [--preset demo|cc3m|yfcc15m] [--name NAME] [--SETTING VALUE ...]")
    parser.add_argument("--embeddings", metavar="DIR", help="the store (default: newest finished one under data/embeddings)")
    parser.add_argument("--images", metavar="DIR", help="root of the pictures or of tars (default: where the captions file lies); needed where the captions named none")
    parser.add_argument("--preset", choices=PRESETS, help="default: demo for the demo's store, else cc3m")
    parser.add_argument("--name", help="checkpoint goes to out/NAME (default: the store's name)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--overwrite", action="store_true", help="throw away what is at out/NAME and start anew")
    parser.add_argument("--tensorboard", action="store_true", help="also log to out/NAME/tensorboard")
    group = parser.add_argument_group("settings (demo / cc3m / yfcc15m)")
    for name, (*values, what) in SETTINGS.items():
        kind = (lambda text: text.lower() in ("1", "true", "yes")) if isinstance(values[0], bool) else type(values[0])
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=f"{what} ({' / '.join(map(str, values))})")
    args = parser.parse_args()
    try:
        stores = [args.embeddings] if args.embeddings else sorted(Path("data/embeddings").glob("*/meta.json"), key=os.path.getmtime)
        if not stores:
            raise flame.InputError("data/embeddings: no finished store; make one with embed.py, or give --embeddings DIR")
        args.embeddings = args.embeddings or stores[-1].parent
        args.preset = args.preset or ("demo" if Path(args.embeddings).resolve().name.startswith("demo") else "cc3m")
        settings = {name: SETTINGS[name][PRESETS.index(args.preset)] if (given := getattr(args, name)) is None else given for name in SETTINGS}
        if settings["loss"] not in ("sigmoid", "infonce"):
            raise flame.InputError(f"--loss: {settings['loss']!r} is neither sigmoid nor infonce")
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"store: {args.embeddings}, preset: {args.preset}")
        flame.keep_freed_memory()
        train(args, settings)
    except flame.InputError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))
    main()
