"""Which pictures of a stream are shown at the wanted times; of any kind of picture.

A picture is shown from its own time stamp until the next one, so the picture "at t" is the last one
whose time stamp is not after t: right for a variable frame rate too. Time stamps are seconds since
the first picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dalle2_video.data.media.frame import ClipError, Square

MOST_WINDOWS = 256  # of one clip; 8.5 minutes in windows of 2 s
Picture = TypeVar("Picture")


@dataclass(frozen=True)
class DecodedClip:
    """frames uint8 RGB (F, H, W, 3); timestamps float64 (F,), seconds, of each frame shown.

    converted: what was changed in the pictures besides their shape, for people, such as
    "deinterlaced"; empty for a plain video.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    converted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """The times start + k step seconds, k = 0 .. num_frames - 1, and so on to the end where
    windows is "all".
    """

    num_frames: int
    start: float
    step: float
    windows: str

    @property
    def most(self) -> int:
        """The largest number of times."""
        return self.num_frames * (MOST_WINDOWS if self.windows == "all" else 1)

    def before(self, end: float) -> int:
        """How many of the times lie before `end`."""
        return min(self.most, max(0, math.ceil((end - self.start) / self.step)))


class ShownFrames(Generic[Picture]):
    """The squares shown at the wanted times.

    A picture is held until the next one, whose time stamp ends it; only one that is shown is made a
    square, by `to_square`. tolerance: seconds by which a time stamp may be off.
    """

    def __init__(
        self, wanted: Wanted, tolerance: float, to_square: Callable[[Picture], Square]
    ) -> None:
        self.wanted, self.tolerance, self.to_square = wanted, tolerance, to_square
        self.frames: list[np.ndarray] = []
        self.timestamps: list[float] = []
        self.converted: list[str] = []
        self.held: Picture | None = None
        self.held_timestamp = 0.0

    @property
    def is_full(self) -> bool:
        return len(self.frames) == self.wanted.most

    @property
    def lacks_end(self) -> bool:
        """Whether the clip depends on where the stream ends."""
        return self.wanted.windows == "all" or len(self.frames) < self.wanted.num_frames

    def is_needed(self, begin: float, end: float) -> bool:
        """Whether a wanted time lies in [begin, end), give or take the tolerance."""
        before = self.wanted.before(begin - 2 * self.tolerance)
        return self.wanted.before(end + self.tolerance) > before

    def add(self, picture: Picture, timestamp: float) -> None:
        """Takes the next picture in the order of display, which ends the one before it."""
        self._show_until(timestamp - self.tolerance)
        self.held, self.held_timestamp = picture, timestamp

    def add_end(self, end: float) -> None:
        """Ends the last picture; ClipError where the clip was full before, of windows "all"."""
        if self.is_full and self.wanted.windows == "all":
            raise ClipError(f"too long: makes more than {MOST_WINDOWS} windows")
        self._show_until(end + self.tolerance)

    def clip(self, end: float) -> DecodedClip:
        """The clip; ClipError where it is not all there. end: of the stream, seconds."""
        wanted = self.wanted
        if len(self.frames) < wanted.num_frames:
            needs = wanted.start + wanted.num_frames * wanted.step
            raise ClipError(f"too short: has {round(end, 2)} s, needs {round(needs, 2)} s")
        count = len(self.frames) // wanted.num_frames * wanted.num_frames
        frames, timestamps = np.stack(self.frames[:count]), np.array(self.timestamps[:count])
        return DecodedClip(frames, timestamps, tuple(self.converted))

    def _show_until(self, end: float) -> None:
        """Gives the held picture to all wanted times before `end` that have none yet."""
        missing = self.wanted.before(end) - len(self.frames)
        if self.held is not None and missing > 0:
            square = self.to_square(self.held)
            self.timestamps.extend([self.held_timestamp] * missing)
            self.frames.extend([square.image] * missing)
            self.converted += [note for note in square.converted if note not in self.converted]
