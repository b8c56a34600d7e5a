"""A kind of classifier of one's own in a method file, by the real command."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command import SMALL, Launch

FILE = '''
from methods import Method
from modules.classifiers import LinearClassifier


class AllSteps(LinearClassifier):
    """Classifiers of all steps from the first; those of steps to come are not chosen."""

    name = "all_steps"
    of_all_steps = True

    def scores(self, logits):
        return logits[:, : sum(self.classes)]


class FrozenFeatures(Method):
    """Later steps train the classifiers of this step and of those to come."""

    classifier = AllSteps.name

    @classmethod
    def add_options(cls, group):
        group.add_argument("--frozen_features", action="store_true", help="freeze the network after step 0")

    @classmethod
    def from_options(cls, opts):
        return cls() if opts.frozen_features else None

    def begin_step(self, context):
        for name, parameter in context.model.named_parameters():
            older = not name.startswith("cls.") or context.model.is_older_classifier(name)
            parameter.requires_grad_(context.step == 0 or not older)


PRESETS = {"FROZEN": {"frozen_features": True}}
'''


def test_it_trains_tests_predicts_and_goes_on(cli: Launch, tmp_path: Path, tiny_data: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    task = ("--task", "10-5-5", "--overlap", "--logdir", tmp_path, "--name", "own", "--lr", "0.01")
    run = (*SMALL, "--method_file", file, "--method", "FROZEN", *task)
    outcome = cli(*run, "--step", "0", "1")
    assert outcome.code == 0, outcome.err[-3000:]
    folder = tmp_path / "10-5-5-shapes_own"
    paths = [folder / f"10-5-5-shapes_own_{step}.pth" for step in range(3)]
    states = [torch.load(path, weights_only=True)["model_state"] for path in paths[:2]]
    widths = [[state[f"cls.{step}.weight"].shape[0] for step in range(3)] for state in states]
    assert widths == [[11, 5, 5]] * 2
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert {name for name in changed if name.startswith("cls.")} == {
        f"cls.{step}.{part}" for step in (1, 2) for part in ("weight", "bias")
    }
    trained = json.loads((folder / "results_1.json").read_text(encoding="utf-8"))
    assert cli(*run, "--step", "1", "--test").code == 0
    assert json.loads((folder / "results_1.json").read_text(encoding="utf-8")) == trained
    # The next step and a prediction need the file, but not the method.
    assert cli(*run, "--step", "2").code == 0
    assert paths[2].is_file()
    picture = next(tiny_data.rglob("*.jpg"))
    predict = ("--predict", picture, "--ckpt", paths[1], "--out", tmp_path / "out")
    assert cli(*predict, "--method_file", file).code == 0
    for without in (predict, (*SMALL, *task, "--step", "1", "--test")):
        outcome = cli(*without)
        assert outcome.code == 2
        assert "'all_steps' for --classifier" in outcome.last_error and "--method_file" in outcome.last_error
