"""Exemplar memory: a few class-balanced images of earlier steps (``--memory``; SSUL-M, arXiv 2106.11562).

The memory of step s is chosen from the memory and the training images of step s−1, as it would be without
access to earlier data.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.protocols import list_digest
from tasks import Task, check_step
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.labels import VOID

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exemplar:
    """A training image and the step that stored it; its labels are the classes seen up to that step.

    ``classes``: those that it was chosen by, network indices; of ``choose_listed`` only.
    """

    index: int
    step: int
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The exemplars of a step, chosen deterministically from the memory and images of the steps before.

    Attributes:
        image_labels: class ids of every training image (background and void are ignored).
        task: class order.
        step: the step that trains on the exemplars; none at step 0.
        memory: largest number of images.
        seed: seed of the run.
        candidates: training images of the steps 0, 1, ..., at least up to ``step - 1``.
        in_turn: choose a random image of each class in turn (SSUL-M's released code); else an image of the
            class with the fewest exemplars.
    """

    image_labels: Sequence[Collection[int]]
    task: Task
    step: int
    memory: int
    seed: int
    candidates: Sequence[Sequence[int]]
    in_turn: bool = False

    def choose(self) -> list[Exemplar]:
        """The exemplars, in order of their images.

        Raises:
            UserError: unknown step, or a negative ``memory``.
        """
        check_step(self.task, self.step)
        if self.memory < 0:
            raise UserError(f"--memory {self.memory}: give the number of images to keep, or 0 for none")
        pick = _pick_in_turn if self.in_turn else _pick_balanced
        kept: dict[int, int] = {}
        for current in range(1, self.step + 1):
            # An exemplar that the previous step trained on has that step's labels.
            pool = kept | dict.fromkeys(self.candidates[current - 1], current - 1)
            known = {i: _known(self.image_labels[i], self.task, stored) for i, stored in pool.items()}
            chosen = pick(known, self.memory, np.random.RandomState([self.seed % 2**32, current]))
            kept = {i: pool[i] for i in chosen}
        return [Exemplar(i, stored) for i, stored in sorted(kept.items())]

    def origin(self) -> dict[str, Any]:
        """The inputs as plain values: equal origins mean equal lists."""
        shown = json.dumps([sorted(ids) for ids in self.image_labels])
        return {
            "dataset": self.task.dataset,
            "task": self.task.name,
            "steps": [list(classes) for classes in self.task.steps],
            "step": self.step,
            "memory": self.memory,
            "seed": self.seed,
            "rule": "in turn" if self.in_turn else "fewest first",
            "candidates": [list_digest(indices) for indices in self.candidates[: self.step]],
            "presence": hashlib.sha256(shown.encode()).hexdigest(),
        }


def class_counts(
    exemplars: Sequence[Exemplar], image_labels: Sequence[Collection[int]], task: Task
) -> dict[int, int]:
    """Number of exemplars with each old class (dataset class id -> images), for the log."""
    last = max((exemplar.step for exemplar in exemplars), default=-1)
    counts = {c: 0 for classes in task.steps[: last + 1] for c in classes if c != 0}
    for exemplar in exemplars:
        for c in _known(image_labels[exemplar.index], task, exemplar.step):
            counts[c] += 1
    return counts


def _known(ids: Collection[int], task: Task, step: int) -> set[int]:
    return (set(ids) & set(task.seen_classes(step))) - {0, VOID}


