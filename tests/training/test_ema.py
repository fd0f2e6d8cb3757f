"""EMA: the decay's closed forms, the average against a reference, and swapping without a trace."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dalle2_video.training.config import RunConfig
from dalle2_video.training.ema import Ema, ema_decay
from dalle2_video.training.loop import train
from dalle2_video.training.sharded import WholeParams
from tests.helpers.tiny_stage import tiny_config, tiny_stage


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    return model


def test_decay_is_a_half_life():
    assert ema_decay(10**9, 500, 500.0, 0.05) == pytest.approx(0.5)
    for batch in (1, 8, 50):  # decays multiply to one half over a half-life, whatever the batch
        assert ema_decay(10**9, batch, 400.0, 0.05) ** (400 / batch) == pytest.approx(0.5)


def test_ramp_up():
    assert ema_decay(0, 8, 500.0, 0.05) == 0.0  # the first step: the average is the weights
    assert ema_decay(1000, 8, 500.0, 0.05) == pytest.approx(0.5 ** (8 / 50))
    at_the_knee = ema_decay(10_000, 8, 500.0, 0.05)
    assert at_the_knee == pytest.approx(ema_decay(20_000, 8, 500.0, 0.05))
    decays = [ema_decay(clips, 8, 500.0, 0.05) for clips in range(0, 12_000, 8)]
    assert decays == sorted(decays)


def test_average_against_float64_recursion():
    model = net()
    ema = Ema(WholeParams(model), halflife_clips=64.0, rampup=0.5)
    expected = model[0].weight.detach().double()
    for step in range(30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
        ema.update(step * 8, 8)
        halflife = min(64.0, 0.5 * step * 8)
        decay = 0.5 ** (8 / halflife) if halflife else 0.0
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    assert torch.allclose(ema.average["0.weight"].double(), expected, atol=1e-6)
    assert set(ema.average) == {"0.weight", "0.bias"}  # what is frozen is not averaged


def test_average_of_constant_weights_is_the_weights():
    model = net()
    ema = Ema(WholeParams(model), 64.0, 0.5)
    for step in range(20):
        ema.update(step * 8, 8)
    assert torch.equal(ema.average["0.weight"], model[0].weight)


def test_a_run_averages_by_the_clips_before_each_step(tmp_path) -> None:
    """The raw weights of each step, averaged here by the closed form, are the run's EMA."""
    cfg = tiny_config(save_every_clips=8, keep_checkpoints=4, ema_halflife_clips=24.0)
    train(tiny_stage(val_set=None), cfg, RunConfig(str(tmp_path)))
    expected = None
    for step in range(4):
        folder = tmp_path / "checkpoints" / f"{8 * (step + 1):012d}"
        weights = load_file(folder / "model.safetensors")["up.weight"]
        decay = ema_decay(8 * step, 8, 24.0, cfg.ema_rampup)
        expected = weights if step == 0 else decay * expected + (1 - decay) * weights
        average = load_file(folder / "ema.safetensors")["up.weight"]
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-5)


def test_swap_in_and_out_is_exact():
    model = net()
    ema = Ema(WholeParams(model), 64.0, 0.5)
    ema.average["0.weight"].fill_(2.0)
    model[0].weight.grad = torch.ones(3, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(model[0].weight, torch.full((3, 4), 2.0))
        assert torch.equal(model[1].weight, before["1.weight"])
        raise KeyError  # an error inside restores too
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model[0].weight.grad, torch.ones(3, 4))
    assert torch.equal(ema.average["0.weight"], torch.full((3, 4), 2.0))


def test_low_precision_weights_have_a_float32_average():
    model = net().bfloat16()
    ema = Ema(WholeParams(model), 1e6, 1e6)
    ema.update(0, 8)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    start = ema.average["0.weight"].clone()
    ema.update(1000, 8)  # moves by 5.5e-6, far below the resolution of bfloat16
    moved = ema.average["0.weight"] - start
    assert ema.average["0.weight"].dtype == torch.float32
    assert (moved > 0).float().mean() > 0.9


def test_full_state_round_trip():
    ema = Ema(WholeParams(net()), 64.0, 0.5)
    ema.average["0.bias"].fill_(7.0)
    other = Ema(WholeParams(net()), 64.0, 0.5)
    other.load_full_state(ema.full_state())
    assert torch.equal(other.average["0.bias"], torch.full((3,), 7.0))
    with pytest.raises(ValueError, match=r"0\.bias"):
        other.load_full_state({"0.weight": torch.zeros(3, 4)})
