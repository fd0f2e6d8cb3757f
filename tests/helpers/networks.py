"""A small Unet3D, inputs for it, and networks whose every path carries something."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.whitening import Examples

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


def prior_inputs(batch: int = 2, draws: int = 3) -> tuple[Tensor, ...]:
    """Of a prior: noised (B, K, 24), log-SNRs (B, K), text (B, 5, 12), its mask and embedding, and
    which texts are kept: all.
    """
    torch.manual_seed(2)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    embedding = F.normalize(torch.randn(batch, 24), dim=-1)
    text = torch.randn(batch, 5, 12)
    keep = torch.ones(batch, dtype=torch.bool)
    return torch.randn(batch, draws, 24), torch.randn(batch, draws), text, mask, embedding, keep


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """Values in [-1, 1] that look random and are the same on every machine."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(count * 1.7 + 0.01 * count.square() + phase).float().view(shape)


# embeddings of 24 dimensions and text states of 12, with a mean and unlike variances
EXAMPLES = Examples(
    2 + waves(40, 24) * torch.linspace(0.2, 3, 24),
    waves(40, 24, phase=1.0) * torch.linspace(3, 0.1, 24) - 1,
    waves(90, 12, phase=2.0) * torch.linspace(0.1, 2, 12) + 0.5,
)


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """The module with parameters that follow from their names and shapes alone."""
    for name, parameter in module.named_parameters():
        wave = waves(*parameter.shape, phase=float(zlib.crc32(name.encode()) % 1000))
        scale = 1.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3
        gain = parameter.ndim == 1 and name.endswith("weight")  # of a norm
        parameter.copy_(1 + 0.3 * wave if gain else scale * wave)
    return module.eval()
