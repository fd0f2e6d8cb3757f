"""The learned variance: its bounds, the terms of the variational bound, and their gradients."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from benchmarks.learned_variance import RECIPES, Divergence, network, unconditional
from dalle2_video import keyed
from dalle2_video.data.video import to_float
from dalle2_video.diffusion.frequencies import from_frequencies, to_frequencies
from dalle2_video.diffusion.objective import (
    VARIANCE_LIMIT,
    VARIANCE_WEIGHT,
    DiffusionConfig,
    add_noise,
    per_sample_loss,
    variance_loss,
)
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.sampling import ancestral
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    ZeroTerminalSchedule,
    alpha_sigma,
    sampler_steps,
)
from dalle2_video.diffusion.variance import (
    BIN,
    RAW_LIMIT,
    bound_term,
    fraction_of,
    learned_term,
    log_cdf,
    log_likelihood,
    on_grid,
    prior_term,
    reverse_step,
    split_output,
)
from dalle2_video.evaluation.likelihood import bits_of
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.sampling import ClipSampling, sample_clips
from tests.test_unet3d import SMALL, awake, inputs

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


def test_the_gradient_of_log_cdf_is_right_far_out():
    """Torch's own is 7 % off at -1,000 and overflows at -20,000."""
    x = torch.tensor([-5e4, -2e4, -1e3, -100.0, -10.1, -9.9, -1.0, 0.0, 3.0], requires_grad=True)
    log_cdf(x).sum().backward()
    exact = x.detach().double().requires_grad_()
    torch.special.log_ndtr(exact).sum().backward()
    far = x.detach() < -500
    wanted = torch.where(far, -x.detach().double(), exact.grad)  # -x - 1/x, next to nothing more
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        log_cdf(x).double(), torch.special.log_ndtr(exact), rtol=1e-5, atol=1e-7
    )


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


def test_the_likelihood_of_8_bit_values_sums_to_one_and_is_the_integral():
    values = torch.linspace(-1, 1, 256)
    for mean, deviation in ((0.2, 0.3), (-0.98, 0.01), (0.999, 1.0), (0.0, 0.001)):
        log_variance = torch.tensor(2 * math.log(deviation))
        found = log_likelihood(values, torch.tensor(mean), log_variance)
        assert float(found.double().exp().sum()) == pytest.approx(1, abs=2e-4)
    normal = Normal(torch.tensor(0.2, dtype=torch.float64), 0.3)
    for index in (1, 100, 150, 254):
        grid = torch.linspace(-1, 1, 256, dtype=torch.float64)[index] + BIN * (
            (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 - 0.5
        )
        integral = float(normal.log_prob(grid).exp().mean() * BIN)
        found = log_likelihood(values[index], torch.tensor(0.2), torch.tensor(2 * math.log(0.3)))
        assert float(found.exp()) == pytest.approx(integral, rel=1e-4)


def test_the_likelihood_is_finite_and_falls_far_from_the_mean():
    """Phi(b) - Phi(a) is 0 in float32 from six deviations on, where its logarithm is -inf."""
    x = torch.linspace(-0.9, 0.9, 50)
    mean = torch.zeros(50, requires_grad=True)
    log_variance = torch.full((50,), 2 * math.log(0.004)).requires_grad_()
    found = log_likelihood(x, mean, log_variance)
    found.sum().backward()
    assert found.isfinite().all() and (found.diff()[:24] > 0).all()
    for grad in (mean.grad, log_variance.grad):
        assert grad is not None and grad.isfinite().all()
    assert float(found.detach()[0]) == pytest.approx(-0.5 * (0.896 / 0.004) ** 2, rel=0.01)


def test_the_last_term_is_the_likelihood_and_the_prior_is_a_divergence():
    schedule = CosineSchedule()
    x0 = (torch.arange(0, 256, 5).float() / 127.5 - 1)[None]
    estimate = x0 + 0.01
    step = reverse_step(schedule, torch.tensor([1 / STEPS]), STEPS)
    variance = step.log_variance(0.3, x0)
    wanted = -log_likelihood(x0, estimate, variance).mean() / math.log(2)
    assert float(bound_term(step, estimate, 0.3, x0)) == pytest.approx(float(wanted), rel=1e-6)
    alpha, sigma = (float(a) for a in alpha_sigma(schedule.log_snr(torch.ones(1))))
    divergence = kl_divergence(Normal(alpha * x0.double(), sigma), Normal(0.0, 1.0)).mean()
    assert float(prior_term(schedule, x0)) == pytest.approx(
        float(divergence) / math.log(2), rel=0.01
    )


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
    """(k f / (1 + k f))^2 / 2, where k f is the variance beyond beta~, in units of it."""
    config = DiffusionConfig(prediction="x0", **SCHEDULES[schedule])
    t = on_grid(torch.tensor([0.01, 0.03, 0.3, 0.6]), config.variance_steps)
    x0, number = torch.zeros(4, 8), 8
    noised = add_noise(config, x0, t, torch.randn(4, 8))
    torch.manual_seed(0)
    _, sigma = alpha_sigma(noised.log_snr)
    guess = 0.3 * sigma[:, None] * torch.randn(4, 8)
    raw = torch.randn(4, 8, requires_grad=True)
    loss = variance_loss(config, guess, raw, noised, t, x0)
    (found,) = torch.autograd.grad(loss.sum(), raw)
    raw = raw.detach().double().requires_grad_()
    fraction = fraction_of(raw)
    best = (to_frequencies(guess.clamp(-1, 1)).double() / sigma[:, None]).square()
    step = reverse_step(config.schedule, t, config.variance_steps)
    after, now = step.after.double(), step.now.double()
    k = torch.expm1(torch.log1p(after.exp()) - torch.log1p(now.exp()))[:, None]
    # the divergence's mean part is k f* in units of beta~, for a step of this length exactly
    terms = 0.5 * (torch.log1p(k * fraction) + (k * best - k * fraction) / (1 + k * fraction))
    (of_term,) = torch.autograd.grad(terms.sum() / number, raw)
    factor = (k * fraction / (1 + k * fraction)).square() / 2
    wanted = VARIANCE_WEIGHT * of_term / factor.detach()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)
    bits = learned_term(step, guess, fraction.detach().float(), x0)
    torch.testing.assert_close(
        bits.double(), terms.detach().mean(1) / math.log(2), rtol=1e-2, atol=1e-9
    )
    scale = config.variance_steps / 1000
    torch.testing.assert_close(loss.detach(), scale * bits)
    with torch.no_grad():
        assert torch.equal(variance_loss(config, guess, raw.float(), noised, t, x0), loss)


