"""Stage 3: how good is a checkpoint? Recall@K and accuracy, in plain numpy.

    python evaluate.py --bench demo                       # all parts of the demo -> results/demo.json, .png
    python evaluate.py --bench urban1k                    # data/urban1k, by the newest checkpoint
    python evaluate.py --bench long                       # urban1k sharegpt4v dci docci, and their average
    python evaluate.py --bench demo --facets              # and what each facet is worth
    python evaluate.py --captions mine.tsv                # your own pictures, captions -> results/mine.json
    python evaluate.py --compare a/urban1k.json b/urban1k.json
    python evaluate.py --search "a red kite" --images DIR # any folder, any text -> results/search.png
    python evaluate.py --search --images DIR              # the same as a page that answers
    python evaluate.py --vectors out.npy --images DIR     # a unit vector a picture; their paths in out.txt

data/README.md says which benchmarks there are, where each comes from and how it must lie. Texts of retrieval
go through the seven facets of the *long* prompt set, the demo's raw captions, class names and other languages
through the one *raw* prompt; of these, only the facets that the checkpoint was trained on are asked. A text
is the mean over facets of unit facet vectors, so that one dot product with a unit image vector is the mean
over facets of the cosine.

Every percentage comes with a 95% bootstrap interval. Ties count against the model: one that says the same of
everything scores at most chance. Beside each JSON lies an .npz of every query's hits, which --compare reads.
"""
import hashlib
import re
import sys
from contextlib import suppress
from itertools import chain, combinations
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import flame
from data import benchmarks, files
from data.captions import read_table
from data.checkpoint import identity
from data.command import Parser, bar, number, run, usable_device
from data.intervals import RECALL_AT, averaged, compare, named, scored, with_intervals
from data.show import search, table
from data.show.sheet import Shown, draw_sheet
from data.sources import source_name
from data.towers import encode_facets, encode_images, encode_texts, open_towers, trained_facets
from flame import InputError

BLOCK = 1 << 22                 # similarities held at once: 16 MiB, whatever the size of the gallery
DEMO_TEMPLATE = "a picture of {}"   # of names; bare, they find less by synonym on the validation split
GALLERY = 24                    # names of unseen objects to choose from: among many more, few are ever right


# ------------------------------------------------------------------------------------------------------------
# 1. Metrics

def first_hit_ranks(queries, gallery, query_ids, gallery_ids):
    """Rank of the best-ranked right answer of each query, 0 for the first place.

    queries [Q, D], gallery [G, D], query_ids int [Q], gallery_ids int [G] -> int [Q]. An item is a right
    answer where the ids are equal; a query without any ranks last. Wrong items that score the same as the
    best right one rank before it. Raises InputError for NaN or infinity: every comparison with NaN is False.
    """
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise InputError("vectors are NaN or infinite: the checkpoint is damaged or its training diverged; "
                         "train it anew")
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
    """-> {direction: (hits [Q, 3] within the first 1, 5, 10; which image each is of; how many images)}"""
    owner = np.asarray(image_of_text)
    asked = np.unique(owner)                            # image to text: an image without a text is no query
    ranks = {"text_to_image": (first_hit_ranks(text, image, owner, np.arange(len(image))), owner),
             "image_to_text": (first_hit_ranks(image[asked], text, asked, owner), asked)}
    return {way: (rank[:, None] < np.array(RECALL_AT), group, len(image))
            for way, (rank, group) in ranks.items()}


def retrieval(text, image, image_of_text):
    """Recall@1, 5, 10, percent -> {"text_to_image": {"R@1", "R@5", "R@10"}, "image_to_text": {...}}

    text [N, D], image [M, D], image_of_text int [N]: one image a text, several texts an image; a text is the
    mean over facets of unit vectors, an image a unit vector. Image to text, the best-ranked of an image's own
    texts counts; an image without a text is in the gallery, but no query. Raises InputError if a value
    is NaN or infinite.
    """
    scores = hits_both_ways(text, image, image_of_text)
    return {way: named((100 * hits.mean(0)).tolist()) for way, (hits, *_) in scores.items()}


