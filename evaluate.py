"""Stage 3: how good is a checkpoint? Recall@K and zero-shot accuracy, in plain numpy.

    python evaluate.py --bench demo          # all parts of the demo         -> results/demo.json, results/demo.png
    python evaluate.py --bench urban1k       # data/urban1k, newest checkpoint -> results/urban1k.json, results/urban1k.png
    python evaluate.py --bench imagefolder --data-root pictures --checkpoint out/demo --llm data/demo/llm

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval go through
the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages through the one *raw*
prompt. A text is the mean over facets of unit facet vectors, so that one dot product with a unit image vector is the mean
over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of everything
scores at most chance.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import flame
from data import benchmarks

SEED = 0                # of the bootstrap and of the queries shown on the contact sheet
RESAMPLES = 1000
DEMO_TEMPLATE = "{} clip art"   # of the demo's English class names; best of four on its validation split, as it names the medium
BLOCK = 1 << 24         # similarities held at once: 64 MiB of float32, whatever the size of the gallery


# ---------------------------------------------------------------- metrics

def checked(name, vectors):
    """float32 [N, D]; flame.InputError if a value is NaN or infinite: every comparison with NaN is silently False."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{name} embeddings must be [N, D], not {list(vectors.shape)}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise flame.InputError(f"{name} embeddings: row {bad[0]}: NaN or infinite ({len(bad)} such row(s)); "
                               "the checkpoint is damaged or its training diverged, train it again")
    return vectors


def first_hit_ranks(queries, gallery, query_ids, gallery_ids):
    """Rank of the best-ranked right answer of each query, 0 for the first place.

    queries [Q, D], gallery [G, D], query_ids int [Q], gallery_ids int [G] -> int [Q]. An item is a right answer where the
    ids are equal; a query without any ranks last. Wrong items that score the same as the best right one rank before it.
    """
    ranks = np.empty(len(queries), np.int64)
    rows = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), rows):
        # Right answers are read from the same product as the rest: computed apart, rounding alone could break ties.
        score = queries[start:start + rows] @ gallery.T
        right = query_ids[start:start + rows, None] == gallery_ids[None, :]
        best = np.max(score, axis=1, where=right, initial=-np.inf, keepdims=True)
        ranks[start:start + rows] = np.count_nonzero((score >= best) & ~right, axis=1)
    return ranks


def interval(hits, groups=None):
    """95% bootstrap interval of the mean of hits [N], in percent -> [low, high].

    groups int [N]: what is resampled, with all hits that belong to it; five captions of a picture are no five
    independent queries. None resamples the hits themselves.
    """
    groups = np.arange(len(hits)) if groups is None else np.unique(groups, return_inverse=True)[1]
    total, count = np.bincount(groups, weights=hits), np.bincount(groups)
    rng, means = np.random.default_rng(SEED), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(total), size=len(total))
        means[i] = total[drawn].sum() / count[drawn].sum()
    return (100 * np.percentile(means, [2.5, 97.5])).tolist()


def recalls(ranks):
    return {f"R@{k}": 100 * float(np.mean(ranks < k)) for k in (1, 5, 10)}


