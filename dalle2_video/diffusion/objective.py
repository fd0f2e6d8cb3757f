"""The training loss of Gaussian diffusion in continuous time.

What the network predicts and whose squared error the loss weighs are two settings: a network that
predicts x0 may be trained under the v-loss, which is its squared error times 1 / sigma^2.
Source: Ho et al. 2022 (2204.03458) section 2; Salimans & Ho 2022 section 4 for the weights;
Hang et al. 2023 for min-SNR, as weights on the error of x0: min(SNR, 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.frequencies import octave_weights, to_frequencies
from dalle2_video.diffusion.parameterization import (
    error_scale,
    expand,
    target,
    to_x0,
)
from dalle2_video.diffusion.schedule import (
    alpha_sigma,
)
from dalle2_video.diffusion.variance import RAW_LIMIT, fraction_of, learned_term, reverse_step

MIN_SNR_GAMMA = 5.0
VARIANCE_WEIGHT = 0.001  # on the gradient: DeepSpeed, which clips all together, must not feel it
VARIANCE_LIMIT = 4.0  # of a clip's gradient; 1 is its size where all fractions are far too high


@dataclass(frozen=True)
class Noised:
    """A clip (or embedding) with noise: what goes into the network and what should come out."""

    z: Tensor  # (B, ...)
    log_snr: Tensor  # (B,)
    target: Tensor  # (B, ...)


def add_noise(config: DiffusionConfig, x0: Tensor, t: Tensor, eps: Tensor) -> Noised:
    """Noise x0 (B, ...) to times t (B,) in [0, 1] with eps (B, ...); all float32."""
    log_snr = config.schedule.log_snr(t)
    alpha, sigma = (expand(a, x0) for a in alpha_sigma(log_snr))
    return Noised(alpha * x0 + sigma * eps, log_snr, target(config.prediction, x0, eps, log_snr))


def loss_weight(config: DiffusionConfig, log_snr: Tensor) -> Tensor:
    """Factor (B,) on the squared error of the network's own prediction."""
    if config.loss == config.prediction and config.max_weight >= 1e4:
        return torch.ones_like(log_snr)
    if config.loss == "min_snr":
        on_x0 = torch.exp(log_snr).clamp(max=MIN_SNR_GAMMA)
    else:
        on_x0 = error_scale(config.loss, log_snr)
    return on_x0.clamp(max=config.max_weight) / error_scale(config.prediction, log_snr)


def variance_loss(
    config: DiffusionConfig, prediction: Tensor, raw: Tensor, noised: Noised, t: Tensor, x0: Tensor
) -> Tensor:
    """L_vlb of Nichol & Dhariwal 2021 (section 3.1) as it is added to the loss, (B,) in float32.

    Its value is one term of T, in bits per dimension, times T / 1000: their 0.001 is of the sum of
    all terms. It teaches the fraction alone: the prediction is detached, clipped as in sampling.

    Deviation: its gradient at `raw` is w (1 - f* / f) times VARIANCE_WEIGHT, f* the squared error
    over sigma^2. Without w that is the term's (but in the last step) over (k f / (1 + k f))^2 / 2,
    k the bounds' relative distance, which would let the last steps alone teach the fraction; w are
    the `octave_weights` of the frequencies, or the lowest would be far off. A clip's gradient is
    limited in the sum of its absolute values (docs/learned_variance.md).
    """
    estimate = to_x0(config.prediction, prediction.detach().float(), noised.z, noised.log_snr)
    estimate, raw = estimate.clamp(-1, 1), raw.float()
    step = reverse_step(config.schedule, t, config.variance_steps)
    fraction = fraction_of(raw.detach())
    bits = config.variance_steps / 1000 * learned_term(step, estimate, fraction, x0)
    if not torch.is_grad_enabled():
        return bits
    _, sigma = alpha_sigma(noised.log_snr)
    best = (to_frequencies(x0 - estimate) / expand(sigma, x0)).square()
    off = (1 - best / fraction) * octave_weights(raw.shape[1:], raw.device)
    off = off.masked_fill((raw.abs() >= RAW_LIMIT) & (raw * off < 0), 0.0)  # out of its range
    size = off.abs().flatten(1).sum(1)
    off = off * expand((VARIANCE_LIMIT / size).clamp(max=1), raw)
    inner = (off * raw).flatten(1).sum(1)
    return bits + VARIANCE_WEIGHT * (inner - inner.detach())


def per_sample_loss(
    config: DiffusionConfig, prediction: Tensor, noised: Noised, given: Tensor | None = None
) -> Tensor:
    """Weighted mean squared error (B,), computed in float32 whatever the network's precision.

    given: bool (F,), of clips (B, C, F, H, W), frames that sampling takes over from elsewhere: they
    do not count.
    """
    error = (prediction.float() - noised.target).square()
    if given is not None:
        counts = (~given).float()
        error = error * (counts / counts.mean())[:, None, None]
    return loss_weight(config, noised.log_snr) * error.flatten(1).mean(1)
