"""Rooms and floors: imports run downwards, between floors and without circles (the map in README.md).

Read from the syntax trees, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from argparser import build_parser

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; a room imports from its own floor's rooms only what the next table allows.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("utils",),
    ("tasks", "metrics", "modules"),
    ("segmentation_module",),
    ("methods", "dataset"),
    ("argparser",),
    ("train",),
    ("runs",),
    ("inference",),
    ("session",),
    ("report",),
    ("run", "scripts", "benchmarks", "data"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if not parts[0].startswith(".") and parts[0] not in ("tests", "docs", "build", "logs"):
            yield path


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in sources()} == set(FLOOR)


def test_imports_run_downwards() -> None:
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {room}"
        for path in sources()
        for room, line in imported_rooms(path)
        if room in FLOOR and room != room_of(path) and FLOOR[room] >= FLOOR[room_of(path)]
    ]
    assert not upwards, "\n".join(upwards)


def modules_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circle_of_files() -> None:
    """Also not inside a room: a file is understood with those that it imports, and no others."""
    known = {modules_of(path): path for path in sources()}
    imports: dict[str, set[str]] = {}
    for name, path in known.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names & known.keys() or {node.module}
        imports[name] = {other for other in found if other in known and other != name}
    open_, done = list[str](), set[str]()

    def visit(name: str) -> None:
        assert name not in open_, " → ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in sorted(imports[name]):
                visit(other)
            done.add(open_.pop())

    for name in known:
        visit(name)


# ── the command line answers at once ─────────────────────────────────────────────────────────────────

SLOW = {
    "torch",
    "torchvision",
    "matplotlib",
    "sklearn",
    "timm",
    "tensorboard",
    "huggingface_hub",
    "wandb",
}


def imports_when_loaded(nodes: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Modules that a file imports when it is imported itself, with the line; not in functions, nor types."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports_when_loaded(node.orelse)
        elif not isinstance(node, ast.FunctionDef):
            for part in ("body", "orelse", "handlers", "finalbody"):
                yield from imports_when_loaded(getattr(node, part, []))


def test_options_are_declared_without_slow_packages() -> None:
    """They come from ``utils.lazy``, or are imported in the function that needs them."""
    known = {modules_of(path): path for path in sources()}
    seen, todo, found = set[str](), ["run"], list[str]()
    while todo:
        seen.add(name := todo.pop())
        path = known[name]
        for other, line in imports_when_loaded(ast.parse(path.read_text(encoding="utf-8")).body):
            if other.split(".")[0] in SLOW:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
            packages = [other.rsplit(".", n)[0] for n in range(other.count(".") + 1)]
            todo += {package for package in packages if package in known} - seen
    assert {"argparser", "methods.base", "utils.option_roles"} <= seen
    assert not found, "\n".join(found)


def test_wrong_options_drawn_data_and_the_report_do_not_wait_for_slow_packages() -> None:
    commands = "--help", "--version", "--lrr 1", "--lr -1", "--method FOO", "--classifier x", "--step 9"
    code = f"""
import contextlib, os, sys
import run
for words in {commands}:
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        assert run.main(words.split()) == 2, words
print(sorted({SLOW} & set(sys.modules)))
import dataset.shapes, report.command
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"], done.stdout
    assert done.stderr.count("run.py: error:") == len(commands) - 2


