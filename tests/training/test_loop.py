"""The loop: bit-exact resume, losses over micro-batches, validation without a trace, config."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dalle2_video.config import ConfigError
from dalle2_video.model_file import CheckpointError, load_model
from dalle2_video.training import loop, prepare
from dalle2_video.training.accelerator import process_state, share_out
from dalle2_video.training.checkpoint_files import checksum, whole_checkpoints
from dalle2_video.training.ema import Ema
from dalle2_video.training.log import read_metrics
from dalle2_video.training.divergence import TrainingDiverged
from dalle2_video.training.loop import train
from dalle2_video.training.optimizer import lr_factor, param_groups
from dalle2_video.training.preemption import Interrupted
from dalle2_video.training.sharded import WholeParams
from dalle2_video.training.stage import Loss, RunConfig, TrainConfig
from dalle2_video.training.validation import no_trace
from tests.helpers.launching import ROOT
from tests.helpers.tiny_stage import TinyNet, objective, tiny_config, tiny_stage


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The consolidated weights and, from the newest checkpoint, the raw ones."""
    from safetensors.torch import load_file

    newest = whole_checkpoints(folder / "checkpoints")[-1]
    raw = load_file(newest / "model.safetensors")
    return load_model(folder / "model.safetensors", "tiny").state | {
        f"raw.{n}": t for n, t in raw.items()
    }


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


# ---- learning rate and optimizer


def test_lr_factor_closed_forms():
    assert lr_factor(8, 0.0, 0, "constant") == 1.0
    assert [lr_factor(c, 0.0, 32, "constant") for c in (8, 16, 32, 64)] == [0.25, 0.5, 1.0, 1.0]
    assert lr_factor(8, 0.0, 0, "cosine") == 1.0
    assert lr_factor(8, 0.5, 0, "cosine") == pytest.approx(0.5)
    assert lr_factor(8, 1.0, 0, "cosine") == pytest.approx(0.0)
    assert lr_factor(8, 1.5, 0, "cosine") == pytest.approx(0.0)  # over time by a step
    assert lr_factor(8, 0.25, 16, "cosine") == pytest.approx(0.5 * (0.5 + 0.5**1.5))
    with pytest.raises(ValueError, match="lr_schedule"):
        lr_factor(8, 0.0, 0, "linear")


def test_lr_of_a_run(tmp_path):
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    lrs = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if "lr" in line]
    expected = [0.01 * lr_factor(8 * (i + 1), i / 4, 16, "cosine") for i in range(4)]
    assert lrs == pytest.approx(expected)


def test_optimizer_holds_every_trainable_parameter_once():
    model = TinyNet()
    groups = param_groups(model, 0.1)
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    assert not any(id(p) in {id(q) for q in held} for p in model.tower.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model.up.weight), id(model.down.weight)}


def test_every_trainable_parameter_moves_and_no_other(tmp_path):
    stage = tiny_stage()
    before = copy.deepcopy(dict(stage.model.named_parameters()))
    train(stage, tiny_config(clips=8), RunConfig(str(tmp_path)))
    for name, parameter in stage.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("tower."), name


def test_parts_clipped_apart_do_not_shrink_the_steps_of_the_rest(tmp_path):
    """A part with an immense gradient of its own: the rest is trained as if it had none."""

    def immense(factor: float):
        def with_part(model: nn.Module, batch, step) -> Loss:
            part = model.part(batch.x).square().mean()
            return Loss(objective(model, batch, step).loss + factor * part)

        return with_part

    def trained(name: str, apart: tuple[str, ...], factor: float):
        stage = tiny_stage(objective=immense(factor), val_set=None)
        stage.model.part, stage.model.separate_grad_clip = nn.Linear(8, 8), apart
        before = stage.model.part.weight.detach().clone()
        train(stage, tiny_config(grad_clip=1e-3), RunConfig(str(tmp_path / name)))
        assert not torch.equal(stage.model.part.weight, before)  # it learns
        (line, *_) = read_metrics(tmp_path / name / "metrics.jsonl")
        return {n: t for n, t in weights(tmp_path / name).items() if "part." not in n}, line

    quiet, first = trained("quiet", ("part",), 1e-3)
    loud, second = trained("loud", ("part",), 1e6)
    together, _ = trained("together", (), 1e6)
    assert_same_bits(quiet, loud)
    assert first["grad_norm"] == second["grad_norm"]  # the rest's
    assert any(not torch.equal(quiet[name], together[name]) for name in quiet)


