"""The learned variance: its bounds, its term of the variational bound, and the gradient."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from benchmarks.learned_variance import RECIPES
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.frequencies import from_frequencies, octave_weights, to_frequencies
from dalle2_video.diffusion.objective import (
    VARIANCE_LIMIT,
    VARIANCE_WEIGHT,
    add_noise,
    variance_loss,
)
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    ZeroTerminalSchedule,
    alpha_sigma,
)
from dalle2_video.diffusion.variance import (
    RAW_LIMIT,
    bound_term,
    fraction_of,
    learned_term,
    log_likelihood,
    on_grid,
    reverse_step,
)

STEPS = 1000


def posterior(x: torch.Tensor, z: torch.Tensor, now: torch.Tensor, after: torch.Tensor):
    """Of z at `after` given z at `now` and the clip x, in float64: precisions add."""
    alpha_t, alpha_s = torch.sigmoid(now).sqrt(), torch.sigmoid(after).sqrt()
    forward = 1 - (alpha_t / alpha_s) ** 2  # variance of z_t given z_s
    prior = torch.sigmoid(-after)
    precision = 1 / prior + (alpha_t / alpha_s) ** 2 / forward
    mean = (alpha_s * x / prior + alpha_t / alpha_s * z / forward) / precision
    return mean, 1 / precision, forward


@pytest.mark.parametrize("schedule", [CosineSchedule(), CosineSchedule(shift=-2), LinearSchedule()])
@pytest.mark.parametrize("t", [1.0, 0.7, 0.31, 0.0105, 0.002])
def test_bounds_and_divergence_are_those_of_bayes(schedule, t):
    time = torch.tensor([t])
    step = reverse_step(schedule, time, STEPS)
    now, after = (value.double() for value in (step.now, step.after))
    torch.manual_seed(0)
    x0, z, estimate = (torch.rand(1, 50, dtype=torch.float64) * 2 - 1 for _ in range(3))
    mean, lower, upper = posterior(x0, z, now, after)
    assert float(step.log_lower) == pytest.approx(math.log(lower), abs=2e-3)
    assert float(step.log_upper) == pytest.approx(math.log(upper), abs=2e-3)
    assert not step.last
    fraction = torch.rand(1, 50)
    variance = torch.exp(lower.log() + fraction * (upper.log() - lower.log()))
    ours, _, _ = posterior(estimate, z, now, after)
    wanted = kl_divergence(Normal(mean, lower.sqrt()), Normal(ours, variance.sqrt()))
    found = bound_term(step, estimate.float(), fraction, x0.float())
    assert float(found) == pytest.approx(float(wanted.mean() / math.log(2)), rel=5e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(),
        CosineSchedule(shift=-2),
        CosineSchedule(-20, 20),
        LinearSchedule(),
        ZeroTerminalSchedule(CosineSchedule()),
    ],
)
def test_the_bounds_hold_at_both_ends_and_in_order(schedule):
    t = torch.linspace(0, 1, STEPS + 1)[1:]
    step = reverse_step(schedule, t, STEPS)
    for value in (step.now, step.log_lower, step.log_upper):
        assert value.isfinite().all()
    assert (step.log_lower <= step.log_upper).all()
    assert step.last.tolist() == [True] + [False] * (STEPS - 1)
    # the last one ends at the clip: beta is all the noise there is; beta~ that of the step before
    _, sigma = alpha_sigma(schedule.log_snr(t[:1]))
    assert float(step.log_upper[0]) == pytest.approx(float(2 * sigma.log()), abs=1e-4)
    assert float(step.log_lower[0]) == pytest.approx(float(step.log_lower[1]), abs=1e-3)
    raw = torch.linspace(-60, 60, STEPS)[:, None].requires_grad_()
    x0 = torch.rand(STEPS, 1) * 2 - 1
    for estimate in (x0, x0.flip(0), torch.full_like(x0, -1.0)):
        naive = bound_term(step, estimate, torch.sigmoid(raw), x0)
        for term in (naive, learned_term(step, estimate, fraction_of(raw), x0)):
            (gradient,) = torch.autograd.grad(term.sum(), raw)
            assert term.isfinite().all() and gradient.isfinite().all()


def test_times_are_those_of_the_steps():
    t = on_grid(torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999]), STEPS)
    torch.testing.assert_close(t, torch.tensor([0.001, 0.001, 0.002, 0.501, 1.0]))


def test_at_the_start_it_is_the_geometric_middle():
    """Of the naive recipe; of ours to first order in the gap of the bounds."""
    step = reverse_step(CosineSchedule(), torch.tensor([0.5, 0.1]), STEPS)
    raw = torch.zeros(2, 3)
    middle = step.log_variance(RECIPES["naive"].fraction(raw), raw)
    wanted = ((step.log_lower + step.log_upper) / 2)[:, None].expand(2, 3)
    torch.testing.assert_close(middle, wanted)
    more = fraction_of(raw) * torch.expm1(step.gap)[:, None]
    ours = step.log_lower[:, None] + torch.log1p(more)
    torch.testing.assert_close(ours, wanted, atol=float(step.gap.max()) ** 2, rtol=0)


def test_fractions_have_a_range_whatever_the_network_says():
    """Positive, so that no variance is below beta~, and finite."""
    low, high = fraction_of(torch.tensor([-1e9, 1e9])).tolist()
    assert low == pytest.approx(0.5 * math.exp(-RAW_LIMIT)) and 0 < low
    assert high == pytest.approx(0.5 * math.exp(RAW_LIMIT))


def guesses(steps: int, config: DiffusionConfig) -> tuple[torch.Tensor, ...]:
    """t, x0, noised and a guess of x0 that errs as the best does for values of variance 1 / 3,
    at each of the steps.
    """
    torch.manual_seed(0)
    t = torch.arange(1, steps + 1) / steps
    x0 = (torch.randint(0, 256, (1, 400)).float() / 127.5 - 1).expand(steps, -1)
    noised = add_noise(config, x0, t, torch.randn(steps, 400))
    spread = (3 + torch.exp(noised.log_snr)).rsqrt()
    guess = (x0 + spread[:, None] * torch.randn(steps, 400)).clamp(-1, 1)
    return t, x0, noised, guess


def test_the_weight_of_the_term_does_not_change_with_the_number_of_steps():
    """A term of T, times T / 1000: 0.001 of the whole bound on average, but for the last step."""
    means = []
    for steps in (500, 1000, 4000):
        config = DiffusionConfig(prediction="x0", variance_steps=steps)
        t, x0, noised, guess = guesses(steps, config)
        loss = variance_loss(config, guess, torch.full_like(x0, -30.0), noised, t, x0)
        means.append(float(loss[1:].mean()))
    assert max(means) < 1.05 * min(means)
    assert 0.002 < means[0] < 0.02


def test_the_term_is_the_same_whatever_the_network_predicts():
    losses = []
    for prediction in ("eps", "x0", "v"):
        config = DiffusionConfig(prediction=prediction, variance_steps=100)
        t, x0, noised, guess = guesses(100, config)
        alpha, sigma = (a[:, None] for a in alpha_sigma(noised.log_snr))
        eps = (noised.z - alpha * guess) / sigma
        out = {"eps": eps, "x0": guess, "v": alpha * eps - sigma * guess}[prediction]
        losses.append(variance_loss(config, out, torch.zeros_like(x0), noised, t, x0))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=1e-4)
    torch.testing.assert_close(losses[2], losses[1], rtol=0.01, atol=1e-4)


def test_frequencies_are_an_orthonormal_basis():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8, 8)
    found = to_frequencies(x)
    torch.testing.assert_close(from_frequencies(found), x)
    torch.testing.assert_close(found.square().sum(), x.square().sum())
    flat = to_frequencies(torch.ones(1, 3, 4, 8, 8))
    assert float(flat[0, 0, 0, 0, 0]) == pytest.approx((3 * 4 * 8 * 8) ** 0.5)
    assert flat.flatten()[1:].abs().max() < 1e-5
    wave = torch.cos(math.pi / 8 * 3 * (torch.arange(8) + 0.5)).expand(1, 3, 4, 8, 8)
    assert to_frequencies(wave).flatten(0, 3).abs().argmax() == 3


def test_every_octave_of_the_frequencies_weighs_alike():
    """Along each axis, and so the lowest, one of 8,192, is a 45th of all of a channel."""
    weights = octave_weights(torch.Size([3, 8, 32, 32]), torch.device("cpu"))
    assert float(weights.sum()) == pytest.approx(1, rel=1e-5)
    assert (weights[0] == weights[2]).all()
    for axis, number in ((1, 8), (2, 32), (3, 32)):
        share = weights.movedim(axis, 0).flatten(1).sum(1)
        torch.testing.assert_close(share / share[0], 1 / (1 + torch.arange(float(number))))
    assert 1 / 50 < float(3 * weights[0, 0, 0, 0]) < 1 / 40


def test_the_learned_term_is_a_divergence_of_correlated_distributions():
    """Against torch's, with whole covariance matrices in pixels."""
    step = reverse_step(CosineSchedule(), torch.tensor([0.3]), 50)
    torch.manual_seed(0)
    x0, estimate, z = (torch.rand(1, 3, 2, 2) * 2 - 1 for _ in range(3))
    fraction = torch.exp(torch.randn(1, 3, 2, 2))
    mean, lower, upper = posterior(x0.double(), z, step.now.double(), step.after.double())
    ours, _, _ = posterior(estimate.double(), z, step.now.double(), step.after.double())
    # the rows of the transform, in pixels
    basis = from_frequencies(torch.eye(12).view(12, 3, 2, 2)).flatten(1).double()
    variance = (lower + fraction.flatten().double() * (upper - lower)).flatten()
    covariance = basis.T @ (variance[:, None] * basis)
    wanted = kl_divergence(
        MultivariateNormal(mean.flatten(), float(lower) * torch.eye(12, dtype=torch.float64)),
        MultivariateNormal(ours.flatten(), covariance),
    )
    found = learned_term(step, estimate, fraction, x0)
    assert float(found) == pytest.approx(float(wanted) / 12 / math.log(2), rel=1e-3)


