"""Figures drawn with matplotlib, which only the extra [demo] installs: imported when a figure is wanted, and
never pyplot, whose state is global. Without it nothing is drawn, and a line on stderr says so.
"""
import json
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
    """Writes curve.png, the loss against the step, from log.jsonl."""
    figure = new_figure(10, 4.5)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if figure is None or not entries:
        return
    axes = figure.add_subplot()
    axes.plot(*zip(*[(entry["step"], entry["loss"]) for entry in entries]), color=BLUE)
    axes.set(xlabel="step", ylabel=f"loss: {entries[-1]['loss']:.3g}", title=out.name)
    axes.grid(alpha=0.3)
    files.write(out / "curve.png", figure.savefig)
