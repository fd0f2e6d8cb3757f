"""What must be alike before the first optimizer step: on all ranks, and of a run and its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import OmegaConf
from yaml import YAMLError

from dalle2_video.config import ConfigError, name_of_today
from dalle2_video.data.atomic import read_text
from dalle2_video.training.config import RunConfig

SHOWN = 6  # differing keys in a message
WHOLE_RUN = ("seed", "mixed_precision", "faces")  # of every stage; faces: null where there are none
# What a run may change when it goes on: how long, what it reports, where things are. The ends of
# dotted keys.
FREE = tuple(
    f".{end}"
    for end in (
        *("train.clips", "train.minutes", "micro_batch_size", "log_every_clips", "val_every_clips"),
        *("save_every_clips", "keep_checkpoints", "keep_every_clips", "workers", "root", "out"),
        *("encoding", "seconds_per_clip", "overwrite", "activation_checkpointing", "compile"),
        *("layout", "file_column", "caption_columns", "group_column"),  # of reading data.root
    )
)


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with dotted keys (`flat`), its older keys in their names of today."""
    return {name_of_today(key): value for key, value in values.items()}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    entries: dict[str, Any] = {}
    for key, inner in value.items():
        entries |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return entries


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """ "key: a there, b here" for each key of two flat dicts whose values differ."""
    keys = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    lines = [f"{k}: {there.get(k, 'none')!r} there, {here.get(k, 'none')!r} here" for k in keys]
    return [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else lines


def from_yaml(text: str, where: str = "configuration") -> dict[str, Any]:
    """A configuration as `RunConfig.resolved` holds it; ConfigError where the text is damaged."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    except YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration that a stage's folder was begun with, in the names of today, flat."""
    path = folder / "config.yaml"
    return translated(flat(from_yaml(read_text(path), str(path))))


def check_ranks(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """ConfigError, on every rank, where one has other facts (JSON values) than the first."""
    first, *others = gather_object([flat(facts)])
    wrong = [
        f"rank {rank} against rank 0: {'; '.join(found)}"
        for rank, own in enumerate(others, 1)
        if (found := differences(own, first))
    ]
    if wrong:
        raise ConfigError(f"the ranks do not train the same: {' | '.join(wrong)}")


def data_facts(dataset: Any) -> dict[str, Any]:
    """Number of clips and a hash of their keys in order, where the data set has keys."""
    facts: dict[str, Any] = {"clips": len(dataset)}
    if hasattr(dataset, "keys"):
        text = "\n".join(dataset.keys()).encode()
        facts["keys"] = hashlib.blake2b(text, digest_size=8).hexdigest()
    return facts


def check_folder(run: RunConfig) -> None:
    """ConfigError where the checkpoints of the run's folder come from another configuration.

    Compares what decides the training of the stage (its own section, the data, the rendered faces,
    seed and precision) and may not change on the way, in the names of today. `force=true` lets it
    pass; a model of another shape is refused anyway.
    """
    path = Path(run.dir) / "config.yaml"
    begun = path.exists() and any((Path(run.dir) / "checkpoints").glob("[0-9]*"))
    if run.resolved is None or run.force or not begun:
        return
    there, here = (
        {
            key: value
            for key, value in values.items()
            if key.startswith((f"{run.section}.", "data.", "faces.")) or key in WHOLE_RUN
            if not key.endswith(FREE)
        }
        for values in (config_of(Path(run.dir)), translated(flat(from_yaml(run.resolved))))
    )
    # an option that did not exist then, and is at its default now, makes no difference
    here = {k: v for k, v in here.items() if k in there or v != run.defaults.get(k)}
    if found := differences(there, here):
        raise ConfigError(
            f"{run.dir} was begun with another configuration ({'; '.join(found)}): choose another "
            "train_name, or set force=true to go on with the new configuration"
        )
