"""Train the prior: text -> video embedding. Needs `train_clip.py` with the same train_name.

    python train_prior.py train_name=run1
    accelerate launch --config_file configs/accelerate/zero3.yaml train_prior.py train_name=run1

The same command resumes. Every value of configs/ can be set on the command line (`--cfg job` shows
all).
"""

import hydra
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import record

from dalle2_video.config import from_config
from dalle2_video.stages.frozen_clip import load_conditions
from dalle2_video.stages.prior import PriorSection, prior_stage
from dalle2_video.stages.wiring import run_config, store_of
from dalle2_video.training.loop import train


@hydra.main(version_base=None, config_path="configs", config_name="config")
@record  # so that the launcher names the rank that failed, and why
def main(cfg: DictConfig) -> None:
    section = from_config(PriorSection, cfg.prior, "prior")
    run = run_config(cfg, "prior")
    conditions = load_conditions(
        cfg.run_dir, store_of(cfg), cfg.seed, section.captions, False, cfg.validation
    )
    train(prior_stage(section, conditions, cfg.seed), section.train, run)


if __name__ == "__main__":
    main()
