"""Runs that several tests of a session read, and that none of them changes."""

import shutil
from pathlib import Path

import pytest

from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from tests.helpers.tiny_stage import tiny_config, tiny_stage


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    """The folder of a run of `tiny_stage` by `tiny_config`, ended: 4 steps, 2 checkpoints."""
    folder = tmp_path_factory.mktemp("done")
    train(tiny_stage(), tiny_config(), RunConfig(str(folder)))
    return folder


@pytest.fixture
def run_folder(done, tmp_path) -> Path:
    """A copy of `done` that a test may change."""
    return shutil.copytree(done, tmp_path / "run")
