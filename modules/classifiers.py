"""Kinds of classifiers, by name: head features → logits → decision.

A network has one classifier, with a part per step. Its kind (``--classifier``) is saved in the checkpoints,
so evaluation, prediction and the next step rebuild it without the method.
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

    A custom kind extends it or another kind, has a ``name`` and overrides what differs.

    Args:
        channels: of the features.
        classes: number of classes of each step up to this one; the first includes the background.
        later: number of classes of each later step.

    Attributes:
        name: for ``--classifier``.
        former_names: key prefixes in checkpoints of earlier versions → today's prefixes.
        starts_balanced: ``start`` knows ``balanced``; else ``--init_balanced`` is refused.
        needs_its_method: only a method with this ``classifier`` can train it: its logits mean something else.
        torchvision_resnet: its released program uses torchvision's ResNet (for ``--fidelity released``).
        released: decide as the method's released program, where that differs from the paper.
        of_all_steps: it has the parts of all steps of the task from step 0 on, and none is added later.
    """

    name: ClassVar[str]
    former_names: ClassVar[Mapping[str, str]] = {}
    starts_balanced: ClassVar[bool] = False
    needs_its_method: ClassVar[bool] = False
    torchvision_resnet: ClassVar[bool] = False
    of_all_steps: ClassVar[bool] = False

    def __init__(self, channels: int, classes: Sequence[int], later: Sequence[int] = ()) -> None:
        super().__init__()
        self.released = False
        self.classes = list(classes)
        for number, width in enumerate(self.widths(classes, later)):
            self.add_module(str(number), self.make_part(channels, width))

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """Output channels of each part."""
        return [*classes, *later] if self.of_all_steps else list(classes)

    def make_part(self, channels: int, width: int) -> nn.Module:
        """A part with random weights, B×channels×h×w → B×width×h×w."""
        return nn.Conv2d(channels, width, 1)

    @property
    def parts(self) -> list[nn.Module]:
        """The steps' parts, in order."""
        return [part for name, part in self.named_children() if name.isdigit()]

    @property
    def newest(self) -> int:
        """Number of this step's part."""
        return len(self.classes if self.of_all_steps else self.parts) - 1

    def part_of(self, weight: str) -> int | None:
        """Number of the part of a weight, named as in this module; None: of no part."""
        number = weight.split(".")[0]
        return int(number) if number.isdigit() else None

    def initialise(self, head: str) -> None:
        """Initialise the random weights, if not as torch does, for a ``--head``."""

    def start(self, balanced: bool) -> None:
        """Initialise the newest part, after the older weights were loaded from the previous step.

        Args:
            balanced: from the background's weights (``--init_balanced``); only where ``starts_balanced``.
        """

    def forward(self, features: Tensor) -> Tensor:
        """Features B×channels×h×w → logits B×C×h×w, with at least one channel per seen class."""
        return torch.cat([part(features) for part in self.parts], dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        """Decision rule: scores B×classes×H×W whose argmax is the prediction; by default the logits."""
        return logits

    def confident_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels in which the background is the predicted class where that is certain enough.

        For the choice of exemplars; kinds without it cannot be used with ``--memory_choice predicted``.

        Args:
            labels: B×H×W.
            logits: B×C×H×W.
        """
        raise NotImplementedError


def convolve(parts: Sequence[nn.Module], features: Tensor) -> Tensor:
    """The outputs of several 1×1 convolutions, concatenated: one convolution with all weights."""
    convolutions = [cast(nn.Conv2d, part) for part in parts]
    weight = torch.cat([part.weight for part in convolutions])
    bias = torch.cat([cast(Tensor, part.bias) for part in convolutions])
    return F.conv2d(features, weight, bias)


class LinearClassifier(Classifier):
    """A 1×1 convolution per step."""

    name = "linear"
    starts_balanced = True

    def forward(self, features: Tensor) -> Tensor:
        """One convolution with the concatenated weights."""
        return convolve(self.parts, features)

    def start(self, balanced: bool) -> None:
        """Random, or balanced (MiB, eqs. 9 and 10).

        Balanced: new weights are the background's. Biases of background and new classes are
        b_bkg − log(N_new + 1), which splits the background's probability among them.
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
    """Register a kind for ``--classifier``; usable as a decorator.

    Raises:
        UserError: it has no name, or another kind has the same.
    """
    name = vars(kind).get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{kind.__name__}.name: give the classifier a name (text) for --classifier")
    if _KINDS.get(name, kind) is not kind:
        raise UserError(f"{kind.__name__}.name: --classifier {name} already exists; choose another name")
    _KINDS[name] = kind
    return kind


def classifier_names() -> list[str]:
    """The names of all kinds."""
    return list(_KINDS)


def classifier_kind(name: str) -> type[Classifier]:
    """The kind with this name.

    Raises:
        UserError: there is none.
    """
    if name not in _KINDS:
        raise UserError(
            f"--classifier {name}: unknown, choose one of {', '.join(_KINDS)}; others come with --method_file"
        )
    return _KINDS[name]


add_classifier(LinearClassifier)
