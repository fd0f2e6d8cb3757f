"""The same command resumes to the same bits, from checkpoints of today and of older formats."""

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle2_video.model_file import CheckpointError
from dalle2_video.training import prepare
from dalle2_video.training.checkpoint_files import checksum
from dalle2_video.training.config import RunConfig
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import param_groups
from tests.helpers.launching import ROOT
from tests.helpers.run_files import assert_same_bits, half_done, metric, weights
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_halflife_clips": None, "lr_schedule": "constant"},
        {"ema_halflife_clips": 16.0, "lr_schedule": "constant"},
        {"ema_halflife_clips": 16.0, "lr_schedule": "cosine", "micro_batch_size": 2},
        {"optimizer": "muon"},
    ],
)
def test_resume_after_step_2_of_4_gives_the_same_bits(tmp_path, changes) -> None:
    cfg = tiny_config(**changes)
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "whole")))
    half_done(tmp_path / "whole", tmp_path / "resumed")
    torch.manual_seed(99)  # another process would not have the old random state
    random.seed(99)
    other = tiny_stage()
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)  # all must come from the checkpoint
    train(other, cfg, RunConfig(str(tmp_path / "resumed")))
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    assert metric(tmp_path / "whole") == metric(tmp_path / "resumed")


def test_another_micro_batch_resumes_to_the_same_losses(done, tmp_path) -> None:
    """The micro-batches of an optimizer step are counted from the checkpoint."""
    half_done(done, tmp_path / "run")
    train(tiny_stage(), tiny_config(micro_batch_size=2), RunConfig(str(tmp_path / "run")))
    assert metric(tmp_path / "run") == pytest.approx(metric(done), abs=1e-6)


def test_longer_run_continues(tmp_path) -> None:
    cfg = tiny_config(lr_schedule="constant")
    train(tiny_stage(), replace(cfg, clips=16), RunConfig(str(tmp_path / "a")))
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "a")))
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "b")))
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_random_states_come_back(tmp_path) -> None:
    """What draws from the global generators goes on as if there had been no stop."""
    draws: list[tuple[float, float]] = []

    def drawing(model, batch, step):
        drawn = random.random(), float(np.random.rand())
        if model.training:  # not when the memory is counted
            draws.append(drawn)
        return objective(model, batch, step)

    run = RunConfig(str(tmp_path))
    random.seed(1)
    np.random.seed(1)
    train(tiny_stage(objective=drawing, val_set=None), tiny_config(), run)
    whole = list(draws)
    shutil.rmtree(tmp_path / "checkpoints/000000000032")
    random.seed(2)
    np.random.seed(2)
    train(tiny_stage(objective=drawing, val_set=None), tiny_config(), run)
    assert draws[4:] == whole[2:]


def test_kill_9_inside_a_save_then_the_same_command(done, tmp_path) -> None:
    """Killed at clip 24 with the checkpoint written but not renamed; goes on from 16."""
    script = f"""
import os, signal
from dalle2_video.training import checkpoints
from dalle2_video.training.loop import train
from dalle2_video.training.config import RunConfig
from tests.helpers.tiny_stage import tiny_config, tiny_stage
rename = os.replace
def dying(source, target):
    if str(target).endswith("000000000024"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
checkpoints.os.replace = dying
train(tiny_stage(), tiny_config(save_every_clips=8), RunConfig({str(tmp_path)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"000000000008", "000000000016", ".000000000024.tmp"}
    train(tiny_stage(), tiny_config(save_every_clips=8), RunConfig(str(tmp_path)))
    assert_same_bits(weights(done), weights(tmp_path))
    assert metric(tmp_path) == metric(done)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_finished_run_does_nothing_again(run_folder) -> None:
    before = (run_folder / "metrics.jsonl").read_text()
    model = (run_folder / "model.safetensors").read_bytes()
    stage = tiny_stage(objective=None)  # calling it would fail
    written = (run_folder / "model.safetensors").stat().st_mtime_ns
    train(stage, tiny_config(), RunConfig(str(run_folder)))
    assert (run_folder / "model.safetensors").stat().st_mtime_ns == written
    (run_folder / "model.safetensors").unlink()
    again = train(stage, tiny_config(), RunConfig(str(run_folder)))
    assert (run_folder / "metrics.jsonl").read_text() == before
    assert (run_folder / "model.safetensors").read_bytes() == model
    assert (again.progress.clips, again.progress.optimizer_steps) == (32, 4)
    assert again.metrics["loss"] == metric(run_folder, "val/loss")[32]


def test_settings_are_those_of_now(tmp_path, monkeypatch) -> None:
    """Not of the checkpoint, whose optimizer may have been of an older version."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([(group["fused"], group["betas"]) for group in self.param_groups])
            return super().step(closure)

    class Skipping(torch.optim.AdamW):  # takes no found_inf, as where the kernel is not fused
        found_inf = property(lambda self: None, lambda self, value: None)

    def older(model, cfg):
        return Skipping(param_groups(model, 0.1), lr=cfg.lr, betas=(0.8, 0.9), fused=None)

    def newer(model, cfg):
        return Spy(param_groups(model, 0.1), lr=cfg.lr, betas=cfg.betas, fused=True)

    monkeypatch.setattr(prepare, "make_optimizer", older)
    train(tiny_stage(), tiny_config(clips=16), RunConfig(str(tmp_path)))
    monkeypatch.setattr(prepare, "make_optimizer", newer)
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    assert seen == [[(True, (0.9, 0.99))] * 2] * 2


# ---- whose checkpoint it is


