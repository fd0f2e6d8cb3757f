"""The algebra of diffusion and its samplers against closed forms."""

import math

import pytest
import torch

from dalle2_video.diffusion.guidance import denoiser, dynamic_threshold, guided, static_threshold
from dalle2_video.diffusion.objective import (
    DiffusionConfig,
    add_noise,
    loss_weight,
    per_sample_loss,
)
from dalle2_video.diffusion.parameterization import PREDICTIONS, eps_from_x0, target, to_x0
from dalle2_video.diffusion.sampling import ancestral, ddim
from dalle2_video.diffusion.schedule import CosineSchedule, alpha_sigma


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


@pytest.mark.parametrize("loss", ["eps", "x0", "v", "min_snr"])
def test_loss_is_the_same_whatever_the_network_predicts(loss) -> None:
    """A network's guess of x0, expressed as eps, x0 or v, has one and the same loss."""
    x0, eps, guess = torch.randn(3, 16, 40, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    losses = []
    for kind in PREDICTIONS:
        config = DiffusionConfig(kind, loss)
        noised = add_noise(config, x0, t, eps)
        guessed = target(kind, guess, eps_from_x0(guess, noised.z, noised.log_snr), noised.log_snr)
        losses.append(per_sample_loss(config, guessed, noised).double())
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[1], rtol=2e-3, atol=1e-6)


def test_weights_in_closed_form() -> None:
    log_snr = torch.tensor([-4.0, 0.0, 3.0, 8.0])
    snr = log_snr.exp()
    sigma2 = torch.sigmoid(-log_snr)
    x0_under_v = loss_weight(DiffusionConfig("x0", "v", max_weight=1e9), log_snr)
    torch.testing.assert_close(x0_under_v, 1 / sigma2)
    clamped = loss_weight(DiffusionConfig("x0", "v", max_weight=100), log_snr)
    assert clamped.max() == 100  # sigma clamped at 0.1
    assert (loss_weight(DiffusionConfig("v", "v"), log_snr) == 1).all()
    min_snr = loss_weight(DiffusionConfig("v", "min_snr"), log_snr)
    torch.testing.assert_close(min_snr, snr.clamp(max=5) / (snr + 1))
    min_snr = loss_weight(DiffusionConfig("eps", "min_snr"), log_snr)
    torch.testing.assert_close(min_snr, snr.clamp(max=5) / snr)


def test_untrained_network_has_the_known_loss() -> None:
    """Predicting 0 under the v-loss costs E v^2 = alpha^2 + sigma^2 E x^2 = 1 for unit data."""
    config = DiffusionConfig("v", "v")
    x0, eps = torch.randn(2, 64, 4000)
    noised = add_noise(config, x0, torch.rand(64), eps)
    assert per_sample_loss(config, torch.zeros_like(x0), noised).mean() == pytest.approx(
        1, abs=0.02
    )


def gaussian(mean: float, deviation: float):
    """The exact denoiser of N(mean, deviation^2) data."""

    def denoise(z, log_snr):
        alpha, sigma = (a[:, None] for a in alpha_sigma(log_snr))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (z - alpha * mean)

    return denoise


@pytest.mark.parametrize("sampler", ["ddim", "ancestral0", "ancestral1"])
def test_samplers_recover_a_gaussian(sampler) -> None:
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(200, 500, generator=draw)
    steps = CosineSchedule(-12.0, 12.0).steps(200)
    if sampler == "ddim":
        x = ddim(gaussian(0.7, 0.4), z, steps)
    else:
        gamma = float(sampler[-1])
        noise = lambda i: torch.randn(200, 500, generator=draw)  # noqa: E731
        x = ancestral(gaussian(0.7, 0.4), z, steps, noise, gamma)
    assert x.mean() == pytest.approx(0.7, abs=0.01)
    assert x.std() == pytest.approx(0.4, abs=0.012)


def test_ddim_converges_with_first_order() -> None:
    z = torch.full((1, 1), 1.3, dtype=torch.float64)
    schedule = CosineSchedule(-8.0, 8.0)
    errors = []
    alpha, sigma = alpha_sigma(schedule.log_snr(torch.zeros(1)))
    a1, s1 = alpha_sigma(schedule.log_snr(torch.ones(1)))
    scale = lambda a, s: (a**2 * 0.16 + s**2).sqrt()  # noqa: E731
    exact_z = alpha * 0.7 + scale(alpha, sigma) / scale(a1, s1) * (1.3 - a1 * 0.7)
    exact = gaussian(0.7, 0.4)(exact_z[:, None], schedule.log_snr(torch.zeros(1)))
    for n in (25, 50, 100):
        errors.append(float((ddim(gaussian(0.7, 0.4), z, schedule.steps(n)) - exact).abs()))
    assert 1.5 < errors[0] / errors[1] < 3 and 1.5 < errors[1] / errors[2] < 3


def test_guidance() -> None:
    def batched(z, log_snr):
        half = len(z) // 2
        return torch.cat([z[:half] * 0 + 2.0, z[half:] * 0 + 1.0])

    z, log_snr = torch.randn(3, 4), torch.zeros(3)
    assert (guided(batched, 1.0)(z, log_snr) == 2).all()  # the plain conditional model
    assert (guided(batched, 0.0)(z, log_snr) == 1).all()
    assert (guided(batched, 3.0)(z, log_snr) == 4).all()


def test_guidance_of_x0_is_guidance_of_eps() -> None:
    z, cond, uncond = torch.randn(3, 5, 7, dtype=torch.float64)
    log_snr = torch.linspace(-3, 3, 5, dtype=torch.float64)
    mixed = guided(lambda zz, ll: torch.cat([cond, uncond]), 4.0)(z, log_snr)
    by_eps = eps_from_x0(uncond, z, log_snr) + 4.0 * (
        eps_from_x0(cond, z, log_snr) - eps_from_x0(uncond, z, log_snr)
    )
    torch.testing.assert_close(eps_from_x0(mixed, z, log_snr), by_eps, rtol=1e-6, atol=1e-6)


def test_thresholds() -> None:
    x0 = torch.linspace(-3, 3, 101)[None]
    wrap = denoiser(lambda z, log_snr: x0, "x0")
    assert static_threshold(wrap)(x0, torch.zeros(1)).abs().max() == 1
    dynamic = dynamic_threshold(wrap, 0.9)(x0, torch.zeros(1))
    limit = torch.quantile(x0.abs(), 0.9)
    torch.testing.assert_close(dynamic, x0.clamp(-limit, limit) / limit)
    small = x0 / 10  # within [-1, 1]: left alone
    torch.testing.assert_close(dynamic_threshold(lambda z, _: small)(x0, torch.zeros(1)), small)
