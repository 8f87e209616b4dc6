"""FLAME: a frozen decoder LLM as the text tower of language-image pre-training.

Cao, Wei, Ma: "FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training", CVPR
2025. Down to the line in the middle this file is the whole method, in the order data flows:

    caption -> prompts -> segment forest -> frozen decoder -> facets  (text; never trained)
    picture -> vision transformer -> projector                        (image; trained to meet the facets)
    similarity of the two = mean over facets of the cosine

Below the line are files: an LLM's folder, tokenizers, the embedding store, checkpoints.
"""
import ctypes
import functools
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
# 1. Prompts: one caption is asked K questions, each to be answered "in just one word" (paper, section 3.2)

class PromptSet(NamedTuple):
    prefix: str              # holds "{}" where the caption goes
    facets: tuple[str, ...]  # K questions; the LLM's state at a question's last token, a quote, is a facet


FACETS = (
    'this image description means in just one word:"',  # all of it
    'the category of the main object in this image means in just one word:"',  # entity level
    'the prominent characteristic or pattern of the main object in this image means in just one word:"',
    'the category of the minor object in this image means in just one word:"',
    'the prominent characteristic or pattern of the minor object in this image means in just one word:"',
    'the primary action or event taking place in this image means in just one word:"',  # interaction level
    'the overall atmosphere or emotion of this image means in just one word:"',  # scene level
)
PREFIX = 'Image description : "{}" . After thinking step by step ,'
# To ask your own, edit these. A store or checkpoint that was made with other questions is refused.
PROMPTS = {
    "raw": PromptSet(PREFIX, FACETS[:1]),
    "short": PromptSet(PREFIX, FACETS[:3]),
    "long": PromptSet("Detailed " + PREFIX, FACETS),
}
# The columns of a store and of the text projection: raw 1, short 3, long 7.
COLUMNS = [f"{name}.{k}" for name, prompt in PROMPTS.items() for k in range(len(prompt.facets))]


def clean(caption):
    """Caption as the template wants it: it ends like a sentence, asks nothing and holds no double quote."""
    caption = caption.strip().replace('"', "'")
    if caption.endswith("?"):
        return caption[:-1] + "."
    return caption if caption.endswith((".", "'")) else caption + "."


# ------------------------------------------------------------------------------------------------------------
# 2. The segment forest: the trie of the strings' token sequences. It *is* facet-decoupled attention.

class Forest(NamedTuple):
    """A packed row of T tokens, cut into S segments. Each continues its parent, which lies before it.

    The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
    and depth(k) <= depth(q), where a token's depth is counted from its root.
    """
    tokens: torch.Tensor     # [T] int64
    positions: torch.Tensor  # [T] int64, what RoPE sees; visibility never looks at them
    lengths: np.ndarray      # [S] int32
    parents: np.ndarray      # [S] int32, -1 for a root
    answers: torch.Tensor    # [N] int64, packed index of each sequence's last token


def build_forest(sequences):
    """Trie of N token sequences (non-empty lists of ints) -> Forest; a token's position is its depth.

    Tokens are shared between sequences where all that comes before agrees.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    answers = np.zeros(len(sequences), np.int64)
    packed = []
    lengths = []
    parents = []
    # To do: sequences, sorted, that agree on their first `depth` tokens; the segment `parent` ends there.
    todo = [(order, 0, -1)] if order else []
    while todo:
        group, depth, parent = todo.pop()
        first = sequences[group[0]]
        common = shared_prefix(first, sequences[group[-1]])  # what these two share, all between them share
        if common > depth:
            packed += first[depth:common]
            lengths.append(common - depth)
            parents.append(parent)
            parent = len(lengths) - 1
        ended = [i for i in group if len(sequences[i]) == common]  # the shortest, which come first
        answers[ended] = len(packed) - 1
        forks = groupby(group[len(ended):], key=lambda i: sequences[i][common])
        todo += reversed([([*fork], common, parent) for _, fork in forks])  # the first is popped next
    lengths = np.array(lengths, np.int32)
    parents = np.array(parents, np.int32)
    tokens = torch.tensor(packed, dtype=torch.int64)
    depths = torch.from_numpy(token_depths(lengths, parents))
    return Forest(tokens, depths, lengths, parents, torch.from_numpy(answers))


def shared_prefix(a, b):
    """Length of the common prefix of two lists, by bisection: comparing slices runs at C speed."""
    low = 0
    high = min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def token_depths(lengths, parents):
    """[S], [S] -> int64 [T], each token's depth in its tree."""
    end = np.zeros(len(lengths) + 1, np.int64)  # the depth of a segment's children; end[-1] = 0 is the roots'
    for s, parent in enumerate(parents.tolist()):
        end[s] = end[parent] + lengths[s]
    stops = np.cumsum(lengths)  # where segments stop in the packed row
    return np.arange(lengths.sum()) + np.repeat(end[:-1] - stops, lengths)


def lineage(parents):
    """[S] -> bool [S, S]: is segment k segment s itself or one of its ancestors?"""
    lines = np.eye(len(parents), dtype=bool)
    for s, parent in enumerate(parents.tolist()):
        if parent >= 0:
            lines[s] |= lines[parent]
    return lines


def visible(lengths, parents):
    """The rule, as a boolean mask [T, T]: query, key."""
    segment = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    depth = token_depths(lengths, parents)                 # [T]
    return lineage(parents)[segment][:, segment] & (depth <= depth[:, None])


# ------------------------------------------------------------------------------------------------------------
# 3. The frozen decoder (Llama, Mistral, Qwen, Gemma), by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU

