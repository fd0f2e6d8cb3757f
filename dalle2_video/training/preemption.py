"""Ending a run early without losing work: signals that ask for it, and the file that marks it.

SIGTERM (a scheduler, or `kill`), SIGUSR1 (SLURM's --signal) and SIGHUP (a closed terminal, unless
`nohup` has it ignored) are noted; the loop looks after each optimizer step, then saves and ends.
`accelerate launch` passes on the signals that configs/launch.env lists.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dalle2_video.data.atomic import write_json

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
FILE = "unfinished.json"
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Interrupted(SystemExit):
    """The run was asked to end, saved, and wants to go on: the script ends with EXIT_CODE."""


class Signals:
    """`asked`: the first signal of SIGNALS since entering, or None.

    Later ones change nothing: a scheduler may signal every process, and the launcher does too.
    Does nothing outside the main thread, where Python knows no handlers.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's SIGHUP
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)


def mark_unfinished(folder: Path, clips: int, reason: str) -> None:
    """Write <folder>/unfinished.json: the same command would go on here. It is there from a run's
    first step to its end, so after a crash of the machine too.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    write_json(folder / FILE, {"clips": clips, "reason": reason, "time": now})


def mark_ended(folder: Path) -> None:
    """Remove the file: the run is done, or failed in a way that the same command would repeat."""
    (folder / FILE).unlink(missing_ok=True)


def would_repeat(error: BaseException, num_processes: int) -> bool:
    """Whether the same command would meet this error again: not if another rank, a device or a disk
    went away, or the user stopped it.
    """
    if type(error) is RuntimeError or isinstance(error, dist.DistError):
        return num_processes == 1
    passing = Interrupted, KeyboardInterrupt, OSError, torch.AcceleratorError
    return not isinstance(error, passing)
