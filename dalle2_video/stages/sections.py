"""The sections `clip`, `prior` and `unets.*` of the configuration, with their defaults."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveFloat

from dalle2_video.config import Depth, FilePath, LogSNR, Share, Size, config_class, default
from dalle2_video.data.config import CaptionPolicy
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.models.clip_config import (
    PretrainedTextConfig,
    TrainedTextConfig,
    VideoCLIPConfig,
    VideoTowerConfig,
)
from dalle2_video.models.prior_config import PriorConfig
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.training.config import TrainConfig


@config_class
class TextSection:
    """The text tower: open_clip's where `name` is given, otherwise a small one to train."""

    name: str | None = "ViT-B-32"
    """open_clip's model name (ViT-B-32-quickgelu for OpenAI's weights); null: a tower of its own
    sizes, trained from scratch."""
    weights: FilePath | None = "laion2b_s34b_b79k"
    """Path of a checkpoint of that model, or a tag that open_clip knows; downloaded at first."""
    frozen: bool = True
    """open_clip's tower is not trained, and is no part of our checkpoints."""
    width: Size = 512
    """Width of a tower of its own."""
    layers: Depth = 12
    """Layers of a tower of its own."""
    heads: Depth = 8
    """Attention heads of a tower of its own."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the hidden layer of an MLP over `width`, of a tower of its own."""

    def __post_init__(self) -> None:
        if self.name is not None and self.weights is None:
            raise ValueError(f"weights: needed with name={self.name} (a path or an open_clip tag)")
        _ = self.tower()  # raises ValueError

    def tower(self) -> TrainedTextConfig | PretrainedTextConfig:
        """The config of the tower that this section asks for."""
        if self.name is None:
            return TrainedTextConfig(self.width, self.layers, self.heads, self.mlp_ratio)
        assert self.weights is not None
        return PretrainedTextConfig(self.name, self.weights, self.frozen)


@config_class
class ModelSection:
    """Both towers and the dimension that they share."""

    embed_dim: Size = 512
    """D, the dimension of the embedding that both towers project to."""
    video: VideoTowerConfig = default(
        lambda: VideoTowerConfig(
            image_size=64,
            num_frames=16,
            patch=(8, 8),
            tubelet=2,
            width=768,
            spatial_layers=12,
            temporal_layers=4,
            heads=12,
        )
    )
    """The video tower."""
    text: TextSection = default(TextSection)
    """The text tower."""

    def model_config(self) -> VideoCLIPConfig:
        """What VideoCLIP takes."""
        return VideoCLIPConfig(self.embed_dim, self.video, self.text.tower())


@config_class
class ClipSection:
    """The video CLIP and its training."""

    images: bool = False
    """Whether images of the data take part, as still videos."""
    captions: CaptionPolicy = default(CaptionPolicy)
    """Which of a clip's lines it meets in training."""
    model: ModelSection = default(ModelSection)
    """Sizes of the network."""
    train: TrainConfig = default(
        lambda: TrainConfig(
            batch_size=512,
            clips=3_000_000,
            warmup_clips=100_000,
            lr_schedule="cosine",
            weight_decay=0.2,
            betas=(0.9, 0.98),
            ema_halflife_clips=None,
            log_every_clips=5_120,
            val_every_clips=256_000,
            save_every_clips=256_000,
        )
    )
    """How long and how to train."""


@config_class
class PriorSection:
    """The prior and its training."""

    images: bool = False
    """Whether images of the data take part, by the embeddings of still videos."""
    captions: CaptionPolicy = default(lambda: CaptionPolicy(join_probability=0.4))
    """Which of a clip's lines it meets in training."""
    model: PriorConfig = default(
        lambda: PriorConfig(width=1024, layers=12, heads=16, noise_draws=4)
    )
    """Sizes of the network."""
    diffusion: DiffusionConfig = default(lambda: DiffusionConfig(prediction="x0", loss="x0"))
    """Schedule, prediction and loss."""
    text_drop: Share = 0.1
    """Rate of texts that are replaced by the null text."""
    train: TrainConfig = default(
        lambda: TrainConfig(
            batch_size=512,
            clips=10_000_000,
            lr=1.1e-4,
            warmup_clips=500_000,
            lr_schedule="cosine",
            weight_decay=0.06,
            betas=(0.9, 0.96),
            ema_halflife_clips=500_000,
            log_every_clips=10_240,
            val_every_clips=512_000,
            save_every_clips=512_000,
            workers=4,
        )
    )
    """How long and how to train."""


