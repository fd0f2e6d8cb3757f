"""What preprocess writes and every stage reads: shards of frames, their texts, and an index.

<root>/videos/<shard>.h5    "frames" uint8 RGB (N, F, H, W, 3), one chunk per clip; "times" float64
                            (N, F) seconds; attributes fps, size, num_frames
<root>/texts/<shard>.pt     the tokens and the words of every line of every category, flat tensors
<root>/index/<shard>.json   every clip of the archive: row, status, cause; written last, so a shard
                            without it does not exist
<root>/manifest.json        all that was skipped and why, over all shards

Every file is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dalle2_video.data.atomic import whole
from dalle2_video.data.captions import Line
from dalle2_video.data.texts import ShardTexts, StoreError

__all__ = ["ClipStore", "Settings", "ShardWriter", "StoreError", "split_of", "youtube_id"]

FORMAT = 1


def split_of(youtube_id: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of everything that comes from one video: a pure function of (id, seed).

    The id's hash gives a number in [0, 1), which falls into the cumulated fractions in the order
    of the mapping. So clips of one person in one video stay together, and adding archives later
    moves nobody.
    """
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or abs(total - 1) > 1e-6:
        raise ValueError(f"split fractions must be at least 0 and sum to 1: {dict(fractions)}")
    digest = hashlib.blake2b(f"{seed}/{youtube_id}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if point < edge:
            return name
    return [name for name in fractions if fractions[name] > 0][-1]


def youtube_id(clip_id: str) -> str:
    """The first 11 characters of a clip id, always: an id itself may hold '_' and '-'."""
    return clip_id[:11]


@dataclass(frozen=True)
class Settings:
    """How the frames of a store were made: frames per second, frames per clip, side in pixels."""

    fps: float
    num_frames: int
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3) of one clip."""
        return self.num_frames, self.size, self.size, 3


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Context that appends clips to videos/<shard>.h5; the shard appears if the block ends well."""

    def __init__(self, root: str | os.PathLike[str], shard: str, settings: Settings) -> None:
        self.settings = settings
        self._whole = whole(Path(root) / "videos" / f"{shard}.h5")

    def __enter__(self) -> ShardWriter:
        shape = self.settings.shape
        self._file = h5py.File(self._whole.__enter__(), "w")
        self._file.attrs.update(
            format=FORMAT,
            fps=self.settings.fps,
            size=self.settings.size,
            num_frames=self.settings.num_frames,
        )
        self._frames = self._file.create_dataset(
            "frames", (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape)
        )
        self._times = self._file.create_dataset(
            "times", (0, shape[0]), np.float64, maxshape=(None, shape[0]), chunks=(64, shape[0])
        )
        return self

    def append(self, frames: np.ndarray, times: np.ndarray) -> int:
        """Adds uint8 (F, H, W, 3) and float64 (F,) seconds; returns the row."""
        row = len(self._frames)
        if frames.shape != self.settings.shape or frames.dtype != np.uint8:
            raise ValueError(f"a clip must be uint8 {self.settings.shape}, not {frames.shape}")
        self._frames.resize(row + 1, 0)
        self._times.resize(row + 1, 0)
        self._frames[row], self._times[row] = frames, times
        return row

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._whole.__exit__(kind, error, trace)


# ---------------------------------------------------------------- reading


def shard_paths(root: Path, shard: str) -> tuple[Path, Path, Path]:
    """The three files of a shard: frames, texts, index."""
    return (
        root / "videos" / f"{shard}.h5",
        root / "texts" / f"{shard}.pt",
        root / "index" / f"{shard}.json",
    )


def index_paths(root: Path) -> list[Path]:
    """index/*.json by name; each stands for one whole shard."""
    return sorted(path for path in (root / "index").glob("*.json") if path.name[0] != ".")


def read_index(path: Path) -> dict[str, Any]:
    """index/<shard>.json; StoreError where it is damaged or of another format."""
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it, run preprocess") from error
    if index.get("format") != FORMAT:
        raise StoreError(f"{path} has format {index.get('format')}, this code reads {FORMAT}")
    return index


