"""One training loop for every stage, on Accelerate: one process, DDP, DeepSpeed ZeRO or FSDP2.

Progress is counted in clips seen; the same command resumes. Step k of a run covers the global clip
sample_ids [k G, (k + 1) G), G = batch_size, whatever the ranks and micro-batches, and randomness is
keyed by these sample ids, so losses agree over any split of the work. The loader is not prepared by
Accelerate: each rank reads its own slice.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dalle2_video import keyed
from dalle2_video.data.atomic import whole
from dalle2_video.data.store.dataset import train_loader
from dalle2_video.provenance import provenance
from dalle2_video.training.accelerator import autocast_forward, make_accelerator
from dalle2_video.training.checkpoints import Checkpoints, Progress, saved_progress, strategy_of
from dalle2_video.training.config_guard import check_folder, check_ranks, data_facts, from_yaml
from dalle2_video.training.ema import Ema
from dalle2_video.training.log import (
    Log,
    NullLog,
    RunLog,
    check_wandb,
    last_validation,
    make_tracker,
)
from dalle2_video.training.memory import advice, estimate, peak_bytes
from dalle2_video.training.metrics import Flight, Window
from dalle2_video.training.optimizer import lr_factor, make_optimizer, set_lr
from dalle2_video.training.preemption import (
    EXIT_CODE,
    Interrupted,
    Signals,
    mark_ended,
    mark_unfinished,
)
from dalle2_video.training.sharded import shards_of
from dalle2_video.training.stage import RunConfig, Stage, StepInfo, TrainConfig
from dalle2_video.training.validation import evaluate, no_trace

MAX_SKIPPED_IN_A_ROW = 3
STEPS_BEHIND = 1  # on a GPU: figures are read, and signals heeded, one step later
MAX_OVERFLOWS_IN_A_ROW = 50  # fp16 halves its scale from 2^16 down, so some at the start are normal


@dataclass(frozen=True)
class TrainResult:
    """progress: clips, steps, skipped, seconds. metrics: the last validation. model: the file."""

    progress: Progress
    metrics: dict[str, float]
    model: Path


class TrainingDiverged(RuntimeError):  # noqa: N818
    """Loss or gradient were not finite for several steps in a row."""


def train(stage: Stage, cfg: TrainConfig, run: RunConfig) -> TrainResult:
    """Train `stage` in `run.dir` until `cfg.clips` clips or `cfg.minutes` minutes; resume if begun.

    Every rank calls it with the same arguments. Raises ConfigError, CheckpointError (resuming into
    another model), WandbKeyError, TrainingDiverged; Interrupted, after saving, where a signal asked
    to end.
    """
    check_wandb(run)
    accelerator, micro = make_accelerator(cfg, run)
    try:
        return _Trainer(stage, cfg, run, accelerator, micro).run_to_end()
    except RuntimeError as error:
        if re.search("timed? ?out", str(error), re.IGNORECASE):
            raise RuntimeError(
                f"a rank did not answer within timeout_minutes={run.timeout_minutes:g} "
                f"(this is rank {accelerator.process_index}): {error}"
            ) from error
        raise
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
        self.skipped_in_a_row = 0
        check_ranks(accelerator, self._facts())
        self.progress = saved_progress(self.folder)
        strategy, notes = strategy_of(accelerator), []
        if accelerator.is_main_process and self.fraction() < 1.0:
            memory = estimate(stage, cfg, run, accelerator, strategy, micro)
            notes = [*memory.lines(), *advice(memory, strategy, micro)]
        optimizer = make_optimizer(stage.model, cfg)
        _same_start(stage.model, accelerator)
        stage.model.train()
        stage.model._no_split_modules = stacked_layers(stage.model)  # pyright: ignore
        if accelerator.is_fsdp2 and run.mixed_precision == "bf16":
            autocast_forward(stage.model, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.shards = shards_of(accelerator, self.model)
        unwrapped = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.clipped = clip_groups(cast(nn.Module, unwrapped))
        halflife = cfg.ema_halflife_clips
        self.ema = Ema(self.shards, halflife, cfg.ema_rampup) if halflife else None
        self.checkpoints = Checkpoints(
            self.folder, accelerator, self.shards, self.ema, stage, cfg, run.seed
        )
        check_folder(run)
        settings = [without(group, "params", "lr") for group in self.optimizer.param_groups]
        restored = self.checkpoints.restore()
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # loading a state brings the settings of its time
        self.progress = restored[0] if restored else Progress()
        notes += restored[1:] if restored else []
        self.metrics = last_validation(self.folder / "metrics.jsonl", self.progress.clips)
        self.log: Log = NullLog()
        if accelerator.is_main_process:
            if run.resolved is not None:  # not before: a refused resume leaves the run as it was
                with whole(self.folder / "config.yaml") as partial:
                    partial.write_text(run.resolved, encoding="utf-8")
            told = without(asdict(run), "resolved")
            config = {"stage": stage.config, "train": asdict(cfg), "run": told} | provenance()
            tracker = make_tracker(run, stage.name, config)
            self.log = RunLog(self.folder, stage.name, tracker, self.progress.clips)
            for note in notes:
                self.log.note(note)

    def _facts(self) -> dict[str, Any]:
        stage, run = self.stage, self.run
        return {
            "config": from_yaml(run.resolved) if run.resolved else None,
            "train": asdict(self.cfg),
            "stage": {"name": stage.name, "seed": run.seed} | stage.config | stage.meta,
            "data": data_facts(stage.train_set),
        }

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
        with Signals() as signals:
            try:
                if self.fraction() < 1.0:
                    self._mark("running")
                    self.accelerator.wait_for_everyone()
                    self._steps(signals)
                elif self.checkpoints.exported_clips() != self.progress.clips:
                    self.checkpoints.export(self.progress)
                self.accelerator.wait_for_everyone()
            except BaseException as error:
                if signals.asked is None and self._would_repeat(error):
                    mark_ended(self.folder)  # whichever rank it is
                self.log.close(failed=True)
                raise
        self._mark(None)
        self._tell_peak()
        self.log.close()
        return TrainResult(self.progress, self.metrics, self.folder / "model.safetensors")

    def _would_repeat(self, error: BaseException) -> bool:
        """Whether the same command would meet this error again: not if another rank, a device or a
        disk went away, or the user stopped it.
        """
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            return self.accelerator.num_processes == 1
        passing = Interrupted, KeyboardInterrupt, OSError, torch.AcceleratorError
        return not isinstance(error, passing)

    def _tell_peak(self) -> None:
        peaks = gather_object([peak_bytes(self.accelerator.device)])
        self.log.note(f"memory  {'measured peak':20}{max(peaks) / 1e9:10.3f} GB, of any rank")

    def _mark(self, reason: str | None) -> None:
        if not self.accelerator.is_main_process:
            return
        if reason is None:
            mark_ended(self.folder)
        else:
            mark_unfinished(self.folder, self.progress.clips, reason)

    def _steps(self, signals: Signals) -> None:
        batches = train_loader(
            self.stage.train_set,
            self.micro,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.progress.clips,
            self.cfg.workers,
        )
        flight = Flight(STEPS_BEHIND if self.accelerator.device.type == "cuda" else 0)
        every_clips = self.cfg.log_every_clips, self.cfg.val_every_clips, self.cfg.save_every_clips
        window = Window()
        begun = time.monotonic() - self.progress.seconds
        ended = asked = False
        while not (ended or asked):
            flight.send(*self._step(batches, window, signals, begun))
            due = any(self.due(every) for every in every_clips)
            asked = self._read(flight, window, everything=due)
            ended = self.fraction() >= 1.0  # not by the time of a save: the end is validated
            if asked or ended:
                self._read(flight, window, everything=True)
            self.log.progress(self.fraction())
            if self.due(self.cfg.log_every_clips):
                line = window.close() | {"seconds": self.progress.seconds}
                line["skipped"] = self.progress.skipped
                line["memory_gigabytes"] = peak_bytes(self.accelerator.device) / 1e9
                left = self.seconds_left(line["clips_per_second"])
                self.log.train(self.progress.clips, line, self.fraction(), left)
                window = Window()
            with window.paused():
                if self.due(self.cfg.val_every_clips):
                    self._validate()
                if asked or self.due(self.cfg.save_every_clips):
                    self.progress.seconds = self._agreed(time.monotonic() - begun)
                    if not ended and self.cfg.minutes is not None:  # the end is still to come
                        self.progress.seconds = min(self.progress.seconds, 59.9 * self.cfg.minutes)
                    self.checkpoints.save(self.progress)
        if asked and not ended:
            self._interrupted(signals)

    def _read(self, flight: Flight, window: Window, everything: bool) -> bool:
        """Take note of what has come from the device; whether a rank is asked to end."""
        asked = False
        for values in flight.landed(everything):
            self.progress.seconds = values.pop("seconds")
            asked = asked or values.pop("asked") > 0
            applied = values.pop("applied") == 1.0
            self.progress.skipped += not applied
            self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
            self._check_finite(values)
            window.add(values, self.cfg.batch_size)
        return asked

    def _interrupted(self, signals: Signals) -> None:
        name = signals.asked.name if signals.asked else "a signal to another rank"
        self._mark(name)
        self.log.note(
            f"{name}: saved at {self.progress.clips:,} clips, ends; the same command goes on"
        )
        self.accelerator.wait_for_everyone()
        raise Interrupted(EXIT_CODE)

    def _check_finite(self, values: dict[str, float]) -> None:
        overflow = self.run.mixed_precision == "fp16" and math.isfinite(values["loss"])
        if self.skipped_in_a_row < (MAX_OVERFLOWS_IN_A_ROW if overflow else MAX_SKIPPED_IN_A_ROW):
            return
        good = self.checkpoints.newest()
        back = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"{self.stage.name}: not finite in {self.skipped_in_a_row} steps in a row, "
            f"up to clip {self.progress.clips} (the last: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}); {back}. Lower lr, or train with mixed_precision=bf16 or no"
        )

    def _step(
        self, batches: Iterator[Any], window: Window, signals: Signals, begun: float
    ) -> tuple[list[str], Tensor]:
        """One optimizer step over batch_size clips -> names and values of its figures, which are
        means over the ranks, but for "seconds" since `begun`, which is the first rank's.

        Nothing here waits for the device, but for fp16's scaler, DeepSpeed and Muon, which do.
        """
        cfg, accelerator, progress = self.cfg, self.accelerator, self.progress
        after = progress.clips + cfg.batch_size
        factor = lr_factor(after, self.fraction(), cfg.warmup_clips, cfg.lr_schedule)
        set_lr(self.optimizer, cfg.lr * factor)
        sums: dict[str, Tensor] = {}
        steps = accelerator.gradient_accumulation_steps
        for _ in range(steps):
            with window.waiting():
                batch = next(batches)
            sample_ids = batch.sample_ids
            batch = batch.to(accelerator.device)
            torch.manual_seed(keyed.key(self.run.seed, int(sample_ids[0]), "torch"))
            device = accelerator.device
            info = StepInfo(sample_ids, self.run.seed, device, accelerator, progress.clips)
            with accelerator.accumulate(self.model):
                loss = self.stage.objective(self.model, batch, info)
                accelerator.backward(loss.loss)
            for name, value in {"loss": loss.loss, **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + self._on_device(value).detach().float() / steps
        world, first = accelerator.num_processes, accelerator.is_main_process
        sums["asked"] = self._on_device(float(signals.asked is not None))
        seconds = time.monotonic() - begun
        sums["seconds"] = self._on_device(seconds * world if first else 0.0)
        names = sorted(sums)
        means = cast(Tensor, accelerator.reduce(torch.stack([sums[n] for n in names]), "mean"))
        norm, applied = self._apply(means[names.index("loss")])
        progress.steps += 1
        if self.ema is not None:
            self.ema.update(progress.clips, cfg.batch_size, applied)
        progress.clips = after
        rest = torch.stack([norm, applied, self._on_device(cfg.lr * factor)])
        return [*names, "grad_norm", "applied", "lr"], torch.cat([means, rest])

    def _on_device(self, value: Tensor | float) -> Tensor:
        value = value if isinstance(value, Tensor) else torch.tensor(value)
        return value.to(self.accelerator.device, torch.float32, non_blocking=True)

    def _apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step, unless the gradient or the ranks' loss is not finite -> the global norm
        (of what is not clipped apart) and 1.0 or 0.0, whether it stepped.
        """
        accelerator = self.accelerator
        limit = self.cfg.grad_clip or math.inf
        if self.deepspeed:  # its engine clipped all together and stepped, or skipped, in backward
            norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
            norm = math.nan if norm is None else norm
            applied = float(not self.optimizer.step_was_skipped)
            return self._on_device(norm), self._on_device(applied)
        accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(part, limit) for part in self.clipped]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = norms[0]
        applied = (sum(norms) + loss).isfinite().float()
        if accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = 1.0 - applied  # skipped by the fused kernel
            self.optimizer.step()
        else:
            self.optimizer.step()  # the scaler skips by itself, and lowers its scale
            applied = applied * float(not self.optimizer.step_was_skipped)
        self.optimizer.zero_grad()
        return norm.float(), applied

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


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy without these keys."""
    return {name: value for name, value in values.items() if name not in names}


def stacked_layers(model: nn.Module) -> list[str]:
    """Names of the classes that stand in lists of layers: what FSDP2 gathers one at a time.

    Accelerate (1.15) reads them from `_no_split_modules`; by size it would take the lists too,
    which cannot be gathered.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part if not isinstance(layer, nn.ModuleList)]
    return sorted({type(layer).__name__ for layer in layers})


def clip_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters whose gradients are clipped together: those of the parts that the model lists
    in `apart`, which must not shrink the steps of the others, come second.
    """
    apart = tuple(f"{name}." for name in getattr(model, "apart", ()))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [p for name, p in named if not name.startswith(apart)]
    own = [p for name, p in named if name.startswith(apart)]
    return [part for part in (rest, own) if part]


def _same_start(model: nn.Module, accelerator: Accelerator) -> None:
    """Every rank starts from the first rank's weights (FSDP2 does not see to it)."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            shared = tensor.detach().to(accelerator.device).contiguous()
            dist.broadcast(shared, 0)
            tensor.copy_(shared)
