"""Stage 3: how good is a checkpoint? Recall@K and accuracy, in plain numpy.

    python evaluate.py --bench demo                       # all parts of the demo -> results/demo.json, .png
    python evaluate.py --bench urban1k                    # data/urban1k, by the newest checkpoint
    python evaluate.py --bench long                       # urban1k sharegpt4v dci docci, and their average
    python evaluate.py --bench demo --facets              # and what each facet is worth
    python evaluate.py --captions mine.tsv                # your own pictures, captions -> results/mine.json
    python evaluate.py --compare results/a/urban1k.json results/b/urban1k.json
    python evaluate.py --search "a red kite" --images DIR # any folder, any text -> results/search.png
    python evaluate.py --search --images DIR              # the same as a page that answers
    python evaluate.py --words picture.jpg                # what each patch says, in the LLM's own words

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval
go through the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages
through the one *raw* prompt; of these, only the facets that the checkpoint was trained on are asked. A text
is the mean over facets of unit facet vectors, so that one dot product with a unit image vector is the mean
over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of
everything scores at most chance. What the towers say is kept under <out>/cache, so that the next checkpoint
runs the LLM no more; delete it freely. A pass that is interrupted loses at most its last 4,096 texts.
"""
import argparse
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import flame
from data import benchmarks, files, peer, released
from data.captions import read_table, source_name
from data.checkpoint import newest_checkpoint
from data.command import Parser, number, run, usable_device
from data.pictures import Place, open_picture, reason
from data.show import plots, search, table, words
from data.show.sheet import Shown, draw_sheet
from flame import InputError

SEED = 0                        # of the bootstrap
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)
BLOCK = 1 << 22                 # similarities held at once: 16 MiB, whatever the size of the gallery
BATCH = 64                      # pictures encoded at once: enough to keep a GPU busy, little to hold
PART = 4096                     # texts whose states are kept in one file: of Nemo's long set 0.3 GB
DEMO_TEMPLATE = "{} clip art"   # of the demo's English class names; best of four on its validation split
GALLERY = 24                    # names of unseen objects to choose from: among many more, few are ever right


# ------------------------------------------------------------------------------------------------------------
# 1. Metrics

class Hits(NamedTuple):
    """Which queries were answered, and which of them fail together, as captions of one picture do."""
    hits: np.ndarray    # [Q, 3] bool, within the first 1, 5, 10; or [Q, 1], shares at times
    groups: np.ndarray  # int [Q], below size
    size: int


