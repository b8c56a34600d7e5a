"""What DKD and STAR share: a sigmoid per foreground class, and how their networks are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from methods.base import Batch, Context, Method
from utils.errors import UserError
from utils.lazy import loss, torch

NEW_LAYERS_LR_FACTOR = 10.0  # of head and classifiers
BACKBONE_MOMENTUM = 0.01  # of the running statistics in the published network's backbone


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
        from modules.norm import norm_layers  # need torch
        from modules.resnet import ResNetBackbone

        self.step, self.old = context.step, max(context.classes_old, 1)
        self.model, self.model_old = cast(Any, context.model), cast(Any, context.model_old)
        self.criterion = loss.MBCELoss(self.old, self.pos_weight[0 if self.step == 0 else -1])
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

    def mbce(self, batch: Batch) -> torch.Tensor:
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
