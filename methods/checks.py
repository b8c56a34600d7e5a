"""Checks of a method's hooks; errors are one line with file, class and hook."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from methods.base import Batch, Method
from utils.errors import UserError
from utils.labels import VOID
from utils.lazy import torch
from utils.option_roles import OptionParser

_PUBLIC = {name for name in (*vars(Method), *Method.__annotations__) if not name.startswith("_")}
_HOOKS = {name for name in _PUBLIC if callable(getattr(Method, name, None))}
_NEAR = 0.75  # difflib ratio from which a name counts as a misspelt hook: "loss" and "penalties" do
_NAME_SETS = ("needs", "teacher_needs", "extras")
_RENAMED = {"resume": "load_state_dict, and what load_state_dict did is now from_previous_step"}
_DEFAULTS: dict[type[Method], dict[str, Any]] = {}
_MISSING = object()  # default of an option declared without one


def fault(owner: Method | type[Method], hook: str, what: str) -> UserError:
    """The error for a method's hook or attribute ``hook``; ``what``: what is wrong, and the remedy."""
    kind = owner if isinstance(owner, type) else type(owner)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__
    return UserError(f"{file}: {kind.__name__}.{hook}: {what}")


def refuse_without(opts: Any, flags: Sequence[str], names: Sequence[str]) -> None:
    """Refuse typed options of methods of which none is enabled.

    Raises:
        UserError: one of ``names`` was typed without one of ``flags``.
    """
    typed = [name for name in names if name in opts.typed]
    if typed and not any(getattr(opts, flag) for flag in flags):
        raise UserError(f"--{typed[0]} goes with --{' or --'.join(flags)}; give it, or drop this")


def refuse_other_channels(opts: Any, option: str) -> None:
    """Refuse an option that takes channel c of the logits for class c where the classifier's are others.

    Raises:
        UserError: the classifier's logits have another meaning; more parts, for later steps, are allowed.
    """
    from methods.classifiers import classifier_kind  # needs torch

    kind = classifier_kind(opts.classifier)
    if kind.needs_its_method and not kind.of_all_steps:
        raise UserError(
            f"--{option} takes channel c of the logits for class c, but those of --classifier "
            f"{opts.classifier} are others; drop one of the two"
        )


# ── When a method file is loaded ─────────────────────────────────────────────────────────────────────


def check_class(kind: type[Method]) -> None:
    """Check the hooks and options of a class.

    Raises:
        UserError: no ``from_options``, a hook with other arguments, a name similar to a hook's, or an invalid
            option.
    """
    from methods.classifiers import classifier_names  # needs torch

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
        # Functions are compared with hooks, values with attributes: "factor" may hold a number.
        candidates = _HOOKS if callable(getattr(kind, name)) else _PUBLIC - _HOOKS
        if near := difflib.get_close_matches(name, candidates, n=1, cutoff=_NEAR):
            raise fault(kind, name, f"is no hook; did you mean {near[0]}? If not, rename it, e.g. to _{name}")
    if issubclass(kind, torch.nn.Module):
        what = "is a hook, but the class is an nn.Module, which has that name too; derive from Method only"
        raise fault(kind, "modules", what)
    if "from_options" not in written:
        raise fault(kind, "from_options", "is missing; return the method, or None if the options disable it")
    for name in sorted(written & _HOOKS):
        _check_signature(kind, name)
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


def options_of(kind: type[Method], placeholder: object = _MISSING) -> list[argparse.Action]:
    """The options that a class adds; those declared without default have ``placeholder`` as default.

    Raises:
        UserError: ``add_options`` fails.
    """
    parser = OptionParser(prog="python run.py", add_help=False, argument_default=placeholder)
    try:
        kind.add_options(parser.group("options", role="learning"))
    except UserError as error:
        raise fault(kind, "add_options", str(error)) from error
    except Exception as error:  # in the user's code
        reason = " ".join(str(error).split())
        raise fault(kind, "add_options", f"{type(error).__name__}: {reason}") from error
    return parser._actions


