"""What the command lines of all stages share: numbers with a range, the device, how a run ends."""
import argparse
import functools
import math
import os
import sys
import warnings

import torch
from tqdm import tqdm

from flame import InputError


class Parser(argparse.ArgumentParser):
    """argparse with a mistake in one line instead of the whole usage."""

    def __init__(self, **settings):
        wide = functools.partial(argparse.HelpFormatter, width=110)
        super().__init__(formatter_class=wide, allow_abbrev=False, **settings)

    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; see --help")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or a float from low to high; above=True leaves low itself out."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or above and value == low:  # nor NaN
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} {'above' if above else 'from'} {low} to {high}"  # for the message
    return parse


class Lines(tqdm):
    """A bar of which each state is a line of its own."""

    @staticmethod
    def status_printer(file):
        return functools.partial(print, file=file)


def bar(*items, **settings):
    """A tqdm bar; where there is no terminal, a line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(*items, **settings)
    return Lines(*items, bar_format="{l_bar}{bar:10}{r_bar}", mininterval=30, maxinterval=30, **settings)


def usable_device(name):
    """"cpu", "cuda" or "cuda:1" -> torch.device. Raises InputError where this machine has no such device.

    A GPU becomes the current one: events, streams and pinned memory name none, and would be another's.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        there = torch.empty(0, device=device).device  # has a number, as set_device wants
        if device.type == "cuda":
            torch.cuda.set_device(there)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; give cpu or cuda") from None
    return device


def run(script, body, again):
    """Runs a stage; -> its exit code: 2 with one line on stderr for bad input, 130 for Ctrl-C.

    again: what resuming does.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    warnings.formatwarning = lambda message, *place: f"{script}: {message}\n"  # one line
    code = 2
    try:
        body()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who was told, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it exits
        return 141
    except KeyboardInterrupt:
        code = 130
        line = f"interrupted; {again}"
    except InputError as error:
        line = str(error).rpartition("InputError: ")[2]  # a loader process sends its traceback too
    except torch.OutOfMemoryError:  # a GPU's
        line = ("out of memory on the GPU; free memory, give train.py a lower --chunk or --batch, "
                "or --device cpu")
    except (ConnectionError, RuntimeError) as error:  # by which a process hears that another has ended
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        line = "a loader process was killed, likely for memory; give fewer --workers"
    except OSError as error:  # a file vanished, a folder may not be read
        line = (f"{error.filename or 'a file'}: {error.strerror or error}; "
                "mend that and run the same command again")
    print(f"{script}: {' '.join(line.split())}", file=sys.stderr)  # a file's name may have two lines
    return code
