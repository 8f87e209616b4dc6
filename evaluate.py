"""Stage 3: how good is a checkpoint? Recall@K and accuracy, in plain numpy.

    python evaluate.py --bench demo                       # all parts of the demo -> results/demo.json, .png
    python evaluate.py --bench urban1k                    # data/urban1k, by the newest checkpoint
    python evaluate.py --bench long                       # urban1k sharegpt4v dci docci, and their average
    python evaluate.py --bench demo --facets --report     # and what each facet is worth; a page to look at
    python evaluate.py --captions mine.tsv                # your own pictures, captions -> results/mine.json
    python evaluate.py --report results                   # all that lies there -> results/report.html
    python evaluate.py --search "a red kite" --images DIR # any folder, any text -> results/search.png
    python evaluate.py --words picture.jpg                # what each patch says, in the LLM's own words

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval
go through the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages
through the one *raw* prompt; of these, only the facets that the checkpoint was trained on are asked. A text
is the mean over facets of unit facet vectors, so that one dot product with a unit image vector is the mean
over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of
everything scores at most chance. What the towers say is kept in <out>/cache.sqlite, so that a second run
takes seconds; delete it freely.
"""
import argparse
import functools
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flame
from data import benchmarks, cache, files, leaks, peer, released
from data.captions import source_name
from data.checkpoint import newest_checkpoint
from data.command import Parser, number, run, usable_device
from data.show import report, runs, search, words
from flame import InputError

SEED = 0                        # of the bootstrap and of the linear probe
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)
BLOCK = 1 << 22                 # similarities held at once: 16 MiB, whatever the size of the gallery
BATCH = 64                      # pictures encoded at once: enough to keep a GPU busy, little to hold
DEMO_TEMPLATE = "{} clip art"   # of the demo's English class names; best of four on its validation split
GALLERY = 24                    # names of unseen objects to choose from: among many more, few are ever right


# ------------------------------------------------------------------------------------------------------------
# 1. Metrics

def checked(name, vectors):
    """float32 [N, D]. Raises InputError for NaN or infinity: every comparison with NaN is silently False."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{name} embeddings must be [N, D], not {list(vectors.shape)}")
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


def bootstrap(hits, groups, size, resamples=RESAMPLES):
    """Hits [N, F] of groups int [N] below size -> [resamples, F]: the means, in percent, when groups are
    drawn again.

    A group is drawn with all hits that belong to it: five captions of one picture succeed or fail together.
    """
    total = np.stack([np.bincount(groups, column, size) for column in hits.T])
    count = np.bincount(groups, minlength=size)
    rng = np.random.default_rng(SEED)
    means = np.empty((resamples, len(total)))
    for n in range(resamples):
        times = np.bincount(rng.integers(size, size=size), minlength=size)
        drawn = count @ times
        means[n] = 100 * (total @ times) / drawn if drawn else np.nan
    return means


def bounds(means):
    """[resamples, F] -> [[low, high]] that hold 95%, F of them. Resamples without any query do not count."""
    return np.nanpercentile(means, [2.5, 97.5], axis=0).T.tolist()


def sampled(hits, groups, size, resamples=RESAMPLES):
    """The means of hits in percent, and below them those of bootstrap() -> [1 + resamples, F].

    Row n of two such arrays is of the same draw of the groups: arrays may be averaged or subtracted, and the
    result's interval is read off its rows.
    """
    return np.concatenate([100 * hits.mean(0, keepdims=True), bootstrap(hits, groups, size, resamples)])


def figures(names, samples):
    """What sampled() gives -> {name: percent}; where there are resamples, "ci95": {name: [low, high]}, and
    "samples": {name: column}, what another run of the same groups is compared by."""
    result = dict(zip(names, samples[0].tolist()))
    if len(samples) > 1:
        result["ci95"] = dict(zip(names, bounds(samples[1:])))
        result["samples"] = dict(zip(names, samples.T))
    return result


def difference(samples, other):
    """Columns of two runs' samples of the same groups -> [the first's mean less the second's, low, high].

    Paired, as both met the same draws: what is hard for both drops out, and the interval is narrower.
    """
    apart = (samples - other)[:, None]
    return [float(apart[0, 0]), *bounds(apart[1:])[0]]


def sampled_both_ways(text, image, image_of_text, resamples=RESAMPLES):
    """-> {direction: samples [1 + resamples, 3] of Recall@1, 5, 10, over images}; see retrieval()."""
    text = checked("text", text)
    image = checked("image", image)
    owner = checked_ids("image_of_text", image_of_text, len(text), len(image))
    asked = np.unique(owner)                            # image to text: an image without a text is no query
    there = first_hit_ranks(text, image, owner, np.arange(len(image)))[:, None] < np.array(RECALL_AT)
    back = first_hit_ranks(image[asked], text, asked, owner)[:, None] < np.array(RECALL_AT)
    return {"text_to_image": sampled(there, owner, len(image), resamples),
            "image_to_text": sampled(back, asked, len(image), resamples)}


def recalls(samples):
    """{direction: samples} -> {direction: {"R@1", "R@5", "R@10"}}, "ci95" and "samples" alike"""
    names = [f"R@{k}" for k in RECALL_AT]
    result = {way: figures(names, own) for way, own in samples.items()}
    for key in ("ci95", "samples"):
        own = {way: result[way].pop(key) for way in samples if key in result[way]}
        result |= {key: own} if own else {}
    return result


def retrieval(text, image, image_of_text, ci95=False):
    """Recall@1, 5, 10 both ways, percent.

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the
    mean over facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own
    texts counts; an image without a text is in the gallery, but no query. ci95=True adds the intervals, over
    images, under that key, and the "samples" that they are of. Raises flame.InputError if a value is NaN or
    infinite, ValueError if shapes or indices do not fit.
    """
    return recalls(sampled_both_ways(text, image, image_of_text, RESAMPLES if ci95 else 0))


def classification(image, classes, labels, ci95=False, names=None):
    """Zero-shot accuracy, percent: {"top1", "top5", "mean_per_class"}, the last being top-1 averaged over
    classes.

    image [M, D], classes [C, D], labels int [M]. Classes without a picture can be guessed, but have no mean
    of their own. names, C of them: classes of the very same name have one vector, and no model could tell
    them apart, so that their tie does not count against it: the first one listed ranks first, as argmax has
    it, and a picture of the second is right at top 2 at best. ci95=True adds intervals under that key: over
    pictures for top1 and top5, over classes for mean_per_class (the wider and for unseen classes the honest
    one, as pictures of one object succeed and fail together).

    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    image = checked("image", image)
    classes = checked("class", classes)
    labels = checked_ids("labels", labels, len(image), len(classes))
    names = list(names or range(len(classes)))
    first = np.array([names.index(name) for name in names])                     # class of that name
    before = np.array([names[:c].count(name) for c, name in enumerate(names)])  # and how many precede
    ranks = first_hit_ranks(image, classes, first[labels], first) + before[labels]
    hits = ranks[:, None] < np.array([1, 5])
    per_class = np.array([[hits[labels == c, 0].mean()] for c in np.unique(labels)])
    resamples = RESAMPLES if ci95 else 0
    samples = [sampled(each, np.arange(len(each)), len(each), resamples) for each in (hits, per_class)]
    return figures(["top1", "top5", "mean_per_class"], np.hstack(samples))


