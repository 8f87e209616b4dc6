"""The text projection of stage 2: a linear map of each store column, first in closed form, then trained.

An LLM's facet states are strongly anisotropic: two captions' states for one facet have a mean cosine of 0.9.
A fixed linear map, computed from the store, lets the image tower learn several times faster at no cost:
"whiten" evens the states out, "agree" keeps what captions of one picture have in common. After it, "+linear",
a small map can be trained with the image tower. The published recipe has neither.
"""
import re
from collections import Counter

import numpy as np
import torch

import flame

RIDGE = 0.01  # a fraction of the largest deviation, added to all, so that noise is not blown up
RANK = 1024   # directions that are treated one by one; eleven full maps at D = 5120 would be 1.15 GB


def fit_text_projection(store, spec, ridge=RIDGE, rank=RANK, max_rows=100_000, shrinkage=False, device="cpu",
                        columns=None):
    """-> flame.TextProjection, computed from the store. columns: those that are trained on.

    Per column: u = x / |x|, mean mu of u; "center" maps u to u - mu, "whiten" to W (u - mu), see `whitening`,
    "agree" to A (u - mu), see `agreement`; in a store of one prompt set, which has none to agree with, it is
    "whiten". Float64 on `device`, a D x D matrix at a time: 210 MB at D = 5120; one more for each column that
    is to agree. More than max_rows rows (drawn from a fixed seed) would add nothing but hours; 0 fits nothing
    and gives the right shapes.
    """
    kinds = parse_projection(spec, ridge)
    if len({name.split(".")[0] for name in store.meta["columns"]}) == 1:
        kinds = {name: (kind.replace("agree", "whiten"), *rest) for name, (kind, *rest) in kinds.items()}
    D = store.meta["D"]
    rank = min(rank, D) if any(kind in ("whiten", "agree") for kind, _, _ in kinds.values()) else 0
    of_column = [kinds[name.split(".")[0]] for name in flame.COLUMNS]
    mapped = [c for c in columns or store.columns if of_column[c][2] is not None]
    map_rank = of_column[mapped[0]][2] if mapped else 0  # that of all
    projection = flame.TextProjection(D, rank, mapped, map_rank)
    rows = np.arange(len(store))
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False))
    agreeing = [c for c in store.columns if of_column[c][0] == "agree"]
    if agreeing and max_rows:
        views = fit_text_projection(store, "whiten", RIDGE, rank, max_rows, shrinkage, device).to(device)
        products = products_with_others(store, rows, agreeing, views, device)
    for c in store.columns:
        kind, ridge, _ = of_column[c]
        if kind == "none" or not max_rows:
            continue
        projection.mean[c], covariance = moments(store, rows, c, device)
        if kind == "whiten":
            rest, basis, gain = whitening(covariance, ridge, rank, len(rows) if shrinkage else 0)
        elif kind == "agree":
            rest, basis, gain = agreement(covariance, products.pop(c), ridge, rank)
        else:
            continue
        projection.rest[c] = rest
        projection.basis[c] = basis
        projection.gain[c] = gain
    return projection


def moments(store, rows, column, device):
    """-> mean [D] and covariance [D, D] of a store column's unit vectors, float64."""
    D = store.meta["D"]
    total = torch.zeros(D, dtype=torch.float64, device=device)
    products = torch.zeros(D, D, dtype=torch.float64, device=device)
    for start in range(0, len(rows), 4096):
        u = store.read(rows[start:start + 4096], [column])[:, 0].to(device, torch.float64)
        total += u.sum(0)
        products.addmm_(u.T, u)
    mean = total / len(rows)
    return mean, products / len(rows) - torch.outer(mean, mean)


