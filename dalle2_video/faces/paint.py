"""What is painted on the head: eyes, brows, mouth, beard, glasses and the strands of the hair.

All distances are in face coordinates (U, V), in units of the head's half width; |U| mirrors the
eyes, brows and glasses exactly. Expression: smile in [-1, 1], open and blink in [0, 1], per frame.
"""

from dataclasses import dataclass

import numpy as np

from dalle2_video.faces.attributes import FaceAttributes
from dalle2_video.faces.identity import Identity
from dalle2_video.faces.motion import FloatArray, Motion, smoothstep

Colour = tuple[float, float, float]

SKIN: dict[str, Colour] = {
    "light": (0.97, 0.80, 0.69),
    "medium": (0.74, 0.50, 0.34),
    "dark": (0.47, 0.29, 0.19),
}
EYE_V, BROW_V, MOUTH_V = -0.10, -0.42, 0.62


@dataclass(frozen=True)
class FacePaint:
    """All that the features depend on; `pixel` is the width of a pixel in face units."""

    attributes: FaceAttributes
    person: Identity
    pose: Motion
    skin: Colour
    hair: Colour
    pixel: float


def skin_colour(name: str, shift: float) -> Colour:
    """Albedo in [0, 1] of a skin tone, `shift` lighter."""
    red, green, blue = SKIN[name]
    return (red + shift, green + shift, blue + shift)


def cover(distance: FloatArray, pixel: FloatArray | float) -> FloatArray:
    """Coverage of a pixel whose centre lies `distance` outside an edge (negative inside)."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def strands(phase: FloatArray, rate: FloatArray | float) -> FloatArray:
    """Brightness of combed hair; each wave fades before it aliases (`rate` in radians a pixel)."""
    out = np.ones_like(phase)
    for factor, amount in ((1.0, 0.10), (2.3, 0.10), (4.1, 0.09)):
        fade = np.clip(1.6 - np.asarray(rate) * factor * 0.8, 0, 1)
        if fade.max() == 0:
            break
        out = out + amount * fade * np.sin(phase * factor + 2 * factor)
    return out


def paint_face(paint: FacePaint, u: FloatArray, v: FloatArray, w: FloatArray) -> list[FloatArray]:
    """Albedo planes [red, green, blue], each (F,H,W), of the head's surface."""
    front = np.clip(w * 6 - 0.3, 0, 1)
    planes = [np.full(u.shape, tone, np.float32) for tone in paint.skin]
    side = np.abs(u)
    if paint.attributes.beard == "beard":
        _beard(paint, planes, u, v, w)
    _eyes(paint, planes, side, v, front)
    _brows(paint, planes, side, v, front)
    _mouth(paint, planes, u, v, front)
    if paint.attributes.glasses == "glasses":
        _glasses(paint, planes, u, v, w)
    return planes


def _put(planes: list[FloatArray], colour: Colour, alpha: FloatArray) -> None:
    for plane, tone in zip(planes, colour, strict=True):
        plane += alpha * (np.float32(tone) - plane)


def _mix(first: Colour, second: Colour, amount: float) -> Colour:
    red, green, blue = (p + amount * (q - p) for p, q in zip(first, second, strict=True))
    return red, green, blue


def _ellipse(du: FloatArray, dv: FloatArray, ru: float, rv: FloatArray | float) -> FloatArray:
    """About the distance to an ellipse with half axes ru, rv."""
    return (np.sqrt((du / ru) ** 2 + (dv / rv) ** 2) - 1) * np.minimum(ru, rv)


def _eyes(paint, planes, side, v, front) -> None:
    """White, iris, pupil and lid; a smile narrows the eyes, a frown drops their outer halves."""
    person, pose = paint.person, paint.pose
    frown = np.maximum(-pose.smile, 0)
    width = 0.185 * person.eye_size
    height = (0.125 * person.eye_size) * (1 - 0.2 * np.abs(pose.smile)) * (1 - pose.blink) + 0.004
    du, dv = side - person.eye_spacing, v - EYE_V
    arch = height * np.sqrt(np.maximum(1 - (du / width) ** 2, 0))
    lid = np.maximum(-arch, height * (frown * (0.75 + 0.75 * du / width) - 1))
    opening = np.maximum(_ellipse(du, dv, width, height), lid - dv)
    white = cover(opening, paint.pixel) * front
    _put(
        planes,
        _mix(paint.skin, (0.1, 0.05, 0.05), 0.55),
        cover(opening - 0.035, paint.pixel) * front,
    )
    _put(planes, (0.96, 0.96, 0.95), white)
    distance = np.sqrt(du**2 + dv**2)
    iris = 0.098 * person.eye_size
    _put(planes, person.iris, cover(distance - iris, paint.pixel) * white)
    _put(planes, (0.02, 0.02, 0.02), cover(distance - 0.5 * iris, paint.pixel) * white)
    lash = np.maximum(np.abs(dv - lid) - 0.022, np.abs(du) - width * 1.05)
    _put(planes, (0.10, 0.06, 0.05), cover(lash, paint.pixel) * front)


