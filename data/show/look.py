"""Looking before and after stage 1: embed.py's --plan, --inspect and --draw. `args` is its command line.

What a run would take, before any hours are spent; what is in a store, and is it whole; a caption's forest as
a picture.
"""
import json
import tempfile
import time
import warnings
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

# -----------------------------------------------------------------------------
# --plan

SAMPLE = 256             # captions that tokens are counted of; the mean of so many is within a few percent
H100 = 0.4 * 989e12      # FLOP/s of an H100 SXM: its dense bfloat16 peak, 40% of it used


def plan(args):
    """Prints tokens, hours and bytes of a run, from a sample of its captions and the LLM's config.

    The LLM's weights need not be there: then only the hours on this machine are missing.
    """
    config = flame.llm_config(args.llm)
    layer = args.layer or config["num_hidden_layers"] - 1
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch, "captions.tsv")
        captions.write_table(table, args.captions, args.join)
        total = sum(1 for _ in captions.read_table(table))
        wanted = set(np.linspace(0, total - 1, SAMPLE).astype(int).tolist())
        sample = [row for n, row in enumerate(captions.read_table(table)) if n in wanted]
    tokenizer = flame.load_tokenizer(args.llm)
    costs = []
    for prompts in PROMPTS:
        forest, apart = forest_of(args, tokenizer, [getattr(row, prompts) for row in sample], prompts)
        costs.append([apart, len(forest.tokens), flops(config, layer, forest)])
    apart, shared, work = np.sum(costs, 0) / len(sample)
    here = measured_speed(args, config, layer, [row.long for row in sample])
    N = args.plan or total
    hours = [f"{N * work / speed / 3600:.2f}" for speed in (here, H100)]
    size = 2e-9 * N * len(COLUMNS) * config["hidden_size"]
    print(f"{args.captions}: {total} captions, planned as {N}; tokens from a sample of {len(sample)}")
    print(f"a caption's {len(COLUMNS)} questions: {apart:.0f} tokens, {shared:.0f} where shared ones count "
          f"once, {work / 1e9:.3g} GFLOP")
    print(f"{layer} blocks of width {config['hidden_size']}: {hours[0]} hours here, by one packed row, "
          f"{hours[1]} on an H100 at 40% of its peak")
    print(f"store: [{N}, {len(COLUMNS)}, {config['hidden_size']}] in float16, {size:.1f} GB")


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
    D, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    seen = flame.token_depths(forest.lengths, forest.parents) + 1  # keys that a token sees
    T = len(seen)
    before = 2 * D * (queries + 2 * keys) * T + 4 * queries * seen.sum()  # products for q, k, v and attention
    after = 2 * D * (queries + 3 * inner)                                 # output projection and MLP, a token
    return layer * before + ((layer - 1) * T + len(np.unique(forest.answers))) * after


def measured_speed(args, config, layer, texts):
    """-> FLOP/s of this machine over one packed row; NaN where the LLM's weights are not there."""
    if not any(Path(args.llm).glob("*.safetensors")):
        return float("nan")
    dtype = getattr(torch, args.dtype)
    encoder = released.text_encoder(args.llm, args.device, dtype, layer, args.positions)
    rows, forest = next(encoder.pack(texts, "long"))
    for _ in range(2):  # once to warm up
        started = time.time()
        flame.decode(encoder.decoder, forest)
    return flops(config, layer, forest) / (time.time() - started)


# -----------------------------------------------------------------------------
# --inspect

def inspect(args):
    """Prints whether a store is whole, how alike its facets are, and the words nearest to them.

    Raises InputError where the store is none or not finished, or --llm is not the one it was made with.
    """
    store = flame.open_store(args.inspect)
    meta = store.meta
    every = range(len(COLUMNS))
    print(f"{args.inspect}: {json.dumps(meta, indent=1)}")
    wrong = []
    for n, file in enumerate(sorted(Path(args.inspect).glob("[0-9]*.npy"))):
        with flame.reading(file, "delete it, and run the same command of embed.py again") as path:
            norms = np.linalg.norm(np.load(path).astype(np.float32), axis=-1)   # [window, 11]
        bad = ~(np.abs(norms - 1) < 0.01).all(1)    # NaN is less than nothing
        wrong += (np.flatnonzero(bad) + n * meta["window"]).tolist()
    first = [store.keys[row] for row in wrong[:5]]
    print(f"rows with a vector that is not of unit length: {len(wrong)}", *first)

    # Facets of 2,000 rows, evenly spaced, say as much as all of them.
    states = store.read(np.unique(np.linspace(0, len(store) - 1, 2000).astype(int)), every)
    mean = states.mean(0)
    units = normalize(states - mean, dim=-1)
    print("\nmean cosine of one caption's facets, the corpus mean subtracted: raw, short, long")
    for line in torch.einsum("nad,nbd->ab", units, units) / len(units):
        print(" ", *(f"{cosine:6.2f}" for cosine in line))

    if meta["llm"]["fingerprint"] != flame.llm_fingerprint(args.llm):
        raise InputError(f"{args.llm}: another LLM than the store's ({meta['llm']['name']}); "
                         "give that one with --llm to see the one-word answers")
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

PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed",
           "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")
TOKENS = 512   # that a picture can show


def draw(args):
    """Writes a picture: a caption's forest, token by token, segments in colours, and who sees whom."""
    path = Path(args.out or "forest.png")
    path = path if path.suffix else path.with_suffix(".png")
    tokenizer = flame.load_tokenizer(args.llm)
    forest, apart = forest_of(args, tokenizer, [args.draw], "long")
    T = len(forest.tokens)
    if T > TOKENS:
        raise InputError(f"--draw: {T} tokens are too many for a picture; give a shorter caption")
    title = f"7 facets of one caption in one pass: {T} tokens instead of {apart}"
    figure = picture(forest, tokenizer.decode, title)
    with files.disk_errors(path, "choose another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # of letters that no font here has
        files.write(path, figure.savefig)
    print(f"{path}: {T} tokens, {len(forest.lengths)} segments")


def picture(forest, decode, title):
    """-> Figure: rows are queries, columns the keys that they see, a token in its segment's colour.

    decode: list of token ids -> text. Raises InputError without matplotlib.
    """
    T = len(forest.tokens)
    words = [decode([token]).replace("\n", "\\n") or "?" for token in forest.tokens.tolist()]
    side = max(7, 0.13 * T)     # of the mask, inches
    margin = 0.2 + 0.06 * max(map(len, words))
    width, height = side + margin, side + margin + 0.4
    figure = new_figure(width, height, None)    # to measure all those labels would take many seconds
    if figure is None:
        raise InputError("--draw: it takes matplotlib; pip install matplotlib")
    colours = [PALETTE[s % len(PALETTE)] for s in range(len(forest.lengths))]
    of_tokens = np.repeat(colours, forest.lengths)
    rgb = np.array([[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in of_tokens], np.uint8)
    axes = figure.add_axes((margin / width, 0.05 / height, (side - 0.05) / width, side / height))
    mask = flame.visible(forest.lengths, forest.parents)[..., None]
    axes.imshow(np.where(mask, rgb, np.uint8(255)), interpolation="none")
    # The rows that the facet states are read in are framed.
    answers = forest.answers.numpy()
    axes.barh(answers, answers + 1, 1, -0.5, fill=False, zorder=3, clip_on=False)
    axes.set_title(title, loc="left", fontsize=6 + side / 2)

    axes.xaxis.tick_top()
    axes.set_xticks(range(T), words, rotation=90, fontsize=7)
    axes.set_yticks(range(T), words, fontsize=7)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, colour in zip(labels, of_tokens):
            label.set(color=colour, parse_math=False)
    lines = np.arange(T) - 0.5
    axes.set_xticks(lines, minor=True)
    axes.set_yticks(lines, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)

    # No query sees a later key: the upper right half is empty, there is room for the segments.
    step = max(0.018 * T, 1.5)
    axes.text(0.45 * T, step, "row: query, column: key it sees; framed: the answers' rows")
    for s, (depth, text) in enumerate(segment_tree(forest, decode)):
        axes.text(0.45 * T + depth * step, (s + 2.5) * step, text, color=colours[s], parse_math=False)
    return figure


def segment_tree(forest, decode):
    """-> [(how many segments are above it, its text)] of all segments; a long text is cut in the middle."""
    tree = []
    for tokens, parent in zip(np.split(forest.tokens, np.cumsum(forest.lengths)[:-1]), forest.parents):
        words = decode(tokens.tolist()).split()
        if len(words) > 10:
            words[4:-4] = ["..."]
        tree.append((0 if parent < 0 else tree[parent][0] + 1, " ".join(words)))
    return tree
