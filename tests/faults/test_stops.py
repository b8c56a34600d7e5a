"""Signals: finish the batch, save, end with 75; and what schedulers and launchers do next."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from faults import BOUND, ROOT, TINY, completed, differences, left_by, running
from forked import Fork

STAND_IN = Path(__file__).with_name("slurm_stand_in.py")


def command(data: Path, logs: Path, name: str, *more: object) -> list[object]:
    return [
        *(*TINY, "--ckpt_minutes", "0", "--data_root", data, "--logdir", logs, "--name", name),
        *("--epochs", "2", "--step", "0", "--batch_size", "2", *more),
    ]


def children(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def test_one_process_of_two_is_told_and_both_save_and_end(tiny_data: Path, tmp_path: Path) -> None:
    completed(command(tiny_data, tmp_path, "whole"), tmp_path / "whole", 2)
    broken = command(tiny_data, tmp_path, "broken")
    with running(broken, tmp_path / "out", 2) as run:
        run.wait_for("step 0 epoch 1/2: 1/")
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait(BOUND) == [75, 75]
        assert "saved step 0 after batch 2 of epoch 1" in run.output() or "after batch 3" in run.output()
        assert "Traceback" not in run.output() + run.output(1)
    again = completed(broken, tmp_path / "out", 2)
    assert "step 0 resumes at epoch 1 of 2, after batch" in again.output()
    left = [left_by(tmp_path / f"15-5-shapes_{name}") for name in ("whole", "broken")]
    assert differences(*left) == []


def test_signals_to_the_whole_process_group_spare_the_loaders(tiny_data: Path, tmp_path: Path) -> None:
    broken = command(tiny_data, tmp_path, "broken")
    with running(broken, tmp_path / "out") as run:
        run.wait_for("step 0 epoch 1/2: 1/")
        pid = run.processes[0].pid
        for process in (pid, *children(pid)):
            os.kill(process, signal.SIGTERM)
        assert run.wait(BOUND) == [75], run.output()[-2000:]
    # Between processes and epochs nothing may depend on the number of loader processes.
    completed(broken, tmp_path / "out")
    completed(command(tiny_data, tmp_path, "whole", "--num_workers", "0"), tmp_path / "whole")
    left = [left_by(tmp_path / f"15-5-shapes_{name}") for name in ("whole", "broken")]
    assert differences(*left) == []


def test_slurm_script_saves_requeues_and_goes_on(tiny_data: Path, tmp_path: Path, interpreter: Path) -> None:
    for name in ("srun", "scontrol"):
        wrapper = tmp_path / "bin" / name
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.symlink_to(STAND_IN)
        STAND_IN.chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(tmp_path)},
        **{"STAND_IN_PATTERN": "step 0 epoch 1/2: 2/", "PYTHON": str(interpreter), "OMP_NUM_THREADS": "1"},
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)},
    }
    # With --fresh a requeued job must go on with its own work all the same.
    arguments = [str(a) for a in command(tiny_data, tmp_path, "job", "--fresh")]
    requeued, codes = tmp_path / "requeued", []
    for start in range(3):
        requeued.unlink(missing_ok=True)
        job = subprocess.run(
            ["bash", str(ROOT / "scripts/slurm/requeue.slurm"), *arguments],
            env={**environment, "SLURM_RESTART_COUNT": str(start)},
            capture_output=True,
            text=True,
        )
        codes.append(job.returncode)
        if not requeued.exists():
            break
    printed = (tmp_path / "tasks.txt").read_text()
    assert codes == [0, 0], printed[-3000:]
    assert "is requeued" not in job.stdout
    # The first process may hear of it from the second.
    assert re.search(r"run.py: (SIGUSR1|a signal to another process): saved step 0 after batch", printed)
    assert "step 0 resumes at epoch 1 of 2, after batch" in printed
    assert (tmp_path / "15-5-shapes_job" / "results_0.json").is_file()


def test_torchrun_starts_killed_processes_again(tiny_data: Path, tmp_path: Path, interpreter: Path) -> None:
    def torchrun(words: Sequence[str], environment: dict[str, str], output: Path) -> Fork:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
        return Fork([*launcher, "run.py", *words], environment | {"PYTHON_EXEC": str(interpreter)}, output)

    run_dir = tmp_path / "15-5-shapes_job"
    words = [*command(tiny_data, tmp_path, "job"), "--ckpt_minutes", "0.001"]
    with running(words, tmp_path / "out", start=torchrun) as run:
        run.wait_until((run_dir / "15-5-shapes_job_0.json").exists)
        os.kill(children(run.processes[0].pid)[0], signal.SIGKILL)
        assert run.wait() == [0], run.output()[-3000:]
        assert "step 0 resumes at epoch" in run.output()
    assert (run_dir / "results_0.json").is_file()
