"""Experiments from one file: plan, runs, Slurm jobs, table."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import SMALL_BACKBONE

from argparser import parse_options
from report.groups import arrange
from report.reading import read_run
from runs.options import write_run_options
from scripts import experiment
from scripts.experiment_plan import Run, check_content, check_existing_steps, plan, read_experiment
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONTENT: dict[str, Any] = {
    "logdir": "logs",
    "seeds": [1, 2],
    "common": {"dataset": "shapes", "task": "10-5-5", "overlap": True, "epochs": 3, "lr": 0.01},
    "step_0": {"epochs": 5},
    "runs": {"FT": {"method": "FT"}, "MIB": {"method": "MIB", "from": "FT"}, "joint": {"task": "offline"}},
}


def planned(tmp_path: Path, **changes: Any) -> list[Run]:
    return plan(check_content({**CONTENT, "logdir": str(tmp_path), **changes}))


def write(tmp_path: Path, **changes: Any) -> Path:
    """Write an experiment's file whose logdir is ``logs`` in the same folder."""
    file = tmp_path / "experiment.yaml"
    content = {**CONTENT, "logdir": str(tmp_path / "logs"), **changes}
    file.write_text(yaml.safe_dump({name: entry for name, entry in content.items() if entry is not None}))
    return file


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_with_the_same_first_step_share_it(tmp_path: Path) -> None:
    common = {"dataset": "shapes", "overlap": True}
    runs = planned(tmp_path, seeds=[1], tasks=["15-5", "15-1", "10-5-5"], common=common)
    by_name = {(run.method, run.task.name): run for run in runs}
    owner = by_name["FT", "15-5"]
    assert [len(owner.commands), len(by_name["FT", "10-5-5"].commands)] == [2, 2]
    step_0 = tmp_path / "15-5-shapes_FT_1" / "15-5-shapes_FT_1_0.pth"
    for key in (("FT", "15-5s"), ("MIB", "15-5"), ("MIB", "15-5s")):
        assert by_name[key].starts_from is owner
        (command,) = by_name[key].commands
        assert parse_options(command).step_ckpt == step_0
    assert by_name["MIB", "10-5-5"].starts_from is by_name["FT", "10-5-5"]


def test_options_of_a_task(tmp_path: Path) -> None:
    """They override the common ones, a run's options override them, and its options for a task all others.

    A step 0 of other options is not shared.
    """
    tasks = ["15-5", {"15-1": {"lr": 0.002}}, {"10-1": {}}]
    common = {"dataset": "shapes", "overlap": True, "lr": 0.01}
    ssul = {"method": "SSUL", "lr": 0.05, "tasks": {"10-1": {"lr": 0.03}}}
    runs: dict[str, Any] = {"FT": {"method": "FT"}, "SSUL": ssul}
    for step_0, shares in (({"lr": 0.1}, True), ({"epochs": 5}, False)):
        made = planned(tmp_path, seeds=[1], tasks=tasks, common=common, runs=runs, step_0=step_0)
        rates = {
            (run.method, run.task.name): parse_options(run.commands[-1]).lrs[0]  # of the later steps
            for run in made
        }
        assert [rates["FT", task] for task in ("15-5", "15-5s", "10-1")] == [0.01, 0.002, 0.01]
        assert [rates["SSUL", task] for task in ("15-5", "15-5s", "10-1")] == [0.05, 0.05, 0.03]
        by_name = {(run.method, run.task.name): run for run in made}
        assert (by_name["FT", "15-5s"].starts_from is by_name["FT", "15-5"]) == shares
        assert by_name["SSUL", "15-5s"].starts_from is by_name["SSUL", "15-5"]


@pytest.mark.parametrize(("overlap", "shares"), [(True, True), (False, False)])
def test_ade_shares_step_0_only_where_steps_overlap(tmp_path: Path, overlap: bool, shares: bool) -> None:
    """Disjoint, each ADE20K image is in the list of one step: the lists of 100-10 and 100-5 differ."""
    common = {"dataset": "ade", "overlap": overlap}
    first, second = planned(
        tmp_path, seeds=[1], tasks=["100-10", "100-5"], common=common, runs={"FT": {"method": "FT"}}
    )
    assert first.starts_from is None
    assert (second.starts_from is first) == shares


def test_a_classifier_of_all_steps_shares_no_step_0_with_other_steps(tmp_path: Path) -> None:
    runs: dict[str, Any] = {"FT": {"method": "FT"}, "DFT": {"method": "DFT"}}
    made = planned(tmp_path, seeds=[1], tasks=["15-5", "15-1"], common={"dataset": "voc"}, runs=runs)
    starts = {(run.method, run.task.name): run.starts_from for run in made}
    assert starts["DFT", "15-5"] is starts["DFT", "15-5s"] is None and starts["FT", "15-5s"] is not None


