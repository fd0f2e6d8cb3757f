"""What preprocess writes and every stage reads: shards of frames, their texts, and an index.

<root>/videos/<shard>.h5    a row per window; raw: "frames" uint8 RGB (N, F, H, W, 3); h264: "video"
                            uint8, a small video per row end to end, and "end" int64 (N,); both:
                            "times" float64 (N, F) seconds; attributes: settings. All contiguous
<root>/texts/<shard>.pt     the tokens and the words of every line of every category, flat tensors
<root>/index/<shard>.json   every clip of the archive: status, first row and number of windows, or
                            cause; written last, so a shard without it does not exist
<root>/manifest.json        all that was skipped and why, over all shards

Every file is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from dalle2_video.data.atomic import whole
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.video import decode_window, has_view
from dalle2_video.data.sources.captions import Line
from dalle2_video.data.store.texts import ShardTexts, StoreError

__all__ = ["ClipStore", "Settings", "ShardWriter", "StoreError", "split_of", "youtube_id"]

FORMAT = 3
CHOICES = {"span": ("first", "full"), "windows": ("one", "all"), "encoding": ("raw", "h264")}


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
    """How the clips of a store were made.

    fps, num_frames, size: frames per second, frames per window, side in pixels. span: "first" takes
    the first num_frames / fps seconds, "full" spreads the frames over the whole clip (fps is then
    only the rate at which they are shown). windows: "one", or "all" that fit into the clip, end to
    end. encoding: "raw" frames, or "h264", visually lossless and decoded on reading.
    """

    fps: float
    num_frames: int
    size: int
    span: str = "first"
    windows: str = "one"
    encoding: str = "raw"

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.num_frames < 1 or self.size < 1:
            raise ValueError("fps, num_frames and size must be positive")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)}")
        if self.span == "full" and self.windows == "all":
            raise ValueError("span=full makes one window of the whole clip: windows must be one")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3) of one window."""
        return self.num_frames, self.size, self.size, 3

    def has_view(self, num_frames: int, size: int) -> bool:
        """Whether `to_float` can show a window to a network of that many frames and pixels."""
        return has_view(self.num_frames, self.size, num_frames, size)

    def view_fps(self, num_frames: int) -> float:
        """Frames per second of such a view."""
        return self.fps * num_frames / self.num_frames


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Context that appends `rows` windows to videos/<shard>.h5; it appears if the block ends well.

    num_bytes: of all windows together, which "h264" needs to know beforehand.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        shard: str,
        settings: Settings,
        rows: int,
        num_bytes: int = 0,
    ) -> None:
        self.settings, self.rows, self.num_bytes = settings, rows, num_bytes
        self._row = self._byte = 0
        self._whole = whole(Path(root) / "videos" / f"{shard}.h5")

    def __enter__(self) -> ShardWriter:
        rows, shape = self.rows, self.settings.shape
        self._file = h5py.File(self._whole.__enter__(), "w")
        self._file.attrs.update(format=FORMAT, **asdict(self.settings))
        if self.settings.encoding == "raw":
            self._frames = self._file.create_dataset("frames", (rows, *shape), np.uint8)
        else:
            self._frames = self._file.create_dataset("video", (self.num_bytes,), np.uint8)
            self._end = self._file.create_dataset("end", (rows,), np.int64)
        self._times = self._file.create_dataset("times", (rows, shape[0]), "<f8")
        return self

    def append(self, window: np.ndarray, times: np.ndarray) -> int:
        """Adds a window and its float64 (F,) seconds; returns the row.

        window: uint8, (F, H, W, 3) or flat where raw; the bytes of its video where h264. ValueError
        for another shape, or more windows or bytes than were announced.
        """
        row, shape = self._row, self.settings.shape
        raw = self.settings.encoding == "raw"
        if window.dtype != np.uint8 or (raw and window.size != math.prod(shape)):
            raise ValueError(f"a clip must be uint8 {shape}, not {window.dtype} {window.shape}")
        end = self._byte + window.size
        if row == self.rows or not (raw or end <= self.num_bytes):
            raise ValueError(f"a shard of {self.rows} windows, {self.num_bytes} bytes is full")
        self._times[row] = times
        if raw:
            self._frames[row] = window.reshape(shape)
        else:
            self._frames[self._byte : end] = window
            self._end[row] = end
        self._row, self._byte = row + 1, end
        return row

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._row < self.rows:
            error = ValueError(f"a shard of {self.rows} windows got {self._row}")
            self._whole.__exit__(ValueError, error, None)
            raise error
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
        raise StoreError(
            f"{path} has format {index.get('format')}, this code reads {FORMAT}: run preprocess"
        )
    return index


