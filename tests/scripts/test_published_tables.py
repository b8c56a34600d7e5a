"""The reproduction kit: experiment files of published tables, against the tables and against the scripts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from forked import BOUND, SMALL_BACKBONE

from argparser import Options, parse_options
from report.groups import arrange
from report.published import of_method
from report.reading import read_run
from runs.options import deciding, write_run_options
from scripts import experiment
from scripts.experiment_plan import Run, plan, read_experiment

ROOT = Path(__file__).resolve().parents[2]
KIT = sorted((ROOT / "scripts" / "published").glob("*.yaml"))
# What the scripts leave to the user, and what the kit has as the published programs.
_LEFT_OPEN = {"norm_act", "fidelity", "data_root", "random_seed", "step", "lr", "task"}
# Files with no published number for their backbone: their runs are new numbers.
_NO_ROWS = {
    "sdr_voc_sequential": {"LWF", "LWF-MC", "ILT", "MIB"},
    "star_ade_overlapped": {"STAR-M"},
}
_NOT_IN_THE_TABLE = {"dft_ade_overlapped", "sats_ade_overlapped"}


def write_options(run: Run, options: Options) -> Path:
    write_run_options(run.folder, options.as_json(), run.task.steps)
    return run.folder


def planned(file: Path) -> list[Run]:
    return plan(read_experiment(file, given=["data_root=data"]))


def published_cells(file: Path) -> dict[tuple[str, str], int]:
    """Number of published rows that the report finds for each method and task of a file."""
    found = {}
    for run in planned(file):
        if run.task.num_steps > 1:
            options = parse_options(run.commands[-1])
            written = read_run(write_options(run, options))
            (group,) = arrange([written])
            found[run.method, run.task.name] = len(of_method(group, group.methods[0]))
    return found


@pytest.mark.parametrize("file", KIT, ids=lambda file: file.stem)
def test_a_table_is_of_published_numbers(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run parses, and the report finds published numbers for the table's methods."""
    monkeypatch.chdir(tmp_path)
    protocol = file.stem.rpartition("_")[2]
    for run in planned(file):
        assert all(parse_options(words).protocol == protocol for words in run.commands)
    cells = published_cells(file)
    methods = {method for method, _ in cells if method != "FT"}
    without = {m for m in methods if not any(rows for (name, _), rows in cells.items() if name == m)}
    if file.stem in _NOT_IN_THE_TABLE:
        assert without == methods
    else:
        assert not without - _NO_ROWS.get(file.stem, set())
    text = file.read_text(encoding="utf-8")
    assert f"scripts/published/{file.name}" in text and f"logs/published/{file.stem}" in text


@cache
def total_batches(file: Path, gpus: int) -> list[int]:
    runs = plan(read_experiment(file, gpus=range(gpus)))
    return [gpus * parse_options(words).batch_size for run in runs for words in run.commands]


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("file", KIT, ids=lambda file: file.stem)
def test_the_total_batch_is_that_of_2_and_4_gpus(file: Path, gpus: int) -> None:
    assert total_batches(file, gpus) == total_batches(file, 1)


def of_script(script: Path, *arguments: str) -> list[Options]:
    """Options of the commands of a script, whose torchrun is a stand-in that prints them."""
    stand_in = "torchrun() { shift 2; printf '%q ' \"${@:2}\"; echo; }; export -f torchrun; "
    command = stand_in + shlex.join(["bash", str(script), *arguments])
    environment = {**os.environ, "GPUS": "2", "DATA": "data"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=BOUND
    )
    assert done.returncode == 0, done.stderr
    return [parse_options(shlex.split(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_the_newer_methods_have_the_settings_of_the_scripts(dataset: str) -> None:
    compared = 0
    for file in KIT:
        if f"_{dataset}_" not in file.stem or file.stem.split("_")[0] in ("sdr", "plop", "ssul", "sats"):
            continue
        if file.stem.endswith("disjoint"):  # the same but for the protocol
            continue
        for run in planned(file):
            if run.method == "FT":
                continue
            task = {"15-5s": "15-1", "50": "50-50"}.get(run.task.name, run.task.name)
            theirs = of_script(ROOT / "scripts" / dataset / "newer.sh", run.method, task)
            for words, their in zip(run.commands, theirs[-len(run.commands) :], strict=True):
                own = parse_options(words)
                assert (own.steps, own.lrs) == (their.steps, their.lrs), (file.stem, run.method)
                mine, other = deciding(own.as_json()), deciding(their.as_json())
                differing = {name for name in mine if mine[name] != other.get(name)}
                # --fidelity released implies options of the programs; those that are typed must agree.
                typed = {name for name in differing if name in own.typed or name in their.typed}
                assert typed <= _LEFT_OPEN, (file.stem, run.method, typed)
                compared += 1
    assert compared >= 30


def test_a_table_in_small_form(
    tiny_data: Path, tmp_path: Path, interpreter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the kit on generated data, with a smaller network, to table and report."""
    monkeypatch.setattr(sys, "executable", str(interpreter))  # which starts the runs
    given = [
        f"data_root={tiny_data}",
        *("dataset=shapes", "epochs=1", "total_batch=4", "crop_size=32", f"backbone={SMALL_BACKBONE}"),
        *("norm_act=std", "no_pretrained", "opt_level=O0", "fidelity=paper", "lr=0.01"),
    ]
    text = (ROOT / "scripts/published/lgkd_voc_overlapped.yaml").read_text(encoding="utf-8")
    text = text.replace("logs/published/lgkd_voc_overlapped", str(tmp_path / "logs"))
    file = tmp_path / "table.yaml"
    file.write_text(text.replace("gpus: [0, 1]\n", ""), encoding="utf-8")
    file.write_text(file.read_text().replace("15-5, 15-1]", "15-5]"), encoding="utf-8")
    assert experiment.main([str(file), "--set", *given, "spp_scales=[1, 2]"]) == 0
    for task in ("19-1", "15-5"):
        results = tmp_path / "logs" / f"{task}-shapes_LGKD_42" / "results_1.json"
        assert json.loads(results.read_text())["step"] == 1
    assert (tmp_path / "logs" / "report" / "report.html").is_file()
