"""Sizes of a Unet3D, and what follows from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from dalle2_video.config import Depth, Size, config_class


@config_class
class UnetConfig:
    """Sizes of a Unet3D."""

    image_size: Size = 32
    """Side in pixels of the clips that it is trained on."""
    num_frames: Size = 8
    """Frames of the clips that it is trained on."""
    channels: Literal[3] = 3
    """Channels of a frame: RGB."""
    patch: Size = 4
    """Side of the pixel-unshuffle stem in pixels; 1: none."""
    dim: Size = 128
    """Width of the first level."""
    mults: Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)] = (1, 2)
    """Width of each level over `dim`; each level has half the resolution of the one before."""
    blocks: Depth = 1
    """Residual blocks of each level."""
    attention: tuple[bool, ...] = (True, True)
    """Per level: attention over space (and over time, see `temporal`)."""
    cross_attention: tuple[bool, ...] = (False, True)
    """Per level: attention to the text."""
    temporal: Literal["attention", "convolution"] = "attention"
    """What mixes frames: attention beside the spatial one, or convolution at every level."""
    head_dim: Size = 64
    """Width of an attention head."""
    cond_dim: Size = 256
    """Width of the conditions."""
    embedding_tokens: Annotated[int, Field(ge=0, le=1_024)] = 4
    """Tokens that the video embedding is turned into, beside those of the text; 0: none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rate of dropout in the residual blocks."""
    self_condition: bool = False
    """It also sees its last estimate of the clip (Chen et al. 2022, Analog Bits, section 3)."""
    num_lowres_frames: Size | None = None
    """Frames of the smaller clip that a super-resolution network is given; null: it is none."""
    lowres_size: Size | None = None
    """Side in pixels of that clip; null: it is none."""
    residual: NonNegativeFloat = 0.0
    """What is diffused is the difference to that clip, resized and blended, over this number, which
    should be about its root mean square; 0: the clip itself."""
    learned_variance: bool = False
    """As many channels more, of which diffusion/variance.py makes the fraction of each frequency;
    for networks without a smaller clip."""

    def __post_init__(self) -> None:
        levels = len(self.mults)
        if len(self.attention) != levels or len(self.cross_attention) != levels:
            raise ValueError(
                f"attention {self.attention} and cross_attention {self.cross_attention} need one "
                f"entry per level of mults {self.mults}"
            )
        if self.image_size % self.size_multiple:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.size_multiple}")
        for mult in self.mults:
            if self.dim * mult % self.head_dim:
                raise ValueError(
                    f"dim {self.dim} x {mult} is no multiple of head_dim {self.head_dim}"
                )
        if (self.num_lowres_frames is None) != (self.lowres_size is None):
            raise ValueError(
                "num_lowres_frames and lowres_size belong together: give both or neither"
            )
        if self.num_lowres_frames is None or self.lowres_size is None:
            if self.residual:
                raise ValueError("residual needs num_lowres_frames and lowres_size")
            return
        if self.learned_variance:
            raise ValueError(
                "learned_variance is for networks without num_lowres_frames and lowres_size"
            )
        if self.residual and self.self_condition:
            raise ValueError("self_condition shows pixels: not with residual")
        if self.num_frames % self.num_lowres_frames or self.image_size % self.lowres_size:
            raise ValueError(
                f"num_frames {self.num_frames} and image_size {self.image_size} must be multiples "
                f"of num_lowres_frames {self.num_lowres_frames} and lowres_size {self.lowres_size}"
            )
        if self.upscale == (1, 1):
            raise ValueError("num_lowres_frames and lowres_size are those of the clip itself")

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip."""
        return self.channels, self.num_frames, self.image_size, self.image_size

    @property
    def size_multiple(self) -> int:
        """What the sides of its clips are multiples of."""
        return self.patch * 2 ** (len(self.mults) - 1)

    @property
    def upscale(self) -> tuple[int, int]:
        """Factors in frames and in pixels over the smaller clip; (1, 1) where there is none."""
        if self.num_lowres_frames is None or self.lowres_size is None:
            return 1, 1
        return self.num_frames // self.num_lowres_frames, self.image_size // self.lowres_size

    @property
    def lowres_copies(self) -> int:
        """How many frames of the smaller clip each frame is given: those before and after it, or
        the same one.
        """
        return 0 if self.num_lowres_frames is None else 1 if self.upscale[0] == 1 else 2

    @property
    def is_local_in_time(self) -> bool:
        """Whether it runs on a stretch of a longer clip: no attention ties its frames together, and
        their places in the whole clip are an input (`LowRes.place`).
        """
        tied = self.temporal == "attention" and any(self.attention)
        return bool(self.lowres_copies) and not tied

    @property
    def is_local_in_space(self) -> bool:
        """Whether it runs on crops of a larger clip: no attention ties its pixels together."""
        return not any(self.attention)
