"""Looking before and after stage 1: embed.py's --plan, --inspect and --draw. `args` is its command line.

What a run would take, before any hours are spent; what is in a store, and is it whole; a caption's forest as
a picture.
"""
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data import files, released
from data.captions import read_captions, read_join, report_skipped
from data.store import CURE, SETTINGS

# -----------------------------------------------------------------------------
# --plan

SAMPLE = 256             # captions that tokens are counted of; the mean of so many is within a few percent
H100 = 0.4 * 989e12      # FLOP/s of an H100 SXM: its dense bfloat16 peak, 40% of it used
TABLE = "{:10}{:>18}{:>9}{:>11}{:>11}{:>11}{:>11}"


def plan(args):
    """Prints tokens, FLOPs, time and bytes of a run, from a sample of its captions and the LLM's config.

    The LLM's weights need not be there: then only the speed of this machine is missing.
    """
    config = flame.llm_config(args.llm)
    layer = args.layer or config["num_hidden_layers"] - 1
    total, sample = sampled(args)
    costs = {name: caption_cost(args, config, layer, name, sample) for name in args.prompts}
    costs["together"] = sum(costs.values())
    here = measured_speed(args, config, layer, sample)

    # One line a prompt set: what it takes, and how long at each speed.
    N = args.plan or total
    print(f"{args.captions}: {total} captions, planned as {N}; tokens from a sample of {len(sample)}")
    print(f"{layer} blocks of width {config['hidden_size']}; TFLOP/s here {here / 1e12:.3g} (measured), "
          f"1 H100 {H100 / 1e12:.0f} (assumed)")
    print(TABLE.format("", "tokens a caption", "shared", "PFLOP", "here", "1 H100", "8 H100"))
    for name, (apart, shared, work) in costs.items():
        hours = [f"{N * work / speed / 3600:.2f} h" for speed in (here, H100, 8 * H100)]
        print(TABLE.format(name, round(apart), round(shared), f"{N * work / 1e15:.4g}", *hours))

    M = sum(len(flame.PROMPTS[name].facets) for name in args.prompts)
    D = config["hidden_size"]
    vectors = N * M / 1e9
    print(f"store: [{N}, {M}, {D}], float16 {2 * D * vectors:.1f} GB, "
          f"int8 {(D + 4) * vectors:.1f} GB")  # a float32 scale for every vector


def sampled(args):
    """-> (how many rows there are, the captions of SAMPLE of them).

    A reservoir: however many rows come, each is as likely to be in the sample.
    """
    skipped = {}
    joined = {name: read_join(name, file, skipped) for name, file in args.join.items()}
    source = read_captions(args.captions, skipped, joined)
    random = np.random.default_rng(0)
    total = 0
    sample = []
    for row in tqdm(source, desc="reading captions", unit=" rows", leave=False):
        total += 1
        place = random.integers(total)
        if len(sample) < SAMPLE:
            sample.append(row.captions)
        elif place < SAMPLE:
            sample[place] = row.captions
    report_skipped(args.captions, skipped)
    return total, sample


def caption_cost(args, config, layer, prompts, sample):
    """What a caption of one prompt set costs in the mean, float64 [3].

    The tokens of its K strings, the tokens when what they share is counted once, and FLOPs.
    """
    tokenizer = flame.load_tokenizer(args.llm)
    forest, apart = forest_of(args, tokenizer, [captions[prompts] for captions in sample], prompts)
    return np.array([apart, len(forest.tokens), flops(config, layer, forest)]) / len(sample)


def forest_of(args, tokenizer, captions, prompts):
    """-> (the forest of all captions and questions, how many tokens it would be with nothing shared)"""
    prefixes, suffixes = released.text_path(args.positions)(tokenizer, captions, prompts)
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


def measured_speed(args, config, layer, sample):
    """-> FLOP/s of this machine over one packed row; NaN where the LLM's weights are not there."""
    if not any(Path(args.llm).glob("*.safetensors")):
        return float("nan")
    dtype = getattr(torch, args.dtype)
    encoder = released.text_encoder(args.llm, args.device, dtype, layer, args.positions)
    prompts = args.prompts[-1]
    some, forest = next(encoder.pack([captions[prompts] for captions in sample], prompts))
    for _ in range(2):  # once to warm up
        started = time.time()
        encoder.run(forest, len(some))
    return flops(config, layer, forest) / (time.time() - started)


# -----------------------------------------------------------------------------
# --inspect

