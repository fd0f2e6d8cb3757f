"""Randomness keyed by what it is for, never by who draws it.

Every random number that a clip meets in training comes from a generator keyed by
(seed, global clip counter, stream name). So it does not depend on rank, worker or micro-batch:
losses agree over any number of ranks, and a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(seed: int, counter: int | str, stream: str) -> int:
    """A 63-bit integer from (seed, counter or name, stream), stable over versions."""
    text = f"{seed}/{counter}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, counter: int | str, stream: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch.Generator on `device` for one clip and one purpose."""
    return torch.Generator(device).manual_seed(key(seed, counter, stream))


def randn(
    shape: tuple[int, ...],
    seed: int,
    counters: Tensor,
    stream: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal float32 (B, *shape); row i depends on counters[i] (B,) int64 alone."""
    rows = torch.empty((len(counters), *shape), device=device)
    for row, counter in zip(rows, counters.tolist(), strict=True):
        torch.randn(shape, generator=generator(seed, counter, stream, device), out=row)
    return rows


def rand(
    shape: tuple[int, ...],
    seed: int,
    counters: Tensor,
    stream: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform float32 in [0, 1) (B, *shape); row i depends on counters[i] (B,) int64 alone."""
    return torch.stack(
        [
            torch.rand(shape, generator=generator(seed, c, stream, device), device=device)
            for c in counters.tolist()
        ]
    )
