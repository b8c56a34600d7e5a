"""docs/fidelity.md names the repository that each preset follows, and options for the others' values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from argparser import parse_options
from methods import METHODS, preset

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## Presets and the repositories\n")[1].split("\n## ")[0]
ROWS = {
    method: cells
    for methods, *cells in (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in SECTION.splitlines() if line[:1] == "|"
    )
    for method in methods.split(", ")
}
# Values in the released argparsers (SATS' threshold: in its trainer).
RELEASED = {
    "ILT": {"SATS": {"loss_kd": 10, "loss_de": 10}},
    "EWC": {
        "SDR": {"reg_importance": 1000},
        "PLOP": {"reg_importance": 100},
        "SATS": {"reg_importance": 100},
    },
    "PI": {"SDR": {"reg_importance": 1000}, "PLOP": {"reg_importance": 100}, "SATS": {"reg_importance": 100}},
    "RW": {"SDR": {"reg_importance": 1000}},
    "MIB": {"SATS": {"loss_kd": 40}},
    "SSUL": {"SATS": {"threshold": 0.5}},
    "SSUL-M": {"SATS": {"threshold": 0.5}},
}


def typed(words: str) -> dict[str, Any]:
    # Without training, which options of a method that is not chosen would refuse.
    opts = parse_options([*shlex.split(words), "--test"])
    return {name: getattr(opts, name) for name in opts.typed - {"test"}}


def test_every_preset_names_its_repository() -> None:
    assert ROWS.keys() - {"method", "---"} == set(METHODS)
    assert all(as_in for as_in, _ in ROWS.values())


@pytest.mark.parametrize("method", METHODS)
def test_other_repositories_values_can_be_typed(method: str) -> None:
    as_in, others = ROWS[method]
    ours = preset(method, dataset="voc", task="15-5")
    told: dict[str, dict[str, Any]] = {}
    for part in others.split(";"):
        names, _, rest = part.strip().partition(":")
        for words in re.findall("`(--.*?)`", rest):
            for name in names.split(","):
                told.setdefault(name.strip(), {}).update(typed(words))
            assert any(ours.get(option) != value for option, value in typed(words).items()), words
            opts = parse_options(["--method", method, *shlex.split(words)])
            assert {name: getattr(opts, name) for name in typed(words)} == typed(words)
    for repository, values in RELEASED.get(method, {}).items():
        assert told[repository] == values
        assert repository not in as_in.split(", ")
