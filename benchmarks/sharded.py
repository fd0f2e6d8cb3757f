"""Bytes that each of two processes really holds under ZeRO-3 and FSDP2, for the preset `small`.

    python -m benchmarks.sharded             # a minute or two

Counts weights, gradients, optimizer and EMA of each process in the second optimizer step of a run,
on clips of noise (2 frames: the weights are the same for any number). `over_even_share`: bytes of a
process over the bytes of all divided by the processes. ZeRO-3 keeps parameters below its
persistence threshold (stage3_param_persistence_threshold in configs/deepspeed_config.json) whole
everywhere.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dalle2_video.cli import compose
from dalle2_video.config import from_config
from dalle2_video.data.atomic import write_json
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.provenance import provenance
from dalle2_video.stages.sections import UnetSection
from dalle2_video.training import loop
from dalle2_video.training.config import RunConfig
from dalle2_video.training.memory import fixed_parts
from dalle2_video.training.optimizer_update import OptimizerUpdate
from dalle2_video.training.sharded import Zero3Params
from dalle2_video.training.stage import Loss, Stage, StepInfo

ROOT = Path(__file__).parents[1]
STRATEGIES = ("zero3", "fsdp2")
WIDTH, FRAMES = 512, 2


@dataclasses.dataclass
class Noise:
    """A batch of nothing but sample_ids."""

    sample_ids: Tensor

    def to(self, device: torch.device) -> "Noise":
        return self


class NoiseSet:
    """Clips that the objective makes up."""

    def __len__(self) -> int:
        return 64

    def pointer(self, sample_id: int) -> int:
        return sample_id

    def collate(self, pointers: list[int]) -> Noise:
        return Noise(torch.tensor(pointers))


def objective(model: nn.Module, batch: Noise, step: StepInfo) -> Loss:
    size = len(batch.sample_ids)
    text, place = torch.randn(size, 4, WIDTH), torch.arange(4).expand(size, 4)
    condition = Condition.of(torch.randn(size, WIDTH), text, place, torch.randn(size, WIDTH))
    z = torch.randn(size, 3, FRAMES, 64, 64)
    return Loss((model(z, torch.zeros(size), condition) - z).square().mean())


def num_bytes(tensor: Any) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def held(trainer: Any) -> dict[str, int]:
    """Bytes of this process by kind, between backward and the end of the optimizer step."""
    sharded, params = trainer.sharded, list(trainer.sharded.params.values())
    found = {"EMA": sum(num_bytes(t) for t in trainer.ema.average.values())}
    if isinstance(sharded, Zero3Params):
        engine = trainer.model.optimizer
        found["weights"] = sum(num_bytes(p.ds_tensor) for p in params)
        found["whole small weights"] = sum(num_bytes(p) for p in engine.persistent_parameters)
        found["gradients"] = num_bytes(engine.grad_partitions_flat_buffer)
        found["float32 masters"] = sum(num_bytes(t) for t in engine.fp32_partitioned_groups_flat)
        state = engine.optimizer.state
    else:
        found["weights"] = sum(num_bytes(p) for p in params)
        found["gradients"] = sum(num_bytes(p.grad) for p in params if p.grad is not None)
        state = trainer.optimizer.optimizer.state
    moments = [t for own in state.values() for t in own.values() if torch.is_tensor(t)]
    found["optimizer"] = sum(num_bytes(t) for t in moments if t.numel() > 1)
    return found


def rank(folder: Path) -> None:
    """One process of a launch: two optimizer steps; writes what it held in the second."""
    torch.set_num_threads(1)
    cfg = compose("experiment=celebvtext", "unets/base=small")
    section = from_config(UnetSection, cfg.unets.base, "unets.base")
    torch.manual_seed(0)
    train_config = dataclasses.replace(
        section.train, batch_size=2, micro_batch_size=1, clips=4, warmup_clips=0, optimizer="adamw",
        log_every_clips=2, val_every_clips=None, save_every_clips=None, workers=0,
    )  # fmt: skip
    seen: dict[str, int] = {}
    optimizer_step = loop._Trainer._step
    trainers = []

    def stepping(self: Any, *arguments: Any) -> tuple[list[str], Tensor]:
        trainers[:] = [self]
        return optimizer_step(self, *arguments)

    apply = OptimizerUpdate.apply

    def watching(self: OptimizerUpdate, loss: Tensor) -> tuple[Tensor, Tensor]:
        before = held(trainers[0])
        result = apply(self, loss)
        seen.update(held(trainers[0]) | {"gradients": before["gradients"]})
        return result

    loop._Trainer._step, OptimizerUpdate.apply = stepping, watching
    net = Unet3D(section.model, WIDTH, WIDTH)
    seen_params = sum(p.numel() for p in net.parameters())
    stage = Stage("sharded", net, objective, NoiseSet())
    loop.train(stage, train_config, RunConfig(str(folder / "run")))
    mine = torch.distributed.get_rank()
    write_json(folder / f"rank{mine}.json", seen | {"parameters": seen_params})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = ROOT / "benchmarks/results/sharded.json"
    parser.add_argument("--out", type=Path, default=out, help="where the metrics go")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.rank:
        rank(a.rank)
        return
    metrics: dict[str, float] = {}
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
            command += ["--config_file", f"configs/accelerate/{strategy}.yaml"]
            command += ["--main_process_port", "0", "-m", "benchmarks.sharded", "--rank", temporary]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            ranks = [json.loads((Path(temporary) / f"rank{r}.json").read_text()) for r in (0, 1)]
        parameters = ranks[0].pop("parameters")
        ranks[1].pop("parameters")
        totals = [sum(part.values()) for part in ranks]
        metrics["parameters"] = parameters
        for name in ranks[0]:
            pair = [part[name] for part in ranks]
            metrics[f"{strategy}_{name.replace(' ', '_')}_megabytes"] = max(pair) / 1e6
        metrics[f"{strategy}_over_even_share"] = max(totals) / (sum(totals) / 2)
        one = [sum(part[k] for k in ("weights", "gradients", "optimizer", "EMA")) for part in ranks]
        metrics[f"{strategy}_of_one_process"] = max(one) / (4 * parameters * 5)
        train = compose("experiment=celebvtext").unets.base.train
        table = sum(fixed_parts(parameters, 0, strategy, 2, train).values())
        metrics[f"{strategy}_over_the_table"] = max(totals) / table
    write_json(a.out, metrics | provenance())
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
