"""Training of the video CLIP: symmetric InfoNCE over the global batch, and its Stage.

Radford et al. 2021 (arXiv 2103.00020), figure 3, over the clips of all ranks. Two deviations:
- two clips of a batch with the very same set of lines each answer the other's text, so that pair is
  taken out of the denominators (in small attribute data, with categories dropped, such pairs are
  common; clips that merely resemble each other stay negatives);
- gradient accumulation is refused, since a micro-batch would see its own negatives only: the loss
  would be that of a smaller batch.

B clips of this rank, G clips of all ranks, D embedding dimension.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from dalle2_video import keyed
from dalle2_video.config import ConfigError, config_class, default
from dalle2_video.data.media.tensors import has_view, to_float
from dalle2_video.data.sources.captions import CaptionPolicy, EvaluationCaptions
from dalle2_video.data.store.dataset import Batch, CelebVTextDataset, embedding_keys
from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError, write_embeddings
from dalle2_video.data.store.store import ClipStore
from dalle2_video.evaluation.retrieval import Retrieval, retrieval
from dalle2_video.models.text_tower import PretrainedTextConfig, TrainedTextConfig
from dalle2_video.models.video_clip import ClipOutput, VideoCLIP, VideoCLIPConfig
from dalle2_video.models.vivit import VideoTowerConfig
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.training.accelerator import process_state
from dalle2_video.training.preemption import mark_ended, mark_unfinished
from dalle2_video.training.stage import Loss, Stage, StepInfo, TrainConfig

EVAL_BATCH = 64


@config_class
class TextSection:
    """clip.model.text: an open_clip tower where `name` is given, otherwise a small one to train."""

    name: str | None = "ViT-B-32"
    weights: str | None = "laion2b_s34b_b79k"
    frozen: bool = True
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.name is not None and self.weights is None:
            raise ConfigError(f"weights: needed with name={self.name} (a path or an open_clip tag)")

    def tower(self) -> TrainedTextConfig | PretrainedTextConfig:
        """The config of the tower that this section asks for."""
        if self.name is None:
            return TrainedTextConfig(self.width, self.layers, self.heads, self.mlp_ratio)
        assert self.weights is not None
        return PretrainedTextConfig(self.name, self.weights, self.frozen)


@config_class
class ModelSection:
    """clip.model: both towers and the dimension that they share."""

    embed_dim: int = 512
    video: VideoTowerConfig = default(
        lambda: VideoTowerConfig(
            image_size=64,
            num_frames=16,
            patch=(8, 8),
            tubelet=2,
            width=768,
            spatial_layers=12,
            temporal_layers=4,
            heads=12,
        )
    )
    text: TextSection = default(TextSection)

    def model_config(self) -> VideoCLIPConfig:
        """What VideoCLIP takes."""
        return VideoCLIPConfig(self.embed_dim, self.video, self.text.tower())


@config_class
class ClipSection:
    """The section `clip` of the configuration; `captions` is the policy of training."""

    captions: CaptionPolicy = default(CaptionPolicy)
    model: ModelSection = default(ModelSection)
    train: TrainConfig = default(
        lambda: TrainConfig(
            batch_size=512,
            clips=3_000_000,
            warmup_clips=100_000,
            lr_schedule="cosine",
            weight_decay=0.2,
            betas=(0.9, 0.98),
            ema_halflife_clips=None,
            log_every_clips=5_120,
            val_every_clips=256_000,
            save_every_clips=256_000,
        )
    )


class _AllGather(torch.autograd.Function):
    """(B, ...) -> (G, ...), ranks in order; the gradient is summed over the ranks.

    Every rank has its own loss, and each depends on the rows of all ranks. The sum here and the
    mean that data-parallel training takes over ranks give the gradient of those losses' mean.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def world_size() -> int:
    """Ranks of the running process group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank, equal shapes -> (G, ...) on every rank, without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (G, ...), differentiable."""
    return x if world_size() == 1 else _AllGather.apply(x)  # type: ignore[return-value]


def caption_ids(captions: Sequence[Sequence[str]]) -> Tensor:
    """(B,) int64: a hash of each clip's set of lines, whatever their order."""
    texts = ["\n".join(sorted(set(lines))).encode() for lines in captions]
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests])


