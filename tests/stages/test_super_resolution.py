"""Super-resolution: what the network is given, what it may see, parts of clips, and windows."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float
from dalle2_video.diffusion.lowres import (
    augment,
    blend,
    cut,
    fit,
    known_frames,
    window_starts,
    window_weights,
)
from dalle2_video.diffusion.objective import DiffusionConfig, Noised, add_noise, per_sample_loss
from dalle2_video.models.layers import TemporalConv
from dalle2_video.models.unet3d import Condition, Low, Unet3D, UnetConfig
from dalle2_video.pipeline.sampling import ClipSampling, Smaller, sample_clips
from dalle2_video.stages.super_resolution import draw_corners, noisy_low, part_of
from dalle2_video.training.stage import StepInfo
from tests.models.test_unet3d import awake

CONV = UnetConfig(
    image_size=16, num_frames=8, patch=2, dim=32, mults=(1, 2), head_dim=16, cond_dim=32,
    attention=(False, False), cross_attention=(False, False), temporal="convolution",
    low_frames=4, low_size=16,
)  # fmt: skip
SSR = dataclasses.replace(CONV, low_frames=8, low_size=8)
BOTH = dataclasses.replace(CONV, low_frames=4, low_size=8)
X0 = DiffusionConfig(prediction="x0")


def condition(batch: int) -> Condition:
    torch.manual_seed(1)
    place = torch.tensor([0, 1, 2, 0, 1]).repeat(batch, 1)
    embedding, whole = F.normalize(torch.randn(2, batch, 24), dim=-1)
    return Condition.of(embedding, torch.randn(batch, 5, 12), place, whole)


def low_input(
    low: torch.Tensor, level: torch.Tensor, model: UnetConfig, first=0, frames=None
) -> Low:
    """What the network is given, without noise."""
    fitted = fit(low, model.times, first, frames)
    place = torch.arange(first, first + fitted.shape[2]).expand(len(low), -1)
    return Low(fitted, level, place)


def low_clip(model: UnetConfig, batch: int = 2, frames: int | None = None) -> torch.Tensor:
    torch.manual_seed(2)
    assert model.low_frames is not None and model.low_size is not None
    return torch.rand(batch, 3, frames or model.low_frames, model.low_size, model.low_size) * 2 - 1


# ---------------------------------------------------------------- the smaller clip


def test_each_frame_gets_the_known_one_before_and_behind_it() -> None:
    low = torch.arange(3.0).view(1, 1, 3, 1, 1)
    before, behind = fit(low, (4, 1))[0, :, :, 0, 0]
    assert before.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert behind.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    level = torch.tensor([20.0])
    line = blend(fit(low, (4, 1)), level, (4, 1))[0, 0, :, 0, 0]
    torch.testing.assert_close(line, torch.tensor([*(k / 4 for k in range(8)), 2, 2, 2, 2]))
    assert known_frames(8, (4, 1)).tolist() == [True, *[False] * 3] * 2
    assert not known_frames(8, (4, 2)).any() and not known_frames(8, (1, 2)).any()


def test_pixels_are_interpolated_bilinearly_in_each_frame() -> None:
    low = torch.randn(2, 3, 4, 5, 5)
    fitted = fit(low, (1, 3))
    for f in range(4):
        torch.testing.assert_close(
            fitted[:, :, f], F.interpolate(low[:, :, f], scale_factor=3, mode="bilinear")
        )
    both = fit(low, (2, 3))
    assert both.shape == (2, 6, 8, 15, 15)
    torch.testing.assert_close(both[:, :3, ::2], fitted)


@pytest.mark.parametrize("times", [(4, 1), (1, 2), (2, 2)])
def test_a_window_of_the_fitted_clip_is_that_part_of_the_whole(times) -> None:
    low = torch.randn(1, 3, 6, 4, 4)
    whole = fit(low, times)
    for first in range(0, 5 * times[0], times[0]):
        part = fit(low, times, first, times[0])
        assert torch.equal(part, whole[:, :, first : first + times[0]])


def test_the_noise_on_the_smaller_clip_has_its_log_snr() -> None:
    torch.manual_seed(0)
    low, noise = torch.randn(2, 2, 100_000).unsqueeze(-1).unsqueeze(-1)[:, :, None].unbind()
    out = augment(low[None], torch.tensor([1.1]), noise[None])
    signal = (out * low).mean() / low.square().mean()
    rest = (out - signal * low).square().mean()
    assert signal.item() == pytest.approx(0.866, abs=0.005)  # SNR 3 (PAPERS.md, section 4)
    assert rest.sqrt().item() == pytest.approx(0.5, abs=0.005)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("model", [CONV, SSR, BOTH], ids=["tsr", "ssr", "both"])
def test_it_starts_at_zero_and_every_parameter_learns(model) -> None:
    z, log_snr, level = torch.randn(2, 3, 8, 16, 16), torch.zeros(2), torch.tensor([9.0, 1.0])
    low, given = low_input(low_clip(model), level, model), condition(2)
    net = Unet3D(model, 24, 12)
    assert (net(z, log_snr, given, low=low) == 0).all()
    dropped = given._replace(
        keep_embedding=torch.tensor([True, False]), keep_text=torch.tensor([False, True])
    )
    awake(net)(z, log_snr, dropped, low=low).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without  # DDP would wait for them
    with pytest.raises(ValueError, match="takes the smaller clip"):
        net(z, log_snr, given)


def test_a_base_takes_no_smaller_clip() -> None:
    base = Unet3D(UnetConfig(image_size=16, num_frames=4, patch=2, dim=32, head_dim=16), 24, 12)
    low = Low(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="others do not"):
        base(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), condition(1), low=low)


def test_the_level_of_the_noise_is_a_condition() -> None:
    net = awake(Unet3D(SSR, 24, 12))
    z, log_snr = torch.randn(2, 3, 8, 16, 16), torch.zeros(2)
    low = low_input(low_clip(SSR), torch.tensor([1.0, 1.0]), SSR)
    other = low._replace(log_snr=torch.tensor([1.0, 8.0]))
    difference = net(z, log_snr, condition(2), low=low) - net(z, log_snr, condition(2), low=other)
    assert (difference[0] == 0).all() and difference[1].abs().max() > 1e-3


def test_temporal_convolution_sees_its_neighbours_and_no_image() -> None:
    layer = awake(TemporalConv(8))
    x = torch.randn(1, 6, 2, 2, 8)
    out = layer(x, 2)
    assert torch.equal(out[:, 4:], x[:, 4:])  # the images pass by
    for frame in range(6):
        y = x.clone()
        y[:, frame] += torch.randn(8)
        moved = (layer(y, 2) - out).abs().amax((0, 2, 3, 4)) > 1e-6
        near = {f for f in (frame - 1, frame, frame + 1) if 0 <= f < 4}
        assert set(moved.nonzero().flatten().tolist()) == (near if frame < 4 else {frame})
    still = torch.randn(1, 1, 2, 2, 8).expand(-1, 5, -1, -1, -1)
    torch.testing.assert_close(layer(still)[:, 0], layer(still)[:, 2])  # its ends look like frames


def test_a_window_is_told_where_it_is() -> None:
    """What a caption says of a time in the clip holds in a window of it too."""
    net = awake(Unet3D(CONV, 24, 12))
    clip = low_clip(CONV, 1, 12)
    z, log_snr = torch.randn(1, 3, 24, 16, 16), torch.zeros(1)
    level = torch.tensor([5.0])
    whole = net(z, log_snr, condition(1), low=low_input(clip, level, CONV))
    part = net(z[:, :, 6:22], log_snr, condition(1), low=low_input(clip, level, CONV, 6, 16))
    # 7 temporal convolutions stand one after the other: 2 down, 1 in the middle, 4 up
    assert (part - whole[:, :, 6:22])[:, :, 7:9].abs().max() < 1e-5
    assert (part - whole[:, :, 6:22])[:, :, 0].abs().max() > 1e-4


def test_a_network_without_attention_runs_on_crops_like_on_the_whole() -> None:
    net = awake(Unet3D(dataclasses.replace(SSR, image_size=128, low_size=64), 24, 12))
    model = net.config
    clip, z, log_snr = low_clip(model, 1, 2), torch.randn(1, 3, 2, 128, 128), torch.zeros(1)
    low = low_input(clip, torch.tensor([5.0]), model)
    whole = net(z, log_snr, condition(1), low=low)
    crop = (slice(None),) * 3 + (slice(0, 96),) * 2  # it sees 48 px to each side
    part = net(z[crop], log_snr, condition(1), low=low._replace(frames=low.frames[crop]))
    assert (part - whole[crop])[..., :8, :8].abs().max() < 1e-5
    assert (part - whole[crop])[..., -1, -1].abs().max() > 1e-4  # zeros beyond its edge


@pytest.mark.parametrize(
    "change, message",
    [
        ({"low_size": None}, "belong together"),
        ({"low_frames": 3}, "must be multiples of low_frames 3"),
        ({"low_frames": 0}, "low_frames 0 and low_size 16 must be 1 or more"),
        ({"low_size": 5}, "low_size 5"),
        ({"low_frames": 8}, "nothing is to be made"),
        ({"low_frames": None, "low_size": None, "residual": 0.1}, "residual needs"),
        ({"residual": 0.1, "self_condition": True}, "not with residual"),
    ],
)
def test_sizes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONV, **change)


# ---------------------------------------------------------------- training on parts


def stored(batch: int = 3) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (batch, 16, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("model", [CONV, SSR, BOTH], ids=["tsr", "ssr", "both"])
def test_a_part_and_its_smaller_clip_belong_together(model) -> None:
    """8 frames of 16 px from stored 16 of 32; windows of 4 frames, crops of 8 px."""
    frames, sample_ids = stored(), torch.tensor([5, 6, 7])
    whole, part = (8, 16), (4, 8)
    corners = draw_corners(whole, part, model.times, 0, sample_ids, "x")
    for corner in corners:
        assert all(0 <= place <= 16 - 8 for place in corner[1:]) and 0 <= corner[0] <= 4
        assert corner[0] % model.times[0] == 0
        assert corner[1] % model.times[1] == corner[2] % model.times[1] == 0
    assert corners[1:] == draw_corners(whole, part, model.times, 0, sample_ids[1:], "x")
    drawn = {
        draw_corners(whole, part, model.times, 0, torch.tensor([i]), "x")[0] for i in range(99)
    }
    assert len(drawn) > 20
    x0 = part_of(frames, whole, corners, part)
    torch.testing.assert_close(x0, cut(to_float(frames, *whole), corners, (4, 8, 8)))
    step = StepInfo(sample_ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    low = noisy_low(frames, model, (30.0, 30.0), corners, part, step, sample_ids, "x")
    small = to_float(frames, model.low_frames, model.low_size)
    expected = cut(fit(small, model.times), corners, (4, 8, 8))
    torch.testing.assert_close(low.frames, expected, atol=1e-4, rtol=0)
    if model is CONV:  # known frames are the frames themselves
        torch.testing.assert_close(low.frames[:, :3, ::2], x0[:, :, ::2], atol=1e-4, rtol=0)


def test_levels_of_noise_are_even_and_keyed() -> None:
    frames, sample_ids = stored(1).expand(64, -1, -1, -1, -1), torch.arange(64)
    corners = [(0, 0, 0)] * 64
    step = StepInfo(sample_ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    low = noisy_low(frames, SSR, (1.0, 9.0), corners, (8, 16), step, sample_ids, "x")
    assert low.log_snr.min() < 2 and low.log_snr.max() > 8
    assert low.log_snr.mean().item() == pytest.approx(5, abs=1)
    again = noisy_low(
        frames[:2], SSR, (1.0, 9.0), corners[:2], (8, 16), step, sample_ids[40:42], "x"
    )
    assert torch.equal(again.log_snr, low.log_snr[40:42])
    assert torch.equal(again.frames, low.frames[40:42])


def test_known_frames_do_not_count_in_the_loss() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, 5)
    noised = add_noise(X0, x0, torch.tensor([0.3, 0.8]), eps)
    given = known_frames(4, (2, 1))
    prediction = torch.randn_like(x0)
    loss = per_sample_loss(X0, prediction, noised, given)
    rest = Noised(noised.z[:, :, 1::2], noised.log_snr, noised.target[:, :, 1::2])
    torch.testing.assert_close(loss, per_sample_loss(X0, prediction[:, :, 1::2], rest))


# ---------------------------------------------------------------- sampling


def test_windows_cover_a_clip_and_their_shares_sum_to_one() -> None:
    assert window_starts(8, 8, 4) == [0] == window_starts(6, 8, 4)
    assert window_starts(20, 8, 4) == [0, 4, 8, 12]
    assert window_starts(22, 8, 3, 2) == [0, 4, 8, 12, 14]
    for frames, window, overlap in ((20, 8, 4), (21, 8, 1), (9, 8, 3), (16, 8, 0)):
        starts = window_starts(frames, window, overlap)
        weights = window_weights(starts, window, frames)
        total = torch.zeros(frames)
        for start, weight in zip(starts, weights, strict=True):
            assert weight.min() > 0
            total[start : start + window] += weight
        torch.testing.assert_close(total, torch.ones(frames))
    with pytest.raises(ValueError, match="never go on by 4"):
        window_starts(16, 8, 5, 4)


@torch.no_grad()
def test_a_residual_is_diffused_around_the_smaller_clip() -> None:
    """A network that says nothing gives the blended clip; its answers count so many times."""
    model = dataclasses.replace(SSR, residual=0.25)
    low, how = low_clip(model), ClipSampling(steps=3, augmentation=2.0)
    smaller = Smaller(low, model, 2.0, 0, torch.arange(2), "sample/low")
    guess = smaller.guess(slice(None))
    torch.testing.assert_close(
        guess, fit(smaller.noisy, (1, 2)) * torch.sigmoid(torch.tensor(2.0)).sqrt()
    )
    for answer in (0.0, 0.4, 30.0):  # the last is beyond what a pixel can be

        def says(z, *rest, answer=answer):
            return torch.full_like(z, answer)

        video = sample_clips(says, model, X0, condition(2), torch.arange(2), how, 0, low)
        torch.testing.assert_close(video, (guess + 0.25 * answer).clamp(-1, 1))
    longer = low_clip(model, 2, 20)
    how = dataclasses.replace(how, window=8, overlap=4)
    video = sample_clips(says, model, X0, condition(2), torch.arange(2), how, 0, longer)
    assert video.shape[2] == 20 and (video - 1).abs().max() < 1e-5


@pytest.mark.parametrize("residual", [0.0, 0.1])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "ancestral"])
def test_known_frames_come_out_as_they_went_in(sampler, residual) -> None:
    model = dataclasses.replace(CONV, residual=residual)
    net = awake(Unet3D(model, 24, 12))
    low = low_clip(CONV)
    how = ClipSampling(sampler=sampler, steps=3, guidance_scale=2.0, augmentation=1.0)
    video = sample_clips(net, model, X0, condition(2), torch.arange(2), how, 0, low)
    assert video.shape == (2, 3, 8, 16, 16)
    assert torch.equal(video[:, :, ::2], low)
    assert (video[:, :, 1::2] - low).abs().max() > 0.1
    longer = low_clip(CONV, 2, 10)
    video = sample_clips(net, model, X0, condition(2), torch.arange(2), how, 0, longer)
    assert video.shape == (2, 3, 20, 16, 16) and torch.equal(video[:, :, ::2], longer)


@pytest.mark.parametrize("model", [CONV, SSR], ids=["tsr", "ssr"])
@torch.no_grad()
def test_windows_give_the_clip_that_the_whole_would(model) -> None:
    """Where what windows share is wider than what the network sees, no seam can be."""
    net = awake(Unet3D(model, 24, 12))
    low = low_clip(model, 1, 24 // model.times[0])
    how = ClipSampling(sampler="dpm_solver", steps=3, threshold="none", window=24)
    whole = sample_clips(net, model, X0, condition(1), torch.arange(1), how, 0, low)
    seen = []

    def watched(z, *rest):
        seen.append(z.shape[2])
        return net(z, *rest)

    how = dataclasses.replace(how, window=18, overlap=12)
    parts = sample_clips(watched, model, X0, condition(1), torch.arange(1), how, 0, low)
    assert set(seen) == {18} and len(seen) == 2 * 3
    assert (parts - whole).abs().mean() < 0.05 * whole.std()
    narrow = dataclasses.replace(how, window=6, overlap=0)
    seams = sample_clips(watched, model, X0, condition(1), torch.arange(1), narrow, 0, low)
    assert (seams - whole).abs().mean() > 2 * (parts - whole).abs().mean()


def test_a_clip_of_super_resolution_does_not_depend_on_its_batch() -> None:
    net = awake(Unet3D(SSR, 24, 12))
    low, sample_ids, how = low_clip(SSR, 3), torch.tensor([4, 9, 2]), ClipSampling(steps=2)
    video = sample_clips(net, SSR, X0, condition(3), sample_ids, how, 0, low)
    alone = sample_clips(
        net, SSR, X0, condition(3).rows(torch.tensor([1])), sample_ids[1:2], how, 0, low[1:2]
    )
    torch.testing.assert_close(alone, video[1:2], atol=1e-4, rtol=0)
    other = sample_clips(net, SSR, X0, condition(3), sample_ids, how, 1, low)
    assert (other - video).abs().max() > 0.1


def test_the_network_is_given_the_noise_and_its_level() -> None:
    low, given = low_clip(SSR), []

    def watched(z, log_snr, condition, images, before, low):
        given.append(low)
        return z

    how = ClipSampling(steps=2, augmentation=1.5, guidance_scale=2.0)
    sample_clips(watched, SSR, X0, condition(2), torch.arange(2), how, 0, low)
    noise = keyed.randn(low.shape[1:], 0, torch.arange(2), "sample/low")
    level = torch.full((2,), 1.5)
    expected = fit(augment(low, level, noise), SSR.times)
    for one in given:  # twice the batch, for guidance
        torch.testing.assert_close(one.frames, expected.repeat(2, 1, 1, 1, 1))
        assert one.log_snr.tolist() == [1.5] * 4


@torch.no_grad()
def test_self_conditioning_in_windows_sees_its_own_frames() -> None:
    model = dataclasses.replace(CONV, self_condition=True)
    low, seen = low_clip(model, 1, 8), []

    def watched(z, log_snr, condition, images, before, low):
        if before is not None:
            seen.append(before)
        return z

    how = ClipSampling(steps=2, window=8, overlap=4)
    video = sample_clips(watched, model, X0, condition(1), torch.arange(1), how, 0, low)
    assert video.shape[2] == 16 and len(seen) == 3  # the first window of the first step has none
    for before, first in zip(seen, (0, 4, 8), strict=True):
        assert before.abs().max() <= 1
        torch.testing.assert_close(before[:, :, ::2], low[:, :, first // 2 : first // 2 + 4])


def test_steps_of_images_alone_reach_every_weight() -> None:
    """Or DDP would wait for those of temporal convolution."""
    net = awake(Unet3D(SSR, 24, 12))
    z, level = torch.randn(1, 3, 2, 16, 16), torch.tensor([3.0, 5.0])
    low = Low(torch.randn(1, 3, 2, 16, 16), level, torch.zeros(1, 0))
    net(z, torch.zeros(2), condition(2), 2, low=low).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    layer = awake(TemporalConv(8))
    x = torch.randn(1, 2, 2, 2, 8)
    assert torch.equal(layer(x, 2), x)


def test_noise_is_keyed_by_clip() -> None:
    rows = keyed.randn((2, 3), 0, torch.tensor([7, 8]), "x")
    assert torch.equal(rows[1:], keyed.randn((2, 3), 0, torch.tensor([8]), "x"))


@pytest.mark.parametrize(
    "how, message",
    [({"overlap": -1}, "overlap"), ({"window": 4, "overlap": 4}, "larger than overlap 4")],
)
def test_windows_that_cannot_be(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSampling(**how)


def test_a_window_holds_whole_steps_between_known_frames() -> None:
    net = awake(Unet3D(CONV, 24, 12))
    with pytest.raises(ValueError, match="window 5 is no multiple of the 2 frames"):
        sample_clips(
            net, CONV, X0, condition(2), torch.arange(2), ClipSampling(steps=1, window=5), 0,
            low_clip(CONV),
        )  # fmt: skip
