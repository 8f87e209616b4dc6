"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    python embed.py --captions cc3m.tsv --plan          # what it would take, before any hours are spent
    python embed.py --inspect data/embeddings/cc3m      # is it whole? are the facets distinct? which words?
    python embed.py --draw "A red kite above a beach."  # -> a picture of that caption's forest and mask
    torchrun --nproc_per_node 8 embed.py --captions "cc3m/{0000..0575}.tar" --join long=long.json

The LLM never changes, so its facet embeddings are computed once and training never runs it. The captions
are cut into fixed windows of rows; what a window's embeddings are depends on nothing but its captions and the
recorded settings. So windows can be split over processes (torchrun) and machines (--shard), and after a
crash, or kill -9, the same command goes on with the windows that are missing and ends with the same bytes.
"""
import argparse
import itertools
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data import released, store
from data.captions import column_taken, fingerprint, open_join, read_captions, source_name
from data.command import Parser, number, run, usable_device
from data.pictures import warn_of_missing_pictures
from data.show import look

# Rows between two flushes: seconds to a minute of work. Part of what fixes the bytes, as the rows' budget is.
WINDOW = {"cpu": 256, "cuda": 2048}

# torchrun says which of how many processes this is.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def embed(args):
    """This process' part of the run.

    Rank 0 makes the store and finishes it; every rank embeds its share of the windows.
    """
    settings = settings_of(args)
    out = Path(args.out or default_out(args))
    done = not args.overwrite and (out / "meta.json").exists()
    if WORLD > 1:  # for the ranks to wait for one another, however long one takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    with store.lock(out, args.overwrite) if RANK == 0 else nullcontext():
        if done:
            if RANK == 0 and store.finished(out, settings):
                print(f"{out}: finished already, nothing to do")
            return
        if RANK == 0:
            warn_of_missing_pictures(args.captions)
        encoder = load_encoder(args)  # complains of an LLM before anything is made
        told = [store.begin(out, settings, encoder.dim, args.overwrite) if RANK == 0 else None]
        if WORLD > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        embed_windows(out, settings, told[0], encoder)


def settings_of(args):
    """All that fixes the store's bytes, for its journal and its meta.json."""
    files = [args.captions, *args.join.values()]
    return {
        "llm": {
            "name": args.llm_name,
            "path": os.path.abspath(args.llm),  # so that evaluate.py finds it again
            "fingerprint": flame.llm_fingerprint(args.llm),
            "layer": args.layer,
            "positions": args.positions,
            **({"questions": args.questions} if args.questions else {}),
        },
        "captions": {
            "path": os.path.abspath(args.captions),
            "joins": {name: os.path.abspath(file) for name, file in args.join.items()},
            "sha256": fingerprint(files) if RANK == 0 else None,
        },
        "prompts": args.prompts,
        "columns": [column for column in flame.COLUMNS if column.split(".")[0] in args.prompts],
        "dtype": args.dtype,
        "device": args.device.type,
        "budget": flame.BUDGET[args.device.type],
        "window": args.window or WINDOW[args.device.type],
        "store": args.store,
        "shard": list(args.shard),
    }


def default_out(args):
    """cc3m.tsv.gz, cc3m/, cc3m-{0000..0575}.tar -> data/embeddings/cc3m"""
    name = source_name(args.captions)
    if args.shard[1] > 1:
        name = "{}-{}-of-{}".format(name, *args.shard)
    return Path("data/embeddings", name)


def load_encoder(args):
    dtype = getattr(torch, args.dtype)
    encoder = released.text_encoder(args.llm, args.device, dtype, args.layer, args.positions)
    for name in args.prompts:  # complains of another model's tokenizer, or a context that is too short
        next(encoder.pack([""], name))
    return encoder


def embed_windows(out, settings, journal, encoder):
    """Embeds this rank's share of the windows that are not finished yet; rank 0 then finishes the store."""
    started, busy = time.time(), 0.0  # busy: seconds of the LLM at work
    total, window = journal["total"], settings["window"]
    if RANK == 0:
        shape = [journal["N"], len(settings["columns"]), encoder.dim]
        slower = "" if flame.flame_ext else ", without flame_ext: slower"
        print(f"{out}: {shape} {settings['store']}, layer {encoder.layer}, "
              f"{settings['dtype']} on {WORLD} x {settings['device']}{slower}")
    statistics = None
    if settings["store"] == "int8":
        if RANK == 0 and not (out / "statistics.npy").exists():
            store.fit_statistics(out, settings, encoder, rows_of(out, settings, journal), total)
            busy = time.time() - started
        if WORLD > 1:
            torch.distributed.barrier()
        statistics = store.read_statistics(out, settings, encoder.dim)
    windows = store.windows_of(settings, total)
    mine = [w for w in windows if w not in journal["finished"]][RANK::WORLD]
    todo = sum(min(window, total - w * window) for w in mine)  # rows
    busy += run_windows(out, settings, encoder, rows_of(out, settings, journal), mine, todo, statistics)
    if WORLD > 1:
        torch.distributed.barrier()
    if RANK == 0:
        store.finish(out, settings, journal, encoder.dim)
        seconds = time.time() - started
        size = f"{journal['N']} x {len(settings['columns'])} embeddings"
        print(f"{out}: {size}; {todo * WORLD / seconds:.2f} captions/s, {seconds:.0f} s, "
              f"model busy {busy / seconds:.1%} of the time")
        if encoder.truncated:
            print(f"{encoder.truncated} captions were cut to the model's context")


