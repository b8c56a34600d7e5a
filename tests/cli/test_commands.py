"""Training, testing and every launcher, through the real command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import ROOT, SMALL, Launch, launch, start
from forked import BOUND
from PIL import Image
from tensorboard_events import values

from dataset.shapes import ShapesConfig, make_shapes


def results(run_dir: Path, step: int) -> dict[str, object]:
    return json.loads((run_dir / f"results_{step}.json").read_text(encoding="utf-8"))


def test_two_steps_under_torchrun_then_test_gives_the_same_digits(cli: Launch, tmp_path: Path) -> None:
    common = (*SMALL, "--task", "15-5", "--overlap", "--logdir", tmp_path, "--name", "MIB", "--method", "mib")
    trained = cli(*common, "--step", "0", "1", "--lr", "0.01", "0.001", launcher="torchrun", processes=2)
    assert trained.code == 0, trained.err
    run_dir = tmp_path / "15-5-shapes_MIB"
    assert (run_dir / "15-5-shapes_MIB_0.pth").is_file()
    after_training = results(run_dir, 1)

    # The same numbers from the checkpoint: on two processes, on one, and with the file named.
    for extra, options in (
        ((), {"processes": 2}),
        ((), {}),
        (("--ckpt", run_dir / "15-5-shapes_MIB_1.pth"), {}),
    ):
        tested = cli(*common, "--step", "1", "--test", *extra, **options)
        assert tested.code == 0, tested.err
        assert results(run_dir, 1) == after_training
    assert cli(*common, "--step", "1", "--test", "--test_flip").code == 0
    assert results(run_dir, 1)["evaluation"] == {"test_flip": True}, "numbers got otherwise say so"

    # Network and data are those of the training unless typed; then the results say so.
    short = ("--task", "15-5", "--logdir", tmp_path, "--name", "MIB", "--step", "1", "--test")
    cut = cli(*short, "--crop_size", "48", "--sample_num", "2")
    assert cut.code == 0 and "--crop_size 48, trained with 64" in cut.out, cut.err
    assert results(run_dir, 1)["evaluation"] == {"crop_size": 48}
    assert (run_dir / "predictions_1.png").is_file()
    assert cli(*short).code == 0
    assert results(run_dir, 1) == after_training
    other = shutil.copy(run_dir / "15-5-shapes_MIB_1.pth", tmp_path / "other.pth")
    refused = cli(*short, "--ckpt", other)
    assert refused.code == 2 and "would replace its results: give another --name" in refused.last_error
    assert results(run_dir, 1) == after_training

    with (run_dir / "shapes_15-5_MIB.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["0", "1"], "a step tested again replaces its row"
    assert rows[0][17:22] == ["x"] * 5, "classes that step 0 does not know"


def test_the_defaults_themselves(tmp_path: Path) -> None:
    """VOC's layout in ./data, results in ./logs: only what would take hours or the network is given."""
    make_shapes(tmp_path / "data", ShapesConfig(train=6, val=1, size=64, seed=3), num_workers=1)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--no_pretrained", "--crop_size", "64", "--epochs", "1"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "logs" / "19-1-voc_Experiment"
    assert len(results(run_dir, 0)["class_iou"]) == 20


def test_distributed_launch_and_all_steps(cli: Launch, tmp_path: Path) -> None:
    outcome = cli(
        *(*SMALL, "--task", "10-5-5", "--step", "all", "--logdir", tmp_path, "--method", "LWF"),
        *("--name", "LWF", "--overlapped", "--no-pretrained"),
        launcher="launch",
    )
    assert outcome.code == 0, outcome.err
    run_dir = tmp_path / "10-5-5-shapes_LWF"
    assert sorted(path.name for path in run_dir.glob("*.pth")) == [
        f"10-5-5-shapes_LWF_{step}.pth" for step in range(3)
    ]