def inspect(args):
    """Prints what a store holds, whether it is whole, how distinct its facets are, and their nearest words.

    Raises InputError where the store is none, or where --llm is not the one that it was made with.
    """
    store = flame.open_store(args.inspect)
    meta = flame.read_json(store.path / "meta.json", SETTINGS, CURE)
    N, M, D = store.vectors.shape
    pictures = N - store.images.count("")
    size = store.vectors.nbytes / 1e9
    print(f"{store.path}: [{N}, {M}, {D}], {size:.2f} GB, {pictures} with a picture's path")
    for what in SETTINGS:
        print(f"  {what}: {meta[what]}")
    for what, rows in faults(store).items():
        first = f", the first: {store.keys[rows[0]]}" if len(rows) else ""
        print(f"rows {what}: {len(rows)}{first}")

    # Facets of 2,000 rows, evenly spaced, say as much as all of them.
    some = np.unique(np.linspace(0, N - 1, min(N, 2000)).astype(int))
    states = store.read(some, store.columns)
    print_distinctness(states, meta)
    if meta["llm"]["fingerprint"] != flame.llm_fingerprint(args.llm):
        raise flame.InputError(f"{args.llm}: another LLM than the store's ({meta['llm']['name']}); "
                               "give that one with --llm to see the one-word answers")
    print_words(args.llm, states, meta, [store.keys[row] for row in some[:3]])


def faults(store):
    """{what is wrong: rows}, found by the vectors' norms; in an int8 store by their scales."""
    wrong = {}
    norms = store.scales
    if norms is None:
        norms = np.empty(store.vectors.shape[:2], np.float32)
        for start in tqdm(range(0, len(store), 1024), desc="checking", unit=" blocks", leave=False):
            block = slice(start, start + 1024)  # the store may be larger than memory
            norms[block] = np.linalg.norm(store.vectors[block].astype(np.float32), axis=-1)
        wrong["not of unit length"] = (np.abs(norms - 1) > 0.01) & (norms > 0)
    wrong |= {"never written": norms == 0, "NaN or infinite": ~np.isfinite(norms)}
    return {what: np.flatnonzero(where.any(1)) for what, where in wrong.items()}


def print_distinctness(states, meta):
    """How alike the facets of one caption are, less what all captions share; states: float32 [n, M, D].

    Seven questions are worth asking as far as the numbers off the diagonal are small.
    """
    centered = normalize(states - states.mean(0), dim=-1)
    for name in meta["prompts"]:
        facets = centered[:, [column.startswith(f"{name}.") for column in meta["columns"]]]
        cosines = torch.einsum("nad,nbd->ab", facets, facets) / len(facets)
        print(f"\nmean cosine of one caption's {name} facets, "
              f"corpus mean subtracted ({len(facets)} captions)")
        for line in cosines:
            print(" ", *(f"{cosine:6.2f}" for cosine in line))


def print_words(llm_dir, states, meta, keys):
    """The one-word answers to the first captions.

    These are the LLM's next-token scores, less the corpus mean's: alone, all captions' would be much alike.
    """
    norm, unembedding = flame.load_unembedding(llm_dir)
    tokenizer = flame.load_tokenizer(llm_dir)
    texts = captions_of_keys(meta["captions"]["path"], keys)
    # The scores are linear, so that the mean's can be subtracted before: RMSNorm of a unit vector, less the
    # corpus mean's, then the unembedding.
    apart = (states[:len(keys)] - states.mean(0)) * meta["D"] ** 0.5 * norm
    best = (apart @ unembedding.T).topk(4).indices.tolist()  # [captions][M][4]
    print("\nthe words that set each facet apart: the LLM's unembedding of its state, less the corpus mean's")
    for key, facets in zip(keys, best):
        print(f"{key}: {texts.get(key, '')[:150]}")
        for column, tokens in zip(meta["columns"], facets):
            print(f"  {column:8}", *(repr(tokenizer.decode([token]).strip()) for token in tokens))


def captions_of_keys(path, keys):
    """{key: best caption}, as far as the captions file is still where it was."""
    found = {}
    try:
        for row in read_captions(path):
            if row.key in keys:
                found[row.key] = row.captions["long"]
            if len(found) == len(keys):
                break
    except flame.InputError:
        pass
    return found


# -----------------------------------------------------------------------------
# --draw

PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed",
           "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TOKENS = 2048  # that a picture can show: at four pixels each it is 8,192 wide


