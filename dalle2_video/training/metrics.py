"""The figures of the steps: on their way from the device, and gathered between two log lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Flight:
    """Figures that go to the host while the device works on.

    behind: how many steps the host may be ahead of what it has read. On a GPU it would otherwise
    wait at each step for the work that it has just queued.
    """

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self._queue: deque[tuple[Sequence[str], Tensor, torch.cuda.Event | None]] = deque()

    def send(self, names: Sequence[str], values: Tensor) -> None:
        """values (len(names),) float32 on the device."""
        if not values.is_cuda:
            self._queue.append((names, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._queue.append((names, host, copied))

    def landed(self, everything: bool) -> Iterator[dict[str, float]]:
        """Those of earlier steps, or of all, each once and in order."""
        while len(self._queue) > (0 if everything else self.behind):
            names, values, copied = self._queue.popleft()
            if copied is not None:
                copied.synchronize()
            yield dict(zip(names, values.tolist(), strict=True))


class Window:
    """Figures since the last log line: means, clips per second, share of time spent on waiting."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}  # some steps have figures that others have not
        self.clips = 0
        self.begun, self.wait, self.pause = time.monotonic(), 0.0, 0.0
        self.last: dict[str, float] = {}

    def add(self, values: dict[str, float], clips: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.clips += clips
        self.last = values

    def waiting(self) -> _Stopwatch:
        return _Stopwatch(self, "wait")

    def paused(self) -> _Stopwatch:
        return _Stopwatch(self, "pause")

    def close(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.begun - self.pause, 1e-9)
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        means["lr"] = self.last["lr"]
        return means | {"clips_per_second": self.clips / seconds, "data_wait": self.wait / seconds}


class _Stopwatch:
    """Adds the time spent inside to one of the window's sums."""

    def __init__(self, window: Window, name: str):
        self.window, self.name = window, name

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *error: object) -> None:
        spent = time.monotonic() - self.begun
        setattr(self.window, self.name, getattr(self.window, self.name) + spent)
