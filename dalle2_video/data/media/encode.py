"""Frames to H.264: files for people, and the small videos of a store."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from dalle2_video.data.atomic import whole
from dalle2_video.data.media.frame import EXACT_BILINEAR

STORED = {"crf": 10, "preset": "veryfast", "pix_fmt": "yuv444p"}  # docs/data.md: PSNR, size, time


def encode_mp4(
    target: str | os.PathLike[str] | BinaryIO,
    frames: np.ndarray | Tensor,
    fps: float,
    crf: int = 18,
    preset: str = "veryfast",
    pix_fmt: str = "yuv420p",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes uint8 RGB (F, H, W, 3) as H.264, tagged BT.709 and limited range; the same bytes for
    the same frames.

    H and W must be even with 4:2:0 chroma (yuv420p), or ValueError. A path is written under a
    temporary name in its folder and renamed when whole; a binary file object is written in place.
    metadata: keys that mp4 knows, such as title and comment.
    """
    frames = np.ascontiguousarray(frames.cpu().numpy() if isinstance(frames, Tensor) else frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (F, H, W, 3), not {frames.dtype} {frames.shape}")
    if pix_fmt == "yuv420p" and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ValueError(f"H.264 with 4:2:0 chroma needs even sides, not {frames.shape[1:3]}")
    if not isinstance(target, str | os.PathLike):
        _encode(target, frames, fps, crf, preset, pix_fmt, metadata)
        return
    with whole(Path(target)) as partial:
        _encode(str(partial), frames, fps, crf, preset, pix_fmt, metadata)


def _encode(
    file: str | BinaryIO,
    frames: np.ndarray,
    fps: float,
    crf: int,
    preset: str,
    pix_fmt: str,
    metadata: Mapping[str, str] | None,
) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    # The index goes to the front, for players in a page; that re-reads the file: a path is needed.
    options = {"movflags": "faststart"} if isinstance(file, str) else {}
    with av.open(file, "w", format="mp4", options=options) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        # x264's macroblock tree reads memory that it has not written, in frames of few pixels:
        # without it, the same frames always make the same bytes.
        stream.options = {"crf": str(crf), "preset": preset, "mbtree": "0"}
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = ColorRange.MPEG
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT_BILINEAR,
                threads=1,
            )
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def encode_window(frames: np.ndarray, fps: float) -> np.ndarray:
    """uint8 RGB (F, H, W, 3) as a visually lossless video, its bytes uint8 (N,)."""
    file = io.BytesIO()
    encode_mp4(file, frames, fps, **STORED)
    return np.frombuffer(file.getbuffer(), np.uint8)
