"""Section `data` of the configuration, and how it stores clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle2_video.config import config_class, default

CHOICES = {"span": ("first", "full"), "windows": ("one", "all"), "encoding": ("raw", "h264")}


@dataclass(frozen=True)
class StoreSettings:
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

    def view_fps(self, num_frames: int) -> float:
        """Frames per second of a view (see `media.tensors.to_float`) of num_frames frames."""
        return self.fps * num_frames / self.num_frames


@config_class
class DataConfig:
    """Section `data`.

    name: a label. root: the folder of the archives. out: of the store, None = root. fps,
    num_frames, size, span, windows, encoding: how the clips are stored, see StoreSettings. splits:
    name -> fraction, with split_seed. workers: processes, 0 = none. seconds_per_clip: a clip that
    keeps a worker longer is left out; None = no limit. overwrite: make shards again that are there.
    """

    name: str = "celebvtext"
    root: str = "data/CelebV-Text"
    out: str | None = None
    fps: float = 8.0
    num_frames: int = 16
    size: int = 64
    span: str = "first"
    windows: str = "one"
    encoding: str = "raw"
    split_seed: int = 0
    splits: dict[str, float] = default(dict)
    workers: int = 8
    seconds_per_clip: float | None = 60.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        _ = self.settings  # raises ValueError
        if self.workers < 0:
            raise ValueError("workers must be at least 0")
        if self.seconds_per_clip is not None and self.seconds_per_clip <= 0:
            raise ValueError("seconds_per_clip must be positive, or null")

    @property
    def store(self) -> Path:
        """Where the store lies."""
        return Path(self.out or self.root)

    @property
    def settings(self) -> StoreSettings:
        """How the frames are made."""
        return StoreSettings(
            fps=float(self.fps),
            num_frames=self.num_frames,
            size=self.size,
            span=self.span,
            windows=self.windows,
            encoding=self.encoding,
        )
