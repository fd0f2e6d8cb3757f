"""Factorized space-time attention (Ho et al. 2022, 2204.03458, section 3), and to conditions.

Spatial attention: each frame by itself. Temporal attention: each position by itself, over the
frames, with a learned relative position bias (T5 buckets). Cross attention: every position to the
tokens of the condition. Each is a pre-norm residual branch on (B, F, H, W, C) whose output starts
at zero.

The last `num_images` of the F frames may be images of their own (joint training, same section):
none of them sees another frame, nor is seen, and each has its own condition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dalle2_video.models.layers import zero_init
from dalle2_video.models.sdpa import attention


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(N, T, C) -> (N, heads, T, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of (N, T, C) queries; mask: bool or bias, as (N, heads, T, S)."""
    q, k, v = (split_heads(a, head_dim) for a in (q, k, v))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return attention(q, k, v, mask).transpose(1, 2).flatten(2)


class RelativePositionBias(nn.Module):
    """Learned bias per head and bucket of the distance between frames (Raffel et al. 2020, 2.1).

    Half of the buckets are for the past, half for the future; within a half the first half are
    exact distances, the rest logarithmic up to `max_distance`. Any number of frames.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.bias = nn.Embedding(buckets, heads)
        nn.init.normal_(self.bias.weight, std=0.02)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket index of key position minus query position, int64."""
        half = self.buckets // 2
        exact = half // 2
        far = distance.abs().clamp(min=1).float()
        log = exact + (
            torch.log(far / exact) / math.log(self.max_distance / exact) * (half - exact)
        ).long().clamp(min=0, max=half - exact - 1)
        near = distance.abs()
        return torch.where(distance > 0, half, 0) + torch.where(near < exact, near, log)

    def forward(self, frames: int, device: torch.device) -> Tensor:
        """(heads, frames, frames), query by key."""
        position = torch.arange(frames, device=device)
        return self.bias(self.bucket(position[None, :] - position[:, None])).permute(2, 0, 1)


def frames_seen(frames: int, num_images: int, device: torch.device) -> Tensor:
    """bool (frames, frames), query by key: a clip's frames see each other, an image itself."""
    clip = torch.arange(frames, device=device) < frames - num_images
    return (clip[:, None] & clip) | torch.eye(frames, dtype=torch.bool, device=device)


class SpatialAttention(nn.Module):
    """Self-attention over the positions of each frame."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = zero_init(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, f, h, w, c = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(b * f, h * w, 3 * c).chunk(3, dim=-1)
        return x + self.to_out(attend(q, k, v, self.head_dim)).reshape(x.shape)


class TemporalAttention(nn.Module):
    """Self-attention over the frames at each position, with relative position bias."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.position_bias = RelativePositionBias(dim // head_dim)
        self.to_out = zero_init(nn.Linear(dim, dim))

    def forward(self, x: Tensor, num_images: int = 0) -> Tensor:
        b, f, h, w, c = x.shape
        tokens = self.norm(x).reshape(b, f, h * w, c).transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(tokens).chunk(3, dim=-1)
        bias = self.position_bias(f, x.device)
        if num_images:
            bias = bias.masked_fill(~frames_seen(f, num_images, x.device), float("-inf"))
        out = self.to_out(attend(q, k, v, self.head_dim, bias[None]))
        return x + out.reshape(b, h * w, f, c).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of every position to the tokens (B, N, context_dim) where mask (B, N) is True.

    With images: tokens of the B clips (none where all frames are images), then of the B x images.
    """

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = zero_init(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, num_images: int = 0) -> Tensor:
        q = self.to_q(self.norm(x))
        k, v = self.to_kv(context).chunk(2, dim=-1)
        mask, clips = mask[:, None, None, :], len(context) - len(x) * num_images
        if not num_images:
            out = attend(q.flatten(1, 3), k, v, self.head_dim, mask).reshape(x.shape)
            return x + self.to_out(out)
        parts = []
        for frames, rows in (
            (slice(0, -num_images), slice(0, clips)),
            (slice(-num_images, None), slice(clips, None)),
        ):
            if k[rows].shape[0]:
                part = q[:, frames]
                tokens = part.reshape(k[rows].shape[0], -1, q.shape[-1])
                out = attend(tokens, k[rows], v[rows], self.head_dim, mask[rows])
                parts.append(out.reshape(part.shape))
        return x + self.to_out(torch.cat(parts, dim=1))
