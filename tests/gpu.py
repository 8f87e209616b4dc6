"""Runs everything that needs a GPU (and nvcc), in about ten minutes, and prints one page.

    python tests/gpu.py                           # ends with a table to paste into tests/RESULTS.md
    python tests/gpu.py --only attention layer    # some of the steps; --help lists them
    python tests/gpu.py --dry-run                 # without a GPU: tiny steps on a simulated one, no times
"""
import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, redirect_stdout, suppress
from datetime import date
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))
import bench_train  # noqa: E402
import flame  # noqa: E402
import train  # noqa: E402
from bench_embed import flops_per_token, make_llm, nemo_config  # noqa: E402
from data.corpus.llm import make_llm as make_demo_llm  # noqa: E402
from evaluate import compare  # noqa: E402
from flame import EXT_KERNELS, TORCH_KERNELS  # noqa: E402

GPU = torch.device("cuda")
REPEATS = 12       # per measurement; the first two warm up
CAPTIONS = 74      # per packed row: 16,394 tokens
SIDE = 8192        # of the square matrices that are multiplied
IMAGES = 384       # per training step, as in the paper
SECONDS = 2        # duration of the decoding benchmark
NEMO = nemo_config(0) | {"vocab_size": 1000}  # one layer
SMOLLM2 = NEMO | dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
                      head_dim=64, rope_theta=1e5)
VITS = {"ViT-B/16": {}, "ViT-L/14": dict(patch_size=14, width=1024, layers=24, heads=16, micro_batch=128)}


class NeedsHardware(RuntimeError):
    """A simulated GPU cannot do this, or this machine lacks a tool."""


# ---------------------------------------------------------------- helpers of the steps

