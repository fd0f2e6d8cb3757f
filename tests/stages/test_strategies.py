"""Every stage by its entry script under every strategy: the losses and weights of one process.

One launch of two processes per strategy trains all stages.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import preprocess
from dalle2_video.cli import compose
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.training.log import read_metrics
from dalle2_video.training.prepare import stacked_layers
from tests.helpers.launching import launch_command, run_launch
from tests.helpers.runs import JOINT, SMALL, Job, run

STEPS, BATCH = 20, 8
LENGTH = [
    f"{key}.train.{setting}"
    for key in ("clip", "prior", "unets.base", "unets.tsr", "unets.ssr")
    for setting in (f"clips={STEPS * BATCH}", f"log_every_clips={BATCH}", "save_every_clips=80")
]
JOBS = {
    "clip": ("clip", []),
    "prior": ("prior", []),
    "base": ("base", []),
    "joint": ("base", JOINT),
    "tsr": ("tsr", ["unets.tsr.model.residual=0", "unets.tsr.diffusion.prediction=v"]),
    "ssr": ("ssr", []),
    # DeepSpeed clips its layers with all others, the loop apart
    "variance": (
        "base",
        ["unets.base.model.learned_variance=true", "unets.base.train.grad_clip=null"],
    ),
}
ALL = list(JOBS)
JOBS["short"] = ("base", ["unets.base.train.clips=48", "unets.base.train.save_every_clips=48"])


def jobs(data: Path, root: Path, *more: str) -> dict[str, Job]:
    """All stages, each in a folder of its own."""
    places = [f"faces.root={data}", *more]
    return {
        name: (stage, [*SMALL, *LENGTH, *changes, *places, f"run_dir={root / name}"])
        for name, (stage, changes) in JOBS.items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    cfg = compose(*SMALL, f"faces.root={folder}/data")
    preprocess.main(cfg)
    return folder / "data"


@pytest.fixture(scope="module")
def alone(data):
    """A job's root after this process has trained it, once; the CLIP's before the others'."""
    root = data.parent / "alone"

    def trained(name: str) -> Path:
        if not (root / name).exists():
            if name != "clip":
                shutil.copytree(trained("clip") / "clip", root / name / "clip")
            run([jobs(data, root)[name]])
        return root / name

    return trained


def figures(folder: Path, name: str) -> list[float]:
    lines = read_metrics(folder / JOBS[name][0] / "metrics.jsonl")
    return [line[key] for line in lines for key in ("loss", "val/loss") if key in line]


def launch_jobs(names: Sequence[str], strategy: str, data: Path, alone, root: Path, *more: str):
    """All of them in one launch, the CLIP of the others being that of one process, so that their
    losses can agree.
    """
    given = jobs(data, root, *more)
    for name in ("base", "short"):
        given[name][1].append("unets.base.activation_checkpointing=true")  # the losses stay
    for name in names:
        if name != "clip":
            shutil.copytree(alone("clip") / "clip", root / name / "clip")
    path = root / "jobs.json"
    root.mkdir(exist_ok=True)
    path.write_text(json.dumps([given[name] for name in names]))
    run_launch([*launch_command(strategy), "-m", "tests.helpers.runs", str(path)], timeout=900)


def assert_alike(names: Sequence[str], alone, root: Path) -> None:
    for name in names:
        stage = JOBS[name][0]
        expected, found = figures(alone(name), name), figures(root / name, name)
        assert len(expected) >= (6 if name == "short" else STEPS)
        # steps of images alone leave temporal layers gradients of rounding errors, which AdamW
        # blows up to whole updates
        assert found == pytest.approx(expected, rel=3e-4 if name == "joint" else 1e-5), name
        one = load_file(alone(name) / stage / "model.safetensors")
        two = load_file(root / name / stage / "model.safetensors")
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-3, rtol=0.02, msg=f"{name} {key}")


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_two_processes_train_the_decoder_as_one_does(strategy, data, alone, tmp_path) -> None:
    launch_jobs(["short"], strategy, data, alone, tmp_path)
    assert_alike(["short"], alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"])
def test_two_processes_train_every_stage_as_one_does(strategy, data, alone, tmp_path) -> None:
    launch_jobs(ALL, strategy, data, alone, tmp_path)
    assert_alike(ALL, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_in_bf16_they_do_about_the_same(strategy, data, alone, tmp_path) -> None:
    launch_jobs(ALL, strategy, data, alone, tmp_path, "mixed_precision=bf16")
    for name in ALL:
        expected, found = figures(alone(name), name), figures(tmp_path / name, name)
        # joint training: see `assert_alike`
        mean, most = (0.06, 0.3) if name == "joint" else (0.02, 0.05)
        assert found == pytest.approx(expected, rel=most), name
        apart = sum(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert apart < mean * sum(expected), name
        assert found != pytest.approx(expected, rel=1e-6), "it was really another precision"


@pytest.mark.slow
def test_small_is_really_split(tmp_path) -> None:
    """Weights, gradients, optimizer and EMA of each process: the total over the processes."""
    out = tmp_path / "shards.json"
    run_launch([sys.executable, "-m", "benchmarks.sharded", "--out", str(out)], timeout=600)
    found = json.loads(out.read_text())
    for strategy in ("zero3", "fsdp2"):
        assert found[f"{strategy}_over_even_share"] < 1.1
        assert 0.45 < found[f"{strategy}_of_one_process"] < 0.55
        assert found[f"{strategy}_over_the_table"] == pytest.approx(1, abs=0.1)


def test_fsdp2_gathers_the_layers_of_a_network_one_by_one() -> None:
    with torch.device("meta"):
        unet = Unet3D(UnetConfig(dim=64, mults=(1, 2)), 8, 8)
    assert stacked_layers(unet) == ["Block", "Downsample", "Upsample"]
    inside = sum(
        p.numel()
        for part in unet.modules()
        if type(part).__name__ in stacked_layers(unet)
        for p in part.parameters()
    )
    assert inside > 0.7 * sum(p.numel() for p in unet.parameters())
