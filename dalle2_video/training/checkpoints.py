"""Checkpoints of a running stage: saved whole or not at all, resumed by the same command.

<dir>/checkpoints/<clips seen, 12 digits>/ holds what `Accelerator.save_state` writes (model,
optimizer, gradient scaler, random state of each rank), the weights and the EMA as full float32
tensors for any number of ranks (model.safetensors of one process or DDP, else weights.safetensors;
ema.safetensors), stage.json (whose weights these are, under which strategy), progress.json (how
far) and checksums.json. It is written as a hidden folder, flushed and renamed. Weights that the
stage filters out are not in it, but for FSDP2, whose writer in Accelerate knows no filter.
<dir>/model.safetensors is for consumers: the EMA weights, or the weights where there is no EMA,
under the bare model's names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle2_video.model_file import CheckpointError, read_header, save_model, sync_path
from dalle2_video.training.config_guard import differences, flat
from dalle2_video.training.ema import Ema
from dalle2_video.training.sharded import Shards
from dalle2_video.training.stage import Stage, TrainConfig

WEIGHTS = "model.safetensors"  # the name that Accelerate gives to the weights of the first model
FULL_WEIGHTS = "weights.safetensors"
EMA_FILE = "ema.safetensors"
CHECKSUMS = "checksums.json"
WHOLE = ("one process", "ddp")  # strategies under which every rank holds everything


@dataclass
class Progress:
    """How far a run is: clips seen (the position in the data too), optimizer steps, skipped steps
    (gradient not finite), seconds spent."""

    clips: int = 0
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0


class Checkpoints:
    """Saves and restores one stage in `folder`; every rank calls each method."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        shards: Shards,
        ema: Ema | None,
        stage: Stage,
        cfg: TrainConfig,
        seed: int,
    ):
        self.folder = folder
        self.root = folder / "checkpoints"
        self.accelerator = accelerator
        self.shards = shards
        self.ema = ema
        self.stage = stage
        self.cfg = cfg
        identity = {"stage": stage.name, "seed": seed, "optimizer": cfg.optimizer}
        identity |= {"config": stage.config, "meta": stage.meta}
        self.identity = json.loads(json.dumps(identity))
        accelerator.register_save_state_pre_hook(self._filter_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    @property
    def layout(self) -> dict[str, Any]:
        """How the state is split: over how many ranks, by what."""
        return {"strategy": strategy_of(self.accelerator), "ranks": self.accelerator.num_processes}

    # ---- saving

    def save(self, progress: Progress) -> None:
        """Write model.safetensors and the checkpoint of this moment, then drop the oldest ones.

        Raises CheckpointError where a rank cannot write, on every rank (under ZeRO and FSDP2 the
        others may only end by the launcher or the time-out); the checkpoints that were there stay.
        """
        final = self.root / f"{progress.clips:012d}"
        temporary = self.root / f".{final.name}.tmp"
        main = self.accelerator.is_main_process
        with self._alike_on_all_ranks(temporary):
            self.export(progress)
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with self._alike_on_all_ranks(temporary):
            self._write(temporary, progress)
        with self._alike_on_all_ranks(temporary):
            own = self._own_checksums(temporary, flush=True)
        sums = dict(gather_object(own))
        with self._alike_on_all_ranks(temporary):
            if main:
                _write_json(temporary / CHECKSUMS, sums)
                sync_path(temporary / CHECKSUMS)
                for folder in [*temporary.rglob("*/"), temporary]:
                    sync_path(folder)
                if final.exists():
                    _remove(final)
                os.replace(temporary, final)
                sync_path(self.root)
                for old in superseded(whole_checkpoints(self.root), self.cfg):
                    _remove(old)

    def _write(self, folder: Path, progress: Progress) -> None:
        options = {"exclude_frozen_parameters": True} if self._partial_deepspeed else {}
        self.accelerator.save_state(str(folder), **options)
        average = self.ema.full_state() if self.ema else {}
        whole = {} if self._unsplit else self.shards.full_state(self.stage.keeps)
        if not self.accelerator.is_main_process:
            return
        for name, state in ((EMA_FILE, average), (FULL_WEIGHTS, whole)):
            if state:
                save_file({n: t.contiguous() for n, t in state.items()}, folder / name)
        _write_json(folder / "stage.json", self.identity | {"layout": self.layout})
        _write_json(folder / "progress.json", asdict(progress))

    def _own_checksums(self, folder: Path, flush: bool) -> list[tuple[str, str]]:
        """(relative path, checksum) of this rank's share of the files, flushed to the disk if
        wanted, some files at a time.
        """
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
        own = paths[self.accelerator.process_index :: self.accelerator.num_processes]

        def read(path: Path) -> tuple[str, str]:
            if flush:
                sync_path(path)
            return str(path.relative_to(folder)), checksum(path)

        with ThreadPoolExecutor(4) as pool:  # neither holds the interpreter's lock
            return list(pool.map(read, own))

    @contextmanager
    def _alike_on_all_ranks(self, folder: Path) -> Iterator[None]:
        """An error of one rank inside becomes the same CheckpointError on all of them."""
        found = None
        try:
            yield
        except Exception as error:
            found = f"rank {self.accelerator.process_index}: {type(error).__name__}: {error}"
        causes = [cause for cause in gather_object([found]) if cause]
        if not causes:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        newest = self.newest()
        kept = f"the newest whole one is {newest}" if newest else "there is none yet"
        free = shutil.disk_usage(self.folder).free / 1e9
        raise CheckpointError(
            f"{folder}: cannot save a checkpoint ({'; '.join(causes)}); its disk has {free:.1f} GB "
            f"free; {kept}"
        )

    def export(self, progress: Progress) -> None:
        """Write model.safetensors; its meta names the clips seen and whether it is the EMA."""
        average = self.ema.average if self.ema else None
        state = self.shards.full_state(self.stage.keeps, average)
        if self.accelerator.is_main_process:
            meta = {**self.stage.meta, "clips_seen": str(progress.clips)}
            meta["weights"] = "ema" if self.ema else "model"
            kind = self.stage.kind or self.stage.name
            save_model(self.folder / WEIGHTS, kind, self.stage.config, state, meta)

    def exported_clips(self) -> int | None:
        """The clips seen by the weights in model.safetensors; None when there is no whole one."""
        try:
            return int(read_header(self.folder / WEIGHTS).meta["clips_seen"])
        except CheckpointError:
            return None

    # ---- resuming

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(whole_checkpoints(self.root)), None)

    def restore(self) -> tuple[Progress, str] | None:
        """Continue from the newest whole checkpoint -> how far it is and what was carried over;
        None when there is none. One whose checksums do not hold is passed over, loudly.

        Under another strategy or number of ranks weights and EMA are carried over, and the
        optimizer's moments where one process, DDP and FSDP2 load those of other ranks themselves.
        Half-written folders are removed. Raises CheckpointError when the checkpoint belongs to
        another stage, seed or configuration (with the differing keys) or cannot be read, or when
        all are damaged.
        """
        if self.accelerator.is_main_process and self.root.exists():
            for rest in self.root.glob(".*.tmp"):
                shutil.rmtree(rest)
            for rest in self.folder.glob(f".{WEIGHTS}.*.tmp"):
                rest.unlink()
        self.accelerator.wait_for_everyone()
        found = whole_checkpoints(self.root)
        damage: list[str] = []
        aside: list[Path] = []
        while found:
            folder = found.pop()
            if wrong := self._damaged(folder):
                damage.append(f"{folder}: damaged ({', '.join(wrong)})")
                self.accelerator.print(f"{damage[-1]}; not used", file=sys.stderr, flush=True)
                aside.append(folder)
                continue
            told = self._restore(folder)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for path in aside:  # or it would count among the newest that stay
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
            return _read_progress(folder), "; ".join([told, *damage])
        if damage:
            raise CheckpointError(
                f"{'; '.join(damage)}: no whole checkpoint is left; remove the folder "
                f"{self.root} to begin anew"
            )
        return None

    def _damaged(self, folder: Path) -> list[str]:
        """The files that are missing, unreadable or not as written; alike on all ranks."""
        path = folder / CHECKSUMS
        if not path.exists():  # of a version that wrote none
            return []
        try:
            own = self._own_checksums(folder, flush=False)
        except OSError as error:
            own = [(str(error), "unreadable")]
        now = dict(gather_object(own))
        try:
            written = json.loads(path.read_text())
        except ValueError:
            return [CHECKSUMS]
        unreadable = [name for name, value in now.items() if value == "unreadable"]
        return sorted([n for n, value in written.items() if now.get(n) != value] + unreadable)

    def _restore(self, folder: Path) -> str:
        """Load one checkpoint -> a sentence for the log."""
        saved = json.loads((folder / "stage.json").read_text())
        self._check_identity(folder, saved)
        there = saved.get("layout", self.layout)
        with self._readable(folder):
            if self._loads(there):
                options: dict[str, Any] = {}
                if self._partial_deepspeed:
                    options["load_module_strict"] = False
                with _weights_only(self._deepspeed):
                    self.accelerator.load_state(str(folder), **options)
            else:
                self._load_full_weights(folder)
            self._load_ema(folder)
        self.accelerator.step = 0  # a checkpoint lies between optimizer steps
        here = self.layout
        if there == here:
            return f"goes on from {folder.name}"
        moments = "and the optimizer's moments" if self._loads(there) else "but not the moments"
        names = [f"{x['strategy']} on {x['ranks']} processes" for x in (there, here)]
        return (
            f"goes on from {folder.name} of {names[0]} under {names[1]}: weights and EMA are "
            f"carried over, {moments}"
        )

    def _loads(self, there: dict[str, Any]) -> bool:
        """Whether this strategy reads what was saved under that layout."""
        here = self.layout
        if there["strategy"] in WHOLE and here["strategy"] in WHOLE:
            return True
        return there == here or there["strategy"] == here["strategy"] == "fsdp2"

    @contextmanager
    def _readable(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{folder}: cannot be loaded ({type(error).__name__}: {error}); "
                "remove this folder to continue from the one before it"
            ) from error

    def _load_full_weights(self, folder: Path) -> None:
        path = next(p for p in (folder / FULL_WEIGHTS, folder / WEIGHTS) if p.exists())
        state = {name.removeprefix("module."): t for name, t in load_file(path).items()}
        self.shards.load_full_state(state)

    def _check_identity(self, folder: Path, there: dict[str, Any]) -> None:
        path = folder / "stage.json"
        there = {name: value for name, value in there.items() if name != "layout"}
        saved, own = flat(there), flat(self.identity)
        # an option that is off and did not exist then makes no difference
        own = {k: value for k, value in own.items() if k in saved or value not in (False, 0, None)}
        if found := differences(saved, own):
            raise CheckpointError(
                f"{path}: belongs to another model or run ({'; '.join(found)}); "
                "choose another train_name, or remove the run's folder"
            )

    def _load_ema(self, folder: Path) -> None:
        path = folder / EMA_FILE
        if self.ema is None:
            return
        if not path.exists():
            raise CheckpointError(f"{path}: no such file; this run was trained without EMA")
        self.ema.load_full_state(load_file(path))

    # ---- hooks of Accelerate, which leaves the weights of one process and DDP to `weights`

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _unsplit(self) -> bool:
        return self.layout["strategy"] in WHOLE

    @property
    def _partial_deepspeed(self) -> bool:
        return self._deepspeed and self.stage.state_filter is not None

    def _filter_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        for state in weights:
            for name in [n for n in state if not self.stage.keeps(n.removeprefix("module."))]:
                del state[name]

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        while models:
            model = models.pop()
            state: dict[str, Tensor] = load_file(Path(folder) / WEIGHTS)
            result = model.load_state_dict(state, strict=False)
            lost = [n for n in result.missing_keys if self.stage.keeps(n.removeprefix("module."))]
            if wrong := [*lost, *result.unexpected_keys]:
                names = ", ".join(wrong[:4])
                raise CheckpointError(f"{folder}/{WEIGHTS}: does not fit the model ({names})")


