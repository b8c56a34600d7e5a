"""History of a step: written, truncated, resumed and read."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from runs.files import HISTORY, step_file
from runs.history import (
    HistoryWriter,
    peak_memory,
    read_history,
)

CPU = torch.device("cpu")


def losses(folder: Path, step: int = 0) -> list[tuple[int, float]]:
    return [(r.iteration, r.losses["ce"]) for r in read_history(step_file(folder, HISTORY, step)).entries]


def write(folder: Path, iterations: range, loss: float, begin: int = 0) -> HistoryWriter:
    history = HistoryWriter(folder, 0, iteration=begin, images=8)
    for iteration in iterations:
        history.progress(iteration, 1, {"ce": loss}, lr=0.1)
    return history


def test_written_entries_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 4.0, 5.0])
    monkeypatch.setattr("runs.history.time.perf_counter", lambda: next(clock))
    history = HistoryWriter(tmp_path / "run", 2, images=8, device=CPU)
    first = history.progress(10, 1, {"ce": 2.0, "kd": 0.5}, lr=0.1)
    history.validation(1, 0.25)
    history.validation(1, float("nan"))
    found = read_history(step_file(tmp_path / "run", HISTORY, 2))
    assert found.entries == [first]
    assert first.losses == {"ce": 2.0, "kd": 0.5} and first.lr == 0.1 and first.epoch == 1
    assert (first.seconds, first.images_per_second) == (4.0, 80 / 4)
    (validation,) = found.validations
    assert (validation.iteration, validation.epoch, validation.miou) == (10, 1, 0.25)
    assert found.seconds == validation.seconds == 5.0


def test_lap_leaves_an_evaluation_out_of_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 110.0, 120.0])
    monkeypatch.setattr("runs.history.time.perf_counter", lambda: next(clock))
    history = HistoryWriter(tmp_path, 0, images=4)
    assert history.progress(5, 1, {}, 0.1).images_per_second == 2.0
    history.lap()
    second = history.progress(10, 2, {}, 0.1)
    assert (second.images_per_second, second.seconds) == (2.0, 120.0)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    history = HistoryWriter(tmp_path / "run", 0, enabled=False)
    assert history.progress(1, 1, {"ce": 1.0}, 0.1).losses == {"ce": 1.0}
    history.validation(1, 0.5)
    assert not (tmp_path / "run").exists()


def test_a_resumed_step_replaces_later_entries(tmp_path: Path) -> None:
    history = write(tmp_path, range(10, 60, 10), 1.0)
    history.validation(1, 0.9)
    before = read_history(step_file(tmp_path, HISTORY, 0)).entries[1].seconds
    write(tmp_path, range(35, 50, 10), 2.0, begin=20)
    assert losses(tmp_path) == [(10, 1.0), (20, 1.0), (35, 2.0), (45, 2.0)]
    history = read_history(step_file(tmp_path, HISTORY, 0))
    assert history.validations == []
    assert history.entries[2].seconds > before


def test_a_step_started_over_has_a_new_history(tmp_path: Path) -> None:
    write(tmp_path, range(10, 60, 10), 1.0)
    write(tmp_path, range(10, 20, 10), 2.0)
    assert losses(tmp_path) == [(10, 2.0)]


def test_the_later_line_of_an_iteration_counts(tmp_path: Path) -> None:
    history = write(tmp_path, range(10, 30, 10), 1.0)
    history.progress(20, 1, {"ce": 3.0}, 0.1)
    assert losses(tmp_path) == [(10, 1.0), (20, 3.0)]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_truncated_last_line_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(10, 40, 10), 1.0)
    path = step_file(tmp_path, HISTORY, 0)
    path.write_bytes(path.read_bytes()[:-cut])
    expected = [(10, 1.0), (20, 1.0), (30, 1.0)][: 3 if cut == 1 else 2]  # cut=1 loses the newline alone
    assert losses(tmp_path) == expected
    write(tmp_path, range(40, 50, 10), 2.0, begin=30)
    assert losses(tmp_path) == [*expected, (40, 2.0)]


def test_unknown_lines_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, range(10, 20, 10), 1.0)
    path = step_file(tmp_path, HISTORY, 0)
    path.write_text('[1]\n{"iteration": 3}\n7\n{"begin": "x"}\n' + path.read_text() + "\x00\n")
    assert losses(tmp_path) == [(10, 1.0)]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 5 lines cannot be read (the first: 1) and are left out"
    ]
    assert read_history(tmp_path / "missing.jsonl").entries == []


LIMITED = """
import logging, resource, sys
from pathlib import Path
logging.basicConfig(format="%(message)s")
from runs.history import HistoryWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
history = HistoryWriter(Path(sys.argv[1]), 0)
for iteration in range(100):
    history.progress(iteration, 1, {"ce": 1.0}, 0.1)
print("done", iteration)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_reported_once_and_the_run_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "done 99"
    assert outcome.stderr.count("cannot be written") == 1
    assert "Traceback" not in outcome.stderr
    assert 1 <= len(losses(tmp_path)) < 10


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    history = HistoryWriter(tmp_path / "file" / "run", 0)
    history.progress(1, 1, {}, 0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(CPU)
    assert before is not None
    held = torch.ones(64 * 2**20, dtype=torch.uint8).clone()
    after = peak_memory(CPU)
    assert after is not None and after >= before and after > held.numel() / 2**20


def test_entries_are_json(tmp_path: Path) -> None:
    history = HistoryWriter(tmp_path, 0)
    entry = history.progress(1, 1, {"ce": 1.5}, 0.1)
    begin, line = step_file(tmp_path, HISTORY, 0).read_text().splitlines()
    assert json.loads(begin) == {"begin": 0}
    assert json.loads(line) == asdict(entry)
