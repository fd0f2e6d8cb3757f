"""Attributes of the embedded talking heads: their values, combinations and seeded draws.

"left" and "right" are always those of the viewer: turn_left moves the nose towards the left edge of
the image, light_dir left brightens the left side of the image.

An appearance combination is (hair_color, hair_style, beard, glasses, clothing, skin). A seeded
fifth of all combinations is held out: clips of the split `heldout` show no others, and all other
clips none of them.
"""

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair_color": ("black", "blond", "red"),
    "hair_style": ("bald", "short", "long"),
    "beard": ("none", "beard"),
    "glasses": ("none", "glasses"),
    "skin": ("light", "medium", "dark"),
    "clothing": ("red", "green", "blue", "white"),
    "emotion": ("neutral", "happy", "sad", "neutral_then_happy"),
    "action": ("turn_left", "turn_right", "nod", "tilt", "talk"),
    "light_dir": ("left", "right", "front"),
    "light_intensity": ("bright", "dim"),
    "light_color_temp": ("warm", "cold", "neutral"),
}
APPEARANCE = ("hair_color", "hair_style", "beard", "glasses", "clothing", "skin")
UNDEFINED = -1  # label of hair_color where the head is bald

Combination = tuple[str | None, ...]


@dataclass(frozen=True)
class FaceAttributes:
    """What a clip shows.

    hair_color is None exactly for bald heads. action_start, action_length and emotion_change (when
    neutral_then_happy begins to smile; None otherwise) are fractions of the clip in [0, 1].
    Raises ValueError for a value outside ATTRIBUTES or a time outside the clip.
    """

    hair_color: str | None
    hair_style: str
    beard: str
    glasses: str
    skin: str
    clothing: str
    emotion: str
    action: str
    light_dir: str
    light_intensity: str
    light_color_temp: str
    action_start: float = 0.0
    action_length: float = 1.0
    emotion_change: float | None = None

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            value = getattr(self, name)
            if name == "hair_color" and self.hair_style == "bald":
                if value is not None:
                    raise ValueError("hair_color: a bald head has none, give None")
            elif value not in values:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(values)}")
        if not (0 <= self.action_start and 0 < self.action_length) or (
            self.action_start + self.action_length > 1 + 1e-6
        ):
            raise ValueError(
                f"action from {self.action_start} for {self.action_length} leaves the clip (0 to 1)"
            )
        if (self.emotion == "neutral_then_happy") != (self.emotion_change is not None):
            raise ValueError("emotion_change belongs to neutral_then_happy and to nothing else")

    @property
    def combination(self) -> Combination:
        return tuple(getattr(self, name) for name in APPEARANCE)

    def labels(self) -> dict[str, int]:
        """Index of each value in ATTRIBUTES; UNDEFINED for the hair colour of a bald head."""
        return {
            name: UNDEFINED if (value := getattr(self, name)) is None else values.index(value)
            for name, values in ATTRIBUTES.items()
        }

    def to_dict(self) -> dict[str, str | float | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict) -> "FaceAttributes":
        """Inverse of to_dict; further keys of `row` (clip id, split) are left alone."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


def all_combinations() -> list[Combination]:
    """All appearance combinations, 336 with bald heads counted once per colourless look."""
    pools = [ATTRIBUTES[name] if name != "hair_color" else (None, *ATTRIBUTES[name])
             for name in APPEARANCE]  # fmt: skip
    return [c for c in product(*pools) if (c[0] is None) == (c[1] == "bald")]


@cache
def held_out_combinations(seed: int, share: float = 0.2) -> frozenset[Combination]:
    """The `share` of all combinations that training never sees: those with the smallest hashes.

    Of 64 seeded hashes the one is taken under which clips of held-out combinations show all values
    of each attribute most evenly; else the majority alone could look like an accuracy.
    """

    def order(salt: int, combination: Combination) -> bytes:
        text = f"{seed}:{salt}:{'/'.join(map(str, combination))}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    count, pool = round(share * len(all_combinations())), all_combinations()
    sets = (frozenset(sorted(pool, key=partial(order, salt))[:count]) for salt in range(64))
    return min(sets, key=_unevenness)


def _unevenness(held: frozenset[Combination]) -> float:
    """Largest relative excess of any value over its even share, as `draw_combination` draws."""
    at = {name: place for place, name in enumerate(APPEARANCE)}
    excess = {name: dict.fromkeys(ATTRIBUTES[name], 0.0) for name in APPEARANCE}
    for skin in ATTRIBUTES["skin"]:
        looks = [c for c in held if c[at["skin"]] == skin]
        if not looks:
            return math.inf
        # a bald look stands for draws of every hair colour
        weights = [len(ATTRIBUTES["hair_color"]) if c[0] is None else 1 for c in looks]
        for look, weight in zip(looks, weights, strict=True):
            for name, place in at.items():
                value = look[place]
                if value is not None:
                    excess[name][value] += weight / sum(weights)
    return max(
        max(shares.values()) * len(shares) / sum(shares.values()) - 1 for shares in excess.values()
    )


def draw_combination(rng: random.Random, skin: str, allowed: frozenset[Combination]) -> Combination:
    """Draw a look with the given skin, every attribute evenly, repeated until it is `allowed`.

    Raises ValueError when no allowed combination has this skin.
    """
    if not any(c[APPEARANCE.index("skin")] == skin for c in allowed):
        raise ValueError(f"no allowed combination has {skin} skin")
    while True:
        look = {name: rng.choice(ATTRIBUTES[name]) for name in APPEARANCE} | {"skin": skin}
        drawn = tuple(
            None if name == "hair_color" and look["hair_style"] == "bald" else look[name]
            for name in APPEARANCE
        )
        if drawn in allowed:
            return drawn


def draw_attributes(rng: random.Random, combination: Combination) -> FaceAttributes:
    """Everything that is no appearance, drawn evenly and independently of the combination."""
    look = dict(zip(APPEARANCE, combination, strict=True))
    rest = {name: rng.choice(ATTRIBUTES[name]) for name in ATTRIBUTES if name not in APPEARANCE}
    start, length = draw_timing(rng)
    late = rest["emotion"] == "neutral_then_happy"
    change = rng.choice((0.4, 0.45, 0.5)) if late else None
    return FaceAttributes(
        **look, **rest, action_start=start, action_length=length, emotion_change=change
    )


def draw_timing(rng: random.Random) -> tuple[float, float]:
    """Start and length (fractions of the clip): at first, in the end, or all the time."""
    when = rng.choice(("first", "end", "whole"))
    if when == "first":
        return 0.0, rng.choice((0.6, 0.65, 0.7))
    if when == "end":
        start = rng.choice((0.3, 0.35, 0.4))
        return start, round(1 - start, 2)
    return 0.0, 1.0
