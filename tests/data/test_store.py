"""Shards, their index, their texts, and the split."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dalle2_video.data.atomic import whole, write_json
from dalle2_video.data.config import StoreSettings
from dalle2_video.data.sources.captions import encode, to_line
from dalle2_video.data.store.shard import ShardWriter, StoreError, shard_paths
from dalle2_video.data.store.splits import Splits, assign_splits, split_of, youtube_id
from dalle2_video.data.store.store import ClipStore, Place
from dalle2_video.data.store.texts import ShardTexts, write_texts
from tests.helpers.media import clip_id, clip_value, write_store

SETTINGS = StoreSettings(8.0, 4, 16)
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
SHARDS = {
    "b_archive": [clip_id(person, n) for person in range(10) for n in range(2)],
    "a_archive": [clip_id(person, n) for person in range(5, 25) for n in range(2, 5)],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path, SHARDS, SETTINGS)
    return tmp_path


# ---------------------------------------------------------------- split


def test_all_clips_of_one_video_are_in_one_split() -> None:
    """A known mistake of such code: split by index put one person on both sides."""
    splits: dict[str, set[str]] = {}
    for person in range(300):
        for n in range(3):
            name = clip_id(person, n)
            splits.setdefault(youtube_id(name), set()).add(split_of(youtube_id(name), 0, SPLITS))
    assert len(splits) == 300 and all(len(found) == 1 for found in splits.values())
    counts = Counter(found.pop() for found in splits.values())
    assert counts["train"] / 300 == pytest.approx(0.8, abs=0.07) and len(counts) == 3


def test_the_id_is_the_first_eleven_characters() -> None:
    for name in ("_-a_b-c_d_e_0_1", "abc_1_2_3_4_0_1", "abcdefghijk_12"):
        assert len(youtube_id(name)) == 11 and name.startswith(youtube_id(name) + "_")


def test_the_split_is_a_pure_function_that_never_changes() -> None:
    """These values stand in files of users: a change here would move people between splits."""
    ids = ("a_0000-b_cd", "a_0007-b_cd", "a_0002-b_cd", "M2Ohb0FAaJU", "-_-_-_-_-_-")
    found = [split_of(name, 0, {"train": 0.5, "val": 0.25, "test": 0.25}) for name in ids]
    assert found == ["test", "train", "val", "train", "train"]
    many = [f"{k:011d}" for k in range(500)]
    assert [split_of(k, 0, SPLITS) for k in many] != [split_of(k, 1, SPLITS) for k in many]


def test_a_larger_training_share_moves_only_from_val_to_train() -> None:
    for k in range(500):
        before = split_of(f"{k:011d}", 0, {"train": 0.5, "val": 0.5})
        after = split_of(f"{k:011d}", 0, {"train": 0.7, "val": 0.3})
        assert (before, after) != ("train", "val")


def test_few_groups_fill_every_split() -> None:
    """Whatever the seed; and where none would be empty, it is `split_of` itself."""
    for seed in range(50):
        for count in (3, 4, 7, 30):
            groups = [f"group {k}" for k in range(count)]
            made = assign_splits(groups, seed, SPLITS)
            plain = {group: split_of(group, seed, SPLITS) for group in groups}
            assert set(made.of_group.values()) == set(SPLITS)
            assert assign_splits(reversed(groups), seed, SPLITS) == made
            if set(plain.values()) == set(SPLITS):
                assert made == Splits(plain, [])
            else:
                changed = [group for group in groups if plain[group] != made.of_group[group]]
                assert len(changed) == len(set(SPLITS) - set(plain.values()))
                assert all(f"{group} (" in made.warnings[0] for group in changed)


def test_fewer_groups_than_splits_is_a_warning() -> None:
    made = assign_splits(["a", "b"], 0, SPLITS)
    assert (
        len(set(made.of_group.values())) == 2
        and "since the number of groups is 2" in (made.warnings[-1])
    )
    assert assign_splits(["a"], 0, {"train": 1.0, "val": 0.0}) == Splits({"a": "train"}, [])


def test_a_small_group_is_what_fills_an_empty_split() -> None:
    for seed in range(20):
        made = assign_splits(["large"] * 50 + ["small"], seed, {"train": 0.9, "val": 0.1})
        if split_of("large", seed, {"train": 0.9, "val": 0.1}) == "train":
            assert made.of_group == {"large": "train", "small": "val"}


def store_of(groups: list[str | None], splits: dict[str, float], root: Path) -> ClipStore:
    """A store of one shard whose clips, "clip 0" and so on, have these groups."""
    places = [Place(f"clip {k:06d}", "a", k, 0, k, group) for k, group in enumerate(groups)]
    return ClipStore(root, SETTINGS, places, splits, 0)


def test_clips_of_one_group_share_a_split(tmp_path: Path) -> None:
    groups: list[str | None] = [f"person {k % 40}" for k in range(200)]
    store = store_of(groups, SPLITS, tmp_path)
    for name in SPLITS:
        people = {store.groups[place] for place in store.split(name)}
        assert people and len(store.split(name)) == 5 * len(people)
    assert store.warnings == []


def test_one_group_alone_is_split_by_clip(tmp_path: Path) -> None:
    for groups in (["me"] * 20, [None] * 20):  # the second: one video's id, "clip 000001"[:11]
        places = [Place(f"clip 000001_{k}_0", "a", k, 0, k, g) for k, g in enumerate(groups)]
        store = ClipStore(tmp_path, SETTINGS, places, SPLITS, 0)
        assert all(store.split(name) for name in SPLITS)
        assert sum(len(store.split(name)) for name in SPLITS) == 20
        assert "all clips are of one group" in store.warnings[0]
    assert store_of(["me"] * 20, {"train": 1.0}, tmp_path).warnings == []


@pytest.mark.parametrize("bad", [{}, {"train": 0.9}, {"train": 1.5, "val": -0.5}])
def test_fractions_must_sum_to_one(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_of("x" * 11, 0, bad)


def test_adding_an_archive_moves_nobody(root: Path) -> None:
    def split() -> dict[str, str]:
        store = ClipStore.open(root, SPLITS)
        return {store.clip_ids[i]: name for name in SPLITS for i in store.split(name)}

    before = split()
    write_store(root, {"0_first": [clip_id(person) for person in range(100, 140)]}, SETTINGS)
    after = split()
    assert len(after) == len(before) + 40
    assert {clip: after[clip] for clip in before} == before


# ---------------------------------------------------------------- reading


def test_clips_are_found_in_a_fixed_order_and_read_as_written(root: Path) -> None:
    store = ClipStore.open(root, SPLITS)
    assert store.clip_ids == [*SHARDS["a_archive"], *SHARDS["b_archive"]]
    assert store.settings == SETTINGS and len(store) == 80
    wanted = [79, 3, 60, 3, 0, 41]
    frames = store.frames(wanted)
    assert frames.shape == (6, 4, 16, 16, 3) and frames.dtype == np.uint8
    for row, clip in zip(frames, wanted, strict=True):
        assert (row == clip_value(store.clip_ids[clip])).all()
    assert store.key(3) == f"{store.clip_ids[3]}:0"
    assert np.array_equal(store.timestamps(3), np.arange(4) / 8)
    lines = store.lines(61)
    assert [line.text for line in lines["emotion"]] == [f"{store.clip_ids[61]} smiles."]
    assert store.frames([]).shape == (0, 4, 16, 16, 3)


def test_shards_are_numbered_by_name(tmp_path: Path) -> None:
    """In every process: the order of training is drawn over these numbers."""
    names = [f"s{k}" for k in range(20)]
    places = [Place(clip_id(k), name, 0, 0, 0) for k, name in enumerate(names)]
    store = ClipStore(tmp_path, SETTINGS, places, SPLITS, 0)
    assert store.shards == sorted(names)
    assert [store.shards[n] for n in store.shard_numbers(range(20))] == names


def test_a_clip_is_stored_as_uint8_in_one_piece(root: Path) -> None:
    """A known mistake of such code: float32 clips at full size took 90 MB each."""
    path = shard_paths(root, "a_archive")[0]
    with h5py.File(path) as file:
        frames = file["frames"]
        assert frames.dtype == np.uint8 and frames.shape[1:] == (4, 16, 16, 3)
        assert not frames.is_virtual and frames.chunks is None
        assert (file.attrs["fps"], file.attrs["size"], file.attrs["num_frames"]) == (8.0, 16, 4)
    clips = len(SHARDS["a_archive"])
    assert path.stat().st_size < 1.1 * clips * 4 * 16 * 16 * 3 + 40_000


def _read_in_child(store: ClipStore, clips: list[int], queue) -> None:
    queue.put((store.frames(clips)[:, 0, 0, 0, 0].tolist(), store.lines(clips[0])["emotion"][0]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_use_their_own_handles(root: Path, method: str) -> None:
    store = ClipStore.open(root, SPLITS)
    store.frames([0, 70])  # the parent's handles are open now
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    jobs = [[k, 79 - k, 30 + k] for k in range(3 if method == "fork" else 1)]
    children = [context.Process(target=_read_in_child, args=(store, c, queue)) for c in jobs]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    expected = [
        ([clip_value(store.clip_ids[k]) for k in clips], store.lines(clips[0])["emotion"][0])
        for clips in jobs
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert (store.frames([5])[0] == clip_value(store.clip_ids[5])).all()


def test_a_pickled_store_holds_no_handle_and_no_texts(root: Path) -> None:
    store = ClipStore.open(root, SPLITS)
    size = len(pickle.dumps(store))
    store.frames([0])
    store.lines(0)
    assert len(pickle.dumps(store)) == size
    again = pickle.loads(pickle.dumps(store))
    assert not again._handles and np.array_equal(again.frames([7]), store.frames([7]))


# ---------------------------------------------------------------- texts


def test_texts_are_plain_tensors_and_come_back(tmp_path: Path) -> None:
    texts = [
        {"emotion": ["She smiles.", "A caf\u00e9 smile \u2014 yes"], "action_dur": ["he nods"]},
        {},
        {"light_dir": ["from the left"]},
    ]
    lines = [{c: [to_line(text) for text in some] for c, some in one.items()} for one in texts]
    write_texts(tmp_path / "t.pt", lines)
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    assert content["tokens"].dtype == torch.int32
    read = ShardTexts(tmp_path / "t.pt")
    for row, by_category in enumerate(texts):
        found = read.lines(row)
        assert {c: [line.text for line in lines] for c, lines in found.items()} == by_category
        for lines in found.values():
            assert all(line.tokens == (49406, *encode(line.text), 49407) for line in lines)


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_shard_is_named(root: Path, which: int) -> None:
    path = shard_paths(root, "b_archive")[which]
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        ClipStore.open(root, SPLITS)


def test_a_truncated_shard_is_named(root: Path) -> None:
    path = shard_paths(root, "b_archive")[0]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"b_archive\.h5 is damaged"):
        ClipStore.open(root, SPLITS)


def test_a_shard_with_fewer_rows_than_its_index_is_named(root: Path) -> None:
    with ShardWriter(root, "b_archive", SETTINGS, 1) as writer:
        writer.append(np.zeros(SETTINGS.shape, np.uint8), np.zeros(4))
    with pytest.raises(StoreError, match=r"b_archive\.h5 holds \(1, .* says 20 windows"):
        ClipStore.open(root, SPLITS)


def test_texts_of_another_format_are_named(root: Path) -> None:
    path = shard_paths(root, "a_archive")[1]
    torch.save({**torch.load(path, weights_only=True), "format": 1}, path)
    with pytest.raises(StoreError, match=r"a_archive\.pt is damaged \(format 1, this code reads 2"):
        ClipStore.open(root, SPLITS).lines(0)


def test_damaged_texts_are_named(root: Path) -> None:
    path = shard_paths(root, "a_archive")[1]
    path.write_bytes(path.read_bytes()[:200])
    store = ClipStore.open(root, SPLITS)
    with pytest.raises(StoreError, match=r"a_archive\.pt is damaged"):
        store.lines(0)


def test_a_damaged_or_foreign_index_is_named(root: Path) -> None:
    path = shard_paths(root, "a_archive")[2]
    path.write_text(path.read_text()[:-30])
    with pytest.raises(StoreError, match=r"a_archive\.json is damaged"):
        ClipStore.open(root, SPLITS)
    write_json(path, {"format": 99})
    with pytest.raises(StoreError, match="format 99"):
        ClipStore.open(root, SPLITS)


def test_hidden_files_beside_the_index_are_no_shards(root: Path) -> None:
    (root / "index" / "._a_archive.json").write_bytes(b"what a Mac leaves beside a file")
    assert len(ClipStore.open(root, SPLITS)) == 80


def test_mixed_settings_and_double_clips_are_refused(root: Path, tmp_path: Path) -> None:
    write_store(root, {"c": SHARDS["a_archive"][:1]}, SETTINGS)
    with pytest.raises(StoreError, match="is in two shards: a_archive, c"):
        ClipStore.open(root, SPLITS)
    write_store(root, {"c": [clip_id(500)]}, StoreSettings(4.0, 4, 16))
    with pytest.raises(StoreError, match=r"c\.json was made with"):
        ClipStore.open(root, SPLITS)


def test_an_empty_folder_and_an_unknown_split(root: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run preprocess"):
        ClipStore.open(tmp_path / "nothing", SPLITS)
    with pytest.raises(StoreError, match=r"no split 'combo'; data\.splits has train, val, test"):
        ClipStore.open(root, SPLITS).split("combo")


def test_nothing_half_written_gets_a_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "s", SETTINGS, 2) as writer:
        writer.append(np.zeros(SETTINGS.shape, np.uint8), np.zeros(4))
        raise RuntimeError("stopped")
    with pytest.raises(RuntimeError), whole(tmp_path / "x.json") as partial:
        partial.write_text("half")
        raise RuntimeError("stopped")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    with (
        pytest.raises(ValueError, match="uint8"),
        ShardWriter(tmp_path, "s", SETTINGS, 1) as writer,
    ):
        writer.append(np.zeros((4, 16, 16, 3), np.float32), np.zeros(4))
    write_json(tmp_path / "x.json", {"ä": 1})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"ä": 1}


def test_a_written_store_of_no_lines_at_all(tmp_path: Path) -> None:
    write_texts(tmp_path / "t.pt", [{}, {}])
    assert ShardTexts(tmp_path / "t.pt").lines(1) == {}


def test_a_shard_gets_as_many_windows_as_it_was_made_for(tmp_path: Path) -> None:
    frames = np.zeros(SETTINGS.shape, np.uint8)
    with (
        pytest.raises(ValueError, match="2 windows and 0 images got 1 and 0"),
        ShardWriter(tmp_path, "s", SETTINGS, 2) as writer,
    ):
        writer.append(frames, np.zeros(4))
    with (
        pytest.raises(ValueError, match="1 windows, 0 bytes is full"),
        ShardWriter(tmp_path, "s", SETTINGS, 1) as writer,
    ):
        writer.append(frames, np.zeros(4))
        writer.append(frames, np.zeros(4))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_any_reader_of_hdf5_sees_the_frames(root: Path) -> None:
    """What is read by offset is what HDF5 reads."""
    store = ClipStore.open(root, SPLITS)
    with h5py.File(shard_paths(root, "b_archive")[0], locking=False) as file:
        first = len(SHARDS["a_archive"])
        assert np.array_equal(file["frames"][3], store.frames([first + 3])[0])
        assert np.array_equal(file["times"][3], store.timestamps(first + 3))


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(root: Path) -> None:
    store = ClipStore.open(root, SPLITS)
    store.frames([0])
    os.truncate(shard_paths(root, "a_archive")[0], 3000)
    with pytest.raises(StoreError, match=r"a_archive\.h5 is damaged: it ends early"):
        store.frames([len(SHARDS["a_archive"]) - 1])
