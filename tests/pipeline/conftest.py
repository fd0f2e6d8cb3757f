"""A trained cascade of three U-Nets."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import CHAIN, train


@pytest.fixture(scope="session")
def chain_dir(configure, run_dir) -> Path:
    """4 frames of 16 px -> 8 of 16 -> 8 of 32."""
    cfg = configure(*CHAIN, run="chain")
    for stage in ("clip", "prior", "tsr", "ssr"):
        shutil.copytree(run_dir / stage, Path(cfg.run_dir) / stage)
    train("base", cfg)
    return Path(cfg.run_dir)
