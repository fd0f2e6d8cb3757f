"""A section of `unets` in the configuration: one U-Net of the cascade, and how it is trained."""

from __future__ import annotations

import dataclasses
import math

from dalle2_video.config import config_class, default
from dalle2_video.data.sources.captions import CaptionPolicy
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.training.stage import TrainConfig

TOKENS_MULTIPLE = 128  # text tokens are padded to a multiple of it for a compiled network


@config_class
class CondDropout:
    """Rates of condition dropout: all at once, the embedding alone, the text alone
    (independent).
    """

    all: float = 0.053
    embedding: float = 0.1
    text: float = 0.5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")


@config_class
class UnetSection:
    """A section of `unets` in the configuration. activation_checkpointing: less memory, about a
    third more time. compile: torch.compile, whose first steps take minutes, once for each number of
    text tokens (padded to a multiple of TOKENS_MULTIPLE).

    augmentation: log-SNRs between which the noise of the smaller clip is drawn evenly
    (super-resolution alone); 10 is as good as none. crop, crop_frames: pixels of a side and frames
    of what it trains on of each clip, None = all; for networks without attention over them.

    num_images: independent frames that are appended to each clip (joint training, Ho et al. 2022,
    section 3; 8 for UCF101). image_only_prob: share of the steps that train on those alone.
    """

    captions: CaptionPolicy = default(lambda: CaptionPolicy(join_probability=0.4))
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
    diffusion: DiffusionConfig = default(
        lambda: DiffusionConfig(log_snr_min=-20.0, log_snr_max=20.0)
    )
    cond_dropout: CondDropout = default(CondDropout)
    augmentation: tuple[float, float] | None = None
    crop: int | None = None
    crop_frames: int | None = None
    num_images: int = 0
    image_only_prob: float = 0.0
    activation_checkpointing: bool = False
    compile: bool = False
    train: TrainConfig = default(lambda: TrainConfig(clips=25_600_000))

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise ValueError(f"num_images must not be negative, got {self.num_images}")
        if not 0 <= self.image_only_prob <= 1:
            raise ValueError(f"image_only_prob must be in [0, 1], not {self.image_only_prob}")
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