def saved_progress(folder: Path) -> Progress:
    """How far the newest checkpoint of a stage's folder is, without loading it."""
    found = whole_checkpoints(folder / "checkpoints")
    try:
        return _read_progress(found[-1]) if found else Progress()
    except ValueError:  # damaged, which restoring will tell
        return Progress()


def _read_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def _remove(checkpoint: Path) -> None:
    """Under a hidden name first, so that none is seen half removed."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def strategy_of(accelerator: Accelerator) -> str:
    """ "one process", "ddp", "fsdp2", or "zero1" to "zero3"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{cast(Any, accelerator.state.deepspeed_plugin).zero_stage}"
    if accelerator.is_fsdp2:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "one process"


def checksum(path: Path) -> str:
    """The CRC-32 of a file's bytes, 8 hexadecimal digits: it tells damage, not malice."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def superseded(checkpoints: list[Path], cfg: TrainConfig) -> list[Path]:
    """Those to remove: all but the newest `keep_checkpoints`, and the first at or after each
    multiple of `keep_every_clips`.
    """
    every, reached, old = cfg.keep_every_clips, 0, []
    for path in checkpoints:
        multiple = int(path.name) // every if every else 0
        if multiple <= reached:
            old.append(path)
        reached = max(reached, multiple)
    newest = checkpoints[-cfg.keep_checkpoints :]
    return [path for path in old if path not in newest]


def whole_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    if not root.exists():
        return []
    folders = [p for p in root.iterdir() if re.fullmatch(r"\d{12,}", p.name)]
    return sorted((p for p in folders if (p / "progress.json").exists()), key=lambda p: int(p.name))


@contextmanager
def _weights_only(deepspeed: bool) -> Iterator[None]:
    """Every torch.load inside refuses pickled code, DeepSpeed's own calls included.

    DeepSpeed's optimizer files hold four plain types of its own; these alone are let through.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_types() if deepspeed else []):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _deepspeed_types() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
