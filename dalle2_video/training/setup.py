"""From the configuration tree to what the training scripts pass around."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dalle2_video.data.store import ClipStore
from dalle2_video.training.stage import RunConfig


def open_store(cfg: DictConfig) -> ClipStore:
    """The preprocessed clips that the section `data` names; StoreError where there are none."""
    splits = {str(name): float(share) for name, share in cfg.data.splits.items()}
    return ClipStore.open(cfg.data.out or cfg.data.root, splits, cfg.data.split_seed)


def run_config(cfg: DictConfig, stage: str) -> RunConfig:
    """Where and how a stage runs; also writes the resolved configuration beside its checkpoints."""
    folder = Path(cfg.run_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
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