def test_a_step_continues_from_another_run(cli: Launch, tmp_path: Path) -> None:
    common = (*SMALL, "--task", "15-5", "--overlap", "--logdir", tmp_path)
    assert cli(*common, "--name", "FT", "--step", "0").code == 0
    previous = tmp_path / "15-5-shapes_FT" / "15-5-shapes_FT_0.pth"
    outcome = cli(*common, "--name", "other", "--step", "1", "--step_ckpt", previous, "--sample_num", "2")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "15-5-shapes_other"
    assert (folder / "predictions_1.png").is_file()
    # Everything that a user looks for in TensorBoard: in the step's course and on the whole task's board.
    curves = {"loss/ce", "loss/total", "lr", "images_per_second", "miou/all", "iou/background", "predictions"}
    course = {value.tag for _, value in values(folder / "step_1")}
    assert course >= curves | {"confusion", "options/text_summary", "results/text_summary"}
    task = {(step, value.tag) for step, value in values(folder / "task")}
    assert task >= {
        (1, tag) for tag in ("miou/old", "miou/new", "iou/background", "confusion", "predictions")
    }


def test_resumed_epochs_give_the_weights_of_an_unbroken_run(tiny_data: Path, tmp_path: Path) -> None:
    common = [
        *("--dataset", "shapes", "--data_root", tiny_data, *SMALL, "--epochs", "6"),
        *("--task", "15-5", "--logdir", tmp_path, "--step", "0"),
    ]
    assert launch(*common, "--name", "whole").code == 0
    path = tmp_path / "15-5-shapes_broken" / "15-5-shapes_broken_0.pth"
    process = start(*common, "--name", "broken")
    while not path.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    resumed = launch(*common, "--name", "broken")
    assert resumed.code == 0, resumed.err
    assert "resumes at epoch" in resumed.out
    states = [
        torch.load(tmp_path / f"15-5-shapes_{name}" / f"15-5-shapes_{name}_0.pth", weights_only=True)
        for name in ("whole", "broken")
    ]
    whole, broken = (state["model_state"] for state in states)
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "voc", "--data_root", "{tmp}/nothing"], ["--data_root", "nothing", "download_voc.sh"]),
        (["--dataset", "voc", "--data_root", "{tmp}"], ["JPEGImages"]),
        (["--metod", "MIB"], ["--metod", "--method"]),
        (["--method", "MIBB"], ["MIBB", "mib"]),
        (["--dataset", "voc", "--task", "15-55"], ["15-55", "15-5"]),
        (["--task", "15-5", "--step", "2"], ["--step 2", "0 to 1"]),
        (["--task", "15-5", "--step", "1"], ["step 0", "--step_ckpt"]),
        (["--batch_size", "1000"], ["--batch_size"]),
        (["--where_to_sim", "GPU_server"], ["CUDA", "--where_to_sim CPU"]),
        (["--lr", "0.1", "0.2", "0.3"], ["--lr"]),
        (["--pretrained_path", "{tmp}/none.pth"], ["none.pth"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cli: Launch, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    if "--pretrained_path" in arguments:
        small = [word for word in SMALL if word != "--no_pretrained"]
    else:
        small = list(SMALL)
    given = [word.format(tmp=tmp_path) for word in arguments]
    outcome = cli(*small, "--logdir", tmp_path / "logs", *given)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.last_error


def test_broken_files_are_named(tiny_data: Path, tmp_path: Path) -> None:
    for fault in ("mask", "image"):
        root = tmp_path / fault
        shutil.copytree(tiny_data, root)
        if fault == "mask":
            path = sorted(root.rglob("SegmentationClassAug/*.png"))[0]
            Image.new("L", Image.open(path).size, 99).save(path)
        else:
            path = sorted(root.rglob("JPEGImages/*.jpg"))[0]
            path.write_bytes(path.read_bytes()[:200])
        outcome = launch(
            *("--dataset", "shapes", "--data_root", root, *SMALL, "--logdir", tmp_path / "logs"),
            *("--task", "offline", "--name", fault),
        )
        assert outcome.code == 2, outcome.err
        assert path.name in outcome.last_error


def test_a_checkpoint_of_another_task_is_refused(cli: Launch, tmp_path: Path) -> None:
    assert cli(*SMALL, "--task", "19-1", "--step", "0", "--logdir", tmp_path, "--name", "a").code == 0
    path = tmp_path / "19-1-shapes_a" / "19-1-shapes_a_0.pth"
    outcome = cli(*SMALL, "--task", "15-5", "--step", "1", "--logdir", tmp_path, "--step_ckpt", path)
    assert outcome.code == 2
    assert "19-1" in outcome.last_error
    assert "15-5" in outcome.last_error