def rows_of(out, settings, journal):
    """The captions' rows, less those whose key occurs before."""
    joined = {name: open_join(store.join_file(out, name)) for name in settings["captions"]["joins"]}
    repeats = set(journal["repeats"])
    rows = read_captions(settings["captions"]["path"], None, joined, store.released(settings))
    return (row for row in rows if row.number not in repeats)


def run_windows(out, settings, encoder, rows, wanted, todo, statistics):
    """Embeds and writes the wanted windows, `todo` rows together; -> seconds that the LLM was at work.

    A GPU always has the next packed row before the last one is fetched, and a thread writes the windows.
    """
    columns, busy = settings["columns"], 0.0
    dtype = torch.float16 if statistics is None else torch.float32
    work = packed_windows(rows, settings, wanted, encoder)
    if settings["device"] == "cuda":
        work = ahead(work)
    writing = None
    with ThreadPoolExecutor(1) as thread, tqdm(
            total=todo * len(columns), desc="embedding", unit=" embeddings", smoothing=0.05,
            disable=RANK > 0) as bar:
        block = None
        for w, height, prompts, takers, units, last in one_behind(work, encoder, dtype):
            clock = time.time()
            units, seconds = units()
            busy += time.time() - clock + seconds
            if block is None:
                block = torch.empty(height, len(columns), encoder.dim, dtype=dtype)
            at = columns.index(f"{prompts}.0")
            for rows_of_caption, own in zip(takers, units):
                block[rows_of_caption, at:at + len(own)] = own
                bar.update(len(rows_of_caption) * len(own))
            if last:
                if writing:
                    writing.result()  # no more than two windows in memory
                writing = thread.submit(store.write_window, out, settings, RANK, w, block.numpy(), statistics)
                block = None
        if writing:
            writing.result()
    return busy


def one_behind(work, encoder, dtype):
    """Starts each packed row, and yields the one before it: (w, height, prompt set, takers, wait for its unit
    vectors, whether it is the last of its window)."""
    before = None
    for w, height, packs in work:
        for n, (prompts, forest, takers) in enumerate(packs, 1):
            units = start(encoder, forest, len(takers), dtype)
            if before:
                yield before
            before = w, height, prompts, takers, units, n == len(packs)
    if before:
        yield before


