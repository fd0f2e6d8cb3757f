"""Draws embeddings and clips from trained networks: samplers, guidance and thresholds put together.

Every number that a clip is made from is keyed by (seed, sample id), so a clip does not depend on
the batch that it is sampled in. B clips, C channels, F frames, H W, D embedding dimension; f h w of
the smaller clip (lowres) that a super-resolution network is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.config import ConfigError
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.guidance import (
    Denoiser,
    denoiser,
    dynamic_threshold,
    guided,
    static_threshold,
)
from dalle2_video.diffusion.samplers import ddim
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.diffusion.tiles import Tiles
from dalle2_video.diffusion.variance import fraction_of, split_output
from dalle2_video.models.conditioning import Condition, LowRes
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.samplers import SAMPLERS, SamplerInputs
from dalle2_video.pipeline.sampling_config import (
    SampleConfig,
    SuperResolutionSampling,
    UnetSampling,
)
from dalle2_video.pipeline.super_resolution import SuperResolution, diffused_by

Progress = Callable[[], None]
THRESHOLDS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoise: denoise,
    "static": static_threshold,
    "dynamic": dynamic_threshold,
}


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
    config: UnetSampling,
    seed: int,
    lowres: Tensor | None = None,
    progress: Progress | None = None,
    stream: str = "sample",
) -> Tensor:
    """Clips (B, C, F, H, W) float32 about [-1, 1] from conditions.

    unet: a Unet3D of configuration `model`, or what wraps it. (seed, sample_ids (B,), stream) key
    the noise. lowres (B, C, f, h, w): the smaller clip, for super-resolution, of any number of
    frames. Longer clips than the network's are sampled whole, but it sees a tile of them at a time:
    the estimates of x0 are blended at each sampler step, so that neighbouring tiles agree. Memory:
    one tile's and four clips, `lowres` with its noise among them (with a corrector, six).
    """
    device, given = condition.embedding.device, None
    shape = model.clip_shape
    if lowres is not None:
        given = GivenLowRes(lowres, model, config, seed, sample_ids, f"{stream}/low")
        shape = given.clip_shape
    steps = sampler_steps(diffusion.schedule, config.steps, device)
    tiles = tiles_of(shape[1], model, config)
    denoise = ClipDenoiser(unet, model, diffusion, condition, config, steps, tiles, given)
    x0 = SAMPLERS[config.sampler](
        SamplerInputs(
            denoise=denoise,
            start=lambda: keyed.randn(shape, seed, sample_ids, stream, device),
            steps=steps,
            noise=lambda i: keyed.randn(shape, seed, sample_ids, f"{stream}/{i}", device),
            learned=denoise.learned_fraction if model.learned_variance else None,
            options=config,
            progress=None if progress is None else lambda _: progress(),
        )
    )
    return x0 if given is None else given.finished(x0, tiles)


def tiles_of(frames: int, model: UnetConfig, config: UnetSampling) -> Tiles:
    """The tiles that clips of `frames` frames are sampled in; ConfigError where they do not fit."""
    if not isinstance(config, SuperResolutionSampling) or not model.is_local_in_time:
        return Tiles(frames, frames, 0, model.upscale[0])
    tile = min(config.tile or model.num_frames, frames)
    if tile % model.upscale[0]:
        raise ConfigError(
            f"tile {tile} is no multiple of the {model.upscale[0]} frames that are made of one"
        )
    return Tiles(frames, tile, config.overlap, model.upscale[0])


class GivenLowRes:
    """The smaller clips (B, C, f, h, w) of a batch that is sampled, with the noise on them."""

    def __init__(
        self,
        lowres: Tensor,
        model: UnetConfig,
        config: UnetSampling,
        seed: int,
        sample_ids: Tensor,
        stream: str,
    ) -> None:
        assert isinstance(config, SuperResolutionSampling)
        self.lowres, self.task = lowres, SuperResolution(model)
        self.log_snr = torch.full((len(lowres),), config.augmentation, device=lowres.device)
        noise = keyed.randn(lowres.shape[1:], seed, sample_ids, stream, lowres.device)
        self.noisy = self.task.augmented(lowres, self.log_snr, noise)
        self._last: tuple[slice, LowRes] | None = None

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the larger clip."""
        (r, s), (channels, frames, height, width) = self.task.model.upscale, self.lowres.shape[1:]
        return channels, frames * r, height * s, width * s

    def at(self, part: slice) -> LowRes:
        """The network's input of these frames of the larger clip; the last one is kept."""
        if self._last is None or self._last[0] != part:
            self._last = part, self.task.stretch(self.noisy, self.log_snr, part)
        return self._last[1]

    def finished(self, x0: Tensor, tiles: Tiles) -> Tensor:
        """A sampler's answer in pixels, a tile at a time, with the known frames as they were."""
        for part in tiles.apart():
            x0[:, :, part] = self.task.to_pixels(x0[:, :, part], self.at(part))
        self.task.put_known(x0, self.lowres, slice(None))
        return x0


