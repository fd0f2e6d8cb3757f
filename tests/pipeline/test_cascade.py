"""The cascade from text to the last U-Net: chain, candidates, files, ranks, and what is refused."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import evaluate
import sample
from dalle2_video.cli import compose
from dalle2_video.config import ConfigError
from dalle2_video.data.media.output import write_clip
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import CaptionError, text_to_lines
from dalle2_video.model_file import CheckpointError
from dalle2_video.pipeline.cascade import Cascade, CascadeUnet, check_chain
from dalle2_video.pipeline.sampling_config import SampleConfig, SuperResolutionSampling
from dalle2_video.training.log import read_metrics
from tests.helpers.launching import launch_command, run_launch
from tests.helpers.runs import train

SMALL_BASE = ["unets.base.model.image_size=16", "unets.base.model.num_frames=4"]
CHAIN = ["cascade=[base,tsr,ssr]", *SMALL_BASE]
ORDER = ("base", "tsr", "ssr")
FAST = SampleConfig(
    steps=2, prior_steps=2, batch_size=2, guidance_scale=2.0,
    unets={
        "tsr": SuperResolutionSampling(steps=3, batch_size=3),
        "ssr": SuperResolutionSampling(sampler="dpm_solver", steps=2, batch_size=1),
    },
)  # fmt: skip
TEXTS = ["a man smiles", "a woman nods", "a bald man. Dim light. He talks."]


@pytest.fixture(scope="module")
def chain_dir(configure, run_dir) -> Path:
    """4 frames of 16 px -> 8 of 16 -> 8 of 32."""
    cfg = configure(*CHAIN, run="chain")
    for stage in ("clip", "prior", "tsr", "ssr"):
        shutil.copytree(run_dir / stage, Path(cfg.run_dir) / stage)
    train("base", cfg)
    return Path(cfg.run_dir)


@pytest.fixture(scope="module")
def cascade(chain_dir) -> Cascade:
    return Cascade.load(chain_dir, order=ORDER)


def test_every_stage_hands_its_clips_to_the_next(cascade) -> None:
    steps = []
    made = cascade.sample_all(TEXTS, FAST, progress=steps.append)
    assert {name: tuple(clips.shape[1:]) for name, clips in made.items()} == {
        "base": (4, 16, 16, 3), "tsr": (8, 16, 16, 3), "ssr": (8, 32, 32, 3),
    }  # fmt: skip
    assert torch.equal(made["tsr"][:, ::2], made["base"])  # known frames, as they went in
    assert not torch.equal(made["tsr"][:, 1::2], made["base"])
    assert steps == ["base"] * 4 + ["tsr"] * 3 + ["ssr"] * 6  # batches of 2, 3 and 1
    assert len(steps) == cascade.num_sampler_steps(3, FAST) and cascade.fps == 4
    assert cascade.num_sampler_steps(3, FAST, "base") == 4
    alone = cascade.sample_all(TEXTS[1:2], FAST, [1])
    for name, clips in made.items():  # keyed by number, whatever the batch
        assert (alone[name].int() - clips[1:2].int()).abs().max() <= 1, name
    assert list(cascade.sample_all(TEXTS, FAST, last="tsr")) == ["base", "tsr"]


def test_one_network_at_a_time_is_on_the_device(cascade, monkeypatch) -> None:
    moves = []
    for name, module in [("clip", cascade.video_clip), ("prior", cascade.prior)] + [
        (stage.name, stage.unet) for stage in cascade.unets
    ]:
        monkeypatch.setattr(
            module, "to", lambda device, name=name: moves.append((name, str(device)))
        )
    monkeypatch.setattr(cascade, "device", torch.device("cpu", 0))
    cascade.sample_all(TEXTS[:1], FAST)
    there = [(name, place) for name in ("clip", "prior", *ORDER) for place in ("cpu:0", "cpu")]
    assert moves == there


def test_the_nearest_of_several_candidates_is_kept(cascade) -> None:
    many = SampleConfig(**{**FAST.__dict__, "candidates": 3})
    assert cascade.judge == "ssr"  # the CLIP sees 8 frames of 32 px
    steps = []
    best = cascade.sample_all(TEXTS, many, progress=steps.append)
    assert len(steps) == cascade.num_sampler_steps(3, many)
    drawn = cascade.sample_all(
        [text for text in TEXTS for _ in range(3)], FAST, range(9)
    )  # the same candidates, none left out
    text = cascade.encode(TEXTS).embedding
    with torch.no_grad():
        video = cascade.video_clip.encode_video(to_float(drawn["ssr"])).unflatten(0, (3, 3))
    kept = torch.einsum("bkd,bd->bk", video, text).argmax(1)
    assert kept.tolist() != [0, 0, 0]
    for name, clips in drawn.items():
        expected = clips.unflatten(0, (3, 3))[torch.arange(3), kept]
        assert (best[name].int() - expected.int()).abs().max() <= 1, name


def test_candidates_are_judged_as_early_as_the_clip_can_see(cascade, configure, run_dir) -> None:
    base = Cascade.load(run_dir, order=("base",))  # 8 frames of 32 px
    assert base.judge == "base"
    # stopped before the judge there is nothing to choose from: one clip per text
    many = SampleConfig(**{**FAST.__dict__, "candidates": 3})
    steps = []
    made = cascade.sample_all(TEXTS, many, progress=steps.append, last="base")
    assert len(made["base"]) == 3 and len(steps) == cascade.num_sampler_steps(3, many, "base")
    model = cascade.unets[0]
    blind = Cascade(cascade.video_clip, (cascade.prior, cascade.prior_diffusion), [model])
    with pytest.raises(ValueError, match="sees 8 frames of 32 px, which no clip of the cascade"):
        blind.sample(TEXTS, SampleConfig(candidates=2))


def test_the_chosen_candidate_goes_on_with_its_own_number_and_text(cascade, monkeypatch) -> None:
    """Chosen behind the base: the later U-Nets make of it what they make of it without a choice."""
    monkeypatch.setattr(Cascade, "judge", "base")
    monkeypatch.setattr(cascade, "nearest", lambda clips, text, many: torch.tensor([2, 3, 7]))
    best = cascade.sample_all(TEXTS, SampleConfig(**{**FAST.__dict__, "candidates": 3}))
    every = [text for text in TEXTS for _ in range(3)]
    drawn = cascade.sample_all(every, FAST, range(9))
    for name, clips in drawn.items():
        assert (best[name].int() - clips[[2, 3, 7]].int()).abs().max() <= 1, name


# ---------------------------------------------------------------- what is refused


def test_stages_that_do_not_chain_are_named(cascade, chain_dir, run_dir) -> None:
    base, tsr, ssr = cascade.unets
    for stages, message in (
        ([], "needs a U-Net"),
        ([tsr], "'tsr' makes more of a smaller clip, not of a text"),
        ([base, base], "'base' makes clips of text, so it comes first"),
        ([base, ssr], "'ssr' was trained on clips of 16 px at 4 .* 'base' makes 16 px at 2"),
        ([base, tsr, CascadeUnet("ssr", ssr.unet, ssr.diffusion, 8.0)], "at 8 .*'tsr' .* at 4"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_chain(stages)
    with pytest.raises(CheckpointError, match=r"'ssr' was trained on .* 16 px .* makes 32 px"):
        Cascade.load(run_dir, order=("base", "ssr"))  # a base of 32 px


def test_a_missing_stage_and_one_of_another_clip_are_named(chain_dir, tmp_path) -> None:
    shutil.copytree(chain_dir, tmp_path / "run")
    path = tmp_path / "run" / "tsr" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"tsr/model.safetensors: no such file; the tsr model"
    ):
        Cascade.load(tmp_path / "run", order=ORDER)
    hashed = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert "clip_hash" in str(hashed)
    place = content.index(b"clip_hash")
    place = content.index(b":", place) + 4  # inside the quoted hash, in either quoting
    changed = b"0" if content[place : place + 1] != b"0" else b"1"
    path.write_bytes(content[:place] + changed + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"tsr/model.safetensors: trained on the CLIP"):
        Cascade.load(tmp_path / "run", order=ORDER)


def test_empty_texts_are_refused_and_long_ones_split(cascade) -> None:
    with pytest.raises(CaptionError):
        cascade.sample(["a man", "  "], FAST)
    long = ", ".join(f"a blue hat number {i}" for i in range(60))  # one sentence, 300 words
    lines = text_to_lines(long)
    assert len(lines) > 3 and all(f"number {i}" in " ".join(lines) for i in range(60))
    assert cascade.sample([long], FAST).shape == (1, 8, 32, 32, 3)


@pytest.mark.parametrize(
    "override, message",
    [
        ("unets.ssr.crop=10", "crop 10 must be a multiple of 4"),
        ("unets.ssr.crop=64", "at most 32"),
        ("unets.tsr.crop_frames=3", "window 3 must be a multiple of 2"),
        ("unets.base.crop_frames=4", "window 4: the network needs the whole clip"),
        ("unets.base.crop=16", "crop 16: the network needs the whole clip"),
        (
            "unets.base.crop=16 unets.base.model.learned_variance=true",
            "crop 16: learned_variance needs the whole clip",
        ),
        ("unets.tsr.num_images=2", "images 2: a single frame has no frames between"),
        ("unets.tsr.augmentation=null", "augmentation belongs to"),
        ("unets.base.augmentation=[1,2]", "augmentation belongs to"),
        ("unets.tsr.augmentation=[3,2]", "augmentation must not fall"),
        ("unets.tsr.model.num_lowres_frames=3", "num_lowres_frames 3"),
        ("unets.ssr.model.image_size=64", "unets.ssr.model makes 8 frames of 64 px"),
        ("+sample.unets.tsr.stepz=2", "sample.unets.tsr.stepz: unknown key"),
        ("sample.unets.tsr.steps=0", "sample.unets.tsr: steps must be at least 1"),
        ("+sample.unets.srr.steps=2", "sample.unets.srr: unets has only base, tsr, ssr"),
        ("+sample.unets.base.steps=2", "sample.unets.base: it makes clips of text"),
    ],
)
def test_settings_that_cannot_be(configure, run_dir, override: str, message: str) -> None:
    unet = override.split(".")[1] if override.startswith("unets") else "tsr"
    with pytest.raises(ConfigError, match=message):
        train(unet, configure(*override.split()))


def test_pixels_are_trained_with_images_too(configure, run_dir) -> None:
    """They have a smaller clip, a level of noise and a crop of their own, and no neighbours."""
    cfg = configure("unets.ssr.num_images=2", "unets.ssr.image_only_prob=0.5", run="ssr_images")
    shutil.copytree(run_dir / "clip", Path(cfg.run_dir) / "clip")
    train("ssr", cfg)
    lines = read_metrics(Path(cfg.run_dir) / "ssr" / "metrics.jsonl")
    both = [(line["loss_clips"], line["loss_images"]) for line in lines if "loss_clips" in line]
    assert both and all(0.001 < loss < 5 for pair in both for loss in pair)


# ---------------------------------------------------------------- files


def metadata(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


def test_the_script_writes_every_stage_with_its_caption(configure, chain_dir, tmp_path) -> None:
    text = "A man with a beard smiles. The light comes from the left."
    places = [f"out={tmp_path}", "num_samples=2", f"text='{text}'"]
    sample.main(configure(*CHAIN, *places, "save_intermediates=true", "sample.seed=7", run="chain"))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    clips = {f"{folder}{i:04d}.mp4" for folder in ("base/", "tsr/", "") for i in range(2)}
    assert names == clips | {"sheet.png"}
    for name, fps, size in (("base/0001.mp4", 2, (4, 16)), ("0001.mp4", 4, (8, 32))):
        with av.open(str(tmp_path / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == fps
        assert (len(frames), frames[0].shape[0]) == size
        found = metadata(tmp_path / name)
        facts = json.loads(found["comment"])
        assert found["title"] == text
        assert facts["seed"] == 7 and facts["number"] == 1 and facts["cascade"] == list(ORDER)
        assert facts["sample"]["stages"]["ssr"]["steps"] == 2
    assert Image.open(tmp_path / "sheet.png").size[0] > 8 * 32


def test_frames_as_png_say_the_same(configure, chain_dir, tmp_path) -> None:
    sample.main(configure(*CHAIN, f"out={tmp_path}", "format=frames", run="chain"))
    paths = sorted((tmp_path / "0000").iterdir())
    assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(8)]
    image = Image.open(paths[3])
    assert image.size == (32, 32) and image.text["title"] == sample.EXAMPLE
    assert json.loads(image.text["comment"])["number"] == 0
    with pytest.raises(ValueError, match="format must be one of mp4, frames, not 'gif'"):
        sample.main(configure("format=gif", run="chain"))


def test_a_caption_of_any_letters_survives(tmp_path) -> None:
    title = 'Eine Frau – "lächelt"; =\\ 女人\nnickt'
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    path = write_clip(tmp_path, "a", frames, 4.0, title, {"seed": 1})
    assert metadata(path)["title"] == title
    folder = write_clip(tmp_path, "b", frames, 4.0, title, {"seed": 1}, "frames")
    assert Image.open(folder / "0000.png").text["title"] == title


def test_two_processes_share_the_texts_out(configure, chain_dir, tmp_path) -> None:
    """The clips are those of one process; the sheet shows all; a process may have no text."""
    cfg = configure(*CHAIN, run="chain")
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    overrides = [f"file={file}", "sample.steps=2", "format=frames"]
    sample.main(configure(*CHAIN, *overrides, f"out={tmp_path}/one", run="chain"))
    command = [*launch_command("ddp"), "sample.py", f"run_dir={cfg.run_dir}", *overrides]
    run_launch([*command, "sample.prior_steps=2", f"out={tmp_path}/two", *steps_of(cfg)])
    for i in range(3):
        for path in sorted((tmp_path / "one" / f"{i:04d}").iterdir()):
            other = tmp_path / "two" / f"{i:04d}" / path.name
            one, two = (np.asarray(Image.open(p)).astype(int) for p in (path, other))
            assert np.abs(one - two).max() <= 1
    sheets = [Image.open(tmp_path / which / "sheet.png").size for which in ("one", "two")]
    assert sheets[0] == sheets[1]


def steps_of(cfg) -> list[str]:
    return [f"sample.unets.{name}.steps={cfg.sample.unets[name].steps}" for name in ("tsr", "ssr")]


def test_evaluation_reads_every_stage(configure, chain_dir, tmp_path) -> None:
    evaluate.main(configure(*CHAIN, "evaluate.clips=4", f"out={tmp_path}", run="chain"))
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("attribute_accuracy", "accuracy_of_base", "accuracy_of_tsr"):
        assert 0 <= report[f"{name}_low"] <= report[name] <= report[f"{name}_high"] <= 1
    for stage in ORDER:
        assert len(list((tmp_path / "clips" / stage).glob("*.mp4"))) == 4


@pytest.mark.parametrize("size", ["demo", "celebvtext_256"])
def test_every_value_of_a_stage_can_be_set(size) -> None:
    """No section is a reference to another one's, which could not be overridden."""
    for key in ("model.dim", "diffusion.shift", "captions.order", "drop.text", "train.batch_size"):
        cfg = compose(f"size={size}", *(f"unets.{u}.{key}=7" for u in ("tsr", "ssr")))
        assert OmegaConf.select(cfg.unets.tsr, key) == OmegaConf.select(cfg.unets.ssr, key) == 7
        assert OmegaConf.select(cfg.unets.base, key) != 7


def test_the_default_configurations_chain() -> None:
    """What experiment=demo and experiment=celebvtext_256 say of their stages fits together."""
    for size in ("demo", "celebvtext_256"):
        cfg = compose(f"size={size}")
        before = None
        for name in cfg.cascade:
            model = cfg.unets[name].model
            assert cfg.data.num_frames % model.num_frames == cfg.data.size % model.image_size == 0
            if before is not None:
                assert (model.num_lowres_frames, model.lowres_size) == (
                    before.num_frames,
                    before.image_size,
                )
            before = model
        assert (before.num_frames, before.image_size) == (cfg.data.num_frames, cfg.data.size)
