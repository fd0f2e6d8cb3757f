"""One training loop for every stage, on Accelerate: one process, DDP, DeepSpeed ZeRO or FSDP2.

Progress is counted in clips seen; the same command resumes. Step k of a run covers the global clip
counters [k G, (k + 1) G), G = batch_size, whatever the ranks and micro-batches, and randomness is
keyed by these counters, so losses agree over any split of the work. The loader is not prepared by
Accelerate: each rank reads its own slice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from dalle2_video import keyed
from dalle2_video.data.dataset import train_loader
from dalle2_video.training.ema import Ema
from dalle2_video.training.environment import make_accelerator
from dalle2_video.training.log import (
    Log,
    NullLog,
    RunLog,
    check_wandb,
    last_validation,
    make_tracker,
)
from dalle2_video.training.optimizer import lr_factor, make_optimizer, set_lr
from dalle2_video.training.shards import shards_of
from dalle2_video.training.stage import RunConfig, Stage, StepInfo, TrainConfig
from dalle2_video.training.state import Checkpoints, Progress
from dalle2_video.training.validation import evaluate, no_trace

MAX_SKIPPED_IN_A_ROW = 50  # fp16 halves its scale from 2^16 down, so some at the start are normal


@dataclass(frozen=True)
class TrainResult:
    """progress: clips, steps, skipped, seconds. metrics: the last validation. model: the file."""

    progress: Progress
    metrics: dict[str, float]
    model: Path


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The gradient was not finite for many steps in a row."""


def train(stage: Stage, cfg: TrainConfig, run: RunConfig) -> TrainResult:
    """Train `stage` in `run.dir` until `cfg.clips` clips or `cfg.minutes` minutes; resume if begun.

    Every rank calls it with the same arguments. Raises ConfigError, CheckpointError (resuming into
    another model), WandbKeyError, TrainingDiverged.
    """
    check_wandb(run)
    accelerator, micro = make_accelerator(cfg, run)
    try:
        return _Trainer(stage, cfg, run, accelerator, micro).run_to_end()
    finally:
        # One process may train several stages, each with a precision of its own.
        AcceleratorState._reset_state(reset_partial_state=False)


