"""The smaller clip of super-resolution: fitted to the larger one, its noise, known frames."""

import pytest
import torch
import torch.nn.functional as F

from dalle2_video.diffusion.lowres import augment, blend, cut, fit, known_frames
from dalle2_video.diffusion.objective import Noised, add_noise, per_sample_loss
from tests.helpers.lowres import X0


def test_each_frame_gets_the_known_one_before_and_behind_it() -> None:
    lowres = torch.arange(3.0).view(1, 1, 3, 1, 1)
    before, after = fit(lowres, (4, 1))[0, :, :, 0, 0]
    assert before.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert after.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    level = torch.tensor([20.0])
    line = blend(fit(lowres, (4, 1)), level, (4, 1))[0, 0, :, 0, 0]
    torch.testing.assert_close(line, torch.tensor([*(k / 4 for k in range(8)), 2, 2, 2, 2]))
    assert known_frames(8, (4, 1)).tolist() == [True, *[False] * 3] * 2
    assert not known_frames(8, (4, 2)).any() and not known_frames(8, (1, 2)).any()


def test_pixels_are_interpolated_bilinearly_in_each_frame() -> None:
    lowres = torch.randn(2, 3, 4, 5, 5)
    fitted = fit(lowres, (1, 3))
    for f in range(4):
        torch.testing.assert_close(
            fitted[:, :, f], F.interpolate(lowres[:, :, f], scale_factor=3, mode="bilinear")
        )
    both = fit(lowres, (2, 3))
    assert both.shape == (2, 6, 8, 15, 15)
    torch.testing.assert_close(both[:, :3, ::2], fitted)


@pytest.mark.parametrize("upscale", [(4, 1), (1, 2), (2, 2)])
def test_a_tile_of_the_fitted_clip_is_that_part_of_the_whole(upscale) -> None:
    lowres = torch.randn(1, 3, 6, 4, 4)
    whole = fit(lowres, upscale)
    for first in range(0, 5 * upscale[0], upscale[0]):
        part = fit(lowres, upscale, first, upscale[0])
        assert torch.equal(part, whole[:, :, first : first + upscale[0]])


def test_the_noise_on_the_smaller_clip_has_its_log_snr() -> None:
    torch.manual_seed(0)
    lowres, noise = torch.randn(2, 2, 100_000).unsqueeze(-1).unsqueeze(-1)[:, :, None].unbind()
    out = augment(lowres[None], torch.tensor([1.1]), noise[None])
    signal = (out * lowres).mean() / lowres.square().mean()
    rest = (out - signal * lowres).square().mean()
    assert signal.item() == pytest.approx(0.866, abs=0.005)  # SNR 3 at log-SNR 1.1 (Imagen Video)
    assert rest.sqrt().item() == pytest.approx(0.5, abs=0.005)


def test_known_frames_do_not_count_in_the_loss() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, 5)
    noised = add_noise(X0, x0, torch.tensor([0.3, 0.8]), eps)
    given = known_frames(4, (2, 1))
    prediction = torch.randn_like(x0)
    loss = per_sample_loss(X0, prediction, noised, given)
    rest = Noised(noised.z[:, :, 1::2], noised.log_snr, noised.target[:, :, 1::2])
    torch.testing.assert_close(loss, per_sample_loss(X0, prediction[:, :, 1::2], rest))


def test_a_crop_begins_at_its_clips_own_frame_row_and_column() -> None:
    video = torch.arange(2 * 6 * 7 * 8.0).view(2, 1, 6, 7, 8)
    first, second = cut(video, [(1, 2, 3), (0, 4, 1)], (2, 3, 4))
    assert torch.equal(first, video[0, :, 1:3, 2:5, 3:7])
    assert torch.equal(second, video[1, :, 0:2, 4:7, 1:5])


def test_a_noisy_smaller_clip_is_shrunk_to_the_best_linear_guess() -> None:
    """E[x | alpha x + sigma e] is alpha times the noisy value where x has variance 1."""
    torch.manual_seed(0)
    lowres, level = torch.randn(1, 1, 1, 200, 200), torch.tensor([0.5])
    noisy = augment(lowres, level, torch.randn_like(lowres))
    guess = blend(noisy, level, (1, 1))
    best = (noisy * lowres).sum() / noisy.square().sum() * noisy
    torch.testing.assert_close(guess, best, atol=0.05, rtol=0)
