"""Kinds of files that people's disks hold, each beside a good clip: read, or listed with a cause.

Folders and archives: test_odd_folders.py. Layouts: test_layouts.py.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest

from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.store.store import ClipStore
from tests.helpers.files import pack, write_files
from tests.helpers.media import grey_steps, numbers, write_video
from tests.helpers.stores import SPLITS, config, manifest, skipped

VIDEO = write_video(grey_steps(30))
TEXT = b"A cat."


def made(tmp_path: Path, files: dict[str, bytes], prepare: Callable[[Path], object] | None = None):
    """(clip -> captions, file -> cause, the store) of a folder with a good clip and these files."""
    root = write_files(tmp_path / "data", {"good.mp4": VIDEO, "good.txt": TEXT, **files})
    if prepare:
        prepare(root)
    out = tmp_path / "store"
    preprocess(config(root, layout=None, out=str(out)), log=lambda text: None)
    store = ClipStore.open(out, SPLITS)
    texts = {
        clip: [line.text for lines in store.lines(i).values() for line in lines]
        for i, clip in enumerate(store.clip_ids)
    }
    assert texts.pop("good") == ["A cat."]
    good = store.frames([store.clip_ids.index("good")])[0]
    assert numbers(good) == [0, 2, 4, 6, 8, 10]
    return texts, skipped(out), store


def sound() -> bytes:
    """An mp4 that holds sound alone."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


