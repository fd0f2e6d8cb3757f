"""A run that is told to end, killed, or left alone by its terminal loses nothing."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dalle2_video.data.store.shard import StoreError
from dalle2_video.model_file import CheckpointError
from dalle2_video.training.checkpoint_files import whole_checkpoints
from dalle2_video.training.config import RunConfig
from dalle2_video.training.divergence import TrainingDiverged
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from dalle2_video.training.preemption import (
    EXIT_CODE,
    FILE,
    SIGNALS,
    Interrupted,
    Signals,
    would_repeat,
)
from tests.helpers.launching import ENVIRONMENT, ROOT, launch_command, run_launch
from tests.helpers.run_files import metric
from tests.helpers.tiny_stage import tiny_config, tiny_stage

EVERY = {"clips": 800, "log_every_clips": 8, "val_every_clips": 400}


def tiny_run(folder: Path, pause: float, **changes: object) -> list[str]:
    """The command of a slow run."""
    values = [f"{name}={value}" for name, value in (EVERY | changes).items()]
    return ["-m", "tests.helpers.tiny_run", str(folder), str(pause), *values]


def launch_environment() -> dict[str, str]:
    """What `. configs/launch.env` adds."""
    script = ". configs/launch.env; env -0"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, check=True)
    pairs = (entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)
    return ENVIRONMENT | {name: value for name, value in pairs if name.startswith("PET_")}


def heard() -> None:
    """For a child of tests that run under nohup, which it would inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for_clips(folder: Path, clips: int, process: subprocess.Popen | None = None) -> None:
    """Until the run has logged a step at or beyond `clips`."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        lines = read_metrics(folder / "metrics.jsonl")
        if lines and lines[-1]["clips"] >= clips:
            return
        assert process is None or process.poll() is None, "the run ended early"
        time.sleep(0.05)
    raise AssertionError(f"no step at {clips} clips")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(tiny_stage(), tiny_config(**EVERY), RunConfig(str(folder), seed=3))
    assert not (folder / FILE).exists()
    return metric(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_makes_the_run_save_and_end(number, undisturbed, tmp_path) -> None:
    command = [sys.executable, *tiny_run(tmp_path, 0.02, save_every_clips=400)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    )
    wait_for_clips(tmp_path, 80, process)
    assert json.loads((tmp_path / FILE).read_text())["reason"] == "running"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    state = json.loads((tmp_path / FILE).read_text())
    assert state["reason"] == number.name and f"{number.name}: saved at" in out
    assert [p.name for p in whole_checkpoints(tmp_path / "checkpoints")] == [
        f"{state['clips']:012d}"
    ]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert metric(tmp_path) == undisturbed
    assert not (tmp_path / FILE).exists()


def test_a_signal_to_all_processes_spares_the_loaders(undisturbed, tmp_path) -> None:
    """As `scancel` and systemd do: the workers of the loader get it as well."""
    command = [sys.executable, *tiny_run(tmp_path, 0.02, save_every_clips=400, workers=2)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    wait_for_clips(tmp_path, 80, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_CODE
    assert json.loads((tmp_path / FILE).read_text())["reason"] == "SIGTERM"
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert metric(tmp_path) == undisturbed


def test_a_signal_to_the_launcher_ends_all_ranks(undisturbed, tmp_path) -> None:
    command = [*launch_command("ddp"), *tiny_run(tmp_path, 0.02, save_every_clips=400)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_clips(tmp_path, 80, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    state = json.loads((tmp_path / FILE).read_text())
    assert "SIGUSR1: saved at" in out and state["reason"] == "SIGUSR1"
    assert (tmp_path / "checkpoints" / f"{state['clips']:012d}" / "progress.json").exists()
    run_launch(command)
    assert metric(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
    assert not (tmp_path / FILE).exists()


def test_nohup_holds_when_the_terminal_closes(undisturbed, tmp_path) -> None:
    """The README's lines, typed into a shell on a terminal that is then closed."""
    folder = tmp_path / "run"
    line = " ".join([*launch_command("ddp"), *tiny_run(folder, 0.02, save_every_clips=400)])
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve("/bin/bash", ["bash", "--norc", "-i"], ENVIRONMENT)
    os.write(terminal, f". configs/launch.env\nnohup {line} > {tmp_path}/log &\n".encode())
    wait_for_clips(folder, 80)
    os.close(terminal)  # the kernel sends SIGHUP, and so does the shell to its jobs
    os.waitpid(pid, 0)
    wait_for_clips(folder, 800)
    end = time.monotonic() + 60
    while (folder / FILE).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not (folder / FILE).exists(), (tmp_path / "log").read_text()[-2000:]
    assert metric(folder) == pytest.approx(undisturbed, abs=1e-5)


def test_killed_at_any_moment_it_goes_on_bit_for_bit(undisturbed, tmp_path) -> None:
    """kill -9 three times, at saves too (one every two steps); benchmarks/kill.py has twenty."""
    dice = random.Random(5)
    command = [sys.executable, *tiny_run(tmp_path, 0.002, save_every_clips=16)]
    for clips in (40, 240, 480):
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        wait_for_clips(tmp_path, clips, process)
        time.sleep(dice.uniform(0, 0.1))
        process.kill()
        process.wait()
        assert json.loads((tmp_path / FILE).read_text())["reason"] == "running"
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert metric(tmp_path) == undisturbed
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_rank_that_dies_ends_the_run(tmp_path) -> None:
    command = [*launch_command("ddp"), *tiny_run(tmp_path, 0.0, fault="die")]
    assert "Signal 9" in run_launch(command, fails=True)


def test_a_file_that_one_rank_misses_ends_the_run(tmp_path) -> None:
    command = [*launch_command("ddp"), *tiny_run(tmp_path, 0.0, fault="data")]
    said = run_launch(command, fails=True)
    summary = said.split("Root Cause")[1]
    assert "rank      : 1" in summary and "StoreError: videos/7.h5 cannot be read" in summary
    assert not (tmp_path / FILE).exists(), "the same command would fail again"


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_the_configured_time(tmp_path) -> None:
    command = [*launch_command("ddp"), *tiny_run(tmp_path, 0.0, fault="hang", timeout_minutes=0.1)]
    environment = ENVIRONMENT | {"PET_SHUTDOWN_TIMEOUT": "2"}
    assert "timeout_minutes=0.1" in run_launch(command, environment, timeout=120, fails=True)


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked is signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_which_errors_the_same_command_would_repeat() -> None:
    """Bad data and bad settings; not a full disk, a user's Ctrl-C, or a rank that went away."""
    for error in (ValueError(), StoreError(), CheckpointError(), TrainingDiverged()):
        assert would_repeat(error, 2), error
    for error in (OSError(), KeyboardInterrupt(), Interrupted(EXIT_CODE)):
        assert not would_repeat(error, 1), error
    assert would_repeat(RuntimeError(), 1)
    assert not would_repeat(RuntimeError(), 2)  # of gloo, where the other rank has gone
    assert not would_repeat(torch.distributed.DistBackendError(), 2)
