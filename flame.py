"""FLAME: language-image pre-training with a frozen decoder LLM as the text tower.

Cao, Wei, Ma: "FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training", CVPR
2025. The first half of this file is the model, in the order in which data flows through it:

    caption -> prompts -> segment forest -> frozen decoder -> facet embeddings     text tower, never trained
    image   -> vision transformer -> projector -> image embedding                  trained (losses: train.py)
    similarity = mean over facets of the cosine

The second half, below the double line, reads files (LLM folders, tokenizers, embedding stores, checkpoints)
and chooses kernels. How positives are sampled for a training step is in data/images.py.
"""
import ctypes
import functools
import hashlib
import json
import os
import re
import warnings
from collections import OrderedDict
from contextlib import contextmanager, suppress
from itertools import accumulate, groupby
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import nn

__version__ = "0.2.0"
__all__ = ["InputError", "PROMPTS", "TextEncoder", "load", "load_tokenizer", "open_store", "similarity"]

# ------------------------------------------------------------------------------------------------------------
# 1. Prompts. Each caption is put into a prefix and followed by K facet prompts (paper, section 3.2). A prompt
# asks for an answer "in just one word" and ends with its opening quote, so the hidden state at the quote has
# to hold the answer (PromptEOL, Jiang et al. 2023). That state is one facet embedding of the caption.

class PromptSet(NamedTuple):
    prefix: str              # contains "{}", which the caption replaces
    facets: tuple[str, ...]  # K facet prompts


FACETS = (
    'this image description means in just one word:"',  # the whole description
    'the category of the main object in this image means in just one word:"',  # entity level
    'the prominent characteristic or pattern of the main object in this image means in just one word:"',
    'the category of the minor object in this image means in just one word:"',
    'the prominent characteristic or pattern of the minor object in this image means in just one word:"',
    'the primary action or event taking place in this image means in just one word:"',  # interaction level
    'the overall atmosphere or emotion of this image means in just one word:"',  # scene level
)
PREFIX = 'Image description : "{}" . After thinking step by step ,'
# An image has up to three captions: raw (web alt text), and an MLLM's short and long descriptions. Each has
# its prompt set. Edit these to use your own; stores and checkpoints made with other prompts are refused.
PROMPTS = {
    "raw": PromptSet(PREFIX, FACETS[:1]),
    "short": PromptSet(PREFIX, FACETS[:3]),
    "long": PromptSet("Detailed " + PREFIX, FACETS),
}
# raw.0, short.0 ... short.2, long.0 ... long.6: the columns of a store and of the text projection
FACET_COLUMNS = [f"{name}.{k}" for name, prompt in PROMPTS.items() for k in range(len(prompt.facets))]


def clean_caption(caption):
    """Return the caption with single quotes only, ending in a full stop or a quote, for the templates."""
    caption = caption.strip().replace('"', "'")
    if caption.endswith("?"):
        return caption[:-1] + "."
    return caption if caption.endswith((".", "'")) else caption + "."


# ------------------------------------------------------------------------------------------------------------
# 2. The segment forest: the trie of the token sequences `prefix(caption) + " " + facet prompt`. A prefix's
# keys and values are computed once (prefix KV reuse), and no facet sees another. This is the paper's
# facet-decoupled attention, in one pass. Several captions are packed into one row, as more sequences of the
# same trie, without padding. It is a forest because their first tokens may differ.

class Forest(NamedTuple):
    """A packed row of T tokens, divided into S segments (unbranched runs). A segment continues its parent.

    Visibility rule: query q attends to key k if and only if k's segment is q's segment or one of its
    ancestors, and depth(k) <= depth(q). A token's depth is its distance from its root.
    """
    tokens: torch.Tensor       # [T] int64
    positions: torch.Tensor    # [T] int64, for RoPE only; they equal the depths, except in data/compat.py
    lengths: np.ndarray        # [S] int32
    parents: np.ndarray        # [S] int32, -1 for a root
    last_tokens: torch.Tensor  # [N] int64, packed index of each sequence's last token


def build_forest(sequences):
    """Return the trie of N token sequences (non-empty lists of ints) as a Forest; positions are depths."""
    packed = []
    last_tokens = np.zeros(len(sequences), np.int64)
    branches = {}  # packed index of each branch's first token: that of the token it follows, -1 for a root
    sequence, path = [], []  # the last sequence, and the packed indices of its tokens
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        common = shared_prefix(sequence, sequences[i])
        sequence, path = sequences[i], path[:common]
        if common < len(sequence):
            branches[len(packed)] = path[-1] if path else -1
            path += range(len(packed), len(packed) + len(sequence) - common)
            packed += sequence[common:]
        last_tokens[i] = path[-1]
    # A segment begins where a branch begins, and behind a token that a branch follows.
    first = sorted({*branches, *(token + 1 for token in branches.values())})
    parents = np.searchsorted(first, [branches.get(token, token - 1) for token in first], "right") - 1
    lengths, parents = np.diff(first, append=len(packed)).astype(np.int32), parents.astype(np.int32)
    depths = torch.from_numpy(token_depths(lengths, parents))
    return Forest(torch.tensor(packed, dtype=torch.int64), depths, lengths, parents,
                  torch.from_numpy(last_tokens))


def shared_prefix(a, b):
    """Return the length of the common prefix of two lists."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def token_depths(lengths, parents):
    """Return each token's depth in its tree, int64 [T]."""
    end = np.zeros(len(lengths) + 1, np.int64)  # depth at which a segment's children begin; end[-1] for roots
    for s, parent in enumerate(parents.tolist()):
        end[s] = end[parent] + lengths[s]
    stops = np.cumsum(lengths)  # packed index at which each segment stops
    return np.arange(lengths.sum()) + np.repeat(end[:-1] - stops, lengths)


def ancestor_mask(parents):
    """Return bool [S, S]: entry (s, k) is true if segment k is segment s or one of its ancestors."""
    mask = np.eye(len(parents), dtype=bool)
    for s, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[s] |= mask[parent]
    return mask


