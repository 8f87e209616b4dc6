"""How captions lie on disk: every source becomes rows of (key, image, captions), one at a time, in file order.

    TSV with a header among `key image raw short long` (other columns are ignored)
    the official Conceptual Captions TSV: no header, caption<TAB>url
    CSV with such a header, or open_clip's `filepath title`
    JSON (a list of objects) or JSONL (one object a line) with those same fields
    webdataset / img2dataset tars: one tar, a folder of them, or a range, "cc3m-{0000..0575}.tar"; read in place, never unpacked

All but tars may be gzipped. Where there is no key, the row's number padded to nine digits is it, as img2dataset names its
samples. A bad row is skipped and counted, never fatal; its row number is not given to another.
"""
import csv
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from flame import InputError, PROMPTS

FIELDS = ("key", "image", *PROMPTS)
CHUNK = 1 << 20  # characters of a JSON list read at a time
ALIASES = {"__key__": "key", "filepath": "image", "title": "raw", "caption": "raw", "txt": "raw"}  # others' names for them


class Row(NamedTuple):
    key: str
    image: str       # the picture's path as the file gives it, or ""
    captions: dict   # prompt set -> the caption that its questions are asked of: its own, else the best one present
    number: int      # of the row in its file, from 0


def read_captions(path, skipped=None, joins=None):
    """Yields Row after Row. skipped: a dict to fill with {reason: [how many, the first five places]}.

    joins: {prompt set: {key: caption}}, captions of that set from another file (`read_join`).
    Raises InputError where a file is missing, holds no caption column, or is not of a known form.
    """
    count = 0
    skipped = {} if skipped is None else skipped
    for number, place, fields in _records(path, skipped):
        key, image = fields.get("key"), str(fields.get("image") or "")
        texts = {name: text for name in PROMPTS if (text := fields.get(name)) and (text := one_line(text))}
        key = f"{number:09d}" if key is None or key == "" else str(key)
        if joins:
            for name, captions in joins.items():
                if text := captions.get(key):
                    texts[name] = text
                else:
                    skip(skipped, f"key without a {name} caption in the joined file, kept with the best caption present", place)
        if not texts:
            skip(skipped, "no caption", place)
        elif not (key + image).isprintable() and any(c in key + image for c in "\t\r\n"):
            skip(skipped, "tab or line break in key or image", place)
        elif not _is_unicode(key, image, *texts.values()):
            skip(skipped, "invalid Unicode", place)
        else:
            count += 1
            if len(texts) < len(PROMPTS):
                best = texts.get("long") or texts.get("short") or texts["raw"]
                texts = {name: texts.get(name, best) for name in PROMPTS}
            yield Row(key, image, texts, number)
    if not count:
        reasons = "; ".join(f"{reason}: {n} rows, first in line {places[0]}" for reason, (n, places) in skipped.items())
        raise InputError(f"{path}: no row with a caption ({reasons or 'the file is empty'}); give a TSV with a header among `{' '.join(FIELDS)}`, or caption<TAB>url")


def one_line(text):
    """Any value as text, without white space at the ends and with single spaces for any inside."""
    text = str(text)
    plain = text.isprintable() and "  " not in text and text[0] != " " and text[-1] != " "  # most are: not worth taking apart
    return text if plain else " ".join(text.split())


def read_join(name, path, skipped):
    """{key: caption} of one prompt set from a file of its own, such as the recaptioned releases' JSON lists.

    The caption is the field named as the set, else the first text that is neither key nor picture ({"__key__", "minicpm"}).
    """
    captions = {}
    for _, place, fields in _records(path, skipped):
        texts = [fields[name]] if fields.get(name) else [v for k, v in fields.items() if isinstance(v, str) and ALIASES.get(k, k) not in ("key", "image", "url")]
        text = one_line(texts[0]) if texts else ""
        if fields.get("key") is None or not text or not _is_unicode(text):
            skip(skipped, "joined row without key or caption", place)
        else:
            captions[str(fields["key"])] = text
    if not captions:
        raise InputError(f"{path}: no row with a key and a caption; --join wants rows with a key and a {name} caption")
    return captions


def skip(skipped, reason, place):
    """Counts a bad row: skipped[reason] = [how many, the first five places (line numbers, or samples of a tar)]."""
    entry = skipped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 5:
        entry[1].append(place)


def report_skipped(path, skipped):
    """Says on stderr what was skipped, a line a reason."""
    for reason, (count, places) in skipped.items():
        print(f"{path}: skipped {count} row{'s' * (count > 1)}: {reason} ({'line ' * isinstance(places[0], int)}{', '.join(map(str, places))}{', ...' * (count > len(places))})", file=sys.stderr)


def source_files(path):
    """The files that a captions argument names: itself, a folder's tars, or a range "x-{0000..0575}.tar"; sorted."""
    path = Path(path)
    if path.is_dir():
        if files := sorted(path.glob("*.tar")):
            return files
        raise InputError(f"{path}: a folder without *.tar; give a TSV, CSV, JSON or JSONL file, or a folder of webdataset tars")
    if not (numbers := re.search(r"\{(\d+)\.\.(\d+)\}", str(path))):
        return [path]
    before, after = str(path)[:numbers.start()], str(path)[numbers.end():]
    first, last = numbers.groups()
    return [Path(f"{before}{n:0{len(first)}d}{after}") for n in range(int(first), int(last) + 1)]


def fingerprint(paths):
    """SHA-256 of what captions come from, in hexadecimal. Tars hold gigabytes of pictures: name, size and 16 samples stand for them."""
    digests = []
    for path in (file for p in paths for file in source_files(p)):
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


