"""Stage 3: how good is a checkpoint? Recall@K and accuracy, in plain numpy.

    python evaluate.py --bench demo             # all parts of the demo           -> results/demo.json, results/demo.png
    python evaluate.py --bench urban1k          # data/urban1k, newest checkpoint -> results/urban1k.json, results/urban1k.png
    python evaluate.py --bench demo --facets --report     # and what each facet is worth; one page to look at
    python evaluate.py --search "a red kite" --images pictures        # any folder, any text -> results/search.png
    python evaluate.py --words picture.jpg      # what each patch says, in the LLM's own words -> results/words.png

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval go through
the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages through the one *raw*
prompt; of these, only the facets that the checkpoint was trained on are asked. A text is the mean over facets of unit facet
vectors, so that one dot product with a unit image vector is the mean over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of everything
scores at most chance. What the towers say is kept in <out>/cache.sqlite, so that a second run takes seconds; delete it freely.
"""
import argparse
import functools
import json
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
from data import benchmarks, cache, files
from data.command import Parser, number, run, usable_device
from data.show import plots, report, search, words

SEED = 0                        # of the bootstrap, of the linear probe and of the queries shown
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)
BLOCK = 1 << 22                 # similarities held at once: 16 MiB of float32, whatever the size of the gallery
DEMO_TEMPLATE = "{} clip art"   # of the demo's English class names; best of four on its validation split


# ---------------------------------------------------------------------------------------------------------------------
# 1. Metrics

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


def checked_ids(name, ids, size, limit):
    ids = np.asarray(ids)
    if not size or ids.shape != (size,) or ids.min() < 0 or ids.max() >= limit:
        raise ValueError(f"{name} must be [{size}], at least one, of indices below {limit}")
    return ids


def first_hit_ranks(queries, gallery, query_ids, gallery_ids):
    """Rank of the best-ranked right answer of each query, 0 for the first place.

    queries [Q, D], gallery [G, D], query_ids int [Q], gallery_ids int [G] -> int [Q]. An item is a right answer where the
    ids are equal; a query without any ranks last. Wrong items that score the same as the best right one rank before it.
    """
    order = np.argsort(gallery_ids, kind="stable")      # a query's right answers are order[first:last]
    first = np.searchsorted(gallery_ids[order], query_ids, "left")
    last = np.searchsorted(gallery_ids[order], query_ids, "right")
    ranks = np.full(len(queries), len(gallery))
    rows = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), rows):
        # Right answers are read from the same product as the rest: computed apart, rounding alone could break ties.
        scores = queries[start:start + rows] @ gallery.T
        for query, score in enumerate(scores, start):
            right = score[order[first[query]:last[query]]]
            if len(right):
                best = right.max()
                ranks[query] = np.count_nonzero(score >= best) - np.count_nonzero(right >= best)
    return ranks


