"""Train a U-Net of the cascade. Needs `train_clip.py` with the same train_name.

    python train_decoder.py train_name=run1
    python train_decoder.py train_name=run1 unet=tsr      # frames between (ssr: pixels)
    accelerate launch --config_file configs/accelerate/zero3.yaml train_decoder.py train_name=run1

The same command resumes. Every value of configs/ can be set on the command line (`--cfg job` shows
all).
"""

import hydra
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import record

from dalle2_video.config import ConfigError, from_config
from dalle2_video.stages.frozen_clip import load_conditions
from dalle2_video.stages.unet import UnetSection, decoder_stage
from dalle2_video.stages.wiring import run_config, sample_config, store_of
from dalle2_video.training.loop import train


@hydra.main(version_base=None, config_path="configs", config_name="config")
@record  # so that the launcher names the rank that failed, and why
def main(cfg: DictConfig) -> None:
    if cfg.unet not in cfg.unets:
        raise ConfigError(f"unet={cfg.unet}: unets has only {', '.join(cfg.unets)}")
    section = from_config(UnetSection, cfg.unets[cfg.unet], f"unets.{cfg.unet}")
    sampling = sample_config(cfg).of(cfg.unet, section.model)
    run = run_config(cfg, cfg.unet)
    conditions = load_conditions(
        cfg.run_dir, store_of(cfg), cfg.seed, section.captions, True, cfg.validation, section.images
    )
    stage = decoder_stage(cfg.unet, section, conditions, sampling, cfg.seed)
    train(stage, section.train, run)


if __name__ == "__main__":
    main()
