"""train.py --plan: what a training takes on GPUs, before any hour of one is spent. Computed, not measured."""
import torch

from data import memory

GPU = "H100"
SHARE = 0.4     # of its peak that training reaches; an assumption
GB = 1e9


def print_training(model, s, gpus):
    """model: flame.Flame, on the meta device will do; s: train.py's settings, filled in for the store."""
    cuda = torch.device("cuda")
    D = model.config["text_dim"]
    weights = memory.bytes_of_weights(model)
    chunks = memory.chunks_that_fit(model, s, cuda, gpus, 80 * GB)
    of_image = memory.bytes_per_image(model.config, cuda, s["patch_dropout"], s["gradient_checkpointing"])
    images = s["batch"] // gpus
    flops = 3 * memory.flops_per_image(model.config, s["patch_dropout"]) * s["batch"]
    seconds = flops / (gpus * SHARE * memory.PEAK[GPU])     # a step
    parts = {"image tower": model.visual, "projector": model.mm, "maps of texts": model.text}
    for name, part in parts.items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:,.1f} M parameters")
    print(f"a GPU: {weights / GB:.1f} GB of weights, gradients and optimizer, "
          f"{memory.bytes_of_texts(model, s) / GB:.1f} GB of texts, activations of {images:,} images "
          f"{images * of_image / GB:,.0f} GB, so --accumulate {chunks} on 80 GB")
    print(f"a step: {s['batch']:,} images, {flops / 1e15:.2f} PFLOP; all {s['steps']:,}: "
          f"{s['steps'] * flops / 1e15:,.0f} PFLOP")
    print(f"time: {s['steps'] * seconds / 3600:.1f} hours on {gpus} x {GPU} at {SHARE:.0%} of its "
          f"{memory.PEAK[GPU] / 1e12:.0f} TFLOP/s")
    read = s["batch"] * s["positives"] * 2 * D
    print(f"data: {s['batch'] / seconds:,.0f} pictures/s to decode, "
          f"{read / seconds / 1e6:,.0f} MB/s of the store to read")
