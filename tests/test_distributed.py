"""Two processes over gloo by `accelerate launch` with the files that users take.

DDP, ZeRO 2 and 3, FSDP2, one launch per strategy; what came out is compared with one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle2_video.checkpoint import load_model
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from dalle2_video.training.stage import RunConfig
from tests.tiny_stage import TinyNet, tiny_config, tiny_stage

ROOT = Path(__file__).parents[1]
LAYOUTS = {
    "ddp": "WholeShards",
    "zero2": "Zero12Shards",
    "zero3": "Zero3Shards",
    "fsdp2": "DTensorShards",
}


def launch(strategy: str, folder: Path, precision: str = "no") -> None:
    """Two ranks of tiny_stage.py under configs/accelerate/<strategy>.yaml, without CUDA."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", f"configs/accelerate/{strategy}.yaml", "--main_process_port", "0"]
    if strategy == "fsdp2":
        command += ["--fsdp_min_num_params", "64"]  # small enough to split the tiny net's layers
    command += ["-m", "tests.tiny_stage", str(folder), precision]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    train(tiny_stage(), tiny_config(micro_batch_size=2), RunConfig(str(folder), seed=3))
    return folder


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = read_metrics(folder / "metrics.jsonl")
    found = [(line["clips"], line[name]) for line in lines if name in line]
    assert len(found) == len(dict(found)), "a step was recorded twice"
    return dict(found)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3", "fsdp2"]
)
def test_two_processes_agree_with_one(strategy, single, tmp_path):
    launch(strategy, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert {rank["type"] for rank in ranks} == {LAYOUTS[strategy]}
    # PAPERS.md 10, no. 8: of two ranks one writes
    assert ranks[0]["written"] > 0 and ranks[1]["written"] == 0
    total = sum(p.numel() for p in TinyNet().parameters() if p.requires_grad)
    held = [rank["held"] for rank in ranks]
    if strategy == "ddp":
        assert held == [total, total]
    else:  # really split, but for the padding to equal parts
        assert total <= sum(held) <= total + 2 * len(list(TinyNet().parameters()))
        assert max(held) < 0.8 * total

    for name in ("loss", "grad_norm", "val/loss"):
        expected = losses(single, name)
        assert len(expected) == (2 if name == "val/loss" else 4)
        assert losses(tmp_path / "whole", name) == pytest.approx(expected, abs=1e-5)
        # resumed after step 2: not a digit differs
        assert losses(tmp_path / "resumed", name) == losses(tmp_path / "whole", name)

    one = load_model(single / "model.safetensors", "tiny")
    whole = load_model(tmp_path / "whole/model.safetensors", "tiny")
    resumed = load_model(tmp_path / "resumed/model.safetensors", "tiny")
    assert whole.hash == resumed.hash
    assert whole.state.keys() == one.state.keys()  # full, without the frozen tower
    assert (whole.meta, whole.config) == (one.meta, one.config)
    for name, tensor in one.state.items():
        assert whole.state[name].dtype == torch.float32
        assert torch.allclose(whole.state[name], tensor, atol=1e-5), name

    lines = read_metrics(tmp_path / "broken/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1]  # skipped on both ranks, then goes on
    assert lines[2]["loss"] is not None
    state = load_model(tmp_path / "broken/model.safetensors", "tiny").state
    assert all(tensor.isfinite().all() for tensor in state.values())

    checkpoint = tmp_path / "whole/checkpoints/000000000032"
    assert {p.name for p in checkpoint.glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert not list((tmp_path / "whole/checkpoints").glob(".*"))


def test_zero3_in_bf16_keeps_float32_weights(single, tmp_path):
    """DeepSpeed's own autocast: other digits than float32, about the same losses."""
    launch("zero3", tmp_path, "bf16")
    full, low = losses(single, "loss"), losses(tmp_path / "whole", "loss")
    assert low == pytest.approx(full, rel=0.03) and low != pytest.approx(full, abs=1e-6)
    assert losses(tmp_path / "resumed", "loss") == low
    state = load_model(tmp_path / "whole/model.safetensors", "tiny").state
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    rounded = [torch.equal(t, t.to(torch.bfloat16).float()) for t in state.values()]
    assert not all(rounded)  # masters in float32, not bf16 weights written out
