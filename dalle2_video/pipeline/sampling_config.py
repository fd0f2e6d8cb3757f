"""How the cascade is sampled: the section `sample` of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from dalle2_video.config import Depth, LogSNR, Share, Size, config_class, default
from dalle2_video.models.unet_config import UnetConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dalle2_video.diffusion.guidance import Scale

SamplerName = Literal["dpm_solver", "ddim", "ancestral"]  # the keys of pipeline/samplers.py


@config_class
class UnetSampling:
    """How one U-Net of the cascade is sampled."""

    sampler: SamplerName = "dpm_solver"
    """dpm_solver: DPM-Solver++(2M); ddim; ancestral."""
    steps: Depth = 15
    """Sampler steps."""
    eta: Share = 0.0
    """Noise of ddim; 0: deterministic."""
    gamma: Share | None = None
    """Of ancestral: the log-variance of a step between its bounds; null: what the network has
    learned, or 0.1."""
    corrector: NonNegativeFloat = 0.0
    """Of ancestral: size of the Langevin step after each step; 0: none."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1: the plain conditional model."""
    guidance: Literal["constant", "interval", "oscillating"] = "constant"
    """When guidance applies: always, between two log-SNRs, or in the first steps and then in every
    other one."""
    guidance_interval: tuple[LogSNR, LogSNR] = (-8.0, 4.0)
    """The two log-SNRs of guidance=interval."""
    guidance_constant: Share = 0.5
    """Share of the steps that come before guidance=oscillating skips every other one."""
    guidance_rescale: Share = 0.0
    """How far the estimate's deviation is brought back to the conditional one's; 0.7 helps large
    scales."""
    threshold: Literal["none", "static", "dynamic"] = "static"
    """Limits of the estimate: none, the range of pixels, or a quantile of the estimate."""
    batch_size: PositiveInt = 32
    """Clips at a time."""

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if not low < high:
            raise ValueError(f"guidance_interval must rise, not {low}, {high}")

    def scale(self, steps: Tensor) -> float | Scale:
        """The scale of guidance for a sampler that goes through these log-SNRs."""
        # here, since it imports torch
        from dalle2_video.diffusion.guidance import interval_scale, oscillating_scale

        match self.guidance:
            case "interval":
                return interval_scale(self.guidance_scale, *self.guidance_interval)
            case "oscillating":
                return oscillating_scale(self.guidance_scale, steps, self.guidance_constant)
        return self.guidance_scale


@config_class
class SuperResolutionSampling(UnetSampling):
    """How a super-resolution U-Net is sampled."""

    steps: Depth = 8
    """Sampler steps."""
    batch_size: PositiveInt = 16
    """Clips at a time."""
    augmentation: LogSNR = 8.0
    """Log-SNR of the noise on the smaller clip (Imagen Video: 1.1 to 1.6); 10 is as good as
    none."""
    tile: Size | None = None
    """Frames that the network sees at once of a longer clip; null: as many as it was made for."""
    overlap: NonNegativeInt = 4
    """Frames that neighbouring tiles share at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None and self.tile <= self.overlap:
            raise ValueError(f"tile {self.tile} must be larger than overlap {self.overlap}")


@config_class
class SampleConfig(UnetSampling):
    """How the cascade is sampled: its first U-Net, and the super-resolution by `unets`."""

    guidance_scale: float = 3.0
    """Classifier-free guidance; 1: the plain conditional model."""
    unets: dict[str, SuperResolutionSampling] = default(dict)
    """Name of a super-resolution U-Net -> how it is sampled."""
    prior_steps: Depth = 25
    """Sampler steps of the prior."""
    prior_guidance_scale: float = 1.5
    """Classifier-free guidance of the prior."""
    prior_draws: Size = 2
    """Embeddings drawn per clip; the one nearest to the text is kept (DALL-E 2 draws two)."""
    candidates: Size = 1
    """Clips drawn per text; the one that the video CLIP finds nearest to the text is kept."""
    seed: int = 0
    """Of the samples."""

    def of(self, name: str, model: UnetConfig) -> UnetSampling:
        """How the U-Net of that name is sampled."""
        return self.unets.get(name, SuperResolutionSampling()) if model.lowres_copies else self
