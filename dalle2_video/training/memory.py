"""Memory of a rank before the run: what the strategy holds, and an estimate of the activations."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from dalle2_video.training.config import RunConfig, TrainConfig
from dalle2_video.training.stage import Stage, StepInfo
from dalle2_video.training.validation import no_trace

FLOAT = 4  # bytes; weights, moments and averages are float32 everywhere
CLIPS = 2  # of which the activations are counted
ACTIVATIONS = "activations, about"


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part. limit: what the device has."""

    parts: dict[str, float]
    limit: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """Name and gigabytes of each part, their sum, and the device's."""
        rows = [*self.parts.items(), ("together", self.total), ("the device has", self.limit)]
        return [f"memory  {name:20}{value / 1e9:10.3f} GB" for name, value in rows]


def estimate(
    stage: Stage,
    cfg: TrainConfig,
    run: RunConfig,
    accelerator: Accelerator,
    strategy: str,
    micro: int,
) -> Memory:
    """Of one rank under `strategy` (`accelerator.strategy_of`), before the model is prepared."""
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.model.parameters() if not p.requires_grad)
    parts = fixed_parts(trained, frozen, strategy, accelerator.num_processes, cfg)
    low = run.mixed_precision != "no"
    parts[ACTIVATIONS] = activations(stage, accelerator, run.seed, low) * micro / CLIPS
    return Memory(parts, device_bytes(accelerator.device))


def fixed_parts(
    trained: int, frozen: int, strategy: str, ranks: int, cfg: TrainConfig
) -> dict[str, float]:
    """Bytes of a rank that do not depend on the batch, by numbers of parameters.

    zero1, zero2: DeepSpeed's float32 masters beside the weights; zero3 has them beside its parts.
    Muon holds one momentum for a matrix where AdamW holds two; it is counted as AdamW.
    """
    split_weights = strategy in ("zero3", "fsdp2")
    split_gradients = split_weights or strategy == "zero2"
    split_rest = strategy not in ("one process", "ddp")
    own = FLOAT * trained
    parts = {
        "weights": (own + FLOAT * frozen) / (ranks if split_weights else 1),
        "gradients": own / (ranks if split_gradients else 1),
        "optimizer": 2 * own / (ranks if split_rest else 1),
    }
    if strategy.startswith("zero"):
        parts["float32 masters"] = own / ranks
    if strategy == "ddp":
        parts["DDP's buckets"] = own
    if cfg.ema_halflife_clips:
        parts["EMA"] = own / (ranks if split_rest else 1)
    return parts


class _Counted(Exception):  # noqa: N818
    """The network was called, and what it keeps is known: the rest of the objective can wait."""


def activations(
    stage: Stage, accelerator: Accelerator, seed: int, low_precision: bool = False
) -> float:
    """Bytes that the network keeps for the backward pass of CLIPS clips; in low precision under
    autocast to bf16.

    Counted on tensors without data where the network allows it, so neither memory nor time of a
    real pass is needed. Under activation checkpointing the one block that runs again comes on top.
    """
    batch = stage.train_set.collate([stage.train_set.pointer(i) for i in range(CLIPS)])
    device = accelerator.device
    sizes: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes(), tensor  # held, so that no id comes twice
        return tensor

    def forward(
        module: nn.Module, weights: Sequence[Tensor], inputs: tuple, named: dict[str, Any]
    ) -> None:
        with (
            torch.enable_grad(),
            torch.autocast("cpu", torch.bfloat16, low_precision),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            module.forward(*inputs, **named)
        for weight in weights:  # views of them are kept too
            sizes.pop(weight.untyped_storage()._cdata, None)

    @torch.compiler.disable  # compiled kernels would read the memory that these tensors lack
    def count(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                weights = [mode.from_tensor(p) for p in module.parameters()]
                shapes = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="cpu"), inputs)
                more = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="cpu"), named)
                forward(module, weights, shapes, more)
        except DataDependentOutputException:  # the network looks at its input, as text towers do
            sizes.clear()
            real = tree_map_only(Tensor, lambda x: x.cpu(), (inputs, named))
            forward(module, list(module.parameters()), *real)
        raise _Counted

    info = StepInfo(batch.sample_ids, seed, device, accelerator)
    hook = stage.model.register_forward_pre_hook(cast(Any, count), with_kwargs=True)
    try:
        with no_trace(stage.model, None):
            stage.objective(stage.model, batch.to(device), info)
    except _Counted:
        return float(sum(size for size, _ in sizes.values()))
    finally:
        hook.remove()
    raise ValueError(f"the objective of {stage.name} does not call its model")


def device_bytes(device: torch.device) -> float:
    """The memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")


def peak_bytes(device: torch.device) -> float:
    """The most that this process held so far: of the GPU, or resident in the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def advice(memory: Memory, strategy: str, micro: int) -> list[str]:
    """What to change where the estimate is above nine tenths of the device; empty where it fits."""
    if memory.total < 0.9 * memory.limit:
        return []
    return [f"memory  this will hardly fit; {way}" for way in _ways(memory, strategy, micro)]


def _ways(memory: Memory, strategy: str, micro: int) -> Iterator[str]:
    if memory.total - memory.parts[ACTIVATIONS] < 0.8 * memory.limit:
        yield "activation_checkpointing=true keeps only the inputs of the blocks"
        if micro > 1:
            yield f"train.micro_batch_size below {micro}: the batch stays, by accumulation"
    if strategy in ("zero3", "fsdp2"):
        yield "take more processes, or configs/accelerate/zero3_offload.yaml"
    else:
        yield "configs/accelerate/zero3.yaml and fsdp2.yaml split weights and optimizer"
