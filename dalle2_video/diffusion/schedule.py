"""Noise schedules as functions of time in [0, 1] that return log-SNR.

z_t = alpha x + sigma eps with alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr) (variance
preserving). Source: Kingma et al. 2021 (VDM), appendix; Ho et al. 2022 (2204.03458), section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a log-SNR, same shape, float32; alpha^2 + sigma^2 = 1."""
    log_snr = log_snr.float()
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


@dataclass(frozen=True)
class CosineSchedule:
    """Cosine log-SNR over a range, its end points mapped (not clamped).

    log_snr(t) = -2 log tan(a + t (b - a)) + shift with a = atan(exp(-max / 2)) and
    b = atan(exp(-min / 2)).
    `shift` = 2 log(64 / side) keeps the noise per low-frequency content of a 64 px clip at
    other sizes (Hoogeboom et al. 2023); it moves both limits.
    """

    log_snr_min: float = -10.0
    log_snr_max: float = 10.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(f"log_snr_min {self.log_snr_min} is not below {self.log_snr_max}")

    def log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR (B,) float32 of times t (B,) in [0, 1]; t = 0 is the clean end."""
        a = math.atan(math.exp(-0.5 * self.log_snr_max))
        b = math.atan(math.exp(-0.5 * self.log_snr_min))
        return -2.0 * torch.log(torch.tan(a + t.float() * (b - a))) + self.shift


@dataclass(frozen=True)
class LinearSchedule:
    """DDPM's linear beta (1e-4 to 0.02 over 1,000 steps) in continuous time, for reference.

    log abar(t) = -(beta_min t + (beta_max - beta_min) t^2 / 2) with beta 0.1 to 20 (Song et al.
    2021, 2011.13456, appendix C); t is mapped to [1e-3, 1], since the SNR is infinite at 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR (B,) float32 of times t (B,) in [0, 1]; t = 0 is the clean end."""
        t = 1e-3 + (1 - 1e-3) * t.float()
        log_abar = -(self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2)
        return log_abar - torch.log(-torch.expm1(log_abar))


@dataclass(frozen=True)
class ZeroTerminalSchedule:
    """Another schedule with alpha shifted and scaled so that t = 1 is pure noise.

    alpha <- (alpha - alpha(1)) alpha(0) / (alpha(0) - alpha(1)) (Lin et al. 2023, 2305.08891,
    section 3.1). The log-SNR ends at -20 (alpha 4.5e-5) instead of minus infinity, so that
    it can be a network's input and eps stays defined. Needs v or x0: eps does not determine x0
    there.
    """

    inner: CosineSchedule | LinearSchedule
    floor: float = -20.0

    def log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR (B,) float32 of times t (B,) in [0, 1]; t = 0 is the clean end."""
        ends = self.inner.log_snr(torch.tensor([0.0, 1.0], device=t.device)).double()
        first, last = torch.sigmoid(ends).sqrt()
        alpha = torch.sigmoid(self.inner.log_snr(t).double()).sqrt()
        alpha = (alpha - last) * first / (first - last)
        square = alpha.clamp(min=0).square()
        return (square.log() - torch.log1p(-square)).clamp(min=self.floor).float()


Schedule = CosineSchedule | LinearSchedule | ZeroTerminalSchedule


def sampler_steps(schedule: Schedule, num_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Log-SNRs (num_steps + 1,) from the noisy end, t = 1, to the clean one: "trailing" steps."""
    return schedule.log_snr(torch.linspace(1.0, 0.0, num_steps + 1, device=device))
