"""What a learned variance is worth on networks that make good pictures: the demo's base U-Net.

    python -m benchmarks.learned_variance_demo train     # CLIP, prior and five base U-Nets: 50 min
    python -m benchmarks.learned_variance_demo fit       # their variances: 10 min
    python -m benchmarks.learned_variance_demo sample    # --part 1/2: one of two processes
    python -m benchmarks.learned_variance_demo draw

`fit` trains the layers of the variance alone, on the finished network, which does not feel them
when they are trained beside it either. The networks share CLIP and prior. Samples are of the
captions of val, in embeddings of the prior, without guidance (the fraction is the plain model's),
by ancestral sampling with each variance from the same noise; the Frechet distance is between the
probe's features of them and of all real clips of val, the accuracy is the probe's. Bits per
dimension are of clips of val given their own embeddings. Whatever is in
runs/learned_variance_demo is not made again; results go into
benchmarks/results/learned_variance_demo.json.
"""

import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.learned_variance_figures import IMAGES, draw_clips, half_width, plt, save
from benchmarks.sampling import Judge
from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.diffusion.frequencies import to_frequencies
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.schedule import alpha_sigma
from dalle2_video.diffusion.variance import fraction_of, split_output
from dalle2_video.evaluation.likelihood import evaluate_bits
from dalle2_video.model_file import load_model
from dalle2_video.models.conditioning import Condition
from dalle2_video.pipeline.sampling import sample_clips
from dalle2_video.pipeline.sampling_config import UnetSampling
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import load_conditions
from dalle2_video.stages.unet import unet_stage
from dalle2_video.stages.wiring import run_config, store_of
from dalle2_video.training.loop import train as fit_loop

ROOT = Path(__file__).parents[1]
FOLDER, RESULTS = ROOT / "runs" / "learned_variance_demo", ROOT / "benchmarks" / "results"
SEEDS, STEPS, CLIPS = range(1, 6), (25, 10), 256
VARIANCES = {"lower": 0.0, "tenth": 0.1, "upper": 1.0, "learned": None}


def train(seeds: Sequence[int], minutes: float, data: str, overrides: list[str]) -> None:
    """Whatever is not there yet."""
    before = [("clip", "train_clip.py", 0.24), ("prior", "train_prior.py", 0.14)]
    first = FOLDER / f"plain_{SEEDS[0]}"
    for seed in seeds:
        folder = FOLDER / f"plain_{seed}"
        for name, script, share in [*before, ("base", "train_decoder.py", 1.0)]:
            if (folder / name / "model.safetensors").exists():
                continue
            if folder != first and name != "base":
                shutil.copytree(first / name, folder / name)
                continue
            part = "unets.base" if name == "base" else name
            command = [script, f"run_dir={folder}", f"faces.root={data}", f"seed={seed}"]
            command.append(f"{part}.train.minutes={share * minutes}")
            subprocess.run([sys.executable, *command, *overrides], check=True, cwd=ROOT)


def fit(seeds: Sequence[int], clips: int, data: str, overrides: list[str]) -> None:
    """The variance of every network, by the training loop, with all else frozen."""
    for seed in seeds:
        plain, folder = FOLDER / f"plain_{seed}", FOLDER / str(seed)
        for name in ("clip", "prior"):
            if not (folder / name).exists():
                shutil.copytree(plain / name, folder / name)
        ours = [f"run_dir={folder}", f"faces.root={data}", f"seed={seed}"]
        ours += [f"unets.base.train.clips={clips}", "unets.base.model.learned_variance=true"]
        cfg = compose(*ours, *overrides)
        settings = settings_of(cfg)
        section, store = settings.unets["base"], store_of(settings)
        conditions = load_conditions(settings.run_dir, store, seed, section.captions, True)
        stage = unet_stage("base", section, conditions, settings.sample, seed)
        state = load_model(plain / "base" / "model.safetensors", "base").state
        stage.model.load_state_dict(stage.model.state_dict() | state)
        for name, parameter in stage.model.named_parameters():
            parameter.requires_grad_(name.startswith("variance."))
        fit_loop(stage, section.train, run_config(settings, cfg, "base"))


def sample(seeds: Sequence[int], data: str) -> None:
    """Figures of every network, in a file each."""
    judges: dict[int, Judge] = {}
    for steps, seed in itertools.product((0, *STEPS), seeds):  # 0: the bits
        path = FOLDER / f"{seed}.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        if seed not in judges:
            judges[seed] = Judge(str(FOLDER / str(seed)), data, "val", CLIPS)
        judge = judges[seed]
        if not steps and "bits_per_dimension_learned" not in facts:
            facts |= evaluate_bits(judge.cascade, judge.captions, 20, judge.base)
            write_json(path, facts | provenance())
        for name, gamma in VARIANCES.items() if steps else ():
            if f"frechet_{steps}_{name}" in facts:
                continue
            point = judge.point(
                replace(
                    judge.base,
                    sampler="ancestral",
                    steps=steps,
                    gamma=gamma,
                    guidance_scale=1.0,
                    seed=seed,
                )
            )
            for figure in ("frechet", "accuracy"):
                facts[f"{figure}_{steps}_{name}"] = point[figure]
            print(seed, steps, name, point["frechet"], point["accuracy"], flush=True)
            write_json(path, facts | provenance())


