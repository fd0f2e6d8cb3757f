"""Video files to frames: those shown at wanted times, and all frames of a stored window.

Frames are uint8 RGB (F, H, W, 3), 0..255. Time stamps are seconds since the first frame of the
video stream, so a stream that starts at 1.4 s and one that starts at 0 give the same clip. A frame
is shown from its own time stamp until the next one, so the frame "at t" is the last one whose time
stamp is not after t: right for a variable frame rate too. Audio is ignored.

Letters: F frames, H W pixels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError

from dalle2_video.data.media.frame import ClipError, frame_to_rgb, square
from dalle2_video.data.media.stream import (
    check_end,
    decode_frames,
    mean_frame_duration,
    open_video,
    stream_length,
    video_stream,
)

MOST_WINDOWS = 256  # of one clip; 8.5 minutes in windows of 2 s


@dataclass(frozen=True)
class DecodedClip:
    """frames uint8 RGB (F, H, W, 3); timestamps float64 (F,), seconds, of each frame shown."""

    frames: np.ndarray
    timestamps: np.ndarray


def decode_clip(
    source: bytes | str | os.PathLike[str],
    fps: float,
    num_frames: int,
    size: int,
    start: float = 0.0,
    span: str = "first",
    windows: str = "one",
) -> DecodedClip:
    """The frames at start + k / fps seconds, k = 0 .. num_frames - 1, as size x size squares.

    span: "first" as above; "full" spreads the frames over the whole stream, at k / num_frames of
    its length. windows: "one", or "all": as many times num_frames frames as the stream is long
    (F = windows x num_frames; what is left over at the end is not used).

    `source` is a path or the bytes of a video file. Decoding stops at the last frame needed, and
    in H.264 leaves out frames that neither are needed nor have others built upon them. The last
    frame of a stream lasts for its own duration, or else for that of a frame on average. Raises
    ClipError, naming the cause, for what is no video, is damaged or truncated where it is needed,
    or is too short.
    """
    most = num_frames * (MOST_WINDOWS if windows == "all" else 1)
    shown: _ShownFrames | None = None
    try:
        step = stream_length(source) / num_frames if span == "full" else 1 / fps
        with open_video(source) as container:
            stream = video_stream(container)
            shown = _ShownFrames(stream, start, step, most, size)
            for frame in decode_frames(container, stream, shown.is_needed):
                shown.add(frame)
                if shown.is_full:
                    break
            _finish(shown, stream, num_frames, windows)
    except FFmpegError as error:
        begun = shown is not None and shown.held is not None
        cause = "damaged or truncated" if begun else "no video, or truncated"
        raise ClipError(f"{cause}: {error.strerror or error}") from error
    count = len(shown.frames) // num_frames * num_frames
    return DecodedClip(np.stack(shown.frames[:count]), np.array(shown.timestamps[:count]))


class _ShownFrames:
    """The squares shown at the wanted times start + k step seconds, k = 0 .. most - 1.

    A decoded frame is held until the next one, whose time stamp ends it.
    """

    def __init__(
        self, stream: av.VideoStream, start: float, step: float, most: int, size: int
    ) -> None:
        self.start, self.step, self.most, self.size = start, step, most, size
        self.aspect = float(stream.sample_aspect_ratio or 1)
        self.tick = float(stream.time_base or Fraction(1, 1000))
        # Containers round time stamps to their tick: Matroska writes 1/15 s as 67 ms.
        self.tolerance = min(self.tick / 2, 1e-3) + 1e-6
        self.frames: list[np.ndarray] = []
        self.timestamps: list[float] = []
        self.held: av.VideoFrame | None = None
        self.held_timestamp = 0.0
        self.first: float | None = None  # the first frame's time stamp on the stream's own clock
        self.interlaced = False  # whether any frame so far was

    @property
    def is_full(self) -> bool:
        return len(self.frames) == self.most

    def is_needed(self, begin: float, end: float) -> bool:
        """Whether a wanted time lies in [begin, end), seconds of the stream's own clock."""
        if self.first is None or self.interlaced:
            return True  # a field may have a packet of its own, which must not be left out
        begin = begin - self.first - 2 * self.tolerance
        end = end - self.first + self.tolerance
        return self._wanted_before(end) > self._wanted_before(begin)

    def add(self, frame: av.VideoFrame) -> None:
        """Takes the next frame in display order, which ends the one before it."""
        if frame.pts is None:
            raise ClipError("has frames without time stamps")
        timestamp = float(frame.pts * (frame.time_base or Fraction(1, 1000)))
        self.first = timestamp if self.first is None else self.first
        self.interlaced = self.interlaced or bool(frame.interlaced_frame)
        timestamp -= self.first
        self._show_until(timestamp - self.tolerance)
        self.held, self.held_timestamp = frame, timestamp

    def add_end(self, duration: float) -> tuple[float, float]:
        """Ends the last frame; returns the end of the stream and how long that frame lasts,
        seconds. duration: for a frame that has none of its own.
        """
        assert self.held is not None
        if self.held.duration:
            duration = float(self.held.duration * (self.held.time_base or self.tick))
        end = self.held_timestamp + duration
        self._show_until(end + self.tolerance)
        return end, duration

    def _wanted_before(self, end: float) -> int:
        """How many of the wanted times lie before `end`."""
        return min(self.most, max(0, math.ceil((end - self.start) / self.step)))

    def _show_until(self, end: float) -> None:
        """Gives the held frame to all wanted times before `end` that have none yet."""
        missing = self._wanted_before(end) - len(self.frames)
        if self.held is not None and missing > 0:
            image = square(self.held, self.size, self.aspect)
            self.timestamps.extend([self.held_timestamp] * missing)
            self.frames.extend([image] * missing)


def _finish(shown: _ShownFrames, stream: av.VideoStream, num_frames: int, windows: str) -> None:
    """Ends the last frame of the stream; ClipError where the clip is not all there."""
    if shown.held is None:
        raise ClipError("damaged or truncated: has no frame")
    if shown.is_full and windows == "all":
        raise ClipError(f"too long: makes more than {MOST_WINDOWS} windows")
    if shown.is_full:
        return
    end, duration = shown.add_end(mean_frame_duration(stream))
    if windows == "all" or len(shown.frames) < num_frames:
        check_end(stream, end, duration)
    if len(shown.frames) < num_frames:
        needs = shown.start + num_frames * shown.step
        raise ClipError(f"too short: has {round(end, 2)} s, needs {round(needs, 2)} s")


def decode_window(data: np.ndarray, out: np.ndarray) -> None:
    """Fills uint8 RGB `out` (F, H, W, 3) with the frames of `encode_window`.

    data: uint8 (bytes,). ClipError where it is damaged, or holds another number or size of frames.
    """
    number = 0
    try:
        with open_video(data.tobytes()) as container:
            for frame in decode_frames(container, video_stream(container)):
                if number == len(out) or (frame.height, frame.width) != out.shape[1:3]:
                    raise ClipError(f"a stored video holds other frames than {out.shape}")
                out[number] = frame_to_rgb(frame)
                number += 1
    except FFmpegError as error:
        raise ClipError(f"a stored video is damaged: {error.strerror or error}") from error
    if number < len(out):
        raise ClipError(f"a stored video is damaged: it ends after {number} of {len(out)} frames")
