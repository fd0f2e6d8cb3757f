"""Unet3D with factorized space-time attention: the network of every stage of the cascade.

Source: Ho et al. 2022 (2204.03458) section 3; conditions as in DALL-E 2 (Ramesh et al. 2022,
section 2.1): the video embedding is added to the time embedding and given as extra tokens, text by
cross attention. Deviations: layer norm over channels in place of group norm; a pixel-unshuffle stem
(patch); an embedding of the frame's place in the clip is added behind the stem and to the time
embedding, so that each frame has a condition of its own (what a caption says of a course of events
differs by frame); the text's own embedding and its pooled states join the time embedding (GLIDE;
Imagen, Saharia et al. 2022); each text token is first joined with its neighbours.

Super-resolution in time and space (Ho et al. Oct 2022, 2210.02303, sections 2.2 and 2.4): the same
network with the smaller clip, made to fit (diffusion/conditioning.py), concatenated in channels,
the level of its noise as a condition, and temporal convolution in place of attention.

Joint training (section 3): J independent images are appended to the F frames of each clip, with
conditions and noise levels of their own, I = B + B J in all: the clips' first, then image j of clip
b at b J + j. They have no place in time.

B batch, F frames, H W, C channels, N text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle2_video.models.attention import CrossAttention, SpatialAttention, TemporalAttention
from dalle2_video.models.layers import (
    AdaptiveNorm,
    Downsample,
    LogSNREmbedding,
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
from dalle2_video.models.whitening import Examples, Whitening

FRAME_DIM = 32  # sines and cosines of a frame's place in the clip


@dataclass(frozen=True)
class UnetConfig:
    """Sizes of a Unet3D.

    image_size, num_frames: of the clips it is trained on. patch: pixel-unshuffle stem (1: none).
    mults: width of each level over dim; each level has half the resolution of the one before.
    attention, cross_attention: per level. temporal: over the frames, attention beside the spatial
    one, or convolution at every level. self_condition: it also sees its last estimate of the clip
    (Chen et al. 2022, Analog Bits, section 3).

    low_frames, low_size: of the smaller clip that a super-resolution network is given; None, none.
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
    low_frames: int | None = None
    low_size: int | None = None
    residual: float = 0.0
    learned_variance: bool = False

    def __post_init__(self) -> None:
        levels = len(self.mults)
        if len(self.attention) != levels or len(self.cross_attention) != levels:
            raise ValueError(
                f"attention {self.attention} and cross_attention {self.cross_attention} need one "
                f"entry per level of mults {self.mults}"
            )
        if self.image_size % self.step:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.step}")
        for mult in self.mults:
            if self.dim * mult % self.head_dim:
                raise ValueError(f"dim {self.dim} x {mult} is no multiple of {self.head_dim}")
        if (self.low_frames is None) != (self.low_size is None):
            raise ValueError("low_frames and low_size belong together: give both or neither")
        if self.low_frames is None or self.low_size is None:
            if self.residual:
                raise ValueError("residual needs low_frames and low_size")
            return
        if self.learned_variance:
            raise ValueError("learned_variance is for networks without low_frames and low_size")
        if self.residual and self.self_condition:
            raise ValueError("self_condition shows pixels: not with residual")
        if min(self.low_frames, self.low_size) < 1:
            raise ValueError(
                f"low_frames {self.low_frames} and low_size {self.low_size} must be 1 or more"
            )
        if self.num_frames % self.low_frames or self.image_size % self.low_size:
            raise ValueError(
                f"num_frames {self.num_frames} and image_size {self.image_size} must be multiples "
                f"of low_frames {self.low_frames} and low_size {self.low_size}"
            )
        if self.times == (1, 1):
            raise ValueError("low_frames and low_size are those of the clip: nothing is to be made")

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip."""
        return self.channels, self.num_frames, self.image_size, self.image_size

    @property
    def step(self) -> int:
        """What the sides of its clips are multiples of."""
        return self.patch * 2 ** (len(self.mults) - 1)

    @property
    def times(self) -> tuple[int, int]:
        """How many times the frames and the pixels of the smaller clip; (1, 1): there is none."""
        if self.low_frames is None or self.low_size is None:
            return 1, 1
        return self.num_frames // self.low_frames, self.image_size // self.low_size

    @property
    def low_copies(self) -> int:
        """How many frames of the smaller clip each frame is given: those before and behind it, or
        the same one.
        """
        return 0 if self.low_frames is None else 1 if self.times[0] == 1 else 2

    @property
    def sees_windows(self) -> bool:
        """Whether it runs on windows of a longer clip: no attention ties its frames together, and
        it is told where they are in the whole (`Low.place`).
        """
        tied = self.temporal == "attention" and any(self.attention)
        return bool(self.low_copies) and not tied

    @property
    def sees_crops(self) -> bool:
        """Whether no attention ties its pixels together: it runs on crops of a larger clip."""
        return not any(self.attention)


class Condition(NamedTuple):
    """What a clip is generated from; a dropped part is replaced by a learned null value.

    embedding: (B, D) l2-normalised video embedding; keep_embedding: (B,) bool.
    text: (B, N, W) states of the text's tokens; text_place: (B, N) int64, each token's place in its
    line, -1 = padding; text_embedding: (B, D) l2-normalised embedding of the whole text; keep_text:
    (B,) bool.
    """

    embedding: Tensor
    keep_embedding: Tensor
    text: Tensor
    text_place: Tensor
    text_embedding: Tensor
    keep_text: Tensor

    @staticmethod
    def of(
        embedding: Tensor, text: Tensor, text_place: Tensor, text_embedding: Tensor
    ) -> Condition:
        """Everything kept."""
        keep = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
        return Condition(embedding, keep, text, text_place, text_embedding, keep)

    def dropped(self) -> Condition:
        """The same with everything dropped, for the unconditional half of guidance."""
        none = torch.zeros_like(self.keep_text)
        return self._replace(keep_embedding=none, keep_text=none)

    @staticmethod
    def cat(a: Condition, b: Condition) -> Condition:
        """Both along the batch; the one with fewer tokens is padded."""
        tokens = max(a.text.shape[1], b.text.shape[1])
        a, b = a.padded(tokens), b.padded(tokens)
        return Condition(*(torch.cat(pair) for pair in zip(a, b, strict=True)))

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return Condition(*(part.to(device) for part in self))

    def rows(self, index: Tensor) -> Condition:
        """Those of these clips, with no more text tokens than they need."""
        picked = Condition(*(part[index] for part in self))
        tokens = int((picked.text_place >= 0).sum(1).max())
        return picked._replace(
            text=picked.text[:, :tokens], text_place=picked.text_place[:, :tokens]
        )

    def padded(self, tokens: int) -> Condition:
        """The same with this many text tokens."""
        more = tokens - self.text.shape[1]
        return self._replace(
            text=F.pad(self.text, (0, 0, 0, more)),
            text_place=F.pad(self.text_place, (0, more), value=-1),
        )


class Low(NamedTuple):
    """The smaller clip as a super-resolution network takes it.

    frames (B, low_copies C, F + J, H, W): fitted, with noise; log_snr (I,): of that noise; place
    (B, F): where each frame is in the whole clip, were that as long as the network's own.
    """

    frames: Tensor
    log_snr: Tensor
    place: Tensor

    def repeated(self, times: int) -> Low:
        """The whole batch again and again."""
        return Low(
            self.frames.repeat(times, 1, 1, 1, 1),
            self.log_snr.repeat(times),
            self.place.repeat(times, 1),
        )


class Neighbours(nn.Module):
    """Adds to each token (B, N, C) what it makes of itself with the ones before and behind it.

    Of its own line only, which place (B, N) tells, so lines stay a set. "no" and "glasses" become
    "no glasses": a CLIP's text tower need not tie them where the picture hardly shows them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        y = self.norm(x)
        follows = (place[:, 1:] == place[:, :-1] + 1) & (place[:, 1:] > 0)
        before = F.pad(torch.where(follows[..., None], y[:, :-1], 0), (0, 0, 1, 0))
        behind = F.pad(torch.where(follows[..., None], y[:, 1:], 0), (0, 0, 0, 1))
        return x + F.gelu(self.mix(torch.cat([before, y, behind], dim=-1)))