def retrieval(text, image, image_of_text, ci95=False):
    """Recall@1, 5, 10 both ways, percent.

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the mean over
    facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own texts counts; an
    image without a text is in the gallery, but no query. ci95=True adds the intervals, over images, under that key.
    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    text, image, owner = checked("text", text), checked("image", image), np.asarray(image_of_text)
    if not len(text) or owner.shape != (len(text),) or owner.min() < 0 or owner.max() >= len(image):
        raise ValueError(f"image_of_text must be [{len(text)}], at least one, of indices below {len(image)}")
    asked = np.unique(owner)
    ranks = {"text_to_image": first_hit_ranks(text, image, owner, np.arange(len(image))),
             "image_to_text": first_hit_ranks(image[asked], text, asked, owner)}
    result = {direction: recalls(r) for direction, r in ranks.items()}
    if ci95:
        groups = {"text_to_image": owner, "image_to_text": asked}
        result["ci95"] = {direction: {f"R@{k}": interval(r < k, groups[direction]) for k in (1, 5, 10)}
                          for direction, r in ranks.items()}
    return result


def classification(image, classes, labels, ci95=False):
    """Zero-shot accuracy, percent: {"top1", "top5", "mean_per_class"}, the last being top-1 averaged over classes.

    image [M, D], classes [C, D], labels int [M]. Classes without a picture can be guessed, but have no mean of their own.
    ci95=True adds intervals under that key: over pictures for top1 and top5, over classes for mean_per_class (the wider
    and for unseen classes the honest one, as pictures of one object succeed and fail together).
    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    image, classes, labels = checked("image", image), checked("class", classes), np.asarray(labels)
    if not len(image) or labels.shape != (len(image),) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels must be [{len(image)}], at least one, of indices below {len(classes)}")
    ranks = first_hit_ranks(image, classes, labels, np.arange(len(classes)))
    top1, top5 = ranks < 1, ranks < 5
    present, index = np.unique(labels, return_inverse=True)
    per_class = np.bincount(index, weights=top1) / np.bincount(index)
    result = {"top1": 100 * float(top1.mean()), "top5": 100 * float(top5.mean()), "mean_per_class": 100 * float(per_class.mean())}
    if ci95:
        result["ci95"] = {"top1": interval(top1), "top5": interval(top5), "mean_per_class": interval(per_class)}
    return result


# ---------------------------------------------------------------- embeddings

def encode_images(model, paths, device, batch_size):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `paths` that could be read)."""
    def read(path):
        try:
            with Image.open(path) as image:
                return model.preprocess(image), None
        except Exception as error:  # decoders raise nearly anything on a stranger's bytes
            return None, " ".join(f"{path}: {error or type(error).__name__}".split())

    vectors, kept, bad = [], [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, torch.inference_mode():
        for start in tqdm(range(0, len(paths), batch_size), "images", unit="batch", mininterval=1):
            batch = list(pool.map(read, paths[start:start + batch_size]))
            kept += [start + i for i, (pixels, _) in enumerate(batch) if pixels is not None]
            bad += [reason for pixels, reason in batch if pixels is None]
            good = [pixels for pixels, _ in batch if pixels is not None]
            if good:
                vectors.append(model.encode_image(torch.stack(good).to(device)).float().cpu().numpy())
    if bad:
        print(f"{len(bad)} of {len(paths)} pictures cannot be read and are left out; the first: {bad[0]}", file=sys.stderr)
    if len(kept) < 2:
        raise flame.InputError(f"{len(kept)} of {len(paths)} pictures can be read, at least 2 are needed; {benchmarks.CURE}")
    return np.concatenate(vectors), kept


def encode_texts(model, encoder, texts, prompts, device):
    """-> float32 [N, D], the mean over a prompt set's facets of unit vectors. Equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    out = None
    with torch.inference_mode(), tqdm(total=len(unique), desc=f"texts ({prompts})", unit="text", mininterval=1) as bar:
        for rows, facets in encoder.encode_batches(unique, prompts):
            mean = model.encode_text(facets.to(device), prompts).mean(1).float().cpu().numpy()   # [n, K, D] -> [n, D]
            out = np.empty((len(unique), mean.shape[1]), np.float32) if out is None else out
            out[rows] = mean
            bar.update(len(rows))
    row = {text: i for i, text in enumerate(unique)}
    return out[[row[text] for text in texts]]


def encode_classes(names, templates, embed_texts):
    """Each name in every template, each through the raw prompt; unit vectors averaged and normalised again -> [C, D]."""
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_texts(filled, "raw").reshape(len(names), len(templates), -1)
    mean = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


# ---------------------------------------------------------------- benchmarks
# Each takes embed_images(paths) -> (vectors, kept) and embed_texts(texts, prompts) -> vectors, and returns the result
# as it goes into the JSON and what the contact sheet shows: (captions, text, image, paths, text_ids, image_ids).

def readable_pairs(texts, image_of_text, kept):
    """Leaves out empty texts and the texts of pictures that could not be read, whatever their place.

    kept: indices of the readable pictures, in the order of their embeddings
    -> (texts, index into kept of each one's picture). Pictures without a text stay distractors in the gallery.
    """
    place = {image: i for i, image in enumerate(kept)}
    pairs = [(text, place[image]) for text, image in zip(texts, image_of_text) if text and image in place]
    if len(pairs) < 2:
        raise flame.InputError(f"{len(pairs)} of {len(texts)} texts have a readable picture, at least 2 are needed; "
                               f"{benchmarks.CURE}")
    empty = sum(not text for text in texts)
    if empty:
        print(f"{empty} of {len(texts)} texts are missing or empty and are left out", file=sys.stderr)
    return [text for text, _ in pairs], np.array([image for _, image in pairs])


