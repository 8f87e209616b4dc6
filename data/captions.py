"""How captions lie on disk: every source becomes rows of (key, image, captions), one at a time, in file order.

    TSV with a header among `key image raw short long` (other columns are ignored)
    the official Conceptual Captions TSV: no header, caption<TAB>url
    CSV with such a header, or open_clip's `filepath title`
    JSON (a list of objects) or JSONL (one object a line) with those same fields
    webdataset / img2dataset tars: one tar, a folder of them, or a range, "cc3m-{0000..0575}.tar"; never unpacked

All but tars may be gzipped. Where there is no key, the row's number padded to nine digits is it, as img2dataset
names its samples. A bad row is skipped and counted, never fatal; its row number is not given to another.
"""
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
import tarfile
import zlib
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from flame import InputError, PROMPTS

FIELDS = ("key", "image", *PROMPTS)
ALIASES = {"__key__": "key", "filepath": "image", "title": "raw", "caption": "raw", "txt": "raw"}  # others' names
CHUNK = 1 << 20           # characters of a JSON list read at a time
LARGEST_TEXT = 1 << 24    # bytes of a .txt or .json in a tar: no caption is as long
LARGEST_HEADER = 1 << 14  # bytes of a header in a tar: a name and some numbers
DAMAGED = "tar that is none, or damaged from there on"


class Row(NamedTuple):
    key: str
    image: str       # the picture's path as the file gives it, or ""
    captions: dict   # prompt set -> the caption that its questions are asked of: its own, else the best one present
    number: int      # of the row in its file, from 0


def read_captions(path, skipped=None, joins=None, keep_lines=False):
    """Yields Row after Row. skipped: a dict to fill with {reason: [how many, the first five places]}.

    joins: {prompt set: {key: caption}}, captions of that set from another file (`read_join`).
    keep_lines: captions as they are, line breaks and spaces too, as the released code takes them; else each is one line.
    Raises InputError where a file is missing, holds no caption column, or is not of a known form.
    """
    count = 0
    skipped = {} if skipped is None else skipped
    for number, place, fields in _records(path, skipped):
        key = fields.get("key")
        key = f"{number:09d}" if key is None or key == "" else str(key)
        image = str(fields.get("image") or "")
        texts = {name: one_line(fields[name], keep_lines) for name in PROMPTS if fields.get(name)}
        for name, captions in (joins or {}).items():
            if text := captions.get(key):
                texts[name] = text
            else:
                skip(skipped, f"key without a {name} caption in the joined file, kept with the best caption present", place)
        best = texts.get("long") or texts.get("short") or texts.get("raw")
        if not best:
            skip(skipped, "no caption", place)
        elif re.search("[\t\r\n]", key + image):
            skip(skipped, "tab or line break in key or image", place)
        elif not _is_unicode(key, image, *texts.values()):
            skip(skipped, "invalid Unicode", place)
        else:
            count += 1
            yield Row(key, image, {name: texts.get(name) or best for name in PROMPTS}, number)
    if not count:
        reasons = [f"{reason}: {n} rows, first {_where(places[0])}" for reason, (n, places) in skipped.items()]
        raise InputError(f"{path}: no row with a caption ({'; '.join(reasons) or 'the file is empty'}); "
                         f"give a TSV with a header among `{' '.join(FIELDS)}`, or caption<TAB>url")


def one_line(text, keep_lines=False):
    """Any value as text, without white space at the ends and with single spaces for any inside.

    keep_lines: as it is, but "" where there is nothing else than white space.
    """
    text = str(text)
    if keep_lines:
        return text if text.strip() else ""
    if text.isprintable() and "  " not in text and text == text.strip():  # most are: not worth taking apart
        return text
    return " ".join(text.split())


def _is_unicode(*texts):
    """False where a JSON escape made half a surrogate pair, which UTF-8 cannot write."""
    return all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# What is skipped

def skip(skipped, reason, place):
    """Counts a bad row: skipped[reason] = [how many, the first five places (line numbers, or samples of a tar)]."""
    entry = skipped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 5:
        entry[1].append(place if isinstance(place, int) else one_line(place))  # a name may hold line breaks


