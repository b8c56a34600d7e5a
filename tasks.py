"""Tasks: which dataset classes each step learns, and the order of the network's outputs.

A task is an ordered list of steps, each a list of dataset class ids. Background is id 0 and belongs to
step 0. The output index of a class is its position in the concatenation of the steps.

    >>> task = get_task("voc", "15-1")
    >>> task.name, task.num_steps, task.new_classes(1), task.classes_per_step(2)
    ('15-5s', 6, (16,), [16, 1, 1])

The VOC and ADE20K tasks are those of the released code of MiB, PLOP, SDR, SATS and SSUL; they are stored as
step sizes in the order of ids, and as permutations (``_VOC_ORDERS``, ``_ADE_ORDERS``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import name_fault, read_text
from utils.structured_text import parse_text

Steps = tuple[tuple[int, ...], ...]

DATASETS = ("voc", "ade", "folder", "shapes")

# Number of dataset classes with background (ADE20K: with "other"); user data defines its own.
_NUM_CLASSES = {"voc": 21, "ade": 151, "shapes": 21}

# name -> (classes of step 0 without background, classes of every later step), in order of ids.
_VOC_REGULAR = {
    "offline": (20, 0),
    "19-1": (19, 1),
    "15-5": (15, 5),
    "15-5s": (15, 1),
    "10-10": (10, 10),
    "10-10s": (10, 1),
    "10-5-5": (10, 5),
    "10-1": (10, 1),
    "5-3": (5, 3),
}
_ADE_REGULAR = {
    "offline": (150, 0),
    "100-50": (100, 50),
    "100-10": (100, 10),
    "100-5": (100, 5),
    "50": (50, 50),
    "50-10": (50, 10),
    "25-25": (25, 25),
    "10-10": (10, 10),
}

# 15-5s_<letter>: 16 classes at step 0, then one per step.
_VOC_ORDERS = {
    "b": "0 12 9 20 7 15 8 14 16 5 19 4 1 13 2 11 17 3 6 18 10",
    "c": "0 13 19 15 17 9 8 5 20 4 3 10 11 18 16 7 12 14 6 1 2",
    "d": "0 15 3 2 12 14 18 20 16 11 1 19 8 10 7 17 6 5 13 9 4",
    "e": "0 7 5 3 9 13 12 14 19 10 2 1 4 16 8 17 15 18 6 11 20",
    "f": "0 7 13 5 11 9 2 15 12 14 3 20 1 16 4 18 8 6 10 19 17",
    "g": "0 7 5 9 1 15 18 14 3 20 10 4 19 11 17 16 12 8 6 2 13",
    "h": "0 12 9 19 6 4 10 5 18 14 15 16 3 8 7 11 13 2 20 17 1",
    "i": "0 13 10 15 8 7 19 4 3 16 12 14 11 5 20 6 2 18 9 17 1",
    "j": "0 1 14 9 5 2 15 8 20 6 16 18 7 11 10 19 3 4 17 12 13",
    "k": "0 16 13 1 11 12 18 6 14 5 3 7 9 20 19 15 4 2 10 8 17",
    "l": "0 10 7 6 19 16 8 17 1 14 4 9 3 15 11 12 2 18 20 13 5",
    "m": "0 18 4 14 17 12 10 7 3 9 1 8 15 6 13 2 5 11 20 16 19",
    "n": "0 5 4 13 18 14 10 19 15 7 9 3 2 8 16 20 1 12 11 6 17",
    "o": "0 9 12 13 18 7 1 15 17 10 8 4 5 20 16 6 14 19 11 2 3",
    "p": "0 9 12 13 18 2 11 15 17 10 8 4 5 20 16 6 14 19 1 7 3",
    "q": "0 3 14 13 18 2 11 15 17 10 8 4 5 20 16 6 12 19 1 7 9",
    "r": "0 3 14 13 1 2 11 15 17 7 8 4 5 9 16 19 12 6 18 10 20",
    "s": "0 3 14 6 1 2 11 12 17 7 20 4 5 9 16 19 15 13 18 10 8",
    "t": "0 3 15 13 1 2 11 18 17 7 20 8 5 9 16 19 14 6 12 10 4",
    "u": "0 3 15 13 14 6 11 18 17 7 20 8 4 9 16 10 1 2 12 19 5",
    "v": "0 1 2 12 14 6 19 18 17 5 20 8 4 9 16 10 3 15 13 11 7",
    "w": "0 1 2 12 14 13 19 18 7 11 20 8 4 9 16 10 3 15 6 5 17",
}

# Shuffled orders of ADE20K: (step 0 of 50<letter>, steps 1..5 of 100-10<letter>). 100-50<letter> and
# 50<letter> have the same sets of classes; classes of a first step or of a step of 50 are in ascending order.
_ADE_ORDERS = {
    "b": (
        "0 1 9 14 18 22 24 25 27 28 29 32 38 42 45 46 47 48 49 54 56 58 61 62 63 69 74 75 76 77 81 82 84 90 "
        "93 96 100 103 104 109 117 119 121 123 128 129 130 134 135 136 144",
        (
            "11 16 50 64 66 73 89 92 145 146",
            "30 37 51 52 72 85 98 114 115 138",
            "2 35 65 97 110 111 112 118 124 141",
            "4 7 15 41 67 78 79 88 108 139",
            "17 20 59 68 83 94 102 122 127 137",
        ),
    ),
    "c": (
        "0 5 10 11 12 13 16 17 19 20 23 27 28 30 31 32 33 37 43 46 52 56 57 65 66 69 70 74 76 77 79 82 83 "
        "86 87 105 109 110 111 119 128 129 132 133 134 138 142 143 144 146 147",
        (
            "3 4 7 18 39 64 73 101 113 137",
            "47 51 55 60 62 80 116 127 140 148",
            "22 42 49 58 59 89 91 92 108 125",
            "2 38 53 100 104 117 130 131 141 145",
            "15 21 72 75 88 93 103 107 122 150",
        ),
    ),
}


@dataclass(frozen=True)
class Task:
    """An ordered list of steps, each a tuple of dataset class ids; background (0) comes first."""

    name: str
    dataset: str
    steps: Steps

    @property
    def order(self) -> tuple[int, ...]:
        """Dataset class id of each network output."""
        return tuple(c for step in self.steps for c in step)

    @property
    def num_steps(self) -> int:
        """Number of steps, step 0 included."""
        return len(self.steps)

    def new_classes(self, step: int) -> tuple[int, ...]:
        """Dataset class ids of this step (with background at step 0)."""
        check_step(self, step)
        return self.steps[step]

    def old_classes(self, step: int) -> tuple[int, ...]:
        """Dataset class ids of the earlier steps, in network order."""
        check_step(self, step)
        return tuple(c for classes in self.steps[:step] for c in classes)

    def seen_classes(self, step: int) -> tuple[int, ...]:
        """Old and new class ids, in network order."""
        return self.old_classes(step) + self.steps[step]

    def future_classes(self, step: int) -> tuple[int, ...]:
        """Dataset class ids of the later steps, in network order."""
        check_step(self, step)
        return tuple(c for classes in self.steps[step + 1 :] for c in classes)

    def classes_per_step(self, step: int) -> list[int]:
        """Widths of the classifiers up to and including this step, e.g. ``[16, 1, 1]``."""
        check_step(self, step)
        return [len(classes) for classes in self.steps[: step + 1]]

    def later_classes_per_step(self, step: int) -> list[int]:
        """Number of classes of each step after this one."""
        check_step(self, step)
        return [len(classes) for classes in self.steps[step + 1 :]]


def check_step(task: Task, step: int) -> None:
    """Raise UserError unless ``step`` is one of the task's steps."""
    if not 0 <= step < task.num_steps:
        raise UserError(
            f"--step {step}: task {task.name!r} has {_count(task.num_steps, 'step')}; "
            f"give a number from 0 to {task.num_steps - 1}"
        )