def hits_of_classes(image, classes, labels, names):
    """Zero-shot accuracy -> {"top1", "top5", "mean_per_class": hits [Q, 1]}, the last over classes: the wider
    interval and for unseen classes the honest one.

    image [M, D], classes [C, D], labels int [M], C names. Classes without a picture can be guessed, but have
    no mean of their own. Classes of the very same name have one vector, and no model could tell them apart,
    so that their tie does not count against it: the first one listed ranks first, as argmax has it, and a
    picture of the second is right at top 2 at best.
    """
    first = np.array([names.index(name) for name in names])     # class of that name
    ranks = first_hit_ranks(image, classes, first[labels], first) + (first[labels] != labels)
    per_class = [(ranks[labels == c] < 1).mean() for c in np.unique(labels)]
    return {"top1": ranks[:, None] < 1, "top5": ranks[:, None] < 5,
            "mean_per_class": np.array(per_class)[:, None]}


def classification(image, classes, labels):
    """Zero-shot accuracy, percent: {"top1", "top5", "mean_per_class"}, the last being top-1 averaged over
    classes. image [M, D], classes [C, D], labels int [M]; see hits_of_classes().
    """
    hits = hits_of_classes(image, classes, np.asarray(labels), list(range(len(classes))))
    return {name: 100 * float(column.mean()) for name, column in hits.items()}


def ablation(facets, image, owner, prompts, trained):
    """Retrieval with some facets only, from one set of embeddings [N, K, D]: the first n of them, all but
    one, one alone. Inference only: the checkpoint stays as trained.

    trained: which questions of the prompt set the K facets are, from 0. -> {"long facets 1,2,4": Figures}
    """
    every = tuple(range(len(trained)))
    subsets = [every[:n + 1] for n in every] + [*combinations(every, len(every) - 1), *zip(every)]
    scores = {}
    for subset in bar(dict.fromkeys(filter(None, subsets)), "facets", unit=" subsets"):
        numbers = ",".join(str(trained[k] + 1) for k in subset)
        hits = hits_both_ways(facets[:, subset].mean(1), image, owner)
        scores[f"{prompts} facets {numbers}"] = scored(hits)
    return scores


# ------------------------------------------------------------------------------------------------------------
# 2. Scorers take the towers, the prompt sets to ask by, and what the benchmark's reader returns. They return
# the result, with a Figure for each of its figures, and what is shown of it.

def together(results):
    """The one result of {language: result}; of several the mean, and each of them."""
    if len(results) == 1:
        return next(iter(results.values()))
    return averaged(results.values()) | {"languages": results}


def counted(pictures, image, prompts, chance):
    """What all results begin with. image: vectors of those pictures that could be read."""
    return {"n_images": len(image), "skipped_images": len(pictures) - len(image), "prompts": prompts,
            "chance": chance}


def score_captions(towers, prompts, pictures, languages):
    """Retrieval in each of {language: (texts, image_of_text)} and the plain average; mostly there is one.

    Empty texts are left out, and the texts of pictures that could not be read; pictures without a text stay
    distractors in the gallery.
    """
    image, kept = encode_images(towers, pictures)
    row_of = {picture: row for row, picture in enumerate(kept)}
    gallery = [pictures[i] for i in kept]
    results = {}
    shown = None
    for language, (texts, image_of_text) in languages.items():
        pairs = [(text, row_of[i]) for text, i in zip(texts, image_of_text) if text and i in row_of]
        if len(pairs) < 2:
            raise InputError(f"{language} {len(pairs)} of {len(texts)} texts have a readable picture, at "
                             f"least 2 are needed; {benchmarks.CURE}")
        asked, owner = zip(*pairs)
        text = encode_texts(towers, asked, prompts)
        results[language] = {"n_texts": len(asked), **scored(hits_both_ways(text, image, owner))}
        if not shown or language == "en":
            shown = Shown(asked, text, gallery, image, np.array(owner), prompts)
    n_texts = sum(result["n_texts"] for result in results.values())
    skipped = sum(len(texts) for texts, _ in languages.values()) - n_texts
    return {**counted(pictures, image, prompts, 100 / len(image)), "n_texts": n_texts,
            "skipped_texts": skipped, **together(results)}, shown