def run_retrieval(images, texts, image_of_text, embed_images, embed_texts):
    image, kept = embed_images(images)
    texts_kept, owner = readable_pairs(texts, image_of_text, kept)
    text = embed_texts(texts_kept, "long")
    result = {"n_images": len(image), "n_texts": len(text), "skipped_images": len(images) - len(image),
              "skipped_texts": len(texts) - len(text), "prompts": "long", **retrieval(text, image, owner, ci95=True)}
    return result, (texts_kept, text, image, [images[i] for i in kept], owner, np.arange(len(image)))


def run_multilingual(images, languages, embed_images, embed_texts):
    """Retrieval in each language, by the raw prompt, and the plain average over languages."""
    image, kept = embed_images(images)
    parts = {}
    for language, (texts, image_of_text) in languages.items():
        texts_kept, owner = readable_pairs(texts, image_of_text, kept)
        text = embed_texts(texts_kept, "raw")
        parts[language] = {"n_texts": len(text), **retrieval(text, image, owner, ci95=True)}
        if language == "en" or len(parts) == 1:
            sheet = texts_kept, text, image, [images[i] for i in kept], owner, np.arange(len(image))
    average = {direction: {k: float(np.mean([part[direction][k] for part in parts.values()])) for k in ("R@1", "R@5", "R@10")}
               for direction in ("text_to_image", "image_to_text")}
    return {"n_images": len(image), "n_texts": sum(part["n_texts"] for part in parts.values()), "prompts": "raw",
            "skipped_images": len(images) - len(image), **average, "languages": parts}, sheet


def run_classification(images, labels, names, templates, embed_images, embed_texts):
    image, kept = embed_images(images)
    labels = np.array(labels)[kept]
    classes = encode_classes(names, templates, embed_texts)
    result = {"n_images": len(image), "n_classes": len(names), "skipped_images": len(images) - len(image), "prompts": "raw",
              "chance": 100 / len(names), **classification(image, classes, labels, ci95=True)}
    # The sheet asks for a class and shows the pictures found for it, the other way round than the score.
    present = np.unique(labels)
    return result, ([names[c] for c in present], classes[present], image, [images[i] for i in kept], present, labels)


def run_demo(scenes, captions, objects, names, embed_images, embed_texts):
    """All parts of the demo.

    long, short, raw   retrieval among the scenes with those captions (long and short ones by the long prompt set). Raw
                       captions are often equal or fit several scenes; only the scene they were written for counts.
    seen, unseen       single-object pictures among all seen, among all unseen objects alone, by DEMO_TEMPLATE in English
    multilingual       the pictures of seen objects among the bare names of all seen objects in one language, top-1, for each
                       language, and the average over languages. Objects that share a name in a language share a class.
    """
    image, kept = embed_images(scenes)
    parts = {}
    for column, prompts in (("long", "long"), ("short", "long"), ("raw", "raw")):
        texts, owner = readable_pairs(captions[column], range(len(scenes)), kept)
        text = embed_texts(texts, prompts)
        parts[column] = {"n_images": len(image), "n_texts": len(text), "skipped_images": len(scenes) - len(image),
                         "prompts": prompts, **retrieval(text, image, owner, ci95=True)}
        if column == "long":
            sheet = texts, text, image, [scenes[i] for i in kept], owner, np.arange(len(image))

    image, kept = embed_images([path for path, _, _ in objects])
    shown = [objects[i] for i in kept]
    members = {split: sorted({name for _, name, s in objects if s == split}) for split in ("seen", "unseen")}
    wanted = {(language, name): table[name] for language, table in names.items() for name in members["seen"] if table.get(name)}
    wanted |= {("template", name): DEMO_TEMPLATE.replace("{}", names["en"][name]) for name in members["seen"] + members["unseen"]}
    vectors = dict(zip(wanted, embed_texts(list(wanted.values()), "raw")))

    def among_names(split, language):
        """(result, hit [n] and picture [n]): pictures of a split's objects among those objects' names in a language."""
        named = [name for name in members[split] if (language, name) in vectors]
        choices = sorted({wanted[language, name] for name in named})
        classes = {wanted[language, name]: vectors[language, name] for name in named}
        rows = [i for i, (_, name, _) in enumerate(shown) if name in named]
        if not rows or len(choices) < 2:
            raise flame.InputError(f"objects.tsv and names.tsv give {len(rows)} readable pictures and {len(choices)} names "
                                   f"for {split} objects in {language!r}; run data/demo.py again")
        labels = np.array([choices.index(wanted[language, shown[i][1]]) for i in rows])
        matrix = np.stack([classes[choice] for choice in choices])
        hit = first_hit_ranks(image[rows], matrix, labels, np.arange(len(choices))) == 0
        result = {"n_images": len(rows), "n_classes": len(choices), "chance": 100 / len(choices), "prompts": "raw",
                  **classification(image[rows], matrix, labels, ci95=True)}
        return result, hit, rows

    parts["seen"], parts["unseen"] = among_names("seen", "template")[0], among_names("unseen", "template")[0]
    scored = {language: among_names("seen", language) for language in names}
    hit = np.concatenate([hit for _, hit, _ in scored.values()])
    picture = np.concatenate([rows for _, _, rows in scored.values()])
    languages = {language: result for language, (result, _, _) in scored.items()}
    parts["multilingual"] = {"n_images": parts["seen"]["n_images"], "prompts": "raw", "languages": languages,
                             "chance": float(np.mean([result["chance"] for result in languages.values()])),
                             "top1": float(np.mean([result["top1"] for result in languages.values()])),
                             "ci95": {"top1": interval(hit, picture)}}
    return {**parts["long"], "parts": parts}, sheet     # the headline is the long captions', as in other retrieval files


