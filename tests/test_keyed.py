"""Randomness keyed by what it is for."""

import torch

from dalle2_video import keyed


def test_noise_is_keyed_by_clip() -> None:
    rows = keyed.randn((2, 3), 0, torch.tensor([7, 8]), "x")
    assert torch.equal(rows[1:], keyed.randn((2, 3), 0, torch.tensor([8]), "x"))
