"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    python embed.py --inspect data/embeddings/cc3m      # check a store and print statistics
    torchrun --nproc_per_node 8 embed.py --captions "cc3m/cc3m-train-{0000..0575}.tar"

The LLM is frozen, so its facet embeddings are computed once, and training never runs it. All captions go into
one table, which is divided into shards of rows. A shard is a file, and its content depends only on its
captions and the recorded settings (up to rounding, if other kernels run the LLM). So shards can be divided
among processes (torchrun) and machines (--part). After a crash or kill -9, the same command computes the
missing shards and ends with the same bytes.
"""
import fcntl
import hashlib
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial, reduce
from itertools import chain, pairwise
from operator import getitem
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import common
from data.captions import UNPACKED, hash_sources, read_table, source_name, split_column, write_table
from data.common import Parser, barrier, init_distributed, number, print0, progress_bar, rank, world_size
from data.images import find_images, report_images, unpack_parquet
from data.show.inspect import inspect_store
from flame import FACET_COLUMNS, InputError, PROMPTS, read_json, reading

# Rows per shard: a minute or two of work. A crash loses one or two shards per process.
SHARD_SIZE = {"cpu": 256, "cuda": 8192}


# ------------------------------------------------------------------------------------------------------------
# Embedding

def embed(args):
    """Run stage 1 in this process: rank 0 writes the table, and each rank computes some of the shards."""
    out = Path(args.out or Path("data/embeddings", source_name(args.captions)))
    dtype = getattr(torch, args.dtype)
    encoder = cache(partial(flame.TextEncoder, args.llm, args.device, dtype, args.layer, args.mask))

    def make_table(path):
        (out / "images.npz").unlink(missing_ok=True)  # may belong to an earlier table with the same keys
        made = write_table(path, args.captions, args.join, dict(args.field))
        if not made.inside:  # images inside Parquet are checked below, after unpack_parquet()
            check_images(args, path, out / "images.npz", args.images, made.spans, made.comparable)
        check_encoder(encoder(), [row.long for row in read_table(path, max_rows=1000)])
        return {"images": args.images and os.path.abspath(args.images), "comparable": made.comparable}

    with common.output_folder(out), locked_store(out, args.overwrite) if rank() == 0 else nullcontext():
        if rank() == 0:
            begin_store(out, store_settings(args), make_table, args.overwrite)
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


def store_settings(args):
    """Return everything that determines the bytes of a store, and where its inputs are, for meta.json."""
    return {
        "llm": {
            "name": args.llm_name,
            "path": os.path.abspath(args.llm),  # for evaluate.py
            "fingerprint": flame.llm_fingerprint(args.llm),
            "layer": args.layer,
            "mask": args.mask,
            "prompts": flame.prompts_to_json(),
        },
        "captions": {
            "path": os.path.abspath(args.captions),
            "sha256": hash_sources([("", args.captions, " ".join(map("=".join, args.field))), *args.join]),
        },
        "columns": FACET_COLUMNS,
        "D": flame.llm_config(args.llm)["hidden_size"],
        "dtype": args.dtype,
        "device": args.device.type,
        "max_tokens": flame.MAX_TOKENS[args.device.type],
        "shard_size": args.shard_size or SHARD_SIZE[args.device.type],
    }


def check_images(args, table, index, folder, spans=(), comparable=False):
    """Look for the images, which training needs, unless --no-images is given. Raises InputError if there are
    none. comparable: see captions.Written; the other arguments are find_images'.
    """
    if not args.no_images:
        keys, images = zip(*((row.key, row.image) for row in read_table(table)))
        found = find_images(keys, images, args.captions, folder, index, spans, table if comparable else None)
        report_images(len(keys), found)


def check_encoder(encoder, captions):
    """Raise InputError if all embeddings are equal, as happens with corrupt weights."""
    packed, forest = next(encoder.pack(captions, "long"))
    units = launch(encoder, forest, len(packed))()
    if (units - units[0, 0]).abs().max() < 1e-3:
        raise InputError(f"{encoder.llm_dir}: all embeddings are equal; download the weights again")


def embed_shards(out, meta, encoder, missing):
    """Compute and write this rank's share of the missing shards.

    To keep a GPU busy, the next pack is launched before we wait for the current one, and a thread writes the
    shards.
    """
    shards = missing[rank()::world_size()]
    n_rows = sum(min(meta["shard_size"], meta["N"] - i * meta["shard_size"]) for i in shards)
    size = 2e-9 * meta["N"] * len(FACET_COLUMNS) * meta["D"]
    print0(f"{out}: {size:.2f} GB; computing {len(missing)} of {len(meta['shard_starts'])} shards of "
           f"{meta['shard_size']} rows; layer {encoder.layer}, {meta['dtype']} on {world_size()} x "
           f"{meta['device']}, {encoder.kernels}")
    batches = shard_batches(out, meta, shards, encoder)
    if meta["device"] == "cuda":
        batches = prefetch(batches)
    launched = ((launch(encoder, forest, len(rows_by_caption)), rows_by_caption, *target)
                for forest, rows_by_caption, *target in batches)
    with ThreadPoolExecutor(1) as thread, progress_bar(
            total=n_rows * len(FACET_COLUMNS), desc="embedding", unit=" embeddings", smoothing=0.05,
            disable=rank() > 0) as bar:
        writing = None
        # pairwise() advances the generator, so pack n + 1 is launched before wait() for pack n.
        for (wait, rows_by_caption, view, finished), _ in pairwise(chain(launched, [None])):
            for rows, facets in zip(rows_by_caption, wait()):
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
            captions = list(rows_of)
            first = FACET_COLUMNS.index(f"{prompts}.0")
            view = array[:, first:first + len(PROMPTS[prompts].facets)]
            batches += [(forest, [rows_of[captions[c]] for c in packed], view)
                        for packed, forest in encoder.pack(captions, prompts)]
        for n, batch in enumerate(batches, 1):
            yield *batch, (i, array) if n == len(batches) else None


def launch(encoder, forest, n):
    """Start encoding a pack of n captions; return wait() -> their unit vectors float16 [n, K, D]."""
    states = flame.hidden_states(encoder.decoder, forest).view(n, -1, encoder.dim)
    units = normalize(states, dim=-1).half()
    copied = None
    if units.is_cuda:
        on_device, units = units, torch.empty(units.shape, dtype=units.dtype, pin_memory=True)
        units.copy_(on_device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def wait():
        if copied:
            copied.synchronize()
        if not ((units.float().norm(dim=-1) - 1).abs() < 0.01).all():  # NaN is not < 0.01
            raise InputError(f"{encoder.llm_dir}: embeddings are zero, NaN or infinite; use --dtype bfloat16 "
                             "or float32, or download the weights again")
        return units
    return wait


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


@contextmanager
def locked_store(out, overwrite):
    """Lock a store's folder. Several runs may write shards at the same time, but not during --overwrite.
    Raises InputError if another run on this machine prevents that.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_EX if overwrite else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another embed.py is writing to this store, and one of the two has "
                             "--overwrite; wait for the other one, or stop it") from None
        except OSError:
            pass  # this file system has no locks
        yield
    finally:
        os.close(folder)


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
    begun = meta.exists()  # after the glob: a concurrent run writes meta.json before the other files
    if existing and not begun:
        raise InputError(f"{existing[0]}: exists without meta.json, so embed.py did not write it; choose "
                         "another --out")
    if begun and not overwrite:
        recorded = check_settings(out, settings)
        if table.exists():
            with reading(table, STORE_FIX):
                found = scan_table(table, settings["shard_size"])
                if any(recorded[name] != value for name, value in found.items()):
                    raise ValueError("not the table that meta.json records")
            return
    with common.atomic_write(table) as temporary:
        made = make_table(temporary)
        found = scan_table(temporary, settings["shard_size"])
        if begun and overwrite or not meta.exists():  # unpacked images are those of an older store
            shutil.rmtree(out / UNPACKED, ignore_errors=True)
        if begun and overwrite:
            for path in (table, *out.glob(SHARD_PATTERN)):
                path.unlink(missing_ok=True)
        elif meta.exists():  # written by a run that was killed before it renamed its table, or meanwhile
            check_settings(out, settings)
        captions = settings["captions"] | made
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
    starts, offset, digest = [], 0, hashlib.sha256()
    with open(table, "rb") as file:
        for N, line in enumerate(file):  # the end of line N is the start of row N
            digest.update(line)
            offset += len(line)
            if N % shard_size == 0:
                starts.append(offset)
    n_shards = math.ceil(N / shard_size)
    return {"N": N, "shard_starts": starts[:n_shards], "table_sha256": digest.hexdigest()}


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
    add("--overwrite", action="store_true", help="delete the store at --out and start over")
    add("--part", metavar="i/n", type=part, default=(0, 1),
        help="embed only every n-th shard, starting at i (from 0), e.g. $SLURM_ARRAY_TASK_ID/16; into one "
        "shared folder, or into folders that you then copy together")
    add("--inspect", metavar="STORE", help="check a store and print statistics instead")
    return parser


def run(argv):
    args = build_parser().parse_args(argv)
    args.llm_name = Path(args.llm).resolve().name if os.path.exists(args.llm) else args.llm  # or a Hub id
    args.llm = flame.resolve_folder(args.llm)
    if args.inspect:
        return inspect_store(args)
    if not args.captions:
        raise InputError("--captions FILE is missing; see --help")
    if args.overwrite and args.part[1] > 1:
        raise InputError("--overwrite cannot be used with --part: it would delete the other parts' shards. "
                         "To start over, delete the store's folder")
    args.join = [(name, *split_column(source)) for name, source in args.join]
    args.device = init_distributed(args.device)
    args.dtype = args.dtype or str(common.default_dtype(args.device)).removeprefix("torch.")
    args.layer = args.layer or flame.llm_config(args.llm)["num_hidden_layers"] - 1
    print0(f"LLM: {args.llm}")
    return embed(args)


def main(argv=None):
    return common.run_stage("embed.py", lambda: run(argv), "run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
