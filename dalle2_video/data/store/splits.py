"""Which split a clip belongs to: a pure function of its video's id and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from dalle2_video.config import ConfigError


def split_of(youtube_id: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of everything that comes from one video: a pure function of (id, seed).

    The id's hash gives a number in [0, 1), which falls into the cumulated fractions in the order
    of the mapping. So clips of one person in one video stay together, and adding archives later
    moves nobody.
    """
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or abs(total - 1) > 1e-6:
        raise ConfigError(f"split fractions must be at least 0 and sum to 1: {dict(fractions)}")
    digest = hashlib.blake2b(f"{seed}/{youtube_id}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if point < edge:
            return name
    return [name for name in fractions if fractions[name] > 0][-1]


def youtube_id(clip_id: str) -> str:
    """The first 11 characters of a clip id, always: an id itself may hold '_' and '-'."""
    return clip_id[:11]
