"""From the command line and the configuration tree to what the scripts pass around."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dalle2_video.config import ConfigError, from_config
from dalle2_video.data.config import DataConfig
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.store.shard import index_paths
from dalle2_video.data.store.store import ClipStore, open_store
from dalle2_video.faces.writer import FacesConfig, write_dataset
from dalle2_video.pipeline.sampling import SampleConfig
from dalle2_video.training.accelerator import process_state
from dalle2_video.training.log import check_wandb
from dalle2_video.training.stage import RunConfig


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which the sentence of `text=...` is one quoted value.

    Hydra would take a bare comma for a sweep, and refuse an apostrophe. A list of lines ([...]) and
    a value that is quoted already stay as they are.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    raw = re.fullmatch(r"""\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'|null""", value, re.DOTALL)
    if key != "text" or not equals or raw:
        return argument
    # inside quotes only a quote, backslashes before one, and an interpolation have a meaning
    value = re.sub(r"(\\*)(\"|$)", lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value)
    return f'text="{value.replace("${", chr(92) + "${")}"'


def render_faces(cfg: DictConfig, data: DataConfig) -> bool:
    """Render the embedded data set, or what is missing of it, where `data.root` is its own folder.

    Returns whether it is: any other folder holds the user's clips, and nothing is rendered there.
    """
    if cfg.faces is None:
        return False
    faces = from_config(FacesConfig, cfg.faces, "faces")
    if Path(data.root).resolve() != Path(faces.root).resolve():
        return False
    write_dataset(
        faces.root,
        faces.clips,
        faces.size,
        faces.fps,
        faces.seconds,
        faces.seed,
        data.splits,
        data.workers,
        split_seed=data.split_seed,
    )
    return True


def store_of(cfg: DictConfig) -> ClipStore:
    """The preprocessed clips that the section `data` names; the embedded faces are made when they
    are not there. StoreError where there are none.
    """
    config = from_config(DataConfig, cfg.data, "data")
    if cfg.faces is not None:
        state = process_state()
        with state.main_process_first():
            if state.is_main_process and not index_paths(config.store):
                print(f"{config.store}: no clips yet", flush=True)
                if render_faces(cfg, config):
                    print(preprocess(config), flush=True)
    return open_store(config)


def sample_config(cfg: DictConfig) -> SampleConfig:
    """How to sample, from the section `sample`. ConfigError where it names no U-Net of `unets` that
    makes more of a smaller clip.
    """
    config = from_config(SampleConfig, cfg.sample, "sample")
    for name in config.stages:
        if name not in cfg.unets:
            raise ConfigError(f"sample.stages.{name}: unets has only {', '.join(cfg.unets)}")
        if cfg.unets[name].model.low_frames is None:
            raise ConfigError(f"sample.stages.{name}: it makes clips of text, as `sample` says")
    return config


def run_config(cfg: DictConfig, stage: str) -> RunConfig:
    """Where and how a stage runs; makes the process group. Raises WandbKeyError, before any slow
    work.
    """
    run = RunConfig(
        dir=str(Path(cfg.run_dir) / stage),
        seed=cfg.seed,
        mixed_precision=cfg.mixed_precision,
        train_name=cfg.train_name,
        use_wandb=cfg.use_wandb,
        wandb_project=cfg.wandb_project,
        wandb_entity=cfg.wandb_entity,
        wandb_tags=tuple(cfg.wandb_tags),
        wandb_mode=cfg.wandb_mode,
        section=stage if stage in cfg else f"unets.{stage}",
        force=cfg.force,
        timeout_minutes=cfg.timeout_minutes,
        resolved=OmegaConf.to_yaml(cfg, resolve=True),
    )
    check_wandb(run)
    process_state(run.timeout_minutes)
    return run
