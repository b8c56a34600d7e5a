"""``end_step``: once per step, before the last checkpoint and the evaluation, also across SIGKILL."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from command import SMALL, Launch

METHOD = """
import os, signal
from pathlib import Path

import torch
from methods import Method

HERE = Path(__file__).parent


def die_once(where):
    if (HERE / where).exists():
        (HERE / where).unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Ends(Method):
    count = 0

    @classmethod
    def from_options(cls, opts):
        return cls()

    @torch.no_grad()
    def end_step(self, context):
        images = sum(len(images) for images, _ in context.batches())
        with (HERE / "calls").open("a") as file:
            told = context.epochs, context.updates, context.lr
            print(context.step, images, context.model.training, *told, file=file)
        for parameter in context.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        self.count += 1
        die_once("in end_step")
        context.model.register_forward_pre_hook(lambda *_: die_once("in evaluation"))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
"""


@pytest.mark.parametrize("keep", ["last", "best"])
def test_it_happens_once_also_across_kills(cli: Launch, tmp_path: Path, keep: str) -> None:
    file, calls = tmp_path / "ends.py", tmp_path / "calls"
    file.write_text(METHOD)
    base = (
        *(*SMALL, "--method_file", file, "--task", "10-10", "--logdir", tmp_path, "--keep", keep),
        *("--ckpt_minutes", "0.00001", "--lr", "0.01"),
    )
    assert cli(*base, "--name", "whole").code == 0
    (line,) = calls.read_text().splitlines()
    step, images, training, epochs, updates, lr = line.split()
    assert (step, training, epochs, lr) == ("0", "False", "1", "0.01")
    assert int(images) == 4 * int(updates) > 0
    for where in ("in end_step", "in evaluation"):
        (tmp_path / where).touch()
        outcome = cli(*base, "--name", "broken")
        assert outcome.code in (-signal.SIGKILL, 128 + signal.SIGKILL), outcome.err[-2000:]
        if where == "in end_step":
            assert len(calls.read_text().splitlines()) == 2
    # The kill in the evaluation came after the checkpoint that holds the change.
    assert cli(*base, "--name", "broken").code == 0
    assert calls.read_text().splitlines() == 3 * [line]
    whole, broken = (
        torch.load(tmp_path / f"10-10-shapes_{name}" / f"10-10-shapes_{name}_0.pth", weights_only=True)
        for name in ("whole", "broken")
    )
    assert whole["ended"] and broken["ended"]
    assert whole["method_state"]["Ends"] == broken["method_state"]["Ends"] == {"count": 1}
    for name, value in whole["model_state"].items():
        assert torch.equal(value, broken["model_state"][name]), name
    results = tmp_path / "10-10-shapes_broken" / "results_0.json"
    trained = json.loads(results.read_text())
    assert cli(*base, "--name", "broken", "--test").code == 0
    assert json.loads(results.read_text()) == trained


STATISTICS = """
import torch
from methods import Method


class Same(Method):
    @classmethod
    def from_options(cls, opts):
        return cls()

    def end_step(self, context):
        own = torch.stack([m.running_var.sum() for m in context.model.modules() if hasattr(m, "running_var")])
        total = context.reduce(own.clone())
        assert torch.equal(total, own + own), (total, own)
"""


def test_all_processes_end_the_step_with_the_network_that_is_saved(cli: Launch, tmp_path: Path) -> None:
    """Each process has its own running statistics after the last batch."""
    (tmp_path / "same.py").write_text(STATISTICS)
    words = (*SMALL, "--method_file", tmp_path / "same.py", "--task", "15-5", "--logdir", tmp_path)
    outcome = cli(*words, processes=2)
    assert outcome.code == 0, outcome.err[-2000:]