def contrastive_loss(output: ClipOutput, ids: Tensor) -> Loss:
    """Symmetric InfoNCE of this rank's clips against the clips of all ranks.

    output: embeddings (B, D) of this rank; ids (B,) int64, equal for clips with equal captions.
    The loss is the mean over this rank's B clips and both directions; its mean over ranks is the
    loss of the global batch. Metrics: accuracy per direction inside the global batch.
    """
    video, text = output.video.float(), output.text.float()
    scale = output.logit_scale.float()
    offset = len(video) * (dist.get_rank() if world_size() > 1 else 0)
    labels = torch.arange(len(video), device=video.device) + offset
    same = ids.unsqueeze(1) == all_gather(ids)  # (B, G)
    twin = same.scatter(1, labels.unsqueeze(1), False)
    with torch.autocast(video.device.type, enabled=False):  # a scale of 100 needs float32
        to_text = (scale * video @ gather_with_gradient(text).T).masked_fill(twin, -torch.inf)
        to_video = (scale * text @ gather_with_gradient(video).T).masked_fill(twin, -torch.inf)
        loss = (F.cross_entropy(to_text, labels) + F.cross_entropy(to_video, labels)) / 2
    with torch.no_grad():
        metrics: dict[str, Tensor | float] = {
            "video_to_text_accuracy": (to_text.argmax(1) == labels).float().mean(),
            "text_to_video_accuracy": (to_video.argmax(1) == labels).float().mean(),
            "logit_scale": scale.detach().squeeze(),
        }
    return Loss(loss, metrics)


def objective(
    model: nn.Module, batch: Batch, step: StepInfo, view: tuple[int, int] | None = None
) -> Loss:
    """The Stage's objective: one forward pass of the (perhaps wrapped) VideoCLIP.

    view: frames and size that the network takes, as `to_float` has them; None = all.
    """
    if step.accelerator.gradient_accumulation_steps > 1:
        raise ConfigError(NO_ACCUMULATION)
    assert batch.frames is not None
    output = model(to_float(batch.frames, *view or ()), batch.tokens, batch.line_index)
    return contrastive_loss(output, caption_ids(batch.captions).to(output.video.device))


NO_ACCUMULATION = (
    "clip.train.micro_batch_size: the video CLIP cannot accumulate gradients: its loss compares "
    "every clip of the batch with every other, and micro-batches would not see each other. "
    "Set it to null (batch_size / ranks), lower clip.train.batch_size or use more ranks"
)


def refuse_accumulation(train: TrainConfig, world: int) -> None:
    """ConfigError where a step would take more than one micro-batch per rank."""
    micro = train.micro_batch_size
    if micro is not None and micro * world != train.batch_size:
        raise ConfigError(NO_ACCUMULATION)


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
def judge(
    model: nn.Module, dataset: CelebVTextDataset, view: tuple[int, int] | None = None
) -> Retrieval:
    """Retrieval over the whole split, each clip with one line of every category."""

    def embed(batch: Batch) -> Tensor:
        assert batch.frames is not None
        output = model(to_float(batch.frames, *view or ()), batch.tokens, batch.line_index)
        return torch.stack([output.video, output.text], dim=1)

    video, text = over_split(embed, dataset).unbind(1)
    return retrieval(video, text)


def clip_stage(section: ClipSection, store: ClipStore, seed: int, validation: str = "val") -> Stage:
    """The stage "clip"; validation is retrieval over all of that split.

    A video tower of fewer frames or pixels than the stored clips sees a view of them. Raises
    ConfigError where they are no multiple of its, or with accumulation.
    """
    refuse_accumulation(section.train, process_state().num_processes)
    data, video = store.settings, section.model.video
    view = video.num_frames, video.image_size
    if not has_view(data.num_frames, data.size, *view):
        raise ConfigError(
            f"clip.model.video takes {video.num_frames} frames of {video.image_size} px, the clips "
            f"in {store.root} have {data.num_frames} frames of {data.size} px"
        )
    torch.manual_seed(keyed.key(seed, 0, "clip/init"))
    model = VideoCLIP(section.model.model_config())
    policy = EvaluationCaptions()
    val_set = CelebVTextDataset(store, validation, seed, policy, first_windows=True)
    return Stage(
        name="clip",
        model=model,
        objective=partial(objective, view=view),
        train_set=CelebVTextDataset(store, "train", seed, section.captions),
        val_set=val_set,
        validate=lambda m, accelerator: judge(m, val_set, view).metrics(),
        config=model.config.to_dict(),
        meta={"fps": str(data.view_fps(video.num_frames))},
        state_filter=model.keeps,
    )


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
        CelebVTextDataset(store, name, 0, EvaluationCaptions())
        for name in store.splits
        if store.split(name)
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
