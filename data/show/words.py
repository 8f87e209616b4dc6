"""evaluate.py --words: what each patch of a picture says, in the LLM's own words."""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps

import flame
from data import files
from data.show import fonts, report
from flame import InputError


@torch.inference_mode()
def patch_states(model, pixels):
    """[3, H, W] -> [g, g, D]: a picture's patches in the LLM's space, four pooled to one where it is even.

    A text projection led out of that space: undone here is what it does to one column, the whole of a long
    caption where the checkpoint was trained on that. Agreement erases directions, and cannot be undone: what
    it kept is weighed as it weighs it.
    """
    patches = model.visual(pixels[None])[0, 1:]
    side = round(len(patches) ** 0.5)

    def pool(x):  # [side * side, n] -> [g * g, n]
        return F.avg_pool2d(x.T.unflatten(1, (side, side)), 2 - side % 2).flatten(1).T

    states = model.mm(pool(patches)) if model.config["pool_first"] else pool(model.mm(patches))

    columns = model.config["columns"]
    c = flame.COLUMNS.index("long.0" if "long.0" in columns else columns[0])
    text = model.text
    identity = torch.eye(states.shape[1], device=states.device)
    projection = text.rest[c] * identity + text.basis[c] * text.gain[c] @ text.basis[c].T
    if text.rest[c] == 0 and not text.gain[c].all():
        states = states @ projection
    else:
        if c in text.mapped:
            m = text.mapped.index(c)
            trained = text.down[m] @ text.up[m] if hasattr(text, "down") else text.up[m]
            projection = projection @ (identity + trained)
        states = torch.linalg.solve(projection, states, left=False)

    side = int(len(states) ** 0.5)
    return states.reshape(side, side, -1)


def show(args, model, llm):
    """Prints, and draws over the picture, the word that the LLM's unembedding finds nearest to each patch."""
    try:
        with report.open_picture(args.words) as image:
            pixels = model.preprocess(image)
            image = image.convert("RGB")
    except Exception as error:  # decoders raise nearly anything on a stranger's bytes
        raise InputError(f"{report.reason(args.words, error)}; --words wants a picture") from None

    norm, unembedding = flame.load_unembedding(llm)
    if len(norm) != model.config["text_dim"]:
        raise InputError(f"{llm}: its states have {len(norm)} dimensions, the checkpoint was trained for "
                         f"{model.config['text_dim']}; name the right LLM with --llm")

    tokenizer = flame.load_tokenizer(llm)
    words = {}      # token: its text; whole words only, which begin with a space: parts of words say little
    for token in range(len(unembedding)):
        text = tokenizer.decode([token])
        if len(text) > 3 and text[0] == " " and text[1:].isalpha():
            words[token] = text[1:]
    if not words:
        raise InputError(f"{llm}: its tokenizer has no token that is a whole word")

    states = patch_states(model, pixels.to(args.device)).cpu()
    logits = states * norm @ unembedding[list(words)].T       # an RMSNorm's scale changes no order
    grid = np.array(list(words.values()))[logits.argmax(-1).numpy()].tolist()
    for row in grid:
        print("  ".join(f"{word:14}" for word in row).rstrip())

    path = args.out / "words.png"
    files.write(path, draw_words(image, grid).save)
    print(f"-> {path}")


def draw_words(image, grid, side=720):
    """The middle square of a picture, as the image tower sees it, and over each cell its word -> PIL image"""
    sheet = ImageOps.fit(image, (side, side))
    pen = ImageDraw.Draw(sheet)
    cell = side / len(grid)
    for y, row in enumerate(grid):
        for x, word in enumerate(row):
            left = x * cell
            top = y * cell
            pen.rectangle((left, top, left + cell, top + cell), outline="white")
            size = min(22.0, 1.6 * cell / max(4, len(word)))
            left += (cell - fonts.width(word, size)) / 2
            top += (cell - size) / 2
            fonts.draw_text(pen, left, top, word, size, "white", stroke_width=2, stroke_fill="black")
    return sheet
