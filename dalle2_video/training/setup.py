"""From the configuration tree to what the scripts pass around."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dalle2_video.data.config import DataConfig, open_store
from dalle2_video.data.store import ClipStore
from dalle2_video.generate import SampleConfig
from dalle2_video.training.environment import process_state
from dalle2_video.training.stage import RunConfig, from_config


def store_of(cfg: DictConfig) -> ClipStore:
    """The preprocessed clips that the section `data` names; StoreError where there are none."""
    return open_store(from_config(DataConfig, cfg.data, "data"))


def sample_config(cfg: DictConfig) -> SampleConfig:
    """How to sample, from the section `sample` (which also says what and where to)."""
    names = [field.name for field in dataclasses.fields(SampleConfig)]
    return from_config(SampleConfig, {name: cfg.sample[name] for name in names}, "sample")


def run_config(cfg: DictConfig, stage: str) -> RunConfig:
    """Where and how a stage runs; also writes the resolved configuration beside its checkpoints."""
    folder = Path(cfg.run_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    if process_state().is_main_process:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return RunConfig(
        dir=str(folder),
        seed=cfg.seed,
        mixed_precision=cfg.mixed_precision,
        train_name=cfg.train_name,
        use_wandb=cfg.use_wandb,
        wandb_project=cfg.wandb_project,
        wandb_entity=cfg.wandb_entity,
        wandb_mode=cfg.wandb_mode,
    )
