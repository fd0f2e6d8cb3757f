"""Damaged files, drawn from a seed: real videos, and what becomes of files on the way."""

from __future__ import annotations

import random

import numpy as np

from tests.helpers.files import pack
from tests.helpers.media import write_video


def real_video(seed: int) -> bytes:
    """A few kilobytes of H.264 with motion, reordered frames and its index in front."""
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    images = np.stack(
        [np.roll(np.kron(base, np.ones((2, 2, 1), np.uint8)), k, 1) for k in range(15)]
    )
    options = {"preset": "medium", "qp": "30"}
    return write_video(images, pix_fmt="yuv420p", codec_options=options, faststart=bool(seed % 2))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One kind of damage: flipped bits, a cut, zeros, a doubled or lost stretch, absurd numbers."""
    changed = bytearray(data)
    kind = draw.randrange(6)
    place, length = draw.randrange(len(changed)), draw.randrange(1, 400)
    if kind == 0:
        for _ in range(draw.choice((1, 10, 100))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[place:]
    elif kind == 2:
        changed[place : place + length] = bytes(min(length, len(changed) - place))
    elif kind == 3:
        changed[place:place] = changed[place : place + length]
    elif kind == 4:
        del changed[place : place + length]
    else:  # sizes and counts in the head that promise the impossible
        for _ in range(draw.choice((1, 4))):
            spot = draw.randrange(max(1, min(len(changed), 1500) - 4))
            changed[spot : spot + 4] = draw.choice(
                (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4))
            )
    return bytes(changed)


def strange(draw: random.Random) -> bytes:
    """A file that is no video at all, under a video's name."""
    kind = draw.randrange(4)
    if kind == 0:
        return b""
    if kind == 1:
        return draw.randbytes(draw.randrange(1, 5000))
    if kind == 2:
        return pack("x.zip", {"a.txt": b"text"})
    return b"<html><body>log in first</body></html>" * draw.randrange(1, 50)
