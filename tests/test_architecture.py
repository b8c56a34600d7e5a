"""Rooms and floors: imports run downwards, between floors and without circles (the map in README.md).

Read from the syntax trees, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

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
