"""Shared by embed.py, train.py and evaluate.py: processes and devices, command line, atomic file writes."""
import argparse
import atexit
import fcntl
import functools
import glob
import json
import math
import os
import shutil
import socket
import sys
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.nn.functional import all_gather as all_gather_with_gradients
from tqdm import tqdm

from flame import InputError, describe_error, reading

# ------------------------------------------------------------------------------------------------------------
# Processes and devices

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(text):
    if rank() == 0:
        print(text)


def init_distributed(name):
    """Return this process's torch.device for --device `name`; join torchrun's process group if there is one.

    Raises InputError if several processes were started that do not know of each other.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    try:
        several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
        valid = 0 <= rank() < world_size() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 0
        if several and "RANK" not in os.environ or not valid:
            raise ValueError("RANK, WORLD_SIZE or LOCAL_WORLD_SIZE is missing or wrong")
        if world_size() == 1:
            return get_device(name)
        device = get_device(f"cuda:{local_rank}" if name == "cuda" else name)
        # A long timeout: rank 0 may join captions and unpack images for hours while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    except ValueError as error:  # from int(), or from torch if MASTER_ADDR or MASTER_PORT is wrong
        raise InputError(f"{describe_error(error)}: these processes are not a group; start them with "
                         "torchrun, or with srun --ntasks-per-node 1 torchrun") from None
    atexit.register(dist.destroy_process_group)  # without it, its threads sometimes crash at exit
    return device


def get_device(name):
    """Return the torch.device for "cpu", "cuda" or "cuda:1". Raises InputError if it is not available.

    A GPU becomes the current device, because events, streams and pinned memory use that one.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        if device.type == "cuda":
            torch.cuda.set_device(torch.empty(0, device=device).device)  # with its index
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; give cpu or cuda") from None
    return device


def default_dtype(device):
    """Return bfloat16 if its matrix products are fast, or float16 (older GPUs) or float32 (older CPUs)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def barrier(written=None):
    """Wait for all ranks. written: a path that rank 0 wrote before it came here.

    Raises InputError on all ranks if any rank does not see that path, or if a rank has exited.
    """
    if world_size() == 1:
        return
    seen = [False] * world_size()
    try:
        dist.barrier()
        dist.all_gather_object(seen, written is None or os.path.exists(written))
    except RuntimeError:  # from gloo or NCCL
        raise InputError("another rank has exited; see its message, maybe on another node") from None
    if not all(seen):
        raise InputError(f"{written}: not visible to every rank; use a disk that all nodes share, or "
                         "run embed.py --part i/n on each node")


def all_gather(x):
    """Return the tensors [b, ...] of all ranks as [ranks, b, ...], with gradients summed over the ranks."""
    return torch.stack(all_gather_with_gradients(x)) if world_size() > 1 else x[None]


# ------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error as one line, without the usage."""

    def __init__(self, **settings):
        wide = functools.partial(argparse.HelpFormatter, width=110)
        super().__init__(formatter_class=wide, allow_abbrev=False, **settings)

    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; see --help")


def number(kind, low, high=math.inf, above=False):
    """Return an argparse type for an int or float from low to high; above=True excludes low itself."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or above and value == low:  # also refuses NaN
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} {'above' if above else 'from'} {low} to {high}"  # for argparse
    return parse


def progress_bar(*items, **settings):
    """Return a tqdm bar; without a terminal, one that prints a line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(*items, **settings)
    return tqdm(*items, bar_format="{l_bar}{bar:10}{r_bar}\n", mininterval=30, maxinterval=30, **settings)


def report_skipped(source, reason, count, places):
    """Print a line on stderr, with the first five places. A name may contain line breaks."""
    first = " ".join(", ".join(places[:5]).split())
    print(f"{source}: skipped {count}: {reason} ({first})", file=sys.stderr)


