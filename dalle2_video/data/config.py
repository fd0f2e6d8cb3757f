"""Section `data` of the configuration, and the store that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle2_video.data.store.store import ClipStore, Settings, StoreError


@dataclass(frozen=True)
class DataConfig:
    """Section `data`.

    name: a label. root: the folder of the archives. out: of the store, None = root. fps,
    num_frames, size, span, windows, encoding: how the clips are stored, see Settings. splits: name
    -> fraction, with split_seed. workers: processes, 0 = none. seconds_per_clip: a clip that keeps
    a worker longer is left out; None = no limit. overwrite: make shards again that are there.
    """

    name: str
    root: str
    out: str | None
    fps: float
    num_frames: int
    size: int
    span: str
    windows: str
    encoding: str
    split_seed: int
    splits: dict[str, float]
    workers: int
    seconds_per_clip: float | None
    overwrite: bool

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
    def settings(self) -> Settings:
        """How the frames are made."""
        return Settings(
            fps=float(self.fps),
            num_frames=self.num_frames,
            size=self.size,
            span=self.span,
            windows=self.windows,
            encoding=self.encoding,
        )


def open_store(config: DataConfig) -> ClipStore:
    """The store of this configuration; StoreError where it is absent or made otherwise."""
    store = ClipStore.open(config.store, config.splits, config.split_seed)
    if store.settings != config.settings:
        raise StoreError(
            f"{config.store} holds clips of {store.settings}, data asks for {config.settings}: "
            "choose another data.out, or run preprocess with data.overwrite=true"
        )
    return store
