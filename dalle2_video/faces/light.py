"""The light of a clip measured without a network: three numbers, and thresholds on them.

left_right  log2 of the mean luminance of the left half over that of the right half
level       mean luminance of the border (the wall beside the head), in [0, 1]
red_blue    log2 of mean red over mean blue in the border

Luminance is that of BT.709 on the stored (gamma) values. The border is the outer eighth at the left
and right, and the top sixteenth, of the upper half, where the faces data set shows a plain wall.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dalle2_video.faces.attributes import ATTRIBUTES

MEASURES = {
    "light_dir": ("left_right", ("right", "front", "left")),
    "light_intensity": ("level", ("dim", "bright")),
    "light_color_temp": ("red_blue", ("cold", "neutral", "warm")),
}
LUMA = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True)
class LightRule:
    """`cuts` (ascending) part the measure into the values of an attribute, in MEASURES' order."""

    attribute: str
    cuts: tuple[float, ...]

    def predict(self, frames: Tensor) -> Tensor:
        """uint8 (B,F,H,W,3) -> labels int64 (B,) as in ATTRIBUTES."""
        measure, order = MEASURES[self.attribute]
        values = light_measures(frames)[measure]
        place = torch.bucketize(values, values.new_tensor(self.cuts))
        names = ATTRIBUTES[self.attribute]
        return torch.tensor([names.index(name) for name in order], device=values.device)[place]


def light_measures(frames: Tensor) -> dict[str, Tensor]:
    """uint8 RGB (B,F,H,W,3) -> {left_right, level, red_blue}, each float32 (B,)."""
    video = frames.float() / 255
    height, width = video.shape[2:4]
    luminance = video @ video.new_tensor(LUMA)
    halves = [h.mean((1, 2, 3)) for h in luminance.tensor_split([width // 2, width - width // 2], 3)
              if h.shape[3] >= width // 2]  # fmt: skip
    top, rim = max(1, height // 16), max(1, width // 8)
    upper = video[:, :, : height // 2]
    parts = (upper[:, :, :, :rim], upper[:, :, :, -rim:], upper[:, :, :top, rim:-rim])
    border = torch.cat([p.flatten(1, 3) for p in parts], dim=1).mean(1)  # (B,3)
    small = 1 / 255
    return {
        "left_right": torch.log2((halves[0] + small) / (halves[-1] + small)),
        "level": border @ border.new_tensor(LUMA),
        "red_blue": torch.log2((border[:, 0] + small) / (border[:, 2] + small)),
    }


def fit_light_rules(frames: Tensor, targets: dict[str, Tensor]) -> dict[str, LightRule]:
    """Cuts half way between the medians of neighbouring values, from labelled clips.

    Raises ValueError when a value has no clip, or the medians do not stand in the stated order.
    """
    measured = light_measures(frames)
    rules = {}
    for attribute, (measure, order) in MEASURES.items():
        labels = [ATTRIBUTES[attribute].index(name) for name in order]
        groups = [measured[measure][targets[attribute] == label] for label in labels]
        if any(len(group) == 0 for group in groups):
            raise ValueError(f"{attribute}: clips of each of {', '.join(order)} are needed")
        medians = [group.median().item() for group in groups]
        if medians != sorted(medians):
            raise ValueError(f"{attribute}: medians of {measure} out of order: {medians}")
        cuts = tuple((p + q) / 2 for p, q in pairwise(medians))
        rules[attribute] = LightRule(attribute, cuts)
    return rules
