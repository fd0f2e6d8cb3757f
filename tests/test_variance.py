"""The learned variance: its bounds, the terms of the variational bound, and their gradients."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from benchmarks.learned_variance import RECIPES, Divergence, network, unconditional
from dalle2_video.data.video import to_float
from dalle2_video.diffusion.objective import (
    VARIANCE_LIMIT,
    VARIANCE_WEIGHT,
    DiffusionConfig,
    add_noise,
    per_sample_loss,
    variance_loss,
)
from dalle2_video.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    ZeroTerminalSchedule,
    alpha_sigma,
)
from dalle2_video.diffusion.variance import (
    BIN,
    MAX_FRACTION,
    bound_term,
    fraction_of,
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
        term = bound_term(step, estimate, fraction_of(raw), x0)
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
    step = reverse_step(CosineSchedule(), torch.tensor([0.5, 0.1]), STEPS)
    x = torch.zeros(2, 3)
    middle = step.log_variance(fraction_of(torch.zeros(2, 3)), x)
    wanted = (step.log_lower + step.log_upper) / 2
    torch.testing.assert_close(middle, wanted[:, None].expand(2, 3))
    raw = torch.tensor([-50.0, 50.0])
    assert fraction_of(raw).tolist() == [0, MAX_FRACTION]  # whatever the network says
    slope = torch.autograd.functional.jacobian(fraction_of, torch.zeros(()))
    assert float(slope) == pytest.approx(0.5)  # that of (raw + 1) / 2


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


def test_the_gradient_of_a_clip_is_limited_and_else_that_of_the_term_over_its_gap():
    config = DiffusionConfig(prediction="x0")
    t = torch.tensor([0.001, 0.002, 0.4, 0.7])
    x0 = torch.zeros(4, 8)
    noised = add_noise(config, x0, t, torch.randn(4, 8))
    guess = torch.tensor([0.0, 1e-3, 2e-3, 5e-3, 0.01, 0.1, 0.5, 1.0]).expand(4, 8)
    raw = torch.zeros(4, 8, requires_grad=True)
    loss = variance_loss(config, guess, raw, noised, t, x0)
    (found,) = torch.autograd.grad(loss.sum(), raw)
    step = reverse_step(config.schedule, t, 1000)
    fraction = fraction_of(raw.detach()).requires_grad_()
    bits = bound_term(step, guess, fraction, x0)
    (wanted,) = torch.autograd.grad(bits.sum(), fraction)
    torch.testing.assert_close(loss, bits)
    wanted = wanted / step.gap.square()[:, None]
    size = wanted.abs().sum(1)
    assert size[0] > 10 * VARIANCE_LIMIT and (size[2:] < VARIANCE_LIMIT).all()
    wanted = VARIANCE_WEIGHT * wanted / (size / VARIANCE_LIMIT).clamp(min=1)[:, None]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(variance_loss(config, guess, raw, noised, t, x0), bits)


@pytest.mark.parametrize(("raw", "error", "moves"), [
    (16.0, 1.0, False), (16.0, 0.0, True), (-1.5, 0.0, False), (-1.5, 1.0, True),
])  # fmt: skip
def test_a_fraction_at_its_limit_is_pushed_back_but_not_further(raw, error, moves):
    """And what is not pushed takes nothing from what is left to the values beside it."""
    config = DiffusionConfig(prediction="x0")
    x0, t = torch.zeros(1, 4), torch.tensor([0.2])
    noised = add_noise(config, x0, t, torch.randn(1, 4))
    leaf = torch.tensor([[raw, raw, 0.0, 0.0]], requires_grad=True)
    loss = variance_loss(config, torch.full_like(x0, error), leaf, noised, t, x0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    at_bound, between = gradient[:, :2], gradient[:, 2:]
    assert (at_bound * raw > 0).all() if moves else (at_bound == 0).all()
    assert (between != 0).all()
    if error == 1.0 and not moves:
        assert float(between.abs().sum()) == pytest.approx(VARIANCE_WEIGHT * VARIANCE_LIMIT)


SCHEDULES = {
    "cosine": {},
    "wide": {"log_snr_min": -20, "log_snr_max": 20},
    "shifted": {"shift": -2, "variance_steps": 4000},
    "linear": {"noise": "linear"},
    "zero_terminal": {"zero_terminal_snr": True},
}


@pytest.mark.parametrize("error", [0.3, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_learns_its_best_fraction_and_all_in_the_same_time(schedule, error):
    """About the squared error in units of sigma^2, from the clean end to the noisy one; exactly
    log(1 + K) over the gap, where K is it times the growth of the SNR.
    """
    config = DiffusionConfig(prediction="x0", **SCHEDULES[schedule])
    times = [0.01, 0.03, 0.1] + ([0.7, 0.97, 1.0] if error < 1 else [])  # guesses end at 1
    t = on_grid(torch.tensor(times), config.variance_steps)
    x0 = torch.zeros(len(t), 1)
    _, sigma = alpha_sigma(config.schedule.log_snr(t))
    guess = error**0.5 * sigma[:, None]
    noised = add_noise(config, x0, t, torch.randn(len(t), 1))
    raw = torch.zeros(len(t), 1, requires_grad=True)
    for _ in range(250):
        loss = variance_loss(config, guess, raw, noised, t, x0)
        (gradient,) = torch.autograd.grad(loss.sum(), raw)
        with torch.no_grad():
            raw -= 2.0 * gradient
    step = reverse_step(config.schedule, t, config.variance_steps)
    now, after = step.now.double(), step.after.double()
    gap = -torch.log1p(now.exp()) + torch.log1p(after.exp())
    excess = guess[:, 0].double().square() * (after.exp() - now.exp())
    torch.testing.assert_close(
        fraction_of(raw.detach())[:, 0].double(), torch.log1p(excess) / gap, atol=2e-3, rtol=0
    )
    best = fraction_of(raw.detach())
    for other in (-0.1, 0.1):  # later, float32 does not tell the terms apart
        worse = bound_term(step, guess, best + other, x0) > bound_term(step, guess, best, x0)
        assert worse[:3].all()


def test_best_variance_is_found_by_the_gradient_of_the_term():
    """Where the guess errs by e, the best variance of a step is beta~ + (share e)^2."""
    step = reverse_step(CosineSchedule(), torch.tensor([0.6]), 20)
    x0, error = torch.zeros(1, 1), 0.25
    raw = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        bound_term(step, x0 + error, fraction_of(raw), x0).sum().backward()
        optimizer.step()
    alpha, _ = alpha_sigma(step.after)
    share = float(-torch.expm1(step.now - step.after) * alpha)
    best = math.log(math.exp(float(step.log_lower)) + (share * error) ** 2)
    found = float(step.log_variance(fraction_of(raw.detach()), x0))
    best = min(best, float(step.log_upper))
    assert found == pytest.approx(best, abs=0.02)


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
    assert len(head) == 8
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


@pytest.mark.parametrize(("scale", "gamma"), [(1.0, 0.0), (3.0, 1.0)])
def test_ancestral_sampling_takes_the_learned_fraction(scale, gamma):
    """A fraction at a bound everywhere is gamma at that bound."""
    torch.manual_seed(0)
    net = awake(Unet3D(LEARNED, 24, 12))
    nn.init.zeros_(net.variance.out.weight)
    nn.init.constant_(net.variance.out.bias, 2 * gamma - 1)
    _, _, condition = inputs()
    how = ClipSampling(sampler="ancestral", steps=4, guidance_scale=scale)
    counters = torch.arange(2)
    with torch.no_grad():
        found = sample_clips(net, LEARNED, DiffusionConfig(), condition, counters, how, 0)
        fixed = dataclasses.replace(how, gamma=gamma)
        plain = Unet3D(SMALL, 24, 12).eval()
        state = {k: v for k, v in net.state_dict().items() if not k.startswith("variance")}
        plain.load_state_dict(state)
        wanted = sample_clips(plain, SMALL, DiffusionConfig(), condition, counters, fixed, 0)
        other = sample_clips(plain, SMALL, DiffusionConfig(), condition, counters, how, 0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - other).abs().max() > 0.01


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
