"""Super-resolution U-Nets: what they are given, and what they may see."""

import dataclasses

import pytest
import torch

from dalle2_video.models.conditioning import LowRes
from dalle2_video.models.layers import TemporalConv
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from tests.helpers.lowres import BOTH, CONV, SSR, condition, lowres_clip, lowres_input
from tests.helpers.networks import awake


@pytest.mark.parametrize("model", [CONV, SSR, BOTH], ids=["tsr", "ssr", "both"])
def test_it_starts_at_zero_and_every_parameter_learns(model) -> None:
    z, log_snr, level = torch.randn(2, 3, 8, 16, 16), torch.zeros(2), torch.tensor([9.0, 1.0])
    lowres, given = lowres_input(lowres_clip(model), level, model), condition(2)
    net = Unet3D(model, 24, 12)
    assert (net(z, log_snr, given, lowres=lowres) == 0).all()
    dropped = given._replace(
        keep_embedding=torch.tensor([True, False]), keep_text=torch.tensor([False, True])
    )
    awake(net)(z, log_snr, dropped, lowres=lowres).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without  # DDP would wait for them
    with pytest.raises(ValueError, match="takes the smaller clip"):
        net(z, log_snr, given)


def test_a_base_takes_no_smaller_clip() -> None:
    base = Unet3D(UnetConfig(image_size=16, num_frames=4, patch=2, dim=32, head_dim=16), 24, 12)
    lowres = LowRes(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="others do not"):
        base(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), condition(1), lowres=lowres)


def test_the_level_of_the_noise_is_a_condition() -> None:
    net = awake(Unet3D(SSR, 24, 12))
    z, log_snr = torch.randn(2, 3, 8, 16, 16), torch.zeros(2)
    lowres = lowres_input(lowres_clip(SSR), torch.tensor([1.0, 1.0]), SSR)
    other = lowres._replace(log_snr=torch.tensor([1.0, 8.0]))
    difference = net(z, log_snr, condition(2), lowres=lowres) - net(
        z, log_snr, condition(2), lowres=other
    )
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


def test_a_tile_is_told_where_it_is() -> None:
    """What a caption answers of a time in the clip holds in a window of it too."""
    net = awake(Unet3D(CONV, 24, 12))
    clip = lowres_clip(CONV, 1, 12)
    z, log_snr = torch.randn(1, 3, 24, 16, 16), torch.zeros(1)
    level = torch.tensor([5.0])
    whole = net(z, log_snr, condition(1), lowres=lowres_input(clip, level, CONV))
    part = net(z[:, :, 6:22], log_snr, condition(1), lowres=lowres_input(clip, level, CONV, 6, 16))
    # 7 temporal convolutions stand one after the other: 2 down, 1 in the middle, 4 up
    assert (part - whole[:, :, 6:22])[:, :, 7:9].abs().max() < 1e-5
    assert (part - whole[:, :, 6:22])[:, :, 0].abs().max() > 1e-4


def test_a_network_without_attention_runs_on_crops_like_on_the_whole() -> None:
    net = awake(Unet3D(dataclasses.replace(SSR, image_size=128, lowres_size=64), 24, 12))
    model = net.config
    clip, z, log_snr = lowres_clip(model, 1, 2), torch.randn(1, 3, 2, 128, 128), torch.zeros(1)
    lowres = lowres_input(clip, torch.tensor([5.0]), model)
    whole = net(z, log_snr, condition(1), lowres=lowres)
    crop = (slice(None),) * 3 + (slice(0, 96),) * 2  # it sees 48 px to each side
    part = net(z[crop], log_snr, condition(1), lowres=lowres._replace(frames=lowres.frames[crop]))
    assert (part - whole[crop])[..., :8, :8].abs().max() < 1e-5
    assert (part - whole[crop])[..., -1, -1].abs().max() > 1e-4  # zeros beyond its edge


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lowres_size": None}, "belong together"),
        ({"num_lowres_frames": 3}, "must be multiples of num_lowres_frames 3"),
        ({"num_lowres_frames": 0}, "num_lowres_frames\n.*greater than or equal to 1"),
        ({"lowres_size": 5}, "lowres_size 5"),
        ({"num_lowres_frames": 8}, "those of the clip itself"),
        ({"num_lowres_frames": None, "lowres_size": None, "residual": 0.1}, "residual needs"),
        ({"residual": 0.1, "self_condition": True}, "not with residual"),
    ],
)
def test_sizes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONV, **change)


def test_steps_of_images_alone_reach_every_weight() -> None:
    """Or DDP would wait for those of temporal convolution."""
    net = awake(Unet3D(SSR, 24, 12))
    z, level = torch.randn(1, 3, 2, 16, 16), torch.tensor([3.0, 5.0])
    lowres = LowRes(torch.randn(1, 3, 2, 16, 16), level, torch.zeros(1, 0))
    net(z, torch.zeros(2), condition(2), 2, lowres=lowres).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    layer = awake(TemporalConv(8))
    x = torch.randn(1, 2, 2, 2, 8)
    assert torch.equal(layer(x, 2), x)


@pytest.mark.parametrize(
    ("change", "in_time", "in_space"),
    [
        ({}, True, True),
        ({"attention": (False, True)}, True, False),  # spatial alone: time is convolved
        ({"temporal": "attention"}, True, True),  # nowhere
        ({"temporal": "attention", "attention": (False, True)}, False, False),
        ({"num_lowres_frames": None, "lowres_size": None}, False, True),  # tells no place
    ],
)
def test_what_runs_on_a_stretch_of_a_clip_and_on_crops(change, in_time, in_space) -> None:
    model = dataclasses.replace(CONV, **change)
    assert (model.is_local_in_time, model.is_local_in_space) == (in_time, in_space)


def test_both_halves_of_guidance_see_every_smaller_clip_in_order() -> None:
    lowres = LowRes(torch.randn(3, 3, 2, 4, 4), torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 2))
    twice = lowres.repeated(2)
    for both, once in zip(twice, lowres, strict=True):
        assert torch.equal(both[:3], once) and torch.equal(both[3:], once)
