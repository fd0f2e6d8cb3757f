"""The joints, with the real scripts on small real data: preprocess, CLIP, prior, base, sample."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import sample
import train_clip
import train_decoder
import train_prior
from dalle2_video.config import ConfigError, from_config
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import CaptionPolicy
from dalle2_video.data.store.dataset import eval_loader
from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError
from dalle2_video.model_file import CheckpointError, file_hash
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.cascade import Cascade, read_texts
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.pipeline.sampling import sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import (
    draw_t,
    keep_masks,
    load_conditions,
    shared_coin,
)
from dalle2_video.stages.prior import PriorSection, prior_stage
from dalle2_video.stages.wiring import store_of
from dalle2_video.training.log import read_metrics
from dalle2_video.training.stage import StepInfo
from tests.helpers.runs import JOINT, STAGES, train


@pytest.fixture(scope="module")
def cascade(run_dir) -> Cascade:
    return Cascade.load(run_dir)


FAST = SampleConfig(steps=2, prior_steps=2, batch_size=3)


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


def test_images_that_cannot_be(configure) -> None:
    for override, cause in (
        ("unets.base.num_images=-1", "num_images must not be negative, got -1"),
        ("unets.base.image_only_prob=0.5", "image_only_prob 0.5 needs num_images, which is 0"),
        ("unets.base.image_only_prob=2", r"image_only_prob must be in \[0, 1\], not 2"),
    ):
        with pytest.raises(ConfigError, match=cause):
            train_decoder.main(configure(override))


def test_metrics_are_written_by_clips(run_dir) -> None:
    for stage in STAGES:
        lines = [
            json.loads(s) for s in (run_dir / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert any(line["clips"] == 32 and "grad_norm" in line for line in lines), stage
        assert any("val/loss" in line or "val/recall_at_1_text_to_video" in line for line in lines)
    assert list((run_dir / "base" / "samples").rglob("*.mp4"))


def test_embeddings_are_those_of_the_frames_that_the_decoder_sees(configure, run_dir) -> None:
    """By key, from the same frames, axis order and range."""
    clip, loaded = load_clip(run_dir / "clip" / "model.safetensors")
    conditions = load_conditions(
        run_dir, store_of(settings_of(configure())), 0, CaptionPolicy(), True
    )
    dataset = conditions.train_set
    batch = dataset.collate([dataset.pointer(sample_id) for sample_id in (5, 0, 11)])
    video = to_float(batch.frames)
    assert video.shape[1:] == (3, 8, 32, 32) and video.min() >= -1 and video.max() <= 1
    torch.testing.assert_close(clip.encode_video(video), batch.embeddings, atol=1e-4, rtol=0)
    assert conditions.clip_hash == loaded.hash


def test_prior_and_cache_have_one_scale(run_dir, cascade) -> None:
    cache = EmbeddingCache.load(run_dir / "clip" / "embeddings.safetensors", None)
    text = cascade.encode(["a man smiles", "a woman nods. Dim light."])
    drawn = sample_embeddings(
        cascade.prior,
        cascade.prior.whiten,
        cascade.prior_diffusion,
        text,
        torch.arange(2),
        SampleConfig(prior_steps=3),
    )
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(cache.embeddings.norm(dim=1), torch.ones(len(cache.keys)))


def test_a_resumed_prior_goes_on_in_its_own_space(configure, run_dir) -> None:
    """The whitening that a checkpoint brings rules the targets, not one fitted to today's data."""
    cfg = configure()
    section = from_config(PriorSection, cfg.prior, "prior")
    conditions = load_conditions(run_dir, store_of(settings_of(cfg)), 0, section.captions, False)
    stage = prior_stage(section, conditions, 0)
    seen = []

    class Resumed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whiten = Whitening(32)
            self.whiten.mean.fill_(-1000.0)

        def forward(self, noised, *rest):
            seen.append(noised)
            return noised

    batch = next(eval_loader(conditions.val_set, 4))
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    step = StepInfo(batch.sample_ids, 0, torch.device("cpu"), accelerator)
    stage.objective(Resumed(), batch, step)
    assert seen[0].max() > 100  # x0 is about 1000 there, and at most noise in it


def test_what_a_text_says_reaches_the_model_in_any_order(cascade) -> None:
    """PAPERS.md 10, no. 11: no line is cut off; a free text is the set of its sentences."""
    lines = [f"Person number {i} looks happy and wears a large blue hat." for i in range(9)]
    whole = cascade.encode([lines])
    free = cascade.encode([" ".join(lines)])
    back = cascade.encode([lines[::-1]])
    assert int(whole.mask.sum()) > 100
    torch.testing.assert_close(whole.embedding, back.embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.embedding, free.embedding, atol=1e-5, rtol=0)
    changed = cascade.encode([[*lines[:-1], lines[-1].replace("blue", "red")]])
    assert (changed.embedding - whole.embedding).abs().max() > 1e-5


