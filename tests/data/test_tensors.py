"""The one change of axes and range, and the views of a stored clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dalle2_video.data.media.frame import crop_resize
from dalle2_video.data.media.tensors import to_float, to_uint8


def test_axes_and_range() -> None:
    """A known mistake of such code: one axis order and one range, converted in one place."""
    frames = torch.zeros(2, 5, 4, 6, 3, dtype=torch.uint8)
    frames[1, 3, 2, 4] = torch.tensor([255, 0, 51])
    video = to_float(frames)
    assert video.shape == (2, 3, 5, 4, 6) and video.dtype == torch.float32
    assert video[1, :, 3, 2, 4].tolist() == pytest.approx([1.0, -1.0, -0.6])
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 3, 1, 1, 1)).flatten().tolist() == [
        0,
        128,
        255,
    ]


def test_a_view_has_every_other_frame_and_the_mean_of_squares_of_pixels() -> None:
    """The low-rate and low-resolution inputs of a cascade: the same resize as in preprocess."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 12, 3), dtype=np.uint8)
    view = to_float(torch.from_numpy(frames), num_frames=4, size=3)
    assert view.shape == (2, 3, 4, 3, 3)
    for b in range(2):
        for k, frame in enumerate(frames[b, ::2]):
            small = (view[b, :, k].permute(1, 2, 0).numpy() + 1) * 127.5
            assert np.abs(small - crop_resize(frame, 3)).max() <= 0.5 + 1e-3
    assert torch.equal(
        to_float(torch.from_numpy(frames), 8, 12), to_float(torch.from_numpy(frames))
    )
    for num_frames, size in [(3, 12), (8, 5), (16, 12), (8, 24)]:
        with pytest.raises(ValueError, match="8 frames of 12 px have no view of"):
            to_float(torch.from_numpy(frames), num_frames, size)
