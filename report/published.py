"""The papers' numbers, from ``report/published.csv``.

The column ``background`` says whether the means include the background. It was inferred per table: only one
choice makes the old, new and all columns consistent (MiB's "all" of VOC is the mean over 20 classes, that of
the other papers over 21).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from report.groups import Group, Method
from report.reading import published_steps

_TABLE = Path(__file__).parent / "published.csv"


@dataclass(frozen=True)
class Published:
    """A row of the table; mIoU in percent."""

    dataset: str
    task: str
    protocol: str
    backbone: str
    method: str
    miou_old: float
    miou_new: float
    miou_all: float
    background: bool
    source: str


@cache
def table() -> tuple[Published, ...]:
    """All rows."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(map(_published, csv.DictReader(file)))


def _published(row: dict[str, Any]) -> Published:
    numbers = {key: float(row[key]) for key in ("miou_old", "miou_new", "miou_all")}
    return Published(**{**row, **numbers, "background": row["background"] == "with"})


def of_group(group: Group) -> list[Published]:
    """The rows with the group's data set, task, protocol and backbone."""
    wanted = (group.dataset, group.task, group.protocol, group.backbone)
    return [row for row in table() if (row.dataset, row.task, row.protocol, row.backbone) == wanted]


def of_method(group: Group, method: Method) -> list[Published]:
    """The rows of a method; several if later papers reproduced it, none for another class order."""
    run = method.runs[0]
    if not method.joint and run.steps != published_steps(run.dataset, run.task):
        return []
    names = method.published_names()
    return [row for row in of_group(group) if row.method.split(" (")[0].upper() in names]
