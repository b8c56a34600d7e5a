"""EWC, PI and RW in blocks: gradient and value of the penalty, and estimates, for all memory layouts."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.importance import Regularization, Regularizer, get_regularizer

CPU = torch.device("cpu")
NAMES = ("ewc", "pi", "rw")
BLOCKS = (64, 1000, 1 << 16, sys.maxsize)
OPTIONS = {"reg_alpha": 0.9, "reg_iterations": 2, "reg_no_normalize": False}


def gapped(tensor: Tensor) -> Tensor:
    """The same numbers with unused memory between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels last": lambda t: t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "transposed": lambda t: t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
    "gapped": gapped,
}


class Net(nn.Module):
    """Small parameters, one of 4320 numbers, a 1×1 kernel; ``head`` is new."""

    def __init__(self, layout: str, seed: int, *, head: bool = True) -> None:
        super().__init__()
        shapes = {
            "conv": (24, 20, 3, 3),
            "point": (30, 40, 1, 1),
            "linear": (13, 11),
            "bias": (13,),
            "scale": (1,),
            "head": (7, 3, 3, 3),
        }
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            if head or name != "head":
                values = torch.randn(shape, generator=generator)
                self.register_parameter(name, nn.Parameter(LAYOUTS[layout](values)))


def gradients(net: nn.Module, layout: str, seed: int, *, without: tuple[str, ...] = ()) -> None:
    """Give every parameter that trains a gradient in the layout, except those named."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        off = name in without or not parameter.requires_grad
        parameter.grad = None if off else LAYOUTS[layout](values)


def made(name: str, net: nn.Module, old: nn.Module | None = None, state: Any = None) -> Regularizer:
    regularizer = get_regularizer(net, old, CPU, SimpleNamespace(regularizer=name, **OPTIONS), state)
    assert regularizer is not None
    return regularizer


def steps(net: nn.Module, layout: str, count: int, *, seed: int = 0) -> Iterator[int]:
    """Gradients, then plain descent once the caller has looked at them."""
    for step in range(count):
        gradients(net, layout, 100 * seed + step)
        yield step
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad


def learnt(name: str, layout: str = "contiguous") -> tuple[Net, dict[str, Any]]:
    """A network after step 0 and its regulariser's state."""
    old = Net(layout, 1, head=False)
    regularizer = made(name, old)
    for _ in steps(old, layout, 5):
        regularizer.add_penalty(update=True)
    return old, regularizer.state_dict()


def plain_penalty(net: nn.Module, old: nn.Module, state: dict[str, Any]) -> Tensor:
    """Σ importance·(θ − θ_old)² as it is written, for autograd; in double precision."""
    olds = dict(old.named_parameters())
    total = torch.zeros((), dtype=torch.double)
    for name, parameter in net.named_parameters():
        if name in olds and parameter.requires_grad:
            parts = [state[key][name].double() for key in ("fisher", "score") if key in state]
            importance = sum((part - part.min()) / (part.max() - part.min() + 1e-8) for part in parts)
            total = total + (importance * (parameter.double() - olds[name].detach().double()).square()).sum()
    return total


def assert_penalty_is_autograds(regularizer: Regularizer, net: Net, old: Net, state: dict[str, Any]) -> None:
    penalty = 500 * plain_penalty(net, old, state)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    pulls = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
    expected: dict[str, Tensor | None] = dict.fromkeys(dict(net.named_parameters()))
    for (name, parameter), pull in zip(trained.items(), pulls, strict=True):
        parts = [part.clone() for part in (parameter.grad, pull) if part is not None]
        expected[name] = sum(parts) if parts else None
    value = regularizer.add_penalty(500)
    assert not value.requires_grad and value.shape == ()
    torch.testing.assert_close(value.double(), penalty.detach(), rtol=1e-5, atol=0)
    for name, parameter in net.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_value_are_autograds(name: str, of_parameter: str, of_gradient: str) -> None:
    old, state = learnt(name, "channels last")
    net = Net(of_parameter, 2)
    regularizer = made(name, net, old, state)
    for block in BLOCKS:
        regularizer.block = block
        gradients(net, of_gradient, 3)
        assert_penalty_is_autograds(regularizer, net, old, state)


@pytest.mark.parametrize("name", NAMES)
def test_a_penalised_parameter_without_gradient_gets_one(name: str) -> None:
    old, state = learnt(name)
    net = Net("channels last", 2)
    regularizer = made(name, net, old, state)
    gradients(net, "channels last", 3, without=("conv", "bias", "head"))
    assert_penalty_is_autograds(regularizer, net, old, state)
    assert net.conv.grad is not None and net.conv.grad.stride() == net.conv.stride()
    assert net.head.grad is None


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_out(name: str, later: bool) -> None:
    old, state = learnt(name)
    net = Net("contiguous", 2)
    net.conv.requires_grad_(later)
    regularizer = made(name, net, old, state)
    net.conv.requires_grad_(False)
    gradients(net, "contiguous", 3)
    assert_penalty_is_autograds(regularizer, net, old, state)
    assert net.conv.grad is None
    before = copy.deepcopy(regularizer.state_dict())
    regularizer.update()
    for quantity in ("fisher", "delta", "running"):
        if "conv" in before.get(quantity, {}):
            assert torch.equal(regularizer.state_dict()[quantity]["conv"], before[quantity]["conv"])


