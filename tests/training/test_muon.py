"""Muon: orthogonalised updates, against a singular value decomposition and against AdamW."""

import copy

import pytest
import torch
from torch import nn

from dalle2_video.training.muon import MOMENTUM, Muon, orthogonalize
from dalle2_video.training.optimizer import make_optimizer, param_groups
from tests.helpers.tiny_stage import tiny_config


class Net(nn.Module):
    """One parameter of each kind."""

    muon_exclude = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.wide = nn.Linear(24, 5)
        self.tall = nn.Linear(5, 12, bias=False)
        self.last = nn.Linear(12, 12, bias=False)
        self.table = nn.Embedding(7, 3)
        self.null = nn.Parameter(torch.randn(9))


def with_gradients(net: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net


@pytest.mark.parametrize("shape", [(5, 5), (8, 64), (16, 200)])
def test_singular_values_become_one_and_directions_stay(shape) -> None:
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(3, shape[0], shape[0]))
    right, _ = torch.linalg.qr(torch.randn(3, shape[1], shape[0]))
    values = torch.logspace(-1, 1, shape[0])  # a hundred times between smallest and largest
    ours = orthogonalize(left @ torch.diag(values) @ right.mT)
    inside = left.mT @ ours @ right  # diagonal, where the directions are those of the input
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.65).all() and (diagonal < 1.25).all()
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-3
    # nothing of the update lies outside of the input's row space
    torch.testing.assert_close(left @ inside @ right.mT, ours, atol=1e-3, rtol=0)


def test_the_gram_form_is_the_iteration_of_the_source() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 30)
    y = x / x.norm()
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    torch.testing.assert_close(orthogonalize(x[None])[0], y, atol=1e-4, rtol=1e-3)


def test_zero_gradients_move_nothing() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    optimizer = Muon(param_groups(net, 0.0), lr=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_layers_follow_muon_and_the_rest_is_adamw() -> None:
    cfg = tiny_config(optimizer="muon", lr=0.01, weight_decay=0.1)
    torch.manual_seed(0)
    ours = Net()
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    first = make_optimizer(ours, cfg)
    second = make_optimizer(theirs, tiny_config(lr=0.01, weight_decay=0.1))
    assert isinstance(first, Muon) and not isinstance(second, Muon)
    for step in range(3):
        with_gradients(ours, step), with_gradients(theirs, step)
        first.step(), second.step()
    others = dict(theirs.named_parameters())
    same = {name for name, p in ours.named_parameters() if torch.equal(p, others[name])}
    assert same == {"conv.bias", "wide.bias", "last.weight", "table.weight", "null"}

    ours = with_gradients(copy.deepcopy(before), 5)
    make_optimizer(ours, cfg).step()
    for name in ("conv", "wide", "tall"):
        start, end = getattr(before, name).weight, getattr(ours, name).weight
        gradient = end.grad.flatten(1)
        matrix = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        expected = orthogonalize(matrix[None] * (1 - MOMENTUM**2))[0]
        expected = expected if matrix is gradient else expected.T
        size = 0.01 * 0.2 * max(gradient.shape) ** 0.5
        moved = (end - (1 - 0.01 * 0.1) * start).flatten(1)
        torch.testing.assert_close(moved, -size * expected, atol=1e-6, rtol=1e-4)
        assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.2), name


def test_momentum_is_nesterovs() -> None:
    """The update looks ahead from the momentum (Jordan et al. 2024): g + M m, both averaged."""
    net = Net()
    optimizer = make_optimizer(net, tiny_config(optimizer="muon", lr=0.01, weight_decay=0.0))
    momentum = torch.zeros_like(net.wide.weight)
    for seed in range(3):
        before = net.wide.weight.detach().clone()
        with_gradients(net, seed)
        optimizer.step()
        gradient = net.wide.weight.grad
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        expected = -0.01 * 0.2 * 24**0.5 * orthogonalize(ahead[None])[0]
        torch.testing.assert_close(
            net.wide.weight - before, expected, atol=1e-6, rtol=1e-4, msg=f"step {seed}"
        )


def test_a_state_is_loaded_into_another_optimizer() -> None:
    cfg = tiny_config(optimizer="muon")
    whole = with_gradients(Net(), 0)
    first = make_optimizer(whole, cfg)
    first.step()
    half = copy.deepcopy(whole)
    second = make_optimizer(half, cfg)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with_gradients(whole, 1), with_gradients(half, 1)
    first.step(), second.step()
    for (name, a), b in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    """Neither weights nor moments, so that the step after it is as if there had been none."""
    ours = Net()
    theirs = copy.deepcopy(ours)
    with_gradients(ours, 0), with_gradients(theirs, 0)
    cfg = tiny_config(optimizer="muon")
    first, second = make_optimizer(ours, cfg), make_optimizer(theirs, cfg)
    first.step(), second.step()
    for p in ours.parameters():
        p.grad = torch.full_like(p, float("nan"))
    first.found_inf = torch.tensor(1.0)
    first.step()
    first.found_inf = torch.tensor(0.0)
    with_gradients(ours, 1), with_gradients(theirs, 1)
    first.step(), second.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
