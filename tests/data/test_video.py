"""Decoding by time stamp, colour, rotation, crop, resize, encoding, and the one change of axes."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.data.media.frame import ClipError, crop_resize, frame_to_rgb, resize_matrix
from dalle2_video.data.media.sheet import contact_sheet, save_sheet
from dalle2_video.data.media.stream import decode_frames, stream_length
from dalle2_video.data.media.tensors import to_float, to_uint8
from tests.helpers.media import grey_steps, index_first, numbers, set_display_matrix, write_video


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


# ---------------------------------------------------------------- colour

PATCHES = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]],
        [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]],
        [[200, 120, 90], [90, 60, 50], [30, 40, 200], [128, 128, 128]],
        [[250, 220, 200], [10, 80, 20], [70, 10, 90], [60, 60, 60]],
    ],
    np.uint8,
)


def patches(height: int = 64) -> np.ndarray:
    """Two frames of 4 x 4 plain patches."""
    return np.kron(PATCHES, np.ones((height // 4, height // 4, 1), np.uint8))[None].repeat(2, 0)


def patch_colours(frame: np.ndarray) -> np.ndarray:
    """(4, 4, 3) mean of the inner half of each patch: chroma is blurred at the borders."""
    step = frame.shape[0] // 4
    tiles = frame.reshape(4, step, 4, step, 3).transpose(0, 2, 1, 3, 4)
    inner = slice(step // 4, step - step // 4)
    return tiles[:, :, inner, inner].mean((2, 3))


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_colours_by_matrix_and_range(matrix: str, full: bool, pix_fmt: str) -> None:
    """Mistake 4 of PAPERS.md section 10 (BGR taken for RGB, range mixed up) would fail here."""
    video = write_video(patches(), matrix=matrix, full=full, pix_fmt=pix_fmt)
    clip = decode_clip(video, 10.0, 2, 64)
    assert np.abs(patch_colours(clip.frames[0]) - PATCHES).max() <= 2.5


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_full_range_by_its_tag_alone(matrix: str) -> None:
    """H.264 decodes to yuvj formats, which say "full" too; other codecs have the tag alone."""
    video = write_video(patches(), form="matroska", codec="ffv1", matrix=matrix, full=True)
    with av.open(io.BytesIO(video)) as container:
        assert next(container.decode(video=0)).format.name == "yuv444p"
    assert np.abs(patch_colours(decode_clip(video, 10.0, 2, 64).frames[0]) - PATCHES).max() <= 2.5


def test_the_four_kinds_really_differ() -> None:
    """The guard of the test above: with a wrong matrix or range the colours would be far off."""
    video = write_video(patches(), matrix="bt709", tagged=False)  # 64 pixels high: taken for 601
    assert np.abs(patch_colours(decode_clip(video, 10.0, 2, 64).frames[0]) - PATCHES).max() > 15


@pytest.mark.parametrize(("height", "matrix"), [(64, "bt601"), (720, "bt709")])
def test_untagged_files_get_the_usual_guess(height: int, matrix: str) -> None:
    video = write_video(patches(height), matrix=matrix, tagged=False)
    clip = decode_clip(video, 10.0, 2, 64)
    assert np.abs(patch_colours(clip.frames[0]) - PATCHES).max() <= 2.5


# ---------------------------------------------------------------- shape


def four_corners(height: int = 32, width: int = 32) -> np.ndarray:
    """Two frames with another colour in each quarter: red, green over blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 220
    image[: height // 2, width // 2 :, 1] = 220
    image[height // 2 :, : width // 2, 2] = 220
    image[height // 2 :, width // 2 :] = 220
    return image[None].repeat(2, 0)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # a phone held upright: turned clockwise
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ],
)
def test_rotation_flag(matrix: tuple[int, int, int, int], expected) -> None:
    video = write_video(four_corners())
    upright = decode_clip(video, 10.0, 2, 32).frames
    turned = decode_clip(set_display_matrix(video, *matrix), 10.0, 2, 32).frames
    assert np.array_equal(turned[0], expected(upright[0]))


def test_rotation_comes_before_the_crop() -> None:
    video = set_display_matrix(write_video(four_corners(32, 64)), 0, 1, -1, 0)
    frame = decode_clip(video, 10.0, 2, 32).frames[0]
    # Turned clockwise the blue (bottom left) quarter is top left, the red one top right.
    assert frame[2, 2].argmax() == 2 and frame[2, 29].argmax() == 0
    assert frame[29, 2].min() > 200 and frame[29, 29].argmax() == 1


@pytest.mark.parametrize(("width", "height"), [(63, 47), (47, 63), (33, 33), (64, 32)])
def test_odd_sizes_and_the_centre_square(width: int, height: int) -> None:
    ramp = np.linspace(0, 250, width)[None, :, None] + np.zeros((height, 1, 3))
    video = write_video(ramp.round().astype(np.uint8)[None].repeat(2, 0))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    frame = decode_clip(video, 10.0, 2, side).frames[0]
    expected = ramp[top : top + side, left : left + side]
    assert frame.shape == (side, side, 3)
    assert np.abs(frame - expected).max() <= 2


def test_pixels_that_are_no_squares() -> None:
    """32 x 32 pixels shown twice as wide as high: the centre square is the middle 16 columns."""
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, :, 8:24] = 200
    frame = decode_clip(write_video(images, aspect=Fraction(2)), 10.0, 2, 32).frames[0]
    assert frame[:, 1:-1].min() > 190
    narrow = decode_clip(write_video(images, aspect=Fraction(1)), 10.0, 2, 32).frames[0]
    assert narrow[:, :7].max() < 10


