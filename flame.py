"""FLAME: a frozen decoder LLM as the text tower of language-image pre-training.

Cao, Wei, Ma: "FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training", CVPR
2025. Down to the line in the middle this file is the whole method, in the order data flows:

    caption -> prompts -> segment forest -> frozen decoder -> facets  (text; never trained)
    picture -> vision transformer -> projector                        (image; trained to meet the facets)
    similarity of the two = mean over facets of the cosine

Below the line are files: an LLM's folder, tokenizers, the embedding store, checkpoints.
The stages embed.py, train.py and evaluate.py import this file; README.md shows how to use it from Python.
"""
import base64
import ctypes
import functools
import hashlib
import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import flame_ext  # the C++/CUDA extension in ext/; every line that uses it has a PyTorch twin beside it
except ImportError:
    flame_ext = None


# oneDNN, and torch in front of it, keep a kernel for every number of rows that a matrix product ever had.
# Packed rows have any length, so memory would grow; 128 kernels are as fast. The first product reads these.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


class InputError(Exception):
    """Bad input from outside. Its text is one line: the file, the line in it, what is wrong, and the cure."""


# ------------------------------------------------------------------------------------------------------------
# 1. Prompts: one caption is asked K questions, each to be answered "in just one word" (paper, section 3.2)

class PromptSet(NamedTuple):
    prefix: str              # holds "{}" where the caption goes
    facets: tuple[str, ...]  # K questions; a facet is the state at one's last token, the opening quote


FACETS = (
    'this image description means in just one word:"',  # the whole
    # entity level
    'the category of the main object in this image means in just one word:"',
    'the prominent characteristic or pattern of the main object in this image means in just one word:"',
    'the category of the minor object in this image means in just one word:"',
    'the prominent characteristic or pattern of the minor object in this image means in just one word:"',
    # interaction level
    'the primary action or event taking place in this image means in just one word:"',
    # scene level
    'the overall atmosphere or emotion of this image means in just one word:"',
)
PREFIX = 'Image description : "{}" . After thinking step by step ,'
PROMPTS = {
    "raw": PromptSet(PREFIX, FACETS[:1]),
    "short": PromptSet(PREFIX, FACETS[:3]),
    "long": PromptSet("Detailed " + PREFIX, FACETS),
}
# The columns of a store and of the text projection, always in this order: raw 1, short 3, long 7. Questions
# of one's own (use_prompts) are put in place of these, before anything is opened.
COLUMNS = [f"{name}.{k}" for name, prompt in PROMPTS.items() for k in range(len(prompt.facets))]


def clean(caption):
    """Caption as the template wants it: it ends like a sentence and holds no double quote."""
    caption = caption.strip()
    if not caption.endswith((".", "?", '"', "'")):
        caption += "."
    caption = caption.replace('"', "'")
    return caption[:-1] + "." if caption.endswith("?") else caption


# ------------------------------------------------------------------------------------------------------------
# 2. The segment forest: the trie of the strings' token sequences. It *is* facet-decoupled attention.

class Forest(NamedTuple):
    """A packed row of T tokens, cut into S segments. Each goes on where its parent ends, which lies before.

    The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
    and depth(k) <= depth(q), where a token's depth is counted from its root.
    """
    tokens: torch.Tensor     # [T] int64
    positions: torch.Tensor  # [T] int64, what RoPE sees; visibility never looks at it
    lengths: np.ndarray      # [S] int32
    parents: np.ndarray      # [S] int32, -1 for a root
    answers: torch.Tensor    # [N] int64, packed index of each sequence's last token


def build_forest(sequences, positions=None):
    """Trie of N token sequences (non-empty lists of ints) -> Forest.

    positions: N lists of ints as long as the sequences; None numbers each sequence 0, 1, 2 ...
    Tokens are shared between sequences where all that comes before, and the positions, agree.
    """
    if positions is not None:  # then equal tokens at other positions are not shared
        sequences = [list(zip(*pair, strict=True)) for pair in zip(sequences, positions, strict=True)]
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    rows = [sequences[i] for i in order]
    shared = [0] + [shared_prefix(above, row) for above, row in zip(rows, rows[1:])]
    packed = []
    lengths = []
    parents = []
    answers = np.zeros(len(rows), np.int64)
    # To do: rows [first, last), which agree on their first `depth` tokens; the segment `parent` ends there.
    todo = [(0, len(rows), 0, -1)] if rows else []
    while todo:
        first, last, depth, parent = todo.pop()
        common = min(shared[first + 1:last], default=len(rows[first]))
        if common > depth:
            packed += rows[first][depth:common]
            lengths.append(common - depth)
            parents.append(parent)
            parent = len(lengths) - 1
        while first < last and len(rows[first]) == common:  # the shortest come first: they end here
            answers[order[first]] = len(packed) - 1
            first += 1
        forks = [i for i in range(first + 1, last) if shared[i] == common]
        branches = list(zip([first, *forks], [*forks, last]))
        todo += [(a, b, common, parent) for a, b in reversed(branches) if a < b]  # the first is popped next
    lengths = np.array(lengths, np.int32)
    parents = np.array(parents, np.int32)
    if positions is None:
        where = token_depths(lengths, parents)
    else:
        where = np.array([position for _, position in packed], np.int64)
        packed = [token for token, _ in packed]
    tokens = torch.tensor(packed, dtype=torch.int64)
    return Forest(tokens, torch.from_numpy(where), lengths, parents, torch.from_numpy(answers))


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


def visible(forest):
    """The rule, as a boolean mask [T, T]: row q, column k."""
    S = len(forest.lengths)
    lineage = np.zeros((S, S), bool)  # a segment, itself and its ancestors
    for s, parent in enumerate(forest.parents.tolist()):
        if parent >= 0:
            lineage[s] = lineage[parent]
        lineage[s, s] = True
    segment = np.repeat(np.arange(S), forest.lengths)      # [T]
    depth = token_depths(forest.lengths, forest.parents)   # [T]
    return lineage[segment][:, segment] & (depth <= depth[:, None])


# ------------------------------------------------------------------------------------------------------------
# 3. The frozen decoder (Llama, Mistral, Qwen), hand-written: RMSNorm, RoPE, grouped-query attention, SwiGLU

class Decoder(NamedTuple):
    config: dict             # config.json as llm_config() fills it in
    embedding: torch.Tensor  # [vocabulary, D]
    blocks: list[dict]       # the kept blocks only
    inv_freq: torch.Tensor   # [head_dim / 2] float32, RoPE's angular frequencies


NATIVE = (torch.float32, torch.bfloat16)  # what the extension's kernels know; float16 takes the PyTorch path