def checked(name, vectors):
    """float32 [N, D]. Raises InputError for NaN or infinity: every comparison with NaN is silently False."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(f"{name} embeddings: row {bad[0]}: NaN or infinite ({len(bad)} such row(s)); "
                         "the checkpoint is damaged or its training diverged, train it again")
    return vectors


def checked_ids(name, ids, size, limit):
    ids = np.asarray(ids)
    if not size or ids.shape != (size,) or ids.min() < 0 or ids.max() >= limit:
        raise ValueError(f"{name} must be [{size}], at least one, of indices below {limit}")
    return ids


def first_hit_ranks(queries, gallery, query_ids, gallery_ids):
    """Rank of the best-ranked right answer of each query, 0 for the first place.

    queries [Q, D], gallery [G, D], query_ids int [Q], gallery_ids int [G] -> int [Q]. An item is a right
    answer where the ids are equal; a query without any ranks last. Wrong items that score the same as the
    best right one rank before it.
    """
    ranks = np.full(len(queries), len(gallery))
    rows = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), rows):
        # Right answers are read from the same product as the rest: computed apart, rounding alone could break
        # ties.
        scores = queries[start:start + rows] @ gallery.T
        for query, score in enumerate(scores, start):
            right = score[gallery_ids == query_ids[query]]
            if len(right):
                best = right.max()
                ranks[query] = np.count_nonzero(score >= best) - np.count_nonzero(right == best)
    return ranks


def hits_both_ways(text, image, image_of_text):
    """-> {direction: [Hits] within 1, 5, 10, over images}; see retrieval()"""
    text = checked("text", text)
    image = checked("image", image)
    owner = checked_ids("image_of_text", image_of_text, len(text), len(image))
    asked = np.unique(owner)                            # image to text: an image without a text is no query
    text_ranks = first_hit_ranks(text, image, owner, np.arange(len(image)))
    image_ranks = first_hit_ranks(image[asked], text, asked, owner)
    return {"text_to_image": [Hits(text_ranks[:, None] < np.array(RECALL_AT), owner, len(image))],
            "image_to_text": [Hits(image_ranks[:, None] < np.array(RECALL_AT), asked, len(image))]}


def retrieval(text, image, image_of_text):
    """Recall@1, 5, 10, percent -> {"text_to_image": {"R@1", "R@5", "R@10"}, "image_to_text": {...}}

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the
    mean over facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own
    texts counts; an image without a text is in the gallery, but no query. Raises flame.InputError if a value
    is NaN or infinite, ValueError if indices do not fit.
    """
    return means(hits_both_ways(text, image, image_of_text))


def hits_of_classes(image, classes, labels, names=None):
    """-> {"top1", "top5", "mean_per_class": [Hits]}, the last over classes; see classification().

    names, C of them: classes of the very same name have one vector, and no model could tell them apart, so
    that their tie does not count against it: the first one listed ranks first, as argmax has it, and a
    picture of the second is right at top 2 at best.
    """
    image = checked("image", image)
    classes = checked("class", classes)
    labels = checked_ids("labels", labels, len(image), len(classes))
    names = list(names or range(len(classes)))
    first = np.array([names.index(name) for name in names])                     # class of that name
    before = np.array([names[:c].count(name) for c, name in enumerate(names)])  # and how many precede
    ranks = first_hit_ranks(image, classes, first[labels], first) + before[labels]
    right = ranks[:, None] < 1
    per_class = np.array([[right[labels == c].mean()] for c in np.unique(labels)])
    pictures = np.arange(len(image))
    return {"top1": [Hits(right, pictures, len(image))],
            "top5": [Hits(ranks[:, None] < 5, pictures, len(image))],
            "mean_per_class": [Hits(per_class, np.arange(len(per_class)), len(per_class))]}


def classification(image, classes, labels):
    """Zero-shot accuracy, percent: {"top1", "top5", "mean_per_class"}, the last being top-1 averaged over
    classes: the wider interval and for unseen classes the honest one.

    image [M, D], classes [C, D], labels int [M]. Classes without a picture can be guessed, but have no mean
    of their own. Raises as retrieval() does.
    """
    return means(hits_of_classes(image, classes, labels))


def samples(parts, resamples=RESAMPLES):
    """[Hits] of one size -> [1 + resamples, F] percent, averaged over the parts: the mean, and below it the
    means when groups are drawn again, each with all hits that belong to it.

    Row n is of the same draw for all of one size: rows may be averaged and subtracted, what is hard for both
    drops out, and the interval of the result is read off its rows.
    """
    every = []
    for hits, groups, size in parts:
        total = np.stack([np.bincount(groups, column, size) for column in hits.T])
        count = np.bincount(groups, minlength=size)
        rng = np.random.default_rng(SEED)
        rows = [100 * hits.mean(0)]
        for _ in range(resamples):
            times = np.bincount(rng.integers(size, size=size), minlength=size)
            drawn = count @ times
            rows.append(100 * (total @ times) / drawn if drawn else np.full(len(total), np.nan))
        every.append(rows)
    return np.mean(every, axis=0)


def intervals(rows):
    """What samples() gives, or a difference -> [(mean, low, high)] of each column, 95%.

    Draws without any query do not count.
    """
    return list(zip(rows[0].tolist(), *np.nanpercentile(rows[1:], [2.5, 97.5], axis=0).tolist()))


def named(columns):
    """Three columns by their names, {"R@1", "R@5", "R@10"}; of one the value itself."""
    return dict(zip([f"R@{k}" for k in RECALL_AT], columns)) if len(columns) > 1 else columns[0]


def means(scores):
    return {name: named(samples(parts, 0)[0].tolist()) for name, parts in scores.items()}


def with_intervals(scores, kept, path=""):
    """A scorer's result -> the same for the JSON: lists of Hits become percentages, intervals under "ci95".

    kept: {"part/figure": [Hits]}, to be filled with them.
    """
    result = {}
    ci95 = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            value = with_intervals(value, kept, f"{path}{name}/")
        if isinstance(value, list):
            kept[path + name] = value
            columns = intervals(samples(value))
            value = named([mean for mean, _, _ in columns])
            ci95[name] = named([[low, high] for _, low, high in columns])
        result[name] = value
    return result | ({"ci95": ci95} if ci95 else {})


def averaged(scores, ci95):
    """Figures of several benchmarks, {name: percent} or nested, and their intervals -> both of the average.

    The benchmarks share no picture, so that their errors are independent: the average is as far from an end
    of its interval as the root of the sum of their own squared distances, over their number.
    """
    if isinstance(ci95[0], dict):
        pairs = {name: averaged([one[name] for one in scores], [one[name] for one in ci95])
                 for name in ci95[0]}
        return tuple({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    mean = float(np.mean(scores))
    below, above = np.linalg.norm(np.array(ci95) - np.array(scores)[:, None], axis=0) / len(scores)
    return mean, [mean - below, mean + above]


def ablation(facets, image, owner, pool, numbers):
    """Retrieval with some facets only, from one set of embeddings [N, K, D]: the first n of them, all but
    one, one alone. Inference only: the checkpoint stays as trained.

    numbers: which questions of the prompt set the K facets are, counted from 1. -> [{"kind", "facets":
    numbers, recalls, intervals}]
    """
    every = list(range(facets.shape[1]))
    subsets = [("in order", every[:n]) for n in range(1, len(every) + 1)]
    if len(every) > 1:
        subsets += [("all but one", every[:k] + every[k + 1:]) for k in every]
    subsets += [("alone", [k]) for k in every]
    rows = []
    for kind, subset in tqdm(subsets, "facets", unit=" subsets", mininterval=1):
        scores = hits_both_ways(pooled(facets[:, subset], pool), image, owner)
        rows.append({"kind": kind, "facets": [numbers[k] for k in subset], **with_intervals(scores, {})})
    return rows


# ------------------------------------------------------------------------------------------------------------
# 2. Towers, and what they said

class Towers(NamedTuple):
    """What encodes pictures and texts, and where what they said is kept."""
    model: flame.Flame
    encoder: Callable       # () -> flame.TextEncoder, made when it is first called for
    pool: str               # of facets, see pooled()
    device: str
    cache: Path             # a folder
    image_tower: str        # digests of both, for the cache
    text_tower: str


def digest_of(about, tensors={}):
    """Names what is kept by content: settings, weights {name: tensor}, the code that makes it."""
    paths = [flame.__file__, released.__file__, __file__]
    paths += [flame.flame_ext.__file__] if flame.flame_ext else []
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths))
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def cached(towers, about, shape, dtype, make):
    """What make() gave for the same `about` before, an array; made where it is not there, or damaged."""
    path = towers.cache / f"{digest_of(about)}.npy"
    with suppress(Exception):   # numpy raises nearly anything on a damaged file
        array = np.load(path, mmap_mode="r") if path.is_file() else None
        if (array.shape, array.dtype) == (shape, dtype):
            return array
    array = make()
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda temporary: np.save(temporary, array))
    return array


def stamp(place):
    """What a picture's vector is kept under: one that was mended or exchanged is another."""
    about = os.stat(place.path) if os.path.isfile(place.path) else None
    return [os.path.abspath(place.path), *place[1:], about and [about.st_size, about.st_mtime_ns]]


