"""The benchmark of the learned variance: when a run diverges, and what the recipes share."""

import math

import pytest
import torch

from benchmarks.learned_variance import RECIPES, Divergence, network, unconditional
from dalle2_video.diffusion.variance import split_output
from tests.helpers.networks import awake


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
