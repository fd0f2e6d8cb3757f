"""Wrappers that turn a network into a denoiser, and a denoiser into a guided one.

A denoiser is a function (z (B, ...), log_snr (B,)) -> x0 (B, ...). Networks know nothing of it.
Guidance (Ho & Salimans 2021) in the scale s: eps~ = eps + s (eps(c) - eps); s = 1 is the plain
conditional model, s = 0 the unconditional one. Since x0 is affine in eps at a fixed z, guiding x0
is the same as guiding eps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video.diffusion.config import Prediction
from dalle2_video.diffusion.parameterization import expand, to_x0
from dalle2_video.diffusion.schedule import alpha_sigma

Denoiser = Callable[[Tensor, Tensor], Tensor]
Scale = Callable[[Tensor], Tensor]  # log_snr (B,) -> guidance scale (B,)


def denoiser(network: Callable[[Tensor, Tensor], Tensor], prediction: Prediction) -> Denoiser:
    """x0 from a network whose conditions are already bound: network(z, log_snr) -> prediction."""

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        return to_x0(prediction, network(z, log_snr).float(), z, log_snr)

    return denoise


def guided(batched: Denoiser, scale: float | Scale, rescale: float = 0.0) -> Denoiser:
    """Classifier-free guidance in one call of twice the batch.

    `batched` must treat the first half of its batch as conditional and the second as unconditional;
    where the scale is 1 for all it gets the conditional batch alone. rescale: phi of Lin et al.
    2023 (2305.08891, eq. 15 and 16), here on x0: how far its deviation per sample is brought back
    to the conditional one's; 0.7 is their advice for large scales.
    """

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        s = scale(log_snr) if callable(scale) else torch.full_like(log_snr, scale)
        if bool((s == 1).all()):
            return batched(z, log_snr)
        conditional, unconditional = batched(
            torch.cat([z, z]), torch.cat([log_snr, log_snr])
        ).chunk(2)
        mixed = unconditional + expand(s, z) * (conditional - unconditional)
        if rescale:
            ratio = conditional.flatten(1).std(1) / mixed.flatten(1).std(1)
            mixed = mixed * expand(rescale * ratio + (1 - rescale), z)
        return mixed

    return denoise


def interval_scale(scale: float, low: float, high: float) -> Scale:
    """`scale` between two log-SNRs and 1 outside (Kynkaanniemi et al. 2024, 2404.07724)."""

    def at(log_snr: Tensor) -> Tensor:
        return torch.where((log_snr >= low) & (log_snr <= high), scale, 1.0)

    return at


def oscillating_scale(scale: float, steps: Tensor, constant: float = 0.5) -> Scale:
    """`scale` for the first `constant` share of a sampler's steps, then 1 and `scale` in turn
    (Imagen Video, Ho et al. Oct 2022, section 2.6).
    """
    first = round(constant * (len(steps) - 1))

    def at(log_snr: Tensor) -> Tensor:
        number = torch.searchsorted(steps, log_snr.contiguous())
        return torch.where((number >= first) & ((number - first) % 2 == 0), 1.0, scale)

    return at


def reconstruction_guided(
    denoise: Denoiser, observe: Callable[[Tensor], Tensor], known: Tensor, weight: float
) -> Denoiser:
    """Reconstruction guidance (Ho et al. 2022, 2204.03458, eq. 7): x0 drawn towards what is known.

    observe: x0 (B, ...) -> what is known of it, (B, ...) like `known`: some of its frames, or its
    low-resolution view. x0 - (weight alpha / 2) grad_z |known - observe(x0(z))|^2. Differentiates
    through the network: about three times the cost, and its memory. weight: 9 to 50 in the paper.
    """

    def guided_by_known(z: Tensor, log_snr: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0 = denoise(z, log_snr)
            error = (known - observe(x0)).square().sum()
            (gradient,) = torch.autograd.grad(error, z)
        alpha, _ = alpha_sigma(log_snr)
        return x0.detach() - expand(weight / 2 * alpha, z) * gradient

    return guided_by_known


def static_threshold(denoise: Denoiser) -> Denoiser:
    """Clip x0 to [-1, 1]."""
    return lambda z, log_snr: denoise(z, log_snr).clamp(-1, 1)


def dynamic_threshold(denoise: Denoiser, quantile: float = 0.995) -> Denoiser:
    """Dynamic thresholding (Imagen, Saharia et al. 2022, section 2.3), quantile of |x0| per
    sample.
    """

    def thresholded(z: Tensor, log_snr: Tensor) -> Tensor:
        x0 = denoise(z, log_snr)
        limit = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1)
        limit = expand(limit, x0)
        return x0.clamp(-limit, limit) / limit

    return thresholded
