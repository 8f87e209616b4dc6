"""Writing an embedding store; flame.Store reads it.

captions.tsv is the table of captions, meta.json says what the vectors are made of, and 000000.npy,
000001.npy ... are windows of the table's rows, float16 [window, 11, D]. A window that exists is done: where
the writer is killed or the disk is full, the same command makes those that are missing, and ends with the
same bytes. Two runs at once write the same bytes under the same names.
"""
import hashlib
import json
import shutil
from functools import reduce
from itertools import accumulate
from operator import getitem
from pathlib import Path

import flame
from data import files
from flame import InputError, read_json, reading

# What the bytes depend on. Captions and LLM may have moved: their hashes tell.
FIXED = ("llm: fingerprint", "llm: layer", "llm: positions", "llm: questions", "captions: sha256", "columns",
         "D", "dtype", "device", "budget", "window")
CURE = "choose another --out, or --overwrite"
WINDOWS = "[0-9][0-9][0-9][0-9][0-9][0-9].npy"


def window_file(out, w):
    return out / f"{w:06d}.npy"


def begin(out, settings, make_table, overwrite):
    """Makes the table and meta.json, where there are none.

    settings: all that fixes the bytes. make_table(path) writes captions.tsv and checks all that can be
    checked: with overwrite, what was there goes only after that. Raises InputError where the store was made
    with other settings, or where files lie that no run of embed.py left, overwrite or not.
    """
    meta = out / "meta.json"
    table = out / "captions.tsv"
    earlier = [*out.glob(table.name), *out.glob(WINDOWS)]
    begun = meta.exists()  # looked for last: another run writes it first
    if earlier and not begun:
        raise InputError(f"{earlier[0]}: no run of embed.py left this here; choose another --out")
    if begun and not overwrite:
        recorded = check_settings(out, settings)
        if table.exists():
            with reading(table, CURE):
                if window_starts(table, settings["window"]) != (recorded["N"], recorded["starts"]):
                    raise ValueError("not the table that meta.json speaks of")
            return
    with files.replacing(table) as temporary:
        make_table(temporary)
        N, starts = window_starts(temporary, settings["window"])
        if begun and overwrite:
            shutil.rmtree(out / "pictures", ignore_errors=True)
            for path in (table, *out.glob(WINDOWS)):
                path.unlink(missing_ok=True)
        elif meta.exists():  # another run's meanwhile
            check_settings(out, settings)
        files.write_json(meta, settings | {"N": N, "starts": starts})


def check_settings(out, settings):
    """-> meta.json's entries. Raises InputError where it was made with other settings."""
    meta = out / "meta.json"
    with reading(meta, CURE):
        recorded = read_json(meta, CURE)
        for setting in FIXED:
            was, now = (reduce(getitem, setting.split(": "), entries) for entries in (recorded, settings))
            if was != now:
                raise InputError(f"{meta}: made with {setting} {was}, now it is {now}; {CURE}")
    return recorded


def missing_windows(out, meta):
    """-> their numbers"""
    return [w for w in range(len(meta["starts"])) if not window_file(out, w).exists()]


def llm_fingerprint(llm_dir):
    """Names an LLM by what is read of it: 16 hexadecimal digits of a SHA-256.

    Over config.json, the tokenizer's files, and each safetensors file's name, header and every tensor's first
    4 KiB: under a second for a 24-GB model, and a fine-tune of few tensors and its base are told apart.
    """
    tokenizer = flame.tokenizer_file(llm_dir)
    settings = [Path(llm_dir, "config.json"), tokenizer]
    if tokenizer.suffix == ".model":
        settings += Path(llm_dir).glob("tokenizer_config.json")  # says whether BOS is in front
    digest = hashlib.sha256(tokenizer.name.encode())
    for path in settings:
        with reading(path, flame.LLM_CURE):
            digest.update(path.read_bytes())
    for path in sorted(Path(llm_dir).glob("model*.safetensors")):
        with reading(path, flame.LLM_CURE), open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = file.read(start - 8)
            digest.update(path.name.encode() + header)
            for entry in json.loads(header).values():
                file.seek(start + entry.get("data_offsets", [0])[0])
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def window_starts(table, window):
    """-> how many rows the table has, and the byte where each window of them begins"""
    starts = []
    with open(table, "rb") as file:
        for N, place in enumerate(accumulate(map(len, file))):  # of the header, then of each row: its end
            if N % window == 0:
                starts.append(place)
    return N, starts[:-(-N // window)]


def write_window(out, meta, w, block):
    """block: float16 [rows, 11, D] of unit vectors, made with the settings in meta."""
    check_settings(out, meta)  # --overwrite may have begun another store here, if not in this very moment
    files.write_array(window_file(out, w), block)
