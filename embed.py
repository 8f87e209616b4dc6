"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    python embed.py --inspect data/embeddings/cc3m      # check the files of a store
    torchrun --nproc_per_node 8 embed.py --captions "cc3m/cc3m-train-{0000..0575}.tar"

The LLM is frozen, so its facet embeddings are computed once, and training never runs it. All captions go into
one table, which is divided into shards of rows. A shard is a file, and its content depends only on its
captions and the recorded settings (up to rounding, if other kernels run the LLM). So shards can be divided
among processes (torchrun) and machines (--part). After a crash or kill -9, the same command computes the
missing shards and ends with the same bytes.
"""
import fcntl
import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial, reduce
from itertools import chain, pairwise
from operator import getitem
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import common
from data.captions import read_table, write_table
from data.common import Parser, barrier, init_distributed, number, print0, progress_bar, rank, world_size
from data.images import find_images, report_images
from data.show.inspect import inspect_store
from data.sources import UNPACKED, hash_sources, source_name, split_column, unpack_parquet
from flame import FACET_COLUMNS, InputError, PROMPTS, read_json, reading

# Rows per shard: a minute or two of work. A crash loses one or two shards per process.
SHARD_SIZE = {"cpu": 256, "cuda": 8192}
WRONG_EMBEDDINGS = ("equal, zero, NaN or infinite; use --dtype bfloat16 or float32, or download the weights "
                    "again")


# ------------------------------------------------------------------------------------------------------------
# Embedding

def embed(args):
    """Run stage 1 in this process: rank 0 writes the table, and each rank computes some of the shards."""
    out = Path(args.out or Path("data/embeddings", source_name(args.captions)))
    dtype = getattr(torch, args.dtype)
    encoder = cache(partial(flame.TextEncoder, args.llm, args.device, dtype, args.layer, args.mask))
    # Several runs may write shards at the same time, but not during --overwrite.
    mode = fcntl.LOCK_EX if args.overwrite else fcntl.LOCK_SH
    with common.locked_folder(out, mode) if rank() == 0 else nullcontext():
        if rank() == 0:
            begin_store(out, store_settings(args), partial(make_table, args, out, encoder), args.overwrite)
            if not args.no_images and unpack_parquet(args.captions, out / UNPACKED):
                check_images(args, out / "captions.tsv", out / "images.npz", out / UNPACKED)
        barrier(out / "meta.json")  # all ranks must see it
        part, parts = args.part
        meta = read_json(out / "meta.json")
        if args.images and os.path.abspath(args.images) != meta["captions"]["images"]:
            raise InputError(f"{out}: made with --images {meta['captions']['images']}; give the new folder "
                             "to train.py instead")
        shards = [i for i in missing_shards(out, meta) if i % parts == part]
        barrier()  # no rank may write a shard while another one still makes its list
        if shards:
            embed_shards(out, meta, encoder(), shards)
        barrier()
    missing = len(missing_shards(out, meta))
    print0(f"{out}: {meta['N']} x {len(FACET_COLUMNS)} embeddings of dimension {meta['D']}, "
           + (f"{missing} of {len(meta['shard_starts'])} shards missing" if missing else "finished"))


def make_table(args, out, encoder, path):
    """Write captions.tsv to `path`, and check the images and the LLM. Return what meta.json records of it.

    Raises InputError if all embeddings are equal or NaN, as happens with corrupt weights.
    """
    (out / "images.npz").unlink(missing_ok=True)  # may belong to an earlier table with the same keys
    made = write_table(path, args.captions, args.join, dict(args.field), args.split)
    if not made.inside:  # images inside Parquet are checked in embed(), after unpack_parquet()
        check_images(args, path, out / "images.npz", args.images, made.comparable)
    captions = [row.long for row in read_table(path, max_rows=8)]
    units = normalize(encoder().encode(captions), dim=-1)
    if not (units - units[0, 0]).abs().max() > 1e-3:  # also true for NaN
        raise InputError(f"{args.llm}: embeddings are {WRONG_EMBEDDINGS}")
    return {"comparable": made.comparable}


def store_settings(args):
    """Return everything that determines the bytes of a store, and where its inputs are, for meta.json."""
    config = flame.llm_config(args.llm)
    chosen = args.field + [("split", args.split)] * (args.split != "train")
    return {
        "llm": {
            "name": args.llm_name,
            "path": os.path.abspath(args.llm),  # for evaluate.py
            "fingerprint": flame.llm_fingerprint(args.llm),
            "layer": args.layer or config["num_hidden_layers"] - 1,
            "mask": args.mask,
            "prompts": flame.prompts_to_json(),
        },
        "captions": {
            "path": os.path.abspath(args.captions),
            "sha256": hash_sources([("", args.captions, " ".join(map("=".join, chosen))), *args.join]),
            "images": args.images and os.path.abspath(args.images),
        },
        "columns": FACET_COLUMNS,
        "D": config["hidden_size"],
        "dtype": args.dtype,
        "device": args.device.type,
        "max_tokens": flame.MAX_TOKENS[args.device.type],
        "shard_size": args.shard_size or SHARD_SIZE[args.device.type],
    }


def check_images(args, table, index, folder, comparable=False):
    """Look for the images, which training needs, unless --no-images is given. Raises InputError if there are
    none. comparable: see captions.Written; the other arguments are find_images'.
    """
    if not args.no_images:
        keys, images = zip(*((row.key, row.image) for row in read_table(table)))
        found = find_images(keys, images, args.captions, folder, index, table if comparable else None)
        report_images(len(keys), found)


def embed_shards(out, meta, encoder, missing):
    """Compute and write this rank's share of the missing shards.

    To keep a GPU busy, the next pack is launched before we wait for the current one, and a thread writes the
    shards.
    """
    shards = missing[rank()::world_size()]
    n_rows = min(len(shards) * meta["shard_size"], meta["N"])  # or less, if the last shard is among them
    print0(f"{out}: computing {len(missing)} of {len(meta['shard_starts'])} shards of "
           f"{meta['shard_size']} rows; layer {encoder.layer}, {meta['dtype']} on {world_size()} x "
           f"{meta['device']}, {encoder.kernels}")
    batches = prefetch(shard_batches(out, meta, shards, encoder))
    with ThreadPoolExecutor(1) as thread, progress_bar(
            total=n_rows * len(FACET_COLUMNS), desc="embedding", unit=" embeddings", smoothing=0.05,
            disable=rank() > 0) as bar:
        writing = None
        # pairwise() advances the generator, so pack n + 1 is launched before we wait for pack n.
        for (units, copied, rows_by_caption, view, finished), _ in pairwise(
                chain(launch(encoder, batches), [None])):
            if copied:
                copied.synchronize()
            if not ((units.float().norm(dim=-1) - 1).abs() < 0.01).all():  # NaN is not < 0.01
                raise InputError(f"{encoder.llm_dir}: embeddings are {WRONG_EMBEDDINGS}")
            for rows, facets in zip(rows_by_caption, units.view(len(rows_by_caption), -1, meta["D"])):
                view[rows] = facets
                bar.update(len(rows) * len(facets))
            if finished:
                if writing:
                    writing.result()  # raises its errors; at most three shards are in memory
                writing = thread.submit(write_shard, out, meta, *finished)
        if writing:
            writing.result()
    if encoder.truncated:
        print0(f"{encoder.truncated} captions (of rank 0) were truncated to the context length")


def shard_batches(out, meta, shards, encoder):
    """Pack the captions of the shards for the encoder. Equal captions are encoded once per shard.

    Yields (forest, rows_by_caption, view, finished):
        forest: a pack, several captions with one prompt set, as a forest of token segments (see flame.py).
        rows_by_caption: for each caption of the pack, the rows of the shard that have it.
        view: the slice [rows, K, D] of the shard's array for their embeddings.
        finished: (shard, array float16 [rows, 11, D]) with the last pack of a shard, or None.
    """
    for i in shards:
        rows = list(read_table(out / "captions.tsv", meta["shard_starts"][i], meta["shard_size"]))
        array = np.empty((len(rows), len(FACET_COLUMNS), meta["D"]), np.float16)
        batches = []
        for prompts in PROMPTS:
            rows_of = {}
            for n, row in enumerate(rows):
                rows_of.setdefault(getattr(row, prompts), []).append(n)
            groups = list(rows_of.values())
            first = FACET_COLUMNS.index(f"{prompts}.0")
            view = array[:, first:first + len(PROMPTS[prompts].facets)]
            batches += [(forest, [groups[c] for c in packed], view)
                        for packed, forest in encoder.pack(list(rows_of), prompts)]
        for n, batch in enumerate(batches, 1):
            yield *batch, (i, array) if n == len(batches) else None


def launch(encoder, batches):
    """Start encoding packs. Yields (units, copied, *target) for each (forest, *target):
        units: the unit vectors of its strings, float16 [n * K, D], on the CPU.
        copied: the event after which they are valid, or None.
    """
    for forest, *target in batches:
        units = normalize(flame.hidden_states(encoder.decoder, forest), dim=-1).half()
        copied = None
        if units.is_cuda:
            units = units.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record()
        yield units, copied, *target


def prefetch(items):
    """Yield the same items, the next one computed in a thread, so a GPU need not wait for packing."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