# ---------------------------------------------------------------- output

def write(path, save):
    """save(temporary path), then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table(result):
    """The numbers of a result, part by part, as lines of text: value and 95% interval, percent."""
    def cells(part, *keys):
        bounds = part.get("ci95", {})
        for key in keys[:-1]:
            part, bounds = part[key], bounds.get(key, {})
        low_high = bounds.get(keys[-1])
        return f"{part[keys[-1]]:5.1f}" + (" [{:5.1f}, {:5.1f}]".format(*low_high) if low_high else " " * 15)

    lines = []
    for name, part in result.get("parts", {result["bench"]: result}).items():
        if "text_to_image" in part:
            lines.append(f"{name}: {part['n_texts']} texts, {part['n_images']} pictures, chance R@1 {100 / part['n_images']:.1f}")
            for direction in ("text_to_image", "image_to_text"):
                lines.append(f"    {direction.replace('_', ' '):14}" + "   ".join(f"{k} {cells(part, direction, k)}" for k in part[direction]))
        else:
            choices = f"{part['n_classes']} names" if "n_classes" in part else f"{len(part['languages'])} languages"
            lines.append(f"{name}: {part['n_images']} pictures, {choices}, chance {part['chance']:.1f}")
            lines.append("    " + "   ".join(f"{k} {cells(part, k)}" for k in ("top1", "top5", "mean_per_class") if k in part))
        for language, row in part.get("languages", {}).items():
            lines.append(f"    {language:8}" + (f"top1 {cells(row, 'top1')} among {row['n_classes']}" if "top1" in row else
                         f"text to image R@1 {cells(row, 'text_to_image', 'R@1')}   image to text R@1 {cells(row, 'image_to_text', 'R@1')}"))
    return lines


def wrapped(text, font, width):
    """Lines of words no wider than `width` pixels, as far as single words allow."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw_sheet(path, captions, text, image, image_paths, text_ids, image_ids, queries=8, found=5, side=128):
    """Contact sheet: queries drawn at random, the pictures found for each, best first; green frame right, red wrong."""
    drawn = np.sort(np.random.default_rng(SEED).permutation(len(captions))[:queries])
    ranks = first_hit_ranks(text[drawn], image, text_ids[drawn], image_ids)
    font, heading = ImageFont.load_default(14), ImageFont.load_default(15)
    margin, gap, width, line = 16, 10, 420, 18
    rows = []
    for query, rank in zip(drawn, ranks):
        lines = wrapped(captions[query], font, width - 2 * margin)
        lines = lines if len(lines) <= 14 else lines[:13] + [lines[13] + " …"]
        best = np.argsort(-(image @ text[query]), kind="stable")[:found]
        rows.append((lines, rank, best, image_ids[best] == text_ids[query], max(side + 12, line * (len(lines) + 2)) + 14))
    columns = min(found, len(image))
    size = 2 * margin + width + columns * (side + gap + 12), 2 * margin + sum(row[-1] for row in rows)
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for lines, rank, best, right, height in rows:
        rank_line = f"the right picture is number {rank + 1} of {len(image)}"
        draw.text((margin, top), rank_line, "#00803c" if rank == 0 else "#b00020", heading)
        draw.multiline_text((margin, top + line + 4), "\n".join(lines), "#202020", font, spacing=line - 14)
        for column, (index, good) in enumerate(zip(best, right)):
            left = margin + width + column * (side + gap + 12)
            draw.rectangle((left, top, left + side + 11, top + side + 11), fill="#00a850" if good else "#d83040")
            with Image.open(image_paths[index]) as picture:
                tile = ImageOps.pad(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC, "white")
            sheet.paste(tile, (left + 6, top + 6))
        top += height
    write(path, sheet.save)


