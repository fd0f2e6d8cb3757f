"""Which checkpoints stay, what they hold, and what happens to damaged ones."""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle2_video.model_file import CheckpointError, load_model
from dalle2_video.training.checkpoint_files import checksum, saved_progress, whole_checkpoints
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.progress import Progress
from tests.helpers.launching import ROOT
from tests.helpers.run_files import assert_same_bits, metric, weights
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage


def test_only_the_newest_checkpoints_stay(tmp_path) -> None:
    train(tiny_stage(), tiny_config(save_every_clips=8), RunConfig(str(tmp_path)))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000000024", "000000000032"]


def test_every_nth_checkpoint_is_kept(tmp_path) -> None:
    cfg = tiny_config(clips=96, save_every_clips=8, keep_checkpoints=1, keep_every_clips=20)
    train(tiny_stage(val_set=None), cfg, RunConfig(str(tmp_path)))
    names = [int(p.name) for p in whole_checkpoints(tmp_path / "checkpoints")]
    assert names == [24, 40, 64, 80, 96]


def test_folder_without_progress_is_not_a_checkpoint(run_folder) -> None:
    (run_folder / "checkpoints/000000000032/progress.json").unlink()
    (run_folder / "checkpoints/.000000000040.tmp").mkdir()
    (run_folder / ".model.safetensors.1234.tmp").touch()  # what a kill leaves
    before = metric(run_folder)
    called = []

    def counting(model, batch, step):
        if model.training:
            called.append(int(step.sample_ids[0]))
        return objective(model, batch, step)

    stage = replace(tiny_stage(), objective=counting, val_set=None)
    result = train(stage, tiny_config(), RunConfig(str(run_folder)))
    assert result.progress.optimizer_steps == 4
    assert called == [16, 24]  # from the one before it
    assert metric(run_folder) == before
    assert not [path for path in run_folder.rglob(".*") if path.name.endswith(".tmp")]


# ---- what they hold


def test_frozen_tower_is_in_no_file(done) -> None:
    assert not any("tower" in name for name in weights(done))
    names = set(load_model(done / "model.safetensors", "tiny").state)
    assert names == {"up.weight", "up.bias", "down.weight", "down.bias", "scale", "shift"}
    assert b"tower" not in (done / "checkpoints/000000000032/optimizer.bin").read_bytes()


def test_model_file_holds_the_ema(tmp_path) -> None:
    stage = tiny_stage()
    train(stage, tiny_config(), RunConfig(str(tmp_path / "ema")))
    loaded = load_model(tmp_path / "ema/model.safetensors", "tiny")
    assert loaded.meta == {"clip_hash": "abc", "clips_seen": "32", "weights": "ema"}
    assert loaded.config == stage.config
    assert not torch.equal(loaded.state["up.weight"], stage.model.up.weight)
    plain = tiny_stage()
    train(plain, tiny_config(ema_halflife_clips=None), RunConfig(str(tmp_path / "plain")))
    loaded = load_model(tmp_path / "plain/model.safetensors", "tiny")
    assert loaded.meta["weights"] == "model"
    assert torch.equal(loaded.state["up.weight"], plain.model.up.weight)
    assert torch.equal(plain.model.up.weight, stage.model.up.weight)  # EMA does not steer training


# ---- damage


def damage(path: Path) -> None:
    """One bit, the length as before."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "model.safetensors", "ema.safetensors", "progress.json", "checksums.json"],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(done, run_folder, name, capsys) -> None:
    damage(run_folder / "checkpoints/000000000032" / name)
    train(tiny_stage(), tiny_config(), RunConfig(str(run_folder)))
    printed = capsys.readouterr()
    assert f"000000000032: damaged ({name}); not used" in printed.err
    assert f"[tiny] goes on from 000000000016; {run_folder}/checkpoints" in printed.out
    assert metric(run_folder) == metric(done)
    assert_same_bits(weights(run_folder), weights(done))
    assert (run_folder / "checkpoints/000000000032.damaged").exists()


def test_the_checksum_is_of_the_whole_file(tmp_path) -> None:
    data = os.urandom(5 << 20)  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") == f"{zlib.crc32(data):08x}"


def test_a_damaged_progress_that_is_json_is_passed_over(run_folder) -> None:
    (run_folder / "checkpoints/000000000032/progress.json").write_text('{"clisp": 32}')
    assert saved_progress(run_folder) == Progress()
    train(tiny_stage(), tiny_config(), RunConfig(str(run_folder)))
    assert saved_progress(run_folder).clips == 32


def test_where_all_checkpoints_are_damaged_it_is_an_error(run_folder) -> None:
    for clips in ("000000000016", "000000000032"):
        (run_folder / "checkpoints" / clips / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"0016: damaged \(optimizer.bin\): no whole"):
        train(tiny_stage(), tiny_config(), RunConfig(str(run_folder)))


def test_checkpoint_with_pickled_code_is_refused(run_folder, tmp_path) -> None:
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    folder = run_folder / "checkpoints/000000000032"
    torch.save({"state": Evil()}, folder / "optimizer.bin")
    sums = json.loads((folder / "checksums.json").read_text())
    sums["optimizer.bin"] = checksum(folder / "optimizer.bin")
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        train(tiny_stage(), tiny_config(), RunConfig(str(run_folder)))
    assert not mark.exists()


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path) -> None:
    """The disk is full: here the kernel refuses files above a size, from the second save on."""
    script = f"""
import resource
from pathlib import Path
from dalle2_video.model_file import CheckpointError
from dalle2_video.training.loop import train
from dalle2_video.training.config import RunConfig
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage
def filling(model, batch, step):
    if step.first == 24:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    return objective(model, batch, step)
try:
    run = RunConfig({str(tmp_path)!r})
    train(tiny_stage(objective=filling, val_set=None), tiny_config(log_every_clips=99), run)
except CheckpointError as error:
    print("CAUSE", error)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cause = ended.stdout.split("CAUSE")[1]
    assert "cannot save a checkpoint (rank 0: RuntimeError: " in cause and "GB free" in cause
    assert f"the newest whole one is {tmp_path}/checkpoints/000000000016" in cause
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000016"]
    assert not list(tmp_path.glob("*.tmp"))
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))  # with room again
