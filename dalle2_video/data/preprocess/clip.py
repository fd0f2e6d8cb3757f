"""What a worker makes of one clip: its frames as the store keeps them, and its lines of text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_video.data.config import StoreSettings
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.encode import encode_window
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.image import decode_image, is_animated
from dalle2_video.data.sources.captions import CaptionError, read_text, split_line, to_line
from dalle2_video.data.sources.listing import TEXT_BYTES
from dalle2_video.data.sources.member import ArchiveError, Member
from dalle2_video.data.sources.pairs import JSON
from dalle2_video.data.sources.source import Texts
from dalle2_video.data.sources.suffixes import IMAGE_SUFFIXES
from dalle2_video.data.sources.table import captions_of
from dalle2_video.data.store.shard import TIMESTAMPS

Lines = dict[str, list[tuple[str, tuple[int, ...]]]]  # category -> lines with their tokens


@dataclass(frozen=True)
class TextRules:
    """How the texts of a source are read: the categories that every clip should have, and the keys
    of a JSON text that hold captions (None: all with words).
    """

    categories: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None


def make_clip(
    clip: str,
    member: Member,
    data: bytes | None,
    texts: Texts,
    rules: TextRules,
    settings: StoreSettings,
) -> tuple[dict[str, Any], list[np.ndarray] | None]:
    """What the journal lists of a clip, and its windows as stored, or None. Runs in a worker.

    data: the bytes of the video; None: `member` reads them.
    """
    lines, notes, lines_split = read_texts(texts, clip, rules)
    entry: dict[str, Any] = {"notes": notes} if notes else {}
    if not lines:
        return {**entry, "cause": "without text: no category has a usable file"}, None
    try:
        file = _file(member, data)
        if member.name.lower().endswith(IMAGE_SUFFIXES) and not is_animated(file):
            made, windows = _still(file, settings)
        else:
            made, windows = _windows(file, settings)
    except (ClipError, ArchiveError) as error:
        return {**entry, "cause": str(error)}, None
    except Exception as error:  # whatever a damaged file sets off: it must not end a run of 70,000
        return {**entry, "cause": f"unreadable: {type(error).__name__}: {error}"}, None
    return {**entry, **made, "lines": lines, "lines_split": lines_split}, windows


def _windows(
    file: bytes | Path, settings: StoreSettings
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is listed of a video, and its windows as stored."""
    s = settings
    decoded = decode_clip(file, s.fps, s.num_frames, s.size, 0.0, s.span, s.windows)
    seconds = decoded.timestamps.round(6).tolist()
    made: dict[str, Any] = {"seconds": [seconds[0], seconds[-1]]}
    made[TIMESTAMPS] = decoded.timestamps.reshape(-1, s.num_frames).tolist()
    if decoded.converted:
        made["converted"] = list(decoded.converted)
    frames = decoded.frames.reshape(-1, *s.shape)
    if s.encoding == "h264":
        return made, [encode_window(window, s.fps) for window in frames]
    return made, list(frames)


def _still(file: bytes | Path, settings: StoreSettings) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is listed of an image, and itself."""
    square = decode_image(file, settings.size)
    made: dict[str, Any] = {"image": True}
    if square.converted:
        made["converted"] = list(square.converted)
    return made, [square.image]


def _file(member: Member, data: bytes | None) -> bytes | Path:
    """What is decoded: a path where there is one, else bytes."""
    if member.size == 0:
        raise ArchiveError("an empty file")
    if member.kind == "folder":
        return Path(member.archive) / member.name
    return member.read() if data is None else data


def read_texts(
    texts: Texts, clip: str, rules: TextRules
) -> tuple[Lines, list[dict[str, str]], int]:
    """(lines with their tokens by category, files left out and why, lines that were split)."""
    lines: Lines = {}
    notes = []
    lines_split = 0
    for category in dict.fromkeys((*rules.categories, *texts)):
        member = texts.get(category)
        cause = "missing"
        if member is not None:
            try:
                for name, whole in _captions(member, category, rules).items():
                    pieces = [split_line(line) for line in whole]
                    found = [to_line(piece) for line in pieces for piece in line]
                    lines[name] = [(line.text, line.tokens) for line in found]
                    lines_split += sum(len(line) > 1 for line in pieces)
                continue
            except (CaptionError, ArchiveError) as error:
                cause = str(error)
        file = member.name if member is not None else f"{category}/{clip}.txt"
        notes.append({"clip": clip, "category": category, "file": file, "cause": cause})
    return lines, notes, lines_split


def _captions(member: Member, category: str, rules: TextRules) -> dict[str, list[str]]:
    """Category -> lines of one file: that category's, or those of the keys of a JSON text."""
    data = member.read()
    if member.kind != "cell" and len(data) > TEXT_BYTES:
        raise CaptionError(f"too large for a caption: more than {TEXT_BYTES >> 20} MB")
    if category != JSON:
        return {category: read_text(data)}
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"no JSON: {error}") from error
    found = captions_of(value, rules.columns) if isinstance(value, dict) else {}
    if not found:
        raise CaptionError("no key of the JSON holds a caption")
    return {name: read_text("\n".join(texts).encode()) for name, texts in found.items()}
