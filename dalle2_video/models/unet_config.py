"""Sizes of a Unet3D, and what follows from them."""

from __future__ import annotations

from typing import Literal

from dalle2_video.config import config_class


@config_class
class UnetConfig:
    """Sizes of a Unet3D.

    image_size, num_frames: of the clips it is trained on. patch: pixel-unshuffle stem (1: none).
    mults: width of each level over dim; each level has half the resolution of the one before.
    attention, cross_attention: per level. temporal: over the frames, attention beside the spatial
    one, or convolution at every level. self_condition: it also sees its last estimate of the clip
    (Chen et al. 2022, Analog Bits, section 3).

    num_lowres_frames, lowres_size: of the smaller clip (low resolution) that a super-resolution
    network is given; None: it is none.
    residual: what is diffused is the difference to that clip, resized and blended, over this
    number, which should be about its root mean square; 0: the clip itself.

    learned_variance: as many channels more, of which diffusion/variance.py makes the fraction of
    each frequency; for networks without a smaller clip.
    """

    image_size: int = 32
    num_frames: int = 8
    channels: int = 3
    patch: int = 4
    dim: int = 128
    mults: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[bool, ...] = (True, True)
    cross_attention: tuple[bool, ...] = (False, True)
    temporal: Literal["attention", "convolution"] = "attention"
    head_dim: int = 64
    cond_dim: int = 256
    embedding_tokens: int = 4
    dropout: float = 0.0
    self_condition: bool = False
    num_lowres_frames: int | None = None
    lowres_size: int | None = None
    residual: float = 0.0
    learned_variance: bool = False

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
                raise ValueError(f"dim {self.dim} x {mult} is no multiple of {self.head_dim}")
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
        if min(self.num_lowres_frames, self.lowres_size) < 1:
            raise ValueError(
                f"num_lowres_frames {self.num_lowres_frames} and lowres_size {self.lowres_size} "
                "must be 1 or more"
            )
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
