"""DFT*'s method: who is trained at which step, and checkpoints of all steps' classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from argparser import parse_options
from methods import Context, build_methods
from modules import NetworkSpec
from runs.checkpoint import check_fits, make_manifest
from segmentation_module import IncrementalSegmentationModule, freeze, make_model
from tasks import Task, get_task
from utils.errors import UserError
from utils.loss import trainable_parts

SPEC = NetworkSpec(backbone="mobilenet_v2", classifier="preallocated")
TASK = get_task("voc", "15-1")


def begun(step: int, task: Task = TASK) -> IncrementalSegmentationModule:
    opts = parse_options(["--method", "DFT", "--backbone", "mobilenet_v2"])
    assert NetworkSpec.of(opts) == SPEC
    model = make_model(SPEC, task.classes_per_step(step), task.later_classes_per_step(step))
    for method in build_methods(opts, step).values():
        assert not method.uses_teacher
        method.begin_step(Context(task, step, model))
    assert opts.fix_pre_cls
    model.fix_older_classifiers()
    return model.train()


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_what_a_step_trains(step: int) -> None:
    model = begun(step)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = trainable_parts(step, TASK.num_steps)["classifiers"]
    assert parts == [f"cls.{k}.weight" in trained for k in range(6)]
    if step == 0:
        assert trained == {name for name, _ in model.named_parameters()}
        assert all(module.training for module in model.modules())
    else:
        assert trained == {f"cls.{k}.{part}" for k in range(step, 6) for part in ("weight", "bias")}
        assert not any(module.training for module in model.network.modules())
    if step == 5:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 257
    assert [model.is_older_classifier(f"cls.{k}.weight") for k in range(6)] == [k < step for k in range(6)]


def test_later_classes_are_in_the_softmax_but_not_in_the_prediction() -> None:
    model = begun(1)
    images = torch.randn(2, 3, 64, 64)
    assert model(images)[0].shape[1] == 21
    teacher = freeze(begun(1)).eval()  # so that methods which read a teacher count its classes rightly
    logits, _ = teacher(images)
    assert teacher.scores(logits).shape[1] == logits.shape[1] == model.num_classes == 17


def test_the_next_step_starts_from_every_part() -> None:
    """No part may be missing, since none is added."""
    state = begun(0).state_dict()
    model = begun(1)
    model.load_previous(state)
    model.cls.start(balanced=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    without = {name: value for name, value in state.items() if not name.startswith("cls.1.")}
    with pytest.raises(UserError, match=r"lacks 2 weights \(cls\.1\."):
        begun(1).load_previous(without)


def test_a_checkpoint_of_other_steps_is_refused() -> None:
    """Step 0 of 15-5 has the classes of step 0 of 15-1, but not its later classifiers."""
    other = get_task("voc", "15-5")
    manifest = make_manifest(task=other, step=0, spec=SPEC, options={})
    with pytest.raises(UserError, match="--task 15-5, not 15-5s") as caught:
        check_fits({"manifest": manifest}, path=Path("x.pth"), task=TASK, step=0, spec=SPEC)
    assert "\n" not in str(caught.value)
    check_fits({"manifest": manifest}, path=Path("x.pth"), task=other, step=0, spec=SPEC)
    linear = NetworkSpec(backbone="mobilenet_v2")
    manifest = make_manifest(task=other, step=0, spec=linear, options={})
    check_fits({"manifest": manifest}, path=Path("x.pth"), task=TASK, step=0, spec=linear)


def test_a_released_checkpoint_has_the_classifiers_of_all_steps() -> None:
    path = Path("x.pth")
    for step in (0, 2):
        check_fits({"model_state": begun(step).state_dict()}, path=path, task=TASK, step=step, spec=SPEC)
    with pytest.raises(UserError, match="classes"):
        state = make_model(SPEC, [16], [5]).state_dict()
        check_fits({"model_state": state}, path=path, task=TASK, step=0, spec=SPEC)
