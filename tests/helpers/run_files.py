"""What a run left in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle2_video.model_file import load_model
from dalle2_video.training.checkpoint_files import whole_checkpoints
from dalle2_video.training.log import read_metrics


def metric(folder: Path, name: str = "loss") -> dict[int, float]:
    """{clips seen: value} of the log lines; AssertionError where a step was recorded twice."""
    lines = read_metrics(folder / "metrics.jsonl")
    found = [(line["clips"], line[name]) for line in lines if name in line]
    assert len(found) == len(dict(found)), "a step was recorded twice"
    return dict(found)


def weights(folder: Path) -> dict[str, Tensor]:
    """Those of the model file and, as raw.<name>, of the newest checkpoint of one process."""
    newest = whole_checkpoints(folder / "checkpoints")[-1]
    raw = load_file(newest / "model.safetensors")
    model = load_model(folder / "model.safetensors", "tiny").state
    return model | {f"raw.{name}": tensor for name, tensor in raw.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def half_done(source: Path, target: Path, clips: int = 32) -> Path:
    """A copy of a run as it was before its end at `clips`, at the checkpoint before."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / f"{clips:012d}")
    (target / "model.safetensors").unlink()
    return target
