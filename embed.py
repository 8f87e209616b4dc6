"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    python embed.py --inspect data/embeddings/cc3m      # is it whole? are the facets distinct? which words?
    python embed.py --draw "A red kite above a beach."  # -> a picture of that caption's forest and mask
    torchrun --nproc_per_node 8 embed.py --captions "cc3m/{0000..0575}.tar" --join long=long.parquet

The LLM never changes, so its facet embeddings are computed once and training never runs it. The captions
become one table, which is cut into windows of rows; a window is a file, and what is in it depends on nothing
but its captions and the recorded settings (where other kernels run the LLM, within rounding). So windows can
be split over processes (torchrun) and machines (--shard), and after a crash, or kill -9, the same command
makes those that are missing and ends with the same bytes.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import files, store
from data.captions import read_table, write_table
from data.command import Parser, bar, number, run
from data.ranks import rank, ranks, say, start_ranks, wait_for_all
from data.show import look
from data.sources import fingerprint, source_name
from data.tars import unpack_parquet
from flame import COLUMNS, InputError, PROMPTS, read_json

# Rows of a window, at most lost by a crash: a minute of work.
WINDOW = {"cpu": 256, "cuda": 8192}


def embed(args):
    """This process' part of the run: rank 0 makes the table, every rank its share of the missing windows."""
    out = Path(args.out or Path("data/embeddings", source_name(args.captions)))
    dtype = getattr(torch, args.dtype)
    encoder = cache(partial(flame.TextEncoder, args.llm, args.device, dtype, args.layer, args.positions))

    def make_table(path):
        write_table(path, args.captions, args.join)
        check_states(encoder(), [row.long for row in read_table(path, most=1000)])

    with files.folder(out):
        if rank() == 0:
            store.begin(out, settings_of(args), make_table, args.overwrite)
            unpack_parquet(args.captions, out / "pictures")
        wait_for_all(out / "meta.json")
        shard, shards = args.shard
        meta = read_json(out / "meta.json")
        windows = [w for w in store.missing_windows(out, meta) if w % shards == shard]
        wait_for_all()  # all ranks have seen the same ones
        if windows:
            run_windows(out, meta, encoder(), windows)
        wait_for_all()
    missing = len(store.missing_windows(out, meta))
    say(f"{out}: {meta['N']} x {len(COLUMNS)} embeddings of {meta['D']}, "
        + (f"{missing} of {len(meta['starts'])} windows missing" if missing else "finished"))


def settings_of(args):
    """All that fixes the store's bytes, for its meta.json."""
    return {
        "llm": {
            "name": args.llm_name,
            "path": os.path.abspath(args.llm),  # so that evaluate.py finds it again
            "fingerprint": store.llm_fingerprint(args.llm),
            "layer": args.layer,
            "positions": args.positions,
            "questions": flame.questions(),
        },
        "captions": {
            "path": os.path.abspath(args.captions),
            "sha256": fingerprint([("", args.captions), *args.join]),
        },
        "columns": COLUMNS,
        "D": flame.llm_config(args.llm)["hidden_size"],
        "dtype": args.dtype,
        "device": args.device.type,
        "budget": flame.BUDGET[args.device.type],
        "window": args.window or WINDOW[args.device.type],
    }


def check_states(encoder, captions):
    """Raises InputError where a packed row's states are no embeddings, as damaged weights make them."""
    rows, forest = next(encoder.pack(captions, "long"))
    units = start(encoder, forest, len(rows))()
    if (units - units[0, 0]).abs().max() < 1e-3:
        raise InputError(f"{encoder.llm_dir}: its states are all equal; download its weights anew")


def run_windows(out, meta, encoder, missing):
    """Embeds and writes this rank's share of the windows that are missing.

    A GPU always has the next packed row before the last one is fetched, and a thread writes the windows.
    """
    windows = missing[rank()::ranks()]
    todo = sum(min(meta["window"], meta["N"] - w * meta["window"]) for w in windows)
    size = 2e-9 * meta["N"] * len(COLUMNS) * meta["D"]
    say(f"{out}: {size:.2g} GB; {len(missing)} of {len(meta['starts'])} windows of {meta['window']} rows to "
        f"make; layer {encoder.layer}, {meta['dtype']} on {ranks()} x {meta['device']}, {encoder.kernels}")
    work = packed_rows(out, meta, windows, encoder)
    if meta["device"] == "cuda":
        work = ahead(work)
    running = ((start(encoder, forest, len(takers)), takers, *block) for forest, takers, *block in work)
    with ThreadPoolExecutor(1) as thread, bar(
            total=todo * len(COLUMNS), desc="embedding", unit=" embeddings", smoothing=0.05,
            disable=rank() > 0) as done:
        writing = None
        for (wait, takers, part, whole), _ in pairwise(chain(running, [None])):
            for rows, facets in zip(takers, wait()):
                part[rows] = facets
                done.update(len(rows) * len(facets))
            if whole:
                if writing:
                    writing.result()  # raises what it raised; no more than three windows in memory
                writing = thread.submit(store.write_window, out, meta, *whole)
        if writing:
            writing.result()
    if encoder.truncated:
        say(f"{encoder.truncated} captions were cut to the model's context")


