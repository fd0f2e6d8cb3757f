"""Text towers from open_clip: a pretrained one (frozen by default) or a small one to be trained.

Both are open_clip's causal TextTransformer (Radford et al. 2021, arXiv 2103.00020, section 2.4).
It is run here piece by piece, because its own forward fails on lines shorter than its context, and
returns states only under a flag that changes its return type. Under the causal mask nothing after
EOT reaches a token up to EOT, so lines may run without their padding: sorted by length and in
BUCKETS passes, which halves the work on captions (most lines are short, a few are long).

U lines, T tokens, W tower width, D embedding dimension.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, cast

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from safetensors import SafetensorError
from torch import Tensor, nn

from dalle2_video.errors import UserError
from dalle2_video.models.clip_config import PretrainedTextConfig, TrainedTextConfig
from dalle2_video.models.sdpa import attention

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49408  # open_clip's SimpleTokenizer; its last entry is EOT
EOT = VOCAB_SIZE - 1
BUCKETS = 3
# What open_clip raises for a file that is damaged or of another model (assertions among it).
LOAD_ERRORS = (
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    AssertionError,
    UnpicklingError,
    SafetensorError,
)


class TowerError(UserError, ValueError):
    """A pretrained text tower that cannot be loaded, or that is of another kind."""


class LineFeatures(NamedTuple):
    """embedding (U, D) float32, not normalised; states (U, T, W) after ln_final; length (U,).

    length counts SOT and EOT; states at and beyond it mean nothing.
    """

    embedding: Tensor
    states: Tensor
    length: Tensor


class TextBlock(nn.Module):
    """open_clip's default block with its own weights and our `attention`, faster on a CPU."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        source = block.attn
        self.heads = source.num_heads
        self.norm1, self.norm2 = block.ln_1, block.ln_2
        self.qkv = nn.Linear(source.embed_dim, 3 * source.embed_dim)
        self.qkv.weight, self.qkv.bias = source.in_proj_weight, source.in_proj_bias
        self.out, self.mlp = source.out_proj, block.mlp
        self.scale1, self.scale2 = block.ls_1, block.ls_2

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "u t (c h d) -> c u h t d", c=3, h=self.heads)
        y = rearrange(attention(q, k, v, attn_mask), "u h t d -> u t (h d)")
        x = x + self.scale1(self.out(y))
        return x + self.scale2(self.mlp(self.norm2(x)))


