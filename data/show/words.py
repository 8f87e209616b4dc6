"""evaluate.py --words: what each patch of a picture says, in the LLM's own words."""
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import flame
from data import files
from data.show import fonts, report
from flame import InputError


@torch.inference_mode()
def patch_states(model, pixels):
    """[3, H, W] -> [g, g, D]: a picture's patches in the LLM's space, four pooled to one where it is even.

    A text projection led out of that space: undone here is what it does to one column, the whole of a long
    caption where the checkpoint was trained on that.
    """
    patches = model.visual(pixels[None])[0, 1:]
    side = round(len(patches) ** 0.5)

    def pool(x):
        grid = x.T.reshape(-1, side, side)
        return F.avg_pool2d(grid, 2 - side % 2).flatten(1).T

    states = model.mm(pool(patches)) if model.config["pool_first"] else pool(model.mm(patches))

    columns = model.config["columns"]
    c = flame.COLUMNS.index("long.0" if "long.0" in columns else columns[0])
    text = model.text
    if c in text.mapped:
        m = text.mapped.index(c)
        trained = text.down[m] @ text.up[m] if hasattr(text, "down") else text.up[m]
        identity = torch.eye(len(trained), device=trained.device)
        states = torch.linalg.solve((identity + trained).T, states.T).T
    basis = text.basis[c]
    rest = text.rest[c].clamp_min(1e-6)
    along = states @ basis
    inside = along / (text.gain[c] + rest)
    states = (states - along @ basis.T) / rest + inside @ basis.T

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
    names = [tokenizer.decode([token]) for token in range(len(unembedding))]
    whole = []      # parts of words say little: a whole one begins with a space
    for token, name in enumerate(names):
        if len(name) > 3 and name[0] == " " and name[1:].isalpha():
            whole.append(token)
    if not whole:
        raise InputError(f"{llm}: its tokenizer has no token that is a whole word")

    states = patch_states(model, pixels.to(args.device)).cpu()
    logits = states * norm @ unembedding[whole].T       # an RMSNorm's scale changes no order
    grid = []
    for row in logits.argmax(-1).tolist():
        grid.append([names[whole[token]].strip() for token in row])
        print("  ".join(f"{word:14}" for word in grid[-1]).rstrip())

    path = args.out / "words.png"
    files.write(path, draw_words(image, grid).save)
    print(f"-> {path}")


def draw_words(image, grid, side=720):
    """The middle square of a picture, as the image tower sees it, and over each cell its word -> PIL image"""
    sheet = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC).convert("RGB")
    pen = ImageDraw.Draw(sheet)
    cell = side / len(grid)
    for y, row in enumerate(grid):
        for x, word in enumerate(row):
            left = x * cell
            top = y * cell
            pen.rectangle((left, top, left + cell, top + cell), outline="white")
            word = fonts.printable(word)
            size = min(22.0, 1.6 * cell / max(4, len(word)))
            left += (cell - fonts.width(word, size)) / 2
            top += (cell - size) / 2
            fonts.draw_text(pen, left, top, word, size, "white", stroke_width=2, stroke_fill="black")
    return sheet
