"""What each patch of a picture says, in the LLM's own words: of the page, a click on a picture."""
import functools

import numpy as np
import torch
import torch.nn.functional as F

import flame


@torch.inference_mode()
def patch_states(model, pixels):
    """[3, H, W] -> [g, g, D]: a picture's patches in the LLM's space, four pooled to one where it is even.

    A text projection leads out of that space: a text's u meets an image's z as u A, so that z A meets u
    itself (A is symmetric). A is of one column, the whole of a long caption where the checkpoint was trained
    on that. The trained map after it is left out: led back through that, the demo's patches say little.
    """
    patches = model.visual(pixels[None])[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    pooled = F.avg_pool2d(patches.mT.unflatten(2, (side, side)), 2 - side % 2)[0]
    states = model.mm(pooled.permute(1, 2, 0))

    columns = model.config["columns"]
    c = flame.COLUMNS.index("long.0" if "long.0" in columns else columns[0])
    text = model.text
    return text.rest[c] * states + states @ text.basis[c] * text.gain[c] @ text.basis[c].T


@functools.lru_cache(1)
def vocabulary(llm):
    """-> (whole words [V], what a state is multiplied with to score them [V, D]).

    Whole words are the tokens that begin with a space and have letters only: parts of words say little.
    """
    read, names = flame.weights_reader(llm)
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    norm = read("model.norm.weight").float() + flame.llm_config(llm)["norm_offset"]
    unembedding = read(head).float()
    tokenizer = flame.load_tokenizer(llm)
    texts = [tokenizer.decode([token]) for token in range(len(unembedding))]
    tokens = [token for token, text in enumerate(texts)
              if len(text) > 3 and text[0] == " " and text[1:].isalpha()]
    return np.array([texts[token][1:] for token in tokens]), unembedding[tokens] * norm


def words_of(model, llm, picture):
    """PIL image -> of each patch the word that the LLM's unembedding finds nearest, str [g, g], and its
    strength, [g, g]: the cosine of the two, over the picture's largest.
    """
    words, vectors = vocabulary(llm)
    device = next(model.parameters()).device
    states = patch_states(model, model.preprocess(picture).to(device)).cpu()
    nearest = (states @ vectors.T).argmax(-1)
    cosines = F.cosine_similarity(states, vectors[nearest], dim=2)
    return words[nearest], (cosines / cosines.max()).numpy()
