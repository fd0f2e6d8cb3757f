"""Samplers against closed forms, an exact denoiser and diffusers."""

from itertools import pairwise

import pytest
import torch

from dalle2_video.diffusion.frequencies import from_frequencies, to_frequencies
from dalle2_video.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    alpha_sigma,
    sampler_steps,
)


def gaussian(mean: float, deviation: float):
    """The exact denoiser of N(mean, deviation^2) data."""

    def denoise(z, log_snr):
        alpha, sigma = (a[:, None] for a in alpha_sigma(log_snr))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (z - alpha * mean)

    return denoise


def sample_gaussian(sampler: str, num_steps: int, size=(200, 500)) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(size, generator=draw)
    steps = sampler_steps(CosineSchedule(-12.0, 12.0), num_steps)

    def noise(_: int) -> torch.Tensor:
        return torch.randn(size, generator=draw)

    exact = gaussian(0.7, 0.4)
    match sampler.split():
        case ["ddim", eta]:
            return ddim(exact, z, steps, noise, float(eta))
        case ["dpm_solver"]:
            return dpm_solver(exact, z, steps)
        case ["ancestral", gamma, corrector]:
            return ancestral(exact, z, steps, noise, float(gamma), float(corrector))
    raise AssertionError(sampler)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        ("ddim 0", 200),
        ("ddim 0.5", 200),
        ("ddim 1", 200),
        ("ancestral 0 0", 200),
        ("ancestral 1 0", 200),
        ("ancestral 0.3 0.1", 200),
        ("dpm_solver", 40),
    ],
)
def test_samplers_recover_a_gaussian(sampler: str, steps: int) -> None:
    x = sample_gaussian(sampler, steps)
    assert x.mean() == pytest.approx(0.7, abs=0.01)
    assert x.std() == pytest.approx(0.4, abs=0.012)


def test_the_corrector_mends_a_variance_that_is_too_large() -> None:
    """Few steps at the upper bound of the variance: Langevin steps pull towards the marginal."""
    off = [abs(float(sample_gaussian(f"ancestral 1 {k}", 12).std()) - 0.4) for k in (0, 0.3)]
    assert off[1] < 0.7 * off[0]


@pytest.mark.parametrize("number", [2, 5, 20])
def test_the_right_fractions_sample_correlated_values_in_any_number_of_steps(number: int) -> None:
    """Values whose frequencies differ in variance: the best fraction is the variance of x0 given z
    over sigma^2. A fixed variance is off where the steps are few.
    """
    deviation = torch.tensor([3.0, 1.0, 0.4, 0.1])
    now = torch.zeros(())

    def denoise(z: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now = log_snr[0]
        alpha, _ = alpha_sigma(now)
        share = alpha / (alpha.square() + torch.sigmoid(-now) / deviation.square())
        return from_frequencies(share * to_frequencies(z))

    def fraction() -> torch.Tensor:
        return 1 / (1 / deviation.square() + now.exp()) / torch.sigmoid(-now)

    draw = torch.Generator().manual_seed(0)
    z, *noises = torch.randn(number + 1, 200_000, 4, generator=draw)
    steps = sampler_steps(CosineSchedule(-12.0, 12.0), number)
    found = to_frequencies(ancestral(denoise, z, steps, lambda i: noises[i], fraction))
    # the last step returns the mean of what is left open
    left = 1 / (1 / deviation.square() + steps[-2].exp())
    wanted = (deviation.square() - left).sqrt()
    torch.testing.assert_close(found.std(0), wanted, rtol=0.01, atol=0)
    fixed = to_frequencies(ancestral(denoise, z, steps, lambda i: noises[i], 0.5))
    assert (fixed.std(0) / wanted - 1).abs().max() > 0.05


def test_the_corrector_evaluates_once_more_per_step_but_the_last_with_noise_of_its_own() -> None:
    evaluated, drawn = [], []

    def denoise(z, log_snr):
        evaluated.append(float(log_snr[0]))
        return z * 0

    def noise(i):
        drawn.append(i)
        return torch.zeros(1, 3)

    steps = sampler_steps(CosineSchedule(), 4)
    ancestral(denoise, torch.ones(1, 3), steps, noise, 0.3, 0.1)
    s = steps.tolist()
    assert evaluated == [s[0], s[1], s[1], s[2], s[2], s[3], s[3]]
    assert len(set(drawn)) == len(drawn) == 4 + 3


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_interpolates_the_logarithm_of_the_variance(gamma: float) -> None:
    """The fresh noise of one step, between the bounds of Ho et al. 2022, eq. 4."""
    seen = []

    def denoise(z, log_snr):
        seen.append(z.clone())
        return z * 0

    now, after = steps = torch.tensor([-1.0, 0.5])
    ends = torch.cat([steps, torch.tensor([3.0])])
    ancestral(denoise, torch.zeros(1, 3), ends, lambda i: torch.ones(1, 3), gamma)
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(now), alpha_sigma(after)
    share = 1 - ((alpha / sigma) / (alpha_s / sigma_s)) ** 2  # 1 - e^(log-SNR's difference)
    lower, upper = share * sigma_s**2, share * sigma**2
    wanted = (lower ** (1 - gamma) * upper**gamma).sqrt()
    torch.testing.assert_close(seen[1], wanted.expand(1, 3))


def test_samplers_leave_what_they_are_given() -> None:
    z, steps = torch.ones(1, 3), sampler_steps(CosineSchedule(), 3)
    for run in (
        lambda: ddim(lambda z, _: z * 0.5, z, steps),
        lambda: dpm_solver(lambda z, _: z * 0.5, z, steps),
        lambda: ancestral(lambda z, _: z * 0.5, z, steps, lambda i: torch.ones(1, 3)),
    ):
        run()
        assert (z == 1).all()


def test_ddim_with_eta_1_is_the_ancestral_sampler_with_gamma_0() -> None:
    z = torch.randn(4, 300)
    noises = torch.randn(20, 4, 300)
    steps = sampler_steps(CosineSchedule(-8.0, 8.0), 20)
    a = ddim(gaussian(0.7, 0.4), z, steps, lambda i: noises[i], eta=1.0)
    b = ancestral(gaussian(0.7, 0.4), z, steps, lambda i: noises[i], gamma=0.0)
    torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2)])
