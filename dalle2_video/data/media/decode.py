"""Video files to frames: those shown at wanted times, and all frames of a stored window.

Frames are uint8 RGB (F, H, W, 3), 0..255, BT.709 SDR, whole and opaque: `DecodedClip.converted`
tells where a video was none of that. Time stamps are seconds since the first frame of the video
stream, so a stream that starts at 1.4 s and one that starts at 0 give the same clip. Audio is
ignored.

Letters: F frames, H W pixels.
"""

from __future__ import annotations

import os
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError

from dalle2_video.data.media.animation import decode_animation, is_picture
from dalle2_video.data.media.deinterlace import Deinterlacer
from dalle2_video.data.media.frame import ClipError, frame_to_rgb, square
from dalle2_video.data.media.shown import DecodedClip, ShownFrames, Wanted
from dalle2_video.data.media.stream import (
    check_end,
    decode_frames,
    mean_frame_duration,
    open_video,
    stream_length,
    video_stream,
)


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

    `source` is a path or the bytes of a video file, or of an animated PNG or WebP. Decoding stops
    at the last frame needed, and in H.264 leaves out frames that neither are needed nor have others
    built upon them. The last frame of a stream lasts for its own duration, or else for that of a
    frame on average. Raises ClipError, naming the cause, for what is no video, is damaged or
    truncated where it is needed, or is too short.
    """
    if is_picture(source):
        return decode_animation(source, size, num_frames, fps, start, span, windows)
    shown: _ShownStream | None = None
    try:
        step = stream_length(source) / num_frames if span == "full" else 1 / fps
        with open_video(source) as container:
            stream = video_stream(container)
            shown = _ShownStream(stream, Wanted(num_frames, start, step, windows), size)
            for frame in shown.interlaced.frames(
                decode_frames(container, stream, shown.is_needed_by_clock)
            ):
                shown.add_frame(frame)
                if shown.is_full:
                    break
            return shown.finished(stream)
    except FFmpegError as error:
        begun = shown is not None and shown.held is not None
        cause = "damaged or truncated" if begun else "no video, or truncated"
        raise ClipError(f"{cause}: {error.strerror or error}") from error


class _ShownStream(ShownFrames[av.VideoFrame]):
    """`ShownFrames` of a video stream, whose own clock need not begin at 0."""

    def __init__(self, stream: av.VideoStream, wanted: Wanted, size: int) -> None:
        aspect = float(stream.sample_aspect_ratio or 1)
        self.tick = float(stream.time_base or Fraction(1, 1000))
        # Containers round time stamps to their tick: Matroska writes 1/15 s as 67 ms.
        tolerance = min(self.tick / 2, 1e-3) + 1e-6
        super().__init__(wanted, tolerance, lambda frame: square(frame, size, aspect))
        self.first: float | None = None  # the first frame's time stamp on the stream's own clock
        self.interlaced = Deinterlacer()

    def is_needed_by_clock(self, begin: float, end: float) -> bool:
        """Whether a wanted time lies in [begin, end), seconds of the stream's own clock."""
        if self.first is None or self.interlaced.begun:
            return True  # a field may have a packet of its own, which must not be left out
        return self.is_needed(begin - self.first, end - self.first)

    def add_frame(self, frame: av.VideoFrame) -> None:
        """Takes the next frame in display order, which ends the one before it."""
        if frame.pts is None:
            raise ClipError("has frames without time stamps")
        timestamp = float(frame.pts * (frame.time_base or Fraction(1, 1000)))
        self.first = timestamp if self.first is None else self.first
        self.add(frame, timestamp - self.first)

    def finished(self, stream: av.VideoStream) -> DecodedClip:
        """The clip, once there are no frames left or it is full; ClipError where it lacks some."""
        if self.held is None:
            raise ClipError("damaged or truncated: has no frame")
        duration = mean_frame_duration(stream)
        if self.held.duration:
            duration = float(self.held.duration * (self.held.time_base or self.tick))
        end = self.held_timestamp + duration
        if self.interlaced.begun:
            self.converted.insert(0, "deinterlaced")
        self.add_end(end)
        if self.lacks_end:
            check_end(stream, end, duration)
        return self.clip(end)


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
