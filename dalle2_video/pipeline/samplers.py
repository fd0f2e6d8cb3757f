"""The samplers that a configuration can name. A new one is one entry of SAMPLERS,
and its name in `SamplerName`.

Each takes what the sampling of a clip gives it and returns x0 (B, C, F, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dalle2_video.diffusion.guidance import Denoiser
from dalle2_video.diffusion.samplers import Fraction, Noise, Progress, ancestral, ddim, dpm_solver
from dalle2_video.pipeline.sampling_config import SamplerName

GAMMA = 0.1  # of ancestral sampling, where nothing better is known


class SamplerOptions(Protocol):
    """What samplers take of a configuration, see `UnetSampling`."""

    @property
    def eta(self) -> float: ...
    @property
    def gamma(self) -> float | None: ...
    @property
    def corrector(self) -> float: ...


@dataclass(frozen=True)
class SamplerInputs:
    """What a sampler may use.

    start: makes the noise z (B, C, F, H, W) that it begins from; nothing else holds it, so only the
    sampler's copy takes memory. steps: log-SNRs from the noisy end. noise: of a sampler step.
    learned: the fraction of the last denoising that the network has learned, None if it has none.
    """

    denoise: Denoiser
    start: Callable[[], Tensor]
    steps: Tensor
    noise: Noise
    learned: Fraction | None
    options: SamplerOptions
    progress: Progress | None


def _ddim(s: SamplerInputs) -> Tensor:
    return ddim(s.denoise, s.start(), s.steps, s.noise, s.options.eta, s.progress)


def _dpm_solver(s: SamplerInputs) -> Tensor:
    return dpm_solver(s.denoise, s.start(), s.steps, s.progress)


def _ancestral(s: SamplerInputs) -> Tensor:
    fixed = GAMMA if s.options.gamma is None else s.options.gamma
    gamma = s.learned if s.options.gamma is None and s.learned is not None else fixed
    corrector = s.options.corrector
    return ancestral(s.denoise, s.start(), s.steps, s.noise, gamma, corrector, s.progress)


SAMPLERS: dict[SamplerName, Callable[[SamplerInputs], Tensor]] = {
    "ddim": _ddim,
    "ancestral": _ancestral,
    "dpm_solver": _dpm_solver,
}
