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

from dalle2_video.diffusion.parameterization import Prediction, expand, to_x0

Denoiser = Callable[[Tensor, Tensor], Tensor]


def denoiser(network: Callable[[Tensor, Tensor], Tensor], prediction: Prediction) -> Denoiser:
    """x0 from a network whose conditions are already bound: network(z, log_snr) -> prediction."""

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        return to_x0(prediction, network(z, log_snr).float(), z, log_snr)

    return denoise


def guided(batched: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance in one call of twice the batch.

    `batched` must treat the first half of its batch as conditional and the second as unconditional.
    """

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        conditional, unconditional = batched(
            torch.cat([z, z]), torch.cat([log_snr, log_snr])
        ).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


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
