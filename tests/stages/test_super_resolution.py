"""Super-resolution in training: crops of clips and their smaller clips."""

import pytest
import torch

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float
from dalle2_video.diffusion.lowres import cut, fit
from dalle2_video.pipeline.super_resolution import SuperResolution
from dalle2_video.stages.super_resolution import crop_of, draw_corners, draw_lowres
from dalle2_video.training.stage import StepInfo
from tests.helpers.lowres import BOTH, CONV, SSR


def stored(batch: int = 3) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (batch, 16, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("model", [CONV, SSR, BOTH], ids=["tsr", "ssr", "both"])
def test_a_part_and_its_smaller_clip_belong_together(model) -> None:
    """8 frames of 16 px from stored 16 of 32; windows of 4 frames, crops of 8 px."""
    frames, sample_ids = stored(), torch.tensor([5, 6, 7])
    whole, part = (8, 16), (4, 8)
    corners = draw_corners(whole, part, model.upscale, 0, sample_ids, "x")
    for corner in corners:
        assert all(0 <= place <= 16 - 8 for place in corner[1:]) and 0 <= corner[0] <= 4
        assert corner[0] % model.upscale[0] == 0
        assert corner[1] % model.upscale[1] == corner[2] % model.upscale[1] == 0
    assert corners[1:] == draw_corners(whole, part, model.upscale, 0, sample_ids[1:], "x")
    drawn = {
        draw_corners(whole, part, model.upscale, 0, torch.tensor([i]), "x")[0] for i in range(99)
    }
    assert len(drawn) > 20
    x0 = crop_of(frames, whole, corners, part)
    torch.testing.assert_close(x0, cut(to_float(frames, *whole), corners, (4, 8, 8)))
    step = StepInfo(sample_ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    lowres = draw_lowres(
        frames, SuperResolution(model), (30.0, 30.0), corners, part, step, sample_ids, "x"
    )
    small = to_float(frames, model.num_lowres_frames, model.lowres_size)
    expected = cut(fit(small, model.upscale), corners, (4, 8, 8))
    torch.testing.assert_close(lowres.frames, expected, atol=1e-4, rtol=0)
    if model is CONV:  # known frames are the frames themselves
        torch.testing.assert_close(lowres.frames[:, :3, ::2], x0[:, :, ::2], atol=1e-4, rtol=0)


def test_levels_of_noise_are_even_and_keyed() -> None:
    frames, sample_ids = stored(1).expand(64, -1, -1, -1, -1), torch.arange(64)
    corners = [(0, 0, 0)] * 64
    step = StepInfo(sample_ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    lowres = draw_lowres(
        frames, SuperResolution(SSR), (1.0, 9.0), corners, (8, 16), step, sample_ids, "x"
    )
    assert lowres.log_snr.min() < 2 and lowres.log_snr.max() > 8
    assert lowres.log_snr.mean().item() == pytest.approx(5, abs=1)
    again = draw_lowres(
        frames[:2],
        SuperResolution(SSR),
        (1.0, 9.0),
        corners[:2],
        (8, 16),
        step,
        sample_ids[40:42],
        "x",
    )
    assert torch.equal(again.log_snr, lowres.log_snr[40:42])
    assert torch.equal(again.frames, lowres.frames[40:42])


def test_a_crop_is_told_its_place_in_the_clip() -> None:
    noisy, level = torch.randn(2, 3, 4, 16, 16), torch.tensor([1.0, 2.0])
    lowres = SuperResolution(CONV).crops(noisy, level, [(0, 0, 0), (4, 8, 0)], (4, 8))
    assert lowres.place.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(lowres.log_snr, level)
    assert torch.equal(lowres.frames[1, :3, 0], noisy[1, :, 2, 8:, :8])


def test_rows_columns_and_noise_are_drawn_apart() -> None:
    corners = draw_corners((8, 16), (4, 8), (1, 1), 0, torch.arange(400), "x")
    for axis, most in enumerate((4, 8, 8)):
        drawn = [corner[axis] for corner in corners]
        assert set(drawn) == set(range(most + 1)), "every place is drawn, the last one too"
    assert any(row != column for _, row, column in corners)
    frames, ids = stored(2), torch.tensor([5, 6])
    step = StepInfo(ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    whole = [(0, 0, 0)] * 2
    task = SuperResolution(SSR)
    found = draw_lowres(frames, task, (-30.0, -30.0), whole, (8, 16), step, ids, "x")
    noise = keyed.randn((3, 8, 8, 8), 0, ids, "x/low")  # nothing else is left at this level
    torch.testing.assert_close(found.frames, fit(noise, SSR.upscale), atol=1e-4, rtol=1e-4)


def test_an_image_has_a_smaller_image() -> None:
    """In joint training: one frame, with noise of its own level."""
    frames, ids = stored(2)[:, :1], torch.tensor([5, 6])
    step = StepInfo(ids, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    task, corners = SuperResolution(SSR), [(0, 0, 8), (0, 4, 0)]
    found = draw_lowres(frames, task, (30.0, 30.0), corners, (1, 8), step, ids, "x")
    small = fit(to_float(frames, 1, 8), SSR.upscale)
    torch.testing.assert_close(found.frames, cut(small, corners, (1, 8, 8)), atol=1e-4, rtol=0)
    assert found.log_snr.tolist() == [30, 30]
