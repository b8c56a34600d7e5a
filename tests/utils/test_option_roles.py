"""Roles of options: as they are declared, and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.option_roles import Declaration, OptionParser
from utils.option_types import path_option


def test_an_option_has_its_own_role_or_the_groups() -> None:
    parser = OptionParser()
    group = parser.group("own", role="learning")
    group.add_argument("--weight")
    group.add_argument("--width", role="network", with_results=True)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--either", action="store_true")
    assert {name: option.role for name, option in parser.declared.items()} == {
        "weight": "learning",
        "width": "network",
        "either": "learning",
    }
    assert parser.declared["width"].is_named_with_results
    opts = parser.parse_args(["--width", "3", "--either"])
    assert (opts.width, opts.either) == ("3", True)


def test_names_type_and_default_come_from_the_declaration_itself() -> None:
    group = OptionParser().group("own")
    group.add_argument("--whole", "--crop", dest="crop", action="store_false", role="evaluation")
    group.add_argument("--folder", type=path_option, role="data")
    crop, folder = group.declared["crop"], group.declared["folder"]
    assert (crop.flag, crop.switches_off, crop.as_typed(False)) == ("--whole", True, True)
    assert folder.says_where_data_are
    assert not folder.switches_off


def test_a_second_option_of_an_attribute_needs_no_role() -> None:
    group = OptionParser().group("own")
    group.add_argument("--resume", default="auto", role="incidental")
    group.add_argument("--fresh", dest="resume", action="store_const", const="fresh")
    assert group.declared["resume"] == Declaration("resume", "--resume", "incidental")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"role": "sideways"}, "--width: role 'sideways' is none of network, data"),
        ({}, "--width: give its role, one of network, data"),
    ],
)
def test_an_option_without_a_role_is_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OptionParser().group("own").add_argument("--width", **words)


def test_with_keep_best_the_evaluation_must_agree_as_well() -> None:
    scales = Declaration("test_scales", "--test_scales", "evaluation")
    assert scales.must_agree_on_resume(keep_best=True)
    assert not scales.must_agree_on_resume(keep_best=False)
    for role in ("network", "data", "learning"):
        assert Declaration("x", "--x", role).must_agree_on_resume(keep_best=False)
        assert not Declaration("x", "--x", role, compared_by_meaning=True).must_agree_on_resume(
            keep_best=True
        )


def test_a_path_of_a_method_file_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    parser = OptionParser()
    parser.group("method", role="learning").add_argument("--maps", type=Path, default=None)
    assert parser.parse_args(["--maps", "~/maps"]).maps == Path("/home/user/maps")
    assert parser.declared["maps"].is_path
