"""Picture files with known content: PNG, JPEG and WebP, still and animated, and colour profiles."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.media import PATCHES

TILES = np.kron(PATCHES, np.ones((16, 16, 1), np.uint8))


def saved(picture: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(codes: np.ndarray, hidden: bytes = b"") -> bytes:
    """A 16-bit PNG of (H, W) grey or (H, W, 3) RGB codes, which Pillow cannot all write."""
    colour = 2 if codes.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", codes.shape[1], codes.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in codes)
    parts = [chunk(b"IHDR", head), chunk(b"tRNS", hidden) if hidden else b""]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}}


def gamma_profile(gamma: float, space: bytes) -> bytes:
    """An ICC version 2 profile of sRGB's primaries, or of grey, with a pure gamma curve."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * value)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    text = b"gamma\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249),
    }
    if space == b"RGB ":  # sRGB's, adapted to D50
        columns = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708)]
        columns.append((0.14307, 0.06061, 0.71410))
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
            tags[name] = b"XYZ " + bytes(4) + s15(*xyz)
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags[b"kTRC"] = curve
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI", place + len(body), b"lcms", 0x02400000)
    head += b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += s15(0.9642, 1.0, 0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def animation(form: str, durations: list[int], alpha: int = 255, **options: Any) -> bytes:
    """Frame k is the grey 20 k on one half, and everywhere of one alpha; durations in ms."""
    frames = []
    for k in range(len(durations)):
        image = np.full((32, 32, 4), alpha, np.uint8)
        image[..., :3] = 20 * k
        image[:, 16:, :3] = 20 * k + 10
        frames.append(Image.fromarray(image if alpha < 255 else image[..., :3].copy()))
    lossless = {"lossless": True} if form == "WEBP" else {}
    more = {"append_images": frames[1:], "duration": durations, **lossless, **options}
    return saved(frames[0], form, save_all=True, **more)
