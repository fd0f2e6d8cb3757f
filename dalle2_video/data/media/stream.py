"""The video stream of a file: its length, and its decoded frames in display order.

Times are seconds of the stream's own clock, which need not begin at 0. In H.264, frames that are
not needed and that no other frame refers to are left out.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import cast

import av
from av.container import InputContainer
from av.stream import Disposition

from dalle2_video.data.media.frame import ClipError

# ffmpeg's names of the containers that are read; all of them hold their frames themselves.
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif")
# No protocol is called "none", so no demuxer opens a file or an address.
ONLY_THESE_BYTES = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MOST_PIXELS = 8192 * 4320  # of a frame; beyond it a header is damaged, or made to fill the memory


def open_video(source: bytes | str | os.PathLike[str]) -> InputContainer:
    """The container of a path or of the bytes of a video file; FFmpegError where it is none.

    Only CONTAINERS are opened, and of them nothing but the given bytes: a playlist or a script for
    ffmpeg, which would name other files, is refused.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    return av.open(file, "r", metadata_errors="replace", options=ONLY_THESE_BYTES)


def video_stream(container: InputContainer) -> av.VideoStream:
    """Its video stream: of several the longest, the first of equals, and a cover picture only where
    there is nothing else. ClipError where it has none that can be decoded.
    """
    if not container.streams.video:
        raise ClipError("has no video stream")
    stream = max(container.streams.video, key=_is_clip)
    if stream.codec_context is None:
        raise ClipError("no video, or damaged: its codec is unknown")
    if stream.width * stream.height > MOST_PIXELS:
        raise ClipError(f"its frames are too large: {stream.width} x {stream.height}")
    return stream


def _is_clip(stream: av.VideoStream) -> tuple[bool, bool, float]:
    """Sorts streams by how likely they are the clip itself: no image, with frames, long."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails
    seconds = float((stream.duration or 0) * (stream.time_base or 0))
    return not stream.disposition & still, stream.frames != 1, seconds


def mean_frame_duration(stream: av.VideoStream) -> float:
    """Seconds of a frame on average, by the header; 0 where it has no rate."""
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def stream_length(source: bytes | str | os.PathLike[str]) -> float:
    """Seconds from the first frame of the stream to the end of its last; nothing is decoded.

    ClipError where the packets have no time stamps, or end long before the length in the header.
    """
    with open_video(source) as container:
        stream = video_stream(container)
        frame = mean_frame_duration(stream)
        tick = float(stream.time_base or Fraction(1, 1000))
        begins, ends = [], []
        for packet in _packets(container, stream):
            if packet.pts is not None and not packet.is_discard:
                begins.append(packet.pts * tick)
                ends.append(begins[-1] + (packet.duration * tick if packet.duration else frame))
        if not ends or max(ends) <= min(begins):
            raise ClipError("has no length: span=full needs time stamps")
        length = max(ends) - min(begins)
        check_end(stream, length, frame)
    return length


def check_end(stream: av.VideoStream, end: float, duration: float) -> None:
    """ClipError where the stream ends long before the length in its header.

    end: seconds since its first frame; duration: seconds of one frame.
    """
    promised = float(stream.duration * (stream.time_base or 0)) if stream.duration else 0.0
    if promised > end + max(4 * duration, 0.1):
        raise ClipError(f"truncated: stops at {end:.2f} s of {promised:.2f} s")


def decode_frames(
    container: InputContainer,
    stream: av.VideoStream,
    is_needed: Callable[[float, float], bool] = lambda begin, end: True,
) -> Iterator[av.VideoFrame]:
    """Frames in display order; a damaged packet is an error, not a grey frame.

    is_needed: called with the seconds [begin, end) in which a frame is shown. Where it returns
    False, an H.264 frame that no other refers to is left out.
    """
    codec = _decoder(stream)
    codec.options = {"err_detect": "explode"}
    codec.thread_count = 1  # clips run in parallel, so each keeps to one core
    for packet, end in _with_end(_packets(container, stream)):
        if packet.is_corrupt:
            raise ClipError("truncated: a packet is cut off")
        if codec.name == "h264":
            tick = float(packet.time_base or 0)
            used = packet.pts is None or end is None or is_needed(packet.pts * tick, end * tick)
            left_out = not used and _is_unreferenced(bytes(packet), codec.extradata)
            codec.skip_frame = "NONREF" if left_out else "DEFAULT"
        for frame in codec.decode(packet):
            if frame.is_corrupt:
                raise ClipError("damaged: a frame does not decode whole")
            yield frame


def _packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets; ClipError where a damaged MPEG stream announces another one midway,
    which PyAV has no place for.
    """
    try:
        yield from container.demux(stream)
    except IndexError as error:
        raise ClipError("damaged: a stream appears that its beginning does not name") from error


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's own decoder; of VP8 and VP9 with alpha libvpx, since ffmpeg's drops alpha."""
    codec = stream.codec_context
    name = _WITH_ALPHA.get(codec.name)
    if name in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        return cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
    return codec


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
