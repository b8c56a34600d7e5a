"""What the hooks and attributes of a method do to a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from argparser import parse_options
from methods import METHODS, REGISTRY, Method, build_methods, preset
from methods.base import needs_of_teacher
from methods.presets import _PRESETS, add_preset
from session.optimizer import make_optimizer
from utils.errors import UserError


def options(*words: str) -> Any:
    return parse_options(["--task", "15-5", *words])


def test_who_brings_the_classification_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Classification" in build_methods(options("--method", "MIB"), 1)
    assert "Classification" not in build_methods(options("--method", "SSUL"), 0)
    disjoint = options("--method", "LWF-MC", "--icarl_disjoint")
    assert "Classification" in build_methods(disjoint, 0)  # its other half begins where there is a teacher
    assert list(build_methods(disjoint, 1)) == ["ICaRL"]
    monkeypatch.setattr("methods.CIL.replaces_classification", True)
    with pytest.raises(UserError, match="ICaRL and CIL each replace the classification loss"):
        build_methods(options("--method", "LWF-MC", "--icarl_disjoint", "--loss_CIL", "1"), 1)


def test_a_method_names_the_form_of_the_classification_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(step: int) -> object:
        return build_methods(options("--method", "LWF-MC"), step)["Classification"].kind  # type: ignore[attr-defined]

    assert form(0) == form(1) == "bce"
    assert build_methods(options("--method", "MIB"), 0)["Classification"].kind == "unce"  # type: ignore[attr-defined]
    monkeypatch.setattr("methods.ICaRL.classification", "hinge")
    with pytest.raises(UserError, match=r"classification: must be one of ce, bce, unce, focal, not 'hinge'"):
        form(0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--icarl --unce", "--unce has no effect: ICaRL has its own classification loss; drop one"),
        ("--method SSUL --focal_loss", "--focal_loss has no effect: UnknownClass has its own"),
        ("--unce --bce", "--bce and --unce exclude each other"),
    ],
)
def test_a_form_of_the_classification_loss_without_effect_is_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_methods(options(*words.split()), 1)
    for wins in ("--icarl --bce", "--method MIB --icarl", "--method MIB --bce"):  # typed wins over a preset
        assert build_methods(options(*wins.split()), 1)["Classification"].kind == "bce"  # type: ignore[attr-defined]


def test_two_methods_with_different_forms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Method):
        classification = "focal"

        @classmethod
        def from_options(cls, opts: object) -> Method:
            return cls()

    monkeypatch.setattr("methods.REGISTRY", [*REGISTRY, Other])
    with pytest.raises(UserError, match="ICaRL with 'bce' and Other with 'focal': different classification"):
        build_methods(options("--icarl"), 1)


def test_what_is_needed_of_the_teacher() -> None:
    class Reads(Method):
        needs = frozenset({"body"})

    method = Reads()
    assert not method.uses_teacher and needs_of_teacher(method) == frozenset()
    method.needs_teacher = True
    assert method.uses_teacher and needs_of_teacher(method) == {"body"}
    method.needs_teacher, method.teacher_needs = False, frozenset({"pre_logits"})
    assert method.uses_teacher and needs_of_teacher(method) == {"pre_logits"}
    assert method.needs == {"body"}
    method.needs_teacher, method.teacher_needs = True, frozenset()
    assert method.uses_teacher and needs_of_teacher(method) == frozenset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.ModuleList([nn.Conv2d(3, 2, 1)])


def test_factors_on_rate_and_weight_decay_make_groups() -> None:
    class Factors(Method):
        def lr_factor(self, parameter: str) -> float:
            return 0.5 if parameter.endswith("bias") else 1.0

        def weight_decay_factor(self, parameter: str) -> float:
            return 0.0 if parameter.endswith("bias") else 2.0

    optimizer = make_optimizer(options(), Net(), {"a": Factors(), "b": Method()}, 0.1)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(0.1, 2e-4), (0.05, 0.0)]
    plain = make_optimizer(options(), Net(), {"a": Method()}, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in plain.param_groups] == [(0.1, 1e-4)]


@pytest.fixture
def presets() -> Any:
    lists = list(METHODS), dict(_PRESETS)
    yield
    METHODS[:] = lists[0]
    _PRESETS.clear()
    _PRESETS.update(lists[1])


def test_a_preset_extends_another_with_what_depends_on_data_and_task(presets: None) -> None:
    add_preset("MINE", {"extends": "mib", "alpha": 0.5}, source=Path("mine.py"))
    add_preset("MORE", {"extends": "MINE", "unce": False}, source=Path("mine.py"))
    for task in ("15-5", "15-5s"):
        mib = preset("MIB", dataset="voc", task=task)
        assert preset("MINE", dataset="voc", task=task) == {**mib, "alpha": 0.5}
        assert preset("MORE", dataset="voc", task=task) == {**mib, "alpha": 0.5, "unce": False}
    add_preset("SSUL-X", {"extends": "SSUL-M", "threshold": 0.5}, source=Path("mine.py"))
    released = preset("SSUL-M", dataset="ade", task="100-50", fidelity="released")
    assert released["memory"] == 300 and released["keep"] == "best"
    found = preset("SSUL-X", dataset="ade", task="100-50", fidelity="released")
    assert found == {**released, "threshold": 0.5}
    # A memory that a preset of one's own names counts on every data set.
    add_preset("FEW", {"memory": 7}, source=Path("mine.py"))
    assert preset("FEW", dataset="ade", task="100-50") == {"memory": 7}


@pytest.mark.parametrize("base", ["MIBB", 3])
def test_a_preset_that_extends_nothing_known(presets: None, base: Any) -> None:
    with pytest.raises(UserError, match=r"mine.py: PRESETS\['MINE'\] extends .*, which is no preset"):
        add_preset("MINE", {"extends": base}, source=Path("mine.py"))
