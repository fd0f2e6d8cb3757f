"""The prior: a transformer from a text to a video embedding (Ramesh et al. 2022, section 2.2).

Sequence: [text states, text embedding, time, noised embedding, query]; the output at the query is
the prediction. Two deviations, both without effect on what can be expressed: the text is a SET of
lines, so its states attend to one another in both directions and carry no positions (the order of
lines cannot matter), and everything behind the text is causal as in the paper; and K noised
embeddings share one text, each with its own (time, noised, query) behind the same prefix, none
seeing another. B texts, N text tokens, W text width, D embedding dimension, K noised embeddings per
text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.attention import attend
from dalle2_video.models.layers import LogSNREmbedding, zero_init
from dalle2_video.models.prior_config import PriorConfig
from dalle2_video.models.whitening import Examples, Whitening


class PriorBlock(nn.Module):
    """Pre-norm transformer block with an attention mask."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.head_dim = width // config.heads
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = zero_init(nn.Linear(width, width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), zero_init(nn.Linear(hidden, width))
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.dropout(self.to_out(attend(q, k, v, self.head_dim, mask)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Prior(nn.Module):
    """(noised embeddings, log-SNR, text) -> predicted embeddings; starts at a text-free constant.

    Noised embeddings go in and predictions come out whitened (`whiten`, unit variance in every
    direction: open code's scaling, so that the loss minds small directions too); text comes as the
    text tower makes it. Cost: quadratic in N + 1 + 3 K.
    """

    def __init__(self, config: PriorConfig, embedding_dim: int, text_dim: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.whiten = Whitening(embedding_dim)
        self.whiten_text = Whitening(text_dim)
        self.whiten_text_embedding = Whitening(embedding_dim)
        self.null_text = nn.Parameter(torch.randn(text_dim))
        self.null_embedding = nn.Parameter(torch.randn(embedding_dim))
        self.text = nn.Linear(text_dim, width)
        self.text_embedding = nn.Linear(embedding_dim, width)
        self.log_snr = LogSNREmbedding(width)
        self.noised = nn.Linear(embedding_dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.kind = nn.Embedding(5, width)  # which of the five parts a token is
        nn.init.normal_(self.kind.weight, std=0.02)
        self.blocks = nn.ModuleList(PriorBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, embedding_dim)

    def fit(self, examples: Examples) -> None:
        """Whiten by these embeddings and states from now on."""
        self.whiten.fit(examples.video)
        self.whiten_text.fit(examples.states)
        self.whiten_text_embedding.fit(examples.text)

    def forward(
        self,
        noised: Tensor,
        log_snr: Tensor,
        text: Tensor,
        text_mask: Tensor,
        text_embedding: Tensor,
        keep_text: Tensor,
    ) -> Tensor:
        """noised (B, K, D), log_snr (B, K), text (B, N, W), text_mask (B, N) bool, text_embedding
        (B, D), keep_text (B,) bool (False: the learned null text) -> (B, K, D) float32."""
        (batch, draws), tokens = log_snr.shape, text.shape[1]
        keep = keep_text[:, None]
        first = torch.arange(tokens, device=text.device) == 0
        text = torch.where(keep[..., None], self.whiten_text(text), self.null_text)
        text_mask = torch.where(keep, text_mask, first)
        text_embedding = self.whiten_text_embedding(text_embedding)
        text_embedding = torch.where(keep, text_embedding, self.null_embedding)

        prefix = torch.cat([self.text(text), self.text_embedding(text_embedding)[:, None]], dim=1)
        query = self.query.expand(batch, draws, -1)
        triples = torch.stack([self.log_snr(log_snr), self.noised(noised), query.to(prefix)], dim=2)
        x = torch.cat([prefix, triples.flatten(1, 2).to(prefix)], dim=1)
        kinds = torch.tensor([0] * tokens + [1] + [2, 3, 4] * draws, device=x.device)
        x = x + self.kind(kinds)
        mask = attention_mask(text_mask, draws)[:, None]
        for block in self.blocks:
            x = block(x, mask)
        answers = x[:, tokens + 1 :].unflatten(1, (draws, 3))[:, :, 2]
        return self.out(self.norm(answers)).float()


def attention_mask(text_mask: Tensor, draws: int) -> Tensor:
    """(B, T, T) bool, query by key, T = N + 1 + 3 draws: who may see whom.

    Text sees text; the text embedding sees text and itself; each triple sees the prefix and,
    causally, itself. Padded text is seen by nobody but itself.
    """
    tokens = text_mask.shape[1]
    prefix = tokens + 1
    total = prefix + 3 * draws
    place = torch.arange(total, device=text_mask.device)
    group = torch.where(place < prefix, -1, (place - prefix) // 3)
    same = (group[:, None] == group[None, :]) & (place[:, None] >= place[None, :])
    to_text = (place < tokens)[None, :].expand(total, -1)
    to_prefix = (group >= 0)[:, None] & (place < prefix)[None, :]
    seen = F.pad(text_mask, (0, total - tokens), value=True)
    allowed = (same | to_text | to_prefix) & seen[:, None, :]
    return allowed | torch.eye(total, dtype=torch.bool, device=text_mask.device)
