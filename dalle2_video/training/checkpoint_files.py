"""The files of a checkpoint: names, formats, and which folders are whole, superseded or damaged.

<run>/checkpoints/<clips seen, 12 digits>/ holds what `Accelerator.save_state` writes (model,
optimizer, gradient scaler, random state of each rank), the weights and the EMA as full float32
tensors for any number of ranks (model.safetensors of one process or DDP, else weights.safetensors;
ema.safetensors), stage.json (whose weights these are, under which strategy), progress.json (how
far) and checksums.json. It is written as a hidden folder, flushed and renamed, so a folder under
its own name is whole.

stage.json and progress.json hold `format`, an integer; without it they are of format 1, which
called progress.json's `optimizer_steps` `steps`. docs/formats.md lists all formats.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle2_video.model_file import check_format, sync_path, translated
from dalle2_video.training.config import TrainConfig
from dalle2_video.training.progress import Progress

FORMAT = 2
WEIGHTS = "model.safetensors"  # the name that Accelerate gives to the weights of the first model
FULL_WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"
STAGE = "stage.json"
PROGRESS = "progress.json"
CHECKSUMS = "checksums.json"


def folder_name(clips: int) -> str:
    """The name of a checkpoint after `clips` clips."""
    return f"{clips:012d}"


def whole_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    if not root.exists():
        return []
    folders = [p for p in root.iterdir() if re.fullmatch(r"\d{12,}", p.name)]
    return sorted((p for p in folders if (p / PROGRESS).exists()), key=lambda p: int(p.name))


def superseded(checkpoints: list[Path], cfg: TrainConfig) -> list[Path]:
    """Those to remove: all but the newest `keep_checkpoints`, and the first at or after each
    multiple of `keep_every_clips`.
    """
    every, reached, old = cfg.keep_every_clips, 0, []
    for path in checkpoints:
        multiple = int(path.name) // every if every else 0
        if multiple <= reached:
            old.append(path)
        reached = max(reached, multiple)
    newest = checkpoints[-cfg.keep_checkpoints :]
    return [path for path in old if path not in newest]


def remove_checkpoint(checkpoint: Path) -> None:
    """Under a hidden name first, so that none is seen half removed."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(run_folder: Path) -> None:
    """What a killed run left: half-written checkpoints and model files."""
    for checkpoint in (run_folder / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(checkpoint)
    for file in run_folder.glob(f".{WEIGHTS}.*.tmp"):
        file.unlink()


# ---- stage.json and progress.json


def write_stage(checkpoint: Path, identity: Mapping[str, Any], layout: Mapping[str, Any]) -> None:
    """identity: which stage, configuration and seed (JSON values). layout: strategy and ranks."""
    _write_json(checkpoint / STAGE, {**identity, "layout": layout, "format": FORMAT})


def read_stage(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(identity, layout), in today's names; no layout where the checkpoint is older than layouts.

    Raises CheckpointError where the format is newer than this code.
    """
    identity = _read_json(checkpoint / STAGE)
    layout = identity.pop("layout", None)
    return translated(identity), layout


def write_progress(checkpoint: Path, progress: Progress) -> None:
    """A folder without this file is no checkpoint."""
    _write_json(checkpoint / PROGRESS, {**asdict(progress), "format": FORMAT})


def read_progress(checkpoint: Path) -> Progress:
    """Raises CheckpointError where the format is newer than this code."""
    values = _read_json(checkpoint / PROGRESS)
    if "steps" in values:  # of format 1
        values["optimizer_steps"] = values.pop("steps")
    return Progress(**values)


def saved_progress(run_folder: Path) -> Progress:
    """How far the newest checkpoint of a stage's folder is, without loading it."""
    found = whole_checkpoints(run_folder / "checkpoints")
    try:
        return read_progress(found[-1]) if found else Progress()
    except (ValueError, TypeError):  # damaged, which restoring reports
        return Progress()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """A file's values without their format, which is checked."""
    values = json.loads(path.read_text(encoding="utf-8"))
    check_format(path, values.pop("format", 1), FORMAT)
    return values


# ---- checksums


def checksum(path: Path) -> str:
    """The CRC-32 of a file's bytes, 8 hexadecimal digits: it detects damage, not tampering."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def checksums(checkpoint: Path, rank: int, ranks: int, flush: bool) -> list[tuple[str, str]]:
    """(relative path, checksum) of a rank's share of the files, flushed to the disk if wanted,
    some files at a time.
    """
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != CHECKSUMS)

    def read(path: Path) -> tuple[str, str]:
        if flush:
            sync_path(path)
        return str(path.relative_to(checkpoint)), checksum(path)

    with ThreadPoolExecutor(4) as pool:  # neither holds the interpreter's lock
        return list(pool.map(read, paths[rank::ranks]))


def write_checksums(checkpoint: Path, sums: Mapping[str, str]) -> None:
    """Write checksums.json and flush it, and the entries of all folders, to the disk."""
    _write_json(checkpoint / CHECKSUMS, sums)
    sync_path(checkpoint / CHECKSUMS)
    for folder in [*checkpoint.rglob("*/"), checkpoint]:
        sync_path(folder)


def damaged_files(checkpoint: Path, found: Iterable[tuple[str, str]]) -> list[str]:
    """The files that are missing, unreadable or not as written, by the `found` checksums of all
    ranks, where an unreadable file has the checksum "unreadable".
    """
    now = dict(found)
    try:
        written = json.loads((checkpoint / CHECKSUMS).read_text())
    except ValueError:
        return [CHECKSUMS]
    unreadable = [name for name, value in now.items() if value == "unreadable"]
    return sorted([n for n, value in written.items() if now.get(n) != value] + unreadable)
