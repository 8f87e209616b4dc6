"""How captions lie on disk: every source becomes rows of (key, image, captions), one at a time, in file order.

    TSV with a header among `key image raw short long` (other columns are ignored)
    the official Conceptual Captions TSV: no header, caption<TAB>url
    JSON (a list of objects) or JSONL (one object a line) with those same fields

Where there is no key, the row's number padded to nine digits is it, as img2dataset names its samples.
A bad row is skipped and counted, never fatal; its row number is not given to another.
"""
import json
from typing import NamedTuple

from flame import InputError, PROMPTS

FIELDS = ("key", "image", *PROMPTS)


class Row(NamedTuple):
    key: str
    image: str       # the picture's path as the file gives it, or ""
    captions: dict   # prompt set -> the caption that its questions are asked of: its own, else the best one present


def read_captions(path, skipped=None):
    """Yields Row after Row. skipped: a dict to fill with {reason: [line numbers]}, at most five a reason, then a count.

    Raises InputError where the file is missing, holds no caption column, or is not of a known form.
    """
    count = 0
    skipped = {} if skipped is None else skipped
    for number, line, fields in _records(path, skipped):
        key = str(fields.get("key") or f"{number:09d}")
        texts = {name: " ".join(str(fields[name]).split()) for name in PROMPTS if fields.get(name)}
        texts = {name: text for name, text in texts.items() if text}
        if not texts:
            skip(skipped, "no caption", line)
        elif any(c in key + str(fields.get("image") or "") for c in "\t\r\n"):
            skip(skipped, "tab or line break in key or image", line)
        else:
            best = texts.get("long") or texts.get("short") or texts["raw"]
            count += 1
            yield Row(key, str(fields.get("image") or ""), {name: texts.get(name, best) for name in PROMPTS})
    if not count:
        reasons = "; ".join(f"{reason}: {n} rows, first in line {lines[0]}" for reason, (n, lines) in skipped.items())
        raise InputError(f"{path}: no row with a caption ({reasons or 'the file is empty'}); give a TSV with a header among `{' '.join(FIELDS)}`, or caption<TAB>url")


def skip(skipped, reason, line):
    """Counts a bad row: skipped[reason] = [how many, the first five line numbers]."""
    entry = skipped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 5:
        entry[1].append(line)


def _records(path, skipped):
    """Yields (row number from 0, line number from 1, dict of fields)."""
    try:
        file = open(path, "rb")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; --captions wants a TSV, JSON or JSONL file") from None
    with file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if start == b"[":
            yield from _json_list(file, path, skipped)
        elif start == b"{":
            yield from _json_lines(file, skipped)
        else:
            yield from _tsv(file, path, skipped)


def _decoded(file, skipped):
    """Yields (line number, text without its line end); None for text that is not UTF-8, which is counted as skipped."""
    for line, raw in enumerate(file, 1):
        try:
            yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            skip(skipped, "invalid UTF-8", line)
            yield line, None


def _tsv(file, path, skipped):
    lines = _decoded(file, skipped)
    line, first = next(lines, (1, ""))
    header = (first or "").split("\t")
    conceptual = len(header) == 2 and "://" in header[1]  # caption<TAB>url, no header
    if conceptual:
        yield 0, line, {"raw": header[0]}
        header = ["raw", "url"]
    elif not set(PROMPTS) & set(header):
        if first:
            raise InputError(f"{path}: line 1: no column raw, short or long, and not caption<TAB>url; give it a header among `{' '.join(FIELDS)}`")
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


def _json_lines(file, skipped):
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
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not a JSON list ({e}); mend it, or write one object a line") from None
    for number, fields in enumerate(rows):
        if isinstance(fields, dict):
            yield number, number + 1, fields
        else:
            skip(skipped, "not a JSON object", number + 1)
