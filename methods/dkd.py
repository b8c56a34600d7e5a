"""DKD: decomposed knowledge distillation, and an auxiliary classifier (Baek et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Batch
from methods.checks import refuse_without
from methods.foreground import ForegroundClassifier, ForegroundMethod, checked_pos_weight
from modules.classifiers import add_classifier, convolve
from utils.loss import (
    AuxiliaryLoss,
    DecomposedDistillationLoss,
    SigmoidDistillationLoss,
    exemplar_labels,
    initialise_from_auxiliary,
)
from utils.option_roles import OptionGroup
from utils.option_types import Number, loss_weight


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


class DecomposedDistillation(ForegroundMethod):
    """Distillation of old sigmoids and of their reasoning scores (DKD)."""

    classifier = AuxiliaryClassifier.name

    def __init__(
        self, pos_weight: Sequence[float], kd: float, dkd: float, *, fidelity: str = "paper"
    ) -> None:
        super().__init__(pos_weight, fidelity=fidelity)
        self.kd, self.dkd = kd, dkd
        self.auxiliary = AuxiliaryLoss()
        self.distillation = SigmoidDistillationLoss()
        self.decomposed = DecomposedDistillationLoss("both", fidelity)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--dkd``, its weights, and ``--pos_weight``, which is also STAR's."""
        group.flag("--dkd", role="network", help="sigmoids and an auxiliary classifier (DKD)")
        for name, what in {
            "--loss_sigmoid_kd": "the distillation of old sigmoids",
            "--loss_dkd": "each of the two distillations of reasoning scores",
        }.items():
            group.value(name, loss_weight, 5.0, metavar="W", help=f"weight of {what} (DKD)")
        group.value(
            *("--pos_weight", Number(float, 0, 1e6, above=True), [1.0]),
            nargs="+",
            metavar="G",
            help="weight of a class's own pixels in the binary cross entropy of DKD and STAR; two values: at "
            "step 0 and at later steps",
        )

    @classmethod
    def from_options(cls, opts: Any) -> DecomposedDistillation | None:
        """Enabled with ``--dkd``."""
        if not opts.dkd:
            return None
        weights = opts.loss_sigmoid_kd, opts.loss_dkd
        return cls(checked_pos_weight(opts.pos_weight), *weights, fidelity=opts.fidelity)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """The published head."""
        refuse_without(opts, ["dkd"], ["loss_sigmoid_kd", "loss_dkd"])
        refuse_without(opts, ["dkd", "star"], ["pos_weight"])
        return {"head": "dkd"} if opts.dkd and opts.model == "deeplab" else {}

    def weight_decay_factor(self, parameter: str) -> float:
        """From step 1 on only the newest classifier decays."""
        return 1.0 if self.step == 0 or self.is_newest(parameter) else 0.0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Classification and auxiliary loss; from step 1 on distillation of sigmoids and reasoning scores."""
        terms = {"mbce": self.mbce(batch), "auxiliary": self.auxiliary(batch.outputs)}
        if batch.outputs_old is not None:
            terms["kd"] = self.kd * self.distillation(batch.outputs, batch.outputs_old)
            features = batch.features["pre_logits"], batch.features_old["pre_logits"]
            weights = _foreground(self.model.cls.parts[:-1]), _foreground(self.model_old.cls.parts)
            positive, negative = self.dkd * self.decomposed(*features, *weights)
            terms |= {"dkd_positive": positive, "dkd_negative": negative}
        return terms


def _foreground(parts: Sequence[Any]) -> Tensor:
    """Weights C×D of the foreground classes."""
    return torch.cat([part.weight for part in parts[1:]]).flatten(1)
