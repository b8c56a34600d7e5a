"""The runs of an experiment as Slurm jobs: one script each, waiting for the run that it begins from."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.experiment_plan import Run
from utils.errors import UserError
from utils.files import atomic_write_text

ROOT = Path(__file__).resolve().parent.parent
# As in scripts/slurm/requeue.slurm: told before the time is over, saved, put back into the queue.
_DEFAULTS = {"requeue": "true", "signal": "USR1@180", "open-mode": "append"}


def job_script(run: Run, options: Mapping[str, str], folder: Path) -> str:
    """The script of a run's job.

    Args:
        run: the run.
        options: of ``sbatch``, without their dashes; ``true`` is a flag, ``false`` takes a default away.
        folder: where the job's output goes.
    """
    merged = {"job-name": run.folder.name, "output": f"{folder.absolute()}/%x-%j.out", **_DEFAULTS, **options}
    header = [
        f"#SBATCH --{name}" + ("" if value == "true" else f"={value}")
        for name, value in merged.items()
        if value != "false"
    ]
    lines = [
        "#!/usr/bin/env bash",
        *header,
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export PYTHON={shlex.quote(sys.executable)}",
        f". {shlex.quote(str(ROOT / 'scripts/slurm/processes.sh'))}",
        *(f"train {shlex.join(command)}" for command in run.commands),
    ]
    return "\n".join(lines) + "\n"


def submit(runs: Sequence[Run], options: Mapping[str, str], folder: Path) -> list[str]:
    """Submit every run that has no results and no job in the queue.

    Args:
        runs: all runs of the experiment.
        options: of ``sbatch``.
        folder: for the scripts, the jobs' output and ``jobs.json``, the number of each run's last job.

    Returns:
        A line for each run that is not done.

    Raises:
        UserError: there is no Slurm, or ``sbatch`` refuses a job.
    """
    record = folder / "jobs.json"
    jobs = _recorded(record)
    queued = set(_call(["squeue", "--me", "--noheader", "--format=%A"]).split()) if jobs else set()
    lines = []
    # The number of the job that a run waits for must be known.
    for run in sorted(runs, key=lambda run: run.begins_from is not None):
        name = run.folder.name
        if run.is_done:
            continue
        if jobs.get(name) in queued:
            lines.append(f"{run.title}: job {jobs[name]} is in the queue")
            continue
        script = folder / f"{name}.slurm"
        atomic_write_text(script, job_script(run, options, folder))
        command = ["sbatch", "--parsable"]
        if run.begins_from is not None and not run.can_start:
            # A job whose condition cannot come true any more leaves the queue.
            command += [
                f"--dependency=afterok:{jobs[run.begins_from.folder.name]}",
                "--kill-on-invalid-dep=yes",
            ]
        # With several clusters: number;cluster.
        jobs[name] = _call([*command, str(script)]).strip().split(";")[0]
        queued.add(jobs[name])
        atomic_write_text(record, json.dumps(jobs, indent=2) + "\n")
        lines.append(f"{run.title}: submitted as job {jobs[name]}")
    return lines


def _recorded(path: Path) -> dict[str, str]:
    """Number of the job that was submitted last for each run, by the name of its folder."""
    if not path.is_file():
        return {}
    try:
        return {str(name): str(job) for name, job in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is no record of jobs ({error}); remove it once no job is queued") from error


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not found; submit from a machine with Slurm, or give --local"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise UserError(f"{shlex.join(command)}: {reason}") from error
    return done.stdout
