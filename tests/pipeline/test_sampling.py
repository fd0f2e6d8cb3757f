"""Embeddings and clips from trained networks: draws, samplers, seeds, batches."""

import dataclasses

import pytest
import torch

from dalle2_video.data.store.embeddings import EmbeddingCache
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.sampling import sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig
from tests.helpers.networks import prior_inputs

FAST = SampleConfig(steps=2, prior_steps=2, batch_size=3)


@pytest.fixture(scope="module")
def cascade(run_dir) -> Cascade:
    return Cascade.load(run_dir)


def test_sampling_keeps_the_nearer_of_the_draws_and_is_keyed() -> None:
    _, _, text, mask, embedding, _ = prior_inputs(4, 1)
    place = torch.where(mask, torch.arange(mask.shape[1]), -1)
    encoding = TextEncoding(embedding, text, place)
    diffusion = DiffusionConfig("x0", "x0")

    def identity(z, log_snr, *rest):  # x0 = z: each draw keeps the direction it starts with
        return z

    sample_ids = torch.arange(4)
    whiten = Whitening(embedding.shape[1])
    sample = lambda n: sample_embeddings(  # noqa: E731
        identity,
        whiten,
        diffusion,
        encoding,
        sample_ids,
        SampleConfig(prior_draws=n, prior_steps=2),
    )
    two, four = sample(2), sample(4)
    torch.testing.assert_close(two.norm(dim=-1), torch.ones(4))
    assert ((four * embedding).sum(-1) >= (sample(1) * embedding).sum(-1) - 0.5).all()
    assert (four * embedding).sum() > (sample(1) * embedding).sum()
    torch.testing.assert_close(sample(2), two)
    half = TextEncoding(embedding[2:], text[2:], place[2:])
    alone = sample_embeddings(
        identity,
        whiten,
        diffusion,
        half,
        sample_ids[2:],
        SampleConfig(prior_draws=2, prior_steps=2),
    )
    torch.testing.assert_close(alone, two[2:])


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