def task_names(dataset: str) -> list[str]:
    """Names of the published tasks of a data set (user data: only ``offline``, besides any ``A-B``)."""
    _check_dataset(dataset)
    return list(_published(dataset))


def get_task(
    dataset: str,
    name: str | None,
    *,
    task_file: Path | None = None,
    num_classes: int | None = None,
    class_order: Sequence[int] | None = None,
    class_order_seed: int | None = None,
) -> Task:
    """A published task, a task by an ``A-B`` name, or a task from a file.

    Args:
        dataset: ``voc``, ``ade``, ``folder`` or ``shapes``.
        name: a published name or one of its synonyms (``15-1``, ``joint``; case-insensitive), or sizes:
            ``10-2`` (10 foreground classes, then 2 per step, the rest in the last step), or all sizes,
            ``10-5-5``. ``None``: the only task of ``task_file``, or its list of steps, named after the file.
        task_file: YAML or JSON file with ``{name: [[0, ...], [...]]}`` or with one list of steps.
        num_classes: number of dataset classes with background; required for ``folder``.
        class_order: foreground class ids in the order of the task.
        class_order_seed: shuffle the foreground classes with this seed instead.

    Raises:
        UserError: unknown data set or task, contradictory options, unreadable or invalid task file or order.
    """
    _check_dataset(dataset)
    num_classes = _resolve_num_classes(dataset, num_classes)
    if task_file is not None:
        if class_order is not None or class_order_seed is not None:
            raise UserError("--task_file and a class order exclude each other: the file fixes the order")
        return Task(*_read_task_file(task_file, name, dataset, num_classes))
    if name is None:
        raise UserError("--task: give a name or a --task_file")

    order = _foreground_order(num_classes, class_order, class_order_seed)
    canonical = _canonical_name(dataset, name, num_classes)
    steps = _published(dataset).get(canonical)
    if dataset == "folder" and canonical == "offline":
        steps = _cut(num_classes, num_classes - 1, 0)
    if steps is None:
        steps = _steps_from_sizes(canonical, num_classes)
        if steps is not None and dataset in ("voc", "ade"):
            _check_last_size(canonical, steps)
    if steps is None:
        raise UserError(_unknown_task(dataset, name))
    natural = tuple(range(num_classes))
    if order != natural and tuple(c for step in steps for c in step) != natural:
        raise UserError(
            f"--task {name!r} fixes its classes and their order; give a class order with a task of all "
            "classes in the order of the ids, such as 15-1 or 100-10"
        )
    return Task(canonical, dataset, tuple(tuple(order[c] for c in step) for step in steps))