def confusions(image, classes, labels, names, most=20):
    """The most frequent wrong guesses -> [{"true", "guess", "count", "of": pictures of the true class}]"""
    blocks = np.array_split(image, 1 + len(image) * len(classes) // BLOCK)
    guesses = np.concatenate([(block @ classes.T).argmax(1) for block in blocks])
    of = Counter(labels.tolist())
    found = []
    for (true, guess), count in Counter(zip(labels.tolist(), guesses.tolist())).most_common():
        if true != guess:
            found.append({"true": names[true], "guess": names[guess], "count": count, "of": of[true]})
    return found[:most]


def ablation(facets, image, owner, pool, first=1, last=None, numbers=None):
    """Retrieval with some facets only, from one set of embeddings [N, K, D]: the first n of them, all but
    one, one alone.

    first, last: sizes of the first kind, last=None is K. numbers: which questions of the prompt set the K
    facets are, counted from 1. Inference only: the checkpoint stays as trained. -> [{"kind", "facets":
    numbers, recalls, intervals}]
    """
    K = facets.shape[1]
    numbers = numbers or range(1, K + 1)
    every = list(range(K))[:last]
    subsets = [("in order", every[:n]) for n in range(min(first, len(every)), len(every) + 1)]
    if len(every) > 1:
        subsets += [("all but one", every[:k] + every[k + 1:]) for k in every]
    subsets += [("alone", [k]) for k in every]
    rows = []
    for kind, subset in tqdm(subsets, "facets", unit=" subsets", mininterval=1):
        scores = retrieval(pooled(facets[:, subset], pool), image, owner, ci95=True)
        del scores["samples"]
        rows.append({"kind": kind, "facets": [numbers[k] for k in subset], **scores})
    return rows


def averaged(scores, ci95):
    """Figures of several benchmarks, {name: percent} or nested, and their intervals -> both of the average.

    The benchmarks share no picture, so that their errors are independent: the average is as far from an end
    of its interval as the root of the sum of their own squared distances, over their number.
    """
    if isinstance(ci95[0], dict):
        means = {}
        ends = {}
        for name in ci95[0]:
            means[name], ends[name] = averaged([own[name] for own in scores], [own[name] for own in ci95])
        return means, ends
    mean = float(np.mean(scores))
    below, above = np.linalg.norm(np.array(ci95) - np.array(scores)[:, None], axis=0) / len(scores)
    return mean, [mean - below, mean + above]


# ------------------------------------------------------------------------------------------------------------
# 2. Embeddings

class Towers(NamedTuple):
    """What encodes pictures and texts, and where what they said is kept."""
    model: flame.Flame
    encoder: Callable       # () -> flame.TextEncoder, made when it is first called for
    pool: str               # of facets, see pooled()
    device: str
    cached: Any             # data/cache.py: a Cache, or a dict
    image_tower: str        # names of both towers in the cache
    text_tower: str


def trained_facets(model, prompts):
    """Which facets of a prompt set the checkpoint was trained on, counted from 0."""
    every = range(len(flame.PROMPTS[prompts].facets))
    return [k for k in every if f"{prompts}.{k}" in model.config["columns"]]


def enough(usable, given, what, least=2, first=""):
    if len(usable) < least:
        counts = f"{first}{len(usable)} of {len(given)}"
        raise InputError(f"{counts} {what}, at least {least} are needed; {benchmarks.CURE}")


def one_ahead(pool, function, batches):
    """Yields each batch's results, while the pool's threads are at work on the next."""
    waiting = None
    for batch in [*batches, []]:
        following = pool.map(function, batch)   # begins at once
        if waiting:
            yield list(waiting)
        waiting = following


@torch.inference_mode()
def encode_images(towers, pictures, patches=False, least=2):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `pictures` that could be read).

    patches=True gives what a linear probe reads instead: the mean over patch tokens before projector and
    norm. Where bfloat16 is fast, the tower runs in it.
    """
    model = towers.model
    size = 4 * model.config["width" if patches else "text_dim"]
    tower = towers.image_tower + "-patches" * patches
    keys = [cache.picture_key(tower, picture) for picture in pictures]
    kind = torch.device(towers.device).type
    fast = flame.default_dtype(towers.device) == torch.bfloat16
    bad = {}

    def read_picture(i):
        try:
            with report.open_picture(pictures[i]) as image:
                return model.preprocess(image)
        except Exception as error:  # decoders raise nearly anything on a stranger's bytes
            bad[i] = report.reason(pictures[i], error)

    def encode(todo):
        batches = [todo[at:at + BATCH] for at in range(0, len(todo), BATCH)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch, loaded in zip(batches, one_ahead(pool, read_picture, batches)):
                good = [i for i in batch if i not in bad]
                if good:
                    pixels = torch.stack([x for x in loaded if x is not None]).to(towers.device)
                    with torch.autocast(kind, torch.bfloat16, enabled=fast):
                        x = model.visual(pixels)[:, 1:].mean(1) if patches else model.encode_image(pixels)
                    yield good, [vector.tobytes() for vector in x.float().cpu().numpy()]

    blobs = cache.recall(towers.cached, keys, size, encode, desc="images", unit=" images")
    kept = [i for i, blob in enumerate(blobs) if blob]
    enough(kept, pictures, "pictures can be read", least, f"{bad[min(bad)]}; " if bad else "")
    if bad:
        left_out = f"{len(bad)} of {len(pictures)} pictures cannot be read and are left out"
        print(f"{left_out}; the first: {bad[min(bad)]}", file=sys.stderr)
    return np.stack([np.frombuffer(blobs[i], np.float32) for i in kept]), kept


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

    Equal texts are encoded once. The cache has the LLM's states: they outlive the checkpoint.
    """
    if not texts:
        raise InputError(f"no text is left to ask for; {benchmarks.CURE}")
    trained = trained_facets(towers.model, prompts)
    if not trained:     # of what is typed no earlier check could know
        columns = " ".join(towers.model.config["columns"])
        raise InputError(f"the checkpoint was trained on {columns} alone, not on the {prompts} prompts; "
                         f"ask by others: --prompts {columns.split('.')[0]}")
    prompt_set = flame.PROMPTS[prompts]
    facets = len(prompt_set.facets)
    size = cache.states_size(facets, towers.model.config["text_dim"])
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = list(row_of)
    keys = [cache.text_key(towers.text_tower, prompt_set, text) for text in unique]

    def encode(todo):
        for rows, states in towers.encoder().encode_batches([unique[i] for i in todo], prompts):
            yield [todo[row] for row in rows], [cache.pack_states(own) for own in states]

    blobs = cache.recall(towers.cached, keys, size, encode, desc=f"texts ({prompts})", unit=" texts")
    vectors = []
    for at in range(0, len(blobs), 256):    # of a large LLM, all states in float32 would be many gigabytes
        states = cache.unpack_states(blobs[at:at + 256], facets)
        if towers.pool == "cosine":
            states = towers.model.encode_text(states.to(towers.device), prompts)
        asked = states.float().cpu().numpy()[:, trained]
        vectors.append(asked if by_facet else pooled(asked, towers.pool))
    return np.concatenate(vectors)[[row_of[text] for text in texts]]


