"""One training loop for every stage, on Accelerate: one process, DDP, DeepSpeed ZeRO or FSDP2.

Progress is counted in clips seen; the same command resumes. Optimizer step k of a run covers the
global sample ids [k G, (k + 1) G), G = batch_size, whatever the ranks and micro-batches, and
randomness is keyed by these ids, so losses agree over any split of the work. The loader is not
prepared by Accelerate: each rank reads its own slice.
"""

from __future__ import annotations

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
from accelerate.utils import gather_object
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.atomic import whole
from dalle2_video.data.store.dataset import train_loader
from dalle2_video.provenance import provenance
from dalle2_video.training.accelerator import LaunchError, make_accelerator, strategy_of
from dalle2_video.training.checkpoint_files import saved_progress
from dalle2_video.training.checkpoints import Checkpoints
from dalle2_video.training.config import RunConfig, TrainConfig
from dalle2_video.training.config_guard import check_folder, check_ranks, data_facts, from_yaml
from dalle2_video.training.divergence import DivergenceCheck
from dalle2_video.training.ema import Ema
from dalle2_video.training.log import Log, NullLog, RunLog, last_validation
from dalle2_video.training.memory import advice, estimate, peak_bytes
from dalle2_video.training.metrics import AsyncMetrics, MetricsAverager
from dalle2_video.training.optimizer import lr_factor, set_lr
from dalle2_video.training.optimizer_update import OptimizerUpdate, on_device
from dalle2_video.training.preemption import (
    EXIT_CODE,
    Interrupted,
    Signals,
    mark_ended,
    mark_unfinished,
    would_repeat,
)
from dalle2_video.training.prepare import prepare
from dalle2_video.training.progress import Progress
from dalle2_video.training.sharded import sharded_params
from dalle2_video.training.stage import Stage, StepInfo
from dalle2_video.training.trackers import check_tracker, make_tracker
from dalle2_video.training.validation import evaluate, no_trace

STEPS_BEHIND = 1  # on a GPU: metrics are read, and signals heeded, one optimizer step later


@dataclass(frozen=True)
class TrainResult:
    """How far the run is, the metrics of its last validation, and its model file's path."""

    progress: Progress
    metrics: dict[str, float]
    model: Path


