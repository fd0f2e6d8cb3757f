"""What the training loop costs: beside a bare forward-backward-step, and beside writing the bytes.

    python -m benchmarks.loop                # the demo's base U-Net; needs runs/<name>/clip
    python -m benchmarks.loop --run-dir runs/demo

`step`: between two calls of the objective lies one whole step of the loop (data, clipping, EMA, log
lines); before each comes one bare step (objective, backward, AdamW) of a copy of the network on a
fixed batch, so that every pair is a neighbouring one. `save`: a checkpoint with its export against
one plain write and fsync of as many bytes. Medians.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.store.dataset import Batch
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import load_conditions
from dalle2_video.stages.unet import unet_stage
from dalle2_video.stages.wiring import store_of
from dalle2_video.training import checkpoint_files, checkpoints
from dalle2_video.training.config import RunConfig, TrainConfig
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import make_optimizer
from dalle2_video.training.stage import Loss, Stage, StepInfo

ROOT = Path(__file__).parents[1]
PAIRS, WARM = 7, 2


class Pairs:
    """An objective that times the loop's steps, each beside a bare one."""

    def __init__(self, stage: Stage, cfg: TrainConfig) -> None:
        self.inner, self.net = stage.objective, copy.deepcopy(stage.model)
        self.optimizer = make_optimizer(self.net, cfg)
        self.batch: Batch | None = None
        self.mark = 0.0
        self.loop: list[float] = []
        self.bare: list[float] = []

    def __call__(self, model: nn.Module, batch: Batch, step: StepInfo) -> Loss:
        now = time.perf_counter()
        if not model.training:  # memory is counted, or it validates
            return self.inner(model, batch, step)
        if self.mark:
            self.loop.append(now - self.mark)
        self.batch = self.batch or batch
        begun = time.perf_counter()
        self.inner(self.net, self.batch, step).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bare.append(time.perf_counter() - begun)
        self.mark = time.perf_counter()
        return self.inner(model, batch, step)


def write_plainly(folder: Path, count: int) -> float:
    """Seconds to write and flush `count` bytes."""
    block = os.urandom(1 << 24)
    begun = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for start in range(0, count, len(block)):
            file.write(block[: count - start])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def measure_saves(folder: Path, stage: Stage, cfg: TrainConfig, rounds: int) -> dict[str, float]:
    """Seconds of a save over those of a plain write of its bytes, in turn."""
    ratios, seconds, sizes = [], [], []
    whole_save = checkpoints.Checkpoints.save

    def timed(self: checkpoints.Checkpoints, progress: checkpoints.Progress) -> None:
        begun = time.perf_counter()
        whole_save(self, progress)
        seconds.append(time.perf_counter() - begun)
        newest = self.newest()
        assert newest is not None
        files = [*newest.rglob("*"), self.folder / checkpoint_files.WEIGHTS]
        sizes.append(sum(path.stat().st_size for path in files if path.is_file()))
        ratios.append(seconds[-1] / write_plainly(folder, sizes[-1]))

    checkpoints.Checkpoints.save = timed
    try:
        short = replace(cfg, clips=rounds * cfg.batch_size, save_every_clips=cfg.batch_size)
        train(replace(stage, val_set=None, samples=None), short, RunConfig(str(folder / "saves")))
    finally:
        checkpoints.Checkpoints.save = whole_save
    return {
        "save_over_plain_write": statistics.median(ratios[1:]),
        "save_seconds": statistics.median(seconds[1:]),
        "save_megabytes": sizes[-1] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", default="runs/demo", help="a run with a trained CLIP")
    parser.add_argument("--data", default="data/faces")
    parser.add_argument("overrides", nargs="*", help="key=value, as in configs/")
    a = parser.parse_args()
    settings = settings_of(compose(f"run_dir={a.run_dir}", f"faces.root={a.data}", *a.overrides))
    section, store = settings.unets["base"], store_of(settings)
    conditions = load_conditions(a.run_dir, store, 0, section.captions, load_frames=True)
    every = section.train.batch_size
    config = replace(
        section.train, optimizer="adamw", minutes=None, clips=every * (PAIRS + WARM + 1),
        log_every_clips=every, val_every_clips=None, save_every_clips=None,
    )  # fmt: skip
    stage = unet_stage("base", section, conditions, settings.sample, 0)
    with tempfile.TemporaryDirectory(dir=ROOT) as temporary:
        pairs = Pairs(stage, config)
        timed = replace(stage, objective=pairs, val_set=None, samples=None)
        train(timed, config, RunConfig(str(Path(temporary) / "steps")))
        steps = list(zip(pairs.loop, pairs.bare, strict=False))[WARM:]
        figures = {
            "loop_over_bare_step": statistics.median(loop / bare for loop, bare in steps),
            "bare_step_seconds": statistics.median(pairs.bare),
            "pairs": float(len(steps)),
        }
        figures |= measure_saves(Path(temporary), stage, config, 6)
    write_json(ROOT / "benchmarks/results/loop.json", figures | provenance())
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