def attention_mask(lengths, parents):
    """Return the visibility rule as a mask, bool [T queries, T keys]."""
    segment = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    depth = token_depths(lengths, parents)                 # [T]
    return ancestor_mask(parents)[segment][:, segment] & (depth <= depth[:, None])


# ------------------------------------------------------------------------------------------------------------
# 3. The frozen decoder (Llama, Mistral, Qwen, Gemma): RMSNorm, RoPE, grouped-query attention, SwiGLU or GeGLU

class Decoder(NamedTuple):
    config: dict               # config.json as llm_config() returns it
    embedding: torch.Tensor    # [vocabulary, D]
    layers: list[dict]         # weights by name, of the layers that are kept
    inv_freq: torch.Tensor     # [RoPE variants, head_dim / 2] float32, angular frequencies
    kernels: "Kernels"         # TORCH_KERNELS or EXT_KERNELS


class Kernels(NamedTuple):
    """The operations of a layer that flame_ext can run instead of PyTorch."""
    name: str
    attention: Callable     # (forest, device, group_size) -> attend(q [T, H, d], k, v [T, H / group_size, d])
    add_and_norm: Callable  # (x float32 [T, D], update, weight, eps, dtype) -> RMSNorm(x += update) * weight
    rope: Callable          # (qkv [T, heads + others, d], cos, sin, heads): rotate the first `heads` in place
    swiglu: Callable        # (gate_up [T, 2F]) -> silu(gate) * up [T, F]


@torch.inference_mode()
def hidden_states(decoder, forest):
    """Run the decoder over a packed row; return the states of the sequences' last tokens, float32 [N, D].

    A state is the residual stream, without a final norm. It is always float32, and norms are computed in
    float32: bfloat16 would lose small updates of large values, and in SmolLM2 one dimension has 0.8 of a
    state's norm.
    """
    heads, kv_heads, head_dim, eps = (decoder.config[name] for name in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    kernels = decoder.kernels
    device, dtype = decoder.embedding.device, decoder.embedding.dtype
    attend = kernels.attention(forest, device, heads // kv_heads)
    tokens, positions, last_tokens = (to_device(x, device) for x in (
        forest.tokens, forest.positions.float(), forest.last_tokens))
    angles = decoder.inv_freq[:, None] * positions[:, None]  # [RoPE variants, T, head_dim / 2]
    cos_sin = torch.stack([angles.cos(), angles.sin()], dim=1)

    def post_norm(update, weight):  # Gemma normalizes what a sublayer returns
        return update if weight is None else kernels.add_and_norm(update.float(), None, weight, eps, dtype)

    activation = geglu if decoder.config["gelu"] else kernels.swiglu
    x = decoder.embedding[tokens].float() * decoder.config["embedding_scale"]  # [T, D], the residual stream
    update = None  # the last sublayer's output, to be added to x
    for layer in decoder.layers:
        h = kernels.add_and_norm(x, update, layer["attention_norm"], eps, dtype)
        qkv = F.linear(h, layer["wqkv"], layer.get("bqkv")).view(len(x), heads + 2 * kv_heads, head_dim)
        if "qk_norm" in layer:
            norm_heads(qkv, layer["qk_norm"], eps)
        kernels.rope(qkv, *cos_sin[layer["rope_index"]], heads + kv_heads)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views
        attended = attend(q, k, v).flatten(1)
        if layer is decoder.layers[-1]:  # only the last tokens are needed from here on
            attended = attended[last_tokens]
            x = x[last_tokens]
        update = post_norm(F.linear(attended, layer["wo"]), layer.get("post_attention_norm"))
        h = kernels.add_and_norm(x, update, layer["mlp_norm"], eps, dtype)
        update = F.linear(activation(F.linear(h, layer["w_gate_up"])), layer["w_down"])
        update = post_norm(update, layer.get("post_mlp_norm"))
    return x + update


QUERY_CHUNK = {"cpu": 64, "cuda": 512}  # queries; larger on a GPU, to launch fewer kernels


def chunked_attention(forest, device, group_size):
    """Attention in PyTorch: for each chunk of queries, gather only the keys that at least one of them sees.
    Return attend(q, k, v). group_size: query heads per key/value head.
    """
    segment = np.repeat(np.arange(len(forest.lengths)), forest.lengths)  # [T]
    depth = token_depths(forest.lengths, forest.parents)
    ancestors = ancestor_mask(forest.parents)
    size = QUERY_CHUNK.get(device.type, 512)
    chunks = []
    for first in range(0, len(segment), size):
        queries = slice(first, first + size)
        seen = ancestors[segment[queries]]  # [n, S], segments that each query sees
        keys = np.flatnonzero(seen.any(0)[segment[:first + size]])  # no query sees a later token
        mask = seen[:, segment[keys]] & (depth[keys] <= depth[queries, None])
        chunks.append((queries, *(to_device(torch.from_numpy(x), device) for x in (keys, mask))))

    def attend(q, k, v):
        out = torch.empty_like(q)
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
        for queries, keys, mask in chunks:
            qkv = [x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys])]  # [1, H, n, d]
            out[queries] = F.scaled_dot_product_attention(*qkv, attn_mask=mask)[0].transpose(0, 1)
        return out
    return attend


def add_and_norm(x, update, weight, eps, dtype):
    if update is not None:
        x += update
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


def norm_heads(qkv, weight, eps):
    """RMSNorm of the query and key heads in place (Qwen3, Gemma): qkv [T, all heads, d], weight [heads, d]"""
    x = qkv[:, :len(weight)]
    x.copy_(F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight)


def rope(qkv, cos, sin, heads):  # rotates the pairs (i, i + d/2)
    a, b = qkv[:, :heads].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    qkv[:, :heads] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up):  # Gemma
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


TORCH_KERNELS = Kernels("PyTorch", chunked_attention, add_and_norm, rope, swiglu)


# ------------------------------------------------------------------------------------------------------------
# 4. The text tower: tokenizer + forest + decoder

