"""Every key of the configuration with its default and meaning: for `--help`, and as a page.

`python -m dalle2_video.reference` prints docs/configuration.md. All of it is read from the
configuration classes: defaults and ranges from the fields, meanings from the text below each field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf

from dalle2_video.stages.config_tree import CONFIGS, Settings

WIDTH = 100
KEY_WIDTH = 46  # of `key=value` in --help; longer ones have a line of their own
NO_GROUPS = ("accelerate", "hydra")  # folders of configs/ for other programs


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration. name: dotted, `<name>` where a user names entries. values: what
    it takes, in words.
    """

    name: str
    default: Any
    meaning: str
    values: str


def keys_of(cls: type, prefix: str = "", default: Any = None) -> Iterator[Key]:
    """The keys below a configuration class, sections opened. default: its object, None = cls()."""
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, value = f"{prefix}{field.name}", getattr(default, field.name)
        if (inner := _section(hints[field.name])) is None:
            meaning = meanings(cls).get(field.name, "")
            yield Key(name, _plain(value), meaning, _values(hints[field.name]))
        elif typing.get_origin(hints[field.name]) is dict:
            yield from keys_of(inner, f"{name}.<name>.")
        else:
            yield from keys_of(inner, f"{name}.", value)


@cache
def meanings(cls: type) -> dict[str, str]:
    """Field -> the text below it, of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(str(s))):
                    found[name] = " ".join(s.split())
    return found


def _section(hint: Any) -> type | None:
    """The configuration class that a field holds, by itself, or as the values of a dict."""
    for inner in (hint, *typing.get_args(hint)):
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            return inner
    return None


def _plain(value: Any) -> str:
    """A default as a user types it."""
    if isinstance(value, str):
        return value
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(typing.cast(Any, value))
    return json.dumps(value, separators=(",", ":")).replace('"', "")


def _values(hint: Any) -> str:
    """What a field takes, in words."""
    schema = pydantic.TypeAdapter(hint).json_schema()
    return " or ".join(dict.fromkeys(_words(one) for one in schema.get("anyOf", [schema])))


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema["type"] == "object":
        return f"name: {_words(schema['additionalProperties'])}"
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_words(item) for item in schema["prefixItems"]) + "]"
        return f"list of {_words(schema['items'])}"
    kind: str = schema["type"]
    text = {"boolean": "true, false", "string": "text"}.get(kind, kind)
    limits = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "to",
        "multipleOf": "multiple of",
    }
    return " ".join([text, *(f"{w} {schema[k]:,}" for k, w in limits.items() if k in schema)])


def known_keys() -> list[str]:
    """Every key that a command line can set, named entries by the names of the experiments."""
    names = {"unets": ("base", "tsr", "ssr"), "sample": ("tsr", "ssr")}
    keys = [key.name for key in keys_of(Settings)]
    return [
        key.replace("<name>", name)
        for key in keys
        for name in (names[key.split(".")[0]] if "<name>" in key else ("",))
    ]


# ---------------------------------------------------------------- --help of a script


def help_text(about: str, reads: Sequence[str], cfg: DictConfig) -> str:
    """What a script prints for --help: what it does, the groups, and the keys that it reads with
    their values in `cfg`.

    reads: keys and sections at the top of the configuration.
    """
    lines = [about.strip(), "", "Groups (see configs/):"]
    for name, options in groups().items():
        if name.split("/")[0] in ("experiment", *reads):
            lines.append(f"  {name}={'|'.join(options)}")
    lines += ["", "Keys, with their values for this command line:"]
    for key in keys_of(Settings):
        if key.name.split(".")[0] not in reads:
            continue
        if "<name>" not in key.name:
            lines += _entry(key.name, OmegaConf.select(cfg, key.name), key)
            continue
        section, rest = key.name.split(".<name>.")
        for name in _shown(section, cfg):
            full = f"{section}.{name}.{rest}"
            lines += _entry(full, OmegaConf.select(cfg, full), key)
    if "unets" in reads:
        lines += ["", f"unets.* lists that of unet={cfg.unet}; the others have the same keys."]
    return "\n".join(lines)


def _shown(section: str, cfg: DictConfig) -> list[str]:
    """The entries of a section of named ones that --help lists: one U-Net, all that are sampled."""
    return [cfg.unet] if section == "unets" else list(OmegaConf.select(cfg, section) or ())


def _entry(name: str, value: Any, key: Key) -> list[str]:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    head = f"  {name}={_plain(plain)}"
    text = key.meaning
    if not key.values.startswith(("text", "true")):
        text += f" [{key.values}]"
    body = textwrap.wrap(text, WIDTH - KEY_WIDTH - 2) or [""]
    if len(head) > KEY_WIDTH:
        return [head, *(f"{'':{KEY_WIDTH}}  {line}" for line in body)]
    return [f"{head:{KEY_WIDTH}}  {body[0]}", *(f"{'':{KEY_WIDTH}}  {line}" for line in body[1:])]


def groups() -> dict[str, list[str]]:
    """Group of configs/ -> its options."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        group = path.parent.relative_to(CONFIGS).as_posix()
        if group != "." and group.split("/")[0] not in NO_GROUPS:
            found.setdefault(group, []).append(path.stem)
    return found


# ---------------------------------------------------------------- docs/configuration.md


def page() -> str:
    """docs/configuration.md."""
    sections: dict[str, list[Key]] = {}
    for key in keys_of(Settings):
        sections.setdefault(_heading(key.name), []).append(key)
    lines = [PREFACE]
    for heading, keys in sections.items():
        lines += [
            "",
            f"## {heading}",
            "",
            "| key | default | values | meaning |",
            "|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_cells(key))} |" for key in keys]
    return "\n".join(lines) + "\n"


def _heading(name: str) -> str:
    first, *rest = name.split(".")
    if not rest:
        return "Command"
    return f"{first}.<name>" if rest[0] == "<name>" else first


def _cells(key: Key) -> list[str]:
    cells = [f"`{key.name}`", f"`{key.default}`", key.values, key.meaning]
    return [cell.replace("|", "\\|") for cell in cells]


PREFACE = """# Configuration

Every key, as the command line takes it: `python train_decoder.py unets.base.train.lr=1e-4`. The
default is that of the classes; an experiment (`configs/experiment/`) sets others, and
`python <script>.py --help` shows the values that hold for a command line. `null` means none.
This page is printed by `python -m dalle2_video.reference`; edit the classes instead.
"""


if __name__ == "__main__":
    print(page(), end="")
