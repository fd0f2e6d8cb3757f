"""The light of a clip without a network, in closed form and on renders."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle2_video.faces.attributes import ATTRIBUTES
from dalle2_video.faces.light import MEASURES, LightRule, fit_light_rules, light_measures
from dalle2_video.faces.plan import plan
from dalle2_video.faces.probe import targets_of
from dalle2_video.faces.render import render


def test_light_measures_in_closed_form():
    frames = torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8)
    frames[:, :, :, :16] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    frames[:, :, :, 16:] = torch.tensor([100, 50, 25], dtype=torch.uint8)
    found = {n: v.item() for n, v in light_measures(frames).items()}
    luma = (0.2126 * 200 + 0.7152 * 100 + 0.0722 * 50) / 255
    assert found["left_right"] == pytest.approx(1, abs=0.03)
    assert found["level"] == pytest.approx(0.75 * luma, rel=1e-3)
    assert found["red_blue"] == pytest.approx(2, abs=0.05)
    assert light_measures(frames.flip(3))["left_right"].item() == pytest.approx(-1, abs=0.03)
    odd = light_measures(frames[:, :, :, :31])  # the middle column belongs to neither half
    assert odd["left_right"] > 0.9


def test_light_rules_fit_and_agree_with_the_renderer():
    base = plan(1, seed=0)[0].attributes
    values = {n: ATTRIBUTES[n] for n in MEASURES}
    clips = [
        replace(base, light_dir=d, light_intensity=i, light_color_temp=t)
        for d in values["light_dir"] for i in values["light_intensity"]
        for t in values["light_color_temp"]
    ]  # fmt: skip
    frames = torch.from_numpy(np.stack([render(c, k, 32, 2, 4.0, k) for k, c in enumerate(clips)]))
    targets = targets_of(clips)
    rules = fit_light_rules(frames, targets)
    for name, rule in rules.items():
        assert torch.equal(rule.predict(frames), targets[name]), name
    assert LightRule("light_dir", (-0.1, 0.1)).predict(frames).unique().tolist() == [0, 1, 2]
    bright = [k for k, c in enumerate(clips) if c.light_intensity == "bright"]
    with pytest.raises(ValueError, match="light_intensity"):
        fit_light_rules(frames[bright], {n: t[bright] for n, t in targets.items()})
    swapped = targets | {"light_intensity": 1 - targets["light_intensity"]}
    with pytest.raises(ValueError, match="light_intensity: medians of level out of order"):
        fit_light_rules(frames, swapped)
