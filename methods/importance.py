"""Importance-weighted penalties on parameters: EWC, PI and RW, as in MiB's released code.

Each estimates the importance of every parameter during a step, and in the next step adds
Σ importance·(θ − θ_old)² to the loss. In a training iteration::

    loss.backward()
    term = regularizer.add_penalty(weight, update=True)
    optimizer.step()

``update=True`` first updates the estimates with the gradients, which are still those of the loss alone; then
the penalty's gradient 2·weight·importance·(θ − θ_old) is added to them. Both are limited by memory bandwidth:
on the CPU they run block by block within the cache of a core, so that every tensor is read once; elsewhere in
few kernels over all parameters. There is no device-to-host synchronisation.

Under DistributedDataParallel the gradients are averaged when ``backward`` returns, so every process computes
the same importance without communication. Under a gradient scaler, unscale the gradients first. Parameter
names are those of the bare module, without ``module.``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias, cast

from methods.base import Context, Method
from utils.errors import UserError
from utils.lazy import no_grad, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight, positive_int, share

_EPS = 1e-8
_WRAPPERS = ("module.", "_orig_mod.")
# Values per tensor, block and thread on the CPU: 256 KB in float32. A block stays in the second-level cache,
# and the overhead of the calls is small.
_BLOCK = 1 << 16

Block: TypeAlias = "list[torch.Tensor]"  # for ``torch._foreach_*``


class RegularizerOptions(Protocol):
    """The options that :func:`get_regularizer` reads."""

    regularizer: str | None
    reg_alpha: float
    reg_no_normalize: bool
    reg_iterations: int


def _named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the bare module."""
    parameters = {}
    for name, parameter in model.named_parameters():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        parameters[name] = parameter
    return parameters


def _min_max(tensor: torch.Tensor) -> torch.Tensor:
    """Scale a tensor to 0..1 by its smallest and largest entry."""
    low = tensor.min()
    return (tensor - low) / (tensor.max() - low + _EPS)


