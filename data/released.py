"""The authors' released code, as far as its checkpoints and stores need it: text path, .pt file; and image
towers as open_clip publishes them. It is not the method.

Where it differs from flame.py: a caption is cut to 1,024 tokens, decoded, and cleaned unstripped; all
questions follow one another in one string, so that their positions are consecutive and each is tokenized
after the one before; in the short and long sets a literal <s> stands before the first question; the
similarity is that of the mean *unnormalised* state. What its padding masks do to a batch is not repeated:
this is what it gives one caption at a time.
"""
import pickle
from itertools import accumulate, count

import numpy as np
import torch
from safetensors.torch import load_file

import flame
from flame import reading

CAPTION_TOKENS = 1024  # BOS included
CONTEXT = 1536         # tokens of the whole string
UNUSED = ("visual.ln_post.", "visual.proj=")  # FLAME has neither


def text_encoder(llm_dir, device="cpu", dtype=torch.bfloat16, layer=None, positions="restart"):
    """The text tower that a store or a checkpoint says it was made with: flame's own, or the released one."""
    if positions != "sequential":
        return flame.TextEncoder(llm_dir, device, dtype, layer, positions)
    encoder = flame.TextEncoder(llm_dir, device, dtype, layer, "causal")  # all questions take up its context
    encoder.tokenize = tokenize
    encoder.caption_forest = caption_forest
    encoder.context = min(encoder.context, CONTEXT)
    return encoder


def caption_forest(prefixes, suffixes):
    """As flame.caption_forest, of facets whose positions go on from one another though none sees another.

    Its tokens are told apart by their positions: where these differ none is shared.
    """
    sequences = []
    for prefix, facets in zip(prefixes, suffixes):
        numbers = count(len(prefix))
        sequences += [[*zip(prefix, count()), *zip(facet, numbers)] for facet in facets]
    forest = flame.build_forest(sequences)
    tokens, positions = forest.tokens.T
    return forest._replace(tokens=tokens, positions=positions)


def tokenize(tokenizer, captions, prompts):
    """-> ([N] prefix ids, [N][K] facet ids), as flame.tokenize: prefix + all facets are the ids of the one
    string.
    """
    template, (first, *others) = flame.PROMPTS[prompts]
    if others:
        first = "<s> " + first
    prefixes = []
    suffixes = []
    for caption in as_released(tokenizer, captions):
        parts = [template.replace("{}", caption), first, *others]
        ids = tokenizer.encode_batch(list(accumulate(parts, "{} {}".format)))  # each holds one question more
        cuts = [flame.shared_prefix(ids[-1], beginning) for beginning in ids]
        prefixes.append(ids[-1][:cuts[0]])
        suffixes.append([ids[-1][start:stop] for start, stop in zip(cuts, cuts[1:])])
    return prefixes, suffixes


def as_released(tokenizer, captions):
    """Captions as the released code puts them into the template."""
    texts = []
    for ids in tokenizer.encode_batch(list(captions)):
        text = tokenizer.decode(ids[:CAPTION_TOKENS]).replace('"', "'")
        if text.endswith("?"):
            text = text[:-1] + "."
        elif text and not text.endswith((".", "'")):
            text += "."
        texts.append(text)
    return texts


class Released(flame.Flame):
    """The authors' model, which takes the mean of facet states as they are, and then normalises."""

    def encode_text(self, facets, prompts="long"):
        """[N, K, D] states of any common scale -> [N, K, D], whose mean over facets is a unit vector."""
        return facets / facets.mean(1, keepdim=True).norm(dim=-1, keepdim=True)


def load(path):
    """The authors' .pt file -> Released in eval mode.

    Its file does not name the LLM, so that config["llm"] has no fingerprint. Nothing in the file is executed,
    and of the LLM's tensors, if it holds them, no byte is read. Raises InputError where the file is none.
    """
    with reading(path, "give the authors' .pt file, or a folder that train.py wrote"):
        weights = read_weights(path)
        if "text.mean" in weights:  # of a text projection, without which scores are others
            raise ValueError("weights that train.py wrote")
        llm = {"name": None, "fingerprint": None, "layer": None, "positions": "sequential"}
        model = Released(sizes_of(weights) | {
            "projector_hidden": len(weights["mm.0.weight"]), "text_dim": len(weights["mm.2.weight"]),
            "pool_first": False, "text_rank": 0, "columns": flame.COLUMNS, "llm": llm})
        ours = {name: tensor for name, tensor in weights.items() if not name.startswith("text.")}  # the LLM
        model.load_state_dict(ours | model.text.state_dict(prefix="text."))
    return model.eval()


def image_tower(path):
    """open_clip's weights (.safetensors or .pt) -> (sizes of the image tower, its tensors by our names).

    Which GELU it was trained with they do not tell. Raises InputError where the file holds no such tower.
    """
    with reading(path, "give open_clip_model.safetensors, or its .pt file, of a ViT"):
        weights = read_weights(path)
        sizes = sizes_of(weights)
    return sizes, {name[7:]: x for name, x in weights.items() if name.startswith("visual.")}


HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # open_clip's ViT-H, g, bigG and e; the others' is 64


def sizes_of(weights):
    """The config of an image tower, told by its tensors."""
    width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    patches = len(weights["visual.positional_embedding"]) - 1
    blocks = {name.split(".")[3] for name in weights if name.startswith("visual.transformer.resblocks.")}
    head_width = HEAD_WIDTH.get(width, 64)
    if not blocks or width % head_width or not all(x.is_floating_point() for x in weights.values()):
        raise ValueError(f"no ViT in floating point: {len(blocks)} blocks of width {width}")
    return {
        "image_size": patch_size * round(patches ** 0.5),
        "patch_size": patch_size,
        "width": width,
        "layers": len(blocks),
        "heads": width // head_width,
    }


def read_weights(path):
    """{name: tensor} of a .safetensors or .pt file, without what FLAME's image tower has no use for."""
    if str(path).endswith(".safetensors"):
        file = load_file(path)
    else:
        scalar = np.float64(0).__reduce__()[0]  # the optimizer's learning rate is one of numpy's
        allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        try:
            with torch.serialization.safe_globals([np.dtype, np.dtypes.Float64DType, *allowed]):
                file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:  # torch's first words advise to trust the file
            raise ValueError(str(error).split("WeightsUnpickler error: ")[-1]) from None
    weights = {name.removeprefix("module."): x for name, x in file.get("state_dict", file).items()}
    return {name: x for name, x in weights.items() if not f"{name}=".startswith(UNUSED)}
