"""Results side by side: what is kept of a result for that, and report.html of a folder of results.

Beside results/<bench>.json lies an .npz with what another run is compared by, without any model: the means
that the figures' intervals are bounds of, and what a thousand texts found. All of it may come from strangers:
what is damaged is left out, and said so.
"""
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import files
from data.benchmarks import InTar
from data.show.plots import draw_facets
from data.show.report import (
    COUNTS, DIRECTIONS, FIGURES, data_url, filled, open_picture, parts_of, reason, small)
from flame import InputError

TEXTS = 1000    # of which it is kept what they found, drawn at random
BEST = 5        # pictures of each
SHOWN = 6       # texts for which one run is right and the other wrong, each way


class Run(NamedTuple):
    """A result, and what lies beside it."""
    path: Path
    name: str       # of its column: the checkpoint, and the folder where there are several
    result: dict
    figures: dict   # {figure: percent}
    ci95: dict      # {figure: [low, high]}
    kept: dict      # see read_kept(); empty where there is none


def compared(result, of=None):
    """What runs are compared by -> {"part/figure": percent}, of retrieval R@1; "/figure" without parts.

    of: "ci95" or "samples", for those of the same figures instead.
    """
    found = {}
    for name, part in parts_of(result, "").items():
        values = part.get(of, {}) if of else part
        for key in (*DIRECTIONS, *FIGURES):
            if key in values:
                found[f"{name}/{key}"] = values[key]["R@1"] if key in DIRECTIONS else values[key]
    return found


def named(figure):
    """long/text_to_image -> long text to image R@1"""
    part, _, key = figure.rpartition("/")
    return f"{part} {f'{DIRECTIONS[key]} R@1' if key in DIRECTIONS else key}".strip()


def title(result):
    """What was scored: only results of one title are compared."""
    probe = " (probe)" if "n_train" in result else ""
    split = result.get("split", "test")
    return f"{result['bench']}{probe}" + f" ({split})" * (split != "test")


# ---------------------------------------------------------------- beside the JSON

def fingerprint(result, data, shown):
    """Names what was asked: only draws of the same pictures and texts pair. Folders may differ, files not."""
    def plain(value):
        if isinstance(value, np.ndarray):
            return hashlib.sha256(value.tobytes()).hexdigest()
        return value.name if isinstance(value, Path) else str(value)

    counts = [[part.get(count) for count in COUNTS] for part in (result, *result.get("parts", {}).values())]
    draws = np.random.default_rng(0).integers(1000, size=9).tolist()    # another numpy may draw otherwise
    asked = [title(result), counts, draws, data, shown and [shown.texts, shown.pictures]]
    return hashlib.sha256(json.dumps(asked, default=plain).encode()).hexdigest()


def take_out(tree):
    """Takes the samples out of a result: they are too many for its JSON."""
    tree.pop("samples", None)
    for branch in tree.values():
        if isinstance(branch, dict):
            take_out(branch)


