"""The clips of a shard under way, on disk as they come: after kill -9 the next run goes on there.

Two hidden files beside the shards, gone when the shard stands whole:

<folder>/.<shard>.frames.partial   windows of the kept clips as the shard stores them, end to end
<folder>/.<shard>.clips.partial    a JSON line for what the shard is made from, then one per clip

A clip's line is written after its frames. So a torn last line, and frames without a line, are all
that a kill can leave; both are cut off on opening. A hash per clip finds frames that a power cut
lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_video.data.atomic import lock
from dalle2_video.data.store.shard import StoreError


def stored_hash(windows: Sequence[np.ndarray]) -> str:
    """16 hex digits of the bytes of a clip's windows, as the index lists them."""
    digest = hashlib.blake2b(digest_size=8)
    for window in windows:
        digest.update(np.ascontiguousarray(window).data)
    return digest.hexdigest()


class Journal:
    """Context that appends clips. `clips`: a dict per clip so far, those of a stopped run first.

    made_from: settings and fingerprint; a journal of others is thrown away. A kept clip's dict has
    a "row", that of its first window in the shard (of an image, marked "image", in its stills),
    "bytes" of each window, and a "hash". One
    marked "lost" (its worker died or was stopped) is not taken over, so it gets another chance. An
    error leaves both files in place. fresh: takes nothing over. StoreError where another process
    has it open.
    """

    def __init__(
        self,
        folder: Path,
        shard: str,
        made_from: dict[str, Any],
        fresh: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.frames_path = folder / f".{shard}.frames.partial"
        self.clips_path = folder / f".{shard}.clips.partial"
        self.made_from, self.fresh = made_from, fresh
        self.clips: list[dict[str, Any]] = []
        self.rows = self.stills = self.num_bytes = self.still_bytes = 0

    def __enter__(self) -> Journal:
        self._clips = open(self.clips_path, "ab")
        self._frames = open(self.frames_path, "ab")
        try:
            lock(self._clips, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StoreError(f"another preprocess is at work on {self.clips_path}") from error
        place = 0 if self.fresh else self._read()
        self._clips.truncate(place)
        self._frames.truncate(self.num_bytes)
        if not place:
            self._line(self.made_from)
        return self

    def _read(self) -> int:
        """Takes over what is whole; returns the bytes of lines that are."""
        size = self.frames_path.stat().st_size
        stored = np.memmap(self.frames_path, np.uint8, "r") if size else np.empty(0, np.uint8)
        place = 0
        with open(self.clips_path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    clip = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    clip = None
                if clip is None or (number == 0 and clip != self.made_from):
                    break
                if number and "row" in clip:
                    end = self.num_bytes + sum(clip["bytes"])
                    if end > size or stored_hash([stored[self.num_bytes : end]]) != clip["hash"]:
                        break
                    self._count(clip)
                if number and not clip.get("lost"):
                    self.clips.append(clip)
                place += len(line)
        return place

    def append(self, clip: dict[str, Any], windows: Sequence[np.ndarray] | None = None) -> None:
        """Adds a clip; windows uint8, each as the shard stores it, or None where it is left out."""
        if windows is not None:
            if not windows or any(window.dtype != np.uint8 for window in windows):
                raise ValueError("a clip must have one or more windows of uint8")
            sizes = [window.size for window in windows]
            row = self.stills if clip.get("image") else self.rows
            clip = {**clip, "row": row, "bytes": sizes, "hash": stored_hash(windows)}
            for window in windows:
                self._frames.write(np.ascontiguousarray(window).data)
            self._frames.flush()
            self._count(clip)
        self._line(clip)
        self.clips.append(clip)

    def _count(self, clip: dict[str, Any]) -> None:
        """Counts a kept clip: num_bytes of all, still_bytes of the images among them."""
        size = sum(clip["bytes"])
        self.num_bytes += size
        if clip.get("image"):
            self.stills += 1
            self.still_bytes += size
        else:
            self.rows += len(clip["bytes"])

    def _line(self, value: dict[str, Any]) -> None:
        self._clips.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._clips.flush()

    def windows(self) -> Iterator[list[np.ndarray]]:
        """uint8 (bytes,) of each window of each kept clip, by rows; StoreError where the disk
        changed them.
        """
        with open(self.frames_path, "rb") as file:
            for clip in self.clips:
                if "row" in clip:
                    stored = [np.frombuffer(file.read(n), np.uint8) for n in clip["bytes"]]
                    if stored_hash(stored) != clip["hash"]:
                        raise StoreError(
                            f"{self.frames_path} is damaged: delete it, run preprocess"
                        )
                    yield stored

    def remove(self) -> None:
        """When the shard stands whole."""
        self.close()
        self.clips_path.unlink(missing_ok=True)
        self.frames_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes both files, which stay."""
        self._clips.close()
        self._frames.close()

    def __exit__(self, *_: object) -> None:
        self.close()
