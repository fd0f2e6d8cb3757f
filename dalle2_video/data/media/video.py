"""Video in and out: decode by time stamp, encode; the one change of axes and range.

Frames on disk and in this file are uint8 RGB (F, H, W, 3), 0..255. Networks see float
(B, C, F, H, W) in [-1, 1]; `to_float` and `to_uint8` are the only way between the two.

Times are seconds since the first frame of the video stream, so a stream that starts at 1.4 s and
one that starts at 0 give the same clip. A frame is shown from its own time stamp until the next
one, so the frame "at t" is the last one whose time stamp is not after t: right for a variable
frame rate too. Audio is ignored.

Letters: B batch, C channels, F frames, H W pixels.
"""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from dalle2_video.data.atomic import whole
from dalle2_video.data.media.frame import EXACT_BILINEAR, ClipError, frame_to_rgb, square

MOST_PIXELS = 8192 * 4320  # of a frame; beyond it a header is damaged, or made to fill the memory
MOST_WINDOWS = 256  # of one clip; 8.5 minutes in windows of 2 s


@dataclass(frozen=True)
class DecodedClip:
    """frames uint8 RGB (F, H, W, 3); times float64 (F,), each frame's time stamp in seconds."""

    frames: np.ndarray
    times: np.ndarray


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
    frame of a stream lasts as long as it says, or else as a frame on average. Raises ClipError,
    naming the cause, for what is no video, is damaged or truncated where it is needed, or is too
    short.
    """
    most = num_frames * (MOST_WINDOWS if windows == "all" else 1)
    frames: list[np.ndarray] = []
    times: list[float] = []
    held: av.VideoFrame | None = None
    held_time = duration = 0.0
    aspect = 1.0
    first: float | None = None  # time stamp of the first frame
    interlaced = False  # whether any frame so far was

    def wanted_before(end: float) -> int:
        return min(most, max(0, math.ceil((end - start) / step)))

    def is_needed(begin: float, end: float) -> bool:
        """Whether a wanted time lies in [begin, end); these are the stream's own time stamps."""
        if first is None or interlaced:
            return True  # a field may have a packet of its own, which must not be left out
        begin, end = begin - first - 2 * tolerance, end - first + tolerance
        return wanted_before(end) > wanted_before(begin)

    def show_until(end: float) -> None:
        """Gives the held frame to all wanted times before `end` that have none yet."""
        wanted = wanted_before(end)
        if held is not None and wanted > len(frames):
            image = square(held, size, aspect)
            times.extend([held_time] * (wanted - len(frames)))
            frames.extend([image] * (wanted - len(frames)))

    try:
        step = _length(source) / num_frames if span == "full" else 1 / fps
        with _open(source) as container:
            stream = _video_stream(container)
            aspect = float(stream.sample_aspect_ratio or 1)
            tick = float(stream.time_base or Fraction(1, 1000))
            # Containers round time stamps to their tick: Matroska writes 1/15 s as 67 ms.
            tolerance = min(tick / 2, 1e-3) + 1e-6
            duration = float(1 / stream.average_rate) if stream.average_rate else 0.0
            for frame in _decode(container, stream, is_needed):
                if frame.pts is None:
                    raise ClipError("has frames without time stamps")
                time = float(frame.pts * (frame.time_base or Fraction(1, 1000)))
                first = time if first is None else first
                interlaced = interlaced or bool(frame.interlaced_frame)
                time -= first
                if held is not None:
                    show_until(time - tolerance)
                    if len(frames) == most:
                        break
                held, held_time = frame, time
            if held is None:
                raise ClipError("damaged or truncated: has no frame")
            if len(frames) == most and windows == "all":
                raise ClipError(f"too long: makes more than {MOST_WINDOWS} windows")
            if len(frames) < most:
                if held.duration:
                    duration = float(held.duration * (held.time_base or tick))
                end = held_time + duration
                show_until(end + tolerance)
                if windows == "all" or len(frames) < num_frames:
                    _check_end(stream, end, duration)
                if len(frames) < num_frames:
                    needs = start + num_frames * step
                    raise ClipError(f"too short: has {round(end, 2)} s, needs {round(needs, 2)} s")
    except FFmpegError as error:
        cause = "no video, or truncated" if held is None else "damaged or truncated"
        raise ClipError(f"{cause}: {error.strerror or error}") from error
    count = len(frames) // num_frames * num_frames
    return DecodedClip(np.stack(frames[:count]), np.array(times[:count]))


