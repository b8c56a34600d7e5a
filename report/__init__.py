"""Compare runs: ``python -m report LOGDIR [LOGDIR ...]``.

Prints a table of every step of every run, and writes one self-contained page (``report.html``) with figures
as PNG and tables as CSV and Markdown in the same folder. A run's folder is
``<logdir>/<task>-<dataset>_<name>``; a folder above it selects all runs in it. Unfinished runs and runs with
missing files are included with what they have.
"""

from __future__ import annotations

from utils.command import interrupts_in_one_line

interrupts_in_one_line()

from report.command import main  # noqa: E402
from report.reading import find_runs, read_results  # noqa: E402
from report.tables import comparison  # noqa: E402

__all__ = ["comparison", "find_runs", "main", "read_results"]
