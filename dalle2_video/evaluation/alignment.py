"""Does a sampled clip show what its caption says? Measured on the embedded data.

The captions of a split are sampled, a probe trained on real renders reads the samples, and its
answers are compared with the attributes that the captions name. Beside it: the same answers against
the attributes of OTHER clips (shuffled captions: chance, if nothing leaks), the light attributes
read without a network, and the same captions joined into free sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.data.sources.captions import join_lines
from dalle2_video.data.store.dataset import CelebVTextDataset
from dalle2_video.faces.attributes import FaceAttributes
from dalle2_video.faces.probe import Probe, Score, score, targets_of
from dalle2_video.pipeline.cascade import Cascade, Progress
from dalle2_video.pipeline.sampling_config import SampleConfig


@dataclass(frozen=True)
class Captions:
    """Captions of B clips: lines of each, the same joined into free text, the clips' ids and their
    own frames, uint8 (B, F, H, W, 3).
    """

    lines: list[list[str]]
    sentences: list[str]
    clip_ids: list[str]
    frames: Tensor


def captions_of(dataset: CelebVTextDataset, clips: int) -> Captions:
    """The evaluation captions (one line of each category) of the first `clips` clips of a split.

    Fewer where the split holds fewer.
    """
    pointers = [dataset.eval_pointer(i) for i in range(min(clips, len(dataset)))]
    chosen = [
        dataset.captions.choose(dataset.store.lines(dataset.clips[p.index]), 0, p.sample_id, p.key)
        for p in pointers
    ]
    batch = dataset.collate(pointers)
    assert batch.frames is not None
    return Captions(
        [[line.text for line in lines] for lines in chosen],
        [". ".join(line.text for line in join_lines(lines)) for lines in chosen],
        [p.key.rsplit(":", 1)[0] for p in pointers],
        batch.frames,
    )


def alignment(
    probe: Probe, frames: Tensor, clips: Sequence[FaceAttributes], real: Tensor | None = None
) -> dict[str, float]:
    """Flat metrics of sampled frames uint8 (B, F, H, W, 3) and the attributes they should show.

    real: the real clips of the same captions, for the probe's ceiling and for chance.
    """
    targets = targets_of(clips)
    predictions = probe.network.predict(frames)
    # each clip against a third of the set further on: other clips, each exactly once
    order = torch.arange(len(clips)).roll(max(1, len(clips) // 3))
    shuffled = {name: value[order] for name, value in targets.items()}
    metrics = flat("attribute", score(predictions, targets))
    metrics["attribute_accuracy_shuffled"] = score(predictions, shuffled).mean
    light = {name: rule.predict(frames) for name, rule in probe.light.items()}
    metrics |= flat("light_rule", score(light, targets), chance=False)
    if real is not None:
        seen = probe.network.predict(real)
        metrics |= flat("ceiling", score(seen, targets), chance=False)
        # what real clips score against those other captions: chance, for the shuffled ones above
        metrics["attribute_chance_shuffled"] = score(seen, shuffled).mean
    return metrics


def flat(prefix: str, result: Score, chance: bool = True) -> dict[str, float]:
    """A score as flat metrics: <prefix>_accuracy, its interval, and that of each attribute."""
    metrics = brief(f"{prefix}_accuracy", result)
    metrics |= {f"{prefix}_accuracy_{name}": value for name, value in result.accuracy.items()}
    if chance:
        metrics["attribute_chance"] = result.mean_chance
        metrics |= {f"attribute_chance_{name}": value for name, value in result.chance.items()}
    return metrics


def evaluate_alignment(
    cascade: Cascade,
    dataset: CelebVTextDataset,
    attributes: Mapping[str, FaceAttributes],
    probe: Probe,
    clips: int,
    config: SampleConfig,
    progress: Progress | None = None,
) -> tuple[dict[str, float], Captions, dict[str, Tensor]]:
    """Metrics of the captions of `clips` clips, sampled as lines and as free text.

    Returns the flat metrics, the captions, and what each U-Net made of the lines: uint8
    (B, F, H, W, 3) by its name. `attribute_*` and `light_rule_*` are of the cascade's last U-Net,
    `accuracy_of_<name>` of the others, free sentences of the first one alone.
    """
    captions = captions_of(dataset, clips)
    truth = [attributes[clip_id] for clip_id in captions.clip_ids]
    targets = targets_of(truth)
    made = cascade.sample_all(captions.lines, config, progress=progress)
    *earlier, last = made
    metrics = {"samples": float(len(truth))} | alignment(probe, made[last], truth, captions.frames)
    for name in earlier:
        metrics |= brief(f"accuracy_of_{name}", score(probe.network.predict(made[name]), targets))
    first = next(iter(made))
    free = cascade.sample_all(captions.sentences, config, progress=progress, last=first)[first]
    metrics |= brief("free_sentence_accuracy", score(probe.network.predict(free), targets))
    return metrics, captions, made


def evaluate_nearest(
    cascade: Cascade, captions: Captions, config: SampleConfig, progress: Progress | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The share of captions whose sample is nearer to their own clip than to any other's.

    Returns the flat metrics, and what each U-Net made: uint8 (B, F, H, W, 3) by its name.
    """
    made = cascade.sample_all(captions.lines, config, progress=progress)
    *_, samples = made.values()
    own = nearest_clips(samples, captions.frames) == torch.arange(len(samples))
    return {"samples": float(len(own)), "nearest_is_own_clip": own.float().mean().item()}, made


def brief(name: str, result: Score) -> dict[str, float]:
    """The mean of a score and its interval."""
    return {name: result.mean, f"{name}_low": result.low, f"{name}_high": result.high}


def nearest_clips(samples: Tensor, clips: Tensor) -> Tensor:
    """For each sampled clip the index of the real clip that it shows, by pixels, int64 (B,).

    samples, clips: uint8 (B, F, H, W, 3), (N, F', H', W', 3); larger clips are seen in the view
    that the samples' network was trained on. The distance to a clip is the mean over the sample's
    frames of the squared distance to that clip's nearest frame.
    """
    clips = to_uint8(to_float(clips, *samples.shape[1:3]))
    flat_samples = samples.flatten(2).float()
    flat_clips = clips.flatten(2).float()
    answers = []
    for sample in flat_samples:
        distance = torch.cdist(sample[None], flat_clips)  # (N, F, F)
        answers.append(distance.square().amin(2).mean(1).argmin())
    return torch.stack(answers)