# ------------------------------------------------------------------------------------------------------------
# The files of a store (flame.Store reads them): captions.tsv is the table, meta.json records the settings,
# 000000.npy, 000001.npy ... are the shards, float16 [rows, 11, D], each with a digest at its end, which
# --inspect checks. An existing shard is done. Two runs with the same settings at the same time write the same
# bytes.

# Settings that must not change. Captions and LLM may be moved, since their hashes are compared.
FIXED = ("llm: fingerprint", "llm: layer", "llm: mask", "llm: prompts", "captions: sha256", "columns", "D",
         "dtype", "device", "max_tokens", "shard_size")
STORE_FIX = "choose another --out, or use --overwrite"
SHARD_PATTERN = "[0-9][0-9][0-9][0-9][0-9][0-9].npy"


def shard_file(out, i):
    return out / f"{i:06d}.npy"


def begin_store(out, settings, make_table, overwrite):
    """Write captions.tsv and meta.json, unless both exist.

    make_table(path) writes the table, checks its images and the LLM, and returns what meta.json records about
    the captions. With overwrite, old embeddings are deleted only after that. Raises InputError if an old
    store was made with other settings (without overwrite), or if there is a captions.tsv or a shard without
    meta.json.
    """
    meta = out / "meta.json"
    table = out / "captions.tsv"
    existing = [*out.glob(table.name), *out.glob(SHARD_PATTERN)]
    if existing and not meta.exists():  # in this order: a concurrent run writes meta.json first
        raise InputError(f"{existing[0]}: exists without meta.json, so embed.py did not write it; choose "
                         "another --out")
    if meta.exists() and not overwrite:
        recorded = check_settings(out, settings)
        if table.exists():
            with reading(table, STORE_FIX):
                if recorded != recorded | scan_table(table, settings["shard_size"]):
                    raise ValueError("not the table that meta.json records")
            return
    with common.atomic_write(table) as temporary:
        captions = settings["captions"] | make_table(temporary)
        if meta.exists() and not overwrite:  # written by a run that was killed before it renamed its table,
            check_settings(out, settings)    # or meanwhile
        else:
            shutil.rmtree(out / UNPACKED, ignore_errors=True)  # images of an older store
        if overwrite:
            for path in (table, *out.glob(SHARD_PATTERN)):
                path.unlink(missing_ok=True)
        found = scan_table(temporary, settings["shard_size"])
        common.write_json(meta, settings | {"captions": captions} | found)


