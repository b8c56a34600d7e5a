"""Every misuse of a hook is reported in one line that names file, class and hook."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import methods
from argparser import parse_options
from methods import REGISTRY, Context, Method, build_methods
from methods.checks import check_class, preset_fault
from methods.own_modules import check_unchanged, collect_modules
from methods.presets import _PRESETS, METHODS
from session.optimizer import make_optimizer
from tasks import get_task
from train import Trainer
from utils.errors import UserError

HEAD = """
import torch
from torch import nn
from methods import Method

class Mine(Method):
    @classmethod
    def add_options(cls, parser):
        parser.add_argument("--loss_mine", type=float, default=1.0)

    @classmethod
    def from_options(cls, opts):
        return cls() if opts.loss_mine else None

"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Path of a method file; what it adds to the lists of this process is taken out again."""
    lists = list(REGISTRY), list(METHODS), dict(_PRESETS)
    monkeypatch.setattr(methods, "_LOADED", set())
    yield tmp_path / "mine.py"
    REGISTRY[:], METHODS[:] = lists[:2]
    _PRESETS.clear()
    _PRESETS.update(lists[2])


class Toy(nn.Module):
    """B×3×H×W → logits."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.cls[0](images), {}


def first_batch(file: Path) -> dict[str, Tensor]:
    """Read the command line and train one batch of step 0, as a run does."""
    opts = parse_options(["--method_file", str(file), "--dataset", "shapes", "--task", "10-10"])
    built = build_methods(opts, 0)
    context = Context(task=get_task("shapes", "10-10"), step=0, model=Toy())
    for method in built.values():
        method.begin_step(context)
    own = collect_modules(built, context)
    optimizer = make_optimizer(opts, context.model, built, 0.1, own)
    trainer = Trainer(context, built, optimizer, own_modules=own)
    torch.manual_seed(0)
    terms = trainer.train_step(torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8))
    check_unchanged(own, built)
    return terms


def said(file: Path, text: str) -> str:
    """The error's line."""
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        first_batch(file)
    line = str(caught.value)
    assert str(file) in line and "\n" not in line
    return line


def hook(text: str) -> str:
    return HEAD + "".join(f"    {line}\n" for line in text.splitlines())


