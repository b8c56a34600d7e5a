"""Collecting, checking and loading the modules of methods (``Method.modules``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from torch import Tensor, nn

from methods.base import Context, Method
from methods.checks import check_modules, fault

log = logging.getLogger(__name__)


def collect_modules(methods: Mapping[str, Method], context: Context) -> nn.Module:
    """All methods' modules in one, in which a weight is named ``<Class>.<part>.<weight>``.

    Args:
        methods: by class name, after ``begin_step``.
        context: of the step.

    Raises:
        UserError: a method returned an invalid value, or modules that cannot be trained.
    """
    collected = nn.Module()
    networks = [network for network in (context.model, context.model_old) if network is not None]
    for name, method in methods.items():
        parts = check_modules(method, networks)
        if parts:
            # Not add_module, which refuses names of nn.Module's attributes, such as "type".
            collected._modules[name] = owner = nn.Module()
            owner._modules.update(parts)
    check_unchanged(collected, methods)
    return collected


def check_unchanged(collected: nn.Module, methods: Mapping[str, Method]) -> None:
    """Check that the methods still return the modules that the optimiser trains.

    Raises:
        UserError: a method does not.
    """
    for name, method in methods.items():
        owner = collected._modules.get(name)
        trained = {} if owner is None else owner._modules
        returned = method.modules()
        if returned.keys() != trained.keys() or any(returned[part] is not trained[part] for part in trained):
            raise fault(
                method,
                "modules",
                "returned other modules at a later call, which are not trained; build them in begin_step and "
                "return the same ones every time",
            )


def take_over(collected: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load into every module the weights of the same name of the previous step, or of another run.

    A module that is not there, or whose weights have other names or shapes, keeps its initial weights.

    Args:
        collected: result of ``collect_modules``.
        state: "modules" of that checkpoint.
    """
    for name, owner in collected.named_children():
        for part, module in owner.named_children():
            saved = _below(f"{name}.{part}.", state)
            if saved and (differing := _differing(module, saved)):
                log.info("%s.%s: starts from scratch, differs in %s", name, part, differing[0])
            elif saved:
                module.load_state_dict(saved)


def load_modules(
    collected: nn.Module,
    methods: Mapping[str, Method],
    state: Mapping[str, Tensor],
    trained: AbstractSet[str],
) -> None:
    """Load the weights of an interrupted run of this step.

    Args:
        collected: result of ``collect_modules``.
        methods: by class name.
        state: "modules" of its checkpoint.
        trained: names of its methods; modules of others keep their initial weights.

    Raises:
        UserError: a method has other modules than in the checkpoint.
    """
    for name in trained & methods.keys():
        owner, saved = collected._modules.get(name) or nn.Module(), _below(f"{name}.", state)
        if differing := _differing(owner, saved):
            raise fault(
                methods[name],
                "modules",
                f"the step was started with other modules ({differing[0]}); --fresh starts it over",
            )
        owner.load_state_dict(saved)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _differing(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that only one of the two has, or whose shapes differ."""
    own = module.state_dict()
    names = sorted(own.keys() | state.keys())
    return [n for n in names if n not in own or n not in state or own[n].shape != state[n].shape]
