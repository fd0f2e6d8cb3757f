"""The clips of an embedded data set before they are drawn: ids, people, splits and attributes.

Clip names are {11-character id}_{n}_{m}; all clips of an id show one person. The split of an id is
`split_of` (data/store). Clips of the split `heldout` show only held-out appearance combinations,
those of `train` none of them, those of `val` only combinations that some clip of `train` shows.
"""

import base64
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dalle2_video.config import ConfigError
from dalle2_video.data.store.splits import split_of
from dalle2_video.faces.attributes import (
    APPEARANCE,
    ATTRIBUTES,
    Combination,
    FaceAttributes,
    all_combinations,
    draw_attributes,
    draw_combination,
    held_out_combinations,
)

FRACTIONS = {"train": 0.85, "val": 0.075, "heldout": 0.075}


@dataclass(frozen=True)
class FaceClip:
    """One clip before it is drawn: everything that its frames and captions depend on.

    clip_id: {11-character id}_{n}_{m}. identity: number of the person, see `Identity.of`.
    """

    clip_id: str
    split: str
    identity: int
    attributes: FaceAttributes

    @property
    def seed(self) -> int:
        """Key of this clip's place in the frame, sway and blinks: a hash of its name, 48 bits."""
        return int.from_bytes(hashlib.blake2b(self.clip_id.encode(), digest_size=6).digest(), "big")

    def to_row(self, archive: str) -> dict[str, str | int | float | None]:
        """The clip's line of attributes.jsonl."""
        head = {"clip": self.clip_id, "split": self.split, "archive": archive}
        return head | {"identity": self.identity} | self.attributes.to_dict()


@dataclass(frozen=True)
class _Person:
    youtube_id: str
    split: str
    identity: int
    num_clips: int


def _people(
    num_clips: int, seed: int, fractions: Mapping[str, float], split_seed: int
) -> Iterator[_Person]:
    """People with 2 to 4 clips each, the last one perhaps fewer, num_clips in all."""
    index = 0
    while num_clips > 0:
        digest = hashlib.blake2b(f"id:{seed}:{index}".encode(), digest_size=9).digest()
        name = base64.urlsafe_b64encode(digest).decode()[:11]
        if index % 4 < 2:  # '_' and '-' stand in many real ids, so in every small set too
            place = digest[-1] % 11
            name = name[:place] + "_-"[index % 4] + name[place + 1 :]
        clips = min(num_clips, 2 + digest[0] % 3)
        identity = int.from_bytes(digest[:6], "big")
        yield _Person(name, split_of(name, split_seed, fractions), identity, clips)
        num_clips, index = num_clips - clips, index + 1


def _draw_looks(
    people: list[_Person], allowed: frozenset[Combination]
) -> dict[str, list[Combination]]:
    """Combinations of the clips of each person by id; the skin is the person's."""
    place = APPEARANCE.index("skin")
    skins = [skin for skin in ATTRIBUTES["skin"] if any(c[place] == skin for c in allowed)]
    looks = {}
    for person in people:
        rng = random.Random(f"look:{person.identity}")
        skin = rng.choice(skins)
        looks[person.youtube_id] = [
            draw_combination(rng, skin, allowed) for _ in range(person.num_clips)
        ]
    return looks


def plan(
    num_clips: int,
    seed: int,
    fractions: Mapping[str, float] = FRACTIONS,
    split_seed: int | None = None,
) -> list[FaceClip]:
    """All clips of a data set, in order; a pure function. Ids hold 2 to 4 clips each.

    fractions: split -> share of the ids, as `split_of` takes them. split_seed (None: `seed`) is the
    one that the readers of the data give to `split_of`. Raises ValueError for the old name `combo`,
    whose clips would not be of held-out combinations.
    """
    if "combo" in fractions:
        raise ConfigError("the split `combo` is called `heldout` now: rename it in data.splits")
    people = list(_people(num_clips, seed, fractions, seed if split_seed is None else split_seed))
    held_out = held_out_combinations(seed)
    pools = {"train": frozenset(all_combinations()) - held_out, "heldout": held_out}
    looks: dict[str, list[Combination]] = {}
    for split, pool in pools.items():
        looks |= _draw_looks([p for p in people if p.split == split], pool)
    seen = frozenset(c for p in people if p.split == "train" for c in looks[p.youtube_id])
    others = [p for p in people if p.split not in pools]
    # Before the first clip of train (tiny sets) any combination that train may draw will do.
    looks |= _draw_looks(others, seen or pools["train"])
    return [
        FaceClip(
            f"{person.youtube_id}_{k // 2}_{k % 2}",
            person.split,
            person.identity,
            draw_attributes(random.Random(f"clip:{seed}:{person.identity}:{k}"), look),
        )
        for person in people
        for k, look in enumerate(looks[person.youtube_id])
    ]
