"""Worker processes for work on single clips: results in order, little held in memory.

Each worker has a pipe of its own, so one that dies (killed for memory, or a crash in the decoder)
or hangs loses only its own task, and a new worker replaces it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

from dalle2_video.errors import UserError

Tag = TypeVar("Tag")

TRIES = 2  # a worker may be killed for another's memory, so its task gets a second one
QUEUE = 2  # tasks that a worker holds, so it need not wait while results are written
AHEAD = 4  # tasks per worker that are begun before their results are asked for
LOST_IN_A_ROW = 10  # per worker, without one result in between: something is wrong with all


class WorkerLost(UserError, RuntimeError):  # noqa: N818
    """The worker of a task died, or was stopped at the time limit; the message is the cause."""


@dataclass
class _Task:
    tag: Any
    arguments: tuple | None
    future: Future = field(default_factory=Future)
    tries: int = 0


class _Worker:
    """One process and the tasks that it holds; the first one is under way."""

    def __init__(self, context: ForkServerContext, function: Callable[..., Any]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.tasks: deque[_Task] = deque()
        self.ready = False
        self.begun = time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class WorkerPool:
    """Processes that start at their first use, or none at all for 0 workers.

    function: what is called. preload: modules that are imported once, then forked from. seconds:
    the time limit of one call, None = none; without processes there is no limit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        workers: int,
        preload: Sequence[str],
        seconds: float | None = None,
    ) -> None:
        self.function, self.workers = function, workers
        self.preload, self.seconds = preload, seconds
        self._running: list[_Worker] = []
        self._context: ForkServerContext | None = None
        self._lost = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.stop()
        self._running = []

    def map(self, tasks: Iterable[tuple[Tag, tuple | None]]) -> Iterator[tuple[Tag, Future]]:
        """(tag, finished future) for each (tag, arguments), in order; None = no call, result None.

        The future raises what the call raised, or WorkerLost. Tasks are taken a little ahead.
        Arguments larger than a pipe holds (64 kB) are fine.
        Raises WorkerLost itself where workers die one after the other without any result.
        """
        rest, ahead = iter(tasks), max(1, AHEAD * self.workers)
        waiting: deque[_Task] = deque()  # in the order of the results
        todo: deque[_Task] = deque()  # not yet with a worker
        while True:
            for tag, arguments in islice(rest, ahead - len(waiting)):
                task = _Task(tag, arguments)
                waiting.append(task)
                if arguments is None:
                    task.future.set_result(None)
                elif self.workers:
                    todo.append(task)
                else:
                    _finish(task, *_call(self.function, arguments))
            if not waiting:
                return
            self._give(todo)
            if waiting[0].future.done():
                done = waiting.popleft()
                yield done.tag, done.future
            else:
                self._collect(todo)

    def _give(self, todo: deque[_Task]) -> None:
        """Hands tasks to workers that have room."""
        if todo and self._context is None:
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                os.environ.setdefault(name, "1")  # one core per worker
            self._context = get_context("forkserver")
            self._context.set_forkserver_preload(list(self.preload))
        while todo and len(self._running) < self.workers:
            assert self._context is not None
            self._running.append(_Worker(self._context, self.function))
        for room in range(QUEUE):
            for worker in [one for one in self._running if len(one.tasks) == room]:
                # A worker that is sending a result cannot take in a large task: wait for it.
                if todo and (room == 0 or _is_small(todo[0])):
                    self._send(worker, todo)

    def _send(self, worker: _Worker, todo: deque[_Task]) -> None:
        task = todo.popleft()
        if not worker.tasks:
            worker.begun = time.monotonic()
        worker.tasks.append(task)
        try:
            worker.pipe.send(task.arguments)
        except OSError:  # it died: `_collect` finds out
            pass

    def _collect(self, todo: deque[_Task]) -> None:
        """Waits for a result, a death or a time limit, and notes it."""
        left = None
        if self.seconds is not None:
            now = time.monotonic()
            limits = [w.begun + self.seconds - now for w in self._running if w.ready and w.tasks]
            left = max(0.0, min(limits, default=1.0))
        ready = connection.wait([worker.pipe for worker in self._running], left)
        for worker in [one for one in self._running if one.pipe in ready]:
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(worker, todo, None)
                continue
            worker.begun = time.monotonic()
            if worker.ready:
                self._lost = 0
                _finish(worker.tasks.popleft(), *message)
            worker.ready = True
        for worker in [w for w in self._running if w.ready and w.tasks]:
            if self.seconds is not None and time.monotonic() - worker.begun > self.seconds:
                self._replace(worker, todo, f"it took longer than {self.seconds:g} s")

    def _replace(self, worker: _Worker, todo: deque[_Task], cause: str | None) -> None:
        """Takes a worker out; its first task is to blame, the others go to another one."""
        self._running.remove(worker)
        worker.stop() if cause else worker.process.join()
        code = worker.process.exitcode or 0
        first = worker.tasks.popleft() if worker.tasks else None
        todo.extendleft(reversed(worker.tasks))
        if first is not None:
            first.tries += 1
            if cause is None and first.tries < TRIES:
                todo.appendleft(first)
            else:
                cause = cause or f"its worker died {TRIES} times ({_name_of(code)})"
                first.future.set_exception(WorkerLost(cause))
        self._lost += 1
        if self._lost > LOST_IN_A_ROW * self.workers:
            raise WorkerLost(
                f"{self._lost} workers ended one after the other (the last by {_name_of(code)}): "
                f"the memory may be too small for {self.workers} workers"
            )


def _name_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _is_small(task: _Task) -> bool:
    return not any(isinstance(one, bytes) and len(one) > 4096 for one in task.arguments or ())


def _call(function: Callable[..., Any], arguments: tuple) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error


def _finish(task: _Task, value: Any, error: Exception | None) -> None:
    if error is None:
        task.future.set_result(value)
    else:
        task.future.set_exception(error)


def _serve(pipe: connection.Connection, function: Callable[..., Any]) -> None:
    """A worker: sends None when it is up, then a result per task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this
    _end_with_parent()
    pipe.send(None)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_call(function, arguments))


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, instead of waiting for ever."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
