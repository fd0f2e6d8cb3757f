"""Training of a U-Net of the cascade: its objective, its sample videos, and its Stage.

Ho et al. 2022 (2204.03458) with the conditions of DALL-E 2 (Ramesh et al. 2022, section 2.1);
super-resolution as in Ho et al. Oct 2022 (2210.02303), on random crops and windows of a clip.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video import keyed
from dalle2_video.config import ConfigError
from dalle2_video.data.media.tensors import has_view, to_float, to_uint8
from dalle2_video.data.sources.captions import CaptionPolicy
from dalle2_video.data.store.dataset import Batch
from dalle2_video.diffusion.lowres import blend, known_frames
from dalle2_video.diffusion.objective import (
    DiffusionConfig,
    Noised,
    add_noise,
    per_sample_loss,
    variance_loss,
)
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.variance import on_grid, split_output
from dalle2_video.models.unet3d import Condition, Low, Unet3D, UnetConfig
from dalle2_video.pipeline.sampling import ClipSampling, sample_clips
from dalle2_video.stages.frozen_clip import (
    Conditions,
    TextEncoder,
    draw_times,
    keep_masks,
    shared_coin,
)
from dalle2_video.stages.super_resolution import draw_corners, noisy_low, part_of
from dalle2_video.training.accelerator import splits_weights
from dalle2_video.training.stage import Loss, Sample, Stage, StepInfo, TrainConfig

SAMPLES = 8
TOKENS_STEP = 128  # to a multiple of which text tokens are padded for a compiled network


@dataclass(frozen=True)
class DropSection:
    """Rates of condition dropout: all at once, the embedding alone, the text alone
    (independent).
    """

    all: float
    embedding: float
    text: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")


@dataclass(frozen=True)
class UnetSection:
    """A section of `unets` in the configuration. activation_checkpointing: less memory, about a
    third more time. compile: torch.compile, whose first steps take minutes, once for each number of
    text tokens (padded to a multiple of TOKENS_STEP).

    augmentation: log-SNRs between which the noise of the smaller clip is drawn evenly
    (super-resolution alone); 10 is as good as none. crop, window: pixels and frames of the part of
    each clip that it trains on, None = all; for networks without attention over them.

    images: independent frames that are appended to each clip (joint training, Ho et al. 2022,
    section 3; 8 for UCF101). image_only: share of the steps that train on those alone.
    """

    captions: CaptionPolicy
    model: UnetConfig
    diffusion: DiffusionConfig
    drop: DropSection
    augmentation: tuple[float, float] | None
    crop: int | None
    window: int | None
    images: int
    image_only: float
    activation_checkpointing: bool
    compile: bool
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"images must not be negative, got {self.images}")
        if not 0 <= self.image_only <= 1:
            raise ValueError(f"image_only must be in [0, 1], not {self.image_only}")
        if self.image_only and not self.images:
            raise ValueError(f"image_only {self.image_only} needs images, which is 0")
        if self.model.learned_variance and self.crop is not None:
            raise ValueError(f"crop {self.crop}: learned_variance needs the whole clip")
        self._check_super_resolution()

    def _check_super_resolution(self) -> None:
        model, (r, s) = self.model, self.model.times
        if (self.augmentation is None) == bool(model.low_copies):
            raise ValueError("augmentation belongs to model.low_frames and low_size")
        if self.augmentation is not None and not self.augmentation[0] <= self.augmentation[1]:
            raise ValueError(f"augmentation must not fall, got {self.augmentation}")
        if self.images and r > 1:
            raise ValueError(f"images {self.images}: a single frame has no frames between")
        for name, part, whole, step, seen in (
            ("crop", self.crop, model.image_size, math.lcm(s, model.step), model.sees_crops),
            ("window", self.window, model.num_frames, r, model.sees_windows),
        ):
            if part is None:
                continue
            if not seen:
                raise ValueError(f"{name} {part}: the network needs the whole clip")
            if part > whole or part < 1 or part % step:
                raise ValueError(f"{name} {part} must be a multiple of {step}, at most {whole}")

    @property
    def part(self) -> tuple[int, int]:
        """Frames and pixels of the part of a clip that it trains on."""
        return self.window or self.model.num_frames, self.crop or self.model.image_size


@dataclass(frozen=True)
class _Part:
    """The clips of a batch, or its images, with noise."""

    what: Literal["clips", "images"]
    x0: Tensor
    t: Tensor
    noised: Noised
    condition: Condition
    low: Low | None


def join_frames(parts: list[Tensor], images: int) -> Tensor:
    """Clips (B, C, F, H, W) and then B x J images (B J, C, 1, H, W), or one of the two, as
    (B, C, F + J, H, W).
    """
    if not images:
        return parts[0]
    stills = parts[-1].squeeze(2).unflatten(0, (-1, images)).transpose(1, 2)
    return torch.cat([*parts[:-1], stills], dim=2)


def split_frames(joined: Tensor, images: int) -> list[Tensor]:
    """The inverse of `join_frames`."""
    frames = joined.shape[2] - images
    clips = [joined[:, :, :frames]] if frames else []
    if not images:
        return clips
    return [*clips, joined[:, :, frames:].transpose(1, 2).flatten(0, 1).unsqueeze(2)]


def join_low(parts: list[Low], images: int) -> Low | None:
    """`join_frames` for the smaller clips; None where there are none."""
    if not parts:
        return None
    frames = join_frames([part.frames for part in parts], images)
    place = parts[0].place if len(parts) > bool(images) else frames.new_empty(len(frames), 0)
    return Low(frames, torch.cat([part.log_snr for part in parts]), place)


def decoder_stage(
    name: str,
    section: UnetSection,
    conditions: Conditions,
    sampling: ClipSampling,
    seed: int,
) -> Stage:
    """The stage of one U-Net ("base", "tsr", "ssr"), on a view of the stored clips where they are
    larger.

    Raises ConfigError where the stored size or number of frames is no multiple of the network's.
    """
    clip, diffusion = conditions.clip, section.diffusion
    data, model = conditions.train_set.store.settings, section.model
    fps = data.view_fps(model.num_frames)
    if not has_view(data.num_frames, data.size, model.num_frames, model.image_size):
        raise ConfigError(
            f"unets.{name}.model makes {model.num_frames} frames of {model.image_size} px, the "
            f"clips in {conditions.train_set.store.root} have {data.num_frames} frames of "
            f"{data.size} px"
        )
    encode = TextEncoder(clip)
    drop = dataclasses.asdict(section.drop)

    def fitted(condition: Condition) -> Condition:
        """A compiled network is built anew for every number of tokens, so these are few."""
        if not section.compile:
            return condition
        return condition.padded(-(-condition.text.shape[1] // TOKENS_STEP) * TOKENS_STEP)

    def noised(batch: Batch, step: StepInfo, what: Literal["clips", "images"]) -> _Part:
        assert batch.frames is not None and batch.embeddings is not None
        stream, frames = (name, model.num_frames) if what == "clips" else (f"{name}/image", 1)
        sample_ids, (window, crop) = batch.sample_ids, section.part
        part = min(frames, window), crop
        whole = frames, model.image_size
        corners = draw_corners(whole, part, model.times, step.seed, sample_ids, stream)
        x0 = part_of(batch.frames, whole, corners, part)
        text = encode(batch)
        times = draw_times(step.seed, sample_ids, stream)
        if model.learned_variance:
            times = on_grid(times, diffusion.variance_steps)
        t = times.to(step.device, non_blocking=True)
        shape = x0.shape[1:]
        eps = keyed.randn(shape, step.seed, sample_ids, f"{stream}/noise", step.device)
        dropped = "drop" if what == "clips" else f"{stream}/drop"
        keep = keep_masks(drop, step.seed, batch.sample_ids, dropped)
        keep_embedding, keep_text = (mask.to(step.device, non_blocking=True) for mask in keep)
        condition = Condition(
            batch.embeddings,
            keep_embedding,
            text.states,
            text.place,
            text.embedding,
            keep_text,
        )
        low = None
        if section.augmentation is not None:
            low = noisy_low(
                batch.frames, model, section.augmentation, corners, part, step, sample_ids, stream
            )
            if model.residual:
                x0 = (x0 - blend(low.frames, low.log_snr, model.times)) / model.residual
        return _Part(what, x0, t, add_noise(diffusion, x0, t, eps), condition, low)

    def objective(unet: nn.Module, batch: Batch, step: StepInfo) -> Loss:
        parts, images = [], 0
        if batch.images is not None:
            parts = [noised(batch.images, step, "images")]
            images = section.images
        if not images or not shared_coin(section.image_only, step, "image_only"):
            parts.insert(0, noised(batch, step, "clips"))
        z = join_frames([part.noised.z for part in parts], images)
        log_snr = torch.cat([part.noised.log_snr for part in parts])
        condition = fitted(reduce(Condition.cat, [part.condition for part in parts]))
        low = join_low([part.low for part in parts if part.low is not None], images)
        before = None
        # validation, which runs without gradient, goes the way of sampling
        if model.self_condition and (
            not torch.is_grad_enabled() or shared_coin(0.5, step, "self_condition")
        ):
            with torch.no_grad():
                guess, _ = split_output(
                    unet(z, log_snr, condition, images, None, low), model.channels
                )
                clean = [
                    to_x0(diffusion.prediction, one.float(), part.noised.z, part.noised.log_snr)
                    for one, part in zip(split_frames(guess, images), parts, strict=True)
                ]
                before = join_frames(clean, images).clamp(-1, 1)
        outs = split_frames(unet(z, log_snr, condition, images, before, low), images)
        losses: dict[str, Tensor] = {}
        bits: dict[str, Tensor] = {}
        for out, part in zip(outs, parts, strict=True):
            prediction, raw = split_output(out, model.channels)
            given = None
            if model.low_copies == 2:
                given = known_frames(prediction.shape[2], model.times, step.device)
            error = per_sample_loss(diffusion, prediction, part.noised, given)
            losses[part.what] = error.mean()
            if raw is not None:
                more = variance_loss(diffusion, prediction, raw, part.noised, part.t, part.x0)
                bits[part.what] = more.mean()
        frames = {"clips": z.shape[2] - images, "images": images}  # every frame counts alike
        loss = sum(frames[what] * one for what, one in losses.items()) / z.shape[2]
        assert isinstance(loss, Tensor)
        metrics = {f"loss_{what}": one.detach() for what, one in losses.items()} if images else {}
        if bits:
            variance = sum(frames[what] * one for what, one in bits.items()) / z.shape[2]
            assert isinstance(variance, Tensor)
            metrics |= {"loss_simple": loss.detach(), "loss_variance": variance.detach()}
            loss = loss + variance
        return Loss(loss, metrics)

    def samples(unet: nn.Module, accelerator: Accelerator) -> list[Sample]:
        """Clips of `val` from their own captions and their own video embeddings, and their own
        smaller clips.
        """
        dataset = conditions.val_set
        pointers = [dataset.eval_pointer(i) for i in range(min(SAMPLES, len(dataset)))]
        batch = dataset.collate(pointers).to(accelerator.device)
        assert batch.embeddings is not None
        text = encode(batch)
        condition = fitted(Condition.of(batch.embeddings, text.states, text.place, text.embedding))
        low = None
        if model.low_frames is not None:
            assert batch.frames is not None
            low = to_float(batch.frames, model.low_frames, model.low_size)
        video = sample_clips(
            unet, model, diffusion, condition, batch.sample_ids, sampling, seed, low, stream=name
        )
        frames = to_uint8(video).cpu().numpy()
        captions = [" ".join(lines) for lines in batch.captions]
        return [Sample(c, f, fps) for c, f in zip(captions, frames, strict=True)]

    torch.manual_seed(keyed.key(seed, 0, f"{name}/init"))
    unet = Unet3D(section.model, clip.embed_dim, clip.text_width)
    unet.condition.fit(conditions.examples())
    unet.activation_checkpointing = section.activation_checkpointing
    if section.compile:
        if splits_weights():
            raise ConfigError(
                f"unets.{name}.compile: torch.compile is for one process or DDP; DeepSpeed and "
                "FSDP gather the weights of each layer by hooks, which it cannot trace"
            )
        unet.compile(dynamic=False)  # torch 2.14 mistakes strides where shapes are symbols
    return Stage(
        name=name,
        model=unet,
        objective=objective,
        train_set=conditions.train_set,
        val_set=conditions.val_set,
        samples=samples,
        config={
            "model": dataclasses.asdict(section.model),
            "diffusion": dataclasses.asdict(diffusion),
            "embedding_dim": clip.embed_dim,
            "text_dim": clip.text_width,
            "fps": fps,
        },
        meta={"clip_hash": conditions.clip_hash},
    )
