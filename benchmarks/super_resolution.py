"""Temporal and spatial super-resolution on held-out faces, beside blending, repeating and bicubic.

    python -m benchmarks.super_resolution tsr --run-dir runs/demo --minutes 15
    python -m benchmarks.super_resolution ssr --run-dir runs/demo

Needs the CLIP and the prior of that run. With --minutes it first trains the network in
<run-dir>_<what>4: TSR from 4 frames to 16 (the demo's makes 16 of 8). Without, it takes the run's
own. Conditions are the captions of `val` and `heldout` with the prior's embeddings, so the network
gets nothing of the true frames but the known ones. Writes a figure file in benchmarks/results and
a picture beside the run.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dalle2_video import keyed
from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.sheet import save_sheet
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset
from dalle2_video.diffusion.lowres import blend, fit, known_frames
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.evaluation.frechet import frechet_distance
from dalle2_video.faces.probe import load_probe
from dalle2_video.models.conditioning import Condition
from dalle2_video.pipeline.loading import load_clip, load_prior, load_unet
from dalle2_video.pipeline.sampling import GivenLowRes, sample_clips, sample_embeddings
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import Settings, settings_of
from dalle2_video.stages.frozen_clip import TextEncoder
from dalle2_video.stages.wiring import store_of

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAWS, BATCH = 8, 16
ALL = slice(None)
FOUR = ["unets.tsr.model.num_lowres_frames=4", "unets.tsr.crop_frames=null"]  # of 16


def train(what: str, run_dir: Path, minutes: float, overrides: list[str]) -> Path:
    """A run with the same CLIP and prior, and this U-Net, trained for `minutes`."""
    folder = run_dir.with_name(f"{run_dir.name}_{what}4")
    for stage in ("clip", "prior"):
        if not (folder / stage).exists():
            shutil.copytree(
                run_dir / stage, folder / stage, ignore=shutil.ignore_patterns("checkpoints")
            )
    command = [sys.executable, "train_decoder.py", f"unet={what}", f"run_dir={folder}"]
    budget = f"unets.{what}.train.minutes={minutes}"
    subprocess.run([*command, budget, *overrides], check=True, cwd=ROOT)
    return folder


class HeldOut:
    """The clips of val and heldout with what their captions say."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        store, policy = store_of(settings), EvaluationCaptions()
        clip, _ = load_clip(folder / "clip" / "model.safetensors")
        prior, diffusion, _ = load_prior(folder / "prior" / "model.safetensors")
        encode, config = TextEncoder(clip), settings.sample
        prior.to(DEVICE)
        frames, self.conditions, self.captions = [], [], []
        for split in ("val", "heldout"):
            dataset = CelebVTextDataset(store, split, 0, policy)
            for start in range(0, len(dataset), BATCH):
                rows = range(start, min(start + BATCH, len(dataset)))
                batch = dataset.collate([dataset.eval_pointer(i) for i in rows])
                assert batch.frames is not None
                frames.append(batch.frames)
                text = encode(batch.to(DEVICE))
                with torch.no_grad():
                    embedding = sample_embeddings(
                        prior, prior.whiten, diffusion, text, batch.sample_ids, config
                    )
                one = Condition.of(embedding, text.states, text.place, text.embedding)
                each = torch.arange(len(rows), device=DEVICE)[:, None]
                self.conditions += [one.rows(row) for row in each]
                self.captions += [" ".join(lines) for lines in batch.captions]
        self.frames = torch.cat(frames)

    def condition(self, rows: list[int]) -> Condition:
        """Of these clips."""
        whole = self.conditions[rows[0]]
        for row in rows[1:]:
            whole = Condition.cat(whole, self.conditions[row])
        return whole


def psnr(a: Tensor, b: Tensor) -> float:
    """Of clips in [-1, 1] (B, 3, F, H, W): the mean over clips, in dB."""
    error = (a - b).square().flatten(1).mean(1) / 4
    return float((-10 * error.log10()).mean())


def high_energy(video: Tensor) -> float:
    """Mean squared amplitude of spatial frequencies above half of Nyquist, in either direction."""
    side = video.shape[-1]
    frequency = torch.fft.fftfreq(side).abs()
    high = (frequency[:, None] > 0.25) | (frequency[None, :] > 0.25)
    spectrum = torch.fft.fft2(video, norm="forward").abs().square()
    return float(spectrum[..., high].sum(-1).mean())


