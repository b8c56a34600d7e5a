"""The papers' numbers, from ``report/published.csv``; ``python -m report.published`` prints them.

The column ``background`` is the convention of a row's means, inferred from its numbers: with only one of them
"first", "later" and "all" agree.

    with          "first" and "all" count the background (PLOP, SDR, SATS, DKD, STAR)
    without       none counts it (MiB's tables of VOC)
    all only      "all" counts it, "first" does not
    inconsistent  the three numbers fit none of these within 0.15 points
    (empty)       unknown: the row has no "first" and "later"

``method`` is named as ``--method``; "A or B": the better of the two. ``remark`` is what else a reader must
know: a rerun by other authors, released weights, another name in print.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from report.groups import Group, Method
from report.reading import published_steps

TABLE = Path(__file__).parents[1] / "published.csv"


@dataclass(frozen=True)
class Published:
    """A row of the table; mIoU in percent over the classes of step 0, of all later steps and all of them."""

    dataset: str
    task: str
    protocol: str
    backbone: str
    method: str
    miou_first: float | None
    miou_later: float | None
    miou_all: float | None
    background: str
    remark: str
    source: str

    @property
    def means(self) -> dict[str, float | None]:
        """The three means by name."""
        return {"first": self.miou_first, "later": self.miou_later, "all": self.miou_all}

    @property
    def convention(self) -> str:
        """How its means count the background, in words; empty for the usual one."""
        return {
            "with": "",
            "without": "without background",
            "all only": 'background in "all" only',
            "inconsistent": "the numbers do not agree with each other",
            "": "background not said",
        }[self.background]


@cache
def table() -> tuple[Published, ...]:
    """All rows."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(map(_published, csv.DictReader(file)))


def _published(row: dict[str, str]) -> Published:
    def number(text: str) -> float | None:
        return float(text) if text else None

    first, later, over_all = (number(row.pop(f"miou_{key}")) for key in ("old", "new", "all"))
    return Published(**row, miou_first=first, miou_later=later, miou_all=over_all)


def of_group(group: Group) -> list[Published]:
    """The rows with the group's data set, task, protocol and backbone."""
    wanted = (group.dataset, group.task, group.protocol, group.backbone)
    return [row for row in table() if (row.dataset, row.task, row.protocol, row.backbone) == wanted]


def of_method(group: Group, method: Method) -> list[Published]:
    """The rows of a method; several if later papers reproduced it, none for another class order."""
    if has_own_order(method):
        return []
    names = method.published_names()
    return [row for row in of_group(group) if names & set(row.method.upper().split(" OR "))]


def has_own_order(method: Method) -> bool:
    """Whether its runs have other steps than the published task of that name."""
    run = method.runs[0]
    return not method.joint and run.steps != published_steps(run.dataset, run.task)