class ClipStore:
    """All kept clips of a preprocessed folder, in a fixed order: shards by name, then rows.

    Clips are addressed by their position 0 .. len - 1. Each process opens its own file handles, so
    an instance may be forked or pickled into workers.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        clips: list[tuple[str, str, int]],
        splits: Mapping[str, float],
        split_seed: int,
    ) -> None:
        self.root, self.settings = root, settings
        self.splits, self.split_seed = dict(splits), split_seed
        self.clip_ids = [clip_id for clip_id, _, _ in clips]
        self.shards = sorted({shard for _, shard, _ in clips})
        number = {shard: i for i, shard in enumerate(self.shards)}
        self._shard = np.array([number[shard] for _, shard, _ in clips], np.int32)
        self._row = np.array([row for _, _, row in clips], np.int64)
        self._handles: dict[str, h5py.File] = {}
        self._texts: dict[str, ShardTexts] = {}
        self._pid = os.getpid()

    @classmethod
    def open(
        cls, root: str | os.PathLike[str], splits: Mapping[str, float], split_seed: int = 0
    ) -> ClipStore:
        """Reads the index. StoreError, naming the file, for a missing or mismatched shard.

        splits: name -> fraction, and split_seed, as `split_of` takes them.
        """
        root = Path(root)
        paths = index_paths(root)
        if not paths:
            raise StoreError(f"{root} holds no preprocessed clips (index/*.json): run preprocess")
        clips: list[tuple[str, str, int]] = []
        settings: Settings | None = None
        home: dict[str, str] = {}
        for path in paths:
            index = read_index(path)
            made = Settings(**index["settings"])
            if settings is not None and made != settings:
                raise StoreError(f"{path} was made with {made}, other shards with {settings}")
            settings = made
            kept = [clip for clip in index["clips"] if clip["status"] == "kept"]
            for clip in kept:
                other = home.setdefault(clip["clip"], path.stem)
                if other != path.stem:
                    raise StoreError(f"clip {clip['clip']} is in two shards: {other}, {path.stem}")
                clips.append((clip["clip"], path.stem, clip["row"]))
            _check_shard(root, path.stem, made, len(kept))
        assert settings is not None
        return cls(root, settings, clips, splits, split_seed)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def home(self, clip: int) -> str:
        """The name of the shard that holds position `clip`."""
        return self.shards[self._shard[clip]]

    def shard_numbers(self, clips: Sequence[int]) -> np.ndarray:
        """int32: the place in `shards` of each position."""
        return self._shard[np.asarray(clips, np.int64)]

    def key(self, clip: int) -> str:
        """The clip key "<clip id>:<window>" of position `clip`; the one window so far is 0."""
        return f"{self.clip_ids[clip]}:0"

    def split(self, name: str) -> list[int]:
        """Positions of the clips of one split, in order; StoreError for an unknown name."""
        if name not in self.splits:
            raise StoreError(f"no split {name!r}; data.splits has {', '.join(self.splits)}")
        return [
            i
            for i, clip_id in enumerate(self.clip_ids)
            if split_of(youtube_id(clip_id), self.split_seed, self.splits) == name
        ]

    def frames(self, clips: Sequence[int]) -> np.ndarray:
        """uint8 (B, F, H, W, 3) of the given positions, in the given order, read in file order."""
        out = np.empty((len(clips), *self.settings.shape), np.uint8)
        positions = np.asarray(clips, np.int64)
        for i in np.lexsort((self._row[positions], self._shard[positions])):
            clip = positions[i]
            shard = self.shards[self._shard[clip]]
            _data(self._open(shard), "frames").read_direct(out, np.s_[self._row[clip]], np.s_[i])
        return out

    def times(self, clip: int) -> np.ndarray:
        """float64 (F,): the time stamps in seconds of the clip's frames."""
        return _data(self._open(self.shards[self._shard[clip]]), "times")[self._row[clip]]

    def lines(self, clip: int) -> dict[str, list[Line]]:
        """The clip's lines by category, with their tokens."""
        shard = self.shards[self._shard[clip]]
        if shard not in self._texts:
            self._texts[shard] = ShardTexts(self.root / "texts" / f"{shard}.pt")
        return self._texts[shard].lines(int(self._row[clip]))

    def _open(self, shard: str) -> h5py.File:
        if self._pid != os.getpid():  # a forked child must not share its parent's file offsets
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            path = self.root / "videos" / f"{shard}.h5"
            try:
                self._handles[shard] = h5py.File(path, "r", locking=False)
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error}") from error
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def _data(file: h5py.File, name: str) -> h5py.Dataset:
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        raise KeyError(f"{name} is no data set")
    return data


def _check_shard(root: Path, shard: str, settings: Settings, rows: int) -> None:
    video, text, _ = shard_paths(root, shard)
    for path in (video, text):
        if not path.is_file():
            raise StoreError(f"{path} is missing, but index/{shard}.json lists it")
    try:
        with h5py.File(video, "r", locking=False) as file:
            shape = _data(file, "frames").shape
    except (OSError, KeyError) as error:
        raise StoreError(f"{video} is damaged ({error}): delete it, run preprocess") from error
    if shape != (rows, *settings.shape):
        raise StoreError(f"{video} holds {shape}, index/{shard}.json says {rows} clips")
