"""Contact sheets: texts, and the images of a gallery that each of them finds."""
import functools
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import common
from data.images import open_image

GREEN = "#00a850"
GREY = "#d0d0d0"
INK = "#202020"

# Layout in pixels: the text column; an image, its frame, a cell with both and a line of text, and the number
# of cells per row.
TEXT_WIDTH = 400
SIDE = 128
FRAME = 6
CELL = SIDE + 2 * FRAME + 18
CELLS_PER_ROW = 6


class Examples(NamedTuple):
    """Texts, and the gallery that they are searched in."""
    texts: list                # N
    text: np.ndarray           # [N, D]
    images: list               # M ImageLocations
    image: np.ndarray          # [M, D], unit vectors
    image_of_text: np.ndarray  # int [N]
    prompts: str


def best_of(image, text, n=None):
    """Return (similarities [M] of a gallery [M, D] and a text [D], the n best indices, best first)."""
    scores = image @ text
    return scores, np.argsort(-scores, kind="stable")[:n]


def draw_sheet(examples, title, path):
    """Write eight of the texts, each with its five best images.

    The correct image is marked. If it is not among the five, it is added as a sixth.
    """
    rows = [draw_row(f"{title}\nticked: the correct image, last if it is not among the best", "", [])]
    for query in np.random.default_rng(0).permutation(len(examples.texts))[:8]:
        _, order = best_of(examples.image, examples.text[query])
        correct = examples.image_of_text[query]
        label = f"correct: rank {(order == correct).argmax() + 1}"
        best = dict.fromkeys([*order[:CELLS_PER_ROW - 1], correct])
        tiles = [(examples.images[i], label if i == correct else "", i == correct) for i in best]
        rows.append(draw_row(f"the best of {len(order)} images", examples.texts[query], tiles))
    write_rows(rows, path)


def draw_row(head, text, tiles):
    """Return uint8 [height, width, 3]: a heading and a text, and beside them tiles (ImageLocation, label,
    whether it is correct). A correct tile has a green frame and a tick, for readers who cannot see green.
    """
    lines = [head, "", *textwrap.wrap(printable(text), 46, max_lines=14, placeholder=" ...")]
    height = max(CELL * -(-len(tiles) // CELLS_PER_ROW), 18 * (len(lines) + 1))  # a line takes 18 pixels
    row = Image.new("RGB", (TEXT_WIDTH + CELLS_PER_ROW * CELL, height), "white")
    draw = ImageDraw.Draw(row)
    draw.multiline_text((0, 0), "\n".join(lines), INK, load_font(), spacing=4)
    for n, (location, label, correct) in enumerate(tiles):
        left, top = TEXT_WIDTH + n % CELLS_PER_ROW * CELL, n // CELLS_PER_ROW * CELL
        image = ImageOps.pad(thumbnail(location, SIDE), (SIDE, SIDE), color="white")
        row.paste(ImageOps.expand(image, FRAME, GREEN if correct else GREY), (left, top))
        draw.text((left, top + SIDE + 2 * FRAME), printable(label), INK, load_font(11))
        if correct:
            draw.text((left + 8, top), "\u2713", GREEN, load_font(36), stroke_width=4, stroke_fill="white")
    return np.array(row)


def write_rows(rows, path):
    common.atomic_save(path, ImageOps.expand(Image.fromarray(np.concatenate(rows)), 16, "white").save)


def thumbnail(location, side):
    """Return a PIL image that fits into side x side; a grey square if it cannot be read."""
    try:
        with open_image(location) as image:
            return ImageOps.contain(image.convert("RGB"), (side, side))
    except Exception:  # decoders can raise any exception; evaluate.py has counted it
        return Image.new("RGB", (side, side), GREY)


def printable(text):
    """Replace control characters, and bytes of file names that are not UTF-8."""
    return "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode())


@functools.cache
def load_font(size=14):
    """Return the font of the matplotlibrc, or DejaVu, which covers most alphabets. Without matplotlib, return
    Pillow's default, which covers ASCII.
    """
    try:
        from matplotlib.font_manager import findfont
        return ImageFont.truetype(findfont(None), size)
    except ImportError:
        return ImageFont.load_default(size)
