"""Validation that leaves no trace: eval mode, no gradient, EMA weights, then all as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle2_video.data.store.dataset import eval_loader
from dalle2_video.training.ema import Ema
from dalle2_video.training.stage import Stage, StepInfo


@contextmanager
def no_trace(model: nn.Module, ema: Ema | None) -> Iterator[None]:
    """Eval mode without gradient, under the EMA weights if any.

    After it each module has its own training flag, the weights and the random states again; the
    gradients are not touched. Collective where the weights are split over ranks.
    """
    flags = [(part, part.training) for part in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    with ExitStack() as stack:
        if ema is not None:
            stack.enter_context(ema.swapped_in())
        stack.enter_context(torch.no_grad())
        model.eval()
        try:
            yield
        finally:
            for part, training in flags:
                part.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)


def evaluate(
    stage: Stage, model: nn.Module, accelerator: Accelerator, batch_size: int, seed: int
) -> dict[str, float]:
    """The stage's own metrics, else the mean objective over its validation set, else none."""
    if stage.validate is not None:
        return stage.validate(model, accelerator)
    if stage.val_set is None:
        return {}
    return mean_objective(stage, model, accelerator, batch_size, seed)


def mean_objective(
    stage: Stage, model: nn.Module, accelerator: Accelerator, batch_size: int, seed: int
) -> dict[str, float]:
    """Loss and metrics of the objective, each clip of `val_set` weighing the same.

    Ranks share the batches; a rank that has run out repeats its first one with weight 0, because
    under ZeRO 3 and FSDP2 all must make the same calls. The randomness is keyed by clip index.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    count = -(-len(stage.val_set) // batch_size)
    if count < world:  # too few batches to share
        world, rank = 1, 0
    batches = eval_loader(stage.val_set, batch_size, rank, world)
    first = None
    sums: dict[str, Tensor] = {}
    for _ in range(-(-count // world)):
        batch = next(batches, None)
        weight = len(batch.sample_ids) if batch is not None else 0
        first = first or batch
        batch = batch or first
        assert batch is not None  # the first round always has one
        sample_ids = batch.sample_ids
        torch.manual_seed(seed)
        info = StepInfo(sample_ids, seed, accelerator.device, accelerator)
        loss = stage.objective(model, batch.to(accelerator.device), info)
        for name, value in {"loss": loss.loss, **loss.metrics}.items():
            tensor = torch.as_tensor(value, device=accelerator.device).detach().double()
            sums[name] = sums.get(name, 0) + weight * tensor
    names = sorted(sums)
    total = cast(Tensor, accelerator.reduce(torch.stack([sums[n] for n in names]), "sum"))
    share = accelerator.num_processes if world == 1 else 1
    means = total / (len(stage.val_set) * share)
    return dict(zip(names, means.tolist(), strict=True))
