"""What a U-Net has learned of its own errors, by frequency: the variance of its reverse steps.

B clips, J images beside each, I = all of these that have a noise level of their own, F frames, H W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.layers import LogSNREmbedding, zero_init


def smooth_basis(number: int, length: int, whole: int, device: torch.device) -> Tensor:
    """Functions (number, length) of `length` frequencies, out of `whole`: cosines over the
    logarithm of the frequency.
    """
    frequency = torch.arange(length, device=device) * (whole / length)
    place = torch.log1p(frequency) / math.log(max(whole, 2))
    return torch.cos(math.pi * torch.arange(number, device=device)[:, None] * place)


class VarianceSpectrum(nn.Module):
    """log-SNR (I,) -> raw fractions (B, C, F + J, H, W) of a clip's frequencies, and of its images'
    (diffusion/variance.py).

    They are the same for all clips of a noise level, a smooth function of the frequencies for each
    channel's: 4 x 6 x 6 cosines, of which the finer count less. A table of all frequencies would
    explain the errors of a network hardly better (docs/learned_variance.md).
    """

    functions = (4, 6, 6)

    def __init__(self, clip_shape: tuple[int, int, int, int], dim: int) -> None:
        super().__init__()
        self.shape = clip_shape
        self.log_snr = LogSNREmbedding(dim)
        self.out = zero_init(nn.Linear(dim + 2, clip_shape[0] * math.prod(self.functions)))

    def forward(self, log_snr: Tensor, batch: int, frames: int, num_images: int) -> Tensor:
        with torch.autocast(log_snr.device.type, enabled=False):  # bf16 has 3 digits
            return self._fractions(log_snr.float(), batch, frames, num_images)

    def _fractions(self, log_snr: Tensor, batch: int, frames: int, num_images: int) -> Tensor:
        # -log sigma^2 and -log alpha^2: an error that does not fall with the noise is one of them
        ends = torch.stack([F.softplus(log_snr), F.softplus(-log_snr)], dim=-1)
        weights = self.out(torch.cat([F.silu(self.log_snr(log_snr)), ends], dim=-1))
        weights = weights.unflatten(-1, (self.shape[0], *self.functions))
        t, h, w = (torch.arange(number, device=weights.device) for number in self.functions)
        weights = weights / (1 + t[:, None, None] + h[:, None] + w)
        for axis in (1, 2):  # pixels
            length = self.shape[axis + 1]
            basis = smooth_basis(self.functions[axis], length, length, weights.device)
            weights = (weights.movedim(axis + 2, -1) @ basis).movedim(-1, axis + 2)
        clips, parts = len(weights) - batch * num_images, []
        number, whole = self.functions[0], self.shape[1]
        if clips:
            basis = smooth_basis(number, frames, whole, weights.device)
            parts.append(torch.einsum("bcthw,tf->bcfhw", weights[:clips], basis))
        if num_images:  # the mean fraction over the frequencies of frames
            basis = smooth_basis(number, whole, whole, weights.device)
            raw = torch.einsum("bcthw,tf->bcfhw", weights[clips:], basis)
            alone = torch.logsumexp(raw, dim=2) - math.log(whole)
            parts.append(alone.unflatten(0, (batch, num_images)).transpose(1, 2))
        return torch.cat(parts, dim=2)