class TextTower(nn.Module):
    """tokens (U, T <= 77) int64 -> LineFeatures.

    It takes over the weights of `source`, so that every weight is used inside the forward of the
    module that owns it, which FSDP and ZeRO-3 need.
    A frozen tower stays in eval mode also after `train()`, and builds no graph.
    Raises ValueError where a line is longer than the context or has no EOT.
    """

    causal: Tensor

    def __init__(self, source: TextTransformer, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.token_embedding = source.token_embedding
        self.positions = source.positional_embedding
        self.blocks = nn.ModuleList(
            TextBlock(block) if isinstance(block, ResidualAttentionBlock) else block
            for block in source.transformer.resblocks
        )
        self.norm = source.ln_final
        self.project = nn.Identity()
        if source.text_projection is not None:
            self.project = _linear(source.text_projection)
        self.register_buffer("causal", source.attn_mask, persistent=False)
        if frozen:
            self.requires_grad_(False)
            self.eval()

    @property
    def width(self) -> int:
        """W, the width of the token states."""
        return self.positions.shape[1]

    def train(self, mode: bool = True) -> TextTower:
        return super().train(mode and not self.frozen)

    def forward(self, tokens: Tensor) -> LineFeatures:
        if tokens.ndim != 2 or tokens.shape[1] > CONTEXT_LENGTH:
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens: expected (U, T <= {CONTEXT_LENGTH}), got {shape}")
        is_end = tokens == EOT
        if not bool(is_end.any(dim=1).all()):
            lines = (~is_end.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"tokens: lines {lines} have no end token ({EOT})")
        length = is_end.int().argmax(dim=1) + 1  # up to the first EOT
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self._states(tokens, length)
            pooled = states[torch.arange(len(tokens), device=tokens.device), length - 1]
            return LineFeatures(self.project(pooled).float(), states, length)

    def _states(self, tokens: Tensor, length: Tensor) -> Tensor:
        """(U, T, W). Always BUCKETS passes, even empty ones: sharded ranks must stay in step."""
        order = length.argsort(stable=True)
        parts = []
        for lines in order.tensor_split(BUCKETS):
            longest = int(length[lines].max()) if len(lines) else 1
            part = self._pass(tokens[lines, :longest])
            parts.append(F.pad(part, (0, 0, 0, tokens.shape[1] - longest)))
        return torch.cat(parts)[order.argsort()]

    def _pass(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positions[:length]
        for block in self.blocks:
            x = block(x, attn_mask=self.causal[:length, :length])
        return self.norm(x)


def _linear(projection: nn.Linear | nn.Parameter) -> nn.Linear:
    """open_clip's projection, which may be a (width, D) matrix, as a linear layer."""
    if isinstance(projection, nn.Linear):
        return projection
    layer = nn.Linear(*projection.shape, bias=False)
    layer.weight = nn.Parameter(projection.detach().T.contiguous())
    return layer


def trained_tower(config: TrainedTextConfig, embed_dim: int) -> TextTower:
    """A new tower with open_clip's initialisation."""
    transformer = TextTransformer(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=config.mlp_ratio,
        output_dim=embed_dim,
    )
    return TextTower(transformer, frozen=False)


def pretrained_tower(config: PretrainedTextConfig, embed_dim: int, load: bool = True) -> TextTower:
    """The text part of an open_clip model; its image tower is dropped.

    load: False builds the architecture only, for a tower whose weights come from our checkpoint.
    Raises FileNotFoundError (no such file or tag), ValueError (unknown name, weights that do not
    fit, another sha256 or embedding dimension, a tower that is no causal one with 77 tokens).
    """
    where = f"open_clip text tower {config.name}"
    if open_clip.get_model_config(config.name) is None:
        raise TowerError(f"{where}: open_clip knows no model of this name")
    tags = open_clip.list_pretrained_tags_by_model(config.name)
    if load and config.weights not in tags and not Path(config.weights).is_file():
        known = ", ".join(tags) or "none"
        raise TowerError(f"{config.weights}: no such file, and no tag of {where} ({known})")
    try:
        model = open_clip.create_model(
            config.name,
            pretrained=config.weights if load else None,
            force_custom_text=True,
            require_pretrained=load,
        )
    except LOAD_ERRORS as error:
        raise TowerError(f"{config.weights}: no weights for {where} ({error})") from error
    transformer = getattr(model, "text", None)
    _check(transformer, embed_dim, where)
    tower = TextTower(cast(TextTransformer, transformer), config.frozen)
    if load and config.sha256 and config.sha256 != weights_sha256(tower):
        raise TowerError(
            f"{config.weights}: other weights than those this model was trained with "
            f"(text tower sha256 {weights_sha256(tower)[:16]}..., needed {config.sha256[:16]}...)"
        )
    return tower


def _check(transformer: object, embed_dim: int, where: str) -> None:
    if not isinstance(transformer, TextTransformer):
        raise TowerError(f"{where}: not open_clip's own text transformer; choose another model")
    vocab, context = transformer.vocab_size, transformer.context_length
    if (vocab, context) != (VOCAB_SIZE, CONTEXT_LENGTH):
        raise TowerError(
            f"{where}: has {vocab} tokens and context {context}; the captions' tokenizer has "
            f"{VOCAB_SIZE} and {CONTEXT_LENGTH}"
        )
    if transformer.attn_mask is None or transformer.cls_emb is not None:
        raise TowerError(f"{where}: attends to padding; a causal tower that pools at EOT is needed")
    if transformer.pool_type not in ("argmax", "eos"):
        raise TowerError(f"{where}: pools at {transformer.pool_type!r}, not at EOT")
    width = transformer.output_dim if transformer.text_projection is not None else transformer.width
    if width != embed_dim:
        raise TowerError(f"{where}: its embeddings have {width} dimensions, not {embed_dim}")


def weights_sha256(tower: nn.Module) -> str:
    """Hex SHA-256 over the names, shapes, types and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
