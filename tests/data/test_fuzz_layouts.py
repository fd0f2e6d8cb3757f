"""Damage in every layout of own data: nothing escapes or hangs, good clips are the same to the bit,
and whatever is not kept is listed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.store.store import ClipStore, open_store
from tests.helpers.damage import mutated, real_video, strange
from tests.helpers.files import pack, write_files
from tests.helpers.stores import config, manifest

GOOD = [f"good/{k}" for k in range(4)]
pytestmark = pytest.mark.usefixtures("warm_workers")


def with_captions(layout: str, videos: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of one layout, with a caption for each video."""
    files = {f"{clip}.mp4": data for clip, data in videos.items()}
    if layout == "folder":
        return files | {f"{clip}.txt": f"Clip {clip}.".encode() for clip in videos}
    if layout == "table":
        rows = "".join(f"{clip}.mp4,Clip {clip}.\n" for clip in videos)
        return files | {"metadata.csv": f"file_name,text\n{rows}".encode()}
    files |= {f"{k}.json": json.dumps({"caption": f"Clip {k}."}).encode() for k in videos}
    return {
        f"{folder}.tar": pack("x.tar", {k[5:]: v for k, v in files.items() if k[:4] == folder})
        for folder in sorted({clip[:4] for clip in videos})
    }


def stored(root: Path) -> tuple[ClipStore, dict[str, np.ndarray]]:
    """The store of `root`, and the frames of its good clips."""
    made = config(root, layout=None, out=str(root) + "_out", workers=2, seconds_per_clip=20.0)
    preprocess(made, log=lambda text: None)
    store = open_store(made)
    frames = {c: store.frames([i]) for i, c in enumerate(store.clip_ids) if c in GOOD}
    return store, frames


@pytest.mark.parametrize("layout", ["folder", "table", "webdataset"])
@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_videos(tmp_path: Path, count: int, layout: str) -> None:
    draw = random.Random(count)
    good = {clip: real_video(k) for k, clip in enumerate(GOOD)}
    bad = {
        f"bad_/{k}": strange(draw) if k % 10 == 0 else mutated(real_video(k % 7), draw)
        for k in range(count)
    }
    write_files(tmp_path / "alone", with_captions(layout, good))
    write_files(tmp_path / "mixed", with_captions(layout, good | bad))
    _, alone = stored(tmp_path / "alone")
    store, mixed = stored(tmp_path / "mixed")
    assert sorted(alone) == GOOD
    assert all(np.array_equal(alone[clip], mixed[clip]) for clip in GOOD)
    listed = {item["clip"] for item in manifest(store.root)["skipped"]}
    assert listed.isdisjoint(store.clip_ids) and listed | set(store.clip_ids) == set(good | bad)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("layout", ["folder", "table", "webdataset"])
@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_mutated_archives(tmp_path: Path, count: int, layout: str) -> None:
    """Archives of every layout beside good ones, some inside another one."""
    draw = random.Random(count)
    good = {clip: real_video(k) for k, clip in enumerate(GOOD)}
    files = with_captions(layout, good)
    for k in range(count):
        name = draw.choice(("x.zip", "x.tar", "x.tar.gz"))
        inside = {f"{n}.mp4": real_video(n) for n in range(2)}
        inside |= {f"{n}.txt": b"A clip." for n in range(2)}
        data = pack(name, inside)
        if k % 3 == 0:
            data = pack(name, {f"inner{Path(name).suffix}": data, "3.mp4": real_video(3)})
        files[f"bad_{k:03d}{draw.choice(('.zip', '.tar', '.tar.gz'))}"] = mutated(data, draw)
    write_files(tmp_path / "in", files)
    store, frames = stored(tmp_path / "in")
    assert sorted(frames) == GOOD
    listed = {
        item["archive"].split("/")[0].split(".")[0] for item in manifest(store.root)["skipped"]
    }
    kept = {clip.split("/")[0] for clip in store.clip_ids}
    for k in range(count):
        assert f"bad_{k:03d}" in listed | kept, f"archive {k} is neither read nor listed"


TEXTS = {
    "metadata.csv": b'file_name,text,group\ngood/0.mp4,"A man, smiling.",a\ngood/1.mp4,Two,b\n',
    "metadata.tsv": b"file_name\ttext\ngood/0.mp4\tA man.\ngood/1.mp4\tTwo.\n",
    "metadata.jsonl": b'{"file_name": "good/0.mp4", "text": ["A man."]}\n{"file_name": "a"}\n',
    "good/0.txt": "A man.\nEin Mann läuft.\n".encode(),
    "good/0.json": b'{"caption": "A man.", "tags": ["one", "two"], "width": 3}',
}


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_tables_and_texts(tmp_path: Path, count: int) -> None:
    """Whatever a table or text becomes, the scan ends and each video is a clip or listed."""
    draw = random.Random(count)
    videos = {f"{clip}.mp4": b"x" for clip in GOOD[:2]}
    for k in range(count):
        name = draw.choice(list(TEXTS))
        data = mutated(TEXTS[name], draw) if k % 8 else draw.randbytes(draw.randrange(300))
        root = write_files(tmp_path / str(k), {**videos, name: data})
        catalogue = find_sources(root)
        clips = {member.name for source in catalogue.sources for member in source.videos.values()}
        assert clips | {problem.member for problem in catalogue.problems} >= set(videos)


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_mutated_texts_cost_their_clip_only(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    files = with_captions("folder", {clip: real_video(k) for k, clip in enumerate(GOOD)})
    for k in range(count):
        suffix = draw.choice((".txt", ".json"))
        files[f"bad_/{k}.mp4"] = real_video(k % 7)
        files[f"bad_/{k}{suffix}"] = mutated(TEXTS[f"good/0{suffix}"] * draw.choice((1, 50)), draw)
    write_files(tmp_path / "in", files)
    store, frames = stored(tmp_path / "in")
    assert sorted(frames) == GOOD
    listed = {item.get("clip") for item in manifest(store.root)["skipped"]}
    assert listed | set(store.clip_ids) >= {f"bad_/{k}" for k in range(count)}
