"""The embedded data set's settings: the section `faces` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt

from dalle2_video.config import FilePath, config_class


@config_class
class FacesConfig:
    """The embedded data set: rendered talking heads, in their own folder alone."""

    root: FilePath = "data/faces"
    """Where its archives lie or go; rendered where `data.root` is the same folder."""
    clips: PositiveInt = 4000
    """Number of clips."""
    size: Annotated[int, Field(ge=16, le=512, multiple_of=2)] = 64
    """Side in pixels, even."""
    fps: Annotated[float, Field(gt=0, le=240)] = 8.0
    """Frames per second."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Length of each clip."""
    seed: int = 0
    """Of the faces and what they do."""

    def __post_init__(self) -> None:
        if self.format.num_frames < 1:
            raise ValueError("at least 1 frame (seconds times fps) is needed")

    @property
    def format(self) -> FaceFormat:
        """Size and length of a clip."""
        return FaceFormat(self.size, self.fps, self.seconds)


@dataclass(frozen=True)
class FaceFormat:
    """Side in pixels (even), frames per second and length of every clip."""

    size: int = 64
    fps: float = 8.0
    seconds: float = 2.0

    @property
    def num_frames(self) -> int:
        return round(self.fps * self.seconds)
