"""EWF: what ``end_step`` leaves in the network, and the option that freezes old classifiers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from argparser import parse_options
from methods import Context, build_methods
from modules import NetworkSpec
from modules.network import Network
from segmentation_module import IncrementalSegmentationModule, make_model
from session.optimizer import make_optimizer
from tasks import get_task
from utils.errors import UserError


class Small(Network):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.out_channels = 4

    def forward(self, images: torch.Tensor, needs: frozenset[str] = frozenset()) -> tuple[torch.Tensor, dict]:
        return self.body(images), {}


def two_networks() -> tuple[IncrementalSegmentationModule, IncrementalSegmentationModule]:
    """A teacher and its student after training: every number differs."""
    torch.manual_seed(0)
    teacher, student = (IncrementalSegmentationModule(Small(), sizes) for sizes in ([16], [16, 5]))
    for network, passes in ((teacher, 1), (student, 3)):
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        for _ in range(passes):
            network(torch.randn(2, 3, 8, 8))
    return teacher.eval(), student.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["MIB+EWF", "PLOP+EWF"])
def test_weights_and_statistics_are_fused(method: str, dtype: torch.dtype) -> None:
    teacher, student = (network.to(dtype) for network in two_networks())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    parameters = {name: id(value) for name, value in student.named_parameters()}
    context = Context(get_task("voc", "15-5"), 1, student, teacher)
    methods = build_methods(parse_options(["--method", method, "--task", "15-5"]), 1)
    methods["EndpointWeightFusion"].end_step(context)
    alpha = math.sqrt(5 / 21)
    for name, new in student.state_dict().items():
        old = teacher.state_dict().get(name)
        if old is None or not new.is_floating_point():
            assert torch.equal(new, before[name]), name
        else:
            expected = (1 - alpha) * old.double() + alpha * before[name].double()
            assert new.dtype == dtype
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(new.double(), expected, rtol=tolerance, atol=1e-6, msg=name)
            assert not torch.equal(new, before[name]) and not torch.equal(new, old), name
    assert parameters == {name: id(value) for name, value in student.named_parameters()}


def test_nothing_is_fused_at_step_0() -> None:
    methods = build_methods(parse_options(["--method", "MIB+EWF", "--task", "15-5"]), 0)
    assert "EndpointWeightFusion" not in methods


def test_the_published_name_is_the_same_option() -> None:
    words = ["--method", "MiB", "--weight_fusion", "--fix_pre_cls", "--task", "15-5s", "--loss_kd", "10"]
    typed, preset = parse_options(words), parse_options(["--method", "MIB+EWF", "--task", "15-5s"])
    differing = {key for key in vars(typed) if getattr(typed, key) != getattr(preset, key)}
    assert differing == {"method", "typed", "void_label", "unseen_label", "notes"}


def test_old_classifiers_are_not_trained() -> None:
    opts = parse_options(["--task", "15-1", "--fix_pre_cls"])
    model = IncrementalSegmentationModule(Small(), [16, 1, 1])
    model.fix_older_classifiers()
    optimizer = make_optimizer(opts, model, {}, 0.1)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(("network.", "cls.2."))}


def test_a_rate_for_frozen_classifiers_is_refused() -> None:
    with pytest.raises(UserError, match=r"--lr_old 0\.1 has no effect: --fix_pre_cls"):
        parse_options(["--lr_old", "0.1", "--method", "PLOP+EWF"])
    assert parse_options(["--lr_old", "0.1"]).lr_old == 0.1


@pytest.mark.parametrize("step", [1, 2])
def test_merged_branches_are_fused_with_the_teacher_s_merged(step: int) -> None:
    """A student that was not trained stays as it began, whatever form its teacher's branches have."""
    task = get_task("voc", "15-1")
    spec = NetworkSpec(backbone="mobilenet_v2", two_branches=True)
    torch.manual_seed(0)
    teacher = make_model(spec, task.classes_per_step(step - 1)).eval()
    student = make_model(spec, task.classes_per_step(step)).eval()
    student.load_previous(teacher.state_dict())
    images = torch.randn(1, 3, 64, 64)
    before = student(images)[0]
    opts = parse_options(["--method", "MIB+EWF", "--task", "15-1", "--two_branches"])
    methods = build_methods(opts, step)
    methods["EndpointWeightFusion"].end_step(Context(task, step, student, teacher))
    torch.testing.assert_close(student(images)[0], before, rtol=1e-5, atol=1e-5)


def test_features_are_measured_after_the_fusion() -> None:
    names = list(build_methods(parse_options(["--method", "STAR", "--ewf"]), 1))
    assert names.index("EndpointWeightFusion") < names.index("FeatureReplay")


def test_an_auxiliary_classifier_is_of_no_earlier_step() -> None:
    opts = parse_options(["--method", "DKD", "--fix_pre_cls", "--backbone", "mobilenet_v2"])
    for step, frozen in ((0, set()), (1, {"cls.1.weight", "cls.1.bias"})):
        model = make_model(NetworkSpec.of(opts), get_task("voc", "15-5").classes_per_step(step))
        model.fix_older_classifiers()
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
