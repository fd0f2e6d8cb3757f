"""Whitening: embeddings and text states to zero mean and about unit variance in every direction.

The embeddings of a CLIP have a large common part, and a few of their directions carry most of the
variance; what a consumer should learn from (a pair of glasses) may lie in the small ones.
Source: Ramesh et al. 2022 reduce embeddings by PCA; open priors whiten by a stored mean and std.
Here the whole covariance is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Examples(NamedTuple):
    """video (V, D), text (N, D): embeddings; states (M, W): of all tokens of the N texts."""

    video: Tensor
    text: Tensor
    states: Tensor


class Whitening(nn.Module):
    """x (..., D) -> (x - mean) matrix, and back by `inverse`; identity until `fit`.

    Buffers, so they are saved with the network that uses them, and belong to no optimizer.
    floor: of the mean variance, added to the variance of every direction, so that directions of
    mere noise are not blown up. Towards 0 it whitens fully, at 1 it mostly tames the large ones.
    """

    mean: Tensor
    matrix: Tensor
    back: Tensor

    def __init__(self, dim: int, floor: float = 0.01) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("back", torch.eye(dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and covariance from rows x (N, D); ZCA, so the axes stay where they are."""
        x = x.double()
        mean = x.mean(0)
        variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        floored = variance.clamp(min=0) + self.floor * variance.mean() + 1e-12
        scale = torch.sqrt(floored / (1 + self.floor))
        self.mean.copy_(mean)
        self.matrix.copy_(axes @ torch.diag(scale.reciprocal()) @ axes.T)
        self.back.copy_(axes @ torch.diag(scale) @ axes.T)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Whitening:
        """Moves between devices, but stays float32 where a trainer casts the whole network."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Whitened, float32 whatever the precision around it."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.matrix

    def inverse(self, y: Tensor) -> Tensor:
        """The x that `forward` makes y of, float32."""
        with torch.autocast(y.device.type, enabled=False):
            return y.float() @ self.back + self.mean
