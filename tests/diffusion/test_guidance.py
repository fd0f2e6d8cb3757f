"""Guidance and thresholds."""

import torch

from dalle2_video.diffusion.guidance import (
    denoiser,
    dynamic_threshold,
    guided,
    interval_scale,
    oscillating_scale,
    reconstruction_guided,
    static_threshold,
)
from dalle2_video.diffusion.parameterization import eps_from_x0
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    alpha_sigma,
    sampler_steps,
)


def test_guidance() -> None:
    def batched(z, log_snr):
        return torch.cat([z[:3] * 0 + 2.0, z[3:] * 0 + 1.0])

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


def test_where_the_scale_is_1_the_unconditional_model_is_not_run() -> None:
    sizes = []

    def batched(z, log_snr):
        sizes.append(len(z))
        return z

    steps = torch.linspace(-10, 10, 11)
    inside = interval_scale(5.0, -4.0, 2.0)
    assert inside(steps).tolist() == [1, 1, 1, 5, 5, 5, 5, 1, 1, 1, 1]
    denoise = guided(batched, inside)
    for log_snr in steps:
        denoise(torch.ones(2, 3), log_snr.expand(2))
    assert sizes == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


def test_an_oscillating_scale_is_constant_first() -> None:
    steps = sampler_steps(CosineSchedule(), 10)
    scale = oscillating_scale(15.0, steps, constant=0.4)
    assert [float(scale(x.expand(1))) for x in steps[:-1]] == [15] * 4 + [1, 15] * 3
    half = oscillating_scale(15.0, steps)
    assert [float(half(x.expand(1))) for x in steps[:-1]] == [15] * 5 + [1, 15, 1, 15, 1]


def test_rescaled_guidance_has_the_deviation_of_the_conditional_model() -> None:
    cond, uncond = torch.randn(2, 3, 400)
    z, log_snr = torch.randn(3, 400), torch.zeros(3)
    out = lambda phi: guided(lambda *_: torch.cat([cond, uncond]), 6.0, phi)(z, log_snr)  # noqa: E731
    torch.testing.assert_close(out(1.0).std(1), cond.std(1))
    torch.testing.assert_close(out(0.7), 0.7 * out(1.0) + 0.3 * out(0.0))


def test_reconstruction_guidance_in_closed_form() -> None:
    """Two correlated numbers, the first one known: the second is drawn after it."""
    rho, known, log_snr = 0.8, torch.tensor([[1.5]], dtype=torch.float64), torch.zeros(1)
    cov = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    alpha, sigma = (a.double() for a in alpha_sigma(log_snr))
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2))  # E[x | z]

    def denoise(z, _):
        return z @ gain.T

    z = torch.tensor([[0.2, -0.4]], dtype=torch.float64)
    found = reconstruction_guided(denoise, lambda x: x[:, :1], known, 9.0)(z, log_snr)
    x0 = denoise(z, log_snr)
    expected = x0 + 9.0 * alpha * (known - x0[:, :1]) * gain[:1]
    torch.testing.assert_close(found, expected)
    assert found[0, 1] > x0[0, 1] and not found.requires_grad and not z.requires_grad


def test_thresholds() -> None:
    x0 = torch.linspace(-3, 3, 101)[None]
    wrap = denoiser(lambda z, log_snr: x0, "x0")
    assert static_threshold(wrap)(x0, torch.zeros(1)).abs().max() == 1
    dynamic = dynamic_threshold(wrap, 0.9)(x0, torch.zeros(1))
    limit = torch.quantile(x0.abs(), 0.9)
    torch.testing.assert_close(dynamic, x0.clamp(-limit, limit) / limit)
    small = x0 / 10  # within [-1, 1]: left alone
    torch.testing.assert_close(dynamic_threshold(lambda z, _: small)(x0, torch.zeros(1)), small)
    # the limit is that of each sample
    both = torch.cat([x0, 10 * x0])
    found = dynamic_threshold(lambda z, _: both, 0.9)(both, torch.zeros(2))
    torch.testing.assert_close(found, dynamic.expand(2, -1))
