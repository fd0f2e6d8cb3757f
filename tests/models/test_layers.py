"""The small blocks: closed forms, zero starts, dropout."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dalle2_video.models.layers import (
    AdaptiveNorm,
    ResBlock,
    TemporalConv,
    sinusoidal,
)
from dalle2_video.models.prior import PriorBlock
from dalle2_video.models.prior_config import PriorConfig
from tests.helpers.networks import awake


def test_sinusoidal_embeddings_are_sines_then_cosines_of_falling_frequencies() -> None:
    x = torch.tensor([0.0, 1.5, -40.0])
    found = sinusoidal(x, 6, 1000.0)
    for row, value in zip(found.tolist(), x.tolist(), strict=True):
        angles = [value, value / 10, value / 100]  # 1000^(-k / 3)
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(torch.tensor(row), torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_adaptive_norm_takes_its_scale_and_shift_from_each_frames_condition() -> None:
    layer = AdaptiveNorm(2, 3)
    x, cond = torch.randn(1, 2, 2, 2, 2), torch.randn(1, 2, 3)
    torch.testing.assert_close(layer(x, cond), F.layer_norm(x, (2,)))  # at the start
    with torch.no_grad():
        layer.to_scale_shift.bias.copy_(torch.tensor([0.5, 0.0, 0.0, 7.0]))
        layer.to_scale_shift.weight[2, 0] = 1.0  # shifts channel 0 by the condition's first value
    plain = F.layer_norm(x, (2,))
    torch.testing.assert_close(layer(x, cond)[..., 1], plain[..., 1] + 7)
    shift = cond[:, :, 0, None, None]
    torch.testing.assert_close(layer(x, cond)[..., 0], 1.5 * plain[..., 0] + shift)


def test_residual_branches_start_as_nothing() -> None:
    x, cond = torch.randn(1, 3, 4, 4, 8), torch.randn(1, 3, 5)
    assert torch.equal(ResBlock(8, 8, 5)(x, cond), x)
    assert torch.equal(TemporalConv(8)(x), x)
    tokens, mask = torch.randn(1, 4, 8), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(PriorBlock(PriorConfig(8, 1, 2))(tokens, mask), tokens)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    x, cond = torch.randn(1, 3, 4, 4, 8), torch.randn(1, 3, 5)
    block = awake(ResBlock(8, 8, 5, dropout=0.5))
    assert torch.equal(block(x, cond), block(x, cond))
    block.train()
    assert not torch.equal(block(x, cond), block(x, cond))

    tokens, mask = torch.randn(1, 4, 8), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    prior = awake(PriorBlock(PriorConfig(8, 1, 2, dropout=0.5)))
    assert torch.equal(prior(tokens, mask), prior(tokens, mask))
    prior.train()
    for branch in (prior.to_out, prior.mlp[2]):  # each of its branches alone
        saved = [p.clone() for p in branch.parameters()]
        for parameter in branch.parameters():
            nn.init.zeros_(parameter)
        assert not torch.equal(prior(tokens, mask), prior(tokens, mask))
        with torch.no_grad():
            for parameter, value in zip(branch.parameters(), saved, strict=True):
                parameter.copy_(value)
