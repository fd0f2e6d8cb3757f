"""The clips of a shard under way, on disk as they come: after kill -9 the next run goes on there.

Two hidden files beside the shards, gone when the shard stands whole:

<folder>/.<shard>.frames.partial   frames of the kept clips, raw uint8, end to end
<folder>/.<shard>.clips.partial    a JSON line for what the shard is made from, then one per clip

A clip's line is written after its frames. So a torn last line, and frames without a line, are all
that a kill can leave; both are cut off on opening. A hash per clip tells frames that a power cut
lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_video.data.texts import StoreError


def frames_hash(frames: np.ndarray) -> str:
    """16 hex digits of the bytes of a clip's frames, as the index lists them."""
    return hashlib.blake2b(np.ascontiguousarray(frames).data, digest_size=8).hexdigest()


class Journal:
    """Context that appends clips. `clips`: a dict per clip so far, those of a stopped run first.

    made_from: settings and fingerprint; a journal of others is thrown away. A kept clip's dict has
    a "row", its place among the kept ones, and a "hash". One marked "lost" (its worker died or was
    stopped) is not taken over, so it gets another chance. An error leaves both files in place.
    fresh: takes nothing over. StoreError where another process has it open.
    """

    def __init__(
        self,
        folder: Path,
        shard: str,
        made_from: dict[str, Any],
        shape: tuple[int, ...],
        fresh: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.frames_path = folder / f".{shard}.frames.partial"
        self.clips_path = folder / f".{shard}.clips.partial"
        self.made_from, self.shape, self.fresh = made_from, shape, fresh
        self.clips: list[dict[str, Any]] = []
        self.rows = 0

    def __enter__(self) -> Journal:
        self._clips = open(self.clips_path, "ab")  # noqa: SIM115
        self._frames = open(self.frames_path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._clips, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StoreError(f"another preprocess is at work on {self.clips_path}") from error
        place = 0 if self.fresh else self._read()
        self._clips.truncate(place)
        self._frames.truncate(self.rows * int(np.prod(self.shape)))
        if not place:
            self._line(self.made_from)
        return self

    def _read(self) -> int:
        """Takes over what is whole; returns the bytes of lines that are."""
        frames = np.memmap(self.frames_path, np.uint8, "r") if self.frames_path.stat().st_size else np.empty(0)
        step = int(np.prod(self.shape))
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
                    data = frames[clip["row"] * step : (clip["row"] + 1) * step]
                    if len(data) < step or frames_hash(data) != clip["hash"]:
                        break
                    self.rows += 1
                if number and not clip.get("lost"):
                    self.clips.append(clip)
                place += len(line)
        return place

    def append(self, clip: dict[str, Any], frames: np.ndarray | None = None) -> None:
        """Adds a clip; frames uint8 of the shard's shape, or None where it is left out."""
        if frames is not None:
            if frames.shape != self.shape or frames.dtype != np.uint8:
                raise ValueError(f"a clip must be uint8 {self.shape}, not {frames.shape}")
            clip = {**clip, "row": self.rows, "hash": frames_hash(frames)}
            self._frames.write(np.ascontiguousarray(frames).data)
            self._frames.flush()
            self.rows += 1
        self._line(clip)
        self.clips.append(clip)

    def _line(self, value: dict[str, Any]) -> None:
        self._clips.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._clips.flush()

    def frames(self) -> Iterator[np.ndarray]:
        """The frames of the kept clips, in order of rows; StoreError where the disk changed them."""
        hashes = [clip["hash"] for clip in self.clips if "row" in clip]
        with open(self.frames_path, "rb") as file:
            for expected in hashes:
                frames = np.frombuffer(file.read(int(np.prod(self.shape))), np.uint8)
                if frames_hash(frames) != expected:
                    raise StoreError(f"{self.frames_path} is damaged: delete it, run preprocess")
                yield frames.reshape(self.shape)

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
