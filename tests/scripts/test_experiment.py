"""The plan of an experiment, and the table of what was run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from argparser import parse_options
from scripts import experiment
from utils.errors import UserError
from utils.report import comparison, find_runs

CONTENT = {
    "seeds": [1, 2],
    "common": {"dataset": "shapes", "task": "10-5-5", "overlap": True, "epochs": 3, "lr": 0.01},
    "step_0": {"epochs": 5},
    "runs": {"FT": {"method": "FT"}, "MIB": {"method": "MIB", "from": "FT"}, "joint": {"task": "offline"}},
}


def test_a_run_begins_from_the_step_0_of_another(tmp_path: Path) -> None:
    runs = experiment.plan({**CONTENT, "logdir": str(tmp_path)})
    assert [(run.method, run.seed) for run in runs] == [
        (m, s) for s in (1, 2) for m in ("FT", "MIB", "joint")
    ]
    ft, mib, joint = runs[:3]
    assert [len(run.commands) for run in (ft, mib, joint)] == [2, 1, 1]
    assert mib.needs == [tmp_path / "10-5-5-shapes_FT_1" / "10-5-5-shapes_FT_1_0.pth"]
    first, later, borrowed = (parse_options(c) for c in (*ft.commands, *mib.commands))
    assert (first.steps, first.epochs) == ([0], 5)
    assert (later.steps, later.epochs, later.overlap) == ([1, 2], 3, True)
    assert (borrowed.method, borrowed.step_ckpt, borrowed.random_seed) == ("MIB", mib.needs[0], 1)


def test_an_unknown_beginning_is_refused(tmp_path: Path) -> None:
    content = {**CONTENT, "logdir": str(tmp_path), "runs": {"MIB": {"from": "nothing"}}}
    with pytest.raises(UserError, match="nothing"):
        experiment.plan(content)


def test_execute_runs_in_order_and_names_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "run.py"
    stand_in.write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).touch() if sys.argv[1:] else sys.exit(3)\n"
    )
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    made = tmp_path / "a" / "made"
    good = experiment.Run("good", 1, [[str(made)]], tmp_path / "a" / "results_0.json")
    after = experiment.Run(
        "after", 1, [[str(tmp_path / "b")]], tmp_path / "c" / "results_0.json", needs=[made]
    )
    bad = experiment.Run("bad", 1, [[]], tmp_path / "d" / "results_0.json")
    never = experiment.Run("never", 1, [[]], tmp_path / "e" / "results_0.json", needs=[tmp_path / "missing"])
    assert experiment.execute([after, good, bad, never], processes=2) == [bad, never]
    assert made.is_file() and (tmp_path / "b").is_file()


def test_tables_show_means_and_spread(tmp_path: Path) -> None:
    runs = experiment.plan({**CONTENT, "logdir": str(tmp_path)})
    for run, miou in zip([run for run in runs if run.method == "FT"], (0.5, 0.6), strict=True):
        run.results.parent.mkdir(parents=True)
        numbers = {"miou_old": miou, "miou_new": None, "miou_all": miou, "harmonic_mean": None}
        run.results.write_text(json.dumps({"step": 2, **numbers}))
    table = experiment.table(runs)
    row = next(line for line in table.splitlines() if line.startswith("FT"))
    assert "55.0 ± 7.1" in row and "–" in row
    shown = comparison(find_runs([tmp_path]))
    assert "10-5-5-shapes_FT_1" in shown and "50.00" in shown


def test_reports_of_nothing_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        find_runs([tmp_path])


def test_a_bad_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("runs: {")
    assert experiment.main([str(file)]) == 2
    assert "bad.yaml" in capsys.readouterr().err
    assert sys.exc_info() == (None, None, None)
