"""Errors that are told in one clear line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The text is one line that names the file or option and the remedy.

    ``run.py`` prints it as ``run.py: error: <text>`` on rank 0 and exits with code 2.
    """


class DataError(UserError):
    """A bad image, mask or list. Raised on whichever rank reads the file, so every rank prints its own."""


class Fault(RuntimeError):
    """The machine or the numbers failed: a process died, a loss is not finite.

    ``run.py`` prints it as ``run.py: fault: <text>`` on every rank that meets it and exits with code 1.
    """
