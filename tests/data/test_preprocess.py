"""Archives in, store out: what is kept, what is listed and why, stops, settings, the script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from dalle2_video.config import ConfigError, from_config
from dalle2_video.data.config import CATEGORIES, DataConfig
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.preprocess.clip import make_clip
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.sources.captions import encode
from dalle2_video.data.sources.member import ArchiveError
from dalle2_video.data.store.shard import StoreError, read_index, shard_paths
from dalle2_video.data.store.store import open_store
from tests.helpers.launching import ENVIRONMENT, ROOT
from tests.helpers.media import captions, clip_id, grey_steps, index_first, write_video, write_zip
from tests.helpers.stores import clips, config, manifest, skipped, tree, video

pytestmark = pytest.mark.usefixtures("warm_workers")

# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("workers", [0, 2])
def test_frames_times_texts_and_tokens_arrive(tmp_path: Path, workers: int) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    write_zip(root / "sp_0001.zip", clips(1, 2, 3))
    write_zip(root / "sp_0002.zip", clips(4, 5))
    os.chmod(root, 0o555)
    before = tree(root)
    made = config(root, out=str(out), workers=workers)
    summary = preprocess(made)
    assert tree(root) == before, "inputs are only read"
    os.chmod(root, 0o755)
    assert (summary.clips, summary.made, summary.shards, summary.skipped) == (5, 5, 2, {})
    assert "5 clips in 2 shards" in str(summary)
    store = open_store(made)
    assert store.clip_ids == [clip_id(person) for person in range(1, 6)]
    for i, person in enumerate(range(1, 6)):
        expected = decode_clip(video(person), 5.0, 6, 16)
        assert np.array_equal(store.frames([i])[0], expected.frames)
        assert np.allclose(store.timestamps(i), np.arange(6) / 5)
        lines = store.lines(i)
        assert set(lines) == set(CATEGORIES)
        assert [line.text for line in lines["action_dur"]] == [
            f"{clip_id(person)} nods.",
            "He nods, then talks.",
        ]
        assert lines["light_dir"][0].tokens[1:-1] == encode("Light from the left.")
    index = read_index(shard_paths(out, "sp_0002")[2])
    assert [(c["clip"], c["row"], c["seconds"]) for c in index["clips"]] == [
        (clip_id(4), 0, [0.0, 1.0]),
        (clip_id(5), 1, [0.0, 1.0]),
    ]
    sizes = sum(path.stat().st_size for name in ("videos", "texts", "index")
                for path in (out / name).iterdir())  # fmt: skip
    assert summary.gigabytes == sizes / 1e9
    assert sorted(tree(out)) == [
        ".preprocess.lock",
        "index/sp_0001.json",
        "index/sp_0002.json",
        "manifest.json",
        "texts/sp_0001.pt",
        "texts/sp_0002.pt",
        "videos/sp_0001.h5",
        "videos/sp_0002.h5",
    ]


@pytest.mark.parametrize("form", ["tar", "tar.gz", "folder"])
def test_other_forms_give_the_same_store(tmp_path: Path, form: str) -> None:
    write_zip(tmp_path / "zip" / "x.zip", clips(1, 2))
    with zipfile.ZipFile(tmp_path / "zip" / "x.zip") as file:
        file.extractall(tmp_path / "folder")
    if form != "folder":
        (tmp_path / form).mkdir()
        with tarfile.open(tmp_path / form / f"x.{form}", f"w:{form[4:]}") as tar:
            tar.add(tmp_path / "folder", arcname=".")
    stores = []
    for root in (tmp_path / "zip", tmp_path / form):
        made = config(root)
        assert preprocess(made).skipped == {}
        stores.append(open_store(made))
    a, b = stores
    assert sorted(a.clip_ids) == sorted(b.clip_ids)
    for clip in range(2):
        other = b.clip_ids.index(a.clip_ids[clip])
        assert np.array_equal(a.frames([clip]), b.frames([other]))
        assert a.lines(clip) == b.lines(other)


def test_long_lines_are_split_counted_and_lose_nothing(tmp_path: Path) -> None:
    """A known mistake of such code, on the way from a file to the tokens on disk."""
    text = ", ".join(f"the woman turns her head to side number {k} and smiles" for k in range(20))
    write_zip(tmp_path / "x.zip", clips(1), {clip_id(1): {"action_dur": text.encode()}})
    write_zip(tmp_path / "y.zip", clips(2))
    assert preprocess(config(tmp_path)).lines_split == manifest(tmp_path)["lines_split"] == 1
    lines = open_store(config(tmp_path)).lines(0)["action_dur"]
    assert len(lines) > 2 and all(len(line.tokens) <= 77 for line in lines)
    assert [t for line in lines for t in line.tokens[1:-1]] == list(encode(text))


# ---------------------------------------------------------------- what is left out, and why


def test_bad_clips_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    front = index_first(write_video(noise))
    files = clips(1, 2)
    files |= {
        clip_id(10): write_video(noise)[:3000],
        clip_id(11): front[: len(front) // 2],
        clip_id(12): write_video(grey_steps(8)),
        clip_id(13): b"<html>404</html>",
        clip_id(14): write_video(np.full((15, 47, 63, 3), 90, np.uint8)),
        "trailer": video(1),
    }
    write_zip(tmp_path / "a.zip", files)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
        file.writestr(f"../../{clip_id(15)}.mp4", video(1))
    (tmp_path / "b.zip").write_bytes(b"a page that says: log in first")
    summary = preprocess(config(tmp_path), log=pytest.fail)
    store = open_store(config(tmp_path))
    assert store.clip_ids == [clip_id(1), clip_id(2), clip_id(14)]
    assert (store.frames([2]) == 90).mean() > 0.99
    found = skipped(tmp_path)
    base = "videos/celebvtext_6/"
    assert found.pop(f"{base}{clip_id(10)}.mp4").startswith("no video, or truncated: ")
    assert found.pop(f"{base}{clip_id(11)}.mp4") == "truncated: a packet is cut off"
    assert found.pop(f"{base}{clip_id(12)}.mp4") == "too short: has 0.8 s, needs 1.2 s"
    assert found.pop(f"{base}{clip_id(13)}.mp4").startswith("no video, or truncated: ")
    assert found.pop(f"{base}trailer.mp4").startswith("its name is no clip name")
    assert "points outside the archive" in found.pop(f"../../{clip_id(15)}.mp4")
    assert found.pop("").startswith("no whole archive: ")
    assert found == {}
    assert sum(summary.skipped.values()) == 7 and summary.skipped["too short"] == 1
    archives = {item["archive"] for item in manifest(tmp_path)["skipped"]}
    assert archives == {"a.zip", "b.zip"}, "paths below data.root, nothing of this machine"


def test_bad_texts_are_listed_and_count_as_missing(tmp_path: Path) -> None:
    whole = captions("x")
    texts = {
        clip_id(1): {**whole, "emotion": b"", "light_dir": b"caf\xe9", "light_intensity": b" \n"},
        clip_id(2): {"emotion": "\ufeffShe smiles.\n".encode()},
        clip_id(3): {"emotion": b"\xff\xfe", "action_dur": b""},
        clip_id(4): {},
    }
    write_zip(tmp_path / "a.zip", clips(1, 2, 3, 4), texts)
    summary = preprocess(config(tmp_path))
    store = open_store(config(tmp_path))
    assert store.clip_ids == [clip_id(1), clip_id(2)]
    assert sorted(store.lines(0)) == ["action_dur", "face40_details", "light_color_temp"]
    assert [line.text for line in store.lines(1)["emotion"]] == ["She smiles."]
    found = {
        (item["clip"], item["category"]): (item["file"], item["cause"])
        for item in manifest(tmp_path)["texts_left_out"]
    }
    name = clip_id(1)
    assert found[name, "emotion"] == (f"texts/emotion/{name}.txt", "empty")
    assert found[name, "light_dir"][1] == "not UTF-8: byte 0xE9 at 3"
    assert found[name, "light_intensity"][1] == "empty"
    assert found[clip_id(2), "light_dir"][1] == "missing"
    assert found[clip_id(3), "emotion"][1] == "not UTF-8: byte 0xFF at 0"
    assert len(found) == summary.texts_left_out == 3 + 5 + 6 + 6
    causes = skipped(tmp_path)
    for person in (3, 4):
        file = f"videos/celebvtext_6/{clip_id(person)}.mp4"
        assert causes[file] == "without text: no category has a usable file"


def test_a_clip_in_two_archives_is_taken_once(tmp_path: Path) -> None:
    write_zip(tmp_path / "b.zip", clips(1, 2))
    preprocess(config(tmp_path))
    write_zip(tmp_path / "a.zip", clips(2, 3))
    assert preprocess(config(tmp_path)).clips == 3
    assert open_store(config(tmp_path)).clip_ids == [clip_id(3), clip_id(1), clip_id(2)]
    (item,) = manifest(tmp_path)["skipped"]
    assert item["archive"] == "a.zip" and item["cause"] == "a second copy: shard b holds this clip"


def test_whatever_a_damaged_file_sets_off_costs_its_clip_only(tmp_path: Path, monkeypatch) -> None:
    write_zip(tmp_path / "a.zip", clips(1, 2))

    def decode(data: bytes, *more) -> object:
        if data == video(1):
            raise IndexError("list index out of range")
        return decode_clip(data, *more)

    monkeypatch.setattr("dalle2_video.data.preprocess.clip.decode_clip", decode)
    assert preprocess(config(tmp_path)).clips == 1
    (cause,) = skipped(tmp_path).values()
    assert cause == "unreadable: IndexError: list index out of range"


def test_an_archive_of_bad_clips_alone_does_not_stop_the_others(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {clip_id(1): b"nothing"})
    write_zip(tmp_path / "b.zip", clips(2))
    assert preprocess(config(tmp_path)).clips == 1
    assert open_store(config(tmp_path)).clip_ids == [clip_id(2)]


def test_nothing_to_do_it_with(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        preprocess(config(tmp_path / "nowhere"))
    with pytest.raises(ArchiveError, match="holds no clips"):
        preprocess(config(tmp_path))


# ---------------------------------------------------------------- again, and after a stop


def test_a_second_run_keeps_what_is_there_and_adds_what_came(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", clips(1))
    preprocess(config(tmp_path))
    first = tree(tmp_path)
    stamp = shard_paths(tmp_path, "a")[0].stat().st_mtime_ns
    write_zip(tmp_path / "b.zip", clips(2))
    summary = preprocess(config(tmp_path))
    assert (summary.made, summary.clips, summary.shards_kept) == (1, 2, 1)
    second = tree(tmp_path)
    assert {name: second[name] for name in first if name != "manifest.json"} == {
        name: first[name] for name in first if name != "manifest.json"
    }
    assert shard_paths(tmp_path, "a")[0].stat().st_mtime_ns == stamp


def test_archives_may_go_once_their_shards_are_made(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", clips(1))
    preprocess(config(tmp_path))
    (tmp_path / "a.zip").unlink()
    assert preprocess(config(tmp_path)).clips == 1
    write_zip(tmp_path / "b.zip", clips(2))
    assert preprocess(config(tmp_path)).clips == 2


@pytest.mark.parametrize("change", [{"fps": 4.0}, {"num_frames": 5}, {"size": 8}])
def test_other_settings_need_another_place_or_overwrite(tmp_path: Path, change: dict) -> None:
    write_zip(tmp_path / "a.zip", clips(1))
    preprocess(config(tmp_path))
    before = tree(tmp_path)
    other = config(tmp_path, **change)
    advice = r"a\.json was made with .*another data\.out or set data\.overwrite=true"
    with pytest.raises(StoreError, match=advice):
        preprocess(other)
    with pytest.raises(StoreError, match="choose another data"):
        open_store(other)
    assert tree(tmp_path) == before
    preprocess(replace(other, overwrite=True))
    assert open_store(other).frames([0]).shape[1:] == other.settings.shape
    (tmp_path / "a.zip").unlink()
    with pytest.raises(StoreError, match="archive is not here"):
        preprocess(config(tmp_path))


def test_a_changed_archive_is_made_again_and_said(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", clips(1))
    preprocess(config(tmp_path))
    write_zip(tmp_path / "a.zip", clips(1, 2))
    logged: list[str] = []
    assert preprocess(config(tmp_path), logged.append).clips == 2
    assert len(logged) == 1 and "a.zip has changed" in logged[0]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_or_damaged_file_of_a_shard_is_made_again(tmp_path: Path, which: int) -> None:
    write_zip(tmp_path / "a.zip", clips(1, 2))
    preprocess(config(tmp_path))
    path = shard_paths(tmp_path, "a")[which]
    whole = path.read_bytes()
    if which == 2:
        path.write_bytes(whole[:-20])
    else:
        path.unlink()
    logged: list[str] = []
    assert preprocess(config(tmp_path), logged.append).made == 2
    assert path.name in logged[0] and open_store(config(tmp_path)).frames([1]).any()


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_file_whose_archive_is_gone_is_named(tmp_path: Path, which: int) -> None:
    write_zip(tmp_path / "a.zip", clips(1, 2))
    write_zip(tmp_path / "b.zip", clips(3))
    preprocess(config(tmp_path))
    (tmp_path / "a.zip").unlink()
    assert preprocess(config(tmp_path)).clips == 3  # archives may go once they are read
    path = shard_paths(tmp_path, "a")[which]
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path.name} is missing.*bring the archive back"):
        preprocess(config(tmp_path))


KILLED = """
import os, signal, sys
import psutil
from pathlib import Path
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.preprocess.journal import Journal
from tests.helpers.stores import config
append, count = Journal.append, 0
def stop(self, clip, frames=None):
    global count
    count += 1
    if count == 9:
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        self._frames.write(frames[0][:2])  # in the middle of a clip
        self._frames.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return append(self, clip, frames)
