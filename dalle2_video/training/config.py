"""How to train a stage, and where a run lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dalle2_video.config import Workers, config_class

Precision = Literal["no", "bf16", "fp16"]
TrackerName = Literal["wandb", "tensorboard", "mlflow"]
Beta = Annotated[float, Field(ge=0, lt=1)]


@config_class
class TrainConfig:
    """How long and how to train; all progress is counted in clips seen."""

    batch_size: PositiveInt = 128
    """Clips per optimizer step, all ranks together."""
    micro_batch_size: PositiveInt | None = None
    """Clips per rank and forward pass; null: batch_size / ranks. Smaller ones are accumulated."""
    clips: PositiveInt = 12_800_000
    """Length of the training in clips seen."""
    minutes: PositiveFloat | None = None
    """A budget of wall-clock minutes (the loop with its validation and saves, without the start)
    that sets the schedule and the end instead of `clips`."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    warmup_clips: NonNegativeInt = 640_000
    """Clips over which the learning rate rises from 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or down to 0 along a cosine."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices and needs them whole (one process or DDP)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Adam's decay rates of the first and second moment."""
    grad_clip: PositiveFloat | None = 1.0
    """Limit of the gradient's global norm; null: none."""
    ema_halflife_clips: PositiveFloat | None = 900_000
    """Half-life of the averaged weights; null: no averaging."""
    ema_rampup: PositiveFloat = 0.05
    """The half-life is at most this share of the clips seen."""
    log_every_clips: PositiveInt = 12_800
    """Interval of the lines of metrics.jsonl."""
    val_every_clips: PositiveInt | None = 640_000
    """Interval of validation and sample videos; null: only at the end."""
    save_every_clips: PositiveInt | None = 640_000
    """Interval of checkpoints; null: only at the end."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints stay."""
    keep_every_clips: PositiveInt | None = None
    """Besides those, the first checkpoint at or after each multiple of this stays; null: none."""
    workers: Workers = 8
    """Processes that load clips, per rank; 0: the training process itself."""


@dataclass(frozen=True)
class RunConfig:
    """Where and in which environment a stage runs.

    dir: runs/<train_name>/<stage>. tracker: the service for curves and videos, None = none.
    wandb_mode: online | offline, None = WANDB_MODE or online.
    resolved: the whole configuration as YAML, written to <dir>/config.yaml when the run begins.
    section: of it, the stage's own ("unets.base"). defaults: by dotted key, what a run whose
    config.yaml is older than a key was trained with. force: go on where the configuration differs
    from that file. timeout_minutes: how long a rank waits for the others before the run ends.
    """

    dir: str
    seed: int = 0
    mixed_precision: Precision = "no"
    train_name: str = "run"
    tracker: TrackerName | None = None
    wandb_project: str = "dalle2-video"
    wandb_entity: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_mode: Literal["online", "offline"] | None = None
    resolved: str | None = None
    section: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    timeout_minutes: float = 30.0
