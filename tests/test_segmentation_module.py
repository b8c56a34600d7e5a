"""The network that grows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods.base import Context
from methods.ssul import UnknownClass
from modules import NetworkSpec
from segmentation_module import IncrementalSegmentationModule, freeze, load_state, make_model
from tasks import get_task
from utils.errors import UserError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def model(classes: list[int], **options: Any) -> IncrementalSegmentationModule:
    torch.manual_seed(0)
    return make_model(NetworkSpec.of({"backbone": "mobilenet_v2", "pooling": 0, **options}), classes)


@pytest.mark.parametrize("kind", ["deeplab", "segformer_b0"])
def test_logits_have_the_images_size_and_all_classes(kind: str) -> None:
    logits, features = model([16, 1, 4], model=kind)(IMAGES)
    assert logits.shape == (2, 21, 64, 64)
    assert features == {}


def test_intermediates_come_only_when_asked_for() -> None:
    net = model([16, 5]).eval()
    net.intermediates = frozenset({"body", "logits_small"})
    logits, features = net(IMAGES)
    assert set(features) == {"body", "logits_small"}
    upsampled = F.interpolate(features["logits_small"], size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(upsampled, logits)


def test_an_intermediate_that_the_network_lacks_is_refused() -> None:
    net = model([16, 5])
    net.intermediates = frozenset({"self_attention"})
    with pytest.raises(UserError, match="self_attention"):
        net(IMAGES)


def test_joined_classifiers_equal_one_by_one() -> None:
    net = model([3, 1, 2]).eval()
    net.intermediates = frozenset({"pre_logits", "logits_small"})
    _, features = net(IMAGES)
    one_by_one = torch.cat([head(features["pre_logits"]) for head in net.cls.parts], dim=1)
    torch.testing.assert_close(features["logits_small"], one_by_one)


def test_growth_keeps_the_old_logits() -> None:
    old = model([16]).eval()
    grown = model([16, 5]).eval()
    grown.load_previous(old.state_dict())
    torch.testing.assert_close(grown(IMAGES)[0][:, :16], old(IMAGES)[0])


def test_balanced_initialisation_shares_the_background_probability() -> None:
    old = model([16]).eval()
    grown = model([16, 5]).eval()
    grown.load_previous(old.state_dict())
    grown.cls.start(balanced=True)
    before, after = old(IMAGES)[0].softmax(1), grown(IMAGES)[0].softmax(1)
    # Background and new classes together hold what background held, in equal shares.
    mass = after[:, 0] + after[:, 16:].sum(1)
    torch.testing.assert_close(mass, before[:, 0])
    torch.testing.assert_close(after[:, 16], before[:, 0] / 6)
    bias = old.cls.parts[0].bias
    torch.testing.assert_close(grown.cls.parts[1].bias, (bias[0] - math.log(6)).expand(5))


def test_a_state_of_another_network_is_refused_by_what_differs() -> None:
    with pytest.raises(UserError, match="another shape"):
        load_state(model([16]), model([17]).state_dict())
    with pytest.raises(UserError, match="lacks"):
        load_state(model([16]), {})


def test_frozen_parts_stay_in_evaluation_and_have_no_gradient() -> None:
    net = model([16])
    freeze(net.network.body)
    net.train()
    assert not any(part.training for part in net.network.body.modules())
    assert net.network.head.training
    net(IMAGES)[0].sum().backward()
    assert all(p.grad is None for p in net.network.body.parameters())
    assert all(p.grad is not None for p in net.network.head.parameters())


def test_fix_bn_freezes_every_norm_layer() -> None:
    net = model([16])
    net.fix_bn()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    net(IMAGES)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"fidelity": "paper"}, False),
        ({"norm_act": "abn"}, False),
        ({"backbone": "mobilenet_v2"}, False),
        ({"classifier": "unknown"}, False),
    ],
)
def test_released_networks_with_batch_norm_and_relu_are_sdrs(
    options: dict[str, object], expected: bool
) -> None:
    net = model([16], **{"backbone": "resnet50", "fidelity": "released", **options})
    assert isinstance(net.network.head.activation, torch.nn.Identity) == expected


def test_ssuls_classifiers_start_as_its_head_does() -> None:
    """He's initialisation with its head, torch's own without; weights of a uniform draw have an end."""
    for head, std, end in (("aspp", (2 / 256) ** 0.5, 2.5), ("mib", (1 / 3 / 256) ** 0.5, 1.74)):
        weight = model([16], classifier="unknown", head=head).cls.parts[1][3].weight.detach()
        assert abs(float(weight.std()) / std - 1) < 0.05
        assert (float(weight.abs().max()) / std > end) == (head == "aspp")


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_frozen_head_of_ssul_keeps_its_dropout_when_released(fidelity: str) -> None:
    net = model([16, 5], classifier="unknown", head="aspp")
    task = get_task("voc", "15-5")
    UnknownClass(0.7, fidelity=fidelity).begin_step(Context(task, 1, net, fidelity=fidelity))
    net.train()
    assert net.network.head.project[3].training == (fidelity == "released")
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.startswith(("cls.0.", "cls.2.", "cls.unknown.")) for name in learns)
    norms = [m for m in net.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert net.cls.parts[2][1].training == net.cls.unknown[1].training == (fidelity == "paper")  # type: ignore[index]
    assert not net.cls.parts[1][1].training


def test_unknown_counts_as_background_and_new_heads_start_from_it() -> None:
    net = model([16, 5], classifier="unknown").eval()
    net.cls.start(balanced=False)
    logits, _ = net(IMAGES)
    assert logits.shape[1] == 22
    for channel in range(16, 21):
        torch.testing.assert_close(logits[:, channel], logits[:, 21])
    scores = net.scores(logits)
    assert scores.shape[1] == 21
    torch.testing.assert_close(scores[:, 0], logits[:, 0].sigmoid() + logits[:, 21].sigmoid())
    torch.testing.assert_close(scores[:, 3], logits[:, 3].sigmoid())
