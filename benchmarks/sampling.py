"""Samplers on a trained run: attribute accuracy and Frechet distance over the number of steps.

    python -m benchmarks.sampling curve runs/demo120             # 128 samples a point, and a plot
    python -m benchmarks.sampling compare runs/demo120           # 20 steps against 500, 256 samples
    python -m benchmarks.sampling choose runs/demo120            # guidance, on val

All points use the same captions (one line of each category) and the same embeddings, which the
prior draws once. Accuracy is the probe's; the distance is between the probe's features of the
samples and of all real clips of the split. Seconds are of the base U-Net's sampling alone. Each
point is written when it is there, so a stopped run goes on; results go into
benchmarks/results/sampling_<what>.json.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.tensors import to_uint8
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, eval_loader
from dalle2_video.evaluation.alignment import captions_of
from dalle2_video.evaluation.frechet import frechet_distance, frechet_interval
from dalle2_video.faces.probe import load_probe, score, targets_of
from dalle2_video.faces.writer import read_attributes
from dalle2_video.models.conditioning import Condition
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.sampling import sample_clips, sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.wiring import store_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SAMPLERS = {
    "ddim": {"sampler": "ddim"},
    "ddim_eta1": {"sampler": "ddim", "eta": 1.0},
    "ancestral": {"sampler": "ancestral"},
    "dpm_solver": {"sampler": "dpm_solver"},
}
CURVE_STEPS = (5, 10, 20, 50, 100)


class Judge:
    """A run, the captions of a split with their conditions, and what real clips look like."""

    def __init__(
        self, run_dir: str, data: str, split: str, clips: int, device: str | None = None
    ) -> None:
        settings = settings_of(compose(f"faces.root={data}"))
        self.base = settings.sample
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.cascade, self.probe = Cascade.load(run_dir, device), load_probe()
        policy = EvaluationCaptions()
        dataset = CelebVTextDataset(store_of(settings), split, 0, policy, first_windows=True)
        self.captions = captions = captions_of(dataset, clips)
        attributes = read_attributes(Path(data) / "attributes.jsonl")
        self.truth = targets_of([attributes[clip] for clip in captions.clip_ids])
        batches = eval_loader(dataset, 64)
        self.real = torch.cat([self.features(b.frames) for b in batches if b.frames is not None])
        self.conditions = [
            self._condition(captions.lines[start : start + self.base.batch_size], start)
            for start in range(0, len(captions.lines), self.base.batch_size)
        ]

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """The probe's features (B, 2 D) of clips uint8 (B, F, H, W, 3)."""
        return self.probe.network.features(frames)

    @torch.no_grad()
    def _condition(self, lines: list[list[str]], first: int) -> tuple[Condition, Tensor]:
        sample_ids = torch.arange(first, first + len(lines))
        text, cascade = self.cascade.encode(lines), self.cascade
        embedding = sample_embeddings(
            cascade.prior,
            cascade.prior.whiten,
            cascade.prior_diffusion,
            text,
            sample_ids,
            self.base,
        )
        return Condition.of(embedding, text.states, text.place, text.embedding), sample_ids

    @torch.no_grad()
    def point(self, config: SampleConfig) -> dict[str, float]:
        """Figures of one setting."""
        base, parts, seconds = self.cascade.unets[0], [], 0.0
        bar = tqdm(total=len(self.conditions) * config.steps, unit="step", mininterval=20)
        for condition, sample_ids in self.conditions:
            begun = time.perf_counter()
            video = sample_clips(
                base.network,
                base.network.config,
                base.diffusion,
                condition,
                sample_ids,
                config,
                config.seed,
                progress=bar.update,
            )
            seconds += time.perf_counter() - begun
            parts.append(to_uint8(video).cpu())
        bar.close()
        frames = torch.cat(parts)
        answers = self.probe.network.predict(frames)
        result, features = score(answers, self.truth), self.features(frames)
        low, high = frechet_interval(features, self.real)
        return {
            "accuracy": result.mean,
            "accuracy_low": result.low,
            "accuracy_high": result.high,
            "frechet": frechet_distance(features, self.real),
            "frechet_low": low,
            "frechet_high": high,
            "seconds_per_clip": seconds / len(frames),
        }


