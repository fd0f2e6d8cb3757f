"""Symmetric InfoNCE over the clips of all ranks (Radford et al. 2021, arXiv 2103.00020, figure 3).

Deviation: two clips of a batch with the very same set of lines each answer the other's text, so
that pair is taken out of the denominators (in small attribute data, with categories dropped, such
pairs are common; clips that merely resemble each other stay negatives).

B clips of this rank, G clips of all ranks, D embedding dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.models.video_clip import ClipOutput
from dalle2_video.training.stage import Loss


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
