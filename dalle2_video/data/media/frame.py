"""One decoded frame: its colours, its turn, its centre square, its size.

H W pixels; arrays are uint8 RGB (H, W, 3), 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from dalle2_video.data.media.gamut import gamut_note, to_bt709
from dalle2_video.errors import UserError


class ClipError(UserError, ValueError):
    """A clip cannot be used; the message is the cause, as the manifest lists it."""


@dataclass(frozen=True)
class Square:
    """image uint8 RGB (size, size, 3); converted: what was changed besides its shape, for people,
    such as "tone-mapped from PQ"; empty for a plain picture.
    """

    image: np.ndarray
    converted: tuple[str, ...]


# AVColorSpace (ITU-T H.273 matrix coefficients) -> the matrix that swscale is to undo.
_MATRIX = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
EXACT_BILINEAR = Interpolation.BILINEAR | _EXACT
ALPHA_NOTE = "alpha on black"
_RGB = {8: "rgb24", 16: "rgb48le"}  # bits of a channel -> ffmpeg's packed format
_RGBA = {8: "rgba", 16: "rgba64le"}


def frame_to_rgb(
    frame: av.VideoFrame, size: int | tuple[int, int] | None = None, form: str = "rgb24"
) -> np.ndarray:
    """uint8 RGB (H, W, 3), full range, by the frame's own matrix and range; alpha is dropped.

    size: shrinks to it (both sides, or height and width) on the way, by area: ten times faster than
    `crop_resize`, and 57 dB from it on faces (35 dB on a mosaic of saturated colours: chroma is
    averaged by itself). form: a packed RGB format of ffmpeg, which sets depth and channels.

    Untagged frames get the guess that players make: BT.709 from 1280 wide or more than 576 high,
    else BT.601; limited range unless the pixel format is a yuvj one. Transfer and primaries are
    left alone (`square` converts them).
    """
    large = frame.width >= 1280 or frame.height > 576
    guess = Colorspace.ITU709 if large else Colorspace.ITU601
    if gamut_note(frame) is not None:
        guess = Colorspace.BT2020
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    height, width = size if isinstance(size, tuple) else (size, size)
    rgb = frame.reformat(
        format=form,
        src_colorspace=_MATRIX.get(frame.colorspace, guess),
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        width=width,
        height=height,
        interpolation=EXACT_BILINEAR if size is None else Interpolation.AREA | _EXACT,
        threads=1,
    )
    return rgb.to_ndarray()


def square(frame: av.VideoFrame, size: int, aspect: float) -> Square:
    """The upright centre square of a decoded frame, in BT.709 SDR, with alpha on black.

    aspect: the width of a pixel over its height. ClipError for a rotation that is no quarter turn.
    """
    note = gamut_note(frame)
    depth = 8 if note is None else 16
    rgb, converted = _on_black(frame, depth), [ALPHA_NOTE]
    if rgb is None:
        rgb, converted = frame_to_rgb(frame, _shrunk(frame, size, aspect), _RGB[depth]), []
    image, aspect = _upright(rgb, aspect, _display_matrix(frame))
    image = crop_resize(image, size, aspect)
    if note is not None:
        image = to_bt709(image, frame.color_trc, frame.color_primaries)
        converted.append(note)
    return Square(image, tuple(converted))


def _shrunk(frame: av.VideoFrame, size: int, aspect: float) -> tuple[int, int] | None:
    """Height and width to which the decoder's own scaler shrinks a frame; None = not at all."""
    if frame.width == frame.height and frame.width >= size and aspect == 1.0:
        return size, size
    if gamut_note(frame) is None:
        return None
    # Large HDR frames come in 16 bits: most of the way by a whole factor, the rest by crop_resize.
    factor = max(1, min(frame.height, frame.width) // (2 * size))
    return None if factor == 1 else (round(frame.height / factor), round(frame.width / factor))


def _on_black(frame: av.VideoFrame, depth: int) -> np.ndarray | None:
    """RGB (H, W, 3) of `depth` bits times alpha; None where no pixel is transparent."""
    if not any(component.is_alpha for component in frame.format.components):
        return None
    return on_black(frame_to_rgb(frame, None, _RGBA[depth]))


def on_black(rgba: np.ndarray) -> np.ndarray | None:
    """RGB (H, W, 3) times alpha, of uint8 or uint16 RGBA (H, W, 4) whose alpha is not yet applied;
    None where no pixel is transparent.
    """
    opaque = np.uint32(np.iinfo(rgba.dtype).max)
    if (rgba[..., 3] == opaque).all():
        return None
    product = rgba[..., :3] * rgba[..., 3:].astype(np.uint32)
    return ((product + opaque // 2) // opaque).astype(rgba.dtype)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the frame's display matrix: x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    matrix = np.frombuffer(bytes(data), np.int32) / 65536
    a, b, c, d = np.rint(matrix[[0, 1, 3, 4]]).astype(int).tolist()
    if (abs(a), abs(b), abs(c), abs(d)) not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        raise ClipError(f"its rotation is no quarter turn: display matrix {matrix.tolist()}")
    return a, b, c, d


def _upright(
    image: np.ndarray, aspect: float, matrix: tuple[int, int, int, int]
) -> tuple[np.ndarray, float]:
    a, b, c, d = matrix
    if a == 0:  # x and y change places: x' = c y, y' = b x, -1 mirrors
        image, aspect, a, d = image.transpose(1, 0, 2), 1 / aspect, c, b
    return image[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1], aspect


def crop_resize(image: np.ndarray, size: int, aspect: float = 1.0) -> np.ndarray:
    """Centre square of (H, W, 3) uint8 or uint16, resized to (size, size, 3) of the same type.

    `aspect` is the width of a pixel over its height. Shrinking averages over the exact area that an
    output pixel covers (antialiased, fractions of pixels included); enlarging is bilinear.
    """
    height, width = image.shape[:2]
    if aspect == 1.0:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
        rows = columns = resize_matrix(side, size)
    else:
        side = min(height, width * aspect)
        rows = resize_matrix(height, size, (height - side) / 2, side)
        columns = resize_matrix(width, size, (width - side / aspect) / 2, side / aspect)
    if aspect != 1.0 or image.shape[:2] != (size, size):
        flat = np.ascontiguousarray(image, np.float32).reshape(image.shape[0], -1)
        half = (rows @ flat).reshape(size, image.shape[1], 3)
        most = np.iinfo(image.dtype).max
        image = np.matmul(columns, half).round().clip(0, most).astype(image.dtype)
    return np.ascontiguousarray(image)


@lru_cache(maxsize=64)
def resize_matrix(
    n_in: int, n_out: int, start: float = 0.0, length: float | None = None
) -> np.ndarray:
    """float32 (n_out, n_in), rows summing to 1: resizes [start, start + length) of n_in samples.

    An area average where it shrinks, linear interpolation (edges repeated) where it enlarges.
    """
    length = float(n_in) if length is None else length
    scale = length / n_out
    pixel = np.arange(n_in)
    if scale >= 1:
        edge = start + np.arange(n_out + 1)[:, None] * scale
        cover = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
        weight = cover.clip(0)
    else:
        centre = (start + (np.arange(n_out) + 0.5) * scale - 0.5).clip(0, n_in - 1)
        weight = (1 - np.abs(centre[:, None] - pixel)).clip(0)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)
