"""Kinds of classifiers by name."""

from __future__ import annotations

import pytest
import torch

from argparser import parse_options
from modules import NetworkSpec
from modules.classifiers import (
    LinearClassifier,
    add_classifier,
    classifier_kind,
    classifier_names,
)
from segmentation_module import IncrementalSegmentationModule, make_model
from utils.errors import UserError


def model(classes: list[int]) -> IncrementalSegmentationModule:
    return make_model(NetworkSpec(backbone="mobilenet_v2"), classes)


def test_names_of_weights_and_whose_they_are() -> None:
    net = model([16, 1, 4])
    names = [name for name in net.state_dict() if name.startswith("cls.")]
    assert names == [f"cls.{step}.{kind}" for step in range(3) for kind in ("weight", "bias")]
    assert [name for name, _ in net.named_parameters() if net.is_older_classifier(name)] == names[:4]


def test_a_step_may_lack_the_newest_part_only() -> None:
    grown, before = model([16, 1, 4]), model([16, 1]).state_dict()
    grown.load_previous(before)
    assert all(torch.equal(grown.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(UserError, match=r"lacks 2 weights \(cls\.1\.weight.*--classifier"):
        grown.load_previous(model([16]).state_dict())


@pytest.mark.parametrize("method", ["SSUL", "DKD", "STAR", "DFT"])
def test_a_kind_that_has_no_balanced_start_refuses_it(method: str) -> None:
    with pytest.raises(UserError, match=r"--classifier \w+ does not support --init_balanced; drop it"):
        parse_options(["--method", method, "--init_balanced"])


def test_a_preset_s_balanced_start_without_effect_is_noted() -> None:
    assert any(
        "--init_balanced has no effect" in note
        for note in parse_options(["--method", "MIB", "--loss_kd", "0", "--dkd", "--bce"]).notes
    )


def test_random_start_leaves_the_newest_part_as_it_was_drawn() -> None:
    linear = LinearClassifier(8, [3, 1])
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    linear.start(balanced=False)
    assert all(torch.equal(linear.state_dict()[name], value) for name, value in before.items())


def test_wrong_kinds_are_refused() -> None:
    known = classifier_names()
    with pytest.raises(UserError, match=r"--classifier nil: unknown, choose one of linear.*--method_file"):
        classifier_kind("nil")
    with pytest.raises(UserError, match="--classifier nil"):
        NetworkSpec.of({"classifier": "nil"})

    class Nameless(LinearClassifier):
        pass

    class Twin(LinearClassifier):
        name = "linear"

    with pytest.raises(UserError, match=r"Nameless\.name: give the classifier a name"):
        add_classifier(Nameless)
    with pytest.raises(UserError, match=r"Twin\.name: --classifier linear already exists"):
        add_classifier(Twin)
    assert add_classifier(LinearClassifier) is LinearClassifier  # twice is once
    assert classifier_names() == known
