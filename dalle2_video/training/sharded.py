"""What this rank holds of each parameter, in float32, and how to gather and write it.

Four layouts, one interface: whole parameters (one process, DDP), ZeRO 1 and 2 (whole weights,
float32 masters split over ranks), ZeRO 3 (weights split) and FSDP2 (DTensors). EMA and the
consolidated model file work on this rank's parts through it; only `gather`, `scatter` and `write`
communicate, and every rank must call them in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from dalle2_video.config import ConfigError


class ShardedParams(ABC):
    """This rank's parts of a prepared model's parameters, by the names of the bare model."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.params = dict(module.named_parameters())
        self.trainable = [name for name, p in self.params.items() if p.requires_grad]

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This rank's part of the weight, float32 where trainable; may alias the weight itself."""

    @abstractmethod
    def gather(self, name: str, part: Tensor) -> Tensor:
        """The full tensor of a part of parameter `name`, on every rank. Collective."""

    @abstractmethod
    def scatter(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a full tensor, a copy on the device of `local(name)`."""

    @abstractmethod
    def write(self, parts: dict[str, Tensor]) -> None:
        """Copy parts into the weights that the next forward pass uses. Collective."""

    def write_masters(self, parts: dict[str, Tensor]) -> None:  # noqa: B027
        """Copy parts into the optimizer's float32 weights, where it has its own: it makes the
        weights from them at each step.
        """

    def settle(self) -> None:  # noqa: B027 (most layouts have nothing to do)
        """Put the weights back into their resting layout after a forward pass without backward."""

    def full_state(
        self, keeps: Callable[[str], bool], parts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The bare model's state as full CPU tensors; `parts` stand instead of the weights' own.

        keeps: whether an entry, by its name, is wanted. Collective; every rank gets the same.
        """
        self.settle()
        parts = parts or {}
        state = {}
        for name, value in self._entries():
            if not keeps(name):
                continue
            if name in self.params:
                part = parts[name] if name in parts else self.local(name)
                value = self.gather(name, part)
            state[name] = value.detach().cpu().clone()
        return state

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `full_state`, for the entries that `state` has. Collective.

        Raises KeyError where a trainable parameter is not among them.
        """
        if lost := [name for name in self.trainable if name not in state]:
            raise KeyError(f"no weights for {', '.join(lost[:4])}")
        parts = {n: self.scatter(n, state[n]) for n in self.params if n in state}
        self.write(parts)
        self.write_masters({n: parts[n] for n in self.trainable})
        with torch.no_grad():
            for name, value in self._entries():
                if name in state and name not in self.params:
                    value.copy_(state[name])

    def _entries(self) -> list[tuple[str, Tensor]]:
        """Parameters (tied ones under their first name) and persistent buffers."""
        names = set(self.module.state_dict())
        buffers = {n: b for n, b in self.module.named_buffers() if n in names}
        return [*self.params.items(), *buffers.items()]


class WholeParams(ShardedParams):
    """One process or DDP: every rank holds everything."""

    def local(self, name: str) -> Tensor:
        return self.params[name].detach().float()

    def gather(self, name: str, part: Tensor) -> Tensor:
        return part

    def scatter(self, name: str, full: Tensor) -> Tensor:
        return full.to(self.params[name].device, copy=True)

    def write(self, parts: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, part in parts.items():
                self.params[name].copy_(part)


class FSDPParams(ShardedParams):
    """FSDP2: the part is the DTensor's local tensor."""

    def settle(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered after a forward pass

    def _dtensor(self, name: str) -> DTensor:
        return cast(DTensor, self.params[name])

    def local(self, name: str) -> Tensor:
        return self._dtensor(name).to_local().detach().float()

    def gather(self, name: str, part: Tensor) -> Tensor:
        own = self._dtensor(name)
        whole = DTensor.from_local(
            part, own.device_mesh, own.placements, shape=own.shape, stride=own.stride()
        )
        return whole.full_tensor()

    def scatter(self, name: str, full: Tensor) -> Tensor:
        own = self._dtensor(name)
        full = full.to(own.device_mesh.device_type)
        distributed = distribute_tensor(full, own.device_mesh, own.placements)
        return distributed.to_local().detach().to(own.to_local().device, copy=True)

    def write(self, parts: dict[str, Tensor]) -> None:
        self.settle()
        with torch.no_grad():
            for name, part in parts.items():
                self._dtensor(name).to_local().copy_(part)


class ZeroParams(ShardedParams):
    """DeepSpeed ZeRO 1 and 2: the part is the flat piece of the float32 master on this rank."""

    def _piece(self, name: str) -> tuple[Tensor, int]:
        """(flat float32 piece, its start in the flat parameter); empty where this rank has none."""
        mapping = getattr(self.params[name], "_hp_mapping", None)
        if mapping is None:
            return torch.empty(0, device=self.params[name].device), 0
        return mapping.get_hp_fragment().detach(), mapping.lp_fragment_address.start

    def local(self, name: str) -> Tensor:
        if not self.params[name].requires_grad:
            return self.params[name].detach()
        return self._piece(name)[0]

    def gather(self, name: str, part: Tensor) -> Tensor:
        parameter = self.params[name]
        if not parameter.requires_grad:
            return part
        start = self._piece(name)[1]
        flat = torch.zeros(parameter.numel(), device=parameter.device)
        flat[start : start + part.numel()] = part.to(flat.device)
        dist.all_reduce(flat)
        return flat.view(parameter.shape)

    def scatter(self, name: str, full: Tensor) -> Tensor:
        piece, start = self._piece(name)
        return full.flatten()[start : start + piece.numel()].to(piece.device, copy=True)

    def write(self, parts: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, part in parts.items():
                self.params[name].copy_(self.gather(name, part))

    def write_masters(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._piece(name)[0].copy_(part)


class Zero3Params(ShardedParams):
    """DeepSpeed ZeRO 3: the part is this rank's flat partition, padded to equal lengths."""

    def __init__(self, module: nn.Module, optimizer: Any):
        super().__init__(module)
        self.optimizer = optimizer

    def _parameter(self, name: str) -> Any:
        return self.params[name]

    def local(self, name: str) -> Tensor:
        parameter = self._parameter(name)
        if not parameter.requires_grad:
            return parameter.ds_tensor.detach()
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(parameter).detach()

    def gather(self, name: str, part: Tensor) -> Tensor:
        parameter = self._parameter(name)
        # an offloaded part is on the CPU, where NCCL has no collectives
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpus() else part.device
        part = part.to(device).contiguous()
        group = parameter.ds_process_group
        flat = part.new_empty(part.numel() * dist.get_world_size(group))
        dist.all_gather_into_tensor(flat, part, group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def scatter(self, name: str, full: Tensor) -> Tensor:
        parameter, like = self._parameter(name), self.local(name)
        start = dist.get_rank(parameter.ds_process_group) * like.numel()
        part = torch.zeros_like(like)
        piece = full.flatten()[start : start + like.numel()]
        part[: piece.numel()] = piece.to(like.device)
        return part

    def write(self, parts: dict[str, Tensor]) -> None:
        with torch.no_grad():
            # Small parameters rest gathered: release them, write the partitions, gather again.
            self.optimizer._partition_all_parameters()
            resting = self.optimizer.persistent_parameters
            if resting:
                resting[0].partition(resting)
            for name, part in parts.items():
                self._parameter(name).ds_tensor.copy_(part)
            if resting:
                resting[0].all_gather(resting)

    def write_masters(self, parts: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        for name, part in parts.items():
            safe_set_local_fp32_param(self._parameter(name), part)


def on_gpus() -> bool:
    """Whether the collectives of the default group are NCCL's."""
    return dist.get_backend() == "nccl"


def sharded_params(accelerator: Accelerator, model: nn.Module) -> ShardedParams:
    """The parameters of a model that `accelerator.prepare` returned."""
    module = cast(nn.Module, accelerator.unwrap_model(model))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage == 3:
            return Zero3Params(module, cast(Any, model).optimizer)
        return ZeroParams(module) if stage else WholeParams(module)
    if accelerator.is_fsdp2:
        return FSDPParams(module)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError("FSDP version 1 is not supported; set fsdp_version: 2 in its config")
    return WholeParams(module)
