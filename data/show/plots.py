"""Figures drawn with matplotlib, which only the extra [demo] installs: imported when a figure is wanted, and
never pyplot, whose state is global.
"""
import functools
import json
import sys

import numpy as np

import flame
from data import files

# What each of the questions of flame.PROMPTS asks for, in order.
FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")

BLUE = "#2f6fb0"
ORANGE = "#d9822b"
RED = "#dc2626"


def facet_names():
    """A name a question; where the questions are one's own (embed.py --prompts-file), its number."""
    questions = flame.PROMPTS["long"].facets
    return FACETS if questions == flame.FACETS else [f"question {k + 1}" for k in range(99)]


@functools.cache
def tell_missing():  # once, however many plots
    print("no plot is drawn: pip install matplotlib", file=sys.stderr)


def new_figure(width, height):
    """An empty Figure, sizes in inches of 100 pixels; without matplotlib None, and one line on stderr."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return tell_missing()
    return Figure((width, height), dpi=100, layout="constrained")


def with_intervals(how, places, values, low_high, **style):
    """how: Axes.errorbar or Axes.bar. values: percent, low_high: [low, high] of each."""
    values = np.array(values)
    how(places, values, yerr=np.abs(np.array(low_high).reshape(-1, 2).T - values), **style)


def finish(axes, words, **legend):
    axes.set_ylabel(words)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, **legend)


def draw_facets(rows):
    """What evaluate.ablation returns -> Figure: R@1 over the number of facets; each facet alone, and all but
    it.

    None without matplotlib. Points and bars carry their 95% intervals.
    """
    figure = new_figure(11.6, 4.4)
    if figure is None:
        return None
    several, single = figure.subplots(1, 2)

    def draw(how, kind, direction, shift, **style):
        """-> the rows of a kind, drawn, shifted by what stands beside them."""
        some = [row for row in rows if row["kind"] == kind]
        values = [row[direction]["R@1"] for row in some]
        low_high = [row["ci95"][direction]["R@1"] for row in some]
        with_intervals(how, np.arange(len(some)) + shift, values, low_high, **style)
        return some

    line = {"marker": "o", "elinewidth": 1}
    draw(several.errorbar, "in order", "text_to_image", -0.05, color=BLUE, label="text to image", **line)
    firsts = draw(several.errorbar, "in order", "image_to_text", 0.05, color=ORANGE, label="image to text",
                  **line)
    several.set_title("R@1, the first n facets (inference only)", loc="left")
    several.set_xticks(range(len(firsts)), [len(row["facets"]) for row in firsts])

    bar = {"direction": "text_to_image", "width": 0.38}
    alone = draw(single.bar, "alone", shift=-0.2, color=BLUE, label="this facet alone", **bar)
    draw(single.bar, "all but one", shift=0.2, color=ORANGE, label="all but this one", **bar)
    single.set_title("R@1 text to image", loc="left")
    names = [facet_names()[row["facets"][0] - 1].replace(" ", "\n") for row in alone]
    single.set_xticks(range(len(names)), names, fontsize=8)
    for axes in (several, single):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])     # room for the legend
        finish(axes, "percent", loc="upper left", ncols=2)
    return figure


def draw_curve(out):
    """Writes curve.png from log.jsonl: loss (blue, left) and held-out Recall@1 (red, right, percent)."""
    figure = new_figure(10, 4.5)
    if figure is None:
        return
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def curve(axes, key, colour, label, unit=""):
        steps = [entry["step"] for entry in entries if key in entry]
        values = [entry[key] for entry in entries if key in entry]
        axes.plot(steps, values, color=colour)
        axes.set_ylabel(f"{label}: {values[-1]:.3g}{unit}", color=colour)
        axes.tick_params(axis="y", colors=colour)

    left = figure.add_subplot()
    curve(left, "loss", BLUE, "loss")
    left.set_xlabel("step")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    if any("held_out_R@1" in entry for entry in entries):
        right = left.twinx()
        curve(right, "held_out_R@1", RED, "held-out Recall@1", "%")
        right.set_ylim(0, 100)
    files.write(out / "curve.png", figure.savefig)


def draw_sweep(path, result):
    """Writes what data/sweep.py found: each figure over the values that were tried. -> [path], or [] without
    matplotlib."""
    figure = new_figure(9, 4.2)
    if figure is None:
        return []
    import matplotlib
    axes = figure.add_subplot()
    rows = result["rows"]
    names = [row["name"] for row in rows]
    numbers = all(name.replace(".", "").isdigit() for name in names)
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # twenty, not ten
    side = min(0.2, 0.02 * len(rows[0]["figures"]))  # the figures of one value stand side by side
    shifts = np.linspace(-side, side, len(rows[0]["figures"]))
    for what, shift in zip(rows[0]["figures"], shifts):
        means = [row["figures"][what] for row in rows]
        low_high = [row["ci95"][what] for row in rows]
        label = what.replace("/", " ").replace("_", " ").strip()
        with_intervals(axes.errorbar, np.arange(len(rows)) + shift, means, low_high,
                       fmt="o-" if numbers else "o", elinewidth=1, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(result["vary"])
    axes.set_ylim(0, None)
    finish(axes, "R@1 or top-1, percent", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    files.write(path, figure.savefig)
    return [str(path)]