def whitening(covariance, ridge, rank, shrink_rows=0):
    """W = V diag(1 / (s + ridge s_1)) V^T of a covariance's deviations s, s_1 the largest, and directions V.

    -> rest, basis [D, rank], gain [rank] of flame.TextProjection: beyond `rank` directions all are scaled
    alike.
    shrink_rows: the covariance is of so few rows, for D, that its small s are too small; OAS (Chen et al.
    2010) mixes in as much of the identity as is best for Gaussian data.
    """
    D = len(covariance)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances = variances.clamp_min(0)
    if shrink_rows:
        trace = variances.sum()
        squares = (variances ** 2).sum()
        spread = (squares - trace ** 2 / D).clamp_min(1e-300)  # 0 where all variances are alike
        share = (squares + trace ** 2) / ((shrink_rows + 1) * spread)
        variances = torch.lerp(variances, trace.expand(D) / D, share.clamp(max=1))
    s = variances.sqrt().flip(0).clamp_min(1e-12)  # where all vectors are alike nothing is whitened
    wanted = 1 / (s + ridge * s[0])
    wanted = wanted / wanted[-1]  # only directions matter, the result is normalised; keeps numbers near 1
    rest = wanted[rank].float() if rank < D else torch.zeros(())
    return rest, vectors.flip(1)[:, :rank], wanted[:rank] - rest.double()


def products_with_others(store, rows, columns, views, device):
    """-> {column: covariance [D, D], float64, of its unit vectors and what the row's other prompt sets say}.

    A set says the mean over its columns of their unit vectors in `views`, a TextProjection; the others
    together say the mean of that.
    """
    names = [flame.COLUMNS[c].split(".")[0] for c in store.columns]
    counts = Counter(names)  # a set's columns lie side by side
    sets = list(counts)
    D = store.meta["D"]
    products = {c: torch.zeros(D, D, dtype=torch.float64, device=device) for c in columns}
    sums = {c: torch.zeros(2, D, dtype=torch.float64, device=device) for c in columns}
    for start in range(0, len(rows), 1024):
        u = store.read(rows[start:start + 1024], store.columns).to(device)  # [n, M, D]
        parts = views(u, store.columns).split(list(counts.values()), dim=1)
        said = torch.stack([part.mean(1).double() for part in parts])  # [sets, n, D]
        for c in columns:
            place = store.columns.index(c)
            own = u[:, place].double()
            own_set = said[sets.index(names[place])]
            others = (said.sum(0) - own_set) / (len(sets) - 1)
            products[c].addmm_(own.T, others)
            sums[c] += torch.stack([own.sum(0), others.sum(0)])
    for c in columns:
        own_mean, others_mean = sums[c] / len(rows)
        products[c] = products[c] / len(rows) - torch.outer(own_mean, others_mean)
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


# What a prompt set gets: a kind, its ridge, whether a map is trained, and the rank of that
PART = re.compile(r"(raw|short|long)=(none|center|whiten|agree)(?::([0-9.e-]+))?(\+linear(?::([0-9]+))?)?")


def parse_projection(spec, ridge=RIDGE):
    """"whiten", or one a prompt set, "raw=whiten:0.1,long=whiten+linear" -> {set: (kind, ridge, map's rank)}.

    The rank of the trained map is None where there is none, 0 where it is a full matrix.
    """
    kinds = dict.fromkeys(flame.PROMPTS, ("none", ridge, None))
    parts = spec.split(",") if "=" in spec else [f"{name}={spec}" for name in kinds]
    ranks = set()
    try:
        for name, kind, own, linear, map_rank in [PART.fullmatch(part).groups() for part in parts]:
            map_rank = int(map_rank or 0) if linear else None
            kinds[name] = kind, float(own or ridge), map_rank
            if linear:
                ranks.add(map_rank)
            if not 0 < kinds[name][1] <= 100 or len(ranks) > 1 or max(ranks, default=0) > 1 << 14:
                raise ValueError  # one rank: the maps of all columns are one tensor
    except (AttributeError, ValueError):
        why = ("give none, center, whiten or agree, each also with +linear, or one a set, with a ridge above "
               "0 and one rank: raw=agree:0.1,short=whiten+linear:256,long=whiten+linear:256")
        raise flame.InputError(f"--text-projection: {spec!r}; {why}") from None
    return kinds
