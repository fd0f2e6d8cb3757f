"""The files of a shard: their format, their paths, writing and reading one.

<root>/videos/<shard>.h5    a row per window; raw: "frames" uint8 RGB (N, F, H, W, 3); h264: "video"
                            uint8, a small video per row end to end, and "end" int64 (N,); both:
                            "times" float64 (N, F) seconds; where there are images, "stills"
                            uint8 RGB (M, H, W, 3); attributes: settings. All contiguous
<root>/texts/<shard>.pt     the tokens and the words of every line of every category, flat tensors
<root>/index/<shard>.json   every clip of the archive: status, first row and number of windows, or
                            cause; written last, so a shard without it does not exist. An image has
                            "image": true, no window, and its row in "stills"
<root>/manifest.json        all that was skipped and why, over all shards

Every file is written under a temporary name and renamed when whole.

Letters: N windows and M images of the shard, F frames, H W pixels.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dalle2_video.data.atomic import whole
from dalle2_video.data.config import StoreSettings
from dalle2_video.errors import UserError

FORMAT = 3
TIMESTAMPS = "times"  # the data set's name belongs to the file format and stays


class StoreError(UserError, RuntimeError):
    """The store is missing, damaged or made with other settings; the message names the file."""


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


def is_whole_index(path: Path) -> bool:
    """Whether an index is there, whole and of this format."""
    try:
        read_index(path)
    except (OSError, StoreError):
        return False
    return True


class ShardWriter:
    """Context that appends `rows` windows to videos/<shard>.h5; it appears if the block ends well.

    num_bytes: of all windows together, which "h264" needs to know beforehand. stills: images,
    which are stored raw.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        shard: str,
        settings: StoreSettings,
        rows: int,
        num_bytes: int = 0,
        stills: int = 0,
    ) -> None:
        self.settings, self.rows, self.num_bytes, self.stills = settings, rows, num_bytes, stills
        self._row = self._byte = self._still = 0
        self._whole = whole(shard_paths(Path(root), shard)[0])

    def __enter__(self) -> ShardWriter:
        rows, shape = self.rows, self.settings.shape
        self._file = h5py.File(self._whole.__enter__(), "w")
        self._file.attrs.update(format=FORMAT, **asdict(self.settings))
        if self.settings.encoding == "raw":
            self._frames = self._file.create_dataset("frames", (rows, *shape), np.uint8)
        else:
            self._frames = self._file.create_dataset("video", (self.num_bytes,), np.uint8)
            self._end = self._file.create_dataset("end", (rows,), np.int64)
        self._timestamps = self._file.create_dataset(TIMESTAMPS, (rows, shape[0]), "<f8")
        if self.stills:
            self._stills = self._file.create_dataset("stills", (self.stills, *shape[1:]), np.uint8)
        return self

    def append(self, window: np.ndarray, timestamps: np.ndarray) -> int:
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
        self._timestamps[row] = timestamps
        if raw:
            self._frames[row] = window.reshape(shape)
        else:
            self._frames[self._byte : end] = window
            self._end[row] = end
        self._row, self._byte = row + 1, end
        return row

    def append_still(self, image: np.ndarray) -> int:
        """Adds an image, uint8 (H, W, 3) or flat; returns its row in "stills"."""
        if self._still == self.stills:
            raise ValueError(f"a shard of {self.stills} images is full")
        self._stills[self._still] = image.reshape(self.settings.shape[1:])
        self._still += 1
        return self._still - 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and (self._row, self._still) != (self.rows, self.stills):
            error = ValueError(
                f"a shard of {self.rows} windows and {self.stills} images got {self._row} and "
                f"{self._still}"
            )
            self._whole.__exit__(ValueError, error, None)
            raise error
        self._whole.__exit__(kind, error, trace)


class ShardReader:
    """An open videos/<shard>.h5, read by its offsets.

    HDF5 gives the offsets of the contiguous data sets and is closed again: an open HDF5 file takes
    1 MB in every worker, and a read through it takes four times as long.
    """

    def __init__(self, path: Path, settings: StoreSettings) -> None:
        self.path, self.shape = path, settings.shape
        raw = settings.encoding == "raw"
        with h5py.File(path, "r", locking=False) as file:
            self.end = None if raw else _data(file, "end")[:]
            self.frames_at = _data(file, "frames" if raw else "video").id.get_offset()
            self.timestamps_at = _data(file, TIMESTAMPS).id.get_offset()
            self.stills_at = _data(file, "stills").id.get_offset() if "stills" in file else None
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

    def read_still(self, row: int, out: np.ndarray) -> None:
        """Fills uint8 (H, W, 3) with an image."""
        self._fill(out, self.stills_at, row * math.prod(self.shape[1:]))

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

    def timestamps(self, row: int) -> np.ndarray:
        """float64 (F,): seconds since the first frame of the video, of each frame of a row."""
        out = np.empty(self.shape[0], "<f8")
        self._fill(out, self.timestamps_at, row * out.nbytes)
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


def check_shard(root: Path, shard: str, settings: StoreSettings, rows: int, stills: int) -> None:
    """StoreError where the files of a shard are missing, damaged, or hold another number of windows
    or images than its index.
    """
    video, text, _ = shard_paths(root, shard)
    for path in (video, text):
        if not path.is_file():
            raise StoreError(f"{path} is missing, but index/{shard}.json lists it")
    try:
        with h5py.File(video, "r", locking=False) as file:
            data = _data(file, "frames" if settings.encoding == "raw" else "end")
            shape = data.shape if settings.encoding == "raw" else (*data.shape, *settings.shape)
            found = _data(file, "stills").shape[0] if "stills" in file else 0
    except (OSError, KeyError) as error:
        raise StoreError(f"{video} is damaged ({error}): delete it, run preprocess") from error
    if shape != (rows, *settings.shape):
        raise StoreError(f"{video} holds {shape}, index/{shard}.json says {rows} windows")
    if found != stills:
        raise StoreError(f"{video} holds {found} images, index/{shard}.json says {stills}")


def _data(file: h5py.File, name: str) -> h5py.Dataset:
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        raise KeyError(f"{name} is no data set")
    return data
