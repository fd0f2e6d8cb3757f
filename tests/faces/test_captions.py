"""Captions of the rendered clips: every line is true, and names what it must."""

import re
from dataclasses import replace

from dalle2_video.faces.captions import CATEGORY_FOLDERS, WHO, write_captions
from tests.helpers.faces import BASE, some_attributes


def words(lines: list[str]) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(lines).lower()))


def test_captions_name_the_truth_and_nothing_else():
    light = {
        "light_dir": ({"left"}, {"right"}, {"front", "frontal"}),
        "light_intensity": ({"bright", "brightly"}, {"dim", "dimly", "dark"}),
        "light_color_temp": ({"warm"}, {"cold"}, {"white", "neutral"}),
    }
    for k, attributes in enumerate(some_attributes(200)):
        captions = write_captions(attributes, 2.0, str(k))
        assert tuple(captions) == CATEGORY_FOLDERS
        for lines in captions.values():
            assert len(lines) >= 3 and len(set(lines)) == len(lines)
            assert all(line.strip() and len(line.split()) < 18 for line in lines)
            assert "{" not in " ".join(lines)
        for folder, groups in light.items():
            label = attributes.labels()[folder]
            for line in captions[folder]:
                for place, group in enumerate(groups):
                    assert bool(words([line]) & group) == (place == label), line
        for line in captions["face40_details_new"]:
            said = words([line])
            bald = attributes.hair_style == "bald"
            assert ("bald" in said or "no hair" in line.lower()) == bald
            colours = said & {"black", "blond"} | ({"red"} if "red hair" in line else set())
            assert colours == (set() if bald else {attributes.hair_color})
            assert (attributes.hair_style in said) or bald
            bearded = "beard" in said and "no beard" not in line.lower()
            assert bearded == (attributes.beard == "beard")
            spectacled = "no glasses" not in line.lower()
            assert "glasses" in said and spectacled == (attributes.glasses == "glasses")
            assert f"{attributes.skin} skin" in line.lower()
            assert re.search(rf"{attributes.clothing} (shirt|top|sweater)", line)
        action = words(captions["action_dur"])
        verbs = {"nod": "nods", "talk": "talks", "tilt": "tilts"}
        sides = {"turn_left": {"left"}, "turn_right": {"right"}}.get(attributes.action, set())
        assert action & {"left", "right"} == sides
        for name, verb in verbs.items():
            assert not (verb in action and attributes.action != name)
        emotion = captions["emotion"]
        smiles = words(emotion) & {"smile", "smiles", "smiling", "happy"}
        assert bool(smiles) == ("happy" in attributes.emotion)
        assert ("sad" in words(emotion)) == (attributes.emotion == "sad")


def test_emotion_phases_and_action_times_are_in_seconds():
    changed = replace(BASE, emotion="neutral_then_happy", emotion_change=0.45)
    captions = write_captions(changed, 4.0, "x")
    assert captions["emotion"][0] == "neutral 0.0 to 1.8 s, happy 1.8 to 4.0 s"
    spoken = " ".join(captions["action_dur"])
    assert "1.2" in spoken and ("end" in spoken or "last" in spoken)
    first = " ".join(write_captions(replace(BASE, action_start=0.0, action_length=0.6), 2.0, "x")
                     ["action_dur"])  # fmt: skip
    assert "first" in first and "1.2" in first


def test_person_man_and_woman_carry_no_meaning():
    counts = dict.fromkeys(WHO, 0)
    for k, attributes in enumerate(some_attributes(300)):
        bearded = replace(attributes, beard="beard")
        lines = write_captions(bearded, 2.0, str(k))["face40_details_new"]
        for who in WHO:
            counts[who] += who in words(lines)
    assert min(counts.values()) > 0.7 * max(counts.values())


def test_every_action_line_places_the_action_in_time():
    """In words (first, end, or neither for the whole clip), or from when to when in seconds."""
    spans = {"first": [(0.0, 0.6), (0.0, 0.7)], "end": [(0.3, 0.7), (0.4, 0.6)], "whole": [(0, 1)]}
    forms = set()
    for when, times in spans.items():
        for k, (start, length) in enumerate(times * 20):
            shown = replace(BASE, action_start=start, action_length=length)
            *told, span = write_captions(shown, 3.0, f"{when}{k}")["action_dur"]
            for line in told:
                said = words([line])
                assert bool(said & {"first"}) == (when == "first"), line
                assert bool(said & {"end", "last"}) == (when == "end"), line
            found = [float(number) for number in re.findall(r"\d+\.\d", span)]
            begin, end = (round(3 * a, 1) for a in (start, start + length))
            forms.add("for" in words([span]))
            assert found == [begin, round(3 * length, 1) if "for" in words([span]) else end], span
    assert forms == {True, False}