def packed_rows(out, meta, windows, encoder):
    """Yields (packed row, for each caption in it the rows of the window that take its answers, the columns
    of the window's block where these go, after the last one (w, block)). Equal captions are encoded once.
    """
    for w in windows:
        rows = list(read_table(out / "captions.tsv", meta["starts"][w], meta["window"]))
        block = np.empty((len(rows), len(COLUMNS), meta["D"]), np.float16)
        packs = []
        for prompts in PROMPTS:
            takers = {}
            for n, row in enumerate(rows):
                takers.setdefault(getattr(row, prompts), []).append(n)
            captions = list(takers)
            first = COLUMNS.index(f"{prompts}.0")
            part = block[:, first:first + len(PROMPTS[prompts].facets)]
            packs += [(forest, [takers[captions[i]] for i in chosen], part)
                      for chosen, forest in encoder.pack(captions, prompts)]
        for n, pack in enumerate(packs, 1):
            yield *pack, (w, block) if n == len(packs) else None


def start(encoder, forest, n):
    """Hands a packed row to the device. -> wait(), which gives its n captions' unit vectors, [n, K, D]"""
    states = flame.decode(encoder.decoder, forest).view(n, -1, encoder.dim)
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
        if not ((units.float().norm(dim=-1) - 1).abs() < 0.01).all():  # nor NaN
            raise InputError(f"{encoder.llm_dir}: its states are zero or not finite; give --dtype "
                             "bfloat16 or float32, or download its weights anew")
        return units
    return wait


def ahead(items):
    """The same items, the next made by a thread of its own: tokenizing and packing keep no GPU waiting."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


# -----------------------------------------------------------------------------
# What the command line says

def shard(text):
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise ValueError
    return i, n


def join(text):
    name, _, file = text.partition("=")
    if name not in PROMPTS or not file:
        raise ValueError
    return name, file


def command_line():
    parser = Parser(description="Stage 1: captions + frozen LLM -> embedding store")
    add = parser.add_argument
    add("--captions", metavar="FILE",
        help="TSV/CSV with a header among `key image raw short long`, Conceptual Captions TSV, JSON, JSONL, "
        "Parquet, tars, a folder of the last two or of pictures; several by x-{000..123}.tar or x-*.parquet")
    add("--join", metavar="SET=FILE", type=join, nargs="+", action="extend", default=[],
        help="captions of a prompt set from files of their own, by key or URL: long=long.parquet")
    add("--llm", metavar="DIR", default=os.environ.get("FLAME_LLM", Path(__file__).parent / "data/demo/llm"),
        help="Hugging Face checkpoint folder or id (default $FLAME_LLM, else data/demo/llm)")
    add("--out", metavar="DIR",
        help="the store (default data/embeddings/<captions' name>); with --draw the picture")
    add("--layer", metavar="N", type=number(int, 1), help="blocks to keep (default: all but the last)")
    add("--mask", dest="positions", choices=("restart", "causal"), default="restart", metavar="causal",
        help="without facet-decoupled attention, to measure its worth: a question sees those before it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("bfloat16", "float32", "float16"),
        help="of the matrix products (default bfloat16 where it is fast; float16 as in the released code)")
    add("--window", metavar="ROWS", type=number(int, 1, 1 << 16),
        help="rows of a window, at most lost by a crash (default 256 on CPU, 8192 on GPU)")
    add("--overwrite", action="store_true",
        help="throw away the store at --out, its pictures/ too, and start anew")
    add("--shard", metavar="i/n", type=shard, default=(0, 1),
        help="make every n-th window only, from the i-th on (from 0), e.g. $SLURM_ARRAY_TASK_ID/16; in one "
        "folder, or in folders that are then copied together")
    add("--inspect", metavar="STORE", help="print what is in a store and check it instead")
    add("--draw", metavar="CAPTION", help="write a picture of this caption's segment forest instead")
    return parser


def chosen(argv):
    """Does what the command line asks for."""
    args = command_line().parse_args(argv)
    args.llm_name = Path(args.llm).resolve().name  # of a folder, or of a Hugging Face id
    args.llm = flame.hub_folder(args.llm)
    if args.draw is not None:
        return look.draw(args)
    if args.inspect:
        return look.inspect(args)
    if not args.captions:
        raise InputError("--captions FILE is missing; see --help")
    if args.overwrite and args.shard[1] > 1:
        raise InputError("--overwrite would throw away the other shards' windows; remove --out by hand")
    args.device = start_ranks(args.device)
    args.dtype = args.dtype or str(flame.default_dtype(args.device)).removeprefix("torch.")
    args.layer = args.layer or flame.llm_config(args.llm)["num_hidden_layers"] - 1
    say(f"LLM: {args.llm}")
    return embed(args)


def main(argv=None):
    return run("embed.py", lambda: chosen(argv), "the same command makes the windows that are missing")


if __name__ == "__main__":
    sys.exit(main())