def defaults_of(kind: type[Method]) -> dict[str, Any]:
    """The defaults of the options that a class adds, by attribute name."""
    if kind not in _DEFAULTS:  # a parser for each command of an experiment would take most of its planning
        _DEFAULTS[kind] = {option.dest: option.default for option in options_of(kind, placeholder=None)}
    return _DEFAULTS[kind]


def check_options(kind: type[Method]) -> None:
    """Check that every option of a class may be omitted.

    Raises:
        UserError: an option is positional, required, or has no default.
    """
    for action in options_of(kind):
        # Flags have a default of their own, which the parser's placeholder hides.
        no_default = action.default is _MISSING and not isinstance(action, argparse._StoreConstAction)
        if not action.option_strings:
            what = f"needs dashes (--{action.dest}): every option may be omitted"
        elif action.required:
            what = "is required; give it a default that disables the method"
        elif no_default:
            what = "has no default; give one (default=None if that disables the method)"
        else:
            continue
        raise fault(kind, "add_options", f"{next(iter(action.option_strings), action.dest)} {what}")


def preset_fault(action: argparse.Action | None, value: Any) -> str | None:
    """What is wrong with a preset's value for an option, e.g. ``must be True or False``; None: it is valid.

    Args:
        action: the option; None if there is none of that name.
        value: the value in the preset.
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
        word = json.dumps(value) if isinstance(value, (dict, list)) else str(value)  # as typed
        read = convert(word)
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        return str(error) or "is invalid"
    if not isinstance(read, (str, int, float, dict)) or (type(read) is type(value) and read != value):
        return "cannot be set by a preset; type it on the command line instead"
    if read != value or isinstance(value, bool) != isinstance(read, bool):
        return f"must be a {type(read).__name__}"
    if action.choices is not None and value not in action.choices:
        return f"must be one of {', '.join(map(str, action.choices))}"
    return None


# ── When a step starts, and at the first batch ───────────────────────────────────────────────────────


def check_built(kind: type[Method], method: object) -> None:
    """Check what ``from_options`` returned.

    Raises:
        UserError: it is neither a method nor None, or ``needs``, ``teacher_needs`` or ``extras`` is not a set
            of names (a string would be a set of letters).
    """
    if method is None:
        return
    if not isinstance(method, Method):
        what = f"returned {shown(method)}; return a {kind.__name__}, or None for off"
        raise fault(kind, "from_options", what)
    for name in _NAME_SETS:
        if (value := getattr(method, name)) is None:
            continue
        is_text = isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable)
        if is_text or not all(isinstance(item, str) for item in value):
            example = value if isinstance(value, str) else "body"
            what = f'must be a set of names, e.g. frozenset({{"{example}"}}), not {shown(value)}'
            raise fault(method, name, what)
    if method.classifier != kind.classifier:
        raise fault(method, "classifier", "is read from the class; set it there instead of in __init__")


def call_hook(method: Method, hook: str, *arguments: Any) -> None:
    """Call a hook that returns nothing.

    Raises:
        UserError: it returned something, which would be ignored.
    """
    returned = getattr(method, hook)(*arguments)
    if returned is not None:
        remedy = "replace batch.targets instead" if hook == "relabel" else "return nothing"
        raise fault(method, hook, f"returned {shown(returned)}, which is not used; {remedy}")


def relabel(method: Method, batch: Batch, *, is_first: bool) -> None:
    """Call ``relabel`` and check what it left as ``batch.targets`` and as weights.

    Args:
        method: its owner.
        batch: with the labels that the method replaces.
        is_first: the first batch, of which the values of a user's method are checked too: a GPU has to be
            waited for.

    Raises:
        UserError: they are no longer labels of the same shape and type, or were changed in place, which
            changes ``batch.original_targets`` too; or weights have another shape.
    """
    shape, dtype = batch.targets.shape, batch.targets.dtype
    version = batch.original_targets._version
    call_hook(method, "relabel", batch)
    after = batch.targets
    if not isinstance(after, torch.Tensor) or (after.shape, after.dtype) != (shape, dtype):
        kind = (tuple(after.shape), after.dtype) if isinstance(after, torch.Tensor) else shown(after)
        what = f"left {kind} as batch.targets; they must stay labels of shape {tuple(shape)}, {dtype}"
        raise fault(method, "relabel", what)
    if batch.original_targets._version != version:
        what = "changes batch.targets in place, and so batch.original_targets; change a clone() and set it"
        raise fault(method, "relabel", what)
    if is_first and not type(method).__module__.startswith("methods."):
        classes = batch.classes_old + batch.classes_new
        if (strange := after[(after != VOID) & ((after < 0) | (after >= classes))]).numel():
            what = f"left the label {int(strange[0])}; classes are 0 to {classes - 1}, and {VOID} is void"
            raise fault(method, "relabel", what)
    for name, expected in (("image_weights", shape[:1]), ("pixel_weights", shape)):
        weights = getattr(batch, name)
        if weights is not None and (not isinstance(weights, torch.Tensor) or weights.shape != expected):
            what = f"set batch.{name} to {shown(weights)}; it must be a tensor of shape {tuple(expected)}"
            raise fault(method, "relabel", what)


def checked_factor(method: Method, hook: str, parameter: str, factor: object) -> float:
    """A factor on a weight's learning rate or weight decay.

    Raises:
        UserError: it is not a number, negative or not finite.
    """
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not number or not 0 <= factor < math.inf:  # type: ignore[operator]
        what = f"returned {shown(factor)} for {parameter}; return a number of at least 0, 1.0 for no change"
        raise fault(method, hook, what)
    return float(factor)  # type: ignore[arg-type]


def check_modules(method: Method, networks: Iterable[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """The result of ``Method.modules``, checked.

    Args:
        method: after ``begin_step``.
        networks: student and teacher.

    Raises:
        UserError: it is not a dict of modules by name, or they cannot be trained beside the network.
    """
    parts = method.modules()
    if not isinstance(parts, dict):
        what = f"returned {shown(parts)}; return a dict of nn.Modules by name, {{}} for none"
        raise fault(method, "modules", what)
    of_networks = {id(weight) for network in networks for weight in network.parameters()}
    for name, module in parts.items():
        if not isinstance(name, str) or not name or "." in name:
            what = f"a module cannot be named {name!r}; use text without dots"
        elif not isinstance(module, torch.nn.Module):
            what = f"'{name}' is {shown(module)}, not an nn.Module"
        elif any(torch.nn.parameter.is_lazy(weight) for weight in module.parameters()):
            what = f"'{name}' has lazy weights; give their sizes in begin_step"
        elif any(id(weight) in of_networks for weight in module.parameters()):
            what = f"'{name}' has weights of the network, which trains them; remove it"
        else:
            continue
        raise fault(method, "modules", what)
    return parts


class LossTerms:
    """Collects the loss terms of all methods by unique names. A name is checked at its first use."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[Method, str]] = {}

    def add(
        self, terms: dict[str, torch.Tensor], method: Method, hook: str, returned: dict[str, torch.Tensor]
    ) -> None:
        """Add what a method's hook returned to ``terms``.

        Raises:
            UserError: it is not a dict of scalar tensors, or another hook has one of the names.
        """
        if not isinstance(returned, dict):
            what = f"returned {shown(returned)}; return a dict of scalar tensors by name, {{}} for none"
            raise fault(method, hook, what)
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
        if not isinstance(term, torch.Tensor) or term.dim() > 0:
            what = f"the loss '{name}' is {shown(term)}, not a scalar tensor; return e.g. its mean()"
            raise fault(method, hook, what)


def shown(value: object) -> str:
    """Short description of a value, for a message."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
