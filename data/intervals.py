"""A figure's 95% interval, what is kept of it, and how two results differ.

A figure is the mean of hits. Its interval is a bootstrap's: groups of queries that fail together, as captions
of one picture do, are drawn again a thousand times, always the same draws. Beside each JSON lies an .npz of
every query's hits and of what each draw gave, so that two results of the same queries can be subtracted.
"""
from typing import NamedTuple

import numpy as np

import flame
from flame import InputError

SEED = 0
RESAMPLES = 1000
RECALL_AT = (1, 5, 10)


@np.errstate(invalid="ignore")  # a draw without a query is NaN
def samples(hits, groups, size):
    """hits [Q, F], bool or shares, groups int [Q] below size -> percent [1 + RESAMPLES, F]: the mean, and
    below it the means when groups are drawn again, each with all hits that belong to it.

    Row n is of the same draw for all of one size: rows may be averaged and subtracted, what is hard for both
    drops out, and the interval of the result is read off its rows.
    """
    total = np.stack([np.bincount(groups, column, size) for column in hits.T])
    count = np.bincount(groups, minlength=size)
    rng = np.random.default_rng(SEED)
    rows = [100 * hits.mean(0)]
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(size, size=size), minlength=size)
        rows.append(100 * (total @ times) / (count @ times))
    return np.array(rows)


class Figure(NamedTuple):
    """Figures with one name, as recalls at 1, 5, 10, until they are reported."""
    draws: np.ndarray           # [1 + RESAMPLES, F], what samples() gives, or their mean
    hits: np.ndarray = None     # [Q, F], of each query, where there is one


def scored(figures):
    """{name: (hits, groups, size)} -> {name: Figure}"""
    return {name: Figure(samples(*hits), hits[0]) for name, hits in figures.items()}


def averaged(results):
    """The plain mean of all figures that several results have, draw by draw -> {name: Figure}"""
    results = list(results)
    return {name: Figure(np.mean([result[name].draws for result in results], axis=0))
            for name, value in results[0].items() if isinstance(value, Figure)}


def ends(rows):
    """What samples() gives, or a difference -> [F] of [low, high], 95%"""
    return np.nanpercentile(rows[1:], [2.5, 97.5], axis=0).T.tolist()


def named(columns):
    """Three columns by their names, {"R@1", "R@5", "R@10"}; of one the value itself."""
    return dict(zip([f"R@{k}" for k in RECALL_AT], columns)) if len(columns) > 1 else columns[0]


def with_intervals(scores, arrays, path=""):
    """A result -> the same for the JSON: percentages in the place of Figures, their intervals under "ci95".

    arrays: {"part/figure": draws, "part/hits of figure": hits}, to be filled with them.
    """
    result = {}
    ci95 = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            value = with_intervals(value, arrays, f"{path}{name}/")
        if isinstance(value, Figure):
            arrays[path + name] = value.draws
            if value.hits is not None:
                arrays[f"{path}hits of {name}"] = value.hits
            ci95[name] = named(ends(value.draws))
            value = named(value.draws[0].tolist())
        result[name] = value
    return result | ({"ci95": ci95} if ci95 else {})


def compare(*paths):
    """Prints two results' figures, given their .json, and the paired difference, of Recall@K that of R@1."""
    results = []
    for path in paths:
        with flame.reading(path.with_suffix(".npz"), "score it again") as draws, np.load(draws) as arrays:
            results.append(dict(arrays))
    first, second = results
    if first.pop("queries") != second.pop("queries"):
        raise InputError("{} and {}: of other queries; score both on the same texts".format(*paths))
    print("{:36}{!s:26}{!s:26}difference".format("R@1 or accuracy", *paths))
    for figure, draws in first.items():
        if "hits of" not in figure and figure in second:    # --facets may be given for one alone
            rows = draws, second[figure], draws - second[figure]
            cells = ["{:7.1f} [{:5.1f}, {:5.1f}]   ".format(each[0, 0], *ends(each)[0]) for each in rows]
            print(f"{figure:36}{''.join(cells)}")
