"""Speed of training, against open_clip and torchvision. Prints a table; takes a few minutes on 2 CPU cores.

    python tests/bench_train.py --only step      # a training step of the cc3m preset, against open_clip's ViT
    python tests/bench_train.py --only images    # JPEGs to a batch, against torchvision's transforms
"""
import argparse
import copy
import io
import os
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
from data.images import CROP_DRAWS, Batches, group_by_image, random_crop  # noqa: E402

SIZES = "image_size", "patch_size", "width", "layers", "heads"


def median_times(*works, seconds, synchronize=int, clock=time.perf_counter):
    """Return the median seconds of each work. They take turns, so noise of the machine affects all alike."""
    times = [[] for _ in works]
    while len(times[0]) < 4 or sum(map(sum, times)) < seconds:
        for work, spent in zip(works, times):
            start = clock()
            work()
            synchronize()
            spent.append(clock() - start)
    return [float(np.median(spent[1:])) for spent in times]  # the first run warms up


def preset_settings(preset, **changes):
    """Return the settings of a preset. preset: 0 for demo, 1 for cc3m."""
    return {name: row[preset] for name, row in train.SETTINGS.items()} | changes


def open_clip_tower(ours, sizes):
    """Return open_clip's vision transformer with our weights and interface, without its unused final norm."""
    from open_clip.transformer import VisionTransformer
    tower = VisionTransformer(**sizes, mlp_ratio=4, output_dim=512, output_tokens=True)
    tower.ln_post, tower.proj, forward = torch.nn.Identity(), None, tower.forward
    tower.load_state_dict(ours.state_dict())
    tower.forward = lambda pixels, kept: F.pad(forward(pixels)[1], (0, 0, 1, 0))  # a dummy class token
    return tower


def bench_step(args, synchronize):
    pixels = torch.randn(args.batch, 3, 224, 224, device=args.device)
    text = F.normalize(torch.randn(args.batch, 6, 576, device=args.device), dim=-1)
    for dtype in (torch.bfloat16, torch.float32):
        store = SimpleNamespace(meta={"D": 576})
        ours, _ = train.build(store, range(11), preset_settings(1), torch.device("cpu"), False)
        theirs = copy.deepcopy(ours)
        theirs.visual = open_clip_tower(ours.visual, {name: ours.config[name] for name in SIZES})
        works, losses = [], []
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
        spent, reference = median_times(*works, seconds=args.seconds, synchronize=synchronize)
        assert abs(losses[0] - losses[1]) < 1e-2 * losses[1], "the two losses differ"
        yield (f"step, ViT-B/16, batch {args.batch}, {str(dtype)[6:]}", f"{args.batch / spent:.2f} images/s",
               f"open_clip {args.batch / reference:.2f}", f"{reference / spent:.2f} x")


def make_photos(n, side, format):
    """Return the bytes of n image files, random square crops of scikit-image's photographs."""
    from skimage import data
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        photo = Image.fromarray(getattr(data, ("astronaut", "chelsea", "coffee", "rocket")[i % 4])())
        crop = rng.integers(200, min(photo.size))
        x, y = (rng.integers(length - crop + 1) for length in photo.size)
        square = photo.crop((x, y, x + crop, y + crop)).resize((side, side), Image.Resampling.LANCZOS)
        square.save(file := io.BytesIO(), format, quality=90)
        out.append(file.getvalue())
    return out


def bench_images(args, synchronize):
    from torchvision import transforms as T
    torch.set_num_threads(1)
    files = make_photos(24, 512, "JPEG")
    rng = np.random.default_rng(0)
    crop = T.RandomResizedCrop(224, (0.9, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, T.ToTensor(), T.Normalize(flame.CLIP_MEAN, flame.CLIP_STD)])

    def theirs():
        return torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    def ours():
        images = map(Image.open, map(io.BytesIO, files))
        crops = [random_crop(image, 224, 0.9, rng.random(CROP_DRAWS)) for image in images]
        return flame.normalize_pixels(torch.stack(crops))

    spent, reference = median_times(ours, theirs, seconds=args.seconds, synchronize=synchronize)
    yield ("512-px JPEG to 224, one core", f"{len(files) / spent:.0f} images/s",
           f"torchvision {len(files) / reference:.0f}", f"{reference / spent:.2f} x")
    for preset, side, format in ((1, 512, "JPEG"), (0, 96, "PNG")):
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}" for i in range(64)]
            for path, data in zip(paths, make_photos(64, side, format)):
                Path(path).write_bytes(data)
            spans = np.stack([np.arange(64), np.zeros(64, int), np.full(64, 1 << 30)], axis=1)
            facets = torch.randn(64, 6, 576).half()
            store = SimpleNamespace(keys=paths, read_float16=lambda rows, columns: facets)
            s = preset_settings(preset, batch=64)
            batches = Batches(store, range(11), group_by_image(np.arange(64), paths, spans), s)
            spent, = median_times(lambda: batches[0], seconds=args.seconds / 4, synchronize=synchronize)
        yield f"a loader process, {side}-px {format}", f"{64 / spent:.0f} images/s", "", ""


def main():
    benches = {"step": bench_step, "images": bench_images}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=benches, help="run one part only")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--seconds", type=float, default=20, help="minimum time per comparison (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    flame.keep_freed_memory()  # as train.py does; open_clip and torchvision profit, too
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else int
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          "cores; medians of alternating runs")
    for part, bench in benches.items():
        if args.only in (None, part):
            for row in bench(args, synchronize):
                print("{:50} {:28} {:30} {}".format(*row), flush=True)


if __name__ == "__main__":
    main()
