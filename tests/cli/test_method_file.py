"""A method of one's own in one file: the example of docs/methods.md by the real command, and bad files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command import MOBILENET, ROOT, SMALL, Launch

from methods import METHODS, REGISTRY, load_method_file
from utils.errors import UserError

EXAMPLE = ROOT / "docs" / "examples" / "cosine_distillation.py"


def test_the_example_trains_tests_and_is_logged(cli: Launch, tmp_path: Path) -> None:
    run = (
        *(*SMALL, "--method_file", EXAMPLE, "--task", "10-10", "--overlap", "--step", "all", "--lr", "0.01"),
        *("--logdir", tmp_path, "--name", "own", "--method", "cosine", "--debug"),
    )
    outcome = cli(*run, processes=2)
    assert outcome.code == 0, outcome.err[-3000:]
    folder = tmp_path / "10-10-shapes_own"
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "loss_cosine=10.0 (preset)" in log
    assert "methods: Classification\n" in log  # step 0 has no teacher
    assert "methods: Classification, CosineDistillation\n" in log
    terms = [line for line in log.splitlines() if "step 1 epoch 1/1:" in line and "cosine" in line]
    assert terms, log[-3000:]
    content = torch.load(folder / "10-10-shapes_own_1.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in content["model_state"].values())
    trained = json.loads((folder / "results_1.json").read_text(encoding="utf-8"))
    assert cli(*run[:-1], "--test").code == 0
    assert json.loads((folder / "results_1.json").read_text(encoding="utf-8")) == trained


def test_two_processes_train_what_reads_only_a_part_of_the_network(cli: Launch, tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text(
        "from methods import Method\n\n\nclass Part(Method):\n    replaces_classification = True\n"
        "    needs = frozenset({'pre_logits'})\n\n    @classmethod\n    def from_options(cls, opts):\n"
        "        return cls()\n\n    def losses(self, batch):\n"
        "        return {'part': batch.features['pre_logits'].float().pow(2).mean()}\n"
    )
    network = (*MOBILENET, "--crop_size", "32", "--batch_size", "2")
    run = ("--method_file", file, "--task", "15-5", "--logdir", tmp_path, "--name", "run")
    outcome = cli(*network, *run, processes=2)
    assert outcome.code == 0, outcome.err[-3000:]


METHOD = """
from methods import Method

class Mine(Method):
    @classmethod
    def from_options(cls, opts):
        return None
"""
OWN_OPTION = """
    @classmethod
    def add_options(cls, parser):
        parser.add_argument("--unce", default="")
"""
OWN_ROLE = """
    @classmethod
    def add_options(cls, parser):
        parser.add_argument("--mine", role="sideways")
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "defines no subclass of methods.Method"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("x = 1\nimport no_such_module\n", "line 2: ModuleNotFoundError"),
        ("x = 1\nraise SystemExit(0)\n", "line 2: SystemExit: 0"),
        ("x = 1\0\n", "line 1: SyntaxError"),
        (METHOD.replace("Mine", "CIL"), "method CIL already exists"),
        (METHOD + "PRESETS = ['MINE']\n", "PRESETS must map names to options"),
        (METHOD + "PRESETS = {'sdr': {}}\n", "there is a --method sdr already"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    before = list(REGISTRY), list(METHODS)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load_method_file(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == (REGISTRY, METHODS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (METHOD + "PRESETS = {'FT2': {'loss_none': 1}}\n", "PRESETS['FT2']: --loss_none 1: is no option"),
        (METHOD + OWN_OPTION, "conflicting option string: --unce; rename the option"),
        (METHOD + OWN_ROLE, "mine.py: Mine.add_options: --mine: role 'sideways' is none of network, data"),
        (None, "mine.py: is not a Python file"),
    ],
)
def test_a_bad_file_ends_the_command_with_one_line(
    cli: Launch, tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    outcome = cli("--method_file", file, *(["--method", "FT2"] if text and "FT2" in text else []))
    assert outcome.code == 2, outcome.err
    assert said in outcome.last_error
    assert "Traceback" not in outcome.err


def test_a_method_that_exits_is_no_success(cli: Launch, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        METHOD.replace("None", "cls()") + "    def losses(self, batch):\n        raise SystemExit(0)\n"
    )
    outcome = cli(*SMALL, "--method_file", file, "--task", "15-5", "--logdir", tmp_path)
    assert outcome.code == 2, outcome.err
    line = len(file.read_text().splitlines())
    assert (
        outcome.last_error == f"run.py: error: {file}, line {line}: ends the program; raise an error instead"
    )


UNSAVABLE = """
import numpy
from methods import Method

class Mine(Method):
    @classmethod
    def from_options(cls, opts):
        return cls()

    def state_dict(self):
        return {"mean": [numpy.zeros(2)]}
"""


def test_state_that_cannot_be_saved_ends_the_command_at_the_first_batch(cli: Launch, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(UNSAVABLE)
    words = ("--method_file", file, "--task", "10-10", "--logdir", tmp_path, "--name", "x", "--debug")
    outcome = cli(*SMALL, *words, "--print_interval", "1")
    assert outcome.code == 2, outcome.err[-2000:]
    assert "Traceback" not in outcome.err
    assert f"{file}: Mine.state_dict: a checkpoint cannot hold ndarray at state['mean'][0]; use tensors" in (
        outcome.last_error
    )
    assert not list(tmp_path.rglob("*.pth"))


MODULE = """
from pathlib import Path
import torch
from torch import nn
from methods import Method

class Mine(Method):
    @classmethod
    def from_options(cls, opts):
        return cls()

    def begin_step(self, context):
        self.part = nn.Linear(2, 2)

    def modules(self):
        return {"part": self.part}

    def weight_decay_factor(self, name):
        return 0.0

    @torch.no_grad()
    def end_step(self, context):
        assert not self.part.training
        self.part.bias.add_(1)
        if (Path(__file__).parent / "overflow").exists():
            self.part.weight.fill_(float("inf"))
"""


def test_a_module_goes_on_in_the_next_step_and_is_saved_only_if_finite(cli: Launch, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    words = (*SMALL, "--method_file", file, "--task", "10-10", "--logdir", tmp_path, "--name", "x")
    assert cli(*words, "--step", "all").code == 0
    first, second = (
        torch.load(path, weights_only=True)["modules"]
        for path in sorted((tmp_path / "10-10-shapes_x").glob("*.pth"))
    )
    assert first.keys() == {"Mine.part.weight", "Mine.part.bias"}
    assert torch.equal(first["Mine.part.weight"], second["Mine.part.weight"])  # no loss reads them
    assert torch.equal(first["Mine.part.bias"] + 1, second["Mine.part.bias"])
    (tmp_path / "overflow").touch()
    outcome = cli(*words, "--step", "1", "--fresh")
    assert outcome.code == 1, outcome.err[-2000:]
    assert "the weights are not finite and are not saved" in outcome.err
