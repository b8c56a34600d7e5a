"""Compare runs: ``python -m utils.report RUN_DIR [RUN_DIR ...]`` prints a table of every step of every run.

A run's folder is ``<logdir>/<task>-<dataset>_<name>``; a folder above stands for all runs in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.logger import format_table

NUMBERS = {"old": "miou_old", "new": "miou_new", "all": "miou_all", "harmonic": "harmonic_mean"}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Folders of runs with results, in order of name.

    Raises:
        UserError: a folder holds no results.
    """
    runs: list[Path] = []
    for folder in folders:
        found = sorted({path.parent for path in folder.rglob("results_*.json")})
        if not found:
            raise UserError(f"{folder}: holds no results_<step>.json; give the folder of a run, or one above")
        runs += [run for run in found if run not in runs]
    return runs


def read_results(run: Path) -> dict[int, dict[str, Any]]:
    """Results of a run by step."""
    results = {}
    for path in run.glob("results_*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results[int(content["step"])] = content
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no file of results ({error}); remove it") from error
    return dict(sorted(results.items()))


def comparison(runs: Iterable[Path]) -> str:
    """Table of mIoU in per cent, a row per run and step."""
    rows = []
    for run in runs:
        for step, results in read_results(run).items():
            cells = [results[key] for key in NUMBERS.values()]
            rows.append([run.name, step, *(None if cell is None else 100 * cell for cell in cells)])
    return format_table(["run", "step", *(f"mIoU {name}" for name in NUMBERS)], rows)


def main(argv: list[str] | None = None) -> int:
    """Print the comparison and where the pictures lie; exit code 0 or 2."""
    parser = argparse.ArgumentParser(description="Compare runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOGDIR")
    try:
        runs = find_runs(parser.parse_args(argv).folders)
        print(comparison(runs))
    except UserError as error:
        print(f"utils.report: error: {error}", file=sys.stderr)
        return 2
    for picture in (path for run in runs for path in sorted(run.glob("predictions_*.png"))):
        print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
