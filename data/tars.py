"""Tars, however damaged or hostile: where the files in them lie; and counting what is left out. Pictures that
lie inside of Parquet become tars.
"""
import functools
import io
import os
import re
import sys
import tarfile
from itertools import groupby
from operator import itemgetter

import duckdb

from data.command import bar
from data.files import write
from data.sources import NAMES, WANTED, source_files
from flame import explained, reading

DAMAGED = "tar that is none, or damaged from there on"
LARGEST_HEADER = 1 << 14  # bytes of a header in a tar: a name and some numbers


def sample_name(path):
    """-> folder, key, suffix: "a/", "b", ".c.jpg" of "a/b.c.JPG". A key ends at its first dot."""
    folder, slash, name = path.rpartition("/")
    key, dot, suffix = name.partition(".")
    return folder + slash, key, dot + suffix.lower()


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it, by headers. One of megabytes, which takes its parser minutes, is refused."""

    def read(self, size):
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_files(path, skipped):
    """Yields (folder, key, suffix, first byte, bytes) of a tar's regular files, in its order; unpacks none.

    Where the tar is cut short or damaged it ends, and counts as skipped[DAMAGED].
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # or tarfile remembers them all
                # Of a negative size what comes before would come again, without end.
                if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is sparse, or cut off")
                folder, key, suffix = sample_name(member.name)
                if member.isfile() and key and suffix:
                    yield folder, key, suffix, member.offset_data, member.size
            # A tar ends in empty blocks; a header of zeros looks like its end, unless something lies behind.
            file.seek(tar.offset)
            blocks = iter(lambda: file.read(LARGEST_HEADER), b"")
            if size < tar.offset + 512 or any(block.strip(b"\0") for block in blocks):
                raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset}")
    except Exception as error:  # tarfile raises nearly anything on a stranger's bytes, MemoryError too
        skip(skipped, DAMAGED, f"{os.path.basename(path)}: {explained(error)}")


def tar_samples(path, skipped):
    """Yields (folder, key, {suffix: (first byte, bytes)}) of each run of files with one key (webdataset)."""
    for (folder, key), files in groupby(tar_files(path, skipped), itemgetter(0, 1)):
        yield folder, key, {suffix: place for _, _, suffix, *place in files}


def skip(skipped, reason, place):
    """Counts what is left out: skipped[reason] = [how many, the first five places]."""
    count, places = skipped.get(reason, (0, []))
    skipped[reason] = count + 1, [*places, " ".join(place.split())][:5]  # a name may hold line breaks


def report_skipped(source, skipped):
    """Says on stderr what was skipped, a line a reason."""
    for reason, (count, places) in skipped.items():
        print(f"{source}: skipped {count}: {reason} ({', '.join(places)})", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Inside of Parquet

def unpack_parquet(captions, folder):
    """Pictures in Parquet, struct<bytes, path> as the Hub has them, become tars in the folder: a tar for each
    file, pictures named by key. A tar that exists is done. What no tar can hold is skipped and counted.
    """
    files = [file for file in source_files(captions) if file.suffix == ".parquet"]
    skipped = {}
    first = 0  # the number of a file's first row
    for n, file in enumerate(bar(files, "pictures", unit=" files", disable=not files)):
        with reading(file, WANTED):
            table = duckdb.read_parquet(str(file), file_row_number=True)
            picture = re.compile(r"STRUCT\(.*bytes BLOB.*\)")  # a list of them is no one picture
            inside = [name for name, kind in zip(table.columns, table.types) if picture.fullmatch(str(kind))]
            if not inside:
                return
            keys = [f'"{name}"::VARCHAR' for name in NAMES["key"] if name in table.columns]
            keys.append(f"format('{{:09d}}', {first} + file_row_number)")
            rows = table.project(f"""coalesce({', '.join(keys)}), "{inside[0]}".bytes""")
            first += len(table)
            tar = folder / f"{n:05d}.tar"
            if not tar.exists():
                folder.mkdir(exist_ok=True)
                write(tar, functools.partial(write_tar, rows, skipped))
    report_skipped(captions, skipped)


def write_tar(rows, skipped, path):
    """rows: a DuckDB relation of (key, a picture's bytes)."""
    with tarfile.open(path, "w") as tar:
        for key, content in rows.fetchall():
            if content is None or sample_name(key) != ("", key, ""):
                skip(skipped, "no picture, or a key with a dot or slash", key)
                continue
            member = tarfile.TarInfo(f"{key}.jpg")  # whatever it is: decoders look at the bytes
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
