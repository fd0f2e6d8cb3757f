"""What W&B, TensorBoard and MLflow hold after real runs of the tiny stage, read back from them."""

import importlib.util
import io
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import mlflow
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dalle2_video.provenance import provenance
from dalle2_video.training import trackers
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.stage import Sample
from dalle2_video.training.trackers import (
    NoTracker,
    TrackerError,
    check_tracker,
    gif,
    make_tracker,
)
from tests.helpers.run_files import half_done, metric
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage

CAPTIONS = ["she smiles", "he nods, warm light"]
CONFIG = tiny_config(lr_schedule="constant")  # for 32 clips; lines at 8, 16, 24 and 32


def samples(model, accelerator) -> list[Sample]:
    ramp = np.linspace(0, 255, 8 * 32 * 32 * 3).reshape(8, 32, 32, 3).astype(np.uint8)
    return [Sample(CAPTIONS[0], ramp), Sample(CAPTIONS[1], 255 - ramp)]


def fails(model, batch, step):
    if step.first == 16:
        raise ValueError("a fault in the third step")
    return objective(model, batch, step)


@pytest.fixture(autouse=True)
def no_service(monkeypatch, tmp_path):
    """No key and no address of a service in the environment; where a test may put a netrc."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def once(points: list[tuple[int, float]]) -> dict[int, float]:
    """{clips: value}, in order; AssertionError where a point is there twice."""
    assert [clips for clips, _ in points] == sorted({clips for clips, _ in points})
    return dict(points)


def test_off_is_a_null_object():
    assert isinstance(make_tracker(RunConfig("unused"), "base", {}, 0), NoTracker)
    check_tracker(RunConfig("unused"))


@pytest.mark.parametrize(
    ("tracker", "gone"),
    [
        ("wandb", "wandb"),
        ("tensorboard", "tensorboard"),
        ("mlflow", "mlflow"),
        ("mlflow", "alembic"),
    ],
)
def test_a_package_that_is_missing_is_an_immediate_error(monkeypatch, tmp_path, tracker, gone):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == gone else find(n))
    run = RunConfig(str(tmp_path / "run"), tracker=tracker, wandb_mode="offline")
    with pytest.raises(TrackerError, match=rf"^tracker={tracker}: .*`pip install {gone}`$"):
        train(replace(tiny_stage(), train_set=None), CONFIG, run)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "left_by_wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert importlib.util.find_spec("left_by_wandb") is not None
    assert not trackers._installed("left_by_wandb")
    assert trackers._installed("wandb")


def test_a_server_needs_no_database_here(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "alembic" else find(n))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    check_tracker(RunConfig("unused", tracker="mlflow"))


def test_a_missing_key_is_an_immediate_error(tmp_path):
    run = RunConfig(str(tmp_path / "run"), tracker="wandb")
    with pytest.raises(TrackerError, match=r"WANDB_API_KEY.*wandb_mode=offline"):
        train(replace(tiny_stage(), train_set=None), CONFIG, run)
    assert not (tmp_path / "run").exists()


def test_where_a_key_is_found(no_service, monkeypatch):
    run = RunConfig("unused", tracker="wandb")
    check_tracker(replace(run, wandb_mode="offline"))
    no_service.write_text("machine elsewhere.example\n login user\n password secret\n")
    with pytest.raises(TrackerError):
        check_tracker(run)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    no_service.write_text("machine wandb.example\n login user\n password secret\n")
    check_tracker(run)
    no_service.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracker(run)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(run)


# ---- TensorBoard


def events(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def scalars(folder: Path, name: str) -> dict[int, float]:
    return once([(event.step, event.value) for event in events(folder).Scalars(name)])


def test_tensorboard_holds_curves_videos_captions_and_configuration(tmp_path):
    run = RunConfig(str(tmp_path / "run"), tracker="tensorboard", train_name="x")
    train(tiny_stage(samples=samples), CONFIG, run)
    held = events(tmp_path / "run")
    assert list(scalars(tmp_path / "run", "train/loss")) == [8, 16, 24, 32]
    for name, here in (("train/loss", "loss"), ("val/loss", "val/loss")):
        assert scalars(tmp_path / "run", name) == pytest.approx(metric(tmp_path / "run", here))
    for index, (caption, sample) in enumerate(zip(CAPTIONS, samples(None, None), strict=True)):
        images = held.Images(f"samples/{index}")
        assert [event.step for event in images] == [16, 32]
        with Image.open(io.BytesIO(images[0].encoded_image_string)) as video:
            assert (video.format, video.n_frames, video.size) == ("GIF", 8, (32, 32))
            video.seek(5)
            shown = np.asarray(video.convert("RGB")).astype(int)
            assert np.abs(shown - sample.frames[5]).mean() < 8
        texts = held.Tensors(f"samples/{index}/text_summary")
        assert [event.tensor_proto.string_val[0].decode() for event in texts] == 2 * [caption]
    content = held.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.group_name == "x/tiny"
    assert start.hparams["train.lr"].number_value == CONFIG.lr
    assert start.hparams["stage.layers.frozen"].bool_value is True
    assert start.hparams["commit"].string_value == provenance()["commit"]


def test_tensorboard_goes_on_without_doubled_points(tmp_path):
    run = RunConfig(str(tmp_path / "whole"), tracker="tensorboard")
    train(tiny_stage(samples=samples), CONFIG, run)
    folder = half_done(tmp_path / "whole", tmp_path / "resumed")  # its events go to 32, it to 16
    train(tiny_stage(samples=samples), CONFIG, replace(run, dir=str(folder)))
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert list(scalars(folder, "train/loss")) == [8, 16, 24, 32]
    assert scalars(folder, "train/loss") == pytest.approx(metric(folder, "loss"))
    assert [event.step for event in events(folder).Images("samples/0")] == [16, 32]


def test_a_gif_keeps_frames_and_speed():
    frames = samples(None, None)[0].frames
    with Image.open(io.BytesIO(gif(frames, fps=10.0))) as video:
        assert (video.n_frames, video.info["duration"], video.info["loop"]) == (8, 100, 0)


# ---- MLflow


def mlflow_run(folder: Path):
    """The run of a stage's folder, and the client that reads it."""
    client = mlflow.MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    return client.get_run((folder / "mlflow_run_id").read_text()), client


