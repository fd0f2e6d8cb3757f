"""Clips and images in one tensor: which frame lies where."""

import torch

from dalle2_video.models.conditioning import LowRes
from dalle2_video.stages.joint import join_frames, join_lowres, split_frames

CLIPS, STILLS = torch.randn(2, 3, 4, 5, 5), torch.randn(6, 3, 1, 5, 5)  # 3 images beside each clip


def test_image_j_of_clip_b_is_number_b_j_and_stands_behind_its_clip() -> None:
    joined = join_frames([CLIPS, STILLS], 3)
    assert torch.equal(joined[:, :, :4], CLIPS)
    for b in range(2):
        for j in range(3):
            assert torch.equal(joined[b, :, 4 + j], STILLS[3 * b + j, :, 0])


def test_split_frames_is_the_inverse() -> None:
    for parts, num_images in (([CLIPS, STILLS], 3), ([CLIPS], 0), ([STILLS], 3)):
        back = split_frames(join_frames(parts, num_images), num_images)
        assert len(back) == len(parts)
        assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


def test_smaller_clips_are_joined_with_the_levels_of_all_and_the_places_of_clips() -> None:
    clips = LowRes(CLIPS, torch.tensor([1.0, 2.0]), torch.arange(8.0).view(2, 4))
    stills = LowRes(STILLS, torch.arange(6.0), torch.zeros(6, 1))
    both, alone = join_lowres([clips, stills], 3), join_lowres([stills], 3)
    without = join_lowres([clips], 0)
    assert both is not None and alone is not None and without is not None
    assert torch.equal(both.frames, join_frames([CLIPS, STILLS], 3))
    assert both.log_snr.tolist() == [1, 2, 0, 1, 2, 3, 4, 5]
    assert torch.equal(both.place, clips.place) and torch.equal(without.place, clips.place)
    assert alone.frames.shape == (2, 3, 3, 5, 5) and alone.place.shape == (2, 0)
    assert join_lowres([], 3) is None
