"""Figures drawn with matplotlib, which only the extra [demo] installs: imported when a figure is wanted, and
never pyplot, whose state is global.
"""
import functools
import json
import sys

import numpy as np

from data import files

# What each of the questions of flame.PROMPTS asks for, in order.
FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")
BLUE = "#2f6fb0"
ORANGE = "#d9822b"
RED = "#dc2626"


def new_figure(width, height):
    """An empty Figure, sizes in inches of 100 pixels; without matplotlib None, and one line on stderr."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell_missing()
        return None
    return Figure((width, height), dpi=100, layout="constrained")


@functools.cache
def tell_missing():  # once, however many plots
    print("no plot is drawn: pip install matplotlib", file=sys.stderr)


def draw_facets(rows):
    """What evaluate.ablation returns -> Figure: R@1 over the number of facets; each facet alone, and all but
    it.

    None without matplotlib. Bars and points carry their 95% intervals.
    """
    figure = new_figure(11.6, 4.4)
    if figure is None:
        return None
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("in order", "alone", "all but one")}
    several, single = figure.subplots(1, 2)

    def figures(kind, direction):
        """R@1 and how far its interval reaches below and above it."""
        values = np.array([row[direction]["R@1"] for row in of[kind]])
        low_high = np.array([row["ci95"][direction]["R@1"] for row in of[kind]]).reshape(-1, 2).T
        return values, np.abs(low_high - values)

    counts = np.array([len(row["facets"]) for row in of["in order"]])
    for direction, colour, shift in (("text_to_image", BLUE, -0.05), ("image_to_text", ORANGE, 0.05)):
        values, reach = figures("in order", direction)
        label = direction.replace("_", " ")
        several.errorbar(counts + shift, values, reach, color=colour, marker="o", elinewidth=1, label=label)
    several.set_title("R@1, the first n facets (inference only)", loc="left")
    several.set_xticks(counts)

    kinds = ("alone", BLUE, "this facet alone", -0.2), ("all but one", ORANGE, "all but this one", 0.2)
    for kind, colour, label, shift in kinds:
        values, reach = figures(kind, "text_to_image")
        single.bar(np.arange(len(values)) + shift, values, 0.38, yerr=reach, color=colour, label=label)
    single.set_title("R@1 text to image", loc="left")
    names = [FACETS[row["facets"][0] - 1].replace(" ", "\n") for row in of["alone"]]
    single.set_xticks(range(len(names)), names, fontsize=8)
    for axes in (several, single):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])     # room for the legend
        axes.set_ylabel("percent")
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", ncols=2, frameon=False)
    return figure


def draw_curve(out):
    """Writes curve.png from log.jsonl: loss (blue, left) and held-out Recall@1 (red, right, percent)."""
    figure = new_figure(10, 4.5)
    if figure is None:
        return
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    loss = figure.add_subplot()
    loss.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], color=BLUE)
    loss.set_xlabel("step")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.set_ylabel(f"loss: {entries[-1]['loss']:.3g}", color=BLUE)
    loss.tick_params(axis="y", colors=BLUE)
    loss.grid(alpha=0.3)
    points = [(entry["step"], entry["held_out_R@1"]) for entry in entries if "held_out_R@1" in entry]
    if points:
        recall = loss.twinx()
        recall.plot(*zip(*points), color=RED)
        recall.set_ylim(0, 100)
        recall.set_ylabel(f"held-out Recall@1: {points[-1][1]:.3g}%", color=RED)
        recall.tick_params(axis="y", colors=RED)
    files.write(out / "curve.png", figure.savefig)
