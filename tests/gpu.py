"""All that wants a GPU, on one page in about ten minutes. Whoever has one types:

    python tests/gpu.py                           # the table at its end can be pasted into tests/RESULTS.md
    python tests/gpu.py --only attention block    # some of the steps; --help lists them
    python tests/gpu.py --dry-run                 # without a GPU: every step on a stand-in, tiny, untimed

It wants `pip install -e ".[test]"` where nvcc is. A step is a process of its own with a time limit: one that
fails, crashes or hangs says so in a line, and keeps no other from running. Times are medians of ten.
What must be measured for cuda.cu's attention to stay: with FlexAttention a Nemo block of 16,384 tokens takes
at least 5% longer (STAYS), on paper half an hour of CC3M. Else that takes its place in flame.NATIVE.
"""
import argparse
import math
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
from itertools import product
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
from data.intervals import compare  # noqa: E402
from flame import NATIVE, TWINS  # noqa: E402

GPU = torch.device("cuda")
STAYS = 0.05   # of a Nemo block's time, what cuda.cu's attention must save; reasons above
ROUNDS = 12    # of a measurement; the first two warm up
CAPTIONS = 74  # of a packed row: 16,394 tokens
SIDE = 8192    # of the largest matrix product
IMAGES = 384   # of a training step, as published; fewer where they do not fit
SECONDS = 2    # of decoding
STORE = "--rows 2000 --dims 5120 --batches 10"
NEMO = nemo_config(0) | {"vocab_size": 1000}  # one block
SMOLLM2 = NEMO | dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
                      head_dim=64, rope_theta=1e5)
VITS = {"ViT-B/16": {}, "ViT-L/14": dict(patch_size=14, width=1024, layers=24, heads=16)}


class WantsHardware(RuntimeError):
    """What no stand-in for a GPU can do, or a tool that this machine lacks."""


# ---------------------------------------------------------------- what the steps share

