"""docs/methods.md names every method and option, with the defaults and presets that the program has."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from argparser import build_parser, parse_options
from methods import METHODS, REGISTRY, Batch, Context, Method, preset
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


def test_the_index_links_every_section() -> None:
    rows = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|", TEXT, re.M)
    assert [name for name, _ in rows] == list(SECTIONS)
    assert [link for _, link in rows] == [
        re.sub("[+,]", "", title.lower()).replace(" ", "-") for title in SECTIONS
    ]


def test_the_example_is_the_file_and_its_commands_parse() -> None:
    example = "docs/examples/cosine_distillation.py"
    shown, *_ = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    assert shown == (ROOT / example).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
    _, train, report = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    assert train[:6] == ["python", "run.py", "--method_file", example, "--method", "COSINE"]
    # Loading would register its method in this process; tests/cli/test_method_file.py runs it separately.
    opts = parse_options(train[6:])
    assert opts.steps == [0, 1]
    assert report[3] == f"{opts.logdir}/15-5-{opts.dataset}_{opts.name}"


def first_cells(title: str) -> set[str]:
    """Names in code type in the first column of a section's tables."""
    (section,) = re.findall(rf"^### {title}\n(.*?)^### ", TEXT, re.M | re.S)
    return set(re.findall(r"`(\w+)", " ".join(re.findall(r"^\| (`.*?) \|", section, re.M))))


def test_hooks_and_attributes_are_all_there() -> None:
    public = {name for name in (*vars(Method), *Method.__annotations__) if not name.startswith("_")}
    hooks = {name for name in public if callable(getattr(Method, name))}
    received = {field.name for kind in (Batch, Context) for field in dataclasses.fields(kind)}
    assert first_cells("Hooks") == hooks | received | {"batch", "context"}
    assert public - hooks - {"differs_between_processes"} <= first_cells("Class attributes")
