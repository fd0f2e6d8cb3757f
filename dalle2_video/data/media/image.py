"""Still pictures (JPEG, PNG, WebP) to squares, by Pillow.

What a file is, its content decides, not its name. Grey, palette, CMYK and 16-bit pictures become
8-bit RGB; a colour profile becomes sRGB where LittleCMS knows how, and is ignored where it does
not. Damage that the format's own check sums or decoder do not find goes unnoticed, as in the middle
of a JPEG.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from dalle2_video.data.media.frame import ALPHA_NOTE, ClipError, Square, crop_resize, on_black
from dalle2_video.data.media.stream import MOST_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP")
_PNG_END = b"IEND\xaeB`\x82"
# EXIF tag 274, orientation (CIPA DC-008): how to turn what is stored.
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(source: bytes | str | os.PathLike[str], size: int) -> Square:
    """The upright centre square of a picture, uint8 RGB (size, size, 3), with alpha on black.

    `source` is a path or the bytes of a file. Raises ClipError, naming the cause, for what is no
    picture, is damaged or truncated, has more than MOST_PIXELS pixels, or is an animation, which is
    a video (`decode_clip`).
    """
    with open_picture(source) as picture:
        if is_animation(picture):
            raise ClipError("no image: an animation, which is a video")
        return picture_square(picture, size)


def is_animation(picture: Image.Image) -> bool:
    """Whether a PNG or WebP has several frames; several pictures in a JPEG are no animation."""
    return picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1


def is_animated(source: bytes | str | os.PathLike[str]) -> bool:
    """Whether a file is an animation; ClipError where it is no whole picture."""
    with open_picture(source) as picture:
        return is_animation(picture)


@contextmanager
def open_picture(source: bytes | str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The picture, its pixels not yet decoded. ClipError for whatever goes wrong in the block."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ClipError(f"its image is too large: {picture.width} x {picture.height}")
            if picture.format == "PNG" and not is_animation(picture) and _PNG_END not in data:
                raise ClipError("truncated: a PNG without its end")  # Pillow does not mind
            yield picture
    except ClipError:
        raise
    except UnidentifiedImageError as error:
        raise ClipError("no image: not a whole JPEG, PNG or WebP") from error
    except Image.DecompressionBombError as error:
        raise ClipError(f"its image is too large: {error}") from error
    except Exception as error:  # Pillow's readers raise anything, as the damage has it
        raise ClipError(f"damaged or truncated: {error or type(error).__name__}") from error


def picture_square(picture: Image.Image, size: int) -> Square:
    """The square of an open picture, or of the frame that an animation is at."""
    picture.load()
    turn = _TURN.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    picture, alpha = _without_alpha(picture)
    converted = ["CMYK to RGB"] if picture.mode == "CMYK" else []
    profiled = _to_srgb(picture)
    if profiled is not None:
        converted.append("colour profile to sRGB")
    rgb = np.asarray(picture.convert("RGB") if profiled is None else profiled)
    black = None if alpha is None else on_black(np.dstack([rgb, alpha]))
    if black is not None:
        converted.append(ALPHA_NOTE)
    return Square(crop_resize(rgb if black is None else black, size), tuple(converted))


def _without_alpha(picture: Image.Image) -> tuple[Image.Image, np.ndarray | None]:
    """The picture as L, RGB or CMYK, its info kept; and its alpha, uint8 (H, W), if it has any."""
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow itself would cut off at 255
        codes = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = Image.fromarray(((codes + 128) // 257).astype(np.uint8))
        grey.info = dict(picture.info)
        hidden = grey.info.pop("transparency", None)
        return grey, None if hidden is None else np.where(codes == hidden, 0, 255).astype(np.uint8)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return picture.convert("RGB"), np.asarray(picture.getchannel("A"))
    return (picture.convert("RGB") if picture.mode in ("1", "P") else picture), None


def _orientation(picture: Image.Image) -> int:
    """1 to 8, by EXIF; 1 where it has none or it cannot be read."""
    try:
        return picture.getexif().get(274, 1)
    except Exception:  # damaged EXIF, of a picture that is whole
        return 1


def _to_srgb(picture: Image.Image) -> Image.Image | None:
    """RGB by the picture's own colour profile; None where it has none, sRGB, or a bad one."""
    data = picture.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return None
        core: Any = profile.profile
        if core.xcolor_space.strip() == "RGB":
            picture = picture.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        # Of grey, lcms would make a table of few entries, coarse in the shadows.
        flags = ImageCms.Flags.NOOPTIMIZE if picture.mode == "L" else ImageCms.Flags.NONE
        return ImageCms.profileToProfile(picture, profile, srgb, intent, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
