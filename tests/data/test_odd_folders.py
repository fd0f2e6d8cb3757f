"""Odd files in a data folder: the good clips are stored, the rest is listed with its cause."""

import errno
import fcntl
import json
import os
import tarfile
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import av
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.find import find_sources
from dalle2_video.data.store.store import ClipStore
from tests.helpers.files import pack
from tests.helpers.media import captions, clip_id, grey_steps, numbers, write_video, write_zip
from tests.helpers.stores import SPLITS, config, manifest, skipped, tree

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
        packed.writestr("inner.7z", b"1234")
    found = causes(root)
    assert sorted(found) == ["a.7z", "b.rar", "c.zip.001", "d.z01", "e.tar.zst", "inner.7z"]
    assert all("unpack" in cause for cause in found.values())


@pytest.mark.parametrize("outer", ["outer.zip", "outer.tar", "outer.tar.gz"])
@pytest.mark.parametrize("inner", ["inner.zip", "inner.tar", "inner.tgz"])
def test_an_archive_inside_an_archive_is_read(tmp_path: Path, outer: str, inner: str) -> None:
    """And one inside that; nothing of the copies stays."""
    root = tmp_path / "data"
    files = {f"videos/{GOOD}.mp4": write_video(grey_steps(30))}
    files |= {f"texts/{name}/{GOOD}.txt": text for name, text in captions(GOOD).items()}
    packed = pack(inner, files)
    (root / "a").mkdir(parents=True)
    (root / "a" / outer).write_bytes(pack(outer, {f"b/{inner}": packed, "c/broken.zip": b"1234"}))
    before = tree(root)
    found = causes(root)
    assert list(found) == [""] and found[""].startswith("no whole archive: ")
    assert {item["archive"] for item in manifest(root)["skipped"]} == {f"a/{outer}/c/broken.zip"}
    index = json.loads((root / "index" / "a__outer__b__inner.json").read_text())
    assert index["archive"] == f"a/{outer}/b/{inner}"
    assert not list(root.glob(".nested*")) and before.items() <= tree(root).items()
    (root / "a" / outer).unlink()
    (root / "deep.zip").write_bytes(pack("x.zip", {outer: pack(outer, {inner: packed})}))
    assert preprocess(config(root, out=str(tmp_path / "deep"))).clips == 1


def test_a_bomb_of_archives_ends(root: Path) -> None:
    data = b""
    for depth in range(6):
        data = pack("x.zip", {f"{depth}-{k}.zip": data for k in range(4)})
    (root / "bomb.zip").write_bytes(data)
    found = causes(root)
    assert set(found.values()) == {"an archive inside an archive: unpack the outer one"}


@pytest.mark.parametrize("outer", ["x.zip", "x.tar", "x.tar.gz"])
def test_no_room_for_the_copy_of_an_inner_archive(root: Path, outer: str, monkeypatch) -> None:
    """A bomb, or a small disk: it is listed before anything is copied."""
    (root / outer).write_bytes(pack(outer, {"inner.zip": bytes(5000)}))
    monkeypatch.setattr("dalle2_video.data.sources.listing.ROOM", 1e-12)
    said = "an archive of 0.0 GB inside an archive: no room for a copy"
    assert causes(root) == {"inner.zip": said}


def test_the_last_member_of_a_name_is_used(tmp_path: Path) -> None:
    """As unpacking would leave it; the manifest lists the other one."""
    root = tmp_path / "data"
    root.mkdir()
    videos = [write_video(grey_steps(30, step=step)) for step in (2, 5)]
    for name in ("a.zip", "a.tar", "a.tgz"):
        path = root / name
        with BytesIO() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "a.zip":
                with zipfile.ZipFile(file, "w") as packed:
                    for video in videos:
                        packed.writestr(f"videos/{GOOD}.mp4", video)
                    for category, text in captions(GOOD).items():
                        packed.writestr(f"texts/{category}/{GOOD}.txt", text)
            else:
                with tarfile.open(fileobj=file, mode="w" if name == "a.tar" else "w:gz") as tar:
                    members = [(f"videos/{GOOD}.mp4", video) for video in videos]
                    members += [(f"texts/{c}/{GOOD}.txt", t) for c, t in captions(GOOD).items()]
                    for member, data in members:
                        info = tarfile.TarInfo(member)
                        info.size = len(data)
                        tar.addfile(info, BytesIO(data))
            path.write_bytes(file.getvalue())
        made = config(root, out=str(tmp_path / name))
        preprocess(made, log=lambda text: None)
        assert skipped(tmp_path / name) == {
            f"videos/{GOOD}.mp4": "a second member of the same name follows it"
        }
        frames = ClipStore.open(tmp_path / name, SPLITS).frames([0])[0]
        assert numbers(frames, step=5) == [0, 2, 4, 6, 8, 10]
        path.unlink()


def test_another_content_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    """And a copy of the same content, with new dates, is not made again."""
    root = tmp_path / "data"
    text = root / "texts" / "emotion" / f"{GOOD}.txt"
    video = root / "videos" / f"{GOOD}.mp4"
    for path in (text, video):
        path.parent.mkdir(parents=True)
    text.write_bytes(b"She is happy.\n")
    first, second = (write_video(grey_steps(30, step=step)) for step in (2, 3))
    size = max(len(first), len(second)) + 16

    def padded(data: bytes) -> bytes:
        """Padded to `size` bytes with an mp4 box that holds nothing."""
        rest = size - len(data)
        return data + rest.to_bytes(4, "big") + b"free" + bytes(rest - 8)

    video.write_bytes(padded(first))
    made = config(root, out=str(tmp_path / "store"))
    assert preprocess(made).made == 1
    for path in (text, video):
        os.utime(path, (1, 1))
    said = []
    assert preprocess(made, log=said.append).made == 0 and not said
    text.write_bytes(b"She is sorry.\n")
    assert preprocess(made, log=said.append).made == 1 and "has changed" in said[0]
    assert ClipStore.open(made.store, SPLITS).lines(0)["emotion"][0].text == "She is sorry."
    video.write_bytes(padded(second))
    assert preprocess(made, log=said.append).made == 1
    assert numbers(ClipStore.open(made.store, SPLITS).frames([0])[0], step=3)[-1] == 10


def test_a_shard_of_older_code_is_taken_as_it_is(root: Path) -> None:
    preprocess(config(root))
    path = root / "index" / "good.json"
    index = json.loads(path.read_text())
    older = {k: v for k, v in index.items() if k not in ("stamp", "content")}
    path.write_text(json.dumps(older))
    assert preprocess(config(root), log=pytest.fail).made == 0
    assert json.loads(path.read_text()) == index, "and knows its content from now on"


def test_names_too_long_when_joined(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k in range(2):
        folder = root.joinpath(*["ä" * 100] * 3, f"{k}")
        folder.mkdir(parents=True)
        (folder / f"{clip_id(k)}.mp4").write_bytes(write_video(grey_steps(30)))
        (folder / "emotion").mkdir()
        (folder / "emotion" / f"{clip_id(k)}.txt").write_bytes(b"She is happy.\n")
    assert preprocess(config(root)).clips == 2
    assert sorted(ClipStore.open(root, SPLITS).clip_ids) == [clip_id(0), clip_id(1)]


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
