"""Penalties on moving weights that mattered: EWC, PI, RW."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from methods.base import Context, Method
from utils.option_types import loss_weight, positive_int, share
from utils.regularizer import get_regularizer


class Regularization(Method):
    """Importance of every weight, and a penalty on moving the important ones (EWC, PI, RW)."""

    def __init__(self, options: dict[str, Any], importance: float) -> None:
        self.options = options
        self.importance = importance
        self.state: dict[str, Any] | None = None
        self.regularizer: Any = None
        self._backward_done = False

    @classmethod
    def add_options(cls, parser: argparse._ActionsContainer) -> None:
        """``--regularizer`` and what belongs to it."""
        parser.add_argument(
            "--regularizer", choices=("ewc", "rw", "pi"), default=None, help="how importance is estimated"
        )
        parser.add_argument(
            "--reg_importance", type=loss_weight, default=1.0, metavar="W", help="weight of the penalty"
        )
        parser.add_argument(
            "--reg_alpha",
            type=share,
            default=0.9,
            help="weight of the newest gradient in the running Fisher estimate",
        )
        parser.add_argument(
            "--reg_no_normalize", action="store_true", help="do not scale the importances to [0, 1]"
        )
        parser.add_argument(
            "--reg_iterations",
            type=positive_int,
            default=10,
            help="RW: optimiser steps between two path-integral updates",
        )

    @property
    def uses_teacher(self) -> bool:
        """The old weights are read once, by ``begin_step``; no forward pass of the old network is needed."""
        return self.regularizer is None

    @classmethod
    def from_options(cls, opts: Any) -> Regularization | None:
        """On with ``--regularizer``."""
        if opts.regularizer is None:
            return None
        names = ("regularizer", "reg_alpha", "reg_no_normalize", "reg_iterations")
        return cls({name: getattr(opts, name) for name in names}, opts.reg_importance)

    def begin_step(self, context: Context) -> None:
        """Take over the importances of the steps before."""
        self.regularizer = get_regularizer(
            context.model, context.model_old, context.device, SimpleNamespace(**self.options), self.state
        )

    def after_backward(self) -> None:
        """The gradients count; ``penalty``, which reads them anyway, takes them into the importances."""
        self._backward_done = True

    def penalty(self) -> dict[str, Tensor]:
        """Update the importances, then add the gradient of Σ importance·(θ − θ_old)², weighted.

        Every process sees the averaged gradients, so the importances stay equal.
        """
        update, self._backward_done = self._backward_done, False
        term = self.regularizer.add_penalty(self.importance, update=update)
        return {"reg": term} if self.regularizer.penalize else {}

    def state_dict(self) -> dict[str, Any]:
        """The regularizer's own state."""
        return self.regularizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until ``begin_step`` knows the network."""
        self.state = state

    def resume(self, state: dict[str, Any]) -> None:
        """The regularizer's running values; what it penalises stays that of the step before."""
        self.regularizer.load_state_dict(state)