Journal.append = stop
preprocess(config(Path(sys.argv[1]), workers=2))
"""


def test_after_kill_9_nothing_half_written_is_read_and_the_run_continues(
    tmp_path: Path, monkeypatch
) -> None:
    write_zip(tmp_path / "a.zip", clips(*range(6)))
    write_zip(tmp_path / "b.zip", clips(*range(6, 12)))
    # Files, no pipes: a worker that outlives its parent would keep a pipe open for ever.
    with open(tmp_path / "pids", "w") as pids, open(tmp_path / "errors", "w") as errors:
        code = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=pids,
            stderr=errors,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ).returncode
    assert code == -signal.SIGKILL, (tmp_path / "errors").read_text()
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) >= 2
    assert (tmp_path / "videos" / ".b.frames.partial").exists(), "killed in the middle of a shard"
    assert open_store(config(tmp_path)).clip_ids == [clip_id(person) for person in range(6)]
    stamp = shard_paths(tmp_path, "a")[0].stat().st_mtime_ns

    decoded = []
    monkeypatch.setattr(
        "dalle2_video.data.preprocess.clip.decode_clip",
        lambda *a: decoded.append(a) or decode_clip(*a),
    )
    summary = preprocess(config(tmp_path))
    assert len(decoded) == 4, "the two clips that were finished are not decoded again"
    assert (summary.made, summary.shards_kept, summary.clips) == (6, 1, 12)
    assert shard_paths(tmp_path, "a")[0].stat().st_mtime_ns == stamp
    assert not list(tmp_path.rglob("*.partial"))
    store = open_store(config(tmp_path))
    for i, person in enumerate(range(12)):
        assert np.array_equal(store.frames([i])[0], decode_clip(video(person), 5.0, 6, 16).frames)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive a killed parent"
        time.sleep(0.1)


def _die_at_one(clip: str, *arguments: object) -> object:
    if clip == clip_id(2):
        os.kill(os.getpid(), signal.SIGKILL)
    return make_clip(clip, *arguments)  # type: ignore[arg-type]


def _hang_at_one(clip: str, *arguments: object) -> object:
    if clip == clip_id(2):
        time.sleep(600)
    return make_clip(clip, *arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("worker", "cause"),
    [
        (_die_at_one, "its worker died 2 times (SIGKILL)"),
        (_hang_at_one, "it took longer than 6 s"),
    ],
)
def test_a_worker_that_dies_or_hangs_costs_its_own_clip_only(
    tmp_path: Path, monkeypatch, worker: object, cause: str
) -> None:
    write_zip(tmp_path / "a.zip", clips(*range(1, 6)))
    monkeypatch.setattr("dalle2_video.data.preprocess.run.make_clip", worker)
    made = config(tmp_path, workers=2, seconds_per_clip=6.0)
    assert preprocess(made).clips == 4
    assert open_store(made).clip_ids == [clip_id(person) for person in (1, 3, 4, 5)]
    assert skipped(tmp_path) == {f"videos/celebvtext_6/{clip_id(2)}.mp4": cause}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stop_while_a_shard_is_made_again_leaves_no_shard(tmp_path: Path, monkeypatch) -> None:
    """The old index goes first: it must never describe the new frames."""
    write_zip(tmp_path / "a.zip", clips(1))
    write_zip(tmp_path / "b.zip", clips(2))
    preprocess(config(tmp_path))
    monkeypatch.setattr("dalle2_video.data.preprocess.run.write_texts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess(config(tmp_path, overwrite=True))
    assert open_store(config(tmp_path)).clip_ids == [clip_id(2)]


def test_overwrite_takes_nothing_over_from_a_stopped_run(tmp_path: Path, monkeypatch) -> None:
    write_zip(tmp_path / "a.zip", clips(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr("dalle2_video.data.preprocess.run.write_texts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config(tmp_path))
    decoded = []
    monkeypatch.setattr(
        "dalle2_video.data.preprocess.clip.decode_clip",
        lambda *a: decoded.append(a) or decode_clip(*a),
    )
    preprocess(config(tmp_path, overwrite=True))
    assert len(decoded) == 2


def test_an_archive_that_changes_after_a_stop_is_read_again(tmp_path: Path, monkeypatch) -> None:
    write_zip(tmp_path / "a.zip", {clip_id(1): video(1)})
    with monkeypatch.context() as patch:
        patch.setattr("dalle2_video.data.preprocess.run.write_texts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config(tmp_path))
    other = write_video(grey_steps(20, step=9))
    write_zip(tmp_path / "a.zip", {clip_id(1): other})
    preprocess(config(tmp_path))
    expected = decode_clip(other, 5.0, 6, 16).frames
    assert np.array_equal(open_store(config(tmp_path)).frames([0])[0], expected)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    write_zip(tmp_path / "a.zip", clips(1))
    with open(tmp_path / ".preprocess.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another preprocess"):
            preprocess(config(tmp_path))
    assert preprocess(config(tmp_path)).clips == 1


def test_parts_may_run_at_once_but_each_only_once(tmp_path: Path) -> None:
    import fcntl

    write_zip(tmp_path / "a.zip", clips(1))
    write_zip(tmp_path / "b.zip", clips(2))
    locks = (".preprocess.lock", fcntl.LOCK_SH), (".preprocess.1of2.lock", fcntl.LOCK_EX)
    with ExitStack() as stack:
        for name, kind in locks:  # those of part 1
            fcntl.flock(stack.enter_context(open(tmp_path / name, "w")), kind)
        assert preprocess(config(tmp_path), part=2, parts=2).made == 1
        for part, parts in ((1, 2), (1, 1)):
            with pytest.raises(StoreError, match="another preprocess is writing"):
                preprocess(config(tmp_path), part=part, parts=parts)


# ---------------------------------------------------------------- in parts, and a full disk


def test_parts_make_together_what_one_run_makes(tmp_path: Path) -> None:
    """Each part its archives, a clip in two archives once, the manifest whole after the last."""
    people = {"a": (1, 2), "b": (2, 3), "c": (3, 4), "d": (5,), "e": (1, 6)}
    for name, some in people.items():
        write_zip(tmp_path / f"{name}.zip", clips(*some))
    one, many = config(tmp_path, out=str(tmp_path / "o")), config(tmp_path, out=str(tmp_path / "m"))
    preprocess(one)
    for part, shards in ((3, "c"), (1, "ad"), (2, "be")):
        before = set(tree(Path(many.out or "")))
        assert preprocess(many, part=part, parts=3).shards_kept <= 5
        made = {Path(name).stem for name in set(tree(Path(many.out or ""))) - before}
        assert {name for name in made if len(name) == 1} == set(shards)
    for store in (open_store(one), open_store(many)):
        assert sorted(store.clip_ids) == [clip_id(person) for person in range(1, 7)]
    assert open_store(one).clip_ids == open_store(many).clip_ids
    assert skipped(Path(one.out or "")) == skipped(Path(many.out or ""))
    with pytest.raises(StoreError, match="part must be 1 to 3"):
        preprocess(many, part=4, parts=3)


FULL = """
import resource, sys
from pathlib import Path
from dalle2_video.data.preprocess.run import preprocess
from tests.helpers.stores import config
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # room for 6 clips of 4,608 bytes
preprocess(config(Path(sys.argv[1])))
"""


def test_a_full_disk_is_said_and_finished_shards_stay(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", clips(1, 2))
    write_zip(tmp_path / "b.zip", clips(*range(3, 12)))
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert re.search(
        r"StoreError: the disk of .* is full .*: finished shards are whole", done.stderr
    )
    assert open_store(config(tmp_path)).clip_ids == [clip_id(1), clip_id(2)]
    summary = preprocess(config(tmp_path))
    assert (summary.clips, summary.made, summary.shards_kept) == (11, 9, 1)


# ---------------------------------------------------------------- the script


def test_the_section_is_checked_before_any_work() -> None:
    section = {
        "name": "x",
        "root": "x",
        "out": None,
        "fps": 4,
        "num_frames": 8,
        "size": 32,
        "span": "first",
        "windows": "one",
        "encoding": "raw",
        "split_seed": 0,
        "splits": {"train": 1.0},
        "workers": 0,
        "seconds_per_clip": 60,
        "overwrite": False,
    }
    assert from_config(DataConfig, section, "data").settings.shape == (8, 32, 32, 3)
    with pytest.raises(ConfigError, match=r"data\.frames: unknown key"):
        from_config(DataConfig, {**section, "frames": 3}, "data")
    with pytest.raises(ConfigError, match=r"data\.fps: must be above 0, got 0"):
        from_config(DataConfig, {**section, "fps": 0}, "data")
    with pytest.raises(ConfigError, match=r"data\.span: must be 'first' or 'full', got 'last'"):
        from_config(DataConfig, {**section, "span": "last"}, "data")


def test_the_script(tmp_path: Path) -> None:
    write_zip(tmp_path / "in" / "a.zip", clips(1, 2))
    command = [
        sys.executable,
        str(ROOT / "preprocess.py"),
        f"data.root={tmp_path / 'in'}",
        f"data.out={tmp_path / 'out'}",
        "data.fps=5",
        "data.num_frames=6",
        "data.size=16",
        "data.workers=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 clips in 1 shards" in done.stdout and "clip/s" in done.stderr


def test_the_script_ends_with_one_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    for root, line in (
        ("nowhere", f"data.root={tmp_path}/nowhere does not exist"),
        (
            "damaged",
            f"{tmp_path}/damaged: no clip is usable, mostly: no whole archive: ",
        ),
    ):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "a.zip").write_bytes(b"PK\x03\x04 and no more")
        command = [sys.executable, "preprocess.py", f"data.root={tmp_path}/{root}"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line), done.stderr
        assert "Traceback" not in done.stderr
