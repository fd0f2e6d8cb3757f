"""Small blocks that the networks share. Clips inside a network are channels-last: (B, F, H, W, C).

A 2D convolution sees (B F, C, H, W) as a free view in torch's channels_last format, attention sees
tokens (..., C) without a copy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines (..., dim) float32 of x (...), as in Vaswani et al. 2017."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, device=x.device, dtype=torch.float32) / half
    )
    angles = x.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LogSNREmbedding(nn.Module):
    """log-SNR (B,) -> (B, dim): sines and cosines, then an MLP."""

    def __init__(self, dim: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, log_snr: Tensor) -> Tensor:
        # 50 spreads log-SNRs of about [-10, 10] over the periods
        return self.mlp(sinusoidal(50.0 * log_snr, self.frequencies))


def zero_init(module: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The same module with weights and bias at zero, so that its branch starts as nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class SpatialConv(nn.Conv2d):
    """A 1 x k x k convolution on (B, F, H, W, C); VDM, section 3.

    The weight stays contiguous: DeepSpeed (0.19) cannot broadcast a channels-last one, and on a CPU
    it makes no difference to the speed.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3) -> None:
        super().__init__(dim_in, dim_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        y = super().forward(x.flatten(0, 1).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


class TemporalConv(nn.Module):
    """Convolution over 3 frames at each position, a pre-norm residual branch that starts at zero.

    Instead of temporal attention (Ho et al. Oct 2022, section 2.2); so the network sees no more of
    a clip's length than some frames. The clip's first and last frame are repeated beyond its ends.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(3 * dim, dim)
        zero_init(self.mix)

    def forward(self, x: Tensor, num_images: int = 0) -> Tensor:
        """x (B, F + J, H, W, C); the last J = `num_images` frames pass unchanged."""
        frames = x.shape[1] - num_images
        if not frames:  # steps of images alone: the weights take part, with a gradient of zero
            y = F.silu(self.norm(x[:, :1, :1, :1]))
            return x + 0.0 * self.mix(torch.cat([y, y, y], dim=-1))
        clip, stills = x[:, :frames], x[:, frames:]
        y = F.silu(self.norm(clip))
        around = torch.cat([y[:, :1], y, y[:, -1:]], dim=1)
        mixed = self.mix(torch.cat([around[:, :-2], y, around[:, 2:]], dim=-1))
        return torch.cat([clip + mixed, stills], dim=1) if num_images else clip + mixed


class AdaptiveNorm(nn.Module):
    """Layer norm over channels of (B, F, H, W, C), scaled and shifted by a condition of each frame
    (B, F, cond_dim).
    """

    def __init__(self, dim: int, cond_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.to_scale_shift = zero_init(nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.to_scale_shift(cond)[:, :, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, (self.dim,)), 1 + scale)


class ResBlock(nn.Module):
    """Residual block of two 1x3x3 convolutions with adaptive norm (Dhariwal & Nichol 2021).

    The condition enters at the second norm. The last convolution starts at zero.
    """

    def __init__(self, dim_in: int, dim_out: int, cond_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim_in)
        self.conv1 = SpatialConv(dim_in, dim_out)
        self.norm2 = AdaptiveNorm(dim_out, cond_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = SpatialConv(dim_out, dim_out)
        zero_init(self.conv2)
        self.skip = nn.Linear(dim_in, dim_out) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h, cond))))
        return self.skip(x) + h


class Downsample(nn.Module):
    """Halves H and W: space to channels, then a linear layer."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(space_to_channels(x, 2))


class Upsample(nn.Module):
    """Doubles H and W: a linear layer, then channels to space."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 4 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return channels_to_space(self.proj(x), 2)


def space_to_channels(x: Tensor, patch: int) -> Tensor:
    """(B, F, H, W, C) -> (B, F, H/p, W/p, p p C)."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h // patch, patch, w // patch, patch, c)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, f, h // patch, w // patch, patch * patch * c)


def channels_to_space(x: Tensor, patch: int) -> Tensor:
    """(B, F, H, W, p p C) -> (B, F, H p, W p, C); the inverse of `space_to_channels`."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h, w, patch, patch, c // patch**2)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, f, h * patch, w * patch, c // patch**2)
