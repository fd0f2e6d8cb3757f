"""The one change of axes and range between stored frames and network tensors.

Stored frames are uint8 RGB (B, F, H, W, 3), 0..255. Networks see float (B, C, F, H, W) in [-1, 1].

Letters: B batch, C channels, F frames, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_view(stored_frames: int, side: int, num_frames: int, size: int) -> bool:
    """Whether `to_float` can make num_frames frames of size x size pixels of a stored clip.

    side: the stored clip's height and width in pixels.
    """
    return stored_frames % num_frames == 0 and side % size == 0


def to_float(frames: Tensor, num_frames: int | None = None, size: int | None = None) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1], on the tensor's own device.

    num_frames, size: a view of the stored clip, for a network of fewer frames or pixels. It has
    every (F / num_frames)-th frame from the first on, and of each square of H / size pixels the
    mean, which is the area average that preprocess shrinks by. ValueError where they do not divide.
    """
    stored_frames, side = frames.shape[1:3]
    num_frames, size = num_frames or stored_frames, size or side
    if not has_view(stored_frames, side, num_frames, size):
        raise ValueError(
            f"{stored_frames} frames of {side} px have no view of {num_frames} frames of {size} px"
        )
    video = frames[:, :: stored_frames // num_frames].permute(0, 4, 1, 2, 3).float()
    if size != side:
        video = F.avg_pool2d(video.flatten(0, 2).unsqueeze(1), side // size)
        video = video.reshape(len(frames), 3, num_frames, size, size)
    return video.div(127.5).sub(1.0).contiguous()


def to_uint8(video: Tensor) -> Tensor:
    """float (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3): clamped, rounded to nearest."""
    pixels = video.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
