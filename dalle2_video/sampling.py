"""Draws embeddings and clips from trained networks: samplers, guidance and thresholds put together.

Every number that a clip is made from is keyed by (seed, index of the clip), so a clip does not
depend on the batch that it is sampled in. B clips, F frames, H W, D embedding dimension; f h w of
the smaller clip that a super-resolution network is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.diffusion.conditioning import (
    augment,
    blend,
    fit,
    window_starts,
    window_weights,
)
from dalle2_video.diffusion.guidance import (
    Denoiser,
    Scale,
    denoiser,
    dynamic_threshold,
    guided,
    interval_scale,
    oscillating_scale,
    static_threshold,
)
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.diffusion.sampling import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.models.unet3d import Condition, Low, UnetConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening

Progress = Callable[[], None]


@dataclass(frozen=True)
class ClipSampling:
    """How one U-Net of the cascade is sampled.

    eta: of ddim, 0 = deterministic. gamma, corrector: of ancestral. guidance_scale: 1 is the plain
    conditional model. guidance: when it applies: "constant"; "interval", between the log-SNRs
    guidance_interval; or "oscillating", the first guidance_constant share of the steps, then every
    other one. guidance_rescale: see `guided`.

    batch_size: clips at a time. Of super-resolution: augmentation, the log-SNR of the noise on the
    smaller clip (Imagen Video: 1.1 to 1.6; 10 is as good as none). window: frames that the network
    sees at once of a longer clip, None = as many as it was made for; overlap: what neighbouring
    windows share at least.
    """

    sampler: Literal["ddim", "ancestral", "dpm_solver"] = "ddim"
    steps: int = 25
    eta: float = 0.0
    gamma: float = 0.1
    corrector: float = 0.0
    guidance_scale: float = 1.0
    guidance: Literal["constant", "interval", "oscillating"] = "constant"
    guidance_interval: tuple[float, float] = (-8.0, 4.0)
    guidance_constant: float = 0.5
    guidance_rescale: float = 0.0
    threshold: Literal["none", "static", "dynamic"] = "static"
    batch_size: int = 32
    augmentation: float = 6.0
    window: int | None = None
    overlap: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eta", "gamma", "guidance_constant", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("corrector", "overlap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        low, high = self.guidance_interval
        if not low < high:
            raise ValueError(f"guidance_interval must rise, not {low}, {high}")
        if self.window is not None and self.window <= self.overlap:
            raise ValueError(f"window {self.window} must be larger than overlap {self.overlap}")

    def scale(self, steps: Tensor) -> float | Scale:
        """The scale of guidance for a sampler that goes through these log-SNRs."""
        match self.guidance:
            case "interval":
                return interval_scale(self.guidance_scale, *self.guidance_interval)
            case "oscillating":
                return oscillating_scale(self.guidance_scale, steps, self.guidance_constant)
        return self.guidance_scale


@dataclass(frozen=True)
class SampleConfig(ClipSampling):
    """How to sample the cascade: its first U-Net as in ClipSampling, the others by `stages`.

    stages: U-Net -> how. prior_draws: embeddings drawn per clip, of which the one nearest to the
    text is kept (DALL-E 2 draws two). candidates: clips drawn per text, of which the one is kept
    that the video CLIP finds nearest to the text.
    """

    guidance_scale: float = 3.0
    stages: dict[str, ClipSampling] = field(default_factory=dict)
    prior_steps: int = 25
    prior_guidance_scale: float = 1.5
    prior_draws: int = 2
    candidates: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prior_steps", "prior_draws", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def of(self, name: str, model: UnetConfig) -> ClipSampling:
        """How the U-Net of that name is sampled."""
        return self.stages.get(name, ClipSampling()) if model.low_copies else self


def sample_embeddings(
    prior: Callable[..., Tensor],
    whiten: Whitening,
    diffusion: DiffusionConfig,
    text: TextEncoding,
    counters: Tensor,
    config: SampleConfig,
) -> Tensor:
    """Video embeddings (B, D), l2-normalised as in the cache; counters (B,) key the noise.

    whiten: the space that the prior works in. Draws `prior_draws` per text with DDIM and keeps the
    one with the largest dot product with the text embedding (Ramesh et al. 2022, section 2.2).
    """
    batch, dim = text.embedding.shape
    device = text.embedding.device
    draws = config.prior_draws

    def both(z: Tensor, log_snr: Tensor) -> Tensor:
        halves = len(z) // batch
        keep = torch.arange(len(z), device=device) < batch
        return prior(
            z,
            log_snr[:, None].expand(-1, draws),
            text.states.repeat(halves, 1, 1),
            text.mask.repeat(halves, 1),
            text.embedding.repeat(halves, 1),
            keep,
        )

    z = keyed.randn((draws, dim), config.seed, counters, "prior", device)
    denoise = denoiser(both, diffusion.prediction)
    if config.prior_guidance_scale != 1:
        denoise = guided(denoise, config.prior_guidance_scale)
    x0 = ddim(denoise, z, sampler_steps(diffusion.schedule, config.prior_steps, device))
    embeddings = torch.nn.functional.normalize(whiten.inverse(x0), dim=-1)
    nearest = torch.einsum("bkd,bd->bk", embeddings, text.embedding).argmax(1)
    return embeddings[torch.arange(batch, device=device), nearest]


def sample_clips(
    unet: Callable[..., Tensor],
    model: UnetConfig,
    diffusion: DiffusionConfig,
    condition: Condition,
    counters: Tensor,
    config: ClipSampling,
    seed: int,
    low: Tensor | None = None,
    progress: Progress | None = None,
    stream: str = "sample",
) -> Tensor:
    """Clips (B, C, F, H, W) float32 about [-1, 1] from conditions.

    unet: a Unet3D of configuration `model`, or what wraps it. (seed, counters (B,), stream) key the
    noise. low (B, C, f, h, w): the smaller clip, for super-resolution, of any number of frames.
    Longer clips than the network's are sampled whole, but it sees a window of them at a time: the
    estimates of x0 are blended at each step, so that neighbouring windows agree. Memory: one
    window's and four clips, `low` with its noise among them (with a corrector, six).
    """
    device = condition.embedding.device
    r, s = model.times
    shape = model.clip_shape
    if low is not None:
        shape = (shape[0], low.shape[2] * r, low.shape[3] * s, low.shape[4] * s)
        level = torch.full((len(low),), config.augmentation, device=device)
        noisy = augment(
            low, level, keyed.randn(low.shape[1:], seed, counters, f"{stream}/low", device)
        )
    frames = shape[1]
    window = config.window or model.num_frames
    windowed = model.sees_windows and window < frames
    window = window if windowed else frames
    if window % r:
        raise ValueError(f"window {window} is no multiple of the {r} frames that are made of one")
    starts = window_starts(frames, window, config.overlap, r)
    two = Condition.cat(condition, condition.dropped())
    steps = sampler_steps(diffusion.schedule, config.steps, device)
    estimate: Tensor | None = None

    def denoise_at(first: int, given: Low | None) -> Denoiser:
        """What denoises frames first .. first + window - 1 of the clips."""

        def network(z: Tensor, log_snr: Tensor) -> Tensor:
            times = len(z) // len(counters)  # 2 with guidance
            known = two if times == 2 else condition
            before = smaller = None
            if given is not None:
                smaller = given if times == 1 else given.repeated(times)
            if model.self_condition and estimate is not None:
                before = estimate[:, :, first : first + window].clamp(-1, 1)  # as in training
                before = before.repeat(times, 1, 1, 1, 1)
            return unet(z, log_snr, known, 0, before, smaller)

        denoise: Denoiser = denoiser(network, diffusion.prediction)
        if config.guidance_scale != 1:
            denoise = guided(denoise, config.scale(steps), config.guidance_rescale)
        if config.threshold == "static":
            denoise = static_threshold(denoise)
        elif config.threshold == "dynamic":
            denoise = dynamic_threshold(denoise)
        return denoise

    given = {}

    def denoise_window(first: int, z: Tensor, log_snr: Tensor) -> Tensor:
        if low is None:
            return denoise_at(first, None)(z, log_snr)
        if first not in given:  # of several windows only the last one's is kept
            given.clear()
            given[first] = low_input(noisy, level, model, first, window)
        return denoise_at(first, given[first])(z, log_snr)

    weights = window_weights(starts, window, frames).to(device)

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        nonlocal estimate
        if windowed:
            x0 = torch.zeros_like(z)
            for first, weight in zip(starts, weights, strict=True):
                part = slice(first, first + window)
                one = denoise_window(first, z[:, :, part], log_snr)
                x0[:, :, part].addcmul_(one, weight[:, None, None])
        else:
            x0 = denoise_window(0, z, log_snr)
        if low is not None and r > 1 and s == 1:
            x0[:, :, ::r] = low  # known frames, as they are
        if model.self_condition:
            estimate = x0
        return x0

    def noise(i: int) -> Tensor:
        return keyed.randn(shape, seed, counters, f"{stream}/{i}", device)

    def start() -> Tensor:  # no name here holds it: the sampler works on a copy
        return keyed.randn(shape, seed, counters, stream, device)

    report = None if progress is None else lambda _: progress()
    match config.sampler:
        case "dpm_solver":
            return dpm_solver(denoise, start(), steps, report)
        case "ancestral":
            return ancestral(denoise, start(), steps, noise, config.gamma, config.corrector, report)
    return ddim(denoise, start(), steps, noise, config.eta, report)


def low_input(
    low: Tensor, log_snr: Tensor, model: UnetConfig, first: int = 0, frames: int | None = None
) -> Low:
    """The smaller clip (B, C, f, h, w) with its noise, log_snr (B,), as the network takes it.

    first, frames: of the larger clip, only these; both multiples of its times the frames.
    """
    fitted = fit(low, model.times, first, frames)
    return Low(fitted, log_snr, blend(fitted, model.times, log_snr) if model.low_skip else None)
