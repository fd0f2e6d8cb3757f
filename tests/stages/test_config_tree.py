"""The configuration as a whole: defaults, experiments, sizes, and what does not fit together."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from dalle2_video.cli import compose
from dalle2_video.config import ConfigError
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.stages.config_tree import Settings, settings_of
from dalle2_video.stages.sections import UnetSection

EXPERIMENTS = ("demo", "celebvtext", "celebvtext_256")


def base(*overrides: str, experiment: str = "celebvtext") -> UnetSection:
    return settings_of(compose(f"experiment={experiment}", *overrides)).unets["base"]


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 59.0), ("large", 299.7), ("paper", 1194.8)]
)
def test_the_sizes_of_the_base_have_the_stated_parameters(size: str, millions: float) -> None:
    with torch.device("meta"):
        net = Unet3D(base(f"unets/base={size}").model, 512, 512)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_paper_forgets_by_a_ten_thousandth_per_step_and_attends_at_32_16_and_8() -> None:
    """Ho et al. 2022 (2204.03458), appendix A, UCF101."""
    paper = base("unets/base=paper")
    sides = [paper.model.image_size // 2**level for level in range(4)]
    attended = [side for side, on in zip(sides, paper.model.attention, strict=True) if on]
    assert attended == [32, 16, 8]
    assert paper.train.ema_halflife_clips is not None
    decay = 0.5 ** (paper.train.batch_size / paper.train.ema_halflife_clips)
    assert decay == pytest.approx(0.9999, abs=1e-6)


def test_a_size_gives_way_to_the_command_line_and_large_is_the_default() -> None:
    assert base("unets/base=small", "unets.base.model.dim=128").model.dim == 128
    assert base("unets/base=large") == UnetSection()
    # beside super-resolution the base keeps its own pixels, whatever the store holds
    small = base("unets/base=small", experiment="celebvtext_256")
    assert (small.model.dim, small.model.image_size) == (64, 64)


def test_the_stored_size_reaches_the_networks() -> None:
    settings = settings_of(compose("experiment=celebvtext", "data.size=128", "data.num_frames=8"))
    for model in (settings.clip.model.video, settings.unets["base"].model):
        assert (model.image_size, model.num_frames) == (128, 8)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_of_an_experiment_can_be_set_and_is_checked(experiment: str) -> None:
    cfg = compose(f"experiment={experiment}")
    settings = settings_of(cfg)
    assert set(settings.cascade) <= set(settings.unets)
    for name in settings.unets:
        with pytest.raises(ConfigError, match=rf"unets\.{name}\.train\.lr: must be a valid number"):
            changed = compose(f"experiment={experiment}", f"unets.{name}.train.lr=high")
            settings_of(changed)


def test_the_defaults_are_those_of_the_classes() -> None:
    defaults, celebvtext = Settings(), settings_of(compose("experiment=celebvtext"))
    assert (celebvtext.clip, celebvtext.prior) == (defaults.clip, defaults.prior)
    assert (celebvtext.unets, celebvtext.sample) == (defaults.unets, defaults.sample)
    assert celebvtext.run_dir == "runs/default"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["unet=sr"], "unet=sr: unets has only base, tsr, ssr"),
        (["cascade=[base,sr]"], "cascade=sr: unets has only base, tsr, ssr"),
        (["+sample.unets.sr.steps=3"], r"sample\.unets\.sr: unets has only"),
        (
            ["+sample.unets.base.steps=3"],
            r"sample\.unets\.base: it makes clips of text",
        ),
        (["+sample.stepz=3"], r"sample\.stepz: unknown key; sample has: sampler, steps"),
        (["+sample.tile=3"], r"sample\.tile: unknown key"),  # of super-resolution alone
        (
            ["sample.sampler=euler"],
            r"sample\.sampler: must be 'dpm_solver', .*, got 'euler'",
        ),
        (["+evaluate.clip=3"], r"evaluate\.clip: unknown key"),
        (["evaluate.metric=fvd"], r"evaluate\.metric: must be .*'nearest'"),
        (["+datas=3"], r"^datas: unknown key; "),
        (["clip.model.text.name=ViT-B-32"], "weights: needed with name=ViT-B-32"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings_of(compose(*overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["demo", "celebvtext_256"])
def test_every_value_of_a_stage_can_be_set(experiment: str) -> None:
    """No section is a reference to another one's, which could not be overridden."""
    keys = (
        "model.dim",
        "diffusion.shift",
        "captions.join_probability",
        "cond_dropout.text",
        "train.lr",
    )
    for key in keys:
        cfg = compose(f"experiment={experiment}", *(f"unets.{u}.{key}=7" for u in ("tsr", "ssr")))
        assert OmegaConf.select(cfg.unets.tsr, key) == OmegaConf.select(cfg.unets.ssr, key) == 7
        assert OmegaConf.select(cfg.unets.base, key) != 7


def test_the_default_configurations_chain() -> None:
    """Each U-Net takes what the one before it makes, and the last fills the store."""
    for experiment in ("demo", "celebvtext_256"):
        cfg = compose(f"experiment={experiment}")
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
