"""Results to look at: lines of text, the contact sheet, the plots of a training run and of what each facet is worth, the page report.html.

Numbers come from train.py and evaluate.py; nothing is computed here but similarities of what is shown. Captions, class names and file
names come from strangers: they reach the page as data, never as markup.
"""
import base64
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")    # of flame.PROMPTS, in order
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text", "both_ways": "average of both"}
FIGURES = ("top1", "top5", "mean_per_class", "accuracy")
GREEN, RED, BLUE, ORANGE, INK, GREY = "#00a850", "#d83040", "#2f6fb0", "#d9822b", "#202020", "#9a9a9a"


def open_picture(picture):
    """Path or uint8 array [H, W] or [H, W, 3] -> PIL image, to be closed"""
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)


def printable(text):
    """Without control characters and what UTF-8 cannot hold (file names may be any bytes)."""
    return "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())


# ---------------------------------------------------------------- lines of text

def cells(part, *keys):
    """A figure and its 95% interval, percent."""
    low_high = part.get("ci95", {})
    for key in keys:
        part, low_high = part[key], low_high.get(key, {}) if isinstance(low_high, dict) else None
    return f"{part:5.1f}" + (" [{:5.1f}, {:5.1f}]".format(*low_high) if low_high else " " * 15)


def table(result):
    """The numbers of a result, part by part, as lines of text."""
    lines = []
    mean = {"average": {key: result[key] for key in ("accuracy", "chance", "ci95", "n_texts", "n_images")}} if "accuracy" in result else {}
    for name, part in {**(result.get("parts") or {result["bench"]: result}), **mean}.items():
        counts = [f"{part[key]} {word}" for key, word in (("n_train", "training pictures"), ("n_texts", "texts"), ("n_images", "pictures"), ("n_classes", "names"), ("n_rows", "rows")) if key in part]
        counts += [f"{len(part['languages'])} languages"] if "languages" in part else []
        chance = f"R@1 {100 / part['n_images']:.1f}" if "text_to_image" in part else f"{part['chance']:.1f}"
        lines.append(f"{name}: {', '.join(counts)}, chance {chance}")
        for direction, words in DIRECTIONS.items():
            if direction in part:
                lines.append(f"    {words:16}" + "   ".join(f"{k} {cells(part, direction, k)}" for k in part[direction]))
        if figures := [k for k in FIGURES if k in part]:
            lines.append("    " + "   ".join(f"{k} {cells(part, k)}" for k in figures))
        for language, row in part.get("languages", {}).items():
            lines.append(f"    {language:8}" + (f"top1 {cells(row, 'top1')} among {row['n_classes']}" if "top1" in row else
                         f"text to image R@1 {cells(row, 'text_to_image', 'R@1')}   image to text R@1 {cells(row, 'image_to_text', 'R@1')}"))
    return lines


def facet_table(rows):
    """What evaluate.ablation returns, as lines of text."""
    lines = ["R@1 with some facets only, from one set of embeddings (inference only: the checkpoint stays as trained)"]
    for row in rows:
        facets = ",".join(map(str, row["facets"])) + (f" {FACETS[row['facets'][0] - 1]}" if row["kind"] == "alone" else "")
        lines.append(f"    {row['kind']:12} {facets:32} text to image {cells(row, 'text_to_image', 'R@1')}   image to text {cells(row, 'image_to_text', 'R@1')}")
    return lines


# ---------------------------------------------------------------- the contact sheet