class Decoder(NamedTuple):
    config: dict               # config.json as llm_config() fills it in
    embedding: torch.Tensor    # [vocabulary, D]
    blocks: list[dict]         # the kept blocks only
    inv_freq: torch.Tensor     # [kinds, head_dim / 2] float32, RoPE's angular frequencies
    kernels: "Kernels"         # what runs attention and the element-wise steps: TWINS or NATIVE


class Kernels(NamedTuple):
    """The steps of a block that are no matrix product, in PyTorch (TWINS) or in flame_ext (NATIVE, below)."""
    name: str
    attention: Callable     # (forest, device, share) -> attend(q [T, H, d], k, v [T, H / share, d])
    add_and_norm: Callable  # (x float32 [T, D], update, weight, eps, dtype) -> RMSNorm(x += update) * weight
    rope: Callable          # (qkv [T, heads + others, d], cos, sin, heads) rotates the first heads in place
    swiglu: Callable        # (gate_up [T, 2F]) -> silu(gate) * up [T, F]


@torch.inference_mode()
def decode(decoder, forest):
    """Runs the kept blocks over the packed row; -> float32 [N, D], the residual stream at the N answers.

    No final norm follows. The residual stream and the norms are float32 whatever the matrix products use: one
    dimension carries 0.8 of a state's norm, and rounding it to bfloat16 in every block drowns the rest.
    """
    heads = decoder.config["num_attention_heads"]
    kv_heads = decoder.config["num_key_value_heads"]
    head_dim = decoder.config["head_dim"]
    eps = decoder.config["rms_norm_eps"]
    kernels = decoder.kernels
    device = decoder.embedding.device
    dtype = decoder.embedding.dtype
    attend = kernels.attention(forest, device, heads // kv_heads)
    positions = to_device(forest.positions.float(), device)
    angles = [torch.outer(positions, inv_freq) for inv_freq in decoder.inv_freq]  # [T, head_dim / 2] a kind
    turns = [(angle.cos(), angle.sin()) for angle in angles]
    answers = to_device(forest.answers, device)

    def norm_after(update, weight):  # Gemma: what a sublayer gives, before it is added
        return update if weight is None else kernels.add_and_norm(update.float(), None, weight, eps, dtype)

    gated = geglu if decoder.config["gelu"] else kernels.swiglu
    x = decoder.embedding[to_device(forest.tokens, device)].float()  # [T, D], the residual stream
    x *= decoder.config["embedding_scale"]
    update = None                                                    # what the last sublayer adds to it
    for block in decoder.blocks:
        h = kernels.add_and_norm(x, update, block["attention_norm"], eps, dtype)
        qkv = F.linear(h, block["wqkv"], block.get("bqkv")).view(len(x), heads + 2 * kv_heads, head_dim)
        if "qk_norm" in block:
            norm_heads(qkv, block["qk_norm"], eps)
        kernels.rope(qkv, *turns[block["rope"]], heads + kv_heads)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views
        mixed = attend(q, k, v).flatten(1)
        if block is decoder.blocks[-1]:  # from here on nobody reads any other token
            mixed = mixed[answers]
            x = x[answers]
        update = norm_after(F.linear(mixed, block["wo"]), block.get("norm_after_attention"))
        h = kernels.add_and_norm(x, update, block["mlp_norm"], eps, dtype)
        update = F.linear(gated(F.linear(h, block["w_gate_up"])), block["w_down"])
        update = norm_after(update, block.get("norm_after_mlp"))
    return x + update


STRETCH = {"cpu": 64, "cuda": 512}  # queries; on a GPU more, so that launches are few


def attention_in_stretches(forest, device, share):
    """Attention by the rule, a stretch of neighbours at a time, against the keys that any of these sees."""
    segment = np.repeat(np.arange(len(forest.lengths)), forest.lengths)  # [T]
    depth = token_depths(forest.lengths, forest.parents)
    lines = lineage(forest.parents)
    size = STRETCH.get(device.type, 512)
    stretches = []
    for first in range(0, len(segment), size):
        queries = slice(first, first + size)
        seen = lines[segment[queries]]  # [n, S], which segments
        keys = np.flatnonzero(seen.any(0)[segment[:first + size]])  # what lies behind nobody sees
        mask = seen[:, segment[keys]] & (depth[keys] <= depth[queries, None])
        stretches.append((queries, *(to_device(torch.from_numpy(x), device) for x in (keys, mask))))

    def attend(q, k, v):
        out = torch.empty_like(q)
        k = k.repeat_interleave(share, dim=1)  # a key head serves its group
        v = v.repeat_interleave(share, dim=1)
        for queries, keys, mask in stretches:
            rows = [x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys])]  # [1, H, n, d]
            out[queries] = F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)
        return out
    return attend


def add_and_norm(x, update, weight, eps, dtype):
    if update is not None:
        x += update
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


def norm_heads(qkv, weight, eps):
    """Qwen3, Gemma: RMSNorm of the first heads of [T, heads + others, d], in place; weight [heads, d]."""
    x = qkv[:, :len(weight)].float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    qkv[:, :len(weight)] = (x * scale * weight).to(qkv.dtype)


def rope(qkv, cos, sin, heads):  # the pairs are (i, i + d/2)
    a, b = qkv[:, :heads].float().chunk(2, dim=-1)
    cos = cos[:, None]
    sin = sin[:, None]
    qkv[:, :heads] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up):  # Gemma
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


