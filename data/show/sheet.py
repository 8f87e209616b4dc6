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
DARK_GREEN = "#00803c"
DARK_RED = "#b00020"
QUERIES = 8

# Pixels: the column of texts, their size and line; a picture, its frame, a picture with all around it, how
# many stand side by side.
TEXT = 420
SIZE = 14
LINE = 18
SIDE = 128
FRAME = 6
CELL = SIDE + 2 * FRAME + 10
ACROSS = 5


class Shown(NamedTuple):
    """Texts and the gallery they are asked of; a picture is right where text_ids [N] = image_ids [M]."""
    texts: list             # N
    text: np.ndarray        # [N, D]
    pictures: list          # M Places
    image: np.ndarray       # [M, D], unit vectors
    text_ids: np.ndarray
    image_ids: np.ndarray
    prompts: str


def best_of(image, text, most=None):
    """Similarities [M] of a gallery [M, D] and a text [D] -> (them, the `most` best places, best first)"""
    scores = image @ text
    return scores, np.argsort(-scores, kind="stable")[:most]


def draw_sheet(shown, ranks, path):
    """Writes eight of the texts and the five best pictures of each, the right one in green.

    ranks int [N]: 0 where a right picture is first. Where none is among the five, the best one stands apart.
    """
    rows = []
    for query in np.sort(np.random.default_rng(0).permutation(len(ranks))[:QUERIES]):
        _, order = best_of(shown.image, shown.text[query])
        right = shown.image_ids == shown.text_ids[query]
        tiles = [(shown.pictures[i], GREEN if right[i] else GREY, "") for i in order[:ACROSS]]
        missed = [] if right[order[:ACROSS]].any() else order[right[order]][:1]
        head = f"the right picture is number {ranks[query] + 1} of {len(order)}"
        colour = DARK_RED if ranks[query] else DARK_GREEN
        apart = [(shown.pictures[i], GREEN, "") for i in missed]
        rows.append(draw_row(head, colour, shown.texts[query], tiles, apart))
    write_rows(rows, path)


def draw_row(head, colour, text, tiles, apart=()):
    """-> uint8 [height, width, 3]: a coloured line above a text; behind them tiles, (Place, colour of the
    frame, words below)."""
    font = font_of(text)
    letter = font.getlength(text[:400]) / max(1, len(text[:400]))
    lines = textwrap.wrap(printable(text)[:2000], max(8, int(0.9 * (TEXT - 32) / max(1, letter))),
                          max_lines=14, placeholder=" ...")
    tall = CELL + 16 * any(words for _, _, words in tiles)
    height = max(tall * -(-len(tiles) // ACROSS) + 4, LINE * (len(lines) + 2) + 14)
    row = Image.new("RGB", (TEXT + (ACROSS + 1) * CELL + 10, height), "white")
    pen = ImageDraw.Draw(row)
    pen.text((0, 0), head, colour, font_of(""))
    pen.multiline_text((0, LINE + 4), "\n".join(lines), INK, font, spacing=4)
    places = [(TEXT + n % ACROSS * CELL, n // ACROSS * tall) for n in range(len(tiles))]
    for (left, top), (place, frame, words) in zip([*places, (row.width - CELL, 0)], [*tiles, *apart]):
        picture = ImageOps.pad(thumbnail(place, SIDE), (SIDE, SIDE), color="white")
        row.paste(ImageOps.expand(picture, FRAME, frame), (left, top))
        pen.text((left, top + CELL - 9), printable(words), INK, font_of(words, 11))
    return np.array(row)


def write_rows(rows, path):
    files.write(path, ImageOps.expand(Image.fromarray(np.concatenate(rows)), 16, "white").save)


def thumbnail(place, side):
    """-> PIL image that fits side x side; a grey square where the picture cannot be read."""
    try:
        with open_picture(place) as image:
            scale = side / max(image.size)
            return image.convert("RGB").resize([max(1, round(scale * length)) for length in image.size])
    except Exception:  # decoders raise nearly anything on a stranger's bytes; evaluate.py has counted it
        return Image.new("RGB", (side, side), GREY)


def printable(text):
    """Without control characters and what UTF-8 cannot hold (file names may be any bytes)."""
    return "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())


@functools.cache
def font_of(text, size=SIZE):
    """Pillow's own font, which has little beyond ASCII; for other texts the font here that has most of one."""
    try:
        from matplotlib import font_manager
    except ImportError:
        font_manager = None
    if text.isascii() or not font_manager:
        return ImageFont.load_default(size)

    def letters(path):
        try:
            return len(set(map(ord, text)) & font_manager.get_font(path).get_charmap().keys())
        except Exception:  # a damaged font, or one of a kind that cannot be drawn
            return 0

    def rank(path):  # of those that have as much
        return "Sans" not in path, "Mono" in path
    plain = [font.fname for font in font_manager.fontManager.ttflist
             if (font.style, str(font.weight)) == ("normal", "400") and "LastResort" not in font.fname]
    return ImageFont.truetype(max(sorted(plain, key=rank), key=letters), size)
