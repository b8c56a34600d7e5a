"""A published step: evaluated from the hub it has the same numbers, and the next step starts from it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import SMALL_BACKBONE, python
from hub_server import REPOSITORY, environment, hub
from small_checkpoint import save_untrained

from argparser import parse_options
from metrics.continual import summarise
from runs.publish import main, publish
from runs.results import write_results
from utils.errors import UserError

RUN = "15-5-shapes_Experiment"
RESULTS = summarise(np.array([[3, 1], [1, 3]]), ["background", "ball"])


def run(*words: str, **more: str) -> str:
    done = python(*words, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_published_step(shapes_root: Path, tmp_path: Path) -> None:
    common = (
        f"--dataset shapes --data_root {shapes_root} --task 15-5 --overlap --crop_size 64 --no_pretrained"
    )
    words = [*common.split(), *["--backbone", SMALL_BACKBONE, "--epochs", "1", "--batch_size", "8"]]
    several = ["--step", "all", "--lr", "0.05", "0.02"]
    run("run.py", *words, *several, "--method", "FT", "--logdir", str(tmp_path / "logs"))
    trained = tmp_path / "logs" / RUN
    run("-m", "runs.publish", str(trained), "--out", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    file = f"{RUN}_0.safetensors"
    assert names == {file, f"{RUN}_0.json", "config.json", "results_0.json", "README.md"}
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "out").glob("*.[jm]*"))
    assert str(tmp_path).encode() not in (tmp_path / "out" / file).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--backbone {SMALL_BACKBONE} --batch_size 8" in card and "without restrictions" in card
    (command,) = re.findall(r"^python run\.py (.*)", card, re.M)
    assert parse_options(shlex.split(command)).lrs == [0.05, 0.02]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["15"] == "arrow"

    results = json.loads((trained / "results_0.json").read_text())
    with hub(tmp_path / "out") as there:
        env = environment(tmp_path / "cache", **there)
        name, logs = f"hf:{REPOSITORY}/{file}@v1", str(tmp_path / "other")
        run("run.py", *words, "--logdir", logs, "--test", "--ckpt", name, **env)
        run("run.py", *words, "--logdir", logs, "--step", "1", "--step_ckpt", name, "--method", "MIB", **env)
    tested = json.loads((tmp_path / "other" / RUN / "results_0.json").read_text())
    assert tested["class_iou"] == results["class_iou"] and tested["miou_all"] == results["miou_all"]
    later = json.loads((tmp_path / "other" / RUN / "results_1.json").read_text())
    (tmp_path / "other" / RUN / "results_0.json").unlink()
    assert set(later["forgetting"]) == set(results["class_iou"])  # of step 0 as the hub has it


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results_0\.json: not there, so step 0 is not finished"):
        publish(tmp_path, 0, tmp_path / "out")
    write_results(tmp_path, RESULTS, step=0, num_classes=2, csv_name="iou.csv")
    with pytest.raises(
        UserError, match=r"_0\.pth: no such checkpoint; train the step, or give its folder with"
    ):
        publish(tmp_path, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and results of step 1."""
    folder = tmp_path_factory.mktemp("logs") / "10-5-5-shapes_first"
    save_untrained(folder / f"{folder.name}_1.pth")
    write_results(folder, RESULTS, step=1, num_classes=2, csv_name="iou.csv")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"miou_all": None}, "has no miou_all to publish; test the step again"),
        (
            {"class_iou": {"background": "x", "ball": 0.5}},
            "is not a results file (class_iou of background is",
        ),
    ],
)
def test_edited_results_are_not_published(
    change: dict[str, Any], said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / trained.name)
    words = [str(run), "--step", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    shutil.rmtree(tmp_path / "out")
    path = run / "results_1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"runs.publish: error: {path}: {said}") and captured.err.count("\n") == 1
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_a_renamed_folder_is_told_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "second")
    (run / "fisher_1.pth").touch()  # tensors of a method
    with pytest.raises(UserError) as caught:
        publish(run, 1, tmp_path / "out")
    assert str(caught.value) == (
        f"{run}/second_1.pth: no such checkpoint, but 10-5-5-shapes_first_1.pth; give the run's folder the "
        "name with which its checkpoints begin"
    )
    assert not (tmp_path / "out").exists()
