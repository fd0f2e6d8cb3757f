"""From the settings of a command to what the scripts pass around."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dalle2_video.config import ConfigError, defaults_of
from dalle2_video.data.config import DataConfig
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.store.shard import index_paths
from dalle2_video.data.store.store import ClipStore, open_store
from dalle2_video.faces.config import FacesConfig
from dalle2_video.faces.writer import check_faces, write_dataset
from dalle2_video.model_file import read_header
from dalle2_video.stages.config_tree import Settings
from dalle2_video.training.accelerator import chosen_precision, process_state
from dalle2_video.training.config import RunConfig
from dalle2_video.training.config_guard import config_of, differences, flat
from dalle2_video.training.trackers import check_tracker

# Keys of `data` that decide what its clips are.
CLIPS = tuple(f"data.{key}" for key in "name fps num_frames size span windows split".split())


def render_faces(settings: Settings) -> bool:
    """Render the embedded data set, or what is missing of it, where `data.root` is its own folder.

    Returns whether it is: any other folder holds the user's clips, and nothing is rendered there.
    """
    if (faces := faces_of(settings)) is None:
        return False
    data = settings.data
    write_dataset(faces, data.splits, data.split_seed, data.workers)
    return True


def faces_of(settings: Settings) -> FacesConfig | None:
    """The section `faces` where `data.root` is its own folder."""
    faces = settings.faces
    same = faces is not None and Path(settings.data.root).resolve() == Path(faces.root).resolve()
    return faces if same else None


def store_of(settings: Settings) -> ClipStore:
    """The preprocessed clips that the section `data` names; the embedded faces are made when they
    are not there. StoreError where there are none, FacesError where they have other settings.
    """
    if settings.faces is not None:
        state = process_state()
        with state.main_process_first():
            if state.is_main_process and not index_paths(settings.data.store):
                print(f"{settings.data.store}: no clips yet", flush=True)
                if render_faces(settings):
                    print(preprocess(settings.data), flush=True)
    if (faces := faces_of(settings)) is not None:
        check_faces(faces)
    store = open_store(settings.data)
    if store.warnings and process_state().is_main_process:
        print("\n".join(f"warning: {warning}" for warning in store.warnings), flush=True)
    return store


def run_config(settings: Settings, cfg: DictConfig, stage: str) -> RunConfig:
    """Where and how a stage runs; makes the process group. Raises TrackerError, before any slow
    work.

    cfg: what the settings were made of, written into the run's folder.
    """
    of_its_own = stage in ("clip", "prior")
    name = stage if of_its_own else f"unets.{stage}"
    section = getattr(settings, stage) if of_its_own else settings.unets[stage]
    precision = chosen_precision(settings.mixed_precision)
    resolved = OmegaConf.merge(cfg, {"mixed_precision": precision})
    run = RunConfig(
        dir=str(Path(settings.run_dir) / stage),
        seed=settings.seed,
        mixed_precision=precision,
        train_name=settings.train_name,
        tracker="wandb" if settings.use_wandb else settings.tracker,
        wandb_project=settings.wandb_project,
        wandb_entity=settings.wandb_entity,
        wandb_tags=settings.wandb_tags,
        wandb_mode=settings.wandb_mode,
        section=name,
        defaults=flat(defaults_of(type(section)), name) | flat(defaults_of(DataConfig), "data"),
        force=settings.force,
        timeout_minutes=settings.timeout_minutes,
        resolved=OmegaConf.to_yaml(resolved, resolve=True),
    )
    check_tracker(run)
    process_state(run.timeout_minutes)
    unlink_stages(Path(run.dir))
    return run


def need_clip(settings: Settings) -> None:
    """CheckpointError, before any slow work, where the run has no trained CLIP."""
    read_header(Path(settings.run_dir) / "clip" / "model.safetensors", "clip")


def need_data_of_the_run(settings: Settings) -> None:
    """ConfigError where the first U-Net of the run was trained on other data than `data` names: its
    judgement would be of something else, in silence. Where the data lie may differ.
    """
    folder = Path(settings.run_dir) / settings.cascade[0]
    if not (folder / "config.yaml").is_file():
        return
    there = flat(defaults_of(DataConfig), "data") | config_of(folder)
    here = flat(dataclasses.asdict(settings.data), "data")
    of_clips = [
        {k: v for k, v in facts.items() if k.startswith(CLIPS) and v} for facts in (there, here)
    ]
    found = differences(*of_clips)
    if found:
        raise ConfigError(
            f"{settings.run_dir}: trained on other data than this command names "
            f"({'; '.join(found)}); give the experiment= and data.* of the run"
        )


def unlink_stages(own: Path) -> None:
    """In a job of a sweep: the stage that it trains is its own, not a link to the run's, and with
    another CLIP no later stage is the run's either.
    """
    for link in own.parent.glob("*") if own.name == "clip" else [own]:
        if link.is_symlink():
            link.unlink(missing_ok=True)  # another rank may have been first
