"""What a super-resolution network is trained on: random parts of a clip, and its smaller clip.

B clips, F frames; a "size" is (frames, pixels of a side). Stored frames are uint8 (B, F, H, W, 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float
from dalle2_video.diffusion.lowres import augment, cut, fit
from dalle2_video.models.unet3d import Low, UnetConfig
from dalle2_video.training.stage import StepInfo

Size = tuple[int, int]
Corner = tuple[int, int, int]  # frame, row, column


def draw_corners(
    whole: Size, part: Size, times: Size, seed: int, sample_ids: Tensor, stream: str
) -> list[Corner]:
    """Where each clip's part begins, evenly, on frames and pixels where the smaller clip has them.

    times: how many times the smaller clip's frames and pixels, as `UnetConfig.times`.
    """
    frames, pixels = ((a - b) // step for a, b, step in zip(whole, part, times, strict=True))
    corners = []
    for sample_id in sample_ids.tolist():
        draws = [
            keyed.key(seed, sample_id, f"{stream}/{axis}") for axis in ("frame", "row", "column")
        ]
        t, y, x = (draw % (n + 1) for draw, n in zip(draws, (frames, pixels, pixels), strict=True))
        corners.append((t * times[0], y * times[1], x * times[1]))
    return corners


def part_of(frames: Tensor, whole: Size, corners: list[Corner], part: Size) -> Tensor:
    """Stored frames, in a view of size `whole`, cut at the corners: float32 (B, 3, F, H, W)."""
    if whole == part:
        return to_float(frames, *whole)
    # stored frames and pixels per one of the view
    t, s = frames.shape[1] // whole[0], frames.shape[2] // whole[1]
    stored = [(frame * t, row * s, column * s) for frame, row, column in corners]
    shape = part[0] * t, part[1] * s, part[1] * s
    pieces = cut(frames.movedim(-1, 1), stored, shape)
    return to_float(pieces.movedim(1, -1), *part)


def noisy_low(
    frames: Tensor,
    model: UnetConfig,
    augmentation: tuple[float, float],
    corners: list[Corner],
    part: Size,
    step: StepInfo,
    sample_ids: Tensor,
    stream: str,
) -> Low:
    """The smaller clip of stored frames, with noise of a random level, as the network takes it.

    It is shrunk by the resize that makes the training data of the networks before it.
    """
    assert model.low_frames is not None
    length = frames.shape[1]
    small = to_float(frames, min(length, model.low_frames), model.low_size)
    least, most = augmentation
    share = keyed.rand((), step.seed, sample_ids, f"{stream}/augmentation")
    level = (least + (most - least) * share).to(step.device, non_blocking=True)
    noise = keyed.randn(small.shape[1:], step.seed, sample_ids, f"{stream}/low", step.device)
    fitted = cut(
        fit(augment(small, level, noise), model.times), corners, (part[0], part[1], part[1])
    )
    index = torch.arange(part[0], device=step.device)
    first = torch.tensor([corner[0] for corner in corners]).to(step.device, non_blocking=True)
    return Low(fitted, level, (first[:, None] + index).float())
