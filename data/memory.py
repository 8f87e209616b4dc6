"""What a training step takes, memory and operations, and what to do where it is too much."""
import math
import os
import re
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import flame

PEAK = {"H100": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, dense, SXM (Nvidia's data sheets)


def patches_kept(config, patch_dropout=0.0):
    return max(1, round((config["image_size"] // config["patch_size"]) ** 2 * (1 - patch_dropout)))


def flops_per_image(config, patch_dropout=0.0):
    """Of a forward pass: ViT's and projector's matrix products, 2 a multiplication."""
    width, kept = config["width"], patches_kept(config, patch_dropout)
    stem = 2 * patches_kept(config) * 3 * config["patch_size"] ** 2 * width
    blocks = config["layers"] * (1 + kept) * (24 * width ** 2 + 4 * (1 + kept) * width)
    projector = 2 * config["projector_hidden"] * (width + config["text_dim"])
    return stem + blocks + (1 if config["pool_first"] else kept) * projector


def passes(s, chunks):
    """Forward passes that a step takes: backward is as much as two; in chunks, or checkpointed, one more."""
    return 3 + (chunks > 1) + bool(s["gradient_checkpointing"])


def peak(device):
    """FLOP/s of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK.items() if gpu in name), None)


def share_of_peak(device, flops):
    """Of FLOP/s, as text; none where the GPU's peak is not known."""
    most = peak(device)
    return f", MFU {flops / most:.1%}" if most else ""


def bytes_per_image(config, device, patch_dropout=0.0, gradient_checkpointing=False):
    """What the forward pass of one picture keeps for the backward pass, or a little more."""
    width, layers = config["width"], config["layers"]
    size = flame.default_dtype(device).itemsize  # of what matrix products take and give
    tokens = 1 + patches_kept(config, patch_dropout)
    # A block, a token: the two norms' inputs and outputs; q, k, v; what attention mixes; the MLP's two inner
    # states of 4 widths; what is float32 in bfloat16's place; and the attention matrix, which only fused
    # kernels do without.
    block = tokens * size * (18 * width + config["heads"] * tokens)
    blocks = block + 4 * layers * tokens * width if gradient_checkpointing else layers * block
    projector = size * (width + 2 * config["projector_hidden"] + 2 * config["text_dim"])
    return blocks + (1 if config["pool_first"] else tokens - 1) * projector


def bytes_of_weights(model):
    """Weights, gradients, moments, average, and weights in half precision."""
    return 22 * sum(p.numel() for p in model.parameters())


def bytes_of_texts(model, s):
    """Of all ranks in a step, on their way through the text projection and the loss."""
    return 16 * s["batch"] * s["positives"] * model.config["text_dim"]


def chunks_that_fit(model, s, device, ranks=1, gpu=None):
    """In how many chunks a rank has to encode its images so that a step fits the device's memory.

    Of a GPU 80%, else half the memory, whoever uses it just now, so that a command always takes the same.
    gpu: bytes of a GPU's memory; None asks the device.
    """
    if device.type == "cuda":
        room = 0.8 * (gpu or torch.cuda.get_device_properties(device).total_memory)
    else:
        room = 0.5 * main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room -= bytes_of_weights(model) + bytes_of_texts(model, s)
    images = s["batch"] // ranks
    kept = images * bytes_per_image(model.config, device, s["patch_dropout"], s["gradient_checkpointing"])
    return min(images, math.ceil(1.3 * kept / max(room, 1)))  # 1.3: what comes and goes in between


def expected(model, s, device, ranks=1):
    """What the run is expected to take, in words, before the first step: a rank's memory, and hours.

    Hours by the peak of a known GPU, on CPU by a matrix product that is timed here; training reaches about
    40% of either. Of other GPUs only the memory is said.
    """
    chunk = -(-s["batch"] // ranks // s["accumulate"])
    kept = chunk * bytes_per_image(model.config, device, s["patch_dropout"], s["gradient_checkpointing"])
    gigabytes = (bytes_of_weights(model) + bytes_of_texts(model, s) + kept) / 1e9
    told = f"about {gigabytes:.1f} GB of memory besides the program"
    most = peak(device)
    if device.type == "cpu":
        x = torch.randn(1024, 1024, dtype=flame.default_dtype(device))
        x @ x  # the first one is slow
        begun = time.perf_counter()
        for _ in range(10):
            x @ x
        most = 10 * 2 * 1024 ** 3 / (time.perf_counter() - begun)
    if most:
        forward = flops_per_image(model.config, s["patch_dropout"])
        flops = passes(s, s["accumulate"]) * forward * s["batch"] * s["steps"]
        seconds = flops / (0.4 * most * ranks)
        rough = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.0f} minutes"
        told += f", roughly {rough} for all steps"
    return told


def main_memory():
    """Bytes: the machine's, or the control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is none, or it says "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@contextmanager
def memory_errors(s, device, ranks=1):
    """Out of memory becomes one line that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))  # CUDA, CPU, cuBLAS
        if isinstance(error, RuntimeError) and not known:
            raise
        images, chunks = s["batch"] // ranks, max(1, s["accumulate"])
        if chunks < images:
            cure = f"--accumulate {min(2 * chunks, images)}: the same gradient in smaller chunks"
        elif not s["gradient_checkpointing"]:
            cure = "--gradient-checkpointing: the same gradient for a third more work"
        else:
            cure = f"a --batch below {s['batch']}, or a smaller model"
        tried = f"--batch {s['batch']} --accumulate {chunks}"
        raise flame.InputError(f"out of memory on {device}, {tried}; give {cure}") from None
