"""Unet3D with factorized space-time attention: the network of every U-Net of the cascade.

Source: Ho et al. 2022 (2204.03458) section 3. Deviations: layer norm over channels instead of group
norm; a pixel-unshuffle stem (patch); an embedding of the frame's place in the clip is added after
the stem and to the time embedding, so each frame has a condition of its own (a caption that
describes a course of events means something else in each frame). Conditions: conditioning.py.

Super-resolution in time and space (Ho et al. Oct 2022, 2210.02303, sections 2.2 and 2.4): the same
network with the smaller clip, made to fit (diffusion/lowres.py), concatenated in channels, the
level of its noise as a condition, and temporal convolution instead of attention.

Joint training (section 3): J independent images are appended to the F frames of each clip, with
conditions and noise levels of their own, I = B + B J in all: the clips' first, then image j of clip
b at b J + j. They have no place in time.

B batch, F frames, H W, C channels, N text tokens.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle2_video.models.attention import CrossAttention, SpatialAttention, TemporalAttention
from dalle2_video.models.conditioning import FRAME_DIM, Condition, ConditionEncoder, LowRes
from dalle2_video.models.layers import (
    AdaptiveNorm,
    Downsample,
    ResBlock,
    SpatialConv,
    TemporalConv,
    Upsample,
    channels_to_space,
    sinusoidal,
    space_to_channels,
    zero_init,
)
from dalle2_video.models.spectrum import VarianceSpectrum
from dalle2_video.models.unet_config import UnetConfig


class Block(nn.Module):
    """Residual block, then spatial, temporal and cross attention where the level has them."""

    def __init__(self, config: UnetConfig, level: int, dim_in: int) -> None:
        super().__init__()
        dim = config.dim * config.mults[level]
        self.res = ResBlock(dim_in, dim, config.cond_dim, config.dropout)
        attention, cross = config.attention[level], config.cross_attention[level]
        self.space = SpatialAttention(dim, config.head_dim) if attention else nn.Identity()
        if config.temporal == "convolution":
            self.time = TemporalConv(dim)
        else:
            self.time = TemporalAttention(dim, config.head_dim) if attention else None
        self.cross = CrossAttention(dim, config.cond_dim, config.head_dim) if cross else None

    def forward(
        self, x: Tensor, cond: Tensor, tokens: Tensor, mask: Tensor, num_images: int
    ) -> Tensor:
        x = self.space(self.res(x, cond))
        if self.time is not None:
            x = self.time(x, num_images)
        return x if self.cross is None else self.cross(x, tokens, mask, num_images)


class Unet3D(nn.Module):
    """Noisy clip, log-SNR and condition -> prediction of the clip's shape.

    Starts by predicting zero. Cost: attention is quadratic in H W within a frame and in F across
    frames, never in F H W. Runs at any number of frames. activation_checkpointing: blocks keep only
    their inputs and run again in the backward pass. muon_exclude: layers that an optimizer of
    matrices leaves alone (training/optimizer.py); separate_grad_clip: parts whose gradients are
    clipped on their own (training/).
    """

    muon_exclude = ("stem", "out", "variance.out", "condition.pool_score")
    separate_grad_clip = ("variance",)

    def __init__(self, config: UnetConfig, embedding_dim: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        levels = range(len(config.mults))
        dims = [config.dim * m for m in config.mults]
        patch_dim = config.channels * config.patch**2
        self.condition = ConditionEncoder(config, embedding_dim, text_dim)
        inputs = 1 + config.self_condition + config.lowres_copies
        self.stem = SpatialConv(patch_dim * inputs, dims[0])
        self.frame_position = nn.Linear(FRAME_DIM, dims[0])
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        skips = [dims[0]]
        for level in levels:
            self.down.append(
                nn.ModuleList(Block(config, level, dims[level]) for _ in range(config.blocks))
            )
            skips += [dims[level]] * config.blocks
            if level != levels[-1]:
                self.downsample.append(Downsample(dims[level], dims[level + 1]))
                skips.append(dims[level + 1])
        self.middle = Block(config, levels[-1], dims[-1])
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(levels):
            self.up.append(
                nn.ModuleList(
                    Block(config, level, dims[level] + skips.pop())
                    for _ in range(config.blocks + 1)
                )
            )
            if level > 0:
                self.upsample.append(Upsample(dims[level], dims[level - 1]))
        self.norm = AdaptiveNorm(dims[0], config.cond_dim)
        self.out = zero_init(SpatialConv(dims[0], patch_dim))
        learned = config.learned_variance
        self.variance = VarianceSpectrum(config.clip_shape, config.cond_dim) if learned else None

    def _run(self, block: nn.Module, *inputs: Tensor | int) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
        return block(*inputs)

    def places(
        self, frames: int, num_images: int, lowres: LowRes | None, device: torch.device
    ) -> Tensor:
        """Embedding (1 or B, F + J, 32) of each frame's place: in the clip and, for
        super-resolution, also between two known frames. Images have none.
        """
        index = torch.arange(frames, device=device)
        # from half a period per frame, so that even and odd frames can be told apart
        if lowres is None:
            where = sinusoidal(math.pi * index, FRAME_DIM, 100.0)[None]
        else:
            whole = sinusoidal(math.pi * lowres.place, FRAME_DIM // 2, 100.0)
            phase = sinusoidal(math.pi * (index % self.config.upscale[0]), FRAME_DIM // 2, 100.0)
            where = torch.cat([whole, phase.expand_as(whole)], dim=-1)
        return F.pad(where, (0, 0, 0, num_images))

    def forward(
        self,
        z: Tensor,
        log_snr: Tensor,
        condition: Condition,
        num_images: int = 0,
        x0_prev: Tensor | None = None,
        lowres: LowRes | None = None,
    ) -> Tensor:
        """z (B, C, F + J, H, W), log_snr (I,), condition of I -> (B, C, F + J, H, W) in z's dtype,
        with a learned variance (B, 2 C, F + J, H, W), the raw fractions behind the prediction.

        num_images: J; the clips may have no frame of their own. x0_prev: the last estimate of x0,
        like z, where the network is self-conditioned; None: there is none yet. lowres: the smaller
        clip, for super-resolution; frame 0 of z is then one that it has.
        """
        places = self.places(z.shape[2] - num_images, num_images, lowres, z.device)
        if (lowres is None) == bool(self.config.lowres_copies):
            raise ValueError(
                "lowres: a super-resolution network takes the smaller clip, others do not"
            )
        noise = None if lowres is None else lowres.log_snr
        cond_emb, tokens, mask = self.condition(log_snr, condition, noise)
        cond = self.condition.per_frame(cond_emb, places, len(z), num_images)
        if self.config.self_condition:
            z = torch.cat([z, torch.zeros_like(z) if x0_prev is None else x0_prev], dim=1)
        if lowres is not None:
            z = torch.cat([z, lowres.frames], dim=1)
        x = self.stem(space_to_channels(z.permute(0, 2, 3, 4, 1), self.config.patch))
        x = x + self.frame_position(places)[:, :, None, None]
        inputs = cond, tokens, mask, num_images
        skips = [x]
        for level, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                x = self._run(block, x, *inputs)
                skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
                skips.append(x)
        x = self._run(self.middle, x, *inputs)
        for level, blocks in enumerate(self.up):
            for block in cast(nn.ModuleList, blocks):
                x = self._run(block, torch.cat([x, skips.pop()], dim=-1), *inputs)
            if level < len(self.upsample):
                x = self.upsample[level](x)
        out = channels_to_space(self.out(F.silu(self.norm(x, cond))), self.config.patch)
        out = out.permute(0, 4, 1, 2, 3).to(z.dtype)
        if self.variance is None:
            return out
        raw = self.variance(log_snr, len(z), z.shape[2] - num_images, num_images)
        return torch.cat([out, raw.to(z.dtype)], dim=1)