def history(folder: Path, name: str) -> dict[int, float]:
    run, client = mlflow_run(folder)
    return once([(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)])


def test_mlflow_holds_curves_videos_captions_and_configuration(tmp_path):
    folder = tmp_path / "a run" / "tiny"
    stage = tiny_stage(samples=samples, config={"hidden": 16, "long": "ab" * 5000})
    train(stage, CONFIG, RunConfig(str(folder), tracker="mlflow", train_name="x"))
    assert not mlflow.is_tracking_uri_set()  # the next stage of the process has its own
    run, client = mlflow_run(folder)
    assert (run.info.run_name, run.info.status) == ("x/tiny", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "dalle2-video"
    assert list(history(folder, "train/loss")) == [8, 16, 24, 32]
    for name, here in (("train/loss", "loss"), ("val/loss", "val/loss")):
        assert history(folder, name) == pytest.approx(metric(folder, here))
    params = run.data.params
    assert params["train.lr"] == str(CONFIG.lr)
    assert params["commit"] == provenance()["commit"]
    assert params["stage.long"] == "ab" * 3000
    files = Path(client.download_artifacts(run.info.run_id, ""))
    assert (tmp_path / "a run/mlflow_artifacts") in files.parents
    assert json.loads((files / "config.json").read_text())["stage"] == stage.config
    names = [f"{clips:012d}_{index:02d}.mp4" for clips in (16, 32) for index in (0, 1)]
    assert sorted(path.name for path in (files / "samples").glob("*.mp4")) == names
    with av.open(str(files / "samples" / names[0])) as video:
        assert len(list(video.decode(video=0))) == 8
    text = (files / "samples/000000000032.txt").read_text()
    assert text.splitlines() == [f"{n}\t{c}" for n, c in zip(names[2:], CAPTIONS, strict=True)]


def test_mlflow_goes_on_without_doubled_points(tmp_path):
    run = RunConfig(str(tmp_path / "whole"), tracker="mlflow")
    train(tiny_stage(), CONFIG, run)
    folder = half_done(tmp_path / "whole", tmp_path / "resumed")  # MLflow has it up to 32
    train(tiny_stage(), replace(CONFIG, clips=48), replace(run, dir=str(folder)))
    assert (folder / "mlflow_run_id").read_text() == (tmp_path / "whole/mlflow_run_id").read_text()
    assert history(folder, "train/loss") == pytest.approx(metric(folder, "loss"))
    assert list(history(folder, "val/loss")) == [16, 32, 48]
    found, client = mlflow_run(folder)
    assert found.data.params["train.clips"] == "32"  # of the first start
    files = Path(client.download_artifacts(found.info.run_id, "config.json"))
    assert json.loads(files.read_text())["train"]["clips"] == 48


def test_mlflow_marks_a_failed_run_until_it_goes_on(tmp_path):
    run = RunConfig(str(tmp_path / "run"), tracker="mlflow")
    with pytest.raises(ValueError, match="third step"):
        train(tiny_stage(objective=fails), CONFIG, run)
    first, _ = mlflow_run(tmp_path / "run")
    assert first.info.status == "FAILED"
    train(tiny_stage(), CONFIG, run)
    again, _ = mlflow_run(tmp_path / "run")
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "FINISHED")


