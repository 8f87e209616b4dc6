"""Looking before and after stage 1: embed.py's --plan, --inspect and --draw. `args` is its command line.

What a run would take, before any hours are spent; what is in a store, and is it whole; a caption's forest as
a picture.
"""
import json
import tempfile
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

import flame
from data import captions, files, released
from data.show.plots import new_figure
from data.show.words import load_unembedding
from flame import COLUMNS, PROMPTS, InputError

SAMPLE = 256             # captions at least that tokens are counted of: their mean is within a few percent
H100 = 0.4 * 989e12      # FLOP/s of an H100 SXM: its dense bfloat16 peak, 40% of it used
PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed",
           "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")


# -----------------------------------------------------------------------------
# --plan

def plan(args):
    """Prints tokens, hours and bytes of a run, from a sample of its captions and the LLM's config alone."""
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch, "captions.tsv")
        captions.write_table(table, args.captions, args.join)
        total = sum(1 for _ in captions.read_table(table))
        sample = list(islice(captions.read_table(table), 0, None, max(1, total // SAMPLE)))
    config = flame.llm_config(args.llm)
    tokenizer = flame.load_tokenizer(args.llm)
    costs = []
    for prompts in PROMPTS:
        forest, apart = forest_of(args, tokenizer, [getattr(row, prompts) for row in sample], prompts)
        costs.append([apart, len(forest.tokens), flops(config, args.layer, forest)])
    apart, shared, work = np.sum(costs, 0) / len(sample)
    N = args.plan or total
    D = config["hidden_size"]
    hours = N * work / H100 / 3600
    print(f"{args.captions}: {total} captions, planned as {N}")
    print(f"a caption's {len(COLUMNS)} questions: {apart:.0f} tokens, {shared:.0f} where shared ones count "
          f"once (a sample of {len(sample)})")
    print(f"{args.layer} blocks of width {D}: {hours:.2f} hours on an H100 at 40% of its peak, "
          f"{hours / 8:.2f} on 8")
    print(f"store: [{N}, {len(COLUMNS)}, {D}] in float16, {2e-9 * N * len(COLUMNS) * D:.1f} GB")


def forest_of(args, tokenizer, texts, prompts):
    """-> (the forest of all texts and questions, how many tokens it would be with nothing shared)"""
    prefixes, suffixes = released.text_path(args.positions)(tokenizer, texts, prompts)
    forest = flame.caption_forest(prefixes, suffixes, args.positions)
    lengths = flame.token_depths(forest.lengths, forest.parents)[forest.answers] + 1
    return forest, lengths.sum()


def flops(config, layer, forest):
    """Of one packed row; a multiply-add counts twice.

    What follows the last block's attention is done for the answers only.
    """
    D = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    seen = flame.token_depths(forest.lengths, forest.parents) + 1  # keys that a token sees
    T = len(seen)
    before = 2 * D * (queries + 2 * keys) * T + 4 * queries * seen.sum()  # products for q, k, v and attention
    after = 2 * D * (queries + 3 * config["intermediate_size"])           # output projection and MLP, a token
    return layer * before + ((layer - 1) * T + len(np.unique(forest.answers))) * after


# -----------------------------------------------------------------------------
# --inspect

def inspect(args):
    """Prints whether a store is whole, how alike its facets are, and the words nearest to them.

    Raises InputError where the store is none or not finished, or --llm is not the one it was made with.
    """
    store = flame.open_store(args.inspect)
    every = range(len(COLUMNS))
    print(f"{args.inspect}: {json.dumps(store.meta, indent=1)}")
    wrong = []
    for w in range(-(-store.N // store.window)):
        norms = np.linalg.norm(store.vectors(w).astype(np.float32), axis=-1)    # [window, 11]
        bad = ~(np.abs(norms - 1) < 0.01).all(1)    # NaN is less than nothing
        wrong += (np.flatnonzero(bad) + w * store.window).tolist()
    keys = [store.keys[row] for row in wrong[:5]]
    print(f"rows with a vector that is not of unit length: {len(wrong)}", *keys)

    # Facets of 2,000 rows, evenly spaced, say as much as all of them.
    states = store.read(np.unique(np.linspace(0, store.N - 1, 2000).astype(int)), every)
    mean = states.mean(0)
    units = normalize(states - mean, dim=-1)
    print("\nmean cosine of one caption's facets, the corpus mean subtracted: raw, short, long")
    for line in torch.einsum("nad,nbd->ab", units, units) / len(units):
        print(" ", *(f"{cosine:6.2f}" for cosine in line))

    if store.meta["llm"]["fingerprint"] != flame.llm_fingerprint(args.llm):
        raise InputError(f"{args.llm}: the store was made with another LLM; name it with --llm")
    norm, unembedding = load_unembedding(args.llm)
    tokenizer = flame.load_tokenizer(args.llm)
    print("\nthe words that set each facet apart: the LLM's unembedding of its state, less the corpus mean's")
    for n, row in enumerate(islice(captions.read_table(Path(args.inspect, "captions.tsv")), 3)):
        print(f"{row.key}: {row.long[:150]}")
        scores = (store.read([n], every)[0] - mean) * norm @ unembedding.T      # [11, vocabulary]
        for column, tokens in zip(COLUMNS, scores.topk(4).indices.tolist()):
            print(f"  {column:8}", *(tokenizer.decode([token]).strip() for token in tokens))


# -----------------------------------------------------------------------------
# --draw

def draw(args):
    """Writes a picture of a caption's forest: rows are queries, columns the keys that they see."""
    tokenizer = flame.load_tokenizer(args.llm)
    forest, apart = forest_of(args, tokenizer, [args.draw], "long")
    T = len(forest.tokens)
    figure = new_figure(0.13 * T, 0.13 * T, None)
    if figure is None:
        return
    from matplotlib.colors import ListedColormap
    colours = np.resize(PALETTE, len(forest.lengths))
    segment_of = np.repeat(range(len(colours)), forest.lengths)
    axes = figure.add_axes((0, 0, 1, 1))
    mask = flame.visible(forest.lengths, forest.parents)
    axes.pcolormesh(np.where(mask, segment_of, np.nan), cmap=ListedColormap(colours), shading="nearest",
                    edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    # The rows that the facet states are read in are framed.
    answers = forest.answers.numpy()
    axes.barh(answers, answers + 1, 1, -0.5, fill=False, zorder=3, clip_on=False)
    axes.set_title(f"7 facets of one caption in one pass: {T} tokens instead of {apart}", loc="left")

    words = [tokenizer.decode([token]).replace("\n", "\\n") for token in forest.tokens.tolist()]
    axes.xaxis.tick_top()
    axes.set_xticks(range(T), words, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(T), words, fontsize=7, parse_math=False)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, segment in zip(labels, segment_of):
            label.set_color(colours[segment])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

    # No query sees a later key: the upper right half is empty, there is room for the tree of segments.
    axes.text(0.45 * T, 2, "row: query, column: key it sees; framed: the answers' rows")
    depths = []
    for s, tokens in enumerate(np.split(forest.tokens, np.cumsum(forest.lengths)[:-1])):
        parent = forest.parents[s]
        depths.append(0 if parent < 0 else depths[parent] + 1)
        text = textwrap.shorten(tokenizer.decode(tokens.tolist()), 70, placeholder=" ...")
        axes.text(0.45 * T + 2 * depths[s], 2 * s + 5, text, color=colours[s], parse_math=False)
    path = args.out or "forest.png"
    files.write(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
    print(f"{path}: {T} tokens, {len(colours)} segments")