def test_the_gradient_of_a_clip_is_limited_and_ends_where_the_range_does():
    config = DiffusionConfig(prediction="x0")
    x0, t = torch.zeros(3, 4), torch.tensor([0.001, 0.2, 0.2])
    noised = add_noise(config, x0, t, torch.randn(3, 4))
    guess = torch.tensor([0.5, 0.0, 1.0])[:, None].expand(3, 4)
    start = torch.tensor([0.0, -RAW_LIMIT - 1, RAW_LIMIT + 1])[:, None].expand(3, 4)
    raw = start.clone().requires_grad_()
    loss = variance_loss(config, guess, raw, noised, t, x0)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    # of the first, whose error is immense: all of it is in the lowest frequency
    assert float(gradient[0].abs().sum()) == pytest.approx(VARIANCE_WEIGHT * VARIANCE_LIMIT)
    assert gradient[0, 0] < 0 and gradient[0].abs().argmax() == 0
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


def test_bits_of_pure_noise_are_eight():
    """Values spread evenly, a guess that knows nothing: eight bits each, and little more."""
    values = torch.linspace(-1, 1, 256)
    mean = torch.zeros(())
    bits = -log_likelihood(values, mean, torch.tensor(math.log(1 / 3))).mean() / math.log(2)
    assert 8 < float(bits) < 8.5


# ---- with the network


LEARNED = dataclasses.replace(SMALL, learned_variance=True)


