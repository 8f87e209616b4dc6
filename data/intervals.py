"""What is known of a figure: its 95% interval, what is kept of it, and how two results differ.

A figure is the mean of hits. Its interval is a bootstrap's: groups of queries that fail together, as captions
of one picture do, are drawn again a thousand times, always the same draws. Beside each JSON lies an .npz of
all hits, so that two results of the same queries can be compared on the same draws.
"""
import hashlib
from typing import NamedTuple

import numpy as np

import flame
from data import files
from flame import InputError

SEED = 0
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)


class Hits(NamedTuple):
    """Which queries were answered, and which of them fail together, as captions of one picture do."""
    hits: np.ndarray    # [Q, 3] bool, within the first 1, 5, 10; or [Q, 1], shares at times
    groups: np.ndarray  # int [Q], below size
    size: int


def samples(parts, resamples=RESAMPLES):
    """[Hits] -> [1 + resamples, F] percent, averaged over the parts: the mean, and below it the means when
    groups are drawn again, each with all hits that belong to it.

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
    """What samples() gives, or a difference -> [(mean, low, high)], 95%, of draws that had a query."""
    return list(zip(rows[0].tolist(), *np.nanpercentile(rows[1:], [2.5, 97.5], axis=0).tolist()))


def named(columns):
    """Three columns by their names, {"R@1", "R@5", "R@10"}; of one the value itself."""
    return dict(zip([f"R@{k}" for k in RECALL_AT], columns)) if len(columns) > 1 else columns[0]


def means(scores):
    return {name: named(samples(parts, 0)[0].tolist()) for name, parts in scores.items()}


def with_intervals(scores, hits, path=""):
    """A scorer's result -> the same for the JSON: lists of Hits become percentages, intervals under "ci95".

    hits: {"part/figure": [Hits]}, to be filled with them.
    """
    result = {}
    ci95 = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            value = with_intervals(value, hits, f"{path}{name}/")
        if isinstance(value, list):
            hits[path + name] = value
            columns = intervals(samples(value))
            value = named([mean for mean, _, _ in columns])
            ci95[name] = named([[low, high] for _, low, high in columns])
        result[name] = value
    return result | ({"ci95": ci95} if ci95 else {})


def keep(path, result, hits, queries):
    """Writes the JSON, and beside it every query's hits. queries: text that names them, kept as a hash."""
    result["queries"] = hashlib.sha256(queries.encode("utf-8", "replace")).hexdigest()
    arrays = {f"{figure} {n} {field}": array for figure, parts in hits.items()
              for n, part in enumerate(parts) for field, array in part._asdict().items()}
    files.write(f"{path}.npz",
                lambda temporary: np.savez_compressed(temporary, queries=result["queries"], **arrays))
    files.write_json(f"{path}.json", result)
    print(f"-> {path}.json, .npz, .png")


def read_hits(path):
    """A result's .json -> (hash of its queries, {figure: [Hits]}), from the .npz beside it"""
    figures = {}
    with flame.reading(path.with_suffix(".npz"), "score it again") as path, np.load(path) as file:
        for name in file.files:
            if name.endswith(" hits"):
                hits = Hits(*(file[name[:-4] + field] for field in Hits._fields))
                figures.setdefault(name.rsplit(" ", 2)[0], []).append(hits)
        return str(file["queries"]), figures


def compare(path, other):
    """Prints both results and the paired difference of each figure, of Recall@K that of R@1."""
    queries, figures = read_hits(path)
    other_queries, other_figures = read_hits(other)
    if queries != other_queries:
        raise InputError(f"{path} and {other}: of other queries; score both on the same texts and pictures")
    print(f"{'R@1 or accuracy':36}{str(path):26}{str(other):26}difference")
    for figure, parts in figures.items():
        rows, other_rows = samples(parts), samples(other_figures[figure])
        three = [intervals(some)[0] for some in (rows, other_rows, rows - other_rows)]
        print(f"{figure:36}" + "".join("{:7.1f} [{:5.1f}, {:5.1f}]   ".format(*each) for each in three))
