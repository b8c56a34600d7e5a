"""What an option means for a run: its role, declared together with its name, type, default and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from utils.errors import UserError
from utils.option_types import Parser, path_option

# network: shapes the network, or what it computes
# data: which images a network is trained for and evaluated on
# learning: what else decides the trained weights
# evaluation: how a trained network is evaluated, and when
# incidental: where a run works, how fast, what it shows; which steps it trains
Role = Literal["network", "data", "learning", "evaluation", "incidental"]


@dataclass(frozen=True)
class Declaration:
    """An option's role, and where it is treated otherwise than the role says.

    Attributes:
        name: of the attribute of the parsed options, and in the records of a run.
        flag: the option as it is typed; the first of its names.
        role: see ``Role``.
        switches_off: a flag that is true unless it is typed.
        is_path: its value is a path.
        compared_as_fact: a resumed run compares what the option stands for (the images, the total batch, the
            class order), not its value.
        chooses_task: it says which classes come in which step.
        set_by_experiment: an experiment's runner gives it to every command.
        derived: no option, but a value that follows from options and stands in a run's records beside them.
        restored: a checkpoint brings it along unless it is typed; None: as the role says.
        of_method: runs that differ in it are runs of different methods; None: as the role says.
        with_results: if it is typed, a step's results name it; None: as the role says.
    """

    name: str
    flag: str
    role: Role
    switches_off: bool = False
    is_path: bool = False
    compared_as_fact: bool = False
    chooses_task: bool = False
    set_by_experiment: bool = False
    derived: bool = False
    restored: bool | None = None
    of_method: bool | None = None
    with_results: bool | None = None

    def must_agree_on_resume(self, keep_best: bool) -> bool:
        """Whether a step goes on only with the value with which it was started.

        Args:
            keep_best: the validation chooses the epoch whose weights are the result.
        """
        if self.role == "evaluation":
            return keep_best
        return self.role != "incidental" and not self.compared_as_fact

    @property
    def comes_with_checkpoint(self) -> bool:
        """Whether evaluation and prediction take it from the checkpoint, unless it is typed."""
        if self.restored is not None:
            return self.restored
        return self.role in ("network", "data") and not self.chooses_task  # the task is in the manifest

    @property
    def tells_methods_apart(self) -> bool:
        """Whether runs with two values of it are not averaged; they learn or evaluate differently."""
        return self.role != "incidental" if self.of_method is None else self.of_method

    @property
    def is_named_with_results(self) -> bool:
        """Whether results of a step name it where it is typed: it changes a trained network's numbers."""
        return self.role == "evaluation" if self.with_results is None else self.with_results

    @property
    def says_where_data_are(self) -> bool:
        """Whether it names a place of the data, which may move between two runs of a method."""
        return self.role == "data" and self.is_path and not self.chooses_task

    def as_typed(self, value: Any) -> Any:
        """A value as it belongs to ``flag``: a flag that switches off is true where it was typed."""
        return not value if self.switches_off and isinstance(value, bool) else value


_Action = TypeVar("_Action", bound=argparse.Action)
_TRAITS = {field.name for field in fields(Declaration) if field.default is not MISSING}


class OptionGroup(argparse._ArgumentGroup):
    """A titled group of options, each with its role.

    Args:
        parser: to which the group belongs.
        title: in the help.
        role: of the options that are declared without one; None: each must name its own.
    """

    def __init__(self, parser: OptionParser, title: str, role: Role | None = None) -> None:
        super().__init__(parser, title)
        parser._action_groups.append(self)
        self.role = role
        self.declared = parser.declared

    def add_argument(self, *names: Any, role: Role | None = None, **words: Any) -> argparse.Action:
        """``argparse``'s, with ``role`` and the attributes of ``Declaration`` that differ from the role's.

        A second option for the same attribute (``--fresh`` beside ``--resume``) has the first one's role.

        Raises:
            UserError: there is no such role.
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
        """Declare also what comes through a group within this one, with the role of this group."""
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
            "compared_as_fact": traits.get("chooses_task", False),
            **traits,
        }
        return Declaration(action.dest, flag, role, **traits)


class OptionParser(Parser):
    """A parser whose options have roles.

    Attributes:
        declared: what every option means, by the name of its attribute.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.declared: dict[str, Declaration] = {}
        super().__init__(*args, **kwargs)

    def group(self, title: str, role: Role | None = None) -> OptionGroup:
        """A new titled group."""
        return OptionGroup(self, title, role)
