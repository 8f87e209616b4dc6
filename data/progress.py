"""What a training run tells: the bar, log.jsonl, and which pictures it had to leave out."""
import json
import math
import sys
from contextlib import suppress

from data import files


def log_step(run, entry, bar):
    """A line in log.jsonl and on the bar.

    run: train.Run. entry: step, loss, lr, images_per_s, and waited, the share of the time that went into
    waiting for data.
    """
    entry["scale"] = run.model.logit_scale.exp().item()
    entry["bias"] = run.model.logit_bias.item()
    bar.set_postfix_str("loss {loss:.3f}, scale {scale:.1f}, {images_per_s:.0f} images/s, waited for data "
                        "{waited:.1%} of the time".format(**entry), refresh=False)
    entry |= {name: round(value, 5) for name, value in entry.items() if name != "lr"}
    files.append(run.out / "log.jsonl", json.dumps(entry) + "\n")


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`; a damaged one only the curve misses."""
    lines = []
    for line in lines_of(out / "log.jsonl"):
        with suppress(Exception):
            entry = json.loads(line)
            if entry["step"] < start and math.isfinite(entry["loss"]):
                lines.append(json.dumps(entry) + "\n")
    return lines


def lines_of(path):
    return path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []


def note_skipped(out, failed):
    """[(key, why)] -> a line each in skipped.txt, once, whichever rank and epoch met it."""
    path = out / "skipped.txt"
    if failed:
        known = {line.split("\t")[0] for line in lines_of(path)}
        files.append(path, "".join(f"{key}\t{why}\n" for key, why in failed if key not in known))


def tell_skipped(out):
    skipped = lines_of(out / "skipped.txt")
    if skipped:
        print(f"skipped {len(skipped)} unreadable pictures, listed in {out}/skipped.txt, the first: "
              f"{skipped[0].strip()}", file=sys.stderr)
