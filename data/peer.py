"""evaluate.py --open-clip: any open_clip model in a checkpoint's place, so that both are scored alike."""
from pathlib import Path

import torch
import torch.nn.functional as F

import flame
from flame import InputError, explained


class OpenClip(torch.nn.Module):
    """What evaluate.py asks of a flame.Flame and of a flame.TextEncoder.

    spec: MODEL or MODEL:WEIGHTS, WEIGHTS one of open_clip's names or a file; without, random weights. Raises
    InputError where open_clip does not know them.
    """

    def __init__(self, spec):
        super().__init__()
        name, _, weights = spec.partition(":")
        try:
            import open_clip
            made = open_clip.create_model_and_transforms(name, pretrained=weights or None)
            self.tokenizer = open_clip.get_tokenizer(name)
            D = open_clip.get_model_config(name)["embed_dim"]
        except ImportError:
            raise InputError("--open-clip: pip install open_clip_torch") from None
        except Exception as e:  # no such model or weights, no network, a broken file
            raise InputError(f"--open-clip {spec}: {type(e).__name__}: {explained(e)}; give a model that "
                             "open_clip.list_pretrained() has, or MODEL:FILE") from None
        self.clip, _, self.preprocess = made
        self.config = {"text_dim": D, "columns": flame.COLUMNS, "llm": {}, "open_clip": spec}

    def encode_image(self, pixels):
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def encode_batches(self, texts, prompts):
        """Yields (rows, [n, K, D]): the text's one vector in the place of each facet."""
        facets = len(flame.PROMPTS[prompts].facets)
        device = next(self.clip.parameters()).device
        for rows in torch.arange(len(texts)).split(64):
            tokens = self.tokenizer([texts[row] for row in rows]).to(device)
            yield rows.tolist(), self.clip.encode_text(tokens).float().cpu()[:, None].expand(-1, facets, -1)

    def encode_text(self, facets, prompts):
        return F.normalize(facets, dim=-1)


def short_name(spec):
    """For a file's name: ViT-B-32:laion2b -> ViT-B-32-laion2b"""
    name, _, weights = spec.partition(":")
    return "-".join(filter(None, [name.replace("/", "-"), Path(weights).stem]))
