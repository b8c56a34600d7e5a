"""What DKD and STAR share: a sigmoid per foreground class, and how their networks are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Context, Method
from modules.classifiers import Classifier, LinearClassifier, add_classifier
from modules.norm import norm_layers
from modules.resnet import ResNetBackbone
from utils.errors import UserError
from utils.loss import MBCELoss, exemplar_labels

NEW_LAYERS_LR_FACTOR = 10.0  # of head and classifiers
BACKBONE_MOMENTUM = 0.01  # of the running statistics in the published network's backbone


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


class ForegroundMethod(Method):
    """Binary cross entropy of a step's classes over all pixels; fixed norms and no dropout from step 1 on.

    Args:
        pos_weight: weight of a class's own pixels at step 0, and at later steps if there are two values.
        fidelity: "paper" or "released".
    """

    needs = teacher_needs = frozenset({"pre_logits"})
    replaces_classification = True

    def __init__(self, pos_weight: Sequence[float], *, fidelity: str = "paper") -> None:
        self.pos_weight = pos_weight
        self.fidelity = fidelity

    def begin_step(self, context: Context) -> None:
        """Freeze the norm layers and dropout from step 1 on."""
        self.step, self.old = context.step, max(context.classes_old, 1)
        self.model, self.model_old = cast(Any, context.model), cast(Any, context.model_old)
        self.criterion = MBCELoss(self.old, self.pos_weight[0 if self.step == 0 else -1])
        if self.step:
            self.model.fix_bn()
            self.model.fix_dropout()
        elif isinstance(self.model.network.body, ResNetBackbone):
            for layer in norm_layers(self.model.network.body):
                layer.momentum = BACKBONE_MOMENTUM  # type: ignore[assignment]

    def is_newest(self, parameter: str) -> bool:
        """Whether a weight, by name, belongs to the classifier of this step."""
        return parameter.startswith(f"cls.{self.model.cls.newest}.")

    def lr_factor(self, parameter: str) -> float:
        """Head and classifiers learn faster than the backbone."""
        return 1.0 if parameter.startswith("network.body.") else NEW_LAYERS_LR_FACTOR

    def mbce(self, batch: Batch) -> Tensor:
        """The classification loss of the step's classes."""
        return self.criterion(batch.outputs[:, self.old :], batch.targets)


def checked_pos_weight(values: Sequence[float]) -> Sequence[float]:
    """The values of ``--pos_weight``.

    Raises:
        UserError: there are more than two.
    """
    if len(values) > 2:
        raise UserError(
            f"--pos_weight has {len(values)} values; give one, or one for step 0 and one for later steps"
        )
    return values
