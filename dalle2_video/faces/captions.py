"""Captions of the embedded talking heads: several lines for each of CelebV-Text's six categories.

Every line is true and shorter than 18 words. Each line of face40_details names hair,
beard, glasses, skin and clothing; each line of action_dur the action, and its time unless it fills
the clip. "left" and "right" are the viewer's. The words person, man and woman carry no meaning. The
colour of a bald head's hair is never named.
"""

import random

from dalle2_video.faces.attributes import FaceAttributes

# Folder names as in the released CelebV-Text archives.
CATEGORY_FOLDERS = (
    "action_dur",
    "emotion",
    "face40_details_new",
    "light_color_temp",
    "light_dir",
    "light_intensity",
)

WHO = ("person", "man", "woman")
BEARD = {"none": ("no beard", "a clean-shaven face"), "beard": ("a beard", "a full beard")}
GLASSES = {"none": ("no glasses",), "glasses": ("glasses", "thick glasses")}
SHIRT = ("shirt", "top", "sweater")

LOOK = (
    "A {who} with {a}, {b}, {c}, {d} and {e}.",
    "This {who} has {a}, {b}, {c}, {d} and {e}.",
    "The {who} shows {a}, {b}, {c}, {d} and {e}.",
    "We see {a}, {b}, {c}, {d} and {e}.",
    "Portrait of a {who}: {a}, {b}, {c}, {d}, {e}.",
    "{A}, {b}, {c}, {d}, {e}.",
)
FEELS = {
    "neutral": (
        "The {who} looks neutral.",
        "A {who} with a neutral face.",
        "The face of the {who} stays calm and neutral.",
        "The {who} shows no emotion.",
    ),
    "happy": (
        "The {who} looks happy and smiles.",
        "A smiling {who}.",
        "The {who} has a big happy smile.",
        "The {who} smiles all the time.",
    ),
    "sad": (
        "The {who} looks sad and frowns.",
        "A sad {who}.",
        "The {who} frowns with the mouth turned down.",
        "The {who} has a sad face.",
    ),
    "neutral_then_happy": (
        "The {who} is neutral at first, then smiles.",
        "At first neutral, the {who} starts to smile.",
        "The {who} starts to smile and looks happy in the end.",
        "A calm face turns into a happy smile.",
    ),
}
ACTS = {
    "turn_left": ("turns left", "turns the head to the left", "looks to the left"),
    "turn_right": ("turns right", "turns the head to the right", "looks to the right"),
    "nod": ("nods", "nods the head", "moves the head down and up"),
    "tilt": ("tilts the head", "tilts the head to the side", "leans the head sideways"),
    "talk": ("talks", "is talking", "speaks"),
}
WHEN = {
    "first": ("At first the {who} {act}.", "The {who} {act} at first.", "A {who} {act} first."),
    "end": ("In the end the {who} {act}.", "The {who} {act} in the end.", "A {who} {act} at last."),
    "whole": ("The {who} {act} all the time.", "A {who} {act} throughout.", "The {who} {act}."),
}
SPAN = (
    "The {who} {act} from {start} to {end} seconds.",
    "From {start} to {end} s the {who} {act}.",
    "Starting at {start} seconds, the {who} {act} for {length} seconds.",
)
LIGHT_DIR = {
    "left": (
        "The light comes from the left.",
        "Light from the left side.",
        "The face is lit from the left.",
        "Strong light from the left side.",
    ),
    "right": (
        "The light comes from the right.",
        "Light from the right side.",
        "The face is lit from the right.",
        "Strong light from the right side.",
    ),
    "front": (
        "The light comes from the front.",
        "Light from the front.",
        "The face is lit from the front.",
        "Frontal light without shadows.",
    ),
}
LIGHT_INTENSITY = {
    "bright": (
        "The light is bright.",
        "Bright light.",
        "The scene is brightly lit.",
        "The picture is bright.",
    ),
    "dim": ("The light is dim.", "Dim light.", "The scene is dimly lit.", "The picture is dark."),
}
LIGHT_COLOR_TEMP = {
    "warm": (
        "The light is warm.",
        "Warm light.",
        "The light has a warm orange colour.",
        "The scene has a warm tone.",
    ),
    "cold": (
        "The light is cold.",
        "Cold light.",
        "The light has a cold blue colour.",
        "The scene has a cold tone.",
    ),
    "neutral": (
        "The light is white.",
        "White light.",
        "The light has a neutral white colour.",
        "The scene has a neutral tone.",
    ),
}


def write_captions(attributes: FaceAttributes, seconds: float, seed: str) -> dict[str, list[str]]:
    """Lines of each folder of CATEGORY_FOLDERS for a clip of that length; pure in its arguments."""
    rng = random.Random(f"captions:{seed}")
    lines = {
        "action_dur": _action_lines(rng, attributes, seconds),
        "emotion": [_phases(attributes, seconds), *_told(rng, FEELS[attributes.emotion], 3)],
        "face40_details_new": [_look_line(rng, form, attributes) for form in rng.sample(LOOK, 4)],
        "light_color_temp": _told(rng, LIGHT_COLOR_TEMP[attributes.light_color_temp], 3),
        "light_dir": _told(rng, LIGHT_DIR[attributes.light_dir], 3),
        "light_intensity": _told(rng, LIGHT_INTENSITY[attributes.light_intensity], 3),
    }
    return {folder: lines[folder] for folder in CATEGORY_FOLDERS}


def timing(attributes: FaceAttributes) -> str:
    """first, end or whole: which words name the time of the action."""
    if attributes.action_start + attributes.action_length < 0.95:
        return "first"
    return "end" if attributes.action_start > 0.05 else "whole"


def _told(rng: random.Random, forms: tuple[str, ...], count: int) -> list[str]:
    return [form.format(who=rng.choice(WHO)) for form in rng.sample(forms, count)]


def _phases(attributes: FaceAttributes, seconds: float) -> str:
    """The first line of an emotion file: comma-separated phases with begin and end in seconds."""
    if attributes.emotion_change is None:
        return f"{attributes.emotion} 0.0 to {seconds:.1f} s"
    change = attributes.emotion_change * seconds
    return f"neutral 0.0 to {change:.1f} s, happy {change:.1f} to {seconds:.1f} s"


def _action_lines(rng: random.Random, attributes: FaceAttributes, seconds: float) -> list[str]:
    forms = [*rng.sample(WHEN[timing(attributes)], 3), rng.choice(SPAN)]
    return [
        form.format(
            who=rng.choice(WHO),
            act=rng.choice(ACTS[attributes.action]),
            start=f"{attributes.action_start * seconds:.1f}",
            end=f"{(attributes.action_start + attributes.action_length) * seconds:.1f}",
            length=f"{attributes.action_length * seconds:.1f}",
        )
        for form in forms
    ]


def _look_line(rng: random.Random, form: str, attributes: FaceAttributes) -> str:
    if attributes.hair_style == "bald":
        hair = rng.choice(("a bald head", "no hair"))
    else:
        hair = f"{attributes.hair_style} {attributes.hair_color} hair"
    facts = [
        hair,
        rng.choice(BEARD[attributes.beard]),
        rng.choice(GLASSES[attributes.glasses]),
        f"{attributes.skin} skin",
        f"a {attributes.clothing} {rng.choice(SHIRT)}",
    ]
    rng.shuffle(facts)
    first = facts[0][0].upper() + facts[0][1:]
    return form.format(who=rng.choice(WHO), A=first, **dict(zip("abcde", facts, strict=True)))
