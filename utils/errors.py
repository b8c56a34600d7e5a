"""Errors that are reported in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The text is one line that names the file or option and the remedy.

    ``run.py`` prints it as ``run.py: error: <text>`` on rank 0 and exits with code 2.
    """


class DataError(UserError):
    """A bad image, mask or list. Only the rank that reads the file raises it, so every rank prints it."""


class Fault(RuntimeError):
    """A failure at run time: a process ended, a loss is not finite.

    ``run.py`` prints it as ``run.py: fault: rank <rank>: <text>`` on every rank that raises it and exits with
    code 1.
    """
