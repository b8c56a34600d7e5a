"""EWC, PI and RW against values of the released code; checkpoints and names under DDP."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import golden_files
import numpy as np
import pytest
import torch
from torch import nn

from methods.importance import get_regularizer
from utils.errors import UserError

CPU = torch.device("cpu")
NAMES = ("ewc", "pi", "rw")


class Net(nn.Module):
    def __init__(self, a, b, c=None):
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        if c is not None:
            self.c = nn.Parameter(c.clone())


class Wrapped(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def options(name, alpha=0.9, iterations=2, normalize=True):
    return SimpleNamespace(
        regularizer=name, reg_alpha=alpha, reg_iterations=iterations, reg_no_normalize=not normalize
    )


def load(name, device=CPU):
    return golden_files.load(f"regularizer_{name}", device)


def give_gradients(net, z, task, i):
    for name, parameter in net.named_parameters():
        parameter.grad = z[f"g{task}_{i}_{name.removeprefix('module.')}"].clone()


def descend(net, lr):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= lr * parameter.grad


def learn(net, regularizer, z, meta, task=1, steps=range(6)):
    for i in steps:
        give_gradients(net, z, task, i)
        regularizer.update()
        descend(net, meta[f"lr{task}"])


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, seed, wrap, either_device):
    z, meta = load(f"{name}-{seed}", either_device)
    opts = options(name, meta["alpha"], meta["iterations"], meta["normalize"])
    net = Net(z["init_a"], z["init_b"])
    model = Wrapped(net) if wrap else net
    regularizer = get_regularizer(model, None, either_device, opts, None)
    assert not regularizer.penalize
    assert regularizer.add_penalty() == 0
    learn(net, regularizer, z, meta)
    torch.testing.assert_close(net.a.detach(), z["end_a"], rtol=1e-5, atol=1e-6)
    state = regularizer.state_dict()
    for key in ("fisher", "score", "delta"):
        assert (key in state) == (f"state_{key}_a" in z)
        for parameter in ("a", "b") if key in state else ():
            torch.testing.assert_close(
                state[key][parameter], z[f"state_{key}_{parameter}"], rtol=1e-5, atol=1e-6
            )

    old, net = Net(z["end_a"], z["end_b"]), Net(z["end_a"], z["end_b"])
    stored = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    for key in ("fisher", "score"):
        if key in state:
            stored[key] = {parameter: z[f"state_{key}_{parameter}"] for parameter in ("a", "b")}
    regularizer = get_regularizer(Wrapped(net) if wrap else net, old, either_device, opts, stored)
    penalties = []
    for i in range(3):
        give_gradients(net, z, 2, i)
        regularizer.update()
        descend(net, meta["lr2"])
        penalties.append(regularizer.add_penalty().item())
    np.testing.assert_allclose(penalties, z["penalties"].cpu().numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_penalty_gradient_and_new_parameters(name):
    z, meta = load(f"{name}-0")
    opts = options(name)
    net = Net(z["init_a"], z["init_b"])
    first = get_regularizer(net, None, CPU, opts, None)
    learn(net, first, z, meta)
    state = first.state_dict()
    grown = Net(z["end_a"] + 0.1, z["end_b"], c=torch.ones(2))
    second = get_regularizer(grown, net, CPU, opts, state)
    assert second.penalize
    grown.zero_grad()
    second.add_penalty()
    parts = [state[key]["a"] for key in ("fisher", "score") if key in state]
    importance = sum((part - part.min()) / (part.max() - part.min() + 1e-8) for part in parts)
    torch.testing.assert_close(
        grown.a.grad, 2 * importance * (grown.a - net.a).detach(), rtol=1e-4, atol=1e-6
    )
    assert grown.c.grad is None
    assert not torch.isnan(grown.b.grad).any()
    for parameter in grown.parameters():
        parameter.grad = torch.ones_like(parameter)
    second.update()
    descend(grown, 0.1)
    second.update()
    after = second.state_dict()
    key = "fisher" if name != "pi" else "score"
    assert set(after[key]) == {"a", "b", "c"}
    if name != "pi":
        # From ones, with gradients of one, the Fisher information stays one.
        torch.testing.assert_close(after["fisher"]["c"], torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_is_the_unbroken_one(name):
    z, meta = load(f"{name}-1")
    opts = options(name, iterations=2)
    unbroken_net = Net(z["init_a"], z["init_b"])
    unbroken = get_regularizer(unbroken_net, None, CPU, opts, None)
    learn(unbroken_net, unbroken, z, meta)

    net = Net(z["init_a"], z["init_b"])
    regularizer = get_regularizer(net, None, CPU, opts, None)
    learn(net, regularizer, z, meta, steps=range(3))
    file = io.BytesIO()
    torch.save({"regularizer": regularizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["regularizer"]
    resumed_net = copy.deepcopy(net)
    resumed = get_regularizer(resumed_net, None, CPU, opts, None)
    resumed.load_state_dict(saved)
    learn(resumed_net, resumed, z, meta, steps=range(3, 6))
    for key in ("fisher", "score"):
        for parameter, value in unbroken.state_dict().get(key, {}).items():
            assert torch.equal(resumed.state_dict()[key][parameter], value)


def test_parameters_without_gradient_are_left_alone():
    z, _ = load("rw-0")
    for name in NAMES:
        net = Net(z["init_a"], z["init_b"])
        regularizer = get_regularizer(net, None, CPU, options(name, iterations=1), None)
        for _ in range(3):
            net.a.grad = torch.ones_like(net.a)
            regularizer.update()
            descend_a = net.a.detach() - 0.1
            net.a.data.copy_(descend_a)
        state = regularizer.state_dict()
        if name == "pi":
            assert torch.equal(state["delta"]["b"], torch.zeros(5))
        else:
            assert torch.equal(state["fisher"]["b"], torch.ones(5))


def test_no_regularizer():
    net = Net(torch.zeros(1), torch.zeros(1))
    assert get_regularizer(net, None, CPU, options(None), None) is None


def test_wrong_states_and_names_are_user_errors():
    net = Net(torch.zeros(2), torch.zeros(2))
    ewc = get_regularizer(net, None, CPU, options("ewc"), None)
    with pytest.raises(UserError, match="--regularizer pi: the checkpoint holds the importance of 'ewc'"):
        get_regularizer(net, net, CPU, options("pi"), ewc.state_dict())
    with pytest.raises(UserError, match="rw"):
        get_regularizer(net, net, CPU, options("rw"), None).load_state_dict(ewc.state_dict())
    with pytest.raises(UserError, match="--regularizer l2"):
        get_regularizer(net, net, CPU, options("l2"), None)
