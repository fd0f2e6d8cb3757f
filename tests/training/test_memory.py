"""The memory table: fixed parts by strategy, activations against a real pass."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from dalle2_video.training.accelerator import make_accelerator
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.memory import (
    ACTIVATIONS,
    CLIPS,
    Memory,
    activations,
    advice,
    fixed_parts,
    peak_bytes,
)
from dalle2_video.training.stage import Loss
from tests.helpers.tiny_stage import DIM, TinyNet, tiny_config, tiny_stage


class Looking(nn.Module):
    """A network that looks at its input, as a text tower does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNet()

    def forward(self, x):
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return self.inner(x)


@pytest.mark.parametrize("net", [TinyNet, Looking])
def test_activations_are_those_of_a_real_pass(net, tmp_path) -> None:
    stage = replace(tiny_stage(), model=net())
    accelerator, _ = make_accelerator(tiny_config(), RunConfig(str(tmp_path)))
    before = copy.deepcopy(stage.model.state_dict())
    torch.manual_seed(4)
    random = torch.get_rng_state()
    counted = activations(stage, accelerator, 3)
    assert torch.equal(random, torch.get_rng_state()) and stage.model.training
    assert all(type(p) is nn.Parameter for p in stage.model.parameters())
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor, before[name])

    # by hand: the input of each layer that has a gradient, tanh's output, and what scale multiplies
    floats = CLIPS * (DIM + 16 + DIM)
    assert counted == pytest.approx(4 * floats, abs=4)  # `scale` may count


def test_a_compiled_network_is_not_called_with_tensors_without_data(tmp_path) -> None:
    """A compiled kernel reads the memory that they lack: the process would end there."""
    called = []

    def backend(graph, inputs):
        def run(*arguments):
            called.extend(type(a) for a in arguments)
            return graph(*arguments)

        return run

    stage = replace(tiny_stage(), model=TinyNet())
    accelerator, _ = make_accelerator(tiny_config(), RunConfig(str(tmp_path)))
    plain = activations(stage, accelerator, 3)
    stage.model.compile(backend=backend)
    assert activations(stage, accelerator, 3) == plain
    assert FakeTensor not in called
    stage.model(torch.zeros(2, DIM))
    assert torch.Tensor in called, "it is compiled"


def test_an_objective_that_calls_no_model_is_told(tmp_path) -> None:
    stage = tiny_stage(objective=lambda model, batch, step: Loss(batch.x.mean()))
    accelerator, _ = make_accelerator(tiny_config(), RunConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="objective of tiny does not call its model"):
        activations(stage, accelerator, 3)


def test_what_each_strategy_holds() -> None:
    """The ZeRO table (Rajbhandari et al. 2020, figure 1), in float32, with the EMA."""
    cfg, bare = tiny_config(), tiny_config(ema_halflife_clips=None)

    def total(strategy: str, ranks: int, cfg=cfg) -> float:
        return sum(fixed_parts(1000, 0, strategy, ranks, cfg).values())

    assert total("one process", 1) == 4000 * (1 + 1 + 2 + 1)
    assert total("one process", 1, bare) == 4000 * 4
    assert total("ddp", 8) == 4000 * 6  # with the buckets of its gradients
    assert total("fsdp2", 8) == 4000 * 5 / 8
    assert total("zero1", 8) == 4000 * (1 + 1 + (2 + 1 + 1) / 8)
    assert total("zero2", 8) == 4000 * (1 + (1 + 2 + 1 + 1) / 8)
    assert total("zero3", 8) == 4000 * 6 / 8
    assert fixed_parts(0, 1000, "fsdp2", 8, cfg)["weights"] == 500  # frozen ones are split too


def test_advice_only_where_it_will_not_fit() -> None:
    parts = {"weights": 10e9, ACTIVATIONS: 50e9}
    assert advice(Memory(parts, 80e9), "ddp", 4) == []
    assert advice(Memory(parts, 66e9), "ddp", 4)  # within a tenth of the device
    found = " ".join(advice(Memory(parts, 60e9), "ddp", 4))
    assert "activation_checkpointing" in found and "below 4" in found and "zero3.yaml" in found
    found = " ".join(advice(Memory({"weights": 90e9, ACTIVATIONS: 1e9}, 80e9), "zero3", 1))
    assert "offload" in found and "activation_checkpointing" not in found


def test_the_table_stands_at_the_start_and_the_peak_at_the_end(tmp_path, capsys) -> None:
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "memory" in line]
    names = ["weights", "gradients", "optimizer", "EMA", "activations", "together", "device has"]
    assert all(name in line for name, line in zip(names, found, strict=False))
    assert "measured peak" in lines[-1]
    gigabytes = float(lines[-1].split("GB")[0].split()[-1])
    assert 0.1 < gigabytes <= peak_bytes(torch.device("cpu")) / 1e9 + 0.01
    train(tiny_stage(), tiny_config(), RunConfig(str(tmp_path)))  # done: nothing to tell of
    assert "weights" not in capsys.readouterr().out
