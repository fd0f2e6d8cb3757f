"""The people of the embedded data set: one number -> the shape of a face."""

import random
from dataclasses import dataclass

AXES = (0.55, 0.68, 0.60)  # half width, height and depth of a mean head; the image spans [-1, 1]


@dataclass(frozen=True)
class Identity:
    """Face shape and wall of one person, the same in all their clips; the skin stands beside it.

    axes: half width, height and depth of the head. taper narrows the chin. eye_spacing is in half
    widths of the head; eye_size, mouth_width, nose and brow are factors around 1. iris and
    background are RGB in [0, 1]; skin_shift is added to each channel of the skin.
    """

    axes: tuple[float, float, float]
    taper: float
    eye_spacing: float
    eye_size: float
    mouth_width: float
    nose: float
    brow: float
    iris: tuple[float, float, float]
    skin_shift: float
    background: tuple[float, float, float]

    @classmethod
    def of(cls, identity: int) -> "Identity":
        """The person with this number; a pure function."""
        rng = random.Random(f"identity:{identity}")
        tone = rng.uniform(0.54, 0.62)
        return cls(
            axes=(
                AXES[0] * rng.uniform(0.95, 1.05),
                AXES[1] * rng.uniform(0.97, 1.03),
                AXES[2],
            ),
            taper=rng.uniform(0.08, 0.26),
            eye_spacing=rng.uniform(0.37, 0.42),
            eye_size=rng.uniform(0.92, 1.08),
            mouth_width=rng.uniform(0.94, 1.06),
            nose=rng.uniform(0.85, 1.15),
            brow=rng.uniform(0.9, 1.15),
            iris=rng.choice(((0.22, 0.12, 0.06), (0.16, 0.30, 0.45), (0.18, 0.32, 0.18))),
            skin_shift=rng.uniform(-0.02, 0.02),
            background=(
                tone + rng.uniform(-0.02, 0.02),
                tone + rng.uniform(-0.02, 0.02),
                tone + rng.uniform(-0.02, 0.02),
            ),
        )