class _Trainer:
    """The state of one call of `train`."""

    def __init__(
        self, stage: Stage, cfg: TrainConfig, run: RunConfig, accelerator: Accelerator, micro: int
    ):
        self.stage, self.cfg, self.run, self.accelerator = stage, cfg, run, accelerator
        self.micro = micro
        self.folder = Path(run.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        optimizer = make_optimizer(stage.model, cfg)
        _same_start(stage.model, accelerator)
        stage.model.train()
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.shards = shards_of(accelerator, self.model)
        halflife = cfg.ema_halflife_clips
        self.ema = Ema(self.shards, halflife, cfg.ema_rampup) if halflife else None
        self.checkpoints = Checkpoints(
            self.folder, accelerator, self.shards, self.ema, stage, cfg, run.seed
        )
        self.progress = self.checkpoints.restore() or Progress()
        self.metrics = last_validation(self.folder / "metrics.jsonl", self.progress.clips)
        self.log: Log = NullLog()
        if accelerator.is_main_process:
            if run.resolved is not None:  # not before: a refused resume leaves the run as it was
                (self.folder / "config.yaml").write_text(run.resolved, encoding="utf-8")
            settings = {k: v for k, v in asdict(run).items() if k != "resolved"}
            config = {"stage": stage.config, "train": asdict(cfg), "run": settings}
            tracker = make_tracker(run, stage.name, config)
            self.log = RunLog(self.folder, stage.name, tracker, self.progress.clips)

    # ---- how far

    def fraction(self) -> float:
        """The share of the run that is done, by clips, or by time where there is a budget."""
        if self.cfg.minutes is not None:
            return self.progress.seconds / (60.0 * self.cfg.minutes)
        return self.progress.clips / self.cfg.clips

    def seconds_left(self, rate: float) -> float:
        if self.cfg.minutes is not None:
            return 60.0 * self.cfg.minutes - self.progress.seconds
        return (self.cfg.clips - self.progress.clips) / rate if rate else math.inf

    def due(self, every: int | None) -> bool:
        """Whether the last step crossed a multiple of `every`, or ended the run."""
        clips = self.progress.clips
        crossed = every is not None and clips // every > (clips - self.cfg.batch_size) // every
        return crossed or self.fraction() >= 1.0

    # ---- the run

    def run_to_end(self) -> TrainResult:
        try:
            if self.fraction() < 1.0:
                self._steps()
            elif self.checkpoints.exported_clips() != self.progress.clips:
                self.checkpoints.export(self.progress)
            self.accelerator.wait_for_everyone()
        except BaseException:
            self.log.close(failed=True)
            raise
        self.log.close()
        return TrainResult(self.progress, self.metrics, self.folder / "model.safetensors")

    def _steps(self) -> None:
        batches = train_loader(
            self.stage.train_set,
            self.micro,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.progress.clips,
            self.cfg.workers,
        )
        window = _Window()
        skipped_in_a_row = 0
        begun = time.monotonic() - self.progress.seconds
        ended = False
        while not ended:
            values, applied = self._step(batches, window)
            skipped_in_a_row = 0 if applied else skipped_in_a_row + 1
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{self.stage.name}: the gradient was not finite in {skipped_in_a_row} steps "
                    f"in a row, up to clip {self.progress.clips}; lower lr, or train with "
                    "mixed_precision=bf16 or no"
                )
            self.progress.seconds = self._agreed(time.monotonic() - begun)
            ended = self.fraction() >= 1.0  # not by the time of a save: the end is validated
            window.add(values, self.cfg.batch_size)
            self.log.progress(self.fraction())
            if self.due(self.cfg.log_every_clips):
                line = window.close() | {"seconds": self.progress.seconds}
                line["skipped"] = self.progress.skipped
                left = self.seconds_left(line["clips_per_second"])
                self.log.train(self.progress.clips, line, self.fraction(), left)
                window = _Window()
            with window.paused():
                if self.due(self.cfg.val_every_clips):
                    self._validate()
                if self.due(self.cfg.save_every_clips):
                    self.progress.seconds = self._agreed(time.monotonic() - begun)
                    self.checkpoints.save(self.progress)

    def _step(self, batches: Iterator[Any], window: _Window) -> tuple[dict[str, float], bool]:
        """One optimizer step over batch_size clips; (figures, whether it was applied)."""
        cfg, accelerator, progress = self.cfg, self.accelerator, self.progress
        after = progress.clips + cfg.batch_size
        factor = lr_factor(after, self.fraction(), cfg.warmup_clips, cfg.lr_schedule)
        set_lr(self.optimizer, cfg.lr * factor)
        sums: dict[str, Tensor] = {}
        for _ in range(accelerator.gradient_accumulation_steps):
            with window.waiting():
                batch = next(batches)
            counters = batch.counters
            batch = batch.to(accelerator.device)
            torch.manual_seed(keyed.key(self.run.seed, int(counters[0]), "torch"))
            device = accelerator.device
            info = StepInfo(counters, self.run.seed, device, accelerator, progress.clips)
            with accelerator.accumulate(self.model):
                loss = self.stage.objective(self.model, batch, info)
                accelerator.backward(loss.loss)
            for name, value in {"loss": loss.loss, **loss.metrics}.items():
                tensor = torch.as_tensor(value, device=accelerator.device).detach().float()
                sums[name] = sums.get(name, 0) + tensor
        values = self._mean_over_ranks(sums)
        values["grad_norm"], applied = self._apply(values["loss"])
        values["lr"] = cfg.lr * factor
        progress.steps += 1
        progress.skipped += not applied
        if self.ema is not None and applied:
            self.ema.update(progress.clips, cfg.batch_size)
        progress.clips = after
        return values, applied

    def _apply(self, loss: float) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite; (global norm, whether it stepped)."""
        limit = self.cfg.grad_clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(norm) if norm is not None else math.nan
        if self.deepspeed:  # its engine stepped, or skipped, inside backward
            return norm, not self.optimizer.step_was_skipped
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied or self.accelerator.scaler is not None:
            self.optimizer.step()  # with a scaler: it skips by itself, and lowers its scale
            applied = applied and not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        return norm, applied

    def _mean_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over micro-batches and ranks, by one reduction."""
        names = sorted(sums)
        stacked = torch.stack([sums[n] for n in names])
        stacked = stacked / self.accelerator.gradient_accumulation_steps
        reduced = cast(Tensor, self.accelerator.reduce(stacked, reduction="mean"))
        return dict(zip(names, reduced.tolist(), strict=True))

    def _agreed(self, seconds: float) -> float:
        """The first rank's clock, so that all ranks end at the same step."""
        if self.accelerator.num_processes == 1 or self.cfg.minutes is None:
            return seconds
        shared = torch.tensor([seconds], dtype=torch.float32, device=self.accelerator.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _validate(self) -> None:
        with no_trace(self.model, self.ema):
            self.metrics = evaluate(
                self.stage, self.model, self.accelerator, self.micro, self.run.seed
            )
            samples = self.stage.samples(self.model, self.accelerator) if self.stage.samples else []
        self.shards.settle()
        if self.metrics:
            self.log.validation(self.progress.clips, self.metrics)
        if samples:
            self.log.samples(self.progress.clips, samples)


class _Window:
    """Figures since the last log line: means, clips per second, share of time spent on waiting."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}  # some steps have figures that others have not
        self.clips = 0
        self.begun, self.wait, self.pause = time.monotonic(), 0.0, 0.0
        self.last: dict[str, float] = {}

    def add(self, values: dict[str, float], clips: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.clips += clips
        self.last = values

    def waiting(self) -> _Stopwatch:
        return _Stopwatch(self, "wait")

    def paused(self) -> _Stopwatch:
        return _Stopwatch(self, "pause")

    def close(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.begun - self.pause, 1e-9)
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        means["lr"] = self.last["lr"]
        return means | {"clips_per_second": self.clips / seconds, "data_wait": self.wait / seconds}


class _Stopwatch:
    """Adds the time spent inside to one of the window's sums."""

    def __init__(self, window: _Window, name: str):
        self.window, self.name = window, name

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *error: object) -> None:
        spent = time.monotonic() - self.begun
        setattr(self.window, self.name, getattr(self.window, self.name) + spent)


def _same_start(model: nn.Module, accelerator: Accelerator) -> None:
    """Every rank starts from the first rank's weights (FSDP2 does not see to it)."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            shared = tensor.detach().to(accelerator.device).contiguous()
            dist.broadcast(shared, 0)
            tensor.copy_(shared)
