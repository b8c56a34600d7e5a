"""Roles of options, declared together with their name, type, default and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from utils.errors import UserError
from utils.option_types import Parser, path_option

# network: changes the network or what it computes
# data: changes the images or classes of training and evaluation
# learning: changes the trained weights otherwise
# evaluation: changes how and when a trained network is evaluated
# incidental: changes none of these: folders, speed, output; which steps are trained
Role = Literal["network", "data", "learning", "evaluation", "incidental"]


@dataclass(frozen=True)
class Declaration:
    """An option's role, and exceptions to the rules of that role.

    Attributes:
        name: attribute of the parsed options, and key in a run's files.
        flag: first name of the option on the command line.
        role: see ``Role``.
        switches_off: a flag whose value is True unless it is typed.
        is_path: its value is a path.
        compared_by_meaning: on resume, what it stands for is compared (the images, the total batch, the class
            order) instead of its value.
        chooses_task: it decides which classes each step has.
        precedes_presets: it is read before presets are applied, so that no preset can set it.
        set_by_experiment: ``scripts/experiment.py`` adds it to every command.
        derived: not an option, but a value computed from options and saved with them.
        restored: evaluation takes it from the checkpoint unless it is typed; None: by the role.
        of_method: runs that differ in it count as different methods; None: by the role.
        with_results: if typed, it is saved with a step's results; None: by the role.
    """

    name: str
    flag: str
    role: Role
    switches_off: bool = False
    is_path: bool = False
    compared_by_meaning: bool = False
    chooses_task: bool = False
    precedes_presets: bool = False
    set_by_experiment: bool = False
    derived: bool = False
    restored: bool | None = None
    of_method: bool | None = None
    with_results: bool | None = None

    def must_agree_on_resume(self, keep_best: bool) -> bool:
        """Whether a step can be resumed only with the value with which it was started."""
        if self.role == "evaluation":
            return keep_best
        return self.role != "incidental" and not self.compared_by_meaning

    @property
    def comes_with_checkpoint(self) -> bool:
        """Whether evaluation and prediction take it from the checkpoint, unless it is typed."""
        if self.restored is not None:
            return self.restored
        return self.role in ("network", "data") and not self.chooses_task  # the task is in the manifest

    @property
    def tells_methods_apart(self) -> bool:
        """Whether runs with different values count as different methods and are not averaged."""
        return self.role != "incidental" if self.of_method is None else self.of_method

    @property
    def is_named_with_results(self) -> bool:
        """Whether it is saved with a step's results if typed: it changes the evaluation of given weights."""
        return self.role == "evaluation" if self.with_results is None else self.with_results

    @property
    def says_where_data_are(self) -> bool:
        """Whether it is a path of the data, which may differ between two runs of a method."""
        return self.role == "data" and self.is_path and not self.chooses_task

    def as_typed(self, value: Any) -> Any:
        """The value to show with ``flag``: True for a switch-off flag that was typed."""
        return not value if self.switches_off and isinstance(value, bool) else value


_Action = TypeVar("_Action", bound=argparse.Action)
_TRAITS = {field.name for field in fields(Declaration) if field.default is not MISSING}


class OptionGroup(argparse._ArgumentGroup):
    """A titled group of options with roles.

    Args:
        parser: the parser of the group.
        title: in the help.
        role: default role of the options; None: each option must be declared with one.
    """

    def __init__(self, parser: OptionParser, title: str, role: Role | None = None) -> None:
        super().__init__(parser, title)
        parser._action_groups.append(self)
        self.role = role
        self.declared = parser.declared

    def add_argument(self, *names: Any, role: Role | None = None, **words: Any) -> argparse.Action:
        """``argparse``'s method, with ``role`` and the optional attributes of ``Declaration`` as keywords.

        A second option of the same attribute (``--fresh``, ``--resume``) has the role of the first.

        Raises:
            UserError: unknown role.
        """
        traits = {name: words.pop(name) for name in _TRAITS & words.keys()}
        if role is not None and role not in get_args(Role):
            raise UserError(f"{names[0]}: role '{role}' is none of {', '.join(get_args(Role))}")
        if words.get("type") is Path:  # as every option that is a path: "~" is the home folder
            words["type"] = path_option
        action = super().add_argument(*names, **words)
        if role is not None or traits or action.dest not in self.declared:
            self.declared[action.dest] = self._declaration(action, role or self.role, **traits)
        return action

    def flag(self, names: str, **words: Any) -> argparse.Action:
        """An option without a value, false unless typed; ``names`` are separated by spaces."""
        return self.add_argument(*names.split(), action="store_true", **words)

    def value(self, names: str, type: Callable[[str], Any], default: Any, **words: Any) -> argparse.Action:
        """An option with a value; ``names`` are separated by spaces."""
        return self.add_argument(*names.split(), type=type, default=default, **words)

    def choice(self, names: str, choices: Sequence[str], default: Any, **words: Any) -> argparse.Action:
        """An option with one of several words; ``names`` are separated by spaces."""
        return self.add_argument(*names.split(), choices=choices, default=default, **words)

    def _add_action(self, action: _Action) -> _Action:
        """Declare also options added through a nested group, with the role of this group."""
        added = super()._add_action(action)
        if action.dest not in self.declared and self.role is not None:
            self.declared[action.dest] = self._declaration(action, self.role)
        return added

    def _declaration(self, action: argparse.Action, role: Role | None, **traits: Any) -> Declaration:
        flag = next(iter(action.option_strings), action.dest)
        if role is None:
            raise UserError(f"{flag}: give its role, one of {', '.join(get_args(Role))}")
        traits = {
            "switches_off": action.nargs == 0 and action.default is True,
            "is_path": action.type is path_option,
            "compared_by_meaning": traits.get("chooses_task", False),
            "precedes_presets": traits.get("chooses_task", False),
            **traits,
        }
        return Declaration(action.dest, flag, role, **traits)


class OptionParser(Parser):
    """A parser whose options have roles.

    Attributes:
        declared: the declaration of every option, by attribute name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.declared: dict[str, Declaration] = {}
        super().__init__(*args, **kwargs)

    def group(self, title: str, role: Role | None = None) -> OptionGroup:
        """A new titled group."""
        return OptionGroup(self, title, role)
