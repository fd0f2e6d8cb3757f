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
from dalle2_video.diffusion.lowres import (
    augment,
    blend,
    fit,
    window_starts,
    window_weights,
)
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.diffusion.variance import fraction_of, split_output
from dalle2_video.models.unet3d import Condition, Low, UnetConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening

Progress = Callable[[], None]
GAMMA = 0.1  # of ancestral sampling, where nothing better is known


@dataclass(frozen=True)
class ClipSampling:
    """How one U-Net of the cascade is sampled.

    eta: of ddim, 0 = deterministic. gamma, corrector: of ancestral; gamma None is what the network
    has learned, or 0.1. guidance_scale: 1 is the plain
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
    gamma: float | None = None
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
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
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
    sample_ids: Tensor,
    config: SampleConfig,
) -> Tensor:
    """Video embeddings (B, D), l2-normalised as in the cache; sample_ids (B,) key the noise.

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

    z = keyed.randn((draws, dim), config.seed, sample_ids, "prior", device)
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
    sample_ids: Tensor,
    config: ClipSampling,
    seed: int,
    low: Tensor | None = None,
    progress: Progress | None = None,
    stream: str = "sample",
) -> Tensor:
    """Clips (B, C, F, H, W) float32 about [-1, 1] from conditions.

    unet: a Unet3D of configuration `model`, or what wraps it. (seed, sample_ids (B,), stream) key
    the noise. low (B, C, f, h, w): the smaller clip, for super-resolution, of any number of frames.
    Longer clips than the network's are sampled whole, but it sees a window of them at a time: the
    estimates of x0 are blended at each step, so that neighbouring windows agree. Memory: one
    window's and four clips, `low` with its noise among them (with a corrector, six).
    """
    device = condition.embedding.device
    shape, smaller = model.clip_shape, None
    if low is not None:
        smaller = Smaller(low, model, config.augmentation, seed, sample_ids, f"{stream}/low")
        shape = smaller.clip_shape
    frames, whole = shape[1], slice(None)
    window = config.window or model.num_frames
    windowed = model.sees_windows and window < frames
    window = window if windowed else frames
    if window % model.times[0]:
        raise ValueError(
            f"window {window} is no multiple of the {model.times[0]} frames that are made of one"
        )
    starts = window_starts(frames, window, config.overlap, model.times[0])
    weights = window_weights(starts, window, frames).to(device)
    two = Condition.cat(condition, condition.dropped())
    steps = sampler_steps(diffusion.schedule, config.steps, device)
    estimate: Tensor | None = None
    fraction: Tensor | None = None

    def denoise_at(part: slice) -> Denoiser:
        """What denoises these frames of the clips."""

        def network(z: Tensor, log_snr: Tensor) -> Tensor:
            nonlocal fraction
            times = len(z) // len(sample_ids)  # 2 with guidance
            before = given = None
            if smaller is not None:
                given = smaller.at(part).repeated(times)
            if model.self_condition and estimate is not None:
                before = estimate[:, :, part].clamp(-1, 1)  # as in training
                before = before.repeat(times, 1, 1, 1, 1)
            out = unet(z, log_snr, two if times == 2 else condition, 0, before, given)
            prediction, raw = split_output(out, z.shape[1])
            if raw is not None:  # with guidance the conditional half's
                fraction = fraction_of(raw[: len(sample_ids)].float())
            return prediction

        denoise: Denoiser = denoiser(network, diffusion.prediction)
        if config.guidance_scale != 1:
            denoise = guided(denoise, config.scale(steps), config.guidance_rescale)
        if smaller is not None:
            denoise = smaller.in_pixels(denoise, part)
        if config.threshold == "static":
            denoise = static_threshold(denoise)
        elif config.threshold == "dynamic":
            denoise = dynamic_threshold(denoise)
        return denoise if smaller is None else smaller.with_known(denoise, part)

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        nonlocal estimate
        if windowed:
            x0 = torch.zeros_like(z)
            for first, weight in zip(starts, weights, strict=True):
                part = slice(first, first + window)
                one = denoise_at(part)(z[:, :, part], log_snr)
                x0[:, :, part].addcmul_(one, weight[:, None, None])
        else:
            x0 = denoise_at(whole)(z, log_snr)
        if model.self_condition:
            estimate = x0
        return x0

    def noise(i: int) -> Tensor:
        return keyed.randn(shape, seed, sample_ids, f"{stream}/{i}", device)

    def learned() -> Tensor:
        assert fraction is not None
        return fraction

    def start() -> Tensor:  # no name here holds it: the sampler works on a copy
        return keyed.randn(shape, seed, sample_ids, stream, device)

    report = None if progress is None else lambda _: progress()
    if config.sampler == "dpm_solver":
        x0 = dpm_solver(denoise, start(), steps, report)
    elif config.sampler == "ancestral":
        fixed = GAMMA if config.gamma is None else config.gamma
        gamma = learned if config.gamma is None and model.learned_variance else fixed
        x0 = ancestral(denoise, start(), steps, noise, gamma, config.corrector, report)
    else:
        x0 = ddim(denoise, start(), steps, noise, config.eta, report)
    if smaller is not None:
        for first in range(0, frames, window):
            part = slice(first, min(first + window, frames))
            x0[:, :, part] = smaller.to_pixels(x0[:, :, part], part)
        smaller.put_known(x0, whole)
    return x0


