"""How fast is training, against open_clip, torchvision and the plain losses? One table; nothing is asserted.

    python tests/bench_train.py                    # about 10 minutes on 2 CPU cores
    python tests/bench_train.py --only loss        # step, pipeline or loss

    step       forward, loss, backward and AdamW of ViT-B/16 at 224 px: flame.Flame against open_clip's
               VisionTransformer with the same projector, loss, precision and batch, in turns
    pipeline   512-px JPEGs to a normalised batch at 224 px on one core: data.pictures and flame.to_pixels
               against torchvision's RandomResizedCrop, ToTensor, Normalize (crop scale 0.9 to 1, bicubic)
    loss       train.BlockwiseLoss against the plain matrix of sigmoid_loss and infonce_loss at batch 4,096, 6
               positives, D = 576, forward and backward, each in a process of its own, for its peak memory
               above what its inputs take

"of ceiling" is the share of the speed of a large matrix product in the same precision, measured in the same
process.
"""
import argparse
import io
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flame  # noqa: E402
import train  # noqa: E402
from data.pictures import DRAWS, random_crop  # noqa: E402

B16 = {
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "layers": 12,
    "heads": 12,
    "projector_hidden": 4096,
    "text_dim": 576,
    "pool_first": False,
    "text_rank": 0,
}
TARGETS = {"step": "at least 1.0 x (goal 1.15)", "pipeline": "at least 2 x",
           "loss": "at most 1/8 of the memory, 1.1 x the time"}


def nothing():
    """What a CPU need not do: wait for a GPU."""


def seconds_of(*works, seconds, synchronize):
    """Median seconds of each of works, run in turns, so that a noisy machine is noisy to all."""
    times = [[] for _ in works]
    while len(times[0]) < 4 or sum(map(sum, times)) < seconds:
        for work, took in zip(works, times):
            started = time.perf_counter()
            work()
            synchronize()
            took.append(time.perf_counter() - started)
    return [float(np.median(took[1:])) for took in times]  # the first warms up


def ceiling(device, dtype, synchronize, rows=2048, width=768, inner=3072):
    """FLOP/s of a large matrix product."""
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(inner, width, device=device).to(dtype)
    best = min(seconds_of(lambda: F.linear(a, b), seconds=2, synchronize=synchronize)[0] for _ in range(3))
    return 2 * rows * width * inner / best


class OpenClipFlame(flame.Flame):
    """The same model around open_clip's vision transformer, its unused final norm taken out."""

    def __init__(self, config):
        super().__init__(config)
        from open_clip.transformer import VisionTransformer
        sizes = {name: config[name] for name in ("image_size", "patch_size", "width", "layers", "heads")}
        self.visual = VisionTransformer(**sizes, mlp_ratio=4, output_dim=512, output_tokens=True)
        self.visual.ln_post = torch.nn.Identity()
        self.visual.proj = None

    def encode_image(self, pixels, kept=None):
        return F.normalize(self.mm(self.visual(pixels)[1]).mean(1).float(), dim=-1)


