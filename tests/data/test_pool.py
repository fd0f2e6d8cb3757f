"""Worker processes: order, errors, death, time limits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dalle2_video.data.preprocess.pool import LOST_IN_A_ROW, WorkerLost, WorkerPool

pytestmark = pytest.mark.usefixtures("warm_workers")


def work(number: int, folder: str | None = None, data: bytes = b"") -> tuple[int, int, np.ndarray]:
    """Fails at 3; the worker is killed at 5, at its first try; big in and out."""
    if number == 3:
        raise ValueError("three")
    if number == 5 and folder is not None:
        marker = Path(folder) / "tried"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * (number % 3))  # results come out of order
    return number, len(data), np.full(200_000, number, np.uint8)


def die(_: int) -> None:
    os._exit(7)


def die_if_odd(number: int) -> int:
    if number % 2:
        os._exit(7)
    return number


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def note_and_sleep(file: str) -> None:
    with open(file, "a") as calls:
        calls.write("called\n")
    time.sleep(5)


def echo(data: bytes) -> bytes:
    time.sleep(0.05)
    return data


def interrupted(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_errors_at_their_place_and_none_stays_none(workers: int) -> None:
    tasks = [(f"t{k}", None if k == 4 else (k,)) for k in range(20)]
    with WorkerPool(work, workers, ["tests.data.test_pool"]) as pool:
        for _ in range(2):  # a pool serves several rounds
            got = list(pool.map(iter(tasks)))
            assert [tag for tag, _ in got] == [f"t{k}" for k in range(20)]
            for k, (_, future) in enumerate(got):
                if k == 3:
                    with pytest.raises(ValueError, match="three"):
                        future.result()
                elif k == 4:
                    assert future.result() is None
                else:
                    assert future.result()[0] == k and (future.result()[2] == k).all()


def test_a_killed_worker_costs_nothing_when_the_second_try_goes_well(tmp_path: Path) -> None:
    data = os.urandom(300_000)  # more than a pipe holds, in both directions
    tasks = [(k, (k, str(tmp_path), data)) for k in range(12) if k != 3]
    with WorkerPool(work, 2, ["tests.data.test_pool"]) as pool:
        results = [future.result()[:2] for _, future in pool.map(tasks)]
    assert results == [(k, 300_000) for k in range(12) if k != 3]
    assert (tmp_path / "tried").exists()


def test_only_a_few_tasks_are_taken_ahead() -> None:
    taken = []

    def tasks():
        for k in range(100):
            taken.append(k)
            yield k, (k + 10,)

    with WorkerPool(work, 2, ["tests.data.test_pool"]) as pool:
        for tag, _ in pool.map(tasks()):
            assert len(taken) - tag <= 9


def test_losses_with_results_in_between_do_not_end_the_run(monkeypatch) -> None:
    monkeypatch.setattr("dalle2_video.data.preprocess.pool.LOST_IN_A_ROW", 2)
    with WorkerPool(die_if_odd, 1, ["tests.data.test_pool"]) as pool:
        for k, future in pool.map((k, (k,)) for k in range(7)):
            if k % 2:
                with pytest.raises(WorkerLost, match="died 2 times"):
                    future.result()
            else:
                assert future.result() == k


def test_the_time_limit_is_that_of_one_call() -> None:
    """Not of those before it in the same worker, and without the time that the worker is idle."""
    with WorkerPool(sleep, 1, ["tests.data.test_pool"], seconds=0.6) as pool:
        for tasks in ([(k, (0.25,)) for k in range(4)], [(4, (0.25,))]):
            assert all(future.result() == 0.25 for _, future in pool.map(tasks))
            time.sleep(0.8)
        ((_, future),) = pool.map([(5, (5.0,))])
        with pytest.raises(WorkerLost, match=r"it took longer than 0\.6 s"):
            future.result()


def test_a_call_over_the_limit_is_made_once(tmp_path: Path) -> None:
    with WorkerPool(note_and_sleep, 1, ["tests.data.test_pool"], seconds=0.3) as pool:
        ((_, future),) = pool.map([(0, (str(tmp_path / "calls"),))])
        with pytest.raises(WorkerLost, match="it took longer"):
            future.result()
    assert (tmp_path / "calls").read_text() == "called\n"


def test_large_tasks_and_results_do_not_wait_for_each_other() -> None:
    """Larger than what the system buffers in either direction."""
    tasks = [(k, (os.urandom(3_000_000),)) for k in range(8)]
    with WorkerPool(echo, 2, ["tests.data.test_pool"], seconds=20) as pool:
        for (k, future), (_, (data,)) in zip(pool.map(tasks), tasks, strict=True):
            assert future.result() == data, f"task {k}"


def test_the_start_of_a_worker_does_not_count(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import os, time\n"
        f"time.sleep(0 if os.getpid() == {os.getpid()} else 1.5)\n"
        "def work(number): return number\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_import  # type: ignore[import-not-found]

    with WorkerPool(slow_to_import.work, 1, [], seconds=0.4) as pool:
        assert [future.result() for _, future in pool.map((k, (k,)) for k in range(3))] == [0, 1, 2]


def test_an_interrupt_from_the_terminal_is_left_to_the_parent() -> None:
    with WorkerPool(interrupted, 1, ["tests.data.test_pool"]) as pool:
        assert [future.result() for _, future in pool.map([(0, (5,)), (1, (6,))])] == [5, 6]


def test_workers_that_all_die_end_the_run() -> None:
    tasks = ((k, (k,)) for k in range(1000))
    with WorkerPool(die, 1, ["tests.data.test_pool"]) as pool:
        lost = 0
        with pytest.raises(WorkerLost, match=r"ended one after the other.*exit status 7"):
            for _, future in pool.map(tasks):
                with pytest.raises(WorkerLost, match=r"died 2 times \(exit status 7\)"):
                    future.result()
                lost += 1
    assert 0 < lost < LOST_IN_A_ROW
