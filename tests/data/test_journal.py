"""The journal of a shard under way: whatever a kill leaves, the whole clips are taken over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.preprocess.journal import Journal
from dalle2_video.data.store.shard import StoreError

SHAPE = (2, 4, 4, 3)
MADE_FROM = {"settings": {"fps": 4.0}, "clips": "abc"}


def frames(number: int) -> np.ndarray:
    return np.full(SHAPE, number, np.uint8)


def begin(folder: Path) -> Journal:
    """Clip 0 kept, clip 1 left out, clip 2 kept; then the run stops."""
    with Journal(folder, "s", MADE_FROM) as journal:
        journal.append({"clip": "0", "status": "kept"}, [frames(0)])
        journal.append({"clip": "1", "status": "skipped", "cause": "too short"})
        journal.append({"clip": "2", "status": "kept"}, [frames(2)])
    return journal


def test_a_stopped_run_is_taken_over(tmp_path: Path) -> None:
    begin(tmp_path)
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        assert [clip["clip"] for clip in journal.clips] == ["0", "1", "2"]
        journal.append({"clip": "3", "status": "kept"}, [frames(3)])
        assert [clip.get("row") for clip in journal.clips] == [0, None, 1, 2]
        assert [int(f.mean()) for (f,) in journal.windows()] == [0, 2, 3]
        journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_and_frames_without_a_line_are_cut_off(tmp_path: Path, cut: int) -> None:
    old = begin(tmp_path)
    lines = old.clips_path.read_bytes()
    old.clips_path.write_bytes(lines[:-cut])
    with open(old.frames_path, "ab") as file:
        file.write(b"half a clip")
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        assert [clip["clip"] for clip in journal.clips] == ["0", "1"]
        journal.append({"clip": "2", "status": "kept"}, [frames(2)])
        assert [int(f.mean()) for (f,) in journal.windows()] == [0, 2]
    assert old.clips_path.read_bytes() == lines, "the same as without a stop"


def test_frames_that_a_power_cut_lost_are_made_again(tmp_path: Path) -> None:
    old = begin(tmp_path)
    data = bytearray(old.frames_path.read_bytes())
    data[-10:] = bytes(10)
    old.frames_path.write_bytes(data)
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        assert [clip["clip"] for clip in journal.clips] == ["0", "1"]


def test_a_journal_of_other_settings_is_thrown_away(tmp_path: Path) -> None:
    begin(tmp_path)
    with Journal(tmp_path, "s", {**MADE_FROM, "clips": "other"}) as journal:
        assert journal.clips == [] and journal.rows == 0
        journal.append({"clip": "9", "status": "kept"}, [frames(9)])
        assert [int(f.mean()) for (f,) in journal.windows()] == [9]


def test_a_fresh_one_takes_nothing_over(tmp_path: Path) -> None:
    begin(tmp_path)
    with Journal(tmp_path, "s", MADE_FROM, fresh=True) as journal:
        assert journal.clips == [] and journal.frames_path.stat().st_size == 0


def test_a_clip_whose_worker_was_lost_gets_another_chance(tmp_path: Path) -> None:
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        journal.append({"clip": "0", "status": "skipped", "cause": "died", "lost": True})
        journal.append({"clip": "1", "status": "kept"}, [frames(1)])
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        assert [clip["clip"] for clip in journal.clips] == ["1"]
        journal.append({"clip": "0", "status": "kept"}, [frames(0)])
        assert [int(f.mean()) for (f,) in journal.windows()] == [1, 0]


def test_a_disk_that_changes_frames_is_found(tmp_path: Path) -> None:
    begin(tmp_path)
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        journal.frames_path.write_bytes(bytes(2 * 96))
        with pytest.raises(StoreError, match=r"\.s\.frames\.partial is damaged"):
            list(journal.windows())


def test_windows_may_have_any_number_and_length(tmp_path: Path) -> None:
    clips = [[frames(1)[:1], frames(2)], [frames(3)[0, 0]], [frames(4), frames(5), frames(6)]]
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        for name, windows in enumerate(clips):
            journal.append({"clip": str(name), "status": "kept"}, windows)
    with open(journal.frames_path, "ab") as file:
        file.write(b"half a window")
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        assert [clip["row"] for clip in journal.clips] == [0, 2, 3]
        assert journal.rows == 6 and journal.num_bytes == 48 + 96 + 12 + 3 * 96
        for found, windows in zip(journal.windows(), clips, strict=True):
            assert [f.tobytes() for f in found] == [w.tobytes() for w in windows]


def test_what_is_no_window_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, "s", MADE_FROM) as journal:
        for windows in ([], [np.zeros(SHAPE)]):
            with pytest.raises(ValueError, match="one or more windows of uint8"):
                journal.append({"clip": "0", "status": "kept"}, windows)
        assert journal.clips == []


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, "s", MADE_FROM) as journal,
        pytest.raises(StoreError, match="another preprocess"),
        Journal(tmp_path, "s", MADE_FROM),
    ):
        pass
    assert journal.clips_path.exists()
