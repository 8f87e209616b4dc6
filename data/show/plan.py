"""train.py --plan: what a training takes on GPUs, before any hour of one is spent. Computed, not measured."""
import torch

from data import memory
from flame import InputError

GPU = "H100"
ROOM = 80e9    # bytes of its memory
SHARE = 0.4    # of its peak that training reaches; an assumption
DECODED = 500  # JPEGs of 512 pixels a second and core (tests/RESULTS.md)


def print_training(model, s, gpus):
    """model: flame.Flame, on the meta device will do; s: train.py's settings, filled in for the store."""
    if s["batch"] % gpus:
        raise InputError(f"--plan {gpus}: a batch of {s['batch']} does not divide among them; give a divisor")
    config = model.config
    cuda = torch.device("cuda")
    parts = {"image tower": model.visual, "projector": model.mm, "maps of texts": model.text}
    for name, part in parts.items():
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        print(f"{name}: {millions:,.1f} M parameters")

    weights = memory.bytes_of_weights(model) / 1e9
    texts = memory.bytes_of_texts(model, s) / 1e9
    images = s["batch"] // gpus
    of_image = memory.bytes_per_image(
        config,
        cuda,
        s["patch_dropout"],
        s["gradient_checkpointing"],
    )
    activations = images * of_image / 1e9
    chunks = memory.chunks_that_fit(model, s, cuda, gpus, ROOM)
    print(f"a GPU: {weights:.1f} GB of weights, gradients and optimizer, {texts:.1f} GB of texts,")
    print(f"    {activations:,.0f} GB of activations of {images:,} images: --accumulate {chunks} on 80 GB")

    forward = memory.flops_per_image(config, s["patch_dropout"])
    flops = memory.passes(s, chunks) * forward * s["batch"]
    reached = gpus * SHARE * memory.PEAK[GPU]  # FLOP/s
    seconds = flops / reached                  # a step
    hours = s["steps"] * seconds / 3600
    print(f"a step: {s['batch']:,} images, {flops / 1e15:.2f} PFLOP")
    print(f"all {s['steps']:,}: {hours:.1f} hours on {gpus} x {GPU} at {SHARE:.0%} of its peak")

    pictures = s["batch"] / seconds
    of_vector = 2 * config["text_dim"]         # bytes, float16
    store = pictures * s["positives"] * of_vector / 1e6
    cores = pictures / gpus / DECODED
    print(f"data: {pictures:,.0f} pictures/s to decode, by {cores:.0f} cores a GPU (--workers) at {DECODED} "
          f"a core; {store:,.0f} MB/s of the store to read")
