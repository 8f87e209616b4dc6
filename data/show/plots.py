"""Figures drawn with matplotlib, which only the extra [demo] installs: imported when a figure is wanted, and
never pyplot, whose state is global. Without it nothing is drawn, and a line on stderr says so.
"""
import json
import sys

import numpy as np

from data import files

# What each of the questions of flame.PROMPTS asks for, in order.
FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")

BLUE = "#2f6fb0"
ORANGE = "#d9822b"
RED = "#dc2626"


def new_figure(width, height, layout="constrained"):
    """An empty Figure, sizes in inches of 100 pixels; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plot is drawn: pip install matplotlib", file=sys.stderr)
    return Figure((width, height), dpi=100, layout=layout)


def draw_facets(rows, path):
    """What evaluate.ablation returns -> a picture: R@1 over the number of facets; each facet alone, and all
    but it. Points and bars carry their 95% intervals. -> path, or None where nothing is drawn
    """
    figure = new_figure(11.6, 4.4)
    if figure is None:
        return None
    several, single = figure.subplots(1, 2)

    def draw(how, kind, shift, direction="text_to_image", **style):
        """-> the facets of a kind's rows, drawn, shifted by what stands beside them."""
        some = [row for row in rows if row["kind"] == kind]
        values = np.array([row[direction]["R@1"] for row in some])
        ends = np.array([row["ci95"][direction]["R@1"] for row in some]).T
        how(np.arange(len(some)) + shift, values, yerr=np.abs(ends - values), **style)
        return [row["facets"] for row in some]

    draw(several.errorbar, "in order", -0.05, color=BLUE, label="text to image", marker="o")
    firsts = draw(several.errorbar, "in order", 0.05, "image_to_text", color=ORANGE, label="image to text",
                  marker="o")
    several.set_title("R@1, the first n facets (inference only)", loc="left")
    several.set_xticks(range(len(firsts)), [len(facets) for facets in firsts])
    alone = draw(single.bar, "alone", -0.2, width=0.38, color=BLUE, label="this facet alone")
    if len(alone) > 1:
        draw(single.bar, "all but one", 0.2, width=0.38, color=ORANGE, label="all but this one")
    single.set_title("R@1 text to image", loc="left")
    names = [FACETS[facets[0] - 1].replace(" ", "\n") for facets in alone]
    single.set_xticks(range(len(names)), names, fontsize=8)
    for axes in (several, single):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])     # room for the legend
        axes.set_ylabel("percent")
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", ncols=2)
    files.write(path, figure.savefig)
    return path


def draw_curve(out):
    """Writes curve.png from log.jsonl: loss (blue, left) and held-out Recall@1 (red, right, percent)."""
    figure = new_figure(10, 4.5)
    if figure is None:
        return
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def curve(axes, key, colour, label):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        axes.plot(*zip(*points), color=colour)
        axes.set_ylabel(f"{label}: {points[-1][1]:.3g}", color=colour)
        axes.tick_params(axis="y", colors=colour)

    left = figure.add_subplot()
    curve(left, "loss", BLUE, "loss")
    left.set_xlabel("step")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    if any("held_out_R@1" in entry for entry in entries):
        right = left.twinx()
        curve(right, "held_out_R@1", RED, "held-out Recall@1, %")
        right.set_ylim(0, 100)
    files.write(out / "curve.png", figure.savefig)
