"""Which checkpoint a step goes on from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from small_checkpoint import DEEPLAB, save_untrained
from torch import nn

from argparser import parse_options
from inference.load import load_model, model_from_checkpoint
from runs.folder import RunFolder
from runs.options import write_run_options
from utils.distributed import World
from utils.errors import UserError

STEP_0 = DEEPLAB.replace("--step 1", "--step 0")
STEP_1 = DEEPLAB
WORLD = World(0, 0, 1, torch.device("cpu"), None)


def folder_of(command: str, tmp_path: Path, checkpoint: Path) -> RunFolder:
    opts = parse_options([*shlex.split(command), "--logdir", str(tmp_path), "--step_ckpt", str(checkpoint)])
    return RunFolder(opts, WORLD)


def test_a_step_does_not_begin_from_one_that_is_half_trained(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    save_untrained(path, f"{STEP_0} --epochs 5")  # written in epoch 1
    with pytest.raises(
        UserError, match=r"other\.pth: step 0 is not finished, .* epoch 1 of 5; finish --step 0 first"
    ):
        folder_of(STEP_1, tmp_path, path).load_previous(1)
    save_untrained(path, f"{STEP_0} --epochs 1 --keep best")
    content = torch.load(path, weights_only=True)
    torch.save({**content, "best": None}, path)  # the best epoch is not chosen yet
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="step 0 is not finished"):
        folder_of(STEP_1, tmp_path, path).load_previous(1)
    save_untrained(path, f"{STEP_0} --epochs 1")
    assert folder_of(STEP_1, tmp_path, path).load_previous(1)["epoch"] == 0


def test_released_checkpoints_name_body_and_head_without_the_network(tmp_path: Path) -> None:
    path = tmp_path / "released.pth"
    model, _ = save_untrained(path, STEP_0, manifest=False)
    state = {f"module.{name.removeprefix('network.')}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 0, "model_state": state}, path)
    folder = folder_of(STEP_1, tmp_path, path)
    assert folder.load_previous(1).keys() == {"epoch", "model_state"}
    loaded = load_model(folder.spec, folder.load_previous(1), path, folder.opts.task_, 0)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_network_of_sdr_is_not_taken_for_torchvisions(tmp_path: Path) -> None:
    """Their weights have the same names and shapes, so that nothing else would tell."""
    path = tmp_path / "released.pth"
    resnet = STEP_0.replace("mobilenet_v2", "resnet50")
    save_untrained(path, f"{resnet} --fidelity released")
    with pytest.raises(UserError, match="it has the network of --fidelity released, not paper"):
        RunFolder(parse_options(shlex.split(resnet)), WORLD).load(path, 0)
    assert isinstance(
        model_from_checkpoint(path, parse_options([])).model.network.head.activation, nn.Identity
    )
    save_untrained(path, resnet)
    with pytest.raises(UserError, match="it has the network of --fidelity paper, not released"):
        RunFolder(parse_options([*shlex.split(resnet), "--fidelity", "released"]), WORLD).load(path, 0)


def write(results: Path, iou: float) -> None:
    """Results of which only the names and the values that later steps read matter."""
    results.parent.mkdir(exist_ok=True)
    step = int(results.stem.removeprefix("results_"))
    iou_by_class = {"ball": iou, "moon": None}
    content = {"step": step, "class_iou": iou_by_class, "indices": {"ball": 0, "moon": 1}, "miou_all": iou}
    results.write_text(json.dumps(content))


def test_forgetting_is_counted_from_the_run_that_trained_the_previous_step(tmp_path: Path) -> None:
    """Not from a step 0 that this run's folder has of earlier."""
    folder = folder_of(STEP_1, tmp_path, tmp_path / "other" / "other_0.pth")
    for path, iou in ((folder.path, 0.1), (tmp_path / "other", 0.7)):
        write(path / "results_0.json", iou)
    (found,) = folder.earlier_results(1).values()
    assert found["class_iou"] == {"ball": 0.7, "moon": None} and found["miou_all"] == 0.7


@pytest.mark.parametrize("text", [None, "", "[]", '{"step": 0, "class_iou": 3}', '{"step": 0}'])
def test_damaged_results_of_an_earlier_step_are_logged_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    """The step is trained by then: its own results must come out."""
    folder = folder_of(STEP_1, tmp_path, tmp_path / "other" / "other_0.pth")
    (tmp_path / "other").mkdir()
    if text is not None:
        (tmp_path / "other" / "results_0.json").write_text(text)
    assert folder.earlier_results(1) == {}
    fault = "its results file is missing" if text is None else r"\S+results_0\.json: is not a results file .*"
    assert re.search(rf"forgetting and average lack step 0 of {tmp_path}/other: {fault}", caplog.text)


@pytest.mark.parametrize("there", ["logs", "moved"])
def test_a_later_command_finds_the_results_of_the_run_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """From another working directory, and where all runs were moved."""
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.chdir(logs)
    first = folder_of(STEP_1, logs, Path("other") / "other_0.pth")
    write(logs / "other" / "results_0.json", 0.7)
    write(first.results(1), 0.4)
    write_run_options(first.path, first.options, step=1, lr=0.1)
    monkeypatch.chdir(tmp_path)
    logs.rename(there)
    later = RunFolder(parse_options([*shlex.split(STEP_1), "--logdir", there]), WORLD)
    assert [found["miou_all"] for found in later.earlier_results(2).values()] == [0.7, 0.4]
