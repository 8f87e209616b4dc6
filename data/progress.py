"""What a training run tells: the bar, log.jsonl and its curve, and which pictures it had to leave out."""
import json
import math
import sys
from contextlib import suppress

import torch

import flame
from data import files
from data.pictures import read_pictures
from data.show import plots


def log_step(run, entry, held_out, bar, board):
    """A line in log.jsonl and on the bar; where held_out is due, Recall@1 of these pictures and the curve.

    run: train.Run. entry: step, loss, lr, images_per_s, and waited, the share of the time that went into
    waiting for data. board: TensorBoard's SummaryWriter or None.
    """
    entry["scale"] = run.model.logit_scale.exp().item()
    entry["bias"] = run.model.logit_bias.item()
    bar.set_postfix_str("loss {loss:.3f}, scale {scale:.1f}, {images_per_s:.0f} images/s, waited for data "
                        "{waited:.1%} of the time".format(**entry), refresh=False)
    bar.update()
    entry |= {name: round(value, 5) for name, value in entry.items() if name != "lr"}
    if held_out:
        recall, failed = held_out_recall(run)
        note_skipped(run.out, failed)
        entry |= recall
        bar.write(f"step {entry['step']}, held-out Recall@1: {recall.get('held_out_R@1', 'no picture read')}")
    files.append(run.out / "log.jsonl", json.dumps(entry) + "\n")
    if held_out or bar.n == bar.total:
        plots.draw_curve(run.out)
    for name, value in entry.items() if board else ():
        board.add_scalar(name, value, entry["step"])


@torch.no_grad()
def held_out_recall(run):
    """-> {"held_out_R@1": text to image, percent}, or {} where no held-out picture can be read; [(key, why)].

    By the long facets where they are trained on. Ties count as misses.
    """
    store, columns = run.batches.store, run.batches.columns
    columns = [c for c in columns if flame.COLUMNS[c].startswith("long")] or columns
    rows, places = run.held_out
    seen, failed = read_pictures(places, lambda n, image: run.model.preprocess(image))
    failed = [(store.keys[rows[n]], why) for n, why in failed]
    if not seen:
        return {}, failed
    parts = torch.stack([*seen.values()]).split(64)
    image = torch.cat([run.model.encode_image(part.to(run.device)) for part in parts])
    text = run.model.text(store.read(rows[[*seen]], columns).to(run.device), columns)
    score = flame.similarity(image, text)
    right = (score >= score.diagonal()[:, None]).sum(1) == 1
    return {"held_out_R@1": round(100 * right.float().mean().item(), 2)}, failed


def earlier_log(out, start):
    """The lines of log.jsonl that are of steps before `start`; a damaged one only the curve misses."""
    lines = []
    for line in lines_of(out / "log.jsonl"):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if entry["step"] < start and math.isfinite(entry["loss"]):
                lines.append(line)
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
