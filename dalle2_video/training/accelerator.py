"""The accelerator of the launched environment: ranks, precision, gradient accumulation.

Two things Accelerate (1.15) does not do by itself are done here. On a machine without CUDA it
would run the ranks of a DeepSpeed, FSDP2 or DDP launch as single processes; they get gloo
instead. And its DeepSpeed plugin imports transformers, for a hook that only its models use.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn

from dalle2_video.config import ConfigError
from dalle2_video.data.atomic import read_json
from dalle2_video.errors import UserError
from dalle2_video.training.config import Precision, RunConfig, TrainConfig

# Sections of a DeepSpeed file whose place is our configuration -> what to set there.
OURS_IN_DEEPSPEED = {
    "optimizer": "train.optimizer, lr, betas and weight_decay of the stage",
    "scheduler": "train.lr_schedule and warmup_clips of the stage",
    "bf16": "mixed_precision=bf16",
    "fp16": "mixed_precision=bf16",
}


class LaunchError(UserError, RuntimeError):
    """The processes of a launch that do not find one another, or no longer answer."""


@dataclass
class OwnDeepSpeedPlugin(DeepSpeedPlugin):
    """Accelerate's plugin without the hook for models of transformers, which are not used here."""

    def set_deepspeed_weakref(self) -> None:
        """Nothing: the hook would make `from_pretrained` of transformers build split weights."""


def make_accelerator(cfg: TrainConfig, run: RunConfig) -> tuple[Accelerator, int]:
    """The accelerator and the micro-batch size of a rank.

    Under DeepSpeed the batch sizes, gradient clipping and the precision are set here: autocast over
    float32 weights, as everywhere else; for FSDP2 see `autocast_forward`. Raises ConfigError where
    batch_size cannot be shared out, LaunchError where the launched ranks do not find one another.
    """
    if run.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no")
    world = process_state(run.timeout_minutes).num_processes
    micro, steps = share_out(cfg, world)
    deepspeed = _launched_with("DEEPSPEED")
    sizes = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": cfg.batch_size,
        "gradient_clipping": cfg.grad_clip or 0.0,
    }
    if splits_weights() and run.mixed_precision == "fp16":
        raise ConfigError(
            "mixed_precision=fp16 is for one process and DDP: DeepSpeed's autocast does not "
            "unscale the gradients before it clips them, and FSDP2 was never tried; take bf16"
        )
    _check_launch_file(sizes)
    # it warns of in-place operations on what a layer returns, of which there are none here
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if cfg.optimizer == "muon" and splits_weights():
        raise ConfigError(
            "optimizer=muon needs whole matrices, and DeepSpeed and FSDP split them: "
            "set train.optimizer=adamw, and a learning rate for it"
        )
    accelerator = Accelerator(
        mixed_precision="no" if splits_weights() else run.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=steps, sync_with_dataloader=False
        ),
        deepspeed_plugin=OwnDeepSpeedPlugin() if deepspeed else None,
    )
    if deepspeed:
        config = cast(DeepSpeedPlugin, accelerator.state.deepspeed_plugin).deepspeed_config
        config.update(sizes)
        if run.mixed_precision != "no":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return accelerator, micro


def chosen_precision(ours: Precision | None) -> Precision:
    """The precision of the configuration, or that of the launch where the configuration has none.

    Raises ConfigError where both are given and differ. A launch that does not set it has "no" too,
    so "no" never contradicts.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in get_args(Precision):
        raise ConfigError(f"accelerate launch --mixed_precision {launched}: take bf16, fp16 or no")
    theirs = cast(Precision, launched)
    if ours is not None and theirs not in ("no", ours):
        raise ConfigError(
            f"mixed_precision={ours}, but accelerate launch says --mixed_precision {theirs}: "
            "give one of them, or the same"
        )
    return ours or theirs


def strategy_of(accelerator: Accelerator) -> str:
    """ "one process", "ddp", "fsdp2", or "zero1" to "zero3"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{cast(Any, accelerator.state.deepspeed_plugin).zero_stage}"
    if accelerator.is_fsdp2:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "one process"


def autocast_forward(model: nn.Module, device: torch.device) -> None:
    """Let the model run under autocast to bf16 under FSDP2.

    FSDP2's own low precision casts the weights, norms and all, and not the buffers beside them.
    """
    wrapped = torch.autocast(device.type, torch.bfloat16)(model.forward)
    model.forward = wrapped  # pyright: ignore[reportAttributeAccessIssue]


def _check_launch_file(sizes: dict[str, float]) -> None:
    """ConfigError where the launch, or the DeepSpeed file it names, sets other sizes than ours."""
    found = {}
    if path := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""):
        found = read_json(path)
    where = path or "the accelerate config"
    for name, remedy in OURS_IN_DEEPSPEED.items():
        section = found.get(name)
        if isinstance(section, dict) and section.get("enabled", True) not in (False, "auto"):
            raise ConfigError(f"{where} has a section {name}: remove it, and set {remedy}")
    if steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        found["gradient_accumulation_steps"] = steps
    for name, ours in sizes.items():
        value = found.get(name, "auto")
        if value != "auto" and float(value) != ours:
            raise ConfigError(
                f"{where} sets {name}: {value}, the train section gives {ours:g}: remove it there "
                '(or write "auto"), batch_size and micro_batch_size rule'
            )


def splits_weights() -> bool:
    """Whether the launched strategy (DeepSpeed, FSDP) holds weights in pieces."""
    return _launched_with("DEEPSPEED") or _launched_with("FSDP")


def share_out(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(micro-batch of a rank, gradient accumulation steps) of `world` ranks."""
    micro = cfg.micro_batch_size or cfg.batch_size // world
    if micro == 0 or cfg.batch_size % (micro * world):
        raise ConfigError(
            f"batch_size {cfg.batch_size} must be a multiple of micro_batch_size {micro} "
            f"x {world} processes"
        )
    return micro, cfg.batch_size // (micro * world)


def process_state(timeout_minutes: float = 30.0) -> PartialState:
    """The process group of the launch, over gloo where there is no CUDA device.

    timeout_minutes: of its collectives; that of the first call holds.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    timeout = timedelta(minutes=timeout_minutes)
    if launched > 1 and not PartialState._shared_state:
        atexit.register(_leave)
    if PartialState._shared_state or launched == 1:
        state = PartialState()
    elif torch.cuda.is_available():
        state = PartialState(timeout=timeout)
    elif _launched_with("DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        state = PartialState(backend="gloo", timeout=timeout)
    else:
        state = PartialState(cpu=True, timeout=timeout)
    if _launched_with("FSDP") and state.num_processes > 1:
        # Accelerate looks for FSDP only in this state, which an earlier run of the process, or
        # a start on the CPU, left otherwise. The device stays what it is.
        state.distributed_type = DistributedType.MULTI_GPU
    if state.num_processes != launched:
        raise LaunchError(
            f"{launched} processes were launched, but this one sees {state.num_processes}: each "
            "would train alone and write the same files; check the accelerate config"
        )
    return state


def _leave() -> None:
    """Gloo's threads may abort a process that ends without this.

    Also where one of them still frees the tensors of the last gather (torch 2.14): that takes the
    interpreter's lock, which a process at its end no longer gives. So it is given here.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def _launched_with(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
