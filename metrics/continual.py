"""Metrics of a step: IoU of groups of classes, and forgetting.

As published tables count, "first" are the classes of step 0 and "later" those of all steps after it. "Old"
are the classes of the steps before this one, "new" those of this step. A class without labels and predictions
has IoU NaN and is excluded from every mean; ADE20K's "other" is always excluded. Values are fractions; tables
show percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.lazy import torch
from utils.tables import format_table

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Results:
    """Metrics of one evaluation; NaN if undefined.

    Attributes:
        miou_all: mean IoU over all classes seen so far, background included.
        miou_first, miou_first_no_background: over the classes of step 0.
        miou_later: over the classes of all steps after step 0.
        average_miou_all: mean of ``miou_all`` over the steps up to this one ("avg").
        miou_old, miou_old_no_background: over the classes of earlier steps.
        miou_new, miou_new_no_background: over the classes of this step; they differ at step 0 only.
        harmonic_mean: of ``miou_old`` and ``miou_new``.
        harmonic_mean_first_later: of ``miou_first`` and ``miou_later``.
        pixel_accuracy: share of labelled pixels predicted correctly.
        mean_accuracy: mean over the labelled classes of the share of their pixels predicted correctly.
        mean_forgetting: mean of ``forgetting``.
        class_iou, class_accuracy: by class name, in network order; ignored classes have no entry.
        class_pixels: number of labelled pixels of each class.
        forgetting: by name of each old class, its IoU after the step that learnt it minus its IoU now.
        old_classes: ``classes_old`` under its name in result files: number of old classes, with background.
        indices: network index of each name in ``class_iou``.
    """

    miou_all: float
    miou_first: float
    miou_first_no_background: float
    miou_later: float
    average_miou_all: float
    miou_old: float
    miou_old_no_background: float
    miou_new: float
    miou_new_no_background: float
    harmonic_mean: float
    harmonic_mean_first_later: float
    pixel_accuracy: float
    mean_accuracy: float
    mean_forgetting: float
    class_iou: dict[str, float]
    class_accuracy: dict[str, float]
    class_pixels: dict[str, int]
    forgetting: dict[str, float]
    old_classes: int
    indices: dict[str, int]

    def table(self) -> str:
        """Two text tables: every class, then the means, in percent."""
        return "\n\n".join(format_table(*table) for table in self.tables())

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Headers and rows of two tables: every class, then the means, in percent."""
        classes = [
            [
                "old" if self.indices[name] < self.old_classes else "new",
                name,
                _percent(iou),
                _percent(self.class_accuracy[name]),
                _percent(self.forgetting.get(name, math.nan)),
                str(self.class_pixels[name]),
            ]
            for name, iou in self.class_iou.items()
        ]
        means = [
            ("mIoU first (step 0), with background", self.miou_first),
            ("mIoU first (step 0), without background", self.miou_first_no_background),
            ("mIoU later (all steps after step 0)", self.miou_later),
            ("harmonic mean of first and later", self.harmonic_mean_first_later),
            ("mIoU old (before this step), with background", self.miou_old),
            ("mIoU old (before this step), without background", self.miou_old_no_background),
            ("mIoU new (this step)", self.miou_new),
            ("harmonic mean of old and new", self.harmonic_mean),
            ("mIoU all", self.miou_all),
            ("mean of mIoU all over the steps so far", self.average_miou_all),
            ("pixel accuracy", self.pixel_accuracy),
            ("mean accuracy", self.mean_accuracy),
            ("mean forgetting of old classes", self.mean_forgetting),
        ]
        if not self.old_classes:  # step 0: only the first classes exist
            means = [*means[:2], means[8], *means[10:12]]
        return [
            (["", "class", "IoU %", "accuracy %", "forgotten", "pixels"], classes),
            (["", "%"], [[name, _percent(value)] for name, value in means]),
        ]

    def to_json(self) -> dict[str, Any]:
        """All attributes as JSON types, NaN as None."""
        content: dict[str, Any] = _without_nan(asdict(self))
        return content

    def csv_row(self, step: int, num_classes: int) -> list[str]:
        """CSV row as PLOP and SATS write it: step, IoU per network index, mean IoU.

        A class of a later step is "x", a class without IoU or not evaluated "X".
        """
        seen = max(self.indices.values(), default=-1) + 1
        cells = ["X"] * seen + ["x"] * (num_classes - seen)
        for name, index in self.indices.items():
            if not math.isnan(self.class_iou[name]):
                cells[index] = str(self.class_iou[name])
        return [str(step), *cells, str(self.miou_all)]