TWINS = Kernels("PyTorch", attention_in_stretches, add_and_norm, rope, swiglu)


# ------------------------------------------------------------------------------------------------------------
# 4. The text tower: tokenizer + forest + decoder

def caption_forest(prefixes, suffixes, positions="restart"):
    """[N] prefix ids, [N][K] facet ids -> the Forest of all N * K strings, its answers in that order.

    positions: see TextEncoder
    """
    sequences = []
    for before, facets in zip(prefixes, suffixes):
        for facet in facets:
            sequences.append(before + facet)
            if positions == "causal":
                before = before + facet
    return build_forest(sequences)


BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens in one packed row; on CPU its activations stay in cache
POSITIONS = ("restart", "causal")


class TextEncoder:
    """The frozen text tower.

    llm_dir    Hugging Face folder of an LLM (config.json, safetensors, and a tokenizer), or its id there
    layer      how many blocks to keep (default: all but the last, as in the paper)
    positions  "restart": every facet's RoPE positions go on from the caption; "causal": one chain, where a
               facet also sees those before it
    budget     tokens in one packed row, which the last caption may exceed (default: BUDGET)
    """

    def __init__(self, llm_dir: str | Path, device="cpu", dtype=torch.bfloat16, layer: int | None = None,
                 positions: str = "restart", budget: int | None = None):
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, not {positions!r}")
        device = torch.device(device)
        if device.type == "cpu":
            keep_freed_memory()
        self.llm_dir = hub_folder(llm_dir)
        self.tokenizer = load_tokenizer(self.llm_dir)
        self.decoder = load_decoder(self.llm_dir, layer, device, dtype)
        self.kernels = self.decoder.kernels.name
        self.layer = len(self.decoder.blocks)
        self.positions = positions
        self.tokenize = tokenize  # data/released.py puts the released code's in place of these two
        self.caption_forest = functools.partial(caption_forest, positions=positions)
        self.dim = self.decoder.config["hidden_size"]
        self.context = self.decoder.config["context"]
        self.budget = budget or BUDGET.get(device.type, 2048)
        self.truncated = 0  # captions cut so far because the model's context is shorter

    def encode(self, captions: list[str], prompts: str = "long") -> torch.Tensor:
        """-> float32 [N, K, D] on the CPU: states at the facets' last tokens, not normalised."""
        if isinstance(captions, str):
            raise ValueError("captions must be a list of str, not one str")
        out = torch.empty(len(captions), len(PROMPTS[prompts].facets), self.dim)
        for rows, facets in self.encode_batches(captions, prompts):
            out[rows] = facets
        return out

    def encode_batches(self, captions, prompts="long"):
        """Yields (rows, facets float32 [n, K, D]) a packed row at a time; every caption is in one."""
        for rows, forest in self.pack(captions, prompts):
            yield rows, decode(self.decoder, forest).cpu().view(len(rows), -1, self.dim)

    def pack(self, captions, prompts="long"):
        """Yields (rows, Forest of their strings), each a packed row; a thread may run ahead of the decoder.

        Captions are sorted by length, none is padded. The packed rows are as few as the budget allows and
        about equally long: filled to the brim they would leave a short last one, which is slow.
        """
        prefixes, suffixes = tokenize_within_context(self, captions, prompts)
        sizes = [len(prefix) + sum(map(len, facets)) for prefix, facets in zip(prefixes, suffixes)]
        total = sum(sizes)
        packed_rows = -(-total // self.budget)
        order = sorted(range(len(captions)), key=sizes.__getitem__)
        begins = accumulate((sizes[i] for i in order), initial=0)  # tokens before each
        for _, group in groupby(zip(order, begins), key=lambda pair: pair[1] * packed_rows // total):
            batch = [i for i, _ in group]
            forest = self.caption_forest([prefixes[i] for i in batch], [suffixes[i] for i in batch])
            if forest.tokens.max() >= len(self.decoder.embedding):
                raise InputError(f"{self.llm_dir}: its tokenizer knows more tokens than its weights do")
            yield batch, forest


# ------------------------------------------------------------------------------------------------------------
# 5. The image tower: a CLIP-style vision transformer under open_clip's weight names, and the projector

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # train.initialise or load fills it
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):  # [B, tokens, width]
        B, S, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, S, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, tokens, head_dim] each
        if x.device.type == "cpu":  # the fused kernel's backward pass is several times slower there
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, S, width))


