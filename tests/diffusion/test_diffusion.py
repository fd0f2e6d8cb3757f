"""The algebra of diffusion and its samplers against closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from dalle2_video.diffusion.frequencies import from_frequencies, to_frequencies
from dalle2_video.diffusion.guidance import (
    denoiser,
    dynamic_threshold,
    guided,
    interval_scale,
    oscillating_scale,
    reconstruction_guided,
    static_threshold,
)
from dalle2_video.diffusion.objective import (
    DiffusionConfig,
    add_noise,
    loss_weight,
    per_sample_loss,
)
from dalle2_video.diffusion.parameterization import PREDICTIONS, eps_from_x0, target, to_x0
from dalle2_video.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    ZeroTerminalSchedule,
    alpha_sigma,
    sampler_steps,
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
    low = DiffusionConfig("v", "v", max_weight=100)  # also where both are the same
    torch.testing.assert_close(loss_weight(low, log_snr), (1 / sigma2).clamp(max=100) * sigma2)
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


# ---------------------------------------------------------------- schedules


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


# ---------------------------------------------------------------- guidance


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
