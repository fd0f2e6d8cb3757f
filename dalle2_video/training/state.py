"""Checkpoints of a running stage: saved whole or not at all, resumed by the same command.

<dir>/checkpoints/<clips seen, 12 digits>/ holds what `Accelerator.save_state` writes (model,
optimizer, gradient scaler, random state of each rank), ema.safetensors (full float32 averages, for
any number of ranks), stage.json (whose weights these are) and progress.json (how far). It is
written as a hidden folder, flushed and renamed. Weights that the stage filters out are not in it,
but for FSDP2, whose writer in Accelerate knows no filter. <dir>/model.safetensors is for consumers:
the EMA weights, or the weights where there is no EMA, under the bare model's names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle2_video.checkpoint import CheckpointError, read_header, save_model, sync_path
from dalle2_video.training.ema import Ema
from dalle2_video.training.shards import Shards
from dalle2_video.training.stage import Stage, TrainConfig

WEIGHTS = "model.safetensors"  # the name that Accelerate gives to the weights of the first model


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
        self.keep = cfg.keep_checkpoints
        identity = {"stage": stage.name, "seed": seed, "optimizer": cfg.optimizer}
        identity |= {"config": stage.config, "meta": stage.meta}
        self.identity = json.loads(json.dumps(identity))
        accelerator.register_save_state_pre_hook(self._filter_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    # ---- saving

    def save(self, progress: Progress) -> None:
        """Write model.safetensors and the checkpoint of this moment, then drop the oldest ones."""
        self.export(progress)
        final = self.root / f"{progress.clips:012d}"
        temporary = self.root / f".{final.name}.tmp"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        options = {"exclude_frozen_parameters": True} if self._partial_deepspeed else {}
        self.accelerator.save_state(str(temporary), **options)
        average = self.ema.full_state() if self.ema else {}
        self.accelerator.wait_for_everyone()
        if main:
            if self.ema:
                save_file({n: t.contiguous() for n, t in average.items()}, temporary / EMA_FILE)
            _write_json(temporary / "stage.json", self.identity)
            _write_json(temporary / "progress.json", asdict(progress))
            for path in [*temporary.rglob("*"), temporary]:
                sync_path(path)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync_path(self.root)
            for old in whole_checkpoints(self.root)[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

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

    def restore(self) -> Progress | None:
        """Continue from the newest whole checkpoint; None when there is none.

        Half-written folders are removed. Raises CheckpointError when the checkpoint belongs to
        another stage, seed or configuration (with the differing keys) or cannot be read.
        """
        if self.accelerator.is_main_process and self.root.exists():
            for rest in self.root.glob(".*.tmp"):
                shutil.rmtree(rest)
        self.accelerator.wait_for_everyone()
        found = whole_checkpoints(self.root)
        if not found:
            return None
        folder = found[-1]
        self._check_identity(folder)
        options: dict[str, Any] = {"load_module_strict": False} if self._partial_deepspeed else {}
        try:
            with _weights_only(self._deepspeed):
                self.accelerator.load_state(str(folder), **options)
            self._load_ema(folder)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{folder}: cannot be loaded ({type(error).__name__}: {error}); "
                "remove this folder to continue from the one before it"
            ) from error
        self.accelerator.step = 0  # a checkpoint lies between optimizer steps
        return Progress(**json.loads((folder / "progress.json").read_text()))

    def _check_identity(self, folder: Path) -> None:
        path = folder / "stage.json"
        saved, own = _flat(json.loads(path.read_text())), _flat(self.identity)
        # an option that is off and did not exist then makes no difference
        own = {k: value for k, value in own.items() if k in saved or value not in (False, 0, None)}
        differing = [k for k in sorted(saved | own) if saved.get(k, "-") != own.get(k, "-")]
        if differing:
            shown = "; ".join(
                f"{k}: {saved.get(k, 'none')!r} there, {own.get(k, 'none')!r} here"
                for k in differing[:6]
            )
            raise CheckpointError(
                f"{path}: belongs to another model or run ({shown}); "
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


EMA_FILE = "ema.safetensors"


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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
