"""RCIL's method: how new classifiers start, and which maps are distilled."""

from __future__ import annotations

import pytest
import torch

from argparser import parse_options
from methods import Batch, Context, build_methods
from methods.presets import preset
from methods.rcil import PooledCubeDistillation
from modules import NetworkSpec
from segmentation_module import IncrementalSegmentationModule, make_model
from tasks import get_task
from utils.loss import PooledCubeDistillationLoss

WORDS = ["--method", "RCIL", "--backbone", "mobilenet_v2", "--task", "15-5"]
TASK = get_task("voc", "15-5")


def student(fidelity: str) -> tuple[IncrementalSegmentationModule, dict[str, torch.Tensor]]:
    """As at the start of step 1, and the state of the step before."""
    opts = parse_options([*WORDS, "--fidelity", fidelity])
    spec = NetworkSpec.of(opts)
    torch.manual_seed(0)
    state = make_model(spec, TASK.classes_per_step(0)).state_dict()
    model = make_model(spec, TASK.classes_per_step(1))
    model.load_previous(state)
    model.cls.start(balanced=opts.init_balanced)
    for method in build_methods(opts, 1).values():
        method.begin_step(Context(TASK, 1, model, model, fidelity=fidelity))
    return model, state


def test_released_new_classifiers_have_the_background_s_weights_and_random_biases() -> None:
    model, state = student("released")
    now = model.state_dict()
    assert torch.equal(now["cls.1.weight"], state["cls.0.weight"][:1].expand(5, -1, -1, -1))
    assert torch.equal(now["cls.0.bias"], state["cls.0.bias"])
    assert len(now["cls.1.bias"].unique()) == 5
    assert not torch.isin(now["cls.1.bias"], state["cls.0.bias"]).any()


def test_pre_tuning_sets_the_classifiers_last() -> None:
    names = list(build_methods(parse_options([*WORDS, "--nest", "--fidelity", "released"]), 1))
    assert names.index("ClassifierPreTuning") > names.index("PooledCubeDistillation")


def test_paper_new_classifiers_are_balanced() -> None:
    model, state = student("paper")
    now = model.state_dict()
    assert torch.equal(now["cls.1.weight"], state["cls.0.weight"][:1].expand(5, -1, -1, -1))
    bias = state["cls.0.bias"][0] - torch.tensor(6.0).log()
    torch.testing.assert_close(now["cls.1.bias"], bias.expand(5))
    torch.testing.assert_close(now["cls.0.bias"][0], bias)


@pytest.mark.parametrize(("dataset", "factors"), [("voc", (0.01, 0.0005)), ("ade", (5e-6, 5e-7))])
def test_weights_of_the_data_sets(dataset: str, factors: tuple[float, float]) -> None:
    options = preset("RCIL", dataset=dataset, task="x")
    assert (options["loss_pckd"], options["loss_pckd_last"]) == factors
    assert options["loss_kd"] == 100


@torch.no_grad()
def test_the_maps_are_those_after_the_stages_activation() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    features = []
    for classes in ([3], [3, 2]):
        model = make_model(
            NetworkSpec(backbone="resnet50", norm_act="abn", two_branches=True), classes
        ).eval()
        model.intermediates = PooledCubeDistillation.needs | {"attentions"}
        features.append(model(images)[1])
    for found in features:
        for before, after in zip(found["attentions"], found["stages"], strict=False):
            torch.testing.assert_close(after, torch.nn.functional.leaky_relu(before, 0.01))
    old, new = ([*f["stages"], f["pre_logits"], f["logits_small"]] for f in features)
    spatial, channel = PooledCubeDistillationLoss((0.5, 2.0))(old, new, 5, 2, 3)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    batch = Batch(images, labels, labels, 1, 3, 2, labels, features[1], labels, features[0])
    losses = PooledCubeDistillation((0.5, 2.0)).losses(batch)
    assert losses == {"pckd_spatial": spatial, "pckd_channel": channel}
    assert spatial > 0
    assert channel > 0
