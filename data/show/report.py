"""Results to look at: lines of text, the contact sheet, the page report.html.

Numbers come from evaluate.py; nothing is computed here but similarities of what is shown. Captions, class names and file
names come from strangers: they reach the page as data, never as markup.
"""
import base64
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.show.fonts import draw_text, printable, wrapped

FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")  # of flame.PROMPTS
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text", "both_ways": "average of both"}
FIGURES = ("top1", "top5", "mean_per_class", "accuracy")
COUNTS = {"n_train": "training pictures", "n_texts": "texts", "n_images": "pictures", "n_classes": "names",
          "n_sharing_a_name": "of the names are shared", "n_rows": "rows"}
GREEN, DARK_GREEN, RED, DARK_RED, INK, GREY = "#00a850", "#00803c", "#d83040", "#b00020", "#202020", "#d0d0d0"


def open_picture(picture):
    """Path or uint8 array [H, W] or [H, W, 3] -> PIL image, to be closed"""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if not picture.is_file():       # a pipe would be waited for without end
        raise OSError("not a regular file" if picture.exists() else "no such file")
    return Image.open(picture)


def reason(picture, error):
    """Why a picture cannot be read, in one line that names it."""
    name = picture if isinstance(picture, Path) else "a picture"
    return " ".join(f"{name}: {error or type(error).__name__}".split())


def thumbnail(picture, side):
    """-> PIL image that fits side x side; a grey square where the picture cannot be read."""
    try:
        with open_picture(picture) as image:
            image = image.convert("RGB")
            scale = side / max(image.size)
            return image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
    except Exception:  # decoders raise nearly anything on a stranger's bytes; evaluate.py has counted it
        return Image.new("RGB", (side, side), GREY)


# ---------------------------------------------------------------- lines of text

def cells(part, *keys):
    """A figure and its 95% interval, percent."""
    low_high = part.get("ci95", {})
    for key in keys:
        part = part[key]
        low_high = low_high.get(key, {}) if isinstance(low_high, dict) else {}
    interval = " [{:5.1f}, {:5.1f}]".format(*low_high) if low_high else " " * 15
    return f"{part:5.1f}{interval}"


def table(result):
    """The numbers of a result, part by part, as lines of text."""
    parts = dict(result.get("parts") or {result["bench"]: result})
    if "accuracy" in result:
        parts["average"] = {key: result[key] for key in ("accuracy", "chance", "ci95", "n_texts", "n_images")}
    lines = []
    for name, part in parts.items():
        counts = [f"{part[key]} {word}" for key, word in COUNTS.items() if part.get(key)]
        if "languages" in part:
            counts.append(f"{len(part['languages'])} languages")
        chance = f"R@1 {100 / part['n_images']:.1f}" if "text_to_image" in part else f"{part['chance']:.1f}"
        lines.append(f"{name}: {', '.join(counts)}, chance {chance}")
        for direction in DIRECTIONS:
            if direction in part:
                figures = "   ".join(f"{key} {cells(part, direction, key)}" for key in part[direction])
                lines.append(f"    {DIRECTIONS[direction]:16}{figures}")
        figures = "   ".join(f"{key} {cells(part, key)}" for key in FIGURES if key in part)
        if figures:
            lines.append(f"    {figures}")
        for language, row in part.get("languages", {}).items():
            if "top1" in row:
                figures = f"top1 {cells(row, 'top1')} among {row['n_classes']}"
            else:
                figures = both_recalls(row, "R@1 ")
            lines.append(f"    {language:8}{figures}")
    return lines


def both_recalls(row, at=""):
    there = cells(row, "text_to_image", "R@1")
    back = cells(row, "image_to_text", "R@1")
    return f"text to image {at}{there}   image to text {at}{back}"


def facet_table(rows):
    """What evaluate.ablation returns, as lines of text."""
    lines = ["R@1 with some facets only, from one set of embeddings (inference only: the checkpoint stays as trained)"]
    for row in rows:
        facets = ",".join(str(number) for number in row["facets"])
        if row["kind"] == "alone":
            facets += f" {FACETS[row['facets'][0] - 1]}"
        lines.append(f"    {row['kind']:12} {facets:32} {both_recalls(row)}")
    return lines


# ---------------------------------------------------------------- the contact sheet

def found_for(text, vector, image, right=None, rank=None, facets=None, found=5):
    """What a text finds -> {"text", "rank", "of", "facets": names, "found": [tile], "right": tile or None}.

    vector [D], image [M, D]. right: bool [M], rank: 0 for the first place; None where nobody knows what is right. facets:
    {name: vector [D]}. A tile is {"picture": its index, "score", "right": bool or None, "facets": similarities}; "right"
    is the best right picture where none is among those found.
    """
    scores = image @ vector
    order = np.argsort(-scores, kind="stable")
    facets = facets or {}
    units = [facet / np.linalg.norm(facet) for facet in facets.values()]

    def tile(picture):
        return {"picture": int(picture), "score": float(scores[picture]),
                "facets": [float(unit @ image[picture]) for unit in units],
                "right": None if right is None else bool(right[picture])}

    row = {"text": text, "rank": None if rank is None else int(rank), "of": len(order), "facets": list(facets),
           "found": [tile(picture) for picture in order[:found]], "right": None}
    if right is not None and right.any() and not right[order[:found]].any():
        row["right"] = tile(order[right[order]][0])
    return row