def stands(path: Path) -> bool:
    """Whether an index is there, whole and of this format."""
    try:
        read_index(path)
    except (OSError, StoreError):
        return False
    return True


class Place(NamedTuple):
    """Where a window lies: clip id, shard, row of its frames, number in its clip, row of texts."""

    clip: str
    shard: str
    row: int
    window: int
    text_row: int


class ClipStore:
    """All windows of the kept clips of a preprocessed folder, in a fixed order: shards by name,
    then rows.

    A window is what training calls a clip: addressed by its position 0 .. len - 1, with the clip id
    in `clip_ids` and its number within that clip in `windows`. Each process opens its
    own file handles, so an instance may be forked or pickled into workers.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        clips: list[Place],
        splits: Mapping[str, float],
        split_seed: int,
    ) -> None:
        self.root, self.settings = root, settings
        self.splits, self.split_seed = dict(splits), split_seed
        self.clip_ids = [clip.clip for clip in clips]
        self.shards = sorted({clip.shard for clip in clips})
        number = {shard: i for i, shard in enumerate(self.shards)}
        self.windows = np.array([clip.window for clip in clips], np.int32)
        self._shard = np.array([number[clip.shard] for clip in clips], np.int32)
        self._row = np.array([clip.row for clip in clips], np.int64)
        self._text_row = np.array([clip.text_row for clip in clips], np.int64)
        self._handles: dict[str, _Shard] = {}
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
        clips: list[Place] = []
        settings: Settings | None = None
        home: dict[str, str] = {}
        for path in paths:
            index = read_index(path)
            made = Settings(**index["settings"])
            if settings is not None and made != settings:
                raise StoreError(f"{path} was made with {made}, other shards with {settings}")
            settings = made
            kept = [clip for clip in index["clips"] if clip["status"] == "kept"]
            rows = 0
            for number, clip in enumerate(kept):
                other = home.setdefault(clip["clip"], path.stem)
                if other != path.stem:
                    raise StoreError(f"clip {clip['clip']} is in two shards: {other}, {path.stem}")
                for window in range(clip["windows"]):
                    row = clip["row"] + window
                    clips.append(Place(clip["clip"], path.stem, row, window, number))
                    rows += 1
            _check_shard(root, path.stem, made, rows)
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
        """The clip key "<clip id>:<window>" of position `clip`."""
        return f"{self.clip_ids[clip]}:{self.windows[clip]}"

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
        """uint8 (B, F, H, W, 3) of the given positions, in the given order, read in file order.

        StoreError, naming shard and clip, where a stored video is damaged.
        """
        out = np.empty((len(clips), *self.settings.shape), np.uint8)
        positions = np.asarray(clips, np.int64)
        order = np.lexsort((self._row[positions], self._shard[positions]))
        for clip in positions[order].tolist():
            self._open(self.home(clip)).expect(int(self._row[clip]))
        for i in order:
            clip = int(positions[i])
            if self.settings.encoding == "raw":
                self._open(self.home(clip)).read_frames(int(self._row[clip]), out[i])
                continue
            try:
                decode_window(self.stored(clip), out[i])
            except ClipError as error:
                raise StoreError(f"{self.home(clip)}: {self.key(clip)}: {error}") from error
        return out

    def stills(self, clips: Sequence[int], frames: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3): frame number frames[i] of position clips[i]; raw reads no other."""
        out = np.empty((len(clips), *self.settings.shape[1:]), np.uint8)
        if self.settings.encoding == "raw":
            for clip, frame in zip(clips, frames, strict=True):
                self._open(self.home(clip)).expect(int(self._row[clip]), frame)
        for i in np.argsort(np.asarray(clips), kind="stable"):
            clip, frame = clips[i], frames[i]
            if self.settings.encoding == "raw":
                self._open(self.home(clip)).read_frames(int(self._row[clip]), out[i], frame)
            else:
                out[i] = self.frames([clip])[0, frame]
        return out

    def stored(self, clip: int) -> np.ndarray:
        """uint8 (bytes,): the window at position `clip` as it lies on disk."""
        return self._open(self.home(clip)).stored(int(self._row[clip]))

    def times(self, clip: int) -> np.ndarray:
        """float64 (F,): the time stamps in seconds of the clip's frames."""
        return self._open(self.home(clip)).times(int(self._row[clip]))

    def lines(self, clip: int) -> dict[str, list[Line]]:
        """The clip's lines by category, with their tokens."""
        shard = self.home(clip)
        if shard not in self._texts:
            self._texts[shard] = ShardTexts(self.root / "texts" / f"{shard}.pt")
        return self._texts[shard].lines(int(self._text_row[clip]))

    def _open(self, shard: str) -> _Shard:
        if self._pid != os.getpid():  # a forked child opens its own
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            path = self.root / "videos" / f"{shard}.h5"
            try:
                self._handles[shard] = _Shard(path, self.settings)
            except (OSError, KeyError) as error:
                raise StoreError(f"{path} cannot be read: {error}") from error
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_texts": {}}


