"""The page "Your own videos" of docs/data.md, followed to the letter on phone videos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import preprocess
import sample
import train_clip
import train_decoder
import train_prior
from dalle2_video.cli import compose
from dalle2_video.data.store.store import ClipStore
from tests.helpers.documents import commands_of, lines_of
from tests.helpers.launching import ROOT
from tests.helpers.media import grey_steps, set_display_matrix, write_video
from tests.helpers.stores import manifest

PAGE, SECTION = "docs/data.md", "Your own videos"
SCRIPTS = {
    "preprocess.py": preprocess,
    "train_clip.py": train_clip,
    "train_prior.py": train_prior,
    "train_decoder.py": train_decoder,
    "sample.py": sample,
}
# Seconds on a CPU; the page says how to do without a pretrained text tower.
TINY = [
    *("clip.model.text.name=null", "clip.model.text.weights=null", "clip.model.text.width=32"),
    *("clip.model.text.layers=1", "clip.model.text.heads=2", "clip.model.embed_dim=16"),
    *("clip.model.video.width=32", "clip.model.video.heads=2", "clip.model.video.spatial_layers=1"),
    *("clip.model.video.temporal_layers=1", "clip.model.video.image_size=16"),
    *("prior.model.width=32", "prior.model.layers=1", "prior.model.heads=2"),
    *(
        "unets.base.model.dim=16",
        "unets.base.model.mults=[1,1,1,1]",
        "unets.base.model.head_dim=16",
    ),
    *("unets.base.model.cond_dim=32", "unets.base.model.image_size=16"),
    *("unets.base.model.num_frames=4", "clip.model.video.num_frames=4", "sample.steps=2"),
    *(
        f"{stage}.train.{key}"
        for stage in ("clip", "prior", "unets.base")
        for key in ("batch_size=4", "clips=8", "warmup_clips=0", "workers=0")
    ),
]


@pytest.fixture
def my_videos(tmp_path: Path) -> Path:
    """20 videos, upright by a display matrix, of 3 to 5 s, with a line of text each."""
    root = tmp_path / "my_videos"
    (root / "trip").mkdir(parents=True)
    for k in range(20):
        video = write_video(
            grey_steps(90 + 3 * k, 48, 64, step=2), fps=30, form="mov" if k % 2 else "mp4"
        )
        name = f"trip/VID_{k:04d}" if k % 3 else f"IMG_{k:04d}"
        turned = video if k % 2 else set_display_matrix(video, 0, 1, -1, 0)
        (root / f"{name}{'.MOV' if k % 2 else '.mp4'}").write_bytes(turned)
        (root / f"{name}.txt").write_text(f"A cat sleeps on chair number {k}.")
    return root


def typed() -> list[list[str]]:
    """The commands of the page, in order, as the words after `python` or `accelerate launch`."""
    places = {line.place for line in lines_of(PAGE) if line.section == SECTION and line.code}
    found = [list(words) for place, words in commands_of(PAGE) if place in places]
    return [words[words.index(next(w for w in words if w in SCRIPTS)) :] for words in found]


def test_the_page(my_videos: Path, monkeypatch, tmp_path: Path) -> None:
    commands = typed()
    assert [words[0] for words in commands] == list(SCRIPTS)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / commands[0][0]), *commands[0][1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "read as data.layout=folder" in done.stdout and ": 20 clips in 1 shards" in done.stdout
    (following,) = (line for line in done.stdout.splitlines() if line.startswith("next: "))
    assert following.split()[2:-1] == commands[1][:-1], "the page and the script say the same"
    store = ClipStore.open(my_videos, {"train": 0.9, "val": 0.1})
    assert store.split("val") and not manifest(my_videos)["skipped"]
    for name, *overrides in commands[1:]:
        SCRIPTS[name].main(compose(*overrides, *TINY))
    (written,) = (tmp_path / "runs" / "mine" / "samples").rglob("*.mp4")
    assert written.stat().st_size > 0
