"""A small Unet3D, inputs for it, and networks whose every path carries something."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet_config import UnetConfig

SMALL = UnetConfig(
    image_size=16, num_frames=4, patch=2, dim=32, mults=(1, 2), head_dim=16, cond_dim=32
)


def awake(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with its zero-initialised layers filled, so that every path carries something."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


def inputs(batch: int = 2, frames: int = 4) -> tuple[Tensor, Tensor, Condition]:
    """Noisy clips (B, 3, F, 16, 16), log-SNRs (B,) and conditions of two lines of text."""
    torch.manual_seed(1)
    place = torch.tensor([0, 1, 2, 0, 1]).repeat(batch, 1)  # two lines, of three tokens and two
    place[0, 3:] = -1
    embedding, whole = F.normalize(torch.randn(2, batch, 24), dim=-1)
    condition = Condition.of(embedding, torch.randn(batch, 5, 12), place, whole)
    return torch.randn(batch, 3, frames, 16, 16), torch.linspace(-3, 3, batch), condition
