"""Modules that methods train beside the network: their weights' names, gradients and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from torch import Tensor, nn

from argparser import parse_options
from methods import Batch, Context, Method
from methods.own_modules import collect_modules, load_modules, take_over
from session.optimizer import make_optimizer, take_momentum, weight_names
from tasks import get_task
from train import Precision, Trainer
from utils import distributed
from utils.errors import UserError


class Net(nn.Module):
    """B×3×H×W → logits."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.ModuleList([nn.Conv2d(3, 2, 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = self.cls[0](images)
        return logits, {"logits": logits}


class Heads(Method):
    """A head over the logits; a second one that images without label 1 leave out."""

    def __init__(self, width: int = 4) -> None:
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width))
        self.type = nn.Linear(2, 3)
        self.modes: list[bool] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"head": self.head, "type": self.type}  # nn.Module has an attribute "type"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.modes.append(self.head.training)
        terms = {"head": self.head[0](batch.outputs).square().mean()}
        if (batch.targets == 1).any():
            terms["type"] = self.type(batch.outputs.mean(dim=(2, 3))).square().mean()
        return terms

    def lr_factor(self, parameter: str) -> float:
        return 0.5 if parameter.startswith("Heads.head.") else 1.0

    def weight_decay_factor(self, parameter: str) -> float:
        return 0.0 if parameter == "Heads.type.bias" else 1.0


def made(method: Method | None = None, precision: Precision | None = None) -> tuple[Trainer, nn.Module]:
    method = method or Heads()
    torch.manual_seed(0)
    precision = precision or Precision("O0", torch.device("cpu"))
    context = Context(task=get_task("shapes", "10-10"), step=0, model=Net(), device=precision.device)
    precision.place(context.model)
    methods = {type(method).__name__: method}
    own = precision.place(collect_modules(methods, context))
    optimizer = make_optimizer(parse_options(["--dataset", "shapes"]), context.model, methods, 0.1, own)
    return Trainer(context, methods, optimizer, own_modules=own, precision=precision), own


def batch(labels: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(4, 3, 8, 8, generator=generator), torch.full((4, 8, 8), labels, dtype=torch.uint8)


def gradients(own: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in own.named_parameters() if weight.grad is not None}


def test_names_rates_and_weight_decay() -> None:
    trainer, own = made()
    names = weight_names(trainer.optimizer, (trainer.context.model, own))
    ours = [f"Heads.head.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
    assert sorted(names) == sorted(
        ["cls.0.weight", "cls.0.bias", *ours, "Heads.type.weight", "Heads.type.bias"]
    )
    found = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for weight in group["params"]
    }
    rates = {name: found[id(weight)] for name, weight in own.named_parameters()}
    assert {rates[name] for name in ours} == {(0.05, 1e-4)}
    assert (rates["Heads.type.weight"], rates["Heads.type.bias"]) == ((0.1, 1e-4), (0.1, 0.0))


def test_momentum_is_found_by_name() -> None:
    trainer, own = made()
    trainer.train_step(*batch())
    networks = (trainer.context.model, own)
    content = {
        "optimizer_state": copy.deepcopy(trainer.optimizer.state_dict()),
        "optimizer_weights": weight_names(trainer.optimizer, networks),
    }
    other, other_own = made(Heads(width=5))  # four weights of the head have another shape
    assert take_momentum(other.optimizer, (other.context.model, other_own), content) == 4
    weights = [dict(modules.named_parameters())["Heads.type.weight"] for modules in (own, other_own)]
    momenta = [
        t.optimizer.state[w]["momentum_buffer"] for t, w in zip((trainer, other), weights, strict=True)
    ]
    assert momenta[0].abs().sum() > 0 and torch.equal(*momenta)


def test_they_learn_in_training_mode_and_without_gradient_only_decay() -> None:
    method = Heads()
    trainer, own = made(method)
    own.eval()
    before = copy.deepcopy(own.state_dict())
    trainer.set_training()
    trainer.train_step(*batch(0))
    assert method.modes == [True]
    after = own.state_dict()
    assert not torch.equal(after["Heads.head.0.weight"], before["Heads.head.0.weight"])
    assert not gradients(own)["Heads.type.weight"].any()
    rate = 0.1 * 1e-4 * (1 + 0.9)  # Nesterov's first step
    expected = before["Heads.type.weight"] * (1 - rate)
    torch.testing.assert_close(after["Heads.type.weight"], expected, rtol=0, atol=1e-8)
    assert torch.equal(after["Heads.type.bias"], before["Heads.type.bias"])


def test_gradients_are_those_without_loss_scaling_and_accumulation() -> None:
    expected = None
    for scale, accumulate in ((None, 1), (1024.0, 1), (1024.0, 2)):
        precision = Precision("O0", torch.device("cpu"))
        if scale is not None:
            precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer, own = made(precision=precision)
        images, targets = batch()
        trainer.train_group(list(zip(images.chunk(accumulate), targets.chunk(accumulate), strict=True)))
        if expected is None:
            expected = gradients(own)
            continue
        for name, gradient in gradients(own).items():
            # The second head takes a mean over images first, so its loss is no mean of halves.
            if accumulate == 1 or ".head." in name:
                torch.testing.assert_close(gradient, expected[name])


class Reading(Heads):
    """Counts how often its gradients may be looked at; its head alone overflows."""

    seen = 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "head": self.head[0](batch.outputs.detach()).square().mean() * 1e3,
            "net": batch.outputs.mean(),
        }

    def after_backward(self) -> None:
        self.seen += 1