@pytest.mark.parametrize(
    "how",
    [
        {"sampler": "dpm_solver"},
        {"sampler": "ancestral", "corrector": 0.1},
        {"sampler": "ddim", "eta": 0.5},
        {"guidance": "interval", "guidance_interval": (-3.0, 1.0)},
        {"guidance": "oscillating", "guidance_rescale": 0.7, "guidance_constant": 0.0},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_sampler_makes_other_clips_that_the_seed_repeats(cascade, how: dict) -> None:
    plain = SampleConfig(sampler="ddim", steps=4, prior_steps=2, batch_size=3)
    config = dataclasses.replace(plain, **how)
    clips = cascade.sample(["a man smiles"], config)
    assert torch.equal(clips, cascade.sample(["a man smiles"], config))
    assert not torch.equal(clips, cascade.sample(["a man smiles"], plain))


def test_sampling_settings_out_of_range_are_named() -> None:
    bad = {"eta": 1.5, "corrector": -1.0, "guidance_interval": (2.0, 1.0), "guidance_rescale": 2.0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            SampleConfig(**{name: value})


def test_a_clip_does_not_depend_on_its_batch(cascade) -> None:
    texts = ["a man smiles", "a woman nods", "warm light", "a bald man. Dim light. He talks."]
    together = cascade.sample(texts, FAST)
    alone = torch.cat([cascade.sample([text], FAST, first=i) for i, text in enumerate(texts)])
    assert together.shape == (4, 8, 32, 32, 3) and together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1


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
    """PAPERS.md 10, no. 3."""
    cases = [
        (train_decoder, "+unets.base.train.learning_rate=1", r"unets.base.train.learning_rate"),
        (train_decoder, "unet=top", r"unet=top: unets has only base, tsr, ssr"),
        (train_prior, "prior.diffusion.loss=l2", r"prior.diffusion.*'?loss"),
        (train_clip, "+clip.model.vidoe=1", r"clip.model.vidoe"),
        (train_decoder, "sample.steps=0", r"sample: steps must be at least 1"),
    ]
    for script, override, message in cases:
        with pytest.raises(ConfigError, match=message):
            script.main(configure(override, f"data.root={tmp_path}/none"))


def test_sizes_that_do_not_fit_are_named(configure, run_dir) -> None:
    with pytest.raises(ConfigError, match=r"makes 8 frames of 64 px, the clips.* 8 frames of 32"):
        train_decoder.main(configure("unets.base.model.image_size=64"))


def test_every_stage_trains_on_a_view_of_larger_clips(configure, run_dir, tmp_path) -> None:
    """One store for networks of several sizes: 4 frames of 16 px from 8 frames of 32 px."""
    sizes = ["num_frames=4", "image_size=16"]
    view = [f"{m}.{size}" for m in ("clip.model.video", "unets.base.model") for size in sizes]
    cfg = configure(*view, run="view")
    for stage in ("clip", "prior", "base"):
        train(stage, cfg)
    small = Cascade.load(cfg.run_dir)
    assert small.fps == 2
    frames = small.sample(["a man smiles"], FAST)
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


def test_texts_to_sample(tmp_path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n two \n")
    assert read_texts(None, str(file), 2) == ["one", "one", "two", "two"]
    for text, path in ((None, None), ("a", str(file))):
        with pytest.raises(ValueError, match="either text"):
            read_texts(text, path, 1)
    with pytest.raises(ValueError, match="nothing to sample"):
        read_texts("  ", None, 1)


def test_times_cover_the_interval_evenly_and_are_keyed() -> None:
    times = draw_t(3, torch.arange(1000, 2000), "base")
    counts = torch.histc(times, 50, 0, 1)
    assert counts.min() >= 17 and counts.max() <= 23  # independent draws would give 20 +- 13
    torch.testing.assert_close(times[500:], draw_t(3, torch.arange(1500, 2000), "base"))
    assert (draw_t(4, torch.arange(5), "base") - draw_t(3, torch.arange(5), "base")).any()


def test_condition_dropout_has_the_stated_rates() -> None:
    drop = {"all": 0.1, "embedding": 0.3, "text": 0.2}
    embedding, text = keep_masks(drop, 0, torch.arange(20_000), "drop")
    assert (~embedding & ~text).float().mean() == pytest.approx(0.1 + 0.9 * 0.06, abs=0.01)
    assert (~embedding).float().mean() == pytest.approx(0.1 + 0.9 * 0.3, abs=0.01)
    assert (~text).float().mean() == pytest.approx(0.1 + 0.9 * 0.2, abs=0.01)
