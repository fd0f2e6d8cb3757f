"""What a run reports: progress on the terminal, metrics.jsonl, sample videos, W&B.

Only the main process holds a `RunLog`; the others hold a `NullLog` that takes the same calls. W&B
is a service that is off by default: `NoWandb` does nothing, so no caller asks whether it is on.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from tqdm import tqdm

from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.errors import UserError
from dalle2_video.training.config import RunConfig
from dalle2_video.training.stage import Sample


class WandbKeyError(UserError, RuntimeError):
    """W&B is asked for online, but no key is set."""


class Tracker(Protocol):
    """Where metrics and videos go besides the run's folder."""

    def log(self, clips: int, values: Mapping[str, float]) -> None: ...

    def videos(self, clips: int, files: Sequence[tuple[Path, str]]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class NoWandb:
    """The tracker that is off."""

    def log(self, clips: int, values: Mapping[str, float]) -> None: ...

    def videos(self, clips: int, files: Sequence[tuple[Path, str]]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class Wandb:
    """A W&B run whose id lives in <dir>/wandb_id, so the same command continues the same run.

    The x axis of every chart is `clips`, the clips seen. Training metrics get the prefix "train/"
    where they have none.
    """

    def __init__(self, run: RunConfig, stage: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        folder = Path(run.dir)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=run.wandb_project,
            entity=run.wandb_entity,
            name=f"{run.train_name}/{stage}",
            group=run.train_name,
            tags=run.wandb_tags,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=wandb_mode(run),
            dir=folder,
            config=dict(config),
            allow_val_change=True,  # a resumed run may train for longer
        )
        self.run.define_metric("clips", hidden=True)
        self.run.define_metric("*", step_metric="clips")

    def log(self, clips: int, values: Mapping[str, float]) -> None:
        named = {k if "/" in k else f"train/{k}": v for k, v in values.items()}
        self.run.log({"clips": clips, **named})

    def videos(self, clips: int, files: Sequence[tuple[Path, str]]) -> None:
        videos = [self._wandb.Video(str(p), caption=c, format="mp4") for p, c in files]
        self.run.log({"clips": clips, "samples": videos})

    def close(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


def wandb_mode(run: RunConfig) -> Any:
    """online | offline | disabled: the configuration's word, else WANDB_MODE, else online."""
    return run.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def check_wandb(run: RunConfig) -> None:
    """Raise WandbKeyError when W&B would need a key that is not there; call before slow work."""
    if not run.use_wandb or wandb_mode(run) != "online" or os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        if path.is_file() and netrc.netrc(path).authenticators(host):
            return
    raise WandbKeyError(
        "use_wandb=true, but no W&B key is set: run `wandb login`, or set WANDB_API_KEY, "
        "or record without a network by WANDB_MODE=offline"
    )


def make_tracker(run: RunConfig, stage: str, config: Mapping[str, Any]) -> Tracker:
    """W&B when it is asked for, else the tracker that does nothing."""
    return Wandb(run, stage, config) if run.use_wandb else NoWandb()


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
    plain lines.
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
        self.tracker.log(clips, values)
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
        self.tracker.log(clips, named)
        self.note(f"clips {clips:,}  " + "  ".join(f"{k} {v:.4g}" for k, v in named.items()))

    def samples(self, clips: int, samples: Sequence[Sample]) -> None:
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        files = []
        for index, sample in enumerate(samples):
            path = folder / f"{clips:012d}_{index:02d}.mp4"
            encode_mp4(path, sample.frames, sample.fps)
            files.append((path, sample.caption))
        text = "".join(f"{path.name}\t{caption}\n" for path, caption in files)
        (folder / f"{clips:012d}.txt").write_text(text, encoding="utf-8")
        self.tracker.videos(clips, files)

    def note(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(f"[{self.name}] {text}", file=sys.stderr)
        else:
            print(f"[{self.name}] {text}", flush=True)

    def close(self, failed: bool = False) -> None:
        if self.bar is not None:
            self.bar.close()
        self.tracker.close(failed)

    def _record(self, clips: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"clips": clips, **finite}, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
