"""The colours, the turn, the centre square and the size of a decoded frame."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.frame import ClipError, crop_resize, frame_to_rgb, resize_matrix
from tests.helpers.media import PATCHES, patch_colours, patches, set_display_matrix, write_video

# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_colours_by_matrix_and_range(matrix: str, full: bool, pix_fmt: str) -> None:
    """A known mistake (BGR taken for RGB, range mixed up) would fail here."""
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


@pytest.mark.parametrize(("height", "matrix"), [(64, "bt601"), (576, "bt601"), (720, "bt709")])
def test_untagged_files_get_the_usual_guess(height: int, matrix: str) -> None:
    video = write_video(patches(height), matrix=matrix, tagged=False)
    clip = decode_clip(video, 10.0, 2, 64)
    assert np.abs(patch_colours(clip.frames[0]) - PATCHES).max() <= 2.5


def test_an_untagged_wide_file_is_bt709_whatever_its_height() -> None:
    image = np.kron(PATCHES, np.ones((16, 320, 1), np.uint8))
    video = write_video(image[None].repeat(2, 0), matrix="bt709", tagged=False)
    with av.open(io.BytesIO(video)) as container:
        wide = frame_to_rgb(next(container.decode(video=0)))
    middle = wide[8::16, 160::320]
    assert np.abs(middle.astype(float) - PATCHES).max() <= 2.5


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


def test_a_rotation_that_is_no_quarter_turn_is_refused() -> None:
    video = set_display_matrix(write_video(four_corners()), 1, 1, 0, 1)
    with pytest.raises(ClipError, match="its rotation is no quarter turn"):
        decode_clip(video, 10.0, 2, 32)


def test_pixels_that_are_no_squares_are_turned_with_the_frame() -> None:
    """Turned, 32 x 32 pixels that were twice as wide as high are twice as high as wide."""
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, :, 8:24] = 200
    video = set_display_matrix(write_video(images, aspect=Fraction(2)), 0, 1, -1, 0)
    assert decode_clip(video, 10.0, 2, 32).frames[0][1:-1].min() > 190


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


def test_a_small_square_frame_is_enlarged_like_any_other() -> None:
    video = write_video(np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8))
    with av.open(io.BytesIO(video)) as container:
        whole = frame_to_rgb(next(container.decode(video=0)))
    assert np.array_equal(decode_clip(video, 10.0, 2, 32).frames[0], crop_resize(whole, 32))


def test_enlarging_is_linear() -> None:
    ramp = np.arange(16, dtype=np.uint8) * 10
    image = np.broadcast_to(ramp[None, :, None], (16, 16, 3))
    out = crop_resize(image, 32)
    inner = (np.arange(1, 31) + 0.5) / 2 - 0.5
    assert np.abs(out[5, 1:31, 0] - inner * 10).max() <= 0.5