@torch.inference_mode()
def encode_images(towers, places, least=2):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `places` that could be read).

    Where bfloat16 is fast, the tower runs in it. Raises InputError where fewer than `least` can be read.
    """
    model = towers.model
    device = torch.device(towers.device)
    fast = flame.default_dtype(device) == torch.bfloat16
    shape = len(places), model.config["text_dim"]

    def pixels_of(place):
        with suppress(Exception), open_picture(place) as image:     # decoders raise nearly anything
            return model.preprocess(image)

    def make():
        vectors = np.zeros(shape, np.float32)   # zero, no unit vector, where a picture cannot be read
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            coming = pool.map(pixels_of, places[:BATCH])    # begins at once: a batch ahead of the tower
            for start in tqdm(range(0, len(places), BATCH), "images", unit=" batches", mininterval=1):
                loaded = dict(enumerate(coming, start))
                coming = pool.map(pixels_of, places[start + BATCH:start + 2 * BATCH])
                good = {i: pixels for i, pixels in loaded.items() if pixels is not None}
                if good:
                    pixels = torch.stack(list(good.values())).to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                        vectors[list(good)] = model.encode_image(pixels).float().cpu().numpy()
        return vectors

    about = [towers.image_tower, [stamp(place) for place in places]]
    vectors = cached(towers, about, shape, np.float32, make)
    bad = np.flatnonzero(~vectors.any(1))
    said = f"{len(bad)} of {len(places)} pictures cannot be read"
    said += f", the first is {places[bad[0]].path}" if len(bad) else ""
    if len(places) - len(bad) < least:
        raise InputError(f"{said}; at least {least} are needed; {benchmarks.CURE}")
    if len(bad):
        print(f"{said}; they are left out", file=sys.stderr)
    kept = np.delete(np.arange(len(places)), bad)
    return vectors[kept], kept.tolist()


def trained_facets(model, prompts):
    """Which facets of a prompt set the checkpoint was trained on, counted from 0. Raises InputError if none.
    """
    columns = model.config["columns"]
    trained = [k for k in range(len(flame.PROMPTS[prompts].facets)) if f"{prompts}.{k}" in columns]
    if not trained:
        raise InputError(f"the checkpoint was trained on {' '.join(columns)} alone, not on the {prompts} "
                         f"prompts; ask by others: --prompts {columns[0].split('.')[0]}")
    return trained


def pooled(facets, pool="cosine"):
    """[N, K, D] -> [N, D], the text vector that an image's is multiplied with.

    "cosine": the mean of unit facet vectors. "released": as the released code, the mean of facet states as
    they are, normalised.
    """
    mean = facets.mean(1)
    return mean if pool == "cosine" else mean / np.linalg.norm(mean, axis=-1, keepdims=True)


@torch.inference_mode()
def encode_texts(towers, texts, prompts, by_facet=False):
    """-> float32 [N, D], pooled over the facets that were trained; by_facet=True: [N, K, D], not pooled.

    Equal texts are encoded once. The cache has the LLM's states, which outlive the checkpoint, as float16
    unit vectors like a store; where they are pooled as they are, a text's longest has length 1.
    """
    trained = trained_facets(towers.model, prompts)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = list(row_of)
    shape = len(flame.PROMPTS[prompts].facets), towers.model.config["text_dim"]

    def make(some):
        states = np.empty((len(some), *shape), np.float16)
        with tqdm(total=len(some), desc=f"texts ({prompts})", unit=" texts", mininterval=1) as bar:
            for rows, batch in towers.encoder().encode_batches(some, prompts):
                norms = batch.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                norms = norms if towers.pool == "cosine" else norms.amax(1, keepdim=True)
                states[rows] = (batch / norms).half().numpy()
                bar.update(len(rows))
        return states

    vectors = []
    for start in range(0, len(unique), PART):
        some = unique[start:start + PART]
        about = [towers.text_tower, flame.PROMPTS[prompts], towers.pool, some]
        states = cached(towers, about, (len(some), *shape), np.float16, functools.partial(make, some))
        for block in np.array_split(states, 1 + len(states) // 256):    # float32 of all would be gigabytes
            facets = torch.from_numpy(block.astype(np.float32))
            if towers.pool == "cosine":
                facets = towers.model.encode_text(facets.to(towers.device), prompts)
            asked = facets.float().cpu().numpy()[:, trained]
            vectors.append(asked if by_facet else pooled(asked, towers.pool))
    return np.concatenate(vectors)[[row_of[text] for text in texts]]


def encode_classes(towers, names, templates, prompts):
    """Each name in every template, averaged and normalised again -> [C, D]"""
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = encode_texts(towers, filled, prompts)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    mean = vectors.reshape(len(names), len(templates), -1).mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------------------
# 3. Scorers take the towers, the prompt sets to ask by, and what the benchmark's reader returns. They return
# the result, with lists of Hits for its figures, and what is shown of it.

def score_captions(towers, prompts, pictures, languages):
    """Retrieval in each of {language: (texts, image_of_text)} and the plain average; mostly there is one.

    Empty texts are left out, and the texts of pictures that could not be read; pictures without a text stay
    distractors in the gallery.
    """
    image, kept = encode_images(towers, pictures)
    place = {picture: i for i, picture in enumerate(kept)}
    rows = {}
    shown = None
    for language, (texts, image_of_text) in languages.items():
        pairs = [(text, place[i]) for text, i in zip(texts, image_of_text) if text and i in place]
        if len(pairs) < 2:
            raise InputError(f"{language}: {len(pairs)} of {len(texts)} texts have a readable picture, at "
                             f"least 2 are needed; {benchmarks.CURE}")
        asked = [text for text, _ in pairs]
        owner = np.array([picture for _, picture in pairs])
        text = encode_texts(towers, asked, prompts)
        rows[language] = {"n_texts": len(asked), **hits_both_ways(text, image, owner)}
        if shown is None or language == "en":
            gallery = [pictures[i] for i in kept]
            shown = Shown(asked, text, gallery, image, owner, np.arange(len(image)), prompts)
    n_texts = sum(row["n_texts"] for row in rows.values())
    skipped = sum(len(texts) for texts, _ in languages.values()) - n_texts
    if skipped:
        print(f"{skipped} texts are empty or of a picture that cannot be read; left out", file=sys.stderr)
    result = {"n_images": len(image), "skipped_images": len(pictures) - len(image), "prompts": prompts,
              "n_texts": n_texts, "skipped_texts": skipped}
    for way in ("text_to_image", "image_to_text"):
        result[way] = [part for row in rows.values() for part in row[way]]
    result["both_ways"] = result["text_to_image"] + result["image_to_text"]
    return result | ({"languages": rows} if len(rows) > 1 else {}), shown


def score_classes(towers, prompts, pictures, labels, names, templates):
    image, kept = encode_images(towers, pictures)
    classes = encode_classes(towers, names, templates, prompts)
    hits = hits_of_classes(image, classes, np.array(labels)[kept], names)
    skipped = len(pictures) - len(image)
    return {"n_images": len(image), "skipped_images": skipped, "prompts": prompts, "n_classes": len(names),
            "chance": 100 / len(names), **hits}, None


def score_demo(towers, raw, short, long, scenes, captions, objects, names, synonyms):
    """All parts of the demo. Captions are asked by the set they are trained with, reworded ones by short's.

    long, short, raw   retrieval among the scenes with those captions. Raw captions are often equal or fit
                       several scenes; only the scene they were written for counts.
    reworded           the same with captions in words that no training caption has
    seen               single-object pictures among the names of all seen objects, by DEMO_TEMPLATE
    unseen             the same for objects that training never had, in galleries of GALLERY, averaged. They
                       take turns, so that each has some of every kind: related things are listed together.
    multilingual       the pictures of seen objects among the bare names of all seen objects in one language,
                       for each language, and the average. Objects that share a name share a class.
    synonyms           the same among the first and among the second synonyms of all seen objects, averaged
    """
    parts = {}
    sheets = {}
    for kind, prompts in {"long": long, "short": short, "raw": raw, "reworded": short}.items():
        data = {kind: (captions[kind], range(len(scenes)))}
        parts[kind], sheets[kind] = score_captions(towers, prompts, scenes, data)
    split = {place: of for place, _, of in objects}
    things = list(dict.fromkeys(thing for _, thing, of in objects if of == "unseen"))
    count = max(1, len(things) // GALLERY)
    few = {number: {thing: names["en"][thing] for thing in things[number::count]} for number in range(count)}
    for part, of, galleries, template in (
            ("seen", "seen", {"en": names["en"]}, DEMO_TEMPLATE), ("unseen", "unseen", few, DEMO_TEMPLATE),
            ("multilingual", "seen", names, "{}"), ("synonyms", "seen", synonyms, "{}")):
        pictures = [(place, thing) for place, thing, split in objects if split == of]
        parts[part], each = score_names(towers, raw, pictures, galleries, template)
        if part == "multilingual":
            parts[part]["languages"] = each
    return {**parts["long"], "parts": parts}, sheets["long"]    # the headline is the long captions'


def score_names(towers, prompts, pictures, galleries, template):
    """[(picture, thing)] among those things' names, in each of {gallery: {thing: name}} -> the mean over
    them, and the result of each. Intervals are over things: pictures of one thing fail together.
    """
    image, kept = encode_images(towers, [place for place, _ in pictures])
    things = [pictures[i][1] for i in kept]
    every, groups = np.unique(things, return_inverse=True)
    texts = [template.replace("{}", names[thing]) for names in galleries.values() for thing in things
             if names.get(thing)]
    vector_of = dict(zip(texts, encode_texts(towers, texts, prompts)))
    results = {}
    for gallery, names in galleries.items():
        rows = [i for i, thing in enumerate(things) if names.get(thing)]
        choices = sorted({names[things[i]] for i in rows})
        labels = np.array([choices.index(names[things[i]]) for i in rows])
        classes = np.array([vector_of[template.replace("{}", name)] for name in choices])
        ranks = first_hit_ranks(image[rows], classes, labels, np.arange(len(choices)))[:, None]
        hits = {f"top{k}": [Hits(ranks < k, groups[rows], len(every))] for k in (1, 5)}
        results[gallery] = {"n_images": len(rows), "n_classes": len(choices), **hits}
    chance = float(np.mean([100 / result["n_classes"] for result in results.values()]))
    mean = {name: [result[name][0] for result in results.values()] for name in ("top1", "top5")}
    return {"n_images": len(image), "prompts": prompts, "n_classes": len(choices), "chance": chance,
            **mean}, results


class Benchmark(NamedTuple):
    """How --bench NAME is scored; data/benchmarks.py reads it."""
    score: Callable         # of those above
    prompts: str = "long"   # the sets to ask by where --prompts says nothing
    most: int = None        # captions of a picture, its first, that count where not all are asked for
    published: str = ""     # the paper's own figures, by what FLAME was trained on; data/README.md has more


def long_captions(published):
    return Benchmark(score_captions, published=f"R@1 text to image {published}")


OWN = Benchmark(score_captions)
GROUPS = {
    "long": ("urban1k", "sharegpt4v", "dci", "docci"),
    "short": ("coco", "flickr30k"),
    "classification10": ("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "dtd", "pets",
                         "caltech101", "flowers102"),
}
BENCHMARKS = {
    "demo": Benchmark(score_demo, "raw short long"),
    "urban1k": long_captions("66.6 (CC3M), 87.9 (YFCC15M), image to text 65.3, 84.0"),
    "sharegpt4v": long_captions("80.0 (CC3M), 93.2 (YFCC15M), image to text 85.6, 94.1"),
    "dci": long_captions("49.3 (CC3M), 68.1 (YFCC15M), image to text 50.8, 66.1"),
    "docci": long_captions("51.9 (CC3M), 76.2 (YFCC15M), image to text 54.5, 75.8"),
    **dict.fromkeys(GROUPS["short"], Benchmark(score_captions, most=5)),
    "xm3600": Benchmark(score_captions, "raw", 1, "R@1 text to image 49.0, image to text 51.7 (YFCC15M, 36 "
                        "languages, first captions)"),
    **dict.fromkeys(["imagenet", "imagefolder", *GROUPS["classification10"]], Benchmark(score_classes, "raw")),
    "long": OWN,
    "short": OWN,
    "classification10": Benchmark(score_classes, "raw", published="top1 40.3 (CC3M)"),
}


# ------------------------------------------------------------------------------------------------------------
# 4. The command line

def command_line():
    parser = Parser(width=80, usage="evaluate.py --bench NAME | --captions FILE | --compare A B | --search TEXT "
                    "| --words FILE", description="Scores a checkpoint; writes <out>/<bench>.json, .npz and "
                    f".png. NAME: {' '.join(BENCHMARKS)} (data/README.md).")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--bench", choices=BENCHMARKS, metavar="NAME", help="what to score on")
    what("--captions", type=Path, metavar="FILE", help="score on one's own: any file that embed.py reads")
    what("--compare", type=Path, nargs=2, metavar="JSON", help="two results' difference, of the same queries")
    what("--search", metavar="TEXT", nargs="*", help="rank pictures by texts or a picture; without, a page")
    what("--words", type=Path, metavar="FILE", help="the word that each patch of a picture is nearest to")
    add = parser.add_argument
    add("--top", type=number(int, 1), default=10, metavar="N", help="how many --search shows, default 10")
    add("--images", type=Path, metavar="DIR", help="what --search searches; where --captions' pictures lie")
    add("--checkpoint", type=Path, metavar="PATH", help="default: the newest finished one under out/")
    add("--open-clip", metavar="MODEL:WEIGHTS", help="score this open_clip model instead of a checkpoint")
    add("--llm", type=Path, metavar="DIR", help="default: $FLAME_LLM, else the training's")
    add("--data-root", type=Path, metavar="DIR", help="default: data/<bench>; of a group: data")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--split", choices=("test", "val"), default="test", help="choose on val, score test once")
    add("--prompts", choices=flame.PROMPTS, help="default: long for captions, else raw")
    add("--all-captions", action="store_true", help="coco, flickr30k, xm3600: not only the first")
    add("--facets", action="store_true", help="what each facet is worth (retrieval only)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if there is one")
    return parser


def settings(argv):
    """The command line, checked as far as it can be without reading anything. how: a Benchmark"""
    parser = command_line()
    args = parser.parse_args(argv)
    args.how = BENCHMARKS.get(args.bench, OWN)
    if args.search is not None and not args.images:
        parser.error("--search TEXT and --images DIR go together")
    if args.facets and args.how.score == score_classes or args.open_clip and (args.facets or args.words):
        parser.error("--facets needs retrieval, and a checkpoint of FLAME's; so does --words")
    usable_device(args.device)
    args.asked = [args.prompts or prompts for prompts in args.how.prompts.split()]
    return args


def open_towers(args):
    """-> (Towers, the checkpoint's name, its LLM's folder). Raises InputError where checkpoint, LLM and
    settings do not belong together."""
    dtype = flame.default_dtype(args.device)
    cache = args.out / "cache"
    if args.open_clip:      # which needs no LLM
        model = peer.OpenClip(args.open_clip).eval().to(args.device)
        name = digest_of([args.open_clip, dtype], model.state_dict())
        return Towers(model, lambda: model, "cosine", args.device, cache, name, name), args.open_clip, None

    checkpoint = args.checkpoint or newest_checkpoint()
    load = released.load if checkpoint.is_file() else flame.load    # the authors' is one file
    model = load(checkpoint).to(args.device)
    source = model.config["llm"]
    trained_with = source.get("path") or ""
    default = trained_with if os.path.isdir(trained_with) else "data/demo/llm"
    llm = flame.llm_folder(args.llm or os.environ.get("FLAME_LLM") or default)
    fingerprint = flame.llm_fingerprint(llm)
    if source.get("fingerprint") not in (None, fingerprint):    # the authors' says nothing
        raise InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source['name']}) than "
                         f"{llm}; name that one with --llm")

    @functools.cache
    def encoder():      # the one place where the text tower is made, and only if a text is not cached
        tower = released.text_encoder(llm, args.device, dtype, source["layer"], source["positions"])
        if tower.dim != model.config["text_dim"]:
            raise InputError(f"{llm}: its states have {tower.dim} dimensions, {checkpoint} was trained for "
                             f"{model.config['text_dim']}; name the right LLM with --llm")
        return tower

    weights = {name: tensor for name, tensor in model.state_dict().items()
               if name.startswith(("visual.", "mm."))}
    about = {name: value for name, value in model.config.items() if name != "llm"}
    text_tower = digest_of([fingerprint, source["layer"], source["positions"], dtype])
    pool = model.config.get("pool", "cosine")   # the authors' checkpoint says "released"
    image_tower = digest_of([about, dtype], weights)
    return Towers(model, encoder, pool, args.device, cache, image_tower, text_tower), checkpoint, llm


def main(argv=None):
    def body():
        args = settings(argv)
        if args.compare:
            return compare(*args.compare)
        flame.keep_freed_memory()
        names = GROUPS.get(args.bench) or [args.bench] * bool(args.bench)
        # First: a wrong folder is found in a moment.
        data = {name: read(args, name) for name in names}
        if args.captions:
            data = {source_name(args.captions): read(args, None)}
        towers, checkpoint, llm = open_towers(args)
        by = f"LLM {llm}" if llm else "open_clip"
        print(f"checkpoint {checkpoint}   {by}   device {args.device}", flush=True)
        with files.folder(args.out):
            if args.words:
                words.show(args, towers.model, llm)
            elif args.search is not None:
                places = benchmarks.pictures_in(args.images)
                search.search(args, places, towers, encode_images, encode_texts)
            else:
                for prompts in args.asked:      # else found after an hour
                    trained_facets(towers.model, prompts)
                results = {name: evaluate(args, name, towers, checkpoint, each) for name, each in data.items()}
                if args.bench in GROUPS:
                    average(args, checkpoint, results)

    return run("evaluate.py", body, "the same command goes on from what the cache has")


def read(args, name):
    """What is scored: see data/benchmarks.py."""
    if args.captions:
        return benchmarks.own(args.captions, args.images, *args.asked)
    root = args.data_root or Path("data") / name
    if args.data_root and args.bench in GROUPS:
        root = root / name
    return benchmarks.read(name, root, args.split, None if args.all_captions else BENCHMARKS[name].most)


def evaluate(args, name, towers, checkpoint, data):
    """Scores a benchmark; prints the result, writes the JSON and what there is to look at. -> the result"""
    how = OWN if args.captions else BENCHMARKS[name]
    scores, shown = how.score(towers, *args.asked, *data)
    hits = {}
    columns = [one for one in towers.model.config["columns"] if one.split(".")[0] in args.asked]
    result = {"bench": name, "checkpoint": str(checkpoint), "split": args.split, "columns": columns}
    if how.score == score_captions:
        result["captions_per_image"] = "all" if args.all_captions or not how.most else f"first {how.most}"
    result |= with_intervals(scores, hits)
    print("\n".join(table.table(result) + published(how)))
    if args.captions and (trained := count_trained(shown.texts, checkpoint)):
        print(f"{trained} of {len(shown.texts)} texts were trained on", file=sys.stderr)
        result["trained_texts"] = trained
    path = result_path(args, name)
    written = [f"{path}.json", f"{path}.npz"]
    if shown:
        ranks = first_hit_ranks(shown.text, shown.image, shown.text_ids, shown.image_ids)
        written.append(f"{path}.png")
        draw_sheet(shown, ranks, written[-1])
    if args.facets:
        facets = encode_texts(towers, shown.texts, shown.prompts, by_facet=True)
        numbers = [k + 1 for k in trained_facets(towers.model, shown.prompts)]
        result["facets"] = ablation(facets, shown.image, shown.text_ids, towers.pool, numbers)
        print("\n".join(table.facet_table(result["facets"])))
        written.append(f"{path}-facets.png")
        plots.draw_facets(result["facets"], written[-1])
    keep_hits(f"{path}.npz", hits, [name, args.split, data, shown and shown.pictures])
    files.write_json(f"{path}.json", result)
    print("-> " + ", ".join(written))
    return result


def average(args, checkpoint, results):
    """Prints a row for each benchmark of a group and one for all; writes <out>/<group>.json.

    results: {name: what evaluate() returns}
    """
    mean, ci95 = averaged(list(results.values()), [one["ci95"] for one in results.values()])
    result = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split, **mean, "ci95": ci95}
    lines = table.group_table({**results, "average": result})
    print("\n".join([f"{args.bench}: {len(results)} benchmarks", *lines, *published(args.how)]))
    path = f"{result_path(args, args.bench)}.json"
    files.write_json(path, result | {"benchmarks": results})
    print(f"-> {path}")


def result_path(args, name):
    """Where a result goes, without the file's ending."""
    if args.captions and name in BENCHMARKS:    # whose results are not these
        name += "-captions"
    return args.out / (f"{name}-{peer.short_name(args.open_clip)}" if args.open_clip else name)