def caption_forest(prefixes, suffixes, mask="decoupled"):
    """Return the Forest of N * K strings, of N prefixes with K suffixes each. mask: see TextEncoder."""
    sequences = []
    for prefix, facets in zip(prefixes, suffixes):
        for facet in facets:
            sequences.append(prefix + facet)
            if mask == "causal":
                prefix = prefix + facet
    return build_forest(sequences)


MAX_TOKENS = {"cpu": 2048, "cuda": 16384}  # per packed row; on a CPU its activations stay in cache
MASKS = ("decoupled", "causal")


class TextEncoder:
    """The frozen text tower.

    Args:
        llm_dir: Hugging Face folder of an LLM (config.json, safetensors, tokenizer) or its Hub id.
        layer: number of layers to run. Default: all but the last, as in the paper; the last layer is the most
            specialized in predicting the next token.
        mask: "decoupled" (each facet prompt follows the caption directly) or "causal" (one chain, in which a
            facet prompt also sees the earlier ones).
        max_tokens: tokens per packed row, counting each caption's prefix once and its facet prompts in full.
            A row exceeds it by at most one caption. Default: MAX_TOKENS.
    """

    def __init__(self, llm_dir: str | Path, device="cpu", dtype=torch.bfloat16, layer: int | None = None,
                 mask: str = "decoupled", max_tokens: int | None = None):
        if mask not in MASKS:
            raise InputError(f"mask {mask!r} is unknown; choose one of {', '.join(MASKS)}")
        device = torch.device(device)
        if device.type == "cpu":
            keep_freed_memory()
        self.llm_dir = resolve_folder(llm_dir)
        self.tokenizer = load_tokenizer(self.llm_dir)
        self.decoder = load_decoder(self.llm_dir, layer, device, dtype)
        self.kernels = self.decoder.kernels.name
        self.layer = len(self.decoder.layers)
        self.mask = mask
        self.dim = self.decoder.config["hidden_size"]
        self.context_length = self.decoder.config["context_length"]
        self.tokenize = tokenize  # data/compat.py replaces these two with the released code's versions
        self.caption_forest = functools.partial(caption_forest, mask=mask)
        self.max_tokens = max_tokens or MAX_TOKENS.get(device.type, 2048)
        self.truncated = 0  # number of captions truncated to the context length so far

    def encode(self, captions: list[str], prompts: str = "long") -> torch.Tensor:
        """Return facet embeddings, float32 [N, K, D] on the CPU, not normalized."""
        if isinstance(captions, str):
            raise ValueError("captions must be a list of str, not one str")
        out = torch.empty(len(captions), len(PROMPTS[prompts].facets), self.dim)
        for indices, facets in self.encode_batches(captions, prompts):
            out[indices] = facets
        return out

    def encode_batches(self, captions, prompts="long"):
        """Yield (indices of n captions, their facet embeddings float32 [n, K, D]) for each packed row."""
        for indices, forest in self.pack(captions, prompts):
            yield indices, hidden_states(self.decoder, forest).cpu().view(len(indices), -1, self.dim)

    def pack(self, captions, prompts="long"):
        """Yield (indices of captions, Forest of their strings) for each packed row.

        Captions are sorted by length. Uses as few rows as max_tokens allows, and balances their lengths,
        because a short last row would be slow.
        """
        prefixes, suffixes = tokenize_within_context(self, captions, prompts)
        sizes = [len(prefix) + sum(map(len, facets)) for prefix, facets in zip(prefixes, suffixes)]
        total = sum(sizes)
        packed_rows = -(-total // self.max_tokens)
        order = sorted(range(len(captions)), key=sizes.__getitem__)
        offsets = accumulate((sizes[i] for i in order), initial=0)  # tokens before each caption
        for _, group in groupby(zip(order, offsets), key=lambda pair: pair[1] * packed_rows // total):
            batch = [i for i, _ in group]
            forest = self.caption_forest([prefixes[i] for i in batch], [suffixes[i] for i in batch])
            if forest.tokens.max() >= len(self.decoder.embedding):
                raise InputError(f"{self.llm_dir}: the tokenizer has more tokens than the embedding table")
            yield batch, forest


# ------------------------------------------------------------------------------------------------------------
# 5. The image tower: a CLIP-style vision transformer with open_clip's weight names, and the projector

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # init_weights() fills it
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):  # [B, tokens, width]
        B, S, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, S, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, tokens, head_dim] each
        if x.device.type == "cpu":  # the backward pass of the fused kernel is several times slower there
            attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(B, S, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT up to the raw output of the last block: FLAME uses neither ln_post nor proj.

    The paper's ViT-B/16: image 224, patch 16, width 768, 12 blocks, 12 heads; LayerNorm eps 1e-5, exact GELU.
    """

    def __init__(self, image_size, patch_size, width, layers, heads):
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, pixels, kept=None):
        """Return tokens [B, 1 + patches, width], class token first, of normalized pixels [B, 3, H, W].

        kept: int64 [B, n], the patches to encode (patch dropout: FLIP, Li et al. 2023).
        """
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, patches, width]
        position = self.positional_embedding.to(x.dtype)
        x = x + position[1:]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        class_token = self.class_embedding.to(x.dtype) + position[0]
        x = self.ln_pre(torch.cat([class_token.expand(len(x), 1, -1), x], dim=1))
        for block in self.transformer.resblocks:
            x = block(x)
        return x


def init_weights(visual, scheme):
    """Initialize the blocks of a ViT: "pytorch" with the defaults of nn.Linear and nn.MultiheadAttention, as
    the released code does; "clip" with CLIP's normal distributions, scaled down in deep networks.
    """
    blocks = visual.transformer.resblocks
    for block in blocks:
        attention, mlp, depth = block.attn, block.mlp, 2 * len(blocks)
        if scheme == "pytorch":
            nn.init.xavier_uniform_(attention.in_proj_weight)
            nn.init.zeros_(attention.out_proj.bias)
            continue
        width = attention.out_proj.in_features
        for weight, factor in ((attention.in_proj_weight, 1), (mlp.c_fc.weight, 2),
                               (attention.out_proj.weight, depth), (mlp.c_proj.weight, depth)):
            nn.init.normal_(weight, std=(factor * width) ** -0.5)


class TextProjection(nn.Module):
    """A linear map per facet column, our addition: unit embeddings u -> normalize((u - mean) A (I + M)).

    LLM embeddings are anisotropic: for one facet, two captions have a mean cosine of 0.9. The matrix A
    reduces that. It is computed in closed form (data/projection.py) and frozen. It is stored as a multiple of
    the identity plus a low-rank matrix, `rest * I + basis diag(gain) basis^T`: for Nemo (D = 5120) 0.23 GB
    instead of 1.15 GB for full matrices. M is a full matrix [D, D], trained from zero with the image tower,
    for the columns in `mapped` only.
    """

    def __init__(self, dim, rank=0, mapped=()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(FACET_COLUMNS), dim))
        self.register_buffer("basis", torch.zeros(len(FACET_COLUMNS), dim, rank))
        self.register_buffer("gain", torch.zeros(len(FACET_COLUMNS), rank))
        self.register_buffer("rest", torch.ones(len(FACET_COLUMNS)))
        self.mapped = list(mapped)  # indices of FACET_COLUMNS
        if mapped:
            self.map = nn.Parameter(torch.zeros(len(mapped), dim, dim))

    def forward(self, facets, columns):
        """Project facets [N, K, D]; columns int [K] or [N, K]. Return unit vectors [N, K, D]."""
        columns = torch.as_tensor(columns, device=self.mean.device).expand(facets.shape[:2])
        x = F.normalize(facets.float(), dim=-1) - self.mean[columns]
        out = torch.empty_like(x)
        for c in range(len(FACET_COLUMNS)):  # one large matrix product per column; DDP needs even empty ones
            u = x[columns == c]
            u = self.rest[c] * u + (u @ self.basis[c] * self.gain[c]) @ self.basis[c].T
            if c in self.mapped:
                u = u + u @ self.map[self.mapped.index(c)]
            out[columns == c] = u
        return F.normalize(out, dim=-1)


class Flame(nn.Module):
    """All that a checkpoint holds: image tower (visual.*), projector (mm.*, as in the released checkpoints),
    text projection, logit scale and bias.

    config: image_size, patch_size, width, layers, heads; projector_hidden, text_dim (D), pool_first;
    text_rank, text_mapped (text projection); columns (those trained on). init: see init_weights.
    """

    def __init__(self, config, init="pytorch"):
        super().__init__()
        self.config = config
        sizes = [int(config[name]) for name in ("image_size", "patch_size", "width", "layers", "heads")]
        *_, width, _, heads = sizes
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        hidden, D = config["projector_hidden"], config["text_dim"]
        self.visual = VisionTransformer(*sizes)
        self.mm = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, D), nn.LayerNorm(D))
        mapped = [FACET_COLUMNS.index(name) for name in config.get("text_mapped", ())]
        self.text_projection = TextProjection(D, config["text_rank"], mapped)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(10))))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # only the sigmoid loss uses it
        init_weights(self.visual, init)

    def forward(self, pixels, kept=None):
        """Return unit image embeddings [B, D]: project every patch token, then average (no class token).

        pool_first averages before projecting: half the time, and about the same accuracy for small towers.
        """
        patches = self.visual(pixels, kept)[:, 1:]
        x = self.mm(patches.mean(1)) if self.config["pool_first"] else self.mm(patches).mean(1)
        return F.normalize(x.float(), dim=-1)

    @torch.inference_mode()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit image embeddings [B, D] of pixels [B, 3, H, W] as `preprocess` makes them."""
        return self(pixels.to(self.visual.conv1.weight))

    @torch.inference_mode()
    def encode_text(self, facets: torch.Tensor, prompts: str = "long") -> torch.Tensor:
        """Apply the text projection of a prompt set: facet embeddings [N, K, D] -> unit vectors [N, K, D]."""
        columns = [i for i, name in enumerate(FACET_COLUMNS) if name.startswith(f"{prompts}.")]
        return self.text_projection(facets.to(self.text_projection.mean.device), columns)

    def preprocess(self, image: Image) -> torch.Tensor:
        """Return pixels [3, size, size] of a PIL image: RGB, shortest side to size (bicubic), center crop,
        normalized. Raises ValueError if the image is more than 100 times as long as wide.

        The released code converts to RGB after the crop, which differs for palette and transparent images.
        """
        w, h = image.size
        if max(w, h) > 100 * min(w, h):  # resizing it would fill the memory
            raise ValueError(f"an image of {w} x {h} pixels is too thin")
        size = self.config["image_size"]
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        left, top = round((w - size) / 2), round((h - size) / 2)
        resized = to_rgb(image).resize((w, h), Resampling.BICUBIC)
        square = resized.crop((left, top, left + size, top + size))
        return normalize_pixels(torch.from_numpy(np.array(square)).permute(2, 0, 1))


# ------------------------------------------------------------------------------------------------------------
# 6. Image-text similarity

def similarity(image: torch.Tensor, facets: torch.Tensor) -> torch.Tensor:
    """Return [M, N], the mean over facets of the cosine, of M images [M, D] and N texts [N, K, D]."""
    return F.normalize(image, dim=-1) @ F.normalize(facets, dim=-1).mean(1).T


# ============================================================================================================
# End of the model. The rest reads files (LLM folders, tokenizers, stores, checkpoints) and chooses kernels.
# ============================================================================================================

class InputError(Exception):
    """Bad input from outside. The message is one line: path, problem, fix."""


@contextmanager
def reading(path, fix):
    """Turn any error raised while reading an external file into one InputError: path, problem, fix.

    Parsers can raise any exception on a corrupt file, so read and convert values inside the block. Only
    regular files are accepted; opening a pipe would block forever.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {fix}")
    try:
        yield path
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {describe_error(error)}; {fix}") from None


def describe_error(error):
    """Return an exception's message as one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error)
    if text == "Query interrupted":  # DuckDB's form of Ctrl-C
        raise KeyboardInterrupt
    if isinstance(error, KeyError):
        text = f"no {text}"
    elif not text or not isinstance(error, (OSError, ValueError, RuntimeError)):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:200]


