"""Super-resolution in sampling: residuals, known frames, tiles, noise."""

import dataclasses

import pytest
import torch

from dalle2_video import keyed
from dalle2_video.diffusion.lowres import augment, fit
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.pipeline.sampling import GivenLowRes, sample_clips
from dalle2_video.pipeline.sampling_config import SuperResolutionSampling
from dalle2_video.pipeline.super_resolution import SuperResolution
from tests.helpers.lowres import CONV, SSR, X0, condition, lowres_clip
from tests.helpers.networks import awake


@torch.no_grad()
def test_a_residual_is_diffused_around_the_smaller_clip() -> None:
    """Without an answer it is the blended clip; an answer is multiplied by `residual`."""
    model = dataclasses.replace(SSR, residual=0.25)
    lowres, how = lowres_clip(model), SuperResolutionSampling(steps=3, augmentation=2.0)
    given = GivenLowRes(lowres, model, how, 0, torch.arange(2), "sample/low")
    guess = given.task.guess(given.at(slice(None)))
    torch.testing.assert_close(
        guess, fit(given.noisy, (1, 2)) * torch.sigmoid(torch.tensor(2.0)).sqrt()
    )
    for answer in (0.0, 0.4, 30.0):  # the last is beyond what a pixel can be

        def answers(z, *rest, answer=answer):
            return torch.full_like(z, answer)

        video = sample_clips(answers, model, X0, condition(2), torch.arange(2), how, 0, lowres)
        torch.testing.assert_close(video, (guess + 0.25 * answer).clamp(-1, 1))
    longer = lowres_clip(model, 2, 20)
    how = dataclasses.replace(how, tile=8, overlap=4)
    video = sample_clips(answers, model, X0, condition(2), torch.arange(2), how, 0, longer)
    assert video.shape[2] == 20 and (video - 1).abs().max() < 1e-5


@pytest.mark.parametrize("residual", [0.0, 0.1])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "ancestral"])
def test_known_frames_come_out_as_they_went_in(sampler, residual) -> None:
    model = dataclasses.replace(CONV, residual=residual)
    net = awake(Unet3D(model, 24, 12))
    lowres = lowres_clip(CONV)
    how = SuperResolutionSampling(sampler=sampler, steps=3, guidance_scale=2.0, augmentation=1.0)
    video = sample_clips(net, model, X0, condition(2), torch.arange(2), how, 0, lowres)
    assert video.shape == (2, 3, 8, 16, 16)
    assert torch.equal(video[:, :, ::2], lowres)
    assert (video[:, :, 1::2] - lowres).abs().max() > 0.1
    longer = lowres_clip(CONV, 2, 10)
    video = sample_clips(net, model, X0, condition(2), torch.arange(2), how, 0, longer)
    assert video.shape == (2, 3, 20, 16, 16) and torch.equal(video[:, :, ::2], longer)


