"""How captions lie on disk: every source becomes rows of (key, image, captions), one at a time, in its order.

    TSV with a header among `key image raw short long` (other columns are ignored)
    the official Conceptual Captions files: no header, caption<TAB>url (CC3M) or url<TAB>caption (CC12M)
    CSV with such a header, or open_clip's `filepath title`
    JSON (a list of objects) or JSONL (one object a line) with those same fields, or LLaVA's conversations
    COCO's captions JSON, and DreamLIP's CSV, whose pictures are URLs
    webdataset / img2dataset tars, never unpacked: one, a folder of them, or a range, "cc3m-{0000..0575}.tar"
    a folder of pictures, each with its caption beside it (a.jpg, a.txt), subfolders too; or with all captions
    in one metadata.jsonl or metadata.csv (`file_name text`, Hugging Face's imagefolder)

All but tars may be gzipped. Where there is no key, the row's number padded to nine digits is it, as in
img2dataset. A bad row is skipped and counted, never fatal; its row number is not given to another.
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
from contextlib import suppress
from itertools import chain, groupby, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

from data.files import disk_errors, write
from flame import InputError, PROMPTS, is_unicode

FIELDS = ("key", "image", *PROMPTS)
# others' names for these fields and the picture's URL; the first that is there counts. Of the recaptions by
# three models that DreamLIP gives, those of ShareGPT4V.
ALIASES = {"__key__": "key", "filepath": "image", "file_name": "image", "filename": "image",
           "Image Path": "url", "downloadurl": "url",
           "title": "raw", "caption": "raw", "txt": "raw", "text": "raw", "blip_caption": "raw",
           "raw_caption": "raw", "shortSV_captions": "short", "longSV_captions": "long"}
NO_CAPTION = {"key", "image", "url", "id", "image_id", "license"}
NO_CAPTION |= {theirs for theirs, ours in ALIASES.items() if ours in NO_CAPTION}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
HEADER = f"give it a header among `{' '.join(FIELDS)}`, or caption<TAB>url"
WANTED = "give a TSV, CSV, JSON or JSONL file, webdataset tars, or a folder of pictures with a .txt each"
DAMAGED = "tar that is none, or damaged from there on"
CHUNK = 1 << 20           # characters of a JSON list read at a time
LARGEST_TEXT = 1 << 24    # bytes of a .txt or .json in a tar: no caption is as long
LARGEST_HEADER = 1 << 14  # bytes of a header in a tar: a name and some numbers
ALIKE = 200               # pairs of a caption and a joined one that tell whether keys mean the same pictures


class Row(NamedTuple):
    key: str
    image: str       # the picture's path as the file gives it, or ""
    captions: dict   # prompt set -> the caption that its questions are asked of: its own, else the best one
    number: int      # of the row in its file, from 0
    url: str         # the picture's, or ""; joined captions may go by it


def read_captions(path, skipped=None, joins=None, keep_lines=False):
    """Yields Row after Row. skipped: a dict to fill with {reason: [how many, the first five places]}.

    joins: {prompt set: {key: caption}}, captions of that set from another file (`read_join`). keep_lines:
    captions as they are, line breaks and spaces too, as the released code takes them; else each is one line.
    Raises InputError where a file is missing, holds no caption column, or is not of a known form.
    """
    count = 0
    skipped = {} if skipped is None else skipped
    for number, place, fields in _records(path, skipped):
        key = fields.get("key")
        key = f"{number:09d}" if key is None or key == "" else str(key)
        image = str(fields.get("image") or "")
        url = str(fields.get("url") or "")
        texts = {name: one_line(fields[name], keep_lines) for name in PROMPTS if fields.get(name)}
        for name, captions in (joins or {}).items():
            text = joined_caption(captions, key, url)
            if text:
                texts[name] = text
            else:
                skip(skipped, f"key without a {name} caption in the joined file, kept with the best caption "
                              "present", place)
        best = texts.get("long") or texts.get("short") or texts.get("raw")
        if not best:
            skip(skipped, "no caption", place)
        elif re.search("[\t\r\n]", key + image):
            skip(skipped, "tab or line break in key or image", place)
        elif not is_unicode(key, image, *texts.values()):
            skip(skipped, "invalid UTF-8", place)
        else:
            count += 1
            yield Row(key, image, {name: texts.get(name) or best for name in PROMPTS}, number, url)
    if not count:
        why = [f"{reason}: {n} rows, first {_where(places[0])}" for reason, (n, places) in skipped.items()]
        raise InputError(f"{path}: no row with a caption ({'; '.join(why) or 'the file is empty'}); {HEADER}")


def first_rows(path, n):
    """n of them, fewer where there are no more: none where all captions are in a file of their own."""
    with suppress(InputError):
        return list(islice(read_captions(path), n))
    return []


def one_line(text, keep_lines=False):
    """A text without white space at the ends and with single spaces for any inside; "" for what is no text.

    Of a list of captions the first. keep_lines: as it is, but "" where there is nothing but white space.
    """
    text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str):  # such as the NaN of a gap in a table
        return ""
    if keep_lines:
        return text if text.strip() else ""
    if text.isprintable() and "  " not in text and text == text.strip():  # most are: not worth taking apart
        return text
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------
# What is skipped

def skip(skipped, reason, place):
    """Counts a bad row: skipped[reason] = [how many, the first five places (line numbers, or texts)]."""
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


# ------------------------------------------------------------------------------------------------------------
# Files

def source_files(path):
    """The files that a captions argument names, sorted: one, a range "x-{0..9}.tar", or what a folder has."""
    path = Path(path)
    if path.is_dir():
        for pattern in ("*.tar", "metadata.jsonl", "metadata.csv", "**/*.txt"):
            files = sorted(path.glob(pattern))
            if pattern == "**/*.txt":
                files = [file for file in files if file.is_file()]  # of many, a pipe is passed over
            if files:
                return files
        raise InputError(f"{path}: a folder without *.tar, metadata.jsonl or pictures with a .txt; {WANTED}")
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path))
    if not span:
        return [path]
    before, first, last, after = span.groups()
    files = [Path(f"{before}{n:0{len(first)}d}{after}") for n in range(int(first), int(last) + 1)]
    if not files:
        raise InputError(f"{path}: its range of tars runs backwards; give {{{last}..{first}}}")
    return files


def source_name(path):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar, or . in cc3m/ -> cc3m"""
    return re.split(r"[.{]", Path(path).resolve().name)[0].rstrip("-_") or "captions"