# --- names --------------------------------------------------------------------------------------------------


def _check_dataset(dataset: str) -> None:
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset!r}: unknown data set; choose from {', '.join(DATASETS)}")


def _resolve_num_classes(dataset: str, num_classes: int | None) -> int:
    if dataset == "folder":
        if num_classes is None:
            raise UserError("--dataset folder: the number of classes is unknown; list them in classes.txt")
        if num_classes < 2:
            raise UserError(f"--dataset folder: {num_classes} classes; need background and one more")
        return num_classes
    known = _NUM_CLASSES[dataset]
    if num_classes is not None and num_classes != known:
        raise UserError(f"--dataset {dataset} has {known} classes with background, not {num_classes}")
    return known


def _canonical_name(dataset: str, name: str, num_classes: int) -> str:
    """The published name of a synonym: upper case, other dashes, ``15-1``, ``15-5-1``, ``joint``."""
    typed = re.sub(r"[\u2010-\u2015\u2212]", "-", name.strip().lower())
    names = _published(dataset)
    if typed in names:
        return typed
    if typed == "joint":
        return "offline"
    match = re.fullmatch(r"(?P<first>\d+)(-(?P<rest>\d+))?-(?P<width>\d+)(?P<suffix>_?[a-z])?", typed)
    if match is None:
        return typed
    first, width, suffix = int(match["first"]), int(match["width"]), match["suffix"] or ""
    rest = num_classes - 1 - first
    candidates = []
    if width == 1 and match["rest"] in (None, str(rest)):
        # 15-1 and 15-5-1 are both 15-5s; 15-1_b is 15-5s_b; 19-1-1 is 19-1.
        candidates = [f"{first}-{rest}s{suffix}", f"{first}-1{suffix}"]
    elif match["rest"] is None and first == width:
        candidates = [f"{first}{suffix}"]  # ADE20K's 50 is also written 50-50
    return next((candidate for candidate in candidates if candidate in names), typed)


