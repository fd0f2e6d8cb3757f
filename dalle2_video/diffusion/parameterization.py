"""What a network predicts (eps, x0 or v) and how each turns into the others.

z = alpha x0 + sigma eps and v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D).
All functions take and return float32 of one shape (B, ...); log_snr is (B,).
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dalle2_video.diffusion.config import Prediction
from dalle2_video.diffusion.schedule import alpha_sigma

PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank of `like`."""
    return value.reshape(-1, *([1] * (like.ndim - 1)))


def target(kind: Prediction, x0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """The quantity that a network of this kind is trained to predict."""
    alpha, sigma = (expand(a, x0) for a in alpha_sigma(log_snr))
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
    raise ValueError(f"unknown prediction '{kind}', known: {', '.join(PREDICTIONS)}")


def to_x0(kind: Prediction, prediction: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """x0 from a prediction at z. From eps it is ill-conditioned where alpha is near 0."""
    alpha, sigma = (expand(a, z) for a in alpha_sigma(log_snr))
    match kind:
        case "eps":
            return (z - sigma * prediction) / alpha
        case "x0":
            return prediction
        case "v":
            return alpha * z - sigma * prediction
    raise ValueError(f"unknown prediction '{kind}', known: {', '.join(PREDICTIONS)}")


def eps_from_x0(x0: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """The noise that goes with an x0 at z; needs sigma > 0."""
    alpha, sigma = (expand(a, z) for a in alpha_sigma(log_snr))
    return (z - alpha * x0) / sigma


def error_scale(kind: Prediction, log_snr: Tensor) -> Tensor:
    """How many times the squared error of x0 a squared error of `kind` is, (B,).

    eps: SNR.  v: SNR + 1 = 1 / sigma^2.  x0: 1.
    """
    snr = torch.exp(log_snr.float())
    match kind:
        case "eps":
            return snr
        case "x0":
            return torch.ones_like(snr)
        case "v":
            return snr + 1
    raise ValueError(f"unknown prediction '{kind}', known: {', '.join(PREDICTIONS)}")
