"""The text projection of stage 2: a linear map of each store column, first in closed form, then trained.

An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9.
A fixed linear map, computed from the store, lets the image tower learn several times faster at no cost:
"whiten" evens the states out, "agree" keeps what captions of one picture have in common. After it, "+linear",
a small map can be trained with the image tower. The published recipe has neither.
"""
import re

import numpy as np
import torch

import flame

RIDGE = 0.01        # a fraction of the largest deviation, added to all, so that noise is not blown up
RANK = 1024         # directions that are treated one by one; eleven full maps at D = 5120 would be 1.15 GB
SAMPLE = 100_000    # rows; more would add nothing but hours
# Raw captions are few words, which captions of other pictures share. Their column agrees by a larger ridge,
# and gets no trained map: that costs a third of what is found in words that training never had
# (tests/RESULTS.md, "What was tried on the validation split").
RAW_RIDGE = 0.1


def parse_projection(spec):
    """"agree+linear:256" -> ("agree", 256). The trained map's rank is 0 for a full matrix, None without."""
    match = re.fullmatch(r"(none|whiten|agree)(?:(\+linear)(?::([0-9]{1,4}))?)?", spec)
    if not match:
        raise flame.InputError(f"--text-projection: {spec!r}; give none, whiten or agree, each also with "
                               "+linear, or of low rank, +linear:256")
    kind, linear, rank = match.groups()
    return kind, int(rank or 0) if linear else None


def text_config(spec, D, columns):
    """-> what flame.Flame's config says of texts. columns: names of those that are trained on."""
    kind, map_rank = parse_projection(spec)
    mapped = [] if map_rank is None else [name for name in columns if not name.startswith("raw")]
    return {"text_dim": D, "columns": columns, "text_rank": 0 if kind == "none" else min(RANK, D),
            "text_mapped": mapped, "text_map_rank": map_rank or 0}


def fit_text_projection(projection, store, spec, device="cpu"):
    """Fills in the closed form of a flame.TextProjection, computed from the store.

    Per column: u = x / |x|, mean mu of u; "whiten" maps u to W (u - mu), see `whitening`, "agree" to
    A (u - mu), see `agreement`. Float64 on `device`, a D x D matrix at a time: 210 MB at D = 5120; one more
    for each column that is to agree.
    """
    kind, _ = parse_projection(spec)
    rank = projection.basis.shape[-1]
    rows = np.arange(0, len(store), -(-len(store) // SAMPLE))
    if kind == "agree":
        views = flame.TextProjection(store.meta["D"], rank)
        fit_text_projection(views, store, "whiten", device)
        products = products_with_others(store, rows, views.to(device), device)
    for c, name in enumerate(flame.COLUMNS) if kind != "none" else ():
        projection.mean[c], covariance = moments(store, rows, c, device)
        if kind == "whiten":
            rest, basis, gain = whitening(covariance, rank, len(rows))
        else:
            ridge = RAW_RIDGE if name.startswith("raw") else RIDGE
            rest, basis, gain = agreement(covariance, products[c], ridge, rank)
        projection.rest[c] = rest
        projection.basis[c] = basis
        projection.gain[c] = gain


def moments(store, rows, column, device):
    """-> mean [D] and covariance [D, D] of a store column's unit vectors, float64."""
    D = store.meta["D"]
    total = torch.zeros(D, dtype=torch.float64, device=device)
    products = torch.zeros(D, D, dtype=torch.float64, device=device)
    for part in np.split(rows, range(4096, len(rows), 4096)):
        u = store.read(part, [column])[:, 0].to(device, torch.float64)
        total += u.sum(0)
        products.addmm_(u.T, u)
    mean = total / len(rows)
    return mean, products / len(rows) - torch.outer(mean, mean)


def whitening(covariance, rank, rows):
    """W = V diag(1 / (s + ridge s_1)) V^T of a covariance's deviations s, s_1 the largest, and directions V.

    -> rest, basis [D, rank], gain [rank] of flame.TextProjection: beyond `rank` directions all are scaled
    alike. A covariance of few rows, fewer than four a dimension, has small s that are too small: OAS (Chen
    et al. 2010) mixes in as much of the identity as is best for Gaussian data.
    """
    D = len(covariance)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances = variances.clamp_min(0)
    if rows < 4 * D:
        trace = variances.sum()
        squares = (variances ** 2).sum()
        spread = (squares - trace ** 2 / D).clamp_min(1e-300)  # 0 where all variances are alike
        share = (squares + trace ** 2) / ((rows + 1) * spread)
        variances = torch.lerp(variances, trace.expand(D) / D, share.clamp(max=1))
    s = variances.sqrt().flip(0).clamp_min(1e-12)  # where all vectors are alike nothing is whitened
    wanted = 1 / (s + RIDGE * s[0])
    wanted = wanted / wanted[-1]  # only directions matter, the result is normalised; keeps numbers near 1
    rest = wanted[rank].float() if rank < D else torch.zeros(())
    return rest, vectors.flip(1)[:, :rank], wanted[:rank] - rest.double()


def products_with_others(store, rows, views, device):
    """-> float64 [11, D, D], each column's covariance of its unit vectors and what the row's other sets say.

    A set says the mean over its columns of their unit vectors in `views`, a TextProjection; the others
    together say the mean of that.
    """
    counts = [len(prompt.facets) for prompt in flame.PROMPTS.values()]  # a set's columns lie side by side
    set_of = np.repeat(range(len(counts)), counts).tolist()
    D = store.meta["D"]
    products = torch.zeros(len(set_of), D, D, dtype=torch.float64, device=device)
    sums = torch.zeros(len(set_of), 2, D, dtype=torch.float64, device=device)
    for part in np.split(rows, range(1024, len(rows), 1024)):
        u = store.read(part, range(len(set_of))).to(device)  # [n, 11, D]
        parts = views(u, range(len(set_of))).split(counts, dim=1)
        sets = torch.stack([x.mean(1).double() for x in parts])  # [3, n, D]
        others = (sets.sum(0) - sets) / (len(counts) - 1)
        for c, n in enumerate(set_of):
            x = u[:, c].double()
            products[c].addmm_(x.T, others[n])
            sums[c] += torch.stack([x.sum(0), others[n].sum(0)])
    products /= len(rows)
    for product, means in zip(products, sums / len(rows)):
        product -= torch.outer(*means)
    return products


def agreement(covariance, product, ridge, rank):
    """Ridge regression predicts from a column what the row's other prompt sets say: (C + ridge c_1)^-1 P,
    with C the column's covariance, c_1 its largest eigenvalue, P its product with the others.

    They tell of the same picture in other words. So what can be predicted is what the column says of the
    picture, the rest is wording. Of the regression only the symmetric part is kept, and of that what has
    positive eigenvalues. It learns as fast as whitening and keeps more of what words mean that training never
    had (tests/RESULTS.md). Akin to generalised canonical correlation (Kettenring 1971).
    -> rest, basis [D, rank], gain [rank] of flame.TextProjection
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    largest = torch.linalg.eigvalsh(covariance)[-1].clamp_min(1e-24)
    regression = torch.linalg.solve(covariance + ridge * largest * eye, product)
    values, vectors = torch.linalg.eigh((regression + regression.T) / 2)  # ascending
    gain = values.flip(0)[:rank].clamp_min(0) / values[-1].clamp_min(1e-24)
    return 0.0, vectors.flip(1)[:, :rank], gain
