"""Training of a U-Net of the cascade: its objective, its sample videos, and its Stage.

Ho et al. 2022 (2204.03458) with the conditions of DALL-E 2 (Ramesh et al. 2022, section 2.1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from dalle2_video import keyed
from dalle2_video.data.captions import CaptionPolicy
from dalle2_video.data.dataset import Batch
from dalle2_video.data.video import to_float, to_uint8
from dalle2_video.diffusion.objective import DiffusionConfig, add_noise, per_sample_loss
from dalle2_video.generate import SampleConfig, sample_clips
from dalle2_video.models.unet3d import Condition, Unet3D, UnetConfig
from dalle2_video.training.conditions import Conditions, TextEncoder, draw_times, keep_masks
from dalle2_video.training.stage import ConfigError, Loss, Sample, Stage, StepInfo, TrainConfig

SAMPLES = 8


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
    third more time.
    """

    captions: CaptionPolicy
    model: UnetConfig
    diffusion: DiffusionConfig
    drop: DropSection
    activation_checkpointing: bool
    train: TrainConfig


def decoder_stage(
    name: str,
    section: UnetSection,
    conditions: Conditions,
    sampling: SampleConfig,
    seed: int,
) -> Stage:
    """The stage of one U-Net ("base"), on a view of the stored clips where they are larger.

    Raises ConfigError where the stored size or number of frames is no multiple of the network's.
    """
    clip, diffusion = conditions.clip, section.diffusion
    data, model = conditions.train_set.store.settings, section.model
    fps = data.view_fps(model.num_frames)
    if not data.has_view(model.num_frames, model.image_size):
        raise ConfigError(
            f"unets.{name}.model makes {model.num_frames} frames of {model.image_size} px, the "
            f"clips in {conditions.train_set.store.root} have {data.num_frames} frames of "
            f"{data.size} px"
        )
    encode = TextEncoder(clip)
    drop = dataclasses.asdict(section.drop)
    view = model.num_frames, model.image_size

    def objective(model: nn.Module, batch: Batch, step: StepInfo) -> Loss:
        assert batch.frames is not None and batch.embeddings is not None
        x0 = to_float(batch.frames, *view)
        text = encode(batch)
        t = draw_times(step.seed, step.counters, name).to(step.device)
        eps = keyed.randn(x0.shape[1:], step.seed, step.counters, f"{name}/noise").to(step.device)
        noised = add_noise(diffusion, x0, t, eps)
        keep_embedding, keep_text = keep_masks(drop, step.seed, step.counters)
        condition = Condition(
            batch.embeddings,
            keep_embedding.to(step.device),
            text.states,
            text.place,
            text.embedding,
            keep_text.to(step.device),
        )
        prediction = model(noised.z, noised.log_snr, condition)
        return Loss(per_sample_loss(diffusion, prediction, noised).mean())

    def samples(model: nn.Module, accelerator: Accelerator) -> list[Sample]:
        """Clips of `val` from their own captions and their own video embeddings."""
        dataset = conditions.val_set
        pointers = [dataset.eval_pointer(i) for i in range(min(SAMPLES, len(dataset)))]
        batch = dataset.collate(pointers).to(accelerator.device)
        assert batch.embeddings is not None
        text = encode(batch)
        condition = Condition.of(batch.embeddings, text.states, text.place, text.embedding)
        shape = section.model.clip_shape
        video = sample_clips(model, shape, diffusion, condition, batch.counters, sampling)
        frames = to_uint8(video).cpu().numpy()
        captions = [" ".join(lines) for lines in batch.captions]
        return [Sample(c, f, fps) for c, f in zip(captions, frames, strict=True)]

    torch.manual_seed(keyed.key(seed, 0, f"{name}/init"))
    unet = Unet3D(section.model, clip.embed_dim, clip.text_width)
    unet.condition.fit(conditions.examples())
    unet.activation_checkpointing = section.activation_checkpointing
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
