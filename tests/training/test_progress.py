"""How far a run is: by clips, and by a budget of time."""

import math
import shutil
from types import SimpleNamespace

import pytest

from dalle2_video.training import loop
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import lr_factor
from dalle2_video.training.progress import Progress
from tests.helpers.run_files import half_done, metric
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The loop's clock: `now` in seconds, which the test moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def taking(seconds: float, clock: SimpleNamespace):
    """The tiny objective, which takes its time."""

    def slow(model, batch, step):
        clock.now += seconds
        return objective(model, batch, step)

    return slow


def test_what_is_due_and_what_is_left() -> None:
    cfg = tiny_config(clips=100, batch_size=8)
    seen = [clips for clips in range(8, 105, 8) if Progress(clips).due(cfg, 20)]
    assert seen == [24, 40, 64, 80, 104]  # the first at or after each multiple, and the end
    assert [c for c in range(8, 105, 8) if Progress(c).due(cfg, None)] == [104]
    assert Progress(clips=40).seconds_left(cfg, 5.0) == 12.0
    assert Progress(clips=40).seconds_left(cfg, 0.0) == math.inf
    timed = tiny_config(minutes=2.0)
    assert Progress(seconds=30.0).fraction(timed) == 0.25
    assert Progress(seconds=30.0).seconds_left(timed, 5.0) == 90.0


def test_minutes_rule_the_schedule_and_the_end(tmp_path, clock) -> None:
    cfg = tiny_config(minutes=0.5, warmup_clips=0, save_every_clips=8, clips=1, keep_checkpoints=9)
    run = RunConfig(str(tmp_path))
    result = train(tiny_stage(objective=taking(6.0, clock), val_set=None), cfg, run)
    assert result.progress.optimizer_steps == 5
    assert result.progress.seconds == pytest.approx(30.0)
    expected = [0.01 * lr_factor(8, i / 5, 0, "cosine") for i in range(5)]
    assert list(metric(tmp_path, "lr").values()) == pytest.approx(expected)
    for newer in ("000000000040", "000000000032", "000000000024"):
        shutil.rmtree(tmp_path / "checkpoints" / newer)
    clock.now = 1e6  # another process, another day
    again = train(tiny_stage(objective=taking(6.0, clock), val_set=None), cfg, run)
    assert again.progress.optimizer_steps == 5
    assert again.progress.seconds == pytest.approx(30.0)


def test_a_timed_run_is_validated_at_its_end_however_long_a_save_takes(
    tmp_path, clock, monkeypatch
) -> None:
    save = loop.Checkpoints.save

    def slow_save(self, progress):
        clock.now += 9.0  # the one after the second step crosses the budget of 20 s
        save(self, progress)

    monkeypatch.setattr(loop.Checkpoints, "save", slow_save)
    cfg = tiny_config(minutes=1 / 3, save_every_clips=16, val_every_clips=None)
    result = train(tiny_stage(objective=taking(6.0, clock)), cfg, RunConfig(str(tmp_path)))
    assert result.progress.optimizer_steps == 3 and "loss" in result.metrics
    assert list(metric(tmp_path, "val/loss")) == [24]


def test_a_timed_run_that_is_killed_after_its_last_save_goes_on_to_its_end(tmp_path, clock) -> None:
    """A validation crosses the budget, and the save behind it is not the end."""

    def slow(model, accelerator):
        clock.now += 9.0
        return {"steps": 1.0}

    cfg = tiny_config(minutes=1 / 3, save_every_clips=16, val_every_clips=16)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        stage = tiny_stage(objective=taking(6.0, clock), validate=slow)
        result = train(stage, cfg, RunConfig(str(folder)))
        assert result.progress.optimizer_steps == 3
        assert list(metric(folder, "val/steps")) == [16, 24]
        if folder == whole:
            half_done(whole, killed, 24)
    assert metric(killed, "loss") == metric(whole, "loss")
