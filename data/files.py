"""Writing files so that a reader finds the whole of one or nothing, whenever the writer is killed or the disk is full."""
import json
import os
from contextlib import contextmanager
from pathlib import Path

from flame import InputError


@contextmanager
def disk_errors(path, cure="free space or choose another place, then run the same command again"):
    """Whatever the operating system refuses inside becomes one line that names the file and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}; {cure}") from None


def write(path, save):
    """save(temporary path), then rename. Raises InputError where the disk is full or the folder cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # the ending stays: libraries go by it
    with disk_errors(path):
        try:
            save(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def read_marker(path):
    """What a marker file says that its writer keeps for the next run; None where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
