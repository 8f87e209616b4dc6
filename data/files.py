"""Writing files so that a reader finds the whole of one or nothing, if a writer is killed or a disk full."""
import json
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flame import InputError


@contextmanager
def disk_errors(path, cure="free space or choose another place, then run the same command again"):
    """Whatever the operating system refuses inside becomes one line that names the file and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}; {cure}") from None


@contextmanager
def folder(path, *signs):
    """Makes a folder; takes it away again, and what it made above it, where nothing came in.

    signs: patterns of the files that count, if not all do. Raises InputError where it cannot be made, or
    nothing be written there.
    """
    path = Path(path)
    made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with disk_errors(path, "choose another place"):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        yield
    finally:
        if made and not any(any(path.glob(sign)) for sign in signs or "*"):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # somebody else's files are there by now
                for one in made[1:]:
                    one.rmdir()


@contextmanager
def whole(path):
    """Yields a temporary path beside `path`, and renames what was written there.

    An error inside leaves `path` as it was. What a killed writer had not renamed yet is taken away.
    Raises InputError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # libraries go by the ending
    with disk_errors(path):
        try:
            for old in path.parent.glob(f".{path.stem}.[0-9]*{path.suffix}"):  # a link too: none is followed
                old.unlink()
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            error.filename = path
            raise
        finally:
            temporary.unlink(missing_ok=True)


def write(path, save):
    """save(temporary path), then rename."""
    with whole(path) as temporary:
        try:
            save(temporary)
        except (RuntimeError, SafetensorError) as error:  # how these libraries say it
            raise OSError(None, said(error), str(path)) from None


def said(error):
    """What a library's error says, in one line and not at length."""
    return " ".join(str(error).split())[:200]


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path, value):
    """A result, to be read by people too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_marker(path):
    """What a marker file says that its writer keeps for the next run; None where none can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def open_own(path, mode):
    """open() for a file of ours that may be there: never emptied, never through a link, never a pipe.

    Raises InputError where it is one of these or cannot be opened.
    """
    def opener(name, flags):
        return os.open(name, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    cure = "remove it or choose another place, then run the same command again"
    if os.path.islink(path):
        raise InputError(f"{path}: a symbolic link, which is not followed; {cure}")
    with disk_errors(path):
        file = open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path}: not a regular file; {cure}")
    return file


def append(path, text):
    """Adds text to a file of ours."""
    with disk_errors(path), open_own(path, "a") as file:
        file.write(text)
