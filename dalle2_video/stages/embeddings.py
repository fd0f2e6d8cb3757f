"""A trained video CLIP over whole splits: its embeddings, cached beside its weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import Batch, CelebVTextDataset, embedding_keys
from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError, write_embeddings
from dalle2_video.data.store.store import ClipStore
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.stages.contrastive import all_gather
from dalle2_video.training.preemption import mark_ended, mark_unfinished

EVAL_BATCH = 64


def over_split(
    function: Callable[[Batch], Tensor], dataset: CelebVTextDataset, bar: tqdm | None = None
) -> Tensor:
    """function(batch) of a whole split, in index order, float32 (N, ...), on every rank.

    Every rank makes the same number of calls of the same size (sharded models need that): the
    last ones go round to the first clips again, and those rows are cut off.
    """
    state = PartialState()
    device = torch.device(state.device or "cpu")
    n, world, rank = len(dataset), state.num_processes, state.process_index
    size = min(EVAL_BATCH, -(-n // world))
    parts = []
    for start in range(0, n, size * world):
        mine = range(start + rank * size, start + (rank + 1) * size)
        batch = dataset.collate([dataset.eval_pointer(i % n) for i in mine])
        parts.append(all_gather(function(batch.to(device)).float()))
        if bar is not None:
            bar.update(min(size * world, n - start))
    return torch.cat(parts)[:n]


@torch.no_grad()
def cache_embeddings(folder: str | os.PathLike[str], store: ClipStore) -> Path:
    """Embeddings of every clip of every split from <folder>/model.safetensors, in float32.

    A cache that stands there with the checkpoint's hash and just these clips is left as it is.
    Every rank calls it; the ranks share the work, the first one writes. Returns the cache's path.
    """
    state, folder = PartialState(), Path(folder)
    device = torch.device(state.device or "cpu")
    path = folder / "embeddings.safetensors"
    clip, loaded = load_clip(folder / "model.safetensors")
    sets = [
        CelebVTextDataset(store, name, 0, EvaluationCaptions(), include_images=True)
        for name in store.splits
        if store.split(name) or store.images(name)
    ]
    keys = embedding_keys(store)
    if path.is_file():
        try:
            EmbeddingCache.load(path, loaded.hash).check_order(keys)
            return path
        except EmbeddingError as error:
            print(f"embeddings are computed again: {error}", flush=True)
    if state.is_main_process:  # a scheduler should go on here, too
        mark_unfinished(folder, int(loaded.meta.get("clips_seen", 0)), "embedding")
    clip.to(device)
    video = clip.config.video

    def embed(batch: Batch) -> Tensor:
        assert batch.frames is not None
        return clip.encode_video(to_float(batch.frames, video.num_frames, video.image_size))

    # A line every ten seconds where the output is no terminal.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    quiet = not state.is_main_process
    with tqdm(
        total=len(keys), unit="clip", desc="embeddings", mininterval=pace, disable=quiet
    ) as bar:
        embeddings = torch.cat([over_split(embed, dataset, bar) for dataset in sets])
    if state.is_main_process:
        write_embeddings(path, keys, embeddings, loaded.hash)
        mark_ended(folder)
    state.wait_for_everyone()
    return path
