"""The front door of every script: from the command line to the composed configuration.

Nothing here imports torch, so `--help`, `--cfg job` and a wrong key answer at once; the scripts
import what they run inside `main`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig

from dalle2_video.config import ConfigError, FilePath, Verbatim, name_of_today, typed_as
from dalle2_video.failures import one_line_errors
from dalle2_video.installation import check_pair
from dalle2_video.stages.config_tree import CONFIGS, Settings, register, settings_of

# What the scripts that train a stage read of the configuration, beside that stage's section.
TRAINING = tuple(
    "train_name run_dir seed validation mixed_precision force timeout_minutes tracker use_wandb "
    "wandb_project wandb_entity wandb_tags wandb_mode faces data".split()
)
TYPED: list[str] = []  # the command line as the user wrote it, once a script has read it
SEVERAL = {"-m", "--multirun"}  # jobs of one command
NOT_IN_A_NAME = ("train_name", "run_dir", "unet")  # they lead to folders of their own
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


def script(*reads: str) -> Callable[[Callable[[DictConfig], None]], Callable[..., None]]:
    """Make a function of the configuration the `main` of an entry script.

    Called without arguments it reads the command line (Hydra's, with `-m` for several jobs, and
    `--help` of its own); called with a configuration, as `compose` returns it, it runs on that.
    An error that the user can mend is one line and exit status 2 (failures.py).

    reads: the keys and sections at the top of the configuration that the script reads.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[..., None]:
        def job(cfg: DictConfig) -> None:
            with one_line_errors():
                settings_of(cfg)  # a wrong value answers before `main` imports what it runs
                check_pair()
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    cfg.run_dir = sweep_folder(cfg.run_dir, HydraConfig.get().job.override_dirname)
                    print(f"-- job {HydraConfig.get().job.num}: {cfg.run_dir}", flush=True)
                _recorded(main)(cfg)

        @functools.wraps(main)
        def run(cfg: DictConfig | None = None) -> None:
            if cfg is not None:
                main(cfg)
                return
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing
            with one_line_errors():
                arguments = quote_texts(check_names(sys.argv[1:]))
                register()
                if {"--help", "-h"} & set(arguments):
                    print(_help(main.__globals__["__doc__"], reads, arguments))
                    return
                TYPED[:] = sys.argv[1:]
                if os.environ.get("RANK", "0") == "0" and (idle := without_effect(TYPED, reads)):
                    print(f"not read by this script: {', '.join(idle)}", file=sys.stderr)
                sys.argv[1:] = name_jobs(arguments)
                with named_keys():
                    hydra.main(version_base=None, config_path=str(CONFIGS), config_name="config")(
                        job
                    )()

        run.reads = reads  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def without_effect(typed: Sequence[str], reads: Sequence[str]) -> list[str]:
    """The keys of a command line that its script does not read; `experiment` fills in all of them,
    and what is no key of ours is not judged here.
    """
    names = [re.match(r"[\w./@]+(?==)", word.lstrip("+~")) for word in typed]
    keys = [name[0] for name in names if name]
    ours = {field.name for field in dataclasses.fields(Settings)}
    tops = {key: re.split(r"[./@]", key)[0] for key in keys}
    return [key for key in keys if tops[key] in ours and tops[key] not in reads]


@contextmanager
def named_keys() -> Iterator[None]:
    """Turns Hydra's answer to an unknown key into a ConfigError that names those like it."""
    try:
        yield
    except ConfigCompositionException as error:
        match = re.match(r"Could not override '([\w./@]+)'", str(error))
        if match is None:
            raise
        from dalle2_video.reference import known_keys

        key = match[1]
        near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.8)
        advice = f"; did you mean {' or '.join(near)}?" if near else "; --help lists the keys"
        raise ConfigError(f"{key}: unknown key{advice}") from error
    except ValueError as error:
        if not str(error).startswith("Config group override"):
            raise
        raise ConfigError(
            "a section takes the name of a file of configs/, not a value: set its keys"
        ) from error