def _length(source: bytes | str | os.PathLike[str]) -> float:
    """Seconds from the first frame of the stream to the end of its last; nothing is decoded."""
    with _open(source) as container:
        stream = _video_stream(container)
        frame = float(1 / stream.average_rate) if stream.average_rate else 0.0
        tick = float(stream.time_base or Fraction(1, 1000))
        begins, ends = [], []
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                begins.append(packet.pts * tick)
                ends.append(begins[-1] + (packet.duration * tick if packet.duration else frame))
        if not ends or max(ends) <= min(begins):
            raise ClipError("has no length: span=full needs time stamps")
        length = max(ends) - min(begins)
        _check_end(stream, length, frame)
    return length


def _check_end(stream: av.VideoStream, end: float, duration: float) -> None:
    """ClipError where the stream ends, in seconds, long before its header says."""
    promised = float(stream.duration * (stream.time_base or 0)) if stream.duration else 0.0
    if promised > end + max(4 * duration, 0.1):
        raise ClipError(f"truncated: stops at {end:.2f} s of {promised:.2f} s")


def _video_stream(container: InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ClipError("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ClipError("no video, or damaged: its codec is unknown")
    if stream.width * stream.height > MOST_PIXELS:
        raise ClipError(f"its frames are too large: {stream.width} x {stream.height}")
    return stream


def _open(source: bytes | str | os.PathLike[str]) -> InputContainer:
    file = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    return av.open(file, "r", metadata_errors="replace")


def _decode(
    container: InputContainer,
    stream: av.VideoStream,
    is_needed: Callable[[float, float], bool] = lambda begin, end: True,
) -> Iterator[av.VideoFrame]:
    """Frames in display order; a damaged packet is an error, not a grey frame.

    is_needed: of the seconds [begin, end) in which a frame is shown; where not, an H.264 frame that
    no other refers to is left out.
    """
    codec = stream.codec_context
    codec.options = {"err_detect": "explode"}
    codec.thread_count = 1  # clips run in parallel, so each keeps to one core
    for packet, end in _with_end(container.demux(stream)):
        if packet.is_corrupt:
            raise ClipError("truncated: a packet is cut off")
        if codec.name == "h264":
            tick = float(packet.time_base or 0)
            used = packet.pts is None or end is None or is_needed(packet.pts * tick, end * tick)
            left_out = not used and _is_unreferenced(bytes(packet), codec.extradata)
            codec.skip_frame = "NONREF" if left_out else "DEFAULT"
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ClipError("damaged: a frame does not decode whole")
            yield frame


def _is_unreferenced(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet is whole slices of a frame that no other refers to (nal_ref_idc 0 and
    nal_unit_type 1, ITU-T H.264 section 7.4.1); damaged ones are not.
    """
    kinds = []
    if extradata and len(extradata) > 4 and extradata[0] == 1:  # lengths first (ISO/IEC 14496-15)
        size, place = (extradata[4] & 3) + 1, 0
        while place + size < len(packet):
            kinds.append(packet[place + size])
            place += size + int.from_bytes(packet[place : place + size], "big")
        if place != len(packet):
            return False
    else:  # start codes (annex B)
        kinds = [unit[0] for unit in packet.split(b"\0\0\1")[1:] if unit]
    slices = [kind for kind in kinds if 1 <= kind & 31 <= 5]
    return bool(slices) and all(kind & 127 == 1 for kind in slices) and 0 not in kinds


def _with_end(packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, int | None]]:
    """Each packet with the smallest later time stamp, at which its frame ends; None = unknown.

    No packet is shown before it is decoded (pts >= dts), so the packets up to the one whose dts
    reaches that time stamp are enough to know it.
    """
    waiting: deque[av.Packet] = deque()
    seen: list[int] = []  # time stamps, sorted
    for packet in packets:
        if packet.pts is None or packet.dts is None:  # the last one, or a container without them
            yield from ((held, _after(seen, held.pts)) for held in waiting)
            waiting.clear()
            yield packet, None
            continue
        if not packet.is_discard:  # of an edit list: it is decoded but never shown
            insort(seen, packet.pts)
            del seen[:-64]
        waiting.append(packet)
        while waiting:
            end = _after(seen, waiting[0].pts)
            if len(waiting) < 64 and (end is None or end > packet.dts):
                break
            yield waiting.popleft(), end
    yield from ((held, None) for held in waiting)


def _after(stamps: list[int], stamp: int | None) -> int | None:
    """The first of sorted `stamps` after `stamp`."""
    place = len(stamps) if stamp is None else bisect_right(stamps, stamp)
    return stamps[place] if place < len(stamps) else None


# ---------------------------------------------------------------- out


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


STORED = {"crf": 10, "preset": "veryfast", "pix_fmt": "yuv444p"}  # docs/data.md: PSNR, size, time


def encode_window(frames: np.ndarray, fps: float) -> np.ndarray:
    """uint8 RGB (F, H, W, 3) as a visually lossless video, its bytes uint8 (N,)."""
    file = io.BytesIO()
    encode_mp4(file, frames, fps, **STORED)
    return np.frombuffer(file.getbuffer(), np.uint8)


def decode_window(data: np.ndarray, out: np.ndarray) -> None:
    """Fills uint8 RGB `out` (F, H, W, 3) with the frames of `encode_window`; ClipError where the
    bytes are damaged or hold another number or size of frames.
    """
    number = 0
    try:
        with av.open(io.BytesIO(data.tobytes()), "r") as container:
            for frame in _decode(container, _video_stream(container)):
                if number == len(out) or (frame.height, frame.width) != out.shape[1:3]:
                    raise ClipError(f"a stored video holds other frames than {out.shape}")
                out[number] = frame_to_rgb(frame)
                number += 1
    except FFmpegError as error:
        raise ClipError(f"a stored video is damaged: {error.strerror or error}") from error
    if number < len(out):
        raise ClipError(f"a stored video is damaged: it ends after {number} of {len(out)} frames")


# ---------------------------------------------------------------- axes and range


def has_view(stored_frames: int, side: int, num_frames: int, size: int) -> bool:
    """Whether `to_float` can show a clip to a network of that many frames and pixels."""
    return stored_frames % num_frames == 0 and side % size == 0


def to_float(frames: Tensor, num_frames: int | None = None, size: int | None = None) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1], on the tensor's own device.

    num_frames, size: a view of the stored clip, for a network of fewer frames or pixels. It has
    every (F / num_frames)-th frame from the first on, and of each square of H / size pixels the
    mean, which is the area average that preprocess shrinks by. ValueError where they do not divide.
    """
    stored_frames, side = frames.shape[1:3]
    num_frames, size = num_frames or stored_frames, size or side
    if not has_view(stored_frames, side, num_frames, size):
        raise ValueError(
            f"{stored_frames} frames of {side} px have no view of {num_frames} frames of {size} px"
        )
    video = frames[:, :: stored_frames // num_frames].permute(0, 4, 1, 2, 3).float()
    if size != side:
        video = F.avg_pool2d(video.flatten(0, 2).unsqueeze(1), side // size)
        video = video.reshape(len(frames), 3, num_frames, size, size)
    return video.div(127.5).sub(1.0).contiguous()


def to_uint8(video: Tensor) -> Tensor:
    """float (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3): clamped, rounded to nearest."""
    pixels = video.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
