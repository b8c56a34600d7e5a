"""Methods × tasks × seeds from one file: ``python -m scripts.experiment FILE.yaml``.

Trains the runs that have no results yet and resumes interrupted ones (repeat the command), then prints a
table of mean ± standard deviation over seeds and writes the report of all started runs to
``<logdir>/report``. The file (only ``logdir`` and ``runs`` are required)::

    logdir: logs/voc
    tasks:                      # tasks with the same step 0 share it
      - 15-5
      - 15-1: {lr: 0.0005}      # options of this task; those of a run override them
    seeds: [1, 2, 3]
    processes: 2                # runs at a time
    gpus: [0, 1, 2, 3]          # divided among concurrent runs; without: one process per run, any device
    # total_batch is divided among the processes of a run; batch_size would be that of each process.
    common: {dataset: voc, data_root: data, overlap: true, epochs: 30, lr: 0.001, total_batch: 24}
    step_0: {lr: 0.01}          # options of step 0
    runs:
      FT: {method: FT}
      MIB: {method: MIB, from: FT}          # starts with step 1, from FT's step 0
      SDR: {method: SDR, step_0: {method: FT, unce: true, loss_de_prototypes: 1}}
      SSUL: {method: SSUL, tasks: {15-1: {lr: 0.0002}}}    # options of this run in a task
      joint: {task: offline}                # another task, shown in every table
    slurm: {partition: gpu, time: 4:00:00, ntasks-per-node: 2, gpus-per-node: 2}

Options are those of ``run.py`` without dashes; ``true`` sets a flag. ``--gpus`` and ``--set`` replace entries
of the file. A run's folder is ``<logdir>/<task>-<dataset>_<name of the run>_<seed>``. If a step was trained
with other options than the file has now, the command stops with an error before it starts any run.

With ``slurm`` (options of sbatch) or ``--slurm`` every run is submitted as a Slurm job with one process per
task of the job (``ntasks-per-node``); ``processes`` and ``gpus`` have no effect. The command submits the runs
that are neither done nor queued, then makes the table and the report of the existing results; repeat it to
update them. ``--local`` trains on this machine although the file has ``slurm``.

Exit code 0: all runs done or submitted; 1: a run failed; 2: wrong file, with one line that says what to
change; 75: stopped by a signal or Ctrl-C, all runs saved; 130: Ctrl-C with no active run, or a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from runs.files import OUTPUT
from runs.results import read_step_results
from scripts.experiment_plan import Experiment, Run, check_existing_steps, plan, read_experiment
from scripts.experiment_slurm import job_script, submit
from tasks import Task
from utils.command import run_command
from utils.errors import UserError
from utils.option_types import Parser, path_option
from utils.signals import EXIT_STOPPED, StopRequest
from utils.tables import format_table

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
_NOT_WITH_SLURM = (
    "gpus and processes have no effect with Slurm; set ntasks-per-node and gpus-per-node in slurm:"
)


# ── running ──────────────────────────────────────────────────────────────────────────────────────────


class Runner:
    """Runs on this machine, several at a time.

    Args:
        processes: runs at a time.
        gpus: GPU numbers, divided evenly among the concurrent runs; empty: the environment is not changed.
    """

    def __init__(self, processes: int = 1, gpus: Sequence[int] = ()) -> None:
        share = len(gpus) // processes
        self.places = [list(gpus[i * share : (i + 1) * share]) for i in range(processes)]
        self.active: dict[subprocess.Popen[bytes], tuple[Run, list[list[str]], list[int]]] = {}
        self.failed: list[Run] = []
        self.stop = StopRequest()

    def execute(self, runs: Iterable[Run]) -> list[Run]:
        """Run everything without results; returns the runs that still have none at the end.

        After SIGTERM, SIGUSR1 or Ctrl-C the active runs save and end.
        """
        waiting = [run for run in runs if not run.is_done]
        self.stop.listen()
        try:
            while (waiting or self.active) and not self.stop:
                ready = [run for run in waiting if run.can_start and not run.is_done]
                for run in ready[: len(self.places)]:
                    waiting.remove(run)
                    self._start(run, run.commands, self.places.pop())
                if not self.active:
                    for run in waiting:
                        print(f"{run.title}: not started, its step 0 is missing", file=sys.stderr)
                    break
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            unfinished = self._end_all()
        return self.failed + unfinished + waiting

    def _start(self, run: Run, commands: list[list[str]], place: list[int]) -> None:
        log = run.folder / OUTPUT
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place))
        if len(commands) == len(run.commands):
            print(f"{run.title}: started, {log}", flush=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                _command(commands[0], len(place)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches this process only, which then sends SIGTERM to the runs.
                start_new_session=True,
            )
        self.active[process] = (run, commands[1:], place)

    def _collect(self) -> None:
        """Handle processes that ended, and start the next command of their run."""
        for process in [process for process in self.active if process.poll() is not None]:
            run, rest, place = self.active.pop(process)
            if process.returncode == 0 and rest:
                self._start(run, rest, place)
                continue
            self.places.append(place)
            if process.returncode == 0:
                print(f"{run.title}: done", flush=True)
                continue
            self.failed.append(run)
            print(f"{run.title}: failed with {process.returncode}: {_last_line(run)}", file=sys.stderr)

    def _end_all(self) -> list[Run]:
        """Send SIGTERM to the active runs, which save and end; returns them."""
        for process in self.active:
            process.send_signal(signal.SIGTERM)
        for process in self.active:
            process.wait()
        return [run for run, _, _ in self.active.values()]


def _command(words: Sequence[str], gpus: int) -> list[str]:
    """The command line, with torchrun if a run has several GPUs."""
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    return [*launcher, str(ROOT / "run.py"), *words]


def _last_line(run: Run) -> str:
    """The last line of the run's output, and the path of its log."""
    log = run.folder / OUTPUT
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{said} ({log})"


