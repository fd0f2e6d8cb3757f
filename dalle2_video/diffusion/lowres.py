"""The smaller clip of super-resolution (lowres): noise, fitting it to the larger one.

Ho et al. Oct 2022 (2210.02303), sections 2.4 and 2.5; noise-conditioning augmentation as in Ho et
al. 2021 (2106.15282): noise of a random level in training, of a fixed one in sampling, the level
given as a condition. Deviation: a frame between two known ones gets both, the one before it and the
one after it (theirs: repeated or blank frames).

With r times the frames and s times the pixels, frame i of the larger clip is frame i / r of the
smaller one where r divides i (a known frame). B clips, C channels, f h w of the smaller clip, F H W
of the larger one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.diffusion.parameterization import expand
from dalle2_video.diffusion.schedule import alpha_sigma

Upscale = tuple[int, int]  # r, s: factors in frames and in pixels


def augment(lowres: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """The smaller clip with noise, all (B, C, f, h, w); log_snr (B,)."""
    alpha, sigma = (expand(a, lowres) for a in alpha_sigma(log_snr))
    return alpha * lowres + sigma * noise


def fit(lowres: Tensor, upscale: Upscale, first: int = 0, frames: int | None = None) -> Tensor:
    """The smaller clip (B, C, f, h, w) -> (B, C or 2 C, F, H, W), bilinear in space.

    In time, where r > 1: the known frame before each (itself, if known) and, as C channels more,
    the one after it; after the last known frame, that one again. first, frames: only these of F.
    """
    (r, s), length = upscale, lowres.shape[2]
    frames = length * r if frames is None else frames
    begin = first // r
    end = min(-(-(first + frames - 1) // r), length - 1) + 1
    part = lowres[:, :, begin:end]
    if s > 1:
        size = [side * s for side in lowres.shape[3:]]
        flat = F.interpolate(part.transpose(1, 2).flatten(0, 1), size, mode="bilinear")
        part = flat.unflatten(0, (len(lowres), -1)).transpose(1, 2)
    if r == 1:
        return part
    index = torch.arange(first, first + frames, device=lowres.device)
    before, after = index // r, (-(-index // r)).clamp(max=length - 1)
    return torch.cat([part[:, :, before - begin], part[:, :, after - begin]], dim=1)


def blend(fitted: Tensor, log_snr: Tensor, upscale: Upscale) -> Tensor:
    """What `fit` made, from a known frame on, blended linearly in time: (B, C, F, H, W).

    Multiplied by alpha of its noise, log_snr (B,): the best linear guess of a pixel of variance 1
    from its noisy value.
    """
    alpha, _ = alpha_sigma(log_snr)
    if upscale[0] > 1:
        before, after = fitted.chunk(2, dim=1)
        share = (torch.arange(before.shape[2], device=before.device) % upscale[0]) / upscale[0]
        fitted = torch.lerp(before, after, share[:, None, None])
    return expand(alpha, fitted) * fitted


def known_frames(frames: int, upscale: Upscale, device: torch.device | str = "cpu") -> Tensor:
    """bool (F,): which frames the larger clip takes over from the smaller as they are."""
    index = torch.arange(frames, device=device)
    return (index % upscale[0] == 0) & (upscale[0] > 1) & (upscale[1] == 1)


def cut(
    video: Tensor, corners: Sequence[tuple[int, int, int]], shape: tuple[int, int, int]
) -> Tensor:
    """Of each clip of (B, C, F, H, W) the part of `shape` (frames, rows, columns) that begins at
    its corner (frame, row, column).
    """
    f, h, w = shape
    parts = [
        clip[:, t : t + f, y : y + h, x : x + w]
        for clip, (t, y, x) in zip(video, corners, strict=True)
    ]
    return torch.stack(parts)
