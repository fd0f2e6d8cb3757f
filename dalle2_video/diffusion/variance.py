"""A learned variance of the reverse steps, and the variational bound that trains and judges it.

Nichol & Dhariwal 2021 (2102.09672), section 3.1: the log-variance of a step lies between those of
its bounds, beta~ and beta, at a fraction that the network says for each value of the clip. It is
the `gamma` of the ancestral sampler, learned. In continuous time a process of T steps goes from t
to t - 1 / T; sampling in other steps has other bounds, between which the fraction stays.

The bound, in bits per dimension, is a sum of T terms and the prior's: of each step the KL
divergence between the posterior given the clip and what the network says, of the last one the
likelihood of the clip's 8-bit values. Clips (B, ...) are float32 in [-1, 1], times t (B,) in
[0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.diffusion.parameterization import expand
from dalle2_video.diffusion.schedule import Schedule, alpha_sigma

BIN = 2 / 255  # between neighbouring 8-bit values
BITS = 1 / math.log(2)


class ReverseStep(NamedTuple):
    """The steps from t to t - 1 / T, all (B,).

    now, after: log-SNRs; log_lower, log_upper: of beta~ and beta; last: bool, the step to the clip
    itself, whose beta~ is 0, so that of the step before it stands in its place.
    """

    now: Tensor
    after: Tensor
    log_lower: Tensor
    log_upper: Tensor
    last: Tensor

    def log_variance(self, fraction: Tensor | float, like: Tensor) -> Tensor:
        """Between the bounds, (B, ...): 0 is the lower one, 1 the upper."""
        lower, upper = expand(self.log_lower, like), expand(self.log_upper, like)
        return lower + fraction * (upper - lower)


def reverse_step(schedule: Schedule, t: Tensor, steps: int) -> ReverseStep:
    """What a process of so many steps (two or more) does at times t (B,)."""
    width = 1 / steps
    last = t < width * (1 + 1e-3)
    now = schedule.log_snr(t)
    after = schedule.log_snr((t - width).clamp(min=0))
    before = schedule.log_snr((t + width).clamp(max=1))
    # sigma_t^2 = sigmoid(-log-SNR); 1 - e^(now - after) of it is new since `after`
    variance = F.logsigmoid(-now)
    share, share_before = _log_share(now, after), _log_share(before, now)
    lower = torch.where(last, share_before + variance, share + F.logsigmoid(-after))
    return ReverseStep(now, after, lower, torch.where(last, variance, share + variance), last)


def fraction_of(raw: Tensor) -> Tensor:
    """A network's raw output -> the fraction, in (0, 1); 0 is the geometric middle of the bounds.

    Deviation: Nichol & Dhariwal's (raw + 1) / 2 is unbounded (docs/learned_variance.md).
    """
    return torch.sigmoid(2 * raw)  # the slope of (raw + 1) / 2 at 0


def split_output(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """What a network says of clips of so many channels (B, C or 2 C, ...): its prediction (B, C,
    ...), and the raw fraction (B, C, ...) if it has learned one.
    """
    if out.shape[1] == channels:
        return out, None
    prediction, raw = out.split(channels, dim=1)
    return prediction, raw


def bound_term(step: ReverseStep, estimate: Tensor, fraction: Tensor | float, x0: Tensor) -> Tensor:
    """Bits per dimension of one step, (B,) float32.

    estimate: of the clip x0 from its noisy form at step.now. The posterior's mean and the model's
    hold the same share of that, so they differ by a share of x0 - estimate. The last step's values
    are those of 8 bits, what lies outside belonging to the outermost.
    """
    log_variance = step.log_variance(fraction, x0)
    alpha, _ = alpha_sigma(step.after)
    log_share = 2 * (_log_share(step.now, step.after) + alpha.log())
    error = (x0 - estimate).square()
    log_lower = expand(step.log_lower, x0)
    apart = error * torch.exp(expand(log_share, x0) - log_variance)
    ratio = log_lower - log_variance
    divergence = 0.5 * (torch.exp(ratio) - 1 - ratio + apart)
    term = torch.where(
        expand(step.last, x0), -log_likelihood(x0, estimate, log_variance), divergence
    )
    return term.flatten(1).mean(1) * BITS


def log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Nats of 8-bit values x in [-1, 1] under a normal distribution that is cut into their bins,
    the outermost reaching to infinity; exact in the tails (Ho et al. 2020, section 3.3).
    """
    scale = torch.exp(-0.5 * log_variance)
    below, above = (x - BIN / 2 - mean) * scale, (x + BIN / 2 - mean) * scale
    # by symmetry on the side where both lie in the lower tail, where logs of Phi are exact
    flip = below + above > 0
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-7)))
    lowest, highest = x < -1 + BIN / 2, x > 1 - BIN / 2
    out = torch.where(lowest, torch.special.log_ndtr(above), inside)
    return torch.where(highest, torch.special.log_ndtr(-below), out)


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """Bits per dimension (B,) that the noisy end of the schedule still tells of x0."""
    alpha, sigma = alpha_sigma(schedule.log_snr(torch.ones(1, device=x0.device)))
    variance = sigma.square()
    divergence = 0.5 * ((alpha * x0).square() + variance - 1 - variance.log())
    return divergence.flatten(1).mean(1) * BITS


def _log_share(now: Tensor, after: Tensor) -> Tensor:
    """log(1 - e^(now - after)) for now < after."""
    return torch.log(-torch.expm1((now - after).clamp(max=-1e-7)))
