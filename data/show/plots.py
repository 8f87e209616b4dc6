"""Figures drawn with matplotlib, which only the extra [demo] installs. Without it, a figure is skipped with a
line on stderr. pyplot is avoided because its state is global.
"""
import math
import sys
from operator import itemgetter

from data import common

BLUE = "#2f6fb0"
RED = "#b03a2f"
LOSS_NAMES = {"infonce": "InfoNCE", "sigmoid": "sigmoid"}


def new_figure(width, height):
    """Return an empty Figure (sizes in inches of 100 pixels), or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plot drawn: pip install matplotlib", file=sys.stderr)
    return Figure((width, height), dpi=100, layout="constrained")


def draw_curve(out, s, entries):
    """Write curve.png from the settings and log entries of a run: loss, validation recall, learning rate."""
    figure = new_figure(10, 5.5)
    if figure is None or not entries:
        return
    # The loss if all pairs get the same score. InfoNCE: log(batch * positives) / 2 + log(batch) / 2. Sigmoid:
    # with the best bias, -log(batch - 1), it is log(batch) + 1 minus about 1 / (2 batch).
    chance = math.log(s["batch"]) + (math.log(s["positives"]) / 2 if s["loss"] == "infonce" else 1)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.plot(*zip(*map(itemgetter("step", "loss"), entries)), color=BLUE)
    axes.axhline(chance, linestyle=":", label=f"loss if all pairs had the same score: {chance:.2f}")
    axes.legend(loc="upper right")
    axes.set(ylabel=f"{LOSS_NAMES[s['loss']]} loss: {entries[-1]['loss']:.3g}",
             title=f"{out.name}: {s['images']:,} images")
    axes.grid(alpha=0.3)
    recalls = [(entry["step"], sum(entry["val"].values()) / 2) for entry in entries if "val" in entry]
    if recalls:
        right = axes.twinx()
        right.plot(*zip(*recalls), "o-", color=RED)
        right.set_ylim(0)
        right.set_ylabel("validation R@1 of long captions, %", color=RED)
    below.plot(*zip(*map(itemgetter("step", "lr"), entries)), color=BLUE)
    below.set(xlabel="step", ylabel="learning rate")
    common.atomic_save(out / "curve.png", figure.savefig)
