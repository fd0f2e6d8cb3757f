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

    def steps(self, num_steps: int, device: torch.device | str = "cpu") -> Tensor:
        """Log-SNRs (num_steps + 1,) from the noisy end to the clean end, for a sampler."""
        return self.log_snr(torch.linspace(1.0, 0.0, num_steps + 1, device=device))
