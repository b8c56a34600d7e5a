"""Errors that a user can mend: one clear line, exit code 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The text is one line that names the file or option and the remedy.

    ``run.py`` prints it as ``run.py: error: <text>`` on rank 0 and exits with code 2.
    """


class DataError(UserError):
    """A bad image, mask or list. Raised on whichever rank reads the file, so every rank prints its own."""