@torch.inference_mode()
def decode(decoder, forest):
    """Runs the kept blocks over the packed row; -> float32 [N, D], the residual stream at the N answers.

    No final norm follows. The residual stream and the norms are float32 whatever the matrix products use: one
    dimension carries 0.8 of a state's norm, and rounding it to bfloat16 once a block drowns the rest.
    """
    heads = decoder.config["num_attention_heads"]
    kv_heads = decoder.config["num_key_value_heads"]
    head_dim = decoder.config["head_dim"]
    eps = decoder.config["rms_norm_eps"]
    device = decoder.embedding.device
    dtype = decoder.embedding.dtype
    attend = attention_over(forest, device, dtype, heads // kv_heads)
    angle = torch.outer(move(forest.positions.float(), device), decoder.inv_freq)  # [T, head_dim / 2]
    cos = angle.cos()
    sin = angle.sin()
    answers = move(forest.answers, device)

    x = decoder.embedding[move(forest.tokens, device)].float()  # [T, D], the residual stream
    update = None                                            # what the last sublayer adds to it
    for block in decoder.blocks:
        h = add_and_norm(x, update, block["attention_norm"], eps, dtype)
        qkv = F.linear(h, block["wqkv"], block["bqkv"]).view(len(x), heads + 2 * kv_heads, head_dim)
        if block["qk_norm"] is not None:
            norm_heads(qkv, block["qk_norm"], eps)
        rope(qkv, cos, sin, heads + kv_heads)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views
        mixed = attend(q, k, v).flatten(1)
        if block is decoder.blocks[-1]:  # from here on nobody reads any other token
            mixed = mixed[answers]
            x = x[answers]
        h = add_and_norm(x, F.linear(mixed, block["wo"]), block["mlp_norm"], eps, dtype)
        update = F.linear(swiglu(F.linear(h, block["w_gate_up"])), block["w_down"])
    return x + update


def move(x, device):
    """x on the device. To a GPU the copy is queued behind its work; the CPU does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def native(device, dtype):
    """Do the extension's kernels run there?"""
    kernels = flame_ext and (device.type == "cpu" or device.type == "cuda" and flame_ext.cuda)
    return bool(kernels) and dtype in NATIVE


def stream_of(device):
    """The handle of a GPU's stream, where the extension's kernels take their turn."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def attention_over(forest, device, dtype, share):
    """-> attend(q [T, H, d], k [T, Hkv, d], v [T, Hkv, d]) -> [T, H, d]: attention by the rule.

    share: query heads a key head, H / Hkv. Here the rule is a mask of all pairs. The extension visits only
    the pairs that are visible, and reads every ancestor's keys and values in place.
    """
    if native(device, dtype):
        return native_attention(forest, device, share)
    mask = torch.from_numpy(visible(forest)).to(device)

    def attend(q, k, v):
        k = k.repeat_interleave(share, dim=1)  # a key head serves its group
        v = v.repeat_interleave(share, dim=1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, d]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
    return attend


def native_attention(forest, device, share):
    gpu = device.type == "cuda"
    tile = max(1, 64 // share) if gpu else 64  # queries that are worked on together
    layout = flame_ext.layout(forest.lengths, forest.parents, tile)
    plan = move(torch.tensor(layout.plan), device) if gpu else None

    def attend(q, k, v):
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        flame_ext.attention(q, k, v, out, layout, q.shape[-1] ** -0.5, plan, stream_of(device))
        return out
    return attend


def add_and_norm(x, update, weight, eps, dtype):
    """x float32 [T, D] += update, in place; -> RMSNorm(x) * weight [T, D] in dtype."""
    if native(x.device, dtype):
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        flame_ext.rmsnorm(x, weight, out, eps, update, stream_of(x.device))
        return out
    if update is not None:
        x += update
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def norm_heads(qkv, weight, eps):
    """Qwen3: RMSNorm of the first heads of [T, heads + others, d], in place; weight float32 [heads, d]."""
    x = qkv[:, :len(weight)].float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    qkv[:, :len(weight)] = (x * scale * weight).to(qkv.dtype)


def rope(qkv, cos, sin, heads):
    """Rotates the first `heads` heads of [T, heads + others, d] in place; the pairs are (i, i + d/2)."""
    if native(qkv.device, qkv.dtype):
        flame_ext.rope(qkv, cos, sin, heads, stream_of(qkv.device))
        return
    a, b = qkv[:, :heads].float().chunk(2, dim=-1)
    cos = cos[:, None]
    sin = sin[:, None]
    qkv[:, :heads] = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)


def swiglu(gate_up):
    """[T, 2F] -> [T, F], silu(gate) * up."""
    if native(gate_up.device, gate_up.dtype):
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        flame_ext.swiglu(gate_up, out, stream_of(gate_up.device))
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------------------
# 4. The text tower: tokenizer + forest + decoder

def tokenize(tokenizer, captions, prompts):
    """-> ([N] prefix ids, [N][K] facet ids); together the ids of the whole string `prefix(c) + " " + facet`.
    """
    prefix = prompt_set(prompts).prefix
    texts = [prefix.replace("{}", clean(caption)) for caption in captions]
    return tokenize_texts(tokenizer, texts, prompts, tokenize_whole)


def tokenize_whole(tokenizer, text, facets):
    """K whole strings, tokenized -> (what they share with the prefix alone, the K remainders)."""
    prefix, *strings = tokenizer.encode_batch([text] + [f"{text} {facet}" for facet in facets])
    cut = min(shared_prefix(prefix, string) for string in strings)
    return prefix[:cut], [string[cut:] for string in strings]


def caption_forest(prefixes, suffixes, positions="restart"):
    """[N] prefix ids, [N][K] facet ids -> the Forest of all N * K strings, its answers in that order.

    "causal" makes each caption one chain, where a facet's string holds the facets before it.
    """
    sequences = []
    consecutive = []
    for prefix, facets in zip(prefixes, suffixes):
        earlier = []  # the questions before this one
        for facet in facets:
            sequences.append(prefix + earlier * (positions == "causal") + facet)
            if positions == "sequential":  # as if the K facets stood one after the other
                start = len(prefix) + len(earlier)
                consecutive.append([*range(len(prefix)), *range(start, start + len(facet))])
            earlier = earlier + facet
    return build_forest(sequences, consecutive or None)


# Tokens in one packed row. On CPU its activations stay in cache; a mask of all pairs should not be larger.
BUDGET = {"cpu": 2048, "cuda": 16384}
POSITIONS = ("restart", "sequential", "causal")


class TextEncoder:
    """The frozen text tower.

    llm_dir    Hugging Face checkpoint folder (config.json, safetensors, and a tokenizer), or its id there
    layer      how many blocks to keep; the paper takes the output of all but the last
    positions  "restart": every facet's RoPE positions go on from the caption: its string fixes an embedding;
               "sequential": consecutive over all K facets, as in the released code;
               "causal": consecutive too, and a facet sees those before it: no facet-decoupled attention,
               to compare with
    budget     tokens in one packed row, up to a caption more (default: BUDGET)
    tokenize   (tokenizer, captions, prompts) -> ids; data/released.py has the released code's
    """

    def __init__(self, llm_dir, device="cpu", dtype=torch.bfloat16, layer=None, positions="restart",
                 budget=None, tokenize=tokenize):
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, not {positions!r}")
        device = torch.device(device)
        if device.type == "cpu":
            keep_freed_memory()
        llm_dir = llm_folder(llm_dir)
        self.llm_dir = llm_dir
        self.tokenizer = load_tokenizer(llm_dir)
        self.decoder = load_decoder(llm_dir, layer, device, dtype)
        self.layer = len(self.decoder.blocks)
        self.positions = positions
        self.tokenize = tokenize
        self.dim = self.decoder.config["hidden_size"]
        self.context = self.decoder.config["context"]
        self.budget = budget or BUDGET[device.type]
        self.truncated = 0  # captions cut so far because the model's context is shorter

    def encode(self, captions, prompts="long"):
        """list[str], or one str -> float32 [N, K, D] on the CPU: the states at the facets' last tokens.

        They are not normalised. Raises ValueError for anything else, and for prompts that are none of
        PROMPTS.
        """
        captions = listed(captions)
        out = torch.empty(len(captions), len(prompt_set(prompts).facets), self.dim)
        for rows, facets in self.encode_batches(captions, prompts):
            out[rows] = facets
        return out

    def encode_batches(self, captions, prompts="long"):
        """Yields (rows, facets float32 [n, K, D]) a packed row at a time; every caption is in one."""
        for rows, forest in self.pack(captions, prompts):
            yield rows, self.run(forest, len(rows))

    def pack(self, captions, prompts="long"):
        """Yields (rows, Forest of their strings), each a packed row; a thread may run ahead of `run`.

        Captions are sorted by length, so that progress and memory are steady; none is padded. The packed rows
        are as few as the budget allows and about equally long: filled to the brim they would leave a short
        last one, which is slow.
        """
        captions = listed(captions)
        prefixes, suffixes = self.tokenize(self.tokenizer, captions, prompts)
        for i, (prefix, facets) in enumerate(zip(prefixes, suffixes)):
            if self.longest_string(prefix, facets) > self.context:
                prefixes[i], suffixes[i] = self.longest_beginning(captions[i], prompts)
        sizes = [token_count(prefix, facets) for prefix, facets in zip(prefixes, suffixes)]
        total = sum(sizes)
        packed_rows = -(-total // self.budget)
        made = 0
        tokens = 0
        batch = []
        for i in sorted(range(len(captions)), key=sizes.__getitem__):
            batch.append(i)
            tokens += sizes[i]
            due = tokens * packed_rows // total  # as many rows should be there by now
            if due > made:
                chosen = [prefixes[j] for j in batch], [suffixes[j] for j in batch]
                forest = caption_forest(*chosen, self.positions)
                self.check_vocabulary(forest.tokens)
                yield batch, forest
                made = due
                batch = []

    def run(self, forest, n):
        """The n captions' facet states, float32 [n, K, D] on the CPU, of a Forest that `pack` made."""
        return decode(self.decoder, forest).cpu().view(n, -1, self.dim)

    def longest_string(self, prefix, facets):
        """Tokens that the context must hold; only in "restart" is each facet's string one of its own."""
        together = max if self.positions == "restart" else sum
        return len(prefix) + together(map(len, facets))

    def check_vocabulary(self, tokens):
        token = tokens.max().item()
        vocabulary = len(self.decoder.embedding)
        if token >= vocabulary:
            raise InputError(f"{self.llm_dir}: its tokenizer says {token}, its weights have {vocabulary} "
                             "tokens; they belong to different models")

    def longest_beginning(self, caption, prompts):
        """(prefix ids, facet ids) of as much of a caption as fits into the context; the prompt is never cut.
        """
        def ids_of(characters):
            (prefix,), (facets,) = self.tokenize(self.tokenizer, [caption[:characters]], prompts)
            return prefix, facets

        low = 0
        high = len(caption)
        while low < high:
            middle = (low + high + 1) // 2
            if self.longest_string(*ids_of(middle)) <= self.context:
                low = middle
            else:
                high = middle - 1
        best = ids_of(low)
        if self.longest_string(*best) > self.context:
            raise InputError(f"{self.llm_dir}: its context of {self.context} tokens cannot hold the "
                             f"{prompts} prompts; choose another LLM or fewer prompts")
        self.truncated += 1
        return best


def token_count(prefix, facets):
    """Tokens of one caption in a packed row, at most: openings that facets share are counted each time."""
    return len(prefix) + sum(len(facet) for facet in facets)


# ------------------------------------------------------------------------------------------------------------
# 5. The image tower: a CLIP-style vision transformer under open_clip's weight names, and the projector

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
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
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=nn.GELU(),
            c_proj=nn.Linear(4 * width, width),
        ))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT up to the last block's raw output: FLAME uses neither ln_post nor proj.

    Published config (ViT-B/16): image 224, patch 16, width 768, 12 blocks, 12 heads; LayerNorm eps 1e-5,
    exact GELU. init: the blocks' initial weights, "clip" as OpenAI's CLIP has them, "published" as the
    released FLAME code.
    """

    def __init__(self, image_size, patch_size, width, layers, heads, init="clip"):
        super().__init__()
        self.gradient_checkpointing = False  # recompute each block backward: less memory, a third more work
        patches = (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        for block in self.transformer.resblocks:
            if init == "clip":  # residual branches shrink with depth
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            else:  # what nn.Linear and nn.MultiheadAttention begin with
                nn.init.xavier_uniform_(block.attn.in_proj_weight)
                nn.init.zeros_(block.attn.out_proj.bias)

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
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing is random
            else:
                x = block(x)
        return x


class TextProjection(nn.Module):
    """A linear map of each store column: unit facet state u -> normalise(A (u - mean) (I + M)).

    A = rest * I + basis diag(gain) basis^T is closed-form and frozen (data/projection.py computes it from the
    store); it is kept in this low-rank form since eleven full 5120 x 5120 maps are 1.15 GB. M is trained with
    the image tower, for the columns in `mapped` alone; it starts at zero and is [D, D], or of low rank. The
    published recipe has neither.
    """

    def __init__(self, dim, rank=0, mapped=(), map_rank=0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(COLUMNS), dim))
        self.register_buffer("basis", torch.zeros(len(COLUMNS), dim, rank))
        self.register_buffer("gain", torch.zeros(len(COLUMNS), rank))
        self.register_buffer("rest", torch.ones(len(COLUMNS)))
        self.mapped = list(mapped)  # of COLUMNS, indices
        if mapped:
            self.up = nn.Parameter(torch.zeros(len(mapped), map_rank or dim, dim))
        if mapped and map_rank:  # M = down up
            self.down = nn.Parameter(torch.randn(len(mapped), dim, map_rank) * dim ** -0.5)

    def forward(self, facets, columns):
        """[N, K, D], int [K] or [N, K] store columns -> [N, K, D] unit vectors."""
        columns = torch.as_tensor(columns, device=self.mean.device).expand(facets.shape[:2])
        x = F.normalize(facets.float(), dim=-1) - self.mean[columns]
        out = torch.empty_like(x)
        for c in columns.unique().tolist():  # one product a column, not one small matrix a vector
            own = x[columns == c]
            along = own @ self.basis[c] * self.gain[c]
            own = self.rest[c] * own + along @ self.basis[c].T
            if c in self.mapped:
                m = self.mapped.index(c)
                seen = own @ self.down[m] if hasattr(self, "down") else own
                own = own + seen @ self.up[m]
            out[columns == c] = own
        return F.normalize(out, dim=-1)


class Flame(nn.Module):
    """The trained half: image tower (visual.*), projector (mm.*), text projection (text.*), scale and bias.

    config: image_size, patch_size, width, layers, heads; text_dim (D), projector_hidden, pool_first;
    text_rank, text_mapped, text_map_rank (shape of the text projection); columns (names of the store columns
    it is trained on); llm (which LLM the texts came from); init and init_logit_scale in training only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [config[name] for name in ("image_size", "patch_size", "width", "layers", "heads")]
        hidden = config["projector_hidden"]
        D = config["text_dim"]
        self.visual = VisionTransformer(*sizes, config.get("init", "clip"))
        self.mm = nn.Sequential(
            nn.Linear(config["width"], hidden),
            nn.GELU(),
            nn.Linear(hidden, D),
            nn.LayerNorm(D),
        )
        mapped = [COLUMNS.index(name) for name in config.get("text_mapped", ())]
        self.text = TextProjection(D, config["text_rank"], mapped, config.get("text_map_rank", 0))
        self.logit_scale = nn.Parameter(torch.tensor(float(config.get("init_logit_scale", np.log(10)))))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # used by the sigmoid loss alone

    def forward(self, pixels, kept=None):  # what DistributedDataParallel calls
        """[B, 3, H, W] -> [B, D], L2-normalised: every patch token projected, then averaged; no class token.

        pool_first averages before projecting: near the same accuracy on small towers at about half the time.
        kept: int64 [B, n], the only patches to look at, in training.
        """
        patches = self.visual(pixels, kept)[:, 1:]
        x = self.mm(patches.mean(1)) if self.config["pool_first"] else self.mm(patches).mean(1)
        return F.normalize(x.float(), dim=-1)

    def encode_image(self, images, kept=None):
        """[B, 3, H, W], or a PIL image, a path, or a list of any of these -> [B, D], L2-normalised.

        In eval mode without gradient. Raises ValueError for anything else.
        """
        pixels = pixels_of(images, self.config["image_size"]).to(self.visual.conv1.weight)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self(pixels, kept)

    def encode_text(self, facets, prompts="long"):
        """[N, K, D] facet states of a prompt set -> [N, K, D], its text projection applied, L2-normalised.

        In eval mode without gradient. Raises ValueError where the shape or the prompt set is another.
        """
        K = len(prompt_set(prompts).facets)
        D = self.config["text_dim"]
        if not isinstance(facets, torch.Tensor) or facets.ndim != 3 or facets.shape[1:] != (K, D):
            found = list(facets.shape) if isinstance(facets, torch.Tensor) else type(facets).__name__
            raise ValueError(f"facets must be a tensor [N, {K}, {D}] for prompts {prompts!r}, not {found}")
        columns = [i for i, name in enumerate(COLUMNS) if name.startswith(f"{prompts}.")]
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.text(facets.to(self.text.mean.device), columns)

    def preprocess(self, image):
        """PIL image, or a picture's path -> [3, size, size]: RGB, shortest side to size (bicubic), centre
        crop, normalise.

        Raises OSError where the path cannot be read as a picture, ValueError for anything else than these
        two.
        """
        return preprocess(image, self.config["image_size"])


