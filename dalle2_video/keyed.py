"""Randomness keyed by what it is for, never by who draws it.

Every random number that a clip meets in training comes from a generator keyed by
(seed, global sample id, stream name). So it does not depend on rank, worker or micro-batch:
losses agree over any number of ranks, and a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(seed: int, sample_id: int | str, stream: str) -> int:
    """A 63-bit integer from (seed, sample_id or name, stream), stable over versions."""
    text = f"{seed}/{sample_id}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, sample_id: int | str, stream: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch.Generator on `device` for one clip and one purpose."""
    return torch.Generator(device).manual_seed(key(seed, sample_id, stream))


def randn(
    shape: tuple[int, ...],
    seed: int,
    sample_ids: Tensor,
    stream: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal float32 (B, *shape); row i depends on sample_ids[i] (B,) int64 alone."""
    rows = torch.empty((len(sample_ids), *shape), device=device)
    for row, sample_id in zip(rows, sample_ids.tolist(), strict=True):
        torch.randn(shape, generator=generator(seed, sample_id, stream, device), out=row)
    return rows


def rand(
    shape: tuple[int, ...],
    seed: int,
    sample_ids: Tensor,
    stream: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform float32 in [0, 1) (B, *shape); row i depends on sample_ids[i] (B,) int64 alone."""
    return torch.stack(
        [
            torch.rand(shape, generator=generator(seed, c, stream, device), device=device)
            for c in sample_ids.tolist()
        ]
    )