def test_an_option_that_came_later_matters_only_where_it_is_on(run_folder) -> None:
    """A checkpoint of an older version resumes; one of another network does not."""
    run, cfg, old = RunConfig(str(run_folder)), tiny_config(), tiny_stage()
    off = replace(old, config={**old.config, "new_option": False})
    assert train(off, cfg, run).progress.clips == 32
    on = replace(old, config={**old.config, "new_option": True})
    with pytest.raises(CheckpointError, match=r"new_option: 'none' there, True here"):
        train(on, cfg, run)


@pytest.mark.parametrize(
    ("stage", "seed", "words"),
    [
        (lambda: tiny_stage(hidden=8), 0, r"config\.hidden: 16 there, 8 here"),
        (lambda: tiny_stage(frozen=False), 0, r"config\.layers\.frozen: True there, False here"),
        (lambda: tiny_stage(meta={"clip_hash": "xyz"}), 0, r"meta\.clip_hash: 'abc' there"),
        (lambda: tiny_stage(), 7, "seed: 0 there, 7 here"),
    ],
)
def test_checkpoint_of_another_model_is_refused(run_folder, stage, seed, words) -> None:
    before = (run_folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=rf"000000000032/stage\.json.*{words}"):
        train(stage(), tiny_config(clips=40), RunConfig(str(run_folder), seed=seed))
    assert (run_folder / "model.safetensors").read_bytes() == before


def test_checkpoint_of_another_optimizer_is_refused_and_leaves_the_config(run_folder) -> None:
    run = RunConfig(str(run_folder), resolved="a: 1\n")
    train(tiny_stage(), tiny_config(), run)
    with pytest.raises(CheckpointError, match="optimizer: 'adamw' there, 'muon' here"):
        train(tiny_stage(), tiny_config(optimizer="muon"), replace(run, resolved="a: 2\n"))
    assert (run_folder / "config.yaml").read_text() == "a: 1\n"
    train(tiny_stage(), tiny_config(), replace(run, resolved="a: 3\n"))
    assert (run_folder / "config.yaml").read_text() == "a: 3\n"


def test_a_checkpoint_without_the_ema_that_is_wanted_is_refused(tmp_path) -> None:
    run = RunConfig(str(tmp_path))
    train(tiny_stage(), tiny_config(clips=8, ema_halflife_clips=None), run)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: no such file.*without EMA"):
        train(tiny_stage(), tiny_config(), run)


@pytest.mark.parametrize("change", ["lost", "unexpected"])
def test_weights_that_do_not_fit_are_refused_by_name(run_folder, change) -> None:
    checkpoint = run_folder / "checkpoints/000000000032"
    state = load_file(checkpoint / "model.safetensors")
    if change == "lost":
        del state["down.bias"]
    else:
        state["down.other"] = torch.zeros(1)
    save_file(state, checkpoint / "model.safetensors")
    (checkpoint / "checksums.json").unlink()  # or it would be taken for damaged
    name = "down.bias" if change == "lost" else "down.other"
    with pytest.raises(CheckpointError, match=rf"does not fit the model \({name}\)"):
        train(tiny_stage(), tiny_config(clips=40), RunConfig(str(run_folder)))


# ---- formats


def rewrite(checkpoint: Path, name: str, change) -> None:
    """One of a checkpoint's JSON files, as `change` returns it, with its checksum."""
    path, sums = checkpoint / name, checkpoint / "checksums.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {name: checksum(path)}))


def test_a_checkpoint_of_format_1_resumes_to_the_same_bits(tmp_path) -> None:
    """It had no format, `steps` for `optimizer_steps`, and other names in a U-Net's config."""
    stage = tiny_stage(config={"model": {"num_lowres_frames": 8}})
    train(stage, tiny_config(), RunConfig(str(tmp_path / "whole")))
    old = half_done(tmp_path / "whole", tmp_path / "old") / "checkpoints/000000000016"

    def old_progress(values):
        assert values.pop("format") == 2
        return {"steps": values.pop("optimizer_steps")} | values

    def old_stage(values):
        assert values.pop("format") == 2
        return values | {"config": {"model": {"low_frames": 8}}}

    rewrite(old, "progress.json", old_progress)
    rewrite(old, "stage.json", old_stage)
    result = train(
        replace(stage, model=tiny_stage().model), tiny_config(), RunConfig(str(tmp_path / "old"))
    )
    assert (result.progress.clips, result.progress.optimizer_steps) == (32, 4)
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "old"))
    other = tiny_stage(config={"model": {"num_lowres_frames": 4}})
    with pytest.raises(CheckpointError, match=r"num_lowres_frames: 8 there, 4 here"):
        train(other, tiny_config(clips=40), RunConfig(str(tmp_path / "old")))


def test_a_checkpoint_before_checksums_and_layouts_resumes_to_the_same_bits(done, tmp_path) -> None:
    checkpoint = half_done(done, tmp_path / "run") / "checkpoints/000000000016"

    def without_layout(values):
        del values["layout"], values["format"]
        return values

    rewrite(checkpoint, "stage.json", without_layout)
    (checkpoint / "checksums.json").unlink()
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / "run")))
    assert_same_bits(weights(tmp_path / "run"), weights(done))


@pytest.mark.parametrize("name", ["progress.json", "stage.json"])
def test_a_checkpoint_of_a_newer_format_is_refused(run_folder, name) -> None:
    newest = run_folder / "checkpoints/000000000032"
    rewrite(newest, name, lambda values: values | {"format": 3, "unheard_of": 1})
    wanted = rf"{name}: has format 3, and this code knows formats up to 2: update the code"
    with pytest.raises(CheckpointError, match=wanted):
        train(tiny_stage(), tiny_config(clips=40), RunConfig(str(run_folder)))
    assert [line["clips"] for line in read_metrics(run_folder / "metrics.jsonl")][-1] == 32