@pytest.mark.parametrize("name", NAMES)
def test_no_importance_changes_no_gradient(name: str) -> None:
    old, state = learnt(name)
    for quantity in ("fisher", "score"):
        for value in state.get(quantity, {}).values():
            value.zero_()
    net = Net("contiguous", 2)
    regularizer = made(name, net, old, state)
    gradients(net, "contiguous", 3)
    before = [parameter.grad.clone() for parameter in net.parameters()]
    assert regularizer.penalize and regularizer.add_penalty(500) == 0
    for parameter, gradient in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def run(name: str, block: int, *, fused: bool, layout: str = "channels last") -> tuple[Any, list[Tensor]]:
    """State and weights after a few penalised steps."""
    old, state = learnt(name, layout)
    net = Net(layout, 2)
    regularizer = made(name, net, old, state)
    regularizer.block = block
    for step in steps(net, layout, 5, seed=1):
        if step == 2:  # reaches the estimate of neither, but the penalty of one
            net.conv.grad = net.head.grad = None
        if fused:
            regularizer.add_penalty(0.5, update=True)
        else:
            regularizer.update()
            regularizer.add_penalty(0.5)
    return regularizer.state_dict(), [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_the_bits_of_two_and_of_any_block(name: str) -> None:
    state, weights = run(name, sys.maxsize, fused=False)
    for block in (*BLOCKS, 77):
        other_state, other_weights = run(name, block, fused=True)
        for ours, theirs in zip(other_weights, weights, strict=True):
            assert torch.equal(ours, theirs), block
        assert other_state.keys() == state.keys()
        for quantity, values in state.items():
            for parameter, value in values.items() if isinstance(values, dict) else ():
                assert torch.equal(other_state[quantity][parameter], value), (block, quantity, parameter)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_do_not_see_the_penalty(name: str) -> None:
    old, state = learnt(name)
    estimates = []
    for weight in (0.0, 1000.0):
        net = Net("contiguous", 2)
        regularizer = made(name, net, old, state)
        for seed in range(3):
            gradients(net, "contiguous", seed)
            regularizer.add_penalty(weight, update=True)
            with torch.no_grad():
                net.conv.add_(0.01)
        estimates.append(regularizer.state_dict())
    for quantity, values in estimates[0].items():
        for parameter, value in values.items() if isinstance(values, dict) else ():
            assert torch.equal(estimates[1][quantity][parameter], value), (quantity, parameter)


@pytest.mark.parametrize("name", ["pi", "rw"])
def test_where_the_parameters_were_is_kept_in_one_place(name: str) -> None:
    net = Net("channels last", 1)
    regularizer: Any = made(name, net)
    for step in steps(net, "channels last", 5):
        if step == 2:
            net.conv.grad = None
        regularizer.update()
        if step == 0:
            addresses = {key: value.data_ptr() for key, value in regularizer.previous.items()}
        if step % 2 == 0:  # RW looks at the path every other step
            for key, parameter in net.named_parameters():
                assert torch.equal(regularizer.previous[key], parameter.detach()), key
    assert addresses == {key: value.data_ptr() for key, value in regularizer.previous.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_in_a_penalised_step_is_the_unbroken_one(name: str) -> None:
    old, state = learnt(name, "channels last")
    state = copy.deepcopy(state)
    net = Net("channels last", 2)
    regularizer = made(name, net, old, state)
    regularizer.block = 1000
    file = io.BytesIO()
    terms: list[Tensor] = []
    for step in steps(net, "channels last", 6):
        if step == 3:
            twin = copy.deepcopy(net)
            torch.save(regularizer.state_dict(), file)
        terms.append(regularizer.add_penalty(0.5, update=True))
    file.seek(0)
    resumed = made(name, twin, old, state)
    resumed.block = 1000
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in steps(twin, "channels last", 6):
        if step >= 3:
            assert torch.equal(resumed.add_penalty(0.5, update=True), terms[step])
        else:
            twin.zero_grad()  # these steps are behind it
    for ours, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    found, expected = resumed.state_dict(), regularizer.state_dict()
    for quantity, values in expected.items():
        for parameter, value in values.items() if isinstance(values, dict) else ():
            assert torch.equal(found[quantity][parameter], value), (quantity, parameter)


def test_a_skipped_step_reaches_the_penalty_but_not_the_estimate() -> None:
    old, state = learnt("ewc")
    net = Net("contiguous", 2)
    method = Regularization(SimpleNamespace(regularizer="ewc", **OPTIONS), 500.0)
    method.from_previous_step(state)
    context: Any = SimpleNamespace(model=net, model_old=old, device=CPU)
    method.begin_step(context)
    before = copy.deepcopy(method.state_dict()["fisher"])
    gradients(net, "contiguous", 0)
    net.conv.grad[0, 0, 0, 0] = torch.inf
    assert set(method.penalty()) == {"reg"}  # no after_backward: the loss scale overflowed
    for key, value in method.state_dict()["fisher"].items():
        assert torch.equal(value, before[key]), key
    gradients(net, "contiguous", 0)
    method.after_backward()
    method.penalty()
    assert not torch.equal(method.state_dict()["fisher"]["conv"], before["conv"])
    after = copy.deepcopy(method.state_dict()["fisher"])
    method.penalty()  # every backward counts once
    for key, value in method.state_dict()["fisher"].items():
        assert torch.equal(value, after[key]), key
