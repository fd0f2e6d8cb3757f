"""Small super-resolution U-Nets, conditions and smaller clips for them."""

import dataclasses

import torch
import torch.nn.functional as F

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.lowres import fit
from dalle2_video.models.conditioning import Condition, LowRes
from dalle2_video.models.unet_config import UnetConfig

CONV = UnetConfig(
    image_size=16, num_frames=8, patch=2, dim=32, mults=(1, 2), head_dim=16, cond_dim=32,
    attention=(False, False), cross_attention=(False, False), temporal="convolution",
    num_lowres_frames=4, lowres_size=16,
)  # fmt: skip
SSR = dataclasses.replace(CONV, num_lowres_frames=8, lowres_size=8)
BOTH = dataclasses.replace(CONV, num_lowres_frames=4, lowres_size=8)
X0 = DiffusionConfig(prediction="x0")


def condition(batch: int) -> Condition:
    torch.manual_seed(1)
    place = torch.tensor([0, 1, 2, 0, 1]).repeat(batch, 1)
    embedding, whole = F.normalize(torch.randn(2, batch, 24), dim=-1)
    return Condition.of(embedding, torch.randn(batch, 5, 12), place, whole)


def lowres_input(
    lowres: torch.Tensor, level: torch.Tensor, model: UnetConfig, first=0, frames=None
) -> LowRes:
    """What the network is given, without noise."""
    fitted = fit(lowres, model.upscale, first, frames)
    place = torch.arange(first, first + fitted.shape[2]).expand(len(lowres), -1)
    return LowRes(fitted, level, place)


def lowres_clip(model: UnetConfig, batch: int = 2, frames: int | None = None) -> torch.Tensor:
    torch.manual_seed(2)
    assert model.num_lowres_frames is not None and model.lowres_size is not None
    return (
        torch.rand(
            batch, 3, frames or model.num_lowres_frames, model.lowres_size, model.lowres_size
        )
        * 2
        - 1
    )
