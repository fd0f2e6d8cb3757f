"""Section `data` of the configuration, and how it stores clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from dalle2_video.config import FilePath, Share, Size, Verbatim, Workers, config_class, default

# The six kinds of text of CelebV-Text, by the names used here and on disk.
CATEGORIES = (
    "action_dur",
    "emotion",
    "face40_details",
    "light_color_temp",
    "light_dir",
    "light_intensity",
)

Layout = Literal["celebvtext", "folder", "table", "webdataset"]


@config_class
class StoreSettings:
    """How the clips of a store were made."""

    fps: Annotated[float, Field(gt=0, le=240)]
    """Frames per second of the stored clips."""
    num_frames: Size
    """Frames of a window."""
    size: Size
    """Side of a stored frame in pixels."""
    span: Literal["first", "full"] = "first"
    """first: the first num_frames / fps seconds; full: frames spread over the whole clip (fps is
    then only the rate at which they are shown)."""
    windows: Literal["one", "all", "random"] = "one"
    """How many windows of a clip are stored: one, or all that fit into it, end to end. random: all,
    of which training draws one per clip and epoch."""
    encoding: Literal["raw", "h264"] = "raw"
    """Raw frames, or visually lossless videos that are decoded on reading."""

    def __post_init__(self) -> None:
        if self.span == "full" and self.windows != "one":
            raise ValueError("span=full makes one window of the whole clip: windows must be one")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3) of one window."""
        return self.num_frames, self.size, self.size, 3

    def view_fps(self, num_frames: int) -> float:
        """Frames per second of a view (see `media.tensors.to_float`) of num_frames frames."""
        return self.fps * num_frames / self.num_frames


@config_class
class DataConfig(StoreSettings):
    """The clips: where they are, how they are stored, and how they are split."""

    name: Verbatim = "celebvtext"
    """A label."""
    root: FilePath = "data/CelebV-Text"
    """The folder of the archives; it is only read where `out` is another one."""
    layout: Layout | None = None
    """How clips and texts lie in `root`: celebvtext; folder, a text of the same name beside each
    video; table, a metadata.csv, .tsv or .jsonl; webdataset, tars of such pairs. null: found."""
    file_column: Verbatim | None = None
    """The column of a table that names the files; null: file_name, file, path, video or the
    like."""
    caption_columns: list[Verbatim] | None = None
    """Columns of a table, or keys of JSON texts, that hold captions, a category each; null: all
    with words."""
    group_column: Verbatim | None = None
    """The column of a table whose clips stay in one split; null: group, where there is one."""
    out: FilePath | None = None
    """The folder of the store; null: `root`."""
    fps: Annotated[float, Field(gt=0, le=240)] = 8.0
    """Frames per second of the stored clips."""
    num_frames: Size = 16
    """Frames of a window."""
    size: Size = 64
    """Side of a stored frame in pixels."""
    split_seed: int = 0
    """Of the splits."""
    splits: dict[str, Share] = default(dict)
    """Name of a split -> its share of the groups (video ids in CelebV-Text); they add up to 1."""
    workers: Workers = 8
    """Processes of preprocess.py; 0: none but itself."""
    seconds_per_clip: PositiveFloat | None = 60.0
    """A clip that keeps a worker longer is left out; null: no limit."""
    overwrite: bool = False
    """Make shards again that are there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError(f"splits: the shares must add up to 1, got {dict(self.splits)}")

    @property
    def store(self) -> Path:
        """Where the store lies."""
        return Path(self.out or self.root)

    @property
    def settings(self) -> StoreSettings:
        """How the frames are made: a store for windows=random is one of all windows."""
        fields = dataclasses.fields(StoreSettings)
        values = {field.name: getattr(self, field.name) for field in fields}
        windows = "all" if self.windows == "random" else self.windows
        return StoreSettings(**{**values, "windows": windows})


@config_class
class CaptionPolicy:
    """Which of a clip's lines make its set in training: a new draw at every meeting, keyed by
    (seed, sample_id).

    Each kept category gives one line. The number of categories is drawn evenly, so that a single
    line is familiar; lines are joined at random cuts, so that a free sentence that holds several
    things is familiar.
    """

    all_probability: Share = 0.2
    """Probability that every category stays; otherwise a random 1 to all of them do."""
    join_probability: Share = 0.5
    """Probability that the lines are joined into one or a few longer ones."""
    order: Literal["random", "fixed"] = "random"
    """Of the lines that are joined; fixed is that of CATEGORIES. Lines by themselves are a set."""
    presence: dict[str, Share] | None = None
    """Category of the data -> probability that it takes part at all, 1 where it is not named; a
    clip keeps one category at least."""
