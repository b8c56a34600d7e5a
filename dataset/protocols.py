"""Training images of a step by protocol, from the image-level labels of a data set.

- ``overlapped``: images with a new class (MiB, arXiv 2002.00718).
- ``disjoint`` and ``sequential``: of these, images without a later class.
- ``partitioned``: every image goes to one of its classes, drawn at random, and with it to that class's step
  (CISS, arXiv 2405.09858).

Training labels show the step's classes only, with ``sequential`` also the earlier ones.

``task_indices`` applies the rule of the published lists of a data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from dataset.image_labels import DAMAGED_ARRAY, BoolArray, label_matrix
from tasks import Steps, Task, check_step, get_task, task_names
from utils.errors import UserError
from utils.labels import VOID

Protocol = Literal["sequential", "disjoint", "overlapped", "partitioned"]

_PUBLISHED = Path(__file__).with_name("published_splits.json")

# ADE20K: the published 100-50 lists are those of 100-10 with steps 1..5 merged.
_MERGED = {"100-50": "100-10", "100-50b": "100-10b"}


def step_indices(
    image_labels: Sequence[Collection[int]],
    steps: Sequence[Sequence[int]],
    step: int,
    protocol: Protocol,
    *,
    partition_seed: int = 0,
) -> list[int]:
    """Ascending indices of the training images of a step.

    Args:
        image_labels: class ids of every image (background and void are ignored).
        steps: dataset class ids of every step.
        step: index into ``steps``.
        protocol: see the module's docstring.
        partition_seed: of ``partitioned``; the published lists have 0.

    Raises:
        UserError: unknown step or protocol.
    """
    if protocol not in get_args(Protocol):
        raise UserError(f"protocol {protocol!r}: unknown; choose from {', '.join(get_args(Protocol))}")
    if not 0 <= step < len(steps):
        raise UserError(f"--step {step}: the task's steps are 0 to {len(steps) - 1}")
    matrix = label_matrix(image_labels)
    if protocol == "partitioned":
        return _indices(_drawn_partition(matrix, steps, partition_seed) == step)
    chosen = np.logical_or.reduce(matrix[:, list(steps[step])], axis=1)
    if protocol != "overlapped":
        seen = {c for classes in steps[: step + 1] for c in classes}
        chosen &= ~matrix[:, [c for c in range(256) if c not in seen]].any(axis=1)
    return _indices(chosen)


def task_indices(
    task: Task,
    step: int,
    protocol: Protocol,
    image_labels: Sequence[Collection[int]],
    *,
    partition_seed: int = 0,
) -> list[int]:
    """Ascending indices of the published list of a task's step.

    ADE20K's disjoint (and sequential) lists give every image to one step (``_greedy_partition``); those of
    ``100-50`` and ``100-50b`` are the lists of ``100-10`` and ``100-10b`` with steps 1..5 merged. All others
    follow ``step_indices``.

    Raises:
        UserError: unknown step or protocol.
    """
    check_step(task, step)
    if task.dataset != "ade" or protocol in ("overlapped", "partitioned"):
        return step_indices(image_labels, task.steps, step, protocol, partition_seed=partition_seed)
    finer = _finer_steps(task)
    owner = _greedy_partition(label_matrix(image_labels), task.steps if finer is None else finer)
    if finer is None:
        return _indices(owner == step)
    return _indices(owner == 0 if step == 0 else owner > 0)


def _finer_steps(task: Task) -> Steps | None:
    """Steps of the task whose merged lists are those of this ADE20K task, found by its classes; or None."""
    for name, finer in _MERGED.items():
        if task.steps == get_task("ade", name).steps:
            return get_task("ade", finer).steps
    return None


def why_empty(
    task: Task,
    step: int,
    protocol: Protocol,
    image_labels: Sequence[Collection[int]],
    class_names: Sequence[str] = (),
) -> str:
    """Why a step has no image, and the remedy; for a message."""
    new = [c for c in task.new_classes(step) if c != 0]
    if not any(c in ids for ids in image_labels for c in new):
        return f"no training mask shows {named_classes(new, class_names)}; correct the masks or the task"
    if protocol == "partitioned" or (task.dataset == "ade" and protocol != "overlapped"):
        instead = " instead of --partitioned" if protocol == "partitioned" else ""
        return (
            "every image with its classes belongs to another step; "
            f"--overlap{instead} gives an image to several"
        )
    return (
        f"every image with its classes also shows one of a later step, which {protocol} leaves out; "
        "--overlap takes these images too"
    )


def named_classes(ids: Sequence[int], class_names: Sequence[str] = ()) -> str:
    """The first class ids with their names, for a message."""
    shown = [f"{c} {class_names[c]}" if c < len(class_names) else f"class {c}" for c in ids[:5]]
    more = f" and {len(ids) - 5} more classes" if len(ids) > 5 else ""
    return ", ".join(shown) + more


def _indices(chosen: BoolArray) -> list[int]:
    return np.flatnonzero(chosen).tolist()


def _step_of_class(steps: Sequence[Sequence[int]]) -> dict[int, int]:
    return {c: s for s, classes in enumerate(steps) for c in classes if c not in (0, VOID)}


def _drawn_partition(matrix: BoolArray, steps: Sequence[Sequence[int]], seed: int) -> npt.NDArray[np.int64]:
    """The step of every image, -1 for an image without a class of the task; int64, shape (images,).

    Numbers are drawn image by image, as in CISS's program, so that its published lists of VOC result.
    """
    owner = _step_of_class(steps)
    rng = np.random.RandomState(seed)
    result = np.full(len(matrix), -1, dtype=np.int64)
    for i, shown in enumerate(matrix):
        if classes := [c for c in np.flatnonzero(shown).tolist() if c in owner]:
            result[i] = owner[classes[rng.choice(len(classes))]]
    return result


def _greedy_partition(matrix: BoolArray, steps: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """The step of every image, -1 for an image without a class; int64, shape (images,).

    Greedy rule, reconstructed from the published ADE20K lists: an image goes to the step of its class with
    the highest score, which grows with rarity and with the fraction of the class's images not yet assigned.
    The order of images and of floating-point operations decides ties, so neither may be changed.
    """
    owner = _step_of_class(steps)
    known = np.zeros(256, dtype=bool)
    known[list(owner)] = True
    matrix = matrix & known
    count = matrix.sum(axis=0).tolist()
    given = [0] * 256
    result = np.full(len(matrix), -1, dtype=np.int64)

    filled = np.flatnonzero(matrix.any(axis=1))
    visits = filled[np.argsort(matrix[filled].argmax(axis=1), kind="stable")]
    for i in visits.tolist():
        classes = np.flatnonzero(matrix[i]).tolist()
        total = sum(count[c] for c in classes)
        best = max(classes, key=lambda c: 120 * (1 - given[c] / count[c]) + total / count[c])
        step = owner[best]
        result[i] = step
        for c in classes:
            if owner[c] == step:
                given[c] += 1
    return result


# --- Lists on disk ------------------------------------------------------------------------------------------


def load_step_list(splits_dir: Path, step: int, num_images: int) -> list[int]:
    """Image indices of ``<splits_dir>/train-<step>.npy`` (``--splits_dir``), in the file's order.

    Raises:
        UserError: the file is missing or not a 1-D array of distinct indices below ``num_images``.
    """
    path = splits_dir / f"train-{step}.npy"
    try:
        indices = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"--splits_dir: {path} is missing; the folder needs one train-<step>.npy per step"
        ) from error
    except DAMAGED_ARRAY as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--splits_dir: {path} is not a readable .npy array ({reason})") from error
    if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(f"--splits_dir: {path} must be a one-dimensional array of integers")
    if indices.size == 0:
        raise UserError(f"--splits_dir: {path} is empty; step {step} would have no image")
    outside = indices[(indices < 0) | (indices >= num_images)]
    if outside.size:
        raise UserError(
            f"--splits_dir: {path} has index {outside[0]}; "
            f"the training set has {num_images} images (0 to {num_images - 1}); correct the list"
        )
    places: dict[int, int] = {}
    for place, index in enumerate(indices.tolist()):
        if (first := places.setdefault(index, place)) != place:
            raise UserError(
                f"--splits_dir: {path} lists image {index} at positions {first} and {place}; remove one"
            )
    return indices.tolist()


def list_digest(indices: Collection[int]) -> str:
    """sha256 of the sorted indices joined by commas, as in ``published_splits.json``."""
    return hashlib.sha256(",".join(str(i) for i in sorted(indices)).encode()).hexdigest()


def published_list(task: Task, step: int, protocol: Protocol) -> tuple[int, str] | None:
    """(number of images, digest) of the published list; None if unknown.

    ``sequential`` has the images of ``disjoint``. Tasks are recognised by their classes, so a task file with
    other classes under a published name has no published list.
    """
    if task.dataset not in ("voc", "ade") or task.name not in task_names(task.dataset):
        return None
    if task.steps != get_task(task.dataset, task.name).steps or protocol == "partitioned":
        return None
    wanted = "overlapped" if protocol == "overlapped" else "disjoint"
    key = (task.dataset, task.name, step, wanted)
    for entry in json.loads(_PUBLISHED.read_text(encoding="utf-8")):
        if (entry["dataset"], entry["task"], entry["step"], entry["protocol"]) == key:
            return entry["images"], entry["sha256"]
    return None