def train(stage: Stage, cfg: TrainConfig, run: RunConfig) -> TrainResult:
    """Train `stage` in `run.dir` until `cfg.clips` clips or `cfg.minutes` minutes; resume if begun.

    Every rank calls it with the same arguments. Raises ConfigError, CheckpointError (resuming into
    another model), TrackerError, LaunchError, TrainingDiverged; Interrupted, after saving, where a
    signal asked to end.
    """
    check_tracker(run)
    accelerator, micro = make_accelerator(cfg, run)
    try:
        return _Trainer(stage, cfg, run, accelerator, micro).run_to_end()
    except RuntimeError as error:
        if re.search("timed? ?out", str(error), re.IGNORECASE):
            raise LaunchError(
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
        check_ranks(accelerator, self._facts())
        self.progress = saved_progress(self.folder)
        strategy, notes = strategy_of(accelerator), []
        if accelerator.is_main_process and self.fraction() < 1.0:
            memory = estimate(stage, cfg, run, accelerator, strategy, micro)
            notes = [*memory.lines(), *advice(memory, strategy, micro)]
        self.model, self.optimizer = prepare(stage.model, cfg, accelerator, run.mixed_precision)
        self.sharded = sharded_params(accelerator, self.model)
        self.update = OptimizerUpdate(accelerator, self.model, self.optimizer, cfg.grad_clip)
        halflife = cfg.ema_halflife_clips
        self.ema = Ema(self.sharded, halflife, cfg.ema_rampup) if halflife else None
        self.checkpoints = Checkpoints(
            self.folder, accelerator, self.sharded, self.ema, stage, cfg, run.seed
        )
        fp16 = run.mixed_precision == "fp16"
        self.divergence = DivergenceCheck(stage.name, fp16, self.checkpoints.newest)
        check_folder(run)
        settings = [without(group, "params", "lr") for group in self.optimizer.param_groups]
        restored = self.checkpoints.restore()
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # loading a state brings the settings of its time
        self.progress = restored[0] if restored else Progress()
        notes += restored[1:] if restored else []
        self.metrics = last_validation(self.folder / "metrics.jsonl", self.progress.clips)
        self.log: Log = self._open_log(notes) if accelerator.is_main_process else NullLog()

    def _facts(self) -> dict[str, Any]:
        """What must be alike on all ranks."""
        stage, run = self.stage, self.run
        return {
            "config": from_yaml(run.resolved) if run.resolved else None,
            "train": asdict(self.cfg),
            "stage": {"name": stage.name, "seed": run.seed} | stage.config | stage.meta,
            "data": data_facts(stage.train_set),
        }

    def _open_log(self, notes: list[str]) -> RunLog:
        """Write config.yaml and begin the log; not before a resume may be refused, which leaves the
        run's folder as it was.
        """
        if self.run.resolved is not None:
            with whole(self.folder / "config.yaml") as partial:
                partial.write_text(self.run.resolved, encoding="utf-8")
        settings = without(asdict(self.run), "resolved", "defaults")
        config = {"stage": self.stage.config, "train": asdict(self.cfg), "run": settings}
        name, clips = self.stage.name, self.progress.clips
        tracker = make_tracker(self.run, name, config | provenance(), clips)
        log = RunLog(self.folder, name, tracker, clips)
        for note in notes:
            log.note(note)
        return log

    def fraction(self) -> float:
        """The share of the run that is done."""
        return self.progress.fraction(self.cfg)

    def due(self, every_clips: int | None) -> bool:
        """Whether the last optimizer step crossed a multiple of `every_clips`, or ended the run."""
        return self.progress.due(self.cfg, every_clips)

    def run_to_end(self) -> TrainResult:
        """The optimizer steps that are left, or model.safetensors again where a kill took it."""
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
                if signals.asked is None and would_repeat(error, self.accelerator.num_processes):
                    mark_ended(self.folder)  # whichever rank it is
                self.log.close(failed=True)
                raise
        self._mark(None)
        peaks = gather_object([peak_bytes(self.accelerator.device)])
        self.log.note(f"done: {self.folder / 'model.safetensors'}")
        self.log.note(f"memory  {'measured peak':20}{max(peaks) / 1e9:10.3f} GB, of any process")
        self.log.close()
        return TrainResult(self.progress, self.metrics, self.folder / "model.safetensors")

    def _mark(self, reason: str | None) -> None:
        if not self.accelerator.is_main_process:
            return
        if reason is None:
            mark_ended(self.folder)
        else:
            mark_unfinished(self.folder, self.progress.clips, reason)

    def _steps(self, signals: Signals) -> None:
        """All optimizer steps, with their log lines, validations and checkpoints."""
        batches = train_loader(
            self.stage.train_set,
            self.micro,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.progress.clips,
            self.cfg.workers,
        )
        sent = AsyncMetrics(STEPS_BEHIND if self.accelerator.device.type == "cuda" else 0)
        every_clips = self.cfg.log_every_clips, self.cfg.val_every_clips, self.cfg.save_every_clips
        averager = MetricsAverager()
        begun = time.monotonic() - self.progress.seconds
        ended = asked = False
        while not (ended or asked):
            sent.send(*self._step(batches, averager, signals, begun))
            due = any(self.due(every) for every in every_clips)
            asked = self._read(sent, averager, everything=due)
            ended = self.fraction() >= 1.0  # not by the time of a save: the end is validated
            if asked or ended:
                self._read(sent, averager, everything=True)
            self.log.progress(self.fraction())
            if self.due(self.cfg.log_every_clips):
                self._log_line(averager)
                averager = MetricsAverager()
            with averager.paused():
                if self.due(self.cfg.val_every_clips):
                    self._validate()
                if asked or self.due(self.cfg.save_every_clips):
                    self._save(begun, ended)
        if asked and not ended:
            self._interrupted(signals)

    def _step(
        self, batches: Iterator[Any], averager: MetricsAverager, signals: Signals, begun: float
    ) -> tuple[list[str], Tensor]:
        """One optimizer step over batch_size clips -> names and values of its metrics, which are
        means over the ranks, but for "seconds" since `begun`, which is the first rank's.

        Nothing here waits for the device, but for fp16's scaler, DeepSpeed and Muon, which do.
        """
        cfg, accelerator, progress = self.cfg, self.accelerator, self.progress
        device = accelerator.device
        after = progress.clips + cfg.batch_size
        factor = lr_factor(after, self.fraction(), cfg.warmup_clips, cfg.lr_schedule)
        set_lr(self.optimizer, cfg.lr * factor)
        sums: dict[str, Tensor] = {}
        micro_batches = accelerator.gradient_accumulation_steps
        for _ in range(micro_batches):
            with averager.waiting():
                batch = next(batches)
            sample_ids = batch.sample_ids
            batch = batch.to(device)
            torch.manual_seed(keyed.key(self.run.seed, int(sample_ids[0]), "torch"))
            info = StepInfo(sample_ids, self.run.seed, device, accelerator, progress.clips)
            with accelerator.accumulate(self.model):
                loss = self.stage.objective(self.model, batch, info)
                accelerator.backward(loss.loss)
            for name, value in {"loss": loss.loss, **loss.metrics}.items():
                value = on_device(value, device).detach().float()
                sums[name] = sums.get(name, 0) + value / micro_batches
        world, first = accelerator.num_processes, accelerator.is_main_process
        sums["asked"] = on_device(float(signals.asked is not None), device)
        seconds = time.monotonic() - begun
        sums["seconds"] = on_device(seconds * world if first else 0.0, device)
        names = sorted(sums)
        means = cast(Tensor, accelerator.reduce(torch.stack([sums[n] for n in names]), "mean"))
        norm, applied = self.update.apply(means[names.index("loss")])
        progress.optimizer_steps += 1
        if self.ema is not None:
            self.ema.update(progress.clips, cfg.batch_size, applied)
        progress.clips = after
        rest = torch.stack([norm, applied, on_device(cfg.lr * factor, device)])
        return [*names, "grad_norm", "applied", "lr"], torch.cat([means, rest])

    def _read(self, sent: AsyncMetrics, averager: MetricsAverager, everything: bool) -> bool:
        """Take note of what has come from the device; whether a rank is asked to end."""
        asked = False
        for values in sent.arrived(everything):
            self.progress.seconds = values.pop("seconds")
            asked = asked or values.pop("asked") > 0
            applied = values.pop("applied") == 1.0
            self.progress.skipped += not applied
            self.divergence.note(applied, self.progress.clips, values)
            averager.add(values, self.cfg.batch_size)
        return asked

    def _log_line(self, averager: MetricsAverager) -> None:
        line = averager.averages() | {"seconds": self.progress.seconds}
        line["skipped"] = self.progress.skipped
        line["memory_gigabytes"] = peak_bytes(self.accelerator.device) / 1e9
        left = self.progress.seconds_left(self.cfg, line["clips_per_second"])
        self.log.train(self.progress.clips, line, self.fraction(), left)

    def _validate(self) -> None:
        with no_trace(self.model, self.ema):
            self.metrics = evaluate(
                self.stage, self.model, self.accelerator, self.micro, self.run.seed
            )
            samples = self.stage.samples(self.model, self.accelerator) if self.stage.samples else []
        self.sharded.settle()
        if self.metrics:
            self.log.validation(self.progress.clips, self.metrics)
        if samples:
            self.log.samples(self.progress.clips, samples)

    def _save(self, begun: float, ended: bool) -> None:
        self.progress.seconds = self._agreed(time.monotonic() - begun)
        if not ended and self.cfg.minutes is not None:  # the end is still to come
            self.progress.seconds = min(self.progress.seconds, 59.9 * self.cfg.minutes)
        self.checkpoints.save(self.progress)

    def _agreed(self, seconds: float) -> float:
        """The first rank's clock, so that all ranks end at the same optimizer step."""
        if self.accelerator.num_processes == 1 or self.cfg.minutes is None:
            return seconds
        shared = torch.tensor([seconds], dtype=torch.float32, device=self.accelerator.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _interrupted(self, signals: Signals) -> None:
        name = signals.asked.name if signals.asked else "a signal to another rank"
        self._mark(name)
        self.log.note(
            f"{name}: saved at {self.progress.clips:,} clips, ends; the same command goes on"
        )
        self.accelerator.wait_for_everyone()
        raise Interrupted(EXIT_CODE)


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy without these keys."""
    return {name: value for name, value in values.items() if name not in names}
