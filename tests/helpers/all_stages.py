"""Trains stages by the entry scripts, one after the other in one process of a launch.

    accelerate launch ... -m tests.helpers.all_stages JOBS.json

JOBS.json: [[stage, [override, ...]], ...]. One start of torch and DeepSpeed serves them all.
"""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

import train_clip
import train_decoder
import train_prior
from tests.helpers.launching import ROOT

SCRIPTS = {"clip": train_clip, "prior": train_prior}
Job = tuple[str, list[str]]


def run(jobs: list[Job]) -> None:
    """Each job's stage, trained to its end."""
    for stage, overrides in jobs:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            cfg = compose("config", overrides)
        if stage in cfg.unets:
            cfg.unet = stage
        SCRIPTS.get(stage, train_decoder).main(cfg)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(Path(sys.argv[1]).read_text()))