def test_parameter_that_cannot_be_split_is_refused():
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"temperature.*\(1,\)"):
        param_groups(model, 0.0)
    with pytest.raises(ValueError, match="no parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


# ---- resume


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_halflife_clips": None, "lr_schedule": "constant"},
        {"ema_halflife_clips": 16.0, "lr_schedule": "constant"},
        {"ema_halflife_clips": 16.0, "lr_schedule": "cosine", "micro_batch_size": 2},
        {"optimizer": "muon"},
    ],
)
def test_resume_after_step_2_of_4_gives_the_same_bits(tmp_path, changes):
    cfg = tiny_config(**changes)
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/000000000032")
    (tmp_path / "resumed/model.safetensors").unlink()
    torch.manual_seed(99)  # another process would not have the old random state
    random.seed(99)
    other = tiny_stage()
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)  # all must come from the checkpoint
    train(other, cfg, RunConfig(str(tmp_path / "resumed")))
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")


def test_an_option_that_came_later_matters_only_where_it_is_on(tmp_path):
    """A checkpoint of an older version resumes; one of another network does not."""
    run, cfg = RunConfig(str(tmp_path)), tiny_config()
    train(tiny_stage(), cfg, run)
    old = tiny_stage()
    off = replace(old, config={**old.config, "new_option": False})
    assert train(off, cfg, run).progress.clips == 32
    on = replace(old, config={**old.config, "new_option": True})
    with pytest.raises(CheckpointError, match=r"new_option: 'none' there, True here"):
        train(on, cfg, run)


def test_random_states_come_back(tmp_path):
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


