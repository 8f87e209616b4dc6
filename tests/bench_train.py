"""How fast is training, against open_clip and torchvision? One table; nothing is asserted.

    python tests/bench_train.py                    # some minutes on 2 CPU cores
    python tests/bench_train.py --only loss        # step, pictures or loss

    step       forward, loss, backward and AdamW of the cc3m preset: flame.Flame against open_clip's
               VisionTransformer with the same projector, loss, precision and batch, in turns
    pictures   one core: 512-px JPEGs to a normalised batch at 224 px, against torchvision's
               RandomResizedCrop, ToTensor, Normalize; and what a loader's process makes of files
    loss       forward and backward of 6 positives, D = 576, all logits at once and in blocks, each in a
               process of its own: CPU seconds of all threads (on a GPU seconds), peak memory above the inputs
"""
import argparse
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flame  # noqa: E402
import train  # noqa: E402
from data.pictures import DRAWS, Batches, random_crop  # noqa: E402

SIZES = "image_size", "patch_size", "width", "layers", "heads"


def seconds_of(*works, seconds, synchronize=int, clock=time.perf_counter):
    """Median seconds of each of works, run in turns, so that a noisy machine is noisy to all."""
    times = [[] for _ in works]
    while len(times[0]) < 4 or sum(map(sum, times)) < seconds:
        for work, took in zip(works, times):
            started = clock()
            work()
            synchronize()
            took.append(clock() - started)
    return [float(np.median(took[1:])) for took in times]  # the first warms up


def settings_of(preset, **changes):
    return {name: row[preset] for name, row in train.SETTINGS.items()} | changes


def open_clip_tower(ours, sizes):
    """open_clip's vision transformer in the image tower's place, its unused final norm taken out."""
    from open_clip.transformer import VisionTransformer
    tower = VisionTransformer(**sizes, mlp_ratio=4, output_dim=512, output_tokens=True)
    tower.ln_post, tower.proj, forward = torch.nn.Identity(), None, tower.forward
    tower.load_state_dict(ours.state_dict())
    tower.forward = lambda pixels, kept: F.pad(forward(pixels)[1], (0, 0, 1, 0))  # the class token
    return tower


def bench_step(args, synchronize):
    pixels = torch.randn(args.batch, 3, 224, 224, device=args.device)
    text = F.normalize(torch.randn(args.batch, 6, 576, device=args.device), dim=-1)
    for dtype in (torch.bfloat16, torch.float32):
        store = SimpleNamespace(meta={"D": 576})
        ours, _ = train.build(store, range(11), settings_of(1), torch.device("cpu"), fit=False)
        theirs = copy.deepcopy(ours)
        theirs.visual = open_clip_tower(ours.visual, {name: ours.config[name] for name in SIZES})
        works = []
        losses = []
        for model in (ours.to(args.device), theirs.to(args.device)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.5, fused=True)

            def step(model=model, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    image = model(pixels)
                loss = train.sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            works.append(step)
        took, reference = seconds_of(*works, seconds=args.seconds, synchronize=synchronize)
        assert abs(losses[0] - losses[1]) < 1e-2 * losses[1], "the two do not compute the same"
        yield (f"step, ViT-B/16, batch {args.batch}, {str(dtype)[6:]}", f"{args.batch / took:.2f} images/s",
               f"open_clip {args.batch / reference:.2f}", f"{reference / took:.2f} x")


def photos(n, side, kind):
    """n files' bytes of that side, cut from the photographs that come with scikit-image."""
    from skimage import data
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        picture = Image.fromarray(getattr(data, ("astronaut", "chelsea", "coffee", "rocket")[i % 4])())
        cut = rng.integers(200, min(picture.size))
        x, y = (rng.integers(length - cut + 1) for length in picture.size)
        square = picture.crop((x, y, x + cut, y + cut)).resize((side, side), Image.Resampling.LANCZOS)
        square.save(file := io.BytesIO(), kind, quality=90)
        out.append(file.getvalue())
    return out


def bench_pictures(args, synchronize):
    from torchvision import transforms as T
    torch.set_num_threads(1)
    files = photos(24, 512, "JPEG")
    rng = np.random.default_rng(0)
    crop = T.RandomResizedCrop(224, (0.9, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, T.ToTensor(), T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])

    def theirs():
        return torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    def ours():
        crops = [random_crop(Image.open(io.BytesIO(file)), 224, 0.9, rng.random(DRAWS)) for file in files]
        return flame.to_pixels(torch.stack(crops))

    took, reference = seconds_of(ours, theirs, seconds=args.seconds, synchronize=synchronize)
    yield ("512-px JPEG to 224, one core", f"{len(files) / took:.0f} images/s",
           f"torchvision {len(files) / reference:.0f}", f"{reference / took:.2f} x")
    for preset, side, kind in ((1, 512, "JPEG"), (0, 96, "PNG")):
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}" for i in range(64)]
            for path, data in zip(paths, photos(64, side, kind)):
                Path(path).write_bytes(data)
            places = np.stack([np.arange(64), np.zeros(64, int), np.full(64, -1)], axis=1)
            facets = torch.randn(64, 6, 576).half()
            store = SimpleNamespace(keys=paths, take=lambda rows, columns: facets)
            s = settings_of(preset, batch=64)
            batches = Batches(store, range(11), (np.arange(64), paths, places), s)
            took, = seconds_of(lambda: batches[0], seconds=args.seconds / 4, synchronize=synchronize)
        yield f"a loader's process, {side}-px {kind}", f"{64 / took:.0f} images/s", "", ""


def measure_loss(kind, batch, logits, device):
    """In a process of its own: seconds of forward and backward, and peak bytes above the inputs."""
    cuda = torch.device(device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else int
    image = F.normalize(torch.randn(batch, 576, device=device), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(batch, 6, 576, device=device), dim=-1)
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    train.LOGITS = logits

    def work(n):
        train.LOSSES[kind](image[:n], text[:n], scale, bias).backward()

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated()
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024  # ru_maxrss would begin at the parent's

    work(16)  # libraries are loaded
    before = peak()
    clock = time.perf_counter if cuda else time.process_time
    took, = seconds_of(lambda: work(batch), seconds=1, synchronize=synchronize, clock=clock)
    print(json.dumps([took, peak() - before]))


def bench_loss(args, synchronize):
    for batch in (256, 3072, 4096):
        for kind in train.LOSSES:
            shown = []
            for logits in (1 << 62, train.LOGITS, 1 << 22):
                command = [sys.executable, __file__, "--loss", kind, str(batch), str(logits), args.device]
                took, peak = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                shown.append(f"{took * 1000:.0f} ms, {peak / 1e6:.0f} MB")
            yield (f"loss, {kind}, {batch} x 6", f"dense {shown[0]}", f"as trained {shown[1]}",
                   f"blocks of 4 M {shown[2]}")


def main():
    if sys.argv[1:2] == ["--loss"]:
        return measure_loss(sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5])
    benches = {"step": bench_step, "pictures": bench_pictures, "loss": bench_loss}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=benches, help="one part")
    parser.add_argument("--batch", type=int, default=16, help="images of a step (16)")
    parser.add_argument("--seconds", type=float, default=20, help="least time for each comparison (20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    flame.keep_freed_memory()  # as train.py does; the peers run in the same process and profit too
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else int
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          "cores; compared in turns, medians")
    for part, bench in benches.items():
        if args.only in (None, part):
            for row in bench(args, synchronize):
                print("{:50} {:28} {:30} {}".format(*row), flush=True)


if __name__ == "__main__":
    main()
