"""What does not change the losses (the micro-batch), and what changes them little (precision)."""

import pytest
import torch

from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from tests.helpers.run_files import metric, weights
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage


def test_loss_does_not_depend_on_the_micro_batch(done, tmp_path) -> None:
    for micro in (4, 1):
        folder = tmp_path / str(micro)
        train(tiny_stage(), tiny_config(micro_batch_size=micro), RunConfig(str(folder)))
        assert metric(folder) == pytest.approx(metric(done), abs=1e-6)
        for name, tensor in weights(folder).items():
            assert torch.allclose(tensor, weights(done)[name], atol=1e-6)
    assert len(metric(done)) == 4


def test_bf16_trains_float32_weights(done, tmp_path) -> None:
    stage = tiny_stage()
    train(stage, tiny_config(), RunConfig(str(tmp_path), mixed_precision="bf16"))
    assert stage.model.up.weight.dtype == torch.float32
    low, full = metric(tmp_path), metric(done)
    assert low != full
    assert low == pytest.approx(full, rel=0.03)


def test_draws_are_keyed_by_seed_and_sample_ids(tmp_path) -> None:
    """What draws from torch's global generator (dropout) does so whatever was drawn before."""

    def draws(name: str, seed: int, before: int) -> dict[int, float]:
        drawn = {}

        def drawing(model, batch, step):
            if model.training:
                drawn[step.first] = float(torch.rand(()))
            return objective(model, batch, step)

        stage = tiny_stage(objective=drawing, val_set=None)
        torch.manual_seed(before)
        train(stage, tiny_config(), RunConfig(str(tmp_path / name), seed=seed))
        return drawn

    a, b, c = draws("a", 0, 1), draws("b", 0, 2), draws("c", 1, 1)
    assert a == b and len(set(a.values())) == 4
    assert all(a[first] != c[first] for first in a)


@pytest.mark.gpu
def test_fp16_halves_its_scale_until_gradients_are_finite_and_trains(tmp_path) -> None:
    run = RunConfig(str(tmp_path / "fp16"), mixed_precision="fp16")
    stage = tiny_stage()
    result = train(stage, tiny_config(clips=320, lr_schedule="constant"), run)
    train(tiny_stage(), tiny_config(clips=320), RunConfig(str(tmp_path / "no")))
    assert result.progress.optimizer_steps == 40 and result.progress.skipped < 20
    assert stage.model.up.weight.dtype == torch.float32
    assert metric(tmp_path / "fp16")[320] < 0.9 * metric(tmp_path / "no")[8]