def test_an_overflow_in_a_module_skips_the_step() -> None:
    method, precision = Reading(), Precision("O0", torch.device("cpu"))
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-100)
    trainer, own = made(method, precision)
    network = trainer.context.model.state_dict()
    before = copy.deepcopy((own.state_dict(), network))
    trainer.train_step(*batch())
    assert method.seen == 0
    assert all(torch.equal(value, before[0][name]) for name, value in own.state_dict().items())
    assert all(torch.equal(value, before[1][name]) for name, value in network.items())
    trainer.train_step(*batch())
    assert method.seen == 1


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize(
    ("device", "bfloat16"),
    [("cpu", True), *(pytest.param("cuda", kind, marks=pytest.mark.cuda) for kind in (True, False))],
)
def test_precision_and_device_are_the_network_s(level: str, device: str, bfloat16: bool) -> None:
    precision = Precision(level, torch.device(device), bfloat16)
    if not bfloat16 and level != "O3":
        assert precision.scaler.is_enabled()
        precision.scaler = torch.amp.GradScaler(device, init_scale=16.0)  # does not overflow here
    trainer, own = made(precision=precision)
    expected = torch.bfloat16 if level == "O3" else torch.float32
    assert {(weight.dtype, weight.device.type) for weight in own.parameters()} == {(expected, device)}
    trainer.train_step(*batch())
    assert all(
        gradient.isfinite().all() and gradient.dtype == expected for gradient in gradients(own).values()
    )


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────


def test_a_step_takes_over_the_modules_of_the_same_form(caplog: pytest.LogCaptureFixture) -> None:
    trainer, own = made()
    trainer.train_step(*batch())
    state, (_, other) = own.state_dict(), made(Heads(width=5))
    before = copy.deepcopy(other.state_dict())
    with caplog.at_level("INFO"):
        take_over(other, state)
    assert "Heads.head: starts from scratch, differs in 0.bias" in caplog.text
    for name, value in other.state_dict().items():
        assert torch.equal(value, (state if ".type." in name else before)[name]), name
    _, same = made()
    take_over(same, state)
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())


class Other(Heads):
    pass


def test_an_interrupted_step_goes_on_with_the_same_modules() -> None:
    method = Heads()
    trainer, own = made(method)
    state = copy.deepcopy(own.state_dict())
    trainer.train_step(*batch())
    load_modules(own, {"Heads": method}, state, {"Heads"})
    assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
    del state["Heads.type.bias"]
    with pytest.raises(
        UserError, match=r"test_own_modules.py: Heads.modules: the step was started with other "
    ):
        load_modules(own, {"Heads": method}, state, {"Heads"})
    with pytest.raises(UserError, match=r"Method.modules: .*\(head.0.bias\); --fresh starts it over"):
        load_modules(nn.Module(), {"Heads": Method()}, state, {"Heads"})
    # A checkpoint of another run (--ckpt) in which the method did not take part.
    method = Other()
    _, own = made(method)
    before = copy.deepcopy(own.state_dict())
    load_modules(own, {"Other": method}, state, {"Heads"})
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


# ── processes ────────────────────────────────────────────────────────────────────────────────────────


def process(rank: int, folder: str) -> None:
    """The joined batch's images, half each; only the second process has label 1, and so all of that head."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    trainer, own = made()
    with torch.no_grad():
        for value in own.state_dict().values():
            value.add_(rank)  # as if each had drawn its own weights
    distributed.broadcast_weights(own)
    images, _ = batch()
    found = []
    for labels in (rank, 0):
        own.get_buffer("Heads.head.1.running_mean").add_(rank)
        trainer.train_step(images[rank::2], torch.full((2, 8, 8), labels, dtype=torch.uint8))
        found.append(gradients(own))
    torch.save({"gradients": found, "state": own.state_dict()}, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_train_the_same_weights_with_the_mean_gradient(tmp_path: Path) -> None:
    spawn(process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for mine, theirs in zip(first["gradients"], second["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    trainer, own = made()
    images, targets = batch()
    trainer.train_step(images, targets)
    for name, gradient in gradients(own).items():
        if ".head.0." in name:
            torch.testing.assert_close(first["gradients"][0][name], gradient)
    # One process alone had a gradient for this one: half of it is the mean. In the second step none had.
    trainer, own = made()
    trainer.train_step(images[1::2], targets[1::2])
    half = gradients(own)["Heads.type.weight"] / 2
    torch.testing.assert_close(first["gradients"][0]["Heads.type.weight"], half)
    assert not first["gradients"][1]["Heads.type.weight"].any()
