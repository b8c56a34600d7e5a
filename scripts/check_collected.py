"""Fails if pytest does not collect a test function in tests/ (wrong file name, or a name defined twice)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from utils.command import run_command

ROOT = Path(__file__).resolve().parent.parent


def written(path: Path) -> Counter[str]:
    """Count the test functions of a file, as ``file::[Class::]name``."""
    found: Counter[str] = Counter()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{name}::{node.name}::" if isinstance(node, ast.ClassDef) else f"{name}::"
        for item in inner:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name.startswith("test"):
                found[prefix + item.name] += 1
    return found


def collected() -> set[str]:
    """Test functions that pytest collects, without parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if output.returncode != 0:
        sys.exit(output.stdout + output.stderr)
    return {line.split("[")[0] for line in output.stdout.splitlines() if "::" in line}


def main() -> int:
    """Compare defined and collected tests; returns the exit code."""
    tests: Counter[str] = Counter()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tests += written(path)
    twice = [name for name, count in tests.items() if count > 1]
    lost = sorted(set(tests) - collected())
    for name in twice:
        print(f"defined twice, only the last runs: {name}", file=sys.stderr)
    for name in lost:
        print(f"not collected: {name}", file=sys.stderr)
    if lost or twice:
        return 1
    print(f"{len(tests)} test functions, all collected")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("scripts.check_collected", main))