# ------------------------------------------------------------------------------------------------------------
# 6. The two meet

def similarity(image, facets):
    """[M, D], [N, K, D] -> [N, M], mean over facets of the cosine. Raises ValueError for other shapes."""
    if image.ndim != 2 or facets.ndim != 3 or image.shape[1] != facets.shape[2]:
        raise ValueError("similarity wants images [M, D] and facets [N, K, D], "
                         f"not {list(image.shape)} and {list(facets.shape)}")
    return F.normalize(facets, dim=-1).mean(1) @ F.normalize(image, dim=-1).T


# ============================================================================================================
# That was the method. From here on files are read: JSON and arrays, an LLM's folder, tokenizers, the store,
# checkpoints.
# ============================================================================================================

def read_json(path, wanted=None, cure="download or write it anew"):
    """The object in a JSON file that others may have written.

    wanted: {key: type, tuple of types, or for an object such a dict again}. A key may be missing where None's
    type is among them; an int is a float too, a bool is neither. Raises InputError, which names file, key and
    cure, where anything is not as wanted.
    """
    path = regular_file(path, cure)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); {cure}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e}); {cure}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: holds a {type(entries).__name__}, not an object; {cure}")
    check_keys(path, entries, wanted or {}, cure)
    return entries


def check_keys(path, entries, wanted, cure, inside=""):
    """Raises InputError where entries, from the file, are not as wanted (see read_json)."""
    for key, types in wanted.items():
        value = entries.get(key)
        name = repr(inside + key)
        nested = types if isinstance(types, dict) else None
        types = dict if nested else types
        types = types if isinstance(types, tuple) else (types,)
        if key not in entries and type(None) not in types:
            raise InputError(f"{path}: no {name}; {cure}")
        fits = isinstance(value, types) or float in types and isinstance(value, int)
        if not fits or isinstance(value, bool) and bool not in types:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise InputError(f"{path}: {name} is {json.dumps(value)[:50]}, not a {names}; {cure}")
        if nested:
            check_keys(path, value, nested, cure, f"{inside}{key}.")