def report_skipped(path, skipped):
    """Says on stderr what was skipped, a line a reason."""
    for reason, (count, places) in skipped.items():
        where = ", ".join(map(_where, places)) + ", ..." * (count > len(places))
        print(f"{path}: skipped {count} row{'s' * (count > 1)}: {reason} ({where})", file=sys.stderr)


def _where(place):
    return f"line {place}" if isinstance(place, int) else place


# ---------------------------------------------------------------------------------------------------------------------
# Files

def source_files(path):
    """The files that a captions argument names: itself, a folder's tars, or a range "x-{0000..0575}.tar"; sorted."""
    path = Path(path)
    if path.is_dir():
        if files := sorted(path.glob("*.tar")):
            return files
        raise InputError(f"{path}: a folder without *.tar; give a TSV, CSV, JSON or JSONL file, or a folder of webdataset tars")
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", str(path))
    if not numbers:
        return [path]
    first, last = numbers.groups()
    if int(first) > int(last):
        raise InputError(f"{path}: its range of tars runs backwards; give {{{last}..{first}}}")
    before = str(path)[:numbers.start()]
    after = str(path)[numbers.end():]
    return [Path(f"{before}{n:0{len(first)}d}{after}") for n in range(int(first), int(last) + 1)]


def fingerprint(paths):
    """SHA-256 of what captions come from, in hexadecimal.

    Tars hold gigabytes of pictures: name, size and 16 samples stand for them.
    """
    digests = []
    for path in (file for argument in paths for file in source_files(argument)):
        with _opened(path) as file:
            if path.suffix != ".tar":
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
                continue
            size = file.seek(0, 2)
            digest = hashlib.sha256(f"{path.name} {size}".encode())
            for k in range(16):
                file.seek(size * k // 16)
                digest.update(file.read(4096))
            digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _opened(path):
    """A regular file, opened for reading bytes; a pipe would be waited for without end."""
    path = Path(path)
    reason = "not a regular file"
    try:
        if path.is_file() or not path.exists():
            return open(path, "rb")
    except OSError as error:
        reason = error.strerror
    raise InputError(f"{path}: {reason}; give a TSV, CSV, JSON or JSONL file, or webdataset tars")


def _records(path, skipped):
    """Yields (row number from 0, place: line number from 1 or sample of a tar, dict of fields)."""
    files = source_files(path)
    if files[0].suffix == ".tar":
        yield from _tars(files, skipped)
        return
    with _opened(path) as file:
        try:
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = gzip.open(file)
            for number, line, fields in _form(file, files[0].name)(file, path, skipped):
                for theirs in ALIASES.keys() & fields.keys():
                    fields.setdefault(ALIASES[theirs], fields[theirs])
                yield number, line, fields
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: gzip data damaged or cut off ({error}); download it anew") from None


def _form(file, name):
    """The reader of a file, by its name and its first character."""
    if name.removesuffix(".gz").endswith(".csv"):
        return _csv
    start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return {b"[": _json_list, b"{": _json_lines}.get(start, _tsv)


def _decoded(file, skipped):
    """Yields (line number, text without its line end); None for text that is not UTF-8, which is counted as skipped."""
    for line, raw in enumerate(file, 1):
        try:
            yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            skip(skipped, "invalid UTF-8", line)
            yield line, None


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def _check_header(header, path):
    if not {ALIASES.get(name, name) for name in header} & set(PROMPTS):
        raise InputError(f"{path}: line 1: no column raw, short or long, and not caption<TAB>url; "
                         f"give it a header among `{' '.join(FIELDS)}`")


def _tsv(file, path, skipped):
    lines = _decoded(file, skipped)
    line, first = next(lines, (1, ""))
    if not first:
        return
    header = first.split("\t")
    number = 0
    if len(header) == 2 and "://" in header[1]:  # caption<TAB>url, no header
        yield number, line, {"raw": header[0]}
        header = ["raw", "url"]
        number = 1
    else:
        _check_header(header, path)
    for number, (line, text) in enumerate(lines, number):
        if text is None:
            continue
        fields = text.split("\t")
        if len(fields) >= len(header) and text:
            yield number, line, dict(zip(header, fields))
        else:
            skip(skipped, "too few fields" if text else "empty line", line)


def _csv(file, path, skipped):
    """Quotes and line breaks inside them as in RFC 4180; commas, or tabs where the header has them."""
    def whole_lines():  # csv counts them itself; a line that is not UTF-8 must not shift its count
        for _, text in _decoded(file, skipped):
            yield ("" if text is None else text) + "\n"

    lines = whole_lines()
    first = next(lines, "\n")
    delimiter = "\t" if "\t" in first else ","
    try:
        header = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error as error:
        raise InputError(f"{path}: line 1: not CSV ({error}); save it with a header and line feeds") from None
    if not header:
        return
    _check_header(header, path)
    rows = csv.reader(lines, delimiter=delimiter)
    number = 0
    while True:
        try:
            fields = next(rows, None)
        except csv.Error as error:
            fields = []
            skip(skipped, f"not CSV ({error})", rows.line_num + 1)
        if fields is None:
            return
        if len(fields) >= len(header):
            yield number, rows.line_num + 1, dict(zip(header, fields))
        elif fields:
            skip(skipped, "too few fields", rows.line_num + 1)
        number += 1


# ---------------------------------------------------------------------------------------------------------------------
# JSON

def _json_lines(file, path, skipped):
    for number, (line, text) in enumerate(_decoded(file, skipped)):
        if not text:
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            skip(skipped, "not JSON", line)
            continue
        if isinstance(fields, dict):
            yield number, line, fields
        else:
            skip(skipped, "not a JSON object", line)


def _json_list(file, path, skipped):
    for number, entry in enumerate(json_entries(file, path)):
        if isinstance(entry, dict):
            yield number, number + 1, entry
        else:
            skip(skipped, "not a JSON object", number + 1)


def json_entries(file, path, cure="mend it, or write one object a line"):
    """Yields the entries of a JSON list one after the other: a list of gigabytes is never in memory whole.

    file: opened for reading bytes. Raises InputError, which names path, entry and cure, where it is no such list.
    """
    file = io.TextIOWrapper(file, "utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    separator = re.compile(r"\s*([,\]])\s*")
    number = 0
    try:
        text = file.read(CHUNK).lstrip()
        if text[:1] != "[":
            raise ValueError("no [ at its beginning")
        text = text[1:].lstrip()
        at = 0  # where the next entry begins in text
        while True:
            try:
                entry, end = decode(text, at)
                after = separator.match(text, end)  # a number may go on in what is not read yet
                if not after:
                    raise ValueError("no , or ] behind it")
            except ValueError:
                more = file.read(max(CHUNK, len(text) - at))  # doubled: a huge entry is not scanned again and again
                text = (text[at:] + more).lstrip()
                at = 0
                if number == 0 and text[:1] == "]":
                    after = separator.match(text)
                    break
                if not more:
                    raise
                continue
            yield entry
            number += 1
            at = after.end()
            if after[1] == "]":
                break
        if text[after.end():] or file.read().strip():
            raise ValueError("text after the list's end")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON list (entry {number + 1}: {error}); {cure}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tars

def sample_name(path):
    """webdataset's rule -> (folder, key, suffix): "a/b.c.JPG" is ("a/", "b", "c.jpg"). What has no key is no sample's."""
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash, key, suffix.lower()


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it: its headers. They are short; one that claims gigabytes is refused, not made room for."""

    def read(self, size):
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_files(path, skipped):
    """Yields (folder, key, suffix, first byte, bytes) of the regular files in a tar, in its order; none is read or unpacked.

    Where the tar is cut short or damaged it ends, and is counted in skipped[DAMAGED]. Sparse files are counted and left out.
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        end = -1
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # or tarfile remembers them all
                if member.size < 0 or tar.offset <= end:  # it would be read again without end
                    raise tarfile.ReadError(f"{member.name} has a size that cannot be")
                end = tar.offset
                folder, key, suffix = sample_name(member.name)
                if not member.isfile() or not key or not suffix:
                    continue
                if member.issparse():
                    skip(skipped, "sparse file in a tar", f"{path}:{member.name}")
                elif member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                else:
                    yield folder, key, suffix, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a whole tar ends in empty blocks
                raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset}")
    except Exception as error:  # tarfile raises nearly anything on a stranger's bytes, MemoryError too
        skip(skipped, DAMAGED, f"{os.path.basename(path)}: {error or type(error).__name__}")