def test_kinds_of_classifiers_are_known_to_a_new_process() -> None:
    # Nothing that registers them is imported before the options are read.
    kinds = {"DKD": "auxiliary", "SSUL": "unknown", "STAR": "foreground", "DFT": "preallocated"}
    words = "--dataset voc --task 15-5 --step 1 --backbone timm/resnet10t --no_pretrained"
    code = f"""
import os, timm  # once: it takes seconds
for more in [], ["--test"]:
    if os.fork() == 0:
        from argparser import parse_options
        words = [*{words.split()}, *more, "--method"]
        print({{m: parse_options([*words, m]).classifier for m in {list(kinds)}}}, flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == 2 * [str(kinds)], done.stderr


def option_names(node: ast.expr) -> Iterator[str]:
    """Strings of a tuple, set or list, also of those within it."""
    if isinstance(node, ast.Starred):
        node = node.value
    if isinstance(node, ast.Tuple | ast.Set | ast.List):
        for element in node.elts:
            yield from option_names(element)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_no_list_of_options_beside_their_declaration() -> None:
    """What an option means is declared with it; who needs to know asks for its role."""
    known = build_parser().declared.keys()
    lists = [
        f"{path.relative_to(ROOT)}:{node.lineno} lists {', '.join(sorted(found))}"
        for path in sources()
        if path.name != "argparser.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.Set | ast.List)
        and len(found := known & set(option_names(node))) >= 3
    ]
    assert not lists, "\n".join(lists)


def test_every_test_is_collected() -> None:
    """pytest passes over a file or class of another name, and over all but the last of one name."""
    lost = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        inside = [("", ast.parse(path.read_text(encoding="utf-8")).body)]
        inside += [(node.name, node.body) for node in inside[0][1] if isinstance(node, ast.ClassDef)]
        for owner, body in inside:
            names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
            tests = [name for name in names if name.startswith("test")]
            seen = path.name.startswith("test_") and (not owner or owner.startswith("Test"))
            lost += [f"{path.name}: {name}" for name in tests if not seen or tests.count(name) > 1]
    assert not lost, "\n".join(lost)


# ── methods by name ──────────────────────────────────────────────────────────────────────────────────

# STAR is not among them: a shape, too.
METHOD_NAMES = {
    "lwf",
    "icarl",
    "ilt",
    "ewc",
    "mib",
    "cil",
    "sdr",
    "plop",
    "ssul",
    "sats",
    "ewf",
    "lgkd",
    "nest",
    "dkd",
    "rcil",
}
LONG_NAMES = ("icarl", "plop", "ssul", "sats")  # stand in no other word
# Ordinary words: a method's where they are an attribute, a keyword or a whole string.
METHOD_WORDS = {"unknown"}
MAY_KNOW = ("methods", "scripts", "benchmarks")  # and utils/loss.py, whose losses have the papers' names
ALLOWED = {
    "--mib_network": "a published option",
    "mib": "a published value of --head",
    "sats": "a published value of --decoder",
    "dkd": "a value of --head",
    "DKDHead": "its class",
    "modules.dkd_head": "its file",
    "sdr_network": "in the manifests of earlier versions",
}


def without_help(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but docstrings and the texts of ``help=``, which may cite a method as the source."""
    prose = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
            prose |= {id(part) for part in ast.walk(node.value)}
    yield from (node for node in ast.walk(tree) if id(node) not in prose)


def names_in(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """Identifiers and string constants of a node, each with whether a word of a method counts there."""
    for field in ("name", "id", "attr", "arg", "asname"):
        if isinstance(value := getattr(node, field, None), str):
            yield value, isinstance(node, ast.Attribute | ast.keyword)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, True


def method_in(text: str, whole: bool) -> str | None:
    """The method that a name or a string is about."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}
    joined = re.sub("[^a-z]", "", text.lower())  # iCaRL, MiBHead, SSULv2
    found = (words & METHOD_NAMES) | {name for name in LONG_NAMES if name in joined}
    if found or re.search("MiB(?!$)|LwF", text):  # "MiB" alone is a mebibyte
        return min(found, default=text)
    return text if whole and text.rstrip(".") in METHOD_WORDS else None


def test_no_method_by_name_outside_methods() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')} knows {method}: {text[:60]}"
        for path in sources()
        if room_of(path) not in MAY_KNOW and path != ROOT / "utils" / "loss.py"
        for node in without_help(ast.parse(path.read_text(encoding="utf-8")))
        for text, whole in names_in(node)
        if (method := method_in(text, whole)) and text not in ALLOWED
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("if opts.released_ssul: pass", {"ssul"}),
        ("class SATSHead: pass", {"sats"}),
        ("build(sdr=True)", {"sdr"}),
        ("SDR_MOMENTUM = 1", {"sdr"}),
        ("x = f'as in {a} PLOP'", {"plop"}),
        ("opts.unknown", {"unknown"}),
        ("build(unknown=True); d['unknown.']", {"unknown"}),
        ("def f():\n    'As in MiB.'\n    unknown = 1  # SSUL", set()),
        ("add('--x', help='as MiB' + ' does')", set()),
        ("raise Error(f'{x} is unknown')", set()),
    ],
)
def test_a_method_is_found_by_name(code: str, found: set[str]) -> None:
    named = {
        method.rstrip(".")
        for node in without_help(ast.parse(code))
        for text, whole in names_in(node)
        if (method := method_in(text, whole))
    }
    assert named == found
