"""A few of the campaign's kills: the resumed run ends with the unbroken one's bits."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from faults import (
    BOUND,
    TINY,
    Fork,
    completed,
    differences,
    left_by,
    running,
    saves_now,
)

from runs.checkpoint import load_checkpoint
from session.state import StepState

SCORES = (30.0, 60.0, 20.0)  # added to each epoch's validation mIoU, which decides nothing then


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
    assert "step 1 resumes at epoch" in last.output()
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


def script_validation() -> None:
    """Let the second epoch be the best, and validation kill the process in the epoch that KILL_IN names."""
    add_score = StepState.add_score

    def scripted(self: StepState, score: float) -> None:
        if os.environ.get("KILL_IN") == str(self.progress.epoch):
            os.kill(os.getpid(), signal.SIGKILL)
        add_score(self, score + SCORES[self.progress.epoch])

    StepState.add_score = scripted  # type: ignore[method-assign]


class Scripted(Fork):
    prepare = script_validation


def test_the_best_epoch_is_kept_through_kills(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the validation of the best epoch, and between the last save and the choice."""

    def killed_in(epoch: int, arguments: list[object]) -> str:
        monkeypatch.setenv("KILL_IN", str(epoch))
        with running(arguments, tmp_path / "out", start=Scripted) as run:
            assert run.wait() == [-9]
        monkeypatch.delenv("KILL_IN")
        return run.output()

    def saved(name: str) -> dict[str, Any]:
        return load_checkpoint(folder_of(tmp_path, name) / f"15-5-shapes_{name}_0.pth")

    def words(name: str, *more: object) -> list[object]:
        return [*command(tiny_data, tmp_path, name, "SDR", "--epochs", "3", *more)]

    killed_in(1, words("last"))
    second_epoch = saved("last")  # --keep last, killed when two of the three epochs are trained
    best = words("best", "--keep", "best")
    killed_in(1, best)
    assert "step 0 resumes at epoch 2 of 3" in killed_in(2, best)
    unfinished = saved("best")
    assert unfinished["epoch"] == 2 and unfinished["best"]["epoch"] == 1
    ended = completed([*best, "--step", "0"], tmp_path / "out", start=Scripted).output()
    assert "step 0 keeps the weights of epoch 2" in ended and "step 0 epoch 3/3" not in ended
    kept = saved("best")
    assert kept["kept_epoch"] == 1 and "best" not in kept
    for part in ("model_state", "method_state"):
        assert differences(second_epoch[part], kept[part]) == []
        assert differences(unfinished[part], kept[part]) != [], (
            "the last epoch has the same: the case is empty"
        )


def test_the_best_epoch_is_kept_by_two_processes(tiny_data: Path, tmp_path: Path) -> None:
    """Every second epoch and the last are validated: the best of these is evaluated and saved."""
    words = command(
        tiny_data, tmp_path, "two", "FT", "--epochs", "3", "--keep", "best", "--val_interval", "2"
    )
    output = completed([*words, "--step", "0"], tmp_path / "out", 2, start=Scripted).output()
    run_dir = folder_of(tmp_path, "two")
    content = load_checkpoint(run_dir / "15-5-shapes_two_0.pth")
    assert content["kept_epoch"] == 1
    assert re.findall(r"step 0 epoch (\d): validation", output) == ["2", "3"]
    results = json.loads((run_dir / "results_0.json").read_text(encoding="utf-8"))
    assert results["miou_all"] == pytest.approx(content["best_score"] - SCORES[1])
