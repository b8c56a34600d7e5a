"""The optimiser of a step: its momentum, whatever happens to the first update or wrote the checkpoint."""

from __future__ import annotations

import copy

import torch
from torch import nn

from argparser import parse_options
from session.optimizer import load_optimizer, make_optimizer


class Network(nn.Module):
    """The part of a network that ``make_optimizer`` looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.cls = nn.ModuleList([nn.Linear(2, 2)])


def with_gradients(network: Network) -> list[nn.Parameter]:
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return list(network.parameters())


def make(network: Network) -> torch.optim.Optimizer:
    return make_optimizer(parse_options(["--dataset", "shapes", "--task", "15-5"]), network, {}, 0.1)


def test_a_skipped_first_update_leaves_weights_and_momentum_alone() -> None:
    """As a gradient scaler skips it: it tells the fused form of an overflow."""
    network = Network()
    before = copy.deepcopy(network.state_dict())
    optimizer = make(network)
    parameters = with_gradients(network)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in parameters)
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]

    expected = [p.detach().clone() for p in parameters]
    plain = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(3):
        optimizer.step()
        for mine, theirs in zip(parameters, expected, strict=True):
            theirs.grad = mine.grad
        plain.step()
    for mine, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)


def test_bfloat16_weights_learn_what_sgd_says() -> None:
    """PyTorch 2.6's fused form for the CPU does not."""
    network = Network()
    network.body = nn.Linear(64, 64)
    parameters = with_gradients(network.to(torch.bfloat16))
    expected = [p.detach().clone() for p in parameters]
    plain = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True, foreach=False)
    optimizer = make(network)
    for _ in range(3):
        optimizer.step()
        for mine, theirs in zip(parameters, expected, strict=True):
            theirs.grad = mine.grad
        plain.step()
        load_optimizer(optimizer, copy.deepcopy(optimizer.state_dict()))  # as a resumed step does
    for mine, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)


def test_states_of_every_form_of_sgd_load() -> None:
    network = Network()
    parameters = with_gradients(network)
    older = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    untouched = copy.deepcopy(older.state_dict())
    older.step()
    for state in (older.state_dict(), untouched):
        optimizer = make(network)
        load_optimizer(optimizer, state)
        assert all(group["fused"] for group in optimizer.param_groups)
        for index, parameter in enumerate(parameters):
            buffer = optimizer.state[parameter]["momentum_buffer"]
            known = state["state"].get(index, {}).get("momentum_buffer")
            assert torch.equal(buffer, torch.zeros_like(parameter) if known is None else known)
        optimizer.step()
