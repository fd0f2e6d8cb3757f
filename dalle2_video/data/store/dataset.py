"""The data set of captioned clips: pointers to clips in a keyed order; collate loads.

The order of training is a function of (seed, global sample id): sample_id // n is the epoch, and
each epoch is its own permutation, which goes through the shards in groups. A micro-batch is named
by its sample ids alone, so any rank, worker or resumed run that asks for the same ones gets the
same frames and the same captions.
Evaluation goes once over a split in index order. Embeddings are found by clip key, never by place.

Letters: B clips, F frames, H W pixels, U unique caption lines, L lines per clip, T tokens, D width.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dalle2_video import keyed
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions, pack_lines
from dalle2_video.data.store.order import ClipOrder
from dalle2_video.data.store.shard import StoreError
from dalle2_video.data.store.store import ClipStore


class Embeddings(Protocol):
    """What the data set needs of an embedding cache: rows by clip key, float32 (B, D)."""

    def rows(self, keys: Sequence[str], /) -> Tensor: ...


def embedding_keys(store: ClipStore) -> list[str]:
    """The keys of every clip, split by split, images after videos: the order of a cache of
    embeddings.
    """
    return [
        store.key(clip)
        for split in store.splits
        for clip in (*store.split(split), *store.images(split))
    ]


class Pointer(NamedTuple):
    """One use of a clip: its global sample id, position in the split and key.

    num_images: single frames of any clips that come with it.
    """

    sample_id: int
    index: int
    key: str
    num_images: int = 0


@dataclass(frozen=True)
class Batch:
    """B clips.

    sample_ids int64 (B,); keys, "<clip id>:<window>"; frames uint8 RGB (B, F, H, W, 3) or None;
    tokens int64 (U, T), the unique lines; line_index int64 (B, L), -1 = no line; captions, the same
    lines in words; embeddings float32 (B, D), l2-normalised, or None. images: a batch of B x J
    clips of one frame, image j of clip b at b J + j, or None.
    """

    sample_ids: Tensor
    keys: list[str]
    frames: Tensor | None
    tokens: Tensor
    line_index: Tensor
    captions: list[list[str]]
    embeddings: Tensor | None
    images: Batch | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; sample_ids stay on the CPU as keys."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "sample_ids" and isinstance(value := getattr(self, field.name), Tensor)
        }
        images = None if self.images is None else self.images.to(device)
        return replace(self, **moved, images=images)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (a DataLoader calls this)."""
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        images = None if self.images is None else self.images.pin_memory()
        return replace(self, **pinned, images=images)


class CelebVTextDataset:
    """The clips of one split (windows, where the store holds several of a clip). Cheap to make:
    `pointer` names a clip, `collate` loads.

    seed keys the order and the caption choice; the store knows who is in which split.
    first_windows: one window of each clip, for evaluations that must not use a caption twice.
    num_images: single frames of any clips, and images, that come with each clip of training, each
    with its own caption and embedding; they have an order of their own. include_images: images
    are clips too, as still videos. Raises StoreError where the split has no clip.
    """

    def __init__(
        self,
        store: ClipStore,
        split: str,
        seed: int,
        captions: TrainingCaptions | EvaluationCaptions,
        embeddings: Embeddings | None = None,
        load_frames: bool = True,
        first_windows: bool = False,
        num_images: int = 0,
        include_images: bool = False,
    ) -> None:
        self.store, self.name, self.seed = store, split, seed
        self.captions, self.embeddings, self.load_frames = captions, embeddings, load_frames
        self.clips = store.split(split)
        if first_windows:
            self.clips = [clip for clip in self.clips if store.windows[clip] == 0]
        images = store.images(split)
        self.stills = [*self.clips, *images]  # what has a frame to draw
        if include_images:
            self.clips = self.stills
        if not self.clips:
            if images:
                raise StoreError(
                    f"split {split!r} of {store.root} has images only, and needs videos here"
                )
            raise StoreError(
                f"split {split!r} of {store.root} has none of its {len(store)} clips: "
                "preprocess more archives or change data.splits"
            )
        self.num_images, self._image_seed = num_images, keyed.key(seed, "seed", "images")
        self._check_presence()
        shards = store.shard_numbers(self.clips)
        # Of each clip that training goes through: its first window in the split, and how many.
        windows = store.windows[self.clips]
        is_first = windows == 0 if store.draw_windows else np.ones(len(windows), bool)
        self._first = np.flatnonzero(is_first)
        self._count = np.diff(self._first, append=len(windows))
        self._order = ClipOrder(len(self._first), seed, shards[self._first])
        shards = store.shard_numbers(self.stills)
        self._image_order = ClipOrder(len(self.stills), self._image_seed, shards)

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, index: int) -> str:
        """The clip key of the split's clip number `index`."""
        return self.store.key(self.clips[index])

    def keys(self) -> list[str]:
        """All clip keys of the split, in index order: the order of `eval_loader`."""
        return [self.key(index) for index in range(len(self))]

    def _check_presence(self) -> None:
        """StoreError where the caption policy names a category that no clip has."""
        policy = getattr(self.captions, "policy", None)
        for name in (policy.presence if policy else None) or {}:
            if name not in self.store.categories:
                raise StoreError(
                    f"captions.presence.{name}: no category of {self.store.root}; it has "
                    f"{', '.join(self.store.categories)}"
                )

    def pointer(self, sample_id: int) -> Pointer:
        """The window that training uses at this global sample id."""
        clip = self._order(sample_id)
        index = int(self._first[clip])
        if self._count[clip] > 1:
            index += keyed.key(self.seed, sample_id, "window") % int(self._count[clip])
        return Pointer(sample_id, index, self.key(index), self.num_images)

    def eval_pointer(self, index: int) -> Pointer:
        """The split's clip number `index`, which is its sample id too."""
        return Pointer(index, index, self.key(index))

    def image_pointer(self, sample_id: int) -> Pointer:
        """Whose frame training uses as image number `sample_id`: image j of clip c is c J + j. Its
        index counts the clips of the split, then its images.
        """
        index = self._image_order(sample_id)
        return Pointer(sample_id, index, self.store.key(self.stills[index]))

    def collate(self, pointers: Sequence[Pointer]) -> Batch:
        """Loads the frames, chooses the captions and looks the embeddings up by key."""
        batch = self._collate(pointers, self.seed, stills=False)
        sample_ids = [p.sample_id * p.num_images + j for p in pointers for j in range(p.num_images)]
        if not sample_ids:
            return batch
        pointers = [self.image_pointer(sample_id) for sample_id in sample_ids]
        images = self._collate(pointers, self._image_seed, stills=True)
        return replace(batch, images=images)

    def _collate(self, pointers: Sequence[Pointer], seed: int, stills: bool) -> Batch:
        """A batch without images; stills: of each clip one frame, drawn by its sample id."""
        places = self.stills if stills else self.clips
        clips = [places[pointer.index] for pointer in pointers]
        keys = [pointer.key for pointer in pointers]
        for pointer, clip in zip(pointers, clips, strict=True):
            if self.store.key(clip) != pointer.key:
                raise StoreError(f"pointer {pointer} names clip {self.store.key(clip)}")
        lines = pack_lines(
            [
                self.captions.choose(self.store.lines(clip), seed, pointer.sample_id, key)
                for pointer, clip, key in zip(pointers, clips, keys, strict=True)
            ]
        )
        frames = None
        if self.load_frames and stills:
            number = self.store.settings.num_frames
            chosen = [keyed.key(seed, pointer.sample_id, "frame") % number for pointer in pointers]
            frames = torch.from_numpy(self.store.stills(clips, chosen)).unsqueeze(1)
        elif self.load_frames:
            frames = torch.from_numpy(self.store.frames(clips))
        return Batch(
            sample_ids=torch.tensor([pointer.sample_id for pointer in pointers]),
            keys=keys,
            frames=frames,
            tokens=lines.tokens,
            line_index=lines.line_index,
            captions=lines.texts,
            embeddings=None if self.embeddings is None else self.embeddings.rows(keys),
        )


