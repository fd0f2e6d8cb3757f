"""The batch shared out over ranks, and launches that are refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from dalle2_video.config import ConfigError
from dalle2_video.training import accelerator
from dalle2_video.training.accelerator import (
    chosen_precision,
    make_accelerator,
    process_state,
    share_out,
)
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from tests.helpers.launching import ROOT
from tests.helpers.tiny_stage import tiny_config, tiny_stage


def test_share_out() -> None:
    assert share_out(tiny_config(batch_size=16), 4) == (4, 1)
    assert share_out(tiny_config(batch_size=16, micro_batch_size=2), 4) == (2, 2)
    with pytest.raises(ConfigError, match="batch_size 16 must be a multiple"):
        share_out(tiny_config(batch_size=16, micro_batch_size=3), 1)
    with pytest.raises(ConfigError, match="x 32 processes"):
        share_out(tiny_config(batch_size=16), 32)


def test_ranks_that_do_not_find_one_another(monkeypatch) -> None:
    """Else each would be the main process and write the same checkpoint."""
    process_state()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but this one sees 1"):
        process_state()


def test_fp16_without_a_gpu_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU.*bf16 or no"):
        train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path), mixed_precision="fp16"))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_fp16_over_split_weights_is_refused(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    one = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(accelerator, "process_state", lambda minutes: one)
    with pytest.raises(ConfigError, match="fp16 is for one process and DDP"):
        make_accelerator(tiny_config(), RunConfig(str(tmp_path), mixed_precision="fp16"))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_muon_over_split_matrices_is_refused(engine, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=r"optimizer=muon.*optimizer=adamw"):
        make_accelerator(tiny_config(optimizer="muon"), RunConfig("unused"))


def test_a_launch_file_that_sets_other_sizes_is_an_error(tmp_path, monkeypatch) -> None:
    cfg, run = tiny_config(micro_batch_size=2), RunConfig(str(tmp_path))  # of 8: 4 micro-batches
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ConfigError, match=r"accelerate config sets gradient_accumulation_steps: 2"):
        make_accelerator(cfg, run)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    path = tmp_path / "deepspeed.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    for name, value in (("train_batch_size", 16), ("gradient_clipping", 0.5)):
        path.write_text(json.dumps({name: value, "gradient_accumulation_steps": "auto"}))
        with pytest.raises(ConfigError, match=rf"deepspeed.json sets {name}: {value}, the train"):
            make_accelerator(cfg, run)


def test_every_deepspeed_file_leaves_to_the_loop_what_is_its_own() -> None:
    for path in (ROOT / "configs").glob("deepspeed_config*.json"):
        config = json.loads(path.read_text())
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert config[name] == "auto", path
        assert not {"optimizer", "bf16", "fp16"} & config.keys(), path


def test_the_precision_is_that_of_the_command_line_or_of_the_launch(monkeypatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert [chosen_precision(p) for p in (None, "no", "bf16")] == ["no", "no", "bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # of a launch that says nothing
    assert [chosen_precision(p) for p in (None, "no", "bf16")] == ["no", "no", "bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert [chosen_precision(p) for p in (None, "bf16")] == ["bf16", "bf16"]
    for ours in ("no", "fp16"):
        with pytest.raises(ConfigError, match=rf"mixed_precision={ours}, but .*_precision bf16"):
            chosen_precision(ours)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="fp8: take bf16, fp16 or no"):
        chosen_precision(None)


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "fp16", "bf16"])
def test_a_deepspeed_file_with_a_section_that_is_ours_is_refused(
    tmp_path, monkeypatch, name
) -> None:
    path = tmp_path / "deepspeed.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    section = {"enabled": True} if name.endswith("16") else {"type": "Adam", "params": {"lr": 1}}
    path.write_text(json.dumps({name: section}))
    with pytest.raises(ConfigError, match=rf"deepspeed.json has a section {name}: remove it"):
        make_accelerator(tiny_config(), RunConfig(str(tmp_path)))
    if name.endswith("16"):
        path.write_text(json.dumps({name: {"enabled": False}, "train_batch_size": 1}))
        with pytest.raises(ConfigError, match="sets train_batch_size: 1"):  # the next check
            make_accelerator(tiny_config(), RunConfig(str(tmp_path)))
