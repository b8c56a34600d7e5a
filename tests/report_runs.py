"""Folders of runs as training leaves them, written by the functions that it calls; the numbers are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metrics.continual import summarise
from runs.history import HistoryWriter
from runs.options import write_run_options
from runs.results import write_confusion, write_results
from tasks import get_task
from utils.visualize import write_samples


def write_run(
    logdir: Path,
    method: str,
    seed: int,
    *,
    task: str = "15-5",
    dataset: str = "voc",
    model: str = "deeplab",
    backbone: str = "resnet101",
    done: Sequence[int] = (0, 1),
    going_on: int | None = None,
    pictures: int = 2,
    by_step: Mapping[int, Mapping[str, object]] | None = None,
    **options: object,
) -> Path:
    """A run with results of the steps ``done``, and training of step ``going_on`` under way.

    With ``by_step`` its options are kept for each of these steps, as they are in ``by_step`` otherwise.
    """
    order = get_task(dataset, task)
    folder = logdir / f"{task}-{dataset}_{method}_{seed}"
    known = {"dataset": dataset, "task": task, "protocol": "overlapped", "model": model, "backbone": backbone}
    mine = {"method": method, "name": f"{method}_{seed}", "random_seed": seed, "epochs": 4, **options}
    write_run_options(folder, {**known, **mine}, order.steps)
    for step, others in (by_step or {}).items():
        write_run_options(folder, {**known, **mine, **others}, order.steps, step=step, lr=0.01)
    rng = np.random.default_rng([seed, *method.encode()])
    for step in [*done, *([] if going_on is None else [going_on])]:
        _train(folder, step, rng, epochs=2 if step == going_on else 4)
        if step != going_on:
            _evaluate(folder, order, step, rng, pictures)
    return folder


def exchange_classes(folder: Path) -> None:
    """Let a VOC run's class order have classes 3 and 18 in each other's place."""
    path = folder / "run.json"
    known = json.loads(path.read_text())
    known["steps"] = [
        [{3: 18, 18: 3}.get(class_id, class_id) for class_id in step] for step in known["steps"]
    ]
    path.write_text(json.dumps(known))


def _train(folder: Path, step: int, rng: np.random.Generator, epochs: int) -> None:
    history = HistoryWriter(folder, step, images=8)
    for iteration in range(10, 40 * epochs + 1, 10):
        ce = 2 * np.exp(-iteration / 80) + 0.05 * rng.random()
        losses = {"ce": ce, "total": ce} if step == 0 else {"ce": ce, "kd": 0.4 * ce, "total": 1.4 * ce}
        history.progress(iteration, 1 + (iteration - 1) // 40, losses, lr=0.01 * (1 - iteration / 200))
        if iteration % 40 == 0:
            history.validation(iteration // 40, 0.5)


def _evaluate(folder: Path, order, step: int, rng: np.random.Generator, pictures: int) -> None:
    classes = order.classes_per_step(step)
    names = [f"class {index}" if index else "background" for index in range(sum(classes))]
    confusion = rng.integers(0, 40, (len(names), len(names)))
    confusion += np.diag(rng.integers(100, 2000, len(names)))
    paths = [folder / f"results_{number}.json" for number in range(step)]
    earlier = {number: json.loads(path.read_text()) for number, path in enumerate(paths) if path.is_file()}
    results = summarise(confusion, names, classes, earlier=earlier)
    write_results(folder, results, step=step, num_classes=len(order.order), csv_name="iou.csv")
    write_confusion(folder, step, confusion, names)
    shown = [picture(index, len(names)) for index in range(pictures)]
    images, truths = [image for image, _ in shown], [truth for _, truth in shown]
    predictions = [np.where(rng.random(truth.shape) < 0.2, 0, truth) for truth in truths]
    write_samples(folder / "samples", images, truths, predictions, step)


def picture(seed: int, classes: int, side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A picture H×W×3 of two discs, and its mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, : side + 24]
    mask = np.zeros(rows.shape, dtype=np.int64)
    for _ in range(2):
        row, column = rng.integers(20, side - 20, 2)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < 18**2] = rng.integers(1, classes)
    image = (
        90 + 60 * np.sin(rows / 9)[..., None] + 7.0 * mask[..., None] + rng.integers(0, 20, (*mask.shape, 3))
    )
    return image.clip(0, 255).astype(np.uint8), mask
