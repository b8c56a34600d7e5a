"""Compare runs: ``python -m report LOGDIR [LOGDIR ...]``.

A table of every step of every run on the screen, and one page (``report.html``, which needs no network) with
figures as PNG and tables as CSV and Markdown beside it. A run's folder is
``<logdir>/<task>-<dataset>_<name>``; a folder above stands for all runs in it. Runs that go on, or that lack
files, are shown as far as they are.
"""

from __future__ import annotations

from report.command import main
from report.reading import find_runs, read_results
from report.tables import comparison

__all__ = ["comparison", "find_runs", "main", "read_results"]
