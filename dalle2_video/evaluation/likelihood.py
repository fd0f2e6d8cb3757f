"""The variational bound of a U-Net on real clips, in bits per dimension.

The bound is that of diffusion/variance.py, a sum of T terms. Most of it, and of its noise, lies at
the clean end: the LAST terms are computed all, and a few random ones stand for the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.diffusion.config import DiffusionConfig
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
from dalle2_video.models.conditioning import Condition
from dalle2_video.pipeline.cascade import Cascade, placed
from dalle2_video.pipeline.sampling_config import SampleConfig

LAST = 7  # steps, of the T from noise to clip, whose terms are all computed
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
    """Bits per dimension (B,) of clips x0 by the name of the variance: those of FIXED, and
    `learned` where the network returns raw fractions beside its prediction.

    x0: (B, C, ...) in [-1, 1], rounded to 8-bit values (`to_values`). network: (z, log_snr) ->
    prediction. term: (step, estimate, raw, x0) -> bits (B,) of one step with the raw fractions.
    draws: how many steps stand for those before the LAST; draw k of K comes from the k-th of K
    stretches, of which those near the clip are shorter (a cube) and weigh less. Noise and steps are
    keyed by (seed, sample_ids (B,)).
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
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Bits per dimension of the captions' own clips by a cascade's first U-Net, as flat metrics.

    The U-Net is given the texts and the clips' own video embeddings; a self-conditioned one gets no
    estimate. `bits_per_dimension_<variance>` is the mean over clips and `..._half_width` half its
    95 % interval; `learned_less_than_<variance>` is the mean difference. progress is called after
    each batch with its number of clips.
    """
    unet, device, size = cascade.unets[0], cascade.device, config.batch_size
    model, video = unet.network.config, cascade.video_clip.config.video
    parts: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(captions.lines)).split(size):
        frames = captions.frames[rows].to(device)
        text = cascade.encode(captions.lines[int(rows[0]) : int(rows[-1]) + 1])
        with placed(cascade.video_clip, device):
            view = to_float(frames, video.num_frames, video.image_size)
            embedding = cascade.video_clip.encode_video(view)
        condition = Condition.of(embedding, text.states, text.place, text.embedding)

        def network(z: Tensor, log_snr: Tensor, given: Condition = condition) -> Tensor:
            return unet.network(z, log_snr, given)

        x0 = to_values(to_float(frames, model.num_frames, model.image_size))
        with placed(unet.network, device):
            found = bits_of(network, unet.diffusion, x0, rows, config.seed, draws)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
        if progress is not None:
            progress(len(rows))
    bits = {name: torch.cat(values) for name, values in parts.items()}
    if "learned" in bits:
        bits |= {f"learned_less_than_{name}": bits[name] - bits["learned"] for name in FIXED}
    metrics = {"clips": float(len(captions.lines)), "steps": float(unet.diffusion.variance_steps)}
    for name, values in bits.items():
        metrics[f"bits_per_dimension_{name}"] = float(values.mean())
        half = 1.96 * float(values.std()) / len(values) ** 0.5
        metrics[f"bits_per_dimension_{name}_half_width"] = half
    return metrics
