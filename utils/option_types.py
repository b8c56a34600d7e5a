"""Types of command-line options that argparse does not have."""

from __future__ import annotations

import argparse


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
