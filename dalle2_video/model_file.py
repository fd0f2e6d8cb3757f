"""Consolidated model files: configuration and weights of one network in one .safetensors file.

Header (one JSON text): `format`, `kind` (which network), `config` (what rebuilds it), `meta` (free
strings, such as `clip_hash`). A file is written under a temporary name, flushed to the disk and
renamed, so a reader sees the old file or the new one, never half of one. No pickle anywhere.

Format 1 had its number in the header's key, and other names in `config` (RENAMED), which are
translated on load. docs/formats.md lists all formats.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle2_video.errors import UserError

FORMAT = 2
KEY = "dalle2-video"  # the one key of the header: several would come in a random order
KEY_OF_FORMAT_1 = "dalle2-video/1"
RENAMED = {  # keys of a `config` of format 1, at any depth, and their names of today
    "low_frames": "num_lowres_frames",
    "low_size": "lowres_size",
}
# Kind of a model -> the script that trains it; the U-Nets have one for all.
SCRIPTS = {"clip": "train_clip.py", "prior": "train_prior.py"}


class CheckpointError(UserError, RuntimeError):
    """A model file or a checkpoint that is missing, damaged, of another kind or of a newer format,
    or does not fit the model.
    """


@dataclass(frozen=True)
class LoadedModel:
    """What a model file holds: config, state (name -> CPU tensor), meta, and the file's hash."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    meta: dict[str, str]
    hash: str
    path: Path


@dataclass(frozen=True)
class Header:
    """The header alone: which network, its configuration and its meta strings."""

    kind: str
    config: dict[str, Any]
    meta: dict[str, str]


def check_format(path: Path, found: int, newest: int) -> None:
    """CheckpointError where a file's format is newer than the `newest` that this code knows."""
    if found > newest:
        raise CheckpointError(
            f"{path}: has format {found}, and this code knows formats up to {newest}: "
            "update the code"
        )


def translated(config: Any) -> Any:
    """A copy of a configuration (JSON values) with the keys of format 1 in their names of today."""
    if isinstance(config, Mapping):
        return {RENAMED.get(key, key): translated(value) for key, value in config.items()}
    if isinstance(config, list):
        return [translated(value) for value in config]
    return config


def file_hash(path: str | os.PathLike[str]) -> str:
    """First 16 characters of the SHA-256 (hex) of the file's bytes."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a new one; safetensors makes its files for the owner alone."""
    new = path.with_name(f"{path.name}.mode.tmp")
    try:
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def save_model(
    path: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    meta: Mapping[str, str] | None = None,
) -> None:
    """Write one model file atomically.

    The bytes depend on the arguments alone, so equal weights give equal hashes (`file_hash`).
    """
    meta = dict(meta or {})
    for key, value in meta.items():
        if not isinstance(value, str):
            raise TypeError(f"{path}: meta[{key!r}] must be a string, got {type(value).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "kind": kind, "config": dict(config), "meta": meta}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        # tied parameters share memory, which the format refuses
        tensors[name] = tensor.clone() if place in memory else tensor
        memory.add(place)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={KEY: text})
        follow_umask(temporary)
        sync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def read_header(path: str | os.PathLike[str], kind: str | None = None) -> Header:
    """The header of a model file, without its weights; `kind` None accepts every network.

    Raises CheckpointError as `load_model` does.
    """
    return _open(Path(path), kind, weights=False)[0]


def load_model(path: str | os.PathLike[str], kind: str) -> LoadedModel:
    """Read a model file of the given kind onto the CPU.

    Raises CheckpointError with the file's name and the cause when it is missing, truncated, no
    model file of this project, of a newer format, or holds a network of another kind.
    """
    path = Path(path)
    header, state = _open(path, kind, weights=True)
    return LoadedModel(header.config, state, header.meta, file_hash(path), path)


def _open(path: Path, kind: str | None, weights: bool) -> tuple[Header, dict[str, Tensor]]:
    if not path.is_file():
        wanted = f"the {kind} model" if kind else "a model"
        script = SCRIPTS.get(kind or "", f"train_decoder.py unet={kind}" if kind else "")
        raise CheckpointError(
            f"{path}: no such file; {wanted} is needed here, train it first"
            + (f": {script}" if script else "")
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            raw = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()} if weights else {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    header = _header(path, raw)
    if kind is not None and header.kind != kind:
        raise CheckpointError(f"{path}: holds a {header.kind!r} model where {kind!r} is needed")
    return header, state


def _header(path: Path, raw: Mapping[str, str]) -> Header:
    """From the metadata of a safetensors file, in today's names."""
    if KEY in raw:
        values = json.loads(raw[KEY])
        check_format(path, values.pop("format"), FORMAT)
        return Header(**values)
    if KEY_OF_FORMAT_1 in raw:
        values = json.loads(raw[KEY_OF_FORMAT_1])
        return Header(**{**values, "config": translated(values["config"])})
    raise CheckpointError(f"{path}: a safetensors file, but none of this project ({KEY})")


def load_weights(
    model: nn.Module, loaded: LoadedModel, optional: Callable[[str], bool] | None = None
) -> None:
    """Copy the weights into `model`; names and shapes must match exactly.

    optional: whether the file may lack a name of the model (of a frozen pretrained tower).
    Raises CheckpointError that names the file and the first differing names.
    """
    own = model.state_dict()
    may_lack = optional or (lambda name: False)
    missing = [n for n in own if n not in loaded.state and not may_lack(n)]
    extra = [n for n in loaded.state if n not in own]
    shapes = [
        f"{n} {tuple(t.shape)} against {tuple(own[n].shape)}"
        for n, t in loaded.state.items()
        if n in own and t.shape != own[n].shape
    ]
    found = [("missing", missing), ("not in the model", extra), ("of another shape", shapes)]
    problems = [f"{what}: {_some(names)}" for what, names in found if names]
    if problems:
        raise CheckpointError(f"{loaded.path}: does not fit the model ({'; '.join(problems)})")
    model.load_state_dict(loaded.state, strict=False)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
