"""What a run tells: metrics.jsonl, the terminal, sample videos, W&B offline and without a key."""

import io
import json
import sys
import time
from dataclasses import replace

import av
import numpy as np
import pytest

from dalle2_video.training.config import RunConfig
from dalle2_video.training.log import (
    NoWandb,
    RunLog,
    WandbKeyError,
    check_wandb,
    clock,
    make_tracker,
    read_metrics,
)
from dalle2_video.training.loop import train
from dalle2_video.training.stage import Sample
from tests.helpers.tiny_stage import tiny_config, tiny_stage

VALUES = {"loss": 0.5, "grad_norm": 1.25, "lr": 1e-4, "clips_per_second": 12.5}


def samples(model, accelerator) -> list[Sample]:
    ramp = np.linspace(0, 255, 8 * 32 * 32 * 3).reshape(8, 32, 32, 3).astype(np.uint8)
    return [Sample("she smiles", ramp), Sample("he nods, warm light", 255 - ramp)]


def test_metrics_lines_and_trim(tmp_path):
    log = RunLog(tmp_path, "base", NoWandb(), 0)
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
    RunLog(tmp_path, "base", NoWandb(), 16).close()  # a run that resumes at 16
    assert [line["clips"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [8, 16, 16]


def test_plain_lines_when_no_terminal(tmp_path, capsys):
    log = RunLog(tmp_path, "base", NoWandb(), 0)
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
    log = RunLog(tmp_path, "base", NoWandb(), 0)
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
    log = RunLog(tmp_path, "base", NoWandb(), 0)
    log.samples(64, samples(None, None))
    files = sorted((tmp_path / "samples").glob("*.mp4"))
    assert [f.name for f in files] == ["000000000064_00.mp4", "000000000064_01.mp4"]
    with av.open(str(files[0])) as video:
        assert len(list(video.decode(video=0))) == 8
    text = (tmp_path / "samples/000000000064.txt").read_text()
    assert text.splitlines()[1] == "000000000064_01.mp4\the nods, warm light"


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_no_key_is_an_immediate_error(no_key, tmp_path):
    class Untouched:
        def __getattr__(self, name):
            raise AssertionError("the data was read before the key was looked for")

    stage = replace(tiny_stage(), train_set=Untouched())
    run = RunConfig(str(tmp_path / "run"), use_wandb=True)
    with pytest.raises(WandbKeyError, match=r"WANDB_API_KEY.*WANDB_MODE=offline"):
        train(stage, tiny_config(), run)
    assert not (tmp_path / "run").exists()


def test_where_a_key_is_found(no_key, monkeypatch):
    run = RunConfig("unused", use_wandb=True)
    check_wandb(replace(run, use_wandb=False))
    check_wandb(replace(run, wandb_mode="offline"))
    no_key.write_text("machine elsewhere.example\n login user\n password secret\n")
    with pytest.raises(WandbKeyError):
        check_wandb(run)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    no_key.write_text("machine wandb.example\n login user\n password secret\n")
    check_wandb(run)
    no_key.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_wandb(run)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(run)


def test_off_is_a_null_object():
    assert isinstance(make_tracker(RunConfig("unused"), "base", {}), NoWandb)


def records(data: bytes):
    """The records of a LevelDB log: blocks of 32 KiB, in them crc (4), length (2), type (1)."""
    position, parts = 7, []  # after the file's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def history(folder):
    """(axis of every defined metric, history rows) of an offline W&B folder, once it is whole: W&B
    writes it from a process of its own.
    """
    for _ in range(200):
        axes, rows, ended = parsed(folder)
        if ended:
            return axes, rows
        time.sleep(0.1)
    raise AssertionError(f"{folder} has no end")


def parsed(folder):
    from wandb.proto import wandb_internal_pb2

    axes, rows, ended = {}, [], False
    for data in records(next(folder.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        ended = ended or record.WhichOneof("record_type") == "exit"
    return axes, rows, ended


def test_wandb_offline_run_resumes_under_one_id(no_key, tmp_path):
    run = RunConfig(str(tmp_path / "run"), use_wandb=True, wandb_mode="offline")
    stage = replace(tiny_stage(), samples=samples)
    train(stage, tiny_config(clips=16, lr_schedule="constant"), run)
    identity = (tmp_path / "run/wandb_id").read_text()
    train(replace(tiny_stage(), samples=samples), tiny_config(lr_schedule="constant"), run)
    assert (tmp_path / "run/wandb_id").read_text() == identity
    folders = sorted(
        (tmp_path / "run/wandb").glob("offline-run-*"), key=lambda f: f.stat().st_mtime
    )
    assert len(folders) == 2
    # Two runs that begin in the same second: W&B adds "-1" to the second folder.
    assert all(folder.name.split("-")[3] == identity for folder in folders)
    seen = []
    for folder in folders:
        axes, rows = history(folder)
        assert axes["*"] == "clips"
        seen += [row["clips"] for row in rows if "train/loss" in row]
        captions = [row["samples.captions"] for row in rows if "samples.captions" in row]
        assert captions == [["she smiles", "he nods, warm light"]]
        assert len(list(folder.glob("files/media/videos/*.mp4"))) == 2
        assert any("val/loss" in row for row in rows)
    assert seen == [8, 16, 24, 32]