def read_json(path, fix="download or create it again"):
    """Return the object in a JSON file as a dict."""
    with reading(path, fix):
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"a JSON {type(entries).__name__}, not an object")
    return entries


def prompts_to_json():
    """Return PROMPTS in the form that stores and checkpoints record."""
    return {name: {"prefix": prefix, "facets": list(facets)} for name, (prefix, facets) in PROMPTS.items()}


def check_prompts(recorded, path):
    """Raise InputError if a file records other prompts than PROMPTS."""
    if json.dumps(recorded) != json.dumps(prompts_to_json()):  # the order matters: it is that of the columns
        raise InputError(f"{path}: made with prompts other than flame.PROMPTS; restore the old prompts in "
                         "flame.py, or make the store or checkpoint again")


# ------------------------------------------------------------------------------------------------------------
# LLM folders: config.json, weights, tokenizer

# Tensors of a decoder layer by our names. Each is a concatenation of the checkpoint's tensors on the right.
LAYER_TENSORS = {
    "attention_norm": ["input_layernorm.weight"],
    "wqkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "wo": ["self_attn.o_proj.weight"],
    "mlp_norm": ["post_attention_layernorm.weight"],
    "w_gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "w_down": ["mlp.down_proj.weight"],
}
HEAD_NORMS = {"qk_norm": ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]}
FAMILIES = {  # model_type: additional tensors of its layers
    "llama": {},    # Llama 1 to 3, SmolLM2
    "mistral": {},  # Mistral-7B, Nemo
    "qwen2": {"bqkv": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]},  # and 2.5
    "qwen3": HEAD_NORMS,
    "gemma3_text": HEAD_NORMS | {
        "post_attention_norm": ["post_attention_layernorm.weight"],
        "mlp_norm": ["pre_feedforward_layernorm.weight"],
        "post_mlp_norm": ["post_feedforward_layernorm.weight"],
    },
}
LLM_FIX = ("give --llm or $FLAME_LLM a Hugging Face folder with config.json, *.safetensors (not quantized) "
           "and a tokenizer, or run python data/demo.py --make-only, which makes a small one")


