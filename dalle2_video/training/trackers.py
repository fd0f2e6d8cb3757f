"""Services that show a run's curves and sample videos: W&B, TensorBoard, MLflow, or none.

Each goes through Accelerate's tracker of its name (`accelerate.tracking`); what that interface
lacks is done on the service's own object. Only the main process makes a tracker. A run that
resumes continues in the same place.
"""

from __future__ import annotations

import fcntl
import importlib.util
import io
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from dalle2_video.data.atomic import lock
from dalle2_video.errors import UserError
from dalle2_video.training.config import RunConfig
from dalle2_video.training.config_guard import flat
from dalle2_video.training.stage import Sample

PROJECT = "dalle2-video"  # MLflow's experiment, unless MLFLOW_EXPERIMENT_NAME is set


class TrackerError(UserError, RuntimeError):
    """The tracker that is asked for is not installed, has no key, or cannot begin."""


class Tracker(Protocol):
    """Where metrics and videos go besides the run's folder; the x axis is the clips seen."""

    def log(self, clips: int, values: Mapping[str, float]) -> None: ...

    def videos(self, clips: int, files: Sequence[tuple[Path, Sample]]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class NoTracker:
    """The tracker that is off."""

    def log(self, clips: int, values: Mapping[str, float]) -> None: ...

    def videos(self, clips: int, files: Sequence[tuple[Path, Sample]]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class Wandb:
    """A W&B run whose id is kept in <dir>/wandb_id. Every chart has `clips` as its x axis."""

    def __init__(self, run: RunConfig, stage: str, config: Mapping[str, Any], start_clips: int):
        folder = Path(run.dir)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.tracker = WandBTracker(
            run.wandb_project,
            entity=run.wandb_entity,
            name=f"{run.train_name}/{stage}",
            group=run.train_name,
            tags=run.wandb_tags,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=_wandb_mode(run),
            dir=folder,
            config=dict(config),
            allow_val_change=True,  # a resumed run may train for longer
        )
        self.tracker.start()
        self.tracker.run.define_metric("clips", hidden=True)
        self.tracker.run.define_metric("*", step_metric="clips")

    def log(self, clips: int, values: Mapping[str, float]) -> None:
        self.tracker.log({"clips": clips, **values})

    def videos(self, clips: int, files: Sequence[tuple[Path, Sample]]) -> None:
        import wandb

        videos = [wandb.Video(str(p), caption=s.caption, format="mp4") for p, s in files]
        self.tracker.log({"clips": clips, "samples": videos})

    def close(self, failed: bool = False) -> None:
        self.tracker.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in <dir>/tensorboard, with samples as animated GIFs.

    What an earlier process wrote there beyond `start_clips` is marked as void, so no stretch of a
    curve is doubled. The configuration of the first start is in the HPARAMS tab.
    """

    def __init__(self, run: RunConfig, stage: str, config: Mapping[str, Any], start_clips: int):
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self.tracker = TensorBoardTracker("tensorboard", run.dir, purge_step=start_clips + 1)
        self.tracker.start()
        # Accelerate would write them as a run of its own at each start.
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in flat(config).items()}
        self._write(hparams_pb(plain, trial_id=f"{run.train_name}/{stage}"), start_clips)

    def log(self, clips: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=clips)

    def videos(self, clips: int, files: Sequence[tuple[Path, Sample]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

        for index, (_, sample) in enumerate(files):
            name = f"samples/{index}"
            height, width = sample.frames.shape[1:3]
            image = Summary.Image(
                height=height,
                width=width,
                colorspace=3,
                encoded_image_string=gif(sample.frames, sample.fps),
            )
            self._write(Summary(value=[Summary.Value(tag=name, image=image)]), clips)
            self.tracker.log({name: sample.caption}, step=clips)

    def close(self, failed: bool = False) -> None:
        self.tracker.finish()

    def _write(self, summary: Any, clips: int) -> None:
        self.tracker.writer._get_file_writer().add_summary(summary, clips)


class Mlflow:
    """An MLflow run whose id is kept in <dir>/mlflow_run_id.

    It goes to MLFLOW_TRACKING_URI, else to <dir>/../mlflow.db with files in mlflow_artifacts beside
    it. MLflow never forgets a point, so those that an earlier process sent beyond the clips where
    the run continues stay, and are not sent again. Parameters are those of the first start, cut at
    MLflow's limit; config.json is whole and of the last start.
    """

    def __init__(self, run: RunConfig, stage: str, config: Mapping[str, Any], start_clips: int):
        import mlflow
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        self.mlflow = mlflow
        folder = Path(run.dir).resolve()
        self.local = not _mlflow_uri()
        if self.local:
            mlflow.set_tracking_uri(f"sqlite:///{folder.parent}/mlflow.db")
        files = (folder.parent / "mlflow_artifacts").as_uri() if self.local else None
        id_file = folder / "mlflow_run_id"
        with (folder.parent / ".mlflow.lock").open("w") as turn:
            lock(turn, fcntl.LOCK_EX)  # stages that begin at once would all make the tables
            run_id = self._known(id_file.read_text().strip()) if id_file.exists() else None
            name = f"{run.train_name}/{stage}"
            self.tracker = MLflowTracker(PROJECT, files, run_id=run_id, run_name=name)
            self.tracker.start()
        self.run_id = self.tracker.tracker.info.run_id
        id_file.write_text(self.run_id)
        self.last: dict[str, int] = {}  # metric -> step of its newest point
        old = mlflow.get_run(self.run_id).data.params
        new = {k: str(v)[:MAX_PARAM_VAL_LENGTH] for k, v in flat(config).items() if k not in old}
        self.tracker.store_init_configuration(new)
        mlflow.log_dict(dict(config), "config.json")

    def _known(self, run_id: str) -> str | None:
        """The id, or None where the store has no such run."""
        try:
            return self.mlflow.get_run(run_id).info.run_id
        except self.mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def log(self, clips: int, values: Mapping[str, float]) -> None:
        for key in values.keys() - self.last:
            history = self.mlflow.MlflowClient().get_metric_history(self.run_id, key)
            self.last[key] = max((point.step for point in history), default=-1)
        self.tracker.log({k: v for k, v in values.items() if self.last[k] < clips}, step=clips)

    def videos(self, clips: int, files: Sequence[tuple[Path, Sample]]) -> None:
        for path, _ in files:
            self.tracker.log_artifact(str(path), "samples")
        text = "".join(f"{path.name}\t{sample.caption}\n" for path, sample in files)
        self.mlflow.log_text(text, f"samples/{clips:012d}.txt")

    def close(self, failed: bool = False) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")
        if self.local:
            # MLflow has put it into the environment, too; None takes it out again
            self.mlflow.set_tracking_uri(None)  # pyright: ignore


TRACKERS = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": Mlflow}


def make_tracker(
    run: RunConfig, stage: str, config: Mapping[str, Any], start_clips: int
) -> Tracker:
    """The tracker that `run` asks for, or the one that does nothing.

    config: what to record of the run, nested. start_clips: where the run begins or continues.
    Raises TrackerError where the service does not let it begin.
    """
    if run.tracker is None:
        return NoTracker()
    try:
        return TRACKERS[run.tracker](run, stage, config, start_clips)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TrackerError(
            f"tracker={run.tracker} cannot begin ({type(error).__name__}: {reason}); "
            "set tracker=null to train without"
        ) from error


def check_tracker(run: RunConfig) -> None:
    """Raise TrackerError where the tracker lacks a package or a key; call before slow work."""
    if run.tracker is None:
        return
    packages = [run.tracker]
    if run.tracker == "mlflow" and not _mlflow_uri().startswith("http"):
        packages += ["sqlalchemy", "alembic"]  # its database; mlflow-skinny comes without
    if missing := [name for name in packages if not _installed(name)]:
        raise TrackerError(
            f"tracker={run.tracker}: {', '.join(missing)} not installed: "
            f"run `pip install {' '.join(missing)}`"
        )
    if run.tracker == "wandb":
        _check_wandb_key(run)


def _installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of that name, such as W&B's ./wandb, cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _mlflow_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def _wandb_mode(run: RunConfig) -> Any:
    """online | offline | disabled: the configuration's word, else WANDB_MODE, else online."""
    return run.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def _check_wandb_key(run: RunConfig) -> None:
    if _wandb_mode(run) != "online" or os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        if path.is_file() and netrc.netrc(path).authenticators(host):
            return
    raise TrackerError(
        "tracker=wandb: no W&B key is set: run `wandb login`, or set WANDB_API_KEY, "
        "or record without a network by wandb_mode=offline"
    )


def gif(frames: np.ndarray, fps: float) -> bytes:
    """Frames uint8 RGB (F, H, W, 3) as an endless animated GIF of at most 256 colours per frame."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    first.save(file, "gif", save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return file.getvalue()