def check_range(path, entries, key, low, high, cure):
    """Raises InputError where a number is not from low to high; a missing one and null are not looked at."""
    value = entries.get(key)
    if value is not None and not low <= value <= high:  # NaN is not either
        raise InputError(f"{path}: {key!r} is {json.dumps(value)[:50]}, not from {low} to {high}; {cure}")


def regular_file(path, cure):
    """The path itself. Raises InputError where no file is there, or a pipe, which would be waited for without
    end.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular' if path.exists() else 'no such'} file; {cure}")
    return path


def read_array(path, dtype, shape, cure="download or write it anew"):
    """Maps a .npy file that others may have written: exactly this dtype and shape, rows first. Nothing is
    unpickled.

    Raises InputError, which names file and cure, where anything is not as wanted.
    """
    path = regular_file(path, cure)
    try:
        array = np.load(path, mmap_mode="r")  # allow_pickle is off
    except Exception as e:  # numpy raises nearly anything on a broken file
        why = " ".join(str(e).split())[:100]
        raise InputError(f"{path}: not a .npy file of numbers ({why}); {cure}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of arrays, not one .npy array; {cure}")
    if array.dtype != np.dtype(dtype) or array.shape != tuple(shape) or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", columns first"
        raise InputError(f"{path}: {array.dtype} {list(array.shape)}{order}, "
                         f"where {np.dtype(dtype)} {list(shape)} is wanted; {cure}")
    return array


def read_lines(path, count, cure):
    """A text file's lines, one a row of the store. Raises InputError where there are not `count` of them."""
    path = regular_file(path, cure)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e}); {cure}") from None
    if len(lines) != count:
        raise InputError(f"{path}: {len(lines)} lines, where {count} are wanted; {cure}")
    return lines


# ------------------------------------------------------------------------------------------------------------
# An LLM's folder

# model_type: Llama 1-3.x and SmolLM2; Mistral-7B and Nemo; Qwen2 and 2.5; Qwen3
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLM_CURE = ("--llm wants a Hugging Face checkpoint folder with config.json, *.safetensors and a tokenizer; "
            "download it anew")
UNQUANTISED = "download the bfloat16 or float16 checkpoint, the one without FP8, GPTQ, AWQ or bnb in its name"
ANEW = "download it anew"
NONE = type(None)  # among the types of what a file may leave out
UNLIMITED = 1 << 20


def llm_folder(name):
    """A folder as it is. Of a Hugging Face id, owner/name, the folder in its cache: what is read of the model
    is fetched where it is not there yet, and nothing more.

    Raises InputError where the id is neither cached nor to be had.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    read = ["config.json", "*.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json"]
    try:
        from huggingface_hub import snapshot_download
        twice = ["consolidated*", "*/*"]  # the same weights once more, as Mistral's own code reads them
        return Path(snapshot_download(str(name), allow_patterns=read, ignore_patterns=twice))
    except Exception as e:  # offline, gated, no such model, a full disk
        why = " ".join(str(e).split())[:200]
        raise InputError(f"{name}: no such folder, and as a Hugging Face id it is out of reach "
                         f"({type(e).__name__}: {why}); download it, and give its folder") from None


def llm_config(llm_dir):
    """What decides an LLM's states in its config.json, and no more: checked, with what may be left to
    defaults filled in.

    Two entries are ours: "inv_freq" and "context", how many tokens a string may have: the positions that the
    model knows, or its sliding window where that is shorter, since up to there a window changes nothing.
    """
    path = Path(llm_dir) / "config.json"
    family = read_json(path, {"model_type": str}, LLM_CURE)["model_type"]
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    sizes = {"num_hidden_layers": int, "hidden_size": int, "intermediate_size": int, "vocab_size": int,
             "num_attention_heads": int, "num_key_value_heads": (int, NONE), "head_dim": (int, NONE)}
    context = {"max_position_embeddings": (int, NONE), "sliding_window": (int, NONE)}
    others = {"rms_norm_eps": float, "hidden_act": (str, NONE), "use_sliding_window": (bool, NONE),
              "rope_theta": (float, NONE), "rope_parameters": (dict, NONE), "rope_scaling": (dict, NONE)}
    entries = read_json(path, sizes | context | others, LLM_CURE)
    for key in sizes | context:
        check_range(path, entries, key, 1, 1 << 24, LLM_CURE)
    check_range(path, entries, "rms_norm_eps", 0, 1, LLM_CURE)
    for key in ("quantization_config", "compression_config"):
        if method := entries.get(key):
            method = method.get("quant_method", key) if isinstance(method, dict) else method
            raise InputError(f"{path}: {key!r} says that the weights are quantised ({method}); {UNQUANTISED}")
    if entries.get("hidden_act") not in (None, "silu"):
        raise InputError(f"{path}: hidden_act {entries['hidden_act']!r} is not supported; supported: silu")

    config = {key: entries.get(key) for key in ("model_type", "rms_norm_eps", *sizes)}
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    head_dim = config["head_dim"] or max(1, config["hidden_size"] // heads)
    if heads % kv_heads:
        raise InputError(f"{path}: 'num_attention_heads' is {heads}, no multiple of 'num_key_value_heads', "
                         f"{kv_heads}; {LLM_CURE}")
    if head_dim % 2:
        raise InputError(f"{path}: 'head_dim' is {head_dim}, but RoPE turns pairs; {LLM_CURE}")
    windowed = entries.get("use_sliding_window", family == "mistral")
    window = entries.get("sliding_window", 4096) if windowed else None
    config["num_key_value_heads"] = kv_heads
    config["head_dim"] = head_dim
    config["inv_freq"] = rope_frequencies(path, entries, head_dim)
    config["context"] = min(entries.get("max_position_embeddings") or UNLIMITED, window or UNLIMITED)
    return config


# What config.json must say of each kind of RoPE.
ROPE = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}


def rope_frequencies(path, entries, head_dim):
    """-> float64 [head_dim / 2]. Scaling slows them down, so that far positions look like the near ones of
    training.
    """
    # transformers 5 and 4 name it differently
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise InputError(f"{path}: 'rope_type' {kind!r}: RoPE scaling that is not supported; "
                         f"supported: {', '.join(ROPE)}")
    theta = entries.get("rope_theta")
    rope = {"rope_theta": 10000.0 if theta is None else theta} | rope
    check_keys(path, rope, dict.fromkeys(ROPE[kind], float), LLM_CURE)
    for key in ROPE[kind]:
        check_range(path, rope, key, 1e-6, 1e12, LLM_CURE)
    freq = float(rope["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / rope["factor"]
    # What turns often within the first training's context is kept, what turns seldom slowed, in between a
    # blend.
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    check_range(path, rope, "high_freq_factor", low + 1e-6, 1e12, LLM_CURE)
    turns = freq * rope["original_max_position_embeddings"] / (2 * np.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (kept + (1 - kept) / rope["factor"])


def weight_files(llm_dir):
    """The safetensors files that are read: those of the index, else model.safetensors, else all there are."""
    llm_dir = Path(llm_dir)
    index = llm_dir / "model.safetensors.index.json"
    whole = llm_dir / "model.safetensors"
    if index.exists():
        names = list(read_json(index, {"weight_map": dict}, ANEW)["weight_map"].values())
        if not names:
            raise InputError(f"{index}: 'weight_map' is empty; {ANEW}")
        for name in names:
            if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
                raise InputError(f"{index}: 'weight_map' holds {json.dumps(name)[:200]}, "
                                 f"no file's name, or one in another folder; {ANEW}")
        return sorted({llm_dir / name for name in names})
    files = [whole] if whole.exists() else sorted(llm_dir.glob("*.safetensors"))
    if not files:
        raise InputError(f"{llm_dir}: no *.safetensors; download the model's weights into this folder")
    return files


def weights_reader(llm_dir):
    """(read(name) -> tensor, names) over the files of weight_files. Raises InputError where one is broken or
    quantised.
    """
    from safetensors import SafetensorError, safe_open
    where = {}
    for file in weight_files(llm_dir):
        try:
            with safe_open(regular_file(file, ANEW), framework="pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: cannot be read ({e}); {ANEW}") from None
        for name, kind in kinds.items():
            if name.startswith(("model.", "lm_head.")) and kind not in ("F32", "F16", "BF16", "F64"):
                raise InputError(f"{file}: tensor {name} is {kind}, of a quantised checkpoint; {UNQUANTISED}")
            where[name] = file

    def read(name):  # a mapping of its own for every tensor: what was copied elsewhere leaves memory at once
        with safe_open(where[name], framework="pt") as opened:
            return opened.get_tensor(name)
    return read, where.keys()


def load_decoder(llm_dir, layer=None, device="cpu", dtype=torch.bfloat16):
    """Reads the first `layer` blocks (default: all but the last) of a Hugging Face checkpoint folder.

    Tensors are read one at a time, straight to device and dtype, so that the host never holds a whole shard;
    norms stay float32. Raises InputError where the folder lacks a file, is of another family, or a shape does
    not match its config.
    """
    config = llm_config(llm_dir)
    n_layers = config["num_hidden_layers"]
    layer = n_layers - 1 if layer is None else layer
    if not 1 <= layer <= n_layers:
        raise InputError(f"{llm_dir}: layer {layer} asked for, but the model has {n_layers} blocks; "
                         f"choose 1 to {n_layers}")
    read, names = weights_reader(llm_dir)

    def weight(name, *shape, to=dtype):
        if name not in names:
            raise InputError(f"{llm_dir}: no tensor {name} in its safetensors; "
                             f"the folder is not a whole {config['model_type']} checkpoint")
        tensor = read(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{llm_dir}: tensor {name} has shape {list(tensor.shape)} where config.json "
                             f"implies {list(shape)}; weights and config belong to different models")
        return tensor.to(device, to)

    embedding = weight("model.embed_tokens.weight", config["vocab_size"], config["hidden_size"])
    blocks = [load_block(llm_dir, config, weight, names, f"model.layers.{i}.") for i in range(layer)]
    return Decoder(config, embedding, blocks, config["inv_freq"].float().to(device))


def load_block(llm_dir, config, weight, names, prefix):
    """weight(name, *shape) -> the tensors of the block whose names begin with prefix; q, k, v are one matrix,
    so are gate, up.
    """
    family = config["model_type"]
    D = config["hidden_size"]
    inner = config["intermediate_size"]
    head_dim = config["head_dim"]
    kv_heads = config["num_key_value_heads"]
    heads = {"q": config["num_attention_heads"], "k": kv_heads, "v": kv_heads}
    attention = prefix + "self_attn."
    mlp = prefix + "mlp."
    biases = [f"{attention}{x}_proj.bias" for x in heads] if family == "qwen2" else []
    norms = [f"{attention}{x}_norm.weight" for x in "qk"] if family == "qwen3" else []
    for name in sorted(names):
        odd = name.startswith(prefix) and name.endswith((".bias", "q_norm.weight", "k_norm.weight"))
        if odd and name not in biases + norms:
            raise InputError(f"{llm_dir}: tensor {name} is not supported in a {family} checkpoint; "
                             "use one without it")
    bias = [weight(name, n * head_dim) for name, n in zip(biases, heads.values())]
    norm = [weight(name, head_dim, to=torch.float32).expand(n, -1) for name, n in zip(norms, heads.values())]
    return {
        "attention_norm": weight(prefix + "input_layernorm.weight", D, to=torch.float32),
        "wqkv": torch.cat([weight(f"{attention}{x}_proj.weight", n * head_dim, D) for x, n in heads.items()]),
        "bqkv": torch.cat(bias) if bias else None,
        "qk_norm": torch.cat(norm) if norm else None,  # [heads + kv_heads, head_dim]
        "wo": weight(attention + "o_proj.weight", D, heads["q"] * head_dim),
        "mlp_norm": weight(prefix + "post_attention_layernorm.weight", D, to=torch.float32),
        "w_gate_up": torch.cat([weight(f"{mlp}{x}_proj.weight", inner, D) for x in ("gate", "up")]),
        "w_down": weight(mlp + "down_proj.weight", D, inner),
    }


def load_unembedding(llm_dir):
    """-> (the final norm's weight [D], unembedding [vocabulary, D]) float32: what turns a state into
    next-token scores.
    """
    llm_config(llm_dir)  # refuses what is quantised
    read, names = weights_reader(llm_dir)
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    for name in ("model.norm.weight", head):
        if name not in names:
            raise InputError(f"{llm_dir}: no tensor {name} in its safetensors; {ANEW}")
    return read("model.norm.weight").float(), read(head).float()


def llm_fingerprint(llm_dir):
    """Names an LLM by what is read of it: "2-" and 16 hexadecimal digits of a SHA-256.

    Over what llm_config takes of config.json, the tokenizer's file, and each safetensors file's name, size,
    header and 16 samples: milliseconds for a 24-GB model, and still a fine-tune and its base are told apart.
    Raises InputError where the folder cannot be read or is not supported.
    """
    config = llm_config(llm_dir)
    tokenizer = tokenizer_file(llm_dir)
    weights_reader(llm_dir)  # complains of what is broken or quantised
    config["inv_freq"] = config["inv_freq"].float().tolist()
    bos = tokenizer.name == "tokenizer.model" and adds_bos(tokenizer)
    digest = hashlib.sha256(repr((sorted(config.items()), tokenizer.name, bos)).encode())
    digest.update(tokenizer.read_bytes())
    sample_files(digest, weight_files(llm_dir))
    return "2-" + digest.hexdigest()[:16]


def sample_files(digest, files):
    """Adds each file's name, size, and 17 pieces evenly spaced from its start on."""
    for path in files:
        try:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as f:
                for k in range(17):
                    f.seek(size * k // 17)
                    digest.update(f.read(65536))
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror}); {LLM_CURE}") from None


