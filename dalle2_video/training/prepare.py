"""A stage's network and its optimizer, made ready for the launched strategy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from dalle2_video.training.accelerator import autocast_forward
from dalle2_video.training.config import TrainConfig
from dalle2_video.training.optimizer import make_optimizer


def prepare(
    model: nn.Module, cfg: TrainConfig, accelerator: Accelerator, mixed_precision: str
) -> tuple[nn.Module, Any]:
    """(model, optimizer) as `accelerator.prepare` returns them: wrapped and split as the strategy
    has it, with the same weights on every rank, in train mode. Collective.
    """
    optimizer = make_optimizer(model, cfg)
    _same_start(model, accelerator)
    model.train()
    model._no_split_modules = stacked_layers(model)  # pyright: ignore
    if accelerator.is_fsdp2 and mixed_precision == "bf16":
        autocast_forward(model, accelerator.device)
    return accelerator.prepare(model, optimizer)


def stacked_layers(model: nn.Module) -> list[str]:
    """Names of the classes that stand in lists of layers: what FSDP2 gathers one at a time.

    Accelerate (1.15) reads them from `_no_split_modules`; by size it would take the lists too,
    which cannot be gathered.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part if not isinstance(layer, nn.ModuleList)]
    return sorted({type(layer).__name__ for layer in layers})


def _same_start(model: nn.Module, accelerator: Accelerator) -> None:
    """Every rank starts from the first rank's weights (FSDP2 does not see to it)."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            shared = tensor.detach().to(accelerator.device).contiguous()
            dist.broadcast(shared, 0)
            tensor.copy_(shared)
