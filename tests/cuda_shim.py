"""Simulates two GPUs, for tests on a machine without one. Operations are computed on the CPU, and raise if
CUDA would refuse the tensors' devices. A non-blocking copy to the CPU is NaN until the program waits for an
event or another copy of that GPU. So tests find wrong devices and missing synchronization.
"""
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
aten = torch.ops.aten


class GpuTensor(torch.Tensor):
    """A tensor whose numbers are in `value`. Its own memory is meta, so no code can bypass the shim."""

    device = property(lambda self: self.gpu)
    is_cuda = True
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value, gpu):
        size = value.untyped_storage().nbytes() // value.element_size()
        with torch.inference_mode(False):  # a view in inference mode may be of a parameter
            memory = torch.empty(size, dtype=value.dtype, device=META)
            like = memory.as_strided(value.shape, value.stride(), value.storage_offset())
            tensor = torch.Tensor._make_subclass(cls, like, False)
        tensor.value, tensor.gpu = value, gpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: the shim is not active in this thread")

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec)

    def get_device(self):
        return self.gpu.index


class Gpus(TorchDispatchMode):
    """While active, tensors created on cuda and results of operations on them are GpuTensors."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()
        self.room = float("inf")  # bytes of the largest tensor that fits
        self.current = 0          # index of the current device
        self.pending = {}         # {number: (tensor on the CPU, its future value, source GPU)}, copies
        self.copies = 0
        self.properties = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | (kwargs or {})
        tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, GpuTensor)]
        requested = given.get("device")
        gpu = self.result_gpu(requested, ours)
        given |= {"device": torch.device("cpu")} if requested is not None else {}
        given |= {"pin_memory": False} if "pin_memory" in given else {}
        if ours:
            self.check_devices(func, given, tensors)
        out = func(**tree_map_only(GpuTensor, lambda x: x.value, given))
        if func is aten.copy_.default and not isinstance(given["self"], GpuTensor):
            gpu = None
        if ours and not gpu:
            return self.copy_to_cpu(out, tensors, given.get("non_blocking"), ours[0].gpu)
        same = {id(x.value): x for x in ours}  # an in-place operation returns one of these
        inputs = [id(x) for x in tensors]      # an operation without a copy returns one of these

        def wrap(x):
            if x.nbytes > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
            return same[id(x)] if id(x) in same else GpuTensor(x.clone() if id(x) in inputs else x, gpu)
        return tree_map_only(torch.Tensor, wrap, out) if gpu else out

    def result_gpu(self, requested, ours):
        """Return the device of an operation's result, or None for the CPU."""
        kind = None if requested is None else torch.device(requested).type
        if kind == "cpu" or kind is None and not ours:
            return None
        if kind == "cuda" and torch.device(requested).index is not None:
            return torch.device(requested)
        if ours and kind != "cuda":
            return ours[0].gpu
        return torch.device("cuda", self.current)  # kind is cuda, or meta, which C++ takes our tensors for

    def check_devices(self, func, given, tensors):
        """Raise RuntimeError if CUDA would."""
        if os.getpid() != self.process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if any(x.is_meta for x in tensors):
            raise RuntimeError(f"{func}: C++ made a tensor from a list or a number; use torch.tensor")
        if func is aten.copy_.default:
            return
        devices = {x.gpu for x in tensors if isinstance(x, GpuTensor)}
        indexing = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(given.get(argument.name)):
                if not isinstance(x, torch.Tensor) or isinstance(x, GpuTensor):
                    continue
                scalar = x.ndim == 0 and not written and (indexing or torch.Tag.pointwise in func.tags)
                index = indexing and argument.name == "indices" and isinstance(given["self"], GpuTensor)
                if not scalar and not index:
                    devices.add(x.device)
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {devices} ({func})")

    def copy_to_cpu(self, out, tensors, non_blocking, gpu):
        """Return an operation's result on the CPU: NaN or 85 for now if non_blocking."""
        if not non_blocking:
            self.complete([number for number, copy in self.pending.items() if copy[2] == gpu])
            return out.clone() if isinstance(out, torch.Tensor) and id(out) not in map(id, tensors) else out
        self.copies += 1
        self.pending[self.copies] = out, out.clone(), gpu
        return out.fill_(float("nan") if out.is_floating_point() else 85)

    def complete(self, numbers):
        for number in set(numbers) & set(self.pending):
            out, value, _ = self.pending.pop(number)
            out.copy_(value)


def patch_driver(monkeypatch, shim):
    """Replace what needs a driver, as if there were two H100."""
    get_index = torch.cuda._utils._get_device_index  # refuses the same devices as set_device

    class Event:
        def record(self, stream=None):
            gpu = (stream or current_stream()).device
            self.copies = [number for number, copy in shim.pending.items() if copy[2] == gpu]

        def synchronize(self):
            shim.complete(self.copies)

    def current_stream(device=None):
        gpu = torch.device("cuda", get_index(device, optional=True))
        return SimpleNamespace(cuda_stream=7, device=gpu, is_capturing=lambda: False)

    def exchange_device(index):  # -1: no change
        if index < 0:
            return -1
        before, shim.current = shim.current, index
        return before

    for name, value in dict(
            _lazy_init=lambda: None, is_available=lambda: True, device_count=lambda: 2, Event=Event,
            is_current_stream_capturing=lambda: False, current_device=lambda: shim.current,
            current_stream=current_stream, set_device=lambda device: exchange_device(get_index(device)),
            _exchange_device=exchange_device, _maybe_exchange_device=exchange_device,
            _get_device_properties=lambda index: shim.properties).items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    for name, value in dict(  # for DataLoader
            is_available=lambda: True, current_accelerator=lambda *_, **__: torch.device("cuda"),
            current_device_index=lambda: shim.current, set_device_index=lambda index: None,
            current_stream=current_stream).items():
        monkeypatch.setattr(torch.accelerator, name, value)


def patch_tensors(monkeypatch, shim):
    """Replace functions that don't reach the dispatcher without a driver, or where C++ sees "meta"."""
    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]

        def resolve(x):
            if not isinstance(x, (str, torch.device)) or torch.device(x).type != "cuda":
                return x
            gpu = shim.result_gpu(x, [])
            return META if isinstance(self, GpuTensor) and self.gpu == gpu else gpu
        return move(self, *map(resolve, args), **{name: resolve(x) for name, x in kwargs.items()})

    def pin_memory(self, device=None):
        if isinstance(self, GpuTensor):
            raise RuntimeError("cannot pin a CUDA tensor, only dense CPU tensors can be pinned")
        return self.clone()

    def with_device(function):
        def wrapper(*args, device=None, **kwargs):
            out = function(*args, **kwargs)
            return out if device is None else out.to(device)
        return wrapper

    def cast(function, dtype):  # as torch.autocast does for CUDA tensors
        def wrapper(*args, **kwargs):
            if not torch.is_autocast_enabled("cuda"):
                return function(*args, **kwargs)
            return function(*(x.to(dtype) if isinstance(x, GpuTensor) and x.is_floating_point() else x
                              for x in args), **kwargs)
        return wrapper

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, with_device(getattr(torch, name)))
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, cast(getattr(F, name), torch.bfloat16))
    monkeypatch.setattr(F, "layer_norm", cast(F.layer_norm, torch.float32))
    # nn.Module.to then makes new parameters instead of swapping the memory of the old ones.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
