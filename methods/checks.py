"""Misuse of the hooks, reported in one line that names file, class and hook."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from methods.base import Method
from modules.classifiers import classifier_names
from utils.errors import UserError
from utils.option_roles import OptionParser

_PUBLIC = {name for name in (*vars(Method), *Method.__annotations__) if not name.startswith("_")}
_HOOKS = {name for name in _PUBLIC if callable(getattr(Method, name, None))}
_NEAR = 0.75  # similarity from which a name is taken for a misspelt hook: "loss" and "penalties" are
_NAME_SETS = ("needs", "teacher_needs", "extras")
_RENAMED = {"resume": "load_state_dict, and what load_state_dict did is now from_previous_step"}
_MISSING = object()  # default of an option that was given none


def fault(owner: Method | type[Method], hook: str, what: str) -> UserError:
    """The error that says what is wrong with a method's hook.

    Args:
        owner: the method or its class.
        hook: name of the hook or attribute.
        what: what is wrong and the remedy.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__
    return UserError(f"{file}: {kind.__name__}.{hook}: {what}")


# ── when a file is loaded ────────────────────────────────────────────────────────────────────────────


def check_class(kind: type[Method]) -> None:
    """Refuse a class whose hooks could not be called, or would silently never be.

    Raises:
        UserError: no ``from_options``, a hook with other arguments, a name near a hook's, or a wrong option.
    """
    written = {
        name
        for base in kind.__mro__
        if issubclass(base, Method) and base is not Method
        for name in vars(base)
        if not name.startswith("_")
    }
    for name in sorted(written - _PUBLIC):
        if name in _RENAMED:
            raise fault(kind, name, f"is now called {_RENAMED[name]}")
        # A value is near an attribute's name, a function near a hook's: "factor" may hold a number.
        alike = _HOOKS if callable(getattr(kind, name)) else _PUBLIC - _HOOKS
        if near := difflib.get_close_matches(name, alike, n=1, cutoff=_NEAR):
            raise fault(kind, name, f"is no hook; did you mean {near[0]}? If not, rename it, e.g. to _{name}")
    if issubclass(kind, nn.Module):
        raise fault(
            kind,
            "modules",
            "is a hook, but the class is an nn.Module, which has that name too; derive from Method only, and "
            "return modules from this hook",
        )
    if "from_options" not in written:
        raise fault(
            kind, "from_options", "is missing; return the method, or None where the options leave it off"
        )
    for name in sorted(written & _HOOKS):
        _check_signature(kind, name)
    for name in _NAME_SETS:
        if isinstance(value := getattr(kind, name), str):
            check_names(kind, name, value)
    if kind.classifier is not None and kind.classifier not in classifier_names():
        known = ", ".join(classifier_names())
        raise fault(kind, "classifier", f"{shown(kind.classifier)} is no kind of classifier; known: {known}")
    check_options(kind)


def _check_signature(kind: type[Method], hook: str) -> None:
    own, base = inspect.getattr_static(kind, hook), inspect.getattr_static(Method, hook)
    bound_to_class = isinstance(base, classmethod)
    if bound_to_class != isinstance(own, (classmethod, staticmethod)):
        what = "must be a @classmethod" if bound_to_class else "must be a plain method with self"
        raise fault(kind, hook, what)
    if not callable(getattr(kind, hook)):
        raise fault(kind, hook, f"is a hook and must be a method, not {shown(own)}")
    names = list(inspect.signature(getattr(Method, hook)).parameters)
    try:
        inspect.signature(getattr(kind, hook)).bind(*names)
    except TypeError as error:
        called = ", ".join(name for name in names if name != "self")
        raise fault(kind, hook, f"is called as {hook}({called}): {error}") from error


def options_of(kind: type[Method]) -> list[argparse.Action]:
    """The options that a class adds; the default of one that was given none is replaced by a mark.

    Raises:
        UserError: ``add_options`` fails.
    """
    parser = OptionParser(prog="python run.py", add_help=False, argument_default=_MISSING)
    try:
        kind.add_options(parser.group("options", role="learning"))
    except UserError as error:
        raise fault(kind, "add_options", str(error)) from error
    except Exception as error:  # code of the user's own
        reason = " ".join(str(error).split())
        raise fault(kind, "add_options", f"{type(error).__name__}: {reason}") from error
    return parser._actions


def check_options(kind: type[Method]) -> None:
    """Refuse options without which no other command line would be read, or that are None by oversight.

    Raises:
        UserError: an option is required, has no name with dashes, or no default.
    """
    for action in options_of(kind):
        name = action.option_strings[0] if action.option_strings else action.dest
        if not action.option_strings:
            raise fault(kind, "add_options", f"{name} needs dashes (--{name}): every option may be left out")
        if action.required:
            raise fault(
                kind, "add_options", f"{name} is required; give it a default that leaves the method off"
            )
        # Flags have one of themselves, which this parser's own default hides.
        if action.default is _MISSING and not isinstance(action, argparse._StoreConstAction):
            raise fault(
                kind, "add_options", f"{name} has no default; give one (default=None where that means off)"
            )


def preset_fault(action: argparse.Action | None, value: Any) -> str | None:
    """What is wrong with a preset's value for an option, e.g. ``must be True or False``; None: it fits.

    Args:
        action: the option; None where there is none of that name.
        value: as the preset has it.
    """
    if action is None:
        return "is no option"
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        const = getattr(action, "const", True)
        if isinstance(const, bool):
            return None if isinstance(value, bool) else "must be True or False"
        return None if value in (const, action.default) else f"must be {const!r}"
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    if many and not isinstance(value, (list, tuple)):
        return "must be a list"
    for item in value if many else [value]:
        if reason := _value_fault(action, item):
            return reason
    return None


