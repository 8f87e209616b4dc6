"""Results to look at: lines of text, the contact sheet, the page report.html.

Numbers come from evaluate.py; nothing is computed here but similarities of what is shown. Captions, class
names and file names come from strangers: they reach the page as data, never as markup.
"""
import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data import files
from data.benchmarks import InTar
from data.pictures import read_picture
from data.show.fonts import draw_text, printable, wrapped
from data.show.plots import draw_facets, facet_names

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text",
              "both_ways": "average of both"}
FIGURES = ("top1", "top5", "mean_per_class", "accuracy")
COUNTS = {"n_train": "training pictures", "n_texts": "texts", "n_images": "pictures", "n_classes": "names",
          "n_sharing_a_name": "of the names are shared", "n_rows": "rows"}
GREEN = "#00a850"
DARK_GREEN = "#00803c"
RED = "#d83040"
DARK_RED = "#b00020"
INK = "#202020"
GREY = "#d0d0d0"


def open_picture(picture):
    """Path, InTar, or uint8 array [H, W] or [H, W, 3] -> PIL image, to be closed"""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    place = (picture.tar, picture.offset, picture.size) if isinstance(picture, InTar) else (picture,)
    return Image.open(io.BytesIO(read_picture(*place)))


def reason(picture, error):
    """Why a picture cannot be read, in one line that names it."""
    name = "a picture" if isinstance(picture, np.ndarray) else picture
    if isinstance(picture, InTar):
        name = f"{picture.tar}:{picture.name}"
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(f"{name}: {why}".split())


def thumbnail(picture, side):
    """-> PIL image that fits side x side; a grey square where the picture cannot be read."""
    try:
        with open_picture(picture) as image:
            scale = side / max(image.size)
            return image.convert("RGB").resize([max(1, round(scale * length)) for length in image.size])
    except Exception:  # decoders raise nearly anything on a stranger's bytes; evaluate.py has counted it
        return Image.new("RGB", (side, side), GREY)


# ---------------------------------------------------------------- lines of text

def cell(part, key, direction=None):
    """A figure and its 95% interval, percent."""
    ci95 = part.get("ci95", {})
    if direction:
        part = part[direction]
        ci95 = ci95.get(direction, {})
    interval = "[{:.1f}, {:.1f}]".format(*ci95[key]) if key in ci95 else ""
    return f"{part[key]:5.1f} {interval:14}"


def cells(part, keys, direction=None):
    return "   ".join(f"{key} {cell(part, key, direction)}" for key in keys)


def both_recalls(row, at=""):
    there = cell(row, "R@1", "text_to_image")
    back = cell(row, "R@1", "image_to_text")
    return f"text to image {at}{there}   image to text {at}{back}"


def parts_of(result, whole):
    """{name: part}, by the name `whole` the result itself where it has no parts."""
    parts = dict(result.get("parts") or {whole: result})
    return parts | {"average": result} if "accuracy" in result else parts


def table(result):
    """The numbers of a result, part by part, as lines of text."""
    lines = []
    for name, part in parts_of(result, result["bench"]).items():
        languages = part.get("languages", {})
        counts = [f"{part[key]} {word}" for key, word in COUNTS.items() if part.get(key)]
        if languages:
            counts.append(f"{len(languages)} languages")
        chance = f"R@1 {100 / part['n_images']:.1f}" if "text_to_image" in part else f"{part['chance']:.1f}"
        lines.append(f"{name}: {', '.join(counts)}, chance {chance}")
        for direction, words in DIRECTIONS.items():
            if direction in part:
                lines.append(f"    {words:16}{cells(part, part[direction], direction)}")
        figures = cells(part, [key for key in FIGURES if key in part])
        if figures:
            lines.append(f"    {figures}")
        for language, row in languages.items():
            if "top1" in row:
                figures = f"{cells(row, ['top1'])} among {row['n_classes']}"
            else:
                figures = both_recalls(row, "R@1 ")
            lines.append(f"    {language:8}{figures}")
    return lines


def facet_table(rows):
    """What evaluate.ablation returns, as lines of text."""
    lines = ["R@1 with some facets only, from one set of embeddings (inference only, the checkpoint stays)"]
    for row in rows:
        facets = ",".join(map(str, row["facets"]))
        if row["kind"] == "alone":
            facets += f" {facet_names()[row['facets'][0] - 1]}"
        lines.append(f"    {row['kind']:12} {facets:32} {both_recalls(row)}")
    return lines


# ---------------------------------------------------------------- the contact sheet

class Shown(NamedTuple):
    """Texts and the gallery they are asked of; a picture is right where text_ids [N] = image_ids [M]."""
    texts: list             # N
    text: np.ndarray        # [N, D]
    pictures: list          # M
    image: np.ndarray       # [M, D]
    text_ids: np.ndarray
    image_ids: np.ndarray
    prompts: str
    templates: int = 1      # that a text's vector is the mean of