def summarise() -> None:
    """Means over the seeds, and how much less the learned one has than each fixed one."""
    runs = [json.loads((FOLDER / f"{seed}.json").read_text()) for seed in SEEDS]
    figures: dict[str, float] = {"seeds": len(runs)}
    kinds = [f"{f}_{n}" for f in ("frechet", "accuracy") for n in STEPS] + ["bits_per_dimension"]
    for kind in kinds:
        if not all(f"{kind}_learned" in run for run in runs):
            continue  # still to come
        of = {
            name: np.array([run[f"{kind}_{name}"] for run in runs])
            for name in (*VARIANCES, "middle")
            if f"{kind}_{name}" in runs[0]
        }
        for name, values in of.items():
            figures[f"{kind}_{name}"] = values.mean()
            figures[f"{kind}_{name}_half_width"] = float(half_width(values))
            if name != "learned":
                less = values - of["learned"]
                figures[f"{kind}_learned_less_than_{name}"] = less.mean()
                figures[f"{kind}_learned_less_than_{name}_half_width"] = float(half_width(less))
    figures = {name: round(float(value), 5) for name, value in figures.items()}
    commits = sorted({run["commit"] for run in runs})
    write_json(
        RESULTS / "learned_variance_demo.json", figures | provenance() | {"commits": commits}
    )
    print(json.dumps(figures, indent=1))


@torch.no_grad()
def draw_samples(data: str) -> None:
    """Six clips of val, and the first network's samples of their captions in 25 steps."""
    judge = Judge(str(FOLDER / str(SEEDS[0])), data, "val", 6, "cpu")
    base, (condition, sample_ids) = judge.cascade.unets[0], judge.conditions[0]
    net, model = base.network, base.network.config
    rows = [to_uint8(to_float(judge.captions.frames, model.num_frames, model.image_size))]
    for gamma in (0.0, 1.0, None):
        how = UnetSampling(sampler="ancestral", steps=25, gamma=gamma)
        clips = sample_clips(net, model, base.diffusion, condition, sample_ids, how, SEEDS[0])
        rows.append(to_uint8(clips))
    draw_clips(rows, ["clip", "beta~", "beta", "learned"], IMAGES / "learned_variance_samples.png")


@torch.no_grad()
def draw_spectrum(data: str) -> None:
    """The errors of the first network on val by frequency, at three noise levels, beside what it
    has learned of them; frequencies in the order of what it has learned, in groups.
    """
    judge = Judge(str(FOLDER / str(SEEDS[0])), data, "val", 64, "cpu")
    base, clip = judge.cascade.unets[0], judge.cascade.video_clip
    net, model, video = base.network, base.network.config, clip.config.video
    text = judge.cascade.encode(judge.captions.lines)
    view = to_float(judge.captions.frames, video.num_frames, video.image_size)
    embedding = clip.encode_video(view)
    condition = Condition.of(embedding, text.states, text.place, text.embedding)
    x0 = to_float(judge.captions.frames, model.num_frames, model.image_size)
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for colour, value in zip(("C0", "C1", "C2"), (-6.0, 0.0, 4.0), strict=True):
        log_snr = torch.full((len(x0),), value)
        alpha, sigma = (float(one[0]) for one in alpha_sigma(log_snr))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        z = alpha * x0 + sigma * noise
        prediction, raw = split_output(net(z, log_snr, condition), model.channels)
        error = to_x0(base.diffusion.prediction, prediction, z, log_snr).clamp(-1, 1) - x0
        found = (to_frequencies(error) / sigma).square().mean(0).flatten()
        assert raw is not None
        learned, order = fraction_of(raw[0]).flatten().sort(descending=True)
        ends = torch.logspace(0, math.log10(len(order)), 30).long().unique().tolist()
        groups = [slice(a, b) for a, b in itertools.pairwise([0, *ends])]
        rank = [(part.start + part.stop) / 2 + 0.5 for part in groups]
        axis.loglog(rank, [float(found[order[part]].mean()) for part in groups], "o", color=colour)
        axis.loglog(rank, [float(learned[part].mean()) for part in groups], color=colour)
        mean = float(found.mean())
        axis.axhline(mean, color=colour, linestyle=":", label=f"log-SNR {value:g}: mean {mean:.3f}")
    axis.set(xlabel="frequencies, the strongest first", ylabel="squared error / sigma^2")
    axis.set_title("errors by frequency (dots) and the learned fractions (lines)")
    axis.legend()
    save(figure, IMAGES / "learned_variance_spectrum.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "fit", "sample", "draw"))
    parser.add_argument("--minutes", type=float, default=9.0, help="of each base U-Net (9)")
    parser.add_argument("--clips", type=int, default=9600, help="that fit takes (9,600)")
    parser.add_argument("--data", default="data/faces")
    parser.add_argument("--part", default="1/1", help="of the networks, for several processes")
    parser.add_argument("overrides", nargs="*", help="of train and fit: key=value, as in configs/")
    given = parser.parse_intermixed_args()
    part, parts = map(int, given.part.split("/"))
    seeds = SEEDS[part - 1 :: parts]
    if given.what == "train":
        train(seeds, given.minutes, given.data, given.overrides)
    elif given.what == "fit":
        fit(seeds, given.clips, given.data, given.overrides)
    elif given.what == "sample":
        sample(seeds, given.data)
    else:
        summarise()
        draw_spectrum(given.data)
        draw_samples(given.data)


if __name__ == "__main__":
    main()
