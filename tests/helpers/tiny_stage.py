"""A stage that trains in milliseconds: noisy regression with keyed noise, a frozen tower, a buffer.

Run as a script under `accelerate launch` it is one rank of the tests of test_distributed.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video import keyed
from dalle2_video.config import ConfigError
from dalle2_video.training import checkpoints
from dalle2_video.training.config import RunConfig, TrainConfig
from dalle2_video.training.loop import train
from dalle2_video.training.sharded import sharded_params
from dalle2_video.training.stage import Loss, Stage, StepInfo
from dalle2_video.training.validation import mean_objective
from tests.helpers.run_files import half_done

DIM = 8


@dataclass
class TinyBatch:
    sample_ids: Tensor
    x: Tensor

    def to(self, device: torch.device) -> TinyBatch:
        return TinyBatch(self.sample_ids, self.x.to(device, non_blocking=True))


class TinySet:
    """num clips of DIM numbers; clip i is a pure function of i."""

    def __init__(self, num: int = 32):
        self.num = num

    def __len__(self) -> int:
        return self.num

    def pointer(self, sample_id: int) -> tuple[int, int]:
        return sample_id, sample_id % self.num

    def eval_pointer(self, index: int) -> tuple[int, int]:
        return index, index

    def collate(self, pointers: list[tuple[int, int]]) -> TinyBatch:
        index = torch.tensor([p[1] for p in pointers])
        x = keyed.randn((DIM,), 5, index, "x")
        return TinyBatch(torch.tensor([p[0] for p in pointers]), x)


class TinyNet(nn.Module):
    def __init__(self, hidden: int = 16, frozen: bool = True):
        super().__init__()
        self.up = nn.Linear(DIM, hidden)
        self.down = nn.Linear(hidden, DIM)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.linspace(0, 1, DIM))
        self.tower = nn.Linear(DIM, DIM) if frozen else nn.Identity()
        self.tower.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down(torch.tanh(self.up(x))) + self.tower(x) + self.shift


def objective(model: nn.Module, batch: TinyBatch, step: StepInfo) -> Loss:
    noise = keyed.randn((DIM,), step.seed, step.sample_ids, "noise", "cpu").to(step.device)
    error = (model(batch.x + 0.1 * noise) - batch.x.flip(1)) ** 2
    return Loss(error.mean(), {"worst": error.mean(1).mean()})


def broken(at: set[int], value: float = float("nan")) -> Callable[..., Loss]:
    """The tiny objective, its loss times `value` in the batches that begin at these clips."""

    def wrapped(model: nn.Module, batch: TinyBatch, step: StepInfo) -> Loss:
        loss = objective(model, batch, step)
        return Loss(loss.loss * value) if int(step.sample_ids[0]) in at else loss

    return wrapped


def tiny_stage(hidden: int = 16, frozen: bool = True, **changes) -> Stage:
    torch.manual_seed(1)
    stage = Stage(
        name="tiny",
        model=TinyNet(hidden, frozen),
        objective=objective,
        train_set=TinySet(),
        val_set=TinySet(10),
        config={"hidden": hidden, "layers": {"frozen": frozen}},
        meta={"clip_hash": "abc"},
        state_filter=(lambda name: not name.startswith("tower.")) if frozen else None,
    )
    return replace(stage, **changes)


def tiny_config(**changes) -> TrainConfig:
    base = TrainConfig(
        batch_size=8,
        micro_batch_size=None,
        clips=32,
        minutes=None,
        lr=0.01,
        warmup_clips=16,
        lr_schedule="cosine",
        optimizer="adamw",
        weight_decay=0.1,
        betas=(0.9, 0.99),
        grad_clip=1.0,
        ema_halflife_clips=16.0,
        ema_rampup=0.5,
        log_every_clips=8,
        val_every_clips=16,
        save_every_clips=16,
        keep_checkpoints=2,
        keep_every_clips=None,
        workers=0,
    )
    return replace(base, **changes)


def run_rank(root: Path, precision: str = "no") -> None:
    """One rank: 4 steps in one go (root/whole), and 2 steps resumed to 4 (root/resumed); then 3
    steps (root/broken) of which the second meets NaN in one micro-batch of one rank; then what
    another strategy began (root/foreign), where there is such a folder; then ranks that disagree.

    Each rank writes how many ranks it sees, how many numbers of the weights it holds, what it
    predicts under the EMA, and why ranks that disagree did not train.
    """
    torch.set_num_threads(1)
    cfg = tiny_config(micro_batch_size=2)
    seen = {}

    def validate(model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        sharded = sharded_params(accelerator, model)
        held = sum(sharded.local(name).numel() for name in sharded.trainable)
        seen.update(world=accelerator.num_processes, held=held, type=type(sharded).__name__)
        seen["predicts"] = model(torch.linspace(-1, 1, DIM)[None]).flatten().tolist()
        return mean_objective(tiny_stage(), model, accelerator, 2, 3)

    run = RunConfig(str(root / "whole"), seed=3, mixed_precision=precision)
    written = []
    save_model = checkpoints.save_model
    checkpoints.save_model = lambda path, *rest: (
        written.append(str(path)),
        save_model(path, *rest),
    )
    train(tiny_stage(validate=validate), cfg, run)
    seen["written"] = len(written)
    rank = torch.distributed.get_rank()
    predicts = list(seen["predicts"])
    if rank == 0:
        half_done(root / "whole", root / "resumed")
    torch.distributed.barrier()
    stage = tiny_stage(validate=validate)
    with torch.no_grad():
        stage.model.up.weight.fill_(0.5)  # must come from the checkpoint
    train(stage, cfg, replace(run, dir=str(root / "resumed")))

    stage = tiny_stage(objective=broken({8}), val_set=None)
    short = replace(cfg, clips=24, save_every_clips=None, val_every_clips=None)
    train(stage, short, replace(run, dir=str(root / "broken")))
    if (root / "foreign").exists():
        train(tiny_stage(), cfg, replace(run, dir=str(root / "foreign")))
    try:
        train(tiny_stage(), replace(cfg, lr=0.01 + rank), replace(run, dir=str(root / "apart")))
    except ConfigError as error:
        seen["apart"] = str(error)
    (root / f"rank{rank}.json").write_text(json.dumps(seen | {"predicts": predicts}))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), *sys.argv[2:])
