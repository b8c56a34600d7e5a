"""What argparse lacks: numbers with a range, and faults in one line."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError
from utils.files import given_path


class Parser(argparse.ArgumentParser):
    """Reports every fault as a ``UserError``: one line, no usage text around it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Before Python 3.14 argparse takes -1e-3, and always -inf, for the name of an option.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a ``UserError``."""
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Number:
    """A number of a range; the ``type=`` of an option. Infinity and NaN lie in no range.

    Args:
        kind: ``int`` or ``float``.
        low: the smallest.
        high: the largest.
        above: the number must be above ``low``.
        below: the number must be below ``high``.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    below: bool = False

    @property
    def metavar(self) -> str:
        """Its short name in the help."""
        return "N" if self.kind is int else "X"

    @property
    def description(self) -> str:
        """The range in words, e.g. ``a whole number of at least 1 and at most 10``."""
        what = "a whole number" if self.kind is int else "a number"
        low = f"above {self.low:.10g}" if self.above else f"at least {self.low:.10g}"
        high = f"below {self.high:.10g}" if self.below else f"at most {self.high:.10g}"
        return f"{what} of {low} and {high}"

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the range; comparisons with NaN are false."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __call__(self, word: str) -> int | float:
        """The number that a word of the command line stands for.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of the range.
        """
        try:
            value = self.kind(word)
        except ValueError:
            value = math.nan
        if value not in self:
            shown = word if len(word) <= 40 else f"{word[:40]}…"
            raise argparse.ArgumentTypeError(f"{shown} is not {self.description}")
        return value


def whole(low: int, high: int) -> Number:
    """A whole number from ``low`` to ``high``."""
    return Number(int, low, high)


MOST = 10**9  # of what is counted; far above what any machine can do, far below where arithmetic ends
SEEDS = 2**32 - 1  # numpy's older generators take no larger ones

positive_int = whole(1, MOST)
count = whole(0, MOST)
seed = whole(0, SEEDS)
loss_weight = Number(float, 0, 1e9)  # products with a loss stay finite in single precision
share = Number(float, 0, 1)


def path_option(word: str) -> Path:
    """A path as :func:`utils.files.given_path` reads it; the type of every option that is a path.

    Raises:
        argparse.ArgumentTypeError: it can be no path.
    """
    try:
        return given_path(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
