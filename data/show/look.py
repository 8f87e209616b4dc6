"""Looking before and after stage 1: embed.py's --plan, --inspect and --draw. `args` is embed.py's command line, parsed.

What a run would take, before any hours are spent; what is in a store, and is it whole; a caption's forest as a picture.
"""
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data import files, released
from data.captions import read_captions, read_join, report_skipped
from data.store import CURE, SETTINGS

SAMPLE = 256                         # captions that --plan counts the tokens of
H100_FLOPS, MFU = 989e12, 0.4        # dense bfloat16 peak of an H100 SXM, and the share of it that --plan assumes


def plan(args):
    """Prints tokens, FLOPs, time and bytes of a run, from a sample of its captions and the LLM's config."""
    config, prompts = flame.llm_config(args.llm), args.prompts
    layer = args.layer or config["num_hidden_layers"] - 1
    joined = {name: read_join(name, file, {}) for name, file in args.join.items()}
    skipped, sample, total, random = {}, [], 0, np.random.default_rng(0)
    for row in tqdm(read_captions(args.captions, skipped, joined), desc="reading captions", unit=" rows", leave=False):
        total += 1  # a reservoir: however many rows come, each is as likely to be in the sample
        if len(sample) < SAMPLE:
            sample.append(row.captions)
        elif (place := int(random.integers(total))) < SAMPLE:
            sample[place] = row.captions
    report_skipped(args.captions, skipped)
    N, tokenizer, tokenize = args.plan or total, flame.load_tokenizer(args.llm), released.text_path(args.positions)
    found = {}
    for name in prompts:
        prefixes, suffixes = tokenize(tokenizer, [texts[name] for texts in sample], name)
        forests = [flame.caption_forest(prefixes[i:i + 16], suffixes[i:i + 16], args.positions) for i in range(0, len(sample), 16)]
        apart = sum(len(p) + len(f) for p, fs in zip(prefixes, suffixes) for f in fs)
        found[name] = np.array([apart, sum(len(f.tokens) for f in forests), sum(flops(config, layer, f) for f in forests)]) / len(sample)
    found["together"] = sum(found.values())
    speeds = {"1 H100": H100_FLOPS * MFU, "8 H100": 8 * H100_FLOPS * MFU}
    if any(Path(args.llm).glob("*.safetensors")):
        encoder, forests = released.text_encoder(args.llm, args.device, getattr(torch, args.dtype), layer, args.positions, args.budget), []
        packs = [pack for name in prompts for pack in encoder.pack([texts[name] for texts in sample], name)]
        started = None
        for rows, forest in [packs[0], *packs]:  # the first to warm up
            encoder.run(forest, len(rows))
            started, forests = started or time.time(), forests + [forest] if started else []
            if time.time() - started > 5:
                break
        speeds = {"here": sum(flops(config, layer, f) for f in forests) / (time.time() - started)} | speeds
    M, D = sum(len(flame.PROMPTS[name].facets) for name in prompts), config["hidden_size"]
    print(f"{args.captions}: {total} captions" + (f", planned as {N}" if N != total else "") + f"; tokens from a sample of {len(sample)}; {layer} blocks of width {D}")
    if "here" in speeds:
        print(f"here: {speeds['here'] / 1e9:.0f} GFLOP/s measured, {args.dtype} on {args.device}", end="; ")
    print(f"H100: {H100_FLOPS / 1e12:.0f} TFLOP/s x {MFU:.0%} assumed, not measured")
    print(f"{'':10}{'tokens a caption':>18}{'shared':>9}{'PFLOP':>11}" + "".join(f"{name:>11}" for name in speeds))
    for name, (apart, shared, work) in found.items():
        print(f"{name:10}{apart:18.0f}{shared:9.0f}{work * N / 1e15:11.4g}" + "".join(f"{work * N / speed / 3600:9.2f} h" for speed in speeds.values()))
    print(f"store: [{N}, {M}, {D}], float16 {N * M * D * 2 / 1e9:.1f} GB, int8 {N * M * (D + 4) / 1e9:.1f} GB")


