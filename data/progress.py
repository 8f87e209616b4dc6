"""What a training run tells: the bar, log.jsonl, and which pictures it had to leave out."""
import json
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
    files.append(run.out / "log.jsonl", json.dumps(entry) + "\n")


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`; a damaged one only the curve misses."""
    lines = []
    for line in lines_of(out / "log.jsonl"):
        with suppress(Exception):
            entry = json.loads(line)
            if entry["step"] < start and entry["loss"] < 1e9:  # nor NaN
                lines.append(json.dumps(entry) + "\n")
    return lines


def lines_of(path):
    return path.read_text("utf-8", "surrogateescape").splitlines(keepends=True) if path.is_file() else []


def listed_pictures(out):
    """{key: its line in skipped.txt}"""
    return {line.split("\t")[0]: line for line in lines_of(out / "skipped.txt")}


def note_skipped(out, failed, listed):
    """[(key, why)] -> a line each in skipped.txt, once a rank, whichever epoch met it.

    listed: what listed_pictures() gave and this rank added; the file may be too long to be read each time
    """
    new = {key: f"{key}\t{why}\n" for key, why in failed if key not in listed}
    if new:
        files.append(out / "skipped.txt", "".join(new.values()))
        listed |= new


def tell_skipped(out):
    listed = listed_pictures(out)
    if listed:
        print(f"skipped {len(listed)} unreadable pictures, listed in {out}/skipped.txt, the first: "
              f"{[*listed.values()][0].strip()}", file=sys.stderr)
