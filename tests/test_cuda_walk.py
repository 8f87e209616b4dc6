"""The lines of embed.py, train.py and evaluate.py that only a GPU runs, run without one.

A shim stands in for two GPUs. Its tensors say that they lie on cuda:0 or cuda:1, hold a CPU tensor and do
every operation with that; where CUDA would refuse a tensor of another device, so do they. What a copy that
nobody waits for brings back is NaN until an event of that GPU, or another copy, is waited for. So a wrong
device or a missing wait is found here. What is not: how a GPU's own kernels compute (test_cuda_emulated.py
runs those of ext/), several ranks by NCCL, torch.compile, and autocast beyond the four functions that the ViT
calls.
"""
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import embed
import evaluate
import flame
import train
from test_compat import small_clip  # noqa: F401  (a fixture)
from test_embed import ROWS, write_tsv
from test_train import SMALL, entries, fit, losses, make_pictures, one_line, run, small, weights  # noqa: F401

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
TESTS = str(Path(__file__).resolve().parent)
META = torch.device("meta")
aten = torch.ops.aten


# --- the shim

class OnGpu(torch.Tensor):
    """A tensor on a GPU of the shim. `held` has its numbers. Its own memory is none (meta), so that nothing
    can read past the shim, and has the strides that autograd asks for."""

    device = property(lambda self: self.place)
    is_cuda = True
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, place):
        size = held.untyped_storage().nbytes() // held.element_size()
        with torch.inference_mode(False):  # a view in inference mode may be of a parameter
            memory = torch.empty(size, dtype=held.dtype, device=META)
            like = memory.as_strided(held.shape, held.stride(), held.storage_offset())
            made = torch.Tensor._make_subclass(cls, like, False)
        made.held = held
        made.place = place
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of the shim's tensors by a thread that has no shim")

    def __setitem__(self, index, value):  # C++ would make a number a tensor on meta
        super().__setitem__(index, value if isinstance(value, torch.Tensor) else torch.tensor(value))

    def __reduce_ex__(self, protocol):    # torch.save
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()


class Gpus(TorchDispatchMode):
    """While it is on, tensors for cuda are OnGpu's, and so is what comes of them."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()
        self.room = float("inf")  # bytes of the largest tensor that fits
        self.current = 0          # which of them is meant where none is named
        self.late = {}            # a copy on its way: (tensor on the CPU, what it will hold, from where)
        self.copies = 0
        self.recorded = 0
        self.waited = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | (kwargs or {})
        tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        to = given.get("device")
        place = self.place(to, ours)
        if to is not None:
            given["device"] = torch.device("cpu")
        if "pin_memory" in given:
            given["pin_memory"] = False
        if ours:
            self.check(func, given, tensors)
        out = func(**tree_map_only(OnGpu, lambda x: x.held, given))
        if func is aten.copy_.default and not isinstance(given["self"], OnGpu):
            place = None
        if ours and not place:
            return self.fetched(out, tensors, given.get("non_blocking"), ours[0].place)
        same = {id(x.held): x for x in ours}  # what an operation in place returns
        others = [id(x) for x in tensors]     # what lies there already, as nothing had to be moved

        def put(x):
            if x.nbytes > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand so on")
            return same[id(x)] if id(x) in same else OnGpu(x.clone() if id(x) in others else x, place)
        return tree_map_only(torch.Tensor, put, out) if place else out

    def place(self, to, ours):
        """Where an operation's result lies: a device of the shim, or None for the CPU."""
        kind = None if to is None else torch.device(to).type
        if kind == "cpu" or kind is None and not ours:
            return None
        if kind == "cuda" and torch.device(to).index is not None:
            return torch.device(to)
        if ours and kind != "cuda":
            return ours[0].place
        return torch.device("cuda", self.current)  # kind: cuda, or meta, as C++ calls it

    def check(self, func, given, tensors):
        """Raises where CUDA would."""
        if os.getpid() != self.process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if any(x.is_meta for x in tensors):
            raise NotImplementedError(f"{func}: C++ made a tensor of a list or a number; use torch.tensor")
        if func is aten.copy_.default:
            return
        places = {x.place for x in tensors if isinstance(x, OnGpu)}
        indexing = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(given.get(argument.name)):
                if not isinstance(x, torch.Tensor) or isinstance(x, OnGpu):
                    continue
                number = x.ndim == 0 and not written and (indexing or torch.Tag.pointwise in func.tags)
                index = indexing and argument.name == "indices" and isinstance(given["self"], OnGpu)
                if not number and not index:
                    places.add(x.device)
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {places} ({func})")

    def fetched(self, out, tensors, late, place):
        """What an operation brings to the CPU: not there yet if nobody waits for it."""
        if not late:
            self.arrive([number for number, copy in self.late.items() if copy[2] == place])
            return out.clone() if isinstance(out, torch.Tensor) and id(out) not in map(id, tensors) else out
        self.copies += 1
        self.late[self.copies] = out, out.clone(), place
        return out.fill_(float("nan") if out.is_floating_point() else 85)

    def arrive(self, numbers):
        for number in numbers:
            if number in self.late:
                out, value, _ = self.late.pop(number)
                out.copy_(value)