def found_for(shown, queries, ranks, facets=None, found=5):
    """What some of the texts shown find -> [{"text", "rank", "of", "found": [tile], "right": tile or None}].

    ranks: of all texts, 0 for the first place; None where nobody knows what is right. facets [len(queries), K, D]: theirs.
    A tile is {"picture": its index, "score", "right": bool or None, "facets": [K similarities]}; "right" is the best right
    picture where none is among those found.
    """
    def tile(n, query, picture):
        units = facets[n] / np.linalg.norm(facets[n], axis=-1, keepdims=True) if facets is not None else np.empty((0, shown.image.shape[1]))
        return {"picture": int(picture), "score": float(shown.image[picture] @ shown.text[query]), "facets": (units @ shown.image[picture]).tolist(),
                "right": None if ranks is None else bool(shown.image_ids[picture] == shown.text_ids[query])}

    rows = []
    for n, query in enumerate(queries):
        order = np.argsort(-(shown.image @ shown.text[query]), kind="stable")
        tiles = [tile(n, query, picture) for picture in order[:found]]
        right = [] if ranks is None or any(t["right"] for t in tiles) else order[shown.image_ids[order] == shown.text_ids[query]][:1]
        rows.append({"text": shown.texts[query], "rank": None if ranks is None else int(ranks[query]), "of": len(order), "found": tiles,
                     "right": tile(n, query, right[0]) if len(right) else None})
    return rows