class _Shard:
    """An open videos/<shard>.h5, read by its offsets.

    HDF5 says where the contiguous data sets lie, and is closed again: an open HDF5 file takes 1 MB,
    one more in a worker for every shard, and a read through it four times as long.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.shape = path, settings.shape
        raw = settings.encoding == "raw"
        with h5py.File(path, "r", locking=False) as file:
            self.end = None if raw else _data(file, "end")[:]
            self.frames_at = _data(file, "frames" if raw else "video").id.get_offset()
            self.times_at = _data(file, "times").id.get_offset()
        self.file = open(path, "rb", buffering=0)

    def expect(self, row: int, frame: int | None = None) -> None:
        """Lets the system begin to read a row, or one frame of a raw one: a disk serves many
        requests at once faster.
        """
        if self.frames_at is None or not hasattr(os, "posix_fadvise"):
            return
        if self.end is not None:
            begin, end = int(self.end[row - 1]) if row else 0, int(self.end[row])
        else:
            one = math.prod(self.shape[1:])
            begin = (row * self.shape[0] + (frame or 0)) * one
            end = begin + (self.shape[0] if frame is None else 1) * one
        place = self.frames_at + begin
        os.posix_fadvise(self.file.fileno(), place, end - begin, os.POSIX_FADV_WILLNEED)

    def read_frames(self, row: int, out: np.ndarray, first: int = 0) -> None:
        """Fills uint8 (..., H, W, 3) with a raw row's frames from number `first` on."""
        self._fill(out, self.frames_at, (row * self.shape[0] + first) * math.prod(self.shape[1:]))

    def stored(self, row: int) -> np.ndarray:
        """uint8 (bytes,): a row as it lies on disk."""
        if self.end is None:
            out = np.empty(math.prod(self.shape), np.uint8)
            self._fill(out, self.frames_at, row * out.nbytes)
            return out
        begin = int(self.end[row - 1]) if row else 0
        out = np.empty(int(self.end[row]) - begin, np.uint8)
        self._fill(out, self.frames_at, begin)
        return out

    def times(self, row: int) -> np.ndarray:
        """float64 (F,)."""
        out = np.empty(self.shape[0], "<f8")
        self._fill(out, self.times_at, row * out.nbytes)
        return out

    def _fill(self, out: np.ndarray, base: int | None, place: int) -> None:
        rest, number = out.data.cast("B"), self.file.fileno()
        while len(rest) and base is not None:
            read = os.preadv(number, [rest], base + place)
            if read == 0:
                raise StoreError(
                    f"{self.path} is damaged: it ends early; delete it, run preprocess"
                )
            rest, place = rest[read:], place + read


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
            data = _data(file, "frames" if settings.encoding == "raw" else "end")
            shape = data.shape if settings.encoding == "raw" else (*data.shape, *settings.shape)
    except (OSError, KeyError) as error:
        raise StoreError(f"{video} is damaged ({error}): delete it, run preprocess") from error
    if shape != (rows, *settings.shape):
        raise StoreError(f"{video} holds {shape}, index/{shard}.json says {rows} windows")
