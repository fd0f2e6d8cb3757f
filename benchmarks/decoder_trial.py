"""A short training of the base U-Net, judged on `val`: to compare settings before a whole demo.

    python train_clip.py run_dir=runs/trials faces.root=data/faces clip.train.minutes=3.5
    python -m benchmarks.decoder_trial runs/trials muon --minutes 3
    python -m benchmarks.decoder_trial runs/trials slow --minutes 3 unets.base.train.lr=1e-3

Trains in runs/trials_<name> with the CLIP of runs/trials. The conditions are the clips' own video
embeddings and captions, so the prior has no part in it. Prints and writes trial.json: clips seen,
loss on val, the error of x0 by log-SNR with and without conditions, the same for the motion alone
(what differs from the clip's mean frame), and the attributes that the probe reads in samples.
Compare runs of one machine, one after the other; trials of three minutes differ by noise of about
three points.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import CaptionPolicy
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.faces.probe import load_probe, score, targets_of
from dalle2_video.faces.writer import read_attributes
from dalle2_video.models.conditioning import Condition
from dalle2_video.pipeline.loading import load_unet
from dalle2_video.pipeline.sampling import sample_clips
from dalle2_video.pipeline.sampling_config import SampleConfig
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import TextEncoder, load_conditions
from dalle2_video.stages.wiring import store_of

ROOT = Path(__file__).parents[1]
LOG_SNRS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0)


@torch.no_grad()
def judge(
    folder: Path, data: str, overrides: list[str], clips: int, steps: int
) -> dict[str, float]:
    """Figures of <folder>/base/model.safetensors on the first clips of val."""
    store = store_of(settings_of(compose(f"faces.root={data}", *overrides)))
    conditions = load_conditions(folder, store, 0, CaptionPolicy(), load_frames=True)
    unet, diffusion, _ = load_unet(folder / "base" / "model.safetensors", "base")
    dataset = conditions.val_set
    pointers = [dataset.eval_pointer(i) for i in range(min(clips, len(dataset)))]
    batch = dataset.collate(pointers)
    assert batch.frames is not None and batch.embeddings is not None
    text = TextEncoder(conditions.video_clip)(batch)
    condition = Condition.of(batch.embeddings, text.states, text.place, text.embedding)

    model = unet.config
    x0 = to_float(batch.frames, model.num_frames, model.image_size)
    motion = x0 - x0.mean(2, keepdim=True)
    figures = {"clips": float(len(x0)), "motion_energy": float(motion.square().mean())}
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for value in LOG_SNRS:
        log_snr = torch.full((len(x0),), value)
        alpha, sigma = log_snr.sigmoid().sqrt()[0], (-log_snr).sigmoid().sqrt()[0]
        for name, kept in (("with", condition), ("without", condition.dropped())):
            z = alpha * x0 + sigma * noise
            x = to_x0(diffusion.prediction, unet(z, log_snr, kept), z, log_snr)
            if unet.config.self_condition:
                again = unet(z, log_snr, kept, 0, x.clamp(-1, 1))
                x = to_x0(diffusion.prediction, again, z, log_snr)
            moved = x - x.mean(2, keepdim=True)
            where = f"at_{value:+.0f}_{name}"
            figures[f"x0_error_{where}"] = float((x - x0).square().mean())
            figures[f"motion_error_{where}"] = float((moved - motion).square().mean())

    config, samples = SampleConfig(sampler="ddim", steps=steps), []
    for start in range(0, len(x0), 32):
        part = Condition(*(tensor[start : start + 32] for tensor in condition))
        sample_ids = batch.sample_ids[start : start + 32]
        video = sample_clips(unet, model, diffusion, part, sample_ids, config, config.seed)
        samples.append(to_uint8(video))
    attributes = read_attributes(Path(data) / "attributes.jsonl")
    truth = targets_of([attributes[p.key.rsplit(":", 1)[0]] for p in pointers])
    result = score(load_probe().network.predict(torch.cat(samples)), truth)
    figures |= {"accuracy": result.mean, "accuracy_low": result.low, "accuracy_high": result.high}
    return figures | {f"accuracy_{name}": value for name, value in result.accuracy.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="a run with a trained CLIP")
    parser.add_argument("name", help="of the trial; its folder is <run_dir>_<name>")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--data", default="data/faces")
    parser.add_argument("--clips", type=int, default=96, help="of val, to judge on (96)")
    parser.add_argument("--steps", type=int, default=15, help="of DDIM (15)")
    parser.add_argument("overrides", nargs="*", help="key=value, as in configs/")
    a = parser.parse_intermixed_args()
    folder = Path(f"{a.run_dir}_{a.name}")
    if not (folder / "clip").exists():
        shutil.copytree(Path(a.run_dir) / "clip", folder / "clip")
    budget = f"unets.base.train.minutes={a.minutes}"
    command = [str(ROOT / "train_decoder.py"), f"run_dir={folder}", f"faces.root={a.data}", budget]
    subprocess.run([sys.executable, *command, "sample.steps=2", *a.overrides], check=True)
    lines = (folder / "base" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    figures = {"clips_seen": last["clips"], "val_loss": last["val/loss"]}
    figures |= judge(folder, a.data, a.overrides, a.clips, a.steps)
    place = provenance() | {"minutes": a.minutes, "overrides": a.overrides}
    write_json(folder / "trial.json", figures | place)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