HOOKS = {
    "a loss of the classification's name": (
        "def losses(self, batch): return {'ce': batch.outputs.mean()}",
        "Mine.losses: Classification.losses has a loss 'ce' already; choose another name",
    ),
    "a penalty of a loss's name": (
        "def penalty(self): return {'ce': __import__('torch').zeros(())}",
        "Mine.penalty: Classification.losses has a loss 'ce' already",
    ),
    "the sum's name": (
        "def losses(self, batch): return {'total': batch.outputs.mean()}",
        "Mine.losses: a loss cannot be named 'total'",
    ),
    "a tensor": (
        "def losses(self, batch): return batch.outputs.mean()",
        "Mine.losses: returned a tensor of shape (); return a dict of scalar tensors by name",
    ),
    "nothing": ("def losses(self, batch): batch.outputs.mean()", "Mine.losses: returned None; return a dict"),
    "a float": (
        "def losses(self, batch): return {'mine': 0.5}",
        "Mine.losses: the loss 'mine' is 0.5, not a scalar tensor",
    ),
    "a map": (
        "def losses(self, batch): return {'mine': batch.outputs[:, 0]}",
        "Mine.losses: the loss 'mine' is a tensor of shape (2, 8, 8), not a scalar tensor",
    ),
    "relabel that returns labels": (
        "def relabel(self, batch): return batch.targets",
        "Mine.relabel: returned a tensor of shape (2, 8, 8), which is not used; replace batch.targets",
    ),
    "relabel that loses the labels": (
        "def relabel(self, batch): batch.targets = None",
        "Mine.relabel: left None as batch.targets; they must stay labels of shape (2, 8, 8), torch.int64",
    ),
    "relabel in place": (
        "def relabel(self, batch): batch.targets[0] = 255",
        "Mine.relabel: changes batch.targets in place, and so batch.original_targets; change a clone()",
    ),
    "relabel by an unknown class": (
        "def relabel(self, batch): batch.targets = torch.full_like(batch.targets, 300)",
        "Mine.relabel: left the label 300; classes are 0 to ",
    ),
    "relabel with weights of another shape": (
        "def relabel(self, batch): batch.image_weights = torch.ones(3)",
        "Mine.relabel: set batch.image_weights to a tensor of shape (3,); it must be a tensor of shape (2,)",
    ),
    "relabel that leaves scores": (
        "def relabel(self, batch): batch.targets = batch.targets[:, None].float()",
        "Mine.relabel: left ((2, 1, 8, 8), torch.float32) as batch.targets; they must stay labels",
    ),
    "observe that returns": (
        "def observe(self, batch): return 3",
        "Mine.observe: returned 3, which is not used",
    ),
    "no rate": (
        "def lr_factor(self, parameter): pass",
        "Mine.lr_factor: returned None for cls.0.weight; return a number of at least 0",
    ),
    "a rate in words": ("def lr_factor(self, parameter): return '1'", "Mine.lr_factor: returned '1' for"),
    "a negative rate": ("def lr_factor(self, parameter): return -1", "Mine.lr_factor: returned -1 for"),
    "loss": ("def loss(self, batch): return {}", "Mine.loss: is no hook; did you mean losses?"),
    "begin_steps": (
        "def begin_steps(self, context): pass",
        "Mine.begin_steps: is no hook; did you mean begin_step?",
    ),
    "a hook of the first version": (
        "def resume(self, state): pass",
        "Mine.resume: is now called load_state_dict, and what load_state_dict did is now from_previous_step",
    ),
    "no weight decay": (
        "def weight_decay_factor(self, parameter): pass",
        "Mine.weight_decay_factor: returned None for cls.0.weight",
    ),
    "teacher_needs as a string": ("teacher_needs = 'body'", "Mine.teacher_needs: must be a set of names"),
    "need": ("need = frozenset({'body'})", "Mine.need: is no hook; did you mean needs?"),
    "needs as a string": (
        "needs = 'pre_logits'",
        "Mine.needs: must be a set of names, e.g. frozenset({\"pre_logits\"}), not 'pre_logits'",
    ),
    "needs of an object as a string": (
        "def __init__(self): self.needs = 'body'",
        "Mine.needs: must be a set of names",
    ),
    "a hook with other arguments": (
        "def losses(self): return {}",
        "Mine.losses: is called as losses(batch): too many positional arguments",
    ),
    "modules as a list": (
        "def modules(self): return [nn.Linear(2, 2)]",
        "Mine.modules: returned a list; return a dict of nn.Modules by name, {} for none",
    ),
    "modules that returns nothing": ("def modules(self): pass", "Mine.modules: returned None; return a dict"),
    "a module's name with a dot": (
        "def modules(self): return {'a.b': nn.Linear(2, 2)}",
        "Mine.modules: a module cannot be named 'a.b'; use text without dots",
    ),
    "a module without name": (
        "def modules(self): return {'': nn.Linear(2, 2)}",
        "Mine.modules: a module cannot be named ''",
    ),
    "a weight as module": (
        "def modules(self): return {'scale': torch.nn.Parameter(torch.ones(3))}",
        "Mine.modules: 'scale' is a tensor of shape (3,), not an nn.Module",
    ),
    "a module of unknown size": (
        "def modules(self): return {'head': nn.LazyLinear(2)}",
        "Mine.modules: 'head' has lazy weights; give their sizes in begin_step",
    ),
    "a part of the network": (
        "def begin_step(self, context): self.head = nn.Sequential(context.model.cls[0], nn.ReLU())\n"
        "def modules(self): return {'head': self.head}",
        "Mine.modules: 'head' has weights of the network, which trains them; remove it",
    ),
    "modules built anew": (
        "def modules(self): return {'head': nn.Linear(2, 2)}",
        "Mine.modules: returned other modules at a later call, which are not trained; build them in",
    ),
    "modules replaced at the first batch": (
        "head = nn.Linear(2, 2)\ndef modules(self): return {'head': self.head}\n"
        "def observe(self, batch): self.head = nn.Linear(2, 2)",
        "Mine.modules: returned other modules at a later call",
    ),
    "modules added at the first batch": (
        "head = {}\ndef modules(self): return self.head\n"
        "def observe(self, batch): self.head = {'head': nn.Linear(2, 2)}",
        "Mine.modules: returned other modules at a later call",
    ),
    "a hook that is no function": ("relabel = 3", "Mine.relabel: is a hook and must be a method, not 3"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_wrong_hook_is_reported_by_the_first_batch(file: Path, name: str) -> None:
    text, message = HOOKS[name]
    assert message in said(file, hook(text))


OPTION = 'parser.add_argument("--loss_mine", type=float, default=1.0)'
FILES = {
    "a method that is an nn.Module": (
        HEAD.replace("Mine(Method)", "Mine(Method, nn.Module)"),
        "Mine.modules: is a hook, but the class is an nn.Module, which has that name too; derive from Method",
    ),
    "no from_options": (
        "from methods import Method\nclass Mine(Method):\n    pass\n",
        "Mine.from_options: is missing",
    ),
    "from_options without @classmethod": (
        HEAD.replace("    @classmethod\n    def from_options", "    def from_options"),
        "Mine.from_options: must be a @classmethod",
    ),
    "from_options that returns True": (
        HEAD.replace("return cls() if opts.loss_mine else None", "return True"),
        "Mine.from_options: returned True; return a Mine, or None for off",
    ),
    "an option without default": (
        HEAD.replace(", default=1.0", ""),
        "Mine.add_options: --loss_mine has no default; give one",
    ),
    "a required option": (
        HEAD.replace("default=1.0", "required=True"),
        "Mine.add_options: --loss_mine is required; give it a default",
    ),
    "an option without dashes": (HEAD.replace('"--loss_mine"', '"loss_mine"'), "loss_mine needs dashes"),
    "an option under another's name": (
        HEAD.replace("default=1.0", "default=1.0, dest='lr'"),
        "Mine.add_options: --loss_mine sets opts.lr, which has a meaning already",
    ),
    "add_options that fails": (
        HEAD.replace(OPTION, "parser.add_arguments()"),
        "Mine.add_options: AttributeError:",
    ),
    "a preset for no option": (
        HEAD + "PRESETS = {'MINE': {'loss_mime': 1.0}}\n",
        "PRESETS['MINE']: --loss_mime 1.0: is no option",
    ),
    "a preset's number as text": (
        HEAD + "PRESETS = {'MINE': {'loss_mine': '1'}}\n",
        "PRESETS['MINE']: --loss_mine '1': must be a float",
    ),
    "a preset's number out of range": (
        HEAD + "PRESETS = {'MINE': {'loss_kd': -1.0}}\n",
        "PRESETS['MINE']: --loss_kd -1.0: -1.0 is not a number of at least 0",
    ),
    "a preset's flag as number": (
        HEAD + "PRESETS = {'MINE': {'unce': 1}}\n",
        "PRESETS['MINE']: --unce 1: must be True or False",
    ),
    "a preset's flag for a number": (HEAD + "PRESETS = {'MINE': {'loss_mine': True}}\n", "must be a float"),
    "a preset's list as number": (HEAD + "PRESETS = {'MINE': {'lr': 0.1}}\n", "--lr 0.1: must be a list"),
    **{
        f"a preset's {option}": (
            HEAD + f"PRESETS = {{'MINE': {{'{option}': {value!r}}}}}\n",
            f"--{option} {value!r}: is read before presets are applied; type it",
        )
        for option, value in (
            ("task", "15-5"),
            ("dataset", "ade"),
            ("fidelity", "released"),
            ("method", "FT"),
        )
    },
    "a preset's path": (
        HEAD + "PRESETS = {'MINE': {'pretrained_path': 'x.pth'}}\n",
        "--pretrained_path 'x.pth': cannot be set by a preset; type it",
    ),
    "a preset's unknown choice": (
        HEAD + "PRESETS = {'MINE': {'lr_policy': 'cosine'}}\n",
        "--lr_policy 'cosine': must be one of poly, step",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_reported_when_it_is_loaded(file: Path, name: str) -> None:
    text, message = FILES[name]
    assert message in said(file, text)


def test_what_is_right_is_let_through(file: Path) -> None:
    file.write_text(
        "from methods import Method\nclass _Base(Method):\n    weight = 1.0\n    factor = 1.0\n"
        + HEAD.replace("Mine(Method)", "Mine(_Base)")
        + "    needs = {'body'}\n\n    def losses(self, batch):\n"
        + "        return {'mine': batch.outputs.mean() * self.weight}\n"
        + "PRESETS = {'MINE': {'loss_mine': 2, 'unce': True, 'lr': [0.1], 'pod': 'local', 'pseudo': None}}\n"
    )
    assert set(first_batch(file)) == {"ce", "mine", "total"}


def test_the_program_s_own_methods_and_presets_pass() -> None:
    for kind in REGISTRY:
        check_class(kind)
    actions = {action.dest: action for action in methods_parser()._actions}
    for name in METHODS:
        for dataset in ("voc", "ade"):
            for option, value in methods.preset(name, dataset=dataset, task="15-5").items():
                assert preset_fault(actions[option], value) is None, (name, option)


def methods_parser() -> Any:
    from argparser import build_parser

    return build_parser()


def test_a_classifier_that_only_the_instance_names(file: Path) -> None:
    text = HEAD.replace("return cls()", "return cls().with_classifier()") + (
        "    def with_classifier(self):\n        self.classifier = 'unknown'\n        return self\n"
    )
    with pytest.raises(UserError, match=r"Mine\.classifier: is read from the class; set it there"):
        file.write_text(text)
        first_batch(file)


def test_no_method_returns_a_loss(file: Path) -> None:
    context = Context(task=get_task("shapes", "10-10"), step=0, model=Toy())
    trainer = Trainer(context, {"Silent": Method()}, torch.optim.SGD(context.model.parameters(), lr=0.1))
    with pytest.raises(UserError, match=re.escape("step 0: no method returned a loss (Silent)")):
        trainer.train_step(torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8))


def test_no_loss_depends_on_the_network(file: Path) -> None:
    file.write_text(
        HEAD + "    replaces_classification = True\n\n    def losses(self, batch):\n"
        "        return {'mine': torch.tensor(1.0)}\n"
    )
    with pytest.raises(UserError, match=r"step 0: no loss depends on trained weights \(mine\); compute one"):
        first_batch(file)


def test_a_method_that_only_a_file_would_know(file: Path) -> None:
    with pytest.raises(
        UserError, match="no preset of that name; a file of your own is given with --method_file"
    ):
        parse_options(["--method", "COSINE"])