# ------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer(NamedTuple):
    encode: Callable        # str -> list[int], special tokens as the model's own tokenizer adds them
    encode_batch: Callable  # list[str] -> list[list[int]]
    decode: Callable        # list[int] -> str


def tokenizer_file(llm_dir):
    """A checkpoint folder's tokenizer.json, else tokenizer.model (sentencepiece), else tekken.json
    (tiktoken).
    """
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
        if (Path(llm_dir) / name).exists():
            return regular_file(Path(llm_dir) / name, ANEW)
    raise InputError(f"{llm_dir}: no tokenizer.json, tokenizer.model or tekken.json; "
                     "download the model's tokenizer into this folder")


def load_tokenizer(llm_dir):
    """-> Tokenizer. Raises InputError where the folder has none, or one that cannot be read."""
    path = tokenizer_file(llm_dir)
    read = {
        "tokenizer.json": read_tokenizer_json,
        "tokenizer.model": read_sentencepiece,
        "tekken.json": read_tekken,
    }
    try:
        tokenizer = read[path.name](path)
        if not tokenizer.encode("A cat."):
            raise ValueError("it makes no token of a text")
    except InputError:
        raise
    except ImportError as e:
        raise InputError(f"{path}: reading it needs {e.name}; pip install {e.name}") from None
    except Exception as e:  # the libraries raise bare exceptions of their own on a broken file
        raise InputError(f"{path}: not a tokenizer ({' '.join(str(e).split())}); {ANEW}") from None
    return tokenizer


def read_tokenizer_json(path):
    from tokenizers import Tokenizer as Published
    published = Published.from_file(str(path))
    published.no_padding()  # a file may carry settings for both
    published.no_truncation()

    def encode(text):
        return published.encode(text).ids

    def encode_batch(texts):
        return [encoding.ids for encoding in published.encode_batch(texts)]
    return Tokenizer(encode, encode_batch, published.decode)


def read_sentencepiece(path):
    from sentencepiece import SentencePieceProcessor
    pieces = SentencePieceProcessor(model_file=str(path))
    return with_bos(pieces.encode, pieces.decode, pieces.bos_id(), adds_bos(path))


def adds_bos(path):
    """Does the tokenizer.model want BOS in front? tokenizer_config.json beside it says so; else
    LlamaTokenizer's default.
    """
    settings = path.with_name("tokenizer_config.json")
    if not settings.exists():
        return True
    return bool(read_json(settings, {"add_bos_token": (bool, NONE)}).get("add_bos_token", True))