def _is_unicode(*texts):
    """False where a JSON escape made half a surrogate pair, which UTF-8 cannot write."""
    return all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts)


def _opened(path):
    try:
        return open(path, "rb")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; --captions wants a TSV, CSV, JSON or JSONL file, or webdataset tars") from None


def _records(path, skipped):
    """Yields (row number from 0, place: line number from 1 or sample of a tar, dict of fields)."""
    files = source_files(path)
    if files[0].suffix == ".tar":
        return (yield from _tars(files, skipped))
    with _opened(path) as file:
        try:
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = gzip.open(file)
            start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            name = files[0].name.removesuffix(".gz")
            form = _csv if name.endswith(".csv") else _json_list if start == b"[" else _json_lines if start == b"{" else _tsv
            for number, line, fields in form(file, path, skipped):
                for theirs in ALIASES.keys() & fields.keys():
                    fields.setdefault(ALIASES[theirs], fields[theirs])
                yield number, line, fields
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise InputError(f"{path}: gzip data damaged or cut off ({e}); download it anew") from None


def _decoded(file, skipped):
    """Yields (line number, text without its line end); None for text that is not UTF-8, which is counted as skipped."""
    for line, raw in enumerate(file, 1):
        try:
            yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            skip(skipped, "invalid UTF-8", line)
            yield line, None


def _check_header(header, path):
    if not {ALIASES.get(name, name) for name in header} & set(PROMPTS):
        raise InputError(f"{path}: line 1: no column raw, short or long, and not caption<TAB>url; give it a header among `{' '.join(FIELDS)}`")


def _tsv(file, path, skipped):
    lines = _decoded(file, skipped)
    line, first = next(lines, (1, ""))
    header = (first or "").split("\t")
    conceptual = len(header) == 2 and "://" in header[1]  # caption<TAB>url, no header
    if conceptual:
        yield 0, line, {"raw": header[0]}
        header = ["raw", "url"]
    elif first:
        _check_header(header, path)
    else:
        return
    for number, (line, text) in enumerate(lines, 1 if conceptual else 0):
        if text:
            fields = text.split("\t")
            if len(fields) < len(header):
                skip(skipped, "too few fields", line)
            else:
                yield number, line, dict(zip(header, fields))
        elif text is not None:
            skip(skipped, "empty line", line)


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
    except csv.Error as e:
        raise InputError(f"{path}: line 1: not CSV ({e}); save it with a header and line feeds") from None
    if not header:
        return
    _check_header(header, path)
    rows, number = csv.reader(lines, delimiter=delimiter), 0
    while True:
        try:
            fields = next(rows, None)
        except csv.Error as e:
            fields = []
            skip(skipped, f"not CSV ({e})", rows.line_num + 1)
        if fields is None:
            return
        if len(fields) >= len(header):
            yield number, rows.line_num + 1, dict(zip(header, fields))
        elif fields:
            skip(skipped, "too few fields", rows.line_num + 1)
        number += 1


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
    """One entry after the other, so that a list of gigabytes is never in memory whole."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    file, number, ended = io.TextIOWrapper(file, "utf-8-sig"), 0, False
    try:
        text, at = file.read(CHUNK).lstrip()[1:], 0
        while True:
            at = space.match(text, at).end()
            try:
                if number == 0 and text[at:at + 1] == "]":
                    break
                fields, end = decode(text, at)
                end = space.match(text, end).end()
                if text[end:end + 1] not in (",", "]"):  # or nothing: a number may go on in what is not read yet
                    raise json.JSONDecodeError("expected , or ]", text, end)
            except json.JSONDecodeError:
                if ended:
                    raise
                more = file.read(max(CHUNK, len(text) - at))  # doubled, so that a huge entry is not scanned again and again
                text, at, ended = text[at:] + more, 0, not more
                continue
            if isinstance(fields, dict):
                yield number, number + 1, fields
            else:
                skip(skipped, "not a JSON object", number + 1)
            number, at = number + 1, end + 1
            if text[end] == "]":
                break
        if text[at + (number == 0):].strip() or file.read().strip():
            raise ValueError("text after the list's end")
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not a JSON list (entry {number + 1}: {e}); mend it, or write one object a line") from None


def _tars(files, skipped):
    number = 0
    for path in files:
        with _opened(path) as file:
            try:
                for place, fields in _samples(tarfile.open(fileobj=file, mode="r:"), path, skipped):
                    yield number, place, fields
                    number += 1
            except tarfile.TarError as e:
                skip(skipped, f"tar that is none, or damaged from there on ({e})", f"{path}, sample {number}")


def _samples(tar, path, skipped):
    """Members that share a name up to its first dot: .txt is the raw caption, .json the fields (img2dataset's "caption" is raw)."""
    sample, base = {}, None
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isfile() or not suffix:
            continue
        if member.name.startswith("/") or ".." in folder.split("/"):
            skip(skipped, "path climbs out of the tar", f"{path}:{member.name}")
            continue
        if (folder, stem) != base:
            if sample:
                yield f"{path}:{base[1]}", sample
            sample, base = {"key": stem}, (folder, stem)
        if suffix not in ("txt", "json"):
            continue
        data = tar.extractfile(member).read()
        if len(data) < member.size:
            raise tarfile.ReadError(f"{member.name} is cut off")
        try:
            if suffix == "txt":
                sample["raw"] = data.decode("utf-8-sig")
            else:
                fields = json.loads(data)
                sample = {"raw": fields.get("caption")} | {name: fields[name] for name in PROMPTS if name in fields} | sample
        except (ValueError, AttributeError, RecursionError):
            skip(skipped, "not UTF-8 text or not a JSON object", f"{path}:{member.name}")
    if sample:
        yield f"{path}:{base[1]}", sample
