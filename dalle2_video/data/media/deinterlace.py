"""Interlaced frames to whole ones, by ffmpeg's bwdif; progressive frames pass untouched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import av
from av.error import BlockingIOError as NotYetError
from av.error import EOFError as EndedError
from av.filter import Graph


class Deinterlacer:
    """One frame out for each frame in, with its time stamp.

    Of an interlaced frame the field that is shown first stays, and the other one's lines are drawn
    again from both fields and the neighbouring frames (bwdif: Weston's three-field filter where
    there is motion). `begun`: whether any frame so far was interlaced. From that one on each frame
    comes out when the next one is in.
    """

    def __init__(self) -> None:
        self.begun = False

    def frames(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The frames, whole. Raises what `frames` raises; FFmpegError where the filter fails."""
        graph: Graph | None = None
        shape: tuple[object, ...] = ()
        for frame in frames:
            self.begun = self.begun or frame.interlaced_frame
            if not self.begun:
                yield frame
                continue
            if graph is not None and shape != _shape(frame):
                yield from _pull(graph, ended=True)
                graph = None
            if graph is None:
                graph, shape = _bwdif(frame), _shape(frame)
            graph.vpush(frame)
            yield from _pull(graph)
        if graph is not None:
            yield from _pull(graph, ended=True)


def _shape(frame: av.VideoFrame) -> tuple[object, ...]:
    """What a filter graph is built for."""
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _bwdif(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
        f":time_base={frame.time_base or '1/1000'}"
        f":colorspace={frame.colorspace}:range={frame.color_range}",
    )
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _pull(graph: Graph, ended: bool = False) -> Iterator[av.VideoFrame]:
    """The frames that are ready; ended: all that are left."""
    if ended:
        graph.vpush(None)
    while True:
        try:
            yield graph.vpull()
        except (NotYetError, EndedError):
            return
