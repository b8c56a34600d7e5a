"""The kinds of classifiers that methods bring along, by the names in their ``classifier``.

A file of its own, because a module needs torch when its class is made, and the methods' options do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.classifiers import (
    Classifier,
    LinearClassifier,
    add_classifier,
    classifier_kind,
    classifier_names,
    convolve,
)
from utils.loss import exemplar_labels, initialise_from_auxiliary

# Who reads a name in a checkpoint or an option asks here, where all kinds are known.
__all__ = [
    "AuxiliaryClassifier",
    "Classifier",
    "ForegroundClassifier",
    "PreallocatedClassifier",
    "UnknownClassifier",
    "add_classifier",
    "classifier_kind",
    "classifier_names",
]


@add_classifier
class PreallocatedClassifier(LinearClassifier):
    """1×1 convolutions of all steps from step 0 on; those of later steps are negatives in the softmax.

    The prediction is among the seen classes only.
    """

    name = "preallocated"
    needs_its_method = True
    starts_balanced = False
    of_all_steps = True
    start = Classifier.start  # this step's part has been trained already

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all classes, in evaluation mode (so also the teacher's) of the seen ones."""
        logits = super().forward(features)
        return logits if self.training else logits[:, : sum(self.classes)]


@add_classifier
class ForegroundClassifier(LinearClassifier):
    """A sigmoid per foreground class, a 1×1 convolution per step; background where no sigmoid is above 0.5.

    Channel 0 of the logits is 0, so that a class's channel is its index.
    """

    name = "foreground"
    starts_balanced = False  # there is no background to start from
    start = Classifier.start
    needs_its_method = True
    torchvision_resnet = True

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """The classes of each step, without the background."""
        return [classes[0] - 1, *classes[1:]]

    def initialise(self, head: str) -> None:
        """Kaiming-normal weights."""
        for part in self.parts:
            assert isinstance(part, nn.Conv2d)
            nn.init.kaiming_normal_(part.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits B×C×h×w."""
        return _with_background(super().forward(features), 0.0)

    def scores(self, logits: Tensor) -> Tensor:
        """The logits, with 0 for the background; released: float32 sigmoids, with 0.5 for it."""
        foreground = logits[:, 1:].float()
        if self.released:
            return _with_background(foreground.sigmoid(), 0.5)
        return _with_background(foreground, 0.0)

    def confident_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Background becomes the predicted class where its sigmoid is at least 0.9."""
        return exemplar_labels(labels, logits[:, 1:], fidelity="released" if self.released else "paper")


def _with_background(foreground: Tensor, value: float) -> Tensor:
    return F.pad(foreground, (0, 0, 0, 0, 1, 0), value=value)


@add_classifier
class AuxiliaryClassifier(ForegroundClassifier):
    """Channel 0 of the logits is an auxiliary classifier, from which new classes start.

    It learns that every pixel is a negative and sends no gradient to the features.
    """

    name = "auxiliary"

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """The auxiliary channel, then the classes of each step."""
        return [1, *super().widths(classes, later)]

    def part_of(self, weight: str) -> int | None:
        """None for the auxiliary classifier, which every step trains."""
        part = super().part_of(weight)
        return None if part == 0 else part

    @torch.no_grad()
    def start(self, balanced: bool) -> None:
        """New classes: the auxiliary classifier's weights and biases."""
        auxiliary, new = (self.parts[number] for number in (0, self.newest))
        assert isinstance(auxiliary, nn.Conv2d) and isinstance(new, nn.Conv2d)
        assert auxiliary.bias is not None and new.bias is not None
        weight, bias = initialise_from_auxiliary(auxiliary.weight, auxiliary.bias, new.out_channels)
        new.weight.copy_(weight[:, :, None, None])
        new.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits B×C×h×w."""
        auxiliary, *parts = self.parts
        return torch.cat([auxiliary(features.detach()), convolve(parts, features)], dim=1)

    def confident_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Background becomes the predicted class where its sigmoid is at least 0.9."""
        return exemplar_labels(labels, logits, first=1)


class ConvolutionalPart(nn.Sequential):
    """Classifier of a step: 3×3 convolution, norm, ReLU, 1×1 convolution (SSUL, section 3.2)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, classes, 1),
        )


@add_classifier
class UnknownClassifier(Classifier):
    """Convolutional parts, one for the background, and an "unknown" class as the last channel."""

    name = "unknown"
    former_names: ClassVar[Mapping[str, str]] = {"unknown.": "cls.unknown."}
    needs_its_method = True
    torchvision_resnet = True

    def __init__(self, channels: int, classes: Sequence[int], later: Sequence[int] = ()) -> None:
        super().__init__(channels, classes, later)
        self.unknown = ConvolutionalPart(channels, 1)

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """The background's, then the classes of each step."""
        return [1, classes[0] - 1, *classes[1:]]

    def make_part(self, channels: int, width: int) -> nn.Module:
        """B×channels×h×w → B×width×h×w."""
        return ConvolutionalPart(channels, width)

    def initialise(self, head: str) -> None:
        """He initialisation with the ``aspp`` head, of which the classifiers are part in SSUL's program."""
        for module in self.modules() if head == "aspp" else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @torch.no_grad()
    def start(self, balanced: bool) -> None:
        """Copy the unknown class's weights into the newest part (SSUL, section 3.2)."""
        new, unknown = (part.state_dict().values() for part in (self.parts[self.newest], self.unknown))
        for to, value in zip(new, unknown, strict=True):
            to.copy_(value.expand_as(to))

    def forward(self, features: Tensor) -> Tensor:
        """Logits B×(C+1)×h×w."""
        return torch.cat([super().forward(features), self.unknown(features)], dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoids B×C×H×W; the unknown class's is added to the background's."""
        scores = logits.float().sigmoid()
        scores[:, 0] += scores[:, -1]
        return scores[:, :-1]
