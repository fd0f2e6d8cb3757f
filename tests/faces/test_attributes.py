"""The attributes of a talking head: what exists, and what is held out of training."""

import json
from dataclasses import replace

import pytest

from dalle2_video.faces.attributes import (
    APPEARANCE,
    ATTRIBUTES,
    FaceAttributes,
    all_combinations,
    held_out_combinations,
)
from tests.helpers.faces import BASE, some_attributes


def test_attributes_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match="clothing: 'pink'"):
        replace(BASE, clothing="pink")
    with pytest.raises(ValueError, match="bald head has none"):
        replace(BASE, hair_style="bald")
    with pytest.raises(ValueError, match="hair_color: None"):
        replace(BASE, hair_color=None)
    with pytest.raises(ValueError, match="leaves the clip"):
        replace(BASE, action_start=0.5, action_length=0.7)
    with pytest.raises(ValueError, match="emotion_change"):
        replace(BASE, emotion="neutral_then_happy")


def test_labels_and_rows_round_trip():
    for attributes in some_attributes(30):
        assert FaceAttributes.from_dict(json.loads(json.dumps(attributes.to_dict()))) == attributes
        for name, label in attributes.labels().items():
            value = getattr(attributes, name)
            assert (label == -1) if value is None else (ATTRIBUTES[name][label] == value)


def test_a_seeded_fifth_of_the_combinations_is_held_out():
    combinations, held = all_combinations(), held_out_combinations(0)
    assert len(combinations) == len(set(combinations)) == 336
    assert len(held) == 67 and held == held_out_combinations(0) != held_out_combinations(1)
    for place, name in enumerate(APPEARANCE):  # every value stays in training and is held out too
        values = {c[place] for c in combinations}
        assert values == {c[place] for c in held} == {c[place] for c in set(combinations) - held}
        assert values - {None} == set(ATTRIBUTES[name])
