"""Renderer of the embedded talking heads (numpy): FaceAttributes -> uint8 frames.

The head is an ellipsoid with analytic normals under orthographic projection, lit by an ambient
term, one Lambert key light and a specular lobe; the features are painted in its rotating
coordinates; a larger ellipsoid on the same axes carries the hair. Every edge is a coverage ramp
one pixel wide.

Axes: x right, y down, z towards the viewer; the image spans [-1, 1] in x and y. Letters: F frames,
H W pixels. Colours are RGB factors around [0, 1]. (U, V) are face coordinates in units of the
head's half width: U = 0 on the nose line, V = 0 at the height of the ears, V = about 1.26 at the
chin.
"""

import random

import numpy as np
from numpy.typing import NDArray

from dalle2_video.faces.attributes import FaceAttributes
from dalle2_video.faces.geometry import Light, dot, ellipsoid, rotation
from dalle2_video.faces.identity import Identity
from dalle2_video.faces.motion import FloatArray, Motion, motion, smoothstep
from dalle2_video.faces.paint import FacePaint, cover, paint_face, skin_colour, strands

CENTRE_Y = -0.12  # of the head
CLOTHING = {
    "red": (0.80, 0.10, 0.13),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.12, 0.25, 0.82),
    "white": (0.95, 0.95, 0.95),
}
HAIR = {"black": (0.085, 0.07, 0.07), "blond": (0.93, 0.77, 0.34), "red": (0.68, 0.20, 0.06)}
KEY_LIGHT = {"left": (-0.86, -0.25, 0.44), "right": (0.86, -0.25, 0.44), "front": (0.0, -0.2, 0.98)}
STRENGTH = {"bright": 1.0, "dim": 0.52}
TINT = {"warm": (1.10, 0.90, 0.66), "cold": (0.78, 0.94, 1.16), "neutral": (1.0, 1.0, 1.0)}
CHUNK_PIXELS = 1 << 17  # frames are rendered in groups of about this many pixels (cache, memory)


def _blend(plane: FloatArray, colour: FloatArray | float, alpha: FloatArray) -> None:
    """plane <- colour where alpha is 1, in place."""
    plane += alpha * (colour - plane)


def _shirt(canvas, colour, skin, light, x, y, pixel) -> None:
    """Shoulders with a round neckline; fixed in the image."""
    top = 0.60 + 0.30 * np.clip(np.abs(x) / 0.95, 0, 1.2) ** 2.2
    bent = np.clip(x / 1.05, -0.95, 0.95)
    facing = np.sqrt(1 - bent**2)
    shade = light.shade((bent, np.full_like(bent, -0.25), 0.95 * facing))
    alpha = cover(top - y, pixel)
    collar = cover(np.sqrt((x / 0.30) ** 2 + ((y - 0.60) / 0.17) ** 2) * 0.2 - 0.2, pixel)
    hem = cover(np.abs(np.sqrt((x / 0.30) ** 2 + ((y - 0.60) / 0.17) ** 2) * 0.2 - 0.21) - 0.012,
                pixel)  # fmt: skip
    for plane, shirt, flesh in zip(canvas, colour, skin, strict=True):
        tone = shirt * (1 - 0.18 * hem)
        _blend(plane, (tone + collar * (0.85 * flesh - tone)) * shade, alpha)


def _falling_hair(canvas, colour, light, x, y, pixel) -> None:
    """Long hair behind the head, down to the shoulders; hangs straight when the head leans."""
    width = 0.66 + 0.08 * np.clip(y / 0.9, -1, 1)
    reach = np.sqrt(np.maximum(1 - (np.minimum(y, 0) / 0.7) ** 2, 0))
    edge = np.maximum(np.abs(x) - width * reach, -0.7 - y)
    bottom = y - 0.85 + 0.10 * (x / 0.7) ** 2
    bent = np.clip(x / 0.78, -0.95, 0.95)
    shade = light.shade((bent, 0 * bent, np.sqrt(1 - bent**2)))
    shade = shade * strands(x * 30, 30 * pixel)
    alpha = cover(np.maximum(edge, bottom), pixel)
    for plane, tone in zip(canvas, colour, strict=True):
        _blend(plane, 0.88 * tone * shade, alpha)


