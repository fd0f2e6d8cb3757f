"""Worker processes for work on single clips, with results in order and little held in memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any


def ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The same items, up to `count` of them taken before they are asked for."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class WorkerPool:
    """A process pool that starts at its first use, or no process at all for 0 workers.

    preload: the module whose function is submitted; imported once, then forked from. A failure
    of a worker is raised by the future's result.
    """

    def __init__(self, workers: int, preload: str) -> None:
        self.workers, self.preload = workers, preload
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        if not self.workers:
            future: Future = Future()
            future.set_result(function(*arguments))
            return future
        if self._pool is None:
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                os.environ.setdefault(name, "1")  # one core per worker
            context = get_context("forkserver")
            context.set_forkserver_preload([self.preload])
            self._pool = ProcessPoolExecutor(self.workers, context, _end_with_parent)
        return self._pool.submit(function, *arguments)


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, instead of waiting for ever."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
