"""Odd files in a data folder: the good clips are stored, the rest is listed with its cause."""

import errno
import fcntl
import os
import zipfile
from io import BytesIO
from pathlib import Path

import av
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.archives import find_sources
from dalle2_video.data.store.store import ClipStore
from tests.helpers.media import captions, clip_id, grey_steps, numbers, write_video, write_zip
from tests.helpers.stores import SPLITS, config, skipped

GOOD = clip_id(1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one good clip in a zip."""
    root = tmp_path / "data"
    root.mkdir()
    write_zip(root / "good.zip", {GOOD: write_video(grey_steps(30))}, {GOOD: captions(GOOD)})
    return root


def causes(root: Path) -> dict[str, str]:
    """File -> why it was left out, of a preprocess that stores the good clip."""
    preprocess(config(root), log=lambda text: None)
    assert ClipStore.open(root, SPLITS).clip_ids == [GOOD]
    return skipped(root)


def test_links_and_devices_are_listed(root: Path) -> None:
    (root / "dangling.mp4").symlink_to("/nowhere/at/all")
    os.mkfifo(root / "pipe.mp4")
    assert causes(root) == {
        "dangling.mp4": "is a link to /nowhere/at/all, which is not there",
        "pipe.mp4": "is no plain file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_listed(root: Path) -> None:
    (root / "closed").mkdir(mode=0)
    (root / "closed.zip").touch(mode=0)
    assert causes(root) == {
        "closed": "cannot be read: Permission denied",
        "closed.zip": "cannot be read: permission denied",
    }


def test_an_unreadable_folder_is_a_problem(root: Path, monkeypatch) -> None:
    """For root, who may read everything: the error that the file system would give."""
    (root / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (problem,) = find_sources(root).problems
    assert (problem.member, problem.cause) == ("closed", "cannot be read: Permission denied")


def test_a_name_that_is_not_utf8_is_listed_escaped(root: Path) -> None:
    with open(os.fsencode(root) + b"/caf\xe9.mp4", "wb") as file:
        file.write(b"x")
    os.mkdir(os.fsencode(root) + b"/m\xfcll")
    with open(os.fsencode(root) + b"/m\xfcll/a.zip", "wb") as file:
        file.write(b"x")
    said = "its name is not UTF-8: rename it"
    assert causes(root) == {"caf\\xe9.mp4": said, "m\\xfcll/a.zip": said}
    assert causes(root), "and again"


def test_a_zip_of_windows_is_read_with_its_texts(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with zipfile.ZipFile(root / "windows.zip", "w") as packed:
        files = {f"videos/celebvtext_6/{GOOD}.mp4": write_video(grey_steps(30))}
        files |= {f"texts/{category}/{GOOD}.txt": text for category, text in captions(GOOD).items()}
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\")
            packed.writestr(info, data)
    assert causes(root) == {}


def test_archives_that_are_not_read_are_listed(root: Path) -> None:
    for name in ("a.7z", "b.rar", "c.zip.001", "d.z01", "e.tar.zst"):
        (root / name).write_bytes(b"1234")
    with zipfile.ZipFile(root / "outer.zip", "w") as packed:
        packed.writestr("inner.tar.gz", b"1234")
        packed.writestr("inner.7z", b"1234")
    found = causes(root)
    assert sorted(found) == [
        *("a.7z", "b.rar", "c.zip.001", "d.z01", "e.tar.zst", "inner.7z", "inner.tar.gz")
    ]
    assert all("unpack" in cause for cause in found.values())


@pytest.mark.parametrize("suffix", [".MP4", ".ts", ".gif", ".mpg"])
def test_other_suffixes_are_read(root: Path, suffix: str) -> None:
    (root / "good.zip").unlink()
    form = {".ts": "mpegts", ".mpg": "mpegts", ".MP4": "mp4", ".gif": "mp4"}[suffix]
    video = write_video(grey_steps(30), form=form)
    (root / "videos").mkdir()
    (root / "videos" / f"{GOOD}{suffix}").write_bytes(video)
    for category, text in captions(GOOD).items():
        (root / "texts" / category).mkdir(parents=True)
        (root / "texts" / category / f"{GOOD}.txt").write_bytes(text)
    assert causes(root) == {}


def test_the_clip_is_decoded_and_not_its_cover() -> None:
    """Two streams, of which the first is a single picture."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
        for stream, images in zip(streams, (grey_steps(1) + 250, grey_steps(12)), strict=True):
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode())
    made = decode_clip(file.getvalue(), 10.0, 8, 32)
    assert numbers(made.frames) == list(range(8))


def test_a_file_system_without_locks_is_a_warning(root: Path, monkeypatch) -> None:
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="its file system has no locks"):
        assert causes(root) == {}