def encode_classes(names, templates, embed_texts, prompts="raw"):
    """Each name in every template, embed_texts(texts, prompts), averaged and normalised again -> [C, D]"""
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_texts(filled, prompts)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    mean = vectors.reshape(len(names), len(templates), -1).mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def linear_probe(train, train_labels, test, n_classes, device="cpu", lr=0.1, epochs=20, batch=512):
    """Scores float32 [M, C] of a linear classifier on frozen features [N, D], [M, D].

    AdamW without weight decay on unit features, cosine schedule without warm-up.
    """
    x = F.normalize(torch.from_numpy(train).to(device), dim=-1)
    y = torch.as_tensor(train_labels, device=device)
    probe = torch.nn.Linear(x.shape[1], n_classes, device=device)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    generator = torch.Generator().manual_seed(SEED)
    for _ in tqdm(range(epochs), "probe", unit=" epochs", mininterval=1):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(probe(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        return probe(F.normalize(torch.from_numpy(test).to(device), dim=-1)).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# 3. Benchmarks. A scorer takes the towers, the prompt sets to ask by, and what the benchmark's reader
# returns. It returns the result as it goes into the JSON, and what is shown of it.

def counted(pictures, image, prompts, **more):
    """What all results begin with. image: vectors of those pictures that could be read."""
    skipped = len(pictures) - len(image)
    return {"n_images": len(image), "skipped_images": skipped, "prompts": prompts, **more}


def ask(towers, prompts, pictures, image, kept, texts, image_of_text, language=""):
    """Retrieval among pictures that are encoded already -> ({direction: samples}, report.Shown).

    image, kept: of encode_images. Empty texts are left out, and the texts of pictures that could not be read;
    pictures without a text stay distractors in the gallery.
    """
    place = {picture: i for i, picture in enumerate(kept)}
    pairs = [(text, place[i]) for text, i in zip(texts, image_of_text) if text and i in place]
    enough(pairs, texts, "texts have a readable picture", first=language)
    empty = sum(not text for text in texts)
    if empty:
        print(f"{empty} of {len(texts)} texts are missing or empty and are left out", file=sys.stderr)
    texts = [text for text, _ in pairs]
    owner = np.array([picture for _, picture in pairs])
    text = encode_texts(towers, texts, prompts)
    gallery = [pictures[i] for i in kept]
    shown = report.Shown(texts, text, gallery, image, owner, np.arange(len(image)), prompts)
    return sampled_both_ways(text, image, owner), shown


def score_retrieval(towers, prompts, pictures, texts, image_of_text):
    image, kept = encode_images(towers, pictures)
    samples, shown = ask(towers, prompts, pictures, image, kept, texts, image_of_text)
    samples["both_ways"] = np.mean(list(samples.values()), axis=0)
    asked = len(shown.texts)
    result = counted(pictures, image, prompts, n_texts=asked, skipped_texts=len(texts) - asked)
    return result | recalls(samples), shown


def score_multilingual(towers, prompts, pictures, languages):
    """Retrieval in each language and the plain average over languages."""
    image, kept = encode_images(towers, pictures)
    samples = []
    sheets = {}
    rows = {}
    for language, data in languages.items():
        own, sheets[language] = ask(towers, prompts, pictures, image, kept, *data, f"{language}: ")
        rows[language] = {"n_texts": len(sheets[language].texts), **recalls(own)}
        samples.append(own)
    asked = sum(row["n_texts"] for row in rows.values())
    mean = {way: np.mean([own[way] for own in samples], axis=0) for way in samples[0]}
    result = counted(pictures, image, prompts, n_texts=asked, languages=rows)
    return result | recalls(mean), sheets.get("en") or next(iter(sheets.values()))


def score_among(image, classes, labels, names, same_vector=True):
    """Pictures among C classes. same_vector: classes of one name have one vector, see classification()."""
    return {
        "n_images": len(image),
        "n_classes": len(names),
        "n_sharing_a_name": sum(n for n in Counter(names).values() if n > 1),
        "chance": 100 / len(names),
        **classification(image, classes, labels, ci95=True, names=names if same_vector else None),
        "confusions": confusions(image, classes, labels, names),
    }


def score_classification(towers, prompts, pictures, labels, names, templates):
    image, kept = encode_images(towers, pictures)
    labels = np.array(labels)[kept]
    classes = encode_classes(names, templates, functools.partial(encode_texts, towers), prompts)
    result = counted(pictures, image, prompts) | score_among(image, classes, labels, names)
    # What is shown asks for a class and shows the pictures found for it, the other way round than the score.
    present = np.unique(labels)
    texts = [templates[0].replace("{}", names[c]) for c in present]
    gallery = [pictures[i] for i in kept], image, present, labels
    return result, report.Shown(texts, classes[present], *gallery, prompts, len(templates))


def score_probe(towers, test, train):
    """A linear classifier on what the image tower says before the projector: no text, no LLM."""
    pictures, labels, names, _ = test
    train_pictures, train_labels, train_names, _ = train
    if train_names != names:
        counts = f"{len(train_names)} and {len(names)}"
        raise InputError(f"training and test split have different classes ({counts}); {benchmarks.CURE}")
    x, x_kept = encode_images(towers, train_pictures, patches=True)
    features, kept = encode_images(towers, pictures, patches=True)
    scores = linear_probe(x, np.array(train_labels)[x_kept], features, len(names), towers.device)
    # A class's score is one dot product more: with the class's unit vector.
    result = score_among(scores, np.eye(len(names)), np.array(labels)[kept], names, same_vector=False)
    skipped = len(train_pictures) - len(x) + len(pictures) - len(features)
    return {**result, "n_train": len(x), "skipped_images": skipped}, None


def score_composition(towers, prompts, pictures, texts, parts):
    """How often the right pairs of picture and text score higher than the wrong ones, in each part, and the
    average.

    A row with a picture that cannot be read or an empty text is left out.
    """
    image, kept = encode_images(towers, pictures)
    filled = [i for i, text in enumerate(texts) if text]
    text = encode_texts(towers, [texts[i] for i in filled], prompts)
    image_of = dict(zip(kept, image))
    text_of = dict(zip(filled, text))

    def score(pair):
        picture, text = pair
        return image_of[picture] @ text_of[text] if picture in image_of and text in text_of else np.nan

    result = counted(pictures, image, prompts, n_texts=len(text), parts={})
    samples = []
    for part, rows in parts.items():
        races = [[(score(right), score(wrong)) for right, wrong in races] for _, races in rows]
        usable = [n for n, race in enumerate(races) if np.isfinite(race).all()]
        enough(usable, rows, f"rows of {part} have readable pictures and texts")
        races = np.array([races[n] for n in usable])    # [rows, comparisons, 2]
        hits = (races[..., 0] > races[..., 1]).all(1, keepdims=True)
        samples.append(sampled(hits, [rows[n][0] for n in usable], len(pictures)))
        result["parts"][part] = {
            "n_rows": len(usable),
            "skipped_rows": len(rows) - len(usable),
            "chance": {1: 50, 2: 25, 4: 100 / 6}[races.shape[1]],   # by the number of comparisons to win
            **figures(["accuracy"], samples[-1]),
        }
    if all(part["chance"] == 50 for part in result["parts"].values()):  # of unlike scores no average
        result |= {**figures(["accuracy"], np.mean(samples, axis=0)), "chance": 50}
    return result, None


def score_demo(towers, raw, short, long, scenes, captions, objects, names, synonyms):
    """All parts of the demo. Captions are asked by the set they are trained with, reworded ones by short's.

    long, short, raw   retrieval among the scenes with those captions. Raw captions are often equal or fit
                       several scenes; only the scene they were written for counts.
    reworded           the same with captions in words that no training caption has
    seen               single-object pictures among the names of all seen objects, by DEMO_TEMPLATE
    unseen             the same for objects that training never had, in galleries of GALLERY, averaged
    multilingual       the pictures of seen objects among the bare names of all seen objects in one language,
                       for each language, and the average. Objects that share a name share a class.
    synonyms           the same among the first and among the second synonyms of all seen objects, averaged
    """
    parts = {}
    sheets = {}
    for kind, prompts in {"long": long, "short": short, "raw": raw, "reworded": short}.items():
        scored = score_retrieval(towers, prompts, scenes, captions[kind], range(len(scenes)))
        parts[kind], sheets[kind] = scored
    seen = objects_of_split(towers, objects, "seen")
    unseen = objects_of_split(towers, objects, "unseen")
    parts["seen"], _ = score_names(towers, raw, *seen, names["en"], DEMO_TEMPLATE)
    parts["unseen"] = score_galleries(towers, raw, *unseen, galleries_of(unseen[1], names["en"]),
                                      DEMO_TEMPLATE)
    parts["multilingual"] = score_galleries(towers, raw, *seen, names)
    parts["synonyms"] = score_galleries(towers, raw, *seen, synonyms)
    parts["multilingual"]["languages"] = parts["multilingual"].pop("galleries")
    for part in ("unseen", "synonyms"):
        parts[part]["n_classes"] = parts[part].pop("galleries").popitem()[1]["n_classes"]
    return {**parts["long"], "parts": parts}, sheets["long"]    # the headline is the long captions'


def objects_of_split(towers, objects, split):
    """-> (vectors of the split's pictures that can be read, the object of each)"""
    own = [(path, thing) for path, thing, its in objects if its == split]
    image, kept = encode_images(towers, [path for path, _ in own])
    return image, [own[i][1] for i in kept]


def galleries_of(things, names):
    """Things in the order of their pictures, {thing: name} -> {number: {thing: name}}, about GALLERY in each.

    They take turns, so that every gallery has some of each kind, as related things are listed together.
    """
    every = list(dict.fromkeys(things))
    count = max(1, len(every) // GALLERY)
    return {number: {thing: names[thing] for thing in every[number::count]} for number in range(count)}


def score_names(towers, prompts, image, things, names, template="{}"):
    """Pictures of things among those things' names, {thing: name} -> (result, samples of top1 and top5).

    Intervals are over things: pictures of one thing succeed and fail together.
    """
    rows = [i for i, thing in enumerate(things) if names.get(thing)]
    own = [names[things[i]] for i in rows]
    choices = sorted(set(own))
    if len(choices) < 2:
        raise InputError(f"names.tsv gives {len(choices)} names to {len(image)} readable pictures of "
                         "objects.tsv; run data/demo.py again")
    labels = np.array([choices.index(name) for name in own])
    classes = encode_texts(towers, [template.replace("{}", name) for name in choices], prompts)
    ranks = first_hit_ranks(image[rows], classes, labels, np.arange(len(choices)))
    every, number = np.unique(things, return_inverse=True)
    samples = sampled(ranks[:, None] < np.array([1, 5]), number[rows], len(every))
    result = {"n_images": len(rows), "n_classes": len(choices), "chance": 100 / len(choices)}
    result |= {**figures(["top1", "top5"], samples), "prompts": prompts}
    return {**result, "confusions": confusions(image[rows], classes, labels, choices)}, samples


def score_galleries(towers, prompts, image, things, galleries, template="{}"):
    """The same in each of {gallery: {thing: name}}, for instance languages, and the mean over them."""
    every = [own[thing] for own in galleries.values() for thing in things if own.get(thing)]
    # all at once: from here on they come from the cache
    encode_texts(towers, [template.replace("{}", name) for name in every], prompts)
    results = {}
    samples = []
    for gallery, own in galleries.items():
        results[gallery], sample = score_names(towers, prompts, image, things, own, template)
        del results[gallery]["confusions"]
        samples.append(sample)
    chance = float(np.mean([result["chance"] for result in results.values()]))
    mean = figures(["top1", "top5"], np.mean(samples, axis=0))
    return {"n_images": len(image), "prompts": prompts, "galleries": results, "chance": chance, **mean}


class Benchmark(NamedTuple):
    """How --bench NAME, or a group of them, is scored. Its reader has its name, in data/benchmarks.py."""
    score: Callable         # of those above
    prompts: str = "long"   # the sets to ask by where --prompts says nothing
    most: int = None        # captions of a picture, its first, that count where not all are asked for
    split: str = None       # what there is to score beside test
    published: str = ""     # the paper's own figures, by what FLAME was trained on; data/README.md has more
    members: tuple = ()     # of a group: scored one after the other, all asked by the same prompt set


def long_captions(published):
    return Benchmark(score_retrieval, published=f"R@1 text to image {published}")


SHORT = Benchmark(score_retrieval, most=5, split="val")
CLASSES = Benchmark(score_classification, "raw")
SUN397 = CLASSES._replace(split="all")
TEN = ("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "dtd", "pets", "caltech101",
       "flowers102")    # of the paper's average

BENCHMARKS = {
    "demo": Benchmark(score_demo, "raw short long", split="val"),
    "urban1k": long_captions("66.6 (CC3M), 87.9 (YFCC15M), image to text 65.3, 84.0"),
    "sharegpt4v": long_captions("80.0 (CC3M), 93.2 (YFCC15M), image to text 85.6, 94.1"),
    "dci": long_captions("49.3 (CC3M), 68.1 (YFCC15M), image to text 50.8, 66.1"),
    "docci": long_captions("51.9 (CC3M), 76.2 (YFCC15M), image to text 54.5, 75.8"),
    "coco": SHORT,
    "flickr30k": SHORT,
    "xm3600": Benchmark(score_multilingual, "raw", 1, None, "R@1 text to image 49.0, image to text 51.7 "
                        "(YFCC15M, 36 languages, first captions)"),
    "sugarcrepe": Benchmark(score_composition),
    "winoground": Benchmark(score_composition),
    "imagenet": CLASSES,
    **dict.fromkeys(TEN, CLASSES),
    "sun397": SUN397,
    "fashionmnist": CLASSES,
    "imagefolder": CLASSES,
}
GROUPS = {
    "long": Benchmark(score_retrieval, members=("urban1k", "sharegpt4v", "dci", "docci")),
    "short": SHORT._replace(members=("coco", "flickr30k")),
    "classification10": SUN397._replace(
        members=TEN, published="top1 40.3 (CC3M, all of SUN397's pictures: --split all)"),
}
OTHERS = {      # what the other commands ask by
    "captions": Benchmark(score_retrieval),
    "search": Benchmark(search.search, "raw"),
    "words": Benchmark(words.show, ""),
}
OF_CAPTIONS = (score_retrieval, score_multilingual)     # their readers are told how many captions count

# Flags that not every scorer knows: the scorers that do, and what is said of another.
NO_CLASSES = "{} has no classes; leave the flag out"
FLAGS = {
    "facets": ((score_retrieval, score_demo), "1..K or a range like 2..5, and a retrieval benchmark"),
    "probe": ((score_classification,), NO_CLASSES),
    "classes": ((score_classification,), NO_CLASSES),
    "language": ((score_classification, score_multilingual), "{} has one language; leave the flag out"),
    "report": ([row.score for row in BENCHMARKS.values()], "{} writes no page; leave the flag out"),
}


def read(args, split):
    """What the benchmark's reader returns; with names and templates, in the languages asked for."""
    scorer = args.how.score
    root = args.data_root
    if args.captions:
        return benchmarks.own(args.captions, args.images, *args.asked)
    if scorer in (score_retrieval, score_classification) and any((root / split).glob("*.tar")):
        found = benchmarks.webdataset(root, split, args.how.most)
        if isinstance(found[2], dict) != (scorer is score_classification):
            raise InputError(f"{root}: dataset_type.txt says what {args.bench} is not; {benchmarks.CURE}")
    else:
        more = [args.how.most] if scorer in OF_CAPTIONS else []
        found = getattr(benchmarks, args.bench)(root, split, *more)
    enough(found[0], found[0], f"pictures are of split {split} in {root}")
    if scorer is score_multilingual:
        return benchmarks.in_languages(*found, args.language, root)
    if scorer is score_classification:      # a file named by the user overrules those in data/classes
        class_files = benchmarks.class_files(args.bench, root, args.language)
        return benchmarks.with_names(*found, class_files + [args.classes] * bool(args.classes))
    return found


# ------------------------------------------------------------------------------------------------------------
# 4. The command line

def sizes(text):
    """"1..K" or "2..5" -> (first, last), the sizes of subsets of facets; None for K."""
    found = re.fullmatch(r"([1-9])\.\.([1-9K])", text)
    if not found or found[1] > found[2]:
        raise argparse.ArgumentTypeError(f"1..K or a range like 2..5, not {text!r}")
    return int(found[1]), None if found[2] == "K" else int(found[2])


def command_line():
    usage = "evaluate.py --bench NAME | --captions FILE | --search TEXT | --words FILE"
    parser = Parser(width=80, usage=usage,
                    description="Scores a checkpoint; writes <out>/<bench>.json and .png. "
                                f"NAME: {' '.join(BENCHMARKS)}; groups: {' '.join(GROUPS)} "
                                "(data/README.md).")
    add = parser.add_argument
    add("--bench", choices=[*BENCHMARKS, *GROUPS], metavar="NAME", help="what to score on")
    add("--captions", type=Path, metavar="FILE", help="score on one's own: any file that embed.py reads")
    add("--search", metavar="TEXT", nargs="*",
        help="rank pictures by texts or a picture; without, asks")
    add("--top", type=number(int, 1), default=10, metavar="N", help="how many --search shows, default 10")
    add("--images", type=Path, metavar="DIR", help="what --search searches; where --captions' pictures lie")
    add("--words", type=Path, metavar="FILE", help="the word that each patch of a picture is nearest to")
    add("--checkpoint", type=Path, metavar="PATH", help="default: the newest finished one under out/")
    add("--open-clip", metavar="MODEL:WEIGHTS", help="score this open_clip model instead of a checkpoint")
    add("--llm", type=Path, metavar="DIR", help="default: $FLAME_LLM, else the training's")
    add("--data-root", type=Path, metavar="DIR", help="default: data/<bench>; of a group: data")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--split", choices=["test", "val", "all"], default="test",
        help="choose on val, score test once; all: sun397")
    add("--prompts", choices=flame.PROMPTS, help="default: long for captions, else raw")
    add("--language", metavar="CODE", help="of imagenet's names; of xm3600, comma between")
    add("--all-captions", action="store_true", help="coco, flickr30k, xm3600: not only the first")
    add("--classes", type=Path, metavar="FILE", help="class names, templates; see data/classes")
    add("--probe", action="store_true", help="linear probe in place of zero-shot")
    add("--facets", nargs="?", const="1..K", type=sizes, metavar="1..K",
        help="what each facet is worth (retrieval only)")
    add("--report", nargs="?", const=True, type=Path, metavar="DIR",
        help="also a page to look at; alone: of all results in DIR")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if there is one")
    return parser


def settings(argv):
    """The command line, checked as far as it can be without reading anything.

    Beside the flags: how, a Benchmark; asked, the prompt sets; folder, whose results alone are wanted.
    """
    parser = command_line()
    args = parser.parse_args(argv)
    wanted = [name for name in ("bench", *OTHERS) if getattr(args, name) is not None]
    args.folder = None if wanted else args.out if args.report is True else args.report
    if args.folder:
        for name in vars(args):
            own = name in ("report", "folder") or name == "out" and args.report is True
            if not own and getattr(args, name) != parser.get_default(name):
                flag = name.replace("_", "-")
                parser.error(f"--report alone makes a page of all results; leave --{flag} out")
        return args
    if args.report not in (None, True):
        parser.error("--report DIR is the page of what was scored before; leave DIR or the other flag out")
    if len(wanted) != 1:
        parser.error("give --bench NAME, or --captions FILE, or --search TEXT, or --words IMAGE")
    searching = args.search is not None
    if searching != bool(args.images) and not args.captions:
        parser.error("--search TEXT and --images DIR go together")
    if "" in map(str.strip, args.search or []):
        parser.error("--search: a text is empty")
    if args.top != parser.get_default("top") and not searching:
        parser.error("--top: how many pictures --search shows; leave the flag out")
    if args.data_root and not args.bench:
        parser.error("--data-root: where a benchmark lies; leave the flag out")
    args.how = OTHERS.get(wanted[0]) or (BENCHMARKS | GROUPS)[args.bench]
    if args.captions:
        args.bench = source_name(args.captions)
    name = args.bench or f"--{wanted[0]}"
    if args.all_captions and not args.how.most:
        parser.error(f"--all-captions: {name} leaves no caption out; leave the flag out")
    if args.split not in ("test", args.how.split):
        parser.error(f"--split {args.split}: {name} has no such split; leave the flag out")
    if args.probe and args.split == "all":
        parser.error("--probe: it would train on pictures that --split all scores; leave one of them out")
    for flag, (scorers, otherwise) in FLAGS.items():
        if getattr(args, flag) and args.how.score not in scorers:
            parser.error(f"--{flag}: {otherwise.format(name)}")
    if args.open_clip and (args.probe or args.words or args.facets or args.checkpoint or args.llm):
        parser.error("--open-clip has no facets, patches, checkpoint or LLM of FLAME's; leave the other out")
    if args.prompts and (args.probe or args.words):
        parser.error("--prompts: no text is asked; leave the flag out")
    usable_device(args.device)
    if args.all_captions:
        args.how = args.how._replace(most=None)
    args.data_root = args.data_root or Path("data") / ("" if args.how.members else name)
    args.asked = [args.prompts or prompts for prompts in args.how.prompts.split() if not args.probe]
    if searching:
        texts = [query for query in args.search if not os.path.isfile(query)]  # a picture is asked nothing
        args.asked = [search.prompts_of(args, text) for text in texts]
    return args


def one_by_one(args):
    """The settings of each benchmark of a group as if it were named alone; without a group [args].

    A split that only some of them have is theirs alone. Raises InputError that names all missing folders.
    """
    every = []
    for bench in args.how.members:
        how = BENCHMARKS[bench]._replace(most=args.how.most)
        split = args.split if args.split == how.split else "test"
        own = {"bench": bench, "how": how, "split": split, "data_root": args.data_root / bench}
        every.append(argparse.Namespace(**vars(args) | own))
    missing = [str(one.data_root) for one in every if not one.data_root.exists()]
    if missing:
        raise InputError(f"--bench {args.bench}: not found: {', '.join(missing)}; {benchmarks.CURE}")
    return every or [args]


def check_prompts(args, model, checkpoint):
    """Says which facets are asked, where not all of a prompt set were trained; refuses one that never was."""
    for prompts in sorted(set(args.asked)):
        trained = trained_facets(model, prompts)
        count = len(flame.PROMPTS[prompts].facets)
        if not trained:
            columns = model.config["columns"]
            other = columns[0].split(".")[0]
            raise InputError(f"{args.bench or '--search'} asks by the {prompts} prompts, but {checkpoint} "
                             f"was trained on {' '.join(columns)} alone; ask by others: --prompts {other}")
        if len(trained) < count:
            names = ", ".join(report.facet_names()[k] for k in trained)
            print(f"trained on {len(trained)} of {count} facets of the {prompts} prompts, "
                  f"asked by them alone: {names}")


def find_llm(trained_with):
    """The LLM's folder where none is named. trained_with: where stage 1 found it, or None."""
    if "FLAME_LLM" not in os.environ and trained_with and Path(trained_with).is_dir():
        return Path(trained_with)
    return Path(os.environ.get("FLAME_LLM") or "data/demo/llm")


def open_towers(args):
    """-> (Towers, the checkpoint's name, its LLM's folder). Raises InputError where checkpoint, LLM and
    settings do not belong together."""
    dtype = flame.default_dtype(args.device)
    cached = cache.Cache(args.out / "cache.sqlite")
    if args.open_clip:      # which needs no LLM
        model = peer.OpenClip(args.open_clip).eval().to(args.device)
        name = model.digest() + str(dtype)
        return Towers(model, lambda: model, "cosine", args.device, cached, name, name), args.open_clip, None

    checkpoint = args.checkpoint or newest_checkpoint()
    load = released.load if checkpoint.is_file() else flame.load    # the authors' is one file
    model = load(checkpoint).to(args.device)
    source = model.config["llm"]
    llm = flame.llm_folder(args.llm or find_llm(source.get("path")))
    fingerprint = None if args.probe else flame.llm_fingerprint(llm)    # a probe asks no text
    if not args.probe and source.get("fingerprint") not in (None, fingerprint):  # the authors' says nothing
        raise InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source['name']}) than "
                         f"{llm}; name that one with --llm")
    check_prompts(args, model, checkpoint)

    @functools.cache
    def encoder():      # the one place where the text tower is made, and only if a text is not cached
        tower = released.text_encoder(llm, args.device, dtype, source["layer"], source["positions"])
        if tower.dim != model.config["text_dim"]:
            raise InputError(f"{llm}: its states have {tower.dim} dimensions, {checkpoint} was trained for "
                             f"{model.config['text_dim']}; name the right LLM with --llm")
        return tower

    pool = model.config.get("pool", "cosine")   # the authors' checkpoint says "released"
    image_tower = cache.image_tower_name(model, dtype)
    text_tower = f"{fingerprint} {source['layer']} {source['positions']} {dtype}"
    return Towers(model, encoder, pool, args.device, cached, image_tower, text_tower), checkpoint, llm


