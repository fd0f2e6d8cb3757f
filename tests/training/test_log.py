"""What a run tells: metrics.jsonl, the terminal, sample videos."""

import io
import sys

import av
import numpy as np

from dalle2_video.training.log import RunLog, clock, read_metrics
from dalle2_video.training.stage import Sample
from dalle2_video.training.trackers import NoTracker

VALUES = {"loss": 0.5, "grad_norm": 1.25, "lr": 1e-4, "clips_per_second": 12.5}


def test_metrics_lines_and_trim(tmp_path):
    log = RunLog(tmp_path, "base", NoTracker(), 0)
    for clips in (8, 16, 24):
        log.train(clips, VALUES, clips / 32, 1.0)
    log.validation(16, {"loss": float("nan")})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["clips"] for line in lines] == [8, 16, 24, 16]
    assert lines[0] == {"clips": 8, **VALUES}
    assert lines[3] == {"clips": 16, "val/loss": None}  # strict JSON knows no NaN
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"clips": 32, "lo')  # a kill in the middle of a line
    RunLog(tmp_path, "base", NoTracker(), 16).close()  # a run that resumes at 16
    assert [line["clips"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [8, 16, 16]


def test_plain_lines_when_no_terminal(tmp_path, capsys):
    log = RunLog(tmp_path, "base", NoTracker(), 0)
    log.train(8_000, VALUES, 0.25, 3723.0)
    line = capsys.readouterr().out
    for part in ("[base]", "25.0%", "clips 8,000", "0.5000", "1.250", "1.00e-04", "12.5 clips/s"):
        assert part in line
    assert "left 1:02:03" in line
    assert "\r" not in line


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLog(tmp_path, "base", NoTracker(), 0)
    log.progress(0.5)
    log.train(16, VALUES, 0.5, 90.0)
    log.close()
    shown = sys.stderr.getvalue()
    assert "50%" in shown
    assert "left 1:30" in shown
    assert "\r" in shown


def test_clock():
    assert [clock(s) for s in (0, 59.6, 3600, 86399)] == ["0:00", "1:00", "1:00:00", "23:59:59"]
    assert clock(float("inf")) == "?"


def test_samples_are_playable_videos_with_captions(tmp_path):
    log = RunLog(tmp_path, "base", NoTracker(), 0)
    ramp = np.linspace(0, 255, 8 * 32 * 32 * 3).reshape(8, 32, 32, 3).astype(np.uint8)
    log.samples(64, [Sample("she smiles", ramp), Sample("he nods, warm light", 255 - ramp)])
    files = sorted((tmp_path / "samples").glob("*.mp4"))
    assert [f.name for f in files] == ["000000000064_00.mp4", "000000000064_01.mp4"]
    with av.open(str(files[0])) as video:
        assert len(list(video.decode(video=0))) == 8
    text = (tmp_path / "samples/000000000064.txt").read_text()
    assert text.splitlines()[1] == "000000000064_01.mp4\the nods, warm light"


def test_a_tracker_that_fails_costs_its_curves_and_not_the_training(tmp_path, capsys):
    class Unreachable(NoTracker):
        def log(self, clips, values):
            raise ConnectionError(f"no route for {sorted(values)}")

    log = RunLog(tmp_path, "base", Unreachable(), 0)
    log.train(8, VALUES, 0.25, 1.0)
    log.validation(8, {"loss": 0.5})
    shown = capsys.readouterr().out
    named = ["train/clips_per_second", "train/grad_norm", "train/loss", "train/lr"]
    assert f"[base] tracker: ConnectionError: no route for {named}\n" in shown
    assert "[base] tracker: ConnectionError: no route for ['val/loss']\n" in shown
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
