"""Whatever is written can be read by those whom the user's umask lets read."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.output import write_clip
from dalle2_video.data.media.sheet import save_sheet
from dalle2_video.data.preprocess.run import preprocess
from dalle2_video.data.store.embeddings import write_embeddings
from dalle2_video.faces.config import FacesConfig
from dalle2_video.faces.writer import write_dataset
from dalle2_video.model_file import follow_umask, save_model
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from tests.helpers.stores import config
from tests.helpers.tiny_stage import tiny_config, tiny_stage


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_everything(root: Path) -> None:
    """A data set, its store, a trained stage with checkpoints, and the files that stand alone."""
    faces = FacesConfig(root=str(root / "faces"), clips=4, size=16, fps=4.0, seconds=1.5)
    write_dataset(faces, workers=0, progress=False)
    preprocess(config(root / "faces", fps=4.0))
    train(tiny_stage(), tiny_config(), RunConfig(str(root / "run")))
    save_model(root / "model/model.safetensors", "prior", {}, {"w": torch.zeros(3)})
    unit = torch.nn.functional.normalize(torch.ones(2, 4))
    write_embeddings(root / "cache/clip.safetensors", ["a", "b"], unit, "hash")
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    write_clip(root / "samples", "one", frames, 4.0, "a caption", {})
    write_clip(root / "samples", "two", frames, 4.0, "a caption", {}, "frames")
    save_sheet(root / "samples/sheet.png", [frames], ["a caption"], 2)
    write_json(root / "reports/report.json", {"figure": 1})


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_files_and_folders_follow_the_umask(tmp_path, umask, mask):
    umask(mask)
    root = tmp_path / "all"
    write_everything(root)
    paths = [root, *root.rglob("*")]
    endings = {path.suffix for path in paths if path.is_file()}
    assert {".safetensors", ".h5", ".pt", ".zip", ".mp4", ".png", ".json", ".jsonl"} <= endings
    assert list(root.glob("run/checkpoints/*/model.safetensors"))
    assert not list(root.rglob("*.tmp"))
    wrong = {
        str(path.relative_to(root)): oct(mode(path))
        for path in paths
        if mode(path) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong


def test_a_file_that_has_them_already_is_not_touched(tmp_path, umask, monkeypatch):
    """On some network disks nobody may change permissions."""
    path = tmp_path / "x"
    path.touch()
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("chmod"))
    follow_umask(path)
    assert os.listdir(tmp_path) == ["x"]