def test_deterministic_samplers_converge_with_their_order(sampler, order: int) -> None:
    """Against the exact path of the probability flow, which keeps (z - mean) / deviation."""
    z = torch.full((1, 1), 1.3, dtype=torch.float64)

    def path(log_snr: torch.Tensor) -> torch.Tensor:
        (a, s), (a1, s1) = alpha_sigma(log_snr), alpha_sigma(torch.tensor([-8.0]))
        spread = ((a**2 * 0.16 + s**2) / (a1**2 * 0.16 + s1**2)).sqrt()
        return a * 0.7 + spread * (1.3 - a1 * 0.7)

    errors = []
    for n in (20, 40, 80):
        steps = torch.linspace(-8, 8, n + 1)
        exact = gaussian(0.7, 0.4)(path(steps[-2:-1])[:, None], steps[-2:-1])
        errors.append(float((sampler(gaussian(0.7, 0.4), z, steps) - exact).abs()))
    for coarse, fine in pairwise(errors):
        assert 2**order * 0.75 < coarse / fine < 2**order * 1.5, errors


def test_dpm_solver_with_two_steps_by_hand() -> None:
    """The formula of algorithm 2 in the paper, with lambda = log(alpha / sigma)."""
    steps = torch.tensor([-4.0, -1.0, 1.5, 5.0], dtype=torch.float64)
    x0s = iter([torch.tensor([[v]], dtype=torch.float64) for v in (0.3, 0.5, -0.2)])
    seen = []

    def denoise(z, log_snr):
        seen.append(float(z))
        return next(x0s)

    dpm_solver(denoise, torch.ones(1, 1, dtype=torch.float64), steps)
    a, s = (x.double() for x in alpha_sigma(steps))
    lam = (a / s).log()
    h1, h2 = lam[1] - lam[0], lam[2] - lam[1]
    z1 = s[1] / s[0] * 1.0 - a[1] * ((-h1).exp() - 1) * 0.3
    r = h1 / h2
    d = (1 + 1 / (2 * r)) * 0.5 - 1 / (2 * r) * 0.3
    z2 = s[2] / s[1] * z1 - a[2] * ((-h2).exp() - 1) * d
    assert seen == pytest.approx([1.0, float(z1), float(z2)], rel=1e-5)


@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_samplers_agree_with_diffusers_at_every_step(name: str, steps: int) -> None:
    """On a denoiser that bends, over DDPM's 1,000 steps with trailing spacing."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    common = {"beta_schedule": "linear", "prediction_type": "sample"}
    common["timestep_spacing"] = "trailing"
    if name == "ddim":
        scheduler = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    else:
        scheduler = DPMSolverMultistepScheduler(
            **common, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        )
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod.double()
    log_snr = (abar / (1 - abar)).log().float()
    seen: list[torch.Tensor] = []

    def denoise(z, log_snr):
        seen.append(z.clone())
        alpha, sigma = (a[:, None] for a in alpha_sigma(log_snr))
        return torch.tanh(1.3 * alpha * z + 0.2 * torch.sin(5 * z) + 0.1 * sigma)

    start = torch.randn(3, 40)
    ends = torch.cat([log_snr[scheduler.timesteps], torch.tensor([20.0])])
    mine = {"ddim": ddim, "dpm_solver": dpm_solver}[name](denoise, start, ends)
    ours, z = list(seen), start
    seen.clear()
    for t in scheduler.timesteps:
        z = scheduler.step(denoise(z, log_snr[t].expand(3)), t, z).prev_sample
    for a, b in zip([*ours, mine], [*seen, z], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
