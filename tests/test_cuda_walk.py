"""The lines of embed.py, train.py and evaluate.py that only a GPU runs, run without one: see cuda_shim.py."""
import json
import linecache
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import embed
import evaluate
import flame
import train
from cuda_shim import Gpus, patch_driver, patch_tensors
from test_compat import small_clip  # noqa: F401  (a fixture)
from test_embed import ROWS, write_tsv
from test_train import SMALL, entries, fit, losses, make_pictures, one_line, run, small, weights  # noqa: F401

# The shim takes the driver's place, which must not be there. With a GPU, test_ext and test_train run on it.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU to run on")

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
TESTS = str(Path(__file__).resolve().parent)


@pytest.fixture
def gpu(monkeypatch):
    shim = Gpus()
    patch_driver(monkeypatch, shim)
    patch_tensors(monkeypatch, shim)
    if flame.flame_ext:
        monkeypatch.setattr(flame.flame_ext, "cuda", False)  # its kernels want addresses on a GPU
    with shim:
        yield shim


@pytest.fixture
def float32(monkeypatch):
    """Both devices compute alike: in float32, without the extension, in equal packed rows and windows."""
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(flame, "flame_ext", None)
    monkeypatch.setattr(flame, "BUDGET", {"cpu": 512, "cuda": 512})
    monkeypatch.setattr(embed, "WINDOW", {"cpu": 5, "cuda": 5})