def run_stage(script, body, resume):
    """Run body() and return the exit code.

    It is what body() returns, or 0 if that is None; after one line on stderr, 2 (bad input, full disk, lack
    of memory) or 130 (Ctrl-C); 141 if stdout was closed. resume: how to continue after Ctrl-C.
    """
    sys.stdout, sys.stderr = (  # None if the shell closed it
        stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may not be valid UTF-8
    warnings.formatwarning = lambda message, *place: f"{script}: {message}\n"  # one line
    code = 2
    try:
        finished = body() or 0
        sys.stdout.flush()
        return finished
    except BrokenPipeError:  # the reader of stdout (e.g. `head`) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        return 141
    except KeyboardInterrupt:
        code = 130
        line = f"interrupted; {resume}"
    except InputError as error:
        line = str(error).rpartition("InputError: ")[2]  # one from a loader process contains its traceback
    except torch.OutOfMemoryError:
        line = ("out of GPU memory; free memory, lower train.py's --micro-batch or --batch, or use "
                "--device cpu")
    except (ConnectionError, EOFError, RuntimeError) as error:  # raised if another process has exited
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        line = "a loader process was killed, probably for lack of memory; lower --workers"
    except OSError as error:  # a file vanished or may not be read
        line = (f"{error.filename or 'a file'}: {error.strerror or error}; "
                "fix that and run the same command again")
    print(f"{script}: {' '.join(line.split())}", file=sys.stderr)  # a file name may contain line breaks
    return code


# ------------------------------------------------------------------------------------------------------------
# Files and folders. A reader sees a file whole or not at all, even if a writer is killed or the disk is full.

@contextmanager
def disk_errors(path, fix="free space or choose another folder, then run the same command again"):
    """Turn any OSError into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {fix}") from None


@contextmanager
def output_folder(path):
    """Create a folder, and remove it and its new parents afterwards if they are still empty.

    Raises InputError if it cannot be created.
    """
    path = Path(path)
    created = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with disk_errors(path, "choose another folder"):
            path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # rmdir refuses a folder that is not empty
            for one in created:
                one.rmdir()


@contextmanager
def locked_folder(path, mode=fcntl.LOCK_EX):
    """An output_folder that one process at a time can hold, or several with fcntl.LOCK_SH. Raises InputError
    if another process holds it.
    """
    with output_folder(path), open(Path(path, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # the last holder deleted it before we got the lock
                raise BlockingIOError
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing to this folder; wait for it or stop it"
                             ) from None
        try:
            yield
        finally:
            with suppress(BlockingIOError):  # it is still shared
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(lock.name)


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, which is synced and renamed to `path` at the end.

    After an error `path` is as before. Removes temporary files that killed processes of this machine left.
    Raises InputError if the disk is full or the folder is not writable.
    """
    path = Path(path)
    prefix = f".{path.stem}.{socket.gethostname()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}{path.suffix}")  # some libraries look at the suffix
    with disk_errors(path):
        try:
            for old in path.parent.glob(f"{glob.escape(prefix)}*"):
                writer = old.name.removeprefix(prefix).split(".")[0]
                with suppress(PermissionError, ValueError):
                    try:
                        os.kill(int(writer), 0)
                    except ProcessLookupError:  # its writer is no longer running
                        # a folder is the scratch folder of captions.write_table
                        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # some libraries create files that only the owner can read
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_save(path, save):
    """Call save(temporary path), then rename."""
    with atomic_write(path) as temporary:
        try:
            save(temporary)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
            raise OSError(None, describe_error(error)) from None


def write_array(path, array, end=b""):
    """Write a .npy file, then the bytes `end`, which numpy.load ignores. numpy.save does not notice if the
    disk is full at the last bytes.
    """
    array = np.ascontiguousarray(array)

    def save(temporary):
        with open(temporary, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array)
            file.write(end)

    atomic_save(path, save)


def write_text(path, text):
    """Write UTF-8; undecodable bytes of file names are written as they were."""
    atomic_save(path, lambda temporary: temporary.write_text(text, "utf-8", "surrogateescape", "\n"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_text(path, text):
    with disk_errors(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def newest_folder(root, file, is_finished, fix):
    """Return the folder below root whose `file` was written last among those with is_finished(folder).

    A folder whose files cannot be read is not finished. Raises InputError if there is none.
    """
    for path in sorted(Path(root).glob(f"*/**/{file}"), key=os.path.getmtime, reverse=True):
        with suppress(InputError), reading(path, fix):
            if is_finished(path.parent):
                return path.parent
    raise InputError(f"{root}: nothing finished found; {fix}")
