"""Which frames of a stream are shown at the wanted times; damaged and truncated files."""

from __future__ import annotations

import io
import math

import av
import numpy as np
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.data.media.frame import ClipError, frame_to_rgb
from dalle2_video.data.media.stream import _packets, decode_frames, stream_length
from tests.helpers.media import grey_steps, index_first, numbers, write_video


def shown_at(timestamps: list[float], wanted: np.ndarray) -> list[int]:
    """The independent rule: the last frame whose time stamp is not after the wanted time."""
    return [max(k for k, time in enumerate(timestamps) if time <= t + 1e-4) for t in wanted]


# ---------------------------------------------------------------- which frames


def test_frames_are_chosen_by_time_not_by_index() -> None:
    """A 30 fps clip asked for at 10 fps gives every third frame, at half of 10 fps every sixth."""
    video = write_video(grey_steps(30, step=8), fps=30.0, form="mp4")
    timestamps = [round(k / 30, 3) for k in range(30)]
    for fps, count in ((10.0, 10), (5.0, 5), (7.0, 7)):
        clip = decode_clip(video, fps, count, 32)
        assert numbers(clip.frames) == shown_at(timestamps, np.arange(count) / fps)
        assert np.allclose(
            clip.timestamps, [timestamps[k] for k in numbers(clip.frames)], atol=1e-3
        )


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
def test_start_time_other_than_zero(form: str) -> None:
    timestamps = [1.4 + k / 10 for k in range(20)]
    video = write_video(grey_steps(20), timestamps, form=form)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert float(stream.start_time * stream.time_base) == pytest.approx(1.4, abs=0.01)
    clip = decode_clip(video, 5.0, 10, 32)
    assert numbers(clip.frames) == list(range(0, 20, 2))
    assert np.allclose(clip.timestamps, np.arange(10) / 5, atol=1e-3)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_variable_frame_rate(form: str) -> None:
    timestamps = [0.0, 0.04, 0.3, 0.34, 0.35, 0.8, 0.95, 1.0, 1.5, 1.55]
    video = write_video(grey_steps(10), timestamps, form=form)
    wanted = np.arange(12) / 8
    clip = decode_clip(video, 8.0, 12, 32)
    assert numbers(clip.frames) == shown_at(timestamps, wanted)
    assert np.allclose(
        clip.timestamps, [timestamps[k] for k in shown_at(timestamps, wanted)], atol=1e-3
    )


def test_matroska_rounds_time_stamps_and_the_right_frame_is_found_all_the_same() -> None:
    video = write_video(grey_steps(30), fps=15.0, form="matroska")  # 1/15 s is written as 67 ms
    assert numbers(decode_clip(video, 15.0, 30, 32).frames) == list(range(30))


