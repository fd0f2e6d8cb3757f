"""The report's page: its table, a player of each clip by each U-Net, and all clips in one file."""

from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.evaluation.page import grid, read_mp4, write_page
from dalle2_video.evaluation.summary import Row

PLACE = {"commit": "1234abc", "hardware": "2 cores, <fast>"}


def test_every_clip_has_a_player_of_each_unet_under_its_caption(tmp_path: Path) -> None:
    for i in range(3):
        for unet, frames, size in (("base", 8, 32), ("ssr", 16, 64)):
            clip = np.full((frames, size, size, 3), 60 * i + 40, np.uint8)
            encode_mp4(tmp_path / "clips" / unet / f"{i:04d}.mp4", clip, frames / 2)
    rows = [Row("prior", 1.25, "cosine < 1", "0.40")]
    write_page(tmp_path, ["a <b> man", "second", "third"], rows, PLACE, ("base", "ssr"))
    page = (tmp_path / "index.html").read_text()
    players = page.split("<figure>")[1:]
    for i, (player, caption) in enumerate(
        zip(players, ("a &lt;b&gt; man", "second", "third"), strict=True)
    ):
        assert caption in player
        base, ssr = (player.index(f'src="clips/{u}/{i:04d}.mp4"') for u in ("base", "ssr"))
        assert base < ssr and player.count("<video") == 2
    assert "<td>prior<td>1.2<td>cosine &lt; 1<td>0.40" in page
    assert "1234abc" in page and "&lt;fast&gt;" in page
    frames, fps = read_mp4(tmp_path / "samples.mp4")  # the last U-Net's, each at twice its size
    assert frames.shape == (16, 256, 256, 3) and fps == 8
    means = [frames[:, y : y + 128, x : x + 128].mean() for y in (0, 128) for x in (0, 128)]
    assert means == pytest.approx([40, 100, 160, 0], abs=3)


def test_a_caption_without_a_clip_is_an_error(tmp_path: Path) -> None:
    encode_mp4(tmp_path / "clips" / "base" / "0000.mp4", np.zeros((2, 16, 16, 3), np.uint8), 4)
    with pytest.raises(ValueError, match="longer"):
        write_page(tmp_path, ["one", "two"], [], PLACE, ("base",))


def test_clips_of_an_earlier_larger_evaluation_are_left_out(tmp_path: Path) -> None:
    for i in range(3):  # larger than 128 px are not made smaller
        clip = np.full((2, 160, 160, 3), 60 * i + 40, np.uint8)
        encode_mp4(tmp_path / "clips" / "base" / f"{i:04d}.mp4", clip, 4)
    write_page(tmp_path, ["one"], [], PLACE, ("base",))
    assert (tmp_path / "index.html").read_text().count("<video") == 1
    frames, _ = read_mp4(tmp_path / "samples.mp4")
    assert frames.shape == (2, 160, 160, 3) and abs(frames.mean() - 40) < 3


def test_grid_places_every_clip() -> None:
    clips = np.arange(1, 4, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (3, 2, 4, 6, 3), np.uint8
    )
    tiled = grid(clips)
    assert tiled.shape == (2, 8, 12, 3)
    assert (tiled[:, :4, :6] == 1).all() and (tiled[:, :4, 6:] == 2).all()
    assert (tiled[:, 4:, :6] == 3).all() and (tiled[:, 4:, 6:] == 0).all()
