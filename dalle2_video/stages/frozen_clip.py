"""What the prior and the U-Nets share in training: data with embeddings, the frozen CLIP, the
draws.

The CLIP's text tower is no part of the trained network: it stands beside it, frozen, in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.config import CaptionPolicy
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions
from dalle2_video.data.store.dataset import Batch, CelebVTextDataset, embedding_keys
from dalle2_video.data.store.embeddings import EmbeddingCache
from dalle2_video.data.store.store import ClipStore
from dalle2_video.models.video_clip import TextEncoding, VideoCLIP
from dalle2_video.models.whitening import Examples
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.training.accelerator import process_state
from dalle2_video.training.stage import StepInfo

EXAMPLES_PER_DIMENSION, EXAMPLES_BATCH = 8, 64  # texts that whitening is fitted to
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Conditions:
    """The CLIP of a run and the data sets with its embeddings."""

    video_clip: VideoCLIP
    clip_hash: str
    train_set: CelebVTextDataset
    val_set: CelebVTextDataset

    def examples(self) -> Examples:
        """What whitening is fitted to: all training embeddings and the first texts."""
        data, number = self.train_set, EXAMPLES_PER_DIMENSION * self.video_clip.embed_dim
        assert data.embeddings is not None
        still = CelebVTextDataset(
            data.store, data.name, data.seed, data.captions, data.embeddings, load_frames=False
        )
        encode, device = TextEncoder(self.video_clip), process_state().device or "cpu"
        texts, states = [], []
        for start in range(0, min(number, 4 * len(data)), EXAMPLES_BATCH):
            batch = still.collate([still.pointer(start + i) for i in range(EXAMPLES_BATCH)])
            text = encode(batch.to(device))
            texts.append(text.embedding.cpu())
            states.append(text.states[text.mask].cpu())
        return Examples(data.embeddings.rows(data.keys()), torch.cat(texts), torch.cat(states))


def load_conditions(
    run_dir: str | Path,
    store: ClipStore,
    seed: int,
    captions: CaptionPolicy,
    load_frames: bool,
    validation: str = "val",
    num_images: int = 0,
    include_images: bool = False,
) -> Conditions:
    """CLIP, embeddings and data of a run.

    validation: the split to validate on. num_images: how many come with each clip of training.
    include_images: whether images are clips of training, as still videos.

    Raises CheckpointError or EmbeddingError where the CLIP or its cache is missing or they do not
    belong together, and EmbeddingError where the cache holds other clips than the data, or the same
    in another order.
    """
    folder = Path(run_dir) / "clip"
    video_clip, loaded = load_clip(folder / "model.safetensors")
    cache = EmbeddingCache.load(folder / "embeddings.safetensors", loaded.hash)
    cache.check_order(embedding_keys(store))
    train = CelebVTextDataset(
        store,
        "train",
        seed,
        TrainingCaptions(captions),
        cache,
        load_frames,
        num_images=num_images,
        include_images=include_images,
    )
    still = EvaluationCaptions()
    first = store.draw_windows
    val = CelebVTextDataset(store, validation, seed, still, cache, load_frames, first)
    return Conditions(video_clip, loaded.hash, train, val)


class TextEncoder:
    """The frozen text tower, moved to the device of the batch on first use."""

    def __init__(self, video_clip: VideoCLIP) -> None:
        self.video_clip = video_clip.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TextEncoding:
        if self.video_clip.log_logit_scale.device != batch.tokens.device:
            self.video_clip.to(batch.tokens.device)
        text = self.video_clip.encode_text(batch.tokens, batch.line_index)
        return TextEncoding(text.embedding.float(), text.states.float(), text.place)


def draw_t(seed: int, sample_ids: Tensor, stream: str) -> Tensor:
    """Diffusion times (B,) float32 in [0, 1), equidistributed over any run of global sample ids.

    The golden-ratio sequence of the id: low-discrepancy, as VDM's stratified times, yet a pure
    function of (seed, id), so independent of ranks and micro-batches.
    """
    offset = keyed.key(seed, "offset", stream) / 2**63
    t = sample_ids.to(torch.float64) * GOLDEN_RATIO + offset
    return torch.frac(t).float()


def shared_coin(probability: float, step: StepInfo, stream: str) -> bool:
    """True with this probability, the same on all ranks: where forward passes differ between ranks,
    ZeRO-3 and FSDP wait for ever.
    """
    return keyed.key(step.seed, step.first, stream) < probability * 2**63


def keep_masks(
    drop: Mapping[str, float], seed: int, sample_ids: Tensor, stream: str
) -> tuple[Tensor, Tensor]:
    """Which samples keep their embedding and their text: two bool (B,).

    drop: probabilities `all` (both at once), `embedding` and `text` (each by itself, independent).
    So both are dropped at the rate all + (1 - all) embedding text.
    """
    u = keyed.rand((3,), seed, sample_ids, stream)
    kept = u[:, 0] >= drop["all"]
    return kept & (u[:, 1] >= drop["embedding"]), kept & (u[:, 2] >= drop["text"])