def wrapped(text, font, width):
    """Lines of words no wider than `width` pixels, as far as single words allow."""
    lines = []
    for word in printable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw_sheet(rows, pictures, named=False, side=128):
    """What found_for returns -> PIL image: each text and the pictures found for it, best first; green frame right, red wrong."""
    font, heading, small = ImageFont.load_default(14), ImageFont.load_default(15), ImageFont.load_default(11)
    margin, width, line, cell, tall = 16, 420, 18, side + 22, side + 22 + 16 * named
    columns, blocks = min(5, max(len(row["found"]) for row in rows)), []
    for row in rows:
        lines = wrapped(row["text"], font, width - 2 * margin)
        lines = lines if len(lines) <= 14 else lines[:13] + [lines[13] + " …"]
        blocks.append((row, lines, max(tall * -(-len(row["found"]) // columns) + 4, line * (len(lines) + 2) + 14)))
    sheet = Image.new("RGB", (2 * margin + width + columns * cell, 2 * margin + sum(height for _, _, height in blocks)), "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for row, lines, height in blocks:
        head = f"the best of {row['of']} pictures" if row["rank"] is None else f"the right picture is number {row['rank'] + 1} of {row['of']}"
        draw.text((margin, top), head, INK if row["rank"] is None else "#00803c" if row["rank"] == 0 else "#b00020", heading)
        draw.multiline_text((margin, top + line + 4), "\n".join(lines), INK, font, spacing=line - 14)
        for place, tile in enumerate(row["found"]):
            left, up = margin + width + place % columns * cell, top + place // columns * tall
            draw.rectangle((left, up, left + side + 11, up + side + 11), fill={None: "#d0d0d0", True: GREEN, False: RED}[tile["right"]])
            with open_picture(pictures[tile["picture"]]) as picture:
                sheet.paste(ImageOps.pad(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC, "white"), (left + 6, up + 6))
            if named:
                name = printable(Path(pictures[tile["picture"]]).name)
                draw.text((left, up + side + 13), f"{tile['score']:.3f}  {name if len(name) <= 16 else name[:15] + '…'}", INK, small)
        top += height
    return sheet


def draw_words(image, grid, side=720):
    """The middle square of a picture, as the image tower sees it, and over each cell of it the grid's word -> PIL image"""
    sheet = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC).convert("RGB")
    draw, cell = ImageDraw.Draw(sheet), side / len(grid)
    for y, row in enumerate(grid):
        for x, word in enumerate(row):
            draw.rectangle((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell), outline="#ffffff")
            size = min(22.0, 1.6 * cell / max(4, len(word)))
            draw.text(((x + 0.5) * cell, (y + 0.5) * cell), printable(word), "white", ImageFont.load_default(size), "mm", stroke_width=2, stroke_fill="black")
    return sheet


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


def draw_facets(rows):
    """What evaluate.ablation returns -> PIL image: R@1 over the number of facets; each facet alone, and all but it."""
    scale, (wide, high) = 2, (1160, 440)
    plot = Image.new("RGB", (wide * scale, high * scale), "white")
    draw, font = ImageDraw.Draw(plot), ImageFont.load_default(14 * scale)
    text = lambda x, y, words, colour=INK, anchor="la": draw.text((x * scale, y * scale), words, colour, font, anchor)
    line = lambda points, colour, width=2: draw.line([(x * scale, y * scale) for x, y in points], colour, width * scale)
    most = min(100, max(row["ci95"][d]["R@1"][1] for row in rows for d in ("text_to_image", "image_to_text")) * 1.08 + 1)
    top, bottom = 60, high - 60
    up = lambda value: bottom - (bottom - top) * value / most
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("in order", "alone", "all but one")}

    def panel(left, right, title, *legend):
        text(left, 12, title)
        for tick in range(0, int(most) + 1, 5 if most <= 30 else 10 if most <= 60 else 20):
            line([(left, up(tick)), (right, up(tick))], "#e6e6e6", 1)
            text(left - 8, up(tick), str(tick), GREY, "rm")
        for i, (words, colour) in enumerate(legend):
            draw.rectangle([(left + 170 * i) * scale, 37 * scale, (left + 170 * i + 12) * scale, 49 * scale], fill=colour)
            text(left + 170 * i + 18, 34, words)

    panel(60, 540, "R@1, the first n facets (inference only)", ("text to image", BLUE), ("image to text", ORANGE))
    for direction, colour, shift in (("text_to_image", BLUE, -4), ("image_to_text", ORANGE, 4)):
        at = {len(row["facets"]): 60 + 480 * (i + 0.5) / len(kinds["in order"]) + shift for i, row in enumerate(kinds["in order"])}
        line([(at[len(row["facets"])], up(row[direction]["R@1"])) for row in kinds["in order"]], colour)
        for row in kinds["in order"]:
            x, (low, high_end) = at[len(row["facets"])], row["ci95"][direction]["R@1"]
            line([(x, up(low)), (x, up(high_end))], colour, 1)
            draw.ellipse([(x - 4) * scale, (up(row[direction]["R@1"]) - 4) * scale, (x + 4) * scale, (up(row[direction]["R@1"]) + 4) * scale], fill=colour)
            text(x - shift, bottom + 8, str(len(row["facets"])), INK, "ma")
    panel(620, wide - 20, "R@1 text to image", ("this facet alone", BLUE), ("all but this one", ORANGE))
    step = (wide - 640) / max(1, len(kinds["alone"]))
    for i, row in enumerate(kinds["alone"]):
        for kind, colour, shift in (("alone", BLUE, 0.12), ("all but one", ORANGE, 0.5)):
            if i < len(kinds[kind]):
                x, value, (low, high_end) = 620 + step * (i + shift), kinds[kind][i]["text_to_image"]["R@1"], kinds[kind][i]["ci95"]["text_to_image"]["R@1"]
                draw.rectangle([x * scale, up(value) * scale, (x + step * 0.34) * scale, bottom * scale], fill=colour)
                line([(x + step * 0.17, up(low)), (x + step * 0.17, up(high_end))], INK, 1)
        for n, words in enumerate(wrapped(FACETS[row["facets"][0] - 1], font, step * scale)[:3]):
            text(620 + step * (i + 0.5), bottom + 6 + 16 * n, words, INK, "ma")
    return plot.resize((wide, high), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------- the page

def thumbnail(picture, side=160):
    """-> data URL of a JPEG that fits side x side"""
    with open_picture(picture) as image:
        small, out = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC), io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def page(result, queries, pictures):
    """report.html filled in: everything is in the one file. queries: what found_for returns."""
    used = {tile["picture"] for row in queries for tile in [*row["found"], row["right"]] if tile}
    blob = json.dumps({"result": result, "queries": queries, "facets": FACETS, "pictures": {i: thumbnail(pictures[i]) for i in sorted(used)}})
    for mark in "<>&\u2028\u2029":      # nothing in the data can end the script element or begin a comment
        blob = blob.replace(mark, f"\\u{ord(mark):04x}")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/null")
    return before + blob + after