def flops(config, layer, forest):
    """Of one packed row; a multiply-add counts twice. The last block runs whole for the answers only."""
    D, inner, heads, kv_heads, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    seen, answers = flame.token_depths(forest.lengths, forest.parents) + 1, np.unique(forest.answers)
    keys_values, rest = 2 * D * 2 * kv_heads * head_dim, 2 * D * 2 * heads * head_dim + 2 * D * 3 * inner  # a token and block
    attention = 4 * heads * head_dim * ((layer - 1) * seen.sum() + seen[answers].sum())
    return layer * len(seen) * keys_values + ((layer - 1) * len(seen) + len(answers)) * rest + attention


def inspect(args):
    """Prints what a store holds, whether it is whole, how distinct its facets are, and the words they are nearest to."""
    store = flame.open_store(args.inspect)
    meta, N = flame.read_json(store.path / "meta.json", SETTINGS, CURE), len(store)
    M, D = len(meta["columns"]), meta["D"]
    print(f"{store.path}: {N} captions x {M} embeddings ({', '.join(meta['prompts'])}) of width {D}, {meta['store']}, {store.vectors.nbytes / 1e9:.2f} GB, "
          f"{len(store.keys) - store.images.count('')} with a picture's path\n{meta['llm']['name']} ({meta['llm']['fingerprint']}), layer {meta['llm']['layer']}, {meta['dtype']}, captions {meta['captions']['path']}")
    faults = {"never written": [], "NaN or infinite": [], "not of unit length": []}
    for start in tqdm(range(0, N, 1024), desc="checking", unit=" blocks", leave=False):
        block = np.array(store.vectors[start:start + 1024], np.float32) if store.scales is None else store.scales[start:start + 1024, :, None]
        norm = np.linalg.norm(block, axis=-1)
        faults["never written"] += (start + np.flatnonzero((norm == 0).any(1))).tolist()
        faults["NaN or infinite"] += (start + np.flatnonzero(~np.isfinite(norm).all(1))).tolist()
        if store.scales is None:
            faults["not of unit length"] += (start + np.flatnonzero(((np.abs(norm - 1) > 0.01) & (norm > 0)).any(1))).tolist()
    for what, rows in faults.items():
        print(f"rows {what}: {len(rows)}" + (f", the first: {store.keys[rows[0]]}" if rows else ""))
    some = np.unique(np.linspace(0, N - 1, min(N, 2000)).astype(int))
    states = store.read(some, range(M))
    centered = normalize(states - states.mean(0), dim=-1)
    for name in meta["prompts"]:
        at = [c for c, column in enumerate(meta["columns"]) if column.startswith(name + ".")]
        print(f"\nmean cosine of the {name} facets of one caption, corpus mean subtracted ({len(some)} captions)")
        for line in torch.einsum("nad,nbd->ab", centered[:, at], centered[:, at]) / len(some):
            print("  " + " ".join(f"{x:6.2f}" for x in line.tolist()))
    if not flame.same_llm(meta["llm"]["fingerprint"], args.llm):
        raise flame.InputError(f"{args.llm}: another LLM than the store's ({meta['llm']['name']}); give that one with --llm to see the one-word answers")
    norm, unembedding = flame.load_unembedding(args.llm)
    logits = lambda x: (x * D ** 0.5 * norm) @ unembedding.T  # RMSNorm of a unit vector, then the LLM's own next-token scores
    typical, tokenizer = logits(states.mean(0)), flame.load_tokenizer(args.llm)
    print("\nthe words that set each facet apart: the LLM's unembedding of its state, less that of the corpus mean")
    texts = captions_of_keys(meta, [store.keys[row] for row in some[:3]])
    for n, row in enumerate(some[:3]):
        print(f"{store.keys[row]}: {texts.get(store.keys[row], '')[:150]}")
        for c, column in enumerate(meta["columns"]):
            best = (logits(states[n, c]) - typical[c]).topk(4).indices.tolist()
            print(f"  {column:8} " + ", ".join(repr(tokenizer.decode([t]).strip()) for t in best))


