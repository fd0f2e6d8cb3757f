"""Interlaced video comes out as whole frames, at the same times."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.deinterlace import Deinterlacer
from dalle2_video.data.media.frame import frame_to_rgb
from tests.helpers.media import set_display_matrix, write_codes


def edges(count: int) -> list[np.ndarray]:
    """(64, 64, 3) each: a bright area that grows by 2 columns per field, lower lines first."""
    images = []
    for k in range(count):
        image = np.full((64, 64, 3), 128)
        image[:, :, 0] = 40
        image[1::2, : 8 + 4 * k, 0] = 200
        image[0::2, : 10 + 4 * k, 0] = 200
        images.append(image)
    return images


INTERLACED = {
    "H.264": ("libx264", "mp4", {"flags": "+ilme+ildct", "qp": "0", "bf": "0"}),
    "H.264 with B-frames": ("libx264", "matroska", {"flags": "+ilme+ildct", "qp": "1", "bf": "2"}),
    "MPEG-2": ("mpeg2video", "mpegts", {"flags": "+ilme+ildct", "b": "9000000"}),
}


@pytest.mark.parametrize("kind", INTERLACED)
def test_a_moving_edge_has_no_combing(kind: str) -> None:
    """Each frame is as its first field has it, at its own time."""
    codec, form, options = INTERLACED[kind]
    video = write_codes(edges(12), "yuv420p", codec, form, None, options)
    with av.open(io.BytesIO(video)) as container:
        before = list(container.decode(video=0))
    assert all(frame.interlaced_frame for frame in before)
    combed = np.stack([frame_to_rgb(frame) for frame in before]).astype(int)
    assert np.abs(np.diff(combed, axis=1)).max() > 100, "the test needs combing"

    clip = decode_clip(video, 10.0, 12, 64)
    assert clip.converted == ("deinterlaced",)
    assert clip.timestamps.tolist() == [frame.time - before[0].time for frame in before]
    assert np.abs(np.diff(clip.frames.astype(int), axis=1)).max() <= 8
    bright = (clip.frames[..., 1] > 120).sum(2)
    assert (bright == 8 + 4 * np.arange(12)[:, None]).all()


def test_still_parts_of_an_interlaced_file_stay_sharp() -> None:
    """Where nothing moves both fields are used: single bright lines are not lost."""
    image = np.full((64, 64, 3), 128)
    image[:, :, 0] = 40
    image[10:50:8, :, 0] = 200
    codec, form, options = INTERLACED["H.264"]
    video = write_codes([image] * 6, "yuv420p", codec, form, None, options)
    with av.open(io.BytesIO(video)) as container:
        plain = np.stack([frame_to_rgb(frame) for frame in container.decode(video=0)])
    clip = decode_clip(video, 10.0, 6, 64)
    assert np.abs(clip.frames[1:-1].astype(int) - plain[1:-1]).max() <= 2


def test_some_of_an_interlaced_file_at_other_times() -> None:
    codec, form, options = INTERLACED["H.264 with B-frames"]
    video = write_codes(edges(12), "yuv420p", codec, form, None, options)
    every = decode_clip(video, 10.0, 12, 64)
    some = decode_clip(video, 2.5, 2, 64, start=0.2)
    assert np.array_equal(some.frames, every.frames[[2, 6]])
    full = decode_clip(video, 1.0, 4, 64, span="full")
    assert np.array_equal(full.frames, every.frames[[0, 3, 6, 9]])


def test_an_interlaced_file_that_is_turned() -> None:
    codec, form, options = INTERLACED["H.264"]
    video = write_codes(edges(6), "yuv420p", codec, form, None, options)
    plain = decode_clip(video, 10.0, 6, 64)
    turned = decode_clip(set_display_matrix(video, 0, 1, -1, 0), 10.0, 6, 64)
    assert np.array_equal(turned.frames, np.rot90(plain.frames, -1, (1, 2)))


def test_interlaced_frames_that_change_their_size() -> None:
    codec, form, options = INTERLACED["H.264"]
    frames = []
    for images in (edges(6), [image[:32] for image in edges(6)]):
        video = write_codes(images, "yuv420p", codec, form, None, options)
        with av.open(io.BytesIO(video)) as container:
            frames += list(container.decode(video=0))
    found = list(Deinterlacer().frames(frames))
    assert [frame.height for frame in found] == [64] * 6 + [32] * 6
    assert [frame.time for frame in found] == [frame.time for frame in frames]
    assert not any(frame.interlaced_frame for frame in found)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_progressive_frames_are_not_touched(codec: str) -> None:
    form = "mp4" if codec == "libx264" else "mpegts"
    video = write_codes(edges(12), "yuv420p", codec, form)
    with av.open(io.BytesIO(video)) as container:
        plain = np.stack([frame_to_rgb(frame, 64) for frame in container.decode(video=0)])
    clip = decode_clip(video, 10.0, 12, 64)
    assert clip.converted == () and np.array_equal(clip.frames, plain)
