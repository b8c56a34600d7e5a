"""Additions to argparse: numbers with a range, paths, one-line errors."""

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
    """Raises every error as a ``UserError``: one line without the usage text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse parses -inf as the name of an option, before Python 3.14 also -1e-3.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a ``UserError``."""
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Number:
    """A number in a range; the ``type=`` of an option. Infinity and NaN are in no range.

    ``kind`` is ``int`` or ``float``; ``low`` and ``high`` are included unless ``above`` and ``below``.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    below: bool = False

    @property
    def metavar(self) -> str:
        """The placeholder in the help."""
        return "N" if self.kind is int else "X"

    @property
    def description(self) -> str:
        """The range in words, e.g. ``a whole number of at least 1 and at most 10``."""
        what = "a whole number" if self.kind is int else "a number"
        low = f"above {self.low:.10g}" if self.above else f"at least {self.low:.10g}"
        high = f"below {self.high:.10g}" if self.below else f"at most {self.high:.10g}"
        return f"{what} of {low} and {high}"

    def __contains__(self, value: float) -> bool:
        """Whether a number is in the range; NaN is not."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __call__(self, word: str) -> int | float:
        """Parse a command-line argument.

        Raises:
            argparse.ArgumentTypeError: it is not a number, or out of range.
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


MOST = 10**9  # upper bound of counts, such as epochs
SEEDS = 2**32 - 1  # largest seed of numpy's older generators

positive_int = whole(1, MOST)
count = whole(0, MOST)
seed = whole(0, SEEDS)
loss_weight = Number(float, 0, 1e9)  # products with a loss stay finite in float32
share = Number(float, 0, 1)


def path_option(word: str) -> Path:
    """Parse a path by :func:`utils.files.given_path`; the type of every path option.

    Raises:
        argparse.ArgumentTypeError: it is not a valid path.
    """
    try:
        return given_path(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