def test_kill_9_inside_a_save_then_the_same_command(tmp_path):
    """Killed at clip 24 with the checkpoint written but not renamed; goes on from 16."""
    script = f"""
import os, signal
from dalle2_video.training import checkpoints as state
from dalle2_video.training.loop import train
from dalle2_video.training.stage import RunConfig
from tests.helpers.tiny_stage import tiny_config, tiny_stage
rename = os.replace
def dying(source, target):
    if str(target).endswith("000000000024"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
state.os.replace = dying
train(tiny_stage(), tiny_config(save_every_clips=8), RunConfig({str(tmp_path / "killed")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {p.name for p in (tmp_path / "killed/checkpoints").iterdir()}
    assert names == {"000000000008", "000000000016", ".000000000024.tmp"}
    cfg = tiny_config(save_every_clips=8)
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "killed")))
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "whole")))
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    lines = [x["clips"] for x in read_metrics(tmp_path / "killed/metrics.jsonl") if "loss" in x]
    assert lines == [8, 16, 24, 32]
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(tiny_stage(), tiny_config(save_every_clips=8), RunConfig(str(tmp_path)))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000000024", "000000000032"]


def test_folder_without_progress_is_not_a_checkpoint(tmp_path):
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    (tmp_path / "checkpoints/000000000032/progress.json").unlink()
    before = losses(tmp_path)
    stage, called = tiny_stage(), []

    def counting(model, batch, step):
        if model.training:
            called.append(int(step.sample_ids[0]))
        return objective(model, batch, step)

    result = train(
        replace(stage, objective=counting, val_set=None), tiny_config(), RunConfig(str(tmp_path))
    )
    assert result.progress.optimizer_steps == 4
    assert called == [16, 24]  # from the one before it
    assert losses(tmp_path) == before


def test_finished_run_does_nothing_again(tmp_path):
    first = train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    before = (tmp_path / "metrics.jsonl").read_text()
    model = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    stage = tiny_stage(objective=None)  # calling it would fail
    again = train(stage, tiny_config(), RunConfig(str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert again.progress == first.progress
    assert again.metrics == pytest.approx(first.metrics)


def test_longer_run_continues(tmp_path):
    cfg = tiny_config(lr_schedule="constant")
    train(tiny_stage(), replace(cfg, clips=16), RunConfig(str(tmp_path / "a")))
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "a")))
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "b")))
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    ("stage", "seed", "words"),
    [
        (lambda: tiny_stage(hidden=8), 0, r"config\.hidden: 16 there, 8 here"),
        (lambda: tiny_stage(frozen=False), 0, r"config\.layers\.frozen: True there, False here"),
        (lambda: tiny_stage(meta={"clip_hash": "xyz"}), 0, r"meta\.clip_hash: 'abc' there"),
        (lambda: tiny_stage(), 7, "seed: 0 there, 7 here"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, stage, seed, words):
    train(tiny_stage(), tiny_config(clips=8), RunConfig(str(tmp_path)))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=rf"000000000008/stage\.json.*{words}"):
        train(stage(), tiny_config(), RunConfig(str(tmp_path), seed=seed))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_checkpoint_of_another_optimizer_is_refused_and_leaves_the_config(tmp_path):
    run = RunConfig(str(tmp_path), resolved="a: 1\n")
    train(tiny_stage(), tiny_config(clips=8), run)
    with pytest.raises(CheckpointError, match="optimizer: 'adamw' there, 'muon' here"):
        train(tiny_stage(), tiny_config(optimizer="muon"), replace(run, resolved="a: 2\n"))
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    train(tiny_stage(), tiny_config(), replace(run, resolved="a: 3\n"))
    assert (tmp_path / "config.yaml").read_text() == "a: 3\n"


def damage(path: Path) -> None:
    """One bit, the length as before."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "model.safetensors", "ema.safetensors", "progress.json", "checksums.json"],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, name, capsys):
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / "a")))
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / "b")))
    damage(tmp_path / "b/checkpoints/000000000032" / name)
    capsys.readouterr()
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / "b")))
    told = capsys.readouterr()
    assert f"000000000032: damaged ({name}); not used" in told.err
    assert f"[tiny] goes on from 000000000016; {tmp_path}/b/checkpoints" in told.out
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert_same_bits(weights(tmp_path / "b"), weights(tmp_path / "a"))
    assert (tmp_path / "b/checkpoints/000000000032.damaged").exists()


def test_settings_are_those_of_now(tmp_path):
    """Not of the checkpoint, whose optimizer may have been of an older version."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([(group["fused"], group["betas"]) for group in self.param_groups])
            return super().step(closure)

    def older(model, cfg):
        return torch.optim.AdamW(param_groups(model, 0.1), lr=cfg.lr, betas=(0.8, 0.9), fused=None)

    def newer(model, cfg):
        return Spy(param_groups(model, 0.1), lr=cfg.lr, betas=cfg.betas, fused=True)

    class Skipping(torch.optim.AdamW):
        found_inf = property(lambda self: None, lambda self, value: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_optimizer", lambda *a: _of_class(older(*a), Skipping))
        train(tiny_stage(), tiny_config(clips=16), RunConfig(str(tmp_path)))
        patch.setattr(prepare, "make_optimizer", newer)
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    assert seen == [[(True, (0.9, 0.99))] * 2] * 2


def _of_class(optimizer, kind):
    optimizer.__class__ = kind  # one that takes no found_inf, as before
    return optimizer


def test_where_all_checkpoints_are_damaged_it_says_so(tmp_path):
    train(tiny_stage(), tiny_config(clips=8), RunConfig(str(tmp_path)))
    (tmp_path / "checkpoints/000000000008/optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"0008: damaged \(optimizer.bin\): no whole"):
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))


def test_checkpoint_with_pickled_code_is_refused(tmp_path):
    train(tiny_stage(), tiny_config(clips=8), RunConfig(str(tmp_path)))
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    folder = tmp_path / "checkpoints/000000000008"
    torch.save({"state": Evil()}, folder / "optimizer.bin")
    sums = json.loads((folder / "checksums.json").read_text())
    sums["optimizer.bin"] = checksum(folder / "optimizer.bin")
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    assert not mark.exists()


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path):
    """The disk is full: here the kernel refuses files above a size, from the second save on."""
    script = f"""
