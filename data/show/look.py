"""embed.py --inspect, which checks a store and prints statistics, and --draw, which draws a caption's forest.

`args` is embed.py's command line.
"""
import functools
import json
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import captions, common
from data.show.plots import new_figure
from data.show.words import vocabulary
from flame import FACET_COLUMNS, InputError

SAMPLE = 1000    # rows used for statistics; means are then within a few percent
AGAIN_ROWS = 30  # rows that are encoded again
AGAIN = "delete it and run the same embed.py command again"
PALETTE = ("#64748b #2563eb #dc2626 #d97706 #059669 #7c3aed "
           "#db2777 #0891b2 #65a30d #9333ea #ea580c #0d9488").split()


# ------------------------------------------------------------------------------------------------------------
# --inspect

def inspect(args):
    """Check a store; print the similarity of its facets and the words nearest to them.

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

    step = store.N // SAMPLE + 1
    states = store.read(range(0, store.N, step), columns)  # [n, 11, D]
    states -= states.mean(0)
    units = normalize(states, dim=-1)

    print("\nmean cosine between the facets of a caption, after subtracting the mean; rows and columns: "
          f"{' '.join(FACET_COLUMNS)}")
    print((torch.einsum("nad,nbd->ab", units, units) / len(units)).numpy().round(2))

    print("\nwords with the highest logits for each facet, after subtracting the mean")
    words, vectors = vocabulary(args.llm)
    for facets, row in zip(states[:3], table[::step]):
        print(f"{row.key}: {row.long[:150]}")
        nearest = (facets @ vectors.T).topk(min(4, len(words))).indices  # [11, 4]
        for column, several in zip(FACET_COLUMNS, words[nearest]):
            print(f"  {column:8} {' '.join(several)}")


# ------------------------------------------------------------------------------------------------------------
# --draw

def draw(args):
    """Write a PNG of a caption's attention mask and segment tree to --out (default: forest.png).

    Rows are queries, columns are keys; each segment has a color. Needs matplotlib.
    """
    tokenizer = flame.load_tokenizer(args.llm)
    prefixes, suffixes = flame.tokenize(tokenizer, [args.draw], "long")
    forest = flame.caption_forest(prefixes, suffixes, args.mask)
    K = len(suffixes[0])
    separate = K * len(prefixes[0]) + sum(map(len, suffixes[0]))
    T = len(forest.tokens)
    figure = new_figure(0.13 * T, 0.13 * T)
    if figure is None:
        return
    from matplotlib.colors import ListedColormap
    figure.set_layout_engine(None)  # the axes fill the figure
    colors = np.resize(PALETTE, len(forest.lengths))
    segment_of = np.repeat(range(len(colors)), forest.lengths)  # [T]
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    mask = flame.attention_mask(forest.lengths, forest.parents)
    axes.pcolormesh(np.where(mask, segment_of, np.nan), cmap=ListedColormap(colors), shading="nearest",
                    edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    last_tokens = forest.last_tokens.numpy()
    axes.barh(last_tokens, last_tokens + 1, 1, -0.5, fill=False, clip_on=False)

    write = functools.partial(axes.text, parse_math=False)
    for t, (token, s) in enumerate(zip(forest.tokens.tolist(), segment_of)):
        word = tokenizer.decode([token]).replace("\n", "\\n")
        write(-1, t, word, size=7, color=colors[s], ha="right", va="center")
        write(t, -1, word, size=7, color=colors[s], ha="center", va="bottom", rotation=90)

    # The upper right half of the mask is empty and has room for the tree of segments.
    write(0.45 * T, 3, f"{K} facets of one caption in one pass: {T} tokens instead of {separate}\n"
          "row: query, column: key that it attends to; framed: the facets' last tokens")
    depths = flame.ancestor_mask(forest.parents).sum(1)  # [S], from 1
    for s, tokens in enumerate(forest.tokens.split(forest.lengths.tolist())):
        text = textwrap.shorten(tokenizer.decode(tokens.tolist()), 80, placeholder=" ...")
        write(0.45 * T + 2 * depths[s], 2 * s + 6, text, color=colors[s])

    path = Path(args.out or "forest").with_suffix(".png")
    common.atomic_save(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
    print(f"{path}: {T} tokens, {len(colors)} segments")
