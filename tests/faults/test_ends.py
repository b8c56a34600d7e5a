"""Every kind of end with 0, 1 and 2 loader processes: the exit code, one line, and no process that stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from faults import (
    BOUND,
    TINY,
    Fork,
    Run,
    Start,
    completed,
    living_in_group,
    running,
    start_command,
    start_words,
)
from test_stops import children

import run as program
from argparser import parse_options
from utils.command import run_command

WORKERS = (0, 1, 2)


def command(data: Path, logs: Path, *more: object) -> list[object]:
    return [*TINY, "--data_root", data, "--logdir", logs, "--step", "0", "--epochs", "1", *more]


@contextlib.contextmanager
def with_each_number(
    arguments: Sequence[object], folder: Path, numbers: Sequence[int] = WORKERS, start: Start = Fork
) -> Iterator[list[Run]]:
    """The command with so many loader processes, at the same time, each a run of its own."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running([*arguments, "--num_workers", n, "--name", f"w{n}"], folder / f"w{n}", 1, start)
            )
            for n in numbers
        ]


def assert_ends(run: Run, code: int) -> list[str]:
    """The lines in which the program tells why, after an end without a traceback and without a survivor."""
    codes = run.wait()
    left = [pid for process in run.processes for pid in living_in_group(process.pid)]
    assert codes == [code] * len(codes), run.output()[-3000:]
    assert left == []
    assert "Traceback" not in run.output(), run.output()[-3000:]
    return [line for line in run.output().splitlines() if line.startswith("run.py: ")]


def test_the_default_is_a_loader_process() -> None:
    assert parse_options([*TINY]).num_workers == 1


def test_training_testing_and_predicting_end(tiny_data: Path, tmp_path: Path) -> None:
    common, logs = command(tiny_data, tmp_path), tmp_path / "out"
    with with_each_number(common, logs) as runs:
        assert [assert_ends(run, 0) for run in runs] == [[], [], []]
    with with_each_number([*common, "--test"], logs) as runs:
        assert [assert_ends(run, 0) for run in runs] == [[], [], []]
    ckpt = tmp_path / "15-5-shapes_w1" / "15-5-shapes_w1_0.pth"
    pictures = tiny_data / "JPEGImages"
    with with_each_number(["--predict", pictures, "--ckpt", ckpt, "--out", tmp_path / "seen"], logs) as runs:
        assert [assert_ends(run, 0) for run in runs] == [[], [], []]