TEXT, SIZE, LINE, MARGIN = 420, 14, 18, 16      # pixels: the texts' column, their size and line, the sheet's edge
SIDE, FRAME, GAP = 128, 6, 10                   # a picture, its frame, what lies between


def draw_sheet(rows, pictures, named=False):
    """What found_for returns -> PIL image: each text and the pictures found for it, best first; green frame right, red wrong.

    Behind them, apart, the right picture where it is not among them. named: with scores and file names.
    """
    cell = SIDE + 2 * FRAME + GAP
    tall = cell + 16 * named
    across = min(5, max(len(row["found"]) for row in rows))
    apart = (cell + GAP) * any(row["right"] for row in rows)
    blocks = []
    for row in rows:
        lines = wrapped(row["text"], SIZE, TEXT - 2 * MARGIN)
        deep = -(-len(row["found"]) // across)
        blocks.append((lines, max(tall * deep + 4, LINE * (len(lines) + 2) + 14)))
    height = sum(height for _, height in blocks)
    sheet = Image.new("RGB", (2 * MARGIN + TEXT + across * cell + apart, 2 * MARGIN + height), "white")
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, (lines, height) in zip(rows, blocks):
        head, colour = heading(row)
        draw_text(pen, MARGIN, top, head, SIZE + 1, colour)
        for n, line in enumerate(lines):
            draw_text(pen, MARGIN, top + LINE * (n + 1) + 4, line, SIZE, INK)
        for place, tile in enumerate(row["found"]):
            draw_tile(sheet, MARGIN + TEXT + place % across * cell, top + place // across * tall, tile, pictures, named)
        if row["right"]:
            draw_tile(sheet, MARGIN + TEXT + across * cell + GAP, top, row["right"], pictures, named)
        top += height
    return sheet


def heading(row):
    if row["rank"] is None:
        return f"the best of {row['of']} pictures", INK
    return f"the right picture is number {row['rank'] + 1} of {row['of']}", DARK_RED if row["rank"] else DARK_GREEN


def draw_tile(sheet, left, top, tile, pictures, named):
    pen = ImageDraw.Draw(sheet)
    edge = SIDE + 2 * FRAME
    colour = {None: GREY, True: GREEN, False: RED}[tile["right"]]
    pen.rectangle((left, top, left + edge - 1, top + edge - 1), fill=colour)
    pen.rectangle((left + FRAME, top + FRAME, left + FRAME + SIDE - 1, top + FRAME + SIDE - 1), fill="white")
    small = thumbnail(pictures[tile["picture"]], SIDE)
    sheet.paste(small, (left + (edge - small.width) // 2, top + (edge - small.height) // 2))
    if named:
        name = printable(Path(pictures[tile["picture"]]).name)
        name = name if len(name) <= 16 else name[:15] + "…"
        draw_text(pen, left, top + edge + 1, f"{tile['score']:.3f}  {name}", 11, INK)


# ---------------------------------------------------------------- the page

def data_url(image, kind, **settings):
    """PIL image or matplotlib Figure -> data URL, so that the page is one file."""
    out = io.BytesIO()
    save = image.save if isinstance(image, Image.Image) else image.savefig
    save(out, format=kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def page(result, queries, pictures, plot=None):
    """report.html filled in: everything is in the one file. queries: what found_for returns; plot: of the facets, a Figure."""
    used = {tile["picture"] for row in queries for tile in [*row["found"], row["right"]] if tile}
    small = {i: data_url(thumbnail(pictures[i], 160), "jpeg", quality=85) for i in sorted(used)}
    blob = json.dumps({"result": result, "queries": queries, "facets": FACETS, "pictures": small,
                       "plot": data_url(plot, "png") if plot else None})
    for mark in "<>&\u2028\u2029":      # nothing in the data can end the script element or begin a comment
        blob = blob.replace(mark, f"\\u{ord(mark):04x}")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/null")
    return before + blob + after


# ---------------------------------------------------------------- the plots

def draw_curve(out):
    """curve.png: loss (blue, left axis) and held-out Recall@1 (red, right axis, percent) over steps."""
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    width, height, left, top, last = 900, 420, 70, 30, max(1, entries[-1]["step"])
    image = Image.new("RGB", (width + 2 * left, height + 2 * top + 20), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    pen.rectangle((left, top, left + width, top + height), outline="#b0b0b0")
    pen.text((left + width / 2, top + height + 20), f"{len(entries)} steps", fill="black", font=font, anchor="mm")
    for name, color, edge, away, anchors in (("loss", "#2563eb", left, -8, "rl"), ("held_out_R@1", "#dc2626", left + width, 8, "lr")):
        if points := [(e["step"], e[name]) for e in entries if name in e]:
            low, high = (0, 100) if name != "loss" else (min(v for _, v in points), max(v for _, v in points))
            y = lambda value: top + height * (1 - (value - low) / max(1e-9, high - low))
            pen.line([(left + width * step / last, y(value)) for step, value in points], fill=color, width=2)
            for value in np.linspace(low, high, 5):
                pen.text((edge + away, y(value)), f"{value:.3g}", fill=color, font=font, anchor=anchors[0] + "m")
            pen.text((edge, top - 10), f"{name.replace('_', ' ')}: {points[-1][1]:.3g}" + "%" * (name != "loss"), fill=color, font=font, anchor=anchors[1] + "s")
    image.save(out / "curve.png.tmp", "PNG")
    os.replace(out / "curve.png.tmp", out / "curve.png")
