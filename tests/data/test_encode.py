"""Frames to H.264: what comes back, the same bytes for the same frames, what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.encode import encode_mp4
from tests.helpers.media import PATCHES, grey_steps, numbers, patch_colours


def test_encode_and_decode_keep_frames_colours_and_tags(tmp_path: Path) -> None:
    still = np.kron(PATCHES, np.ones((16, 16, 1), np.uint8))
    frames = np.stack([np.roll(still, 16 * (k % 4), axis=1) for k in range(8)])
    path = tmp_path / "new" / "clip.mp4"
    encode_mp4(path, torch.from_numpy(frames), 8.0, crf=8)
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert container.streams.video[0].average_rate == 8
    clip = decode_clip(path, 8.0, 8, 64)
    assert np.allclose(clip.timestamps, np.arange(8) / 8)
    for got, sent in zip(clip.frames, frames, strict=True):
        assert np.abs(patch_colours(got) - sent[::16, ::16].astype(float)).max() <= 5
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a page can start to play at once


ENCODE = """
import hashlib
import numpy as np
from dalle2_video.data.media.encode import encode_window
draw = np.random.default_rng(0)
for size in (16, 64, 64, 128):
    first = np.kron(draw.integers(0, 256, (size // 2, size // 2, 3)), np.ones((2, 2, 1)))
    frames = np.stack([np.roll(first, k, 1) for k in range(3)]).astype(np.uint8)
    print(hashlib.sha256(encode_window(frames, 5.0).tobytes()).hexdigest())
"""


def test_the_same_frames_make_the_same_bytes_whatever_the_memory_held() -> None:
    found = set()
    for value in ("1", "165"):  # what glibc writes into memory as it is handed out
        environment = os.environ | {"MALLOC_PERTURB_": value}
        command = [sys.executable, "-c", ENCODE]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(made.stdout)
    assert len(found) == 1
    assert len(set(found.pop().split())) == 4


def test_encode_into_memory_and_what_cannot_be_encoded(tmp_path: Path) -> None:
    file = io.BytesIO()
    encode_mp4(file, grey_steps(6), 29.97)
    assert numbers(decode_clip(file.getvalue(), 29.97, 6, 32).frames) == list(range(6))
    with pytest.raises(ValueError, match="even sides"):
        encode_mp4(tmp_path / "odd.mp4", grey_steps(4, 33, 32), 8.0)
    with pytest.raises(ValueError, match="uint8"):
        encode_mp4(tmp_path / "float.mp4", grey_steps(4).astype(np.float32), 8.0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_encode_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_mp4(path, grey_steps(4), 8.0)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
