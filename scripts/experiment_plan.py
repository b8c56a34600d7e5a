"""Reads an experiment's file, checks its options with the parser of ``run.py``, and plans the runs."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from argparser import Options, build_parser, declared, parse_options
from runs.files import CHECKPOINT, RESULTS, run_folder, step_file
from runs.options import deciding, read_run_options
from tasks import Task
from utils.errors import UserError
from utils.files import given_path, read_text
from utils.option_roles import Declaration
from utils.option_types import SEEDS
from utils.structured_text import parse_text

_KEYS = ("logdir", "processes", "gpus", "seeds", "tasks", "common", "step_0", "runs", "slurm")
# Entries of a run that are not options of run.py.
_OF_A_RUN = ("from", "step_0", "tasks")
_OF_A_TASK = ("step_0",)
_TOTAL_BATCH = "total_batch"
_Key = tuple[str, str, int]  # name of a run, its task, its seed


@dataclass(frozen=True)
class Experiment:
    """The contents of an experiment's file.

    Attributes:
        logdir: folder of the runs.
        processes: number of concurrent runs; no effect with Slurm.
        gpus: GPU numbers, divided evenly among concurrent runs; empty: one process per run, any device. No
            effect with Slurm.
        seeds: random seeds; every run is trained with each.
        tasks: options of each task that override ``common``; every run is trained on each task. {None: {}}:
            the task is an option of ``common``.
        common: options of every command.
        step_0: options of step 0 that override ``common``.
        runs: options of each run by its name.
        processes_per_run: processes that train one run, among which ``total_batch`` is divided.
        slurm: options of ``sbatch``; None: train on this machine.
    """

    logdir: Path
    common: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    processes: int = 1
    gpus: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (42,)
    tasks: dict[str | None, dict[str, Any]] = field(default_factory=lambda: {None: {}})
    step_0: dict[str, Any] = field(default_factory=dict)
    processes_per_run: int = 1
    slurm: dict[str, str] | None = None


@dataclass(eq=False)
class Run:
    """One run: a method with a task and a seed.

    Attributes:
        method: name of the run in the file.
        seed: random seed.
        task: class order.
        folder: folder of its results.
        options, first: options of ``run.py`` for the later steps and for step 0.
        compared_in: tasks of the experiment whose tables include it; joint training is in all.
        commands: arguments of ``run.py``, one list per call, in order.
        starts_from: the run whose step 0 it starts from; None if it trains step 0 itself.
    """

    method: str
    seed: int
    task: Task
    folder: Path
    options: dict[str, Any]
    first: dict[str, Any]
    compared_in: list[Task] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)
    starts_from: Run | None = None

    @property
    def title(self) -> str:
        """Method, task and seed, for messages."""
        return f"{self.method}, {self.task.name}, seed {self.seed}"

    @property
    def results(self) -> Path:
        """Results file of the last step, which exists once the run is done."""
        return step_file(self.folder, RESULTS, self.task.num_steps - 1)

    @property
    def is_done(self) -> bool:
        """Whether all its steps are trained and evaluated."""
        return self.results.is_file()

    def has_started(self, step: int) -> bool:
        """Whether it has a checkpoint or results of a step."""
        return any(step_file(self.folder, kind, step).is_file() for kind in (CHECKPOINT, RESULTS))

    @property
    def can_start(self) -> bool:
        """Whether the step 0 that it needs is complete (results are written last)."""
        return self.starts_from is None or step_file(self.starts_from.folder, RESULTS, 0).is_file()


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────


def read_experiment(
    path: Path, *, gpus: Sequence[int] = (), given: Sequence[str] = (), slurm: bool | None = None
) -> Experiment:
    """Read and check an experiment's file.

    Args:
        path: the file.
        gpus: GPU numbers instead of the file's; empty: the file's.
        given: options of every command instead of the file's, as ``name=value``, flags as ``name``.
        slurm: whether to submit jobs; None: if the file has ``slurm``.

    Raises:
        UserError: it cannot be read, is not YAML, or has unknown, missing or wrong entries.
    """
    text = read_text(path)
    content = parse_text(text, str(path))
    # All values as strings: YAML reads 4:00:00 as the number 14400.
    as_written = yaml.load(text, Loader=yaml.BaseLoader)
    try:
        if isinstance(content, dict):
            if slurm is False:
                content["slurm"] = None
            elif slurm or content.get("slurm") is not None:
                content["slurm"] = as_written.get("slurm") or {}
            if gpus:
                content["gpus"] = list(gpus)
            content = _with_given(content, given)
        return check_content(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _with_given(content: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The content with options of ``--set`` in ``common`` and nowhere else.

    Raises:
        UserError: a value is not valid YAML.
    """
    new: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.removeprefix("--").partition("=")
        new[name] = parse_text(value, f"--set {word}") if equals else True
    both = {"batch_size", _TOTAL_BATCH}
    replaced = new.keys() | both if both & new.keys() else set(new)

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: without(entry)
                for name, entry in value.items()
                if str(name).removeprefix("--") not in replaced
            }
        return [without(entry) for entry in value] if isinstance(value, list) else value

    if not new:
        return content
    kept = {
        key: without(value) if key in ("common", "step_0", "tasks") else value
        for key, value in content.items()
    }
    if isinstance(runs := kept.get("runs"), dict):  # whose names may be those of options
        kept["runs"] = {name: without(options) for name, options in runs.items()}
    return {**kept, "common": {**_mapping(kept, "common"), **new}}


