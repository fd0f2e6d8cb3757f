"""`preprocess.py check=true`: a good store passes, each kind of damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from dalle2_video.data.preprocess.check import check_store
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import END, START, Line, to_line
from dalle2_video.data.store.shard import StoreError, shard_paths
from dalle2_video.data.store.store import ClipStore
from dalle2_video.data.store.texts import write_texts
from tests.helpers.launching import ROOT
from tests.helpers.media import clip_id, write_zip
from tests.helpers.stores import clips, config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_zip(tmp_path / "a.zip", clips(1, 2, 3))
    write_zip(tmp_path / "b.zip", clips(4, 5))
    preprocess(config(tmp_path))
    return tmp_path


def test_a_whole_store_passes_and_is_described(root: Path) -> None:
    report = check_store(config(root))
    assert report.problems == [] and report.plain == [] and report.without_hash == 0
    assert (report.clips, report.shards, report.lines_per_clip) == (5, 2, 9.0)
    assert sum(report.clips_by_split.values()) == sum(report.groups_by_split.values()) == 5
    assert report.clips_by_category["emotion"] == 5
    assert "0 problems" in str(report) and "5 clips (5 windows) in 2 shards" in str(report)
    assert json.loads((root / "check.json").read_text())["clips"] == 5
    with Image.open(root / "check.png") as sheet:
        assert sheet.width > 300 and sheet.height > 5 * 100


def test_changed_frames_times_and_plain_clips_are_named(root: Path) -> None:
    with h5py.File(shard_paths(root, "a")[0], "r+") as file:
        file["frames"][1, 2, 3, 4] += 1
        file["frames"][2] = 7
        file["times"][0] = [0, 0.2, 0.1, 0.6, 0.8, np.nan]
    report = check_store(config(root))
    assert report.plain == [f"{clip_id(3)}:0"]
    named = "\n".join(report.problems)
    assert len(report.problems) == 3
    assert f"a: clip {clip_id(1)}: its time stamps do not rise" in named
    for person in (2, 3):
        assert f"a: clip {clip_id(person)}: its frames have changed on disk" in named


def test_texts_of_another_shard_are_named(root: Path) -> None:
    """Too few rows of text for the frames."""
    shard_paths(root, "a")[1].write_bytes(shard_paths(root, "b")[1].read_bytes())
    report = check_store(config(root))
    assert any(f"a: clip {clip_id(3)} cannot be read" in problem for problem in report.problems)


def test_tokens_and_texts_that_cannot_be_are_named(root: Path) -> None:
    good = to_line("he smiles")
    bad = {
        "no end": good.tokens[:-1],
        "no start": good.tokens[1:],
        "an end inside": (START, 5, END, 5, END),
        "nothing": (START, END),
        "too long": (START, *[5] * 76, END),
    }
    lines = [Line(text, tokens) for text, tokens in bad.items()]
    write_texts(shard_paths(root, "a")[1], [{"emotion": [good, *lines]}, {}, {"emotion": [good]}])
    assert check_store(config(root)).problems == [
        *(f"a: clip {clip_id(1)}: emotion: no tokens of a line: {text!r}" for text in bad),
        f"a: clip {clip_id(2)}: it has no text",
    ]


@pytest.mark.parametrize("stamps", [[0, 0.2, 0.1, 0.6, 0.8, 1.0], [0, 0.2, 0.4, 0.6, 0.8, np.inf]])
def test_time_stamps_that_cannot_be_are_named(root: Path, stamps: list[float]) -> None:
    with h5py.File(shard_paths(root, "a")[0], "r+") as file:
        file["times"][1] = stamps
    (problem,) = check_store(config(root)).problems
    assert problem.startswith(f"a: clip {clip_id(2)}: its time stamps do not rise: [0.0, 0.2")


def test_a_clip_in_no_split_is_found(root: Path, monkeypatch) -> None:
    split = ClipStore.split
    monkeypatch.setattr(ClipStore, "split", lambda s, name: split(s, name)[1:])
    assert any(problem.endswith("of 5 clips") for problem in check_store(config(root)).problems)


def test_a_leak_between_splits_is_found(root: Path, monkeypatch) -> None:
    split = ClipStore.split
    monkeypatch.setattr(
        ClipStore, "split", lambda s, name: sorted({*split(s, name), *([0, 1] if name else [])})
    )
    assert any("leaks" in problem for problem in check_store(config(root)).problems)


def test_other_settings_and_a_missing_shard(root: Path) -> None:
    assert "data asks for" in check_store(replace(config(root), fps=4.0)).problems[0]
    shard_paths(root, "b")[0].unlink()
    with pytest.raises(StoreError, match=r"b\.h5 is missing"):
        check_store(config(root))


def test_the_script_ends_with_a_status(root: Path) -> None:
    command = [sys.executable, str(ROOT / "preprocess.py"), "check=true"]
    command += [f"data.root={root}", "data.fps=5", "data.num_frames=6", "data.size=16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "0 problems" in done.stdout, done.stderr
    with h5py.File(shard_paths(root, "b")[0], "r+") as file:
        file["frames"][0] = 9
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "PROBLEM: b: clip" in done.stdout