def milliseconds(work, calls=1):
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return float(np.median(times[ROUNDS // 6:]))


def output_of(*command, **environment):
    """A command's stdout. Raises RuntimeError with the last line that it said where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tempfile.gettempdir(),
                          env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-150:]}")
    return done.stdout


def random_decoder(config):
    """One block of random bfloat16 weights on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        make_llm(Path(folder), config)
        return flame.load_decoder(folder, 1, GPU)


def states(decoder, forest, kernels, blocks=2):
    """What so many blocks give, all with the weights of the first."""
    blocks = [dict(decoder.blocks[0]) for _ in range(blocks)]
    return flame.decode(decoder._replace(blocks=blocks, kernels=kernels), forest)


def packed_row(captions):
    """Forest of captions of 65 to 195 random tokens, 7 facets; of the prompts a word is a token."""
    def ids(text):
        return [sum(word.encode()) % 1000 for word in text.split()]

    start, end = map(ids, flame.PROMPTS["long"].prefix.split("{}"))
    rng = np.random.default_rng(0)
    lengths = np.linspace(65, 195, captions).astype(int)
    prefixes = [start + rng.integers(1000, size=n).tolist() + end for n in lengths]
    return flame.caption_forest(prefixes, [list(map(ids, flame.FACETS))] * captions)


def kernel_errors(decoder, forest):
    """{kernel: how far the worst state is from the twins', relative to their spread}"""
    twin = states(decoder, forest, TWINS)
    errors = {}
    for name in flame.Kernels._fields[1:]:
        error = states(decoder, forest, TWINS._replace(**{name: getattr(NATIVE, name)})) - twin
        errors[name] = (error.norm(dim=1) / (twin - twin.mean(0)).norm(dim=1)).max().item()
    return errors


def attention_by_flex(forest, device, share):
    """As flame.Kernels wants it, by PyTorch's FlexAttention."""
    T = len(forest.tokens)
    plan = flame.flame_ext.layout(forest.lengths, forest.parents).plan[:3 * T].reshape(-1, 3).T
    # Segments are numbered so that all below one come right after it; of each token first its segment's
    # number, then the last one's below.
    first, last, depth = torch.tensor(plan).to(device)

    def rule(batch, head, q, k):
        return (first[k] <= first[q]) & (first[q] <= last[k]) & (depth[k] <= depth[q])

    mask = flex.create_block_mask(rule, None, None, T, T, device=device)
    run = torch.compile(flex.flex_attention) if device.type == "cuda" else flex.flex_attention

    def attend(q, k, v):
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return run(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return attend


def verdict(ours, flexible, block):
    """ms of attention by cuda.cu, by FlexAttention, and of a block with cuda.cu -> the line."""
    saved = (flexible - ours) / block
    if math.isnan(saved):
        return "no verdict on cuda.cu's attention without the times of all three"
    least, end = ("at least", "stays") if saved >= STAYS else ("less than", "goes")
    return (f"verdict: with FlexAttention a Nemo block would take {saved:.1%} longer, {least} {STAYS:.0%}: "
            f"cuda.cu's attention {end}")


# ---------------------------------------------------------------- the steps: each yields its lines

def card():
    """the GPU"""
    about = torch.cuda.get_device_properties(GPU)
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader -i 0".split()
    driver = output_of(*query).strip() if shutil.which("nvidia-smi") else "unknown"
    yield (f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}, "
           f"driver {driver}, torch {torch.__version__}, {os.cpu_count()} CPU cores")
    if flame.flame_ext is None:
        raise RuntimeError('flame_ext is missing; pip install -v -e ".[test]" shows why')
    warnings.filterwarnings("error", message=".* in place of flame_ext")  # it says why
    yield f"kernels by {random_decoder(SMOLLM2).kernels.name}, as flame.usable_kernels finds after its probe"


def suite():
    """the tests that want a GPU"""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "GPU and not compile"]
    last = output_of(*command, TESTS / "test_kernels.py", TESTS / "test_step.py", CI="").splitlines()[-1]
    if "passed" not in last:
        raise WantsHardware(last)
    yield last


def kernels():
    """kernels against their twins, the worst state of two blocks"""
    for name, config in {"Nemo": NEMO, "SmolLM2": SMOLLM2}.items():
        errors = kernel_errors(random_decoder(config), packed_row(CAPTIONS // 8 + 1))
        wrong = not max(errors.values()) < 0.05  # nor NaN; the probe's own limit
        yield f"{name}: " + "FAILED: " * wrong + ", ".join(f"{k} {e:.2%}" for k, e in errors.items())


def sanitizer():
    """compute-sanitizer's memcheck, two blocks of SmolLM2's shape"""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise WantsHardware("compute-sanitizer is not on PATH")
    script = "import gpu; print(gpu.kernel_errors(gpu.random_decoder(gpu.SMOLLM2), gpu.packed_row(2)))"
    output_of(tool, "--error-exitcode", 9, "--report-api-errors", "no", sys.executable, "-c", script,
              PYTHONPATH=str(TESTS))
    yield "it found nothing"


def ceiling():
    """the largest matrix product in bfloat16"""
    n = SIDE
    a = torch.randn(n, n, device=GPU, dtype=torch.bfloat16)
    yield f"{2e-9 * n**3 / milliseconds(lambda: F.linear(a, a)):.0f} TFLOP/s, {n} x {n} x {n}"


def block_ms(decoder, forest, kernels):
    """Of a whole block: of four less one, as the last is pruned. What attention prepares is left out."""
    config = decoder.config
    attend = kernels.attention(forest, GPU, config["num_attention_heads"] // config["num_key_value_heads"])
    kernels = kernels._replace(attention=lambda *_: attend)
    one, four = (milliseconds(lambda: states(decoder, forest, kernels, n)) for n in (1, 4))
    return (four - one) / 3


def block():
    """a Nemo block of one packed row"""
    decoder = random_decoder(NEMO)
    forest = packed_row(CAPTIONS)
    flops = flops_per_token(decoder.config, 1, pruned=False) * len(forest.tokens)
    ways = {"all kernels": NATIVE, "all by PyTorch": TWINS}
    for name in flame.Kernels._fields[1:]:
        ways[f"{name} by PyTorch"] = NATIVE._replace(**{name: getattr(TWINS, name)})
    for name, kernels in ways.items():
        spent = block_ms(decoder, forest, kernels)
        yield f"{spent:.2f} ms, {name}: {1e-9 * flops / spent:.0f} TFLOP/s of matrix products"


def attention():
    """attention of one packed row, Nemo's heads"""
    heads = NEMO["num_attention_heads"]
    kv_heads = NEMO["num_key_value_heads"]
    forest = packed_row(CAPTIONS)
    shape = len(forest.tokens), heads + 2 * kv_heads, NEMO["head_dim"]
    qkv = torch.randn(shape, device=GPU, dtype=torch.bfloat16).split((heads, kv_heads, kv_heads), dim=1)
    ways = {"the twin in stretches": flame.attention_in_stretches, "cuda.cu": flame.native_attention,
            "FlexAttention": attention_by_flex}
    spent = {}
    expected = None
    for name, prepare in ways.items():
        attend = prepare(forest, GPU, heads // kv_heads)
        out = attend(*qkv).float()
        expected = out if expected is None else expected
        error = (out - expected).norm() / expected.norm()
        if not error < 0.02:  # bfloat16's rounding is half a percent
            raise RuntimeError(f"{name} differs from the twin by {error:.1%}")
        once = milliseconds(lambda: prepare(forest, GPU, heads // kv_heads))
        spent[name] = milliseconds(lambda: attend(*qkv), calls=5)
        yield f"{spent[name]:.2f} ms {name}, {shape[0]} tokens; once a row, before it, {once:.1f} ms"
    whole = block_ms(random_decoder(NEMO), forest, NATIVE)
    yield verdict(spent["cuda.cu"], spent["FlexAttention"], whole)


def training():
    """a training step, D = 5120"""
    D = NEMO["hidden_size"]
    for compiled, (name, vit) in product((False, True), VITS.items()):
        s = bench_train.settings_of(1, **vit)
        train.settle(s, IMAGES, 11, D)
        model, optimizer = train.build(SimpleNamespace(meta={"D": D}), range(11), s, GPU, fit=False)
        train.fit_chunk(model, s, GPU)
        train.distribute(model, compiled)
        n, side, positives = s["chunk"], s["image_size"], s["positives"]
        pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8).pin_memory()
        facets = F.normalize(torch.randn(n, positives, D), dim=-1).half().pin_memory()
        columns = torch.arange(positives).expand(n, -1)
        batch = pixels, facets, columns, torch.ones(n, dtype=torch.bool), None
        run = train.Run(s, Path("out"), None, None, GPU, model, model, optimizer)
        spent = milliseconds(lambda: train.take_step(run, 0, batch))
        yield f"{name}{', --compile' * compiled}: {1e3 * n / spent:.0f} images/s, {n} in {spent:.0f} ms"


def pictures():
    """decoding of pictures, on the CPU"""
    yield ", ".join(next(bench_train.bench_pictures(SimpleNamespace(seconds=SECONDS), int)))


def store():
    """store reads, on the CPU"""
    lines = output_of(sys.executable, TESTS / "bench_store.py", *STORE.split()).splitlines()
    for line in lines[2:]:
        D, cache, *way, rate, times = line.split()
        yield f"D {D}, {cache}, {' '.join(way)}: {rate} rows/s, {times} x"


def demo():
    """the quick demo on the GPU and on the CPU"""
    llm = ROOT / "data/demo/llm"
    make_demo_llm(llm)
    roots = [Path(tempfile.gettempdir(), device) for device in ("GPU", "CPU")]
    for root, environment in zip(roots, ({}, {"CUDA_VISIBLE_DEVICES": ""})):
        (root / "data/demo").mkdir(parents=True)
        (root / "data/demo/llm").symlink_to(llm)
        started = time.time()
        output_of(sys.executable, ROOT / "data/demo.py", "--quick", "--root", root, **environment)
        yield f"{time.time() - started:.0f} s on the {root.name}"
    yield from compare_demos(*roots)


def compare_demos(*roots):
    """Yields how far apart the stores are, and the figures: GPU, CPU, difference."""
    stores = [flame.open_store(root / "data/embeddings/demo-quick") for root in roots]
    on_gpu, on_cpu = (store.read(np.arange(len(store)), range(11)) for store in stores)
    mean = on_cpu.mean(0)
    cosine = torch.cosine_similarity(on_gpu - mean, on_cpu - mean, dim=-1)
    yield f"facets' cosine, their mean subtracted: {cosine.mean():.4f}, at worst {cosine.min():.4f}"
    with redirect_stdout(StringIO()) as printed:
        compare(*(root / "results/quick/demo.json" for root in roots))
    for line in printed.getvalue().splitlines()[1:]:
        if line.startswith("parts/") and "languages" not in line and "top5" not in line:
            yield " ".join(line.removeprefix("parts/").split())


# Seconds that each may take, in this order; together less than 13 minutes.
STEPS = {card: 30, suite: 80, kernels: 40, sanitizer: 80, ceiling: 20, block: 50, attention: 80,
         training: 180, pictures: 20, store: 30, demo: 150}


# ---------------------------------------------------------------- a process a step, and the page

def in_a_process(step, around, pipe):
    """Sends a step's lines, then None. around: a context manager in which it runs."""
    os.setsid()  # so that what it starts can be ended with it
    try:
        with around():
            torch.zeros(1, device=GPU)  # or there is none
            for line in step():
                pipe.send(line)
    except (Exception, SystemExit) as error:
        kind = "wants hardware" if isinstance(error, WantsHardware) else "FAILED"
        pipe.send(f"{kind}: {flame.explained(error)}")
    pipe.send(None)


def lines_of(step, limit, around=nullcontext):
    """Yields a step's lines; it has so many seconds. It is forked, as CUDA begins only there."""
    context = multiprocessing.get_context("fork")
    pipe, writer = context.Pipe(duplex=False)
    process = context.Process(target=in_a_process, args=(step, around, writer))
    process.start()
    writer.close()
    end = time.monotonic() + limit
    try:
        while pipe.poll(max(0, end - time.monotonic())):
            line = pipe.recv()
            if line is None:
                return
            yield line
        yield f"FAILED: not done after {limit} s"
    except EOFError:
        process.join()
        yield f"FAILED: its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def main():
    steps = {step.__name__: step for step in STEPS}
    listed = "\n".join(f"  {name:11}{step.__doc__}, {STEPS[step]} s at most" for name, step in steps.items())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"steps:\n{listed}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=steps, default=list(steps), metavar="STEP")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in for a GPU, tiny, untimed")
    args = parser.parse_args()
    around = nullcontext
    if args.dry_run:
        sys.modules["gpu"] = sys.modules[__name__]  # what it imports, and changes
        from test_gpu import stand_in as around
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # so that what an ended step leaves goes too
        for name in dict.fromkeys(["card", *args.only]):
            for line in lines_of(steps[name], STEPS[steps[name]], around):
                rows.append(f"{steps[name].__doc__} | {line.replace('|', '/')}")
                print(rows[-1].replace(" | ", ": "), flush=True)
    title = "A dry run: no GPU has run any of this" if args.dry_run else "On a GPU"
    print(f"\n## {title}\n\n`python tests/gpu.py`, {date.today()}\n\n| what | measured |\n|---|---|")
    print("\n".join(f"| {row} |" for row in rows))
    return int(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
