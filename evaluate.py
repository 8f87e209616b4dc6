"""Stage 3: how good is a checkpoint? Recall@K and accuracy, in plain numpy.

    python evaluate.py --bench demo             # all parts of the demo           -> results/demo.json, results/demo.png
    python evaluate.py --bench urban1k          # data/urban1k, newest checkpoint -> results/urban1k.json, results/urban1k.png
    python evaluate.py --bench demo --facets --report     # and what each facet is worth; one page to look at
    python evaluate.py --search "a red kite" --images pictures        # any folder, any text -> results/search.png
    python evaluate.py --words picture.jpg      # what each patch says, in the LLM's own words -> results/words.png

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval go through
the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages through the one *raw*
prompt. A text is the mean over facets of unit facet vectors, so that one dot product with a unit image vector is the mean
over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of everything
scores at most chance. What the towers say is kept in <out>/cache.sqlite, so that a second run takes seconds; delete it freely.
"""

import argparse
import functools
import json
import os
import re
import sqlite3
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flame
from data import benchmarks, cache
from data.show import report

SEED = 0                # of the bootstrap, of the linear probe and of the queries shown
RESAMPLES = 1000
DEMO_TEMPLATE = "{} clip art"   # of the demo's English class names; best of four on its validation split, as it names the medium
BLOCK = 1 << 22         # similarities held at once: 16 MiB of float32, whatever the size of the gallery


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
    order = np.argsort(gallery_ids, kind="stable")      # a query's right answers are order[first:last]
    first, last = (np.searchsorted(gallery_ids[order], query_ids, side) for side in ("left", "right"))
    ranks = np.full(len(queries), len(gallery))
    rows = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), rows):
        # Right answers are read from the same product as the rest: computed apart, rounding alone could break ties.
        for query, score in enumerate(queries[start:start + rows] @ gallery.T, start):
            right = score[order[first[query]:last[query]]]
            if len(right):
                best = right.max()
                ranks[query] = np.count_nonzero(score >= best) - np.count_nonzero(right >= best)
    return ranks


def by_group(hits, groups, size):
    """hits [N, F], groups int [N] below size -> sums and counts of the hits of each group, [size, F] both."""
    total = np.stack([np.bincount(groups, column, size) for column in hits.T], axis=1)
    return total, np.broadcast_to(np.bincount(groups, minlength=size)[:, None], total.shape)


