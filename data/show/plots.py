"""Figures drawn with matplotlib, which only the extra [demo] installs: imported when a figure is wanted, and
never pyplot, whose state is global. Without it nothing is drawn, and a line on stderr says so.
"""
import json
import math
import sys

from data import files

BLUE = "#2f6fb0"


def new_figure(width, height):
    """An empty Figure, sizes in inches of 100 pixels; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plot is drawn: pip install matplotlib", file=sys.stderr)
    return Figure((width, height), dpi=100, layout="constrained")


def draw_curve(out):
    """Writes curve.png, the loss against the step and that of chance, from log.jsonl and config.json."""
    figure = new_figure(10, 4.5)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if figure is None or not entries:
        return
    s = json.loads((out / "config.json").read_text())["training"]
    # The least loss where all pairs score alike. InfoNCE: half of log(batch * positives), half of log(batch).
    # Sigmoid: a bias of -log(batch - 1) says that each text has one picture; 1/2B less than this.
    chance = math.log(s["batch"]) + (math.log(s["positives"]) / 2 if s["loss"] == "infonce" else 1)
    axes = figure.add_subplot()
    axes.plot(*zip(*[(entry["step"], entry["loss"]) for entry in entries]), color=BLUE)
    axes.axhline(chance, linestyle=":", label=f"chance: {chance:.2f}")
    axes.legend()
    axes.set(xlabel="step", ylabel=f"{s['loss']} loss: {entries[-1]['loss']:.3g}",
             title=f"{out.name}: {s['images']:,} pictures")
    axes.grid(alpha=0.3)
    files.write(out / "curve.png", figure.savefig)