def keep(path, result, data, shown, ranks):
    """Takes the samples out of a result and writes them to `path`, with what the texts shown found.

    data: what the benchmark's reader returned; ranks: of all texts shown.
    """
    samples = compared(result, "samples")
    take_out(result)
    said = {"same": fingerprint(result, data, shown), "figures": list(samples), "texts": [], "pictures": []}
    arrays = {"samples": np.array(list(samples.values()), np.float32)}      # [figures, 1 + resamples]
    if shown:
        some = np.random.default_rng(0).permutation(len(ranks))[:TEXTS]
        best = [np.argsort(-(shown.text[rows] @ shown.image.T), axis=1, kind="stable")[:, :BEST]
                for rows in np.array_split(some, 1 + len(some) // 100)]
        arrays["best"] = np.concatenate(best).astype(np.int32)
        arrays["right"] = shown.image_ids[arrays["best"]] == shown.text_ids[some, None]
        arrays["ranks"] = ranks[some]
        said["texts"] = [shown.texts[i] for i in some]
        said["pictures"] = [place_of(picture) for picture in shown.pictures]
    arrays["said"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
    files.write(path, lambda temporary: np.savez_compressed(temporary, **arrays))


def place_of(picture):
    """Where the page finds a picture again, wherever it is made; None where it lies in no file."""
    if isinstance(picture, InTar):
        return picture._replace(tar=os.path.abspath(picture.tar))
    return None if isinstance(picture, np.ndarray) else os.path.abspath(picture)


def read_kept(path, figures):
    """What keep() wrote -> {"same", "samples": {figure: [1 + resamples]}, "texts", "pictures", "best" ...}

    figures: of the JSON beside it. Raises nearly anything where the file is damaged.
    """
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    kept |= json.loads(kept.pop("said").tobytes())
    kept["samples"] = dict(zip(kept["figures"], kept["samples"]))
    if not all(abs(samples[0] - figures[name]) < 1e-3 for name, samples in kept["samples"].items()):
        raise ValueError("not of the run whose JSON lies beside it")
    return kept


def run_of(path, name, result, figures, ci95):
    """-> Run, without what is kept. Raises nearly anything where figures are none."""
    figures = {str(key): float(value) for key, value in figures.items()}
    ci95 = {key: [float(low), float(high)] for key, (low, high) in ci95.items()}
    return Run(path, str(name), result, figures, ci95, {})


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_result(path):
    result = read_json(path)
    if not isinstance(result, dict) or not {"bench", "checkpoint"} <= result.keys():
        raise ValueError("no result of evaluate.py")
    return run_of(path, result["checkpoint"], result, compared(result), compared(result, "ci95"))


def read_sweep(path):
    """What data/sweep.py wrote -> a Run a value that was tried."""
    return [run_of(path, row["name"], row, row["figures"], row["ci95"]) for row in read_json(path)["rows"]]


def attempt(path, do, *arguments):
    """do(*arguments); None and a line that names `path` where that fails, however it does."""
    try:
        return do(*arguments)
    except Exception as error:  # a stranger's bytes
        print(f"{reason(path, error)[:300]}; left out", file=sys.stderr)


def read_runs(paths):
    """The results among files .json, each with what lies beside it, as [Run]."""
    runs = []
    for path in sorted(paths):
        run = attempt(path, read_result, path) if path.is_file() else None
        beside = path.with_suffix(".npz")
        if run and beside.is_file():
            run = run._replace(kept=attempt(beside, read_kept, beside, run.figures) or {})
        runs += [run] if run else []
    return runs


def differences(run, other, difference):
    """{figure: [difference, low, high]} to another run, paired. difference: evaluate.py's, of two columns.

    Of a group there is none, but of its benchmarks. Raises ValueError where texts or pictures are not the
    same.
    """
    if "benchmarks" in run.result:
        return {}
    if not run.kept or run.kept["same"] != other.kept.get("same"):
        raise ValueError(f"no difference to {other.path}: other texts or pictures, or no .npz beside one")
    its = other.kept["samples"]
    return {name: difference(own, its[name]) for name, own in run.kept["samples"].items()}


def difference_table(path, earlier, difference):
    """How a result just written differs from earlier ones of the same title, a line a part."""
    lines = []
    for run in read_runs([path]):
        for other in earlier:
            if title(run.result) == title(other.result) and run.name != other.name:
                parts = {}
                for figure, apart in (attempt(path, differences, run, other, difference) or {}).items():
                    part = figure.rpartition("/")[0]
                    said = "{} {:+.1f} [{:.1f}, {:.1f}]".format(named(figure), *apart)
                    if not figure.endswith(("top5", "mean_per_class")):
                        parts.setdefault(part, []).append(said)
                lines += [f"difference to {other.name}: {', '.join(own)}" for own in parts.values()]
    return lines


# ---------------------------------------------------------------- the page

def write_page(folder, difference):
    """Writes report.html of the results in a folder and its folders; -> its path.

    Raises InputError where there are none.
    """
    def inside(pattern):    # no pipe, which would be waited for without end
        found = [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]
        return sorted(path for path in found if path.is_file())

    swept = inside("sweep-*.json")
    runs = read_runs(set(inside("*.json")) - set(swept))
    if not runs and not swept:
        raise InputError(f"{folder}: no results; score something first: --bench NAME --out {folder}")
    if len({run.path.parent for run in runs}) > 1:
        runs = [run._replace(name=f"{run.name} ({run.path.parent})") for run in runs]
    if len({(title(run.result), run.name) for run in runs}) < len(runs):    # a result and its copy
        runs = [run._replace(name=f"{run.name} ({run.path.name})") for run in runs]
    runs.sort(key=lambda run: run.result.get("columns") != [])  # open_clip's first, to compare with
    tables, apart, pictures = side_by_side(runs, difference)
    for path in swept:
        sweep = attempt(path, read_sweep, path) or []
        rows = table_rows("", sweep, {})
        tables.append({"title": path.stem, "names": [run.name for run in sweep], "rows": rows})
    plots = {f"{title(run.result)}, what each facet is worth: {run.name}": attempt(run.path, facet_plot, run)
             for run in runs if "facets" in run.result}
    plots |= {path.stem: attempt(path, read_plot, path) for path in inside("sweep-*.png")}
    data = {"tables": tables, "plots": [pair for pair in plots.items() if pair[1]], "apart": apart}
    heading = {"bench": str(folder), "parts": {}}
    files.write_text(folder / "report.html", filled({"result": heading, "runs": data, "pictures": pictures}))
    return folder / "report.html"


def side_by_side(runs, difference):
    """-> ([the one table of all runs], [where two of them disagree, by title], thumbnails)

    Of each title the first run is what the others are compared with.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    table = {"title": "", "names": names, "rows": []}
    apart = []
    pictures = {}
    for what in dict.fromkeys(title(run.result) for run in runs):
        own = {run.name: run for run in runs if title(run.result) == what}
        first, *others = own.values()
        found = {run.name: attempt(run.path, differences, run, first, difference) or {} for run in others}
        table["rows"] += table_rows(what, [own.get(name) for name in names], found)
        for run in [run for run in others if found[run.name]][:1]:
            texts = attempt(run.path, disagreements, what, first, run, pictures)
            if texts:
                apart.append({"title": what, "names": [first.name, run.name], "texts": texts})
    return [table], apart, pictures


def table_rows(what, runs, apart):
    """A row a figure: {"title", "name", "cells": [percent, interval, difference] of each column's run}."""
    rows = []
    for figure in dict.fromkeys(figure for run in runs if run for figure in run.figures):
        cells = [[own.get(figure) for own in (run.figures, run.ci95, apart.get(run.name, {}))] if run else []
                 for run in runs]
        rows.append({"title": "" if rows else what, "name": named(figure), "cells": cells})
    return rows


def disagreements(what, first, other, pictures):
    """Texts for which one run is right and the other wrong -> [{"text", "found": what each of the two found}]

    Thumbnails go into pictures, {name: data URL}. Raises nearly anything where what is kept is damaged.
    """
    both = (first.kept, other.kept)
    if not first.kept["texts"]:
        return []
    mine, its = [kept["ranks"] == 0 for kept in both]
    some = [*np.flatnonzero(mine & ~its)[:SHOWN], *np.flatnonzero(its & ~mine)[:SHOWN]]

    def tile(picture, good):
        name = f"{what} {picture}"
        if name not in pictures:
            pictures[name] = small(picture_of(first.kept["pictures"][picture]))
        return {"picture": name, "right": bool(good), "facets": []}

    def found(kept, text):
        tiles = [tile(picture, good) for picture, good in zip(kept["best"][text], kept["right"][text])]
        return {"rank": int(kept["ranks"][text]), "of": len(kept["pictures"]), "found": tiles}

    return [{"text": str(first.kept["texts"][text]), "found": [found(kept, text) for kept in both]}
            for text in some]


def picture_of(said):
    """What keep() says of a picture -> Path or InTar; None, to be a grey square, where it is in no file."""
    if isinstance(said, list):
        return InTar(*said) if Path(said[0]).is_file() else None
    return said and Path(said)


def facet_plot(run):
    plot = draw_facets(run.result["facets"])
    return plot and data_url(plot.savefig, "png")


def read_plot(path):
    """-> data URL, drawn anew: whatever else the file holds stays behind."""
    with open_picture(path) as image:
        return data_url(image.convert("RGB").save, "png")
