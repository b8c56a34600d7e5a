"""Tables as text and as Markdown: numbers at the right, dashes, wide characters, escaped signs."""

from __future__ import annotations

import math

import pytest

from utils.tables import format_table, markdown_table


def test_table():
    text = format_table(["class", "IoU"], [["cat", 1.5], ["background", math.nan], ["dog", None]])
    assert text.splitlines() == [
        "class        IoU",
        "----------  ----",
        "cat         1.50",
        "background     –",
        "dog            –",
    ]
    assert format_table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]
    with pytest.raises(ValueError, match="2 headers for 1 columns"):
        format_table(["a", "b"], [["c"]])


def test_markdown_table():
    assert markdown_table(["class", "IoU"], [["a|b", 1.5], ["c", None]]).splitlines() == [
        "| class | IoU |",
        "| --- | ---: |",
        "| a\\|b | 1.50 |",
        "| c | – |",
    ]
    assert markdown_table(["a"], []).splitlines() == ["| a |", "| --- |"]


def test_tables_of_strange_names() -> None:
    text = format_table(["class", "IoU"], [["猫", 1.0], ["cat", 22.5], ["e\u0301", 3.0]]).splitlines()
    assert text == ["class    IoU", "-----  -----", "猫      1.00", "cat    22.50", "e\u0301       3.00"]
    table = markdown_table(["class"], [["a\\|b"], ["*x* <b> `$"], ["15-5_FT"], ["_y_"]]).splitlines()[2:]
    wanted = [r"| a\\\|b |", r"| \*x\* \<b\> \`\$ |", "| 15-5_FT |", r"| \_y\_ |"]
    assert table == wanted
