"""Members of tars, without unpacking them: names, places, and where a corrupt tar ends."""
import io
import os
import tarfile
from itertools import groupby
from operator import itemgetter

import torch

from data.common import progress_bar
from flame import describe_error

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CORRUPT_TAR = "not a tar file, or corrupt from this point"
MAX_HEADER_BYTES = 1 << 14  # a tar header has a name and a few numbers
MAX_PADDING = 1 << 20       # zeros at the end of a tar
READERS = min(16, len(os.sched_getaffinity(0)))  # processes that read tars


def split_member_name(path):
    """Return (folder, key, suffix): "a/", "b", ".c.jpg" for "a/b.c.JPG". A key ends at its first dot."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    key, dot, suffix = name.partition(".")
    return folder + slash, key, dot + suffix.lower()


class _HeaderReader(io.BufferedReader):
    """Refuses to read huge headers, which tarfile would parse for minutes."""

    def read(self, size):
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_members(path, skipped):
    """Yield (folder, key, suffix, offset, size) of a tar's regular files, in order, without unpacking.

    Stops where a tar is truncated or corrupt, and adds that place to skipped[CORRUPT_TAR].
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        with _HeaderReader(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            spans = {}
            while member := tar.next():
                tar.members.clear()  # tarfile would keep them all
                # A negative size would make tarfile read the same members forever.
                if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is sparse or truncated")
                folder, key, suffix = split_member_name(member.name)
                if member.isfile():
                    spans[member.name] = member.offset_data, member.size
                span = spans.get(member.linkname if member.islnk() else member.name)  # hard links count
                if span and key and suffix:
                    yield folder, key, suffix, *span
            # tarfile stops at any block of zeros. It is the end only if everything after it is zero too, and
            # not more than padding: a tar of reserved size that was not written to its end has many zeros.
            file.seek(tar.offset)
            blocks = iter(lambda: file.read(MAX_HEADER_BYTES), b"")
            if not 512 <= size - tar.offset <= MAX_PADDING or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError(f"neither a file nor the end of the tar at byte {tar.offset}")
    except Exception as error:  # tarfile can raise any exception on corrupt bytes, MemoryError included
        skipped.setdefault(CORRUPT_TAR, []).append(f"{os.path.basename(path)}: {describe_error(error)}")


def tar_samples(path, skipped):
    """Yield (folder, key, {suffix: (offset, size)}) for each run of files with the same key (webdataset)."""
    for (folder, key), files in groupby(tar_members(path, skipped), itemgetter(0, 1)):
        yield folder, key, {suffix: span for _, _, suffix, *span in files}


def is_image(suffix):
    """Return whether a tar member with this suffix is a sample's image: .jpg, .image.jpg, not .mask.png."""
    return suffix.removeprefix(".image") in IMAGE_SUFFIXES


def tar_names(files):
    """Return "a/00000/" for a/00000.tar if not all files are in folder a, otherwise "00000/"."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(file, root).removesuffix(".tar") + "/" for file in files]


def in_processes(function, n, skipped, description):
    """Yield function(i, skipped) for i in range(n), in order, with a progress bar, computed by processes that
    torch ends if this one is killed. skipped: {reason: places}, to which each call adds what it skips.
    """
    def call(i):
        places = {}
        return function(i, places), places

    loader = torch.utils.data.DataLoader(
        range(n), batch_size=None, collate_fn=call, num_workers=READERS if n > 3 else 0,
        multiprocessing_context="fork" if n > 3 else None)
    for result, places in progress_bar(loader, description, unit=" files", disable=n < 100):
        for reason in places:
            skipped.setdefault(reason, []).extend(places[reason])
        yield result


def write_tar(members, path):
    """Write (name, bytes) pairs to a tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)  # decoders look at the bytes, not at the suffix
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