@torch.no_grad()
def measure(what: str, folder: Path, settings: Settings, clips: int | None) -> dict[str, float]:
    """Figures of one network, and a picture."""
    unet, diffusion, _ = load_unet(folder / what / "model.safetensors", what)
    unet.to(DEVICE)
    model, how = unet.config, settings.sample.of(what, unet.config)
    data, probe = HeldOut(folder, settings), load_probe().network.to(DEVICE)
    truth = to_float(data.frames, model.num_frames, model.image_size)
    if what == "tsr":  # the quarter with the most motion
        motion = (truth[:, :, 1:] - truth[:, :, :-1]).abs().flatten(1).mean(1)
        rows = motion.argsort(descending=True)[: len(truth) // 4].tolist()
    else:
        rows = list(range(len(truth)))
    rows = rows[:clips]
    truth = truth[rows]
    lowres = to_float(data.frames[rows], model.num_lowres_frames, model.lowres_size)
    level = torch.full((len(rows),), 30.0)
    fitted = fit(lowres, model.upscale)
    draws = DRAWS if what == "tsr" else 1
    samples = torch.empty(draws, *truth.shape)
    guess = torch.empty_like(truth)
    first = sampler_steps(diffusion.schedule, how.steps)[0]
    for start in tqdm(range(0, len(rows), BATCH), unit="batch"):
        part = slice(start, start + BATCH)
        condition, small = data.condition(rows[part]), lowres[part].to(DEVICE)
        for k in range(draws):
            sample_ids = torch.tensor([1000 * k + row for row in rows[part]])
            samples[k, part] = sample_clips(
                unet, model, diffusion, condition, sample_ids, how, 0, small, stream=what
            ).cpu()
        z = keyed.randn(truth.shape[1:], 0, torch.tensor(rows[part]), "one step", DEVICE)
        log_snr = first.to(DEVICE).expand(len(small))
        seen = GivenLowRes(small, model, how, 0, torch.tensor(rows[part]), "one step")
        out = unet(z, log_snr, condition, 0, None, seen.at(ALL))
        estimate = to_x0(diffusion.prediction, out, z, log_snr)
        guess[part] = seen.task.to_pixels(estimate, seen.at(ALL)).clamp(-1, 1).cpu()

    def features(video: Tensor) -> Tensor:
        return probe.features(to_uint8(video).to(DEVICE)).cpu()

    def distance(video: Tensor) -> float:
        return frechet_distance(features(video), features(truth))

    figures: dict[str, float] = {"clips": float(len(rows))}
    if what == "tsr":
        unknown = ~known_frames(model.num_frames, model.upscale)
        last_known = model.num_frames - model.upscale[0]
        between = unknown & (torch.arange(model.num_frames) < last_known)
        behind = unknown & ~between
        others = {"blending": blend(fitted, level, model.upscale), "repetition": fitted[:, :3]}
        mean = samples.mean(0)
        for name, frames in (("between", between), ("behind_the_last", behind)):
            figures[f"psnr_{name}_mean_of_8"] = psnr(mean[:, :, frames], truth[:, :, frames])
            single = [psnr(one[:, :, frames], truth[:, :, frames]) for one in samples]
            figures[f"psnr_{name}_single"] = float(np.mean(single))
            for other, video in others.items():
                figures[f"psnr_{name}_{other}"] = psnr(video[:, :, frames], truth[:, :, frames])
        figures["frechet"] = float(np.mean([distance(one) for one in samples]))
    else:
        size = (model.image_size, model.image_size)
        flat = lowres.transpose(1, 2).flatten(0, 1)
        bicubic = F.interpolate(flat, size, mode="bicubic").clamp(-1, 1)
        bicubic = bicubic.unflatten(0, (len(lowres), -1)).transpose(1, 2)
        others = {"bicubic": bicubic}
        figures["psnr_one_step"] = psnr(guess, truth)
        figures["psnr_sample"] = psnr(samples[0], truth)
        figures["psnr_bicubic"] = psnr(bicubic, truth)
        real = high_energy(truth)
        figures["high_energy_sample_ratio"] = high_energy(samples[0]) / real
        figures["high_energy_bicubic_ratio"] = high_energy(bicubic) / real
        figures["frechet"] = distance(samples[0])
    for name, video in others.items():
        figures[f"frechet_{name}"] = distance(video)
    shown = [0, len(rows) // 3, 2 * len(rows) // 3]
    sheet, titles = [], []
    for i in shown:
        for title, video in {**others, "sample": samples[0], "truth": truth}.items():
            sheet.append(to_uint8(video[i : i + 1])[0].numpy())
            titles.append(title if title != "truth" else f"truth: {data.captions[rows[i]]}")
    save_sheet(folder / f"{what}.png", sheet, titles, frames_per_clip=16 if what == "tsr" else 6)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tsr", "ssr"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--minutes", type=float, help="train it again for so long")
    parser.add_argument("--clips", type=int, help="no more than these")
    parser.add_argument("overrides", nargs="*", help="key=value as in configs/")
    given = parser.parse_intermixed_args()
    overrides, folder = given.overrides, given.run_dir
    if given.minutes:
        overrides = [*(FOUR if given.what == "tsr" else []), *overrides]
        folder = train(given.what, folder, given.minutes, overrides)
    settings = settings_of(compose(*overrides))
    figures = measure(given.what, folder, settings, given.clips)
    log = (folder / given.what / "metrics.jsonl").read_text().splitlines()
    figures["clips_trained"] = json.loads(log[-1])["clips"]
    print(json.dumps(figures, indent=1))
    report = figures | {"minutes_trained": given.minutes, "overrides": overrides} | provenance()
    write_json(ROOT / "benchmarks" / "results" / f"super_resolution_{given.what}.json", report)


if __name__ == "__main__":
    main()