def fingerprint(paths):
    """SHA-256 of what captions come from, in hexadecimal."""
    digests = []
    for path in paths:
        for file in source_files(path):
            digests.append(_digest(file))
            if os.path.isdir(path) and file.suffix == ".txt":  # its path is key and image
                digests.append(str(file.relative_to(path)))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(os.fsencode(" ".join(digests))).hexdigest()


def _digest(path):
    """Of a file's bytes. A tar holds gigabytes of pictures: its name, size and 16 samples stand for them."""
    with _opened(path) as file:
        if path.suffix != ".tar":
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, 2)
        digest = hashlib.sha256(f"{path.name} {size}".encode())
        for k in range(16):
            file.seek(size * k // 16)
            digest.update(file.read(4096))
        return digest.hexdigest()


def _opened(path):
    """A regular file, opened for reading bytes; a pipe would be waited for without end."""
    with disk_errors(path, WANTED):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(None, "not a regular file")
        return open(path, "rb")


def _records(path, skipped):
    """Yields (row number from 0, place: line number from 1 or sample of a tar, dict of fields)."""
    for number, (place, fields) in enumerate(_rows(path, skipped)):
        if isinstance(fields, dict):
            for theirs, ours in ALIASES.items():
                if theirs in fields:
                    fields.setdefault(ours, fields[theirs])
            if "conversations" in fields:
                fields |= _conversation(fields)
            yield number, place, fields
        elif fields:
            skip(skipped, fields, place)


def column_taken(path, name):
    """Which of others' names stands for a prompt set in a source's first row, None where none does."""
    _, _, fields = next(_records(path, {}), (None, None, {}))
    for theirs, ours in ALIASES.items():
        if ours == name and theirs in fields and fields[ours] is fields[theirs]:
            return theirs
    return None


def _rows(path, skipped):
    """Yields (place, fields) of each row, by the form of the file. In place of the fields of a bad row stands
    a text that says what is wrong, or None if it is only empty.
    """
    files = source_files(path)
    name = files[0].name.removesuffix(".gz")
    if name.endswith(".tar"):
        yield from _tars(files, skipped)
        return
    if name.endswith(".txt") and os.path.isdir(path):
        yield from _texts(Path(path), files)
        return
    if name.endswith(".parquet"):
        raise InputError(f"{path}: Parquet is not read; write it as JSONL first, with pandas: "
                         "read_parquet(...).to_json('captions.jsonl', orient='records', lines=True)")
    path = files[0]
    with _opened(path) as file:
        try:
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = gzip.open(file)
            start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if name.endswith(".csv"):
                yield from _table(file, path, csv.QUOTE_MINIMAL)
            elif name.endswith(".tsv"):  # whatever its first caption begins with
                yield from _table(file, path, csv.QUOTE_NONE)
            elif start == b"[":
                for number, entry in enumerate(json_entries(file, path), 1):
                    yield number, _object(entry)
            elif start == b"{":
                yield from _json_lines(file)
            else:
                yield from _table(file, path, csv.QUOTE_NONE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: gzip data damaged or cut off ({error}); download it anew") from None


def _lines(file):
    """Yields a file's lines. A byte that is not UTF-8 becomes a surrogate, which marks its row as bad."""
    for line in io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n"):
        yield line.rstrip("\r\n").replace("\r", " ")  # to csv a lone \r is an error


# ------------------------------------------------------------------------------------------------------------
# Tables

def _table(file, path, quoting):
    """TSV; with QUOTE_MINIMAL CSV: quotes as in RFC 4180, and commas, or tabs where its header has them."""
    rows = _fields(file, quoting)
    line, header = next(rows)
    links = [place for place, field in enumerate(header) if "://" in field]
    if len(header) == 2 and links:  # caption<TAB>url or url<TAB>caption, no header
        rows = chain([(line, header)], rows)
        header = ["url", "raw"] if links[0] == 0 else ["raw", "url"]
    elif header and not {ALIASES.get(name, name) for name in header} & set(PROMPTS):
        raise InputError(f"{path}: line 1: no column raw, short or long, and not caption<TAB>url; {HEADER}")
    for line, fields in rows:
        if not fields:
            fields = "empty line"
        elif isinstance(fields, list):
            few = len(fields) < len(header)
            more = any(fields[len(header):])
            wrong = "too few fields" * few or "too many fields: a tab or comma in a caption?" * more
            fields = wrong or dict(zip(header, fields))
        yield line, fields


def _fields(file, quoting):
    """Yields (number of a row's last line, its fields, or a text that says why it is no row)."""
    lines = (f"{line}\n" for line in _lines(file))
    first = next(lines, "")
    delimiter = "\t"
    if quoting != csv.QUOTE_NONE and "\t" not in first:
        delimiter = ";" if ";" in first and "," not in first else ","  # as some countries' spreadsheets write
    rows = csv.reader(chain([first], lines), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fields = f"not CSV ({error})"
        yield rows.line_num, fields


# ------------------------------------------------------------------------------------------------------------
# JSON

def _object(value):
    return value if isinstance(value, dict) else "not a JSON object"


def _conversation(fields):
    """LLaVA's and ShareGPT4V's entries: the first answer is a long caption, "id" the key."""
    turns = fields["conversations"]
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
    found = {"long": answers[0] if answers else None, "key": fields.get("id")}
    return {name: value for name, value in found.items() if value is not None and name not in fields}


def _json_lines(file):
    """One object a line. One with a list of annotations is COCO's, and whole in memory: 0.5 GB for COCO."""
    lines = _lines(file)
    first = next(lines, "")
    if first.strip() == "{":  # one object over many lines
        first += "".join(lines)
    for line, text in enumerate(chain([first], lines), 1):
        try:
            fields = _object(json.loads(text)) if text else None
        except (ValueError, RecursionError):
            fields = "not JSON"
        if isinstance(fields, dict) and isinstance(fields.get("annotations"), list):
            yield from _coco(fields)
        else:
            yield line, fields


def _coco(fields):
    """Yields (place, fields) of each caption of COCO's captions_train2017.json: several a picture."""
    images = fields.get("images")
    images = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    name_of = {str(image.get("id")): image.get("file_name") for image in images}
    for number, said in enumerate(map(_object, fields["annotations"]), 1):
        if isinstance(said, dict):
            said = {"key": said.get("id"), "image": name_of.get(str(said.get("image_id"))),
                    "raw": said.get("caption")}
        yield f"annotation {number}", said


def json_entries(file, path, cure="mend it, or write one object a line"):
    """Yields the entries of a JSON list one after the other: a list of gigabytes is never in memory whole.

    file: opened for reading bytes. Raises InputError, which names path, entry and cure, where it is no list.
    """
    file = io.TextIOWrapper(file, "utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    separator = re.compile(r"\s*([,\]])\s*")
    number = 0
    at = 0  # where the next entry begins in text
    try:
        text = file.read(CHUNK).lstrip()
        if text[:1] != "[":
            raise ValueError("no [ at its beginning")
        text = text[1:].lstrip()
        while True:
            try:
                entry, end = decode(text, at)
                after = separator.match(text, end)  # a number may go on in what is not read yet
                if not after:
                    raise ValueError("no , or ] behind it")
            except ValueError:
                # As much again as is pending: a huge entry is parsed a few times, not once a chunk.
                more = file.read(max(CHUNK, len(text) - at))
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


# ------------------------------------------------------------------------------------------------------------
# Tars

def sample_name(path):
    """-> folder, key, suffix: "a/", "b", "c.jpg" of "a/b.c.JPG". A key ends at its first dot (webdataset)."""
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash, key, suffix.lower()


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it, by headers. One that claims gigabytes is refused, not made room for."""

    def read(self, size):
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def tar_files(path, skipped):
    """Yields (folder, key, suffix, first byte, bytes) of a tar's regular files, in its order; unpacks none.

    Where the tar is cut short or damaged it ends, and counts as skipped[DAMAGED]. Sparse files are left out.
    """
    try:
        if not os.path.isfile(path):
            raise tarfile.ReadError("not a regular file")
        size = os.path.getsize(path)
        end = -1
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # or tarfile remembers them all
                if tar.offset <= end:  # a negative size; what comes before would come again without end
                    raise tarfile.ReadError(f"{member.name} ends before it begins")
                end = tar.offset
                folder, key, suffix = sample_name(member.name)
                if not member.isfile() or not key or not suffix:
                    continue
                if member.issparse():
                    skip(skipped, "sparse file in a tar", f"{path}:{member.name}")
                elif 0 <= member.size <= size - member.offset_data:
                    yield folder, key, suffix, member.offset_data, member.size
                else:
                    raise tarfile.ReadError(f"{member.name} is cut off")
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a whole tar ends in empty blocks
                raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset}")
    except Exception as error:  # tarfile raises nearly anything on a stranger's bytes, MemoryError too
        skip(skipped, DAMAGED, f"{os.path.basename(path)}: {str(error) or type(error).__name__}")


def tar_samples(path, skipped):
    """Yields (folder, key, the opened tar, {suffix: (first byte, bytes)}) of its samples: files that share a
    name up to its first dot. Raises InputError where it is no regular file.
    """
    with _opened(path) as file:
        for (folder, key), members in groupby(tar_files(path, skipped), itemgetter(0, 1)):
            yield folder, key, file, {suffix: place for _, _, suffix, *place in members}


def _tars(files, skipped):
    """Yields (place, fields) of the samples."""
    for path in files:
        for folder, key, file, places in tar_samples(path, skipped):
            place = f"{path}:{folder}{key}"
            fields = {"key": key} | _sample_fields(file, places, place, skipped)
            outside = folder.startswith("/") or ".." in folder.split("/")
            yield place, "path climbs out of the tar" if outside else fields


def _sample_fields(file, places, place, skipped):
    """A sample's files in a tar -> fields: .json's captions and URL by any known name; .txt is raw's."""
    fields = {}
    for suffix in ("json", "txt"):  # the last one's caption counts
        if suffix not in places:
            continue
        offset, size = places[suffix]
        if size > LARGEST_TEXT:
            skip(skipped, "text too large for a caption", f"{place}.{suffix}")
            continue
        file.seek(offset)
        try:
            if suffix == "txt":
                fields["raw"] = file.read(size).decode("utf-8-sig")
            else:
                entries = json.loads(file.read(size))
                wanted = ("url", *PROMPTS)
                fields |= {name: text for name, text in entries.items() if ALIASES.get(name, name) in wanted}
        except (ValueError, AttributeError, RecursionError):
            skip(skipped, "not UTF-8 text or not a JSON object", f"{place}.{suffix}")
    return fields


# ------------------------------------------------------------------------------------------------------------
# A folder of pictures with their texts

def _texts(folder, files):
    """Yields (place, fields) of each a.txt that has a picture beside it; its path is key and image."""
    for here, texts in groupby(sorted(files, key=attrgetter("parent", "name")), attrgetter("parent")):
        beside = sorted(path for path in here.iterdir() if path.suffix.lower() in PICTURES)
        pictures = {path.stem: path.relative_to(folder) for path in reversed(beside)}  # the first of a stem
        for file in texts:
            picture = pictures.get(file.stem)
            try:
                with _opened(file) as opened:
                    text = opened.read(LARGEST_TEXT).decode("utf-8-sig")
            except ValueError:
                yield str(file), "not UTF-8 text"
                continue
            if picture is None:
                yield str(file), "text without a picture beside it"
            else:
                yield str(file), {"key": str(picture.with_suffix("")), "image": str(picture), "raw": text}


# ------------------------------------------------------------------------------------------------------------
# Captions of one prompt set in a file of their own

def read_join(name, path, skipped, index=None, keep_lines=False):
    """-> Joined {key: caption} of one prompt set from a file of its own; the last one of a key counts.

    Where a row has no key, the picture's URL serves. The caption is the field named as the set; without one,
    the first text that is neither key nor picture, such as "minicpm" in the recaptioned releases. index: the
    database's file, for other processes to `open_join`; without one it is a temporary file. keep_lines: see
    read_captions. Raises InputError where there is no caption, or the disk is full.
    """
    if index is None:
        return Joined(_make_join("", name, path, skipped, keep_lines))

    def save(temporary):
        _make_join(temporary, name, path, skipped, keep_lines).close()

    write(index, save)
    return open_join(index)


def check_join(captions, name, file, joined):
    """Raises InputError where the joined captions are of other pictures, as keys of other tars make them.

    A recaption shares words with its picture's own caption, more than with another picture's. Of a sample of
    pairs, no more than by chance: then keys do not mean the same. Where they share none at all, since the
    languages differ, nothing can be said.
    """
    pairs = []
    for row in first_rows(captions, 10 * ALIKE):
        text = joined_caption(joined, row.key, row.url)
        if text:
            pairs.append((_words(row.captions["raw"]), _words(text)))
        if len(pairs) == ALIKE:
            break
    if len(pairs) < ALIKE:
        return
    of_another = [*pairs[1:], pairs[0]]
    own = sum(len(raw & text) for raw, text in pairs)
    chance = sum(len(raw & text) for (raw, _), (_, text) in zip(pairs, of_another))
    if chance > ALIKE / 10 and own < 1.2 * chance:
        raise InputError(
            f"{file}: its {name} captions share no more words with the captions of the same keys in "
            f"{captions} than with others: keys mean other pictures there. Recaptions go with the tars they "
            "were made from, those of FLAME for CC3M with pixparse/cc3m-wds; give --captions these")


def joined_caption(captions, key, url):
    """What a mapping that `read_join` made has for a row: by its key, else by its picture's URL. None or ""
    where there is nothing.
    """
    return captions.get(key) or url and captions.get(url)


def _words(text):
    """What a caption is about: its words of four letters and more."""
    return set(re.findall(r"\w{4,}", text.lower()))


def open_join(index):
    """What `read_join` wrote, for a process that only reads it."""
    return Joined(_connect(f"{Path(index).absolute().as_uri()}?immutable=1"))


def _connect(database):
    return sqlite3.connect(database, uri=True, check_same_thread=False)  # the LLM's queue reads in a thread


def _make_join(file, name, path, skipped, keep_lines):
    try:
        database = _connect(file)
        database.execute("PRAGMA journal_mode = OFF")  # what is left half written is made anew
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE captions (key TEXT, caption TEXT)")
        pairs = joined_rows(name, path, skipped, keep_lines)
        rows = database.executemany("INSERT INTO captions VALUES (?, ?)", pairs)
        database.execute("CREATE INDEX keys ON captions (key)")
        database.commit()
    except sqlite3.Error as error:
        folder = os.path.dirname(file) or "the temporary folder"
        raise InputError(f"{folder}: {error}; free space there for as much as {path} holds") from None
    if rows.rowcount < 1:
        raise InputError(f"{path}: no row with a key and a caption; --join wants a key and a {name} caption")
    return database


def joined_rows(name, path, skipped, keep_lines=False):
    """Yields (key or URL, caption)."""
    for _, place, fields in _records(path, skipped):
        texts = [text for field, text in fields.items() if field not in NO_CAPTION and isinstance(text, str)]
        texts = [fields[name]] if name in fields else texts  # where its own is empty, no other is meant
        text = one_line(next(filter(None, texts), ""), keep_lines)
        key = fields.get("key", fields.get("url"))
        if key is None or not text or not is_unicode(str(key), text):
            skip(skipped, "joined row without key or caption", place)
        else:
            yield str(key), text


class Joined:
    """{key: caption} in a database on disk: memory stays small, however many captions and processes."""

    def __init__(self, database):
        self.database = database

    def get(self, key):
        if not is_unicode(str(key)):  # nothing that sqlite could be asked for
            return None
        rows = self.database.execute("SELECT caption FROM captions WHERE key = ? ORDER BY rowid DESC", (key,))
        found = rows.fetchone()
        return found[0] if found else None

    def __contains__(self, key):
        return self.get(key) is not None

    def __len__(self):
        return self.database.execute("SELECT count(DISTINCT key) FROM captions").fetchone()[0]