def bootstrap(total, count):
    """Sums and counts of hits by group [G, F] -> [RESAMPLES, F], percent: the means when groups are drawn with replacement."""
    sums, rng, step = np.empty((RESAMPLES, 2, total.shape[1])), np.random.default_rng(SEED), max(1, BLOCK // 8 // len(total))
    for start in range(0, RESAMPLES, step):
        draws = rng.integers(len(total), size=(min(step, RESAMPLES - start), len(total)))
        times = np.stack([np.bincount(draw, minlength=len(total)) for draw in draws]).astype(float)     # one product for all figures
        sums[start:start + step] = (times @ np.hstack([total, count])).reshape(len(draws), 2, -1)
    with np.errstate(invalid="ignore"):
        return 100 * sums[:, 0] / sums[:, 1]


def bounds(means):
    """[RESAMPLES] -> [low, high] that hold 95% of them. A resample without any query has no mean and does not count."""
    return np.nanpercentile(means, [2.5, 97.5]).tolist()


def intervals(hits, groups=None):
    """95% bootstrap intervals of the means of F figures, hits [N, F], in percent -> F times [low, high].

    groups int [N]: what is resampled, with all hits that belong to it; five captions of a picture are no five
    independent queries. None resamples the hits themselves.
    """
    groups = np.arange(len(hits)) if groups is None else np.unique(groups, return_inverse=True)[1]
    return [bounds(means) for means in bootstrap(*by_group(hits, groups, groups.max() + 1)).T]


K = (1, 5, 10)


def hits_at(ranks):
    return np.asarray(ranks)[:, None] < np.array(K)     # [N, 3]


def recalls(values):
    return {f"R@{k}": value if isinstance(value, list) else float(value) for k, value in zip(K, values)}


def ranks_both_ways(text, image, image_of_text):
    """-> {direction: (rank of each query's best right answer, the image each query belongs to)}; see retrieval()."""
    text, image, owner = checked("text", text), checked("image", image), np.asarray(image_of_text)
    if not len(text) or owner.shape != (len(text),) or owner.min() < 0 or owner.max() >= len(image):
        raise ValueError(f"image_of_text must be [{len(text)}], at least one, of indices below {len(image)}")
    asked = np.unique(owner)
    return {"text_to_image": (first_hit_ranks(text, image, owner, np.arange(len(image))), owner),
            "image_to_text": (first_hit_ranks(image[asked], text, asked, owner), asked)}


def score_ranks(ranks, images):
    """What ranks_both_ways gives -> (recalls and their intervals, {direction: samples [RESAMPLES, 3]}); the images are resampled."""
    samples = {direction: bootstrap(*by_group(hits_at(r), owner, images)) for direction, (r, owner) in ranks.items()}
    result = {direction: recalls(100 * hits_at(r).mean(0)) for direction, (r, _) in ranks.items()}
    return {**result, "ci95": {direction: recalls(map(bounds, means.T)) for direction, means in samples.items()}}, samples


def mean_recalls(results, samples):
    """The plain average of several recalls, with an interval, since all met the same resamples -> (recalls, ci95)"""
    return recalls(np.mean([list(result.values()) for result in results], axis=0)), recalls(map(bounds, np.mean(samples, axis=0).T))


def retrieval(text, image, image_of_text, ci95=False):
    """Recall@1, 5, 10 both ways, percent.

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the mean over
    facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own texts counts; an
    image without a text is in the gallery, but no query. ci95=True adds the intervals, over images, under that key.
    Raises flame.InputError if a value is NaN or infinite, ValueError if shapes or indices do not fit.
    """
    ranks = ranks_both_ways(text, image, image_of_text)
    return score_ranks(ranks, len(image))[0] if ci95 else {direction: recalls(100 * hits_at(r).mean(0)) for direction, (r, _) in ranks.items()}


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
    hits = first_hit_ranks(image, classes, labels, np.arange(len(classes)))[:, None] < np.array([1, 5])
    present, index = np.unique(labels, return_inverse=True)
    per_class = np.bincount(index, hits[:, 0]) / np.bincount(index)
    result = dict(zip(("top1", "top5"), (100 * hits.mean(0)).tolist()), mean_per_class=100 * float(per_class.mean()))
    if ci95:
        result["ci95"] = dict(zip(result, intervals(hits) + intervals(per_class[:, None])))
    return result


def confusions(image, classes, labels, names, most=20):
    """The most frequent wrong guesses -> [{"true", "guess", "count", "of"}], `of` the pictures of the true class."""
    rows = max(1, BLOCK // len(classes))
    guess = np.concatenate([(image[i:i + rows] @ classes.T).argmax(1) for i in range(0, len(image), rows)])
    wrong, of = guess != labels, np.bincount(labels, minlength=len(classes))
    pairs, count = np.unique(np.stack([labels[wrong], guess[wrong]]), axis=1, return_counts=True)
    best = np.argsort(-count, kind="stable")[:most]
    return [{"true": names[t], "guess": names[g], "count": int(n), "of": int(of[t])} for (t, g), n in zip(pairs.T[best], count[best])]


# ---------------------------------------------------------------- embeddings

def encode_images(model, pictures, device, batch_size, cached, key, patches=False, least=2):
    """-> (float32 [M', D] unit vectors, list of the M' indices of `pictures` that could be read).

    cached, key: see data/cache.py; key(picture) is None where there is none. patches=True gives what a linear probe reads
    instead: the mean over patch tokens before projector and norm. Where bfloat16 is fast, the tower runs in it.
    """
    def read(picture):
        try:
            with report.open_picture(picture) as image:
                return model.preprocess(image), None
        except Exception as error:  # decoders raise nearly anything on a stranger's bytes
            return None, " ".join(f"{picture if isinstance(picture, Path) else 'a picture'}: {error or type(error).__name__}".split())

    kind, keys = torch.device(device).type, [key(picture) for picture in pictures]
    vectors = [np.frombuffer(blob, np.float32) if (blob := name and cached.get(name)) else None for name in keys]
    todo, bad = [i for i, vector in enumerate(vectors) if vector is None], []
    batches = [todo[i:i + batch_size] for i in range(0, len(todo), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, torch.inference_mode(), tqdm(total=len(todo), desc="images", unit="image", mininterval=1) as bar:
        ahead = [pool.submit(read, pictures[i]) for i in batches[0]] if batches else []
        for batch, following in zip(batches, batches[1:] + [[]]):
            loaded = [future.result() for future in ahead]
            ahead = [pool.submit(read, pictures[i]) for i in following]     # decoded while this batch is encoded
            bad += [reason for pixels, reason in loaded if pixels is None]
            good = [i for i, (pixels, _) in zip(batch, loaded) if pixels is not None]
            if good:
                pixels = torch.stack([pixels for pixels, _ in loaded if pixels is not None]).to(device)
                with torch.autocast(kind, torch.bfloat16, enabled=flame.default_dtype(device) == torch.bfloat16):
                    encoded = model.visual(pixels)[:, 1:].mean(1) if patches else model.encode_image(pixels)
                for i, vector in zip(good, encoded.float().cpu().numpy()):
                    vectors[i] = vector
                cached.update({keys[i]: vectors[i].tobytes() for i in good if keys[i]})
            bar.update(len(batch))
    kept = [i for i, vector in enumerate(vectors) if vector is not None]
    if bad:
        print(f"{len(bad)} of {len(pictures)} pictures cannot be read and are left out; the first: {bad[0]}", file=sys.stderr)
    if len(kept) < least:
        raise flame.InputError(f"{len(kept)} of {len(pictures)} pictures can be read, at least {least} are needed; {benchmarks.CURE}")
    return np.stack([vectors[i] for i in kept]), kept


def pooled(facets, pool="cosine"):
    """[N, K, D] -> [N, D], the text vector that an image's is multiplied with.

    "cosine": the mean of unit facet vectors. "released": as the released code, the mean of facet states as they are, normalised.
    """
    mean = facets.mean(1)
    return mean if pool == "cosine" else mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def encode_texts(model, encoder, texts, prompts, device, cached, tower="", pool="cosine", keep=False):
    """-> float32 [N, D], pooled over the prompt set's facets; with keep=True [N, K, D], not pooled. Equal texts are encoded once.

    encoder: a function that gives the TextEncoder, called only if a text is not cached; tower: its name in the cache. Cached
    are the LLM's states, which outlive the checkpoint, rounded as in a store.
    """
    unique, prompt_set, out = list(dict.fromkeys(texts)), flame.PROMPTS[prompts], None
    keys = [cache.text_key(tower, prompt_set, text) for text in unique]

    def batches():  # (rows of unique, blobs of their states), first what is cached
        missing = []
        for start in range(0, len(unique), 256):
            found = [(i, cached.get(keys[i])) for i in range(start, min(start + 256, len(unique)))]
            missing += [i for i, blob in found if blob is None]
            yield [i for i, blob in found if blob is not None], [blob for _, blob in found if blob is not None]
        for places, states in encoder().encode_batches([unique[i] for i in missing], prompts) if missing else ():
            blobs = [cache.pack_states(state) for state in states]
            cached.update({keys[missing[place]]: blob for place, blob in zip(places, blobs)})
            yield [missing[place] for place in places], blobs

    with torch.inference_mode(), tqdm(total=len(unique), desc=f"texts ({prompts})", unit="text", mininterval=1) as bar:
        for rows, blobs in batches():
            if rows:
                states = cache.unpack_states(blobs, len(prompt_set.facets))     # also what is new: the next run gets the same
                vectors = (states if pool == "released" else model.encode_text(states.to(device), prompts)).float().cpu().numpy()
                vectors = vectors if keep else pooled(vectors, pool)
                out = np.empty((len(unique), *vectors.shape[1:]), np.float32) if out is None else out
                out[rows] = vectors
                bar.update(len(rows))
    row = {text: i for i, text in enumerate(unique)}
    return out[[row[text] for text in texts]]


def encode_classes(names, templates, embed_texts, prompts="raw"):
    """Each name in every template, each through the raw prompt; unit vectors averaged and normalised again -> [C, D]."""
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_texts(filled, prompts).reshape(len(names), len(templates), -1)
    mean = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def linear_probe(train, train_labels, test, n_classes, device="cpu", lr=0.1, epochs=20, batch=512):
    """Scores float32 [M, C] of a linear classifier on frozen features [N, D], [M, D], by the paper's protocol (AdamW).

    What the paper leaves open is as in CLIP_benchmark: unit features, no weight decay, cosine schedule without warm-up.
    """
    x, test = (torch.nn.functional.normalize(torch.from_numpy(features).to(device), dim=-1) for features in (train, test))
    y, generator = torch.as_tensor(train_labels, device=device), torch.Generator().manual_seed(SEED)
    weight, bias = (torch.zeros(*shape, device=device, requires_grad=True) for shape in ((n_classes, x.shape[1]), (n_classes,)))
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    for _ in tqdm(range(epochs), "probe", unit="epoch", mininterval=1):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(x[rows] @ weight.T + bias, y[rows]).backward()
            optimizer.step()
            schedule.step()
    return (test @ weight.T + bias).detach().cpu().numpy()


# ---------------------------------------------------------------- benchmarks
# Each takes what its reader returns, embed_images(pictures) -> (vectors, kept), embed_texts(texts, prompts) -> vectors and
# the prompt set asked for, if any, and returns the result as it goes into the JSON and what is shown of it.

# text [N, D] are texts to ask for, image [M, D] the gallery; a picture is a right answer where text_ids [N] = image_ids [M].
Shown = namedtuple("Shown", "texts text pictures image text_ids image_ids prompts")


def readable_pairs(texts, image_of_text, kept):
    """Leaves out empty texts and the texts of pictures that could not be read, whatever their place.

    kept: indices of the readable pictures, in the order of their embeddings
    -> (texts, index into kept of each one's picture). Pictures without a text stay distractors in the gallery.
    """
    place = {image: i for i, image in enumerate(kept)}
    pairs = [(text, place[image]) for text, image in zip(texts, image_of_text) if text and image in place]
    if len(pairs) < 2:
        raise flame.InputError(f"{len(pairs)} of {len(texts)} texts have a readable picture, at least 2 are needed; {benchmarks.CURE}")
    if empty := sum(not text for text in texts):
        print(f"{empty} of {len(texts)} texts are missing or empty and are left out", file=sys.stderr)
    return [text for text, _ in pairs], np.array([image for _, image in pairs])


def run_retrieval(pictures, texts, image_of_text, embed_images, embed_texts, prompts):
    prompts = prompts or "long"
    image, kept = embed_images(pictures)
    texts_kept, owner = readable_pairs(texts, image_of_text, kept)
    text = embed_texts(texts_kept, prompts)
    result, samples = score_ranks(ranks_both_ways(text, image, owner), len(image))
    result["both_ways"], result["ci95"]["both_ways"] = mean_recalls([result[direction] for direction in samples], list(samples.values()))
    result = {"n_images": len(image), "n_texts": len(text), "skipped_images": len(pictures) - len(image),
              "skipped_texts": len(texts) - len(text), "prompts": prompts, **result}
    return result, Shown(texts_kept, text, [pictures[i] for i in kept], image, owner, np.arange(len(image)), prompts)


def run_multilingual(pictures, languages, embed_images, embed_texts, prompts):
    """Retrieval in each language, by the raw prompt, and the plain average over languages."""
    prompts = prompts or "raw"
    image, kept = embed_images(pictures)
    parts, samples, shown = {}, {"text_to_image": [], "image_to_text": []}, None
    for language, (texts, image_of_text) in languages.items():
        texts_kept, owner = readable_pairs(texts, image_of_text, kept)
        text = embed_texts(texts_kept, prompts)
        scores, own_samples = score_ranks(ranks_both_ways(text, image, owner), len(image))
        parts[language] = {"n_texts": len(text), **scores}
        for direction in samples:
            samples[direction].append(own_samples[direction])
        if language == "en" or not shown:
            shown = Shown(texts_kept, text, [pictures[i] for i in kept], image, owner, np.arange(len(image)), prompts)
    average = {direction: mean_recalls([part[direction] for part in parts.values()], means) for direction, means in samples.items()}
    return {"n_images": len(image), "n_texts": sum(part["n_texts"] for part in parts.values()), "prompts": prompts,
            "skipped_images": len(pictures) - len(image), "languages": parts, **{direction: mean for direction, (mean, _) in average.items()},
            "ci95": {direction: ci95 for direction, (_, ci95) in average.items()}}, shown


def score_classes(image, classes, labels, names):
    return {"n_images": len(image), "n_classes": len(names), "chance": 100 / len(names),
            **classification(image, classes, labels, ci95=True), "confusions": confusions(image, classes, np.asarray(labels), names)}


def run_classification(pictures, labels, names, templates, embed_images, embed_texts, prompts):
    prompts = prompts or "raw"
    image, kept = embed_images(pictures)
    labels = np.array(labels)[kept]
    classes = encode_classes(names, templates, embed_texts, prompts)
    result = {**score_classes(image, classes, labels, names), "prompts": prompts, "skipped_images": len(pictures) - len(image)}
    # What is shown asks for a class and shows the pictures found for it, the other way round than the score.
    present = np.unique(labels)
    return result, Shown([templates[0].replace("{}", names[c]) for c in present], classes[present], [pictures[i] for i in kept], image, present, labels, prompts)


def run_probe(test, train, embed_images, device):
    """A linear classifier on what the image tower says before the projector: no text, no LLM."""
    if train[2] != test[2]:
        raise flame.InputError(f"the training and the test split have different classes ({len(train[2])} and {len(test[2])}); {benchmarks.CURE}")
    (x, x_kept), (features, kept) = (embed_images(split[0], patches=True) for split in (train, test))
    scores = linear_probe(x, np.array(train[1])[x_kept], features, len(test[2]), device)
    result = score_classes(scores, np.eye(len(test[2])), np.array(test[1])[kept], test[2])    # a class's score is one dot product more
    return {**result, "n_train": len(x), "skipped_images": len(train[0]) + len(test[0]) - len(x) - len(features)}, None


def run_composition(pictures, texts, parts, embed_images, embed_texts, prompts):
    """How often the right pairs of picture and text score higher than the wrong ones, in each part, and the plain average over parts.

    A row with a picture that cannot be read or an empty text is left out.
    """
    prompts = prompts or "long"
    image, kept = embed_images(pictures)
    place, filled = {picture: i for i, picture in enumerate(kept)}, [i for i, text in enumerate(texts) if text]
    row, text = {i: n for n, i in enumerate(filled)}, embed_texts([texts[i] for i in filled], prompts)
    score, out, means = lambda pair: float(image[place[pair[0]]] @ text[row[pair[1]]]), {}, []
    for part, rows in parts.items():
        usable = [(group, races) for group, races in rows if all(picture in place and i in row for race in races for picture, i in race)]
        if len(usable) < 2:
            raise flame.InputError(f"{part}: {len(usable)} of {len(rows)} rows have readable pictures and texts, at least 2 are needed; {benchmarks.CURE}")
        hits = np.array([all(score(right) > score(wrong) for right, wrong in races) for _, races in usable])
        means.append(bootstrap(*by_group(hits[:, None], np.array([group for group, _ in usable]), len(pictures)))[:, 0])
        out[part] = {"n_rows": len(hits), "skipped_rows": len(rows) - len(hits), "chance": 100 / {1: 2, 2: 4, 4: 6}[len(usable[0][1])],
                     "accuracy": 100 * float(hits.mean()), "ci95": {"accuracy": bounds(means[-1])}}
    average = {"accuracy": float(np.mean([part["accuracy"] for part in out.values()])), "ci95": {"accuracy": bounds(np.mean(means, axis=0))}, "chance": 50}
    return {"n_images": len(image), "n_texts": len(text), "skipped_images": len(pictures) - len(image), "prompts": prompts,
            **(average if all(part["chance"] == 50 for part in out.values()) else {}), "parts": out}, None     # of unlike scores no average


def run_demo(scenes, captions, objects, names, embed_images, embed_texts, prompts):
    """All parts of the demo.

    long, short, raw   retrieval among the scenes with those captions (long and short ones by the long prompt set). Raw
                       captions are often equal or fit several scenes; only the scene they were written for counts.
    seen, unseen       single-object pictures among all seen, among all unseen objects alone, by DEMO_TEMPLATE in English
    multilingual       the pictures of seen objects among the bare names of all seen objects in one language, top-1, for each
                       language, and the average over languages. Objects that share a name in a language share a class.
    """
    parts, sheets, encoded = {}, {}, embed_images(scenes)
    for column in ("long", "short", "raw"):
        parts[column], sheets[column] = run_retrieval(scenes, captions[column], range(len(scenes)), lambda _: encoded, embed_texts,
                                                      prompts or ("raw" if column == "raw" else "long"))
    prompts = prompts or "raw"
    image, kept = embed_images([path for path, _, _ in objects])
    shown = [objects[i] for i in kept]
    members = {split: sorted({name for _, name, s in objects if s == split}) for split in ("seen", "unseen")}
    wanted = {(language, name): table[name] for language, table in names.items() for name in members["seen"] if table.get(name)}
    wanted |= {("template", name): DEMO_TEMPLATE.replace("{}", names["en"][name]) for name in members["seen"] + members["unseen"]}
    vectors = dict(zip(wanted, embed_texts(list(wanted.values()), prompts)))

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
        shown_as = [choice.removesuffix(DEMO_TEMPLATE.partition("{}")[2]) for choice in choices]
        return {**score_classes(image[rows], matrix, labels, shown_as), "prompts": prompts}, hit, rows

    parts["seen"], parts["unseen"] = among_names("seen", "template")[0], among_names("unseen", "template")[0]
    scored = {language: among_names("seen", language) for language in names}
    hit = np.concatenate([hit for _, hit, _ in scored.values()])
    picture = np.concatenate([rows for _, _, rows in scored.values()])
    languages = {language: {k: v for k, v in result.items() if k != "confusions"} for language, (result, _, _) in scored.items()}
    parts["multilingual"] = {"n_images": parts["seen"]["n_images"], "prompts": prompts, "languages": languages,
                             "chance": float(np.mean([result["chance"] for result in languages.values()])),
                             "top1": float(np.mean([result["top1"] for result in languages.values()])),
                             "ci95": {"top1": intervals(hit[:, None], picture)[0]}}
    return {**parts["long"], "parts": parts}, sheets["long"]    # the headline is the long captions', as in other retrieval files


def ablation(facets, image, owner, pool, first=1, last="K"):
    """Retrieval with some facets only, from one set of embeddings [N, K, D]: the first n of them, all but one, one alone.

    first, last: sizes of the first kind. Inference only: the checkpoint stays as trained.
    -> [{"kind", "facets": [1-based], recalls and intervals}]
    """
    last = facets.shape[1] if last == "K" else min(int(last), facets.shape[1])
    every = range(1, last + 1)
    subsets = [("in order", tuple(range(1, n + 1))) for n in range(min(int(first), last), last + 1)]
    subsets += [("all but one", tuple(f for f in every if f != left)) for left in every if last > 1] + [("alone", (f,)) for f in every]
    score = functools.cache(lambda subset: retrieval(pooled(facets[:, np.array(subset) - 1], pool), image, owner, ci95=True))
    return [{"kind": kind, "facets": list(subset), **score(subset)} for kind, subset in tqdm(subsets, "facets", unit="subset", mininterval=1)]


# ---------------------------------------------------------------- command line

def newest_checkpoint(folder=Path("out")):
    """The finished checkpoint under `folder` that was written last. flame.InputError if there is none."""
    finished = [path.parent for path in folder.glob("*/config.json") if (path.parent / "model.safetensors").exists()
                and (config := json.loads(path.read_text())).get("step") in (None, config.get("training", {}).get("steps"))]    # not a run still training
    if not finished:
        raise flame.InputError(f"{folder}: no finished checkpoint; run train.py, or name one with --checkpoint")
    return max(finished, key=lambda path: (path / "model.safetensors").stat().st_mtime)


def main(argv=None):
    known = ["demo", *benchmarks.RETRIEVAL, *benchmarks.MULTILINGUAL, *benchmarks.COMPOSITION, *benchmarks.CLASSIFICATION]
    parser = argparse.ArgumentParser(
        usage="evaluate.py --bench NAME | --search TEXT --images DIR | --words IMAGE", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=80),
        description=f"Scores a checkpoint; writes <out>/<bench>.json and .png. NAME: {' '.join(known)} (data/README.md).")
    add = parser.add_argument
    add("--bench", choices=known, metavar="NAME", help="what to score on")
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
    add("--facets", nargs="?", const="1..K", metavar="1..K", help="what each facet is worth (retrieval only)")
    add("--report", action="store_true", help="also write <out>/<bench>.html")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    add("--batch-size", type=int, default=64, metavar="N", help="pictures at once, default 64")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("--batch-size: at least 1")
    if bool(args.bench) + bool(args.search) + bool(args.words) != 1 or bool(args.search) != bool(args.images):
        parser.error("give --bench NAME, or --search TEXT and --images DIR, or --words IMAGE")
    if args.facets and not (args.bench in [*benchmarks.RETRIEVAL, "demo"] and re.fullmatch(r"[1-9]\.\.[1-9K]", args.facets) and args.facets[0] <= args.facets[-1]):
        parser.error("--facets: 1..K or a range like 2..5, and a retrieval benchmark")
    try:
        flame.keep_freed_memory()
        evaluate(args)
    except flame.InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (sqlite3.Error, OSError) as error:
        where = getattr(error, "filename", None) or args.out / "cache.sqlite"
        print(f"{where}: {getattr(error, 'strerror', None) or error}; make room, set permissions, or delete the cache", file=sys.stderr)
        return 2
    return 0


def evaluate(args):
    if args.split == "val" and args.bench not in benchmarks.HAS_VAL:
        raise flame.InputError(f"--split val: {args.bench} has only a test split; leave the flag out")
    if args.probe and args.bench not in benchmarks.CLASSIFICATION:
        raise flame.InputError(f"--probe: {args.bench} has no classes; leave the flag out")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise flame.InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    root = args.data_root or Path("data") / str(args.bench)
    read = lambda split: benchmarks.read(args.bench, root, split, args.classes, args.language, args.all_captions)
    data = read(args.split) if args.bench else None     # first, as a wrong folder is found in a moment
    train = read("train") if args.probe else None
    checkpoint = args.checkpoint or newest_checkpoint()
    llm = args.llm or Path(os.environ.get("FLAME_LLM") or "data/demo/llm")
    print(f"{f'bench {args.bench} in {root}' if args.bench else f'search in {args.images}' if args.search else f'words for {args.words}'}   checkpoint {checkpoint}   LLM {llm}   device {args.device}", flush=True)

    model = flame.load(checkpoint).to(args.device)
    source, dtype = model.config["llm"], flame.default_dtype(args.device)
    pool = args.pool or source.get("pool") or model.config.get("pool") or "cosine"
    if not args.probe and not flame.same_llm(source.get("fingerprint"), llm):
        raise flame.InputError(f"{checkpoint}: the checkpoint was trained with another LLM ({source['name']}) than {llm}; name that one with --llm")
    if pool == "released" and (model.text.weight is not None or model.text.basis.any() or model.text.mean.any()):
        raise flame.InputError("--pool released: the mean of states as they are goes with checkpoints without text projection; leave the flag out")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.words:
        return words(args, model, llm)
    cached = cache.open_cache(args.out / "cache.sqlite")
    # The one place where the text tower is made, and only if a text is not cached.
    @functools.cache
    def encoder():
        tower = flame.TextEncoder(llm, args.device, dtype, source["layer"], source["positions"])
        if tower.dim != model.config["text_dim"]:
            raise flame.InputError(f"{llm}: its states have {tower.dim} dimensions, {checkpoint} was trained for {model.config['text_dim']}; name the right LLM with --llm")
        return tower

    text_tower = None if args.probe else f"{flame.llm_fingerprint(llm)} {source['layer']} {source['positions']} {dtype}"
    image_tower = cache.image_tower_name(model, dtype)
    embed_images = lambda pictures, patches=False: encode_images(model, pictures, args.device, args.batch_size, cached, lambda picture: cache.picture_key(
        image_tower + "-patches" * patches, picture), patches)
    embed_texts = lambda texts, prompts, keep=False: encode_texts(model, encoder, texts, prompts, args.device, cached, text_tower, pool, keep)
    if args.search:
        return search(args, model, embed_texts, image_tower)

    kinds = {"demo": ["demo"], "retrieval": benchmarks.RETRIEVAL, "multilingual": benchmarks.MULTILINGUAL, "composition": benchmarks.COMPOSITION}
    kind = next((kind for kind, names in kinds.items() if args.bench in names), "classification")
    result, shown = run_probe(data, train, embed_images, args.device) if args.probe else globals()[f"run_{kind}"](*data, embed_images, embed_texts, args.prompts)
    result = {"bench": args.bench, "checkpoint": str(checkpoint), "split": args.split, **({"pool": pool} if pool != "cosine" else {}), **result}
    print("\n".join(report.table(result)))
    written = []

    def keep(ending, save):
        written.append(str(args.out / f"{args.bench}{'-probe' * args.probe}{ending}"))
        cache.write(Path(written[-1]), save)

    if args.facets:
        result["facets"] = ablation(embed_texts(shown.texts, shown.prompts, keep=True), shown.image, shown.text_ids, pool, *args.facets.split(".."))
        print("\n".join(report.facet_table(result["facets"])))
        keep("-facets.png", report.draw_facets(result["facets"]).save)
    keep(".json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    queries, pictures = [], shown.pictures if shown else []
    if shown:
        ranks = first_hit_ranks(shown.text, shown.image, shown.text_ids, shown.image_ids)
        order = np.random.default_rng(SEED).permutation(len(ranks))
        keep(".png", report.draw_sheet(report.found_for(shown, np.sort(order[:8]), ranks), pictures).save)
        drawn = np.concatenate([order[ranks[order] == 0][:6], order[ranks[order] > 0][:6]])     # for the page: right ones, wrong ones
        facets = embed_texts([shown.texts[i] for i in drawn], shown.prompts, keep=True) if args.report and kind != "classification" else None
        queries = report.found_for(shown, drawn, ranks, facets)
    if args.report:
        keep(".html", lambda path: path.write_text(report.page(result, queries, pictures), encoding="utf-8"))
    print(f"-> {', '.join(written)}")


@torch.inference_mode()
def patch_states(model, pixels):
    """[3, H, W] -> [g, g, D]: the picture's patches, four pooled to one where their grid is even, projected into the LLM's space.

    A text projection led out of that space: undone here is what it does to the whole of a long caption (column long.0).
    """
    patches = model.visual(pixels[None])[0, 1:]
    side = round(len(patches) ** 0.5)
    pool = lambda x: torch.nn.functional.avg_pool2d(x.T.reshape(-1, side, side), 2 - side % 2).flatten(1).T
    states = model.mm(pool(patches)) if model.config["pool_first"] else pool(model.mm(patches))
    c, text = flame.COLUMNS.index("long.0"), model.text
    if text.weight is not None:
        states = torch.linalg.solve(text.weight, states.T).T
    basis, rest = text.basis[c], text.rest[c].clamp_min(1e-6)
    along = states @ basis
    states = (states - along @ basis.T) / rest + (along / (text.gain[c] + rest)) @ basis.T
    return states.reshape(int(len(states) ** 0.5), -1, states.shape[-1])


def words(args, model, llm):
    """Prints, and draws over the picture, the whole word that the LLM's unembedding finds nearest to each patch (paper: semantic interpretation)."""
    try:
        with report.open_picture(args.words) as image:
            pixels, image = model.preprocess(image), image.convert("RGB")
    except Exception as error:  # decoders raise nearly anything on a stranger's bytes
        raise flame.InputError(f"{args.words}: {' '.join(str(error).split())}; --words wants a picture") from None
    norm, unembedding = flame.load_unembedding(llm)
    if len(norm) != model.config["text_dim"]:
        raise flame.InputError(f"{llm}: its states have {len(norm)} dimensions, the checkpoint was trained for {model.config['text_dim']}; name the right LLM with --llm")
    tokenizer = flame.load_tokenizer(llm)
    names = [tokenizer.decode([token]) for token in range(len(unembedding))]
    whole = torch.tensor([i for i, name in enumerate(names) if len(name) > 3 and name[0] == " " and name[1:].isalpha()])   # parts of words say little
    if not len(whole):
        raise flame.InputError(f"{llm}: its tokenizer has no token that is a whole word")
    nearest = (patch_states(model, pixels.to(args.device)).cpu() * norm @ unembedding[whole].T).argmax(-1)    # an RMSNorm's scale changes no order
    grid = [[names[whole[token]].strip() for token in row] for row in nearest]
    print("\n".join("  ".join(f"{word:14}" for word in row).rstrip() for row in grid))
    cache.write(args.out / "words.png", report.draw_words(image, grid).save)
    print(f"-> {args.out / 'words.png'}")


def search(args, model, embed_texts, image_tower):
    """Ranks the pictures under a folder by a text; what the image tower says of them is kept beside them."""
    folder, index_path = benchmarks.need(args.images), args.images / ".flame-index.npz"
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in benchmarks.IMAGE_SUFFIXES)
    key = lambda picture: cache.picture_key(image_tower, picture, folder)
    index = dict(before := cache.read_index(index_path))
    image, kept = encode_images(model, pictures, args.device, args.batch_size, index, key, least=1)
    index = {name: index[name] for name in map(key, pictures) if name in index}     # what is gone or changed is dropped
    if index.keys() != before.keys():
        cache.write_index(index_path, index)
    prompts = args.prompts or ("long" if len(args.search.split()) > 15 else "raw")
    shown = Shown([args.search], embed_texts([args.search], prompts), [pictures[i] for i in kept], image, np.array([-1]), np.arange(len(image)), prompts)
    rows = report.found_for(shown, [0], None, found=10)
    for place, tile in enumerate(rows[0]["found"], 1):
        print(f"{place:3}  {tile['score']:.4f}  {report.printable(shown.pictures[tile['picture']])}")
    args.out.mkdir(parents=True, exist_ok=True)
    cache.write(args.out / "search.png", report.draw_sheet(rows, shown.pictures, named=True).save)
    print(f"the best of {len(image)} pictures, prompts {prompts}   -> {args.out / 'search.png'}")


if __name__ == "__main__":
    sys.exit(main())
