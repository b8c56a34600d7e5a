"""Optimiser and learning-rate schedule of a step; the schedule is stepped once per iteration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, PolynomialLR, SequentialLR, StepLR

from argparser import Options
from methods import Method
from methods.checks import checked_factor
from utils.errors import UserError

WARMUP_FROM = 1e-3  # share of the poly curve that the warm-up of SSUL and DKD begins with


def warmup_poly_factor(
    i: int, n: int, warmup: float = 0.0, warmup_factor: float = WARMUP_FROM, power: float = 0.9
) -> float:
    """Factor on the learning rate of iteration i of n: (1 − i/n)^power times a linear warm-up.

    Args:
        i: from 0.
        n: iterations.
        warmup: share of them over which the second factor rises from ``warmup_factor`` to 1; not rounded to
            whole iterations.
        warmup_factor: its first value.
        power: exponent.
    """
    return _factor(i, n, warmup * n, warmup_factor, power)


def _factor(i: int, n: int, warmup_iters: float, warmup_factor: float, power: float) -> float:
    factor = max(1 - i / n, 0.0) ** power
    if i < warmup_iters:
        factor *= warmup_factor + (1 - warmup_factor) * i / warmup_iters
    return factor


class FlooredPolyLR(LRScheduler):
    """Poly schedule with a smallest rate, and a warm-up that multiplies it (:func:`warmup_poly_factor`).

    No parameter group's rate is below ``min_lr``, whatever its own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        power: float,
        min_lr: float = 0.0,
        warmup_iters: float = 0,
    ) -> None:
        self.max_iters, self.power = max_iters, power
        self.min_lr, self.warmup_iters = min_lr, warmup_iters
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]  # float | Tensor in newer versions of torch
        """The rates of the iteration that ``step()`` has come to."""
        factor = _factor(self.last_epoch, self.max_iters, self.warmup_iters, WARMUP_FROM, self.power)
        return [max(float(lr) * factor, self.min_lr) for lr in self.base_lrs]


