"""The cache of video embeddings: one l2-normalised row per clip key, of one CLIP checkpoint.

Rows are found by KEY, never by position, so a shuffled loader or a changed clip list cannot pair a
clip with another clip's embedding. The file carries the hash of the checkpoint that made it; a
consumer with another hash, a key that is missing or another order of clips gets an error.

One .safetensors file: tensor `embeddings` (N, D) float32; header: format, clip_hash, keys (JSON).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle2_video.data.atomic import whole
from dalle2_video.errors import UserError
from dalle2_video.model_file import follow_umask

FORMAT = "dalle2-video-embeddings/1"
NORM_TOLERANCE = 1e-3
REMEDY = "have the data or data.splits changed? run train_clip.py again, which rewrites the cache"


class EmbeddingError(UserError, RuntimeError):
    """A cache that is missing, damaged, made by another CLIP, or lacks a clip."""


@dataclass(frozen=True)
class EmbeddingCache:
    """embeddings (N, D) float32 on the CPU, each row of norm 1; keys: N distinct clip keys."""

    embeddings: Tensor
    keys: tuple[str, ...]
    clip_hash: str
    path: Path

    @staticmethod
    def load(path: str | os.PathLike[str], clip_hash: str | None) -> EmbeddingCache:
        """Reads a cache; EmbeddingError where it is missing, damaged or of another CLIP checkpoint.

        clip_hash: of the checkpoint in use. None accepts any, for a caller who reads it from the
        cache and checks it against something else.
        """
        path = Path(path)
        if not path.is_file():
            raise EmbeddingError(f"{path}: no such file; train_clip.py writes it")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise EmbeddingError(f"{path}: a safetensors file, but no embedding cache")
                embeddings = file.get_tensor("embeddings")
        except SafetensorError as error:
            raise EmbeddingError(f"{path}: not a whole embedding cache ({error})") from error
        found = header["clip_hash"]
        if clip_hash is not None and found != clip_hash:
            raise EmbeddingError(
                f"{path}: made by the CLIP checkpoint {found}, but {clip_hash} is in use; "
                "run train_clip.py again, which rewrites the cache"
            )
        keys = tuple(json.loads(header["keys"]))
        problem = _problem(keys, embeddings)
        if problem:
            raise EmbeddingError(f"{path}: {problem}")
        return EmbeddingCache(embeddings, keys, found, path)

    @property
    def dim(self) -> int:
        """D."""
        return self.embeddings.shape[1]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def rows(self, keys: Sequence[str]) -> Tensor:
        """(len(keys), D) float32 in the order asked for; EmbeddingError on a missing key."""
        missing = [key for key in keys if key not in self._row_of]
        if missing:
            raise EmbeddingError(
                f"{self.path}: no embedding of clip {missing[0]} (and of {len(missing) - 1} more "
                f"of the {len(keys)} asked for); {REMEDY}"
            )
        return self.embeddings[[self._row_of[key] for key in keys]]

    def check_order(self, keys: Sequence[str]) -> None:
        """EmbeddingError unless the cache holds exactly these clips in exactly this order."""
        for row, (own, other) in enumerate(zip(self.keys, keys, strict=False)):
            if own != other:
                raise EmbeddingError(
                    f"{self.path}: row {row} is clip {own}, expected {other}; {REMEDY}"
                )
        if len(self.keys) != len(keys):
            raise EmbeddingError(
                f"{self.path}: holds {len(self.keys)} clips, expected {len(keys)}; {REMEDY}"
            )


def write_embeddings(
    path: str | os.PathLike[str], keys: Sequence[str], embeddings: Tensor, clip_hash: str
) -> None:
    """Writes a cache, whole or not at all.

    embeddings (N, D), finite, l2-normalised; keys: N distinct ones. EmbeddingError otherwise.
    """
    path = Path(path)
    embeddings = embeddings.detach().to("cpu", torch.float32).contiguous()
    problem = _problem(tuple(keys), embeddings)
    if problem:
        raise EmbeddingError(f"{path}: not written, {problem}")
    header = {"format": FORMAT, "clip_hash": clip_hash, "keys": json.dumps(list(keys))}
    with whole(path) as partial:
        save_file({"embeddings": embeddings}, partial, metadata=header)
        follow_umask(partial)


def _problem(keys: tuple[str, ...], embeddings: Tensor) -> str | None:
    """What is wrong with this pair, or None."""
    if embeddings.ndim != 2 or len(keys) != len(embeddings):
        return f"{len(keys)} keys for embeddings of shape {tuple(embeddings.shape)}"
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        return f"clip {twice[0]} occurs more than once"
    norms = embeddings.norm(dim=1)
    bad = ~((norms - 1).abs() < NORM_TOLERANCE)  # NaN counts as bad
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        return f"the embedding of clip {keys[row]} has norm {float(norms[row]):.4g} instead of 1"
    return None
