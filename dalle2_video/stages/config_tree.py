"""The whole configuration as one class: every key that a command line can set, with its default.

Hydra composes the same tree: `register` stores the defaults in it, and configs/ holds only what an
experiment has otherwise. `settings_of` turns what Hydra has composed into the class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from pydantic import Field, PositiveInt

from dalle2_video.config import FilePath, Verbatim, config_class, default, defaults_of, from_config
from dalle2_video.data.config import DataConfig
from dalle2_video.evaluation.config import EvaluateConfig
from dalle2_video.faces.config import FacesConfig
from dalle2_video.pipeline.sampling_config import SampleConfig, SuperResolutionSampling
from dalle2_video.stages.sections import ClipSection, PriorSection, UnetSection
from dalle2_video.training.config import Precision, TrackerName

CONFIGS = Path(__file__).parents[2] / "configs"


@config_class
class Settings:
    """All settings of a command."""

    train_name: Verbatim = "default"
    """Name of the run."""
    run_dir: FilePath = "runs/${train_name}"
    """Folder of the run; each stage has its own in it."""
    seed: int = 0
    """Of training."""
    validation: str = "val"
    """The split to validate on."""
    mixed_precision: Precision | None = None
    """Autocast of the network's arithmetic over float32 weights; null: what `accelerate launch
    --mixed_precision` says, or no."""
    force: bool = False
    """Go on with a run that was begun with another configuration."""
    timeout_minutes: Annotated[float, Field(gt=0, le=100_000)] = 30.0
    """How long a rank waits for one that hangs, before the run ends."""
    tracker: TrackerName | None = None
    """Service that shows curves and sample videos; null: none."""
    use_wandb: bool = False
    """The same as tracker=wandb."""
    wandb_project: Verbatim = "dalle2-video"
    """The project on Weights & Biases."""
    wandb_entity: Verbatim | None = None
    """Its user or team; null: your default one."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run there."""
    wandb_mode: Literal["online", "offline"] | None = None
    """null: WANDB_MODE, or online."""

    unet: str = "base"
    """Which of `unets` train_decoder.py trains."""
    cascade: Annotated[tuple[str, ...], Field(min_length=1)] = ("base",)
    """The U-Nets that a sample goes through, in this order."""

    part: PositiveInt = 1
    """preprocess.py takes the part-th of `parts` shares of the archives."""
    parts: PositiveInt = 1
    """Into how many shares the archives are dealt, each perhaps for its own machine."""
    check: bool = False
    """preprocess.py reads the store back and reports, instead of making it."""

    text: Verbatim | tuple[str, ...] | None = None
    """One text (taken apart at its sentences) or a list of lines; without `text` and `file` an
    example."""
    file: FilePath | None = None
    """A file with a text per line."""
    num_samples: PositiveInt = 1
    """Clips per text."""
    format: Literal["mp4", "frames"] = "mp4"
    """A video per clip, or a folder of PNG frames."""
    save_intermediates: bool = False
    """Write the clips of the earlier U-Nets too."""
    out: FilePath | None = None
    """Folder of the results; null: in `run_dir`."""

    faces: FacesConfig | None = None
    """The embedded data set; null: none is rendered."""
    data: DataConfig = default(DataConfig)
    """The clips."""
    clip: ClipSection = default(ClipSection)
    """The video CLIP."""
    prior: PriorSection = default(PriorSection)
    """The prior."""
    unets: dict[str, UnetSection] = default(lambda: {"base": UnetSection()})
    """The U-Nets of the cascade by name."""
    sample: SampleConfig = default(SampleConfig)
    """How the cascade is sampled."""
    evaluate: EvaluateConfig = default(EvaluateConfig)
    """How a run is judged."""

    def __post_init__(self) -> None:
        if self.use_wandb and self.tracker not in (None, "wandb"):
            raise ValueError(f"tracker={self.tracker} contradicts use_wandb=true: set only one")
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
