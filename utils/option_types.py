"""Types of command-line options that argparse does not have."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.errors import UserError
from utils.files import given_path


def positive_int(word: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
        ValueError: it is no whole number.
    """
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return value


def path_option(word: str) -> Path:
    """A path as :func:`utils.files.given_path` reads it; the type of every option that is a path.

    Raises:
        argparse.ArgumentTypeError: it can be no path.
    """
    try:
        return given_path(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
