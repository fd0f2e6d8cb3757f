"""Randomness keyed by what it is for."""

import pytest
import torch

from dalle2_video import keyed


def test_noise_is_keyed_by_clip() -> None:
    rows = keyed.randn((2, 3), 0, torch.tensor([7, 8]), "x")
    assert torch.equal(rows[1:], keyed.randn((2, 3), 0, torch.tensor([8]), "x"))


def test_rows_depend_on_seed_id_and_stream_alone() -> None:
    ids = torch.tensor([7, 8])
    for draw in (keyed.randn, keyed.rand):
        rows = draw((3,), 5, ids, "x")
        assert torch.equal(draw((3,), 5, ids.flip(0), "x"), rows.flip(0))
        others = [draw((3,), 6, ids, "x"), draw((3,), 5, ids + 2, "x"), draw((3,), 5, ids, "y")]
        for other in [rows[:1], *others]:
            assert not (other == rows[1:]).any()
    assert keyed.rand((1000,), 0, ids, "x").mean() == pytest.approx(0.5, abs=0.03)
    assert keyed.randn((1000,), 0, ids, "x").std() == pytest.approx(1, abs=0.05)


def test_a_key_is_the_same_in_every_version() -> None:
    """Or a resumed run would go on with other noise than it began with."""
    assert keyed.key(3, 41, "base/noise") == 2139479365019492090
    assert keyed.key(0, "offset", "prior") == 8160686366406348650
