"""Importance-weighted penalties on parameters: EWC, PI and RW, as in MiB's released code.

Each estimates, while a task is learnt, how much every parameter matters, and in the next task adds
Σ importance·(θ − θ_old)² to the loss. In a training step::

    loss.backward()
    regularizer.update()                      # reads the gradients of the loss alone
    if regularizer.penalize:
        (weight * regularizer.penalty()).backward()
    optimizer.step()

Under DistributedDataParallel the gradients are averaged when ``backward`` returns, so every process computes
the same importance from them and nothing needs to be sent. Under a gradient scaler, unscale them first. The
parameters' names are those of the bare module, without ``module.``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.errors import UserError

_EPS = 1e-8
_WRAPPERS = ("module.", "_orig_mod.")


class RegularizerOptions(Protocol):
    """The options that :func:`get_regularizer` reads."""

    regularizer: str | None
    reg_alpha: float
    reg_no_normalize: bool
    reg_iterations: int


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in the bare module."""
    parameters = {}
    for name, parameter in model.named_parameters():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        parameters[name] = parameter
    return parameters


def _min_max(tensor: Tensor) -> Tensor:
    """Scale a tensor to 0..1 by its own smallest and largest entry."""
    low = tensor.min()
    return (tensor - low) / (tensor.max() - low + _EPS)


