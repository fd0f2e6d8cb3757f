"""One optimizer step: the gradient is clipped and the weights move, or the step is skipped."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def grad_clip_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Trainable parameters by the norm that their gradients are clipped by: first all others, then
    those of the modules that the model lists in `separate_grad_clip`, whose gradients must not
    shrink the steps of the others. A group without parameters is left out.
    """
    separate = tuple(f"{name}." for name in getattr(model, "separate_grad_clip", ()))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [p for name, p in named if not name.startswith(separate)]
    own = [p for name, p in named if name.startswith(separate)]
    return [group for group in (rest, own) if group]


class OptimizerUpdate:
    """Clips the gradients of a prepared model to the norm `grad_clip` (None: not) and steps."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, grad_clip: float | None
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.limit = grad_clip or math.inf
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.groups = grad_clip_groups(cast(nn.Module, unwrapped))

    def apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step, unless the gradient or the ranks' mean loss () is not finite.

        Returns two float32 scalars: the gradient's norm before clipping (of the first of
        `grad_clip_groups`; under DeepSpeed of all parameters), and 1.0 or 0.0, whether it stepped.
        Collective.
        """
        if self.deepspeed:  # its engine clipped all together and stepped, or skipped, in backward
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.limit)
            applied = float(not self.optimizer.step_was_skipped)
            return self._scalar(math.nan if norm is None else norm), self._scalar(applied)
        self.accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(group, self.limit) for group in self.groups]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = norms[0]
        applied = (sum(norms) + loss).isfinite().float()
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = 1.0 - applied  # skipped by the fused kernel
            self.optimizer.step()
        else:
            self.optimizer.step()  # the scaler skips by itself, and lowers its scale
            applied = applied * float(not self.optimizer.step_was_skipped)
        self.optimizer.zero_grad()
        return norm.float(), applied

    def _scalar(self, value: Tensor | float) -> Tensor:
        return on_device(value, self.accelerator.device)


def on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """A float32 tensor on the device; the host does not wait for it."""
    value = value if isinstance(value, Tensor) else torch.tensor(value)
    return value.to(device, torch.float32, non_blocking=True)
