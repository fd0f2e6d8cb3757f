"""Tiles over time: where they begin, and what each counts in its frames."""

import pytest
import torch

from dalle2_video.diffusion.tiles import Tiles, tile_starts, tile_weights


def test_tiles_cover_a_clip_and_their_shares_sum_to_one() -> None:
    assert tile_starts(8, 8, 4) == [0] == tile_starts(6, 8, 4)
    assert tile_starts(20, 8, 4) == [0, 4, 8, 12]
    assert tile_starts(22, 8, 3, 2) == [0, 4, 8, 12, 14]
    for frames, tile, overlap in ((20, 8, 4), (21, 8, 1), (9, 8, 3), (16, 8, 0)):
        starts = tile_starts(frames, tile, overlap)
        weights = tile_weights(starts, tile, frames)
        total = torch.zeros(frames)
        for start, weight in zip(starts, weights, strict=True):
            assert weight.min() > 0
            total[start : start + tile] += weight
        torch.testing.assert_close(total, torch.ones(frames))
    with pytest.raises(ValueError, match="never go on by 4"):
        tile_starts(16, 8, 5, 4)


def test_what_neighbours_share_goes_over_linearly_from_one_to_the_next() -> None:
    first, second, last = tile_weights([0, 4, 10], 8, 18)
    torch.testing.assert_close(first[4:], torch.tensor([0.8, 0.6, 0.4, 0.2]))
    torch.testing.assert_close(second[:4], torch.tensor([0.2, 0.4, 0.6, 0.8]))
    torch.testing.assert_close(second[6:], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(last[:2], torch.tensor([1 / 3, 2 / 3]))
    assert first[:4].eq(1).all() and second[4:6].eq(1).all() and last[2:].eq(1).all()


def test_estimates_that_agree_blend_to_themselves_and_stretches_cover_the_clip() -> None:
    clip = torch.randn(2, 3, 22, 4, 4)
    tiles = Tiles(22, 8, 3, 2)
    torch.testing.assert_close(tiles.blend(lambda part: clip[:, :, part], clip), clip)
    assert [(part.start, part.stop) for part in tiles.apart()] == [(0, 8), (8, 16), (16, 22)]
    whole = Tiles(6, 8, 4)
    assert whole.blend(lambda part: clip[:, :, part], clip) is not None
    assert [(part.start, part.stop) for part in whole.apart()] == [(0, 6)]
