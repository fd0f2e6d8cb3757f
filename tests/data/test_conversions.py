"""HDR, wide-gamut and transparent video come out as opaque BT.709 SDR."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import pytest
from PIL import Image

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.frame import frame_to_rgb, square
from tests.helpers.media import (
    PATCHES,
    frame_of,
    grey_steps,
    patch_colours,
    write_codes,
    write_video,
)

PQ, HLG = 16, 18  # transfers, ITU-T H.273
WHITE = 203.0  # cd/m2 of SDR white in HDR, ITU-R BT.2408
LEVELS = (0.0, 0.5, 2.0, 10.0, 26.0, 50.0, 100.0, 150.0, 203.0, 400.0, 1000.0)


# ---------------------------------------------------------------- the standards, once more


def pq_signal(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 table 4, inverse EOTF: cd/m2 -> 0..1."""
    y = (np.asarray(nits, np.float64) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg_signal(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 table 5: light of a display of 1000 cd/m2 (..., 3) -> 0..1."""
    light = np.asarray(nits, np.float64) / 1000
    luminance = light @ [0.2627, 0.6780, 0.0593]
    with np.errstate(divide="ignore", invalid="ignore"):  # inverse OOTF, gamma 1.2
        scene = np.nan_to_num(light * luminance[..., None] ** (1 / 1.2 - 1))
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    high = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def to_bt2020(light: np.ndarray) -> np.ndarray:
    """Linear BT.709 RGB -> linear BT.2020 RGB, ITU-R BT.2087."""
    matrix = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    return light @ np.array(matrix).T


def bt2020_codes(signal: np.ndarray) -> np.ndarray:
    """Non-linear RGB 0..1 (..., 3) -> 10-bit limited-range Y, Cb, Cr of ITU-R BT.2020."""
    red, _, blue = np.moveaxis(signal, -1, 0)
    y = signal @ [0.2627, 0.6780, 0.0593]
    cb, cr = (blue - y) / 1.8814, (red - y) / 1.4746
    return np.stack([876 * y + 64, 896 * cb + 512, 896 * cr + 512], -1).round()


def tagged(trc: int, primaries: int = 9) -> dict[str, int]:
    return {"colorspace": 9, "color_range": 1, "color_trc": trc, "color_primaries": primaries}


def grey(signal: float, side: int = 32) -> np.ndarray:
    """(side, side, 3) 10-bit codes of a grey."""
    return np.broadcast_to(bt2020_codes(np.full(3, signal)), (side, side, 3))


CODECS = {"libx265": {"x265-params": "lossless=1:log-level=none"}, "libx264": {"qp": "0"}}

# ---------------------------------------------------------------- HDR and wide gamut


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("trc", [PQ, HLG])
def test_greys_of_hdr_files(codec: str, trc: int) -> None:
    """203 cd/m2 is white and what lies below it keeps its light; within 2.5 of 255."""
    nits = np.array(LEVELS)[:, None].repeat(3, 1)
    signal = (pq_signal if trc == PQ else hlg_signal)(nits)[:, 0]
    images = [grey(value, 64) for value in signal]
    video = write_codes(images, "yuv420p10le", codec, "mp4", tagged(trc), CODECS[codec])
    clip = decode_clip(video, 10.0, len(LEVELS), 32)
    assert clip.converted == (f"tone-mapped from {'PQ' if trc == PQ else 'HLG'}",)
    expected = 255 * np.minimum(1, np.array(LEVELS) / WHITE) ** (1 / 2.4)  # ITU-R BT.1886
    got = clip.frames.astype(float)
    assert np.abs(got.mean((1, 2, 3)) - expected).max() <= 2.5
    assert np.ptp(got, axis=(1, 2)).max() == 0
    assert np.ptp(got, axis=3).max() <= 1, "neutral stays neutral"


@pytest.mark.parametrize("trc", [PQ, HLG])
def test_brighter_is_never_darker(trc: int) -> None:
    frames = [frame_of(grey(k / 60), "yuv420p10le", tagged(trc)) for k in range(61)]
    levels = [int(square(frame, 32, 1.0).image[0, 0, 1]) for frame in frames]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 255


@pytest.mark.parametrize("kind", ["PQ", "HLG", "SDR"])
def test_colours_that_bt709_has_come_out_as_they_are(kind: str) -> None:
    """The light of SDR patches, written in BT.2020 by the standards' equations.

    Within 6 of 255; the primaries, which the library moves off the border of BT.709, within 20 %
    of white's light.
    """
    light = to_bt2020((PATCHES / 255.0) ** 2.4)
    signal = {
        "PQ": lambda: pq_signal(WHITE * light),
        "HLG": lambda: hlg_signal(WHITE * light),
        "SDR": lambda: light ** (1 / 2.4),
    }[kind]()
    image = np.kron(bt2020_codes(signal), np.ones((16, 16, 1)))
    tags = tagged({"PQ": PQ, "HLG": HLG, "SDR": 14}[kind])
    video = write_codes([image] * 2, "yuv444p10le", "libx264", "mp4", tags, CODECS["libx264"])
    clip = decode_clip(video, 10.0, 2, 64)
    note = "BT.2020 to BT.709" if kind == "SDR" else f"tone-mapped from {kind}"
    assert clip.converted == (note,)
    got = patch_colours(clip.frames[0])
    assert np.abs(got - PATCHES)[2:].max() <= 6
    assert np.abs((got / 255) ** 2.4 - (PATCHES / 255) ** 2.4).max() <= 0.2
    untouched = patch_colours(frame_to_rgb(frame_of(image, "yuv444p10le", tags)))
    assert np.abs(untouched - PATCHES).max() > 30, "the test needs colours that differ"


def test_colours_that_bt709_lacks_are_clipped_at_their_hue() -> None:
    for k in range(3):
        signal = pq_signal(100.0 * np.eye(3)[k])
        image = np.broadcast_to(bt2020_codes(signal), (32, 32, 3))
        colour = square(frame_of(image, "yuv444p10le", tagged(PQ)), 32, 1.0).image[0, 0]
        assert colour.argmax() == k and np.sort(colour)[1] < 0.7 * colour.max()


def test_hdr_without_known_primaries_or_matrix_is_bt2020() -> None:
    image = np.kron(
        bt2020_codes(pq_signal(WHITE * to_bt2020((PATCHES / 255) ** 2.4))), np.ones((16, 16, 1))
    )
    full = square(frame_of(image, "yuv444p10le", tagged(PQ)), 64, 1.0)
    bare = {"colorspace": 2, "color_range": 1, "color_trc": PQ, "color_primaries": 2}
    assert np.array_equal(square(frame_of(image, "yuv444p10le", bare), 64, 1.0).image, full.image)


@pytest.mark.parametrize(("width", "height"), [(1366, 770), (770, 1366), (64, 32), (70, 33)])
def test_a_wide_hdr_frame_is_its_centre_square(width: int, height: int) -> None:
    """A ramp of PQ signals; large frames are shrunk by the decoder's scaler on the way."""
    ramp = np.linspace(0.1, 0.6, width)
    image = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    frame = square(frame_of(bt2020_codes(image), "yuv444p10le", tagged(PQ)), 32, 1.0).image
    side = min(width, height)
    centre = (width - side) / 2 + (np.arange(32) + 0.5) * side / 32 - 0.5
    nits = np.geomspace(1e-3, 1e4, 2000)
    light = np.interp(np.interp(centre, np.arange(width), ramp), pq_signal(nits), nits) / WHITE
    expected = 255 * np.minimum(1, light) ** (1 / 2.4)
    assert np.abs(frame.astype(float) - expected[None, :, None]).max() <= 4


# ---------------------------------------------------------------- alpha

TRANSPARENT = {
    "VP9": ("libvpx-vp9", "webm", "yuva420p", {"lossless": "1"}),
    "VP8": ("libvpx", "webm", "yuva420p", {"auto-alt-ref": "0", "b": "4M", "crf": "4"}),
    "FFV1": ("ffv1", "matroska", "yuva420p", {}),
    "ProRes 4444": ("prores_ks", "mov", "yuva444p10le", {"profile": "4444", "alpha_bits": "16"}),
    "PNG in MOV": ("png", "mov", "rgba", {}),
    "QuickTime RLE": ("qtrle", "mov", "argb", {}),
    "Ut Video": ("utvideo", "avi", "gbrap", {}),
}
COLOUR, ALPHAS = (200, 120, 40), (255, 128, 0, 64)


def quarters(alphas: Sequence[int]) -> np.ndarray:
    """RGBA (64, 64, 4): one colour, each quarter with an alpha of its own."""
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., :3] = COLOUR
    image[..., 3] = np.kron(np.array(alphas).reshape(2, 2), np.ones((32, 32)))
    return image


def write_alpha(kind: str, alphas: Sequence[int]) -> bytes:
    codec, form, pix_fmt, options = TRANSPARENT[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = pix_fmt, options
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(quarters(alphas), format="rgba")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("size", [64, 16])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_alpha_is_on_black(kind: str, size: int) -> None:
    clip = decode_clip(write_alpha(kind, ALPHAS), 10.0, 5, size)
    assert clip.converted == ("alpha on black",)
    assert np.allclose(clip.timestamps, np.arange(5) / 10)
    half, edge = size // 2, size // 8
    for k, alpha in enumerate(ALPHAS):
        top, left = k // 2 * half, k % 2 * half
        inner = clip.frames[:, top + edge : top + half - edge, left + edge : left + half - edge]
        assert np.abs(inner - np.array(COLOUR) * alpha / 255).max() <= 5, (kind, alpha)


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_an_alpha_channel_that_hides_nothing_is_no_conversion(kind: str) -> None:
    video = write_alpha(kind, (255,) * 4)
    clip = decode_clip(video, 10.0, 5, 64)
    assert clip.converted == ()
    with av.open(io.BytesIO(video)) as container:
        plain = np.stack([frame_to_rgb(frame, 64) for frame in container.decode(video=0)])
    assert np.abs(clip.frames.astype(int) - plain).max() <= (0 if "VP" not in kind else 2)


@pytest.mark.parametrize("transparent", [False, True])
def test_gif(transparent: bool) -> None:
    images = []
    for k in range(4):
        image = Image.new("P", (32, 32), 0)
        image.putpalette([0, 200, 0, 250, 250, 250])
        image.paste(1, (8 * k, 0, 8 * k + 8, 32))
        images.append(image)
    file = io.BytesIO()
    hidden = {"transparency": 0, "disposal": 2} if transparent else {}
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=100, **hidden)
    clip = decode_clip(file.getvalue(), 10.0, 4, 32)
    assert clip.converted == (("alpha on black",) if transparent else ())
    for k, frame in enumerate(clip.frames):
        assert (frame[:, 8 * k : 8 * k + 8] == 250).all()
        rest = np.delete(frame, np.s_[8 * k : 8 * k + 8], 1)
        assert (rest == ((0, 0, 0) if transparent else (0, 200, 0))).all()


def test_a_plain_video_is_not_converted() -> None:
    assert decode_clip(write_video(grey_steps(10)), 10.0, 10, 32).converted == ()
