"""Archives of small clips, the configuration that preprocesses them, and what became of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from dalle2_video.data.config import DataConfig
from tests.helpers.media import clip_id, grey_steps, write_video

SPLITS = {"train": 0.8, "val": 0.2}


def config(root: Path, **changes) -> DataConfig:
    """6 frames of 16 px at 5 fps, made in this process, beside the archives."""
    base = DataConfig(
        name="test",
        root=str(root),
        layout="celebvtext",
        out=None,
        fps=5.0,
        num_frames=6,
        size=16,
        span="first",
        windows="one",
        encoding="raw",
        split_seed=0,
        splits=SPLITS,
        workers=0,
        seconds_per_clip=None,
        overwrite=False,
    )
    return replace(base, **changes)


def video(person: int) -> bytes:
    """1.5 s at 10 fps of a grey scale whose step tells the person."""
    return write_video(grey_steps(15, step=2 + person % 8))


def clips(*people: int) -> dict[str, bytes]:
    """clip id -> `video`, for `write_zip`."""
    return {clip_id(person): video(person) for person in people}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text("utf-8"))


def skipped(out: Path) -> dict[str, str]:
    """file -> cause, as the manifest lists it."""
    return {item["file"]: item["cause"] for item in manifest(out)["skipped"]}


def tree(root: Path) -> dict[str, str]:
    """Every file below root with the hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
