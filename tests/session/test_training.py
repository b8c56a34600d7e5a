"""Going on: a run's own step bit by bit with its own options, another's with those of the command."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import SMALL_BACKBONE
from torch import nn

from argparser import parse_options
from run import main
from runs.checkpoint import load_checkpoint, save_checkpoint
from runs.history import read_history
from session.optimizer import Schedule
from session.training import StepTraining
from train import to_device
from utils.signals import Stopped

BATCHES = 5  # of 8 of the 46 images of step 0
SMALL = (
    "--dataset shapes --task 15-5 --overlap --step 0 --no_pretrained --crop_size 64 "
    f"--backbone {SMALL_BACKBONE} "
    "--pooling 0 --batch_size 8 --num_workers 0 --print_interval 1 --no_tensorboard --where_to_sim CPU"
)
Run = Callable[[str], int]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def run(shapes_root: Path, logs: Path) -> Run:
    """``run("--name a ...")``: the command in this process; its exit code."""

    def command(words: str) -> int:
        torch.set_num_threads(1)
        return main(shlex.split(f"{SMALL} --data_root {shapes_root} --logdir {logs} {words}"))

    return command


def checkpoint(logs: Path, name: str) -> Path:
    return logs / f"15-5-shapes_{name}" / f"15-5-shapes_{name}_0.pth"


@pytest.fixture(scope="module")
def whole(run: Run, logs: Path) -> Path:
    """A run of two epochs; ``half.pth`` beside it is its checkpoint after the first, ``within.pth`` later."""
    path = checkpoint(logs, "whole")
    save = StepTraining._save

    def save_and_keep(self: StepTraining) -> None:
        save(self)
        kept = path.with_name("half.pth" if self.state.progress.epoch == 0 else "within.pth")
        if not kept.exists():
            save_checkpoint(kept, load_checkpoint(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTraining, "_save", save_and_keep)
        patch.setattr(StepTraining, "_save_is_due", lambda self: self.state.progress.batch == 2)
        assert run("--name whole --epochs 2 --lr 0.01") == 0
    assert load_checkpoint(path.with_name("within.pth"))["batch"] == 2
    return path


def unbroken(options: str, updates: int) -> list[float]:
    """The rate of every update of a step that is trained with the options from its start."""
    opts = parse_options(shlex.split(f"{SMALL} {options}"))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=opts.lrs[0])
    scheduler = Schedule.of(opts).make(optimizer, updates)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# Options that shape the schedule or live in the optimiser's state, beside those of the fixture's run.
DIFFERENT = [
    *("--lr 0.1", "--lr_power 0.5", "--lr_policy step --lr_decay_step 7 --lr_decay_factor 0.5"),
    *("--warmup 0.1", "--momentum 0.5", "--momentum 0", "--weight_decay 0", "--accumulate 2"),
    "--batch_size 4",
]


@pytest.mark.parametrize("options", ["--epochs 4", *DIFFERENT])
def test_a_step_resumes_only_with_its_own_options(
    run: Run, whole: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    common = "" if "--epochs" in options else "--epochs 2 "
    common += "" if "--lr " in options else "--lr 0.01 "
    files = [whole, whole.with_name("run.json")]  # the report reads the latter
    before = [file.read_bytes() for file in files]
    assert run(f"--name whole {common}{options}") == 2
    said = capsys.readouterr().err
    assert "was trained differently" in said and said.count("\n") == 1
    assert [file.read_bytes() for file in files] == before and (whole.parent / "results_0.json").is_file()


def test_other_images_in_the_data_folder_are_reported(
    run: Run, whole: Path, logs: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many, with the same classes; so their places in the list are the same."""
    data = Path(shutil.copytree(shapes_root, tmp_path / "shapes"))
    for file in data.rglob("train_*"):
        if file.is_file() and file.stem != "train_aug":
            file.rename(file.with_name(file.name.replace("train_", "photo_")))
    lines = data / "splits" / "train_aug.txt"
    lines.write_text(lines.read_text().replace("/train_", "/photo_"))
    save_checkpoint(checkpoint(logs, "moved"), load_checkpoint(whole.with_name("half.pth")))
    assert run(f"--name moved --epochs 2 --lr 0.01 --data_root {data}") == 2
    assert "names of the training images" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["half.pth", "within.pth"])