def _tars(files, skipped):
    """Files that share a name up to its first dot are one sample."""
    number = 0
    for path in files:
        with _opened(path) as file:
            for (folder, key), members in groupby(tar_files(path, skipped), itemgetter(0, 1)):
                texts = {}
                for _, _, suffix, at, size in members:
                    if suffix not in ("txt", "json"):
                        continue
                    if size > LARGEST_TEXT:
                        skip(skipped, f"text of over {LARGEST_TEXT >> 20} MiB", f"{path}:{folder}{key}.{suffix}")
                        continue
                    file.seek(at)
                    texts[suffix] = file.read(size)
                if folder.startswith("/") or ".." in folder.split("/"):
                    skip(skipped, "path climbs out of the tar", f"{path}:{folder}{key}")
                    continue
                place = f"{path}:{key}"
                yield number, place, {"key": key} | _sample_fields(texts, place, skipped)
                number += 1


def _sample_fields(texts, place, skipped):
    """{"txt": bytes, "json": bytes} -> fields: .txt is the raw caption, else it is .json's "caption" (img2dataset's name)."""
    fields = {}
    for suffix in sorted(texts):
        try:
            if suffix == "txt":
                fields["raw"] = texts["txt"].decode("utf-8-sig")
            else:
                entries = json.loads(texts["json"])
                fields["raw"] = entries.get("caption")
                fields |= {name: entries[name] for name in PROMPTS if name in entries}
        except (ValueError, AttributeError, RecursionError):
            skip(skipped, "not UTF-8 text or not a JSON object", f"{place}.{suffix}")
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# Captions of one prompt set in a file of their own