def _unknown_task(dataset: str, name: str) -> str:
    names = task_names(dataset)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    usual = [known for known in names if "_" not in known]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known tasks: {', '.join(usual)}"
    return (
        f"--task {name!r}: unknown task of --dataset {dataset}; {hint}; or any sizes: 10-2 is 10 classes, "
        "then 2 per step"
    )


# --- published tables ---------------------------------------------------------------------------------------


def _cut(num_classes: int, first: int, width: int) -> Steps:
    """Background and ``first`` classes, then ``width`` per step; the last step has the rest."""
    bounds = [0, first + 1, *(range(first + 1 + width, num_classes, width) if width else ())]
    if bounds[-1] < num_classes:
        bounds.append(num_classes)
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _voc_tasks() -> Iterator[tuple[str, Steps]]:
    yield "offline18-20", ((0, 18, 19, 20),)
    for name, (first, width) in _VOC_REGULAR.items():
        yield name, _cut(21, first, width)
    for letter, text in _VOC_ORDERS.items():
        order = _ids(text)
        yield f"15-5s_{letter}", (order[:16], *((c,) for c in order[16:]))
    yield "19-1b", (tuple(c for c in range(21) if c != 5), (5,))


def _ade_tasks() -> Iterator[tuple[str, Steps]]:
    for name, (first, width) in _ADE_REGULAR.items():
        yield name, _cut(151, first, width)
    for letter, (first_50, later) in _ADE_ORDERS.items():
        tens = tuple(_ids(text) for text in later)
        last_50 = tuple(sorted(c for step in tens for c in step))
        first_100 = tuple(c for c in range(151) if c not in last_50)
        middle_50 = tuple(c for c in first_100 if c not in _ids(first_50))
        yield f"100-50{letter}", (first_100, last_50)
        yield f"100-10{letter}", (first_100, *tens)
        yield f"50{letter}", (_ids(first_50), middle_50, last_50)


@cache
def _published(dataset: str) -> dict[str, Steps]:
    if dataset == "folder":
        return {"offline": ()}  # the steps depend on the number of classes
    return dict(_ade_tasks() if dataset == "ade" else _voc_tasks())


# --- custom tasks -------------------------------------------------------------------------------------------


def _foreground_order(
    num_classes: int, class_order: Sequence[int] | None, seed: int | None
) -> tuple[int, ...]:
    """Dataset class ids in the order of the task; background first."""
    if class_order is None and seed is None:
        return tuple(range(num_classes))
    if class_order is not None and seed is not None:
        raise UserError("--class_order and --class_order_seed exclude each other; give one")
    if seed is not None:
        if not 0 <= seed < 2**32:
            raise UserError(f"--class_order_seed {seed}: give a number from 0 to {2**32 - 1}")
        # RandomState's stream is frozen (NEP 19): a seed gives the same order with every numpy version.
        return (0, *(int(c) for c in 1 + np.random.RandomState(seed).permutation(num_classes - 1)))
    order = tuple(class_order or ())
    if 0 not in order:
        order = (0, *order)
    _check_ids(order, num_classes, "--class_order")
    if order[0] != 0:
        raise UserError("--class_order: background (0) must come first, or be left out")
    missing = sorted(set(range(num_classes)) - set(order))
    if missing:
        raise UserError(f"--class_order: class id(s) {_join(missing)} missing; list every class once")
    return order


