"""Looking at stage 1: embed.py's --inspect, what is in a store, and is it whole, and --draw, a caption's
forest as a picture. `args` is its command line.
"""
import functools
import json
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import captions, files
from data.show.plots import new_figure
from data.show.words import vocabulary
from data.store import llm_fingerprint
from flame import COLUMNS, InputError

SAMPLE = 1000            # at most so many captions or rows are looked at: means are within a few percent
PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed",
           "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")


# -----------------------------------------------------------------------------
# --inspect

def inspect(args):
    """Prints whether a store is whole, how alike its facets are, and the words nearest to them.

    Raises InputError where the store is none or not finished, or --llm is not the one it was made with.
    """
    store = flame.open_store(args.inspect)
    print(f"{args.inspect}: {json.dumps(store.meta, indent=1)}")
    if store.meta["llm"]["fingerprint"] != llm_fingerprint(args.llm):
        raise InputError(f"{args.llm}: the store was made with another LLM; name it with --llm")
    for w in range(-(-store.N // store.window)):
        store.vectors(w)    # raises InputError where they are not whole
    print(f"all {store.N} rows are there")

    # A sample, evenly spaced, says as much as all rows.
    step = store.N // SAMPLE + 1
    states = store.read(range(0, store.N, step), range(len(COLUMNS)))   # [n, 11, D]
    states -= states.mean(0)
    units = normalize(states, dim=-1)

    print("\nmean cosine of one caption's facets, the corpus mean subtracted: raw, short, long")
    print((torch.einsum("nad,nbd->ab", units, units) / len(units)).numpy().round(2))

    print("\nthe words that set each facet apart: the LLM's unembedding of its state, less the corpus mean's")
    words, vectors = vocabulary(args.llm)
    table = captions.read_table(Path(args.inspect, "captions.tsv"))
    for facets, row in zip(states[:3], islice(table, 0, None, step)):
        print(f"{row.key}: {row.long[:150]}")
        nearest = (facets @ vectors.T).topk(min(4, len(words))).indices     # [11, 4]
        for column, several in zip(COLUMNS, words[nearest]):
            print(f"  {column:8} {' '.join(several)}")


# -----------------------------------------------------------------------------
# --draw

def draw(args):
    """Writes a picture of a caption's forest to --out, or forest.png: a PNG.

    Rows are queries, columns the keys that they see; a token has its segment's colour, and beside the mask
    stands the tree of segments. Nothing is drawn without matplotlib.
    """
    tokenizer = flame.load_tokenizer(args.llm)
    prefixes, suffixes = flame.tokenize(tokenizer, [args.draw], "long")
    forest = flame.caption_forest(prefixes, suffixes, args.positions)
    apart = 7 * len(prefixes[0]) + sum(map(len, suffixes[0]))
    T = len(forest.tokens)
    figure = new_figure(0.13 * T, 0.13 * T)
    if figure is None:
        return
    from matplotlib.colors import ListedColormap
    figure.set_layout_engine(None)  # the axes are placed by hand
    colours = np.resize(PALETTE, len(forest.lengths))
    segment_of = np.repeat(range(len(colours)), forest.lengths)     # [T]
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    cells = np.where(flame.visible(forest.lengths, forest.parents), segment_of, np.nan)     # [T, T]
    axes.pcolormesh(cells, cmap=ListedColormap(colours), shading="nearest",
                    edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    answers = forest.answers.numpy()
    axes.barh(answers, answers + 1, 1, -0.5, fill=False, clip_on=False)

    write = functools.partial(axes.text, parse_math=False)
    for t, (token, s) in enumerate(zip(forest.tokens.tolist(), segment_of)):
        word = tokenizer.decode([token]).replace("\n", "\\n")
        write(-1, t, word, size=7, color=colours[s], ha="right", va="center")
        write(t, -1, word, size=7, color=colours[s], ha="center", va="bottom", rotation=90)

    # No query sees a later key: the upper right half is empty, there is room for the tree of segments.
    write(0.45 * T, 3, f"7 facets of one caption in one pass: {T} tokens instead of {apart}\n"
          "row: query, column: key it sees; framed: the answers' rows")
    depths = flame.lineage(forest.parents).sum(1)   # [S], from 1
    for s, tokens in enumerate(forest.tokens.split(forest.lengths.tolist())):
        text = textwrap.shorten(tokenizer.decode(tokens.tolist()), 80, placeholder=" ...")
        write(0.45 * T + 2 * depths[s], 2 * s + 6, text, color=colours[s])

    path = Path(args.out or "forest").with_suffix(".png")
    files.write(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
    print(f"{path}: {T} tokens, {len(colours)} segments")
