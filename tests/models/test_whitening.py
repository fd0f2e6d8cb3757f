"""Whitening: unit variance, invertible, float32 under casts, saved with its network."""

from __future__ import annotations

import pytest
import torch

from dalle2_video.models.whitening import Whitening


def skewed(n: int = 4000, dim: int = 8) -> torch.Tensor:
    """Rows with a large mean and variances from 1 down to 1/50."""
    torch.manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(dim, dim))[0]
    return 5 + (torch.randn(n, dim) * torch.linspace(1, 0.02, dim).sqrt()) @ mixed


def test_every_direction_gets_about_unit_variance_and_comes_back() -> None:
    x = skewed()
    whiten = Whitening(8)
    torch.testing.assert_close(whiten(x), x)  # nothing before it is fitted
    whiten.fit(x)
    y = whiten(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    variances = torch.linalg.eigvalsh(y.T @ y / len(y))
    assert 0.75 < variances.min() and variances.max() < 1.01  # the floor takes a little
    torch.testing.assert_close(whiten.inverse(y), x, atol=1e-4, rtol=0)


def test_a_direction_without_variance_stays_without() -> None:
    x = skewed()
    x[:, 0] = 3.0
    whiten = Whitening(8)
    whiten.fit(x)
    torch.testing.assert_close(whiten(x)[:, 0], torch.zeros(len(x)), atol=1e-4, rtol=0)
    whiten.fit(torch.ones(10, 8))  # not even one clip's worth of variance: finite all the same
    assert whiten(x).isfinite().all()


def test_stays_float32_and_is_saved_but_not_trained() -> None:
    whiten = Whitening(8)
    whiten.fit(skewed())
    matrix = whiten.matrix.clone()
    whiten.bfloat16()
    torch.testing.assert_close(whiten.matrix, matrix)
    assert set(whiten.state_dict()) == {"mean", "matrix", "back"}
    assert not list(whiten.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert whiten(skewed()).dtype == torch.float32


@pytest.mark.parametrize("floor", [0.01, 1.0])
def test_a_floor_brings_every_variance_nearer_to_the_mean_and_keeps_one(floor: float) -> None:
    """A variance v becomes v (1 + floor) / (v + floor times the mean variance): 1 at the mean."""
    torch.manual_seed(0)
    x = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    whiten = Whitening(6, floor)
    whiten.fit(x)
    variance = torch.linalg.eigvalsh(torch.cov(x.T.double(), correction=0))
    wanted = variance * (1 + floor) / (variance + floor * variance.mean())
    y = whiten(x).double()
    found = torch.linalg.eigvalsh(torch.cov(y.T, correction=0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