VIDEOS = {
    "empty": (b"", "an empty file"),
    "sound alone": (sound(), "has no video stream"),
    "one frame": (write_video(grey_steps(1)), "too short"),
    "a text": (b"this is no video" * 99, "no video, or truncated"),
    "a zip": (pack("x.zip", {"a": b"b"}), "no video, or truncated"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\ngood.mp4\n", "no video, or truncated"),
    "a matroska": (write_video(grey_steps(30), form="matroska"), ""),
    "an avi": (write_video(grey_steps(30), form="avi"), ""),
    "1 x 1 px": (write_video(grey_steps(30, 2, 2)), ""),
    "a strip": (write_video(grey_steps(30, 2, 512)), ""),
    "1000 frames per second": (write_video(grey_steps(250, 16, 16, 1), fps=200), ""),
    "slow": (write_video(grey_steps(3), [0, 1, 2], fps=1), ""),
    "late": (write_video(grey_steps(30), [5 + k / 10 for k in range(30)]), ""),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_video_that_is_none_or_odd(tmp_path: Path, kind: str) -> None:
    data, cause = VIDEOS[kind]
    texts, causes, _ = made(tmp_path, {"odd.mp4": data, "odd.txt": b"Odd."})
    assert bool(cause) != ("odd" in texts)
    if cause:
        assert causes.pop("odd.mp4").startswith(cause)
    assert causes == {}


TEXTS = {
    "empty": (b"", []),
    "blank": (b" \r\n\t\n", []),
    "a mark alone": (b"\xef\xbb\xbf", []),
    "line ends of DOS": (b"One.\r\nTwo.\r\n", ["One.", "Two."]),
    "line ends of old Macs": (b"One.\rTwo.", ["One.", "Two."]),
    "utf-16": ("A man.".encode("utf-16"), []),
    "latin-1": ("Ein Mann läuft.".encode("latin1"), []),
    "gbk": ("一个男人".encode("gbk"), []),
    "nul bytes": (b"A\0man.", ["Aman."]),
    "html": (b"A &amp; B", ["A & B"]),
    "a token of the tower": (b"A <end_of_text> man", ["A < end_of_text > man"]),
    "symbols": ("🙂 שלום".encode(), ["🙂 שלום"]),
    "invisible": ("\u200b\u202e".encode(), []),
    "a film": (b"\0" * (3 << 20), []),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_in_any_state(tmp_path: Path, kind: str) -> None:
    data, lines = TEXTS[kind]
    texts, causes, store = made(tmp_path, {"odd.mp4": VIDEO, "odd.txt": data})
    assert texts == ({"odd": lines} if lines else {})
    if not lines:
        assert causes == {"odd.mp4": "without text: no category has a usable file"}
        (note,) = manifest(store.root)["texts_left_out"]
        assert note["file"] == "odd.txt" and note["cause"]


def test_a_very_long_caption_reaches_the_model_whole(tmp_path: Path) -> None:
    words = [f"word{k}" for k in range(2000)]
    texts, causes, _ = made(tmp_path, {"odd.mp4": VIDEO, "odd.txt": " ".join(words).encode()})
    assert " ".join(texts["odd"]).split() == words and causes == {}


NAMES = (
    *("-rf", "a b", "a'b\"c", "a\nb", "a\tb", "a;b&c|d", "$HOME", "%s", "~", "#1", "a:b", "a\\b"),
    *("é", "日本語", "🙂", "e\u0301", "CON", "x" * 251, "a.b.c", "..a", " a", "a ", "a=b,c", "{a}"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_kind(tmp_path: Path, name: str) -> None:
    files = {f"in/{name}.mp4": VIDEO, f"in/{name}.txt": b"Odd."}
    texts, causes, _ = made(tmp_path, files)
    if name.startswith("."):
        return  # hidden
    assert texts == {f"in/{name}": ["Odd."]} and causes == {}


def test_what_other_programs_leave(tmp_path: Path) -> None:
    files = {
        "._good.mp4": b"of macOS",
        ".DS_Store": b"",
        "__MACOSX/good.mp4": b"",
        "Thumbs.db": b"",
        "desktop.ini": b"",
        "a.mp4.part": VIDEO,
        "b.crdownload": VIDEO,
        "c.srt": b"1\n",
        "d": b"no suffix",
    }
    texts, causes, store = made(tmp_path, files)
    assert texts == {}
    assert causes == dict.fromkeys(("a.mp4.part", "b.crdownload"), "an unfinished download")
    ignored = {".db": 1, ".ini": 1, ".srt": 1, "no suffix": 1}
    assert manifest(store.root)["ignored"] == ignored


def test_folders_named_like_files(tmp_path: Path) -> None:
    files = {f"{folder}/a{suffix}": data for folder in ("x.mp4", "y.zip", "z.txt")
             for suffix, data in ((".mp4", VIDEO), (".txt", b"Odd."))}  # fmt: skip
    texts, causes, _ = made(tmp_path, files)
    assert set(texts) == {"x.mp4/a", "y.zip/a", "z.txt/a"} and causes == {}


def test_a_huge_file_of_zeros(tmp_path: Path) -> None:
    def prepare(root: Path) -> None:
        with open(root / "huge.mp4", "wb") as file:
            file.truncate(3 << 30)

    texts, causes, _ = made(tmp_path, {"huge.txt": TEXT}, prepare)
    assert texts == {} and "huge.mp4" in causes


def test_links_to_files_and_to_the_same_folder(tmp_path: Path) -> None:
    """A linked file is read; a folder that leads to itself is read once."""
    write_files(tmp_path / "elsewhere", {"a.mp4": VIDEO, "a.txt": b"Odd."})

    def prepare(root: Path) -> None:
        for name in ("a.mp4", "a.txt"):
            (root / name).symlink_to(tmp_path / "elsewhere" / name)
        (root / "loop").symlink_to(root)

    texts, causes, _ = made(tmp_path, {}, prepare)
    assert texts == {"a": ["Odd."]} and causes == {}


def test_a_file_that_goes_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    files = {"odd.mp4": VIDEO, "odd.txt": b"Odd."}
    write_files(tmp_path / "data", files)

    import dalle2_video.data.preprocess.todo as module

    find = module.find_sources

    def lose(*arguments, **named):
        catalogue = find(*arguments, **named)
        (tmp_path / "data" / "odd.mp4").unlink()
        return catalogue

    monkeypatch.setattr(module, "find_sources", lose)
    texts, causes, _ = made(tmp_path, {})
    assert texts == {} and "FileNotFoundError" in causes["odd.mp4"]


def test_archives_in_odd_states(tmp_path: Path) -> None:
    pair = {"a.mp4": VIDEO, "a.txt": b"Odd."}
    packed = pack("x.zip", pair)
    comment = BytesIO(packed)
    with zipfile.ZipFile(comment, "a") as file:
        file.comment = b"PK\x03\x04 " * 100
    files = {
        "empty.zip": b"",
        "folders.zip": pack("x.zip", {}),
        "sfx.zip": b"MZ" + bytes(1000) + packed,
        "comment.zip": comment.getvalue(),
        "dots.tar": pack("x.tar", {f"./{name}": data for name, data in pair.items()}),
        "long.tar": pack("x.tar", {f"{'long ' * 40}/{name}": d for name, d in pair.items()}),
        "no suffix/a.TAR": pack("x.tar", pair),
        "zip.tar": packed,
        "zeros.tar": bytes(10240),
        "twice.tar.gz": pack("x.tar.gz", {}) + pack("x.tar.gz", pair),
    }
    texts, causes, store = made(tmp_path, files)
    assert set(texts) == {
        *("sfx/a", "comment/a", "dots/a", f"long/{'long ' * 40}/a", "no suffix/a/a", "zip/a"),
    }
    listed = {item["archive"] for item in manifest(store.root)["skipped"]}
    assert listed == {"empty.zip"} and set(causes) == {""}


def test_damaged_headers_of_tars_end(tmp_path: Path) -> None:
    """A size below zero leads back for ever; a time may be no number; a name may begin with PK."""
    infos = [tarfile.TarInfo(name) for name in ("a.mp4", "b.mp4")]
    infos[1].size = -1024
    back = b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in infos) + bytes(1024)
    timeless = tarfile.TarInfo("PK.mp4")
    timeless.size, timeless.pax_headers = len(VIDEO), {"mtime": "nan"}
    pad = bytes(-len(VIDEO) % 512)
    text = tarfile.TarInfo("PK.txt")
    text.size = 4
    named = timeless.tobuf(tarfile.PAX_FORMAT) + VIDEO + pad + text.tobuf() + b"Odd." + bytes(1532)
    packed = pack("x.tar", {"PK.mp4": VIDEO, "PK.txt": b"Odd."})
    files = {"back.tar": back, "named.tar": named, "plain.tar": packed}
    texts, _, store = made(tmp_path, files)
    assert texts == {"named/PK": ["Odd."], "plain/PK": ["Odd."]}
    assert "back.tar" in {item["archive"] for item in manifest(store.root)["skipped"]}


def test_excel_says_its_separator(tmp_path: Path) -> None:
    table = b"sep=;\r\nfile_name;text\r\ngood.mp4;A cat.\r\nnowhere.mp4;x\r\n"
    texts, causes, _ = made(tmp_path, {"metadata.csv": table})
    assert texts == {} and causes == {"metadata.csv:4": "nowhere.mp4 is not there"}


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    root = write_files(tmp_path / "data", {"good.mp4": VIDEO, "good.txt": TEXT})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        preprocess(config(root, layout=None, out=str(tmp_path / "file")))