import resource
from pathlib import Path
from dalle2_video.model_file import CheckpointError
from dalle2_video.training.loop import train
from dalle2_video.training.stage import RunConfig
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cause = done.stdout.split("CAUSE")[1]
    assert "cannot save a checkpoint (rank 0: RuntimeError: " in cause and "GB free" in cause
    assert f"the newest whole one is {tmp_path}/checkpoints/000000000016" in cause
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000016"]
    assert not list(tmp_path.glob("*.tmp"))
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))  # with room again


def test_every_nth_checkpoint_is_kept(tmp_path):
    cfg = tiny_config(clips=96, save_every_clips=8, keep_checkpoints=1, keep_every_clips=20)
    train(tiny_stage(val_set=None), cfg, RunConfig(str(tmp_path)))
    names = [int(p.name) for p in whole_checkpoints(tmp_path / "checkpoints")]
    assert names == [24, 40, 64, 80, 96]


def test_frozen_tower_is_in_no_file(tmp_path):
    train(tiny_stage(), tiny_config(clips=8), RunConfig(str(tmp_path)))
    assert not any("tower" in name for name in weights(tmp_path))
    names = set(load_model(tmp_path / "model.safetensors", "tiny").state)
    assert names == {"up.weight", "up.bias", "down.weight", "down.bias", "scale", "shift"}
    assert b"tower" not in (tmp_path / "checkpoints/000000000008/optimizer.bin").read_bytes()


def test_model_file_holds_the_ema(tmp_path):
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


# ---- sharing out the batch


def test_loss_does_not_depend_on_the_micro_batch(tmp_path):
    for micro in (8, 4, 1):
        train(
            tiny_stage(), tiny_config(micro_batch_size=micro), RunConfig(str(tmp_path / str(micro)))
        )
    whole = losses(tmp_path / "8")
    assert len(whole) == 4
    for micro in ("4", "1"):
        assert losses(tmp_path / micro) == pytest.approx(whole, abs=1e-6)
        for name, tensor in weights(tmp_path / micro).items():
            assert torch.allclose(tensor, weights(tmp_path / "8")[name], atol=1e-6)


def test_share_out():
    assert share_out(tiny_config(batch_size=16), 4) == (4, 1)
    assert share_out(tiny_config(batch_size=16, micro_batch_size=2), 4) == (2, 2)
    with pytest.raises(ConfigError, match="batch_size 16 must be a multiple"):
        share_out(tiny_config(batch_size=16, micro_batch_size=3), 1)
    with pytest.raises(ConfigError, match="x 32 processes"):
        share_out(tiny_config(batch_size=16), 32)


def test_ranks_that_do_not_find_one_another(monkeypatch):
    """Else each would be the main process and write the same checkpoint."""
    process_state()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but this one sees 1"):
        process_state()


# ---- steps that go wrong


def broken(at: set[int], value: float = float("nan")):
    """The tiny objective, with a loss of `value` in the batches that begin at these clips."""

    def wrapped(model, batch, step):
        loss = objective(model, batch, step)
        bad = int(step.sample_ids[0]) in at
        return Loss(loss.loss * value if bad else loss.loss)

    return wrapped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_that_is_not_finite_is_skipped_and_counted(tmp_path, value):
    stage = tiny_stage(objective=broken({8}, value), val_set=None)
    cfg = tiny_config(save_every_clips=8, keep_checkpoints=4, warmup_clips=0)
    result = train(stage, cfg, RunConfig(str(tmp_path)))
    assert (result.progress.optimizer_steps, result.progress.skipped) == (4, 1)
    from safetensors.torch import load_file

    folder = tmp_path / "checkpoints"
    files = ["model.safetensors", "ema.safetensors"]
    for name in files:
        before = load_file(folder / "000000000008" / name)
        assert_same_bits(before, load_file(folder / "000000000016" / name))
        after = load_file(folder / "000000000024" / name)
        assert not torch.equal(before["up.weight"], after["up.weight"])
        assert all(t.isfinite().all() for t in after.values())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None