def _neck(canvas, skin, light, x, y, cx, pixel) -> None:
    """A cylinder from the head to the neckline, in the chin's shadow."""
    x = x - cx * np.clip((0.62 - y) / 0.5, 0, 1)
    bent = np.clip(x / 0.27, -0.95, 0.95)
    shade = 0.72 * light.shade((bent, 0 * bent, np.sqrt(1 - bent**2)))
    depth = y - 0.62 - 0.13 * np.sqrt(1 - np.clip(x / 0.27, -1, 1) ** 2)
    alpha = cover(np.maximum(np.maximum(np.abs(x) - 0.26, 0.25 - y), depth), pixel)
    for plane, tone in zip(canvas, skin, strict=True):
        _blend(plane, tone * shade, alpha)


def _bumps(canvas, skin, person, light, hx, hy, turn, head, ears, pixel) -> None:
    """Nose and ears: small ellipsoids fixed to the head, hidden where they lie behind it."""
    a, b, d = person.axes
    bumps = [
        ((0.0, 0.14 * b, 0.93 * d), (0.095 * person.nose, 0.19, 0.17 * person.nose), 1.0),
        ((-0.99 * a, -0.02, -0.03), (0.075, 0.16, 0.12), 0.9),
        ((0.99 * a, -0.02, -0.03), (0.075, 0.16, 0.12), 0.9),
    ]
    for centre, axes, tone in bumps if ears else bumps[:1]:
        x, y = (dot(turn[i], centre) for i in range(2))
        near = (np.abs(hx - x) < max(axes) + 2 * pixel) & (np.abs(hy - y) < max(axes) + 2 * pixel)
        rows, columns = near.any((0, 2)).nonzero()[0], near.any((0, 1)).nonzero()[0]
        if not len(rows):
            continue  # outside the frame
        box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part = ellipsoid(hx[box], hy[box], turn, axes, centre, pixel)
        front = np.clip((part.z - head.z[box]) / 0.05 + 1 - head.alpha[box], 0, 1)
        alpha = part.alpha * front
        shade = tone * light.shade(part.normal) * (1 - 0.25 * smoothstep(0.45, 0.95, part.v))
        shine = 0.12 * light.specular(part.normal, 5)
        for plane, flesh in zip(canvas, skin, strict=True):
            _blend(plane[box], flesh * shade + shine, alpha)


def _hair(canvas, style, colour, person, light, hx, hy, turn, pixel) -> None:
    """A shell around the skull, cut at a hairline that depends on the longitude."""
    a, b, d = person.axes
    shell = ellipsoid(hx, hy, turn, (1.10 * a, 1.09 * b, 1.10 * d), (0, 0, 0), pixel)
    radius = np.sqrt(shell.u**2 + shell.w**2) + 1e-3
    facing = np.clip(shell.w / radius, -1, 1)  # cosine of the longitude, 1 at the nose
    height = shell.v * (1.09 * b / a)
    steep = 1.0  # how much faster than the height the line moves across the head
    if style == "short":
        line = -0.70 + 0.66 * smoothstep(0.62, 0.25, facing) + 0.5 * smoothstep(0.0, -0.4, facing)
    else:
        side = np.clip((0.60 - facing) / 0.24, 0, 1)
        line = -0.74 + 2.3 * side * side * (3 - 2 * side) - 0.1 * smoothstep(0.9, 1, facing)
        steep = 1 + 2.3 * 6 * side * (1 - side) / 0.24 * np.sqrt(1 - facing**2) / radius
        line = line - 4 * smoothstep(0.55, 0.35, radius) * (height > 0)  # none under the chin
    alpha = shell.alpha * cover(height - line, 1.5 * pixel / a * steep)
    shade = light.shade(shell.normal)
    longitude = np.arctan2(shell.u, shell.w)
    grazing = np.maximum(shell.normal[2], 0.1)
    shade = shade * strands(longitude * 22, 22 * pixel / (a * radius * grazing))
    gloss = 0.10 * light.specular(shell.normal, 4)
    for plane, tone in zip(canvas, colour, strict=True):
        _blend(plane, tone * (shade + gloss * 2) + 0.35 * gloss, alpha)


