"""Gradient clipping, and optimizer steps that are skipped because something is not finite."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dalle2_video.training import prepare
from dalle2_video.training.checkpoint_files import whole_checkpoints
from dalle2_video.training.config import RunConfig
from dalle2_video.training.divergence import DivergenceCheck, TrainingDiverged
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import param_groups
from dalle2_video.training.optimizer_update import grad_clip_groups
from dalle2_video.training.stage import Loss
from tests.helpers.run_files import assert_same_bits, metric, weights
from tests.helpers.tiny_stage import broken, objective, tiny_config, tiny_stage


def test_gradient_is_clipped_by_its_global_norm(tmp_path, monkeypatch) -> None:
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            seen.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))
            return super().step(closure)

    def make(model, cfg):
        return Spy(param_groups(model, 0.0), lr=cfg.lr, fused=True)

    monkeypatch.setattr(prepare, "make_optimizer", make)
    train(tiny_stage(), tiny_config(grad_clip=0.25), RunConfig(str(tmp_path)))
    norms = metric(tmp_path, "grad_norm").values()
    assert all(norm > 0.25 for norm in norms)  # what is logged is the norm before clipping
    assert seen == pytest.approx([0.25] * 4, rel=1e-4)


def test_a_separate_grad_clip_does_not_shrink_the_steps_of_the_rest(tmp_path) -> None:
    """A part with an immense gradient of its own: the rest is trained as if it had none."""

    def immense(factor: float):
        def with_part(model: nn.Module, batch, step) -> Loss:
            part = model.part(batch.x).square().mean()
            return Loss(objective(model, batch, step).loss + factor * part)

        return with_part

    def trained(name: str, separate: tuple[str, ...], factor: float):
        stage = tiny_stage(objective=immense(factor), val_set=None)
        stage.model.part, stage.model.separate_grad_clip = nn.Linear(8, 8), separate
        before = stage.model.part.weight.detach().clone()
        train(stage, tiny_config(grad_clip=1e-3), RunConfig(str(tmp_path / name)))
        assert not torch.equal(stage.model.part.weight, before)  # it learns
        (line, *_) = read_metrics(tmp_path / name / "metrics.jsonl")
        return {n: t for n, t in weights(tmp_path / name).items() if "part." not in n}, line

    quiet, first = trained("quiet", ("part",), 1e-3)
    loud, second = trained("loud", ("part",), 1e6)
    together, _ = trained("together", (), 1e6)
    assert_same_bits(quiet, loud)
    assert first["grad_norm"] == second["grad_norm"]  # the rest's
    assert any(not torch.equal(quiet[name], together[name]) for name in quiet)


def test_groups_of_gradient_clipping_go_by_whole_names() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("part", "partner", "frozen")})
    model.frozen.requires_grad_(False)
    model.separate_grad_clip = ("part",)
    rest, separate = grad_clip_groups(model)
    assert [id(p) for p in rest] == [id(p) for p in model.partner.parameters()]
    assert [id(p) for p in separate] == [id(p) for p in model.part.parameters()]
    assert len(grad_clip_groups(nn.Linear(2, 2))) == 1


@pytest.mark.parametrize("where", ["loss", "separate"])
def test_a_step_is_skipped_wherever_it_is_not_finite(tmp_path, where) -> None:
    """In the loss alone, with finite gradients; in a gradient that is clipped separately alone."""

    def one_bad(model: nn.Module, batch, step) -> Loss:
        loss = objective(model, batch, step).loss + model.part(batch.x).square().mean()
        if step.first == 8:
            model.part.weight.register_hook(lambda g: g * float("nan" if where != "loss" else 1))
            loss = loss + (float("inf") if where == "loss" else 0.0)
        return Loss(loss)

    stage = tiny_stage(objective=one_bad, val_set=None)
    stage.model.part, stage.model.separate_grad_clip = nn.Linear(8, 8), ("part",)
    result = train(stage, tiny_config(clips=16, save_every_clips=8), RunConfig(str(tmp_path)))
    assert result.progress.skipped == 1
    first, second = (
        load_file(p / "model.safetensors") for p in sorted((tmp_path / "checkpoints").iterdir())
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, value, optimizer) -> None:
    stage = tiny_stage(objective=broken({16}, value), val_set=None)
    cfg = tiny_config(save_every_clips=8, keep_checkpoints=4, warmup_clips=0, optimizer=optimizer)
    result = train(stage, cfg, RunConfig(str(tmp_path)))
    assert (result.progress.optimizer_steps, result.progress.skipped) == (4, 1)
    for name in ("model.safetensors", "ema.safetensors"):
        before, skipped, after = (
            load_file(tmp_path / "checkpoints" / f"{clips:012d}" / name) for clips in (16, 24, 32)
        )
        assert_same_bits(before, skipped)
        assert not torch.equal(before["up.weight"], after["up.weight"])
        assert all(t.isfinite().all() for t in after.values())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1]
    assert lines[2]["loss"] is None


def test_three_such_steps_in_a_row_are_an_error(tmp_path) -> None:
    cfg = tiny_config(clips=80, save_every_clips=16)
    stage = tiny_stage(objective=broken({0, 8, 32, 40, 56, 64, 72}), val_set=None)
    good = "000000000064"  # its weights are those of clip 56
    wanted = rf"tiny: not finite in 3 steps in a row, up to clip 80 .*loss nan.*{good}"
    with pytest.raises(TrainingDiverged, match=wanted):
        train(stage, cfg, RunConfig(str(tmp_path)))
    assert [p.name for p in whole_checkpoints(tmp_path / "checkpoints")][-1] == good
    stage = tiny_stage(objective=broken(set(range(80))), val_set=None)
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(stage, tiny_config(save_every_clips=None), RunConfig(str(tmp_path / "new")))


def test_overflows_of_fp16_may_last_longer() -> None:
    """They halve the gradient's scale; a loss that is not finite is no overflow."""
    overflow = {"loss": 1.0, "grad_norm": float("inf")}
    check = DivergenceCheck("tiny", True, lambda: None)
    for _ in range(49):
        check.note(False, 8, overflow)
    with pytest.raises(TrainingDiverged, match="not finite in 50 steps in a row"):
        check.note(False, 8, overflow)
    for fp16, values in ((False, overflow), (True, overflow | {"loss": float("nan")})):
        check = DivergenceCheck("tiny", fp16, lambda: None)
        check.note(False, 8, values), check.note(False, 16, values)
        with pytest.raises(TrainingDiverged, match="not finite in 3 steps in a row"):
            check.note(False, 24, values)
