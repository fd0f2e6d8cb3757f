"""Noise schedules against closed forms."""

import math

import pytest
import torch

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    ZeroTerminalSchedule,
    alpha_sigma,
)


def test_cosine_schedule_maps_its_end_points_and_shift() -> None:
    schedule = CosineSchedule(-12.0, 9.0)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([9.0, -12.0]), atol=2e-3, rtol=0)
    t = torch.linspace(0, 1, 101)
    assert (schedule.log_snr(t).diff() < 0).all()
    shifted = CosineSchedule(-12.0, 9.0, shift=2 * math.log(64 / 32))
    torch.testing.assert_close(
        shifted.log_snr(t), schedule.log_snr(t) + 2 * math.log(2), atol=1e-5, rtol=0
    )
    # symmetric limits: the plain cosine schedule in the middle, alpha = cos(pi t / 2)
    wide = CosineSchedule(-20.0, 20.0)
    alpha, sigma = alpha_sigma(wide.log_snr(torch.tensor([0.25, 0.5])))
    expected = torch.tensor([math.cos(math.pi / 8), math.cos(math.pi / 4)])
    torch.testing.assert_close(alpha, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2))


def test_schedule_refuses_limits_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="not below"):
        CosineSchedule(5.0, -5.0)


def test_the_linear_schedule_is_ddpms() -> None:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    t = torch.arange(1, 1001) / 1000
    log_snr = LinearSchedule().log_snr((t - 1e-3) / (1 - 1e-3)).double()
    discrete = (abar / (1 - abar)).log()
    difference = (log_snr - discrete).abs()
    assert difference[10:].max() < 0.12 and difference[[0, -1]].max() < 0.15
    assert (log_snr.diff() < 0).all()


@pytest.mark.parametrize("inner", [LinearSchedule(), CosineSchedule(-6.0, 9.0)])
def test_zero_terminal_snr(inner) -> None:
    t = torch.linspace(0, 1, 201)
    log_snr = ZeroTerminalSchedule(inner).log_snr(t)
    assert log_snr[0] == pytest.approx(float(inner.log_snr(t[:1])), abs=1e-2)
    assert log_snr[-1] == -20 and (log_snr.diff() < 0).all()
    s = alpha_sigma(inner.log_snr(t))[0].double()
    expected = (s - s[-1]) * s[0] / (s[0] - s[-1])
    torch.testing.assert_close(alpha_sigma(log_snr)[0].double(), expected, atol=1e-4, rtol=1e-3)
    config = DiffusionConfig("v", "v", noise="linear", zero_terminal_snr=True)
    assert isinstance(config.schedule, ZeroTerminalSchedule)
    for bad in ({"prediction": "eps"}, {"loss": "eps"}):
        with pytest.raises(ValueError, match="zero_terminal_snr"):
            DiffusionConfig(**bad, zero_terminal_snr=True)
