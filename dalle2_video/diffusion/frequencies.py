"""The orthonormal cosine transform of clips: where the errors of a network are nearly independent.

What a network does not know (a colour, how far a head turns) is shared by thousands of neighbouring
values, so its errors in pixels go together, and those in frequencies hardly do.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def cosines(number: int, device: torch.device) -> Tensor:
    """The DCT-II of N = `number` values: an orthogonal float32 matrix (N, N), a row a frequency."""
    k = torch.arange(number, dtype=torch.float64)[:, None]
    place = torch.arange(number, dtype=torch.float64) + 0.5
    matrix = torch.cos(math.pi / number * k * place) * math.sqrt(2 / number)
    matrix[0] /= math.sqrt(2)
    return matrix.float().to(device)


def to_frequencies(x: Tensor) -> Tensor:
    """(B, ...) float32 -> its cosine transform along every axis but the first; lengths stay."""
    for axis in range(1, x.ndim):
        matrix = cosines(x.shape[axis], x.device)
        x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x


def from_frequencies(x: Tensor) -> Tensor:
    """The inverse of `to_frequencies`, which is its transpose."""
    for axis in range(1, x.ndim):
        matrix = cosines(x.shape[axis], x.device)
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x


@lru_cache(maxsize=64)
def octave_weights(shape: torch.Size, device: torch.device) -> Tensor:
    """Weights (C, ...) of the frequencies of such a clip, 1 / (1 + k) along every axis but the
    channels', of sum 1: every octave counts alike, the lowest frequency as much as one of them.
    """
    weights = torch.ones(shape, device=device)
    for axis, number in enumerate(shape[1:], start=1):
        falls = 1 / (1 + torch.arange(number, device=device))
        weights *= falls.view(-1, *[1] * (len(shape) - 1 - axis))
    return weights / weights.sum()
