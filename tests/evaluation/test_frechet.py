"""The Frechet distance against closed forms."""

from __future__ import annotations

import pytest
import torch

from dalle2_video.evaluation.frechet import frechet_distance, frechet_interval


def draw(number: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    noise = torch.randn(number, 4, generator=torch.Generator().manual_seed(seed))
    return noise * scale + shift


def test_it_is_zero_for_the_same_and_ignores_the_order() -> None:
    for seed in range(8):  # rounding alone would take some below zero
        a = draw(30, seed)
        assert 0 <= frechet_distance(a, a.flip(0)) < 1e-9
    assert frechet_interval(a, a, draws=20)[0] == 0


def test_a_shift_and_a_scale_of_the_same_set_have_closed_forms() -> None:
    """|shift|^2, and tr (s - 1)^2 A where the covariances commute."""
    a = draw(300, 1)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 4, rel=1e-5)
    centred = a - a.mean(0)
    expected = (3 - 1) ** 2 * centred.double().T.cov().trace().item()
    assert frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-5)


def test_covariances_that_do_not_commute() -> None:
    """Against the root of the product itself, by its own eigenvalues."""
    a = draw(400, 2) @ torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 1], [0, 0, 3, 0], [1, 0, 0, 1]])
    b = draw(300, 3) @ torch.tensor([[2.0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    cov_a, cov_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = means + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_the_interval_holds_other_sets_of_the_same_kind_and_narrows_with_more_samples() -> None:
    real = draw(2000, 4)
    widths = []
    for number in (50, 800):
        low, high = frechet_interval(draw(number, 5, shift=1.0), real, draws=100)
        widths.append(high - low)
        others = [frechet_distance(draw(number, seed, shift=1.0), real) for seed in range(6, 46)]
        assert 0.6 * widths[-1] < 4 * torch.tensor(others).std() < 1.6 * widths[-1]
    assert widths[1] < widths[0] / 2


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