def captions_of_keys(meta, keys):
    """{key: best caption}, as far as the captions file is still where it was."""
    found = {}
    try:
        for row in read_captions(meta["captions"]["path"]):
            if row.key in keys:
                found[row.key] = row.captions["long"]
            if len(found) == len(keys):
                break
    except flame.InputError:
        pass
    return found


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")


def picture_path(out):
    """Where a picture goes: .png where nothing else is said. Raises InputError where no picture can go there."""
    path = Path(out)
    path = path.with_name(path.name + ".png") if not path.suffix and path.name else path
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise flame.InputError(f"--out {out}: not a picture's name; give one that ends in {', '.join(SUFFIXES)}")
    return path


def draw(args):
    """Writes a PNG: every token of the caption's forest, segments in colours, and which keys each query sees."""
    path = picture_path(args.out or "forest.png")
    try:
        args.draw.encode()
    except UnicodeEncodeError:
        raise flame.InputError("--draw: the caption is not UTF-8; type it anew") from None
    tokenizer = flame.load_tokenizer(args.llm)
    prompts = args.prompts[-1]
    prefixes, suffixes = released.text_path(args.positions)(tokenizer, [args.draw], prompts)
    forest = flame.caption_forest(prefixes, suffixes, args.positions)
    T, S = len(forest.tokens), len(forest.lengths)
    if T > 2048:  # as many pixels a side as a screen can still show, squared
        raise flame.InputError(f"--draw: {T} tokens are too many to be drawn; give a shorter caption")
    everything = np.arange(T)
    mask = flame.visible(forest, everything, everything)
    segment = np.repeat(np.arange(S), forest.lengths)
    words = [tokenizer.decode([t]).replace("\n", "\\n") or "?" for t in forest.tokens.tolist()]
    colors = [PALETTE[s % len(PALETTE)] for s in range(S)]

    cell = max(4, min(18, 2000 // T))
    side = T * cell
    font, text_font = ImageFont.load_default(max(7, cell - 2)), ImageFont.load_default(max(11, side // 84))
    left = max(int(font.getlength(w)) for w in words) + 16
    top = left + 60
    image = Image.new("RGB", (left + side + 20, top + side + 20), "white")
    pen = ImageDraw.Draw(image)
    separate = sum(len(prefixes[0]) + len(f) for f in suffixes[0])
    pen.text((16, 12), f"{prompts} prompts, {len(suffixes[0])} facets of one caption in one pass: {T} tokens instead of {separate}", fill="black", font=ImageFont.load_default(max(14, side // 72)))
    for i, word in enumerate(words):
        color = colors[segment[i]]
        pen.text((left - 8, top + (i + 0.5) * cell), word, fill=color, font=font, anchor="rm")
        label = Image.new("RGBA", (left, cell + 4))
        ImageDraw.Draw(label).text((4, cell / 2 + 1), word, fill=color, font=font, anchor="lm")
        label = label.rotate(90, expand=True)
        image.paste(label, (left + i * cell - 1, top - label.height - 4), label)
    for i, j in zip(*np.nonzero(mask)):
        x, y = left + j * cell, top + i * cell
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colors[segment[j]])
    for i in set(forest.answers.tolist()):  # the facet states are read in these rows
        pen.rectangle((left - 2, top + i * cell - 1, left + (i + 1) * cell, top + (i + 1) * cell - 1), outline="black", width=2)
    # The upper right triangle is always empty: the list of segments goes there.
    depth, line = [0] * S, max(14, side // 56)
    x, y = left + side * 0.45, top + line
    pen.text((x, y), "row: query, column: key it sees; framed: the answers' rows", fill="black", font=text_font)
    starts = np.cumsum(forest.lengths) - forest.lengths
    for s in range(S):
        depth[s] = 0 if forest.parents[s] < 0 else depth[forest.parents[s]] + 1
        text = tokenizer.decode(forest.tokens[starts[s]:starts[s] + forest.lengths[s]].tolist()).strip().split(" ")
        text = " ".join(text if len(text) < 11 else text[:4] + ["..."] + text[-4:])
        pen.text((x + line * depth[s], y + line * (s + 1.5)), text, fill=colors[s], font=text_font)
    with files.disk_errors(path, "choose another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, image.save)
    print(f"{path}: {T} tokens, {S} segments")