def test_figures_read_a_step_later_are_the_same(tmp_path, monkeypatch):
    """As on a GPU: the log lines, the count of skipped steps, and the end by a signal."""
    cfg = tiny_config(clips=96, log_every_clips=24, warmup_clips=0)
    stage = tiny_stage(objective=broken({8, 40}))
    train(stage, cfg, RunConfig(str(tmp_path / "at once")))
    at_once = loop.AsyncMetrics
    monkeypatch.setattr(loop, "AsyncMetrics", lambda max_behind: at_once(1))
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
def test_no_step_waits_for_the_device(tmp_path):
    """From the third step to the end of the window; torch raises at every synchronisation."""

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


def test_three_such_steps_in_a_row_are_an_error(tmp_path):
    cfg = tiny_config(clips=80, save_every_clips=16)
    stage = tiny_stage(objective=broken({0, 8, 32, 40, 56, 64, 72}), val_set=None)
    good = "000000000064"  # its weights are those of clip 56
    wanted = rf"tiny: not finite in 3 steps in a row, up to clip 80 .*loss nan.*{good}"
    with pytest.raises(TrainingDiverged, match=wanted):
        train(stage, cfg, RunConfig(str(tmp_path)))
    assert [p.name for p in whole_checkpoints(tmp_path / "checkpoints")][-1] == good
    stage = tiny_stage(objective=broken(set(range(80))), val_set=None)
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(stage, tiny_config(save_every_clips=None), RunConfig(str(tmp_path / "new")))


