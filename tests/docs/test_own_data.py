"""Runs the commands and code of docs/own_data.md in order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import ROOT, SMALL_BACKBONE, python
from PIL import Image
from small_data import make_own

TEXT = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(my_data/\S+)`:\n\n```\w*\n(.*?)^```$", TEXT, re.M | re.S))
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
COMMANDS = [
    command
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
    for command in block.replace("\\\n", " ").strip().splitlines()
]
# Appended options override: a network and length that take seconds on one core.
SMALL = f"--backbone {SMALL_BACKBONE} --no_pretrained --crop_size 64 --batch_size 4 --epochs 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with my_data, the document's files, and masks in colours."""
    folder = tmp_path_factory.mktemp("walk")
    make_own(folder / "my_data")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    (folder / "colour_masks").mkdir()
    colours = np.zeros((64, 64, 3), np.uint8)
    colours[:20], colours[20:40] = (0, 0, 142), (9, 9, 9)
    Image.fromarray(colours).save(folder / "colour_masks" / "train_00000000.png")
    for snippet in SNIPPETS:
        subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)
    return folder


def run(command: str, place: Path) -> str:
    words = shlex.split(command)
    assert words[:2] == ["python", "run.py"]
    done = python(ROOT / "run.py", *words[2:], *SMALL.split(), folder=place)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def containing(*parts: str) -> str:
    """The only command of the document that contains these words."""
    (command,) = [command for command in COMMANDS if all(part in command for part in parts)]
    return command


def test_the_document_has_what_the_tests_run() -> None:
    assert set(FILES) == {f"my_data/{name}" for name in ("classes.txt", "order.txt", "tasks.yaml")}
    assert len(SNIPPETS) == 2
    assert len(COMMANDS) == 9


def test_colours_become_ids(place: Path) -> None:
    mask = np.asarray(Image.open(place / "my_data/masks/train/train_00000000.png"))
    assert [int(mask[row, 0]) for row in (0, 30, 50)] == [1, 255, 0]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (COMMANDS[0], "step 0: 13 classes, 26 images"),
        (containing("--task 10-2 --overlap", "--check_data"), "step 1: 2 classes, 6 images"),
        (containing("--class_order_seed"), "step 1: 2 classes, 8 images"),
        (containing("--class_order "), "step 1: 2 classes, 7 images"),
        (containing("--task_file", "--check_data"), "step 2: 6 classes, 19 images"),
        (containing("--splits_dir"), "step 1: 2 classes, 6 images"),
    ],
)
def test_checks(place: Path, command: str, line: str) -> None:
    out = run(command, place)
    assert "train: 26 images and 26 masks of 26 listed" in out
    assert line in out
    assert "the data is in order" in out


def test_training_then_testing(place: Path) -> None:
    run(containing("--method MIB", "--opt_level O1"), place)
    folder = place / "logs" / "10-2-folder_MIB"
    trained = [json.loads((folder / f"results_{step}.json").read_text()) for step in (0, 1)]
    names = FILES["my_data/classes.txt"].splitlines()
    assert list(trained[0]["class_iou"]) == names[:11]
    assert list(trained[1]["class_iou"]) == names
    run(containing("--test"), place)
    # The generated images are as large as the crop, so whole images give the same numbers.
    tested = json.loads((folder / "results_1.json").read_text())
    assert tested == trained[1] | {"evaluation": {"crop_val": False}}


def test_own_task_with_exemplars(place: Path) -> None:
    out = run(containing("--memory"), place)
    assert "exemplars: car " in out
    folder = place / "logs" / "traffic-first-folder_MIB-M"
    assert (folder / "results_2.json").is_file()
    assert len(json.loads((folder / "exemplars_2.json").read_text())["exemplars"]) <= 20
