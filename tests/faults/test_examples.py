"""Methods of docs/examples and others: trained, killed, resumed, tested, on two processes, in the report."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    BOUND,
    COMMON,
    MOBILENET,
    ROOT,
    SEGFORMER,
    SMALL,
    Fork,
    completed,
    differences,
    left_by,
    running,
    start_words,
)
from PIL import Image

from report import comparison, find_runs
from report import main as report
from report.groups import arrange
from report.reading import read_run
from session.state import StepState

EXAMPLES = {
    "weight_fusion": "FUSION",
    "dkd": "DKD-EXAMPLE",
    "contrastive": "CONTRAST",
    "mean_replay": "REPLAY",
}
# Built-in methods with networks, classifiers or states of their own: network, options, and the number of
# processes. Three steps, the last of which is killed. tests/cli/test_methods.py has other combinations.
MLP = ("--model", "mlp", *SMALL)
HALF = ("--opt_level", "O1")
RELEASED = ("--fidelity", "released")
BUILT_IN: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "DKD": (SMALL, ("--lr", "0.001", *HALF), 1),
    "DKD-M": (MLP, ("--lr", "0.001", "--memory", "6", *RELEASED), 2),
    "STAR": (MLP, ("--lr", "0.001", "--opt_level", "O3"), 2),
    "STAR-M": (SMALL, ("--lr", "0.001", "--memory", "6", *RELEASED), 1),
    "MIB+EWF": (MLP, (), 2),
    "PLOP+EWF": (SMALL, HALF, 1),
    "LGKD": (MLP, ("--spp_scales", "1", "2", *HALF), 2),
    "MIB+NeST": (SEGFORMER, ("--warm_epochs", "2"), 2),
    "PLOP+NeST": (SMALL, ("--warm_epochs", "2", *RELEASED), 1),
    "RCIL": (MOBILENET, ("--crop_size", "32"), 1),
    "DFT": (SMALL, (), 1),
}
# After every batch, so that a process can be killed at any.
SAVING = ("--ckpt_minutes", "0.00001")
RUN = "15-5-shapes_run"
LINES = {"weight_fusion": 35, "dkd": 75, "contrastive": 55, "cosine_distillation": 35, "mean_replay": 65}


def command(data: Path, logs: Path, name: str, example: str, *more: object) -> list[object]:
    file = ROOT / "docs" / "examples" / f"{example}.py"
    network, own, _ = BUILT_IN.get(example, (SMALL, ("--method_file", file), 1))
    return [
        *(*network, *COMMON, "--data_root", data, "--logdir", logs, "--name", name, "--epochs", "1"),
        *("--step", "0", "1", *own, "--method", EXAMPLES.get(example, example), *more),
    ]


def kill_after_a_save() -> None:
    """Let the process kill itself after the save at KILL_AT: step, epoch and batches, from 0."""
    save = StepState.save

    def killing(self: StepState) -> None:
        save(self)
        at = self.start.step, self.progress.epoch, self.progress.batch
        if os.environ.get("KILL_AT") == str(at):
            os.kill(os.getpid(), signal.SIGKILL)

    StepState.save = killing  # type: ignore[method-assign]


class Killing(Fork):
    prepare = kill_after_a_save


def copy_steps(of: Path, to: Path, without: int) -> None:
    """Copy the run folder of the steps before one."""
    shutil.copytree(of, to, ignore=shutil.ignore_patterns(f"*_{without}", f"*_{without}.*"))


def left(logs: Path, name: str) -> dict[str, Any]:
    return left_by(logs / f"15-5-shapes_{name}")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_from_training_to_table(
    tiny_data: Path, tmp_path: Path, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (command(tiny_data, tmp_path / kind, "run", example) for kind in ("whole", "broken"))
    assert "step 1 resumes" not in completed(whole, tmp_path / "out").output()
    copy_steps(tmp_path / "whole" / RUN, tmp_path / "broken" / RUN, without=1)
    monkeypatch.setenv("KILL_AT", "(1, 0, 2)")
    with running([*broken, *SAVING], tmp_path / "out", start=Killing) as run:
        assert run.wait(BOUND) == [-signal.SIGKILL]
        assert "step 0 is done" in run.output()
    resumed = completed(broken, tmp_path / "out")
    assert "step 1 resumes at epoch 1 of 1, after batch 2 of 3" in resumed.output()
    found = left_by(tmp_path / "whole" / RUN)
    assert differences(found, left_by(tmp_path / "broken" / RUN)) == []

    results = tmp_path / "broken" / RUN / "results_1.json"
    results.unlink()
    completed([*broken, "--test"], tmp_path / "out")
    assert differences(found, left_by(tmp_path / "broken" / RUN)) == []

    completed(command(tiny_data, tmp_path, "pair", example, "--deterministic"), tmp_path / "out", 2)
    for step in (0, 1):
        content = left(tmp_path, "pair")[f"checkpoint {step}"]
        for weights in (content["model_state"], content["modules"]):
            assert all(weight.isfinite().all() for weight in weights.values())
        names = [name.split(".")[:2] for name in content["modules"]]
        assert names == (4 * [["Contrast", "head"]] if example == "contrastive" else [])

    table = comparison(find_runs([tmp_path]))
    assert table.count(f"{RUN} ") == 4 and "15-5-shapes_pair " in table, table


@pytest.mark.parametrize("method", BUILT_IN)
def test_a_method_killed_in_its_last_step(
    tiny_data: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the bits of a run that was not; ``--test`` and ``--predict`` read them."""
    processes = BUILT_IN[method][2]
    total = ("--batch_size", 4 // processes, *(("--deterministic",) if processes > 1 else ()))
    words = ("--task", "10-5-5", *total, "--step")
    logs = {kind: tmp_path / kind for kind in ("broken", "whole")}
    commands = {kind: command(tiny_data, logs[kind], "run", method, *words, "all") for kind in logs}
    folders = {kind: logs[kind] / "10-5-5-shapes_run" for kind in logs}
    started = completed(commands["whole"], tmp_path / "out", processes).output()
    assert "step 2 resumes" not in started and "loaded from" not in started
    copy_steps(folders["whole"], folders["broken"], without=2)
    monkeypatch.setenv("KILL_AT", "(2, 0, 2)")
    with running([*commands["broken"], *SAVING], tmp_path / "out", processes, Killing) as run:
        assert -signal.SIGKILL in run.wait(BOUND)
        assert "step 1 is done" in run.output()
    resumed = completed(commands["broken"], tmp_path / "out", processes).output()
    assert "step 2 resumes at epoch 1 of 1, after batch 2 of" in resumed
    whole = left_by(folders["whole"])
    assert whole.keys() == {f"{kind}{step}" for kind in ("checkpoint ", "results_") for step in range(3)}
    for step in range(3):
        assert all(weight.isfinite().all() for weight in whole[f"checkpoint {step}"]["model_state"].values())
    ended = {name: whole[name] for name in ("checkpoint 2", "results_2")}
    assert differences(ended, left_by(folders["broken"], 2)) == []
    earlier = [f"10-5-5-shapes_run_{step}.pth" for step in (0, 1)]
    assert filecmp.cmpfiles(folders["broken"], folders["whole"], earlier, shallow=False)[0] == earlier

    (folders["broken"] / "results_2.json").unlink()
    test = command(tiny_data, logs["broken"], "run", method, *words, "2", "--test")
    completed(test, tmp_path / "out", processes)
    assert differences(ended, left_by(folders["broken"], 2)) == []

    photo = min((tiny_data / "JPEGImages").iterdir())
    predicted = ("--predict", photo, "--out", tmp_path / "photos", "--raw")
    trained = folders["broken"] / "10-5-5-shapes_run_2.pth"
    completed([*predicted, "--ckpt", trained], tmp_path / "out")
    with Image.open(tmp_path / "photos" / "predictions" / f"{photo.stem}.png") as mask:
        assert mask.size == (64, 64) and {value for _, value in mask.getcolors()} <= set(range(21))
    ((compared,),) = (group.methods for group in arrange([read_run(folders["broken"])]))
    assert (compared.label, compared.step) == ("run", 2)


def test_the_head_of_two_killed_processes(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreter: Path
) -> None:
    """With the best epoch kept and gradients accumulated; torchrun's run is the unbroken one."""

    def start_torchrun(arguments: Sequence[str], environment: dict[str, str], output: Path) -> Any:
        torchrun = [str(interpreter), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return start_words([*torchrun, "run.py", *arguments], environment, output)

    more = ("--deterministic", "--keep", "best", "--epochs", "2", "--batch_size", "2", "--accumulate", "2")
    words = command(tiny_data, tmp_path, "whole", "contrastive", *more)
    torchrun = completed(words, tmp_path / "w", start=start_torchrun)
    assert "2 processes (gloo)" in torchrun.output()
    broken = command(tiny_data, tmp_path, "broken", "contrastive", *more, *SAVING)
    for point in ("(0, 0, 4)", "(1, 0, 3)"):  # in the first epoch, so that the best one depends on it
        monkeypatch.setenv("KILL_AT", point)
        with running(broken, tmp_path / "b", 2, Killing) as run:
            assert -signal.SIGKILL in run.wait(BOUND)
    completed(broken, tmp_path / "b", 2)
    whole = left(tmp_path, "whole")
    assert differences(whole, left(tmp_path, "broken")) == []
    heads = [whole[f"checkpoint {step}"]["modules"]["Contrast.head.0.weight"] for step in (0, 1)]
    assert not torch.equal(*heads)
    assert report([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "15-5-shapes_broken" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("example", "host"),
    [("weight_fusion", ("--method", "MIB")), ("PLOP+EWF", ("--method", "PLOP", "--fix_pre_cls"))],
)
def test_fusion_averages_what_its_host_trains(
    tiny_data: Path, tmp_path: Path, example: str, host: tuple[str, ...]
) -> None:
    completed(command(tiny_data, tmp_path, "fused", example), tmp_path / "out")
    step_0 = tmp_path / "15-5-shapes_fused" / "15-5-shapes_fused_0.pth"
    plain = (*host, "--step", "1", "--step_ckpt", step_0)
    completed(command(tiny_data, tmp_path, "plain", example, *plain), tmp_path / "out")
    old = left(tmp_path, "fused")["checkpoint 0"]["model_state"]
    fused, new = (left(tmp_path, name)["checkpoint 1"]["model_state"] for name in ("fused", "plain"))
    assert {name for name in new if name not in old} == {"cls.1.weight", "cls.1.bias"}
    for name, weight in new.items():
        averaged = name in old and weight.is_floating_point()
        expected = torch.lerp(old[name], weight, (5 / 21) ** 0.5) if averaged else weight
        assert torch.equal(fused[name], expected), name


def test_killed_in_the_pre_tuning_of_classifiers(tiny_data: Path, tmp_path: Path) -> None:
    """The resumed run loads what was finished, and ends with the unbroken one's bits."""
    more = ("--warm_epochs", "6", "--step", "0", "1")
    completed(command(tiny_data, tmp_path, "whole", "PLOP+NeST", *more), tmp_path / "whole")
    broken = command(tiny_data, tmp_path, "broken", "PLOP+NeST", *more)
    with running(broken, tmp_path / "out") as run:
        run.wait_for("pre-tuning epoch 2 of 6")
        run.kill()
        assert "step 1 epoch" not in run.output()
    resumed = completed(broken, tmp_path / "out").output()
    assert "pre_tuning_1: loaded from" in resumed and "pre-tuning epoch 6 of 6" in resumed
    assert differences(left(tmp_path, "whole"), left(tmp_path, "broken")) == []


@pytest.mark.parametrize("example", LINES)
def test_an_example_is_short(example: str) -> None:
    text = (ROOT / "docs" / "examples" / f"{example}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= LINES[example]