@cache
def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of the axes longer than 1; None if the tensor has gaps in memory."""
    axes = [(stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(axes):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in axes)


def _pieces(row: Sequence[torch.Tensor], size: int) -> Iterable[Sequence[torch.Tensor]]:
    """Tensors of one shape, each split into views of at most ``size`` values in memory order.

    Tensors whose memory layouts differ are not split.
    """
    count = row[0].numel()
    if count <= size:
        return [row]
    orders = {_memory_order(tensor.shape, tensor.stride()) for tensor in row}
    if len(orders) > 1 or None in orders:
        return [row]
    return zip(*(tensor.as_strided((count,), (1,)).split(size) for tensor in row), strict=True)


def _blocks(rows: Iterable[Sequence[torch.Tensor]], size: int) -> Iterator[list[Block]]:
    """Rows of tensors of one shape as lists for ``torch._foreach_*``, one list per column.

    Large tensors are split and small ones grouped: a block has at most ``size`` values per column (more if a
    row cannot be split). The blocks depend on shapes and strides only.
    """
    block: list[Sequence[torch.Tensor]] = []
    filled = 0
    for row in rows:
        for piece in _pieces(row, size):
            count = piece[0].numel()
            if block and filled + count > size:
                yield [list(column) for column in zip(*block, strict=True)]
                block, filled = [], 0
            block.append(piece)
            filled += count
    if block:
        yield [list(column) for column in zip(*block, strict=True)]


def _penalize(
    factor: float, parameters: Block, gradients: Block, old: Block, roots: Block
) -> tuple[torch.Tensor, ...]:
    """Add factor·root²·(θ − θ_old) to the gradients; returns the norms of root·(θ − θ_old)."""
    moved = torch._foreach_sub(parameters, old)
    torch._foreach_mul_(moved, roots)
    torch._foreach_addcmul_(gradients, moved, roots, value=factor)
    return torch._foreach_norm(moved)


class Regularizer:
    """Base class: parameters, old parameters and penalty. Arguments as in :func:`get_regularizer`.

    Attributes:
        name: value of ``--regularizer``.
        block: number of values per tensor in a block. It does not change gradients and estimates, only the
            order in which the penalty's value is summed.
    """

    name = ""

    def __init__(
        self,
        model: torch.nn.Module,
        model_old: torch.nn.Module | None,
        device: torch.device,
        opts: RegularizerOptions,
        state: Mapping[str, Any],
    ) -> None:
        self.device = device
        self.block = _BLOCK * torch.get_num_threads() if device.type == "cpu" else sys.maxsize
        self.parameters = _named_parameters(model)
        self.old_parameters: dict[str, torch.Tensor] = {}
        if model_old is not None:
            self.old_parameters = {n: p.detach().to(device) for n, p in _named_parameters(model_old).items()}
        # Square roots of the importance: the penalty is the squared norm of root·(θ − θ_old).
        self._roots: dict[str, torch.Tensor] = {}
        self._normalize = not opts.reg_no_normalize
        self._prepare(opts, state)

    @property
    def penalize(self) -> bool:
        """Whether there is a penalty: an old model with known importance."""
        return bool(self._roots)

    def _prepare(self, opts: RegularizerOptions, state: Mapping[str, Any]) -> None:
        """Set up the estimates from the options and the previous step's state."""
        raise NotImplementedError

    def _set_importance(self, importance: Mapping[str, torch.Tensor]) -> None:
        """Set the importance of the trainable parameters that the old model has."""
        self._roots = {
            name: importance[name].sqrt()
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and name in self.old_parameters and name in importance
        }

    def _scaled(self, tensor: torch.Tensor) -> torch.Tensor:
        """Importance as used in the penalty: scaled to 0..1 unless ``reg_no_normalize`` is set."""
        return _min_max(tensor) if self._normalize else tensor

    def _on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the tensors on the device, in the same memory format."""
        return {name: tensor.detach().to(self.device, copy=True) for name, tensor in tensors.items()}

    def _filled(self, value: float, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the known tensors, and a tensor of ``value`` for every other trainable parameter."""
        new = {
            name: torch.full_like(parameter, value, device=self.device, requires_grad=False)
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and name not in known
        }
        return {**self._on_device(known), **new}

    def update(self) -> None:
        """Update the estimates with the gradients of one backward pass."""
        self._sweep(True, {})

    def add_penalty(self, weight: float = 1.0, *, update: bool = False) -> torch.Tensor:
        """Add the gradient of weight·Σ importance·(θ − θ_old)² to the parameters' ``.grad``.

        A penalised parameter without gradient gets one; a frozen parameter is skipped.

        Args:
            weight: factor on the penalty.
            update: call ``update()`` first, in the same pass through memory.

        Returns:
            The weighted penalty, a scalar on the device, without gradient; 0 if there is no penalty.
        """
        roots = {name: root for name, root in self._roots.items() if self.parameters[name].requires_grad}
        norms = self._sweep(update, roots, 2 * weight)
        if not norms:
            return torch.zeros((), device=self.device)
        return weight * torch.stack(norms).square().sum()

    @no_grad
    def _sweep(
        self, update: bool, roots: Mapping[str, torch.Tensor], factor: float = 0.0
    ) -> list[torch.Tensor]:
        """Update the estimates if ``update``, then add the gradient of the penalty.

        Args:
            update: whether to update the estimates.
            roots: square roots of the importance of the penalised parameters, by name.
            factor: of root²·(θ − θ_old) in the gradient.

        Returns:
            Norms of root·(θ − θ_old), one per block.
        """
        updated = {name: None for name, p in self.parameters.items() if update and p.grad is not None}
        for name in roots:
            parameter = self.parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        estimates = self._estimates() if update else []
        norms: list[torch.Tensor] = []
        for names, updates, penalizes in (
            ([name for name in updated if name in roots], True, True),
            ([name for name in updated if name not in roots], True, False),
            ([name for name in roots if name not in updated], False, True),
        ):
            columns = [*(estimates if updates else []), *([self.old_parameters, roots] if penalizes else [])]
            for parameters, gradients, *others in _blocks(self._rows(names, columns), self.block):
                if updates:
                    self._update_block(parameters, gradients, others[: len(estimates)])
                if penalizes:
                    norms += _penalize(factor, parameters, gradients, *others[-2:])
        if update:
            self._end_update([name for name in self.parameters if name not in updated])
        return norms

    def _rows(
        self, names: Iterable[str], columns: Sequence[Mapping[str, torch.Tensor]]
    ) -> Iterator[list[torch.Tensor]]:
        """Parameter, gradient and its tensor of each column, for every name."""
        for name in names:
            parameter = self.parameters[name]
            yield [parameter, cast(torch.Tensor, parameter.grad), *(column[name] for column in columns)]

    def _estimates(self) -> list[Mapping[str, torch.Tensor]]:
        """Tensors that this update reads or changes, by parameter name, in the order of ``_update_block``."""
        raise NotImplementedError

    def _update_block(self, parameters: Block, gradients: Block, estimates: list[Block]) -> None:
        """Update a block of estimates in place."""
        raise NotImplementedError

    def _end_update(self, without_gradient: list[str]) -> None:
        """Called after all blocks of an update."""

    def state_dict(self) -> dict[str, Any]:
        """State for the next step and for resuming: tensors, numbers and dicts of them."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the estimates of an interrupted run. The importance in the penalty stays as constructed.

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


def _update_fisher(fisher: list[torch.Tensor], gradients: list[torch.Tensor], alpha: float) -> None:
    """F ← α·g² + (1 − α)·F, in place."""
    torch._foreach_mul_(fisher, 1.0 - alpha)
    torch._foreach_addcmul_(fisher, gradients, gradients, value=alpha)


class EWC(Regularizer):
    """Elastic weight consolidation (arXiv 1612.00796) with the online Fisher information of RW.

    F ← α·g² + (1 − α)·F per optimiser step, from ones or the previous step's F. Importance: the previous F.
    """

    name = "ewc"

    def _prepare(self, opts: RegularizerOptions, state: Mapping[str, Any]) -> None:
        self.alpha = opts.reg_alpha
        self.fisher = self._filled(1.0, state.get("fisher", {}))
        if "fisher" in state:
            self._set_importance({name: self._scaled(self.fisher[name]) for name in state["fisher"]})

    def _estimates(self) -> list[Mapping[str, torch.Tensor]]:
        return [self.fisher]

    def _update_block(self, parameters: Block, gradients: Block, estimates: list[Block]) -> None:
        _update_fisher(estimates[0], gradients, self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """``fisher`` by parameter name."""
        return {"name": self.name, "fisher": self.fisher, "alpha": self.alpha}

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.fisher.update(self._on_device(state["fisher"]))
        self.alpha = state["alpha"]


class _PathRegularizer(Regularizer):
    """Base of PI and RW: the previous step's score, and the parameters at the last update of the path."""

    def _prepare(self, opts: RegularizerOptions, state: Mapping[str, Any]) -> None:
        self.score_old = self._on_device(state.get("score", {}))
        self.previous: dict[str, torch.Tensor] = {}

    def _updates_path(self) -> bool:
        """Whether this update extends the path."""
        return True

    def _end_update(self, without_gradient: list[str]) -> None:
        if not self._updates_path():
            return
        if not self.previous:
            self.previous = self._on_device(self.parameters)
        elif without_gradient:  # the others were copied by ``_update_block``
            torch._foreach_copy_(
                [self.previous[name] for name in without_gradient],
                [self.parameters[name] for name in without_gradient],
            )

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.previous = self._on_device(state["previous"])


