"""The processes that torchrun starts, the ranks: which one this is, and what they say to one another."""
import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from data import command
from flame import InputError


def rank():
    """torchrun says which of how many processes this is."""
    return int(os.environ.get("RANK", 0))


def ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def start_ranks(name):
    """-> this rank's device, of the name that --device gives; where there are several ranks, they meet.

    Raises InputError where several processes are started that do not know of one another.
    """
    numbers = [os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "WORLD_SIZE" in os.environ
    known = all(map(str.isdecimal, numbers)) and rank() < ranks()
    if several and "RANK" not in os.environ or not known:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK are {', '.join(numbers)}: processes would not know "
                         "of one another; use torchrun, on several nodes srun --ntasks-per-node 1 torchrun")
    if ranks() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = command.usable_device(name)
    if ranks() > 1:  # rank 0 alone joins captions and unpacks pictures, for hours; who waits is not ended
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)  # else its threads now and then abort a finished process
    return device


def wait_for_all(written=None):
    """written: a path that rank 0 has written before it comes here. Raises InputError in all ranks where one
    does not see it, and where another rank has ended.
    """
    if ranks() == 1:
        return
    seen = [False] * ranks()
    try:
        dist.barrier()  # before that it may not be written
        dist.all_gather_object(seen, written is None or os.path.exists(written))
    except RuntimeError:  # gloo's or NCCL's
        raise InputError("another rank has ended; see what it says, on whichever node") from None
    if not all(seen):
        raise InputError(f"{written}: not every rank sees what rank 0 wrote there; all nodes must share that "
                         "disk, but embed.py --shard i/n needs none")


def say(text):
    if rank() == 0:
        print(text)


class Gather(torch.autograd.Function):
    """See gather. Backward: the sum of what all ranks say of this rank's part."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(ranks())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank()]


def gather(x):
    """[b, ...] of this rank -> [ranks, b, ...], all ranks', with its gradient."""
    return Gather.apply(x) if ranks() > 1 else x[None]