@config_class
class CondDropout:
    """Rates of condition dropout, independent of one another."""

    all: Share = 0.053
    """All conditions at once."""
    embedding: Share = 0.1
    """The embedding alone."""
    text: Share = 0.5
    """The text alone."""


@config_class
class UnetSection:
    """A U-Net of the cascade and its training."""

    captions: CaptionPolicy = default(lambda: CaptionPolicy(join_probability=0.4))
    """Which of a clip's lines it meets in training."""
    model: UnetConfig = default(
        lambda: UnetConfig(
            image_size=64,
            num_frames=16,
            patch=1,
            mults=(1, 2, 4, 8),
            blocks=2,
            attention=(False, True, True, True),
            cross_attention=(False, False, True, True),
            cond_dim=512,
        )
    )
    """Sizes of the network."""
    diffusion: DiffusionConfig = default(
        lambda: DiffusionConfig(log_snr_min=-20.0, log_snr_max=20.0)
    )
    """Schedule, prediction and loss."""
    cond_dropout: CondDropout = default(CondDropout)
    """Rates of condition dropout."""
    augmentation: tuple[LogSNR, LogSNR] | None = None
    """Log-SNRs between which the noise of the smaller clip is drawn evenly (super-resolution
    alone); 10 is as good as none."""
    crop: Size | None = None
    """Side in pixels of what it trains on of each clip, for networks without attention over pixels;
    null: all."""
    crop_frames: Size | None = None
    """Frames of what it trains on of each clip, for networks without attention over frames; null:
    all."""
    num_images: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Independent frames that are appended to each clip: joint image-video training (Ho et al.
    2022, section 3; 8 for UCF101)."""
    image_only_prob: Share = 0.0
    """Share of the optimizer steps that train on those frames alone."""
    activation_checkpointing: bool = False
    """Less memory for about a third more time."""
    compile: bool = False
    """torch.compile; its first steps take minutes, once for each number of text tokens."""
    train: TrainConfig = default(lambda: TrainConfig(clips=25_600_000))
    """How long and how to train."""

    def __post_init__(self) -> None:
        if self.image_only_prob and not self.num_images:
            raise ValueError(f"image_only_prob {self.image_only_prob} needs num_images, which is 0")
        if self.model.learned_variance and self.crop is not None:
            raise ValueError(f"crop {self.crop}: learned_variance needs the whole clip")
        self._check_super_resolution()

    def _check_super_resolution(self) -> None:
        model, (r, s) = self.model, self.model.upscale
        if (self.augmentation is None) == bool(model.lowres_copies):
            raise ValueError("augmentation belongs to model.num_lowres_frames and lowres_size")
        if self.augmentation is not None and not self.augmentation[0] <= self.augmentation[1]:
            raise ValueError(f"augmentation must not fall, got {self.augmentation}")
        if self.num_images and r > 1:
            raise ValueError(f"num_images {self.num_images}: a single frame has no frames between")
        for name, crop, whole, multiple, allowed in (
            (
                "crop",
                self.crop,
                model.image_size,
                math.lcm(s, model.size_multiple),
                model.is_local_in_space,
            ),
            ("crop_frames", self.crop_frames, model.num_frames, r, model.is_local_in_time),
        ):
            if crop is None:
                continue
            if not allowed:
                raise ValueError(f"{name} {crop}: the network needs the whole clip")
            if crop > whole or crop < 1 or crop % multiple:
                raise ValueError(f"{name} {crop} must be a multiple of {multiple}, at most {whole}")

    @property
    def crop_size(self) -> tuple[int, int]:
        """Frames and pixels of a side of the crop of a clip that it trains on."""
        return self.crop_frames or self.model.num_frames, self.crop or self.model.image_size
