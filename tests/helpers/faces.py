"""Attributes of rendered talking heads for tests."""

import random

from dalle2_video.faces.attributes import (
    ATTRIBUTES,
    FaceAttributes,
    all_combinations,
    draw_attributes,
    draw_combination,
)

BASE = FaceAttributes(
    hair_color="black", hair_style="short", beard="none", glasses="none", skin="light",
    clothing="green", emotion="neutral", action="nod", light_dir="front",
    light_intensity="bright", light_color_temp="neutral", action_start=0.3, action_length=0.7,
)  # fmt: skip


def some_attributes(count: int) -> list[FaceAttributes]:
    pool = frozenset(all_combinations())
    rngs = [random.Random(k) for k in range(count)]
    return [
        draw_attributes(r, draw_combination(r, r.choice(ATTRIBUTES["skin"]), pool)) for r in rngs
    ]