# ---------------------------------------------------------------- command line

def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. flame.InputError if there is none."""
    finished = [path.parent for path in folder.glob("*/config.json") if (path.parent / "model.safetensors").exists()]
    if not finished:
        raise flame.InputError(f"{folder}: no finished checkpoint; run train.py, or name one with --checkpoint")
    return max(finished, key=lambda path: (path / "model.safetensors").stat().st_mtime)


def main(argv=None):
    known = ["demo", *benchmarks.RETRIEVAL, *benchmarks.MULTILINGUAL, *benchmarks.CLASSIFICATION]
    parser = argparse.ArgumentParser(description="Scores a checkpoint on a benchmark; writes <out>/<bench>.json and .png. "
                                                 "data/README.md says how each benchmark must lie.")
    parser.add_argument("--bench", required=True, choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the newest finished one under out/")
    parser.add_argument("--llm", type=Path, metavar="DIR", help="default: $FLAME_LLM, else data/demo/llm")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="default: data/<bench>")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="choose settings on val, score test once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at once, default 64")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("--batch-size: at least 1")
    try:
        evaluate(args)
    except flame.InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def evaluate(args):
    if args.split == "val" and args.bench not in benchmarks.HAS_VAL:
        raise flame.InputError(f"--split val: {args.bench} has only a test split; leave the flag out")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise flame.InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    root = args.data_root or Path("data") / args.bench
    data = getattr(benchmarks, args.bench)(root, args.split)    # first, as a wrong folder is found in a moment
    checkpoint = args.checkpoint or newest_checkpoint()
    llm = args.llm or Path(os.environ.get("FLAME_LLM") or "data/demo/llm")
    print(f"bench {args.bench} in {root}   checkpoint {checkpoint}   LLM {llm}   device {args.device}", flush=True)

    model = flame.load(checkpoint).to(args.device)
    source = model.config["llm"]
    if flame.llm_fingerprint(llm) != source["fingerprint"]:
        raise flame.InputError(f"{checkpoint / 'config.json'}: the checkpoint was trained with another LLM ({source['name']}) "
                               f"than {llm}; name that one with --llm")
    encoder = flame.TextEncoder(llm, args.device, flame.default_dtype(args.device), source["layer"], source["positions"])
    embed_images = lambda paths: encode_images(model, paths, args.device, args.batch_size)
    embed_texts = lambda texts, prompts: encode_texts(model, encoder, texts, prompts, args.device)
    run = (run_demo if args.bench == "demo" else run_retrieval if args.bench in benchmarks.RETRIEVAL
           else run_multilingual if args.bench in benchmarks.MULTILINGUAL else run_classification)
    result, sheet = run(*data, embed_images, embed_texts)
    result = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split, **result}

    args.out.mkdir(parents=True, exist_ok=True)
    print("\n".join(table(result)))
    write(args.out / f"{args.bench}.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    draw_sheet(args.out / f"{args.bench}.png", *sheet)
    print(f"-> {args.out / args.bench}.json, {args.out / args.bench}.png")


if __name__ == "__main__":
    sys.exit(main())