def one_step(net: Unet3D, config: DiffusionConfig) -> None:
    """Gradients of the loss of one batch, with the variance's where there is one."""
    z, _, condition = inputs(batch=4)
    t = torch.tensor([0.001, 0.1, 0.5, 0.9])
    x0 = torch.rand_like(z) * 2 - 1
    noised = add_noise(config, x0, t, torch.randn(z.shape, generator=torch.manual_seed(3)))
    prediction, raw = split_output(net(noised.z, noised.log_snr, condition), 3)
    loss = per_sample_loss(config, prediction, noised).mean()
    if raw is not None:
        loss = loss + variance_loss(config, prediction, raw, noised, t, x0).mean()
    loss.backward()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_no_gradient_of_the_variance_reaches_the_prediction(prediction):
    """Not even through the layers that both share: the rest learns as if there were none."""
    config = DiffusionConfig(prediction=prediction, loss=prediction)
    net, plain = awake(Unet3D(LEARNED, 24, 12)), Unet3D(SMALL, 24, 12)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    for one in (net, plain):
        one_step(one, config)
    for name, parameter in plain.named_parameters():
        assert torch.equal(net.get_parameter(name).grad, parameter.grad), name
    head = [p.grad for name, p in net.named_parameters() if name.startswith("variance.")]
    assert len(head) == 6
    assert all(grad is not None and grad.any() and grad.isfinite().all() for grad in head)


