"""Kinds of classifiers, by name: what turns the head's features into logits, and logits into a decision.

A network has one classifier, with a part per step. ``--classifier`` names its kind, which stands in the
checkpoints, so that evaluation, prediction and the next step rebuild it without knowing the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UserError


class Classifier(nn.Module):
    """Base of all kinds: a part per step, named ``0``, ``1``, ... (``cls.0.weight`` in the network's state).

    A kind of one's own extends it or another kind, has a ``name`` and fills in what differs.

    Args:
        channels: of the features that it classifies.
        classes: number of classes of each step up to the present one; the first counts the background.
        later: number of classes of each step to come.

    Attributes:
        name: for ``--classifier``.
        former_names: beginnings of weights' names in checkpoints of earlier versions, with today's.
        torchvision_resnet: its program takes torchvision's ResNet, so that ``--fidelity released`` does too.
    """

    name: ClassVar[str]
    former_names: ClassVar[Mapping[str, str]] = {}
    torchvision_resnet: ClassVar[bool] = False

    def __init__(self, channels: int, classes: Sequence[int], later: Sequence[int] = ()) -> None:
        super().__init__()
        self.classes = list(classes)
        for number, width in enumerate(self.widths(classes, later)):
            self.add_module(str(number), self.make_part(channels, width))

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """Output channels of each part."""
        return list(classes)

    def make_part(self, channels: int, width: int) -> nn.Module:
        """A part with random weights, B×channels×h×w → B×width×h×w."""
        return nn.Conv2d(channels, width, 1)

    @property
    def parts(self) -> list[nn.Module]:
        """The steps' parts, in order."""
        return [part for name, part in self.named_children() if name.isdigit()]

    @property
    def newest(self) -> int:
        """Number of the part that the present step adds: the only one that the step before may lack."""
        return len(self.parts) - 1

    def part_of(self, weight: str) -> int | None:
        """Number of the part that a weight belongs to, by its name in this module; None: to no step's."""
        number = weight.split(".")[0]
        return int(number) if number.isdigit() else None

    def initialise(self, head: str) -> None:
        """Draw the random weights otherwise than torch, where the kind does so behind a ``--head``."""

    def start(self, balanced: bool) -> None:
        """Start the newest part, once the older weights are those of the step before.

        Args:
            balanced: from the background's (``--init_balanced``).

        Raises:
            UserError: this kind has no such start.
        """
        if balanced:
            raise UserError(f"--classifier {self.name} has no balanced start; drop --init_balanced")

    def forward(self, features: Tensor) -> Tensor:
        """Logits B×C×h×w of features B×channels×h×w; at least a channel per class seen so far."""
        return torch.cat([part(features) for part in self.parts], dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        """The rule of decision: scores B×classes×H×W whose arg-max is the prediction; here the logits."""
        return logits


class LinearClassifier(Classifier):
    """A 1×1 convolution per step."""

    name = "linear"

    def forward(self, features: Tensor) -> Tensor:
        """One convolution with the joined weights: one pass for any number of steps."""
        parts = [cast(nn.Conv2d, part) for part in self.parts]
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([cast(Tensor, part.bias) for part in parts])
        return F.conv2d(features, weight, bias)

    def start(self, balanced: bool) -> None:
        """Random, or balanced (MiB, eqs. 9 and 10).

        Balanced, new weights are the background's; the background's mass is shared with the new classes
        through the biases: b_bkg − log(N_new + 1), for the new classes and for the background.
        """
        if not balanced:
            return
        first, new = (cast(nn.Conv2d, self.parts[number]) for number in (0, self.newest))
        old_bias, new_bias = cast(Tensor, first.bias), cast(Tensor, new.bias)
        with torch.no_grad():
            bias = old_bias[0] - math.log(new.out_channels + 1)
            new.weight.copy_(first.weight[0].expand_as(new.weight))
            new_bias.fill_(bias)
            old_bias[0] = bias


_KINDS: dict[str, type[Classifier]] = {}


def add_classifier(kind: type[Classifier]) -> type[Classifier]:
    """Make a kind known to ``--classifier``; usable as a decorator.

    Raises:
        UserError: it has no name, or another kind has it.
    """
    name = vars(kind).get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{kind.__name__}.name: give the classifier a name (text) for --classifier")
    if _KINDS.get(name, kind) is not kind:
        raise UserError(f"{kind.__name__}.name: there is a --classifier {name} already; choose another name")
    _KINDS[name] = kind
    return kind


def classifier_names() -> list[str]:
    """The names of all kinds."""
    return list(_KINDS)


def classifier_kind(name: str) -> type[Classifier]:
    """The kind of a name.

    Raises:
        UserError: there is none.
    """
    if name not in _KINDS:
        raise UserError(
            f"--classifier {name}: unknown, choose one of {', '.join(_KINDS)}; a kind of your own comes "
            "with --method_file"
        )
    return _KINDS[name]


add_classifier(LinearClassifier)