def published(how):
    """[the line of the paper's own figures], to stand below one's own; [] where there are none."""
    return [f"    published       {how.published}; Cao, Wei, Ma, CVPR 2025"] if how.published else []


def count_trained(texts, checkpoint):
    """How many of the texts training's captions have too; 0 where its store is not there."""
    found = set()
    with suppress(Exception):
        store = json.loads(Path(checkpoint, "config.json").read_text())["store"]["path"]
        for row in read_table(Path(store, "captions.tsv")):
            found.update({row.raw, row.short, row.long}.intersection(texts))
    return sum(text in found for text in texts)


# ------------------------------------------------------------------------------------------------------------
# 5. Two results of the same queries

def keep_hits(path, hits, queries):
    """Writes every query's hits, and a hash of the queries: pictures by the names of their files."""
    def plain(value):
        if isinstance(value, Place):
            return [os.path.basename(value.path), value.offset]
        if isinstance(value, dict):
            return [*value, plain(list(value.values()))]
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    digest = hashlib.sha256(json.dumps(plain(queries)).encode()).hexdigest()
    arrays = {f"{figure} {n} {field}": array for figure, parts in hits.items()
              for n, part in enumerate(parts) for field, array in part._asdict().items()}
    files.write(path, lambda temporary: np.savez_compressed(temporary, queries=digest, **arrays))


def read_hits(path):
    """-> (hash of the queries, {figure: [Hits]})"""
    figures = {}
    with flame.reading(path.with_suffix(".npz"), "score it again") as path, np.load(path) as file:
        names = [name.rsplit(" ", 2) for name in file.files if name.endswith(" hits")]
        for figure, n, _ in names:
            hits = Hits(*(file[f"{figure} {n} {field}"] for field in Hits._fields))
            figures.setdefault(figure, []).append(hits)
        return str(file["queries"]), figures


def compare(path, other):
    """Prints both results and the paired difference of each figure (of Recall@K, R@1), with intervals."""
    queries, figures = read_hits(path)
    other_queries, other_figures = read_hits(other)
    if queries != other_queries:
        raise InputError(f"{path} and {other}: of other queries; score both on the same texts and pictures")
    print(f"{'':38}{str(path):26}{str(other):26}difference")
    for figure, parts in figures.items():
        rows, other_rows = samples(parts), samples(other_figures[figure])
        three = [intervals(some)[0] for some in (rows, other_rows, rows - other_rows)]
        print(f"{figure:36}" + "".join("{:7.1f} [{:5.1f}, {:5.1f}]   ".format(*each) for each in three))


if __name__ == "__main__":
    sys.exit(main())
