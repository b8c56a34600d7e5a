"""The form of a network, from options."""

from __future__ import annotations

import dataclasses

import pytest

from argparser import parse_options
from modules import NetworkSpec


def test_defaults_are_those_of_the_command_line() -> None:
    assert NetworkSpec.of({}) == NetworkSpec() == NetworkSpec.of(parse_options([]))


def test_every_option_that_shapes_the_network_counts() -> None:
    words = (
        "--model segformer_b1 --backbone resnet50 --norm_act abn --output_stride 8 --pooling 3 --decoder "
        "segformer --method SSUL --classifier unknown --grad_checkpointing"
    )
    opts = parse_options(words.split())
    expected = NetworkSpec("segformer_b1", "resnet50", "abn", 8, 3, "mib", "segformer", True, "unknown")
    assert NetworkSpec.of(opts) == NetworkSpec.of(vars(opts)) == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        expected.model = "deeplab"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "released"),
    [
        ("--backbone resnet50 --fidelity released", True),
        ("--backbone resnet50 --fidelity released --norm_act sync", True),
        ("--backbone resnet50", False),
        ("--backbone resnet50 --fidelity released --norm_act abn", False),
        ("--backbone mobilenet_v2 --fidelity released", False),
        ("--model segformer_b0 --fidelity released", False),
        ("--fidelity released --method SSUL", False),
        ("--fidelity released --method RCIL", False),
    ],
)
def test_released_resnet(words: str, released: bool) -> None:
    assert NetworkSpec.of(parse_options(words.split())).released_resnet == released
