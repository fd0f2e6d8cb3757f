"""`make demo`: what is run, what is kept, and what the table and the page say."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.evaluation import demo
from dalle2_video.evaluation.demo import Demo, last_validation
from dalle2_video.evaluation.page import grid, read_mp4

JUDGED = {
    "samples": 3.0, "attribute_accuracy": 0.7, "attribute_accuracy_low": 0.65,
    "attribute_accuracy_high": 0.75, "attribute_chance": 0.4, "attribute_accuracy_shuffled": 0.35,
    "attribute_chance_shuffled": 0.33, "ceiling_accuracy": 0.99, "accuracy_of_base": 0.71,
}  # fmt: skip
VALIDATION = {
    "clip": {"recall_at_1_chance": 1 / 295, "recall_at_1_text_to_video": 0.7,
             "recall_at_1_video_to_text": 0.6},
    "prior": {"loss": 0.1, "cosine_to_video": 0.9, "cosine_to_another_video": 0.4},
    "base": {"loss": 0.0123}, "tsr": {"loss": 0.0456}, "ssr": {"loss": 0.0789},
}  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """Scripts that write what the real ones leave; the list of those that ran."""
    calls, fail = [], set()

    def run(command, check):
        script = Path(command[1]).stem
        calls.append(command)
        values = dict(part.split("=", 1) for part in command[2:])
        folder = Path(values["run_dir"])
        if script in fail:
            raise subprocess.CalledProcessError(1, command)
        stage = values.get("unet", {"train_clip": "clip", "train_prior": "prior"}.get(script))
        if stage:
            (folder / stage).mkdir(parents=True, exist_ok=True)
            line = {f"val/{k}": v for k, v in VALIDATION[stage].items()}
            early = json.dumps({"clips": 1, **{k: 9.0 for k in line}})
            text = early + "\n" + json.dumps({"clips": 1234, **line}) + '\n{"clips": 9, "lr": 1}\n'
            (folder / stage / "metrics.jsonl").write_text(text)
        if script == "evaluate":
            (folder / "report.json").write_text(json.dumps(JUDGED))
            (folder / "captions.json").write_text(json.dumps(["a <b> man", "b", "c"]))
            for i in range(3):
                for stage, frames, size in (("base", 8, 32), ("tsr", 16, 32), ("ssr", 16, 64)):
                    clip = np.full((frames, size, size, 3), 60 * i + 40, np.uint8)
                    path = folder / "clips" / stage / f"{i:04d}.mp4"
                    encode_mp4(path, clip, frames / 2)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "faster_precision", lambda: ("no", 340.0))
    monkeypatch.setattr(demo, "provenance", lambda: dict.fromkeys(PLACE, "of the start"))
    return calls, fail


PLACE = ("commit", "hardware", "versions")


def test_stages_share_the_minutes_and_the_report_holds_every_figure(ran, tmp_path, capsys) -> None:
    calls, _ = ran
    Demo(20, str(tmp_path), "data/x", ["seed=4"]).run()
    assert [Path(c[1]).stem for c in calls] == [
        "preprocess", "train_clip", "train_prior", *["train_decoder"] * 3, "evaluate",
    ]  # fmt: skip
    assert all({"mixed_precision=no", "faces.root=data/x", "seed=4"} <= set(c) for c in calls)
    assert [c[-3] for c in calls[3:6]] == ["unet=base", "unet=tsr", "unet=ssr"]
    minutes = [float(c[-2].split("=")[1]) for c in calls[1:6]]
    evaluation, script = (
        a + b / 340 for a, b in (demo.RESERVE[k] for k in ("evaluation", "script"))
    )
    assert sum(minutes) == pytest.approx(20 - evaluation - 5 * script, abs=0.05)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attribute_accuracy"] == 0.7 and report["commit"] == "of the start"
    assert report["base_clips"] == 1234 and report["clip_recall_at_1_video_to_text"] == 0.6
    assert report["peak_memory_gigabytes"] > 0
    table = capsys.readouterr().out
    for words in (
        "recall@1 on val 70.0 % / 60.0 %", "0.3 %", "val 0.90", "0.40", "0.0123 after 1,234 clips",
        "0.0456 after", "0.0789 after", "71.0 %",
        "70.0 % (65.0 to 75.0)", "40.0 %", "35.0 %", "33.0 %", "99.0 %",
    ):  # fmt: skip
        assert words in table, words
    page = (tmp_path / "index.html").read_text()
    assert page.count("<video") == 9 and "a &lt;b&gt; man" in page and "70.0 %" in page
    frames, fps = read_mp4(tmp_path / "samples.mp4")
    assert frames.shape == (16, 256, 256, 3) and fps == 8


def test_started_again_it_continues_and_keeps_its_commit(ran, tmp_path, monkeypatch) -> None:
    calls, fail = ran
    fail.add("train_decoder")
    with pytest.raises(subprocess.CalledProcessError):
        Demo(20, str(tmp_path), "data/x").run()
    state = json.loads((tmp_path / "demo.json").read_text())
    assert [s["done"] for s in state["stages"].values()] == [True, True, True, False]
    assert all(stage["minutes"] > 0 for stage in state["stages"].values())
    budget = calls[-1][-1]
    fail.clear()
    monkeypatch.setattr(demo, "provenance", lambda: dict.fromkeys(PLACE, "later"))
    again = Demo(20, str(tmp_path), "data/x")
    spent = again.elapsed
    again.run()
    assert [Path(c[1]).stem for c in calls[4:]] == [*["train_decoder"] * 3, "evaluate"]
    assert calls[4][-1] == budget  # the same share of the minutes
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["commit"] == "of the start"
    assert report["minutes_total"] > spent  # what was broken off counts too
    with pytest.raises(SystemExit, match="a demo of 20 minutes"):
        Demo(120, str(tmp_path), "data/x")


@pytest.mark.slow
def test_the_real_scripts_end_to_end(tmp_path) -> None:
    overrides = [
        "faces.clips=160", "evaluate.clips=4", "sample.steps=2",
        "clip.train.log_every_clips=128", "unets.base.train.log_every_clips=16",
        "sample.stages.tsr.steps=2", "sample.stages.ssr.steps=2",
    ]  # fmt: skip
    Demo(5, str(tmp_path / "run"), str(tmp_path / "data"), overrides).run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["samples"] == 4 and report["base_clips"] > 16
    assert 0 < report["minutes_total"] and 0 < report["attribute_accuracy"] < 1
    assert (tmp_path / "run" / "index.html").read_text().count("<video") == 12


def test_no_time_to_train_is_said(ran, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"1\.5 minutes leave nothing"):
        Demo(1.5, str(tmp_path), "data/x").run()


def test_last_validation_is_the_newest(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"clips": 1, "val/a": 1}\n{"clips": 2, "val/a": 2}\n{"clips": 3, "loss": 0}\n')
    assert last_validation(path) == {"clips": 2, "a": 2}


def test_grid_places_every_clip() -> None:
    clips = np.arange(1, 4, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (3, 2, 4, 6, 3), np.uint8
    )
    tiled = grid(clips)
    assert tiled.shape == (2, 8, 12, 3)
    assert (tiled[:, :4, :6] == 1).all() and (tiled[:, :4, 6:] == 2).all()
    assert (tiled[:, 4:, :6] == 3).all() and (tiled[:, 4:, 6:] == 0).all()


def test_the_faster_precision_is_one_of_two() -> None:
    precision, gigaflops = demo.faster_precision()
    assert precision in ("no", "bf16") and 0.1 < gigaflops < 1e6
