"""What a Unet3D is conditioned on, and its encoder.

DALL-E 2 (Ramesh et al. 2022, section 2.1): the video embedding is added to the time embedding and
given as extra tokens, text by cross attention. The text's own embedding and its pooled states join
the time embedding (GLIDE; Imagen, Saharia et al. 2022); each text token is first mixed with the
ones beside it.

B clips, J images beside each, I = B + B J conditions, F frames, N text tokens, D embedding
dimension, W width of the text tower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.layers import LogSNREmbedding
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.whitening import Examples, Whitening

FRAME_DIM = 32  # sines and cosines of a frame's place in the clip


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


class LowRes(NamedTuple):
    """The smaller clip as a super-resolution network takes it.

    frames (B, lowres_copies C, F + J, H, W): fitted, with noise; log_snr (I,): of that noise; place
    (B, F): where each frame is in the whole clip, were that as long as the network's own.
    """

    frames: Tensor
    log_snr: Tensor
    place: Tensor

    def repeated(self, repeats: int) -> LowRes:
        """The whole batch again and again."""
        return LowRes(
            self.frames.repeat(repeats, 1, 1, 1, 1),
            self.log_snr.repeat(repeats),
            self.place.repeat(repeats, 1),
        )


class LocalTokenMixer(nn.Module):
    """Adds to each token (B, N, C) a mix of itself with the ones before and after it.

    Only within its own line, by the tokens' places (B, N), so lines stay a set.
    "no" and "glasses" become "no glasses": a CLIP's text tower need not tie them where the picture
    hardly shows them.
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


def to_frames(cond_emb: Tensor, frames: int, batch: int, num_images: int) -> Tensor:
    """Vectors of the clips and then of their images (I, C) -> a vector per frame (B, F + J, C)."""
    clips = len(cond_emb) - batch * num_images
    parts = [cond_emb[clips:].unflatten(0, (batch, num_images))] if num_images else []
    if clips:
        parts.insert(0, cond_emb[:clips, None].expand(-1, frames, -1))
    return torch.cat(parts, dim=1)


class ConditionEncoder(nn.Module):
    """Condition and log-SNR -> conditioning vector (I, cond_dim), and tokens (I, M + N, cond_dim)
    with their mask. `per_frame` turns the vector into one per frame for the norms.
    """

    def __init__(self, config: UnetConfig, embedding_dim: int, text_dim: int) -> None:
        super().__init__()
        dim = config.cond_dim
        self.tokens = config.embedding_tokens
        self.whiten_embedding = Whitening(embedding_dim, floor=1.0)
        self.whiten_text = Whitening(text_dim)
        self.whiten_text_embedding = Whitening(embedding_dim, floor=1.0)
        self.log_snr = LogSNREmbedding(dim)
        # named as in every file of weights since version 1
        self.low_log_snr = LogSNREmbedding(dim) if config.lowres_copies else None
        self.null_embedding = nn.Parameter(torch.randn(embedding_dim))
        self.null_text = nn.Parameter(torch.randn(text_dim))
        self.null_text_embedding = nn.Parameter(torch.randn(embedding_dim))
        self.embedding = nn.Linear(embedding_dim, dim)
        self.text_embedding = nn.Linear(embedding_dim, dim)
        cross = any(config.cross_attention)  # DDP wants no weights that nothing uses
        self.embedding_to_tokens = nn.Linear(embedding_dim, self.tokens * dim) if cross else None
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.neighbours = LocalTokenMixer(dim)
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

    def per_frame(self, cond_emb: Tensor, places: Tensor, batch: int, num_images: int) -> Tensor:
        """Conditioning vector per frame (B, F + J, cond_dim) from those of clips and images (I,
        cond_dim) and the embedding of the frames' places (1 or B, F + J, 32).
        """
        cond_emb = to_frames(cond_emb, places.shape[1] - num_images, batch, num_images)
        return self.mlp(cond_emb + self.frame(places))

    def forward(
        self, log_snr: Tensor, condition: Condition, lowres_log_snr: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """lowres_log_snr (I,): of the noise on the smaller clip, for super-resolution."""
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
        cond_emb = self.text_embedding(whole) + self.pool(pooled)
        cond_emb = self.log_snr(log_snr) + self.embedding(embedding) + cond_emb
        if self.low_log_snr is not None:
            assert lowres_log_snr is not None
            cond_emb = cond_emb + self.low_log_snr(lowres_log_snr)
        if self.embedding_to_tokens is None:
            return cond_emb, text, mask
        extra = self.embedding_to_tokens(embedding).unflatten(-1, (self.tokens, -1))
        tokens = torch.cat([extra.to(text.dtype), text], dim=1)
        return cond_emb, tokens, F.pad(mask, (self.tokens, 0), value=True)
