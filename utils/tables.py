"""Tables as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned text table: numeric columns right-aligned, floats with two decimals.

    Args:
        headers: one per column.
        rows: cells; None and NaN are shown as a dash.
    """
    shown = [[_cell(cell) for cell in row] for row in rows]
    columns = list(zip(*shown, strict=True)) if shown else [()] * len(headers)
    if len(columns) != len(headers):
        raise ValueError(f"{len(headers)} headers for {len(columns)} columns")
    widths = [max(map(_width, (header, *column))) for header, column in zip(headers, columns, strict=True)]
    right = [bool(column) and all(map(_numeric, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            " " * (width - _width(cell)) + cell if at_right else cell + " " * (width - _width(cell))
            for cell, width, at_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *map(line, shown)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table of ``format_table`` in Markdown."""
    shown = [[markdown_text(_cell(cell)) for cell in row] for row in rows]
    columns = list(zip(*shown, strict=True))
    right = [bool(column) and all(map(_numeric, column)) for column in columns] or [False] * len(headers)
    rule = ["---:" if at_right else "---" for at_right in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(headers), rule, *shown])


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, cells unchanged."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def markdown_text(text: str) -> str:
    """A text in one line of Markdown, with all special characters escaped."""
    plain = re.sub(r"([\\`*<>\[\]|~$&])", r"\\\1", " ".join(text.split("\n")))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # not special within a word


def _width(text: str) -> int:
    """Width of a text in terminal columns."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _numeric(cell: str) -> bool:
    if cell == "–":
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True
