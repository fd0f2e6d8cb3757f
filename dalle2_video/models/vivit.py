"""ViViT, the factorised encoder (Arnab et al. 2021, arXiv 2103.15691, section 3.3, model 2).

A spatial transformer sees the patches of one tubelet index at a time; a temporal transformer then
sees one vector per tubelet index. Each has its own CLS token and its own learned positions.
Deviations: blocks are pre-norm with one fused qkv product; the embedding is a linear layer on
rearranged patches (the same map as the paper's 3D convolution), initialised at random, or a stack
of strided convolutions.

B batch, F frames, T tubelet indices = F / tubelet, N patches of a tubelet index, W width, D output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle2_video.models.clip_config import VideoTowerConfig
from dalle2_video.models.sdpa import attention


class Attention(nn.Module):
    """Self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (c h d) -> c b h n d", c=3, h=self.heads)
        return self.out(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LinearTubelets(nn.Module):
    """(B, 3, F, H, W) -> (B T, N, W): each patch of a tubelet by a linear layer."""

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        self.tubelet, self.patch = config.tubelet, config.patch
        self.project = nn.Linear(3 * self.tubelet * self.patch[0] * self.patch[1], config.width)

    def forward(self, video: Tensor) -> Tensor:
        t, (p, q) = self.tubelet, self.patch
        pattern = "b c (f t) (h p) (w q) -> (b f) (h w) (c t p q)"
        return self.project(rearrange(video, pattern, t=t, p=p, q=q))


class ConvTubelets(nn.Module):
    """(B, 3, F, H, W) -> (B T, N, W): 3x3 convolutions of stride 2 per frame, then a linear layer.

    Early convolutions let a transformer learn fine features in far fewer steps (Xiao et al. 2021).
    """

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        self.tubelet = config.tubelet
        steps = config.patch[0].bit_length() - 1
        widths = [3, *(max(32, config.width >> (steps - 1 - i)) for i in range(steps))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(1, after), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.project = nn.Linear(self.tubelet * widths[-1], config.width)

    def forward(self, video: Tensor) -> Tensor:
        frames = rearrange(video, "b c f h w -> (b f) c h w")
        x = self.convs(frames.contiguous(memory_format=torch.channels_last))
        return self.project(rearrange(x, "(n t) c h w -> n (h w) (t c)", t=self.tubelet))


class ClsTransformer(nn.Module):
    """(B, N, W) -> (B, W): prepends a CLS token, adds positions, returns the CLS token's state."""

    def __init__(self, num_tokens: int, width: int, layers: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + num_tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(layers))
        nn.init.normal_(self.cls, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls.expand(x.shape[0], 1, -1).to(x.dtype)
        x = torch.cat([cls, x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class VideoTower(nn.Module):
    """(B, 3, F, H, W) float [-1, 1] -> (B, D) float32, not normalised.

    Raises ValueError where the clip's size is not the configured one: positions are learned.
    """

    def __init__(self, config: VideoTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embed = {"linear": LinearTubelets, "conv": ConvTubelets}[c.embedding](c)
        layers = (c.spatial_layers, c.temporal_layers)
        self.spatial = ClsTransformer(c.num_patches, c.width, layers[0], c.heads, c.mlp_ratio)
        self.temporal = ClsTransformer(c.num_tubelets, c.width, layers[1], c.heads, c.mlp_ratio)
        self.norm = nn.LayerNorm(c.width)
        self.project = nn.Linear(c.width, embed_dim, bias=False)

    def forward(self, video: Tensor) -> Tensor:
        c = self.config
        expected = [3, c.num_frames, c.image_size, c.image_size]
        if video.ndim != 5 or list(video.shape[1:]) != expected:
            wanted = "(B, C, F, H, W) = (B, {}, {}, {}, {})".format(*expected)
            raise ValueError(f"video tower: expected {wanted}, got {tuple(video.shape)}")
        x = self.spatial(self.embed(video))  # (B T, W)
        x = self.temporal(rearrange(x, "(b f) w -> b f w", f=c.num_tubelets))  # (B, W)
        return self.project(self.norm(x)).float()