def test_a_run_starts_from_the_step_0_of_another(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert [(run.method, run.seed) for run in runs] == [
        (m, s) for s in (1, 2) for m in ("FT", "MIB", "joint")
    ]
    ft, mib, joint = runs[:3]
    assert [len(run.commands) for run in (ft, mib, joint)] == [2, 1, 1]
    assert mib.starts_from is ft and ft.starts_from is None
    first, later, borrowed = (parse_options(c) for c in (*ft.commands, *mib.commands))
    assert (first.steps, first.epochs) == ([0], 5)
    assert (later.steps, later.epochs, later.overlap) == ([1, 2], 3, True)
    step_0 = tmp_path / "10-5-5-shapes_FT_1" / "10-5-5-shapes_FT_1_0.pth"
    assert (borrowed.method, borrowed.step_ckpt, borrowed.random_seed) == ("MIB", step_0, 1)


def test_a_run_waits_until_the_step_0_is_evaluated(tmp_path: Path) -> None:
    ft, mib = planned(tmp_path)[:2]
    ft.folder.mkdir()
    # The checkpoint of a step in training has the same name.
    (ft.folder / "10-5-5-shapes_FT_1_0.pth").touch()
    assert not mib.can_start
    (ft.folder / "results_0.json").touch()
    assert mib.can_start


def test_every_task_is_run_and_joint_training_only_once(tmp_path: Path) -> None:
    common = {name: value for name, value in CONTENT["common"].items() if name != "task"}
    runs = planned(tmp_path, tasks=["10-5-5", "10-10", "15-1"], common=common, seeds=[7])
    assert [(run.task.name, run.method) for run in runs] == [
        *(("10-5-5", "FT"), ("10-5-5", "MIB"), ("offline", "joint")),
        *(("10-10", "FT"), ("10-10", "MIB"), ("15-5s", "FT"), ("15-5s", "MIB")),
    ]
    assert [task.name for task in runs[2].compared_in] == ["10-5-5", "10-10", "15-5s"]
    assert parse_options(runs[-1].commands[0]).steps == [1, 2, 3, 4, 5]
    assert runs[-1].folder == tmp_path / "15-5s-shapes_MIB_7"


def test_step_0_of_a_single_run(tmp_path: Path) -> None:
    sdr = {"method": "SDR", "step_0": {"unce": True, "loss_de_prototypes": 1}}
    (run,) = planned(tmp_path, runs={"SDR": sdr}, seeds=[1])
    first, later = (parse_options(command) for command in run.commands)
    assert (first.loss_de_prototypes, first.epochs, later.loss_de_prototypes) == (1.0, 5, 1e-2)


def test_the_experiment_of_shapes_is_in_order() -> None:
    runs = plan(read_experiment(ROOT / "scripts" / "shapes.yaml"))
    assert {run.seed for run in runs} == {1, 2, 3}
    assert len(runs) == 3 * len({run.method for run in runs})
    assert {run.method for run in runs if run.starts_from} >= {"LWF", "MIB", "PLOP", "SATS"}
    sdr = next(run for run in runs if run.method == "SDR")
    first, later = (parse_options(command) for command in sdr.commands)
    assert (first.method, first.unce, first.loss_de_prototypes) == ("FT", True, 1.0)
    assert (later.method, later.unce, later.sample_num) == ("SDR", True, 6)


# ── wrong files ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": [1]}, "unknown entry 'seed'; did you mean seeds?"),
        ({"logdir": None}, "logdir: give the folder"),
        ({"runs": {}}, "runs: give at least one"),
        ({"runs": ["FT"]}, "runs: expected 'name: value' entries"),
        ({"runs": {"FT": "FT"}}, "runs: FT: expected options"),
        ({"runs": {"MIB": {"from": "nothing"}}}, "MIB starts from 'nothing', which is not a run of the file"),
        (
            {"runs": {"FT": {}, "A": {"from": "FT"}, "B": {"from": "A"}}},
            "B starts from 'A', which has no step 0 of its own",
        ),
        (
            {"runs": {"joint": {"task": "offline"}, "A": {"from": "joint"}}},
            "A starts from 'joint', which has no step 0 of task 10-5-5",
        ),
        ({"runs": {"FT": {"metod": "FT"}}}, "runs: FT: unknown option --metod; did you mean --method"),
        ({"runs": {"FT": {"method": "FTT"}}}, "runs: FT: argument --method: unknown method 'FTT'"),
        ({"runs": {"a/b": {}}}, "runs: a/b: --name a/b_1"),
        ({"runs": {"FT": {"name": "x"}}}, "runs: FT: name is set by the experiment"),
        ({"step_0": {"epochs": 0}}, "runs: FT: argument --epochs: 0 is not a whole number of at least 1"),
        ({"common": {"dataset": "shapes", "task": "30-1"}}, "common: --task '30-1'"),
        ({"common": {"from": "FT"}}, "common: 'from' is an entry of a run"),
        ({"common": ["lr"]}, "common: expected options"),
        ({"tasks": ["10-10"]}, "tasks and the task of common exclude each other"),
        ({"tasks": "10-10"}, "tasks: expected names"),
        ({"tasks": [{"15-5": {}, "15-1": {}}]}, "tasks: expected names"),
        ({"tasks": ["15-5", {"15-5": {}}]}, "tasks: expected names"),
        ({"tasks": [{"15-1": 0.1}]}, "tasks: 15-1: expected options"),
        ({"runs": {"FT": {"tasks": {"15-1": {}}}}}, "runs: FT: tasks: 15-1 is not a task of the experiment"),
        ({"seeds": 3.5}, "seeds: expected different numbers"),
        ({"seeds": [1, 1]}, "seeds: expected different numbers"),
        ({"seeds": []}, "seeds: expected different numbers"),
        (
            {"seeds": [2**32]},
            "seeds: expected different numbers, e.g. [1, 2, 3], at least 0 and at most 4294967295",
        ),
        ({"processes": 0}, "processes: expected a number, at least 1 and at most 1024"),
        ({"processes": 10**9}, "processes: expected a number, at least 1 and at most 1024"),
        ({"step_0": {"timeout": math.inf}}, "argument --timeout: inf is not a number of at least 1"),
        ({"step_0": {"lr": [math.nan]}}, "argument --lr: nan is not a number"),
        ({"processes": 2, "gpus": [0, 1, 2]}, "gpus: 3 cannot be divided among 2 processes"),
        (
            {"runs": {"FT": {}, "MIB": {"from": "FT", "step_0": {"lr": 0.5}}}},
            "runs: MIB: step_0 has no effect with from:",
        ),
        ({"slurm": "gpu"}, "slurm: expected options of sbatch"),
        ({"slurm": {"dependency": "x"}}, "slurm: dependency is set by the experiment"),
    ],
)
def test_a_wrong_entry_is_reported_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    file = write(tmp_path, **changes)
    assert experiment.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"scripts.experiment: error: {file}: ")
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["FT: {method: FT}", "'FT': {method: MIB}"], "line 4: 'FT' appears twice; remove one"),
        (["FT:", "  lr: 0.1", "  method: FT", "  lr: 0.2"], "line 6: 'lr' appears twice; remove one"),
        (["FT: {lr: 0.1, --lr: 0.2}"], "runs: FT: 'lr' appears twice; remove one"),
        (["NO: {method: FT}"], "line 3: the name 'NO' is not text in YAML; put it in quotes"),
        (["FT: {null: 3}"], "line 3: the name 'null' is not text in YAML; put it in quotes"),
        (["1: {method: FT}"], "runs: 1: the name of a run must be text; put it in quotes"),
        (["'1': {}", "A: {from: 1}"], "runs: A: from: 1 is not the name of a run; put a name in quotes"),
    ],
)
def test_names_are_text_and_none_is_given_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[str], said: str
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("\n  ".join([f"logdir: {tmp_path}\nruns:", *runs]))
    assert experiment.main([str(file), "--dry-run"]) == 2
    assert capsys.readouterr().err == f"scripts.experiment: error: {file}: {said}\n"


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"logdir: {tmp_path}\ncommon: {{dataset: shapes}}\n"
        "runs:\n  FT: &FT {task: 15-5, lr: 0.1}\n  A: &A {<<: *FT, lr: 0.2}\n  B: {<<: *A, lr: 0.3}\n"
    )
    assert [run.options["lr"] for run in plan(read_experiment(file))] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("text", [b"runs: {", b"- a list", b"\xff\xfe"])
