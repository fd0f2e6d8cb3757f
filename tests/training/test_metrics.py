"""The metrics of a run: averaged between log lines, also where they are read a step later."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dalle2_video.training import loop, metrics
from dalle2_video.training.checkpoint_files import whole_checkpoints
from dalle2_video.training.config import RunConfig
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from dalle2_video.training.metrics import AsyncMetrics, MetricsAverager
from dalle2_video.training.preemption import Interrupted
from dalle2_video.training.stage import Loss
from tests.helpers.run_files import metric
from tests.helpers.tiny_stage import broken, objective, tiny_config, tiny_stage


def test_averages_and_speed_by_hand(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    averager = MetricsAverager()
    for loss, lr in ((1.0, 0.1), (3.0, 0.2)):
        with averager.waiting():
            clock.now += 1.0
        clock.now += 4.0  # computing
        averager.add({"loss": loss, "lr": lr}, 8)
    averager.add({"lr": 0.3, "seldom": 7.0}, 8)
    with pytest.raises(KeyError), averager.paused():
        clock.now += 50.0  # validation and a save
        raise KeyError
    found = averager.averages()
    assert found == {
        "loss": 2.0, "lr": 0.3, "seldom": 7.0, "clips_per_second": 2.4, "data_wait": 0.2
    }  # fmt: skip


def test_metrics_arrive_in_order_some_steps_behind() -> None:
    sent = AsyncMetrics(2)
    arrived = []
    for step in range(5):
        sent.send(["step"], torch.tensor([float(step)]))
        arrived.append([values["step"] for values in sent.arrived(everything=False)])
    assert arrived == [[], [], [0.0], [1.0], [2.0]]
    assert [values["step"] for values in sent.arrived(everything=True)] == [3.0, 4.0]


def test_metrics_of_a_run(done, tmp_path) -> None:
    train(tiny_stage(), tiny_config(log_every_clips=16), RunConfig(str(tmp_path)))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["clips"] for line in lines] == [16, 16, 32, 32]
    for line in lines[::2]:
        assert line["clips_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert {"loss", "worst", "grad_norm", "lr", "seconds", "skipped"} <= line.keys()
    fine, lr = metric(done), metric(done, "lr")
    assert lines[0]["loss"] == pytest.approx((fine[8] + fine[16]) / 2)  # not the last step's
    assert lines[0]["lr"] == lr[16]


def test_metrics_read_a_step_later_are_the_same(tmp_path, monkeypatch) -> None:
    """As on a GPU: the log lines, the count of skipped steps, and the end by a signal."""
    cfg = tiny_config(clips=96, log_every_clips=24, warmup_clips=0)
    stage = tiny_stage(objective=broken({8, 40}))
    train(stage, cfg, RunConfig(str(tmp_path / "at once")))
    monkeypatch.setattr(loop, "AsyncMetrics", lambda max_behind: AsyncMetrics(1))
    train(tiny_stage(objective=broken({8, 40})), cfg, RunConfig(str(tmp_path / "later")))
    keys = ("clips", "loss", "grad_norm", "lr", "skipped", "val/loss")
    a, b = (
        [{k: line[k] for k in keys if k in line} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (tmp_path / "at once", tmp_path / "later")
    )
    assert a == b and a[-2]["skipped"] == 2

    def signalling(model, batch, step):
        if step.first == 32 and model.training:
            os.kill(os.getpid(), signal.SIGUSR1)
        return objective(model, batch, step)

    run = RunConfig(str(tmp_path / "signal"))
    with pytest.raises(Interrupted):
        train(tiny_stage(objective=signalling), replace(cfg, save_every_clips=None), run)
    saved = whole_checkpoints(tmp_path / "signal/checkpoints")
    assert [path.name for path in saved] == ["000000000048"]  # not 40: one step later


@pytest.mark.gpu
def test_no_step_waits_for_the_device(tmp_path) -> None:
    """From the third step to the last log line; torch raises at every synchronisation."""

    def plain(model, batch, step):
        if model.training and step.first >= 16:
            torch.cuda.set_sync_debug_mode("error" if step.first < 72 else "default")
        return Loss((model(batch.x) - batch.x).square().mean())

    cfg = tiny_config(clips=96, log_every_clips=96, val_every_clips=None, save_every_clips=None)
    try:
        result = train(tiny_stage(objective=plain, val_set=None), cfg, RunConfig(str(tmp_path)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.progress.clips == 96 and result.progress.skipped == 0
