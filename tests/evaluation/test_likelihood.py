"""Bits per dimension: the likelihood of 8-bit values, the last step, and the whole bound."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from dalle2_video.data.media.tensors import to_float
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.schedule import CosineSchedule, alpha_sigma
from dalle2_video.diffusion.variance import (
    BIN,
    bound_term,
    log_cdf,
    log_likelihood,
    prior_term,
    reverse_step,
)
from dalle2_video.evaluation.alignment import Captions
from dalle2_video.evaluation.likelihood import bits_of, evaluate_bits, to_values
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.pipeline.sampling_config import SampleConfig

STEPS = 1000


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


def test_bits_of_pure_noise_are_eight():
    """Values spread evenly, a guess that knows nothing: eight bits each, and little more."""
    values = torch.linspace(-1, 1, 256)
    mean = torch.zeros(())
    bits = -log_likelihood(values, mean, torch.tensor(math.log(1 / 3))).mean() / math.log(2)
    assert 8 < float(bits) < 8.5


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
    step = reverse_step(config.schedule, torch.full((3,), 1 / STEPS), STEPS)
    wanted = bound_term(step, x0, 0.0, x0) + prior_term(config.schedule, x0)
    torch.testing.assert_close(perfect["lower"], wanted, rtol=0, atol=2e-6)
    assert (perfect["lower"] < 0.8).all() and (perfect["lower"] > 0.5).all()
    learned = bits_of(
        lambda z, log_snr: torch.cat([x0, 0 * x0], dim=1), config, x0, torch.arange(3), 0, 8
    )
    assert set(learned) == {"lower", "middle", "upper", "learned"}
    again = bits_of(lambda z, log_snr: x0, config, x0, torch.arange(3), 0, 8)
    assert torch.equal(again["upper"], perfect["upper"])


class Knows(nn.Module):
    """A U-Net that finds the clip in its embedding, with raw fractions of 0."""

    config = SimpleNamespace(num_frames=2, image_size=8)

    def forward(self, z: torch.Tensor, log_snr: torch.Tensor, given: Condition) -> torch.Tensor:
        assert given.keep_embedding.all() and given.keep_text.all()
        apart = (given.embedding - given.text_embedding).abs().max()
        assert apart < 0.004, "text and clip of one row"
        x0 = given.embedding.unflatten(1, z.shape[1:])
        return torch.cat([x0, 0 * x0], dim=1)


def test_bits_of_a_guess_that_knows_nothing_have_a_closed_form() -> None:
    """Under beta~ a step costs (SNR(after) - SNR(now)) / 2 times the squared error (Kingma et al.
    2021, VDM, equation 13), here x0^2 at every step: the sum telescopes to the SNR of step 1.
    """
    x0 = to_float(torch.randint(0, 256, (3, 4, 16, 16, 3), dtype=torch.uint8))
    config = DiffusionConfig(prediction="x0")
    step = reverse_step(config.schedule, torch.full((3,), 1 / STEPS), STEPS)
    likelihood = bound_term(step, 0 * x0, 0.0, x0)  # of the last step, beside the divergences
    ends = config.schedule.log_snr(torch.tensor([1 / STEPS, 1.0])).exp()
    divergences = 0.5 * (ends[0] - ends[1]) * x0.square().mean((1, 2, 3, 4)) / math.log(2)
    whole = divergences + likelihood + prior_term(config.schedule, x0)
    found = bits_of(lambda z, log_snr: 0 * z, config, x0, torch.arange(3), 0, 50)
    torch.testing.assert_close(found["lower"], whole, rtol=0.01, atol=0)


def test_every_step_has_noise_of_its_own_that_keys_repeat() -> None:
    x0 = torch.zeros(2, 3, 2, 16, 16)
    noises: dict[int, list[torch.Tensor]] = {}
    for run in range(2):

        def network(z: torch.Tensor, log_snr: torch.Tensor, run: int = run) -> torch.Tensor:
            _, sigma = alpha_sigma(log_snr)
            noises.setdefault(run, []).append((z / sigma[:, None, None, None, None]).flatten())
            return x0

        bits_of(network, DiffusionConfig(prediction="x0"), x0, torch.tensor([4, 9]), 0, 5)
    first, second = (torch.stack(noises[run]) for run in range(2))
    assert torch.equal(first, second) and len(first) == 7 + 5
    assert (first.corrcoef() - torch.eye(12)).abs().max() < 0.1
    assert first.std(1).sub(1).abs().max() < 0.05


def test_bits_of_a_cascade_are_of_each_captions_own_clip_in_any_batch() -> None:
    frames = torch.randint(0, 256, (5, 4, 16, 16, 3), dtype=torch.uint8)
    view = to_float(frames, 2, 8)
    x0 = to_values(view)  # the bound is that of 8-bit values
    assert 0 < (x0 - view).abs().max() < 0.004  # half of 2 / 255
    config = DiffusionConfig(prediction="x0", variance_steps=50)
    clip = nn.Module()
    clip.config = SimpleNamespace(video=SimpleNamespace(num_frames=2, image_size=8))
    clip.encode_video = lambda view: view.flatten(1)

    def encode(texts: list[list[str]]) -> TextEncoding:
        rows = torch.tensor([int(lines[0]) for lines in texts])
        states, place = torch.zeros(len(rows), 1, 4), torch.zeros(len(rows), 1, dtype=torch.long)
        return TextEncoding(x0[rows].flatten(1), states, place)

    cascade = SimpleNamespace(
        unets=[SimpleNamespace(network=Knows(), diffusion=config)],
        device=torch.device("cpu"), video_clip=clip, encode=encode,
    )  # fmt: skip
    captions = Captions([[str(i)] for i in range(5)], [""] * 5, [""] * 5, frames)
    seen: list[int] = []
    sample = SampleConfig(batch_size=2, seed=3)
    found = evaluate_bits(cascade, captions, 4, sample, seen.append)
    assert seen == [2, 2, 1]
    assert found["clips"] == 5 and found["steps"] == 50

    direct = bits_of(
        lambda z, _: torch.cat([view, 0 * view], dim=1), config, x0, torch.arange(5), 3, 4
    )
    direct |= {f"learned_less_than_{k}": direct[k] - direct["learned"] for k in ("lower", "upper")}
    for name, bits in direct.items():
        key = f"bits_per_dimension_{name}"
        assert found[key] == pytest.approx(float(bits.mean()), rel=1e-4, abs=1e-5), name
        half = 1.96 * statistics.stdev(bits.tolist()) / 5**0.5
        assert found[f"{key}_half_width"] == pytest.approx(half, rel=1e-3, abs=1e-5), name