def test_torchrun_itself_ends(tiny_data: Path, tmp_path: Path) -> None:
    """Without a forked Python; tests/cli/test_commands.py has the command itself, with its defaults."""

    def under_torchrun(words: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return start_words([*launcher, "run.py", *words], environment, output)

    with running(command(tiny_data, tmp_path), tmp_path / "out", 1, under_torchrun) as run:
        assert assert_ends(run, 0) == []
        assert "2 processes (gloo)" in run.output()


def test_two_processes_with_two_loaders_each_end(tiny_data: Path, tmp_path: Path) -> None:
    with running([*command(tiny_data, tmp_path), "--num_workers", "2"], tmp_path / "out", 2) as run:
        assert assert_ends(run, 0) == []


def test_a_fault_ends_with_1(tiny_data: Path, tmp_path: Path) -> None:
    with with_each_number(command(tiny_data, tmp_path, "--lr", "1000"), tmp_path / "out") as runs:
        for run in runs:
            (line,) = assert_ends(run, 1)
            assert line.startswith("run.py: fault: rank 0: ") and "finite" in line


def test_all_loaders_killed_at_once_end_with_1(tiny_data: Path, tmp_path: Path) -> None:
    more = ("--epochs", "500")
    with with_each_number(command(tiny_data, tmp_path, *more), tmp_path / "out", (1, 2)) as runs:
        for run in runs:
            run.wait_for("step 0 epoch 1/500: 2/")
            for pid in children(run.processes[0].pid):
                os.kill(pid, signal.SIGKILL)
            (line,) = assert_ends(run, 1)
            assert "a loader process was lost" in line


def test_a_corrupt_image_ends_with_2(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for path in (data / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with with_each_number(command(data, tmp_path), tmp_path / "out") as runs:
        for run in runs:
            (line,) = assert_ends(run, 2)
            assert "truncated or corrupt" in line


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_its_processes_ends_with_75(
    tiny_data: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    more = ("--epochs", "500")
    with with_each_number(command(tiny_data, tmp_path, *more), tmp_path / "out") as runs:
        for run in runs:
            run.wait_for("step 0 epoch 1/500: 2/")
            os.killpg(run.processes[0].pid, sent)
            os.killpg(run.processes[0].pid, sent)  # launchers pass on what the terminal has sent already
        for run in runs:
            (line,) = assert_ends(run, 75)
            assert line.startswith(f"run.py: {sent.name}: saved step 0 after batch")


def test_ctrl_c_in_a_validation_saves_the_epoch(tiny_data: Path, tmp_path: Path) -> None:
    slow = ("--epochs", "500", "--whole_val", "--test_scales", "16", "16", "16")
    with with_each_number(command(tiny_data, tmp_path, *slow), tmp_path / "out", (1,)) as (run,):
        run.wait_for("step 0 epoch 1/500: ce ")
        os.killpg(run.processes[0].pid, signal.SIGINT)
        (line,) = assert_ends(run, 75)
        assert line == (
            "run.py: SIGINT: saved step 0 after batch 7 of epoch 1; the same command resumes there"
        )
        assert "validation mIoU" not in run.output()


def test_ctrl_c_in_an_evaluation_ends_with_75(tiny_data: Path, tmp_path: Path) -> None:
    more = ("--test", "--batch_size", "1")
    completed([*command(tiny_data, tmp_path), "--name", "w1"], tmp_path / "w1")
    with with_each_number(command(tiny_data, tmp_path, *more), tmp_path, (1,)) as (run,):
        run.wait_for("testing ")
        os.killpg(run.processes[0].pid, signal.SIGINT)
        (line,) = assert_ends(run, 75)
        assert line == "run.py: SIGINT: stopped"


def test_a_second_ctrl_c_does_not_wait_for_a_batch_that_does_not_come(
    tiny_data: Path, tmp_path: Path
) -> None:
    with running([*command(tiny_data, tmp_path), "--epochs", "500"], tmp_path / "out") as run:
        run.wait_for("step 0 epoch 1/500: 2/")
        (loader,) = children(run.processes[0].pid)
        os.kill(loader, signal.SIGSTOP)
        os.killpg(run.processes[0].pid, signal.SIGINT)
        time.sleep(1.5)
        assert run.processes[0].poll() is None
        os.killpg(run.processes[0].pid, signal.SIGINT)
        (line,) = assert_ends(run, 130)
        assert line.startswith("run.py: interrupted")


def test_ctrl_c_while_the_program_starts_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    with running(command(tiny_data, tmp_path), tmp_path / "out", 1, start_command) as run:
        maps = Path(f"/proc/{run.processes[0].pid}/maps")
        assert run.wait_until(lambda: "libtorch" in maps.read_text())
        run.processes[0].send_signal(signal.SIGINT)
        assert_ends(run, 130)
        assert run.output().splitlines()[-1:] in (["interrupted"], ["run.py: interrupted"])


def test_ctrl_c_where_there_is_nothing_to_save_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(opts: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupted)
    assert run_command("run.py", lambda: program.main(["--check_data"])) == 130
    assert capsys.readouterr().err.splitlines() == ["run.py: interrupted"]


def test_the_loaders_of_a_killed_process_end(tiny_data: Path, tmp_path: Path) -> None:
    more = ("--epochs", "500")
    with with_each_number(command(tiny_data, tmp_path, *more), tmp_path / "out", (2,)) as (run,):
        run.wait_for("step 0 epoch 1/500: 2/")
        pid = run.processes[0].pid
        assert len(living_in_group(pid)) == 3
        run.kill()
        deadline = time.monotonic() + BOUND
        while living_in_group(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert living_in_group(pid) == []


def test_full_shared_memory_is_told_with_its_remedy(tiny_data: Path, tmp_path: Path) -> None:
    """As in a Docker container: the batches of loader processes do not fit into /dev/shm."""
    inside = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=96k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm in a mount namespace of its own")

    def with_small_shm(words: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen:
        return start_words([*inside, sys.executable, "run.py", *words], environment, output)

    with running(command(tiny_data, tmp_path), tmp_path / "out", 1, with_small_shm) as run:
        (line,) = assert_ends(run, 1)
        assert "the shared memory is full" in line
        assert "--shm-size" in line and "--num_workers 0" in line
