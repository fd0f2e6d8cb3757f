"""Damaged downloads by the hundred: the run ends well, each is kept or listed, good ones are the
same as without them, and nothing is written outside the store.
"""

from __future__ import annotations

import random
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.store.store import open_store
from tests.helpers.damage import mutated, real_video, strange
from tests.helpers.media import captions, clip_id, write_zip
from tests.helpers.stores import config, manifest, tree

GOOD = range(900, 906)
pytestmark = pytest.mark.usefixtures("warm_workers")


STORES = {
    "first, raw": {},
    "all, h264": {"windows": "all", "encoding": "h264", "num_frames": 3},
    "full, raw": {"span": "full"},
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_videos(tmp_path: Path, count: int, store: str) -> None:
    draw = random.Random(count)
    good = {clip_id(person): real_video(person) for person in GOOD}
    write_zip(tmp_path / "alone" / "a.zip", good)
    bad = {}
    for k in range(count):
        name = clip_id(k)
        bad[name] = strange(draw) if k % 10 == 0 else mutated(real_video(k % 7), draw)
    write_zip(tmp_path / "in" / "a.zip", dict(sorted((good | bad).items())))

    limits = {"workers": 2, "seconds_per_clip": 20.0}
    alone = config(tmp_path / "alone", out=str(tmp_path / "alone_out"), **STORES[store])
    mixed = config(tmp_path / "in", out=str(tmp_path / "out"), **STORES[store], **limits)
    preprocess(alone)
    preprocess(mixed)
    one, many = open_store(alone), open_store(mixed)
    assert sorted(set(one.clip_ids)) == sorted(good)
    place = {many.key(clip): clip for clip in range(len(many))}
    for clip in range(len(one)):
        other = place[one.key(clip)]
        assert np.array_equal(one.stored(clip), many.stored(other))
        assert one.lines(clip) == many.lines(other)
    listed = {item["clip"] for item in manifest(tmp_path / "out")["skipped"]}
    assert listed.isdisjoint(many.clip_ids) and listed | set(many.clip_ids) == set(good) | set(bad)
    assert len(listed) > count / 4
    for item in manifest(tmp_path / "out")["skipped"]:
        assert item["file"] and item["cause"]


def archive(k: int, draw: random.Random) -> tuple[str, bytes]:
    """(suffix, bytes) of an archive with two good clips, damaged in one way or another."""
    clips = {clip_id(k, n): real_video(n) for n in range(2)}
    file, tar = BytesIO(), k % 3 == 2
    members = [(f"videos/celebvtext_6/{name}.mp4", data) for name, data in clips.items()]
    for name in clips:
        members += [(f"texts/{folder}/{name}.txt", text) for folder, text in captions(name).items()]
    if k % 5 == 0:
        members += [(f"../../{clip_id(k, 7)}.mp4", real_video(0)), (f"/{clip_id(k, 8)}.mp4", b"x")]
    if k % 7 == 0:
        members.append(members[0])
    if tar:
        with tarfile.open(fileobj=file, mode=draw.choice(("w:", "w:gz"))) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))
            link = tarfile.TarInfo(f"videos/celebvtext_6/{clip_id(k, 9)}.mp4")
            link.type, link.linkname = (
                draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
                "/etc/passwd",
            )
            archive.addfile(link)
    else:
        with zipfile.ZipFile(file, "w", draw.choice((0, 8)), strict_timestamps=False) as packed:
            for name, data in members:
                packed.writestr(zipfile.ZipInfo(name), data)
            if k % 4 == 0:  # 20 MB of zeros in 20 kB
                packed.writestr(f"videos/x/{clip_id(k, 6)}.mp4", bytes(20_000_000), 8)
    data = file.getvalue()
    suffix = draw.choice((".zip", ".tar", ".tar.gz"))  # often the wrong one
    return suffix, mutated(data, draw) if k % 4 else data


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_mutated_archives(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    root = tmp_path / "deep" / "in"
    good = {clip_id(person): real_video(person) for person in GOOD}
    write_zip(root / "good.zip", good)
    for k in range(count):
        suffix, data = archive(k, draw)
        (root / f"bad_{k:03d}{suffix}").write_bytes(data)
    before = tree(tmp_path)
    made = config(root, out=str(tmp_path / "out"), workers=2, seconds_per_clip=20.0)
    preprocess(made)
    outside = {name for name in tree(tmp_path) if not name.startswith("out/")}
    assert outside == set(before), "nothing is written outside the store"
    store = open_store(made)
    assert set(good) <= set(store.clip_ids)
    names = {clip.split("_")[1][:4] for clip in store.clip_ids}
    listed = [item["archive"] for item in manifest(tmp_path / "out")["skipped"]]
    for k in range(count):
        told = any(name.startswith(f"bad_{k:03d}") for name in listed) or f"{k:04d}" in names
        assert told, f"archive {k} is neither read nor listed"
