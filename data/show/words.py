"""The LLM's word for each patch of an image, which the search page shows after a click."""
import functools

import numpy as np
import torch
import torch.nn.functional as F

import flame


@torch.inference_mode()
def patch_states(model, pixels):
    """Return an image's patches in the LLM's space [g, g, D], from pixels [3, H, W].

    If their number per side is even, 2 x 2 patches are averaged. Training compares an image z with A u, where
    u is a text's hidden state and A the closed-form map of its column. A is symmetric, so A z is in the LLM's
    own space. We use the A of long.0, or of the first trained column. The trained map M after it is left out:
    with it, the demo's words made little sense.
    """
    patches = model.visual(pixels[None])[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    pooled = F.avg_pool2d(patches.mT.unflatten(2, (side, side)), 2 - side % 2)[0]
    states = model.mm(pooled.permute(1, 2, 0))

    columns = model.config["columns"]
    c = flame.FACET_COLUMNS.index("long.0" if "long.0" in columns else columns[0])
    projection = model.text_projection
    basis = projection.basis[c]
    return projection.rest[c] * states + states @ basis * projection.gain[c] @ basis.T


@functools.lru_cache(1)
def vocabulary(llm):
    """Return (whole words [V], their unembedding vectors [V, D], with the final norm's weight).

    Whole words are tokens of a space and at least three letters.
    """
    read, names = flame.open_weights(llm)
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    norm = read("model.norm.weight").float() + flame.llm_config(llm)["norm_offset"]
    unembedding = read(head).float()
    tokenizer = flame.load_tokenizer(llm)
    texts = (tokenizer.decode([token]) for token in range(len(unembedding)))
    words = {token: text[1:] for token, text in enumerate(texts)
             if len(text) > 3 and text[0] == " " and text[1:].isalpha()}
    return np.array([*words.values()]), unembedding[[*words]] * norm


def words_of(model, llm, image):
    """Return the word with the highest logit for each patch of a PIL image, str [g, g], and its strength
    [g, g]: the cosine of patch and word, relative to the image's largest.
    """
    words, vectors = vocabulary(llm)
    states = patch_states(model, model.preprocess(image).to(model.visual.conv1.weight)).cpu()
    nearest = (states @ vectors.T).argmax(-1)
    cosines = F.cosine_similarity(states, vectors[nearest], dim=2)
    return words[nearest], (cosines / cosines.max()).numpy()