class Smaller:
    """The smaller clip (B, C, f, h, w) in sampling: what the network is given of it, and the way
    between pixels and what is diffused (`UnetConfig.residual`).

    A part is a slice of the larger clip's frames that begins at a known one.
    """

    def __init__(
        self,
        low: Tensor,
        model: UnetConfig,
        augmentation: float,
        seed: int,
        sample_ids: Tensor,
        stream: str,
    ) -> None:
        noise = keyed.randn(low.shape[1:], seed, sample_ids, stream, low.device)
        self.low, self.model = low, model
        self.level = torch.full((len(low),), augmentation, device=low.device)
        self.noisy = augment(low, self.level, noise)
        self._last: tuple[slice, Low] | None = None

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the larger clip."""
        (r, s), (channels, frames, height, width) = self.model.times, self.low.shape[1:]
        return channels, frames * r, height * s, width * s

    def at(self, part: slice) -> Low:
        """What the network is given; the last part's is kept."""
        if self._last is None or self._last[0] != part:
            length = self.clip_shape[1]
            first, end, _ = part.indices(length)
            fitted = fit(self.noisy, self.model.times, first, end - first)
            index = torch.arange(first, end, device=self.low.device)
            place = (index * (self.model.num_frames / length)).expand(len(self.low), -1)
            self._last = part, Low(fitted, self.level, place)
        return self._last[1]

    def guess(self, part: slice) -> Tensor:
        """What the smaller clip alone says."""
        given = self.at(part)
        return blend(given.frames, given.log_snr, self.model.times)

    def to_pixels(self, x: Tensor, part: slice) -> Tensor:
        """From what is diffused."""
        scale = self.model.residual
        return scale * x + self.guess(part) if scale else x

    def in_pixels(self, denoise: Denoiser, part: slice) -> Denoiser:
        """The denoiser's estimates in pixels."""
        return lambda z, log_snr: self.to_pixels(denoise(z, log_snr), part)

    def with_known(self, denoise: Denoiser, part: slice) -> Denoiser:
        """A denoiser in pixels with the frames that are known, and what is diffused out of it."""

        def known(z: Tensor, log_snr: Tensor) -> Tensor:
            x0 = denoise(z, log_snr)
            self.put_known(x0, part)
            scale = self.model.residual
            return (x0 - self.guess(part)) / scale if scale else x0

        return known

    def put_known(self, x0: Tensor, part: slice) -> None:
        """Put the known frames of this part into x0, as they are, where there are such."""
        (r, s), (first, end, _) = self.model.times, part.indices(self.clip_shape[1])
        if r > 1 and s == 1:
            x0[:, :, ::r] = self.low[:, :, first // r : end // r]