@pytest.mark.parametrize("model", [CONV, SSR], ids=["tsr", "ssr"])
@torch.no_grad()
def test_tiles_give_the_clip_that_the_whole_would(model) -> None:
    """Where what tiles share is wider than what the network sees, no seam can be."""
    net = awake(Unet3D(model, 24, 12))
    lowres = lowres_clip(model, 1, 24 // model.upscale[0])
    how = SuperResolutionSampling(sampler="dpm_solver", steps=3, threshold="none", tile=24)
    whole = sample_clips(net, model, X0, condition(1), torch.arange(1), how, 0, lowres)
    seen = []

    def watched(z, *rest):
        seen.append(z.shape[2])
        return net(z, *rest)

    how = dataclasses.replace(how, tile=18, overlap=12)
    parts = sample_clips(watched, model, X0, condition(1), torch.arange(1), how, 0, lowres)
    assert set(seen) == {18} and len(seen) == 2 * 3
    assert (parts - whole).abs().mean() < 0.05 * whole.std()
    narrow = dataclasses.replace(how, tile=6, overlap=0)
    seams = sample_clips(watched, model, X0, condition(1), torch.arange(1), narrow, 0, lowres)
    assert (seams - whole).abs().mean() > 2 * (parts - whole).abs().mean()


def test_a_clip_of_super_resolution_does_not_depend_on_its_batch() -> None:
    net = awake(Unet3D(SSR, 24, 12))
    lowres, sample_ids, how = (
        lowres_clip(SSR, 3),
        torch.tensor([4, 9, 2]),
        SuperResolutionSampling(steps=2),
    )
    video = sample_clips(net, SSR, X0, condition(3), sample_ids, how, 0, lowres)
    alone = sample_clips(
        net, SSR, X0, condition(3).rows(torch.tensor([1])), sample_ids[1:2], how, 0, lowres[1:2]
    )
    torch.testing.assert_close(alone, video[1:2], atol=1e-4, rtol=0)
    other = sample_clips(net, SSR, X0, condition(3), sample_ids, how, 1, lowres)
    assert (other - video).abs().max() > 0.1


def test_the_network_is_given_the_noise_and_its_level() -> None:
    lowres, given = lowres_clip(SSR), []

    def watched(z, log_snr, condition, num_images, x0_prev, lowres):
        given.append(lowres)
        return z

    how = SuperResolutionSampling(steps=2, augmentation=1.5, guidance_scale=2.0)
    sample_clips(watched, SSR, X0, condition(2), torch.arange(2), how, 3, lowres)
    noise = keyed.randn(lowres.shape[1:], 3, torch.arange(2), "sample/low")
    level = torch.full((2,), 1.5)
    expected = fit(augment(lowres, level, noise), SSR.upscale)
    for one in given:  # twice the batch, for guidance
        torch.testing.assert_close(one.frames, expected.repeat(2, 1, 1, 1, 1))
        assert one.log_snr.tolist() == [1.5] * 4


@torch.no_grad()
def test_self_conditioning_in_tiles_sees_its_own_frames() -> None:
    model = dataclasses.replace(CONV, self_condition=True)
    lowres, seen = lowres_clip(model, 1, 8), []

    def watched(z, log_snr, condition, num_images, x0_prev, lowres):
        if x0_prev is not None:
            seen.append(x0_prev)
        return z

    how = SuperResolutionSampling(steps=2, tile=8, overlap=4)
    video = sample_clips(watched, model, X0, condition(1), torch.arange(1), how, 0, lowres)
    assert video.shape[2] == 16 and len(seen) == 3  # the first tile of the first step has none
    for x0_prev, first in zip(seen, (0, 4, 8), strict=True):
        assert x0_prev.abs().max() <= 1
        torch.testing.assert_close(x0_prev[:, :, ::2], lowres[:, :, first // 2 : first // 2 + 4])


@pytest.mark.parametrize(
    "how, message",
    [({"overlap": -1}, "overlap"), ({"tile": 4, "overlap": 4}, "larger than overlap 4")],
)
def test_tiles_that_cannot_be(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperResolutionSampling(**how)


def test_a_tile_holds_whole_steps_between_known_frames() -> None:
    net = awake(Unet3D(CONV, 24, 12))
    with pytest.raises(ValueError, match="tile 5 is no multiple of the 2 frames"):
        sample_clips(
            net, CONV, X0, condition(2), torch.arange(2),
            SuperResolutionSampling(steps=1, tile=5), 0, lowres_clip(CONV),
        )  # fmt: skip


def test_places_in_a_longer_clip_are_those_of_the_length_in_training() -> None:
    """So that a time of the caption is at the same place in a clip of any length."""
    noisy, level = torch.randn(1, 3, 8, 16, 16), torch.tensor([1.0])  # 16 frames, trained on 8
    lowres = SuperResolution(CONV).stretch(noisy, level, slice(4, 12))
    assert lowres.place.tolist() == [[k / 2 for k in range(4, 12)]]
    whole = SuperResolution(CONV).stretch(noisy[:, :, :4], level, slice(None))
    assert whole.place.tolist() == [list(range(8))]
