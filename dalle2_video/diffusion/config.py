"""Schedule, prediction and loss weight of a diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from dalle2_video.config import LogSNR, config_class

if TYPE_CHECKING:
    from dalle2_video.diffusion.schedule import Schedule

Prediction = Literal["eps", "x0", "v"]
Weight = Literal["eps", "x0", "v", "min_snr"]


@config_class
class DiffusionConfig:
    """Schedule, prediction and loss weight of one diffusion model."""

    prediction: Prediction = "v"
    """What the network outputs."""
    loss: Weight = "v"
    """Whose plain squared error the loss is; min_snr weighs that of x0 by min(SNR, 5)."""
    max_weight: PositiveFloat = 1e4
    """Upper limit of the factor on the squared error of x0 (100 is sigma clamped at 0.1)."""
    log_snr_min: LogSNR = -10.0
    """Log-SNR of the noisy end (t = 1) of the cosine schedule, before `shift`."""
    log_snr_max: LogSNR = 10.0
    """Log-SNR of the clean end (t = 0) of the cosine schedule, before `shift`."""
    shift: LogSNR = 0.0
    """Added to every log-SNR of the cosine schedule: 2 log(64 / side) keeps the noise of a 64 px
    clip at other sizes."""
    noise: Literal["cosine", "linear"] = "cosine"
    """The schedule; linear is DDPM's and has its own limits."""
    zero_terminal_snr: bool = False
    """t = 1 is pure noise; not with eps."""
    variance_steps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    """T of the steps that a learned variance learns for (`learned_variance` of the network); how
    often it is sampled is another matter."""

    def __post_init__(self) -> None:
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(f"log_snr_min {self.log_snr_min} is not below {self.log_snr_max}")
        if self.zero_terminal_snr and "eps" in (self.prediction, self.loss):
            raise ValueError("zero_terminal_snr: eps does not determine x0 at t = 1, take v or x0")

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        # here, since it imports torch, which takes seconds: --help and a wrong key need none
        from dalle2_video.diffusion.schedule import (
            CosineSchedule,
            LinearSchedule,
            ZeroTerminalSchedule,
        )

        cosine = CosineSchedule(self.log_snr_min, self.log_snr_max, self.shift)
        inner = LinearSchedule() if self.noise == "linear" else cosine
        return ZeroTerminalSchedule(inner) if self.zero_terminal_snr else inner
