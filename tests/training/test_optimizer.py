"""The learning rate's closed forms, and which parameters the optimizer holds."""

import copy

import pytest
import torch
from torch import nn

from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import lr_factor, param_groups
from tests.helpers.run_files import metric
from tests.helpers.tiny_stage import TinyNet, tiny_config, tiny_stage


def test_lr_factor_closed_forms() -> None:
    assert lr_factor(8, 0.0, 0, "constant") == 1.0
    assert [lr_factor(c, 0.0, 32, "constant") for c in (8, 16, 32, 64)] == [0.25, 0.5, 1.0, 1.0]
    assert lr_factor(8, 0.0, 0, "cosine") == 1.0
    assert lr_factor(8, 0.5, 0, "cosine") == pytest.approx(0.5)
    assert lr_factor(8, 1.0, 0, "cosine") == pytest.approx(0.0)
    assert lr_factor(8, 1.5, 0, "cosine") == pytest.approx(0.0)  # over time by a step
    assert lr_factor(8, 0.25, 16, "cosine") == pytest.approx(0.5 * (0.5 + 0.5**1.5))
    with pytest.raises(ValueError, match="lr_schedule"):
        lr_factor(8, 0.0, 0, "linear")


def test_lr_of_a_run(done) -> None:
    expected = [0.01 * lr_factor(8 * (i + 1), i / 4, 16, "cosine") for i in range(4)]
    assert list(metric(done, "lr").values()) == pytest.approx(expected)


def test_optimizer_holds_every_trainable_parameter_once() -> None:
    model = TinyNet()
    groups = param_groups(model, 0.1)
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model.up.weight), id(model.down.weight)}


def test_every_trainable_parameter_moves_and_no_other(tmp_path) -> None:
    stage = tiny_stage()
    before = copy.deepcopy(dict(stage.model.named_parameters()))
    train(stage, tiny_config(clips=8), RunConfig(str(tmp_path)))
    for name, parameter in stage.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("tower."), name


def test_parameter_that_cannot_be_split_is_refused() -> None:
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"temperature.*\(1,\)"):
        param_groups(model, 0.0)
    with pytest.raises(ValueError, match="no parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)