class ClipDenoiser:
    """(z (B, C, F, H, W), log_snr (B,)) -> x0 of whole clips, as samplers call it.

    Puts guidance, the way between pixels and what is diffused, the threshold and known frames
    around the network, tile by tile. Keeps its last estimate, for self-conditioning.
    """

    def __init__(
        self,
        unet: Callable[..., Tensor],
        model: UnetConfig,
        diffusion: DiffusionConfig,
        condition: Condition,
        config: UnetSampling,
        steps: Tensor,
        tiles: Tiles,
        given: GivenLowRes | None = None,
    ) -> None:
        self.unet, self.model, self.diffusion, self.config = unet, model, diffusion, config
        self.tiles, self.given, self.task = tiles, given, diffused_by(model)
        self.condition, self.scale = condition, config.scale(steps)
        self.both = Condition.cat(condition, condition.dropped())
        self.x0_prev: Tensor | None = None
        self._fraction: Tensor | None = None

    def __call__(self, z: Tensor, log_snr: Tensor) -> Tensor:
        x0 = self.tiles.blend(lambda part: self.of_part(part)(z[:, :, part], log_snr), z)
        if self.model.self_condition:
            self.x0_prev = x0
        return x0

    def learned_fraction(self) -> Tensor:
        """Of the last call: the variance's learned fraction of each frequency, (B, C, F, H, W)."""
        assert self._fraction is not None
        return self._fraction

    def of_part(self, part: slice) -> Denoiser:
        """The denoiser of these frames of the clips."""
        given = self.given
        denoise = denoiser(partial(self._network, part), self.diffusion.prediction)
        if self.config.guidance_scale != 1:
            denoise = guided(denoise, self.scale, self.config.guidance_rescale)
        lowres = None if given is None else given.at(part)
        in_pixels = THRESHOLDS[self.config.threshold](
            lambda z, log_snr: self.task.to_pixels(denoise(z, log_snr), lowres)
        )

        def of_target(z: Tensor, log_snr: Tensor) -> Tensor:
            x0 = in_pixels(z, log_snr)
            if given is not None:
                given.task.put_known(x0, given.lowres, part)
            return self.task.to_target(x0, lowres)

        return of_target

    def _network(self, part: slice, z: Tensor, log_snr: Tensor) -> Tensor:
        """The prediction for one batch of clips, or for two: with and without the condition."""
        clips = len(self.condition.keep_text)
        repeats = len(z) // clips
        x0_prev = lowres = None
        if self.given is not None:
            lowres = self.given.at(part).repeated(repeats)
        if self.x0_prev is not None:
            x0_prev = self.x0_prev[:, :, part].clamp(-1, 1)  # as in training
            x0_prev = x0_prev.repeat(repeats, 1, 1, 1, 1)
        condition = self.both if repeats == 2 else self.condition
        out = self.unet(z, log_snr, condition, 0, x0_prev, lowres)
        prediction, raw = split_output(out, z.shape[1])
        if raw is not None:  # with guidance the conditional half's
            self._fraction = fraction_of(raw[:clips].float())
        return prediction
