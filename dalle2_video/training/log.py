"""What a run reports: progress on the terminal, metrics.jsonl, sample videos, a tracker.

Only the main process holds a `RunLog`; the others hold a `NullLog` that takes the same calls.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dalle2_video.data.atomic import parse_json, read_text
from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.training.stage import Sample
from dalle2_video.training.trackers import Tracker


class Log(Protocol):
    """What the training loop calls."""

    def progress(self, fraction: float) -> None: ...

    def train(self, clips: int, values: Mapping[str, float], fraction: float, left: float): ...

    def validation(self, clips: int, values: Mapping[str, float]) -> None: ...

    def samples(self, clips: int, samples: Sequence[Sample]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class NullLog:
    """The log of every rank but the first."""

    def progress(self, fraction: float) -> None: ...

    def train(self, clips: int, values: Mapping[str, float], fraction: float, left: float): ...

    def validation(self, clips: int, values: Mapping[str, float]) -> None: ...

    def samples(self, clips: int, samples: Sequence[Sample]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class RunLog:
    """Terminal, metrics.jsonl, <dir>/samples and a tracker.

    start_clips: where the run continues; lines of metrics.jsonl beyond it (written after the
    checkpoint by a run that was killed) are dropped. On a terminal there is one bar, otherwise
    plain lines. The tracker gets training metrics under "train/", validation metrics under "val/".
    """

    def __init__(self, folder: Path, name: str, tracker: Tracker, start_clips: int):
        self.folder = folder
        self.name = name
        self.tracker = tracker
        self.metrics = folder / "metrics.jsonl"
        _trim(self.metrics, start_clips)
        self.bar = None
        if sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
            self.bar = tqdm(total=1.0, desc=name, bar_format=form)

    def progress(self, fraction: float) -> None:
        if self.bar is not None:
            self.bar.n = min(fraction, 1.0)
            self.bar.update(0)

    def train(self, clips: int, values: Mapping[str, float], fraction: float, left: float) -> None:
        """left: seconds until the end. values: loss, grad_norm, lr, clips_per_second and others."""
        self._record(clips, values)
        named = {k if "/" in k else f"train/{k}": v for k, v in values.items()}
        self._track(self.tracker.log, clips, named)
        text = (
            f"clips {clips:,}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['clips_per_second']:.1f} clips/s  left {clock(left)}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self.note(f"{fraction:6.1%}  {text}")

    def validation(self, clips: int, values: Mapping[str, float]) -> None:
        named = {f"val/{key}": value for key, value in values.items()}
        self._record(clips, named)
        self._track(self.tracker.log, clips, named)
        self.note(f"clips {clips:,}  " + "  ".join(f"{k} {v:.4g}" for k, v in named.items()))

    def samples(self, clips: int, samples: Sequence[Sample]) -> None:
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        files = []
        for index, sample in enumerate(samples):
            path = folder / f"{clips:012d}_{index:02d}.mp4"
            encode_mp4(path, sample.frames, sample.fps)
            files.append((path, sample))
        text = "".join(f"{path.name}\t{sample.caption}\n" for path, sample in files)
        (folder / f"{clips:012d}.txt").write_text(text, encoding="utf-8")
        self._track(self.tracker.videos, clips, files)

    def note(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(f"[{self.name}] {text}", file=sys.stderr)
        else:
            print(f"[{self.name}] {text}", flush=True)

    def close(self, failed: bool = False) -> None:
        if self.bar is not None:
            self.bar.close()
        self._track(self.tracker.close, failed)

    def _track(self, call: Callable[..., None], *args: Any) -> None:
        """A call of the tracker. A service that fails costs its curves, not the training."""
        try:
            call(*args)
        except Exception as error:
            self.note(f"tracker: {type(error).__name__}: {error}")

    def _record(self, clips: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"clips": clips, **finite}, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = read_text(path).splitlines(keepends=True)
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]
    return [parse_json(line, f"{path}, line {number}") for number, line in numbered]


def last_validation(path: Path, clips: int) -> dict[str, float]:
    """The newest validation metrics of a metrics.jsonl up to `clips`, without their "val/"."""
    for line in reversed(read_metrics(path)):
        metrics = {k.removeprefix("val/"): v for k, v in line.items() if k.startswith("val/")}
        if metrics and line["clips"] <= clips:
            return metrics
    return {}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour; '?' when unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0.0))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _trim(path: Path, clips: int) -> None:
    """Keep the lines of at most `clips` clips, so a resumed run records no step twice."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["clips"] <= clips]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
