"""One decoded frame: its colours, its turn, its centre square, its size.

H W pixels; arrays are uint8 RGB (H, W, 3), 0..255.
"""

from __future__ import annotations

from functools import lru_cache

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from dalle2_video.errors import UserError


class ClipError(UserError, ValueError):
    """A clip cannot be used; the message is the cause, as the manifest lists it."""


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


def frame_to_rgb(frame: av.VideoFrame, size: int | None = None) -> np.ndarray:
    """uint8 RGB (H, W, 3), full range, by the frame's own matrix and range.

    size: shrinks to (size, size, 3) on the way, by area: ten times faster than `crop_resize`, and
    57 dB from it on faces (35 dB on a mosaic of saturated colours: chroma is averaged by itself).

    Untagged frames get the guess that players make: BT.709 from 1280 wide or more than 576 high,
    else BT.601; limited range unless the pixel format is a yuvj one. Transfer curves are left alone
    (HDR is not tone mapped).
    """
    large = frame.width >= 1280 or frame.height > 576
    matrix = _MATRIX.get(frame.colorspace, Colorspace.ITU709 if large else Colorspace.ITU601)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        width=size,
        height=size,
        interpolation=EXACT_BILINEAR if size is None else Interpolation.AREA | _EXACT,
        threads=1,
    )
    return rgb.to_ndarray()


def square(frame: av.VideoFrame, size: int, aspect: float) -> np.ndarray:
    """The upright centre square of a decoded frame, uint8 (size, size, 3).

    aspect: the width of a pixel over its height. ClipError for a rotation that is no quarter turn.
    """
    whole = frame.width == frame.height and frame.width >= size and aspect == 1.0
    rgb = frame_to_rgb(frame, size if whole else None)
    image, aspect = _upright(rgb, aspect, _display_matrix(frame))
    return crop_resize(image, size, aspect)


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
    """Centre square of (H, W, 3) 0..255 resized to uint8 (size, size, 3).

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
        image = np.matmul(columns, half).round().clip(0, 255)
    return np.ascontiguousarray(image, np.uint8)


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
