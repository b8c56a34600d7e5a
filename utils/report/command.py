"""The command line of the report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.option_types import path_option
from utils.report.page import write_report
from utils.report.reading import find_runs, read_run
from utils.report.tables import comparison

_LISTED = 12  # pictures that are named one by one


def main(argv: list[str] | None = None) -> int:
    """Print the comparison, write the page, print where it and the pictures lie; exit code 0 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.report",
        description="Compare runs: a table here, and a page with figures and tables that needs no network.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=path_option,
        metavar="LOGDIR",
        help="the folder of a run, or one above several",
    )
    parser.add_argument(
        "--out",
        type=path_option,
        metavar="DIR",
        help="folder of report.html and what lies beside it (default: report in the common LOGDIR)",
    )
    args = parser.parse_args(argv)
    try:
        runs = find_runs(args.folders)
        print(comparison(runs))
        page = write_report([read_run(run) for run in runs], args.out or _common(args.folders) / "report")
    except UserError as error:
        print(f"utils.report: error: {error}", file=sys.stderr)
        return 2
    pictures = [path for run in runs for path in sorted(run.glob("predictions_*.png"))]
    if len(pictures) > _LISTED:
        print(f"pictures: {len(pictures)}, predictions_<step>.png in the folders of the runs")
    else:
        for picture in pictures:
            print(f"picture: {picture}")
    print(f"report: {page}")
    return 0


def _common(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    remedy = "the folders lie below no common one; give --out, the folder for the report"
    try:
        common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    except ValueError as error:  # two drives of Windows
        raise UserError(remedy) from error
    if common == Path(common.anchor):
        raise UserError(remedy)
    return common