def read_tekken(path):
    from tiktoken import Encoding
    tekken = read_json(path, {"config": dict, "vocab": list}, ANEW)
    config = tekken["config"]
    wanted = {"default_num_special_tokens": int, "default_vocab_size": int, "pattern": str}
    check_keys(path, config, wanted, ANEW)
    special = config["default_num_special_tokens"]  # these ids come first; <s> is 1
    vocabulary = tekken["vocab"][:config["default_vocab_size"] - special]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in vocabulary}
    pieces = Encoding(path.name, pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        return [i + special for i in pieces.encode(text)]

    def decode(ids):
        return pieces.decode([i - special for i in ids if i >= special])
    return with_bos(encode, decode, 1, True)


def with_bos(encode, decode, bos, add_bos):
    """A Tokenizer that puts BOS in front and, as every published tokenizer.json does, takes a literal <s> in
    a text for it.
    """
    def whole(text):
        first, *rest = [encode(part) for part in text.split("<s>")]
        ids = [bos] + first if add_bos else first
        for part in rest:
            ids = ids + [bos] + part
        return ids

    def batch(texts):
        return [whole(text) for text in texts]
    return Tokenizer(whole, batch, decode)


def tokenize_texts(tokenizer, texts, prompts, whole):
    """[N] prefixes -> what whole(tokenizer, text, facets) gives of each; piece by piece where the ids are the
    same.
    """
    same_for_all = facet_ids(tokenizer, prompts, whole)
    if same_for_all:
        return tokenizer.encode_batch(texts), [same_for_all] * len(texts)
    pairs = [whole(tokenizer, text, PROMPTS[prompts].facets) for text in texts]
    return [shared for shared, _ in pairs], [rest for _, rest in pairs]


# Captions whose last characters could merge with what follows, if a tokenizer's tokens went that far.
PROBES = ("A cat.", "", " ", "'(", '"', "1 2", "\u732b", "\u0301", "\U0001f98a", "a\n\n", "x" * 99)


@functools.lru_cache
def facet_ids(tokenizer, prompts, whole):
    """Facets' ids where they may be tokenized once for all captions, which the tokenizer itself is asked;
    else None.
    """
    prefix, facets = PROMPTS[prompts]
    texts = [prefix.replace("{}", probe) for probe in PROBES]
    found = [whole(tokenizer, text, facets) for text in texts]
    ids = found[0][1]
    apart = [(tokenizer.encode(text), ids) for text in texts]
    return ids if found == apart else None


# ------------------------------------------------------------------------------------------------------------
# What people pass

def prompt_set(name):
    """-> its PromptSet. Raises ValueError where there is none of that name."""
    if not isinstance(name, str) or name not in PROMPTS:
        raise ValueError(f"prompts {name!r}: there is no such set; choose among {', '.join(PROMPTS)}")
    return PROMPTS[name]


def listed(captions):
    """A list or tuple of str as it is; a str alone is one caption. Raises ValueError for anything else."""
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, (list, tuple)):
        raise ValueError(f"captions must be a list of str, or one str, not {type(captions).__name__}")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions must be a list of str, but captions[{i}] is {type(caption).__name__}")
        if not is_unicode(caption):
            raise ValueError(f"captions[{i}] holds half a surrogate pair, which is no Unicode text")
    return captions


def is_unicode(*texts):
    """False where UTF-8 cannot write one: for half a pair of surrogates, or what stands for a bad byte."""
    return all(text.isascii() or not re.search("[\ud800-\udfff]", text) for text in texts)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image):
    """PIL image or uint8 tensor [..., 3, H, W] -> float32 [..., 3, H, W], normalised by CLIP's mean and
    deviation.
    """
    if not isinstance(image, torch.Tensor):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    mean = torch.tensor(CLIP_MEAN, device=image.device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=image.device)[:, None, None]
    return image.contiguous().float().div_(255).sub_(mean).div_(std)


def preprocess(image, size):
    """See Flame.preprocess."""
    from PIL import Image
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return preprocess(opened, size)
        except Image.DecompressionBombError as error:
            raise OSError(f"{image}: {error}") from None
    if not isinstance(image, Image.Image):
        raise ValueError(f"a picture must be a PIL image or a path, not {type(image).__name__}")
    w, h = image.size
    if not min(w, h) or max(w, h) > 100 * min(w, h):  # scaled up, a thin one might fill the memory
        raise ValueError(f"a picture of {w} x {h} pixels is too thin")
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left = round((w - size) / 2)
    top = round((h - size) / 2)
    resized = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    return to_pixels(resized.crop((left, top, left + size, top + size)))


def pixels_of(images, size):
    """Whatever Flame.encode_image takes -> [B, 3, size, size]."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("pictures: the list is empty")
        return torch.cat([pixels_of(image, size) for image in images])
    pixels = images if isinstance(images, torch.Tensor) else preprocess(images, size)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ValueError(f"pixels must be floats [B, 3, {size}, {size}], as preprocess makes them, "
                         f"not {pixels.dtype} {list(pixels.shape)}")
    return pixels


# ------------------------------------------------------------------------------------------------------------
# The machine

def default_dtype(device):
    """bfloat16 where matrix products in it are fast, else float32."""
    slow = torch.device(device).type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if slow else torch.bfloat16


def keep_freed_memory():
    """Lets glibc keep what is freed (where there is a glibc). Every block of a tower frees and takes the same
    large buffers again; given back to the system in between, their pages are zeroed anew each time, a sixth
    of the time on CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------
# Questions of one's own

ASKED = []  # what use_prompts was given first; all stores and checkpoints of a process must ask the same


def use_prompts(questions, source):
    """Replaces prompt sets: {"long": {"prefix": 'A photo : "{}" .', "facets": ["in one word it means:\\""]}}.

    What is left out stays the paper's. Stores and checkpoints remember their questions and pass them here
    when they are opened. source: who says so. Raises InputError if these are no prompt sets, or others than
    this process asks already: PROMPTS and COLUMNS are shared by all that it has opened.
    """
    cure = "give an object with raw, short or long, each with a prefix that holds {} and a list of facets"
    check_keys(source, questions, {name: {"prefix": str, "facets": list} for name in questions}, cure)
    for name, own in questions.items():
        facets = own["facets"]
        text = all(isinstance(facet, str) and facet.strip() for facet in facets)
        text = text and is_unicode(own["prefix"], *facets)
        if name not in PROMPTS or "{}" not in own["prefix"] or not text or not 1 <= len(facets) <= 99:
            raise InputError(f"{source}: {name!r} is no prompt set; {cure}")
    if ASKED and ASKED != [questions]:
        raise InputError(f"{source}: its questions are others than of what was opened before; open it in a "
                         "process of its own")
    ASKED[:] = [questions]
    for name, own in questions.items():
        PROMPTS[name] = PromptSet(own["prefix"], tuple(own["facets"]))
    facet_ids.cache_clear()  # it goes by the set's name
    COLUMNS[:] = [f"{name}.{k}" for name, prompt in PROMPTS.items() for k in range(len(prompt.facets))]


# ------------------------------------------------------------------------------------------------------------
# The embedding store, written by embed.py, read by train.py

