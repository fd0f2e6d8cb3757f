"""Training of a U-Net of the cascade: its objective, its sample videos, and its Stage.

Ho et al. 2022 (2204.03458) with the conditions of DALL-E 2 (Ramesh et al. 2022, section 2.1);
super-resolution as in Ho et al. Oct 2022 (2210.02303), on random crops of a clip in space and time.

B clips, J images beside each, C channels, F frames, H W.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video import keyed
from dalle2_video.config import ConfigError
from dalle2_video.data.media.tensors import has_view, to_float, to_uint8
from dalle2_video.data.store.dataset import Batch
from dalle2_video.diffusion.objective import Noised, add_noise, per_sample_loss, variance_loss
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.variance import on_grid, split_output
from dalle2_video.models.conditioning import Condition, LowRes
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.pipeline.sampling import sample_clips
from dalle2_video.pipeline.sampling_config import UnetSampling
from dalle2_video.pipeline.super_resolution import Corner, SuperResolution, diffused_by
from dalle2_video.stages.frozen_clip import (
    Conditions,
    TextEncoder,
    draw_t,
    keep_masks,
    shared_coin,
)
from dalle2_video.stages.joint import join_frames, join_lowres, split_frames
from dalle2_video.stages.sections import UnetSection
from dalle2_video.stages.super_resolution import crop_of, draw_corners, draw_lowres
from dalle2_video.training.accelerator import splits_weights
from dalle2_video.training.stage import Loss, Sample, Stage, StepInfo

SAMPLES = 8
TOKENS_MULTIPLE = 128  # text tokens are padded to a multiple of it for a compiled network
Kind = Literal["clips", "images"]


@dataclass(frozen=True)
class Part:
    """The clips of a batch, or its images, with noise. target: what is diffused, without noise."""

    kind: Kind
    target: Tensor
    t: Tensor
    noised: Noised
    condition: Condition
    lowres: LowRes | None


class UnetObjective:
    """The loss of one U-Net ("base", "tsr", "ssr") on a batch: noise, one or two forward passes,
    and the weighted squared error of clips and images, every frame weighing the same.
    """

    def __init__(self, name: str, section: UnetSection, encode: TextEncoder) -> None:
        self.name, self.section, self.encode = name, section, encode
        self.model, self.diffusion = section.model, section.diffusion
        self.task = diffused_by(section.model)

    def __call__(self, unet: nn.Module, batch: Batch, step: StepInfo) -> Loss:
        parts, num_images = self.parts(batch, step)
        z = join_frames([part.noised.z for part in parts], num_images)
        log_snr = torch.cat([part.noised.log_snr for part in parts])
        condition = self.fitted(reduce(Condition.cat, [part.condition for part in parts]))
        lowres = [part.lowres for part in parts if part.lowres is not None]
        inputs = z, log_snr, condition, num_images
        given = join_lowres(lowres, num_images)
        x0_prev = None
        # validation, which runs without gradient, goes the way of sampling
        if self.model.self_condition and (
            not torch.is_grad_enabled() or shared_coin(0.5, step, "self_condition")
        ):
            with torch.no_grad():
                guess = unet(*inputs, None, given)
                x0_prev = self.estimate(guess, parts, num_images)
        outs = split_frames(unet(*inputs, x0_prev, given), num_images)
        return self.loss(outs, parts, num_images, z.shape[2])

    def parts(self, batch: Batch, step: StepInfo) -> tuple[list[Part], int]:
        """The clips, the images or both that this step trains on, and J."""
        if batch.images is None:
            return [self.noised(batch, step, "clips")], 0
        images = self.noised(batch.images, step, "images")
        if shared_coin(self.section.image_only_prob, step, "image_only"):
            return [images], self.section.num_images
        return [self.noised(batch, step, "clips"), images], self.section.num_images

    def noised(self, batch: Batch, step: StepInfo, kind: Kind) -> Part:
        """Crops of the clips with noise, their condition and their smaller clips."""
        assert batch.frames is not None
        frames = self.model.num_frames if kind == "clips" else 1
        stream = self.name if kind == "clips" else f"{self.name}/image"
        crop = min(frames, self.section.crop_size[0]), self.section.crop_size[1]
        whole, ids = (frames, self.model.image_size), batch.sample_ids
        corners = draw_corners(whole, crop, self.model.upscale, step.seed, ids, stream)
        x0 = crop_of(batch.frames, whole, corners, crop)
        t = draw_t(step.seed, ids, stream)
        if self.model.learned_variance:
            t = on_grid(t, self.diffusion.variance_steps)
        t = t.to(step.device, non_blocking=True)
        eps = keyed.randn(x0.shape[1:], step.seed, ids, f"{stream}/noise", step.device)
        condition = self.condition(batch, step, "drop" if kind == "clips" else f"{stream}/drop")
        lowres = self.lowres(batch, corners, crop, step, stream)
        target = self.task.to_target(x0, lowres)
        return Part(kind, target, t, add_noise(self.diffusion, target, t, eps), condition, lowres)

    def condition(self, batch: Batch, step: StepInfo, stream: str) -> Condition:
        """Embeddings and texts of the clips, with what this step drops; stream keys the draws."""
        text = self.encode(batch)
        rates = dataclasses.asdict(self.section.cond_dropout)
        keep = keep_masks(rates, step.seed, batch.sample_ids, stream)
        keep_embedding, keep_text = (mask.to(step.device, non_blocking=True) for mask in keep)
        assert batch.embeddings is not None
        return Condition(
            batch.embeddings, keep_embedding, text.states, text.place, text.embedding, keep_text
        )

    def lowres(
        self,
        batch: Batch,
        corners: list[Corner],
        crop: tuple[int, int],
        step: StepInfo,
        stream: str,
    ) -> LowRes | None:
        """The smaller clips, for super-resolution."""
        if not isinstance(self.task, SuperResolution):
            return None
        assert batch.frames is not None and self.section.augmentation is not None
        noise = self.section.augmentation
        return draw_lowres(
            batch.frames, self.task, noise, corners, crop, step, batch.sample_ids, stream
        )

    def estimate(self, out: Tensor, parts: list[Part], num_images: int) -> Tensor:
        """x0 of all parts from a network's output, as self-conditioning shows it."""
        prediction, _ = split_output(out, self.model.channels)
        clean = [
            to_x0(self.diffusion.prediction, one.float(), part.noised.z, part.noised.log_snr)
            for one, part in zip(split_frames(prediction, num_images), parts, strict=True)
        ]
        return join_frames(clean, num_images).clamp(-1, 1)

    def loss(self, outs: list[Tensor], parts: list[Part], num_images: int, frames: int) -> Loss:
        """The mean over all `frames` frames (F + J) of a network's outputs for these parts."""
        losses: dict[Kind, Tensor] = {}
        bits: dict[Kind, Tensor] = {}
        for out, part in zip(outs, parts, strict=True):
            prediction, raw = split_output(out, self.model.channels)
            known = self.task.known(prediction.shape[2], prediction.device)
            losses[part.kind] = per_sample_loss(
                self.diffusion, prediction, part.noised, known
            ).mean()
            if raw is not None:
                bits[part.kind] = variance_loss(
                    self.diffusion, prediction, raw, part.noised, part.t, part.target
                ).mean()
        counts: dict[Kind, int] = {"clips": frames - num_images, "images": num_images}

        def over_frames(values: dict[Kind, Tensor]) -> Tensor:
            return reduce(torch.add, [counts[kind] * x for kind, x in values.items()]) / frames

        loss = over_frames(losses)
        metrics = {f"loss_{kind}": one.detach() for kind, one in losses.items() if num_images}
        if bits:
            variance = over_frames(bits)
            metrics |= {"loss_simple": loss.detach(), "loss_variance": variance.detach()}
            loss = loss + variance
        return Loss(loss, metrics)

    def fitted(self, condition: Condition) -> Condition:
        """A compiled network is built again for every number of tokens, so these are few."""
        if not self.section.compile:
            return condition
        tokens = -(-condition.text.shape[1] // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        return condition.padded(tokens)


def unet_stage(
    name: str,
    section: UnetSection,
    conditions: Conditions,
    sampling: UnetSampling,
    seed: int,
) -> Stage:
    """The stage of one U-Net ("base", "tsr", "ssr"), on a view of the stored clips where they are
    larger.

    Raises ConfigError where the stored size or number of frames is no multiple of the network's.
    """
    data, model = conditions.train_set.store.settings, section.model
    if not has_view(data.num_frames, data.size, model.num_frames, model.image_size):
        raise ConfigError(
            f"unets.{name}.model makes {model.num_frames} frames of {model.image_size} px, the "
            f"clips in {conditions.train_set.store.root} have {data.num_frames} frames of "
            f"{data.size} px"
        )
    fps, video_clip = data.view_fps(model.num_frames), conditions.video_clip
    objective = UnetObjective(name, section, TextEncoder(video_clip))

    def samples(unet: nn.Module, accelerator: Accelerator) -> list[Sample]:
        batch = first_clips(conditions, accelerator)
        frames = to_uint8(sample_own(unet, batch, objective, sampling, seed)).cpu().numpy()
        captions = [" ".join(lines) for lines in batch.captions]
        return [Sample(c, f, fps) for c, f in zip(captions, frames, strict=True)]

    return Stage(
        name=name,
        model=build_unet(name, section, conditions, seed),
        objective=objective,
        train_set=conditions.train_set,
        val_set=conditions.val_set,
        samples=samples,
        config={
            "model": dataclasses.asdict(section.model),
            "diffusion": dataclasses.asdict(section.diffusion),
            "embedding_dim": video_clip.embed_dim,
            "text_dim": video_clip.text_width,
            "fps": fps,
        },
        meta={"clip_hash": conditions.clip_hash},
    )


def build_unet(name: str, section: UnetSection, conditions: Conditions, seed: int) -> Unet3D:
    """The network at its start: weights keyed by (seed, name), conditions whitened by the data."""
    video_clip = conditions.video_clip
    torch.manual_seed(keyed.key(seed, 0, f"{name}/init"))
    unet = Unet3D(section.model, video_clip.embed_dim, video_clip.text_width)
    unet.condition.fit(conditions.examples())
    unet.activation_checkpointing = section.activation_checkpointing
    if section.compile:
        if splits_weights():
            raise ConfigError(
                f"unets.{name}.compile: torch.compile is for one process or DDP; DeepSpeed and "
                "FSDP gather the weights of each layer by hooks, which it cannot trace"
            )
        unet.compile(dynamic=False)  # torch 2.14 mistakes strides where shapes are symbols
    return unet


def first_clips(conditions: Conditions, accelerator: Accelerator) -> Batch:
    """The first clips of the validation set, on the device."""
    dataset = conditions.val_set
    pointers = [dataset.eval_pointer(i) for i in range(min(SAMPLES, len(dataset)))]
    return dataset.collate(pointers).to(accelerator.device)


def sample_own(
    unet: nn.Module, batch: Batch, objective: UnetObjective, sampling: UnetSampling, seed: int
) -> Tensor:
    """Clips (B, C, F, H, W) from the batch's own captions, video embeddings and smaller clips."""
    model = objective.model
    assert batch.embeddings is not None
    text = objective.encode(batch)
    condition = Condition.of(batch.embeddings, text.states, text.place, text.embedding)
    lowres = None
    if model.num_lowres_frames is not None:
        assert batch.frames is not None
        lowres = to_float(batch.frames, model.num_lowres_frames, model.lowres_size)
    return sample_clips(
        unet,
        model,
        objective.diffusion,
        objective.fitted(condition),
        batch.sample_ids,
        sampling,
        seed,
        lowres,
        stream=objective.name,
    )
