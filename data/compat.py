"""Models by others: FLAME's released code (its text path and .pt checkpoints), and open_clip.

The released code differs from flame.py in these points:

* A caption is tokenized, truncated to 1,024 tokens, decoded, and cleaned without stripping.
* All facet prompts form one string, with consecutive positions, and each is tokenized after the one before.
* In the short and long sets, a literal <s> precedes the first facet prompt.
* The facets are averaged before they are normalized.
* Its padding masks let facets of a padded batch see each other. This module reproduces the result for one
  caption at a time.
"""
import pickle
from itertools import accumulate, count

import numpy as np
import torch
import torch.nn.functional as F

import flame
from flame import InputError, PROMPTS, reading

CAPTION_TOKENS = 1024  # with BOS
CONTEXT_LENGTH = 1536  # tokens of the whole string
UNUSED = ("visual.ln_post.", "visual.proj=", "text.")  # prefixes; "=" ends a name; text. is the LLM


def text_encoder(llm_dir, device="cpu", dtype=torch.bfloat16, layer=None, mask="decoupled"):
    """Return the text encoder that a store or checkpoint records; mask "released" is the released code's."""
    released = mask == "released"  # then the chain must fit the context, as with "causal"
    encoder = flame.TextEncoder(llm_dir, device, dtype, layer, "causal" if released else mask)
    if released:
        encoder.tokenize = tokenize
        encoder.caption_forest = caption_forest
        encoder.context_length = min(encoder.context_length, CONTEXT_LENGTH)
    return encoder


def caption_forest(prefixes, suffixes):
    """Like flame.caption_forest, with consecutive positions for the facets, although none sees another.

    Tokens are paired with their positions: only tokens at equal positions are shared.
    """
    sequences = []
    for prefix, facets in zip(prefixes, suffixes):
        positions = count(len(prefix))
        sequences += [[*zip(prefix, count()), *zip(facet, positions)] for facet in facets]
    forest = flame.build_forest(sequences)
    tokens, positions = forest.tokens.T
    return forest._replace(tokens=tokens, positions=positions)


def tokenize(tokenizer, captions, prompts):
    """Like flame.tokenize, but prefix + all facets are the token ids of one string."""
    template, (first, *others) = PROMPTS[prompts]
    if others:
        first = "<s> " + first
    prefixes = []
    suffixes = []
    for ids in tokenizer.encode_batch(list(captions)):
        caption = tokenizer.decode(ids[:CAPTION_TOKENS]).replace('"', "'")
        if caption.endswith("?"):
            caption = caption[:-1] + "."
        elif caption and not caption.endswith((".", "'")):
            caption += "."
        parts = [template.replace("{}", caption), first, *others]
        rows = tokenizer.encode_batch(list(accumulate(parts, "{} {}".format)))  # each adds one facet prompt
        cuts = [flame.shared_prefix(rows[-1], beginning) for beginning in rows]
        prefixes.append(rows[-1][:cuts[0]])
        suffixes.append([rows[-1][start:stop] for start, stop in zip(cuts, cuts[1:])])
    return prefixes, suffixes


class ReleasedFlame(flame.Flame):
    """The released model, which averages the facet embeddings and then normalizes."""

    def encode_text(self, facets, prompts="long"):
        """Scale facets [N, K, D] (of any common scale) so that their mean over facets is a unit vector."""
        return facets / facets.mean(1, keepdim=True).norm(dim=-1, keepdim=True)


def load_released(path):
    """Return the model of a released .pt checkpoint in eval mode.

    The file does not name its LLM, so config["llm"] has no fingerprint. Nothing in it is executed, and the
    LLM's tensors, if there are any, are not read. Raises InputError if it is not such a checkpoint.
    """
    with reading(path, "give a released .pt checkpoint, or a folder that train.py wrote"):
        weights = read_weights(path)
        llm = {"name": None, "fingerprint": None, "layer": None, "mask": "released"}
        width, _, patch_size, _ = weights["visual.conv1.weight"].shape
        if width % 64:
            raise ValueError(f"a width of {width} is not a multiple of 64, the width of a head")
        patches = len(weights["visual.positional_embedding"]) - 1
        model = ReleasedFlame({
            "image_size": patch_size * round(patches ** 0.5), "patch_size": patch_size, "width": width,
            "layers": sum(name.endswith(".attn.in_proj_weight") for name in weights), "heads": width // 64,
            "projector_hidden": len(weights["mm.0.weight"]), "text_dim": len(weights["mm.2.weight"]),
            "pool_first": False, "text_rank": 0, "columns": flame.FACET_COLUMNS, "llm": llm})
        del model.text_projection  # a file with one is refused, because ignoring it would change the scores
        model.load_state_dict(weights)
    return model.eval()


def read_weights(path):
    """Return {name: tensor} of a .pt file, without those that FLAME does not use."""
    scalar = np.float64(0).__reduce__()[0]  # the optimizer state has a numpy learning rate
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([np.dtype, np.dtypes.Float64DType, *allowed]):
            file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:  # drop torch's advice to trust the file
        raise ValueError(str(error).split("WeightsUnpickler error: ")[-1]) from None
    weights = {name.removeprefix("module."): x for name, x in file.get("state_dict", file).items()}
    return {name: x for name, x in weights.items() if not f"{name}=".startswith(UNUSED)}


# ------------------------------------------------------------------------------------------------------------
# open_clip

class OpenClip(torch.nn.Module):
    """An open_clip model with the interface of flame.Flame and flame.TextEncoder that evaluation needs.

    spec: MODEL:WEIGHTS, with one of open_clip's names or a file as WEIGHTS, or "random". Raises InputError
    without WEIGHTS, or if open_clip is not installed or does not know the model.
    """

    def __init__(self, spec):
        super().__init__()
        name, _, weights = spec.partition(":")
        random = weights == "random"
        try:
            import open_clip
            self.clip, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=None if random else weights, require_pretrained=not random)
            self.tokenizer = open_clip.get_tokenizer(name)
            D = open_clip.get_model_config(name)["embed_dim"]
        except Exception as error:  # not installed, unknown model or weights, no network, a corrupt file
            raise InputError(f"--open-clip {spec}: {flame.describe_error(error)}; give a MODEL:WEIGHTS of "
                             "open_clip.list_pretrained(), or MODEL:FILE") from None
        self.config = {"text_dim": D, "columns": [f"{prompts}.0" for prompts in PROMPTS]}

    def encode_image(self, pixels):
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def encode_batches(self, texts, prompts):
        """Yield (rows, [n, 1, D]): a text has one embedding, which is broadcast to all facets."""
        for rows in torch.arange(len(texts)).split(64):
            tokens = self.tokenizer([texts[row] for row in rows]).to(self.clip.logit_scale.device)
            yield rows.tolist(), self.clip.encode_text(tokens).float().cpu()[:, None]

    def encode_text(self, facets, prompts):
        return F.normalize(facets, dim=-1)
