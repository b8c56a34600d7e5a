"""What can go wrong around a run: each with its exit code, its message and its bound in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import BOUND, ROOT, TINY, Run, completed, running
from test_stops import children

from runs.checkpoint import load_checkpoint


def command(data: Path, logs: Path, *more: object) -> list[object]:
    return [
        *(*TINY, "--ckpt_minutes", "0.001", "--data_root", data, "--logdir", logs, "--name", "run"),
        *("--epochs", "2", "--step", "0", *more),
    ]


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """Data that a test may spoil."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    return root


def run_dir(logs: Path) -> Path:
    return logs / "15-5-shapes_run"


def saved_batch(logs: Path) -> int:
    """Batches in the checkpoint, which must be whole; -1 if there is none."""
    path = run_dir(logs) / "15-5-shapes_run_0.pth"
    if not path.exists():
        return -1
    content = load_checkpoint(path)
    return content["epoch"] * content["batches_per_epoch"] + content["batch"]


def errors(run: Run) -> list[str]:
    """The lines of all processes that tell what went wrong; there is never a traceback."""
    text = "".join(run.output(rank) for rank in range(len(run.processes)))
    assert "Traceback" not in text, text[-3000:]
    return [line for line in text.splitlines() if line.startswith(("run.py: error:", "run.py: fault:"))]


def test_a_second_run_in_the_same_folder_is_told_and_ends(tiny_data: Path, tmp_path: Path) -> None:
    with (
        running(command(tiny_data, tmp_path), tmp_path / "a") as one,
        running(command(tiny_data, tmp_path), tmp_path / "b") as other,
    ):
        codes = [one.wait()[0], other.wait()[0]]
        assert sorted(codes) == [0, 2]
        winner, loser = (one, other) if codes[0] == 0 else (other, one)
        (line,) = errors(loser)
        assert f"another run uses this folder (process {winner.processes[0].pid} on" in line
    assert saved_batch(tmp_path) > 0
    assert (run_dir(tmp_path) / "results_0.json").is_file()
    # What the loser would have logged is not mixed into the winner's log.
    assert (run_dir(tmp_path) / "train.log").read_text().count("options: ") == 1


def test_full_disk_ends_both_processes_and_keeps_the_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    with running(command(tiny_data, tmp_path), tmp_path / "out") as run:
        run.wait_until((run_dir(tmp_path) / "15-5-shapes_run_0.json").exists)
        run.kill()
    before = saved_batch(tmp_path)
    assert before > 0
    # A limit on the size of files stops a write in the middle as a full disk does.
    arguments = [str(word) for word in command(tiny_data, tmp_path)]
    limited = ["bash", "-c", 'ulimit -f 4000; exec "$0" run.py "$@"', sys.executable, *arguments]
    done = subprocess.run(
        limited,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written (File too large); free some space or choose another --logdir" in done.stderr
    assert saved_batch(tmp_path) == before
    assert not list(run_dir(tmp_path).glob(".*.tmp"))


def test_folder_that_cannot_be_written(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with running(command(tiny_data, tmp_path / "logs"), tmp_path / "out", 2) as run:
        assert run.wait(BOUND) == [2, 2]
        (line,) = errors(run)
        assert "cannot be written" in line
        assert line.endswith("choose another --logdir")


@pytest.mark.parametrize("fault", ["corrupt", "missing"])
def test_image_lost_in_the_middle_of_an_epoch(own_data: Path, tmp_path: Path, fault: str) -> None:
    logs = tmp_path / "logs"
    with running(command(own_data, logs), tmp_path / "out", 2) as run:
        run.wait_until((run_dir(logs) / "15-5-shapes_run_0.json").exists)
        for path in (own_data / "JPEGImages").iterdir():
            if fault == "missing":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:100])
        codes = run.wait(BOUND)
        assert 2 in codes and set(codes) <= {1, 2}
        text = "\n".join(errors(run))
        assert ("the image is missing" if fault == "missing" else "truncated or corrupt") in text
    assert saved_batch(logs) > 0


def test_skip_corrupt_passes_over_images_lists_them_and_has_a_limit(own_data: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    spoilt = sorted((own_data / "JPEGImages").iterdir())[3:6]
    for path in spoilt:
        path.write_bytes(b"\xff\xd8\xff no picture")
    run = completed(command(own_data, logs, "--skip_corrupt", "3"), tmp_path / "out", 2)
    lines = [line for line in run.output().splitlines() if "unreadable images were skipped" in line]
    assert len(lines) == 1
    assert [path.name for path in spoilt if path.name in lines[0]] == [path.name for path in spoilt]
    with running(command(own_data, logs, "--skip_corrupt", "2", "--fresh"), tmp_path / "out") as run:
        assert run.wait(BOUND) == [2]
        (line,) = errors(run)
        assert "one more than the 2 of --skip_corrupt" in line


def test_killed_loader_process(tiny_data: Path, tmp_path: Path) -> None:
    words = command(tiny_data, tmp_path)
    with running(words, tmp_path / "out") as run:
        run.wait_for("step 0 epoch 1/2: 2/")
        for pid in children(run.processes[0].pid):
            os.kill(pid, signal.SIGKILL)
        assert run.wait(BOUND) == [1]
        (line,) = errors(run)
        assert "a loader process was lost" in line
    assert saved_batch(tmp_path) > 0


def test_slow_process_is_an_error_after_the_timeout(tiny_data: Path, tmp_path: Path) -> None:
    with running(command(tiny_data, tmp_path, "--timeout", "8"), tmp_path / "out", 2) as run:
        run.wait_until((run_dir(tmp_path) / "15-5-shapes_run_0.json").exists)
        run.processes[1].send_signal(signal.SIGSTOP)
        run.wait_until(lambda: run.processes[0].poll() is not None)
        assert run.processes[0].poll() == 1
        run.processes[1].send_signal(signal.SIGCONT)
        assert run.wait(BOUND) == [1, 1]
        lines = errors(run)
        assert [line.split(":")[2].strip() for line in lines] == ["rank 0", "rank 1"]
        assert all("did not answer within --timeout seconds" in line for line in lines)
    assert saved_batch(tmp_path) > 0


def test_other_options_are_told(tiny_data: Path, tmp_path: Path) -> None:
    completed(command(tiny_data, tmp_path), tmp_path / "out")
    for other, words in (
        (["--momentum", "0.5"], ["--momentum 0.9, now 0.5", "--fresh"]),
        (["--lr", "0.02"], ["--lr 0.01, now 0.02"]),
        (["--batch_size", "8"], ["total batch 4, now 8"]),
        (["--model", "mlp"], ["--model deeplab, not mlp"]),
    ):
        with running([*command(tiny_data, tmp_path), *other], tmp_path / "out") as run:
            assert run.wait(BOUND) == [2]
            (line,) = errors(run)
            for word in words:
                assert word in line
    # Where results are shown and saved is another matter.
    again = completed([*command(tiny_data, tmp_path), "--val_interval", "2"], tmp_path / "out")
    assert "step 0 is done" in again.output()
