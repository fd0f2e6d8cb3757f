"""The optimizer over every trainable parameter, and the learning rate as a pure function of
progress.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dalle2_video.training.config import TrainConfig
from dalle2_video.training.muon import Muon

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Every parameter with requires_grad, once: matrices with decay, vectors without.

    `muon` is True in the group of the weights of linear and convolutional layers, without the
    modules that the model lists by name in `muon_exclude`: its first and last layers, as Jordan et
    al. 2024 advise. Embeddings, positions and null values are no maps and stay with AdamW as well.

    Raises ValueError when the model has nothing to train, or a parameter without a dimension:
    DeepSpeed (0.19) and FSDP2 cannot split those, so a single number has the shape (1,).
    """
    if bare := [name for name, p in model.named_parameters() if p.ndim == 0]:
        raise ValueError(f"{', '.join(bare)}: give a single number the shape (1,), not ()")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad")
    excluded = getattr(model, "muon_exclude", ())
    layers = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and name not in excluded
    }
    maps = [p for p in trainable if id(p) in layers]
    others = [p for p in trainable if id(p) not in layers]
    groups = [
        {"params": maps, "weight_decay": weight_decay, "muon": True},
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay, "muon": False},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) or Muon over `param_groups`; AdamW in torch's
    fused kernel, under ZeRO and FSDP2 too.
    """
    kind = Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    return kind(param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=cfg.betas, fused=True)


def lr_factor(clips: int, progress: float, warmup_clips: int, schedule: str) -> float:
    """Factor in [0, 1] on the learning rate of the optimizer step that ends at `clips` clips seen.

    progress in [0, 1]: the share of the run (of its clips, or of its minutes) that is done when
    that step begins. A linear warm-up over `warmup_clips` multiplies 1 (constant) or
    (1 + cos(pi progress)) / 2 (cosine, Loshchilov & Hutter 2017, eq. 5, to zero, no restart).
    """
    warmup = min(1.0, clips / warmup_clips) if warmup_clips else 1.0
    if schedule == "constant":
        return warmup
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    raise ValueError(f"lr_schedule must be constant or cosine, got {schedule!r}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
