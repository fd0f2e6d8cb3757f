"""Configuration classes: frozen dataclasses that hold every default and check every value.

A class of the configuration is made by `config_class`; `from_config` builds one from a section of
the tree that Hydra composes, so a wrong key fails before any data is read. Conversion is
pydantic's, in its strict mode: a number is never taken from a word or a yes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from omegaconf import DictConfig, OmegaConf
from pydantic.dataclasses import dataclass as pydantic_dataclass

from dalle2_video.errors import UserError

T = TypeVar("T")
# Ranges of values. The upper limits are far above what any machine holds: a typing error ends in a
# line at once, and not in a loop or an allocation that never ends.
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Size = Annotated[int, pydantic.Field(ge=1, le=65_536)]  # widths, frames, pixels
Depth = Annotated[int, pydantic.Field(ge=1, le=1_024)]  # layers, heads, sampler steps
Workers = Annotated[int, pydantic.Field(ge=0, le=1_024)]
# Taken from the command line as typed, whatever letters it holds; `~/` begins a path at home.
Verbatim = Annotated[str, "verbatim"]
FilePath = Annotated[str, "path"]
LogSNR = Annotated[float, pydantic.Field(ge=-60, le=60)]
# Dotted keys that had another name, as patterns, and their names of today: for the command line and
# for the config.yaml of older runs.
RENAMED = (
    (r"^(unets\.\w+)\.images$", r"\1.num_images"),
    (r"^(unets\.\w+)\.image_only$", r"\1.image_only_prob"),
    (r"^(unets\.\w+)\.drop\b", r"\1.cond_dropout"),
    (r"^(unets\.\w+)\.window$", r"\1.crop_frames"),
    (r"^(unets\.\w+\.model)\.low_frames$", r"\1.num_lowres_frames"),
    (r"^(unets\.\w+\.model)\.low_size$", r"\1.lowres_size"),
    (r"^data\.faces\b", "faces"),
    (r"^data\.splits\.combo$", "data.splits.heldout"),
)


class ConfigError(UserError, ValueError):
    """A configuration with an unknown key or a value that is not allowed."""


WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
CHECKS = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config_class(cls: type[T]) -> type[T]:
    """A frozen dataclass that refuses unknown keys and values of the wrong type."""
    made = pydantic_dataclass(frozen=True, config=CHECKS)(cls)
    return typing.cast(type[T], made)


def name_of_today(key: str) -> str:
    """A dotted key of the configuration, in its name of today."""
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


@functools.cache
def typed_as(cls: type, kind: Any, prefix: str = "") -> list[str]:
    """Dotted keys below a configuration class that are typed as `kind`: Verbatim or FilePath."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += typed_as(hint, kind, f"{prefix}{name}.")
        elif kind in (hint, *typing.get_args(hint)):
            found.append(f"{prefix}{name}")
        else:
            for inner in typing.get_args(hint) if typing.get_origin(hint) is not dict else ():
                if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                    found += typed_as(inner, kind, f"{prefix}{name}.")
    return found


def default(make: Callable[[], T]) -> T:
    """A field's default that is itself a configuration object, built by `make` when needed."""
    return dataclasses.field(default_factory=make)


def defaults_of(cls: type) -> dict[str, Any]:
    """The whole section of a configuration class at its defaults, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cls())))


def from_config(cls: type[T], section: DictConfig | Mapping[str, Any], where: str) -> T:
    """Build the configuration class `cls` from a section of the configuration, strictly.

    Nested classes come from nested sections, lists become tuples where the field is one, 1e6 may
    stand for an integer; keys that are absent have their default. Raises ConfigError, one line that
    names the section `where` ("" for the whole tree), the key and the cause.
    """
    if isinstance(section, DictConfig):
        section = typing.cast(Mapping[str, Any], OmegaConf.to_container(section, resolve=True))
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: must be a section with keys, got {section!r}")
    try:
        text = json.dumps(_whole_numbers(section))
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        lines = [_one_line(cls, where, found) for found in error.errors()]
        raise ConfigError("; ".join(dict.fromkeys(lines))) from None


def _whole_numbers(value: Any) -> Any:
    """Floats without a fraction as integers: YAML reads 1e6 as a float. Float fields take both."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_line(cls: type, where: str, found: Mapping[str, Any]) -> str:
    path = [str(part) for part in (where, *found["loc"]) if part != ""]
    place, parent = ".".join(path) or "configuration", ".".join(path[:-1]) or "configuration"
    match found["type"]:
        case "unexpected_keyword_argument":
            known = ", ".join(_keys(cls, found["loc"][:-1]))
            return f"{place}: unknown key; {parent} has: {known}"
        case "missing" | "missing_argument":
            return f"{place}: missing key"
        case "value_error":
            return f"{place}: {found['ctx']['error']}" if path else str(found["ctx"]["error"])
        case "dataclass_type":
            return f"{place}: must be a section with keys, got {found['input']!r}"
    message = found["msg"].removeprefix("Input should be ")
    for pydantics, ours in WORDS.items():
        message = message.replace(pydantics, ours)
    return f"{place}: must be {message}, got {found['input']!r}"


def _keys(cls: Any, path: Sequence[str | int]) -> list[str]:
    """The keys of the class that lies at `path` below `cls`."""
    for part in path:
        if dataclasses.is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(part), Any)
            if isinstance(cls, types.UnionType):
                cls = next(arg for arg in typing.get_args(cls) if arg is not type(None))
        else:  # the value of a dict, the entry of a tuple
            cls = (
                typing.get_args(cls)[-1]
                if typing.get_origin(cls) is dict
                else typing.get_args(cls)[0]
            )
    return (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    )
