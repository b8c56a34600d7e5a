"""The table of published results, and the leaderboard made from it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
from report_runs import exchange_classes, write_run

from report.groups import arrange
from report.published import TABLE, Published, table
from report.published.leaderboard import main
from report.reading import read_run
from runs.options import write_run_options
from tasks import DATASETS, get_task

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 0.15  # points: three numbers of one decimal, and means of runs


def agrees(row: Published, convention: str) -> bool:
    """Whether "all" follows from "first" and "later" under a convention of the background.

    "all only" leaves the background's own IoU free, so that only its range can be checked.
    """
    task = get_task(row.dataset, row.task)
    first, later = len(task.steps[0]), sum(map(len, task.steps[1:]))
    assert row.miou_first is not None and row.miou_later is not None and row.miou_all is not None
    if convention == "all only":
        background = row.miou_all * (first + later) - row.miou_first * (first - 1) - row.miou_later * later
        return (70 if row.dataset == "voc" else 0) <= background <= 100
    first -= convention == "without"
    mean = (row.miou_first * first + row.miou_later * later) / (first + later)
    return abs(mean - row.miou_all) <= ROUNDING


def complete_rows() -> list[Published]:
    return [row for row in table() if None not in row.means.values() and row.dataset in DATASETS]


def test_every_row_agrees_under_its_convention() -> None:
    rows = complete_rows()
    assert len(rows) > 450
    strange = [
        row
        for row in rows
        if row.background != "inconsistent"
        and (row.background not in ("with", "without", "all only") or not agrees(row, row.background))
    ]
    assert not strange


def test_rows_marked_inconsistent_do_not_agree_with_their_table() -> None:
    """Nor with the two usual conventions, but for one whose table counts the background throughout."""
    marked = [row for row in complete_rows() if row.background == "inconsistent"]
    fitting = [row for row in marked if agrees(row, "with") or agrees(row, "without")]
    assert len(marked) == 19
    assert [(row.method, row.task, row.source) for row in fitting] == [
        ("LBD", "15-5s", "SELECT paper table 2 (quoted there)")
    ]


def test_a_row_is_there_once_and_names_its_source() -> None:
    keys = [(r.dataset, r.task, r.protocol, r.backbone, r.method, r.remark, r.source) for r in table()]
    assert len(set(keys)) == len(keys) == TABLE.read_text(encoding="utf-8").count("\n") - 1
    assert all(row.source and row.method for row in table())
    for row in table():
        assert row.dataset not in DATASETS or get_task(row.dataset, row.task).name == row.task


def test_the_leaderboard_is_sorted_and_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "voc", "--task", "15-1", "--protocol", "disjoint", "--backbone", "resnet"]) == 0
    title, _, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "VOC 15-1 (15-5s), disjoint"
    expected = [
        row
        for row in table()
        if (row.task, row.protocol) == ("15-5s", "disjoint") and "resnet" in row.backbone
    ]
    expected.sort(key=lambda row: 0 if row.miou_all is None else -row.miou_all)
    assert [line.split("  ")[0] for line in lines] == [row.method for row in expected]


def test_measured_runs_stand_among_the_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        write_run(tmp_path, "MIB", seed, pictures=0)
    write_run(tmp_path, "SDR", 1, done=(0,), pictures=0)  # not finished
    other = write_run(tmp_path, "FT", 1, pictures=0)  # another class order
    exchange_classes(other)
    assert main(["--dataset", "voc", "--task", "15-5", "--runs", str(tmp_path)]) == 0
    measured = [line for line in capsys.readouterr().out.splitlines() if "this program" in line]
    assert len(measured) == 1 and "measured, 2 runs" in measured[0] and measured[0].startswith("MIB ")


def test_a_choice_without_results_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "voc", "--task", "3-3"]) == 2
    assert "no published result for this choice; there are: ade 100-10 overlapped" in capsys.readouterr().err


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    assert main(["--markdown", str(tmp_path / "published.md")]) == 0
    made = (tmp_path / "published.md").read_text(encoding="utf-8")
    assert made == (ROOT / "docs" / "published.md").read_text(encoding="utf-8"), "make the page again"


def test_the_pages_command_links_and_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[(),]", "", found.lower()) for found in re.findall(r"^## (.*)$", text, re.M)}
    links = re.findall(r"\(#(.*?)\)", text)
    assert {link.replace("-", " ") for link in links} == {
        heading.replace("-", " ") for heading in headings - {"how to read the tables"}
    }
    numbers = {int(found) for found in re.findall(r"\| (\d+) \|$", text, re.M)}
    assert sorted(numbers) == [int(found) for found in re.findall(r"^(\d+)\. ", text, re.M)]
    (command,) = re.findall(r"^```bash\n(.*?)\n```$", text, re.M | re.S)
    python, m, module, *words = shlex.split(command)
    assert (python, m, module, words[-2]) == ("python", "-m", "report.published", "--runs")
    write_run(tmp_path, "MIB", 1, pictures=0)
    assert main([*words[:-1], str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("VOC 15-1 (15-5s), overlapped\n")


# ── RCIL's table from its authors' IoU of every class ────────────────────────────────────────────────

# Task, protocol, date of the run; "all" of the README, or the run's own mean if they are 0.3 points apart.
RCIL_RUNS = [  # None: see the comment
    ("voc", "15-5s", "overlapped", "2022-08-26", 59.4),
    ("voc", "15-5s", "overlapped", "2022-10-17", None),  # 59.87
    ("voc", "15-5s", "disjoint", "2022-08-28", None),  # 53.75
    ("voc", "15-5s", "disjoint", "2022-10-17", 54.7),
    ("voc", "10-1", "overlapped", "2022-08-26", 34.3),
    ("voc", "10-1", "disjoint", "2022-08-28", None),  # 23.69; the README says 18.2
    ("ade", "100-50", "overlapped", "2022-10-04", 34.5),
    ("ade", "100-5", "overlapped", "2022-10-04", None),  # 30.15; the README says 29.6
]


def write_authors_run(folder: Path, dataset: str, task: str, protocol: str, date: str) -> dict[int, float]:
    """A run's folder with the authors' IoU of every class; returns their mean after each step, a fraction."""
    means: dict[int, float] = {}
    iou: dict[int, dict[str, float]] = defaultdict(dict)
    with (Path(__file__).parent / "rcil_results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["dataset"], row["task"], row["protocol"], row["run"]) == (dataset, task, protocol, date):
                if row["class"] == "mean":
                    means[int(row["step"])] = float(row["IoU"])
                else:
                    iou[int(row["step"])][row["class"]] = float(row["IoU"])
    network = {"model": "deeplab", "backbone": "resnet101", "method": "RCIL", "name": "RCIL"}
    options = {"dataset": dataset, "task": task, "protocol": protocol, **network}
    write_run_options(folder, options, get_task(dataset, task).steps)
    for step, values in iou.items():
        names = {"0": "background"}
        results = {
            "step": step,
            "class_iou": {names.get(c, c): value for c, value in values.items()},
            "indices": {names.get(c, c): int(c) for c in values},
        }
        (folder / f"results_{step}.json").write_text(json.dumps(results))
    return means


@pytest.mark.parametrize(("dataset", "task", "protocol", "date", "readme"), RCIL_RUNS)
def test_rcils_table_is_recomputed(
    dataset: str, task: str, protocol: str, date: str, readme: float | None, tmp_path: Path
) -> None:
    theirs = write_authors_run(tmp_path, dataset, task, protocol, date)
    run = read_run(tmp_path)
    (group,) = arrange([run])
    for step, mean in theirs.items():
        assert group.means(run, step=step)["all"] == pytest.approx(mean, abs=1e-6)
    means = {key: 100 * value for key, value in group.means(run).items() if value is not None}
    if readme is not None:
        assert means["all"] == pytest.approx(readme, abs=0.3)
    for row in table():
        if date in row.source and f"_{dataset}_{task}_" in row.source and row.protocol == protocol:
            assert row.means == pytest.approx(means, abs=0.006)