@pytest.fixture
def gpu(monkeypatch):
    """The shim and, in place of what only a driver knows, what two H100 would say."""
    shim = Gpus()
    number_of = torch.cuda._utils._get_device_index  # refuses what set_device refuses

    class Event:
        def record(self, stream=None):
            place = (stream or torch.cuda.current_stream()).device
            self.copies = [number for number, copy in shim.late.items() if copy[2] == place]
            shim.recorded += 1

        def synchronize(self):
            shim.arrive(self.copies)
            shim.waited += 1

    def current_stream(device=None):
        place = torch.device("cuda", number_of(device, optional=True))
        return SimpleNamespace(cuda_stream=7, device=place, is_capturing=lambda: False)

    about = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9)
    for place, answers in {
            torch.cuda: {"_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 2,
                         "current_device": lambda: shim.current, "current_stream": current_stream,
                         "set_device": lambda device: setattr(shim, "current", number_of(device)),
                         "_get_device_properties": lambda number: about, "Event": Event},
            torch.accelerator: {"is_available": lambda: True, "current_device_index": lambda: shim.current,
                                "current_accelerator": lambda *_, **__: torch.device("cuda"),
                                "set_device_index": lambda number: None, "current_stream": current_stream}
    }.items():
        for name, answer in answers.items():
            monkeypatch.setattr(place, name, answer, raising=False)
    if flame.flame_ext:
        monkeypatch.setattr(flame.flame_ext, "cuda", False)  # its kernels want addresses on a GPU
    patch_tensors(monkeypatch, shim)
    with shim:
        yield shim


def patch_tensors(monkeypatch, shim):
    """What does not get as far as the dispatcher without a driver, or comes back from C++ with "meta"."""
    move = torch.Tensor.to
    group = torch._C._group_tensors_by_device_and_dtype

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]

        def named(x):
            if not isinstance(x, (str, torch.device)) or torch.device(x).type != "cuda":
                return x
            place = shim.place(x, [])
            return META if isinstance(self, OnGpu) and self.place == place else place
        return move(self, *map(named, args), **{name: named(x) for name, x in kwargs.items()})

    def pin_memory(self, device=None):
        if isinstance(self, OnGpu):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return self.clone()

    def made_on(make):
        def made(*args, device=None, **kwargs):
            out = make(*args, **kwargs)
            return out if device is None else out.to(device)
        return made

    def grouped(*args):
        places = {META: torch.device("cuda", shim.current)}
        return {(places.get(place, place), dtype): found for (place, dtype), found in group(*args).items()}

    def cast(function, dtype):  # as torch.autocast does where it sees a tensor of CUDA
        def cast_first(*args, **kwargs):
            if torch.is_autocast_enabled("cuda"):
                ours = [isinstance(x, OnGpu) and x.is_floating_point() for x in args]
                args = [x.to(dtype) if own else x for x, own in zip(args, ours)]
            return function(*args, **kwargs)
        return cast_first

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, made_on(getattr(torch, name)))
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, cast(getattr(F, name), torch.bfloat16))
    monkeypatch.setattr(F, "layer_norm", cast(F.layer_norm, torch.float32))
    monkeypatch.setattr(torch.utils.checkpoint.DefaultDeviceType, "_default_device_type", None)  # it is kept
    # nn.Module.to makes new parameters instead of giving the old ones another tensor's memory.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)


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
    """In flame_ext's place: its attention's arguments are looked at, its PyTorch twin computes."""
    forests = []

    def layout(lengths, parents, tile):
        forests.append(flame.Forest(None, None, lengths, parents, None))
        return SimpleNamespace(plan=np.arange(3, dtype=np.int32), forest=forests[-1])

    def attention(q, k, v, out, layout, scale, plan, stream):
        assert all(x.is_cuda for x in (q, k, v, out, plan)) and stream == 7
        mask = torch.from_numpy(flame.visible(layout.forest)).to(q.device)
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1))
        checked.append(scale)
    return SimpleNamespace(cuda=True, layout=layout, attention=attention)


