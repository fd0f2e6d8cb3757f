"""A learned variance of the reverse steps, and the variational bound that trains and judges it.

Nichol & Dhariwal 2021 (2102.09672), section 3.1: the log-variance of a step is interpolated between
beta~ (right for a single clip) and beta (right for white noise) by a fraction that is learned for
each value. That is the `gamma` of the ancestral sampler.

Deviation: here the fraction is that of each frequency of the clip (frequencies.py), and
interpolates the variance itself. Then the best one is the expected squared error of the network's
guess of x0 over sigma^2, for a step of any length (Bao et al. 2022, 2206.07309, there by value); it
is above 1 where the data vary more than white noise. See docs/learned_variance.md.

In continuous time a process of T steps goes from t to t - 1 / T. Its bound, in bits per dimension,
is a sum of T terms and the prior's: of each step the KL divergence between the posterior given the
clip and the network's, of the last one the likelihood of the clip's 8-bit values. Clips
(B, ...) are float32 in [-1, 1], times t (B,) in [0, 1], best on the grid of 1 / T to 1 (`on_grid`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.diffusion.frequencies import to_frequencies
from dalle2_video.diffusion.parameterization import expand
from dalle2_video.diffusion.schedule import Schedule, alpha_sigma

BIN = 2 / 255  # between neighbouring 8-bit values
BITS = 1 / math.log(2)
RAW_LIMIT = 16.0  # fractions from 6e-8 to 4e6


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

    @property
    def gap(self) -> Tensor:
        """log_upper less log_lower, with all its digits where they are nearly the same."""
        gap = F.logsigmoid(-self.now) - F.logsigmoid(-self.after)
        return torch.where(self.last, self.log_upper - self.log_lower, gap)

    def log_variance(self, fraction: Tensor | float, like: Tensor) -> Tensor:
        """Nichol & Dhariwal's, (B, ...): fraction 0 is the lower bound, 1 the upper."""
        return expand(self.log_lower, like) + fraction * expand(self.gap, like)


def on_grid(t: Tensor, steps: int) -> Tensor:
    """Times in [0, 1) -> the ends of the steps that they lie in, 1 / T to 1.

    Between 0 and 2 / T the bounds jump, so a network that learns a fraction must not see more of
    these times than the process has.
    """
    return (torch.floor(t * steps) + 1).clamp(max=steps) / steps


def reverse_step(schedule: Schedule, t: Tensor, steps: int) -> ReverseStep:
    """The reverse step at times t (B,) of a process of `steps` steps, two or more."""
    width = 1 / steps
    last = t < 1.5 * width
    now = schedule.log_snr(t)
    after = schedule.log_snr((t - width).clamp(min=0))
    before = schedule.log_snr((t + width).clamp(max=1))
    # sigma_t^2 = sigmoid(-log-SNR); 1 - e^(now - after) of it is new since `after`
    variance = F.logsigmoid(-now)
    share, share_before = _log_share(now, after), _log_share(before, now)
    lower = torch.where(last, share_before + variance, share + F.logsigmoid(-after))
    return ReverseStep(now, after, lower, torch.where(last, variance, share + variance), last)


def fraction_of(raw: Tensor) -> Tensor:
    """A network's raw output -> fractions; 0 is 0.5, for short steps the middle of the bounds."""
    return 0.5 * torch.exp(raw.clamp(-RAW_LIMIT, RAW_LIMIT))


def split_output(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's output (B, C or 2 C, ...) for clips of C = `channels`: its prediction (B, C,
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
    log_variance, last = step.log_variance(fraction, x0), expand(step.last, x0)
    alpha, _ = alpha_sigma(step.after)
    log_share = 2 * (_log_share(step.now, step.after) + alpha.log())
    # each term sees the other's values as harmless ones: what overflows where it is not taken would
    # still make its gradient NaN
    of_step = torch.where(last, expand(step.log_lower, x0), log_variance)
    ratio = expand(step.log_lower, x0) - of_step
    apart = (x0 - estimate).square() * torch.exp(expand(log_share, x0) - of_step)
    divergence = 0.5 * (torch.expm1(ratio) - ratio + apart)
    likelihood = log_likelihood(
        x0, torch.where(last, estimate, x0), torch.where(last, log_variance, 0.0)
    )
    return torch.where(last, -likelihood, divergence).flatten(1).mean(1) * BITS


def learned_term(step: ReverseStep, estimate: Tensor, fraction: Tensor, x0: Tensor) -> Tensor:
    """As `bound_term`, where fraction (B, ...) is that of each frequency.

    In the last step, whose values are cut to 8 bits one by one, all values have the mean variance.
    """
    last = expand(step.last, x0)
    growth = -torch.expm1(step.now - step.after) * torch.exp(step.after)  # of the SNR
    excess = to_frequencies(x0 - estimate).square() * expand(growth, x0)
    more = fraction * expand(torch.expm1(step.gap), x0)  # of the variance, in those of beta~
    divergence = 0.5 * (torch.log1p(more) + (excess - more) / (1 + more))
    mean = expand(fraction.flatten(1).mean(1).log() + step.log_upper, x0)
    likelihood = log_likelihood(
        x0, torch.where(last, estimate, x0), torch.where(last, mean, torch.zeros_like(mean))
    )
    return torch.where(last, -likelihood, divergence).flatten(1).mean(1) * BITS


def log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Nats of 8-bit values x in [-1, 1] under a normal distribution that is cut into their bins,
    the outermost reaching to infinity; exact in the tails (Ho et al. 2020, section 3.3).
    """
    scale = torch.exp(-0.5 * log_variance)
    below, above = (x - BIN / 2 - mean) * scale, (x + BIN / 2 - mean) * scale
    # by symmetry on the side where both lie in the lower tail, where logs of Phi are exact
    flip = below + above > 0
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_low, log_high = log_cdf(low), log_cdf(high)
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-7)))
    lowest, highest = x < -1 + BIN / 2, x > 1 - BIN / 2
    return torch.where(highest, log_cdf(-below), torch.where(lowest, log_cdf(above), inside))


def log_cdf(x: Tensor) -> Tensor:
    """log Phi(x), below -10 by its asymptotic series: torch's gradient (2.14) is off by 7 % at
    -1,000 and overflows at -20,000.
    """
    far = x.clamp(max=-10)
    square = far.square()
    series = torch.log1p(-1 / square + 3 / square.square())
    tail = -0.5 * square - torch.log(-far) - 0.5 * math.log(2 * math.pi) + series
    return torch.where(x < -10, tail, torch.special.log_ndtr(x.clamp(min=-10)))


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """Bits per dimension (B,) of x0 that are left at the noisy end of the schedule."""
    alpha, sigma = alpha_sigma(schedule.log_snr(torch.ones(1, device=x0.device)))
    variance = sigma.square()
    divergence = 0.5 * ((alpha * x0).square() + variance - 1 - variance.log())
    return divergence.flatten(1).mean(1) * BITS


def _log_share(now: Tensor, after: Tensor) -> Tensor:
    """log(1 - e^(now - after)) for now < after."""
    return torch.log(-torch.expm1((now - after).clamp(max=-1e-7)))
