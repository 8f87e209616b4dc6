"""Draw a caption's segment forest and attention mask, as in README.md.

    python tests/draw_forest.py "A red kite above a beach."    # -> forest.png; needs data/demo/llm
"""
import functools
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flame  # noqa: E402

PALETTE = ("#64748b #2563eb #dc2626 #d97706 #059669 #7c3aed "
           "#db2777 #0891b2 #65a30d #9333ea #ea580c #0d9488").split()


def draw(caption, llm, path):
    """Rows are queries, columns are keys; each segment has a color."""
    tokenizer = flame.load_tokenizer(llm)
    prefixes, suffixes = flame.tokenize(tokenizer, [caption], "long")
    forest = flame.caption_forest(prefixes, suffixes)
    K = len(suffixes[0])
    separate = K * len(prefixes[0]) + sum(map(len, suffixes[0]))
    T = len(forest.tokens)
    colors = np.resize(PALETTE, len(forest.lengths))
    segment_of = np.repeat(range(len(colors)), forest.lengths)  # [T]
    figure = Figure((0.13 * T, 0.13 * T), dpi=100)
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
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    draw(sys.argv[1], ROOT / "data/demo/llm", "forest.png")
