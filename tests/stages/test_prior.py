"""Training of the prior."""

from types import SimpleNamespace

import torch

from dalle2_video.config import from_config
from dalle2_video.data.store.dataset import eval_loader
from dalle2_video.models.whitening import Whitening
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import load_conditions
from dalle2_video.stages.prior import PriorSection, prior_stage
from dalle2_video.stages.wiring import store_of
from dalle2_video.training.stage import StepInfo


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