def test_the_network_says_prediction_and_fraction():
    net = Unet3D(LEARNED, 24, 12)
    z, log_snr, condition = inputs()
    prediction, raw = split_output(net(z, log_snr, condition), 3)
    assert prediction.shape == raw.shape == z.shape
    assert (fraction_of(raw) == 0.5).all()
    plain, none = split_output(Unet3D(SMALL, 24, 12)(z, log_snr, condition), 3)
    assert plain.shape == z.shape and none is None
    with pytest.raises(ValueError, match="learned_variance is for networks without low_frames"):
        dataclasses.replace(LEARNED, low_frames=2, low_size=16)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ancestral_sampling_takes_the_fractions_of_its_step(scale):
    """Against the sampler by hand, in the same noise."""
    torch.manual_seed(0)
    net = awake(Unet3D(LEARNED, 24, 12)).requires_grad_(False)
    nn.init.normal_(net.variance.out.weight, std=0.1)
    _, _, condition = inputs()
    how = ClipSampling(sampler="ancestral", steps=4, guidance_scale=scale)
    counters, config, now = torch.arange(2), DiffusionConfig(), torch.zeros(1)

    def network(z, log_snr, given):
        prediction, _ = split_output(net(z, log_snr, given), 3)
        return to_x0("v", prediction, z, log_snr)

    def denoise(z, log_snr):
        nonlocal now
        now, plain = log_snr, network(z, log_snr, condition.dropped())
        return (plain + scale * (network(z, log_snr, condition) - plain)).clamp(-1, 1)

    def noise(i):
        return keyed.randn(LEARNED.clip_shape, 0, counters, f"sample/{i}", "cpu")

    def fraction():
        return fraction_of(net.variance(now, 2, LEARNED.num_frames, 0))

    start = keyed.randn(LEARNED.clip_shape, 0, counters, "sample", "cpu")
    steps = sampler_steps(config.schedule, 4)
    wanted = ancestral(denoise, start, steps, noise, fraction)
    found = sample_clips(net, LEARNED, config, condition, counters, how, 0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    fixed = dataclasses.replace(how, gamma=0.5)
    other = sample_clips(net, LEARNED, config, condition, counters, fixed, 0)
    assert (found - other).abs().max() > 0.01


def test_fractions_are_said_in_float32_under_autocast():
    torch.manual_seed(0)
    head = Unet3D(LEARNED, 24, 12).variance
    nn.init.normal_(head.out.weight)
    with torch.no_grad():
        wanted = head(torch.tensor([-3.0, 2.0]), 2, 4, 0)
        with torch.autocast("cpu", torch.bfloat16):
            found = head(torch.tensor([-3.0, 2.0]), 2, 4, 0)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("frames", [4, 2])
def test_fractions_of_a_clip_and_its_images(frames):
    """An image takes the mean over the frequencies of frames; of fewer frames, frequency k is that
    of k times as many.
    """
    torch.manual_seed(0)
    head = Unet3D(LEARNED, 24, 12).variance
    nn.init.normal_(head.out.weight, std=0.1)
    log_snr = torch.tensor([-3.0, 2.0, -3.0, 0.0, 2.0, 5.0])  # of two clips, and two images each
    with torch.no_grad():
        raw = head(log_snr, 2, frames, 2)
        whole, alone = head(log_snr[:2], 2, LEARNED.num_frames, 0), head(log_snr[2:], 2, 0, 2)
    side = LEARNED.image_size
    assert raw.shape == (2, 3, frames + 2, side, side)
    torch.testing.assert_close(raw[:, :, frames:], alone)
    wanted = fraction_of(whole).mean(2)
    torch.testing.assert_close(fraction_of(raw[0, :, frames]), wanted[0])
    torch.testing.assert_close(fraction_of(raw[1, :, frames]), wanted[1])
    every = LEARNED.num_frames // frames
    torch.testing.assert_close(raw[:, :, :frames], whole[:, :, ::every])
    for axis in range(5):  # they differ by noise level, and by every frequency
        assert whole.diff(dim=axis).abs().max() > 0.05


def test_bits_of_a_few_steps_stand_for_all():
    """The estimate is that of the sum over all T terms, for a guess that errs as the best one."""
    config = DiffusionConfig(prediction="x0", variance_steps=200)
    torch.manual_seed(0)
    x0 = (torch.randint(0, 256, (64, 3, 1, 8, 8)).float() / 127.5 - 1) * 1.0
    errors = torch.randn(x0.shape)

    def network(z, log_snr):
        spread = (3 + torch.exp(log_snr)).rsqrt()
        return x0 + spread[:, None, None, None, None] * errors

    whole = prior_term(config.schedule, x0)
    for number in range(1, 201):
        t = torch.full((64,), number / 200)
        step = reverse_step(config.schedule, t, 200)
        estimate = network(x0, step.now).clamp(-1, 1)
        whole = whole + bound_term(step, estimate, 1.0, x0)
    found = bits_of(network, config, x0, torch.arange(64), 0, 10)["upper"]
    assert float(found.mean()) == pytest.approx(float(whole.mean()), rel=0.01)


def test_bits_of_a_perfect_guess_and_of_each_variance():
    """A network that knows the clip pays for the last step alone, whose bins are coarse."""
    x0 = to_float(torch.randint(0, 256, (3, 4, 16, 16, 3), dtype=torch.uint8))
    config = DiffusionConfig(prediction="x0")
    perfect = bits_of(lambda z, log_snr: x0, config, x0, torch.arange(3), 0, 8)
    assert set(perfect) == {"lower", "middle", "upper"}
    assert (perfect["lower"] < 0.8).all() and (perfect["lower"] > 0.5).all()
    nothing = bits_of(lambda z, log_snr: 0 * z, config, x0, torch.arange(3), 0, 400)
    assert (nothing["lower"] > 8).all()
    learned = bits_of(
        lambda z, log_snr: torch.cat([x0, 0 * x0], dim=1), config, x0, torch.arange(3), 0, 8
    )
    assert set(learned) == {"lower", "middle", "upper", "learned"}
    again = bits_of(lambda z, log_snr: x0, config, x0, torch.arange(3), 0, 8)
    assert torch.equal(again["upper"], perfect["upper"])


@pytest.mark.parametrize("at", [3, 40, 150])
def test_a_jump_of_the_loss_is_seen_whenever_it_comes(at):
    """Also before there are many losses to compare it with; single spikes are no divergence."""
    watch = Divergence()
    losses = [1.0] * at + [100.0, 1.0] * 60 + [1e6] * 50
    found = [watch.add(loss) for loss in losses]
    assert found.index(True) == len(losses) - 1 and watch.at == len(losses)
    assert Divergence().add(math.nan)


@pytest.mark.parametrize(("recipe", "reaches"), [
    ("naive", True), ("detached", False), ("ours", False),
])  # fmt: skip
def test_recipes_of_the_benchmark_share_the_prediction_and_differ_in_the_fraction(recipe, reaches):
    net, plain = awake(network(RECIPES[recipe])), network(RECIPES["fixed"])
    state = {name.replace("out.out.", "out."): p for name, p in net.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    inputs = torch.randn(2, 3, 8, 32, 32), torch.zeros(2), unconditional(2)
    prediction, raw = split_output(net(*inputs), 3)
    torch.testing.assert_close(prediction, plain.eval()(*inputs))
    assert (raw - prediction).abs().max() > 0.01
    raw.square().sum().backward()
    assert (net.stem.weight.grad is not None and bool(net.stem.weight.grad.any())) == reaches