def score_classes(towers, prompts, pictures, labels, names, templates):
    """Pictures among all classes: each name in every template, averaged and normalised again."""
    image, kept = encode_images(towers, pictures)
    labels = np.array(labels)[kept]
    filled = [template.replace("{}", name) for name in names for template in templates]
    vectors = encode_texts(towers, filled, prompts)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    classes = vectors.reshape(len(names), len(templates), -1).mean(1)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    figures = hits_of_classes(image, classes, labels, names)
    tops = scored({name: (hits, np.arange(len(hits)), len(hits)) for name, hits in figures.items()})
    return {**counted(pictures, image, prompts, 100 / len(names)), "n_classes": len(names), **tops}, None


def score_demo(towers, raw, short, long, scenes, captions, objects, names, synonyms):
    """All parts of the demo. Captions are asked by the set they are trained with, reworded ones by all.

    long, short, raw   retrieval among the scenes with those captions. Raw captions are often equal or fit
                       several scenes; only the scene they were written for counts.
    reworded           the same with captions in words that no training caption has
    seen               single-object pictures among the English names of all seen objects
    unseen             the same for objects that training never had, in galleries of GALLERY, averaged. They
                       take turns, so that each has some of every kind: related things are listed together.
    multilingual       the pictures of seen objects among the names of all seen objects in one language, for
                       each but English, and the average. Objects that share a name share a class.
    synonyms           the same among other names of all seen objects: the first on val, the second on test
    """
    parts = {}
    sheets = {}
    every = " ".join(dict.fromkeys((raw, short, long)))     # +3 points of R@10 on words that are unknown
    for kind, prompts in {"long": long, "short": short, "raw": raw, "reworded": every}.items():
        data = {kind: (captions[kind], range(len(scenes)))}
        parts[kind], sheets[kind] = score_captions(towers, prompts, scenes, data)
    things = list(dict.fromkeys(thing for _, thing, split in objects if split == "unseen"))
    count = max(1, len(things) // GALLERY)
    galleries = {
        "seen": {"en": names["en"]},
        "unseen": {str(n): {thing: names["en"][thing] for thing in things[n::count]} for n in range(count)},
        "multilingual": {language: several for language, several in names.items() if language != "en"},
        "synonyms": synonyms,
    }
    for part, languages in galleries.items():
        wanted = "unseen" if part == "unseen" else "seen"
        pictures = [(place, thing) for place, thing, split in objects if split == wanted]
        parts[part] = score_names(towers, raw, pictures, languages)
    return {**parts["long"], "parts": parts}, sheets["long"]    # the headline is the long captions'


def score_names(towers, prompts, pictures, languages):
    """[(picture, thing)] among those things' names, in DEMO_TEMPLATE, in each of {language: {thing: name}},
    and the mean over them. Intervals are over things: pictures of one thing fail together.
    """
    image, kept = encode_images(towers, [place for place, _ in pictures])
    things = [pictures[i][1] for i in kept]
    every, groups = np.unique(things, return_inverse=True)
    filled = {language: np.array([DEMO_TEMPLATE.format(names[thing]) if thing in names else ""
                                  for thing in things]) for language, names in languages.items()}
    texts = list(filter(None, chain(*filled.values())))
    vector_of = dict(zip(texts, encode_texts(towers, texts, prompts)))      # in one pass of the LLM
    results = {}
    for language, asked in filled.items():
        rows = np.flatnonzero(asked)    # a gallery of unseen objects has some
        choices, labels = np.unique(asked[rows], return_inverse=True)
        classes = np.array([vector_of[text] for text in choices])
        ranks = first_hit_ranks(image[rows], classes, labels, np.arange(len(choices)))
        tops = {f"top{k}": (ranks[:, None] < k, groups[rows], len(every)) for k in (1, 5)}
        results[language] = {"n_images": len(rows), "n_classes": len(choices), **scored(tops)}
    sizes = np.array([result["n_classes"] for result in results.values()])
    chance = float(np.mean(100 / sizes))
    return {**counted(pictures, image, prompts, chance), "n_classes": int(sizes.max()), **together(results)}


class Benchmark(NamedTuple):
    """How --bench NAME is scored; data/benchmarks.py reads it."""
    score: Callable         # of those above
    prompts: str = "long"   # the sets to ask by where --prompts says nothing
    most: int = None        # captions of a picture, its first, that count where not all are asked for
    members: tuple = ()     # of a group


CAPTIONS = Benchmark(score_captions)
LONG = "urban1k", "sharegpt4v", "dci", "docci"
SHORT = "coco", "flickr30k"
TEN = ("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "dtd", "pets", "caltech101",
       "flowers102")    # of the paper's average
BENCHMARKS = {
    "demo": Benchmark(score_demo, "raw short long"),
    **dict.fromkeys(LONG, CAPTIONS),
    **dict.fromkeys(SHORT, Benchmark(score_captions, most=5)),
    "xm3600": Benchmark(score_captions, "raw", 1),
    **dict.fromkeys(("imagenet", "imagefolder", *TEN), Benchmark(score_classes, "raw")),
    "long": Benchmark(score_captions, members=LONG),
    "short": Benchmark(score_captions, most=5, members=SHORT),
    "classification10": Benchmark(score_classes, "raw", members=TEN),
}
# The paper's own figures, by what FLAME was trained on; data/README.md has more.
PUBLISHED = {
    "urban1k": "R@1 text to image 66.6 (CC3M), 87.9 (YFCC15M), image to text 65.3, 84.0",
    "sharegpt4v": "R@1 text to image 80.0 (CC3M), 93.2 (YFCC15M), image to text 85.6, 94.1",
    "dci": "R@1 text to image 49.3 (CC3M), 68.1 (YFCC15M), image to text 50.8, 66.1",
    "docci": "R@1 text to image 51.9 (CC3M), 76.2 (YFCC15M), image to text 54.5, 75.8",
    "xm3600": "R@1 text to image 49.0, image to text 51.7 (YFCC15M, 36 languages)",
    "classification10": "top1 40.3 (CC3M)",
}


# ------------------------------------------------------------------------------------------------------------
# 3. The command line

def command_line():
    parser = Parser(usage="evaluate.py --bench NAME | --captions FILE | --compare A B | --search TEXT | "
                          "--vectors NPY",
                    description="Scores a checkpoint; writes <out>/<bench>.json, .npz and .png. "
                                f"NAME: {' '.join(BENCHMARKS)} (data/README.md).")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--bench", choices=BENCHMARKS, metavar="NAME", help="what to score on")
    what("--captions", type=Path, metavar="FILE", help="score on one's own: any file that embed.py reads")
    what("--compare", type=Path, nargs=2, metavar="JSON", help="two results' difference, of the same queries")
    what("--search", metavar="TEXT", nargs="*", help="rank pictures by texts or a picture; without, a page")
    what("--vectors", type=Path, metavar="NPY", help="write the vectors of the pictures in --images DIR")
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    return parser


def settings(argv):
    """The command line, checked as far as it can be without reading anything. how: a Benchmark"""
    parser = command_line()
    args = parser.parse_args(argv)
    args.how = BENCHMARKS.get(args.bench, CAPTIONS)
    other = args.open_clip or args.checkpoint and args.checkpoint.is_file()     # the authors' is a file
    if args.facets and (other or args.how.score == score_classes):
        parser.error("--facets wants captions and a checkpoint of train.py's")
    usable_device(args.device)
    args.asked = [args.prompts or prompts for prompts in args.how.prompts.split()]
    return args


def main(argv=None):
    def body():
        args = settings(argv)
        if args.compare:
            return compare(*args.compare)
        flame.keep_freed_memory()
        data = read(args)   # first: a wrong folder is found in a moment
        towers, args.checkpoint = open_towers(args)
        with files.folder(args.out):
            if not data:
                return search.search(args, benchmarks.pictures_in(args.images), towers)
            results = {name: evaluate(args, name, towers, *data[name]) for name in data}
            if args.how.members:    # they share no picture: one's luck is not another's
                queries = str([result["queries"] for result in results.values()])
                report(args, args.bench, queries, averaged(results.values()) | {"benchmarks": results})

    return run("evaluate.py", body, "the same command goes on from what the cache has")


def read(args):
    """-> {name: what data/benchmarks.py reads of it}; of --search and --vectors, which score nothing, {}"""
    if args.captions:
        return {source_name(args.captions): benchmarks.read_captions(args.captions, args.images, *args.asked)}
    if not args.bench:
        if not args.images:
            raise InputError("--search and --vectors want --images DIR")
        return {}
    root = args.data_root or Path("data", "" if args.how.members else args.bench)
    roots = {name: root / name for name in args.how.members} or {args.bench: root}
    most = None if args.all_captions else args.how.most
    return {name: benchmarks.read(name, root, args.split, most) for name, root in roots.items()}


def evaluate(args, name, towers, *data):
    """Scores a benchmark and reports it. -> what report() returns"""
    columns = [f"{prompts}.{k}" for prompts in dict.fromkeys(args.asked)
               for k in trained_facets(towers.model, prompts)]
    scores, shown = args.how.score(towers, *args.asked, *data)
    scores |= {"columns": columns}
    if args.captions:
        scores["trained_texts"] = count_trained(shown.texts, args.checkpoint)
    if args.facets:
        facets = encode_facets(towers, shown.texts, shown.prompts)
        trained = trained_facets(towers.model, shown.prompts)
        scores["facets"] = ablation(facets, shown.image, shown.owner, shown.prompts, trained)
    # pictures by the names of their files: folders may differ
    queries = re.sub(r"path=(['\"]).*?([^/]*)\1, offset", r"\2",
                     repr([name, args.split, data, scores["skipped_images"], shown and shown.pictures]))
    return report(args, name, queries, scores, shown)


def report(args, name, queries, scores, shown=None):
    """Prints a result, and below it the paper's; draws what there is to look at; writes its JSON, and an .npz
    that --compare reads. A peer's files are called after it: ViT-B-32-laion2b, of ViT-B-32:laion2b.

    queries: text that names what was asked, hashed. -> scores, with what the JSON says beside them
    """
    queries = hashlib.sha256(queries.encode("utf-8", "replace")).hexdigest()
    scores = {"bench": name, "checkpoint": str(args.checkpoint), "split": args.split, "queries": queries,
              **scores}
    arrays = {"queries": queries}
    result = with_intervals(scores, arrays)
    print(*table.table(name, result), sep="\n")
    if args.bench and name in PUBLISHED:
        print(f"    published {PUBLISHED[name]}; Cao, Wei, Ma, CVPR 2025")
    peer = [Path(part).stem for part in args.open_clip.split(":")] if args.open_clip else []
    path = args.out / "-".join([name, *peer])
    if shown:
        draw_sheet(shown, f"{table.heading(name, result)}; {args.checkpoint}", f"{path}.png")
    files.write(f"{path}.npz", lambda temporary: np.savez_compressed(temporary, **arrays))
    files.write_json(f"{path}.json", result)
    print(f"-> {path}.json, .npz")
    return scores


def count_trained(texts, checkpoint):
    """How many of the texts training's captions have too; None where its store is not there."""
    with suppress(Exception):
        record = flame.read_json(Path(checkpoint, "config.json"))["store"]
        store = flame.open_store(record["path"])
        if identity(store) == record["identity"]:   # else another was made there since
            trained = set(texts).intersection(chain.from_iterable(read_table(store.path / "captions.tsv")))
            return sum(text in trained for text in texts)


if __name__ == "__main__":
    sys.exit(main())
