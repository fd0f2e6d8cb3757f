"""The metrics of the optimizer steps: on their way from the device, and averaged for a log line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class AsyncMetrics:
    """Metrics that go to the host while the device works on.

    max_behind: how many optimizer steps the host may be ahead of what it has read. On a GPU it
    would otherwise wait at each for the work that it has just queued.
    """

    def __init__(self, max_behind: int) -> None:
        self.max_behind = max_behind
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

    def arrived(self, everything: bool) -> Iterator[dict[str, float]]:
        """Those sent `max_behind` steps ago or earlier, or all, each once and in order."""
        while len(self._queue) > (0 if everything else self.max_behind):
            names, values, copied = self._queue.popleft()
            if copied is not None:
                copied.synchronize()
            yield dict(zip(names, values.tolist(), strict=True))


class MetricsAverager:
    """Averages the metrics since the last log line; measures clips per second and the share of the
    time that goes on waiting for data.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}  # some steps have metrics that others have not
        self._last: dict[str, float] = {}
        self._clips = 0
        self._begun, self._waited, self._paused = time.monotonic(), 0.0, 0.0

    def add(self, values: dict[str, float], clips: int) -> None:
        """The metrics of one optimizer step over `clips` clips."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        self._clips += clips
        self._last = values

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting for data."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begun

    def averages(self) -> dict[str, float]:
        """Mean of each metric over the steps that have it, but for "lr", which is the last one's;
        "clips_per_second" and "data_wait", a share of the time in [0, 1].
        """
        seconds = max(time.monotonic() - self._begun - self._paused, 1e-9)
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        means["lr"] = self._last["lr"]
        return means | {
            "clips_per_second": self._clips / seconds,
            "data_wait": self._waited / seconds,
        }