def points_of(what: str, base: SampleConfig) -> dict[str, SampleConfig]:
    """name -> setting of each point."""
    points: dict[str, SampleConfig] = {}
    if what == "curve":
        for steps in CURVE_STEPS:
            for name, changes in SAMPLERS.items():
                points[f"{name}_{steps}"] = replace(base, steps=steps, **changes)
    elif what == "compare":
        for name, steps in (("dpm_solver", 20), ("ddim", 20), ("ancestral", 500)):
            points[f"{name}_{steps}"] = replace(base, steps=steps, sampler=name)
    else:
        plain = replace(base, sampler="dpm_solver", steps=20)
        for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            points[f"constant_{scale:g}"] = replace(plain, guidance_scale=scale)
        for scale in (3.0, 5.0):
            for low, high in ((-8.0, 0.0), (-8.0, 4.0), (-5.0, 2.0)):
                points[f"interval_{scale:g}_{low:g}_{high:g}"] = replace(
                    plain,
                    guidance_scale=scale,
                    guidance="interval",
                    guidance_interval=(low, high),
                )
            points[f"oscillating_{scale:g}"] = replace(
                plain, guidance_scale=scale, guidance="oscillating"
            )
            points[f"rescale_{scale:g}"] = replace(
                plain, guidance_scale=scale, guidance_rescale=0.7
            )
        points["dynamic_3"] = replace(plain, threshold="dynamic")
    return points


def plot(figures: dict, path: Path) -> None:
    """Accuracy and distance over steps, a line per sampler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label, unit in (
        (axes[0], "accuracy", "attribute accuracy, %", 100),
        (axes[1], "frechet", "Frechet distance, probe features", 1),
    ):
        for name in SAMPLERS:
            values = [unit * figures["points"][f"{name}_{steps}"][key] for steps in CURVE_STEPS]
            axis.plot(CURVE_STEPS, values, "o-", label=name)
        axis.set_xscale("log")
        axis.set_xticks(CURVE_STEPS, [str(steps) for steps in CURVE_STEPS])
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.margins(y=0.25)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["curve", "compare", "choose"])
    parser.add_argument("run_dir", help="a run with clip, prior and base")
    parser.add_argument("--data", default="data/faces")
    parser.add_argument("--split", help="heldout, or val for choose")
    parser.add_argument("--clips", type=int, help="128, or 256 for compare")
    parser.add_argument("--name", help="of the results: sampling_<name>.json")
    a = parser.parse_args()
    split = a.split or ("val" if a.what == "choose" else "heldout")
    clips = a.clips or (256 if a.what == "compare" else 128)
    out = RESULTS / f"sampling_{a.name or a.what}.json"
    place = {"run_dir": a.run_dir, "split": split, "clips": clips}
    figures: dict = {"points": {}} | place
    if out.exists():
        before = json.loads(out.read_text())
        if all(before.get(key) == value for key, value in place.items()):
            figures = before
    begun = provenance()  # before the first result makes the checkout a changed one
    judge = Judge(a.run_dir, a.data, split, clips)
    for name, config in points_of(a.what, judge.base).items():
        setting = json.loads(json.dumps(asdict(config)))
        if figures["points"].get(name, {}).get("setting") == setting:
            continue
        point = judge.point(config)
        figures["points"][name] = point | {"setting": setting, "commit": begun["commit"]}
        write_json(out, figures | begun)
        values = {key: round(value, 4) for key, value in point.items()}
        print(name, json.dumps(values), flush=True)
    points = figures["points"]
    if a.what == "compare":
        slow, fast = points["ancestral_500"], points["dpm_solver_20"]
        figures |= {
            "speed_of_20_over_500": slow["seconds_per_clip"] / fast["seconds_per_clip"],
            "accuracy_of_20_minus_500": fast["accuracy"] - slow["accuracy"],
            "frechet_of_20_not_above_interval_of_500": float(
                fast["frechet"] <= slow["frechet_high"]
            ),
        }
        write_json(out, figures | begun)
        print(json.dumps({key: value for key, value in figures.items() if key != "points"}))
    elif a.what == "curve":
        plot(figures, ROOT / "docs" / "images" / "samplers.png")


if __name__ == "__main__":
    main()
