"""Contact sheets: clips as rows of frames with their captions, for people to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle2_video.data.atomic import whole

_GAP = 6  # pixels between frames, and around text
_TEXT_WIDTH = 300
_SMALLEST = 112  # frames are enlarged by a whole factor to at least this many pixels
_FONT_SIZE = 15
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_BACKGROUND, _INK = (250, 250, 250), (20, 20, 20)


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], frames_per_clip: int = 8
) -> Image.Image:
    """One row per clip: its caption, wrapped, then evenly spaced frames from first to last.

    clips: uint8 RGB (F, H, W, 3) each, sizes may differ; captions: as many, '\\n' starts a new
    line. Returns an RGB image. ValueError where there is nothing to show or the counts differ.
    """
    if not clips or len(clips) != len(captions) or frames_per_clip < 1:
        raise ValueError(f"{len(clips)} clips, {len(captions)} captions, {frames_per_clip} frames")
    font = ImageFont.load_default(_FONT_SIZE)
    rows = [
        _row(np.asarray(clip), caption, frames_per_clip, font)
        for clip, caption in zip(clips, captions, strict=True)
    ]
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), _BACKGROUND
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def save_sheet(
    path: str | os.PathLike[str],
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    frames_per_clip: int = 8,
) -> None:
    """`contact_sheet` as a PNG file, under a temporary name first."""
    sheet = contact_sheet(clips, captions, frames_per_clip)
    with whole(Path(path)) as partial:
        sheet.save(partial, format="PNG")


def _row(clip: np.ndarray, caption: str, count: int, font: Font) -> Image.Image:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
        raise ValueError(f"a clip must be uint8 (F, H, W, 3), not {clip.dtype} {clip.shape}")
    picked = np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)
    height, width = clip.shape[1:3]
    scale = max(1, -(-_SMALLEST // min(height, width)))
    height, width = height * scale, width * scale
    lines = wrap_text(caption, _TEXT_WIDTH - 2 * _GAP, font)
    line_height = _FONT_SIZE + 4
    row = Image.new(
        "RGB",
        (
            _TEXT_WIDTH + len(picked) * (width + _GAP),
            max(height, len(lines) * line_height + _GAP) + _GAP,
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(row)
    for i, line in enumerate(lines):
        draw.text((_GAP, _GAP + i * line_height), line, _INK, font)
    for i, frame in enumerate(clip[picked]):
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        row.paste(image, (_TEXT_WIDTH + i * (width + _GAP), _GAP // 2))
    return row


def wrap_text(text: str, width: int, font: Font) -> list[str]:
    """Lines at most `width` pixels wide; a word that is wider is cut."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:
                cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
                lines += [line, word[:cut]] if line else [word[:cut]]
                line, word = "", word[cut:]
            longer = f"{line} {word}".strip()
            if font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