def main(argv=None):
    def body():
        args = settings(argv)
        if args.folder:
            return print(f"-> {runs.write_page(args.folder, difference)}")
        flame.keep_freed_memory()
        # First: a wrong folder is found in a moment.
        every = one_by_one(args)
        data = [read(one, one.split) if args.bench else None for one in every]
        train = [read(one, "train") if args.probe else None for one in every]
        pictures = None if args.search is None else search.pictures_under(args.images)
        towers, checkpoint, llm = open_towers(args)
        pictures_in = args.captions or args.images or args.words or args.data_root
        by = f"LLM {llm}" if llm else "open_clip"
        print(f"{pictures_in}   checkpoint {checkpoint}   {by}   device {args.device}", flush=True)
        with files.folder(args.out):
            if args.words:
                words.show(args, towers.model, llm)
            elif pictures:
                search.search(args, pictures, towers, encode_images, encode_texts)
            else:
                results = [evaluate(one, towers, checkpoint, *own) for one, *own in zip(every, data, train)]
                if args.how.members:
                    average(args, checkpoint, dict(zip(args.how.members, results)))

    return run("evaluate.py", body, "the same command goes on from what the cache has")


def evaluate(args, towers, checkpoint, data, train):
    """Scores a benchmark; prints the result, writes the JSON and what there is to look at. -> the result"""
    result = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split}
    if args.how.score in OF_CAPTIONS:
        result["captions_per_image"] = f"first {args.how.most}" if args.how.most else "all"
    if args.probe:
        scores, shown = score_probe(towers, data, train)
    else:
        scores, shown = args.how.score(towers, *args.asked, *data)
        columns = [] if args.open_clip else towers.model.config["columns"]
        result["columns"] = [name for name in columns if name.split(".")[0] in args.asked]
        if towers.pool != "cosine":
            result["pool"] = towers.pool
    result |= scores
    print("\n".join(report.table(result) + published(args)))
    if args.captions:
        result |= leaks.count_leaks(*data[:2], checkpoint)
    if args.facets:
        facets = encode_texts(towers, shown.texts, shown.prompts, by_facet=True)
        numbers = [k + 1 for k in trained_facets(towers.model, shown.prompts)]
        result["facets"] = ablation(facets, shown.image, shown.text_ids, towers.pool, *args.facets, numbers)
        print("\n".join(report.facet_table(result["facets"])))
    path = result_path(args)
    ranks = shown and first_hit_ranks(shown.text, shown.image, shown.text_ids, shown.image_ids)
    earlier = runs.read_runs(one for one in args.out.glob("*.json") if one.name.startswith(args.bench))
    runs.keep(f"{path}.npz", result, data, shown, ranks)
    files.write_json(f"{path}.json", result)
    for line in runs.difference_table(Path(f"{path}.json"), earlier, difference):
        print(line)
    by_name = functools.partial(facets_by_name, towers) if args.report else None
    drawn = report.write(path, result, shown, ranks, by_name)
    print("-> " + ", ".join([f"{path}.json", f"{path}.npz", *drawn]))
    return result