def test_gradient_is_clipped_by_its_global_norm(tmp_path):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            seen.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))
            return super().step(closure)

    def make(model, cfg):
        return Spy(param_groups(model, 0.0), lr=cfg.lr, fused=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_optimizer", make)
        train(tiny_stage(), tiny_config(grad_clip=0.25), RunConfig(str(tmp_path)))
    norms = [x["grad_norm"] for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x]
    assert all(norm > 0.25 for norm in norms)  # what is logged is the norm before clipping
    assert seen == pytest.approx([0.25] * 4, rel=1e-4)


# ---- time budget


def test_minutes_rule_the_schedule_and_the_end(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def slow(model, batch, step):
        clock.now += 6.0  # seconds for each step
        return objective(model, batch, step)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    cfg = tiny_config(minutes=0.5, warmup_clips=0, save_every_clips=8, clips=1, keep_checkpoints=9)
    stage = tiny_stage(objective=slow, val_set=None)
    result = train(stage, cfg, RunConfig(str(tmp_path / "a")))
    assert result.progress.optimizer_steps == 5
    assert result.progress.seconds == pytest.approx(30.0)
    lines = [x for x in read_metrics(tmp_path / "a/metrics.jsonl") if "lr" in x]
    expected = [0.01 * lr_factor(8, i / 5, 0, "cosine") for i in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    for newer in ("000000000040", "000000000032", "000000000024"):
        shutil.rmtree(tmp_path / "a/checkpoints" / newer)
    clock.now = 1e6  # another process, another day
    again = train(tiny_stage(objective=slow, val_set=None), cfg, RunConfig(str(tmp_path / "a")))
    assert again.progress.optimizer_steps == 5
    assert again.progress.seconds == pytest.approx(30.0)


def test_a_timed_run_is_validated_at_its_end_however_long_a_save_takes(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def slow(model, batch, step):
        clock.now += 6.0
        return objective(model, batch, step)

    save = loop.Checkpoints.save

    def slow_save(self, progress):
        clock.now += 9.0  # the one after the second step crosses the budget of 20 s
        save(self, progress)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(loop.Checkpoints, "save", slow_save)
    cfg = tiny_config(minutes=1 / 3, save_every_clips=16, val_every_clips=None)
    result = train(tiny_stage(objective=slow), cfg, RunConfig(str(tmp_path)))
    assert result.progress.optimizer_steps == 3 and "loss" in result.metrics
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["clips"] for line in lines if "val/loss" in line] == [24]


# ---- validation


def test_validation_leaves_no_trace(tmp_path):
    """PAPERS.md section 10, number 2: it ran in train mode and back-propagated."""
    seen = []

    def validate(model, accelerator):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(3)
        seen.append(float(model(torch.ones(1, 8)).sum()))
        return {"figure": seen[-1]}

    busy = tiny_stage(validate=validate, samples=lambda model, accelerator: [])
    train(busy, tiny_config(val_every_clips=8), RunConfig(str(tmp_path / "busy")))
    train(
        tiny_stage(val_set=None),
        tiny_config(val_every_clips=None),
        RunConfig(str(tmp_path / "quiet")),
    )
    assert len(seen) == 4
    assert_same_bits(weights(tmp_path / "busy"), weights(tmp_path / "quiet"))
    lines = [x for x in read_metrics(tmp_path / "busy/metrics.jsonl") if "val/figure" in x]
    assert [x["clips"] for x in lines] == [8, 16, 24, 32]
    assert busy.model.training


def test_validation_sees_the_ema_weights(tmp_path):
    seen = []

    def validate(model, accelerator):
        seen.append(model.up.weight.detach().clone())
        return {}

    train(tiny_stage(validate=validate), tiny_config(), RunConfig(str(tmp_path)))
    state = load_model(tmp_path / "model.safetensors", "tiny").state
    assert torch.equal(seen[-1], state["up.weight"])


def test_no_trace_restores_gradients_flags_weights_and_generators():
    model = TinyNet()
    model.tower.eval()  # a frozen tower stays in eval mode
    ema = Ema(WholeParams(model), 64.0, 0.5)
    ema.average["up.weight"].zero_()
    gradient = torch.ones_like(model.up.weight)
    model.up.weight.grad = gradient.clone()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with pytest.raises(KeyError), no_trace(model, ema):
        assert not model.training
        assert not model.up.weight.any()
        torch.rand(10)
        raise KeyError
    assert torch.equal(torch.rand(1), expected)
    assert torch.is_grad_enabled()
    assert model.training
    assert not model.tower.training
    assert torch.equal(model.up.weight.grad, gradient)
    assert_same_bits(state, model.state_dict())


def test_default_validation_is_the_mean_over_all_clips(tmp_path):
    """10 clips in batches of 4: the short last batch weighs less."""
    stage = tiny_stage()
    cfg = tiny_config(micro_batch_size=4, clips=8, ema_halflife_clips=None)
    result = train(stage, cfg, RunConfig(str(tmp_path), seed=4))
    stage.model.eval()
    step = SimpleNamespace(seed=4, device=torch.device("cpu"), accelerator=None)
    total = 0.0
    for index in range(10):
        batch = stage.val_set.collate([stage.val_set.eval_pointer(index)])
        step.sample_ids = batch.sample_ids
        total += objective(stage.model, batch, step).loss.item()
    assert result.metrics["loss"] == pytest.approx(total / 10, abs=1e-6)


# ---- figures


def test_metrics_of_a_run(tmp_path):
    train(tiny_stage(), tiny_config(log_every_clips=16), RunConfig(str(tmp_path)))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["clips"] for line in lines] == [16, 16, 32, 32]
    for line in lines[::2]:
        assert line["clips_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert {"loss", "worst", "grad_norm", "lr", "seconds", "skipped"} <= line.keys()
    train(tiny_stage(), tiny_config(log_every_clips=8), RunConfig(str(tmp_path / "fine")))
    fine = losses(tmp_path / "fine")
    assert lines[0]["loss"] == pytest.approx((fine[0] + fine[1]) / 2)  # a mean, not the last step


def test_bf16_trains_float32_weights(tmp_path):
    stage = tiny_stage()
    train(stage, tiny_config(), RunConfig(str(tmp_path / "bf16"), mixed_precision="bf16"))
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path / "no"), mixed_precision="no"))
    assert stage.model.up.weight.dtype == torch.float32
    low, full = losses(tmp_path / "bf16"), losses(tmp_path / "no")
    assert low != full
    assert low == pytest.approx(full, rel=0.03)


