"""Training of the prior."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dalle2_video import keyed
from dalle2_video.config import from_config
from dalle2_video.data.store.dataset import Batch, eval_loader
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.schedule import alpha_sigma
from dalle2_video.models.prior import Prior
from dalle2_video.models.prior_config import PriorConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.frozen_clip import draw_t, load_conditions
from dalle2_video.stages.prior import prior_stage
from dalle2_video.stages.sections import PriorSection
from dalle2_video.stages.wiring import store_of
from dalle2_video.training.stage import Stage, StepInfo
from tests.helpers.networks import EXAMPLES, waves


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


class Texts(torch.nn.Module):
    """A CLIP whose texts' embeddings and states hold their first token."""

    embed_dim, text_width = 24, 12

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = torch.nn.Parameter(torch.zeros(1))

    def encode_text(self, tokens: torch.Tensor, line_index: torch.Tensor) -> TextEncoding:
        ids = tokens[:, :1].float()
        place = torch.arange(3).expand(len(ids), 3)
        return TextEncoding(ids.expand(-1, 24), ids[:, None].expand(-1, 3, 12), place)


class Recorder(torch.nn.Module):
    """A prior that keeps its inputs and predicts zeros, or `answers` by the text's number."""

    def __init__(self, answers: torch.Tensor | None = None) -> None:
        super().__init__()
        self.whiten, self.answers, self.calls = Whitening(24), answers, []
        self.whiten.fit(EXAMPLES.video)

    def forward(self, z, log_snr, text, mask, embedding, keep):
        self.calls.append((z.clone(), log_snr, text, mask, embedding, keep))
        if self.answers is None:
            return torch.zeros_like(z)
        return self.whiten(self.answers[embedding[:, 0].long()])[:, None].expand_as(z)


SECTION = PriorSection(
    model=PriorConfig(width=32, layers=1, heads=2, noise_draws=3),
    diffusion=DiffusionConfig(prediction="x0", loss="x0"),
    text_drop=0.4,
)
CPU = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"))


def stub_stage(seed: int = 0) -> Stage:
    conditions = SimpleNamespace(
        video_clip=Texts(), clip_hash="x", train_set=None, val_set=None, examples=lambda: EXAMPLES
    )
    return prior_stage(SECTION, conditions, seed)  # type: ignore[arg-type]


def batch_of(ids: torch.Tensor, embeddings: torch.Tensor) -> Batch:
    keys = [str(i) for i in ids.tolist()]
    return Batch(ids, keys, None, ids[:, None], ids[:, None], [[k] for k in keys], embeddings)


def test_each_text_has_several_noise_levels_and_one_coin_for_its_dropout() -> None:
    ids, embeddings = torch.tensor([7, 31, 2, 5, 11]), waves(5, 24, phase=9.0) + 2
    prior = Recorder()
    step = StepInfo(ids, 4, torch.device("cpu"), CPU)  # type: ignore[arg-type]
    loss = stub_stage().objective(prior, batch_of(ids, embeddings), step).loss
    ((z, log_snr, states, mask, whole, keep),) = prior.calls
    numbers = (3 * ids[:, None] + torch.arange(3)).flatten()  # every draw has a time of its own
    wanted = SECTION.diffusion.schedule.log_snr(draw_t(4, numbers, "prior")).view(5, 3)
    torch.testing.assert_close(log_snr, wanted)
    x0 = prior.whiten(embeddings)[:, None]
    alpha, sigma = (a.view(5, 3, 1) for a in alpha_sigma(wanted))
    noise = keyed.randn((3, 24), 4, ids, "prior/noise")
    torch.testing.assert_close(z, alpha * x0 + sigma * noise)
    assert torch.equal(keep, keyed.rand((), 4, ids, "prior/drop") >= 0.4)
    assert states[:, 0, 0].tolist() == whole[:, 0].tolist() == ids.tolist() and mask.all()
    torch.testing.assert_close(loss, x0.square().mean())


def test_texts_are_dropped_at_their_rate() -> None:
    ids, prior = torch.arange(2000), Recorder()
    step = StepInfo(ids, 4, torch.device("cpu"), CPU)  # type: ignore[arg-type]
    stub_stage().objective(prior, batch_of(ids, torch.ones(2000, 24)), step)
    assert (~prior.calls[0][5]).float().mean() == pytest.approx(0.4, abs=0.03)


def test_a_new_prior_is_whitened_by_the_examples_and_keyed_by_the_seed() -> None:
    first, again, other = stub_stage(0).model, stub_stage(0).model, stub_stage(1).model
    assert isinstance(first, Prior) and isinstance(again, Prior) and isinstance(other, Prior)
    torch.testing.assert_close(first.whiten.mean, EXAMPLES.video.mean(0))
    torch.testing.assert_close(first.whiten_text.mean, EXAMPLES.states.mean(0))
    torch.testing.assert_close(first.whiten_text_embedding.mean, EXAMPLES.text.mean(0))
    assert torch.equal(first.query, again.query) and not torch.equal(first.query, other.query)


def test_validation_compares_drawn_embeddings_with_the_clips_own_and_anothers(monkeypatch) -> None:
    own = F.normalize(torch.randn(9, 24, generator=torch.manual_seed(0)), dim=-1)
    ids = torch.arange(9)
    batches = [batch_of(ids[:6], own[:6]), batch_of(ids[6:], own[6:])]
    monkeypatch.setattr("dalle2_video.stages.prior.eval_loader", lambda *_: iter(batches))
    prior, stage = Recorder(own), stub_stage()
    assert stage.validate is not None
    with torch.no_grad():
        found = stage.validate(prior, CPU)  # type: ignore[arg-type]
    assert found["loss"] == pytest.approx(0, abs=1e-6)
    assert found["cosine_to_video"] == pytest.approx(1, abs=1e-3)
    other = (own * own.roll(3, 0)).sum(1).mean()
    assert found["cosine_to_another_video"] == pytest.approx(float(other), abs=1e-3)
    assert all(len(call[0]) in (3, 6) for call in prior.calls), "without guidance"