def test_b_frames_come_in_display_order() -> None:
    file = io.BytesIO()
    texture = np.random.default_rng(0).integers(0, 60, (1, 32, 32, 3), dtype=np.uint8)
    encode_mp4(file, grey_steps(24, step=5) + texture, 10.0, preset="medium")
    video = file.getvalue()
    with av.open(io.BytesIO(video)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert order != sorted(order), "the test needs a stream with reordering"
    frames = decode_clip(video, 10.0, 24, 32).frames
    assert numbers(frames - texture.mean(), 5) == list(range(24))


def test_start_moves_the_frames() -> None:
    video = write_video(grey_steps(20))
    clip = decode_clip(video, 10.0, 5, 32, start=0.7)
    assert numbers(clip.frames) == [7, 8, 9, 10, 11]


def test_decoding_stops_at_the_last_frame_needed() -> None:
    """What lies behind the last frame needed is never touched, not even when it is damaged."""
    whole = index_first(write_video(grey_steps(40, step=6), codec_options={"g": "10"}))
    damaged = whole[: int(len(whole) * 0.8)]
    clip = decode_clip(damaged, 10.0, 10, 32)
    assert numbers(clip.frames, 6) == list(range(10))
    with pytest.raises(ClipError, match="truncated"):
        decode_clip(damaged, 10.0, 40, 32)


B_FRAMES = {"preset": "medium", "qp": "20", "bf": "3", "b_strategy": "0", "g": "24"}


def moving(count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): noise that drifts, so that x264 makes many B-frames of it."""
    noise = np.random.default_rng(0).integers(0, 256, (64 + count, 64, 3), dtype=np.uint8)
    return np.stack([noise[k : k + 64] for k in range(count)])


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("even", [True, False], ids=["constant rate", "variable rate"])
@pytest.mark.parametrize("kind", ["first", "full", "all"])
def test_frames_left_out_in_decoding_change_no_other(form: str, even: bool, kind: str) -> None:
    """Against decoding every frame and choosing by time stamp."""
    gaps = np.full(60, 0.04) if even else np.random.default_rng(1).choice([0.02, 0.04, 0.11], 60)
    timestamps = (gaps.cumsum() + 0.5).round(3).tolist()
    video = write_video(moving(60), timestamps, form=form, codec_options=B_FRAMES)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        all_frames = list(container.decode(stream))
    with av.open(io.BytesIO(video)) as container:
        fewest = list(
            decode_frames(container, container.streams.video[0], lambda begin, end: False)
        )
    assert len(fewest) < 0.75 * len(all_frames), "the test needs frames that can be left out"
    stamps = [frame.time - all_frames[0].time for frame in all_frames]

    span = "full" if kind == "full" else "first"
    clip = decode_clip(video, 9.0, 8, 64, 0.0, span, "all" if kind == "all" else "one")
    length = stream_length(video)
    wanted = np.arange(len(clip.frames)) * (length / 8 if kind == "full" else 1 / 9)
    chosen = shown_at(stamps, wanted)
    assert np.array_equal(clip.frames, [frame_to_rgb(all_frames[k], 64) for k in chosen])
    assert np.allclose(clip.timestamps, [stamps[k] for k in chosen], atol=1e-6)
    assert len(clip.frames) == (8 if kind != "all" else math.ceil(length * 9) // 8 * 8)


def test_no_frame_is_left_out_for_a_time_stamp_that_its_container_rounded() -> None:
    """1/15 s is written as 67 ms, so each wanted time lies a little before its frame."""
    video = write_video(moving(30), fps=15.0, form="matroska", codec_options=B_FRAMES)
    with av.open(io.BytesIO(video)) as container:
        expected = [frame_to_rgb(frame, 64) for frame in container.decode(video=0)]
    assert np.array_equal(decode_clip(video, 15.0, 30, 64).frames, expected)
    for every in (2, 4, 5):
        clip = decode_clip(video, 15 / every, 30 // every, 64)
        assert np.array_equal(clip.frames, expected[::every][: 30 // every])


def test_damage_in_a_frame_that_is_left_out_does_not_matter() -> None:
    """The clip is the same as without the damage; where that frame is wanted it is an error."""
    video = write_video(moving(50), fps=25.0, codec_options=B_FRAMES, faststart=True)
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    order = sorted(packet.pts for packet in packets)
    unreferenced = [p for p in packets if not bytes(p)[4] >> 5 & 3]  # nal_ref_idc, ITU-T H.264 7.3
    chosen = next(p for p in unreferenced if order.index(p.pts) > 9 and order.index(p.pts) % 5)
    damaged = bytearray(video)
    damaged[chosen.pos + 5 : chosen.pos + chosen.size] = bytes(chosen.size - 5)
    referenced = next(p for p in packets if p not in unreferenced and order.index(p.pts) > 9)
    lost = bytearray(video)
    lost[referenced.pos + 4 : referenced.pos + referenced.size] = bytes(referenced.size - 4)
    for fps in (5.0, 25.0):
        with pytest.raises(ClipError, match="damaged"):
            decode_clip(bytes(lost), fps, int(2 * fps), 64)
    assert np.array_equal(
        decode_clip(bytes(damaged), 5.0, 10, 64).frames, decode_clip(video, 5.0, 10, 64).frames
    )
    with pytest.raises(ClipError, match="damaged"):
        decode_clip(bytes(damaged), 25.0, 50, 64)


# ---------------------------------------------------------------- bad input


def test_too_short_says_how_much_there_is() -> None:
    video = write_video(grey_steps(13))
    with pytest.raises(ClipError, match=r"^too short: has 1\.3 s, needs 2\.0 s$"):
        decode_clip(video, 10.0, 20, 32)


def test_the_last_frame_lasts_one_frame_and_one_frame_may_lack() -> None:
    video = write_video(grey_steps(19))
    assert numbers(decode_clip(video, 10.0, 20, 32).frames) == [*range(19), 18]
    with pytest.raises(ClipError, match="too short"):
        decode_clip(video, 10.0, 21, 32)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("front", [False, True], ids=["index last", "index first"])
def test_truncated_mp4(share: float, front: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    video = write_video(noise, faststart=front)
    assert len(decode_clip(video, 10.0, 20, 32).timestamps) == 20
    with pytest.raises(ClipError, match="truncated"):
        decode_clip(video[: int(len(video) * share)], 10.0, 20, 32)


@pytest.mark.parametrize("kind", ["first", "full", "all"])
def test_a_file_that_ends_between_two_packets_is_truncated(kind: str) -> None:
    """No packet is cut off then; the header still has the length of the whole."""
    video = write_video(grey_steps(40, step=6), faststart=True)
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    cut = video[: packets[25].pos]
    span, windows = "full" if kind == "full" else "first", "all" if kind == "all" else "one"
    assert len(decode_clip(cut, 10.0, 10, 32).frames) == 10, "enough for the first second"
    with pytest.raises(ClipError, match=r"truncated: stops at 2\.50 s of 4\.00 s"):
        decode_clip(cut, 10.0, 30 if kind == "first" else 10, 32, 0.0, span, windows)


def test_a_header_of_absurd_size_is_refused(monkeypatch) -> None:
    video = write_video(grey_steps(4))
    monkeypatch.setattr("dalle2_video.data.media.stream.MOST_PIXELS", 32 * 32)
    assert len(decode_clip(video, 10.0, 4, 32).frames) == 4
    monkeypatch.setattr("dalle2_video.data.media.stream.MOST_PIXELS", 32 * 32 - 1)
    with pytest.raises(ClipError, match="its frames are too large: 32 x 32"):
        decode_clip(video, 10.0, 4, 32)


@pytest.mark.parametrize("data", [b"", b"no video at all" * 100, bytes(5000)])
def test_no_video_is_named(data: bytes) -> None:
    with pytest.raises(ClipError, match="no video"):
        decode_clip(data, 10.0, 2, 32)


def test_a_file_of_sound_alone_has_no_video_stream() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="no video stream"):
        decode_clip(file.getvalue(), 10.0, 2, 32)


def test_damaged_bytes_are_found() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    video = bytearray(write_video(noise, codec_options={"preset": "medium"}, faststart=True))
    middle = len(video) // 2
    video[middle : middle + 4000] = bytes(4000)
    with pytest.raises(ClipError, match="damaged"):
        decode_clip(bytes(video), 10.0, 20, 32)


def test_a_stream_that_appears_midway_is_damage() -> None:
    """PyAV has an IndexError for a packet of it, which a damaged MPEG stream can set off."""

    class Container:
        def demux(self, stream: object):
            yield "a packet"
            raise IndexError("list index out of range")

    packets = _packets(Container(), None)  # type: ignore[arg-type]
    assert next(packets) == "a packet"
    with pytest.raises(ClipError, match="damaged: a stream appears"):
        next(packets)
