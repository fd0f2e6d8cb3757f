"""Joint training on clips and images (Ho et al. 2022, section 3): the frames of both in one tensor.

B clips, J images beside each, C channels, F frames, H W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_video.models.conditioning import LowRes


def join_frames(parts: list[Tensor], num_images: int) -> Tensor:
    """Clips (B, C, F, H, W) and then B x J images (B J, C, 1, H, W), or one of the two, as
    (B, C, F + J, H, W).
    """
    if not num_images:
        return parts[0]
    stills = parts[-1].squeeze(2).unflatten(0, (-1, num_images)).transpose(1, 2)
    return torch.cat([*parts[:-1], stills], dim=2)


def split_frames(joined: Tensor, num_images: int) -> list[Tensor]:
    """The inverse of `join_frames`."""
    frames = joined.shape[2] - num_images
    clips = [joined[:, :, :frames]] if frames else []
    if not num_images:
        return clips
    return [*clips, joined[:, :, frames:].transpose(1, 2).flatten(0, 1).unsqueeze(2)]


def join_lowres(parts: list[LowRes], num_images: int) -> LowRes | None:
    """`join_frames` for the smaller clips; None where there are none."""
    if not parts:
        return None
    frames = join_frames([part.frames for part in parts], num_images)
    place = parts[0].place if len(parts) > bool(num_images) else frames.new_empty(len(frames), 0)
    return LowRes(frames, torch.cat([part.log_snr for part in parts]), place)
