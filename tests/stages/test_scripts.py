"""The entry scripts on one small run: what they write, how they resume, and what they refuse."""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import sample
import train_clip
import train_decoder
import train_prior
from dalle2_video.config import ConfigError
from dalle2_video.data.store.embeddings import EmbeddingError
from dalle2_video.model_file import CheckpointError, file_hash
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.sampling_config import SampleConfig
from tests.helpers.runs import STAGES, train


def test_sample_writes_mp4_and_sheet(configure, run_dir, tmp_path) -> None:
    text = "A man with a beard smiles. The light comes from the left."
    sample.main(configure(f"text='{text}'", "num_samples=2", f"out={tmp_path}"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0000.mp4", "0001.mp4", "sheet.png"]
    with av.open(str(tmp_path / "0000.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert len(frames) == 8 and frames[0].shape == (32, 32, 3)


def test_every_stage_resumes_to_the_last_bit(configure, run_dir) -> None:
    """Stopped after step 2 of 4 and started again: the weights of 4 steps in one go."""
    for stage in STAGES:
        cfg = configure(run=f"resumed_{stage}")
        other = Path(cfg.run_dir)
        shutil.copytree(run_dir, other)
        for name in ("model.safetensors", "checkpoints/000000000032"):
            path = other / stage / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        train(stage, cfg)
        ours = load_file(other / stage / "model.safetensors")
        whole = load_file(run_dir / stage / "model.safetensors")
        assert ours.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, ours[name]), f"{stage}: {name}"
        assert file_hash(other / stage / "model.safetensors") == file_hash(
            run_dir / stage / "model.safetensors"
        )


def test_the_same_command_again_changes_nothing(configure, run_dir) -> None:
    before = {s: file_hash(run_dir / s / "model.safetensors") for s in STAGES}
    train_clip.main(configure())
    train_decoder.main(configure())
    assert before == {s: file_hash(run_dir / s / "model.safetensors") for s in STAGES}


def test_metrics_are_written_by_clips(run_dir) -> None:
    for stage in STAGES:
        lines = [
            json.loads(s) for s in (run_dir / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert any(line["clips"] == 32 and "grad_norm" in line for line in lines), stage
        assert any("val/loss" in line or "val/recall_at_1_text_to_video" in line for line in lines)
    assert list((run_dir / "base" / "samples").rglob("*.mp4"))


def test_every_stage_trains_on_a_view_of_larger_clips(configure, run_dir, tmp_path) -> None:
    """One store for networks of several sizes: 4 frames of 16 px from 8 frames of 32 px."""
    sizes = ["num_frames=4", "image_size=16"]
    view = [f"{m}.{size}" for m in ("clip.model.video", "unets.base.model") for size in sizes]
    cfg = configure(*view, run="view")
    for stage in ("clip", "prior", "base"):
        train(stage, cfg)
    small = Cascade.load(cfg.run_dir)
    assert small.fps == 2
    frames = small.sample(["a man smiles"], SampleConfig(steps=2, prior_steps=2))
    assert frames.shape == (1, 4, 16, 16, 3)
    evaluate.main(configure(*view, "evaluate.metric=nearest", f"out={tmp_path}", run="view"))
    assert 0 <= json.loads((tmp_path / "report.json").read_text())["nearest_is_own_clip"] <= 1


def test_evaluate_reports_figures(configure, run_dir, tmp_path) -> None:
    cfg = configure("evaluate.clips=6", f"out={tmp_path}")
    evaluate.main(cfg)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == len(list((tmp_path / "clips" / "base").glob("*.mp4"))) > 3
    assert 0 <= report["attribute_accuracy"] <= 1 < 1 + report["ceiling_accuracy"]
    evaluate.main(configure("evaluate.metric=nearest", "evaluate.split=train", f"out={tmp_path}"))
    assert 0 <= json.loads((tmp_path / "report.json").read_text())["nearest_is_own_clip"] <= 1


# ---------------------------------------------------------------- what is refused


def test_a_run_is_not_judged_on_other_data_in_silence(configure, run_dir, tmp_path) -> None:
    """The mistake: an experiment that is left out of the command line."""
    with pytest.raises(ConfigError, match=r"trained on other data .*data\.fps: 4.* there, 2"):
        evaluate.main(configure("data.fps=2", f"out={tmp_path}"))
    evaluate.main(configure("evaluate.metric=nearest", "evaluate.clips=2", f"out={tmp_path}"))


def test_stages_of_another_clip_are_refused(configure, run_dir) -> None:
    cfg = configure("seed=1", run="other_clip")
    other = Path(cfg.run_dir)
    shutil.copytree(run_dir, other)
    shutil.rmtree(other / "clip")
    with pytest.raises(CheckpointError, match=r"clip/model.safetensors: no such file"):
        train_prior.main(cfg)
    train_clip.main(cfg)
    with pytest.raises(CheckpointError, match=r"prior/model.safetensors: trained on the CLIP"):
        Cascade.load(other)
    shutil.copy(run_dir / "clip/embeddings.safetensors", other / "clip/embeddings.safetensors")
    with pytest.raises(EmbeddingError, match="made by the CLIP checkpoint"):
        train_decoder.main(cfg)


def test_a_checkpoint_of_another_model_is_refused(configure, run_dir) -> None:
    cfg = configure("unets.base.model.cond_dim=32", run="other_model")
    shutil.copytree(run_dir, cfg.run_dir)
    with pytest.raises(ConfigError, match=r"another configuration .*cond_dim: 64 there, 32 here"):
        train_decoder.main(cfg)
    cfg.force = True  # does not help where the network differs
    with pytest.raises(CheckpointError, match="cond_dim"):
        train_decoder.main(cfg)
    shutil.copy(run_dir / "prior/model.safetensors", Path(cfg.run_dir) / "base/model.safetensors")
    with pytest.raises(CheckpointError, match="holds a 'prior' model where 'base' is needed"):
        Cascade.load(cfg.run_dir)


def test_config_mistakes_fail_at_once_with_the_key(configure, tmp_path) -> None:
    cases = [
        (train_decoder, "+unets.base.train.learning_rate=1", r"unets.base.train.learning_rate"),
        (train_decoder, "unet=top", r"unet=top: unets has only base, tsr, ssr"),
        (train_prior, "prior.diffusion.loss=l2", r"prior.diffusion.*'?loss"),
        (train_clip, "+clip.model.vidoe=1", r"clip.model.vidoe"),
        (train_decoder, "sample.steps=0", r"sample.steps: must be at least 1"),
    ]
    for script, override, message in cases:
        with pytest.raises(ConfigError, match=message):
            script.main(configure(override, f"data.root={tmp_path}/none"))


def test_sizes_that_do_not_fit_are_named(configure, run_dir) -> None:
    with pytest.raises(ConfigError, match=r"makes 8 frames of 64 px, the clips.* 8 frames of 32"):
        train_decoder.main(configure("unets.base.model.image_size=64"))
    with pytest.raises(ConfigError, match=r"unets\.ssr\.model makes 8 frames of 64 px"):
        train("ssr", configure("unets.ssr.model.image_size=64"))
