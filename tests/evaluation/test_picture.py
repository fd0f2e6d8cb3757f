"""The animated picture of samples."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_video.evaluation.picture import BACKGROUND, GAP, save_animation
from tests.helpers.launching import ENVIRONMENT, ROOT


def test_all_clips_play_at_once_above_their_captions(tmp_path: Path) -> None:
    shades = np.array([[30, 90, 150], [200, 120, 60], [10, 250, 130]], np.uint8)
    clips = [np.broadcast_to(s[:, None, None, None], (3, 8, 8, 3)).copy() for s in shades]
    path = tmp_path / "a.webp"
    save_animation(path, clips, ["A man.", "A woman nods, then smiles widely.", "x"], 2, 64)
    with Image.open(path) as picture:
        assert picture.n_frames == 3 and picture.info["loop"] == 0
        for number in range(3):
            picture.seek(number)
            frame = np.asarray(picture.convert("RGB")).astype(int)
            assert picture.info["duration"] == 125
            first, second = frame[GAP + 32, GAP + 32], frame[GAP + 32, 2 * GAP + 64 + 32]
            assert abs(first - shades[0, number]).max() < 4
            assert abs(second - shades[1, number]).max() < 4
            assert abs(frame[-GAP // 2, GAP // 2] - BACKGROUND).max() < 4
            assert frame[GAP + 64 : GAP + 64 + 30, GAP : GAP + 64].min() < 120, "a caption"


def test_a_wrong_folder_or_clip_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('["a"]')
    (tmp_path / "clips" / "ssr").mkdir(parents=True)
    (tmp_path / "clips" / "ssr" / "0000.mp4").touch()
    for folder, line in (
        ("nowhere", "no such file or directory"),
        (str(tmp_path), "--clips 7: must be numbers from 0 to 0"),
    ):
        command = [sys.executable, "-m", "dalle2_video.evaluation.picture", folder, "--clips", "7"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr
