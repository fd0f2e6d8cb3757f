"""Exponential moving average of the trainable weights, on this rank's parts alone.

Half-life in clips with a ramp-up, as `ema_rampup_ratio` in NVlabs/edm training_loop.py (Karras et
al. 2022): early weights are forgotten quickly, so short runs are served too. Float32 whatever the
precision of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dalle2_video.training.sharded import ShardedParams


def ema_decay(clips: int, batch: int, halflife: float, rampup: float) -> float:
    """Share of the old average that stays after a step of `batch` clips.

    0.5 ** (batch / min(halflife, rampup * clips)), `clips` seen before the step; 0 at the start.
    """
    effective = min(halflife, rampup * clips)
    return 0.5 ** (batch / effective) if effective > 0 else 0.0


class Ema:
    """Average of every trainable parameter; starts as a copy of the weights."""

    def __init__(self, sharded: ShardedParams, halflife_clips: float, rampup: float):
        self.sharded = sharded
        self.halflife_clips = halflife_clips
        self.rampup = rampup
        self.average = {n: sharded.local(n).float().clone() for n in sharded.trainable}

    @torch.no_grad()
    def update(self, clips: int, batch: int, applied: Tensor | float = 1.0) -> None:
        """Move towards the weights after a step of `batch` clips that began at `clips` clips.

        applied: 1.0, or 0.0 where the step was skipped: then the average stays.
        """
        decay = ema_decay(clips, batch, self.halflife_clips, self.rampup)
        weight = torch.as_tensor((1.0 - decay) * applied)
        for name in self.sharded.trainable:
            part = self.sharded.local(name).float()
            self.average[name].lerp_(part, weight.to(part.device))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the average inside, with its own weights again after. Collective.

        Its own weights come back bit for bit.
        """
        own = {n: self.sharded.local(n).clone() for n in self.sharded.trainable}
        self.sharded.write(self.average)
        try:
            yield
        finally:
            self.sharded.write(own)

    def full_state(self) -> dict[str, Tensor]:
        """Full float32 CPU tensors by parameter name. Collective."""
        return {n: self.sharded.gather(n, t).cpu() for n, t in self.average.items()}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's parts from full tensors; the names must be the trainable ones."""
        if set(state) != set(self.average):
            differing = sorted(set(state) ^ set(self.average))[:4]
            raise ValueError(f"the EMA of the checkpoint differs in {', '.join(differing)}")
        self.average = {n: self.sharded.scatter(n, state[n]) for n in self.average}
