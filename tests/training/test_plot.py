"""The curves of a run as PNG."""

import subprocess
import sys

import av
import pytest

from dalle2_video.errors import UserError
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.plot import curves, plot
from tests.helpers.launching import ROOT
from tests.helpers.tiny_stage import tiny_config, tiny_stage


def test_curves_by_metric_and_kind() -> None:
    lines = [
        {"clips": 8, "loss": 2.0, "seconds": 1.0},
        {"clips": 16, "loss": None},  # was not finite
        {"clips": 16, "val/loss": 1.5},
    ]
    assert curves(lines) == {"loss": {"train": [(8, 2.0)], "val": [(16, 1.5)]}}


def test_a_picture_per_stage(tmp_path) -> None:
    for stage in ("clip", "base"):
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / stage)))
    (tmp_path / "notes").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dalle2_video.training.plot", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / stage / "plot.png") for stage in ("base", "clip")
    ]
    assert "32 clips" in done.stdout
    with av.open(str(tmp_path / "base/plot.png")) as picture:
        frame = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape[1] > 1000 and 0.5 < (frame > 250).mean() < 0.999  # lines on white


def test_a_folder_without_metrics_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match="no stage with a metrics"):
        plot(tmp_path)
