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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video.data.dataset import Batch, CelebVTextDataset
from dalle2_video.data.video import to_float
from dalle2_video.evaluation.retrieval import Retrieval, retrieval
from dalle2_video.models.text_tower import PretrainedTextConfig, TrainedTextConfig
from dalle2_video.models.video_clip import ClipOutput, VideoCLIP, VideoCLIPConfig
from dalle2_video.models.vivit import VideoTowerConfig
from dalle2_video.training.stage import ConfigError, Loss, Stage, StepInfo, TrainConfig

EVAL_BATCH = 64


@dataclass(frozen=True)
class TextSection:
    """clip.model.text: an open_clip tower where `name` is given, otherwise a small one to train."""

    name: str | None
    weights: str | None
    frozen: bool
    width: int
    layers: int
    heads: int
    mlp_ratio: float

    def tower(self) -> TrainedTextConfig | PretrainedTextConfig:
        """The config of the tower that this section asks for."""
        if self.name is None:
            return TrainedTextConfig(self.width, self.layers, self.heads, self.mlp_ratio)
        if self.weights is None:
            raise ConfigError(f"weights: needed with name={self.name} (a path or an open_clip tag)")
        return PretrainedTextConfig(self.name, self.weights, self.frozen)


@dataclass(frozen=True)
class ModelSection:
    """clip.model: both towers and the dimension that they share."""

    embed_dim: int
    video: VideoTowerConfig
    text: TextSection

    def model_config(self) -> VideoCLIPConfig:
        """What VideoCLIP takes."""
        return VideoCLIPConfig(self.embed_dim, self.video, self.text.tower())


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


def objective(model: nn.Module, batch: Batch, step: StepInfo) -> Loss:
    """The Stage's objective: one forward pass of the (perhaps wrapped) VideoCLIP."""
    if step.accelerator.gradient_accumulation_steps > 1:
        raise ConfigError(NO_ACCUMULATION)
    assert batch.frames is not None
    output = model(to_float(batch.frames), batch.tokens, batch.line_index)
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


@torch.no_grad()
def embed_split(
    model: nn.Module, dataset: CelebVTextDataset, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Video and text embeddings (N, D) float32 of a whole split, in index order, on every rank.

    Every rank makes the same number of forward passes of the same size (sharded models need
    that): the last ones go round to the first clips again, and those rows are cut off.
    """
    n, world, rank = len(dataset), accelerator.num_processes, accelerator.process_index
    size = min(EVAL_BATCH, -(-n // world))
    videos, texts = [], []
    for start in range(rank * size, -(-n // (size * world)) * size * world, size * world):
        pointers = [dataset.eval_pointer(i % n) for i in range(start, start + size)]
        batch = dataset.collate(pointers).to(accelerator.device)
        assert batch.frames is not None
        output = model(to_float(batch.frames), batch.tokens, batch.line_index)
        videos.append(all_gather(output.video.float()))
        texts.append(all_gather(output.text.float()))
    return torch.cat(videos)[:n], torch.cat(texts)[:n]


def judge(model: nn.Module, dataset: CelebVTextDataset, accelerator: Accelerator) -> Retrieval:
    """Retrieval over the whole split."""
    return retrieval(*embed_split(model, dataset, accelerator))


def clip_stage(
    model_config: VideoCLIPConfig,
    train: TrainConfig,
    train_set: CelebVTextDataset,
    val_set: CelebVTextDataset,
) -> Stage:
    """The stage "clip"; validation is retrieval over all of `val_set`.

    Raises ConfigError where the clips of the data have another size, or with accumulation.
    """
    refuse_accumulation(train, int(os.environ.get("WORLD_SIZE", "1")))
    data, video = train_set.store.settings, model_config.video
    if (data.size, data.num_frames) != (video.image_size, video.num_frames):
        raise ConfigError(
            f"clip.model.video takes {video.num_frames} frames of {video.image_size} px, the clips "
            f"in {train_set.store.root} have {data.num_frames} frames of {data.size} px"
        )
    model = VideoCLIP(model_config)
    return Stage(
        name="clip",
        model=model,
        objective=objective,
        train_set=train_set,
        val_set=val_set,
        validate=lambda m, accelerator: judge(m, val_set, accelerator).figures(),
        config=model.config.to_dict(),
        meta=data_meta(train_set),
        state_filter=model.keeps,
    )


def data_meta(dataset: CelebVTextDataset) -> dict[str, str]:
    """How the clips were made, for those who sample: frame rate, frames, size."""
    settings = dataset.store.settings
    names: Mapping[str, float] = {
        "fps": settings.fps,
        "num_frames": settings.num_frames,
        "size": settings.size,
    }
    return {name: str(value) for name, value in names.items()}