class Block(nn.Module):
    def __init__(self, width, heads, quick_gelu=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width),
        ))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT up to the last block's raw output: FLAME uses neither ln_post nor proj.

    Published ViT-B/16: image 224, patch 16, width 768, 12 blocks, 12 heads; LayerNorm eps 1e-5, exact GELU.
    """

    def __init__(self, image_size, patch_size, width, layers, heads, quick_gelu=False):
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))

    def forward(self, pixels, kept=None):
        """[B, 3, H, W] normalised pixels -> [B, 1 + patches, width]; token 0 is the class token.

        kept: int64 [B, n], the patches to look at; the others are left out (FLIP, Li et al. 2023: less to
        compute, harder to overfit).
        """
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, patches, width]
        position = self.positional_embedding.to(x.dtype)
        x = x + position[1:]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        class_token = self.class_embedding.to(x.dtype) + position[0]
        x = torch.cat([class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class TextProjection(nn.Module):
    """A linear map of each store column, of unit facet states u, rows: normalise((u - mean) A (I + M)).

    A evens out directions, since two captions' states have a cosine of 0.9. A = rest * I + basis diag(gain)
    basis^T is closed-form and frozen (data/projection.py); of low rank, as eleven full 5120 x 5120 maps are
    1.15 GB. M, [D, D], is trained with the image tower from zero on, for the columns in `mapped`. The
    published recipe has neither.
    """

    def __init__(self, dim, rank=0, mapped=()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(COLUMNS), dim))
        self.register_buffer("basis", torch.zeros(len(COLUMNS), dim, rank))
        self.register_buffer("gain", torch.zeros(len(COLUMNS), rank))
        self.register_buffer("rest", torch.ones(len(COLUMNS)))
        self.mapped = list(mapped)  # of COLUMNS, indices
        if mapped:
            self.map = nn.Parameter(torch.zeros(len(mapped), dim, dim))

    def forward(self, facets, columns):
        """[N, K, D], int [K] or [N, K] store columns -> [N, K, D] unit vectors."""
        columns = torch.as_tensor(columns, device=self.mean.device).expand(facets.shape[:2])
        x = F.normalize(facets.float(), dim=-1) - self.mean[columns]
        out = torch.empty_like(x)
        for c in columns.unique().tolist():  # one product a column, not one small matrix a vector
            u = x[columns == c]
            u = self.rest[c] * u + (u @ self.basis[c] * self.gain[c]) @ self.basis[c].T
            if c in self.mapped:
                u = u + u @ self.map[self.mapped.index(c)]
            out[columns == c] = u
        return F.normalize(out, dim=-1)


class Flame(nn.Module):
    """The trained half: image tower (visual.*), projector (mm.*), text projection (text.*), scale and bias.

    config: image_size, patch_size, width, layers, heads, quick_gelu; text_dim (D), projector_hidden,
    pool_first; text_rank, text_mapped (of the text projection); columns (trained on); llm (of the texts).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [int(config[name]) for name in ("image_size", "patch_size", "width", "layers", "heads")]
        if sizes[4] < 1 or sizes[2] % sizes[4]:
            raise ValueError(f"{sizes[4]} heads for a width of {sizes[2]}")
        hidden = config["projector_hidden"]
        D = config["text_dim"]
        self.visual = VisionTransformer(*sizes, config.get("quick_gelu", False))
        self.mm = nn.Sequential(
            nn.Linear(config["width"], hidden),
            nn.GELU(),
            nn.Linear(hidden, D),
            nn.LayerNorm(D),
        )
        mapped = [COLUMNS.index(name) for name in config.get("text_mapped", ())]
        self.text = TextProjection(D, config["text_rank"], mapped)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(10))))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # used by the sigmoid loss alone

    def forward(self, pixels, kept=None):  # what DistributedDataParallel calls
        """[B, 3, H, W] -> [B, D], L2-normalised: every patch token projected, then averaged; no class token.

        pool_first averages before projecting: near the same accuracy on small towers at about half the time.
        """
        patches = self.visual(pixels, kept)[:, 1:]
        x = self.mm(patches.mean(1)) if self.config["pool_first"] else self.mm(patches).mean(1)
        return F.normalize(x.float(), dim=-1)

    @torch.inference_mode()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] normalised pixels, as `preprocess` makes them -> [B, D], L2-normalised."""
        return self(pixels.to(self.visual.conv1.weight))

    @torch.inference_mode()
    def encode_text(self, facets: torch.Tensor, prompts: str = "long") -> torch.Tensor:
        """[N, K, D] facet states of a prompt set -> [N, K, D], its text projection applied, L2-normalised."""
        columns = [i for i, name in enumerate(COLUMNS) if name.startswith(f"{prompts}.")]
        return self.text(facets.to(self.text.mean.device), columns)

    def preprocess(self, image: Image) -> torch.Tensor:
        """PIL image -> [3, size, size]: RGB, shortest side to size (bicubic), centre crop, normalise.

        Published code has RGB after the crop, which differs for pictures with a palette or transparent parts.
        """
        w, h = image.size
        if max(w, h) > 100 * min(w, h):  # scaled up it would fill the memory
            raise ValueError(f"a picture of {w} x {h} pixels is too thin")
        size = self.config["image_size"]
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        left = round((w - size) / 2)
        top = round((h - size) / 2)
        resized = rgb(image).resize((w, h), Resampling.BICUBIC)
        square = resized.crop((left, top, left + size, top + size))
        return to_pixels(torch.from_numpy(np.array(square)).permute(2, 0, 1))


# ------------------------------------------------------------------------------------------------------------
# 6. The two meet

def similarity(image: torch.Tensor, facets: torch.Tensor) -> torch.Tensor:
    """M images [M, D], N texts' facets [N, K, D] -> [N, M], mean over facets of the cosine."""
    return F.normalize(facets, dim=-1).mean(1) @ F.normalize(image, dim=-1).T


# ============================================================================================================
# That was the method. From here on files are read: an LLM's folder, tokenizers, the store, checkpoints.
# ============================================================================================================

class InputError(Exception):
    """Bad input from outside. Its text is one line: the file, the line in it, what is wrong, and the cure."""


ANEW = "download or write it anew"


@contextmanager
def reading(path, cure=ANEW):
    """The boundary to what others wrote: whatever goes wrong inside becomes one line of file, fault and cure.

    Parsers raise nearly anything on a damaged file: read, and coerce the values, inside. Raises InputError,
    also where no regular file is there: a pipe would be waited for without end.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {cure}")
    try:
        yield path
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {explained(error)}; {cure}") from None


def explained(error):
    """What an exception says, in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error)
    if text == "Query interrupted":  # how DuckDB hands on Ctrl-C
        raise KeyboardInterrupt
    if isinstance(error, KeyError):
        text = f"no {text}"
    elif not text or not isinstance(error, (OSError, ValueError, RuntimeError)):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:200]