def _value_fault(action: argparse.Action, value: Any) -> str | None:
    convert: Any = action.type or str
    if isinstance(value, (dict, bool)) and convert in (str, int, float):
        return f"must be a {convert.__name__}"
    try:
        read = convert(value if isinstance(value, str) else _word(value))
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        return str(error) or "does not fit"
    if read != value or isinstance(value, bool) != isinstance(read, bool):
        return f"must be a {type(read).__name__}"
    if action.choices is not None and value not in action.choices:
        return f"must be one of {', '.join(map(str, action.choices))}"
    return None


def _word(value: Any) -> str:
    """A value as the command line would have it."""
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


# ── when a step begins, and at the first batch ───────────────────────────────────────────────────────


def check_built(kind: type[Method], method: object) -> None:
    """Refuse what ``from_options`` returned unless it is a method, or None.

    Raises:
        UserError: it is something else, or names what it needs in a wrong way.
    """
    if method is None:
        return
    if not isinstance(method, Method):
        raise fault(
            kind, "from_options", f"returned {shown(method)}; return a {kind.__name__}, or None for off"
        )
    for name in _NAME_SETS:
        if (value := getattr(method, name)) is not None:
            check_names(method, name, value)


def check_names(owner: Method | type[Method], attribute: str, value: object) -> None:
    """Refuse a set of names that is none, such as a string, which is a set of letters.

    Raises:
        UserError: it is none.
    """
    plain = isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict))
    if not plain or not all(isinstance(name, str) for name in value):  # type: ignore[attr-defined]
        example = value if isinstance(value, str) else "body"
        raise fault(
            owner, attribute, f'must be a set of names, e.g. frozenset({{"{example}"}}), not {shown(value)}'
        )


def call_hook(method: Method, hook: str, *arguments: Any) -> None:
    """Call a hook that acts and returns nothing.

    Raises:
        UserError: it returned something, which is not used.
    """
    returned = getattr(method, hook)(*arguments)
    if returned is not None:
        remedy = "replace batch.targets instead" if hook == "relabel" else "return nothing"
        raise fault(method, hook, f"returned {shown(returned)}, which is not used; {remedy}")


def checked_factor(method: Method, hook: str, parameter: str, factor: object) -> float:
    """A factor on a weight's learning rate or weight decay.

    Raises:
        UserError: it is no number, negative or not finite.
    """
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not number or not 0 <= factor < math.inf:  # type: ignore[operator]
        raise fault(
            method,
            hook,
            f"returned {shown(factor)} for {parameter}; return a number of at least 0, 1.0 for no change",
        )
    return float(factor)  # type: ignore[arg-type]


def check_modules(method: Method, networks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """What ``Method.modules`` returns.

    Args:
        method: after ``begin_step``.
        networks: student and teacher.

    Raises:
        UserError: it is no dict of modules by name, or they cannot be trained beside the network.
    """
    parts = method.modules()
    if not isinstance(parts, dict):
        raise fault(
            method, "modules", f"returned {shown(parts)}; return a dict of nn.Modules by name, {{}} for none"
        )
    of_networks = {id(weight) for network in networks for weight in network.parameters()}
    for name, module in parts.items():
        if not isinstance(name, str) or not name or "." in name:
            what = f"a module cannot be named {name!r}; use text without dots"
        elif not isinstance(module, nn.Module):
            what = f"'{name}' is {shown(module)}, not an nn.Module"
        elif any(is_lazy(weight) for weight in module.parameters()):
            what = f"'{name}' has lazy weights; give their sizes in begin_step"
        elif any(id(weight) in of_networks for weight in module.parameters()):
            what = f"'{name}' has weights of the network, which trains them; leave it out"
        else:
            continue
        raise fault(method, "modules", what)
    return parts


class LossTerms:
    """The terms of all methods under one name each. A name is checked when it first comes."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[Method, str]] = {}

    def add(self, terms: dict[str, Tensor], method: Method, hook: str, returned: dict[str, Tensor]) -> None:
        """Take what a method's hook returned into ``terms``.

        Raises:
            UserError: it is no dict of scalar tensors, or another method has one of the names.
        """
        if not isinstance(returned, dict):
            raise fault(
                method,
                hook,
                f"returned {shown(returned)}; return a dict of scalar tensors by name, {{}} for none",
            )
        for name, term in returned.items():
            owner = self._owners.get(name)
            if owner is None:
                self._check(method, hook, name, term)
                self._owners[name] = method, hook
            elif owner[0] is not method or owner[1] != hook:
                other = f"{type(owner[0]).__name__}.{owner[1]}"
                raise fault(method, hook, f"{other} has a loss '{name}' already; choose another name")
        terms.update(returned)

    def _check(self, method: Method, hook: str, name: object, term: object) -> None:
        if not isinstance(name, str) or name == "total":
            raise fault(method, hook, f"a loss cannot be named {name!r}; choose another name (text)")
        if not isinstance(term, Tensor) or term.dim() > 0:
            raise fault(
                method,
                hook,
                f"the loss '{name}' is {shown(term)}, not a scalar tensor; return e.g. its mean()",
            )


def shown(value: object) -> str:
    """A value in few words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