@pytest.mark.parametrize(("source", "target"), [(512, 64), (256, 32), (96, 32), (64, 32)])
def test_resize_is_the_area_average(source: int, target: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (source, source, 3), dtype=np.uint8)
    k = source // target
    exact = image.astype(np.float64).reshape(target, k, target, k, 3).mean((1, 3))
    error = crop_resize(image, target) - exact
    assert 10 * np.log10(255**2 / (error**2).mean()) >= 40
    assert np.abs(error).max() <= 0.51


def test_resize_keeps_the_mean_at_any_ratio_and_takes_out_what_would_alias() -> None:
    for source in (47, 100, 359):
        matrix = resize_matrix(source, 32)
        assert np.allclose(matrix.sum(1), 1, atol=1e-6)
        assert np.allclose(matrix.sum(0), 32 / source, atol=1e-5)  # each pixel counts equally
    lines = np.zeros((128, 128, 3), np.uint8)
    lines[:, ::2] = 255
    assert np.abs(crop_resize(lines, 32).astype(int) - 127.5).max() <= 1


@pytest.mark.parametrize(("side", "size"), [(256, 64), (250, 64), (66, 64)])
def test_shrinking_in_the_decoder_is_the_area_average(side: int, size: int) -> None:
    """At least 40 dB from a float64 area average of the frame's RGB, on sharp edges and noise."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (2, side // 16 + 1, side // 16 + 1, 3))
    tiles = np.kron(coarse, np.ones((1, 16, 16, 1)))[:, :side, :side]
    images = (60 + 0.4 * tiles + draw.integers(0, 40, (2, side, side, 3))).astype(np.uint8)
    video = write_video(images, pix_fmt="yuv420p")
    with av.open(io.BytesIO(video)) as container:
        whole = frame_to_rgb(next(container.decode(video=0))).astype(np.float64)
    matrix = resize_matrix(side, size).astype(np.float64)
    exact = np.einsum("ih,hwc,jw->ijc", matrix, whole, matrix, optimize=True)
    got = decode_clip(video, 10.0, 2, size).frames[0]
    assert 10 * np.log10(255**2 / np.mean((got - exact) ** 2)) >= 40


def test_enlarging_is_linear() -> None:
    ramp = np.arange(16, dtype=np.uint8) * 10
    image = np.broadcast_to(ramp[None, :, None], (16, 16, 3))
    out = crop_resize(image, 32)
    inner = (np.arange(1, 31) + 0.5) / 2 - 0.5
    assert np.abs(out[5, 1:31, 0] - inner * 10).max() <= 0.5


# ---------------------------------------------------------------- out


def test_encode_and_decode_keep_frames_colours_and_tags(tmp_path: Path) -> None:
    still = np.kron(PATCHES, np.ones((16, 16, 1), np.uint8))
    frames = np.stack([np.roll(still, 16 * (k % 4), axis=1) for k in range(8)])
    path = tmp_path / "new" / "clip.mp4"
    encode_mp4(path, torch.from_numpy(frames), 8.0, crf=8)
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert container.streams.video[0].average_rate == 8
    clip = decode_clip(path, 8.0, 8, 64)
    assert np.allclose(clip.timestamps, np.arange(8) / 8)
    for got, sent in zip(clip.frames, frames, strict=True):
        assert np.abs(patch_colours(got) - sent[::16, ::16].astype(float)).max() <= 5
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a page can start to play at once


ENCODE = """
import hashlib
import numpy as np
from dalle2_video.data.media.encode import encode_window
draw = np.random.default_rng(0)
for size in (16, 64, 64, 128):
    first = np.kron(draw.integers(0, 256, (size // 2, size // 2, 3)), np.ones((2, 2, 1)))
    frames = np.stack([np.roll(first, k, 1) for k in range(3)]).astype(np.uint8)
    print(hashlib.sha256(encode_window(frames, 5.0).tobytes()).hexdigest())
"""


def test_the_same_frames_make_the_same_bytes_whatever_the_memory_held() -> None:
    found = set()
    for value in ("1", "165"):  # what glibc writes into memory as it is handed out
        environment = os.environ | {"MALLOC_PERTURB_": value}
        command = [sys.executable, "-c", ENCODE]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(made.stdout)
    assert len(found) == 1
    assert len(set(found.pop().split())) == 4


def test_encode_into_memory_and_what_cannot_be_encoded(tmp_path: Path) -> None:
    file = io.BytesIO()
    encode_mp4(file, grey_steps(6), 29.97)
    assert numbers(decode_clip(file.getvalue(), 29.97, 6, 32).frames) == list(range(6))
    with pytest.raises(ValueError, match="even sides"):
        encode_mp4(tmp_path / "odd.mp4", grey_steps(4, 33, 32), 8.0)
    with pytest.raises(ValueError, match="uint8"):
        encode_mp4(tmp_path / "float.mp4", grey_steps(4).astype(np.float32), 8.0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_encode_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_mp4(path, grey_steps(4), 8.0)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_axes_and_range() -> None:
    """Mistake 4 of PAPERS.md section 10: one axis order and one range, converted in one place."""
    frames = torch.zeros(2, 5, 4, 6, 3, dtype=torch.uint8)
    frames[1, 3, 2, 4] = torch.tensor([255, 0, 51])
    video = to_float(frames)
    assert video.shape == (2, 3, 5, 4, 6) and video.dtype == torch.float32
    assert video[1, :, 3, 2, 4].tolist() == pytest.approx([1.0, -1.0, -0.6])
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 3, 1, 1, 1)).flatten().tolist() == [
        0,
        128,
        255,
    ]


def test_a_view_has_every_other_frame_and_the_mean_of_squares_of_pixels() -> None:
    """The low-rate and low-resolution inputs of a cascade: the same resize as in preprocess."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 12, 3), dtype=np.uint8)
    view = to_float(torch.from_numpy(frames), num_frames=4, size=3)
    assert view.shape == (2, 3, 4, 3, 3)
    for b in range(2):
        for k, frame in enumerate(frames[b, ::2]):
            small = (view[b, :, k].permute(1, 2, 0).numpy() + 1) * 127.5
            assert np.abs(small - crop_resize(frame, 3)).max() <= 0.5 + 1e-3
    assert torch.equal(
        to_float(torch.from_numpy(frames), 8, 12), to_float(torch.from_numpy(frames))
    )
    for num_frames, size in [(3, 12), (8, 5), (16, 12), (8, 24)]:
        with pytest.raises(ValueError, match="8 frames of 12 px have no view of"):
            to_float(torch.from_numpy(frames), num_frames, size)


def test_contact_sheet_is_readable(tmp_path: Path) -> None:
    clips = [grey_steps(16, 32, 32, step=10), grey_steps(3, 128, 128)]
    texts = ["a man smiles, " * 30 + "\nwarm light", "x" * 500]
    sheet = contact_sheet(clips, texts, frames_per_clip=4)
    pixels = np.asarray(sheet)
    first = pixels[20, 300:]  # right of the text: frames enlarged to at least 112 pixels
    assert sorted(set(first[:, 0].tolist()) - {250}) == [0, 50, 100, 150]
    assert (first[:, 0] == 50).sum() >= 112
    assert (pixels[:, :300].min(2) < 128).sum() > 2000, "no text was drawn"
    assert (pixels[:, 295:300] == 250).all(), "text runs into the frames"
    save_sheet(tmp_path / "sheets" / "sheet.png", clips, texts)
    assert (tmp_path / "sheets" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="2 clips, 1 captions"):
        contact_sheet(clips, texts[:1])
