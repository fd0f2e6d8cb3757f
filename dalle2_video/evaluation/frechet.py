"""Frechet distance between sets of features, each taken for a Gaussian (Heusel et al. 2017).

On the probe's features it is to faces what FVD (Unterthiner et al. 2018) on I3D's is to videos in
general: small only where the samples look like real clips and vary as they do. It falls with
the number of samples, so compare sets of one size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (N, D) and (M, D), float64.

    ValueError for fewer than two rows or another D.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (N, D) and (M, D), not {a.shape} and {b.shape}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = _root(cov_a)
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric
    both = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float((means + cov_a.trace() + cov_b.trace() - 2 * both).clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_interval(a: Tensor, b: Tensor, draws: int = 200, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the distance of `a` to `b` over the choice of a's rows.

    The distance +- 1.96 standard deviations of the bootstrap's. Its quantiles will not do: rows
    that are drawn twice raise every one of its distances.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(a), (len(a),), generator=generator) for _ in range(draws)]
    values = torch.tensor([frechet_distance(a[row], b) for row in rows], dtype=torch.float64)
    distance, half = frechet_distance(a, b), 1.96 * float(values.std())
    return max(0.0, distance - half), distance + half
