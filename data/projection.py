"""The text projection of stage 2: a linear map of each store column, first in closed form, then trained.

An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9.
A fixed linear map, computed from the store, lets the image tower learn several times faster at no cost:
"whiten" evens the states out, "agree" keeps what captions of one picture have in common. After it, "+linear",
a map can be trained with the image tower. The published recipe has neither.
"""
import functools
from collections import Counter
from itertools import islice

import numpy as np
import torch

import flame
from data.captions import read_table

RIDGE = 0.01     # a fraction of the largest deviation, added to all, so that noise is not blown up
RANK = 1024      # directions that are treated one by one; eleven full maps at D = 5120 would be 1.15 GB
SAMPLE = 32_768  # rows, spread over the store: several a dimension; at D = 5120 7 GB


def parse_projection(spec):
    """"agree+linear" -> ("agree", True): the closed form, and whether a map is trained after it."""
    kind, linear, rest = spec.partition("+linear")
    if kind not in ("none", "whiten", "agree") or rest:
        raise flame.InputError(f"--text-projection: {spec!r}; give none, whiten or agree, each also with "
                               "+linear")
    return kind, bool(linear)


def text_config(spec, D, columns):
    """-> what flame.Flame's config says of texts. columns: names of those that are trained on."""
    kind, linear = parse_projection(spec)
    # A map of the raw column, of few words which captions of other pictures share, costs a third of what is
    # found in words that training never had (tests/RESULTS.md).
    mapped = [name for name in columns if linear and not name.startswith("raw")]
    return {"text_dim": D, "columns": columns, "text_rank": 0 if kind == "none" else min(RANK, D),
            "text_mapped": mapped}


@torch.no_grad()
def fit_text_projection(projection, store, spec, columns, device="cpu", rows=None):
    """Fills in the closed form of a flame.TextProjection for those columns, computed from the store's rows,
    all or int [n].

    Per column: u = x / |x|, mean mu of u; "whiten" maps u to W (u - mu), see `whitening`, "agree" to
    A (u - mu), see `agreement`. In float64 on `device`, a column at a time.
    """
    kind, _ = parse_projection(spec)
    if kind == "none":
        return
    rows = np.arange(len(store)) if rows is None else rows
    units = store.read(rows[::-(-len(rows) // SAMPLE)], columns)  # [n, K, D]
    if not units.isfinite().all():
        raise flame.InputError(f"{store.path}: vectors are NaN or infinite; make the store anew")
    projection.to(device)
    for k, c in enumerate(columns):
        fill(projection, c, units[:, k], whitening)
    if kind == "agree":
        others = means_of_others(projection, units, columns)
        for k, c in enumerate(columns):
            fill(projection, c, units[:, k], functools.partial(agreement, others=others[set_of(c)]))


def fill(projection, c, u, closed_form):
    """The map of column c from its unit vectors u [n, D]: closed_form(they without their mean, rank)."""
    u = u.to(projection.mean.device, torch.float64)
    projection.mean[c] = u.mean(0)
    projection.rest[c], projection.basis[c], projection.gain[c] = closed_form(
        u - u.mean(0), projection.basis.shape[-1])


def whitening(x, rank):
    """W = V diag(1 / (s + ridge s_1)) V^T of the deviations s of x [n, D], s_1 the largest, and directions V.

    -> rest, basis [D, rank], gain [rank] of flame.TextProjection: beyond `rank` directions all are scaled
    alike. A covariance of few rows, fewer than four a dimension, has small s that are too small: OAS (Chen
    et al. 2010) mixes in as much of the identity as is best for Gaussian data.
    """
    n, D = x.shape
    variances, vectors = torch.linalg.eigh(x.T @ x / n)  # ascending
    variances = variances.clamp_min(0)
    if n < 4 * D:
        trace = variances.sum()
        squares = (variances ** 2).sum()
        spread = (squares - trace ** 2 / D).clamp_min(1e-300)  # 0 where all variances are alike
        share = (squares + trace ** 2) / ((n + 1) * spread)
        variances = torch.lerp(variances, trace.expand(D) / D, share.clamp(max=1))
    s = variances.sqrt().flip(0).clamp_min(1e-12)  # where all vectors are alike nothing is whitened
    wanted = 1 / (s + RIDGE * s[0])
    wanted = wanted / wanted[-1]  # only directions matter, the result is normalised; keeps numbers near 1
    rest = wanted[rank].float() if rank < D else torch.zeros(())
    return rest, vectors.flip(1)[:, :rank], wanted[:rank] - rest.double()


def set_of(c):
    return flame.COLUMNS[c].split(".")[0]


def captions_differ(store, columns):
    """Have the prompt sets of these columns captions of their own, in some of the first rows?"""
    rows = islice(read_table(store.path / "captions.tsv"), 1000)
    return any(len({getattr(row, set_of(c)) for c in columns}) > 1 for row in rows)


def means_of_others(projection, units, columns):
    """{prompt set: mean of each row's other sets [n, D]} of columns' unit vectors [n, K, D].

    A set's mean is that over its columns of their vectors in `projection`.
    """
    counts = Counter(set_of(c) for c in columns)  # a set's columns lie side by side
    means = []
    for part in units.split(1024):
        views = projection(part.to(projection.mean.device), columns).split([*counts.values()], dim=1)
        means.append(torch.stack([view.mean(1) for view in views]))
    means = torch.cat(means, 1)  # [sets, n, D]
    return dict(zip(counts, (means.sum(0) - means) / (len(counts) - 1)))


def agreement(x, rank, others):
    """Ridge regression predicts from a column, x [n, D], the mean of the row's other prompt sets, `others`:
    (C + ridge c_1)^-1 P, with C the column's covariance, c_1 its largest eigenvalue, P its product with them.

    They tell of the same picture in other words. So what can be predicted is what the column says of the
    picture, the rest is wording. Of the regression only the symmetric part is kept, and of that what has
    positive eigenvalues. It learns as fast as whitening and keeps more of what words mean that training never
    had (tests/RESULTS.md). Akin to generalised canonical correlation (Kettenring 1971).
    -> rest, basis [D, rank], gain [rank] of flame.TextProjection
    """
    covariance = x.T @ x / len(x)
    eye = torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    largest = torch.linalg.eigvalsh(covariance)[-1].clamp_min(1e-24)
    regression = torch.linalg.solve(covariance + RIDGE * largest * eye, x.T @ others.double() / len(x))
    values, vectors = torch.linalg.eigh((regression + regression.T) / 2)  # ascending
    gain = values.flip(0)[:rank].clamp_min(0) / values[-1].clamp_min(1e-24)
    return 0.0, vectors.flip(1)[:, :rank], gain