def test_the_last_learned_term_is_the_likelihood_with_the_mean_variance():
    schedule = CosineSchedule()
    x0 = (torch.arange(0, 256, 5).float() / 127.5 - 1)[None]
    fraction = torch.rand(x0.shape) * 20
    step = reverse_step(schedule, torch.tensor([1 / STEPS]), STEPS)
    variance = fraction.mean().log() + step.log_upper
    wanted = -log_likelihood(x0, x0 + 0.01, variance).mean() / math.log(2)
    assert float(learned_term(step, x0 + 0.01, fraction, x0)) == pytest.approx(float(wanted))


SCHEDULES = {
    "cosine": {},
    "wide": {"log_snr_min": -20, "log_snr_max": 20},
    "shifted": {"shift": -2, "variance_steps": 4000},
    "linear": {"noise": "linear"},
    "zero_terminal": {"zero_terminal_snr": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_is_that_of_the_term_over_a_factor(schedule):
    """(k f / (1 + k f))^2 / 2, where k f is the variance beyond beta~, in units of it; and by the
    weights of the frequencies.
    """
    config = DiffusionConfig(prediction="x0", **SCHEDULES[schedule])
    t = on_grid(torch.tensor([0.01, 0.03, 0.3, 0.6]), config.variance_steps)
    x0 = torch.zeros(4, 1, 2, 2, 4)
    noised = add_noise(config, x0, t, torch.randn(x0.shape))
    torch.manual_seed(0)
    _, sigma = (one.view(4, 1, 1, 1, 1) for one in alpha_sigma(noised.log_snr))
    guess = 0.3 * sigma * torch.randn(x0.shape)
    raw = torch.randn(x0.shape, requires_grad=True)
    loss = variance_loss(config, guess, raw, noised, t, x0)
    (found,) = torch.autograd.grad(loss.sum(), raw)
    raw = raw.detach().double().requires_grad_()
    fraction = fraction_of(raw)
    best = (to_frequencies(guess.clamp(-1, 1)).double() / sigma).square()
    step = reverse_step(config.schedule, t, config.variance_steps)
    after, now = step.after.double(), step.now.double()
    k = torch.expm1(torch.log1p(after.exp()) - torch.log1p(now.exp())).view(4, 1, 1, 1, 1)
    # the divergence's mean part is k f* in units of beta~, for a step of this length exactly
    terms = 0.5 * (torch.log1p(k * fraction) + (k * best - k * fraction) / (1 + k * fraction))
    weighted = terms * octave_weights(x0.shape[1:], x0.device)
    (of_term,) = torch.autograd.grad(weighted.sum(), raw)
    factor = (k * fraction / (1 + k * fraction)).square() / 2
    wanted = VARIANCE_WEIGHT * of_term / factor.detach()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)
    bits = learned_term(step, guess, fraction.detach().float(), x0)
    torch.testing.assert_close(
        bits.double(), terms.detach().flatten(1).mean(1) / math.log(2), rtol=1e-2, atol=1e-9
    )
    scale = config.variance_steps / 1000
    torch.testing.assert_close(loss.detach(), scale * bits)
    with torch.no_grad():
        assert torch.equal(variance_loss(config, guess, raw.float(), noised, t, x0), loss)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_gradient_of_a_clip_is_limited_and_ends_where_the_range_does(frames):
    config, shape = DiffusionConfig(prediction="x0"), (3, 2, frames, 2, 4)
    x0, t = torch.zeros(shape), torch.tensor([0.001, 0.2, 0.2])
    noised = add_noise(config, x0, t, torch.randn(shape))
    guess = torch.tensor([0.5, 0.0, 1.0]).view(3, 1, 1, 1, 1).expand(shape)
    start = torch.tensor([0.0, -RAW_LIMIT - 1, RAW_LIMIT + 1]).view(3, 1, 1, 1, 1)
    raw = start.expand(shape).clone().requires_grad_()
    loss = variance_loss(config, guess, raw, noised, t, x0)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    # of the first, whose error is immense: all of it is in the lowest frequency
    assert float(gradient[0].abs().sum()) == pytest.approx(VARIANCE_WEIGHT * VARIANCE_LIMIT)
    assert gradient[0].flatten()[0] < 0 and gradient[0].abs().argmax() == 0
    assert (gradient[1] == 0).all()  # no error: further down, but there it ends
    assert (gradient[2] > 0).all()  # far too high: back


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_learns_its_best_fraction_and_all_in_the_same_time(schedule):
    """The squared error of each frequency over sigma^2, from the clean end to the noisy one."""
    config = DiffusionConfig(prediction="x0", **SCHEDULES[schedule])
    t = on_grid(torch.tensor([0.01, 0.03, 0.3, 0.7, 0.97, 1.0]), config.variance_steps)
    x0 = torch.zeros(len(t), 6)
    _, sigma = alpha_sigma(config.schedule.log_snr(t))
    best = torch.tensor([9.0, 3.0, 0.3, 0.1, 0.03, 0.01]).expand(len(t), 6)
    guess = from_frequencies(best.sqrt() * sigma[:, None] / 4)
    noised = add_noise(config, x0, t, torch.randn(len(t), 6))
    raw = torch.zeros(len(t), 6, requires_grad=True)
    for _ in range(400):
        loss = variance_loss(config, guess, raw, noised, t, x0)
        (gradient,) = torch.autograd.grad(loss.sum(), raw)
        with torch.no_grad():
            raw -= 0.5 / VARIANCE_WEIGHT * gradient
    torch.testing.assert_close(fraction_of(raw.detach()), best / 16, rtol=0.01, atol=0)
    found = fraction_of(raw.detach())
    step = reverse_step(config.schedule, t, config.variance_steps)
    right = learned_term(step, guess, found, x0)
    for factor in (0.8, 1.25):  # later, float32 does not tell the terms apart
        assert (learned_term(step, guess, factor * found, x0) > right)[:3].all()


def test_best_variance_is_found_by_the_gradient_of_the_term():
    """Where the guess errs by e, the best variance of a step is beta~ + (share e)^2."""
    step = reverse_step(CosineSchedule(), torch.tensor([0.6]), 20)
    x0, error = torch.zeros(1, 1), 0.25
    raw = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        learned_term(step, x0 + error, fraction_of(raw), x0).sum().backward()
        optimizer.step()
    alpha, _ = alpha_sigma(step.after)
    share = float(-torch.expm1(step.now - step.after) * alpha)
    lower, upper = float(step.log_lower.exp()), float(step.log_upper.exp())
    found = lower + float(fraction_of(raw.detach())) * (upper - lower)
    assert found == pytest.approx(lower + (share * error) ** 2, rel=0.01)


def test_the_likelihood_of_8_bit_values_is_a_distribution():
    """The probabilities of all 256 values sum to 1, wherever the mean is; mirrored, they are alike
    to the last digits, in the far tails too.
    """
    x = torch.arange(256) / 127.5 - 1
    for mean in (-1.2, -1.0, 0.3, 1.0):
        for log_variance in (-12.0, -4.0, 1.0):
            nats = log_likelihood(x, torch.tensor(mean), torch.tensor(log_variance))
            assert float(nats.double().exp().sum()) == pytest.approx(1, abs=1e-3)
            mirrored = log_likelihood(-x, torch.tensor(-mean), torch.tensor(log_variance))
            torch.testing.assert_close(mirrored, nats, rtol=1e-3, atol=1e-3)