def test_a_file_that_is_not_an_experiment_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text)
    assert experiment.main([str(file)]) == experiment.main([str(tmp_path / "no.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "bad.yaml: " in first and "no.yaml: cannot be read" in second


# ── running ──────────────────────────────────────────────────────────────────────────────────────────

# Writes results as run.py does, or ends with the code that the file "fails" has for the run.
STAND_IN = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from argparser import parse_options
opts = parse_options(sys.argv[1:])
folder = opts.logdir / f"{{opts.task}}-{{opts.dataset}}_{{opts.name}}"
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(f"{{opts.name}} {{opts.steps}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}}\\n")
fails = json.loads((here / "fails").read_text())
if fails.get(opts.name) == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    starter = os.getppid()  # not for ever, should the test fail
    while os.getppid() == starter:
        time.sleep(0.05)
if opts.name in fails:
    sys.exit("a word about it" if fails[opts.name] == 1 else fails[opts.name])
for step in opts.steps:
    numbers = {{"miou_old": 0.5, "miou_new": 0.25, "miou_all": 0.4}}
    ids = opts.task_.seen_classes(step)
    iou = {{f"c{{i}}": i / 100 for i in ids}}
    indices = {{f"c{{i}}": k for k, i in enumerate(ids)}}
    content = {{"step": step, **numbers, "class_iou": iou, "indices": indices}}
    (folder / f"results_{{step}}.json").write_text(json.dumps(content))
"""


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreter: Path
) -> Callable[[dict[str, object]], None]:
    """Replace run.py by a stand-in; call with the runs that fail."""
    monkeypatch.setattr(sys, "executable", str(interpreter))
    (tmp_path / "run.py").write_text(STAND_IN.format(root=str(ROOT)))
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "_report", lambda runs, logdir: 0)

    def set_fails(names: dict[str, object]) -> None:
        (tmp_path / "fails").write_text(json.dumps(names))

    set_fails({})
    return set_fails


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_missing_runs_are_started_and_failed_ones_repeated(
    tmp_path: Path, fails: Callable[[dict[str, object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, seeds=[1], processes=2)
    fails({"FT_1": 1})
    assert experiment.main([str(file)]) == 1
    assert sorted(calls(tmp_path)) == ["FT_1 [0] None", "joint_1 [0] None"]
    said = capsys.readouterr()
    assert "FT, 10-5-5, seed 1: failed with 1: a word about it" in said.err
    assert "MIB, 10-5-5, seed 1: not started, its step 0 is missing" in said.err
    assert "joint, offline, seed 1: done" in said.out
    fails({"MIB_1": 75})
    assert experiment.main([str(file)]) == 1
    assert sorted(calls(tmp_path)) == ["FT_1 [0] None", "FT_1 [1, 2] None", "MIB_1 [1, 2] None"]
    fails({})
    assert experiment.main([str(file)]) == 0
    assert calls(tmp_path) == ["MIB_1 [1, 2] None"]
    assert experiment.main([str(file)]) == 0
    assert calls(tmp_path) == []


def test_concurrent_runs_have_separate_gpus(
    tmp_path: Path, fails: Callable[[dict[str, object]], None]
) -> None:
    runs = {"A": {}, "B": {}}
    common = {"dataset": "shapes", "task": "offline"}
    file = write(tmp_path, seeds=[1], runs=runs, common=common, processes=2, gpus=[2, 5])
    assert experiment.main([str(file)]) == 0
    assert {line.split()[-1] for line in calls(tmp_path)} == {"2", "5"}


def test_several_gpus_per_run_are_started_by_torchrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, seeds=[1], processes=2, gpus=[0, 1, 2, 3])
    assert experiment.main([str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("#")] == [
        "# FT, 10-5-5, seed 1",
        "# MIB, 10-5-5, seed 1, after FT, 10-5-5, seed 1",
        "# joint, offline, seed 1",
    ]
    commands = [shlex.split(line) for line in shown if not line.startswith("#")]
    assert len(commands) == 4
    for words in commands:
        assert words[1:6] == [
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            str(ROOT / "run.py"),
        ]
        parse_options(words[6:])
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("gpus", "share"), [([], 24), (["0", "1"], 12), (["0", "1", "2", "3"], 6)])
def test_the_total_batch_is_divided_among_the_processes(
    gpus: list[str], share: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**CONTENT["common"], "total_batch": 24}
    common.pop("batch_size", None)
    file = write(tmp_path, seeds=[1], common=common, runs={"MIB": {"method": "MIB"}}, processes=1)
    arguments = ["--gpus", *gpus] if gpus else []
    assert experiment.main([str(file), "--dry-run", "--set", f"data_root={tmp_path}", *arguments]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    for words in commands:
        options = parse_options(words[words.index(str(ROOT / "run.py")) + 1 :])
        assert (options.batch_size, options.data_root) == (share, tmp_path)
    assert experiment.main([str(file), "--dry-run", "--gpus", "0", "1", "2", "3", "4"]) == 2
    assert "total_batch 24 cannot be divided among 5 processes" in capsys.readouterr().err


def test_a_later_batch_size_overrides_an_inherited_one(tmp_path: Path) -> None:
    """``total_batch`` and ``batch_size`` at different levels, and of step 0 of a task."""
    tasks = [{"10-5-5": {"step_0": {"total_batch": 16}}}, "15-5"]
    common = {"dataset": "shapes", "total_batch": 24}
    runs = {"A": {"batch_size": 6}, "B": {"step_0": {"batch_size": 4}}, "C": {}}
    found = {
        (run.method, run.task.name): [parse_options(words).batch_size for words in run.commands]
        for run in planned(tmp_path, seeds=[1], gpus=[0, 1], common=common, tasks=tasks, runs=runs)
    }
    assert found["A", "10-5-5"] == [8, 6] and found["A", "15-5"] == [6, 6]
    assert found["B", "10-5-5"] == [4, 12] and found["B", "15-5"] == [4, 12]
    assert found["C", "10-5-5"] == [8, 12] and found["C", "15-5"] == [12, 12]


@pytest.mark.parametrize(
    ("slurm", "share"), [({"ntasks": "4"}, 6), ({"nodes": "2", "ntasks-per-node": "3"}, 4), ({}, 24)]
)
def test_the_total_batch_of_a_job_is_divided_among_its_tasks(
    slurm: dict[str, str], share: int, tmp_path: Path
) -> None:
    common = {"dataset": "shapes", "task": "10-5-5", "total_batch": 24}
    (run,) = planned(tmp_path, common=common, seeds=[1], runs={"MIB": {}}, slurm=slurm, tasks=None)
    assert all(parse_options(command).batch_size == share for command in run.commands)
    with pytest.raises(UserError, match="common: total_batch and batch_size exclude each other"):
        planned(tmp_path, common={**common, "batch_size": 4})
    for unknown in (
        {"nodes": "1-2"},
        {"gpus": "4", "ntasks-per-gpu": "1"},
        {"gpus": "4", "gpus-per-task": "1"},
    ):
        with pytest.raises(UserError, match="total_batch needs the job's number of processes; give ntasks"):
            planned(tmp_path, common=common, slurm=unknown)


def test_options_of_the_command_line_replace_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A run may have the name of an option.
    runs = {"epochs": {"method": "MIB", "epochs": 7, "step_0": {"--epochs": 9, "method": "FT"}}}
    file = write(tmp_path, seeds=[1], runs=runs)
    assert (
        experiment.main([str(file), "--dry-run", "--set", "epochs=1", "no_pretrained", "batch_size=3"]) == 0
    )
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    parsed = [parse_options(words[words.index(str(ROOT / "run.py")) + 1 :]) for words in commands]
    assert [(o.epochs, o.no_pretrained, o.batch_size) for o in parsed] == [(1, True, 3)] * 2
    assert [o.method for o in parsed] == ["FT", "MIB"]
    for word, said in (
        ("epoch=1", "unknown option --epoch"),
        ("epochs=[1", "--set epochs=[1: not valid YAML"),
    ):
        assert experiment.main([str(file), "--dry-run", "--set", word]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_the_runs_save(
    tmp_path: Path, fails: Callable[[dict[str, object]], None], sent: signal.Signals
) -> None:
    file = write(tmp_path, seeds=[1], runs={"FT": {}})
    fails({"FT_1": "wait"})
    program = tmp_path / "program.py"
    code = f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import experiment\n"
    code += "experiment.ROOT = pathlib.Path(__file__).parent; sys.exit(experiment.main(sys.argv[1:]))"
    program.write_text(code)
    process = subprocess.Popen([sys.executable, program, file], stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "waiting").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(sent)
        _, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert f"{sent.name}: the runs are saved; repeat the command to resume them" in error
    assert "Traceback" not in error


# ── a changed file ───────────────────────────────────────────────────────────────────────────────────


def trained(file: Path, *methods: str) -> None:
    """Write the options and results that runs of a file would leave."""
    for run in plan(read_experiment(file)):
        for command in run.commands if run.method in methods else ():
            options = parse_options(command)
            for step, lr in zip(options.steps, options.lrs, strict=True):
                write_run_options(run.folder, options.as_json(), run.task.steps, step=step, lr=lr)
                results(run, {}, step)


def test_a_changed_option_of_an_existing_step_is_reported_before_any_run(
    tmp_path: Path, fails: Callable[[dict[str, object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {"FT": {"method": "FT"}, "MIB": {"method": "MIB", "from": "FT"}}
    file = write(tmp_path, seeds=[1], runs=runs)
    trained(file, "FT")
    common = {**CONTENT["common"], "lr": 0.5, "epochs": 30}
    write(tmp_path, seeds=[1], runs=runs, common=common)
    for words in ([], ["--table"], ["--dry-run"], ["--slurm"]):
        assert experiment.main([str(file), *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == (
            f"scripts.experiment: error: {tmp_path}/logs/10-5-5-shapes_FT_1: step 0 was trained with "
            "--lr 0.01, the file says --lr 0.5; change logdir or the name of the run, "
            "or restore the options\n"
        )
    # Only step 0 has other epochs.
    write(tmp_path, seeds=[1], runs=runs, common=common, step_0={"lr": 0.01, "epochs": 5})
    assert experiment.main([str(file)]) == 2
    said = capsys.readouterr()
    assert (
        "FT_1: step 1 was trained with --epochs 3, --lr 0.01, the file says --epochs 30, --lr 0.5;"
        in said.err
    )
    assert calls(tmp_path) == []

    # MIB has no steps yet and may change; so may options that do not affect learning.
    mib = {**runs["MIB"], "lr": 0.5}
    harmless = {**CONTENT["common"], "num_workers": 0, "data_root": "elsewhere", "where_to_sim": "CPU"}
    write(tmp_path, seeds=[1], runs={**runs, "MIB": mib}, common=harmless)
    assert experiment.main([str(file)]) == 0
    assert calls(tmp_path) == ["MIB_1 [1, 2] None"]


def test_a_changed_origin_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs: dict[str, Any] = {"FT": {"method": "FT"}, "other": {"method": "FT", "unce": True}}
    file = write(tmp_path, seeds=[1], runs={**runs, "MIB": {"method": "MIB", "from": "FT"}})
    trained(file, "MIB")
    assert experiment.main([str(file), "--table"]) == 0
    for begin, word in (({"from": "other"}, "other_1"), ({}, "MIB_1")):
        write(tmp_path, seeds=[1], runs={**runs, "MIB": {"method": "MIB", **begin}})
        assert experiment.main([str(file), "--table"]) == 2
        said = capsys.readouterr().err
        assert f"MIB_1: step 1 was trained from step 0 of FT_1, the file says of {word};" in said
        assert said.count("\n") == 1


def test_a_changed_class_order_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order's file has the same name; a second seed would be averaged with the first one's order."""
    order = tmp_path / "order.txt"
    common = {**CONTENT["common"], "class_order": str(order)}
    order.write_text("\n".join(map(str, range(1, 21))))
    file = write(tmp_path, seeds=[1], runs={"FT": {"method": "FT"}}, common=common)
    trained(file, "FT")
    assert experiment.main([str(file), "--table"]) == 0
    order.write_text("\n".join(map(str, range(20, 0, -1))))
    assert experiment.main([str(file), "--table"]) == 2
    said = capsys.readouterr().err
    assert "FT_1: was trained with other classes per step, or in another order" in said
    assert said.count("\n") == 1


def test_another_task_may_train_the_shared_step_0(tmp_path: Path) -> None:
    common = {"dataset": "shapes", "overlap": True}
    runs = {"FT": {"method": "FT"}}
    trained(write(tmp_path, seeds=[1], tasks=["15-5", "15-1"], common=common, runs=runs), "FT")
    file = write(tmp_path, seeds=[1], tasks=["15-1", "15-5"], common=common, runs=runs)
    assert experiment.main([str(file), "--table"]) == 0


def test_every_step_has_its_own_rate_and_flags_are_named_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(**later: Any) -> Path:
        return write(tmp_path, seeds=[1], runs={"FT": {**later, "step_0": {"lr": 0.1}}})

    trained(file(lr=[0.02, 0.003], crop_val=True), "FT")
    assert experiment.main([str(file(lr=[0.02, 0.003], crop_val=True)), "--table"]) == 0
    capsys.readouterr()
    assert experiment.main([str(file(lr=[0.02, 0.004], crop_val=True)), "--table"]) == 2
    assert experiment.main([str(file(lr=[0.02, 0.003], lr_old=0.5)), "--table"]) == 2
    rate, flag = capsys.readouterr().err.splitlines()
    assert "step 2 was trained with --lr 0.003, the file says --lr 0.004;" in rate
    assert (
        "step 0 was trained with --whole_val, no --lr_old, the file says no --whole_val, --lr_old 0.5;"
        in flag
    )


def test_steps_without_checkpoint_or_of_an_older_version_are_not_compared(tmp_path: Path) -> None:
    (run,) = planned(tmp_path, seeds=[1], runs={"FT": {}})
    other = parse_options([*run.commands[0], "--epochs", "9"])
    write_run_options(run.folder, other.as_json(), run.task.steps, step=0, lr=0.01)
    check_existing_steps([run])  # ended before its first checkpoint: it starts over
    (run.folder / f"{run.folder.name}_0.pth").touch()
    with pytest.raises(UserError, match="step 0 was trained with --epochs 9, the file says --epochs 5;"):
        check_existing_steps([run])
    facts = run.folder / "run.json"
    content = json.loads(facts.read_text())
    del content["options_by_step"]
    facts.write_text(json.dumps(content))
    check_existing_steps([run])


# ── Slurm ────────────────────────────────────────────────────────────────────────────────────────────

# Numbers jobs from 101 on and records its arguments; jobs stay in the queue until "gone" lists them.
SBATCH = """#!/usr/bin/env bash
folder=$(dirname "$0")
[ ! -e "$folder/refused" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "$*" >> "$folder/submitted"
echo "$((100 + $(wc -l < "$folder/submitted")))"
"""
SQUEUE = """#!/usr/bin/env bash
folder=$(dirname "$0")
last=$((100 + $(wc -l < "$folder/submitted")))
seq 101 "$last" | grep -vxFf "$folder/gone"
exit 0
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "$@" > "$(dirname "$0")/ran.$(ls "$(dirname "$0")" | grep -c ran)"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with stand-ins for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_ins = {"sbatch": SBATCH, "squeue": SQUEUE, "srun": SRUN, "scontrol": "#!/bin/sh\necho node1\n"}
    for name, text in stand_ins.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "gone").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def submitted(slurm: Path) -> list[str]:
    file = slurm / "submitted"
    return file.read_text().splitlines() if file.exists() else []


def test_runs_are_submitted_once_and_wait_for_each_other(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, seeds=[1], runs={"MIB": {"from": "FT"}, "FT": {}, "joint": {"task": "offline"}})
    folder = tmp_path / "logs" / "slurm"
    assert experiment.main([str(file), "--slurm"]) == 0
    assert submitted(slurm) == [
        f"--parsable {folder}/10-5-5-shapes_FT_1.slurm",
        f"--parsable {folder}/offline-shapes_joint_1.slurm",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {folder}/10-5-5-shapes_MIB_1.slurm",
    ]
    assert "MIB, 10-5-5, seed 1: submitted as job 103" in capsys.readouterr().out
    assert experiment.main([str(file), "--slurm"]) == 0
    assert len(submitted(slurm)) == 3
    assert "FT, 10-5-5, seed 1: job 101 is in the queue" in capsys.readouterr().out
    # FT ended after its step 0, joint training is done: FT and MIB are submitted again, MIB at once.
    by_method = {run.method: run for run in plan(read_experiment(file))}
    results(by_method["FT"], dict.fromkeys(range(11), 0.5), step=0)
    results(by_method["joint"], dict.fromkeys(range(21), 0.5))
    (slurm / "gone").write_text("101\n102\n103\n")
    assert experiment.main([str(file), "--slurm"]) == 0
    assert submitted(slurm)[3:] == [
        f"--parsable {folder}/10-5-5-shapes_FT_1.slurm",
        f"--parsable {folder}/10-5-5-shapes_MIB_1.slurm",
    ]


def test_the_report_of_existing_results_is_written_after_submitting(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report shows finished and started runs; there is none without started runs."""
    file = write(tmp_path, seeds=[1], runs={method: {"method": method} for method in ("EWC", "FT", "MIB")})
    page = tmp_path / "logs" / "report" / "report.html"
    assert experiment.main([str(file), "--slurm"]) == 0
    assert not page.exists()
    (slurm / "gone").write_text("101\n102\n103\n")
    done, begun, waiting = plan(read_experiment(file))
    for run, steps in ((done, (0, 1, 2)), (begun, (0,))):
        for step in steps:
            results(run, dict.fromkeys(run.task.seen_classes(step), 0.5), step)
            options = parse_options(run.commands[min(step, 1)])
            write_run_options(run.folder, options.as_json(), run.task.steps, step=step, lr=0.01)
    capsys.readouterr()
    assert experiment.main([str(file), "--slurm"]) == 0
    shown = page.read_text(encoding="utf-8")
    assert [run.folder.name in shown for run in (done, begun, waiting)] == [True, True, False]
    assert [Path(line).stem for line in submitted(slurm)[3:]] == [begun.folder.name, waiting.folder.name]
    assert f"report: {page}" in capsys.readouterr().out
    # All done: nothing is submitted, but the report is written.
    page.unlink()
    for run in (begun, waiting):
        results(run, dict.fromkeys(run.task.order, 0.5))
    assert experiment.main([str(file), "--slurm"]) == 0
    assert page.is_file() and len(submitted(slurm)) == 5


def test_entries_without_effect_with_slurm_are_reported(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, told in (({"processes": 2}, 1), ({"gpus": [0]}, 1), ({}, 0)):
        file = write(tmp_path, seeds=[1], runs={"FT": {}}, **changes)
        assert experiment.main([str(file), "--slurm", "--dry-run"]) == 0
        said = capsys.readouterr().err
        assert said.count("gpus and processes have no effect with Slurm") == said.count("\n") == told
        assert experiment.main([str(file), "--local", "--dry-run"]) == 0
        assert capsys.readouterr().err == ""


def test_a_job_script_runs_the_commands_of_its_run(tmp_path: Path, slurm: Path) -> None:
    file = write(tmp_path, seeds=[1], runs={"FT": {}})
    with file.open("a") as text:
        text.write("slurm: {partition: gpu, time: 4:00:00, requeue: false, exclusive: true}\n")
    assert experiment.main([str(file)]) == 0
    script = tmp_path / "logs" / "slurm" / "10-5-5-shapes_FT_1.slurm"
    header = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --time=4:00:00" in header and "#SBATCH --exclusive" in header
    assert "#SBATCH --signal=USR1@180" in header and "#SBATCH --requeue" not in header
    job = {"SLURM_JOB_ID": "101", "SLURM_NTASKS": "2"}
    subprocess.run(["bash", str(script)], cwd=tmp_path, env={**os.environ, **job}, check=True)
    (run,) = plan(read_experiment(file))
    ran = [(slurm / f"ran.{i}").read_text().splitlines() for i in range(2)]
    for words, command in zip(ran, run.commands, strict=True):
        assert words[0] == str(Path.cwd())
        assert words[-len(command) :] == command


def test_local_overrides_the_file(tmp_path: Path, slurm: Path, fails: object) -> None:
    file = write(tmp_path, seeds=[1], runs={"FT": {}}, slurm={"partition": "gpu"})
    assert experiment.main([str(file), "--local"]) == 0
    assert submitted(slurm) == []


def test_a_refused_job_and_a_missing_slurm_are_one_line(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, seeds=[1])
    (slurm / "refused").touch()
    assert experiment.main([str(file), "--slurm"]) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert experiment.main([str(file), "--slurm"]) == 2
    refused, missing = capsys.readouterr().err.splitlines()
    assert "sbatch: error: invalid partition" in refused
    assert "sbatch: not found; submit on a machine with Slurm, or give --local" in missing
    (tmp_path / "logs" / "slurm" / "jobs.json").write_text("[]")
    assert experiment.main([str(file), "--slurm"]) == 2
    assert "jobs.json: is not a valid job list" in capsys.readouterr().err


# ── the table ────────────────────────────────────────────────────────────────────────────────────────


def results(run: Run, iou: dict[int, float | None], step: int | None = None) -> None:
    """Write the results of a run's step (default: the last): IoU by dataset class id."""
    step = run.task.num_steps - 1 if step is None else step
    run.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "step": step,
        "class_iou": {f"class {c}": value for c, value in iou.items()},
        "indices": {f"class {c}": run.task.order.index(c) for c in iou},
        # Over the classes of this step only; the table must not take it.
        "miou_new": 0.99,
    }
    (run.folder / f"results_{step}.json").write_text(json.dumps(content))


def test_the_table_shows_means_and_spread(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    for run, miou in zip([run for run in runs if run.method == "FT"], (0.5, 0.6), strict=True):
        results(run, {c: miou if c <= 10 else None for c in range(21)})
    text = experiment.table(runs)
    assert "shapes 10-5-5" in text
    assert "first: classes of step 0 with background, later: of steps 1 to 2" in text
    row = next(line for line in text.splitlines() if line.startswith("FT"))
    assert row.split("  ")[-1].strip() == "2"
    assert row.count("55.0 ± 7.1") == 2 and "–" in row
    assert next(line for line in text.splitlines() if line.startswith("MIB")).endswith("0")


def test_a_run_with_another_class_order_is_split_by_its_own(tmp_path: Path) -> None:
    run = next(run for run in planned(tmp_path) if run.method == "FT")
    order = (0, *range(20, 0, -1))
    steps = tuple(tuple(order[c] for c in step) for step in run.task.steps)
    shuffled = replace(run, task=replace(run.task, steps=steps))
    results(shuffled, {c: 0.8 if c in shuffled.task.steps[0] else 0.2 for c in shuffled.task.order})
    assert experiment.scores(shuffled, run.task)[:2] == pytest.approx([0.8, 0.2])


def test_new_are_the_classes_of_all_later_steps_as_in_the_report(tmp_path: Path) -> None:
    joint, run = planned(tmp_path, seeds=[1], runs={"joint": {"task": "offline"}, "FT": {"method": "FT"}})
    # Background 1, classes 1 to 10 0.5, 11 to 15 0.25 (step 1), 16 to 20 0 (step 2).
    iou = {c: 1.0 if c == 0 else 0.5 if c <= 10 else 0.25 if c <= 15 else 0.0 for c in range(21)}
    for one in (joint, run):
        results(one, iou)
        words = [word for command in one.commands for word in command]
        write_run_options(one.folder, parse_options(words).as_json(), one.task.steps)
        assert experiment.scores(one, run.task) == pytest.approx([6 / 11, 0.125, (6 + 1.25) / 21])
    (group,) = arrange([read_run(one.folder) for one in (run, joint)])
    for one in (run, joint):
        means = list(group.means(read_run(one.folder)).values())
        assert means == pytest.approx(experiment.scores(one, run.task))
    assert experiment.scores(joint, joint.task) == [None, None, pytest.approx((6 + 1.25) / 21)]


def test_joint_training_is_averaged_over_each_tasks_classes(tmp_path: Path) -> None:
    common = {name: value for name, value in CONTENT["common"].items() if name != "task"}
    runs = planned(
        tmp_path, tasks=["10-10", "15-5"], common=common, seeds=[1], runs={"joint": {"task": "offline"}}
    )
    (joint,) = runs
    # Background 1, classes 1 to 10 0.5, 11 to 15 0.25 (class 11 has no IoU), 16 to 20 0.
    iou = {c: 1.0 if c == 0 else 0.5 if c <= 10 else 0.25 if c <= 15 else 0.0 for c in range(21)}
    results(joint, {**iou, 11: None})
    first, later, everything = experiment.scores(joint, joint.compared_in[0])
    assert (first, later) == (pytest.approx(6 / 11), pytest.approx(1 / 9))
    assert everything == pytest.approx(7 / 20)
    assert experiment.scores(joint, joint.compared_in[1])[:2] == [pytest.approx(7 / 15), 0.0]
    assert experiment.table(runs).count("joint") == 2


def test_ades_other_is_in_no_mean(tmp_path: Path) -> None:
    common = {"dataset": "ade", "task": "100-50"}
    (joint,) = planned(tmp_path, common=common, seeds=[1], runs={"joint": {"task": "offline"}})
    results(joint, {c: 0.2 if c <= 100 else 0.1 for c in range(1, 151)})
    assert experiment.scores(joint, joint.compared_in[0]) == [
        *(pytest.approx(0.2), pytest.approx(0.1)),
        pytest.approx(25 / 150),
    ]


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────


def test_real_runs_end_with_table_and_report(tiny_data: Path, tmp_path: Path, interpreter: Path) -> None:
    common = {
        **{"dataset": "shapes", "data_root": str(tiny_data), "task": "10-10", "overlap": True, "lr": 0.01},
        **{"backbone": SMALL_BACKBONE, "no_pretrained": True, "crop_size": 64, "epochs": 1, "batch_size": 4},
    }
    file = write(tmp_path, common=common, seeds=[1], step_0=None, processes=2)
    done = subprocess.run(
        [interpreter, "-m", "scripts.experiment", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for method in ("FT", "MIB", "joint"):
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"{method} "))
        assert row.endswith("1") and "–" not in row
    log = (tmp_path / "logs" / "10-10-shapes_MIB_1" / "train.log").read_text(encoding="utf-8")
    assert "step 0" not in log or "step 0 epoch" not in log
    (page,) = (tmp_path / "logs" / "report").glob("*.html")
    assert "MIB" in page.read_text(encoding="utf-8")
    # The commands are compared with the options that the real runs recorded.
    check_existing_steps(plan(read_experiment(file)))
    write(tmp_path, common={**common, "epochs": 2}, seeds=[1], step_0={"epochs": 1}, processes=2)
    with pytest.raises(
        UserError, match="FT_1: step 1 was trained with --epochs 1, the file says --epochs 2;"
    ):
        check_existing_steps(plan(read_experiment(file)))


def test_a_wrong_experiment_raises_from_the_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no step 0 of its own"):
        planned(tmp_path, runs={"A": {"from": "B"}, "B": {"from": "A"}})
