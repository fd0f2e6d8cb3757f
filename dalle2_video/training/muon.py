"""Muon: orthogonalised momentum for the matrices of hidden layers, AdamW for everything else.

Source: Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"); the scale of
the updates from Liu et al. 2025 (2502.16982, section 2.2), so that one learning rate serves both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic steps
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95


def orthogonalize(x: Tensor) -> Tensor:
    """(N, R, S) with R <= S -> about U V^T, where x = U S V^T, by five Newton-Schulz steps.

    Singular values end between 0.7 and 1.2. A step multiplies x from the left by a polynomial of
    x x^T (R, R), so all five work on that matrix and x itself is multiplied once.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    total = None
    for left in reversed(range(NEWTON_SCHULZ_STEPS)):
        step = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        step.diagonal(dim1=1, dim2=2).add_(A)
        total = step if total is None else step @ total
        if left:
            gram = step @ gram @ step
    assert total is not None
    return total @ x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` (parameters of two dimensions or more) follow Muon.

    A convolution counts as the matrix (C_out, C_in k k). Updates have a root mean square of 0.2,
    about AdamW's. Every parameter must be whole: under DDP it is, under ZeRO and FSDP it is not.
    found_inf: as in torch's optimizers, 1.0 makes a step do nothing.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of all groups; closure is not supported."""
        assert closure is None
        if self.found_inf is not None and self.found_inf.item():
            return
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Matrices of one shape are orthogonalised together."""
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)  # AdamW looks for it when it loads a state
                state["momentum"] = torch.zeros_like(p)
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov's
            tall = update.shape[0] > update.shape[1]
            update = update.mT if tall else update
            alike[(update.shape[0], update.shape[1])].append((p, update, tall))
        for (_, long), entries in alike.items():
            updates = orthogonalize(torch.stack([update for _, update, _ in entries]))
            size = group["lr"] * 0.2 * math.sqrt(long)
            for (p, _, tall), update in zip(entries, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((update.mT if tall else update).reshape(p.shape), alpha=size)