def _draw(
    attributes: FaceAttributes,
    person: Identity,
    pose: Motion,
    place: tuple[float, float, float],
    size: int,
) -> NDArray[np.uint8]:
    """Back to front: wall, shirt, falling hair, neck, head with its features, ears, hair."""
    pixel = 2 / size / place[2]
    grid = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1) / place[2]
    x, y = grid[None, None, :] - place[0], grid[None, :, None] - place[1]  # (1,1,W) (1,H,1)
    key = KEY_LIGHT[attributes.light_dir]
    frontal = attributes.light_dir == "front"
    ambient, strength = (0.44, 0.58) if frontal else (0.32, 0.78)
    across, down, towards = (np.full((1, 1, 1), k, np.float32) for k in key)
    still = Light((across, down, towards), ambient, strength)
    skin = skin_colour(attributes.skin, person.skin_shift)
    hair = HAIR.get(attributes.hair_color or "", (0.16, 0.11, 0.09))

    canvas = np.empty((3, pose.yaw.shape[0], size, size), np.float32)
    wall = 1 + (0.0 if frontal else 0.22 * np.sign(key[0])) * x - 0.06 * y
    for plane, tone in zip(canvas, person.background, strict=True):
        plane[:] = tone * wall
    _shirt(canvas, CLOTHING[attributes.clothing], skin, still, x, y, pixel)

    # The head leans about a point in the neck; its own axes are rolled, so the light is unrolled.
    cos, sin = np.cos(pose.roll), np.sin(pose.roll)
    lean = 0.42
    cx, cy = lean * sin, CENTRE_Y + lean * (1 - cos) + 0.05 * np.sin(pose.pitch)
    if attributes.hair_style == "long":
        _falling_hair(canvas, hair, still, x - cx + 0.2 * np.sin(pose.yaw), y - cy, pixel)
    _neck(canvas, skin, still, x, y, cx, pixel)

    hx, hy = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
    a, b, _ = person.axes
    low = np.clip(hy / b, 0, 1.1)
    hx = hx / (1 - person.taper * low * np.sqrt(low))
    light = Light((cos * key[0] + sin * key[1], cos * key[1] - sin * key[0],
                   np.full_like(cos, key[2])), ambient, strength)  # fmt: skip
    turn = rotation(pose.yaw, pose.pitch)
    head = ellipsoid(hx, hy, turn, person.axes, (0, 0, 0), pixel)
    paint = FacePaint(attributes, person, pose, skin, hair, pixel / a)
    albedo = paint_face(paint, head.u, head.v * (b / a), head.w)
    shade = light.shade(head.normal)
    shine = 0.16 * light.specular(head.normal, 5)
    for plane, colour in zip(canvas, albedo, strict=True):
        _blend(plane, colour * shade + shine, head.alpha)
    ears = attributes.hair_style != "long"
    _bumps(canvas, skin, person, light, hx, hy, turn, head, ears, pixel)
    if attributes.hair_style != "bald":
        _hair(canvas, attributes.hair_style, hair, person, light, hx, hy, turn, pixel)

    level = STRENGTH[attributes.light_intensity]
    out = np.empty((*canvas.shape[1:], 3), np.uint8)
    for channel, tint in enumerate(TINT[attributes.light_color_temp]):
        np.clip(canvas[channel] * (255 * level * tint) + 0.5, 0, 255, out=canvas[channel])
        out[..., channel] = canvas[channel]
    return out


def render(
    attributes: FaceAttributes,
    identity: int,
    size: int,
    num_frames: int,
    fps: float,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """Frames of one clip: RGB uint8 (F, size, size, 3), 0..255, frame k at k / fps seconds.

    A pure function: `identity` keys what a person's clips share, `seed` what varies between them
    (place in the frame, sway, blinks). Raises ValueError for a size below 16 px or no frame.
    """
    if size < 16 or num_frames < 1:
        raise ValueError(f"size {size} (at least 16) or num_frames {num_frames} (at least 1)")
    person, rng = Identity.of(identity), random.Random(f"place:{seed}")
    place = (rng.uniform(-0.03, 0.03), rng.uniform(-0.02, 0.02), rng.uniform(0.97, 1.03))
    curves = motion(attributes, num_frames, fps, seed)
    step = max(1, CHUNK_PIXELS // (size * size))
    chunks = []
    for first in range(0, num_frames, step):
        part = {k: v[first : first + step, None, None] for k, v in vars(curves).items()}
        chunks.append(_draw(attributes, person, Motion(**part), place, size))
    return np.concatenate(chunks)
