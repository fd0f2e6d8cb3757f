"""Real launches of two processes on the CPU, over gloo."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch_command(strategy: str, *more: str, processes: int = 2) -> list[str]:
    """`accelerate launch` with a file that users take; the script is to follow."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*command, "--config_file", f"configs/accelerate/{strategy}.yaml", *more]


def run_launch(
    command: Sequence[str],
    environment: Mapping[str, str] = ENVIRONMENT,
    timeout: float = 300,
    fails: bool = False,
) -> str:
    """Its output and errors; AssertionError where its exit status is not as expected."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr
