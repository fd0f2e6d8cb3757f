"""What a super-resolution network is given: a clip of fewer frames or pixels, made to fit.

Ho et al. Oct 2022 (2210.02303), sections 2.4 and 2.5; noise-conditioning augmentation as in Ho et
al. 2021 (2106.15282): noise of a random level in training, of a fixed one in sampling, the level
given as a condition. Deviation: a frame between two known ones gets both, the one before it and the
one behind it (theirs: repeated or blank frames).

Of r times the frames and s times the pixels: frame i of the larger clip is frame i / r of the
smaller one where r divides i (a known frame). B clips, C channels, f h w of the smaller clip, F H W
of the larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.diffusion.parameterization import expand
from dalle2_video.diffusion.schedule import alpha_sigma

Times = tuple[int, int]  # r, s


def augment(low: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """The smaller clip with noise, all (B, C, f, h, w); log_snr (B,)."""
    alpha, sigma = (expand(a, low) for a in alpha_sigma(log_snr))
    return alpha * low + sigma * noise


def fit(low: Tensor, times: Times, first: int = 0, frames: int | None = None) -> Tensor:
    """The smaller clip (B, C, f, h, w) -> (B, C or 2 C, F, H, W), bilinear in space.

    In time, where r > 1: the known frame before each (itself, if known) and, as C channels more,
    the one behind it; after the last known frame, that one again. first, frames: only these of F.
    """
    (r, s), length = times, low.shape[2]
    frames = length * r if frames is None else frames
    begin = first // r
    end = min(-(-(first + frames - 1) // r), length - 1) + 1
    part = low[:, :, begin:end]
    if s > 1:
        size = [side * s for side in low.shape[3:]]
        flat = F.interpolate(part.transpose(1, 2).flatten(0, 1), size, mode="bilinear")
        part = flat.unflatten(0, (len(low), -1)).transpose(1, 2)
    if r == 1:
        return part
    index = torch.arange(first, first + frames, device=low.device)
    before, behind = index // r, (-(-index // r)).clamp(max=length - 1)
    return torch.cat([part[:, :, before - begin], part[:, :, behind - begin]], dim=1)


def blend(fitted: Tensor, log_snr: Tensor, times: Times) -> Tensor:
    """What `fit` made, from a known frame on, blended linearly in time: (B, C, F, H, W).

    Multiplied by alpha of its noise, log_snr (B,): the best linear guess of a pixel of variance 1
    from its noisy value.
    """
    alpha, _ = alpha_sigma(log_snr)
    if times[0] > 1:
        before, behind = fitted.chunk(2, dim=1)
        share = (torch.arange(before.shape[2], device=before.device) % times[0]) / times[0]
        fitted = torch.lerp(before, behind, share[:, None, None])
    return expand(alpha, fitted) * fitted


def known_frames(frames: int, times: Times, device: torch.device | str = "cpu") -> Tensor:
    """bool (F,): which frames the larger clip takes over from the smaller as they are."""
    index = torch.arange(frames, device=device)
    return (index % times[0] == 0) & (times[0] > 1) & (times[1] == 1)


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


def window_starts(frames: int, window: int, overlap: int, step: int = 1) -> list[int]:
    """Where windows of a clip begin: neighbours share at least `overlap` frames, the last one ends
    with the clip. frames, window and all starts are multiples of `step`.

    ValueError where `overlap` leaves no step to go on.
    """
    if window >= frames:
        return [0]
    stride = (window - overlap) // step * step
    if stride < 1:
        raise ValueError(
            f"windows of {window} frames that share {overlap} never go on by {step}: take a larger "
            "window or a smaller overlap"
        )
    return [*range(0, frames - window, stride), frames - window]


def window_weights(starts: Sequence[int], window: int, frames: int) -> Tensor:
    """float32 (windows, window): each window's share in its frames, summing to 1 at every frame.

    It rises linearly over what a window shares with the one before and falls over what it shares
    with the next.
    """
    weights = torch.ones(len(starts), window)
    for i, (a, b) in enumerate(pairwise(starts)):
        shared = a + window - b
        if shared > 0:
            ramp = torch.arange(1, shared + 1) / (shared + 1)
            weights[i, window - shared :] *= 1 - ramp
            weights[i + 1, :shared] *= ramp
    total = torch.zeros(frames)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    whole = [weight / total[s : s + window] for s, weight in zip(starts, weights, strict=True)]
    return torch.stack(whole)
