"""The order of clips, batches, and the loaders: keyed, so independent of ranks, workers, stops."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle2_video.data.config import CaptionPolicy, StoreSettings
from dalle2_video.data.media.encode import encode_window
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions
from dalle2_video.data.store.dataset import (
    Batch,
    CelebVTextDataset,
    Pointer,
    eval_loader,
    train_loader,
)
from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError, write_embeddings
from dalle2_video.data.store.order import ClipOrder
from dalle2_video.data.store.shard import ShardWriter, StoreError
from dalle2_video.data.store.splits import split_of, youtube_id
from dalle2_video.data.store.store import ClipStore, Place
from tests.helpers.media import clip_id, clip_value, grey_steps, write_store

SPLITS = {"train": 0.7, "val": 0.3}
CLIPS = [clip_id(person, n) for person in range(25) for n in range(2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    root = tmp_path_factory.mktemp("store")
    write_store(root, {"a": CLIPS[:30], "b": CLIPS[30:]}, StoreSettings(8.0, 2, 8))
    return ClipStore.open(root, SPLITS)


def dataset(store: ClipStore, split: str = "train", drop: bool = True, **more) -> CelebVTextDataset:
    captions = TrainingCaptions(CaptionPolicy()) if drop else EvaluationCaptions()
    return CelebVTextDataset(store, split, 11, captions, **more)


def same(a: Batch, b: Batch) -> bool:
    assert a.frames is not None and b.frames is not None
    return (
        torch.equal(a.sample_ids, b.sample_ids)
        and a.keys == b.keys
        and a.captions == b.captions
        and torch.equal(a.frames, b.frames)
        and torch.equal(a.tokens, b.tokens)
        and torch.equal(a.line_index, b.line_index)
    )


# ---------------------------------------------------------------- order


def test_every_epoch_is_another_permutation() -> None:
    order = ClipOrder(20, seed=3)
    epochs = [[order(sample_id) for sample_id in range(e * 20, e * 20 + 20)] for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ClipOrder(20, seed=4).permutation(0).tolist() != epochs[0]


def test_the_order_is_random_access() -> None:
    order = ClipOrder(7, seed=0)
    forward = [order(sample_id) for sample_id in range(50)]
    assert [ClipOrder(7, seed=0)(c) for c in reversed(range(50))] == forward[::-1]
    with pytest.raises(ValueError, match="at least one"):
        ClipOrder(0, 0)


def test_the_order_never_changes() -> None:
    """A run that was stopped under older code goes on with the clips that it has not yet met."""
    assert ClipOrder(10, seed=3).permutation(0).tolist() == [6, 7, 0, 1, 3, 8, 4, 5, 2, 9]
    shards = np.arange(20) % 18
    order = ClipOrder(20, seed=3, shards=shards).permutation(1).tolist()
    assert order == [19, 14, 17, 5, 10, 0, 16, 3, 12, 1, 15, 4, 9, 2, 13, 7, 18, 6, 8, 11]


def test_places_are_equally_likely() -> None:
    first = Counter(ClipOrder(5, seed)(0) for seed in range(1000))
    assert all(count == pytest.approx(200, abs=50) for count in first.values())


def test_the_order_goes_through_the_shards_in_groups() -> None:
    """40 shards of 25 clips: in each third only 16 shards are open, others in the next epoch."""
    shards = np.repeat(np.arange(40), 25)
    order = ClipOrder(1000, 0, shards)
    groups = []
    for epoch in range(3):
        clips = order.permutation(epoch)
        assert sorted(clips) == list(range(1000))
        parts = [set(shards[clips[start : start + 400]]) for start in (0, 400, 800)]
        assert [len(part) for part in parts] == [16, 16, 8]
        groups.append(frozenset(parts[0]))
        # inside a group all clips are mixed: hardly two of one shard follow each other
        same = np.mean(shards[clips[1:]] == shards[clips[:-1]])
        assert same < 3 / 16
    assert len(set(groups)) == 3
    first = Counter(int(shards[ClipOrder(1000, seed, shards)(0)]) for seed in range(2000))
    assert len(first) == 40 and max(first.values()) < 100, "each shard may come first"
    few = np.repeat(np.arange(16), 4)
    assert [ClipOrder(64, 1, few)(c) for c in range(64)] == [ClipOrder(64, 1)(c) for c in range(64)]


# ---------------------------------------------------------------- batches


def test_a_batch_holds_what_its_keys_say(store: ClipStore) -> None:
    data = dataset(store)
    batch = data.collate([data.pointer(sample_id) for sample_id in range(6)])
    assert batch.sample_ids.tolist() == list(range(6)) and len(batch) == 6
    assert batch.frames is not None and batch.frames.dtype == torch.uint8
    assert batch.frames.shape == (6, 2, 8, 8, 3)
    for i, key in enumerate(batch.keys):
        name, window = key.rsplit(":", 1)
        assert window == "0" and (batch.frames[i] == clip_value(name)).all()
        assert set(batch.captions[i]) <= {f"{name} smiles.", "left light", "left light, " + name
                                          + " smiles.", f"{name} smiles, left light"}  # fmt: skip
    used = sorted({row for rows in batch.line_index.tolist() for row in rows if row >= 0})
    assert used == list(range(len(batch.tokens)))
    assert len({tuple(row) for row in batch.tokens.tolist()}) == len(batch.tokens)
    assert (batch.tokens[:, -1] != 0).any(), "trimmed to the longest line"
    assert batch.embeddings is None


def test_a_batch_moves_whole_and_keeps_its_sample_ids_on_the_cpu(store: ClipStore) -> None:
    data = dataset(store, num_images=1)
    moved = data.collate([data.pointer(0), data.pointer(1)]).to("meta")
    assert moved.frames is not None and moved.frames.device.type == "meta"
    assert moved.tokens.device.type == moved.line_index.device.type == "meta"
    assert moved.sample_ids.device.type == "cpu"
    assert moved.images is not None and moved.images.frames is not None
    assert moved.images.frames.device.type == moved.images.tokens.device.type == "meta"


def test_captions_change_from_meeting_to_meeting_but_not_between_runs(store: ClipStore) -> None:
    data = dataset(store)
    n = len(data)
    meetings = [
        next(b for c in range(e * n, e * n + n) if (b := data.pointer(c)).index == 0)
        for e in range(12)
    ]
    texts = [data.collate([pointer]).captions[0] for pointer in meetings]
    assert len({tuple(text) for text in texts}) > 2
    assert texts == [dataset(store).collate([pointer]).captions[0] for pointer in meetings]


def test_splits_share_no_person(store: ClipStore) -> None:
    """A known mistake of such code: the same person on both sides."""
    people = {split: {youtube_id(key) for key in dataset(store, split).keys()} for split in SPLITS}
    assert people["train"] and people["val"] and not people["train"] & people["val"]
    for split, ids in people.items():
        assert all(split_of(name, 0, SPLITS) == split for name in ids)


def test_a_category_that_no_clip_has(store: ClipStore) -> None:
    policy = TrainingCaptions(CaptionPolicy(presence={"emotion": 0.5}))
    CelebVTextDataset(store, "train", 0, policy)
    policy = TrainingCaptions(CaptionPolicy(presence={"mood": 0.5}))
    with pytest.raises(
        StoreError, match=r"presence\.mood: no category of .*; it has emotion, light"
    ):
        CelebVTextDataset(store, "train", 0, policy)


def test_an_empty_split_and_a_foreign_pointer(store: ClipStore, tmp_path: Path) -> None:
    write_store(tmp_path, {"a": [clip_id(1)]}, StoreSettings(8.0, 2, 8))
    lone = ClipStore.open(tmp_path, {"train": 0.0, "val": 1.0})
    with pytest.raises(StoreError, match=r"split 'train' of .* has none of its 1 clips"):
        dataset(lone)
    data = dataset(store)
    with pytest.raises(StoreError, match="names clip"):
        data.collate([Pointer(0, 1, data.key(2))])


# ---------------------------------------------------------------- embeddings


def embedding(key: str) -> torch.Tensor:
    """A unit vector that belongs to this key alone."""
    angle = torch.tensor(float(clip_value(key)) / 40)
    return torch.stack([angle.cos(), angle.sin()])


def test_embeddings_are_paired_by_key_whatever_the_order(store: ClipStore, tmp_path: Path) -> None:
    """A known mistake of such code: a shuffled loader wrote them, an index paired them."""
    data = dataset(store)
    shuffled = [data.pointer(sample_id).key for sample_id in range(len(data))]
    assert shuffled != data.keys()
    table = torch.stack([embedding(key) for key in shuffled])
    write_embeddings(tmp_path / "e.safetensors", shuffled, table, "hash")
    cache = EmbeddingCache.load(tmp_path / "e.safetensors", "hash")
    paired = dataset(store, embeddings=cache)
    for batch in islice(train_loader(paired, 5), 12):
        assert batch.embeddings is not None
        expected = torch.stack([embedding(key) for key in batch.keys])
        assert torch.equal(batch.embeddings, expected)


def test_a_clip_without_embedding_is_an_error(store: ClipStore, tmp_path: Path) -> None:
    keys = dataset(store).keys()[:-1]
    table = torch.stack([embedding(key) for key in keys])
    write_embeddings(tmp_path / "e.safetensors", keys, table, "hash")
    data = dataset(store, embeddings=EmbeddingCache.load(tmp_path / "e.safetensors", "hash"))
    with pytest.raises(EmbeddingError, match=dataset(store).keys()[-1]):
        list(eval_loader(data, 8))


def test_frames_can_be_left_on_disk(store: ClipStore) -> None:
    data = dataset(store, load_frames=False)
    assert next(train_loader(data, 3)).frames is None


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_through_every_clip_once_an_epoch(store: ClipStore, workers: int) -> None:
    data = dataset(store)
    n = len(data)
    batches = islice(train_loader(data, n, workers=workers), 3)
    keys = [batch.keys for batch in batches]
    assert all(sorted(epoch) == sorted(data.keys()) for epoch in keys)
    assert keys[0] != keys[1]


def test_workers_change_nothing(store: ClipStore) -> None:
    data = dataset(store)
    for a, b in zip(
        islice(train_loader(data, 4), 6), islice(train_loader(data, 4, workers=2), 6), strict=True
    ):
        assert same(a, b)


def test_a_resumed_loader_continues_exactly(store: ClipStore) -> None:
    data = dataset(store)
    whole = list(islice(train_loader(data, 4), 20))
    rest = list(islice(train_loader(data, 4, first_sample_id=28), 13))
    assert all(same(a, b) for a, b in zip(whole[7:], rest, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_global_batch(store: ClipStore, world: int) -> None:
    """The clips and captions of a global step are the same for any number of ranks."""
    data = dataset(store)
    alone = islice(train_loader(data, 12, first_sample_id=5), 4)
    ranks = [train_loader(data, 12 // world, rank, world, 5) for rank in range(world)]
    for batch in alone:
        parts = [next(rank) for rank in ranks]
        assert torch.equal(batch.sample_ids, torch.cat([part.sample_ids for part in parts]))
        assert batch.keys == [key for part in parts for key in part.keys]
        assert batch.captions == [text for part in parts for text in part.captions]


@pytest.mark.parametrize("case", range(25))
def test_no_clip_is_lost_or_met_twice_for_any_ranks_stops_and_batches(
    store: ClipStore, case: int
) -> None:
    """Property: two runs with other ranks and batches, the second resumed where the first stopped,
    meet together what one process meets: every clip exactly once an epoch.
    """
    draw = random.Random(case)
    data = dataset(store, load_frames=False)
    start, met = 0, []
    for _ in range(2):
        world, batch = draw.randint(1, 9), draw.randint(1, 7)
        steps = draw.randint(1, 6)
        ranks = [islice(train_loader(data, batch, r, world, start), steps) for r in range(world)]
        for parts in zip(*ranks, strict=True):
            sample_ids = [c for part in parts for c in part.sample_ids.tolist()]
            assert sample_ids == list(range(start, start + world * batch))
            start += world * batch
            met += [key for part in parts for key in part.keys]
    assert met == [data.pointer(sample_id).key for sample_id in range(start)]
    n = len(data)
    for epoch in range(start // n):
        assert sorted(met[epoch * n : (epoch + 1) * n]) == sorted(data.keys())
    world, batch = draw.randint(1, 40), draw.randint(1, 50)
    rest = [b for r in range(world) for b in eval_loader(data, batch, r, world)]
    assert sorted(key for b in rest for key in b.keys) == sorted(data.keys())


@pytest.mark.parametrize(("world", "workers"), [(2, 1), (3, 2)])
def test_workers_of_several_ranks_lose_nothing(store: ClipStore, world: int, workers: int) -> None:
    data = dataset(store, load_frames=False)
    n = len(data)
    ranks = [islice(train_loader(data, 1, r, world, workers=workers), n) for r in range(world)]
    met = [part.keys[0] for parts in zip(*ranks, strict=True) for part in parts]
    for epoch in range(world):
        assert sorted(met[epoch * n : (epoch + 1) * n]) == sorted(data.keys())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_every_clip_once_in_index_order(store: ClipStore, workers: int) -> None:
    data = dataset(store, "val", drop=False)
    batches = list(eval_loader(data, 4, workers=workers))
    assert [key for batch in batches for key in batch.keys] == data.keys()
    assert [c for batch in batches for c in batch.sample_ids.tolist()] == list(range(len(data)))
    assert len(batches[-1]) == (len(data) - 1) % 4 + 1
    assert all(len(text) == 2 for batch in batches for text in batch.captions)
    parts = [list(eval_loader(data, 4, rank, 3)) for rank in range(3)]
    shared = sorted(key for part in parts for batch in part for key in batch.keys)
    assert shared == sorted(data.keys())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_worker_outlives_the_signals_of_a_scheduler(store: ClipStore, number: int) -> None:
    """They reach every process of a job, and the first one still saves: it needs its batches."""
    before = set(multiprocessing.active_children())
    batches = train_loader(dataset(store, load_frames=False), 4, workers=1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, number)
    time.sleep(0.1)
    assert [next(batches).sample_ids[0].item() for _ in range(4)] == [4, 8, 12, 16]


def test_evaluation_captions_do_not_depend_on_the_batch(store: ClipStore) -> None:
    data = dataset(store, "val", drop=False)
    for size in (1, 3, 50):
        texts = [text for batch in eval_loader(data, size) for text in batch.captions]
        assert texts == [text for batch in eval_loader(data, 4) for text in batch.captions]


def test_a_slice_that_does_not_exist_is_refused(store: ClipStore) -> None:
    data = dataset(store)
    for bad in ({"rank": 2, "world": 2}, {"first_sample_id": -1}):
        with pytest.raises(ValueError, match="no such slice"):
            train_loader(data, 4, **bad)
    with pytest.raises(ValueError, match="no such slice"):
        eval_loader(data, 0)


# ---------------------------------------------------------------- images beside the clips


def test_images_come_with_their_own_captions_in_an_order_of_their_own(store: ClipStore) -> None:
    data = dataset(store, num_images=3)
    batch = next(train_loader(data, 4))
    assert batch.images is not None and batch.images.frames is not None
    assert batch.images.frames.shape == (12, 1, 8, 8, 3) and len(batch.images.captions) == 12
    assert batch.images.sample_ids.tolist() == list(range(12))
    for key, lines, frames in zip(
        batch.images.keys, batch.images.captions, batch.images.frames, strict=True
    ):
        clip = key.split(":")[0]
        assert (frames == clip_value(clip)).all()
        assert any(clip in line for line in lines) or all("light" in line for line in lines)
    epoch = [data.image_pointer(c).index for c in range(len(data))]
    assert sorted(epoch) == list(range(len(data)))
    assert epoch != [data.pointer(c).index for c in range(len(data))]
    assert next(eval_loader(data, 4)).images is None


def test_images_are_drawn_of_all_frames_with_captions_of_their_own_draw(tmp_path: Path) -> None:
    """One clip of four frames: each frame is met, and the lines are not those of the clip."""
    settings = StoreSettings(8.0, 4, 8)
    write_store(tmp_path, {"a": [clip_id(1)]}, settings)
    with ShardWriter(tmp_path, "a", settings, 1) as writer:
        writer.append(grey_steps(4, 8, 8, step=10), np.arange(4) / 8)
    data = dataset(ClipStore.open(tmp_path, {"train": 1.0}), num_images=1)
    batch = next(train_loader(data, 60))
    assert batch.images is not None and batch.images.frames is not None
    values = Counter(batch.images.frames[:, 0, 0, 0, 0].tolist())
    assert set(values) == {0, 10, 20, 30} and min(values.values()) > 5
    same = [a == b for a, b in zip(batch.captions, batch.images.captions, strict=True)]
    assert 5 < sum(same) < 55


def test_images_do_not_depend_on_ranks_and_workers(store: ClipStore) -> None:
    """And the clips beside them are those of training without images."""
    data = dataset(store, num_images=2)
    alone = list(islice(train_loader(data, 8), 3))
    ranks = [train_loader(data, 4, rank, 2, workers=rank) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=False):
        images = [part.images for part in parts]
        assert [k for part in images for k in part.keys] == whole.images.keys
        assert torch.equal(torch.cat([part.frames for part in images]), whole.images.frames)
    assert same(replace(alone[1], images=None), list(islice(train_loader(dataset(store), 8), 2))[1])


@pytest.mark.parametrize("encoding", ["raw", "h264"])
def test_stills_are_the_frames_of_their_windows(tmp_path: Path, encoding: str) -> None:
    settings = StoreSettings(8.0, 4, 16, encoding=encoding)
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)
    windows = [encode_window(f, 8.0) for f in frames] if encoding == "h264" else list(frames)
    with ShardWriter(tmp_path, "a", settings, 3, sum(w.size for w in windows)) as writer:
        for window in windows:
            writer.append(window, np.arange(4) / 8)
    clips = [Place(clip_id(k), "a", k, 0, k) for k in range(3)]
    store = ClipStore(tmp_path, settings, clips, {"train": 1.0}, 0)
    whole = store.frames([0, 1, 2])
    stills = store.stills([2, 0, 2, 1], [3, 1, 0, 2])
    assert np.array_equal(stills, whole[[2, 0, 2, 1], [3, 1, 0, 2]])