def read_json(path, cure=ANEW):
    """The object in a JSON file, a dict."""
    with reading(path, cure):
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"a JSON {type(entries).__name__}, not an object")
    return entries


def questions():
    """PROMPTS as stores and checkpoints record them."""
    return {name: {"prefix": prefix, "facets": list(facets)} for name, (prefix, facets) in PROMPTS.items()}


def check_questions(recorded, path):
    """Raises InputError where the file records other questions than PROMPTS."""
    if json.dumps(recorded) != json.dumps(questions()):  # their order is the columns'
        raise InputError(f"{path}: made with other questions than flame.PROMPTS; edit these, or make it anew")


# ------------------------------------------------------------------------------------------------------------
# An LLM's folder: config.json, weights, tokenizer

# A block's tensors by our names, and those of the checkpoint that each is made of, one below the other.
BLOCK = {
    "attention_norm": ["input_layernorm.weight"],
    "wqkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "wo": ["self_attn.o_proj.weight"],
    "mlp_norm": ["post_attention_layernorm.weight"],
    "w_gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "w_down": ["mlp.down_proj.weight"],
}
HEAD_NORMS = {"qk_norm": ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]}
FAMILIES = {  # by model_type: what their blocks have besides
    "llama": {},    # Llama 1 to 3, SmolLM2
    "mistral": {},  # Mistral-7B, Nemo
    "qwen2": {"bqkv": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]},  # and 2.5
    "qwen3": HEAD_NORMS,
    "gemma3_text": HEAD_NORMS | {
        "norm_after_attention": ["post_attention_layernorm.weight"],
        "mlp_norm": ["pre_feedforward_layernorm.weight"],
        "norm_after_mlp": ["post_feedforward_layernorm.weight"],
    },
}
LLM_CURE = ("--llm or $FLAME_LLM wants a Hugging Face checkpoint folder, config.json, *.safetensors and a "
            "tokenizer, not quantised; python data/demo.py --make-only makes a small one")


def hub_folder(name):
    """An existing folder as it is; of a Hugging Face id, owner/name, that in its cache, downloaded first.

    Of an LLM or of a checkpoint. Raises InputError where the id is not to be had.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    names = ["config.json", "model*.safetensors", "tokenizer*.json", "tokenizer.model"]
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=names))
    except Exception as error:  # offline, gated, no such model, a full disk
        raise InputError(f"{name}: no such folder, and no Hugging Face id: {explained(error)}") from None


def llm_config(llm_dir):
    """The entries of config.json that decide an LLM's states, and no more, defaults filled in. Added are

    gelu, embedding_scale, norm_offset (added to stored weights of norms), query_scale: Gemma's own ways
    inv_freq [kinds, head_dim / 2] float64, RoPE's angular frequencies; rope: the kind of each block
    context: tokens that a string may have, so that no sliding window ever cuts one
    """
    with reading(Path(llm_dir, "config.json"), LLM_CURE) as path:
        entries = json.loads(path.read_text(encoding="utf-8"))
        family = supported("model_type", entries["model_type"], *FAMILIES)
        gemma = family == "gemma3_text"
        activation = "gelu_pytorch_tanh" if gemma else "silu"
        for name in ("hidden_act", "hidden_activation"):
            supported(name, entries.get(name) or activation, activation)
        if entries.get("use_bidirectional_attention"):
            raise ValueError("attention both ways is not supported")
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        blocks, D, heads, _ = sizes = [int(entries[name]) for name in names]
        head_dim = int(entries.get("head_dim") or D // heads)
        context = int(entries["max_position_embeddings"])
        if entries.get("use_sliding_window", family == "mistral" or gemma):
            context = min(context, int(entries.get("sliding_window", 4096) or context))
        ropes, kinds = ropes_of_blocks(entries, blocks, gemma)
        return dict(zip(names, sizes)) | {
            "model_type": family,
            "num_key_value_heads": int(entries.get("num_key_value_heads") or heads),
            "head_dim": head_dim,
            "rms_norm_eps": float(entries["rms_norm_eps"]),
            "gelu": gemma,
            "norm_offset": float(gemma),
            "embedding_scale": D ** 0.5 if gemma else 1.0,
            "query_scale": (head_dim / entries.get("query_pre_attn_scalar", head_dim)) ** 0.5,
            "inv_freq": torch.stack([rope_frequencies(rope, head_dim) for rope in ropes]),
            "rope": kinds,
            "context": context,
        }


def supported(name, value, *known):
    """The value of an entry in config.json; ValueError where it is none of those that are known here."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is not supported; supported: {', '.join(known)}")
    return value


def ropes_of_blocks(entries, blocks, gemma):
    """-> (settings of each kind of RoPE, the kind of each block). Of Gemma's, 0 sees all, 1 a window."""
    settings = entries.get("rope_parameters") or entries.get("rope_scaling") or {}  # transformers 5's, 4's
    full = {"rope_theta": entries.get("rope_theta", 1e6 if gemma else 1e4)}
    full |= settings.get("full_attention", settings)
    if not gemma:
        return [full], [0] * blocks
    local = {"rope_theta": entries.get("rope_local_base_freq", 1e4)} | settings.get("sliding_attention", {})
    names = ["full_attention", "sliding_attention"]
    period = int(entries.get("sliding_window_pattern") or 6)
    kinds = entries.get("layer_types") or [names[i % period > 0] for i in range(1, blocks + 1)]
    return [full, local], [names.index(kinds[i]) for i in range(blocks)]


