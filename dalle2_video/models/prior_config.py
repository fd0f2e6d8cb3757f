"""Sizes of the prior's transformer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from dalle2_video.config import Depth, Size, config_class


@config_class
class PriorConfig:
    """Sizes of the prior's transformer."""

    width: Size
    """Width of the transformer."""
    layers: Depth
    """Layers of the transformer."""
    heads: Depth
    """Attention heads of each layer."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the hidden layer of an MLP over `width`."""
    noise_draws: Size = 1
    """K, noised embeddings per text in training, which share the pass over the text."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rate of dropout in the blocks."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