def test_with_the_same_options_another_runs_checkpoint_gives_the_unbroken_weights(
    run: Run, whole: Path, logs: Path, start: str
) -> None:
    name = f"same_{start.split('.')[0]}"
    assert run(f"--name {name} --epochs 2 --lr 0.01 --ckpt {whole.with_name(start)}") == 0
    found, expected = load_checkpoint(checkpoint(logs, name)), load_checkpoint(whole)
    for key, tensor in expected["model_state"].items():
        assert torch.equal(found["model_state"][key], tensor), key
    assert found["scheduler_state"] == expected["scheduler_state"]


@pytest.mark.parametrize("options", DIFFERENT)
def test_another_runs_checkpoint_resumes_with_the_commands_options(
    run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    """The schedule of all --epochs, where it stands after those that are done; and the momentum is taken."""
    made: list[StepTraining] = []

    def caught(self: StepTraining) -> None:
        made.append(self)
        raise Stopped("enough")

    monkeypatch.setattr(StepTraining, "train", caught)
    typed = f"--epochs 4 {options}" + ("" if "--lr " in options else " --lr 0.01")
    assert run(f"--name other --fresh --ckpt {whole} {typed}") == 75
    (training,) = made
    opts, optimizer = training.run.opts, training.trainer.optimizer
    updates = training.networks.context.updates // opts.epochs
    assert updates == {"--accumulate 2": 3, "--batch_size 4": 11}.get(options, BATCHES)
    expected = unbroken(typed, 4 * updates)[2 * updates :]
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["lr"])
        training.state.scheduler.step()
    assert found == expected and min(found) > 0
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (opts.momentum, opts.weight_decay)
        assert group["nesterov"] is (opts.momentum > 0)
    if opts.momentum:
        saved = load_checkpoint(whole)["optimizer_state"]["state"]
        buffers = [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]
        assert all(torch.equal(buffer, saved[i]["momentum_buffer"]) for i, buffer in enumerate(buffers))
    said = capsys.readouterr().out
    assert f"{2 * updates} of {4 * updates} updates are done, the learning rate is {expected[0]:.3g}" in said
    assert "was trained differently: " in said and "--epochs 2, now 4" in said


def test_more_epochs_train_at_the_rates_of_the_whole_schedule(
    run: Run, whole: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"--name longer --ckpt {whole} --epochs 3 --lr 0.1") == 0
    rates = [entry.lr for entry in read_history(logs / "15-5-shapes_longer" / "history_0.jsonl").entries]
    # A point of the curve tells the rate after its update, and the step's last is 0.
    assert rates == pytest.approx([*unbroken("--epochs 3 --lr 0.1", 3 * BATCHES)[-BATCHES + 1 :], 0])
    # The same command again: it is this run's own step now.
    before = checkpoint(logs, "longer").read_bytes()
    monkeypatch.chdir(logs)
    for same in (f"--ckpt {whole}", f"--ckpt {whole.relative_to(logs)}", ""):
        assert run(f"--name longer {same} --epochs 3 --lr 0.1") == 0
    other = whole.with_name("half.pth")
    said = refused(run, capsys, f"--name longer --ckpt {other} --epochs 3 --lr 0.1")
    assert f"step 0 was begun from --ckpt {whole}, now --ckpt {other}; give the same one, or none" in said
    said = refused(run, capsys, f"--name whole --ckpt {other} --epochs 2 --lr 0.01")
    assert "was begun without --ckpt" in said
    assert checkpoint(logs, "longer").read_bytes() == before


