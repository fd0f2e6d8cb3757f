"""What this rank holds of each parameter, in float32, and how to gather and write it.

Four layouts, one interface: whole parameters (one process, DDP), ZeRO 1 and 2 (whole weights,
float32 masters split over ranks), ZeRO 3 (weights split) and FSDP2 (DTensors). EMA and the
consolidated model file work on local shards through it; only `gather`, `scatter` and `write`
communicate, and every rank must call them in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class Shards(ABC):
    """Local shards of a prepared model's parameters, by the names of the bare model."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.params = dict(module.named_parameters())
        self.trainable = [name for name, p in self.params.items() if p.requires_grad]

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This rank's shard of the weight, float32 where trainable; may alias the weight itself."""

    @abstractmethod
    def gather(self, name: str, shard: Tensor) -> Tensor:
        """The full tensor of a shard of parameter `name`, on every rank. Collective."""

    @abstractmethod
    def scatter(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a full tensor, a copy on the device of `local(name)`."""

    @abstractmethod
    def write(self, shards: dict[str, Tensor]) -> None:
        """Copy shards into the weights that the next forward pass uses. Collective."""

    def write_masters(self, shards: dict[str, Tensor]) -> None:  # noqa: B027
        """Copy shards into the optimizer's float32 weights too, where it has its own: from them it
        makes the weights anew at each step.
        """

    def settle(self) -> None:  # noqa: B027 (most layouts have nothing to do)
        """Put the weights back into their resting layout after a forward pass without backward."""

    def full_state(self, keeps: Any, shards: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The bare model's state as full CPU tensors, with `shards` in the place of weights.

        keeps(name) -> bool chooses the entries. Collective; every rank gets the same.
        """
        self.settle()
        shards = shards or {}
        state = {}
        for name, value in self._entries():
            if not keeps(name):
                continue
            if name in self.params:
                shard = shards[name] if name in shards else self.local(name)
                value = self.gather(name, shard)
            state[name] = value.detach().cpu().clone()
        return state

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `full_state`, for the entries that `state` has. Collective.

        Raises KeyError where a trainable parameter is not among them.
        """
        if lost := [name for name in self.trainable if name not in state]:
            raise KeyError(f"no weights for {', '.join(lost[:4])}")
        shards = {n: self.scatter(n, state[n]) for n in self.params if n in state}
        self.write(shards)
        self.write_masters({n: shards[n] for n in self.trainable})
        with torch.no_grad():
            for name, value in self._entries():
                if name in state and name not in self.params:
                    value.copy_(state[name])

    def _entries(self) -> list[tuple[str, Tensor]]:
        """Parameters (tied ones under their first name) and persistent buffers."""
        names = set(self.module.state_dict())
        buffers = {n: b for n, b in self.module.named_buffers() if n in names}
        return [*self.params.items(), *buffers.items()]


class WholeShards(Shards):
    """One process or DDP: every rank holds everything."""

    def local(self, name: str) -> Tensor:
        return self.params[name].detach().float()

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return shard

    def scatter(self, name: str, full: Tensor) -> Tensor:
        return full.to(self.params[name].device, copy=True)

    def write(self, shards: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, shard in shards.items():
                self.params[name].copy_(shard)


class DTensorShards(Shards):
    """FSDP2: the shard is the DTensor's local tensor."""

    def write_masters(self, shards: dict[str, Tensor]) -> None:
        """Copy shards into the optimizer's float32 weights too, where it has its own: from them it
        makes the weights anew at each step.
        """

    def settle(self) -> None:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # the root stays gathered after a forward pass

    def _dtensor(self, name: str) -> DTensor:
        return cast(DTensor, self.params[name])

    def local(self, name: str) -> Tensor:
        return self._dtensor(name).to_local().detach().float()

    def gather(self, name: str, shard: Tensor) -> Tensor:
        own = self._dtensor(name)
        whole = DTensor.from_local(
            shard, own.device_mesh, own.placements, shape=own.shape, stride=own.stride()
        )
        return whole.full_tensor()

    def scatter(self, name: str, full: Tensor) -> Tensor:
        own = self._dtensor(name)
        full = full.to(own.device_mesh.device_type)
        parts = distribute_tensor(full, own.device_mesh, own.placements)
        return parts.to_local().detach().to(own.to_local().device, copy=True)

    def write(self, shards: dict[str, Tensor]) -> None:
        self.settle()
        with torch.no_grad():
            for name, shard in shards.items():
                self._dtensor(name).to_local().copy_(shard)


class Zero12Shards(Shards):
    """DeepSpeed ZeRO 1 and 2: the shard is the flat piece of the float32 master on this rank."""

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

    def gather(self, name: str, shard: Tensor) -> Tensor:
        parameter = self.params[name]
        if not parameter.requires_grad:
            return shard
        start = self._piece(name)[1]
        flat = torch.zeros(parameter.numel(), device=parameter.device)
        flat[start : start + shard.numel()] = shard.to(flat.device)
        dist.all_reduce(flat)
        return flat.view(parameter.shape)

    def scatter(self, name: str, full: Tensor) -> Tensor:
        piece, start = self._piece(name)
        return full.flatten()[start : start + piece.numel()].to(piece.device, copy=True)

    def write(self, shards: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, shard in shards.items():
                self.params[name].copy_(self.gather(name, shard))

    def write_masters(self, shards: dict[str, Tensor]) -> None:
        for name, shard in shards.items():
            self._piece(name)[0].copy_(shard)


class Zero3Shards(Shards):
    """DeepSpeed ZeRO 3: the shard is this rank's flat partition, padded to equal lengths."""

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

    def gather(self, name: str, shard: Tensor) -> Tensor:
        parameter = self._parameter(name)
        # an offloaded shard is on the CPU, where NCCL has no collectives
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpus() else shard.device
        shard = shard.to(device).contiguous()
        group = parameter.ds_process_group
        flat = shard.new_empty(shard.numel() * dist.get_world_size(group))
        dist.all_gather_into_tensor(flat, shard, group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def scatter(self, name: str, full: Tensor) -> Tensor:
        parameter, like = self._parameter(name), self.local(name)
        start = dist.get_rank(parameter.ds_process_group) * like.numel()
        shard = torch.zeros_like(like)
        piece = full.flatten()[start : start + like.numel()]
        shard[: piece.numel()] = piece.to(like.device)
        return shard

    def write(self, shards: dict[str, Tensor]) -> None:
        with torch.no_grad():
            # Small parameters rest gathered: release them, write the partitions, gather again.
            self.optimizer._partition_all_parameters()
            resting = self.optimizer.persistent_parameters
            if resting:
                resting[0].partition(resting)
            for name, shard in shards.items():
                self._parameter(name).ds_tensor.copy_(shard)
            if resting:
                resting[0].all_gather(resting)

    def write_masters(self, shards: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        for name, shard in shards.items():
            safe_set_local_fp32_param(self._parameter(name), shard)


def on_gpus() -> bool:
    """Whether the collectives of the default group are NCCL's."""
    return dist.get_backend() == "nccl"


def shards_of(accelerator: Accelerator, model: nn.Module) -> Shards:
    """The shards of a model that `accelerator.prepare` returned."""
    module = cast(nn.Module, accelerator.unwrap_model(model))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage == 3:
            return Zero3Shards(module, cast(Any, model).optimizer)
        return Zero12Shards(module) if stage else WholeShards(module)
    if accelerator.is_fsdp2:
        return DTensorShards(module)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in its config")
    return WholeShards(module)
