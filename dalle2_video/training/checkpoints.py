"""Checkpoints of a running stage: saved whole or not at all, resumed by the same command.

`checkpoint_files` describes the files. Weights that the stage filters out are in none of them, but
for FSDP2, whose writer in Accelerate knows no filter. <run>/model.safetensors is for consumers: the
EMA weights, or the weights where there is no EMA, under the bare model's names.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle2_video.model_file import (
    CheckpointError,
    follow_umask,
    read_header,
    save_model,
    sync_path,
    translated,
)
from dalle2_video.training import checkpoint_files as files
from dalle2_video.training.accelerator import strategy_of
from dalle2_video.training.config import TrainConfig
from dalle2_video.training.config_guard import differences, flat
from dalle2_video.training.ema import Ema
from dalle2_video.training.progress import Progress
from dalle2_video.training.sharded import ShardedParams
from dalle2_video.training.stage import Stage
from dalle2_video.training.weights_only import weights_only

WHOLE = ("one process", "ddp")  # strategies under which every rank holds everything


class Checkpoints:
    """Saves and restores one stage in `folder`; every rank calls each method."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        sharded: ShardedParams,
        ema: Ema | None,
        stage: Stage,
        cfg: TrainConfig,
        seed: int,
    ):
        self.folder = folder
        self.root = folder / "checkpoints"
        self.accelerator = accelerator
        self.sharded = sharded
        self.ema = ema
        self.stage = stage
        self.cfg = cfg
        identity = {"stage": stage.name, "seed": seed, "optimizer": cfg.optimizer}
        identity |= {"config": stage.config, "meta": stage.meta}
        self.identity = translated(json.loads(json.dumps(identity)))
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
        final = self.root / files.folder_name(progress.clips)
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
                files.write_checksums(temporary, sums)
                if final.exists():
                    files.remove_checkpoint(final)
                os.replace(temporary, final)
                sync_path(self.root)
                for old in files.superseded(files.whole_checkpoints(self.root), self.cfg):
                    files.remove_checkpoint(old)

    def _write(self, folder: Path, progress: Progress) -> None:
        options = {"exclude_frozen_parameters": True} if self._partial_deepspeed else {}
        self.accelerator.save_state(str(folder), **options)
        average = self.ema.full_state() if self.ema else {}
        weights = {} if self._whole else self.sharded.full_state(self.stage.keeps)
        if not self.accelerator.is_main_process:
            return
        for name, state in ((files.EMA, average), (files.FULL_WEIGHTS, weights)):
            if state:
                save_file({n: t.contiguous() for n, t in state.items()}, folder / name)
        for path in folder.glob("*.safetensors"):  # Accelerate's, too
            follow_umask(path)
        files.write_stage(folder, self.identity, self.layout)
        files.write_progress(folder, progress)

    def _own_checksums(self, folder: Path, flush: bool) -> list[tuple[str, str]]:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return files.checksums(folder, rank, ranks, flush)

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
        state = self.sharded.full_state(self.stage.keeps, average)
        if self.accelerator.is_main_process:
            meta = {**self.stage.meta, "clips_seen": str(progress.clips)}
            meta["weights"] = "ema" if self.ema else "model"
            kind = self.stage.kind or self.stage.name
            save_model(self.folder / files.WEIGHTS, kind, self.stage.config, state, meta)

    def exported_clips(self) -> int | None:
        """The clips seen by the weights in model.safetensors; None when there is no whole one."""
        try:
            return int(read_header(self.folder / files.WEIGHTS).meta["clips_seen"])
        except CheckpointError:
            return None

    # ---- resuming

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(files.whole_checkpoints(self.root)), None)

    def restore(self) -> tuple[Progress, str] | None:
        """Continue from the newest whole checkpoint -> how far it is and what was carried over;
        None when there is none. One whose checksums do not match is skipped with a warning.

        Under another strategy or number of ranks weights and EMA are carried over, and the
        optimizer's moments where one process, DDP and FSDP2 load those of other ranks themselves.
        Half-written folders are removed. Raises CheckpointError when the checkpoint belongs to
        another stage, seed or configuration (with the differing keys), has a format newer than this
        code or cannot be read, or when all are damaged.
        """
        if self.accelerator.is_main_process:
            files.remove_unfinished(self.folder)
        self.accelerator.wait_for_everyone()
        found = files.whole_checkpoints(self.root)
        damage: list[str] = []
        aside: list[Path] = []
        while found:
            folder = found.pop()
            if wrong := self._damaged_files(folder):
                damage.append(f"{folder}: damaged ({', '.join(wrong)})")
                self.accelerator.print(f"{damage[-1]}; not used", file=sys.stderr, flush=True)
                aside.append(folder)
                continue
            note = self._restore(folder)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for path in aside:  # or it would count among the newest that stay
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
            return files.read_progress(folder), "; ".join([note, *damage])
        if damage:
            raise CheckpointError(
                f"{'; '.join(damage)}: no whole checkpoint is left; remove the folder "
                f"{self.root} to begin again"
            )
        return None

    def _damaged_files(self, folder: Path) -> list[str]:
        """The files that are missing, unreadable or not as written; alike on all ranks."""
        if not (folder / files.CHECKSUMS).exists():  # of a version that wrote none
            return []
        try:
            own = self._own_checksums(folder, flush=False)
        except OSError as error:
            own = [(str(error), "unreadable")]
        return files.damaged_files(folder, gather_object(own))

    def _restore(self, folder: Path) -> str:
        """Load one checkpoint -> a sentence for the log."""
        identity, saved_layout = files.read_stage(folder)
        self._check_identity(folder, identity)
        here = self.layout
        there = here if saved_layout is None else saved_layout
        with self._readable(folder):
            if self._loads(there):
                options: dict[str, Any] = {}
                if self._partial_deepspeed:
                    options["load_module_strict"] = False
                with weights_only(self._deepspeed):
                    self.accelerator.load_state(str(folder), **options)
            else:
                self._load_full_weights(folder)
            self._load_ema(folder)
        self.accelerator.step = 0  # a checkpoint lies between optimizer steps
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
        path = next(p for p in (folder / files.FULL_WEIGHTS, folder / files.WEIGHTS) if p.exists())
        state = {name.removeprefix("module."): t for name, t in load_file(path).items()}
        self.sharded.load_full_state(state)

    def _check_identity(self, folder: Path, identity: dict[str, Any]) -> None:
        saved, own = flat(identity), flat(self.identity)
        # an option that is off and did not exist then makes no difference
        own = {k: value for k, value in own.items() if k in saved or value not in (False, 0, None)}
        if found := differences(saved, own):
            raise CheckpointError(
                f"{folder / files.STAGE}: belongs to another model or run ({'; '.join(found)}); "
                "choose another train_name, or remove the run's folder"
            )

    def _load_ema(self, folder: Path) -> None:
        path = folder / files.EMA
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
    def _whole(self) -> bool:
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
            state: dict[str, Tensor] = load_file(Path(folder) / files.WEIGHTS)
            result = model.load_state_dict(state, strict=False)
            lost = [n for n in result.missing_keys if self.stage.keeps(n.removeprefix("module."))]
            if wrong := [*lost, *result.unexpected_keys]:
                names = ", ".join(wrong[:4])
                raise CheckpointError(f"{folder}/{files.WEIGHTS}: does not fit the model ({names})")
