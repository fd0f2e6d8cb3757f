"""The prior: who sees whom, and that order and padding of the text do not matter."""

import torch
import torch.nn.functional as F

from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.models.prior import Prior, PriorConfig, attention_mask
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.sampling import sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig
from tests.helpers.networks import awake

CONFIG = PriorConfig(width=32, layers=2, heads=2, noise_draws=3)


def inputs(batch: int = 2, draws: int = 3):
    torch.manual_seed(2)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    embedding = F.normalize(torch.randn(batch, 24), dim=-1)
    text = torch.randn(batch, 5, 12)
    keep = torch.ones(batch, dtype=torch.bool)
    return torch.randn(batch, draws, 24), torch.randn(batch, draws), text, mask, embedding, keep


def test_every_parameter_gets_gradient() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, text, mask, embedding, _ = inputs()
    out = prior(z, log_snr, text, mask, embedding, torch.tensor([True, False]))
    assert out.shape == z.shape
    out.square().sum().backward()
    assert not [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()]


def test_draws_do_not_see_each_other() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, *rest = inputs()
    out = prior(z, log_snr, *rest)
    for k in range(3):
        alone = prior(z[:, k : k + 1], log_snr[:, k : k + 1], *rest)
        torch.testing.assert_close(alone[:, 0], out[:, k], atol=1e-5, rtol=1e-4)


def test_text_is_a_set_padding_is_unseen_and_dropping_hides_it() -> None:
    prior = awake(Prior(CONFIG, 24, 12))
    z, log_snr, text, mask, embedding, keep = inputs()
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


def test_sampling_keeps_the_nearer_of_the_draws_and_is_keyed() -> None:
    _, _, text, mask, embedding, _ = inputs(4, 1)
    place = torch.where(mask, torch.arange(mask.shape[1]), -1)
    encoding = TextEncoding(embedding, text, place)
    diffusion = DiffusionConfig("x0", "x0")

    def identity(z, log_snr, *rest):  # x0 = z: each draw keeps the direction it starts with
        return z

    sample_ids = torch.arange(4)
    whiten = Whitening(embedding.shape[1])
    sample = lambda n: sample_embeddings(  # noqa: E731
        identity,
        whiten,
        diffusion,
        encoding,
        sample_ids,
        SampleConfig(prior_draws=n, prior_steps=2),
    )
    two, four = sample(2), sample(4)
    torch.testing.assert_close(two.norm(dim=-1), torch.ones(4))
    assert ((four * embedding).sum(-1) >= (sample(1) * embedding).sum(-1) - 0.5).all()
    assert (four * embedding).sum() > (sample(1) * embedding).sum()
    torch.testing.assert_close(sample(2), two)
    half = TextEncoding(embedding[2:], text[2:], place[2:])
    alone = sample_embeddings(
        identity,
        whiten,
        diffusion,
        half,
        sample_ids[2:],
        SampleConfig(prior_draws=2, prior_steps=2),
    )
    torch.testing.assert_close(alone, two[2:])
