"""The authors' released code, as far as its checkpoints and stores need it: text path, .pt file; and image
towers as open_clip publishes them. It is not the method.

Where it differs from flame.py: a caption is cut to 1,024 tokens, decoded, and cleaned unstripped; all
questions follow one another in one string, so that their positions are consecutive and each is tokenized
after the one before; in the short and long sets a literal <s> stands before the first question; the
similarity is that of the mean *unnormalised* state. What its padding masks do to a batch is not repeated:
this is what it gives one caption at a time.
"""
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import flame
from flame import explained as said
from flame import InputError

CAPTION_TOKENS = 1024  # BOS included
CONTEXT = 1536         # tokens of the whole string


def text_path(positions):
    """(tokenizer, captions, prompts) -> ids: flame's own, or for "sequential" the released one."""
    return tokenize if positions == "sequential" else flame.tokenize


def text_encoder(llm_dir, device="cpu", dtype=torch.bfloat16, layer=None, positions="restart"):
    """The text tower that a store or a checkpoint says it was made with: flame's own, or the released one."""
    if positions != "sequential":
        return flame.TextEncoder(llm_dir, device, dtype, layer, positions)
    encoder = flame.TextEncoder(llm_dir, device, dtype, layer, positions, tokenize=tokenize)
    encoder.context = min(encoder.context, CONTEXT)
    return encoder


def tokenize(tokenizer, captions, prompts):
    """-> ([N] prefix ids, [N][K] facet ids), as flame.tokenize: prefix + all facets are the ids of the one
    string.
    """
    prefix = flame.prompt_set(prompts).prefix
    texts = [prefix.replace("{}", caption) for caption in as_released(tokenizer, captions)]
    return flame.tokenize_texts(tokenizer, texts, prompts, tokenize_whole)


def as_released(tokenizer, captions):
    """Captions as the released code puts them into the template."""
    texts = []
    for ids in tokenizer.encode_batch(list(captions)):
        text = tokenizer.decode(ids[:CAPTION_TOKENS])
        if text and not text.endswith((".", "?", '"', "'")):
            text += "."
        if text.endswith("?"):
            text = text[:-1] + "."
        texts.append(text.replace('"', "'"))
    return texts


def tokenize_whole(tokenizer, text, facets):
    """The string with all questions, tokenized -> (ids of the text alone, ids of each question)."""
    first = "<s> " + facets[0] if len(facets) > 1 else facets[0]
    beginnings = list(accumulate([text, first, *facets[1:]], "{} {}".format))  # each holds one question more
    ids = tokenizer.encode_batch(beginnings)
    cuts = [flame.shared_prefix(ids[-1], beginning) for beginning in ids]
    return ids[-1][:cuts[0]], [ids[-1][start:stop] for start, stop in zip(cuts, cuts[1:])]


def load(path):
    """The authors' .pt file -> flame.Flame in eval mode.

    Its file does not name the LLM, so that config["llm"] has no fingerprint; config["pool"] is "released".
    Nothing in the file is executed, and of the LLM's tensors, if it holds them, no byte is read. Raises
    flame.InputError where the file is none.
    """
    path = Path(path)
    try:
        weights = read_weights(path)
        sizes = flame.sizes_of(weights)
        llm = {"name": None, "fingerprint": None, "layer": None, "positions": "sequential"}
        model = flame.Flame(sizes | {
            "heads": sizes["width"] // 64, "pool_first": False, "text_rank": 0,
            "columns": flame.COLUMNS, "llm": llm, "pool": "released"})
        # The frozen LLM, and what the model has and never calls.
        unused = ("text.", "visual.ln_post.", "visual.proj=")
        ours = {name: tensor for name, tensor in weights.items() if not f"{name}=".startswith(unused)}
        model.load_state_dict(ours | model.text.state_dict(prefix="text."))
    except Exception as e:  # torch.load raises nearly anything on a broken file
        # Before these words torch advises to trust the file.
        why = said(str(e).split("WeightsUnpickler error: ")[-1])
        raise InputError(f"{path}: not a FLAME checkpoint ({type(e).__name__}: {why}); give the authors' "
                         ".pt file or a folder that train.py wrote") from None
    return model.eval()


HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # open_clip's ViT-H, g, bigG and e, by width


def image_tower(path):
    """open_clip's weights (.safetensors or .pt) -> (sizes of the image tower, its tensors by our names).

    CLIP's towers have heads of 64, the largest others (HEAD_WIDTH). OpenAI's own weights were trained with
    another GELU (QuickGELU) than the one here: prefer others. Raises flame.InputError where the file holds no
    such tower.
    """
    path = Path(path)
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else read_weights(path)
        sizes = flame.sizes_of(weights)
        unused = ("visual.ln_post.", "visual.proj=")  # FLAME has neither
        visual = {name.removeprefix("visual."): tensor for name, tensor in weights.items()
                  if name.startswith("visual.") and not f"{name}=".startswith(unused)}
    except Exception as e:  # torch.load raises nearly anything on a broken file
        why = said(str(e).split("WeightsUnpickler error: ")[-1])
        raise InputError(f"{path}: no image tower of open_clip's ({type(e).__name__}: {why}); give "
                         "open_clip_model.safetensors, or its .pt file, of a ViT") from None
    wanted = ("image_size", "patch_size", "width", "layers")
    heads = sizes["width"] // HEAD_WIDTH.get(sizes["width"], 64)
    return {name: sizes[name] for name in wanted} | {"heads": heads}, visual


def read_weights(path):
    scalar = np.float64(0).__reduce__()[0]  # an optimizer's state may hold numpy scalars
    allowed = [np.dtype, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    allowed += [type(np.dtype(letter)) for letter in "efdil?"]
    with torch.serialization.safe_globals(allowed):
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in file.get("state_dict", file).items()}
