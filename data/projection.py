"""The text projection of stage 2, our addition: a linear map per facet column, in closed form, then trained.

Facet embeddings of an LLM are strongly anisotropic: for one facet, two captions have a mean cosine of 0.9. A
fixed linear map, computed from the store, lets the image tower learn several times faster at no cost.
"whiten" decorrelates the dimensions, "agree" keeps what captions of the same image have in common. With
"+linear", a second map is trained together with the image tower.
"""
import math
from collections import Counter

import numpy as np
import torch

import flame
from data.captions import read_table

PROJECTIONS = "none", "whiten", "agree", "none+linear", "whiten+linear", "agree+linear"
RIDGE = 0.01     # regularization, as a fraction of the largest standard deviation or eigenvalue
RANK = 1024      # of a closed-form map
SAMPLE = 32_768  # rows, spread over the store: several per dimension; 7 GB at D = 5120


def text_config(spec, D, columns):
    """Return the entries of flame.Flame's config about texts. columns: names of the trained facet columns."""
    kind, _, linear = spec.partition("+")
    # The raw column gets no trained map: raw captions have few words and are shared between images, and a map
    # trained on them costs a third of the recall in words that training never had (tests/RESULTS.md).
    mapped = [name for name in columns if linear and not name.startswith("raw")]
    return {"text_dim": D, "columns": columns, "text_rank": 0 if kind == "none" else min(RANK, D),
            "text_mapped": mapped}


@torch.no_grad()
def fit_text_projection(projection, store, spec, columns, images, device="cpu"):
    """Compute the closed form of a flame.TextProjection for some columns, from the captions of Images.

    For each column, with unit embeddings u and their mean mu: "whiten" maps u to W (u - mu), see `whitening`;
    "agree" maps u to A (u - mu), see `agreement`. Computes in float64 on `device`, one column at a time.
    """
    if spec.startswith("none"):
        return
    sample = range(0, len(images.spans), math.ceil(len(images.rows) / SAMPLE))
    rows = [images.rows[images.starts[i]:images.starts[i + 1]] for i in sample]
    units = store.read(np.concatenate(rows), columns)  # [n, K, D]
    if not units.isfinite().all():
        raise flame.InputError(f"{store.path}: embeddings are NaN or infinite; make the store again")
    projection.to(device)
    for c, u in zip(columns, units.unbind(1)):
        fit_column(projection, c, u, whitening)
    if spec.startswith("agree"):
        others = means_of_others(projection, units, columns, torch.tensor(list(map(len, rows))))
        for c, u in zip(columns, units.unbind(1)):
            fit_column(projection, c, u, agreement, others[set_of(c)])


def fit_column(projection, c, u, closed_form, *others):
    """Set the map of column c from its unit embeddings u [n, D]: closed_form(centered u, rank, *others)."""
    u = u.to(projection.mean.device, torch.float64)
    projection.mean[c] = u.mean(0)
    projection.rest[c], projection.basis[c], projection.gain[c] = closed_form(
        u - u.mean(0), projection.basis.shape[-1], *others)


def whitening(x, rank):
    """Return (rest, basis [D, rank], gain [rank]) of flame.TextProjection that whiten x [n, D].

    W = V diag(1 / (s + RIDGE s_1)) V^T, with the standard deviations s of x along its principal directions V,
    s_1 the largest. All directions beyond `rank` get the same factor. With fewer than 4 D rows,
    the small s are underestimated; the covariance is then shrunk toward a multiple of the identity by OAS
    (Chen et al. 2010).
    """
    n, D = x.shape
    variances, vectors = torch.linalg.eigh(x.T @ x / n)  # ascending
    variances = variances.clamp_min(0)
    if n < 4 * D:
        trace = variances.sum()
        squares = (variances ** 2).sum()
        spread = (squares - trace ** 2 / D).clamp_min(1e-300)  # 0 if all variances are equal
        shrinkage = (squares + trace ** 2) / ((n + 1) * spread)
        variances = torch.lerp(variances, trace / D, shrinkage.clamp(max=1))
    s = variances.sqrt().flip(0).clamp_min(1e-12)  # positive even if all embeddings are equal
    factors = 1 / (s + RIDGE * s[0])
    factors = factors / factors[-1]  # the result is normalized, so the scale is free; keeps numbers near 1
    rest = factors[rank].float() if rank < D else torch.zeros(())
    return rest, vectors.flip(1)[:, :rank], factors[:rank] - rest.double()


def set_of(c):
    return flame.FACET_COLUMNS[c].split(".")[0]


def captions_differ(store, columns, images):
    """Return whether images have several rows, or the prompt sets of these columns have different captions in
    any of the first rows.
    """
    rows = read_table(store.path / "captions.tsv", max_rows=1000)
    return len(images.rows) > len(images.spans) or any(
        len({getattr(row, set_of(c)) for c in columns}) > 1 for row in rows)


def means_of_others(projection, units, columns, counts_of_images):
    """Return {prompt set: mean over the image's other captions [n, D]}, from unit embeddings [n, K, D].

    These are the captions of the image's other rows or, if it has one row, of the row's other sets. Each set
    counts once: as the mean over its columns of the projected embeddings. counts_of_images: int [m], the
    number of rows of each image, which are adjacent.
    """
    counts = Counter(set_of(c) for c in columns)  # the columns of a set are adjacent
    means = []
    for part in units.split(1024):
        views = projection(part.to(projection.mean.device), columns).split([*counts.values()], dim=1)
        means.append(torch.stack([view.mean(1) for view in views]))
    means = torch.cat(means, 1)  # [sets, n, D]
    own = means.sum(0)
    image = torch.arange(len(counts_of_images)).repeat_interleave(counts_of_images).to(own.device)
    total = own.new_zeros(len(counts_of_images), own.shape[1]).index_add_(0, image, own)[image]
    rows = counts_of_images.to(own.device)[image][:, None]
    of_other_rows = (total - own) / (len(counts) * (rows - 1))
    return dict(zip(counts, torch.where(rows > 1, of_other_rows, (own - means) / (len(counts) - 1))))


def agreement(x, rank, others):
    """Return (rest, basis [D, rank], gain [rank]) that predict `others` from x [n, D] by ridge regression.

    `others` [n, D] is the mean of the image's other captions. These describe it in other words, so the
    predictable part of a column is what it says about the image, and the remainder is wording. The regression
    is (C + RIDGE c_1 I)^-1 P, with the covariance C of x, its largest eigenvalue c_1, and the
    cross-covariance P. Only its symmetric part with positive eigenvalues is kept. It learns as fast as
    whitening and keeps more of the meaning of words that training never had (tests/RESULTS.md). It is related
    to generalized canonical correlation analysis (Kettenring 1971).
    """
    covariance = x.T @ x / len(x)
    largest = torch.linalg.eigvalsh(covariance)[-1].clamp_min(1e-24)
    covariance.diagonal().add_(RIDGE * largest)
    others = others.double().nan_to_num(0)  # NaN: an image with one row of a single set has no other caption
    regression = torch.linalg.solve(covariance, x.T @ others / len(x))
    values, vectors = torch.linalg.eigh((regression + regression.T) / 2)  # ascending
    gain = values.flip(0)[:rank].clamp_min(0) / values[-1].clamp_min(1e-24)
    return 0.0, vectors.flip(1)[:, :rank], gain
