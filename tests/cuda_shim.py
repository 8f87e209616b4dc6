"""A stand-in for two GPUs, for tests on a machine that has none.

Its tensors say that they lie on cuda:0 or cuda:1, hold a CPU tensor and do every operation with that; where
CUDA would refuse a tensor of another device, so do they. What a copy that nobody waits for brings back is NaN
until an event of that GPU, or another copy, is waited for. So a wrong device or a missing wait is found. Not
how kernels compute, several ranks by NCCL, torch.compile, autocast beyond what the ViT calls.
"""
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
aten = torch.ops.aten


class OnGpu(torch.Tensor):
    """`held` has its numbers. Its own memory is none (meta), so that nothing can read past the shim."""

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
        made.held, made.place = held, place
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of the shim's tensors by a thread that has no shim")

    def __reduce_ex__(self, protocol):    # torch.save
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec)

    def get_device(self):
        return self.place.index


class Gpus(TorchDispatchMode):
    """While it is on, tensors for cuda are OnGpu's, and so is what comes of them."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()
        self.room = float("inf")  # bytes of the largest tensor that fits
        self.current = 0          # which of them is meant where none is named
        self.late = {}            # a copy on its way: (tensor on the CPU, what it will hold, from where)
        self.copies = 0
        self.properties = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | (kwargs or {})
        tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        to = given.get("device")
        place = self.place(to, ours)
        given |= {"device": torch.device("cpu")} if to is not None else {}
        given |= {"pin_memory": False} if "pin_memory" in given else {}
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
            raise RuntimeError(f"{func}: C++ made a tensor of a list or a number; use torch.tensor")
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
        for number in set(numbers) & set(self.late):
            out, value, _ = self.late.pop(number)
            out.copy_(value)


def patch_driver(monkeypatch, shim):
    """What only a driver knows, as two H100 would say it."""
    number_of = torch.cuda._utils._get_device_index  # refuses what set_device refuses

    class Event:
        def record(self, stream=None):
            place = (stream or current_stream()).device
            self.copies = [number for number, copy in shim.late.items() if copy[2] == place]

        def synchronize(self):
            shim.arrive(self.copies)

    def current_stream(device=None):
        place = torch.device("cuda", number_of(device, optional=True))
        return SimpleNamespace(cuda_stream=7, device=place, is_capturing=lambda: False)

    def exchange(number):  # -1: neither asks nor changes
        if number < 0:
            return -1
        before, shim.current = shim.current, number
        return before

    answers = dict(
        _lazy_init=lambda: None, is_available=lambda: True, device_count=lambda: 2, Event=Event,
        is_current_stream_capturing=lambda: False, current_device=lambda: shim.current,
        current_stream=current_stream, set_device=lambda device: setattr(shim, "current", number_of(device)),
        _exchange_device=exchange, _maybe_exchange_device=exchange,
        _get_device_properties=lambda number: shim.properties)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer, raising=False)
    for name, answer in dict(  # what a loader asks
            is_available=lambda: True, current_accelerator=lambda *_, **__: torch.device("cuda"),
            current_device_index=lambda: shim.current, set_device_index=lambda number: None,
            current_stream=current_stream).items():
        monkeypatch.setattr(torch.accelerator, name, answer)


def patch_tensors(monkeypatch, shim):
    """What does not get as far as the dispatcher without a driver, or comes back from C++ with "meta"."""
    move = torch.Tensor.to

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
            raise RuntimeError("cannot pin a CUDA tensor, only dense CPU tensors can be pinned")
        return self.clone()

    def made_on(make):
        def made(*args, device=None, **kwargs):
            out = make(*args, **kwargs)
            return out if device is None else out.to(device)
        return made

    def cast(function, dtype):  # as torch.autocast does where it sees a tensor of CUDA
        def cast_first(*args, **kwargs):
            if torch.is_autocast_enabled("cuda"):
                args = [x.to(dtype) if isinstance(x, OnGpu) and x.is_floating_point() else x for x in args]
            return function(*args, **kwargs)
        return cast_first

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, made_on(getattr(torch, name)))
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, cast(getattr(F, name), torch.bfloat16))
    monkeypatch.setattr(F, "layer_norm", cast(F.layer_norm, torch.float32))
    # nn.Module.to makes new parameters instead of giving the old ones another tensor's memory.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