class PI(_PathRegularizer):
    """Path integral, or synaptic intelligence (arXiv 1703.04200).

    Sums gradient × update over the path. Score: that sum over the squared total change, at least 0, plus the
    previous score. Importance: the previous score; new parameters have none.
    """

    name = "pi"

    def _prepare(self, opts: RegularizerOptions, state: Mapping[str, Any]) -> None:
        super()._prepare(opts, state)
        self._set_importance({name: self._scaled(score) for name, score in self.score_old.items()})
        new = {name: p for name, p in self.parameters.items() if name not in self.old_parameters}
        self.start = {**self.old_parameters, **self._on_device(new)}
        self.delta = {name: torch.zeros_like(value) for name, value in self.start.items()}

    def _estimates(self) -> list[Mapping[str, torch.Tensor]]:
        return [self.delta, self.previous] if self.previous else []

    def _update_block(self, parameters: Block, gradients: Block, estimates: list[Block]) -> None:
        if estimates:
            delta, previous = estimates
            torch._foreach_sub_(previous, parameters)  # θ_previous − θ
            torch._foreach_addcmul_(delta, gradients, previous)
            torch._foreach_copy_(previous, parameters)

    @no_grad
    def score(self) -> dict[str, torch.Tensor]:
        """Importance of the parameters after this step."""
        scores = {}
        for name, parameter in self.parameters.items():
            squared_change = (parameter - self.start[name]).square()
            scores[name] = (self.delta[name] / (squared_change + 1e-20)).clamp(min=0.0)
            if name in self.score_old:
                scores[name] += self.score_old[name]
        return scores

    def state_dict(self) -> dict[str, Any]:
        """``score`` for the next step; ``delta``, ``start`` and ``previous`` for resuming."""
        return {
            "name": self.name,
            "score": self.score(),
            "delta": self.delta,
            "start": self.start,
            "previous": self.previous,
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        super()._resume(state)
        self.delta = self._on_device(state["delta"])
        self.start = self._on_device(state["start"])


class RW(_PathRegularizer):
    """Riemannian walk (arXiv 1801.10112): EWC's online Fisher information plus a path score.

    Every ``reg_iterations`` optimiser steps, gradient × change over the length of the change in the Fisher
    metric is added to the score. At the end it is clamped to at least 0 and averaged with the previous score.
    Importance: the previous Fisher information plus the previous score, each scaled to 0..1.
    """

    name = "rw"

    def _prepare(self, opts: RegularizerOptions, state: Mapping[str, Any]) -> None:
        super()._prepare(opts, state)
        self.alpha = opts.reg_alpha
        self.iterations = opts.reg_iterations
        self.fisher = self._filled(1.0, state.get("fisher", {}))
        importance = {name: self._scaled(self.fisher[name]) for name in state.get("fisher", {})}
        for name, score in self.score_old.items():
            importance[name] = importance[name] + self._scaled(score)
        self._set_importance(importance)
        self.running = self._filled(0.0, {})
        self.count = 0

    def _updates_path(self) -> bool:
        return self.count % self.iterations == 0

    def _estimates(self) -> list[Mapping[str, torch.Tensor]]:
        if self.previous and self._updates_path():
            return [self.fisher, self.running, self.previous]
        return [self.fisher]

    def _update_block(self, parameters: Block, gradients: Block, estimates: list[Block]) -> None:
        fisher, *path = estimates
        if path:
            running, previous = path
            torch._foreach_sub_(previous, parameters)  # θ_previous − θ
            length = torch._foreach_mul(previous, previous)
            torch._foreach_mul_(length, fisher)
            torch._foreach_mul_(length, 0.5)
            torch._foreach_add_(length, _EPS)
            gained = torch._foreach_mul(gradients, previous)
            torch._foreach_div_(gained, length)
            torch._foreach_add_(running, gained)
            torch._foreach_copy_(previous, parameters)
        _update_fisher(fisher, gradients, self.alpha)

    def _end_update(self, without_gradient: list[str]) -> None:
        super()._end_update(without_gradient)
        self.count += 1

    @no_grad
    def score(self) -> dict[str, torch.Tensor]:
        """Path score of the parameters after this step."""
        scores = {}
        for name, running in self.running.items():
            scores[name] = running.clamp(min=0.0)
            if name in self.score_old:
                scores[name] = 0.5 * (scores[name] + self.score_old[name])
        return scores

    def state_dict(self) -> dict[str, Any]:
        """``score`` and ``fisher`` for the next step; ``running``, ``previous``, ``count`` for resuming."""
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
        super()._resume(state)
        self.alpha, self.iterations, self.count = state["alpha"], state["iterations"], state["count"]
        self.fisher.update(self._on_device(state["fisher"]))
        self.running = self._on_device(state["running"])


_REGULARIZERS: dict[str, type[Regularizer]] = {kind.name: kind for kind in (EWC, PI, RW)}


def get_regularizer(
    model: torch.nn.Module,
    model_old: torch.nn.Module | None,
    device: torch.device,
    opts: RegularizerOptions,
    state: Mapping[str, Any] | None = None,
) -> Regularizer | None:
    """The regulariser of ``opts.regularizer``, or None.

    Args:
        model: the network of this step, possibly wrapped.
        model_old: the network of the previous step, None at step 0.
        device: of the importance.
        opts: ``regularizer`` (``ewc``, ``pi``, ``rw`` or None); ``reg_alpha``, the weight of the newest
            gradient in the Fisher information (EWC, RW); ``reg_iterations``, the optimiser steps between two
            updates of the path (RW); ``reg_no_normalize``: do not scale each parameter's importance to 0..1.
        state: the previous step's ``state_dict()``; None: importance is estimated without a penalty.

    Raises:
        UserError: an unknown name, or a state of another regulariser.
    """
    name = opts.regularizer
    if name is None:
        return None
    if name not in _REGULARIZERS:
        raise UserError(f"--regularizer {name}: unknown; use ewc, pi or rw")
    if state is not None:
        _check_name(name, state)
    return _REGULARIZERS[name](model, model_old, device, opts, state or {})


class Regularization(Method):
    """Importance of every weight, and a penalty on changes of important weights (EWC, PI, RW)."""

    def __init__(self, options: RegularizerOptions, importance: float) -> None:
        self.options = options
        self.importance = importance
        self.state: dict[str, Any] | None = None
        self.regularizer: Any = None
        self._backward_done = False

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--regularizer``, ``--reg_*``."""
        group.choice("--regularizer", ("ewc", "rw", "pi"), None, help="how importance is estimated")
        group.value("--reg_importance", loss_weight, 1.0, metavar="W", help="weight of the penalty")
        group.value(
            "--reg_alpha", share, 0.9, help="weight of the newest gradient in the running Fisher estimate"
        )
        group.flag("--reg_no_normalize", help="do not scale the importances to [0, 1]")
        group.value(
            "--reg_iterations", positive_int, 10, help="RW: optimiser steps between two path-integral updates"
        )

    @property
    def uses_teacher(self) -> bool:
        """Only until ``begin_step``, which reads the teacher's weights: no forward pass is needed."""
        return self.regularizer is None

    @classmethod
    def from_options(cls, opts: Any) -> Regularization | None:
        """Enabled with ``--regularizer``."""
        return None if opts.regularizer is None else cls(opts, opts.reg_importance)

    def begin_step(self, context: Context) -> None:
        """Build the regulariser with the importance from the previous step."""
        self.regularizer = get_regularizer(
            context.model, context.model_old, context.device, self.options, self.state
        )

    def after_backward(self) -> None:
        """Let ``penalty`` update the estimates, as it reads the gradients anyway."""
        self._backward_done = True

    def penalty(self) -> dict[str, torch.Tensor]:
        """Update the importance, then add the gradient of the weighted Σ importance·(θ − θ_old)²."""
        update, self._backward_done = self._backward_done, False
        term = self.regularizer.add_penalty(self.importance, update=update)
        return {"reg": term} if self.regularizer.penalize else {}

    def state_dict(self) -> dict[str, Any]:
        """State of the regulariser."""
        return self.regularizer.state_dict()

    def from_previous_step(self, state: dict[str, Any]) -> None:
        """Kept for ``begin_step``."""
        self.state = state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Running estimates; the importance in the penalty stays that of the previous step."""
        self.regularizer.load_state_dict(state)
