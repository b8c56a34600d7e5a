"""Distillation of outputs and of features: LWF, MIB, ILT."""

from __future__ import annotations

import math
from typing import Any

from methods.base import Batch, Context, Method
from methods.checks import refuse_other_channels
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class OutputDistillation(Method):
    """Distillation of logits: plain (LwF; Li and Hoiem 2016) or unbiased (MiB, eq. 8)."""

    needs_teacher = True

    def __init__(
        self, weight: float, *, unbiased: bool = False, alpha: float = 1.0, scheduled: bool = False
    ) -> None:
        self.weight = weight
        self.scheduled = scheduled
        kind = loss.UnbiasedKnowledgeDistillationLoss if unbiased else loss.KnowledgeDistillationLoss
        self.criterion: torch.nn.Module = kind(alpha=alpha)
        self.name = "unkd" if unbiased else "kd"

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_kd``, ``--unkd``, ``--alpha``, ``--kd_scheduling``."""
        group.value("--loss_kd", loss_weight, 0.0, metavar="W", help="weight of distillation")
        group.flag("--unkd", help="unbiased distillation (MiB)")
        group.value("--alpha", loss_weight, 1.0, help="factor on the teacher's logits; focal loss: weight")
        group.flag("--kd_scheduling", help="multiply the distillation by sqrt(seen classes / new classes)")

    @classmethod
    def from_options(cls, opts: Any) -> OutputDistillation | None:
        """Enabled if ``--loss_kd`` is above 0.

        Raises:
            UserError: the classifier has other channels.
        """
        if opts.loss_kd <= 0:
            return None
        refuse_other_channels(opts, "loss_kd")
        return cls(opts.loss_kd, unbiased=opts.unkd, alpha=opts.alpha, scheduled=opts.kd_scheduling)

    def begin_step(self, context: Context) -> None:
        """Scale the weight by sqrt(seen classes / new classes) with ``--kd_scheduling``."""
        seen, new = context.classes_old + context.classes_new, context.classes_new
        self.factor = self.weight * (math.sqrt(seen / new) if self.scheduled else 1.0)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted mean over pixels."""
        return {self.name: self.factor * self.criterion(batch.outputs, batch.outputs_old)}


class EncoderDistillation(Method):
    """Mean squared error between backbone features of student and teacher (ILT; Michieli, Zanuttigh 2019)."""

    needs = frozenset({"body"})
    needs_teacher = True

    def __init__(self, weight: float, *, masked: bool = False, cosine: bool = False) -> None:
        self.weight = weight
        self.criterion = loss.DistillationEncoderLoss(mask=masked, loss_de_cosine=cosine)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_de``, ``--loss_de_maskedold``, ``--loss_de_cosine``."""
        group.value("--loss_de", loss_weight, 0.0, metavar="W", help="weight of feature distillation (ILT)")
        group.flag("--loss_de_maskedold", help="distil only where the label is background or an old class")
        group.flag("--loss_de_cosine", help="cosine distance instead of MSE")

    @classmethod
    def from_options(cls, opts: Any) -> EncoderDistillation | None:
        """Enabled if ``--loss_de`` is above 0."""
        if opts.loss_de <= 0:
            return None
        return cls(opts.loss_de, masked=opts.loss_de_maskedold, cosine=opts.loss_de_cosine)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted distance of the features."""
        distance = self.criterion(
            features=batch.features["body"],
            features_old=batch.features_old["body"],
            labels=batch.targets,
            classes_old=batch.classes_old,
        )
        return {"encoder_distillation": self.weight * distance}
