"""Ellipsoids under orthographic projection and the light on them, in closed form.

Axes: x right, y down, z towards the viewer. F frames, H W pixels. (u, v, w) are coordinates on the
unit sphere that turns with the ellipsoid: u to the right, v down, w forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dalle2_video.faces.motion import FloatArray


def dot(first: Sequence[Any] | FloatArray, second: Sequence[Any] | FloatArray) -> FloatArray:
    """Scalar product of two vectors of three arrays or numbers."""
    return first[0] * second[0] + first[1] * second[1] + first[2] * second[2]


@dataclass
class Surface:
    """Front of an ellipsoid: coverage, depth, unit-sphere coordinates and normal, all (F,H,W)."""

    alpha: FloatArray
    z: FloatArray
    u: FloatArray
    v: FloatArray
    w: FloatArray
    normal: tuple[FloatArray, FloatArray, FloatArray]


@dataclass
class Light:
    """Direction per frame in the head's rolled axes (F,1,1) and the amounts of each term."""

    direction: tuple[FloatArray, FloatArray, FloatArray]
    ambient: float
    key: float

    def shade(self, normal: tuple[FloatArray, FloatArray, FloatArray]) -> FloatArray:
        """Ambient plus Lambert (Lambert 1760), softly wrapped around the terminator."""
        cosine = dot(normal, self.direction)
        return self.ambient + self.key * np.maximum(0.9 * cosine + 0.1, 0)

    def specular(
        self, normal: tuple[FloatArray, FloatArray, FloatArray], doublings: int
    ) -> FloatArray:
        """Blinn-Phong lobe (Blinn 1977), exponent 2^doublings, for a viewer at z = infinity."""
        x, y, z = self.direction
        half = (x, y, z + 1)
        length = np.sqrt(half[0] ** 2 + half[1] ** 2 + half[2] ** 2)
        cosine = dot(normal, half) / length
        cosine = np.maximum(cosine, 0)
        for _ in range(doublings):
            cosine = cosine * cosine
        return cosine


def rotation(yaw: FloatArray, pitch: FloatArray) -> FloatArray:
    """Head to image axes, yaw after pitch (roll turns the pixel grid instead): (3,3,F,1,1)."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    zero = np.zeros_like(cy)
    return np.stack(
        [
            np.stack([cy, -sy * sp, sy * cp]),
            np.stack([zero, cp, sp]),
            np.stack([-sy, -cy * sp, cy * cp]),
        ]
    )


def ellipsoid(
    x: FloatArray,
    y: FloatArray,
    turn: FloatArray,
    axes: tuple[float, float, float],
    centre: tuple[float, float, float],
    pixel: float,
) -> Surface:
    """Nearest hit of the rays (x, y, .) with the ellipsoid at `centre` (head axes), in closed form.

    x, y: image coordinates that broadcast to (F,H,W). turn: `rotation` (3,3,F,1,1). axes: the half
    axes. pixel: the width of a pixel, over which the coverage ramps. The points p of the surface
    satisfy p^T M p = 1 with M = R diag(1/axes^2) R^T, a quadratic in z.
    """
    inverse = 1 / np.square(np.asarray(axes, np.float32))
    m = np.einsum("ik...,k,jk...->ij...", turn, inverse, turn)
    offset = np.einsum("ij...,j->i...", turn, np.asarray(centre, np.float32))
    x, y = x - offset[0], y - offset[1]
    linear = m[0, 2] * x + m[1, 2] * y
    square = m[0, 0] * x * x + 2 * m[0, 1] * x * y + m[1, 1] * y * y
    outline = np.sqrt(np.maximum(square - linear**2 / m[2, 2], 1e-6))  # 1 on the silhouette
    alpha = np.clip((1 - outline) / outline * np.sqrt(x * x + y * y) / pixel + 0.5, 0, 1)
    z = (np.sqrt(np.maximum(1 - outline**2, 0) * m[2, 2]) - linear) / m[2, 2]
    point = (x, y, z)
    u, v, w = (dot(turn[:, i], point) / axes[i] for i in range(3))
    n = [dot(m[i], point) for i in range(3)]
    length = np.sqrt(n[0] ** 2 + n[1] ** 2 + n[2] ** 2) + 1e-6
    return Surface(alpha, z + offset[2], u, v, w, (n[0] / length, n[1] / length, n[2] / length))