def draw(args):
    """Writes a picture: a caption's forest, token by token, segments in colours, and who sees whom."""
    path = picture_path(args.out or "forest.png")
    if args.draw.encode(errors="replace").decode() != args.draw:
        raise flame.InputError("--draw: the caption is not UTF-8; type it anew")
    tokenizer = flame.load_tokenizer(args.llm)
    prompts = args.prompts[-1]
    forest, apart = forest_of(args, tokenizer, [args.draw], prompts)
    T = len(forest.tokens)
    if T > TOKENS:
        raise flame.InputError(f"--draw: {T} tokens are too many for a picture; give a shorter caption")
    K = len(flame.PROMPTS[prompts].facets)
    title = f"{prompts} prompts, {K} facets of one caption in one pass: {T} tokens instead of {apart}"
    with files.disk_errors(path, "choose another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, picture(forest, tokenizer.decode, title).save)
    print(f"{path}: {T} tokens, {len(forest.lengths)} segments")


def picture_path(out):
    """Where a picture goes: .png where nothing else is said. Raises InputError where none can go there."""
    path = Path(out)
    if not path.suffix and not path.is_dir():
        path = path.with_suffix(".png")
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise flame.InputError(f"--out {out}: not a picture's name; let it end in {', '.join(SUFFIXES)}")
    return path


def mask_of(forest):
    """Which keys each query sees, bool [T, T].

    It is the extension's mask, so that what is drawn is what runs; without it flame.visible says the same.
    """
    T = len(forest.tokens)
    if not flame.flame_ext:
        return flame.visible(forest)
    mask = torch.empty(T, T, dtype=torch.bool)
    layout = flame.flame_ext.layout(forest.lengths, forest.parents)
    flame.flame_ext.mask(layout, mask)
    return mask.numpy()


def picture(forest, decode, title):
    """Rows are queries, columns the keys that they see; a token's label has its segment's colour.

    decode: list of token ids -> text.
    """
    # What stands where: T tokens, and in pixels a token's cell, the margins left and top, the mask's side.
    T = len(forest.tokens)
    colors = [PALETTE[s % len(PALETTE)] for s in range(len(forest.lengths))]
    token_colors = np.repeat(colors, forest.lengths).tolist()
    words = [decode([token]).replace("\n", "\\n") or "?" for token in forest.tokens.tolist()]
    cell = max(4, min(18, 2000 // T))
    font = ImageFont.load_default(max(7, cell - 2))
    left = 16 + max(int(font.getlength(word)) for word in words)
    top = left + 60
    side = T * cell

    def labels(x, anchor):
        """All words, one below the other, at x in a picture as wide as the margin."""
        strip = Image.new("RGB", (left, side), "white")
        pen = ImageDraw.Draw(strip)
        for i, word in enumerate(words):
            pen.text((x, (i + 0.5) * cell), word, token_colors[i], font, anchor)
        return strip

    # The labels stand at the left, and turned by a quarter at the top; the mask is in between.
    image = Image.new("RGB", (left + side + 20, top + side + 20), "white")
    image.paste(labels(left - 8, "rm"), (0, top))
    image.paste(labels(8, "lm").rotate(90, expand=True), (left, top - left))
    image.paste(squares(mask_of(forest), token_colors, cell), (left, top))

    pen = ImageDraw.Draw(image)
    pen.text((16, 12), title, "black", ImageFont.load_default(max(14, side // 72)))
    for i in set(forest.answers.tolist()):  # the facet states are read in these rows
        y = top + i * cell - 1
        pen.rectangle((left - 2, y, left + (i + 1) * cell, y + cell), outline="black", width=2)

    # No query sees a later key: the upper right half is empty, there is room for the segments.
    line = max(14, side // 56)
    font = ImageFont.load_default(line * 2 // 3)
    x = left + side * 0.45
    pen.text((x, top + line), "row: query, column: key it sees; framed: the answers' rows", "black", font)
    for s, (depth, text) in enumerate(segment_tree(forest, decode)):
        pen.text((x + depth * line, top + (s + 2.5) * line), text, colors[s], font)
    return image


def squares(mask, colors, cell):
    """bool [T, T] -> picture: a square of `cell` pixels in the key's colour where it is seen.

    The last row and column of pixels of every square stay white, as lines in between.
    """
    T = len(mask)
    rgb = np.array([ImageColor.getrgb(color) for color in colors], np.uint8)  # [T, 3]
    pixels = np.full((T, cell, T, cell, 3), 255, np.uint8)
    pixels[:, :-1, :, :-1] = np.where(mask[:, None, :, None, None], rgb[:, None], np.uint8(255))
    return Image.fromarray(pixels.reshape(T * cell, T * cell, 3))


def segment_tree(forest, decode):
    """-> [(how many segments are above it, its text)] of all segments; a long text is cut in the middle."""
    tree = []
    for tokens, parent in zip(np.split(forest.tokens, np.cumsum(forest.lengths)[:-1]), forest.parents):
        words = decode(tokens.tolist()).split()
        if len(words) > 10:
            words[4:-4] = ["..."]
        tree.append((0 if parent < 0 else tree[parent][0] + 1, " ".join(words)))
    return tree
