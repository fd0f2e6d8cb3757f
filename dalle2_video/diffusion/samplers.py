"""Samplers: pure functions of (denoiser, starting noise, log-SNR steps, noise source).

A denoiser maps (z, log_snr) to x0. The steps run from the noisy end to the clean end. The last
step returns x0 itself. A copy of z is worked on in place, so a denoiser must not keep what it is
given; three clips are held at a time (with a corrector, five; more with a learned variance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video.diffusion.frequencies import from_frequencies, to_frequencies
from dalle2_video.diffusion.guidance import Denoiser
from dalle2_video.diffusion.parameterization import eps_from_x0
from dalle2_video.diffusion.schedule import alpha_sigma

Noise = Callable[[int], Tensor]  # step number -> standard normal of the sample's shape
Progress = Callable[[int], None]
Fraction = Callable[[], Tensor]  # of the last x0: learned, of each frequency of z


def ddim(
    denoise: Denoiser,
    z: Tensor,
    steps: Tensor,
    noise: Noise | None = None,
    eta: float = 0.0,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); z (B, ...) at steps[0] -> x0.

    eta 0 is deterministic, eta 1 is the ancestral sampler with gamma 0; between them the deviation
    of the fresh noise is eta times the lower bound. eta > 0 needs `noise`.
    """
    z = z.clone()
    x0 = z
    for i in range(len(steps) - 1):
        now, after = steps[i], steps[i + 1]
        x0 = denoise(z, now.expand(z.shape[0]))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(now), alpha_sigma(after)
        fresh = eta * (_gone(now, after) * sigma_s.square()).sqrt()
        # eps = (z - alpha_t x0) / sigma_t
        ratio = (sigma_s.square() - fresh.square()).sqrt() / sigma_t
        z.mul_(ratio).addcmul_(x0, alpha_s - ratio * alpha_t)
        if noise is not None and eta > 0:
            z.addcmul_(noise(i), fresh)
        if progress is not None:
            progress(i)
    return x0


def dpm_solver(
    denoise: Denoiser, z: Tensor, steps: Tensor, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2); z (B, ...) at steps[0] -> x0.

    Second order: the x0 of the step before gives the slope of x0. The first step is first order,
    and so is the last, which ends at sigma = 0, where the answer is x0 itself.
    """
    half = steps / 2  # the paper's lambda = log(alpha / sigma)
    z = z.clone()
    x0, previous = z, None
    for i in range(len(steps) - 1):
        x0 = denoise(z, steps[i].expand(z.shape[0]))
        h = half[i + 1] - half[i]
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(steps[i]), alpha_sigma(steps[i + 1])
        share, bend = -alpha_s * torch.expm1(-h), torch.zeros_like(h)
        z.mul_(sigma_s / sigma_t)
        if previous is not None:
            bend = h / (2 * (half[i] - half[i - 1]))  # 1 / (2 r)
            z.addcmul_(previous, -share * bend)
        z.addcmul_(x0, share * (1 + bend))
        previous = x0
        if progress is not None:
            progress(i)
    return x0


def ancestral(
    denoise: Denoiser,
    z: Tensor,
    steps: Tensor,
    noise: Noise,
    gamma: float | Fraction = 0.1,
    corrector: float = 0.0,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampler of Ho et al. 2022 (2204.03458), eq. 4; z (B, ...) at steps[0] -> x0.

    gamma interpolates the log of the variance between its lower (0) and upper (1) bound. As a
    function, it is the learned fraction of each frequency (variance.py), which interpolates the
    variance itself.
    corrector: step size of the Langevin step after each predictor step (their appendix; 0.1 there),
    which costs a second evaluation; it draws noise(num_steps + i).
    """
    z = z.clone()
    x0, last = z, len(steps) - 2
    for i in range(len(steps) - 1):
        now, after = steps[i], steps[i + 1]
        x0 = denoise(z, now.expand(z.shape[0]))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(now), alpha_sigma(after)
        gone = _gone(now, after)
        z.mul_(torch.exp(now - after) * (alpha_s / alpha_t)).addcmul_(x0, gone * alpha_s)
        lower, upper = gone * sigma_s.square(), gone * sigma_t.square()
        if callable(gamma):
            fraction, fresh = gamma(), to_frequencies(noise(i))
            z.add_(from_frequencies(fresh * (lower + fraction * (upper - lower)).sqrt()))
        else:
            variance = (lower.log() * (1 - gamma) + upper.log() * gamma).exp()
            z.addcmul_(noise(i), variance.sqrt())
        if corrector > 0 and i < last:
            eps = eps_from_x0(denoise(z, after.expand(z.shape[0])), z, after.expand(z.shape[0]))
            fresh = noise(len(steps) - 1 + i)
            z.addcmul_(eps, -0.5 * corrector * sigma_s).addcmul_(fresh, corrector**0.5 * sigma_s)
        if progress is not None:
            progress(i)
    return x0


def _gone(now: Tensor, after: Tensor) -> Tensor:
    """1 - e^d with d = log-SNR of now less that of after: the share of z's noise that is new."""
    return -torch.expm1(now - after)
