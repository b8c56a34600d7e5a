"""Learning-rate schedules, stepped once per iteration."""

from __future__ import annotations

import warnings

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, PolynomialLR, SequentialLR, StepLR

from utils.errors import UserError

WARMUP_FROM = 1e-3  # share of the poly curve that SSUL's warm-up begins with


class FlooredPolyLR(LRScheduler):
    """Poly schedule with a smallest rate, and SSUL's warm-up, which multiplies it.

    lr·w(i)·(1 − i/max_iters)^power, but at least ``min_lr`` in every parameter group, whatever its own rate;
    w rises along a line from 0.001 to 1 over the first ``warmup_iters`` iterations.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_iters: int,
        power: float,
        min_lr: float = 0.0,
        warmup_iters: int = 0,
    ) -> None:
        self.max_iters, self.power = max_iters, power
        self.min_lr, self.warmup_iters = min_lr, warmup_iters
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]  # float | Tensor in newer versions of torch
        """The rates of the iteration that ``step()`` has come to."""
        factor = max(1 - self.last_epoch / self.max_iters, 0.0) ** self.power
        if self.last_epoch < self.warmup_iters:
            factor *= WARMUP_FROM + (1 - WARMUP_FROM) * self.last_epoch / self.warmup_iters
        return [max(lr * factor, self.min_lr) for lr in self.base_lrs]


def make_scheduler(
    optimizer: Optimizer,
    policy: str,
    *,
    max_iters: int,
    lr_power: float = 0.9,
    lr_decay_step: int = 5000,
    lr_decay_factor: float = 0.1,
    warmup_iters: int = 0,
    warmup_multiplies: bool = False,
    min_lr: float = 0.0,
) -> LRScheduler:
    """Make the schedule of ``--lr_policy``; call ``step()`` after every optimiser step.

    Args:
        optimizer: its parameter groups keep their own base rates.
        policy: ``poly``: lr·(1 − i/max_iters)^lr_power; ``step``: lr·lr_decay_factor^⌊i/lr_decay_step⌋.
        max_iters: iterations of the run, warm-up included.
        lr_power: exponent of ``poly``.
        lr_decay_step: iterations between two drops of ``step``.
        lr_decay_factor: the drop.
        warmup_iters: iterations of linear warm-up; the policy has the rest (SSUL on ADE20K).
        warmup_multiplies: the warm-up multiplies the first part of ``poly``'s curve, which then has all
            iterations (SSUL's released code).
        min_lr: ``poly`` never falls below it, in any group.

    Raises:
        UserError: an unknown policy, no iteration left after the warm-up, or a rate that falls to 0 before
            the end.
    """
    if policy not in ("poly", "step"):
        raise UserError(f"--lr_policy {policy}: unknown; use poly or step")
    remaining = max_iters - warmup_iters
    if remaining < 1:
        raise UserError(
            f"{max_iters} iterations with {warmup_iters} of warm-up leave nothing to train: "
            "use more --epochs or a smaller --batch_size"
        )
    if policy == "poly":
        last, how = (1 / remaining) ** lr_power, "a smaller --lr_power"
    else:
        last = lr_decay_factor ** ((remaining - 1) // lr_decay_step)
        how = "a larger --lr_decay_step or --lr_decay_factor"
    if max(group["lr"] for group in optimizer.param_groups) * last < torch.finfo(torch.float32).tiny:
        raise UserError(f"the learning rate falls to 0 within the {max_iters} iterations; give {how}")
    main: LRScheduler
    if policy == "poly" and warmup_multiplies:
        return FlooredPolyLR(
            optimizer, max_iters=max_iters, power=lr_power, min_lr=min_lr, warmup_iters=warmup_iters
        )
    if policy == "poly" and min_lr > 0:
        main = FlooredPolyLR(optimizer, max_iters=remaining, power=lr_power, min_lr=min_lr)
    elif policy == "poly":
        main = PolynomialLR(optimizer, total_iters=remaining, power=lr_power)
    else:
        main = StepLR(optimizer, step_size=lr_decay_step, gamma=lr_decay_factor)
    if warmup_iters == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=1.0 / (warmup_iters + 1), total_iters=warmup_iters)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_iters])


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Bring a new schedule to where it stands after some optimiser steps, to the last bit."""
    with warnings.catch_warnings():
        # That no optimiser step came before.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()
