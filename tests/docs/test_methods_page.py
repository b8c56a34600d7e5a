"""docs/methods.md names every method and option, with the defaults and presets that the program has."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from argparser import build_parser, parse_options
from methods import METHODS, REGISTRY, preset
from utils.option_roles import OptionParser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    if "own" not in title
}
# Options outside the methods' groups that the document lists for methods that use them.
SHARED = {"fix_pre_cls", "init_balanced", "memory", "void_label", "unseen_label"}


def items(body: str, start: str) -> str:
    """The list item that starts with a word, its lines joined."""
    found = re.search(rf"^- {re.escape(start)}: (.*?)(?=^- |\Z)", body, re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def named(text: str) -> list[list[str]]:
    return [shlex.split(words) for words in re.findall(r"`--([^`]+)`", text)]


def own_options() -> argparse.ArgumentParser:
    parser = OptionParser(add_help=False)
    for kind in REGISTRY:
        kind.add_options(parser.group(kind.__name__, role="learning"))
    return parser


def test_every_method_has_a_section_with_equation_reference_and_code() -> None:
    assert sorted(", ".join(SECTIONS).split(", ")) == sorted(METHODS)
    for title, body in SECTIONS.items():
        assert body.count("```math\n") == 1, title
        assert title == "FT" or re.search(
            r"https://(arxiv\.org/abs|openaccess\.thecvf\.com/content|papers\.nips\.cc)/", body
        )
        assert len(body.strip().splitlines()) < 32
        for path in re.findall(r"`([\w/]+\.py)`", items(body, "Code")):
            assert (ROOT / path).is_file(), path


def test_options_are_all_there_with_their_defaults() -> None:
    # The first of a name's options has its default: others are switches (--fresh, --unce_in_warm)
    general = {action.dest: action for action in reversed(build_parser()._actions)}
    documented = [words for body in SECTIONS.values() for words in named(items(body, "Options"))]
    for name, *values in documented:
        action = general[name]
        if action.nargs == 0 or action.default is None:
            assert not values, name
            continue
        default = action.default if isinstance(action.default, list) else [action.default]
        kind = action.type or str
        assert [kind(value) for value in values] == default, name
    own = {action.dest for action in own_options()._actions}
    assert {name for name, *_ in documented} - SHARED == own


@pytest.mark.parametrize("method", METHODS)
def test_presets_are_as_documented(method: str) -> None:
    (body,) = [body for title, body in SECTIONS.items() if method in title.split(", ")]
    said = {name: values for name, *values in named(items(body, f"{method} sets") or items(body, "Sets"))}
    sets = preset(method, dataset="voc", task="15-5")
    if method in ("SSUL-M", "SATS-M"):
        assert sets.pop("memory") == 100
        said.pop("memory")
    elif method == "SATS":
        said.pop("memory")
    sets.pop("pod_options", None)
    assert said.keys() == sets.keys()
    for name, values in said.items():
        words = ["--method", method, f"--{name}", *values]  # what goes with another option is refused alone
        assert getattr(parse_options(words), name) == sets[name], name


def test_numbers_of_ade_and_of_one_by_one() -> None:
    ade = {method: preset(method, dataset="ade", task="100-50") for method in METHODS}
    assert (ade["PLOP"]["pod_factor"], ade["SSUL-M"]["memory"], ade["SATS-M"]["memory"]) == (1e-3, 300, 300)
    assert (ade["DKD-M"]["memory"], ade["STAR-M"]["memory"]) == (300, 50)
    assert [ade[method]["pos_weight"] for method in ("DKD", "DKD-M", "STAR-M")] == [[35], [35], [30]]
    assert {ade[method]["unseen_label"] for method in ("DKD-M", "STAR-M")} == {"ignore"}
    factors = [preset("PLOP", dataset=d, task="x")["pod_options"] for d in ("voc", "ade")]
    assert [json.dumps(f).split('"factor": ')[1].split(",")[0] for f in factors] == ["0.0005", "1e-05"]
    assert preset("MIB", dataset="voc", task="15-5s")["loss_kd"] == 100
    assert preset("MIB+EWF", dataset="voc", task="15-5s")["loss_kd"] == 10
    fused = [preset("MIB+EWF", dataset="ade", task=task) for task in ("100-50", "100-10", "100-5")]
    assert [options["loss_kd"] for options in fused] == [10, 100, 100]
    assert all(options["fix_pre_cls"] for options in fused)
    for method in ("MIB+NeST", "PLOP+NeST"):
        values = ade[method]
        assert (values["warm_epochs"], values["warm_lr_scale"]) == (15, 500)
        assert not values.get("fix_pre_cls")
    assert ade["PLOP+NeST"]["pod_factor"] == 1e-3


@pytest.mark.parametrize(
    ("data_set", "task", "weights"),
    [
        *[("voc", *row) for row in (("19-1", (5, 0.5)), ("15-5", (5, 1)), ("15-5s", (1, 0)))],
        *[("ade", *row) for row in (("100-50", (1, 20)), ("100-10", (1, 1)), ("50", (2, 10)))],
        *[("ade", *row) for row in (("100-50b", (1, 20)), ("50c", (2, 10)), ("50-10", (10, 2)))],
        ("voc", "10-1", (10, 2)),
    ],
)
def test_label_guided_weights_by_task(data_set: str, task: str, weights: tuple[float, float]) -> None:
    opts = parse_options(["--method", "LGKD", "--dataset", data_set, "--task", task])
    assert (opts.prev_kd, opts.novel_kd) == weights


def test_the_command_of_the_example_parses() -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["python", "run.py"]
    example = ROOT / words[3]
    assert 50 <= len(example.read_text(encoding="utf-8").splitlines()) <= 70
    # Loading would register its method in this process; tests/cli/test_method_file.py runs it separately.
    rest = [*words[2 : words.index("--method_file")], *words[6:]]
    assert parse_options(rest).steps == [0, 1]
