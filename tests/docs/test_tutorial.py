"""Runs the commands and code of docs/tutorial.md in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.M | re.S)
# Appended options override: fewer images and epochs.
SMALLER = {"data/make_shapes.py": "--train 60 --val 12", "run.py": "--epochs 1"}
UNCHANGED = ("--predict", "--test", "--check_data")  # without --epochs


def run_in(folder: Path, words: list[str]) -> str:
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_of_the_tutorial(tmp_path: Path, interpreter: Path) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    outputs = {}
    for language, block in BLOCKS:
        if language == "python":
            run_in(tmp_path, [sys.executable, "-c", block])
            continue
        (command,) = block.replace("\\\n", " ").strip().splitlines()
        python, *words = shlex.split(command)
        assert python == "python"
        more = SMALLER.get(words[0], "")
        if any(word in UNCHANGED for word in words):
            more = ""
        if words[0] in SMALLER:
            words[0] = str(ROOT / words[0])
        outputs[command] = run_in(tmp_path, [str(interpreter), *words, *more.split()])
    assert len(outputs) == 8
    (checked,) = [out for command, out in outputs.items() if "--check_data" in command]
    assert checked.endswith("the data is in order\n")
    (table,) = [out for command, out in outputs.items() if "-m report" in command]
    assert re.search(r"15-5-folder_MIB +1 .*\n15-5-folder_FT +1 .*\nreport: logs/report/report.html", table)
    assert len(list((tmp_path / "predictions" / "overlays").glob("*.png"))) == 12
