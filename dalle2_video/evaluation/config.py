"""How a run is judged: the section `evaluate` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from dalle2_video.config import Size, config_class


@config_class
class EvaluateConfig:
    """How a run is judged."""

    metric: Literal["attributes", "nearest", "nll"] = "attributes"
    """attributes: what a probe reads from samples (embedded faces); nearest: does a sample show
    its own clip?; nll: the bound on a clip's bits per dimension, by the first U-Net."""
    split: str = "heldout"
    """The split whose captions are sampled."""
    clips: PositiveInt = 256
    """How many of its clips."""
    draws: Size = 20
    """Diffusion steps that stand for all of them, of nll."""
