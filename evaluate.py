"""Stage 3: checkpoint + benchmark -> Recall@K or accuracy, in plain numpy.

    python evaluate.py --bench demo                       # all parts of the demo -> results/demo.json, .png
    python evaluate.py --bench urban1k                    # data/urban1k, with the newest checkpoint
    python evaluate.py --bench long                       # urban1k sharegpt4v dci docci, and their average
    python evaluate.py --captions mine.tsv                # your own images and captions -> results/mine.json
    python evaluate.py --compare a/urban1k.json b/urban1k.json
    python evaluate.py --search "a red kite" --images DIR # rank the images of a folder -> results/search.png
    python evaluate.py --search --images DIR              # the same as an interactive page

data/README.md lists the benchmarks, their sources and layouts. Captions use the seven facets of the *long*
prompt set, class names and XM3600 the single *raw* prompt. The demo's raw, short and long captions use the
set of that name, reworded captions all three. Facets that the checkpoint was not trained on are left out. A
text embedding is the mean over facets of unit vectors, so a dot product with a unit image embedding is the
mean over facets of the cosine.

Every percentage has a 95% bootstrap interval. Ties count against the model: a constant model scores
at most chance. Beside each JSON, an .npz has every query's hits and the bootstrap samples, for --compare.
"""
import hashlib
import re
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import flame
from data import benchmarks, common
from data.captions import read_table
from data.common import Parser, number
from data.encoders import encode_images, encode_texts, local_paths, open_encoders, trained_facets
from data.show import search
from data.show.sheet import Examples, draw_sheet
from data.sources import source_name
from flame import InputError, content_hash

RECALL_AT = (1, 5, 10)
MAX_SIMILARITIES = 1 << 22         # in memory at once, 16 MiB
DEMO_TEMPLATE = "a picture of {}"  # on the validation split, synonyms score lower without a template
GALLERY = 24                       # names per gallery of unseen objects; with more, top-1 is too close to 0


# ------------------------------------------------------------------------------------------------------------
# 1. Metrics

