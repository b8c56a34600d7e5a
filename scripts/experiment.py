"""Methods × seeds from one file: ``python -m scripts.experiment FILE.yaml``.

Runs what has no results yet, several at a time, and ends with the table of all: mean ± standard deviation
over seeds. The file::

    logdir: logs/shapes
    processes: 2                # runs at a time, each on one core
    seeds: [1, 2, 3]
    common: {dataset: shapes, data_root: data/shapes, task: 10-5-5, overlap: true, epochs: 10, lr: 0.01}
    step_0: {epochs: 20, lr: 0.05}          # what step 0 does otherwise
    runs:
      FT: {method: FT}
      MIB: {method: MIB, from: FT}          # begins with step 1, from FT's step 0
      joint: {task: offline}

Options are those of ``run.py`` without their dashes; ``true`` is a flag.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tasks import get_task
from utils.checkpoint import checkpoint_path
from utils.errors import UserError
from utils.logger import format_table

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("miou_old", "miou_new", "miou_all")


@dataclass
class Run:
    """One run of the command: a method with a seed.

    Attributes:
        method: name of the run in the file.
        seed: its seed.
        commands: arguments of ``run.py``, one list per call, in order.
        results: file that stands when the run is done.
        needs: files of other runs that must stand before it starts.
    """

    method: str
    seed: int
    commands: list[list[str]]
    results: Path
    needs: list[Path] = field(default_factory=list)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of the file as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return words


def plan(content: Mapping[str, Any]) -> list[Run]:
    """All runs of an experiment.

    Raises:
        UserError: a run begins from one that the file does not have.
    """
    logdir, runs = Path(content["logdir"]), content["runs"]
    planned = []
    for seed in content.get("seeds", [42]):
        for method, own in runs.items():
            options = {**content["common"], **own, "random_seed": seed, "logdir": logdir}
            begin = options.pop("from", None)
            if begin is not None and begin not in runs:
                raise UserError(f"run {method} begins from '{begin}', which is no run of the file")
            task = get_task(options["dataset"], options["task"])
            run_name = f"{method}_{seed}"

            def checkpoint(name: str, step: int, options: dict[str, Any] = options) -> Path:
                return checkpoint_path(logdir, options["task"], options["dataset"], name, step)

            commands, needs = [], []
            if begin is None:
                commands.append(
                    arguments({**options, **content.get("step_0", {}), "name": run_name, "step": 0})
                )
            later = list(range(1, task.num_steps))
            if later:
                more: dict[str, Any] = {"name": run_name, "step": later}
                if begin is not None:
                    needs.append(checkpoint(f"{begin}_{seed}", 0))
                    more["step_ckpt"] = needs[0]
                commands.append(arguments({**options, **more}))
            folder = checkpoint(run_name, 0).parent
            planned.append(Run(method, seed, commands, folder / f"results_{task.num_steps - 1}.json", needs))
    return planned


def execute(runs: list[Run], processes: int) -> list[Run]:
    """Run what has no results yet, ``processes`` at a time; returns the runs that failed."""
    waiting = [run for run in runs if not run.results.is_file()]
    active: dict[subprocess.Popen[bytes], tuple[Run, list[list[str]]]] = {}
    failed: list[Run] = []
    while waiting or active:
        for run in [run for run in waiting if all(path.is_file() for path in run.needs)]:
            if len(active) < processes:
                waiting.remove(run)
                active[_start(run, run.commands[0])] = (run, run.commands[1:])
        if not active:
            print(f"{len(waiting)} runs wait for a step 0 that is not there", file=sys.stderr)
            return failed + waiting
        time.sleep(0.5)
        for process in [process for process in active if process.poll() is not None]:
            run, rest = active.pop(process)
            if process.returncode != 0:
                print(f"{run.method} seed {run.seed} failed; see {_log(run)}", file=sys.stderr)
                failed.append(run)
            elif rest:
                active[_start(run, rest[0])] = (run, rest[1:])
            else:
                print(f"{run.method} seed {run.seed} done", flush=True)
    return failed


def _log(run: Run) -> Path:
    return run.results.parent / "output.log"


def _start(run: Run, command: list[str]) -> subprocess.Popen[bytes]:
    _log(run).parent.mkdir(parents=True, exist_ok=True)
    with _log(run).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def table(runs: list[Run]) -> str:
    """Mean ± standard deviation over seeds of the last step's mIoU, in per cent."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        done = [run for run in runs if run.method == method and run.results.is_file()]
        results = [json.loads(run.results.read_text(encoding="utf-8")) for run in done]
        cells = []
        for number in NUMBERS:
            values = [100 * r[number] for r in results if r[number] is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        rows.append([method, *cells, len(done)])
    return format_table(["method", "old", "new", "all", "seeds"], rows)


def main(argv: list[str] | None = None) -> int:
    """Run the experiment of a file and print its table; exit code 1 if a run failed, 2 for a bad file."""
    parser = argparse.ArgumentParser(description="Methods × seeds from one file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args(argv)
    try:
        content = yaml.safe_load(options.file.read_text(encoding="utf-8"))
        runs = plan(content)
    except (OSError, yaml.YAMLError, KeyError, TypeError, UserError) as error:
        print(f"scripts.experiment: error: {options.file}: {error}", file=sys.stderr)
        return 2
    failed = [] if options.table else execute(runs, content.get("processes", 1))
    print(table(runs))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
