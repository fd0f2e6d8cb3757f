"""From a section of the configuration to a frozen dataclass, strictly.

Scripts do it at the edge, so a wrong key fails before any data is read.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration section with an unknown, missing or ill-typed key."""


def from_config(cls: type[T], section: DictConfig | Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from a configuration section, strictly.

    Nested dataclasses come from nested sections, lists become tuples where the field is one.
    Raises ConfigError that names the section `where` and the key: unknown, missing, ill-typed.
    """
    if isinstance(section, DictConfig):
        section = typing.cast(Mapping[str, Any], OmegaConf.to_container(section, resolve=True))
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: must be a section with keys, got {section!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in section:
        if key not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"{where}.{key}: unknown key; {where} has: {known}")
    values = {}
    for name, spec in fields.items():
        if name in section:
            values[name] = _convert(hints[name], section[name], f"{where}.{name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing key")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type of the field's annotation, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{where}: expected {_name(hint)}, got {value!r}")
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        errors: list[ConfigError] = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if len(errors) == 1 else wrong
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}: must be one of {', '.join(map(str, args))}, got {value!r}")
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(Any, hint)
        return value if isinstance(value, kind) else from_config(kind, value, where)
    if origin in (tuple, list):
        return _sequence(origin, args, value, where, wrong)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        inner = args[1] if args else Any
        return {k: _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e6 in YAML is a float
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint):
        if isinstance(value, bool) and hint is not bool:
            raise wrong
        return value
    raise wrong


def _sequence(origin: Any, args: tuple, value: Any, where: str, wrong: ConfigError) -> Any:
    if not isinstance(value, list | tuple):
        raise wrong
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if args and len(args) != len(value):
            raise wrong
        kinds = args or (Any,) * len(value)
    else:
        kinds = (args[0] if args else Any,) * len(value)
    items = [
        _convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