def retrieval_ranks(queries, gallery, query_ids, gallery_ids):
    """Return the rank of the best correct item of each query, int [Q, 1]; 0 is the first place.

    queries [Q, D], gallery [G, D], query_ids int [Q], gallery_ids int [G]. An item is correct if the ids are
    equal; a query without a correct item gets rank G. Wrong items with the score of the best correct item
    rank before it. Raises InputError for NaN or infinity, since every comparison with NaN is false.
    """
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise InputError("embeddings are NaN or infinite: the checkpoint is damaged or its training "
                         "diverged; train it again")
    ranks = np.zeros((len(queries), 1), int)
    n = max(1, MAX_SIMILARITIES // len(gallery))
    for start in range(0, len(queries), n):
        rows = slice(start, start + n)
        scores = queries[rows] @ gallery.T
        correct = query_ids[rows, None] == gallery_ids
        # Take correct scores from the same matrix product: a separate one could break ties by rounding.
        best = np.where(correct, scores, -np.inf).max(1, keepdims=True)
        ranks[rows] = np.count_nonzero(~correct & (scores >= best), axis=1, keepdims=True)
    return ranks


def retrieval_hits(text, image, image_of_text):
    """Return {direction: (hits bool [Q, 3] within the first 1, 5, 10; groups int [Q]; n_groups)}.

    groups: the image of each query, for the bootstrap (section 2). Arguments as for retrieval().
    """
    owner = np.asarray(image_of_text)
    with_text = np.unique(owner)  # in image-to-text, an image without a text is not a query
    image_ranks = retrieval_ranks(text, image, owner, np.arange(len(image)))
    text_ranks = retrieval_ranks(image[with_text], text, with_text, owner)
    return {"text_to_image": (image_ranks < RECALL_AT, owner, len(image)),
            "image_to_text": (text_ranks < RECALL_AT, with_text, len(image))}


def retrieval(text, image, image_of_text):
    """Return Recall@1, 5, 10 in percent: {"text_to_image": {"R@1", "R@5", "R@10"}, "image_to_text": {...}}.

    text [N, D] (the mean over facets of unit vectors), image [M, D] (unit vectors), image_of_text int [N]. An
    image may have several texts; in image-to-text, the best-ranked one counts. An image without a text is
    in the gallery, but not a query. Raises InputError if a value is NaN or infinite.
    """
    hits = retrieval_hits(text, image, image_of_text)
    return {direction: by_cutoff((100 * hit.mean(0)).tolist()) for direction, (hit, *_) in hits.items()}


def classification_hits(image, classes, labels, names):
    """Return {"top1": hits [M, 1], "top5": hits [M, 1], "mean_per_class": top-1 of each class [c, 1]}.

    image [M, D], classes [C, D], labels int [M], C class names. A class without images can be predicted,
    but does not enter the mean. Classes with the same name have the same embedding. As with argmax, the
    first of them ranks before the others.
    """
    first = np.array([names.index(name) for name in names])  # the first class with the same name
    ranks = retrieval_ranks(image, classes, first[labels], first) + (first[labels] != labels)[:, None]
    per_class = [(ranks[labels == c] < 1).mean(0) for c in np.unique(labels)]
    return {"top1": ranks < 1, "top5": ranks < 5, "mean_per_class": np.array(per_class)}


def classification(image, classes, labels):
    """Return zero-shot accuracy in percent: {"top1", "top5", "mean_per_class"}.

    image [M, D], classes [C, D], labels int [M]. "mean_per_class" is top-1 averaged over classes.
    """
    hits = classification_hits(image, classes, np.asarray(labels), range(len(classes)))
    return {name: 100 * float(column.mean()) for name, column in hits.items()}


# ------------------------------------------------------------------------------------------------------------
# 2. Bootstrap intervals. A metric is a mean of hits. Its 95% interval comes from 1,000 resamples, the same
# for metrics with equally many groups. Queries that fail together, such as captions of one image, form a
# group.

SEED = 0
RESAMPLES = 1000


class Metric(NamedTuple):
    """F percentages, such as Recall@1, 5 and 10 of one direction."""
    samples: np.ndarray      # [1 + RESAMPLES, F], from bootstrap()
    hits: np.ndarray = None  # [Q, F], per query, or None for an average of metrics


@np.errstate(invalid="ignore")  # a resample without any query is NaN
def bootstrap(hits, groups, n_groups):
    """Return percentages [1 + RESAMPLES, F]: the mean of hits [Q, F], then that of each resample.

    hits: bool or fractions. groups: int [Q], below n_groups. Results with the same n_groups use the same
    resamples, so rows can be averaged and subtracted; the interval of a difference is then a paired one.
    """
    total = np.stack([np.bincount(groups, column, n_groups) for column in hits.T])
    count = np.bincount(groups, minlength=n_groups)
    rng = np.random.default_rng(SEED)
    rows = [100 * hits.mean(0)]
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        rows.append(100 * (total @ times) / (count @ times))
    return np.array(rows)


def make_metrics(hits):
    """{name: (hits, groups, n_groups)} -> {name: Metric}"""
    return {name: Metric(bootstrap(*args), args[0]) for name, args in hits.items()}


def average_metrics(results):
    """Return {name: Metric}, the mean over results of each metric, resample by resample.

    The interval is right if the results are on the same images (they share resamples, which keeps their
    correlation) or on unrelated ones (then sharing has no effect).
    """
    first, *_ = results
    return {name: Metric(np.mean([result[name].samples for result in results], axis=0))
            for name, value in first.items() if isinstance(value, Metric)}


def interval(samples):
    """Return the 95% intervals [low, high] of F columns."""
    return np.nanpercentile(samples[1:], [2.5, 97.5], axis=0).T.tolist()


def cells(samples):
    """Format F percentages with their intervals as a list of F strings."""
    names = [f"R@{k}" for k in RECALL_AT] if samples.shape[1] > 1 else [""]
    return ["{:5}{:5.1f} [{:5.1f}, {:5.1f}]   ".format(name, percent, *ends)
            for name, percent, ends in zip(names, samples[0], interval(samples))]


def by_cutoff(columns):
    """Three columns -> {"R@1", "R@5", "R@10"}; a single one -> its value."""
    return dict(zip([f"R@{k}" for k in RECALL_AT], columns)) if len(columns) > 1 else columns[0]


def with_intervals(scores, arrays, path=""):
    """Return a result for its JSON file: Metrics become percentages, with their intervals under "ci95".

    arrays: filled with {"part/metric": samples, "part/hits of metric": hits}.
    """
    result = {}
    ci95 = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            value = with_intervals(value, arrays, f"{path}{name}/")
        if isinstance(value, Metric):
            arrays[path + name] = value.samples
            if value.hits is not None:
                arrays[f"{path}hits of {name}"] = value.hits
            ci95[name] = by_cutoff(interval(value.samples))
            value = by_cutoff(value.samples[0].tolist())
        result[name] = value
    return result | ({"ci95": ci95} if ci95 else {})


def compare(first, second):
    """Print each metric of two results and the paired difference (of Recall@K, only R@1).

    first, second: the .json files; the .npz beside each is read.
    """
    with flame.reading(first.with_suffix(".npz"), "evaluate it again") as path:
        ours = dict(np.load(path))
    with flame.reading(second.with_suffix(".npz"), "evaluate it again") as path:
        theirs = dict(np.load(path))
        if str(ours.pop("queries")) != str(theirs.pop("queries")):
            raise InputError(f"{first} and {second}: their queries differ; evaluate both on the same data")
        lines = ["{:36}{!s:26}{!s:26}first - second".format("R@1 or accuracy", first, second)]
        for name, samples in ours.items():
            if "hits of" not in name and name in theirs:  # skip what only one has
                pair = np.stack([samples, theirs[name]])  # refuses different shapes
                columns = [cells(rows[:, :1])[0] for rows in (*pair, np.subtract(*pair))]
                lines.append(f"{name:36}{''.join(columns)}")
    print(*lines, sep="\n")


# ------------------------------------------------------------------------------------------------------------
# 3. Scorers. Each takes the encoders, one or more `prompts`, and what the benchmark's reader returns. An
# argument `prompts` is the name of a prompt set, or several names with spaces between them, whose facets are
# then used together. A scorer returns a pair: a result (a dict with Metrics), and Examples for the contact
# sheet or None. score_names helps score_demo.

def summarize(locations, image, prompts, chance, results):
    """Return a scorer's result for {language: result}: the only one, or their mean and "languages"; also the
    fields that all scorers have. image: embeddings of the images that could be read.
    """
    only, *others = results.values()
    merged = average_metrics(results.values()) | {"languages": results} if others else only
    return {"n_images": len(image), "skipped_images": len(locations) - len(image), "prompts": prompts,
            "chance": chance, **merged}


def score_captions(encoders, prompts, locations, languages):
    """Score retrieval for {language: (texts, image_of_text)}, and their average if there are several.

    Empty texts and texts of unreadable images are skipped. Images without a text stay in the gallery.
    """
    image, readable = encode_images(encoders, locations)
    row_of = {i: row for row, i in enumerate(readable)}
    gallery = [locations[i] for i in readable]
    results = {}
    examples = None
    for language, (texts, image_of_text) in languages.items():
        pairs = [(text, row_of[i]) for text, i in zip(texts, image_of_text) if text and i in row_of]
        if len(pairs) < 2:
            raise InputError(f"fewer than 2 {language} texts can be scored; {benchmarks.FIX}")
        queries, rows = zip(*pairs)
        text = encode_texts(encoders, queries, prompts)
        results[language] = {"n_texts": len(queries), **make_metrics(retrieval_hits(text, image, rows))}
        if not examples or language == "en":
            examples = Examples(queries, text, gallery, image, np.array(rows), prompts)
    n_texts = sum(result["n_texts"] for result in results.values())
    return {**summarize(locations, image, prompts, 100 / len(image), results), "n_texts": n_texts,
            "skipped_texts": sum(len(texts) for texts, _ in languages.values()) - n_texts}, examples


def score_classes(encoders, prompts, locations, labels, names, templates):
    """Score zero-shot classification. A class embedding is the normalized mean over templates.

    templates: with {} for the name (benchmarks.py has converted CLIP_benchmark's {c}).
    """
    image, readable = encode_images(encoders, locations)
    texts = [template.replace("{}", name) for name in names for template in templates]
    text = encode_texts(encoders, texts, prompts)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    classes = text.reshape(len(names), len(templates), -1).mean(1)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    hits = classification_hits(image, classes, np.array(labels)[readable], names)
    metrics = make_metrics({name: (hit, np.arange(len(hit)), len(hit)) for name, hit in hits.items()})
    return {**summarize(locations, image, prompts, 100 / len(names), {"": metrics}),
            "n_classes": len(names)}, None


def score_demo(encoders, raw, short, long, scenes, captions, objects, names, synonyms):
    """Score all parts of the demo. raw, short, long: the prompt sets for captions of these kinds; names use
    raw. The other arguments are described in benchmarks.demo. The parts are

    long, short, raw   retrieval of scenes by their captions. Raw captions are often equal or fit several
                       scenes; only the scene that they were written for is correct.
    reworded           the same by captions in words that no training caption has, with all three prompt sets
    seen               zero-shot classification of single-object images, among the names of seen objects
    unseen             the same for objects not in training, in n galleries of GALLERY names, averaged.
                       Related objects are adjacent in the list, so each gallery takes every n-th one.
    multilingual       like seen, with names in another language; one result per language, and the average.
                       Objects with the same name are one class.
    synonyms           like seen, with other English names, one set for val and one for test
    """
    parts = {}
    sheets = {}
    prompts_of = {"long": long, "short": short, "raw": raw,
                  "reworded": " ".join(dict.fromkeys((raw, short, long)))}  # better than one set
    for kind, prompts in prompts_of.items():
        data = {kind: (captions[kind], range(len(scenes)))}
        parts[kind], sheets[kind] = score_captions(encoders, prompts, scenes, data)
    seen, unseen = ([(location, thing) for location, thing, group in objects if group == wanted]
                    for wanted in ("seen", "unseen"))
    things = list(dict.fromkeys(thing for _, thing in unseen))
    n = max(1, len(things) // GALLERY)
    translations = dict(names)
    english = translations.pop("en")
    galleries = {f"gallery {i + 1} of {n}": {thing: english[thing] for thing in things[i::n]}
                 for i in range(n)}
    for part, images, languages in (("seen", seen, {"en": english}), ("unseen", unseen, galleries),
                                    ("multilingual", seen, translations), ("synonyms", seen, synonyms)):
        if languages:  # the quick demo has no translations
            parts[part] = score_names(encoders, raw, images, languages)
    return {**parts["long"], "parts": parts}, sheets["long"]  # the headline is that of long captions


def score_names(encoders, prompts, images, languages):
    """Score images [(location, object)] among the names of each language, and return the average over them.

    languages: {language: {object: name}}; any other label of a set of names will do, such as a gallery.
    Names are put into DEMO_TEMPLATE. Resampling is by object, because images of one object fail together.
    """
    image, readable = encode_images(encoders, [location for location, _ in images])
    things = [images[i][1] for i in readable]
    unique, groups = np.unique(things, return_inverse=True)
    filled = {language: np.array([DEMO_TEMPLATE.format(names[thing]) if thing in names else ""
                                  for thing in things]) for language, names in languages.items()}
    texts = list(filter(None, chain(*filled.values())))
    embedding_of = dict(zip(texts, encode_texts(encoders, texts, prompts)))  # in one pass of the LLM
    results = {}
    for language, correct in filled.items():
        rows = np.flatnonzero(correct)  # a gallery contains only some of the objects
        choices, labels = np.unique(correct[rows], return_inverse=True)
        classes = np.array([embedding_of[text] for text in choices])
        ranks = retrieval_ranks(image[rows], classes, labels, np.arange(len(choices)))
        hits = {f"top{k}": (ranks < k, groups[rows], len(unique)) for k in (1, 5)}
        results[language] = {"n_images": len(rows), "n_classes": len(choices), **make_metrics(hits)}
    sizes = np.array([result["n_classes"] for result in results.values()])
    return {**summarize(images, image, prompts, float(np.mean(100 / sizes)), results),
            "n_classes": int(sizes.max())}


class Benchmark(NamedTuple):
    """How --bench NAME is scored. Its files are read by data/benchmarks.py."""
    score: Callable           # one of the scorers above
    prompts: str = "long"     # each word is an argument of `score`; --prompts replaces every word
    max_captions: int = None  # only an image's first captions, unless --all-captions is given
    members: tuple = ()       # of a group


CAPTIONS = Benchmark(score_captions)
LONG = "urban1k", "sharegpt4v", "dci", "docci"
SHORT = "coco", "flickr30k"  # the paper's short captions
TEN = ("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "dtd", "pets", "caltech101",
       "flowers102")  # the paper's average
BENCHMARKS = {
    "demo": Benchmark(score_demo, "raw short long"),
    **dict.fromkeys(LONG, CAPTIONS),
    **dict.fromkeys(SHORT, Benchmark(score_captions, max_captions=5)),
    "flickr8k": Benchmark(score_captions, "raw", 5),
    "xm3600": Benchmark(score_captions, "raw", 1),
    **dict.fromkeys(("imagenet", "imagefolder", *TEN), Benchmark(score_classes, "raw")),
    "long": Benchmark(score_captions, members=LONG),
    "short": Benchmark(score_captions, max_captions=5, members=SHORT),
    "classification10": Benchmark(score_classes, "raw", members=TEN),
}
# The paper's results, by training set; more in data/README.md.
PAPER_RESULTS = {
    "urban1k": "R@1 text to image 66.6 (CC3M), 87.9 (YFCC15M), image to text 65.3, 84.0",
    "sharegpt4v": "R@1 text to image 80.0 (CC3M), 93.2 (YFCC15M), image to text 85.6, 94.1",
    "dci": "R@1 text to image 49.3 (CC3M), 68.1 (YFCC15M), image to text 50.8, 66.1",
    "docci": "R@1 text to image 51.9 (CC3M), 76.2 (YFCC15M), image to text 54.5, 75.8",
    "xm3600": "R@1 text to image 49.0, image to text 51.7 (YFCC15M, 36 languages)",
    "classification10": "top1 40.3 (CC3M)",
}


# ------------------------------------------------------------------------------------------------------------
# 4. Command line

def parse_arguments(argv):
    """Parse the command line and check what can be checked without reading files."""
    parser = Parser(usage="evaluate.py --bench NAME | --captions FILE | --compare A B | --search TEXT",
                    description="Evaluates a checkpoint; writes <out>/<bench>.json, .npz, .png. "
                                f"NAME: {' '.join(BENCHMARKS)} (data/README.md).")
    mode = parser.add_mutually_exclusive_group(required=True).add_argument
    mode("--bench", choices=BENCHMARKS, metavar="NAME", help="benchmark to evaluate on")
    mode("--captions", type=Path, metavar="FILE", help="your own images and captions, as for embed.py")
    mode("--compare", type=Path, nargs=2, metavar="JSON", help="paired difference of two results")
    mode("--search", metavar="TEXT", nargs="*", help="rank images by TEXT or an image; no TEXT: a web page")
    add = parser.add_argument
    add("--top", type=number(int, 1), default=10, metavar="N", help="images per --search query (default: 10)")
    add("--images", type=Path, metavar="DIR", help="the images to search, or those of --captions")
    add("--checkpoint", type=Path, metavar="PATH", help="default: the newest finished one under out/")
    add("--open-clip", metavar="MODEL:WEIGHTS", help="evaluate this open_clip model instead of a checkpoint")
    add("--llm", type=Path, metavar="DIR", help="default: $FLAME_LLM, or the one of training")
    add("--data-root", type=Path, metavar="DIR", help="default: data/<bench>; for a group: data")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--split", choices=("test", "val"), default="test", help="default: test; choose settings on val")
    add("--prompts", choices=flame.PROMPTS,
        help="prompt set; with --captions, also which captions are scored (default: see data/README.md)")
    add("--all-captions", action="store_true",
        help="use all captions per image (default: the first 5 of coco and flickr30k, the first of xm3600)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available")

    args = parser.parse_args(argv)
    args.benchmark = BENCHMARKS.get(args.bench, CAPTIONS)
    common.get_device(args.device)
    args.prompt_sets = [args.prompts or prompts for prompts in args.benchmark.prompts.split()]
    return args


def main(argv=None):
    def body():
        args = parse_arguments(argv)
        if args.compare:
            return compare(*args.compare)
        flame.keep_freed_memory()
        data = read(args)  # before loading the model, so a wrong folder is found at once
        encoders, args.checkpoint = open_encoders(args)
        with common.output_folder(args.out):
            if not data:
                return search.search(args, benchmarks.images_in(args.images), encoders)
            results = {name: evaluate(args, name, encoders, *data[name]) for name in data}
            if args.benchmark.members:
                queries = str([result["queries"] for result in results.values()])
                report(args, args.bench, queries, average_metrics(results.values()) | {"benchmarks": results})

    return common.run_stage("evaluate.py", body, "run the same command again to resume from the cache")


def read(args):
    """Return {name: data of the benchmark}; {} for --search."""
    if args.captions:
        return {source_name(args.captions):
                benchmarks.read_captions(args.captions, args.images, args.split, *args.prompt_sets)}
    if not args.bench:
        if not args.images:
            raise InputError("--search needs --images DIR")
        return {}
    members = args.benchmark.members
    root = args.data_root or Path("data", "" if members else args.bench)
    roots = {name: root / name for name in members} or {args.bench: root}
    max_captions = None if args.all_captions else args.benchmark.max_captions
    return {name: benchmarks.read(name, root, args.split, max_captions) for name, root in roots.items()}


def evaluate(args, name, encoders, *data):
    """Score a benchmark and report it. Returns what report() returns."""
    columns = [f"{prompts}.{k}" for prompts in dict.fromkeys(args.prompt_sets)
               for k in trained_facets(encoders.model, prompts)]
    scores, examples = args.benchmark.score(encoders, *args.prompt_sets, *data)
    scores["columns"] = columns
    if args.captions:
        scores["texts_in_training"] = count_trained(examples.texts, args.checkpoint)
    # In the repr of an ImageLocation, drop the folder: it may differ between machines.
    queries = re.sub(r"path=(['\"]).*?([^/]*)\1, offset", r"\2",
                     repr([name, args.split, data, scores["skipped_images"], examples and examples.images]))
    return report(args, name, queries, scores, examples)


def heading(name, scores):
    """Return a line of a result's name, counts and chance."""
    counts = [f"{key.removeprefix('n_').replace('_', ' ')} {round(value, 1)}"
              for key, value in scores.items() if isinstance(value, (int, float)) and value]
    return f"{name}: {', '.join(counts) or 'mean'}"


def print_result(name, scores, arrays):
    """Print a result, or each of its parts: the counts, then the metrics (arrays, from with_intervals()). The
    languages of a part are only in the JSON file.
    """
    parts = scores.get("parts", {})
    for part, result in (parts or {name: scores}).items():
        print(heading(part, result))
        prefix = f"parts/{part}/" if parts else ""
        for path, samples in arrays.items():
            metric = path.removeprefix(prefix)
            if path.startswith(prefix) and "hits of" not in metric and not (parts and "/" in metric):
                print(f"    {metric:26} {''.join(cells(samples))}")


def report(args, name, queries, scores, examples=None):
    """Print a result and the paper's; write its JSON, contact sheet, and .npz for --compare.

    An open_clip model's files are named <bench>-<model>-<weights>. queries: text that identifies the queries,
    to be hashed. Returns scores with bench, checkpoint, split and the hash of queries added.
    """
    queries = hashlib.sha256(queries.encode("utf-8", "replace")).hexdigest()
    scores = {"bench": name, "checkpoint": str(args.checkpoint), "split": args.split, "queries": queries,
              **scores}
    arrays = {}
    result = with_intervals(scores, arrays)
    print_result(name, scores, arrays)
    if args.bench and name in PAPER_RESULTS:
        print(f"    paper: {PAPER_RESULTS[name]} (Cao, Wei, Ma, CVPR 2025)")
    model = [Path(part).stem for part in args.open_clip.split(":")] if args.open_clip else []
    path = args.out / "-".join([name, *model])
    if examples:
        draw_sheet(examples, f"{heading(name, scores)}; {args.checkpoint}", f"{path}.png")
    common.atomic_save(f"{path}.npz", lambda temporary: np.savez_compressed(temporary, queries=queries,
                                                                            **arrays))
    common.write_json(f"{path}.json", result)
    print(f"-> {path}.json, .npz")
    return scores


def count_trained(texts, checkpoint):
    """Return how many of the texts are also training captions, or None if that store is not found."""
    with suppress(Exception):
        store = flame.open_store(local_paths(checkpoint)["store"])
        record = flame.read_json(Path(checkpoint, "config.json"))
        if record["store"]["content_hash"] == content_hash(store):  # otherwise the store was replaced
            trained = set(texts).intersection(chain.from_iterable(read_table(store.path / "captions.tsv")))
            return sum(text in trained for text in texts)


if __name__ == "__main__":
    sys.exit(main())
