"""Two processes over gloo by `accelerate launch` with the files that users take.

DDP, ZeRO 1 to 3, FSDP2, one launch per strategy; what came out is compared with one process.
"""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from dalle2_video.model_file import load_model
from dalle2_video.training.config import RunConfig
from dalle2_video.training.log import read_metrics
from dalle2_video.training.loop import train
from tests.helpers.launching import launch_command, run_launch
from tests.helpers.run_files import half_done, metric
from tests.helpers.tiny_stage import DIM, TinyNet, tiny_config, tiny_stage

FOLDERS = ("foreign", "back")
LAYOUTS = {
    "ddp": "WholeParams",
    "zero1": "ZeroParams",
    "zero2": "ZeroParams",
    "zero3": "Zero3Params",
    "fsdp2": "FSDPParams",
}


def launch(strategy: str, folder: Path, precision: str = "no") -> None:
    """Two ranks of tiny_stage.py under configs/accelerate/<strategy>.yaml, without CUDA."""
    command = [*launch_command(strategy), "-m", "tests.helpers.tiny_stage", str(folder), precision]
    run_launch(command)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    train(tiny_stage(), tiny_config(micro_batch_size=2), RunConfig(str(folder), seed=3))
    return folder


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_two_processes_agree_with_one(strategy, single, tmp_path):
    half_done(single, tmp_path / "foreign")  # begun by one process
    launch(strategy, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert {rank["type"] for rank in ranks} == {LAYOUTS[strategy]}
    # of two ranks one writes
    assert ranks[0]["written"] > 0 and ranks[1]["written"] == 0
    total = sum(p.numel() for p in TinyNet().parameters() if p.requires_grad)
    held = [rank["held"] for rank in ranks]
    if strategy == "ddp":
        assert held == [total, total]
    else:  # really split, but for the padding to equal parts
        assert total <= sum(held) <= total + 2 * len(list(TinyNet().parameters()))
        assert max(held) < 0.8 * total

    for name in ("loss", "grad_norm", "val/loss"):
        expected = metric(single, name)
        assert len(expected) == (2 if name == "val/loss" else 4)
        assert metric(tmp_path / "whole", name) == pytest.approx(expected, abs=1e-5)
        # resumed after step 2: not a digit differs
        assert metric(tmp_path / "resumed", name) == metric(tmp_path / "whole", name)

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

    # what is sampled under the EMA is what the consolidated file gives
    net = tiny_stage().model  # with the frozen tower, which is in no file
    net.load_state_dict(whole.state, strict=False)
    predicted = net(torch.linspace(-1, 1, DIM)[None]).flatten().tolist()
    for rank in ranks:
        assert rank["predicts"] == pytest.approx(predicted, abs=1e-6)
        assert "rank 1 against rank 0: train.lr: 1.01 there, 0.01 here" in rank["apart"]
    assert not (tmp_path / "apart/metrics.jsonl").exists()

    # begun by one process, ended by two, and the other way round
    half_done(tmp_path / "whole", tmp_path / "back")
    printed = StringIO()
    with redirect_stdout(printed):
        train(tiny_stage(), tiny_config(micro_batch_size=2), RunConfig(str(tmp_path / "back"), 3))
    moments = "and the optimizer's" if strategy == "ddp" else "but not the"
    assert f"weights and EMA are carried over, {moments} moments" in printed.getvalue()
    expected = metric(single)
    foreign, back = metric(tmp_path / "foreign"), metric(tmp_path / "back")
    # with new moments both go the same way, which is another one than with the old
    assert foreign == pytest.approx(back, abs=1e-5) and len(foreign) == 4
    if strategy == "ddp":
        assert foreign == pytest.approx(expected, abs=1e-5)
    else:
        assert foreign[24] == pytest.approx(expected[24], abs=1e-5)
        assert foreign[32] != pytest.approx(expected[32], abs=1e-4)
    a, b = (load_model(tmp_path / name / "model.safetensors", "tiny") for name in FOLDERS)
    for name, tensor in a.state.items():
        torch.testing.assert_close(b.state[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_zero3_in_bf16_keeps_float32_weights(single, tmp_path):
    """DeepSpeed's own autocast: other digits than float32, about the same losses."""
    launch("zero3", tmp_path, "bf16")
    full, low = metric(single), metric(tmp_path / "whole")
    assert low == pytest.approx(full, rel=0.03) and low != pytest.approx(full, abs=1e-6)
    assert metric(tmp_path / "resumed") == low
    state = load_model(tmp_path / "whole/model.safetensors", "tiny").state
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    rounded = [torch.equal(t, t.to(torch.bfloat16).float()) for t in state.values()]
    assert not all(rounded)  # masters in float32, not bf16 weights written out


@pytest.mark.slow
def test_fsdp2_goes_on_over_more_ranks_with_its_moments(tmp_path) -> None:
    """As docs/training.md's table has it: two processes, then four, then two."""
    lengths = [(2, 160), (4, 320), (2, 480)]
    for processes, clips in lengths:
        command = launch_command("fsdp2", processes=processes)
        command += ["-m", "tests.helpers.tiny_run", str(tmp_path / "run"), "0", f"clips={clips}"]
        printed = run_launch([*command, "lr_schedule=constant", "log_every_clips=8"])
    assert "of fsdp2 on 4 processes under fsdp2 on 2 processes" in printed
    assert "weights and EMA are carried over, and the optimizer's moments" in printed
    cfg = tiny_config(clips=480, lr_schedule="constant", log_every_clips=8)
    train(tiny_stage(), cfg, RunConfig(str(tmp_path / "single"), seed=3))
    single = metric(tmp_path / "single")
    assert metric(tmp_path / "run") == pytest.approx(single, abs=1e-5)