def milliseconds(work, calls=1):
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return float(np.median(times[REPEATS // 6:]))


def output_of(*command, **environment):
    """Return a command's stdout. Raises RuntimeError with the end of its output if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tempfile.gettempdir(),
                          env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-150:]}")
    return done.stdout


def random_decoder(config):
    """Return a Decoder on the GPU, one layer of random bfloat16 weights."""
    with tempfile.TemporaryDirectory() as folder:
        make_llm(Path(folder), config)
        return flame.load_decoder(folder, 1, GPU)


def states(decoder, forest, kernels, n_layers=2):
    """Return the hidden states after n_layers copies of the decoder's first layer."""
    layers = [dict(decoder.layers[0]) for _ in range(n_layers)]
    return flame.hidden_states(decoder._replace(layers=layers, kernels=kernels), forest)


def packed_row(captions):
    """Return the Forest of captions of 65 to 195 random tokens with 7 facets; a prompt's words are tokens."""
    def ids(text):
        return [sum(word.encode()) % 1000 for word in text.split()]
    start, end = map(ids, flame.PROMPTS["long"].prefix.split("{}"))
    rng = np.random.default_rng(0)
    lengths = np.linspace(65, 195, captions).astype(int)
    prefixes = [start + rng.integers(1000, size=n).tolist() + end for n in lengths]
    return flame.caption_forest(prefixes, [list(map(ids, flame.FACETS))] * captions)


def kernel_errors(decoder, forest):
    """Return {kernel: largest error of a state}, relative to the spread of the PyTorch kernels' states."""
    expected = states(decoder, forest, TORCH_KERNELS)
    spread = (expected - expected.mean(0)).norm(dim=1)
    errors = {}
    for name in flame.Kernels._fields[1:]:
        kernels = TORCH_KERNELS._replace(**{name: getattr(EXT_KERNELS, name)})
        errors[name] = ((states(decoder, forest, kernels) - expected).norm(dim=1) / spread).max().item()
    return errors


def flex_attention(forest, device, group_size):
    """Attention by PyTorch's FlexAttention, with the interface of flame.Kernels.attention."""
    T = len(forest.tokens)
    plan = flame.flame_ext.layout(forest.lengths, forest.parents).plan[:3 * T].reshape(-1, 3).T
    # Segments are numbered depth first: those from `segment` to `last` are a segment and its descendants.
    segment, last, depth = torch.tensor(plan).to(device)

    def visible(batch, head, q, k):
        return (segment[k] <= segment[q]) & (segment[q] <= last[k]) & (depth[k] <= depth[q])
    mask = flex.create_block_mask(visible, None, None, T, T, device=device)
    run = torch.compile(flex.flex_attention) if device.type == "cuda" else flex.flex_attention

    def attend(q, k, v):
        qkv = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return run(*qkv, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return attend


# ---------------------------------------------------------------- the steps, which yield their lines

def device():
    """the GPU"""
    properties = torch.cuda.get_device_properties(GPU)
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader -i 0".split()
    driver = output_of(*query).strip() if shutil.which("nvidia-smi") else "unknown"
    yield (f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}."
           f"{properties.minor}, driver {driver}, torch {torch.__version__}, {os.cpu_count()} CPU cores")
    if flame.flame_ext is None:
        raise RuntimeError('flame_ext is missing; pip install -v -e ".[test]" shows why')
    warnings.filterwarnings("error", message=".* instead of flame_ext")  # the warning gives the reason
    yield f"kernels: {random_decoder(SMOLLM2).kernels.name}, as chosen by flame.choose_kernels"


def tests():
    """the tests that need a GPU"""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "GPU and not compile"]
    last = output_of(*command, TESTS / "test_kernels.py", TESTS / "test_step.py", CI="").splitlines()[-1]
    if "passed" not in last:
        raise NeedsHardware(last)
    yield last


def kernels():
    """kernels against PyTorch, largest error after two layers"""
    for name, config in {"Nemo": NEMO, "SmolLM2": SMOLLM2}.items():
        errors = kernel_errors(random_decoder(config), packed_row(CAPTIONS // 8 + 1))
        wrong = not max(errors.values()) < 0.05  # the limit of choose_kernels; also true for NaN
        yield f"{name}: " + "FAILED: " * wrong + ", ".join(f"{k} {e:.2%}" for k, e in errors.items())


def sanitizer():
    """compute-sanitizer's memcheck, two layers with SmolLM2's sizes"""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise NeedsHardware("compute-sanitizer is not on PATH")
    script = "import gpu; print(gpu.kernel_errors(gpu.random_decoder(gpu.SMOLLM2), gpu.packed_row(2)))"
    output_of(tool, "--error-exitcode", 9, "--report-api-errors", "no", sys.executable, "-c", script,
              PYTHONPATH=str(TESTS))
    yield "no errors"


def matmul():
    """the largest matrix product in bfloat16"""
    a = torch.randn(SIDE, SIDE, device=GPU, dtype=torch.bfloat16)
    yield f"{2e-9 * SIDE**3 / milliseconds(lambda: F.linear(a, a)):.0f} TFLOP/s, {SIDE} x {SIDE} x {SIDE}"


def layer_ms(decoder, forest, kernels):
    """Return the ms of a layer, from four layers less one, since the last is pruned. Excludes the layout."""
    config = decoder.config
    attend = kernels.attention(forest, GPU, config["num_attention_heads"] // config["num_key_value_heads"])
    kernels = kernels._replace(attention=lambda *_: attend)
    one, four = (milliseconds(lambda: states(decoder, forest, kernels, n)) for n in (1, 4))
    return (four - one) / 3


def layer():
    """a Nemo layer on one packed row"""
    decoder = random_decoder(NEMO)
    forest = packed_row(CAPTIONS)
    flops = flops_per_token(decoder.config, 1, pruned=False) * len(forest.tokens)
    variants = {"all kernels": EXT_KERNELS, "all by PyTorch": TORCH_KERNELS}
    for name in flame.Kernels._fields[1:]:
        variants[f"{name} by PyTorch"] = EXT_KERNELS._replace(**{name: getattr(TORCH_KERNELS, name)})
    for name, kernels in variants.items():
        spent = layer_ms(decoder, forest, kernels)
        yield f"{spent:.2f} ms, {name}: {1e-9 * flops / spent:.0f} TFLOP/s of matrix products"


def attention():
    """attention of one packed row with Nemo's heads"""
    heads, kv_heads = NEMO["num_attention_heads"], NEMO["num_key_value_heads"]
    forest = packed_row(CAPTIONS)
    shape = len(forest.tokens), heads + 2 * kv_heads, NEMO["head_dim"]
    qkv = torch.randn(shape, device=GPU, dtype=torch.bfloat16).split((heads, kv_heads, kv_heads), dim=1)
    variants = {"chunked_attention": flame.chunked_attention, "cuda.cu": flame.ext_attention,
                "FlexAttention": flex_attention}
    expected = flame.chunked_attention(forest, GPU, heads // kv_heads)(*qkv).float()
    spent = {}
    for name, prepare in variants.items():
        attend = prepare(forest, GPU, heads // kv_heads)
        error = (attend(*qkv).float() - expected).norm() / expected.norm()
        if not error < 0.02:  # bfloat16 rounds by half a percent
            raise RuntimeError(f"{name} differs from chunked_attention by {error:.1%}")
        preparation = milliseconds(lambda: prepare(forest, GPU, heads // kv_heads))
        spent[name] = milliseconds(lambda: attend(*qkv), calls=5)
        yield f"{spent[name]:.2f} ms {name}, {shape[0]} tokens; preparation {preparation:.1f} ms per row"
    whole = layer_ms(random_decoder(NEMO), forest, EXT_KERNELS)
    saving = (spent["FlexAttention"] - spent["cuda.cu"]) / whole
    yield f"{saving:.1%} of a Nemo layer's time saved by cuda.cu (below 5%, FlexAttention should replace it)"


def training():
    """a training step, D = 5120"""
    D = NEMO["hidden_size"]
    for name, vit in VITS.items():
        s = bench_train.preset_settings(1, **vit)
        train.resolve_settings(s, IMAGES, 11, D)
        model, optimizer = train.build(SimpleNamespace(meta={"D": D}), range(11), s, GPU, images=None)
        n, side, positives = s["micro_batch"], s["image_size"], s["positives"]
        pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8).pin_memory()
        facets = F.normalize(torch.randn(n, positives, D), dim=-1).half().pin_memory()
        columns = torch.arange(positives).expand(n, -1)
        batch = pixels, facets, columns, torch.ones(n, dtype=torch.bool), None
        run = train.Run(s, Path("out"), None, GPU, model, model, optimizer, ())
        spent = milliseconds(lambda: train.train_step(run, 0, batch))
        yield f"{name}: {1e3 * n / spent:.0f} images/s, {n} in {spent:.0f} ms"


def images():
    """decoding of images, on the CPU"""
    yield ", ".join(next(bench_train.bench_images(SimpleNamespace(seconds=SECONDS), int)))


def demo():
    """the quick demo on the GPU and on the CPU"""
    llm = ROOT / "data/demo/llm"
    make_demo_llm(llm)
    roots = [Path(tempfile.gettempdir(), name) for name in ("GPU", "CPU")]
    for root, environment in zip(roots, ({}, {"CUDA_VISIBLE_DEVICES": ""})):
        (root / "data/demo").mkdir(parents=True)
        (root / "data/demo/llm").symlink_to(llm)
        start = time.time()
        output_of(sys.executable, ROOT / "data/demo.py", "--quick", "--root", root, **environment)
        yield f"{time.time() - start:.0f} s on the {root.name}"
    yield from compare_demos(*roots)


def compare_demos(*roots):
    """Yield how much the stores differ, and the scores: GPU, CPU, difference."""
    stores = [flame.open_store(root / "data/embeddings/demo-quick") for root in roots]
    on_gpu, on_cpu = (store.read(np.arange(len(store)), range(11)) for store in stores)
    mean = on_cpu.mean(0)
    cosine = torch.cosine_similarity(on_gpu - mean, on_cpu - mean, dim=-1)
    yield f"cosine of centered facets: mean {cosine.mean():.4f}, minimum {cosine.min():.4f}"
    with redirect_stdout(StringIO()) as printed:
        compare(*(root / "results/quick/demo.json" for root in roots))
    for line in printed.getvalue().splitlines()[1:]:
        if line.startswith("parts/") and "languages" not in line and "top5" not in line:
            yield " ".join(line.removeprefix("parts/").split())


# The steps, in this order, yield lines. Their time limits in seconds: less than 13 minutes in total.
STEPS = {device: 30, tests: 80, kernels: 40, sanitizer: 80, matmul: 20, layer: 50, attention: 80,
         training: 180, images: 20, demo: 150}


# ---------------------------------------------------------------- processes, and the page

def run_step(step, limit, context=nullcontext):
    """Yield a step's lines, for at most `limit` seconds. Only the forked process initializes CUDA."""
    def send_lines():
        os.setsid()  # a process group, to kill its children with it
        try:
            with context():
                torch.zeros(1, device=GPU)  # raises without a GPU
                for line in step():
                    writer.send(line)
        except (Exception, SystemExit) as error:
            kind = "needs hardware" if isinstance(error, NeedsHardware) else "FAILED"
            writer.send(f"{kind}: {flame.describe_error(error)}")
        writer.send(None)
    fork = multiprocessing.get_context("fork")
    pipe, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=send_lines)
    process.start()
    writer.close()
    end = time.monotonic() + limit
    try:
        while pipe.poll(max(0, end - time.monotonic())):
            line = pipe.recv()
            if line is None:
                return
            yield line
        yield f"FAILED: not finished after {limit} s"
    except EOFError:
        process.join()
        yield f"FAILED: its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def main():
    steps = {step.__name__: step for step in STEPS}
    listed = "\n".join(f"  {name:11}{step.__doc__}, at most {STEPS[step]} s" for name, step in steps.items())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"steps:\n{listed}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=steps, default=list(steps), metavar="STEP", help="steps (default: all)")
    add("--dry-run", action="store_true", help="simulate a GPU: tiny steps, no times")
    args = parser.parse_args()
    context = nullcontext
    if args.dry_run:
        sys.modules["gpu"] = sys.modules[__name__]  # test_gpu must patch this module and not a second copy
        from test_gpu import simulated_gpu as context
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # also removes the files of killed steps
        for name in dict.fromkeys(["device", *args.only]):
            for line in run_step(steps[name], STEPS[steps[name]], context):
                rows.append(f"{steps[name].__doc__} | {line.replace('|', '/')}")
                print(rows[-1].replace(" | ", ": "), flush=True)
    title = "A dry run: no GPU has run any of this" if args.dry_run else "On a GPU"
    print(f"\n## {title}\n\n`python tests/gpu.py`, {date.today()}\n\n| what | measured |\n|---|---|")
    print("\n".join(f"| {row} |" for row in rows))
    return int(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