def _steps_from_sizes(name: str, num_classes: int) -> Steps | None:
    """Steps of ``A-B`` or ``A-B-C...``; None for other names."""
    if not re.fullmatch(r"\d+(-\d+)+", name):
        return None
    sizes = [int(size) for size in name.split("-")]
    foreground = num_classes - 1
    if 0 in sizes:
        raise UserError(f"--task {name!r}: a step without classes; every number must be at least 1")
    if len(sizes) == 2:
        if sizes[0] >= foreground:
            raise UserError(
                f"--task {name!r}: no class is left for step 1; the data has {foreground} foreground classes"
            )
        return _cut(num_classes, *sizes)
    if sum(sizes) != foreground:
        raise UserError(
            f"--task {name!r}: the sizes add up to {sum(sizes)}; the data has {foreground} foreground classes"
        )
    bounds = np.cumsum([0, sizes[0] + 1, *sizes[1:]]).tolist()
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


def _check_last_size(name: str, steps: Steps) -> None:
    """Refuse ``15-6`` of a published data set, a mistyped ``15-5``: step 1 would have 5 classes."""
    if len(steps) == 2 and len(steps[1]) != int(name.split("-")[1]):
        first, rest = len(steps[0]) - 1, len(steps[1])
        raise UserError(
            f"--task {name!r}: only {rest} classes are left for step 1; did you mean {first}-{rest}?"
        )


def _read_task_file(path: Path, name: str | None, dataset: str, num_classes: int) -> tuple[str, str, Steps]:
    """Name, data set and steps of a task in a user's file."""
    text = read_text(path, "task file ")
    content = parse_text(text, f"task file {path}", as_json=path.suffix == ".json")
    if isinstance(content, dict):
        tasks = {str(key): value for key, value in content.items()}
        if name is None and len(tasks) == 1:
            name = next(iter(tasks))
        if name is None:
            raise UserError(f"task file {path}: has {', '.join(tasks) or 'no task'}; choose one with --task")
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.5) or list(tasks)
            raise UserError(f"task file {path}: no task {name!r}; it has {' '.join(', '.join(near).split())}")
        content = tasks[name]
    name = path.stem if name is None else name
    if fault := name_fault(name):
        raise UserError(f"task file {path}: task {name!r} {fault}")
    return name, dataset, _check_steps(content, num_classes, f"task file {path}, task {name!r}")


def read_class_order(path: Path, class_names: Sequence[str]) -> list[int]:
    """Read class ids from a text file with one class per line, as its name or id (``--class_order``).

    Args:
        path: the file; empty lines are skipped.
        class_names: name of each dataset class id; names take precedence over ids.

    Raises:
        UserError: the file cannot be read or a line is not a class. :func:`get_task` checks that every class
            is listed once.
    """
    lines = read_text(path, "--class_order ").splitlines()
    ids = {str(c): c for c in range(len(class_names))} | {name: c for c, name in enumerate(class_names)}
    order = []
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if word and word not in ids:
            near = difflib.get_close_matches(word, class_names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "give the name or id of a class"
            raise UserError(f"--class_order {path}:{number}: {word!r} is not a class; {hint}")
        if word:
            order.append(ids[word])
    return order


def _check_steps(content: object, num_classes: int, where: str) -> Steps:
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: expected a list of steps, e.g. [[0, 1, 2], [3], [4]]")
    for i, step in enumerate(content):
        if not isinstance(step, list) or not all(type(c) is int for c in step):
            raise UserError(f"{where}: step {i} must be a list of class ids, e.g. [3, 4]")
        if not step:
            raise UserError(f"{where}: step {i} has no class")
    _check_ids([c for step in content for c in step], num_classes, where)
    if content[0][0] != 0:
        raise UserError(f"{where}: background (0) must be the first class of step 0")
    return tuple(tuple(step) for step in content)


def _check_ids(ids: Sequence[int], num_classes: int, where: str) -> None:
    unknown = sorted({c for c in ids if not 0 <= c < num_classes})
    if unknown:
        raise UserError(
            f"{where}: unknown class id(s) {_join(unknown)}; the data set has 0 to {num_classes - 1}"
        )
    twice = sorted({c for c in ids if list(ids).count(c) > 1})
    if twice:
        raise UserError(f"{where}: class id(s) {_join(twice)} listed more than once")


def _join(ids: Sequence[int]) -> str:
    return ", ".join(str(c) for c in ids)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
