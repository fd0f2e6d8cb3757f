"""Validation leaves no trace, sees the EMA, and weighs every clip the same."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dalle2_video.model_file import load_model
from dalle2_video.training.config import RunConfig
from dalle2_video.training.ema import Ema
from dalle2_video.training.loop import train
from dalle2_video.training.sharded import WholeParams
from dalle2_video.training.validation import no_trace
from tests.helpers.run_files import assert_same_bits, metric, weights
from tests.helpers.tiny_stage import TinyNet, objective, tiny_config, tiny_stage


def test_validation_leaves_no_trace(done, tmp_path) -> None:
    """A known mistake: it ran in train mode and back-propagated."""
    seen = []

    def validate(model, accelerator):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(3)
        seen.append(float(model(torch.ones(1, 8)).sum()))
        return {"sum": seen[-1]}

    busy = tiny_stage(validate=validate, samples=lambda model, accelerator: [])
    train(busy, tiny_config(val_every_clips=8), RunConfig(str(tmp_path / "busy")))
    quiet = tiny_stage(val_set=None)
    train(quiet, tiny_config(val_every_clips=None), RunConfig(str(tmp_path / "quiet")))
    assert len(seen) == 4
    assert_same_bits(weights(tmp_path / "busy"), weights(tmp_path / "quiet"))
    assert metric(tmp_path / "busy", "val/sum") == dict(zip((8, 16, 24, 32), seen, strict=True))
    assert busy.model.training


def test_a_network_in_eval_mode_is_trained_in_train_mode(tmp_path) -> None:
    modes = []

    def noting(model, batch, step):
        modes.append(model.training)
        return objective(model, batch, step)

    stage = tiny_stage(objective=noting, val_set=None)
    stage.model.eval()
    train(stage, tiny_config(clips=16), RunConfig(str(tmp_path)))
    assert modes == [False, True, True]  # the first counts the memory


def test_validation_sees_the_ema_weights(tmp_path) -> None:
    seen = []

    def validate(model, accelerator):
        seen.append(model.up.weight.detach().clone())
        return {}

    train(tiny_stage(validate=validate), tiny_config(), RunConfig(str(tmp_path)))
    state = load_model(tmp_path / "model.safetensors", "tiny").state
    assert torch.equal(seen[-1], state["up.weight"])


def test_no_trace_restores_gradients_flags_weights_and_generators() -> None:
    model = TinyNet()
    model.tower.eval()  # a frozen tower stays in eval mode
    ema = Ema(WholeParams(model), 64.0, 0.5)
    ema.average["up.weight"].zero_()
    gradient = torch.ones_like(model.up.weight)
    model.up.weight.grad = gradient.clone()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with pytest.raises(KeyError), no_trace(model, ema):
        assert not model.training
        assert not model.up.weight.any()
        torch.rand(10), random.random(), np.random.rand()
        raise KeyError
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert torch.is_grad_enabled()
    assert model.training
    assert not model.tower.training
    assert torch.equal(model.up.weight.grad, gradient)
    assert_same_bits(state, model.state_dict())


def test_default_validation_is_the_mean_over_all_clips(tmp_path) -> None:
    """10 clips in batches of 4: the short last batch weighs less."""
    stage = tiny_stage()
    cfg = tiny_config(micro_batch_size=4, clips=8, ema_halflife_clips=None)
    result = train(stage, cfg, RunConfig(str(tmp_path), seed=4))
    stage.model.eval()
    step = SimpleNamespace(seed=4, device=torch.device("cpu"), accelerator=None)
    total = 0.0
    for index in range(10):
        batch = stage.val_set.collate([stage.val_set.eval_pointer(index)])
        step.sample_ids = batch.sample_ids
        total += objective(stage.model, batch, step).loss.item()
    assert result.metrics["loss"] == pytest.approx(total / 10, abs=1e-6)
