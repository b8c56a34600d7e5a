"""Submits the runs of an experiment as Slurm jobs, each after the run whose step 0 it needs."""

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
# As in scripts/slurm/requeue.slurm: signal before the time limit, save, requeue.
_DEFAULTS = {"requeue": "true", "signal": "USR1@180", "open-mode": "append"}


def job_script(run: Run, options: Mapping[str, str], folder: Path) -> str:
    """The job script of a run.

    ``options``: of ``sbatch``, without dashes; ``true`` sets a flag, ``false`` removes a default.
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
    """Submit every run that has no results and no queued job.

    Args:
        runs: all runs of the experiment.
        options: of ``sbatch``.
        folder: folder for the scripts, the jobs' output and ``jobs.json`` (job number of each run).

    Returns:
        One line for each run that is not done.

    Raises:
        UserError: Slurm is not installed, or ``sbatch`` refuses a job.
    """
    record = folder / "jobs.json"
    jobs = _recorded(record)
    queued = set(_call(["squeue", "--me", "--noheader", "--format=%A"]).split()) if jobs else set()
    lines = []
    # Runs with their own step 0 first: the others need the job numbers.
    for run in sorted(runs, key=lambda run: run.starts_from is not None):
        name = run.folder.name
        if run.is_done:
            continue
        if jobs.get(name) in queued:
            lines.append(f"{run.title}: job {jobs[name]} is in the queue")
            continue
        script = folder / f"{name}.slurm"
        atomic_write_text(script, job_script(run, options, folder))
        command = ["sbatch", "--parsable"]
        if run.starts_from is not None and not run.can_start:
            # A job whose dependency failed is removed from the queue.
            command += [
                f"--dependency=afterok:{jobs[run.starts_from.folder.name]}",
                "--kill-on-invalid-dep=yes",
            ]
        # In a federation, sbatch prints "number;cluster".
        jobs[name] = _call([*command, str(script)]).strip().split(";")[0]
        queued.add(jobs[name])
        atomic_write_text(record, json.dumps(jobs, indent=2) + "\n")
        lines.append(f"{run.title}: submitted as job {jobs[name]}")
    return lines


def _recorded(path: Path) -> dict[str, str]:
    """Number of the last submitted job of each run, by the name of the run's folder."""
    if not path.is_file():
        return {}
    try:
        return {str(name): str(job) for name, job in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is not a valid job list ({error}); remove it once no job is queued"
        ) from error


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit on a machine with Slurm, or give --local") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise UserError(f"{shlex.join(command)}: {reason}") from error
    return done.stdout
