"""Training of the prior: its objective, its validation, and its Stage (Ramesh et al. 2022, 2.2).

B texts, K noised embeddings per text, D embedding dimension.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from dalle2_video import keyed
from dalle2_video.data.store.dataset import Batch, CelebVTextDataset, eval_loader
from dalle2_video.diffusion.objective import add_noise, per_sample_loss
from dalle2_video.models.prior import Prior
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.sampling import sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig
from dalle2_video.stages.frozen_clip import Conditions, TextEncoder, draw_t
from dalle2_video.stages.sections import PriorSection
from dalle2_video.training.stage import Loss, Stage, StepInfo


def whitening_of(model: nn.Module, accelerator: Accelerator) -> Whitening:
    """The space that the prior works in: of the model itself, which a resume may have restored."""
    return cast(Prior, accelerator.unwrap_model(model)).whiten


class PriorObjective:
    """MSE on the whitened embedding itself, K noise levels per text, and its validation."""

    def __init__(
        self, section: PriorSection, encode: TextEncoder, val_set: CelebVTextDataset
    ) -> None:
        self.section, self.encode, self.val_set = section, encode, val_set
        self.diffusion, self.draws = section.diffusion, section.model.noise_draws

    def __call__(self, model: nn.Module, batch: Batch, step: StepInfo) -> Loss:
        assert batch.embeddings is not None
        text, draws = self.encode(batch), self.draws
        whiten = whitening_of(model, step.accelerator)
        x0 = whiten(batch.embeddings)[:, None].expand(-1, draws, -1)
        ids = step.sample_ids[:, None] * draws + torch.arange(draws)
        t = draw_t(step.seed, ids.flatten(), "prior").to(step.device)
        eps = keyed.randn(x0.shape[1:], step.seed, step.sample_ids, "prior/noise").to(step.device)
        noised = add_noise(self.diffusion, x0.flatten(0, 1), t, eps.flatten(0, 1))
        keep = keyed.rand((), step.seed, step.sample_ids, "prior/drop") >= self.section.text_drop
        prediction = model(
            noised.z.unflatten(0, (-1, draws)),
            noised.log_snr.unflatten(0, (-1, draws)),
            text.states,
            text.mask,
            text.embedding,
            keep.to(step.device),
        )
        return Loss(per_sample_loss(self.diffusion, prediction.flatten(0, 1), noised).mean())

    def validate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Loss, and cosines of drawn embeddings to the clips' own and to others'.

        Every rank goes over the whole split, so sharded models make the same calls.
        """
        total, pairs = 0.0, []
        config = SampleConfig(prior_guidance_scale=1.0)
        whiten = whitening_of(model, accelerator)
        for cpu_batch in eval_loader(self.val_set, 64):
            batch = cpu_batch.to(accelerator.device)
            step = StepInfo(batch.sample_ids, 0, accelerator.device, accelerator)
            total += float(self(model, batch, step).loss) * len(batch)
            text = self.encode(batch)
            drawn = sample_embeddings(model, whiten, self.diffusion, text, batch.sample_ids, config)
            assert batch.embeddings is not None
            pairs.append(torch.stack([drawn, batch.embeddings]).cpu())
        drawn, own = torch.cat(pairs, dim=1)
        other = own.roll(max(1, len(own) // 3), 0)  # far on in the split: another person
        return {
            "loss": total / len(own),
            "cosine_to_video": float((drawn * own).sum(1).mean()),
            "cosine_to_another_video": float((drawn * other).sum(1).mean()),
        }


def prior_stage(section: PriorSection, conditions: Conditions, seed: int) -> Stage:
    """The stage "prior"."""
    video_clip = conditions.video_clip
    torch.manual_seed(keyed.key(seed, 0, "prior/init"))
    prior = Prior(section.model, video_clip.embed_dim, video_clip.text_width)
    prior.fit(conditions.examples())
    objective = PriorObjective(section, TextEncoder(video_clip), conditions.val_set)
    return Stage(
        name="prior",
        model=prior,
        objective=objective,
        train_set=conditions.train_set,
        val_set=conditions.val_set,
        validate=objective.validate,
        config={
            "model": dataclasses.asdict(section.model),
            "diffusion": dataclasses.asdict(section.diffusion),
            "embedding_dim": video_clip.embed_dim,
            "text_dim": video_clip.text_width,
        },
        meta={"clip_hash": conditions.clip_hash},
    )