def _pick_balanced(known: Mapping[int, set[int]], memory: int, rng: np.random.RandomState) -> list[int]:
    """Choose images one by one for the class with the fewest so far.

    Of that class's images, the one whose other classes have the fewest: otherwise classes that often occur
    beside others (person) would fill the memory. Ties are broken at random.
    """
    images = sorted(i for i, classes in known.items() if classes)
    shuffled = [images[place] for place in rng.permutation(len(images))]
    classes = rng.permutation(sorted(set().union(*known.values()))).tolist()
    shows = np.array([[c in known[i] for c in classes] for i in shuffled], dtype=np.float64)
    shows = shows.reshape(len(shuffled), len(classes))
    counts, left = np.zeros(len(classes)), shows.sum(axis=0)
    free = np.ones(len(shuffled), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < memory and free.any():
        rarest = int(np.where(left > 0, counts, np.inf).argmin())
        crowd = np.where(free & (shows[:, rarest] > 0), shows @ counts, np.inf)
        pick = int(crowd.argmin())
        free[pick] = False
        counts += shows[pick]
        left -= shows[pick]
        chosen.append(shuffled[pick])
    return chosen


def _pick_in_turn(known: Mapping[int, set[int]], memory: int, rng: np.random.RandomState) -> list[int]:
    """Choose a random image for each class in turn, in a random order of classes."""
    images = [(image, known[image]) for image in rng.permutation(sorted(known)).tolist()]
    classes = rng.permutation(sorted(set().union(*known.values()))).tolist()
    return [image for image, _ in balanced_choice(images, classes, memory)]


def choose_listed(
    kept: Sequence[Exemplar], listed: Mapping[int, Collection[int]], step: int, memory: int, seed: int
) -> list[Exemplar]:
    """Choose at most ``memory`` images for a step by classes that were listed for each (DKD-M, STAR-M).

    Args:
        kept: exemplars of the step before.
        listed: classes of each training image of the step before, network indices.
        step: the step that trains on the exemplars, from 1.
        memory: number of images.
        seed: seed of the run.
    """
    candidates = {exemplar.index: exemplar for exemplar in kept}
    for index, classes in listed.items():
        known = set(classes).union(candidates[index].classes if index in candidates else ())
        candidates[index] = Exemplar(index, step - 1, tuple(sorted(known)))
    rng = np.random.RandomState([seed % 2**32, step])
    order = rng.permutation(sorted(candidates)).tolist()
    turns = rng.permutation(sorted(set().union(*(c.classes for c in candidates.values())))).tolist()
    chosen = balanced_choice([(index, candidates[index].classes) for index in order], turns, memory)
    return [candidates[index] for index in sorted(index for index, _ in chosen)]


def balanced_choice(
    candidates: Sequence[Sequence[Any]], classes: Sequence[int], number: int
) -> list[Sequence[Any]]:
    """Choose candidates for each class in turn: the first that is left and shows it (DKD-M, STAR-M).

    Args:
        candidates: [name, classes] of each, in the order of preference.
        classes: in the order of their turns.
        number: of candidates to choose at most; fewer if no candidate is left that shows any of the classes.

    Returns:
        The chosen candidates, by the class that each was chosen for, in ascending order.
    """
    left, chosen = list(candidates), list[tuple[int, Sequence[Any]]]()
    before = -1
    while before < len(chosen) < number:
        before = len(chosen)
        for c in classes:
            found = next((place for place, (_, shown) in enumerate(left) if c in shown), None)
            if found is not None and len(chosen) < number:
                chosen.append((c, left.pop(found)))
    return [candidate for _, candidate in sorted(chosen, key=lambda pair: pair[0])]


def save_exemplars(path: Path, exemplars: Sequence[Exemplar], origin: Mapping[str, Any]) -> None:
    """Write a list and its origin as JSON, atomically."""
    pairs = [[each.index, each.step, *([each.classes] if each.classes else [])] for each in exemplars]
    atomic_write_text(path, json.dumps({"origin": dict(origin), "exemplars": pairs}, indent=1))


def load_exemplars(path: Path, origin: Mapping[str, Any]) -> list[Exemplar]:
    """Read a list of :func:`save_exemplars`; keys that ``origin`` lacks are not compared.

    Raises:
        UserError: the file is missing, damaged, or of another origin.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        exemplars = [
            Exemplar(int(index), int(step), tuple(c for listed in classes for c in listed))
            for index, step, *classes in content["exemplars"]
        ]
        found = content["origin"]
    except OSError as error:
        raise UserError(f"exemplar list {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"exemplar list {path}: is damaged") from error
    differing = [
        key for key, value in origin.items() if not isinstance(found, dict) or found.get(key) != value
    ]
    if differing:
        raise UserError(f"exemplar list {path}: was made from another {', '.join(differing)}")
    return exemplars


def stored_exemplars(path: Path, origin: Mapping[str, Any]) -> list[Exemplar] | None:
    """The list on disk; None, with a log line, if it is not one of this origin."""
    if not path.is_file():
        return None
    try:
        exemplars = load_exemplars(path, origin)
    except UserError as error:
        log.info("%s; it is made again", error)
        return None
    log.info("exemplars: loaded from %s", path)
    return exemplars
