"""The contact sheet: texts, and the pictures of a gallery that each of them finds."""
import functools
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import files
from data.pictures import open_picture

GREEN = "#00a850"
GREY = "#d0d0d0"
INK = "#202020"
QUERIES = 8

# Pixels: the column of texts (and letters in its line), their line; a picture, its frame, a picture with all
# around it, how many stand side by side.
TEXT = 400
LETTERS = 46
LINE = 18
SIDE = 128
FRAME = 6
CELL = SIDE + 2 * FRAME + 18
ACROSS = 6


class Shown(NamedTuple):
    """Texts and the gallery they are asked of."""
    texts: list             # N
    text: np.ndarray        # [N, D]
    pictures: list          # M Places
    image: np.ndarray       # [M, D], unit vectors
    owner: np.ndarray       # int [N], the right picture of each text
    prompts: str


def best_of(image, text, most=None):
    """Similarities [M] of a gallery [M, D] and a text [D] -> (them, the `most` best places, best first)"""
    scores = image @ text
    return scores, np.argsort(-scores, kind="stable")[:most]


def draw_sheet(shown, title, path):
    """Writes eight of the texts and the five best pictures of each, the right one marked, be it the sixth.

    title: what stands above.
    """
    rows = [draw_row(f"{title}\nticked: the right picture, which is the sixth if not among the best", "", [])]
    for query in np.random.default_rng(0).permutation(len(shown.texts))[:QUERIES]:
        _, order = best_of(shown.image, shown.text[query])
        right = shown.owner[query]
        words = f"right: number {(order == right).argmax() + 1}"
        best = dict.fromkeys([*order[:ACROSS - 1], right])
        tiles = [(shown.pictures[i], words if i == right else "", i == right) for i in best]
        rows.append(draw_row(f"the best of {len(order)} pictures", shown.texts[query], tiles))
    write_rows(rows, path)


def draw_row(head, text, tiles):
    """-> uint8 [height, width, 3]: lines above a text; beside them tiles, (Place, words below, whether it is
    the right one). That has a green frame, and a tick for those who do not see green."""
    lines = [head, "", *textwrap.wrap(printable(text), LETTERS, max_lines=14, placeholder=" ...")]
    height = max(CELL * -(-len(tiles) // ACROSS), LINE * (len(lines) + 1))
    row = Image.new("RGB", (TEXT + ACROSS * CELL, height), "white")
    pen = ImageDraw.Draw(row)
    pen.multiline_text((0, 0), "\n".join(lines), INK, font_of(), spacing=4)
    for n, (place, words, right) in enumerate(tiles):
        left, top = TEXT + n % ACROSS * CELL, n // ACROSS * CELL
        picture = ImageOps.pad(thumbnail(place, SIDE), (SIDE, SIDE), color="white")
        row.paste(ImageOps.expand(picture, FRAME, GREEN if right else GREY), (left, top))
        pen.text((left, top + SIDE + 2 * FRAME), printable(words), INK, font_of(11))
        if right:
            pen.text((left + 8, top), "\u2713", GREEN, font_of(36), stroke_width=4, stroke_fill="white")
    return np.array(row)


def write_rows(rows, path):
    files.write(path, ImageOps.expand(Image.fromarray(np.concatenate(rows)), 16, "white").save)


def thumbnail(place, side):
    """-> PIL image that fits side x side; a grey square where the picture cannot be read."""
    try:
        with open_picture(place) as image:
            return ImageOps.contain(image.convert("RGB"), (side, side))
    except Exception:  # decoders raise nearly anything on a stranger's bytes; evaluate.py has counted it
        return Image.new("RGB", (side, side), GREY)


def printable(text):
    """Without control characters and what UTF-8 cannot hold (file names may be any bytes)."""
    return "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())


@functools.cache
def font_of(size=14):
    """What a matplotlibrc names, else DejaVu, which has most alphabets; without matplotlib Pillow's own,
    which has ASCII."""
    try:
        from matplotlib.font_manager import findfont
        return ImageFont.truetype(findfont(None), size)
    except ImportError:
        return ImageFont.load_default(size)