def _recorded(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """`main`, under a launcher such that it names the rank that failed, and why."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def _help(about: str, reads: Sequence[str], arguments: Sequence[str]) -> str:
    from dalle2_video.reference import help_text

    return help_text(about, reads, compose(*(a for a in arguments if a[0] != "-")))


def compose(*overrides: str) -> DictConfig:
    """The configuration of these overrides, as a script gets it from its command line."""
    register()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra_compose("config", list(overrides))


def name_jobs(arguments: Sequence[str]) -> list[str]:
    """The arguments; of several jobs (`-m`) with a word to Hydra that a job's name is made of what
    differs between jobs alone.
    """
    if not SEVERAL & set(arguments):
        return list(arguments)
    typed = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    parsed = OverridesParser.create().parse_overrides(typed)
    same = [one.get_key_element() for one in parsed if not one.is_sweep_override()]
    excluded = ",".join(f"'{key}'" for key in [*NOT_IN_A_NAME, *same])
    word = f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"
    place = arguments.index(typed[0]) if typed else len(arguments)  # argparse wants them together
    return [*arguments[:place], word, *arguments[place:]]


def command_like_this(script: str, *more: str) -> str:
    """The command line of another script for the same experiment and data, as it is typed."""
    ours = ("data.workers=", "data.overwrite=", "data.seconds_per_clip=")
    kept = [
        word
        for word in TYPED
        if word.startswith(("experiment=", "data", "faces")) and not word.startswith(ours)
    ]
    return shlex.join(["python", script, *kept, *more])


def sweep_folder(run_dir: str, overrides: str) -> str:
    """The folder of one job of several (`-m`): <run_dir>/<its overrides>, or the run's own where
    its name or its stage is all that differs.

    The stages that the run itself has trained already are linked into it, so that a sweep over a
    decoder finds the CLIP, and sampling all that it needs.
    """
    parent = Path(run_dir)
    folder = parent / overrides.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for model in parent.glob("*/model.safetensors"):
        link = folder / model.parent.name
        if folder != parent and not link.exists():
            with suppress(FileExistsError):  # another rank was first
                link.symlink_to(os.path.relpath(model.parent, folder))
    return str(folder)


def check_names(arguments: Sequence[str]) -> list[str]:
    """The arguments; ConfigError where one has a name of an earlier version."""
    for argument in arguments:
        for pattern, new in OLD_NAMES.items():
            if match := re.fullmatch(pattern, argument, re.DOTALL):
                raise ConfigError(f"{argument}: is now {match.expand(new)}")
        key, equals, value = argument.partition("=")
        if (now := name_of_today(key)) != key:
            raise ConfigError(f"{argument}: is now {now}{equals}{value}")
    return list(arguments)


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which the sentence of `text=...`, a path and a name are one quoted
    value each.

    Hydra would take a bare comma for a sweep, and refuse an apostrophe or '='. A list of lines
    ([...]) and a value that is quoted already stay as they are. With `-m` a comma between names
    (not in the text, and not in a path) separates jobs.
    """
    several = bool(SEVERAL & set(arguments))
    return [_quoted(argument, several) for argument in arguments]


def _quoted(argument: str, several: bool) -> str:
    key, equals, value = argument.partition("=")
    is_path, is_text = key in typed_as(Settings, FilePath), key in typed_as(Settings, Verbatim)
    raw = re.fullmatch(r"""\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'|null""", value, re.DOTALL)
    if not (is_path or is_text) or not equals or raw:
        return argument
    if is_path and value.startswith("~/"):
        value = os.path.expanduser(value)
    if key == "text":
        value = value.replace("${", chr(92) + "${")
    separate = several and is_text and key != "text"
    # inside quotes only a quote, and backslashes before one, have a meaning
    parts = (
        re.sub(r"(\\*)(\"|$)", lambda m: 2 * m[1] + ('\\"' if m[2] else ""), part)
        for part in (value.split(",") if separate else [value])
    )
    return f"{key}=" + ",".join(f'"{part}"' for part in parts)