EMBED = ["return x.pin_memory().to(device, non_blocking=True) if device.type == \"cuda\" else x",
         "here = torch.empty(units.shape, dtype=dtype, pin_memory=True)", "copied.synchronize()",
         "following = thread.submit(next, items, None)"]
NATIVE = ["plan = move(torch.tensor(layout.plan), device) if gpu else None",
          "flame_ext.attention(q, k, v, out, layout, q.shape[-1] ** -0.5, plan, stream)"]
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
    checked = []
    start = embed.start
    monkeypatch.setattr(embed, "start", lambda *args: rows.append(0) or start(*args))
    monkeypatch.setattr(flame, "flame_ext", kernels(checked) if native else None)
    with lines_run() as seen:
        found = embed_on(device, llm, "--store", store)
    assert found == expected and set(lines) <= seen, set(lines) - seen
    assert len(rows) == gpu.recorded == gpu.waited > 15  # 5 windows, 3 prompt sets
    assert bool(checked) == native


def test_a_mistake_in_stage_1_is_found(here, gpu, float32, tiny_llm, monkeypatch):
    expected = embed_on("cpu", tiny_llm)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: None)
    assert embed_on("cuda", tiny_llm) != expected
    monkeypatch.setattr(flame, "move", lambda x, device: x)
    with pytest.raises(RuntimeError, match="same device"):
        embed_on("cuda", tiny_llm, "--overwrite")


def test_plan_on_the_gpu(here, gpu, float32, tiny_llm, capsys):
    embed_on("cuda", tiny_llm, "--plan", "1000000")
    assert "as 1000000" in capsys.readouterr().out


# --- stage 2

TRAIN = ["torch.cuda.set_device(there)", "mixed = F.scaled_dot_product_attention(q, k, v)",
         "return f\", MFU {flops / peak:.1%}\""]
MEMORY = ["room = 0.8 * (gpu or torch.cuda.get_device_properties(device).total_memory)"]


@pytest.mark.parametrize("device, flags", [
    ("cuda", "--loss sigmoid --accumulate 1 --text-projection none+linear:4 --holdout 4 --eval-every 2"),
    ("cuda:1", "--loss infonce --accumulate 2 --gradient-checkpointing --text-projection whiten+linear "
               "--clip-grad 1 --ema 0.9"),
    ("cuda", "--loss infonce-slots --no-pool-first --patch-dropout 0 --text-projection whiten"),
], ids=["sigmoid", "chunks-on-the-second-gpu", "chunks-by-memory"])
def test_training_on_the_gpu(run, small, tmp_path, gpu, float32, device, flags):  # noqa: F811
    """The same losses and the same curve as on the CPU."""
    assert fit(run, small[0], f"--steps 6 --name cpu --device cpu {flags}").returncode == 0
    with lines_run() as seen:
        done = fit(run, small[0], f"--steps 6 --name gpu --device {device} {flags}")
    assert done.returncode == 0 and "MFU" in done.stderr and "hours" in done.stdout, done.stderr
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
    ["--bench", "imagefolder"], ["--search", "a red thing", "p001.png", "--images", "."],
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
