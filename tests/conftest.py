"""One small run that every test may read, trained once; and a budget of time for the slow tests.

Tests that train copy what they need of the run.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

import preprocess
from dalle2_video.cli import compose
from tests.helpers.runs import SMALL, STAGES, train

BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that would begin after these")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --minutes are over")


@pytest.fixture(scope="session")
def configure(tmp_path_factory) -> Callable[..., DictConfig]:
    """overrides -> config of a small run; data and runs live in one temporary folder."""
    folder = tmp_path_factory.mktemp("pipeline")

    def compose_config(*overrides: str, run: str = "run"):
        places = [f"faces.root={folder}/data", f"run_dir={folder}/{run}"]
        return compose(*SMALL, *places, *overrides)

    return compose_config


@pytest.fixture(scope="session")
def run_dir(configure) -> Path:
    """All stages trained for four steps by the entry scripts."""
    cfg = configure()
    preprocess.main(cfg)
    for stage in STAGES:
        train(stage, cfg)
    return Path(cfg.run_dir)