# ── the table ────────────────────────────────────────────────────────────────────────────────────────


def scores(run: Run, task: Task) -> list[float | None]:
    """mIoU of a finished run over first, later and all classes after the task's last step, as fractions.

    As in the papers' tables and the report, first are the classes of step 0 with the background, later those
    of all later steps. For joint training they are the classes of ``task``. A task of one step has no first
    and later classes. Classes without IoU are left out.
    """
    results = read_step_results(run.folder, run.task.num_steps - 1)
    if results is None:
        raise UserError(f"{run.results}: is gone; start the experiment again")
    iou = {run.task.order[results["indices"][name]]: value for name, value in results["class_iou"].items()}
    means: list[float | None] = []
    own = run.task if run.task.num_steps > 1 else task  # which may have another class order
    set_apart = (own.steps[0], own.future_classes(0)) if own.num_steps > 1 else ((), ())
    for classes in (*set_apart, task.order):
        values = [iou[c] for c in classes if iou.get(c) is not None]
        means.append(math.fsum(values) / len(values) if values else None)
    return means


def table(runs: Sequence[Run]) -> str:
    """Mean ± standard deviation over seeds of the last step's mIoU in percent, one table per task."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.compared_in))
    return "\n\n".join(f"{_heading(task)}\n{_task_table(runs, task)}" for task in tasks)


def _heading(task: Task) -> str:
    text = f"{task.dataset} {task.name}, mIoU in percent after the last step"
    if task.num_steps == 1:
        return text
    later = "step 1" if task.num_steps == 2 else f"steps 1 to {task.num_steps - 1}"
    return f"{text}; first: classes of step 0 with background, later: of {later}"


def _task_table(runs: Sequence[Run], task: Task) -> str:
    compared = [run for run in runs if task in run.compared_in]
    rows = []
    for method in dict.fromkeys(run.method for run in compared):
        done = [scores(run, task) for run in compared if run.method == method and run.is_done]
        cells = []
        for column in range(3):
            values = [100 * value for row in done if (value := row[column]) is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        rows.append([method, *cells, len(done)])
    return format_table(["method", "first", "later", "all", "seeds"], rows)


def _report(runs: Sequence[Run], logdir: Path) -> int:
    """Write the report of all started runs; returns its exit code."""
    # Imported here, since it takes a second that --dry-run and errors need not wait for.
    import report

    started: list[Path] = []
    for run in runs:
        with contextlib.suppress(UserError):  # not started: no folder, or an empty one
            started += report.find_runs([run.folder])
    return report.main([*map(str, started), "--out", str(logdir / "report")]) if started else 0


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.experiment",
        description="Methods × tasks × seeds from one file: train what is missing, then table and report.",
        epilog="Repeat the command to resume interrupted runs. "
        "The docstring of scripts/experiment.py describes the file.",
    )
    parser.add_argument(
        "file", type=path_option, help="YAML file of the experiment, e.g. scripts/shapes.yaml"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="only print the table of finished runs")
    what.add_argument("--dry-run", action="store_true", help="only print the commands or jobs that would run")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--slurm",
        action="store_true",
        help="submit each run as a Slurm job, with the file's slurm: entry as sbatch options",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[], metavar="N", help="instead of the file's")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of every command instead of the file's, e.g. data_root=/data epochs=1 no_pretrained",
    )
    where.add_argument("--local", action="store_true", help="train here even if the file has slurm:")
    return parser.parse_args(argv)


def _print_plan(experiment: Experiment, runs: Sequence[Run], sbatch: dict[str, str] | None) -> None:
    for run in runs:
        if run.is_done:
            print(f"# {run.title}: done")
            continue
        after = "" if run.starts_from is None else f", after {run.starts_from.title}"
        print(f"# {run.title}{after}")
        if sbatch is not None:
            print(job_script(run, sbatch, experiment.logdir / "slurm"))
            continue
        gpus = len(experiment.gpus) // experiment.processes
        print("\n".join(shlex.join(_command(command, gpus)) for command in run.commands))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("scripts.experiment", lambda: _experiment(_options(argv)))


def _experiment(options: argparse.Namespace) -> int:
    """Read, plan and run the experiment; returns the exit code."""
    slurm = True if options.slurm else False if options.local else None
    experiment = read_experiment(options.file, gpus=options.gpus, given=options.set, slurm=slurm)
    try:
        runs = plan(experiment)
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from error
    check_existing_steps(runs)
    sbatch = experiment.slurm
    if options.table:
        print(table(runs))
        return 0
    if sbatch is not None and (experiment.gpus or experiment.processes > 1):
        print(f"{options.file}: {_NOT_WITH_SLURM}", file=sys.stderr)
    if options.dry_run:
        _print_plan(experiment, runs, sbatch)
        return 0
    if sbatch is not None:
        print("\n".join([*submit(runs, sbatch, experiment.logdir / "slurm"), table(runs)]))
        return _report(runs, experiment.logdir)
    runner = Runner(experiment.processes, experiment.gpus)
    missing = runner.execute(runs)
    print(table(runs))
    if runner.stop:
        print(f"{runner.stop.signal}: the runs are saved; repeat the command to resume them", file=sys.stderr)
        return EXIT_STOPPED
    reported = _report(runs, experiment.logdir)
    return 1 if missing else reported


if __name__ == "__main__":
    sys.exit(main())