def average(args, checkpoint, results):
    """Prints a row for each benchmark of a group and one for all; writes <out>/<group>.json.

    results: {name: what evaluate() returns}
    """
    mean, ci95 = averaged(list(results.values()), [own["ci95"] for own in results.values()])
    scores = {**mean, "ci95": ci95}
    lines = [f"{args.bench}: {len(results)} benchmarks"]
    for name, row in {**results, "average": scores}.items():
        line = report.both_recalls(row, "R@1 ") if "text_to_image" in row else report.cells(row, mean)
        lines.append(f"    {name:16}{line}")
    print("\n".join(lines + published(args)))
    result = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split, **scores}
    if args.probe:
        result["n_train"] = sum(row["n_train"] for row in results.values())
    result["benchmarks"] = results
    path = result_path(args)
    files.write_json(f"{path}.json", result)
    print(f"-> {path}.json")


def result_path(args):
    """Where a result goes, without the file's ending."""
    towers = f"-{peer.short_name(args.open_clip)}" if args.open_clip else "-probe" * args.probe
    namesake = args.captions and args.bench in BENCHMARKS | GROUPS  # whose results are not these
    return args.out / f"{args.bench}{'-captions' if namesake else ''}{towers}"


def published(args):
    """[the line of the paper's own figures], to stand below one's own; [] where there are none."""
    if args.probe or not args.how.published:
        return []
    return [f"    published       {args.how.published}; Cao, Wei, Ma, CVPR 2025"]


def facets_by_name(towers, texts, prompts):
    """[{facet's name: vector [D]}] of texts."""
    vectors = encode_texts(towers, texts, prompts, by_facet=True)
    names = [report.facet_names()[k] for k in trained_facets(towers.model, prompts)]
    return [dict(zip(names, vector)) for vector in vectors]


if __name__ == "__main__":
    sys.exit(main())