def found_for(shown, query, rank=None, facets=None, best=5):
    """What a text finds -> {"text", "rank", "of", "facets": names, "found": [tile], "right": tile or None}.

    rank: 0 for the first place; None where nobody knows what is right. facets: {name: vector [D]} of the
    text. A tile is {"picture": its index, "score", "right": bool or None, "facets": similarities}; "right" is
    the best right picture where none is among those found.
    """
    scores = shown.image @ shown.text[query]
    right = shown.image_ids == shown.text_ids[query]
    facets = facets or {}

    def tile(picture):
        by_facet = [float(facet / np.linalg.norm(facet) @ shown.image[picture]) for facet in facets.values()]
        return {"picture": int(picture), "score": float(scores[picture]), "facets": by_facet,
                "right": None if rank is None else bool(right[picture])}

    order = np.argsort(-scores, kind="stable")
    row = {"text": shown.texts[query], "rank": None if rank is None else int(rank), "of": len(order),
           "facets": list(facets), "found": [tile(picture) for picture in order[:best]], "right": None}
    if right.any() and not right[order[:best]].any():
        row["right"] = tile(order[right[order]][0])
    return row


# Pixels: the column of texts, their size and line; the sheet's edge; a picture, its frame, a picture with all
# around it, how many stand side by side.
TEXT = 420
SIZE = 14
LINE = 18
MARGIN = 16
SIDE = 128
FRAME = 6
CELL = SIDE + 2 * FRAME + 10
ACROSS = 5


def draw_sheet(rows, pictures, named=False):
    """What found_for returns -> PIL image: each text and the pictures found for it, best first; green frame
    right, red wrong.

    Behind them, apart, the right picture where it is not among them. named: with scores and file names.
    """
    drawn = np.concatenate([draw_row(row, pictures, named) for row in rows])
    return ImageOps.expand(Image.fromarray(drawn), MARGIN, "white")


def draw_row(row, pictures, named):
    lines = wrapped(row["text"], SIZE, TEXT - 2 * MARGIN)
    found = row["found"]
    tall = CELL + 16 * named
    height = max(tall * -(-len(found) // ACROSS) + 4, LINE * (len(lines) + 2) + 14)
    image = Image.new("RGB", (TEXT + (ACROSS + 1) * CELL + 10, height), "white")
    pen = ImageDraw.Draw(image)
    head = f"the best of {row['of']} pictures"
    colour = INK
    if row["rank"] is not None:
        head = f"the right picture is number {row['rank'] + 1} of {row['of']}"
        colour = DARK_RED if row["rank"] else DARK_GREEN
    draw_text(pen, 0, 0, head, SIZE + 1, colour)
    for n, line in enumerate(lines, 1):
        draw_text(pen, 0, LINE * n + 4, line, SIZE, INK)
    for n, tile in enumerate(found):
        left = TEXT + n % ACROSS * CELL
        top = n // ACROSS * tall
        image.paste(framed(tile, pictures), (left, top))
        if named:
            name = printable(Path(pictures[tile["picture"]]).name)[:16]
            draw_text(pen, left, top + CELL - 9, f"{tile['score']:.3f}  {name}", 11, INK)
    if row["right"]:
        image.paste(framed(row["right"], pictures), (image.width - CELL, 0))
    return image


def framed(tile, pictures):
    """A picture on white in a frame that says whether it is right."""
    picture = ImageOps.pad(thumbnail(pictures[tile["picture"]], SIDE), (SIDE, SIDE), color="white")
    return ImageOps.expand(picture, FRAME, {None: GREY, True: GREEN, False: RED}[tile["right"]])


# ---------------------------------------------------------------- files

def write(path, result, shown, ranks, facets_by_name=None):
    """Writes what there is to look at: facet plot, contact sheet and, with facets_by_name, the page.

    ranks: of all texts shown. facets_by_name(texts, prompts): what each facet of them says. -> names of files
    """
    written = []

    def keep(ending, save):
        written.append(f"{path}{ending}")
        files.write(written[-1], save)

    plot = draw_facets(result["facets"]) if "facets" in result else None
    if plot:
        keep("-facets.png", plot.savefig)
    queries = []
    if shown:
        order = np.random.default_rng(0).permutation(len(ranks))
        rows = [found_for(shown, query, ranks[query]) for query in np.sort(order[:8])]
        keep(".png", draw_sheet(rows, shown.pictures).save)
    if shown and facets_by_name:
        some = [*order[ranks[order] == 0][:6], *order[ranks[order] > 0][:6]]    # six right, six wrong
        facets = [None] * len(some)
        if shown.templates == 1:    # else a text stands for many
            facets = facets_by_name([shown.texts[query] for query in some], shown.prompts)
        queries = [found_for(shown, query, ranks[query], own) for query, own in zip(some, facets)]
    if facets_by_name:
        written.append(f"{path}.html")
        files.write_text(written[-1], page(result, queries, shown.pictures if shown else [], plot))
    return written


# ---------------------------------------------------------------- the page

def data_url(save, kind, **settings):
    """What a PIL image's save or a matplotlib Figure's savefig writes, as data URL: the page is one file."""
    out = io.BytesIO()
    save(out, format=kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def page(result, queries, pictures, plot=None):
    """The page of one result. queries: what found_for returns; plot: of the facets."""
    used = {tile["picture"] for row in queries for tile in [*row["found"], row["right"]] if tile}
    return filled({"result": result, "queries": queries, "facets": facet_names(),
                   "pictures": {i: small(pictures[i]) for i in sorted(used)},
                   "plot": plot and data_url(plot.savefig, "png")})


def small(picture):
    """-> data URL of a thumbnail."""
    return data_url(thumbnail(picture, 160).save, "jpeg", quality=85)


def filled(data):
    """report.html with its data: all is in the one file."""
    blob = json.dumps(data)
    for mark in "<>&\u2028\u2029":      # nothing in the data can end the script element or begin a comment
        blob = blob.replace(mark, f"\\u{ord(mark):04x}")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/null")
    return before + blob + after
