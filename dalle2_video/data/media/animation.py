"""Animated PNG and WebP, which ffmpeg does not read, to the same clips as videos."""

from __future__ import annotations

import os
from collections.abc import Iterator

from PIL import Image

from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.image import is_animation, open_picture, picture_square
from dalle2_video.data.media.shown import DecodedClip, ShownFrames, Wanted

_TICK = 1e-3  # seconds; durations are in ms
_SHORTEST, _USUAL = 0.010, 0.100  # browsers show a frame of 10 ms or less for 100 ms


def is_picture(source: bytes | str | os.PathLike[str]) -> bool:
    """Whether it begins as a PNG or a WebP does."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with open(source, "rb") as file:
            head = file.read(12)
    return head.startswith(b"\x89PNG\r\n\x1a\n") or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def decode_animation(
    source: bytes | str | os.PathLike[str],
    size: int,
    num_frames: int,
    fps: float,
    start: float,
    span: str,
    windows: str,
) -> DecodedClip:
    """`decode_clip` of an animated PNG or WebP, played once; ClipError for a still picture."""
    step = _length(source) / num_frames if span == "full" else 1 / fps
    wanted = Wanted(num_frames, start, step, windows)
    with open_picture(source) as picture:
        shown = ShownFrames[Image.Image](
            wanted, _TICK / 2 + 1e-6, lambda frame: picture_square(frame, size)
        )
        end = 0.0
        for begin, next_begin in _times(picture):
            shown.add(picture.copy(), begin)
            end = next_begin
            if shown.is_full:
                break
        shown.add_end(end)
        return shown.clip(end)


def _length(source: bytes | str | os.PathLike[str]) -> float:
    """Seconds of all frames; each is decoded, since only that tells how long it lasts."""
    with open_picture(source) as picture:
        return max(end for _, end in _times(picture))


def _times(picture: Image.Image) -> Iterator[tuple[float, float]]:
    """Seconds [begin, end) of each frame, with the picture at that frame, decoded."""
    if not is_animation(picture):
        raise ClipError("no video: a still picture")
    first = 1 if getattr(picture, "default_image", False) else 0  # a PNG's is for other viewers
    begin = 0.0
    for number in range(first, getattr(picture, "n_frames", 1)):
        picture.seek(number)
        picture.load()
        duration = float(picture.info.get("duration", 0)) / 1000
        end = begin + (duration if duration > _SHORTEST else _USUAL)
        yield begin, end
        begin = end
