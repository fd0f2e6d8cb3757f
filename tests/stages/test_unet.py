"""Training of a U-Net: joint training, learned variance, compilation."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train_decoder
from dalle2_video.config import ConfigError
from dalle2_video.model_file import file_hash
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.sampling_config import SampleConfig
from dalle2_video.stages.frozen_clip import shared_coin
from dalle2_video.training.log import read_metrics
from dalle2_video.training.stage import StepInfo
from tests.helpers.runs import JOINT, train

FAST = SampleConfig(steps=2, prior_steps=2, batch_size=3)


@pytest.fixture(scope="module")
def joint_dir(configure, run_dir) -> Path:
    """The base trained with images and self-conditioning; some of its steps have images alone."""
    cfg = configure(*JOINT, run="joint")
    for stage in ("clip", "prior"):
        shutil.copytree(run_dir / stage, Path(cfg.run_dir) / stage)
    train_decoder.main(cfg)
    return Path(cfg.run_dir)


def test_joint_training_with_self_conditioning(configure, joint_dir) -> None:
    steps = [StepInfo(torch.arange(1), 0, torch.device("cpu"), None, 8 * k) for k in range(4)]
    coins = {
        stream: {shared_coin(0.5, step, stream) for step in steps}
        for stream in ("image_only", "self_condition")
    }
    assert all(len(sides) == 2 for sides in coins.values()), "the test needs steps of each kind"
    lines = read_metrics(joint_dir / "base" / "metrics.jsonl")
    both = [(line["loss_clips"], line["loss_images"]) for line in lines if "loss_clips" in line]
    assert both and all(0.05 < loss < 5 for pair in both for loss in pair)
    frames = Cascade.load(joint_dir).sample(["a man smiles", "a woman"], FAST)
    assert frames.shape == (2, 8, 32, 32, 3)
    cfg = configure(*JOINT, run="joint_resumed")
    again = Path(cfg.run_dir)
    shutil.copytree(joint_dir, again)
    (again / "base" / "model.safetensors").unlink()
    shutil.rmtree(again / "base" / "checkpoints" / "000000000032")
    train_decoder.main(cfg)
    hashes = [file_hash(folder / "base" / "model.safetensors") for folder in (joint_dir, again)]
    assert hashes[0] == hashes[1], "resumed to the last bit"


def test_a_learned_variance_trains_resumes_samples_and_is_judged(configure, run_dir) -> None:
    learned = ["unets.base.model.learned_variance=true", "evaluate.clips=8", "evaluate.draws=3"]
    cfg = configure(*learned, "evaluate.metric=nll", "evaluate.split=val", run="variance")
    folder = Path(cfg.run_dir)
    for stage in ("clip", "prior"):
        shutil.copytree(run_dir / stage, folder / stage)
    train_decoder.main(cfg)
    lines = read_metrics(folder / "base" / "metrics.jsonl")
    simple = [line["loss_simple"] for line in lines if "loss_simple" in line]
    plain = [
        line["loss"] for line in read_metrics(run_dir / "base/metrics.jsonl") if "loss" in line
    ]
    assert simple == pytest.approx(plain, rel=0.02)  # its times are on the grid of T
    assert all(line["loss_variance"] > 0 for line in lines if "loss_variance" in line)
    again = configure(*learned, run="variance_resumed")
    shutil.copytree(folder, again.run_dir)
    (Path(again.run_dir) / "base/model.safetensors").unlink()
    shutil.rmtree(Path(again.run_dir) / "base/checkpoints/000000000032")
    train_decoder.main(again)
    hashes = [file_hash(Path(c.run_dir) / "base/model.safetensors") for c in (cfg, again)]
    assert hashes[0] == hashes[1], "resumed to the last bit"
    evaluate.main(cfg)
    found = json.loads((folder / "evaluation/nll.json").read_text())
    bits = {name: found[f"bits_per_dimension_{name}"] for name in ("lower", "learned", "upper")}
    assert 0 < bits["upper"] < bits["learned"] < bits["lower"] < 1e4  # it knows nothing yet
    assert found["steps"] == 1000 and found["clips"] == 8
    ancestral = SampleConfig(steps=2, prior_steps=2, sampler="ancestral")
    assert Cascade.load(folder).sample(["a man smiles"], ancestral).shape == (1, 8, 32, 32, 3)


def test_a_learned_variance_in_joint_training(configure, run_dir, joint_dir) -> None:
    learned = "unets.base.model.learned_variance=true"
    cfg = configure(*JOINT, learned, run="joint_variance")
    folder = Path(cfg.run_dir)
    shutil.copytree(run_dir / "clip", folder / "clip")
    train_decoder.main(cfg)
    lines, plain = (read_metrics(f / "base" / "metrics.jsonl") for f in (folder, joint_dir))
    for what in ("loss_clips", "loss_images"):
        ours, without = ([one[what] for one in part if what in one] for part in (lines, plain))
        assert ours and ours == pytest.approx(without, rel=0.05)  # its times are on the grid of T
    variance = [line["loss_variance"] for line in lines if "loss_variance" in line]
    assert variance and all(0 < bits < 1e6 for bits in variance)


def test_pixels_are_trained_with_images_too(configure, run_dir) -> None:
    """They have a smaller clip, a level of noise and a crop of their own, and no neighbours."""
    cfg = configure("unets.ssr.num_images=2", "unets.ssr.image_only_prob=0.5", run="ssr_images")
    shutil.copytree(run_dir / "clip", Path(cfg.run_dir) / "clip")
    train("ssr", cfg)
    lines = read_metrics(Path(cfg.run_dir) / "ssr" / "metrics.jsonl")
    both = [(line["loss_clips"], line["loss_images"]) for line in lines if "loss_clips" in line]
    assert both and all(0.001 < loss < 5 for pair in both for loss in pair)


def test_compile_is_refused_where_weights_are_split(configure, run_dir, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="compile is for one process or DDP"):
        train_decoder.main(configure("unets.base.compile=true"))


@pytest.mark.slow
def test_the_compiled_unet_trains_to_the_same_loss(configure, run_dir) -> None:
    cfg = configure("unets.base.compile=true", run="compiled")
    shutil.copytree(run_dir / "clip", Path(cfg.run_dir) / "clip")
    train_decoder.main(cfg)
    lines = [read_metrics(f / "base" / "metrics.jsonl") for f in (run_dir, Path(cfg.run_dir))]
    plain, compiled = ([line["loss"] for line in part if "loss" in line] for part in lines)
    assert plain and compiled == pytest.approx(plain, rel=1e-4)
