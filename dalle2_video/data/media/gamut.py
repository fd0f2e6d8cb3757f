"""HDR and wide-gamut colours to BT.709 SDR, by libswscale's own colour management.

A frame is HDR by its transfer, PQ (SMPTE ST 2084) or HLG (ARIB STD-B67), both in ITU-R BT.2100, and
of wide gamut by its primaries, BT.2020 or P3. Luminance is kept up to reference white, 203 cd/m2
(ITU-R BT.2408: PQ 58 %, HLG 75 %), which becomes SDR white; what is brighter is clipped to it, and
colours outside BT.709 move to its border at their own hue. SDR code values stand for display light
of gamma 2.4 (ITU-R BT.1886). HLG is shown as on a display of 1000 cd/m2. Metadata of the mastering
display, HDR10+ and Dolby Vision are not used.
"""

from __future__ import annotations

from functools import lru_cache

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_WIDE = {
    ColorPrimaries.BT2020: "BT.2020",
    ColorPrimaries.SMPTE431: "P3",
    ColorPrimaries.SMPTE432: "P3",
}


def gamut_note(frame: av.VideoFrame) -> str | None:
    """What `to_bt709` does to a frame, for people; None where its colours can stay."""
    if frame.color_trc in _HDR:
        return f"tone-mapped from {_HDR[ColorTrc(frame.color_trc)]}"
    if frame.color_primaries in _WIDE:
        return f"{_WIDE[ColorPrimaries(frame.color_primaries)]} to BT.709"
    return None


def to_bt709(image: np.ndarray, trc: int, primaries: int) -> np.ndarray:
    """uint16 RGB (S, S, 3), 0..65535, of a frame that has a `gamut_note` -> uint8 of BT.709.

    trc, primaries: the frame's tags; HDR without known primaries is BT.2020, and an SDR transfer
    is left alone. The first image of a size and kind takes a second or two (a table of colours is
    computed), the others a millisecond.
    """
    frame = av.VideoFrame.from_ndarray(image, format="rgb48le")
    frame.color_trc = trc if trc in _HDR else ColorTrc.BT709
    frame.color_primaries = primaries if primaries in _WIDE else ColorPrimaries.BT2020
    rgb = _mapper(image.shape[0], frame.color_trc, frame.color_primaries).reformat(
        frame,
        format="rgb24",
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG,
        dst_color_trc=ColorTrc.BT709,
        dst_color_primaries=ColorPrimaries.BT709,
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND,
        threads=1,
    )
    return rgb.to_ndarray()


@lru_cache(maxsize=8)
def _mapper(size: int, trc: int, primaries: int) -> VideoReformatter:
    """It keeps its table as long as it sees frames of one size and kind."""
    return VideoReformatter()