# ---------------------------------------------------------------- loaders


class _Batches(Dataset):
    """A torch data set whose item is a whole batch, named by its sample ids."""

    def __init__(self, dataset: CelebVTextDataset, train: bool) -> None:
        self.dataset, self.train = dataset, train

    def __getitem__(self, sample_ids: list[int]) -> Batch:
        point = self.dataset.pointer if self.train else self.dataset.eval_pointer
        return self.dataset.collate([point(sample_id) for sample_id in sample_ids])


class _TrainIds(Sampler):
    """Endless: micro-step k of rank r is [start + (k world + r) B, ... + B)."""

    def __init__(self, batch_size: int, rank: int, world: int, start: int) -> None:
        self.batch_size, self.rank, self.world, self.start = batch_size, rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.world * self.batch_size


class _EvalIds(Sampler):
    """0 .. num_clips - 1 in order, in batches; rank r takes batches r, r + world, ..."""

    def __init__(self, num_clips: int, batch_size: int, rank: int, world: int) -> None:
        starts = range(rank * batch_size, num_clips, world * batch_size)
        self.batches = [list(range(s, min(s + batch_size, num_clips))) for s in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def train_loader(
    dataset: CelebVTextDataset,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    first_sample_id: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless batches of `batch_size` clips for one rank, from sample id `first_sample_id` on.

    Global micro-step k covers sample_ids [start + k G, start + (k + 1) G), G = world x batch_size;
    rank r gets its contiguous slice. So the union over the ranks is the same for any number.
    """
    if not 0 <= rank < world or batch_size < 1 or first_sample_id < 0:
        raise ValueError(f"no such slice: {rank=} {world=} {batch_size=} {first_sample_id=}")
    sample_ids = _TrainIds(batch_size, rank, world, first_sample_id)
    return iter(_loader(_Batches(dataset, train=True), sample_ids, workers))


def eval_loader(
    dataset: CelebVTextDataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Once over the split in index order, every clip exactly once; the last batch may be smaller.

    With several ranks, rank r gets batches r, r + world, ... of that sequence.
    """
    if not 0 <= rank < world or batch_size < 1:
        raise ValueError(f"no such slice: {rank=} {world=} {batch_size=}")
    sample_ids = _EvalIds(len(dataset), batch_size, rank, world)
    return iter(_loader(_Batches(dataset, train=False), sample_ids, workers))


def _loader(batches: _Batches, sample_ids: Sampler, workers: int) -> DataLoader:
    return DataLoader(
        batches,
        sampler=sample_ids,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """A scheduler may signal every process of a job: a worker ends with its parent, not before."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