def test_other_rates_for_old_classifiers_keep_the_momentum(
    run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other groups have another order in the optimiser's state: names tell what belongs to what."""
    made: list[StepTraining] = []

    def caught(self: StepTraining) -> None:
        made.append(self)
        raise Stopped("enough")

    monkeypatch.setattr(StepTraining, "train", caught)
    monkeypatch.setattr("methods.Method.lr_factor", lambda self, name: 0.1 if "body" in name else 1.0)
    assert run(f"--name grouped --ckpt {whole} --epochs 4") == 75
    optimizer, names = made[0].trainer.optimizer, dict(made[0].state.model.named_parameters())
    assert len(optimizer.param_groups) == 2
    content = load_checkpoint(whole)
    for i, name in enumerate(content["optimizer_weights"]):
        saved = content["optimizer_state"]["state"][i]["momentum_buffer"]
        assert torch.equal(optimizer.state[names[name]]["momentum_buffer"], saved)


def refused(run: Run, capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert run(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("run.py: error: ") and said.count("\n") == 1
    return said


def test_what_leaves_nothing_to_train_is_refused(
    run: Run, whole: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing is left to train" in refused(run, capsys, f"--name none --ckpt {whole} --epochs 2 --lr 1")
    within = whole.with_name("within.pth")
    assert "nothing is left to train" in refused(run, capsys, f"--name none --ckpt {within} --epochs 1")
    falls = "--lr_policy step --lr_decay_step 1 --lr_decay_factor 1e-9"
    assert "falls to 0 within" in refused(run, capsys, f"--name none --epochs 3 {falls}")


def test_a_checkpoint_with_a_learning_rate_of_0_is_refused(
    run: Run, whole: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions before this one left it when ``--ckpt`` gave it more epochs."""
    content: dict[str, Any] = load_checkpoint(whole)
    content["manifest"]["options"]["epochs"] = 4
    save_checkpoint(checkpoint(logs, "zero"), content)
    said = refused(run, capsys, "--name zero --epochs 4 --lr 0.01")
    assert "the learning rate is 0 for the rest of the step" in said and "--fresh" in said


def test_a_checkpoint_that_does_not_say_its_rate_gets_the_commands_schedule(
    run: Run, whole: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a release, under the run's own name."""
    content = load_checkpoint(whole)
    kept = ("epoch", "model_state", "optimizer_state", "scheduler_state", "best_score")
    path = checkpoint(logs, "release")
    path.parent.mkdir()
    torch.save({key: content[key] for key in kept}, path)
    assert run("--name release --epochs 3 --lr 0.1") == 0
    said = capsys.readouterr().out
    rate = unbroken("--epochs 3 --lr 0.1", 3 * BATCHES)[2 * BATCHES]
    assert f"{2 * BATCHES} of {3 * BATCHES} updates are done, the learning rate is {rate:.3g}" in said


def test_a_pass_over_an_epoch_has_the_batches_of_its_training(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Context.batches(epoch)``: the same images in the same order with the same crops."""
    passes: dict[int | None, list[torch.Tensor]] = {}
    trained: dict[int, list[torch.Tensor]] = {}

    def compare(self: StepTraining) -> None:
        batches = self.networks.context.batches
        passes[None] = [images for images, _ in batches()]
        for epoch in (0, 1):
            passes[epoch] = [images for images, _ in batches(epoch)]
            self.monitor.begin_epoch(epoch, 0)
            trained[epoch] = [to_device(images, self.run.world.device) for images, *_ in self._batches(epoch)]
        raise Stopped("compared")

    monkeypatch.setattr(StepTraining, "train", compare)
    assert run("--name passes --epochs 2 --fresh") == 75
    for epoch in (0, 1):
        assert len(passes[epoch]) == BATCHES
        assert all(torch.equal(*pair) for pair in zip(passes[epoch], trained[epoch], strict=True))
    assert all(torch.equal(*pair) for pair in zip(passes[0], passes[None], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(passes[0], passes[1], strict=True))
