"""The command line of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from report.page import write_report
from report.reading import find_runs, read_run
from report.tables import comparison
from runs.files import PREDICTIONS, step_files
from utils.command import run_command
from utils.errors import UserError
from utils.option_types import Parser, path_option

_LISTED = 12  # images that are listed by path; more are only counted


def main(argv: list[str] | None = None) -> int:
    """Write the page; print the comparison and the paths of page and sample images. Returns the exit code."""
    return run_command("report", lambda: _report(argv))


def _report(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m report",
        description="Compare runs: print a table, and write a self-contained page with figures and tables.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=path_option,
        metavar="LOGDIR",
        help="folder of a run, or a folder above several runs",
    )
    parser.add_argument(
        "--out",
        type=path_option,
        metavar="DIR",
        help="folder for report.html, figures and tables (default: report in the common LOGDIR)",
    )
    args = parser.parse_args(argv)
    folders = find_runs(args.folders)
    runs, table = [read_run(folder) for folder in folders], comparison(folders)
    try:
        page = write_report(runs, args.out or _common(args.folders) / "report")
    finally:  # print the numbers even if the page cannot be written
        print(table)
    images = [path for folder in folders for path in step_files(folder, PREDICTIONS).values()]
    if len(images) > _LISTED:
        print(f"images: {len(images)}, {PREDICTIONS.format(step='<step>')} in the folders of the runs")
    else:
        for image in images:
            print(f"image: {image}")
    print(f"report: {page}")


def _common(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    remedy = "the folders have no common parent; give --out, the folder for the report"
    try:
        common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    except ValueError as error:  # different drives on Windows
        raise UserError(remedy) from error
    if common == Path(common.anchor):
        raise UserError(remedy)
    return common if any(folder.is_absolute() for folder in folders) else Path(os.path.relpath(common))