def bench_step(args, synchronize):
    dtypes = torch.bfloat16, torch.float32
    ceilings = {dtype: ceiling(args.device, dtype, synchronize) for dtype in dtypes}
    pixels = torch.randn(args.batch, 3, 224, 224, device=args.device)
    text = F.normalize(torch.randn(args.batch, 6, B16["text_dim"], device=args.device), dim=-1)
    flops = 3 * train.flops_per_image(B16) * args.batch
    kind = torch.device(args.device).type
    for dtype in dtypes:
        torch.manual_seed(0)
        ours = flame.Flame(B16).to(args.device)
        theirs = OpenClipFlame(B16).to(args.device)
        theirs.load_state_dict(ours.state_dict())
        works = []
        losses = []
        for model in (ours, theirs):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.5,
                                          fused=True)

            def step(model=model, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    image = model.encode_image(pixels)
                loss = train.sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            works.append(step)
        took, reference = seconds_of(*works, seconds=args.seconds, synchronize=synchronize)
        assert abs(losses[0] - losses[1]) < 1e-2 * losses[1], "the two do not compute the same"
        share = flops / took / ceilings[dtype]
        yield (f"step, ViT-B/16, batch {args.batch}, {str(dtype)[6:]}",
               f"{args.batch / took:.2f} images/s ({share:.0%} of {ceilings[dtype] / 1e9:.0f} GFLOP/s)",
               f"open_clip {args.batch / reference:.2f}",
               f"{reference / took:.2f} x")


def photos(n=24, side=512):
    """JPEGs of that side, cut from the photographs that come with scikit-image."""
    from skimage import data
    names = "astronaut", "chelsea", "coffee", "rocket"
    pictures = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        picture = pictures[i % len(pictures)]
        cut = rng.integers(200, min(picture.size))
        x = rng.integers(picture.width - cut + 1)
        y = rng.integers(picture.height - cut + 1)
        square = picture.crop((x, y, x + cut, y + cut)).resize((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        square.save(file, "JPEG", quality=90)
        out.append(file.getvalue())
    return out


def bench_pipeline(args, synchronize):
    from torchvision import transforms as T
    torch.set_num_threads(1)
    files = photos()
    rng = np.random.default_rng(0)
    crop = T.RandomResizedCrop(224, (0.9, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, T.ToTensor(), T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])

    def theirs():
        return torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    def ours(normalise=True):
        pixels = torch.empty(len(files), 3, 224, 224, dtype=torch.uint8)
        for i, file in enumerate(files):
            pixels[i] = random_crop(Image.open(io.BytesIO(file)), 224, 0.9, rng.random(DRAWS))
        return flame.to_pixels(pixels) if normalise else pixels

    works = ours, lambda: ours(False), theirs
    took, loader, reference = seconds_of(*works, seconds=args.seconds, synchronize=nothing)
    yield ("pipeline, 512-px JPEG to 224, one core",
           f"{len(files) / took:.0f} images/s",
           f"torchvision {len(files) / reference:.0f}",
           f"{reference / took:.2f} x")
    yield ("  the part of a loader process (uint8)",
           f"{len(files) / loader:.0f} images/s",
           "",
           f"{reference / loader:.2f} x")


def measure_loss(kind, way, batch, device):
    """In a process of its own: seconds of forward and backward, and peak bytes above the inputs."""
    torch.manual_seed(0)
    cuda = torch.device(device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else nothing
    image = F.normalize(torch.randn(batch, 576, device=device), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(batch, 6, 576, device=device), dim=-1)
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    dense = {"sigmoid": train.sigmoid_loss, "infonce": train.infonce_loss}[kind]

    def work(n):
        if way == "plain":
            loss = dense(image[:n], text[:n], scale, bias)
        else:
            loss = train.BlockwiseLoss.apply(image[:n], text[:n], scale, bias, kind)
        loss.backward()

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated()
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024  # ru_maxrss would begin at the parent's

    work(16)  # libraries are loaded
    before = peak()
    took, = seconds_of(lambda: work(batch), seconds=10, synchronize=synchronize)
    share = 2 * 2 * batch * batch * 6 * 576 / took / ceiling(device, torch.float32, synchronize)
    print(json.dumps({"seconds": took, "peak": peak() - before, "share": share}))


def bench_loss(args, synchronize):
    for kind in ("sigmoid", "infonce"):
        found = {}
        for way in ("blockwise", "plain"):
            command = [sys.executable, __file__, "--measure-loss", kind, way,
                       "--loss-batch", str(args.loss_batch), "--device", args.device]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[way] = json.loads(done.stdout)
        ours = found["blockwise"]
        plain = found["plain"]
        memory = plain["peak"] / max(1, ours["peak"])
        yield (f"loss, {kind}, batch {args.loss_batch}",
               f"{ours['seconds']:.2f} s ({ours['share']:.0%} of ceiling for two products), "
               f"{ours['peak'] / 1e6:.0f} MB",
               f"plain {plain['seconds']:.2f} s ({plain['share']:.0%}), {plain['peak'] / 1e6:.0f} MB",
               f"time {ours['seconds'] / plain['seconds']:.2f} x, memory 1/{memory:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=TARGETS, help="one part")
    parser.add_argument("--batch", type=int, default=16, help="images of a step (16)")
    parser.add_argument("--loss-batch", type=int, default=4096, help="images of a loss (4096)")
    parser.add_argument("--seconds", type=float, default=60, help="least time for each comparison (60)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure-loss", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_loss:
        return measure_loss(*args.measure_loss, args.loss_batch, args.device)
    flame.keep_freed_memory()  # as train.py does; the peers run in the same process and profit too
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else nothing
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          "cores; compared in turns, medians")
    for part, bench in (("step", bench_step), ("pipeline", bench_pipeline), ("loss", bench_loss)):
        if args.only in (None, part):
            print(f"\n{part}: target {TARGETS[part]}")
            for row in bench(args, synchronize):
                print("{:42} {:52} {:36} {}".format(*row), flush=True)


if __name__ == "__main__":
    main()
