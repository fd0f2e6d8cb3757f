"""Animated PNG and WebP come out as the clips that videos of the same frames do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.image import decode_image
from tests.helpers.pictures import LOSSLESS, TILES, animation, saved


def shown(frames: np.ndarray) -> list[int]:
    """The numbers of `animation`'s frames."""
    return [int(frame[4, 4, 0]) // 20 for frame in frames]


@pytest.mark.parametrize("form", LOSSLESS)
def test_an_animation_is_a_video(form: str, tmp_path: Path) -> None:
    """Frames of 0.1, 0.3, 0.05 s and so on, against the rule: the last one that has begun."""
    durations = [100, 300, 50, 250, 100, 200]
    begins = np.cumsum([0, *durations[:-1]]) / 1000
    data = animation(form, durations)
    (tmp_path / "a.mp4").write_bytes(data)
    for source in (data, tmp_path / "a.mp4"):
        clip = decode_clip(source, 10.0, 10, 32)
        expected = [max(k for k in range(6) if begins[k] <= t + 1e-4) for t in np.arange(10) / 10]
        assert shown(clip.frames) == expected
        assert np.allclose(clip.timestamps, begins[expected])
        assert clip.converted == ()
    assert shown(decode_clip(data, 5.0, 2, 32, start=0.4).frames) == [2, 3]
    assert shown(decode_clip(data, 1.0, 4, 32, span="full").frames) == [0, 1, 3, 4]
    assert len(decode_clip(data, 10.0, 4, 32, windows="all").frames) == 8
    with pytest.raises(ClipError, match=r"too short: has 1\.0 s, needs 2\.0 s"):
        decode_clip(data, 10.0, 20, 32)
    with pytest.raises(ClipError, match="an animation, which is a video"):
        decode_image(data, 32)


def test_an_animation_is_as_the_same_gif() -> None:
    """GIF is read by ffmpeg: the two readers agree on frames and times."""
    durations = [100, 300, 50, 250, 100, 200]
    gif = animation("GIF", durations)
    for kind in ({}, {"span": "full"}, {"windows": "all"}):
        other = decode_clip(gif, 10.0, 4, 32, **kind)
        for form in LOSSLESS:
            clip = decode_clip(animation(form, durations), 10.0, 4, 32, **kind)
            assert np.array_equal(clip.frames, other.frames)
            assert np.allclose(clip.timestamps, other.timestamps)


@pytest.mark.parametrize("form", LOSSLESS)
def test_a_transparent_animation_is_on_black(form: str) -> None:
    clip = decode_clip(animation(form, [100] * 5, alpha=128), 10.0, 5, 32)
    assert clip.converted == ("alpha on black",)
    for k, frame in enumerate(clip.frames):
        assert np.abs(frame[4, 4].astype(int) - 20 * k * 128 / 255).max() <= 1


def test_frames_without_a_duration_last_as_in_browsers() -> None:
    clip = decode_clip(animation("PNG", [0, 0, 0]), 10.0, 3, 32)
    assert shown(clip.frames) == [0, 1, 2] and np.allclose(clip.timestamps, [0, 0.1, 0.2])


def test_the_picture_for_viewers_without_animation_is_not_shown() -> None:
    data = animation("PNG", [100] * 4, default_image=True)
    assert shown(decode_clip(data, 10.0, 3, 32).frames) == [1, 2, 3]


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_still_picture_is_no_video(form: str) -> None:
    with pytest.raises(ClipError, match="no video: a still picture"):
        decode_clip(saved(TILES, form), 10.0, 1, 32)


@pytest.mark.parametrize("form", LOSSLESS)
def test_truncated_animations(form: str) -> None:
    """All that lies before the cut of a PNG can be read; a WebP is read whole or not at all."""
    data = animation(form, [100] * 8)
    with pytest.raises(ClipError):
        decode_clip(data[: len(data) * 2 // 3], 10.0, 8, 32)
    if form == "PNG":
        assert shown(decode_clip(data[: len(data) * 2 // 3], 10.0, 3, 32).frames) == [0, 1, 2]
