"""How the cascade is sampled: the section `sample` of the configuration."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dalle2_video.config import config_class, default
from dalle2_video.diffusion.guidance import Scale, interval_scale, oscillating_scale
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.pipeline.samplers import SAMPLERS


@config_class
class UnetSampling:
    """How one U-Net of the cascade is sampled.

    sampler: a key of SAMPLERS, in so many steps. eta: of ddim, 0 = deterministic. gamma, corrector:
    of ancestral; gamma None is what the network has learned, or 0.1. guidance_scale: 1 is the plain
    conditional model. guidance: when it applies: "constant"; "interval", between the log-SNRs
    guidance_interval; or "oscillating", the first guidance_constant share of the steps, then every
    other one. guidance_rescale: see `guided`. batch_size: clips at a time.
    """

    sampler: str = "dpm_solver"
    steps: int = 15
    eta: float = 0.0
    gamma: float | None = None
    corrector: float = 0.0
    guidance_scale: float = 1.0
    guidance: Literal["constant", "interval", "oscillating"] = "constant"
    guidance_interval: tuple[float, float] = (-8.0, 4.0)
    guidance_constant: float = 0.5
    guidance_rescale: float = 0.0
    threshold: Literal["none", "static", "dynamic"] = "static"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}")
        self._at_least(1, "steps", "batch_size")
        self._at_least(0, "corrector")
        for name in ("eta", "gamma", "guidance_constant", "guidance_rescale"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        low, high = self.guidance_interval
        if not low < high:
            raise ValueError(f"guidance_interval must rise, not {low}, {high}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def scale(self, steps: Tensor) -> float | Scale:
        """The scale of guidance for a sampler that goes through these log-SNRs."""
        match self.guidance:
            case "interval":
                return interval_scale(self.guidance_scale, *self.guidance_interval)
            case "oscillating":
                return oscillating_scale(self.guidance_scale, steps, self.guidance_constant)
        return self.guidance_scale


@config_class
class SuperResolutionSampling(UnetSampling):
    """How a super-resolution U-Net is sampled.

    augmentation: log-SNR of the noise on the smaller clip (Imagen Video: 1.1 to 1.6; 10 is as good
    as none). tile: frames that the network sees at once of a longer clip, None = as many as it was
    made for; overlap: frames that neighbouring tiles share at least.
    """

    steps: int = 8
    batch_size: int = 16
    augmentation: float = 8.0
    tile: int | None = None
    overlap: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "overlap")
        if self.tile is not None and self.tile <= self.overlap:
            raise ValueError(f"tile {self.tile} must be larger than overlap {self.overlap}")


@config_class
class SampleConfig(UnetSampling):
    """The section `sample`: its first U-Net as in UnetSampling, the super-resolution by `unets`.

    unets: name -> how. prior_draws: embeddings drawn per clip, of which the one nearest to the text
    is kept (DALL-E 2 draws two). candidates: clips drawn per text, of which the one is kept that
    the video CLIP finds nearest to the text.
    """

    guidance_scale: float = 3.0
    unets: dict[str, SuperResolutionSampling] = default(dict)
    prior_steps: int = 25
    prior_guidance_scale: float = 1.5
    prior_draws: int = 2
    candidates: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "prior_steps", "prior_draws", "candidates")

    def of(self, name: str, model: UnetConfig) -> UnetSampling:
        """How the U-Net of that name is sampled."""
        return self.unets.get(name, SuperResolutionSampling()) if model.lowres_copies else self
