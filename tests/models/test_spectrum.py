"""The layers that say the fraction of each frequency, in the network and in sampling."""

import dataclasses

import pytest
import torch
from torch import nn

from dalle2_video import keyed
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.objective import add_noise, per_sample_loss, variance_loss
from dalle2_video.diffusion.parameterization import to_x0
from dalle2_video.diffusion.samplers import ancestral
from dalle2_video.diffusion.schedule import sampler_steps
from dalle2_video.diffusion.variance import fraction_of, split_output
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.pipeline.sampling import sample_clips
from dalle2_video.pipeline.sampling_config import UnetSampling
from tests.helpers.networks import SMALL, awake, inputs

LEARNED = dataclasses.replace(SMALL, learned_variance=True)


def one_step(net: Unet3D, config: DiffusionConfig) -> None:
    """Gradients of the loss of one batch, with the variance's where there is one."""
    z, _, condition = inputs(batch=4)
    t = torch.tensor([0.001, 0.1, 0.5, 0.9])
    x0 = torch.rand_like(z) * 2 - 1
    noised = add_noise(config, x0, t, torch.randn(z.shape, generator=torch.manual_seed(3)))
    prediction, raw = split_output(net(noised.z, noised.log_snr, condition), 3)
    loss = per_sample_loss(config, prediction, noised).mean()
    if raw is not None:
        loss = loss + variance_loss(config, prediction, raw, noised, t, x0).mean()
    loss.backward()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_no_gradient_of_the_variance_reaches_the_prediction(prediction):
    """Not even through the layers that both share: the rest learns as if there were none."""
    config = DiffusionConfig(prediction=prediction, loss=prediction)
    net, plain = awake(Unet3D(LEARNED, 24, 12)), Unet3D(SMALL, 24, 12)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    for one in (net, plain):
        one_step(one, config)
    for name, parameter in plain.named_parameters():
        assert torch.equal(net.get_parameter(name).grad, parameter.grad), name
    head = [p.grad for name, p in net.named_parameters() if name.startswith("variance.")]
    assert len(head) == 6
    assert all(grad is not None and grad.any() and grad.isfinite().all() for grad in head)


def test_the_network_says_prediction_and_fraction():
    net = Unet3D(LEARNED, 24, 12)
    z, log_snr, condition = inputs()
    prediction, raw = split_output(net(z, log_snr, condition), 3)
    assert prediction.shape == raw.shape == z.shape
    assert (fraction_of(raw) == 0.5).all()
    plain, none = split_output(Unet3D(SMALL, 24, 12)(z, log_snr, condition), 3)
    assert plain.shape == z.shape and none is None
    with pytest.raises(
        ValueError, match="learned_variance is for networks without num_lowres_frames"
    ):
        dataclasses.replace(LEARNED, num_lowres_frames=2, lowres_size=16)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ancestral_sampling_takes_the_fractions_of_its_step(scale):
    """Against the sampler by hand, in the same noise."""
    torch.manual_seed(0)
    net = awake(Unet3D(LEARNED, 24, 12)).requires_grad_(False)
    nn.init.normal_(net.variance.out.weight, std=0.1)
    _, _, condition = inputs()
    how = UnetSampling(sampler="ancestral", steps=4, guidance_scale=scale)
    sample_ids, config, now = torch.arange(2), DiffusionConfig(), torch.zeros(1)

    def network(z, log_snr, given):
        prediction, _ = split_output(net(z, log_snr, given), 3)
        return to_x0("v", prediction, z, log_snr)

    def denoise(z, log_snr):
        nonlocal now
        now, plain = log_snr, network(z, log_snr, condition.dropped())
        return (plain + scale * (network(z, log_snr, condition) - plain)).clamp(-1, 1)

    def noise(i):
        return keyed.randn(LEARNED.clip_shape, 0, sample_ids, f"sample/{i}", "cpu")

    def fraction():
        return fraction_of(net.variance(now, 2, LEARNED.num_frames, 0))

    start = keyed.randn(LEARNED.clip_shape, 0, sample_ids, "sample", "cpu")
    steps = sampler_steps(config.schedule, 4)
    wanted = ancestral(denoise, start, steps, noise, fraction)
    found = sample_clips(net, LEARNED, config, condition, sample_ids, how, 0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    fixed = dataclasses.replace(how, gamma=0.5)
    other = sample_clips(net, LEARNED, config, condition, sample_ids, fixed, 0)
    assert (found - other).abs().max() > 0.01


def test_fractions_are_said_in_float32_under_autocast():
    torch.manual_seed(0)
    head = Unet3D(LEARNED, 24, 12).variance
    nn.init.normal_(head.out.weight)
    with torch.no_grad():
        wanted = head(torch.tensor([-3.0, 2.0]), 2, 4, 0)
        with torch.autocast("cpu", torch.bfloat16):
            found = head(torch.tensor([-3.0, 2.0]), 2, 4, 0)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("frames", [4, 2])
def test_fractions_of_a_clip_and_its_images(frames):
    """An image takes the mean over the frequencies of frames; of fewer frames, frequency k is that
    of k times as many.
    """
    torch.manual_seed(0)
    head = Unet3D(LEARNED, 24, 12).variance
    nn.init.normal_(head.out.weight, std=0.1)
    log_snr = torch.tensor([-3.0, 2.0, -3.0, 0.0, 2.0, 5.0])  # of two clips, and two images each
    with torch.no_grad():
        raw = head(log_snr, 2, frames, 2)
        whole, alone = head(log_snr[:2], 2, LEARNED.num_frames, 0), head(log_snr[2:], 2, 0, 2)
    side = LEARNED.image_size
    assert raw.shape == (2, 3, frames + 2, side, side)
    torch.testing.assert_close(raw[:, :, frames:], alone)
    wanted = fraction_of(whole).mean(2)
    torch.testing.assert_close(fraction_of(raw[0, :, frames]), wanted[0])
    torch.testing.assert_close(fraction_of(raw[1, :, frames]), wanted[1])
    every = LEARNED.num_frames // frames
    torch.testing.assert_close(raw[:, :, :frames], whole[:, :, ::every])
    for axis in range(5):  # they differ by noise level, and by every frequency
        assert whole.diff(dim=axis).abs().max() > 0.05
