"""The presets of configs/preset: sizes that the README names."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from dalle2_video.config import from_config
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.stages.unet import UnetSection
from tests.helpers.launching import ROOT

CONFIGS = ROOT / "configs"


def section(*overrides: str) -> UnetSection:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", ["size=celebvtext", *overrides])
    return from_config(UnetSection, cfg.unets.base, "unets.base")


@pytest.mark.parametrize(
    ("preset", "millions"), [("small", 59.0), ("base", 299.7), ("paper", 1194.8)]
)
def test_presets_have_the_stated_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        net = Unet3D(section(f"preset={preset}").model, 512, 512)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_preset_gives_way_to_the_command_line_and_base_is_celebvtexts() -> None:
    assert section("preset=small", "unets.base.model.dim=128").model.dim == 128
    assert section("preset=base") == section()


def test_paper_is_the_row_of_ucf101() -> None:
    """PAPERS.md section 3: Ho et al. 2022, appendix A."""
    paper = section("preset=paper")
    model, train = paper.model, paper.train
    assert (model.dim, model.mults, model.blocks, model.head_dim) == (256, (1, 2, 4, 8), 2, 64)
    assert (model.num_frames, model.image_size, model.cond_dim, model.dropout) == (
        16,
        64,
        1024,
        0.1,
    )
    sides = [model.image_size // 2**level for level in range(4)]
    assert [side for side, on in zip(sides, model.attention, strict=True) if on] == [32, 16, 8]
    assert (paper.diffusion.prediction, paper.diffusion.loss, paper.images) == ("eps", "eps", 8)
    assert (train.batch_size, train.lr, train.betas) == (128, 3e-4, (0.9, 0.99))
    assert train.clips == 60_000 * 128
    assert 0.5 ** (128 / train.ema_halflife_clips) == pytest.approx(0.9999, abs=1e-6)