def start(encoder, forest, n, dtype):
    """Hands a packed row to the device. -> wait(), which gives its n captions' unit vectors [n, K, D] and the
    seconds that handing it over took: on CPU all that there is to do."""
    clock = time.time()
    states = flame.decode(encoder.decoder, forest).view(n, -1, encoder.dim)
    units = normalize(states, dim=-1).to(dtype)
    copied = None
    if units.is_cuda:
        on_device, units = units, torch.empty(units.shape, dtype=dtype, pin_memory=True)
        units.copy_(on_device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    seconds = time.time() - clock

    def wait():
        if copied:
            copied.synchronize()
        if not units.isfinite().all():
            raise flame.InputError(f"{encoder.llm_dir}: its states are not finite; give --dtype bfloat16 or "
                                   "float32, or download its weights anew")
        return units, seconds
    return wait


def packed_windows(rows, settings, wanted, encoder):
    """Yields (w, how many rows, packs) for each wanted window in order. Equal captions are encoded once.

    A pack is (prompt set, packed row, for each caption in it the rows of the window that take its answers).
    """
    wanted = set(wanted)
    for w in itertools.count():
        window = [row.captions for row in itertools.islice(rows, settings["window"])]
        if not window:
            return
        if w not in wanted:
            continue
        packs = []
        for prompts in settings["prompts"]:
            takers = {}
            for row, captions in enumerate(window):
                takers.setdefault(captions[prompts], []).append(row)
            distinct = list(takers)
            for some, forest in encoder.pack(distinct, prompts):
                packs.append((prompts, forest, [takers[distinct[i]] for i in some]))
        yield w, len(window), packs


def ahead(items):
    """The same items, the next made by a thread of its own: tokenizing and packing keep no GPU waiting."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


# -----------------------------------------------------------------------------
# What the command line says

def prompt_sets(text):
    names = text.split(",")
    for name in names:
        if name not in flame.PROMPTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(flame.PROMPTS)}")
    return [name for name in flame.PROMPTS if name in names]  # in the store's order


def shard(text):
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def join(text):
    name, equals, file = text.partition("=")
    if name not in flame.PROMPTS or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not SET=FILE, SET one of {', '.join(flame.PROMPTS)}")
    return name, file


def command_line():
    parser = Parser(description="Stage 1: captions + frozen LLM -> embedding store")
    add = parser.add_argument
    add("--captions", metavar="FILE",
        help="TSV/CSV with a header among `key image raw short long`, Conceptual Captions TSV, JSON, JSONL "
        "(also .gz), webdataset tars (folder or x-{000..123}.tar)")
    add("--join", metavar="SET=FILE", type=join, nargs="+", action="extend", default=[],
        help="captions of a prompt set from files of their own, by key or URL: long=long.json")
    add("--llm", metavar="DIR", default=os.environ.get("FLAME_LLM", "data/demo/llm"),
        help="Hugging Face checkpoint folder or id (default $FLAME_LLM, else data/demo/llm)")
    add("--out", metavar="DIR",
        help="the store (default data/embeddings/<captions' name>); with --draw the picture")
    add("--prompts", type=prompt_sets, help="prompt sets to embed (default raw,short,long; --draw: long)")
    add("--prompts-file", metavar="FILE",
        help='questions of your own, JSON: {"long": {"prefix": "... {} ...", "facets": ["...", ...]}}')
    add("--layer", metavar="N", type=number(int, 1), help="blocks to keep (default: all but the last)")
    way = parser.add_mutually_exclusive_group().add_argument
    way("--compat", dest="positions", action="store_const", const="sequential", default="restart",
        help="the released code's text path: questions one after the other, captions cut and cleaned alike")
    way("--mask", dest="positions", choices=("causal",),
        help="without facet-decoupled attention, to measure its worth: a question sees those before it")
    add("--store", choices=("float16", "int8"), default="float16",
        help="how embeddings are stored (default float16; int8 is half the bytes)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("bfloat16", "float32", "float16"),
        help="of the matrix products (default bfloat16 where it is fast; float16 as in the released code)")
    add("--window", metavar="ROWS", type=number(int, 1, 1 << 16),
        help="rows between two flushes, at most lost by a crash (default 256 on CPU, 2048 on GPU)")
    add("--overwrite", action="store_true", help="throw away what is at --out and start anew")
    add("--shard", metavar="i/n", type=shard, default=(0, 1),
        help="embed the i-th of n parts only, i from 0, e.g. $SLURM_ARRAY_TASK_ID/16; then --merge")
    add("--merge", metavar="DIR", nargs="+", help="make one store of those of all shards")
    add("--plan", metavar="N", type=number(int, 1), nargs="?", const=0,
        help="print tokens, FLOPs, hours and bytes instead (as if there were N such captions)")
    add("--inspect", metavar="STORE", help="print what is in a store and check it instead")
    add("--draw", metavar="CAPTION", help="write a picture of this caption's segment forest instead")
    return parser.parse_args()


def chosen():
    """Does what the command line asks for."""
    args = command_line()
    args.questions = flame.read_json(args.prompts_file) if args.prompts_file else {}
    if args.questions:
        flame.use_prompts(args.questions, args.prompts_file)
    elif args.prompts_file:
        raise flame.InputError(f"{args.prompts_file}: no prompt set is in it; give raw, short or long")
    args.join = dict(args.join)
    args.prompts = args.prompts or (["long"] if args.draw is not None else list(flame.PROMPTS))
    if args.merge:
        return store.merge(args.merge, args.out and Path(args.out), args.overwrite)
    args.llm_name = Path(args.llm).resolve().name  # of a folder, or of a Hugging Face id
    args.llm = flame.llm_folder(args.llm)
    if args.draw is not None:
        return look.draw(args)
    if args.inspect:
        return look.inspect(args)
    if not args.captions:
        raise flame.InputError("--captions FILE is missing; see --help")
    one_of_many = args.device == "cuda" and WORLD > 1
    args.device = usable_device(f"cuda:{os.environ['LOCAL_RANK']}" if one_of_many else args.device)
    if RANK == 0:
        if not args.join:  # which may be all the captions there are
            next(read_captions(args.captions))  # complains of a file without any before anything is made
        for name in args.prompts:
            file = args.join.get(name, args.captions)
            if column := column_taken(file, name):
                print(f"{name} captions: {column} of {file}")
    args.dtype = args.dtype or str(flame.default_dtype(args.device)).removeprefix("torch.")
    blocks = flame.llm_config(args.llm)["num_hidden_layers"]
    if args.layer and args.layer > blocks:
        raise flame.InputError(f"--layer {args.layer}: {args.llm} has {blocks} blocks; choose 1 to {blocks}")
    args.layer = args.layer or blocks - 1
    if RANK == 0:
        print(f"LLM: {args.llm}")
    return embed(args) if args.plan is None else look.plan(args)


def main():
    code = run("embed.py", chosen, "the same command goes on from the last flush (without --overwrite)")
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
