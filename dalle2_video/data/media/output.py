"""Sampled clips as mp4 or PNG files with title and facts in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle2_video.data.atomic import whole
from dalle2_video.data.media.encode import encode_mp4

Format = Literal["mp4", "frames"]
FORMATS: tuple[Format, ...] = ("mp4", "frames")


def check_format(form: str) -> Format:
    """ValueError for one that is none of FORMATS."""
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {form!r}")
    return form


def write_clip(
    folder: Path,
    name: str,
    frames: np.ndarray,
    fps: float,
    title: str,
    facts: Mapping[str, Any],
    form: Format = "mp4",
) -> Path:
    """folder/name.mp4, or folder/name/0000.png and so on, of uint8 RGB (F, H, W, 3).

    title and facts (JSON values) become `title` and `comment` in the metadata of the mp4 or of each
    PNG. Returns the path of the file or of the folder. ValueError as `encode_mp4`.
    """
    comment = json.dumps(facts)
    if form == "mp4":
        path = folder / f"{name}.mp4"
        encode_mp4(path, frames, fps, metadata={"title": title, "comment": comment})
        return path
    info = PngInfo()
    info.add_itxt("title", title)
    info.add_itxt("comment", comment)
    for old in (folder / name).glob("*.png"):  # of a longer clip, perhaps
        old.unlink()
    for number, frame in enumerate(frames):
        with whole(folder / name / f"{number:04d}.png") as partial:
            Image.fromarray(frame).save(partial, format="PNG", pnginfo=info)
    return folder / name