def check_content(content: object) -> Experiment:
    """Check the parsed content of a file.

    Raises:
        UserError: an entry is unknown, missing or of the wrong type.
    """
    if not isinstance(content, dict):
        raise UserError("expected the entries 'logdir:', 'common:' and 'runs:'")
    for key in content:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(_KEYS)}"
            raise UserError(f"unknown entry '{key}'; {hint}")
    if not isinstance(content.get("logdir"), str):
        raise UserError("logdir: give the folder of the runs (a lone ~ is null in YAML: write ~/)")
    slurm = _slurm(content.get("slurm"))
    processes = _numbers(content.get("processes", 1), "processes", single=True, least=1, most=1024)[0]
    gpus = _numbers(content.get("gpus", []), "gpus", most=1023)
    share = max(len(gpus) // processes, 1) if slurm is None else _tasks_of_job(slurm)
    runs = {name: _options(own, f"runs: {name}", share) for name, own in _mapping(content, "runs").items()}
    for name in runs:
        if not isinstance(name, str):
            raise UserError(f"runs: {name}: the name of a run must be text; put it in quotes")
    if not runs:
        raise UserError("runs: give at least one, e.g. FT: {method: FT}")
    experiment = Experiment(
        logdir=given_path(content["logdir"]),
        processes=processes,
        gpus=gpus,
        seeds=_numbers(content.get("seeds", [42]), "seeds", required=True),
        tasks=_tasks(content, share),
        common=_options(content.get("common"), "common", share),
        step_0=_options(content.get("step_0"), "step_0", share),
        runs=runs,
        processes_per_run=share,
        slurm=slurm,
    )
    if len(experiment.gpus) % experiment.processes:
        raise UserError(
            f"gpus: {len(experiment.gpus)} cannot be divided among {experiment.processes} processes"
        )
    for name, own in runs.items():
        for task in _mapping(own, "tasks"):
            if str(task) not in experiment.tasks:
                raise UserError(f"runs: {name}: tasks: {task} is not a task of the experiment")
    if None not in experiment.tasks and "task" in experiment.common:
        raise UserError("tasks and the task of common exclude each other; give one")
    return experiment


def _mapping(content: Mapping[str, Any], key: str) -> dict[Any, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected 'name: value' entries, got {value!r}")
    return value


def _options(value: object, where: str, processes: int) -> dict[str, Any]:
    """Check a mapping of options; ``total_batch`` becomes the ``batch_size`` of each process.

    A run may also have ``from``, ``step_0`` and ``tasks``, a task ``step_0``.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected options of run.py, e.g. {{lr: 0.01}}, got {value!r}")
    options: dict[str, Any] = {}
    for name, entry in value.items():
        option = str(name).removeprefix("--")
        if option in options:
            raise UserError(f"{where}: '{option}' appears twice; remove one")
        options[option] = entry
    for name in options:
        if declared(name).set_by_experiment:
            raise UserError(f"{where}: {name} is set by the experiment; remove it")
    allowed = _OF_A_RUN if where.startswith("runs") else _OF_A_TASK if where.startswith("tasks: ") else ()
    for name in _OF_A_RUN:
        if name in options and name not in allowed:
            raise UserError(f"{where}: '{name}' is an entry of a run; move it below runs:")
    if _TOTAL_BATCH in options:
        if "batch_size" in options:
            raise UserError(f"{where}: total_batch and batch_size exclude each other; give one")
        options["batch_size"] = _share(options.pop(_TOTAL_BATCH), processes, where)
    return options


def _share(total: object, processes: int, where: str) -> int:
    """The batch size of each process."""
    if processes == 0:
        raise UserError(f"{where}: total_batch needs the job's number of processes; give ntasks in slurm:")
    if type(total) is not int or total < 1 or total % processes:
        raise UserError(
            f"{where}: total_batch {total!r} cannot be divided among {processes} "
            f"process{'es' if processes > 1 else ''}; give a multiple, or another number of gpus"
        )
    return total // processes


def _numbers(
    value: object,
    key: str,
    *,
    single: bool = False,
    required: bool = False,
    least: int = 0,
    most: int = SEEDS,
) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) and not single else [value]
    wrong = [n for n in numbers if type(n) is not int or not least <= n <= most]
    if wrong or len(set(numbers)) < len(numbers) or (required and not numbers):
        kind = "a number" if single else "different numbers, e.g. [1, 2, 3]"
        raise UserError(f"{key}: expected {kind}, at least {least} and at most {most}; got {value!r}")
    return tuple(numbers)


def _tasks(content: Mapping[str, Any], processes: int) -> dict[str | None, dict[str, Any]]:
    """Options of every task by its name; a list entry is a name or ``{name: options}``."""
    tasks = content.get("tasks")
    if tasks is None:
        return {None: {}}
    wrong = UserError(
        f"tasks: expected names, e.g. [15-5, 15-1] or [15-5, {{15-1: {{lr: 0.001}}}}]; got {tasks!r}"
    )
    if not isinstance(tasks, list) or not tasks:
        raise wrong
    found: dict[str | None, dict[str, Any]] = {}
    for entry in tasks:
        if isinstance(entry, dict) and len(entry) == 1:
            ((name, options),) = entry.items()
        else:
            name, options = entry, None
        if not isinstance(name, (str, int)) or str(name) in found:
            raise wrong
        found[str(name)] = _options(options, f"tasks: {name}", processes)
    return found


# Options of sbatch from which Slurm computes the number of tasks.
_TASKS_BY_OTHERS = {"ntasks-per-gpu", "ntasks-per-socket", "ntasks-per-core", "gpus-per-task"}


def _slurm(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise UserError(f"slurm: expected options of sbatch, e.g. {{partition: gpu}}; got {value!r}")
    for name in value:
        if name in ("job-name", "dependency"):
            raise UserError(f"slurm: {name} is set by the experiment; remove it")
    return {str(name): entry for name, entry in value.items()}


def _tasks_of_job(slurm: Mapping[str, str]) -> int:
    """Processes of a job; 0 if its options do not say it as numbers."""
    if "ntasks" not in slurm and _TASKS_BY_OTHERS & slurm.keys():
        return 0
    names = ("ntasks",) if "ntasks" in slurm else ("nodes", "ntasks-per-node")
    words = [slurm.get(name, "1") for name in names]
    return math.prod(int(word) if word.isdigit() else 0 for word in words)


# ── the runs ─────────────────────────────────────────────────────────────────────────────────────────


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Command-line arguments from options; ``true`` sets a flag, ``false`` and null are skipped."""
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return words


def plan(experiment: Experiment) -> list[Run]:
    """All runs in the file's order; every command is checked by the parser of ``run.py``.

    Tasks with the same first step, such as 15-5 and 15-1, share step 0: the runs of the first task train it,
    the others start from its checkpoint. (Not on ADE20K without overlap, whose lists depend on all steps, nor
    with a classifier that has the parts of all steps from step 0 on.)

    Raises:
        UserError: an option is wrong, or the run named by ``from`` has no such step 0.
    """
    planned: dict[_Key, Run] = {}
    for name, of_task in experiment.tasks.items():
        common = {**experiment.common, **of_task, **({} if name is None else {"task": name})}
        task = _task(common, "common")
        for seed, (method, entry) in itertools.product(experiment.seeds, experiment.runs.items()):
            own = {**common, **entry, **_for_task(experiment, method, name)}
            step_0 = {
                **experiment.step_0,
                **_step_0(experiment, of_task, f"step_0 of tasks: {name}"),
                **_step_0(experiment, entry, f"step_0 of runs: {method}"),
            }
            own_task = _task(own, f"runs: {method}")
            key = (method, own_task.name, seed)
            if key not in planned:
                place = own_task.name, own_task.dataset, f"{method}_{seed}"
                folder = run_folder(experiment.logdir, *place)
                options = {name: value for name, value in own.items() if name not in _OF_A_RUN}
                planned[key] = Run(method, seed, own_task, folder, options, {**options, **step_0})
            planned[key].compared_in.append(task)
    for run in planned.values():
        begin = experiment.runs[run.method].get("from")
        base = run if begin is None else _base(experiment, planned, run, begin)
        origin = _origin(planned.values(), base)
        run.starts_from = None if origin is run else origin
        run.commands = _commands(run)
    return list(planned.values())


def _step_0(experiment: Experiment, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of step 0 of a run's or a task's entry."""
    return _options(entry.get("step_0"), where, experiment.processes_per_run)


def _for_task(experiment: Experiment, method: str, task: str | None) -> dict[str, Any]:
    """Options of a run in one of the tasks."""
    of_tasks = _mapping(experiment.runs[method], "tasks")
    own = {str(name): options for name, options in of_tasks.items()}
    return _options(own.get(str(task)), f"tasks of runs: {method}", experiment.processes_per_run)


def _base(experiment: Experiment, planned: Mapping[_Key, Run], run: Run, begin: object) -> Run:
    """The run named by ``from``, with the same task and seed."""
    if "step_0" in experiment.runs[run.method]:
        raise UserError(
            f"runs: {run.method}: step_0 has no effect with from:, which takes another run's; remove one"
        )
    if not isinstance(begin, str):
        raise UserError(f"runs: {run.method}: from: {begin!r} is not the name of a run; put a name in quotes")
    base = planned.get((begin, run.task.name, run.seed))
    if begin not in experiment.runs:
        reason = "is not a run of the file"
    elif experiment.runs[begin].get("from") is not None:
        reason = "has no step 0 of its own"
    elif base is None or run.task.num_steps == 1:
        reason = f"has no step 0 of task {run.task.name}"
    else:
        return base
    raise UserError(f"runs: {run.method} starts from '{begin}', which {reason}")


def _origin(planned: Iterable[Run], run: Run) -> Run:
    """The first run with the same method, seed and step 0: the run itself, or that of another task."""
    # Without overlap, each ADE20K image is in the list of one step, so that lists differ between tasks.
    if run.task.num_steps == 1 or (run.task.dataset == "ade" and not run.first.get("overlap")):
        return run
    alike = [
        other
        for other in planned
        if (other.method, other.seed) == (run.method, run.seed)
        and other.task.num_steps > 1
        and other.task.steps[0] == run.task.steps[0]
        and set(other.task.order) == set(run.task.order)
        and {**other.first, "task": None} == {**run.first, "task": None}
    ]
    if alike[0] is not run and _has_all_steps(run):
        alike = [other for other in alike if other.task.steps == run.task.steps]
    return alike[0]


def _has_all_steps(run: Run) -> bool:
    """Whether the classifier has the parts of all steps from step 0 on."""
    options = _parsed(arguments({**run.first, "step": 0}), f"runs: {run.method}")
    if options.classifier == "linear":
        return False
    from methods.classifiers import classifier_kind  # needs torch

    return classifier_kind(options.classifier).of_all_steps


def _parsed(words: Sequence[str], where: str) -> Options:
    try:
        return parse_options(words)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _task(options: Mapping[str, Any], where: str) -> Task:
    words = arguments({name: value for name, value in options.items() if declared(name).role == "data"})
    return _parsed(words, where).task_


def _commands(run: Run) -> list[list[str]]:
    """Arguments of ``run.py`` for step 0 (unless another run trains it) and for the later steps."""
    name = f"{run.method}_{run.seed}"
    given = {"random_seed": run.seed, "logdir": run.folder.parent, "name": name}
    commands = []
    later: dict[str, Any] = {"step": list(range(1, run.task.num_steps))}
    if run.starts_from is None:
        commands.append(arguments({**run.first, **given, "step": 0}))
    else:
        later["step_ckpt"] = step_file(run.starts_from.folder, CHECKPOINT, 0)
    if run.task.num_steps > 1:
        commands.append(arguments({**run.options, **given, **later}))
    for command in commands:
        _parsed(command, f"runs: {run.method}")
    return commands


# ── existing steps ─────────────────────────────────────────────────────────────────────────────────


def check_existing_steps(runs: Iterable[Run]) -> None:
    """Check that existing steps were trained with the options, and from the step 0, that the file has now.

    Steps without a checkpoint are skipped, since they start over; so are folders written by versions that
    recorded no options by step.

    Raises:
        UserError: a step differs; names folder, step and options.
    """
    for run in runs:
        known = read_run_options(run.folder)
        recorded = known.by_step
        started = {step for step in recorded if run.has_started(step)}
        if started and known.steps and known.steps != [list(classes) for classes in run.task.steps]:
            raise UserError(
                f"{run.folder}: was trained with other classes per step, or in another order, than the file "
                "says; change logdir or the name of the run, or restore the order"
            )
        for command in run.commands if started else ():
            options = parse_options(command)
            for step, lr in zip(options.steps, options.lrs, strict=True):
                if step in started:
                    _check_origin(run, step, recorded[step])
                    _check_step(run, step, recorded[step], {**options.as_json(), "lr": lr})


def _check_origin(run: Run, step: int, recorded: Mapping[str, Any]) -> None:
    """Compare the run whose step 0 it started from, by name and seed; its task may differ."""
    path = recorded.get("step_ckpt")
    own = f"{run.method}_{run.seed}"
    was = own if path is None else Path(path).parent.name.rpartition(f"-{run.task.dataset}_")[2]
    says = own if run.starts_from is None else f"{run.starts_from.method}_{run.starts_from.seed}"
    if step and was != says:
        raise UserError(
            f"{run.folder}: step {step} was trained from step 0 of {was}, the file says of {says}; "
            "change logdir or the name of the run, or restore from:"
        )


def _check_step(run: Run, step: int, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    then, wanted = deciding(recorded), deciding(now)
    names = [
        name
        for name in sorted(then.keys() | wanted.keys())
        if is_compared(declared(name)) and then.get(name) != wanted.get(name)
    ]
    if names:
        was, says = (", ".join(_as_typed(name, of.get(name)) for name in names) for of in (then, wanted))
        raise UserError(
            f"{run.folder}: step {step} was trained with {was}, the file says {says}; change logdir or "
            "the name of the run, or restore the options"
        )


def is_compared(option: Declaration) -> bool:
    """Whether a learning option must be unchanged: all but paths of data and values derived from options."""
    return not option.says_where_data_are and not option.derived


def _as_typed(name: str, value: Any) -> str:
    """An option as it is typed; "no" precedes a flag that was not given."""
    flag = declared(name).flag
    if value is None or (isinstance(value, bool) and value == build_parser().get_default(name)):
        return f"no {flag}"
    return shlex.join(arguments({flag.removeprefix("--"): True if value is False else value}))