class Regularizer:
    """Common part: the model's parameters, the old ones, and the penalty.

    Attributes:
        name: what ``--regularizer`` calls it.
        penalize: whether there is a penalty: there is an old model and its importance is known.
    """

    name = ""

    def __init__(self, model: nn.Module, model_old: nn.Module | None, device: torch.device) -> None:
        self.device = device
        self.parameters = _named_parameters(model)
        self.old_parameters: dict[str, Tensor] = {}
        if model_old is not None:
            self.old_parameters = {n: p.detach().to(device) for n, p in _named_parameters(model_old).items()}
        self.penalize = False
        self._anchors: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def _set_importance(self, importance: Mapping[str, Tensor]) -> None:
        """Penalise the trainable parameters that the old model has, with this importance."""
        names = [
            name
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and name in self.old_parameters and name in importance
        ]
        self._anchors = (
            [self.parameters[name] for name in names],
            [self.old_parameters[name] for name in names],
            [importance[name].sqrt() for name in names],
        )
        self.penalize = bool(names)

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Own copies of the tensors on the device."""
        return {name: tensor.detach().to(self.device, copy=True) for name, tensor in tensors.items()}

    def _with_gradient(self) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, values and gradients of the parameters that have a gradient now."""
        found = [(name, p.detach(), p.grad) for name, p in self.parameters.items() if p.grad is not None]
        return [name for name, _, _ in found], [p for _, p, _ in found], [g for _, _, g in found]

    def penalty(self) -> Tensor:
        """Σ importance·(θ − θ_old)²: a scalar; a plain 0 without gradient where there is no penalty."""
        if not self.penalize:
            return torch.zeros((), device=self.device)
        parameters, old, roots = self._anchors
        # Σ i·d² as a squared norm: three fused passes over all parameters.
        norms = torch._foreach_norm(torch._foreach_mul(torch._foreach_sub(parameters, old), roots))
        return torch.stack(norms).square().sum()

    def update(self) -> None:
        """Take in the gradients of one backward pass."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What the next task, and a run that resumes this one, need: tensors, numbers and dicts of them."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. The old task's importance stays as constructed.

        Raises:
            UserError: the state is of another regulariser.
        """
        _check_name(self.name, state)
        self._resume(state)

    def _resume(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def _check_name(name: str, state: Mapping[str, Any]) -> None:
    if state["name"] != name:
        raise UserError(
            f"--regularizer {name}: the checkpoint holds the importance of {state['name']!r}; "
            f"use --regularizer {state['name']} or a checkpoint that was trained with {name}"
        )


def _update_fisher(fisher: Iterable[Tensor], gradients: list[Tensor], alpha: float) -> None:
    """F ← α·g² + (1 − α)·F, in place."""
    running = list(fisher)
    torch._foreach_mul_(running, 1.0 - alpha)
    torch._foreach_addcmul_(running, gradients, gradients, value=alpha)


class EWC(Regularizer):
    """Elastic weight consolidation (arXiv 1612.00796) with the online Fisher information of RW.

    F ← α·g² + (1 − α)·F at every step, from ones or the old task's F. Importance: the old task's F.

    Args:
        model: the network of this step, possibly wrapped.
        model_old: that of the last step.
        device: where the importance lives.
        fisher: the last step's F by parameter name; none: no penalty.
        alpha: weight of the newest gradient.
        normalize: scale each parameter's importance to 0..1.
    """

    name = "ewc"

    def __init__(
        self,
        model: nn.Module,
        model_old: nn.Module | None,
        device: torch.device,
        fisher: Mapping[str, Tensor] | None = None,
        alpha: float = 0.9,
        normalize: bool = True,
    ) -> None:
        super().__init__(model, model_old, device)
        self.alpha = alpha
        self.fisher = self._on_device(fisher or {})
        if fisher is not None:
            self._set_importance({n: _min_max(f) if normalize else f.clone() for n, f in self.fisher.items()})
        _start_at_one(self.fisher, self.parameters, device)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the gradients of one backward pass."""
        names, _, gradients = self._with_gradient()
        _update_fisher([self.fisher[name] for name in names], gradients, self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """``fisher`` by parameter name."""
        return {"name": self.name, "fisher": self.fisher, "alpha": self.alpha}

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.fisher.update(self._on_device(state["fisher"]))
        self.alpha = state["alpha"]


def _start_at_one(
    fisher: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], device: torch.device
) -> None:
    """Parameters that are new in this step begin with a Fisher information of 1."""
    for name, parameter in parameters.items():
        if parameter.requires_grad and name not in fisher:
            fisher[name] = torch.ones_like(parameter, device=device, requires_grad=False)


class PI(Regularizer):
    """Path integral, or synaptic intelligence (arXiv 1703.04200).

    Accumulates gradient × step along the way; at the end the score is that sum over the squared way, where
    positive, plus the old score. Importance: the old score. Parameters new in this step have none.

    Args:
        model: the network of this step, possibly wrapped.
        model_old: that of the last step.
        device: where the importance lives.
        score: the last step's score by parameter name; none: no penalty.
        normalize: scale each parameter's importance to 0..1.
    """

    name = "pi"

    def __init__(
        self,
        model: nn.Module,
        model_old: nn.Module | None,
        device: torch.device,
        score: Mapping[str, Tensor] | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__(model, model_old, device)
        self.score_old = self._on_device(score or {})
        if score is not None:
            self._set_importance({n: _min_max(s) if normalize else s for n, s in self.score_old.items()})
        self.start = {**self._on_device(self.parameters), **self.old_parameters}
        self.delta = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self.previous: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the gradients of one backward pass."""
        names, values, gradients = self._with_gradient()
        if self.previous:
            moved = torch._foreach_sub([self.previous[name] for name in names], values)
            torch._foreach_addcmul_([self.delta[name] for name in names], gradients, moved)
        self.previous = self._on_device(self.parameters)

    @torch.no_grad()
    def score(self) -> dict[str, Tensor]:
        """Importance of the parameters after this task."""
        scores = {}
        for name, parameter in self.parameters.items():
            way = (parameter - self.start[name]).square()
            scores[name] = (self.delta[name] / (way + 1e-20)).clamp(min=0.0)
            if name in self.score_old:
                scores[name] += self.score_old[name]
        return scores

    def state_dict(self) -> dict[str, Any]:
        """``score`` for the next task; ``delta``, ``start`` and ``previous`` to resume."""
        return {
            "name": self.name,
            "score": self.score(),
            "delta": self.delta,
            "start": self.start,
            "previous": self.previous,
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.delta = self._on_device(state["delta"])
        self.start = self._on_device(state["start"])
        self.previous = self._on_device(state["previous"])


class RW(Regularizer):
    """Riemannian walk (arXiv 1801.10112): EWC's online Fisher information plus a path score.

    Every ``iterations`` steps the score gains gradient × step over the step's length in the metric of the
    Fisher information. At the end: where positive, averaged with the old score. Importance: the old Fisher
    information plus the old score, each scaled to 0..1.

    Args:
        model: the network of this step, possibly wrapped.
        model_old: that of the last step.
        device: where the importance lives.
        score: the last step's score by parameter name.
        fisher: the last step's Fisher information; without either there is no penalty.
        alpha: weight of the newest gradient in the Fisher information.
        iterations: steps between two updates of the score.
        normalize: scale each parameter's importances to 0..1.
    """

    name = "rw"

    def __init__(
        self,
        model: nn.Module,
        model_old: nn.Module | None,
        device: torch.device,
        score: Mapping[str, Tensor] | None = None,
        fisher: Mapping[str, Tensor] | None = None,
        alpha: float = 0.9,
        iterations: int = 10,
        normalize: bool = True,
    ) -> None:
        super().__init__(model, model_old, device)
        self.alpha = alpha
        self.iterations = iterations
        known = score is not None and fisher is not None
        self.fisher = self._on_device(fisher or {}) if known else {}
        self.score_old = self._on_device(score or {}) if known else {}
        if known:
            scale = _min_max if normalize else torch.clone
            importance = {name: scale(value) for name, value in self.fisher.items()}
            for name, value in self.score_old.items():
                importance[name] = importance[name] + scale(value)
            self._set_importance(importance)
        _start_at_one(self.fisher, self.parameters, device)
        self.running = {
            name: torch.zeros_like(parameter, device=device, requires_grad=False)
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        }
        self.previous: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the gradients of one backward pass."""
        names, values, gradients = self._with_gradient()
        fisher = [self.fisher[name] for name in names]
        if self.count % self.iterations == 0:
            if self.previous:
                moved = torch._foreach_sub([self.previous[name] for name in names], values)
                length = torch._foreach_mul(torch._foreach_mul(moved, moved), fisher)
                torch._foreach_mul_(length, 0.5)
                torch._foreach_add_(length, _EPS)
                gained = torch._foreach_div(torch._foreach_mul(gradients, moved), length)
                torch._foreach_add_([self.running[name] for name in names], gained)
            self.previous = self._on_device(self.parameters)
        self.count += 1
        _update_fisher(fisher, gradients, self.alpha)

    @torch.no_grad()
    def score(self) -> dict[str, Tensor]:
        """Path score of the parameters after this task."""
        scores = {}
        for name, running in self.running.items():
            scores[name] = running.clamp(min=0.0)
            if name in self.score_old:
                scores[name] = 0.5 * (scores[name] + self.score_old[name])
        return scores

    def state_dict(self) -> dict[str, Any]:
        """``score`` and ``fisher`` for the next task; ``running``, ``previous``, ``count`` to resume."""
        return {
            "name": self.name,
            "score": self.score(),
            "fisher": self.fisher,
            "alpha": self.alpha,
            "iterations": self.iterations,
            "running": self.running,
            "previous": self.previous,
            "count": self.count,
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.alpha, self.iterations, self.count = state["alpha"], state["iterations"], state["count"]
        self.fisher.update(self._on_device(state["fisher"]))
        self.running = self._on_device(state["running"])
        self.previous = self._on_device(state["previous"])


def get_regularizer(
    model: nn.Module,
    model_old: nn.Module | None,
    device: torch.device,
    opts: RegularizerOptions,
    state: Mapping[str, Any] | None = None,
) -> Regularizer | None:
    """The regulariser that the options name, or None.

    Args:
        model: the network of this step, possibly wrapped.
        model_old: that of the last step, None at the first.
        device: where the importance lives.
        opts: ``regularizer`` (``ewc``, ``pi``, ``rw`` or None), ``reg_alpha``, ``reg_no_normalize``,
            ``reg_iterations``.
        state: the last step's ``state_dict()``; None: importance is estimated, but nothing penalised yet.

    Raises:
        UserError: an unknown name, or a state of another regulariser.
    """
    name = opts.regularizer
    if name is None:
        return None
    if name not in ("ewc", "pi", "rw"):
        raise UserError(f"--regularizer {name}: unknown; use ewc, pi or rw")
    if state is not None:
        _check_name(name, state)
    known = state or {}
    normalize = not opts.reg_no_normalize
    if name == "ewc":
        return EWC(model, model_old, device, known.get("fisher"), opts.reg_alpha, normalize)
    if name == "pi":
        return PI(model, model_old, device, known.get("score"), normalize)
    return RW(
        model,
        model_old,
        device,
        known.get("score"),
        known.get("fisher"),
        opts.reg_alpha,
        opts.reg_iterations,
        normalize,
    )
