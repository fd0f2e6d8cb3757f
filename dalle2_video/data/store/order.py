"""The order in which training goes through the clips of a split."""

from __future__ import annotations

import numpy as np
import torch

from dalle2_video import keyed

SHARDS_AT_ONCE = 16  # of 1,000 clips of 16 x 64 x 64 px each: 3 GB


class ClipOrder:
    """sample_id -> 0 .. num_clips - 1: every clip once per epoch, in a new order each epoch.

    shards: the shard of each clip, int (num_clips,). Each epoch draws the shards into groups of
    SHARDS_AT_ONCE and takes the groups one after the other, the clips of a group in random order:
    so reads stay among a few files, which fit into the page cache, while a batch still mixes
    thousands of clips of all of them. With fewer shards, or None, the order is a plain permutation.
    """

    def __init__(self, num_clips: int, seed: int, shards: np.ndarray | None = None) -> None:
        if num_clips < 1:
            raise ValueError("an order needs at least one clip")
        self.num_clips, self.seed = num_clips, seed
        self.shards = np.zeros(num_clips, np.int64) if shards is None else shards
        self.num_shards = int(self.shards.max()) + 1
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, sample_id: int) -> int:
        epoch, place = divmod(sample_id, self.num_clips)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.permutation(epoch)
        return int(self._permutation[place])

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 (num_clips,): the order of one epoch."""
        draw = keyed.generator(self.seed, epoch, "order")
        order = torch.randperm(self.num_clips, generator=draw).numpy()
        if self.num_shards <= SHARDS_AT_ONCE:
            return order
        place = torch.randperm(self.num_shards, generator=draw).numpy() // SHARDS_AT_ONCE
        return order[np.argsort(place[self.shards[order]], kind="stable")]
