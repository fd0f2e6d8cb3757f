"""The variational bound of a U-Net on held-out clips, in bits per dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.dataset import CelebVTextDataset
from dalle2_video.data.video import to_float, to_uint8
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.diffusion.parameterization import expand, to_x0
from dalle2_video.diffusion.schedule import alpha_sigma
from dalle2_video.diffusion.variance import (
    bound_term,
    fraction_of,
    prior_term,
    reverse_step,
    split_output,
)
from dalle2_video.models.unet3d import Condition, Unet3D
from dalle2_video.training.conditions import TextEncoder

FIXED = {"lower": 0.0, "upper": 1.0}  # beta~ and beta


def to_values(x: Tensor) -> Tensor:
    """Clips in [-1, 1] rounded to 8 bits, as they are stored and shown."""
    return to_float(to_uint8(x), x.shape[2], x.shape[3])


def bits_of(
    network: Callable[[Tensor, Tensor], Tensor],
    diffusion: DiffusionConfig,
    x0: Tensor,
    counters: Tensor,
    seed: int,
    draws: int,
) -> dict[str, Tensor]:
    """The bound of clips x0 (B, C, ...) of 8-bit values: name of the variance -> (B,).

    network: (z, log_snr) -> prediction, with or without a raw fraction. The last of the T steps is
    always in it; of the others `draws` stand for all, spread evenly, each with its own noise. What
    is drawn is keyed by (seed, counters (B,)).
    """
    steps = diffusion.variance_steps
    found: dict[str, Tensor] = {}
    for draw in range(draws + 1):
        stream = f"bits/{draw}"
        if draw == 0:
            number, weight = torch.ones(len(x0), device=x0.device), 1.0
        else:
            share = keyed.rand((), seed, counters, stream).to(x0.device)
            number = 2 + ((draw - 1 + share) / draws * (steps - 1)).floor().clamp(max=steps - 2)
            weight = (steps - 1) / draws
        step = reverse_step(diffusion.schedule, number / steps, steps)
        alpha, sigma = (expand(a, x0) for a in alpha_sigma(step.now))
        z = alpha * x0 + sigma * keyed.randn(x0.shape[1:], seed, counters, stream, x0.device)
        prediction, raw = split_output(network(z, step.now).float(), x0.shape[1])
        estimate = to_x0(diffusion.prediction, prediction, z, step.now).clamp(-1, 1)
        fractions: dict[str, Tensor | float] = dict(FIXED)
        if raw is not None:
            fractions["learned"] = fraction_of(raw)
        for name, fraction in fractions.items():
            term = weight * bound_term(step, estimate, fraction, x0)
            found[name] = found.get(name, 0) + term
    return {name: bits + prior_term(diffusion.schedule, x0) for name, bits in found.items()}


@torch.no_grad()
def evaluate_bits(
    unet: Unet3D,
    diffusion: DiffusionConfig,
    encode: TextEncoder,
    dataset: CelebVTextDataset,
    clips: int,
    draws: int,
    seed: int,
    batch_size: int,
    report: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Bits per dimension of the first clips of a split, given their texts and their own video
    embeddings; the mean, and half its 95 % interval.
    """
    device, model = next(unet.parameters()).device, unet.config
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, clips, batch_size):
        pointers = [dataset.eval_pointer(i) for i in range(start, min(start + batch_size, clips))]
        batch = dataset.collate(pointers).to(device)
        assert batch.frames is not None and batch.embeddings is not None
        text = encode(batch)
        condition = Condition.of(batch.embeddings, text.states, text.place, text.embedding)
        x0 = to_values(to_float(batch.frames, model.num_frames, model.image_size))

        def network(z: Tensor, log_snr: Tensor, given: Condition = condition) -> Tensor:
            return unet(z, log_snr, given)

        bits = bits_of(network, diffusion, x0, batch.counters, seed, draws)
        for name, values in bits.items():
            parts.setdefault(name, []).append(values.cpu())
        if report is not None:
            report(len(pointers))
    figures: dict[str, float] = {"clips": float(clips)}
    for name, values in parts.items():
        all_values = torch.cat(values)
        figures[f"bits_per_dimension_{name}"] = float(all_values.mean())
        half = 1.96 * float(all_values.std()) / len(all_values) ** 0.5
        figures[f"bits_per_dimension_{name}_half_width"] = half
    return figures
