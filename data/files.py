"""Writing files so that a reader finds the whole of one or nothing, if a writer is killed or a disk full."""
import fcntl
import json
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from flame import InputError, explained


@contextmanager
def disk_errors(path, cure="free space or choose another place, then run the same command again"):
    """Whatever the operating system refuses inside becomes one line that names `path` and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {cure}") from None


@contextmanager
def folder(path):
    """Makes a folder; takes it away again, and what it made above it, where nothing came in.

    Raises InputError where it cannot be made, or nothing be written there.
    """
    path = Path(path)
    made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with disk_errors(path, "choose another place"):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        yield
    finally:
        with suppress(OSError):  # one that is not empty stays
            for one in made:
                one.rmdir()


@contextmanager
def alone(path):
    """The same, for one process at a time: another is refused for as long as this one lives."""
    busy = f"{path}: another process is writing here; wait for it, or end it"
    with folder(path), open(Path(path, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(busy) from None
        if not os.fstat(lock.fileno()).st_nlink:  # who held it took it away meanwhile
            raise InputError(busy)
        try:
            yield
        finally:
            os.unlink(lock.name)


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; what was written there reaches the disk, then takes its name.

    An error inside leaves `path` as it was. What writers killed on this machine left behind is taken away.
    Raises InputError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    begins = f".{path.stem}.{socket.gethostname()}."
    temporary = path.with_name(f"{begins}{os.getpid()}{path.suffix}")  # libraries go by the ending
    with disk_errors(path):
        try:
            for old in path.parent.glob(f"{begins}*"):
                writer = old.name.removeprefix(begins).split(".")[0]
                with suppress(PermissionError, ValueError):
                    try:
                        os.kill(int(writer), 0)
                    except ProcessLookupError:  # it runs no more
                        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # some libraries let the owner alone read what they write
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write(path, save):
    """save(temporary path), then rename."""
    with replacing(path) as temporary:
        try:
            save(temporary)
        except (RuntimeError, SafetensorError) as error:  # how these libraries say it
            raise OSError(None, explained(error)) from None


def write_array(path, array):
    """A .npy file. numpy.save does not notice that the last bytes find no room."""
    array = np.ascontiguousarray(array)

    def save(temporary):
        with open(temporary, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array)

    write(path, save)


def write_text(path, text):
    """In UTF-8; of a file's name that is none, the bytes that it has."""
    write(path, lambda temporary: temporary.write_text(text, "utf-8", "surrogateescape", "\n"))


def write_json(path, value):
    """A result, to be read by people too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append(path, text):
    """Adds text to a file of ours."""
    with disk_errors(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
