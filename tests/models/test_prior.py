"""The prior: who sees whom, and that order and padding of the text do not matter."""

import torch

from dalle2_video.models.prior import Prior, attention_mask
from dalle2_video.models.prior_config import PriorConfig
from tests.helpers.networks import awake, prior_inputs

CONFIG = PriorConfig(width=32, layers=2, heads=2, noise_draws=3)


def test_every_parameter_gets_gradient() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, text, mask, embedding, _ = prior_inputs()
    out = prior(z, log_snr, text, mask, embedding, torch.tensor([True, False]))
    assert out.shape == z.shape
    out.square().sum().backward()
    assert not [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()]


def test_draws_do_not_see_each_other() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, *rest = prior_inputs()
    out = prior(z, log_snr, *rest)
    for k in range(3):
        alone = prior(z[:, k : k + 1], log_snr[:, k : k + 1], *rest)
        torch.testing.assert_close(alone[:, 0], out[:, k], atol=1e-5, rtol=1e-4)


def test_text_is_a_set_padding_is_unseen_and_dropping_hides_it() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, text, mask, embedding, keep = prior_inputs()
    out = prior(z, log_snr, text, mask, embedding, keep)
    garbage = text.clone()
    garbage[0, 3:] = 50
    torch.testing.assert_close(prior(z, log_snr, garbage, mask, embedding, keep), out)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = prior(z, log_snr, text[:, order], mask[:, order], embedding, keep)
    torch.testing.assert_close(shuffled, out, atol=1e-5, rtol=1e-4)
    dropped = prior(z, log_snr, text, mask, embedding, ~keep)
    other = prior(z, log_snr, text.flip(0), mask, embedding.flip(0), ~keep)
    torch.testing.assert_close(dropped, other)
    assert (dropped - out).abs().max() > 1e-3


def test_mask_is_causal_behind_the_text() -> None:
    mask = attention_mask(torch.tensor([[True, True, False]]), draws=2)[0]
    # order: 3 text, embedding, (time, noised, query) twice
    assert mask[0].int().tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert mask[3].int().tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert mask[5].int().tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert mask[9].int().tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 1, 1]
