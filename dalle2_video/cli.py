"""The front door of every script: from the command line to the composed configuration."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from dalle2_video.config import name_of_today

CONFIGS = Path(__file__).parents[1] / "configs"
TEXTS = ("text", "file", "out", "run_dir", "train_name", "data.root", "data.out", "faces.root")
NOT_IN_A_NAME = ("train_name", "run_dir", "unet")  # they lead to folders of their own
STAGES = ("clip", "prior", "base", "tsr", "ssr")
# What users may have typed before, as a pattern of the whole argument -> what to type now.
OLD_NAMES = {
    r"\+?size=(.*)": r"experiment=\1",
    r"preset=base": "unets/base=large",
    r"preset=(.*)": r"unets/base=\1",
    r"number=(.*)": r"num_samples=\1",
    r"keep_stages=(.*)": r"save_intermediates=\1",
    r"data\.faces=null": "left out: the faces are rendered into faces.root alone",
    r"sample\.stages\.(.*)\.window=(.*)": r"sample.unets.\1.tile=\2",
    r"sample\.stages\.(.*)": r"sample.unets.\1",
    r"sample\.(augmentation|overlap)=(.*)": r"sample.unets.<name>.\1=\2",
    r"sample\.window=(.*)": r"sample.unets.<name>.tile=\1",
    r"(evaluate\.split|validation)=combo": r"\1=heldout",
    r"data\.splits(.*)\bcombo\b(.*)": r"data.splits\1heldout\2",
}


def script(main: Callable[[DictConfig], None]) -> Callable[..., None]:
    """Make a function of the configuration the `main` of an entry script.

    Called without arguments it reads the command line (Hydra's, with `-m` for several jobs); called
    with a configuration, as `compose` returns it, it runs on that.
    """

    @functools.wraps(main)
    def run(cfg: DictConfig | None = None) -> None:
        if cfg is not None:
            main(cfg)
            return
        sys.argv[1:] = name_jobs(quote_texts(check_names(sys.argv[1:])))
        _register()
        hydra.main(version_base=None, config_path=str(CONFIGS), config_name="config")(job)()

    def job(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            cfg.run_dir = sweep_folder(cfg.run_dir, HydraConfig.get().job.override_dirname)
        main(cfg)

    return run


def compose(*overrides: str) -> DictConfig:
    """The configuration of these overrides, as a script gets it from its command line."""
    _register()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra_compose("config", list(overrides))


def _register() -> None:
    # here, since it imports torch: the workers of preprocess.py import that script, and need none
    from dalle2_video.stages.config_tree import register

    register()


def name_jobs(arguments: Sequence[str]) -> list[str]:
    """The arguments; of several jobs (`-m`) with a word to Hydra that a job's name is made of what
    differs between jobs alone.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    typed = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    parsed = OverridesParser.create().parse_overrides(typed)
    same = [one.get_key_element() for one in parsed if not one.is_sweep_override()]
    excluded = ",".join(f"'{key}'" for key in [*NOT_IN_A_NAME, *same])
    return [*arguments, f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"]


def sweep_folder(run_dir: str, overrides: str) -> str:
    """The folder of one job of several (`-m`): <run_dir>/<its overrides>.

    The stages that the run itself has trained already are linked into it, so that a sweep over a
    decoder finds the CLIP, and sampling all that it needs.
    """
    parent = Path(run_dir)
    folder = parent / (overrides.replace("/", "_") or "job")
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if (parent / stage).is_dir() and not (folder / stage).exists():
            (folder / stage).symlink_to(os.path.relpath(parent / stage, folder))
    return str(folder)


def check_names(arguments: Sequence[str]) -> list[str]:
    """The arguments; SystemExit with one line where one has a name of an earlier version."""
    for argument in arguments:
        for pattern, new in OLD_NAMES.items():
            if match := re.fullmatch(pattern, argument, re.DOTALL):
                print(f"{argument}: is now {match.expand(new)}", file=sys.stderr)
                raise SystemExit(2)
        key, equals, value = argument.partition("=")
        if (now := name_of_today(key)) != key:
            print(f"{argument}: is now {now}{equals}{value}", file=sys.stderr)
            raise SystemExit(2)
    return list(arguments)


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which the sentence of `text=...`, a path and a name are one quoted
    value each.

    Hydra would take a bare comma for a sweep, and refuse an apostrophe or '='. A list of lines
    ([...]) and a value that is quoted already stay as they are.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    raw = re.fullmatch(r"""\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'|null""", value, re.DOTALL)
    if key not in TEXTS or not equals or raw:
        return argument
    # inside quotes only a quote, backslashes before one, and an interpolation have a meaning
    value = re.sub(r"(\\*)(\"|$)", lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value)
    if key == "text":
        value = value.replace("${", chr(92) + "${")
    return f'{key}="{value}"'