class Store:
    """A finished store folder: embeddings.npy [N, M, D] of unit vectors, keys.txt, images.txt, meta.json.

    float16; or int8 with statistics.npy [2, M, D] (each column's mean and deviation per dimension) and
    scales.npy [N, M]: a vector is mean + deviation * scale * its 8-bit integers. Raises InputError where the
    folder is none, is unfinished, or does not hold together.
    """

    META = {"N": int, "D": int, "columns": list, "store": (str, NONE),
            "captions": {"path": str, "sha256": str},
            "llm": {"name": str, "fingerprint": str, "layer": int, "positions": str,
                    "questions": (dict, NONE)}}
    CURE = "run embed.py --overwrite"

    def __init__(self, path):
        self.path = Path(path)
        meta = self.path / "meta.json"
        if not meta.exists():
            state = "is not an embedding store; make one with embed.py"
            if (self.path / "journal.json").exists():
                state = "is not finished; run the same embed.py command again"
            raise InputError(f"{self.path}: {state}")
        self.meta = read_json(meta, self.META, self.CURE)
        use_prompts(self.meta["llm"].get("questions") or {}, meta)
        N = self.meta["N"]
        D = self.meta["D"]
        columns = self.meta["columns"]
        if N < 1 or D < 1 or not columns or columns != [c for c in COLUMNS if c in columns]:
            raise InputError(f"{meta}: N, D and columns must be above 0, and columns among "
                             f"{' '.join(COLUMNS)}; {self.CURE}")
        dtype = self.meta.get("store", "float16")
        if dtype not in ("float16", "int8"):
            raise InputError(f"{meta}: 'store' is {dtype!r}, neither float16 nor int8; {self.CURE}")
        M = len(columns)
        self.columns = [COLUMNS.index(column) for column in columns]
        self.vectors = read_array(self.path / "embeddings.npy", dtype, (N, M, D), self.CURE)
        self.scales = self.statistics = None
        if dtype == "int8":
            self.scales = read_array(self.path / "scales.npy", np.float32, (N, M), self.CURE)
            statistics = read_array(self.path / "statistics.npy", np.float32, (2, M, D), self.CURE)
            self.statistics = np.array(statistics)
        self.keys = read_lines(self.path / "keys.txt", N, self.CURE)
        self.images = read_lines(self.path / "images.txt", N, self.CURE)

    def __len__(self):
        return len(self.keys)

    def __reduce__(self):  # pickled as its path: a loader's process maps the vectors, it gets no copy of them
        return Store, (self.path,)

    def read(self, rows, columns):
        """int [n] rows -> float32 [n, m, D] of unit vectors.

        columns: places in COLUMNS (not in this store's own list), [m] for all rows or [n, m]. Raises
        ValueError where there is no such row or column.
        """
        N, M, D = self.vectors.shape
        rows = np.atleast_1d(rows)
        rows = rows if rows.size else rows.astype(np.int64)
        columns = np.atleast_2d(columns)
        if not np.isin(columns, self.columns).all():
            raise ValueError(f"columns {columns.tolist()}: the store has {self.columns}")
        place = np.searchsorted(self.columns, columns)  # where they lie in the store
        index = np.ravel_multi_index((rows[:, None], place), (N, M))
        if flame_ext:  # one pass over memory that knows nothing of what lies between
            out = torch.empty(*index.shape, D)
            flame_ext.unit_vectors(self.vectors, index.ravel(), out.view(-1, D), self.scales, self.statistics)
            return out
        out = torch.from_numpy(self.vectors.reshape(N * M, D)[index]).float()
        if self.scales is not None:
            mean, deviation = torch.from_numpy(self.statistics[:, index % M])
            out = mean + deviation * out * torch.from_numpy(self.scales.reshape(N * M, 1)[index])
        return out.div_(torch.linalg.vector_norm(out, dim=-1, keepdim=True).clamp_min_(1e-12))


open_store = Store  # open_store(path) -> store with .read(rows, columns), .keys, .images, .meta


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, written by train.py

def load(checkpoint):
    """Checkpoint folder written by train.py -> Flame in eval mode.

    In its config: "columns", names of the store columns it was trained on; "llm", the text tower's name,
    fingerprint, layer and positions. Raises InputError where the checkpoint is missing or does not fit.
    """
    from safetensors import SafetensorError
    path = Path(checkpoint)
    try:
        config, weights = read_checkpoint(path)
        model = Flame(config)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = " ".join(str(e).split())[:300]
        raise InputError(f"{path}: model.safetensors and config.json do not make a model ({why}); "
                         "train or download it anew") from None
    return model.eval()


def read_checkpoint(path):
    """A folder that train.py wrote -> (config, weights). What both say of the model's sizes must agree."""
    from safetensors.torch import load_file
    cure = "make a checkpoint with train.py"
    maybe = (str, NONE)
    llm = {"name": maybe, "path": maybe, "fingerprint": maybe, "layer": (int, NONE), "positions": maybe,
           "questions": (dict, NONE)}
    wanted = {"model": {"heads": int, "pool_first": bool}, "llm": llm, "store": (dict, NONE)}
    saved = read_json(path / "config.json", wanted, cure)
    use_prompts(saved["llm"].get("questions") or {}, path / "config.json")
    trained_on = (saved.get("store") or {}).get("columns", COLUMNS)
    config = {"columns": trained_on} | saved["model"]
    weights = load_file(regular_file(path / "model.safetensors", cure))
    sizes = sizes_of(weights) | {"text_rank": weights["text.basis"].shape[-1]}
    for name, size in sizes.items():
        if config.get(name) != size:
            raise ValueError(f"{name} is {config.get(name)} in config.json, {size} in the weights")
    if config["heads"] < 1 or config["width"] % config["heads"]:
        raise ValueError(f"{config['heads']} heads do not divide width {config['width']}")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} holds what is no finite float")
    layer = saved["llm"].get("layer")
    if layer is not None and layer < 1:
        raise ValueError(f"layer {layer}")
    if saved["llm"].get("positions") not in (None, *POSITIONS):
        raise ValueError(f"positions {saved['llm']['positions']}")
    for names in (config["columns"], config.get("text_mapped", COLUMNS[:1])):
        if not isinstance(names, list) or not all(name in COLUMNS for name in names):
            raise ValueError(f"columns {names}")
    if not config["columns"]:
        raise ValueError("columns []")
    return config | {"llm": dict.fromkeys(llm) | {"positions": "restart"} | saved["llm"]}, weights


def sizes_of(weights):
    """What an image tower's tensors, and a projector's if they are there, tell of their config.

    LookupError or ValueError where they are none.
    """
    width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    patches = len(weights["visual.positional_embedding"]) - 1
    blocks = {name.split(".")[3] for name in weights if name.startswith("visual.transformer.resblocks.")}
    sizes = {
        "image_size": patch_size * round(patches ** 0.5),
        "patch_size": patch_size,
        "width": width,
        "layers": len(blocks),
    }
    if "mm.0.weight" in weights:
        sizes["projector_hidden"] = len(weights["mm.0.weight"])
        sizes["text_dim"] = len(weights["mm.2.weight"])
    return sizes


from contextlib import contextmanager  # noqa: E402


@contextmanager
def reading(path, cure):
    try:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; {cure}")
        yield path
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {explained(error)}; {cure}") from None


def explained(error):
    return " ".join((str(error) or type(error).__name__).split())[:200]
