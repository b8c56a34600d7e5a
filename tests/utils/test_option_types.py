"""Option types, and that every option of every program that is a path has the type for it."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from argparser import build_parser, parse_options
from inference import tsne
from inference.load import _value
from report import command as report
from scripts import experiment
from scripts.experiment_plan import check_content
from utils.errors import UserError
from utils.option_types import path_option

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = (
    "data",
    "gpu_check",
    "losses",
    "profile",
    "real_runs",
    "scaling",
    "step",
)


class Parsed(Exception):
    """Carries a program's parser to the test, at the moment when it would parse."""


def parser_of(program: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def caught(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise Parsed(parser)

    with monkeypatch.context() as patched, pytest.raises(Parsed) as found:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", caught)
        patched.setattr(sys, "argv", ["program"])
        program()
    return found.value.args[0]


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.ArgumentParser]:
    """The parser of every program, by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    programs: dict[str, Callable[[], object]] = {
        "report": report.main,
        "inference.tsne": lambda: tsne.parse([]),
        "scripts.experiment": experiment.main,
        "data.make_shapes": lambda: importlib.import_module("make_shapes").main(),
        "--method_file, read first": lambda: parse_options([]),
    }
    for name in BENCHMARKS:
        programs[f"benchmarks.{name}"] = importlib.import_module(f"benchmarks.{name}").main
    found = {name: parser_of(program, monkeypatch) for name, program in programs.items()}
    return {"run": build_parser(), **found}


def test_every_path_of_every_program_knows_the_home_folder(
    parsers: dict[str, argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    seen = set()
    for name, parser in parsers.items():
        for action in parser._actions:
            shown = f"{name}: {action.dest}"
            is_path = isinstance(action.default, Path) or action.metavar in ("FILE", "FILE.py", "DIR", "PATH")
            assert action.type is not Path, shown
            assert not is_path or action.type is path_option, shown
            if action.type is path_option:
                seen.add(shown)
                assert parser._get_values(action, ["~/x"]) in (
                    Path("/home/someone/x"),
                    [Path("/home/someone/x")],
                )
    assert {"run: logdir", "run: task_file", "run: method_file", "run: ckpt", "run: predict"} <= seen
    assert {"report: folders", "inference.tsne: out", "scripts.experiment: file"} <= seen
    assert {f"benchmarks.{name}" for name in BENCHMARKS} <= {shown.split(":")[0] for shown in seen}


def test_no_program_has_paths_of_another_type() -> None:
    """Also in programs that the list above does not know."""
    files = [f for f in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(f.relative_to(ROOT).parts)]
    assert len(files) > 90
    assert not [f for f in files if re.search(r"type=(pathlib\.)?Path\b", f.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x: no home folder of that user is known"),
        ("", "the path is empty"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9: the path is not UTF-8 text"),
    ],
)
def test_what_can_be_no_path_is_refused_with_its_option(path: str, words: str) -> None:
    for words_typed in (["--logdir", path], [f"--logdir={path}"], ["--method_file", path]):
        with pytest.raises(UserError) as caught:
            parse_options(words_typed)
        message = str(caught.value)
        assert words in message and words_typed[0].split("=")[0] in message and "\n" not in message


def test_a_path_in_an_experiment_or_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    content = {"logdir": "~/runs", "runs": {"FT": {"method": "FT"}}}
    assert check_content(content).logdir == Path("/home/someone/runs")
    with pytest.raises(UserError, match="no home folder of that user"):
        check_content({**content, "logdir": "~nobody-of-that-name/runs"})
    # A checkpoint of an earlier version says what was typed.
    action = next(action for action in build_parser()._actions if action.dest == "data_root")
    assert _value(action, "~/data", Path("x.pth")) == Path("/home/someone/data")