def test_fp16_without_a_gpu_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU.*bf16 or no"):
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path), mixed_precision="fp16"))


@pytest.mark.gpu
def test_fp16_halves_its_scale_until_gradients_are_finite_and_trains(tmp_path):
    run = RunConfig(str(tmp_path / "fp16"), mixed_precision="fp16")
    stage = tiny_stage()
    result = train(stage, tiny_config(clips=320, lr_schedule="constant"), run)
    train(tiny_stage(), tiny_config(clips=320), RunConfig(str(tmp_path / "no")))
    assert result.progress.optimizer_steps == 40 and result.progress.skipped < 20
    assert stage.model.up.weight.dtype == torch.float32
    assert losses(tmp_path / "fp16")[-1] < 0.9 * losses(tmp_path / "no")[0]


# ---- configuration


@dataclass(frozen=True)
class Inner:
    rate: float
    levels: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    size: int | None
    parts: tuple[Inner, ...] = ()
    table: dict[str, float] = field(default_factory=dict)


GOOD = {"name": "a", "inner": {"rate": 1, "levels": [1, 2]}, "size": None, "parts": [{"rate": 2}]}


def test_from_config_builds_nested_dataclasses():
    made = from_config(Outer, OmegaConf.create(GOOD), "outer")
    assert made == Outer("a", Inner(1.0, (1, 2)), None, (Inner(2.0),))
    assert isinstance(made.inner.rate, float)
    assert from_config(Outer, OmegaConf.create(GOOD | {"size": 1e6}), "outer").size == 1_000_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nmae": "x"}, r"outer\.nmae: unknown key; outer has: name, inner, size"),
        ({"inner": {"rate": 1, "rates": 2}}, r"outer\.inner\.rates: unknown key"),
        ({"inner": {}}, r"outer\.inner\.rate: missing key"),
        ({"inner": None}, r"outer\.inner: must be a section"),
        ({"size": "big"}, r"outer\.size: expected int, got 'big'"),
        ({"size": 1.5}, r"outer\.size: expected int, got 1\.5"),
        ({"size": True}, r"outer\.size: expected int, got True"),
        ({"inner": {"rate": "1"}}, r"outer\.inner\.rate: expected float"),
        ({"inner": {"rate": 1, "levels": 3}}, r"outer\.inner\.levels"),
        ({"inner": {"rate": 1, "levels": ["x"]}}, r"outer\.inner\.levels\[0\]: expected int"),
        ({"parts": [{"rat": 2}]}, r"outer\.parts\[0\]\.rat: unknown key"),
    ],
)
def test_from_config_names_the_key_and_the_section(change, words):
    """PAPERS.md section 10, number 3: a key that no file defines killed a run an epoch later."""
    with pytest.raises(ConfigError, match=words):
        from_config(Outer, OmegaConf.create(GOOD | change), "outer")


def test_train_config_checks_its_values():
    section = {k: v for k, v in vars(tiny_config()).items()}
    assert from_config(TrainConfig, section, "clip.train") == tiny_config()
    for change, words in [
        ({"lr_schedule": "linear"}, r"clip\.train\.lr_schedule: must be one of constant, cosine"),
        ({"batch_size": 0}, r"clip\.train\.batch_size must be above 0, got 0"),
        ({"warmup_clips": -1}, r"clip\.train\.warmup_clips must not be negative"),
        ({"betas": [0.9]}, r"clip\.train\.betas"),
    ]:
        with pytest.raises(ConfigError, match=words):
            from_config(TrainConfig, section | change, "clip.train")
    del section["lr"]
    with pytest.raises(ConfigError, match=r"clip\.train\.lr: missing key"):
        from_config(TrainConfig, section, "clip.train")


def test_deepspeed_config_leaves_to_the_loop_what_is_its_own():
    config = json.loads((ROOT / "configs/deepspeed_config.json").read_text())
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"
    assert "optimizer" not in config
    assert "bf16" not in config and "fp16" not in config