def check_settings(out, settings):
    """Return the content of meta.json. Raises InputError if it records other settings."""
    meta = out / "meta.json"
    with reading(meta, STORE_FIX):
        recorded = read_json(meta, STORE_FIX)
        for setting in FIXED:
            old, new = (reduce(getitem, setting.split(": "), entries) for entries in (recorded, settings))
            if old != new:
                raise InputError(f"{meta}: made with {setting} {old}, now it is {new}; {STORE_FIX}")
    return recorded


def missing_shards(out, meta):
    return [i for i in range(len(meta["shard_starts"])) if not shard_file(out, i).exists()]


def scan_table(table, shard_size):
    """Return {"N": number of rows, "shard_starts": byte offset of each shard's first row, "table_sha256"}."""
    with open(table, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        ends = np.fromiter(map(len, file), np.int64).cumsum()  # the end of line n is the start of row n
    return {"N": len(ends) - 1, "shard_starts": ends[:-1:shard_size].tolist(), "table_sha256": digest}


def write_shard(out, meta, i, array):
    """Write shard i, float16 [rows, 11, D], and its digest after it."""
    check_settings(out, meta)  # another run may have overwritten the store since
    common.write_array(shard_file(out, i), array, flame.shard_digest(meta["table_sha256"], i, array))


# ------------------------------------------------------------------------------------------------------------
# Command line

def part(text):
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise ValueError
    return i, n


def assignment(*names):
    """Return an argparse type for NAME=VALUE."""
    def parse(text):
        name, _, value = text.partition("=")
        if name not in names or not value:
            raise ValueError
        return name, value
    parse.__name__ = f"{'|'.join(names)}=..."  # for argparse
    return parse


def build_parser():
    parser = Parser(description="Stage 1: captions + frozen LLM -> embedding store")
    add = parser.add_argument
    add("--captions", metavar="FILE",
        help="TSV or CSV with columns among `key image url raw short long`, Conceptual Captions TSV, "
        "JSON(L), Parquet, tars, or a folder of tars, Parquet or images; several files as x-{000..123}.tar "
        "or x-*.tsv")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--field", metavar="FIELD=COLUMN", type=assignment("key", "image", "url", *PROMPTS), **several,
        help="take key, image, url, raw, short or long from this column: long=description")
    add("--join", metavar="SET=FILE[:COLUMN]", type=assignment(*PROMPTS), **several,
        help="captions of a prompt set from another file, joined by URL, uid or key: long=long.parquet")
    add("--split", choices=("train", "val"), default="train",
        help="split to read if the captions have several (default: train, which includes restval)")
    add("--images", metavar="DIR", help="root of images or tars (default: see data/README.md)")
    add("--no-images", action="store_true", help="don't look for the images of the captions")
    add("--llm", metavar="DIR", default=os.environ.get("FLAME_LLM", Path(__file__).parent / "data/demo/llm"),
        help="Hugging Face folder or Hub id (default: $FLAME_LLM, or data/demo/llm)")
    add("--out", metavar="DIR",
        help="the store (default: data/embeddings/<name of the captions>)")
    add("--layer", metavar="N", type=number(int, 1), help="LLM layers to run (default: all but the last)")
    add("--mask", choices=flame.MASKS, default="decoupled",
        help="decoupled (default), or causal as an ablation: each facet prompt also sees the earlier ones")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if available)")
    add("--dtype", choices=("bfloat16", "float32", "float16"),
        help="dtype of the LLM's matrix products (default: bfloat16 if it is fast on the device)")
    add("--shard-size", metavar="ROWS", type=number(int, 1, 1 << 16),
        help="rows per shard; a crash loses one or two shards (default: 256 on a CPU, 8192 on a GPU)")
    # --overwrite would delete the other parts' shards
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--overwrite", action="store_true", help="delete the store at --out and start over")
    add_one("--part", metavar="i/n", type=part, default=(0, 1),
        help="embed only every n-th shard, starting at i (from 0), e.g. $SLURM_ARRAY_TASK_ID/16; into one "
        "shared folder, or into folders that you then copy together")
    add("--inspect", metavar="STORE", help="check a store instead")
    return parser


def run(argv):
    args = build_parser().parse_args(argv)
    args.llm_name = Path(args.llm).resolve().name if os.path.exists(args.llm) else args.llm  # or a Hub id
    args.llm = flame.resolve_folder(args.llm)
    if args.inspect:
        return inspect_store(args)
    if not args.captions:
        raise InputError("--captions FILE is missing; see --help")
    args.join = [(name, *split_column(source)) for name, source in args.join]
    args.device = init_distributed(args.device)
    args.dtype = args.dtype or str(common.default_dtype(args.device)).removeprefix("torch.")
    print0(f"LLM: {args.llm}")
    return embed(args)


def main(argv=None):
    return common.run_stage("embed.py", lambda: run(argv), "run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
