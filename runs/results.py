"""Files of a step's results: JSON, CSV and the confusion matrix."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from metrics.continual import Results
from runs.files import CONFUSION, RESULTS, step_file
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.labels import VOID
from utils.lazy import torch
from utils.option_types import Number, whole
from utils.tables import csv_text

Array = np.ndarray[Any, np.dtype[Any]]

_IN_ALL_VERSIONS = ("class_iou", "indices")


def write_results(
    run_dir: Path,
    results: Results,
    *,
    step: int,
    num_classes: int,
    csv_name: str,
    evaluation: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``results_<step>.json`` and the step's row of the CSV file into the run's folder.

    An earlier row and earlier files of the step are replaced, atomically.

    Args:
        run_dir: folder of the run, made if missing.
        results: numbers of the step.
        step: number of the step.
        num_classes: number of classes of the whole task.
        csv_name: name of the CSV file, published as ``<date>_<dataset>_<task>_<name>.csv``.
        evaluation: options of the evaluation that the user typed, as JSON types; saved with the results.

    Returns:
        The paths of the files written.

    Raises:
        UserError: a file cannot be written, or the existing CSV file cannot be read.
    """
    json_path, csv_path = step_file(run_dir, RESULTS, step), run_dir / csv_name
    content = {"step": step, **results.to_json()} | ({"evaluation": dict(evaluation)} if evaluation else {})
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(json_path, f"{text}\n")
    rows = [row for row in _read_rows(csv_path) if row[0] != str(step)]
    rows.append(results.csv_row(step, num_classes))
    rows.sort(key=lambda row: int(row[0]))
    atomic_write_text(csv_path, csv_text(rows))
    return [json_path, csv_path]


def read_step_results(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Read what ``write_results`` of this or an earlier version wrote for a step; None without a file.

    Raises:
        UserError: the file cannot be read, or has other content.
    """
    path = step_file(run_dir, RESULTS, step)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fault = _fault(content, step)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise UserError(f"{path}: is not a results file ({fault}); remove it, or test the step again")
    return content


def _fault(content: Any, step: int) -> str | None:
    """What a results file has otherwise than ``Results``; None if nothing."""
    if not isinstance(content, dict):
        return "it has no names and values"
    if content.get("step") != step:
        return f"its step is {_shown(content.get('step'))}, not {step}"
    for name, kind in ((field.name, str(field.type)) for field in fields(Results)):
        if name not in content:
            if name in _IN_ALL_VERSIONS:
                return f"it has no {name}"
            continue
        by_class, allowed = kind.startswith("dict"), _range(name, kind)
        if by_class and not isinstance(content[name], dict):
            return f"{name} is {_shown(content[name])}, not a number per class"
        for label, value in content[name].items() if by_class else [("", content[name])]:
            undefined = value is None and allowed.kind is float
            if not undefined and not (type(value) in (int, allowed.kind) and value in allowed):
                of = f" of {label}" if by_class else ""
                return f"{name}{of} is {_shown(value)}, not {allowed.description}"
    if content["class_iou"].keys() != content["indices"].keys():
        return "class_iou and indices name different classes"
    return None if isinstance(content.get("evaluation", {}), dict) else "evaluation is not options and values"


def _range(name: str, kind: str) -> Number:
    """The range of a number of ``Results``, by the attribute's name and type."""
    if "int" in kind:
        return whole(0, 2**63 - 1 if name == "class_pixels" else VOID)
    return Number(float, -1 if "forgetting" in name else 0, 1)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def read_confusion(path: Path) -> tuple[Array, list[str]]:
    """Read counts (C×C, int64, rows are labels) and class names written by ``write_confusion``.

    Raises:
        UserError: the file cannot be read as such.
    """
    try:
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        counts = np.array([[int(cell) for cell in row[1:]] for row in rows], dtype=np.int64)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a confusion matrix ({error}); move it away") from error
    names = header[1:]
    if counts.shape != (len(names), len(names)):
        raise UserError(f"{path}: is not a square confusion matrix; move it away")
    return counts, names


def write_confusion(
    run_dir: Path, step: int, confusion: torch.Tensor | Array, class_names: Sequence[str]
) -> Path:
    """Write ``confusion_<step>.csv``: C×C counts, rows are labels, columns predictions; C class names.

    Raises:
        UserError: the file cannot be written.
    """
    path = step_file(run_dir, CONFUSION, step)
    counts = torch.as_tensor(confusion).cpu().long().tolist()
    if len(counts) != len(class_names):
        raise ValueError(f"{len(class_names)} class names for a confusion matrix of {len(counts)} rows")
    rows = [[name, *row] for name, row in zip(class_names, counts, strict=True)]
    atomic_write_text(path, csv_text([["label \\ prediction", *class_names], *rows]))
    return path


def _read_rows(path: Path) -> list[list[str]]:
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV file of results; move it away") from error
    if not all(row and row[0].isdecimal() for row in rows):
        raise UserError(f"{path}: is not a CSV file of results (step, IoU per class, mean IoU); move it away")
    return rows
