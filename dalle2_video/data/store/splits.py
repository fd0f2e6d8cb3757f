"""Which split a clip belongs to: a pure function of its group and a seed.

The group is the video's id in CelebV-Text, a column of a table, else the clip itself: whatever
belongs to one group stays on one side.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dalle2_video.config import ConfigError


@dataclass(frozen=True)
class Splits:
    """of_group: group -> split. warnings: what a user should know of them, in words."""

    of_group: dict[str, str]
    warnings: list[str]


def split_of(group: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of everything that belongs to one group: a pure function of (group, seed).

    The group's hash gives a number in [0, 1), which falls into the cumulated fractions in the order
    of the mapping. So clips of one person in one video stay together, and adding archives later
    moves nobody.
    """
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or abs(total - 1) > 1e-6:
        raise ConfigError(f"split fractions must be at least 0 and sum to 1: {dict(fractions)}")
    point = _point(group, seed)
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if point < edge:
            return name
    return [name for name in fractions if fractions[name] > 0][-1]


def assign_splits(groups: Iterable[str], seed: int, fractions: Mapping[str, float]) -> Splits:
    """The split of every group: `split_of`, except that no split that has a share stays empty where
    there are groups enough.

    groups: that of each clip. An empty split takes the smallest group of the split that has the
    most, and of equal ones that whose number is nearest to its own share of [0, 1). So only sets of
    a few groups differ from `split_of`, and in those a group may change its split when others come.
    """
    sizes = Counter(groups)
    found = {group: split_of(group, seed, fractions) for group in sorted(sizes)}
    count = Counter(found.values())
    wanted = [name for name, fraction in fractions.items() if fraction > 0]
    moved = []
    for name in wanted:
        rich, most = max(count.items(), key=lambda item: item[1], default=("", 0))
        if count[name] or most < 2:
            continue
        middle = _middle(name, fractions)
        mine = [group for group, split in found.items() if split == rich]
        nearest = min(mine, key=lambda one: (sizes[one], abs(_point(one, seed) - middle), one))
        found[nearest] = name
        count[name] += 1
        count[rich] -= 1
        moved.append(f"{nearest} ({name})")
    warnings = []
    if moved:
        warnings.append(
            f"{len(found)} groups are few for the splits {', '.join(wanted)}: "
            f"{', '.join(moved)} moved into what had none, and may move again when data are added"
        )
    if empty := [name for name in wanted if not count[name]]:
        warnings.append(
            f"empty: {', '.join(empty)}, since the number of groups is {len(found)}; ask for fewer "
            "splits, such as data.splits={train: 1.0}"
        )
    return Splits(found, warnings)


def youtube_id(clip_id: str) -> str:
    """The first 11 characters of a clip id of CelebV-Text, always: an id itself may hold '_'."""
    return clip_id[:11]


def _point(group: str, seed: int) -> float:
    """A number in [0, 1) that the group and the seed decide."""
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _middle(name: str, fractions: Mapping[str, float]) -> float:
    """The middle of a split's share of [0, 1)."""
    names = list(fractions)
    before = sum(fractions[other] for other in names[: names.index(name)])
    return before + fractions[name] / 2
