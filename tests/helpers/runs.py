"""Small real runs by the entry scripts: what they are configured by, and how they are trained.

    accelerate launch ... -m tests.helpers.runs JOBS.json

trains stages one after the other in one process of a launch. JOBS.json: [[stage, [override, ...]],
...]. One start of torch and DeepSpeed serves them all.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

import train_clip
import train_decoder
import train_prior
from dalle2_video.cli import compose

STEPS = ["batch_size=8", "clips=32", "warmup_clips=8", "save_every_clips=16", "workers=0"]
STEPS += ["optimizer=adamw"]  # the one that runs sharded
STAGES = {"clip": (train_clip, "clip"), "prior": (train_prior, "prior")}
STAGES |= {name: (train_decoder, f"unets.{name}") for name in ("base", "tsr", "ssr")}
JOINT = [
    "unets.base.num_images=2",
    "unets.base.image_only_prob=0.5",
    "unets.base.model.self_condition=true",
]
SMALL = [
    "faces.clips=64",
    "faces.size=32",
    "data.fps=4",
    "data.num_frames=8",
    "data.size=32",
    "data.workers=0",
    "data.splits={train: 0.6, val: 0.2, heldout: 0.2}",
    "clip.model.embed_dim=32",
    "clip.model.video.width=32",
    "clip.model.video.heads=2",
    "clip.model.text.width=32",
    "clip.model.text.heads=2",
    "prior.model.width=32",
    "prior.model.heads=2",
    "prior.model.layers=2",
    "unets.base.model.dim=32",
    "unets.base.model.head_dim=32",
    "unets.base.model.cond_dim=64",
    # 4 frames of 16 px -> 8 of 16 -> 8 of 32
    *[
        f"unets.tsr.{size}"
        for size in ("model.image_size=16", "model.lowres_size=16", "crop_frames=4")
    ],
    *[
        f"unets.ssr.{size}"
        for size in ("model.image_size=32", "model.lowres_size=16", "crop_frames=4")
    ],
    "unets.tsr.model.num_lowres_frames=4",
    "unets.ssr.model.num_lowres_frames=8",
    "unets.ssr.crop=16",
    *[
        f"unets.{name}.model.{size}"
        for name in ("tsr", "ssr")
        for size in ("num_frames=8", "dim=32", "cond_dim=32")
    ],
    "sample.steps=2",
    "sample.unets.tsr.steps=2",
    "sample.unets.ssr.steps=2",
    "sample.prior_steps=2",
    "cascade=[base]",
    *[f"{key}.train.{setting}" for _, key in STAGES.values() for setting in STEPS],
]

# Overrides of a cascade: 4 frames of 16 px -> 8 of 16 -> 8 of 32
CHAIN = [
    "cascade=[base,tsr,ssr]",
    "unets.base.model.image_size=16",
    "unets.base.model.num_frames=4",
]
ORDER = ("base", "tsr", "ssr")


def train(stage: str, cfg: DictConfig) -> None:
    """One stage by its entry script."""
    cfg = cfg.copy()
    cfg.unet = stage if stage in cfg.unets else "base"
    STAGES[stage][0].main(cfg)


Job = tuple[str, list[str]]


def run(jobs: list[Job]) -> None:
    """Each job's stage, trained to its end."""
    for stage, overrides in jobs:
        train(stage, compose(*overrides))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(Path(sys.argv[1]).read_text()))
