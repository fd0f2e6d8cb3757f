"""Long clips in tiles over time: stretches that a network sees one at a time and that overlap.

The estimates of overlapping tiles are blended linearly at each sampler step (as MultiDiffusion,
Bar-Tal et al. 2023, does for pictures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dalle2_video.config import ConfigError


def tile_starts(frames: int, tile: int, overlap: int, step: int = 1) -> list[int]:
    """First frame of each tile of a clip of `frames` frames.

    Neighbours share at least `overlap` frames, and the last tile ends with the clip. frames, tile
    and all starts are multiples of `step`. ValueError where `overlap` leaves no step to go on.
    """
    if tile >= frames:
        return [0]
    stride = (tile - overlap) // step * step
    if stride < 1:
        raise ConfigError(
            f"tiles of {tile} frames that share {overlap} never go on by {step}: take a larger "
            "tile or a smaller overlap"
        )
    return [*range(0, frames - tile, stride), frames - tile]


def tile_weights(starts: Sequence[int], tile: int, frames: int) -> Tensor:
    """float32 (tiles, tile): each tile's share in its frames, summing to 1 at every frame.

    It rises linearly over what a tile shares with the one before and falls over what it shares
    with the next.
    """
    weights = torch.ones(len(starts), tile)
    for i, (a, b) in enumerate(pairwise(starts)):
        shared = a + tile - b
        if shared > 0:
            ramp = torch.arange(1, shared + 1) / (shared + 1)
            weights[i, tile - shared :] *= 1 - ramp
            weights[i + 1, :shared] *= ramp
    total = torch.zeros(frames)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    whole = [weight / total[s : s + tile] for s, weight in zip(starts, weights, strict=True)]
    return torch.stack(whole)


class Tiles:
    """The tiles of a clip of `frames` frames, as slices; one tile is the whole clip.

    tile, overlap: frames of a tile, and what neighbours share at least; all multiples of `step`.
    """

    def __init__(self, frames: int, tile: int, overlap: int, step: int = 1) -> None:
        self.frames, self.tile = frames, min(tile, frames)
        self.starts = tile_starts(frames, self.tile, overlap, step)
        self._weights = tile_weights(self.starts, self.tile, frames)

    def blend(self, estimate: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        """The estimates of all tiles (B, C, tile, H, W) as one clip like `like` (B, C, F, H, W)."""
        if len(self.starts) == 1:
            return estimate(slice(None))
        blended = torch.zeros_like(like)
        for first, weight in zip(self.starts, self._weights.to(like.device), strict=True):
            part = slice(first, first + self.tile)
            blended[:, :, part].addcmul_(estimate(part), weight[:, None, None])
        return blended

    def apart(self) -> list[slice]:
        """The clip in stretches of a tile's length that do not overlap."""
        return [
            slice(first, min(first + self.tile, self.frames))
            for first in range(0, self.frames, self.tile)
        ]