def read_join(name, path, skipped, index=None, keep_lines=False):
    """-> Joined {key: caption}, the captions of prompt set `name` in a file of their own; the last one of a key counts.

    The caption is the field named as the set, else the first text that is neither key nor picture ({"__key__", "minicpm"}
    in the recaptioned releases). index: the database's file, which other processes `open_join`; without one it is a
    temporary file that goes when the process ends. keep_lines: see read_captions. Raises InputError where there is no caption, or the disk is full.
    """
    if index:
        Path(index).unlink(missing_ok=True)
    try:
        database = sqlite3.connect(index or "", check_same_thread=False)  # one thread at a time, but not always the same
        database.execute("PRAGMA journal_mode = OFF")  # what is half written is made anew
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE captions (key TEXT, caption TEXT)")
        database.executemany("INSERT INTO captions VALUES (?, ?)", _joined_rows(name, path, skipped, keep_lines))
        database.execute("CREATE INDEX keys ON captions (key)")
        database.commit()
        joined = Joined(database)
        if len(joined) == 0:
            raise InputError(f"{path}: no row with a key and a caption; --join wants rows with a key and a {name} caption")
    except BaseException as error:
        if index:
            Path(index).unlink(missing_ok=True)
        if isinstance(error, sqlite3.Error):
            raise InputError(f"{index or 'temporary folder'}: {error}; free space there for as much as {path} holds") from None
        raise
    return joined


def open_join(index):
    """What `read_join` wrote, for a process that only reads it."""
    return Joined(sqlite3.connect(f"{Path(index).absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False))


class Joined:
    """{key: caption} in a database on disk: memory is the same however many captions and processes there are."""

    def __init__(self, database):
        self.database = database

    def get(self, key):
        found = self.database.execute("SELECT caption FROM captions WHERE key = ? ORDER BY rowid DESC", (key,)).fetchone()
        return found[0] if found else None

    def __contains__(self, key):
        return self.get(key) is not None

    def __len__(self):
        return self.database.execute("SELECT count(DISTINCT key) FROM captions").fetchone()[0]


def _joined_rows(name, path, skipped, keep_lines):
    """Yields (key, caption)."""
    for _, place, fields in _records(path, skipped):
        texts = [fields.get(name)]
        for field, value in fields.items():
            if isinstance(value, str) and ALIASES.get(field, field) not in ("key", "image", "url"):
                texts.append(value)
        text = one_line(next(filter(None, texts), ""), keep_lines)
        key = fields.get("key")
        if key is None or not text or not _is_unicode(str(key), text):
            skip(skipped, "joined row without key or caption", place)
        else:
            yield str(key), text