@dataclass(frozen=True)
class Schedule:
    """The learning-rate schedule of a step; the field names are the options'.

    Attributes:
        lr_policy: ``poly``: lr·(1 − i/iterations)^lr_power; ``step``: lr·lr_decay_factor^⌊i/lr_decay_step⌋.
        lr_power: exponent of ``poly``.
        lr_decay_step: iterations between two drops of ``step``.
        lr_decay_factor: the drop.
        warmup: share of the iterations with linear warm-up.
        warmup_form: ``before``: the policy has the rest of the iterations (SSUL on ADE20K); ``factor``: the
            warm-up multiplies the first part of ``poly``'s curve, which has all iterations, and is rounded
            down to whole ones (SSUL's released code); ``exact_factor``: it is not rounded (DKD, STAR).
        min_lr: ``poly`` never falls below it, in any group.
    """

    lr_policy: str = "poly"
    lr_power: float = 0.9
    lr_decay_step: int = 5000
    lr_decay_factor: float = 0.1
    warmup: float = 0.0
    warmup_form: str = "before"
    min_lr: float = 0.0

    @classmethod
    def of(cls, opts: Options) -> Schedule:
        """That of a run's options."""
        return cls(**{field.name: getattr(opts, field.name) for field in fields(cls)})

    def make(self, optimizer: Optimizer, iterations: int) -> LRScheduler:
        """The schedule of an optimiser; call ``step()`` after every optimiser step.

        Args:
            optimizer: its parameter groups keep their own base rates.
            iterations: of the step, warm-up included.

        Raises:
            UserError: no iteration left after the warm-up, or a rate that falls to 0 before the end.
        """
        poly, multiplies = self.lr_policy == "poly", self.warmup_form != "before"
        share = self.warmup * iterations
        warmup = int(share) if multiplies else round(share)
        remaining = iterations - warmup
        if remaining < 1:
            raise UserError(
                f"{iterations} iterations with {warmup} of warm-up leave nothing to train: "
                "use more --epochs or a smaller --batch_size"
            )
        if poly:
            last, how = (1 / remaining) ** self.lr_power, "a smaller --lr_power"
        else:
            last = self.lr_decay_factor ** ((remaining - 1) // self.lr_decay_step)
            how = "a larger --lr_decay_step or --lr_decay_factor"
        if max(group["lr"] for group in optimizer.param_groups) * last < torch.finfo(torch.float32).tiny:
            raise UserError(f"the learning rate falls to 0 within the {iterations} iterations; give {how}")
        if poly and multiplies:
            warmup_iters = share if self.warmup_form == "exact_factor" else warmup
            return FlooredPolyLR(optimizer, iterations, self.lr_power, self.min_lr, warmup_iters)
        main: LRScheduler
        if poly and self.min_lr > 0:
            main = FlooredPolyLR(optimizer, remaining, self.lr_power, self.min_lr)
        elif poly:
            main = PolynomialLR(optimizer, total_iters=remaining, power=self.lr_power)
        else:
            main = StepLR(optimizer, step_size=self.lr_decay_step, gamma=self.lr_decay_factor)
        if warmup == 0:
            return main
        first = LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
        return SequentialLR(optimizer, [first, main], milestones=[warmup])


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Bring a new schedule to where it stands after some optimiser steps, to the last bit."""
    with warnings.catch_warnings():
        # That no optimiser step came before.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def make_optimizer(
    opts: Options,
    model: nn.Module,
    methods: Mapping[str, Method],
    lr: float,
    own_modules: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; one group of parameters per learning rate and weight decay.

    ``lr`` is the rate before any factor; ``own_modules`` are the methods' (``collect_modules``).

    Raises:
        UserError: no weight is left to train.
    """
    networks = [model] if own_modules is None else [model, own_modules]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in _named(networks):
        if not parameter.requires_grad:
            continue
        factor = math.prod(
            checked_factor(method, "lr_factor", name, method.lr_factor(name)) for method in methods.values()
        )
        if opts.lr_old is not None and model.is_older_classifier(name):  # type: ignore[operator]
            factor *= opts.lr_old
        decay = math.prod(
            checked_factor(method, "weight_decay_factor", name, method.weight_decay_factor(name))
            for method in methods.values()
        )
        groups.setdefault((factor, decay), []).append(parameter)
    if not groups:
        raise UserError("no weight is left to train: drop --freeze, --fix_bn or --fix_pre_cls")
    optimizer = torch.optim.SGD(
        [
            {"params": parameters, "lr": lr * factor, "weight_decay": opts.weight_decay * decay}
            for (factor, decay), parameters in groups.items()
        ],
        lr=lr,
        momentum=opts.momentum,
        nesterov=opts.momentum > 0,
        fused=_can_fuse(parameter for _, parameter in _named(networks)),
    )
    _fill_momentum(optimizer)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser of ``make_optimizer`` the state that a checkpoint holds, whatever form wrote it.

    Raises:
        ValueError: the state is of other weights.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = _can_fuse(group["params"])  # another device or precision may have written it
    _fill_momentum(optimizer)


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether SGD's fused form is right: PyTorch 2.6's for the CPU goes astray on bfloat16 weights."""
    return all(parameter.is_cuda or parameter.dtype == torch.float32 for parameter in parameters)


def _named(networks: Sequence[nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    return chain.from_iterable(network.named_parameters() for network in networks)


def weight_names(optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module]) -> list[str]:
    """Names of the weights in the order in which the optimiser's state counts them."""
    names = {id(parameter): name for name, parameter in _named(networks)}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def take_momentum(
    optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module], content: Mapping[str, Any]
) -> int:
    """Give an optimiser only the momentum that a checkpoint holds, by the weights' names; rates stay its own.

    A checkpoint without names (of a release or an early version) must have as many weights in each group.

    Returns:
        How many weights had none there that fits, and begin with zeros.
    """
    names, saved = weight_names(optimizer, networks), content["optimizer_state"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    alike = sizes == [len(group["params"]) for group in saved["param_groups"]]
    known = content.get("optimizer_weights", names if alike else [])
    found = {name: saved["state"].get(i, {}).get("momentum_buffer") for i, name in enumerate(known)}
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    missing = 0
    for name, (parameter, group) in zip(names, parameters, strict=True):
        buffer = found.get(name)
        if group["momentum"] == 0:
            continue
        if buffer is None or buffer.shape != parameter.shape:
            missing += 1
        else:
            optimizer.state[parameter]["momentum_buffer"].copy_(buffer)
    return missing


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin with a momentum of zeros where there is none.

    The fused form would make its own without filling it, and leave it so if a gradient scaler skips the
    first update.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] > 0 else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
