"""Stage 1: captions + frozen LLM -> embedding store.

    python embed.py --captions cc3m.tsv                 # -> data/embeddings/cc3m
    python embed.py --draw "A red kite above a beach."  # -> a picture of that caption's segment forest and mask

The LLM never changes, so its facet embeddings are computed once and training never runs it. The store is written window
by window with a journal: after a crash, or kill -9, the same command goes on where it stopped and ends with the same bytes.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import flame
from data.captions import read_captions

WINDOW = {"cpu": 256, "cuda": 8192}  # rows between two flushes, about half a minute's work; part of what fixes the bytes


def embed(args):
    captions = Path(args.captions)
    out = Path(args.out or Path("data/embeddings") / captions.name.split(".")[0])
    prompts = chosen_prompts(args.prompts)
    columns = [c for c in flame.COLUMNS if c.split(".")[0] in prompts]
    device = torch.device(args.device)
    layer = args.layer or flame.llm_config(args.llm)["num_hidden_layers"] - 1
    skipped = {}
    rows = [(row.key, row.image) for row in tqdm(read_captions(captions, skipped), desc="reading captions", unit=" rows", leave=False)]
    settings = {
        "llm": {"name": Path(args.llm).resolve().name, "fingerprint": flame.llm_fingerprint(args.llm), "layer": layer,
                "positions": args.positions},
        "captions": {"path": os.path.abspath(captions), "sha256": file_hash(captions)},
        "prompts": prompts, "columns": columns, "N": len(rows), "dtype": args.dtype, "device": device.type,
        "budget": args.budget or flame.BUDGET[device.type], "window": WINDOW[device.type],
    }
    report_skipped(captions, skipped)
    if (done := opened(out, settings, args.overwrite)) is None:
        print(f"{out}: finished already, nothing to do")
        return

    started = time.time()
    encoder = flame.TextEncoder(args.llm, device, getattr(torch, args.dtype), layer, args.positions, args.budget)
    D = encoder.dim
    print(f"{len(rows)} captions, prompts {','.join(prompts)} -> {out} ([{len(rows)}, {len(columns)}, {D}] float16, "
          f"{len(rows) * len(columns) * D * 2 / 1e6:.0f} MB), layer {layer}, {args.dtype} on {device}"
          + ("" if flame.flame_ext else ", without flame_ext: slower"))
    vectors = open_vectors(out / "embeddings.npy", (len(rows), len(columns), D), fresh=done == 0)
    if done == 0:
        write_text(out / "keys.txt", "".join(key + "\n" for key, _ in rows))
        write_text(out / "images.txt", "".join(image + "\n" for _, image in rows))
        write_text(out / "journal.json", json.dumps({"settings": settings, "done": 0}, indent=1))

    bar = tqdm(total=len(rows) * len(columns), initial=done * len(columns), desc="embedding", unit=" embeddings", smoothing=0.05)
    window = []
    for i, row in enumerate(read_captions(captions)):
        if i >= done:
            window.append(row.captions)
        if len(window) == WINDOW[device.type] or i == len(rows) - 1 and window:
            first = i + 1 - len(window)
            for name in prompts:
                at = columns.index(f"{name}.0")
                K = len(flame.PROMPTS[name].facets)
                texts = list(dict.fromkeys(texts[name] for texts in window))  # equal captions of a window are encoded once
                place = {text: n for n, text in enumerate(texts)}
                facets = torch.empty(len(texts), K, D)
                for some, encoded in encoder.encode_batches(texts, name):
                    facets[some] = encoded
                    bar.update(len(some) * K)
                facets = normalize(facets, dim=-1).half().numpy()
                vectors[first:i + 1, at:at + K] = facets[[place[texts[name]] for texts in window]]
            vectors.flush()
            write_text(out / "journal.json", json.dumps({"settings": settings, "done": i + 1}, indent=1))
            window = []
    bar.n = bar.total  # equal captions were counted once
    bar.close()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    meta = settings | {"D": D, "M": len(columns), "store": "float16", "versions": versions}
    write_text(out / "meta.json", json.dumps(meta, indent=1))  # last: it makes the store finished
    seconds = time.time() - started
    print(f"{out}: {len(rows)} x {len(columns)} embeddings, {(len(rows) - done) / seconds:.2f} captions/s, {seconds:.0f} s")


def chosen_prompts(text):
    names = text.split(",")
    if wrong := [n for n in names if n not in flame.PROMPTS]:
        raise flame.InputError(f"--prompts: {wrong[0]!r} is none of {', '.join(flame.PROMPTS)}")
    return [n for n in flame.PROMPTS if n in names]  # in the store's order


def opened(out, settings, overwrite):
    """How many rows of the store at `out` are done already; None if all. Makes the folder; refuses another run's store."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in ("meta.json", "journal.json", "embeddings.npy", "keys.txt", "images.txt"):  # the finished mark first
                (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise flame.InputError(f"{out}: {e.strerror}; choose another --out") from None
    for name in ("meta.json", "journal.json"):
        if (path := out / name).exists():
            old = json.loads(path.read_text())
            old = old if name == "meta.json" else old["settings"] | {"done": old["done"]}
            for what, new in settings.items():
                was = old.get(what)
                if what == "captions":
                    was, new = was["sha256"], new["sha256"]  # the same file elsewhere is the same file
                if what == "llm":
                    was = was | {"name": new["name"]}
                if was != new:
                    raise flame.InputError(f"{path}: this store was made with {what} {was}, now it is {new}; choose another --out, or --overwrite")
            return None if name == "meta.json" else old["done"]
    return 0


def open_vectors(path, shape, fresh):
    try:
        if fresh:
            return np.lib.format.open_memmap(path, "w+", np.float16, shape)
        vectors = np.load(path, mmap_mode="r+")
    except (OSError, ValueError) as e:
        raise flame.InputError(f"{path}: {e}; free space or choose another --out") from None
    if vectors.shape != shape:
        raise flame.InputError(f"{path}: has shape {vectors.shape}, the journal says {shape}; run again with --overwrite")
    return vectors


def write_text(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as e:
        raise flame.InputError(f"{path}: {e.strerror}; free space or choose another --out") from None


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def report_skipped(path, skipped):
    for reason, (count, lines) in skipped.items():
        print(f"{path}: skipped {count} row{'s' * (count > 1)}: {reason} (line {', '.join(map(str, lines))}{', ...' * (count > len(lines))})", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# --draw: one caption's forest and mask as a picture

PALETTE = ("#64748b", "#2563eb", "#dc2626", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#9333ea", "#ea580c", "#0d9488")


def draw(args):
    """Writes a PNG: every token of the caption's forest, segments in colours, and which keys each query sees."""
    from PIL import Image, ImageDraw, ImageFont
    tokenizer = flame.load_tokenizer(args.llm)
    prompts = chosen_prompts(args.prompts or "long")[-1]
    prefixes, suffixes = flame.tokenize(tokenizer, [args.draw], prompts)
    forest = flame.caption_forest(prefixes, suffixes, args.positions)
    T, S = len(forest.tokens), len(forest.lengths)
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
    path = Path(args.out or "forest.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(f"{path}: {T} tokens, {S} segments")


def main():
    parser = argparse.ArgumentParser(description="Stage 1: captions + frozen LLM -> embedding store", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", metavar="FILE", help="TSV with a header among `key image raw short long`, Conceptual Captions TSV, JSON or JSONL")
    parser.add_argument("--llm", metavar="DIR", default=os.environ.get("FLAME_LLM", "data/demo/llm"), help="Hugging Face checkpoint folder (default $FLAME_LLM, else data/demo/llm)")
    parser.add_argument("--out", metavar="DIR", help="the store (default data/embeddings/<captions' name>); with --draw the PNG")
    parser.add_argument("--prompts", help="prompt sets to embed (default raw,short,long; --draw: long)")
    parser.add_argument("--layer", type=int, metavar="N", help="blocks to keep (default: all but the last)")
    parser.add_argument("--positions", choices=("restart", "sequential"), default="restart", help="RoPE positions of the facets (default restart)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the matrix products (default bfloat16 where it is fast)")
    parser.add_argument("--budget", type=int, metavar="TOKENS", help="tokens in one packed row (default 2048 on CPU, 16384 on GPU)")
    parser.add_argument("--overwrite", action="store_true", help="throw away what is at --out and start anew")
    parser.add_argument("--draw", metavar="CAPTION", help="write a picture of this caption's segment forest instead")
    args = parser.parse_args()
    try:
        if args.draw is not None:
            return draw(args)
        if not args.captions:
            raise flame.InputError("--captions FILE is missing; see --help")
        args.dtype = args.dtype or str(flame.default_dtype(args.device)).removeprefix("torch.")
        args.prompts = args.prompts or ",".join(flame.PROMPTS)
        print(f"LLM: {args.llm}")
        embed(args)
    except flame.InputError as e:
        print(f"embed.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("embed.py: interrupted; the same command goes on from the last flush", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