@contextmanager
def lines_run():
    """-> a set that holds, afterwards, the text of the project's lines that this thread has run."""
    seen = set()
    texts = set()

    def trace(frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(ROOT) or file.startswith(TESTS):
            return None
        seen.add((file, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield texts
    finally:
        sys.settrace(before)
        texts.update(linecache.getline(*place).strip() for place in seen)


def test_the_shim_refuses_what_cuda_refuses(gpu):
    x = torch.arange(4.0, device="cuda")
    y = torch.ones(4, device="cuda:1")
    here = torch.ones(4)
    number = torch.tensor(2.0)
    assert x.is_cuda and torch.zeros_like(y).device == y.device == torch.device("cuda:1")
    assert (x * number).tolist() == [0, 2, 4, 6] and x[torch.tensor([3, 1])].tolist() == [3, 1]
    x[here > 0] = 5.0
    assert x.copy_(y).sum().item() == 4 and here.copy_(x).sum() == 4 and not x.cpu().is_cuda
    for refused in (lambda: x + here, lambda: here.add_(x), lambda: number.add_(x[0]), lambda: x @ here,
                    lambda: here[x.long()], lambda: torch.stack([x[0], number]), lambda: x + y,
                    lambda: torch.where(x > 0, x, here), lambda: F.linear(x, here[None]),
                    lambda: x.gather(0, here.long())):
        with pytest.raises(RuntimeError, match="same device"):
            refused()
    for refused in (x.numpy, x.pin_memory, lambda: np.asarray(x)):
        with pytest.raises((RuntimeError, TypeError)):
            refused()


# --- stage 1

def embed_on(device, llm, *flags):
    """embed.py in the working folder -> the files of its store that hold numbers."""
    out = Path(device.replace(":", "-"))
    command = ["--captions", write_tsv(Path("captions.tsv"), ROWS), "--llm", llm, "--out", out]
    sys.argv = ["embed.py", *map(str, command), "--device", device, "--dtype", "float32", *flags]
    embed.main()
    return {path.name: path.read_bytes() for path in out.glob("*.npy")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


def kernels(checked):
    """In flame_ext's place: its kernels' arguments are looked at, their PyTorch twins compute."""
    def layout(lengths, parents, tile):
        forest = flame.Forest(None, None, lengths, parents, None)
        return SimpleNamespace(plan=np.arange(3, dtype=np.int32), forest=forest)

    def twin(function, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flame, "native", lambda device, dtype: False)
            return function(*arguments)

    def look(name, stream, *tensors):
        assert all(x.is_cuda for x in tensors if x is not None) and stream == 7
        checked.add(name)

    def attention(q, k, v, out, layout, scale, plan, stream):
        look("attention", stream, q, k, v, out, plan)
        attend = twin(flame.attention_over, layout.forest, q.device, q.dtype, q.shape[1] // k.shape[1])
        out.copy_(attend(q, k, v))

    def rope(qkv, cos, sin, heads, stream):
        look("rope", stream, qkv, cos, sin)
        twin(flame.rope, qkv, cos, sin, heads)

    def rmsnorm(x, weight, out, eps, update, stream):
        look("rmsnorm", stream, x, weight, out, update)
        out.copy_(twin(flame.add_and_norm, x, update, weight, eps, out.dtype))

    def swiglu(gate_up, out, stream):
        look("swiglu", stream, gate_up, out)
        out.copy_(twin(flame.swiglu, gate_up))

    return SimpleNamespace(cuda=True, layout=layout, attention=attention, rope=rope, rmsnorm=rmsnorm,
                           swiglu=swiglu)


EMBED = ["return x.pin_memory().to(device, non_blocking=True) if device.type == \"cuda\" else x",
         "units.copy_(on_device, non_blocking=True)", "copied.synchronize()",
         "following = thread.submit(next, items, None)"]
NATIVE = ["plan = move(torch.tensor(layout.plan), device) if gpu else None",
          "flame_ext.attention(q, k, v, out, layout, q.shape[-1] ** -0.5, plan, stream_of(device))"]
QWEN = ["norm_heads(qkv, block[\"qk_norm\"], eps)"]


@pytest.mark.parametrize("family, store, device, native, lines", [
    ("Llama", "float16", "cuda", False, EMBED),
    ("Llama", "float16", "cuda:1", True, EMBED + NATIVE),
    ("Qwen3", "int8", "cuda", False, EMBED + QWEN),
], ids=["twin", "kernel-on-the-second-gpu", "qwen-int8"])
def test_a_store_made_on_the_gpu(here, gpu, float32, make_random_llm, monkeypatch,
                                 family, store, device, native, lines):
    """The same bytes as on the CPU; an event for each packed row, recorded and waited for."""
    llm = make_random_llm(family, **{"head_dim": 12} if family == "Qwen3" else {})
    expected = embed_on("cpu", llm, "--store", store)
    rows = []
    checked = set()
    start = embed.start
    monkeypatch.setattr(embed, "start", lambda *args: rows.append(0) or start(*args))
    monkeypatch.setattr(flame, "flame_ext", kernels(checked) if native else None)
    with lines_run() as seen:
        found = embed_on(device, llm, "--store", store)
    assert found == expected and set(lines) <= seen, set(lines) - seen
    assert len(rows) == gpu.recorded == gpu.waited > 15  # 5 windows, 3 prompt sets
    assert checked == ({"attention", "rope", "rmsnorm", "swiglu"} if native else set())


def test_a_mistake_in_stage_1_is_found(here, gpu, float32, tiny_llm, monkeypatch):
    expected = embed_on("cpu", tiny_llm)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: None)
    try:
        found = embed_on("cuda", tiny_llm)
    except SystemExit:  # what lies there before the copy may be no number, and is refused
        found = None
    assert found != expected
    monkeypatch.setattr(flame, "move", lambda x, device: x)
    with pytest.raises(RuntimeError, match="same device"):
        embed_on("cuda", tiny_llm, "--overwrite")


def test_plan_on_the_gpu(here, gpu, float32, tiny_llm, capsys):
    embed_on("cuda", tiny_llm, "--plan", "1000000")
    assert "as 1000000" in capsys.readouterr().out


# --- stage 2

TRAIN = ["torch.cuda.set_device(there)", "mixed = F.scaled_dot_product_attention(q, k, v)"]
MEMORY = ["room = 0.8 * (gpu or torch.cuda.get_device_properties(device).total_memory)"]


@pytest.mark.parametrize("device, flags", [
    ("cuda", "--loss sigmoid --accumulate 1 --text-projection none+linear:4 --holdout 4 --eval-every 2"),
    ("cuda:1", "--loss infonce --accumulate 2 --gradient-checkpointing --text-projection whiten+linear "
               "--clip-grad 1 --ema 0.9"),
    ("cuda", "--loss infonce-slots --no-pool-first --patch-dropout 0 --text-projection agree"),
], ids=["sigmoid", "chunks-on-the-second-gpu", "chunks-by-memory"])
def test_training_on_the_gpu(run, small, tmp_path, gpu, float32, device, flags):  # noqa: F811
    """The same losses and the same curve as on the CPU."""
    assert fit(run, small[0], f"--steps 6 --name cpu --device cpu {flags}").returncode == 0
    with lines_run() as seen:
        done = fit(run, small[0], f"--steps 6 --name gpu --device {device} {flags}")
    assert done.returncode == 0 and "MFU" in done.stderr, done.stderr
    assert "minutes for all steps" in done.stdout
    lines = TRAIN if "--accumulate" in flags else TRAIN + MEMORY
    assert set(lines) <= seen, set(lines) - seen
    ours = tmp_path / "out" / "gpu"
    theirs = tmp_path / "out" / "cpu"
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    curve = [entry.get("held_out_R@1") for entry in entries(ours)]
    assert curve == [entry.get("held_out_R@1") for entry in entries(theirs)]
    assert any(curve) == ("holdout" in flags)


def test_in_bfloat16_by_a_loaders_process(run, small, tmp_path, gpu):  # noqa: F811
    """autocast, batches pinned by the loader's thread; near what float32 says on the CPU."""
    flags = "--steps 4 --workers 1 --gradient-checkpointing --accumulate"
    for n in (1, 2):
        done = fit(run, small[0], f"--name {n} --device cuda {flags} {n}")
        assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flame, "default_dtype", lambda device: torch.float32)
        fit(run, small[0], f"--name cpu --device cpu {flags} 1")
    for n in "12":
        assert losses(tmp_path / "out" / n) != losses(tmp_path / "out" / "cpu")
        np.testing.assert_allclose(losses(tmp_path / "out" / n), losses(tmp_path / "out" / "cpu"), rtol=2e-2)


def test_a_run_on_the_gpu_goes_on(run, small, tmp_path, gpu, float32, monkeypatch):  # noqa: F811
    flags = "--steps 4 --device cuda --ema 0.9 --name"
    fit(run, small[0], f"{flags} whole")
    monkeypatch.setattr(train, "STOP", [True])
    assert "stopped" in fit(run, small[0], f"{flags} part").stdout
    monkeypatch.setattr(train, "STOP", [])
    assert "going on from step 1" in fit(run, small[0], f"{flags} part").stdout
    assert weights(tmp_path / "out" / "part") == weights(tmp_path / "out" / "whole")


def test_a_full_gpu_is_one_line(run, small, gpu):  # noqa: F811
    gpu.room = 20_000
    one_line(fit(run, small[0], "--device cuda --steps 2"), "out of memory on cuda", "--accumulate 2")


def test_a_full_gpu_is_one_line_in_the_other_stages(here, gpu, byte_llm, trained, monkeypatch, capsys):
    gpu.room = 1000
    with pytest.raises(SystemExit, match="2"):
        embed_on("cuda", byte_llm)
    assert capsys.readouterr().err.splitlines()[-1].startswith("embed.py: out of memory on the GPU; ")
    assert not Path("cuda").exists()
    monkeypatch.chdir(trained)
    assert evaluate.main(["--captions", "mine.tsv", "--device", "cuda", "--out", str(here / "results")]) == 2
    assert capsys.readouterr().err.startswith("evaluate.py: out of memory on the GPU; ")


def test_a_mistake_in_stage_2_is_found(run, small, gpu, monkeypatch):  # noqa: F811
    to_pixels = flame.to_pixels
    monkeypatch.setattr(flame, "to_pixels", lambda image: to_pixels(image.cpu()))
    with pytest.raises(RuntimeError, match="same device"):
        fit(run, small[0], "--device cuda --steps 2")


# --- stage 3

@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llm):
    """A folder with pictures, captions, a store of them, and a checkpoint, all made on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures = make_pictures(folder)
        table = [f"{key}\t{key}.png\t{color}\ta {color} thing\tA {color} thing {i}, in some detail.\n"
                 for i, (key, color) in enumerate(pictures.items())]
        Path("mine.tsv").write_text("key\timage\traw\tshort\tlong\n" + "".join(table))
        patch.setattr(sys, "argv", ["embed.py", "--captions", "mine.tsv", "--llm", str(tiny_llm),
                                    "--device", "cpu", "--dtype", "float32"])
        embed.main()
        flags = ["--device", "cpu", "--steps", "8", "--text-projection", "whiten+linear"]
        assert train.main([*flags, *SMALL]) == 0
        for half in ("train", "test"):
            for key, color in pictures.items():
                path = folder / "data" / "imagefolder" / half / color / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((folder / f"{key}.png").read_bytes())
    return folder


def evaluate_on(device, out, capsys, *flags):
    """evaluate.py -> (what it printed, {file: result})."""
    code = evaluate.main([*flags, "--device", device, "--out", str(out)])
    told = capsys.readouterr()
    assert code == 0, told.err
    told = told.out.replace(str(out), "OUT").replace(f"device {device}", "")
    return told, {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("flags", [
    ["--captions", "mine.tsv", "--facets", "--report"], ["--bench", "imagefolder", "--probe"],
    ["--bench", "imagefolder"], ["--search", "a red thing", "p001.png", "--images", "data/imagefolder/test"],
    ["--words", "p003.png"]], ids=lambda flags: flags[0] + flags[-1])
def test_the_same_figures_on_the_gpu(trained, gpu, float32, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(trained)
    expected = evaluate_on("cpu", tmp_path / "cpu", capsys, *flags)
    assert evaluate_on("cuda:1", tmp_path / "gpu", capsys, *flags) == expected


def test_a_checkpoint_in_bfloat16_on_the_gpu(trained, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    _, found = evaluate_on("cuda", tmp_path, capsys, "--captions", "mine.tsv")
    assert 0 < found["mine.json"]["text_to_image"]["R@10"] <= 100


def test_open_clip_on_the_gpu(trained, small_clip, gpu, float32, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(trained)
    flags = ["--captions", "mine.tsv", "--open-clip", small_clip]
    expected = evaluate_on("cpu", tmp_path / "cpu", capsys, *flags)
    assert evaluate_on("cuda:1", tmp_path / "gpu", capsys, *flags) == expected


def test_from_python_on_the_gpu(trained, tiny_llm, gpu, float32, monkeypatch):
    monkeypatch.chdir(trained)
    scores = []
    for device in ("cpu", "cuda"):
        encoder = flame.TextEncoder(tiny_llm, device, torch.float32)
        model = flame.load("out/mine").to(device)
        image = model.encode_image(["p000.png", "p001.png"])
        facets = model.encode_text(encoder.encode(["a red thing", "a blue one"]), "long")
        scores.append(flame.similarity(image, facets).tolist())
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)