def resolve_folder(name):
    """Return a local path as it is. For a Hub id (owner/name), download it and return the cache folder. If
    a folder `owner` exists, the name is taken as a path. Raises InputError if it cannot be downloaded.
    """
    if Path(name).parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    names = ["config.json", "model*.safetensors", "tokenizer*.json", "tokenizer.model"]
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=names))
    except Exception as error:  # offline, gated, no such model, disk full
        raise InputError(f"{name}: no such folder, and not a Hub id that can be downloaded: "
                         f"{describe_error(error)}") from None


def llm_config(llm_dir):
    """Return the entries of config.json that the hidden states depend on, defaults filled in, as a dict.

    Added entries: gelu, embedding_scale, norm_offset (added to norm weights) and query_scale, for Gemma;
    inv_freq, float64 [RoPE variants, head_dim / 2], and rope_indices, the variant of each layer;
    context_length, the maximum string length in tokens, at most the sliding window, which therefore need not
    be implemented.
    """
    with reading(Path(llm_dir, "config.json"), LLM_FIX) as path:
        entries = json.loads(path.read_bytes())
        family = check_supported("model_type", entries["model_type"], *FAMILIES)
        gemma = family == "gemma3_text"
        activation = "gelu_pytorch_tanh" if gemma else "silu"
        used = entries.get("hidden_activation") or entries.get("hidden_act") or activation
        check_supported("hidden_act", used, activation)
        if entries.get("use_bidirectional_attention"):
            raise ValueError("bidirectional attention is not supported")
        layers, D, heads, context_length = (int(entries[name]) for name in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"))
        head_dim = int(entries.get("head_dim") or D // heads)
        if entries.get("use_sliding_window", family == "mistral" or gemma):
            context_length = min(context_length, int(entries.get("sliding_window", 4096) or context_length))
        ropes, rope_indices = rope_settings(entries, layers, gemma)
        return {
            "model_type": family, "num_hidden_layers": layers, "hidden_size": D, "num_attention_heads": heads,
            "intermediate_size": entries["intermediate_size"],
            "num_key_value_heads": int(entries.get("num_key_value_heads") or heads),
            "head_dim": head_dim, "rms_norm_eps": float(entries["rms_norm_eps"]),
            "gelu": gemma, "norm_offset": float(gemma), "embedding_scale": D ** 0.5 if gemma else 1.0,
            "query_scale": (head_dim / entries.get("query_pre_attn_scalar", head_dim)) ** 0.5,
            "inv_freq": torch.stack([rope_frequencies(rope, head_dim) for rope in ropes]),
            "rope_indices": rope_indices, "context_length": context_length,
        }


def check_supported(name, value, *supported):
    """Return the value; raise ValueError if it is not supported."""
    if value not in supported:
        raise ValueError(f"{name} {value!r} is not supported; supported: {', '.join(supported)}")
    return value


def rope_settings(entries, layers, gemma):
    """Return (settings of each RoPE variant, each layer's index). Gemma: 0 is full attention, 1 sliding."""
    settings = entries.get("rope_parameters") or entries.get("rope_scaling") or {}  # transformers 5's, 4's
    theta = entries.get("rope_theta", 1e6 if gemma else 1e4)
    full = {"rope_theta": theta} | settings.get("full_attention", settings)
    if not gemma:
        return [full], [0] * layers
    local = {"rope_theta": entries.get("rope_local_base_freq", 1e4)} | settings.get("sliding_attention", {})
    names = ["full_attention", "sliding_attention"]
    period = int(entries.get("sliding_window_pattern") or 6)
    types = entries.get("layer_types") or [*names[1:] * (period - 1), names[0]] * layers
    return [full, local], [names.index(types[i]) for i in range(layers)]


def rope_frequencies(rope, head_dim):
    """Return RoPE's angular frequencies, float64 [head_dim / 2], with linear or Llama 3 scaling applied."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_supported("rope_type", kind, "default", "linear", "llama3")
    freq = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor = 1 if kind == "default" else rope["factor"]
    if kind != "llama3":
        return freq / factor
    # Keep high frequencies, divide low ones by the factor, interpolate between.
    low = rope["low_freq_factor"]
    rotations = freq * rope["original_max_position_embeddings"] / (2 * np.pi)
    kept = ((rotations - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)
    return freq * (kept + (1 - kept) / factor)


def open_weights(llm_dir):
    """Return (read(name) -> tensor, {name: file} of tensors not read yet) for a folder's safetensors."""
    from safetensors import safe_open
    files = {}
    for file in sorted(Path(llm_dir).glob("model*.safetensors")):
        with reading(file, LLM_FIX), safe_open(file, framework="pt") as opened:
            for name in files.keys() & opened.keys():  # e.g. two downloads mixed in one folder
                raise ValueError(f"tensor {name} is also in {files[name].name}")
            files |= dict.fromkeys(opened.keys(), file)

    def read(name):  # reopen the file each time, to release the pages of tensors that were copied
        if name not in files:
            raise InputError(f"{llm_dir}: no tensor {name} in its safetensors; {LLM_FIX}")
        with reading(files.pop(name), LLM_FIX) as file, safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(name)
            if tensor.dtype.itemsize < 2:
                raise ValueError(f"tensor {name} is {tensor.dtype}; quantized checkpoints are not supported")
            return tensor
    return read, files


def llm_fingerprint(llm_dir):
    """Return 16 hexadecimal digits that identify an LLM, from a SHA-256.

    It covers config.json, the tokenizer, and each safetensors file's name, header and 4 KiB at the beginning,
    middle and end of every tensor: a second for 24 GB, and enough to distinguish a fine-tuned model.
    """
    tokenizer = tokenizer_file(llm_dir)
    settings = [Path(llm_dir, "config.json"), tokenizer]
    if tokenizer.suffix == ".model":
        settings += Path(llm_dir).glob("tokenizer_config.json")  # decides whether BOS is added
    digest = hashlib.sha256(tokenizer.name.encode())
    for path in settings:
        with reading(path, LLM_FIX):
            digest.update(path.read_bytes())
    for path in sorted(Path(llm_dir).glob("model*.safetensors")):
        with reading(path, LLM_FIX), open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = file.read(start - 8)
            digest.update(path.name.encode() + header)
            for entry in json.loads(header).values():
                first, end = entry.get("data_offsets", (0, 0))
                for offset in (first, (first + end) // 2, max(first, end - 4096)):
                    file.seek(start + offset)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def load_decoder(llm_dir, layer=None, device="cpu", dtype=torch.bfloat16):
    """Return the Decoder of a Hugging Face folder, with its first `layer` layers (default: all but the last).

    Matrices move to device and dtype one at a time, to keep host memory small. Norms are float32. Raises
    InputError if a file is missing, unsupported, or disagrees with config.json.
    """
    config = llm_config(llm_dir)
    n_layers = config["num_hidden_layers"]
    layer = n_layers - 1 if layer is None else layer
    if layer not in range(1, n_layers + 1):
        raise InputError(f"{llm_dir}: cannot run {layer} layers; choose 1 to {n_layers}")
    read, unread = open_weights(llm_dir)
    embedding = read("model.embed_tokens.weight").to(device, dtype)
    layers = [load_layer(config, read, i, device, dtype) for i in range(layer)]
    prefixes = tuple(f"model.layers.{i}." for i in range(layer))
    for name in sorted(unread):  # ignoring a bias, a norm or a scale would silently change the hidden states
        if name.startswith(prefixes) and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{llm_dir}: tensor {name} is unknown in a {config['model_type']} layer")
    decoder = Decoder(config, embedding, layers, config["inv_freq"].float().to(device), TORCH_KERNELS)
    with reading(Path(llm_dir, "config.json"), LLM_FIX):  # fails if the weights have other sizes
        hidden_states(decoder, build_forest([[0]])).view(config["hidden_size"])
    return decoder._replace(kernels=choose_kernels(decoder))


def load_layer(config, read, i, device, dtype):
    """Return layer i: {our name: tensor}, and the index of its RoPE variant under "rope_index"."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = {"rope_index": config["rope_indices"][i]}
    for ours, theirs in (LAYER_TENSORS | FAMILIES[config["model_type"]]).items():
        tensor = torch.cat([read(f"model.layers.{i}.{name}") for name in theirs])
        if "norm" in ours:
            layer[ours] = tensor.to(device, torch.float32) + config["norm_offset"]
        else:
            layer[ours] = tensor.to(device, dtype)
    if "qk_norm" in layer:  # -> [heads + kv_heads, head_dim]
        q, k = layer["qk_norm"].chunk(2)
        q = q * config["query_scale"]  # attention itself divides by sqrt(head_dim)
        layer["qk_norm"] = torch.stack([q] * heads + [k] * kv_heads)
    return layer


class Tokenizer(NamedTuple):
    encode: Callable        # str -> list[int], with the special tokens that the model's tokenizer adds
    encode_batch: Callable  # list[str] -> list[list[int]]
    decode: Callable        # list[int] -> str


def tokenizer_file(llm_dir):
    """Return the path of tokenizer.json, or of tokenizer.model (sentencepiece) if there is none."""
    path = Path(llm_dir, "tokenizer.json")
    return path if path.exists() else path.with_suffix(".model")


def load_tokenizer(llm_dir: str | Path) -> Tokenizer:
    """Return an LLM folder's tokenizer. Raises InputError if it is missing or cannot be read."""
    with reading(tokenizer_file(llm_dir), LLM_FIX) as path:
        if path.suffix == ".json":
            from tokenizers import Tokenizer as HubTokenizer
            fast = HubTokenizer.from_file(str(path))
            fast.no_padding()  # the file may enable either
            fast.no_truncation()
            tokenizer = Tokenizer(lambda text: fast.encode(text).ids, lambda texts: [
                row.ids for row in fast.encode_batch_fast(texts)], fast.decode)
        else:
            from sentencepiece import SentencePieceProcessor
            settings = path.with_name("tokenizer_config.json")
            bos = read_json(settings, LLM_FIX).get("add_bos_token", True) if settings.exists() else True
            pieces = SentencePieceProcessor(model_file=str(path), add_bos=bos)
            tokenizer = Tokenizer(pieces.encode, pieces.encode, pieces.decode)
        if not tokenizer.encode("A cat."):
            raise ValueError("produces no tokens")
        return tokenizer


def tokenize(tokenizer, captions, prompts):
    """Return (N prefixes, N lists of K suffixes), token ids of the strings `prefix(c) + " " + facet`.

    Each string is tokenized as a whole, because a tokenizer may merge characters across the boundary.
    """
    template, facets = PROMPTS[prompts]
    texts = [template.replace("{}", clean_caption(caption)) for caption in captions]
    ends = ["", *(f" {facet}" for facet in facets)]
    ids = iter(tokenizer.encode_batch([text + end for text in texts for end in ends]))
    prefixes, suffixes = [], []
    for prefix in ids:  # a prefix, then its K strings, for each caption
        rows = [next(ids) for _ in facets]
        cut = min(shared_prefix(prefix, row) for row in rows)
        prefixes.append(prefix[:cut])
        suffixes.append([row[cut:] for row in rows])
    return prefixes, suffixes


def tokenize_within_context(encoder, captions, prompts):
    """Tokenize captions, truncating long ones until each facet's string (with the causal mask, the whole
    chain) fits into the context length. The prompts stay whole.
    """
    combine = max if encoder.mask == "decoupled" else sum
    # A token has fewer than 16 characters on average, so skip tokenizing the rest of a very long caption.
    shortened = [caption[:16 * encoder.context_length] for caption in captions]
    prefixes, suffixes = encoder.tokenize(encoder.tokenizer, shortened, prompts)
    for i, caption in enumerate(shortened):
        while (tokens := len(prefixes[i]) + combine(map(len, suffixes[i]))) > encoder.context_length:
            if not caption:
                raise InputError(f"{encoder.llm_dir}: a context of {encoder.context_length} tokens is too "
                                 f"short for the {prompts} prompts; choose another LLM")
            caption = caption[:len(caption) * encoder.context_length // tokens]
            (prefixes[i],), (suffixes[i],) = encoder.tokenize(encoder.tokenizer, [caption], prompts)
        encoder.truncated += caption != captions[i]
    return prefixes, suffixes


# ------------------------------------------------------------------------------------------------------------
# Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_rgb(image):
    """Convert a PIL image to RGB. Raises ValueError for 16 or 32 bits a channel, which PIL would clip."""
    if image.mode[0] in "IF":
        raise ValueError(f"image mode {image.mode} is not supported; convert it to 8 bits a channel")
    return image.convert("RGB")


def normalize_pixels(image):
    """uint8 [..., 3, H, W] -> float32, normalized with CLIP's mean and standard deviation."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=image.device)[..., None, None]
    return image.contiguous().float().div_(255).sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------------------------
# Kernels and memory

try:
    import flame_ext  # the C++/CUDA extension in ext/; for each of its kernels there is a PyTorch reference
except ImportError:
    flame_ext = None

# oneDNN and torch cache one kernel per number of rows of a matrix product. Packed rows have any length, so
# the caches would fill the memory; 128 entries are as fast. Both variables are read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


def run_kernel(kernel, x, *operands):
    """Run a flame_ext kernel by name on the device of tensor x, in the current stream if it is a GPU."""
    with torch.cuda.device_of(x):  # no effect on the CPU
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        getattr(flame_ext, kernel)(x, *operands, stream=stream)


def ext_attention(forest, device, group_size):
    """Attention by flame_ext, which reads the keys and values of all ancestors in place."""
    tile = max(1, 64 // group_size) if device.type == "cuda" else 64  # queries per tile
    layout = flame_ext.layout(forest.lengths, forest.parents, tile)
    plan = to_device(torch.tensor(layout.plan), device)

    def attend(q, k, v):
        out = torch.empty_like(q)
        run_kernel("attention", q, k, v, out, layout, q.shape[-1] ** -0.5, plan)
        return out
    return attend


def ext_add_and_norm(x, update, weight, eps, dtype):
    out = torch.empty_like(x, dtype=dtype)
    run_kernel("rmsnorm", x, weight, out, eps, update)
    return out


def ext_swiglu(gate_up):
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    run_kernel("swiglu", gate_up, out)
    return out


EXT_KERNELS = Kernels("flame_ext", ext_attention, ext_add_and_norm, functools.partial(run_kernel, "rope"),
                      ext_swiglu)


def choose_kernels(decoder):
    """Return EXT_KERNELS if flame_ext can run this decoder, otherwise TORCH_KERNELS.

    flame_ext's CUDA kernels (bfloat16, heads of 64 or 128 dimensions) are used only if, on a small forest and
    two layers, |difference from PyTorch's state| < 5% of |state - mean state|. Otherwise a warning gives the
    reason.
    """
    weights = decoder.embedding
    if not flame_ext or weights.dtype not in (torch.float32, torch.bfloat16):
        return TORCH_KERNELS
    if not weights.is_cuda:
        return EXT_KERNELS if weights.is_cpu and flame_ext.cpu else TORCH_KERNELS
    try:
        if not flame_ext.cuda:
            raise RuntimeError("it was built without CUDA")
        if torch.cuda.get_device_capability(weights.device) < (8, 0):
            raise RuntimeError("compute capability below 8.0")
        rows = np.random.default_rng(0).integers(len(weights), size=(40, 60)).tolist()
        forest = build_forest([rows[0] + rows[n % 5 + 1][:n] + rows[n] for n in range(6, 40)])
        trial = decoder._replace(layers=decoder.layers[:2])
        expected = hidden_states(trial, forest)
        error = (hidden_states(trial._replace(kernels=EXT_KERNELS), forest) - expected).norm(dim=1)
        worst = (error / (expected - expected.mean(0)).norm(dim=1)).max()
        if not worst < 0.05:  # also true for NaN
            raise RuntimeError(f"its states differ from PyTorch's by {worst:.1%}")
    except Exception as error:
        reason = describe_error(error)
        warnings.warn(f"{weights.device}: using PyTorch instead of flame_ext: {reason}", stacklevel=2)
        return TORCH_KERNELS
    return EXT_KERNELS


def to_device(x, device):
    """Move x to the device. The copy to a GPU is asynchronous, and the CPU does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def keep_freed_memory():
    """Let glibc keep freed memory. Otherwise each layer's buffers are returned to the system and zeroed
    again, which costs a sixth of the time on a CPU.
    """
    with suppress(Exception):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------
# What the stages write: the embedding store (embed.py), checkpoints (train.py)

class Store:
    """A finished embedding store: captions.tsv, meta.json, and shards of unit vectors, 000000.npy ...,
    float16 [shard_size, 11, D]. Raises InputError if it is unfinished or was made with other prompts.
    """

    def __init__(self, path):
        self.path = Path(path)
        with reading(self.path / "meta.json", "make a store with embed.py") as meta:
            self.meta = json.loads(meta.read_bytes())
            self.N, self.D, self.shard_size = sizes = [int(self.meta[n]) for n in ("N", "D", "shard_size")]
            if min(sizes) < 1:
                raise ValueError(f"invalid N, D, shard_size {sizes}")
            os.fspath(self.meta["captions"]["path"])  # raises TypeError if it is not a str
            check_prompts(self.meta["llm"]["prompts"], meta)
            content_hash(self)  # raises KeyError if an entry is missing
        for i in range(-(-self.N // self.shard_size)):  # stops at the first missing one, however large N is
            self.open_shard(i)
        self.shard = functools.lru_cache(512)(self.open_shard)  # each holds a file; the usual limit is 1,024

    def __len__(self):
        return self.N

    def __reduce__(self):  # pickle only the path: loader processes map the shards themselves
        return Store, (self.path,)

    def open_shard(self, i):
        """Return shard i, float16 [rows, 11, D], memory-mapped."""
        fix = "delete it if it exists, and run the same embed.py command again"
        with reading(self.path / f"{i:06d}.npy", fix) as path:
            shape = min(self.shard_size, self.N - i * self.shard_size), len(FACET_COLUMNS), self.D
            array = np.load(path, mmap_mode="r")
            if array.dtype != np.float16:
                raise ValueError(f"{array.dtype} instead of float16")
            return np.asarray(array).reshape(shape)

    @functools.cached_property
    def table(self):
        """(N keys, N image paths as the source gives them, or "")"""
        with reading(self.path / "captions.tsv", "make the store again") as path, open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.meta["table_sha256"]:
                raise ValueError("not the table that the embeddings were made from")
            file.seek(0)
            _, *rows = (line.decode().split("\t", 2)[:2] for line in file)
            keys, images = map(list, zip(*rows))
            return keys, images

    keys = property(lambda store: store.table[0])
    images = property(lambda store: store.table[1])

    def read_float16(self, rows, columns) -> torch.Tensor:
        """Return vectors as stored, float16 [n, m, D]; rows int [n] or [n, m], columns int [m] or [n, m]."""
        columns = np.broadcast_to(columns, (len(rows), np.shape(columns)[-1]))
        rows = np.asarray(rows)
        rows = rows.reshape(len(rows), *rows.shape[1:] or [1])  # [n, 1] or [n, m]
        out = np.empty((*columns.shape, self.D), np.float16)
        for n in range(len(rows)):
            for row in set(rows[n].tolist()):
                shard, offset = divmod(row, self.shard_size)
                own = np.broadcast_to(rows[n] == row, columns.shape[1:])
                out[n, own] = self.shard(shard)[offset, columns[n, own]]
        return torch.from_numpy(out)

    def read(self, rows, columns) -> torch.Tensor:
        """Return vectors as float32 [n, m, D], normalized to length 1. Arguments as in read_float16."""
        vectors = self.read_float16(rows, columns).float()
        return F.normalize(vectors, dim=-1, out=vectors)


def shard_digest(table_sha256, i, array):
    """Return the SHA-256, 32 bytes, that embed.py writes after shard i and --inspect checks."""
    digest = hashlib.sha256(f"{table_sha256} {i} ".encode())
    digest.update(np.ascontiguousarray(array))
    return digest.digest()


open_store = Store  # open_store(path) -> store with .read(rows, columns), .keys, .images, .meta


def content_hash(store):
    """Return a SHA-256 over everything that determines a store's content, but not its location."""
    meta = store.meta | {"captions": store.meta["captions"]["sha256"]}
    meta["llm"] = {key: value for key, value in meta["llm"].items() if key not in ("name", "path")}
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def load(checkpoint: str | Path) -> Flame:
    """Return the model of a checkpoint folder written by train.py, or of a Hub id, in eval mode.

    Raises InputError if it cannot be read or was made with other prompts.
    """
    from safetensors.torch import load_file
    fix = "train or download it again"
    checkpoint = resolve_folder(checkpoint)
    config_file = checkpoint / "config.json"
    saved = read_json(config_file, fix)
    with reading(checkpoint / "model.safetensors", fix) as file:
        tensors = load_file(file)
        # The sizes in config.json may be wrong, so allocate nothing, and not any number of layers.
        layers = saved["model"]["layers"]
        if not layers <= len(tensors):
            raise ValueError(f"config.json has {layers} layers")
        with torch.device("meta"):
            model = Flame({"columns": FACET_COLUMNS} | saved["model"] | {"llm": saved["llm"]})
        model.load_state_dict(tensors, assign=True)
        check_prompts(saved["llm"]["prompts"], config_file)
        columns = model.config["columns"]
        if not columns or {*columns} - {*FACET_COLUMNS}:
            raise ValueError(f"config.json has invalid columns {columns}")
    return model.eval()
