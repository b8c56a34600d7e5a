"""A few of the campaign's kills: the resumed run ends with the unbroken one's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import BOUND, TINY, completed, differences, left_by, running, saves_now

from utils.checkpoint import load_checkpoint


def command(data: Path, logs: Path, name: str, method: str, *more: object) -> list[object]:
    return [
        *(*TINY, "--data_root", data, "--logdir", logs, "--name", name),
        *("--method", method, "--step", "0", "1", *more),
    ]


def folder_of(logs: Path, name: str) -> Path:
    return logs / f"15-5-shapes_{name}"


def assert_whole(run_dir: Path) -> None:
    for path in run_dir.glob("*.pth"):
        load_checkpoint(path)


def test_killed_in_a_save_in_a_batch_and_in_an_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    two_epochs = ("--epochs", "2")
    completed(command(tiny_data, tmp_path, "whole", "FT", *two_epochs), tmp_path / "whole")
    broken = command(tiny_data, tmp_path, "broken", "FT", *two_epochs)
    run_dir = folder_of(tmp_path, "broken")
    with running(broken, tmp_path / "out") as run:
        run.wait_for("step 0 epoch 1/2: 2/")
        run.wait_until(lambda: saves_now(run_dir))
        run.kill()
    assert_whole(run_dir)
    with running(broken, tmp_path / "out") as run:
        run.wait_for(r"(?s)step 0 epoch 2/2: [^\n]*images/s.*evaluation: ")
        run.kill()
    assert_whole(run_dir)
    with running(broken, tmp_path / "out") as run:
        run.wait_for("step 1 epoch 1/2: 2/")
        # Trained already: evaluated, unless even the results were written, but not trained again.
        assert "step 0 epoch" not in run.output()
        run.wait_until((run_dir / "15-5-shapes_broken_1.json").exists)
        run.kill()
    assert_whole(run_dir)
    last = completed(broken, tmp_path / "out")
    assert "step 0 is done" in last.output()
    assert "step 1 goes on at epoch" in last.output()
    assert differences(left_by(folder_of(tmp_path, "whole")), left_by(run_dir)) == []


def test_one_of_two_processes_killed(tiny_data: Path, tmp_path: Path) -> None:
    more = ("--epochs", "1", "--deterministic")
    completed(command(tiny_data, tmp_path, "whole", "SDR", *more), tmp_path / "whole", 2)
    broken = command(tiny_data, tmp_path, "broken", "SDR", *more)
    run_dir = folder_of(tmp_path, "broken")
    with running(broken, tmp_path / "out", 2) as run:
        run.wait_for("step 1 epoch 1/1: 1/")
        run.kill([1])
        codes = run.wait(BOUND)
        assert codes == [1, -9]
        assert "run.py: fault: rank 0: another process ended" in run.output()
        assert "Traceback" not in run.output()
    assert_whole(run_dir)
    completed(broken, tmp_path / "out", 2)
    assert differences(left_by(folder_of(tmp_path, "whole")), left_by(run_dir)) == []


@pytest.mark.parametrize(
    ("method", "more"), [("RW", ("--reg_iterations", "2")), ("SSUL-M", ("--memory", "6"))]
)
def test_state_of_methods_survives(
    tiny_data: Path, tmp_path: Path, method: str, more: tuple[str, ...]
) -> None:
    more = ("--epochs", "1", *more)
    completed(command(tiny_data, tmp_path, "whole", method, *more), tmp_path / "whole")
    broken = command(tiny_data, tmp_path, "broken", method, *more)
    with running(broken, tmp_path / "out") as run:
        run.wait_for("step 1 epoch 1/1: 2/")
        run.kill()
    completed(broken, tmp_path / "out")
    assert differences(left_by(folder_of(tmp_path, "whole")), left_by(folder_of(tmp_path, "broken"))) == []
