"""Samplers: pure functions of (denoiser, starting noise, log-SNR steps, noise source).

A denoiser maps (z, log_snr) to x0. The steps run from the noisy end to the clean end. The last
step returns x0 itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video.diffusion.guidance import Denoiser
from dalle2_video.diffusion.parameterization import eps_from_x0
from dalle2_video.diffusion.schedule import alpha_sigma

Noise = Callable[[int], Tensor]  # step number -> standard normal of the sample's shape
Progress = Callable[[int], None]


def ddim(denoise: Denoiser, z: Tensor, steps: Tensor, progress: Progress | None = None) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta 0); z (B, ...) at steps[0] -> x0."""
    x0 = z
    for i in range(len(steps) - 1):
        now = steps[i].expand(z.shape[0])
        x0 = denoise(z, now)
        alpha, sigma = alpha_sigma(steps[i + 1])
        z = alpha * x0 + sigma * eps_from_x0(x0, z, now)
        if progress is not None:
            progress(i)
    return x0


def ancestral(
    denoise: Denoiser,
    z: Tensor,
    steps: Tensor,
    noise: Noise,
    gamma: float = 0.1,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampler of Ho et al. 2022 (2204.03458), eq. 4; z (B, ...) at steps[0] -> x0.

    gamma interpolates the log of the variance between its lower (0) and upper (1) bound.
    """
    x0 = z
    for i in range(len(steps) - 1):
        now, after = steps[i], steps[i + 1]
        x0 = denoise(z, now.expand(z.shape[0]))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(now), alpha_sigma(after)
        keep = torch.exp(now - after)  # e^d < 1: the SNR grows
        gone = -torch.expm1(now - after)  # 1 - e^d
        mean = keep * (alpha_s / alpha_t) * z + gone * alpha_s * x0
        lower, upper = gone * sigma_s.square(), gone * sigma_t.square()
        deviation = (lower.log() * (1 - gamma) + upper.log() * gamma).mul(0.5).exp()
        z = mean + deviation * noise(i)
        if progress is not None:
            progress(i)
    return x0
