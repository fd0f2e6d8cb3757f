"""The store that preprocess writes and every stage reads: all windows of all shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle2_video.data.config import DataConfig, StoreSettings
from dalle2_video.data.media.decode import decode_window
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.sources.captions import Line, in_order
from dalle2_video.data.store.shard import (
    ShardReader,
    StoreError,
    check_shard,
    index_paths,
    read_index,
    shard_paths,
)
from dalle2_video.data.store.splits import assign_splits, split_of, youtube_id
from dalle2_video.data.store.texts import ShardTexts


class Place(NamedTuple):
    """Where a window lies: clip id, shard, row of its frames, number in its clip, row of texts; and
    the group that it shares its split with, None: the id of its video. image: it is an image, row
    in "stills".
    """

    clip: str
    shard: str
    row: int
    window: int
    text_row: int
    group: str | None = None
    image: bool = False


class ClipStore:
    """All windows of the kept clips of a preprocessed folder, in a fixed order: shards by name,
    then rows; then its images, in the same order.

    A window is what training calls a clip: addressed by its position 0 .. len - 1, with the clip id
    in `clip_ids`, its number within that clip in `windows`, and what it shares its split with in
    `groups`. warnings: what a user should know of the splits. draw_windows: whether training takes
    one window of a clip per epoch. Each process opens its own file handles, so an instance may be
    forked or pickled into workers. Images follow at len .. len + num_images - 1; as a window, one
    is a still video.
    """

    def __init__(
        self,
        root: Path,
        settings: StoreSettings,
        clips: list[Place],
        splits: Mapping[str, float],
        split_seed: int,
        draw_windows: bool = False,
    ) -> None:
        self.draw_windows = draw_windows
        self.root, self.settings = root, settings
        self.splits, self.split_seed = dict(splits), split_seed
        clips = sorted(clips, key=lambda clip: clip.image)
        self.groups, self.warnings = _groups(clips, splits)
        self.num_images = sum(clip.image for clip in clips)
        self.clip_ids = [clip.clip for clip in clips]
        self.shards = sorted({clip.shard for clip in clips})
        number = {shard: i for i, shard in enumerate(self.shards)}
        self.windows = np.array([clip.window for clip in clips], np.int32)
        self._shard = np.array([number[clip.shard] for clip in clips], np.int32)
        self._row = np.array([clip.row for clip in clips], np.int64)
        self._text_row = np.array([clip.text_row for clip in clips], np.int64)
        self._handles: dict[str, ShardReader] = {}
        self._texts: dict[str, ShardTexts] = {}
        self._pid = os.getpid()
        self.split_of_group: dict[str, str] = {}
        if splits:
            # No split shall lack videos, so groups of images alone do not count.
            made = assign_splits(self.groups[: len(self)] or self.groups, split_seed, splits)
            others = set(self.groups) - made.of_group.keys()
            self.split_of_group = made.of_group | {
                group: split_of(group, split_seed, splits) for group in others
            }
            self.warnings += made.warnings
        if self.num_images and not len(self):
            self.warnings.append("there are images only: a U-Net trains on videos")

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        splits: Mapping[str, float],
        split_seed: int = 0,
        draw_windows: bool = False,
    ) -> ClipStore:
        """Reads the index. StoreError, naming the file, for a missing or mismatched shard.

        splits: name -> fraction, and split_seed, as `assign_splits` takes them.
        """
        root = Path(root)
        paths = index_paths(root)
        if not paths:
            raise StoreError(f"{root} holds no preprocessed clips (index/*.json): run preprocess")
        clips: list[Place] = []
        settings: StoreSettings | None = None
        home: dict[str, str] = {}
        for path in paths:
            index = read_index(path)
            made = StoreSettings(**index["settings"])
            if settings is not None and made != settings:
                raise StoreError(f"{path} was made with {made}, other shards with {settings}")
            settings = made
            kept = [clip for clip in index["clips"] if clip["status"] == "kept"]
            rows = stills = 0
            for number, clip in enumerate(kept):
                other = home.setdefault(clip["clip"], path.stem)
                if other != path.stem:
                    raise StoreError(f"clip {clip['clip']} is in two shards: {other}, {path.stem}")
                group = clip.get("group")
                if clip.get("image"):
                    where = clip["row"], 0, number
                    clips.append(Place(clip["clip"], path.stem, *where, group, image=True))
                    stills += 1
                for window in range(clip["windows"]):
                    row = clip["row"] + window
                    clips.append(Place(clip["clip"], path.stem, row, window, number, group))
                    rows += 1
            check_shard(root, path.stem, made, rows, stills)
        assert settings is not None
        return cls(root, settings, clips, splits, split_seed, draw_windows)

    def __len__(self) -> int:
        """How many windows of videos there are."""
        return len(self.clip_ids) - self.num_images

    def home(self, clip: int) -> str:
        """The name of the shard that holds position `clip`."""
        return self.shards[self._shard[clip]]

    def shard_numbers(self, clips: Sequence[int]) -> np.ndarray:
        """int32: the place in `shards` of each position."""
        return self._shard[np.asarray(clips, np.int64)]

    def key(self, clip: int) -> str:
        """The clip key "<clip id>:<window>" of position `clip`."""
        return f"{self.clip_ids[clip]}:{self.windows[clip]}"

    def split(self, name: str) -> list[int]:
        """Positions of the windows of one split, in order; StoreError for an unknown name."""
        return self._of_split(name, range(len(self)))

    def images(self, name: str) -> list[int]:
        """Positions of the images of one split, in order; StoreError for an unknown name."""
        return self._of_split(name, range(len(self), len(self.clip_ids)))

    def describe(self, name: str) -> str:
        """A split in words: its name, windows, and images where there are any."""
        images = len(self.images(name))
        return f"{name} {len(self.split(name))}" + (f" and {images} images" if images else "")

    def _of_split(self, name: str, positions: range) -> list[int]:
        if name not in self.splits:
            raise StoreError(f"no split {name!r}; data.splits has {', '.join(self.splits)}")
        return [i for i in positions if self.split_of_group[self.groups[i]] == name]

    def frames(self, clips: Sequence[int]) -> np.ndarray:
        """uint8 (B, F, H, W, 3) of the given positions, in the given order, read in file order.

        StoreError, naming shard and clip, where a stored video is damaged.
        """
        out = np.empty((len(clips), *self.settings.shape), np.uint8)
        positions = np.asarray(clips, np.int64)
        order = np.lexsort((self._row[positions], self._shard[positions]))
        for clip in positions[order].tolist():
            if not self.is_image(clip):
                self._open(self.home(clip)).expect(int(self._row[clip]))
        for i in order:
            clip = int(positions[i])
            if self.is_image(clip):
                out[i] = self._still(clip)
                continue
            if self.settings.encoding == "raw":
                self._open(self.home(clip)).read_frames(int(self._row[clip]), out[i])
                continue
            try:
                decode_window(self.stored(clip), out[i])
            except ClipError as error:
                raise StoreError(f"{self.home(clip)}: {self.key(clip)}: {error}") from error
        return out

    def stills(self, clips: Sequence[int], frames: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3): frame number frames[i] of position clips[i]; raw reads no other. An
        image has the same at every number.
        """
        out = np.empty((len(clips), *self.settings.shape[1:]), np.uint8)
        raw = self.settings.encoding == "raw"
        for clip, frame in zip(clips, frames, strict=True):
            if raw and not self.is_image(clip):
                self._open(self.home(clip)).expect(int(self._row[clip]), frame)
        for i in np.argsort(np.asarray(clips), kind="stable"):
            clip, frame = clips[i], frames[i]
            if self.is_image(clip):
                out[i] = self._still(clip)
            elif raw:
                self._open(self.home(clip)).read_frames(int(self._row[clip]), out[i], frame)
            else:
                out[i] = self.frames([clip])[0, frame]
        return out

    def is_image(self, clip: int) -> bool:
        """Whether position `clip` is an image."""
        return clip >= len(self)

    def _still(self, clip: int) -> np.ndarray:
        image = np.empty(self.settings.shape[1:], np.uint8)
        self._open(self.home(clip)).read_still(int(self._row[clip]), image)
        return image

    def stored(self, clip: int) -> np.ndarray:
        """uint8 (bytes,): the window at position `clip` as it lies on disk, or the image."""
        if self.is_image(clip):
            return self._still(clip).reshape(-1)
        return self._open(self.home(clip)).stored(int(self._row[clip]))

    def timestamps(self, clip: int) -> np.ndarray:
        """float64 (F,): the time stamps in seconds of the clip's frames; zeros of an image."""
        if self.is_image(clip):
            return np.zeros(self.settings.num_frames)
        return self._open(self.home(clip)).timestamps(int(self._row[clip]))

    @cached_property
    def categories(self) -> list[str]:
        """The categories of captions that any clip of the store has, in order."""
        found = {name for shard in self.shards for name in self._texts_of(shard).used()}
        return sorted(found, key=in_order)

    def lines(self, clip: int) -> dict[str, list[Line]]:
        """The clip's lines by category, with their tokens."""
        return self._texts_of(self.home(clip)).lines(int(self._text_row[clip]))

    def _texts_of(self, shard: str) -> ShardTexts:
        if shard not in self._texts:
            self._texts[shard] = ShardTexts(shard_paths(self.root, shard)[1])
        return self._texts[shard]

    def _open(self, shard: str) -> ShardReader:
        if self._pid != os.getpid():  # a forked child opens its own
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            path = shard_paths(self.root, shard)[0]
            try:
                self._handles[shard] = ShardReader(path, self.settings)
            except (OSError, KeyError) as error:
                raise StoreError(f"{path} cannot be read: {error}") from error
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_texts": {}}


def _groups(clips: Sequence[Place], splits: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """(group of each position, warnings): clips of one group alone are groups by themselves."""
    groups = [sys.intern(youtube_id(c.clip) if c.group is None else c.group) for c in clips]
    ids = [clip.clip for clip in clips]
    several = sum(fraction > 0 for fraction in splits.values()) > 1
    if several and len(set(groups)) == 1 and len(set(ids)) > 1:
        cause = (
            f"all clips are of one group, {groups[0]}: they are split one by one, so what is "
            "measured on val may be known from train"
        )
        return ids, [cause]
    return groups, []


def open_store(config: DataConfig) -> ClipStore:
    """The store of this configuration; StoreError where it is absent or made otherwise."""
    draw = config.windows == "random"
    store = ClipStore.open(config.store, config.splits, config.split_seed, draw)
    if store.settings != config.settings:
        raise StoreError(
            f"{config.store} holds clips of {store.settings}, data asks for {config.settings}: "
            "choose another data.out, or run preprocess with data.overwrite=true"
        )
    return store