def summarise(
    confusion: torch.Tensor | Array,
    class_names: Sequence[str],
    classes_per_step: Sequence[int] = (),
    *,
    ignore: AbstractSet[int] = frozenset(),
    earlier: Mapping[int, Mapping[str, Any]] | None = None,
) -> Results:
    """Compute the metrics of a step from its confusion matrix.

    Args:
        confusion: C×C counts, rows are labels, columns predictions, in network order.
        class_names: C different names.
        classes_per_step: number of classes of each step up to this one, the first with background; empty: all
            are those of step 0.
        ignore: network indices that are not evaluated; their labels count as void.
        earlier: results of the steps before (``to_json``), by step; those that are missing leave forgetting
            and average undefined where they are needed.
    """
    counts = np.asarray(confusion if isinstance(confusion, np.ndarray) else confusion.cpu(), dtype=np.float64)
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(f"{len(class_names)} class names for a confusion matrix of shape {counts.shape}")
    if len(set(class_names)) != len(class_names):
        raise ValueError("class names must differ")
    counts[list(ignore), :] = 0
    right, labelled, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    iou = _ratio(right, labelled + predicted - right)
    accuracy = _ratio(right, labelled)
    place = np.arange(len(class_names))
    kept = ~np.isin(place, list(ignore))
    named = {class_names[index]: index for index in np.flatnonzero(kept).tolist()}
    first = place < (classes_per_step or [len(class_names)])[0]
    classes_old = sum(classes_per_step[:-1])
    old, foreground = place < classes_old, place > 0

    def mean_iou(*chosen: Array) -> float:
        return _mean(iou[np.logical_and.reduce([kept, *chosen])])

    earlier = earlier or {}
    learnt = _learnt(earlier)
    forgetting = {
        name: learnt[name] - float(iou[index])
        for name, index in named.items()
        if index < classes_old and name in learnt
    }
    miou_all, miou_old, miou_new = mean_iou(), mean_iou(old), mean_iou(~old)
    miou_first, miou_later = mean_iou(first), mean_iou(~first)
    complete = all(step in earlier for step in range(len(classes_per_step) - 1))
    before = [math.nan if (miou := result.get("miou_all")) is None else miou for result in earlier.values()]
    return Results(
        miou_all=miou_all,
        miou_first=miou_first,
        miou_first_no_background=mean_iou(first, foreground),
        miou_later=miou_later,
        average_miou_all=math.fsum([*before, miou_all]) / (len(before) + 1) if complete else math.nan,
        miou_old=miou_old,
        miou_old_no_background=mean_iou(old, foreground),
        miou_new=miou_new,
        miou_new_no_background=mean_iou(~old, foreground),
        harmonic_mean=_harmonic_mean(miou_old, miou_new),
        harmonic_mean_first_later=_harmonic_mean(miou_first, miou_later),
        pixel_accuracy=float(right.sum() / labelled.sum()) if labelled.any() else math.nan,
        mean_accuracy=_mean(accuracy[kept]),
        mean_forgetting=_mean(forgetting.values()),
        class_iou={name: float(iou[index]) for name, index in named.items()},
        class_accuracy={name: float(accuracy[index]) for name, index in named.items()},
        class_pixels={name: int(labelled[index]) for name, index in named.items()},
        forgetting=forgetting,
        old_classes=classes_old,
        indices=named,
    )


def _learnt(earlier: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """IoU of each class after the first of the earlier steps that has one."""
    found: dict[str, float] = {}
    for _, result in sorted(earlier.items()):
        found = {name: value for name, value in result["class_iou"].items() if value is not None} | found
    return found


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient; NaN if the denominator is 0."""
    quotient = np.full(denominator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean(values: Iterable[float] | Array) -> float:
    """Mean of the values other than NaN; NaN without such values."""
    finite = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _harmonic_mean(a: float, b: float) -> float:
    """2ab/(a+b); 0 if both are 0, NaN if either is NaN."""
    return 2 * a * b / (a + b) if a + b != 0 else 0.0


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