def test_mlflow_goes_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/lab.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mlflow_run_id").write_text("0" * 32)  # of another store
    train(tiny_stage(), CONFIG, RunConfig("run", tracker="mlflow"))
    client = mlflow.MlflowClient()
    run = client.get_run((tmp_path / "run/mlflow_run_id").read_text())
    assert client.get_experiment(run.info.experiment_id).name == "faces"
    assert not (tmp_path / "mlflow.db").exists()


def test_a_service_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackerError, match=r"^tracker=mlflow cannot begin .*127\.0\.0\.1"):
        train(tiny_stage(), CONFIG, RunConfig(str(tmp_path / "run"), tracker="mlflow"))


# ---- W&B, offline


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


def wandb_file(folder: Path):
    """(axis of every defined metric, history rows, configuration, exit code) of an offline W&B
    folder, once it is whole: W&B writes it from a process of its own.
    """
    for _ in range(200):
        found = parsed(folder)
        if found[-1] is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder} has no end")


def parsed(folder: Path):
    from wandb.proto import wandb_internal_pb2

    axes, rows, config, code = {}, [], {}, None
    for data in records(next(folder.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if kind == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        if kind == "run":
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        if kind == "exit":
            code = record.exit.exit_code
    return axes, rows, config, code


def wandb_folders(run: Path) -> list[Path]:
    """Of every start, the oldest first."""
    return sorted((run / "wandb").glob("offline-run-*"), key=lambda f: f.stat().st_mtime)


def test_wandb_offline_run_resumes_under_one_id(tmp_path):
    run = RunConfig(str(tmp_path / "run"), tracker="wandb", wandb_mode="offline")
    stage = tiny_stage(samples=samples)
    train(stage, replace(CONFIG, clips=16), run)
    identity = (tmp_path / "run/wandb_id").read_text()
    train(tiny_stage(samples=samples), CONFIG, run)
    assert (tmp_path / "run/wandb_id").read_text() == identity
    folders = wandb_folders(tmp_path / "run")
    assert len(folders) == 2
    # Two runs that begin in the same second: W&B adds "-1" to the second folder.
    assert all(folder.name.split("-")[3] == identity for folder in folders)
    seen = []
    for folder in folders:
        axes, rows, config, code = wandb_file(folder)
        assert axes["*"] == "clips" and code == 0
        assert config["train"]["lr"] == CONFIG.lr
        assert config["commit"] == provenance()["commit"]
        seen += [row["clips"] for row in rows if "train/loss" in row]
        captions = [row["samples.captions"] for row in rows if "samples.captions" in row]
        assert captions == [CAPTIONS]
        assert len(list(folder.glob("files/media/videos/*.mp4"))) == 2
        assert any("val/loss" in row for row in rows)
    assert seen == [8, 16, 24, 32]


def test_wandb_marks_a_failed_run(tmp_path):
    run = RunConfig(str(tmp_path / "run"), tracker="wandb", wandb_mode="offline")
    with pytest.raises(ValueError, match="third step"):
        train(tiny_stage(objective=fails), CONFIG, run)
    *_, code = wandb_file(wandb_folders(tmp_path / "run")[0])
    assert code == 1
