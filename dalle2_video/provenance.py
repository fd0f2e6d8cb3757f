"""Where a measured number comes from: commit, hardware, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """commit, hardware and versions, to stand beside the metrics of a JSON file."""
    return {
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {processor()}",
        "versions": f"Python {sys.version.split()[0]}, torch {torch.__version__}",
    }


def commit() -> str:
    """The short hash of the checkout, with + where it has changes; "unknown" outside git."""
    try:
        run = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        here = Path(__file__).parent
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=here)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
