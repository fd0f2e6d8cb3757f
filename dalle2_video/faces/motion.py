"""Motion of the embedded talking heads: attributes -> pose and expression of every frame.

Angles are radians in image axes (x right, y down, z towards the viewer): positive yaw moves the
nose to the right of the image, positive pitch moves it down, positive roll leans the head to the
right.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dalle2_video.faces.attributes import FaceAttributes

FloatArray = NDArray[np.floating]  # float32 wherever there are pixels

TURN, NOD, TILT = math.radians(41), math.radians(30), math.radians(25)
RAMP = 0.14  # fraction of the clip that a turn or tilt takes, there or back
NOD_PERIOD, TALK_PERIOD = 0.30, 0.23  # fractions of the clip; both span 2 samples of 8 frames


@dataclass(frozen=True)
class Motion:
    """Per-frame curves, each float32 (F,): radians; smile in [-1, 1]; open and blink in [0, 1]."""

    yaw: FloatArray
    pitch: FloatArray
    roll: FloatArray
    smile: FloatArray
    open: FloatArray
    blink: FloatArray


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high` (falling where high < low), C1 between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def motion(attributes: FaceAttributes, num_frames: int, fps: float, seed: int) -> Motion:
    """Curves at the times k / fps of a clip of num_frames / fps seconds; `seed` keys the sway."""
    rng = random.Random(f"motion:{seed}")
    seconds = np.arange(num_frames) / fps
    phase = seconds * fps / num_frames
    start, end = attributes.action_start, attributes.action_start + attributes.action_length
    hold = smoothstep(start, start + RAMP, phase)
    if end < 0.99:
        hold = hold * smoothstep(end, end - RAMP, phase)
    inside = (phase >= start) & (phase <= end)
    since = np.where(inside, phase - start, 0.0)

    sway = [rng.uniform(0, math.tau) for _ in range(3)]
    yaw = 0.035 * np.sin(1.7 * seconds + sway[0])
    pitch = 0.03 * np.sin(2.1 * seconds + sway[1])
    roll = 0.02 * np.sin(1.3 * seconds + sway[2])
    opened = np.zeros(num_frames)
    if attributes.action in ("turn_left", "turn_right"):
        yaw = yaw + hold * (TURN if attributes.action == "turn_right" else -TURN)
    elif attributes.action == "nod":
        beats = max(1, round(attributes.action_length / NOD_PERIOD))
        pitch = pitch + NOD * np.sin(math.pi * beats * since / attributes.action_length) ** 2
    elif attributes.action == "tilt":
        roll = roll + hold * TILT
    else:
        beats = max(2, round(attributes.action_length / TALK_PERIOD))
        opened = np.sin(math.pi * beats * since / attributes.action_length) ** 2
        opened = opened * (0.85 + 0.15 * np.sin(7 * seconds + sway[0]))
    return Motion(
        *(
            np.asarray(curve, dtype=np.float32)
            for curve in (yaw, pitch, roll, _smile(attributes, phase), opened, _blink(seconds, rng))
        )
    )


def _smile(attributes: FaceAttributes, phase: np.ndarray) -> np.ndarray:
    """-1 is a full frown, 0 a closed straight mouth, 1 a wide smile."""
    if attributes.emotion_change is not None:
        return smoothstep(attributes.emotion_change - 0.06, attributes.emotion_change + 0.06, phase)
    return np.full_like(phase, {"neutral": 0.0, "happy": 1.0, "sad": -1.0}[attributes.emotion])


def _blink(seconds: np.ndarray, rng: random.Random) -> np.ndarray:
    """Lids close for about 0.2 s every 2 to 4 s, at times that no caption names."""
    closed = np.zeros_like(seconds)
    at = rng.uniform(0.1, 3.0)
    while at < seconds[-1] + 0.2:
        closed = np.maximum(closed, smoothstep(0.14, 0.06, np.abs(seconds - at)))
        at += rng.uniform(2.0, 4.0)
    return closed
