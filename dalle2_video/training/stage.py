"""A stage is data: one network, its objective, its data sets and how it is judged.

`loop.train` runs any stage. Everything learnable lives in `Stage.model`, so DDP, DeepSpeed and FSDP
each see one model and one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class StepInfo:
    """What an objective knows of its call.

    sample_ids: (B,) int64 on the CPU, the global sample ids of this batch (in validation: clip
    indices); with `seed` they key all randomness of the step. first: the step's first global clip,
    the same on all ranks and in all micro-batches (0 in validation).
    """

    sample_ids: Tensor
    seed: int
    device: torch.device
    accelerator: Accelerator
    first: int = 0


@dataclass(frozen=True)
class Loss:
    """loss: scalar tensor with gradient, the mean over the batch. metrics: what else to log."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A generated or reconstructed clip: frames uint8 RGB (F, H, W, 3), frames per second."""

    caption: str
    frames: np.ndarray
    fps: float = 8.0


@dataclass
class Stage:
    """One network to train.

    name: folder and W&B name ("clip", "prior", "base"). kind in the model file: `kind` or the name.
    objective(model, batch, step) -> Loss calls the (perhaps wrapped) model as often on every rank.
    validate(model, accelerator) -> {name: metric}; None: the mean objective over `val_set`.
    samples(model, accelerator) -> list of Sample, or None. Both run on every rank, in eval mode,
    without gradient, under EMA weights where the stage has them.
    config: what rebuilds the network (JSON values). meta: strings for the model file's header.
    state_filter: of a name of the model's state, whether checkpoints and model.safetensors keep
    it; None keeps all. A frozen pretrained tower is kept out this way.
    """

    name: str
    model: nn.Module
    objective: Callable[[nn.Module, Any, StepInfo], Loss]
    train_set: Any
    val_set: Any = None
    validate: Callable[[nn.Module, Accelerator], dict[str, float]] | None = None
    samples: Callable[[nn.Module, Accelerator], list[Sample]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    state_filter: Callable[[str], bool] | None = None
    kind: str | None = None

    def keeps(self, name: str) -> bool:
        """Whether checkpoints hold this entry of the model's state."""
        return self.state_filter is None or self.state_filter(name)
