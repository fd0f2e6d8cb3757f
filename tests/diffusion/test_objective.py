"""The loss and its weights."""

import pytest
import torch

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.objective import add_noise, loss_weight, per_sample_loss
from dalle2_video.diffusion.parameterization import PREDICTIONS, eps_from_x0, target


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