def _brows(paint, planes, side, v, front) -> None:
    """Inner ends rise and outer ends drop with a frown; both rise with a smile."""
    smile = paint.pose.smile
    frown, joy = np.maximum(-smile, 0), np.maximum(smile, 0)
    du = (side - paint.person.eye_spacing) / 0.25
    line = BROW_V - 0.08 * joy - 0.02 * frown + (0.05 + 0.06 * joy) * du**2 + 0.22 * frown * du
    thick = 0.065 * paint.person.brow * (1 - 0.35 * np.clip(du, 0, 1))
    distance = np.maximum(np.abs(v - line) - thick, (np.abs(du) - 1) * 0.25)
    colour = _mix(paint.hair, (0.13, 0.08, 0.05), 0.6)
    _put(planes, colour, cover(distance, paint.pixel) * front)


def _mouth(paint, planes, u, v, front) -> None:
    """Lips around an opening: a smile bends up and shows teeth, a frown bends down."""
    pose = paint.pose
    frown, joy = np.maximum(-pose.smile, 0), np.maximum(pose.smile, 0)
    width = (0.34 + 0.22 * joy + 0.10 * frown - 0.04 * pose.open) * paint.person.mouth_width
    s = np.clip(u / width, -1, 1)
    dome = 1 - s**2
    corner = MOUTH_V - 0.19 * joy + 0.24 * frown  # height of the corners
    upper = corner + dome * (0.09 * joy - 0.33 * frown - 0.09 * pose.open)
    lower = corner + dome * (
        0.42 * joy - 0.20 * frown + (0.44 - 0.20 * joy - 0.14 * frown) * pose.open
    )
    ends = np.abs(u) - width
    inside = np.maximum(np.maximum(upper - v, v - lower), ends)
    lip = 0.05 + 0.05 * dome * (1 - 0.5 * joy)
    lips = np.maximum(np.maximum(upper - v, v - lower) - lip, ends - 0.03)
    rose = _mix(paint.skin, (0.86, 0.22, 0.25), 0.72)
    _put(planes, rose, cover(lips, paint.pixel) * front)
    seam = np.maximum(np.abs(v - 0.5 * (upper + lower)) - 0.022, ends)
    _put(planes, (0.20, 0.05, 0.06), cover(np.minimum(seam, inside), paint.pixel) * front)
    teeth = np.maximum(inside + 0.012, v - upper - 0.05 - 0.25 * joy * dome)
    shown = np.clip(3 * joy + 1.5 * pose.open, 0, 1)
    _put(planes, (0.98, 0.97, 0.94), cover(teeth, paint.pixel) * front * shown)


def _beard(paint, planes, u, v, w) -> None:
    """Jaw, chin and upper lip, up to the ears; darker than the hair, ragged at its edge."""
    side = np.abs(u)
    dip = np.maximum(1 - ((side - 0.46) / 0.24) ** 2, 0)  # between moustache and cheek
    line = 0.41 + 0.15 * dip * dip - 0.55 * smoothstep(0.5, 0.95, side) + 0.015 * np.cos(31 * u)
    distance = np.maximum(line - v, -0.25 - w)
    soft = np.maximum(paint.pixel, 0.05)
    colour = _mix(paint.hair, (0.10, 0.065, 0.05), 0.72)
    _put(planes, colour, cover(distance, soft) * np.clip(w * 4 + 1.2, 0, 1))


def _glasses(paint, planes, u, v, w) -> None:
    """Two thick rings with pale lenses, a bridge, and temples that run to the ears."""
    side, centre = np.abs(u), paint.person.eye_spacing + 0.015
    front = np.clip(w * 6 - 0.3, 0, 1)
    du, dv = side - centre, v - EYE_V
    square = np.square(du / 0.36), np.square(dv / 0.31)
    outer = np.sqrt(np.sqrt(square[0] ** 2 + square[1] ** 2)) - 1  # a rounded rectangle
    ring = np.abs(outer + 0.14) * 0.33 - 0.048
    bridge = np.maximum(np.abs(dv + 0.07) - 0.045, side - 0.12)
    temple = np.maximum(np.abs(dv + 0.05) - 0.05, np.maximum(0.70 - side, -0.05 - w))
    lens = cover(outer + 0.14, paint.pixel) * front
    glare = 0.22 + 0.25 * smoothstep(0.05, 0.0, np.abs(u * 0.8 + dv - 0.28 * np.sign(u)) - 0.05)
    _put(planes, (0.80, 0.90, 1.0), lens * glare)
    frame = np.minimum(np.minimum(ring, bridge), temple)
    _put(planes, (0.03, 0.03, 0.05), cover(frame, paint.pixel) * np.clip(w * 6 + 0.5, 0, 1))
