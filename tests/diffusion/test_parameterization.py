"""eps, x0 and v, one from another."""

import pytest
import torch

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.objective import add_noise
from dalle2_video.diffusion.parameterization import PREDICTIONS, eps_from_x0, target, to_x0
from dalle2_video.diffusion.schedule import (
    alpha_sigma,
)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_round_trip_of_parameterizations(kind) -> None:
    log_snr = torch.linspace(-8, 8, 33)
    x0, eps = torch.randn(2, 33, 50)
    noised = add_noise(DiffusionConfig(), x0, torch.rand(33), eps)
    alpha, sigma = (a[:, None] for a in alpha_sigma(log_snr))
    z = alpha * x0 + sigma * eps
    got = to_x0(kind, target(kind, x0, eps, log_snr), z, log_snr)
    torch.testing.assert_close(got, x0, atol=2e-3, rtol=0)
    torch.testing.assert_close(eps_from_x0(x0, z, log_snr), eps, atol=2e-3, rtol=0)
    assert noised.z.shape == x0.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_round_trip_over_the_whole_range_of_log_snr(kind, dtype) -> None:
    """A prediction rounded to `dtype` costs x0 no more than the algebra says: times 1, sigma, or
    sigma / alpha, which is why eps tells little of x0 under much noise.
    """
    log_snr = torch.linspace(-20, 20, 81)
    torch.manual_seed(0)
    x0, eps = torch.randn(81, 500), torch.randn(81, 500)
    alpha, sigma = (a[:, None] for a in alpha_sigma(log_snr))
    z = alpha * x0 + sigma * eps
    prediction = target(kind, x0, eps, log_snr).to(dtype).float()
    error = (to_x0(kind, prediction, z, log_snr) - x0).abs().amax(1)
    carried = {"x0": torch.ones(81), "v": sigma[:, 0], "eps": (sigma / alpha)[:, 0]}[kind]
    single = torch.finfo(torch.float32).eps / (alpha[:, 0] if kind == "eps" else 1)
    largest = 5.0  # of 40,500 normal draws
    assert (error <= largest * (carried * torch.finfo(dtype).eps / 2 + 3 * single)).all()
    if dtype == torch.bfloat16:
        assert (error >= 0.1 * carried * torch.finfo(dtype).eps / 2)[carried > 1e-3].all()
