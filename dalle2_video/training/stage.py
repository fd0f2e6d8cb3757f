"""A stage is data: one network, its objective, its data sets and how it is judged.

`loop.train` runs any stage. Everything learnable lives in `Stage.model`, so DDP, DeepSpeed and FSDP
each see one model and one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video.config import ConfigError, config_class


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


@config_class
class TrainConfig:
    """How long and how to train; all progress is counted in clips seen.

    batch_size: clips per optimizer step, all ranks together. micro_batch_size: clips per rank and
    forward pass, None = batch_size / ranks. minutes: None, or a budget of wall-clock minutes (the
    loop with its validation and saves; start-up apart) that rules the schedule and the end
    instead of `clips`. optimizer: muon orthogonalises the updates of matrices and needs them
    whole (one process or DDP). ema_halflife_clips: None = no EMA; the half-life in use is
    min(ema_halflife_clips, ema_rampup * clips seen). *_every_clips: None = only at the end.
    keep_checkpoints: how many of the newest stay; keep_every_clips: besides them the first at or
    after each multiple of it.
    """

    batch_size: int = 128
    micro_batch_size: int | None = None
    clips: int = 12_800_000
    minutes: float | None = None
    lr: float = 3e-4
    warmup_clips: int = 640_000
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float | None = 1.0
    ema_halflife_clips: float | None = 900_000
    ema_rampup: float = 0.05
    log_every_clips: int = 12_800
    val_every_clips: int | None = 640_000
    save_every_clips: int | None = 640_000
    keep_checkpoints: int = 3
    keep_every_clips: int | None = None
    workers: int = 8

    def __post_init__(self) -> None:
        positive = ["batch_size", "clips", "lr", "micro_batch_size", "minutes", "grad_clip"]
        positive += ["ema_halflife_clips", "ema_rampup", "log_every_clips", "val_every_clips"]
        positive += ["save_every_clips", "keep_checkpoints", "keep_every_clips"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("warmup_clips", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """Where and in which environment a stage runs.

    dir: runs/<train_name>/<stage>. wandb_mode: online | offline, None = WANDB_MODE or online.
    resolved: the whole configuration as YAML, written to <dir>/config.yaml when the run begins.
    section: of it, the stage's own ("unets.base"). defaults: by dotted key, what a run whose
    config.yaml is older than a key was trained with. force: go on where the configuration differs
    from that file. timeout_minutes: how long a rank waits for the others before the run ends.
    """

    dir: str
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    train_name: str = "run"
    use_wandb: bool = False
    wandb_project: str = "dalle2-video"
    wandb_entity: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_mode: Literal["online", "offline"] | None = None
    resolved: str | None = None
    section: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    timeout_minutes: float = 30.0
