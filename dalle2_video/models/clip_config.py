"""Sizes of the video CLIP's two towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat

from dalle2_video.config import Depth, Size, config_class


@config_class
class VideoTowerConfig:
    """Sizes of the video tower, a ViViT."""

    image_size: Size
    """Side of a frame in pixels."""
    num_frames: Size
    """Frames of a clip."""
    patch: tuple[Size, Size]
    """Height and width of a patch in pixels."""
    tubelet: Size
    """Frames that one token spans."""
    width: Size
    """Width of both transformers."""
    spatial_layers: Depth
    """Layers of the transformer over the patches of a tubelet index."""
    temporal_layers: Depth
    """Layers of the transformer over the tubelet indices."""
    heads: Depth
    """Attention heads of each layer."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the hidden layer of an MLP over `width`."""
    embedding: Literal["linear", "conv"] = "linear"
    """What makes tokens of patches: ViViT's linear layer, or strided convolutions."""

    def __post_init__(self) -> None:
        sides = [("height of patch", self.patch[0]), ("width of patch", self.patch[1])]
        for name, part in sides:
            if self.image_size % part:
                raise ValueError(f"{name} {part} does not divide image_size {self.image_size}")
        if self.num_frames % self.tubelet:
            raise ValueError(f"tubelet {self.tubelet} does not divide num_frames {self.num_frames}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        side = self.patch[0]
        if self.embedding == "conv" and (side < 2 or side & (side - 1) or side != self.patch[1]):
            raise ValueError(f"a conv embedding needs a square patch of 2^n, not {self.patch}")

    @property
    def num_patches(self) -> int:
        """N, patches of one tubelet index."""
        return (self.image_size // self.patch[0]) * (self.image_size // self.patch[1])

    @property
    def num_tubelets(self) -> int:
        """T, tubelet indices."""
        return self.num_frames // self.tubelet


@config_class
class TrainedTextConfig:
    """Sizes of a text tower that is trained from scratch together with the video tower."""

    width: Size
    """Width of the transformer."""
    layers: Depth
    """Layers of the transformer."""
    heads: Depth
    """Attention heads of each layer."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the hidden layer of an MLP over `width`."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")


@config_class
class PretrainedTextConfig:
    """The text tower of an open_clip model."""

    name: str
    """open_clip's model name, such as ViT-B-32 (ViT-B-32-quickgelu for OpenAI's weights)."""
    weights: str
    """Path of a checkpoint of that whole model, or a tag that open_clip knows for the name."""
    frozen: bool = True
    """Not trained, and not part of our checkpoints."""
    sha256: str | None = None
    """Hash of the tower's weights (`weights_sha256`); where given, other weights are an error."""


@config_class
class VideoCLIPConfig:
    """Both towers and the dimension that they share."""

    embed_dim: Size
    """D, the dimension that both towers project to."""
    video: VideoTowerConfig
    """The video tower."""
    text: TrainedTextConfig | PretrainedTextConfig
    """The text tower."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> VideoCLIPConfig:
        """The inverse of `to_dict`; a text section with a `name` is a pretrained tower."""
        video = dict(values["video"])
        video["patch"] = tuple(video["patch"])
        text = values["text"]
        kind = PretrainedTextConfig if "name" in text else TrainedTextConfig
        return VideoCLIPConfig(values["embed_dim"], VideoTowerConfig(**video), kind(**text))