def bootstrap(hits, groups, size):
    """Hits [N, F] of groups int [N] below size -> [RESAMPLES, F]: the means, in percent, when groups are drawn again.

    A group is drawn with all hits that belong to it: five captions of a picture are no five independent queries.
    """
    total = np.stack([np.bincount(groups, column, size) for column in hits.T], axis=1)
    count = np.bincount(groups, minlength=size)[:, None]
    both = np.hstack([total, count])                    # one product for all figures
    sums = np.empty((RESAMPLES, both.shape[1]))
    rng = np.random.default_rng(SEED)
    step = max(1, BLOCK // 8 // size)
    for start in range(0, RESAMPLES, step):
        draws = rng.integers(size, size=(min(step, RESAMPLES - start), size))
        times = np.stack([np.bincount(draw, minlength=size) for draw in draws])
        sums[start:start + step] = times.astype(float) @ both
    with np.errstate(invalid="ignore"):
        return 100 * sums[:, :-1] / sums[:, -1:]


def bounds(means):
    """[RESAMPLES] -> [low, high] that hold 95% of them. A resample without any query has no mean and does not count."""
    return np.nanpercentile(means, [2.5, 97.5]).tolist()


def intervals(hits, groups=None):
    """95% bootstrap intervals of the means of hits [N, F], in percent -> F times [low, high].

    groups int [N]: what is resampled, see bootstrap(). None resamples the hits themselves.
    """
    if groups is None:
        groups = np.arange(len(hits))
    _, groups = np.unique(groups, return_inverse=True)
    return [bounds(means) for means in bootstrap(hits, groups, groups.max() + 1).T]


def recalls(values):
    return {f"R@{k}": value for k, value in zip(RECALL_AT, values)}


def retrieval_samples(text, image, image_of_text):
    """-> {direction: recalls}, {direction: samples [RESAMPLES, 3]}; see retrieval(). The images are resampled."""
    text = checked("text", text)
    image = checked("image", image)
    owner = checked_ids("image_of_text", image_of_text, len(text), len(image))
    asked = np.unique(owner)                            # image to text: an image without a text is no query
    ranks = {"text_to_image": (first_hit_ranks(text, image, owner, np.arange(len(image))), owner),
             "image_to_text": (first_hit_ranks(image[asked], text, asked, owner), asked)}
    result = {}
    samples = {}
    for direction, (rank, images) in ranks.items():
        hits = rank[:, None] < np.array(RECALL_AT)      # [queries, 3]
        result[direction] = recalls((100 * hits.mean(0)).tolist())
        samples[direction] = bootstrap(hits, images, len(image))
    return result, samples


def recall_bounds(samples):
    return recalls([bounds(means) for means in samples.T])


def mean_recalls(results, samples):
    """The plain average of several recalls, with an interval, since all met the same resamples -> (recalls, ci95)"""
    mean = np.mean([list(result.values()) for result in results], axis=0)
    return recalls(mean.tolist()), recall_bounds(np.mean(samples, axis=0))


def retrieval(text, image, image_of_text, ci95=False):
    """Recall@1, 5, 10 both ways, percent.

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the mean over
    facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own texts counts; an
    image without a text is in the gallery, but no query. ci95=True adds the intervals, over images, under that key.
    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    result, samples = retrieval_samples(text, image, image_of_text)
    if ci95:
        result["ci95"] = {direction: recall_bounds(means) for direction, means in samples.items()}
    return result


def classification(image, classes, labels, ci95=False, names=None):
    """Zero-shot accuracy, percent: {"top1", "top5", "mean_per_class"}, the last being top-1 averaged over classes.

    image [M, D], classes [C, D], labels int [M]. Classes without a picture can be guessed, but have no mean of their own.
    names, C of them: classes with the very same name have the same vector, and no model could tell them apart. That is no
    failure of the model, so they do not tie against each other: the first one listed ranks first, as argmax has it.
    ci95=True adds intervals under that key: over pictures for top1 and top5, over classes for mean_per_class (the wider
    and for unseen classes the honest one, as pictures of one object succeed and fail together).
    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    image = checked("image", image)
    classes = checked("class", classes)
    labels = checked_ids("labels", labels, len(image), len(classes))
    name_of, place = same_names(names or range(len(classes)))
    ranks = first_hit_ranks(image, classes, name_of[labels], name_of) + place[labels]
    hits = ranks[:, None] < np.array([1, 5])
    _, index = np.unique(labels, return_inverse=True)
    per_class = np.bincount(index, hits[:, 0]) / np.bincount(index)
    top1, top5 = (100 * hits.mean(0)).tolist()
    result = {"top1": top1, "top5": top5, "mean_per_class": 100 * float(per_class.mean())}
    if ci95:
        result["ci95"] = dict(zip(result, intervals(hits) + intervals(per_class[:, None])))
    return result


def same_names(names):
    """C names -> (int [C] which name a class has, int [C] how many classes before it have the same)."""
    number_of = {}
    count = {}
    name_of = []
    place = []
    for name in names:
        name_of.append(number_of.setdefault(name, len(number_of)))
        place.append(count.get(name, 0))
        count[name] = place[-1] + 1
    return np.array(name_of), np.array(place)


def confusions(image, classes, labels, names, most=20):
    """The most frequent wrong guesses -> [{"true", "guess", "count", "of"}], `of` the pictures of the true class."""
    rows = max(1, BLOCK // len(classes))
    guess = np.concatenate([(image[i:i + rows] @ classes.T).argmax(1) for i in range(0, len(image), rows)])
    wrong = guess != labels
    of = np.bincount(labels, minlength=len(classes))
    pairs, counts = np.unique(np.stack([labels[wrong], guess[wrong]], axis=1), axis=0, return_counts=True)
    found = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        true, taken_for = pairs[i]
        found.append({"true": names[true], "guess": names[taken_for], "count": int(counts[i]), "of": int(of[true])})
    return found


def ablation(facets, image, owner, pool, first=1, last=None, numbers=None):
    """Retrieval with some facets only, from one set of embeddings [N, K, D]: the first n of them, all but one, one alone.

    first, last: sizes of the first kind, last=None is K. numbers: which questions of the prompt set the K facets are,
    counted from 1. Inference only: the checkpoint stays as trained. -> [{"kind", "facets": numbers, recalls, intervals}]
    """
    numbers = numbers or list(range(1, facets.shape[1] + 1))
    last = min(last or len(numbers), len(numbers))
    every = tuple(range(last))
    subsets = [("in order", every[:n]) for n in range(min(first, last), last + 1)]
    if last > 1:
        subsets += [("all but one", every[:left] + every[left + 1:]) for left in every]
    subsets += [("alone", (k,)) for k in every]

    @functools.cache
    def score(subset):
        return retrieval(pooled(facets[:, list(subset)], pool), image, owner, ci95=True)

    rows = []
    for kind, subset in tqdm(subsets, "facets", unit=" subsets", mininterval=1):
        rows.append({"kind": kind, "facets": [numbers[k] for k in subset], **score(subset)})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 2. Embeddings

class Towers(NamedTuple):
    """What encodes pictures and texts, and where what they said is kept."""
    model: flame.Flame
    encoder: Callable       # () -> flame.TextEncoder, made when it is first called for
    columns: list           # those of flame.COLUMNS that the checkpoint was trained on
    pool: str               # of facets, see pooled()
    device: str
    batch_size: int
    cached: Any             # data/cache.py: a Cache, or a dict
    image_tower: str        # names of both towers in the cache
    text_tower: str


def facets_of(columns, prompts):
    """Which facets of a prompt set are among the columns, counted from 0."""
    every = range(len(flame.PROMPTS[prompts].facets))
    return [k for k in every if f"{prompts}.{k}" in columns]


def one_ahead(pool, function, batches):
    """Yields each batch's results, while the pool's threads are at work on the next."""
    waiting = []
    for batch in [*batches, []]:
        following = [pool.submit(function, item) for item in batch]
        if waiting:
            yield [future.result() for future in waiting]
        waiting = following


def encode_images(towers, pictures, patches=False, folder=None, least=2):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `pictures` that could be read).

    patches=True gives what a linear probe reads instead: the mean over patch tokens before projector and norm. folder:
    paths are cached relative to it. Where bfloat16 is fast, the tower runs in it.
    """
    model = towers.model
    width = model.config["width" if patches else "text_dim"]
    tower = towers.image_tower + "-patches" * patches
    keys = [cache.picture_key(tower, picture, folder) for picture in pictures]
    blobs = [cache.find(towers.cached, key, 4 * width) for key in keys]
    vectors = [None if blob is None else np.frombuffer(blob, np.float32) for blob in blobs]
    todo = [i for i, vector in enumerate(vectors) if vector is None]
    batches = [todo[i:i + towers.batch_size] for i in range(0, len(todo), towers.batch_size)]
    fast = flame.default_dtype(towers.device) == torch.bfloat16
    bad = []

    def read(i):
        try:
            with report.open_picture(pictures[i]) as image:
                return model.preprocess(image)
        except Exception as error:  # decoders raise nearly anything on a stranger's bytes
            return report.reason(pictures[i], error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, torch.inference_mode(), \
            tqdm(total=len(todo), desc="images", unit=" images", mininterval=1, disable=not todo) as bar:
        for batch, loaded in zip(batches, one_ahead(pool, read, batches)):
            good = [i for i, pixels in zip(batch, loaded) if not isinstance(pixels, str)]
            bad += [reason for reason in loaded if isinstance(reason, str)]
            bar.update(len(batch))
            if not good:
                continue
            pixels = torch.stack([pixels for pixels in loaded if not isinstance(pixels, str)]).to(towers.device)
            with torch.autocast(torch.device(towers.device).type, torch.bfloat16, enabled=fast):
                encoded = model.visual(pixels)[:, 1:].mean(1) if patches else model.encode_image(pixels)
            for i, vector in zip(good, encoded.float().cpu().numpy()):
                vectors[i] = vector
            towers.cached.update({keys[i]: vectors[i].tobytes() for i in good if keys[i]})
    kept = [i for i, vector in enumerate(vectors) if vector is not None]
    if bad:
        print(f"{len(bad)} of {len(pictures)} pictures cannot be read and are left out; the first: {bad[0]}", file=sys.stderr)
    if len(kept) < least:
        raise flame.InputError(f"{len(kept)} of {len(pictures)} pictures can be read, at least {least} are needed; "
                               f"{benchmarks.CURE}")
    return np.stack([vectors[i] for i in kept]), kept


def pooled(facets, pool="cosine"):
    """[N, K, D] -> [N, D], the text vector that an image's is multiplied with.

    "cosine": the mean of unit facet vectors. "released": as the released code, the mean of facet states as they are,
    normalised.
    """
    mean = facets.mean(1)
    return mean if pool == "cosine" else mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def text_states(towers, texts, prompts):
    """Yields (rows of texts, the LLM's states float32 [n, K, D]): first what is cached, then what is encoded now.

    States outlive the checkpoint. They are rounded as in a store, new ones too: the next run gets the same.
    """
    prompt_set = flame.PROMPTS[prompts]
    count = len(prompt_set.facets)
    size = cache.states_size(count, towers.model.config["text_dim"])
    keys = [cache.text_key(towers.text_tower, prompt_set, text) for text in texts]
    missing = []
    for start in range(0, len(texts), 256):     # a block's states at a time: with a large LLM they are many gigabytes
        block = range(start, min(start + 256, len(texts)))
        blobs = {row: cache.find(towers.cached, keys[row], size) for row in block}
        missing += [row for row in block if blobs[row] is None]
        found = [row for row in block if blobs[row] is not None]
        if found:
            yield found, cache.unpack_states([blobs[row] for row in found], count)
    if not missing:
        return
    with tqdm(total=len(missing), desc=f"texts ({prompts})", unit=" texts", mininterval=1) as bar:
        for places, states in towers.encoder().encode_batches([texts[row] for row in missing], prompts):
            rows = [missing[place] for place in places]
            blobs = [cache.pack_states(state) for state in states]
            towers.cached.update({keys[row]: blob for row, blob in zip(rows, blobs)})
            bar.update(len(rows))
            yield rows, cache.unpack_states(blobs, count)


def encode_texts(towers, texts, prompts, by_facet=False):
    """-> float32 [N, D], pooled over the facets that were trained; by_facet=True: [N, K, D], not pooled.

    Equal texts are encoded once.
    """
    unique = list(dict.fromkeys(texts))
    trained = facets_of(towers.columns, prompts)
    vectors = [None] * len(unique)
    with torch.inference_mode():
        for rows, states in text_states(towers, unique, prompts):
            if towers.pool == "cosine":
                states = towers.model.encode_text(states.to(towers.device), prompts)
            facets = states.float().cpu().numpy()[:, trained]
            for row, vector in zip(rows, facets if by_facet else pooled(facets, towers.pool)):
                vectors[row] = vector
    row_of = {text: row for row, text in enumerate(unique)}
    return np.stack([vectors[row_of[text]] for text in texts])


def encode_classes(names, templates, embed_texts, prompts="raw"):
    """Each name in every template; unit vectors averaged and normalised again -> [C, D]. embed_texts(texts, prompts)."""
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_texts(filled, prompts).reshape(len(names), len(templates), -1)
    mean = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def linear_probe(train, train_labels, test, n_classes, device="cpu", lr=0.1, epochs=20, batch=512):
    """Scores float32 [M, C] of a linear classifier on frozen features [N, D], [M, D].

    AdamW without weight decay on unit features, cosine schedule without warm-up.
    """
    x = F.normalize(torch.from_numpy(train).to(device), dim=-1)
    y = torch.as_tensor(train_labels, device=device)
    weight = torch.zeros(n_classes, x.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(n_classes, device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    for _ in tqdm(range(epochs), "probe", unit=" epochs", mininterval=1):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(x[rows] @ weight.T + bias, y[rows]).backward()
            optimizer.step()
            schedule.step()
    test = F.normalize(torch.from_numpy(test).to(device), dim=-1)
    return (test @ weight.T + bias).detach().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Benchmarks. A scorer takes the towers, the prompt set asked for, if any, and what the benchmark's reader returns. It
# returns the result as it goes into the JSON, and what is shown of it.

class Shown(NamedTuple):
    """Texts to ask for and the gallery they are asked of; a picture is right where text_ids [N] = image_ids [M]."""
    texts: list             # N
    text: np.ndarray        # [N, D]
    pictures: list          # M
    image: np.ndarray       # [M, D]
    text_ids: np.ndarray
    image_ids: np.ndarray
    prompts: str
    templates: int = 1      # that a text's vector is the mean of


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


def score_texts(towers, prompts, pictures, image, kept, texts, image_of_text):
    """Retrieval among pictures that are encoded already -> (result, samples, Shown)."""
    texts, owner = readable_pairs(texts, image_of_text, kept)
    text = encode_texts(towers, texts, prompts)
    result, samples = retrieval_samples(text, image, owner)
    result["ci95"] = {direction: recall_bounds(means) for direction, means in samples.items()}
    shown = Shown(texts, text, [pictures[i] for i in kept], image, owner, np.arange(len(image)), prompts)
    return {"n_texts": len(texts), **result}, samples, shown


def score_retrieval(towers, prompts, pictures, texts, image_of_text):
    prompts = prompts or "long"
    image, kept = encode_images(towers, pictures)
    result, samples, shown = score_texts(towers, prompts, pictures, image, kept, texts, image_of_text)
    directions = [result[direction] for direction in samples]
    result["both_ways"], result["ci95"]["both_ways"] = mean_recalls(directions, list(samples.values()))
    counts = {"n_images": len(image), "n_texts": result.pop("n_texts"), "skipped_images": len(pictures) - len(image)}
    return {**counts, "skipped_texts": len(texts) - counts["n_texts"], "prompts": prompts, **result}, shown


def score_multilingual(towers, prompts, pictures, languages):
    """Retrieval in each language and the plain average over languages."""
    prompts = prompts or "raw"
    image, kept = encode_images(towers, pictures)
    parts = {}
    samples = {}
    sheets = {}
    for language, (texts, image_of_text) in languages.items():
        scored = score_texts(towers, prompts, pictures, image, kept, texts, image_of_text)
        parts[language], samples[language], sheets[language] = scored
    result = {"n_images": len(image), "n_texts": sum(part["n_texts"] for part in parts.values()), "prompts": prompts,
              "skipped_images": len(pictures) - len(image), "languages": parts, "ci95": {}}
    for way in ("text_to_image", "image_to_text"):
        means = [own[way] for own in samples.values()]
        result[way], result["ci95"][way] = mean_recalls([part[way] for part in parts.values()], means)
    return result, sheets.get("en") or next(iter(sheets.values()))


def score_among(image, classes, labels, names, same_vector=True):
    """Pictures among C classes. same_vector: classes of one name have one vector, see classification()."""
    sharing = sum(n for n in Counter(names).values() if n > 1)
    return {"n_images": len(image), "n_classes": len(names), "n_sharing_a_name": sharing, "chance": 100 / len(names),
            **classification(image, classes, labels, ci95=True, names=names if same_vector else None),
            "confusions": confusions(image, classes, labels, names)}


def score_classification(towers, prompts, pictures, labels, names, templates):
    prompts = prompts or "raw"
    image, kept = encode_images(towers, pictures)
    labels = np.array(labels)[kept]
    classes = encode_classes(names, templates, functools.partial(encode_texts, towers), prompts)
    result = score_among(image, classes, labels, names)
    # What is shown asks for a class and shows the pictures found for it, the other way round than the score.
    present = np.unique(labels)
    texts = [templates[0].replace("{}", names[c]) for c in present]
    shown = Shown(texts, classes[present], [pictures[i] for i in kept], image, present, labels, prompts, len(templates))
    return {**result, "prompts": prompts, "skipped_images": len(pictures) - len(image)}, shown


def score_probe(towers, test, train):
    """A linear classifier on what the image tower says before the projector: no text, no LLM."""
    pictures, labels, names, _ = test
    if train[2] != names:
        raise flame.InputError(f"the training and the test split have different classes ({len(train[2])} and {len(names)}); "
                               f"{benchmarks.CURE}")
    x, x_kept = encode_images(towers, train[0], patches=True)
    features, kept = encode_images(towers, pictures, patches=True)
    scores = linear_probe(x, np.array(train[1])[x_kept], features, len(names), towers.device)
    # A class's score is one dot product more: with the class's unit vector.
    result = score_among(scores, np.eye(len(names)), np.array(labels)[kept], names, same_vector=False)
    skipped = len(train[0]) - len(x) + len(pictures) - len(features)
    return {**result, "n_train": len(x), "skipped_images": skipped}, None


def score_composition(towers, prompts, pictures, texts, parts):
    """How often the right pairs of picture and text score higher than the wrong ones, in each part, and the average.

    A row with a picture that cannot be read or an empty text is left out.
    """
    prompts = prompts or "long"
    image, kept = encode_images(towers, pictures)
    filled = [i for i, text in enumerate(texts) if text]
    text = encode_texts(towers, [texts[i] for i in filled], prompts)
    image_of = dict(zip(kept, image))
    text_of = dict(zip(filled, text))

    def usable(races):
        return all(picture in image_of and text in text_of for race in races for picture, text in race)

    def wins(right, wrong):
        return image_of[right[0]] @ text_of[right[1]] > image_of[wrong[0]] @ text_of[wrong[1]]

    scores = {}
    samples = []
    for part, rows in parts.items():
        kept_rows = [(group, races) for group, races in rows if usable(races)]
        if len(kept_rows) < 2:
            raise flame.InputError(f"{part}: {len(kept_rows)} of {len(rows)} rows have readable pictures and texts, "
                                   f"at least 2 are needed; {benchmarks.CURE}")
        hits = np.array([all(wins(*race) for race in races) for _, races in kept_rows])
        groups = np.array([group for group, _ in kept_rows])
        samples.append(bootstrap(hits[:, None], groups, len(pictures))[:, 0])
        chance = {1: 1 / 2, 2: 1 / 4, 4: 1 / 6}[len(kept_rows[0][1])]      # by the number of comparisons to win
        scores[part] = {"n_rows": len(hits), "skipped_rows": len(rows) - len(hits), "chance": 100 * chance,
                        "accuracy": 100 * float(hits.mean()), "ci95": {"accuracy": bounds(samples[-1])}}
    result = {"n_images": len(image), "n_texts": len(text), "skipped_images": len(pictures) - len(image),
              "prompts": prompts}
    if all(part["chance"] == 50 for part in scores.values()):     # of unlike scores no average
        result["accuracy"] = float(np.mean([part["accuracy"] for part in scores.values()]))
        result["ci95"] = {"accuracy": bounds(np.mean(samples, axis=0))}
        result["chance"] = 50
    return {**result, "parts": scores}, None


def score_demo(towers, prompts, scenes, captions, objects, names):
    """All parts of the demo.

    long, short, raw   retrieval among the scenes with those captions (long and short ones by the long prompt set). Raw
                       captions are often equal or fit several scenes; only the scene they were written for counts.
    seen, unseen       single-object pictures among all seen, among all unseen objects alone, by DEMO_TEMPLATE in English
    multilingual       the pictures of seen objects among the bare names of all seen objects in one language, top-1, for each
                       language, and the average over languages. Objects that share a name in a language share a class.
    """
    parts = {}
    sheets = {}
    for captions_of, default in (("long", "long"), ("short", "long"), ("raw", "raw")):
        parts[captions_of], sheets[captions_of] = score_retrieval(
            towers, prompts or default, scenes, captions[captions_of], range(len(scenes)))
    parts |= score_objects(towers, prompts or "raw", objects, names)
    return {**parts["long"], "parts": parts}, sheets["long"]    # the headline is the long captions', as elsewhere


def score_objects(towers, prompts, objects, names):
    """Single-object pictures among names -> the parts seen, unseen and multilingual, see score_demo()."""
    image, kept = encode_images(towers, [path for path, _, _ in objects])
    trials = [("seen", "en", DEMO_TEMPLATE), ("unseen", "en", DEMO_TEMPLATE)]
    trials += [("seen", language, "{}") for language in names]

    def named(split, language):
        """{object: name} for a split's objects that have a name in the language."""
        table = names[language]
        return {thing: table[thing] for _, thing, own in objects if own == split and table.get(thing)}

    texts = [template.replace("{}", name) for split, language, template in trials for name in named(split, language).values()]
    vector_of = dict(zip(texts, encode_texts(towers, texts, prompts)))
    results = []
    hits = []
    groups = []     # the picture of each hit
    for split, language, template in trials:
        name_of = named(split, language)
        choices = sorted(set(name_of.values()))
        rows = [i for i, at in enumerate(kept) if objects[at][1] in name_of]
        if not rows or len(choices) < 2:
            raise flame.InputError(f"objects.tsv and names.tsv give {len(rows)} readable pictures and {len(choices)} names "
                                   f"for {split} objects in {language!r}; run data/demo.py again")
        labels = np.array([choices.index(name_of[objects[kept[i]][1]]) for i in rows])
        classes = np.stack([vector_of[template.replace("{}", choice)] for choice in choices])
        results.append({**score_among(image[rows], classes, labels, choices), "prompts": prompts})
        hits.append(first_hit_ranks(image[rows], classes, labels, np.arange(len(choices))) == 0)
        groups.append(rows)
    seen, unseen, *by_language = results
    for result in by_language:
        del result["confusions"]
    hits = np.concatenate(hits[2:])[:, None]
    multilingual = {"n_images": seen["n_images"], "prompts": prompts, "languages": dict(zip(names, by_language)),
                    "chance": float(np.mean([result["chance"] for result in by_language])),
                    "top1": float(np.mean([result["top1"] for result in by_language])),
                    "ci95": {"top1": intervals(hits, np.concatenate(groups[2:]))[0]}}
    return {"seen": seen, "unseen": unseen, "multilingual": multilingual}


# A benchmark: its reader in data/benchmarks.py, its scorer above, the prompt sets it asks by unless --prompts says another.
BENCHMARKS = {
    "demo": (benchmarks.demo, score_demo, ["raw", "long"]),
    "urban1k": (benchmarks.urban1k, score_retrieval, ["long"]),
    "sharegpt4v": (benchmarks.sharegpt4v, score_retrieval, ["long"]),
    "dci": (benchmarks.dci, score_retrieval, ["long"]),
    "docci": (benchmarks.docci, score_retrieval, ["long"]),
    "coco": (benchmarks.coco, score_retrieval, ["long"]),
    "flickr30k": (benchmarks.flickr30k, score_retrieval, ["long"]),
    "xm3600": (benchmarks.xm3600, score_multilingual, ["raw"]),
    "sugarcrepe": (benchmarks.sugarcrepe, score_composition, ["long"]),
    "winoground": (benchmarks.winoground, score_composition, ["long"]),
    "imagenet": (benchmarks.imagenet, score_classification, ["raw"]),
    "food101": (benchmarks.food101, score_classification, ["raw"]),
    "cifar10": (benchmarks.cifar10, score_classification, ["raw"]),
    "cifar100": (benchmarks.cifar100, score_classification, ["raw"]),
    "sun397": (benchmarks.sun397, score_classification, ["raw"]),
    "cars": (benchmarks.cars, score_classification, ["raw"]),
    "aircraft": (benchmarks.aircraft, score_classification, ["raw"]),
    "dtd": (benchmarks.dtd, score_classification, ["raw"]),
    "pets": (benchmarks.pets, score_classification, ["raw"]),
    "caltech101": (benchmarks.caltech101, score_classification, ["raw"]),
    "flowers102": (benchmarks.flowers102, score_classification, ["raw"]),
    "fashionmnist": (benchmarks.fashionmnist, score_classification, ["raw"]),
    "imagefolder": (benchmarks.imagefolder, score_classification, ["raw"]),
}


def read(bench, root, split="test", classes=None, language=None, all_captions=False):
    """What the benchmark's reader returns; with names and templates where there are classes, for xm3600 in some languages.

    classes: a file that overrules the names and templates in data/classes, and for imagefolder the folder's own.
    """
    reader, scorer, _ = BENCHMARKS[bench]
    if scorer is score_classification:
        class_files = benchmarks.class_files(bench, root, language)
        return benchmarks.with_names(*reader(root, split), class_files + [classes] * bool(classes))
    if bench == "xm3600":
        return benchmarks.in_languages(*reader(root, split, all_captions), language, root)
    return reader(root, split)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The command line

def sizes(text):
    """"1..K" or "2..5" -> (first, last), the sizes of subsets of facets; None for K."""
    found = re.fullmatch(r"([1-9])\.\.([1-9K])", text)
    if not found or found[1] > found[2]:
        raise argparse.ArgumentTypeError(f"1..K or a range like 2..5, not {text!r}")
    return int(found[1]), None if found[2] == "K" else int(found[2])


def settings(argv):
    """The command line, checked as far as it can be without reading anything."""
    parser = Parser(width=80, usage="evaluate.py --bench NAME | --search TEXT --images DIR | --words IMAGE",
                    description="Scores a checkpoint; writes <out>/<bench>.json and .png. "
                                f"NAME: {' '.join(BENCHMARKS)} (data/README.md).")
    add = parser.add_argument
    add("--bench", choices=list(BENCHMARKS), metavar="NAME", help="what to score on")
    add("--search", metavar="TEXT", help="rank pictures by a text (raw prompt, long above 15 words)")
    add("--images", type=Path, metavar="DIR", help="the folder that --search searches")
    add("--words", type=Path, metavar="IMAGE", help="the word that each patch of a picture is nearest to")
    add("--checkpoint", type=Path, metavar="PATH", help="default: the newest finished one under out/")
    add("--llm", type=Path, metavar="DIR", help="default: $FLAME_LLM, else data/demo/llm")
    add("--data-root", type=Path, metavar="DIR", help="default: data/<bench>")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--split", choices=["test", "val"], default="test", help="choose on val, score test once")
    add("--prompts", choices=list(flame.PROMPTS), help="default: long for captions, else raw")
    add("--pool", choices=["cosine", "released"], help="of facets; default: the checkpoint's, cosine")
    add("--language", metavar="CODE", help="of imagenet's names; of xm3600, comma between")
    add("--all-captions", action="store_true", help="xm3600: not only a language's first one")
    add("--classes", type=Path, metavar="FILE", help="class names, templates; see data/classes")
    add("--probe", action="store_true", help="linear probe in place of zero-shot")
    add("--facets", nargs="?", const="1..K", type=sizes, metavar="1..K", help="what each facet is worth (retrieval only)")
    add("--report", action="store_true", help="also write <out>/<bench>.html")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    add("--batch-size", type=number(int, 1), default=64, metavar="N", help="pictures at once, default 64")
    args = parser.parse_args(argv)
    if bool(args.bench) + bool(args.search) + bool(args.words) != 1 or bool(args.search) != bool(args.images):
        parser.error("give --bench NAME, or --search TEXT and --images DIR, or --words IMAGE")
    scorer = BENCHMARKS[args.bench][1] if args.bench else None
    if args.facets and scorer not in (score_retrieval, score_demo):
        parser.error("--facets: 1..K or a range like 2..5, and a retrieval benchmark")
    if args.probe and scorer is not score_classification:
        parser.error(f"--probe: {args.bench} has no classes; leave the flag out")
    if args.split == "val" and args.bench not in benchmarks.HAS_VAL:
        parser.error(f"--split val: {args.bench} has only a test split; leave the flag out")
    usable_device(args.device)
    return args


def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. flame.InputError if there is none."""
    optional = type(None)
    finished = []
    for path in folder.glob("*/config.json"):
        if not (path.parent / "model.safetensors").exists():
            continue
        config = flame.read_json(path, {"step": (int, optional), "training": (dict, optional)},
                                 cure="mend it, remove its folder, or name another checkpoint with --checkpoint")
        steps = (config.get("training") or {}).get("steps")
        if config.get("step") in (None, steps):     # else a run still training
            finished.append(path.parent)
    if not finished:
        raise flame.InputError(f"{folder}: no finished checkpoint; run train.py, or name one with --checkpoint")
    return max(finished, key=lambda path: (path / "model.safetensors").stat().st_mtime)


def prompt_sets(args):
    """The prompt sets that this run asks by."""
    if args.prompts or args.probe:
        return [args.prompts] if args.prompts else []
    if args.search:
        return ["long" if len(args.search.split()) > 15 else "raw"]
    return BENCHMARKS[args.bench][2]


def trained_columns(args, model, checkpoint):
    """The columns that the checkpoint was trained on; all where it does not say. Refuses prompts it never met."""
    columns = model.config.get("columns", flame.COLUMNS)
    known = [name for name in flame.COLUMNS if isinstance(columns, list) and name in columns]
    if not known or len(known) != len(columns):
        raise flame.InputError(f"{checkpoint}/config.json: 'columns' is {json.dumps(columns)[:100]}, not a list of some of "
                               f"{', '.join(flame.COLUMNS)}; train the checkpoint anew")
    for prompts in prompt_sets(args):
        trained = facets_of(known, prompts)
        all_of_them = len(flame.PROMPTS[prompts].facets)
        if not trained:
            raise flame.InputError(f"{args.bench or '--search'} asks by the {prompts} prompts, but {checkpoint} was trained on "
                                   f"{', '.join(known)} alone; ask by others with --prompts {known[0].split('.')[0]}")
        if len(trained) < all_of_them:
            print(f"trained on {len(trained)} of {all_of_them} facets of the {prompts} prompts, and asked by them alone: "
                  + ", ".join(f"{prompts}.{k} ({report.FACETS[k]})" for k in trained))
    return known


def open_towers(args, model, checkpoint, llm):
    """Raises flame.InputError where checkpoint, LLM and settings do not belong together."""
    source = model.config["llm"]
    fingerprint = flame.llm_fingerprint(llm)
    if not flame.same_llm(source.get("fingerprint"), llm):
        raise flame.InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source['name']}) than {llm}; "
                               "name that one with --llm")
    pool = args.pool or source.get("pool") or model.config.get("pool") or "cosine"
    if pool == "released" and (model.text.weight is not None or model.text.basis.any() or model.text.mean.any()):
        raise flame.InputError("--pool released: the mean of states as they are goes with checkpoints without text "
                               "projection; leave the flag out")
    columns = trained_columns(args, model, checkpoint)
    dtype = flame.default_dtype(args.device)

    @functools.cache
    def encoder():      # the one place where the text tower is made, and only if a text is not cached
        tower = flame.TextEncoder(llm, args.device, dtype, source["layer"], source["positions"])
        if tower.dim != model.config["text_dim"]:
            raise flame.InputError(f"{llm}: its states have {tower.dim} dimensions, {checkpoint} was trained for "
                                   f"{model.config['text_dim']}; name the right LLM with --llm")
        return tower

    args.out.mkdir(parents=True, exist_ok=True)
    return Towers(model, encoder, columns, pool, args.device, args.batch_size, cache.open_cache(args.out / "cache.sqlite"),
                  cache.image_tower_name(model, dtype), f"{fingerprint} {source['layer']} {source['positions']} {dtype}")


def main(argv=None):
    def body():
        args = settings(argv)
        flame.keep_freed_memory()
        root = args.data_root or Path("data") / str(args.bench)
        chosen = args.classes, args.language, args.all_captions
        data = read(args.bench, root, args.split, *chosen) if args.bench else None  # first: a wrong folder is found in a moment
        train = read(args.bench, root, "train", *chosen) if args.probe else None
        checkpoint = args.checkpoint or newest_checkpoint()
        llm = args.llm or Path(os.environ.get("FLAME_LLM") or "data/demo/llm")
        task = f"bench {args.bench} in {root}" if args.bench else f"search in {args.images}" if args.search else f"words for {args.words}"
        print(f"{task}   checkpoint {checkpoint}   LLM {llm}   device {args.device}", flush=True)
        model = flame.load(checkpoint).to(args.device)
        if args.words:
            words.show(args.words, model, llm, args.device, args.out)
            return
        towers = open_towers(args, model, checkpoint, llm)
        if args.search:
            search.search(args.search, args.images, prompt_sets(args)[0], towers, encode_images, encode_texts, args.out)
        else:
            evaluate(args, towers, checkpoint, data, train)

    return run("evaluate.py", body, "what the towers said so far is kept, the same command goes on from there")


def evaluate(args, towers, checkpoint, data, train):
    """Scores a benchmark; prints and writes the result."""
    if args.probe:
        result, shown = score_probe(towers, data, train)
    else:
        result, shown = BENCHMARKS[args.bench][1](towers, args.prompts, *data)
    asked = [name for name in towers.columns if name.split(".")[0] in prompt_sets(args)]
    about = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split, "pool": towers.pool, "columns": asked}
    if args.probe or towers.pool == "cosine":
        del about["pool"]
    result = {**about, **result}
    print("\n".join(report.table(result)))
    path = args.out / (args.bench + "-probe" * args.probe)
    written = []

    def write(ending, save):
        written.append(f"{path}{ending}")
        files.write(written[-1], save)

    plot = None
    if args.facets:
        facets = encode_texts(towers, shown.texts, shown.prompts, by_facet=True)
        numbers = [k + 1 for k in facets_of(towers.columns, shown.prompts)]
        result["facets"] = ablation(facets, shown.image, shown.text_ids, towers.pool, *args.facets, numbers)
        print("\n".join(report.facet_table(result["facets"])))
        plot = plots.draw_facets(result["facets"])
        if plot:
            write("-facets.png", plot.savefig)
    write(".json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    queries = []
    if shown:
        ranks = first_hit_ranks(shown.text, shown.image, shown.text_ids, shown.image_ids)
        order = np.random.default_rng(SEED).permutation(len(ranks))
        rows = [found_for(shown, query, ranks) for query in np.sort(order[:8])]
        write(".png", report.draw_sheet(rows, shown.pictures).save)
    if shown and args.report:
        some = np.concatenate([order[ranks[order] == 0][:6], order[ranks[order] > 0][:6]])     # right ones, wrong ones
        facets = by_facet_name(towers, shown, some) if shown.templates == 1 else [None] * len(some)
        queries = [found_for(shown, query, ranks, own) for query, own in zip(some, facets)]
    if args.report:
        page = report.page(result, queries, shown.pictures if shown else [], plot)
        write(".html", lambda path: path.write_text(page, encoding="utf-8"))
    print(f"-> {', '.join(written)}")


def found_for(shown, query, ranks, facets=None):
    right = shown.image_ids == shown.text_ids[query]
    return report.found_for(shown.texts[query], shown.text[query], shown.image, right, ranks[query], facets)


def by_facet_name(towers, shown, queries):
    """[{facet's name: vector [D]}] of some texts."""
    vectors = encode_texts(towers, [shown.texts[i] for i in queries], shown.prompts, by_facet=True)
    names = [report.FACETS[k] for k in facets_of(towers.columns, shown.prompts)]
    return [dict(zip(names, vector)) for vector in vectors]


if __name__ == "__main__":
    sys.exit(main())
