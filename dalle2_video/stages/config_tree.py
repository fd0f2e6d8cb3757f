"""The whole configuration as one class: every key that a command line can set, with its default.

Hydra composes the same tree: `register` stores the defaults in it, and configs/ holds only what an
experiment has otherwise. `settings_of` turns what Hydra has composed into the class.
"""

from __future__ import annotations

from typing import Literal

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dalle2_video.config import config_class, default, defaults_of, from_config
from dalle2_video.data.config import DataConfig
from dalle2_video.evaluation.alignment import EvaluateConfig
from dalle2_video.faces.writer import FacesConfig
from dalle2_video.pipeline.sampling_config import SampleConfig, SuperResolutionSampling
from dalle2_video.stages.prior import PriorSection
from dalle2_video.stages.unet_section import UnetSection
from dalle2_video.stages.video_clip import ClipSection


@config_class
class Settings:
    """All settings of a command.

    train_name, run_dir: the run's name and folder. seed: of training. validation: the split to
    validate on. force: go on with a run that was begun with another configuration. timeout_minutes:
    how long a rank waits for one that hangs, before the run ends. wandb_mode: online | offline;
    None: WANDB_MODE or online. unet: which of `unets` train_decoder.py trains. cascade: the U-Nets
    that a sample goes through.

    preprocess.py: part of `parts`, every parts-th archive, each part perhaps on its own machine;
    check: read the store back and report, instead of making it. faces: the embedded data set, or
    None.

    sample.py: text, one (taken apart at its sentences) or a list of lines, or file, with a text per
    line; without both an example. num_samples: clips per text. save_intermediates: write the clips
    of the earlier U-Nets too. out: folder; None: in run_dir.
    """

    train_name: str = "default"
    run_dir: str = "runs/${train_name}"
    seed: int = 0
    validation: str = "val"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    force: bool = False
    timeout_minutes: float = 30.0
    use_wandb: bool = False
    wandb_project: str = "dalle2-video"
    wandb_entity: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_mode: Literal["online", "offline"] | None = None

    unet: str = "base"
    cascade: tuple[str, ...] = ("base",)

    part: int = 1
    parts: int = 1
    check: bool = False

    text: str | tuple[str, ...] | None = None
    file: str | None = None
    num_samples: int = 1
    format: Literal["mp4", "frames"] = "mp4"
    save_intermediates: bool = False
    out: str | None = None

    faces: FacesConfig | None = None
    data: DataConfig = default(DataConfig)
    clip: ClipSection = default(ClipSection)
    prior: PriorSection = default(PriorSection)
    unets: dict[str, UnetSection] = default(lambda: {"base": UnetSection()})
    sample: SampleConfig = default(SampleConfig)
    evaluate: EvaluateConfig = default(EvaluateConfig)

    def __post_init__(self) -> None:
        for key, name in [("unet", self.unet), *(("cascade", name) for name in self.cascade)]:
            if name not in self.unets:
                raise ValueError(f"{key}={name}: unets has only {', '.join(self.unets)}")
        for name in self.sample.unets:
            if name not in self.unets:
                raise ValueError(f"sample.unets.{name}: unets has only {', '.join(self.unets)}")
            if self.unets[name].model.num_lowres_frames is None:
                raise ValueError(
                    f"sample.unets.{name}: it makes clips of text: set sample.* instead"
                )


def settings_of(cfg: DictConfig) -> Settings:
    """What Hydra has composed, checked as a whole. ConfigError, one line, where it is wrong."""
    return from_config(Settings, cfg, "")


def register() -> None:
    """Store the defaults where configs/*.yaml find them: all of them as `schema`, one U-Net's as
    `schema_unet`, and group `sampler` for super-resolution.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=defaults_of(Settings))
    store.store(name="schema_unet", node=defaults_of(UnetSection))
    store.store(group="faces", name="rendered", node=defaults_of(FacesConfig))
    super_resolution = defaults_of(SuperResolutionSampling)
    store.store(group="sampler", name="super_resolution", node=super_resolution)
