"""``run.json``: the options of a run and of its steps, and the key by which seeds of one method are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs.files import OPTIONS
from runs.options import group_key, read_run_options, same_group, write_run_options
from utils.errors import UserError


def test_what_is_written(tmp_path: Path) -> None:
    write_run_options(tmp_path / "run", {"method": "MIB", "lr": [0.1]}, ((0, 1), (2,)))
    content = json.loads((tmp_path / "run" / OPTIONS).read_text())
    key = group_key({"method": "MIB", "lr": [0.1]})
    assert content == {"options": {"method": "MIB", "lr": [0.1]}, "steps": [[0, 1], [2]], "group": key}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_run_options(tmp_path / "file", {})


def test_options_of_every_step_are_kept(tmp_path: Path) -> None:
    assert read_run_options(tmp_path).by_step == {}
    write_run_options(tmp_path, {"epochs": 30, "lr": [0.1]})
    assert read_run_options(tmp_path).by_step == {}  # as an earlier version left it
    write_run_options(tmp_path, {"epochs": 30, "lr": [0.1]}, step=0, lr=0.1)
    for step in range(1, 11):
        write_run_options(tmp_path, {"epochs": 10, "lr": [0.01, 0.02]}, step=step, lr=0.01)
    write_run_options(tmp_path, {"epochs": 7, "lr": [0.3]})  # a start that has trained nothing yet
    kept = read_run_options(tmp_path).by_step
    assert list(kept) == list(range(11))
    assert kept[0] == {"epochs": 30, "lr": 0.1} and kept[10] == {"epochs": 10, "lr": 0.01}
    write_run_options(tmp_path, {"epochs": 5, "lr": [0.4]}, step=1, lr=0.4)
    assert read_run_options(tmp_path).by_step == {**kept, 1: {"epochs": 5, "lr": 0.4}}
    assert json.loads((tmp_path / OPTIONS).read_text())["options"] == {"epochs": 5, "lr": [0.4]}
    assert [path.name for path in tmp_path.iterdir()] == [OPTIONS]


OTHER_CONTENT = "lacks the options and steps of a run"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "cannot be read .*"),
        ("[]", OTHER_CONTENT),
        ('{"options": {}, "steps": [["a"]]}', OTHER_CONTENT),
        ('{"options": {}, "steps": [], "options_by_step": 3}', OTHER_CONTENT),
        ('{"options": {}, "steps": [], "options_by_step": {"x": {}}}', OTHER_CONTENT),
    ],
)
def test_a_damaged_file_is_reported_and_training_starts(
    tmp_path: Path, text: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / OPTIONS).write_text(text)
    with pytest.raises(UserError, match=rf"run\.json: {fault}; remove it"):
        read_run_options(tmp_path)
    write_run_options(tmp_path, {"epochs": 1}, step=0, lr=0.1)
    assert read_run_options(tmp_path).by_step == {0: {"epochs": 1, "lr": 0.1}}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_key_is_that_of_the_method_not_of_the_seed_or_the_machine() -> None:
    mib = {"method": "MIB", "loss_kd": 10.0, "random_seed": 1, "num_workers": 2}
    key = group_key(mib)
    assert group_key({**mib, "random_seed": 2, "num_workers": 8, "name": "other"}) == key
    assert group_key({**mib, "loss_kd": 5.0}) != key
    # What a version did not know yet had its default; what a method file brings counts.
    assert group_key({**mib, "accumulate": 1}) == key
    assert group_key({**mib, "weight_of_mine": 1}) != key


def test_written_keys_are_compared_and_missing_ones_computed_for_both(tmp_path: Path) -> None:
    """The options of a method file are known where the run is, and not where the report is."""
    options = {"method": "MIB", "random_seed": 1}
    write_run_options(tmp_path, options, ((0, 1), (2,)), step=0, lr=0.1)
    known = read_run_options(tmp_path)
    content = json.loads((tmp_path / OPTIONS).read_text())
    assert (content["group"], content["group_by_step"]) == (known.group, {"0": known.group_by_step[0]})
    content["group"] = content["group_by_step"]["0"] = "written"
    (tmp_path / OPTIONS).write_text(json.dumps(content))
    known = read_run_options(tmp_path)
    assert (known.group, known.group_by_step) == ("written", {0: "written"})
    del content["group"], content["group_by_step"]  # as earlier versions left it
    (tmp_path / OPTIONS).write_text(json.dumps(content))
    known = read_run_options(tmp_path)
    assert (known.group, known.group_by_step) == (None, {})
    # "weight_of_mine" has its default: the run left it out of its key, the report could not.
    written, mine = group_key(options), {**options, "weight_of_mine": 1}
    assert same_group(written, mine, written, {**mine, "random_seed": 2})
    assert same_group(written, mine, None, {**mine, "random_seed": 2})
    assert not same_group(written, mine, None, {**mine, "weight_of_mine": 2})
    assert not same_group("a", options, "b", options)
