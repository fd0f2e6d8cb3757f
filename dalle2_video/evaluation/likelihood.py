"""The variational bound of a U-Net on held-out clips, in bits per dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.diffusion.parameterization import expand, to_x0
from dalle2_video.diffusion.schedule import alpha_sigma
from dalle2_video.diffusion.variance import (
    ReverseStep,
    bound_term,
    fraction_of,
    learned_term,
    prior_term,
    reverse_step,
    split_output,
)
from dalle2_video.evaluation.alignment import Captions
from dalle2_video.models.unet3d import Condition
from dalle2_video.pipeline.cascade import Cascade, placed
from dalle2_video.pipeline.sampling import SampleConfig

LAST = 7  # steps
FIXED = {"lower": 0.0, "middle": 0.5, "upper": 1.0}  # beta~, their geometric mean, beta


def to_values(x: Tensor) -> Tensor:
    """Clips in [-1, 1] rounded to 8 bits, as they are stored and shown."""
    return to_float(to_uint8(x), x.shape[2], x.shape[3])


def learned(step: ReverseStep, estimate: Tensor, raw: Tensor, x0: Tensor) -> Tensor:
    """Bits of one step (B,) with the fractions that a network has learned."""
    return learned_term(step, estimate, fraction_of(raw), x0)


def bits_of(
    network: Callable[[Tensor, Tensor], Tensor],
    diffusion: DiffusionConfig,
    x0: Tensor,
    sample_ids: Tensor,
    seed: int,
    draws: int,
    term: Callable[[ReverseStep, Tensor, Tensor, Tensor], Tensor] = learned,
) -> dict[str, Tensor]:
    """The bound of clips x0 (B, C, ...) of 8-bit values: name of the variance -> (B,).

    network: (z, log_snr) -> prediction, perhaps with raw fractions, which `term` (step, estimate,
    raw, x0) makes bits of. Most of the bound, and of its noise, lies at the clean end: the LAST
    steps are all in it, and of the others `draws` stand for all, spread by a cube. Noise and steps
    are keyed by (seed, sample_ids (B,)).
    """
    steps = diffusion.variance_steps
    last = min(LAST, steps)
    found: dict[str, Tensor] = {}
    for draw in range(last + (draws if steps > last else 0)):
        if draw < last:
            number, weight = torch.full((len(x0),), draw + 1.0), torch.ones(len(x0))
        else:
            share = keyed.rand((), seed, sample_ids, f"bits/{draw}/step")
            place = (draw - last + share) / draws
            number = (last + 1 + (steps - last) * place**3).floor().clamp(max=steps)
            weight = 3 * (steps - last) * place.square() / draws
        number, weight = number.to(x0.device), weight.to(x0.device)
        step = reverse_step(diffusion.schedule, number / steps, steps)
        alpha, sigma = (expand(a, x0) for a in alpha_sigma(step.now))
        noise = keyed.randn(x0.shape[1:], seed, sample_ids, f"bits/{draw}", x0.device)
        z = alpha * x0 + sigma * noise
        prediction, raw = split_output(network(z, step.now).float(), x0.shape[1])
        estimate = to_x0(diffusion.prediction, prediction, z, step.now).clamp(-1, 1)
        bits = {name: bound_term(step, estimate, one, x0) for name, one in FIXED.items()}
        if raw is not None:
            bits["learned"] = term(step, estimate, raw, x0)
        for name, one in bits.items():
            found[name] = found.get(name, 0) + weight * one
    return {name: bits + prior_term(diffusion.schedule, x0) for name, bits in found.items()}


@torch.no_grad()
def evaluate_bits(
    cascade: Cascade,
    captions: Captions,
    draws: int,
    config: SampleConfig,
    report: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Bits per dimension of the clips of these captions by a cascade's first U-Net, given texts and
    the clips' own video embeddings; the mean, and half its 95 % interval, of each variance and of
    how much less the learned one takes. A self-conditioned network is judged without an estimate.
    """
    stage, device, size = cascade.stages[0], cascade.device, config.batch_size
    model, video = stage.unet.config, cascade.clip.config.video
    parts: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(captions.lines)).split(size):
        frames = captions.frames[rows].to(device)
        text = cascade.encode(captions.lines[int(rows[0]) : int(rows[-1]) + 1])
        with placed(cascade.clip, device):
            view = to_float(frames, video.num_frames, video.image_size)
            embedding = cascade.clip.encode_video(view)
        condition = Condition.of(embedding, text.states, text.place, text.embedding)

        def network(z: Tensor, log_snr: Tensor, given: Condition = condition) -> Tensor:
            return stage.unet(z, log_snr, given)

        x0 = to_values(to_float(frames, model.num_frames, model.image_size))
        with placed(stage.unet, device):
            found = bits_of(network, stage.diffusion, x0, rows, config.seed, draws)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
        if report is not None:
            report(len(rows))
    bits = {name: torch.cat(values) for name, values in parts.items()}
    if "learned" in bits:
        bits |= {f"learned_less_than_{name}": bits[name] - bits["learned"] for name in FIXED}
    figures = {"clips": float(len(captions.lines)), "steps": float(stage.diffusion.variance_steps)}
    for name, values in bits.items():
        figures[f"bits_per_dimension_{name}"] = float(values.mean())
        half = 1.96 * float(values.std()) / len(values) ** 0.5
        figures[f"bits_per_dimension_{name}_half_width"] = half
    return figures