def to_frames(says: Tensor, frames: int, batch: int, images: int) -> Tensor:
    """What is said of each clip and of each image behind it (I, C) -> (B, F + J, C)."""
    clips = len(says) - batch * images
    parts = [says[clips:].unflatten(0, (batch, images))] if images else []
    if clips:
        parts.insert(0, says[:clips, None].expand(-1, frames, -1))
    return torch.cat(parts, dim=1)


class ConditionEncoder(nn.Module):
    """Condition and log-SNR -> what they say together (I, cond_dim), and tokens (I, M + N,
    cond_dim) with mask; `per_frame` makes of the first what the norms take.
    """

    def __init__(self, config: UnetConfig, embedding_dim: int, text_dim: int) -> None:
        super().__init__()
        dim = config.cond_dim
        self.tokens = config.embedding_tokens
        self.whiten_embedding = Whitening(embedding_dim, floor=1.0)
        self.whiten_text = Whitening(text_dim)
        self.whiten_text_embedding = Whitening(embedding_dim, floor=1.0)
        self.log_snr = LogSNREmbedding(dim)
        self.low_log_snr = LogSNREmbedding(dim) if config.low_copies else None
        self.null_embedding = nn.Parameter(torch.randn(embedding_dim))
        self.null_text = nn.Parameter(torch.randn(text_dim))
        self.null_text_embedding = nn.Parameter(torch.randn(embedding_dim))
        self.embedding = nn.Linear(embedding_dim, dim)
        self.text_embedding = nn.Linear(embedding_dim, dim)
        cross = any(config.cross_attention)  # DDP wants no weights that nothing uses
        self.embedding_to_tokens = nn.Linear(embedding_dim, self.tokens * dim) if cross else None
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.neighbours = Neighbours(dim)
        self.pool_score = nn.Linear(dim, 8)
        self.pool_norm = nn.LayerNorm(dim)
        self.pool = nn.Linear(8 * dim, dim)
        self.frame = nn.Linear(FRAME_DIM, dim)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def fit(self, examples: Examples) -> None:
        """Whiten by these embeddings and states from now on."""
        self.whiten_embedding.fit(examples.video)
        self.whiten_text.fit(examples.states)
        self.whiten_text_embedding.fit(examples.text)

    def per_frame(self, says: Tensor, places: Tensor, batch: int, images: int) -> Tensor:
        """(I, cond_dim) and the embedding of the frames' places (1 or B, F + J, 32) -> (B, F + J,
        cond_dim).
        """
        says = to_frames(says, places.shape[1] - images, batch, images)
        return self.mlp(says + self.frame(places))

    def forward(
        self, log_snr: Tensor, condition: Condition, low: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """low: (I,), the log-SNR of the smaller clip."""
        embedding = torch.where(
            condition.keep_embedding[:, None],
            self.whiten_embedding(condition.embedding),
            self.null_embedding,
        )
        whole = torch.where(
            condition.keep_text[:, None],
            self.whiten_text_embedding(condition.text_embedding),
            self.null_text_embedding,
        )
        # a dropped text is one null token
        first = torch.arange(condition.text.shape[1], device=log_snr.device) == 0
        keep = condition.keep_text[:, None]
        states = self.whiten_text(condition.text)
        text = self.text(torch.where(keep[..., None], states, self.null_text))
        place = torch.where(keep, condition.text_place, first.long() - 1)
        text, mask = self.neighbours(text, place), place >= 0

        score = self.pool_score(text).masked_fill(~mask[..., None], float("-inf")).softmax(1)
        pooled = self.pool_norm(torch.einsum("bnk,bnd->bkd", score, text)).flatten(1)
        says = self.text_embedding(whole) + self.pool(pooled)
        says = self.log_snr(log_snr) + self.embedding(embedding) + says
        if self.low_log_snr is not None:
            assert low is not None
            says = says + self.low_log_snr(low)
        if self.embedding_to_tokens is None:
            return says, text, mask
        extra = self.embedding_to_tokens(embedding).unflatten(-1, (self.tokens, -1))
        tokens = torch.cat([extra.to(text.dtype), text], dim=1)
        return says, tokens, F.pad(mask, (self.tokens, 0), value=True)


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

    def forward(self, x: Tensor, cond: Tensor, tokens: Tensor, mask: Tensor, images: int) -> Tensor:
        x = self.space(self.res(x, cond))
        if self.time is not None:
            x = self.time(x, images)
        return x if self.cross is None else self.cross(x, tokens, mask, images)


class Unet3D(nn.Module):
    """Noisy clip, log-SNR and condition -> prediction of the clip's shape.

    Starts by predicting zero. Cost: attention is quadratic in H W within a frame and in F across
    frames, never in F H W. Runs at any number of frames. activation_checkpointing: blocks keep only
    their inputs and run again in the backward pass. ends: layers that an optimizer of matrices
    leaves alone (training/optimizer.py); apart: parts whose gradients are clipped on their own
    (training/loop.py).
    """

    ends = ("stem", "out", "variance.out", "condition.pool_score")
    apart = ("variance",)

    def __init__(self, config: UnetConfig, embedding_dim: int, text_dim: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        levels = range(len(config.mults))
        dims = [config.dim * m for m in config.mults]
        patch_dim = config.channels * config.patch**2
        self.condition = ConditionEncoder(config, embedding_dim, text_dim)
        inputs = 1 + config.self_condition + config.low_copies
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

    def places(self, frames: int, images: int, low: Low | None, device: torch.device) -> Tensor:
        """The embedding (1 or B, F + J, 32) of where each frame is: in the clip and, in
        super-resolution, between two known frames too. Images are nowhere.
        """
        index = torch.arange(frames, device=device)
        # from half a period per frame, so that even and odd frames can be told apart
        if low is None:
            where = sinusoidal(math.pi * index, FRAME_DIM, 100.0)[None]
        else:
            whole = sinusoidal(math.pi * low.place, FRAME_DIM // 2, 100.0)
            phase = sinusoidal(math.pi * (index % self.config.times[0]), FRAME_DIM // 2, 100.0)
            where = torch.cat([whole, phase.expand_as(whole)], dim=-1)
        return F.pad(where, (0, 0, 0, images))

    def forward(
        self,
        z: Tensor,
        log_snr: Tensor,
        condition: Condition,
        images: int = 0,
        before: Tensor | None = None,
        low: Low | None = None,
    ) -> Tensor:
        """z (B, C, F + J, H, W), log_snr (I,), condition of I -> (B, C, F + J, H, W) in z's dtype,
        with a learned variance (B, 2 C, F + J, H, W), the raw fractions behind the prediction.

        images: J; the clips may have no frame of their own. before: the last estimate of x0, like
        z, where the network is self-conditioned; None: there is none yet. low: the smaller clip,
        for super-resolution; frame 0 of z is then one that it has.
        """
        places = self.places(z.shape[2] - images, images, low, z.device)
        if (low is None) == bool(self.config.low_copies):
            raise ValueError(
                "low: a super-resolution network takes the smaller clip, others do not"
            )
        noise = None if low is None else low.log_snr
        says, tokens, mask = self.condition(log_snr, condition, noise)
        cond = self.condition.per_frame(says, places, len(z), images)
        if self.config.self_condition:
            z = torch.cat([z, torch.zeros_like(z) if before is None else before], dim=1)
        if low is not None:
            z = torch.cat([z, low.frames], dim=1)
        x = self.stem(space_to_channels(z.permute(0, 2, 3, 4, 1), self.config.patch))
        x = x + self.frame_position(places)[:, :, None, None]
        inputs = cond, tokens, mask, images
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
        raw = self.variance(log_snr, len(z), z.shape[2] - images, images)
        return torch.cat([out, raw.to(z.dtype)], dim=1)