def rope_frequencies(rope, head_dim):
    """-> float64 [head_dim / 2]. Scaling makes far positions look like the near ones of training."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    supported("rope_type", kind, "default", "linear", "llama3")
    freq = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor = 1 if kind == "default" else rope["factor"]
    if kind != "llama3":
        return freq / factor
    # What turns often within the first training's context is kept, what turns seldom slowed; else a blend.
    low = rope["low_freq_factor"]
    turns = freq * rope["original_max_position_embeddings"] / (2 * np.pi)
    kept = ((turns - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)
    return freq * (kept + (1 - kept) / factor)


def weights_reader(llm_dir):
    """(read(name) -> tensor, names) over a folder's model*.safetensors."""
    from safetensors import safe_open
    files = {}
    for file in sorted(Path(llm_dir).glob("model*.safetensors")):
        with reading(file, LLM_CURE), safe_open(file, framework="pt") as opened:
            for name in files.keys() & opened.keys():  # shards of two downloads
                raise ValueError(f"tensor {name} is also in {files[name].name}")
            files |= dict.fromkeys(opened.keys(), file)

    def read(name):  # opens the file each time: pages of what was copied elsewhere leave memory at once
        if name not in files:
            raise InputError(f"{llm_dir}: no tensor {name} in its safetensors; {LLM_CURE}")
        with reading(files[name], LLM_CURE), safe_open(files[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
            if tensor.dtype.itemsize < 2:
                raise ValueError(f"tensor {name} is {tensor.dtype}, of a quantised checkpoint")
            return tensor
    return read, files.keys()


def load_decoder(llm_dir, layer=None, device="cpu", dtype=torch.bfloat16):
    """Reads the first `layer` blocks (default: all but the last) of a Hugging Face checkpoint folder.

    Matrices go one at a time to device and dtype, so that the host never holds a shard; norms are float32.
    Raises InputError where the folder lacks a file, is of another family, or sizes are not its config's.
    """
    config = llm_config(llm_dir)
    blocks = config["num_hidden_layers"]
    layer = blocks - 1 if layer is None else layer
    if not 1 <= layer <= blocks:
        raise InputError(f"{llm_dir}: layer {layer} asked for; choose 1 to {blocks}, its blocks")
    read, names = weights_reader(llm_dir)
    known = {"self_attn.rotary_emb.inv_freq"}.union(*BLOCK.values(), *FAMILIES[config["model_type"]].values())
    for name in sorted(names):  # a bias, say, or another norm: ignored, it would change the states
        of_block = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if of_block and int(of_block[1]) < layer and of_block[2] not in known:
            raise InputError(f"{llm_dir}: tensor {name} is of no {config['model_type']} block")
    embedding = read("model.embed_tokens.weight").to(device, dtype)
    blocks = [load_block(config, read, i, device, dtype) for i in range(layer)]
    decoder = Decoder(config, embedding, blocks, config["inv_freq"].float().to(device), TWINS)
    with reading(Path(llm_dir, "config.json"), LLM_CURE):  # do the weights have the sizes that it gives?
        decode(decoder, build_forest([[0]])).view(config["hidden_size"])
    return decoder._replace(kernels=usable_kernels(decoder))


def load_block(config, read, i, device, dtype):
    """read(name) -> block i, {our name: tensor}, and the kind of its RoPE"""
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    block = {"rope": config["rope"][i]}
    for ours, theirs in (BLOCK | FAMILIES[config["model_type"]]).items():
        tensor = torch.cat([read(f"model.layers.{i}.{name}") for name in theirs])
        if "norm" in ours:
            block[ours] = tensor.to(device, torch.float32) + config["norm_offset"]
        else:
            block[ours] = tensor.to(device, dtype)
    if "qk_norm" in block:  # -> [heads + kv_heads, head_dim]
        q, k = block["qk_norm"].chunk(2)
        q = q * config["query_scale"]  # since attention divides by the root of head_dim
        block["qk_norm"] = torch.stack([q] * heads + [k] * kv_heads)
    return block


class Tokenizer(NamedTuple):
    encode: Callable        # str -> list[int], special tokens as the model's own tokenizer adds them
    encode_batch: Callable  # list[str] -> list[list[int]]
    decode: Callable        # list[int] -> str


def tokenizer_file(llm_dir):
    """A checkpoint folder's tokenizer.json, else tokenizer.model (sentencepiece)."""
    path = Path(llm_dir, "tokenizer.json")
    return path if path.exists() else path.with_suffix(".model")


def load_tokenizer(llm_dir: str | Path) -> Tokenizer:
    """-> Tokenizer. Raises InputError where the folder has none, or one that cannot be read."""
    with reading(tokenizer_file(llm_dir), LLM_CURE) as path:
        if path.suffix == ".json":
            from tokenizers import Tokenizer as Published
            published = Published.from_file(str(path))
            published.no_padding()  # a file may carry settings for both
            published.no_truncation()
            tokenizer = Tokenizer(lambda text: published.encode(text).ids,
                                  lambda texts: [row.ids for row in published.encode_batch_fast(texts)],
                                  published.decode)
        else:
            from sentencepiece import SentencePieceProcessor
            settings = path.with_name("tokenizer_config.json")
            bos = read_json(settings, LLM_CURE).get("add_bos_token", True) if settings.exists() else True
            pieces = SentencePieceProcessor(model_file=str(path), add_bos=bos)
            tokenizer = Tokenizer(pieces.encode, pieces.encode, pieces.decode)
        if not tokenizer.encode("A cat."):
            raise ValueError("makes no token of a text")
        return tokenizer


def tokenize(tokenizer, captions, prompts):
    """-> ([N] prefix ids, [N][K] facet ids); together the ids of each string `prefix(c) + " " + facet`.

    The strings are tokenized as one: a tokenizer may merge what a caption ends with and what follows.
    """
    template, facets = PROMPTS[prompts]
    texts = [template.replace("{}", clean(caption)) for caption in captions]
    ends = ["", *(f" {facet}" for facet in facets)]
    ids = iter(tokenizer.encode_batch([text + end for text in texts for end in ends]))
    prefixes = []
    suffixes = []
    for prefix in ids:
        rows = [next(ids) for _ in facets]
        cut = min(shared_prefix(prefix, row) for row in rows)
        prefixes.append(prefix[:cut])
        suffixes.append([row[cut:] for row in rows])
    return prefixes, suffixes


def tokenize_within_context(encoder, captions, prompts):
    """As tokenize; a caption too long for the model's context loses its end, the prompt stays whole.

    In "restart" every facet's string must fit in by itself, else the prefix and all facets together.
    """
    together = max if encoder.positions == "restart" else sum
    # A token has fewer than 16 letters on the average: what lies behind these is not even tokenized.
    shortened = [caption[:16 * encoder.context] for caption in captions]
    prefixes, suffixes = encoder.tokenize(encoder.tokenizer, shortened, prompts)
    for i, caption in enumerate(shortened):
        while (tokens := len(prefixes[i]) + together(map(len, suffixes[i]))) > encoder.context:
            if not caption:
                raise InputError(f"{encoder.llm_dir}: its context of {encoder.context} tokens cannot hold "
                                 f"the {prompts} prompts; choose another LLM")
            caption = caption[:len(caption) * encoder.context // tokens]
            (prefixes[i],), (suffixes[i],) = encoder.tokenize(encoder.tokenizer, [caption], prompts)
        encoder.truncated += caption != captions[i]
    return prefixes, suffixes


# ------------------------------------------------------------------------------------------------------------
# Pixels, and what others' image towers want

class QuickGELU(nn.Module):  # what OpenAI's CLIP was trained with in GELU's place
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rgb(image):
    """PIL image -> RGB. Raises ValueError where a channel has more than 8 bits: PIL would make it white."""
    if image.mode[0] in "IF":
        raise ValueError(f"a picture of mode {image.mode}; give it 8 bits a channel")
    return image.convert("RGB")


def to_pixels(image):
    """uint8 [..., 3, H, W] -> float32, normalised by CLIP's mean and deviation."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=image.device)[..., None, None]
    return image.contiguous().float().div_(255).sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------------------------
# The machine

try:
    import flame_ext  # the C++/CUDA extension in ext/; all that it does has a PyTorch twin here
except ImportError:
    flame_ext = None

# oneDNN, and torch in front of it, keep a kernel for every number of rows that a matrix product ever had.
# Packed rows have any length, so memory would grow; 128 kernels are as fast. The first product reads these.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


def call(kernel, x, *operands):
    """Runs a kernel of flame_ext, by its name, where the tensor x lies; on a GPU in its stream's turn."""
    with torch.cuda.device_of(x):  # does nothing on the CPU
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        getattr(flame_ext, kernel)(x, *operands, stream=stream)


def native_attention(forest, device, share):
    """Reads every ancestor's keys and values where they lie."""
    tile = max(1, 64 // share) if device.type == "cuda" else 64  # queries that are worked on together
    layout = flame_ext.layout(forest.lengths, forest.parents, tile)
    plan = to_device(torch.tensor(layout.plan), device)

    def attend(q, k, v):
        out = torch.empty_like(q)
        call("attention", q, k, v, out, layout, q.shape[-1] ** -0.5, plan)
        return out
    return attend


def native_add_and_norm(x, update, weight, eps, dtype):
    out = torch.empty_like(x, dtype=dtype)
    call("rmsnorm", x, weight, out, eps, update)
    return out


def native_swiglu(gate_up):
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    call("swiglu", gate_up, out)
    return out


NATIVE = Kernels("flame_ext", native_attention, native_add_and_norm, functools.partial(call, "rope"),
                 native_swiglu)


def usable_kernels(decoder):
    """NATIVE where flame_ext may run this decoder, else TWINS; a warning says where it failed on a GPU.

    No GPU has run its kernels: there they are used only after they gave the twins' states of a small forest,
    in two blocks, the mean subtracted. They are bfloat16's alone, for heads of 64 and 128 dimensions.
    """
    at = decoder.embedding
    known = flame_ext and at.dtype in (torch.float32, torch.bfloat16)
    if not known or not at.is_cuda:
        return NATIVE if known and at.is_cpu and flame_ext.cpu else TWINS
    try:
        if not flame_ext.cuda:
            raise RuntimeError("it was built without CUDA")
        if torch.cuda.get_device_capability(at.device) < (8, 0):
            raise RuntimeError("compute capability below 8.0")
        rows = np.random.default_rng(0).integers(len(at), size=(40, 60)).tolist()
        forest = build_forest([rows[0] + rows[n % 5 + 1][:n] + rows[n] for n in range(6, 40)])
        trial = decoder._replace(blocks=decoder.blocks[:2])
        twin = decode(trial, forest)
        error = (decode(trial._replace(kernels=NATIVE), forest) - twin).norm(dim=1)
        worst = (error / (twin - twin.mean(0)).norm(dim=1)).max()
        if not worst < 0.05:  # nor NaN
            raise RuntimeError(f"its states differ from the twins' by {worst:.1%}")
    except Exception as error:
        warnings.warn(f"{at.device}: PyTorch runs in place of flame_ext: {explained(error)}", stacklevel=2)
        return TWINS
    return NATIVE


def to_device(x, device):
    """x on the device. To a GPU the copy is queued behind its work; the CPU does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def default_dtype(device):
    """bfloat16 where matrix products in it are fast; on older GPUs float16, on older CPUs float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def keep_freed_memory():
    """Lets glibc keep what is freed. Every block of a tower frees and takes the same large buffers again;
    given back in between, their pages are zeroed anew each time, a sixth of the time on CPU."""
    with suppress(Exception):  # where the C library is another
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------
# What the stages write: embed.py the embedding store, train.py checkpoints

class Store:
    """A finished store: captions.tsv, meta.json, windows of its rows 000000.npy ..., float16 [window, 11, D]
    of unit vectors. Raises InputError where it is unfinished, or was made with other questions.
    """

    def __init__(self, path):
        self.path = Path(path)
        with reading(self.path / "meta.json", "make a store with embed.py") as meta:
            self.meta = json.loads(meta.read_text(encoding="utf-8"))
            self.N, self.D, self.window = sizes = [int(self.meta[name]) for name in ("N", "D", "window")]
            if min(sizes) < 1 or not isinstance(self.meta["captions"]["path"], str):
                raise ValueError(f"N, D, window {sizes}, captions {self.meta['captions']}")
            check_questions(self.meta["llm"]["questions"], meta)
        present = set(os.listdir(self.path))
        for w in range(-(-self.N // self.window)):
            if f"{w:06d}.npy" not in present:
                raise InputError(f"{self.path}: {w:06d}.npy is missing; run the same embed.py command again")
        self.vectors = functools.lru_cache(8192)(self.open_window)  # a process may map 65,000 files

    def __len__(self):
        return self.N

    def __reduce__(self):  # pickled as its path: a loader's process maps the vectors, it gets no copy of them
        return Store, (self.path,)

    def open_window(self, w):
        """[rows, 11, D], mapped"""
        with reading(self.path / f"{w:06d}.npy", "delete it and run the same embed.py command again") as path:
            rows = min(self.window, self.N - w * self.window)
            return np.asarray(np.load(path, mmap_mode="r"), np.float16).reshape(rows, len(COLUMNS), self.D)

    @functools.cached_property
    def table(self):
        """[N] keys, and [N] pictures' paths as the captions' source gives them, or "" """
        with reading(self.path / "captions.tsv", "make the store anew") as path:
            with open(path, encoding="utf-8", newline="\n") as file:
                rows = [line.split("\t", 2)[:2] for line in file][1:]
            if len(rows) != self.N:
                raise ValueError(f"not the table of {self.N} rows that meta.json speaks of")
            return [key for key, _ in rows], [image for _, image in rows]

    keys = property(lambda store: store.table[0])
    images = property(lambda store: store.table[1])

    def take(self, rows, columns) -> torch.Tensor:
        """int [n] rows, [m] columns for all rows or [n, m] -> float16 [n, m, D], as they lie there"""
        columns = np.broadcast_to(columns, (len(rows), np.shape(columns)[-1]))
        if not np.isin(columns, range(len(COLUMNS))).all():
            raise IndexError(f"a store has {len(COLUMNS)} columns")
        out = np.empty((*columns.shape, self.D), np.float16)
        windows, places = (x.tolist() for x in np.divmod(rows, self.window))
        for i, (w, row) in enumerate(zip(windows, places)):
            np.take(self.vectors(w)[row], columns[i], axis=0, out=out[i], mode="clip")  # "raise" copies twice
        return torch.from_numpy(out)

    def read(self, rows, columns) -> torch.Tensor:
        """As take, but float32, of length 1 to its last bit."""
        vectors = self.take(rows, columns).float()
        return vectors.div_(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min_(1e-12))


open_store = Store  # open_store(path) -> store with .read(rows, columns), .keys, .images, .meta


def load(checkpoint: str | Path) -> Flame:
    """Checkpoint folder written by train.py, or its Hugging Face id -> Flame in eval mode.

    Raises InputError where it cannot be read, or was made with other questions.
    """
    from safetensors.torch import load_file
    cure = "train or download it anew"
    checkpoint = hub_folder(checkpoint)
    saved = read_json(Path(checkpoint, "config.json"), cure)
    with reading(Path(checkpoint, "model.safetensors"), cure) as file:
        with torch.device("meta"):  # nothing is allocated by what config.json says
            model = Flame({"columns": COLUMNS} | saved["model"] | {"llm": saved["llm"]})
        model.load_state_dict(load_file(file), assign=True)
        check_questions(saved["llm"]["questions"], Path(checkpoint, "config.json"))
        columns = model.config["columns"]
        layer, positions, path = (saved["llm"].get(name) for name in ("layer", "positions", "path"))
        typed = isinstance(layer, int | None) and isinstance(path, str | None)
        if not columns or {*columns} - {*COLUMNS} or positions not in (None, *POSITIONS) or not typed:
            raise ValueError(f"config.json speaks of columns {columns}, LLM {path} {layer} {positions}")
    return model.eval()
