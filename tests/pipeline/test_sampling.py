"""Embeddings and clips from trained networks: draws, samplers, seeds, batches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.config import from_config
from dalle2_video.data.store.embeddings import EmbeddingCache
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle2_video.diffusion.schedule import CosineSchedule, sampler_steps
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.video_clip import TextEncoding
from dalle2_video.models.whitening import Whitening
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.loading import load_clip, load_prior, load_unet
from dalle2_video.pipeline.sampling import sample_clips, sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig, UnetSampling
from tests.helpers.networks import EXAMPLES, SMALL, inputs, prior_inputs

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


# ---------------------------------------------------------------- by hand


def test_embeddings_are_drawn_with_guidance_in_the_whitened_space() -> None:
    """Against the parts put together by hand; the noise is keyed by seed and sample id."""
    _, _, text, mask, embedding, _ = prior_inputs(3, 2)
    encoding = TextEncoding(embedding, text, torch.where(mask, torch.arange(5), -1))
    config = SampleConfig(prior_draws=2, prior_steps=3, prior_guidance_scale=2.5, seed=2, steps=7)
    diffusion, ids, whiten = DiffusionConfig("x0", "x0"), torch.tensor([4, 0, 7]), Whitening(24)
    whiten.fit(EXAMPLES.video)

    def prior(z, log_snr, states, seen, whole, keep):
        assert torch.equal(states, text.repeat(len(z) // 3, 1, 1))
        assert torch.equal(seen, mask.repeat(len(z) // 3, 1))
        signs = torch.where(keep, 1.0, -0.7)[:, None, None]
        return torch.tanh(z + 0.1 * log_snr[..., None]) + signs * whole[:, None]

    def denoise(z, log_snr):
        kept, none = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
        level = log_snr[:, None].expand(-1, 2)
        with_text = prior(z, level, text, mask, embedding, kept)
        without = prior(z, level, text, mask, embedding, none)
        return without + 2.5 * (with_text - without)

    z = keyed.randn((2, 24), 2, ids, "prior")
    x0 = ddim(denoise, z, sampler_steps(diffusion.schedule, 3))
    drawn = F.normalize(whiten.inverse(x0), dim=-1)
    best = (drawn * embedding[:, None]).sum(-1).argmax(1)
    assert best.unique().numel() == 2, "the test needs both draws to win somewhere"
    found = sample_embeddings(prior, whiten, diffusion, encoding, ids, config)
    torch.testing.assert_close(found, drawn[torch.arange(3), best])


STEPS = 4


def bending(z, log_snr, condition, num_images=0, x0_prev=None, lowres=None):
    """A network of x0 that leaves [-1, 1] and goes by its condition and its last estimate."""
    shift = torch.where(condition.keep_text, 0.6, -0.4) * condition.embedding[:, 0]
    gain = torch.where(condition.keep_text, 1.4, 1.1)
    shift, gain, level = (a.view(-1, 1, 1, 1, 1) for a in (shift, gain, log_snr))
    out = gain * torch.tanh(z + 0.1 * level) + shift
    return out if x0_prev is None else out + 0.3 * x0_prev


def by_hand(how: UnetSampling, model: UnetConfig, condition: Condition, ids, seed) -> Tensor:
    """The sampler on guidance, threshold and self-conditioning, written out."""
    steps, before = sampler_steps(CosineSchedule(), STEPS), None

    def scale(log_snr: float) -> float:
        match how.guidance:
            case "interval":
                low, high = how.guidance_interval
                return how.guidance_scale if low <= log_snr <= high else 1.0
            case "oscillating":
                number = steps.tolist().index(log_snr) - round(how.guidance_constant * STEPS)
                return 1.0 if number >= 0 and number % 2 == 0 else how.guidance_scale
        return how.guidance_scale

    def denoise(z, log_snr):
        nonlocal before
        s, shown = scale(float(log_snr[0])), None if before is None else before.clamp(-1, 1)
        with_text = bending(z, log_snr, condition, x0_prev=shown)
        without = bending(z, log_snr, condition.dropped(), x0_prev=shown)
        x0 = without + s * (with_text - without)
        if how.guidance_rescale and s != 1:
            ratio = with_text.flatten(1).std(1) / x0.flatten(1).std(1)
            share = how.guidance_rescale * ratio + 1 - how.guidance_rescale
            x0 = x0 * share.view(-1, 1, 1, 1, 1)
        if how.threshold == "static":
            x0 = x0.clamp(-1, 1)
        if how.threshold == "dynamic":
            limit = x0.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1).view(-1, 1, 1, 1, 1)
            x0 = torch.maximum(torch.minimum(x0, limit), -limit) / limit
        if model.self_condition:
            before = x0
        return x0

    def noise(i):
        return keyed.randn(model.clip_shape, seed, ids, f"sample/{i}")

    z = keyed.randn(model.clip_shape, seed, ids, "sample")
    match how.sampler:
        case "ddim":
            return ddim(denoise, z, steps, noise, how.eta)
        case "ancestral":
            gamma = 0.1 if how.gamma is None else how.gamma
            return ancestral(denoise, z, steps, noise, gamma, how.corrector)
    return dpm_solver(denoise, z, steps)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"threshold": "none"},
        {"threshold": "dynamic"},
        {"sampler": "ddim", "eta": 0.7},
        {"sampler": "ancestral"},
        {"sampler": "ancestral", "gamma": 0.0, "corrector": 0.1},
        {"guidance_rescale": 0.7, "threshold": "none"},
        {"guidance": "interval", "guidance_interval": (-1.0, 1.0)},
        {"guidance": "oscillating", "guidance_constant": 0.25},
        {"guidance_scale": 1.0},
    ],
    ids=lambda how: "-".join(map(str, how.values())) or "default",
)
@pytest.mark.parametrize("self_condition", [False, True])
def test_clips_are_sampled_as_by_hand(how: dict, self_condition: bool) -> None:
    model = dataclasses.replace(SMALL, self_condition=self_condition)
    sampling = UnetSampling(**{"steps": STEPS, "guidance_scale": 3.0, **how})
    _, _, condition = inputs(3)
    ids = torch.tensor([5, 0, 8])
    config = DiffusionConfig("x0", "x0")
    found = sample_clips(bending, model, config, condition, ids, sampling, 6)
    wanted = by_hand(sampling, model, condition, ids, 6)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- trained networks


def test_loaded_networks_are_for_sampling_alone_with_the_settings_of_their_training(
    configure, run_dir
) -> None:
    cfg = configure()
    prior, prior_diffusion, _ = load_prior(run_dir / "prior" / "model.safetensors")
    networks = [prior, load_clip(run_dir / "clip" / "model.safetensors")[0]]
    assert prior_diffusion == from_config(DiffusionConfig, cfg.prior.diffusion, "prior")
    for name in ("base", "tsr", "ssr"):
        unet, diffusion, _ = load_unet(run_dir / name / "model.safetensors", name)
        assert diffusion == from_config(DiffusionConfig, cfg.unets[name].diffusion, name)
        networks.append(unet)
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
