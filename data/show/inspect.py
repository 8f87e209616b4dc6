"""embed.py --inspect: checks a finished store."""
import json
import os
from pathlib import Path

import torch
from torch.nn.functional import normalize

import flame
from data import captions, common
from flame import FACET_COLUMNS, InputError

AGAIN_ROWS = 30  # rows that are encoded again
AGAIN = "delete it and run the same embed.py command again"


def inspect_store(args):
    """Print a store's meta.json and check its files. args: embed.py's command line.

    Raises InputError if it is not a finished store, if --llm is not the LLM that it was made with, if its
    table or a shard was changed, or if captions encoded again have other embeddings.
    """
    store = flame.open_store(args.inspect)
    print(f"{args.inspect}: {json.dumps(store.meta, indent=1)}")
    if store.meta["llm"]["fingerprint"] != flame.llm_fingerprint(args.llm):
        raise InputError(f"{args.llm}: the store was made with another LLM; give that one with --llm")
    table = list(captions.read_table(Path(args.inspect, "captions.tsv"), max_rows=len(store.keys)))
    columns = range(len(FACET_COLUMNS))
    for i in common.progress_bar(range(-(-store.N // store.shard_size)), "checking"):
        path = Path(args.inspect, f"{i:06d}.npy")
        digest = flame.shard_digest(store.meta["table_sha256"], i, store.shard(i))
        with open(path, "rb") as file:
            file.seek(-len(digest), os.SEEK_END)
            if file.read() != digest:
                raise InputError(f"{path}: not the embeddings that embed.py wrote; {AGAIN}")
    sample = range(0, store.N, store.N // AGAIN_ROWS + 1)
    llm = store.meta["llm"]
    with flame.reading(store.path / "meta.json", "make the store again"):
        dtype = getattr(torch, store.meta["dtype"])
        encoder = flame.TextEncoder(args.llm, args.device, dtype, llm["layer"], llm["mask"])
    facets = torch.cat([encoder.encode([getattr(table[n], prompts) for n in sample], prompts)
                        for prompts in flame.PROMPTS], dim=1)
    cosines = (normalize(facets, dim=-1) * store.read(sample, columns)).sum(-1).amin(1)
    for n, cosine in zip(sample, cosines.tolist()):
        if cosine < 0.99:
            raise InputError(f"{args.inspect}/{n // store.shard_size:06d}.npy: row {n} has other embeddings "
                             f"than its captions (cosine {cosine:.3f}); {AGAIN}")
    print(f"all {store.N} rows are complete; {len(sample)} were encoded again and agree")
